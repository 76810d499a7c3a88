"""HNSW by the faiss library: a graph of keys alone, the usual vector index, as a baseline.

The library's graphs are kept as bytes and read back on first use: the memory is that of both.

Axes: see `qkv.caches._index.index`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from qkv.caches._index.index import Found, Index, check, wide
from qkv.core.errors import MissingDependency


def _faiss() -> Any:
    try:
        import faiss  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingDependency(
            "index='faiss' needs the faiss library: pip install faiss-cpu, or choose index='graph', 'ivf' or 'flat'"
        ) from error
    return faiss


@final
@dataclass(frozen=True)
class FaissIndex(Index):
    """stored uint8 ``[B, G, bytes]`` serialised graphs, size ``[B, G]``, ef ``[B]``."""

    kind: ClassVar[str] = "faiss"
    live: dict[tuple[int, int], Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def build(
        cls,
        keys: Tensor,
        queries: Tensor | None = None,
        counts: Tensor | None = None,
        *,
        degree: int = 32,
        ef: int = 200,
    ) -> FaissIndex:
        """Keys ``[B, G, M, D]``; counts ``[B]`` keys of each row. Raises `MissingDependency`."""
        faiss, counts = _faiss(), check(keys, keys[:, :, :1] if queries is None else queries, counts)
        b, g = keys.shape[:2]
        made = []
        for row, count in enumerate(counts.tolist()):
            for head in range(g):
                index = faiss.IndexHNSWFlat(keys.shape[3], max(2, degree // 2), faiss.METRIC_INNER_PRODUCT)
                index.add(wide(keys[row, head, :count]).float().cpu().contiguous().numpy())
                made.append(torch.from_numpy(faiss.serialize_index(index).copy()))
        size = torch.tensor([len(x) for x in made]).view(b, g)
        stored = torch.zeros(b * g, int(size.max()), dtype=torch.uint8)
        for i, x in enumerate(made):
            stored[i, : len(x)] = x
        counts = counts.cpu()
        return cls({"stored": stored.view(b, g, -1), "size": size, "counts": counts, "ef": torch.full_like(counts, ef)})

    def search(self, q: Tensor, keys: Tensor, k: int, first: int = 0) -> Found:
        """See `Index.search`; scanned counts the library's distance computations, spread evenly over a KV head's queries."""
        faiss, (b, g, r) = _faiss(), q.shape[:3]
        index = torch.full((b, g, r, k), -1, dtype=torch.int64)
        score = torch.full((b, g, r, k), -torch.inf, dtype=wide(q).dtype)
        scanned = torch.zeros(b, g, r, dtype=torch.int64)
        for row in range(b):
            if not int(self.counts[row]):
                continue
            for head in range(g):
                graph = self._live(row, head)
                graph.hnsw.efSearch = max(k, int(self.parts["ef"][row]))
                stats = faiss.cvar.hnsw_stats
                stats.reset()
                value, found = graph.search(wide(q[row, head]).float().cpu().contiguous().numpy(), k)
                place = torch.from_numpy(found)
                index[row, head] = place
                score[row, head] = torch.from_numpy(value).masked_fill(place < 0, -torch.inf)
                scanned[row, head] = stats.ndis // r
        return Found(index, score, scanned)

    def _live(self, row: int, head: int) -> Any:
        if (row, head) not in self.live:
            blob = self.parts["stored"][row, head, : int(self.parts["size"][row, head])]
            self.live[row, head] = _faiss().deserialize_index(blob.numpy())
        return self.live[row, head]

    def bytes(self) -> int:
        """Bytes of the parts, and of the library's own copies."""
        live = sum(int(self.parts["size"][row, head]) for row, head in self.live)
        return super().bytes() + live

    def __deepcopy__(self, memo: dict[int, Any]) -> FaissIndex:
        return FaissIndex({name: x.clone() for name, x in self.parts.items()})
