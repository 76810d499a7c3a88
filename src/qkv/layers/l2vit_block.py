r"""L2ViT's two blocks: linear attention over the whole picture with local concentration, and softmax in windows.

    global   x += dw3(x);  x += W_o l2vit(W y);  x += concentrate(LN(x));  x += MLP(LN(x)),     y = LN(x)
    window   x += dw3(x);  x += W_o softmax in windows of w x w (W y);  x += dw3(x);  x += MLP(LN(x))

concentrate: depthwise 7 x 7, GELU, batch norm, depthwise 7 x 7. MLP: two layers with GELU. In each stage of the published models
the even blocks are of windows, the odd ones global (`l2vit_layout`; `qkv.models.vision.published.l2vit` builds them). Windows
are filled up with zeros at the right and below; in the released code what was filled up attends and is attended, and so it does
here unless ``mask_pad``.

Axes: B batch, N tokens of a grid (h, w), C channels.
Zheng 2025, The Linear Attention Resurrection in Vision Transformer, arXiv:2501.16182.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from qkv.core.errors import InvalidParameter
from qkv.core.layer import LayerSpec
from qkv.core.registry import method
from qkv.core.spec import Limit, param
from qkv.layers._grid import GridLayer
from qkv.ops._common.grids import Depthwise, LocalConcentration, check_grid, unwindows, windows


def reference(layer: L2ViTAttention, x: Tensor) -> Tensor:
    """The global attention head by head with whole maps, x ``[B, N, C]`` -> ``[B, N, C]``."""
    q, k, v = (y.unflatten(-1, (layer.heads, -1)) for y in layer.project(x).chunk(3, -1))
    outs = []
    for h in range(layer.heads):
        scores = q[:, :, h].relu() @ k[:, :, h].relu().mT
        total = scores.sum(-1, keepdim=True).clamp(min=layer.settings.den_floor)
        outs.append(layer.temperature[h] * scores @ v[:, :, h] / total)
    return layer.out(torch.cat(outs, -1))


def l2vit_layout(blocks: int) -> tuple[Literal["window", "global"], ...]:
    """Kinds of the blocks of a stage: windows first, then global, by turns. Raises `InvalidParameter`."""
    if blocks < 1:
        raise InvalidParameter(f"l2vit_layout: blocks={blocks} must be at least 1")
    return tuple("global" if i % 2 else "window" for i in range(blocks))


@final
class L2ViTAttention(nn.Module):
    """Attention of `L2ViTBlock`, over the whole grid or in windows."""

    def __init__(self, width: int, settings: L2ViTBlock, **factory: Any) -> None:
        super().__init__()
        if width % settings.heads:
            raise InvalidParameter(f"l2vit-block: heads={settings.heads} must divide the width {width}")
        self.heads, self.settings = settings.heads, settings
        self.project, self.out = nn.Linear(width, 3 * width, **factory), nn.Linear(width, width, **factory)
        if settings.scope == "global":
            self.operator = method("l2vit", den_floor=settings.den_floor)
            start = (width // settings.heads) ** -0.5
            self.temperature = nn.Parameter(torch.full((settings.heads,), start, **factory))
        else:
            self.operator = method("full")

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Tokens ``[B, N, C]`` -> ``[B, N, C]``."""
        heads = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # noqa: E731
        if self.settings.scope == "global":
            q, k, v = (heads(y) for y in self.project(x).chunk(3, -1))
            out = self.operator(q, k, v, causal=False, temperature=self.temperature)
            return self.out(out.transpose(1, 2).flatten(2))
        size = self.settings.window
        cut, real = windows(x.unsqueeze(1), grid, size)  # zeros are projected too: biases make tokens of them
        q, k, v = (heads(y) for y in self.project(cut.squeeze(1)).chunk(3, -1))
        out = self.operator(q, k, v, causal=False, padding=real if self.settings.mask_pad else None)
        return self.out(unwindows(out, grid, size).transpose(1, 2).flatten(2))


@final
class L2ViTBlockModule(nn.Module):
    """See `L2ViTBlock`."""

    def __init__(self, width: int, settings: L2ViTBlock, **factory: Any) -> None:
        super().__init__()
        inner, self.drop_path = round(settings.mlp_ratio * width), settings.drop_path
        self.before = Depthwise(width, 3).to(**factory)
        self.norm1, self.norm2 = nn.LayerNorm(width, **factory), nn.LayerNorm(width, **factory)
        self.attn = L2ViTAttention(width, settings, **factory)
        self.mlp = nn.Sequential(nn.Linear(width, inner, **factory), nn.GELU(), nn.Linear(inner, width, **factory))
        if settings.scope == "global":
            self.local = LocalConcentration(width, settings.local_kernel).to(**factory)
            self.norm3 = nn.LayerNorm(width, **factory)
        else:
            self.between = Depthwise(width, 3).to(**factory)

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Tokens ``[B, N, C]`` of a grid (h, w) -> ``[B, N, C]``. Raises `InvalidInput` where they do not fill the grid."""
        check_grid(x.shape[1], grid, "l2vit-block")
        x = x + self.before(x, grid)
        x = x + self._kept(self.attn(self.norm1(x), grid))
        if self.attn.settings.scope == "global":
            x = x + self._kept(self.local(self.norm3(x), grid))
        else:
            x = x + self.between(x, grid)
        return x + self._kept(self.mlp(self.norm2(x)))

    def _kept(self, branch: Tensor) -> Tensor:
        """A branch, left out of some rows of a batch in training; the others make up for them."""
        if not self.training or self.drop_path == 0.0:
            return branch
        keep = torch.rand(branch.shape[0], 1, 1, device=branch.device) >= self.drop_path
        return branch * keep / (1.0 - self.drop_path)


@final
@dataclass(frozen=True, kw_only=True)
class L2ViTBlock(GridLayer):
    """Settings of an L2ViT block."""

    spec: ClassVar[LayerSpec] = LayerSpec(
        id="l2vit-block",
        title="L2ViT block",
        paper="arXiv:2501.16182",
        source="code",
        summary="Linear attention over the whole picture followed by local concentration, or softmax attention in windows; the "
        "published models take turns.",
        limits=(Limit("l2vit", {}, "identity projections, convolutions and MLP left out: the operator itself"),),
        shown="as the layer of a vision transformer, see `l2vit`",
        honest="local concentration's two convolutions cost more than the attention they follow where channels are few",
    )
    heads: int = param(3, "heads; the published ones are 32 wide", low=1)
    scope: Literal["global", "window"] = param("global", "linear attention over all tokens, or softmax in windows")
    window: int = param(7, "side of a window, tokens", low=1)
    mask_pad: bool = param(False, "keep what windows are filled up with out of the softmax; the released code does not")
    local_kernel: int = param(7, "side of the convolutions of local concentration, odd", low=1)
    den_floor: float = param(100.0, "the smallest denominator of the linear attention", low=1e-12)
    mlp_ratio: float = param(4.0, "width of the MLP over the model's", low=0.1)
    drop_path: float = param(
        0.0, "share of the rows of a batch from which training leaves a branch out", low=0.0, high=0.99
    )

    def validate(self) -> None:
        """Kernels are odd."""
        if self.local_kernel % 2 == 0:
            raise InvalidParameter(f"l2vit-block: local_kernel={self.local_kernel} must be odd")

    def build(self, width: int, **factory: Any) -> L2ViTBlockModule:
        """See `Layer.build`; its module takes tokens ``[B, N, width]`` and their grid."""
        return L2ViTBlockModule(width, self, **factory)
