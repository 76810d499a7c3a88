"""Tokens packed by kernels hold the very codes of the quantisers in torch."""

from __future__ import annotations

import pytest
import torch

from interpreter import DEVICE, direct, interpreted
from qkv.caches._stores.codecs import channel_quantize, cst_channel, cst_quantize, pack_bits
from qkv.core.errors import InvalidInput

pytest.importorskip("triton")


def test_kernels_are_checked_through_the_interpreter() -> None:
    """The checks below, in a process of their own: the interpreter is chosen when Triton is imported."""
    interpreted(__file__)


def drawn(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Tokens as a host gives them, heads inside tokens; a channel and a token of equal values, large and tiny ones."""
    r, g, t, d = shape
    x = torch.randn(r, t, g, d, generator=torch.Generator().manual_seed(sum(shape))).transpose(1, 2)
    x[..., 1], x[..., 2], x[..., 3] = 3000.7, x[..., 2] * 900, x[..., 3] * 1e-6
    x[:, :, 1] = 0.0
    return x.to(dtype)


@direct
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 37, 48), (1, 2, 130, 20)], ids=str)
def test_words_are_those_of_torch(shape: tuple[int, ...], dtype: torch.dtype, bits: int) -> None:
    from qkv.kernels.pack import pack_channels, pack_tokens

    x, half = drawn(shape, dtype), torch.float16
    y = x.to(DEVICE)
    codes, scale, zero = channel_quantize(x, bits, half)
    got = [z.cpu() for z in pack_channels(y, y.amin(2), y.amax(2), bits)]
    want = pack_bits(codes, bits), scale, zero
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    off = pack_bits(channel_quantize(x + 0.02 * x.abs().amax(2, keepdim=True), bits, half)[0], bits)
    assert not torch.equal(got[0], off), "other codes are told apart"
    codes, scale, zero, channel = cst_quantize(x, bits, half)
    got = [z.cpu() for z in pack_tokens(y, channel.to(DEVICE), bits)]
    want = pack_bits(codes, bits), scale, zero
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert not torch.equal(pack_tokens(y, torch.ones_like(channel).to(DEVICE), bits)[0].cpu(), got[0])


@direct
def test_what_does_not_fit_is_refused() -> None:
    from qkv.kernels.pack import pack_channels, pack_tokens

    x = torch.randn(1, 2, 8, 16)
    with pytest.raises(InvalidInput, match="2, 4 or 8"):
        pack_channels(x, x.amin(2), x.amax(2), 3)
    with pytest.raises(InvalidInput, match="float32, bfloat16 or float16"):
        pack_tokens(x.double(), cst_channel(x), 4)
    with pytest.raises(InvalidInput, match=r"\[R, G, D\]"):
        pack_tokens(x, cst_channel(x)[:, :1], 4)
