"""The laws of conversions: what pretrained weights made into another layer must keep, whatever the formula.

The sources are tiny random Llamas in float64, all of it: their norms too, which transformers computes in float32. Their
weights are drawn large, so that attention is sharp and positions matter.
"""

from qkv.testing.conversions._source import (
    converted,
    divergence,
    geometry,
    held_out,
    logits,
    names,
    small,
    snapshot,
    source,
    texts,
)

__all__ = ["converted", "divergence", "geometry", "held_out", "logits", "names", "small", "snapshot", "source", "texts"]
