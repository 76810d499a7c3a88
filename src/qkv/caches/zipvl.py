r"""ZipVL: each layer decides from its attention how many tokens matter; the prompt attends among these, the cache favours them.

    A = softmax(scale q_P K^T, causal) over probe rows P, a_m = mean_h sum_{p in P} A[h, p, m]
    p = min { n : the n largest a sum to at least tau * sum_m a_m }        how many, by mass
    S = the p largest a_m / #{p in P : p >= m}                             which, by normalised mass

One p and one S per row and layer, shared by its heads. P are the newest `probes[0]` queries of the prompt and `probes[1]` others,
drawn with `seed`; the newest probes themselves are always in S (p is at least their number). Prefill: attention runs among the
tokens of S, in order, with the causal mask; the other tokens get output 0 and go on by residual and MLP alone. With
`dense_queries` all queries attend, to the keys of S. Cache: S in `bits[0]` bits, the rest in `bits[1]`, packed once as ZipCache
does (keys per channel, values channel-separable per token), or with mode="evict" the rest is dropped. Decoding reads all that
is stored; new tokens wait in full precision until `regroup_every` of them are split by the same rule (from a tenth of their
queries, as in ZipCache) into a block of their own.

The selection looks at the whole prompt, so a token of the prompt is no longer independent of later ones: perplexity has to be
measured on a continuation. A prompt in pieces is split piece by piece: a piece sees all that is stored and its own S. In
encoders, which keep no cache, the same choice is the operator `zipvl-tokens`.

Completed from the abstract and the page: zero output outside S, the newest probes in S, tau and the number of probes, blocks of
decoded tokens.

Axes: B batch, H query heads, N tokens, P probes. Paper: arXiv:2410.08584 (no code published).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from qkv.caches._stores.codecs import BITS
from qkv.caches._stores.mixed import Block, MixedCache
from qkv.core.attend import causal_mask
from qkv.core.cache import CacheMethod, CacheSpec, Geometry, LayerCache, require
from qkv.core.errors import InvalidInput, InvalidParameter
from qkv.core.spec import Deviation, Limit, param


def reference(
    q: Tensor, k: Tensor, v: Tensor, *, important: Tensor, dense_queries: bool = False, scale: float | None = None
) -> Tensor:
    """Prefill among the `important` tokens (bool ``[N]``): dense attention with the other columns (and rows) masked.

    q ``[B, H, N, D]``, k ``[B, G, N, D]``, v ``[B, G, N, E]``; returns ``[B, H, N, E]``, 0 for queries without a key.
    """
    h, n, g = q.shape[1], q.shape[2], k.shape[1]
    k, v = k.repeat_interleave(h // g, 1), v.repeat_interleave(h // g, 1)
    mask = causal_mask(n, n, q.device) & important
    if not dense_queries:
        mask = mask & important[:, None]
    logits = (q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)).masked_fill(~mask, -torch.inf)
    return torch.nan_to_num(logits.softmax(-1)) @ v


def dynamic_ratio(scores: Tensor, tau: float) -> Tensor:
    """The size of the smallest set of tokens that draws at least the share `tau` of all attention: int64 ``[...]``.

    scores: ``[..., N]``, not negative. tau = 1 gives N. Raises `InvalidParameter` for a tau outside (0, 1] and `InvalidInput` for
    negative or empty scores.
    """
    if not 0 < tau <= 1:
        raise InvalidParameter(f"tau={tau} must lie in (0, 1]")
    if scores.shape[-1] == 0 or bool((scores < 0).any()):
        raise InvalidInput(f"expected scores [..., N] that are not negative, got {tuple(scores.shape)}")
    n = scores.shape[-1]
    if tau == 1:
        return torch.full(scores.shape[:-1], n, device=scores.device)
    reached = scores.double().sort(-1, descending=True).values.cumsum(-1)
    short = reached < tau * reached[..., -1:] * (1 - 1e-12)  # sums round
    return (short.sum(-1) + 1).clamp(max=n)


@final
@dataclass(frozen=True, kw_only=True)
class ZipVL(CacheMethod):
    """A number of important tokens per layer, from its attention: sparse prefill, mixed precision or eviction."""

    spec: ClassVar[CacheSpec] = CacheSpec(
        id="zipvl",
        title="ZipVL: Efficient Large Vision-Language Models with Dynamic Token Sparsification and KV Cache Compression",
        paper="arXiv:2410.08584",
        source="abstract",
        summary="Each layer keeps as many tokens precise as hold a share tau of its attention; the prompt attends among these.",
        shown="the share of important tokens differs by layer and grows with tau; keeping the least important is far worse",
        honest="tokens outside the set get no attention output in that layer, and the set is chosen before the question is known",
        limits=(Limit("full", {"tau": 1.0, "bits": 16}, "every token is important, and none quantised"),),
        deviations=(
            Deviation(
                "eight_bits_are_close", "prompt tokens outside the important set get no attention output, at any bits"
            ),
        ),
        evicts=False,
        trials=({}, {"dense_queries": True}),
        small={"regroup_every": 8, "probes": (3, 3)},
    )
    tau: float = param(0.975, "share of a layer's attention that its important tokens draw, above 0", low=0.0, high=1.0)
    probes: tuple[int, ...] = param((64, 64), "newest and other queries of a prompt that judge its tokens", low=0)
    bits: int | tuple[int, ...] = param(
        (4, 2), "bits of an important and of another token (one number: both)", choices=BITS
    )
    mode: Literal["quantize", "evict"] = param("quantize", "what becomes of the other tokens: fewer bits, or dropped")
    dense_queries: bool = param(False, "all queries of a prompt attend, to the important keys")
    regroup_every: int = param(100, "new tokens that wait unquantised until they become a block", low=1)
    seed: int = param(0, "of the probes that are drawn", low=0)

    def validate(self) -> None:
        """Somebody judges, and there is something to reach."""
        require(self.tau > 0, f"zipvl: tau={self.tau} must lie in (0, 1]")
        require(
            len(self.probes) == 2 and self.probes[0] > 0,
            f"zipvl: probes={self.probes} must be two numbers (newest, others) with at least one newest query",
        )
        require(
            isinstance(self.bits, int) or len(self.bits) == 2,
            f"zipvl: bits={self.bits!r} must be one number, or two (important, other)",
        )

    def layer(self, geometry: Geometry) -> LayerCache:
        """See `CacheMethod.layer`."""
        high, low = (self.bits, self.bits) if isinstance(self.bits, int) else self.bits
        return MixedCache(
            self,
            geometry,
            bits=(high, 0 if self.mode == "evict" else low),
            every=self.regroup_every,
            seed=self.seed,
            sparse="keys" if self.dense_queries else "tokens",
        )

    def probes_of(self, tokens: int, decoded: bool) -> tuple[int, int]:
        """See `Splits.probes_of`: those of a prompt, and at most a tenth of the tokens of a block that decoding fills."""
        recent, others = self.probes
        if decoded:
            recent, others = min(recent, math.ceil(tokens / 20)), min(others, math.ceil(tokens / 20))
        recent = min(recent, tokens)
        return recent, min(others, tokens - recent)

    def split(self, block: Block) -> tuple[Tensor, list[int]]:
        """See `Splits.split`: how many by mass, which by normalised mass."""
        drawn, width = block.mass.mean(1), block.mass.shape[2]
        recent = self.probes_of(width, block.decoded)[0]
        counts = dynamic_ratio(drawn, self.tau).clamp(min=recent)
        score = drawn / block.seen
        score[:, width - recent :] = torch.inf
        rank = score.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        return (rank < counts[:, None]).unsqueeze(1), counts.tolist()
