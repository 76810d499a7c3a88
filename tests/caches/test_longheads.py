"""LongHeads: the oracles of its page."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

import qkv
from qkv.caches._stores.selective import Read, SelectiveCache
from qkv.caches.longheads import LongHeads, chunk_features, reference
from qkv.core.attend import attend, sdpa
from qkv.core.cache import Geometry, Rope, Step
from qkv.core.errors import InvalidParameter, Refused

H, G, D = 6, 3, 8
ROPE = Rope(100.0 ** -(torch.arange(D // 2, dtype=torch.float32) / (D // 2)))


def memory(length: int | None = None, **changes: object) -> SelectiveCache:
    settings: dict[str, object] = {"chunk_size": 5, "attention_length": 20}
    layer = LongHeads(**(settings | changes)).layer(Geometry(H, G, D, D, rope=ROPE, max_length=length))  # type: ignore[arg-type]
    assert isinstance(layer, SelectiveCache)
    return layer


def draw(n: int, b: int = 1, seed: int = 0) -> list[Tensor]:
    """q, k, v before rotation."""
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(b, h, n, D, generator=gen, dtype=torch.float64) * 1.5 for h in (H, G, G)]


def feed(layer: SelectiveCache, tensors: list[Tensor], cuts: list[int]) -> Tensor:
    q, k, v = tensors
    at = torch.arange(q.shape[2]).expand(q.shape[0], 1, -1)
    q, k = (ROPE.rotate(x, at.expand(-1, x.shape[1], -1)) for x in (q, k))
    outs, b = [], q.shape[0]
    for n in cuts:
        part = slice(layer.seen, layer.seen + n)
        step = Step(torch.arange(part.start, part.stop, dtype=torch.int32).expand(b, n), D**-0.5)
        outs.append(layer.attend(q[:, :, part], k[:, :, part], v[:, :, part], step))
    return torch.cat(outs, 2)


def rotated(tensors: list[Tensor]) -> list[Tensor]:
    at = torch.arange(tensors[0].shape[2]).expand(1, 1, -1)
    return [ROPE.rotate(x, at.expand(x.shape[0], x.shape[1], -1)) for x in tensors[:2]] + tensors[2:]


@pytest.mark.parametrize("window", [5, 30])
@pytest.mark.parametrize("cuts", [[83], [40, 43], [19, 64], [23, *[1] * 60]])
def test_the_definition(cuts: list[int], window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, in pieces and token by token: one rule, the loop's to 1e-6 (rotations run in float32), in any windows."""
    monkeypatch.setattr(LongHeads, "prefill", lambda self, geometry: window)
    q, k, v = draw(83)
    got = feed(memory(), [q, k, v], cuts)
    for head in range(H):
        want, reads = reference(
            q[0, head], k[0, head // 2], v[0, head // 2], chunk=5, attended=20, start=20, frequencies=ROPE.frequencies
        )
        torch.testing.assert_close(got[0, head], want, rtol=0, atol=2e-5)
        assert all(len(x) <= 20 for x in reads)


def test_texts_within_reach_are_read_in_full() -> None:
    tensors = draw(60)
    want = attend(*rotated(tensors), causal=True).out
    for changes in ({"start_length": 60}, {"attention_length": 60}):
        torch.testing.assert_close(feed(memory(**changes), tensors, [30, *[1] * 30]), want, rtol=0, atol=1e-12)
    short = feed(memory(), tensors, [60])
    torch.testing.assert_close(short[:, :, :20], want[:, :, :20], rtol=0, atol=1e-12)
    assert (short[:, :, 20:] - want[:, :, 20:]).abs().max() > 1e-2


def test_keys_are_rotated_for_an_attention_of_others() -> None:
    """Steering and patterns bring their own: they get queries as they are and keys where they stand."""
    tensors, plain, other = draw(60), memory(), memory()
    want = feed(plain, tensors, [50, *[1] * 10])
    attend_whole = other._call
    other._call = lambda q, k, v, step, whole: attend_whole(q, k, v, dataclasses.replace(step, compute=sdpa), whole)  # type: ignore[method-assign]
    torch.testing.assert_close(feed(other, tensors, [50, *[1] * 10]), want, rtol=0, atol=1e-12)


def test_what_is_read_and_how_far_it_stands() -> None:
    """First and two local chunks always, at most `attention_length` keys, contiguous distances below it."""
    layer, tensors, seen = memory(), draw(90, b=2), []
    feed(layer, tensors, [50])
    layer.watch = seen.append
    picks = set()
    for t in range(50, 90):
        feed(layer, tensors, [1])
        read: Read = seen[-1]
        assert read.slot is not None and read.shift is not None
        for row in range(2):
            for head in range(H):
                live = read.slot[row, head, 0] >= 0
                slots = read.slot[row, head, 0][live]
                chunks = (slots // 5).unique().tolist()
                assert {0, t // 5 - 1, t // 5} <= set(chunks) and len(chunks) == 4 and len(slots) <= 20
                stands = slots + read.shift[row, head, 0][live]
                assert (t - stands).tolist() == list(range(len(slots) - 1, -1, -1))
                picks.add((head, *chunks))
    assert len({p[1:] for p in picks}) > len({p[0] for p in picks}), "heads all picked the same chunks"


def test_the_future_changes_nothing() -> None:
    """Also not through the feature of a query's own chunk."""
    tensors, other = draw(80), draw(80, seed=1)
    for cut in (41, 43, 45, 60):
        mixed = [torch.cat((x[:, :, :cut], y[:, :, cut:]), 2) for x, y in zip(tensors, other, strict=True)]
        a, b = feed(memory(), tensors, [80]), feed(memory(), mixed, [80])
        torch.testing.assert_close(a[:, :, :cut], b[:, :, :cut], rtol=0, atol=1e-12)


def test_features() -> None:
    """By the definition, for one chunk; and that grouped heads use their own queries on the shared keys."""
    q, k, v = (x.reshape(1, -1, 3, 5, D) for x in draw(15))
    got = chunk_features(q, k, v)
    for head in range(H):
        for p in range(3):
            qc, kc, vc = q[0, head, p], k[0, head // 2, p], v[0, head // 2, p]
            s = (torch.softmax(qc @ kc.mT * D**-0.5, -1) @ vc).mean(0)
            want = torch.softmax(kc @ s * D**-0.5, 0) @ kc
            torch.testing.assert_close(got[0, head, p], want, rtol=0, atol=1e-12)


def test_one_choice_for_a_group() -> None:
    layer, seen = memory(select="kv_head"), []
    feed(layer, draw(60), [50])
    layer.watch = seen.append
    feed(layer, draw(60), [1])
    assert seen[-1].slot.shape[1] == G


@pytest.mark.parametrize(
    "bad",
    [{"chunk_size": 3}, {"attention_length": 512}, {"start_length": 100}, {"chunk_size": 0}, {"start_length": 4100}],
)
def test_bad_parameters(bad: dict[str, object]) -> None:
    with pytest.raises(InvalidParameter):
        qkv.method("longheads", **bad)


def test_sites_that_do_not_fit() -> None:
    method = LongHeads(chunk_size=5, attention_length=20)
    for geometry, why in (
        (Geometry(H, G, D, D), "no rotary embedding"),
        (Geometry(H, G, D, D, rope=Rope(ROPE.frequencies, False, "dynamic")), "depend on the length"),
        (Geometry(H, G, D, 4, rope=ROPE), "widths are 4 and 8"),
        (Geometry(H, G, D, D, rope=ROPE, max_length=10), "longer than the 10 positions"),
    ):
        with pytest.raises(Refused, match=why):
            method.layer(geometry)
