"""L2ViT's linear attention: what the floor does to rows and keys, and windows beside it."""

from __future__ import annotations

import pytest
import torch

import qkv
from qkv.core.errors import InvalidInput
from qkv.ops._common.grids import LocalConcentration, unwindows, windows
from qkv.testing import close

B, H, N, D, E = 2, 3, 24, 6, 5
ONES = torch.ones(B, H, N, dtype=torch.float64)


def _draw(scale: float = 1.0) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [scale * torch.randn(B, H, N, x, generator=rng, dtype=torch.float64) for x in (D, D, E)]


def _rows(q: torch.Tensor, k: torch.Tensor, floor: float) -> torch.Tensor:
    eye = torch.eye(k.shape[2], dtype=q.dtype).expand(*k.shape[:2], -1, -1)
    return qkv.attention(q, k, eye, method=f"l2vit:den_floor={floor}", causal=False)


def test_rows_sum_to_the_temperature_up_to_the_floor() -> None:
    q, k, _ = _draw()
    raw = (q.relu() @ k.relu().mT).sum(-1)
    close(_rows(q, k, 1e-12).sum(-1), D**-0.5 * (raw > 0).double(), rtol=1e-9, what="no floor")
    close(_rows(q, k, 30.0).sum(-1), D**-0.5 * (raw / 30).clamp(max=1.0), rtol=1e-9, what="floor 30")
    assert (raw < 30).any() and (raw > 30).any()
    tau = torch.rand(H, dtype=torch.float64)
    got = qkv.attention(q, k, torch.ones_like(k), method="l2vit:den_floor=1e-12", causal=False, temperature=tau)
    close(got[..., 0], (tau[:, None] * ONES) * (raw > 0), rtol=1e-9, what="learned temperature")


def test_scaled_keys_change_nothing_above_the_floor_and_everything_below() -> None:
    q, k, v = _draw(20.0)
    raw = (q.relu() @ k.relu().mT).sum(-1)
    assert (raw[raw > 0] > 100).all()
    large = qkv.attention(q, k, v, method="l2vit", causal=False)
    close(qkv.attention(q, 3 * k, v, method="l2vit", causal=False), large, rtol=1e-9, what="above")
    small = qkv.attention(q / 400, k / 400, v, method="l2vit", causal=False)
    close(qkv.attention(q / 400, k / 200, v, method="l2vit", causal=False), 2 * small, rtol=1e-9, what="below")


def test_negative_queries_give_zero_and_the_floor_matters_at_the_start() -> None:
    q, k, v = _draw()
    q[:, :, 3] = -q[:, :, 3].abs()
    out = qkv.attention(q, k, v, method="l2vit", causal=False)
    assert not out[:, :, 3].any()
    low = qkv.attention(q, k, v, method="l2vit:den_floor=1.0", causal=False)
    assert (low - out).abs().max() > 0.1, "at first denominators lie below 100: the two floors differ"


def test_windows_over_everything_are_full_attention() -> None:
    q, k, v = _draw()
    grid = (4, 6)
    cut = [windows(x, grid, 6) for x in (q, k, v)]
    got = qkv.attention(*(x for x, _ in cut), method="full", causal=False, padding=cut[0][1])
    want = qkv.attention(q, k, v, method="full", causal=False)
    close(unwindows(got, grid, 6), want, rtol=1e-9, what="one window, its filling masked")
    two = [windows(x, grid, 2)[0] for x in (q, k, v)]
    near = unwindows(qkv.attention(*two, method="full", causal=False), grid, 2)
    first = qkv.attention(*(x[:, :, [0, 1, 6, 7]] for x in (q, k, v)), method="full", causal=False)
    close(near[:, :, [0, 1, 6, 7]], first, rtol=1e-9, what="windows of four")


def test_local_concentration_needs_a_plane() -> None:
    with pytest.raises(InvalidInput, match="grid"):
        LocalConcentration(8)(torch.zeros(1, 24, 8), (24,))


def test_state_has_the_size_of_the_page() -> None:
    q, k, v = (x.float() for x in _draw())
    _, state = qkv.attention(q, k, v, method="l2vit", return_state=True)
    assert state.bytes == 4 * B * H * D * (E + 1)
