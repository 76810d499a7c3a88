r"""Head ablation: chosen heads give nothing.

    out_h = 0   for h in heads

Axes: B batch, H query heads, N queries, E value width.
Baseline: the control that shows what a set of heads is good for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from qkv.core.cache import Compute
from qkv.core.heads import HeadSet
from qkv.core.site import Site
from qkv.core.spec import Limit, param
from qkv.core.steering import Steering, SteeringSpec
from qkv.steer._heads import absent, listed, nonsense


def reference(out: Tensor, heads: Sequence[int]) -> Tensor:
    """The output ``[B, H, N, E]`` with the listed heads set to zero."""
    return out.index_fill(1, torch.tensor(list(heads), device=out.device, dtype=torch.int64), 0.0)


@final
@dataclass(frozen=True, kw_only=True)
class HeadAblation(Steering):
    """Set the attention output of chosen heads to zero."""

    spec: ClassVar[SteeringSpec] = SteeringSpec(
        id="head-ablation",
        title="Head ablation",
        paper="baseline",
        source="baseline",
        summary="Chosen attention heads output zero, in prefill and decoding.",
        shown="without its retrieval heads a model no longer finds the needle; without as many random ones it does",
        honest="zero is far from what the next layer expects: some of the damage is the shock, so compare with random heads",
        limits=(Limit("full", {"heads": ()}, "no head: the model itself"),),
        neutral={"heads": ()},
        normalised=False,
        trials=({"heads": ("1.0", "1.4", "3.2")},),
    )
    heads: tuple[str, ...] = param((), 'heads to silence, "layer.head" counted from 0 (or pairs, or a HeadSet)')

    def __post_init__(self) -> None:
        listed(self)
        super().__post_init__()

    def wrap(self, site: Site, compute: Compute) -> Compute:
        """See `Steering.wrap`."""
        heads = self.heads_at(site)
        if not heads:
            return compute

        def run(q: Tensor, k: Tensor, v: Tensor, **call: Any) -> Tensor:
            return reference(compute(q, k, v, **call), heads)

        return run

    def heads_at(self, site: Site) -> tuple[int, ...]:
        """The listed heads of the site's layer."""
        return HeadSet.of(self.heads).at(site.layer)

    def fits(self, site: Site) -> str | None:
        """A layer with a listed head, in the decoder or encoder stack itself."""
        if site.role == "cross":
            return "head numbers mean self-attention heads; cross-attention is left alone"
        heads = HeadSet.of(self.heads)
        return nonsense(heads, site) or absent(heads, site)
