"""NaLaFormer's block: its attention written out, what moves with the grid, and what is refused."""

from __future__ import annotations

import pytest
import torch

import qkv
from qkv.core.errors import InvalidInput, InvalidParameter
from qkv.layers.nala_block import NaLaBlockModule, reference
from qkv.ops._common.grids import grid_angles, turned
from qkv.testing import close

B, C, GRID = 2, 16, (4, 6)


def _built(**settings: object) -> tuple[NaLaBlockModule, torch.Tensor]:
    torch.manual_seed(0)
    return qkv.method("nala-block", heads=2, **settings).build(C, dtype=torch.float64), torch.randn(
        B, 24, C, dtype=torch.float64
    )


def test_attention_is_the_one_written_out() -> None:
    block, x = _built()
    close(block.attn(x, GRID), reference(block.attn, x, GRID), rtol=1e-9)


@pytest.mark.parametrize("settings", [{}, {"attention": "softmax"}, {"feature": "cosine"}], ids=str)
def test_every_kind_trains_and_keeps_rows_apart(settings: dict) -> None:
    block, x = _built(**settings)
    want = block(x, GRID)
    close(block(x[:1], GRID), want[:1], rtol=1e-9, what="a row alone")
    want.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


def test_softmax_sees_turned_queries_and_keys() -> None:
    block, x = _built(attention="softmax")
    q, k, v, g = block.attn.project(x).chunk(4, -1)
    angles = grid_angles(GRID, 8)
    q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in (q, k, v))
    weights = (turned(q, angles) @ turned(k, angles).mT * 8**-0.5).softmax(-1)
    mixed = (weights @ v).transpose(1, 2).flatten(2) + block.attn.local(v.transpose(1, 2).flatten(2), GRID)
    close(block.attn(x, GRID), block.attn.out(block.attn.norm(mixed) * torch.nn.functional.silu(g)), rtol=1e-9)
    shuffled = torch.randperm(24)
    assert (block.attn(x[:, shuffled], GRID) - block.attn(x, GRID)[:, shuffled]).abs().max() > 1e-3


def test_widths_and_grids_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InvalidParameter, match="multiple of 4 heads"):
        qkv.method("nala-block", heads=3).build(18)
    block, x = _built()
    with pytest.raises(InvalidInput, match="24 tokens"):
        block(x, (5, 5))
