r"""Recycled Attention: a full step writes down what drew most attention, the steps after it read that and what is new.

    full step       a_m = max over the query heads of a KV head of softmax(q K^T)_m,   R = top-K of a;  every key is read
    recycled step   R and every token since the last full step are read; of R the least worthy make room (or R stays: `grow`)

The last token of a prompt is the first full step. Then every `stride`-th step is full, or, with `similarity`, a step whose query
has turned away: mean over heads of cos(q_t, q_full) < similarity, q_full rotated forward to the place of q_t so that only its
content counts (our choice; the paper's schedules are known from memory). Each row of a batch has its own schedule. A prompt is
read in full; nothing is evicted, and the keys stay where they are. K is `budget` of what is stored at the full step, a share
being at least 64 tokens.

`training_mask` is the same pattern for continued training: in every block of `stride` queries the first sees everything, the
others its top-K and their own block.

Axes: B batch, H query heads, G key/value heads, M keys, K recycled tokens, D head width. Paper: arXiv:2411.05787 (its code was
not readable: the schedule's defaults are ours).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from qkv.core.cache import CacheSpec, require
from qkv.core.reader import Reader, Reading, Selection, share
from qkv.core.spec import Limit, budget_param, param

LEAST = 64  # tokens of a budget that is a share


def reference(attention: Tensor, groups: int, *, top_k: int) -> list[list[set[int]]]:
    """R of a full step from its map ``[B, H, M]``: for every row and KV head the set of positions."""
    b, h, m = attention.shape
    drawn = attention.reshape(b, groups, h // groups, m).amax(2)
    return [[set(x.topk(min(top_k, m)).indices.tolist()) for x in row] for row in drawn]


def training_mask(attention: Tensor, *, stride: int, top_k: int) -> Tensor:
    """Bool ``[B, G, T, T]`` (True = may attend) from causal maps ``[B, G, T, T]``; what is chosen carries no gradient."""
    t = attention.shape[-1]
    i = torch.arange(t, device=attention.device)
    first = i - i % stride  # [T] the full query of each block
    causal = i[None, :] <= i[:, None]
    chosen = attention.detach().topk(min(top_k, t), dim=-1).indices
    marked = torch.zeros_like(attention, dtype=torch.bool).scatter_(-1, chosen, True) & causal
    full = (i == first)[:, None] | (i[None, :] >= first[:, None])
    return (marked[:, :, first] | full) & causal


@final
@dataclass(frozen=True, kw_only=True)
class Recycled(Reader):
    """Full steps now and then, and what they found in between."""

    spec: ClassVar[CacheSpec] = CacheSpec(
        id="recycled",
        title="Recycled Attention: Efficient inference for long-context language models",
        paper="arXiv:2411.05787",
        source="paper",
        summary="Keeps everything; every few steps reads it all and notes the most attended tokens for the steps between.",
        shown="at an eighth of the keys, full every 10 steps, closer to the full model than H2O and a sink window of that size",
        honest="no memory is saved; a step that needs another place waits for the next full step",
        limits=(
            Limit("full", {"budget": 1.0}, "budget >= length: exact attention"),
            Limit("full", {"stride": 1, "similarity": None}, "every step is full"),
            Limit("full", {"similarity": 1.1}, "no query is similar enough: every step is full"),
        ),
        evicts=False,
        trials=({}, {"similarity": 0.0}, {"grow": True, "group_reduce": "mean"}),
        small={"budget": 9, "stride": 4},
    )
    budget: int | float = budget_param(0.125, "K, tokens read by a recycled step: an int is a number, a float a share")
    stride: int = param(10, "steps from one full step to the next", low=1)
    similarity: float | None = param(None, "full steps where the query is less similar than this (None: by stride)")
    group_reduce: Literal["max", "mean"] = param("max", "how the query heads of a KV head combine")
    grow: bool = param(False, "new tokens are read on top of K instead of within it")

    stateful: ClassVar[bool] = True

    def validate(self) -> None:
        """Room for the tokens since a full step."""
        require(
            not isinstance(self.budget, int) or self.grow or self.similarity is not None or self.budget >= self.stride
            or self.stride == 1,
            f"recycled: budget={self.budget} has no room for the tokens of stride={self.stride} steps; choose a larger budget, a "
            "smaller stride, or grow=True",
        )  # fmt: skip

    def top_k(self, tokens: Tensor) -> Tensor:
        """K at a full step."""
        k = share(self.budget, tokens)
        return k if isinstance(self.budget, int) else k.clamp(min=LEAST)

    def reads(self, tokens: Tensor) -> Tensor:
        """K, and with `grow` the tokens of a stride."""
        return self.top_k(tokens) + (self.stride if self.grow else 0)

    def observe(self, view: Reading) -> None:
        """The last token of a prompt is a full step."""
        if view.whole:
            self._note(*view.last())

    def _note(self, view: Reading, rows: Tensor) -> None:
        """A full step of the bool rows ``[B]``: R by falling worth, where it was, and the query."""
        notes = view.notes
        drawn = view.grouped(view.logits().softmax(-1).nan_to_num(), self.group_reduce)[:, :, 0]  # [B, G, S]
        most = max(1, min(int(self.top_k(torch.tensor(drawn.shape[-1]))), drawn.shape[-1]))
        top, chosen = drawn.topk(most, dim=-1)
        rank = torch.arange(most, device=chosen.device)
        keep = (rank < self.top_k(view.tokens)[:, :, 0]) & (rank < view.tokens[:, :, 0]) & (top >= 0)
        chosen = chosen.masked_fill(~keep, -1)
        at, query = view.position[:, 0], view.queries[:, :, 0]
        if "chosen" in notes:
            old = notes["chosen"]
            width = max(most, old.shape[-1])
            old, chosen = (torch.nn.functional.pad(x, (0, width - x.shape[-1]), value=-1) for x in (old, chosen))
            chosen = torch.where(rows[:, None, None], chosen, old)
            at = torch.where(rows, at, notes["full"])
            query = torch.where(rows[:, None, None], query, notes["query"])
        else:
            at = torch.where(rows, at, -1)
        notes["chosen"], notes["full"], notes["query"] = chosen, at.clone(), query.clone()

    def _due(self, view: Reading) -> Tensor:
        """Bool ``[B]``: rows whose step is full."""
        at, full = view.position[:, 0], view.notes["full"]
        if self.similarity is None:
            return (full < 0) | (at - full >= self.stride)
        then, now = view.notes["query"], view.queries[:, :, 0]
        rope = view.geometry.rope
        if rope is not None and rope.fixed:
            then = rope.rotate(then, (at - full)[:, None].expand(-1, then.shape[1]))
        alike = torch.nn.functional.cosine_similarity(then, now, dim=-1).mean(-1)
        return (full < 0) | (alike < self.similarity)

    def choose(self, view: Reading) -> Selection | None:
        """Full, recycled, or (rows of a batch that differ) either."""
        at = view.position[:, 0]
        covered = (self.reads(view.tokens) >= view.tokens)[:, 0, 0, 0] & (
            at >= 0
        )  # reads everything, and notes nothing
        due = (at >= 0) & ~covered
        if "chosen" in view.notes:
            due = due & self._due(view)
        whole = due | covered
        if bool(due.any()):
            self._note(view, due)
        if bool((whole | (at < 0)).all()):
            return None
        some = self._recycled(view)
        if not bool(whole.any()):
            return some
        assert some.valid is not None
        count = view.keys.shape[2]
        every = torch.arange(count, device=at.device).expand(*some.index.shape[:3], -1)
        mine = torch.zeros(*every.shape[:3], count + 1, dtype=torch.bool, device=at.device)
        mine.scatter_(-1, some.index.masked_fill(~some.valid, count), True)
        return Selection(
            every, torch.where(whole[:, None, None, None], every <= at[:, None, None, None], mine[..., :count])
        )

    def _recycled(self, view: Reading) -> Selection:
        """R, without those that make room, and every token since."""
        chosen, full = view.notes["chosen"], view.notes["full"]
        at = view.position[:, 0]
        since = (at - full).clamp(min=0)  # [B]
        new = at[:, None] - torch.arange(int(since.max()), device=at.device)  # [B, L] the newest first
        fresh = new > full[:, None]
        room = self.top_k(view.tokens)[:, :, 0]  # [B, 1, 1]
        if not self.grow:
            fresh = fresh & (torch.arange(new.shape[1], device=at.device) < room[:, 0])
            room = (room - since[:, None, None]).clamp(min=0)
        rank = torch.arange(chosen.shape[-1], device=at.device)
        g = chosen.shape[1]
        index = torch.cat((chosen, new[:, None].expand(-1, g, -1)), -1)
        valid = torch.cat(((chosen >= 0) & (rank < room), fresh[:, None].expand(-1, g, -1)), -1)
        valid = valid & (at >= 0)[:, None, None]
        index = torch.where(valid, index, at.clamp(min=0)[:, None, None])
        return Selection(index.unsqueeze(2), valid.unsqueeze(2))
