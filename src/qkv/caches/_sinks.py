"""The memory of heads that look at the beginning and nearby: the first tokens and a window, at their own positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from qkv.core.cache import CacheSpec, Policy, View
from qkv.core.spec import param


@final
@dataclass(frozen=True, kw_only=True)
class SinksAndRecent(Policy):
    """Sinks and recent tokens; a query sees key j if j < sinks or i - j < recent (its own token included)."""

    spec: ClassVar[CacheSpec] = CacheSpec(
        id="sinks-and-recent",
        title="Sinks and a recent window",
        paper="baseline",
        by_position=True,
        exact_chunks=True,
        slopes=True,
    )
    sinks: int = param(4, "first tokens kept for ever", low=0)
    recent: int = param(256, "recent tokens seen, the query's own included", low=1)
    masked: bool = param(True, "apply the window inside a block too (False: a block sees all of itself)")

    def slots(self, tokens: int) -> int:
        """The sinks and what the next token sees of the past."""
        return max(1, self.sinks + self.recent - 1)

    def chunk(self, keep: int) -> int | None:
        """Large enough to be few, small enough that a piece's mask stays small."""
        return max(1024, self.recent) if self.masked else None

    def visible(self, query: Tensor, position: Tensor) -> Tensor | None:
        """The sink-and-window mask."""
        if not self.masked:
            return None
        p, q = position.unsqueeze(2), query[:, None, :, None]
        return (p < self.sinks) | (p > q - self.recent)

    def protected(self) -> int:
        """The sinks."""
        return self.sinks

    def rank(self, state: Tensor | None, view: View) -> Tensor:
        """Sinks first, then the newest."""
        position = view.position.to(torch.float32)
        return position.masked_fill(view.position < self.sinks, torch.inf)
