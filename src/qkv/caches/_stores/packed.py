r"""Quantised groups behind a full-precision residual: each token is quantised once, when it leaves the residual.

    x^ = code * s + z,   z = min,  s = (max - min) / (2^bits - 1),   code = round(clamp((x - z) / s, 0, 2^bits - 1))

Keys share s and z over `group` consecutive tokens of one channel, values over `group` consecutive channels of one token.
Codes lie in int32 words, element j of a word at bits j * bits; s and z are float16 (magnitudes above 65504 saturate) and
codes are taken against the stored, rounded s and z.

A row's tokens are stored by their logical position: padding is never stored, so it cannot widen a group's range, and groups
are cut at the same tokens whether a row is alone or left-padded in a batch. Rows of different length flush at different
times. Only the residual and the attention weights ever meet the quantised part in floating point, block by block: the scales
are folded into queries and weights, the dequantised cache never exists as a whole (a set `Step.compute`, which wants plain
tensors, is the exception).

On CUDA one token is decoded and stored by the kernels of `qkv.kernels.packed`, which read the packed words. Where `reserve`
has made room, no buffer changes shape or place any more, and the step can be captured. Elsewhere none does between two flushes.

Axes: B batch, H query heads, G key/value heads, N new queries, M stored tokens, D head width, E value width, R residual.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, final

import torch
from torch import Tensor

from qkv.caches._stores.codecs import (
    PIECE,
    dequantize_per_channel_tokens,
    dequantize_per_token_channels,
    pack_bits,
    quantize_per_channel_tokens,
    quantize_per_token_channels,
    unpack_bits,
)
from qkv.caches._stores.dense import grown, rearranged, resized
from qkv.caches._stores.recording import Recording, Run
from qkv.core.attend import CHUNK_ELEMENTS, causal_mask, on_kernels, sdpa
from qkv.core.cache import Geometry, Now, Step
from qkv.core.errors import Refused, StateError
from qkv.core.kernel import kernel, served

BLOCK_ELEMENTS = 1 << 20  # codes held in floating point at once


# -- the quantised part ---------------------------------------------------------------------------------------------


class _Shelf:
    """Append-only buffers ``[B, G, capacity, ...]`` that grow by a small share along their third axis."""

    def __init__(self) -> None:
        self.codes: Tensor | None = None
        self.scale: Tensor | None = None
        self.zero: Tensor | None = None

    def named(self) -> Iterator[tuple[str, Tensor]]:
        for name in ("codes", "scale", "zero"):
            x = getattr(self, name)
            if x is not None:
                yield name, x

    def reserve(self, places: int, like: Tensor, **widths: tuple[int, ...]) -> None:
        """At least `places` in codes (int32), scale and zero (float16); like: ``[B, G, ...]``, widths: the axes behind."""
        for name, width in widths.items():
            held = getattr(self, name)
            if held is None:
                dtype = torch.int32 if name == "codes" else torch.float16
                setattr(self, name, like.new_zeros((*like.shape[:2], places, *width), dtype=dtype))
            elif held.shape[2] < places:
                setattr(self, name, resized(held, places, held.shape[2]))

    def write(self, rows: Tensor | None, batch: int, at: int, slack: int, **parts: Tensor) -> None:
        """Put parts ``[B', G, n, ...]`` at place `at` of the given rows (None: all)."""
        for name, part in parts.items():
            end, held = at + part.shape[2], getattr(self, name)
            if held is None:
                held = part.new_zeros((batch, part.shape[1], end, *part.shape[3:]))
            if held.shape[2] < end:
                held = resized(held, end + max(slack, end // 32), held.shape[2])
            held[slice(None) if rows is None else rows, :, at:end] = part
            setattr(self, name, held)


@final
class PackedCache(Recording):
    """Keys and values of every token seen: the older ones quantised, the newest in full precision; see the module.

    After L tokens of a row the first L - (L mod R) keys and the first L - R values are quantised. A call attends to what was
    stored before it and to its own tokens unquantised; then tokens move.
    """

    def __init__(self, geometry: Geometry, *, k_bits: int, v_bits: int, group: int, residual: int) -> None:
        self.geometry = geometry
        self.k_bits, self.v_bits, self.group, self.residual = k_bits, v_bits, group, residual
        self.reset()

    def reset(self) -> None:
        """Forget everything (not the recording mode)."""
        self.keys = _Shelf()  # codes [B, G, C / group, D, words], scale and zero [B, G, C / group, D]
        self.values = _Shelf()  # codes [B, G, C, words], scale and zero [B, G, C, E / group]
        self.key_tail: Tensor | None = None  # [B, G, <= R, D], a token of position p in slot p mod R
        self.value_tail: Tensor | None = None  # [B, G, <= R, E], the same
        self.real: Tensor | None = None  # [B, columns] which were tokens (those it lacks were); None: no padding
        self.length: list[int] = []  # tokens of each row
        self.key_done: list[int] = []  # of these, keys quantised: a multiple of R
        self.value_done: list[int] = []
        self.room = 0
        self.seen = 0
        self._forget_runs()

    # -- one call ---------------------------------------------------------------------------------------------------

    def attend(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """See `LayerCache.attend`. The first block attends to the live tensors, so gradients flow through it."""
        if not self.length:
            self._begin(k, v)
        if self.recording:
            return self._provisional(q, k, v, step)
        return self._absorb(q, k, v, step)

    def _begin(self, k: Tensor, v: Tensor) -> None:
        b, g = k.shape[:2]
        self.length, self.key_done, self.value_done = [0] * b, [0] * b, [0] * b
        self.key_tail, self.value_tail = k.new_zeros(b, g, 0, k.shape[3]), v.new_zeros(b, g, 0, v.shape[3])
        if self.room and self._packs:
            self._make_room(self.room)

    def _absorb(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        real = step.position >= 0 if step.padding is not None else None
        if real is not None and bool(real.all()):
            real = None
        if real is None and self._fused(q, step):
            return self._one(q, k, v, step.scale)
        out = self._attention(q, k, v, step, real)
        self._store(k, v, step.position, real is not None)
        return out

    def _store(self, k: Tensor, v: Tensor, position: Tensor, padded: bool) -> None:
        """Store a block; padded: some of its columns may be padding, which is left out."""
        b, n = position.shape
        counts, real = [n] * b, None
        if padded:  # real tokens first, in order
            real = position >= 0
            counts = real.sum(-1).tolist()
            order = (~real).to(torch.int8).argsort(dim=-1, stable=True)[:, None, :, None]
            k, v = (x.gather(2, order.expand(-1, x.shape[1], -1, x.shape[3])) for x in (k, v))
        self._columns(n, real)
        self._append(k.detach(), v.detach(), counts)

    def _columns(self, n: int, real: Tensor | None) -> None:
        """Note which of the next `n` columns are tokens (None: all)."""
        held = self._noted()
        start, self.seen = self.seen, self.seen + n
        if held is None and real is None:
            return
        if held is None or held.shape[1] < self.seen:
            assert self.key_tail is not None
            size = self.seen if held is None else grown(held.shape[1], self.seen)
            wider = torch.ones(self.key_tail.shape[0], size, dtype=torch.bool, device=self.key_tail.device)
            if held is not None:
                wider[:, :start] = held[:, :start]
            self.real = held = wider
        held[:, start : self.seen] = True if real is None else real

    def _noted(self) -> Tensor | None:
        """`real` with at least `seen` columns: what single steps added were tokens, which is noted when somebody asks."""
        held = self.real
        if held is not None and held.shape[1] < self.seen:
            self.real = held = torch.nn.functional.pad(held, (0, self.seen - held.shape[1]), value=True)
        return held

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, step: Step, real: Tensor | None) -> Tensor:
        """Over what is stored and the block itself: ``[B, H, N, E]``. real ``[B, N]``: which of its tokens count, None: all."""
        stored, n = max(self.length), q.shape[2]
        if step.mask is not None and (real is not None or any(x != self.seen for x in self.length)):
            raise Refused(
                "a 4-D or packed-sequence mask names columns, and this cache stores no padding: pass a 2-D attention_mask"
            )
        mask = None if real is None else real[:, None, None, :]
        causal = step.causal and step.mask is None
        if stored == 0 or step.compute is not None or (step.mask is None and on_kernels(q, k, v)):
            if stored:  # on a device a block of queries reads what it needs dequantised: one layer, while it attends
                keys, values, holds = self.read()
                if holds is not None or mask is not None:
                    old = k.new_ones(k.shape[0], stored, dtype=torch.bool) if holds is None else holds
                    new = k.new_ones(k.shape[0], n, dtype=torch.bool) if real is None else real
                    mask = torch.cat((old, new), 1)[:, None, None, :]
                k, v = torch.cat((keys, k), 2), torch.cat((values, v), 2)
            mask = step.mask if mask is None else mask
            return (step.compute or sdpa)(q, k, v, mask=mask, causal=causal, scale=step.scale)
        size = max(1, CHUNK_ELEMENTS // (q.shape[0] * q.shape[1] * (stored + n)))
        outs = [self._split(q, k, v, step, mask, causal, a, min(n, a + size)) for a in range(0, n, size)]
        return outs[0] if len(outs) == 1 else torch.cat(outs, 2)

    def _split(
        self, q: Tensor, k: Tensor, v: Tensor, step: Step, mask: Tensor | None, causal: bool, start: int, stop: int
    ) -> Tensor:
        """The queries start .. stop: one softmax over quantised part, residual and block; ``[B, H, stop - start, E]``."""
        b, h, n, d = q.shape
        g, stored = k.shape[1], max(self.length)
        wide = torch.promote_types(q.dtype, torch.float32)
        x = (q[:, :, start:stop].to(wide) * step.scale).reshape(b, g, -1, d)  # [B, G, H/G * rows, D]
        logits = torch.cat((self._key_logits(x), x @ k.to(wide).mT), -1).view(b, h, stop - start, stored + n)
        if causal and n > 1:
            logits[..., stored:].masked_fill_(~causal_mask(n, n, q.device, start, stop - start), -torch.inf)
        if mask is not None:
            logits[..., stored:].masked_fill_(~mask, -torch.inf)
        if step.mask is not None:
            logits = logits.masked_fill(~step.mask[..., start:stop, :], -torch.inf)
        top = logits.amax(-1, keepdim=True)
        weights = (logits - top.masked_fill(top == -torch.inf, 0)).exp()
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(wide).tiny)
        weights = weights.view(b, g, -1, stored + n)
        out = self._value_mix(weights[..., :stored]) + weights[..., stored:] @ v.to(wide)
        return out.view(b, h, stop - start, -1).to(v.dtype)

    # -- reading ----------------------------------------------------------------------------------------------------

    @property
    def _uniform(self) -> bool:
        """Whether all rows hold the same number of tokens in the same state."""
        return all(len(set(x)) <= 1 for x in (self.length, self.key_done, self.value_done))

    def _per_row(self, counts: list[int], device: torch.device) -> Tensor:
        return torch.tensor(counts, device=device).view(-1, 1)

    def _key_columns(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Per row: where the key of position p lies behind the quantised part of the longest row, and whether there is one."""
        p = torch.arange(max(self.length), device=device)
        done, length = self._per_row(self.key_done, device), self._per_row(self.length, device)
        most = max(self.key_done)
        last = most + max(n - d for n, d in zip(self.length, self.key_done, strict=True)) - 1
        return torch.where(p < done, p, (most + p - done).clamp(max=max(last, 0))), p < length

    def _value_positions(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Per row: the position ``[B, slots]`` that each slot of the value tail holds, and whether it holds one."""
        assert self.value_tail is not None
        slot = torch.arange(self.value_tail.shape[2], device=device)
        done, length = self._per_row(self.value_done, device), self._per_row(self.length, device)
        p = done + (slot - done) % self.residual
        return p.clamp(max=max(self.length) - 1), p < length

    def _key_logits(self, x: Tensor) -> Tensor:
        """Scaled queries x ``[B, G, Q, D]`` times every stored key: ``[B, G, Q, M]``, -inf where a row has no token."""
        assert self.key_tail is not None
        b, g, r, d = x.shape
        most, parts = max(self.key_done), []
        codes, scale, zero = self.keys.codes, self.keys.scale, self.keys.zero
        for a, z in _blocks(most // self.group, b * g * d * self.group):
            assert codes is not None
            if scale is None or zero is None:
                part = x.unsqueeze(2) @ codes[:, :, a:z].to(x.dtype)  # [B, G, groups, Q, group]
            else:
                bits = unpack_bits(codes[:, :, a:z], self.k_bits, self.group).to(x.dtype)
                part = (x.unsqueeze(2) * scale[:, :, a:z].to(x.dtype).unsqueeze(3)) @ bits
                part = part + (zero[:, :, a:z].to(x.dtype) @ x.mT).unsqueeze(-1)
            parts.append(part.transpose(2, 3).reshape(b, g, r, -1))
        tail = max(n - d for n, d in zip(self.length, self.key_done, strict=True))
        parts.append(x @ self.key_tail[:, :, :tail].to(x.dtype).mT)
        logits = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        if self._uniform:
            return logits
        at, holds = self._key_columns(x.device)
        logits = logits.gather(-1, at[:, None, None].expand(-1, g, r, -1))
        return logits.masked_fill(~holds[:, None, None], -torch.inf)

    def _value_mix(self, weights: Tensor) -> Tensor:
        """Weights ``[B, G, Q, M]`` times every stored value: ``[B, G, Q, E]``."""
        assert self.value_tail is not None
        b, g, r, _ = weights.shape
        most, e = max(self.value_done), self.value_tail.shape[3]
        out = weights.new_zeros(b, g, r, e)
        older = weights[..., :most]
        if not self._uniform and most:
            inside = torch.arange(most, device=weights.device) < self._per_row(self.value_done, weights.device)
            older = older * inside[:, None, None]
        codes, scale, zero = self.values.codes, self.values.scale, self.values.zero
        for a, z in _blocks(most, b * g * e):
            assert codes is not None
            w = older[..., a:z]
            if scale is None or zero is None:
                out += w @ codes[:, :, a:z].to(w.dtype)
                continue
            bits = unpack_bits(codes[:, :, a:z], self.v_bits, e).to(w.dtype)
            s, low = scale[:, :, a:z].to(w.dtype), zero[:, :, a:z].to(w.dtype)
            for i, channels in enumerate(bits.split(self.group, -1)):
                mixed = (w * s[..., i].unsqueeze(2)) @ channels + w @ low[..., i : i + 1]
                out[..., i * self.group : (i + 1) * self.group] += mixed
        if self._uniform:
            newest = _ring(self.value_tail, most, self.length[0], self.residual)
            return out + weights[..., most : self.length[0]] @ newest.to(weights.dtype)
        at, holds = self._value_positions(weights.device)
        w = weights.gather(-1, at[:, None, None].expand(-1, g, r, -1)) * holds[:, None, None]
        return out + w @ self.value_tail.to(weights.dtype)

    def read(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Everything stored, dequantised, by position: keys ``[B, G, M, D]``, values ``[B, G, M, E]``, and which are tokens.

        The last is ``[B, M]``, or None when every row is equally long. For attentions that want plain tensors, and for
        looking; decoding does not use it. Raises `StateError` on an empty cache.
        """
        if self.key_tail is None or self.value_tail is None:
            raise StateError("the cache is empty")
        g, device, dtype = self.key_tail.shape[1], self.key_tail.device, self.key_tail.dtype
        wide = torch.promote_types(dtype, torch.float32)
        k_most, v_most = max(self.key_done), max(self.value_done)
        tail = max(n - d for n, d in zip(self.length, self.key_done, strict=True))
        keys, values = [self.key_tail[:, :, :tail]], [self.value_tail]
        if k_most:
            codes, scale, zero = (None if x is None else x[:, :, : k_most // self.group] for x in _of(self.keys))
            assert codes is not None
            if scale is None or zero is None:
                old = codes.mT.flatten(2, 3)
            else:
                bits = unpack_bits(codes, self.k_bits, self.group)
                old = dequantize_per_channel_tokens(bits, scale.to(wide), zero.to(wide)).to(dtype)
            keys.insert(0, old)
        if v_most:
            codes, scale, zero = (None if x is None else x[:, :, :v_most] for x in _of(self.values))
            assert codes is not None
            if scale is None or zero is None:
                old = codes
            else:
                bits = unpack_bits(codes, self.v_bits, self.value_tail.shape[3]).unflatten(-1, (-1, self.group))
                old = dequantize_per_token_channels(bits, scale.to(wide), zero.to(wide)).to(self.value_tail.dtype)
            values.insert(0, old)
        all_keys, all_values = torch.cat(keys, 2), torch.cat(values, 2)
        p = torch.arange(max(self.length), device=device)
        done = self._per_row(self.value_done, device)
        at_value = torch.where(p < done, p, v_most + p % self.residual).clamp(max=all_values.shape[2] - 1)
        at_key, holds = self._key_columns(device)
        all_keys = all_keys.gather(2, at_key[:, None, :, None].expand(-1, g, -1, all_keys.shape[3]))
        all_values = all_values.gather(2, at_value[:, None, :, None].expand(-1, g, -1, all_values.shape[3]))
        return all_keys, all_values, None if len(set(self.length)) <= 1 else holds

    # -- writing ----------------------------------------------------------------------------------------------------

    def _append(self, k: Tensor, v: Tensor, counts: list[int]) -> None:
        """Add the first counts[row] tokens of k, v ``[B, G, n, .]`` to each row and quantise what leaves the residual."""
        assert self.key_tail is not None and self.value_tail is not None
        have = self.key_tail.shape[2]
        slots = min(self.residual, grown(have, max(n + c for n, c in zip(self.length, counts, strict=True))))
        if slots > have:
            self.key_tail, self.value_tail = (resized(x, slots, have) for x in (self.key_tail, self.value_tail))
        alike: dict[tuple[int, int, int, int], list[int]] = {}
        for row, state in enumerate(zip(self.length, self.key_done, self.value_done, counts, strict=True)):
            alike.setdefault(state, []).append(row)
        for (length, key_done, value_done, count), members in alike.items():
            if not count:
                continue
            rows = None if len(alike) == 1 else torch.tensor(members, device=k.device)
            new_k, new_v = (x[:, :, :count] if rows is None else x[rows, :, :count] for x in (k, v))
            key_done = self._append_keys(rows, new_k, length, key_done)
            value_done = self._append_values(rows, new_v, length, value_done)
            for row in members:
                self.length[row], self.key_done[row], self.value_done[row] = length + count, key_done, value_done

    def _append_keys(self, rows: Tensor | None, k: Tensor, length: int, done: int) -> int:
        """Whole residuals are quantised at once; returns how many keys of these rows are quantised now."""
        assert self.key_tail is not None
        every, have = slice(None) if rows is None else rows, length - done
        full = (have + k.shape[2]) // self.residual * self.residual
        if full:
            if have:
                k = torch.cat((self.key_tail[every, :, :have], k), 2)
            size = max(1, PIECE // self.group) * self.group
            for start in range(0, full, size):
                self._shelve_keys(rows, k[:, :, start : min(full, start + size)], done + start)
            k, have = k[:, :, full:], 0
        self.key_tail[every, :, have : have + k.shape[2]] = k
        return done + full

    def _shelve_keys(self, rows: Tensor | None, k: Tensor, at: int) -> None:
        batch, place = len(self.length), at // self.group
        if self.k_bits == 16:
            self.keys.write(rows, batch, place, 0, codes=k.unflatten(2, (-1, self.group)).mT)
            return
        codes, scale, zero = quantize_per_channel_tokens(k, self.k_bits, self.group, torch.float16)
        self.keys.write(rows, batch, place, 0, codes=pack_bits(codes, self.k_bits), scale=scale, zero=zero)

    def _append_values(self, rows: Tensor | None, v: Tensor, length: int, done: int) -> int:
        """First in, first out, token by token; returns how many values of these rows are quantised now."""
        assert self.value_tail is not None
        every = slice(None) if rows is None else rows
        over = max(0, length - done + v.shape[2] - self.residual)
        old = min(over, length - done)
        if old:
            self._shelve_values(rows, _ring(self.value_tail, done, done + old, self.residual, every), done)
        fresh = over - old
        for start in range(0, fresh, PIECE):
            self._shelve_values(rows, v[:, :, start : min(fresh, start + PIECE)], done + old + start)
        v, at = v[:, :, fresh:], length + fresh
        for slot, part in _arcs(at, at + v.shape[2], self.residual):
            self.value_tail[every, :, slot] = v[:, :, part]
        return done + over

    def _shelve_values(self, rows: Tensor | None, v: Tensor, at: int) -> None:
        batch = len(self.length)
        if self.v_bits == 16:
            self.values.write(rows, batch, at, 32, codes=v)
            return
        codes, scale, zero = quantize_per_token_channels(v, self.v_bits, self.group, torch.float16)
        words = pack_bits(codes.flatten(-2), self.v_bits)
        self.values.write(rows, batch, at, 32, codes=words, scale=scale, zero=zero)

    # -- one token, by kernels ----------------------------------------------------------------------------------------

    @property
    def _packs(self) -> bool:
        """Whether the kernels take this configuration and dtype."""
        assert self.key_tail is not None
        widths = {self.k_bits, self.v_bits} <= {2, 4, 8} and self.group & (self.group - 1) == 0
        return widths and self.key_tail.dtype in (torch.float16, torch.bfloat16, torch.float32)

    @property
    def _regular(self) -> bool:
        """Whether what is quantised follows from the length alone, as the kernels assume: not soon after `crop`."""
        states = set(zip(self.length, self.value_done, strict=True))
        return all(done == max(0, n - self.residual) for n, done in states)

    def _fused(self, q: Tensor, step: Step) -> bool:
        """Whether the kernels serve this call: one token, plain attention, no gradient wanted."""
        if not served(q) or q.shape[2] != 1 or step.compute is not None or step.mask is not None:
            return False
        return self._packs and self._regular

    def _holds(self, tokens: int) -> bool:
        """Whether the buffers take `tokens` tokens of every row as they are."""
        codes, more = self.keys.codes, self.values.codes
        if self.key_tail is None or codes is None or more is None:
            return False
        slots, whole = self.key_tail.shape[2], tokens - tokens % self.residual
        ring = slots == self.residual or tokens <= slots
        return ring and codes.shape[2] * self.group >= whole and more.shape[2] >= tokens - self.residual

    def _make_room(self, tokens: int) -> None:
        """Buffers for `tokens` tokens of every row; there are codes even where nothing is quantised yet."""
        assert self.key_tail is not None and self.value_tail is not None
        (have, d), e, group = self.key_tail.shape[2:], self.value_tail.shape[3], self.group
        words, more = (-(-n * bits // 32) for n, bits in ((group, self.k_bits), (e, self.v_bits)))
        groups = max(1, (tokens - tokens % self.residual) // group)
        self.keys.reserve(groups, self.key_tail, codes=(d, words), scale=(d,), zero=(d,))
        places = max(1, tokens - self.residual)
        self.values.reserve(places, self.value_tail, codes=(more,), scale=(e // group,), zero=(e // group,))
        slots = min(self.residual, tokens)
        if slots > have:
            self.key_tail, self.value_tail = (resized(x, slots, have) for x in (self.key_tail, self.value_tail))

    def _one(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """A token that the host knows to be real in every row, the buffers grown where they must be."""
        tokens = max(self.length) + 1
        if not self._holds(tokens):
            self._make_room(max(self.room, grown(0, tokens)))
        length = torch.full((1,), self.seen + 1, dtype=torch.int32, device=q.device)
        pads = [self.seen - n for n in self.length]
        start = torch.tensor(pads, dtype=torch.int32, device=q.device) if any(pads) else None
        return self._launch(q, k, v, scale, length, start)

    def _launch(self, q: Tensor, k: Tensor, v: Tensor, scale: float, length: Tensor, start: Tensor | None) -> Tensor:
        bits = {"k_bits": self.k_bits, "v_bits": self.v_bits, "group": self.group, "residual": self.residual}
        what: dict[str, Any] = {"length": length, "start": start, **bits}
        out, _ = kernel("packed:packed_decode")(q, k, v, *self.buffers(), scale=scale, **what)
        kernel("packed:packed_store")(k, v, *self.buffers(), **what)
        self.advance()
        return out

    def reserve(self, tokens: int) -> None:
        """Codes, scales, zeros and residual for `tokens` tokens are allocated at once, where the kernels can read them."""
        self.room = tokens

    def static(self) -> bool:
        """On CUDA, with room for the token, codes that the kernels take, and nothing to be taken back."""
        if not self.length or self.key_tail is None or not served(self.key_tail) or self.recording:
            return False
        return self._packs and self._regular and self._holds(max(self.length) + 1)

    def step(self, q: Tensor, k: Tensor, v: Tensor, scale: float, now: Now) -> Tensor:
        """See `LayerCache.step`. Raises `StateError` where the padding is not that of the tokens stored."""
        if (now.start is not None) != any(n != self.seen for n in self.length):
            raise StateError(
                "the attention mask of this step and the padding of the prompt differ; pass the mask at every step"
            )
        return self._launch(q, k, v, scale, now.length, now.start)

    def advance(self) -> None:
        """See `LayerCache.advance`."""
        if self.real is not None:
            self.real = self.real[:, : self.seen]  # a column added is a token: see `_noted`
        self.seen += 1
        self.length = [n + 1 for n in self.length]
        self.key_done = [n - n % self.residual for n in self.length]
        self.value_done = [max(0, n - self.residual) for n in self.length]

    def buffers(self) -> tuple[Tensor, ...]:
        """Codes, scales and zeros of keys and values, and both residuals: what `qkv.kernels.packed` takes, in its order."""
        held = (*_of(self.keys), *_of(self.values), self.key_tail, self.value_tail)
        return tuple(x for x in held if x is not None)

    # -- speculation ------------------------------------------------------------------------------------------------

    def _snapshot(self) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Codes only ever follow codes: the residual and the counts are all that a step overwrites."""
        assert self.key_tail is not None and self.value_tail is not None
        return self.key_tail.clone(), self.value_tail.clone(), self.counters()

    def _go_back(self, snapshot: tuple[Tensor, Tensor, dict[str, Any]]) -> None:
        """A residual that grew since keeps its size."""
        assert self.key_tail is not None and self.value_tail is not None
        keys, values, counters = snapshot
        self.key_tail[:, :, : keys.shape[2]] = keys
        self.value_tail[:, :, : values.shape[2]] = values
        vars(self).update({k: list(x) if isinstance(x, list) else x for k, x in counters.items()})

    def _again(self, run: Run, tokens: int) -> None:
        """Only stored: what is quantised depends on the count alone."""
        if tokens:
            _, k, v, step = run.part(0, tokens)
            self._store(k, v, step.position, step.padding is not None)

    def crop(self, tokens: int) -> None:
        """Forget the newest `tokens` columns, or raise `StateError` (nothing changed) where they are quantised already.

        While recording, tokens that are not settled are taken back exactly, as if they had never come. Others are taken out
        of the residual: codes stay as they are, and the value residual fills up again before more is quantised.
        """
        if tokens < 0 or tokens > self.seen:
            raise StateError(f"cannot forget {tokens} tokens of a cache that holds {self.seen}")
        deeper = tokens - self.unsettled
        if deeper > 0:
            runs = self._runs
            now = self._snapshot()
            if runs:
                self._go_back(runs[0].before)
            try:
                self._shorten(deeper)
            except StateError:
                self._go_back(now)
                raise
            self._forget_runs()
            return
        self._take_back(tokens)

    def _shorten(self, tokens: int) -> None:
        if not tokens:
            return
        if self.real is None:
            gone = [tokens] * len(self.length)
        else:
            real = self._noted()
            assert real is not None
            gone = real[:, self.seen - tokens : self.seen].sum(-1).tolist()
        room = [n - max(a, b) - x for n, a, b, x in zip(self.length, self.key_done, self.value_done, gone, strict=True)]
        if min(room) < 0:
            raise StateError(
                f"{tokens} tokens cannot be taken back: {-min(room)} of them are quantised already (residual="
                f"{self.residual}). Start speculative decoding through `generate` (it records), or keep a copy of the cache"
            )
        self.length = [n - x for n, x in zip(self.length, gone, strict=True)]
        self.seen -= tokens

    # -- the rest of the contract -----------------------------------------------------------------------------------

    def _held(self) -> Iterator[tuple[str, Tensor]]:
        for name, shelf in (("keys", self.keys), ("values", self.values)):
            yield from ((f"{name}.{part}", x) for part, x in shelf.named())
        for name in ("key_tail", "value_tail", "real"):
            x = getattr(self, name)
            if x is not None:
                yield name, x

    def select(self, rows: Tensor) -> None:
        """See `LayerCache.select`."""
        self._refuse_beams()
        for shelf in (self.keys, self.values):
            for name, x in list(shelf.named()):
                setattr(shelf, name, rearranged(x, rows))
        for name in ("key_tail", "value_tail", "real"):
            x = getattr(self, name)
            if x is not None:
                setattr(self, name, rearranged(x, rows))
        if self.length:
            picked = [0] * rows.shape[0] if self._uniform else rows.tolist()
            for name in ("length", "key_done", "value_done"):
                counts = getattr(self, name)
                setattr(self, name, [counts[i] for i in picked])

    def bytes(self) -> int:
        """Bytes of codes, scales, zeros and residual, unused capacity and what recording holds included."""
        held = [x.untyped_storage() for x in (*(x for _, x in self._held()), *self._recorded())]
        return sum({x.data_ptr(): x.nbytes() for x in held}.values())

    def kept(self) -> int:
        """All tokens of the longest row."""
        return max(self.length, default=0)

    def positions(self) -> Tensor:
        """``[B, G, M]``: a token's slot is its position; -1 beyond the end of a shorter row."""
        if self.key_tail is None:
            raise StateError("the cache is empty")
        b, g = self.key_tail.shape[:2]
        p = torch.arange(max(self.length), device=self.key_tail.device).expand(b, -1)
        p = p.masked_fill(p >= self._per_row(self.length, p.device), -1)
        return p[:, None].expand(b, g, -1)

    def counters(self) -> dict[str, Any]:
        """See `LayerCache.counters`."""
        rows = {name: list(getattr(self, name)) for name in ("length", "key_done", "value_done")}
        return {"seen": self.seen, **rows}

    def tensors(self) -> dict[str, Tensor]:
        """Copies of the used part of every buffer, and the counts ``[3, B]`` (tokens, keys and values quantised)."""
        if not self.length:
            return {}
        used = {"keys": max(self.key_done) // self.group, "values": max(self.value_done), "key_tail": None}
        out = {}
        for name, x in self._held():
            end = used.get(name.partition(".")[0])
            out[name] = (x[:, : self.seen] if name == "real" else x if end is None else x[:, :, :end]).clone()
        counts = torch.tensor([self.length, self.key_done, self.value_done])
        return out | {"counts": counts, "seen": torch.tensor(self.seen)}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """See `LayerCache.restore`."""
        self.reset()
        for name, x in tensors.items():
            if name == "counts":
                self.length, self.key_done, self.value_done = x.tolist()
            elif name == "seen":
                self.seen = int(x)
            else:
                shelf, _, part = name.rpartition(".")
                setattr(getattr(self, shelf) if shelf else self, part, x.clone())


def _of(shelf: _Shelf) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return shelf.codes, shelf.scale, shelf.zero


def _blocks(count: int, elements: int) -> Iterator[tuple[int, int]]:
    """Ranges that cut `count` items of `elements` each into blocks of at most BLOCK_ELEMENTS."""
    size = max(1, BLOCK_ELEMENTS // elements)
    for start in range(0, count, size):
        yield start, min(count, start + size)


def _arcs(start: int, stop: int, size: int) -> Iterator[tuple[slice, slice]]:
    """The positions start .. stop of a ring of `size` slots: (slots, places in the run), in at most two pieces."""
    at = start
    while at < stop:
        slot = at % size
        end = min(stop, at + size - slot)
        yield slice(slot, slot + end - at), slice(at - start, end - start)
        at = end


def _ring(tail: Tensor, start: int, stop: int, size: int, rows: slice | Tensor = slice(None)) -> Tensor:
    """The tokens start .. stop ``[B', G, stop - start, .]`` of a ring ``[B, G, size, .]``, in order."""
    parts = [tail[rows, :, slot] for slot, _ in _arcs(start, stop, size)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2) if parts else tail[rows, :, :0]
