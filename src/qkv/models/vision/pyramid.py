r"""A vision model in stages: a stem of convolutions, blocks on ever coarser grids, the mean of the last tokens.

    x = stem(image);   each stage: x = block(x, grid) for its blocks, then a convolution halves the grid and widens x
    classes = U LN(mean x)

Blocks are layers that take tokens and their grid (`l2vit-block`, `nala-block`, `rewkv`); `qkv.models.vision.published` lists
those of published models. Stem: convolutions 3 x 3, each with batch norm and ReLU, as many of stride 2 as make the patch. Between
stages: LayerNorm and a convolution 2 x 2 of stride 2; odd sides are filled up with zeros (both our choice where the papers' texts
do not say). Axes: B batch, C channels, N tokens of a grid (h, w), W width of a stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkv.core.errors import InvalidInput, InvalidParameter, Refused
from qkv.core.spec import Method
from qkv.layers._grid import GridLayer
from qkv.models._blocks import Saved, SavedConfig, seeded
from qkv.ops._common.grids import off_grid, on_grid


@final
@dataclass(frozen=True, kw_only=True)
class PyramidConfig(SavedConfig):
    """Shape of a `Pyramid`.

    operators: one setting per block, all stages in a row. depths: blocks of each stage. widths: of each stage. size: height and
    width of the images in pixels. patch: pixels of a token's side in the first stage, a power of two. stem: convolutions of the
    stem, at least as many as halvings make the patch.
    """

    operators: tuple[Method | str, ...] = ("l2vit-block:scope=window", "l2vit-block")
    depths: tuple[int, ...] = (2,)
    widths: tuple[int, ...] = (96,)
    size: tuple[int, int] = (224, 224)
    channels: int = 3
    classes: int = 1000
    patch: int = 4
    stem: int = 2

    def admit(self, method: Method) -> None:
        """See `SavedConfig.admit`."""
        if not isinstance(method, GridLayer):
            raise Refused(f"{method.id} is no block on a grid; a stage is built from l2vit-block, nala-block or rewkv")

    def check(self) -> None:
        """See `SavedConfig.check`."""
        for name in ("depths", "widths", "size"):
            value = getattr(self, name)
            numbers = tuple(value) if isinstance(value, (tuple, list)) else ()
            if not numbers or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in numbers):
                raise InvalidParameter(f"{name}={value!r} must be a list of ints of at least 1")
            object.__setattr__(self, name, numbers)
        self.positive("channels", "classes", "patch", "stem")
        if len(self.depths) != len(self.widths):
            raise InvalidParameter(f"depths={self.depths} and widths={self.widths} must have one number for each stage")
        if sum(self.depths) != len(self.operators):
            raise InvalidParameter(
                f"depths={self.depths} are {sum(self.depths)} blocks; {len(self.operators)} are given"
            )
        halvings = self.patch.bit_length() - 1
        if self.patch != 1 << halvings or self.stem < halvings:
            raise InvalidParameter(
                f"patch={self.patch} must be a power of two that stem={self.stem} convolutions of stride 2 can make"
            )
        if len(self.size) != 2 or any(n % self.patch for n in self.size):
            raise InvalidParameter(f"size={self.size} must be (height, width), multiples of patch={self.patch}")


class Halved(nn.Module):
    """LayerNorm, then a convolution 2 x 2 of stride 2: tokens of a grid (h, w) -> of half the grid, rounded up."""

    def __init__(self, width: int, wider: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.LayerNorm(width), nn.Conv2d(width, wider, 2, stride=2)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """``[B, N, W]`` -> ``[B, N', W']`` and its grid."""
        field = F.pad(on_grid(self.norm(x), grid), (0, grid[1] % 2, 0, grid[0] % 2))
        field = self.conv(field)
        return off_grid(field), (field.shape[2], field.shape[3])


@final
class Pyramid(Saved):
    """See the module. A fresh model has random weights from `seed`."""

    kind: ClassVar[str] = "pyramid"
    config_class: ClassVar[type[SavedConfig]] = PyramidConfig

    def __init__(self, config: PyramidConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = c = config
        meta = torch.empty(0).is_meta
        with seeded(None if meta else seed):
            halvings, into, stem = c.patch.bit_length() - 1, c.channels, []
            for i in range(c.stem):
                stem += [nn.Conv2d(into, c.widths[0], 3, stride=2 if i < halvings else 1, padding=1, bias=False)]
                stem += [nn.BatchNorm2d(c.widths[0]), nn.ReLU()]
                into = c.widths[0]
            self.stem = nn.Sequential(*stem)
            blocks, self.stages, self.between = iter(c.methods), nn.ModuleList(), nn.ModuleList()
            for depth, width in zip(c.depths, c.widths, strict=True):
                self.stages.append(nn.ModuleList(next(blocks).build(width) for _ in range(depth)))  # type: ignore[attr-defined]
            for width, wider in zip(c.widths, c.widths[1:], strict=False):
                self.between.append(Halved(width, wider))
            self.last, self.head = nn.LayerNorm(c.widths[-1]), nn.Linear(c.widths[-1], c.classes)

    @staticmethod
    def count(config: PyramidConfig) -> int:
        """Trained numbers of a model of this configuration."""
        with torch.device("meta"):
            return sum(p.numel() for p in Pyramid(config).parameters())

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of images ``[B, C, height, width]``. Raises `InvalidInput`."""
        c = self.config
        if images.ndim != 4 or tuple(images.shape[1:]) != (c.channels, *c.size) or not images.is_floating_point():
            raise InvalidInput(f"images must be floating point [B, C, height, width] with {(c.channels, *c.size)}; got "
                               f"{images.dtype} {tuple(images.shape)}")  # fmt: skip
        field = self.stem(images)
        x, grid = off_grid(field), (field.shape[2], field.shape[3])
        for i, stage in enumerate(self.stages):
            if i:
                x, grid = self.between[i - 1](x, grid)
            for block in stage:  # type: ignore[union-attr]
                x = block(x, grid)
        return self.head(self.last(x).mean(1))

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Mean nats of labels ``[B]``."""
        return F.cross_entropy(self(images).float(), labels)
