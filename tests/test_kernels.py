"""Triton kernels against float64: through Triton's interpreter on any machine, on the device where there is one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton")
CUDA = torch.cuda.is_available()


def test_kernels_are_checked_through_the_interpreter() -> None:
    """The checks below, in a process of their own: the interpreter is chosen when Triton is imported."""
    if CUDA or os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the checks run directly here")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


direct = pytest.mark.skipif(
    not CUDA and os.environ.get("TRITON_INTERPRET") != "1", reason="run through the interpreter"
)
DEVICE = "cuda" if CUDA else "cpu"


@direct
@pytest.mark.parametrize(
    "shape", [(2, 6, 3, 101, 32, 32, 77), (1, 4, 4, 64, 16, 24, 1), (3, 8, 2, 130, 64, 64, 130)], ids=str
)
@pytest.mark.parametrize("part", ["all", "start", "position"])
def test_decode_attention_and_key_mass(shape: tuple[int, ...], part: str) -> None:
    from qkv.core.attend import attend
    from qkv.kernels.decode import decode_attention, key_mass

    b, h, g, c, d, e, n = shape
    draw = torch.Generator(DEVICE).manual_seed(sum(shape))
    q, k, v = (torch.randn(*s, device=DEVICE, generator=draw) for s in ((b, h, 1, d), (b, g, c, d), (b, g, c, e)))
    k[:, :, n:], v[:, :, n:] = float("nan"), float("nan")  # what was never written must not be read
    length = torch.tensor([n], dtype=torch.int32, device=DEVICE)
    start = position = mask = None
    if part == "start":
        start = torch.randint(0, max(1, n // 2), (b,), dtype=torch.int32, device=DEVICE, generator=draw)
        mask = (torch.arange(n, device=DEVICE)[None] >= start[:, None])[:, None, None, :]
    if part == "position":
        position = torch.randint(-1, 3, (b, g, c), dtype=torch.int32, device=DEVICE, generator=draw)
        mask = (position[:, :, :n] >= 0).unsqueeze(2)
    want = attend(q.double(), k[:, :, :n].double(), v[:, :, :n].double(), mask=mask, mass=True)
    for splits in (1, 3, None):
        out, lse = decode_attention(
            q, k, v, length=length, start=start, position=position, scale=d**-0.5, splits=splits
        )
        torch.testing.assert_close(out.double(), want.out, rtol=0, atol=2e-6)
        torch.testing.assert_close(lse.double(), want.lse, rtol=0, atol=2e-6)
    if part != "start":
        mass = key_mass(q, k, lse, length=length, position=position, scale=d**-0.5)
        seen = torch.isfinite(want.lse)
        torch.testing.assert_close(mass[:, :, :n].double() * seen, want.mass * seen, rtol=0, atol=2e-6)
        assert (mass[:, :, n:] == 0).all()


@direct
def test_the_number_of_splits_does_not_depend_on_the_room() -> None:
    from qkv.kernels.decode import decode_attention

    draw = torch.Generator(DEVICE).manual_seed(0)
    q, k = (torch.randn(*s, device=DEVICE, generator=draw) for s in ((1, 4, 1, 16), (1, 2, 90, 16)))
    length = torch.tensor([70], dtype=torch.int32, device=DEVICE)
    small, large = (decode_attention(q, x, x, length=length, scale=0.25)[0] for x in (k[:, :, :70].contiguous(), k))
    assert torch.equal(small, large)


@direct
def test_shapes_that_do_not_fit_are_refused() -> None:
    from qkv.core.errors import InvalidInput
    from qkv.kernels.decode import decode_attention

    x = torch.randn(1, 2, 8, 16, device=DEVICE)
    length = torch.tensor([8], dtype=torch.int32, device=DEVICE)
    for q, k in ((x, x), (x[:, :, :1, :8], x), (x[:, :, :1], x.mT.contiguous().mT)):
        with pytest.raises(InvalidInput):
            decode_attention(q, k, k, length=length, scale=1.0)


@direct
@pytest.mark.parametrize("width", [0, 1, 3])
def test_placing_and_freeing_slots(width: int) -> None:
    from qkv.kernels.slots import free, place

    b, g, c, d, e = 2, 3, 37, 5, 7
    draw = torch.Generator(DEVICE).manual_seed(width)
    rand = lambda *s: torch.randn(*s, device=DEVICE, generator=draw)  # noqa: E731
    keys, values, k, v = rand(b, g, c, d), rand(b, g, c, e), rand(b, 1, g, d).transpose(1, 2), rand(b, g, 1, e)
    position = torch.rand(b, g, c, device=DEVICE, generator=draw).argsort(-1).int()
    state = rand(b, g, c, width) if width else None
    slot = torch.randint(0, c, (b, g, 1), device=DEVICE, generator=draw)
    new = torch.tensor([[90], [91]], dtype=torch.int32, device=DEVICE)
    want = [x.clone() for x in (keys, values, position)]
    at = slot[..., None]
    want[0].scatter_(2, at.expand(-1, -1, -1, d), k)
    want[1].scatter_(2, at.expand(-1, -1, -1, e), v)
    want[2].scatter_(2, slot, new[:, None].expand(b, g, 1))
    place(keys, values, position, state, slot, k, v, new)
    assert all(torch.equal(x, y) for x, y in zip((keys, values, position), want, strict=True))
    if state is not None:
        assert (state.gather(2, at.expand(-1, -1, -1, width)) == 0).all()
    for worth in (None, rand(b, g, c), torch.zeros(b, g, c, device=DEVICE)):
        mine, where = position.clone(), slot.clone()
        score = position.float() if worth is None else worth
        score = score.masked_fill(position < 4, torch.inf) if worth is None else score
        expected = score.scatter(2, slot, torch.inf).argmin(-1, keepdim=True)
        free(mine, where, worth=worth, protect=4)
        if worth is None or worth.any():
            assert torch.equal(where, expected)
        assert (mine.gather(2, where) == -1).all() and (mine == -1).sum() == b * g and not (where == slot).any()


@direct
def test_turning_a_few_keys_in_place() -> None:
    from qkv.core.cache import Rope
    from qkv.kernels.slots import turn

    draw = torch.Generator(DEVICE).manual_seed(0)
    keys = torch.randn(2, 3, 11, 10, device=DEVICE, generator=draw)
    rope = Rope(torch.tensor([1.0, 0.1, 0.01], device=DEVICE))  # partial rotary: 6 of 10 channels
    index = torch.tensor([0, 4, 9], device=DEVICE).expand(2, 3, 3)
    shift = torch.randint(0, 50, (2, 3, 3), device=DEVICE, generator=draw).int()
    anchors = keys.gather(2, index[..., None].expand(-1, -1, -1, 10))
    want = keys.scatter(2, index[..., None].expand(-1, -1, -1, 10), rope.rotate(anchors, shift))
    turn(keys, anchors, index, rope.frequencies, shift)
    torch.testing.assert_close(keys, want, rtol=0, atol=2e-6)
