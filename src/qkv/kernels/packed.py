r"""Decode attention that reads quantised keys and values from their packed words, and the store of the token it decoded.

    k^_jd = code_jd s_{j/group, d} + z_{j/group, d},   v^_je = code_je s_{j, e/group} + z_{j, e/group}
    out_h = sum_{j <= L} softmax_j(scale q_h . k^_j) v^_j

One new token per row; its row stored L tokens before. Of these the first L - (L mod R) keys and the first max(0, L - R) values
are codes, the others lie in rings of R slots (position p in slot p mod R) in full precision, as the new token is. Codes are
taken out of their words in registers: no dequantised cache exists in memory. The run of whole blocks of codes is split over
programs; a few more per row and KV head read what is left, the rings and the new token. L comes from the device; shapes and
launches never change, so that both calls can be captured in a CUDA graph. Bound: bytes of words, scales and zeros.

Queries of 16 bits meet the codes as planes. A unit is half a word; lane i of all units is an operand of its own, so that a unit
goes from memory into the registers of the tensor core's operand and its codes never change threads. Two units that are
neighbours along the sum share a register; (code | 0x6400) is the float16 1024 + code. A program is one warp: none waits.

Element j of a word sits at bits j * bits. Keys: words ``[B, G, C / group, D, group * bits / 32]`` along the tokens of a group,
scales and zeros ``[B, G, C / group, D]``. Values: words ``[B, G, C, E * bits / 32]`` along channels, scales and zeros
``[B, G, C, E / group]``. Word counts are rounded up.

Axes: B batch, H query heads, G key/value heads, C capacity, D head width, E value width, S splits, R residual.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkv.core.errors import InvalidInput
from qkv.kernels.decode import LOG2E, _merge, interpreted
from qkv.kernels.widths import tiled


@triton.jit
def _fractions(words, one, BITS: tl.constexpr, LANES: tl.constexpr):
    """1 + code / 2^BITS as float32 for the LANES codes of each word (new last axes of 2, a word stays with its thread).

    A code is turned to the top of the mantissa of a 1: neither a conversion nor a subtraction is spent on it. one: the bits
    of 1.0, as a value that is not known to the compiler, which would otherwise load one of two constants anew for every code.
    """
    x = words.to(tl.uint32, bitcast=True)
    x = (x << (23 - BITS)) | (x >> (9 + BITS))
    for i in tl.static_range(4):
        if LANES >> (i + 1) > 0:
            x = tl.join(x, (x >> ((LANES >> (i + 1)) * BITS)) | (x << (32 - (LANES >> (i + 1)) * BITS)))
    return ((x & ((2**BITS - 1) << (23 - BITS))) | one).to(tl.float32, bitcast=True)


@triton.jit
def _plain(x):
    """The matrix x [., ., 1]. A sum over one element is no instruction, and hides the joins above from the compiler.

    Where it sees a join before a dot, Triton 3.6 (and 3.9) deals the operand out in another order, and every sixth
    instruction of the loop is a move.
    """
    return tl.sum(x, 2)


@triton.jit
def _coded_keys(
    codes, scale, zero, one, at, groups, D: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    DP: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """Keys [DP, BLOCK] float32 of the tokens `at` (a multiple of GROUP) and on; 0 beyond `groups` where CHECK."""
    WORDS: tl.constexpr = (GROUP * BITS + 31) // 32
    LANES: tl.constexpr = GROUP // WORDS
    COUNT: tl.constexpr = BLOCK // GROUP
    d, n = tl.arange(0, DP)[:, None], at // GROUP + tl.arange(0, COUNT)[None, :]
    live = d < D
    if CHECK:
        live = live & (n < groups)
    place = n * D + d  # [DP, COUNT]
    s = tl.load(scale + place, mask=live, other=0.0).to(tl.float32) * 2**BITS
    z = tl.load(zero + place, mask=live, other=0.0).to(tl.float32) - s
    w = tl.arange(0, WORDS)[None, None, :]
    words = tl.load(codes + place[:, :, None] * WORDS + w, mask=live[:, :, None], other=0)  # [DP, COUNT, WORDS]
    x = tl.reshape(_fractions(words, one, BITS, LANES), (DP, COUNT, GROUP))
    return _plain(tl.reshape(x * s[:, :, None] + z[:, :, None], (DP, BLOCK, 1)))


@triton.jit
def _coded_values(
    codes, scale, zero, one, at, done, E: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    EP: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """Values [BLOCK, EP] float32 of the tokens `at` and on; 0 from `done` on where CHECK."""
    PER: tl.constexpr = 32 // BITS
    WORDS: tl.constexpr = (E + PER - 1) // PER
    t, w, n = at + tl.arange(0, BLOCK)[:, None], tl.arange(0, EP // PER)[None, :], tl.arange(0, EP // GROUP)[None, :]
    some, held = w < WORDS, n < E // GROUP
    if CHECK:
        some, held = some & (t < done), held & (t < done)
    s = tl.load(scale + t * (E // GROUP) + n, mask=held, other=0.0).to(tl.float32) * 2**BITS
    z = tl.load(zero + t * (E // GROUP) + n, mask=held, other=0.0).to(tl.float32) - s
    words = tl.load(codes + t * WORDS + w, mask=some, other=0)
    x = tl.reshape(_fractions(words, one, BITS, PER), (BLOCK, EP // GROUP, GROUP))
    return _plain(tl.reshape(x * s[:, :, None] + z[:, :, None], (BLOCK, EP, 1)))


@triton.jit
def _fold(q, k, v, live, top, total, out, scale2, CHECK: tl.constexpr):
    """One block of keys [DP, BLOCK] and values [BLOCK, EP] into the running softmax."""
    s = tl.dot(q, k, input_precision="ieee") * scale2  # [ROWS, BLOCK], in units of log2
    if CHECK:
        s = tl.where(live[None, :], s, float("-inf"))
    new = tl.maximum(top, tl.max(s, 1))
    p, fade = tl.exp2(s - new[:, None]), tl.exp2(top - new)
    total = total * fade[:, None] + p  # summed over tokens at the end
    return new, total, out * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")


@triton.constexpr_function
def _take(bits, lane):
    """PTX: code `lane` of the two units in $1 as the halves of a register, times the halves of $2, plus those of $3."""
    shift, low = lane * bits // 8 * 8, lane * bits % 8
    mask = (((1 << bits) - 1) << low) * 0x10001
    size, back = ((15 - low) << 10) * 0x10001, ((1 << 15) | ((25 - low) << 10)) * 0x10001  # 2^-low and -2^(10 - low)
    return (
        f"{{ .reg .b32 x, y, z; shr.u32 x, $1, {shift}; lop3.b32 x, x, {mask}, 0x64006400, 0xea; mov.b32 y, {size}; "
        f"mov.b32 z, {back}; fma.rn.f16x2 x, x, y, z; fma.rn.f16x2 $0, x, $2, $3; }}"
    )


@triton.jit
def _plane(units, scale, zero, LANE: tl.constexpr, BITS: tl.constexpr, PLAIN: tl.constexpr):
    """Lane LANE of each unit: code scale + zero as float16. PLAIN: without the assembler, which the interpreter lacks."""
    if PLAIN:
        code = (units.to(tl.int32) >> (LANE * BITS)) & (2**BITS - 1)
        return (code.to(tl.float32) * scale.to(tl.float32) + zero.to(tl.float32)).to(tl.float16)
    else:
        return tl.inline_asm_elementwise(_take(BITS, LANE), "=r,r,r,r", [units, scale, zero], tl.float16, True, 2)


@triton.jit
def _spread(x, TIMES: tl.constexpr):
    """[M, N] to [M, N TIMES], every column TIMES times. A view: it keeps the way to the operand free of moves."""
    return tl.reshape(tl.broadcast_to(x[:, :, None], (x.shape[0], x.shape[1], TIMES)), (x.shape[0], x.shape[1] * TIMES))


@triton.jit
def _value_ranges(
    scale, t, LANE: tl.constexpr, E: tl.constexpr, PER: tl.constexpr, GROUP: tl.constexpr, EP: tl.constexpr
):
    """Scales (or zeros) [., EP / PER] of the channels in lane LANE of each unit, for the tokens t [., 1]."""
    if GROUP >= PER:
        n = tl.arange(0, EP // GROUP)[None, :]
        return _spread(tl.load(scale + t * (E // GROUP) + n, mask=n < E // GROUP, other=0.0), GROUP // PER)
    else:
        e = tl.arange(0, EP // PER)[None, :] * PER + LANE
        return tl.load(scale + t * (E // GROUP) + e // GROUP, mask=e < E, other=0.0)


@triton.jit
def _planes(
    q, key_units, key_scale, key_zero, value_units, value_scale, value_zero, low, high, scale2,
    D: tl.constexpr, E: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, GROUP: tl.constexpr, UNITS: tl.constexpr,
    DP: tl.constexpr, EP: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """(top [ROWS], total [ROWS, UNITS], one [ROWS, EP / PER] of the sum for every lane) of the tokens low to high, whole steps.

    q: [ROWS, DP] in 16 bits. A step is as many tokens as UNITS units of keys hold; token LANES u + j is lane j of unit u.
    """
    STRIDE: tl.constexpr = (GROUP * K_BITS + 31) // 32 * 2
    PARTS: tl.constexpr = (GROUP * K_BITS + 15) // 16  # units of a group
    LANES: tl.constexpr = GROUP // PARTS
    PAIR: tl.constexpr = (
        16 // UNITS if UNITS < 16 else 1
    )  # planes that sum over values together: their tensor cores want 16
    PER: tl.constexpr = 16 // V_BITS
    V_STRIDE: tl.constexpr = (E * V_BITS + 31) // 32 * 2
    d, n, x = tl.arange(0, DP)[:, None], tl.arange(0, UNITS // PARTS)[None, :], tl.arange(0, UNITS)
    w = tl.arange(0, EP // PER)[None, :]
    size = tl.max(tl.abs(q.to(tl.float32)), 1)
    size = tl.maximum((size.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True), 2.0**-100)
    q = (q.to(tl.float32) / size[:, None]).to(tl.float16)  # exact: divided by a power of two
    size = size * scale2
    top = tl.full((q.shape[0],), float("-inf"), tl.float32)
    total = tl.zeros((q.shape[0], UNITS), tl.float32)
    out = ()
    for i in tl.static_range(PER):
        out = out + (tl.zeros((q.shape[0], EP // PER), tl.float32),)
    for at in tl.range(low, high, UNITS * LANES):
        place = (at // GROUP + n) * D + d
        s = _spread(tl.load(key_scale + place, mask=d < D, other=0.0), PARTS)
        z = _spread(tl.load(key_zero + place, mask=d < D, other=0.0), PARTS)
        place = ((at // GROUP + x[None, :] // PARTS) * D + d) * STRIDE + x[None, :] % PARTS
        units = tl.load(key_units + place, mask=d < D, other=0)  # [DP, UNITS]
        scores = ()
        for j in tl.static_range(LANES):
            scores = scores + (tl.dot(q, _plane(units, s, z, j, K_BITS, PLAIN)),)  # [ROWS, UNITS]
        most = scores[0]
        for j in tl.static_range(1, LANES):
            most = tl.maximum(most, scores[j])
        new = tl.maximum(top, tl.max(most, 1) * size)
        fade = tl.exp2(top - new)
        top, total = new, total * fade[:, None]
        faded = ()
        for i in tl.static_range(PER):
            faded = faded + (out[i] * fade[:, None],)
        out = faded
        for j in tl.static_range(0, LANES, PAIR):
            p = tl.exp2(scores[j] * size[:, None] - top[:, None])
            total += p
            t = at + x[:, None] * LANES + j
            if PAIR == 2:
                more = tl.exp2(scores[j + 1] * size[:, None] - top[:, None])
                total += more
                p = tl.reshape(tl.permute(tl.join(p, more), (0, 2, 1)), (p.shape[0], 2 * UNITS))  # one behind the other
                y = tl.arange(0, 2 * UNITS)[:, None]
                t = at + (y % UNITS) * LANES + j + y // UNITS
            units = tl.load(value_units + t * V_STRIDE + w, mask=w < V_STRIDE, other=0)  # [UNITS, EP / PER]
            s = _value_ranges(value_scale, t, 0, E, PER, GROUP, EP)
            z = _value_ranges(value_zero, t, 0, E, PER, GROUP, EP)
            sums = ()
            for i in tl.static_range(PER):
                if GROUP < PER:
                    s = _value_ranges(value_scale, t, i, E, PER, GROUP, EP)
                    z = _value_ranges(value_zero, t, i, E, PER, GROUP, EP)
                sums = sums + (tl.dot(p.to(tl.float16), _plane(units, s, z, i, V_BITS, PLAIN), out[i]),)
            out = sums
    return top, total, out


@triton.jit
def _finish(top, total, out, part_ptr, lse_ptr, row, live, e, E: tl.constexpr):
    """Store the quotient at the channels e [EP] and the lse (base 2)."""
    total = tl.sum(total, 1)
    safe = tl.where(total > 0, total, 1.0)
    tl.store(part_ptr + row[:, None] * E + e[None, :], out / safe[:, None], mask=live[:, None] & (e < E)[None, :])
    tl.store(lse_ptr + row, tl.where(total > 0, top + tl.log2(safe), float("-inf")), mask=live)


@triton.jit
def _packed_split(
    q_ptr, k_ptr, v_ptr, key_codes, key_scale, key_zero, value_codes, value_scale, value_zero, key_tail, value_tail,
    length_ptr, start_ptr, part_ptr, lse_ptr,
    scale2, G, HEADS, S, RESTS, RESIDUAL, key_room, value_room, slots, q_b, q_h, k_b, k_g, v_b, v_g,
    D: tl.constexpr, E: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, GROUP: tl.constexpr,
    HAS_START: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, UNITS: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr,
    PLAIN: tl.constexpr,
):  # fmt: skip
    """One split of one (row, KV head): partial out [HEADS, E] and its lse (base 2). The first RESTS read what is not codes.

    UNITS: units of keys in a step by planes, or 0 for blocks of BLOCK tokens in the precision of q.
    """
    pair, split = tl.program_id(0), tl.program_id(1)
    b, g = pair // G, pair % G
    stored = tl.load(length_ptr) - 1
    if HAS_START:
        stored = stored - tl.load(start_ptr + b)
    one = tl.where(stored >= 0, 0x3F800000, 0)  # always the former: see `_fractions`
    key_done = stored // RESIDUAL * RESIDUAL
    value_done = tl.maximum(stored - RESIDUAL, 0)
    WORDS: tl.constexpr = (GROUP * K_BITS + 31) // 32
    V_WORDS: tl.constexpr = (E * V_BITS + 31) // 32
    STEP: tl.constexpr = UNITS * (GROUP // ((GROUP * K_BITS + 15) // 16)) if UNITS else BLOCK
    whole = value_done // STEP * STEP
    wide = pair.to(tl.int64)
    key_codes += wide * key_room * D * WORDS
    key_scale += wide * key_room * D
    key_zero += wide * key_room * D
    value_codes += wide * value_room * V_WORDS
    value_scale += wide * value_room * (E // GROUP)
    value_zero += wide * value_room * (E // GROUP)
    r, d, e, c = tl.arange(0, ROWS), tl.arange(0, DP), tl.arange(0, EP), tl.arange(0, BLOCK)
    q_at = q_ptr + b.to(tl.int64) * q_b + (g * HEADS + r)[:, None] * q_h + d[None, :]
    q = tl.load(q_at, mask=(r < HEADS)[:, None] & (d < D)[None, :], other=0.0)
    row = (wide * S + split) * HEADS + r
    if split < RESTS:
        top = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        out = tl.zeros((ROWS, EP), tl.float32)
        if split == 0:
            new_k = tl.load(k_ptr + b.to(tl.int64) * k_b + g * k_g + d, mask=d < D, other=0.0).to(tl.float32)
            new_v = tl.load(v_ptr + b.to(tl.int64) * v_b + g * v_g + e, mask=e < E, other=0.0).to(tl.float32)
            top = tl.sum(q.to(tl.float32) * new_k[None, :], 1) * scale2
            total += tl.where(c == 0, 1.0, 0.0)[None, :]
            out += new_v[None, :]
        key_tail += wide * slots * D
        value_tail += wide * slots * E
        per = tl.cdiv(tl.cdiv(stored - whole, RESTS), BLOCK) * BLOCK
        low = whole + split * per
        for at in tl.range(low, tl.minimum(low + per, stored), BLOCK, num_stages=1):
            t = at + c
            slot = t % RESIDUAL
            live = (t < stored) & (t >= key_done)
            k = tl.load(key_tail + slot[None, :] * D + d[:, None], mask=live[None, :] & (d < D)[:, None], other=0.0)
            k = k.to(tl.float32)
            k += _coded_keys(
                key_codes, key_scale, key_zero, one, at, key_done // GROUP, D, K_BITS, GROUP, BLOCK, DP, True
            )  # one of the two terms is 0
            live = (t < stored) & (t >= value_done)
            v = tl.load(value_tail + slot[:, None] * E + e[None, :], mask=live[:, None] & (e < E)[None, :], other=0.0)
            v = v.to(tl.float32)
            v += _coded_values(
                value_codes, value_scale, value_zero, one, at, value_done, E, V_BITS, GROUP, BLOCK, EP, True
            )
            top, total, out = _fold(q, k.to(q.dtype), v.to(q.dtype), t < stored, top, total, out, scale2, True)
        _finish(top, total, out, part_ptr, lse_ptr, row, r < HEADS, e, E)
    else:
        per = tl.cdiv(tl.cdiv(whole, S - RESTS), STEP) * STEP
        low = (split - RESTS) * per
        high = tl.minimum(low + per, whole)
        if UNITS:
            PER: tl.constexpr = 16 // V_BITS
            unit = tl.pointer_type(tl.int16)
            most, sums, lanes = _planes(
                q, key_codes.to(unit, bitcast=True), key_scale, key_zero, value_codes.to(unit, bitcast=True), value_scale,
                value_zero, low, high, scale2, D, E, K_BITS, V_BITS, GROUP, UNITS, DP, EP, PLAIN,
            )  # fmt: skip
            for i in tl.static_range(PER):
                channel = tl.arange(0, EP // PER) * PER + i
                _finish(most, sums, lanes[i], part_ptr, lse_ptr, row, r < HEADS, channel, E)
        else:
            top = tl.full((ROWS,), float("-inf"), tl.float32)
            total = tl.zeros((ROWS, BLOCK), tl.float32)
            out = tl.zeros((ROWS, EP), tl.float32)
            for at in tl.range(low, high, BLOCK):
                k = _coded_keys(key_codes, key_scale, key_zero, one, at, 0, D, K_BITS, GROUP, BLOCK, DP, False)
                v = _coded_values(value_codes, value_scale, value_zero, one, at, 0, E, V_BITS, GROUP, BLOCK, EP, False)
                top, total, out = _fold(q, k.to(q.dtype), v.to(q.dtype), c, top, total, out, scale2, False)
            _finish(top, total, out, part_ptr, lse_ptr, row, r < HEADS, e, E)


@triton.jit
def _codes(x, low, high, axis: tl.constexpr, BITS: tl.constexpr):
    """Quantise x by its groups' ranges (`axis` lies inside a group): codes int32, scale and zero float16, as the torch path."""
    TOP: tl.constexpr = 2**BITS - 1
    zero = tl.minimum(tl.maximum(low, -65504.0), 65504.0).to(tl.float16)
    scale = tl.minimum(tl.div_rn(high - low, tl.full(low.shape, TOP, tl.float32)), 65504.0).to(tl.float16)
    flat = scale == 0.0
    scale = tl.where(flat, tl.full(scale.shape, 1.0, tl.float16), scale)
    shift, step = tl.expand_dims(zero.to(tl.float32), axis), tl.expand_dims(scale.to(tl.float32), axis)
    y, step = tl.broadcast(x - shift, step)
    y = tl.minimum(tl.maximum(tl.div_rn(y, step), 0.0), TOP)
    y = (y + 12582912.0) - 12582912.0  # 1.5 * 2^23: to the nearest integer, ties to even
    return tl.where(tl.expand_dims(flat, axis), 0, y.to(tl.int32)), scale, zero


@triton.jit
def _packed_store(
    k_ptr, v_ptr, key_codes, key_scale, key_zero, value_codes, value_scale, value_zero, key_tail, value_tail,
    length_ptr, start_ptr, G, RESIDUAL, key_room, value_room, slots, k_b, k_g, v_b, v_g,
    D: tl.constexpr, E: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, GROUP: tl.constexpr,
    HAS_START: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    """Program 0 of a (row, KV head): the value that leaves its ring, and both writes. The others: groups of a full key ring."""
    pair, part = tl.program_id(0), tl.program_id(1)
    b, g = pair // G, pair % G
    p = tl.load(length_ptr) - 1
    if HAS_START:
        p = p - tl.load(start_ptr + b)
    wide, slot = pair.to(tl.int64), p % RESIDUAL
    key_tail += wide * slots * D
    d, e = tl.arange(0, DP), tl.arange(0, EP)
    k = tl.load(k_ptr + b.to(tl.int64) * k_b + g * k_g + d, mask=d < D, other=0.0)
    if part == 0:
        value_tail += wide * slots * E + slot * E
        v = tl.load(v_ptr + b.to(tl.int64) * v_b + g * v_g + e, mask=e < E, other=0.0)
        if p >= RESIDUAL:
            PER: tl.constexpr = 32 // V_BITS
            WORDS: tl.constexpr = (E + PER - 1) // PER
            COUNT: tl.constexpr = EP // GROUP
            place = wide * value_room + (p - RESIDUAL)
            x = tl.reshape(tl.load(value_tail + e, mask=e < E, other=0.0).to(tl.float32), (COUNT, GROUP))
            code, scale, zero = _codes(x, tl.min(x, 1), tl.max(x, 1), 1, V_BITS)
            code = tl.reshape(code, (EP // PER, PER)) << (tl.arange(0, PER)[None, :] * V_BITS)
            w, n = tl.arange(0, EP // PER), tl.arange(0, COUNT)
            tl.store(value_codes + place * WORDS + w, tl.sum(code, 1), mask=w < WORDS)
            tl.store(value_scale + place * (E // GROUP) + n, scale, mask=n < E // GROUP)
            tl.store(value_zero + place * (E // GROUP) + n, zero, mask=n < E // GROUP)
        tl.debug_barrier()  # every warp has read the old value before one of them writes the new one in its place
        tl.store(key_tail + slot * D + d, k, mask=d < D)
        tl.store(value_tail + e, v, mask=e < E)
    elif slot == RESIDUAL - 1:
        K_WORDS: tl.constexpr = (GROUP * K_BITS + 31) // 32
        LANES: tl.constexpr = GROUP // K_WORDS
        parts = tl.num_programs(1) - 1
        for n in range(part - 1, RESIDUAL // GROUP, parts):
            t = n * GROUP + tl.arange(0, GROUP)
            old = (t != slot)[:, None]  # the newest key may not have reached the ring yet
            x = tl.load(key_tail + t[:, None] * D + d[None, :], mask=old & (d < D)[None, :], other=0.0)
            x = tl.where(old, x, k[None, :]).to(tl.float32)  # [GROUP, DP]
            code, scale, zero = _codes(x, tl.min(x, 0), tl.max(x, 0), 0, K_BITS)
            code = tl.reshape(code, (K_WORDS, LANES, DP)) << (tl.arange(0, LANES)[None, :, None] * K_BITS)
            place = (wide * key_room + (p - slot) // GROUP + n) * D + d
            w = tl.arange(0, K_WORDS)[:, None]
            tl.store(key_codes + place[None, :] * K_WORDS + w, tl.sum(code, 1), mask=(d < D)[None, :] & (w >= 0))
            tl.store(key_scale + place, scale, mask=d < D)
            tl.store(key_zero + place, zero, mask=d < D)


def _check(
    who: str, k: Tensor, v: Tensor, shelves: tuple[Tensor, ...], tails: tuple[Tensor, Tensor], bits: tuple[int, int],
    group: int, residual: int,
) -> None:  # fmt: skip
    """Raise `InvalidInput` unless the buffers are what the module describes."""
    (b, g, n, d), e = k.shape, v.shape[3]
    if not {*bits} <= {2, 4, 8} or group & (group - 1) or residual % group or d % group or e % group:
        raise InvalidInput(
            f"{who}: bits {bits}, group {group}, residual {residual}, widths {d} and {e}: expected 2, 4 or 8 bits and a power of "
            "two that divides the others"
        )
    key_room, value_room, slots = shelves[0].shape[2], shelves[3].shape[2], tails[0].shape[2]
    words, e_words = -(-group * bits[0] // 32), -(-e * bits[1] // 32)
    want = (
        (b, g, key_room, d, words), (b, g, key_room, d), (b, g, key_room, d), (b, g, value_room, e_words),
        (b, g, value_room, e // group), (b, g, value_room, e // group), (b, g, slots, d), (b, g, slots, e),
    )  # fmt: skip
    got = tuple(tuple(x.shape) for x in (*shelves, *tails))
    if n != 1 or v.shape[:3] != k.shape[:3] or got != want:
        raise InvalidInput(f"{who}: k {tuple(k.shape)}, v {tuple(v.shape)} need buffers {want}, got {got}")
    if not all(x.is_contiguous() for x in (*shelves, *tails)) or k.stride(3) != 1 or v.stride(3) != 1:
        raise InvalidInput(f"{who}: buffers must be contiguous, and the token along its last axis")


def packed_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_codes: Tensor,
    key_scale: Tensor,
    key_zero: Tensor,
    value_codes: Tensor,
    value_scale: Tensor,
    value_zero: Tensor,
    key_tail: Tensor,
    value_tail: Tensor,
    *,
    length: Tensor,
    start: Tensor | None = None,
    scale: float,
    k_bits: int,
    v_bits: int,
    group: int,
    residual: int,
    splits: int | None = None,
    planes: bool | None = None,
    units: Literal[8, 16] = 8,
    block: int | None = None,
    warps: int = 4,
    stages: int = 3,
    registers: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one token per row over what is stored and the token itself.

    q: ``[B, H, 1, D]``; k ``[B, G, 1, D]`` and v ``[B, G, 1, E]``: the token itself, not stored yet. Buffers: see the module; the
    tails ``[B, G, slots, .]`` hold `residual` slots, or fewer that have not been filled yet. length: int32 ``[1]`` on the device,
    columns including the new one; start: int32 ``[B]``, columns of padding in each row, or None. bits: 2, 4 or 8. planes: take
    codes as planes (see the module; products in float16, sums in float32), else in the precision of q by tiles of `block` tokens;
    None: planes where q has 16 bits and a group at most 32 tokens. units: of keys in a step of planes, 8 or 16 (a loop twice as
    long, slower on an H100); block, warps: of tiles, planes have their own. Returns out ``[B, H, 1, E]`` and lse ``[B, H, 1]``
    float32. Neither the launch nor a bit of the result depends on the capacity. Raises `InvalidInput`.
    """
    shelves = (key_codes, key_scale, key_zero, value_codes, value_scale, value_zero)
    _check("packed_decode", k, v, shelves, (key_tail, value_tail), (k_bits, v_bits), group, residual)
    b, h, n, d = q.shape
    g, e = k.shape[1], v.shape[3]
    if n != 1 or h % g or (k.shape[0], k.shape[3]) != (b, d):
        raise InvalidInput(f"packed_decode: q {tuple(q.shape)} and k {tuple(k.shape)} do not fit one token per row")
    if units not in (8, 16):
        raise InvalidInput(f"packed_decode: a step of planes holds 8 or 16 units of keys, got units={units}")
    q, r = q.contiguous(), h // g
    planes = q.element_size() == 2 and group <= 32 if planes is None else planes
    if planes:
        wide = max(units, -(-group * k_bits // 16))
        step = wide * min(group, 16 // k_bits)
        block, warps = max(group, 16), 1
        rests, programs = min(32, -(-(residual + step) // block)), 8
    else:
        wide, rests, programs = 0, 1, 3
        block = max(group, 64) if block is None else block
        registers = registers or 168  # three programs a processor
    if splits is None:
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 4
        splits = max(1, min(128 - rests, programs * processors // (b * g)))  # one wave, beside what reads the rings
    splits += rests
    part = torch.empty(b * g * splits * r * e, dtype=torch.float32, device=q.device)
    lse = torch.empty(b * g * splits * r, dtype=torch.float32, device=q.device)
    out, out_lse = q.new_empty(b, h, 1, e), torch.empty(b, h, 1, dtype=torch.float32, device=q.device)
    wide_d, wide_e = tiled(d, e, dtype=q.dtype)
    _packed_split[(b * g, splits)](
        q, k, v, *shelves, key_tail, value_tail, length, start if start is not None else length, part, lse,
        scale * LOG2E, g, r, splits, rests, residual, key_codes.shape[2], value_codes.shape[2], key_tail.shape[2],
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        D=d, E=e, K_BITS=k_bits, V_BITS=v_bits, GROUP=group, HAS_START=start is not None,
        ROWS=max(16, triton.next_power_of_2(r)), BLOCK=block, UNITS=wide, DP=wide_d, EP=wide_e, PLAIN=interpreted(),
        num_warps=warps, num_stages=stages, **({} if registers is None else {"maxnreg": registers}),
    )  # fmt: skip
    _merge[(b * h,)](part, lse, out, out_lse, r, splits, e, SP=triton.next_power_of_2(splits), EP=wide_e, num_warps=4)
    return out, out_lse


def packed_store(
    k: Tensor,
    v: Tensor,
    key_codes: Tensor,
    key_scale: Tensor,
    key_zero: Tensor,
    value_codes: Tensor,
    value_scale: Tensor,
    value_zero: Tensor,
    key_tail: Tensor,
    value_tail: Tensor,
    *,
    length: Tensor,
    start: Tensor | None = None,
    k_bits: int,
    v_bits: int,
    group: int,
    residual: int,
) -> None:
    """Store the token that `packed_decode` decoded, in place; arguments as there.

    The value that leaves its ring is quantised, the keys of a ring that is full now are too (the device finds out), and k, v go
    to their slots. There must be room for ``(L + 1) // residual * residual`` keys and ``L + 1 - residual`` values as codes.
    """
    shelves = (key_codes, key_scale, key_zero, value_codes, value_scale, value_zero)
    _check("packed_store", k, v, shelves, (key_tail, value_tail), (k_bits, v_bits), group, residual)
    b, g, _, d = k.shape
    e = v.shape[3]
    _packed_store[(b * g, 1 + min(32, residual // group))](
        k, v, *shelves, key_tail, value_tail, length, start if start is not None else length, g, residual,
        key_codes.shape[2], value_codes.shape[2], key_tail.shape[2],
        k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        D=d, E=e, K_BITS=k_bits, V_BITS=v_bits, GROUP=group, HAS_START=start is not None,
        DP=max(16, triton.next_power_of_2(d)), EP=max(16, triton.next_power_of_2(e)), num_warps=4,
    )  # fmt: skip
