r"""Tokens on a grid: pictures as rows of tokens, local convolutions, pools, windows, rotations and offsets in two dimensions.

Tokens are row-major: token n of a grid (h, w) lies in row n // w and column n % w. A grid of one number is a line. Weights are
passed in; the small modules at the end hold them for those who train.

    turned       pairs of channels (2 i, 2 i + 1) turned by an angle of their own: x cos a + partner(x) sin a
    grid_angles  first half of the channels turned by the row, second half by the column, 10000^(-linspace(0, 1, D / 4))
    offsets      where the pair (query i, key j) reads a table of (2 h - 1) (2 w - 1) relative positions, column (dy, dx) = j - i

Axes: B batch, H heads, N tokens, C channels over all heads, D channels of a head, h rows, w columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkv.core.errors import InvalidInput, InvalidParameter


def check_grid(n: int, grid: Sequence[int], who: str = "grid") -> tuple[int, ...]:
    """The grid as a tuple of one or two positive numbers whose product is `n`; `InvalidInput` otherwise."""
    sizes = tuple(grid)
    if len(sizes) not in (1, 2) or any(s < 1 for s in sizes) or math.prod(sizes) != n:
        raise InvalidInput(
            f"{who}: {n} tokens do not fill a grid of {sizes}; give (h, w) with h w = {n}, or ({n},) for a line"
        )
    return sizes


def on_grid(x: Tensor, grid: Sequence[int]) -> Tensor:
    """Tokens ``[B, N, C]`` or heads ``[B, H, N, D]`` as a picture ``[B, C, h, w]`` with C = H D (``[B, C, N]`` on a line)."""
    sizes = check_grid(x.shape[-2], grid, "on_grid")
    if x.ndim == 4:
        x = x.transpose(1, 2).flatten(2)
    return x.mT.unflatten(2, sizes)


def off_grid(field: Tensor, heads: int | None = None) -> Tensor:
    """The inverse of `on_grid`: ``[B, C, h, w]`` -> ``[B, N, C]``, or ``[B, H, N, D]`` when `heads` is given."""
    x = field.flatten(2).mT
    return x if heads is None else x.unflatten(-1, (heads, -1)).transpose(1, 2)


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, grid: Sequence[int]) -> Tensor:
    """A convolution of each channel over the grid, zeros outside it; the shape stays.

    x ``[B, N, C]`` or ``[B, H, N, D]``; weight ``[C, 1, k, k]`` (``[C, 1, k]`` on a line) with k odd; bias ``[C]`` or None.
    Raises `InvalidInput`.
    """
    channels = x.shape[-1] * (x.shape[1] if x.ndim == 4 else 1)
    size = weight.shape[-1]
    if tuple(weight.shape) != (channels, 1, *(size,) * len(tuple(grid))) or size % 2 == 0:
        want = f"[{channels}, 1{', k' * len(tuple(grid))}] with k odd"
        raise InvalidInput(f"depthwise: weight {tuple(weight.shape)} on a grid of {tuple(grid)}; expected {want}")
    convolve = F.conv1d if len(tuple(grid)) == 1 else F.conv2d
    done = convolve(on_grid(x, grid), weight, bias, padding=size // 2, groups=channels)
    return off_grid(done, x.shape[1] if x.ndim == 4 else None)


def pooled(x: Tensor, grid: Sequence[int], to: Sequence[int]) -> Tensor:
    """Adaptive average pool over the grid: ``[B, H, N, D]`` or ``[B, N, C]`` -> the same with the tokens of a grid `to`.

    Raises `InvalidInput` when `to` has another number of axes or is finer than the grid.
    """
    if len(tuple(to)) != len(tuple(grid)) or any(t < 1 or t > g for t, g in zip(to, grid, strict=True)):
        raise InvalidInput(
            f"pooled: a grid of {tuple(grid)} cannot be pooled to {tuple(to)}; give as many axes, none finer"
        )
    field, heads = on_grid(x, grid), x.shape[1] if x.ndim == 4 else None
    if len(tuple(to)) == 1:
        return off_grid(F.adaptive_avg_pool1d(field, to[0]), heads)
    return off_grid(F.adaptive_avg_pool2d(field, (to[0], to[1])), heads)


def windows(x: Tensor, grid: Sequence[int], size: int) -> tuple[Tensor, Tensor]:
    """Windows of size x size tokens, the right and lower ones filled up with zeros.

    x ``[B, H, N, D]`` -> ``[B W, H, size^2, D]`` and which of their tokens are real, ``[B W, size^2]`` bool. Undone by
    `unwindows`. Raises `InvalidInput`, `InvalidParameter`.
    """
    h, w = _plane(x.shape[-2], grid, "windows")
    if size < 1:
        raise InvalidParameter(f"windows: size={size} must be at least 1")
    real = F.pad(x.new_ones(x.shape[0], h, w, dtype=torch.bool), (0, -w % size, 0, -h % size))
    field = F.pad(x.unflatten(2, (h, w)), (0, 0, 0, -w % size, 0, -h % size))
    field = field.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # [B, H, h / s, s, w / s, s, D]
    real = real.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3)
    return field.permute(0, 2, 4, 1, 3, 5, 6).flatten(4, 5).flatten(0, 2), real.flatten(3, 4).flatten(0, 2)


def unwindows(x: Tensor, grid: Sequence[int], size: int) -> Tensor:
    """``[B W, H, size^2, E]`` back to ``[B, H, N, E]``, without what was filled up."""
    h, w = tuple(grid)
    rows, columns = -(-h // size), -(-w // size)
    field = x.unflatten(2, (size, size)).unflatten(0, (-1, rows, columns))  # [B, rows, columns, H, s, s, E]
    field = field.permute(0, 3, 1, 4, 2, 5, 6).flatten(4, 5).flatten(2, 3)
    return field[:, :, :h, :w].flatten(2, 3)


def grid_angles(grid: Sequence[int], width: int, device: torch.device | None = None, base: float = 10000.0) -> Tensor:
    """Angles ``[N, D]`` in float64 for `turned`: each pair of channels has one angle, written twice.

    On (h, w) the first half of the channels follows the row and the second half the column, each with D / 4 rates from 1 down
    to 1 / base; on a line all D / 2 pairs follow the place. Raises `InvalidInput` where D does not divide by 2 x axes.
    """
    sizes = check_grid(math.prod(grid), grid, "grid_angles")
    rates = width // (2 * len(sizes))
    if rates * 2 * len(sizes) != width or width < 1:
        raise InvalidInput(
            f"grid_angles: {width} channels do not divide by {2 * len(sizes)} (pairs for each of {len(sizes)} axes)"
        )
    rate = base ** -torch.linspace(0, 1, rates, dtype=torch.float64, device=device)
    places = torch.meshgrid(*(torch.arange(s, dtype=torch.float64, device=device) for s in sizes), indexing="ij")
    return torch.cat([(p.flatten()[:, None] * rate).repeat_interleave(2, 1) for p in places], 1)


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """Turns x cos a + partner(x) sin a, partner of (x0, x1) being (-x1, x0): channel pairs turned where both angles are equal.

    x ``[..., N, D]``, angles ``[..., N, D]`` broadcastable. The last channel of an odd width has no partner (0).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    turn = angles.to(torch.promote_types(angles.dtype, wide))
    return (x.to(wide) * turn.cos().to(wide) + _partner(x.to(wide)) * turn.sin().to(wide)).to(x.dtype)


def _partner(x: Tensor) -> Tensor:
    d = x.shape[-1]
    pairs = F.pad(x, (0, 1)) if d % 2 else x
    pairs = pairs.unflatten(-1, (-1, 2))
    return torch.stack([-pairs[..., 1], pairs[..., 0]], -1).flatten(-2)[..., :d]


def offsets(grid: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Index ``[N, N]`` of (query i, key j) in a table of relative positions, flattened over its axes.

    On (h, w) the table is ``[2 h - 1, 2 w - 1]``, entry (dy + h - 1, dx + w - 1) for (dy, dx) = place of j - place of i;
    on a line ``[2 N - 1]``, entry j - i + N - 1.
    """
    sizes = check_grid(math.prod(grid), grid, "offsets")
    index = torch.zeros((), dtype=torch.int64, device=device)
    places = torch.meshgrid(*(torch.arange(s, device=device) for s in sizes), indexing="ij")
    for size, place in zip(sizes, places, strict=True):
        p = place.flatten()
        index = index * (2 * size - 1) + (p[None, :] - p[:, None] + size - 1)
    return index


def _plane(n: int, grid: Sequence[int], who: str) -> tuple[int, int]:
    sizes = check_grid(n, grid, who)
    if len(sizes) != 2:
        raise InvalidInput(f"{who} need a grid (h, w), got {sizes}")
    return sizes[0], sizes[1]


class Depthwise(nn.Module):
    """`depthwise` with weights of its own: LePE (kernel 5 on values), conditional positions (kernel 3, residual outside)."""

    def __init__(self, channels: int, kernel: int = 3, axes: int = 2) -> None:
        super().__init__()
        if kernel < 1 or kernel % 2 == 0 or axes not in (1, 2):
            raise InvalidParameter(f"Depthwise: kernel={kernel} must be odd and axes={axes} 1 or 2")
        self.weight = nn.Parameter(torch.empty(channels, 1, *(kernel,) * axes))
        self.bias = nn.Parameter(torch.zeros(channels))
        nn.init.normal_(self.weight, std=kernel ** (-axes / 2))

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """As `depthwise`."""
        return depthwise(x, self.weight, self.bias, grid)


class LocalConcentration(nn.Module):
    """L2ViT's local concentration: depthwise k x k, GELU, batch norm, depthwise k x k. Tokens ``[B, N, C]``, same out."""

    def __init__(self, channels: int, kernel: int = 7) -> None:
        super().__init__()
        self.first, self.second = Depthwise(channels, kernel), Depthwise(channels, kernel)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """A residual branch; the caller adds it. Raises `InvalidInput` where tokens do not fill the grid."""
        _plane(x.shape[-2], grid, "local concentration")
        hidden = self.norm(on_grid(F.gelu(self.first(x, grid)), grid))
        return self.second(off_grid(hidden), grid)
