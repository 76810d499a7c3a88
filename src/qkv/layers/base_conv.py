r"""BaseConv: Based's gated short convolution, the layer between its attention layers.

    u, g = W1 x,     y = W2 (conv(u) * silu(g)),     conv(u)_t = b + sum_{i < k} w_i * u_{t - i}   per channel

W1 makes `expand` times the width, half of it u and half g. No token further back than k - 1 is seen: the layer compares
neighbours, attention layers recall. That W1 and W2 have no bias and that silu stands on the gate alone is our choice: the paper's
text leaves both open.

State: the newest k - 1 inputs u of the convolution, ``tail`` ``[B, k - 1, C]``.

Axes: B batch, N tokens, W width, C = expand W / 2 channels, k taps.
Arora et al. 2024, Simple linear attention language models balance the recall-throughput tradeoff, arXiv:2402.18668.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkv.core.errors import InvalidParameter
from qkv.core.layer import LayerSpec
from qkv.core.spec import param
from qkv.core.state import State
from qkv.layers._mixer import MixingLayer, convolved


def reference(layer: BaseConvModule, x: Tensor) -> Tensor:
    """The layer tap by tap, x ``[B, N, W]`` -> ``[B, N, W]``."""
    u, g = layer.up(x).chunk(2, -1)
    weight, n = layer.conv.weight[:, 0], x.shape[1]  # [C, k], the newest token's last
    assert layer.conv.bias is not None
    mixed = torch.zeros_like(u) + layer.conv.bias
    for i in range(min(weight.shape[1], n)):
        mixed[:, i:] += weight[:, -1 - i] * u[:, : n - i]
    return layer.out(mixed * g * g.sigmoid())


@final
class BaseConvModule(nn.Module):
    """See `BaseConv`. Called as a token mixer: a state goes in and comes out, rows may be padded on the left."""

    owner = "base-conv"

    def __init__(self, width: int, settings: BaseConv, **factory: Any) -> None:
        super().__init__()
        if settings.expand * width % 2:
            raise InvalidParameter(f"base-conv: expand={settings.expand} times the width {width} must be even")
        channels = settings.expand * width // 2
        self.up = nn.Linear(width, 2 * channels, bias=False, **factory)
        self.conv = nn.Conv1d(channels, channels, settings.kernel, groups=channels, **factory)
        self.out = nn.Linear(channels, width, bias=False, **factory)

    def forward(
        self, x: Tensor, *, padding: Tensor | None = None, state: State | None = None, keep: bool = False
    ) -> tuple[Tensor, State | None]:
        """Tokens ``[B, N, W]``, after those of `state` -> mixed tokens, and the state after them when `keep`.

        padding: bool ``[B, N]``, True = real, padded on the left. Raises `StateError`.
        """
        if padding is not None:
            x = x.masked_fill(~padding.unsqueeze(-1), 0.0)
        u, g = self.up(x).chunk(2, -1)
        tail = None if state is None else state.of(self.owner, tail=self._held(x))["tail"]
        mixed, tail = convolved(self.conv, u, tail)
        out = self.out(mixed * F.silu(g))
        return out, State(
            self.owner, {"tail": tail}, x.shape[1] + (0 if state is None else state.seen)
        ) if keep else None

    def _held(self, x: Tensor) -> tuple[int, int, int]:
        """Shape of the inputs that are kept."""
        return x.shape[0], self.conv.kernel_size[0] - 1, self.conv.in_channels


@final
@dataclass(frozen=True, kw_only=True)
class BaseConv(MixingLayer):
    """Settings of a gated short convolution; the defaults are the published ones."""

    spec: ClassVar[LayerSpec] = LayerSpec(
        id="base-conv",
        title="BaseConv (Based)",
        paper="arXiv:2402.18668",
        source="paper",
        summary="A short causal convolution with a gate, as the layers between Based's linear attention and its windows; decodes "
        "from a few inputs.",
        shown="as a layer of the Based hybrid, see `based`",
        honest="it recalls nothing beyond its few taps: alone it is no attention layer",
    )
    kernel: int = param(3, "taps of the convolution, the token's own included", low=2)
    expand: int = param(4, "width of the first projection (values and gate together) over the model's", low=1)

    def build(self, width: int, **factory: Any) -> BaseConvModule:
        """See `Layer.build`; its module takes tokens ``[B, N, width]`` and the arguments of a mixer."""
        return BaseConvModule(width, self, **factory)
