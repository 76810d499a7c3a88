r"""The whole history of every row, exactly, in which what rows have in common is held once.

A row is a chain of runs, then tokens of its own. A run holds keys and values of consecutive tokens for all rows whose chain
it is in; chains fork where texts part, as in a tree, so prompts with one system text and groups of samples of each prompt share
both. A run is read once for all its rows; what a row reads is the merge of its parts by their lse.

Which tokens are common is found in a block of several tokens: the first site of the cache compares keys and values, token by
token, where equal tokens are equal up to rounding; the others follow it, unless their own keys and values say that something
else has made the rows differ. A row that is repeated (`select`) shares what it holds from then on.

Axes: B batch, H query heads, G key/value heads, N new queries, S own columns, D head width, E value width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, final

import torch
from torch import Tensor

from qkv.caches._stores.dense import grown, rearranged, resized
from qkv.caches._stores.shared import spread, together
from qkv.core.attend import attend, sdpa
from qkv.core.cache import Board, Geometry, LayerCache, Step
from qkv.core.errors import Refused, StateError
from qkv.core.merge import merge

FIRST, FOUND = "shared-prefix first", "shared-prefix found"


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
        self.index: Tensor | None = None  # rows that read it, where not all do

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

    shortest: fewest tokens that become a run.
    """

    def __init__(self, geometry: Geometry, shortest: int, who: str) -> None:
        self.geometry, self.shortest, self.who = geometry, shortest, who
        self.recording = False
        self.reset()

    def reset(self) -> None:
        """Forget everything (not the recording mode)."""
        self.chains: list[list[Run]] = []
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.place: Tensor | None = None  # int32 [B, capacity], -1 = padding
        self.real: Tensor | None = None  # bool [B, seen], where some columns are padding
        self.gaps = False  # whether an own column may be padding
        self.width = 0  # own columns in use
        self.loose = 0  # of these, as many of the newest are the newest logical columns
        self.prompt: int | None = None
        self.apart = False
        self.seen = 0

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
        if whole is None:
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
        room = grown(self.keys.shape[2], total)
        if room != self.keys.shape[2]:
            self.keys, self.values = (resized(x, room, self.width) for x in (self.keys, self.values))
            self.place = resized(self.place[:, None], room, self.width, -1)[:, 0]
        self.keys[:, :, self.width : total] = k
        self.values[:, :, self.width : total] = v
        self.place[:, self.width : total] = step.position
        self.real, self.gaps = step.padding, self.gaps or step.padding is not None
        self.width, self.loose, self.seen = total, self.loose + n, self.seen + n

    def _read(self, q: Tensor, scale: float) -> Tensor:
        """Every run for all its rows, then everybody's own, merged."""
        assert self.keys is not None and self.values is not None and self.place is not None
        b, parts, wide = q.shape[0], [], torch.promote_types(q.dtype, torch.float32)
        for run in self._runs():
            k, v = run.read()
            if run.index is None:
                out, lse = together(q, k, v, scale=scale)
            else:
                out, lse = spread(*together(q[run.index], k, v, scale=scale), run.index, b)
            parts.append((out, lse.to(wide)))
        mask = (self.place[:, None, None, : self.width] >= 0) if self.gaps else None
        k, v = self.keys[:, :, : self.width], self.values[:, :, : self.width]
        own = attend(q, k, v, mask=mask, causal=q.shape[2] > 1, scale=scale)
        return merge(*parts, (own.out, own.lse.to(wide)))[0] if parts else own.out

    def _whole(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all rows laid out by logical columns, for an attention that is not ours."""
        assert self.keys is not None and self.values is not None and self.place is not None
        b, g = self.keys.shape[:2]
        outs = [x.new_zeros(b, g, self.seen, x.shape[3]) for x in (self.keys, self.values)]
        for row, chain in enumerate(self.chains):
            mine = self.place[row, : self.width] >= 0
            for which, (x, out) in enumerate(zip((self.keys, self.values), outs, strict=True)):
                line = torch.cat([*(run.read()[which][0] for run in chain), x[row, :, : self.width][:, mine]], 1)
                out[row, :, slice(None) if self.real is None else self.real[row]] = line
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
        runs = self._runs()
        for run in runs:
            while True:
                after = [c[c.index(run) + 1] for c in self.chains if run in c and c[-1] is not run]
                if not after or self._readers(after[0]) != self._readers(run):
                    break
                run.append(*after[0].read())
                for chain in self.chains:
                    if after[0] in chain:
                        chain.remove(after[0])
        for run in self._runs():
            rows = self._readers(run)
            run.index = None if len(rows) == len(self.chains) else torch.tensor(rows, device=run.keys.device)

    def _runs(self) -> list[Run]:
        """All runs, once each, those of a chain in order."""
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
            if self.real is not None:
                gone = self.real[:, self.seen - tokens :].sum(-1).tolist()
            self._straighten()
            lengths = self._lengths()
            for row, (many, own) in enumerate(zip(gone, lengths, strict=True)):
                self._shorten(row, many - own)
            self._keep([(0, max(0, own - many)) for many, own in zip(gone, lengths, strict=True)], lengths)
            self._tidy()
        self.seen -= tokens
        self.real = None if self.real is None else self.real[:, : self.seen]

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
        """See `LayerCache.select`: what a repeated row holds becomes common, unless it is short."""
        if self.keys is None or self.values is None or self.place is None:
            return
        picked = rows.tolist()
        repeated = sorted({row for row in picked if picked.count(row) > 1})
        if repeated and self.width >= self.shortest and not self.recording:
            self._straighten()
            lengths = self._lengths()
            found = [Fold([row], 0, lengths[row]) for row in repeated if lengths[row] >= self.shortest]
            if found:
                self._fold(found)
        self.chains = [list(self.chains[row]) for row in picked]
        self.keys, self.values = rearranged(self.keys, rows), rearranged(self.values, rows)
        self.place = rearranged(self.place, rows)
        if self.real is not None:  # the host's own mask: never written to
            self.real = self.real.index_select(0, rows.to(self.real.device))
        self._tidy()

    def _held(self) -> Iterator[Tensor]:
        for run in self._runs():
            yield from run.tensors()
        yield from (x for x in (self.keys, self.values, self.place) if x is not None)

    def bytes(self) -> int:
        """Bytes of runs, own tokens and positions, unused capacity included, and of the host's padding mask."""
        mask = 0 if self.real is None else self.real.untyped_storage().nbytes()
        return mask + sum(x.numel() * x.element_size() for x in self._held())

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
        runs = self._runs()
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
        return out if self.real is None else out | {"real": self.real.clone()}

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
