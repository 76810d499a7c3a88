r"""Blocks of mixed precision: some tokens in more bits than the others, or instead of the others; each is quantised once.

    k^_md = code_md s_d + z_d           one s, z per channel of a block's part
    v^_me = (code_me s_m + z_m) c_e     one s, z per token over all heads, one c = sqrt(max |v|) per channel of the block

New tokens wait in full precision. After a call in which a row has `every` or more of them waiting, all of them become a block:
a rule (`Splits`) says from the attention that a few probe queries paid them which are precise; these are packed with `bits[0]`
bits, the others with `bits[1]`, or dropped where that is 0. Blocks are never opened again. Each head has a split of its own or
all share one; the number of precise tokens is the same for all heads of a row. A call attends to what was stored before it and
to its own tokens as they are. s, z and c are float16, codes are taken against the rounded ones.

Within a block the two parts lie one behind the other, in order; attention to stored tokens does not ask for their order. One
bit per token remembers which part it is in. Equal blocks of the same rows are stacked, so that a step takes a handful of
operations for all of them; they are read packed, a bounded number of codes in floating point at once, the keys' scales folded
into the queries and the values' into the weights. Padding is never stored, and rows are served in groups that hold the same
number of waiting tokens, so nothing depends on what else is in the batch. Plain tensors, by position, exist only for another
`Step.compute`.

On CUDA a single token reads the packed words by the kernel of `qkv.kernels.mixed`. Shapes change with every block, so the
step is not captured.

Axes: B batch, R rows of a stack, H query heads, G key/value heads, K blocks of a stack, W tokens of a block, N new tokens,
P probes, D head width, E value width.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch
from torch import Tensor

from qkv.caches._saliency import probe_mass, probe_rows, seen_by
from qkv.caches._stores.codecs import (
    PIECE,
    channel_quantize,
    cst_channel,
    cst_quantize,
    pack_bits,
    pack_flags,
    unpack_bits,
    unpack_flags,
)
from qkv.caches._stores.dense import grown, rearranged, resized
from qkv.caches._stores.recording import Recording
from qkv.core.attend import CHUNK_ELEMENTS, attend, sdpa
from qkv.core.cache import Compute, Geometry, Step
from qkv.core.errors import Refused, StateError
from qkv.core.kernel import kernel
from qkv.core.merge import merge

BLOCK_ELEMENTS = 1 << 20  # codes held in floating point at once


@dataclass(frozen=True, slots=True)
class Block:
    """Tokens that are about to be stored together, of rows that are alike.

    keys ``[R, G, W, D]``, values ``[R, G, W, E]``, starts: the position of the first one in each row. queries ``[R, H, N, D]``:
    of the newest N of them, which this call brought (N = 1: decoding filled the block). mass ``[R, H, W]``: attention that they
    drew from the probes, seen ``[W]``: how many of the probes could see each, at least 1.
    """

    keys: Tensor
    values: Tensor
    starts: list[int]
    queries: Tensor
    mass: Tensor
    seen: Tensor

    @property
    def decoded(self) -> bool:
        """Whether single tokens filled the block."""
        return self.queries.shape[2] == 1


class Splits(Protocol):
    """What a method tells the store."""

    @property
    def id(self) -> str:
        """Its name, for messages."""
        ...

    def probes_of(self, tokens: int, decoded: bool) -> tuple[int, int]:
        """How many of the newest queries of a block are probes, and how many of the others; decoded: it fills token by token."""
        ...

    def split(self, block: Block) -> tuple[Tensor, list[int]]:
        """Which tokens of a block are precise: bools ``[R, G or 1, W]``, and how many are set in every head of each row."""
        ...


# -- stored blocks ----------------------------------------------------------------------------------------------------


class Part:
    """Tokens of one precision: `count` of every block.

    keys ``[R, G, K, count, words]`` with key_scale, key_zero ``[R, G, K, D]``; values ``[R, G, K, count, words]`` with
    value_scale, value_zero ``[R, 1, K, count]``. At 16 bits keys and values lie there as they are, without ranges.
    """

    NAMES = ("keys", "key_scale", "key_zero", "values", "value_scale", "value_zero")

    def __init__(self, bits: int, count: int) -> None:
        self.bits, self.count = bits, count
        self.keys: Tensor | None = None
        self.key_scale: Tensor | None = None
        self.key_zero: Tensor | None = None
        self.values: Tensor | None = None
        self.value_scale: Tensor | None = None
        self.value_zero: Tensor | None = None

    def write(self, at: int, k: Tensor, v: Tensor, channel: Tensor) -> None:
        """Quantise k, v ``[R, G, count, .]`` into block `at`; channel ``[R, G, E]``."""
        if self.bits == 16:
            self._put(at, keys=k.unsqueeze(2), values=v.unsqueeze(2))
            return
        span, half = (k.amin(2), k.amax(2)), torch.float16
        words, scale, zero = [], None, None
        for piece in k.split(PIECE, 2):
            codes, scale, zero = channel_quantize(piece, self.bits, half, span)
            words.append(pack_bits(codes, self.bits))
        assert scale is not None and zero is not None
        self._put(at, keys=torch.cat(words, 2).unsqueeze(2), key_scale=scale.unsqueeze(2), key_zero=zero.unsqueeze(2))
        words, low, step = [], [], []
        for piece in v.split(PIECE, 2):
            codes, scale, zero, _ = cst_quantize(piece, self.bits, half, channel)
            words.append(pack_bits(codes, self.bits))
            step.append(scale)
            low.append(zero)
        self._put(at, values=torch.cat(words, 2).unsqueeze(2))
        self._put(at, value_scale=torch.cat(step, 1)[:, None, None], value_zero=torch.cat(low, 1)[:, None, None])

    def _put(self, at: int, **pieces: Tensor) -> None:
        for name, piece in pieces.items():
            setattr(self, name, _stacked(getattr(self, name), at, piece))


class Stack:
    """Blocks of one shape of the same rows.

    rows: batch rows; width: tokens that a block stands for; starts: for each block the position of its first token in every
    row. channel ``[R, G, K, E]``, flags ``[R, G or 1, K, ceil(W / 8)]``: which tokens are in the first part.
    """

    def __init__(self, rows: list[int], width: int, bits: tuple[int, int], precise: int) -> None:
        self.rows, self.width, self.precise = rows, width, precise
        counts = (precise, width - precise if bits[1] else 0)
        self.parts = [Part(b, n) for b, n in zip(bits, counts, strict=True) if n]
        self.starts: list[list[int]] = []
        self.channel: Tensor | None = None
        self.flags: Tensor | None = None

    @property
    def stored(self) -> int:
        """Tokens held for each row and head."""
        return len(self.starts) * sum(part.count for part in self.parts)

    def add(self, starts: list[int], k: Tensor, v: Tensor, flags: Tensor) -> None:
        """One more block k, v ``[R, G, W, .]``, split by bools ``[R, G or 1, W]``."""
        at, g = len(self.starts), k.shape[1]
        channel = cst_channel(v, torch.float16)
        if any(part.bits < 16 for part in self.parts):
            self.channel = _stacked(self.channel, at, channel.unsqueeze(2))
        if self.precise < self.width:
            self.flags = _stacked(self.flags, at, pack_flags(flags).unsqueeze(2))
            order, done = _parted(flags), 0
            for part in self.parts:
                index = order[..., done : done + part.count].expand(-1, g, -1).unsqueeze(-1)
                mine, theirs = (x.gather(2, index.expand(-1, -1, -1, x.shape[3])) for x in (k, v))
                part.write(at, mine, theirs, channel)
                done += part.count
        else:
            self.parts[0].write(at, k, v, channel)
        self.starts.append(starts)

    def positions(self) -> Tensor:
        """``[R, G or 1, K, stored per block]`` of the tokens in the order in which they lie, int64."""
        k, device = len(self.starts), self._any().device
        start = torch.tensor(self.starts, device=device).T[:, None, :, None]  # [R, 1, K, 1]
        if self.precise == self.width:
            return start + torch.arange(self.width, device=device)
        assert self.flags is not None
        held = sum(part.count for part in self.parts)
        return start + _parted(unpack_flags(self.flags[:, :, :k], self.width))[..., :held]

    def named(self) -> Iterator[tuple[Any, str, Tensor]]:
        """(owner, attribute, tensor) of everything held."""
        for owner, names in [(self, ("channel", "flags")), *((part, Part.NAMES) for part in self.parts)]:
            for name in names:
                if (x := getattr(owner, name)) is not None:
                    yield owner, name, x

    def _any(self) -> Tensor:
        keys = self.parts[0].keys
        assert keys is not None
        return keys


def _stacked(held: Tensor | None, at: int, piece: Tensor) -> Tensor:
    """Blocks ``[R, G, capacity, ...]`` with `piece` ``[R, G, 1, ...]`` at place `at`, grown by a small share where it must be."""
    if held is None:
        return piece.contiguous()
    if held.shape[2] <= at:
        held = resized(held, at + 1 + at // 32, at)
    held[:, :, at] = piece[:, :, 0]
    return held


def _parted(flags: Tensor) -> Tensor:
    """Places ``[..., W]`` of the tokens that are set, then of the others, each in order."""
    return (~flags).to(torch.uint8).argsort(dim=-1, stable=True)


# -- the memory -------------------------------------------------------------------------------------------------------


@final
class MixedCache(Recording):
    """See the module.

    bits: of a precise and of another token; 16: as it is, and 0 for the second: dropped. every: tokens that wait at most.
    sparse: None: a prompt's attention is exact. ``tokens``: in a call of several tokens that fills a block it goes on among the
    precise tokens alone (and what is stored), and the others get 0. ``keys``: all its queries read the precise ones.
    """

    def __init__(
        self,
        method: Splits,
        geometry: Geometry,
        *,
        bits: tuple[int, int],
        every: int,
        seed: int = 0,
        sparse: str | None = None,
    ) -> None:
        self.method, self.geometry, self.bits, self.every, self.seed = method, geometry, bits, every, seed
        self.sparse = sparse
        self.mixed = bits[0] != bits[1] or sparse is not None
        self.plan = probe_rows(0, every, *method.probes_of(every, True), seed) if self.mixed else []
        self.reset()

    def reset(self) -> None:
        """Forget everything (not the recording mode)."""
        self.stacks: list[Stack] = []
        self.keys: Tensor | None = None  # [B, G, capacity, D] waiting, a row's first in slot 0
        self.values: Tensor | None = None  # [B, G, capacity, E]
        self.probe_q: Tensor | None = None  # [B, H, capacity, D] queries among the waiting that the plan names
        self.probe_lse: Tensor | None = None  # [B, H, capacity]
        self.length: list[int] = []  # tokens of each row
        self.waiting: list[int] = []  # of these, not in a block yet
        self.stored: list[int] = []  # tokens that a row's blocks hold
        self.seen = 0
        self._forget_runs()

    # -- one call ---------------------------------------------------------------------------------------------------

    def attend(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """See `LayerCache.attend`. The first block attends to the live tensors, so gradients flow through it."""
        if step.mask is not None:
            raise Refused(
                f"{self.method.id}: a custom 4-D or packed-sequence mask names columns, and this cache keeps tokens in "
                "another order; pass a 2-D attention_mask"
            )
        if not step.causal:
            raise Refused(f"{self.method.id}: this cache serves causal attention only")
        if self.recording:
            return self._provisional(q, k, v, step)
        return self._absorb(q, k, v, step)

    def _absorb(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        b, n = q.shape[0], q.shape[2]
        if not self.length:
            self.length, self.waiting, self.stored = [0] * b, [0] * b, [0] * b
            self.keys, self.values = (
                k.new_zeros(b, k.shape[1], 0, k.shape[3]),
                v.new_zeros(b, v.shape[1], 0, v.shape[3]),
            )
        counts, order = [n] * b, None
        if step.padding is not None:
            real = step.position >= 0
            counts = real.sum(-1).tolist()
            order = (~real).to(torch.int8).argsort(dim=-1, stable=True)  # [B, N], real tokens first
        alike: dict[tuple[int, int, int], list[int]] = {}
        for row, (waiting, count, stored) in enumerate(zip(self.waiting, counts, self.stored, strict=True)):
            held = int(stored > 0) if step.compute is None else stored  # plain tensors need rows of one length
            alike.setdefault((waiting, count, held), []).append(row)
        self.seen += n
        if len(alike) == 1 and counts[0] == n:
            return self._group(list(range(b)), q, k, v, step.scale, step.compute)
        out = q.new_zeros(*q.shape[:3], v.shape[3])
        for (_, count, _), rows in alike.items():
            if not count:
                continue
            parts = [_rows(x, rows) for x in (q, k, v)]
            if order is not None:
                at = order[rows, :count]
                parts = [x.gather(2, at[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])) for x in parts]
            done = self._group(rows, *parts, step.scale, step.compute)
            if order is None:
                out[rows] = done
            else:
                index = order[rows, :count][:, None, :, None].expand_as(done)
                out[rows] = out[rows].scatter(2, index, done.to(out.dtype))
        return out

    def _group(self, rows: list[int], q: Tensor, k: Tensor, v: Tensor, scale: float, compute: Compute | None) -> Tensor:
        """A call of rows that hold the same number of tokens, without padding: ``[R, H, N, E]``."""
        m, n = self.waiting[rows[0]], q.shape[2]
        own_k, own_v = self._own(rows, m, k, v)
        full = m + n >= self.every
        new = self._probes(m, n, full)
        lse = self._lse(rows, q, own_k, new, scale) if new and n > 1 else None
        picked = None
        if full and n > 1 and self.sparse is not None:
            picked = self._split(rows, q, own_k, own_v, new, lse, scale)
            out = self._sparse(rows, q, own_k, own_v, picked[0], scale, compute)
        else:
            out, every = self._dense(rows, q, own_k, own_v, scale, compute)
            if new and n == 1:
                lse = every if every is not None else self._lse(rows, q, own_k, new, scale)
        if full:
            flags, counts = self._split(rows, q, own_k, own_v, new, lse, scale) if picked is None else picked
            self._shelve(rows, own_k.detach(), own_v.detach(), flags, counts)
        else:
            self._wait(rows, m, q, k, v, new, lse)
        for row in rows:
            self.length[row] += n
        return out

    def _own(self, rows: list[int], m: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """What waits and the new tokens ``[R, G, m + N, .]``."""
        if not m:
            return k, v
        assert self.keys is not None and self.values is not None
        return tuple(torch.cat((_rows(x, rows)[:, :, :m], y), 2) for x, y in ((self.keys, k), (self.values, v)))  # type: ignore[return-value]

    def _probes(self, m: int, n: int, full: bool) -> list[int]:
        """Places of the new probes among the waiting and the new tokens."""
        if not self.mixed:
            return []
        if full and n > 1:
            return probe_rows(m, m + n, *self.method.probes_of(m + n, False), self.seed)
        return self.plan[bisect_left(self.plan, m) : bisect_left(self.plan, m + n)]

    def _history(self, rows: list[int]) -> bool:
        return self.stored[rows[0]] > 0

    def _dense(
        self, rows: list[int], q: Tensor, own_k: Tensor, own_v: Tensor, scale: float, compute: Compute | None
    ) -> tuple[Tensor, Tensor | None]:
        """Exact attention to everything, and its lse where it is at hand."""
        if compute is not None or not self._history(rows):
            if self._history(rows):
                keys, values = self.read(rows)
                own_k, own_v = torch.cat((keys, own_k), 2), torch.cat((values, own_v), 2)
            return (compute or sdpa)(q, own_k, own_v, mask=None, causal=True, scale=scale), None
        if q.is_cuda and q.shape[2] == 1:
            out, lse = self._kernels(rows, q, own_k, own_v, scale)
            return out.to(own_v.dtype), lse
        wide = torch.promote_types(q.dtype, torch.float32)
        own = attend(q.to(wide), own_k.to(wide), own_v.to(wide), causal=True, scale=scale)
        out, lse = merge((own.out, own.lse), self._stored(rows, q, scale))
        return out.to(own_v.dtype), lse

    def _sparse(
        self,
        rows: list[int],
        q: Tensor,
        own_k: Tensor,
        own_v: Tensor,
        flags: Tensor,
        scale: float,
        compute: Compute | None,
    ) -> Tensor:
        """Attention among the tokens of the split (and to what is stored); the other queries get 0, or read the same keys."""
        n, total = q.shape[2], own_k.shape[2]
        out = q.new_zeros(*q.shape[:3], own_v.shape[3])
        for i, row in enumerate(rows):
            at = flags[i, 0].nonzero().squeeze(-1)  # places of the keys read
            ask = at[at >= total - n] if self.sparse == "tokens" else torch.arange(total - n, total, device=q.device)
            one = slice(i, i + 1)
            x, keys, values = q[one, :, ask - (total - n)], own_k[one][:, :, at], own_v[one][:, :, at]
            mask = None if len(at) == len(ask) else (at <= ask[:, None])[None, None]
            done = self._part([row], x, keys, values, mask, scale, compute)
            if self.sparse == "tokens":
                out[i, :, ask - (total - n)] = done[0].to(out.dtype)
            else:
                out[i] = done[0]
        return out

    def _part(
        self,
        rows: list[int],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float,
        compute: Compute | None,
    ) -> Tensor:
        """Attention to some of the new tokens and to what is stored; mask None: causal, as many queries as keys."""
        if not self._history(rows):
            return (compute or sdpa)(q, k, v, mask=mask, causal=mask is None, scale=scale)
        if compute is not None:
            keys, values = self.read(rows)
            if mask is not None:
                mask = torch.nn.functional.pad(mask, (keys.shape[2], 0), value=True)
            k, v = torch.cat((keys, k), 2), torch.cat((values, v), 2)
            return compute(q, k, v, mask=mask, causal=mask is None, scale=scale)
        wide = torch.promote_types(q.dtype, torch.float32)
        own = attend(q.to(wide), k.to(wide), v.to(wide), mask=mask, causal=mask is None, scale=scale)
        return merge((own.out, own.lse), self._stored(rows, q, scale))[0].to(v.dtype)

    # -- probes -----------------------------------------------------------------------------------------------------

    def _lse(self, rows: list[int], q: Tensor, own_k: Tensor, new: list[int], scale: float) -> Tensor | None:
        """The lse ``[R, H, P]`` of the new probes over everything they see; None: nothing is stored, so it need not be known."""
        if not self._history(rows):
            return None
        n, total = q.shape[2], own_k.shape[2]
        at = torch.tensor(new, device=q.device)
        x = q.detach()[:, :, at - (total - n)]
        wide = torch.promote_types(q.dtype, torch.float32)
        mask = (torch.arange(total, device=q.device) <= at[:, None])[None, None]
        keys = own_k.detach().to(wide)
        own = attend(x.to(wide), keys, keys[..., :1], mask=mask, scale=scale)
        return torch.logaddexp(own.lse, self._stored(rows, x, scale)[1])

    def _split(
        self,
        rows: list[int],
        q: Tensor,
        own_k: Tensor,
        own_v: Tensor,
        new: list[int],
        lse: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, list[int]]:
        """The method's split of the waiting and the new tokens, from the probes of both."""
        n, total = q.shape[2], own_k.shape[2]
        if not self.mixed:
            return torch.ones(len(rows), 1, total, dtype=torch.bool, device=q.device), [total] * len(rows)
        q, own_k, own_v = q.detach(), own_k.detach(), own_v.detach()
        old = self.plan[: bisect_left(self.plan, total - n)]
        at = torch.tensor(old + new, dtype=torch.int64, device=q.device)
        x = q[:, :, at[len(old) :] - (total - n)]
        if old:
            assert self.probe_q is not None and self.probe_lse is not None
            x = torch.cat((_rows(self.probe_q, rows)[:, :, : len(old)], x), 2)
            if lse is not None:
                lse = torch.cat((_rows(self.probe_lse, rows)[:, :, : len(old)], lse), 2)
        mass = probe_mass(x, own_k, at, scale=scale, lse=lse)
        starts = [self.length[row] - self.waiting[row] for row in rows]
        return self.method.split(Block(own_k, own_v, starts, q, mass, seen_by(at, total)))

    # -- reading ----------------------------------------------------------------------------------------------------

    def _stored(self, rows: list[int], q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Attention of q ``[R, H, N, D]`` to what the rows have in blocks, and its lse, in float32 or wider."""
        b, h, n, d = q.shape
        wide = torch.promote_types(q.dtype, torch.float32)
        assert self.values is not None
        g, e = self.values.shape[1], self.values.shape[3]
        x = (q.detach().to(wide) * scale).view(b, g, h // g, n, d)
        outs, lses = [], []
        size = max(1, CHUNK_ELEMENTS // max(1, h // g * BLOCK_ELEMENTS // max(d, e)))
        for part in x.split(size, 3):
            y = part.reshape(b, g, -1, d)
            running = (y.new_full(y.shape[:3], -torch.inf), y.new_zeros(y.shape[:3]), y.new_zeros(*y.shape[:3], e))
            for stack in self.stacks:
                if stack.rows == rows:
                    running = _fold(y, running, stack, None)
                    continue
                shared = [row for row in rows if row in stack.rows]
                if not shared:
                    continue
                mine, theirs = _span([rows.index(r) for r in shared]), _span([stack.rows.index(r) for r in shared])
                some = _fold(y[mine], tuple(z[mine] for z in running), stack, theirs)  # type: ignore[arg-type]
                for whole, piece in zip(running, some, strict=True):
                    whole[mine] = piece
            top, total, out = running
            safe = total.clamp(min=torch.finfo(wide).tiny)
            outs.append((out / safe.unsqueeze(-1)).view(b, h, -1, e))
            lses.append((top + safe.log()).view(b, h, -1))
        return (outs[0], lses[0]) if len(outs) == 1 else (torch.cat(outs, 2), torch.cat(lses, 2))

    def _kernels(self, rows: list[int], q: Tensor, own_k: Tensor, own_v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """One token over everything on CUDA: a kernel for each part of each stack, and one for the tokens that wait."""

        def count(n: int) -> Tensor:
            return torch.full((1,), n, dtype=torch.int32, device=q.device)

        q = q.detach()
        own, lse = kernel("decode:decode_attention")(q, own_k, own_v, length=count(own_k.shape[2]), scale=scale)
        found = [(own.to(torch.float32), lse)]
        for stack in self.stacks:
            shared = [row for row in rows if row in stack.rows]
            if not shared:
                continue
            mine, theirs = _span([rows.index(r) for r in shared]), _span([stack.rows.index(r) for r in shared])
            blocks = len(stack.starts)
            for part in stack.parts:
                assert part.keys is not None and part.values is not None
                keys, values = part.keys[theirs], part.values[theirs]
                if part.bits == 16:
                    keys, values = keys.flatten(2, 3), values.flatten(2, 3)
                    length = count(blocks * part.count)
                    out, lse = kernel("decode:decode_attention")(q[mine], keys, values, length=length, scale=scale)
                else:
                    ranges = (part.key_scale, part.key_zero, part.value_scale, part.value_zero, stack.channel)
                    s, z, step, low, c = (x[theirs] for x in ranges if x is not None)
                    what = {"blocks": blocks, "bits": part.bits, "scale": scale}
                    out, lse = kernel("mixed:mixed_decode")(q[mine], keys, s, z, values, step, low, c, **what)
                if len(shared) < len(rows):
                    whole = (torch.zeros_like(found[0][0]), torch.full_like(found[0][1], -torch.inf))
                    whole[0][mine], whole[1][mine] = out.to(torch.float32), lse
                    out, lse = whole
                found.append((out.to(torch.float32), lse))
        return merge(*found)

    def read(self, rows: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """What the rows (None: all) hold in blocks, dequantised, by position: keys ``[R, G, S, D]``, values ``[R, G, S, E]``.

        For attentions that want plain tensors, and for looking; decoding does not use it. Raises `StateError` on an empty
        cache and on rows that hold different numbers of tokens.
        """
        if self.keys is None or self.values is None:
            raise StateError("the cache is empty")
        rows = list(range(len(self.length))) if rows is None else rows
        if len({self.stored[row] for row in rows}) > 1:
            raise StateError("the rows hold different numbers of tokens; read them one by one")
        return torch.cat([self._row(r)[0] for r in rows]), torch.cat([self._row(r)[1] for r in rows])

    def _row(self, row: int) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        g, widths = self.keys.shape[1], (self.keys.shape[3], self.values.shape[3])
        places, keys, values = [], [self.keys[:1, :, :0]], [self.values[:1, :, :0]]
        for stack in self.stacks:
            if row not in stack.rows:
                continue
            i = stack.rows.index(row)
            one, k = slice(i, i + 1), len(stack.starts)
            places.append(stack.positions()[one].expand(-1, g, -1, -1).flatten(2))
            blocks = [_plain(part, one, k, widths, stack.channel) for part in stack.parts]
            keys.append(torch.cat([x[0] for x in blocks], 3).flatten(2, 3).to(self.keys.dtype))
            values.append(torch.cat([x[1] for x in blocks], 3).flatten(2, 3).to(self.values.dtype))
        all_keys, all_values = torch.cat(keys, 2), torch.cat(values, 2)
        if not places:
            return all_keys, all_values
        order = torch.cat(places, 2).argsort(-1).unsqueeze(-1)
        return tuple(x.gather(2, order.expand(-1, -1, -1, x.shape[3])) for x in (all_keys, all_values))  # type: ignore[return-value]

    # -- writing ----------------------------------------------------------------------------------------------------

    def _wait(
        self, rows: list[int], m: int, q: Tensor, k: Tensor, v: Tensor, new: list[int], lse: Tensor | None
    ) -> None:
        """Keep the new tokens as they are, and the probes among them."""
        assert self.keys is not None and self.values is not None
        need, b = m + k.shape[2], len(self.length)
        if self.keys.shape[2] < need:
            size = min(self.every - 1, grown(0, need))
            self.keys, self.values = (resized(x, size, x.shape[2]) for x in (self.keys, self.values))
        at = _span(rows)
        self.keys[at, :, m:need], self.values[at, :, m:need] = k.detach(), v.detach()
        for row in rows:
            self.waiting[row] = need
        if not new:
            return
        wide = torch.promote_types(q.dtype, torch.float32)
        first = bisect_left(self.plan, m)
        part = slice(first, first + len(new))
        if self.probe_q is None or self.probe_lse is None:
            self.probe_q = q.new_zeros((b, q.shape[1], 0, q.shape[3]), requires_grad=False)
            self.probe_lse = q.new_zeros((b, q.shape[1], 0), dtype=wide, requires_grad=False)
        if self.probe_q.shape[2] < part.stop:
            size = min(len(self.plan), grown(0, part.stop))
            self.probe_q, self.probe_lse = (resized(x, size, x.shape[2]) for x in (self.probe_q, self.probe_lse))
        self.probe_q[at, :, part] = q.detach()[:, :, torch.tensor(new, device=q.device) - m]
        if lse is not None:
            self.probe_lse[at, :, part] = lse.detach()

    def _shelve(self, rows: list[int], k: Tensor, v: Tensor, flags: Tensor, counts: list[int]) -> None:
        """Everything that waits, k, v ``[R, G, W, .]``, becomes a block of each row."""
        width = k.shape[2]
        alike: dict[int, list[int]] = {}
        for i, count in enumerate(counts):
            alike.setdefault(count, []).append(i)
        for count, members in alike.items():
            mine = [rows[i] for i in members]
            part = slice(None) if len(alike) == 1 else torch.tensor(members, device=k.device)
            stack = self._stack(mine, width, count)
            stack.add([self.length[row] - self.waiting[row] for row in mine], k[part], v[part], flags[part])
            held = count + (width - count if self.bits[1] else 0)
            for row in mine:
                self.stored[row] += held
        for row in rows:
            self.waiting[row] = 0

    def _stack(self, rows: list[int], width: int, count: int) -> Stack:
        for stack in self.stacks:
            if (stack.rows, stack.width, stack.precise) == (rows, width, count):
                return stack
        self.stacks.append(Stack(rows, width, self.bits, count))
        return self.stacks[-1]

    # -- speculation ------------------------------------------------------------------------------------------------

    def _snapshot(self) -> dict[str, Any]:
        """Blocks only ever follow blocks: what waits and the counts are all that a call overwrites."""
        names = ("keys", "values", "probe_q", "probe_lse")
        held = {name: x.clone() for name in names if (x := getattr(self, name)) is not None}
        return held | self.counters()

    def _go_back(self, snapshot: dict[str, Any]) -> None:
        """What waits keeps its room."""
        for name, x in snapshot.items():
            if isinstance(x, Tensor):
                getattr(self, name)[:, :, : x.shape[2]] = x
            elif name != "blocks":
                setattr(self, name, list(x) if isinstance(x, list) else x)
        del self.stacks[len(snapshot["blocks"]) :]
        for stack, count in zip(self.stacks, snapshot["blocks"], strict=True):
            del stack.starts[count:]

    def crop(self, tokens: int) -> None:
        """Take back the newest `tokens` of what is not settled yet and settle the rest, or raise `StateError`."""
        if tokens < 0 or tokens > self.unsettled:
            raise StateError(
                f"{self.method.id}: {tokens} tokens cannot be taken back, only the {self.unsettled} recorded since the last "
                "`crop`: others may be in a block. Start speculative decoding through `generate` (it records), or keep a "
                "copy of the cache"
            )
        self._take_back(tokens)

    # -- the rest of the contract -----------------------------------------------------------------------------------

    def _held(self) -> Iterator[tuple[str, Tensor]]:
        for name in ("keys", "values", "probe_q", "probe_lse"):
            if (x := getattr(self, name)) is not None:
                yield name, x
        for i, stack in enumerate(self.stacks):
            for owner, name, x in stack.named():
                part = "" if owner is stack else f"{stack.parts.index(owner)}."
                yield f"stack.{i}.{part}{name}", x

    def bytes(self) -> int:
        """Bytes of blocks, waiting tokens and probes, unused capacity and what recording holds included."""
        return sum(x.numel() * x.element_size() for x in (*(x for _, x in self._held()), *self._recorded()))

    def kept(self) -> int:
        """See `LayerCache.kept`."""
        return max((s + w for s, w in zip(self.stored, self.waiting, strict=True)), default=0)

    def precise(self) -> list[int]:
        """Tokens of each row that are stored with the first number of bits, those that wait not counted."""
        out = [0] * len(self.length)
        for stack in self.stacks:
            for row in stack.rows:
                out[row] += stack.precise * len(stack.starts)
        return out

    def positions(self) -> Tensor:
        """``[B, G, S]`` in order; -1 behind the end of a row that holds fewer."""
        if self.keys is None:
            raise StateError("the cache is empty")
        (b, g), device = self.keys.shape[:2], self.keys.device
        out = torch.full((b, g, self.kept()), -1, dtype=torch.int64, device=device)
        for row in range(b):
            done, held = self.length[row] - self.waiting[row], self.stored[row]
            places = [
                stack.positions()[stack.rows.index(row)].expand(g, -1, -1).flatten(1)
                for stack in self.stacks
                if row in stack.rows
            ]
            if places:
                out[row, :, :held] = torch.cat(places, 1).sort(-1).values
            out[row, :, held : held + self.waiting[row]] = torch.arange(done, self.length[row], device=device)
        return out

    def counters(self) -> dict[str, Any]:
        """See `LayerCache.counters`."""
        rows = {name: list(getattr(self, name)) for name in ("length", "waiting", "stored")}
        return {"seen": self.seen, **rows, "blocks": [len(stack.starts) for stack in self.stacks]}

    def select(self, rows: Tensor) -> None:
        """See `LayerCache.select`."""
        self._refuse_beams()
        for name in ("keys", "values", "probe_q", "probe_lse"):
            if (x := getattr(self, name)) is not None:
                setattr(self, name, rearranged(x, rows))
        if not self.length:
            return
        picked = rows.tolist()
        for name in ("length", "waiting", "stored"):
            counts = getattr(self, name)
            setattr(self, name, [counts[i] for i in picked])
        stacks = []
        for stack in self.stacks:
            places = [stack.rows.index(row) for row in picked if row in stack.rows]
            if not places:
                continue
            stack.starts = [[block[i] for i in places] for block in stack.starts]
            stack.rows = [new for new, row in enumerate(picked) if row in stack.rows]
            for owner, name, x in list(stack.named()):
                setattr(owner, name, rearranged(x, torch.tensor(places, device=x.device)))
            stacks.append(stack)
        self.stacks = stacks

    def tensors(self) -> dict[str, Tensor]:
        """Copies of the used part of every buffer, of the counts, and of which rows and positions each stack holds."""
        if not self.length:
            return {}
        out = {}
        for name, x in self._held():
            end = len(self.stacks[int(name.split(".")[1])].starts) if name.startswith("stack") else x.shape[2]
            out[name] = x[:, :, :end].clone()
        for i, stack in enumerate(self.stacks):
            out[f"stack.{i}.rows"] = torch.tensor(stack.rows)
            out[f"stack.{i}.starts"] = torch.tensor(stack.starts)
            out[f"stack.{i}.shape"] = torch.tensor([stack.width, stack.precise])
        counts = torch.tensor([self.length, self.waiting, self.stored])
        return out | {"counts": counts, "seen": torch.tensor(self.seen)}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """See `LayerCache.restore`."""
        self.reset()
        for i in range(sum(name.endswith(".shape") for name in tensors)):
            width, precise = tensors[f"stack.{i}.shape"].tolist()
            stack = Stack(tensors[f"stack.{i}.rows"].tolist(), width, self.bits, precise)
            stack.starts = tensors[f"stack.{i}.starts"].tolist()
            self.stacks.append(stack)
        for name, x in tensors.items():
            place = name.split(".")
            if name == "counts":
                self.length, self.waiting, self.stored = x.tolist()
            elif name == "seen":
                self.seen = int(x)
            elif place[0] != "stack":
                setattr(self, name, x.clone())
            elif place[-1] not in ("rows", "starts", "shape"):
                stack = self.stacks[int(place[1])]
                setattr(stack if len(place) == 3 else stack.parts[int(place[2])], place[-1], x.clone())


# -- packed attention -------------------------------------------------------------------------------------------------

Running = tuple[Tensor, Tensor, Tensor]
"""Largest logit ``[R, G, Q]``, sum of exp ``[R, G, Q]`` and weighted values ``[R, G, Q, E]`` so far."""


def _fold(x: Tensor, running: Running, stack: Stack, rows: slice | Tensor | None) -> Running:
    """One more stack into the running softmax of scaled queries x ``[R, G, Q, D]``; rows: those of the stack that x asks for."""
    every, blocks = slice(None) if rows is None else rows, len(stack.starts)
    channel = None if stack.channel is None else stack.channel[every, :, :blocks]
    for part in stack.parts:
        assert part.keys is not None and part.values is not None
        keys, values = part.keys[every, :, :blocks], part.values[every, :, :blocks]
        ranges = (part.key_scale, part.key_zero, part.value_scale, part.value_zero)
        cut = [None if y is None else y[every, :, :blocks] for y in ranges]
        width = max(x.shape[3], running[2].shape[3])
        most = max(1, BLOCK_ELEMENTS // (x.shape[0] * x.shape[1] * width))  # tokens at once
        per = min(part.count, most)
        many = max(1, most // part.count)
        for a in range(0, blocks, many):
            at = slice(a, min(blocks, a + many))
            few = [None if y is None else y[:, :, at] for y in (*cut, channel)]
            for t in range(0, part.count, per):
                token = slice(t, min(part.count, t + per))
                running = _fold_few(x, running, part.bits, keys[:, :, at, token], values[:, :, at, token], few, token)
    return running


def _fold_few(
    x: Tensor, running: Running, bits: int, keys: Tensor, values: Tensor, ranges: list[Tensor | None], token: slice
) -> Running:
    """The packed tokens keys, values ``[R, G, K, T, words]`` into the running softmax; ranges of the whole blocks."""
    wide, (top, total, out) = x.dtype, running
    y = x.unsqueeze(2)  # [R, G, 1, Q, D]
    key_scale, key_zero, value_scale, value_zero, channel = (None if r is None else r.to(wide) for r in ranges)
    if key_scale is None or key_zero is None:
        logits = y @ keys.to(wide).mT  # [R, G, K, Q, T]
    else:
        codes = unpack_bits(keys, bits, x.shape[3]).to(wide)
        logits = (y * key_scale.unsqueeze(3)) @ codes.mT + y @ key_zero.unsqueeze(-1)
    new = torch.maximum(top, logits.amax((2, 4)))
    weights = (logits - new[:, :, None, :, None]).exp_()
    fade = (top - new).exp()
    total = total * fade + weights.sum((2, 4))
    if value_scale is None or value_zero is None:
        mixed = weights @ values.to(wide)  # [R, G, K, Q, E]
    else:
        assert channel is not None
        codes = unpack_bits(values, bits, out.shape[3]).to(wide)
        low = (weights * value_zero[..., token].unsqueeze(3)).sum(-1, keepdim=True)
        mixed = ((weights * value_scale[..., token].unsqueeze(3)) @ codes + low) * channel.unsqueeze(3)
    return new, total, out * fade.unsqueeze(-1) + mixed.sum(2)


def _plain(
    part: Part, rows: slice, blocks: int, widths: tuple[int, int], channel: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Keys ``[R, G, K, count, D]`` and values ``[R, G, K, count, E]`` of a part, dequantised in float32 or wider."""
    assert part.keys is not None and part.values is not None
    keys, values = part.keys[rows, :, :blocks], part.values[rows, :, :blocks]
    if part.bits == 16:
        return keys, values
    ranges = (part.key_scale, part.key_zero, part.value_scale, part.value_zero, channel)
    s, z, step, low, c = (y[rows, :, :blocks].double() for y in ranges if y is not None)
    k = unpack_bits(keys, part.bits, widths[0]) * s.unsqueeze(3) + z.unsqueeze(3)
    v = unpack_bits(values, part.bits, widths[1]) * step.unsqueeze(-1) + low.unsqueeze(-1)
    return k, v * c.unsqueeze(3)


def _span(places: list[int]) -> slice | list[int]:
    """Consecutive places as a slice, so that taking them copies nothing."""
    first = places[0]
    return slice(first, first + len(places)) if places == list(range(first, first + len(places))) else places


def _rows(x: Tensor, rows: list[int]) -> Tensor:
    return x[_span(rows)]
