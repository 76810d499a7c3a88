"""ActQKV: the oracles of its page."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import qkv
from qkv.caches._stores.selective import SelectiveCache
from qkv.caches.actqkv import ActQKV, activation_bias, density, density_budget, probe_query
from qkv.core.attend import attend
from qkv.core.cache import Board, Geometry, Rope, Step
from qkv.core.errors import InvalidParameter, Refused

H, G, D = 6, 3, 8
ROPE = Rope(100.0 ** -(torch.arange(D // 2, dtype=torch.float32) / (D // 2)))
SMALL = {"block_size": 4, "window": 8, "sinks": 4, "local": 8, "budget": 8}


def memory(layer: int = 0, layers: int = 1, **changes: object) -> SelectiveCache:
    made = ActQKV(**(SMALL | changes)).layer(Geometry(H, G, D, D, layer, layers, rope=ROPE))  # type: ignore[arg-type]
    assert isinstance(made, SelectiveCache)
    return made


def draw(n: int, b: int = 1, seed: int = 0) -> list[Tensor]:
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


# -- the formulas -----------------------------------------------------------------------------------------------------------


def test_standing_out() -> None:
    """Constant windows have nobody, channels may be stretched and shifted, and one far token has it all."""
    x = torch.randn(2, 30, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    delta = activation_bias(x)
    stretched = activation_bias(x * torch.linspace(0.5, 9, 12) + torch.arange(12))
    torch.testing.assert_close(delta, stretched, rtol=1e-4, atol=1e-4)
    assert activation_bias(torch.ones(1, 5, 3)).eq(0).all()
    q = torch.randn(1, 2, 5, 3)
    torch.testing.assert_close(probe_query(q, torch.zeros(1, 5), 1.0), q.mean(2))
    far = torch.zeros(1, 5)
    far[0, 3] = 1e3
    torch.testing.assert_close(probe_query(q, far, 1.0), q[:, :, 3])
    torch.testing.assert_close(probe_query(q, torch.rand(1, 5), 1e9), q.mean(2))


def test_padding_is_not_in_the_window() -> None:
    x, real = torch.randn(1, 9, 4), torch.ones(1, 9, dtype=torch.bool)
    real[0, :4] = False
    x[0, :4] = 1e4
    torch.testing.assert_close(activation_bias(x, real)[:, 4:], activation_bias(x[:, 4:]))
    q = torch.randn(1, 2, 9, 3)
    torch.testing.assert_close(
        probe_query(q, activation_bias(x, real), 1.0, real), probe_query(q[:, :, 4:], activation_bias(x[:, 4:]), 1.0)
    )


def test_density() -> None:
    every = torch.ones(10, dtype=torch.bool)
    assert float(density(torch.zeros(10), every)) == pytest.approx(0, abs=1e-6)
    one = torch.zeros(10)
    one[4] = 1e4
    assert float(density(one, every)) == pytest.approx(1)
    few = every.clone()
    few[4:] = False
    assert float(density(one, few)) == pytest.approx(0, abs=1e-6)
    assert float(density(one, torch.zeros(10, dtype=torch.bool))) == 0


def test_sharing_a_total() -> None:
    assert density_budget(torch.zeros(5), 20).tolist() == [4] * 5
    got = density_budget(torch.tensor([0.9, 0.1, 0.5, 0.99]), 40)
    assert int(got.sum()) == 40 and got[1] > got[2] > got[0] >= got[3] >= 1
    gen = torch.Generator().manual_seed(0)
    for _ in range(50):
        rho = torch.rand(7, generator=gen) ** 0.2
        got = density_budget(rho, 28, 8)
        assert int(got.sum()) == 28 and int(got.max()) <= 8 and int(got.min()) >= 1
        order = rho.argsort()
        assert (got[order].diff() <= 1).all()
    with pytest.raises(InvalidParameter, match="cannot give"):
        density_budget(torch.zeros(5), 4)


# -- reading ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [[90], [33, 40, 17], [33, *[1] * 57]])
def test_enough_budget_is_exact(cuts: list[int]) -> None:
    tensors = draw(90, b=2)
    at = torch.arange(90).expand(2, 1, -1)
    q, k = (ROPE.rotate(x, at.expand(-1, x.shape[1], -1)) for x in tensors[:2])
    want = attend(q, k, tensors[2], causal=True).out
    torch.testing.assert_close(feed(memory(budget=80), tensors, cuts), want, rtol=0, atol=1e-12)
    assert (feed(memory(), tensors, cuts) - want).abs().max() > 1e-2


@pytest.mark.parametrize("probe", ["activation", "mean", "last"])
def test_the_definition_of_a_window(probe: str) -> None:
    """The last window of a prompt: probe, block means, the best two blocks of those neither first nor local."""
    q, k, v = draw(80, seed=1)
    layer, seen = memory(probe=probe), []
    layer.watch = seen.append
    feed(layer, [q, k, v], [80])
    window = q[0, :, 72:]  # [H, 8, D]
    bias = activation_bias(window.transpose(0, 1).flatten(1)[None])[0]
    weights = {"activation": torch.softmax(bias, 0), "mean": torch.full((8,), 1 / 8), "last": torch.eye(8)[7]}[probe]
    ask = (weights.to(q.dtype)[:, None] * window).sum(1)  # [H, D]
    score = []
    for j in range(20):
        mean = k[0, :, 4 * j : 4 * j + 4].mean(1)
        score.append(float(sum(ask[h] @ mean[h // 2] for h in range(H))))
    free = range(1, (72 - 8) // 4)
    best = sorted(free, key=lambda j: -score[j])[:2]
    want = {0, *best, *range(16, 20)}
    for g in range(G):
        mine = seen[-1].slot[0, g].flatten()
        assert {s // 4 for s in mine[mine >= 0].tolist()} == want


def test_windows_only_fetch_what_is_over() -> None:
    """Tokens of a window and after it change nothing that earlier windows did."""
    tensors, other = draw(80, seed=2), draw(80, seed=3)
    mixed = [torch.cat((x[:, :, :48], y[:, :, 48:]), 2) for x, y in zip(tensors, other, strict=True)]
    a, b = feed(memory(), tensors, [80]), feed(memory(), mixed, [80])
    torch.testing.assert_close(a[:, :, :48], b[:, :, :48], rtol=0, atol=1e-12)
    assert (a - b)[:, :, 48:].abs().max() > 1e-2


def test_layers_share_a_step() -> None:
    """In all no more than the mean for each; layers that know read less than layers that do not."""
    board, layers = Board(), [memory(i, 4, budget=16) for i in range(4)]
    streams, counts = [draw(200, seed=i) for i in range(4)], torch.zeros(4)
    for x in streams[:2]:
        x[0] *= 8  # sharp scores: dense layers
    for layer in layers:
        layer.join(board)
        feed(layer, streams[layer.geometry.layer], [180])
    for _ in range(20):
        total = 0
        for i, layer in enumerate(layers):
            seen: list = []
            layer.watch = seen.append
            feed(layer, streams[i], [1])
            slots = seen[0].slot[0, 0, 0]
            blocks = {s // 4 for s in slots[slots >= 0].tolist()}
            fetched = len([j for j in blocks if 1 <= j < (layer.seen - 1 - 8) // 4])
            assert 1 <= fetched <= 8
            counts[i] += fetched
            total += fetched
        assert total <= 4 * 4
    assert counts.sum() > 0.9 * 20 * 16 and counts[:2].sum() < counts[2:].sum()


@pytest.mark.parametrize("rows", [[1, 0], [1], [0, 0, 1, 1], None], ids=["swapped", "one", "repeated", "restored"])
def test_what_layers_tell_each_other_follows_the_rows(rows: list[int] | None) -> None:
    """Beams, repeated rows and a restored cache share a step as before: what the others spread belongs to the row."""
    texts = [draw(170, 2, seed) for seed in range(3)]
    texts[2][0][1] *= 12  # the rows of the last layer spread differently

    def three() -> list[SelectiveCache]:
        board, made = Board(), [memory(i, 3, budget=32) for i in range(3)]
        for layer in made:
            layer.join(board)
        return made

    before = three()
    for layer, text in zip(before, texts, strict=True):
        feed(layer, text, [160])
    after = three() if rows is None else copy.deepcopy(before)
    for old, new in zip(before, after, strict=True):
        if rows is None:
            new.restore(old.tensors())
        else:
            new.select(torch.tensor(rows))
    picked = [0, 1] if rows is None else rows
    for _ in range(6):
        for old, new, text in zip(before, after, texts, strict=True):
            want = feed(old, text, [1])[picked]
            torch.testing.assert_close(feed(new, [x[picked] for x in text], [1]), want, rtol=0, atol=1e-12)


def test_half_precision() -> None:
    layer = memory()
    q, k, v = (x.half() for x in draw(70, 2))
    assert torch.isfinite(feed(layer, [q, k, v], [64, 1, 1])).all()


def test_a_site_alone_reads_the_mean() -> None:
    layer, seen = memory(budget=16), []
    feed(layer, draw(100), [90])
    layer.watch = seen.append
    feed(layer, draw(100), [1])
    slots = seen[0].slot[0, 0, 0]
    assert len({s // 4 for s in slots[slots >= 0].tolist()} - {0, 20, 21, 22}) == 4


@pytest.mark.parametrize("bad", [{"window": 100}, {"budget": 100}, {"window": 1, "block_size": 1}, {"tau": 0.0}])
def test_bad_parameters(bad: dict[str, object]) -> None:
    with pytest.raises(InvalidParameter):
        qkv.method("actqkv", **bad)


def test_sites_that_do_not_fit() -> None:
    for geometry in (Geometry(H, G, D, D), Geometry(H, G, D, D, rope=Rope(ROPE.frequencies, False, "dynamic"))):
        with pytest.raises(Refused, match=r"no rotary|depend on the length"):
            ActQKV().layer(geometry)
