r"""Re-WKV block: averages of all pixels along rows, then of the result along columns, and a gated mixer of channels.

    s = OmniShift(LN(x)),  r = sigmoid(W_r s),  k = W_k s,  v = W_v s
    v <- BiWKV(w_j / N, u_j / N, k, v)  for each scan j, row-major or column-major;     x += g1 * W_o (r * v)
    s = OmniShift(LN(x));     x += g2 * sigmoid(W_r s) * W_v relu(W_k s)^2               (4 C channels inside)

BiWKV is `restore-rwkv` of qkv.ops with a channel per head. The keys are shared by the scans; each later scan averages what the
one before it made, so that a pixel reaches every other in both axes. w and u are divided by the number of pixels N: the same
weights reach as far, in parts of the picture, at any resolution.

Axes: B batch, N tokens of a grid (h, w), C channels.
Yang et al. 2024, Restore-RWKV: Efficient and Effective Medical Image Restoration with RWKV, arXiv:2407.11087.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from qkv.core.errors import InvalidParameter
from qkv.core.layer import LayerSpec
from qkv.core.operator import Operator
from qkv.core.registry import method
from qkv.core.spec import Limit, param
from qkv.layers._grid import GridLayer
from qkv.layers._omni_shift import OmniShiftModule
from qkv.ops._common.grids import check_grid

Scans = tuple[Literal["row", "col"], ...]


def reference(k: Tensor, v: Tensor, w: Tensor, u: Tensor, grid: Sequence[int], scans: Scans, offset: int = 1) -> Tensor:
    """The scans with whole maps: k, v ``[B, N, C]``, w and u ``[scans, C]`` before the division -> ``[B, N, C]``."""
    n = k.shape[1]
    for scan, rate, bonus in zip(scans, w / n, u / n, strict=True):
        place = torch.arange(n, device=k.device).unflatten(0, tuple(grid))
        place = (place if scan == "row" else place.T.reshape(-1).argsort().unflatten(0, tuple(grid))).flatten()
        age = (place[:, None] - place).abs() - offset
        bias = torch.where(torch.eye(n, dtype=torch.bool, device=k.device)[..., None], bonus, -rate * age[..., None])
        v = torch.einsum("bijc,bjc->bic", (k.unsqueeze(1) + bias).softmax(2), v)
    return v


@final
class SpatialMix(nn.Module):
    """The first half of the block; weights by the authors' names."""

    def __init__(self, width: int, operator: Operator, scans: Scans, **factory: Any) -> None:
        super().__init__()
        self.operator, self.scans = operator, scans
        self.omni_shift = OmniShiftModule(width, **factory)
        self.receptance, self.key, self.value, self.output = (
            nn.Linear(width, width, bias=False, **factory) for _ in range(4)
        )
        self.spatial_decay = nn.Parameter(torch.randn(len(scans), width, **factory))
        self.spatial_first = nn.Parameter(torch.randn(len(scans), width, **factory))

    def averaged(self, k: Tensor, v: Tensor, grid: Sequence[int]) -> Tensor:
        """Values ``[B, N, C]`` after all scans."""
        n = k.shape[1]
        for scan, w, u in zip(self.scans, self.spatial_decay / n, self.spatial_first / n, strict=True):
            keys, values = (_channels(x, grid, scan) for x in (k, v))  # [B, C, N, 1]
            out = self.operator(torch.ones_like(keys), keys, values, w=w, u=u, causal=False)
            v = out.squeeze(-1).mT
            v = v if scan == "row" else _turned(v, (grid[1], grid[0]))
        return v

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Tokens ``[B, N, C]`` -> ``[B, N, C]``."""
        s = self.omni_shift(x, grid)
        return self.output(self.receptance(s).sigmoid() * self.averaged(self.key(s), self.value(s), grid))


@final
class ChannelMix(nn.Module):
    """The second half of the block; weights by the authors' names."""

    def __init__(self, width: int, hidden: int, **factory: Any) -> None:
        super().__init__()
        self.omni_shift = OmniShiftModule(width, **factory)
        self.key, self.value = (nn.Linear(*s, bias=False, **factory) for s in ((width, hidden), (hidden, width)))
        self.receptance = nn.Linear(width, width, bias=False, **factory)

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Tokens ``[B, N, C]`` -> ``[B, N, C]``."""
        s = self.omni_shift(x, grid)
        return self.receptance(s).sigmoid() * self.value(self.key(s).relu().square())


@final
class ReWKVBlock(nn.Module):
    """See `ReWKV`. `qkv.layers.omni_shift.reparameterized` prepares it for inference."""

    def __init__(self, width: int, settings: ReWKV, **factory: Any) -> None:
        super().__init__()
        operator = method("restore-rwkv", distance_offset=settings.distance_offset, chunk_size=settings.chunk_size)
        self.ln1, self.ln2 = nn.LayerNorm(width, **factory), nn.LayerNorm(width, **factory)
        self.att = SpatialMix(width, operator, settings.scans, **factory)
        self.ffn = ChannelMix(width, settings.expansion * width, **factory)
        self.gamma1, self.gamma2 = (nn.Parameter(torch.ones(width, **factory)) for _ in range(2))

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Tokens ``[B, N, C]`` of a grid (h, w) -> ``[B, N, C]``. Raises `InvalidInput` where they do not fill the grid."""
        check_grid(x.shape[1], grid, "rewkv")
        x = x + self.gamma1 * self.att(self.ln1(x), grid)
        return x + self.gamma2 * self.ffn(self.ln2(x), grid)


def _turned(x: Tensor, grid: Sequence[int]) -> Tensor:
    """Tokens ``[B, N, C]`` in the order of the transposed grid."""
    return x.unflatten(1, tuple(grid)).transpose(1, 2).flatten(1, 2)


def _channels(x: Tensor, grid: Sequence[int], scan: str) -> Tensor:
    """Tokens ``[B, N, C]`` in the order of the scan, a channel per head: ``[B, C, N, 1]``."""
    return (x if scan == "row" else _turned(x, grid)).mT.unsqueeze(-1)


@final
@dataclass(frozen=True, kw_only=True)
class ReWKV(GridLayer):
    """Settings of a Re-WKV block; the defaults are the paper's."""

    spec: ClassVar[LayerSpec] = LayerSpec(
        id="rewkv",
        title="Re-WKV block (Restore-RWKV)",
        paper="arXiv:2407.11087",
        source="code",
        summary="Mixes pixels by exponential averages along rows and then columns, with Omni-Shift before every projection, and "
        "channels by a gated squared ReLU.",
        limits=(Limit("restore-rwkv", {"scans": ("row",)}, "one scan: the operator itself between its projections"),),
        shown="as the block of a denoiser, see `restore-rwkv`",
        honest="the reach is learnt in parts of the picture: another number of pixels than in training changes what weights do",
    )
    scans: tuple[Literal["row", "col"], ...] = param(
        ("row", "col"), "orders of the pixels, one average after the other"
    )
    expansion: int = param(4, "channels inside the mixer of channels, in widths", low=1)
    distance_offset: int = param(1, "distance at which nothing has faded yet", low=0, high=1)
    chunk_size: int = param(64, "tokens per chunk of the scans", low=1)

    def validate(self) -> None:
        """At least one scan."""
        if not self.scans:
            raise InvalidParameter('rewkv: scans=() must name at least one order of the pixels, "row" or "col"')

    def build(self, width: int, **factory: Any) -> ReWKVBlock:
        """See `Layer.build`; its module takes tokens ``[B, N, width]`` and their grid."""
        return ReWKVBlock(width, self, **factory)
