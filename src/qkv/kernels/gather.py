r"""Decode attention over chosen pages or tokens, read in place, and what chooses them.

    store          the new token of every row into its slot
    page_bounds    largest and smallest channels of the own page, as far as it is filled
    token_label    the label of the newest key, packed as the others are
    page_scores    u_p = max over the query heads of a KV head of  sum_c max(q_c lo_pc, q_c hi_pc)
    label_scores   s_m = sum over those heads of  <q[channels], label_m>,  labels of 16 bits or packed codes
    select         the own page, then exactly the best of the older ones in ascending order; ties go to the lower number
    gather_attention   softmax over the slots of the chosen pages alone, split over them, merged by log-sum-exp

One query token per row. Shapes and launches do not depend on what is on the device, so all of it can be captured in a CUDA
graph. Bound: bytes of the pages chosen, and of the index that was scored.

Axes: B batch, H query heads, G key/value heads, R = H / G, A heads that choose (G or H), P pages of C slots, K chosen pages,
D head width, E value width, S splits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkv.core.errors import InvalidInput
from qkv.kernels.decode import LOG2E, _merge
from qkv.kernels.widths import tiled

PART = 1024  # pages that one program chooses from at a glance; of longer rows it narrows the choice first
WIDE = 16384  # what it narrows to at most; else the row is counted in parts
READ = 8192  # pages that it reads at once meanwhile
COUNTED = 4096  # pages of such a part, at least


@triton.jit
def _gather(
    q_ptr, k_ptr, v_ptr, index_ptr, position_ptr, part_ptr, lse_ptr,
    scale2, A, G, R, S, K, D, E,
    q_b, q_h, k_b, k_g, k_c, v_b, v_g, v_c,
    C: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    """One split of one (row, choosing head): partial out [R, E] and its lse (base 2); R query heads share the choice.

    EVEN: D and E fill their tiles.
    """
    pair, split = tl.program_id(0), tl.program_id(1)
    b, a = pair // A, pair % A
    g = a * G // A
    newest = tl.load(position_ptr + b)
    per = tl.cdiv(tl.cdiv(K * C, S), BLOCK) * BLOCK
    low = split * per
    high = tl.minimum(low + per, K * C)
    r, d, e, c = tl.arange(0, ROWS), tl.arange(0, DP), tl.arange(0, EP), tl.arange(0, BLOCK)
    q_at = q_ptr + b.to(tl.int64) * q_b + (a * R + r)[:, None] * q_h + d[None, :]
    q = tl.load(q_at, mask=(r < R)[:, None] & (d < D)[None, :], other=0.0)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, EP), tl.float32)
    k_base = k_ptr + b.to(tl.int64) * k_b + g.to(tl.int64) * k_g
    v_base = v_ptr + b.to(tl.int64) * v_b + g.to(tl.int64) * v_g
    i_base = index_ptr + pair.to(tl.int64) * K
    for at in range(low, high, BLOCK):
        t = at + c
        page = tl.load(i_base + t // C, mask=t < high, other=-1)
        j = page * C + t % C
        live = (page >= 0) & (j <= newest)
        if EVEN:
            k_live, v_live = live[None, :], live[:, None]
        else:
            k_live, v_live = live[None, :] & (d < D)[:, None], live[:, None] & (e < E)[None, :]
        k = tl.load(k_base + j[None, :].to(tl.int64) * k_c + d[:, None], mask=k_live, other=0.0)
        v = tl.load(v_base + j[:, None].to(tl.int64) * v_c + e[None, :], mask=v_live, other=0.0)
        s = tl.dot(q, k, input_precision="ieee") * scale2  # [ROWS, BLOCK], in units of log2
        s = tl.where(live[None, :], s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        anchor = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(s - anchor[:, None])
        fade = tl.exp2(top - anchor)
        total = total * fade + tl.sum(p, 1)
        out = out * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = new
    safe = tl.where(total > 0, total, 1.0)
    out = out / safe[:, None]
    lse = tl.where(total > 0, top + tl.log2(safe), float("-inf"))
    row = (pair.to(tl.int64) * S + split) * R + r
    tl.store(part_ptr + row[:, None] * E + e[None, :], out, mask=(r < R)[:, None] & (e < E)[None, :])
    tl.store(lse_ptr + row, lse, mask=r < R)


@triton.jit
def _store(
    keys_ptr, values_ptr, k_ptr, v_ptr, cursor_ptr, position_ptr, columns_ptr, slot_ptr, slot32_ptr,
    G, D, E, keys_b, keys_g, keys_c, values_b, values_g, values_c, k_b, k_g, v_b, v_g, p_b, c_b,
    COLUMNS: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    """The new token of one (row, KV head)."""
    pair = tl.program_id(0)
    b, g = pair // G, pair % G
    newest = tl.load(position_ptr + b * p_b).to(tl.int64)
    cursor = tl.load(cursor_ptr).to(tl.int64)
    slot = cursor
    if COLUMNS:
        slot = newest
    d, e = tl.arange(0, DP), tl.arange(0, EP)
    k = tl.load(k_ptr + b.to(tl.int64) * k_b + g.to(tl.int64) * k_g + d, mask=d < D)
    v = tl.load(v_ptr + b.to(tl.int64) * v_b + g.to(tl.int64) * v_g + e, mask=e < E)
    if slot >= 0:
        tl.store(keys_ptr + b.to(tl.int64) * keys_b + g.to(tl.int64) * keys_g + slot * keys_c + d, k, mask=d < D)
        tl.store(
            values_ptr + b.to(tl.int64) * values_b + g.to(tl.int64) * values_g + slot * values_c + e, v, mask=e < E
        )
    if g == 0:
        tl.store(slot_ptr + b, newest)
        tl.store(slot32_ptr + b, newest.to(tl.int32))
        if COLUMNS:
            tl.store(columns_ptr + b.to(tl.int64) * c_b + cursor, newest.to(tl.int32))


@triton.jit
def _page_bounds(
    k_ptr, bounds_ptr, position_ptr, G, C, D, k_b, k_g, k_c, b_b, b_g, b_p, CP: tl.constexpr, DP: tl.constexpr
):
    """Bounds of the own page of one (row, KV head)."""
    pair = tl.program_id(0)
    b, g = pair // G, pair % G
    newest = tl.load(position_ptr + b)
    if newest >= 0:
        own = newest // C
        c, d = tl.arange(0, CP), tl.arange(0, DP)
        live = (c < C) & (own * C + c <= newest)
        at = (
            k_ptr + b.to(tl.int64) * k_b + g.to(tl.int64) * k_g + (own * C + c)[:, None].to(tl.int64) * k_c + d[None, :]
        )
        both = live[:, None] & (d < D)[None, :]
        high = tl.max(tl.load(at, mask=both, other=float("-inf")).to(tl.float32), 0)
        low = tl.min(tl.load(at, mask=both, other=float("inf")).to(tl.float32), 0)
        to = bounds_ptr + b.to(tl.int64) * b_b + g.to(tl.int64) * b_g + own.to(tl.int64) * b_p + d
        tl.store(to, high.to(bounds_ptr.dtype.element_ty), mask=d < D)
        tl.store(to + D, low.to(bounds_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def _token_label(
    k_ptr, channels_ptr, labels_ptr, step_ptr, low_ptr, position_ptr, G, L,
    k_b, k_g, k_c, l_b, l_g, l_p, s_b, s_g, BITS: tl.constexpr, LP: tl.constexpr,
):  # fmt: skip
    """The label of the newest token of one (row, KV head)."""
    pair = tl.program_id(0)
    b, g = pair // G, pair % G
    newest = tl.load(position_ptr + b)
    if newest >= 0:
        key = k_ptr + b.to(tl.int64) * k_b + g.to(tl.int64) * k_g + newest.to(tl.int64) * k_c
        to = labels_ptr + b.to(tl.int64) * l_b + g.to(tl.int64) * l_g + newest.to(tl.int64) * l_p
        w = tl.arange(0, LP)
        if BITS == 16:
            channel = tl.load(channels_ptr + pair.to(tl.int64) * L + w, mask=w < L, other=0)
            tl.store(to + w, tl.load(key + channel, mask=w < L, other=0.0), mask=w < L)
        else:
            PER: tl.constexpr = 8 // BITS
            TOP: tl.constexpr = (1 << BITS) - 1
            least, most = float("inf"), float("-inf")
            for i in tl.static_range(PER):
                c = w * PER + i
                channel = tl.load(channels_ptr + pair.to(tl.int64) * L + c, mask=c < L, other=0)
                x = tl.load(key + channel).to(tl.float32)
                least = tl.minimum(least, tl.min(tl.where(c < L, x, float("inf")), 0))
                most = tl.maximum(most, tl.max(tl.where(c < L, x, float("-inf")), 0))
            unit = (most - least) / TOP
            unit = tl.where(unit == 0.0, 1.0, unit)
            data = tl.zeros((LP,), tl.int32)
            for i in tl.static_range(PER):
                c = w * PER + i
                channel = tl.load(channels_ptr + pair.to(tl.int64) * L + c, mask=c < L, other=0)
                x = tl.load(key + channel).to(tl.float32)
                code = tl.minimum(tl.maximum(tl.floor((x - least) / unit + 0.5), 0.0), TOP).to(tl.int32)
                data = data | (tl.where(c < L, code, 0) << (BITS * i))
            tl.store(to + w, data.to(tl.uint8), mask=w * PER < L)
            side = b.to(tl.int64) * s_b + g.to(tl.int64) * s_g + newest
            tl.store(step_ptr + side, unit.to(step_ptr.dtype.element_ty))
            tl.store(low_ptr + side, least.to(low_ptr.dtype.element_ty))


@triton.jit
def _bounded(
    over, under, b_base, w_base, j, stop, b_p, P, D, R, r, d,
    TAIL: tl.constexpr, EVEN: tl.constexpr, PER_HEAD: tl.constexpr,
):  # fmt: skip
    """The bounds of the pages j. TAIL: some lie past `stop`. EVEN: D fills its tile."""
    at = b_base + j[None, :].to(tl.int64) * b_p + d[:, None]
    if TAIL:
        live = (j < stop)[None, :] & (d < D)[:, None]
        high, low = tl.load(at, mask=live, other=0.0), tl.load(at + D, mask=live, other=0.0)
    elif EVEN:
        high, low = tl.load(at), tl.load(at + D)
    else:
        high, low = tl.load(at, mask=(d < D)[:, None], other=0.0), tl.load(at + D, mask=(d < D)[:, None], other=0.0)
    u = tl.dot(over, high, input_precision="ieee")
    u = tl.dot(under, low, u, input_precision="ieee")  # [ROWS, BLOCK]
    if PER_HEAD:
        tl.store(w_base + r[:, None] * P + j[None, :], u, mask=(r < R)[:, None] & (j < stop)[None, :])
    else:
        tl.store(w_base + j, tl.max(tl.where((r < R)[:, None], u, float("-inf")), 0), mask=j < stop)


@triton.jit
def _page_scores(
    q_ptr, bounds_ptr, position_ptr, worth_ptr, G, R, P, S, C, D, q_b, q_h, b_b, b_g, b_p,
    PER_HEAD: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """One of S parts of the pages before the own one, for the query heads of one KV head."""
    pair, split = tl.program_id(0), tl.program_id(1)
    b, g = pair // G, pair % G
    own = tl.load(position_ptr + b) // C
    per = tl.cdiv(tl.cdiv(own, S), BLOCK) * BLOCK
    start = split * per
    stop = tl.minimum(start + per, own)
    r, d, c = tl.arange(0, ROWS), tl.arange(0, DP), tl.arange(0, BLOCK)
    q_at = q_ptr + b.to(tl.int64) * q_b + (g * R + r)[:, None] * q_h + d[None, :]
    q = tl.load(q_at, mask=(r < R)[:, None] & (d < D)[None, :], other=0.0)
    zero = tl.zeros_like(q)
    over, under = tl.maximum(q, zero).to(q.dtype), tl.minimum(q, zero).to(q.dtype)
    b_base = bounds_ptr + b.to(tl.int64) * b_b + g.to(tl.int64) * b_g
    w_base = worth_ptr + pair.to(tl.int64) * P
    if PER_HEAD:
        w_base = worth_ptr + pair.to(tl.int64) * R * P
    whole = start + tl.maximum(stop - start, 0) // BLOCK * BLOCK
    for at in range(start, whole, BLOCK):
        _bounded(over, under, b_base, w_base, at + c, stop, b_p, P, D, R, r, d, False, EVEN, PER_HEAD)
    if whole < stop:
        _bounded(over, under, b_base, w_base, whole + c, stop, b_p, P, D, R, r, d, True, EVEN, PER_HEAD)


@triton.jit
def _labelled(
    base, step_base, low_base, to, query, total, j, stop, L, w,
    BITS: tl.constexpr, PER: tl.constexpr, STRIDE: tl.constexpr, EVEN: tl.constexpr, TAIL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Scores of the tokens j; query [PER, LP]. TAIL: some lie past `stop`. EVEN: labels fill their tile.

    A code of 8 bits or less becomes a number by being the low bits of a float whose unit is 1: no conversion.
    """
    live = j < stop
    at = base + j[:, None].to(tl.int64) * STRIDE + w[None, :]
    if TAIL and EVEN:
        data = tl.load(at, mask=live[:, None], other=0)
    elif TAIL:
        data = tl.load(at, mask=live[:, None] & (w * PER < L)[None, :], other=0)
    elif EVEN:
        data = tl.load(at)
    else:
        data = tl.load(at, mask=(w * PER < L)[None, :], other=0)
    if BITS == 16:
        score = tl.sum(data.to(tl.float32) * query, 1)
    else:
        data = data.to(tl.int32)
        lane = tl.arange(0, PER)[:, None]
        score = tl.zeros((BLOCK,), tl.float32)
        for i in tl.static_range(PER):
            part = (data >> (BITS * i // 16 * 16)) & (((1 << BITS) - 1) << (BITS * i % 16))
            x = (part | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0  # the code times 2^(BITS i % 16)
            mine = tl.sum(tl.where(lane == i, query, 0.0), 0) * (1.0 / (1 << (BITS * i % 16)))  # [LP]
            score += tl.sum(x * mine[None, :], 1)
        if TAIL:
            step, low = tl.load(step_base + j, mask=live, other=0.0), tl.load(low_base + j, mask=live, other=0.0)
        else:
            step, low = tl.load(step_base + j), tl.load(low_base + j)
        score = score * step.to(tl.float32) + low.to(tl.float32) * total
    if TAIL:
        tl.store(to + j, score, mask=live)
    else:
        tl.store(to + j, score)


@triton.jit
def _label_scores(
    q_ptr, channels_ptr, labels_ptr, step_ptr, low_ptr, position_ptr, worth_ptr,
    G, R, L, P, S, q_b, q_h, l_b, l_g, s_b, s_g,
    BITS: tl.constexpr, PER: tl.constexpr, STRIDE: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, LP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One of S parts of the tokens before the own one; L channels, PER codes in an element of the labels.

    With fewer than 16 bits the query's labels are quantised per head as well.
    """
    pair, split = tl.program_id(0), tl.program_id(1)
    b, g = pair // G, pair % G
    newest = tl.load(position_ptr + b)
    per = tl.cdiv(tl.cdiv(newest, S), BLOCK) * BLOCK
    start = split * per
    stop = tl.minimum(start + per, newest)
    r, w, c, j = tl.arange(0, ROWS), tl.arange(0, LP), tl.arange(0, LP * PER), tl.arange(0, BLOCK)
    real = (r < R)[:, None] & (c < L)[None, :]
    channel = tl.load(channels_ptr + pair.to(tl.int64) * L + c, mask=c < L, other=0)
    q_at = q_ptr + b.to(tl.int64) * q_b + (g * R + r)[:, None] * q_h + channel[None, :]
    q = tl.load(q_at, mask=real, other=0.0).to(tl.float32)
    if BITS < 16:
        least = tl.min(tl.where((c < L)[None, :], q, float("inf")), 1)
        most = tl.max(tl.where((c < L)[None, :], q, float("-inf")), 1)
        unit = (most - least) / ((1 << BITS) - 1)
        unit = tl.where(unit == 0.0, 1.0, unit)
        q = tl.floor((q - least[:, None]) / unit[:, None] + 0.5) * unit[:, None] + least[:, None]
        q = tl.where(real, q, 0.0)
    query = tl.sum(q, 0)
    total = tl.sum(query, 0)
    query = tl.trans(tl.reshape(query, (LP, PER)))
    base = labels_ptr + b.to(tl.int64) * l_b + g.to(tl.int64) * l_g
    side = b.to(tl.int64) * s_b + g.to(tl.int64) * s_g
    to = worth_ptr + pair.to(tl.int64) * P
    whole = start + tl.maximum(stop - start, 0) // BLOCK * BLOCK
    for at in range(start, whole, BLOCK):
        _labelled(
            base, step_ptr + side, low_ptr + side, to, query, total, at + j, stop, L, w,
            BITS, PER, STRIDE, EVEN, False, BLOCK,
        )  # fmt: skip
    if whole < stop:
        _labelled(
            base, step_ptr + side, low_ptr + side, to, query, total, whole + j, stop, L, w,
            BITS, PER, STRIDE, EVEN, True, BLOCK,
        )  # fmt: skip


@triton.jit
def _keys_of(worth_ptr, row, j, live, C, sinks, first_recent, FIRM: tl.constexpr):
    """Worth as unsigned integers of the same order, above 0; NaN is lowest, what must be read highest; 0 outside `live`."""
    x = tl.load(worth_ptr + row + j, mask=live, other=0.0)
    x = tl.where(x == x, x, float("-inf"))
    key = _ordered(x)
    if FIRM:
        key = tl.where((j * C < sinks) | (j >= first_recent), -8388607, key)  # the number after infinity
    return tl.where(live, key, 0).to(tl.uint32, bitcast=True)


@triton.jit
def _ordered(x):
    """Floats as unsigned integers of the same order, kept in int32."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) | -2147483648)


@triton.jit
def _threshold(key, want, slack):
    """A number that at least `want` keys reach, at most `want + slack` where they can be told apart; 1 if fewer are above 0.

    By halving the range of the keys, until so few reach it or no number is left between.
    """
    low = tl.min(tl.where(key > 0, key, 0xFFFFFFFF).to(tl.uint32))
    high = tl.max(key) + 1
    have = tl.sum((key > 0).to(tl.int32))
    low = tl.where(have < want, 1, low).to(tl.uint32)
    while (high - low > 1) & (have > want + slack):
        middle = low + ((high - low) >> 1)
        reach = tl.sum((key >= middle).to(tl.int32))
        enough = reach >= want
        low, have = tl.where(enough, middle, low), tl.where(enough, reach, have)
        high = tl.where(enough, high, middle)
    return low


@triton.jit
def _running(x, ROWS: tl.constexpr):
    """Running sums of x [ROWS, 4] in reading order: four within a thread, 32 rows within a warp, then over the warps."""
    i = tl.arange(0, ROWS // 32)
    rows = tl.reshape(tl.sum(x, 1), (ROWS // 32, 32))
    before = tl.sum(tl.where(i[None, :] < i[:, None], tl.sum(rows, 1)[None, :], 0), 1)
    base = tl.reshape(tl.cumsum(rows, 1) - rows + before[:, None], (ROWS,))
    return tl.cumsum(x, 1) + base[:, None]


@triton.jit
def _tile(ROWS: tl.constexpr):
    """0 .. 4 ROWS - 1 as [ROWS, 4]."""
    return tl.arange(0, ROWS)[:, None] * 4 + tl.arange(0, 4)[None, :]


@triton.jit
def _counts(digits, mine, CHUNK: tl.constexpr):
    """How often each of 256 digits occurs among the CHUNK that are `mine`; the others are counted as 0 and taken off again."""
    others = CHUNK - tl.sum(mine.to(tl.int32), 0)
    counts = tl.histogram(tl.where(mine, digits, 0), 256)
    return counts - tl.where(tl.arange(0, 256) == 0, others, 0)


@triton.jit
def _digit(counts, left):
    """Of counts [256]: the bin that holds the left-th largest, and how many are still wanted within it."""
    bins = tl.arange(0, 256)
    above = tl.sum(counts, 0) - tl.cumsum(counts, 0)
    hit = (above < left) & (above + counts >= left)
    return tl.sum(tl.where(hit, bins, 0), 0), left - tl.sum(tl.where(hit, above, 0), 0)


@triton.jit
def _wanted(position_ptr, keep_ptr, b, K, C, recent, HAS_KEEP: tl.constexpr):
    """For a row: its own page, pages to look at, pages to keep, older pages wanted, and the first page of the recent ones."""
    newest = tl.load(position_ptr + b)
    keep = K
    if HAS_KEEP:
        keep = tl.minimum(K, tl.load(keep_ptr + b))
    keep = tl.where(newest < 0, 0, keep)
    own = tl.maximum(newest, 0) // C
    want = tl.maximum(0, tl.minimum(keep - 1, own))
    first_recent = tl.where(recent > 0, tl.maximum(0, (newest + 1 - recent) // C), own)
    return own, tl.where(want > 0, own, 0), keep, want, first_recent


@triton.jit
def _place(to, j, key, least, before, tied, left, K, ROWS: tl.constexpr):
    """Write those of a tile that exceed `least`, and of its equals as many as are `left`; returns how many came so far."""
    more, same = (key > least).to(tl.int32), ((key == least) & (key > 0)).to(tl.int32)
    both = _running(more | (same << 16), ROWS)
    above, equal = before + (both & 65535), tied + (both >> 16)
    at = above + tl.minimum(equal, left)  # 1 is the first place behind the own page
    tl.store(to + at, j, mask=((more > 0) | ((same > 0) & (equal <= left))) & (at < K))
    return before + tl.sum(more), tied + tl.sum(same)


@triton.jit
def _frame(to, own, keep, want, K, CHUNK: tl.constexpr):
    """The own page in front, -1 behind."""
    if keep > 0:
        tl.store(to, own)
    filled = tl.where(keep > 0, want + 1, 0)
    for start in range(filled, K, CHUNK):
        i = start + tl.arange(0, CHUNK)
        tl.store(to + i, -1, mask=i < K)


@triton.jit
def _select_short(
    worth_ptr, position_ptr, keep_ptr, index_ptr, A, P, K, sinks, recent,
    C: tl.constexpr, FIRM: tl.constexpr, HAS_KEEP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The choice of one (row, choosing head) of at most 4 * ROWS pages: own page first, then ascending, then -1."""
    pair = tl.program_id(0)
    own, many, keep, want, first_recent = _wanted(position_ptr, keep_ptr, pair // A, K, C, recent, HAS_KEEP)
    j = _tile(ROWS)
    key = _keys_of(worth_ptr, pair.to(tl.int64) * P, j, j < many, C, sinks, first_recent, FIRM)
    least = _threshold(key, want, 0)
    to = index_ptr + pair.to(tl.int64) * K
    _place(to, j, key, least, 0, 0, want - tl.sum((key > least).to(tl.int32)), K, ROWS)
    _frame(to, own, keep, want, K, 4 * ROWS)


@triton.jit
def _narrow(
    worth, scratch, start, bound, some, many, C, sinks, first_recent,
    FIRM: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Note those of a tile whose worth reaches `bound` or that must be read; returns how many were noted."""
    j = start + _tile(ROWS)
    if TAIL:
        take = tl.load(worth + j, mask=j < many, other=0.0) >= bound
    else:
        take = tl.load(worth + j) >= bound
    if FIRM:
        take = take | (j * C < sinks) | (j >= first_recent)
    if TAIL:
        take = take & (j < many)
    take = take.to(tl.int32)
    tl.store(scratch + some + _running(take, ROWS) - 1, j, mask=take > 0)
    return some + tl.sum(take)


@triton.jit
def _select_long(
    worth_ptr, position_ptr, keep_ptr, scratch_ptr, index_ptr, A, P, K, sinks, recent,
    C: tl.constexpr, FIRM: tl.constexpr, HAS_KEEP: tl.constexpr, ROWS: tl.constexpr, TIMES: tl.constexpr,
):  # fmt: skip
    """The choice of one (row, choosing head) of any number of pages, of which fewer than a tile of 4 * ROWS are wanted.

    The best of so many groups of pages are as many pages: what the want-th of them reaches, the want-th of all reaches. Only
    pages that do are looked at again. TIMES tiles are read at once.
    """
    TILE: tl.constexpr = 4 * ROWS
    pair = tl.program_id(0)
    own, many, keep, want, first_recent = _wanted(position_ptr, keep_ptr, pair // A, K, C, recent, HAS_KEEP)
    row = pair.to(tl.int64) * P
    worth, scratch = worth_ptr + row, scratch_ptr + row
    t = _tile(ROWS)
    best = tl.full((ROWS, 4), float("-inf"), tl.float32)
    whole = many // (TILE * TIMES) * (TILE * TIMES)
    for start in range(0, whole, TILE * TIMES):
        for i in tl.static_range(TIMES):
            best = tl.maximum(best, tl.load(worth + start + i * TILE + t))  # the number where one is NaN
    for start in range(whole, many, TILE):
        best = tl.maximum(best, tl.load(worth + start + t, mask=start + t < many, other=float("-inf")))
    best = tl.where(best == best, best, float("-inf"))
    bound = _threshold(tl.where(t < many, _ordered(best), 0).to(tl.uint32, bitcast=True), want, want // 16)
    some = 0
    if bound > 0x007FFFFF:  # else any worth will do, NaN too
        bits = bound.to(tl.int32, bitcast=True)
        reach = tl.where(bits < 0, bits & 2147483647, ~bits).to(tl.float32, bitcast=True)
        for start in range(0, whole, TILE * TIMES):
            some = _narrow(worth, scratch, start, reach, some, many, C, sinks, first_recent, FIRM, False, ROWS * TIMES)
        for start in range(whole, many, TILE):
            some = _narrow(worth, scratch, start, reach, some, many, C, sinks, first_recent, FIRM, True, ROWS)
    else:
        for start in range(0, many, TILE):
            tl.store(scratch + start + t, start + t, mask=start + t < many)
        some = many
    tl.debug_barrier()
    least, above = tl.full((), 1, tl.uint32), 0
    if some <= TILE:
        key = _keys_of(
            worth_ptr, row, tl.load(scratch + t, mask=t < some, other=0), t < some, C, sinks, first_recent, FIRM
        )
        least = _threshold(key, want, 0)
        above = tl.sum((key > least).to(tl.int32))
    else:  # many that are equal, or worth of an odd kind
        low, high, have = bound, tl.full((), 0xFF800002, tl.uint32), some
        while (high - low > 1) & (have > want):
            middle = low + ((high - low) >> 1)
            reach = 0
            for start in range(0, some, TILE):
                j = tl.load(scratch + start + t, mask=start + t < some, other=0)
                key = _keys_of(worth_ptr, row, j, start + t < some, C, sinks, first_recent, FIRM)
                reach += tl.sum((key >= middle).to(tl.int32))
            enough = reach >= want
            low, have = tl.where(enough, middle, low), tl.where(enough, reach, have)
            high = tl.where(enough, high, middle)
        least = low
        for start in range(0, some, TILE):
            j = tl.load(scratch + start + t, mask=start + t < some, other=0)
            key = _keys_of(worth_ptr, row, j, start + t < some, C, sinks, first_recent, FIRM)
            above += tl.sum((key > least).to(tl.int32))
    to = index_ptr + pair.to(tl.int64) * K
    before, tied = 0, 0
    for start in range(0, some, TILE):
        j = tl.load(scratch + start + t, mask=start + t < some, other=0)
        key = _keys_of(worth_ptr, row, j, start + t < some, C, sinks, first_recent, FIRM)
        before, tied = _place(to, j, key, least, before, tied, want - above, K, ROWS)
    _frame(to, own, keep, want, K, TILE)


@triton.jit
def _select_count(
    worth_ptr, position_ptr, keep_ptr, counts_ptr, A, P, K, N, sinks, recent,
    C: tl.constexpr, FIRM: tl.constexpr, STAGE: tl.constexpr, HAS_KEEP: tl.constexpr, CHUNK: tl.constexpr, NP: tl.constexpr,
):  # fmt: skip
    """How often each digit of a stage occurs in a part of CHUNK pages, among those that agree with the digits found before."""
    pair, part = tl.program_id(0), tl.program_id(1)
    _, many, _, want, first_recent = _wanted(position_ptr, keep_ptr, pair // A, K, C, recent, HAS_KEEP)
    bins, parts = tl.arange(0, 256), tl.arange(0, NP)
    base = counts_ptr + pair.to(tl.int64) * (4 * N * 256)
    j = part * CHUNK + tl.arange(0, CHUNK)
    same = j < many
    key = _keys_of(worth_ptr, pair.to(tl.int64) * P, j, same, C, sinks, first_recent, FIRM)
    left = want
    for stage in tl.static_range(STAGE):
        at = base + (stage * N + parts)[:, None] * 256 + bins[None, :]
        digit, left = _digit(tl.sum(tl.load(at, mask=(parts < N)[:, None], other=0), 0), left)
        same = same & (((key >> (24 - 8 * stage)) & 255).to(tl.int32) == digit)
    digits = ((key >> (24 - 8 * STAGE)) & 255).to(tl.int32)
    tl.store(base + (STAGE * N + part) * 256 + bins, _counts(digits, same, CHUNK))


@triton.jit
def _select_emit(
    worth_ptr, position_ptr, keep_ptr, counts_ptr, index_ptr, A, P, K, N, sinks, recent,
    C: tl.constexpr, FIRM: tl.constexpr, HAS_KEEP: tl.constexpr, CHUNK: tl.constexpr, NP: tl.constexpr,
):  # fmt: skip
    """Write what a part of CHUNK pages gives to the choice, behind what the parts before it give."""
    pair, part = tl.program_id(0), tl.program_id(1)
    own, many, keep, want, first_recent = _wanted(position_ptr, keep_ptr, pair // A, K, C, recent, HAS_KEEP)
    bins, parts = tl.arange(0, 256), tl.arange(0, NP)
    base = counts_ptr + pair.to(tl.int64) * (4 * N * 256)
    j = part * CHUNK + tl.arange(0, CHUNK)
    same = j < many
    key = _keys_of(worth_ptr, pair.to(tl.int64) * P, j, same, C, sinks, first_recent, FIRM)
    more, left, before, tied = same & (j < 0), want, 0, 0
    for stage in tl.static_range(4):
        at = base + (stage * N + parts)[:, None] * 256 + bins[None, :]
        counts = tl.load(at, mask=(parts < N)[:, None], other=0)
        digit, left = _digit(tl.sum(counts, 0), left)
        earlier = (parts < part)[:, None]
        before += tl.sum(tl.sum(tl.where(earlier & (bins > digit)[None, :], counts, 0), 1), 0)
        tied = tl.sum(tl.sum(tl.where(earlier & (bins == digit)[None, :], counts, 0), 1), 0)
        digits = ((key >> (24 - 8 * stage)) & 255).to(tl.int32)
        more = more | (same & (digits > digit))
        same = same & (digits == digit)
    rank = tied + tl.cumsum(same.to(tl.int32), 0) - 1
    take = (more | (same & (rank < left))).to(tl.int32)
    to = index_ptr + pair.to(tl.int64) * K
    at = before + tl.minimum(tied, left) + tl.cumsum(take, 0)
    tl.store(to + at, j, mask=(take > 0) & (at < K))
    if part == 0:
        if keep > 0:
            tl.store(to, own)
    filled = tl.where(keep > 0, want + 1, 0)
    for start in range(part * CHUNK, K, N * CHUNK):
        i = start + tl.arange(0, CHUNK)
        tl.store(to + i, -1, mask=(i >= filled) & (i < K))


def _rows(q: Tensor, who: str) -> None:
    if q.ndim != 4 or q.shape[2] != 1 or q.stride(3) != 1:
        raise InvalidInput(f"{who}: expected one token per row, q [B, H, 1, D] contiguous in D; got {tuple(q.shape)}")


def _splits(x: Tensor, pairs: int, per_unit: int, most: int) -> int:
    """Programs per pair, so that all of them run at once, `per_unit` on every multiprocessor; at most `most`, and 128."""
    units = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4
    return max(1, min(per_unit * units // pairs, most, 128))


def store(
    keys: Tensor,
    values: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cursor: Tensor,
    position: Tensor | None = None,
    columns: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Write the new token of every row in place; returns the slot that its query stands at, int64 ``[B, 1]`` and int32 ``[B]``.

    keys ``[B, G, S, D]``, values ``[B, G, S, E]``; k ``[B, G, 1, D]``, v ``[B, G, 1, E]``. cursor: int64 ``[1]`` logical column
    of the token, its slot in every row unless there are columns. position: int32 ``[B, 1]``, the slots where rows differ (below
    0: none), or None. columns: int32 ``[B, room]``, the slot of each logical column, written as well; tokens go to `position`.
    """
    b, g, _, d = keys.shape
    e = values.shape[3]
    k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
    slot = torch.empty(b, 1, dtype=torch.int64, device=keys.device)
    slot32 = torch.empty(b, dtype=torch.int32, device=keys.device)
    where = cursor if position is None else position
    _store[(b * g,)](
        keys, values, k, v, cursor, where, slot32 if columns is None else columns, slot, slot32,
        g, d, e, keys.stride(0), keys.stride(1), keys.stride(2), values.stride(0), values.stride(1), values.stride(2),
        k.stride(0), k.stride(1), v.stride(0), v.stride(1), 0 if position is None else position.stride(0),
        0 if columns is None else columns.stride(0),
        COLUMNS=columns is not None, DP=triton.next_power_of_2(d), EP=triton.next_power_of_2(e), num_warps=1,
    )  # fmt: skip
    return slot, slot32


def page_bounds(keys: Tensor, bounds: Tensor, position: Tensor, *, block: int) -> None:
    """Write the bounds of every own page: keys ``[B, G, S, D]``, bounds ``[B, G, P, 2 D]`` in place, position int32 ``[B]``."""
    b, g, _, d = keys.shape
    _page_bounds[(b * g,)](
        keys, bounds, position, g, block, d, keys.stride(0), keys.stride(1), keys.stride(2),
        bounds.stride(0), bounds.stride(1), bounds.stride(2),
        CP=triton.next_power_of_2(block), DP=triton.next_power_of_2(d), num_warps=1,
    )  # fmt: skip


def token_label(
    keys: Tensor,
    channels: Tensor,
    labels: Tensor,
    position: Tensor,
    *,
    bits: int = 16,
    step: Tensor | None = None,
    low: Tensor | None = None,
) -> None:
    """Write the label of every row's newest key in place; arguments as `label_scores`, keys ``[B, G, S, D]``."""
    b, g = keys.shape[:2]
    side = labels if step is None else step
    _token_label[(b * g,)](
        keys, channels, labels, side, side if low is None else low, position, g, channels.shape[2],
        keys.stride(0), keys.stride(1), keys.stride(2), labels.stride(0), labels.stride(1), labels.stride(2),
        side.stride(0), side.stride(1), BITS=bits, LP=triton.next_power_of_2(labels.shape[3]), num_warps=1,
    )  # fmt: skip


def _worth(b: int, a: int, p: int, like: Tensor) -> Tensor:
    """Room for the worth of p pages, float32 ``[B, A, 1, p]``; rows begin at multiples of 64 bytes, to be read wide."""
    return torch.empty(b, a, 1, triton.cdiv(p, 16) * 16, dtype=torch.float32, device=like.device)[..., :p]


def page_scores(
    q: Tensor,
    bounds: Tensor,
    position: Tensor,
    *,
    block: int,
    per_head: bool = False,
    splits: int | None = None,
    tile: int = 32,
    warps: int = 4,
    stages: int = 3,
) -> Tensor:
    """Upper bounds of every logit in the pages before the own one: float32 ``[B, G, 1, P]``, or ``[B, H, 1, P]``.

    q: ``[B, H, 1, D]``; bounds: ``[B, G, P, 2 D]``, largest then smallest channels; position: int32 ``[B]`` slot of the query's
    own token (below 0: none). Later pages hold anything. Raises `InvalidInput`.
    """
    _rows(q, "page_scores")
    b, h, _, d = q.shape
    g, p = bounds.shape[1:3]
    if bounds.shape[3] != 2 * d or bounds.stride(3) != 1 or h % g:
        raise InvalidInput(f"page_scores: bounds {tuple(bounds.shape)} do not fit q {tuple(q.shape)}")
    worth = _worth(b, h if per_head else g, p, q)
    splits, wide = splits or _splits(q, b * g, 4, triton.cdiv(p, tile)), max(16, triton.next_power_of_2(d))
    _page_scores[(b * g, splits)](
        q, bounds, position, worth, g, h // g, worth.stride(1), splits, block, d,
        q.stride(0), q.stride(1), bounds.stride(0), bounds.stride(1), bounds.stride(2),
        PER_HEAD=per_head, EVEN=wide == d, ROWS=max(16, triton.next_power_of_2(h // g)), BLOCK=tile, DP=wide,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return worth


def _words(labels: Tensor) -> Tensor:
    """Bytes ``[..., n]`` as int32 words where they can be read so."""
    whole = labels.shape[3] % 4 == 0 and labels.stride(3) == 1 and labels.storage_offset() % 4 == 0
    return labels.view(torch.int32) if whole and all(x % 4 == 0 for x in labels.stride()[:3]) else labels


def label_scores(
    q: Tensor,
    channels: Tensor,
    labels: Tensor,
    position: Tensor,
    *,
    bits: int = 16,
    step: Tensor | None = None,
    low: Tensor | None = None,
    splits: int | None = None,
    tile: int = 512,
    warps: int = 4,
) -> Tensor:
    """Approximate logits of the tokens before the own one, summed over a KV group: float32 ``[B, G, 1, M]``.

    q: ``[B, H, 1, D]``; channels: int64 ``[B, G, r]`` contiguous; labels: ``[B, G, M, r]`` for 16 bits, else bytes
    ``[B, G, M, r bits / 8]`` with step and low ``[B, G, M]``. position as in `page_scores`. Raises `InvalidInput`.
    """
    _rows(q, "label_scores")
    b, h, _, _ = q.shape
    g, m, width = labels.shape[1:4]
    r = channels.shape[2]
    if (
        channels.shape[:2] != (b, g)
        or not channels.is_contiguous()
        or width != (r if bits == 16 else -(-r * bits // 8))
    ):
        raise InvalidInput(
            f"label_scores: channels {tuple(channels.shape)} do not fit labels {tuple(labels.shape)} of {bits} bits"
        )
    worth = _worth(b, g, m, q)
    side = labels if step is None else step
    labels = labels if bits == 16 else _words(labels)
    splits, wide = splits or _splits(q, b * g, 8, triton.cdiv(m, tile)), triton.next_power_of_2(labels.shape[3])
    _label_scores[(b * g, splits)](
        q, channels, labels, side, side if low is None else low, position, worth,
        g, h // g, r, worth.stride(1), splits, q.stride(0), q.stride(1), labels.stride(0), labels.stride(1),
        side.stride(0), side.stride(1),
        BITS=bits, PER=1 if bits == 16 else 8 * labels.element_size() // bits, STRIDE=labels.stride(2),
        EVEN=wide == labels.shape[3], ROWS=triton.next_power_of_2(h // g), LP=wide, BLOCK=tile, num_warps=warps,
    )  # fmt: skip
    return worth


def _warps(tile: int) -> int:
    """Eight numbers a thread, up to the 1024 threads of a program."""
    return max(1, min(32, tile // 256))


def select(
    worth: Tensor,
    position: Tensor,
    count: int,
    *,
    block: int = 1,
    keep: Tensor | None = None,
    sinks: int = 0,
    recent: int = 0,
) -> Tensor:
    """The own page, then the best older ones in ascending order: int32 ``[B, A, 1, count]``, -1 where there are no more.

    worth: float32 ``[B, A, 1, P]``, looked at before the own page only. position: int32 ``[B]`` slot of the own token (below 0:
    nothing is chosen). keep: int32 ``[B]`` pages of each row, own included, at most `count` (None: `count`). sinks, recent: first
    and newest tokens whose pages come before all worth.
    """
    b, a, _, p = worth.shape
    index = torch.empty(b, a, 1, count, dtype=torch.int32, device=worth.device)
    if worth.stride(3) != 1 or worth.stride(1) < p or (b > 1 and worth.stride(0) != a * worth.stride(1)):
        worth = worth.contiguous()
    row, rows = worth.stride(1), position if keep is None else keep
    whole = max(128, triton.next_power_of_2(p))
    tile = min(whole, max(128, 2 * triton.next_power_of_2(count)))
    what = {"C": block, "FIRM": sinks > 0 or recent > 0, "HAS_KEEP": keep is not None}
    if whole <= PART:
        _select_short[(b * a,)](
            worth, position, rows, index, a, row, count, sinks, recent, ROWS=whole // 4, num_warps=_warps(whole), **what
        )
        return index
    if tile <= WIDE:
        times = max(1, min(whole, READ) // tile)
        scratch = torch.empty(b, a, row, dtype=torch.int32, device=worth.device)
        _select_long[(b * a,)](
            worth, position, rows, scratch, index, a, row, count, sinks, recent,
            ROWS=tile // 4, TIMES=times, num_warps=_warps(tile * times), **what,
        )  # fmt: skip
        return index
    chunk = COUNTED
    while triton.cdiv(p, chunk) > 32:
        chunk *= 2
    parts = triton.cdiv(p, chunk)
    counts = torch.empty(b * a, 4, parts, 256, dtype=torch.int32, device=worth.device)
    what |= {"CHUNK": chunk, "NP": triton.next_power_of_2(parts), "num_warps": 8}
    for stage in range(4):
        _select_count[(b * a, parts)](
            worth, position, rows, counts, a, row, count, parts, sinks, recent, STAGE=stage, **what
        )
    _select_emit[(b * a, parts)](worth, position, rows, counts, index, a, row, count, parts, sinks, recent, **what)
    return index


def gather_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    position: Tensor,
    *,
    block: int = 1,
    scale: float,
    splits: int | None = None,
    tile: int = 32,
    warps: int = 4,
    stages: int = 5,
) -> tuple[Tensor, Tensor]:
    """Attention of one token per row over the slots of its chosen pages, up to its own slot.

    q: ``[B, H, 1, D]``; k: ``[B, G, S, D]``; v: ``[B, G, S, E]`` (last axis contiguous). index: int32 ``[B, A, 1, K]`` page
    numbers, A = G or H, each at most once, below 0 = none. position: int32 ``[B]`` slot of the own token; page c holds the slots
    c * block .. (c + 1) * block - 1. Returns out ``[B, H, 1, E]`` and lse ``[B, H, 1]`` float32 (0 and -inf where nothing is
    read). Raises `InvalidInput`.
    """
    _rows(q, "gather_attention")
    b, h, _, d = q.shape
    g, e, a, count = k.shape[1], v.shape[3], index.shape[1], index.shape[3]
    if (
        h % g
        or k.shape[0] != b
        or v.shape[:3] != k.shape[:3]
        or k.shape[3] != d
        or k.stride(3) != 1
        or v.stride(3) != 1
    ):
        raise InvalidInput(f"gather_attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit")
    if a not in (g, h) or index.shape[:3] != (b, a, 1) or index.dtype != torch.int32:
        raise InvalidInput(
            f"gather_attention: expected index int32 [{b}, {g} or {h}, 1, K]; got {index.dtype} {tuple(index.shape)}"
        )
    r, index = h // a, index.contiguous()
    tile = max(16, min(tile, triton.next_power_of_2(count * block)))
    splits = splits or _splits(q, b * a, 4, triton.cdiv(count * block, tile))
    part = torch.empty(b * a * splits * r * e, dtype=torch.float32, device=q.device)
    lse = torch.empty(b * a * splits * r, dtype=torch.float32, device=q.device)
    out = torch.empty(b, h, 1, e, dtype=q.dtype, device=q.device)
    out_lse = torch.empty(b, h, 1, dtype=torch.float32, device=q.device)
    wide_d, wide_e = tiled(d, e, dtype=q.dtype)
    _gather[(b * a, splits)](
        q, k, v, index, position, part, lse, scale * LOG2E, a, g, r, splits, count, d, e,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), k.stride(2), v.stride(0), v.stride(1), v.stride(2),
        C=block, EVEN=(d, e) == (wide_d, wide_e), ROWS=max(16, triton.next_power_of_2(r)), BLOCK=tile, DP=wide_d, EP=wide_e,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    _merge[(b * h,)](part, lse, out, out_lse, r, splits, e, SP=triton.next_power_of_2(splits), EP=wide_e, num_warps=4)
    return out, out_lse


__all__ = ["gather_attention", "label_scores", "page_bounds", "page_scores", "select", "store", "token_label"]
