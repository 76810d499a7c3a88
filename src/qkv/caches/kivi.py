r"""KIVI: keys quantised per channel, values per token, the newest tokens in full precision; nothing is evicted.

    z = min,  s = (max - min) / (2^b - 1),  code = round(clamp((x - z) / s, 0, 2^b - 1)),  x^ = code * s + z

over groups of `group` consecutive tokens of one channel for keys (after the rotary embedding: keys have outlier channels)
and of `group` consecutive channels of one token for values. After N tokens the first N - (N mod residual) keys and the first
N - residual values are quantised, each once and for ever. A prompt absorbed at once attends to unquantised keys and values; a
later block attends to what is stored and to itself unquantised; then tokens move.

A group of equal values gets code 0 and s = 1 (the reference code divides by zero). s and z are kept in 16 bits.

Axes: B batch, G key/value heads, N tokens, D head width, E value width. Paper: arXiv:2402.02750. transformers' quantised
caches quantise everything again at each flush; here codes never change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from qkv.caches._stores.codecs import BITS
from qkv.caches._stores.packed import PackedCache
from qkv.core.cache import CacheMethod, CacheSpec, Geometry, LayerCache, require
from qkv.core.errors import Refused
from qkv.core.spec import Limit, param


def reference(
    keys: Tensor,
    values: Tensor,
    *,
    k_bits: int,
    v_bits: int,
    group: int,
    residual: int,
    stored: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """What the next token reads: keys ``[B, G, N, D]``, values ``[B, G, N, E]``, the older ones quantised and dequantised.

    stored: the dtype that s and z are rounded to, or None for no rounding.
    """
    keys, values, n = keys.clone(), values.clone(), keys.shape[2]
    for start in range(0, n - n % residual, group):
        block = keys[:, :, start : start + group]  # [B, G, group, D]
        keys[:, :, start : start + group] = _there_and_back(block.mT, k_bits, stored).mT
    for token in range(max(0, n - residual)):
        for c in range(0, values.shape[3], group):
            part = values[:, :, token, c : c + group]  # [B, G, group]
            values[:, :, token, c : c + group] = _there_and_back(part, v_bits, stored)
    return keys, values


def _there_and_back(x: Tensor, bits: int, stored: torch.dtype | None) -> Tensor:
    """Groups ``[..., group]`` quantised and dequantised."""
    if bits == 16:
        return x
    top = 2**bits - 1
    z = x.amin(-1, keepdim=True)
    s = (x.amax(-1, keepdim=True) - z) / top
    if stored is not None:
        z, s = z.to(stored).to(x.dtype), s.to(stored).to(x.dtype)
    code = ((x - z) / torch.where(s == 0, 1, s)).clamp(0, top).round()
    return torch.where(s == 0, 0, code) * torch.where(s == 0, 1, s) + z


@final
@dataclass(frozen=True, kw_only=True)
class KIVI(CacheMethod):
    """2-bit (or 4-, 8-bit) keys and values with a full-precision residual."""

    spec: ClassVar[CacheSpec] = CacheSpec(
        id="kivi",
        title="KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache",
        paper="arXiv:2402.02750",
        source="code",
        summary="Keys quantised per channel, values per token, the newest tokens in full precision.",
        shown="4 bits near lossless, 2 bits a small loss; quantising keys per token instead is far worse",
        honest="every token is still read at every step: it saves memory, and time only with a fused kernel",
        limits=(
            Limit("full", {"bits": 16}, "16 bits: nothing is quantised"),
            Limit("full", {"residual": 1 << 20}, "residual >= length: nothing is quantised"),
        ),
        evicts=False,
        trials=({}, {"bits": 4}),
        small={"group": 4, "residual": 8},
    )
    bits: int = param(2, "bits of an element (16: unchanged)", choices=BITS)
    k_bits: int | None = param(None, "bits of a key element, where they differ (None: as `bits`)")
    v_bits: int | None = param(None, "bits of a value element, where they differ (None: as `bits`)")
    group: int = param(32, "elements that share a scale and a zero", low=1)
    residual: int = param(128, "newest tokens kept in full precision; a multiple of group", low=1)

    def validate(self) -> None:
        """Whole groups leave the residual."""
        for name in ("k_bits", "v_bits"):
            value = getattr(self, name)
            require(value in (None, *BITS), f"kivi: {name}={value} must be one of {', '.join(map(str, BITS))}, or None")
        require(
            self.residual % self.group == 0,
            f"kivi: residual={self.residual} must be a multiple of group={self.group}, so that keys leave it in whole groups",
        )

    def fits(self, geometry: Geometry) -> str | None:
        """Values need whole groups of channels."""
        for name, width in (("head", geometry.head_dim), ("value", geometry.value_dim)):
            if width % self.group:
                return f"groups of {self.group} channels do not divide a {name} width of {width}; choose another group"
        return None

    def layer(self, geometry: Geometry) -> LayerCache:
        """See `CacheMethod.layer`."""
        reason = self.fits(geometry)
        if reason is not None:
            raise Refused(f"{self.id} at layer {geometry.layer}: {reason}")
        k_bits, v_bits = (self.bits if x is None else x for x in (self.k_bits, self.v_bits))
        return PackedCache(geometry, k_bits=k_bits, v_bits=v_bits, group=self.group, residual=self.residual)
