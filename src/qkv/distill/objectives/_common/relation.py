"""Relations of tokens with tokens: softmax of scaled dot products, compared by Kullback-Leibler divergence.

Axes: B batch, H heads as the model has them, R relation heads, N tokens, D width of a head, W width of a relation head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

ELEMENTS = 1 << 24  # relation entries held at once per network (64 MiB in float32)


def regroup(x: Tensor, heads: int) -> Tensor:
    """All heads concatenated, then split anew: ``[B, H, N, D]`` -> ``[B, R, N, H * D / R]``."""
    b, h, n, d = x.shape
    return x.transpose(1, 2).reshape(b, n, heads, h * d // heads).transpose(1, 2)


def visible(real: Tensor, *, causal: bool, window: int | None = None) -> Tensor:
    """Bool ``[B, N, N]``: which keys each token relates to: real ones, none later if causal, the newest `window` only."""
    n = real.shape[-1]
    seen = real[:, None, :].expand(-1, n, -1)
    age = torch.arange(n, device=real.device)[:, None] - torch.arange(n, device=real.device)[None, :]
    if causal:
        seen = seen & (age >= 0)
    return seen if window is None else seen & (age < window)


def relation_kl(
    teacher: tuple[Tensor, Tensor, float],
    student: tuple[Tensor, Tensor, float],
    real: Tensor,
    seen: Tensor,
    *,
    elements: int | None = None,
) -> Tensor:
    """KL(teacher's relation || student's) per token, averaged over relation heads: ``[B, N]``, 0 at padding.

    teacher, student: (left ``[B, R, N, W]``, right ``[B, R, N, W]``, scale); W may differ between the two. real: bool
    ``[B, N]``. seen: bool ``[B, N, N]``. elements: relation entries to hold at once (default `ELEMENTS`); larger
    relations are computed in pieces of heads and rows and recomputed in the backward pass. At least float32 throughout.
    """
    heads, n = teacher[0].shape[1:3]
    elements = ELEMENTS if elements is None else elements
    wide = torch.promote_types(student[0].dtype, torch.float32)
    gone = ~real[:, None, :, None]
    lt, rt, ls, rs = (x.to(wide).masked_fill(gone, 0.0) for x in (*teacher[:2], *student[:2]))
    lt, ls = lt * teacher[2], ls * student[2]
    row = max(1, real.shape[0] * n)
    per = max(1, min(heads, elements // max(1, row * n)))
    rows = n if per > 1 else max(1, min(n, elements // row))
    recompute = (per < heads or rows < n) and torch.is_grad_enabled()
    total = []
    for r in range(0, n, rows):
        part, keys = 0.0, seen[:, None, r : r + rows]
        for h in range(0, heads, per):
            cut = slice(h, h + per)
            pieces = (lt[:, cut, r : r + rows], rt[:, cut], ls[:, cut, r : r + rows], rs[:, cut], keys)
            part = part + (checkpoint(_kl, *pieces, use_reentrant=False) if recompute else _kl(*pieces))
        total.append(part)
    return torch.cat(total, -1).masked_fill(~real, 0.0) / heads


def _kl(lt: Tensor, rt: Tensor, ls: Tensor, rs: Tensor, seen: Tensor) -> Tensor:
    """``[B, rows]``: sum over heads of KL between the rows of two relations. Unseen keys get the lowest finite logit."""
    lowest = torch.finfo(lt.dtype).min
    log_t = (lt @ rt.mT).masked_fill(~seen, lowest).log_softmax(-1)
    log_s = (ls @ rs.mT).masked_fill(~seen, lowest).log_softmax(-1)
    return (log_t.exp() * (log_t - log_s)).sum((1, -1))
