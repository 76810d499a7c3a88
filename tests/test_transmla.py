"""TransMLA against its definition, stage by stage, and at the edges of what it takes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

import models
import qkv
from qkv.convert import transmla
from qkv.convert._common.attention import Moments, perplexity, record, rotated
from qkv.convert.transmla import TransMLA, balance_ratio, components, joint_basis, reference, rorope
from qkv.core.attend import causal_mask
from qkv.core.errors import InvalidInput, InvalidParameter, Refused, StateError
from qkv.hosts import observe
from qkv.testing.conversions import source

D, T = 8, 21
F64 = torch.float64


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def text(rows: int = 3, length: int = 33, seed: int = 0, vocabulary: int = 61) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(1, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))}


def angles(d: int = D, t: int = T, base: float = 50.0) -> tuple[torch.Tensor, torch.Tensor]:
    frequency = base ** (-2 * torch.arange(d // 2, dtype=F64) / d)
    angle = (torch.arange(t, dtype=F64)[:, None] * frequency).repeat(1, 2)[None]
    return angle.cos(), angle.sin()


def qkv_of(g: int, h: int = 4, d: int = D, t: int = T, seed: int = 0) -> tuple[torch.Tensor, ...]:
    mixed = draw(d * g, d * g, seed=seed + 9)  # keys whose channels are correlated, over heads too
    k = (draw(2, t, g * d, seed=seed + 1) @ mixed).unflatten(-1, (g, d)).transpose(1, 2) / d
    return draw(2, h, t, d, seed=seed + 2), k, draw(2, g, t, d, seed=seed + 3)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The source's attention, written out."""
    r = q.shape[1] // k.shape[1]
    k, v = rotated(k, cos, sin).repeat_interleave(r, 1), v.repeat_interleave(r, 1)
    scores = rotated(q, cos, sin) @ k.mT * q.shape[-1] ** -0.5
    return scores.masked_fill(~causal_mask(q.shape[2], q.shape[2], q.device), -torch.inf).softmax(-1) @ v


def moments_of(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    x = torch.cat([y.transpose(1, 2).flatten(2).flatten(0, 1) for y in (k, v)], dim=-1)
    return x.T @ x


def basis_of(k: torch.Tensor, fold: int, rope_dim: int) -> torch.Tensor:
    g, d = k.shape[1], k.shape[3]
    return components(rorope(moments_of(k, k)[: g * d, : g * d], g, d, fold), g, d, fold, rope_dim)


# -- stages 0 and 1 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("g", [1, 2, 4])
def test_merging_heads_is_exact(g: int) -> None:
    q, k, v = qkv_of(g)
    plain = components(torch.eye(g, dtype=F64).expand(D // 2, g, g), g, D, 1, g * D)
    torch.testing.assert_close(plain.sum(0), torch.ones(g * D, dtype=F64))  # a permutation: only the order changes
    out = reference(q, k, v, *angles(), plain, rope_dim=g * D, scale=D**-0.5)
    torch.testing.assert_close(out, attention(q, k, v, *angles()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("g", [1, 2, 4])
def test_rotating_equal_frequencies_is_exact(g: int) -> None:
    q, k, v = qkv_of(g)
    t = basis_of(k, 1, g * D)
    torch.testing.assert_close(t @ t.T, torch.eye(g * D, dtype=F64), rtol=0, atol=1e-12)
    out = reference(q, k, v, *angles(), t, rope_dim=g * D, scale=D**-0.5)
    torch.testing.assert_close(out, attention(q, k, v, *angles()), rtol=0, atol=1e-11)


@pytest.mark.parametrize("what", ["random", "interleaved", "folded"])
def test_what_breaks_the_rotation(what: str) -> None:
    q, k, v = qkv_of(2)
    t = basis_of(k, 1, 2 * D)
    if what == "random":
        t = torch.linalg.qr(draw(2 * D, 2 * D, seed=5)).Q
    elif what == "interleaved":
        t = t[torch.arange(2 * D).unflatten(0, (2, -1)).T.flatten()]
    else:
        t = basis_of(k, 2, 2 * D)
    out = reference(q, k, v, *angles(), t, rope_dim=2 * D, scale=D**-0.5)
    assert (out - attention(q, k, v, *angles())).abs().max() > 1e-3


def test_unequal_frequencies_made_equal_are_exact_again() -> None:
    """Folding two frequencies is exact where both are the same."""
    q, k, v = qkv_of(2)
    pair = torch.tensor([1.0, 1.0, 0.1, 0.1], dtype=F64)
    angle = (torch.arange(T, dtype=F64)[:, None] * pair).repeat(1, 2)[None]
    out = reference(q, k, v, angle.cos(), angle.sin(), basis_of(k, 2, 2 * D), rope_dim=2 * D, scale=D**-0.5)
    torch.testing.assert_close(out, attention(q, k, v, angle.cos(), angle.sin()), rtol=0, atol=1e-11)


def test_energy_gathers_in_the_channels_that_keep_their_rotation() -> None:
    _, k, _ = qkv_of(4)
    kk = moments_of(k, k)[: 4 * D, : 4 * D]

    def kept(t: torch.Tensor, p: int) -> float:
        return float(((t[:p] @ kk) * t[:p]).sum() / kk.trace())

    plain = components(torch.eye(4, dtype=F64).expand(D // 2, 4, 4), 4, D, 1, D)
    energies = [kept(basis_of(k, f, D), D) for f in (1, 2, 4)]
    assert kept(plain, D) < energies[0] <= energies[1] <= energies[2]


# -- stages 2 and 3 -----------------------------------------------------------------------------------------------


def scores(q: torch.Tensor, k: torch.Tensor, t: torch.Tensor, rope_dim: int) -> torch.Tensor:
    """Scores of the reference, read out through one-hot values."""
    n, h = q.shape[2], q.shape[1]
    joint = k.transpose(1, 2).flatten(2) @ t.T
    query = torch.einsum("bhtd,lhd->bhtl", q, t.unflatten(1, (k.shape[1], -1)).repeat_interleave(h // k.shape[1], 1))
    c, s = (x[..., : D // 2 : max(1, D // rope_dim)].repeat(1, 1, 2 * max(1, rope_dim // D)) for x in angles(t=n))

    def turn(x: torch.Tensor) -> torch.Tensor:
        return torch.cat((rotated(x[..., :rope_dim], c, s), x[..., rope_dim:]), -1)

    return turn(query) @ turn(joint[:, None]).mT


@pytest.mark.parametrize(("rope_dim", "fold"), [(8, 1), (8, 4), (4, 2), (4, 4), (2, 4), (16, 1), (24, 2)])
def test_dropped_rotation_costs_nothing_on_the_diagonal(rope_dim: int, fold: int) -> None:
    q, k, _ = qkv_of(4)
    got = scores(q, k, basis_of(k, fold, rope_dim), rope_dim).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(got, (q * k).sum(-1), rtol=0, atol=1e-11)


def layer_of(model: Any, method: TransMLA, data: list[dict]) -> tuple[Any, Any, Any]:
    """First site, its source module, and the converted one."""
    site = qkv.sites(model)[0]
    before = model.get_submodule(site.name)
    qkv.apply(model, method, data=data)
    return site, before, model.get_submodule(site.name)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("rope_dim", "fold"), [(8, 1), (8, 2), (4, 2), (2, 4)])
def test_full_rank_is_the_model_that_only_dropped_its_rotation(kv_heads: int, rope_dim: int, fold: int) -> None:
    model, data = source(kv_heads), [text()]
    full = 2 * kv_heads * D - rope_dim
    site = qkv.sites(model)[0]
    m = record(model, [site], data, "test", queries=False)[site.name].kv
    t = components(rorope(m[: kv_heads * D, : kv_heads * D], kv_heads, D, fold), kv_heads, D, fold, rope_dim)
    _, before, after = layer_of(model, TransMLA(kv_rank=full, rope_dim=rope_dim, freqfold=fold), data)
    x, (cos, sin) = draw(2, T, 40, seed=4), angles()
    q, k, v = (getattr(before, n)(x).unflatten(-1, (-1, D)).transpose(1, 2) for n in ("q_proj", "k_proj", "v_proj"))
    want = reference(q, k, v, cos, sin, t, rope_dim=rope_dim, scale=D**-0.5)
    q, c, key = after.project(x, after.columns(cos), after.columns(sin))
    got = qkv.attend(q, *after.expand(c, key), causal=True, scale=after.scaling).out
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def test_the_joint_basis_is_orthogonal_and_levels_keys_and_values() -> None:
    _, k, v = qkv_of(2)
    kv, t = moments_of(k, 30 * v), basis_of(k, 1, D)
    rho = balance_ratio(kv, t, D, 1.0)
    nope = ((t[D:] @ kv[: 2 * D, : 2 * D]) * t[D:]).sum(-1)
    torch.testing.assert_close(nope.sqrt().mean() / rho, kv[2 * D :, 2 * D :].diagonal().sqrt().mean())
    r = joint_basis(kv, t, D, rho)
    torch.testing.assert_close(r @ r.T, torch.eye(r.shape[0], dtype=F64), rtol=0, atol=1e-12)
    assert balance_ratio(kv, t, D, 2.0) == pytest.approx(2 * rho)
    assert balance_ratio(kv, t, D, None) == 1.0
    assert balance_ratio(kv, t, 2 * D, 1.0) == 1.0  # nothing to level


def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


def test_rho_matters_only_when_something_is_cut() -> None:
    model, data, batch = source(2), [text()], text(seed=1)
    outs: dict[int, list[torch.Tensor]] = {24: [], 10: []}
    for rank, out in outs.items():
        for balance in (None, 1.0, 7.0):
            with qkv.applied(model, TransMLA(kv_rank=rank, rope_dim=8, freqfold=1, balance=balance), data=data):
                out.append(logits(model, batch))
    for other in outs[24][1:]:
        torch.testing.assert_close(other, outs[24][0], rtol=0, atol=1e-10)
    assert all((other - outs[10][0]).abs().max() > 1e-3 for other in outs[10][1:])


def test_full_query_rank_changes_nothing_and_less_does() -> None:
    model, data, batch = source(2), [text()], text(seed=1)
    method = TransMLA(kv_rank=10, rope_dim=8, freqfold=1)
    got = []
    for rank in (None, 32, 12):
        with qkv.applied(model, method.replace(q_rank=rank), data=data):
            got.append(logits(model, batch))
    torch.testing.assert_close(got[1], got[0], rtol=0, atol=1e-10)
    assert (got[2] - got[0]).abs().max() > 1e-3


def test_the_norm_is_near_identity_and_its_reciprocal_is_not() -> None:
    model, data, batch = source(2), [text(8, 40)], text(seed=1)
    method = TransMLA(kv_rank=16, rope_dim=8, freqfold=1, q_rank=24)
    with qkv.applied(model, method, data=data):
        want = logits(model, batch).log_softmax(-1)
    with qkv.applied(model, method.replace(norm=True), data=data):
        gap = (logits(model, batch).log_softmax(-1) - want).abs().mean()
        site = qkv.sites(model)[0]
        module = model.get_submodule(site.name)
        weight = module.kv_a_layernorm.weight
        assert (weight == weight[0]).all() and weight[0] > 0
        x = draw(3, 9, 40, seed=3)
        with torch.no_grad():
            for name in qkv.sites(model):
                for norm in ("kv_a_layernorm", "q_a_layernorm"):
                    getattr(model.get_submodule(name.name), norm).weight.reciprocal_()
        worse = (logits(model, batch).log_softmax(-1) - want).abs().mean()
        assert module.kv_a_proj_with_mqa(x).shape == (3, 9, 24)
    assert worse > 2 * gap


# -- bytes, decoding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rope_dim", "rank"), [(8, 10), (4, 7), (16, 16)])
def test_bytes_are_latent_plus_rotary_key(rope_dim: int, rank: int) -> None:
    model, batch = source(2), text(rows=3, length=17)
    with qkv.applied(model, TransMLA(kv_rank=rank, rope_dim=rope_dim), data=[text()]):
        logits(model, batch)
        report = qkv.report(model)
        assert report.bytes == 2 * 3 * 17 * (rank + rope_dim) * 8
        assert report.full_bytes == 2 * 3 * 17 * (2 * 2 * D) * 8
        assert report.calls == 2 and report.kept == report.seen == 17


def test_absorbed_and_expanded_agree_and_each_is_used() -> None:
    model = source(2)
    _, _, module = layer_of(model, TransMLA(kv_rank=14, rope_dim=8, freqfold=1), [text()])
    assert module.expands(30) and not module.expands(1)
    batch, outs = text(length=30, seed=2), []
    for answer in (True, False):
        for site in qkv.sites(model):
            model.get_submodule(site.name).expands = lambda queries, answer=answer: answer
        outs.append(logits(model, batch))
    torch.testing.assert_close(outs[1], outs[0], rtol=0, atol=1e-11)
    assert not torch.equal(outs[1], outs[0])


def test_gradients_flow_through_the_first_block_of_a_cache() -> None:
    model = source(2)
    _, _, module = layer_of(model, TransMLA(kv_rank=14, rope_dim=8, freqfold=1), [text()])
    ids = text()["input_ids"]
    model(ids, labels=ids, use_cache=True).loss.backward()
    with_cache = module.kv_a_proj_with_mqa.weight.grad.clone()
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    torch.testing.assert_close(with_cache, module.kv_a_proj_with_mqa.weight.grad, rtol=1e-9, atol=1e-12)


def test_probes_and_patterns_see_expanded_keys() -> None:
    model, batch = source(2), text(length=30)
    qkv.apply(model, TransMLA(kv_rank=14, rope_dim=8, freqfold=1), data=[text()])
    want, seen = logits(model, batch), []
    with observe(model, lambda site, call: seen.append(call)):
        torch.testing.assert_close(logits(model, batch), want, rtol=0, atol=1e-11)
    assert [tuple(x.shape) for x in (seen[0].q, seen[0].k, seen[0].v)] == [
        (3, 4, 30, 16),
        (3, 2, 30, 16),
        (3, 2, 30, 8),
    ]
    qkv.apply(model, "sliding-window:window=64")
    torch.testing.assert_close(logits(model, batch), want, rtol=0, atol=1e-9)


# -- folding ------------------------------------------------------------------------------------------------------


def test_auto_doubles_the_fold_while_the_perplexity_falls() -> None:
    model, data = source(4), [text(4, 40)]
    qkv.apply(model, TransMLA(kv_rank=20, rope_dim=8), data=data)
    notes = model.__dict__["_qkv"].entries[0].notes
    tried = [float(x) for x in notes["perplexity"].values()]
    folds = [int(f) for f in notes["perplexity"]]
    assert folds == [1, 2, 4][: len(folds)]
    assert notes["freqfold"] == folds[tried.index(min(tried))]
    qkv.revert(model)
    full = TransMLA(kv_rank=56, rope_dim=8, freqfold=notes["freqfold"])
    with qkv.applied(model, full, data=data):
        assert perplexity(model, data) == pytest.approx(min(tried), rel=1e-9)
    json.dumps(notes)


def test_auto_with_one_choice_tries_nothing() -> None:
    for rope_dim, fold in ((2, 4), (16, 1)):  # collapse 4: only f = 4 is a multiple; nothing dropped: f = 1 is exact
        model = source(2)
        qkv.apply(model, TransMLA(kv_rank=16, rope_dim=rope_dim), data=[text()])
        notes = model.__dict__["_qkv"].entries[0].notes
        assert (notes["freqfold"], notes["perplexity"]) == (fold, {})


def test_default_rank_is_the_papers_or_half_of_full() -> None:
    site = qkv.sites(source(2))[0]
    assert TransMLA(rope_dim=8).rank(site.geometry) == 12
    assert TransMLA(rope_dim=8, kv_rank=5).rank(site.geometry) == 5


# -- models -------------------------------------------------------------------------------------------------------

SIZES = dict(vocab_size=61, hidden_size=40, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, initializer_range=0.2)  # fmt: skip


def tiny(kind: str, **more: Any) -> Any:
    config = getattr(hf, f"{kind}Config")(**(SIZES | more))
    torch.manual_seed(0)
    return getattr(hf, f"{kind}ForCausalLM")(config).double().eval()


SCALED = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
FAMILIES = {
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2, biases": ("Qwen2", {}),
    "granite, a scale of its own": ("Granite", {"attention_multiplier": 0.2}),
    "llama3 frequencies": ("Llama", {"rope_parameters": SCALED}),
    "linear frequencies": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}}),
    "llama, all biases": ("Llama", {"attention_bias": True}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_exact_at_full_rank(family: str) -> None:
    kind, more = FAMILIES[family]
    model = tiny(kind, **more)
    for p in model.parameters():
        if p.ndim == 1:
            p.data += 0.2 * torch.randn_like(p)
    batch = text(seed=3)
    want = logits(model, batch)
    with qkv.applied(model, TransMLA(kv_rank=16, rope_dim=16, freqfold=1), data=[text()]):
        torch.testing.assert_close(logits(model, batch), want, rtol=0, atol=2e-6)  # norms run in float32
    assert torch.equal(logits(model, batch), want)


@pytest.mark.parametrize("family", ["llama3 frequencies", "linear frequencies"])
def test_scaled_frequencies_collapse_by_columns(family: str) -> None:
    """Every second frequency of the model's own list, not a list made anew for half the width."""
    kind, more = FAMILIES[family]
    model = tiny(kind, **more)
    want = qkv.sites(model)[0].geometry.rope.frequencies[::2].tolist()
    qkv.apply(model, TransMLA(kv_rank=20, rope_dim=4, freqfold=2), data=[text()])
    notes = model.__dict__["_qkv"].entries[0].notes["sites"]
    assert all(n["rope_frequencies"] == want for n in notes.values())


REFUSED = {
    "qwen3": "q_norm",
    "gemma3": "q_norm|sliding window",
    "gpt2": "no linear",
    "gpt_neox": "no linear",
    "bert": "no attention site|encoder|no linear",
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_attentions_are_refused_by_name(name: str) -> None:
    model = models.make(name)
    assert not qkv.plan(model, "transmla:rope_dim=8").ok
    with pytest.raises(Refused, match=REFUSED[name]):
        qkv.apply(model, "transmla:rope_dim=8,kv_rank=8", data=[text()])


def test_a_sliding_window_is_refused() -> None:
    with pytest.raises(Refused, match="sliding window of 8"):
        qkv.apply(tiny("Mistral", sliding_window=8), "transmla:rope_dim=8", data=[text()])


STRETCHED = {"rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(("kind", "said"), [("yarn", "yarn"), ("dynamic", "depend on the length")])
def test_rotations_that_scale_or_move_are_refused(kind: str, said: str) -> None:
    model = tiny("Llama", rope_parameters=STRETCHED | {"rope_type": kind})
    with pytest.raises(Refused, match=said):
        qkv.apply(model, "transmla:rope_dim=8,kv_rank=8", data=[text()])


@pytest.mark.parametrize(
    ("kind", "more", "said"),
    [("Cohere", {}, "queries are not its rotated projection"), ("Olmo", {"clip_qkv": 0.01}, "queries are not")],
)
def test_what_no_part_tells_is_found_by_running_it(kind: str, more: dict, said: str) -> None:
    """Interleaved pairs (Cohere) and clipped projections (Olmo) look like plain rotary attention from outside."""
    model = tiny(kind, **more)
    before = dict(model.named_modules())
    with pytest.raises(Refused, match=said):
        qkv.apply(model, "transmla:rope_dim=8,kv_rank=8", data=[text()])
    assert dict(model.named_modules()) == before and "_qkv" not in model.__dict__


def test_mixed_biases_are_refused() -> None:
    model = source(2)
    attention = model.model.layers[1].self_attn
    attention.k_proj.bias = torch.nn.Parameter(torch.zeros(16, dtype=F64))
    assert "bias" in str(qkv.plan(model, "transmla:rope_dim=8"))
    with pytest.raises(Refused, match="some of q, k, v have a bias"):
        qkv.apply(model, "transmla:rope_dim=8", where=[1], data=[text()])


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("rope_dim=6", "one of 2, 4, 8, 16"),
        ("rope_dim=32", "one of 2, 4, 8, 16"),
        ("rope_dim=64", "one of 2, 4, 8, 16"),
        ("rope_dim=8,kv_rank=25", "full rank 2 \\* 16 - 8 = 24"),
        ("rope_dim=4,freqfold=1", "one of 2, 4"),
        ("rope_dim=8,freqfold=3", "one of 1, 2, 4"),
        ("rope_dim=8,q_rank=33", "full rank 32"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(setting: str, said: str) -> None:
    with pytest.raises(Refused, match=said):
        qkv.apply(source(2), f"transmla:{setting}", data=[text()])


@pytest.mark.parametrize(
    "bad", ["rope_dim=7", "rope_dim=0", "kv_rank=0", "freqfold=0", "freqfold=best", "balance=0", "norm=3"]
)
def test_parameters_out_of_range(bad: str) -> None:
    with pytest.raises(InvalidParameter):
        qkv.method(f"transmla:{bad}")


def test_too_little_text_and_numbers_that_are_none() -> None:
    with pytest.raises(InvalidInput, match="5 tokens, fewer than the kv_rank=20"):
        qkv.apply(source(2), "transmla:rope_dim=8,kv_rank=20", data=[text(1, 5)])
    model = source(2)
    model.model.layers[1].self_attn.v_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(Refused, match=r"values are not|not its"):
        qkv.apply(model, "transmla:rope_dim=8,kv_rank=20", data=[text()])


# -- stacks -------------------------------------------------------------------------------------------------------


def test_cache_methods_and_the_latent_exclude_each_other_in_any_order() -> None:
    method, cache = TransMLA(kv_rank=14, rope_dim=8, freqfold=1), "streamingllm:window=8"
    for pair in ((method, cache), (cache, method)):
        with pytest.raises(Refused, match=r"both want to be what stores|cache of its own"):
            qkv.apply(source(2), *pair, data=[text()])
    model = source(2)
    qkv.apply(model, cache)
    with pytest.raises(Refused, match="stores"):
        qkv.apply(model, method, data=[text()])
    model = source(2)
    qkv.apply(model, method, where=[0], data=[text()])
    qkv.apply(model, cache, where=[1])
    want = model.generate(text()["input_ids"], max_new_tokens=3, do_sample=False)
    assert want.shape == (3, 36) and qkv.report(model).bytes < qkv.report(model).full_bytes
    with pytest.raises(Refused, match=r"cache of its own|stores"):
        qkv.apply(model, cache, where=[0])


def test_methods_that_were_there_before_stay() -> None:
    model, batch = source(2), text(length=30)
    method = TransMLA(kv_rank=16, rope_dim=16, freqfold=1)
    with qkv.applied(model, "sliding-window:window=5"):
        want = logits(model, batch)
    qkv.apply(model, "sliding-window:window=5")
    qkv.apply(model, method, data=[text()])
    torch.testing.assert_close(logits(model, batch), want, rtol=0, atol=1e-9)
    assert qkv.report(model).calls == 2  # calibration is not counted


def test_twice_is_refused_and_a_failure_leaves_the_stack_as_it_was() -> None:
    model, batch = source(2), text()
    method = TransMLA(kv_rank=14, rope_dim=8, freqfold=1)
    qkv.apply(model, method, where=[0], data=[text()])
    want = logits(model, batch)
    with pytest.raises(Refused, match=r"twice|no linear|converts"):
        qkv.apply(model, method, where=[0], data=[text()])
    with pytest.raises(InvalidInput, match="data="):
        qkv.apply(model, method, where=[1])
    assert torch.equal(logits(model, batch), want)
    assert [s.module for s in qkv.sites(model)] == ["TransformersMLA", "LlamaAttention"]
    qkv.apply(model, method.replace(kv_rank=9), where=[1], data=[text()])
    logits(model, batch)
    assert [s.bytes for s in qkv.report(model).sites] == [3 * 33 * n * 8 for n in (22, 17)]
    qkv.revert(model)
    assert [s.module for s in qkv.sites(model)] == ["LlamaAttention"] * 2


def test_foreign_caches_are_refused() -> None:
    model, batch = source(2), text(length=12)
    with torch.no_grad():
        filled = model(**batch, use_cache=True).past_key_values
    qkv.apply(model, TransMLA(kv_rank=14, rope_dim=8, freqfold=1), data=[text()])
    with pytest.raises(Refused, match="keeps its own cache"):
        model(**batch, past_key_values=filled)
    static = hf.StaticCache(config=model.config, max_cache_len=64)
    with pytest.raises(Refused, match="keeps its own cache"):
        model(**batch, past_key_values=static)
    module = model.get_submodule(qkv.sites(model)[0].name)
    with pytest.raises(StateError, match="caches latents"):
        module(draw(1, 3, 40), position_embeddings=angles(t=3), past_key_values=hf.DynamicCache())
    with pytest.raises(InvalidInput, match="position_embeddings"):
        module(draw(1, 3, 40))


def test_a_site_says_what_it_is_now() -> None:
    model = source(2)
    qkv.apply(model, TransMLA(kv_rank=14, rope_dim=8, freqfold=1), data=[text()])
    site = qkv.sites(model)[0]
    assert (site.module, site.heads, site.kv_heads, site.head_dim, site.value_dim) == ("TransformersMLA", 4, 2, 16, 8)
    assert site.geometry.rope is None and site.scale == pytest.approx(16**-0.5) and site.reason is None


# -- drawn geometries ---------------------------------------------------------------------------------------------


@st.composite
def cases(pick: Any) -> tuple[int, ...]:
    d = pick(st.sampled_from([2, 4, 6, 8, 12]))
    g = pick(st.integers(1, 4))
    choices = [x for x in range(2, d, 2) if d % x == 0] + [d * m for m in range(1, g + 1)]
    rope_dim = pick(st.sampled_from(choices))
    fold = pick(st.sampled_from(transmla._folds(d, rope_dim)))
    return d, g, g * pick(st.integers(1, 3)), rope_dim, fold, pick(st.integers(0, 1 << 16))


@settings(max_examples=40, deadline=None)
@given(cases())
def test_weights_give_the_reference_for_any_geometry(case: tuple[int, ...]) -> None:
    """Formula to weights to module, against the joint-key definition, without a model around it."""
    d, g, h, rope_dim, fold, seed = case
    torch.manual_seed(seed)
    width, n = 7, g * d
    module = torch.nn.Module()
    for name, rows in (("q_proj", h * d), ("k_proj", n), ("v_proj", n)):
        setattr(module, name, torch.nn.Linear(width, rows, bias=seed % 2 == 0, dtype=F64))
    module.o_proj = torch.nn.Linear(h * d, width, bias=False, dtype=F64)
    x, (cos, sin) = draw(2, 9, width, seed=seed), angles(d, 9)
    with torch.no_grad():
        q, k, v = (getattr(module, f"{i}_proj")(x).unflatten(-1, (-1, d)).transpose(1, 2) for i in "qkv")
        kv = moments_of(k, v)
        t = components(rorope(kv[:n, :n], g, d, fold), g, d, fold, rope_dim)
        rho = balance_ratio(kv, t, rope_dim, 1.0)
        want = reference(q, k, v, cos, sin, t, rope_dim=rope_dim, scale=0.3)
        shape = transmla.MLAShape(
            width=width, heads=h, kv_heads=g, kv_rank=2 * n - rope_dim, rope_dim=rope_dim,
            nope_dim=d if rope_dim < n else 0, value_dim=d, bias=seed % 2 == 0,
        )  # fmt: skip
        tensors = transmla.weights(module, shape, t, joint_basis(kv, t, rope_dim, rho), rho, 0.3, None)
        from qkv.layers.mla import LatentProjections

        layer = LatentProjections(shape, dtype=F64)
        layer.load_state_dict(tensors)
        c, s = (a[..., : d // 2 : max(1, d // rope_dim)].repeat(1, 1, max(1, rope_dim // d)) for a in (cos, sin))
        q, latent, key = layer.project(x, c, s)
        got = qkv.attend(q, *layer.expand(latent, key), causal=True, scale=layer.scaling).out
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


def test_moments_leave_padding_out() -> None:
    model, site = source(2), qkv.sites(source(2))[0]
    batch = text(2, 12)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    padded = record(model, [site], [batch | {"attention_mask": mask}], "test", queries=True)[site.name]
    assert isinstance(padded, Moments) and padded.tokens == 19 and padded.q is not None
    rows = [{"input_ids": batch["input_ids"][:1, 5:]}, {"input_ids": batch["input_ids"][1:]}]
    alone = record(model, [site], rows, "test", queries=True)[site.name]
    torch.testing.assert_close(padded.kv, alone.kv, rtol=1e-5, atol=1e-6)  # rotary angles are float32


# -- on a CUDA device ---------------------------------------------------------------------------------------------

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@cuda
@pytest.mark.gpu
@pytest.mark.parametrize("way", ["greedy", "padded", "beams"])
def test_a_captured_step_is_the_plain_step(way: str) -> None:
    model = source(2, scale=0.12).float().cuda()
    ids = text(2, 23, seed=4)["input_ids"].cuda()
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    if way != "padded":
        ids, mask = ids[1:], mask[1:]
    more = {"num_beams": 3} if way == "beams" else {}
    data = [{"input_ids": text()["input_ids"].cuda()}]

    def tokens(graph: bool) -> tuple[torch.Tensor, int]:
        with qkv.applied(model, TransMLA(kv_rank=14, rope_dim=8, freqfold=1), data=data, graph=graph):
            out = model.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False, pad_token_id=0, **more)
            return out, model.__dict__["_qkv"].graph.replays if graph else 0

    (plain, _), (captured, replays) = tokens(False), tokens(True)
    assert torch.equal(plain, captured)
    assert replays >= 20, f"only {replays} of 39 steps were replayed"


@cuda
@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "rank", "rope_dim"), [(9, 160, 64), (16, 512, 64), (32, 512, 64), (3, 7, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_kernel_reads_latents(heads: int, rank: int, rope_dim: int, dtype: torch.dtype) -> None:
    from qkv.layers.mla import MLA

    torch.manual_seed(0)
    layer = MLA(heads=heads, kv_rank=rank, rope_dim=rope_dim, nope_dim=32, value_dim=32, norm=False).build(
        64, dtype=F64
    )
    x = torch.randn(2, 301, 64, dtype=F64)
    want = layer(x)[:, -1].detach()
    layer, x = layer.to("cuda", dtype), x.to("cuda", dtype)
    memory = layer.memory()
    with torch.no_grad():
        layer(x[:, :300], None, memory)
        got = layer(x[:, 300:], None, memory)[:, 0]
        plain = layer(x)[:, -1]
    assert memory.tile is not None or (heads, dtype) == (32, torch.float32)  # too wide for shared memory
    lost = (plain.double().cpu() - want).abs().max()
    assert (got.double().cpu() - want).abs().max() <= 3 * lost + 1e-6
