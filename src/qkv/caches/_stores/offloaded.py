"""The whole history outside the model's device, exactly: in host memory or in a file, brought in one layer ahead of its use.

The slot of a token is its logical column. On a GPU a layer's history comes into a buffer on the device while the layer before
it computes (its own stream), the new tokens are added to both, the layer attends to the buffer, and the buffer is given up when
the next layer has been served: two layers' histories are on the device at most. On the CPU nothing is copied: host memory is
read where it is, a file through its mapping, which the operating system is asked to read ahead.

Axes: B batch, H query heads, G key/value heads, N new queries, S stored columns, D head width, E value width.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from qkv.caches._stores.tiered import Shelf
from qkv.core.attend import sdpa
from qkv.core.cache import Board, Geometry, LayerCache, Step
from qkv.core.errors import StateError

NOTE = "offload"


@final
class OffloadedCache(LayerCache):
    """Keys ``[B, G, capacity, D]`` and values ``[B, G, capacity, E]`` on shelves; see the module."""

    def __init__(self, geometry: Geometry, folder: str | Path | None = None) -> None:
        self.geometry, self.folder = geometry, folder
        self.reset()

    def __deepcopy__(self, memo: dict[int, Any]) -> OffloadedCache:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        fresh = {"geometry": self.geometry, "folder": self.folder, "ahead": None, "arrived": None, "stream": None}
        vars(twin).update(fresh)
        rest = {name: x for name, x in vars(self).items() if name not in fresh}
        vars(twin).update(copy.deepcopy(rest, memo))
        return twin

    def reset(self) -> None:
        """Forget everything; files are removed."""
        label = f"offload, layer {self.geometry.layer}"
        self.keys, self.values = Shelf(self.folder, label), Shelf(self.folder, label)
        self.gaps: Tensor | None = None  # bool [B, seen] real tokens, where some are padding
        self.ahead: tuple[Tensor, Tensor] | None = None  # [B, G, > seen, .] on the device
        self.arrived: Any = None  # when they are there
        self.stream: Any = None
        self.room = 0
        self.seen = 0

    def join(self, board: Board) -> None:
        """See `LayerCache.join`: the layers learn of each other."""
        self.board = board
        board.notes.setdefault(NOTE, {})[self.geometry.layer] = self

    # -- one call ---------------------------------------------------------------------------------------------

    def attend(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """See `LayerCache.attend`. The first block attends to the live tensors, so gradients flow through it."""
        first = self.seen == 0
        near = (k, v) if first else self._near(k, v)
        self._pass_on(q.device)
        real = step.padding
        mask = None if real is None else real[:, None, None, :]
        if step.mask is not None:
            mask = step.mask if mask is None else mask & step.mask
        causal = step.causal and step.mask is None
        out = (step.compute or sdpa)(q, *near, mask=mask, causal=causal, scale=step.scale)
        self._append(k, v)
        if self.board is None:
            self.ahead = None
        self.gaps = None if real is None else real.clone()
        return out

    def _near(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all columns, the new ones included, where the model is."""
        old, total = self.seen, self.seen + k.shape[2]
        if not k.is_cuda:
            keys = self.keys.room(k, max(total, self.room), old), self.values.room(v, max(total, self.room), old)
            out = []
            for x, new in zip(keys, (k, v), strict=True):
                x[:, :, old:total] = new.detach()
                out.append(x[:, :, :total])
            return out[0], out[1]
        if self.ahead is None or self.ahead[0].shape[2] < total:
            self.ahead = None
            self.prefetch(k.device, total)
        assert self.ahead is not None
        torch.cuda.current_stream(k.device).wait_event(self.arrived)
        for x, new in zip(self.ahead, (k, v), strict=True):
            x[:, :, old:total] = new.detach()
            x.record_stream(torch.cuda.current_stream(k.device))
        return self.ahead[0][:, :, :total], self.ahead[1][:, :, :total]

    def prefetch(self, device: torch.device, room: int | None = None) -> None:
        """Bring the history to the device, with room for some columns more, without waiting for it."""
        if device.type != "cuda":
            self.keys.advise()
            self.values.advise()
            return
        if self.ahead is not None or not self.seen:
            return
        self.stream = torch.cuda.Stream(device) if self.stream is None else self.stream
        size = max(self.seen + 1, room or 0)
        with torch.cuda.stream(self.stream):
            ahead = []
            for shelf in (self.keys, self.values):
                x = shelf.room(
                    shelf.look(), size, self.seen
                )  # whole shelves are contiguous: one asynchronous copy each
                ahead.append(torch.empty_like(x, device=device, pin_memory=False).copy_(x, non_blocking=True))
            self.arrived = self.stream.record_event()
        self.ahead = (ahead[0], ahead[1])

    def _append(self, k: Tensor, v: Tensor) -> None:
        """Put the new tokens onto the shelves."""
        old, total = self.seen, self.seen + k.shape[2]
        if not k.is_cuda and old:  # they are there already
            self.seen = total
            return
        for shelf, x in ((self.keys, k), (self.values, v)):
            host = x.detach().cpu()
            shelf.room(host, max(total, self.room), old, pin=x.is_cuda)[:, :, old:total] = host
        self.seen = total

    def _pass_on(self, device: torch.device) -> None:
        """Fetch the next layer's history, and give up that of the layer before."""
        others = {} if self.board is None else self.board.notes.get(NOTE, {})
        if len(others) < 2:
            return
        order = sorted(others)
        place = order.index(self.geometry.layer)
        others[order[place - 1]].ahead = None
        others[order[(place + 1) % len(order)]].prefetch(device)

    def _staged(self) -> list[OffloadedCache]:
        """The layers whose copies on the device this layer answers for: all, if it is the last of several, else none."""
        others = {} if self.board is None else self.board.notes.get(NOTE, {})
        if len(others) < 2:
            return [self]
        return list(others.values()) if self.geometry.layer == max(others) else []

    def reserve(self, tokens: int) -> None:
        """See `LayerCache.reserve`."""
        self.room = tokens

    # -- the rest of the contract -----------------------------------------------------------------------------

    def crop(self, tokens: int) -> None:
        """Forget the newest `tokens`; nothing is copied."""
        if tokens > self.seen:
            raise StateError(f"cannot forget {tokens} tokens of a cache that holds {self.seen}")
        self.seen -= tokens
        if self.gaps is not None:
            self.gaps = self.gaps[:, : self.seen].clone()

    def select(self, rows: Tensor) -> None:
        """See `LayerCache.select`."""
        self.ahead = None
        self.keys.select(rows)
        self.values.select(rows)
        self.gaps = None if self.gaps is None else self.gaps.index_select(0, rows.to(self.gaps.device))

    def bytes(self) -> int:
        """Bytes of the host's tensors or files, spare capacity included, and `resident`."""
        mask = 0 if self.gaps is None else self.gaps.untyped_storage().nbytes()
        return self.keys.bytes() + self.values.bytes() + self.resident() + mask

    def resident(self) -> int:
        """Bytes of the copies on the device; 0 on a CPU model.

        They pass from layer to layer, so the last layer counts them all: a sum over the layers, each asked at the end of its
        call, is what was there when the last one's ended.
        """
        return sum(x.numel() * x.element_size() for layer in self._staged() for x in layer.ahead or ())

    def kept(self) -> int:
        """All tokens seen."""
        return self.seen

    def positions(self) -> Tensor:
        """``[B, G, seen]``."""
        if self.keys.data is None:
            raise StateError("the cache is empty")
        b, g = self.keys.data.shape[:2]
        if self.gaps is None:
            row = torch.arange(self.seen).expand(b, -1)
        else:
            row = (self.gaps.long().cumsum(-1) - 1).masked_fill(~self.gaps, -1)
        return row[:, None].expand(b, g, -1)

    def tensors(self) -> dict[str, Tensor]:
        """Copies of keys and values of the tokens seen, and which of them are real."""
        if self.keys.data is None:
            return {}
        out = {name: getattr(self, name).look()[:, :, : self.seen].clone() for name in ("keys", "values")}
        return out if self.gaps is None else out | {"gaps": self.gaps.clone()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """See `LayerCache.restore`."""
        self.reset()
        if tensors:
            self.keys.fill(tensors["keys"].cpu())
            self.values.fill(tensors["values"].cpu())
            self.gaps = tensors["gaps"].clone() if "gaps" in tensors else None
            self.seen = tensors["keys"].shape[2]
