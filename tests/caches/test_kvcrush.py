"""KVCrush: the oracles of its page."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import qkv
from qkv.caches.kvcrush import KVCrush, anchor_bits, head_signatures, reference, representatives
from qkv.core import registry
from qkv.core.cache import Geometry, Step
from qkv.core.errors import InvalidParameter, UnknownName

torch.set_num_threads(1)
H, G, D = 6, 3, 8
SITE = Geometry(H, G, D, D, layer=1, layers=3)


def run(method: Any, cuts: tuple[int, ...], seed: int = 0, site: Geometry = SITE) -> list[list[list[int]]]:
    """Positions in use by row and head after blocks of these sizes."""
    gen = torch.Generator().manual_seed(seed)
    t = sum(cuts)
    q, k, v = (
        torch.randn(2, h, t, D, generator=gen, dtype=torch.float64) for h in (site.heads, site.kv_heads, site.kv_heads)
    )
    layer = method.layer(site)
    for n in cuts:
        at = slice(layer.seen, layer.seen + n)
        position = torch.arange(at.start, at.stop, dtype=torch.int32).expand(2, n)
        layer.attend(q[:, :, at], k[:, :, at], v[:, :, at], Step(position, D**-0.5))
    return [[[p for p in head if p >= 0] for head in row] for row in layer.positions().tolist()]


def drawn_bits(m: int, h: int, seed: int = 0) -> Tensor:
    return torch.rand(m, h, generator=torch.Generator().manual_seed(seed)) < 0.5


def picked(bits: Tensor, anchor: Tensor, k: int, offset: int = 0) -> list[int]:
    distance = (bits ^ anchor).sum(-1)
    every = torch.ones_like(distance, dtype=torch.bool)
    return representatives(distance, every, torch.tensor([k]), offset).nonzero().flatten().tolist()


@pytest.mark.parametrize(
    "host", ["h2o", "h2o:recent=0.2,group_reduce=max", "snapkv:window=4,kernel=3", "tova:per=head"]
)
@pytest.mark.parametrize("cuts", [(60,), (40, *(1,) * 20), (30, 1, 1, 12, 1)])
def test_without_representatives_it_is_the_host(host: str, cuts: tuple[int, ...]) -> None:
    mine = run(KVCrush(host=host, budget=12, rep_ratio=0.0, per="head"), cuts)
    assert mine == run(qkv.method(host, budget=12), cuts)
    if host.startswith("tova"):
        assert run(KVCrush(host="tova", budget=12, rep_ratio=0.0), cuts) == run(qkv.method("tova", budget=12), cuts)


@pytest.mark.parametrize("per", ["layer", "head"])
@pytest.mark.parametrize("host", ["h2o", "snapkv:window=4,kernel=3"])
def test_the_size_is_the_hosts_and_what_is_important_stays(per: Any, host: str) -> None:
    method = KVCrush(host=host, budget=16, rep_ratio=0.25, per=per)
    mine = run(method, (70,))
    fewer = run(KVCrush(host=host, budget=16, rep_ratio=0.0, per=per).replace(budget=12), (70,))
    recent = 8 if host == "h2o" else 4
    for row in range(2):
        for head in range(G):
            assert len(mine[row][head]) == 16 and set(range(70 - recent, 70)) <= set(mine[row][head])
            if host != "h2o":  # its recent share is a share of the budget
                assert set(fewer[row][head]) <= set(mine[row][head])
        if per == "layer":
            assert mine[row] == [mine[row][0]] * G
    assert run(method, (10,)) == [[list(range(10))] * G] * 2


def test_representatives_are_those_of_the_reference() -> None:
    for seed, (m, h, k) in enumerate([(40, 9, 10), (41, 9, 10), (11, 3, 10), (30, 1, 7), (9, 4, 1), (500, 16, 33)]):
        bits = drawn_bits(m, h, seed)
        for kind in ("zeros", "ones", "alternating", "mean", "random"):
            anchor = anchor_bits(kind, bits.T, torch.ones(m, dtype=torch.bool), 3)[:, 0]
            assert picked(bits, anchor, k) == reference(bits, anchor, k)
        for offset in (0, 17, 63):
            assert len(picked(bits, anchor, k, offset)) == k
    assert picked(drawn_bits(5, 3), torch.zeros(3, dtype=torch.bool), 0) == []
    assert len(picked(drawn_bits(5, 3), torch.zeros(3, dtype=torch.bool), 9)) == 5


def test_distances_to_zeros_and_ones_are_popcounts() -> None:
    bits = drawn_bits(60, 13)
    packed = [int("".join(str(int(b)) for b in row), 2) for row in bits]
    for kind, want in (("zeros", [p.bit_count() for p in packed]), ("ones", [13 - p.bit_count() for p in packed])):
        anchor = anchor_bits(kind, bits.T, torch.ones(60, dtype=torch.bool), 0)[:, 0]
        assert (bits ^ anchor).sum(-1).tolist() == want


def test_complement_and_permutation_change_nothing() -> None:
    bits, anchor = drawn_bits(50, 8), drawn_bits(1, 8, 5)[0]
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    assert picked(bits, anchor, 12) == picked(~bits, ~anchor, 12) == picked(bits[:, order], anchor[order], 12)


def test_equal_signatures_are_spaced_in_position() -> None:
    bits = torch.ones(48, 5, dtype=torch.bool)
    assert picked(bits, torch.zeros(5, dtype=torch.bool), 8) == list(range(0, 48, 6))


def test_picks_have_the_distribution_of_what_they_stand_for() -> None:
    """And the nearest ones do not."""
    bits, anchor, k = drawn_bits(400, 9, 2), torch.arange(9) % 2 == 1, 40
    distance = (bits ^ anchor).sum(-1)

    def gap(chosen: Tensor) -> float:
        levels = torch.arange(10)[:, None]
        return float(
            ((distance <= levels).float().mean(-1) - (distance[chosen] <= levels).float().mean(-1)).abs().max()
        )

    assert gap(torch.tensor(picked(bits, anchor, k))) <= 1 / k + 1e-6
    assert gap(distance.argsort()[:k]) > 0.2


def test_signatures_are_top_halves_of_the_region() -> None:
    scores = torch.tensor([[5.0, 1.0, 3.0, 3.0, 9.0, 0.0], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]])
    region = torch.tensor([True, True, True, True, False, True])
    assert head_signatures(scores, region).int().tolist() == [[1, 0, 1, 0, 0, 0], [0, 0, 0, 1, 0, 1]]


def test_blocks_of_one_token_and_one_head_are_tokens() -> None:
    site = replace(SITE, heads=1, kv_heads=1)
    for anchor in ("zeros", "ones", "mean"):
        a = KVCrush(host="snapkv:window=4,kernel=3", budget=20, rep_ratio=0.4, anchor=anchor)
        for cuts in ((70,), (60, 1, 1, 1, 20)):
            b = a.replace(unit="block", block_size=1)
            assert run(a, cuts, site=site) == run(b, cuts, site=site)


def test_blocks_are_kept_whole() -> None:
    method = KVCrush(host="snapkv:window=8,kernel=1", budget=40, rep_ratio=0.4, unit="block", block_size=8)
    for row in run(method, (120,)):
        counts = {b: sum(p // 8 == b for p in row[0]) for b in range(15)}
        assert sum(counts.values()) == 40 and row == [row[0]] * G
        assert sorted(counts.values()) == [0] * 10 + [8] * 5


@pytest.mark.parametrize(
    "bad",
    [
        {"host": "window"}, {"host": "knorm"}, {"host": "kvcrush"}, {"host": "kivi"}, {"host": "lazyeviction"},
        {"rep_ratio": 1.0}, {"rep_ratio": -0.1}, {"unit": "block"}, {"anchor": "north"}, {"host": "snapkv", "budget": 20},
    ],
)  # fmt: skip
def test_bad_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameter):
        KVCrush.create(**bad)


def test_an_unknown_host_names_the_nearest() -> None:
    with pytest.raises(UnknownName, match="snapkv"):
        KVCrush(host="snapvk")


def test_a_nested_setting_goes_through_json_and_the_command_lines_form() -> None:
    method = KVCrush(host="snapkv:window=16,pooling=avg", budget=0.25, anchor="mean")
    assert registry.from_dict(method.to_dict()) == method
    assert qkv.method(str(method)) == method
    assert qkv.method('kvcrush:host="snapkv:window=16,pooling=avg",budget=0.25,anchor=mean') == method
    assert method.scorer() == qkv.method("snapkv", window=16, pooling="avg", budget=0.25)
    assert KVCrush(budget=1.0).slots(50) > 50 and KVCrush(budget=1).slots(50) == 1
