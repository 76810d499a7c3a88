"""Evict, then quantise: a policy's own choice, in packed bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import qkv
from qkv.caches._stores.mixed import MixedCache
from qkv.caches.evict_pack import EvictPack, reference
from qkv.core.attend import attend
from qkv.core.cache import Geometry, LayerCache, Step
from qkv.core.errors import InvalidParameter, UnknownName
from qkv.testing import laws
from qkv.testing._law import Case

H, G, D = 6, 3, 8
SITE = Geometry(H, G, D, D, layer=2, layers=6)


POLICIES = (  # no neighbours with equal scores, of which either may be kept
    "snapkv:window=4,kernel=1", "snapkv:window=6,kernel=3,pooling=avg", "h2o", "knorm", "tova", "pyramidkv:window=4,kernel=1",
)  # fmt: skip


def cache(**parameters: Any) -> MixedCache:
    settings: dict[str, Any] = {"regroup_every": 10, "budget": 20}
    layer = EvictPack(**settings | parameters).layer(SITE)
    assert isinstance(layer, MixedCache)
    return layer


def draw(n: int, b: int = 1, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(b, h, n, D, generator=gen, dtype=torch.float64) for h in (H, G, G))
    return 2 * q, k, v


def feed(layer: LayerCache, tokens: tuple[Tensor, Tensor, Tensor], cuts: list[int]) -> Tensor:
    outs = []
    for n in cuts:
        q, k, v = (x[:, :, layer.seen : layer.seen + n] for x in tokens)
        position = torch.arange(layer.seen, layer.seen + n, dtype=torch.int32).expand(q.shape[0], n)
        outs.append(layer.attend(q, k, v, Step(position, D**-0.5)))
    return torch.cat(outs, 2)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("budget", [20, 0.3, 1.0])
def test_it_keeps_what_the_policy_keeps(policy: str, budget: float) -> None:
    tokens = draw(60, b=2, seed=1)
    packed = cache(policy=policy, budget=budget)
    own = qkv.method(policy).replace(budget=budget).layer(SITE)  # type: ignore[attr-defined]
    for layer in (packed, own):
        feed(layer, tokens, [60])
    assert packed.positions().tolist() == own.positions().tolist()
    assert packed.kept() == own.kept() and (budget == 1.0 or packed.kept() < 40)


def test_knorm_by_the_definition() -> None:
    tokens = draw(60, seed=2)
    layer = cache(policy="knorm")
    feed(layer, tokens, [60])
    assert layer.positions()[0].tolist() == reference(-tokens[1][0].norm(dim=-1), 20)


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_decoding_reads_what_is_kept_and_appends(bits: int) -> None:
    q, k, v = draw(100, b=2, seed=3)
    layer = cache(policy="h2o", bits=bits)
    torch.testing.assert_close(
        feed(layer, (q, k, v), [60]), attend(q, k, v, causal=True).out[:, :, :60], rtol=0, atol=1e-12
    )
    for t in range(60, 100):
        keys, values = layer.read()
        own, at = slice(60 + (t - 60) // 10 * 10, t + 1), slice(t, t + 1)
        want = attend(q[:, :, at], torch.cat((keys, k[:, :, own]), 2), torch.cat((values, v[:, :, own]), 2)).out
        torch.testing.assert_close(feed(layer, (q, k, v), [1]), want, rtol=0, atol=1e-12)
    assert layer.kept() == 20 + 40, "what is decoded stays"


def test_bytes_are_budget_times_bits() -> None:
    """A quarter of the tokens in 4 bits: a sixteenth, and a little for the ranges."""
    layer = qkv.method("evict-pack", bits=4).layer(Geometry(9, 3, 64, 64))  # type: ignore[attr-defined]
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 2000, 64, generator=gen).bfloat16() for h in (9, 3, 3))
    layer.attend(q, k, v, Step(torch.arange(2000, dtype=torch.int32)[None], 0.125))
    assert 1 / 16 < layer.bytes() / layer.full_bytes(k, v) < 1.06 / 16


CASE = Case(EvictPack(bits=4, policy="snapkv:window=4,kernel=3"))
LAWS = [
    n for n, law in laws("cache").items() if law.applies(CASE) and not law.expensive and n != "equals_masked_attention"
]


@pytest.mark.parametrize("name", LAWS)
def test_laws_at_four_bits(name: str) -> None:
    laws("cache")[name].run(CASE)


def test_parameters() -> None:
    assert str(qkv.method("evict-pack:policy=h2o,budget=0.5").ranking()) == "h2o:budget=0.5"  # type: ignore[attr-defined]
    for bad in (
        {"policy": "window"}, {"policy": "streamingllm"}, {"policy": "h2o:positions=cache"}, {"policy": "kivi"},
        {"policy": "evict-pack"}, {"policy": "full"}, {"budget": 0}, {"bits": 3}, {"regroup_every": 0},
    ):  # fmt: skip
        with pytest.raises(InvalidParameter):
            qkv.method("evict-pack", **bad)
    with pytest.raises(UnknownName, match="snapkv"):
        qkv.method("evict-pack", policy="snapvk")
