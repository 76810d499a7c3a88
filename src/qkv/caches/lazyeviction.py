r"""LazyEviction: tokens that come back are kept for as long as they are usually silent; eviction waits and sees.

    when query t gives token i attention >= alpha:   MRI_i = max(MRI_i, t - TS_i),   TS_i = t
    worth_i = 2 sigmoid(-r_i),   r_i = (t - TS_i) / (MRI_i + 1)

TS is the last step at which a token mattered (its birth, at first), MRI the longest silence after which it mattered again. A row
may exceed its budget by up to window - 1 decoded tokens; then it is cut down to it at once: the newest `window` and the first
`sinks` tokens stay, and of the others those with the largest worth, then the largest MRI, then the newest.

Axes: B batch, H query heads, G key/value heads, R observed queries, S stored slots. Paper: arXiv:2506.15969. Completed from
its abstract: the form of the worth, alpha relative to the number of stored tokens (a fixed one triggers more often over fewer
tokens), the reduction over query heads, the sinks, and the prompt: its last `window` queries are replayed as steps, and a
token older than the first of them counts from there. Cuts are counted from the moment a row exceeds its budget, not in
multiples of the step, so that rows of different lengths do what they do alone. With `protect_prompt` the budget is beside the
prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from qkv.caches._common import by_keys, recent
from qkv.core.cache import CacheSpec, Geometry, Policy, View, require
from qkv.core.spec import Limit, budget_param, param

FLOOR = 1e-4
"""The relative threshold is never lower."""


def reference(attention: Tensor, alpha: float) -> tuple[list[int], list[int]]:
    """(TS, MRI) of each token after a trace ``[N, M]``: query t, the (M - N + t)-th token, attends to the tokens so far."""
    n, m = attention.shape
    last, gap = [m - n] * (m - n) + [0] * n, [0] * m
    for t, row in enumerate(attention.tolist(), start=m - n):
        last[t] = t
        for i in range(t + 1):
            if row[i] >= alpha:
                gap[i], last[i] = max(gap[i], t - last[i]), t
    return last, gap


def recurrence_intervals(attention: Tensor, alpha: float) -> Tensor:
    """The longest silence after which each token mattered again: MRI ``[M]`` from a trace ``[N, M]`` of decoding steps."""
    n, m = attention.shape
    steps = torch.arange(m - n, m, device=attention.device)
    last, gap = torch.arange(m, device=attention.device).clamp(min=m - n), attention.new_zeros(m, dtype=torch.int64)
    for t, row in zip(steps.tolist(), attention, strict=True):
        hit = (row >= alpha) & (torch.arange(m, device=row.device) <= t)
        gap = torch.where(hit, torch.maximum(gap, t - last), gap)
        last = torch.where(hit, t, last)
    return gap


@final
@dataclass(frozen=True, kw_only=True)
class LazyEviction(Policy):
    """Evict in batches what has been silent for long by its own rhythm."""

    spec: ClassVar[CacheSpec] = CacheSpec(
        id="lazyeviction",
        title="LazyEviction: Lagged KV Eviction with Attention Pattern Observation for Efficient Long Reasoning",
        paper="arXiv:2506.15969",
        source="abstract",
        summary="Waits a window of steps, then evicts the tokens that have been silent longest by their own rhythm.",
        shown="half of the cache costs little: as close to the full model as H2O, far closer than a window of that size",
        honest="up to window - 1 tokens above the budget; where all of a text recurs (filler), a rare fact loses its place",
        limits=(Limit("full", {"budget": 1.0}, "budget >= length: exact attention"),),
        slot_state=2,
        trials=({}, {"alpha": 0.05, "group_reduce": "mean"}, {"protect_prompt": True}),
        slopes=True,
        small={"budget": 9, "window": 3, "sinks": 2},
    )
    budget: int | float = budget_param(0.5)
    window: int = param(25, "steps that eviction waits for, and newest tokens that always stay", low=1)
    sinks: int = param(4, "first tokens that always stay", low=0)
    alpha: float | None = param(
        None, "attention that counts as importance; None: 1 / stored tokens, at least 1e-4", low=0.0
    )
    group_reduce: Literal["max", "mean"] = param("max", "how the query heads of a KV head combine")
    protect_prompt: bool = param(False, "never evict prompt tokens; the budget is then for decoded ones")

    def validate(self) -> None:
        """Something is left to choose, and something is unimportant."""
        require(self.alpha is None or self.alpha > 0, f"{self.id}: alpha={self.alpha} must be above 0, or None")
        require(
            isinstance(self.budget, float) or self.budget > self.window + self.sinks,
            f"{self.id}: budget={self.budget} leaves nothing beside window={self.window} and sinks={self.sinks}; raise the "
            "budget or lower them",
        )

    def slots(self, tokens: int) -> int:
        """The budget, beside the prompt where that is protected."""
        return super().slots(tokens) + (tokens if self.protect_prompt else 0)

    def width(self, geometry: Geometry) -> int:
        """TS + 1 (0: not seen yet), MRI, and whether it is a prompt token."""
        return 3 if self.protect_prompt else 2

    def lag(self) -> int:
        """The cache may exceed its budget until a window is full."""
        return self.window - 1

    def whole_prompt(self) -> bool:
        """The last queries of the whole prompt are replayed."""
        return True

    def row_queries(self, new: int) -> int:
        """The window."""
        return min(new, self.window)

    def observe(self, state: Tensor | None, view: View) -> Tensor:
        """One step of the state for every observed query, in order."""
        assert state is not None and view.rows is not None and view.asked is not None
        last, gap, *rest = state.unbind(-1)
        if rest and view.queries.shape[2] > 1:
            rest = [torch.where((last == 0) & (view.position >= 0), 1.0, rest[0])]
        for i in range(view.asked.shape[1]):
            now = view.asked[:, i, None, None]  # [B, 1, 1]
            there = (view.position >= 0) & (view.position <= now)
            last = torch.where((last == 0) & there, now + 1.0, last)
            drawn = view.per_group(view.rows[:, :, i], self.group_reduce)
            hit = there & (drawn >= self._threshold(there))
            gap = torch.where(hit, torch.maximum(gap, now + 1.0 - last), gap)
            last = torch.where(hit, now + 1.0, last)
        return torch.stack((last, gap, *rest), -1)

    def _threshold(self, there: Tensor) -> Tensor | float:
        if self.alpha is not None:
            return self.alpha
        return (1.0 / there.sum(-1, keepdim=True).clamp(min=1)).clamp(min=FLOOR)

    def rank(self, state: Tensor | None, view: View) -> Tensor:
        """Sinks, the window and what is protected first; then by silence in units of the token's own rhythm."""
        assert state is not None
        last, gap, *rest = state.unbind(-1)
        silence = (view.newest + 1.0 - last) / (gap + 1)
        worth = by_keys(view.position, -silence, gap)
        stays = recent(view, self.window) | ((view.position >= 0) & (view.position < self.sinks))
        return worth.masked_fill(stays | (rest[0] > 0) if rest else stays, torch.inf)
