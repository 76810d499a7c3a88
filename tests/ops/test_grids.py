"""Tokens on a grid: what goes on comes off, convolutions and windows against plain loops, rotations and offsets by their rule."""

from __future__ import annotations

import pytest
import torch

from qkv.core.errors import InvalidInput
from qkv.ops._common import grids
from qkv.testing import close

B, H, D, h, w = 2, 3, 4, 5, 7
N = h * w


def _x(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_tokens_go_on_a_grid_and_come_off() -> None:
    x = _x(B, H, N, D)
    field = grids.on_grid(x, (h, w))
    assert field.shape == (B, H * D, h, w)
    assert torch.equal(field[1, 2 * D + 3, 4, 1], x[1, 2, 4 * w + 1, 3])
    assert torch.equal(grids.off_grid(field, H), x)
    flat = x.transpose(1, 2).flatten(2)
    assert torch.equal(grids.on_grid(flat, (h, w)), field)
    assert torch.equal(grids.off_grid(field), flat)


def test_depthwise_is_a_sum_over_neighbours() -> None:
    x, weight, bias = _x(B, N, D), _x(D, 1, 3, 3), _x(D)
    want = torch.zeros(B, h, w, D, dtype=torch.float64) + bias
    field = x.unflatten(1, (h, w))
    for y in range(h):
        for z in range(w):
            for a in (-1, 0, 1):
                for b in (-1, 0, 1):
                    if 0 <= y + a < h and 0 <= z + b < w:
                        want[:, y, z] += weight[:, 0, a + 1, b + 1] * field[:, y + a, z + b]
    close(grids.depthwise(x, weight, bias, (h, w)), want.flatten(1, 2), rtol=1e-12, what="depthwise")
    line = grids.depthwise(x, weight[:, :, 1], None, (N,))
    middle = (weight[:, 0, 1] * x[:, 2:5].mT).sum(-1)
    close(line[:, 3], middle, rtol=1e-12, what="on a line")


def test_windows_are_cut_filled_and_undone() -> None:
    x = _x(B, H, N, D) + 3
    cut, real = grids.windows(x, (h, w), 3)
    assert cut.shape == (B * 2 * 3, H, 9, D)
    assert real.sum() == B * N
    assert not cut.transpose(1, 2)[~real].any()
    assert torch.equal(cut[1, 0, 4], x[0, 0, 1 * w + 4])
    assert torch.equal(grids.unwindows(cut, (h, w), 3), x)


def test_pool_is_the_mean_of_its_cells() -> None:
    x = _x(B, H, 36, D)
    got = grids.pooled(x, (6, 6), (2, 3))
    want = x.unflatten(2, (2, 3, 3, 2)).mean((3, 5)).flatten(2, 3)
    close(got, want, rtol=1e-12, what="pool")
    close(grids.pooled(x, (36,), (4,)), x.unflatten(2, (4, 9)).mean(3), rtol=1e-12, what="on a line")


def test_a_turn_keeps_norms_and_reads_relative_places() -> None:
    angles = grids.grid_angles((h, w), 8)
    x = _x(B, H, N, 8)
    turned = grids.turned(x, angles)
    close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-12, what="norms")
    a, b = _x(2, 8)
    products = grids.turned(a.expand(N, 8), angles) @ grids.turned(b.expand(N, 8), angles).mT
    table = grids.offsets((h, w))
    for at in (0, 40, table.max().item()):
        same = products[table == at]
        close(same, same[:1].expand_as(same), rtol=1e-9, what=f"offset {at}")
    assert torch.equal(
        table[0], torch.tensor([(y + h - 1) * (2 * w - 1) + z + w - 1 for y in range(h) for z in range(w)])
    )
    assert grids.offsets((6,))[4, 1] == 1 - 4 + 5


def test_local_concentration_moves_with_the_picture() -> None:
    torch.manual_seed(0)
    layer = grids.LocalConcentration(4, kernel=3).double().eval()
    field = torch.zeros(1, 4, 12, 12, dtype=torch.float64)
    field[:, :, 5, 5] = 1.0
    moved = field.roll((1, 2), (2, 3))
    first, second = (grids.on_grid(layer(grids.off_grid(f), (12, 12)), (12, 12)) for f in (field, moved))
    background = first[:, :, 9:10, 9:10]
    close(
        (first - background).roll((1, 2), (2, 3))[:, :, 4:10, 4:10], (second - background)[:, :, 4:10, 4:10], rtol=1e-9
    )
    assert (first - background)[:, :, 5, 5].abs().min() > 0


def test_grids_that_do_not_fit_are_refused() -> None:
    x = _x(B, N, D)
    for call in (
        lambda: grids.on_grid(x, (5, 5)),
        lambda: grids.depthwise(x, _x(D, 1, 2, 2), None, (h, w)),
        lambda: grids.pooled(x, (h, w), (6, 2)),
        lambda: grids.grid_angles((h, w), 6),
        lambda: grids.windows(x[:, None], (N,), 3),
    ):
        with pytest.raises(InvalidInput):
            call()
