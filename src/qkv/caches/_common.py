"""Parts that several cache policies share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.core.cache import View


def in_cache_shift(view: View) -> Tensor:
    """How far each stored key must move so that positions count places in the cache instead of places in the text.

    A query keeps its text position; what matters to a rotary embedding is the distance. A slot at text position p that is
    the i-th oldest of n stored before this block moves forward by (newest - p) - (n - 1 - i), the text distance minus the
    distance in the cache; the block's own tokens are contiguous and do not move. ``[B, G, S]``.
    """
    order = view.order  # [B, G, S]
    count = (view.position >= 0).sum(-1, keepdim=True)
    shift = (view.newest - view.position) - (count - 1 - order)
    return shift.masked_fill(view.position < 0, 0)


def pooled(score: Tensor, position: Tensor, kernel: int, how: str) -> Tensor:
    """Scores ``[B, G, S]`` smoothed over `kernel` neighbouring tokens (``max`` or ``avg``; 0 beyond the ends), of the same shape.

    Neighbours are neighbours in the text among the slots in use (position >= 0), whatever the order of the slots.
    """
    if kernel == 1:
        return score
    empty = position < 0
    last = torch.iinfo(position.dtype).max
    order = position.masked_fill(empty, last).argsort(-1)
    line = score.masked_fill(empty, 0).gather(-1, order)
    line = F.max_pool1d(F.pad(line, (kernel // 2, kernel // 2)), kernel, 1) if how == "max" else _mean(line, kernel)
    return torch.zeros_like(score).scatter(-1, order, line)


def _mean(line: Tensor, kernel: int) -> Tensor:
    return F.avg_pool1d(line, kernel, 1, padding=kernel // 2)


def recent(view: View, window: int) -> Tensor:
    """Which slots ``[B, G, S]`` are the newest `window` tokens; half of the budget where that is smaller than the window."""
    some = torch.where(view.keep >= window, window, view.keep // 2)
    return view.position > view.newest - some


def by_keys(position: Tensor, *keys: Tensor) -> Tensor:
    """Worth ``[B, G, S]`` that orders slots by several keys, the first most important, larger is better; then the newer."""
    order = position.argsort(-1, descending=True)
    for key in reversed(keys):
        order = order.gather(-1, key.gather(-1, order).sort(dim=-1, descending=True, stable=True).indices)
    return -order.argsort(-1).to(torch.float32)
