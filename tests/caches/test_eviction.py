"""SnapKV, PyramidKV, TOVA, key norm, LazyEviction: the oracles of their pages, and what a captured step runs."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from interpreter import CUDA, DEVICE, HERE, interpreted
from qkv.caches import knorm, lazyeviction, pyramidkv, snapkv, tova
from qkv.caches._stores import ranked
from qkv.caches.adakv import AdaKV
from qkv.caches.h2o import H2O
from qkv.caches.knorm import KNorm
from qkv.caches.lazyeviction import LazyEviction, recurrence_intervals
from qkv.caches.pyramidkv import PyramidKV
from qkv.caches.snapkv import SnapKV
from qkv.caches.streamingllm import StreamingLLM
from qkv.caches.tova import TOVA
from qkv.caches.window import Window
from qkv.core.attend import attend
from qkv.core.cache import Geometry, Now, Rope, Step, View
from qkv.core.errors import InvalidParameter
from qkv.core.spec import Method

torch.set_num_threads(1)
B, H, G, D = 2, 4, 2, 8
SITE = Geometry(H, G, D, D, layer=1, layers=3)


def drawn(tokens: int, seed: int = 0, rows: int = B, scale: float = 1.5, dtype=torch.float64) -> tuple[Tensor, ...]:
    gen = torch.Generator().manual_seed(seed)
    return tuple((torch.randn(rows, h, tokens, D, generator=gen, dtype=dtype) * scale) for h in (H, G, G))


def feed(layer: Any, x: tuple[Tensor, ...], cuts: Any) -> Any:
    q, k, v = x
    for n in cuts:
        at = slice(layer.seen, layer.seen + n)
        position = torch.arange(at.start, at.stop, dtype=torch.int32).expand(q.shape[0], n)
        layer.attend(q[:, :, at], k[:, :, at], v[:, :, at], Step(position, D**-0.5))
    return layer


def stored(layer: Any) -> list[list[list[int]]]:
    """Positions in use by row and head."""
    return [[[p for p in head if p >= 0] for head in row] for row in layer.positions().tolist()]


def attention(q: Tensor, k: Tensor) -> Tensor:
    """``[B, H, N, N]`` causal."""
    n = q.shape[2]
    logits = q @ k.repeat_interleave(H // G, 1).mT * D**-0.5
    return logits.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf)


# -- SnapKV and PyramidKV --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [1, 3, 7])
@pytest.mark.parametrize("pooling", ["max", "avg"])
def test_snapkv_keeps_what_the_reference_keeps(kernel: int, pooling: str) -> None:
    x, m = drawn(41, seed=kernel), 41
    method = SnapKV(budget=17, window=6, kernel=kernel, pooling=pooling)
    layer = feed(method.layer(SITE), x, [m])
    maps = attention(x[0], x[1]).softmax(-1).unflatten(1, (G, -1))
    for row in range(B):
        for head in range(G):
            want = snapkv.reference(maps[row, head], window=6, kernel=kernel, pooling=pooling, budget=17)
            assert layer.positions()[row, head].tolist() == want


def test_decoded_tokens_stay_until_the_next_block_or_leave_by_their_score() -> None:
    x = drawn(64)
    grows = feed(SnapKV(budget=12, window=4, kernel=3).layer(SITE), x, [40, *(1,) * 15])
    assert grows.kept() == 27 and grows.positions()[0, 0].tolist()[-15:] == list(range(40, 55))
    feed(grows, x, [6])
    assert grows.kept() == 12
    bounded = SnapKV(budget=12, window=4, kernel=3, decode="evict")
    layer = feed(bounded.layer(SITE), x, [40, *(1,) * 15])
    assert layer.kept() == 12
    assert all(p[-4:] == [51, 52, 53, 54] for row in layer.positions().tolist() for p in row)


@pytest.mark.parametrize(
    "method",
    [SnapKV(budget=9, window=4, kernel=3), SnapKV(budget=9, window=4, kernel=3, decode="evict"), TOVA(budget=9),
     LazyEviction(budget=9, window=3, sinks=2), AdaKV(scorer="snapkv:window=4", budget=9), H2O(budget=9)],
    ids=["snapkv", "snapkv evict", "tova", "lazyeviction", "adakv", "h2o"],
)  # fmt: skip
@pytest.mark.parametrize("cuts", [[41], [25, 16], [7, 7, 7, 20]], ids=str)
def test_padding_behind_or_inside_a_prompt_changes_nothing(method: Any, cuts: list[int]) -> None:
    q, k, v = drawn(44, rows=3)
    real = torch.ones(3, 44, dtype=torch.bool)
    real[1, 30:41] = False  # the newest queries of row 1 stand before its padding
    real[2, 3:20] = False

    def run(q: Tensor, k: Tensor, v: Tensor, real: Tensor, cuts: list[int]) -> Tensor:
        layer, position, outs = method.layer(SITE), (real.cumsum(-1) - 1).masked_fill(~real, -1).int(), []
        layer.announce(sum(cuts))
        for n in [*cuts, 1, 1, 1]:
            at = slice(layer.seen, layer.seen + n)
            padding = None if real.all() else real[:, : at.stop]
            step = Step(position[:, at], D**-0.5, padding=padding)
            outs.append(layer.attend(q[:, :, at], k[:, :, at], v[:, :, at], step))
        return torch.cat(outs, 2)

    got = run(q, k, v, real, cuts)
    for row in range(3):
        mine = real[row].nonzero().squeeze(-1)
        pieces = [int(x.sum()) for x in real[row, :41].split(cuts)]
        mq, mk, mv = (x[row : row + 1, :, mine] for x in (q, k, v))
        alone = run(mq, mk, mv, real[row : row + 1, mine], [n for n in pieces if n])
        torch.testing.assert_close(got[row : row + 1, :, mine], alone, rtol=0, atol=1e-10)


def test_a_queried_token_and_its_neighbours_survive() -> None:
    """A key that the last queries ask for is kept with what surrounds it; asked by nobody in the window, it is not."""
    q, k, v = drawn(200, rows=1, scale=0.3)
    k[:, :, 70] = 4.0
    q[:, :, -8:] = 4.0
    method = SnapKV(budget=24, window=8, kernel=5)
    kept = feed(method.layer(SITE), (q, k, v), [200]).positions()[0]
    assert all({68, 69, 70, 71, 72} <= set(head.tolist()) for head in kept)
    q[:, :, -8:] = -4.0  # asked by others only
    q[:, :, 100:150] = 4.0
    other = feed(method.layer(SITE), (q, k, v), [200]).positions()[0]
    assert not any(70 in head.tolist() for head in other)


@pytest.mark.parametrize("budget", [0.1, 0.2, 0.5, 0.9, 64, 500])
@pytest.mark.parametrize("layers", [1, 2, 7, 30])
def test_pyramid_totals_and_slope(budget: Any, layers: int) -> None:
    method = PyramidKV(budget=budget)
    for tokens in (100, 512, 4001):
        mine = [method.slots_at(tokens, replace(SITE, layer=i, layers=layers)) for i in range(layers)]
        mean = method.slots(tokens)
        assert sum(mine) == mean * layers and all(a >= b - 1 for a, b in itertools.pairwise(mine))
        if mean < tokens and mean > method.window:
            line = pyramidkv.reference(mean - method.window, tokens - method.window, layers, method.beta)
            assert all(abs(m - method.window - x) <= 1 for m, x in zip(mine, line, strict=True))
            if 2 * (mean - method.window) <= tokens - method.window and layers > 1:
                assert abs(line[-1] - (mean - method.window) / 20) < 1e-9
    flat = PyramidKV(budget=64, beta=1.0)
    assert [flat.slots_at(512, replace(SITE, layer=i, layers=5)) for i in range(5)] == [64] * 5


@pytest.mark.parametrize("tokens", range(1, 70))
def test_a_pyramid_of_few_tokens_keeps_one_in_every_layer(tokens: int) -> None:
    for budget in (0.02, 0.2, 0.5, 0.9):
        method = PyramidKV(budget=budget)
        mine = [method.slots_at(tokens, replace(SITE, layer=i, layers=30)) for i in range(30)]
        assert min(mine) >= 1 and sum(mine) == method.slots(tokens) * 30


def test_a_flat_pyramid_is_snapkv() -> None:
    x, cuts = drawn(60), [50, *(1,) * 10]
    a = feed(PyramidKV(budget=20, window=5, beta=1.0).layer(SITE), x, cuts)
    b = feed(SnapKV(budget=20, window=5).layer(SITE), x, cuts)
    assert torch.equal(a.positions(), b.positions())


# -- TOVA and key norm -----------------------------------------------------------------------------------------------


def test_tova_keeps_what_the_reference_keeps() -> None:
    x = drawn(40)
    layer = feed(TOVA(budget=9).layer(SITE), x, [1] * 40)
    logits = attention(x[0], x[1])
    for row in range(B):
        want = tova.reference(logits[row], 9)
        assert stored(layer)[row] == [want] * G
    own = stored(feed(TOVA(budget=9, per="head").layer(SITE), x, [1] * 40))
    for head in range(G):
        assert own[0][head] == tova.reference(logits[0, 2 * head : 2 * head + 2], 9)


def test_tova_cuts_a_prompt_by_its_last_query() -> None:
    x = drawn(30)
    layer = feed(TOVA(budget=10).layer(SITE), x, [30])
    row = attention(x[0], x[1]).softmax(-1)[0, :, -1].mean(0)
    want = sorted([29, *row[:-1].topk(9).indices.tolist()])
    assert layer.positions()[0, 1].tolist() == want


def test_knorm_keeps_the_shortest_keys() -> None:
    x = drawn(50)
    layer = feed(KNorm(budget=14).layer(SITE), x, [30, *(1,) * 20])
    whole = feed(KNorm(budget=14).layer(SITE), x, [50])
    for row in range(B):
        for head in range(G):
            assert whole.positions()[row, head].tolist() == knorm.reference(x[1][row, head], 14)
    assert stored(layer) == stored(whole)  # a norm never changes: steps give what one block gives


# -- LazyEviction ----------------------------------------------------------------------------------------------------


def traced(trace: Tensor, method: LazyEviction) -> tuple[Tensor, View]:
    """The state after a decoding trace ``[N, M]`` of tokens that are all stored, from an empty one, and the last view."""
    m = trace.shape[1]
    state, view = torch.zeros(1, 1, m, 2), None
    for t, row in enumerate(trace):
        position = torch.arange(m).where(torch.arange(m) <= t, -1)[None, None]
        now = torch.full((1, 1), t)
        view = View(torch.zeros(1, 1, m, 1), torch.zeros(1, 1, m, 1), position, torch.full((1, 1, 1), m), now[..., None],
                    torch.zeros(1, 1, 1, 1), rows=row[None, None, None], asked=now)  # fmt: skip
        state = method.observe(state, view)
    assert view is not None
    return state, view


def test_the_state_is_that_of_the_reference_over_500_steps() -> None:
    gen = torch.Generator().manual_seed(0)
    trace = torch.rand(500, 500, generator=gen) ** 8
    state, _ = traced(trace, LazyEviction(alpha=0.9, budget=400, window=5))
    last, gap = lazyeviction.reference(trace, 0.9)
    assert (state[0, 0, :, 0] - 1).int().tolist() == last and state[0, 0, :, 1].int().tolist() == gap
    assert recurrence_intervals(trace, 0.9).tolist() == gap
    late = trace[400:]
    assert recurrence_intervals(late, 0.9).tolist() == lazyeviction.reference(late, 0.9)[1]


def test_a_token_that_comes_back_outlives_one_that_did_not() -> None:
    trace = torch.zeros(31, 31)
    trace[[10, 25], 0] = 1.0
    trace[:, 1] = 0.0
    trace[1, 1] = trace[2, 1] = 1.0
    method = LazyEviction(alpha=0.5, budget=20, window=3, sinks=0)
    state, view = traced(trace, method)
    assert state[0, 0, 0].tolist() == [26.0, 15.0]
    worth = method.rank(state, view)[0, 0]
    assert worth[0] > worth[1] and (worth[28:] == torch.inf).all()


def test_worth_grows_with_the_interval_and_falls_with_silence() -> None:
    method = LazyEviction(budget=8, window=1, sinks=0)
    position, one = torch.arange(6)[None, None], torch.zeros(1, 1, 6, 1)
    view = View(one, one, position, torch.full((1, 1, 1), 4), torch.full((1, 1, 1), 40), one)
    gap = torch.tensor([0.0, 1, 2, 4, 8, 16])
    same_last = torch.stack((torch.full((6,), 20.0), gap), -1)[None, None]
    assert (method.rank(same_last, view)[0, 0].diff() > 0).all()
    same_gap = torch.stack((gap + 1, torch.full((6,), 3.0)), -1)[None, None]
    assert (method.rank(same_gap, view)[0, 0].diff() > 0).all()


def test_without_intervals_it_is_least_recently_used() -> None:
    """Every token matters once more, long before any cut: MRI is the same for all and TS decides."""
    gen = torch.Generator().manual_seed(1)
    method = LazyEviction(budget=6, window=1, sinks=0, alpha=0.5)
    lru: OrderedDict[int, None] = OrderedDict()
    state, stored = torch.zeros(1, 1, 0, 2), []
    for t in range(200):
        stored.append(t)
        lru[t] = None
        touched = stored[int(torch.randint(len(stored), (1,), generator=gen))]
        lru.move_to_end(touched)
        if touched != t:
            lru.move_to_end(t)
        position = torch.tensor(stored)[None, None]
        state = torch.cat((state, torch.zeros(1, 1, 1, 2)), 2)
        state[..., 1] = 0.0
        rows = (position == touched).float()[:, :, None]
        one, now = torch.zeros(1, 1, len(stored), 1), torch.full((1, 1), t)
        view = View(one, one, position, torch.full((1, 1, 1), 6), now[..., None], one[:, :, :1], rows=rows, asked=now)
        state = method.observe(state, view)
        state[..., 1] = 0.0
        if len(stored) > 6:
            worth = method.rank(state, view)[0, 0]
            drop = int(worth.argmin())
            ties = {p for p, s in zip(stored, state[0, 0, :, 0].tolist(), strict=True) if s == state[0, 0, drop, 0]}
            gone = stored.pop(drop)
            state = torch.cat((state[:, :, :drop], state[:, :, drop + 1 :]), 2)
            oldest = next(iter(lru))
            assert gone == oldest or oldest in ties
            del lru[gone]


def test_never_above_the_lag_and_exactly_at_the_budget_after_a_cut() -> None:
    x = drawn(120)
    method = LazyEviction(budget=20, window=7, sinks=2)
    layer = feed(method.layer(SITE), x, [30])
    assert layer.kept() == 20
    counts = []
    for _ in range(80):
        feed(layer, x, [1])
        counts.append(int((layer.positions() >= 0).sum(-1).max()))
        kept = layer.positions()
        assert (kept[..., :2] == torch.tensor([0, 1])).all()
        assert (kept[..., -7:] == torch.arange(layer.seen - 7, layer.seen)).all()
    assert counts[:14] == [21, 22, 23, 24, 25, 26, 20, 21, 22, 23, 24, 25, 26, 20] and max(counts) == 26


def test_a_token_needed_every_40_steps_is_kept_where_instant_eviction_loses_it() -> None:
    """Keys of one direction, asked for every 40 steps; W = 50, budget 100 of 400."""
    steps, period = 400, 40
    gen = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, h, steps, D, generator=gen, dtype=torch.float64) * 0.5 for h in (H, G, G))
    q[..., 0], k[..., 0] = 0.0, 0.0
    k[:, :, 5] = 0.0
    k[:, :, 5, 0] = 12.0
    q[:, :, 20::period] = 0.0
    q[:, :, 20::period, 0] = 6.0
    q[:, :, :, 0] -= 2.0 * (torch.arange(steps) % period != 20)  # otherwise it draws nothing
    site = replace(SITE, heads=H)
    lazy = feed(LazyEviction(budget=100, window=50, sinks=0, alpha=0.2).layer(site), (q, k, v), [1] * steps)
    tova_ = feed(TOVA(budget=100).layer(site), (q, k, v), [1] * steps)
    window = feed(Window(budget=100).layer(site), (q, k, v), [1] * steps)
    assert all(5 in head.tolist() for head in lazy.positions()[0])
    assert not any(5 in head.tolist() for layer in (tova_, window) for head in layer.positions()[0])


def test_a_protected_prompt_stays() -> None:
    x = drawn(120)
    method = LazyEviction(budget=12, window=5, sinks=0, protect_prompt=True)
    layer = feed(method.layer(SITE), x, [30, *(1,) * 90])
    assert all(head[:30] == list(range(30)) for row in layer.positions().tolist() for head in row)
    assert 42 <= layer.kept() <= 46


# -- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "bad"),
    [
        (SnapKV, {"kernel": 4}), (SnapKV, {"budget": 32}), (SnapKV, {"pooling": "median"}), (SnapKV, {"window": 0}),
        (PyramidKV, {"beta": 0.5}), (PyramidKV, {"budget": 8, "window": 8}), (TOVA, {"budget": 0}),
        (KNorm, {"decode": "never"}), (LazyEviction, {"alpha": 0.0}), (LazyEviction, {"budget": 29}),
        (LazyEviction, {"alpha": -1.0}), (LazyEviction, {"window": 0}),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(cls: type[Method], bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameter, match=cls.spec.id):
        cls.create(**bad)


# -- what a captured step runs ------------------------------------------------------------------------------------------


def _place(keys, values, position, state, slot, k, v, new) -> None:
    for x, y in ((keys, k), (values, v)):
        x.scatter_(2, slot[..., None].expand(-1, -1, -1, x.shape[3]), y)
    position.scatter_(2, slot, new[:, None].expand_as(slot))
    if state is not None:
        state.scatter_(2, slot[..., None].expand(-1, -1, -1, state.shape[3]), 0.0)


def _free(position, slot, *, worth=None, protect=0) -> None:
    idle = position.gather(2, slot) < 0
    worth = position.float().masked_fill(position < protect, torch.inf) if worth is None else worth
    least = worth.nan_to_num(-3e38, 3e38, -3e38).scatter(2, slot, torch.inf).argmin(-1, keepdim=True)
    slot.copy_(torch.where(idle, slot, least))
    position.scatter_(2, slot, -1)


def _read(q, k, v, *, length, position=None, scale, scores=None):
    done = attend(q, k, v, mask=_live(k, length, position), scale=scale)
    if scores is not None:
        scores.copy_((q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * scale).squeeze(2))
    return done.out, done.lse


def _masses(q, k, v, *, length, position=None, drawing=None, scale):
    done = attend(q, k, v, mask=_live(k, length, position), scale=scale, mass=True)
    return done.out, done.mass if drawing is None else done.mass * (drawing >= 0)[:, None, None]


def _settle(
    scores, lse, position, slot, new, keep, *, state=None, reduce="sum", layer=False, recent=0.0, normalize=False
):
    (b, g, c), newest = position.shape, new.unsqueeze(-1)
    mass = (scores - lse).exp() * (newest >= 0)
    mass = mass.mean(1, keepdim=True).expand(b, g, c) if layer else mass.unflatten(1, (g, -1))
    if not layer:
        mass = mass.amax(2) if reduce == "max" else getattr(mass, reduce)(2)
    if state is not None:
        mass = state.add_(mass.unsqueeze(-1)).squeeze(-1)
    worth = mass / (newest - position + 1).clamp(min=1) if normalize else mass
    worth = worth.masked_fill(position > newest - (keep * recent).floor(), torch.inf)
    _free(position, slot, worth=worth)


def _live(k, length, position):
    live = (torch.arange(k.shape[2], device=k.device) < length).expand(*k.shape[:3])
    return (live if position is None else live & (position >= 0)).unsqueeze(2)


def _turn(keys, anchors, index, frequencies, shift):
    at = index[..., None].expand(-1, -1, -1, keys.shape[3])
    keys.scatter_(2, at, Rope(frequencies).rotate(anchors, shift))


KERNELS = {
    "slots:place": _place, "slots:free": _free, "slots:settle": _settle, "slots:turn": _turn,
    "decode:decode_attention": _read, "decode:decode_masses": _masses,
}  # fmt: skip


@pytest.mark.parametrize(
    "method",
    [
        H2O(budget=9), H2O(budget=9, recent=0.0, normalize=True), TOVA(budget=9), KNorm(budget=9), Window(budget=9),
        H2O(budget=9, group_reduce="max"), TOVA(budget=9, per="head"), StreamingLLM(sinks=2, window=7),
        StreamingLLM(sinks=2, window=7, positions="original"), SnapKV(budget=9, window=4, decode="evict"),
        SnapKV(budget=9, window=4), LazyEviction(budget=9, window=4, sinks=2), KNorm(budget=9, decode="grow"),
    ],
    ids=str,
)  # fmt: skip
def test_steps_in_place_are_plain_steps_also_where_a_row_idles(method: Any, monkeypatch: Any) -> None:
    """One row idles (position -1) in some steps: it keeps what it has, its scores stay, and its next token goes on.

    The kernels, which have tests of their own, are written out in torch here.
    """
    if not CUDA:
        monkeypatch.setattr(ranked, "kernel", KERNELS.__getitem__)
    q, k, v = (x.to(DEVICE) for x in drawn(60, dtype=torch.float32))
    site = replace(SITE, rope=Rope(10000.0 ** -(torch.arange(D // 2, device=DEVICE) / (D // 2))))
    plain, fast = method.layer(site), method.layer(site)
    plain._steady_on_device = lambda: False
    if not method.lag():
        fast._steady_on_device = lambda: fast.slot is not None and not fast.holes
    real = torch.ones(B, 60, dtype=torch.bool, device=DEVICE)
    real[1, [22, 23, 30, 41]] = False
    position = (real.cumsum(-1, dtype=torch.int32) - 1).masked_fill(~real, -1)
    fast.reserve(60)
    for layer in (plain, fast):
        layer.attend(q[:, :, :20], k[:, :, :20], v[:, :, :20], Step(position[:, :20], 0.3))
    quick = 0
    for t in range(20, 60):
        at = slice(t, t + 1)
        step = Step(position[:, at], 0.3, real[:, : t + 1])
        want = plain.attend(q[:, :, at], k[:, :, at], v[:, :, at], step)
        if method.lag() and _ready(fast):
            column = torch.full((1,), t, device=DEVICE)
            fast.holes, quick = True, quick + 1
            got = fast.step(
                q[:, :, at], k[:, :, at], v[:, :, at], 0.3, Now(column, (column + 1).int(), position[:, at])
            )
        else:
            quick += fast._steady_on_device()
            got = fast.attend(q[:, :, at], k[:, :, at], v[:, :, at], step)
        for row in range(B):
            if real[row, t]:
                torch.testing.assert_close(got[row], want[row], rtol=0, atol=2e-5)
            assert stored(fast)[row] == stored(plain)[row], f"step {t}, row {row}"
    assert quick >= 25


def _ready(layer: Any) -> bool:
    """`static()` as it would be on a device."""
    if layer.over >= layer.lag or layer.filled >= layer.keys.shape[2]:
        return False
    layer.offset = torch.full((1,), layer.seen - layer.filled, dtype=torch.int64, device=DEVICE)
    return True


def test_the_kernel_frees_nothing_where_a_row_idles() -> None:
    pytest.importorskip("triton")
    if not HERE:
        assert "1 passed" in interpreted(__file__, "kernel_frees")
        return
    from qkv.kernels.slots import free

    for worth in (None, torch.rand(B, G, 11, device=DEVICE)):
        position = torch.rand(B, G, 11, device=DEVICE).argsort(-1).int()
        slot = torch.randint(0, 11, (B, G, 1), device=DEVICE)
        position[1] = position[1].scatter(1, slot[1], -1)
        want, where = position.clone(), slot.clone()
        _free(want, where, worth=worth)
        assert torch.equal(where[1], slot[1]) and not torch.equal(where[0], slot[0])
        free(position, slot, worth=worth)
        assert torch.equal(position, want) and torch.equal(slot, where)
