"""A few tokens that stand for many: adaptive average pools along a sequence (padding left out) or over a grid."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qkv.core.errors import InvalidInput, Refused
from qkv.ops._common.grids import check_grid, pooled
from qkv.ops._common.states import wide


def summaries(
    x: Tensor, count: int, padding: Tensor | None = None, *, grid: Sequence[int] | None = None, prefix: int = 0,
    who: str = "summaries",
) -> Tensor:  # fmt: skip
    """`count` mean tokens of ``[B, H, N, D]``, ``[B, H, count, D]`` in float32 or wider.

    Without a grid summary a is the mean of the real tokens floor(a L / count) .. ceil((a + 1) L / count) of L; windows overlap
    where count does not divide L. With a grid (h, w) the tokens after the first `prefix` are pooled to a square of side
    sqrt(count). padding ``[B, N]`` bool. Raises `InvalidInput`, `Refused` (padding inside a grid).
    """
    x = x.to(wide(x))
    if grid is None:
        return line_weights(x.shape[0], x.shape[2], count, padding, x.device).to(x.dtype).unsqueeze(1) @ x
    if padding is not None:
        raise Refused(f"{who}: a grid has no padding; pass rows of other sizes alone, each with its grid")
    side = math.isqrt(count)
    if side * side != count:
        raise InvalidInput(f"{who}: {count} summaries of a grid do not form a square; take 1, 4, 9, ..., 49, ...")
    if prefix >= x.shape[2]:
        raise InvalidInput(f"{who}: prefix={prefix} leaves no token of {x.shape[2]} for the grid")
    check_grid(x.shape[2] - prefix, grid, who)
    if len(tuple(grid)) != 2 or min(grid) < side:
        raise InvalidInput(f"{who}: a grid {tuple(grid)} cannot be pooled to {side} x {side}; take fewer summaries")
    return pooled(x[:, :, prefix:], grid, (side, side))


def line_weights(b: int, n: int, count: int, padding: Tensor | None, device: torch.device) -> Tensor:
    """The pool along a sequence as a matrix ``[B or 1, count, N]`` in float64, rows summing to 1 (0 without a real token)."""
    real = torch.ones(1, n, dtype=torch.bool, device=device) if padding is None else padding
    rank, length = real.cumsum(1) - 1, real.sum(1)[:, None]  # [B, N], [B, 1]
    a = torch.arange(count, device=device)
    first, last = a * length // count, -((-(a + 1) * length) // count)  # [B, count]
    rank = rank[:, None]
    inside = (rank >= first.unsqueeze(-1)) & (rank < last.unsqueeze(-1)) & real[:, None]
    weights = inside.to(torch.float64)
    return weights / weights.sum(-1, keepdim=True).clamp(min=1.0)
