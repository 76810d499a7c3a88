r"""A small vision transformer whose layers take any bidirectional operator, in any mixture with softmax and windows.

    tokens = patches W_p + positions,   x += W_o norm(operator(q, k, v, ...)),   x += W2 (silu(W1 x) * W3 x)
    classes = U mean(x)

Images are cut into square patches; a token is a patch, and operators that need it are told the grid of patches. Positions are a
learnt table, one row per patch; there is no class token. Axes: B batch, C channels, N patches, W width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkv.core.errors import InvalidInput, InvalidParameter
from qkv.core.spec import Method
from qkv.models._blocks import Block, ModelConfig, Saved, SavedConfig, fitted, gated_width, initialise, mixer


@final
@dataclass(frozen=True, kw_only=True)
class ViTConfig(ModelConfig):
    """Shape of a `ViT`; see `ModelConfig` for what all small models share.

    size: height and width of the images in pixels. patch: side of a patch, divides both.
    """

    operators: tuple[Method | str, ...] = ("full", "full", "full", "full")
    size: tuple[int, int] = (28, 28)
    channels: int = 1
    patch: int = 4
    classes: int = 10
    width: int = 128
    causal: ClassVar[bool] = False

    def check(self) -> None:
        """See `SavedConfig.check`."""
        super().check()
        self.positive("channels", "patch", "classes")
        size = tuple(self.size) if isinstance(self.size, (tuple, list)) else ()
        if len(size) != 2 or any(
            isinstance(n, bool) or not isinstance(n, int) or n < 1 or n % self.patch for n in size
        ):
            raise InvalidParameter(
                f"size={self.size!r} must be (height, width) in pixels, multiples of patch={self.patch}"
            )
        object.__setattr__(self, "size", size)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches in height and width."""
        return self.size[0] // self.patch, self.size[1] // self.patch

    def fitted(self, parameters: int) -> ViTConfig:
        """The same with gated layers of such a width that the model has about `parameters` parameters."""
        return fitted(self, parameters, lambda c: ViT.count(c))


@final
class ViT(Saved):
    """See the module. A fresh model has random weights from `seed`."""

    kind: ClassVar[str] = "vit"
    config_class: ClassVar[type[SavedConfig]] = ViTConfig

    def __init__(self, config: ViTConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = c = config
        self.patches = nn.Linear(c.channels * c.patch**2, c.width)
        self.positions = nn.Embedding.from_pretrained(torch.empty(c.grid[0] * c.grid[1], c.width), freeze=False)
        self.blocks = nn.ModuleList()
        for i, method in enumerate(c.methods):
            mixed = mixer(method, c, i, causal=False, conv=0, grid=c.grid)
            self.blocks.append(Block(mixed, c.width, gated_width(c.width, c.inner)))
        self.last = nn.RMSNorm(c.width, eps=1e-6)
        self.head = nn.Linear(c.width, c.classes)
        if not self.head.weight.is_meta:
            initialise(self, c.layers, seed)
            with torch.no_grad():
                self.positions.weight.mul_(3**-0.5 / 0.02)  # as large as the patches of images of variance 1

    @staticmethod
    def count(config: ViTConfig) -> int:
        """Trained numbers of a model of this configuration."""
        with torch.device("meta"):
            return sum(p.numel() for p in ViT(config).parameters())

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of images ``[B, C, height, width]``. Raises `InvalidInput`."""
        c = self.config
        if images.ndim != 4 or tuple(images.shape[1:]) != (c.channels, *c.size) or not images.is_floating_point():
            raise InvalidInput(f"images must be floating point [B, C, height, width] with {(c.channels, *c.size)}; got "
                               f"{images.dtype} {tuple(images.shape)}")  # fmt: skip
        cut = images.unfold(2, c.patch, c.patch).unfold(3, c.patch, c.patch)  # [B, C, h, w, p, p]
        x = self.patches(cut.permute(0, 2, 3, 1, 4, 5).flatten(1, 2).flatten(2)) + self.positions.weight
        for block in self.blocks:
            x, _ = block(x)
        return self.head(self.last(x).mean(1))

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Mean nats of labels ``[B]``."""
        return F.cross_entropy(self(images).float(), labels)
