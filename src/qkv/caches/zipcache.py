r"""ZipCache: salient tokens in more bits than the others; nothing is evicted.

    A = softmax(scale q_P K^T, causal) over probe rows P,   score_m = sum_{p in P} A[p, m] / #{p in P : p >= m}

per KV head, summed over its query heads. The `salient_ratio` with the largest score get `bits[0]` bits, the others `bits[1]`.
Keys are quantised per channel over all tokens of a part; values are first divided by c_e = sqrt(max_m |v_me|) (over all tokens),
then quantised per token, one range over the channels of all heads (channel-separable, token-wise). Both after the rotary
embedding, from the attention's own float values; a prompt attends to them unquantised.

After a call the tokens not yet in a block become one when there are at least `regroup_every` of them: the whole prompt, then
every `regroup_every` decoded tokens. The newest half of the probes are the block's last queries, the others are drawn from the
rest with `seed`.

Where this differs from the paper's code: a block's parameters are per batch row; the score divides by the number of probes
that could see a token (the code divides by all rows that could); decoded tokens form a new block instead of quantising
everything again, so no token is quantised twice; a prompt shorter than `regroup_every` waits.

Axes: B batch, G key/value heads, N tokens, P probes, D head width, E value width. Paper: arXiv:2405.14256.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from qkv.caches._saliency import normalized_saliency
from qkv.caches._stores.codecs import BITS, channel_quantize, cst_quantize
from qkv.caches._stores.mixed import Block, MixedCache
from qkv.core.cache import CacheMethod, CacheSpec, Geometry, LayerCache, require
from qkv.core.spec import Limit, param

__all__ = ["ZipCache", "channel_quantize", "cst_quantize", "normalized_saliency", "reference"]


def reference(
    keys: Tensor,
    values: Tensor,
    score: Tensor,
    *,
    bits: tuple[int, int],
    salient: int,
    stored: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """What is read of a block: keys ``[1, G, N, D]``, values ``[1, G, N, E]``, quantised and dequantised, in order.

    score: ``[1, G, N]``; salient: how many tokens of each head get ``bits[0]``. stored: the dtype that ranges are rounded to, or
    None. The i-th tokens of a part share a range of values over the heads, whichever tokens these are.
    """
    heads, n = keys.shape[1], keys.shape[2]
    new_k, new_v = keys.clone(), values.clone()
    c = values.abs().amax(2).sqrt()  # [1, G, E]
    c = c if stored is None else c.to(stored).to(values.dtype)
    c = torch.where(c == 0, 1, c)
    ranked = [sorted(range(n), key=lambda m, g=g: -float(score[0, g, m])) for g in range(heads)]
    for b, a, z in ((bits[0], 0, salient), (bits[1], salient, n)):
        if a == z:
            continue
        part = [sorted(order[a:z]) for order in ranked]  # tokens of each head, in order
        for g, tokens in enumerate(part):
            for d in range(keys.shape[3]):
                new_k[0, g, tokens, d] = _there_and_back(keys[0, g, tokens, d], b, stored)
        for i in range(z - a):
            together = torch.cat([values[0, g, part[g][i]] / c[0, g] for g in range(heads)])
            back = _there_and_back(together, b, stored).view(heads, -1)
            for g in range(heads):
                new_v[0, g, part[g][i]] = back[g] * c[0, g] if b < 16 else values[0, g, part[g][i]]
    return new_k, new_v


def _there_and_back(x: Tensor, bits: int, stored: torch.dtype | None) -> Tensor:
    """One group, quantised and dequantised."""
    if bits == 16:
        return x
    z = x.min()
    s = (x.max() - z) / (2**bits - 1)
    if stored is not None:
        z, s = z.to(stored).to(x.dtype), s.to(stored).to(x.dtype)
    if s == 0:
        return z.expand_as(x)
    return ((x - z) / s).clamp(0, 2**bits - 1).round() * s + z


@final
@dataclass(frozen=True, kw_only=True)
class ZipCache(CacheMethod):
    """Mixed-precision keys and values, by normalised saliency."""

    spec: ClassVar[CacheSpec] = CacheSpec(
        id="zipcache",
        title="ZipCache: Accurate and Efficient KV Cache Quantization with Salient Token Identification",
        paper="arXiv:2405.14256",
        source="code",
        summary="Salient tokens in 4 bits, the others in 2, by attention from a few probe queries over what could see a token.",
        shown="perplexity between 16 bits and uniform 2 bits; giving the bits to the least salient tokens instead is worse",
        honest="every token is still read at every step; saliency is judged before the coming question is known",
        limits=(
            Limit("full", {"bits": 16}, "16 bits: nothing is quantised"),
            Limit("full", {"regroup_every": 1 << 20}, "no block is ever full: nothing is quantised"),
        ),
        evicts=False,
        trials=({}, {"bits": 4}, {"salient_ratio": 0.3, "normalize": False}),
        small={"regroup_every": 8, "probe_ratio": 0.5},
    )
    bits: int | tuple[int, ...] = param(
        (4, 2), "bits of a salient and of another token (one number: of all)", choices=BITS
    )
    salient_ratio: float = param(0.6, "share of a block's tokens that are salient", low=0.0, high=1.0)
    probe_ratio: float = param(
        0.1, "share of the queries that judge saliency, half of them the newest", low=0.0, high=1.0
    )
    regroup_every: int = param(100, "tokens that wait unquantised until they become a block", low=1)
    normalize: bool = param(True, "divide a token's attention by the number of probes that could see it")
    seed: int = param(0, "of the random half of the probes", low=0)

    def validate(self) -> None:
        """Two widths, or one; somebody judges."""
        require(
            isinstance(self.bits, int) or len(self.bits) == 2,
            f"zipcache: bits={self.bits!r} must be one number, or two (salient, other)",
        )
        require(
            self.probe_ratio > 0,
            "zipcache: probe_ratio=0 leaves no query to judge saliency; use bits=4 for uniform bits",
        )

    def layer(self, geometry: Geometry) -> LayerCache:
        """See `CacheMethod.layer`."""
        high, low = (self.bits, self.bits) if isinstance(self.bits, int) else self.bits
        if self.salient_ratio == 1:
            low = high
        elif self.salient_ratio == 0:
            high = low
        return MixedCache(self, geometry, bits=(high, low), every=self.regroup_every, seed=self.seed)

    def probes_of(self, tokens: int, decoded: bool) -> tuple[int, int]:
        """See `Splits.probes_of`."""
        recent = math.ceil(tokens * self.probe_ratio / 2)
        return recent, min(tokens, math.ceil(tokens * self.probe_ratio)) - recent

    def split(self, block: Block) -> tuple[Tensor, list[int]]:
        """The most salient tokens of each KV head."""
        (rows, heads, width), groups = block.mass.shape, block.keys.shape[1]
        score = block.mass.view(rows, groups, heads // groups, width).sum(2)
        if self.normalize:
            score = score / block.seen
        count = int(self.salient_ratio * width + 0.5)
        flags = torch.zeros_like(score, dtype=torch.bool)
        return flags.scatter(-1, score.topk(count, dim=-1).indices, True), [count] * rows
