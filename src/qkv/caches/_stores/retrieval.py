"""A small static set with the model, everything else in host memory, of which a step retrieves the best few keys.

Rows are stored from slot 0 on without their padding, so the slot of a token is its position. The host holds all tokens; the
model's device holds copies of the first `sinks` and the newest `recent`. A step attends to these exactly, the host searches
all others for the keys of largest inner product and attends to them, and both parts are merged by their lse: what crosses to
the device is one output and one number a head. Tokens that leave the recent window are scanned exactly until there are more
than `rebuild` of them; then the index is built anew, from every `keep_queries`-th query there has been.

A call of several tokens is read in full, the host's part in pieces; only single tokens (and candidates of speculation, one by
one) retrieve.

Axes: B batch, H query heads, G key/value heads, R query heads of a KV head, N queries, S slots, K retrieved keys, D head width,
E value width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from qkv.caches._index.index import Index, exact, gathered, top, wide
from qkv.caches._stores.dense import grown, resized
from qkv.caches._stores.tiered import Shelf
from qkv.core.attend import attend, sdpa
from qkv.core.cache import Geometry, LayerCache, Step
from qkv.core.errors import Refused, StateError
from qkv.core.kernel import kernel, served
from qkv.core.merge import merge

PIECE = 4096  # slots that a prompt's later block brings to the device at a time
HELD = 3  # indexes that speculation may go back to


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """The settings of a retrieving memory.

    build: makes an index from keys ``[1, G, M, D]`` and queries ``[1, H, N, D]``, or None: everything is scanned.
    kind: what `restore` reads it back as. who: the method, for messages.
    """

    sinks: int
    recent: int
    top_k: int
    rebuild: int
    keep_queries: int
    build: Callable[[Tensor, Tensor], Index] | None
    kind: Callable[[dict[str, Tensor]], Index] | None
    who: str


class _Built(NamedTuple):
    """index: of positions sinks .. end[b] of row b, made when the row had `at[b]` tokens."""

    index: Index | None
    end: list[int]
    at: list[int]


@final
class RetrievalCache(LayerCache):
    """See the module."""

    recording: bool = False
    prompt: int | None = None

    def __init__(self, method: Retrieval, geometry: Geometry) -> None:
        self.method, self.geometry = method, geometry
        self.reset()

    def __deepcopy__(self, memo: dict[int, Any]) -> RetrievalCache:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        shared = ("method", "geometry")
        vars(twin).update({n: x if n in shared else copy.deepcopy(x, memo) for n, x in vars(self).items()})
        return twin

    def reset(self) -> None:
        """Forget everything (not the recording mode)."""
        self.keys, self.values, self.queries = (Shelf(label=self.method.who) for _ in range(3))
        self.near_keys: Tensor | None = None  # [B, G, <= sinks + recent, D] on the model's device
        self.near_values: Tensor | None = None
        self.lengths: list[int] = []  # tokens of each row
        self.gaps: list[list[int]] = []  # padded columns of each row
        self.built = _Built(None, [], [])
        self.before: list[_Built] = []  # what speculation may go back to
        self.seen = 0

    # -- one call ---------------------------------------------------------------------------------------------

    def attend(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """See `LayerCache.attend`."""
        who = self.method.who
        if step.mask is not None:
            raise Refused(
                f"{who}: a custom 4-D or packed-sequence mask has no retrieval form; pass a 2-D attention_mask"
            )
        if not step.causal:
            raise Refused(f"{who}: retrieval serves causal attention only")
        b, n = q.shape[0], q.shape[2]
        if not self.lengths:
            self.lengths, self.gaps = [0] * b, [[] for _ in range(b)]
            self.built = _Built(None, [self.method.sinks] * b, [0] * b)
        head = n if n > 1 or self.seen == 0 else 0
        if self.recording and not (self.prompt is None and self.seen == 0):
            head = min(n, max(0, (self.prompt or 0) - self.seen))
        head = 0 if head == 1 and self.seen else head
        outs = []
        if head:
            outs.append(self._whole(q[:, :, :head], k[:, :, :head], v[:, :, :head], _part(step, self.seen, 0, head)))
        start = self.seen - head
        for i in range(head, n):
            at = slice(i, i + 1)
            outs.append(self._one(q[:, :, at], k[:, :, at], v[:, :, at], _part(step, start, i, i + 1)))
        return outs[0] if len(outs) == 1 else torch.cat(outs, 2)

    def _real(self, step: Step, n: int) -> Tensor | None:
        """Which of the block's tokens are real, bool ``[B, N]`` on the CPU, or None when all are."""
        if step.padding is None:
            return None
        real = step.padding[:, self.seen : self.seen + n].cpu()
        return None if bool(real.all()) else real

    def _whole(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """A block that reads everything before it and itself."""
        n, old = k.shape[2], list(self.lengths)
        real = None if step.padding is None else step.padding[:, None, None, self.seen : self.seen + n]
        if not max(old):
            out = (step.compute or sdpa)(q, k, v, mask=real, causal=True, scale=step.scale)
        elif step.compute is not None:
            out = self._written_out(q, k, v, real, old, step)
        else:
            own = attend(q, k, v, mask=real, causal=True, scale=step.scale)
            parts = [(own.out, own.lse)]
            keys, values = self.keys.look(), self.values.look()
            for start in range(0, max(old), PIECE):
                stop = min(max(old), start + PIECE)
                mask = None if min(old) >= stop else _before(old, start, stop, q.device)
                piece = (x[:, :, start:stop].to(q.device) for x in (keys, values))
                done = attend(q, *piece, mask=mask, scale=step.scale)
                parts.append((done.out, done.lse))
            out = merge(*parts)[0]
        self._store(q, k, v, self._real(step, n))
        return out

    def _written_out(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, old: list[int], step: Step) -> Tensor:
        """As `_whole`, for an attention of somebody else's that wants all keys at once."""
        n, most = k.shape[2], max(old)
        keys, values = (
            torch.cat((x.look()[:, :, :most].to(q.device), y), 2) for x, y in ((self.keys, k), (self.values, v))
        )
        past = _before(old, 0, most, q.device)  # [B, 1, 1, most]
        own = past.new_ones(q.shape[0], 1, 1, n) if real is None else real
        assert step.compute is not None
        return step.compute(q, keys, values, mask=torch.cat((past, own), 3), causal=True, scale=step.scale)

    def _one(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """One token: the static set with the model, the best of the rest on the host, merged."""
        host = self._store(q, k, v, self._real(step, 1))
        self._index_if_due(q.device)
        assert self.near_keys is not None and self.near_values is not None
        width = min(self.near_keys.shape[2], max(self.lengths))
        keys, values = self.near_keys[:, :, :width], self.near_values[:, :, :width]
        holds = None if min(self.lengths) >= width else _before(self.lengths, 0, width, q.device)
        if step.compute is not None:
            return self._computed(q, keys, values, holds, host, step)
        if served(q) and holds is None:
            length = torch.full((1,), width, dtype=torch.int32, device=q.device)
            near = kernel("decode:decode_attention")(q, keys, values, length=length, scale=step.scale)
        else:
            done = attend(q, keys, values, mask=holds, scale=step.scale)
            near = (done.out, done.lse)
        found = self._search(host)
        if found is None:
            return near[0]
        index, score = found
        logits = score * step.scale  # [B, G, R, K]
        lse = logits.logsumexp(-1)
        weight = (logits - torch.where(torch.isfinite(lse), lse, 0.0).unsqueeze(-1)).exp()
        out = (weight.unsqueeze(-2) @ wide(gathered(self.values.look(), index))).squeeze(-2)  # [B, G, R, E]
        far = torch.cat((out, lse.unsqueeze(-1)), -1).flatten(1, 2).unsqueeze(2).to(q.device)
        return merge(near, (far[..., :-1].to(q.dtype), far[..., -1].to(near[1].dtype)))[0]

    def _computed(
        self, q: Tensor, keys: Tensor, values: Tensor, holds: Tensor | None, host: Tensor, step: Step
    ) -> Tensor:
        """As `_one`, for an attention of somebody else's: what is read lies side by side, for each query head."""
        r = q.shape[1] // keys.shape[1]
        keys, values = (x.repeat_interleave(r, 1) for x in (keys, values))
        found = self._search(host)
        if found is not None:
            index = found[0]
            more = (gathered(x.look(), index).flatten(1, 2).to(q.device) for x in (self.keys, self.values))
            keys, values = (torch.cat((x, y), 2) for x, y in zip((keys, values), more, strict=True))
            some = (index >= 0).flatten(1, 2).unsqueeze(2).to(q.device)
            near = some.new_ones(1) if holds is None else holds
            near = near.expand(*some.shape[:3], keys.shape[2] - some.shape[3])
            holds = torch.cat((near, some), 3)
        assert step.compute is not None
        return step.compute(q, keys, values, mask=holds, causal=False, scale=step.scale)

    # -- searching --------------------------------------------------------------------------------------------

    def _ends(self) -> list[int]:
        """For each row the first position of its recent window: before it, except for the sinks, lies what is searched."""
        m = self.method
        return [max(m.sinks, n - m.recent) for n in self.lengths]

    def _index_if_due(self, device: torch.device) -> None:
        """Index the rows whose scanned tokens have grown too many."""
        m, ends = self.method, self._ends()
        if m.build is None:
            return
        due = [b for b, end in enumerate(ends) if end - self.built.end[b] > m.rebuild]
        if not due:
            return
        index, end, at = self.built.index, list(self.built.end), list(self.built.at)
        keys, queries = self.keys.look(), self.queries.look()
        for b in due:
            asked = -(-self.lengths[b] // m.keep_queries)
            mine = keys[b : b + 1, :, m.sinks : ends[b]].to(device), queries[b : b + 1, :, :asked].to(device)
            one = m.build(*mine)
            one = type(one)({name: x.to(keys.device) for name, x in one.parts.items()})
            index = one.blank(len(ends)) if index is None else index
            index = index.put(torch.tensor([b]), one)
            end[b], at[b] = ends[b], self.lengths[b]
        if self.recording:
            self.before = [*self.before, self.built][-HELD:]
        self.built = _Built(index, end, at)

    def _search(self, q: Tensor) -> tuple[Tensor, Tensor] | None:
        """(position, inner product) ``[B, G, R, K]`` of the best keys outside the static set, or None when there are none.

        q ``[B, H, 1, D]`` on the host.
        """
        m, ends, keys = self.method, self._ends(), self.keys.look()
        most = max(end - m.sinks for end in ends)
        if most <= 0:
            return None
        k = min(m.top_k, most)
        q = wide(q).reshape(q.shape[0], keys.shape[1], -1, q.shape[3])  # [B, G, R, D]
        indices, scores = [], []
        if self.built.index is not None:
            found = self.built.index.search(q, keys, min(k, int(self.built.index.counts.max())), m.sinks)
            indices.append(torch.where(found.index >= 0, found.index + m.sinks, -1))
            scores.append(found.score)
        begin = self.built.end
        many = max(end - start for start, end in zip(begin, ends, strict=True))
        if many > 0:
            if len(set(begin)) == 1 and len(set(ends)) == 1:
                index, score = exact(q, keys[:, :, begin[0] : ends[0]], None, min(k, many))
                index = torch.where(index >= 0, index + begin[0], -1)
            else:
                first, end = torch.tensor(begin)[:, None], torch.tensor(ends)[:, None]
                place = first + torch.arange(many)  # [B, many]
                place = torch.where(place < end, place, -1)[:, None].expand(-1, keys.shape[1], -1)
                score = q @ wide(gathered(keys, place)).mT
                score = score.masked_fill(place.unsqueeze(2) < 0, -torch.inf)
                index, score = top(score, place.unsqueeze(2).expand_as(score), min(k, many))
            indices.append(index)
            scores.append(score)
        if len(indices) == 1:
            return indices[0], scores[0]
        index, score = torch.cat(indices, -1), torch.cat(scores, -1)
        return top(score, index, min(k, score.shape[-1]))

    # -- storing ----------------------------------------------------------------------------------------------

    def _store(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
        """Put a block onto the host and into the static set; returns the queries on the host."""
        q, k, v = q.detach(), k.detach(), v.detach()
        b, n, m = k.shape[0], k.shape[2], self.method
        together = self._across(q, k, v)
        counts = [n] * b if real is None else real.sum(-1).tolist()
        old, new = list(self.lengths), [x + c for x, c in zip(self.lengths, counts, strict=True)]
        self._room(together, k, v, max(old), max(new))
        if real is None and len(set(old)) == 1:
            self._write(slice(None), None, together, (k, v), old[0], new[0])
        else:
            for row in range(b):
                if counts[row]:
                    columns = None if real is None else real[row].nonzero().squeeze(-1)
                    self._write(slice(row, row + 1), columns, together, (k, v), old[row], new[row])
                if real is not None:
                    lost = (~real[row]).nonzero().squeeze(-1).tolist()
                    self.gaps[row] = [*self.gaps[row], *(self.seen + c for c in lost)]
        self.lengths = new
        self.seen += n
        assert m.keep_queries >= 1
        return together[0]

    @staticmethod
    def _across(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v on the host, in one transfer for a single token."""
        if not q.is_cuda or q.shape[2] > 1 or not q.shape[3] == k.shape[3] == v.shape[3]:
            return q.cpu(), k.cpu(), v.cpu()
        every = torch.cat((q, k, v), 1).cpu()
        h, g = q.shape[1], k.shape[1]
        return every[:, :h], every[:, h : h + g], every[:, h + g :]

    def _room(self, host: tuple[Tensor, ...], k: Tensor, v: Tensor, used: int, need: int) -> None:
        q, hk, hv = host
        every = self.method.keep_queries
        pinned = k.is_cuda
        for shelf, x, have, want in (
            (self.keys, hk, used, need),
            (self.values, hv, used, need),
            (self.queries, q, -(-used // every), -(-need // every)),
        ):
            shelf.room(x, want, have, pin=pinned)
        if self.near_keys is None or self.near_values is None:
            self._fetch_near(k.device, need)
        width = min(self.method.sinks + self.method.recent, need)
        capacity = self.near_keys.shape[2] if self.near_keys is not None else 0
        if width > capacity:
            size = min(self.method.sinks + self.method.recent, grown(capacity, width))
            self.near_keys, self.near_values = (
                x.new_zeros((*x.shape[:2], size, x.shape[3])) if old is None else resized(old, size, capacity)
                for old, x in ((self.near_keys, k), (self.near_values, v))
            )

    def _write(
        self,
        rows: slice,
        columns: Tensor | None,
        host: tuple[Tensor, Tensor, Tensor],
        device: tuple[Tensor, Tensor],
        old: int,
        new: int,
    ) -> None:
        """The block's tokens `columns` (None: all) of some rows to positions old .. new."""
        every, assume = self.method.keep_queries, (self.keys.data, self.values.data, self.queries.data)
        keys, values, queries = (x for x in assume if x is not None)
        if columns is not None:
            host = tuple(x[:, :, columns] for x in host)  # type: ignore[assignment]
            device = tuple(x[:, :, columns.to(x.device)] for x in device)  # type: ignore[assignment]
        q, k, v = (x[rows] for x in host)
        keys[rows, :, old:new], values[rows, :, old:new] = k, v
        first = -(-old // every) * every
        if first < new:
            queries[rows, :, first // every : -(-new // every)] = q[:, :, first - old :: every]
        assert self.near_keys is not None and self.near_values is not None
        for near, x in ((self.near_keys, device[0]), (self.near_values, device[1])):
            self._place(near, rows, x[rows], old, new)

    def _place(self, near: Tensor, rows: slice, x: Tensor, old: int, new: int) -> None:
        """Of tokens ``[b, G, new - old, .]`` at positions old .. new those that are static, into their slots."""
        m = self.method
        if new - old == 1:
            slot = old if old < m.sinks else m.sinks + (old - m.sinks) % m.recent
            near[rows, :, slot : slot + 1] = x
            return
        if old < m.sinks:
            stop = min(new, m.sinks)
            near[rows, :, old:stop] = x[:, :, : stop - old]
        start = max(old, m.sinks, new - m.recent)
        if start < new:
            slots = (m.sinks + (torch.arange(start, new) - m.sinks) % m.recent).to(near.device)
            near[rows, :, slots] = x[:, :, start - old :]

    def _fetch_near(self, device: torch.device, need: int) -> None:
        """The static set anew from the host (after `restore`, or on the first call, when there is nothing yet)."""
        if not self.lengths or not max(self.lengths):
            return
        m = self.method
        width = min(m.sinks + m.recent, grown(0, max(need, max(self.lengths))))
        near = []
        for shelf in (self.keys, self.values):
            x = shelf.look()
            out = torch.zeros((*x.shape[:2], width, x.shape[3]), dtype=x.dtype, device=device)
            for row, length in enumerate(self.lengths):
                at, first = slice(row, row + 1), max(0, length - m.recent)
                if first and m.sinks:
                    self._place(out, at, x[at, :, : min(m.sinks, first)].to(device), 0, min(m.sinks, first))
                if length:
                    self._place(out, at, x[at, :, first:length].to(device), first, length)
            near.append(out)
        self.near_keys, self.near_values = near

    # -- taking back ------------------------------------------------------------------------------------------

    def announce(self, prompt: int) -> None:
        """See `LayerCache.announce`: what was recorded is settled, and recording stops."""
        self.prompt, self.recording, self.before = prompt, False, []

    def record(self) -> None:
        """See `LayerCache.record`."""
        self.recording = True

    def crop(self, tokens: int) -> None:
        """Forget the newest `tokens` exactly. Beyond the last building of the index only what was recorded can be."""
        if tokens > self.seen:
            raise StateError(f"cannot forget {tokens} tokens of a cache that holds {self.seen}")
        columns = self.seen - tokens
        fewer = [n - (tokens - sum(c >= columns for c in gap)) for n, gap in zip(self.lengths, self.gaps, strict=True)]
        built, before = self.built, list(self.before)
        while any(n < at for n, at in zip(fewer, built.at, strict=True)):
            if not before:
                raise StateError(
                    f"{self.method.who}: cannot forget {tokens} tokens: the index was built since then. Start speculative "
                    "decoding through `generate` (it records), or keep a copy of the cache"
                )
            built = before.pop()
        self.built, self.before = built, []
        self.gaps = [[c for c in gap if c < columns] for gap in self.gaps]
        old, self.lengths, self.seen = self.lengths, fewer, columns
        if not columns:
            kept = {name: getattr(self, name) for name in ("prompt", "recording")}
            self.reset()
            vars(self).update(kept)
        elif self.near_keys is not None and self.near_values is not None:
            self._bring_back(old)

    def _bring_back(self, old: list[int]) -> None:
        """Tokens that had left the recent window, and belong to it again, into their slots."""
        m = self.method
        for near, shelf in ((self.near_keys, self.keys), (self.near_values, self.values)):
            assert near is not None
            x = shelf.look()
            for row, (before, now) in enumerate(zip(old, self.lengths, strict=True)):
                first, last = max(m.sinks, now - m.recent), min(now, max(m.sinks, before - m.recent))
                if first < last:
                    at = slice(row, row + 1)
                    slots = (m.sinks + (torch.arange(first, last) - m.sinks) % m.recent).to(near.device)
                    near[at, :, slots] = x[at, :, first:last].to(near.device)

    def select(self, rows: Tensor) -> None:
        """See `LayerCache.select`."""
        if self.before:
            raise StateError("beams cannot be reordered while a speculative block is not settled; crop it first")
        order = rows.tolist()
        for shelf in (self.keys, self.values, self.queries):
            shelf.select(rows)
        if self.near_keys is not None and self.near_values is not None:
            here = rows.to(self.near_keys.device)
            self.near_keys, self.near_values = (x.index_select(0, here) for x in (self.near_keys, self.near_values))
        if self.lengths:
            self.lengths, self.gaps = [self.lengths[r] for r in order], [list(self.gaps[r]) for r in order]
            index, end, at = self.built
            moved = None if index is None else index.select(rows)
            self.built = _Built(moved, [end[r] for r in order], [at[r] for r in order])

    # -- the rest of the contract -----------------------------------------------------------------------------

    def bytes(self) -> int:
        """Bytes of the host's tensors, the index and the static set, spare capacity included."""
        held = [x.index for x in (self.built, *self.before) if x.index is not None]
        every = {id(x): x.bytes() for x in (self.keys, self.values, self.queries, *held)}
        return sum(every.values()) + self.resident()

    def resident(self) -> int:
        """Bytes of the static set."""
        return sum(x.numel() * x.element_size() for x in (self.near_keys, self.near_values) if x is not None)

    def kept(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths, default=0)

    def positions(self) -> Tensor:
        """``[B, G, S]``."""
        if not self.lengths:
            raise StateError("the cache is empty")
        slot = torch.arange(self.kept())
        mine = slot < torch.tensor(self.lengths)[:, None]
        return torch.where(mine, slot, -1)[:, None].expand(-1, self.geometry.kv_heads, -1)

    def tensors(self) -> dict[str, Tensor]:
        """Copies of what the host holds, of the index, and how many tokens each row holds."""
        if not self.lengths:
            return {}
        every, used = self.method.keep_queries, self.kept()
        size = {"keys": used, "values": used, "queries": -(-used // every)}
        out = {name: getattr(self, name).look()[:, :, :n].clone() for name, n in size.items()}
        gaps = torch.full((len(self.gaps), max(map(len, self.gaps))), -1, dtype=torch.int64)
        for row, gap in enumerate(self.gaps):
            gaps[row, : len(gap)] = torch.tensor(gap, dtype=torch.int64)
        out |= {
            "rows": torch.tensor([self.lengths, self.built.end, self.built.at]),
            "gaps": gaps,
            "seen": torch.tensor(self.seen),
        }
        index = self.built.index
        return out if index is None else out | {f"index.{n}": x.clone() for n, x in index.parts.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """See `LayerCache.restore`. The static set is fetched by the next call."""
        self.reset()
        if not tensors:
            return
        for name in ("keys", "values", "queries"):
            getattr(self, name).fill(tensors[name].cpu())
        self.lengths, end, at = tensors["rows"].tolist()
        self.gaps = [[c for c in gap if c >= 0] for gap in tensors["gaps"].tolist()]
        self.seen = int(tensors["seen"])
        parts = {name[6:]: x.cpu().clone() for name, x in tensors.items() if name.startswith("index.")}
        if parts and self.method.kind is None:
            raise StateError(f"{self.method.who}: these tensors hold an index, and this setting has none")
        self.built = _Built(self.method.kind(parts) if parts and self.method.kind else None, end, at)


def _part(step: Step, seen: int, start: int, stop: int) -> Step:
    """The part of a step that concerns its tokens start .. stop; `seen` columns precede its first."""
    padding = None if step.padding is None else step.padding[:, : seen + stop]
    return Step(step.position[:, start:stop], step.scale, padding, None, step.compute)


def _before(lengths: list[int], start: int, stop: int, device: torch.device) -> Tensor:
    """Which of the slots start .. stop each row has filled: bool ``[B, 1, 1, stop - start]``."""
    slot = torch.arange(start, stop)
    return (slot < torch.tensor(lengths)[:, None])[:, None, None].to(device)
