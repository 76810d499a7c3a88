r"""EcoFormer's attention as a layer: one projection for queries and keys, fitted hash functions, codes in the place of softmax.

    x' = W_qk x,   out = W_o ecoformer(x', x', W_v x)

`from_softmax` takes the projections of a softmax layer; one of its two score projections must stand for both (``tie``: the keys',
the queries', or their mean), so the model is first fine-tuned with that one projection under softmax (``hashed=False``), then
`fit` is called on tokens of the first batch of every epoch while it is fine-tuned on codes. The authors leave the last stage
of a model with softmax. `qkv.models.vision.ecoformer` takes these steps with a pretrained model.

Axes: B batch, N tokens, C channels, H heads.
Liu et al. 2022, EcoFormer: Energy-Saving Attention with Linear Complexity, arXiv:2209.09004.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from qkv.core.errors import InvalidInput, InvalidParameter
from qkv.core.layer import Layer, LayerSpec
from qkv.core.registry import method
from qkv.core.spec import Limit, param
from qkv.ops.ecoformer import KernelHash

Tie = Literal["key", "query", "mean"]


def reference(layer: EcoAttentionModule, x: Tensor) -> Tensor:
    """The layer with whole maps of code products, x ``[B, N, C]`` -> ``[B, N, C]``."""
    heads = lambda y: y.unflatten(-1, (layer.heads, -1)).transpose(1, 2)  # noqa: E731
    c, v = layer.hash.codes(heads(layer.qk(x))), heads(layer.v(x))
    weights = c @ c.mT + c.shape[-1] + 1
    out = weights @ v / weights.sum(-1, keepdim=True)
    return layer.out(out.transpose(1, 2).flatten(2))


@final
class EcoAttentionModule(nn.Module):
    """See `EcoAttention`. hashed: False computes softmax with the shared projection, the first step of a conversion."""

    def __init__(self, width: int, settings: EcoAttention, **factory: Any) -> None:
        super().__init__()
        if width % settings.heads:
            raise InvalidParameter(f"eco-attention: heads={settings.heads} must divide the width {width}")
        self.heads, self.hashed = settings.heads, True
        self.operator, self.softmax = method("ecoformer", shift=settings.shift), method("full")
        self.qk, self.v, self.out = (nn.Linear(width, width, bias=settings.bias, **factory) for _ in range(3))
        self.hash = KernelHash(settings.heads, width // settings.heads, settings.bits, settings.anchors).to(**factory)

    def forward(self, x: Tensor, *, causal: bool = False, padding: Tensor | None = None) -> Tensor:
        """Tokens ``[B, N, C]`` -> ``[B, N, C]``; padding bool ``[B, N]``, True = real. Raises `Refused` before `fit`."""
        q, v = self._heads(self.qk(x)), self._heads(self.v(x))
        if self.hashed:
            out = self.operator(q, q, v, causal=causal, padding=padding, **self.hash.hash._asdict())
        else:
            out = self.softmax(q, q, v, causal=causal, padding=padding)
        return self.out(out.transpose(1, 2).flatten(2))

    @torch.no_grad()
    def fit(self, x: Tensor, **settings: Any) -> None:
        """Fit the hash functions to inputs ``[B, N, C]`` of the layer; settings as of `qkv.ops.ecoformer.fit_hash`."""
        self.hash.fit(self._heads(self.qk(x)), **settings)

    @torch.no_grad()
    def from_softmax(
        self, query: nn.Linear, key: nn.Linear, value: nn.Linear, out: nn.Linear, tie: Tie = "key"
    ) -> EcoAttentionModule:
        """Take the weights of a softmax layer of the same width; returns itself. Raises `InvalidInput`, `InvalidParameter`."""
        if tie not in ("key", "query", "mean"):
            raise InvalidParameter(f"eco-attention: tie={tie!r} must be 'key', 'query' or 'mean'")
        for name, given in {"query": query, "key": key, "value": value, "out": out}.items():
            if given.weight.shape != self.qk.weight.shape or (given.bias is None) != (self.qk.bias is None):
                raise InvalidInput(f"eco-attention: the {name} projection has weight {tuple(given.weight.shape)} and "
                                   f"{'no ' if given.bias is None else ''}bias; expected {tuple(self.qk.weight.shape)} and "
                                   f"{'no ' if self.qk.bias is None else ''}bias")  # fmt: skip
        sources = {"key": (key,), "query": (query,), "mean": (query, key)}[tie]
        for part in ("weight",) if self.qk.bias is None else ("weight", "bias"):
            getattr(self.qk, part).copy_(torch.stack([getattr(s, part) for s in sources]).mean(0))
            getattr(self.v, part).copy_(getattr(value, part))
            getattr(self.out, part).copy_(getattr(out, part))
        return self

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


@final
@dataclass(frozen=True, kw_only=True)
class EcoAttention(Layer):
    """Settings of an EcoFormer attention layer; bits and anchors are the paper's."""

    spec: ClassVar[LayerSpec] = LayerSpec(
        id="eco-attention",
        title="EcoFormer attention layer",
        paper="arXiv:2209.09004",
        source="code",
        summary="Attention on fitted binary codes of one shared projection of queries and keys, with the weights of a softmax "
        "layer to begin with.",
        limits=(Limit("ecoformer", {}, "identity projections: the operator itself"),),
        shown="as the layer of a vision transformer, see `ecoformer`",
        honest="queries and keys of pretrained layers differ, so sharing them needs fine-tuning before codes do",
    )
    heads: int = param(4, "heads", low=1)
    bits: int = param(16, "bits of a code", low=1)
    anchors: int = param(25, "tokens that others are compared with", low=1)
    bias: bool = param(True, "projections have biases")
    shift: Literal["exact", "reference"] = param("exact", "see `ecoformer`")

    def build(self, width: int, **factory: Any) -> EcoAttentionModule:
        """See `Layer.build`."""
        return EcoAttentionModule(width, self, **factory)
