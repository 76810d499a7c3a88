r"""Exact softmax attention: the baseline every other operator is measured against.

    out_i = sum_j softmax_j(scale q_i . k_j) v_j        over the keys j that query i may see

Causal masks are aligned to the lower right: query i of N sees keys up to i + M - N. A query without a key
gives 0. The log-sum-exp of the same map comes from `qkv.attend`, which returns ``(out, lse)``.

Axes: B batch, H query heads, G key/value heads, N queries, M keys, D head width, E value width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from qkv.core.attend import causal_mask, sdpa
from qkv.core.operator import Operator, OperatorSpec, Wiring


def reference(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = True, padding: Tensor | None = None
) -> Tensor:
    """The whole map at once. q ``[B, H, N, D]``, k ``[B, G, M, D]``, v ``[B, G, M, E]`` -> ``[B, H, N, E]``."""
    (n, m), repeat = (q.shape[2], k.shape[2]), q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    seen = causal_mask(n, m, q.device) if causal else torch.ones(n, m, dtype=torch.bool, device=q.device)
    if padding is not None:
        seen = seen & padding[:, None, None, :]  # [B, 1, N, M]
    logits = scale * (q @ k.mT)  # [B, H, N, M]
    weights = logits.masked_fill(~seen, torch.finfo(q.dtype).min).softmax(-1)
    return weights.masked_fill(~seen, 0.0) @ v


def loop(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = True, padding: Tensor | None = None
) -> Tensor:
    """The sum written out, one row, head and query at a time."""
    (b, h, n, _), (g, m) = q.shape, k.shape[1:3]
    out = q.new_zeros(b, h, n, v.shape[-1])
    for row in range(b):
        for head in range(h):
            for i in range(n):
                keys = [j for j in range(m) if (not causal or j <= i + m - n)
                        and (padding is None or bool(padding[row, j]))]  # fmt: skip
                weights = [(scale * q[row, head, i].dot(k[row, head * g // h, j])).exp() for j in keys]
                total = sum(weights)
                for weight, j in zip(weights, keys, strict=True):
                    out[row, head, i] += weight / total * v[row, head * g // h, j]
    return out


def fast(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = True, padding: Tensor | None = None
) -> Tensor:
    """The same by torch's fused kernels; shapes as in `reference`."""
    mask = None if padding is None else padding[:, None, None, :]
    return sdpa(q, k, v, mask=mask, causal=causal, scale=scale)


@final
@dataclass(frozen=True, kw_only=True)
class Full(Operator):
    """Exact softmax attention."""

    spec: ClassVar[OperatorSpec] = OperatorSpec(
        id="full",
        title="Exact softmax attention",
        paper="baseline",
        source="baseline",
        summary="Every query attends to every key it may see, with exact softmax weights.",
        shown="Equals the model's own attention on every model tried; every other row of the bench is read against it.",
        honest="Time grows with N times M and the cache with M: this is what the other methods try to avoid.",
        reference=reference,
        fast=fast,
        loop=loop,
        wiring=Wiring(rotary=True),
    )
