"""The queries that will judge tokens that wait: which they are, what is kept of them, and the attention they paid.

Axes: B batch, R rows of a group, H query heads, G key/value heads, P probes, W waiting and new tokens, D head width.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

import torch
from torch import Tensor

from qkv.caches._saliency import probe_mass, probe_rows
from qkv.caches._stores.blocks import span
from qkv.caches._stores.dense import grown, resized


def on_device(places: list[int], device: torch.device) -> Tensor:
    """Places as int64 on the device, which the host does not wait for."""
    x = torch.tensor(places, dtype=torch.int64)
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and places else x.to(device)


class Probes:
    """Probes among at most `every` waiting tokens.

    many: (newest, others) for a number of tokens and whether they are decoded. plan: places of the probes when tokens come one
    by one. query ``[B, H, P, D]``, lse ``[B, H, P]``: of those that wait; room for one more, which steps that are no probes
    overwrite when they are captured.
    """

    def __init__(self, many: Callable[[int, bool], tuple[int, int]], every: int, seed: int, wanted: bool) -> None:
        self.many, self.seed, self.wanted = many, seed, wanted
        self.plan = probe_rows(0, every, *many(every, True), seed) if wanted else []
        self.reset()

    def reset(self) -> None:
        """Forget what is kept."""
        self.query: Tensor | None = None
        self.lse: Tensor | None = None
        self.places: Tensor | None = None

    def new(self, m: int, n: int, full: bool) -> list[int]:
        """Places of the probes among n new tokens behind m that wait; full: they become a block together."""
        if not self.wanted:
            return []
        if full and n > 1:
            return probe_rows(m, m + n, *self.many(m + n, False), self.seed)
        return self.plan[bisect_left(self.plan, m) : bisect_left(self.plan, m + n)]

    def keep(self, rows: list[int], batch: int, m: int, q: Tensor, new: list[int], lse: Tensor | None) -> None:
        """Keep the probes `new` of q ``[R, H, N, D]``, whose first token has place m, and their lse (None: nothing is stored)."""
        wide = torch.promote_types(q.dtype, torch.float32)
        first = bisect_left(self.plan, m)
        part, at = slice(first, first + len(new)), span(rows)
        if self.query is None or self.lse is None:
            self.query = q.new_zeros((batch, q.shape[1], 0, q.shape[3]), requires_grad=False)
            self.lse = q.new_zeros((batch, q.shape[1], 0), dtype=wide, requires_grad=False)
        if self.query.shape[2] < part.stop:
            size = min(len(self.plan) + 1, grown(0, part.stop))
            self.query, self.lse = (resized(x, size, x.shape[2]) for x in (self.query, self.lse))
        q = q.detach()
        self.query[at, :, part] = q if q.shape[2] == 1 else q[:, :, on_device(new, q.device) - m]
        if lse is not None:
            self.lse[at, :, part] = lse.detach()

    def mass(
        self, rows: list[int], m: int, q: Tensor, keys: Tensor, new: list[int], lse: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Attention ``[R, H, W]`` that all probes paid the keys ``[R, G, W, D]``, and their places; q: the new queries."""
        old = self.plan[: bisect_left(self.plan, m)]
        at = on_device(old + new, q.device)
        x = q[:, :, at[len(old) :] - m]
        if old:
            assert self.query is not None and self.lse is not None
            x = torch.cat((self.query[span(rows)][:, :, : len(old)], x), 2)
            if lse is not None:
                lse = torch.cat((self.lse[span(rows)][:, :, : len(old)], lse), 2)
        return probe_mass(x, keys, at, scale=scale, lse=lse), at

    # -- captured steps -----------------------------------------------------------------------------------------------

    def ready(self, keys: Tensor, heads: int, every: int) -> None:
        """Room for every probe, and the table of their places: then steps can be captured. keys ``[B, G, ., D]``: what waits."""
        if not self.plan:
            return
        if self.places is None:
            table = [len(self.plan)] * every
            for i, place in enumerate(self.plan):
                table[place] = i
            self.places = torch.tensor(table, device=keys.device)
        b, size = keys.shape[0], len(self.plan) + 1
        if self.query is None or self.lse is None:
            self.query = keys.new_zeros(b, heads, size, keys.shape[3])
            self.lse = keys.new_zeros((b, heads, size), dtype=torch.promote_types(keys.dtype, torch.float32))
        elif self.query.shape[2] < size:
            self.query, self.lse = (resized(x, size, x.shape[2]) for x in (self.query, self.lse))

    def note(self, waiting: Tensor, q: Tensor, lse: Tensor) -> None:
        """Keep one query of each row if it is a probe; waiting: int64 ``[B]``, its place in its row. `ready` came before."""
        if not self.plan:
            return
        assert self.places is not None and self.query is not None and self.lse is not None
        at = self.places[waiting].view(-1, 1, 1)  # [B, 1, 1]
        self.query.scatter_(2, at.unsqueeze(-1).expand(-1, q.shape[1], 1, q.shape[3]), q)
        self.lse.scatter_(2, at.expand(-1, q.shape[1], 1), lse.to(self.lse.dtype))
