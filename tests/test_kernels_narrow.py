"""Heads of few or uneven channels in 16 bits, through every kernel that reads keys and values: see qkv.kernels.widths.

By Triton's interpreter (float16 only), or on the device if there is one.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from interpreter import CUDA, DEVICE, direct, interpreted
from qkv.core.attend import attend

triton = pytest.importorskip("triton")

DTYPES = [torch.float16, *([torch.bfloat16] if CUDA else [])]  # the interpreter has no products of bfloat16
WIDTHS = [
    (8, 8),
    (20, 8),
    (16, 8),
    (8, 24),
    (4, 12),
    *([(24, 12), (40, 20), (100, 20), (20, 100), (200, 24)] if CUDA else []),
]
Pairs = list[tuple[Tensor, Tensor]]


def test_the_kernels_are_checked_through_the_interpreter() -> None:
    interpreted(__file__)


class Case:
    """Draws in a 16-bit type for two key/value heads; ``between``: heads lie between tokens, as models give them."""

    def __init__(self, dtype: torch.dtype, d: int, e: int, heads: int = 4) -> None:
        self.dtype, self.d, self.e, self.heads = dtype, d, e, heads
        self.draw = torch.Generator().manual_seed(d + e)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.draw).to(DEVICE, self.dtype)

    def between(self, b: int, n: int, h: int, d: int) -> Tensor:
        return self(b, n, h, d).transpose(1, 2)

    def integers(self, *values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def decode(case: Case) -> Pairs:
    from qkv.kernels.decode import decode_attention, key_mass

    q, k, v = case(2, case.heads, 1, case.d), case(2, 2, 150, case.d), case(2, 2, 150, case.e)
    want = attend(q.double(), k.double(), v.double(), scale=0.3, mass=True)
    out, lse = decode_attention(q, k, v, length=case.integers(150), scale=0.3)
    assert want.mass is not None
    return [(out, want.out), (key_mass(q, k, lse, length=case.integers(150), scale=0.3), want.mass)]


def flash(case: Case) -> Pairs:
    from qkv.kernels.flash import column_masses, flash_attention, probe_lse

    q, k, v = (case.between(2, n, h, w) for n, h, w in ((150, 4, case.d), (201, 2, case.d), (201, 2, case.e)))
    want = attend(q.double(), k.double(), v.double(), causal=True, scale=0.3, mass=True)
    out, lse = flash_attention(q, k, v, causal=True, scale=0.3)
    assert want.mass is not None
    at = torch.arange(51, 201, device=DEVICE)
    mass = column_masses(q, k, lse, causal=True, scale=0.3)
    return [(out, want.out), (mass, want.mass), (probe_lse(q, k, at, scale=0.3), want.lse)]


def gather(case: Case) -> Pairs:
    from qkv.kernels.gather import gather_attention

    q, k, v = case(1, case.heads, 1, case.d), case(1, 2, 160, case.d), case(1, 2, 160, case.e)
    pairs = []
    for block in (1, 4):
        index = torch.stack([torch.randperm(160 // block, generator=case.draw)[:19] for _ in range(2)])
        tokens = (index[..., None] * block + torch.arange(block)).flatten(1).to(DEVICE)
        mask = torch.zeros(1, 2, 1, 160, dtype=torch.bool, device=DEVICE)
        mask[0, :, 0].scatter_(1, tokens, True)
        want = attend(q.double(), k.double(), v.double(), mask=mask, scale=0.3).out
        listed = index[None, :, None].to(DEVICE, torch.int32)
        pairs.append((gather_attention(q, k, v, listed, case.integers(159), block=block, scale=0.3)[0], want))
    return pairs


def prefixed(case: Case) -> Pairs:
    from qkv.kernels.prefixed import prefixed_decode, work_list

    q, k, v = case(2, case.heads, 1, case.d), case(2, 2, 40, case.d), case(2, 2, 40, case.e)
    shared = case(1, 2, 130, case.d), case(1, 2, 130, case.e)
    work = work_list([(*shared, 130, (0, 1))], 2, case.heads, 2, dtype=q.dtype, device=q.device)
    both = (torch.cat((x.expand(2, -1, -1, -1), y), 2).double() for x, y in zip(shared, (k, v), strict=True))
    out = prefixed_decode(q, k, v, None, work, width=40, scale=0.3)
    return [(out, attend(q.double(), *both, scale=0.3).out)]


def ragged(case: Case) -> Pairs:
    from qkv.kernels.ragged import ragged_decode, work_list

    q, k, v = case(1, case.heads, 1, case.d), case(230, case.d), case(230, case.e)
    position = torch.arange(130, dtype=torch.int32, device=DEVICE).expand(1, 2, -1).clone()
    position[0, 1, 100:] = -1
    base = torch.tensor([[0, 130]], device=DEVICE)
    out, _ = ragged_decode(q, k, v, position, base, work_list([[130, 100]], q.device), scale=0.3)
    first, last = q.chunk(2, 1)
    parts = [(first, k[:130], v[:130]), (last, k[130:], v[130:])]
    want = [attend(x.double(), y[None, None].double(), z[None, None].double(), scale=0.3).out for x, y, z in parts]
    return [(out, torch.cat(want, 1))]


def lines(case: Case) -> Pairs:
    from qkv.core.vertical_slash import Lines, lines_mask
    from qkv.kernels.lines import lines_attention

    q, k, v = (case.between(1, n, h, w)[0] for n, h, w in ((150, 4, case.d), (201, 2, case.d), (201, 2, case.e)))
    named = (torch.rand(2, 4, 201, generator=case.draw) < 0.05).to(DEVICE)
    named[:, :, 0] = True
    mask = lines_mask(Lines(named[0], named[1], torch.zeros(4)), torch.arange(51, 201, device=DEVICE))
    want = attend(*(x[None].double() for x in (q, k, v)), mask=mask[None], scale=0.3).out[0]
    return [(lines_attention(q, k, v, named[0], named[1], scale=0.3), want)]


def decayed(case: Case) -> Pairs:
    from qkv.ops._common.decayed import decayed_linear_attention

    q, k, v = (case.between(1, 201, h, w) for h, w in ((4, case.d), (2, case.d), (2, case.e)))
    gate = -torch.rand(1, 4, 201, case.d, generator=case.draw).to(DEVICE)
    pairs = []
    for decay in (None, gate[..., 0], gate):
        wide = None if decay is None else decay.double()
        want = decayed_linear_attention(q.double(), k.double(), v.double(), log_decay=wide, scale=0.3, form="chunked")
        done = decayed_linear_attention(q, k, v, log_decay=decay, scale=0.3, form="triton")
        pairs += [(done.out, want.out), (done.state, want.state)]
    return pairs


STEPS: list[Callable[[Case], Pairs]] = [decode, gather, prefixed, ragged]
KERNELS = [*STEPS, flash, lines, decayed]


def test_tiles_of_one_call_are_swizzled_alike() -> None:
    from qkv.kernels.widths import tiled

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for d in range(1, 257, 5):
            for e in range(1, 257, 7):
                wide = tiled(d, e, dtype=dtype)
                rows = {min(128, w * dtype.itemsize) for w in wide}
                assert len(rows) == 1 and all(
                    w & (w - 1) == 0 and w >= max(16, x) for w, x in zip(wide, (d, e), strict=True)
                )
    assert tiled(64, 64, dtype=torch.float16) == (64, 64) and tiled(20, 8, dtype=torch.float16) == (32, 32)


@direct
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.__name__)
def test_few_channels(kernel: Callable[[Case], Pairs], dtype: torch.dtype, widths: tuple[int, int]) -> None:
    check(kernel, Case(dtype, *widths))


@pytest.mark.skipif(
    not CUDA, reason="needs CUDA: only there do tiles of 64 rows take another instruction (wgmma) than tiles of 16"
)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", STEPS, ids=lambda k: k.__name__)
def test_few_channels_of_many_heads(
    kernel: Callable[[Case], Pairs], dtype: torch.dtype, widths: tuple[int, int]
) -> None:
    check(kernel, Case(dtype, *widths, heads=128))


def check(kernel: Callable[[Case], Pairs], case: Case) -> None:
    """Errors relative to the norm are a rounding's: 16-bit outputs, sums in float32."""
    for out, want in kernel(case):
        error = ((out.double() - want).norm() / want.norm()).item()
        assert error < (2e-3 if case.dtype == torch.float16 else 1.2e-2), error  # NaN is no smaller
