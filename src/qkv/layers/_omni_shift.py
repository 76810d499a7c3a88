r"""Omni-Shift: each pixel mixed with its neighbours at three scales, trained as four branches and run as one convolution.

    y = a0 x + a1 dw1(x) + a2 dw3(x) + a3 dw5(x)        dw: depthwise convolutions k x k without bias, a learnt
      = dw(x) with one 5 x 5 kernel   a0 delta + a1 pad(w1) + a2 pad(w3) + a3 w5

Convolutions are linear in their kernels, so the branches are summed as kernels, in training too: one convolution either way.
`OmniShiftModule.reparameterize` keeps the sum and drops the branches, for inference.

Axes: B batch, N tokens of a grid (h, w), C channels.
Yang et al. 2024, Restore-RWKV: Efficient and Effective Medical Image Restoration with RWKV, arXiv:2407.11087.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkv.core.errors import Refused
from qkv.ops._common.grids import depthwise

M = TypeVar("M", bound=nn.Module)


def reference(x: Tensor, alpha: Tensor, w1: Tensor, w3: Tensor, w5: Tensor) -> Tensor:
    """The four branches of a picture ``[B, C, h, w]``; alpha ``[4]``, kernels ``[C, 1, k, k]``."""
    branches = [F.conv2d(x, w, padding=w.shape[-1] // 2, groups=x.shape[1]) for w in (w1, w3, w5)]
    return alpha[0] * x + sum(a * y for a, y in zip(alpha[1:], branches, strict=True))


@final
class OmniShiftModule(nn.Module):
    """The layer `omni-shift`. After `reparameterize` it holds ``merged`` ``[C, 1, 5, 5]`` alone."""

    merged: Tensor | None

    def __init__(self, width: int, **factory: Any) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.randn(4, **factory))
        self.kernels = nn.ParameterList(torch.empty(width, 1, k, k, **factory) for k in (1, 3, 5))
        for kernel in self.kernels:
            nn.init.kaiming_uniform_(kernel, a=5**0.5)
        self.register_buffer("merged", None)

    def kernel(self) -> Tensor:
        """The one kernel ``[C, 1, 5, 5]`` that stands for all branches, differentiable in them before `reparameterize`."""
        if self.merged is not None:
            return self.merged
        w1, w3, w5 = self.kernels
        a0, a1, a2, a3 = self.alpha
        return F.pad(a0 + a1 * w1, (2, 2, 2, 2)) + F.pad(a2 * w3, (1, 1, 1, 1)) + a3 * w5

    @torch.no_grad()
    def reparameterize(self) -> OmniShiftModule:
        """Itself with the branches replaced by their sum; to train on, keep a copy. Raises `Refused` when repeated."""
        if self.merged is not None:
            raise Refused("omni-shift: the branches were merged before; there is nothing left to merge")
        self.merged = self.kernel().clone()
        del self.alpha, self.kernels
        return self

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Tokens ``[B, N, C]`` of a grid (h, w) -> ``[B, N, C]``. Raises `InvalidInput` where they do not fill the grid."""
        return depthwise(x, self.kernel(), None, grid)


def reparameterized(model: M) -> M:
    """`model` itself with every Omni-Shift in it merged."""
    for module in model.modules():
        if isinstance(module, OmniShiftModule):
            module.reparameterize()
    return model
