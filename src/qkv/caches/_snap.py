r"""Policies that compress a prompt by what its last queries look at (SnapKV and its kin): everything but the spec.

Axes: B batch, H query heads, G key/value heads, N queries, S stored slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qkv.caches._common import pooled, recent
from qkv.core.cache import NO_LIMIT, Geometry, Policy, View, require
from qkv.core.spec import budget_param, param


@dataclass(frozen=True, kw_only=True)
class Snap(Policy):
    """Observation window, pooling, eviction at the end of a prompt."""

    budget: int | float = budget_param(0.2)
    window: int = param(32, "newest tokens of the prompt that are kept and whose queries choose", low=1)
    kernel: int = param(5, "neighbouring tokens that share their scores; odd, 1 = none", low=1)
    pooling: Literal["max", "avg"] = param("max", "how neighbours share: their largest score or their mean")
    group_reduce: Literal["sum", "mean", "max"] = param("mean", "how the query heads of a KV head combine")
    decode: Literal["grow", "evict"] = param(
        "grow", "decoded tokens are appended until the next block, or every step evicts"
    )

    def validate(self) -> None:
        """The window leaves room, and a window of neighbours has a centre."""
        require(self.kernel % 2 == 1, f"{self.id}: kernel={self.kernel} must be odd, so that it has a centre")
        require(
            isinstance(self.budget, float) or self.budget > self.window,
            f"{self.id}: budget={self.budget} leaves nothing beside window={self.window}; raise the budget or lower the window",
        )

    def width(self, geometry: Geometry) -> int:
        """Running sums, where every step evicts."""
        return int(self.decode == "evict")

    def lag(self) -> int:
        """Decoded tokens stay, or not."""
        return NO_LIMIT if self.decode == "grow" else 0

    def whole_prompt(self) -> bool:
        """The last queries of the whole prompt choose."""
        return True

    def mass_queries(self, new: int) -> int:
        """The observation window."""
        return min(new, self.window)

    def score(self, view: View) -> Tensor:
        """The pooled scores ``[B, G, S]`` of this block's observation window; 0 for the window itself."""
        assert view.mass is not None
        drawn = view.per_group(view.mass, self.group_reduce).masked_fill(recent(view, self.window), 0)
        return pooled(drawn, view.position, self.kernel, self.pooling)

    def observe(self, state: Tensor | None, view: View) -> Tensor | None:
        """Where every step evicts, the scores go on as running sums."""
        if state is None or view.mass is None:
            return state
        if view.queries.shape[2] == 1:
            return state + view.per_group(view.mass, self.group_reduce).unsqueeze(-1)
        return self.score(view).unsqueeze(-1).to(state.dtype)

    def rank(self, state: Tensor | None, view: View) -> Tensor:
        """The window first, then the score."""
        score = self.score(view) if state is None else state.squeeze(-1)
        return score.masked_fill(recent(view, self.window), torch.inf)
