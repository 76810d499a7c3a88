"""Caches on drawn head groupings, paddings, chunkings and budgets, against attention written out query by query."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qkv.caches._stores.dense import DenseCache
from qkv.caches.h2o import H2O
from qkv.caches.kivi import KIVI, reference
from qkv.caches.streamingllm import StreamingLLM
from qkv.caches.window import Window
from qkv.core.attend import sdpa
from qkv.core.cache import Geometry, LayerCache, Policy, Rope, Step

torch.set_num_threads(1)
EXAMPLES = settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
TIGHT = 1e-9


@dataclass
class Drawn:
    """A batch of rows with padding anywhere, cut into blocks."""

    q: Tensor
    k: Tensor
    v: Tensor
    padding: Tensor | None
    cuts: list[int]
    geometry: Geometry
    position: Tensor = field(init=False)

    def __post_init__(self) -> None:
        b, _, t, _ = self.q.shape
        real = torch.ones(b, t, dtype=torch.bool) if self.padding is None else self.padding
        self.position = (real.int().cumsum(-1) - 1).masked_fill(~real, -1)

    def step(self, at: slice, **more: Any) -> Step:
        padding = None if self.padding is None else self.padding[:, : at.stop]
        return Step(self.position[:, at], self.q.shape[-1] ** -0.5, padding, **more)


@st.composite
def drawn(draw: st.DrawFn, holes: bool = True) -> Drawn:
    b, g, r = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    d, e = draw(st.sampled_from([4, 8])), draw(st.sampled_from([4, 8]))
    seed = draw(st.integers(0, 9999))
    gen = torch.Generator().manual_seed(seed)  # draws the cuts and the padding: hypothesis would mostly try short ones

    def upto(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=gen))

    prompt = upto(1, 24)
    cuts = [prompt, *((1, 1, 1, 2, 5)[upto(0, 4)] for _ in range(upto(4, 14)))]
    t = sum(cuts)
    q, k, v = (
        torch.randn(b, h, t, w, generator=gen, dtype=torch.float64) * 1.5 for h, w in ((g * r, d), (g, d), (g, e))
    )
    kind = draw(st.sampled_from(["none", "left", "holes"] if holes else ["none", "left"]))
    padding = torch.ones(b, t, dtype=torch.bool)
    for row in range(b):
        if kind != "none":
            padding[row, : upto(0, prompt - 1)] = False
        if kind == "holes":
            padding[row] &= torch.rand(t, generator=gen) > 0.2
    rope = Rope(100.0 ** -(torch.arange(d // 2, dtype=torch.float32) / (d // 2)))
    return Drawn(q, k, v, None if bool(padding.all()) else padding, cuts, Geometry(g * r, g, d, e, rope=rope))


def blocks(cuts: list[int], most: int | None = None) -> list[slice]:
    out, start = [], 0
    for n in cuts:
        for size in [n] if most is None else [min(most, n - i) for i in range(0, n, most)]:
            out.append(slice(start, start + size))
            start += size
    return out


def softmax(q: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """One query ``[D]`` over ``[M, D]``, ``[M, E]``: output and weights."""
    logits = keys @ q / math.sqrt(q.shape[0])
    weights = (logits - logits.max()).exp()
    weights = weights / weights.sum()
    return weights @ values, weights


def columns(x: Drawn, row: int, positions: set[int]) -> list[int]:
    """Where a row's tokens of these positions lie, oldest first."""
    at = {p: c for c, p in enumerate(x.position[row].tolist()) if p >= 0}
    return [at[p] for p in sorted(positions)]


@given(drawn(), st.booleans())
@EXAMPLES
def test_dense_is_exact(x: Drawn, through: bool) -> None:
    layer, pieces = DenseCache(x.geometry), blocks(x.cuts)
    more = {"compute": sdpa} if through else {}
    got = torch.cat([layer.attend(x.q[:, :, a], x.k[:, :, a], x.v[:, :, a], x.step(a, **more)) for a in pieces], 2)
    r = x.geometry.heads // x.geometry.kv_heads
    for row in range(x.q.shape[0]):
        for column in (x.position[row] >= 0).nonzero().flatten().tolist():
            mine = columns(x, row, set(range(int(x.position[row, column]) + 1)))
            for head in range(x.geometry.heads):
                want, _ = softmax(x.q[row, head, column], x.k[row, head // r, mine], x.v[row, head // r, mine])
                assert (got[row, head, column] - want).abs().max() < TIGHT
    assert layer.kept() == layer.seen == x.q.shape[2]


BUDGETS = st.one_of(st.integers(1, 16), st.sampled_from([0.2, 0.5, 0.9, 1.0]))
PLACES = st.sampled_from(["original", "cache"])
by_position = st.one_of(
    st.builds(Window, budget=BUDGETS),
    st.builds(StreamingLLM, sinks=st.integers(0, 4), window=st.integers(1, 12), positions=PLACES),
)
by_score = st.builds(
    H2O,
    budget=BUDGETS,
    recent=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    positions=PLACES,
    group_reduce=st.sampled_from(["sum", "mean", "max"]),
    normalize=st.booleans(),
)
packed = st.builds(KIVI, bits=st.sampled_from([2, 8]), group=st.just(4), residual=st.sampled_from([4, 12]))


class Simulated:
    """What one row and KV head stores under a policy, by the definition on its page."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.score = policy, dict[int, float]()
        self.stored: set[int] = set()

    def keep(self, budget: int, newest: int) -> None:
        """Evict down to `budget` after a call."""
        policy = self.policy
        if len(self.stored) <= budget:
            return
        if isinstance(policy, Window):
            self.stored = {p for p in self.stored if p > newest - budget}
        elif isinstance(policy, StreamingLLM):
            self.stored = {p for p in self.stored if p < policy.sinks or p > newest - policy.window}
        else:
            assert isinstance(policy, H2O)
            recent = max(1, int(budget * policy.recent))  # the newest token always stays
            first = [p for p in self.stored if p > newest - recent]
            left = sorted(self.stored - set(first), key=lambda p: -self.worth(p, newest))
            self.stored = {*first, *left[: budget - len(first)]}
        self.score = {p: s for p, s in self.score.items() if p in self.stored}

    def worth(self, p: int, newest: int) -> float:
        return self.score[p] / (newest - p + 1 if self.policy.normalize else 1)  # type: ignore[attr-defined]


@given(drawn(), by_position)
@EXAMPLES
def test_windows_and_sinks(x: Drawn, policy: Policy) -> None:
    follow(x, policy)


@given(drawn(), by_score)
@EXAMPLES
def test_heavy_hitters(x: Drawn, policy: Policy) -> None:
    follow(x, policy)


def follow(x: Drawn, policy: Policy) -> None:
    """Outputs, kept positions per row and head, budgets and order, after every block."""
    layer = policy.layer(x.geometry)
    b, g = x.q.shape[0], x.geometry.kv_heads
    r = x.geometry.heads // g
    heads = [[Simulated(policy) for _ in range(g)] for _ in range(b)]
    most = policy.chunk(policy.slots(x.cuts[0]))
    budget = [0] * b
    for at in blocks(x.cuts, most):
        got = layer.attend(x.q[:, :, at], x.k[:, :, at], x.v[:, :, at], x.step(at))
        for row in range(b):
            new = [p for p in x.position[row, at].tolist() if p >= 0]
            newest = int(x.position[row, : at.stop].max())
            if at.start == 0 or at.stop - at.start > 1:
                budget[row] = policy.slots(max(1, newest + 1))
            for head in range(g):
                one = heads[row][head]
                before = set(one.stored)
                mass = torch.zeros(r, newest + 1, dtype=torch.float64)
                for column in [c for c in range(at.start, at.stop) if x.position[row, c] >= 0]:
                    p = int(x.position[row, column])
                    seen = before | {n for n in new if n <= p}
                    if isinstance(policy, Window):
                        seen = {s for s in seen if s >= p - policy.slots(1 << 40)}
                    if isinstance(policy, StreamingLLM) and policy.positions == "original":
                        seen = {s for s in seen if s < policy.sinks or s >= p - policy.window}
                    keys = x.k[row, head, columns(x, row, seen)]
                    if getattr(policy, "positions", "") == "cache":
                        keys = _placed(keys, sorted(seen), p, x.geometry)
                    values = x.v[row, head, columns(x, row, seen)]
                    for i in range(r):
                        out, weights = softmax(x.q[row, head * r + i, column], keys, values)
                        assert (got[row, head * r + i, column - at.start] - out).abs().max() < TIGHT
                        mass[i, sorted(seen)] += weights
                if isinstance(policy, H2O):
                    drawn_ = getattr(mass, "amax" if policy.group_reduce == "max" else policy.group_reduce)(0)
                    for p in before | set(new):
                        one.score[p] = one.score.get(p, 0.0) + float(drawn_[p])
                one.stored |= set(new)
                one.keep(budget[row], newest)
                kept = [p for p in layer.positions()[row, head].tolist() if p >= 0]
                assert kept == sorted(one.stored), (row, head, at)
                assert len(kept) <= budget[row] and layer.kept() >= len(kept)


def _placed(keys: Tensor, positions: list[int], query: int, geometry: Geometry) -> Tensor:
    """Keys moved so that the i-th oldest lies at place i of the cache, seen from the query at the last place."""
    assert geometry.rope is not None
    last = len(positions) - 1
    shift = [(i - last) - (p - query) for i, p in enumerate(positions)]
    return geometry.rope.rotate(keys, torch.tensor(shift))


@given(drawn(), st.sampled_from([2, 4, 8]), st.sampled_from([2, 4, 8]), st.sampled_from([4, 8]), st.booleans())
@EXAMPLES
def test_packed_reads_what_the_reference_says(x: Drawn, k_bits: int, v_bits: int, residual: int, through: bool) -> None:
    """Each row, whatever the padding: the tokens before the block as the definition stores them, the block as it is."""
    what = {"k_bits": k_bits, "v_bits": v_bits, "group": 4, "residual": residual}
    layer = KIVI(**what).layer(x.geometry)
    more = {"compute": sdpa} if through else {}
    r = x.geometry.heads // x.geometry.kv_heads
    for at in blocks(x.cuts):
        got = layer.attend(x.q[:, :, at], x.k[:, :, at], x.v[:, :, at], x.step(at, **more))
        for row in range(x.q.shape[0]):
            real = (x.position[row] >= 0).nonzero().flatten()
            old, new = real[real < at.start], real[(real >= at.start) & (real < at.stop)].tolist()
            k, v = x.k[row : row + 1, :, old], x.v[row : row + 1, :, old]
            if len(old):
                k, v = reference(k, v, **what, stored=torch.float16)
            for i, column in enumerate(new):
                mine = new[: i + 1]
                for head in range(x.geometry.heads):
                    keys = torch.cat((k[0, head // r], x.k[row, head // r, mine]))
                    values = torch.cat((v[0, head // r], x.v[row, head // r, mine]))
                    want, _ = softmax(x.q[row, head, column], keys, values)
                    assert (got[row, head, column - at.start] - want).abs().max() < TIGHT
    assert layer.seen == x.q.shape[2] and layer.kept() == int(x.position.max()) + 1


def _run(layer: LayerCache, x: Drawn, pieces: list[slice], rows: slice = slice(None)) -> Tensor:
    outs = []
    for a in pieces:
        step = x.step(a)
        padding = None if step.padding is None else step.padding[rows]
        step = Step(step.position[rows], step.scale, padding)
        outs.append(layer.attend(x.q[rows, :, a], x.k[rows, :, a], x.v[rows, :, a], step))
    return torch.cat(outs, 2)


@given(drawn(holes=False), st.one_of(by_position, by_score), st.integers(0, 9999))
@EXAMPLES
def test_evicting_caches_forget_detours(x: Drawn, method: Any, seed: int) -> None:
    detours(x, method, seed)


@given(drawn(holes=False), packed, st.integers(0, 9999))
@EXAMPLES
def test_packed_caches_forget_detours(x: Drawn, method: Any, seed: int) -> None:
    detours(x, method, seed)


def detours(x: Drawn, method: Any, seed: int) -> None:
    """A run with rejected candidates, restores and reorders there and back = the plain run."""
    gen = torch.Generator().manual_seed(seed)

    def upto(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=gen))

    plain, layer = method.layer(x.geometry), method.layer(x.geometry)
    pieces = blocks([x.cuts[0], *(1,) * sum(x.cuts[1:])])
    want = _run(plain, x, pieces)
    layer.announce(x.cuts[0])
    layer.record()
    outs, at = [_run(layer, x, pieces[:1])], x.cuts[0]
    layer.crop(0)
    total = x.q.shape[2]
    while at < total:
        n = min(upto(1, 4), total - at)
        keep = upto(0, n)
        good, wrong = slice(at, at + keep), slice(at + keep, at + n)
        q, k, v = (torch.cat((y[:, :, good], y[:, :, wrong].flip(2) * 1.5), 2) for y in (x.q, x.k, x.v))
        out = layer.attend(q, k, v, x.step(slice(at, at + n)))
        layer.crop(n - keep)
        outs.append(out[:, :, :keep])
        at += keep
        if upto(0, 4) == 0:
            saved = layer.tensors()
            layer = method.layer(x.geometry)
            layer.restore(saved)
            layer.announce(x.cuts[0])
            layer.record()
        if upto(0, 4) == 0:
            order = torch.randperm(x.q.shape[0], generator=gen)
            layer.select(order)
            layer.select(order.argsort())
        if keep == 0 and upto(0, 1):
            outs.append(_run(layer, x, [slice(at, at + 1)]))
            layer.crop(0)
            at += 1
    got = torch.cat(outs, 2)
    real = (x.position >= 0)[:, None, :, None]
    assert ((got - want) * real).abs().max() < TIGHT
    assert torch.equal(layer.positions(), plain.positions())
    assert layer.seen == plain.seen == total
