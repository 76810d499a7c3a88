r"""StreamingLLM: keep the first tokens (attention sinks) and a window of recent ones; the model runs on endless streams.

    kept after a step = { s : p_s < sinks }  u  { s : p_s > newest - window }

With ``positions="cache"`` a key's position is its place in the cache, so no distance ever exceeds sinks + window. Only
distances matter to a rotary embedding: instead of rotating every key anew, the few sinks are moved forward by the number of
tokens evicted since; queries and the window keep their text positions. Blocks longer than window - sinks are absorbed in
pieces of that size; within a piece a query attends to the sinks, the kept window and the piece. With
``positions="original"`` a query attends to the sinks and to at most `window` tokens before itself: the sink-and-window
mask, exact for any chunking, valid inside the trained length.

A decoding step attends to budget + 1 keys, as in the paper: it evicts after the step.

Axes: B batch, G key/value heads, N queries, S stored slots. Paper: arXiv:2309.17453 (its code stores unrotated keys; the
result is the same).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from qkv.core.cache import CacheSpec, Geometry, Policy, View, needs_rope
from qkv.core.spec import Limit, param


def reference(n: int, *, sinks: int, window: int) -> Tensor:
    """The mask ``[N, N]`` of ``positions="original"``: query i sees key j if j < sinks or i - window <= j <= i."""
    i, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
    return (j <= i) & ((j < sinks) | (j >= i - window))


@final
@dataclass(frozen=True, kw_only=True)
class StreamingLLM(Policy):
    """Attention sinks and a recent window, with positions counted in the cache."""

    spec: ClassVar[CacheSpec] = CacheSpec(
        id="streamingllm",
        title="Efficient Streaming Language Models with Attention Sinks",
        paper="arXiv:2309.17453",
        source="code",
        summary="Keeps the first tokens and a recent window, re-positioned inside the cache: endless streams, constant memory.",
        shown="perplexity stays flat beyond the window, where a window without sinks breaks",
        honest="whatever left the window is gone: a needle outside it is not found",
        limits=(Limit("full", {"window": 1 << 20}, "sinks + window >= length: exact attention"),),
        by_position=True,
        trials=({}, {"positions": "original"}),
        slopes=True,
        small={"sinks": 2, "window": 7},
    )
    sinks: int = param(4, "first tokens kept for ever", low=0)
    window: int = param(1020, "recent tokens kept", low=1)
    positions: Literal["cache", "original"] = param(
        "cache", "what a position means: the place in the cache, or in the text"
    )

    def slots(self, tokens: int) -> int:
        """The first tokens and the window."""
        return self.sinks + self.window

    def chunk(self, keep: int) -> int:
        """Pieces small enough that the cache and the piece stay within twice the window."""
        return max(1, self.window - self.sinks) if self.positions == "cache" else max(64, self.window)

    def visible(self, query: Tensor, position: Tensor) -> Tensor | None:
        """The sink-and-window mask, for text positions."""
        if self.positions == "cache":
            return None
        p, q = position.unsqueeze(2), query[:, None, :, None]
        return (p < self.sinks) | (p >= q - self.window)

    def shift(self, view: View) -> Tensor | None:
        """Sinks move forward by what was evicted between them and the window."""
        if self.positions == "original":
            return None
        evicted = view.newest + 1 - (view.position >= 0).sum(-1, keepdim=True)
        return torch.where(self._sink(view), evicted, 0)

    def moving(self, view: View) -> tuple[Tensor, int]:
        """Only the sinks move."""
        return self._sink(view), self.sinks

    def mover_shift(self, newest: Tensor, slots: int) -> Tensor | None:
        """All movers are sinks."""
        return newest + 1 - slots if self.positions == "cache" else None

    def _sink(self, view: View) -> Tensor:
        return (view.position >= 0) & (view.position < self.sinks)

    def protected(self) -> int:
        """The sinks."""
        return self.sinks

    def rank(self, state: Tensor | None, view: View) -> Tensor:
        """Sinks first, then the newest."""
        position = view.position.to(torch.float32)
        return position.masked_fill(view.position < self.sinks, torch.inf)

    def fits(self, geometry: Geometry) -> str | None:
        """In-cache positions need a rotary embedding with fixed frequencies."""
        return needs_rope(geometry, "positions='cache'") if self.positions == "cache" else None
