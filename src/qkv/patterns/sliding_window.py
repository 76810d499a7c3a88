r"""Sliding window with attention sinks: each query sees the newest `window` keys and the first `sinks` keys.

    A(i) = {j <= p : p - j < window} u {j <= p : j < sinks},      p = i + M - N

p is the query's position, so the window counts the query itself. Not causal: |p - j| < window. In a padded
row positions count from its first real token. The plain baseline of every sparse pattern; with sinks=0 it is
the sliding-window attention of Longformer and Mistral, with sinks the mask of StreamingLLM at original
positions.

Axes: B batch, H query heads, G key/value heads, N queries, M keys, D head width.
Paper: arXiv:2309.17453 (sinks), arXiv:2004.05150 (window).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from qkv.core.pattern import Pattern, PatternSpec, check_padding
from qkv.core.plan import BlockPlan
from qkv.core.spec import Limit, param
from qkv.patterns._common.window import execute_window


def reference(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    causal: bool,
    padding: Tensor | None,
    window: int,
    sinks: int,
    block_size: int,
) -> Tensor:
    """The dense mask, row by row of the batch: q ``[B, H, N, D]``, k ``[B, G, M, D]`` -> bool ``[B, H, N, M]``."""
    (b, h, n, _), m = q.shape, k.shape[2]
    out = torch.zeros(b, h, n, m, dtype=torch.bool, device=q.device)
    for row in range(b):
        real = [True] * m if padding is None else padding[row].tolist()
        first = real.index(True) if True in real else m
        for i in range(n):
            p = i + m - n
            for j in range(m):
                near = p - j < window if causal else abs(p - j) < window
                sink = first <= j < first + sinks
                out[row, :, i, j] = real[j] and (near or sink) and (j <= p or not causal)
    return out


@final
@dataclass(frozen=True, kw_only=True)
class SlidingWindow(Pattern):
    """The newest `window` keys and the first `sinks` keys of each row."""

    spec: ClassVar[PatternSpec] = PatternSpec(
        id="sliding-window",
        title="Sliding-window attention with sinks",
        paper="arXiv:2309.17453",
        source="baseline",
        summary="Each query sees the newest tokens and a few first ones; linear in the number of tokens.",
        reference=reference,
        execute=execute_window,
        min_queries=1,
        limits=(
            Limit("full", {"window": 1 << 30}, "a window as long as the sequence is full attention"),
            Limit("full", {"sinks": 1 << 30}, "as many sinks as tokens are full attention"),
        ),
        trials=({}, {"window": 5, "sinks": 2, "block_size": 4}, {"window": 3, "sinks": 0, "block_size": 7}),
        shown="Without sinks perplexity breaks as soon as the first token leaves the window; with 4 it stays sane.",
        honest="Nothing outside the window and the sinks can be retrieved.",
    )
    window: int = param(1024, "keys a query sees, itself included, in tokens", low=1)
    sinks: int = param(4, "first tokens of each row that every later query sees", low=0)
    block_size: int = param(128, "tokens of a query block and of a key block in the plan", low=1)

    def plan(
        self,
        q: Tensor,
        k: Tensor,
        *,
        scale: float | None = None,
        causal: bool = True,
        padding: Tensor | None = None,
    ) -> BlockPlan:
        """The plan from shapes and padding alone; q and k are not read. See `Pattern.plan`."""
        check_padding(padding, k, self.id)
        n, m = q.shape[2], k.shape[2]
        size = self.block_size
        return BlockPlan.from_blocks(
            torch.ones(1, 1, -(-n // size), -(-m // size), dtype=torch.bool, device=q.device),
            block=size,
            queries=n,
            keys=m,
            causal=causal,
            window=self.window,
            sinks=self.sinks,
            first=None if padding is None else padding.int().argmax(1),
            tokens=None if padding is None else padding[:, None, None],
        )
