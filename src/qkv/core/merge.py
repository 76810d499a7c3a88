r"""Merge partial attentions over disjoint key sets: the shared currency ``(out, lse)``.

    lse = log sum_i exp(lse_i),   out = sum_i exp(lse_i - lse) out_i

An empty part has lse = -inf and weight 0, also when every part is empty (out 0, lse -inf; never NaN).

Axes: B batch, H heads, N queries, E value width.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from qkv.core.errors import InvalidInput


def merge(*parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Exact attention over the union of the parts' keys.

    parts: pairs of out ``[B, H, N, E]`` and natural-log lse ``[B, H, N]``. Returns the same pair. Gradients
    flow through both. Raises `InvalidInput` without parts or on shapes that differ.
    """
    if not parts:
        raise InvalidInput("merge needs at least one (out, lse) pair")
    _check(parts)
    lses = torch.stack([lse for _, lse in parts])  # [P, B, H, N]
    top = lses.detach().amax(0)
    anchor = torch.where(torch.isfinite(top), top, torch.zeros_like(top))
    weights = (lses - anchor).exp()  # [P, B, H, N], 0 for an empty part
    total = weights.sum(0)
    some = total > 0
    safe = torch.where(some, total, torch.ones_like(total))
    lse = torch.where(some, anchor + safe.log(), torch.full_like(total, -torch.inf))
    out = sum((w / safe).unsqueeze(-1).to(o.dtype) * o for w, (o, _) in zip(weights, parts, strict=True))
    return out, lse  # type: ignore[return-value]


def _check(parts: Iterable[tuple[Tensor, Tensor]]) -> None:
    shapes = {(tuple(out.shape), tuple(lse.shape)) for out, lse in parts}
    if len(shapes) != 1 or any(o[:-1] != l for o, l in shapes):
        raise InvalidInput(f"merge needs parts of one shape, out [B, H, N, E] and lse [B, H, N]; got {sorted(shapes)}")
