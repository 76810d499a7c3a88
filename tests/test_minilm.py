"""MiniLM against its page: exact invariances, the model's own attention maps, where gradients go, what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    BertConfig,
    BertModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    ViTConfig,
    ViTModel,
)

import qkv
from qkv.core.errors import InvalidInput, InvalidParameter, NeverFired, Refused
from qkv.core.objective import Needs, Projections, Trace
from qkv.distill.capture import Tap, describe, real_tokens
from qkv.distill.objectives._common.relation import regroup, relation_kl, visible

torch.set_num_threads(1)
VOCABULARY = 61
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 29,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


def bert(layers: int = 3, seed: int = 0, **more: Any) -> Any:
    torch.manual_seed(seed)
    return BertModel(BertConfig(**SIZES | {"num_hidden_layers": layers} | more)).double().eval()


def llama(layers: int = 3, seed: int = 0, kind: Any = (LlamaForCausalLM, LlamaConfig), **more: Any) -> Any:
    torch.manual_seed(seed)
    sizes = SIZES | {"num_hidden_layers": layers, "num_key_value_heads": 2, "head_dim": 6, "pad_token_id": 0} | more
    return kind[0](kind[1](**sizes)).double().eval()


def batch(lengths: tuple[int, ...] = (7, 4, 5), width: int = 7) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(3)
    ids = torch.randint(0, VOCABULARY, (len(lengths), width), generator=rng)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask}


def read(model: Any, needs: Needs, inputs: dict[str, torch.Tensor], learns: bool = False) -> Trace:
    with Tap(model, describe(model), needs, learns=learns) as tap:
        return tap(inputs)


def traces(method: Any, teacher: Any, student: Any, inputs: dict[str, torch.Tensor]) -> tuple[Trace, Trace]:
    needs = method.needs(describe(teacher), describe(student))
    return read(teacher, needs[0], inputs), read(student, needs[1], inputs, learns=True)


def loss(method: Any, teacher: Any, student: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return method(*traces(method, teacher, student, inputs), inputs).total


def gap(a: Any, b: Any) -> float:
    a, b = (float(x.detach()) if isinstance(x, torch.Tensor) else float(x) for x in (a, b))
    return abs(a - b)


def draw(*shape: int, seed: int = 0, **more: Any) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_(
        more.get("grad", False)
    )


# -- the relation ------------------------------------------------------------------------------------------------


def test_a_wider_copy_of_the_teacher_has_no_loss() -> None:
    """Each relation head zero-padded from W to W' and multiplied by (W'/W)^(1/4)."""
    x, real = draw(2, 3, 7, 4), torch.ones(2, 7, dtype=torch.bool)
    seen = visible(real, causal=False)
    wide = torch.nn.functional.pad(x, (0, 5)) * (9 / 4) ** 0.25
    kl = relation_kl((x, x, 4**-0.5), (wide, wide, 9**-0.5), real, seen)
    assert kl.abs().max() < 1e-12
    assert (
        relation_kl((x, x, 4**-0.5), (wide, wide, 4**-0.5), real, seen).min() > 1e-4
    )  # control: the other width's scale


def test_invariant_to_one_orthogonal_map_per_relation_head() -> None:
    x, y, real = draw(2, 3, 7, 4), draw(2, 3, 7, 5, seed=1), torch.ones(2, 7, dtype=torch.bool)
    seen = visible(real, causal=True)
    turn = torch.linalg.qr(draw(3, 5, 5, seed=2))[0]
    want = relation_kl((x, x, 0.5), (y, y, 0.4), real, seen)
    assert torch.allclose(relation_kl((x, x, 0.5), (y @ turn, y @ turn, 0.4), real, seen), want, rtol=1e-12, atol=0)
    assert not torch.allclose(relation_kl((x, x, 0.5), (y @ turn, y, 0.4), real, seen), want)  # control: one side only


@pytest.mark.parametrize("elements", [1, 20, 130, 400])
def test_pieces_equal_the_whole(elements: int) -> None:
    """Values and gradients, also where heads and rows are cut unevenly; NaN under the padding stays there."""
    real = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    seen = visible(real, causal=True)
    teacher, results = draw(2, 3, 7, 4).masked_fill(~real[:, None, :, None], torch.nan), []
    for size in (None, elements):
        left, right = draw(2, 3, 7, 5, seed=1, grad=True), draw(2, 3, 7, 5, seed=2, grad=True)
        kl = relation_kl((teacher, teacher, 0.5), (left, right, 0.4), real, seen, elements=size)
        kl.sum().backward()
        assert kl[1, 4:].eq(0).all() and left.grad is not None and left.grad[1, :, 4:].eq(0).all()
        results.append((kl.detach(), left.grad, right.grad))
    for whole, pieces in zip(*results, strict=True):
        assert torch.allclose(whole, pieces, rtol=1e-12, atol=1e-15) and torch.isfinite(whole).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.booleans(), st.integers(0, 10_000), st.floats(0.01, 30))
def test_kl_is_never_negative(n: int, heads: int, causal: bool, seed: int, size: float) -> None:
    real = torch.arange(n)[None] < 1 + seed % n
    x, y = draw(1, heads, n, 3, seed=seed) * size, draw(1, heads, n, 2, seed=seed + 1) * size
    kl = relation_kl((x, x, 1.0), (y, y, 1.0), real, visible(real, causal=causal))
    assert torch.isfinite(kl).all() and kl.min() >= -1e-12


def test_regroup_is_a_cut_of_the_concatenated_heads() -> None:
    x = draw(2, 3, 5, 4)
    flat = x.transpose(1, 2).flatten(2)  # [B, N, 12], as an output projection sees it
    assert torch.equal(regroup(x, 6)[:, 2], flat[..., 4:6])
    assert torch.equal(regroup(regroup(x, 6), 3), x)


# -- the objective -----------------------------------------------------------------------------------------------


def own_maps(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The model's attention maps of its last layer, ``[B, H, N, N]``, as it gives them itself."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with pytest.MonkeyPatch.context() as patch:  # decoders take this softmax in float32 whatever the model's precision
        patch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: x.softmax(dim))
        return eager(**inputs, output_attentions=True).attentions[-1].detach()


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return torch.where(p > 0, p * (p / q).log(), 0.0)


@pytest.mark.parametrize("make", [bert, llama])
def test_pair_qk_is_the_kl_of_the_models_own_attention_maps(make: Any) -> None:
    method = qkv.method("minilm", version=1, pairs=("qk",))
    teacher, student, inputs = make(3), make(2, seed=1), batch()
    p, q = own_maps(teacher, inputs), own_maps(student, inputs)
    rows = [kl(p[b, :, :n, :n], q[b, :, :n, :n]).sum() / (4 * n) for b, n in enumerate((7, 4, 5))]
    got, want = loss(method, teacher, student, inputs), torch.stack(rows).mean()
    assert want > 1e-3 and gap(got, want) < 1e-12
    if make is llama:  # control: before rotation it is another map
        assert gap(loss(method.replace(after_rope=False), teacher, student, inputs), want) > 1e-3 * float(want)


def test_sequences_count_alike_and_the_masked_mean_does_not_say_the_same() -> None:
    method, teacher, student = qkv.method("minilm", relation_heads=12), bert(3), bert(2, seed=1)
    inputs = batch()
    single = [loss(method, teacher, student, {k: v[b : b + 1] for k, v in inputs.items()}) for b in range(3)]
    whole = loss(method, teacher, student, inputs)
    assert gap(whole, torch.stack(single).mean()) < 1e-12
    by_token = loss(method.replace(average="token"), teacher, student, inputs)
    lengths = inputs["attention_mask"].sum(-1)
    assert gap(by_token, (torch.stack(single) * lengths).sum() / lengths.sum()) < 1e-12
    assert gap(whole, by_token) > 1e-5


def test_more_padding_changes_nothing() -> None:
    method, teacher, student = qkv.method("minilm", relation_heads=12), bert(3), bert(2, seed=1)
    longer = {k: torch.nn.functional.pad(v, (0, 5)) for k, v in batch().items()}
    assert gap(loss(method, teacher, student, longer), loss(method, teacher, student, batch())) < 1e-12


@pytest.mark.parametrize("version", [1, 2])
def test_nothing_past_the_last_values_gets_a_gradient(version: int) -> None:
    student = bert(3, seed=1)
    method = qkv.method("minilm", version=version, **({} if version == 1 else {"relation_heads": 12}))
    loss(method, bert(3), student, batch()).backward()
    touched = {n for n, p in student.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert {f"encoder.layer.2.attention.self.{x}.weight" for x in ("query", "key", "value")} <= touched
    assert {"encoder.layer.1.output.dense.weight", "encoder.layer.0.attention.output.dense.weight"} <= touched
    behind = [n for n in touched if (n.startswith("encoder.layer.2") and ".attention.self." not in n) or "pooler" in n]
    assert not behind, behind


def test_the_hidden_term_reaches_what_relations_leave_alone() -> None:
    student = bert(2, seed=1, hidden_size=12)
    method = qkv.method("minilm", relation_heads=12, hidden_weight=1.0)
    nets = describe(bert(3)), describe(student)
    helper = method.helper(*nets)
    assert helper is not None and helper.weight.shape == (24, 12)
    assert method.helper(nets[0], nets[0]) is None
    a, b = traces(method, bert(3), student, batch())
    total, parts = method(a, b, batch(), helper.double())
    total.backward()
    assert student.encoder.layer[1].output.dense.weight.grad.abs().max() > 0 and helper.weight.grad.abs().max() > 0
    want = sum(float(parts[p]) for p in ("qq", "kk", "vv", "hidden"))
    assert gap(total, want) < 1e-12
    assert all(not p.requires_grad for p in parts.values())


def test_defaults_of_the_papers() -> None:
    method, student = qkv.method("minilm"), describe(bert(3))
    assert method.version == 2 and method.chosen == ("qq", "kk", "vv") and method.factors == (1.0, 1.0, 1.0)
    assert qkv.method("minilm", version=1).chosen == ("qk", "vv")

    def layer(layers: int, family: str = "bert", **more: Any) -> int:
        net = replace(student, sites=student.sites[:1] * layers, family=family)
        return qkv.method("minilm", **more).layers(net, student)[0] + 1

    assert [layer(6), layer(12), layer(24), layer(24, "roberta"), layer(24, "xlm-roberta")] == [6, 12, 21, 19, 19]
    assert layer(24, version=1) == 24 and layer(24, teacher_layer=3) == 4
    wide = replace(student, width=1024)
    assert method.count("qq", student, student) == 48 and method.count("vv", wide, student) == 64
    assert (
        method.recipe()["learning_rate"] == 6e-4 and qkv.method("minilm", version=1).recipe()["learning_rate"] == 5e-4
    )


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"pairs": ("qx",)}, "'qx' must be two letters"),
        ({"pairs": ()}, "at least one relation"),
        ({"pairs": ("qq", "qq")}, "each once"),
        ({"weights": (1.0,)}, "1 weights for 3 pairs"),
        ({"weights": (0.0, 0.0, 0.0)}, "nothing to learn"),
        ({"weights": (-1.0, 1.0, 1.0)}, "must lie in"),
        ({"version": 3}, "must be one of 1, 2"),
        ({"version": 1, "relation_heads": 4}, "version 2"),
        ({"relation_heads": 0}, "must lie in"),
        ({"hidden_weight": -1.0}, "must lie in"),
    ],
)
def test_bad_parameters(parameters: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidParameter, match=says):
        qkv.method("minilm", **parameters)


def test_pairs_of_networks_that_do_not_fit() -> None:
    def refused(teacher: Any, student: Any, **parameters: Any) -> str:
        with pytest.raises(Refused) as error:
            qkv.method("minilm", **parameters).check(describe(teacher), describe(student))
        return str(error.value)

    assert "48 relation heads do not divide the widths 24 (teacher) and 24" in refused(bert(), bert())
    assert "among the divisors of 12" in refused(bert(), bert(hidden_size=12, num_attention_heads=2), relation_heads=24)
    few = bert(num_attention_heads=2)
    assert "the teacher has 4 and the student 2; use version=2" in refused(bert(), few, version=1)
    assert "kv_relation_heads among the divisors of 12" in refused(llama(), llama(), relation_heads=24)
    assert "3 layers (0 to 2" in refused(bert(), bert(), relation_heads=12, student_layer=3)
    assert "one of them is causal" in refused(bert(), llama(), relation_heads=12)
    assert "61 tokens and the student 60" in refused(bert(), bert(vocab_size=60), relation_heads=12)
    window = {"sliding_window": 3, "use_sliding_window": True, "max_window_layers": 0}
    narrow = llama(kind=(Qwen3ForCausalLM, Qwen3Config), **window)
    assert "sliding windows None and 3" in refused(llama(), narrow, version=1)
    qkv.method("minilm", relation_heads=12).check(describe(llama()), describe(narrow))


def test_equal_windows_are_part_of_the_attention_map() -> None:
    kind, window = (
        (Qwen3ForCausalLM, Qwen3Config),
        {"sliding_window": 3, "use_sliding_window": True, "max_window_layers": 0},
    )
    teacher, student = (llama(2, seed=s, kind=kind, **window) for s in (0, 1))
    method, inputs = qkv.method("minilm", version=1, pairs=("qk",)), batch((7, 7), 7)
    method.check(describe(teacher), describe(student))
    want = kl(own_maps(teacher, inputs), own_maps(student, inputs)).sum() / (2 * 4 * 7)
    assert gap(loss(method, teacher, student, inputs), want) < 1e-12


# -- reading a network -------------------------------------------------------------------------------------------


def heads(x: torch.Tensor, count: int) -> torch.Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def test_projections_are_read_before_rotation_and_attention_after() -> None:
    model, inputs = llama(), batch()
    got = read(model, Needs(projections=(1,), attention=(1,), hidden=(0, 1, 3), logits=True), inputs)
    states = model(**inputs, output_hidden_states=True, use_cache=False)
    x = model.model.layers[1].input_layernorm(states.hidden_states[1])
    own = model.model.layers[1].self_attn
    before, after = got.projections[1], got.attention[1]
    assert torch.allclose(before.q, heads(own.q_proj(x), 4), atol=1e-12)
    assert torch.allclose(before.k, heads(own.k_proj(x), 2), atol=1e-12) and before.v.shape == (3, 2, 7, 6)
    assert torch.allclose(after.v, before.v) and not torch.allclose(after.q, before.q)
    assert torch.allclose(after.q.norm(dim=-1), before.q.norm(dim=-1))
    assert torch.equal(got.hidden[1], states.hidden_states[1]) and torch.equal(got.logits, states.logits)
    assert before.scale == after.scale == 6**-0.5


@pytest.mark.parametrize(
    ("kind", "more"),
    [((Qwen3ForCausalLM, Qwen3Config), {}), ((Gemma3ForCausalLM, Gemma3TextConfig), {"query_pre_attn_scalar": 5})],
)
@pytest.mark.parametrize("n", [4, 7, 2])  # as many tokens as query heads, neither, as many as key heads
def test_norms_of_queries_and_keys_are_part_of_what_is_read(kind: Any, more: dict[str, Any], n: int) -> None:
    """After the norm, before the rotation: norms agree with what the attention sees, and position 0 is not rotated."""
    model = llama(2, kind=kind, **more)
    got = read(model, Needs(projections=(1,), attention=(1,)), batch((n, n), n))
    before, after = got.projections[1], got.attention[1]
    assert before.q.shape == after.q.shape == (2, 4, n, 6) and before.k.shape == after.k.shape == (2, 2, n, 6)
    for x, y in ((before.q, after.q), (before.k, after.k)):
        assert torch.allclose(x[:, :, 0], y[:, :, 0], atol=1e-6) and torch.allclose(
            x.norm(dim=-1), y.norm(dim=-1), atol=1e-6
        )


def test_fused_projections() -> None:
    sizes = {"vocab_size": VOCABULARY, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 32}
    model, inputs = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).double().eval(), batch()
    got = read(model, Needs(projections=(0,)), inputs).projections[0]
    x = model.transformer.h[0].ln_1(model(**inputs, output_hidden_states=True).hidden_states[0])
    q, k, v = model.transformer.h[0].attn.c_attn(x).split(24, -1)
    assert all(torch.allclose(a, heads(b, 4)) for a, b in zip((got.q, got.k, got.v), (q, k, v), strict=True))
    neox = GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, num_hidden_layers=2))
    with pytest.raises(Refused, match="after_rope=True"):
        Tap(neox, describe(neox), Needs(projections=(1,)), learns=False)
    assert read(neox, Needs(attention=(1,)), inputs).attention[1].q.shape == (3, 4, 7, 6)


def test_images_have_real_tokens_only() -> None:
    config = ViTConfig(
        hidden_size=24, intermediate_size=29, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4
    )
    model = ViTModel(config).double().eval()
    inputs = {"pixel_values": draw(2, 3, 8, 8)}
    got = read(model, Needs(projections=(1,)), inputs)
    assert got.real.shape == (2, 5) and got.real.all() and describe(model).vocabulary is None
    method = qkv.method("minilm", relation_heads=12)
    assert gap(loss(method, model, copy.deepcopy(model), inputs), 0) < 1e-12


@pytest.mark.parametrize("after_rope", [False, True])
def test_reading_changes_no_bit_and_leaves_nothing_behind(after_rope: bool) -> None:
    model, inputs = bert(attention_probs_dropout_prob=0.3), batch()
    model(**inputs, output_hidden_states=True)  # transformers puts hooks of its own on a model that is asked for these
    model.train()
    before = {n: len(m._forward_hooks) for n, m in model.named_modules()}
    kind = "attention" if after_rope else "projections"
    torch.manual_seed(0)
    want = model(**inputs).last_hidden_state
    torch.manual_seed(0)
    with Tap(model, describe(model), Needs(**{kind: (1,)}, hidden=(3,)), learns=True) as tap:
        got = tap(inputs)
    assert torch.equal(got.hidden[3], want) or (after_rope and torch.allclose(got.hidden[3], want, rtol=1e-12))
    assert getattr(got, kind)[1].q.requires_grad and model.training
    assert before == {n: len(m._forward_hooks) for n, m in model.named_modules()}
    assert model.config._attn_implementation == "sdpa"
    with Tap(model, describe(model), Needs(**{kind: (1,)}), learns=False) as tap:
        first, second = tap(inputs), tap(inputs)
    assert torch.equal(getattr(first, kind)[1].v, getattr(second, kind)[1].v), "a teacher is read in eval mode"
    assert model.training and not getattr(first, kind)[1].q.requires_grad


@pytest.mark.parametrize("after_rope", [False, True])
def test_gradient_checkpointing_gives_the_same_gradient(after_rope: bool) -> None:
    method, gradients = qkv.method("minilm", relation_heads=12, after_rope=after_rope), []
    for recompute in (False, True):
        student = llama(3, seed=1).train()
        if recompute:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        net, teacher = describe(student), llama(3)
        needs = method.needs(describe(teacher), net)
        with Tap(student, net, needs[1], learns=True) as tap:
            taught = read(teacher, needs[0], batch())
            method(taught, tap(batch()), batch()).total.backward()
        gradients.append({n: p.grad for n, p in student.named_parameters()})
    for name, want in gradients[0].items():
        got = gradients[1][name]
        assert (got is None) == (want is None) and (
            want is None or torch.allclose(got, want, rtol=1e-10, atol=1e-14)
        ), name


def test_bad_batches_and_layers() -> None:
    model, needs = bert(), Needs(projections=(0,))
    with pytest.raises(InvalidInput, match=r"attention_mask must be \[B, N\]"):
        real_tokens({"attention_mask": torch.ones(2, 1, 3, 3)})
    with pytest.raises(InvalidInput, match="needs input_ids"):
        real_tokens({"labels": torch.ones(2)})
    with pytest.raises(Refused, match="hidden states 0 to 3"):
        Tap(model, describe(model), Needs(hidden=(4,)), learns=False)
    a = read(model, needs, batch())
    method = qkv.method("minilm", relation_heads=12, teacher_layer=0, student_layer=0)
    with pytest.raises(InvalidInput, match="must see the same tokens"):
        method(a, read(model, needs, batch((7, 3, 5))))
    frozen = copy.deepcopy(model)
    for n, p in frozen.named_parameters():
        p.requires_grad_("layer.2" in n)
    with pytest.raises(InvalidInput, match="carries no gradient"):
        read(frozen, needs, batch(), learns=True)
    net = describe(model)
    with Tap(model, net, needs, learns=False) as tap:
        model.encoder.layer[0].attention.self.query.forward = lambda x: x
        assert tap(batch()).projections[0].q.shape == (3, 4, 7, 6)
    skipped = bert()
    with Tap(skipped, describe(skipped), Needs(projections=(2,)), learns=False) as tap:
        skipped.encoder.layer = skipped.encoder.layer[:2]
        with pytest.raises(NeverFired, match="layer 2 were not seen"):
            tap(batch())


def test_traces_detach_everything() -> None:
    x = draw(1, 2, 3, 4, grad=True) * 1
    p = Projections(x, x, x, 0.5)
    trace = Trace(describe(bert()), torch.ones(1, 3, dtype=torch.bool), {0: p}, {1: p}, {2: x}, x).detach()
    found = [trace.projections[0].q, trace.attention[1].v, trace.hidden[2], trace.logits]
    assert all(isinstance(t, torch.Tensor) and not t.requires_grad for t in found)
