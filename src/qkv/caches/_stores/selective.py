"""The whole history of every row, of which a decoding step reads what its `Reader` chooses.

Rows are stored from slot 0 on without their padding, so the slot of a token is its position and blocks lie alike in every row,
padded or not. What was not chosen is not touched: blocks are gathered by number (on CUDA read in place by a kernel).

A reader may want keys and values in host memory (`Reader.hosted`; page-locked for a GPU): then the index and what a step gathers
are all that the device holds, and what a call reads in full visits it for the length of that call.

Axes: B batch, H query heads, G key/value heads, A heads that choose (G or H), N queries, S slots, P blocks, C slots of a block,
K chosen blocks, D head width, E value width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qkv.caches._stores.dense import grown, rearranged, resized
from qkv.caches._stores.moved import attend_moved
from qkv.caches._stores.recording import Recording, cut
from qkv.core.attend import sdpa
from qkv.core.cache import Board, Geometry, Now, Step
from qkv.core.errors import Refused, StateError
from qkv.core.kernel import kernel, served
from qkv.core.reader import TOLD, Blocks, Reader, Reading, Selection, kept_blocks

PIECE = 1 << 24  # gathered elements held at once
TOGETHER = 1024  # queries of a prompt that are read at once on a device where each chooses for itself: few launches


@dataclass(frozen=True, slots=True)
class Read:
    """What one call read. slot: int64 ``[B, A, N or 1, K * C]`` slots, -1 = none, or None: everything. shift: how far each key
    was rotated, or None.
    """

    slot: Tensor | None
    shift: Tensor | None = None


class SelectiveCache(Recording):
    """Keys ``[B, G, capacity, D]``, values, what the reader keeps beside them, and how many tokens each row holds."""

    def __init__(self, reader: Reader, geometry: Geometry) -> None:
        self.reader, self.geometry = reader, geometry
        self.block = reader.block()
        self.indexes = not reader.dense(geometry) and type(reader).features is not Reader.features
        self.hosted = reader.hosted(geometry)
        self.watch: Callable[[Read], None] | None = None
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.queries: Tensor | None = None  # [B, H, 2 C, D] of the newest two blocks, by slot modulo 2 C
        self.features: dict[str, Tensor] = {}
        self.notes: dict[str, Tensor] = {}
        self.columns: Tensor | None = None  # [B, room] int32 slot of each logical column, once a row was padded
        self.lengths: list[int] = []
        self.indexed: list[int] = []  # blocks of each row that `features` describes
        self.room = 0
        self.seen = 0
        self.prompt = None
        self.recording = False
        self.chosen: int | None = None  # slots, over heads, that the newest call gathered; None: it read everything
        self._tell()
        self._forget_runs()

    def join(self, board: Board) -> None:
        """See `LayerCache.join`."""
        self.board = board
        self._tell()

    def _tell(self) -> None:
        """What the other sites may read of this one's notes lies on the board as it now is."""
        if self.board is None:
            return
        for name, told in self.board.notes.items():
            if name.startswith(TOLD):
                told.pop(self.geometry.layer, None)
        for name, x in self.notes.items():
            if name.startswith(TOLD):
                self.board.notes.setdefault(name, {})[self.geometry.layer] = x

    # -- one call -------------------------------------------------------------------------------------------------

    def attend(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """See `LayerCache.attend`. A prompt attends to live tensors, so gradients flow through it."""
        n = k.shape[2]
        if self.recording and self.reader.stateful:
            return self._provisional(q, k, v, step)
        known = n if self.prompt is None and self.seen == 0 else min(n, max(0, (self.prompt or 0) - self.seen))
        if not self.recording or n == 1 or known == n:
            return self._absorb(q, k, v, step)
        if not known:
            return self._call(q, k, v, step, whole=False)
        base = self.seen
        parts = [
            self._call(q[:, :, at], k[:, :, at], v[:, :, at], cut(step, base, at.start, at.stop), whole)
            for at, whole in ((slice(0, known), True), (slice(known, n), False))
        ]
        return torch.cat(parts, 2)

    def _absorb(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        n = k.shape[2]
        return self._call(q, k, v, step, whole=n > 1 or self.seen + n <= (self.prompt or 0))

    def _call(self, q: Tensor, k: Tensor, v: Tensor, step: Step, whole: bool) -> Tensor:
        """whole: the tokens belong to a prompt; others are read as single steps would read them."""
        window = self.reader.prefill(self.geometry) if whole else None
        dense = self.reader.dense(self.geometry)
        odd = step.mask is not None or not step.causal
        if odd and not dense and (window is not None or not whole) and self.seen:
            raise Refused(
                f"{self.reader.id} chooses what a query reads and knows causal queries and padding only; it was given "
                + ("a bidirectional call" if not step.causal else "a custom mask")
            )
        first, before = self.seen == 0, list(self.lengths)
        place = self._append(k, v, step)  # [B, N] on the host
        if not dense:
            self._observe(q, place, step, whole and window is None)
        if (dense and (whole or odd)) or (whole and window is None):
            return self._whole(q, k, v, step, first)
        if dense:
            return self._everything(q, place, step)
        if window is None:
            return self._chosen(q, place, step)
        return self._windows(q, place, step, window, before)

    def _append(self, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """Store the tokens; returns their slots ``[B, N]`` int64 on the host, -1 = padding."""
        b, n = k.shape[0], k.shape[2]
        self.lengths, self.indexed = self.lengths or [0] * b, self.indexed or [0] * b
        if step.padding is not None and self.columns is None:
            self.columns = torch.arange(self.seen, dtype=torch.int32, device=k.device).expand(b, -1).clone()
        if self.columns is None:
            place = torch.arange(self.seen, self.seen + n).expand(b, n)
            counts = [n] * b
        else:
            place = step.position.to("cpu", torch.int64)
            counts = (place >= 0).sum(-1).tolist()
        after = [a + c for a, c in zip(self.lengths, counts, strict=True)]
        self._reserve(k, v, max(after))
        assert self.keys is not None and self.values is not None
        for store, new in ((self.keys, k.detach()), (self.values, v.detach())):
            new = new.to(store.device)
            if self.columns is None:
                store[:, :, self.seen : self.seen + n] = new
            else:
                row, column = (place >= 0).nonzero(as_tuple=True)
                at = place[row, column].to(store.device)
                row, column = row.to(store.device), column.to(store.device)
                store[row, :, at] = new[row, :, column]
        if self.columns is not None:
            room = grown(self.columns.shape[1], max(self.seen + n, self.room))
            if room != self.columns.shape[1]:
                self.columns = resized(self.columns[:, None], room, self.seen, -1)[:, 0]
            self.columns[:, self.seen : self.seen + n] = step.position
        self.lengths, self.seen = after, self.seen + n
        return place

    def _reserve(self, k: Tensor, v: Tensor, tokens: int) -> None:
        """Room for `tokens` slots per row, in whole blocks; of single tokens by 16, so that kernels read their labels wide."""
        c = self.block
        unit = 16 if c == 1 else c
        if self.keys is None or self.values is None:
            capacity = -(-max(tokens, self.room) // unit) * unit
            self.keys, self.values = (self._room(x, capacity) for x in (k, v))
            return
        capacity = -(-grown(self.keys.shape[2], tokens) // unit) * unit
        if capacity != self.keys.shape[2]:
            used = self.keys.shape[2]
            for name, old in (("keys", self.keys), ("values", self.values)):
                setattr(self, name, self._room(old, capacity))
                getattr(self, name)[:, :, :used] = old
            self.features = {name: resized(x, capacity // c, x.shape[2]) for name, x in self.features.items()}

    def _room(self, like: Tensor, capacity: int) -> Tensor:
        """Zeros ``[B, G, capacity, .]`` where keys and values lie."""
        shape = (*like.shape[:2], capacity, like.shape[3])
        if not self.hosted:
            return like.new_zeros(shape)
        return torch.zeros(
            shape, dtype=like.dtype, pin_memory=like.is_cuda or (like.device.type == "cpu" and like.is_pinned())
        )

    # -- the index ------------------------------------------------------------------------------------------------

    def _observe(self, q: Tensor, place: Tensor, step: Step, whole: bool) -> None:
        """Tell the reader of the call, then index the blocks that it completed."""
        if type(self.reader).observe is not Reader.observe:
            self.reader.observe(self._view(q, place, step.scale, whole=whole))
        if self.indexes:
            self._index(q, place)

    def _index(self, q: Tensor, place: Tensor) -> None:
        assert self.keys is not None and self.values is not None
        c, ready = self.block, self.reader.ready()
        stop = [n // c if n >= ready else i for n, i in zip(self.lengths, self.indexed, strict=True)]
        start = [min(i, s) for i, s in zip(self.indexed, stop, strict=True)]
        width = max(s - i for s, i in zip(stop, start, strict=True))
        recent = self._recent_queries(q, place) if self.reader.wants_queries else None
        if not width:
            return
        device, b = q.device, len(stop)
        even = len(set(start)) == 1 and len(set(stop)) == 1
        at = torch.tensor(start)[:, None] + torch.arange(width)  # [B, P'] on the host
        live = None if even else (at < torch.tensor(stop)[:, None]).to(device)
        at = at.clamp(max=max(0, self.keys.shape[2] // c - 1)).to(device)
        slot = (at[:, None, :, None] * c + torch.arange(c, device=device)).expand(b, 1, width, c)

        def blocks(x: Tensor) -> Tensor:
            part = x[:, :, start[0] * c : stop[0] * c] if even else _take(x, slot.flatten(2).expand(-1, x.shape[1], -1))
            return part.to(device).reshape(b, x.shape[1], width, c, x.shape[3])

        queries = None if recent is None else recent(slot[:, 0].flatten(1)).reshape(b, -1, width, c, q.shape[3])
        made = self.reader.features(
            Blocks(blocks(self.keys), blocks(self.values), queries, slot, self.geometry, self.notes)
        )
        for name, new in made.items():
            if name not in self.features:
                self.features[name] = new.new_zeros((*new.shape[:2], self.keys.shape[2] // c, *new.shape[3:]))
            store = self.features[name]
            if even:
                store[:, :, start[0] : stop[0]] = new
            else:
                assert live is not None
                row, column = live.nonzero(as_tuple=True)
                store[row, :, at[row, column]] = new[row, :, column]
        self.indexed = stop

    def _recent_queries(self, q: Tensor, place: Tensor) -> Callable[[Tensor], Tensor]:
        """Keep the queries of the newest two blocks; returns what gives the queries ``[B, H, L, D]`` of slots ``[B, L]``."""
        b, h, _, d = q.shape
        ring = 2 * self.block
        old = q.new_zeros(b, h, ring, d) if self.queries is None else self.queries
        order = (place < 0).to(torch.int8).argsort(dim=-1, stable=True)  # real tokens first, in order
        new = q.detach() if self.columns is None else _take(q.detach(), order.to(q.device)[:, None].expand(-1, h, -1))
        both = torch.cat((old, new), 2)
        length = torch.tensor(self.lengths)
        begin = (length - (place >= 0).sum(-1))[:, None].to(q.device)  # [B, 1] first new slot

        def at(slot: Tensor) -> Tensor:
            where = torch.where(slot >= begin, ring + slot - begin, slot % ring).clamp(0, both.shape[2] - 1)
            return _take(both, where[:, None].expand(-1, h, -1))

        newest = length[:, None] - 1
        slots = newest - (newest - torch.arange(ring)) % ring  # the newest slot of each place of the ring
        self.queries = at(slots.clamp(min=0).to(q.device))
        return at

    # -- reading --------------------------------------------------------------------------------------------------

    def _view(self, q: Tensor, place: Tensor, scale: float, most: int = 1, whole: bool = False) -> Reading:
        """The call as the reader sees it; place ``[B, N]`` on the host, most: blocks that a query reads at most."""
        assert self.keys is not None and self.values is not None
        c, newest = self.block, int(place.max())
        seen = newest + 1 if newest >= 0 else max(self.lengths)  # a prompt's window does not see what is behind it
        used = -(-seen // c)
        at, since, position = None, self.seen - place.shape[1], place
        if self.columns is not None:
            real = place >= 0
            since = int(place.masked_fill(~real, 1 << 60).min())
            if not bool(real.all()):
                q = q.masked_fill(~real.to(q.device)[:, None, :, None], 0)
        elif place.shape[1] == 1:
            since = at = int(place[0, 0])
            position = torch.full_like(place, at, device=q.device)
        position = position.to(q.device)
        slot32 = position[:, 0].to(torch.int32) if _kernels(q, place.shape[1]) else None
        return Reading(
            q, position, self.keys[:, :, : used * c], self.values[:, :, : used * c],
            {name: x[:, :, :used] for name, x in self.features.items()}, c, most, since, whole, at, slot32, at is not None, scale,
            self.geometry, self.notes, None if self.board is None else self.board.notes,
        )  # fmt: skip

    def _chosen(self, q: Tensor, place: Tensor, step: Step, window: bool = False) -> Tensor:
        """Queries ``[B, H, N, D]`` that each read what was chosen for them; window: they are one of a prompt's."""
        tokens = (place if self.columns is not None else place[:1]) + 1
        reads = self.reader.reads(tokens)
        if bool(((reads >= tokens) | (tokens <= self.block)).all()):  # the own block is always read
            return self._everything(q, place, step)
        most = max(1, int(kept_blocks(reads, tokens, self.block).max()))
        view = self._view(q, place, step.scale, most)
        selection = self.reader.choose(dataclasses.replace(view, window=True) if window else view)
        return self._everything(q, place, step) if selection is None else self._gathered(view, selection, step)

    def _windows(self, q: Tensor, place: Tensor, step: Step, window: int, before: list[int]) -> Tensor:
        """A prompt, `window` queries at a time; windows begin at multiples of `window` in every row."""
        b, h, n, _ = q.shape
        assert self.values is not None
        if self.reader.alone and q.is_cuda:
            window *= max(1, TOGETHER // window)
        out = q.new_zeros(b, h, n, self.values.shape[3])
        real = place >= 0
        base, count = torch.tensor(before or [0] * b)[:, None], real.sum(-1, keepdim=True)
        order = (~real).to(torch.int8).argsort(dim=-1, stable=True)  # column of each row's i-th new token
        live = count > 0
        if not bool(live.any()):
            return out
        low, high = int(base[live].min()) // window, int((base + count - 1)[live].max()) // window
        for w in range(low, high + 1):
            slot = w * window + torch.arange(window)
            i = slot - base  # [B, W] which new token of its row
            mine = (i >= 0) & (i < count)
            column = order.gather(1, i.clamp(0, n - 1))
            keep = mine.any(0)
            column, mine, slot = column[:, keep], mine[:, keep], slot[keep]
            if not mine.shape[1]:
                continue
            part = _take(q, column[:, None].expand(-1, h, -1).to(q.device))
            got = self._chosen(part, torch.where(mine, slot, -1), step, window=True)
            row, at = mine.nonzero(as_tuple=True)
            to = column[row, at].to(q.device)
            row, at = row.to(q.device), at.to(q.device)
            out[row, :, to] = got[row, :, at]
        return out

    def _whole(self, q: Tensor, k: Tensor, v: Tensor, step: Step, first: bool) -> Tensor:
        """A call in full, in logical columns: the same attention as a plain cache gives."""
        self.chosen = None
        assert self.keys is not None and self.values is not None
        if self.watch is not None:
            self.watch(Read(None))
        mask = None if step.padding is None else step.padding[:, None, None, :]
        if first:
            keys, values = k, v
        elif self.columns is None:
            keys, values = (x[:, :, : self.seen].to(k.device) for x in (self.keys, self.values))
        else:
            at = self.columns[:, None, : self.seen].clamp(min=0).long().expand(-1, k.shape[1], -1)
            keys, values = (_take(x, at).to(k.device) for x in (self.keys, self.values))
            mask = (self.columns[:, None, None, : self.seen] >= 0) if mask is None else mask
        if step.mask is not None:
            mask = step.mask if mask is None else mask & step.mask
        return (step.compute or self.reader.prompt(self.geometry) or sdpa)(
            q, keys, values, mask=mask, causal=step.causal and step.mask is None, scale=step.scale
        )

    def _everything(self, q: Tensor, place: Tensor, step: Step) -> Tensor:
        """Each query reads all that precedes it, in slots."""
        self.chosen = None
        assert self.keys is not None and self.values is not None
        if self.watch is not None:
            self.watch(Read(None))
        used = max(self.lengths)
        alike = self.columns is None and int(place[0, -1]) + 1 == used  # a window may end before its prompt
        if step.compute is None and not self.hosted and _kernels(q, q.shape[2]):
            return self._decode(q, None if alike else place.to(q.device, torch.int32), step.scale)
        mask = None
        if not alike or q.shape[2] > 1:
            slot = torch.arange(used, device=q.device)
            mask = slot <= place.to(q.device)[:, None, :, None]
        keys, values = (x[:, :, :used].to(q.device) for x in (self.keys, self.values))
        return (step.compute or sdpa)(q, keys, values, mask=mask, causal=False, scale=step.scale)

    def _decode(self, q: Tensor, position: Tensor | None, scale: float, length: Tensor | None = None) -> Tensor:
        """One token over everything, on CUDA; position int32 ``[B, 1]`` where rows differ, length int32 ``[1]``."""
        assert self.keys is not None and self.values is not None
        places = None
        if position is not None:
            slot = torch.arange(self.keys.shape[2], dtype=torch.int32, device=q.device)
            places = torch.where(slot <= position, slot, -1)[:, None].expand(-1, self.keys.shape[1], -1)
        if length is None:
            length = torch.full((1,), max(self.lengths), dtype=torch.int32, device=q.device)
        run = kernel("decode:decode_attention")
        return run(q, self.keys, self.values, length=length, position=places, scale=scale)[0]

    def _gathered(self, view: Reading, selection: Selection, step: Step) -> Tensor:
        """Attention over the chosen blocks alone."""
        self.chosen = selection.index.shape[1] * selection.index.shape[3] * self.block
        moved = type(self.reader).shift is not Reader.shift
        if view.slot32 is not None and not (moved or self.hosted) and step.compute is None and self.watch is None:
            return self._in_place(view, selection)
        selection = selection.plain()
        if moved or self.reader.ordered:
            selection = selection.ordered()
        if (
            selection.valid is not None
        ):  # where nothing is read, the own block is fetched once more: no other is touched
            own = (view.position.clamp(min=0) // self.block)[:, None, :, None]
            own = own if selection.index.shape[2] == own.shape[2] else own.amax(2, keepdim=True)
            selection = Selection(torch.where(selection.valid, selection.index, own), selection.valid)
        b, _, n, _ = view.queries.shape
        shared = selection.index.shape[2] == 1
        if moved and step.compute is None and not self.hosted:
            return self._turned(view, selection, step.scale)
        per = 1 if shared else max(1, PIECE // (b * selection.index.shape[1] * selection.index.shape[3] * self.block
                                                * view.keys.shape[3]))  # fmt: skip
        if shared or n <= per:
            return self._piece(view.queries, view.position, view, selection, step, moved)
        outs = []
        for start in range(0, n, per):
            at = slice(start, min(n, start + per))
            some = Selection(selection.index[:, :, at], None if selection.valid is None else selection.valid[:, :, at])
            outs.append(self._piece(view.queries[:, :, at], view.position[:, at], view, some, step, moved))
        return torch.cat(outs, 2)

    def _in_place(self, view: Reading, selection: Selection) -> Tensor:
        """Single tokens on CUDA: no gathered copy."""
        run = kernel("gather:gather_attention")
        return run(
            view.queries, self.keys, self.values, selection.marked(), view.slot32, block=self.block, scale=view.scale
        )[0]

    def _steps(self, position: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
        """Of blocks chosen by queries at `position` ``[B, N]``: first slots, and how many are read ``[B, A, N, K]``."""
        first = selection.index * self.block
        tokens = (position[:, None, :, None] + 1 - first).clamp(0, self.block)
        return first, tokens if selection.valid is None else tokens.masked_fill(~selection.valid, 0)

    def _turned(self, view: Reading, selection: Selection, scale: float) -> Tensor:
        """Queries are turned instead of the keys that the reader moves."""
        rope, (first, tokens) = self.geometry.rope, self._steps(view.position, selection)
        shift = self.reader.shift(view, first, tokens)
        assert self.keys is not None and self.values is not None and rope is not None and shift is not None
        if self.watch is not None:
            slot = first.unsqueeze(-1) + torch.arange(self.block, device=first.device)
            listed = torch.where(slot < (first + tokens).unsqueeze(-1), slot, -1).flatten(3)
            self.watch(Read(listed, shift.repeat_interleave(self.block, -1).masked_fill(listed < 0, 0)))
        return attend_moved(
            view.queries, self.keys, self.values, selection.index.expand_as(tokens), tokens, shift, rope=rope, block=self.block,
            count=view.count, scale=scale,
        )  # fmt: skip

    def _piece(
        self, q: Tensor, position: Tensor, view: Reading, selection: Selection, step: Step, moved: bool
    ) -> Tensor:
        assert self.keys is not None and self.values is not None
        b, h, n, d = q.shape
        a, m, k = selection.index.shape[1:]
        c, e = self.block, self.values.shape[3]
        slot = (
            selection.index
            if c == 1
            else (selection.index.unsqueeze(-1) * c + torch.arange(c, device=q.device)).flatten(3)
        )
        seen = listed = shift = None
        if view.at is not None and selection.exact:
            slot = slot[..., : slot.shape[-1] - (c - 1 - view.at % c)]
        else:
            seen = slot <= position[:, None, :, None]  # [B, A, N, K C]
            if selection.valid is not None:
                seen = seen & (selection.valid if c == 1 else selection.valid.repeat_interleave(c, -1))
        if moved or self.watch is not None:
            read = slot >= 0 if seen is None else (seen.any(2, keepdim=True) if m == 1 else seen)
            listed = torch.where(read, slot, -1)  # [B, A, M, K C]
        if moved and listed is not None:
            part = dataclasses.replace(view, queries=q, position=position)
            shift = self.reader.shift(part, *self._steps(position, selection))
            if shift is not None:
                shift = shift.repeat_interleave(c, -1)[..., : slot.shape[-1]].masked_fill(listed < 0, 0)
        if self.watch is not None:
            self.watch(Read(listed, shift))
        index = selection.index.to(self.keys.device)
        keys, values = (self._fetch(x, index).to(q.device) for x in (self.keys, self.values))  # [B, A, M * K * C, .]
        if seen is None:
            keys, values = keys[:, :, : slot.shape[-1]], values[:, :, : slot.shape[-1]]
        if shift is not None:
            assert self.geometry.rope is not None
            keys = self.geometry.rope.rotate(keys, shift.flatten(2))
        compute = step.compute or sdpa
        if seen is not None and step.compute is not None and seen.shape[1] not in (1, h):
            seen = seen.repeat_interleave(h // seen.shape[1], 1)  # only ours knows masks of KV heads
        if m == 1:
            return compute(q, keys, values, mask=seen, causal=False, scale=step.scale)
        keys, values = (
            x.reshape(b, a, n, k * c, -1).transpose(1, 2).reshape(b * n, a, k * c, -1) for x in (keys, values)
        )
        single = q.transpose(1, 2).reshape(b * n, h, 1, d)
        assert seen is not None
        out = compute(single, keys, values, mask=seen.transpose(1, 2).reshape(b * n, -1, 1, k * c), causal=False,
                      scale=step.scale)  # fmt: skip
        return out.reshape(b, n, h, e).transpose(1, 2)

    def _fetch(self, x: Tensor, index: Tensor) -> Tensor:
        """Blocks ``[B, A, M, K]`` of a store ``[B, G, S, D]`` as ``[B, A, M * K * C, D]``; no others are touched."""
        b, g, s, d = x.shape
        a, c = index.shape[1], self.block
        p = s // c
        head = torch.arange(b * g, device=x.device).reshape(b, g, 1).expand(b, g, a // g).reshape(b, a, 1, 1) * p
        flat = (index + head).flatten()
        return x.view(b * g * p, c * d).index_select(0, flat).view(b, a, -1, d)

    # -- captured steps -------------------------------------------------------------------------------------------

    def static(self) -> bool:
        """On CUDA, with room for the token, once the prompt is in and every row is indexed; not with keys in host memory."""
        if (
            self.hosted
            or self.keys is None
            or not served(self.keys)
            or not self.reader.capturable
            or self.reader.stateful
        ):
            return False
        if (
            self.recording
            or self.watch is not None
            or self.seen < (self.prompt or 0)
            or self.keys.dtype == torch.float64
        ):
            return False
        room = self.keys.shape[2] if self.columns is None else min(self.keys.shape[2], self.columns.shape[1])
        named = self.features or not self.indexes
        return self.seen < room and bool(named) and min(self.lengths) >= self.reader.ready()

    def step(self, q: Tensor, k: Tensor, v: Tensor, scale: float, now: Now) -> Tensor:
        """See `LayerCache.step`."""
        assert self.keys is not None and self.values is not None
        slot, slot32 = kernel("gather:store")(
            self.keys, self.values, k, v, cursor=now.cursor,
            position=None if now.start is None else now.position, columns=self.columns,
        )  # fmt: skip
        position = slot32.unsqueeze(-1)
        self.advance()
        capacity = torch.tensor([self.keys.shape[2], max(self.lengths)])
        reads = self.reader.reads(capacity)
        if self.reader.dense(self.geometry) or bool((reads >= capacity).all()):
            return self._decode(q, None if self.columns is None else position, scale, now.length)
        c = self.block
        view = Reading(
            q, slot, self.keys, self.values, self.features, c, max(1, -(-int(reads[0]) // c)), self.seen - 1, False, None,
            slot32, int(reads[0]) == int(reads[1]) and int(reads[0]) % c == 0, scale, self.geometry,
            self.notes, None if self.board is None else self.board.notes,
        )  # fmt: skip
        self.reader.observe(view)
        if self.indexes and not self.reader.describe(view):
            self._index_own(view)
        selection = self.reader.choose(view)
        if selection is None:
            return self._decode(q, None if self.columns is None else position, scale, now.length)
        return self._in_place(view, selection)

    def _index_own(self, view: Reading) -> None:
        """Describe the own blocks anew: what a block is said to hold counts from the moment it is complete."""
        b, c = view.position.shape[0], self.block
        own = torch.div(view.position, c, rounding_mode="floor")[:, None, :, None]  # [B, 1, 1, 1]
        slot = own.unsqueeze(-1) * c + torch.arange(c, device=own.device)[:, None]  # [B, 1, 1, C, 1]

        def blocks(x: Tensor) -> Tensor:
            return x.gather(2, slot.flatten(1, 3)[:, None].expand(b, x.shape[1], c, x.shape[3])).unsqueeze(2)

        made = self.reader.features(
            Blocks(blocks(view.keys), blocks(view.values), None, slot[..., 0], self.geometry, self.notes)
        )
        for name, new in made.items():
            at = own.reshape(b, 1, 1, *[1] * (new.ndim - 3))
            self.features[name].scatter_(2, at.expand_as(new), new)

    def buffers(self) -> tuple[Tensor, ...]:
        """Everything a captured step reads or writes."""
        held = (self.keys, self.values, self.columns, *self.features.values(), *self.notes.values())
        return tuple(x for x in held if x is not None)

    def counters(self) -> dict[str, Any]:
        """See `LayerCache.counters`."""
        return {"seen": self.seen, "lengths": list(self.lengths), "indexed": list(self.indexed)}

    def advance(self) -> None:
        """See `LayerCache.advance`."""
        self.seen += 1
        self.lengths = [n + 1 for n in self.lengths]
        if self.indexes:
            self.indexed = [n // self.block for n in self.lengths]

    # -- memory ---------------------------------------------------------------------------------------------------

    def reserve(self, tokens: int) -> None:
        """Allocate room for `tokens` at once, so that decoding never moves the buffers."""
        self.room = tokens

    def crop(self, tokens: int) -> None:
        """Forget the newest `tokens` exactly; a reader with notes takes back only what was recorded."""
        if tokens > self.seen:
            raise StateError(f"cannot forget {tokens} tokens of a cache that holds {self.seen}")
        if not self.reader.stateful:
            self._truncate(self.seen - tokens)
        elif tokens > self.unsettled:
            raise StateError(
                f"{self.reader.id}: cannot take back {tokens} tokens, {self.unsettled} are recorded: what was chosen since "
                "depends on them; call record() before speculation"
            )
        else:
            self._take_back(tokens)

    def _truncate(self, columns: int) -> None:
        if columns == 0:
            kept = {name: getattr(self, name) for name in ("room", "prompt", "recording", "watch")}
            self.reset()
            vars(self).update(kept)
            return
        if self.reader.wants_queries and not self.reader.stateful and self.seen - columns > self.block:
            raise StateError(
                f"{self.reader.id}: cannot forget {self.seen - columns} tokens: the queries of {self.block} older ones are kept"
            )
        if self.columns is None:
            self.lengths = [columns] * len(self.lengths)
        elif columns < self.seen:
            self.lengths = (self.columns[:, :columns] >= 0).sum(-1).tolist()
        ready, c = self.reader.ready(), self.block
        self.indexed = [min(i, n // c) if n >= ready else 0 for i, n in zip(self.indexed, self.lengths, strict=True)]
        self.seen = columns

    def _snapshot(self) -> Any:
        return self.seen, dict(self.notes), self.queries

    def _go_back(self, snapshot: Any) -> None:
        seen, notes, queries = snapshot
        if seen != self.seen:
            self._truncate(seen)
        self.notes, self.queries = dict(notes), queries
        self._tell()

    def select(self, rows: Tensor) -> None:
        """See `LayerCache.select`."""
        self._refuse_beams()
        if self.keys is None:
            return
        for name in ("keys", "values", "queries", "columns"):
            x = getattr(self, name)
            if x is not None:
                setattr(self, name, rearranged(x, rows))
        self.features = {name: rearranged(x, rows) for name, x in self.features.items()}
        self.notes = {name: x.index_select(0, rows.to(x.device)) for name, x in self.notes.items()}
        self._tell()
        order = rows.tolist()
        self.lengths, self.indexed = [self.lengths[r] for r in order], [self.indexed[r] for r in order]

    def _held(self) -> Iterator[Tensor]:
        yield from (x for x in (self.keys, self.values, self.queries, self.columns) if x is not None)
        yield from self.features.values()
        yield from self.notes.values()
        yield from self._recorded()

    def bytes(self) -> int:
        """Bytes of all storages held: keys, values, the index, notes, unused capacity included."""
        held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in self._held()}
        return sum(held.values())

    def resident(self) -> int:
        """See `LayerCache.resident`: without the keys and values that lie in host memory."""
        away = (self.keys, self.values) if self.hosted else ()
        return self.bytes() - sum(x.untyped_storage().nbytes() for x in away if x is not None)

    def read_bytes(self) -> int:
        """See `LayerCache.read_bytes`: the gathered keys and values and the index that chose them, or everything."""
        if self.keys is None or self.values is None or self.chosen is None:
            return self.bytes()
        width = (self.keys.shape[3] + self.values.shape[3]) * self.keys.element_size()
        return self.keys.shape[0] * self.chosen * width + sum(
            x.numel() * x.element_size() for x in self.features.values()
        )

    def kept(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths, default=0)

    def positions(self) -> Tensor:
        """``[B, G, S]``."""
        if self.keys is None:
            raise StateError("the cache is empty")
        slot = torch.arange(self.kept(), device=self.keys.device)
        mine = slot < torch.tensor(self.lengths, device=self.keys.device)[:, None]
        return torch.where(mine, slot, -1)[:, None].expand(-1, self.keys.shape[1], -1)

    def tensors(self) -> dict[str, Tensor]:
        """Keys, values, index and notes of the tokens seen, and how many each row holds."""
        if self.keys is None or self.values is None:
            return {}
        p = -(-self.kept() // self.block)
        out = {
            "keys": self.keys[:, :, : p * self.block].clone(),
            "values": self.values[:, :, : p * self.block].clone(),
            "lengths": torch.tensor([self.lengths, self.indexed]),
        }
        if self.columns is not None:
            out["columns"] = self.columns[:, : self.seen].clone()
        if self.queries is not None:
            out["queries"] = self.queries.clone()
        out |= {f"feature.{name}": x[:, :, :p].clone() for name, x in self.features.items()}
        return out | {f"note.{name}": x.clone() for name, x in self.notes.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """See `LayerCache.restore`."""
        self.reset()
        if not tensors:
            return
        copies = {name: x.clone() for name, x in tensors.items()}
        self.keys, self.values = copies["keys"], copies["values"]
        if self.hosted:
            self.keys, self.values = (self._room(x, x.shape[2]).copy_(x) for x in (self.keys, self.values))
        self.columns, self.queries = copies.get("columns"), copies.get("queries")
        self.lengths, self.indexed = copies["lengths"].tolist()
        self.seen = max(self.lengths) if self.columns is None else self.columns.shape[1]
        self.features = {name[8:]: x for name, x in copies.items() if name.startswith("feature.")}
        self.notes = {name[5:]: x for name, x in copies.items() if name.startswith("note.")}
        self._tell()


def _kernels(q: Tensor, n: int) -> bool:
    """Whether kernels serve single tokens here."""
    return n == 1 and served(q)


def _take(x: Tensor, at: Tensor) -> Tensor:
    """Rows ``[B, G, L]`` of ``[B, G, S, D]``, where the latter lie."""
    at = at.to(x.device)
    return x.gather(2, at.unsqueeze(-1).expand(*at.shape, x.shape[3]))


__all__ = ["Read", "SelectiveCache"]
