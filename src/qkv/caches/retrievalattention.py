r"""RetrievalAttention: keys live on the host in an index, and a step retrieves the few it attends to.

    W      = the first `sinks` and the newest `recent` tokens, on the device
    Omega  = the `top_k` keys outside W of largest <q, k>, per query head, found by the index on the host
    out    = g o_W + (1 - g) o_Omega,    g = sigmoid(lse_W - lse_Omega)

which is softmax over W and Omega together. Everything is kept. The queries of a decoding model come from another distribution
than its keys, so a graph over keys misleads them: this one (``index="graph"``) is built from what earlier queries of the
same KV head found (see `qkv.caches._index.graph`). ``flat`` scans everything and is exact, the oracle; ``ivf`` opens the
nearest of k-means cells; ``faiss`` is an HNSW graph of keys alone by the faiss library, a baseline.

A prompt, and every later call of several tokens, reads everything exactly. Tokens that leave the recent window are scanned
exactly, with what the index finds; once there are more than `rebuild`, the index is built anew. Queries are kept on the host
for that, one in `keep_queries`. The paper names 640 static tokens and 100 keys; the other sizes are completed here. Link
pruning differs from it, for a reason given where it is done.

Axes: B batch, H query heads, G key/value heads, M keys, K retrieved keys, D head width, E value width. Paper: arXiv:2409.10516.
It does not compose with another cache method at the same site; patterns for the prompt and steering do.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from qkv.caches._index.external import FaissIndex
from qkv.caches._index.graph import QueryAwareGraphIndex
from qkv.caches._index.index import Index
from qkv.caches._index.ivf import CellIndex
from qkv.caches._stores.retrieval import Retrieval, RetrievalCache
from qkv.core.cache import CacheMethod, CacheSpec, Geometry, LayerCache
from qkv.core.errors import Refused
from qkv.core.spec import Limit, param


def reference(q: Tensor, k: Tensor, v: Tensor, *, sinks: int, recent: int, top_k: int, scale: float) -> Tensor:
    """One head, one query by the definition with an exact search: q ``[D]``, k ``[M, D]``, v ``[M, E]`` -> ``[E]``.

    The query's own token is the last key.
    """
    m = k.shape[0]
    static = [i for i in range(m) if i < sinks or i >= m - recent]
    others = sorted((i for i in range(m) if i not in static), key=lambda i: -float(q @ k[i]))
    read = static + others[:top_k]
    return torch.softmax(k[read] @ q * scale, 0) @ v[read]


@final
@dataclass(frozen=True, kw_only=True)
class RetrievalAttention(CacheMethod):
    """A static set on the device, the rest on the host behind an index."""

    spec: ClassVar[CacheSpec] = CacheSpec(
        id="retrievalattention",
        title="RetrievalAttention: Accelerating Long-Context LLM Inference via Vector Retrieval",
        paper="arXiv:2409.10516",
        summary="Keeps everything on the host; each step attends to a small static set and to the keys an index retrieves.",
        shown="the graph built from queries finds more of the best 100 keys than one built from keys at equal scan",
        honest="saves device memory only (the host holds all keys, the index, some queries); on short contexts a scan is cheaper",
        limits=(
            Limit("full", {"top_k": 1 << 20, "probes": 1 << 20}, "everything is retrieved: exact attention"),
            Limit("full", {"recent": 1 << 20}, "the static set holds everything: exact attention"),
        ),
        evicts=False,
        trials=({}, {"index": "flat"}, {"index": "ivf", "probes": 2}),
        small={
            "sinks": 2,
            "recent": 4,
            "top_k": 3,
            "rebuild": 4,
            "keep_queries": 2,
            "degree": 3,
            "near": 5,
            "ef": 4,
        },
    )
    sinks: int = param(128, "first tokens of the static set", low=0)
    recent: int = param(512, "newest tokens of the static set, the query's own included", low=1)
    top_k: int = param(100, "keys retrieved per query head and step", low=1)
    index: Literal["graph", "ivf", "flat", "faiss"] = param("graph", "how the best keys are searched")
    ef: int = param(200, "graph: keys that a search keeps in view (more: slower, more found)", low=1)
    degree: int = param(32, "graph: links of a key", low=1)
    near: int = param(100, "graph: keys that a query links when it is built", low=2)
    probes: int = param(8, "ivf: cells that a query opens", low=1)
    rebuild: int = param(
        1024, "tokens outside index and static set that are scanned exactly before it is built anew", low=0
    )
    keep_queries: int = param(8, "one of so many queries is kept on the host to build the index from", low=1)

    def fits(self, geometry: Geometry) -> str | None:
        """The faiss index needs its library."""
        if self.index == "faiss" and importlib.util.find_spec("faiss") is None:
            return (
                "index='faiss' needs the faiss library: pip install faiss-cpu, or choose index='graph', 'ivf' or 'flat'"
            )
        return None

    def layer(self, geometry: Geometry) -> LayerCache:
        """See `CacheMethod.layer`."""
        reason = self.fits(geometry)
        if reason is not None:
            raise Refused(f"{self.id} at layer {geometry.layer}: {reason}")
        kinds = {"graph": QueryAwareGraphIndex, "ivf": CellIndex, "faiss": FaissIndex}
        return RetrievalCache(
            Retrieval(
                sinks=self.sinks,
                recent=self.recent,
                top_k=self.top_k,
                rebuild=self.rebuild,
                keep_queries=self.keep_queries,
                build=None if self.index == "flat" else self.build,
                kind=kinds.get(self.index),
                who=self.id,
            ),
            geometry,
        )

    def build(self, keys: Tensor, queries: Tensor) -> Index:
        """The chosen index over keys ``[B, G, M, D]`` from queries ``[B, H, N, D]``."""
        if self.index == "ivf":
            return CellIndex.build(keys, queries, probes=self.probes)
        if self.index == "faiss":
            return FaissIndex.build(keys, queries, degree=self.degree, ef=self.ef)
        return QueryAwareGraphIndex.build(keys, queries, degree=self.degree, near=self.near, ef=self.ef)
