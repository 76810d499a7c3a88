"""Models that add linear position biases to their logits (BLOOM, MPT): the host's seam, what is served, and what is refused."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import qkv
from families import family
from models import inputs
from qkv.caches._stores import dense, folding, ranked
from qkv.core import attend as attending
from qkv.core.cache import Geometry, Step
from qkv.core.errors import InvalidInput, QKVError, Refused
from qkv.hosts.transformers_inline import one_stretch, seam_of
from qkv.testing._law import cases
from qkv.testing._speculation import guessed
from qkv.testing.caches._memory import CUTS, SLOPES, D, drive, places, site, stream
from test_host import fingerprint, forward, generate

KINDS = ["bloom", "mpt"]
GATES = str([[0.9, 0.1, 0.2, 0.8, 0.3, 0.7]] * 4)
SERVED = [
    "window:budget=9", "streamingllm:positions=original,sinks=2,window=7", "h2o:budget=9", "tova:budget=9", "knorm:budget=9",
    "snapkv:budget=9,window=4,kernel=3", "pyramidkv:budget=9,window=4,kernel=3", "lazyeviction:budget=9,window=3,sinks=2",
    f"duoattention:gates={GATES},sinks=2,recent=6", "razorattention:heads=0.1+2.3,sinks=2,min_buffer=5,ratio=4",
]  # fmt: skip


def model_of(kind: str, dtype: torch.dtype = torch.float32, **more: Any) -> hf.PreTrainedModel:
    """A tiny model in which attention decides what comes next."""
    model = family(kind, use_cache=True, **more).to(dtype)
    for name, x in model.named_parameters():
        if name.endswith(("query_key_value.weight", "Wqkv.weight")):
            x.data.mul_(3)
    return model


def padded() -> tuple[Tensor, Tensor]:
    x = inputs("llama")
    return x["input_ids"], x["attention_mask"]


@pytest.mark.parametrize("kind", KINDS)
def test_plain_attention_and_full_budgets_are_the_model_itself(kind: str) -> None:
    model, (ids, mask) = model_of(kind), padded()
    x = {"input_ids": ids, "attention_mask": mask}
    before, out, tokens = fingerprint(model), forward(model, x), generate(model, ids, mask)
    beams = generate(model, ids, mask, num_beams=3)
    assert len({tuple(row) for row in tokens[:, 23:].tolist()}) == 2
    whole = ("full", "h2o:budget=1.0", "window:budget=400", "razorattention:heads=[],min_buffer=400")
    for method in whole:
        with qkv.applied(model, method):
            torch.testing.assert_close(forward(model, x)[mask.bool()], out[mask.bool()], rtol=0, atol=2e-5)
            assert torch.equal(generate(model, ids, mask), tokens)
            assert torch.equal(generate(model, ids, mask, num_beams=3), beams)
    with qkv.applied(model, "h2o:budget=1.0", where=[1]):  # the other sites run their own forward, bit for bit
        torch.testing.assert_close(forward(model, x)[mask.bool()], out[mask.bool()], rtol=0, atol=2e-5)
        assert torch.equal(generate(model, ids, mask), tokens)
    assert fingerprint(model) == before and torch.equal(forward(model, x), out)


@pytest.mark.parametrize("kind", KINDS)
def test_without_padding_it_is_the_model_in_double_precision(kind: str) -> None:
    model, (ids, _) = model_of(kind, torch.float64), padded()
    out = forward(model, {"input_ids": ids[1:]})
    for method in ("full", "tova:budget=1.0"):
        with qkv.applied(model, method):
            got = forward(model, {"input_ids": ids[1:]})
    torch.testing.assert_close(got, out, rtol=0, atol=1e-5)  # theirs takes its softmax in float32


@pytest.mark.parametrize("kind", KINDS)
def test_a_site_without_a_method_runs_its_own_forward_bit_for_bit(kind: str) -> None:
    model, (ids, mask) = model_of(kind), padded()
    layers = model.transformer.h if kind == "bloom" else model.transformer.blocks
    x = {"input_ids": ids, "attention_mask": mask}
    seen: list[Tensor] = []
    handle = layers[0].register_forward_hook(lambda m, a, out: seen.append(out[0]))
    forward(model, x)
    with qkv.applied(model, "window:budget=5", where=[1]):
        forward(model, x)
    handle.remove()
    assert torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("method", SERVED)
@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_row_is_the_row_alone_in_every_phase(kind: str, method: str) -> None:
    model, (ids, mask) = model_of(kind), padded()
    with qkv.applied(model, method):
        both = generate(model, ids, mask)
        alone = generate(model, ids[:1, 7:])
        assert torch.equal(both[0, 23:], alone[0, 16:])
        if method.startswith(("window", "streamingllm", "h2o", "tova", "knorm", "snapkv", "lazyeviction")):
            assert qkv.report(model).kept < 23
        beams = generate(model, ids, mask, num_beams=2)
        assert torch.equal(beams[0, 23:], generate(model, ids[:1, 7:], num_beams=2)[0, 16:])
        looked = generate(model, ids[:1, 7:], prompt_lookup_num_tokens=3, eos_token_id=97)
        assert torch.equal(guessed(looked, alone.shape[1]), alone)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [SERVED[0], SERVED[1], SERVED[-2]])
def test_it_is_the_models_own_attention_with_the_evicted_masked(kind: str, method: str, monkeypatch) -> None:
    """Transformers' own forward on a mask of ours, against the prompt at once, in pieces, and token by token."""
    model, (ids, _) = model_of(kind), padded()
    ids = ids[1:]
    i, j = torch.arange(23)[:, None], torch.arange(23)[None, :]
    near = {"window": j >= i - 9, "streamingllm": (j < 2) | (j >= i - 7), "duoattention": (j < 2) | (j > i - 6)}
    seen = near[method.partition(":")[0]] & (j <= i)
    if "duo" in method:
        retrieve = torch.tensor(qkv.method(method)._full(Geometry(6, 6, 8, 8, layers=4)))
        seen = torch.where(retrieve[:, None, None], j <= i, seen)
    lowest = torch.zeros(()).masked_fill(~seen, torch.finfo(torch.float32).min)
    home = importlib.import_module(type(model).__module__)
    with monkeypatch.context() as patch:
        patch.setattr(home, "create_causal_mask", lambda **_: lowest.expand(1, 6, 23, 23))
        want = forward(model, {"input_ids": ids})
    with qkv.applied(model, method), torch.no_grad():
        for pieces in ([23], [9, 1, 1, 7, 5], [1] * 23):
            cache, outs = None, []
            for piece in ids.split(pieces, 1):
                out = model(piece, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                outs.append(out.logits)
            torch.testing.assert_close(torch.cat(outs, 1), want, rtol=0, atol=1e-4)


RANKED = ["h2o", "tova", "snapkv", "pyramidkv", "lazyeviction", "window"]


@pytest.mark.parametrize("name", RANKED)
def test_scores_count_the_biases(name: str) -> None:
    """What is kept is what plain attention over keys with a place in one more channel would keep."""
    for case in cases(type(qkv.method(name))):
        method = case.method.replace(**case.spec.small)
        if getattr(method, "positions", "") == "cache":
            continue
        tokens, one = stream(case), method.layer(site(rope=False, slopes=SLOPES))
        twin = method.layer(Geometry(6, 3, D + 1, D, layer=1, layers=3))
        got, want = drive(one, tokens, CUTS), drive(twin, tokens.biased(SLOPES), CUTS)
        torch.testing.assert_close(got[0], want[0], rtol=0, atol=1e-9)
        assert [places(one, row) for row in range(2)] == [places(twin, row) for row in range(2)]


# -- what is refused ------------------------------------------------------------------------------------------------

OTHERS = [
    "kivi", "quest", "offload", "adakv:scorer=h2o", "kvcrush", "shared-prefix", "retrievalattention", "zipcache",
    "sliding-window:window=7", "xattention", "streamingllm", "h2o:positions=cache", "recycled", "flow",
]  # fmt: skip


@pytest.mark.parametrize("method", OTHERS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_add_the_biases_is_refused_by_name(kind: str, method: str) -> None:
    model = model_of(kind)
    before = fingerprint(model)
    with pytest.raises(Refused) as caught:
        qkv.apply(model, method)
    text, moves = str(caught.value), "positions" in method or method == "streamingllm"
    assert "rotary" in text if moves else "ALiBi" in text and f"which {method.partition(':')[0]} does not" in text
    assert fingerprint(model) == before


def test_every_other_cache_steering_and_conversion_refuses() -> None:
    model, took = model_of("bloom"), set()
    for kind in ("cache", "pattern", "operator", "steering", "conversion"):
        for spec in qkv.methods(kind=kind):
            try:
                method = qkv.method(spec.id)
            except QKVError:  # it needs settings; its kind is judged by others
                continue
            if qkv.plan(model, method).accepted(method):
                took.add(spec.id)
    assert took == {"full", "window", "h2o", "tova", "knorm", "snapkv", "pyramidkv", "lazyeviction"}


def test_observers_and_replacements_are_refused() -> None:
    model = model_of("mpt")
    with pytest.raises(Refused, match="no observer is told of"), qkv.hosts.observe(model, lambda *_: None):
        pass
    with qkv.applied(model, "full"), pytest.raises(Refused, match="ALiBi"):
        with qkv.hosts.attending(model, lambda *a, **b: a[1]):
            pass
    place = site(rope=False, slopes=SLOPES)
    layer = qkv.method("window:budget=9").layer(place)
    x = torch.randn(1, 6, 4, D), torch.randn(1, 3, 4, D), torch.randn(1, 3, 4, D)
    with pytest.raises(Refused, match="run it plain"):
        layer.attend(*x, Step(torch.arange(4)[None], 1.0, compute=lambda *a, **b: a[0]))
    assert "kivi does not" in str(qkv.method("kivi").serves(place))


def test_dropout_is_refused_and_gradients_are_the_models_own() -> None:
    ids = padded()[0][1:]
    for kind, more in (("bloom", {"attention_dropout": 0.5}), ("mpt", {"attn_config": {"attn_pdrop": 1}})):
        model = model_of(kind, **more).train()
        with qkv.applied(model, "full"), pytest.raises(InvalidInput, match="attention dropout to 0"):
            model(ids, use_cache=False)
    for kind in KINDS:
        model = model_of(kind, torch.float64)
        weight = next(x for name, x in model.named_parameters() if "query_key_value.weight" in name or "Wqkv" in name)
        grads = []
        for methods in ((), ("full",)):
            model.zero_grad()
            if methods:
                qkv.apply(model, *methods)
            model(ids, labels=ids, use_cache=False).loss.backward()
            grads.append(weight.grad.clone())
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-7)


def test_padding_between_tokens_counts_as_the_model_counts_it() -> None:
    ids, mask = padded()
    mask = mask.clone()
    mask[0, 12:14] = 0
    model = model_of("bloom")  # counts tokens
    x = {"input_ids": ids, "attention_mask": mask}
    out = forward(model, x)
    with qkv.applied(model, "h2o:budget=1.0"):
        torch.testing.assert_close(forward(model, x)[mask.bool()], out[mask.bool()], rtol=0, atol=2e-5)
    with (
        qkv.applied(model_of("mpt"), "full") as model,
        pytest.raises(Refused, match="pad on one side"),
    ):  # counts columns
        forward(model, x)
    assert one_stretch(torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool())
    assert not one_stretch(torch.tensor([[0, 1, 0, 1]]).bool())


def test_masks_of_four_axes_go_through_plain_attention() -> None:
    model, ids = model_of("mpt"), padded()[0][1:]
    hide = ~torch.ones(23, 23).tril().bool()
    hide[5:, 2:4] = True
    x = {"input_ids": ids, "attention_mask": hide[None, None]}
    out = forward(model, x)
    with qkv.applied(model, "full"):
        torch.testing.assert_close(forward(model, x), out, rtol=0, atol=2e-5)


def test_a_static_cache_is_refused() -> None:
    ids = padded()[0][1:]
    for method in ("full", "h2o"):
        model = model_of("bloom")
        with qkv.applied(model, method), pytest.raises(Refused, match="cache_implementation out"):
            generate(model, ids, cache_implementation="static")


# -- kernels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", *SERVED])
def test_no_kernel_is_taken_where_biases_are_added(method: str, monkeypatch) -> None:
    """Every store believes that kernels serve its tensors, and every kernel raises."""

    class Taken(Exception):
        pass

    def fake(name: str) -> Any:
        raise Taken(name)

    for store in (dense, ranked, folding):
        monkeypatch.setattr(store, "served", lambda x: True)
        monkeypatch.setattr(store, "kernel", fake)
    monkeypatch.setattr(attending, "on_kernels", lambda q, k, v, mask=None: mask is None or mask.shape[2] == 1)
    monkeypatch.setattr(attending, "kernel", fake)
    monkeypatch.setattr(attending, "_flash", lambda *a: False)
    model, (ids, mask) = model_of("bloom"), padded()
    with qkv.applied(model, method):
        out = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
        memories = [layer.memory for layer in out.past_key_values.layers]
        assert memories and not any(memory.static() for memory in memories)
    with pytest.raises(Taken):  # the fakes are in the way of sites without biases
        with qkv.applied(
            family("qwen2"), method if "duo" not in method and "razor" not in method else "window"
        ) as plain:
            generate(plain, ids)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["full", *SERVED])
@pytest.mark.parametrize("kind", KINDS)
def test_a_device_reads_what_the_cpu_reads(kind: str, method: str) -> None:
    (ids, mask), logits = padded(), []
    for device in ("cpu", "cuda"):
        with qkv.applied(model_of(kind).to(device), method) as model, torch.no_grad():
            x = {"attention_mask": mask.to(device), "use_cache": True}
            cache, out = None, []
            for piece in ids.to(device).split([12, 1, 1, 1, 7, 1], 1):
                seen = sum(o.shape[1] for o in out) + piece.shape[1]
                done = model(piece, past_key_values=cache, **x | {"attention_mask": x["attention_mask"][:, :seen]})
                cache = done.past_key_values
                out.append(done.logits)
            logits.append(torch.cat(out, 1).cpu()[mask.bool()])
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=2e-3)
    with pytest.raises(Refused, match="graph=True"):
        qkv.apply(model_of(kind).cuda(), method, graph=True)


# -- the rest of the contract ---------------------------------------------------------------------------------------


def test_slopes_are_the_models_own() -> None:
    for heads in (6, 8, 12):
        bloom = hf.BloomForCausalLM(hf.BloomConfig(vocab_size=11, hidden_size=96, n_head=heads, n_layer=1))
        home = importlib.import_module(type(bloom).__module__)
        want = home.build_alibi_tensor(torch.ones(1, 9), heads, torch.float32)[:, 0]
        slopes = qkv.sites(bloom)[0].geometry.slopes
        assert slopes is not None
        torch.testing.assert_close(torch.tensor(slopes)[:, None] * torch.arange(9), want)
        mpt = hf.MptForCausalLM(hf.MptConfig(vocab_size=11, d_model=96, n_heads=heads, n_layers=1, max_seq_len=9))
        home = importlib.import_module(type(mpt).__module__)
        slopes = qkv.sites(mpt)[0].geometry.slopes
        torch.testing.assert_close(
            torch.tensor(slopes)[:, None] * torch.arange(-8, 1), home.build_mpt_alibi_tensor(heads, 9)[:, 0]
        )


@pytest.mark.parametrize("kind", KINDS)
def test_copies_saved_folders_and_filled_caches_go_on(kind: str, tmp_path: Path) -> None:
    model, (ids, mask) = model_of(kind), padded()
    method = "h2o:budget=9"
    qkv.apply(model, method)
    want = generate(model, ids, mask)
    twin = copy.deepcopy(model)
    assert torch.equal(generate(twin, ids, mask), want)
    qkv.revert(twin)
    assert all("forward" not in m.__dict__ for m in twin.modules()) and seam_of(
        twin.get_submodule(qkv.sites(twin)[0].name)
    )
    assert torch.equal(generate(model, ids, mask), want)
    qkv.save(model, tmp_path / "out")
    back = qkv.load(tmp_path / "out", model=model_of(kind))
    assert torch.equal(generate(back, ids, mask), want)
    with torch.no_grad():
        cache = model(ids[1:], use_cache=True).past_key_values
        qkv.hosts.save_cache(model, cache, tmp_path / "cache")
        again = qkv.hosts.load_cache(model, tmp_path / "cache").cache
        step = torch.tensor([[7]])
        a, b = (model(step, past_key_values=c).logits for c in (cache, again))
        assert torch.equal(a, b)


def test_falcon_with_biases_says_what_stands_in_the_way() -> None:
    model = family("falcon", alibi=True)
    with pytest.raises(Refused, match="rounds to bfloat16"):
        qkv.apply(model, "full")
