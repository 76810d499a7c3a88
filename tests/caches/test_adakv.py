"""Ada-KV: how budgets are shared out, and a store whose heads have lengths of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import qkv
from qkv.caches._stores.ragged import RaggedCache, share_out
from qkv.caches.adakv import AdaKV, reference
from qkv.core.attend import attend, sdpa
from qkv.core.cache import Geometry, Step
from qkv.core.errors import InvalidParameter, QKVError, StateError

torch.set_num_threads(1)
H, G, D = 6, 3, 8
SITE = Geometry(H, G, D, D, layer=0, layers=1)


def draw(n: int, b: int = 1, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Head 0 looks at few tokens, the others at many: keys of KV head 0 are long."""
    gen = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(b, x, n, D, generator=gen, dtype=torch.float64).to(dtype) for x in (H, G, G))
    k[:, 0] *= 4
    return q, k, v


def feed(layer, x: tuple[Tensor, ...], cuts: list[int], padding: Tensor | None = None, compute=None) -> Tensor:
    outs = []
    for n in cuts:
        at = slice(layer.seen, layer.seen + n)
        real = torch.ones(x[0].shape[0], at.stop, dtype=torch.bool) if padding is None else padding[:, : at.stop]
        position = (real.cumsum(-1) - 1).masked_fill(~real, -1)[:, at].int()
        step = Step(position, D**-0.5, None if padding is None else real, compute=compute)
        outs.append(layer.attend(*(t[:, :, at] for t in x), step))
    return torch.cat(outs, 2)


def ada(**more: Any) -> AdaKV:
    return AdaKV(**({"scorer": "h2o", "budget": 10} | more))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    g=st.integers(1, 4),
    s=st.integers(1, 30),
    keep=st.integers(1, 12),
    safeguard=st.sampled_from([0.0, 0.2, 0.5, 1.0]),
    seed=st.integers(0, 999),
)
def test_shares_are_the_definition(g: int, s: int, keep: int, safeguard: float, seed: int) -> None:
    worth = torch.randn(2, g, s, generator=torch.Generator().manual_seed(seed))
    chosen = share_out(worth, torch.tensor([keep, max(1, keep // 2)]).view(2, 1, 1), safeguard)
    for row, budget in enumerate((keep, max(1, keep // 2))):
        assert torch.equal(chosen[row], reference(worth[row], budget, safeguard))
        counts = chosen[row].sum(-1)
        assert int(counts.sum()) == min(g * s, g * budget)
        assert int(counts.min()) >= min(s, max(1, int(safeguard * budget)))


def test_a_safeguard_of_one_is_the_scorer_alone() -> None:
    x, cuts = draw(50, b=2), [30, *[1] * 12, 4, *[1] * 4]
    one, other = ada(safeguard=1.0).layer(SITE), qkv.method("h2o", budget=10).layer(SITE)
    torch.testing.assert_close(feed(one, x, cuts), feed(other, x, cuts), rtol=0, atol=1e-12)
    assert torch.equal(one.positions()[..., -10:].long(), other.positions()[..., -10:].long())


@pytest.mark.parametrize("scorer", ["h2o", "h2o:recent=0.2,group_reduce=max"])
def test_heads_keep_lengths_of_their_own_within_the_layers_budget(scorer: str) -> None:
    x, padding = draw(60, b=2, seed=3), torch.ones(2, 60, dtype=torch.bool)
    padding[1, :15] = False
    layer = ada(scorer=scorer, budget=0.25).layer(SITE)
    feed(layer, x, [40], padding)
    held = (layer.positions() >= 0).sum(-1)
    assert held.sum(-1).tolist() == [3 * 10, 3 * 6]
    assert int(held[0].max()) > int(held[0].min()), "nothing was shared out"
    feed(layer, x, [1] * 20, padding)
    assert torch.equal((layer.positions() >= 0).sum(-1), held), "each head keeps its share"
    assert layer.kept() == int(held.max())


def test_bytes_of_what_is_dropped_are_freed() -> None:
    x = draw(400, dtype=torch.float32)
    layer, uniform = ada(budget=40).layer(SITE), qkv.method("h2o", budget=40).layer(SITE)
    for cache in (layer, uniform):
        feed(cache, x, [400])
    assert isinstance(layer, RaggedCache) and layer.keys is not None
    assert layer.keys.shape[0] == 3 * 40 + 3, "a free slot for each head, and nothing else"
    tables = 3 * 3 * 8 + 3 * 8 + 8
    size = layer.position.shape[2]  # type: ignore[union-attr]
    assert layer.bytes() == 123 * D * 8 + 3 * size * 8 + tables
    full = layer.full_bytes(x[1], x[2])
    assert layer.bytes() < 0.14 * full


def test_appending_scorers_grow_and_keep_what_was_shared_out() -> None:
    x = draw(120)
    layer = AdaKV(scorer="snapkv:window=4,kernel=3", budget=10).layer(SITE)
    assert isinstance(layer, RaggedCache)
    feed(layer, x, [40])
    first = [[p for p in head if p >= 0] for head in layer.positions()[0].tolist()]
    assert sum(map(len, first)) == 30 and len({len(h) for h in first}) > 1
    mask = torch.zeros(1, G, 80, 120, dtype=torch.bool)
    for head, kept in enumerate(first):
        mask[0, head, :, kept] = True
    mask[..., 40:] = torch.ones(80, 80, dtype=torch.bool).tril()
    want = attend(x[0][:, :, 40:], x[1], x[2], mask=mask).out
    torch.testing.assert_close(feed(layer, x, [1] * 80), want, rtol=0, atol=1e-12)
    assert layer.kept() >= max(map(len, first)) + 80


def test_a_custom_attention_reads_the_same_slots() -> None:
    x, cuts = draw(40, b=2), [20, *[1] * 9, 4, *[1] * 7]
    plain, custom = ada().layer(SITE), ada().layer(SITE)
    torch.testing.assert_close(feed(custom, x, cuts, compute=sdpa), feed(plain, x, cuts), rtol=0, atol=1e-12)


def test_a_step_does_no_work_over_all_keys_but_its_attention() -> None:
    """The flat buffers stay where they are: a step writes one row of them."""
    x = draw(60)
    layer = ada().layer(SITE)
    feed(layer, x, [40])
    assert isinstance(layer, RaggedCache) and layer.keys is not None and layer.room is None
    address, before = layer.keys.data_ptr(), layer.keys.clone()
    feed(layer, x, [1])
    assert layer.keys.data_ptr() == address
    assert int((layer.keys != before).any(-1).sum()) == G


def test_beams_and_speculation_refuse_to_mix() -> None:
    layer = ada().layer(SITE)
    layer.announce(20)
    layer.record()
    feed(layer, draw(24, b=2), [20, 1, 1])
    with pytest.raises(StateError, match="crop"):
        layer.select(torch.tensor([0]))
    layer.crop(1)
    layer.select(torch.tensor([1, 1, 0]))
    assert layer.positions().shape[0] == 3 and layer.seen == 21


@pytest.mark.parametrize(
    ("scorer", "message"),
    [("window", "by position"), ("streamingllm", "by position"), ("kivi", "ranks no tokens"), ("adakv", "its own scorer"),
     ("h2o:positions=cache", "moves keys"), ("nonsense", "no method")],
)  # fmt: skip
def test_scorers_that_cannot_serve_are_refused(scorer: str, message: str) -> None:
    with pytest.raises(QKVError, match=message):
        AdaKV(scorer=scorer)
    with pytest.raises(InvalidParameter, match="safeguard"):
        ada(safeguard=1.5)


def test_settings_of_the_command_line() -> None:
    method = qkv.method("adakv:scorer=h2o:recent=0.25,budget=0.25")
    assert method.policy() == qkv.method("h2o", recent=0.25, budget=0.25)
    assert qkv.core.registry.from_dict(method.to_dict()) == method


def test_generation_on_a_model_with_groups() -> None:
    from qkv.testing._tiny import decoder

    model = decoder()
    ids = torch.randint(3, 60, (2, 120), generator=torch.Generator().manual_seed(0))
    with qkv.applied(model, ada(budget=0.25)):
        model.generate(ids, max_new_tokens=6, do_sample=False)
        report = qkv.report(model)
    assert report.ratio < 0.45 and report.kept > 30
