r"""TOVA: after every step the stored token that the newest query attends to least is dropped.

    worth_s = mean_h A_h[newest, s],     the same for all heads of a layer

No window, no sums: a token survives as long as the last query looks at it. A prompt is cut by the attention of its last query.

Axes: B batch, H query heads, G key/value heads, S stored slots. Paper: arXiv:2401.06104 (section 3; transformers as multi-state
RNNs). per="head" lets each KV head keep a set of its own, by the mean over its query heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from qkv.core.cache import CacheSpec, Policy, View
from qkv.core.spec import Limit, budget_param, param


def reference(logits: Tensor, budget: int) -> list[int]:
    """Positions kept after the last query of ``[H, N, N]`` (before the softmax), fed token by token."""
    kept: list[int] = []
    for t in range(logits.shape[-1]):
        kept.append(t)
        if len(kept) > budget:
            row = logits[:, t, kept].softmax(-1).mean(0)
            del kept[int(row[:-1].argmin())]  # never the newest
    return kept


@final
@dataclass(frozen=True, kw_only=True)
class TOVA(Policy):
    """Drop what the newest query attends to least."""

    spec: ClassVar[CacheSpec] = CacheSpec(
        id="tova",
        title="Transformers are Multi-State RNNs (TOVA: Token Omission Via Attention)",
        paper="arXiv:2401.06104",
        source="paper",
        summary="Drops the stored token that the newest query attends to least, the same for all heads of a layer.",
        shown="at 20 % far closer to the full model than a window of that size, without any window of its own",
        honest="one query decides: what it does not need just now is gone for good",
        limits=(Limit("full", {"budget": 1.0}, "budget >= length: exact attention"),),
        trials=({}, {"per": "head"}),
        slopes=True,
        small={"budget": 9},
    )
    budget: int | float = budget_param(0.2)
    per: Literal["layer", "head"] = param("layer", "all heads of a layer keep the same tokens, or each KV head its own")

    def mass_queries(self, new: int) -> int:
        """The newest query alone."""
        return 1

    def rank(self, state: Tensor | None, view: View) -> Tensor:
        """The attention of the newest query."""
        assert view.mass is not None
        if self.per == "head":
            return view.per_group(view.mass, "mean")
        return torch.mean(view.mass, 1, keepdim=True).expand_as(view.position)

    def settles(self) -> dict[str, Any] | None:
        """The same mean."""
        return {"reduce": "mean", "layer": self.per == "layer"}
