r"""The latent and the rotated shared key of every token, never its heads' keys and values: the memory of an MLA layer.

    stored    x_s = [c_s | k_s],   c_s in R^r (latent),  k_s in R^p (rotary key, one for all heads)
    absorbed  score = scale (W_UK^T q_nope . c_s + q_rope . k_s),   out = W_UV sum_s p_s c_s

Few queries read the stored rows as they are (one key head of width r + p serves all query heads); many queries expand the
rows to heads first, which then costs less. Both are the same map.

Axes: B batch, H query heads, G expanded key/value heads, N queries, S stored rows, D key width, E value width.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Protocol, final

import torch
from torch import Tensor

from qkv.caches._stores.dense import Columns, grown, resized
from qkv.core.attend import causal_mask, sdpa
from qkv.core.cache import Now, Step
from qkv.core.errors import StateError
from qkv.core.kernel import kernel, served


class Up(Protocol):
    """The up-projections of an MLA layer, as its memory needs them."""

    def absorb(self, q: Tensor) -> Tensor:
        """Queries ``[B, H, N, D]`` against latents: ``[B, H, N, r + p]``."""
        ...

    def lift(self, out: Tensor) -> Tensor:
        """Mixed latents ``[B, H, N, r]`` to head outputs ``[B, H, N, E]``."""
        ...

    def expand(self, latent: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        """Latents ``[B, 1, S, r]`` and rotary keys ``[B, 1, S, p]`` to keys ``[B, G, S, D]`` and values ``[B, G, S, E]``."""
        ...

    def expands(self, queries: int) -> bool:
        """Whether expanding every row is cheaper than absorbing, for this many new queries."""
        ...


def absorbed(
    q: Tensor, rows: Tensor, rank: int, up: Up, *, mask: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    """Attention of q ``[B, H, N, D]`` to `rows` ``[B, 1, S, r + p]`` without expanding them -> ``[B, H, N, E]``.

    mask: bool, broadcastable to ``[B, H, N, S]``. Heads and queries share one axis, so that no row is repeated per head.
    """
    b, h, n, _ = q.shape
    s = rows.shape[2]
    wide = up.absorb(q)  # [B, H, N, r + p]
    if causal and n > 1:
        past = causal_mask(n, s, q.device)[None, None]
        mask = past if mask is None else mask & past
    if mask is not None:
        mask = mask.expand(mask.shape[0], h, n, s).reshape(mask.shape[0], 1, h * n, s)
    # Whole rows as values, cut afterwards: torch's fused kernels want one width, and the rows are read once either way.
    out = sdpa(wide.reshape(b, 1, h * n, -1), rows, rows, mask=mask, scale=scale)[..., :rank]
    return up.lift(out.reshape(b, h, n, rank))


@lru_cache
def _tile(device: torch.device, size: int, heads: int, width: int, rank: int) -> tuple[int, int] | None:
    """Block and stages of the decoding kernel for rows of `width` elements of `size` bytes, or None where none fits.

    The output tile (all heads by the latent) must fit into registers, queries and rows into shared memory.
    """
    rows, wide, out = (max(16, 1 << (x - 1).bit_length()) for x in (heads, width, rank))
    room = 0.9 * torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    for block, stages in ((64, 3), (64, 2), (32, 2), (32, 1), (16, 1)):
        if rows * out <= 1 << 14 and size * (stages * block * (wide + out) + rows * wide) <= room:
            return block, stages
    return None


@final
class LatentCache(Columns):
    """Rows ``[B, 1, capacity, r + p]``; the slot of a token is its logical column. Grows by a small share.

    up: the layer's projections (shared with the layer, also by copies of this memory). full_width: numbers a token that the
    keys and values would take which this memory stands for.
    """

    def __init__(self, up: Up, full_width: int) -> None:
        self.up, self.full_width = up, full_width
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.rows: Tensor | None = None
        self.padding = None
        self.left_padded = True
        self.tile: tuple[int, int] | None = None  # of the decoding kernel, where it runs
        self.rank = self.room = self.seen = 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """Absorb and attend. q: ``[B, H, N, D]``; k: latents ``[B, 1, N, r]``; v: rotated keys ``[B, 1, N, p]``.

        The first block attends to the live tensors, so gradients flow through it. An attention other than the exact one
        (`Step.compute`) gets the expanded keys and values.
        """
        first, n = self.seen == 0, q.shape[2]
        if step.padding is not None and n > 1:
            self.left_padded = bool((step.padding[:, 1:] | ~step.padding[:, :-1]).all())
        live = torch.cat((k, v), dim=-1)
        rows = self._append(live, k.shape[-1])
        rows = live if first else rows
        self.padding = step.padding
        self.tile = _tile(q.device, q.element_size(), q.shape[1], live.shape[-1], self.rank) if served(q) else None
        if self.tile is not None and n == 1 and step.compute is None and step.mask is None and self.left_padded:
            length = torch.full((1,), self.seen, dtype=torch.int32, device=q.device)
            start = None if step.padding is None else (~step.padding).sum(-1, dtype=torch.int32)
            return self._read(q, length, start, step.scale)
        mask = None if step.padding is None else step.padding[:, None, None, :]
        if step.mask is not None:
            mask = step.mask if mask is None else mask & step.mask
        causal = step.causal and step.mask is None
        if step.compute is None and not self.up.expands(n):
            return absorbed(q, rows, self.rank, self.up, mask=mask, causal=causal, scale=step.scale)
        keys, values = self.up.expand(rows[..., : self.rank], rows[..., self.rank :])
        return (step.compute or sdpa)(q, keys, values, mask=mask, causal=causal, scale=step.scale)

    def _append(self, new: Tensor, rank: int) -> Tensor:
        total = self.seen + new.shape[2]
        if self.rows is None:
            rows, self.rank = new.new_empty((new.shape[0], 1, max(total, self.room), new.shape[3])), rank
        else:
            capacity = grown(self.rows.shape[2], total)
            rows = self.rows if capacity == self.rows.shape[2] else resized(self.rows, capacity, self.seen)
        rows[:, :, self.seen : total] = new.detach()
        self.rows, self.seen = rows, total
        return rows[:, :, :total]

    # -- static decoding ------------------------------------------------------------------------------------------

    def _read(self, q: Tensor, length: Tensor, start: Tensor | None, scale: float) -> Tensor:
        """One token over the rows by the decoding kernel, absorbed; the same eagerly and in a captured step."""
        assert self.rows is not None and self.tile is not None
        rows, (block, stages) = self.rows, self.tile
        out, _ = kernel("decode:decode_attention")(
            self.up.absorb(q),
            rows,
            rows[..., : self.rank],
            length=length,
            start=start,
            scale=scale,
            block=block,
            stages=stages,
        )
        return self.up.lift(out)

    def static(self) -> bool:
        """Where the decoding kernel runs, with room for the token, and padding (if any) on the left."""
        ready = self.tile is not None and self.left_padded
        return ready and self.rows is not None and self.seen < self.rows.shape[2]

    def step(self, q: Tensor, k: Tensor, v: Tensor, scale: float, now: Now) -> Tensor:
        """See `LayerCache.step`; arguments as in `attend`."""
        assert self.rows is not None
        self.rows.index_copy_(2, now.cursor, torch.cat((k, v), dim=-1))
        self.seen += 1
        return self._read(q, now.length, now.start, scale)

    def buffers(self) -> tuple[Tensor, ...]:
        """The rows."""
        return () if self.rows is None else (self.rows,)

    # -- the rest of the contract ---------------------------------------------------------------------------------

    def select(self, rows: Tensor) -> None:
        """See `LayerCache.select`."""
        for name in ("rows", "padding"):
            x = getattr(self, name)
            if x is not None:
                setattr(self, name, x.index_select(0, rows.to(x.device)))

    def bytes(self) -> int:
        """Bytes of the buffer, unused capacity included."""
        return 0 if self.rows is None else self.rows.numel() * self.rows.element_size()

    def full_bytes(self, k: Tensor, v: Tensor) -> int:
        """See `LayerCache.full_bytes`."""
        return k.shape[0] * self.seen * self.full_width * k.element_size()

    def positions(self) -> Tensor:
        """``[B, 1, seen]``."""
        if self.rows is None:
            raise StateError("the cache is empty")
        b = self.rows.shape[0]
        if self.padding is None:
            row = torch.arange(self.seen, device=self.rows.device).expand(b, -1)
        else:
            row = (self.padding.long().cumsum(-1) - 1).masked_fill(~self.padding, -1)
        return row[:, None]

    def tensors(self) -> dict[str, Tensor]:
        """Latents ``[B, 1, S, r]`` and rotated keys ``[B, 1, S, p]`` of the tokens seen, and the padding mask."""
        if self.rows is None:
            return {}
        rows = self.rows[:, :, : self.seen]
        out = {"latent": rows[..., : self.rank].contiguous(), "rope": rows[..., self.rank :].contiguous()}
        return out if self.padding is None else out | {"padding": self.padding}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """See `LayerCache.restore`."""
        self.reset()
        if tensors:
            self.rows = torch.cat((tensors["latent"], tensors["rope"]), dim=-1)
            self.rank, self.seen = tensors["latent"].shape[-1], tensors["latent"].shape[2]
            self.padding = tensors.get("padding")

    def __deepcopy__(self, memo: dict[int, Any]) -> LatentCache:
        """Rows of its own, the same layer."""
        twin = LatentCache(self.up, self.full_width)
        memo[id(self)] = twin
        twin.rows = None if self.rows is None else self.rows.clone()
        twin.padding, twin.left_padded, twin.tile = self.padding, self.left_padded, self.tile
        twin.rank, twin.room, twin.seen = self.rank, self.room, self.seen
        return twin
