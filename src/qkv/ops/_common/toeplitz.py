r"""Products with Toeplitz matrices by FFT: weights that depend on the distance j - i alone, along one or two axes.

    y_i = sum_j t[j - i] x_j,     t of 2 n - 1 numbers per axis, entry j - i + n - 1

The circular product of a length of at least 2 n - 1 holds the linear one. `lagged` is the block below the diagonal of a causal
matrix: what n later rows read from n earlier ones, so that no rounding of the FFT carries anything from later to earlier tokens.
Tokens are the last axis: transforms there are the fastest.

Axes: B batch, H heads, n tokens along an axis, F features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.core.errors import InvalidInput


def fast_length(n: int) -> int:
    """The smallest even number of at least n without prime factors above 5."""
    length = max(2, n + n % 2)
    while True:
        rest = length
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return length
        length += 2


def toeplitz(table: Tensor, x: Tensor, grid: Sequence[int]) -> Tensor:
    """The product with the whole matrix.

    table ``[H, 2 n - 1]`` for tokens on a line, ``[H, (2 h - 1) (2 w - 1)]`` on a grid (h, w), as `grids.offsets` numbers it;
    x ``[B, H, F, N]``, float32 or float64. Returns ``[B, H, F, N]``. Raises `InvalidInput`.
    """
    sizes = tuple(grid)
    lags = tuple(2 * n - 1 for n in sizes)
    total, count = 1, 1
    for n, lag in zip(sizes, lags, strict=True):
        total, count = total * n, count * lag
    if x.shape[-1] != total or table.shape[-1] != count:
        raise InvalidInput(
            f"toeplitz: {x.shape[-1]} tokens and a table of {table.shape[-1]} on a grid of {sizes}; expected {total} and {count}"
        )
    lengths = [fast_length(lag) for lag in lags]
    axes = list(range(-len(sizes), 0))
    kernel = table.flip(-1).reshape(-1, *lags)  # by lag i - j, from 1 - n up
    for axis, n, lag, length in zip(axes, sizes, lags, lengths, strict=True):
        kernel = F.pad(kernel, [0, 0] * (-1 - axis) + [0, length - lag]).roll(1 - n, axis)
    spectrum = torch.fft.rfftn(kernel, dim=axes).unsqueeze(1)  # [H, 1, ...]
    out = torch.fft.irfftn(spectrum * torch.fft.rfftn(x.unflatten(-1, sizes), s=lengths, dim=axes), s=lengths, dim=axes)
    for axis, n in zip(axes, sizes, strict=True):
        out = out.narrow(axis, 0, n)
    return out.flatten(-len(sizes))


def lagged(kernel: Tensor, x: Tensor) -> Tensor:
    """What the n rows after these read from them: ``y_i = sum_j kernel[n + i - j] x_j``.

    kernel ``[H, 2 n]`` by lag (lag 0 is not used); x ``[B, H, F, blocks, n]`` -> the same shape, float32 or float64.
    """
    n = x.shape[-1]
    spectrum = torch.fft.rfft(kernel)[:, None, None]
    return torch.fft.irfft(spectrum * torch.fft.rfft(x, n=2 * n), n=2 * n)[..., n:]
