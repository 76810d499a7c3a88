r"""The SOFT block: tied queries and keys, landmarks by a strided convolution of them, the `soft` operator, a convolution.

    L = GELU(LayerNorm(conv_r(D^(-1/4) q))) D^(1/4),     out = W_o (soft(q, q, v; L) + conv(v))

conv_r has kernel and stride `ratio` on the grid and is shared by all heads; the convolution of the values has one kernel a head.

Axes: B batch, N tokens, W width, H heads, D width of a head, m = N / ratio^2 landmarks. Lu et al. 2022, arXiv:2207.03341.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkv.core.errors import InvalidInput, InvalidParameter
from qkv.ops._common.grids import check_grid, depthwise
from qkv.ops.soft import Soft


@final
class SoftAttention(nn.Module):
    """Mixes tokens of an image ``[B, N, W] -> [B, N, W]``.

    width: W. ratio: side of the squares of tokens that make a landmark (8, 4, 2 in the published stages). conv: side of the
    convolution of the values (9, 5, 3), 0 for none. method: the operator's settings. Raises `InvalidParameter`.
    """

    def __init__(self, width: int, heads: int, *, ratio: int = 2, conv: int = 3, method: Soft | None = None) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise InvalidParameter(f"SoftAttention: width={width} must be a multiple of heads={heads}")
        if ratio < 1 or conv < 0 or (conv and conv % 2 == 0):
            raise InvalidParameter(
                f"SoftAttention: ratio={ratio} must be at least 1 and conv={conv} odd, or 0 for none"
            )
        self.heads, self.ratio, d = heads, ratio, width // heads
        self.operator = Soft() if method is None else method
        self.query, self.value, self.out = (nn.Linear(width, width, bias=i > 0) for i in range(3))
        self.landmarks, self.norm = nn.Conv2d(d, d, ratio, stride=ratio, bias=False), nn.LayerNorm(d)
        self.kernels = nn.Parameter(torch.randn(heads, 1, conv, conv) / conv) if conv else None

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Tokens ``[B, N, W]`` of a grid (h, w). Raises `InvalidInput`."""
        h, w = (*check_grid(x.shape[1], grid, "SoftAttention"), 0)[:2]
        if min(h, w) < self.ratio:
            raise InvalidInput(f"SoftAttention: a grid {tuple(grid)} has no square of side {self.ratio} for a landmark")
        q, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (self.query(x), self.value(x)))
        d = q.shape[-1]
        field = (q * d**-0.25).mT.flatten(0, 1).unflatten(-1, (h, w))  # [B H, D, h, w]
        marks = F.gelu(self.norm(self.landmarks(field).flatten(2).mT)) * d**0.25
        y = self.operator(q, q, v, causal=False, landmarks=marks.unflatten(0, (-1, self.heads)))
        if self.kernels is not None:
            y = y + depthwise(v, self.kernels.repeat_interleave(d, 0), None, (h, w))
        return self.out(y.transpose(1, 2).flatten(2))
