r"""NaLaFormer's block: norm-aware linear attention with a gate and local enhancement, between depthwise convolutions.

    q, k, v, g = W y + b,   a = W_o [LN(nalaformer(q, k, v; turned by row and column) + LePE(v)) * silu(g)] + b_o
    x += dw3(x);   x += a(LN(x));   x += dw3(x);   x += W_2 (h + dw3(h)) + b_2,   h = gelu(W_1 LN(x) + b_1)

dw3, LePE: depthwise convolutions over the grid, 3 x 3 and 5 x 5. ``attention="softmax"`` is the block of the last two of four
stages: the same with softmax over turned queries and keys. `qkv.models.vision.published.nalaformer` stacks them.

Axes: B batch, N tokens of a grid (h, w), C channels, H heads.
Meng et al. 2025, NaLaFormer: Norm-Aware Linear Attention for Transformer Models, arXiv:2506.21137.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkv.core.errors import InvalidParameter
from qkv.core.layer import LayerSpec
from qkv.core.registry import method
from qkv.core.spec import Limit, param
from qkv.layers._grid import GridLayer
from qkv.ops._common.grids import Depthwise, check_grid, grid_angles, off_grid, on_grid, turned


def reference(layer: NaLaAttention, x: Tensor, grid: Sequence[int]) -> Tensor:
    """The attention of a block head by head with whole maps and a dense LePE, x ``[B, N, C]`` -> ``[B, N, C]``."""
    q, k, v, g = layer.project(x).chunk(4, -1)
    width = x.shape[-1] // layer.heads
    angles = grid_angles(grid, width, x.device).to(x)
    outs = []
    for h in range(layer.heads):
        a, b, u = (y[..., h * width : (h + 1) * width] for y in (q, k, v))
        size = a.norm(dim=-1, keepdim=True)
        power = 3 * (0.5 + size.tanh())
        rows = [
            torch.cat([(s * a / size).relu() ** power for s in (1, -1)], -1),
            torch.cat([b.relu(), (-b).relu()], -1) ** 3,
        ]
        total = (rows[0] @ rows[1].mT).sum(-1, keepdim=True) + 1e-6 * x.shape[1]
        a, b = (torch.cat([turned(part, angles) for part in y.chunk(2, -1)], -1) for y in rows)
        outs.append((a @ b.mT) @ u / total)
    field = F.conv2d(on_grid(v, grid), layer.local.weight, layer.local.bias, padding=2, groups=v.shape[-1])
    return layer.out(layer.norm(torch.cat(outs, -1) + off_grid(field)) * F.silu(g))


@final
class NaLaAttention(nn.Module):
    """Attention of `NaLaBlock`; needs the grid. The width of a head must divide by 4."""

    def __init__(self, width: int, settings: NaLaBlock, **factory: Any) -> None:
        super().__init__()
        if width % (4 * settings.heads):
            raise InvalidParameter(f"nala-block: the width {width} must be a multiple of 4 heads = {4 * settings.heads}: "
                                   "pairs of channels turn by row and by column")  # fmt: skip
        self.heads, self.softmax = settings.heads, settings.attention == "softmax"
        self.operator = method("full") if self.softmax else method("nalaformer", feature=settings.feature)
        self.project, self.out = nn.Linear(width, 4 * width, **factory), nn.Linear(width, width, **factory)
        self.local, self.norm = Depthwise(width, 5).to(**factory), nn.LayerNorm(width, **factory)

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Tokens ``[B, N, C]`` -> ``[B, N, C]``."""
        check_grid(x.shape[1], grid, "nala-block")
        q, k, v, g = self.project(x).chunk(4, -1)
        angles = grid_angles(grid, x.shape[-1] // self.heads, x.device).to(torch.promote_types(x.dtype, torch.float32))
        heads = [y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v)]
        if self.softmax:
            heads[:2] = [turned(y, angles) for y in heads[:2]]
            out = self.operator(*heads, causal=False)
        else:
            out = self.operator(*heads, causal=False, query_angles=angles, key_angles=angles)
        out = out.transpose(1, 2).flatten(2) + self.local(v, grid)
        return self.out(self.norm(out) * F.silu(g))


@final
class NaLaBlockModule(nn.Module):
    """See `NaLaBlock`."""

    def __init__(self, width: int, settings: NaLaBlock, **factory: Any) -> None:
        super().__init__()
        inner = round(settings.mlp_ratio * width)
        self.before, self.between, self.inside = (Depthwise(c, 3).to(**factory) for c in (width, width, inner))
        self.norm1, self.norm2 = nn.LayerNorm(width, **factory), nn.LayerNorm(width, **factory)
        self.attn = NaLaAttention(width, settings, **factory)
        self.up, self.down = nn.Linear(width, inner, **factory), nn.Linear(inner, width, **factory)

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Tokens ``[B, N, C]`` of a grid (h, w) -> ``[B, N, C]``. Raises `InvalidInput` where they do not fill the grid."""
        x = x + self.before(x, grid)
        x = x + self.attn(self.norm1(x), grid)
        x = x + self.between(x, grid)
        h = F.gelu(self.up(self.norm2(x)))
        return x + self.down(h + self.inside(h, grid))


@final
@dataclass(frozen=True, kw_only=True)
class NaLaBlock(GridLayer):
    """Settings of a NaLaFormer block."""

    spec: ClassVar[LayerSpec] = LayerSpec(
        id="nala-block",
        title="NaLaFormer block",
        paper="arXiv:2506.21137",
        source="code",
        summary="Norm-aware linear attention on a grid with rotary positions, a gate and local enhancement, and a feed-forward "
        "part with a depthwise convolution.",
        limits=(Limit("nalaformer", {}, "identity projections, gate and enhancement left out: the operator itself"),),
        shown="as the layer of a vision transformer, see `nalaformer`",
        honest="four depthwise convolutions share the work: what attention adds is seen with the operator alone",
    )
    heads: int = param(4, "heads; each as wide as a multiple of 4", low=1)
    attention: Literal["nala", "softmax"] = param("nala", "linear attention, or softmax as in the last two stages")
    feature: Literal["relu_split", "cosine"] = param("relu_split", "features of the linear attention, see `nalaformer`")
    mlp_ratio: float = param(4.0, "width of the feed-forward part over the model's", low=0.1)

    def build(self, width: int, **factory: Any) -> NaLaBlockModule:
        """See `Layer.build`; its module takes tokens ``[B, N, width]`` and their grid."""
        return NaLaBlockModule(width, self, **factory)
