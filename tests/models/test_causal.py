"""The causal LM: its laws with every operator, hybrids, generation, folders, training and what it refuses."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

import qkv
from qkv.bench.fitting import fit
from qkv.bench.texts import held_out, pairs, random_windows
from qkv.core import registry
from qkv.core.errors import (
    InvalidInput,
    InvalidParameter,
    QKVError,
    Refused,
    SavedDataError,
    StateError,
    TrainingError,
    UnknownName,
)
from qkv.core.state import State
from qkv.distill import train
from qkv.layers import _mixer as mixing
from qkv.layers import base_conv
from qkv.layers._mixer import Mixer, Window, check_mixing
from qkv.layers.base_conv import reference
from qkv.models import saved_kind
from qkv.models.language.causal import CausalConfig, CausalLM
from qkv.models.language.generating import generate, prefill, stream
from qkv.models.language.published import based

torch.set_num_threads(1)
VOCABULARY, N = 19, 13
HYBRIDS = (
    ("gla", "full"),
    ("sliding-window:window=3,sinks=2", "lightning", "sliding-window:window=5,sinks=0"),
    ("based", "sliding-window:window=4,sinks=0", "gla:chunk_size=4,sub_chunk=2"),
    ("longvq:block_size=2", "miras:chunk_size=4"),
    ("miras:loss=lp,retention=norm,chunk_size=3", "miras:loss=l2,retention=softmax,chunk_size=2"),
    ("base-conv", "based", "sliding-window:window=3,sinks=0"),
    ("base-conv:kernel=5,expand=3",),
    ("vq-gated-attention:heads=2,key_width=4,codebook_size=3,block_size=2,ssm_states=3", "base-conv"),
)


def _causal(name: str) -> bool:
    try:
        check_mixing(registry.method(name), causal=True)
    except Refused:
        return False
    return True


SINGLE = tuple((s.id,) for s in qkv.methods(kind="operator") if _causal(s.id))
GROUPED = tuple(x for x in SINGLE if registry.method(x[0]).spec.gqa) + HYBRIDS[1:3] + HYBRIDS[5:6]
EVERY = pytest.mark.parametrize("operators", SINGLE + HYBRIDS, ids=" ".join)


def config(operators: Any = ("gla",), **more: Any) -> CausalConfig:
    return CausalConfig(operators=operators, **({"width": 16, "heads": 2, "vocabulary": VOCABULARY} | more))


def model(operators: Any = ("gla",), seed: int = 0, **more: Any) -> CausalLM:
    return CausalLM(config(operators, **more), seed).double().eval()


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-9, atol=1e-10)


# -- laws of the model, for every operator


@EVERY
@torch.no_grad()
def test_prefill_and_steps_are_the_whole(operators: Any, **more: Any) -> None:
    net, ids = model(operators, **more), tokens(2, N)
    whole = net(ids).logits
    out = net(ids[:, :4], keep=True)
    parts = [out.logits]
    for stop in (9, *range(10, N + 1)):  # a piece, then single tokens
        out = net(ids[:, out.state.seen : stop], state=out.state, keep=True)
        parts.append(out.logits)
    assert close(torch.cat(parts, 1), whole)
    assert out.state.seen == N


@EVERY
@torch.no_grad()
def test_a_padded_row_is_the_row_alone(operators: Any, **more: Any) -> None:
    net, ids, new = model(operators, **more), tokens(2, N), tokens(2, 3, seed=1)
    real = torch.ones(2, N, dtype=torch.bool)
    real[0, :5] = False
    both, alone = net(ids, padding=real, keep=True), net(ids[:1, 5:], keep=True)
    assert close(both.logits[:1, 5:], alone.logits)
    assert close(both.logits[1:], net(ids[1:]).logits)
    after = net(new, state=both.state, keep=True)
    assert close(after.logits[:1], net(new[:1], state=alone.state).logits)
    last = net(new[:, :1], state=after.state).logits[0]
    assert close(last, net(torch.cat((ids[:1, 5:], new[:1], new[:1, :1]), 1)).logits[0, -1:])


@EVERY
@torch.no_grad()
def test_no_token_sees_a_later_one_and_rows_do_not_meet(operators: Any) -> None:
    net, ids = model(operators), tokens(2, N)
    other = ids.clone()
    other[0, 8:] = (other[0, 8:] + 1) % VOCABULARY
    a, b = net(ids).logits, net(other).logits
    assert close(a[0, :8], b[0, :8]) and not close(a[0, 8:], b[0, 8:])
    assert close(a[1], b[1])


@EVERY
@torch.no_grad()
def test_states_are_indexed_by_rows_and_are_values(operators: Any, **more: Any) -> None:
    net, ids, new = model(operators, **more), tokens(3, 6), tokens(1, 1, seed=2)
    state = net(ids, keep=True).state
    before = {n: x.clone() for n, x in state.tensors.items()}
    rows = torch.tensor([2, 0, 0, 1])
    got = net(new.expand(4, 1), state=state.index(rows)).logits
    assert close(got, net(new.expand(3, 1), state=state).logits[rows])
    assert all(torch.equal(before[n], x) for n, x in state.tensors.items())


@EVERY
def test_everything_that_is_trained_gets_a_gradient(operators: Any) -> None:
    net = model(operators)
    net(tokens(2, 140)).logits.square().mean().backward()  # longer than the exact part of any operator
    still = [n for n, p in net.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    assert not still


@EVERY
def test_a_folder_gives_the_same_model(operators: Any, tmp_path: Any) -> None:
    net, ids = model(operators), tokens(2, N)
    net.save_pretrained(tmp_path / "m", note="kept")
    assert saved_kind(tmp_path / "m") == "causal-lm"
    loaded = CausalLM.from_pretrained(tmp_path / "m", config=net.config)
    assert loaded.config == net.config and torch.equal(loaded(ids).logits, net(ids).logits)
    assert json.loads((tmp_path / "m" / "qkv.json").read_text())["notes"] == {"note": "kept"}


@pytest.mark.parametrize("operators", SINGLE + HYBRIDS[:2], ids=" ".join)
@torch.no_grad()
def test_bfloat16_autocast_stays_near_float32(operators: Any) -> None:
    net, ids = CausalLM(config(operators, width=32), 0), tokens(2, 24)
    with torch.autocast("cpu", torch.bfloat16):
        low = net(ids, keep=True)
        step = net(ids[:, :1], state=low.state).logits
    high = net(ids, keep=True)
    want = net(ids[:, :1], state=high.state).logits
    for a, b in ((low.logits, high.logits), (step, want)):
        assert bool(torch.isfinite(a).all()) and float((a.float() - b).norm() / b.norm()) < 0.1


# -- fewer key/value heads than heads


def repeated(few: CausalLM, **more: Any) -> CausalLM:
    """The model with a key/value head for every head that computes the same: each one's weights written once a head."""
    many = model(few.config.methods, **more)
    held = few.state_dict()
    for name, want in many.state_dict().items():
        x = held[name]
        held[name] = x if x.shape == want.shape else x.unflatten(0, (2, -1)).repeat_interleave(2, 0).flatten(0, 1)
    many.load_state_dict(held)
    return many


@pytest.mark.parametrize("operators", GROUPED, ids=" ".join)
@torch.no_grad()
def test_a_group_reads_the_keys_and_values_of_its_head(operators: Any) -> None:
    few, ids = model(operators, heads=4, kv_heads=2), tokens(2, N)
    many = repeated(few, heads=4)
    assert close(few(ids).logits, many(ids).logits)
    assert CausalLM.count(few.config) < CausalLM.count(many.config)


@pytest.mark.parametrize("operators", GROUPED, ids=" ".join)
def test_grouped_heads_keep_the_laws_of_states(operators: Any) -> None:
    for law in (
        test_prefill_and_steps_are_the_whole,
        test_a_padded_row_is_the_row_alone,
        test_states_are_indexed_by_rows_and_are_values,
    ):
        law(operators, heads=4, kv_heads=1)


def test_keys_and_values_are_kept_once_a_group() -> None:
    def held(operators: tuple[str, ...], kv_heads: int) -> int:
        return model(operators, conv=0, kv_heads=kv_heads, heads=4)(tokens(1, 9), keep=True).state.bytes - 8

    assert 4 * (held(("full",), 1) - 9) == held(("full",), 0) - 9  # beside a flag a token
    ring = ("sliding-window:window=4,sinks=0",)
    assert 4 * (held(ring, 1) - 4 * 8) == held(ring, 0) - 4 * 8  # beside the slots' positions


# -- published layouts


def test_the_published_based_model() -> None:
    c = based(vocabulary=50257)
    assert [i for i, m in enumerate(c.methods) if m.id == "based"] == [1, 6, 11, 16, 21]
    assert sum(m.id == "base-conv" for m in c.methods) == 17
    assert CausalLM.count(c) - c.vocabulary * c.width == pytest.approx(360e6, rel=0.02)  # one matrix for both ends
    small = CausalLM(based(6, 16, 2, window=3, vocabulary=VOCABULARY)).double().eval()
    assert [len(b.mixer.state_dict()) for b in small.blocks][:3] == [4, 4, 4]
    with torch.no_grad():
        prompts = [[1, 2, 3, 4, 5, 6], [7]]
        got = generate(small, prompts, 5)
        assert got.tolist() == [by_hand(small, p, 5) for p in prompts]
    with pytest.raises(InvalidParameter, match="layers=0"):
        based(0)


@pytest.mark.parametrize("settings", [{}, {"kernel": 5, "expand": 1}, {"kernel": 14}], ids=str)
def test_a_gated_convolution_is_the_one_written_out(settings: dict[str, int]) -> None:
    built = qkv.method("base-conv", **settings).build(8, dtype=torch.float64)
    x = torch.randn(2, N, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert close(built(x)[0], reference(built, x))
    assert torch.autograd.gradcheck(lambda y: built(y)[0], x)
    out = built(x)[0][0, 7].sum()
    (seen,) = torch.autograd.grad(out, x)
    reach = settings.get("kernel", 3)
    assert [bool(g.any()) for g in seen[0]] == [7 - reach < t <= 7 for t in range(N)]


# -- memory


def test_decoding_memory_is_constant_but_for_softmax() -> None:
    def held(operators: tuple[str, ...], count: int) -> int:
        return model(operators)(tokens(1, count), keep=True).state.bytes

    for operators in (("gla",), ("sliding-window:window=4,sinks=1",), ("based", "sliding-window:window=4"), ("miras",)):
        assert held(operators, 3) == held(operators, 40)
    assert held(("gla", "full"), 40) - held(("gla", "full"), 39) == 2 * 16 * 8 + 1  # a key, a value, a flag


@torch.no_grad()
def test_a_window_reads_its_window_and_sinks_alone() -> None:
    net, ids = model(("sliding-window:window=3,sinks=1",), conv=0), tokens(1, 9)
    base = net(ids).logits[0, -1]
    for place in range(9):
        other = ids.clone()
        other[0, place] = (other[0, place] + 1) % VOCABULARY
        changed = not torch.equal(net(other).logits[0, -1], base)
        assert changed == (place in (0, 6, 7, 8))


@pytest.mark.parametrize("operators", [HYBRIDS[1]], ids=" ".join)
def test_long_prompts_meet_the_same_window(operators: Any, monkeypatch: Any) -> None:
    """Beyond `SHORT` tokens a window runs in chunks, without a mask of its own."""
    ids = tokens(2, N)
    written = model(operators)(ids).logits
    monkeypatch.setattr(mixing, "SHORT", 2)
    assert close(model(operators)(ids).logits, written)
    test_prefill_and_steps_are_the_whole(operators)
    test_a_padded_row_is_the_row_alone(operators)


def test_layers_know_where_they_stand() -> None:
    net = model(("lightning", "lightning", "lightning:layer=0,layers=9"))
    settings = [b.mixer.method.settings() for b in net.blocks]
    assert [(s["layer"], s["layers"]) for s in settings] == [(0, 3), (1, 3), (2, 9)]
    assert [m.layer for m in net.config.methods] == [0, 0, 0]  # the configuration stays as written


def test_key_width_is_the_operators_unless_given() -> None:
    assert model(("based",), width=64).blocks[0].mixer.place.key_width == 16
    assert model(("based",), width=64, key_width=4).blocks[0].mixer.place.key_width == 4
    assert model(("gla",), width=64).blocks[0].mixer.place.key_width == 32


@pytest.mark.parametrize("operators", [("gla",), ("full", "based"), ("miras",)], ids=" ".join)
def test_models_are_sized_alike(operators: Any) -> None:
    c = config(operators, width=32).fitted(40_000)
    unit = 3 * c.width * c.layers
    assert abs(CausalLM.count(c) - 40_000) <= unit / 2
    with pytest.raises(InvalidParameter, match="leave no room"):
        c.fitted(3000)


def test_a_seed_makes_the_weights_and_leaves_the_global_one_alone() -> None:
    assert all(torch.equal(a, b) for a, b in zip(model(seed=3).parameters(), model(seed=3).parameters(), strict=True))
    assert not torch.equal(model(seed=3).head.weight, model(seed=4).head.weight)


# -- generation


@torch.no_grad()
def by_hand(net: CausalLM, prompt: list[int], count: int) -> list[int]:
    text = list(prompt)
    for _ in range(count):
        text.append(int(net(torch.tensor([text])).logits[0, -1].argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize("operators", [("gla", "full"), HYBRIDS[1], HYBRIDS[3]], ids=" ".join)
def test_greedy_text_of_uneven_prompts(operators: Any) -> None:
    net, prompts = model(operators), [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 11]]
    got = generate(net, prompts, 6)
    assert got.tolist() == [by_hand(net, p, 6) for p in prompts]
    assert torch.equal(generate(net, prompts, 6, chunk=2), got)  # prompts read in pieces


@pytest.mark.parametrize("operators", [("gla", "full"), ("longvq:block_size=2", "miras:chunk_size=4")], ids=" ".join)
@torch.no_grad()
def test_beams_find_the_likeliest_text(operators: Any) -> None:
    net, prompts, length = model(operators, vocabulary=4), [[1, 2, 3], [0]], 3
    got = generate(net, prompts, length, beams=64)  # as many as texts of this length: nothing is lost
    for prompt, text in zip(prompts, got.tolist(), strict=True):
        scores = {}
        for option in itertools.product(range(4), repeat=length):
            logp = net(torch.tensor([[*prompt, *option]])).logits[0].log_softmax(-1)
            scores[option] = sum(float(logp[len(prompt) - 1 + i, t]) for i, t in enumerate(option))
        assert tuple(text) == max(scores, key=lambda k: scores[k])
    assert torch.equal(generate(net, prompts, length, beams=1), generate(net, prompts, length))


def test_a_beam_reads_its_own_state(monkeypatch: Any) -> None:
    """Negative control: states that are not reordered with their beams give another text."""
    net = model(("gla", "full"))
    right = [generate(net, [p.tolist()], 8, beams=5) for p in tokens(6, 4)]
    index = State.index
    monkeypatch.setattr(State, "index", lambda s, rows: s if len(rows) == len(s["0.position"]) else index(s, rows))
    wrong = [generate(net, [p.tolist()], 8, beams=5) for p in tokens(6, 4)]
    assert any(not torch.equal(a, b) for a, b in zip(right, wrong, strict=True))


def test_drawn_text() -> None:
    net, prompts = model(("gla",)), [[1, 2], [3, 4]]
    warm = generate(net, prompts, 12, temperature=5.0, seed=1)
    assert torch.equal(warm, generate(net, prompts, 12, temperature=5.0, seed=1))
    assert not torch.equal(warm, generate(net, prompts, 12, temperature=5.0, seed=2))
    assert torch.equal(generate(net, prompts, 5, temperature=5.0, top_k=1), generate(net, prompts, 5))


def test_text_goes_on_from_a_state() -> None:
    net = model(("gla", "sliding-window:window=3,sinks=0"))
    whole = generate(net, [[1, 2, 3]], 8)[0].tolist()
    steps = stream(net, [[1, 2, 3]])
    step = [next(steps) for _ in range(5)][-1]  # its state has read four of the five
    _, state = prefill(net, step.tokens[:, None], state=step.state)
    rest = stream(net, [[whole[5]]], state=state)
    assert [int(next(rest).tokens) for _ in range(2)] == whole[6:8]


# -- what is refused


@pytest.mark.parametrize(
    ("operators", "error", "says"),
    [
        (("hydra",), Refused, "bidirectional"),
        (("nala-block",), Refused, "is of kind layer"),
        (("base-conv:kernel=1",), InvalidParameter, "kernel"),
        (("h2o",), Refused, "is of kind cache"),
        (("glaa",), UnknownName, "gla"),
        (("gla:chunks=3",), UnknownName, "chunk_size"),
        ((), InvalidParameter, "one setting per layer"),
        ("gla", InvalidParameter, "one setting per layer"),
    ],
)
def test_layers_that_cannot_be(operators: Any, error: type[QKVError], says: str) -> None:
    with pytest.raises(error, match=says):
        config(operators)


@pytest.mark.parametrize(
    "more",
    [
        {"width": 15},
        {"heads": 0},
        {"kv_heads": 3},
        {"kv_heads": -1},
        {"kv_heads": True},
        {"kv_heads": 4},
        {"conv": 1},
        {"conv": -1},
        {"inner": True},
        {"vocabulary": 2.5},
        {"rope_base": 0},
    ],
)
def test_bad_numbers(more: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameter):
        config(**more)


def test_operators_without_groups_say_so() -> None:
    with pytest.raises(Refused, match=r"ecoformer needs as many key/value heads as heads; leave kv_heads out"):
        config(("gla", "ecoformer"), kv_heads=1)
    assert config(("ecoformer",), kv_heads=2).kv_heads == 2  # as many as heads
    with pytest.raises(InvalidParameter, match="kv_heads=3 must divide heads=2"):
        Mixer(registry.method("gla"), 8, 2, kv_heads=3)
    with pytest.raises(InvalidParameter, match="even"):
        registry.method("base-conv:expand=3").build(5)


def test_rotated_heads_are_even() -> None:
    with pytest.raises(InvalidParameter, match="odd"):
        model(("full",), width=6, heads=2)


def test_bad_tokens_and_padding() -> None:
    net, ids = model(), tokens(2, 4)
    for bad in (ids[0], ids.float(), ids[:, :0], ids + VOCABULARY, ids - VOCABULARY, [[1, 2]]):
        with pytest.raises(InvalidInput):
            net(bad)
    real = torch.tensor([[True, True, False, True], [True] * 4])
    for wrong in (real, ~real, real[:, :2], real.float()):
        with pytest.raises(InvalidInput, match="padd"):
            net(ids, padding=wrong)
    state = net(ids, keep=True).state
    with pytest.raises(InvalidInput, match="stands before"):
        net(ids, padding=torch.ones(2, 4, dtype=torch.bool), state=state)
    for call in ({"tokens": 0}, {"tokens": 2, "beams": 0}, {"tokens": 2, "temperature": -1.0}, {"tokens": 2, "chunk": 0},
                 {"tokens": 2, "beams": 2, "temperature": 1.0}):  # fmt: skip
        with pytest.raises(InvalidParameter):
            generate(net, ids, **call)
    for prompts in ([], [[]], [[1], []]):
        with pytest.raises(InvalidInput, match="prompts"):
            generate(net, prompts, 2)


def test_states_of_others_are_refused() -> None:
    ids = tokens(2, 4)
    state = model(("gla", "full"))(ids, keep=True).state
    with pytest.raises(StateError, match="causal-lm of full, gla"):
        model(("full", "gla"))(ids, state=state)
    with pytest.raises(StateError, match="shape"):
        model(("gla", "full"))(ids[:1], state=state)
    with pytest.raises(StateError):
        model(("gla", "full"), width=32)(ids, state=state)
    with pytest.raises(StateError, match=r"window=3,sinks=0 was given the state of .*window=9"):
        wide, narrow = (("sliding-window:window=9,sinks=0",), ("sliding-window:window=3,sinks=0",))
        model(narrow)(ids, state=model(wide)(ids, keep=True).state, keep=True)
    conv = model(("base-conv",))(ids, keep=True).state
    for other in (("base-conv:kernel=4",), ("base-conv:expand=2",)):
        with pytest.raises(StateError, match="was given the state of 'causal-lm of base-conv'"):
            model(other)(ids, state=conv)
    for softmax in (("full",), ("sliding-window:window=3,sinks=0",)):
        with pytest.raises(StateError, match=r"state 'k' has shape \(2, 2, [34], 8\), expected \(2, 1"):
            model(softmax, kv_heads=1)(ids, state=model(softmax)(ids, keep=True).state)
        with pytest.raises(StateError, match=r"shape|slots"):
            model(softmax)(ids, state=State(f"causal-lm of {softmax[0]}", {"0.position": torch.zeros(2)}))
    with pytest.raises(StateError, match="cannot be taken out"):
        state.crop(1)
    with pytest.raises(StateError, match="layer 1"):
        model(("gla", "full"))(ids, state=State(state.owner, {k: v for k, v in state.tensors.items() if k[0] == "0"}))


def test_a_bidirectional_mixer_keeps_no_state() -> None:
    mixer = Mixer(registry.method("flow"), 8, 2, causal=False, conv=0)
    with pytest.raises(Refused, match="no state"):
        mixer(torch.randn(1, 3, 8), keep=True)
    with pytest.raises(InvalidParameter, match="convolution is causal"):
        Mixer(registry.method("flow"), 8, 2, causal=False)


def test_damaged_and_foreign_folders(tmp_path: Any) -> None:
    net, path = model(("gla", "full")), tmp_path / "m"
    net.save_pretrained(path)
    manifest = json.loads((path / "qkv.json").read_text())

    def broken(name: str, change: Any) -> None:
        copy = tmp_path / name
        shutil.copytree(path, copy)
        change(copy)
        with pytest.raises(SavedDataError):
            CausalLM.from_pretrained(copy)

    def rewrite(**more: Any) -> Any:
        return lambda folder: (folder / "qkv.json").write_text(json.dumps(manifest | more))

    broken("empty", lambda f: (f / "qkv.json").unlink())
    broken("no weights", lambda f: (f / "tensors.safetensors").unlink())
    broken("cut", lambda f: (f / "tensors.safetensors").write_bytes((f / "tensors.safetensors").read_bytes()[:-9]))
    broken("json", lambda f: (f / "qkv.json").write_text("{"))
    broken("other kind", rewrite(model="vit"))
    broken("future", rewrite(format=99))
    broken("no config", rewrite(config=None))
    for field, value in (
        ("width", 32),
        ("heads", "two"),
        ("colour", 1),
        ("operators", []),
        ("operators", [{"id": "glaa"}]),
    ):
        broken(f"{field} {value}", rewrite(config=manifest["config"] | {field: value}))
    others = [manifest["config"]["operators"][0], {"id": "linear", "parameters": {}}]
    broken("other operator's weights", rewrite(config=manifest["config"] | {"operators": others[::-1]}))
    with pytest.raises(SavedDataError, match=r"layer 1: full instead of gla:chunk_size=32"):
        CausalLM.from_pretrained(path, config=config(("gla", "gla:chunk_size=32")))
    with pytest.raises(SavedDataError, match="kv_heads: 0 instead of 1"):
        CausalLM.from_pretrained(path, config=config(("gla", "full"), kv_heads=1))
    with pytest.raises(SavedDataError, match="width: 16 instead of 32"):
        CausalLM.from_pretrained(path, config=config(("gla", "full"), width=32))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("mine")
    with pytest.raises(SavedDataError, match="not a folder saved by qkv"):
        net.save_pretrained(tmp_path / "foreign")
    assert (tmp_path / "foreign" / "thesis.txt").read_text() == "mine"


def test_a_configuration_is_plain_data() -> None:
    c = config(("gla:chunk_size=32,sub_chunk=4", "sliding-window:window=7"), width=32)
    assert CausalConfig.from_dict(json.loads(json.dumps(c.to_dict()))) == c
    assert c.to_dict()["operators"][0]["parameters"] == {"chunk_size": 32, "sub_chunk": 4}
    with pytest.raises(dataclasses.FrozenInstanceError):
        c.width = 3


# -- training

SHAPE: dict[str, Any] = {"width": 16, "heads": 2, "vocabulary": 23}
QUICK: dict[str, Any] = {
    "max_steps": 6, "per_device_train_batch_size": 4, "save_steps": 3, "logging_steps": 1, "use_cpu": True, "progress": False,
}  # fmt: skip


def rows(count: int = 30, seed: int = 0) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    return [{"input_ids": r} for r in torch.randint(0, 23, (count, 13), generator=draw)]


def fresh(operators: Any = ("gla", "full"), **more: Any) -> CausalLM:
    return CausalLM(CausalConfig(operators=operators, **SHAPE | more))


def weights(path: Any) -> dict[str, Tensor]:
    return CausalLM.from_pretrained(path).state_dict()


@pytest.mark.parametrize(
    "made", [fresh, lambda: fresh(("base-conv", "gla", "full"), kv_heads=1)], ids=["plain", "groups"]
)
def test_a_run_that_was_cut_off_is_the_run_that_was_not(made: Any, tmp_path: Any) -> None:
    done = train(made(), rows(), tmp_path / "whole", evaluate=lambda m: {"zero": 0.0}, **QUICK)
    assert done.steps == 6 and done.scores.keys() == {"untrained", "trained"} and len(done.records) >= 6
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "model")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "checkpoint-6")
    again = train(made(), rows(), tmp_path / "cut", resume=True, **QUICK)
    a, b = weights(done.path), weights(again.path)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert [r["loss"] for r in done.records if "loss" in r] == [r["loss"] for r in again.records if "loss" in r]
    start = made().state_dict()
    assert any(not torch.equal(a[k], start[k]) for k in a)


def test_a_run_goes_on_only_as_itself(tmp_path: Any) -> None:
    train(fresh(), rows(), tmp_path / "run", **QUICK | {"max_steps": 3})
    kept = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(TrainingError, match="already holds a run"):
        train(fresh(), rows(), tmp_path / "run", **QUICK | {"max_steps": 3})
    cases: list[tuple[Any, Any, dict[str, Any], str]] = [
        (fresh(("full", "full")), rows(), {}, r'operators\.0\.id: "gla" -> "full"'),
        (fresh(("gla:chunk_size=32", "full")), rows(), {}, "chunk_size: 64 -> 32"),
        (fresh(conv=0), rows(), {}, "config.conv: 4 -> 0"),
        (fresh(kv_heads=1), rows(), {}, "config.kv_heads: 0 -> 1"),
        (fresh(("base-conv", "full")), rows(), {}, r'operators\.0\.id: "gla" -> "base-conv"'),
        (fresh(), rows(seed=1), {}, "content"),
        (fresh(), rows(), {"learning_rate": 0.5}, "learning_rate"),
        (fresh(), rows(), {"bf16": True}, "bf16: false -> true"),
    ]
    for net, data, more, says in cases:
        with pytest.raises(TrainingError, match=says):
            train(net, data, tmp_path / "run", resume=True, **QUICK | {"max_steps": 3} | more)
    assert all(p.read_bytes() == x for p, x in kept.items())


def test_bf16_training_runs_and_learns(tmp_path: Any) -> None:
    same = [{"input_ids": torch.arange(13) % 5} for _ in range(16)]
    done = train(fresh(), same, tmp_path / "run", bf16=True, **QUICK | {"max_steps": 30, "learning_rate": 1e-2})
    first, *_, last = (r["loss"] for r in done.records if "loss" in r)
    assert last < 0.6 * first
    assert all(p.dtype == torch.float32 for p in CausalLM.from_pretrained(done.path).parameters())


def test_a_run_that_diverges_ends(tmp_path: Any) -> None:
    with pytest.raises(TrainingError, match="ower learning_rate"):
        train(fresh(), rows(), tmp_path / "run", **QUICK | {"learning_rate": 1e30, "max_grad_norm": 1e30})


def test_what_training_refuses(tmp_path: Any) -> None:
    strange = [{"input_ids": torch.full((5,), 99)}]
    for data in ([], [{"pixel_values": torch.zeros(1)}], "text", strange, 4 * strange):
        with pytest.raises(InvalidInput):
            train(fresh(), data, tmp_path / "run", **QUICK)
    with pytest.raises(InvalidInput, match="CausalLM or ViT or Pyramid"):
        train(torch.nn.Linear(2, 2), rows(), tmp_path / "run", **QUICK)
    with pytest.raises(UnknownName, match="learning_rate"):
        train(fresh(), rows(), tmp_path / "run", learnin_rate=1.0, **QUICK)
    with pytest.raises(InvalidParameter, match="max_steps"):
        train(fresh(), rows(), tmp_path / "run")


# -- the loop of the comparisons


def test_the_quick_loop_learns_pairs_and_text() -> None:
    draw = torch.Generator().manual_seed(0)
    ids, target = pairs(3, 4, 20, 18, draw)
    assert ids.shape == target.shape == (3, 20) and (target >= 0).sum() == 12
    for row, want in zip(ids, target, strict=True):
        told = {int(row[2 * i]): int(row[2 * i + 1]) for i in range(4)}
        assert {int(row[i]): int(want[i]) for i in (want >= 0).nonzero()[:, 0]} == told
    net = CausalLM(CausalConfig(operators=("gla",), width=16, heads=2, vocabulary=7))
    data = torch.arange(400) % 7
    before = held_out(lambda x: net(x).logits, data, 8, 4)
    done = fit(net, net.loss, lambda i: random_windows(data, 8, 8, draw), 60, rate=1e-2)
    assert held_out(lambda x: net(x).logits, data, 8, 4) < 0.3 * before
    assert not done.captured and done.reason == "no CUDA device"
    with pytest.raises(TrainingError, match="lower the rate"):
        fit(net, lambda *b: torch.inf * net.loss(*b), lambda i: random_windows(data, 8, 8, draw), 1)


# -- the laws catch a broken mixer


def _no_tail(mixer: Mixer, x: Tensor, held: Any) -> Any:
    return CONVOLVED(mixer, x, None)


def _no_position(padding: Any, x: Tensor) -> Tensor:
    return torch.arange(x.shape[1]).expand(x.shape[:2])


def _unblanked(mixer: Mixer, x: Tensor, *, padding: Any = None, **more: Any) -> Any:
    return FORWARD(mixer, x, padding=None, **more)


def _short_ring(self: Any, k: Tensor, v: Tensor, padding: Any, position: Tensor, held: Any) -> Any:
    out = AFTER(self, k, v, padding, position, held)
    return out | {"place": out["place"].masked_fill(out["place"] == position[:, -1:], -1)}  # forgets the newest token


def _interleaved(x: Tensor, heads: int) -> Tensor:
    return HEADS(x, heads).roll(1, 1) if heads == 2 else HEADS(x, heads)  # groups read their neighbour's head


def _forgetful(conv: Any, x: Tensor, tail: Any) -> Any:
    return GATED(conv, x, None)


CONVOLVED, FORWARD, AFTER, HEADS = Mixer._convolved, Mixer.forward, Window._after, Mixer._heads
GATED = base_conv.convolved
WINDOWS = ("sliding-window:window=4,sinks=2",)


@pytest.mark.parametrize(
    ("place", "mutant", "law", "operators"),
    [
        ((Mixer, "_convolved"), _no_tail, test_prefill_and_steps_are_the_whole, ("gla",)),
        ((Mixer, "forward"), _unblanked, test_a_padded_row_is_the_row_alone, ("gla",)),
        ((mixing, "_count"), _no_position, test_a_padded_row_is_the_row_alone, WINDOWS),
        ((Window, "_after"), _short_ring, test_prefill_and_steps_are_the_whole, WINDOWS),
        ((Mixer, "_heads"), staticmethod(_interleaved), test_a_group_reads_the_keys_and_values_of_its_head, ("gla",)),
        ((base_conv, "convolved"), _forgetful, test_prefill_and_steps_are_the_whole, ("base-conv",)),
    ],
    ids=[
        "conv tail lost",
        "padding seen",
        "padding counted",
        "ring too short",
        "another group's head",
        "gated tail lost",
    ],
)
def test_a_law_catches(place: Any, mutant: Any, law: Any, operators: Any, monkeypatch: Any) -> None:
    law(operators)
    monkeypatch.setattr(*place, mutant)
    with pytest.raises(AssertionError):
        law(operators)
