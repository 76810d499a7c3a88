r"""Decode attention over segments: every (row, KV head) has a length of its own in one flat store of keys and values.

    out_h = sum over slots j of its head's segment with position >= 0 of softmax_j(scale q_h . k_j) v_j

The work list cuts segments into tiles of about equal size, one program each, so that a long head does not keep the device
waiting; tiles are merged by log-sum-exp. It depends on capacities alone: the call can be captured in a CUDA graph. Bound: bytes
of all segments.

Axes: B batch, H query heads, G key/value heads, R = H / G, S the longest capacity, T slots in all, D head width, E value width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkv.core.errors import InvalidInput
from qkv.kernels.widths import tiled

LOG2E = 1.4426950408889634


@triton.jit
def _tile(
    q_ptr, k_ptr, v_ptr, position_ptr, base_ptr, pair_ptr, low_ptr, high_ptr, part_ptr, lse_ptr,
    scale2, R, S, D, E,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    """One tile of one segment: partial out [R, E] and its lse (base 2)."""
    tile = tl.program_id(0)
    pair = tl.load(pair_ptr + tile)
    low, high = tl.load(low_ptr + tile), tl.load(high_ptr + tile)
    base = tl.load(base_ptr + pair)
    r, d, e, c = tl.arange(0, ROWS), tl.arange(0, DP), tl.arange(0, EP), tl.arange(0, BLOCK)
    q_at = q_ptr + (pair.to(tl.int64) * R + r)[:, None] * D + d[None, :]
    q = tl.load(q_at, mask=(r < R)[:, None] & (d < D)[None, :], other=0.0)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, EP), tl.float32)
    for at in range(low, high, BLOCK):
        j = at + c
        live = j < high
        place = tl.load(position_ptr + pair.to(tl.int64) * S + j, mask=live, other=-1)
        live = live & (place >= 0)
        row = base + j
        k = tl.load(k_ptr + row[None, :] * D + d[:, None], mask=live[None, :] & (d < D)[:, None], other=0.0)
        s = tl.dot(q, k, input_precision="ieee") * scale2
        s = tl.where(live[None, :], s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        anchor = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(s - anchor[:, None])
        fade = tl.exp2(top - anchor)
        v = tl.load(v_ptr + row[:, None] * E + e[None, :], mask=live[:, None] & (e < E)[None, :], other=0.0)
        total = total * fade + tl.sum(p, 1)
        out = out * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = new
    safe = tl.where(total > 0, total, 1.0)
    lse = tl.where(total > 0, top + tl.log2(safe), float("-inf"))
    at_part = tile.to(tl.int64) * R + r
    tl.store(
        part_ptr + at_part[:, None] * E + e[None, :], out / safe[:, None], mask=(r < R)[:, None] & (e < E)[None, :]
    )
    tl.store(lse_ptr + at_part, lse, mask=r < R)


@triton.jit
def _merge(part_ptr, lse_ptr, first_ptr, out_ptr, out_lse_ptr, R, E, TP: tl.constexpr, EP: tl.constexpr):
    """Merge the tiles of one query head."""
    head = tl.program_id(0)
    pair, r = head // R, head % R
    first, last = tl.load(first_ptr + pair), tl.load(first_ptr + pair + 1)
    t, e = first + tl.arange(0, TP), tl.arange(0, EP)
    row = t.to(tl.int64) * R + r
    lse = tl.load(lse_ptr + row, mask=t < last, other=float("-inf"))
    top = tl.max(lse, 0)
    anchor = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp2(lse - anchor)
    total = tl.sum(weight, 0)
    part = tl.load(part_ptr + row[:, None] * E + e[None, :], mask=(t < last)[:, None] & (e < E)[None, :], other=0.0)
    safe = tl.where(total > 0, total, 1.0)
    out = tl.sum(part * weight[:, None], 0) / safe
    tl.store(out_ptr + head.to(tl.int64) * E + e, out.to(out_ptr.dtype.element_ty), mask=e < E)
    tl.store(out_lse_ptr + head, tl.where(total > 0, anchor + tl.log2(safe), float("-inf")))


@triton.jit
def _mass(
    q_ptr, k_ptr, position_ptr, base_ptr, pair_ptr, low_ptr, high_ptr, lse_ptr, mass_ptr,
    scale2, R, S, D,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Attention that the slots of one tile draw from the query heads of their group; lse in base 2."""
    tile = tl.program_id(0)
    pair = tl.load(pair_ptr + tile)
    low, high = tl.load(low_ptr + tile), tl.load(high_ptr + tile)
    base = tl.load(base_ptr + pair)
    r, d, c = tl.arange(0, ROWS), tl.arange(0, DP), tl.arange(0, BLOCK)
    head = pair.to(tl.int64) * R + r
    q = tl.load(q_ptr + head[:, None] * D + d[None, :], mask=(r < R)[:, None] & (d < D)[None, :], other=0.0)
    lse = tl.load(lse_ptr + head, mask=r < R, other=0.0)
    for at in range(low, high, BLOCK):
        j = at + c
        live = j < high
        place = tl.load(position_ptr + pair.to(tl.int64) * S + j, mask=live, other=-1)
        k = tl.load(k_ptr + (base + j)[None, :] * D + d[:, None], mask=live[None, :] & (d < D)[:, None], other=0.0)
        p = tl.exp2(tl.dot(q, k, input_precision="ieee") * scale2 - lse[:, None])
        p = tl.where((live & (place >= 0))[None, :], p, 0.0)
        tl.store(mass_ptr + head[:, None] * S + j[None, :], p, mask=(r < R)[:, None] & live[None, :])


class Tiles(NamedTuple):
    """How segments are cut: pair, low, high of every tile, the first tile of every pair (int32); most tiles of any pair."""

    pair: Tensor
    low: Tensor
    high: Tensor
    first: Tensor
    most: int


def work_list(caps: list[list[int]], device: torch.device, tile: int | None = None) -> Tiles:
    """The tiles of segments of capacities ``[B][G]``.

    tile: slots of a tile, default: so that there are some hundred tiles, and at most 128 of a segment.
    """
    flat = [c for row in caps for c in row]
    if tile is None:
        tile = max(64, *(triton.next_power_of_2(max(1, x)) for x in (sum(flat) // 512, triton.cdiv(max(flat), 128))))
    pairs, lows, highs, first = [], [], [], [0]
    for pair, cap in enumerate(flat):
        for low in range(0, cap, tile):
            pairs.append(pair)
            lows.append(low)
            highs.append(min(cap, low + tile))
        first.append(len(pairs))
    lists = (torch.tensor(x, dtype=torch.int32, device=device) for x in (pairs, lows, highs, first))
    return Tiles(*lists, most=triton.cdiv(max(flat), tile))


def ragged_decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    base: Tensor,
    tiles: Tiles,
    *,
    scale: float,
    mass: bool = False,
    block: int = 64,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one token per row over segments, and the attention that every slot draws.

    q ``[B, H, 1, D]``; keys ``[T, D]``, values ``[T, E]`` contiguous; position int32 ``[B, G, S]``, slots below 0 are skipped;
    base int64 ``[B, G]``, the first slot of each segment; tiles: see `work_list`. Returns out ``[B, H, 1, E]`` and, where asked
    for, mass float32 ``[B, H, S]`` (0 outside a segment). Raises `InvalidInput`.
    """
    b, h, n, d = q.shape
    g, s = position.shape[1:]
    if n != 1 or h % g or position.shape[0] != b or keys.shape != (values.shape[0], d) or tuple(base.shape) != (b, g):
        raise InvalidInput(
            f"ragged_decode: q {tuple(q.shape)}, keys {tuple(keys.shape)}, values {tuple(values.shape)}, position "
            f"{tuple(position.shape)} and base {tuple(base.shape)} do not fit one token per row"
        )
    if not (keys.is_contiguous() and values.is_contiguous() and position.is_contiguous()):
        raise InvalidInput("ragged_decode: keys, values and position must be contiguous")
    pair, low, high, first, most = tiles
    r, e, count = h // g, values.shape[1], pair.shape[0]
    q = q.contiguous()
    part = torch.empty(count * r * e, dtype=torch.float32, device=q.device)
    lse = torch.empty(count * r, dtype=torch.float32, device=q.device)
    out = torch.empty(b, h, 1, e, dtype=q.dtype, device=q.device)
    out_lse = torch.empty(b * h, dtype=torch.float32, device=q.device)
    (wide_d, wide_e), rows = tiled(d, e, dtype=q.dtype), max(16, triton.next_power_of_2(r))
    _tile[(count,)](
        q, keys, values, position, base, pair, low, high, part, lse, scale * LOG2E, r, s, d, e,
        ROWS=rows, BLOCK=block, DP=wide_d, EP=wide_e, num_warps=4,
    )  # fmt: skip
    _merge[(b * h,)](part, lse, first, out, out_lse, r, e, TP=triton.next_power_of_2(most), EP=wide_e, num_warps=4)
    if not mass:
        return out, None
    drawn = torch.zeros(b, h, s, dtype=torch.float32, device=q.device)
    _mass[(count,)](
        q, keys, position, base, pair, low, high, out_lse, drawn, scale * LOG2E, r, s, d,
        ROWS=rows, BLOCK=block, DP=wide_d, num_warps=4,
    )  # fmt: skip
    return out, drawn


__all__ = ["Tiles", "ragged_decode", "work_list"]
