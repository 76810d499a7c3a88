r"""Decode attention over blocks of tokens that share a precision, read from their packed words.

    k^_md = code_md s_d + z_d,   v^_me = (code_me s_m + z_m) c_e
    out_h = sum_m softmax_m(scale q_h . k^_m) v^_m

One new token per row. s_d and z_d belong to a block and channel, s_m and z_m to a token (all KV heads), c_e to a block and
channel. A tile never crosses a block, so that a block's ranges are loaded once per tile. Codes are taken out of their words in
registers: no dequantised cache exists in memory. The tiles of all blocks are split over programs, whose results are merged. How
many blocks there are comes from the device, and launches never change: the call can be captured in a CUDA graph. Bound: bytes
of words and ranges.

Words int32 along channels, element j of a word at bits j * bits: keys ``[B, G, K, W, D * bits / 32]``, values
``[B, G, K, W, E * bits / 32]``, word counts rounded up. Ranges float16: of keys ``[B, G, K, D]``, of values ``[B, 1, K, W]``,
c ``[B, G, K, E]``. The first `blocks` of K are read.

Axes: B batch, H query heads, G key/value heads, K capacity in blocks, W tokens of a block, D head width, E value width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkv.core.errors import InvalidInput
from qkv.kernels.decode import LOG2E, _merge
from qkv.kernels.packed import _fold, _fractions, _plain
from qkv.kernels.widths import tiled


@triton.jit
def _codes(words, place, live, one, D: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, DP: tl.constexpr):
    """1 + code / 2^BITS as float32 [BLOCK, DP] of the tokens `place` [BLOCK]; 1 where there is none."""
    PER: tl.constexpr = 32 // BITS
    WORDS: tl.constexpr = (D + PER - 1) // PER
    w = tl.arange(0, DP // PER)[None, :]
    x = tl.load(words + place[:, None] * WORDS + w, mask=live[:, None] & (w < WORDS), other=0)
    return _plain(tl.reshape(_fractions(x, one, BITS, PER), (BLOCK, DP, 1)))


@triton.jit
def _mixed_split(
    q_ptr, key_codes, key_scale, key_zero, value_codes, value_scale, value_zero, channel, blocks_ptr, part_ptr, lse_ptr,
    scale2, G, HEADS, S, room, count, q_b, q_h,
    D: tl.constexpr, E: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DP: tl.constexpr,
    EP: tl.constexpr,
):  # fmt: skip
    """One split of one (row, KV head): partial out [HEADS, E] and its lse (base 2)."""
    pair, split = tl.program_id(0), tl.program_id(1)
    b, g = (pair // G).to(tl.int64), pair % G
    wide = pair.to(tl.int64)
    blocks = tl.load(blocks_ptr)
    one = tl.where(blocks >= 0, 0x3F800000, 0)  # always the former: see `_fractions`
    r, d, e, c = tl.arange(0, ROWS), tl.arange(0, DP), tl.arange(0, EP), tl.arange(0, BLOCK)
    q = tl.load(
        q_ptr + b * q_b + (g * HEADS + r)[:, None] * q_h + d[None, :],
        mask=(r < HEADS)[:, None] & (d < D)[None, :],
        other=0.0,
    )
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    out = tl.zeros((ROWS, EP), tl.float32)
    tiles = tl.cdiv(count, BLOCK)
    per = tl.cdiv(blocks * tiles, S)
    for i in tl.range(split * per, tl.minimum(split * per + per, blocks * tiles)):
        block, t = i // tiles, i % tiles * BLOCK + c
        live = t < count
        at = wide * room + block
        s = tl.load(key_scale + at * D + d, mask=d < D, other=0.0).to(tl.float32) * 2**BITS
        z = tl.load(key_zero + at * D + d, mask=d < D, other=0.0).to(tl.float32) - s
        k = _codes(key_codes, at * count + t, live, one, D, BITS, BLOCK, DP) * s[None, :] + z[None, :]
        token = (b * room + block) * count + t
        step = tl.load(value_scale + token, mask=live, other=0.0).to(tl.float32) * 2**BITS
        low = tl.load(value_zero + token, mask=live, other=0.0).to(tl.float32) - step
        v = _codes(value_codes, at * count + t, live, one, E, BITS, BLOCK, EP) * step[:, None] + low[:, None]
        v = v * tl.load(channel + at * E + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
        top, total, out = _fold(q, tl.trans(k.to(q.dtype)), v.to(q.dtype), live, top, total, out, scale2, True)
    total = tl.sum(total, 1)
    safe = tl.where(total > 0, total, 1.0)
    row = (wide * S + split) * HEADS + r
    tl.store(
        part_ptr + row[:, None] * E + e[None, :], out / safe[:, None], mask=(r < HEADS)[:, None] & (e < E)[None, :]
    )
    tl.store(lse_ptr + row, tl.where(total > 0, top + tl.log2(safe), float("-inf")), mask=r < HEADS)


def mixed_decode(
    q: Tensor,
    keys: Tensor,
    key_scale: Tensor,
    key_zero: Tensor,
    values: Tensor,
    value_scale: Tensor,
    value_zero: Tensor,
    channel: Tensor,
    *,
    blocks: Tensor,
    bits: int,
    scale: float,
    splits: int | None = None,
    block: int = 64,
    warps: int = 4,
) -> tuple[Tensor, Tensor]:
    """Attention of one token per row over the first `blocks` blocks of every row.

    q: ``[B, H, 1, D]``; the rest as in the module, each contiguous; E is the width of `channel`. blocks: int32 ``[1]`` on the
    device, at most K. bits: 2, 4 or 8. Returns out ``[B, H, 1, E]`` and lse ``[B, H, 1]``, both float32, to be merged with the
    other parts. Neither the launch nor a bit of the result depends on K. Raises `InvalidInput`.
    """
    b, h, n, d = q.shape
    g, room, count = keys.shape[1:4]
    e = channel.shape[3]
    per = 32 // bits if bits in (2, 4, 8) else 1
    want = (
        (b, g, room, count, -(-d // per)), (b, g, room, d), (b, g, room, d), (b, g, room, count, -(-e // per)),
        (b, 1, room, count), (b, 1, room, count), (b, g, room, e),
    )  # fmt: skip
    held = (keys, key_scale, key_zero, values, value_scale, value_zero, channel)
    got = tuple(tuple(x.shape) for x in held)
    if n != 1 or h % g or bits not in (2, 4, 8) or got != want or blocks.shape != (1,) or blocks.dtype != torch.int32:
        raise InvalidInput(
            f"mixed_decode: q {tuple(q.shape)} and blocks of {bits} bits need {want}, got {got}; bits: 2, 4 or 8; their number: "
            f"int32 [1], got {blocks.dtype} {tuple(blocks.shape)}"
        )
    if not all(x.is_contiguous() for x in held):
        raise InvalidInput("mixed_decode: blocks and ranges must be contiguous")
    q, r = q.contiguous(), h // g
    if splits is None:
        units = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 4
        splits = max(1, min(128, 3 * units // (b * g)))
    part = torch.empty(b * g * splits * r * e, dtype=torch.float32, device=q.device)
    lse = torch.empty(b * g * splits * r, dtype=torch.float32, device=q.device)
    out = torch.empty(b, h, 1, e, dtype=torch.float32, device=q.device)
    out_lse = torch.empty(b, h, 1, dtype=torch.float32, device=q.device)
    wide_d, wide_e = tiled(d, e, dtype=q.dtype)
    _mixed_split[(b * g, splits)](
        q, *held, blocks, part, lse, scale * LOG2E, g, r, splits, room, count, q.stride(0), q.stride(1),
        D=d, E=e, BITS=bits, ROWS=max(16, triton.next_power_of_2(r)), BLOCK=block, DP=wide_d, EP=wide_e, num_warps=warps,
    )  # fmt: skip
    _merge[(b * h,)](part, lse, out, out_lse, r, splits, e, SP=triton.next_power_of_2(splits), EP=wide_e, num_warps=4)
    return out, out_lse
