"""The ScatterFormer layer: convolutions over voxels, windows, and what crosses them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import qkv
from qkv.core.errors import InvalidInput, InvalidParameter
from qkv.layers.scatter_block import ScatterBlockModule, over_voxels, reference
from qkv.ops.scatterformer import window_segments
from qkv.testing import close

C = 8


def _voxels() -> Tensor:
    rng = torch.Generator().manual_seed(0)
    coords = torch.stack([torch.randint(n, (300,), generator=rng) for n in (2, 3, 11, 13)], 1).unique(dim=0)
    return coords[torch.randperm(len(coords), generator=rng)] + torch.tensor([0, -1, 5, 7])


def _built(**settings: object) -> tuple[ScatterBlockModule, Tensor, Tensor]:
    torch.manual_seed(0)
    block = qkv.method("scatter-block", window=4, heads=2, **settings).build(C, dtype=torch.float64)
    coords = _voxels()
    return block, torch.randn(len(coords), C, dtype=torch.float64), coords


@pytest.mark.parametrize("shape", [(3, 3, 3), (1, 1, 5), (1, 4, 1)], ids=str)
def test_convolutions_read_and_write_voxels_that_exist(shape: tuple) -> None:
    coords = _voxels()
    x, weight = torch.randn(len(coords), 2, dtype=torch.float64), torch.randn(2, 1, *shape, dtype=torch.float64)
    close(over_voxels(x, coords, weight), reference(x, coords, weight), rtol=1e-12, what=str(shape))


def test_the_order_of_voxels_and_moves_by_a_window_change_nothing() -> None:
    block, x, coords = _built()
    want = block(x, coords)
    order = torch.randperm(len(x))
    close(block(x[order], coords[order]), want[order], rtol=1e-9, what="shuffled")
    close(block(x, coords + torch.tensor([0, 3, 8, -4])), want, rtol=1e-9, what="moved")
    shared = window_segments(coords, 4)
    close(block(x, coords, shared), want, rtol=1e-12, what="windows given")
    want.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


def test_attention_stays_in_windows_and_the_mixer_crosses_them() -> None:
    block, x, coords = _built()
    block.eval()
    cells = torch.stack([coords[:, 0], coords[:, 2] // 4, coords[:, 3] // 4], 1)
    other = (cells != cells[0]).any(1)
    moved = x.clone()
    moved[0] += 1
    windows = window_segments(coords, 4)
    assert torch.equal(block.attn(moved, windows)[other], block.attn(x, windows)[other])
    assert (block(moved, coords) - block(x, coords))[other].abs().max() > 1e-6
    wide = window_segments(coords, 4, radius=1)
    assert (block.attn(moved, wide) - block.attn(x, wide))[other].abs().max() > 1e-6


def test_what_does_not_fit_is_refused() -> None:
    block, x, coords = _built()
    with pytest.raises(InvalidInput, match="coords"):
        block(x, coords[:-1])
    with pytest.raises(InvalidParameter, match="by 4"):
        qkv.method("scatter-block", heads=3).build(6)
