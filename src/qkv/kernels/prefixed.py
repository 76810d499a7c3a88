r"""Decode attention over runs of tokens that several rows share, then each row's own tokens: one pass, one merge.

    out_h = sum over slots j of the row's runs and of its own tokens of softmax_j(scale q_h . k_j) v_j

A run is read by a tile of queries: those of all its rows and of a group's heads at once, so its keys cross the memory once per
tile instead of once per row. A work list says which program reads which keys of which run for which rows; programs behind it
read own tokens, split as in `qkv.kernels.decode`. All parts of a query head lie side by side and are merged by log-sum-exp.
The list depends on the runs alone: while they stay, the call can be captured in a CUDA graph. Bound: bytes of every run once,
and of all own tokens.

Axes: B batch, H query heads, G key/value heads, R = H / G, C capacity of own tokens, D head width, E value width, S splits of
own tokens, P most parts of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkv.core.errors import InvalidInput
from qkv.kernels.decode import LOG2E, _span
from qkv.kernels.widths import tiled

_FIELDS = 8  # of an item: addresses of keys and values, capacity, begin, end, first and last reader, which split it is


@triton.jit
def _closed(top, total, out, at, part_ptr, lse_ptr, fits, e, E):
    """Store a part: the rows that `fits` names at `at`; one that saw nothing says so by its lse (base 2) alone."""
    some = total > 0
    safe = tl.where(some, total, 1.0)
    tl.store(lse_ptr + at, tl.where(some, top + tl.log2(safe), float("-inf")), mask=fits)
    tl.store(
        part_ptr + at[:, None] * E + e[None, :], out / safe[:, None], mask=(fits & some)[:, None] & (e < E)[None, :]
    )


@triton.jit
def _shared(
    program, q_ptr, k_ptr, v_ptr, place_ptr, items_ptr, readers_ptr, part_ptr, lse_ptr, scale2, most, G, R, D, E,
    EVEN: tl.constexpr, FIELDS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    """An item of the work list at one KV head: some keys of a run for some of its rows."""
    g = program % G
    item = items_ptr + (program // G) * FIELDS
    start = g * tl.load(item + 2)
    # Without a hint an address from a table is loaded from by single elements; it counts where D and E are multiples of 16.
    keys = tl.multiple_of(tl.load(item).to(k_ptr.dtype) + start * D, 16)
    values = tl.multiple_of(tl.load(item + 1).to(v_ptr.dtype) + start * E, 16)
    low, high = tl.load(item + 3).to(tl.int32), tl.load(item + 4).to(tl.int32)
    first, last, split = tl.load(item + 5), tl.load(item + 6), tl.load(item + 7)
    i, d, e = tl.arange(0, ROWS), tl.arange(0, DP), tl.arange(0, EP)
    fits = i < (last - first) * R
    reader = readers_ptr + (first + i // R) * 2
    row, part = tl.load(reader, mask=fits, other=0), tl.load(reader + 1, mask=fits, other=0)
    head = (row * G + g) * R + i % R
    q = tl.load(q_ptr + head[:, None] * D + d[None, :], mask=fits[:, None] & (d < D)[None, :], other=0.0)
    top, total, out = _span(
        q, keys, values, place_ptr, place_ptr, low, high, scale2, R, D, E, D, E, i, d, e, False, False, EVEN, ROWS, BLOCK, EP,
    )  # fmt: skip
    _closed(top, total, out, head * most + part + split, part_ptr, lse_ptr, fits, e, E)


@triton.jit
def _own(
    program, q_ptr, k_ptr, v_ptr, place_ptr, part_ptr, lse_ptr, scale2, length, most, G, R, S, D, E, k_b, k_g, v_b, v_g, p_b,
    HAS_PLACE: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    """One split of a row's own tokens at one KV head."""
    pair, split = program // S, program % S
    b, g = (pair // G).to(tl.int64), (pair % G).to(tl.int64)
    low = split * tl.cdiv(tl.cdiv(length, S), BLOCK) * BLOCK
    high = tl.minimum(low + tl.cdiv(tl.cdiv(length, S), BLOCK) * BLOCK, length)
    i, d, e = tl.arange(0, ROWS), tl.arange(0, DP), tl.arange(0, EP)
    fits = i < R
    head = pair.to(tl.int64) * R + i
    q = tl.load(q_ptr + head[:, None] * D + d[None, :], mask=fits[:, None] & (d < D)[None, :], other=0.0)
    top, total, out = _span(
        q, k_ptr + b * k_b + g * k_g, v_ptr + b * v_b + g * v_g, place_ptr + b * p_b, place_ptr,
        low, high, scale2, R, D, E, D, E, i, d, e, HAS_PLACE, False, EVEN, ROWS, BLOCK, EP,
    )  # fmt: skip
    _closed(top, total, out, head * most + split, part_ptr, lse_ptr, fits, e, E)


@triton.jit(do_not_specialize=["width", "shared", "most", "S", "p_b"])  # what changes while a model decodes
def _parts(
    q_ptr, k_ptr, v_ptr, place_ptr, cursor_ptr, items_ptr, readers_ptr, part_ptr, lse_ptr,
    scale2, width, shared, most, G, R, S, D, E, k_b, k_g, v_b, v_g, p_b,
    HAS_CURSOR: tl.constexpr, HAS_PLACE: tl.constexpr, EVEN: tl.constexpr, FIELDS: tl.constexpr,
    ROWS: tl.constexpr, ROWS_OWN: tl.constexpr, BLOCK: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    """The first `shared` programs read runs, the others own tokens."""
    program = tl.program_id(0)
    if program < shared:
        _shared(
            program, q_ptr, k_ptr, v_ptr, place_ptr, items_ptr, readers_ptr, part_ptr, lse_ptr, scale2, most, G, R, D, E,
            EVEN, FIELDS, ROWS, BLOCK, DP, EP,
        )  # fmt: skip
    else:
        length = width
        if HAS_CURSOR:
            length = (tl.load(cursor_ptr) - width).to(tl.int32) + 1
        _own(
            program - shared, q_ptr, k_ptr, v_ptr, place_ptr, part_ptr, lse_ptr, scale2, length, most, G, R, S, D, E,
            k_b, k_g, v_b, v_g, p_b, HAS_PLACE, EVEN, ROWS_OWN, BLOCK, DP, EP,
        )  # fmt: skip


@triton.jit(do_not_specialize=["most"])
def _join(part_ptr, lse_ptr, count_ptr, out_ptr, most, H, E, SOME: tl.constexpr, EP: tl.constexpr):
    """Merge the parts of one query head, some at a time."""
    head = tl.program_id(0).to(tl.int64)
    count = tl.load(count_ptr + head // H).to(tl.int32)
    s, e = tl.arange(0, SOME), tl.arange(0, EP)
    top = float("-inf")
    total = 0.0
    out = tl.zeros((EP,), tl.float32)
    for at in range(0, count, SOME):
        row = head * most + at + s
        lse = tl.load(lse_ptr + row, mask=at + s < count, other=float("-inf"))
        read = (lse > float("-inf"))[:, None] & (e < E)[None, :]
        part = tl.load(part_ptr + row[:, None] * E + e[None, :], mask=read, other=0.0)
        new = tl.maximum(top, tl.max(lse, 0))
        anchor = tl.where(new == float("-inf"), 0.0, new)
        weight = tl.exp2(lse - anchor)
        fade = tl.exp2(top - anchor)
        total = total * fade + tl.sum(weight, 0)
        out = out * fade + tl.sum(part * weight[:, None], 0)
        top = new
    out = out / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + head * E + e, out.to(out_ptr.dtype.element_ty), mask=e < E)


@triton.jit(do_not_specialize=["width", "place_b", "position_b"])
def _append(
    k_ptr, v_ptr, position_ptr, keys_ptr, values_ptr, place_ptr, cursor_ptr,
    width, G, D, E, keys_b, keys_g, values_b, values_g, place_b, position_b,
    HAS_CURSOR: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    """One (row, KV head): the new token behind the own ones."""
    pair = tl.program_id(0).to(tl.int64)
    b, g = pair // G, pair % G
    at = width
    if HAS_CURSOR:
        at = (tl.load(cursor_ptr) - width).to(tl.int32)
    d, e = tl.arange(0, DP), tl.arange(0, EP)
    k = tl.load(k_ptr + pair * D + d, mask=d < D)
    v = tl.load(v_ptr + pair * E + e, mask=e < E)
    tl.store(keys_ptr + b * keys_b + g * keys_g + at * D + d, k, mask=d < D)
    tl.store(values_ptr + b * values_b + g * values_g + at * E + e, v, mask=e < E)
    if g == 0:
        tl.store(place_ptr + b * place_b + at, tl.load(position_ptr + b * position_b).to(tl.int32))


class Work(NamedTuple):
    """Who reads what, int64 on the device, in one table: items ``[I, 8]``, readers ``[., 2]`` (a row, and its first part of the
    run) and counts ``[B]`` of parts. most: parts of any row. splits: of own tokens. tile: queries of an item.
    """

    table: Tensor
    items: Tensor
    readers: Tensor
    counts: Tensor
    most: int
    splits: int
    tile: int


def _block(dtype: torch.dtype, width: int) -> int:
    """Keys at a time: 16 KiB of them at most."""
    return 64 if width * dtype.itemsize <= 256 else 32


def work_list(
    runs: Sequence[tuple[Tensor, Tensor, int, Sequence[int]]],
    rows: int,
    heads: int,
    kv_heads: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    tile: int | None = None,
    programs: int | None = None,
) -> Work:
    """Cut runs into items: keys ``[1, G, capacity, D]``, values ``[1, G, capacity, E]`` (contiguous), the tokens that count, and
    the rows that read them (every run of a row once).

    rows, heads, kv_heads: B, H, G. tile: queries that read a run at once, default: as many as there are, at most 64 in half
    precision (32 beyond 128 channels) and 16 in float32. programs: among which the runs are divided, default: one a
    multiprocessor. Raises `InvalidInput`.
    """
    for keys, values, length, readers in runs:
        if not (keys.is_contiguous() and values.is_contiguous() and 0 < length <= keys.shape[2] == values.shape[2]):
            raise InvalidInput(
                f"work_list: a run of {length} tokens in keys {tuple(keys.shape)} and values {tuple(values.shape)}: both "
                "must be contiguous and hold that many"
            )
        if not readers or min(readers) < 0 or max(readers) >= rows:
            raise InvalidInput(f"work_list: a run is read by rows {list(readers)} of {rows}")
    units = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    group = heads // kv_heads
    if tile is None:
        most = max((len(readers) for *_, readers in runs), default=1) * group
        wide = max((x.shape[3] for run in runs for x in run[:2]), default=1) > 128
        tile = min(triton.next_power_of_2(most), 16 if dtype.itemsize > 2 else 32 if wide else 64)
    tile = max(16, tile, triton.next_power_of_2(group))
    at_once = tile // group  # rows of a tile
    splits = max(1, min(64, triton.cdiv(2 * units, rows * kv_heads)))
    total = sum(length * triton.cdiv(len(readers), at_once) for _, _, length, readers in runs) * kv_heads
    share = max(128, triton.cdiv(triton.cdiv(total, programs or units), 64) * 64)  # keys of an item
    counts, items, told = [splits] * rows, [], []
    for keys, values, length, readers in runs:
        first = len(told)
        told += [(row, counts[row]) for row in readers]
        for split, low in enumerate(range(0, length, share)):
            for begin in range(first, len(told), at_once):
                end = min(begin + at_once, len(told))
                where = (keys.data_ptr(), values.data_ptr(), keys.shape[2])
                items.append((*where, low, min(low + share, length), begin, end, split))
        for row in readers:
            counts[row] += triton.cdiv(length, share)
    flat = [x for part in (*items, *told) for x in part] + counts
    table = torch.tensor(flat, dtype=torch.int64, device=device)
    cut = (len(items) * _FIELDS, len(told) * 2, rows)
    first, second, third = table.split(cut)
    return Work(table, first.view(-1, _FIELDS), second.view(-1, 2), third, max(counts), splits, tile)


def append(
    k: Tensor,
    v: Tensor,
    position: Tensor,
    keys: Tensor,
    values: Tensor,
    place: Tensor,
    *,
    width: int,
    cursor: Tensor | None = None,
) -> None:
    """Write one token per row, k ``[B, G, 1, D]``, v ``[B, G, 1, E]`` and position ``[B, 1]``, behind the own ones.

    keys ``[B, G, C, D]``, values ``[B, G, C, E]``, place int32 ``[B, C]``. width: the column; with a cursor, int64 ``[1]`` on the
    device, the column is cursor - width.
    """
    b, g, n, d = k.shape
    e = v.shape[3]
    if n != 1 or keys.stride()[2:] != (d, 1) or values.stride()[2:] != (e, 1):
        raise InvalidInput(
            f"append: expected one token per row, got k {tuple(k.shape)}, and keys and values contiguous from the axis of "
            "tokens on"
        )
    _append[(b * g,)](
        k.contiguous(), v.contiguous(), position, keys, values, place, place if cursor is None else cursor,
        width, g, d, e, keys.stride(0), keys.stride(1),
        values.stride(0), values.stride(1), place.stride(0), position.stride(0),
        HAS_CURSOR=cursor is not None, DP=triton.next_power_of_2(d), EP=triton.next_power_of_2(e), num_warps=1,
    )  # fmt: skip


def prefixed_decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    place: Tensor | None,
    work: Work,
    *,
    width: int,
    cursor: Tensor | None = None,
    scale: float,
    block: int | None = None,
    warps: int = 4,
    stages: int = 2,
) -> Tensor:
    """Attention of one token per row over the runs of a work list and the row's own tokens: ``[B, H, 1, E]``.

    q ``[B, H, 1, D]``; own keys ``[B, G, C, D]`` and values ``[B, G, C, E]``; place int32 ``[B, C]``, columns below 0 are
    skipped, or None. width: own columns in use, with the new token's; with a cursor, int64 ``[1]`` on the device, there are
    cursor + 1 - width. Results do not depend on C. Raises `InvalidInput`.
    """
    b, h, n, d = q.shape
    g, e = keys.shape[1], values.shape[3]
    if n != 1 or h % g or keys.shape[0] != b or keys.shape[3] != d or values.shape[:3] != keys.shape[:3]:
        raise InvalidInput(
            f"prefixed_decode: q {tuple(q.shape)}, keys {tuple(keys.shape)} and values {tuple(values.shape)} do not fit one "
            "token per row"
        )
    if keys.stride()[2:] != (d, 1) or values.stride()[2:] != (e, 1) or (place is not None and place.stride(1) != 1):
        raise InvalidInput("prefixed_decode: keys, values and place must be contiguous from the axis of tokens on")
    r, q = h // g, q.contiguous()
    table, most, splits, shared = work.table, work.most, work.splits, work.items.shape[0] * g
    part = torch.empty(b * h * most * e, dtype=torch.float32, device=q.device)
    lse = torch.empty(b * h * most, dtype=torch.float32, device=q.device)
    out = torch.empty(b, h, 1, e, dtype=q.dtype, device=q.device)
    wide_d, wide_e = tiled(d, e, dtype=q.dtype)
    _parts[(shared + b * g * splits,)](
        q, keys, values, table if place is None else place, table if cursor is None else cursor,
        table, work.readers, part, lse, scale * LOG2E, width, shared, most, g, r, splits, d, e,
        keys.stride(0), keys.stride(1), values.stride(0), values.stride(1), 0 if place is None else place.stride(0),
        HAS_CURSOR=cursor is not None, HAS_PLACE=place is not None, EVEN=(d, e) == (wide_d, wide_e), FIELDS=_FIELDS,
        ROWS=work.tile, ROWS_OWN=max(16, triton.next_power_of_2(r)), BLOCK=block or _block(q.dtype, max(wide_d, wide_e)),
        DP=wide_d, EP=wide_e, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    _join[(b * h,)](
        part, lse, work.counts, out, most, h, e, SOME=min(32, triton.next_power_of_2(most)), EP=wide_e, num_warps=4
    )
    return out


__all__ = ["Work", "append", "prefixed_decode", "work_list"]
