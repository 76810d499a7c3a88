r"""PyramidKV: SnapKV whose lower layers keep more and whose upper layers keep less, with the same total.

    extra_l = top - (top - bottom) l / (L - 1),   bottom = mean / beta,   top = 2 mean - bottom

Every layer keeps the window; `mean` is the budget beside it, l counts layers from 0 (nearest the input). Where the lowest layer
would keep more than the prompt has, it keeps the prompt, and the top of the stack gets what that leaves. Rounded so that
all L layers together hold L times the budget. Scores, pooling and what is decoded: as in snapkv.

Axes: L layers; others as in snapkv. Paper: arXiv:2406.02069 (section 4.2, beta = 20). The window and the pooling default to
snapkv's, so that the pyramid is the only difference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

from qkv.caches._snap import Snap
from qkv.core.cache import CacheSpec, Geometry
from qkv.core.spec import Limit, param


def reference(mean: int, most: int, layers: int, beta: float) -> list[float]:
    """What every layer keeps beside the window, before rounding; no layer more than `most`."""
    bottom = mean / beta
    top = 2 * mean - bottom
    if top > most:
        top, bottom = float(most), 2.0 * mean - most
    return [top - (top - bottom) * i / max(1, layers - 1) for i in range(layers)] if layers > 1 else [float(mean)]


def extra(mean: int, most: int, layer: int, layers: int, beta: float) -> int:
    """The share of one layer in whole tokens: running totals are rounded, so the layers add up to ``mean * layers``."""
    line = reference(mean, most, layers, beta)
    return math.floor(math.fsum(line[: layer + 1]) + 0.5) - math.floor(math.fsum(line[:layer]) + 0.5)


@final
@dataclass(frozen=True, kw_only=True)
class PyramidKV(Snap):
    """Compress the prompt by what its last queries look at, more in upper layers."""

    spec: ClassVar[CacheSpec] = CacheSpec(
        id="pyramidkv",
        title="PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling",
        paper="arXiv:2406.02069",
        source="paper",
        summary="SnapKV with budgets that shrink from the lowest layer to the highest, the total unchanged.",
        shown="the same bytes as snapkv, spent on the lower layers",
        honest="whether lower layers need more depends on the model; on a small one an even split may be better",
        limits=(Limit("full", {"budget": 1.0}, "budget >= prompt: exact attention"),),
        trials=({}, {"decode": "evict", "beta": 4.0}),
        slopes=True,
        small={"budget": 9, "window": 4, "kernel": 3},
    )
    beta: float = param(20.0, "the mean budget beside the window is so many times that of the topmost layer", low=1.0)

    def slots_at(self, tokens: int, geometry: Geometry) -> int:
        """The layer's share of the pyramid."""
        mean = self.slots(tokens)
        if mean >= tokens:
            return mean
        window = self.window if mean >= self.window else max(1, mean // 2)
        return window + extra(mean - window, tokens - window, geometry.layer, geometry.layers, self.beta)
