"""Omni-Shift and the Re-WKV block: their definitions, the merged kernel, the two scans."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import qkv
from qkv.core.errors import InvalidInput, InvalidParameter, Refused
from qkv.layers.omni_shift import reference as branches
from qkv.layers.omni_shift import reparameterized
from qkv.layers.rewkv import ReWKVBlock, reference
from qkv.testing import close

C, GRID, N = 5, (6, 7), 42


def _block(**settings: object) -> tuple[ReWKVBlock, Tensor]:
    torch.manual_seed(0)
    block = qkv.method("rewkv", **settings).build(C, dtype=torch.float64)
    for p in (block.att.spatial_decay, block.att.spatial_first):
        p.data *= 20
    return block, torch.randn(2, N, C, dtype=torch.float64)


def test_omni_shift_is_its_branches_before_and_after_merging() -> None:
    torch.manual_seed(0)
    shift = qkv.method("omni-shift").build(C, dtype=torch.float64)
    x = torch.randn(2, N, C, dtype=torch.float64)
    want = branches(x.mT.unflatten(2, GRID), shift.alpha, *shift.kernels).flatten(2).mT
    got = shift(x, GRID)
    close(got, want, rtol=1e-12, what="one convolution")
    grads = [
        torch.autograd.grad(y.square().sum(), [shift.alpha, *shift.kernels], retain_graph=True) for y in (got, want)
    ]
    for mine, other in zip(*grads, strict=True):
        close(mine, other, rtol=1e-10, what="gradient of a branch")
    single = qkv.method("omni-shift").build(C)
    before = single(x.float(), GRID)
    merged = single.reparameterize()
    close(merged(x.float(), GRID), before, rtol=1e-6, what="merged")
    assert list(merged.state_dict()) == ["merged"] and not list(merged.parameters())
    with pytest.raises(Refused, match="merged before"):
        merged.reparameterize()


@pytest.mark.parametrize("scans", [("row",), ("col",), ("row", "col")], ids=str)
@pytest.mark.parametrize("offset", [0, 1])
def test_the_scans_are_the_definition(scans: tuple, offset: int) -> None:
    block, _ = _block(scans=scans, distance_offset=offset, chunk_size=8)
    k, v = torch.randn(2, 2, N, C, dtype=torch.float64)
    want = reference(k, v, block.att.spatial_decay, block.att.spatial_first, GRID, scans, offset)
    close(block.att.averaged(k, v, GRID), want, rtol=1e-10, what="averages")


def test_rows_of_the_transposed_picture_are_columns() -> None:
    rows, _ = _block(scans=("row",))
    columns, _ = _block(scans=("col",))
    columns.load_state_dict(rows.state_dict())
    k, v = torch.randn(2, 2, N, C, dtype=torch.float64)
    turn = lambda x: x.unflatten(1, GRID).transpose(1, 2).flatten(1, 2)  # noqa: E731
    got = columns.att.averaged(turn(k), turn(v), (GRID[1], GRID[0]))
    close(got, turn(rows.att.averaged(k, v, GRID)), rtol=1e-12, what="transposed")


def test_two_scans_reach_along_both_axes_and_one_does_not() -> None:
    """Gradient of the middle pixel, four pixels away in each axis, with a strong decay."""
    reach = {}
    for scans in (("row",), ("row", "col")):
        block, _ = _block(scans=scans)
        block.att.spatial_decay.data.fill_(2.0 * 81)
        v = torch.randn(1, 81, C, dtype=torch.float64, requires_grad=True)
        out = block.att.averaged(torch.zeros_like(v), v, (9, 9))[0].unflatten(0, (9, 9))[4, 4].sum()
        grad = torch.autograd.grad(out, v)[0][0].abs().sum(-1).unflatten(0, (9, 9))
        reach[len(scans)] = (grad[4, 1] / grad[4, 4], grad[1, 4] / grad[4, 4])
    assert reach[1][0] > 1e-4 and reach[1][1] < 1e-12
    assert reach[2][0] > 1e-4 and reach[2][1] > 1e-4


def test_the_block_learns_and_merges() -> None:
    block, x = _block()
    out = block(x, GRID)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())
    close(reparameterized(block)(x, GRID), out, rtol=1e-12, what="merged block")


def test_what_does_not_fit_is_refused() -> None:
    block, x = _block()
    with pytest.raises(InvalidInput, match="42 tokens do not fill a grid"):
        block(x, (6, 6))
    for scans in ((), ("row", "diagonal")):
        with pytest.raises(InvalidParameter, match="scans"):
            qkv.method("rewkv", scans=scans)
