"""ZipVL: the oracles of its page; evict mode under the laws of caches that lose tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import qkv
from qkv.caches._saliency import probe_mass, probe_rows, seen_by
from qkv.caches._stores.mixed import MixedCache
from qkv.caches.zipvl import ZipVL, dynamic_ratio, reference
from qkv.core.attend import attend
from qkv.core.cache import Geometry, Step
from qkv.core.errors import InvalidInput, InvalidParameter
from qkv.testing import laws
from qkv.testing._law import Case

H, G, D = 6, 3, 8


def cache(**parameters: Any) -> MixedCache:
    layer = ZipVL(**{"regroup_every": 10, "probes": (4, 6)} | parameters).layer(Geometry(H, G, D, D))
    assert isinstance(layer, MixedCache)
    return layer


def draw(n: int, b: int = 1, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(b, h, n, D, generator=gen, dtype=torch.float64) for h in (H, G, G))
    return 2 * q, k, v


def feed(layer: MixedCache, tokens: tuple[Tensor, Tensor, Tensor], cuts: list[int], **more: Any) -> Tensor:
    outs = []
    for n in cuts:
        q, k, v = (x[:, :, layer.seen : layer.seen + n] for x in tokens)
        position = torch.arange(layer.seen, layer.seen + n, dtype=torch.int32).expand(q.shape[0], n)
        outs.append(layer.attend(q, k, v, Step(position, D**-0.5, **more)))
    return torch.cat(outs, 2)


def mass(layer: MixedCache, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Drawn ``[N]`` from the probes of a prompt, mean over heads, and how many of them could see each token."""
    n = q.shape[2]
    at = torch.tensor(probe_rows(0, n, *layer.method.probes_of(n, False), layer.probes.seed))
    return probe_mass(q[:, :, at], k, at, scale=D**-0.5).mean(1)[0], seen_by(at, n)


# -- how many -----------------------------------------------------------------------------------------------------------


def test_the_count_is_minimal_and_monotone() -> None:
    scores = torch.rand(50, 37, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) ** 4
    last = torch.zeros(50, dtype=torch.int64)
    for tau in (0.1, 0.5, 0.9, 0.975, 0.999, 1.0):
        count = dynamic_ratio(scores, tau)
        held = scores.sort(-1, descending=True).values.cumsum(-1)
        if tau < 1:
            assert (held.gather(-1, count[:, None] - 1)[:, 0] >= tau * scores.sum(-1) * (1 - 1e-9)).all()
            short = count > 1
            assert (held[short].gather(-1, count[short, None] - 2)[:, 0] < tau * scores[short].sum(-1)).all()
        assert (count >= last).all()
        last = count
    assert (last == 37).all()


@pytest.mark.parametrize("tau", [0.05, 0.3, 0.9, 0.975, 1.0])
def test_uniform_and_one_hot_attention(tau: float) -> None:
    for n in (1, 7, 40, 1000):
        want = max(1, -(-round(tau * n * 1000) // 1000))  # ceil(tau N), free of rounding
        assert int(dynamic_ratio(torch.full((n,), 1 / n), tau)) == want
        one = torch.zeros(n)
        one[n // 2] = 3.0
        assert int(dynamic_ratio(one, tau)) == (n if tau == 1 else 1)


def test_bad_scores_and_shares() -> None:
    for tau in (0.0, -0.1, 1.1):
        with pytest.raises(InvalidParameter, match="tau"):
            dynamic_ratio(torch.ones(3), tau)
    with pytest.raises(InvalidInput, match="negative"):
        dynamic_ratio(torch.tensor([1.0, -1.0]), 0.5)
    with pytest.raises(InvalidInput):
        dynamic_ratio(torch.ones(2, 0), 0.5)


# -- the prompt -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("tau", [0.5, 0.9, 0.975])
def test_gathered_attention_is_dense_attention_masked(dense: bool, tau: float) -> None:
    q, k, v = draw(60, seed=1)
    layer = cache(tau=tau, mode="evict", bits=16, dense_queries=dense)
    got = feed(layer, (q, k, v), [60])
    important = torch.zeros(60, dtype=torch.bool)
    important[layer.positions()[0, 0]] = True
    want = reference(q, k, v, important=important, dense_queries=dense)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    drawn, seen = mass(layer, q, k)
    count = max(4, int(dynamic_ratio(drawn, tau)))
    assert int(important.sum()) == count == layer.kept() == layer.precise()[0] < 60
    assert important[-4:].all(), "the newest probes are always important"
    score = (drawn / seen)[:-4]
    rest = important[:-4]
    assert not rest.any() or rest.all() or score[rest].min() >= score[~rest].max()


@pytest.mark.parametrize("mode", ["quantize", "evict"])
@pytest.mark.parametrize("dense", [False, True])
def test_everything_important_is_exact(mode: str, dense: bool) -> None:
    tokens = draw(60, b=2, seed=2)
    layer = cache(tau=1.0, mode=mode, bits=16, dense_queries=dense)
    want = attend(*tokens, causal=True).out
    torch.testing.assert_close(feed(layer, tokens, [40, *[1] * 15, 5]), want, rtol=0, atol=1e-12)


def test_a_later_piece_attends_to_what_is_stored_and_to_its_own_set() -> None:
    q, k, v = draw(70, seed=3)
    for dense in (False, True):
        layer = cache(tau=0.8, mode="evict", bits=16, dense_queries=dense)
        feed(layer, (q, k, v), [40, 1, 1, 1])
        before = layer.positions()[0, 0]
        got = feed(layer, (q, k, v), [27])
        after = layer.positions()[0, 0]
        keys = torch.cat((before[before < 40], after[after >= 40]))
        important = torch.zeros(70, dtype=torch.bool)
        important[keys] = True
        want = reference(q, k, v, important=important, dense_queries=dense)[:, :, 43:]
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_another_compute_sees_the_gathered_tokens() -> None:
    q, k, v = draw(75, b=2, seed=4)
    for dense in (False, True):
        one, two = (cache(tau=0.8, dense_queries=dense) for _ in range(2))
        run = lambda *a, **kw: attend(*a, **kw).out  # noqa: E731
        a, b = feed(one, (q, k, v), [40, *[1] * 15, 20]), feed(two, (q, k, v), [40, *[1] * 15, 20], compute=run)
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


# -- the cache --------------------------------------------------------------------------------------------------------------


def test_what_is_evicted_is_gone_and_decoding_reads_the_rest() -> None:
    q, k, v = draw(100, b=2, seed=5)
    layer = cache(tau=0.8, mode="evict", bits=16)
    feed(layer, (q, k, v), [60])
    assert len(set(layer.precise())) == 2, "each row has a count of its own"
    for t in range(60, 100):
        before = layer.positions()
        seen = torch.zeros(2, t + 1, dtype=torch.bool)
        for row in range(2):
            at = before[row, 0]
            seen[row, at[at >= 0]] = True
        seen[:, t] = True
        want = attend(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1], mask=seen[:, None, None]).out
        torch.testing.assert_close(feed(layer, (q, k, v), [1]), want, rtol=0, atol=1e-12)
    assert layer.kept() < 95 and all(x < 10 for x in layer.waiting)


def test_rows_of_a_batch_are_the_rows_alone() -> None:
    tokens = draw(90, b=3, seed=9)
    both = cache(tau=0.8)
    got = feed(both, tokens, [60, *[1] * 25, 5])
    for row in range(3):
        alone, mine = cache(tau=0.8), tuple(x[row : row + 1] for x in tokens)
        torch.testing.assert_close(got[row : row + 1], feed(alone, mine, [60, *[1] * 25, 5]), rtol=0, atol=1e-12)  # type: ignore[arg-type]
        assert alone.precise()[0] == both.precise()[row]
    assert len(set(both.precise())) > 1


@pytest.mark.parametrize("bits", [4, 16])
def test_bytes_are_those_of_the_kept(bits: int) -> None:
    q, k, v = (x.float() for x in draw(60, seed=6))
    layer = cache(tau=0.8, mode="evict", bits=bits)
    feed(layer, (q, k, v), [60])
    kept = layer.kept()
    codes = {16: 2 * G * kept * D * 4, 4: 2 * G * kept * 4 + 2 * 2 * G * D + 2 * 2 * kept + 2 * G * D}[bits]
    assert layer.bytes() == codes + 8  # and a bit for each of the 60 tokens


def test_mixed_bits_hold_everything() -> None:
    tokens = draw(60, b=2, seed=7)
    layer = cache(tau=0.8)
    feed(layer, tokens, [60])
    assert layer.kept() == 60 and 0 < min(layer.precise()) <= max(layer.precise()) < 60
    errors = []
    for row in range(2):
        keys, _ = layer.read([row])
        kept = cache(tau=0.8, mode="evict")
        feed(kept, tuple(x[row : row + 1] for x in tokens), [60])  # type: ignore[arg-type]
        at = torch.zeros(60, dtype=torch.bool)
        at[kept.positions()[0, 0]] = True
        gap = (keys - tokens[1][row : row + 1]).abs()
        errors.append((float(gap[:, :, at].mean()), float(gap[:, :, ~at].mean())))
    assert all(4 * precise < rough for precise, rough in errors), errors


CASE = Case(qkv.method("zipvl", mode="evict", tau=0.8))
EVICTING = [
    name
    for name, law in laws("cache").items()
    if law.applies(CASE) and not law.expensive and name not in ("loses_nothing", "eight_bits_are_close")
]


@pytest.mark.parametrize("name", EVICTING)
def test_laws_of_evict_mode(name: str) -> None:
    laws("cache")[name].run(CASE)


def test_selection_by_mass_beats_the_least_attended() -> None:
    """Decoding after a prompt whose attention rests on a few tokens: the kept ones carry it, the others do not."""
    q, k, v = draw(120, seed=8)
    heavy = torch.randperm(100, generator=torch.Generator().manual_seed(0))[:12]
    k[:, :, heavy] += 2.5 * torch.randn(1, G, 1, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    q = q + k[:, :, heavy].mean(2, keepdim=True).repeat_interleave(2, 1)
    want = attend(q, k, v, causal=True).out[:, :, 100:]
    layer = cache(tau=0.9, mode="evict", bits=16, regroup_every=50)
    got = feed(layer, (q, k, v), [100, *[1] * 20])[:, :, 100:]
    kept = torch.zeros(120, dtype=torch.bool)
    kept[layer.positions()[0, 0]] = True
    count = int(kept[:100].sum())
    least = torch.ones(120, dtype=torch.bool)
    drawn, _ = mass(layer, q[:, :, :100], k[:, :, :100])
    least[drawn.topk(100 - count).indices] = False
    causal = torch.ones(20, 120, dtype=torch.bool).tril(100)
    wrong = attend(q[:, :, 100:], k, v, mask=least & causal).out
    assert count < 60 and (got - want).norm() < 0.5 * (wrong - want).norm()


def test_parameters() -> None:
    m = qkv.method("zipvl")
    assert m.settings() == {
        "tau": 0.975, "probes": (64, 64), "bits": (4, 2), "mode": "quantize", "dense_queries": False, "regroup_every": 100,
        "seed": 0,
    }  # fmt: skip
    assert m.probes_of(4000, False) == (64, 64) and m.probes_of(110, False) == (64, 46)  # type: ignore[attr-defined]
    assert m.probes_of(100, True) == (5, 5) and m.probes_of(9, True) == (1, 1)  # type: ignore[attr-defined]
    assert qkv.method("zipvl:probes=[8,8],mode=evict").layer(Geometry(9, 3, 64, 64)).bits == (4, 0)  # type: ignore[attr-defined]
    for bad in (
        {"tau": 0.0}, {"tau": 1.1}, {"probes": (0, 8)}, {"probes": (8,)}, {"probes": (8, -1)}, {"bits": 3}, {"bits": (4, 2, 2)},
        {"mode": "drop"}, {"regroup_every": 0},
    ):  # fmt: skip
        with pytest.raises(InvalidParameter):
            qkv.method("zipvl", **bad)
