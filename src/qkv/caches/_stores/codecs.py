r"""Codes: numbers of 2, 4 or 8 bits that stand for floating-point ones, and the words they lie in.

    x^ = code * s + z,   z = min,  s = (max - min) / (2^bits - 1),   code = round(clamp((x - z) / s, 0, 2^bits - 1))

over groups of elements that share s and z. Which elements share is what the quantisers differ in: a run of tokens of one
channel, a run of channels of one token, a whole block of tokens of one channel, or all channels of all heads of one token
after each channel was divided by its own magnitude. A group of equal values gets code 0 and s = 1. Codes are taken against the
stored, rounded s and z. Words are int32, element j of a word at bits j * bits.

Axes: B batch, G key/value heads, T tokens, D head width, E value width.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from qkv.core.errors import InvalidInput, InvalidParameter

BITS = (2, 4, 8, 16)
"""Widths of a code; 16 stands for the value itself, unchanged."""
PIECE = 4096  # tokens quantised at once


# -- bits -----------------------------------------------------------------------------------------------------------


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes ``[..., n]`` (integers below 2^bits) to int32 words ``[..., ceil(n * bits / 32)]``, element j at bits j * bits.

    Raises `InvalidParameter` unless bits is 2, 4 or 8.
    """
    _check_bits(bits)
    per, lanes = 32 // bits, 8 // bits
    x = codes.to(torch.uint8)
    x = torch.nn.functional.pad(x, (0, -x.shape[-1] % per))
    x = x.reshape(*x.shape[:-1], -1, lanes)
    out = x[..., 0]
    for lane in range(1, lanes):
        out = out | (x[..., lane] << (lane * bits))
    return out.contiguous().view(torch.int32)


def unpack_bits(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes ``[..., count]`` (uint8) of words ``[..., W]``: the inverse of `pack_bits`.

    The bytes of a word are spread over wider integers with shifts, so that the codes come out in place, one per byte.
    """
    _check_bits(bits)
    if words.dtype != torch.int32 or words.shape[-1] * 32 // bits < count:
        raise InvalidInput(
            f"{count} codes of {bits} bits need int32 words [..., {-(-count * bits // 32)}], got {words.dtype} "
            f"{tuple(words.shape)}"
        )
    x = words.contiguous().view(torch.uint8)
    if bits == 4:
        y = x.to(torch.int16)
        x = y.bitwise_or_(y << 4).bitwise_and_(0x0F0F).view(torch.uint8)
    elif bits == 2:
        y = x.to(torch.int32)
        y = y.bitwise_or_(y << 12)
        x = y.bitwise_or_(y << 6).bitwise_and_(0x03030303).view(torch.uint8)
    return x[..., :count]


def _check_bits(bits: int) -> None:
    if bits not in (2, 4, 8):
        raise InvalidParameter(f"codes of {bits} bits cannot be packed; choose 2, 4 or 8")


# -- groups ---------------------------------------------------------------------------------------------------------


def _span(low: Tensor, high: Tensor, bits: int, dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
    """Scale and zero of `dtype` (None: at least float32) for the ranges low .. high, and which of them are points."""
    _check_bits(bits)
    wide = torch.promote_types(low.dtype, torch.float32)
    dtype = wide if dtype is None else dtype
    low, high, most = low.to(wide), high.to(wide), torch.finfo(dtype).max
    zero = low.clamp(-most, most).to(dtype)
    scale = ((high - low) / (2**bits - 1)).clamp(max=most).to(dtype)
    flat = scale == 0
    return scale.masked_fill(flat, 1), zero, flat


def _encode(x: Tensor, ranges: Iterable[Tensor], bits: int) -> Tensor:
    """Codes uint8 of x by what `_span` returned, broadcast against it."""
    scale, zero, flat = ranges
    wide = torch.promote_types(x.dtype, torch.float32)
    codes = ((x.to(wide) - zero.to(wide)) / scale.to(wide)).clamp(0, 2**bits - 1).round()
    return codes.masked_fill(flat, 0).to(torch.uint8)


def _quantize(x: Tensor, bits: int, dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
    """Groups ``[..., g]`` to codes uint8 ``[..., g]``, scale and zero ``[...]`` of `dtype` (None: at least float32)."""
    scale, zero, flat = _span(x.amin(-1), x.amax(-1), bits, dtype)
    return _encode(x, (y.unsqueeze(-1) for y in (scale, zero, flat)), bits), scale, zero


def quantize_per_channel_tokens(
    x: Tensor, bits: int, group: int, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys ``[..., T, D]``: one range per channel and `group` consecutive tokens.

    Returns codes uint8 ``[..., T / group, D, group]``, scale and zero ``[..., T / group, D]`` of `dtype` (None: at least
    float32). Raises `InvalidInput` unless group divides T.
    """
    _divides(x, -2, group, "tokens")
    return _quantize(x.unflatten(-2, (-1, group)).mT, bits, dtype)


def quantize_per_token_channels(
    x: Tensor, bits: int, group: int, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Values ``[..., T, E]``: one range per token and `group` consecutive channels.

    Returns codes uint8 ``[..., T, E / group, group]``, scale and zero ``[..., T, E / group]`` of `dtype` (None: at least
    float32). Raises `InvalidInput` unless group divides E.
    """
    _divides(x, -1, group, "channels")
    return _quantize(x.unflatten(-1, (-1, group)), bits, dtype)


def dequantize_per_channel_tokens(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """``[..., T, D]`` from what `quantize_per_channel_tokens` returned."""
    return (codes.to(scale.dtype) * scale.unsqueeze(-1) + zero.unsqueeze(-1)).mT.flatten(-3, -2)


def dequantize_per_token_channels(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """``[..., T, E]`` from what `quantize_per_token_channels` returned."""
    return (codes.to(scale.dtype) * scale.unsqueeze(-1) + zero.unsqueeze(-1)).flatten(-2)


def _divides(x: Tensor, axis: int, group: int, what: str) -> None:
    if x.ndim < 2 or x.shape[axis] % group or not x.is_floating_point():
        raise InvalidInput(
            f"groups of {group} {what} do not divide {tuple(x.shape)} ({x.dtype}): expected floating-point [..., T, D] with a "
            "multiple of the group"
        )


# -- blocks ---------------------------------------------------------------------------------------------------------


def channel_quantize(
    x: Tensor, bits: int, dtype: torch.dtype | None = None, span: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys ``[..., T, D]``: one range per channel over all T tokens.

    span: minimum and maximum ``[..., D]`` where they are known, so that a long block can be quantised in pieces. Returns codes
    uint8 ``[..., T, D]``, scale and zero ``[..., D]`` of `dtype` (None: at least float32).
    """
    _divides(x, -2, 1, "tokens")
    low, high = (x.amin(-2), x.amax(-2)) if span is None else span
    scale, zero, flat = _span(low, high, bits, dtype)
    return _encode(x, (y.unsqueeze(-2) for y in (scale, zero, flat)), bits), scale, zero


def channel_dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """``[..., T, D]`` from what `channel_quantize` returned."""
    return codes.to(scale.dtype) * scale.unsqueeze(-2) + zero.unsqueeze(-2)


def cst_channel(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """What each channel of ``[..., T, E]`` is divided by: the root of its largest magnitude, 1 where that is 0; ``[..., E]``."""
    wide = torch.promote_types(x.dtype, torch.float32)
    channel = x.abs().amax(-2).to(wide).sqrt().to(wide if dtype is None else dtype)
    return channel.masked_fill(channel == 0, 1)


def cst_quantize(
    x: Tensor, bits: int, dtype: torch.dtype | None = None, channel: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values ``[B, G, T, E]``, channel-separable and token-wise: one divisor per channel, one range per token over all heads.

    channel: the divisors ``[B, G, E]`` (None: `cst_channel` of x; ones: plain token-wise quantisation). Returns codes uint8
    ``[B, G, T, E]``, scale and zero ``[B, T]``, and the divisors, of `dtype` (None: at least float32). Raises `InvalidInput`.
    """
    if x.ndim != 4 or not x.is_floating_point():
        raise InvalidInput(f"expected floating-point values [B, G, T, E], got {x.dtype} {tuple(x.shape)}")
    channel = cst_channel(x, dtype) if channel is None else channel
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) / channel.to(wide).unsqueeze(-2)
    scale, zero, flat = _span(y.amin((1, 3)), y.amax((1, 3)), bits, dtype)
    return _encode(y, (z[:, None, :, None] for z in (scale, zero, flat)), bits), scale, zero, channel


def cst_dequantize(codes: Tensor, scale: Tensor, zero: Tensor, channel: Tensor) -> Tensor:
    """``[B, G, T, E]`` from what `cst_quantize` returned."""
    y = codes.to(scale.dtype) * scale[:, None, :, None] + zero[:, None, :, None]
    return y * channel.unsqueeze(-2)


# -- flags ----------------------------------------------------------------------------------------------------------


def pack_flags(flags: Tensor) -> Tensor:
    """Bools ``[..., n]`` to bytes ``[..., ceil(n / 8)]``, element j at bit j mod 8 of byte j / 8."""
    x = torch.nn.functional.pad(flags.to(torch.uint8), (0, -flags.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (x << torch.arange(8, dtype=torch.uint8, device=x.device)).sum(-1, dtype=torch.uint8)


def unpack_flags(packed: Tensor, count: int) -> Tensor:
    """The first `count` bools ``[..., count]`` of bytes ``[..., n]``: the inverse of `pack_flags`."""
    x = packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (x & 1).flatten(-2)[..., :count].bool()
