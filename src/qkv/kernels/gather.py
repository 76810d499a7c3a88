r"""Decode attention over chosen pages or tokens, read in place, and what chooses them.

    page_bounds    largest and smallest channels of the own page, as far as it is filled
    token_label    the label of the newest key, packed as the others are
    page_scores    u_p = max over the query heads of a KV head of  sum_c max(q_c lo_pc, q_c hi_pc)
    label_scores   s_m = sum over those heads of  <q[channels], label_m>,  labels of 16 bits or packed codes
    select         the own page, then the best of the older ones by an exact radix select; ties go to the lower number
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

PART = 4096  # pages that one program chooses from; longer rows are counted in parts, digit by digit


@triton.jit
def _gather(
    q_ptr, k_ptr, v_ptr, index_ptr, position_ptr, part_ptr, lse_ptr,
    scale2, A, G, R, S, K, C, D, E,
    q_b, q_h, k_b, k_g, k_c, v_b, v_g, v_c,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    """One split of one (row, choosing head): partial out [R, E] and its lse (base 2); R query heads share the choice."""
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
    for at in range(low, high, BLOCK):
        t = at + c
        page = tl.load(index_ptr + pair.to(tl.int64) * K + t // C, mask=t < high, other=-1)
        j = page * C + t % C
        live = (page >= 0) & (j <= newest)
        k = tl.load(
            k_base + j[None, :].to(tl.int64) * k_c + d[:, None], mask=live[None, :] & (d < D)[:, None], other=0.0
        )
        v = tl.load(
            v_base + j[:, None].to(tl.int64) * v_c + e[None, :], mask=live[:, None] & (e < E)[None, :], other=0.0
        )
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
def _page_scores(
    q_ptr, bounds_ptr, position_ptr, worth_ptr, G, R, P, C, D, q_b, q_h, b_b, b_g, b_p,
    PER_HEAD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """The bounds of a block of pages for the query heads of one KV head; pages from the own one on are not looked at."""
    pair, block = tl.program_id(0), tl.program_id(1)
    b, g = pair // G, pair % G
    own = tl.load(position_ptr + b) // C
    start = block * BLOCK
    if start < own:
        r, d, j = tl.arange(0, ROWS), tl.arange(0, DP), start + tl.arange(0, BLOCK)
        q_at = q_ptr + b.to(tl.int64) * q_b + (g * R + r)[:, None] * q_h + d[None, :]
        q = tl.load(q_at, mask=(r < R)[:, None] & (d < D)[None, :], other=0.0)
        zero = tl.zeros_like(q)
        at = bounds_ptr + b.to(tl.int64) * b_b + g.to(tl.int64) * b_g + j[None, :].to(tl.int64) * b_p + d[:, None]
        live = (j < own)[None, :] & (d < D)[:, None]
        high = tl.load(at, mask=live, other=0.0)
        low = tl.load(at + D, mask=live, other=0.0)
        u = tl.dot(tl.maximum(q, zero).to(q.dtype), high, input_precision="ieee")
        u = tl.dot(tl.minimum(q, zero).to(q.dtype), low, u, input_precision="ieee")  # [ROWS, BLOCK]
        if PER_HEAD:
            to = worth_ptr + (pair.to(tl.int64) * R + r)[:, None] * P + j[None, :]
            tl.store(to, u, mask=(r < R)[:, None] & (j < own)[None, :])
        else:
            best = tl.max(tl.where((r < R)[:, None], u, float("-inf")), 0)
            tl.store(worth_ptr + pair.to(tl.int64) * P + j, best, mask=j < own)


@triton.jit
def _label_scores(
    q_ptr, channels_ptr, labels_ptr, step_ptr, low_ptr, position_ptr, worth_ptr,
    G, R, L, P, q_b, q_h, l_b, l_g, l_p, s_b, s_g,
    BITS: tl.constexpr, ROWS: tl.constexpr, LP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Scores of a block of tokens; L channels. With fewer than 16 bits the query's labels are quantised per head as well."""
    pair, block = tl.program_id(0), tl.program_id(1)
    b, g = pair // G, pair % G
    newest = tl.load(position_ptr + b)
    start = block * BLOCK
    if start < newest:
        r, j = tl.arange(0, ROWS), start + tl.arange(0, BLOCK)
        live = j < newest
        base = labels_ptr + b.to(tl.int64) * l_b + g.to(tl.int64) * l_g + j[:, None].to(tl.int64) * l_p
        q_base = q_ptr + b.to(tl.int64) * q_b + (g * R + r)[:, None] * q_h
        if BITS == 16:
            c = tl.arange(0, LP)
            channel = tl.load(channels_ptr + pair.to(tl.int64) * L + c, mask=c < L, other=0)
            q = tl.load(q_base + channel[None, :], mask=(r < R)[:, None] & (c < L)[None, :], other=0.0).to(tl.float32)
            label = tl.load(base + c[None, :], mask=live[:, None] & (c < L)[None, :], other=0.0).to(tl.float32)
            score = tl.sum(label * tl.sum(q, 0)[None, :], 1)
        else:
            PER: tl.constexpr = 8 // BITS
            TOP: tl.constexpr = (1 << BITS) - 1
            w = tl.arange(0, LP)  # bytes
            least = tl.full((ROWS,), float("inf"), tl.float32)
            most = tl.full((ROWS,), float("-inf"), tl.float32)
            for i in tl.static_range(PER):
                c = w * PER + i
                channel = tl.load(channels_ptr + pair.to(tl.int64) * L + c, mask=c < L, other=0)
                q = tl.load(q_base + channel[None, :], mask=(r < R)[:, None], other=0.0).to(tl.float32)
                least = tl.minimum(least, tl.min(tl.where((c < L)[None, :], q, float("inf")), 1))
                most = tl.maximum(most, tl.max(tl.where((c < L)[None, :], q, float("-inf")), 1))
            unit = (most - least) / TOP
            unit = tl.where(unit == 0.0, 1.0, unit)
            data = tl.load(base + w[None, :], mask=live[:, None] & (w * PER < L)[None, :], other=0).to(tl.int32)
            score = tl.zeros((BLOCK,), tl.float32)
            total = 0.0
            for i in tl.static_range(PER):
                c = w * PER + i
                channel = tl.load(channels_ptr + pair.to(tl.int64) * L + c, mask=c < L, other=0)
                q = tl.load(q_base + channel[None, :], mask=(r < R)[:, None], other=0.0).to(tl.float32)
                q = tl.floor((q - least[:, None]) / unit[:, None] + 0.5) * unit[:, None] + least[:, None]
                q = tl.where((r < R)[:, None] & (c < L)[None, :], q, 0.0)
                mine = tl.sum(q, 0)  # [LP]
                total += tl.sum(mine, 0)
                code = (data >> (BITS * i)) & TOP
                score += tl.sum(code.to(tl.float32) * mine[None, :], 1)
            side = b.to(tl.int64) * s_b + g.to(tl.int64) * s_g + j
            step = tl.load(step_ptr + side, mask=live, other=0.0).to(tl.float32)
            low = tl.load(low_ptr + side, mask=live, other=0.0).to(tl.float32)
            score = score * step + low * total
        tl.store(worth_ptr + pair.to(tl.int64) * P + j, score, mask=live)


@triton.jit
def _keys_of(worth_ptr, row, j, live, C, sinks, first_recent):
    """Worth as unsigned integers of the same order; NaN is lowest, what must be read highest."""
    x = tl.load(worth_ptr + row + j, mask=live, other=0.0)
    x = tl.where(x == x, x, float("-inf"))
    bits = x.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) | -2147483648)
    key = tl.where((j * C < sinks) | (j >= first_recent), -1, key)
    return key.to(tl.uint32, bitcast=True)


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
def _select_short(
    worth_ptr, position_ptr, keep_ptr, index_ptr, A, P, K, C, sinks, recent, HAS_KEEP: tl.constexpr, CHUNK: tl.constexpr
):
    """The choice of one (row, choosing head) of at most CHUNK pages: own page first, then ascending, then -1."""
    pair = tl.program_id(0)
    own, many, keep, want, first_recent = _wanted(position_ptr, keep_ptr, pair // A, K, C, recent, HAS_KEEP)
    j = tl.arange(0, CHUNK)
    live = j < many
    key = _keys_of(worth_ptr, pair.to(tl.int64) * P, j, live, C, sinks, first_recent)
    more, same, left = live & (j < 0), live, want
    for stage in tl.static_range(4):
        digits = ((key >> (24 - 8 * stage)) & 255).to(tl.int32)
        digit, left = _digit(_counts(digits, same, CHUNK), left)
        more = more | (same & (digits > digit))
        same = same & (digits == digit)
    rank = tl.cumsum(same.to(tl.int32), 0) - 1
    take = (more | (same & (rank < left))).to(tl.int32)
    to = index_ptr + pair.to(tl.int64) * K
    at = tl.cumsum(take, 0)
    tl.store(to + at, j, mask=(take > 0) & (at < K))
    if keep > 0:
        tl.store(to, own)
    filled = tl.where(keep > 0, want + 1, 0)
    for start in range(0, K, CHUNK):
        tl.store(to + start + j, -1, mask=(start + j >= filled) & (start + j < K))


@triton.jit
def _select_count(
    worth_ptr, position_ptr, keep_ptr, counts_ptr, A, P, K, C, N, sinks, recent,
    STAGE: tl.constexpr, HAS_KEEP: tl.constexpr, CHUNK: tl.constexpr, NP: tl.constexpr,
):  # fmt: skip
    """How often each digit of a stage occurs in a part of CHUNK pages, among those that agree with the digits found before."""
    pair, part = tl.program_id(0), tl.program_id(1)
    _, many, _, want, first_recent = _wanted(position_ptr, keep_ptr, pair // A, K, C, recent, HAS_KEEP)
    bins, parts = tl.arange(0, 256), tl.arange(0, NP)
    base = counts_ptr + pair.to(tl.int64) * (4 * N * 256)
    j = part * CHUNK + tl.arange(0, CHUNK)
    same = j < many
    key = _keys_of(worth_ptr, pair.to(tl.int64) * P, j, same, C, sinks, first_recent)
    left = want
    for stage in tl.static_range(STAGE):
        at = base + (stage * N + parts)[:, None] * 256 + bins[None, :]
        digit, left = _digit(tl.sum(tl.load(at, mask=(parts < N)[:, None], other=0), 0), left)
        same = same & (((key >> (24 - 8 * stage)) & 255).to(tl.int32) == digit)
    digits = ((key >> (24 - 8 * STAGE)) & 255).to(tl.int32)
    tl.store(base + (STAGE * N + part) * 256 + bins, _counts(digits, same, CHUNK))


@triton.jit
def _select_emit(
    worth_ptr, position_ptr, keep_ptr, counts_ptr, index_ptr, A, P, K, C, N, sinks, recent,
    HAS_KEEP: tl.constexpr, CHUNK: tl.constexpr, NP: tl.constexpr,
):  # fmt: skip
    """Write what a part of CHUNK pages gives to the choice, behind what the parts before it give."""
    pair, part = tl.program_id(0), tl.program_id(1)
    own, many, keep, want, first_recent = _wanted(position_ptr, keep_ptr, pair // A, K, C, recent, HAS_KEEP)
    bins, parts = tl.arange(0, 256), tl.arange(0, NP)
    base = counts_ptr + pair.to(tl.int64) * (4 * N * 256)
    j = part * CHUNK + tl.arange(0, CHUNK)
    same = j < many
    key = _keys_of(worth_ptr, pair.to(tl.int64) * P, j, same, C, sinks, first_recent)
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


def page_scores(
    q: Tensor, bounds: Tensor, position: Tensor, *, block: int, per_head: bool = False, tile: int = 64, warps: int = 4
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
    worth = torch.empty(b, h if per_head else g, 1, p, dtype=torch.float32, device=q.device)
    _page_scores[(b * g, triton.cdiv(p, tile))](
        q, bounds, position, worth, g, h // g, p, block, d,
        q.stride(0), q.stride(1), bounds.stride(0), bounds.stride(1), bounds.stride(2),
        PER_HEAD=per_head, ROWS=max(16, triton.next_power_of_2(h // g)), BLOCK=tile,
        DP=max(16, triton.next_power_of_2(d)), num_warps=warps,
    )  # fmt: skip
    return worth


def label_scores(
    q: Tensor,
    channels: Tensor,
    labels: Tensor,
    position: Tensor,
    *,
    bits: int = 16,
    step: Tensor | None = None,
    low: Tensor | None = None,
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
    worth = torch.empty(b, g, 1, m, dtype=torch.float32, device=q.device)
    side = labels if step is None else step
    block = 256
    _label_scores[(b * g, triton.cdiv(m, block))](
        q, channels, labels, side, side if low is None else low, position, worth,
        g, h // g, r, m, q.stride(0), q.stride(1), labels.stride(0), labels.stride(1), labels.stride(2),
        side.stride(0), side.stride(1),
        BITS=bits, ROWS=triton.next_power_of_2(h // g), LP=triton.next_power_of_2(width), BLOCK=block, num_warps=4,
    )  # fmt: skip
    return worth


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
    worth, rows = worth.contiguous(), position if keep is None else keep
    chunk = max(32, min(PART, triton.next_power_of_2(p)))
    if p <= chunk:
        _select_short[(b * a,)](
            worth, position, rows, index, a, p, count, block, sinks, recent,
            HAS_KEEP=keep is not None, CHUNK=chunk, num_warps=8 if chunk > 1024 else 4,
        )  # fmt: skip
        return index
    while triton.cdiv(p, chunk) > 32:
        chunk *= 2
    parts = triton.cdiv(p, chunk)
    counts = torch.empty(b * a, 4, parts, 256, dtype=torch.int32, device=worth.device)
    more = {"HAS_KEEP": keep is not None, "CHUNK": chunk, "NP": triton.next_power_of_2(parts), "num_warps": 8}
    for stage in range(4):
        _select_count[(b * a, parts)](
            worth, position, rows, counts, a, p, count, block, parts, sinks, recent, STAGE=stage, **more
        )
    _select_emit[(b * a, parts)](worth, position, rows, counts, index, a, p, count, block, parts, sinks, recent, **more)
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
    tile: int = 64,
    warps: int = 4,
    stages: int = 3,
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
    if splits is None:
        units = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 4
        splits = max(1, min(128, triton.cdiv(4 * units, b * a), triton.cdiv(count * block, tile)))
    part = torch.empty(b * a * splits * r * e, dtype=torch.float32, device=q.device)
    lse = torch.empty(b * a * splits * r, dtype=torch.float32, device=q.device)
    out = torch.empty(b, h, 1, e, dtype=q.dtype, device=q.device)
    out_lse = torch.empty(b, h, 1, dtype=torch.float32, device=q.device)
    wide_d, wide_e = max(16, triton.next_power_of_2(d)), max(16, triton.next_power_of_2(e))
    _gather[(b * a, splits)](
        q, k, v, index, position, part, lse, scale * LOG2E, a, g, r, splits, count, block, d, e,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), k.stride(2), v.stride(0), v.stride(1), v.stride(2),
        ROWS=max(16, triton.next_power_of_2(r)), BLOCK=tile, DP=wide_d, EP=wide_e, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    _merge[(b * h,)](part, lse, out, out_lse, r, splits, e, SP=triton.next_power_of_2(splits), EP=wide_e, num_warps=4)
    return out, out_lse


__all__ = ["gather_attention", "label_scores", "page_bounds", "page_scores", "select", "token_label"]
