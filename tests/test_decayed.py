"""The decayed linear core: strong decay in float32, special cases with closed forms, higher derivatives, precision."""

from __future__ import annotations

import pytest
import torch

import qkv
from qkv.core.errors import InvalidInput, UnknownName
from qkv.ops._common.decayed import _Diagonal, decayed_linear_attention
from qkv.testing import close, finite

B, H, N, D, E = 2, 3, 101, 7, 5


def _qkv(dtype: torch.dtype = torch.float64, n: int = N) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(B, H, n, w, generator=rng, dtype=torch.float64).to(dtype) for w in (D, D, E)]


@pytest.mark.parametrize("shape", [(H,), (B, H, N), (B, H, N, D)], ids=["h", "bhn", "bhnd"])
@pytest.mark.parametrize("rate", [-20.0, -1e3, -1e6])
def test_strong_decay_is_finite_forward_and_backward(shape: tuple[int, ...], rate: float) -> None:
    q, k, v = (x.requires_grad_() for x in _qkv(torch.float32))
    g = torch.full(shape, rate, requires_grad=True)
    out = decayed_linear_attention(q, k, v, log_decay=g).out
    out.sum().backward()
    for x in (out, q.grad, k.grad, v.grad, g.grad):
        finite(x)


def test_the_naive_factorisation_fails_where_the_chunks_do_not() -> None:
    """The control: (q exp(G)) (k exp(-G))^T overflows in float32 at -20 a step."""
    q, k, v = _qkv(torch.float32)
    total = torch.full((B, H, N, D), -20.0).cumsum(2)
    naive = ((q * total.exp()) @ (k * (-total).exp()).mT).tril() @ v
    assert not naive.isfinite().all()
    finite(decayed_linear_attention(q, k, v, log_decay=torch.full((B, H, N, D), -20.0)).out)


def test_limits_with_closed_forms() -> None:
    q, k, v = _qkv()
    forgets = decayed_linear_attention(q, k, v, log_decay=torch.full((H,), -1e9, dtype=torch.float64)).out
    close(forgets, (q * k).sum(-1, keepdim=True) * v, atol=1e-12, what="decay -> -inf: only the token itself")
    keeps = decayed_linear_attention(q, k, v, log_decay=torch.zeros(B, H, N, D, dtype=torch.float64)).out
    close(keeps, (q @ k.mT).tril() @ v, rtol=1e-12, what="decay 0: plain linear attention")
    rate = torch.tensor([-0.1, -0.5, -2.0], dtype=torch.float64)
    age = torch.arange(N)[:, None] - torch.arange(N)
    retention = (q @ k.mT * (age.clamp(min=0) * rate[:, None, None]).exp()).tril() @ v
    close(decayed_linear_attention(q, k, v, log_decay=rate).out, retention, rtol=1e-12, what="constant: retention")
    same = [rate, rate[None, :, None].expand(B, H, N), rate[None, :, None, None].expand(B, H, N, D)]
    for g in same[1:]:
        close(decayed_linear_attention(q, k, v, log_decay=g).out, retention, rtol=1e-12, what=f"axes {g.ndim}")


def test_one_channel_is_a_scalar_scan() -> None:
    q, k, v = (x[..., :1] for x in _qkv())
    g = torch.nn.functional.logsigmoid(torch.randn(B, H, N, 1, dtype=torch.float64))
    state, want = torch.zeros(B, H, dtype=torch.float64), []
    for t in range(N):
        state = state * g[:, :, t, 0].exp() + (k * v)[:, :, t, 0]
        want.append(q[:, :, t, 0] * state)
    close(decayed_linear_attention(q, k, v, log_decay=g).out[..., 0], torch.stack(want, 2), rtol=1e-12)


def test_normaliser_averages_values() -> None:
    """With equal keys and queries and no decay the normalised form is a running mean; empty rows give 0, not NaN."""
    _, _, v = _qkv()
    ones = torch.ones(B, H, N, D, dtype=torch.float64)
    count = torch.arange(1, N + 1, dtype=torch.float64)[:, None]
    close(decayed_linear_attention(ones, ones, v, normalise=True).out, v.cumsum(2) / count, rtol=1e-12)
    real = torch.ones(B, N, dtype=torch.bool)
    real[0, :9] = False
    q = ones.clone().requires_grad_()
    out = decayed_linear_attention(q, ones, v, normalise=True, padding=real).out
    assert not out[0, :, :9].any()
    out.sum().backward()
    finite(q.grad)


def test_diagonal_block_first_and_second_derivatives() -> None:
    rng = torch.Generator().manual_seed(1)
    q, k = (torch.randn(2, 5, 3, generator=rng, dtype=torch.float64, requires_grad=True) for _ in range(2))
    g = (-torch.rand(2, 5, 3, generator=rng, dtype=torch.float64)).cumsum(1).detach().requires_grad_()
    assert torch.autograd.gradcheck(_Diagonal.apply, (q, k, g))
    assert torch.autograd.gradgradcheck(_Diagonal.apply, (q, k, g))


def test_long_sequence_in_float32_keeps_its_precision() -> None:
    """The cumulative sum starts anew in each chunk: the error does not grow with the length."""
    q, k, v = _qkv(torch.float32, 2048)
    g = -torch.rand(B, H, 2048, D) * 2
    want = decayed_linear_attention(*(x.double() for x in (q, k, v)), log_decay=g.double(), form="recurrent").out
    got = decayed_linear_attention(q, k, v, log_decay=g).out
    close(got, want, rtol=1e-5, what="float32 at 2048 tokens")


def test_state_dtypes_and_low_precision_inputs() -> None:
    for dtype, wide in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        got = decayed_linear_attention(*_qkv(dtype), normalise=True)
        assert got.out.dtype == dtype
        assert got.state.dtype == got.keys.dtype == wide  # type: ignore[union-attr]


def test_bad_calls_say_what_is_wrong() -> None:
    q, k, v = _qkv()
    with pytest.raises(InvalidInput, match="log_decay has shape"):
        decayed_linear_attention(q, k, v, log_decay=torch.zeros(H, N, dtype=torch.float64))
    with pytest.raises(InvalidInput, match="multiple of"):
        decayed_linear_attention(q, k, v, chunk_size=10, sub_chunk=4)
    with pytest.raises(UnknownName, match="'chunked'"):
        decayed_linear_attention(q, k, v, form="chunk")  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="`state` alone"):
        decayed_linear_attention(q, k, v, keys=torch.zeros(B, H, D, dtype=torch.float64))
    with pytest.raises(InvalidInput, match="both"):
        decayed_linear_attention(q, k, v, normalise=True, state=torch.zeros(B, H, D, E, dtype=torch.float64))
    with pytest.raises(InvalidInput, match="expected"):
        decayed_linear_attention(q, k, v, state=torch.zeros(B, H, E, D, dtype=torch.float64))


def test_gla_decodes_in_a_state_of_constant_size() -> None:
    q, k, v = _qkv(torch.float32)
    g = -torch.rand(B, H, N, D)
    sizes = {qkv.attention(*(x[:, :, :n] for x in (q, k, v)), method="gla", log_decay=g[:, :, :n],
                           return_state=True)[1].bytes for n in (1, 17, N)}  # fmt: skip
    assert sizes == {B * H * D * E * 4}


@pytest.mark.parametrize("shape", [(B, H, N), (B, H, N, D)], ids=["bhn", "bhnd"])
def test_gradients_of_strong_gates_are_right_however_small(shape: tuple[int, ...]) -> None:
    """At -20 a step they are about 1e-9: what a token reads from itself must not enter q dq - k dk, where it only cancels."""
    tensors, rng = _qkv(torch.float32), torch.Generator().manual_seed(2)
    weight = torch.randn(B, H, N, E, generator=rng, dtype=torch.float64)

    def gradient(form: str, dtype: torch.dtype) -> torch.Tensor:
        g = torch.full(shape, -20.0, dtype=dtype, requires_grad=True)
        out = decayed_linear_attention(*(x.to(dtype) for x in tensors), log_decay=g, form=form).out  # type: ignore[arg-type]
        return torch.autograd.grad((out * weight).sum(), g)[0]

    want = gradient("recurrent", torch.float64)
    assert 0 < want.norm() < 1e-5
    assert (gradient("chunked", torch.float32) - want).norm() < 1e-3 * want.norm()


def test_the_backward_pass_does_not_grow_with_the_square_of_the_chunks() -> None:
    """Every chunk's gradient is written once: no operation of the backward pass touches all chunks once per chunk."""

    def written(n: int) -> int:
        q, k, v = (x[:1, :1].requires_grad_() for x in _qkv(torch.float32, n))
        out = decayed_linear_attention(q, k, v, log_decay=torch.full((1, 1, n), -0.1), chunk_size=8).out
        with torch.profiler.profile(profile_memory=True) as seen:
            out.sum().backward()
        return sum(max(0, e.self_cpu_memory_usage) for e in seen.key_averages())

    assert written(1024) < 5 * written(256)
