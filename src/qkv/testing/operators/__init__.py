"""The laws of operators: what a map of q, k, v must keep, whatever its formula.

Sizes are small distinct primes, so that swapped axes cannot hide. Everything exact is checked in float64; a
kernel, which has no float64, is checked in float32 with a wider tolerance and by `low_precision`.
"""

from qkv.testing.operators._inputs import Inputs, call, draw, extremes, gradients, reference, sample, slack, variety

__all__ = ["Inputs", "call", "draw", "extremes", "gradients", "reference", "sample", "slack", "variety"]
