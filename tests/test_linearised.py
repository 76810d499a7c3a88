"""Linearised attention against its definitions: both methods, the shared layer, its memory, and its training."""

from __future__ import annotations

import copy
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import qkv
from qkv import hosts
from qkv.convert import lizard, lolcats
from qkv.convert._common.linearise import Linearisation, in_place, updated
from qkv.convert._common.training import Keeper
from qkv.core.cache import Step
from qkv.core.conversion import Lessons
from qkv.core.errors import InvalidInput, InvalidParameter, Refused, SavedDataError, StateError, TrainingError
from qkv.layers._linearised import LinearisedProjections, LinearisedShape, Tokens, near, packed, softmax_features
from qkv.layers._linearised_memory import LinearisedMemory
from qkv.testing.conversions import logits, source

F64 = torch.float64
B, T, H, G, D, E, K, W = 2, 37, 6, 2, 8, 8, 5, 7
CUTS = ([T], [1] * T, [5, 19, 1, 1, 11], [29, 8], [3, 2, *[1] * 5, 27])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def layer(**changes: Any) -> LinearisedProjections:
    sizes: dict[str, Any] = {
        "width": 20, "heads": H, "kv_heads": G, "head_dim": D, "value_dim": E, "scale": D**-0.5, "window": W, "feature_dim": K,
    }  # fmt: skip
    out = LinearisedProjections(LinearisedShape(**(sizes | changes)), dtype=F64)
    for i, p in enumerate(out.parameters()):
        p.data = 0.5 * draw(*p.shape, seed=i)
    return out


def read(module: LinearisedProjections, tokens: int = T) -> Tokens:
    angle = torch.arange(tokens, dtype=F64)[None, :, None] * (0.3 ** torch.arange(D // 2, dtype=F64)).repeat(2)
    return module.read(draw(B, tokens, 20, seed=99), angle.cos(), angle.sin())


def definition(module: LinearisedProjections, t: Tokens) -> Tensor:
    """What `lizard.reference` says of the layer's tokens."""
    gate = torch.zeros_like(t.v[..., :1]) if t.gate is None else t.gate
    share = torch.ones(H, dtype=F64) if module.share is None else module.share.sigmoid()
    return lizard.reference(
        t.q, t.k, t.v, t.features, module.key_features(t.source), gate, window=module.shape.window, scale=module.shape.scale,
        share=share, meta=t.meta, meta_values=module.meta_values, combine=module.shape.combine,
    )  # fmt: skip


KINDS = [
    {"gate": gate, "combine": combine, "num_meta": m, "window": w}
    for gate, combine, m, w in (
        ("none", "joint", 0, W), ("none", "sum", 2, W), ("scalar", "joint", 0, W), ("scalar", "joint", 3, W),
        ("scalar", "joint", 2, 1),
        ("scalar", "joint", 0, 64), ("scalar", "joint", 2, 64), ("scalar", "sum", 3, W), ("scalar", "sum", 0, 64),
        ("feature", "joint", 3, W), ("feature", "sum", 0, W),
    )
]  # fmt: skip


def closely(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


# -- forms ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_chunks_and_steps_are_the_definition(kind: dict[str, Any]) -> None:
    module = layer(**kind)
    t = read(module)
    want = definition(module, t)
    closely(module.mix(t)[0], want)
    q, k = packed(t, module.shape)
    place = torch.arange(T).expand(B, T)
    for cuts in CUTS:
        memory, at, outs = LinearisedMemory(module), 0, []
        for n in cuts:
            step = Step(place[:, at : at + n], module.shape.scale)
            outs.append(memory.attend(q[:, :, at : at + n], k[:, :, at : at + n], t.v[:, :, at : at + n], step))
            at += n
        closely(torch.cat(outs, 2), want)


@torch.no_grad()
@pytest.mark.parametrize("gate", [-20.0, -80.0, -1e-6])
def test_gates_of_any_strength(gate: float) -> None:
    module = layer(gate="scalar")
    t = read(module, 400)._replace(gate=torch.where(draw(B, G, 400, 1) > 0, gate, -0.01).to(F64))
    closely(module.mix(t)[0], definition(module, t))


def test_gradients_are_those_of_the_definition() -> None:
    module = layer(gate="scalar", num_meta=2)
    t = read(module)
    names = dict(module.named_parameters())
    grads = [
        torch.autograd.grad(f.square().sum(), [p for n, p in names.items() if "o_proj" not in n], retain_graph=True)
        for f in (module.mix(t)[0], definition(module, t))
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
        assert bool((b != 0).any())


# -- oracles ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_open_gates_on_rotated_features_are_lolcats() -> None:
    module = layer(gate="scalar", feature_rope=True)
    t = read(module)
    t = t._replace(gate=torch.zeros_like(t.gate))  # type: ignore[arg-type]
    assert module.share is not None
    features = module.key_features(t.source)
    want = lolcats.reference(
        t.q, t.k, t.v, t.features, features, window=W, scale=module.shape.scale, share=module.share.sigmoid()
    )
    closely(module.mix(t)[0], want)
    closely(t.source, t.k)


@torch.no_grad()
@pytest.mark.parametrize(("combine", "total"), [("joint", 1.0), ("sum", 2.0)])
def test_every_token_counts_once(combine: str, total: float) -> None:
    """With values of 1 a part gives 1: the joint form counts each token in one part, the sum in both."""
    module = layer(gate="scalar", combine=combine)
    t = read(module)
    ones = t._replace(v=torch.ones_like(t.v))
    closely(module.mix(ones)[0], torch.full((B, H, T, E), total, dtype=F64))
    q, k = packed(ones, module.shape)
    memory = LinearisedMemory(module)
    for i in range(T):
        at = slice(i, i + 1)
        out = memory.attend(q[:, :, at], k[:, :, at], ones.v[:, :, at], Step(torch.full((B, 1), i), 1.0))
        closely(out, torch.full((B, H, 1, E), total, dtype=F64))


@torch.no_grad()
def test_learned_pairs_out_of_reach_are_none() -> None:
    module, bare = layer(num_meta=3), layer()
    bare.load_state_dict({k: v for k, v in module.state_dict().items() if not k.startswith("meta")})
    t = read(module)
    closely(module.mix(t._replace(meta=torch.full_like(t.meta, -1e9)))[0], bare.mix(read(bare))[0])  # type: ignore[arg-type]


@torch.no_grad()
def test_the_shift_is_part_of_the_definition() -> None:
    """A constant on all scores changes nothing (the maximum moves along); a shift of the linear side alone would."""
    module = layer()
    t = read(module)
    num, total = near(t.q, t.k, t.v, window=W, scale=1.0, real=None, meta=None, meta_values=None)
    longer = [torch.cat((x, torch.full_like(x[..., :1], c)), -1) for x, c in ((t.q, 1.0), (t.k, 300.0))]
    again = near(*longer, t.v, window=W, scale=1.0, real=None, meta=None, meta_values=None)
    torch.testing.assert_close(again[0], num, rtol=0, atol=1e-9)
    torch.testing.assert_close(again[1], total, rtol=0, atol=1e-9)
    assert bool((total >= 1).all())
    part = torch.cat((num, total), -1)
    assert (module.combined(num, total, part) - module.combined(num, total, 2 * part)).abs().max() < 1e-9
    other = torch.cat((num.flip(2), total), -1)
    assert (module.combined(num, total, other) - module.combined(num, total, 2 * other)).abs().max() > 1e-3


def test_features_are_two_softmaxes() -> None:
    x, w = draw(B, H, T, D), draw(H, D, K, seed=1)
    y = softmax_features(x, w)
    closely(y[..., :K].sum(-1), torch.ones(B, H, T, dtype=F64))
    closely(y[0, 2, 3, K:], (-(x[0, 2, 3] @ w[2])).softmax(-1))


@torch.no_grad()
def test_shut_gates_are_the_window_alone() -> None:
    """The negative control: nothing beyond the window is seen."""
    model, ids = source(), torch.randint(1, 61, (2, 40), generator=torch.Generator().manual_seed(0))
    with qkv.applied(model, "sliding-window:window=6,sinks=0"):
        want = model(ids, use_cache=False).logits
    shut = qkv.method("lizard", window=6, num_meta=0, gate_bias=-80.0, transfer=0, tune=0)
    with qkv.applied(model, shut, data=[{"input_ids": ids}]):
        torch.testing.assert_close(model(ids, use_cache=False).logits, want, rtol=0, atol=1e-10)


# -- memory -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_hundreds_of_steps_take_no_memory() -> None:
    module = layer(gate="scalar", num_meta=2)
    t = read(module)
    q, k = packed(t, module.shape)
    memory, held = LinearisedMemory(module), set()
    for i in range(600):
        at = slice(i % T, i % T + 1)
        out = memory.attend(q[:, :, at], k[:, :, at], t.v[:, :, at], Step(torch.full((B, 1), i), 1.0))
        if i % 37 == 0:
            held.add((memory.bytes(), *(x.data_ptr() for x in memory.buffers())))
    assert len(held) == 1 and bool(torch.isfinite(out).all())
    s = module.shape
    assert memory.bytes() == 8 * B * G * (2 * K * (E + 1) + W * (2 * D + E) + W * s.gates) + 4 * B * W
    assert (memory.kept(), memory.seen) == (W, 600)


def test_memory_refuses_what_it_cannot_do() -> None:
    module = layer()
    t = read(module)
    q, k = packed(t, module.shape)
    memory, place = LinearisedMemory(module), torch.arange(T).expand(B, T)
    with pytest.raises(StateError, match="empty"):
        memory.positions()
    hole = torch.ones(B, T, dtype=torch.bool)
    hole[1, 20] = False
    with pytest.raises(Refused, match="pad on the left"):
        memory.attend(q, k, t.v, Step(place, 1.0, hole))
    with pytest.raises(Refused, match="takes padding only"):
        memory.attend(q, k, t.v, Step(place, 1.0, None, torch.ones(B, 1, T, T, dtype=torch.bool)))
    memory.attend(q, k, t.v, Step(place, 1.0))
    with pytest.raises(StateError, match="recurrent state"):
        memory.crop(1)
    other = LinearisedMemory(layer(window=W + 2))
    with pytest.raises(StateError, match="does not fit"):
        LinearisedMemory(layer(kv_heads=3)).restore(memory.tensors())
    other.restore(memory.tensors())  # a smaller ring is one that has not grown yet
    twin = LinearisedMemory(module)
    twin.restore(memory.tensors())
    assert twin.seen == T and torch.equal(twin.positions(), memory.positions())


# -- the converted model ----------------------------------------------------------------------------------------------


TINY = {"window": 6, "feature_dim": 4, "transfer": 1, "tune": 0}


def text(rows: int = 2, length: int = 24, batches: int = 3) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(5)
    return [{"input_ids": torch.randint(1, 61, (rows, length), generator=g)} for _ in range(batches)]


def test_a_filled_cache_is_saved_and_asked_again(tmp_path: Path) -> None:
    model, ids = source(), text()[0]["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    more = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    with qkv.applied(model, qkv.method("lizard", **TINY), data=text()):
        with torch.no_grad():
            place = (mask.cumsum(-1) - 1).clamp(min=0)[:, :17]
            cache = model(ids[:, :17], attention_mask=mask[:, :17], position_ids=place).past_key_values
        hosts.save_cache(model, cache, tmp_path / "c", ids[:, :17])
        saved = hosts.load_cache(model, tmp_path / "c")
        got = model.generate(ids, attention_mask=mask, past_key_values=saved.cache, **more)
        assert torch.equal(got, model.generate(ids, attention_mask=mask, use_cache=False, **more))
    with qkv.applied(model, qkv.method("lizard", **TINY | {"window": 9}), data=text()), pytest.raises(SavedDataError):
        hosts.load_cache(model, tmp_path / "c")


def test_other_methods_are_refused_at_its_sites() -> None:
    model = source()
    qkv.apply(model, qkv.method("lizard", **TINY), data=text())
    for other in ("full", "sliding-window:window=4", "window:budget=4", "linear", "lolcats"):
        with pytest.raises(Refused):
            qkv.apply(model, other, data=text() if other == "lolcats" else None)
    model(**text()[0])
    assert qkv.report(model).calls == 2
    qkv.revert(model)


def test_masks_that_are_not_padding_are_refused() -> None:
    model = source()
    batch = text()[0]
    with qkv.applied(model, qkv.method("lolcats", **TINY), data=text()), torch.no_grad():
        hole = torch.ones(2, 24, dtype=torch.long)
        hole[0, 7] = 0
        with pytest.raises(Refused, match="left or on the right"):
            model(**batch, attention_mask=hole, use_cache=False)
        with pytest.raises(Refused, match="pad on the left"):
            model(**batch, attention_mask=hole)
        packed_mask = torch.ones(24, 24, dtype=torch.bool).tril()
        packed_mask[12:, :12] = False
        with pytest.raises(Refused, match="padding only"):
            model(**batch, attention_mask=packed_mask.expand(2, 1, 24, 24), use_cache=False)
        right = torch.ones(2, 24, dtype=torch.long)
        right[1, 15:] = 0
        got = model(**batch, attention_mask=right, use_cache=False).logits[1, :15]
        torch.testing.assert_close(got, model(batch["input_ids"][1:, :15]).logits[0], rtol=0, atol=1e-10)


def test_parameters_out_of_range_say_so() -> None:
    for setting in (
        "lizard:window=0",
        "lizard:gate=none",
        "lizard:gate_bias=99",
        "lolcats:feature_dim=0",
        "lolcats:rate=-1",
    ):
        with pytest.raises(InvalidParameter):
            qkv.method(setting)
    model = source()
    model.config.attention_dropout = 0.1
    for block in model.model.layers:
        block.self_attn.attention_dropout = 0.1
    with pytest.raises(Refused, match="dropout"):
        qkv.apply(model, "lolcats", data=text())


# -- training ---------------------------------------------------------------------------------------------------------


def test_low_rank_updates_begin_at_nothing_and_are_merged() -> None:
    model, data = source(), text()
    method = qkv.method("lolcats", **TINY)
    with qkv.applied(model, method, data=data):
        layers = {s.name: model.get_submodule(s.name) for s in qkv.sites(model)}
        before = logits(model, data[0])
        with in_place(model, layers), updated(layers, 3, 6.0, 0) as new:
            torch.testing.assert_close(logits(model, data[0]), before, rtol=0, atol=0)
            with torch.no_grad():
                for name, p in new.items():
                    p.add_(0.05 * draw(*p.shape, seed=len(name)))
            during = logits(model, data[0])
        assert (during - before).abs().max() > 1e-3
        torch.testing.assert_close(logits(model, data[0]), during, rtol=0, atol=1e-10)
        with pytest.raises(ZeroDivisionError), updated(layers, 3, 6.0, 0):
            raise ZeroDivisionError
        torch.testing.assert_close(logits(model, data[0]), during, rtol=0, atol=1e-10)


def test_fine_tuning_teaches_what_was_added_also_to_layers_that_stand_in_the_model() -> None:
    model, data = source(), text()
    method = qkv.method("lolcats", **TINY | {"transfer": 0, "tune": 0})
    with qkv.applied(model, method, data=data):
        layers = {s.name: model.get_submodule(s.name) for s in qkv.sites(model)}
        before = {n: p.detach().clone() for layer in layers.values() for n, p in layer.added().items()}
        method.replace(tune=1, tune_rate=1e-2).fine_tune(model, layers, data, Keeper(data, ("tune",), {}))
        after = {n: p for layer in layers.values() for n, p in layer.added().items()}
        assert not any(torch.equal(after[n], x) for n, x in before.items())


@pytest.mark.parametrize("name", ["lizard", "lolcats"])
def test_both_stages_lower_their_losses_and_leave_the_source(name: str) -> None:
    model, data, seen = source(scale=0.12), text(), []
    before = {n: x.clone() for n, x in model.state_dict().items()}
    method = qkv.method(name, window=4, feature_dim=8, transfer=3, tune=3, tune_rate=5e-3)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    qkv.apply(model, method, data=Lessons(batches=data, progress=lambda *x: seen.append(x)))
    losses = {
        stage: [float(n.rpartition(" ")[2]) for _, _, n in seen if n.startswith(stage)]
        for stage in ("transfer", "tune")
    }
    for stage, values in losses.items():
        assert len(values) == 9 and sum(values[-3:]) < 0.97 * sum(values[:3]), stage
    qkv.revert(model)
    assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())


class Stop(Exception):
    """Cuts a training off."""


@pytest.mark.parametrize("cut", [3, 9])
def test_a_training_that_was_cut_off_goes_on_bit_for_bit(cut: int, tmp_path: Path) -> None:
    method: Any = qkv.method("lizard", window=5, feature_dim=3, num_meta=2, transfer=2, tune=2, lora_rank=2)
    data, whole, model = text(), source(), source()
    qkv.apply(whole, method, data=data)
    steps: list[str] = []

    def stop(done: int, total: int, note: str) -> None:
        steps.append(note)
        if len(steps) == cut:
            raise Stop

    folder = tmp_path / "training"
    with pytest.raises(Stop):
        qkv.apply(model, method, data=Lessons(batches=data, folder=folder, save_every=2, progress=stop))
    assert not hasattr(model, "_qkv")
    with pytest.raises(TrainingError, match="another method"):
        qkv.apply(model, method.replace(tune_rate=1e-3), data=Lessons(batches=data, folder=folder))
    with pytest.raises(TrainingError, match="another data"):
        qkv.apply(model, method, data=Lessons(batches=data[::-1], folder=folder))
    again: list[str] = []
    qkv.apply(model, method, data=Lessons(batches=data, folder=folder, progress=lambda *x: again.append(x[2])))
    assert len(again) < 12
    for name, x in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], x), name
    twin, done = source(), []
    qkv.apply(twin, method, data=Lessons(batches=data, folder=folder, progress=lambda *x: done.append(x)))
    assert not done and all(torch.equal(twin.state_dict()[n], x) for n, x in whole.state_dict().items())


@pytest.mark.parametrize("cut", [2, 4, 5])
def test_ctrl_c_ends_it_after_its_step_also_where_a_stage_ends(cut: int, tmp_path: Path) -> None:
    """Two passes over two batches a stage: the fourth step is the transfer's last, and fine-tuning must not begin."""
    method: Any = qkv.method("lizard", window=5, feature_dim=3, num_meta=2, transfer=2, tune=2, lora_rank=2)
    data, whole, model = text()[:2], source(), source()
    qkv.apply(whole, method, data=data)
    steps: list[str] = []

    def press(done: int, total: int, note: str) -> None:
        steps.append(note)
        if len(steps) == cut:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match=f"stopped after step {(cut - 1) % 4 + 1} of 4"):
        qkv.apply(model, method, data=Lessons(batches=data, folder=tmp_path / "training", progress=press))
    assert len(steps) == cut and not hasattr(model, "_qkv")
    qkv.apply(model, method, data=Lessons(batches=data, folder=tmp_path / "training"))
    for name, x in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], x), name


def test_tokens_of_another_vocabulary_are_refused() -> None:
    data = text()[:2]
    for shift in (10_000, -10_000):
        other = [data[0], data[1] | {"input_ids": data[1]["input_ids"] + shift}]
        for name in ("lizard:transfer=1,tune=0", "transmla:kv_rank=8,rope_dim=4"):
            with pytest.raises(InvalidInput, match="batch 1: input_ids run from"):
                qkv.apply(source(), name, data=other)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    model = source()
    method = qkv.method("lolcats", **TINY)
    with qkv.applied(model, method, data=text()):
        qkv.save(model, tmp_path / "saved")
    with pytest.raises(SavedDataError, match="no training"):
        qkv.apply(model, method, data=Lessons(batches=text(), folder=tmp_path / "saved"))


def test_diverging_training_says_so() -> None:
    model: Any = source()
    with torch.no_grad():
        copied = copy.deepcopy(model)
        copied.model.layers[1].self_attn.v_proj.weight[0, 0] = float("nan")
    method: Linearisation = qkv.method("lolcats", **TINY)  # type: ignore[assignment]
    with pytest.raises((TrainingError, Refused)):
        qkv.apply(copied, method, data=text())
    assert not hasattr(copied, "_qkv")


# -- on a GPU ---------------------------------------------------------------------------------------------------------

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize("gate", ["none", "scalar", "feature"])
def test_the_kernel_is_the_definition(gate: Any) -> None:
    """Float32 on the device, forward and backward, against float64 on the CPU."""
    exact, fast = layer(gate=gate, num_meta=2, feature_dim=16), layer(gate=gate, num_meta=2, feature_dim=16)
    fast = fast.float().cuda()
    angle = torch.arange(300, dtype=F64)[None, :, None] * (0.3 ** torch.arange(D // 2, dtype=F64)).repeat(2)
    given = draw(B, 300, 20, seed=99), angle.cos(), angle.sin()
    want = definition(exact, exact.read(*given))
    got = fast.mix(fast.read(*(x.float().cuda() for x in given)))[0]
    torch.testing.assert_close(got.double().cpu(), want, rtol=1e-3, atol=1e-3)
    for x in (want, got):
        x.square().mean().backward()
    for (name, p), q in zip(exact.named_parameters(), fast.parameters(), strict=True):
        if p.grad is not None and q.grad is not None:
            torch.testing.assert_close(
                q.grad.double().cpu(), p.grad, rtol=1e-2, atol=1e-3 * float(p.grad.abs().max()), msg=name
            )


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize("name", ["lizard", "lolcats"])
def test_a_captured_step_is_the_plain_step(name: str) -> None:
    model = source().float().cuda()
    data = [{"input_ids": x["input_ids"].cuda()} for x in text()]
    mask = torch.ones_like(data[0]["input_ids"])
    mask[0, :9] = 0
    more = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    found = []
    for graph in (False, True):
        with qkv.applied(model, qkv.method(name, **TINY), data=data, graph=graph):
            found.append(model.generate(data[0]["input_ids"], attention_mask=mask, **more))
            assert not graph or model.__dict__["_qkv"].graph.replays >= 30
    assert torch.equal(*found)
