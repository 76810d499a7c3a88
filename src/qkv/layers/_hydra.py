r"""The Hydra block: a drop-in for an encoder's attention with projections, convolution, gate and the `hydra` operator.

    z, xbc, dt = split(W_in u),   x, B, C, (B', C') = split(silu(conv(xbc))),   dt = softplus(dt + bias),   a = -exp(log_rate)
    y = hydra(C, B, x; dt, a, C', B', dt', delta = W_D x + D),     out = W_out (RMSNorm(y) * silu(z))

The convolution is per channel and centred (kernel 7), so that reversing the tokens reverses the output of a block whose two
directions are exchanged. dt' has its own projection and shares the bias. The norm comes before the gate.

Axes: B batch, N tokens, W width, I = expand W inner width, H = I / P heads, P head width, S state size, G groups.
Hwang et al. 2024, Hydra: Bidirectional State Space Models Through Generalized Matrix Mixers, arXiv:2407.09941.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkv.core.errors import InvalidInput, InvalidParameter
from qkv.ops.hydra import Hydra


@final
class HydraLayer(nn.Module):
    """Mixes tokens ``[B, N, W] -> [B, N, W]`` in both directions.

    width: W. state_size: S. conv: tokens of the centred convolution, odd. expand: I / W. head_width: P, divides I. groups: heads
    that share B and C. shared: both directions use the same B and C. operator: what takes the place of the `hydra` operator.
    Raises `InvalidParameter`.
    """

    def __init__(
        self, width: int, *, state_size: int = 64, conv: int = 7, expand: int = 2, head_width: int = 64, groups: int = 1,
        chunk_size: int = 256, shared: bool = False, operator: Callable[..., Tensor] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        inner = expand * width
        if conv < 1 or conv % 2 == 0:
            raise InvalidParameter(f"HydraLayer: conv={conv} must be odd: the convolution is centred")
        if min(width, state_size, expand, head_width, groups) < 1 or inner % head_width:
            raise InvalidParameter(
                f"HydraLayer: head_width={head_width} must divide expand * width = {expand} * {width}, all sizes at least 1"
            )
        self.inner, self.heads, self.groups, self.state_size = inner, inner // head_width, groups, state_size
        if self.heads % groups:
            raise InvalidParameter(f"HydraLayer: groups={groups} must divide the {self.heads} heads")
        self.parts = 2 if shared else 4  # B, C for each direction
        channels = inner + self.parts * groups * state_size
        self.project = nn.Linear(width, inner + channels + 2 * self.heads, bias=False)
        self.conv = nn.Conv1d(channels, channels, conv, groups=channels, padding=conv // 2)
        step = torch.exp(torch.rand(self.heads) * math.log(0.1 / 1e-3) + math.log(1e-3)).clamp(min=1e-4)
        self.step_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
        self.log_rate = nn.Parameter(torch.zeros(self.heads))
        self.diagonal = nn.Linear(inner, self.heads, bias=False)
        self.skip = nn.Parameter(torch.ones(self.heads))
        self.norm = nn.RMSNorm(inner, eps=1e-5)
        self.out = nn.Linear(inner, width, bias=False)
        self.operator = Hydra(chunk_size=chunk_size) if operator is None else operator

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """Tokens ``[B, N, W]``; padding ``[B, N]`` bool, True = real, at the ends of rows only. Raises `InvalidInput`."""
        b, n = x.shape[:2]
        if padding is not None and (tuple(padding.shape) != (b, n) or padding.dtype != torch.bool):
            raise InvalidInput(
                f"HydraLayer: padding must be bool [B, N] = {(b, n)}, got {padding.dtype} {tuple(padding.shape)}"
            )
        z, xbc, step = self.project(x).split((self.inner, self.conv.in_channels, 2 * self.heads), -1)
        if padding is not None:
            xbc = xbc.masked_fill(~padding.unsqueeze(-1), 0.0)
        xbc = F.silu(self.conv(xbc.mT).mT)
        values, shared = xbc.split((self.inner, xbc.shape[-1] - self.inner), -1)
        vectors = [self._per_head(y) for y in shared.chunk(self.parts, -1)]  # B, C, (B', C')
        ahead, back = F.softplus(step.unflatten(-1, (2, self.heads)) + self.step_bias).permute(2, 0, 3, 1)
        more: dict[str, Any] = {"back_k": vectors[2], "back_q": vectors[3]} if self.parts == 4 else {}
        delta = (self.diagonal(values) + self.skip).mT
        y = self.operator(
            vectors[1], vectors[0], values.unflatten(-1, (self.heads, -1)).transpose(1, 2), dt=ahead, back_dt=back,
            rate=-self.log_rate.exp(), diagonal=delta, padding=padding, **more,
        )  # fmt: skip
        return self.out(self.norm(y.transpose(1, 2).flatten(2)) * F.silu(z))

    def _per_head(self, x: Tensor) -> Tensor:
        """``[B, N, G S] -> [B, H, N, S]``, each group's vectors for all of its heads."""
        x = x.unflatten(-1, (self.groups, self.state_size)).transpose(1, 2)
        return x.unsqueeze(2).expand(-1, -1, self.heads // self.groups, -1, -1).flatten(1, 2)
