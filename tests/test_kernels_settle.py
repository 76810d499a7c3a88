"""A decoding step that scores what it reads, against float64: through Triton's interpreter, or on the device."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
direct = pytest.mark.skipif(
    not CUDA and os.environ.get("TRITON_INTERPRET") != "1", reason="run through the interpreter"
)


def test_the_kernels_are_checked_through_the_interpreter() -> None:
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


SHAPES = [(2, 6, 3, 101, 32, 32, 77), (1, 4, 4, 64, 16, 24, 1), (3, 8, 2, 130, 64, 64, 130), (2, 2, 1, 70, 20, 20, 70)]


@direct
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("part", ["all", "start", "position"])
def test_scores_and_masses(shape: tuple[int, ...], part: str) -> None:
    """Scores leave with the outputs, which they do not change; masses are the columns of the map, in every mask and padding."""
    from qkv.core.attend import attend
    from qkv.kernels.decode import LOG2E, decode_attention, decode_masses

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
    what = {"length": length, "position": position, "scale": d**-0.5}
    want = attend(q.double(), k[:, :, :n].double(), v[:, :, :n].double(), mask=mask, mass=True)
    every = k[:, :, :n].double().repeat_interleave(h // g, 1)
    logits = ((q.double() @ every.mT) * d**-0.5 * LOG2E).squeeze(2)
    live = torch.ones(b, h, n, dtype=torch.bool, device=DEVICE)
    if mask is not None:
        live &= mask.squeeze(2).expand(b, mask.shape[1], n).repeat_interleave(h // mask.shape[1], 1)
    plain = decode_attention(q, k, v, start=start, **what, splits=3)
    for splits in (1, 3):
        scores = torch.full((b, h, c), 7.0, device=DEVICE)
        out, lse = decode_attention(q, k, v, start=start, scores=scores, splits=splits, **what)
        torch.testing.assert_close(out.double(), want.out, rtol=0, atol=2e-6)
        if splits == 3:
            assert torch.equal(out, plain[0]) and torch.equal(lse, plain[1])
        assert (scores[:, :, n:] == 7).all(), "scores past the length"
        torch.testing.assert_close(scores[:, :, :n][live].double(), logits[live], rtol=0, atol=5e-6)
        if part == "position":
            assert (scores[:, :, :n][~live] == -torch.inf).all()
    if part == "start":
        return
    seen = torch.isfinite(want.lse)
    drawing = torch.arange(b, dtype=torch.int32, device=DEVICE) - 1  # the first row draws nothing
    for rows in (None, drawing):
        out, mass = decode_masses(q, k, v, drawing=rows, **what)
        torch.testing.assert_close(out.double(), want.out, rtol=0, atol=2e-6)
        drawn = want.mass * seen if rows is None else want.mass * seen * (rows >= 0)[:, None, None]
        torch.testing.assert_close(mass[:, :, :n].double(), drawn, rtol=0, atol=2e-6)
        assert (mass[:, :, n:] == 0).all()


class Slots:
    """Slots that are all taken but one per KV head, where a step has just written; row 1 idles."""

    def __init__(self, b: int, h: int, g: int, c: int, d: int, layer: bool) -> None:
        from qkv.kernels.decode import decode_attention

        draw = torch.Generator(DEVICE).manual_seed(b + h + c)
        rand = lambda *s: torch.randn(*s, device=DEVICE, generator=draw)  # noqa: E731
        q, k, v = rand(b, h, 1, d), rand(b, g, c, d), rand(b, g, c, d)
        order = torch.rand(b, 1 if layer else g, c, device=DEVICE, generator=draw).argsort(-1).int()
        self.position = order.expand(b, g, c).contiguous()
        self.new = torch.full((b, 1), c - 1, dtype=torch.int32, device=DEVICE)
        self.new[1:2] = -1
        self.slot = (self.position == c - 1).int().argmax(-1, keepdim=True)
        self.position.scatter_(2, self.slot, self.new[:, None].expand_as(self.slot))
        self.keep = torch.full((b, 1, 1), c - 1, device=DEVICE)
        self.state = rand(b, g, c, 1).abs()
        self.scores = torch.empty(b, h, c, device=DEVICE)
        length = torch.tensor([c], dtype=torch.int32, device=DEVICE)
        _, self.lse = decode_attention(
            q, k, v, length=length, scale=d**-0.5, scores=self.scores, position=self.position
        )
        logits = ((q.double() @ k.double().repeat_interleave(h // g, 1).mT) * d**-0.5).squeeze(2)
        logits = logits.masked_fill(self.position.repeat_interleave(h // g, 1) < 0, -torch.inf)
        self.mass = logits.softmax(-1) * (self.new >= 0).unsqueeze(-1)

    def want(self, reduce: str, layer: bool, stateful: bool, recent: float, normalize: bool) -> tuple[Tensor, ...]:
        """State, worth with what may not go at infinity, and the freed slots, in float64."""
        b, g, c = self.position.shape
        mass = self.mass.mean(1, keepdim=True).expand(b, g, c) if layer else self.mass.unflatten(1, (g, -1))
        if not layer:
            mass = mass.amax(2) if reduce == "max" else getattr(mass, reduce)(2)
        state = mass + self.state.squeeze(-1).double() if stateful else mass
        newest = self.new.unsqueeze(-1)
        worth = state / (newest - self.position + 1).clamp(min=1) if normalize else state
        kept = (self.keep * recent).floor()
        worth = worth.masked_fill(self.position > newest - kept, torch.inf).scatter(2, self.slot, torch.inf)
        free = torch.where(newest >= 0, worth.argmin(-1, keepdim=True), self.slot)
        return state, worth, free


@direct
@pytest.mark.parametrize(
    "shape", [(2, 6, 3, 40, 16), (2, 8, 2, 1100, 16), (3, 4, 4, 17, 8), (2, 12, 4, 300, 16)], ids=str
)
@pytest.mark.parametrize(
    "how",
    [
        {"reduce": "sum", "stateful": True, "recent": 0.5}, {"reduce": "sum", "stateful": True, "recent": 0.0},
        {"reduce": "max", "stateful": True, "recent": 0.3, "normalize": True}, {"reduce": "mean"},
        {"reduce": "mean", "layer": True},
    ],
    ids=str,
)  # fmt: skip
def test_a_step_settles_by_what_was_drawn(shape: tuple[int, ...], how: dict) -> None:
    """State, the freed slot and its position; a row that idles keeps everything."""
    from qkv.kernels.slots import settle

    how = {"layer": False, "stateful": False, "recent": 0.0, "normalize": False} | how
    slots = Slots(*shape, layer=how["layer"])
    state, _, free = slots.want(**how)
    before = slots.position.clone()
    stateful = how.pop("stateful")
    settle(
        slots.scores, slots.lse, slots.position, slots.slot, slots.new, slots.keep,
        state=slots.state if stateful else None, **how,
    )  # fmt: skip
    if stateful:
        torch.testing.assert_close(slots.state.squeeze(-1).double(), state, rtol=0, atol=5e-6)
    assert torch.equal(slots.slot, free)
    assert torch.equal(slots.position, before.scatter(2, free, -1))


@direct
def test_ties_and_what_does_not_fit() -> None:
    """The lowest index of equals goes, across blocks too; wrong shapes are refused."""
    from qkv.core.errors import InvalidInput
    from qkv.kernels.slots import settle

    b, h, g, c = 1, 4, 2, 3000
    scores, lse = torch.zeros(b, h, c, device=DEVICE), torch.zeros(b, h, 1, device=DEVICE)
    position = torch.arange(c, dtype=torch.int32, device=DEVICE).expand(b, g, c).contiguous()
    new, keep = torch.full((b, 1), c - 1, dtype=torch.int32, device=DEVICE), torch.full((b, 1, 1), c - 1, device=DEVICE)
    slot = torch.full((b, g, 1), c - 1, device=DEVICE)
    scores[:, :2, [1500, 2500, 2501]] = -1.0
    settle(scores, lse, position, slot, new, keep)
    assert slot.flatten().tolist() == [1500, 0]
    for bad, why in (
        ({"reduce": "median"}, "median"), ({"state": scores[:, :2, :, None], "layer": True}, "layer"),
        ({"state": scores[..., None]}, "state"),
    ):  # fmt: skip
        with pytest.raises(InvalidInput, match=why):
            settle(scores, lse, position, slot, new, keep, **bad)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="scores"):
        settle(scores[:, :, :10], lse, position, slot, new, keep)
