r"""Linear attention whose memory decays, on the GPU: forward, backward, states in and out, and one token at a time.

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T,     o_t = scale S_t^T q_t,     G = cumulative sum of g inside a chunk

One pass over the chunks carries the state in registers and writes the outputs; no state is stored. All five gradients are
that same pass with other operands. With W_ij = exp(G_i - G_j), j <= i, and one decay per token,

    o_i  = sum_{j <= i} (q_i . k_j)  W_ij v_j        forwards in time
    dq_i = sum_{j <= i} (do_i . v_j) W_ij k_j        forwards, S transposed
    dk_j = sum_{i >= j} (v_j . do_i) W_ij q_i        backwards, dS transposed
    dv_j = sum_{i >= j} (k_j . q_i)  W_ij do_i       backwards; its last state is the gradient of the first one

and dg_t, the sum of all later dG = sum_d (q dq - k dk), is never summed over more than one chunk, where its errors would add up.
What crosses a whole chunk is one product of states, what starts or ends in it a sum of its tokens:

    dg_t = exp(G_last) S_start . dS_end  +  sum_{j < t} k_j . dk_j(later chunks)  +  sum_{i >= t} q_i . dq_i(earlier chunks)
         + sum_{i >= t > j} (q_i . k_j) W_ij (do_i . v_j)                         t, i, j in the chunk

(S . dS per channel with a decay per channel): every sum holds only what really crosses t. The pass of dq writes S at the start
of each chunk, in the type of dot products, and the pass of dk multiplies it by its dS.

With a decay per channel, W sits on the channels that o and dv sum over, or on the channels of dq and dk (`_scan_each`, what
tokens of a chunk owe one another comes first from `_owed`). For o and dv, `_fold` writes q exp(G) and k exp(-G) once, and
`_scan_sum` is left with dot products: W_ij = exp(G_i) exp(-G_j) goes through the chunk's start while the chunk decays by no more
than `REACH` in all. Where the decay is stronger (the map of such a chunk is made by `_map`), the later half of a block reads the
earlier half through its own first row, and so on by halves down to single tokens: every exponent is <= 0 however strong the
decay, and all work is still dot products. When there are too few heads to fill the device, the sequence is cut into segments:
their states alone are summed first, in parts, `_settle` runs over those, and every segment starts from the right one.

Precision: sums in float32. bfloat16 operands stay bfloat16; float32, and float16 as float32, so that scores beyond 65504 do not
overflow, are multiplied as three tf32 products (``tf32x3``), near float32.
A computed map is never transposed: its transpose is computed from the loaded operands, since Triton 3.4 to 3.7.0 multiplies
the transpose of a product wrongly on Hopper. dq and dk round their maps alike, so that what a chunk owes itself cancels in dG.
Errors relative to the norm in bfloat16: about 3e-3 of everything, the gradient of the decay included, whatever N; see
benchmarks/linear_gpu.py and tests/test_decayed_kernels.py.

Bound: bytes of q, k, v, out (and gradients), each once; FLOPs 2 N C (D + E) + 4 N D E per head and pass. The backward pass of a
decay holds N / C states of D E elements per head for its duration: with D = E = 128 as many bytes as two of q.
Axes: B batch, H query heads, G key/value heads, N tokens, C chunk, D key width, E value width; K the width a pass sums over,
Z the width it writes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkv.core.errors import InvalidInput, Refused
from qkv.kernels.decode import interpreted
from qkv.kernels.widths import alike

WIDEST = 256
CHUNK = 64
REACH = tl.constexpr(60.0)  # exp(60) times what it multiplies is far from overflow, exp(-60) from what float32 drops
# Launch settings: `tile` channels of the output per program, `warps`, `stages` of load pipelining; `fill`: programs that a
# multiprocessor takes at once (a sequence is cut into segments as long as there is room); `split`: parts in which the state of a
# segment is summed beforehand; `rows` at a time; `whole`: see `_scanning`. benchmarks/linear_gpu.py --tune tries others.
LAUNCH: dict[str, dict[str, int]] = {
    "scan": {"tile": 128, "warps": 8, "stages": 2, "fill": 1, "split": 2},
    "weigh": {"tile": 64, "warps": 8, "stages": 2, "fill": 1},
    "sum": {"tile": 128, "warps": 8, "stages": 2, "fill": 1, "split": 2},
    "each": {"tile": 64, "warps": 8, "stages": 2, "fill": 1},
    "whole": {"tile": 32, "warps": 4, "stages": 2, "fill": 1},
    "fold": {"rows": 8, "warps": 1},
    "map": {"tile": 32, "warps": 4, "stages": 1},
    "owed": {"tile": 64, "warps": 8, "stages": 1},
    "suffix": {"tile": 64, "warps": 4, "stages": 1},
}


@triton.jit
def _falling(x):
    """exp(x), with x that rounding pushed above 0 (or that a mask will drop) held at 0."""
    return tl.exp(tl.minimum(x, 0.0))


@triton.jit
def _apart(product, x):
    """The sum. As an operand of the product, x would be made in its layout, which 8 warps and 64 rows do not share."""
    return tl.fma(product, tl.full(product.shape, 1.0, tl.float32), x)


@triton.jit
def _tile(ptr, r, c, stride, rows, columns):
    """Rows r, columns c of a matrix whose rows are `stride` apart, 0 outside; with r along the second axis, its transpose."""
    return tl.load(ptr + r * stride + c, mask=(r < rows) & (c < columns), other=0.0)


@triton.jit(do_not_specialize=["H", "N", "pairs", "parts", "per", "x_r", "y_r", "z_r", "w_r"])
def _scan(
    x_ptr, y_ptr, z_ptr, g_ptr, w_ptr, start_ptr, out_ptr, weighed_ptr, held_ptr, carry_ptr, end_ptr, rate_ptr,
    scale_in, scale_out, H, N, KW, ZW, pairs, parts, per,
    x_b, x_h, x_n, x_r, y_b, y_h, y_n, y_r, z_b, z_h, z_n, z_r, g_b, g_h, g_n, w_b, w_h, w_n, w_r,
    DECAY: tl.constexpr, BACK: tl.constexpr, WEIGH: tl.constexpr, ENDS: tl.constexpr, START: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr, K: tl.constexpr, Z: tl.constexpr,
):  # fmt: skip
    """out_i = sum_j (x_i . y_j) W_ij z_j over j <= i (BACK: j >= i), one decay per token or none; grid (tiles, B H, parts).

    Starts from one state per part (START, else from zero). WEIGH: also write sum_z w out per token, without the token's own
    share, which dq and dk have in common and their difference is better off without; and hold the state at the start of each
    chunk, or (BACK) write the carry of each chunk: those states times the ones of this pass, plus the part of the sums that comes
    from other chunks. ENDS: only the state of each part, from zero, and what the part leaves of an earlier state. BACK counts
    chunks and parts from the end.
    """
    tile, pair, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = (pair // H).to(tl.int64), pair % H
    x_ptr += b * x_b + (h // x_r).to(tl.int64) * x_h
    y_ptr += b * y_b + (h // y_r).to(tl.int64) * y_h
    z_ptr += b * z_b + (h // z_r).to(tl.int64) * z_h
    w_ptr += b * w_b + (h // w_r).to(tl.int64) * w_h
    g_ptr += b * g_b + h.to(tl.int64) * g_h
    out_ptr += pair.to(tl.int64) * N * ZW
    weighed_ptr += (tile.to(tl.int64) * pairs + pair) * N
    chunks = tl.cdiv(N, C)
    held_ptr += pair.to(tl.int64) * chunks * KW * ZW
    carry_ptr += (tile.to(tl.int64) * pairs + pair) * chunks
    r, kk, zz = tl.arange(0, C), tl.arange(0, K), tile * Z + tl.arange(0, Z)
    inside = (kk < KW)[:, None] & (zz < ZW)[None, :]
    spots = kk[:, None] * ZW + zz[None, :]
    s = tl.zeros((K, Z), tl.float32)
    if START:
        s += tl.load(start_ptr + (pair.to(tl.int64) * parts + part) * KW * ZW + spots, mask=inside, other=0.0)
    scale = scale_in * scale_out
    left = 0.0
    for step in range(part * per, tl.minimum(part * per + per, chunks)):
        c = step
        if BACK:
            c = chunks - 1 - step
        low = (c * C).to(tl.int64)
        rows = (N - c * C).to(tl.int32)
        yt = _tile(y_ptr + low * y_n, r[None, :], kk[:, None], y_n, rows, KW).to(DT)
        z = _tile(z_ptr + low * z_n, r[:, None], zz[None, :], z_n, rows, ZW).to(DT)
        if DECAY:
            g = tl.load(g_ptr + low * g_n + r * g_n, mask=r < rows, other=0.0).to(tl.float32)
            total = tl.cumsum(g, 0)
            last = tl.sum(g, 0)
            before, after = tl.exp(total), _falling(last - total)  # to the chunk's start, to its end
            left += last
        if not ENDS:
            x = _tile(x_ptr + low * x_n, r[:, None], kk[None, :], x_n, rows, KW).to(DT)
            p = tl.dot(x, yt, input_precision=PRECISION)
            inter = tl.dot(x, s.to(DT), input_precision=PRECISION)
            if DECAY:
                if BACK:
                    inter = inter * (after * scale_out)[:, None]
                    p = tl.where(r[:, None] <= r[None, :], p * _falling(total[None, :] - total[:, None]), 0.0)
                else:
                    inter = inter * (before * scale_out)[:, None]
                    p = tl.where(r[:, None] >= r[None, :], p * _falling(total[:, None] - total[None, :]), 0.0)
            else:
                inter = inter * scale_out
                if BACK:
                    p = tl.where(r[:, None] <= r[None, :], p, 0.0)
                else:
                    p = tl.where(r[:, None] >= r[None, :], p, 0.0)
            fits = (r < rows)[:, None] & (zz < ZW)[None, :]
            if WEIGH:
                own = tl.sum(tl.where(r[:, None] == r[None, :], p, 0.0), 1)
                p = tl.where(r[:, None] == r[None, :], 0.0, p)
                out = tl.dot(p.to(DT), z, input_precision=PRECISION) * scale + inter
                w = _tile(w_ptr + low * w_n, r[:, None], zz[None, :], w_n, rows, ZW).to(tl.float32)
                tl.store(weighed_ptr + low + r, tl.sum(w * out, 1), mask=r < rows)
                spot = held_ptr + c.to(tl.int64) * KW * ZW + spots
                if BACK:
                    held = tl.load(spot, mask=inside, other=0.0).to(tl.float32)
                    across = tl.sum(tl.sum(held * s, 1), 0) * tl.exp(last)
                    tl.store(carry_ptr + c, across + tl.sum(tl.sum(w * inter, 1), 0))
                else:
                    tl.store(spot, s.to(held_ptr.dtype.element_ty), mask=inside)
                out += (own * scale)[:, None] * z.to(tl.float32)
            else:
                out = tl.dot(p.to(DT), z, input_precision=PRECISION) * scale + inter
            tl.store(out_ptr + low * ZW + r[:, None] * ZW + zz[None, :], out.to(out_ptr.dtype.element_ty), mask=fits)
        if DECAY:
            if BACK:
                z = (z.to(tl.float32) * (before * scale_in)[:, None]).to(DT)
            else:
                z = (z.to(tl.float32) * after[:, None]).to(DT)
            s = tl.dot(yt, z, s * tl.exp(last), input_precision=PRECISION)
        elif BACK:
            s += tl.dot(yt, z, input_precision=PRECISION) * scale_in
        else:
            s = tl.dot(yt, z, s, input_precision=PRECISION)
    if ENDS:
        tl.store(end_ptr + (pair.to(tl.int64) * parts + part) * KW * ZW + spots, s, mask=inside)
        if tile == 0:
            tl.store(rate_ptr + pair * parts + part, tl.exp(left))
    else:
        if part == parts - 1:
            tl.store(end_ptr + pair.to(tl.int64) * KW * ZW + spots, s, mask=inside)


@triton.jit(do_not_specialize=["parts", "split"])
def _settle(
    end_ptr, rate_ptr, state_ptr, start_ptr, KW, ZW, parts, split, r_pair, r_part, r_k, r_z,
    START: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """States that segments of `split` parts start from, of what each part adds and leaves; grid (blocks of the state, B H).

    START: the first starts from `state`, else from zero.
    """
    block, pair = tl.program_id(0), tl.program_id(1)
    at = block * SIZE + tl.arange(0, SIZE)
    inside = at < KW * ZW
    rate_ptr += pair.to(tl.int64) * r_pair + (at // ZW) * r_k + (at % ZW) * r_z
    end_ptr += pair.to(tl.int64) * parts * KW * ZW + at
    start_ptr += pair.to(tl.int64) * (parts // split + 1) * KW * ZW + at
    s = tl.zeros((SIZE,), tl.float32)
    if START:
        s += tl.load(state_ptr + pair.to(tl.int64) * KW * ZW + at, mask=inside, other=0.0)
    tl.store(start_ptr, s, mask=inside)
    for part in tl.range(0, parts, num_stages=4):
        added = tl.load(end_ptr + part * KW * ZW, mask=inside, other=0.0)
        s = s * tl.load(rate_ptr + part * r_part, mask=inside, other=0.0) + added
        if (part + 1) % split == 0:
            tl.store(start_ptr + (part + 1) // split * KW * ZW, s, mask=inside)


@triton.jit(do_not_specialize=["H", "N", "k_r"])
def _fold(
    q_ptr, k_ptr, g_ptr, late_ptr, early_ptr, total_ptr, last_ptr, scale, H, N, DW,
    q_b, q_h, q_n, k_b, k_h, k_n, k_r, g_b, g_h, g_n,
    KEEP: tl.constexpr, C: tl.constexpr, R: tl.constexpr, Z: tl.constexpr,
):  # fmt: skip
    """What decays per channel become once and for all, chunk by chunk, R rows at a time; grid (chunks, B H).

    late: scale q exp(G); early: k exp(-G), or k exp(G_last - G) where the chunk decays by `REACH` or more; last: G_last; total: G
    of the chunks that do (KEEP: of all). Past the last token q and k are 0 and G stays as it is.
    """
    c, pair = tl.program_id(0), tl.program_id(1)
    b, h, low = (pair // H).to(tl.int64), pair % H, (c * C).to(tl.int64)
    r, d = tl.arange(0, R)[:, None], tl.arange(0, Z)
    g_ptr += b * g_b + h.to(tl.int64) * g_h + low * g_n
    q_ptr += b * q_b + h.to(tl.int64) * q_h + low * q_n
    k_ptr += b * k_b + (h // k_r).to(tl.int64) * k_h + low * k_n
    chunk = pair.to(tl.int64) * tl.num_programs(0) + c
    late_ptr += chunk * C * DW
    early_ptr += chunk * C * DW
    total_ptr += chunk * C * DW
    rows = N - c * C
    last = tl.zeros((Z,), tl.float32)
    for at in range(0, C, R):
        g = _tile(g_ptr, at + r, d[None, :], g_n, rows, DW).to(tl.float32)
        q = _tile(q_ptr, at + r, d[None, :], q_n, rows, DW).to(tl.float32)
        k = _tile(k_ptr, at + r, d[None, :], k_n, rows, DW).to(tl.float32)
        total = tl.cumsum(g, 0) + last[None, :]
        last += tl.sum(g, 0)
        spot, inside = (at + r) * DW + d[None, :], (r < R) & (d < DW)[None, :]
        tl.store(late_ptr + spot, (q * (tl.exp(total) * scale)).to(late_ptr.dtype.element_ty), mask=inside)
        tl.store(early_ptr + spot, (k * tl.exp(tl.minimum(-total, REACH))).to(early_ptr.dtype.element_ty), mask=inside)
        if KEEP:
            tl.store(total_ptr + spot, total, mask=inside)
    tl.store(last_ptr + chunk * DW + d, last, mask=d < DW)
    if -tl.min(last, 0) >= REACH:
        before = tl.zeros((Z,), tl.float32)
        for at in range(0, C, R):
            g = _tile(g_ptr, at + r, d[None, :], g_n, rows, DW).to(tl.float32)
            k = _tile(k_ptr, at + r, d[None, :], k_n, rows, DW).to(tl.float32)
            total = tl.cumsum(g, 0) + before[None, :]
            before += tl.sum(g, 0)
            spot, inside = (at + r) * DW + d[None, :], (r < R) & (d < DW)[None, :]
            k *= _falling(last[None, :] - total)
            tl.store(early_ptr + spot, k.to(early_ptr.dtype.element_ty), mask=inside)
            tl.store(total_ptr + spot, total, mask=inside)


@triton.jit
def _crossing(
    q, kt, total, total_t, total_ptr, r, d, DW,
    DT: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """The part of the map in which the later half of a block of 2 HALF tokens reads the earlier half, through its first row."""
    i, j = r[:, None], r[None, :]
    first = (r // (2 * HALF)) * (2 * HALF) + HALF
    through = _tile(total_ptr, first[:, None], d[None, :], DW, C, DW)
    through_t = _tile(total_ptr, first[None, :], d[:, None], DW, C, DW)
    late = (q * _falling(total - through)).to(DT)
    early = (kt * _falling(through_t - total_t)).to(DT)
    part = tl.dot(late, early, input_precision=PRECISION)
    return tl.where(_below(i, j, HALF), part, 0.0)


@triton.jit
def _below(i, j, HALF: tl.constexpr):
    """Token i in the later and j in the earlier half of the same block of 2 HALF tokens."""
    return (i // (2 * HALF) == j // (2 * HALF)) & (i % (2 * HALF) >= HALF) & (j % (2 * HALF) < HALF)


@triton.jit(do_not_specialize=["H", "N", "k_r"])
def _map(
    q_ptr, k_ptr, total_ptr, last_ptr, map_ptr, scale, H, N, DW, q_b, q_h, q_n, k_b, k_h, k_n, k_r,
    LEVELS: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr, Z: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """The map, scale sum_d q_id k_jd exp(G_id - G_jd), j <= i, of one chunk by halves of halves; grid (chunks, B H).

    Only where the chunk decays by `REACH` or more.
    """
    c, pair = tl.program_id(0), tl.program_id(1)
    chunk = pair.to(tl.int64) * tl.num_programs(0) + c
    dd = tl.arange(0, DP)
    if -tl.min(tl.load(last_ptr + chunk * DW + dd, mask=dd < DW, other=0.0), 0) < REACH:
        return
    b, h = (pair // H).to(tl.int64), pair % H
    low, rows = (c * C).to(tl.int64), N - c * C
    q_ptr += b * q_b + h.to(tl.int64) * q_h + low * q_n
    k_ptr += b * k_b + (h // k_r).to(tl.int64) * k_h + low * k_n
    total_ptr += chunk * C * DW
    r = tl.arange(0, C)
    i, j = r[:, None], r[None, :]
    out = tl.zeros((C, C), tl.float32)
    own = tl.zeros((C,), tl.float32)
    for at in range(0, DP, Z):
        d = at + tl.arange(0, Z)
        q = _tile(q_ptr, i, d[None, :], q_n, rows, DW).to(tl.float32)
        k = _tile(k_ptr, i, d[None, :], k_n, rows, DW).to(tl.float32)
        kt = _tile(k_ptr, j, d[:, None], k_n, rows, DW).to(tl.float32)
        total = _tile(total_ptr, i, d[None, :], DW, C, DW)
        total_t = _tile(total_ptr, j, d[:, None], DW, C, DW)
        own += tl.sum(q * k, 1)
        for level in tl.static_range(LEVELS):
            out += _crossing(q, kt, total, total_t, total_ptr, r, d, DW, DT, PRECISION, C, C >> (level + 1))
    out += tl.where(i == j, own[:, None], 0.0)
    map_ptr += chunk * C * C
    tl.store(map_ptr + i * C + j, (out * scale).to(map_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["H", "N", "parts", "per", "z_r"])
def _scan_sum(
    x_ptr, y_ptr, z_ptr, last_ptr, map_ptr, start_ptr, out_ptr, end_ptr, rate_ptr,
    H, N, KW, ZW, parts, per, z_b, z_h, z_n, z_r,
    BACK: tl.constexpr, ENDS: tl.constexpr, START: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr, K: tl.constexpr, Z: tl.constexpr,
):  # fmt: skip
    """As `_scan`, with a decay per channel that is summed over: out and dv, of x and y that `_fold` made.

    The map is their product where the chunk decays by less than `REACH`, and read where it does not. There early holds the
    decay to the chunk's end; elsewhere the state takes it.
    """
    tile, pair, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = (pair // H).to(tl.int64), pair % H
    chunks = tl.cdiv(N, C)
    x_ptr += pair.to(tl.int64) * chunks * C * KW
    y_ptr += pair.to(tl.int64) * chunks * C * KW
    z_ptr += b * z_b + (h // z_r).to(tl.int64) * z_h
    last_ptr += pair.to(tl.int64) * chunks * KW
    map_ptr += pair.to(tl.int64) * chunks * C * C
    out_ptr += pair.to(tl.int64) * N * ZW
    r, kk, zz = tl.arange(0, C), tl.arange(0, K), tile * Z + tl.arange(0, Z)
    inside = (kk < KW)[:, None] & (zz < ZW)[None, :]
    spots = kk[:, None] * ZW + zz[None, :]
    s = tl.zeros((K, Z), tl.float32)
    if START:
        s += tl.load(start_ptr + (pair.to(tl.int64) * parts + part) * KW * ZW + spots, mask=inside, other=0.0)
    left = tl.zeros((K,), tl.float32)
    for step in range(part * per, tl.minimum(part * per + per, chunks)):
        c = step
        if BACK:
            c = chunks - 1 - step
        low = (c * C).to(tl.int64)
        rows = (N - c * C).to(tl.int32)
        yt = _tile(y_ptr + low * KW, r[None, :], kk[:, None], KW, C, KW).to(DT)
        z = _tile(z_ptr + low * z_n, r[:, None], zz[None, :], z_n, rows, ZW).to(DT)
        last = tl.load(last_ptr + c * KW + kk, mask=kk < KW, other=0.0)
        left += last
        reach, rate = -tl.min(last, 0), tl.exp(last)
        first = tl.where(kk * 0 + reach >= REACH, rate, 1.0)[:, None]
        then = tl.where(kk * 0 + reach >= REACH, 1.0, rate)[:, None]
        if BACK:
            s = s * then
        if not ENDS:
            x = _tile(x_ptr + low * KW, r[:, None], kk[None, :], KW, C, KW).to(DT)
            inter = tl.dot(x, s.to(DT), input_precision=PRECISION)
            p = tl.dot(x, yt, input_precision=PRECISION)
            strong = (r * 0 + reach >= REACH)[:, None]
            if BACK:
                far = tl.load(map_ptr + low * C + r[None, :] * C + r[:, None], mask=strong, other=0.0)
                p = tl.where(r[:, None] <= r[None, :], tl.where(strong, far.to(tl.float32), p), 0.0)
            else:
                far = tl.load(map_ptr + low * C + r[:, None] * C + r[None, :], mask=strong, other=0.0)
                p = tl.where(r[:, None] >= r[None, :], tl.where(strong, far.to(tl.float32), p), 0.0)
            out = _apart(tl.dot(p.to(DT), z, input_precision=PRECISION), inter)
            fits = (r < rows)[:, None] & (zz < ZW)[None, :]
            tl.store(out_ptr + low * ZW + r[:, None] * ZW + zz[None, :], out.to(out_ptr.dtype.element_ty), mask=fits)
        s = tl.dot(yt, z, s * first, input_precision=PRECISION)
        if not BACK:
            s = s * then
    if ENDS:
        tl.store(end_ptr + (pair.to(tl.int64) * parts + part) * KW * ZW + spots, s, mask=inside)
        if tile == 0:
            tl.store(rate_ptr + (pair * parts + part) * KW + kk, tl.exp(left), mask=kk < KW)
    else:
        if part == parts - 1:
            tl.store(end_ptr + pair.to(tl.int64) * KW * ZW + spots, s, mask=inside)


@triton.jit
def _through(total, total_ptr, r, d, DW, C: tl.constexpr, HALF: tl.constexpr):
    """What is left between each token and the first row of the later half of its block: to a later token, from an earlier one."""
    first = (r // (2 * HALF)) * (2 * HALF) + HALF
    through = _tile(total_ptr, first[:, None], d[None, :], DW, C, DW)
    return _falling(total - through), _falling(through - total)


@triton.jit
def _shares(q, k, late, early, a, a_t, DT: tl.constexpr, PRECISION: tl.constexpr):
    """What tokens related by `a` give to dq and dk, and q dq - k dk with q and k as the products round them."""
    ql, ke = (q * late).to(DT), (k * early).to(DT)
    to_q = tl.dot(a, ke, input_precision=PRECISION)
    to_k = tl.dot(a_t, ql, input_precision=PRECISION)
    return late * to_q, early * to_k, ql.to(tl.float32) * to_q - ke.to(tl.float32) * to_k


@triton.jit(do_not_specialize=["H", "N", "room", "k_r", "v_r"])
def _owed(
    q_ptr, k_ptr, v_ptr, grad_ptr, total_ptr, dq_ptr, dk_ptr, own_ptr, slope_ptr, scale, H, N, DW, EW, room,
    q_b, q_h, q_n, k_b, k_h, k_n, k_r, v_b, v_h, v_n, v_r, do_b, do_h, do_n,
    STRONG: tl.constexpr, LEVELS: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
    C: tl.constexpr, Z: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """Gradients of q and k that come from other tokens of the same chunk, decay per channel; grid (chunks, B H, tiles).

    own: what a token owes to itself, do . v, times k in dq and times q in dk. slope: q dq - k dk of the others, with q and k as
    the products round them, so that it sums to 0 over the chunk. STRONG: channels that decay by `REACH` or more, else the others.
    """
    c, pair, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = (pair // H).to(tl.int64), pair % H
    low, rows = (c * C).to(tl.int64), N - c * C
    q_ptr += b * q_b + h.to(tl.int64) * q_h + low * q_n
    k_ptr += b * k_b + (h // k_r).to(tl.int64) * k_h + low * k_n
    v_ptr += b * v_b + (h // v_r).to(tl.int64) * v_h + low * v_n
    grad_ptr += b * do_b + h.to(tl.int64) * do_h + low * do_n
    total_ptr += (pair.to(tl.int64) * room + low) * DW
    r, d = tl.arange(0, C), tile * Z + tl.arange(0, Z)
    reach = -tl.min(tl.load(total_ptr + (C - 1) * DW + d, mask=d < DW, other=0.0), 0)
    if (reach >= REACH) != STRONG:
        return
    i, j = r[:, None], r[None, :]
    owed, owed_t = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)  # query i, key j; and key i, query j
    own = tl.zeros((C,), tl.float32)
    for at in range(0, KP, K):
        e = at + tl.arange(0, K)
        v = _tile(v_ptr, i, e[None, :], v_n, rows, EW).to(DT)
        do = _tile(grad_ptr, i, e[None, :], do_n, rows, EW).to(DT)
        vt = _tile(v_ptr, j, e[:, None], v_n, rows, EW).to(DT)
        do_t = _tile(grad_ptr, j, e[:, None], do_n, rows, EW).to(DT)
        owed += tl.dot(do, vt, input_precision=PRECISION)
        owed_t += tl.dot(v, do_t, input_precision=PRECISION)
        own += tl.sum(v.to(tl.float32) * do.to(tl.float32), 1)
    q = _tile(q_ptr, i, d[None, :], q_n, rows, DW).to(tl.float32)
    k = _tile(k_ptr, i, d[None, :], k_n, rows, DW).to(tl.float32)
    total = _tile(total_ptr, i, d[None, :], DW, C, DW)
    dq, dk, slope = tl.zeros((C, Z), tl.float32), tl.zeros((C, Z), tl.float32), tl.zeros((C, Z), tl.float32)
    if not STRONG:
        late, early = tl.exp(total), tl.exp(-total)
        a, a_t = tl.where(i > j, owed, 0.0).to(DT), tl.where(j > i, owed_t, 0.0).to(DT)
        dq, dk, slope = _shares(q, k, late, early, a, a_t, DT, PRECISION)
    else:
        for level in tl.static_range(LEVELS):
            late, early = _through(total, total_ptr, r, d, DW, C, C >> (level + 1))
            a = tl.where(_below(i, j, C >> (level + 1)), owed, 0.0).to(DT)
            a_t = tl.where(_below(j, i, C >> (level + 1)), owed_t, 0.0).to(DT)
            to_q, to_k, rise = _shares(q, k, late, early, a, a_t, DT, PRECISION)
            dq, dk, slope = dq + to_q, dk + to_k, slope + rise
    at = (pair.to(tl.int64) * N + low) * DW
    fits = (i < rows) & (d < DW)[None, :]
    tl.store(dq_ptr + at + i * DW + d[None, :], dq * scale, mask=fits)
    tl.store(dk_ptr + at + i * DW + d[None, :], dk * scale, mask=fits)
    tl.store(slope_ptr + at + i * DW + d[None, :], slope * scale, mask=fits)
    if tile == 0:
        tl.store(own_ptr + pair.to(tl.int64) * N + low + r, own * scale, mask=r < rows)


@triton.jit(do_not_specialize=["H", "N", "parts", "per", "x_r", "y_r", "z_r", "w_r"])
def _scan_each(
    x_ptr, y_ptr, z_ptr, w_ptr, total_ptr, owed_ptr, own_ptr, slope_ptr, start_ptr, out_ptr, held_ptr, carry_ptr, end_ptr,
    rate_ptr,
    scale_in, scale_out, H, N, KW, ZW, parts, per,
    x_b, x_h, x_n, x_r, y_b, y_h, y_n, y_r, z_b, z_h, z_n, z_r, w_b, w_h, w_n, w_r,
    BACK: tl.constexpr, ENDS: tl.constexpr, START: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr, K: tl.constexpr, Z: tl.constexpr,
):  # fmt: skip
    """As `_scan`, with a decay per channel of the output: dq, then (BACK) dk, each on top of what `_owed` wrote.

    dq adds q dq to `slope` and holds its states; dk takes k dk away and writes the carry of each chunk. See `_scan`.
    """
    tile, pair, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = (pair // H).to(tl.int64), pair % H
    x_ptr += b * x_b + (h // x_r).to(tl.int64) * x_h
    y_ptr += b * y_b + (h // y_r).to(tl.int64) * y_h
    z_ptr += b * z_b + (h // z_r).to(tl.int64) * z_h
    w_ptr += b * w_b + (h // w_r).to(tl.int64) * w_h
    chunks = tl.cdiv(N, C)
    total_ptr += pair.to(tl.int64) * chunks * C * ZW
    flat = pair.to(tl.int64) * N * ZW
    r, kk, zz = tl.arange(0, C), tl.arange(0, K), tile * Z + tl.arange(0, Z)
    inside = (kk < KW)[:, None] & (zz < ZW)[None, :]
    spots = kk[:, None] * ZW + zz[None, :]
    s = tl.zeros((K, Z), tl.float32)
    if START:
        s += tl.load(start_ptr + (pair.to(tl.int64) * parts + part) * KW * ZW + spots, mask=inside, other=0.0)
    left = tl.zeros((Z,), tl.float32)
    for step in range(part * per, tl.minimum(part * per + per, chunks)):
        c = step
        if BACK:
            c = chunks - 1 - step
        low = (c * C).to(tl.int64)
        rows = (N - c * C).to(tl.int32)
        yt = _tile(y_ptr + low * y_n, r[None, :], kk[:, None], y_n, rows, KW).to(DT)
        z = _tile(z_ptr + low * z_n, r[:, None], zz[None, :], z_n, rows, ZW).to(tl.float32)
        total = _tile(total_ptr + low * ZW, r[:, None], zz[None, :], ZW, C, ZW)
        last = tl.load(total_ptr + (low + C - 1) * ZW + zz, mask=zz < ZW, other=0.0)
        left += last
        before, after = tl.exp(total), _falling(last[None, :] - total)
        if not ENDS:
            x = _tile(x_ptr + low * x_n, r[:, None], kk[None, :], x_n, rows, KW).to(DT)
            inter = tl.dot(x, s.to(DT), input_precision=PRECISION)
            spot = flat + low * ZW + r[:, None] * ZW + zz[None, :]
            fits = (r < rows)[:, None] & (zz < ZW)[None, :]
            out = tl.load(owed_ptr + spot, mask=fits, other=0.0)
            w = _tile(w_ptr + low * w_n, r[:, None], zz[None, :], w_n, rows, ZW).to(tl.float32)
            slope = tl.load(slope_ptr + spot, mask=fits, other=0.0)
            held_at = held_ptr + (pair.to(tl.int64) * chunks + c) * KW * ZW + spots
            if BACK:
                held = tl.load(held_at, mask=inside, other=0.0).to(tl.float32)
                inter = inter * after * scale_out
                fall = w * inter
                slope -= fall
                carry = tl.sum(held * s, 0) * tl.exp(last) + tl.sum(fall, 0)
                tl.store(carry_ptr + (pair.to(tl.int64) * chunks + c) * ZW + zz, carry, mask=zz < ZW)
            else:
                tl.store(held_at, s.to(held_ptr.dtype.element_ty), mask=inside)
                inter = inter * before * scale_out
                slope += w * inter
            out += inter
            tl.store(slope_ptr + spot, slope, mask=fits)
            own = tl.load(own_ptr + pair.to(tl.int64) * N + low + r, mask=r < rows, other=0.0)
            out += own[:, None] * z
            tl.store(out_ptr + spot, out.to(out_ptr.dtype.element_ty), mask=fits)
        if BACK:
            z = z * (before * scale_in)
        else:
            z = z * after
        s = tl.dot(yt, z.to(DT), s * tl.exp(last)[None, :], input_precision=PRECISION)
    if ENDS:
        tl.store(end_ptr + (pair.to(tl.int64) * parts + part) * KW * ZW + spots, s, mask=inside)
        tl.store(rate_ptr + (pair * parts + part) * ZW + zz, tl.exp(left), mask=zz < ZW)


@triton.jit(do_not_specialize=["N"])
def _suffix(slope_ptr, carry_ptr, out_ptr, N, ZW, C: tl.constexpr, Z: tl.constexpr):
    """dg: the sum of dG over a token and the later ones of its chunk, plus the carry of the chunk; grid (chunks, B H, tiles)."""
    c, pair, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    r, d = tl.arange(0, C)[:, None], tile * Z + tl.arange(0, Z)
    at = (pair.to(tl.int64) * N + c * C) * ZW
    fits = (r < N - c * C) & (d < ZW)[None, :]
    slope = tl.load(slope_ptr + at + r * ZW + d[None, :], mask=fits, other=0.0)
    carry = tl.load(carry_ptr + (pair.to(tl.int64) * tl.num_programs(0) + c) * ZW + d, mask=d < ZW, other=0.0)
    out = tl.cumsum(slope, 0, reverse=True) + carry[None, :]
    tl.store(out_ptr + at + r * ZW + d[None, :], out.to(out_ptr.dtype.element_ty), mask=fits)


@triton.jit(do_not_specialize=["N", "pairs", "tiles"])
def _suffix_one(rise_ptr, fall_ptr, carry_ptr, out_ptr, N, pairs, tiles, C: tl.constexpr):
    """As `_suffix`, one decay per token: the sums over channels lie in tiles; grid (chunks, B H)."""
    c, pair = tl.program_id(0), tl.program_id(1)
    r, low = tl.arange(0, C), c * C
    slope = tl.zeros((C,), tl.float32)
    carry = 0.0
    for tile in range(tiles):
        row = (tile * pairs + pair).to(tl.int64)
        at = row * N + low + r
        slope += tl.load(rise_ptr + at, mask=r < N - low, other=0.0) - tl.load(
            fall_ptr + at, mask=r < N - low, other=0.0
        )
        carry += tl.load(carry_ptr + row * tl.num_programs(0) + c)
    out = tl.cumsum(slope, 0, reverse=True) + carry
    tl.store(out_ptr + pair.to(tl.int64) * N + low + r, out.to(out_ptr.dtype.element_ty), mask=r < N - low)


@triton.jit(do_not_specialize=["H", "k_r", "v_r"])
def _token(
    q_ptr, k_ptr, v_ptr, g_ptr, state_ptr, out_ptr, new_ptr, scale, H, KW, ZW,
    q_b, q_h, k_b, k_h, k_r, v_b, v_h, v_r, g_b, g_h, s_b, s_h, s_k, s_z,
    DECAY: tl.constexpr, EACH: tl.constexpr, K: tl.constexpr, Z: tl.constexpr,
):  # fmt: skip
    """One token: the state is read once, written once, and the output leaves with it; grid (tiles, B H)."""
    tile, pair = tl.program_id(0), tl.program_id(1)
    b, h = (pair // H).to(tl.int64), pair % H
    kk, zz = tl.arange(0, K), tile * Z + tl.arange(0, Z)
    inside = (kk < KW)[:, None] & (zz < ZW)[None, :]
    s_at = state_ptr + b * s_b + h.to(tl.int64) * s_h + kk[:, None] * s_k + zz[None, :] * s_z
    s = tl.load(s_at, mask=inside, other=0.0)
    q = tl.load(q_ptr + b * q_b + h * q_h + kk, mask=kk < KW, other=0.0).to(tl.float32)
    k = tl.load(k_ptr + b * k_b + (h // k_r) * k_h + kk, mask=kk < KW, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + b * v_b + (h // v_r) * v_h + zz, mask=zz < ZW, other=0.0).to(tl.float32)
    if DECAY:
        g_at = g_ptr + b * g_b + h * g_h
        if EACH:
            s = s * tl.exp(tl.load(g_at + kk, mask=kk < KW, other=0.0).to(tl.float32))[:, None]
        else:
            s = s * tl.exp(tl.load(g_at).to(tl.float32))
    s += k[:, None] * v[None, :]
    out = tl.sum(s * q[:, None], 0) * scale
    tl.store(out_ptr + pair * ZW + zz, out.to(out_ptr.dtype.element_ty), mask=zz < ZW)
    tl.store(new_ptr + pair.to(tl.int64) * KW * ZW + kk[:, None] * ZW + zz[None, :], s, mask=inside)


# -- launches ------------------------------------------------------------------------------------------------------------

_ARITHMETIC: dict[torch.dtype, tuple[Any, str]] = {
    torch.bfloat16: (tl.bfloat16, "tf32"),
    torch.float16: (tl.float32, "tf32x3"),
    torch.float32: (tl.float32, "tf32x3"),
}


def _arithmetic(dtype: torch.dtype) -> tuple[Any, str]:
    """Type and precision of dot products. Triton's interpreter multiplies the bits of bfloat16 as integers: it gets float32."""
    if dtype == torch.bfloat16 and interpreted():
        return tl.float32, "ieee"
    return _ARITHMETIC[dtype]


def _ceil(a: int, b: int) -> int:
    """Division rounded up; `triton.cdiv` takes microseconds."""
    return -(-a // b)


def _wide(width: int) -> int:
    """Channels of a tile that holds `width`, at least 32."""
    return max(32, 1 << (width - 1).bit_length())


def _across(made: dict[str, int], kw: int, zw: int, dtype: torch.dtype) -> tuple[int, int]:
    """Channels (K, Z) of a program's tiles, `alike` but for "whole": what is loaded ahead has an address of its own."""
    k, z = _wide(kw), min(_wide(zw), made["tile"])
    if made is not LAUNCH["whole"]:
        k, z = alike(k, z, size=2 if _arithmetic(dtype)[0] == tl.bfloat16 else 4)
    return k, z


def _settings(name: str, dtype: torch.dtype, width: int) -> dict[str, int]:
    """Launch settings; operands of 32 bits, wide heads (shared memory) and narrow ones ask for tiles of 32, with 8 warps."""
    made = LAUNCH[name]
    if dtype == torch.bfloat16 and 32 < width <= 128:
        return made
    return made | {"tile": min(made["tile"], 32), "stages": 1, "warps": 8, "fill": 2}


def _scanning(name: str, read: tuple[Tensor, ...], kw: int, zw: int, pairs: int) -> dict[str, int]:
    """Settings of a pass over `pairs` heads that reads these tensors: narrow tiles where these fill the device with whole
    sequences, in one launch, and Triton loads ahead (vectors that begin at multiples of 16).
    """
    made, whole, units = _settings(name, read[0].dtype, kw), LAUNCH["whole"], _units(read[0].device)
    one = pairs * _ceil(zw, made["tile"]) < units <= pairs * _ceil(zw, whole["tile"])
    if not one or made is not LAUNCH[name] or kw % 16 or zw % 16:
        return made
    even = all(x.data_ptr() % 16 == 0 and all(step % 16 == 0 for step in x.stride()[:3]) for x in read)
    return whole if even else made


def _shared(x: Tensor, heads: int) -> tuple[int, int, int, int]:
    """Strides of batch, head and token, and how many query heads share a head of x."""
    return x.stride(0), x.stride(1), x.stride(2), heads // x.shape[1]


@functools.cache
def _units(device: torch.device) -> int:
    """Multiprocessors."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _segments(fill: int, programs: int, chunks: int, device: torch.device) -> tuple[int, int]:
    """(segments, chunks per segment): as many as `fill` programs per multiprocessor allow, none shorter than eight chunks."""
    segments = max(1, min(fill * _units(device) // programs, chunks // 8))
    per = _ceil(chunks, segments)
    return _ceil(chunks, per), per


class _Launch(NamedTuple):
    """One launch of a pass over `parts` stretches of `per` chunks each."""

    parts: int
    per: int
    grid: tuple[int, int, int]
    start: Tensor
    end: Tensor
    rate: Tensor
    flags: dict[str, Any]


def _in_segments(
    launch: Callable[[_Launch], None], state: Tensor | None, blank: Tensor, sizes: tuple[int, int, int, int],
    wide: tuple[int, int], made: dict[str, int], dtype: torch.dtype,
) -> None:  # fmt: skip
    """A pass over (pairs, chunks, K, Z) in segments: their states first, where there are several, and then every one from its
    own.

    blank: where the pass leaves its last state, and what stands for tensors that a launch has no use for; wide: (K, Z) of the
    rates, 1 where all channels share one; dtype: of the operands.
    """
    pairs, chunks, kw, zw = sizes
    across, tile = _across(made, kw, zw, dtype)
    tiles = _ceil(zw, tile)
    dot, precision = _arithmetic(dtype)
    how: dict[str, Any] = {
        "DT": dot, "PRECISION": precision, "C": CHUNK, "K": across, "Z": tile, "num_warps": made["warps"],
        "num_stages": made["stages"],
    }  # fmt: skip
    segments, per = _segments(made["fill"], tiles * pairs, chunks, blank.device)
    start = state
    if segments > 1:
        split = made.get("split", 1)
        split = split if per % split == 0 else 1
        parts = (segments - 1) * split  # nothing starts from the end of the last
        ends, rates = blank.new_empty(pairs, parts, kw, zw), blank.new_empty(pairs, parts, *wide)
        alone = {"START": False, "ENDS": True} | how
        launch(_Launch(parts, per // split, (tiles, pairs, parts), blank, ends, rates, alone))
        start, size = blank.new_empty(pairs, segments, kw, zw), 1024
        _settle[(_ceil(kw * zw, size), pairs)](
            ends, rates, state if state is not None else ends, start, kw, zw, parts, split, parts * wide[0] * wide[1],
            wide[0] * wide[1], wide[1] if wide[0] > 1 else 0, 1 if wide[1] > 1 else 0,
            START=state is not None, SIZE=size, num_warps=4,
        )  # fmt: skip
    flags = {"START": start is not None, "ENDS": False} | how
    launch(_Launch(segments, per, (tiles, pairs, segments), blank if start is None else start, blank, blank, flags))


def _run_scan(
    x: Tensor, y: Tensor, z: Tensor, g: Tensor | None, state: Tensor | None, *, heads: int, scale: float, back: bool,
    dtype: torch.dtype, weigh: Tensor | None = None, held: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`_scan` over a sequence: out ``[B, H, N, Z]`` in `dtype` and the last state ``[B, H, K, Z]``.

    With weigh, also its sums with out ``[tiles, B H, N]`` and (back) the carries ``[tiles, B H, chunks]``.
    """
    b, n, kw, zw = x.shape[0], x.shape[2], x.shape[3], z.shape[3]
    name = "scan" if weigh is None else "weigh"
    pairs, chunks = b * heads, _ceil(n, CHUNK)
    made = _scanning(name, (x, y, z), kw, zw, pairs) if weigh is None else _settings(name, x.dtype, kw)
    tiles = _ceil(zw, _across(made, kw, zw, x.dtype)[1])
    fresh = {"device": x.device, "dtype": torch.float32}
    out, end = x.new_empty(b, heads, n, zw, dtype=dtype), torch.empty(b, heads, kw, zw, **fresh)
    sums = end if weigh is None else torch.empty(tiles, pairs, n, **fresh)
    carry = end if weigh is None or not back else torch.empty(tiles, pairs, chunks, **fresh)
    gate, w = g if g is not None else x, weigh if weigh is not None else x
    fade = gate.stride()[:3] if g is not None else (0, 0, 0)
    first = _shared(x, heads)
    strides = *first, *_shared(y, heads), *_shared(z, heads), *fade, *(first if weigh is None else _shared(w, heads))

    def launch(run: _Launch) -> None:
        ends = run.flags["ENDS"]
        _scan[run.grid](
            x, y, z, gate, w, run.start, out, sums, held if held is not None and not ends else end, carry, run.end, run.rate,
            scale if back else 1.0, 1.0 if back else scale, heads, n, kw, zw, pairs, run.parts, run.per, *strides,
            DECAY=g is not None, BACK=back, WEIGH=weigh is not None and not ends, **run.flags,
        )  # fmt: skip

    _in_segments(launch, state, end, (pairs, chunks, kw, zw), (1, 1), made, x.dtype)
    return out, end, sums, carry


def _run_sum(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    last: Tensor,
    chunk_map: Tensor,
    state: Tensor | None,
    *,
    back: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`_scan_sum` over a sequence: out ``[B, H, N, Z]`` in `dtype` and the last state ``[B, H, K, Z]``."""
    b, heads, chunks, kw = last.shape
    n, zw, pairs = z.shape[2], z.shape[3], b * heads
    made = _scanning("sum", (z,), kw, zw, pairs)
    out = z.new_empty(b, heads, n, zw, dtype=dtype)
    end = torch.empty(b, heads, kw, zw, device=z.device, dtype=torch.float32)

    def launch(run: _Launch) -> None:
        _scan_sum[run.grid](
            x, y, z, last, chunk_map, run.start, out, run.end, run.rate, heads, n, kw, zw, run.parts, run.per,
            *_shared(z, heads), BACK=back, **run.flags,
        )  # fmt: skip

    _in_segments(launch, state, end, (pairs, chunks, kw, zw), (kw, 1), made, z.dtype)
    return out, end


def _run_each(
    x: Tensor, y: Tensor, z: Tensor, weigh: Tensor, total: Tensor, owed: Tensor, own: Tensor, slope: Tensor, held: Tensor,
    carry: Tensor, state: Tensor | None, *, heads: int, scale: float, back: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`_scan_each` over a sequence: dq or (back) dk ``[B, H, N, Z]`` in `dtype`; `slope`, `held`, then `carry` are written."""
    b, n, kw, zw = x.shape[0], x.shape[2], x.shape[3], z.shape[3]
    made, pairs, chunks = _settings("each", x.dtype, kw), b * heads, _ceil(n, CHUNK)
    out = x.new_empty(b, heads, n, zw, dtype=dtype)

    def launch(run: _Launch) -> None:
        _scan_each[run.grid](
            x, y, z, weigh, total, owed, own, slope, run.start, out, held, carry, run.end, run.rate,
            scale if back else 1.0, 1.0 if back else scale, heads, n, kw, zw, run.parts, run.per,
            *_shared(x, heads), *_shared(y, heads), *_shared(z, heads), *_shared(weigh, heads), BACK=back, **run.flags,
        )  # fmt: skip

    _in_segments(launch, state, total, (pairs, chunks, kw, zw), (1, zw), made, x.dtype)
    return out


def _run_fold(
    q: Tensor, k: Tensor, decay: Tensor, scale: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `_fold` and `_map` make: late, early, G ``[B, H, chunks C, D]``, G_last ``[B, H, chunks, D]``, maps ``[.., C, C]``.

    G (unless `keep`) and the maps are those of strong chunks alone; late, early and maps have the type that dot products take.
    """
    b, h, n, d = q.shape
    chunks, made, width = _ceil(n, CHUNK), _settings("map", q.dtype, d), _wide(d)
    dot, precision = _arithmetic(q.dtype)
    kind = q.dtype if dot == tl.bfloat16 else torch.float32
    late, early = (torch.empty(b, h, chunks * CHUNK, d, dtype=kind, device=q.device) for _ in range(2))
    total = torch.empty(b, h, chunks * CHUNK, d, dtype=torch.float32, device=q.device)
    last = torch.empty(b, h, chunks, d, dtype=torch.float32, device=q.device)
    chunk_map = torch.empty(b, h, chunks * CHUNK, CHUNK, dtype=kind, device=q.device)
    _fold[(chunks, b * h)](
        q, k, decay, late, early, total, last, scale, h, n, d, *q.stride()[:3], *_shared(k, h), *decay.stride()[:3],
        KEEP=keep, C=CHUNK, R=LAUNCH["fold"]["rows"], Z=width, num_warps=LAUNCH["fold"]["warps"],
    )  # fmt: skip
    _map[(chunks, b * h)](
        q, k, total, last, chunk_map, scale, h, n, d, *q.stride()[:3], *_shared(k, h),
        LEVELS=CHUNK.bit_length() - 1, DT=dot, PRECISION=precision, C=CHUNK, Z=min(width, made["tile"]), DP=width,
        num_warps=made["warps"], num_stages=made["stages"],
    )  # fmt: skip
    return late, early, total, last, chunk_map


def _states(q: Tensor, chunks: int, k: int, z: int) -> Tensor:
    """Room for the state before every chunk ``[B H, chunks, K, Z]``, in the type that dot products take."""
    kind = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32
    return torch.empty(q.shape[0] * q.shape[1], chunks, k, z, dtype=kind, device=q.device)


def _transposed(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.mT.contiguous()


def _rows(x: Tensor) -> Tensor:
    """Itself, with channels next to one another, as the kernels read them."""
    return x if x.stride(-1) == 1 else x.contiguous()


_FORWARD = "(Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor? state, float scale) -> (Tensor, Tensor)"
_BACKWARD = (
    "(Tensor grad, Tensor grad_end, Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor? state, float scale,"
    " bool gated) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _forward_run(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    q, k, v = (_rows(x) for x in (q, k, v))
    state = None if state is None else state.contiguous()
    h = q.shape[1]
    if decay is None or decay.shape[3] == 1:
        return _run_scan(q, k, v, decay, state, heads=h, scale=scale, back=False, dtype=q.dtype)[:2]
    late, early, _, last, chunk_map = _run_fold(q, k, _rows(decay), scale, False)
    return _run_sum(late, early, v, last, chunk_map, state, back=False, dtype=q.dtype)


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, decay: Any, state: Any, scale: float) -> tuple[Tensor, Tensor]:
    b, h, n, d = q.shape
    return q.new_empty(b, h, n, v.shape[3]), q.new_empty(b, h, d, v.shape[3], dtype=torch.float32)


_forward = torch.library.custom_op("qkv::decayed", _forward_run, mutates_args=(), schema=_FORWARD)
_forward.register_fake(_forward_fake)


@torch.library.custom_op("qkv::decayed_backward", mutates_args=(), schema=_BACKWARD)
def _backward(
    grad: Tensor, grad_end: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None,
    scale: float, gated: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v, grad = (_rows(x) for x in (q, k, v, grad))
    heads = q.shape[1]
    state = None if state is None else state.contiguous()
    grad_end = grad_end.contiguous()
    wide = {
        g: q.dtype if g == heads else torch.float32 for g in (k.shape[1], v.shape[1])
    }  # shared heads are summed below
    how: dict[str, Any] = {"heads": heads, "scale": scale}
    if decay is None or decay.shape[3] == 1:
        dq, dk, dg = _shared_decay(grad, grad_end, q, k, v, decay, state, scale, wide[k.shape[1]], gated)
        dv, ds, _, _ = _run_scan(k, q, grad, decay, grad_end, **how, back=True, dtype=wide[v.shape[1]])
    else:
        late, early, total, last, chunk_map = _run_fold(q, k, _rows(decay), scale, True)
        dv, ds = _run_sum(early, late, grad, last, chunk_map, grad_end, back=True, dtype=wide[v.shape[1]])
        del late, early, chunk_map
        dq, dk, dg = _channels(grad, grad_end, q, k, v, total, state, scale, wide[k.shape[1]], decay.dtype)
    return dq, _summed(dk, k), _summed(dv, v), dg, ds if state is not None else q.new_empty(0)


def _shared_decay(
    grad: Tensor, grad_end: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None,
    scale: float, dtype: torch.dtype, gated: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk (one per query head) and dg (empty unless gated) where the channels of a token share one decay, or have none."""
    b, h, n, d = q.shape
    chunks = _ceil(n, CHUNK)
    how: dict[str, Any] = {"heads": h, "scale": scale}
    back, start, end = {"back": True, "dtype": dtype}, _transposed(state), _transposed(grad_end)
    if decay is None or not gated:
        dq, *_ = _run_scan(grad, v, k, decay, start, **how, back=False, dtype=q.dtype)
        dk, *_ = _run_scan(v, grad, q, decay, end, **how, **back)
        return dq, dk, q.new_empty(0)
    held = _states(q, chunks, v.shape[3], d)
    dq, _, rise, _ = _run_scan(grad, v, k, decay, start, **how, back=False, dtype=q.dtype, weigh=q, held=held)
    dk, _, fall, carry = _run_scan(v, grad, q, decay, end, **how, **back, weigh=k, held=held)
    return dq, dk, _run_suffix_one(rise, fall, carry, decay.dtype).view(b, h, n, 1)


def _channels(
    grad: Tensor, grad_end: Tensor, q: Tensor, k: Tensor, v: Tensor, total: Tensor, state: Tensor | None, scale: float,
    dtype: torch.dtype, gate: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk (one per query head) and dg where every channel has its own decay."""
    b, h, n, d = q.shape
    chunks = _ceil(n, CHUNK)
    owed_q, owed_k, slope, own = _owing(grad, q, k, v, total, scale)
    held = _states(q, chunks, v.shape[3], d)
    carry = torch.empty(b, h, chunks, d, dtype=torch.float32, device=q.device)
    both = (slope, held, carry)
    how: dict[str, Any] = {"heads": h, "scale": scale}
    dq = _run_each(grad, v, k, q, total, owed_q, own, *both, _transposed(state), **how, back=False, dtype=q.dtype)
    dk = _run_each(v, grad, q, k, total, owed_k, own, *both, _transposed(grad_end), **how, back=True, dtype=dtype)
    return dq, dk, _run_suffix(slope, carry, gate)


def _owing(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, total: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_owed` over a sequence: the shares in dq and dk and their slope ``[B, H, N, D]``, and own ``[B, H, N]``, float32."""
    b, h, n, d = q.shape
    chunks, made = _ceil(n, CHUNK), _settings("owed", q.dtype, d)
    dot, precision = _arithmetic(q.dtype)
    owed_q, owed_k, slope = (torch.empty(b, h, n, d, dtype=torch.float32, device=q.device) for _ in range(3))
    own, width = torch.empty(b, h, n, dtype=torch.float32, device=q.device), _wide(v.shape[3])
    across, tile = _across(made, min(64, width), d, q.dtype)
    for strong in (False, True):
        _owed[(chunks, b * h, _ceil(d, tile))](
            q, k, v, grad, total, owed_q, owed_k, own, slope, scale, h, n, d, v.shape[3], chunks * CHUNK,
            *q.stride()[:3], *_shared(k, h), *_shared(v, h), *grad.stride()[:3],
            STRONG=strong, LEVELS=CHUNK.bit_length() - 1, DT=dot, PRECISION=precision,
            C=CHUNK, Z=tile, K=across, KP=width, num_warps=made["warps"], num_stages=made["stages"],
        )  # fmt: skip
    return owed_q, owed_k, slope, own


def _run_suffix_one(rise: Tensor, fall: Tensor, carry: Tensor, dtype: torch.dtype) -> Tensor:
    """`_suffix_one` over a sequence: dg ``[B H, N]`` from the sums of both passes ``[tiles, B H, N]``."""
    tiles, pairs, n = rise.shape
    dg = torch.empty(pairs, n, dtype=dtype, device=rise.device)
    _suffix_one[(_ceil(n, CHUNK), pairs)](rise, fall, carry, dg, n, pairs, tiles, C=CHUNK, num_warps=1)
    return dg


def _run_suffix(slope: Tensor, carry: Tensor, dtype: torch.dtype) -> Tensor:
    """`_suffix` over a sequence: dg ``[B, H, N, D]``."""
    b, h, n, d = slope.shape
    dg, tile = torch.empty(b, h, n, d, dtype=dtype, device=slope.device), min(_wide(d), LAUNCH["suffix"]["tile"])
    _suffix[(_ceil(n, CHUNK), b * h, _ceil(d, tile))](
        slope, carry, dg, n, d, C=CHUNK, Z=tile, num_warps=LAUNCH["suffix"]["warps"]
    )
    return dg


def _summed(x: Tensor, like: Tensor) -> Tensor:
    """The gradient of a head that several query heads share: the sum over them."""
    if x.shape[1] == like.shape[1]:
        return x
    return x.unflatten(1, (like.shape[1], -1)).sum(2).to(like.dtype)


@_backward.register_fake
def _(
    grad: Tensor, grad_end: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Any, state: Any, scale: float, gated: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    dg = decay.new_empty(decay.shape) if decay is not None and (gated or decay.shape[3] > 1) else q.new_empty(0)
    return dq, dk, dv, dg, q.new_empty(0) if state is None else state.new_empty(state.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, decay, state, scale = inputs
    ctx.save_for_backward(q, k, v, decay, state)
    ctx.scale = scale


def _gradients(ctx: Any, grad: Tensor, grad_end: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, decay, state = ctx.saved_tensors
    gated = decay is not None and ctx.needs_input_grad[3]
    dq, dk, dv, dg, ds = torch.ops.qkv.decayed_backward(grad, grad_end, q, k, v, decay, state, ctx.scale, gated)
    return dq, dk, dv, dg if gated else None, ds if state is not None else None, None


_forward.register_autograd(_gradients, setup_context=_keep)

# Without gradients the way through the dispatcher is a third as long for ops that have no autograd kernel.
_PLAIN = torch.library.Library("qkv", "FRAGMENT")


def _plain(name: str, schema: str, run: Any, fake: Any) -> None:
    """An op ``qkv::name`` that makes no gradient."""
    _PLAIN.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _PLAIN.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qkv::{name}", fake, lib=_PLAIN)


_plain("decayed_plain", _FORWARD, _forward_run, _forward_fake)


def _one(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = (_rows(x) for x in (q, k, v))
    decay = None if decay is None else _rows(decay)
    b, h, _, d = q.shape
    e = v.shape[3]
    out, new = q.new_empty(b, h, 1, e), torch.empty(b, h, d, e, dtype=torch.float32, device=q.device)
    tile = min(_wide(e), 32)
    _token[(_ceil(e, tile), b * h)](
        q, k, v, decay if decay is not None else q, state, out, new, scale, h, d, e,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), h // k.shape[1], v.stride(0), v.stride(1), h // v.shape[1],
        decay.stride(0) if decay is not None else 0, decay.stride(1) if decay is not None else 0, *state.stride(),
        DECAY=decay is not None, EACH=decay is not None and decay.shape[3] > 1, K=_wide(d), Z=tile, num_warps=4,
    )  # fmt: skip
    return out, new


_plain(
    "decayed_token",
    "(Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor state, float scale) -> (Tensor, Tensor)",
    _one,
    _forward_fake,
)


def _check(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None) -> None:
    (b, h, n, d), e, g = q.shape, v.shape[3], k.shape[1]
    if not q.is_cuda and not interpreted():
        raise Refused(
            f"the decayed kernels run on CUDA devices; q lies on {q.device}: use the torch forms there "
            "(form='fast' of an operator, form='chunked' of the core)"
        )
    if q.dtype not in _ARITHMETIC or k.dtype != q.dtype or v.dtype != q.dtype:
        raise InvalidInput(
            f"the decayed kernels take q, k, v in one of bfloat16, float16, float32; got {q.dtype}, {k.dtype}, "
            f"{v.dtype}: cast them, or use the torch forms"
        )
    if k.shape != (b, g, n, d) or v.shape[:3] != (b, g, n) or h % g or n < 1:
        raise InvalidInput(
            f"the decayed kernels take q [B, H, N, D], k [B, G, N, D], v [B, G, N, E] with N >= 1 and G dividing H; got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if max(d, e) > WIDEST:
        raise InvalidInput(
            f"the decayed kernels hold heads of at most {WIDEST} channels; got D={d}, E={e}: use the torch forms"
        )
    if decay is not None and decay.shape not in ((b, h, n, 1), (b, h, n, d)):
        raise InvalidInput(f"decay has shape {tuple(decay.shape)}; expected {(b, h, n, 1)} or {(b, h, n, d)}")
    if state is not None and state.shape != (b, h, d, e):
        raise InvalidInput(f"the state to start from has shape {tuple(state.shape)}; expected {(b, h, d, e)}")


def decayed(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Causal linear attention with decay, differentiable once: the op ``qkv::decayed`` (without gradients ``decayed_plain``).

    q: ``[B, H, N, D]``; k: ``[B, G, N, D]``; v: ``[B, G, N, E]``, all bfloat16, float16 or float32, D and E at most 256.
    decay: natural logs <= 0, ``[B, H, N, 1]`` or ``[B, H, N, D]``, or None. state: ``[B, H, D, E]`` or None. Returns out
    ``[B, H, N, E]`` in q's dtype and the state after the last token, float32. One token that asks for no gradient takes the fused
    step. Raises `InvalidInput`, and `Refused` off CUDA.
    """
    _check(q, k, v, decay, state)
    state = None if state is None else state.float()
    given = [x for x in (q, k, v, decay, state) if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        return torch.ops.qkv.decayed(q, k, v, decay, state, scale)
    if q.shape[2] == 1:
        start = state if state is not None else q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3], dtype=torch.float32)
        return torch.ops.qkv.decayed_token(q, k, v, decay, start, scale)
    return torch.ops.qkv.decayed_plain(q, k, v, decay, state, scale)
