r"""Key norm: keep the tokens whose keys are short; needs no attention at all.

    worth_s = -||k_s||_2

In pretrained decoders keys of small norm draw most attention (sinks among them). The norm of a key does not change when it is
rotated, so it is taken once, when the token comes.

Axes: B batch, G key/value heads, S stored slots, D head width. Paper: arXiv:2406.11430 (a simple and effective L2 norm-based
strategy). Its code leaves the first two layers whole: give `where` the others for that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from qkv.core.cache import NO_LIMIT, CacheSpec, Policy, View, require
from qkv.core.spec import Limit, budget_param, param


def reference(keys: Tensor, budget: int) -> list[int]:
    """Positions kept of keys ``[M, D]`` absorbed at once: the newest and the shortest."""
    norms = keys.norm(dim=-1).tolist()
    last = len(norms) - 1
    return sorted([last, *sorted(range(last), key=lambda s: norms[s])[: budget - 1]])


@final
@dataclass(frozen=True, kw_only=True)
class KNorm(Policy):
    """Keep the shortest keys."""

    spec: ClassVar[CacheSpec] = CacheSpec(
        id="knorm",
        title="A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression",
        paper="arXiv:2406.11430",
        source="paper",
        summary="Keeps the tokens whose keys have the smallest norm; looks at no attention.",
        shown="keeping the shortest keys is far better than keeping the longest",
        honest="a norm knows neither the question nor the recent past: other scores do better at small budgets",
        limits=(Limit("full", {"budget": 1.0}, "budget >= length: exact attention"),),
        slot_state=1,
        trials=({}, {"decode": "grow"}, {"recent": 3}),
        slopes=True,
        small={"budget": 9},
    )
    budget: int | float = budget_param(0.2)
    recent: int = param(0, "newest tokens kept whatever their norm", low=0)
    decode: Literal["evict", "grow"] = param(
        "evict", "every step evicts, or decoded tokens are appended until the next block"
    )

    def validate(self) -> None:
        """The newest tokens leave room."""
        require(
            isinstance(self.budget, float) or self.budget > self.recent,
            f"{self.id}: budget={self.budget} leaves nothing beside recent={self.recent}; raise the budget or lower recent",
        )

    def lag(self) -> int:
        """Decoded tokens stay, or not."""
        return NO_LIMIT if self.decode == "grow" else 0

    def observe(self, state: Tensor | None, view: View) -> Tensor:
        """The norm of every new key."""
        assert state is not None
        if view.queries.shape[2] > 1:
            return view.keys.to(torch.float32).norm(dim=-1, keepdim=True)
        new = view.position.argmax(-1, keepdim=True).unsqueeze(-1)  # [B, G, 1, 1]
        norm = (
            view.keys.gather(2, new.expand(-1, -1, -1, view.keys.shape[3])).to(torch.float32).norm(dim=-1, keepdim=True)
        )
        return state.scatter(2, new, norm)

    def rank(self, state: Tensor | None, view: View) -> Tensor:
        """Shorter is better."""
        assert state is not None
        return (-state.squeeze(-1)).masked_fill(view.position > view.newest - self.recent, torch.inf)
