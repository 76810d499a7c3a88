"""Operators on drawn shapes, head groupings, paddings, chunk sizes, splits and decays, against their definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import qkv
from qkv.core.errors import InvalidParameter
from qkv.ops._common.decayed import decayed_linear_attention
from qkv.testing import close

torch.set_num_threads(1)
EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
TIGHT = {"rtol": 1e-9, "atol": 1e-9}

shapes = st.fixed_dictionaries({
    "b": st.integers(1, 3), "g": st.integers(1, 3), "r": st.integers(1, 3), "n": st.integers(1, 40),
    "d": st.integers(1, 6), "e": st.integers(1, 6), "seed": st.integers(0, 999),
})  # fmt: skip
chunkings = st.tuples(st.integers(1, 9), st.integers(1, 5)).map(
    lambda x: {"chunk_size": x[0] * x[1], "sub_chunk": x[0]}
)
decays = st.sampled_from([0.0, 1e-3, 0.5, 5.0, 20.0, 1e3])
axes = st.sampled_from(["h", "bhn", "bhnd"])


def _tensors(s: dict[str, int], m: int | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Any]:
    rng = torch.Generator().manual_seed(s["seed"])

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    m = s["n"] if m is None else m
    q, k = normal(s["b"], s["g"] * s["r"], s["n"], s["d"]), normal(s["b"], s["g"], m, s["d"])
    return q, k, normal(s["b"], s["g"], m, s["e"]), rng


def _log_decay(s: dict[str, int], letters: str, strength: float, rng: torch.Generator) -> torch.Tensor:
    sizes = {"b": s["b"], "h": s["g"] * s["r"], "n": s["n"], "d": s["d"]}
    return -strength * torch.rand([sizes[c] for c in letters], generator=rng, dtype=torch.float64)


def _holes(b: int, m: int, rng: torch.Generator) -> torch.Tensor:
    """Any pattern of padding; some rows may be padding altogether."""
    return torch.rand(b, m, generator=rng) < torch.rand(b, 1, generator=rng) * 1.5


@EXAMPLES
@given(shapes, chunkings, axes, decays, st.booleans())
def test_gla_equals_its_definition(s: dict[str, int], chunks: Any, letters: str, strength: float, padded: bool) -> None:
    q, k, v, rng = _tensors(s)
    call: dict[str, Any] = {"log_decay": _log_decay(s, letters, strength, rng), "return_state": True}
    if padded:
        call["padding"] = _holes(s["b"], s["n"], rng)
    method = qkv.method("gla", **chunks)
    (got, state), (want, true_state) = method(q, k, v, **call), method(q, k, v, form="reference", **call)
    close(got, want, **TIGHT)
    close(state["state"], true_state["state"], what="state", **TIGHT)


@EXAMPLES
@given(shapes, chunkings, axes, decays, st.floats(0, 1))
def test_gla_gradients_and_handover(
    s: dict[str, int], chunks: Any, letters: str, strength: float, share: float
) -> None:
    """Gradients through a state handed over at a drawn split equal those of the whole definition."""
    s = s | {"n": max(2, s["n"])}
    q, k, v, rng = _tensors(s)
    g = _log_decay(s, letters, strength, rng)
    split = 1 + int(share * (s["n"] - 2))
    method, leaves = qkv.method("gla", **chunks), [x.requires_grad_() for x in (q, k, v, g)]
    weight = torch.randn(*q.shape[:3], v.shape[-1], generator=rng, dtype=torch.float64)
    want = torch.autograd.grad((method(q, k, v, log_decay=g, form="reference") * weight).sum(), leaves)
    head, state = method(*(x[:, :, :split] for x in (q, k, v)), log_decay=g if g.ndim == 1 else g[:, :, :split],
                         return_state=True)  # fmt: skip
    tail = method(*(x[:, :, split:] for x in (q, k, v)), log_decay=g if g.ndim == 1 else g[:, :, split:],
                  initial_state=state)  # fmt: skip
    got = torch.autograd.grad((torch.cat([head, tail], 2) * weight).sum(), leaves)
    for name, x, y in zip("qkvg", got, want, strict=True):
        close(x, y, what=f"gradient of {name}", rtol=1e-9, atol=1e-8)


@EXAMPLES
@given(shapes, st.integers(0, 20), st.booleans(), st.booleans())
def test_full_equals_its_definition(s: dict[str, int], longer: int, causal: bool, padded: bool) -> None:
    q, k, v, rng = _tensors(s, s["n"] + longer)
    call: dict[str, Any] = {"causal": causal}
    if padded:
        call["padding"] = _holes(s["b"], s["n"] + longer, rng)
    close(qkv.attention(q, k, v, **call), qkv.attention(q, k, v, form="reference", **call), **TIGHT)


@EXAMPLES
@given(shapes, chunkings, st.sampled_from([None, "h", "bhn", "bhnd"]), decays, st.booleans(), st.booleans())
def test_forms_of_the_decayed_core_agree(
    s: dict[str, int], chunks: Any, letters: str | None, strength: float, normalise: bool, padded: bool
) -> None:
    """Chunked, recurrent and quadratic, with and without normaliser, from a drawn state."""
    q, k, v, rng = _tensors(s)
    q, k = q.abs(), k.abs() + 0.1
    b, h, _, d = q.shape
    start = {"state": torch.randn(b, h, d, v.shape[-1], generator=rng, dtype=torch.float64)}
    if normalise:
        start["keys"] = torch.rand(b, h, d, generator=rng, dtype=torch.float64) + 0.1
    log_decay = None if letters is None else _log_decay(s, letters, strength, rng)
    padding = _holes(b, s["n"], rng) if padded else None
    results = [
        decayed_linear_attention(q, k, v, log_decay=log_decay, normalise=normalise, scale=0.7, padding=padding, form=form,
                                 **start, **chunks)
        for form in ("recurrent", "quadratic", "chunked")
    ]  # fmt: skip
    want = results[0]
    for got in results[1:]:
        close(got.out, want.out, what="out", **TIGHT)
        close(got.state, want.state, what="S", **TIGHT)
        assert (got.keys is None) == (want.keys is None) == (not normalise)
        if got.keys is not None and want.keys is not None:
            close(got.keys, want.keys, what="z", **TIGHT)


@EXAMPLES
@given(st.integers(1, 40), st.integers(1, 40))
def test_chunk_sizes_that_do_not_fit_are_refused(chunk_size: int, sub_chunk: int) -> None:
    if chunk_size % sub_chunk:
        with pytest.raises(InvalidParameter, match="multiple"):
            qkv.method("gla", chunk_size=chunk_size, sub_chunk=sub_chunk)
    else:
        assert qkv.method("gla", chunk_size=chunk_size, sub_chunk=sub_chunk).settings()["chunk_size"] == chunk_size
