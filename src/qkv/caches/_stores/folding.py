r"""Sinks and a recent buffer, and one mean key and value for everything dropped: an extra key whose logit has + ln N.

    k^ = mean of dropped keys,  v^ = mean of dropped values,  weight of k^ = N exp(scale q . k^)

All heads keep the same tokens, so positions are kept once per row. A block attends to what is stored, to the mean, and to
all of itself; then it is trimmed. A step writes into one free slot and folds the oldest token that is no sink. Means are
kept in float32 (float64 for float64 keys). Where a site adds linear position biases, the mean has the bias of the mean position.

Axes: B batch, H query heads, G key/value heads, N new queries, S stored slots, D head width, E value width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from qkv.caches._stores.dense import grown, rearranged, resized
from qkv.caches._stores.recording import Recording
from qkv.core.attend import attend, sdpa
from qkv.core.cache import Geometry, Now, Step
from qkv.core.errors import Refused, StateError
from qkv.core.kernel import kernel, served
from qkv.core.merge import merge


def mean_part(q: Tensor, mean_k: Tensor, mean_v: Tensor, count: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The mean of `count` dropped tokens as a part (out ``[B, H, N, E]``, lse ``[B, H, N]``) of an attention.

    q ``[B, H, N, D]``; mean_k ``[B, G, D]``, mean_v ``[B, G, E]``, count ``[B, 1|G]``; nothing dropped: lse is -inf.
    """
    b, h, n, d = q.shape
    g, e = mean_v.shape[1:]
    grouped = q.reshape(b, g, -1, d).to(mean_k.dtype)  # [B, G, R N, D]
    lse = (grouped @ mean_k.unsqueeze(-1)).squeeze(-1) * scale + count.to(mean_k.dtype).log().unsqueeze(-1)
    out = mean_v.to(q.dtype)[:, :, None, None].expand(b, g, h // g, n, e)
    return out.reshape(b, h, n, e), lse.reshape(b, h, n)


@final
class FoldingCache(Recording):
    """See the module. limit: tokens a row of a given length keeps beside its sinks; fold: False drops without a trace."""

    NAMES = ("keys", "values", "position", "slot", "mean_k", "mean_v", "mean_p", "count")

    def __init__(
        self, geometry: Geometry, *, sinks: int, limit: Callable[[Any], Any], fold: bool = True, who: str = "folding"
    ) -> None:
        self.geometry, self.sinks, self.limit, self.fold, self.who = geometry, sinks, limit, fold, who
        self.reset()

    def reset(self) -> None:
        """Forget everything (not the recording mode)."""
        self.keys: Tensor | None = None  # [B, G, C, D]
        self.values: Tensor | None = None  # [B, G, C, E]
        self.position: Tensor | None = None  # [B, C], -1 = empty
        self.slot: Tensor | None = None  # [B, 1] where the next token goes
        self.mean_k: Tensor | None = None  # [B, G, D]
        self.mean_v: Tensor | None = None  # [B, G, E]
        self.mean_p: Tensor | None = None  # float64 [B, 1], where positions bias the logits
        self.count: Tensor | None = None  # [B, 1]
        self.length: Tensor | None = None  # int32 [1], for the kernel
        self.newest: Tensor | None = None  # [B, 1] the largest position so far
        self._length_of = 0
        self.room = 0
        self.seen = 0
        self._forget_runs()

    # -- one call ---------------------------------------------------------------------------------------------

    def attend(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """See `LayerCache.attend`."""
        if step.mask is not None:
            raise Refused(
                f"{self.who}: a custom 4-D or packed-sequence mask names columns that this cache may have folded into one; "
                "pass a 2-D attention_mask"
            )
        if not step.causal:
            raise Refused(f"{self.who}: folding caches serve causal attention only")
        return self._provisional(q, k, v, step) if self.recording else self._absorb(q, k, v, step)

    def _absorb(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        one = q.shape[2] == 1 and self.keys is not None
        return self._one(q, k, v, step.position, step) if one else self._block(q, k, v, step)

    def _block(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        n, old = k.shape[2], self.keys is not None
        keys, values, position = k, v, step.position.to(torch.int32)
        if self.keys is not None and self.values is not None and self.position is not None:
            keys, values = torch.cat((self.keys, k), 2), torch.cat((self.values, v), 2)
            position = torch.cat((self.position, position), 1)
        holes = old or step.padding is not None
        mask = (position >= 0)[:, None, None] if holes else None
        out = self._attend(q, keys, values, mask, n > 1, step, position)
        self._trim(keys.detach(), values.detach(), position, self.seen + n)
        self.seen += n
        return out

    def _one(self, q: Tensor, k: Tensor, v: Tensor, position: Tensor, step: Step) -> Tensor:
        """One token: write, attend, fold the oldest token of every row that is over its limit. Nothing is read on the host."""
        self._ensure_room()
        assert self.keys is not None and self.values is not None and self.position is not None
        assert self.slot is not None and self.newest is not None
        at = self.slot[:, None, :, None]
        self.keys.scatter_(2, at.expand(*k.shape), k.detach())
        self.values.scatter_(2, at.expand(*v.shape), v.detach())
        self.position.scatter_(1, self.slot, position.to(torch.int32))
        torch.maximum(self.newest, position.to(torch.int32), out=self.newest)
        if served(q) and step.compute is None and self.geometry.slopes is None:
            out = self._read(q, step.scale)
        else:
            real = (self.position >= 0)[:, None, None]
            out = self._attend(q, self.keys, self.values, real, False, step, self.position)
        self._free()
        self.seen += 1
        return out

    def _free(self) -> None:
        assert self.keys is not None and self.values is not None and self.position is not None
        assert self.slot is not None and self.newest is not None
        real = self.position >= 0
        over = real.sum(-1, keepdim=True) > self.sinks + self.limit(self.newest + 1)  # [B, 1]
        aged = torch.where(real & (self.position >= self.sinks), self.position, torch.iinfo(torch.int32).max)
        oldest = aged.argmin(-1, keepdim=True)
        if self.fold:
            assert self.mean_k is not None and self.mean_v is not None and self.count is not None
            self.count.add_(over)
            weight = (over.to(self.mean_k.dtype) / self.count.clamp(min=1)).unsqueeze(-1)  # [B, 1, 1]
            at = oldest[:, None, :, None]
            for mean, x in ((self.mean_k, self.keys), (self.mean_v, self.values)):
                token = x.gather(2, at.expand(-1, x.shape[1], -1, x.shape[3])).squeeze(2)
                mean.lerp_(token.to(mean.dtype), weight)
        held = self.position.gather(1, oldest)
        if self.mean_p is not None:
            assert self.count is not None
            self.mean_p.lerp_(held.double(), over.double() / self.count.clamp(min=1))
        self.position.scatter_(1, oldest, torch.where(over, torch.full_like(held, -1), held))
        self.slot.copy_(
            torch.where(over, oldest, self.position.argmin(-1, keepdim=True))
        )  # an empty one: -1 is the least

    def _ensure_room(self) -> None:
        """A free slot for every row after the next step: no row holds more than its limit at the columns seen."""
        assert self.keys is not None and self.values is not None and self.position is not None
        needed = self._most(self.seen + 1)
        if needed <= self.keys.shape[2]:
            return
        capacity, used = grown(self.keys.shape[2], needed), self.keys.shape[2]
        self.keys, self.values = (resized(x, capacity, used) for x in (self.keys, self.values))
        self.position = torch.nn.functional.pad(self.position, (0, capacity - used), value=-1)
        if self.slot is not None:
            self.slot = self.position.argmin(-1, keepdim=True)

    def _most(self, tokens: int) -> int:
        """Slots that rows of at most `tokens` tokens need, one free included."""
        return min(tokens, self.sinks + int(self.limit(tokens))) + 1

    def _trim(self, keys: Tensor, values: Tensor, position: Tensor, tokens: int) -> None:
        """Keep sinks and the newest, fold the rest, and leave a free slot."""
        newest = position.amax(-1, keepdim=True)
        if self.newest is not None:
            newest = torch.maximum(newest, self.newest)
        real = position >= 0
        stays = real & ((position < self.sinks) | (position > newest - self.limit(newest + 1)))
        self._fold_all(keys, values, position, real & ~stays)
        size = min(self._most(tokens), position.shape[1] + 1)
        order = torch.where(stays, position, torch.iinfo(torch.int32).max).argsort(-1)[:, : size - 1]
        kept = stays.gather(1, order)
        capacity = max(size, self.room)
        wide = order[:, None, :, None]
        self.keys, self.values = (
            resized(x.gather(2, wide.expand(-1, x.shape[1], -1, x.shape[3])), capacity, size - 1)
            for x in (keys, values)
        )
        self.position = resized(position.gather(1, order).masked_fill(~kept, -1)[:, None], capacity, size - 1, -1)[:, 0]
        self.newest, self.slot = newest.to(torch.int32), self.position.argmin(-1, keepdim=True)

    def _fold_all(self, keys: Tensor, values: Tensor, position: Tensor, gone: Tensor) -> None:
        """Add dropped tokens ``[B, S]`` to the means."""
        if not self.fold:
            return
        wide = torch.promote_types(keys.dtype, torch.float32)
        if self.mean_k is None or self.mean_v is None or self.count is None:
            b, g = keys.shape[:2]
            self.mean_k, self.mean_v = (x.new_zeros(b, g, x.shape[3], dtype=wide) for x in (keys, values))
            self.count = gone.new_zeros(b, 1, dtype=torch.int64)
            if self.geometry.slopes is not None:
                self.mean_p = self.count.double()
        new = gone.sum(-1, keepdim=True)
        total = (self.count + new).clamp(min=1).unsqueeze(-1).to(wide)
        for mean, x in ((self.mean_k, keys), (self.mean_v, values)):
            drawn = torch.where(gone[:, None, :, None], x, 0).sum(2, dtype=wide)  # what lies in padding may be anything
            mean.mul_(self.count.unsqueeze(-1) / total).add_(drawn / total)
        if self.mean_p is not None:
            few = (self.count + new).clamp(min=1).double()
            drawn = torch.where(gone, position, 0).sum(1, keepdim=True, dtype=torch.float64)
            self.mean_p.mul_(self.count / few).add_(drawn / few)
        self.count += new

    # -- attention --------------------------------------------------------------------------------------------

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, step: Step, position: Tensor
    ) -> Tensor:
        """The attention to keys at positions ``[B, S]`` and, where something was folded, to the mean."""
        bias = self.geometry.bias(step.position, position[:, None], step.compute)
        if self.mean_k is None or self.mean_v is None or self.count is None:
            more: dict[str, Any] = {} if bias is None else {"bias": bias}
            return (step.compute or sdpa)(q, k, v, mask=mask, causal=causal, scale=step.scale, **more)
        if step.compute is None:
            done = attend(q, k, v, mask=mask, causal=causal, scale=step.scale, bias=bias)
            out, lse = mean_part(q, self.mean_k, self.mean_v, self.count, step.scale)
            if bias is not None:
                assert self.mean_p is not None
                gap = self.mean_p - step.position  # [B, N]
                lse = lse + bias.slopes[:, None] * gap[:, None]
            return merge((done.out, done.lse), (out, lse.to(done.lse.dtype)))[0]
        return self._through(q, k, v, mask, causal, step)

    def _through(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, step: Step) -> Tensor:
        """An attention that gives no lse gets the mean as one more key in front, its bias in one more channel."""
        assert (
            step.compute is not None and self.mean_k is not None and self.mean_v is not None and self.count is not None
        )
        b, g, m, _ = k.shape
        bias = (self.count.clamp(min=1).to(self.mean_k.dtype).log() / step.scale).to(k.dtype)[:, None, :, None]
        first = torch.cat((self.mean_k.to(k.dtype).unsqueeze(2), bias.expand(b, g, 1, 1)), -1)
        keys = torch.cat((first, torch.cat((k, k.new_zeros(b, g, m, 1)), -1)), 2)
        values = torch.cat((self.mean_v.to(v.dtype).unsqueeze(2), v), 2)
        there = torch.ones(b, 1, 1, m, dtype=torch.bool, device=k.device) if mask is None else mask.expand(b, 1, 1, m)
        there = torch.cat(((self.count > 0)[:, None, None], there), -1)
        return step.compute(
            torch.cat((q, q.new_ones(*q.shape[:3], 1)), -1), keys, values, mask=there, causal=causal, scale=step.scale
        )

    def _read(self, q: Tensor, scale: float) -> Tensor:
        """One token on the device, by the kernel that captured steps use too."""
        assert self.keys is not None and self.values is not None and self.position is not None
        if self.length is None or self._length_of != self.keys.shape[2]:
            self._length_of = self.keys.shape[2]
            self.length = torch.full((1,), self._length_of, dtype=torch.int32, device=q.device)
        position = self.position[:, None].expand(-1, self.keys.shape[1], -1)
        done = kernel("decode:decode_attention")(
            q, self.keys, self.values, length=self.length, position=position, scale=scale
        )
        if self.mean_k is None or self.mean_v is None or self.count is None:
            return done[0]
        return merge(done, mean_part(q, self.mean_k, self.mean_v, self.count, scale))[0]

    # -- the rest of the contract -----------------------------------------------------------------------------

    def _snapshot(self) -> tuple[dict[str, Tensor], int]:
        return self.tensors(), self.seen

    def _go_back(self, snapshot: tuple[dict[str, Tensor], int]) -> None:
        self.restore(snapshot[0])
        self.seen = snapshot[1]

    def crop(self, tokens: int) -> None:
        """Take back the newest `tokens` of what is not settled yet and settle the rest, or raise `StateError`."""
        if tokens > self.unsettled:
            raise StateError(
                f"{self.who}: {tokens} tokens cannot be taken back, only the {self.unsettled} recorded since the last `crop`: "
                "what the others folded is gone. Start speculative decoding through `generate` (it records), or keep a copy of "
                "the cache"
            )
        self._take_back(tokens)

    def reserve(self, tokens: int) -> None:
        """Room for what `tokens` tokens need, so that decoding never moves the buffers."""
        self.room = self._most(tokens)

    def static(self) -> bool:
        """On CUDA, once there is room for what the next step needs."""
        if self.keys is None or self.recording or not served(self.keys) or self.length is None:
            return False  # with position biases there is no length: kernels, which would have made it, do not take them
        return self._most(self.seen + 1) <= self.keys.shape[2]

    def step(self, q: Tensor, k: Tensor, v: Tensor, scale: float, now: Now) -> Tensor:
        """See `LayerCache.step`."""
        return self._one(q, k, v, now.position, Step(now.position, scale))

    def tensors(self) -> dict[str, Tensor]:
        """Copies of every tensor, and the number of tokens seen."""
        names = (*self.NAMES, "newest")
        out = {name: x.clone() for name in names if (x := getattr(self, name)) is not None}
        return out | {"seen": torch.tensor(self.seen)} if out else out

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """See `LayerCache.restore`."""
        room = self.room
        self.reset()
        self.room = room
        for name, x in tensors.items():
            setattr(self, name, int(x) if name == "seen" else x.clone())

    def select(self, rows: Tensor) -> None:
        """See `LayerCache.select`."""
        self._refuse_beams()
        for name in (*self.NAMES, "newest"):
            x = getattr(self, name)
            if x is not None:
                setattr(self, name, rearranged(x, rows))

    def _held(self) -> list[Tensor]:
        held = [getattr(self, name) for name in (*self.NAMES, "newest", "length")]
        return [x for x in held if x is not None]

    def bytes(self) -> int:
        """Bytes of keys, values, positions and means, spare capacity and what recording holds included."""
        return sum(x.numel() * x.element_size() for x in (*self._held(), *self._recorded()))

    def kept(self) -> int:
        """See `LayerCache.kept`."""
        return 0 if self.keys is None else self._most(self.seen) - 1

    def positions(self) -> Tensor:
        """``[B, G, S]``, sorted, empties (-1) first."""
        if self.position is None or self.keys is None:
            raise StateError("the cache is empty")
        return self.position.sort(-1).values[:, None].expand(-1, self.keys.shape[1], -1)

    def buffers(self) -> tuple[Tensor, ...]:
        """Everything that a step reads or overwrites."""
        return tuple(self._held())
