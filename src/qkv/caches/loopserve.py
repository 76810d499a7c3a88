r"""LoopServe: every turn's prompt on the lines that matter, and keys chosen anew every few answered tokens.

Prompt of a turn. Rows of the exact map are sampled (the last `sample` queries and a tenth of the others); per head the vertical
and slash lines with most mass are taken, overlaps counted once, until they cover `alpha` of it. All queries of the turn attend to
the cells on these lines, the diagonal and key 0, with a softmax over them (see `qkv.core.vertical_slash`). Offsets are of
positions, so slashes reach into earlier turns.

Answer. The whole history stays. A step reads a set C per KV head and every token since C was chosen. C is the `budget` tokens of
largest score, `sinks` and the last `refresh` tokens always among them:

    score_m = sum over the latest queries p, and the query heads of the KV head, of softmax_m(scale q_p . k_m)

with the last `window` queries when a prompt ends, and the `refresh` latest queries of the answer every `refresh` steps, over all
that is stored: a dropped token can return. A choice serves from the next step on.

The abstract gives both phases. Completed here: constants, the row sample (evenly spaced where chance would do), forced cells and
tokens, the sum over a group's heads. A sum over sixteen queries is a vote on their surroundings, in which a number
that one of them looks for may be lost: ``window=2, refresh=8`` lets few queries choose often.

Axes: B batch, H query heads, G key/value heads, W queries that choose, S slots, K chosen. Paper: arXiv:2507.13681.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from qkv.core.attend import attend
from qkv.core.cache import CacheSpec, Compute, Geometry, require
from qkv.core.reader import FIRM, Reader, Reading, Selection, share
from qkv.core.spec import Limit, budget_param, param
from qkv.core.vertical_slash import VerticalSlash


def reference(queries: Tensor, keys: Tensor, *, budget: int, sinks: int, refresh: int, scale: float) -> Tensor:
    """C of one KV head: queries ``[R, W, D]`` at the last W positions, keys ``[S, D]`` -> slots, ascending.

    One query head and token at a time.
    """
    s, w = keys.shape[0], queries.shape[1]
    score = torch.zeros(s, dtype=keys.dtype)
    for head in queries:
        for i, q in enumerate(head):
            seen = s - w + i + 1
            score[:seen] += torch.softmax(keys[:seen] @ q * scale, 0)
    forced = [m for m in range(s) if m < sinks or m >= s - refresh]
    others = sorted((m for m in range(s) if m not in forced), key=lambda m: -float(score[m]))
    return torch.tensor(sorted([*forced, *others][:budget]))


def _newest(view: Reading, many: int) -> tuple[Tensor, Tensor]:
    """The newest queries of each row ``[B, H, W, D]`` and their positions ``[B, W]``, -1 = none."""
    asked, column = view.position.topk(min(many, view.position.shape[1]), dim=-1)
    place = column[:, None, :, None].expand(-1, view.queries.shape[1], -1, view.queries.shape[3])
    return view.queries.gather(2, place), asked


@final
@dataclass(frozen=True, kw_only=True)
class LoopServe(Reader):
    """Sparse prompts, and a read set that follows the answer."""

    spec: ClassVar[CacheSpec] = CacheSpec(
        id="loopserve",
        title="LoopServe: An Adaptive Dual-phase LLM Inference Acceleration System for Multi-Turn Dialogues",
        paper="arXiv:2507.13681",
        source="abstract",
        summary="Prompts attend on the vertical and slash lines that carry most mass; answers re-choose what they read.",
        shown="a dialogue about several passages is answered where one choice at the end of the prompt fails",
        honest="no memory is saved; to choose a prompt's lines costs more than exact attention up to 8000 tokens at least; a "
        "passage that is needed suddenly waits up to `refresh` tokens for the next choice",
        limits=(Limit("full", {"alpha": 1.0, "budget": 1.0}, "every line and every token: exact attention"),),
        evicts=False,
        trials=({}, {"alpha": 1.0}),
        small={"budget": 9, "refresh": 3, "sinks": 1, "window": 4, "sample": 5},
    )
    alpha: float = param(0.95, "share of the sampled mass that a prompt's lines cover (1: exact)", low=0.0, high=1.0)
    budget: int | float = budget_param(1024, "tokens chosen per KV head: an int is a number, a float a share")
    refresh: int = param(16, "answered tokens from one choice to the next, all of which are read", low=1)
    sample: int = param(64, "last queries of a prompt whose rows are sampled; of the others a tenth", low=1)
    window: int = param(16, "last queries of a prompt that make its choice", low=1)
    sinks: int = param(4, "first tokens that are always chosen", low=0)

    stateful: ClassVar[bool] = True

    def validate(self) -> None:
        """Room for what is always chosen."""
        require(self.alpha > 0, f"loopserve: alpha={self.alpha} must lie in (0, 1]: lines that cover nothing are none")
        require(
            not isinstance(self.budget, int) or self.budget >= self.refresh + self.sinks,
            f"loopserve: budget={self.budget} has no room for the last refresh={self.refresh} tokens and sinks={self.sinks}",
        )

    def prompt(self, geometry: Geometry) -> Compute:
        """The lines of a prompt."""
        return VerticalSlash(self.alpha, self.sample, 0.1, self.id)

    def reads(self, tokens: Tensor) -> Tensor:
        """C, and what came since."""
        return self._chosen(tokens) + self.refresh

    def _chosen(self, tokens: Tensor) -> Tensor:
        return share(self.budget, tokens).clamp(min=self.refresh + self.sinks)

    def observe(self, view: Reading) -> None:
        """The end of a prompt chooses; a query of the answer is kept until it has."""
        notes = view.notes
        if view.whole:
            self._choose(view, *_newest(view, self.window), view.position.amax(-1) >= 0)
            notes.pop("queries", None)
            return
        (b, h, n, d), at = view.queries.shape, view.position
        if "queries" not in notes:
            notes["queries"] = view.queries.new_zeros(b, h, self.refresh, d)
            notes["asked"] = torch.full((b, self.refresh), -1, dtype=torch.int64, device=at.device)
        if "full" not in notes:
            notes["full"] = torch.full((b,), -1, dtype=torch.int64, device=at.device)
            notes["chosen"] = torch.full((b, view.keys.shape[1], 1), -1, dtype=torch.int64, device=at.device)
        for i in range(n):
            slot = (at[:, i] % self.refresh)[:, None]  # [B, 1]
            real = at[:, i : i + 1] >= 0
            asked = torch.where(real, at[:, i : i + 1], notes["asked"].gather(1, slot))
            place = slot[:, None, :, None].expand(-1, h, -1, d)
            query = torch.where(
                real[:, :, None, None], view.queries[:, :, i : i + 1], notes["queries"].gather(2, place)
            )
            notes["asked"] = notes["asked"].scatter(1, slot, asked)
            notes["queries"] = notes["queries"].scatter(2, place, query)
        if bool((self.reads(view.tokens) >= view.tokens).all()):  # everything is read, so a choice costs nothing more
            self._refresh(view)

    def _refresh(self, view: Reading) -> None:
        """Choose anew for the rows whose turn it is."""
        notes, at = view.notes, view.position.amax(-1)
        due = (at >= 0) & (at - notes["full"] >= self.refresh)
        if bool(due.any()):
            asked = torch.where(notes["asked"] > notes["full"][:, None], notes["asked"], -1)
            self._choose(view, notes["queries"], asked, due)

    def _choose(self, view: Reading, queries: Tensor, asked: Tensor, rows: Tensor) -> None:
        """C of the bool rows ``[B]``, from queries ``[B, H, W, D]`` at positions ``[B, W]`` (-1 = none)."""
        notes, mine = view.notes, rows.nonzero().squeeze(-1)
        if not len(mine):
            return
        b, g, s = view.keys.shape[:3]
        at = view.position.amax(-1)
        seen = torch.arange(s, device=at.device) <= asked[mine][:, None, :, None]  # [B', 1, W, S]
        score = attend(
            queries[mine], view.keys[mine], view.keys[mine][..., :1], mask=seen, scale=view.scale, mass=True,
            mass_rows=asked[mine] >= 0,
        ).mass  # fmt: skip
        assert score is not None
        score = score.reshape(len(mine), g, -1, s).sum(2)  # [B', G, S]
        now = at[mine][:, None, None]
        slot = torch.arange(s, device=at.device)
        score = score.masked_fill((slot < self.sinks) | (slot > now - self.refresh), FIRM)
        score = score.masked_fill(slot > now, -torch.inf)
        keep = self._chosen(now + 1)  # [B', 1, 1]
        most = min(s, int(keep.max()))
        top, chosen = score.topk(most, dim=-1)
        rank = torch.arange(most, device=at.device)
        chosen = chosen.masked_fill((rank >= keep) | (top == -torch.inf), -1)
        old = notes.get("chosen")
        width = max(most, 0 if old is None else old.shape[-1])
        every = torch.full((b, g, width), -1, dtype=torch.int64, device=at.device)
        if old is not None:
            every[..., : old.shape[-1]] = old
        every[mine] = torch.nn.functional.pad(chosen, (0, width - most), value=-1)
        full = notes.get("full")
        full = torch.full_like(at, -1) if full is None else full
        notes["chosen"], notes["full"] = every, torch.where(rows, at, full)

    def choose(self, view: Reading) -> Selection | None:
        """C and what came since; rows short enough read everything. Then, if it is time, the next C."""
        notes, at = view.notes, view.position[:, 0]
        covered = (self.reads(view.tokens) >= view.tokens)[:, 0, 0, 0]
        chosen, full = notes["chosen"], notes["full"]
        since = at[:, None] - torch.arange(self.refresh, device=at.device)  # [B, refresh]
        fresh = since > full[:, None]
        index = torch.cat((chosen, since[:, None].expand(-1, chosen.shape[1], -1)), -1)
        valid = torch.cat((chosen >= 0, fresh[:, None].expand(-1, chosen.shape[1], -1)), -1)
        valid = valid & (at >= 0)[:, None, None] & (index >= 0)
        some = Selection(torch.where(valid, index, 0).unsqueeze(2), valid.unsqueeze(2))
        if bool(covered.any()):
            count = view.keys.shape[2]
            every = torch.arange(count, device=at.device).expand(*some.index.shape[:3], -1)
            mine = torch.zeros(*every.shape[:3], count + 1, dtype=torch.bool, device=at.device)
            mine.scatter_(-1, some.index.masked_fill(~valid.unsqueeze(2), count), True)
            seen = every <= at[:, None, None, None]
            some = Selection(every, torch.where(covered[:, None, None, None], seen, mine[..., :count]))
        self._refresh(view)
        return some
