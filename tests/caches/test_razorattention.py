"""RazorAttention: the oracles of its page, on the compensation token, the memory and the probe."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import qkv
from qkv.caches._stores.folding import FoldingCache, mean_part
from qkv.caches.razorattention import RazorAttention, reference
from qkv.core.attend import attend, sdpa
from qkv.core.cache import Geometry, Step
from qkv.core.errors import InvalidInput, InvalidParameter, Refused, SavedDataError
from qkv.core.heads import HeadSet, HeadTable
from qkv.core.merge import merge
from qkv.probes.induction_echo import InductionEcho, InductionEchoHeads
from qkv.testing._planted import induction
from qkv.testing._tiny import decoder

torch.set_num_threads(1)
H, G, D = 6, 3, 8
SITE = Geometry(H, G, D, D, layer=0, layers=1)


def draw(n: int, b: int = 1, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(b, x, n, D, generator=gen, dtype=torch.float64).to(dtype) for x in (H, G, G))
    return q, k, v


def feed(layer, x: tuple[Tensor, ...], cuts: list[int], compute=None) -> Tensor:
    outs = []
    for n in cuts:
        at = slice(layer.seen, layer.seen + n)
        position = torch.arange(at.start, at.stop, dtype=torch.int32).expand(x[0].shape[0], n)
        outs.append(layer.attend(*(t[:, :, at] for t in x), Step(position, D**-0.5, compute=compute)))
    return torch.cat(outs, 2)


def razor(**more: Any) -> RazorAttention:
    return RazorAttention(**({"heads": (), "sinks": 2, "min_buffer": 6, "ratio": 1e6} | more))


def test_decoding_is_the_formula_step_by_step() -> None:
    x = draw(40)
    layer = razor(ratio=4.0).layer(SITE)
    got = feed(layer, x, [23, *[1] * 17])
    kept = None
    for t in range(23, 40):
        buffer = max(6, t // 4)  # tokens that were kept after token t - 1
        age = torch.arange(t + 1)
        kept = (age < 2) | (age > t - 1 - buffer)
        for h in range(H):
            want = reference(x[0][0, h, t], x[1][0, h // 2, : t + 1], x[2][0, h // 2, : t + 1], ~kept, D**-0.5)
            torch.testing.assert_close(got[0, h, t], want, rtol=0, atol=1e-12)
    assert kept is not None and (layer.positions() >= 0).sum(-1).tolist() == [[2 + 10] * G]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(dropped=st.integers(1, 40), seed=st.integers(0, 99))
def test_equal_dropped_keys_are_compensated_exactly(dropped: int, seed: int) -> None:
    n = 2 + dropped + 6
    q, k, v = draw(n + 1, seed=seed)
    k[:, :, 2 : 2 + dropped] = k[:, :, 2:3]
    layer = razor().layer(SITE)
    feed(layer, (q[:, :, :n], k[:, :, :n], v[:, :, :n]), [n])
    got = feed(layer, (q, k, v), [1])
    torch.testing.assert_close(got, attend(q[:, :, n:], k, v).out, rtol=0, atol=1e-10)


def test_the_mean_is_one_more_key_with_a_bias_and_never_outweighs_what_it_stands_for() -> None:
    q, k, v = draw(30, b=2)
    gone = torch.arange(30) < 20
    count = torch.full((2, 1), 20)
    part = mean_part(q, k[:, :, gone].mean(2), v[:, :, gone].mean(2), count, 0.4)
    kept = attend(q, k[:, :, ~gone], v[:, :, ~gone], scale=0.4)
    got = merge((kept.out, kept.lse), part)[0]
    keys = torch.cat((k[:, :, ~gone], k[:, :, gone].mean(2, keepdim=True)), 2).repeat_interleave(2, 1)
    values = torch.cat((v[:, :, ~gone], v[:, :, gone].mean(2, keepdim=True)), 2).repeat_interleave(2, 1)
    logits = q @ keys.mT * 0.4
    logits[..., -1] += math.log(20)
    torch.testing.assert_close(got, logits.softmax(-1) @ values, rtol=0, atol=1e-12)
    true = attend(q, k[:, :, gone], v[:, :, gone], scale=0.4).lse
    assert bool((part[1] <= true + 1e-12).all()), "exp of a mean is at most the mean of exps"
    empty = mean_part(q, k[:, :, 0] * 0, v[:, :, 0] * 0, count * 0, 0.4)
    assert bool((empty[1] == -torch.inf).all())
    assert torch.equal(merge((kept.out, kept.lse), empty)[0], kept.out), "nothing dropped, no slot"


def test_the_running_mean_is_the_mean() -> None:
    x = draw(300, dtype=torch.float32)
    layer = razor().layer(SITE)
    assert isinstance(layer, FoldingCache)
    feed(layer, x, [50, *[1] * 250])
    assert layer.mean_k is not None and layer.mean_v is not None and layer.count is not None
    assert layer.count.tolist() == [[300 - 8]]
    for mean, y in ((layer.mean_k, x[1]), (layer.mean_v, x[2])):
        torch.testing.assert_close(mean, y[:, :, 2:294].double().mean(2).float(), rtol=0, atol=1e-6)


def test_low_precision_keys_have_means_in_float32() -> None:
    layer = razor().layer(SITE)
    feed(layer, draw(40, dtype=torch.bfloat16), [30, *[1] * 10])
    assert isinstance(layer, FoldingCache) and layer.mean_k is not None and layer.mean_k.dtype == torch.float32


def test_limits_are_exact() -> None:
    x = draw(30)
    want = attend(*x, causal=True).out
    for method in (razor(min_buffer=30), razor(heads=("0.0", "0.1", "0.2"))):
        torch.testing.assert_close(feed(method.layer(SITE), x, [20, *[1] * 10]), want, rtol=0, atol=1e-12)


def test_a_custom_attention_reads_the_mean_as_one_more_key() -> None:
    x = draw(40, b=2)
    plain, custom = razor().layer(SITE), razor().layer(SITE)
    cuts = [20, 1, 1, 5, *[1] * 13]
    torch.testing.assert_close(feed(custom, x, cuts, compute=sdpa), feed(plain, x, cuts), rtol=0, atol=1e-12)


def test_bytes_stop_growing_and_grow_with_the_ratio() -> None:
    x = draw(600, dtype=torch.float32)
    still, grows = razor(min_buffer=20).layer(SITE), razor(min_buffer=20, ratio=5.0).layer(SITE)
    sizes = []
    for layer in (still, grows):
        feed(layer, x, [100])
        before = layer.bytes()
        feed(layer, x, [1] * 400)
        sizes.append((before, layer.bytes()))
        assert layer.kept() >= int((layer.positions() >= 0).sum(-1).max())
    assert sizes[0][0] == sizes[0][1] == (2 + 20 + 1) * (G * D * 8 + 4) + G * D * 8 + 3 * 8 - 4
    assert sizes[1][1] < (2 + 100) * 1.4 * (G * D * 8 + 4) + G * D * 8 + 24


@pytest.mark.parametrize(
    ("parameters", "message"),
    [({"heads": "nowhere.json"}, "qkv inspect"), ({"heads": ("x",)}, "layer.head"), ({"ratio": 0.5}, "ratio"),
     ({"min_buffer": 0}, "min_buffer")],
    ids=str,
)  # fmt: skip
def test_parameters_that_mean_nothing_are_refused(parameters: dict, message: str) -> None:
    with pytest.raises(InvalidParameter, match=message):
        RazorAttention(**parameters)


def test_heads_must_be_named_and_be_of_this_model() -> None:
    for heads, message in ((None, "induction-echo"), (("0.3",), "no KV head 0.3"), (("1.0",), "no KV head 1.0")):
        with pytest.raises(Refused, match=message):
            RazorAttention(heads=heads).layer(SITE)


# -- the probe ------------------------------------------------------------------------------------------------------


def test_a_working_induction_head_scores_one_and_no_other_does() -> None:
    model = induction(40, 49)
    block = torch.randperm(39, generator=torch.Generator().manual_seed(0))[:12].repeat(4)
    ids = torch.cat((torch.tensor([39]), block))[None]  # a first token of its own, which no head looks for
    found = InductionEchoHeads().run(model, ids=ids, block=13)
    assert float(found.induction.values[1, 2]) == pytest.approx(1.0, abs=1e-9)
    others = found.induction.values.clone()
    others[1, 2] = 0
    assert float(others.max()) < 0.2 and float(found.echo.values.max()) < 0.2
    assert found.retrieval_heads(0.1, 0.0) == HeadSet.of(["1.2"])


def test_the_shares_count_key_heads_and_a_file_carries_both_tables(tmp_path) -> None:
    values = torch.zeros(5, 6)
    values[1, 3], values[4, 0] = 0.9, 0.5
    echo = torch.zeros(5, 6)
    echo[2, 5] = 0.7
    found = InductionEcho(HeadTable(values, "induction score", group=2), HeadTable(echo, "echo score", group=2))
    assert found.retrieval_heads(2 / 15, 1 / 15) == HeadSet.of(["1.1", "4.0", "2.2"])
    path = found.save(tmp_path / "result.json")
    method = RazorAttention(heads=str(path), induction=2 / 15, echo=1 / 15)
    assert method.heads == ("1.1", "2.2", "4.0")
    assert qkv.core.registry.from_dict(method.to_dict()) == method and "heads=3" in str(method)
    assert RazorAttention(heads=str(HeadSet.of(["0.1"]).save(tmp_path / "set.json"))).heads == ("0.1",)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(SavedDataError):
        RazorAttention(heads=str(tmp_path / "bad.json"))


def test_the_probe_measures_a_model_and_the_cache_takes_what_it_saved(tmp_path) -> None:
    model = decoder()
    found = qkv.method("induction-echo", block=20).inspect(model, None, out=tmp_path)
    assert (tmp_path / "table.png").stat().st_size > 1000
    assert found.table.notes["tokens"] == 80
    with qkv.applied(model, qkv.method("razorattention", heads=str(tmp_path / "result.json"), sinks=1, min_buffer=8)):
        model.generate(torch.randint(3, 60, (2, 150)), max_new_tokens=5, do_sample=False)
        assert 0 < qkv.report(model).ratio < 0.7
    with pytest.raises(InvalidInput, match="exceed"):
        qkv.method("induction-echo", block=200).run(model)
