"""Attention of blocks with its lse and masses, against plain torch: interpreted anywhere, on the device where there is one."""

from __future__ import annotations

import pytest
import torch

from interpreter import CUDA, DEVICE, direct, interpreted
from qkv.core.attend import attend, causal_mask
from qkv.core.errors import InvalidInput

pytest.importorskip("triton")


def test_kernels_are_checked_through_the_interpreter() -> None:
    """The checks below, in a process of their own: the interpreter is chosen when Triton is imported."""
    interpreted(__file__)


SHAPES = [(2, 6, 3, 40, 40, 32, 32), (1, 4, 4, 17, 90, 16, 24), (1, 4, 1, 130, 131, 64, 48), (1, 2, 2, 1, 70, 40, 40)]


def drawn(shape: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, ...]:
    b, h, g, n, m, d, e = shape
    draw = torch.Generator().manual_seed(seed + sum(shape))
    sizes = ((b, n, h, d), (b, g, m, d), (b, g, m, e))  # queries as a host gives them: heads inside tokens
    q, k, v = (torch.randn(x, generator=draw).to(DEVICE) for x in sizes)
    return q.transpose(1, 2), 1.5 * k, v


@direct
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("causal", "heads"), [(True, None), (True, "one"), (False, "group"), (True, "query")])
def test_outputs_lse_and_masses(shape: tuple[int, ...], causal: bool, heads: str | None) -> None:
    from qkv.kernels.flash import column_masses, flash_attention

    b, h, g, n, m = shape[:5]
    q, k, v = drawn(shape)
    mask, rows = None, None
    if heads is not None:
        draw = torch.Generator().manual_seed(7)
        count = {"one": 1, "group": g, "query": h}[heads]
        mask = (torch.rand(b, count, 1, m, generator=draw) > 0.4).to(DEVICE)
        mask[0, 0, :, : m - n + 3] = False  # the first queries have no key
        rows = (torch.rand(b, n, generator=draw) > 0.3).to(DEVICE)
    wide = [x.double() for x in (q, k, v)]
    want = attend(*wide, mask=mask, causal=causal, scale=0.3, mass=True, mass_rows=rows)
    out, lse = flash_attention(q, k, v, mask=mask, causal=causal, scale=0.3)
    mass = column_masses(q, k, lse, mask=mask, causal=causal, scale=0.3, rows=rows)
    assert want.mass is not None
    torch.testing.assert_close(out.double(), want.out, rtol=0, atol=5e-6)
    torch.testing.assert_close(lse.double(), want.lse, rtol=0, atol=2e-5)
    torch.testing.assert_close(mass.double(), want.mass, rtol=1e-5, atol=2e-5)


@direct
def test_what_does_not_fit_is_refused() -> None:
    from qkv.kernels.flash import column_masses, flash_attention

    q, k, v = drawn((1, 2, 2, 8, 8, 16, 16))
    full = causal_mask(8, 8, q.device)[None, None]
    for arguments, more, said in (
        ((q, k, v), {"mask": full}, "key mask"),
        ((q, k.half(), v), {}, "one of bfloat16"),
        ((q, k[:, :, :4], v[:, :, :4]), {"causal": True}, "N <= M"),
        ((q, k, v[:, :, :4]), {}, "v \\[B, G, M, E\\]"),
    ):
        with pytest.raises(InvalidInput, match=said):
            flash_attention(*arguments, scale=1.0, **more)
    with pytest.raises(InvalidInput, match="rows"):
        column_masses(q, k, q[..., 0], scale=1.0, rows=torch.ones(1, 3, dtype=torch.bool))


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device: elsewhere attend takes the plain form")
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(2, 8, 2, 300, 300, 128, 128), (1, 6, 3, 257, 1000, 64, 64), (1, 4, 2, 130, 200, 96, 32)]
)
@pytest.mark.parametrize("padded", [False, True])
def test_attend_in_half_precision_on_a_device(dtype: torch.dtype, shape: tuple[int, ...], padded: bool) -> None:
    q, k, v = (x.to(dtype) for x in drawn(shape))
    b, m = shape[0], shape[4]
    mask = None
    if padded:
        mask = torch.ones(b, 1, 1, m, dtype=torch.bool, device=DEVICE)
        mask[0, :, :, :20] = False
    got = attend(q, k, v, mask=mask, causal=True, mass=True)
    want = attend(q.double(), k.double(), v.double(), mask=mask, causal=True, mass=True)
    for name, mine, right in zip(("out", "lse", "mass"), got, want, strict=True):
        fine = torch.isfinite(right)
        assert torch.equal(fine, torch.isfinite(mine)), name
        assert (mine.double() - right)[fine].norm() < 5e-3 * right[fine].norm(), name
