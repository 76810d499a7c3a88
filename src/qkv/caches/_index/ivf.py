r"""Cells: keys in k-means cells, of which a query opens the few whose centres have the largest inner product with it.

    cell(s) = argmin_c |k_s - centre_c|^2,    opened(q) = top `probes` of q . centre_c

Centres start at keys evenly spaced in time and move `ROUNDS` times; a cell that runs empty keeps its centre. The number of
cells is the square root of the row's keys.

Axes: see `qkv.caches._index.index`; C cells.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from qkv.caches._index.index import Found, Index, check, gathered, top, wide

ROUNDS = 8


@final
@dataclass(frozen=True)
class CellIndex(Index):
    """centre ``[B, G, C, D]``, order ``[B, G, M]`` keys sorted by cell, start ``[B, G, C + 1]`` where each cell begins."""

    kind: ClassVar[str] = "ivf"

    @classmethod
    def build(
        cls, keys: Tensor, queries: Tensor | None = None, counts: Tensor | None = None, *, probes: int = 8
    ) -> CellIndex:
        """Keys ``[B, G, M, D]``; counts ``[B]`` keys of each row; probes: cells that a query opens."""
        counts = check(keys, keys[:, :, :1] if queries is None else queries, counts)
        made: Index | None = None
        for row, count in enumerate(counts.tolist()):
            centre, order, start = _cells(wide(keys[row, :, :count]))
            index = order.new_tensor
            one = cls(
                {
                    "counts": index([count]),
                    "cells": index([centre.shape[1]]),
                    "probes": index([probes]),
                    "centre": centre[None],
                    "order": order[None].int(),
                    "start": start[None].int(),
                }
            )
            if made is None:
                made = one.select(torch.zeros(len(counts), dtype=torch.int64))
            else:
                made = made.put(torch.tensor([row]), one)
        assert isinstance(made, CellIndex)
        return made

    def search(self, q: Tensor, keys: Tensor, k: int, first: int = 0) -> Found:
        """See `Index.search`."""
        centre, cells = self.parts["centre"], self.parts["cells"].masked_fill(self.counts == 0, 0)
        b, g, r, _ = q.shape
        q = wide(q)
        near = q @ centre.mT  # [B, G, R, C]
        near = near.masked_fill(torch.arange(near.shape[-1], device=q.device) >= cells[:, None, None, None], -torch.inf)
        probes = min(int(self.parts["probes"][0]), near.shape[-1])
        opened = near.topk(probes, dim=-1)
        start = self.parts["start"].long()[:, :, None].expand(b, g, r, -1)
        begin = start.gather(-1, opened.indices)
        size = (start.gather(-1, opened.indices + 1) - begin).masked_fill(opened.values == -torch.inf, 0)
        ends = size.cumsum(-1)  # [B, G, R, P]
        total = ends[..., -1]
        step = torch.arange(int(total.max()), device=q.device).expand(b, g, r, -1).contiguous()
        cell = torch.searchsorted(ends.contiguous(), step, right=True).clamp(max=probes - 1)
        place = step - (ends - size).gather(-1, cell) + begin.gather(-1, cell)
        real = step < total[..., None]
        order = self.parts["order"].long()[:, :, None].expand(b, g, r, -1)
        index = order.gather(-1, place.masked_fill(~real, 0)).masked_fill(~real, -1)
        score = (wide(gathered(keys, index + first)) @ q.unsqueeze(-1)).squeeze(-1).masked_fill(~real, -torch.inf)
        return Found(*top(score, index, k), total)


def _cells(keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(centres ``[G, C, D]``, keys sorted by cell ``[G, M]``, where cells begin ``[G, C + 1]``) of keys ``[G, M, D]``."""
    g, m, d = keys.shape
    c = max(1, round(m**0.5))
    centre = keys[:, torch.arange(c, device=keys.device) * m // c].clone()
    cell = _nearest(keys, centre)
    for _ in range(ROUNDS):
        total = torch.zeros_like(centre).scatter_add_(1, cell[..., None].expand(-1, -1, d), keys)
        size = torch.zeros(g, c, dtype=keys.dtype, device=keys.device).scatter_add_(1, cell, keys.new_ones(g, m))
        centre = torch.where(size[..., None] > 0, total / size[..., None].clamp(min=1), centre)
        cell = _nearest(keys, centre)
    cell, order = cell.sort(dim=1, stable=True)
    edges = torch.arange(c + 1, device=keys.device).expand(g, -1).contiguous()
    return centre, order, torch.searchsorted(cell.contiguous(), edges)


def _nearest(keys: Tensor, centre: Tensor) -> Tensor:
    """``[G, M]``: the centre nearest to each key."""
    return (2 * keys @ centre.mT - centre.square().sum(-1)[:, None]).argmax(-1)
