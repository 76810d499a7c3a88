r"""The query-aware graph: keys linked because queries wanted them together, walked best first.

A decoding query is no neighbour of the keys, it comes from another distribution; so the graph is made from what queries find.

    1. each query links the `near` keys of largest inner product with it, in its own order, each with the next, both ways
    2. a key keeps the `degree` links that most queries made (of equals the older key)
    3. keys that cannot be reached from the entry are chained to the reached key of largest inner product
    4. the entry is the key of largest inner product with the mean query

A search keeps the `ef` best keys it has seen and expands the `AT_ONCE` best unexpanded of them at a time, until none is left.
All rows and heads are walked together. Chains are two links beyond `degree` a key: its first child, its next sibling; no key
is out of reach, whatever the queries were. A graph of keys alone is `build(keys, keys)`.

The paper links a query's nearest key with its others and prunes by occlusion (u stays beside v if no kept w has <u, w> >
<u, v>, the places left empty go to the nearest others, then both ways and once more): ``prune="occlusion"``. With inner
products a long key occludes everything; on keys of SmolLM2 counting finds 96 to 98 % of the best 100 where occlusion finds 50
to 84 % at the same ef, and is built ten times faster.

Axes: see `qkv.caches._index.index`; V all keys of a row, W links of a key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from qkv.caches._index.index import SCORES, Found, Index, check, exact, top, wide

AT_ONCE = 8  # nodes that a search expands at a time
POOL = 3  # candidates per kept link


@final
@dataclass(frozen=True)
class QueryAwareGraphIndex(Index):
    """links int32 ``[B, G, M, W]`` (-1 = none), entry ``[B, G]``, ef ``[B]`` keys that a search keeps in view."""

    kind: ClassVar[str] = "graph"

    @classmethod
    def build(
        cls,
        keys: Tensor,
        queries: Tensor,
        counts: Tensor | None = None,
        *,
        degree: int = 32,
        near: int = 100,
        ef: int = 200,
        prune: Literal["together", "occlusion"] = "together",
    ) -> QueryAwareGraphIndex:
        """Keys ``[B, G, M, D]``, queries ``[B, H, N, D]``; counts ``[B]`` keys of each row; see the module."""
        counts = check(keys, queries, counts)
        g, made = keys.shape[1], None
        for row, count in enumerate(counts.tolist()):
            k = wide(keys[row, :, :count])
            q = wide(queries[row]).reshape(g, -1, queries.shape[3])
            links, entry = _graph(k, q, degree, near, prune)
            parts = {"links": links[None].int(), "entry": entry[None]}
            one = cls(parts | {"counts": entry.new_tensor([count]), "ef": entry.new_tensor([ef])})
            if made is None:
                made = one.select(torch.zeros(len(counts), dtype=torch.int64))
            else:
                made = made.put(torch.tensor([row]), one)
        assert isinstance(made, QueryAwareGraphIndex)
        return made

    def search(self, q: Tensor, keys: Tensor, k: int, first: int = 0, ef: int | None = None) -> Found:
        """See `Index.search`; ef: keys in view, default as built, never below `k`."""
        links, counts = self.parts["links"], self.counts
        (b, g, r, d), m = q.shape, links.shape[2]
        size = min(m, max(k, int(self.parts["ef"].max()) if ef is None else ef))
        rows, device = b * g * r, q.device
        flat = wide(q).reshape(rows, d)
        unit = torch.arange(rows, device=device) // r
        home, group = unit // g, unit % g
        nodes = links.reshape(b * g, m, -1)
        seen = torch.zeros(rows, m + 1, dtype=torch.bool, device=device)
        seen[:, m] = True  # where links that are none point to
        view = torch.full((rows, size), -1, dtype=torch.int64, device=device)
        score = torch.full((rows, size), -torch.inf, dtype=flat.dtype, device=device)
        fresh = torch.zeros(rows, size, dtype=torch.bool, device=device)
        start = self.parts["entry"].reshape(-1)[unit]
        view[:, 0], fresh[:, 0] = start, counts.repeat_interleave(g * r) > 0
        score[:, 0] = torch.where(fresh[:, 0], (wide(keys[home, group, start + first]) * flat).sum(-1), -torch.inf)
        seen.scatter_(1, start[:, None], True)
        scanned = fresh[:, 0].long()
        while True:
            best = score.masked_fill(~fresh, -torch.inf).topk(min(AT_ONCE, size), dim=-1)
            some = best.values > -torch.inf
            if not bool(some.any()):
                break
            fresh.scatter_(1, best.indices, False)
            node = view.gather(1, best.indices)
            ahead = nodes[unit[:, None], node.clamp(0, m - 1)].long()  # [Q, AT_ONCE, W]
            ahead = torch.where(some[..., None] & (ahead >= 0), ahead, m).flatten(1)
            ahead = ahead.sort(dim=-1).values
            new = ~seen.gather(1, ahead)
            new[:, 1:] &= ahead[:, 1:] != ahead[:, :-1]
            seen.scatter_(1, ahead, True)
            row, column = new.nonzero(as_tuple=True)
            value = torch.full_like(ahead, -torch.inf, dtype=flat.dtype)
            value[row, column] = (wide(keys[home[row], group[row], ahead[row, column] + first]) * flat[row]).sum(-1)
            scanned += new.sum(-1)
            kept = torch.cat((score, value), 1).topk(size, dim=-1)
            view = torch.cat((view, ahead), 1).gather(1, kept.indices)
            fresh = torch.cat((fresh, new), 1).gather(1, kept.indices)
            score = kept.values
        index, score = top(score, view, k)
        return Found(index.view(b, g, r, k), score.view(b, g, r, k), scanned.view(b, g, r))


def _graph(keys: Tensor, queries: Tensor, degree: int, near: int, prune: str) -> tuple[Tensor, Tensor]:
    """(links ``[G, M, degree + 2]``, entries ``[G]``) of one row: keys ``[G, M, D]``, queries ``[G, N, D]``."""
    (g, m, d), device = keys.shape, keys.device
    if m == 0:
        return torch.full((g, 0, degree + 2), -1, device=device), torch.zeros(g, dtype=torch.int64, device=device)
    home = torch.arange(g, device=device)[:, None, None] * m
    found = exact(queries, keys, None, min(near, m))[0] + home  # [G, N, near], counted over all heads
    flat = keys.reshape(g * m, d)
    if prune == "together":
        links = _together(found[..., :-1].reshape(-1), found[..., 1:].reshape(-1), g * m, degree)
    else:
        first, others = found[..., :1].expand_as(found[..., 1:]).reshape(-1), found[..., 1:].reshape(-1)
        links = _pruned(flat, torch.cat((first, others)), torch.cat((others, first)), degree)
        source = torch.arange(g * m, device=device)[:, None].expand_as(links)[links >= 0]
        target = links[links >= 0]
        links = _pruned(flat, torch.cat((source, target)), torch.cat((target, source)), degree)
    entry = (keys @ queries.mean(1).unsqueeze(-1)).squeeze(-1).argmax(-1)  # [G]
    chain = _chained(keys, links.view(g, m, degree), entry)
    links = torch.cat((links.view(g, m, degree), chain), 2)
    return torch.where(links >= 0, links - home, -1), entry


def _together(a: Tensor, b: Tensor, v: int, degree: int) -> Tensor:
    """The `degree` keys that each of `v` keys was most often named with, in pairs a, b ``[P]``: ``[v, degree]``, -1 = none."""
    pair, count = torch.cat((a * v + b, b * v + a)).unique(return_counts=True)
    source, target = pair // v, pair % v
    order = count.sort(descending=True, stable=True).indices
    order = order[source[order].sort(stable=True).indices]
    source, target = source[order], target[order]
    rank = (
        torch.arange(len(source), device=a.device)
        - torch.searchsorted(source, torch.arange(v, device=a.device))[source]
    )
    out = torch.full((v, degree), -1, dtype=torch.int64, device=a.device)
    kept = rank < degree
    out[source[kept], rank[kept]] = target[kept]
    return out


def _pruned(keys: Tensor, source: Tensor, target: Tensor, degree: int) -> Tensor:
    """At most `degree` of the candidates source -> target (indices into keys ``[V, D]``) of each key: ``[V, degree]``."""
    v, device = keys.shape[0], keys.device
    pair = (source * v + target)[source != target].unique()  # sorted by source
    source, target = pair // v, pair % v
    size = max(1, SCORES // keys.shape[1])
    score = torch.cat(
        [(keys[a] * keys[b]).sum(-1) for a, b in zip(source.split(size), target.split(size), strict=True)]
        or [keys.new_zeros(0)]
    )
    order = score.sort(descending=True, stable=True).indices
    order = order[source[order].sort(stable=True).indices]
    source, target, score = source[order], target[order], score[order]
    begin = torch.searchsorted(source, torch.arange(v, device=device))
    rank = torch.arange(len(source), device=device) - begin[source]
    pool = min(POOL * degree, int(rank.max()) + 1 if len(rank) else 1)
    kept = rank < pool
    list_ = torch.full((v, pool), -1, dtype=torch.int64, device=device)
    worth = torch.full((v, pool), -torch.inf, dtype=keys.dtype, device=device)
    list_[source[kept], rank[kept]] = target[kept]
    worth[source[kept], rank[kept]] = score[kept]
    rows = max(1, SCORES // (pool * max(pool, keys.shape[1])))
    parts = zip(list_.split(rows), worth.split(rows), strict=True)
    out = torch.cat([_occluded(keys, a, b, degree) for a, b in parts])
    return torch.nn.functional.pad(out, (0, degree - out.shape[1]), value=-1)


def _occluded(keys: Tensor, list_: Tensor, worth: Tensor, degree: int) -> Tensor:
    """The links of some keys, from their candidates ``[V', P]``, best first, and the inner products with them."""
    real = list_ >= 0
    x = keys[list_.clamp(min=0)]  # [V', P, D]
    between = x @ x.mT  # [V', P, P]
    kept = torch.zeros_like(real)
    for c in range(list_.shape[1]):
        hidden = ((between[:, c] > worth[:, c, None]) & kept).any(-1)
        kept[:, c] = real[:, c] & ~hidden
    place = torch.arange(list_.shape[1], device=list_.device).expand_as(list_)
    order = (place + (~kept) * list_.shape[1] + (~real) * 2 * list_.shape[1]).argsort(-1)[:, :degree]
    return list_.gather(1, order)


def _chained(keys: Tensor, links: Tensor, entry: Tensor) -> Tensor:
    """Two more links a key ``[G, M, 2]`` (first child, next sibling), by which every key can be reached from the entry.

    links ``[G, M, W]``, counted over all heads, as is the result.
    """
    g, m, _ = keys.shape
    device = keys.device
    flat, known = links.reshape(g * m, -1), torch.zeros(g * m + 1, dtype=torch.bool, device=device)
    front = entry + torch.arange(g, device=device) * m
    known[front] = True
    while len(front):
        ahead = flat[front].reshape(-1).unique()
        ahead = ahead[ahead >= 0]
        front = ahead[~known[ahead]]
        known[front] = True
    out = torch.full((g * m, 2), -1, dtype=torch.int64, device=device)
    known = known[:-1].view(g, m)
    for head in range(g):
        lost, reached = (~known[head]).nonzero().squeeze(-1), known[head].nonzero().squeeze(-1)
        if not len(lost):
            continue
        index, score = exact(keys[head, lost], keys[head, reached], None, 1)
        parent, score = reached[index.squeeze(-1)], score.squeeze(-1)
        order = score.sort(descending=True, stable=True).indices
        order = order[parent[order].sort(stable=True).indices]
        lost, parent = lost[order] + head * m, parent[order] + head * m
        eldest = torch.ones_like(lost, dtype=torch.bool)
        eldest[1:] = parent[1:] != parent[:-1]
        out[parent[eldest], 0] = lost[eldest]
        younger = (~eldest).nonzero().squeeze(-1)
        out[lost[younger - 1], 1] = lost[younger]
    return out.view(g, m, 2)
