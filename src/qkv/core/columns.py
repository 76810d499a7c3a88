r"""Column means of attention maps, in blocks: how much attention a key draws from the queries that can see it.

    mean_k = (sum over real queries q that see k of A_qk) / (number of real queries that see k)

For an unpadded causal map of T tokens the denominator is T - k, not T. Padding is in neither sum nor count.

Axes: B batch, H query heads, G key/value heads, N queries, M keys, D head width, E value width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qkv.core.attend import attend, causal_mask, on_kernels


class Columns(NamedTuple):
    """mean ``[B, H, M]``, mass ``[B, H, M]`` (the sum), count ``[B, 1|H, M]``, out ``[B, H, N, E]``, lse ``[B, H, N]``.

    All in float32 or wider.
    """

    mean: Tensor
    mass: Tensor
    count: Tensor
    out: Tensor
    lse: Tensor


def real_rows(mask: Tensor | None, n: int, m: int) -> Tensor | None:
    """``[B, N]`` bool: the queries that are real tokens, or None when all are. Queries are the last N of the M tokens.

    A key mask ``[B, 1, 1, M]`` says so itself; under a full mask a token is real when it may attend to itself.
    """
    if mask is None:
        return None
    if mask.shape[-2] == 1 and n > 1:
        return mask.any(1)[:, 0, m - n :]
    return mask.any(1).diagonal(offset=m - n, dim1=-2, dim2=-1)


def seen_by(mask: Tensor | None, causal: bool, n: int, m: int, like: Tensor) -> Tensor:
    """``[B, 1|H, M]`` float: how many real queries see each key. like: gives device and dtype."""
    if mask is None or (mask.shape[-2] == 1 and n > 1):
        rows = real_rows(mask, n, m)
        rows = like.new_ones(1, n) if rows is None else rows.to(like.dtype)
        if causal:
            after = torch.nn.functional.pad(rows, (m - n, 0)).flip(-1).cumsum(-1).flip(-1)  # [B, M]
        else:
            after = rows.sum(-1, keepdim=True).expand(-1, m)
        after = after[:, None]
        return after if mask is None else after * mask[:, :, 0].to(like.dtype)
    rows = real_rows(mask, n, m)
    assert rows is not None
    seen = mask & rows[:, None, :, None]
    if causal:
        seen = seen & causal_mask(n, m, mask.device)
    return seen.sum(-2, dtype=like.dtype)


def column_means(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False, scale: float | None = None
) -> Columns:
    """Exact attention with its column means, holding at most one chunk of the map; arguments as `attend`.

    Everything is computed in float32 or wider, also the sums. A mask over heads is over query heads (1 or H).
    """
    if not on_kernels(q, k, v, mask):  # they compute so by themselves
        q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
    n, m = q.shape[2], k.shape[2]
    rows = real_rows(mask, n, m)
    if rows is not None:
        rows = rows.expand(q.shape[0], -1)
    done = attend(q, k, v, mask=mask, causal=causal, scale=scale, mass=True, mass_rows=rows)
    assert done.mass is not None
    count = seen_by(mask, causal, n, m, done.mass)
    return Columns(done.mass / count.clamp(min=1), done.mass, count, done.out.to(done.lse.dtype), done.lse)
