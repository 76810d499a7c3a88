"""RazorAttention at models with linear position biases: the bound on a head's reach, and the cache that keeps it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import qkv
from qkv.caches.razorattention import RazorAttention
from qkv.core.errors import InvalidParameter, Refused
from qkv.hosts.transformers_inline import Weights, weights_of
from qkv.probes._scope import gaps, scopes
from qkv.testing._tiny import decoder

torch.set_num_threads(1)
C, D, H = 24, 6, 4


def weights(seed: int = 0, clip: float | None = None, even: bool = False) -> Weights:
    """Of four heads over a width of 24, with gains that differ (even: that do not) and offsets."""
    gen = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(H, D, C, generator=gen, dtype=torch.float64) * 0.3 for _ in range(2))
    biases = [torch.randn(H, D, generator=gen, dtype=torch.float64) * 0.2 for _ in range(2)]
    gain = torch.ones(C, dtype=torch.float64) if even else torch.rand(C, generator=gen, dtype=torch.float64) * 2
    return Weights(query, key, *biases, gain, torch.randn(C, generator=gen, dtype=torch.float64) * 0.1, D**-0.5, clip)


def normed(w: Weights, x: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(x, (C,), w.gain, w.offset)


def gap(w: Weights, x: Tensor, y: Tensor) -> Tensor:
    """What a query at x gives to y more than to itself: ``[H, ...]``."""
    a, b = normed(w, x), normed(w, y)
    q = torch.einsum("hdc,...c->h...d", w.query, a) + w.query_bias.view(H, *(1,) * (x.ndim - 1), D)
    ks = [torch.einsum("hdc,...c->h...d", w.key, z) + w.key_bias.view(H, *(1,) * (x.ndim - 1), D) for z in (a, b)]
    if w.clip is not None:
        q, *ks = (z.clamp(-w.clip, w.clip) for z in (q, *ks))
    return (q * (ks[1] - ks[0])).sum(-1) * w.scale


@pytest.mark.parametrize("clip", [None, 0.6])
def test_no_tokens_exceed_the_bound_and_the_worst_come_near_it(clip: float | None) -> None:
    for seed in range(3):
        w = weights(seed, clip)
        bound = gaps(w)
        x, y = (torch.randn(H, C, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (5, 6))
        x.requires_grad_(), y.requires_grad_()
        best = torch.full((H,), -torch.inf, dtype=torch.float64)
        for _ in range(400):  # climb: each head has a pair of tokens of its own
            here = gap(w, x, y).diagonal()
            best = torch.maximum(best, here.detach())
            for z, g in zip((x, y), torch.autograd.grad(here.sum(), (x, y)), strict=True):
                z.data.add_(g / g.norm(dim=-1, keepdim=True).clamp(min=1e-12), alpha=0.1)
        assert bool((best <= bound).all()), (best, bound)
        assert bool((best > 0.35 * bound).all()) or clip is not None, (best, bound)


def test_it_is_the_form_of_the_page_where_gains_are_equal_and_that_form_is_no_bound_elsewhere() -> None:
    w = weights(even=True)
    none = torch.zeros_like(w.query_bias)
    centred = replace(w, query=w.query - w.query.mean(-1, keepdim=True), key=w.key - w.key.mean(-1, keepdim=True),
                      query_bias=none, key_bias=none, offset=torch.zeros(C, dtype=torch.float64))  # fmt: skip

    def page(w: Weights) -> Tensor:
        product = torch.linalg.matrix_norm(w.query.mT @ w.key, ord=2) * w.scale
        return 2 * product * (w.gain.square().sum() + w.offset.square().sum())

    torch.testing.assert_close(gaps(centred), page(centred), rtol=0, atol=1e-9)
    gain = torch.full((C,), 0.01, dtype=torch.float64)
    gain[0] = 3.0
    one = torch.zeros(H, D, C, dtype=torch.float64)
    one[:, 0, 0] = 1.0
    spiked = replace(centred, query=one, key=one, gain=gain)
    x = torch.zeros(C, dtype=torch.float64)
    x[0] = 1.0  # the one channel of large gain stands out: the norm gives it almost sqrt(C)
    assert bool((gap(spiked, x, -x).abs() > 2 * page(spiked)).all())
    assert bool((gap(spiked, x, -x).abs() <= gaps(spiked) + 1e-9).all())


def tiny(kind: str, **more: Any) -> hf.PreTrainedModel:
    """Two layers of four heads whose scopes are short."""
    torch.manual_seed(0)
    if kind == "bloom":
        model: Any = hf.BloomForCausalLM(
            hf.BloomConfig(vocab_size=61, hidden_size=32, n_head=4, n_layer=2, use_cache=True)
        )
    else:
        config = hf.MptConfig(vocab_size=61, d_model=32, n_heads=4, n_layers=2, max_seq_len=512, use_cache=True, **more)
        model = hf.MptForCausalLM(config)
    for name, x in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            x.data.uniform_(0.3, 1.5)
        elif name.endswith(("query_key_value.weight", "Wqkv.weight")):
            x.data.normal_(std=0.05)
        elif name.endswith("bias"):
            x.data.normal_(std=0.05)
    return model.double().eval()


@pytest.mark.parametrize("kind", ["bloom", "mpt"])
def test_attention_beyond_a_scope_stays_below_eps(kind: str) -> None:
    """The model's own maps, against the scopes that its weights give."""
    model, eps = tiny(kind), 1e-2
    found = qkv.method("induction-echo", eps=eps).run(model).table
    assert found.name == "scope in tokens" and tuple(found.values.shape) == (2, 4)
    ids = torch.randint(61, (2, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        maps = model(ids, output_attentions=True).attentions
    age = torch.arange(200)[:, None] - torch.arange(200)[None]
    for layer, heads in enumerate(maps):
        for h in range(4):
            scope = float(found.values[layer, h])
            beyond = heads[:, h, age > scope]
            assert not beyond.numel() or float(beyond.max()) < eps
        steepest = int(found.values[layer].argmin())
        nearer = heads[:, steepest, age > float(found.values[layer, steepest]) / 6]
        assert float(nearer.max()) > eps, "the bound is not far from what happens"
    assert float(found.values.min()) < 60 < float(found.values.max())


@pytest.mark.parametrize("kind", ["bloom", "mpt"])
def test_the_same_command_measures_and_the_cache_takes_what_it_saved(kind: str, tmp_path: Path) -> None:
    model = tiny(kind)
    found = qkv.method("induction-echo", eps=1e-4).inspect(model, None, out=tmp_path)
    assert (tmp_path / "table.png").stat().st_size > 1000
    assert json.loads((tmp_path / "result.json").read_text())["type"] == "alibi_scope"
    most = 210
    method = RazorAttention(heads=str(tmp_path / "result.json"), min_buffer=most, sinks=1)
    want = {f"{l}.{h}" for l in range(2) for h in range(4) if math.ceil(found.table.values[l, h]) > most}
    assert set(method.heads or ()) == want and 0 < len(want) < 8
    assert qkv.core.registry.from_dict(json.loads(json.dumps(method.to_dict()))) == method
    assert f"heads={len(want)}" in str(method) and "scopes" not in str(method)
    ids = torch.randint(61, (2, 330), generator=torch.Generator().manual_seed(2))
    outs = []
    for methods in (("full",), (method,), (method.replace(compensation=False),)):
        with qkv.applied(model, *methods), torch.no_grad():
            cache, logits = model(ids[:, :300], use_cache=True).past_key_values, []
            for i in range(300, 330):
                logits.append(model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits)
            outs.append(torch.cat(logits, 1))
            report = qkv.report(model)
            held = cache.layers[0].memory.positions()[0] >= 0
            per_head = held.sum(-1).tolist()
    assert report.bytes < 0.8 * report.full_bytes
    row = [math.ceil(x) for x in found.table.values[0].tolist()]
    assert per_head == [330 if x > most else x + 1 for x in row]
    for got in outs[1:]:
        assert 0 < float((got - outs[0]).abs().max()) < 1e-3


def test_clipped_queries_and_keys_have_a_scope_too() -> None:
    loose, tight = (tiny("mpt", attn_config={"clip_qkv": x}) for x in (None, 0.05))
    values = [qkv.method("induction-echo").run(model).table.values for model in (loose, tight)]
    w = weights_of(tight, "transformer.blocks.0.attn")
    assert w.clip == 0.05 and bool((values[1] < values[0]).all())
    assert float(gaps(w).max()) <= w.scale * 2 * 0.05**2 * 8 + 1e-12
    floor = -math.log(1e-3) / torch.tensor(qkv.sites(tight)[0].geometry.slopes, dtype=torch.float64)
    assert bool((scopes(w, qkv.sites(tight)[0].geometry.slopes or (), 1e-3) >= floor).all())


def test_scopes_of_another_model_are_refused() -> None:
    model, rows = tiny("bloom"), ((5, 6, 7, 8),)
    for scopes_, message in ((rows, "1 layers of 4"), (((5, 6, 7), (5, 6, 7)), "2 layers of 3")):
        with pytest.raises(Refused, match=message):
            qkv.apply(model, RazorAttention(heads=(), scopes=scopes_))
    with pytest.raises(Refused, match="this site has none"):
        qkv.apply(decoder(), RazorAttention(heads=(), scopes=rows))
    with pytest.raises(InvalidParameter, match="as many KV heads"):
        RazorAttention(heads=(), scopes=((1, 2), (3,)))
    with pytest.raises(InvalidParameter, match="at least 1 token"):
        RazorAttention(heads=(), scopes=((0, 2),))
