r"""Blocks of mixed precision: some tokens in more bits than the others, or instead of the others; each is quantised once.

New tokens wait in full precision. After a call in which a row has `every` or more of them waiting, all of them become a block
(`parts`, `blocks`): a rule (`Splits`) says from the attention that a few probe queries (`probes`) paid them which are precise;
these are packed with `bits[0]` bits, the others with `bits[1]`, or dropped where that is 0. Blocks are never opened again. Each
head has a split of its own or all share one; the number of precise tokens is the same for all heads of a row. A call attends to
what was stored before it and to its own tokens as they are.

Padding is never stored, and rows are served in groups that hold the same number of waiting tokens, so nothing depends on what
else is in the batch; attention to stored tokens does not ask for their order. Plain tensors, by position, exist only for another
`Step.compute`.

On CUDA a single token reads the packed words by the kernel of `qkv.kernels.mixed`; several in half precision, and the probes
among them, attend to what is stored as plain tensors, made once a call. Between two blocks nothing changes shape or place: those
steps can be captured, and the one that makes a block runs as it is.

Axes: B batch, R rows of a group, H query heads, G key/value heads, W waiting and new tokens, N new tokens, P probes, D head
width, E value width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, final

import torch
from torch import Tensor

from qkv.caches._saliency import in_kernels, probe_lse, seen_by
from qkv.caches._stores.blocks import Blocks, span
from qkv.caches._stores.dense import grown, rearranged, resized
from qkv.caches._stores.parts import Stack
from qkv.caches._stores.probes import Probes, on_device
from qkv.caches._stores.recording import Recording
from qkv.caches._stores.splits import Block, Splits
from qkv.core.attend import attend, on_kernels, sdpa
from qkv.core.cache import Compute, Geometry, Now, Step
from qkv.core.errors import Refused, StateError
from qkv.core.kernel import kernel, served
from qkv.core.merge import merge

__all__ = ["Block", "MixedCache", "Splits"]

Past = tuple[Tensor, Tensor]
"""What rows hold in blocks as plain keys ``[R, G, S, D]`` and values ``[R, G, S, E]``."""


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
        self.method, self.geometry, self.bits, self.every, self.sparse = method, geometry, bits, every, sparse
        self.mixed = bits[0] != bits[1] or sparse is not None
        self.probes = Probes(method.probes_of, every, seed, self.mixed)
        self.room = 0  # tokens that the host expects in all
        self.reset()

    def reset(self) -> None:
        """Forget everything (not the recording mode)."""
        self.blocks = Blocks(self.bits)
        self.probes.reset()
        self.keys: Tensor | None = None  # [B, G, capacity, D] waiting, a row's first in slot 0
        self.values: Tensor | None = None  # [B, G, capacity, E]
        self.settled: Tensor | None = None  # int32 [B, 1] tokens of each row that are in blocks, for captured steps
        self._settled_of: list[int] = []
        self.length: list[int] = []  # tokens of each row
        self.waiting: list[int] = []  # of these, not in a block yet
        self.stored: list[int] = []  # tokens that a row's blocks hold
        self.seen = 0
        self._forget_runs()

    @property
    def stacks(self) -> list[Stack]:
        """The blocks."""
        return self.blocks.stacks

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
            self.keys, self.values = (x.new_zeros((b, x.shape[1], 0, x.shape[3]), requires_grad=False) for x in (k, v))
        counts, order = [n] * b, None
        if step.padding is not None:
            real = step.position >= 0
            counts = real.sum(-1).tolist()
            order = (~real).to(torch.int8).argsort(dim=-1, stable=True)  # [B, N], real tokens first
        plainly = step.compute is not None or on_kernels(q, k, v)  # plain tensors need rows of one length
        alike: dict[tuple[int, int, int], list[int]] = {}
        for row, (waiting, count, stored) in enumerate(zip(self.waiting, counts, self.stored, strict=True)):
            held = stored if plainly else int(stored > 0)
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
        new = self.probes.new(m, n, full)
        past = self._past(rows, q, own_k, own_v, compute)
        lse = self._lse(rows, q, own_k, new, scale, past) if new and n > 1 else None
        picked = None
        if full and n > 1 and self.sparse is not None:
            picked = self._split(rows, q, own_k, own_v, new, lse, scale)
            out = self._sparse(rows, q, own_k, own_v, picked[0], scale, compute, past)
        else:
            out, every = self._attention(rows, q, own_k, own_v, None, scale, compute, past)
            if new and n == 1:
                lse = every if every is not None else self._lse(rows, q, own_k, new, scale, past)
        if full:
            flags, counts = self._split(rows, q, own_k, own_v, new, lse, scale) if picked is None else picked
            self._shelve(rows, own_k.detach(), own_v.detach(), flags, counts)
        else:
            self._wait(rows, m, k, v)
            if new:
                self.probes.keep(rows, len(self.length), m, q, new, lse)
        for row in rows:
            self.length[row] += n
        return out

    def _own(self, rows: list[int], m: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """What waits and the new tokens ``[R, G, m + N, .]``."""
        if not m:
            return k, v
        assert self.keys is not None and self.values is not None
        return tuple(torch.cat((_rows(x, rows)[:, :, :m], y), 2) for x, y in ((self.keys, k), (self.values, v)))  # type: ignore[return-value]

    def _history(self, rows: list[int]) -> bool:
        return self.stored[rows[0]] > 0

    def _past(self, rows: list[int], q: Tensor, k: Tensor, v: Tensor, compute: Compute | None) -> Past | None:
        """What is stored as plain tensors where attention reads it so: by position for `compute`, in any order for kernels."""
        if not self._history(rows) or not (compute is not None or on_kernels(q, k, v)):
            return None
        if compute is not None:
            return self.read(rows)
        assert self.keys is not None and self.values is not None
        return self.blocks.unordered(rows, (self.keys, self.values))

    def _attention(
        self,
        rows: list[int],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float,
        compute: Compute | None,
        past: Past | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention to plain tokens and to what is stored, and its lse where it is at hand.

        mask None: causal; a mask of keys ``[R, 1, 1, W]``: causal as well. past: what is stored, where that was read.
        """
        causal = mask is None or (mask.shape[2] == 1 < q.shape[2])
        if past is not None or not self._history(rows):
            if past is not None:
                keys, values = past
                if mask is not None:
                    mask = torch.nn.functional.pad(mask, (keys.shape[2], 0), value=True)
                k, v = torch.cat((keys, k), 2), torch.cat((values, v), 2)
            return (compute or sdpa)(q, k, v, mask=mask, causal=causal, scale=scale), None
        single = q.shape[2] == 1 and mask is None
        if single and served(q):
            length = torch.full((1,), k.shape[2], dtype=torch.int32, device=q.device)
            out, lse = self._launch(rows, q, k, v, scale, length=length)
        elif single and not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)):
            out, lse = self.blocks.attend_one(rows, q, k, v, scale)
        else:
            wide = torch.promote_types(q.dtype, torch.float32)
            own = attend(q.to(wide), k.to(wide), v.to(wide), mask=mask, causal=causal, scale=scale)
            out, lse = merge((own.out, own.lse), self.blocks.attend(rows, q, v.shape[3], scale))
        return out.to(v.dtype), lse

    def _sparse(
        self,
        rows: list[int],
        q: Tensor,
        own_k: Tensor,
        own_v: Tensor,
        flags: Tensor,
        scale: float,
        compute: Compute | None,
        past: Past | None,
    ) -> Tensor:
        """Attention among the tokens of the split (and to what is stored); the other queries get 0, or read the same keys."""
        n, total = q.shape[2], own_k.shape[2]
        if self.sparse == "keys" and compute is None and on_kernels(q, own_k, own_v):
            return self._attention(rows, q, own_k, own_v, flags[:, :, None], scale, compute, past)[0]
        out = q.new_zeros(*q.shape[:3], own_v.shape[3])
        for i, row in enumerate(rows):
            at = flags[i, 0].nonzero().squeeze(-1)  # places of the keys read
            ask = at[at >= total - n] if self.sparse == "tokens" else torch.arange(total - n, total, device=q.device)
            one = slice(i, i + 1)
            x, keys, values = q[one, :, ask - (total - n)], own_k[one][:, :, at], own_v[one][:, :, at]
            mask = (
                None if self.sparse == "tokens" else (at <= ask[:, None])[None, None]
            )  # the tokens asked are the last ones
            held = None if past is None else (past[0][one], past[1][one])
            done, _ = self._attention([row], x, keys, values, mask, scale, compute, held)
            if self.sparse == "tokens":
                out[i, :, ask - (total - n)] = done[0].to(out.dtype)
            else:
                out[i] = done[0]
        return out

    # -- splitting and storing --------------------------------------------------------------------------------------

    def _lse(
        self, rows: list[int], q: Tensor, own_k: Tensor, new: list[int], scale: float, past: Past | None
    ) -> Tensor | None:
        """The lse ``[R, H, P]`` of the new probes over everything they see; None: nothing is stored, so it need not be known."""
        if not self._history(rows):
            return None
        assert self.values is not None
        n, total = q.shape[2], own_k.shape[2]
        at = on_device(new, q.device)
        x = q.detach()[:, :, at - (total - n)]
        own = probe_lse(x, own_k.detach(), at, scale=scale)
        if past is not None and in_kernels(x, past[0].detach()):
            held = kernel("flash:probe_lse")(x, past[0].detach(), None, scale=scale)
        else:
            held = self.blocks.attend(rows, x, self.values.shape[3], scale)[1]
        return torch.logaddexp(own, held)

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
        total = own_k.shape[2]
        if not self.mixed:
            return torch.ones(len(rows), 1, total, dtype=torch.bool, device=q.device), [total] * len(rows)
        q, own_k, own_v = q.detach(), own_k.detach(), own_v.detach()
        mass, at = self.probes.mass(rows, total - q.shape[2], q, own_k, new, lse, scale)
        starts = [self.length[row] - self.waiting[row] for row in rows]
        return self.method.split(Block(own_k, own_v, starts, q, mass, seen_by(at, total)))

    def _wait(self, rows: list[int], m: int, k: Tensor, v: Tensor) -> None:
        """Keep the new tokens as they are, behind m that wait."""
        assert self.keys is not None and self.values is not None
        need = m + k.shape[2]
        if self.keys.shape[2] < need:
            size = min(self.every - 1, max(grown(0, need), self.room))
            self.keys, self.values = (resized(x, size, x.shape[2]) for x in (self.keys, self.values))
        at = span(rows)
        self.keys[at, :, m:need], self.values[at, :, m:need] = k.detach(), v.detach()
        for row in rows:
            self.waiting[row] = need

    def _shelve(self, rows: list[int], k: Tensor, v: Tensor, flags: Tensor, counts: list[int]) -> None:
        """Everything that waits, k, v ``[R, G, W, .]``, becomes a block of each row."""
        starts = [self.length[row] - self.waiting[row] for row in rows]
        self.blocks.add(rows, starts, k, v, flags, counts, ample=self.room > 0)
        for row, count in zip(rows, counts, strict=True):
            self.stored[row] += k.shape[2] if self.bits[1] else count
            self.waiting[row] = 0

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
        held = [self.blocks.read(row, (self.keys, self.values)) for row in rows]
        return torch.cat([x[0] for x in held]), torch.cat([x[1] for x in held])

    # -- one token, by kernels ----------------------------------------------------------------------------------------

    def _launch(
        self, rows: list[int], q: Tensor, k: Tensor, v: Tensor, scale: float, **own: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """A kernel for what waits, k and v (own: which of it is read), and one for each part of each stack."""
        q = q.detach()
        out, lse = kernel("decode:decode_attention")(q, k, v, scale=scale, **own)
        return merge((out.to(torch.float32), lse), *self.blocks.launch(rows, q, scale))

    def reserve(self, tokens: int) -> None:
        """All tokens that may wait get their room at once, and buffers of blocks double: they seldom move then."""
        self.room = tokens

    def static(self) -> bool:
        """On CUDA, until a row's waiting tokens become a block; then a step runs as it is, and static ones follow."""
        if not self.length or self.keys is None or not served(self.keys) or self.recording:
            return False
        return max(self.waiting) + 1 < self.every and self._fixed()

    def _fixed(self) -> bool:
        """Whether there is room for one more waiting token; tells the device where rows and blocks stand."""
        assert self.keys is not None
        if max(self.waiting) >= self.keys.shape[2]:
            return False
        settled = [n - w for n, w in zip(self.length, self.waiting, strict=True)]
        if self.settled is None or self.settled.shape[0] != len(settled):
            self.settled = torch.tensor(settled, dtype=torch.int32, device=self.keys.device)[:, None]
        elif settled != self._settled_of:
            self.settled.copy_(torch.tensor(settled, dtype=torch.int32)[:, None])
        self._settled_of = settled
        self.probes.ready(self.keys, self.geometry.heads, self.every)
        self.blocks.told()
        return True

    def step(self, q: Tensor, k: Tensor, v: Tensor, scale: float, now: Now) -> Tensor:
        """See `LayerCache.step`."""
        assert self.keys is not None and self.values is not None and self.settled is not None
        waiting = now.position - self.settled  # [B, 1], before this token
        at = waiting.long().view(-1, 1, 1, 1)
        self.keys.scatter_(2, at.expand(-1, k.shape[1], 1, k.shape[3]), k)
        self.values.scatter_(2, at.expand(-1, v.shape[1], 1, v.shape[3]), v)
        size = self.keys.shape[2]
        read = waiting - torch.arange(size, dtype=torch.int32, device=q.device)  # [B, size], below 0: not written yet
        position = read[:, None].expand(-1, k.shape[1], -1)
        length = torch.full((1,), size, dtype=torch.int32, device=q.device)
        rows = list(range(len(self.length)))
        out, lse = self._launch(rows, q, self.keys, self.values, scale, length=length, position=position)
        self.probes.note(at.flatten(), q, lse)
        self.advance()
        return out.to(v.dtype)

    def advance(self) -> None:
        """See `LayerCache.advance`."""
        self.seen += 1
        self.length = [n + 1 for n in self.length]
        self.waiting = [n + 1 for n in self.waiting]

    def buffers(self) -> tuple[Tensor, ...]:
        """Everything that a captured step reads or overwrites."""
        return tuple(x for _, x in self._held()) + tuple(self._told())

    def _told(self) -> Iterator[Tensor]:
        """What the device was told for captured steps."""
        yield from (x for x in (self.settled, self.probes.places) if x is not None)
        for stack in self.stacks:
            yield from stack.told()

    # -- speculation ------------------------------------------------------------------------------------------------

    def _snapshot(self) -> dict[str, Any]:
        """Blocks only ever follow blocks: what waits and the counts are all that a call overwrites."""
        return {name: x.clone() for name, x in self._waits()} | self.counters() | {"blocks": self.blocks.counts()}

    def _go_back(self, snapshot: dict[str, Any]) -> None:
        """What waits keeps its room."""
        for name, x in self._waits():
            if name in snapshot:
                x[:, :, : snapshot[name].shape[2]] = snapshot[name]
        self.recount(
            {name: list(x) if isinstance(x, list) else x for name, x in snapshot.items() if name in self.counters()}
        )
        self.blocks.cut(snapshot["blocks"])

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

    def _waits(self) -> Iterator[tuple[str, Tensor]]:
        held = {"keys": self.keys, "values": self.values, "probe_q": self.probes.query, "probe_lse": self.probes.lse}
        yield from ((name, x) for name, x in held.items() if x is not None)

    def _held(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._waits()
        yield from self.blocks.named()

    def bytes(self) -> int:
        """Bytes of blocks, waiting tokens and probes, unused capacity and what recording holds included."""
        return sum(x.numel() * x.element_size() for x in (*self.buffers(), *self._recorded()))

    def kept(self) -> int:
        """See `LayerCache.kept`."""
        return max((s + w for s, w in zip(self.stored, self.waiting, strict=True)), default=0)

    def precise(self) -> list[int]:
        """Tokens of each row that are stored with the first number of bits, those that wait not counted."""
        return self.blocks.precise(len(self.length))

    def positions(self) -> Tensor:
        """``[B, G, S]`` in order; -1 behind the end of a row that holds fewer."""
        if self.keys is None:
            raise StateError("the cache is empty")
        (b, g), device = self.keys.shape[:2], self.keys.device
        out = torch.full((b, g, self.kept()), -1, dtype=torch.int64, device=device)
        for row in range(b):
            done, held = self.length[row] - self.waiting[row], self.stored[row]
            places = self.blocks.positions(row, g)
            if places is not None:
                out[row, :, :held] = places
            out[row, :, held : held + self.waiting[row]] = torch.arange(done, self.length[row], device=device)
        return out

    def counters(self) -> dict[str, Any]:
        """See `LayerCache.counters`."""
        return {"seen": self.seen} | {name: list(getattr(self, name)) for name in ("length", "waiting", "stored")}

    def select(self, rows: Tensor) -> None:
        """See `LayerCache.select`."""
        self._refuse_beams()
        for name, x in list(self._waits()):
            self._put(name, rearranged(x, rows))
        if not self.length:
            return
        picked = rows.tolist()
        for name in ("length", "waiting", "stored"):
            counts = getattr(self, name)
            setattr(self, name, [counts[i] for i in picked])
        self.blocks.select(picked)

    def _put(self, name: str, x: Tensor) -> None:
        owner, field = (
            (self.probes, {"q": "query", "lse": "lse"}[name[6:]]) if name.startswith("probe_") else (self, name)
        )
        setattr(owner, field, x)

    def tensors(self) -> dict[str, Tensor]:
        """Copies of the used part of every buffer, of the counts, and of which rows and positions each stack holds."""
        if not self.length:
            return {}
        out = {name: x.clone() for name, x in self._waits()} | self.blocks.tensors()
        counts = torch.tensor([self.length, self.waiting, self.stored])
        return out | {"counts": counts, "seen": torch.tensor(self.seen)}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """See `LayerCache.restore`."""
        self.reset()
        self.blocks.restore(tensors)
        for name, x in tensors.items():
            if name == "counts":
                self.length, self.waiting, self.stored = x.tolist()
            elif name == "seen":
                self.seen = int(x)
            elif not name.startswith("stack."):
                self._put(name, x.clone())


def _rows(x: Tensor, rows: list[int]) -> Tensor:
    return x[span(rows)]
