"""Configurations of published image models, for classes and image sizes of one's own; weights are random until trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from qkv.core.errors import InvalidParameter
from qkv.layers.l2vit_block import l2vit_layout
from qkv.models.vision.pyramid import PyramidConfig

L2VIT: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "tiny": ((2, 2, 6, 2), (96, 192, 384, 768)),
    "small": ((2, 2, 18, 2), (96, 192, 384, 768)),
    "base": ((2, 2, 18, 2), (128, 256, 512, 1024)),
}


def l2vit(
    variant: Literal["tiny", "small", "base"] = "tiny", *, window: int = 7, drop_path: float = 0.0, **more: Any
) -> PyramidConfig:
    """L2ViT (arXiv:2501.16182): windows and global linear attention with local concentration by turns, heads 32 wide.

    window: side of a window in tokens, 12 in the base model for images of 384 pixels. drop_path: share of the rows from which
    training leaves out the last block's branches; the blocks before it grow up to that in even steps. more: fields of
    `PyramidConfig`. Raises `InvalidParameter`.
    """
    if variant not in L2VIT:
        raise InvalidParameter(f"l2vit: variant={variant!r} must be one of {', '.join(L2VIT)}")
    depths, widths = L2VIT[variant]
    depths, widths = more.pop("depths", depths), more.pop("widths", widths)
    _alike("l2vit", depths, widths)
    blocks, last = [], max(1, sum(depths) - 1)
    for depth, width in zip(depths, widths, strict=True):
        heads = max(1, width // 32)
        for scope in l2vit_layout(depth):
            drop = round(drop_path * len(blocks) / last, 6)
            blocks.append(f"l2vit-block:heads={heads},scope={scope},window={window},drop_path={drop}")
    return PyramidConfig(
        **{"operators": tuple(blocks), "depths": depths, "widths": widths, "patch": 4, "stem": 2} | more
    )


def nalaformer(depths: Sequence[int] = (2, 2, 6, 2), widths: Sequence[int] = (96, 192, 384, 768), *, feature: str = "relu_split",
               **more: Any) -> PyramidConfig:  # fmt: skip
    """NaLaFormer (arXiv:2506.21137): norm-aware linear attention in the first stages, softmax in the last two of four.

    The widths are the released ones and heads are 32 wide; the depths of its five sizes are not known to us, so `depths` are the
    usual ones of its class. Four convolutions embed the patches. more: fields of `PyramidConfig`. Raises `InvalidParameter`.
    """
    _alike("nalaformer", depths, widths)
    blocks = []
    for i, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        kind = "softmax" if i >= 2 else "nala"
        blocks += [f"nala-block:heads={max(1, width // 32)},attention={kind},feature={feature}"] * depth
    return PyramidConfig(
        **{"operators": tuple(blocks), "depths": tuple(depths), "widths": tuple(widths), "patch": 4, "stem": 4} | more
    )


def _alike(who: str, depths: Sequence[int], widths: Sequence[int]) -> None:
    if len(depths) != len(widths):
        raise InvalidParameter(
            f"{who}: depths={tuple(depths)} and widths={tuple(widths)} must have one number for each stage"
        )
