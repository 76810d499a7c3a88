r"""H2O: keep the newest tokens and the heavy hitters, those that have drawn most attention so far.

    a_s = sum_t A[t, s]   over every query t seen while token s was stored, summed over the query heads of a KV head

After a call the newest `recent` share of the budget stays, and of the others those with the largest a. Greedy and permanent;
each KV head keeps a set of its own, all of one size.

Axes: B batch, H query heads, G key/value heads, S stored slots. Paper: arXiv:2306.14048. Its code sums scores over the batch
and asserts one row; here each row has its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from qkv.caches._common import in_cache_shift
from qkv.core.cache import CacheSpec, Geometry, Policy, View, needs_rope
from qkv.core.spec import Limit, budget_param, param


def reference(attention: Tensor) -> Tensor:
    """Definition of the score from the whole map ``[B, H, N, S]``: ``[B, H, S]``."""
    return attention.sum(dim=-2)


@final
@dataclass(frozen=True, kw_only=True)
class H2O(Policy):
    """Split the budget between a recent window and the all-time most attended slots."""

    spec: ClassVar[CacheSpec] = CacheSpec(
        id="h2o",
        title="H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
        paper="arXiv:2306.14048",
        source="code",
        summary="Keeps recent tokens and those with the largest accumulated attention, per KV head.",
        shown="at a 20 % budget far closer to the full model than a 20 % window",
        honest="scores ignore the coming question: a needle is kept only if it drew attention before",
        limits=(Limit("full", {"budget": 1.0}, "budget >= length: exact attention"),),
        slot_state=1,
        trials=({}, {"positions": "cache"}, {"recent": 0.0, "group_reduce": "max", "normalize": True}),
        slopes=True,
        small={"budget": 9},
    )
    budget: int | float = budget_param(0.2)
    recent: float = param(0.5, "share of the budget for the newest tokens", low=0.0, high=1.0)
    positions: Literal["original", "cache"] = param(
        "original", "what a position means: the place in the text, or in the cache"
    )
    group_reduce: Literal["sum", "mean", "max"] = param("sum", "how the query heads of a KV head combine")
    normalize: bool = param(False, "divide a score by the number of queries that could see the token")

    def mass_queries(self, new: int) -> int:
        """Every query counts."""
        return new

    def observe(self, state: Tensor | None, view: View) -> Tensor:
        """A running total per slot, so no attention map outlives its call."""
        assert state is not None and view.mass is not None
        return state + view.per_group(view.mass, self.group_reduce).unsqueeze(-1)

    def rank(self, state: Tensor | None, view: View) -> Tensor:
        """The recent window first, then the score."""
        assert state is not None
        score = state.squeeze(-1)
        if self.normalize:
            score = score / (view.newest - view.position + 1).clamp(min=1)
        recent = (view.keep * self.recent).floor().to(view.position.dtype)
        return score.masked_fill(view.position > view.newest - recent, torch.inf)

    def settles(self) -> dict[str, Any] | None:
        """The same total and rank."""
        return {"reduce": self.group_reduce, "recent": self.recent, "normalize": self.normalize}

    def shift(self, view: View) -> Tensor | None:
        """In-cache positions: every kept key moves up behind its predecessor."""
        return in_cache_shift(view) if self.positions == "cache" else None

    def fits(self, geometry: Geometry) -> str | None:
        """In-cache positions need a rotary embedding with fixed frequencies."""
        return needs_rope(geometry, "positions='cache'") if self.positions == "cache" else None
