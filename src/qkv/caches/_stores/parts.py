r"""Blocks of tokens whose precision differs, packed side by side, and attention that reads them packed.

    k^_md = code_md s_d + z_d           one s, z per channel of a block's part
    v^_me = (code_me s_m + z_m) c_e     one s, z per token over all heads, one c = sqrt(max |v|) per channel of the block

Within a block the parts lie one behind the other, in order; one bit per token remembers which part it is in. Equal blocks of
the same rows are stacked, so that a step takes a handful of operations for all of them: a bounded number of codes is held in
floating point at once, the keys' scales are folded into the queries and the values' into the weights. s, z and c are float16;
codes are taken against the rounded ones.

Axes: B batch, R rows of a stack, H query heads, G key/value heads, K blocks of a stack, W tokens of a block, Q queries times
heads of a group, D head width, E value width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

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
from qkv.caches._stores.dense import resized
from qkv.core.kernel import kernel, served

BLOCK_ELEMENTS = 1 << 20  # codes held in floating point at once


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

    def write(self, at: int, room: int, k: Tensor, v: Tensor, channel: Tensor) -> None:
        """Quantise k, v ``[R, G, count, .]`` into block `at` of `room`; channel ``[R, G, E]``."""
        if self.bits == 16:
            self._put(at, room, keys=k.unsqueeze(2), values=v.unsqueeze(2))
            return
        if served(k) and served(v):
            keys, scale, zero = kernel("pack:pack_channels")(k, k.amin(2), k.amax(2), self.bits)
            values, step, low = kernel("pack:pack_tokens")(v, channel, self.bits)
            self._put(at, room, keys=keys.unsqueeze(2), key_scale=scale.unsqueeze(2), key_zero=zero.unsqueeze(2))
            self._put(at, room, values=values.unsqueeze(2))
            self._put(at, room, value_scale=step[:, None, None], value_zero=low[:, None, None])
            return
        span, half = (k.amin(2), k.amax(2)), torch.float16
        words, scale, zero = [], None, None
        for piece in k.split(PIECE, 2):
            codes, scale, zero = channel_quantize(piece, self.bits, half, span)
            words.append(pack_bits(codes, self.bits))
        assert scale is not None and zero is not None
        ranges = {"key_scale": scale.unsqueeze(2), "key_zero": zero.unsqueeze(2)}
        self._put(at, room, keys=torch.cat(words, 2).unsqueeze(2), **ranges)
        words, low, step = [], [], []
        for piece in v.split(PIECE, 2):
            codes, scale, zero, _ = cst_quantize(piece, self.bits, half, channel)
            words.append(pack_bits(codes, self.bits))
            step.append(scale)
            low.append(zero)
        self._put(at, room, values=torch.cat(words, 2).unsqueeze(2))
        self._put(at, room, value_scale=torch.cat(step, 1)[:, None, None], value_zero=torch.cat(low, 1)[:, None, None])

    def _put(self, at: int, room: int, **pieces: Tensor) -> None:
        for name, piece in pieces.items():
            setattr(self, name, _stacked(getattr(self, name), at, room, piece))

    def ranges(self, rows: slice | list[int], blocks: int) -> list[Tensor | None]:
        """Scale and zero of keys, scale and zero of values, of the first `blocks` blocks."""
        held = (self.key_scale, self.key_zero, self.value_scale, self.value_zero)
        return [None if x is None else x[rows, :, :blocks] for x in held]

    def plain(
        self,
        rows: slice | list[int],
        blocks: int,
        widths: tuple[int, int],
        channel: Tensor | None,
        dtype: torch.dtype = torch.float64,
    ) -> tuple[Tensor, Tensor]:
        """Keys ``[R, G, K, count, D]`` and values ``[R, G, K, count, E]``; channel of the stack.

        dtype: what they are wanted in; they are dequantised in float32 where that is half of it, else in float64.
        """
        assert self.keys is not None and self.values is not None
        keys, values = self.keys[rows, :, :blocks], self.values[rows, :, :blocks]
        if self.bits == 16:
            return keys, values
        assert channel is not None
        ranges = (*self.ranges(rows, blocks), channel[rows, :, :blocks])
        wide = torch.float32 if dtype.itemsize == 2 else torch.float64
        s, z, step, low, c = (y.to(wide) for y in ranges if y is not None)
        k = unpack_bits(keys, self.bits, widths[0]) * s.unsqueeze(3) + z.unsqueeze(3)
        v = unpack_bits(values, self.bits, widths[1]) * step.unsqueeze(-1) + low.unsqueeze(-1)
        return k, v * c.unsqueeze(3)


class Stack:
    """Blocks of one shape of the same rows.

    rows: batch rows; width: tokens that a block stands for; starts: for each block the position of its first token in every
    row. channel ``[R, G, K, E]``, flags ``[R, G or 1, K, ceil(W / 8)]``: which tokens are in the first part. The device may be
    told how many blocks there are (`count`) and which rows (`index`), for steps that are captured.
    """

    def __init__(self, rows: list[int], width: int, bits: tuple[int, int], precise: int) -> None:
        self.rows, self.width, self.precise = rows, width, precise
        counts = (precise, width - precise if bits[1] else 0)
        self.parts = [Part(b, n) for b, n in zip(bits, counts, strict=True) if n]
        self.starts: list[list[int]] = []
        self.channel: Tensor | None = None
        self.flags: Tensor | None = None
        self._count: tuple[int, Tensor] | None = None
        self._index: tuple[list[int], Tensor] | None = None

    @property
    def stored(self) -> int:
        """Tokens held for each row and head."""
        return len(self.starts) * sum(part.count for part in self.parts)

    def add(self, starts: list[int], k: Tensor, v: Tensor, flags: Tensor, *, ample: bool = False) -> None:
        """One more block k, v ``[R, G, W, .]``, split by bools ``[R, G or 1, W]``.

        ample: buffers double where they must grow, so that they seldom move; otherwise they grow by a small share.
        """
        at, g = len(self.starts), k.shape[1]
        room = at + 1 + (at if ample else at // 32)
        channel = cst_channel(v, torch.float16)
        if any(part.bits < 16 for part in self.parts):
            self.channel = _stacked(self.channel, at, room, channel.unsqueeze(2))
        if self.precise < self.width:
            self.flags = _stacked(self.flags, at, room, pack_flags(flags).unsqueeze(2))
            order, done = _parted(flags), 0
            for part in self.parts:
                index = order[..., done : done + part.count].expand(-1, g, -1).unsqueeze(-1)
                mine, theirs = (x.gather(2, index.expand(-1, -1, -1, x.shape[3])) for x in (k, v))
                part.write(at, room, mine, theirs, channel)
                done += part.count
        else:
            self.parts[0].write(at, room, k, v, channel)
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

    def count(self) -> Tensor:
        """int32 ``[1]`` on the device: how many blocks there are. Brought up to date in place."""
        now = len(self.starts)
        if self._count is None:
            self._count = (now, torch.full((1,), now, dtype=torch.int32, device=self._any().device))
        elif self._count[0] != now:
            self._count = (now, self._count[1].fill_(now))
        return self._count[1]

    def index(self) -> Tensor:
        """int64 ``[R]`` on the device: the batch rows."""
        if self._index is None or self._index[0] != self.rows:
            self._index = (self.rows, torch.tensor(self.rows, device=self._any().device))
        return self._index[1]

    def told(self) -> list[Tensor]:
        """What `count` and `index` hold on the device."""
        return [x[1] for x in (self._count, self._index) if x is not None]

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


def _stacked(held: Tensor | None, at: int, room: int, piece: Tensor) -> Tensor:
    """Blocks ``[R, G, capacity, ...]`` with `piece` ``[R, G, 1, ...]`` at place `at`, resized to `room` where it must grow."""
    if held is None:
        return piece.contiguous()
    if held.shape[2] <= at:
        held = resized(held, room, at)
    held[:, :, at] = piece[:, :, 0]
    return held


def _parted(flags: Tensor) -> Tensor:
    """Places ``[..., W]`` of the tokens that are set, then of the others, each in order."""
    return (~flags).to(torch.uint8).argsort(dim=-1, stable=True)


# -- attention ----------------------------------------------------------------------------------------------------------

LOG2E = 1.4426950408889634

Running = tuple[Tensor, Tensor, Tensor]
"""Largest logit ``[R, G, Q]``, sum of weights ``[R, G, Q]`` and weighted values ``[R, G, Q, E]`` so far.

Logits are in units of log 2, as queries that were scaled by LOG2E give them: on a CPU torch hands every exp of more than a
few thousand elements to its threads, which costs more than it saves here, and does not with exp2.
"""


def ended(running: Running) -> tuple[Tensor, Tensor]:
    """Give out ``[R, G, Q, E]`` and natural lse ``[R, G, Q]``; a query that read nothing gives 0 and -inf."""
    top, total, out = running
    safe = total.clamp(min=torch.finfo(total.dtype).tiny)
    return out / safe.unsqueeze(-1), (top + safe.log2()) / LOG2E


def nothing(x: Tensor, width: int) -> Running:
    """The running softmax of queries x ``[R, G, Q, D]`` that have read nothing yet; width: E."""
    return x.new_full(x.shape[:3], -torch.inf), x.new_zeros(x.shape[:3]), x.new_zeros(*x.shape[:3], width)


def begin(x: Tensor, keys: Tensor, values: Tensor) -> Running:
    """The running softmax of scaled queries x ``[R, G, Q, D]`` after plain tokens ``[R, G, T, .]``, which all may read."""
    logits = x @ keys.to(x.dtype).mT
    top = logits.amax(-1)
    weights = logits.sub_(top.unsqueeze(-1)).exp2_()
    return top, weights.sum(-1), weights @ values.to(x.dtype)


def fold(x: Tensor, running: Running, stack: Stack, rows: slice | list[int]) -> Running:
    """One more stack into the running softmax of scaled queries x ``[R, G, Q, D]``; rows: those of the stack that x asks for."""
    blocks = len(stack.starts)
    channel = None if stack.channel is None else stack.channel[rows, :, :blocks]
    for part in stack.parts:
        assert part.keys is not None and part.values is not None
        keys, values = part.keys[rows, :, :blocks], part.values[rows, :, :blocks]
        held = (*part.ranges(rows, blocks), channel)
        width = max(x.shape[3], running[2].shape[3])
        most = max(1, BLOCK_ELEMENTS // (x.shape[0] * x.shape[1] * width))  # tokens at once
        per = min(part.count, most)
        many = max(1, most // part.count)
        for a in range(0, blocks, many):
            at = slice(a, min(blocks, a + many))
            few = [None if y is None else y[:, :, at] for y in held]
            for t in range(0, part.count, per):
                token = slice(t, min(part.count, t + per))
                running = _fold_few(x, running, part.bits, keys[:, :, at, token], values[:, :, at, token], few, token)
    return running


def _fold_few(
    x: Tensor, running: Running, bits: int, keys: Tensor, values: Tensor, ranges: list[Tensor | None], token: slice
) -> Running:
    """The packed tokens keys, values ``[R, G, K, T, words]`` into the running softmax; ranges of the whole blocks.

    Ranges stay float16 where an operation widens them by itself: at short contexts a step is bound by their number.
    """
    wide, (top, total, out) = x.dtype, running
    (r, g, q, d), (blocks, count), e = x.shape, keys.shape[2:4], out.shape[3]
    key_scale, key_zero, value_scale, value_zero, channel = ranges
    if key_scale is None or key_zero is None:
        logits = x.unsqueeze(2) @ keys.to(wide).mT  # [R, G, K, Q, T]
    else:
        codes = unpack_bits(keys, bits, d).to(wide).view(-1, count, d)
        scaled = (x.unsqueeze(2) * key_scale.unsqueeze(3)).reshape(-1, q, d)
        zero = (x @ key_zero.to(wide).mT).mT.reshape(-1, q, 1)  # [R G K, Q, 1]
        logits = torch.baddbmm(zero, scaled, codes.mT).view(r, g, blocks, q, count)
    new = torch.maximum(top, logits.amax((2, 4)))
    weights = logits.sub_(new[:, :, None, :, None]).exp2_()
    fade = top.sub_(new).exp2_()
    total = total.mul_(fade).add_(weights.sum((2, 4)))
    if value_scale is None or value_zero is None:
        mixed = weights @ values.to(wide)  # [R, G, K, Q, E]
    else:
        assert channel is not None
        low = (weights * value_zero[..., token].unsqueeze(3)).sum(-1, keepdim=True).reshape(-1, q, 1)
        codes = unpack_bits(values, bits, e).to(wide).view(-1, count, e)
        scaled = weights.mul_(value_scale[..., token].unsqueeze(3)).reshape(-1, q, count)
        mixed = torch.baddbmm(low, scaled, codes).view(r, g, blocks, q, e) * channel.unsqueeze(3)
    return new, total, out.mul_(fade.unsqueeze(-1)).add_(mixed.squeeze(2) if blocks == 1 else mixed.sum(2))
