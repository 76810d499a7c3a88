"""What every index over stored keys can do: be built for some rows, be searched by query head, move with its batch rows.

An index holds positions, never keys: it is shown the keys at each search. Scores are inner products, without scale.

Axes: B batch, G key/value heads, R query heads of a KV head, M keys, N queries, D head width, K keys asked for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.core.errors import InvalidInput

SCORES = 1 << 24  # scores held at once


class Found(NamedTuple):
    """index ``[B, G, R, K]`` int64 (-1: fewer were found), score ``[B, G, R, K]`` (-inf there), scanned ``[B, G, R]`` keys
    whose inner product was taken.
    """

    index: Tensor
    score: Tensor
    scanned: Tensor


@dataclass(frozen=True)
class Index(ABC):
    """Parts by name, batch first; integers are filled with -1 where rows differ in size, numbers with 0."""

    kind: ClassVar[str]

    parts: dict[str, Tensor]

    @abstractmethod
    def search(self, q: Tensor, keys: Tensor, k: int, first: int = 0) -> Found:
        """The `k` keys of largest inner product, best first.

        q ``[B, G, R, D]``, keys ``[B, G, >= first + M, D]`` of which key 0 of the index is number `first`.
        """

    @property
    def counts(self) -> Tensor:
        """``[B]`` keys of each row that are indexed."""
        return self.parts["counts"]

    def blank(self, rows: int) -> Index:
        """An index of `rows` rows of this kind that hold nothing, to `put` rows into."""
        out = self.select(torch.zeros(rows, dtype=torch.int64))
        out.counts.zero_()
        return out

    def select(self, rows: Tensor) -> Index:
        """The index of the batch rows `rows`."""
        return type(self)({name: x.index_select(0, rows.to(x.device)) for name, x in self.parts.items()})

    def put(self, rows: Tensor, other: Index) -> Index:
        """The index with the batch rows `rows` replaced by those of `other`."""
        parts = {}
        for name, x in self.parts.items():
            y = other.parts[name]
            shape = [max(a, b) for a, b in zip(x.shape[1:], y.shape[1:], strict=True)]
            x, y = _padded(x, shape), _padded(y, shape)
            parts[name] = x.index_copy(0, rows.to(x.device), y)
        return type(self)(parts)

    def bytes(self) -> int:
        """Bytes of the parts."""
        return sum(x.numel() * x.element_size() for x in self.parts.values())


def _padded(x: Tensor, shape: list[int]) -> Tensor:
    pads = [pad for have, want in zip(reversed(x.shape[1:]), reversed(shape), strict=True) for pad in (0, want - have)]
    fill = -1 if x.dtype.is_signed and not x.is_floating_point() else 0
    return F.pad(x, pads, value=fill) if any(pads) else x


def wide(x: Tensor) -> Tensor:
    """`x` in float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def gathered(keys: Tensor, index: Tensor) -> Tensor:
    """Of keys ``[B, G, M, D]`` those at index ``[B, G, ..]`` (-1 reads key 0): ``[B, G, .., D]``. Only these are read."""
    b, g, m, d = keys.shape
    if keys.is_contiguous():
        flat = index.clamp(min=0).reshape(b * g, -1) + (torch.arange(b * g, device=index.device) * m)[:, None]
        return keys.view(-1, d).index_select(0, flat.reshape(-1)).view(*index.shape, d)
    row = torch.arange(b, device=index.device).view(b, 1, 1)
    head = torch.arange(g, device=index.device).view(1, g, 1)
    return keys[row, head, index.clamp(min=0).reshape(b, g, -1)].view(*index.shape, d)


def top(score: Tensor, index: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` best of the last axis, best first: (index, score), -1 and -inf where there are fewer."""
    if score.shape[-1] < k:
        score = F.pad(score, (0, k - score.shape[-1]), value=-torch.inf)
        index = F.pad(index, (0, k - index.shape[-1]), value=-1)
    best = score.topk(k, dim=-1)
    at = index.gather(-1, best.indices)
    return at.masked_fill(best.values == -torch.inf, -1), best.values


def exact(q: Tensor, keys: Tensor, counts: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """(index, score) ``[.., N, k]`` of the largest inner products: q ``[.., N, D]``, keys ``[.., M, D]``, in pieces.

    counts: ``[..]``, keys of each that count, or None for all.
    """
    (n, m), lead = (q.shape[-2], keys.shape[-2]), max(1, q.shape[:-2].numel())
    indices, scores = [], []
    column = torch.arange(m, device=q.device)
    for part in q.split(max(1, SCORES // max(1, lead * m)), dim=-2):
        score = wide(part) @ wide(keys).mT
        if counts is not None:
            score = score.masked_fill(column >= counts[..., None, None], -torch.inf)
        index, best = top(score, column.expand_as(score), k)
        indices.append(index)
        scores.append(best)
    assert n
    return torch.cat(indices, -2), torch.cat(scores, -2)


def check(keys: Tensor, queries: Tensor, counts: Tensor | None) -> Tensor:
    """The counts ``[B]``. Raises `InvalidInput` unless keys ``[B, G, M, D]`` and queries ``[B, H, N, D]`` fit."""
    if keys.ndim != 4 or queries.ndim != 4:
        raise InvalidInput(
            f"an index takes keys [B, G, M, D] and queries [B, H, N, D]; got {tuple(keys.shape)} and {tuple(queries.shape)}"
        )
    if queries.shape[2] == 0:
        raise InvalidInput("an index of this kind is built from queries, and none was given; pass the prompt's queries")
    fits = queries.shape[0] == keys.shape[0] and queries.shape[3] == keys.shape[3]
    if not fits or queries.shape[1] % keys.shape[1]:
        raise InvalidInput(
            f"an index over keys {tuple(keys.shape)} cannot be built from queries {tuple(queries.shape)}: batch, head width, "
            "and query heads in whole groups must agree"
        )
    if counts is None:
        return torch.full((keys.shape[0],), keys.shape[2], dtype=torch.int64, device=keys.device)
    return counts.to(keys.device, torch.int64)
