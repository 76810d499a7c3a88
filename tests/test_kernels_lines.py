"""Attention over vertical and slash lines against float64: by Triton's interpreter, or on the device if there is one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from interpreter import CUDA, DEVICE, direct, interpreted
from qkv.core.vertical_slash import CHUNK, Lines, VerticalSlash, attend_lines, lines_mask

triton = pytest.importorskip("triton")

DTYPES = [
    torch.float32,
    torch.float16,
    *([torch.bfloat16] if CUDA else []),
]  # the interpreter has no products of bfloat16
SHAPES = [
    (6, 2, 101, 133, 16, 24),
    (2, 2, 64, 64, 32, 32),
    (4, 1, 70, 70, 20, 8),
    (3, 3, 1, 97, 16, 16),
    (2, 1, 5, 200, 16, 16),
]


def test_the_kernel_is_checked_through_the_interpreter() -> None:
    interpreted(__file__)


def draw(shape: tuple[int, ...], share: float) -> tuple[Tensor, Tensor, Tensor, Lines]:
    """q, k, v whose heads lie between tokens, as models give them, and random lines."""
    h, g, n, m, d, e = shape
    gen = torch.Generator().manual_seed(sum(shape))
    rand = lambda *s: torch.randn(*s, generator=gen).to(DEVICE).transpose(0, 1)  # noqa: E731
    lines = (torch.rand(2, h, m, generator=gen) < share).to(DEVICE)
    return rand(n, h, d), rand(m, g, d), rand(m, g, e), Lines(lines[0], lines[1], torch.zeros(h))


@direct
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lines_are_dense_masked_softmax(shape: tuple[int, ...], share: float, dtype: torch.dtype) -> None:
    from qkv.core.attend import attend
    from qkv.kernels.lines import lines_attention

    q, k, v, lines = draw(shape, share)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    n, m = shape[2:4]
    lines.vertical[:, 0] = True
    mask = lines_mask(lines, torch.arange(m - n, m, device=DEVICE))
    want = attend(q.double()[None], k.double()[None], v.double()[None], mask=mask[None], scale=0.3).out[0]
    before = lines.slash.clone()
    out = lines_attention(q, k, v, lines.vertical, lines.slash, scale=0.3)
    assert torch.equal(before, lines.slash) and out.dtype == dtype
    near = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(out.double(), want, rtol=0, atol=near)


@direct
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_that_lie_unevenly_are_read_as_even_ones(dtype: torch.dtype) -> None:
    """Vectors of 16 channels that begin anywhere, 20 numbers apart."""
    from qkv.kernels.lines import lines_attention

    q, k, v, lines = draw((4, 2, 50, 70, 20, 20), 0.1)
    apart = [x.to(dtype)[..., 1:17] for x in (q, k, v)]
    even = [x.contiguous() for x in apart]
    out, want = (lines_attention(*x, lines.vertical, lines.slash, scale=0.3) for x in (apart, even))
    assert torch.equal(out, want) and out.isfinite().all()


@direct
def test_a_query_without_its_first_key_reads_the_lines_alone() -> None:
    """Key 0 is whoever calls' to name; the diagonal is always there."""
    from qkv.kernels.lines import lines_attention

    q, k, v, lines = draw((2, 1, 40, 40, 16, 16), 0.0)
    out = lines_attention(q, k, v, lines.vertical, lines.slash, scale=1.0)
    torch.testing.assert_close(out, v.expand_as(out), rtol=0, atol=1e-6)


@direct
def test_shapes_that_do_not_fit_are_refused() -> None:
    from qkv.core.errors import InvalidInput
    from qkv.kernels.lines import lines_attention

    q, k, v, lines = draw((4, 2, 8, 9, 16, 16), 0.5)
    named, wide = lines.vertical, torch.zeros(2, 9, 300, device=DEVICE)
    for bad in ((q[:3], k, v, named[:3]), (q, k[:, :7], v[:, :7], named[:, :7]), (q, k, v, named[:, :8]),
                (q.double(), k.double(), v.double(), named), (q, k, wide, named)):  # fmt: skip
        with pytest.raises(InvalidInput, match="lines_attention"):
            lines_attention(*bad, bad[3], scale=1.0)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs CUDA")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("n", [700, 1500])
def test_a_prompt_on_the_device_is_that_of_the_torch_form(padded: bool, n: int) -> None:
    q, k, v, _ = draw((6, 2, n, 1500, 64, 64), 0.0)
    prompt = VerticalSlash(0.7, 64, 0.1, "it")
    lines = prompt.lines(q * 2, k, 0.125)
    assert torch.equal(lines.slash, prompt.lines(q * 2, k, 0.125).slash)  # chosen the same again
    want = attend_lines(q * 2, k, v, lines, scale=0.125, chunk=CHUNK)
    more = 100 if padded else 0
    mask = torch.ones(1, 1, 1, 1500 + more, dtype=torch.bool, device=DEVICE)
    mask[..., :more] = False
    front = lambda x: torch.nn.functional.pad(x, (0, 0, more, 0), value=9.0)[None]  # noqa: E731
    out = prompt((q * 2)[None], front(k), front(v), mask=mask if padded else None, causal=True, scale=0.125)
    torch.testing.assert_close(out[0], want, rtol=0, atol=3e-5)
