"""The transformers host: every model family works or is refused with a reason; generation in all its forms; revert is exact."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
import transformers as hf

import models
import qkv
from qkv.core.errors import InvalidInput, NeverFired, NotApplied, Refused, SavedDataError, StateError, UnknownName
from qkv.hosts import transformers_cache

SINKS = "streamingllm:sinks=2,window=7,positions=original"
CACHES = [SINKS, "streamingllm:sinks=2,window=7", "window:budget=9", "h2o:budget=9", "h2o:budget=0.4"]


def forward(model: hf.PreTrainedModel, x: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        out = model(**x)
    return out.logits if "logits" in out else out.last_hidden_state


def generate(model: hf.PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None = None, **more) -> torch.Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    settings = dict(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None) | more
    return model.generate(ids, attention_mask=mask, **settings)


def fingerprint(model: torch.nn.Module) -> dict[str, object]:
    """Everything that revert has to put back."""
    return {
        "attributes": {n: set(m.__dict__) for n, m in model.named_modules()},
        "modules": {n: id(m) for n, m in model.named_modules()},
        "hooks": {n: (len(m._forward_pre_hooks), len(m._forward_hooks)) for n, m in model.named_modules()},
        "attention": [c._attn_implementation_internal for m in model.modules() if (c := getattr(m, "config", None))
                      and hasattr(c, "_attn_implementation_internal")],
    }  # fmt: skip


@pytest.mark.parametrize("name", list(models.ALL))
def test_full_changes_nothing_and_revert_is_bit_exact(name: str) -> None:
    model, x = models.make(name), models.inputs(name)
    before, state, out = fingerprint(model), {k: v.clone() for k, v in model.state_dict().items()}, forward(model, x)
    qkv.apply(model, "full")
    torch.testing.assert_close(forward(model, x), out, rtol=0, atol=1e-12)
    assert qkv.report(model).calls >= 3
    assert qkv.revert(model) is model
    assert fingerprint(model) == before
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(forward(model, x), out)


@pytest.mark.parametrize("name", [*models.DECODERS, "whisper"])
def test_a_cache_method_saves_on_every_decoder_family_and_reverts(name: str) -> None:
    model, x = models.make(name), models.inputs(name)
    if name == "whisper":
        x["decoder_input_ids"] = x["decoder_input_ids"].repeat(1, 3)
    before, out = fingerprint(model), forward(model, x)
    with qkv.applied(model, SINKS):
        forward(model, x)
        report = qkv.report(model)
    compressed = [s for s in report.sites if SINKS.split(":")[0] in "".join(s.methods)]
    assert compressed and all(s.kept == 9 and s.bytes < 0.5 * s.full_bytes for s in compressed)
    assert fingerprint(model) == before and torch.equal(forward(model, x), out)


@pytest.mark.parametrize("name, needle", [("falcon", "rounds to bfloat16"), ("t5", "relative position bias")])
def test_a_model_without_a_seam_is_refused_by_name(name: str, needle: str) -> None:
    model = models.make(name)
    before = fingerprint(model)
    assert not qkv.plan(model, "full").ok and needle in str(qkv.plan(model, "full"))
    with pytest.raises(Refused, match=needle):
        qkv.apply(model, "full")
    assert fingerprint(model) == before


def test_encoders_have_no_cache_to_compress() -> None:
    with pytest.raises(Refused, match="no growing cache"):
        qkv.apply(models.make("bert"), "h2o")


def test_sliding_layers_keep_their_own_window_beside_a_cache_method() -> None:
    model = models.make("gemma3")
    plan = qkv.plan(model, "h2o")
    assert plan.ok and [s.layer for s in plan.accepted(qkv.method("h2o"))] == [1, 3]
    assert "sliding window of 8" in str(plan)
    x = models.inputs("gemma3")
    base = generate(model, x["input_ids"], x["attention_mask"])
    with qkv.applied(model, "h2o:budget=1.0"):
        assert torch.equal(generate(model, x["input_ids"], x["attention_mask"]), base)


def test_a_window_that_only_the_configuration_knows_is_seen() -> None:
    model = models.mistral(window=8).double().eval()
    assert {s.window for s in qkv.sites(model)} == {8}
    with pytest.raises(Refused, match="sliding window of 8"):
        qkv.apply(model, "h2o")
    ids = models.inputs("llama")["input_ids"][1:]
    base = generate(model, ids)
    with qkv.applied(model, "full"):
        assert torch.equal(generate(model, ids), base)
    assert {s.window for s in qkv.sites(models.make("mistral"))} == {None}


@pytest.mark.parametrize("name", list(models.DECODERS))
def test_full_generates_what_the_model_generates(name: str) -> None:
    model, x = models.make(name), models.inputs(name)
    ids, mask = x["input_ids"], x["attention_mask"]
    ways = [{}, {"num_beams": 3}, {"prefill_chunk_size": 5}]
    base = [generate(model, ids, mask, **w) for w in ways]
    torch.manual_seed(3)
    sampled = generate(model, ids, mask, do_sample=True)
    with qkv.applied(model, "full"):
        for way, want in zip(ways, base, strict=True):
            assert torch.equal(generate(model, ids, mask, **way), want), way
        torch.manual_seed(3)
        assert torch.equal(generate(model, ids, mask, do_sample=True), sampled)


@pytest.mark.parametrize("method", [*CACHES, "full"])
def test_a_padded_row_is_the_row_alone(method: str) -> None:
    model, x = models.make("llama"), models.inputs("llama")
    ids, mask = x["input_ids"], x["attention_mask"]
    with qkv.applied(model, method):
        both = generate(model, ids, mask)
        assert torch.equal(both[0, 23:], generate(model, ids[:1, 7:])[0, 16:])
        assert torch.equal(both[1], generate(model, ids[1:])[0])
        beams = generate(model, ids, mask, num_beams=3)
        assert torch.equal(beams[0, 23:], generate(model, ids[:1, 7:], num_beams=3)[0, 16:])


def test_a_cache_is_cropped_by_a_count_or_to_a_length() -> None:
    """Versions of transformers ask for either."""
    model, ids = models.make("llama"), models.inputs("llama")["input_ids"][1:]
    with qkv.applied(model, "full"), torch.no_grad():
        caches = [model(ids, use_cache=True).past_key_values for _ in range(2)]
        caches[0].crop(-4)
        caches[1].layers[0].crop(19)
        assert [c.layers[0].get_seq_length() for c in caches] == [19, 19]
        with pytest.raises(InvalidInput, match="40 tokens are to be left of 19"):
            caches[1].layers[0].crop(40)


@pytest.mark.parametrize("method", ["h2o:budget=9", "full"])
def test_speculation_of_ones_own_where_caches_are_not_told_of_it(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with transformers 5.10; a layer of its own is not emptied by taking nothing back."""
    monkeypatch.setattr(transformers_cache, "RECORDS", False)
    model, ids = models.make("llama"), models.inputs("llama")["input_ids"][1:]
    with qkv.applied(model, method, where=[0, 1]), torch.no_grad():
        one, two = (qkv.hosts.fresh_cache(model, 20, record=record) for record in (True, False))
        for cache in (one, two):
            model(ids[:, :20], past_key_values=cache)
            if cache is one:
                transformers_cache.take_back(cache, 0)
        model(ids[:, 20:], past_key_values=one)  # a guess of three, of which the first is right
        transformers_cache.take_back(one, 2)
        model(ids[:, 20:21], past_key_values=two)
        assert [layer.get_seq_length() for layer in one.layers] == [21, 21, 21]
        last = [model(ids[:, 21:22], past_key_values=cache).logits for cache in (one, two)]
        torch.testing.assert_close(*last, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", [*CACHES, "full"])
def test_speculation_gives_the_tokens_of_plain_decoding(method: str) -> None:
    model, draft = models.make("llama"), models.make("llama", seed=7)
    ids = models.inputs("llama")["input_ids"][1:]
    ids = torch.cat((ids, ids[:, :9]), 1)
    with qkv.applied(model, method):
        plain = generate(model, ids)
        assert torch.equal(generate(model, ids, prompt_lookup_num_tokens=3, eos_token_id=97), plain)
        assert torch.equal(generate(model, ids, assistant_model=draft), plain)


@pytest.mark.parametrize("method", ["full", SINKS, "window:budget=9"])
def test_a_conversation_goes_on_with_the_returned_cache(method: str) -> None:
    model, ids = models.make("llama"), models.inputs("llama")["input_ids"][1:]
    more = models.inputs("llama", seed=5)["input_ids"][1:, :5]
    with qkv.applied(model, method):
        first = generate(model, ids, return_dict_in_generate=True)
        history = torch.cat((first.sequences, more), 1)
        going_on = generate(model, history, past_key_values=first.past_key_values)
        # These methods rank by position alone, so one pass over the history keeps the same tokens.
        assert torch.equal(going_on, generate(model, history))
        twin = generate(model, ids, return_dict_in_generate=True).past_key_values
        assert torch.equal(generate(model, history, past_key_values=copy.deepcopy(twin)), going_on)


@pytest.mark.parametrize(
    "method", ["full", "h2o:budget=9", "kivi:group=4,residual=8", "quest:budget=9,block_size=3", "offload"]
)
def test_a_cache_filled_in_inference_mode_goes_on_outside(method: str) -> None:
    model, ids = models.make("llama"), models.inputs("llama")["input_ids"]

    def run(*modes: bool) -> torch.Tensor:
        cache: Any = None
        outs = []
        for i, mode in enumerate(modes):
            with torch.inference_mode(mode), torch.no_grad():
                if i == 3:
                    cache.reorder_cache(torch.arange(ids.shape[0]).flip(0))
                out = model(ids if i == 0 else ids[:, i : i + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            outs.append(out.logits[:, -1].clone())
        return torch.stack(outs)

    with qkv.applied(model, method):
        want = run(False, False, False, False, False)
        for modes in [
            (True, False, False, False, False),
            (True, True, True, False, False),
            (False, True, False, True, False),
        ]:
            torch.testing.assert_close(run(*modes), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_runs_and_keeps_its_dtype(dtype: torch.dtype) -> None:
    model, ids = models.make("llama", dtype), models.inputs("llama")["input_ids"][1:]
    with qkv.applied(model, "h2o:budget=9"), torch.no_grad():
        out = model(ids)
        assert out.logits.dtype == dtype and torch.isfinite(out.logits).all()
        assert out.past_key_values.layers[0].memory.keys.dtype == dtype


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_gives_the_gradients_of_the_plain_model(checkpointing: bool) -> None:
    model, x = models.make("llama").train(), models.inputs("llama")
    ids = x["input_ids"]

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(**x, labels=ids).loss.backward()
        return model.model.layers[0].self_attn.q_proj.weight.grad.clone()

    want = gradient()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with qkv.applied(model, "full"):
        torch.testing.assert_close(gradient(), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["full", "h2o:budget=9", "kivi:group=4,residual=8", "zipcache:regroup_every=8"])
@pytest.mark.parametrize("new", [1, 4])
def test_no_wrong_gradient_flows_back_through_a_filled_cache(method: str, new: int) -> None:
    model, ids = models.make("llama"), models.inputs("llama")["input_ids"][1:]
    with qkv.applied(model, method):
        first = model(ids, use_cache=True)
        later = model(ids[:, :new], past_key_values=first.past_key_values, use_cache=True)  # reading is allowed
        assert torch.isfinite(later.logits).all()
        with pytest.raises(Refused, match="no_grad"):
            later.logits.sum().backward()
        model.zero_grad()
        model(ids, use_cache=True).logits.sum().backward()  # the prompt itself learns
        assert all(p.grad is not None for p in model.parameters())


def test_a_cpu_device_map_is_no_obstacle() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, x = models.make("llama"), models.inputs("llama")
    want = forward(model, x)
    model = accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    with qkv.applied(model, "full"):
        torch.testing.assert_close(forward(model, x), want, rtol=0, atol=1e-12)


def test_where_chooses_by_number_name_and_predicate() -> None:
    model, x = models.make("llama"), models.inputs("llama")
    for where in ([0, 2], ["*.0.*", "*.2.*"], lambda s: s.layer != 1):
        with qkv.applied(model, SINKS, where=where):
            forward(model, x)
            assert [s.site.layer for s in qkv.report(model).sites] == [0, 2]
            assert len({s.kept for s in qkv.report(model).sites}) == 1
    for where in (9, "*.nine.*", lambda s: False):
        with pytest.raises(UnknownName):
            qkv.apply(model, SINKS, where=where)
    with pytest.raises(qkv.core.errors.InvalidParameter):
        qkv.apply(model, SINKS, where=1.5)


def test_layers_with_different_lengths_decode_right() -> None:
    model, x = models.make("llama"), models.inputs("llama")
    with qkv.applied(model, SINKS, where=[1]):
        some = generate(model, x["input_ids"], x["attention_mask"])
        alone = generate(model, x["input_ids"][:1, 7:])
    assert torch.equal(some[0, 23:], alone[0, 16:])


def test_an_untouched_site_runs_what_it_ran_before() -> None:
    for kind in ("sdpa", "eager"):
        model, x = models.make("llama"), {"input_ids": models.inputs("llama")["input_ids"][1:]}
        model.set_attn_implementation(kind)
        want = forward(model, x)
        with qkv.applied(model, "full", where=[1]):  # eager attention takes its softmax in float32
            torch.testing.assert_close(forward(model, x), want, rtol=0, atol=1e-12 if kind == "sdpa" else 1e-6)
        assert model.config._attn_implementation == kind


def test_applied_reverts_on_exceptions() -> None:
    model = models.make("llama")
    before = fingerprint(model)
    with pytest.raises(ZeroDivisionError), qkv.applied(model, "full"):
        1 / 0  # noqa: B018
    assert fingerprint(model) == before


def test_clashes_and_repeats_are_refused_before_anything_changes() -> None:
    model = models.make("llama")
    before = fingerprint(model)
    for pair, needle in (
        (("h2o", "window"), "stores"),
        (("h2o", "h2o"), "twice"),
        (("h2o:budget=9", "h2o:budget=8"), "both"),
    ):
        assert not qkv.plan(model, *pair).ok
        with pytest.raises(Refused, match=needle):
            qkv.apply(model, *pair)
        assert fingerprint(model) == before
    qkv.apply(model, "h2o")
    with pytest.raises(Refused, match="twice"):
        qkv.apply(model, "h2o")
    with pytest.raises(Refused):
        qkv.apply(model, "window")
    qkv.revert(model)
    assert fingerprint(model) == before


def test_nothing_applied_nothing_fired() -> None:
    model = models.make("llama")
    for call in (qkv.revert, qkv.report, lambda m: qkv.save(m, "nowhere")):
        with pytest.raises(NotApplied):
            call(model)
    qkv.apply(model, "full")
    with pytest.raises(NeverFired, match="never ran"):
        qkv.report(model)


def test_methods_that_cannot_act_on_a_pretrained_model_say_why() -> None:
    model = models.make("llama")
    with pytest.raises(Refused, match="log_decay"):
        qkv.apply(model, "gla")
    with pytest.raises(InvalidInput, match="no method"):
        qkv.apply(model)
    with pytest.raises(InvalidInput, match="host"):
        qkv.apply(torch.nn.Linear(2, 2), "full")
    with pytest.raises(UnknownName, match="h2o"):
        qkv.apply(model, "h20")


def test_foreign_caches_are_refused_by_name() -> None:
    model, ids = models.make("llama"), models.inputs("llama")["input_ids"][1:]
    with torch.no_grad():
        filled = model(ids).past_key_values
    static = hf.StaticCache(config=model.config, max_cache_len=64)
    with qkv.applied(model, "h2o"), torch.no_grad():
        for cache in (filled, static):
            with pytest.raises(Refused, match="its own cache"):
                model(ids, past_key_values=cache)
        ours = model(ids).past_key_values
    with qkv.applied(model, "window"), torch.no_grad(), pytest.raises(StateError, match="another stack"):
        model(ids[:, :1], past_key_values=ours)


def test_absolute_positions_in_the_cache_need_a_rotary_model() -> None:
    model = models.make("gpt2")
    with pytest.raises(Refused, match="rotary"):
        qkv.apply(model, "streamingllm")


def test_a_custom_mask_that_names_columns_is_refused_by_evicting_caches() -> None:
    model, ids = models.make("llama"), models.inputs("llama")["input_ids"][1:]
    mask = torch.ones(1, 1, 23, 23, dtype=torch.bool).tril()
    want = forward(model, {"input_ids": ids})
    with qkv.applied(model, "full"):
        torch.testing.assert_close(forward(model, {"input_ids": ids, "attention_mask": mask}), want, rtol=0, atol=1e-12)
    with qkv.applied(model, "h2o"), pytest.raises(Refused, match="2-D attention_mask"):
        forward(model, {"input_ids": ids, "attention_mask": mask})


def test_right_padding_is_handled_as_padding() -> None:
    model, ids = models.make("llama"), models.inputs("llama")["input_ids"][1:]
    padded = torch.cat((ids, torch.zeros_like(ids[:, :6])), 1)
    mask = (padded > 0).long()
    with qkv.applied(model, "h2o:budget=9"):
        alone = forward(model, {"input_ids": ids})
        both = forward(model, {"input_ids": padded, "attention_mask": mask})
    torch.testing.assert_close(both[:, : ids.shape[1]], alone, rtol=0, atol=1e-10)


def test_observers_see_every_call_and_change_no_bit() -> None:
    from qkv.hosts import observe

    model, x = models.make("llama"), models.inputs("llama")
    want, calls = forward(model, x), []
    before = fingerprint(model)
    with observe(model, lambda site, call: calls.append((site.layer, call.q.shape, call.k.shape))):
        assert torch.equal(forward(model, x), want)
    assert [c[0] for c in calls] == [0, 1, 2] and calls[0][1:] == ((2, 6, 23, 8), (2, 3, 23, 8))
    assert fingerprint(model) == before


def test_copies_of_an_applied_model_are_independent() -> None:
    model, x = models.make("llama"), models.inputs("llama")
    base = generate(model, x["input_ids"], x["attention_mask"])
    qkv.apply(model, SINKS)
    want = generate(model, x["input_ids"], x["attention_mask"])
    twin = copy.deepcopy(model)
    assert torch.equal(generate(twin, x["input_ids"], x["attention_mask"]), want)
    qkv.revert(model)
    assert torch.equal(generate(model, x["input_ids"], x["attention_mask"]), base)
    assert torch.equal(generate(twin, x["input_ids"], x["attention_mask"]), want)
    qkv.revert(twin)
    assert torch.equal(generate(twin, x["input_ids"], x["attention_mask"]), base)


def test_the_surface_of_the_model_is_unchanged_by_apply(tmp_path) -> None:
    model = models.make("llama")
    config = model.config.to_dict()
    with qkv.applied(model, "h2o"):
        assert model.config.to_dict() == config
        model.save_pretrained(tmp_path / "plain")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float64).eval()
    x = models.inputs("llama")
    assert torch.equal(forward(again, x), forward(model, x))


def test_save_and_load_replay_the_stack(tmp_path) -> None:
    model, x = models.make("llama"), models.inputs("llama")
    model.save_pretrained(tmp_path / "base")
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64).eval()
    qkv.apply(model, "h2o:budget=9", where=[0, 2])
    want = generate(model, x["input_ids"], x["attention_mask"])
    qkv.save(model, tmp_path / "saved")
    again = qkv.load(tmp_path / "saved", dtype=torch.float64)
    assert torch.equal(generate(again.eval(), x["input_ids"], x["attention_mask"]), want)
    other = qkv.load(tmp_path / "saved", model=models.make("llama"))
    assert torch.equal(generate(other, x["input_ids"], x["attention_mask"]), want)
    qkv.save(model, tmp_path / "saved")  # over itself


def test_damaged_foreign_and_future_folders_are_refused(tmp_path) -> None:
    model = models.make("llama")
    qkv.apply(model, "h2o")
    qkv.save(model, tmp_path / "saved")
    file = tmp_path / "saved" / "qkv.json"
    good = json.loads(file.read_text())

    def broken(**changes) -> None:
        file.write_text(json.dumps(good | changes))

    cases = [
        (dict(format=99), "update qkv"),
        (dict(format="one"), "not a manifest"),
        (dict(library="other"), "no host"),
        (dict(files={"../secret": {"bytes": 1, "sha256": ""}}), "outside"),
        (dict(files={"tensors.safetensors": {"bytes": 1 << 60, "sha256": ""}}), "missing"),
        (dict(stack=[]), "no stack"),
        (dict(stack=[{"method": {"id": "nine"}, "sites": []}]), "lacks"),
        (dict(base={"fingerprint": "00", "class": "Llama"}), "other weights"),
    ]
    for changes, needle in cases:
        broken(**changes)
        with pytest.raises(SavedDataError, match=needle):
            qkv.load(tmp_path / "saved", model=models.make("llama"))
    file.write_text("{")
    with pytest.raises(SavedDataError, match="damaged"):
        qkv.load(tmp_path / "saved", model=models.make("llama"))
    with pytest.raises(SavedDataError, match=r"no qkv\.json"):
        qkv.load(tmp_path, model=models.make("llama"))
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(SavedDataError, match="not a folder saved by qkv"):
        qkv.save(model, other)
    assert (other / "thesis.txt").read_text() == "irreplaceable"


def test_a_full_disk_leaves_the_old_folder(tmp_path, monkeypatch) -> None:
    model = models.make("llama")
    qkv.apply(model, "h2o")
    qkv.save(model, tmp_path / "saved")
    before = (tmp_path / "saved" / "qkv.json").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(SavedDataError, match="No space left"):
        qkv.save(model, tmp_path / "saved")
    assert (tmp_path / "saved" / "qkv.json").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["saved"]


@pytest.mark.parametrize("shape", [(0, 5), (1, 0)])
def test_nothing_to_attend_to_is_said(shape: tuple[int, int]) -> None:
    model, ids = models.make("llama"), models.inputs("llama")["input_ids"]
    with qkv.applied(model, "h2o:budget=9"):
        with pytest.raises(InvalidInput, match="hold nothing to attend to"):
            forward(model, {"input_ids": torch.zeros(shape, dtype=torch.long)})
        assert torch.isfinite(forward(model, {"input_ids": ids})).all()


def test_a_cache_goes_on_with_its_own_rows_only() -> None:
    model, ids = models.make("llama"), models.inputs("llama")["input_ids"]
    for method in ("full", "h2o:budget=9"):
        with qkv.applied(model, method), torch.no_grad():
            cache = model(ids).past_key_values
            with pytest.raises(StateError, match="holds 2 rows and was given 1"):
                model(ids[:1, :1], past_key_values=cache)
            cache.batch_select_indices(torch.tensor([1]))
            assert model(ids[:1, :1], past_key_values=cache).logits.shape[0] == 1


def test_an_implementation_set_over_qkv_is_noticed() -> None:
    model, ids = models.make("llama"), models.inputs("llama")["input_ids"]
    with qkv.applied(model, "h2o:budget=9"):
        model.set_attn_implementation("sdpa")
        with pytest.raises(StateError, match="set to 'sdpa' after"):
            forward(model, {"input_ids": ids})
    assert model.config._attn_implementation == "sdpa"


def test_wrong_places_and_idle_data_are_refused() -> None:
    model = models.make("llama")
    with pytest.raises(qkv.core.errors.InvalidParameter, match="one or more"):
        qkv.apply(model, "h2o", where=[])
    with pytest.raises(InvalidInput, match="learns from none"):
        qkv.apply(model, "h2o", data=[{}])
    with pytest.raises(qkv.core.errors.InvalidParameter, match="twice"):
        qkv.apply(model, "h2o:budget=9,budget=8")
    with pytest.raises(UnknownName, match="did you mean 'h2o'"):
        qkv.apply(model, "H2O")


@pytest.mark.parametrize("method", ["h2o:budget=9", "sliding-window:window=7", "full"])
def test_autocast_is_served(method: str) -> None:
    model, ids = models.make("llama", torch.float32), models.inputs("llama")["input_ids"]
    with qkv.applied(model, method), torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(forward(model, {"input_ids": ids})).all()


CRAFTED = [
    (lambda s: s | {"sites": ["*"]}, "sites that this model has not"),
    (lambda s: s | {"sites": ["../../x"]}, "sites that this model has not"),
    (lambda s: s | {"sites": []}, "damaged"),
    (lambda s: s | {"sites": [True]}, "damaged"),
    (lambda s: s | {"method": {"id": "h2o", "parameters": {"budget": -1}}}, "settings of a method are damaged"),
    (lambda s: s | {"method": {"id": "gla", "parameters": {}}}, "log_decay"),
]


@pytest.mark.parametrize("change, needle", CRAFTED)
def test_a_crafted_stack_does_no_more_than_apply_would(tmp_path, change, needle: str) -> None:
    model = models.make("llama")
    before = fingerprint(model)
    with qkv.applied(model, "h2o"):
        qkv.save(model, tmp_path / "saved")
    file = tmp_path / "saved" / "qkv.json"
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps(manifest | {"stack": [change(manifest["stack"][0])]}))
    with pytest.raises(SavedDataError, match=needle):
        qkv.load(tmp_path / "saved", model=model)
    file.write_text(json.dumps(manifest | {"stack": manifest["stack"] * 2}))
    with pytest.raises(SavedDataError, match="twice"):
        qkv.load(tmp_path / "saved", model=model)
    assert fingerprint(model) == before


def test_a_manifest_that_strains_the_parser_is_damaged(tmp_path) -> None:
    (tmp_path / "qkv.json").write_text("[" * 100_000)
    with pytest.raises(SavedDataError, match="damaged"):
        qkv.load(tmp_path, model=models.make("llama"))
    (tmp_path / "qkv.json").write_text('{"format": ' + "9" * 5000 + "}")
    with pytest.raises(SavedDataError, match="damaged"):
        qkv.load(tmp_path, model=models.make("llama"))
    for form in (True, 0, -1):
        (tmp_path / "qkv.json").write_text(json.dumps({"format": form}))
        with pytest.raises(SavedDataError, match="not a manifest"):
            qkv.load(tmp_path, model=models.make("llama"))


def test_a_disk_that_fills_while_tensors_are_written_leaves_nothing(tmp_path, monkeypatch) -> None:
    from safetensors import SafetensorError

    from qkv import hosts

    model, ids = models.make("llama"), models.inputs("llama")["input_ids"]
    with qkv.applied(model, "h2o:budget=9"), torch.no_grad():
        cache = model(ids).past_key_values

        def full(*args, **kwargs):
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

        monkeypatch.setattr("safetensors.torch.save_file", full)
        with pytest.raises(SavedDataError, match="No space left"):
            hosts.save_cache(model, cache, tmp_path / "cache", ids)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("method", "said"), [("agent", "needs agents"), ("soft", "needs landmarks")])
def test_an_operator_of_sets_is_refused_where_order_matters(method: str, said: str) -> None:
    """Before anything runs: its causal form wants what a decoder does not give."""
    model = models.llama()
    plan = qkv.plan(model, method)
    assert not plan.ok and said in str(plan)
    with pytest.raises(Refused, match=said):
        qkv.apply(model, method)


@pytest.mark.parametrize("method", ["agent", "soft"])
def test_an_operator_of_sets_takes_the_padding_of_an_encoder(method: str) -> None:
    model, x = models.make("bert"), models.inputs("bert")
    ids, mask = x["input_ids"], x["attention_mask"]
    with qkv.applied(model, method):
        padded = forward(model, {"input_ids": torch.cat((ids[1:], ids[1:, :5]), 1),
                                 "attention_mask": torch.cat((mask[1:], 0 * mask[1:, :5]), 1)})  # fmt: skip
        torch.testing.assert_close(padded[:, :23], forward(model, {"input_ids": ids[1:]}), rtol=0, atol=1e-10)


def test_a_refusal_names_every_reason_once() -> None:
    plan = qkv.plan(models.make("gemma3"), "razorattention")
    assert plan.refusal is not None
    assert plan.refusal.count("sliding window") == 1 and "induction-echo" in plan.refusal
