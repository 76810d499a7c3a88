"""Families of transformers that the host was not written on: each is served exactly or refused by the seam it lacks."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

import qkv
from families import family
from models import inputs
from qkv.core.errors import Refused, StateError
from qkv.hosts.transformers_cache import QKVLayer
from test_host import fingerprint, forward, generate

CACHED = (
    "qwen2 qwen3_moe phi3 olmo2 glm4 granite cohere2 starcoder2 opt mixtral smollm3 gpt_bigcode lfm2 falcon".split()
)


@pytest.mark.parametrize("kind", CACHED)
def test_a_family_is_served_exactly(kind: str) -> None:
    more = {"layer_types": ["conv", "full_attention"] * 2} if kind == "lfm2" else {}
    model, x = family(kind, **more), inputs("llama")
    ids, mask = x["input_ids"], x["attention_mask"]
    before, out, tokens = fingerprint(model), forward(model, x), generate(model, ids, mask)
    assert len({tuple(row) for row in tokens[:, 23:].tolist()}) == 2  # it is not one token over and over
    for method in ("full", "h2o:budget=1.0"):
        with qkv.applied(model, method):
            torch.testing.assert_close(forward(model, x)[mask.bool()], out[mask.bool()], rtol=0, atol=1e-9)
            assert torch.equal(generate(model, ids, mask), tokens)
    with qkv.applied(model, "h2o:budget=9"):
        both = generate(model, ids, mask)
        assert torch.equal(both[0, 23:], generate(model, ids[:1, 7:])[0, 16:])
        compressed = [s for s in qkv.report(model).sites if s.methods]
        assert compressed and {s.kept for s in compressed} == {9}
        assert all(s.bytes < 0.5 * s.full_bytes for s in compressed)
    assert fingerprint(model) == before and torch.equal(forward(model, x), out)


MLA = dict(num_key_value_heads=6)
SEAMS = [
    ("gpt_oss", {}, "sink logits"),
    ("gemma2", {}, "caps its logits"),
    ("gptj", {}, "attention interface"),
    ("falcon", dict(alibi=True), "ALiBi biases"),
    ("deepseek_v32", MLA, "indexer"),
    ("bigbird_pegasus", {}, "is_causal=False"),
    ("hrm_text", {}, "several layers of the cache"),
    ("gemma3n_text", dict(num_kv_shared_layers=2), "shares one layer's keys"),
    ("gemma4_text", dict(num_kv_shared_layers=2), "shares one layer's keys"),
]


@pytest.mark.parametrize("kind, more, needle", SEAMS)
def test_a_family_without_the_seam_is_refused_by_its_name(kind: str, more: dict, needle: str) -> None:
    if kind not in hf.CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {kind}")
    model = family(kind, **more)
    before = fingerprint(model)
    assert not qkv.plan(model, "full").ok and needle in str(qkv.plan(model, "full"))
    for method in ("full", "h2o", "sliding-window:window=7"):
        with pytest.raises(Refused):
            qkv.apply(model, method)
    assert fingerprint(model) == before


@pytest.mark.parametrize("kind", ["gemma3n_text", "gemma4_text"])
def test_layers_beside_shared_ones_are_served(kind: str) -> None:
    kinds = ["full_attention"] * 2 + ["sliding_attention", "full_attention"] * 2
    model, x = family(kind, num_hidden_layers=6, num_kv_shared_layers=2, layer_types=kinds), inputs("llama")
    ids, mask = x["input_ids"], x["attention_mask"]
    tokens = generate(model, ids, mask)
    with qkv.applied(model, "h2o:budget=1.0"):
        assert torch.equal(generate(model, ids, mask), tokens)
        assert {s.site.layer for s in qkv.report(model).sites} == {0, 1}


@pytest.mark.parametrize("kind", ["deepseek_v2", "deepseek_v3"])
def test_attention_over_latents_is_computed_by_patterns_and_refused_by_caches(kind: str) -> None:
    model, x = family(kind, **MLA), inputs("llama")
    ids, mask = x["input_ids"], x["attention_mask"]
    tokens = generate(model, ids, mask)
    for method in ("full", "sliding-window:window=400"):
        with qkv.applied(model, method):
            assert torch.equal(generate(model, ids, mask), tokens)
    with qkv.applied(model, "sliding-window:window=5,sinks=1"):
        assert torch.equal(generate(model, ids, mask)[0, 23:], generate(model, ids[:1, 7:])[0, 16:])
    if not hasattr(model.model.layers[0].self_attn, "expand_kv"):
        return  # versions before 5.2x cache the keys and values themselves
    with pytest.raises(Refused, match="no keys and values to act on"):
        qkv.apply(model, "h2o")


def test_a_bias_in_the_mask_is_refused_and_not_dropped() -> None:
    model, ids = family("qwen2"), inputs("llama")["input_ids"][1:]
    lowest = torch.finfo(torch.float64).min
    plain = torch.zeros(1, 1, 23, 23, dtype=torch.float64).masked_fill(~torch.ones(23, 23).tril().bool(), lowest)
    want = forward(model, {"input_ids": ids, "attention_mask": plain})
    with qkv.applied(model, "full"):
        got = forward(model, {"input_ids": ids, "attention_mask": plain})
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
        with pytest.raises(Refused, match="bias to its logits"):
            forward(model, {"input_ids": ids, "attention_mask": plain + torch.arange(23.0)})


def test_keys_that_change_on_their_way_to_the_attention_are_noticed(monkeypatch) -> None:
    model, ids = family("qwen2"), inputs("llama")["input_ids"]
    update = QKVLayer.update
    monkeypatch.setattr(QKVLayer, "update", lambda self, k, v, *a, **b: tuple(x.clone() for x in update(self, k, v)))
    with qkv.applied(model, "h2o"), pytest.raises(StateError, match="changes them on the way"):
        forward(model, {"input_ids": ids})
    monkeypatch.undo()
    with qkv.applied(model, "h2o"):
        assert torch.isfinite(forward(model, {"input_ids": ids})).all()


def test_layers_that_attend_within_chunks_keep_their_cache() -> None:
    model, x = family("llama4_text", attention_chunk_size=8), inputs("llama")
    ids, mask = x["input_ids"], x["attention_mask"]
    tokens = generate(model, ids, mask)
    with qkv.applied(model, "h2o:budget=1.0"):
        assert torch.equal(generate(model, ids, mask), tokens)
        assert len(qkv.report(model).sites) == 2


def test_a_model_with_a_cache_of_its_own_kind_is_refused() -> None:
    with pytest.raises(Refused, match="MiniMaxCache"):
        qkv.apply(family("minimax"), "full")


def test_attention_that_shares_its_cache_layer_with_a_mixer_keeps_it() -> None:
    kinds = ["linear_attention", "hybrid", "linear_attention"] * 2  # a name for the mixer that every version takes
    more = dict(num_hidden_layers=6, layer_types=kinds, hybrid_layer_ids=[1, 4], num_mem_blocks=1, num_key_value_heads=6,
                attention_head_dim=16, attention_hidden_size=96, mamba_ngroups=1, n_mamba_heads=12,
                mamba_headdim=8, mamba_d_state=8, use_mem_rope=True)  # fmt: skip
    model, x = family("zamba2", **more), inputs("llama")
    ids, mask = x["input_ids"], x["attention_mask"]
    tokens = generate(model, ids, mask)
    with qkv.applied(model, "full"):
        assert torch.equal(generate(model, ids, mask), tokens)
    with pytest.raises(Refused, match="state of another mixer"):
        qkv.apply(model, "h2o")
