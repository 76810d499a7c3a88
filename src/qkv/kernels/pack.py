r"""Tokens of a block to packed words in one pass: the ranges, the codes and the words of `qkv.caches._stores.codecs`.

    code = round(clamp((x - z) / s, 0, 2^bits - 1)),   z = min,   s = (max - min) / (2^bits - 1)

`pack_channels`: one s, z per channel over all tokens (keys), whose smallest and largest are given. `pack_tokens`: one s, z per
token over the channels of all heads, each divided by c first (values). s and z are rounded to float16 and codes are taken
against the rounded ones; a group of equal values gets code 0 and s = 1. Quotients are rounded as IEEE says and halves go to even,
so that the codes are those of torch. Bound: bytes of the tokens and of the words; values are read twice, once from the cache.

Axes: R rows, G key/value heads, T tokens, D width; words ``[R, G, T, ceil(D bits / 32)]``, element j at bits j * bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkv.core.errors import InvalidInput

MOST = tl.constexpr(65504.0)  # of float16
EVEN = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves no room for a fraction


@triton.jit
def _ranges(low, high, BITS: tl.constexpr):
    """Scale and zero in float16, and where the scale is 0."""
    zero = tl.minimum(tl.maximum(low, -MOST), MOST).to(tl.float16)
    most = tl.full(low.shape, 2**BITS - 1, tl.float32)
    scale = tl.minimum(tl.math.div_rn(high - low, most), MOST).to(tl.float16)
    flat = scale == 0
    return tl.where(flat, 1.0, scale).to(tl.float16), zero, flat


@triton.jit
def _words(x, scale, zero, blank, ROWS: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr):
    """Words [ROWS, WIDTH * BITS / 32] of x [ROWS, WIDTH] by scales and zeros broadcast to it; code 0 where `blank`."""
    PER: tl.constexpr = 32 // BITS
    y = tl.math.div_rn(x - zero, scale)
    code = (tl.minimum(tl.maximum(y, 0.0), 2.0**BITS - 1) + EVEN) - EVEN
    code = tl.where(blank, 0.0, code).to(tl.int32)
    lanes = tl.reshape(code, (ROWS, WIDTH // PER, PER)) << (tl.arange(0, PER) * BITS)[None, None, :]
    return tl.sum(lanes, 2)


@triton.jit
def _pack_channels(
    x_ptr, low_ptr, high_ptr, words_ptr, scale_ptr, zero_ptr, G, T, D, x_r, x_g, x_t,
    BITS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of tokens, R G); low and high, scale and zero [R, G, D]."""
    PER: tl.constexpr = 32 // BITS
    pair = tl.program_id(1).to(tl.int64)
    t, d, w = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.arange(0, WIDTH // PER)
    low = tl.load(low_ptr + pair * D + d, mask=d < D, other=0.0).to(tl.float32)
    high = tl.load(high_ptr + pair * D + d, mask=d < D, other=0.0).to(tl.float32)
    scale, zero, flat = _ranges(low, high, BITS)
    mine = tl.where(tl.program_id(0) == 0, D, 0)  # the first tile notes the ranges
    tl.store(scale_ptr + pair * D + d, scale, mask=d < mine)
    tl.store(zero_ptr + pair * D + d, zero, mask=d < mine)
    x_ptr += pair // G * x_r + pair % G * x_g
    x = tl.load(x_ptr + t[:, None].to(tl.int64) * x_t + d[None, :], mask=(t < T)[:, None] & (d < D)[None, :], other=0.0)
    s = tl.broadcast_to(scale.to(tl.float32)[None, :], (ROWS, WIDTH))
    words = _words(x.to(tl.float32), s, zero.to(tl.float32)[None, :], (flat | (d >= D))[None, :], ROWS, WIDTH, BITS)
    many = tl.cdiv(D, PER)
    at = (pair * T + t[:, None]) * many + w[None, :]
    tl.store(words_ptr + at, words, mask=(t < T)[:, None] & (w < many)[None, :])


@triton.jit
def _pack_tokens(
    x_ptr, channel_ptr, words_ptr, scale_ptr, zero_ptr, G, T, D, x_r, x_g, x_t,
    BITS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of tokens, R); channel [R, G, D], scale and zero [R, T]."""
    PER: tl.constexpr = 32 // BITS
    r = tl.program_id(1).to(tl.int64)
    t, d, w = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.arange(0, WIDTH // PER)
    inside = (t < T)[:, None] & (d < D)[None, :]
    x_ptr += r * x_r
    x_at, c_at = x_ptr + t[:, None].to(tl.int64) * x_t + d[None, :], channel_ptr + r * G * D + d
    low = tl.full((ROWS,), float("inf"), tl.float32)
    high = tl.full((ROWS,), float("-inf"), tl.float32)
    for _ in range(0, G):
        c = tl.load(c_at, mask=d < D, other=1.0).to(tl.float32)
        x = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
        x_at, c_at = x_at + x_g, c_at + D
        y = tl.math.div_rn(x, tl.broadcast_to(c[None, :], (ROWS, WIDTH)))
        low = tl.minimum(low, tl.min(tl.where(inside, y, float("inf")), 1))
        high = tl.maximum(high, tl.max(tl.where(inside, y, float("-inf")), 1))
    low, high = tl.where(t < T, low, 0.0), tl.where(t < T, high, 0.0)
    scale, zero, flat = _ranges(low, high, BITS)
    tl.store(scale_ptr + r * T + t, scale, mask=t < T)
    tl.store(zero_ptr + r * T + t, zero, mask=t < T)
    s = tl.broadcast_to(scale.to(tl.float32)[:, None], (ROWS, WIDTH))
    many = tl.cdiv(D, PER)
    x_at, c_at = x_ptr + t[:, None].to(tl.int64) * x_t + d[None, :], channel_ptr + r * G * D + d
    for g in range(0, G):
        c = tl.load(c_at, mask=d < D, other=1.0).to(tl.float32)
        x = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
        x_at, c_at = x_at + x_g, c_at + D
        y = tl.math.div_rn(x, tl.broadcast_to(c[None, :], (ROWS, WIDTH)))
        words = _words(y, s, zero.to(tl.float32)[:, None], flat[:, None] | (d >= D)[None, :], ROWS, WIDTH, BITS)
        at = ((r * G + g) * T + t[:, None]) * many + w[None, :]
        tl.store(words_ptr + at, words, mask=(t < T)[:, None] & (w < many)[None, :])


def _prepared(x: Tensor, bits: int, others: tuple[Tensor, ...], who: str) -> tuple[Tensor, Tensor, int]:
    """Tokens with channels side by side, room for their words, and the width of a tile."""
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    if x.ndim != 4 or x.dtype not in kinds or bits not in (2, 4, 8) or 0 in x.shape:
        raise InvalidInput(
            f"{who} packs [R, G, T, D] of float32, bfloat16 or float16 in 2, 4 or 8 bits; got {x.dtype} {tuple(x.shape)}, {bits}"
        )
    want = (*x.shape[:2], x.shape[3])
    if any(y.shape != want for y in others):
        raise InvalidInput(f"{who} takes [R, G, D] = {want} beside the tokens; got {[tuple(y.shape) for y in others]}")
    x = x if x.stride(-1) == 1 else x.contiguous()
    words = torch.empty(*x.shape[:3], -(-x.shape[3] * bits // 32), dtype=torch.int32, device=x.device)
    return x, words, max(32, triton.next_power_of_2(x.shape[3]))


def pack_channels(x: Tensor, low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys ``[R, G, T, D]`` by their smallest and largest values ``[R, G, D]`` in each channel.

    Returns words int32 ``[R, G, T, ceil(D bits / 32)]``, scale and zero float16 ``[R, G, D]``. Raises `InvalidInput`.
    """
    x, words, width = _prepared(x, bits, (low, high), "pack_channels")
    r, g, t, d = x.shape
    scale, zero = (torch.empty(r, g, d, dtype=torch.float16, device=x.device) for _ in "sz")
    rows = max(1, 4096 // width)
    _pack_channels[(triton.cdiv(t, rows), r * g)](
        x, low.contiguous(), high.contiguous(), words, scale, zero, g, t, d, *x.stride()[:3],
        BITS=bits, ROWS=rows, WIDTH=width, num_warps=4,
    )  # fmt: skip
    return words, scale, zero


def pack_tokens(x: Tensor, channel: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values ``[R, G, T, D]`` by what their channels are divided by, ``[R, G, D]``.

    Returns words int32 ``[R, G, T, ceil(D bits / 32)]``, scale and zero float16 ``[R, T]``. Raises `InvalidInput`.
    """
    x, words, width = _prepared(x, bits, (channel,), "pack_tokens")
    r, g, t, d = x.shape
    scale, zero = (torch.empty(r, t, dtype=torch.float16, device=x.device) for _ in "sz")
    rows = max(1, 2048 // width)
    _pack_tokens[(triton.cdiv(t, rows), r)](
        x, channel.contiguous(), words, scale, zero, g, t, d, *x.stride()[:3], BITS=bits, ROWS=rows, WIDTH=width, num_warps=4
    )  # fmt: skip
    return words, scale, zero
