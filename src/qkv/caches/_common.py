"""Parts that several cache policies share."""

from __future__ import annotations

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
