"""The exact search: every key is scored. The oracle of the approximate ones.

Axes: see `qkv.caches._index.index`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from qkv.caches._index.index import Found, Index, check, exact


@final
@dataclass(frozen=True)
class FlatIndex(Index):
    """Nothing but a count."""

    kind: ClassVar[str] = "flat"

    @classmethod
    def build(cls, keys: Tensor, queries: Tensor | None = None, counts: Tensor | None = None) -> FlatIndex:
        """Keys ``[B, G, M, D]``; counts ``[B]`` keys of each row, default all. Queries are not needed."""
        return cls({"counts": check(keys, keys[:, :, :1] if queries is None else queries, counts)})

    def search(self, q: Tensor, keys: Tensor, k: int, first: int = 0) -> Found:
        """See `Index.search`."""
        counts = self.counts[:, None].expand(q.shape[:2])
        keys = keys[:, :, first : first + int(self.counts.max())]
        index, score = exact(q, keys, counts, k)
        return Found(index, score, counts[..., None].expand(q.shape[:3]))
