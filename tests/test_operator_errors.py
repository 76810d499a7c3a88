"""Bad input to operators: each with an error that says what was given, what was expected and what to try."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import qkv
from qkv.core.errors import (
    BrokenLaw,
    InvalidInput,
    InvalidParameter,
    MissingDependency,
    QKVError,
    Refused,
    StateError,
    UnknownName,
)
from qkv.core.spec import Extra
from qkv.core.state import State
from qkv.ops.full import Full
from qkv.ops.gla import GatedLinearAttention
from qkv.testing import mutant

B, H, G, N, D, E = 2, 6, 3, 11, 5, 7


def given(**changes: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    q, k, v = torch.randn(B, H, N, D), torch.randn(B, G, N, D), torch.randn(B, G, N, E)
    return {"q": q, "k": k, "v": v} | changes


def gla(**changes: Any) -> dict[str, Any]:
    return given(method="gla", log_decay=-torch.rand(B, H, N, D)) | changes


def with_nan(*shape: int) -> Tensor:
    x = torch.zeros(shape)
    x.flatten()[3] = torch.nan
    return x


FULL: list[tuple[str, dict[str, Any], type[QKVError], str]] = [
    ("three axes", given(q=torch.zeros(H, N, D)), InvalidInput, r"four axes.*q \(6, 11, 5\)"),
    ("not a tensor", given(k=[[1.0]]), InvalidInput, "k must be a torch tensor, not list"),
    ("other batch", given(q=torch.zeros(3, H, N, D)), InvalidInput, r"expected q \[B, H, N, D\].*\(3, 6, 11, 5\)"),
    ("other width", given(k=torch.zeros(B, G, N, D + 1)), InvalidInput, "expected q"),
    ("k and v differ", given(v=torch.zeros(B, G, N + 1, E)), InvalidInput, "expected q"),
    ("heads do not divide", given(q=torch.zeros(B, 5, N, D)), InvalidInput, "5 query heads do not divide over 3"),
    ("empty batch", given(q=torch.zeros(0, H, N, D), k=torch.zeros(0, G, N, D), v=torch.zeros(0, G, N, E)),
     InvalidInput, "empty"),
    ("empty prompt", given(q=torch.zeros(B, H, 0, D), k=torch.zeros(B, G, 0, D), v=torch.zeros(B, G, 0, E)),
     InvalidInput, "empty"),
    ("N above M, causal", given(k=torch.zeros(B, G, 4, D), v=torch.zeros(B, G, 4, E)), InvalidInput, "N=11 > M=4"),
    ("mixed dtypes", given(v=torch.zeros(B, G, N, E).double()), InvalidInput, "one floating-point dtype.*float64"),
    ("integers", given(**{n: torch.zeros(B, H, N, D, dtype=torch.long) for n in "qkv"}), InvalidInput, "floating-point"),
    ("other device", given(k=torch.zeros(B, G, N, D, device="meta")), InvalidInput, "different devices: cpu, meta"),
    ("NaN query", given(q=with_nan(B, H, N, D)), InvalidInput, "q holds NaN"),
    ("infinite value", given(v=with_nan(B, G, N, E).nan_to_num(torch.inf)), InvalidInput, "v holds NaN or infinite"),
    ("padding as float", given(padding=torch.ones(B, N)), InvalidInput, "bool.*float32"),
    ("padding of another shape", given(padding=torch.ones(B, N + 1, dtype=torch.bool)), InvalidInput, r"\(2, 11\)"),
    ("padding as a list", given(padding=[[True] * N] * B), InvalidInput, "bool.*list"),
    ("padding elsewhere", given(padding=torch.ones(B, N, dtype=torch.bool, device="meta")), InvalidInput, "padding lies"),
    ("an input it lacks", given(log_decay=torch.zeros(H)), UnknownName, "takes no input 'log_decay'; it takes none"),
    ("unknown form", given(form="fsat"), UnknownName, "'fast'"),
    ("no kernel", given(form="kernel"), Refused, "form='fast'"),
    ("no state", given(return_state=True), Refused, "no recurrent state"),
    ("unknown method", given(method="glaa"), UnknownName, "did you mean 'gla'"),
    ("unknown setting", given(method="gla:chunksize=4"), UnknownName, "did you mean 'chunk_size'"),
    ("not a method", given(method=3), InvalidParameter, "not by int"),
]  # fmt: skip

GLA: list[tuple[str, dict[str, Any], type[QKVError], str]] = [
    ("missing extra", given(method="gla"), InvalidInput, "needs `log_decay`.*share of the state"),
    ("misspelt extra", gla(log_dacay=torch.zeros(H)), UnknownName, "did you mean 'log_decay'"),
    ("growth", gla(log_decay=torch.full((H,), 0.1)), InvalidInput, r"`log_decay` must be <= 0\.0.*0\.1"),
    ("wrong axes", gla(log_decay=-torch.rand(B, N, H)), InvalidInput, r"\(2, 11, 6\).*\(6,\) or \(2, 6, 11\)"),
    ("decay elsewhere", gla(log_decay=torch.zeros(H, device="meta")), InvalidInput, "`log_decay` lies on meta"),
    ("decay is NaN", gla(log_decay=with_nan(B, H, N)), InvalidInput, "log_decay holds NaN"),
    ("decay is a number", gla(log_decay=-0.5), InvalidInput, "must be a torch tensor of real numbers, not float"),
    ("bidirectional", gla(causal=False), Refused, "causal by definition"),
    ("cross", gla(q=torch.zeros(B, H, N - 1, D), log_decay=torch.zeros(H)), InvalidInput, "self-attention: N=10 and M=11"),
    ("state is a tensor", gla(initial_state=torch.zeros(B, H, D, E)), InvalidInput, "`State`.*not Tensor"),
    ("another's state", gla(initial_state=State("linear", {"state": torch.zeros(B, H, D, E)})), StateError,
     "state of 'linear'"),
    ("state of another shape", gla(initial_state=State("gla", {"state": torch.zeros(B, H, E, D)})), StateError,
     r"\(2, 6, 7, 5\), expected \(2, 6, 5, 7\)"),
    ("state without its tensor", gla(initial_state=State("gla", {})), StateError, "'state' has shape None"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), [pytest.param(*x[1:], id=x[0]) for x in FULL + GLA])
def test_bad_input_is_refused(call: dict[str, Any], error: type[QKVError], message: str) -> None:
    with pytest.raises(error, match=message):
        qkv.attention(**call)


@pytest.mark.parametrize("settings", [{"chunk_size": 10, "sub_chunk": 4}, {"chunk_size": 0}, {"chunk_size": -64},
                                      {"sub_chunk": 128}, {"chunk_size": 2.5}, {"chunk_size": True}])  # fmt: skip
def test_chunk_sizes_that_do_not_fit(settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameter, match="gla: "):
        qkv.method("gla", **settings)


def test_step_takes_one_token_and_a_state_of_its_own() -> None:
    m, call = qkv.method("gla"), gla()
    q, k, v, g = (call[n] for n in ("q", "k", "v", "log_decay"))
    state = m.initial(q, k, v, log_decay=g)
    with pytest.raises(InvalidInput, match="one token, got N=11"):
        m.step(q, k, v, state, log_decay=g)
    one = [x[:, :, :1] for x in (q, k, v)]
    with pytest.raises(InvalidInput, match="not NoneType"):
        m.step(*one, None, log_decay=g[:, :, :1])
    with pytest.raises(InvalidInput, match="needs `log_decay`"):
        m.step(*one, state)
    with pytest.raises(StateError, match="expected"):
        m.step(*one, state.index(torch.tensor([0])), log_decay=g[:, :, :1])
    with pytest.raises(StateError, match="cannot be taken out"):
        state.crop(2)
    with pytest.raises(Refused, match="no one-token form"):
        qkv.method("full").step(*one, state)
    with pytest.raises(Refused, match="no recurrent state"):
        qkv.method("full").initial(*one)


def test_capabilities_not_claimed_are_refused() -> None:
    call = given()
    q, k, v = call["q"], call["k"], call["v"]
    padding = torch.ones(B, N, dtype=torch.bool)
    with pytest.raises(Refused, match="no padded form"):
        mutant(Full, padding=False)()(q, k, v, padding=padding)
    with pytest.raises(InvalidInput, match="repeat keys and values"):
        mutant(Full, gqa=False)()(q, k, v)
    with pytest.raises(Refused, match="bidirectional by definition"):
        mutant(Full, causal="never")()(q, k, v, causal=True)
    with pytest.raises(Refused, match="no softmax scale"):
        mutant(Full, scale=None)()(q, k, v, scale=0.5)
    with pytest.raises(MissingDependency, match="form='fast'"):
        mutant(Full, kernel="qkv.kernels.nowhere:run")()(q, k, v, form="kernel")
    bounded = {"log_decay": Extra(axes="h", sample=torch.rand, low=-1.0, high=0.0)}
    with pytest.raises(InvalidInput, match=r">= -1\.0 and <= 0\.0"):
        mutant(GatedLinearAttention, extras=bounded)()(q, k, v, log_decay=torch.full((H,), -2.0))
    with pytest.raises(Refused, match="not an operator"):
        qkv.attention(q, k, v, method="streamingllm")


def test_values_under_padding_are_not_judged() -> None:
    """NaN is an error in a real token and nothing under padding; a growing gate under padding is nothing either."""
    call = gla()
    real = torch.arange(N).expand(B, N) >= 4
    poisoned = {n: x.masked_fill(~real[:, None, :, None], torch.nan) for n, x in call.items() if isinstance(x, Tensor)}
    want = qkv.attention(**call, padding=real)
    got = qkv.attention(**(call | poisoned), padding=real)
    assert torch.equal(got[:, :, 4:], want[:, :, 4:])
    with pytest.raises(InvalidInput, match="NaN"):
        qkv.attention(**(call | poisoned))
    grows = call["log_decay"].masked_fill(~real[:, None, :, None], 3.0)
    assert torch.equal(qkv.attention(**(call | {"log_decay": grows}), padding=real)[:, :, 4:], want[:, :, 4:])


def test_queries_of_cross_attention_are_not_padded_by_the_keys() -> None:
    """Bidirectional with N = M: queries may be another sequence, so padding of keys must not blank them."""
    call = given()
    real = torch.arange(N).expand(B, N) >= 4
    got = qkv.attention(**call, padding=real, causal=False)
    want = qkv.attention(call["q"], call["k"][:, :, 4:], call["v"][:, :, 4:], causal=False)
    assert torch.allclose(got, want, atol=1e-6)


def test_a_broken_law_says_which_by_how_much_and_what_to_look_at() -> None:
    broken = mutant(Full, fast=lambda q, k, v, **call: Full.spec.fast(q, k, v, **call) + 1e-3)
    verdict = qkv.verify(broken, quick=True)
    assert not verdict.ok
    message = next(r.message for r in verdict.failed if r.law == "equals_reference")
    for part in ("full-fast breaks `equals_reference`", "off by 0.001", "tolerance", "chunk border"):
        assert part in message
    assert issubclass(BrokenLaw, AssertionError)
