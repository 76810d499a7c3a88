r"""SnapKV: the last queries of the prompt choose what is kept of it; what is decoded is appended.

    a_s = pool( sum_{t in the last w queries} A[t, s] ),   reduced over the query heads of a KV head

The last w tokens of the prompt stay, and of the others those with the largest a; pool is a maximum or a mean over `kernel`
neighbours, so that what surrounds a hit stays with it. Evicted once, when the prompt ends, also when it comes in pieces; a
later block (the next turn, a question) is a prompt again. With ``decode="evict"`` every step evicts: the scores go on as
running sums, the newest w tokens stay.

Axes: B batch, H query heads, G key/value heads, N queries, S stored slots. Paper: arXiv:2404.14469 (algorithm of listing 1).
Its code expands keys to all query heads first; here each KV head keeps one set. A share of a short prompt that is smaller
than the window is split in halves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from qkv.caches._snap import Snap
from qkv.core.cache import CacheSpec
from qkv.core.spec import Limit


def reference(attention: Tensor, *, window: int, kernel: int, pooling: str, budget: int) -> list[int]:
    """Positions kept of a prompt of M tokens, from the map ``[R, M, M]`` of the query heads of one KV head."""
    m = attention.shape[-1]
    drawn = attention[:, m - window :, : m - window].sum((0, 1)).tolist()
    half = kernel // 2
    scores = []
    for s in range(m - window):
        near = [drawn[j] if 0 <= j < m - window else 0.0 for j in range(s - half, s + half + 1)]
        scores.append(max(near) if pooling == "max" else sum(near) / kernel)
    best = sorted(range(m - window), key=lambda s: (-scores[s], -s))[: max(0, budget - window)]
    return sorted([*best, *range(m - window, m)])


@final
@dataclass(frozen=True, kw_only=True)
class SnapKV(Snap):
    """Compress the prompt by what its last queries look at."""

    spec: ClassVar[CacheSpec] = CacheSpec(
        id="snapkv",
        title="SnapKV: LLM Knows What You are Looking for Before Generation",
        paper="arXiv:2404.14469",
        source="paper",
        summary="Keeps what the last queries of the prompt attend to, with its neighbours, and appends what is decoded.",
        shown="a needle survives 20 % when the question ends the prompt, and is mostly lost when it comes later",
        honest="it keeps what the end of the prompt asks for; a question that comes later finds what an earlier one left",
        limits=(Limit("full", {"budget": 1.0}, "budget >= prompt: exact attention"),),
        trials=({}, {"pooling": "avg", "kernel": 7, "group_reduce": "max"}, {"decode": "evict"}),
        slopes=True,
        small={"budget": 9, "window": 4, "kernel": 3},
    )
