"""Hydra: the matrix against two shifted scans, symmetry under reversal, ranks, the block around it."""

from __future__ import annotations

import pytest
import torch

import qkv
from qkv.core.errors import InvalidInput, InvalidParameter, Refused
from qkv.layers._hydra import HydraLayer
from qkv.ops.hydra import materialise
from qkv.testing import close

B, H, N, S, P = 2, 3, 24, 4, 5


def _draw() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    rng = torch.Generator().manual_seed(0)
    q, k, bq, bk = (torch.randn(B, H, N, S, generator=rng, dtype=torch.float64) for _ in range(4))
    v = torch.randn(B, H, N, P, generator=rng, dtype=torch.float64)
    dt, back = (torch.rand(B, H, N, generator=rng, dtype=torch.float64) for _ in range(2))
    rate, delta = (
        -torch.rand(H, generator=rng, dtype=torch.float64),
        torch.randn(B, H, N, generator=rng, dtype=torch.float64),
    )
    return q, k, v, {"dt": dt, "back_dt": back, "rate": rate, "diagonal": delta, "back_q": bq, "back_k": bk}


def _scan(c: torch.Tensor, b: torch.Tensor, v: torch.Tensor, dt: torch.Tensor, rate: torch.Tensor) -> torch.Tensor:
    """The inclusive scan s_t = h_t C_t."""
    h, outs = torch.zeros(B, H, S, P, dtype=torch.float64), []
    for t in range(N):
        w = dt[:, :, t, None, None]
        h = (w * rate[:, None, None]).exp() * h + w * b[:, :, t, :, None] * v[:, :, t, None, :]
        outs.append(torch.einsum("bhs,bhsp->bhp", c[:, :, t], h))
    return torch.stack(outs, 2)


@pytest.mark.parametrize("chunk", [1, 7, 16, 64, 256])
def test_the_matrix_is_two_shifted_scans_and_a_diagonal(chunk: int) -> None:
    q, k, v, x = _draw()
    ahead = _scan(q, k, v, x["dt"], x["rate"])
    back = _scan(*(y.flip(2) for y in (x["back_q"], x["back_k"], v, x["back_dt"])), x["rate"])
    shift = lambda y: torch.cat([torch.zeros_like(y[:, :, :1]), y[:, :, :-1]], 2)  # noqa: E731
    want = shift(ahead) + shift(back).flip(2) + x["diagonal"].unsqueeze(-1) * v
    close(qkv.attention(q, k, v, method=f"hydra:chunk_size={chunk}", causal=False, **x), want, rtol=1e-9)
    close(materialise(q, k, **x) @ v, want, rtol=1e-9, what="the matrix")
    plain = ahead + back.flip(2) + x["diagonal"].unsqueeze(-1) * v
    assert (plain - want).abs().max() > 1e-2, "without the shift the diagonal is counted twice"


def test_without_steps_only_the_diagonal_is_left() -> None:
    q, k, v, x = _draw()
    still = x | {"dt": torch.zeros_like(x["dt"]), "back_dt": torch.zeros_like(x["dt"])}
    close(qkv.attention(q, k, v, method="hydra", causal=False, **still), x["diagonal"].unsqueeze(-1) * v, rtol=1e-12)
    one = {n: y[:, :, :1] if y.ndim > 1 else y for n, y in x.items() if n != "diagonal"}
    assert not qkv.attention(q[:, :, :1], k[:, :, :1], v[:, :, :1], method="hydra", causal=False, **one).any()


def test_exchanging_the_directions_and_reversing_reverses() -> None:
    q, k, v, x = _draw()
    want = qkv.attention(q, k, v, method="hydra", causal=False, **x).flip(2)
    turned = {
        "dt": x["back_dt"].flip(2), "back_dt": x["dt"].flip(2), "rate": x["rate"], "diagonal": x["diagonal"].flip(2),
        "back_q": q.flip(2), "back_k": k.flip(2),
    }  # fmt: skip
    got = qkv.attention(x["back_q"].flip(2), x["back_k"].flip(2), v.flip(2), method="hydra", causal=False, **turned)
    close(got, want, rtol=1e-9)


def test_blocks_off_the_diagonal_have_the_rank_of_the_state() -> None:
    q, k, _, x = _draw()
    whole = materialise(q, k, **x)
    for at in (8, 12, 17):
        for block in (whole[..., at:, :at], whole[..., :at, at:]):
            assert int(torch.linalg.matrix_rank(block).max()) <= S
    assert int(torch.linalg.matrix_rank(whole).min()) > S


def test_a_causal_call_is_refused() -> None:
    q, k, v, x = _draw()
    with pytest.raises(Refused, match="bidirectional by definition"):
        qkv.attention(q, k, v, method="hydra", causal=True, **x)
    with pytest.raises(InvalidInput, match="must be >= 0"):
        qkv.attention(q, k, v, method="hydra", causal=False, **(x | {"dt": -x["dt"]}))
    with pytest.raises(InvalidInput, match="must be <= 0"):
        qkv.attention(q, k, v, method="hydra", causal=False, **(x | {"rate": -x["rate"]}))


def _layer(**settings: int) -> HydraLayer:
    torch.manual_seed(0)
    return HydraLayer(12, state_size=6, head_width=8, **settings).double()


def test_the_block_reverses_when_its_directions_are_exchanged() -> None:
    layer, x = _layer(), torch.randn(2, 19, 12, dtype=torch.float64)
    want = layer(x).flip(1)
    with torch.no_grad():  # exchange B, C with B', C', dt with dt', and turn the kernels
        inner, part, heads = layer.inner, layer.state_size, layer.heads
        rows = torch.arange(layer.project.out_features)
        start = 2 * inner
        for a in range(2 * part):
            rows[start + a], rows[start + 2 * part + a] = start + 2 * part + a, start + a
        end = start + 4 * part
        rows[end : end + heads], rows[end + heads :] = rows[end + heads :].clone(), rows[end : end + heads].clone()
        layer.project.weight.copy_(layer.project.weight[rows])
        channels = rows[inner:end] - inner
        layer.conv.weight.copy_(layer.conv.weight[channels].flip(-1))
        layer.conv.bias.copy_(layer.conv.bias[channels])  # type: ignore[union-attr]
    close(layer(x.flip(1)), want, rtol=1e-9)


@pytest.mark.parametrize("settings", [{}, {"shared": True}, {"groups": 3, "chunk_size": 4}])
def test_padding_at_the_ends_changes_nothing_in_the_block(settings: dict[str, int]) -> None:
    layer, x = _layer(**settings), torch.randn(2, 15, 12, dtype=torch.float64)
    real = torch.ones(2, 15, dtype=torch.bool)
    real[0, :4], real[1, 11:] = False, False
    out = layer(x, real)
    close(out[0, 4:], layer(x[:1, 4:])[0], rtol=1e-9, what="padded on the left")
    close(out[1, :11], layer(x[1:, :11])[0], rtol=1e-9, what="padded on the right")
    x.requires_grad_()
    layer(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_bad_blocks_are_refused() -> None:
    with pytest.raises(InvalidParameter, match="must be odd"):
        HydraLayer(12, conv=4)
    with pytest.raises(InvalidParameter, match="must divide expand"):
        HydraLayer(12, head_width=7)
    with pytest.raises(InvalidParameter, match="must divide the 3 heads"):
        HydraLayer(12, head_width=8, groups=2)
    with pytest.raises(InvalidInput, match="padding must be bool"):
        _layer()(torch.randn(1, 4, 12, dtype=torch.float64), torch.ones(1, 3, dtype=torch.bool))
