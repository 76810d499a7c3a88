r"""Ada-KV: the slots of a layer shared out among its KV heads by the scores themselves, instead of as many for each.

    B = G budget;   chosen = top-B over all heads of (worth, where every head's best floor(safeguard budget) come first)
    B_g = number of chosen slots of head g

Any scorer serves: what it gives as the worth of a slot in one head is compared with the other heads'. That is meaningful for
attention drawn (snapkv, h2o, tova ...), less so for measures of another scale per head. A prompt fixes the shares; while
decoding each head keeps to its own, evicting or appending as the scorer does. Each head's storage is as long as its share.

Axes: B batch, G key/value heads, S stored slots. Paper: arXiv:2407.11550. The safeguard is a least share for every head.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from qkv.caches._stores.ragged import RaggedCache, share_out
from qkv.core import registry
from qkv.core.cache import CacheMethod, CacheSpec, Geometry, LayerCache, Policy
from qkv.core.errors import InvalidParameter, Refused
from qkv.core.spec import Limit, budget_param, param


def reference(worth: Tensor, budget: int, safeguard: float) -> Tensor:
    """The definition for one row: worth ``[G, S]`` -> chosen bool ``[G, S]``, head by head and then one slot at a time."""
    g, s = worth.shape
    chosen = torch.zeros(g, s, dtype=torch.bool)
    for head in range(g):
        best = sorted(range(s), key=lambda i: (-float(worth[head, i]), i))
        chosen[head, best[: max(1, int(safeguard * budget))]] = True
    rest = sorted((-float(worth[h, i]), h, i) for h in range(g) for i in range(s) if not chosen[h, i])
    for _, h, i in rest[: max(0, g * budget - int(chosen.sum()))]:
        chosen[h, i] = True
    return chosen


@final
@dataclass(frozen=True, kw_only=True)
class AdaKV(CacheMethod):
    """Adaptive budgets per head for any scorer."""

    spec: ClassVar[CacheSpec] = CacheSpec(
        id="adakv",
        title="Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference",
        paper="arXiv:2407.11550",
        source="paper",
        summary="Shares a layer's budget out among its KV heads by the scores of any policy; heads hold different lengths.",
        shown="at the same bytes closer to the full model than the same scorer with equal budgets",
        honest="only as good as its scorer; heads of other scales than attention are compared as if they were alike",
        limits=(Limit("full", {"budget": 1.0}, "budget >= length: exact attention"),),
        trials=({"scorer": "h2o"}, {"scorer": "snapkv:window=4,kernel=3"}, {"scorer": "knorm", "safeguard": 0.0}),
        small={"budget": 9},
    )
    scorer: str = param("snapkv", "the policy whose worth is shared out, with its settings (its budget is replaced)")
    budget: int | float = budget_param(
        0.2, "mean tokens kept per head: an int is a number, a float a share of the prompt"
    )
    safeguard: float = param(0.2, "least share of the mean budget that every head keeps", low=0.0, high=1.0)

    def validate(self) -> None:
        """The scorer must exist, and rank tokens head by head."""
        self.policy()

    def policy(self) -> Policy:
        """The scorer at this budget. Raises `InvalidParameter`, `UnknownName`."""
        name = registry.parse_setting(self.scorer)[0]
        if name == self.id:
            raise InvalidParameter(f"{self.id}: it cannot be its own scorer; name a policy such as snapkv or h2o")
        chosen: Any = registry.method(self.scorer)
        if not isinstance(chosen, Policy) or chosen.spec.by_position or not hasattr(chosen, "budget"):
            why = (
                "ranks by position, the same for all heads"
                if getattr(chosen.spec, "by_position", False)
                else "ranks no tokens"
            )
            raise InvalidParameter(
                f"{self.id}: scorer={self.scorer!r} {why}; name a policy with a budget, as snapkv or h2o"
            )
        scorer = chosen.replace(budget=self.budget)
        assert isinstance(scorer, Policy)
        if getattr(scorer, "positions", "original") != "original" or scorer.chunk(1 << 20) is not None:
            raise InvalidParameter(
                f"{self.id}: scorer={self.scorer!r} moves keys or absorbs prompts in pieces, which heads of different lengths do "
                "not support; use positions='original'"
            )
        if 0 < scorer.lag() < 1 << 30:
            raise InvalidParameter(
                f"{self.id}: scorer={self.scorer!r} evicts with a delay; use one that evicts every step or never"
            )
        return scorer

    def fits(self, geometry: Geometry) -> str | None:
        """What the scorer says."""
        return self.policy().fits(geometry)

    def layer(self, geometry: Geometry) -> LayerCache:
        """See `CacheMethod.layer`."""
        reason = self.fits(geometry)
        if reason is not None:
            raise Refused(f"{self.id} at layer {geometry.layer}: {reason}")
        return RaggedCache(self.policy(), geometry, functools.partial(share_out, safeguard=self.safeguard), self.id)

    def sees(self, geometry: Geometry, query: Tensor, position: Tensor) -> Tensor | None:
        """See `CacheMethod.sees`: what the scorer lets a block see."""
        return self.policy().sees(geometry, query, position)
