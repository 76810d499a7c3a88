"""One layer, several memories: groups of KV heads (with their query heads) that keep different tokens, each in its own store.

Nothing is masked to simulate a shorter head: what a group drops is freed. Groups may be any sets of KV heads; evenly spaced
ones are read as views.

Axes: B batch, H query heads, G key/value heads, R = H / G, N new queries, S stored slots, D head width, E value width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.caches._stores.recording import Recording
from qkv.core.cache import Board, Compute, Geometry, LayerCache, Now, Step
from qkv.core.errors import InvalidParameter, Refused, StateError

Make = Callable[[Geometry], LayerCache]


def split(geometry: Geometry, parts: Sequence[tuple[Sequence[int], Make]], who: str) -> LayerCache:
    """A memory in which each set of KV heads has a memory of its own; where one set holds all heads, that memory itself.

    parts: pairs of KV heads and what makes their memory from a geometry of as many heads; empty sets are left out. who: the
    method's id, for messages. Raises `InvalidParameter` unless every head is in exactly one set.
    """
    named = sorted(h for heads, _ in parts for h in heads)
    if named != list(range(geometry.kv_heads)):
        raise InvalidParameter(
            f"{who}: the groups name the KV heads {named}; this layer has {geometry.kv_heads}, each once"
        )
    group = geometry.heads // geometry.kv_heads
    made = []
    for heads, make in parts:
        if heads:
            mine = tuple(sorted(heads))
            slopes = geometry.slopes and tuple(geometry.slopes[h * group + r] for h in mine for r in range(group))
            part = replace(geometry, heads=group * len(mine), kv_heads=len(mine), slopes=slopes)
            made.append((mine, make(part)))
    return made[0][1] if len(made) == 1 else SplitCache(geometry, made, who)


@dataclass
class _Part:
    """KV heads and their memory. at: the heads as a slice, where they are evenly spaced; index: else, on the device."""

    heads: tuple[int, ...]
    memory: LayerCache
    at: slice | None
    index: Tensor | None = None

    def take(self, x: Tensor) -> Tensor:
        """The part's heads of `x` ``[B, G, ...]``; a view where they are evenly spaced."""
        if self.at is not None:
            return x[:, self.at]
        assert self.index is not None
        return x.index_select(1, self.index)

    def put(self, x: Tensor, part: Tensor) -> None:
        """Write the part's heads into `x` ``[B, G, ...]``."""
        if self.at is not None:
            x[:, self.at] = part
        else:
            assert self.index is not None
            x.index_copy_(1, self.index, part)


def _evenly(heads: Sequence[int]) -> slice | None:
    gaps = {b - a for a, b in itertools.pairwise(heads)} or {1}
    return slice(heads[0], heads[-1] + 1, gaps.pop()) if len(gaps) == 1 else None


@final
class SplitCache(LayerCache):
    """See the module. Built by `split`; a custom attention (`Step.compute`) sees all heads, those of other groups as zeros."""

    def __init__(self, geometry: Geometry, parts: Sequence[tuple[tuple[int, ...], LayerCache]], who: str) -> None:
        self.geometry, self.who = geometry, who
        self.group = geometry.heads // geometry.kv_heads
        self.parts = [_Part(heads, memory, _evenly(heads)) for heads, memory in parts]
        self.seen = 0

    @property
    def _memories(self) -> list[LayerCache]:
        return [p.memory for p in self.parts]

    # -- one call ---------------------------------------------------------------------------------------------

    def attend(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """See `LayerCache.attend`."""
        if step.mask is not None:
            raise Refused(
                f"{self.who}: a custom 4-D or packed-sequence mask names columns that some heads may have evicted; pass a 2-D "
                "attention_mask"
            )
        if not step.causal:
            raise Refused(f"{self.who}: heads that keep different tokens serve causal attention only")
        self._index(k.device)

        def run(part: _Part, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            mine = step if step.compute is None else replace(step, compute=self._whole(part, step.compute))
            return part.memory.attend(q, k, v, mine)

        return self._each(q, k, v, run)

    def step(self, q: Tensor, k: Tensor, v: Tensor, scale: float, now: Now) -> Tensor:
        """See `LayerCache.step`."""
        return self._each(q, k, v, lambda part, q, k, v: part.memory.step(q, k, v, scale, now))

    def _each(self, q: Tensor, k: Tensor, v: Tensor, run: Callable[[_Part, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """Every part on its own heads; the outputs side by side."""
        b, h, n, _ = q.shape
        grouped = q.unflatten(1, (-1, self.group))  # [B, G, R, N, D]
        out: Tensor | None = None
        for part in self.parts:
            got = run(part, part.take(grouped).flatten(1, 2), part.take(k), part.take(v))
            if out is None:
                out = got.new_empty(b, h // self.group, self.group, n, got.shape[-1])
            part.put(out, got.unflatten(1, (-1, self.group)))
        assert out is not None
        self.seen = self.parts[0].memory.seen
        return out.flatten(1, 2)

    def _index(self, device: torch.device) -> None:
        for part in self.parts:
            if part.at is None and (part.index is None or part.index.device != device):
                part.index = torch.tensor(part.heads, device=device)

    def _whole(self, part: _Part, compute: Compute) -> Compute:
        """`compute`, which knows heads by their number, for the heads of one part."""
        heads, group = self.geometry.kv_heads, self.group

        def spread(x: Tensor, fill: float = 0) -> Tensor:
            full = x.new_full((x.shape[0], heads, *x.shape[2:]), fill)
            part.put(full, x)
            return full

        def run(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
            if mask is not None and mask.shape[1] != 1:
                if mask.shape[1] == len(part.heads) and group > 1:
                    mask = mask.repeat_interleave(group, 1)
                mask = spread(mask.unflatten(1, (-1, group)), True).flatten(1, 2)
            wide = spread(q.unflatten(1, (-1, group))).flatten(1, 2)
            out = compute(wide, spread(k), spread(v), mask=mask, causal=causal, scale=scale)
            return part.take(out.unflatten(1, (-1, group))).flatten(1, 2)

        return run

    # -- the rest of the contract: pass it on -----------------------------------------------------------------

    def join(self, board: Board) -> None:
        """See `LayerCache.join`."""
        self.board = board
        for memory in self._memories:
            memory.join(board)

    def record(self) -> None:
        """See `LayerCache.record`."""
        for memory in self._memories:
            memory.record()

    def announce(self, prompt: int) -> None:
        """See `LayerCache.announce`."""
        for memory in self._memories:
            memory.announce(prompt)

    def reserve(self, tokens: int) -> None:
        """See `LayerCache.reserve`."""
        for memory in self._memories:
            memory.reserve(tokens)

    def crop(self, tokens: int) -> None:
        """Forget the newest `tokens` in every part, or raise `StateError` before any part has forgotten one."""
        if tokens > self.seen:
            raise StateError(f"cannot forget {tokens} tokens of a cache that holds {self.seen}")
        for memory in sorted(self._memories, key=lambda m: not isinstance(m, Recording)):  # those that may refuse first
            memory.crop(tokens)
        self.seen = self.parts[0].memory.seen

    def select(self, rows: Tensor) -> None:
        """See `LayerCache.select`."""
        for memory in self._memories:
            memory.select(rows)

    def bytes(self) -> int:
        """The bytes of the parts, and of the head numbers kept on the device."""
        held = sum(p.index.numel() * p.index.element_size() for p in self.parts if p.index is not None)
        return held + sum(memory.bytes() for memory in self._memories)

    def resident(self) -> int:
        """Those of `bytes` that lie with the model."""
        held = sum(p.index.numel() * p.index.element_size() for p in self.parts if p.index is not None)
        return held + sum(memory.resident() for memory in self._memories)

    def kept(self) -> int:
        """The most that any part keeps."""
        return max(memory.kept() for memory in self._memories)

    def positions(self) -> Tensor:
        """``[B, G, S]``, S the longest part's; shorter ones are filled up with -1 in front."""
        stored = [memory.positions() for memory in self._memories]
        most = max(x.shape[2] for x in stored)
        out = stored[0].new_full((stored[0].shape[0], self.geometry.kv_heads, most), -1)
        for part, x in zip(self.parts, stored, strict=True):
            out[:, list(part.heads)] = F.pad(x, (most - x.shape[2], 0), value=-1).to(out.dtype)
        return out

    def tensors(self) -> dict[str, Tensor]:
        """Those of the parts, each name with the number of its part before it."""
        return {f"{i}.{name}": x for i, memory in enumerate(self._memories) for name, x in memory.tensors().items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """See `LayerCache.restore`. Raises `StateError` for tensors of another split."""
        self.reset()
        mine: list[dict[str, Tensor]] = [{} for _ in self.parts]
        for name, x in tensors.items():
            number, _, rest = name.partition(".")
            if not number.isdecimal() or int(number) >= len(mine):
                raise StateError(f"{self.who}: {name!r} belongs to no part of a cache of {len(mine)} parts")
            mine[int(number)][rest] = x
        for part, held in zip(self.parts, mine, strict=True):
            keys = held.get("keys")
            if keys is not None and keys.ndim == 4 and keys.shape[1] != len(part.heads):
                raise StateError(
                    f"{self.who}: saved with {keys.shape[1]} KV heads in a part that has {len(part.heads)} here"
                )
            part.memory.restore(held)
        self.seen = self.parts[0].memory.seen

    def reset(self) -> None:
        """Forget everything."""
        for part in self.parts:
            part.index = None
            part.memory.reset()
        self.seen = 0

    def static(self) -> bool:
        """Once every part is."""
        return all(memory.static() for memory in self._memories)

    def buffers(self) -> tuple[Tensor, ...]:
        """Those of the parts."""
        own = tuple(p.index for p in self.parts if p.index is not None)
        return own + tuple(x for memory in self._memories for x in memory.buffers())

    def counters(self) -> dict[str, Any]:
        """See `LayerCache.counters`."""
        return {"seen": self.seen, "parts": [memory.counters() for memory in self._memories]}

    def recount(self, counters: dict[str, Any]) -> None:
        """See `LayerCache.recount`."""
        self.seen = counters["seen"]
        for memory, mine in zip(self._memories, counters["parts"], strict=True):
            memory.recount(mine)

    def advance(self) -> None:
        """See `LayerCache.advance`."""
        for memory in self._memories:
            memory.advance()
        self.seen = self.parts[0].memory.seen
