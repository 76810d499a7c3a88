r"""ESSA unit: attention by spectral correlation over all pixels, then a small convolutional mixer that also sees its input.

    a = W_o essa(W_q y, W_k y, W_v y),   y = LN(x)          (one head, all C channels; biases everywhere)
    out = x + conv1x1(drop(act(conv3x3(drop(act(conv1x1([drop(a), x])))))))     2 C channels inside, act = LeakyReLU(0.2)

Dropout removes whole channels. ESSAformer (`qkv.ops.essa`) shares two such units, one at the size of the picture that is wanted
and one at that of the picture given, over the rounds of its way up and down.

Axes: B batch, N tokens of a grid (h, w), C channels.
Zhang et al. 2023, ESSAformer: Efficient Transformer for Hyperspectral Image Super-resolution, arXiv:2307.14010.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from qkv.core.errors import InvalidParameter
from qkv.core.layer import Layer, LayerSpec
from qkv.core.operator import Operator
from qkv.core.registry import method
from qkv.core.spec import Limit, param
from qkv.ops._common.grids import off_grid, on_grid


def reference(x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor, eps: float = 1e-7) -> Tensor:
    """The attention of the unit with whole maps, x ``[B, N, C]``, w_in ``[3 C, C]``, w_out ``[C, C]`` -> ``[B, N, C]``."""
    q, k, v = (x @ w_in.T + b_in).chunk(3, -1)
    q, k = ((y - y.mean(-1, keepdim=True)).square() for y in (q, k))
    q, k = (y / (y.sum(-1, keepdim=True) + eps) for y in (q, k))
    weights = (q / q.norm(dim=-1, keepdim=True)) @ (k / k.norm(dim=1, keepdim=True)).mT
    return (v + weights @ v / x.shape[1] ** 0.5) @ w_out.T + b_out


@final
class ESSAttention(nn.Module):
    """Projections around the operator; weights by the authors' names, ``lnqkv`` and ``ln``. Needs no grid."""

    def __init__(self, width: int, operator: Operator, heads: int = 1, **factory: Any) -> None:
        super().__init__()
        if width % heads:
            raise InvalidParameter(f"essa-unit: heads={heads} must divide the width {width}")
        self.operator, self.heads = operator, heads
        self.lnqkv, self.ln = nn.Linear(width, 3 * width, **factory), nn.Linear(width, width, **factory)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """Tokens ``[B, N, C]`` -> ``[B, N, C]``; padding bool ``[B, N]``, True = real."""
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.lnqkv(x).chunk(3, -1))
        out = self.operator(q, k, v, causal=False, padding=padding)
        return self.ln(out.transpose(1, 2).flatten(2))


@final
class ESSAUnitModule(nn.Module):
    """See `ESSAUnit`."""

    def __init__(self, width: int, settings: ESSAUnit, **factory: Any) -> None:
        super().__init__()
        operator = method("essa", key_norm="token_l2" if settings.key_norm else None, order=settings.order)
        self.norm = nn.LayerNorm(width, **factory)
        self.attn = ESSAttention(width, operator, settings.heads, **factory)
        self.drop = nn.Dropout2d(settings.dropout)
        self.mixer = nn.Sequential(
            nn.Conv2d(2 * width, 2 * width, 1, **factory),
            nn.LeakyReLU(0.2),
            nn.Dropout2d(settings.dropout),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, **factory),
            nn.LeakyReLU(0.2),
            nn.Dropout2d(settings.dropout),
            nn.Conv2d(2 * width, width, 1, **factory),
        )

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Tokens ``[B, N, C]`` of a grid (h, w) -> ``[B, N, C]``. Raises `InvalidInput` where they do not fill the grid."""
        field = on_grid(x, grid)
        seen = self.drop(on_grid(self.attn(self.norm(x)), grid))
        return x + off_grid(self.mixer(torch.cat([seen, field], 1)))


@final
@dataclass(frozen=True, kw_only=True)
class ESSAUnit(Layer):
    """Settings of an ESSA unit; the defaults are the paper's."""

    spec: ClassVar[LayerSpec] = LayerSpec(
        id="essa-unit",
        title="ESSA unit (ESSAformer)",
        paper="arXiv:2307.14010",
        source="code",
        summary="Attention by spectral correlation over all pixels, then a convolutional mixer over its result and its input.",
        limits=(Limit("essa", {"heads": 1}, "identity projections: the operator itself"),),
        shown="as the layer of a small super-resolution network, see `essa`",
        honest="the attention depends on how many pixels there are; another resolution than that of training shifts it",
    )
    heads: int = param(1, "heads; more than one takes the correlation over fewer channels each", low=1)
    key_norm: bool = param(True, "divide each channel of the keys by its norm over the tokens")
    order: int = param(1, "terms of the series after the constant one", low=1, high=2)
    dropout: float = param(0.2, "share of channels that training drops", low=0.0, high=1.0)

    def build(self, width: int, **factory: Any) -> ESSAUnitModule:
        """See `Layer.build`; its module takes tokens ``[B, N, width]`` and their grid."""
        return ESSAUnitModule(width, self, **factory)
