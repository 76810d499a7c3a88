"""The decode kernel over segments against float64: through Triton's interpreter, on the device where there is one."""

from __future__ import annotations

import pytest
import torch

from interpreter import DEVICE, direct, interpreted

triton = pytest.importorskip("triton")


def test_the_kernel_is_checked_through_the_interpreter() -> None:
    interpreted(__file__)


@direct
@pytest.mark.parametrize("tile", [16, 64, None])
@pytest.mark.parametrize("shape", [(2, 6, 3, 16, 24), (1, 8, 2, 32, 32), (3, 3, 3, 8, 8)], ids=str)
def test_segments_are_read_as_dense_heads_are(shape: tuple[int, ...], tile: int | None) -> None:
    from qkv.core.attend import attend
    from qkv.kernels.ragged import ragged_decode, work_list

    b, h, g, d, e = shape
    draw = torch.Generator().manual_seed(sum(shape))
    caps = torch.randint(1, 150, (b, g), generator=draw)
    caps[0, 0] = 1
    size, total = int(caps.max()), int(caps.sum())
    rand = lambda *s: torch.randn(*s, generator=draw).to(DEVICE)  # noqa: E731
    q, keys, values = rand(b, h, 1, d), rand(total, d), rand(total, e)
    base = (caps.flatten().cumsum(0) - caps.flatten()).view(b, g).to(DEVICE)
    column = torch.arange(size)
    position = torch.where(column < caps[..., None], column, -1)
    position = torch.where(torch.rand(position.shape, generator=draw) < 0.2, -1, position).int().to(DEVICE)
    position[-1, -1] = -1  # a head without a token
    unread = torch.ones(total, dtype=torch.bool, device=DEVICE)
    at = (base[..., None] + torch.minimum(column.to(DEVICE), caps[..., None].to(DEVICE) - 1)).long()
    unread[at[position >= 0]] = False
    dense = [torch.where((position >= 0)[..., None], x[at].double(), 0.0) for x in (keys, values)]
    keys[unread], values[unread] = float("nan"), float("nan")  # what is empty must not be read
    want = attend(q.double(), *dense, mask=(position >= 0).unsqueeze(2), scale=0.3, mass=True)
    tiles = work_list(caps.tolist(), torch.device(DEVICE), tile)
    out, mass = ragged_decode(q, keys, values, position, base, tiles, scale=0.3, mass=True)
    torch.testing.assert_close(out.double(), want.out, rtol=0, atol=2e-6)
    seen = torch.isfinite(want.lse)
    assert mass is not None and want.mass is not None
    torch.testing.assert_close(mass.double() * seen, want.mass * seen, rtol=0, atol=2e-6)


@direct
def test_what_does_not_fit_is_refused() -> None:
    from qkv.core.errors import InvalidInput
    from qkv.kernels.ragged import ragged_decode, work_list

    x, position = torch.randn(8, 16, device=DEVICE), torch.zeros(1, 2, 4, dtype=torch.int32, device=DEVICE)
    base, tiles = torch.zeros(1, 2, dtype=torch.int64, device=DEVICE), work_list([[4, 4]], torch.device(DEVICE))
    for q, k in (
        (torch.randn(1, 2, 2, 16), x),
        (torch.randn(1, 2, 1, 8), x),
        (torch.randn(1, 2, 1, 16), x.T.contiguous().T),
    ):
        with pytest.raises(InvalidInput):
            ragged_decode(q.to(DEVICE), k, x, position, base, tiles, scale=1.0)
