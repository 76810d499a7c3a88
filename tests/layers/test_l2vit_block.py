"""L2ViT's blocks: the attention written out, windows and what fills them up, and dropped branches."""

from __future__ import annotations

import pytest
import torch

import qkv
from qkv.core.errors import InvalidInput, InvalidParameter
from qkv.layers.l2vit_block import L2ViTBlockModule, l2vit_layout, reference
from qkv.testing import close

B, C, GRID = 2, 12, (5, 7)


def _built(**settings: object) -> tuple[L2ViTBlockModule, torch.Tensor]:
    torch.manual_seed(0)
    built = qkv.method("l2vit-block", heads=3, **settings).build(C, dtype=torch.float64)
    return built.eval(), torch.randn(B, 35, C, dtype=torch.float64)


def test_global_attention_is_the_one_written_out() -> None:
    block, x = _built(den_floor=3.0)
    close(block.attn(x, GRID), reference(block.attn, x), rtol=1e-9)
    assert block.attn.temperature.tolist() == [0.5] * 3


def test_a_window_over_everything_is_full_attention() -> None:
    block, x = _built(scope="window", window=7, mask_pad=True)
    q, k, v = (y.unflatten(-1, (3, -1)).transpose(1, 2) for y in block.attn.project(x).chunk(3, -1))
    want = block.attn.out(qkv.attention(q, k, v, causal=False).transpose(1, 2).flatten(2))
    close(block.attn(x, GRID), want, rtol=1e-9, what="masked filling")
    released, _ = _built(scope="window", window=7)
    assert (released.attn(x, GRID) - want).abs().max() > 1e-3, (
        "what fills up attends and is attended in the released code"
    )
    small, _ = _built(scope="window", window=1)
    own = small.attn.out(small.attn.project(x).chunk(3, -1)[2])
    close(small.attn(x, GRID), own, rtol=1e-9, what="windows of one token")


@pytest.mark.parametrize("scope", ["global", "window"])
def test_both_blocks_train_and_keep_rows_apart(scope: str) -> None:
    block, x = _built(scope=scope, window=3, local_kernel=3, den_floor=1.0)
    want = block(x, GRID)
    close(block(x[:1], GRID), want[:1], rtol=1e-9, what="a row alone")
    want.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


def test_windows_do_not_see_each_other_and_the_picture_does() -> None:
    for scope, reaches in (("window", False), ("global", True)):
        block, x = _built(scope=scope, window=3)
        moved = x.clone()
        moved[:, 34] += 1
        assert bool((block.attn(moved, GRID) - block.attn(x, GRID))[:, 0].any()) is reaches


def test_branches_are_dropped_in_training_alone() -> None:
    block, x = _built(drop_path=0.9, local_kernel=3)
    want = block(x, GRID)
    close(block(x, GRID), want, rtol=0.0, what="evaluation")
    block.train()
    torch.manual_seed(1)
    rows = x[:1].expand(200, -1, -1)
    got = block._kept(rows)
    changed = (got != 0).any(2).any(1)
    assert 5 < changed.sum() < 45
    close(got[changed][0], x[0] / 0.1, rtol=1e-9)


def test_layout_and_what_is_refused() -> None:
    assert l2vit_layout(3) == ("window", "global", "window")
    with pytest.raises(InvalidParameter, match="at least 1"):
        l2vit_layout(0)
    with pytest.raises(InvalidParameter, match="odd"):
        qkv.method("l2vit-block", local_kernel=4)
    with pytest.raises(InvalidParameter, match="divide the width"):
        qkv.method("l2vit-block", heads=5).build(12)
    block, x = _built()
    with pytest.raises(InvalidInput, match="35 tokens"):
        block(x, (6, 6))
