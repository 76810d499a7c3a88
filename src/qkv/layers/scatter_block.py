r"""ScatterFormer layer: linear attention inside windows of voxels, then convolutions across windows instead of shifted ones.

    x += W_o packed(W_q y, W_k y, W_v y) + b_o,   y = BN(x)       `scatterformer` of qkv.ops, windows of w x w voxels, full height
    b = BN(x);   four quarters of the channels of b: 3 x 3 x 3, (w + 1) along x, (w + 1) along y (depthwise), as they are
    x = b + all four;   x += W_2 relu(W_1 BN(x))                      2 C channels inside; the residual is on b, as released

The convolutions are submanifold: they read and write voxels that exist. Here they run on the dense grid of the scene with zeros
between, one quarter of the channels at a time (our choice: no library of sparse convolutions is needed; memory grows with the
scene's volume). Batch norm over all voxels, eps 1e-3, momentum 0.01.

Axes: T voxels, C channels, coords (batch, z, y, x).
He et al. 2024, ScatterFormer: Efficient Voxel Transformer with Scattered Linear Attention, arXiv:2401.00912.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkv.core.errors import InvalidInput, InvalidParameter
from qkv.core.layer import Layer, LayerSpec
from qkv.core.spec import Limit, param
from qkv.ops.scatterformer import Windows, packed, window_segments


def reference(x: Tensor, coords: Tensor, weight: Tensor) -> Tensor:
    """A depthwise convolution over voxels that exist, pair by pair: x ``[T, C]``, weight ``[C, 1, z, y, x]`` -> ``[T, C]``."""
    sizes = torch.tensor(weight.shape[2:])
    steps = (
        coords[None, :, 1:] - coords[:, None, 1:] + (sizes - 1) // 2
    )  # place of voxel j in the kernel around voxel i
    inside = ((steps >= 0) & (steps < sizes)).all(-1) & (coords[None, :, 0] == coords[:, None, 0])
    z, y, x_ = steps.clamp(min=0).minimum(sizes - 1).unbind(-1)
    return torch.einsum("cij,ij,jc->ic", weight[:, 0, z, y, x_], inside.to(x), x)


def over_voxels(x: Tensor, coords: Tensor, weight: Tensor) -> Tensor:
    """As `reference`, on the dense grid around the voxels; an even kernel reaches one further ahead than back."""
    low = coords.amin(0)
    place = (coords - low).unbind(1)
    size = [int(n) + 1 for n in (coords.amax(0) - low).tolist()]
    dense = x.new_zeros(*size, x.shape[1]).index_put(place, x).movedim(-1, 1)  # [B, C, z, y, x]
    pads = [p for k in reversed(weight.shape[2:]) for p in ((k - 1) // 2, k // 2)]
    done = F.conv3d(F.pad(dense, pads), weight, groups=x.shape[1])
    return done.movedim(1, -1)[place]


@final
class ScatteredAttention(nn.Module):
    """Projections around the operator for one list of voxels."""

    def __init__(self, width: int, settings: ScatterBlock, **factory: Any) -> None:
        super().__init__()
        self.settings = settings
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False, **factory), nn.Linear(width, width, **factory)

    def forward(self, x: Tensor, windows: Windows) -> Tensor:
        """Voxels ``[T, C]`` and what `window_segments` says of their coords -> ``[T, C]``."""
        s = self.settings
        q, k, v = self.qkv(x)[windows.order].unflatten(-1, (3, s.heads, -1)).unbind(1)
        out = packed(q, k, v, windows.cu_seqlens, neighbours=windows.neighbours, tile=s.tile)
        return self.proj(torch.zeros_like(x).index_copy(0, windows.order, out.flatten(1)))


@final
class CrossWindowMixer(nn.Module):
    """The second half of the layer: convolutions over the voxels, then a mixer of channels."""

    def __init__(self, width: int, window: int, **factory: Any) -> None:
        super().__init__()
        self.first, self.second = (nn.BatchNorm1d(width, eps=1e-3, momentum=0.01, **factory) for _ in range(2))
        self.kernels = nn.ParameterList()
        for shape in ((3, 3, 3), (1, 1, window + 1), (1, window + 1, 1)):
            self.kernels.append(nn.init.kaiming_uniform_(torch.empty(width // 4, 1, *shape, **factory), a=5**0.5))
        self.up, self.down = nn.Linear(width, 2 * width, **factory), nn.Linear(2 * width, width, **factory)

    def forward(self, x: Tensor, coords: Tensor) -> Tensor:
        """Voxels ``[T, C]`` -> ``[T, C]``."""
        b = self.first(x)
        parts = b.chunk(4, -1)
        mixed = [over_voxels(p, coords, w) for p, w in zip(parts, self.kernels, strict=False)]
        x = b + torch.cat([*mixed, parts[-1]], -1)
        return x + self.down(self.up(self.second(x)).relu())


@final
class ScatterBlockModule(nn.Module):
    """See `ScatterBlock`."""

    def __init__(self, width: int, settings: ScatterBlock, **factory: Any) -> None:
        super().__init__()
        if width % settings.heads or width % 4:
            raise InvalidParameter(f"scatter-block: the width {width} must divide by heads={settings.heads} and by 4")
        self.settings = settings
        self.norm = nn.BatchNorm1d(width, eps=1e-3, momentum=0.01, **factory)
        self.attn = ScatteredAttention(width, settings, **factory)
        self.mixer = CrossWindowMixer(width, settings.window, **factory)

    def forward(self, x: Tensor, coords: Tensor, windows: Windows | None = None) -> Tensor:
        """Voxels ``[T, C]`` at distinct integer coords ``[T, 4]`` = (batch, z, y, x) -> ``[T, C]``.

        windows: what `window_segments` gave for these coords, to share it between layers. Raises `InvalidInput`.
        """
        if x.ndim != 2 or coords.shape != (x.shape[0], 4):
            raise InvalidInput(
                f"scatter-block: x must be [T, C] and coords [T, 4]; got {tuple(x.shape)} and {tuple(coords.shape)}"
            )
        if windows is None:
            windows = window_segments(coords, self.settings.window, self.settings.neighbour_radius)
        x = x + self.attn(self.norm(x), windows)
        return self.mixer(x, coords)


@final
@dataclass(frozen=True, kw_only=True)
class ScatterBlock(Layer):
    """Settings of a ScatterFormer layer; the defaults are the paper's (for 128 channels)."""

    spec: ClassVar[LayerSpec] = LayerSpec(
        id="scatter-block",
        title="ScatterFormer layer",
        paper="arXiv:2401.00912",
        source="code",
        summary="Linear attention inside windows of sparse voxels whatever their counts, with long depthwise convolutions that "
        "carry information across windows.",
        limits=(
            Limit("scatterformer", {"neighbour_radius": 0}, "the attention between the projections is the operator"),
        ),
        shown="as the layer of a classifier of points, see `scatterformer`",
        honest="the convolutions run on the dense grid around the voxels: memory grows with the volume of the scene",
    )
    heads: int = param(4, "heads", low=1)
    window: int = param(12, "side of a window in voxels; kernels along x and y are one longer", low=1)
    neighbour_radius: int = param(0, "windows on each side whose keys are read too", low=0)
    tile: int = param(32, "tokens of one window that are multiplied at once", low=1)

    def build(self, width: int, **factory: Any) -> ScatterBlockModule:
        """See `Layer.build`; its module takes voxels ``[T, width]`` and their coords ``[T, 4]``."""
        return ScatterBlockModule(width, self, **factory)
