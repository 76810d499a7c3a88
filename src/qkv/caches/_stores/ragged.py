"""Slots of a length of its own for every row and KV head: one flat store of segments, the bytes of what is dropped freed.

    keys [T, D], values [T, E];   head (b, g) owns base[b, g] .. base[b, g] + cap[b, g]

A prompt is absorbed densely (one layer at a time), a scorer gives every slot of every head its worth, and the layer's total is
shared out among its heads; then each head keeps its best slots. A decoding step writes into one free slot of each segment and
frees the least worthy, or appends, as the scorer does alone. Positions and the scorer's state are small and padded to the
longest head; slots are in no order.

Axes: B batch, H query heads, G key/value heads, R = H / G, N new queries, S the longest capacity, T slots in all, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast, final

import torch
from torch import Tensor

from qkv.caches._stores.dense import grown
from qkv.caches._stores.ranked import RankedCache
from qkv.caches._stores.recording import Recording
from qkv.core.attend import attend
from qkv.core.cache import NO_LIMIT, CacheSpec, Geometry, Now, Policy, Step, View
from qkv.core.errors import Refused, StateError
from qkv.core.kernel import kernel, served

Allocate = Callable[[Tensor, Tensor], Tensor]
"""``allocate(worth [B, G, S], keep [B, 1, 1]) -> chosen`` bool ``[B, G, S]``: at most G keep slots of a row in all."""


@final
@dataclass(frozen=True, kw_only=True)
class _Scout(Policy):
    """Keeps everything, and notes what its scorer thinks of it."""

    spec: ClassVar[CacheSpec] = CacheSpec(id="scout", title="Everything, with its worth", paper="baseline")
    scorer: Any = None
    notes: Any = None

    def slots(self, tokens: int) -> int:
        return NO_LIMIT

    def width(self, geometry: Geometry) -> int:
        return self.scorer.width(geometry)

    def whole_prompt(self) -> bool:
        return self.scorer.whole_prompt()

    def mass_queries(self, new: int) -> int:
        return self.scorer.mass_queries(new)

    def row_queries(self, new: int) -> int:
        return self.scorer.row_queries(new)

    def visible(self, query: Tensor, position: Tensor) -> Tensor | None:
        return self.scorer.visible(query, position)

    def observe(self, state: Tensor | None, view: View) -> Tensor | None:
        view = replace(view, keep=self.notes["keep"])
        new = self.scorer.observe(state, view)
        self.notes["worth"] = worthy(self.scorer.rank(new, view), view.position, view.newest)
        return new

    def rank(self, state: Tensor | None, view: View) -> Tensor:
        return view.position.float()


def worthy(worth: Tensor, position: Tensor, newest: Tensor) -> Tensor:
    """Worth with what every cache guarantees: the newest token first, padding and empty slots last."""
    worth = torch.nan_to_num(worth.to(torch.float32), nan=-3e38, posinf=3e38, neginf=-3e38)
    return worth.masked_fill(position == newest, torch.inf).masked_fill(position < 0, -torch.inf)


class _Segments:
    """What a scorer sees of segments while decoding: a `View` whose keys and values are gathered only if it reads them."""

    order = View.order
    per_group = View.per_group

    def __init__(self, store: RaggedCache, q: Tensor, mass: Tensor | None) -> None:
        assert store.position is not None and store.keep is not None
        self._store, self.queries, self.position = store, q, store.position
        self.keep = store.row_keep
        self.newest = store.position.amax((1, 2))[:, None, None]
        self.mass: Tensor | None = mass
        self.rows: Tensor | None = None
        self.asked: Tensor | None = None

    @property
    def keys(self) -> Tensor:
        """``[B, G, S, D]``, copied together."""
        return self._store.dense()[0]

    @property
    def values(self) -> Tensor:
        """``[B, G, S, E]``, copied together."""
        return self._store.dense()[1]


NAMES = ("keys", "values", "position", "state", "slot", "base", "cap", "keep", "row_keep")


@final
class RaggedCache(Recording):
    """See the module. allocate: shares the total out."""

    def __init__(self, scorer: Policy, geometry: Geometry, allocate: Allocate, who: str) -> None:
        self.scorer, self.geometry, self.allocate, self.who = scorer, geometry, allocate, who
        self.notes: dict[str, Any] = {}
        self.pool = RankedCache(_Scout(scorer=scorer, notes=self.notes), geometry)
        self.grows, self.width = scorer.lag() > 0, scorer.width(geometry)
        self.wanted = 0
        self.reset()

    def reset(self) -> None:
        """Forget everything (not the recording mode)."""
        self.keys: Tensor | None = None  # [T, D]
        self.values: Tensor | None = None  # [T, E]
        self.position: Tensor | None = None  # [B, G, S], -1 = empty
        self.state: Tensor | None = None  # [B, G, S, width]
        self.slot: Tensor | None = None  # [B, G, 1] the free column of each segment
        self.base: Tensor | None = None  # [B, G]
        self.cap: Tensor | None = None  # [B, G]
        self.keep: Tensor | None = None  # [B, G, 1] slots that each head keeps
        self.row_keep: Tensor | None = None  # [B, 1, 1] their mean per row, as the scorer knows it
        self.tiles: tuple[Any, ...] | None = None  # work list of the kernel
        self.caps: list[list[int]] = []  # `cap` on the host
        self.room: int | None = 0  # tokens until some segment is full; None: never
        self.held = 0  # most slots taken by any head after the last packing
        self.most = 0  # the largest `keep`
        self.since = 0  # steps since the last packing
        self.notes.clear()
        self.pool.reset()
        self.prompt = None
        self.seen = 0
        self._forget_runs()

    # -- one call ---------------------------------------------------------------------------------------------

    def attend(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """See `LayerCache.attend`."""
        if step.mask is not None:
            raise Refused(
                f"{self.who}: a custom 4-D or packed-sequence mask names columns that this cache may have evicted; pass a 2-D "
                "attention_mask"
            )
        if not step.causal:
            raise Refused(f"{self.who}: evicting caches serve causal attention only")
        return self._provisional(q, k, v, step) if self.recording else self._absorb(q, k, v, step)

    def _absorb(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        n = q.shape[2]
        waits = self.scorer.whole_prompt() and self.seen + n < (self.prompt or 0)
        if n == 1 and self.keys is not None and not waits:
            return self._one(q, k, v, step)
        return self._block(q, k, v, step)

    def _block(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """Absorb a block densely; when a prompt has ended, share out and pack."""
        n = q.shape[2]
        if self.keys is not None:
            self._unpack()
        if self.prompt is not None:
            self.pool.announce(self.prompt)
        self._budget(step, n)
        out = self.pool.attend(q, k, v, step)
        self.seen += n
        worth = self.notes.pop("worth", None)
        if worth is not None:
            pool, used = self.pool, self.pool.filled
            assert pool.keys is not None and pool.values is not None and pool.position is not None
            keys, values, position = pool.keys[:, :, :used], pool.values[:, :, :used], pool.position[:, :, :used]
            state = None if pool.state is None else pool.state[:, :, :used]
            real = (position >= 0).sum(-1, keepdim=True)  # [B, G, 1]
            assert self.row_keep is not None
            over = real > self.row_keep
            chosen = torch.where(over.any(1, keepdim=True), self.allocate(worth, self.row_keep), position >= 0)
            count = chosen.sum(-1, keepdim=True)
            self.keep = torch.where(over.any(1, keepdim=True), count, self.row_keep.expand_as(count))
            self._pack(keys, values, position, state, chosen)
            pool.reset()
        return out

    def _budget(self, step: Step, n: int) -> None:
        """Every row's mean budget from the real tokens of the prompt known so far."""
        total = max(self.seen + n, self.prompt or 0)
        b, device = step.position.shape[0], step.position.device
        pads = [0] * b if step.padding is None else (~step.padding[:, : self.seen + n]).sum(-1).tolist()
        keep = [self.scorer.slots_at(max(1, total - p), self.geometry) for p in pads]
        if min(keep) < 1:
            raise Refused(
                f"{self.who}: {min(keep)} slots a head for a prompt of {total - max(pads)} tokens; raise the budget"
            )
        self.row_keep = torch.tensor(keep, device=device).view(b, 1, 1)
        self.notes["keep"] = self.row_keep

    def _one(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """One token: write it into the free slot of every segment, attend, free the least worthy. Reads nothing on the host."""
        self._ensure_room()
        assert self.keys is not None and self.values is not None and self.position is not None
        assert self.slot is not None and self.base is not None
        at = (self.base + self.slot.squeeze(-1)).flatten()  # [B G]
        self.keys.index_copy_(0, at, k.detach().flatten(0, 2))
        self.values.index_copy_(0, at, v.detach().flatten(0, 2))
        new = step.position[:, None].expand_as(self.slot).to(self.position.dtype)
        self.position.scatter_(2, self.slot, new)
        if self.state is not None:
            self.state.scatter_(2, self.slot.unsqueeze(-1).expand(*self.slot.shape, self.width), 0.0)
        out, mass = self._read(q, step)
        view = _Segments(self, q, None)
        if mass is not None:
            mass = mass * (step.position >= 0).unsqueeze(-1)  # padding draws nothing
            if self.scorer.row_queries(1):
                view.rows, view.asked = mass.unsqueeze(2), step.position
            else:
                view.mass = mass
        seen = cast(View, view)
        if self.state is not None:
            state = self.scorer.observe(self.state, seen)
            assert state is not None
            self.state.copy_(state)
        if self.grows:
            self.slot.copy_(self._free_column())
        else:
            self._evict(seen)
        self._count()
        return out

    def _evict(self, view: View) -> None:
        """Empty the least worthy slot of every head over its share; the next token goes there, or to another free slot."""
        assert self.position is not None and self.keep is not None and self.slot is not None
        state = self.state if self.state is not None else self.scorer.observe(None, view)
        worth = worthy(self.scorer.rank(state, view), self.position, view.newest)
        empty = self.position < 0
        over = (~empty).sum(-1, keepdim=True) > self.keep
        victim = worth.masked_fill(empty, torch.inf).argmin(-1, keepdim=True)
        held = self.position.gather(2, victim)
        self.position.scatter_(2, victim, torch.where(over, torch.full_like(held, -1), held))
        self.slot.copy_(torch.where(over, victim, self._free_column()))

    def _free_column(self) -> Tensor:
        """``[B, G, 1]`` the first empty column inside every segment."""
        assert self.position is not None and self.cap is not None
        inside = torch.arange(self.position.shape[2], device=self.position.device) < self.cap.unsqueeze(-1)
        return ((self.position < 0) & inside).to(torch.int8).argmax(-1, keepdim=True)

    def _count(self) -> None:
        self.seen, self.since = self.seen + 1, self.since + 1
        if self.room is not None:
            self.room -= 1

    # -- attention of one token -------------------------------------------------------------------------------

    def _wants(self) -> bool:
        return self.scorer.mass_queries(1) + self.scorer.row_queries(1) > 0 and (not self.grows or self.width > 0)

    def _read(self, q: Tensor, step: Step) -> tuple[Tensor, Tensor | None]:
        """Out ``[B, H, 1, E]``, and the mass ``[B, H, S]`` where the scorer looks at single tokens."""
        assert self.keys is not None and self.values is not None and self.position is not None and self.base is not None
        if step.compute is not None:
            keys, values = self.dense()
            mask = (self.position >= 0).unsqueeze(2)
            wide = mask.repeat_interleave(q.shape[1] // mask.shape[1], 1)
            out = step.compute(q, keys, values, mask=wide, causal=False, scale=step.scale)
            return out, attend(q, keys, values, mask=mask, scale=step.scale, mass=True).mass if self._wants() else None
        if served(q):
            if self.tiles is None:
                self.tiles = kernel("ragged:work_list")(self.caps, q.device)
            return kernel("ragged:ragged_decode")(
                q, self.keys, self.values, self.position, self.base, self.tiles, scale=step.scale, mass=self._wants()
            )
        return self._by_segment(q, step.scale)

    def _by_segment(self, q: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
        """Head after head, each over its own segment."""
        assert self.keys is not None and self.values is not None and self.position is not None
        b, h, _, d = q.shape
        g = self.position.shape[1]
        wide = torch.promote_types(q.dtype, torch.float32)
        grouped = (q.view(b, g, h // g, d) * scale).to(self.keys.dtype)
        out = q.new_empty(b, g, h // g, self.values.shape[1])
        mass = torch.zeros(b, g, h // g, self.position.shape[2], dtype=wide, device=q.device) if self._wants() else None
        empty, start = self.position < 0, 0
        for row in range(b):
            for head in range(g):
                n = self.caps[row][head]
                at = slice(start, start + n)
                start += n
                logits = (grouped[row, head] @ self.keys[at].T).to(wide)
                logits = logits.masked_fill(empty[row, head, :n], -torch.inf)
                lse = logits.logsumexp(-1, keepdim=True)
                weights = (logits - torch.where(torch.isfinite(lse), lse, 0.0)).exp()
                out[row, head] = weights.to(self.values.dtype) @ self.values[at]
                if mass is not None:
                    mass[row, head, :, :n] = weights
        return out.view(b, h, 1, -1), None if mass is None else mass.flatten(1, 2)

    # -- packing ----------------------------------------------------------------------------------------------

    def dense(self) -> tuple[Tensor, Tensor]:
        """Keys ``[B, G, S, D]`` and values of all segments, those beyond a segment's end repeated from its last column."""
        assert self.keys is not None and self.values is not None and self.position is not None
        assert self.base is not None and self.cap is not None
        column = torch.arange(self.position.shape[2], device=self.position.device)
        at = self.base.unsqueeze(-1) + torch.minimum(column, self.cap.unsqueeze(-1) - 1)
        return self.keys[at], self.values[at]

    def _pack(self, keys: Tensor, values: Tensor, position: Tensor, state: Tensor | None, chosen: Tensor) -> None:
        """Store the chosen slots ``[B, G, S]`` of dense keys and values as segments, in position order."""
        assert self.keep is not None
        b, g, s = position.shape
        device = position.device
        count = chosen.sum(-1)  # [B, G]
        counts, keeps = count.tolist(), self.keep.squeeze(-1).tolist()
        self.caps = [
            [self._capacity(n, m) for n, m in zip(*row, strict=True)] for row in zip(counts, keeps, strict=True)
        ]
        flat = [c for row in self.caps for c in row]
        short = [
            c - n
            for row in zip(self.caps, counts, keeps, strict=True)
            for c, n, m in zip(*row, strict=True)
            if self.grows or c <= m
        ]
        self.room = min(short) if short else None
        self.held, self.most, self.since = max(map(max, counts)), max(map(max, keeps)), 0
        self.cap = torch.tensor(self.caps, device=device)
        ends = self.cap.flatten().cumsum(0).view(b, g)
        self.base = ends - self.cap
        order = torch.where(chosen, position, torch.iinfo(position.dtype).max).argsort(-1)
        size = max(flat)
        order, column = order[:, :, : min(s, size)], torch.arange(min(s, size), device=device)
        taken = column < count.unsqueeze(-1)  # [B, G, S]
        pair = torch.arange(b * g, device=device).view(b, g, 1) * s
        source, target = (order + pair)[taken], (self.base.unsqueeze(-1) + column)[taken]

        def moved(x: Tensor) -> Tensor:
            out = x.new_zeros(sum(flat), x.shape[3])
            return out.index_copy_(0, target, x.detach().reshape(b * g * s, -1)[source])

        self.keys, self.values = moved(keys), moved(values)
        tail = (0, size - taken.shape[2])
        self.position = torch.nn.functional.pad(position.gather(2, order).masked_fill(~taken, -1), tail, value=-1)
        if state is not None:
            kept = state.gather(2, order.unsqueeze(-1).expand(*order.shape, state.shape[3]))
            self.state = torch.nn.functional.pad(kept * taken.unsqueeze(-1), (0, 0, *tail))
        self.tiles = None
        self.slot = self._free_column()

    def _capacity(self, count: int, keep: int) -> int:
        """Slots of a segment that holds `count` tokens now: room to grow, but never above its share and one free slot."""
        ahead = max(grown(count, count + 1), count + 1 + max(0, self.wanted - self.seen))
        return ahead if self.grows else min(keep + 1, ahead)

    def _ensure_room(self) -> None:
        """Larger segments, when one is full before it has reached its share."""
        if self.room is not None and self.room < 1:
            assert self.position is not None
            keys, values = self.dense()
            self._pack(keys, values, self.position, self.state, self.position >= 0)

    def _unpack(self) -> None:
        """Give the segments back to the pool, for a block that is ranked together with them."""
        assert self.position is not None and self.keep is not None
        keys, values = self.dense()
        held: dict[str, Tensor] = {"keys": keys, "values": values, "position": self.position}
        if self.state is not None:
            held["state"] = self.state
        counts = {"filled": keys.shape[2], "most": NO_LIMIT, "least": NO_LIMIT, "holes": 1, "seen": self.seen}
        self.pool.restore(held | {f"count.{name}": torch.tensor(x) for name, x in counts.items()})
        self.keys = self.values = self.position = self.state = self.slot = self.base = self.cap = self.keep = None
        self.tiles = None

    # -- the rest of the contract -----------------------------------------------------------------------------

    def _snapshot(self) -> tuple[dict[str, Tensor], int | None]:
        return self.tensors(), self.prompt

    def _go_back(self, snapshot: tuple[dict[str, Tensor], int | None]) -> None:
        self.restore(snapshot[0])
        self.prompt = snapshot[1]

    def crop(self, tokens: int) -> None:
        """Take back the newest `tokens` of what is not settled yet and settle the rest, or raise `StateError`."""
        if tokens > self.unsettled:
            raise StateError(
                f"{self.who}: {tokens} tokens cannot be taken back, only the {self.unsettled} recorded since the last `crop`: "
                "what the others evicted is gone. Start speculative decoding through `generate` (it records), or keep a copy of "
                "the cache"
            )
        self._take_back(tokens)

    def reserve(self, tokens: int) -> None:
        """Room for all tokens that are appended, so that decoding never moves the buffers."""
        self.wanted = tokens

    def static(self) -> bool:
        """On CUDA, with a free slot in every segment."""
        if self.keys is None or not served(self.keys) or self.recording or self.tiles is None:
            return False
        return self.room is None or self.room > 0

    def step(self, q: Tensor, k: Tensor, v: Tensor, scale: float, now: Now) -> Tensor:
        """See `LayerCache.step`."""
        return self._one(q, k, v, Step(now.position, scale))

    def advance(self) -> None:
        """See `LayerCache.advance`."""
        self._count()

    def counters(self) -> dict[str, Any]:
        """See `LayerCache.counters`."""
        return {name: getattr(self, name) for name in ("seen", "room", "held", "most", "since")}

    def tensors(self) -> dict[str, Tensor]:
        """Copies of every tensor, those of an unfinished prompt, and the counters."""
        out = {name: x.clone() for name in NAMES if (x := getattr(self, name)) is not None}
        out |= {f"pool.{name}": x for name, x in self.pool.tensors().items()}
        counts = {k: -1 if v is None else v for k, v in self.counters().items()}
        return out | {f"count.{k}": torch.tensor(v) for k, v in counts.items()} if out else out

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """See `LayerCache.restore`."""
        self.reset()
        inner: dict[str, Tensor] = {}
        for name, x in tensors.items():
            if name.startswith("count."):
                value = int(x)
                setattr(self, name[6:], None if name == "count.room" and value < 0 else value)
            elif name.startswith("pool."):
                inner[name[5:]] = x
            else:
                setattr(self, name, x.clone())
        self.pool.restore(inner)
        if self.cap is not None:
            self.caps = self.cap.tolist()

    def select(self, rows: Tensor) -> None:
        """See `LayerCache.select`."""
        self._refuse_beams()
        if self.pool.seen:
            self.pool.select(rows)
        if self.row_keep is not None:
            self.row_keep = self.row_keep.index_select(0, rows.to(self.row_keep.device))
        if self.keys is None:
            return
        assert self.values is not None and self.base is not None and self.cap is not None
        rows = rows.to(self.base.device)
        cap, old = self.cap[rows], self.base[rows].flatten()
        sizes = cap.flatten()
        base = sizes.cumsum(0) - sizes
        at = torch.arange(int(sizes.sum()), device=rows.device) + torch.repeat_interleave(old - base, sizes)
        self.keys, self.values = self.keys[at], self.values[at]
        self.cap, self.base, self.caps, self.tiles = cap, base.view_as(cap), cap.tolist(), None
        for name in ("position", "state", "slot", "keep"):
            x = getattr(self, name)
            if x is not None:
                setattr(self, name, x.index_select(0, rows))

    def _own(self) -> list[Tensor]:
        return [x for name in NAMES if (x := getattr(self, name)) is not None] + [
            x for x in self.tiles or () if isinstance(x, Tensor)
        ]

    def bytes(self) -> int:
        """Bytes of keys, values, positions, state and tables, spare capacity and what recording holds included."""
        own = sum(x.numel() * x.element_size() for x in (*self._own(), *self._recorded()))
        return own + self.pool.bytes()

    def kept(self) -> int:
        """The longest head's."""
        if self.keys is None:
            return self.pool.kept()
        held = self.held + self.since
        return held if self.grows else min(held, max(self.most, self.held))

    def positions(self) -> Tensor:
        """``[B, G, S]``, sorted, empties (-1) first."""
        if self.position is None:
            if not self.pool.seen:
                raise StateError("the cache is empty")
            return self.pool.positions()
        return self.position.sort(-1).values

    def buffers(self) -> tuple[Tensor, ...]:
        """Everything that a step reads or overwrites."""
        return tuple(self._own())


def share_out(worth: Tensor, keep: Tensor, safeguard: float) -> Tensor:
    """The slots chosen for a layer: bool ``[B, G, S]``, G keep in all for every row (fewer where there are no more tokens).

    Every head keeps its own best ``safeguard * keep`` slots (at least 1), the rest goes to the best of all heads. worth
    ``[B, G, S]`` (-inf: not a token), keep int ``[B, 1, 1]``.
    """
    b, g, s = worth.shape
    place = worth.argsort(dim=-1, descending=True, stable=True).argsort(-1)  # [B, G, S] rank within the head
    floor = (keep.double() * safeguard).floor().clamp(min=1)
    safe = torch.where((place < floor) & (worth > -torch.inf), torch.inf, worth).flatten(1)
    order = safe.argsort(dim=-1, descending=True, stable=True)
    first = torch.arange(g * s, device=worth.device) < (g * keep).view(b, 1)
    chosen = torch.zeros_like(safe, dtype=torch.bool).scatter_(1, order, first.expand(b, -1))
    return chosen.view(b, g, s) & (worth > -torch.inf)
