r"""Window: keep the newest tokens only. The plain baseline that shows why sinks and heavy hitters matter.

    kept after a step = { s : p_s > newest - budget }

A query attends to itself and at most `budget` tokens before it, whatever the chunking.

Axes: B batch, G key/value heads, N queries, S stored slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from qkv.core.cache import CacheSpec, Policy, View
from qkv.core.spec import Limit, budget_param


def reference(n: int, *, budget: int) -> Tensor:
    """The mask ``[N, N]``: query i sees key j if i - budget <= j <= i (one key more than is stored between steps)."""
    i, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
    return (j <= i) & (j >= i - budget)


@final
@dataclass(frozen=True, kw_only=True)
class Window(Policy):
    """The newest tokens."""

    spec: ClassVar[CacheSpec] = CacheSpec(
        id="window",
        title="Recent window",
        paper="baseline",
        source="baseline",
        summary="Keeps the newest tokens only: the baseline that loses the attention sink.",
        shown="perplexity breaks as soon as the first token leaves the window",
        honest="breaks pretrained models beyond its window; use streamingllm",
        limits=(Limit("full", {"budget": 1 << 20}, "budget >= length: exact attention"),),
        exact_chunks=True,
        by_position=True,
        slopes=True,
        small={"budget": 9},
    )
    budget: int | float = budget_param(1024)

    def chunk(self, keep: int) -> int:
        """Pieces of about the window, so that a long prompt never needs a mask of its own size squared."""
        return max(64, keep)

    def visible(self, query: Tensor, position: Tensor) -> Tensor | None:
        """A query's own window, so that a block sees what single steps would; the whole block where the budget is a share."""
        if isinstance(self.budget, float):
            return None
        return position.unsqueeze(2) >= query[:, None, :, None] - min(self.budget, 1 << 30)  # positions are int32

    def rank(self, state: Tensor | None, view: View) -> Tensor:
        """Newer is better."""
        return view.position.to(torch.float32)
