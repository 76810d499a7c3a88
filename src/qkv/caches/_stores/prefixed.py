r"""The whole history of every row, exactly, in which what rows have in common is held once.

A row is a chain of runs, then tokens of its own. A run holds keys and values of consecutive tokens for all rows whose chain
it is in; chains fork where texts part, as in a tree, so prompts with one system text and groups of samples of each prompt share
both. A run is read once for all its rows; what a row reads is the merge of its parts by their lse.

Which tokens are common is found in a block of several tokens: the first site of the cache compares keys and values, token by
token, where equal tokens are equal up to rounding; the others follow it, unless their own keys and values say that something
else has made the rows differ. A row that is repeated (`select`) shares what it holds from then on.

One token is read by few operations. Plainly: the logits of the run that all rows read, which are one product, and those of own
tokens go through one softmax; only runs that some rows read are merged by lse. By kernels, on CUDA: `qkv.kernels.prefixed`, whose
work list is made again when the partition changes. Where room was reserved the partition stays as the prompt has left it, so
that steps can be captured.

Axes: B batch, H query heads, G key/value heads, N new queries, S own columns, D head width, E value width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.caches._stores.dense import grown, rearranged, resized
from qkv.caches._stores.shared import spread, together
from qkv.core.attend import attend, sdpa
from qkv.core.cache import Board, Geometry, LayerCache, Now, Step
from qkv.core.errors import Refused, StateError
from qkv.core.kernel import kernel, served
from qkv.core.merge import merge

FIRST, FOUND, ROWS = "shared-prefix first", "shared-prefix found", "shared-prefix rows"
WIDEST, MOST = 256, 64  # channels of a head, and query heads of a group, that kernels are asked for


class Fold(NamedTuple):
    """The own tokens begin..end of `rows`, which are the same in all of them."""

    rows: list[int]
    begin: int
    end: int


@final
class Run:
    """Tokens held once: keys ``[1, G, capacity, D]``, values ``[1, G, capacity, E]``, of which `length` count."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = (x.clone(memory_format=torch.contiguous_format) for x in (keys, values))
        self.length = keys.shape[2]
        self.rows: list[int] = []  # that read it
        self.index: Tensor | None = None  # the same on the device, where not all do

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the tokens held."""
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def append(self, keys: Tensor, values: Tensor) -> None:
        """More tokens behind these."""
        total = self.length + keys.shape[2]
        room = grown(self.keys.shape[2], total)
        if room != self.keys.shape[2]:
            self.keys, self.values = (resized(x, room, self.length) for x in (self.keys, self.values))
        self.keys[:, :, self.length : total] = keys
        self.values[:, :, self.length : total] = values
        self.length = total

    def cut(self, at: int) -> Run:
        """Keep the first `at` tokens; the others as a run of their own."""
        keys, values = self.read()
        rest = Run(keys[:, :, at:], values[:, :, at:])
        self.keys, self.values = (x[:, :, :at].clone(memory_format=torch.contiguous_format) for x in (keys, values))
        self.length = at
        return rest

    def tensors(self) -> tuple[Tensor, ...]:
        """Everything held."""
        return (self.keys, self.values) if self.index is None else (self.keys, self.values, self.index)


@final
class PrefixedCache(LayerCache):
    """Chains of runs, and own keys ``[B, G, capacity, D]`` and values ``[B, G, capacity, E]`` at positions ``[B, capacity]``.

    shortest: fewest tokens that become a run. room: logical tokens to have room for, once it is known what is common.
    """

    def __init__(self, geometry: Geometry, shortest: int, who: str) -> None:
        self.geometry, self.shortest, self.who = geometry, shortest, who
        self.recording = False
        # The table of the work list that a captured step reads: while it is held, no other list can lie at its address.
        self.captured: Tensor | None = None
        self.reset()

    def reset(self) -> None:
        """Forget everything (not the recording mode)."""
        self.chains: list[list[Run]] = []
        self.runs: list[Run] = []  # of all chains, once each, those of a chain in order
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.place: Tensor | None = None  # int32 [B, capacity], -1 = padding
        self.real: Tensor | None = None  # bool [B, seen], where some columns are padding
        self.gaps = False  # whether an own column may be padding
        self.width = 0  # own columns in use
        self.loose = 0  # of these, as many of the newest are the newest logical columns
        self.prompt: int | None = None
        self.apart = False
        self.room = 0
        self.seen = 0
        self.work: tuple[tuple[Any, ...], Any] | None = None  # what the kernels' work list stands on, and the list

    def join(self, board: Board) -> None:
        """See `LayerCache.join`: the first to join decides what is common."""
        self.board = board
        board.notes.setdefault(FIRST, self.geometry.layer)

    def announce(self, prompt: int) -> None:
        """See `LayerCache.announce`."""
        self.prompt = prompt

    def record(self) -> None:
        """See `LayerCache.record`: from now on only a prompt is searched for common tokens."""
        self.recording = True

    # -- one call ---------------------------------------------------------------------------------------------------

    def attend(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """See `LayerCache.attend`. The first block attends to the live tensors, so gradients flow through it."""
        if step.mask is not None or not step.causal:
            what = "a mask of its own" if step.mask is not None else "bidirectional attention"
            raise Refused(
                f"{self.who}: a call with {what} was given, under which equal beginnings need not have equal keys; only "
                "causal attention with padding can share them: revert the method for such calls"
            )
        first, n = self.seen == 0, k.shape[2]
        mask = None if step.padding is None else step.padding[:, None, None, :]
        whole = (k, v) if first else None
        self._append(k.detach(), v.detach(), step)
        if step.compute is not None and whole is None:
            whole = self._whole()
        if whole is None and n == 1:
            out = self._next(q, step.scale)
        elif whole is None:
            out = self._read(q, step.scale)
        else:
            out = (step.compute or sdpa)(q, *whole, mask=mask, causal=True, scale=step.scale)
        past = self.prompt is not None and self.seen > self.prompt
        if n > 1 and len(self.chains) > 1 and not (self.recording and (past or self.prompt is None)):
            self._share()
        return out

    def _append(self, k: Tensor, v: Tensor, step: Step) -> None:
        b, g, n, _ = k.shape
        if self.keys is None or self.values is None or self.place is None:
            self.chains = [[] for _ in range(b)]
            self.keys, self.values = (x.new_empty(b, g, n, x.shape[3]) for x in (k, v))
            self.place = torch.empty(b, n, dtype=torch.int32, device=k.device)
        total = self.width + n
        if total > self.keys.shape[2]:
            room = max(grown(self.keys.shape[2], total), self.width + self.room - self.seen)
            self.keys, self.values = (resized(x, room, self.width) for x in (self.keys, self.values))
            self.place = resized(self.place[:, None], room, self.width, -1)[:, 0]
        if n == 1 and self._kernels(k):
            kernel("prefixed:append")(k, v, step.position, self.keys, self.values, self.place, width=self.width)
        else:
            self.keys[:, :, self.width : total] = k
            self.values[:, :, self.width : total] = v
            self.place[:, self.width : total] = step.position
        self.real, self.gaps = step.padding, self.gaps or step.padding is not None
        self._count(n)

    def _count(self, n: int) -> None:
        self.width, self.loose, self.seen = self.width + n, self.loose + n, self.seen + n

    def _kernels(self, x: Tensor) -> bool:
        """Whether kernels take one token of this site."""
        at = self.geometry
        return served(x) and max(at.head_dim, at.value_dim) <= WIDEST and at.heads <= MOST * at.kv_heads

    def _read(self, q: Tensor, scale: float) -> Tensor:
        """Every run for all its rows, then everybody's own, merged."""
        wide = torch.promote_types(q.dtype, torch.float32)
        own = attend(q, *self._held_own(), mask=self._mask(), causal=q.shape[2] > 1, scale=scale)
        parts = [self._part(run, q, scale, wide) for run in self.runs]
        return merge(*parts, (own.out, own.lse.to(wide)))[0] if parts else own.out

    def _part(self, run: Run, q: Tensor, scale: float, wide: torch.dtype) -> tuple[Tensor, Tensor]:
        """What a run gives to all rows, nothing to those that do not read it; and its lse."""
        k, v = run.read()
        if run.index is None:
            out, lse = together(q, k, v, scale=scale)
        else:
            out, lse = spread(*together(q[run.index], k, v, scale=scale), run.index, q.shape[0])
        return out, lse.to(wide)

    def _held_own(self) -> tuple[Tensor, Tensor]:
        """Own keys and values in use."""
        assert self.keys is not None and self.values is not None
        return self.keys[:, :, : self.width], self.values[:, :, : self.width]

    def _mask(self) -> Tensor | None:
        """``[B, 1, 1, width]``: own columns that are no padding; None where all are."""
        assert self.place is not None
        return (self.place[:, None, None, : self.width] >= 0) if self.gaps else None

    def _next(self, q: Tensor, scale: float) -> Tensor:
        """One token, which is already among the own ones."""
        assert self.keys is not None and self.values is not None and self.place is not None
        if self._kernels(q):
            place = self.place if self.gaps else None
            return kernel("prefixed:prefixed_decode")(
                q, self.keys, self.values, place, self._work(), width=self.width, scale=scale
            )
        if not self.runs:
            return sdpa(q, *self._held_own(), mask=self._mask(), scale=scale)
        common = [run for run in self.runs if run.index is None]
        if len(common) != 1:
            return self._read(q, scale)
        wide = torch.promote_types(q.dtype, torch.float32)
        out, lse = self._joint(q, common[0], scale, wide, len(self.runs) > 1)
        if lse is None:
            return out
        others = [self._part(run, q, scale, wide) for run in self.runs if run is not common[0]]
        return merge(*others, (out, lse))[0]

    def _joint(
        self, q: Tensor, run: Run, scale: float, wide: torch.dtype, merged: bool
    ) -> tuple[Tensor, Tensor | None]:
        """One token over a run of all rows and own tokens in one softmax; its lse where it is to be merged."""
        (b, h, _, d), (k, v), (own_k, own_v) = q.shape, run.read(), self._held_own()
        g, p, w, e = k.shape[1], run.length, self.width, v.shape[3]
        q = (q * scale).reshape(b, g, h // g, d)
        shared = torch.bmm(q.transpose(0, 1).reshape(g, -1, d), k[0].mT).view(g, b, -1, p)
        own = torch.bmm(q.view(b * g, -1, d), own_k.reshape(b * g, w, d).mT).view(b, g, -1, w)
        mask = self._mask()
        if mask is not None:
            own = own.masked_fill(~mask, -torch.inf)
        logits = torch.cat((shared, own.transpose(0, 1)), 3).to(wide)  # [G, B, R, P + W]
        share = logits.softmax(-1).to(v.dtype)
        out = torch.bmm(share.view(g, -1, p + w)[..., :p], v[0]).view(g, b, -1, e).transpose(0, 1)
        mine = share[..., p:].transpose(0, 1).reshape(b * g, -1, w)
        out = (out + torch.bmm(mine, own_v.reshape(b * g, w, e)).view(b, g, -1, e)).reshape(b, h, 1, e)
        return out, logits.logsumexp(-1).transpose(0, 1).reshape(b, h, 1) if merged else None

    # -- a step on static buffers -----------------------------------------------------------------------------------

    def reserve(self, tokens: int) -> None:
        """See `LayerCache.reserve`: own tokens get the room at the first step, when it is known what is common."""
        self.room = tokens

    def static(self) -> bool:
        """On CUDA, with room for the token."""
        return self.keys is not None and self.width < self.keys.shape[2] and self._kernels(self.keys)

    def step(self, q: Tensor, k: Tensor, v: Tensor, scale: float, now: Now) -> Tensor:
        """See `LayerCache.step`."""
        assert self.keys is not None and self.values is not None and self.place is not None
        work, behind = self._work(), self.seen - self.width
        self.captured = work.table
        where = {"width": behind, "cursor": now.cursor}
        kernel("prefixed:append")(k, v, now.position, self.keys, self.values, self.place, **where)
        self._count(1)
        place = self.place if self.gaps else None
        return kernel("prefixed:prefixed_decode")(q, self.keys, self.values, place, work, **where, scale=scale)

    def advance(self) -> None:
        """See `LayerCache.advance`."""
        self._count(1)

    def counters(self) -> dict[str, Any]:
        """See `LayerCache.counters`."""
        return {"seen": self.seen, "width": self.width, "loose": self.loose}

    def buffers(self) -> tuple[Tensor, ...]:
        """Runs, own tokens, and the work list, which is another one whenever the partition is."""
        return (self._work().table, *self._held()) if self.static() else ()

    def _work(self) -> Any:
        """The kernels' work list, made again when runs, rows or own buffers are other ones."""
        assert self.keys is not None and self.values is not None and self.place is not None
        own = (self.keys, self.values, self.place)
        stands = (
            *((x.data_ptr(), x.shape) for x in own),
            self.seen - self.width,
            self.gaps,
            *((x.keys.data_ptr(), x.values.data_ptr(), x.keys.shape[2], x.length, tuple(x.rows)) for x in self.runs),
        )
        if self.work is None or self.work[0] != stands:
            runs = [(run.keys, run.values, run.length, run.rows) for run in self.runs]
            at, like = self.geometry, {"dtype": self.keys.dtype, "device": self.keys.device}
            made = kernel("prefixed:work_list")(runs, len(self.chains), at.heads, at.kv_heads, **like)
            self.work = stands, made
        return self.work[1]

    # -- everything at once -----------------------------------------------------------------------------------------

    def _whole(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all rows laid out by logical columns, for an attention that is not ours."""
        assert self.keys is not None and self.values is not None and self.place is not None
        b, g = self.keys.shape[:2]
        real = self._real()
        outs = [x.new_zeros(b, g, self.seen, x.shape[3]) for x in (self.keys, self.values)]
        for row, chain in enumerate(self.chains):
            mine = self.place[row, : self.width] >= 0
            for which, (x, out) in enumerate(zip((self.keys, self.values), outs, strict=True)):
                line = torch.cat([*(run.read()[which][0] for run in chain), x[row, :, : self.width][:, mine]], 1)
                out[row, :, slice(None) if real is None else real[row]] = line
        return outs[0], outs[1]

    # -- what is common ---------------------------------------------------------------------------------------------

    def _share(self) -> None:
        notes = {} if self.board is None else self.board.notes
        decides = notes.get(FIRST, self.geometry.layer) == self.geometry.layer
        if decides:
            self._straighten()
            found = self._found()
            notes[FOUND] = [self.seen, *((list(f.rows), f.begin, f.end) for f in found)]
        else:
            seen, *told = notes.get(FOUND, [-1])
            found = [Fold(*x) for x in told] if seen == self.seen else []
        if not found or self.apart:
            return
        if not decides:
            self._straighten()
            self.apart = not self._agrees(found)
        if not self.apart:
            self._fold(found)

    def _found(self) -> list[Fold]:
        """What the own tokens of rows with one chain have in common, from their beginning."""
        lengths, found = self._lengths(), []
        alike: dict[tuple[int, ...], list[int]] = {}
        for row, chain in enumerate(self.chains):
            alike.setdefault(tuple(map(id, chain)), []).append(row)
        pending = self.prompt is not None and self.seen < self.prompt
        for rows in alike.values():
            self._descend(rows, 0, 0, lengths, pending, found)
        return found

    def _descend(
        self, rows: list[int], begin: int, depth: int, lengths: list[int], pending: bool, found: list[Fold]
    ) -> None:
        """Rows that agree up to `depth`, of which begin..depth is in no fold yet; pending: a row that ends may still go on."""
        while len(rows) > 1:
            if pending and any(lengths[row] == depth for row in rows):
                return
            agree = self._agreement(rows, depth, lengths)
            others = [row for row, n in zip(rows[1:], agree, strict=True) if not n]
            self._descend(others, begin, depth, lengths, pending, found)
            rows = [rows[0], *(row for row, n in zip(rows[1:], agree, strict=True) if n)]
            if len(rows) > 1:
                depth += min(n for n in agree if n)
                if depth - begin >= self.shortest or (begin == 0 and self._continues(rows)):
                    found.append(Fold(rows, begin, depth))
                    begin = depth

    def _continues(self, rows: list[int]) -> bool:
        """Whether the rows are those that read the last run of their chain: more in it costs no read of its own."""
        chain = self.chains[rows[0]]
        return bool(chain) and sorted(rows) == self._readers(chain[-1])

    def _agreement(self, rows: list[int], depth: int, lengths: list[int]) -> list[int]:
        """For every row but the first, how many tokens from `depth` on it has in common with the first."""
        assert self.keys is not None
        dtype, runs = self.keys.dtype, []
        wide = torch.promote_types(dtype, torch.float32)
        bound = max(2 * torch.finfo(dtype).eps, 64 * torch.finfo(wide).eps) ** 2
        for row in rows[1:]:
            end = min(lengths[rows[0]], lengths[row])
            gap = size = torch.zeros(end - depth, dtype=wide, device=self.keys.device)
            for a, b in zip(*(self._own(r, depth, end, lengths) for r in (rows[0], row)), strict=True):
                gap = gap + (a - b).to(wide).square().sum((0, 1, 3))
                size = size + a.to(wide).square().sum((0, 1, 3))
            runs.append((gap <= bound * size).int().cumprod(0).sum())
        return torch.stack(runs).tolist()

    def _agrees(self, found: list[Fold]) -> bool:
        """Whether this site's own keys and values bear out what another site found, up to rounding."""
        assert self.keys is not None
        lengths, fine = self._lengths(), []
        bound = torch.finfo(self.keys.dtype).eps
        for rows, begin, end in found:
            first = self._own(rows[0], begin, end, lengths)
            for row in rows[1:]:
                for a, b in zip(first, self._own(row, begin, end, lengths), strict=True):
                    a, b = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (a, b))
                    fine.append((a - b).square().sum() <= bound * a.square().sum())
        return bool(torch.stack(fine).all())

    def _fold(self, found: list[Fold]) -> None:
        """Move what is common from the rows' own tokens into runs."""
        lengths, done = self._lengths(), [0] * len(self.chains)
        for rows, begin, end in found:
            keys, values = self._own(rows[0], begin, end, lengths)
            if self._continues(rows):
                self.chains[rows[0]][-1].append(keys, values)
            else:
                run = Run(keys, values)
                for row in rows:
                    self.chains[row].append(run)
            for row in rows:
                done[row] = end
        self._keep(list(zip(done, lengths, strict=True)), lengths)
        self._tidy()

    def _tidy(self) -> None:
        """Runs that the same rows read one after the other become one; runs know who reads them."""
        for run in self._listed():
            while True:
                after = [c[c.index(run) + 1] for c in self.chains if run in c and c[-1] is not run]
                if not after or self._readers(after[0]) != self._readers(run):
                    break
                run.append(*after[0].read())
                for chain in self.chains:
                    if after[0] in chain:
                        chain.remove(after[0])
        self.runs = self._listed()
        for run in self.runs:
            rows = self._readers(run)
            some = len(rows) != len(self.chains)
            if rows != run.rows or some != (run.index is not None):
                run.rows, run.index = rows, torch.tensor(rows, device=run.keys.device) if some else None

    def _listed(self) -> list[Run]:
        return list({id(run): run for chain in self.chains for run in chain}.values())

    def _readers(self, run: Run) -> list[int]:
        return [row for row, chain in enumerate(self.chains) if run in chain]

    # -- own tokens -------------------------------------------------------------------------------------------------

    def _lengths(self) -> list[int]:
        """Own tokens of every row."""
        assert self.place is not None
        return (self.place[:, : self.width] >= 0).sum(-1).tolist()

    def _straighten(self) -> None:
        """Put padding among the own columns to their left, so that a row's own tokens are a slice."""
        assert self.keys is not None and self.values is not None and self.place is not None
        real = self.place[:, : self.width] >= 0
        if not self.gaps or bool((real[:, 1:] | ~real[:, :-1]).all()):
            return
        order = real.to(torch.uint8).argsort(dim=-1, stable=True)
        for x in (self.keys, self.values):
            x[:, :, : self.width] = x[:, :, : self.width].gather(
                2, order[:, None, :, None].expand_as(x[:, :, : self.width])
            )
        self.place[:, : self.width] = self.place[:, : self.width].gather(1, order)
        self.loose = 0

    def _own(self, row: int, begin: int, end: int, lengths: list[int]) -> tuple[Tensor, Tensor]:
        """Keys and values ``[1, G, end - begin, .]`` of some own tokens of a row (straightened)."""
        assert self.keys is not None and self.values is not None
        start = self.width - lengths[row]
        at = slice(start + begin, start + end)
        return self.keys[row : row + 1, :, at], self.values[row : row + 1, :, at]

    def _keep(self, spans: list[tuple[int, int]], lengths: list[int]) -> None:
        """Of the own tokens of every row (straightened) only those begin..end, in buffers of their size."""
        assert self.keys is not None and self.values is not None and self.place is not None
        width = max(b - a for a, b in spans)
        keys, values = (x.new_zeros(*x.shape[:2], width, x.shape[3]) for x in (self.keys, self.values))
        place = self.place.new_full((len(spans), width), -1)
        for row, (a, b) in enumerate(spans):
            if a < b:
                at = self.width - lengths[row]
                keys[row, :, width - b + a :], values[row, :, width - b + a :] = (
                    x[0] for x in self._own(row, a, b, lengths)
                )
                place[row, width - b + a :] = self.place[row, at + a : at + b]
        self.gaps = any(b - a < width for a, b in spans)
        self.keys, self.values, self.place, self.width, self.loose = keys, values, place, width, 0

    # -- the rest of the contract -----------------------------------------------------------------------------------

    def crop(self, tokens: int) -> None:
        """Forget the newest `tokens`, where they are shared too; runs that end earlier for some rows are parted."""
        if tokens > self.seen:
            raise StateError(f"cannot forget {tokens} tokens of a cache that holds {self.seen}")
        if tokens and tokens <= self.loose:
            self.width, self.loose = self.width - tokens, self.loose - tokens
        elif tokens:
            gone = [tokens] * len(self.chains)
            if (real := self._real()) is not None:
                gone = real[:, self.seen - tokens :].sum(-1).tolist()
            self._straighten()
            lengths = self._lengths()
            for row, (many, own) in enumerate(zip(gone, lengths, strict=True)):
                self._shorten(row, many - own)
            self._keep([(0, max(0, own - many)) for many, own in zip(gone, lengths, strict=True)], lengths)
            self._tidy()
        self.seen -= tokens
        self.real = None if self.real is None else self.real[:, : self.seen]

    def _real(self) -> Tensor | None:
        """The padding mask of all columns: those that captured steps have added are none."""
        if self.real is not None and self.real.shape[1] < self.seen:
            self.real = F.pad(self.real, (0, self.seen - self.real.shape[1]), value=True)
        return self.real

    def _shorten(self, row: int, tokens: int) -> None:
        """Take the newest `tokens` out of a row's chain."""
        while tokens > 0:
            run = self.chains[row][-1]
            if run.length > tokens:
                rest = run.cut(run.length - tokens)
                for chain in self.chains:
                    if run in chain:
                        chain.insert(chain.index(run) + 1, rest)
                run = rest
            self.chains[row].pop()
            tokens -= run.length

    def select(self, rows: Tensor) -> None:
        """See `LayerCache.select`: what a repeated row holds becomes common, unless it is short or steps may be captured."""
        if self.keys is None or self.values is None or self.place is None:
            return
        folds = self.width >= self.shortest and not self.recording and not (self.room and len(rows) == len(self.chains))
        if folds or any(run.index is not None for run in self.runs):
            self._rearrange(self._numbers(rows), folds)
        elif len(rows) != len(self.chains):  # all rows hold the same chain: which are chosen need not be known here
            self.chains = [list(self.chains[0]) for _ in range(len(rows))]
            self._tidy()
        self.keys, self.values = rearranged(self.keys, rows), rearranged(self.values, rows)
        self.place = rearranged(self.place, rows)
        if self.real is not None:  # the host's own mask: never written to
            self.real = self.real.index_select(0, rows.to(self.real.device))

    def _rearrange(self, picked: list[int], folds: bool) -> None:
        repeated = sorted({row for row in picked if picked.count(row) > 1})
        if repeated and folds:
            self._straighten()
            lengths = self._lengths()
            found = [Fold([row], 0, lengths[row]) for row in repeated if lengths[row] >= self.shortest]
            if found:
                self._fold(found)
        chains = [list(self.chains[row]) for row in picked]
        if chains != self.chains:
            self.chains = chains
            self._tidy()

    def _numbers(self, rows: Tensor) -> list[int]:
        """Rows as numbers; the device is asked once for all sites that are given the same tensor."""
        if self.board is None or rows.is_inference():  # which does not tell whether it was written to
            return rows.tolist()
        notes = self.board.notes
        known = notes.get(ROWS)
        if known is None or known[0] is not rows or known[1] != rows._version:
            notes[ROWS] = known = (rows, rows._version, rows.tolist())
        return known[2]

    def _held(self) -> Iterator[Tensor]:
        for run in self.runs:
            yield from run.tensors()
        yield from (x for x in (self.keys, self.values, self.place) if x is not None)

    def bytes(self) -> int:
        """Bytes of runs, own tokens, positions and the kernels' list, spare capacity included, and of the host's padding mask."""
        mask = 0 if self.real is None else self.real.untyped_storage().nbytes()
        work = 0 if self.work is None else self.work[1].table.nbytes
        return mask + work + sum(x.numel() * x.element_size() for x in self._held())

    def kept(self) -> int:
        """The longest chain and the own columns."""
        return self.width + max((sum(run.length for run in chain) for chain in self.chains), default=0)

    def positions(self) -> Tensor:
        """``[B, G, S]``: those of the chain, then own ones."""
        if self.place is None or self.keys is None:
            raise StateError("the cache is empty")
        totals = [sum(run.length for run in chain) for chain in self.chains]
        line = torch.arange(max(totals), dtype=torch.int32, device=self.place.device)
        shared = torch.stack([line.masked_fill(line >= total, -1) for total in totals])
        row = torch.cat((shared, self.place[:, : self.width]), 1)
        return row[:, None].expand(-1, self.keys.shape[1], -1)

    def tensors(self) -> dict[str, Tensor]:
        """Runs by number, every row's chain of them (-1: no more), own tokens and the padding mask."""
        if self.keys is None or self.values is None or self.place is None:
            return {}
        runs = self.runs
        number = {id(run): i for i, run in enumerate(runs)}
        most = max(map(len, self.chains))
        chains = [[number[id(run)] for run in c] + [-1] * (most - len(c)) for c in self.chains]
        own = {"keys": self.keys[:, :, : self.width], "values": self.values[:, :, : self.width]}
        out = {name: x.clone(memory_format=torch.contiguous_format) for name, x in own.items()}
        out |= {"place": self.place[:, : self.width].clone(), "seen": torch.tensor(self.seen)}
        out["chains"] = torch.tensor(chains, dtype=torch.int64).view(len(chains), most)
        for i, run in enumerate(runs):
            for name, x in zip(("keys", "values"), run.read(), strict=True):
                out[f"run.{i}.{name}"] = x.clone(memory_format=torch.contiguous_format)
        real = self._real()
        return out if real is None else out | {"real": real.clone()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """See `LayerCache.restore`."""
        self.reset()
        if not tensors:
            return
        chains = tensors["chains"].tolist()
        count = 1 + max((i for chain in chains for i in chain), default=-1)
        runs = [Run(tensors[f"run.{i}.keys"], tensors[f"run.{i}.values"]) for i in range(count)]
        self.chains = [[runs[i] for i in chain if i >= 0] for chain in chains]
        self.keys, self.values, self.place = (tensors[name].clone() for name in ("keys", "values", "place"))
        self.real = tensors["real"].clone() if "real" in tensors else None
        self.width, self.seen = self.place.shape[1], int(tensors["seen"])
        self.gaps = bool((self.place < 0).any())
        self._tidy()
