"""The whole history, exactly: preallocated, grown by a small share, never concatenated token by token."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from qkv.core.attend import sdpa
from qkv.core.cache import Compute, Geometry, LayerCache, Now, Step
from qkv.core.errors import StateError
from qkv.core.kernel import kernel, served


def grown(capacity: int, needed: int) -> int:
    """Capacity for `needed` slots: at most 1/32 (and at least 32 slots) more than asked for."""
    return capacity if needed <= capacity else needed + max(32, needed // 32)


def resized(x: Tensor, capacity: int, used: int, fill: float = 0) -> Tensor:
    """`x` ``[B, G, S, ...]`` with `capacity` slots, the first `used` copied and the rest filled."""
    out = x.new_full((*x.shape[:2], capacity, *x.shape[3:]), fill)
    out[:, :, :used] = x[:, :, :used]
    return out


def rearranged(x: Tensor, rows: Tensor) -> Tensor:
    """The batch rows `rows` of `x`; in place where their number stays, so that captured steps keep their addresses."""
    new = x.index_select(0, rows.to(x.device))
    return x.copy_(new) if new.shape == x.shape else new


class Columns(LayerCache):
    """Base of memories that hold every token, in the slot of its logical column.

    seen: columns held. padding: the host's own mask of them (never written to) or None. room: slots to allocate at once.
    """

    seen: int
    room: int
    padding: Tensor | None

    def reserve(self, tokens: int) -> None:
        """Allocate room for `tokens` at once, so that decoding never moves the buffers."""
        self.room = tokens

    def advance(self) -> None:
        """See `LayerCache.advance`."""
        self.seen += 1
        if self.padding is not None:
            self.padding = torch.nn.functional.pad(self.padding, (0, self.seen - self.padding.shape[1]), value=True)

    def crop(self, tokens: int) -> None:
        """Forget the newest `tokens`; nothing is copied."""
        if tokens > self.seen:
            raise StateError(f"cannot forget {tokens} tokens of a cache that holds {self.seen}")
        self.seen -= tokens
        if self.padding is not None:
            self.padding = self.padding[:, : self.seen]

    def kept(self) -> int:
        """All tokens seen."""
        return self.seen


@final
class DenseCache(Columns):
    """Keys ``[B, G, capacity, D]`` and values ``[B, G, capacity, E]``; the slot of a token is its logical column.

    tree: what computes blocks that come with a mask of their own, set by a decoding loop whose masks hide nothing before the
    block; None: plain attention.
    """

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.padding = None
        self.left_padded = True
        self.tree: Compute | None = None
        self.room = 0
        self.seen = 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """See `LayerCache.attend`. The first block attends to the live tensors, so gradients flow through it."""
        first = self.seen == 0
        if step.padding is not None and k.shape[2] > 1:
            real = step.padding
            self.left_padded = bool((real[:, 1:] | ~real[:, :-1]).all())  # no real token is followed by padding
        keys, values = self._append(k, v)
        self.padding = step.padding
        if first:
            keys, values = k, v
        plain = step.compute is None and step.mask is None and self.geometry.slopes is None
        if served(q) and q.shape[2] == 1 and plain and self.left_padded:
            return self._read(q, step)
        mask = None if step.padding is None else step.padding[:, None, None, :]
        if step.mask is not None:
            mask = step.mask if mask is None else mask & step.mask
        own = self.tree if step.mask is not None and step.padding is None and not first else None
        what: dict[str, Any] = {"mask": mask, "causal": step.causal and step.mask is None, "scale": step.scale}
        if self.geometry.slopes is not None:
            what["bias"] = self.geometry.bias(step.position, self.positions()[:, :1], step.compute or own)
        return (step.compute or own or sdpa)(q, keys, values, **what)

    def _read(self, q: Tensor, step: Step) -> Tensor:
        """One token over the whole history, by the kernel that captured steps use too."""
        assert self.keys is not None and self.values is not None
        length = torch.full((1,), self.seen, dtype=torch.int32, device=q.device)
        start = None if step.padding is None else (~step.padding).sum(-1, dtype=torch.int32)
        return kernel("decode:decode_attention")(
            q, self.keys, self.values, length=length, start=start, scale=step.scale
        )[0]

    def _append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        n = k.shape[2]
        total = self.seen + n
        if self.keys is None or self.values is None:
            size = max(total, self.room)
            self.keys = k.new_empty((*k.shape[:2], size, k.shape[3]))
            self.values = v.new_empty((*v.shape[:2], size, v.shape[3]))
        capacity = grown(self.keys.shape[2], total)
        if capacity != self.keys.shape[2]:
            self.keys, self.values = (resized(x, capacity, self.seen) for x in (self.keys, self.values))
        self.keys[:, :, self.seen : total] = k.detach()
        self.values[:, :, self.seen : total] = v.detach()
        self.seen = total
        return self.keys[:, :, :total], self.values[:, :, :total]

    def static(self) -> bool:
        """On CUDA, with room for the token, padding (if any) on the left, and no position biases, which kernels do not take."""
        if self.geometry.slopes is not None:
            return False
        if self.keys is None or self.seen >= self.keys.shape[2] or not served(self.keys):
            return False
        return self.left_padded

    def step(self, q: Tensor, k: Tensor, v: Tensor, scale: float, now: Now) -> Tensor:
        """See `LayerCache.step`."""
        assert self.keys is not None and self.values is not None
        self.keys.index_copy_(2, now.cursor, k)
        self.values.index_copy_(2, now.cursor, v)
        self.seen += 1
        return kernel("decode:decode_attention")(
            q, self.keys, self.values, length=now.length, start=now.start, scale=scale
        )[0]

    def buffers(self) -> tuple[Tensor, ...]:
        """Keys and values."""
        return () if self.keys is None or self.values is None else (self.keys, self.values)

    def select(self, rows: Tensor) -> None:
        """See `LayerCache.select`."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = rearranged(self.keys, rows), rearranged(self.values, rows)
        if self.padding is not None:  # the host's own mask: never written to
            self.padding = self.padding.index_select(0, rows.to(self.padding.device))

    def bytes(self) -> int:
        """Bytes of the buffers, unused capacity included, and of the host's padding mask where there is one."""
        mask = 0 if self.padding is None else self.padding.untyped_storage().nbytes()
        return mask + sum(x.numel() * x.element_size() for x in (self.keys, self.values) if x is not None)

    def positions(self) -> Tensor:
        """``[B, G, seen]``."""
        if self.keys is None:
            raise StateError("the cache is empty")
        b, g = self.keys.shape[:2]
        if self.padding is None:
            row = torch.arange(self.seen, device=self.keys.device).expand(b, -1)
        else:
            row = (self.padding.long().cumsum(-1) - 1).masked_fill(~self.padding, -1)
        return row[:, None].expand(b, g, -1)

    def tensors(self) -> dict[str, Tensor]:
        """Keys and values of the tokens seen, and the padding mask."""
        if self.keys is None or self.values is None:
            return {}
        keys, values = (
            x[:, :, : self.seen].clone(memory_format=torch.contiguous_format) for x in (self.keys, self.values)
        )
        out = {"keys": keys, "values": values}
        return out if self.padding is None else out | {"padding": self.padding}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """See `LayerCache.restore`."""
        self.reset()
        if tensors:
            self.keys, self.values = tensors["keys"].clone(), tensors["values"].clone()
            self.padding = real = tensors.get("padding")
            self.left_padded = real is None or bool((real[:, 1:] | ~real[:, :-1]).all())
            self.seen = self.keys.shape[2]
