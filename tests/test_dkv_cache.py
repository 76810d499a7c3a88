"""dKV-Cache against its definition, and the exact cases of its page; the small diffusion model and its training."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

import qkv
from qkv.core.decoding import Sampling
from qkv.core.errors import InvalidInput, InvalidParameter, Refused, SavedDataError, TrainingError
from qkv.decode.dkv_cache import DelayedKVCache, Slots, masked_diffusion_generate, reference
from qkv.models.language import masked_diffusion as lm
from qkv.models.language.training import HELD_OUT, Training, draw, train

MASK, WORDS, PROMPT, NEW = 29, 29, 7, 24


def tiny(layers: int = 3, seed: int = 0) -> lm.MaskedDiffusionLM:
    """Random, in float64, sharp enough that its decisions are no coin flips."""
    config = lm.MaskedDiffusionConfig(
        vocabulary=WORDS + 1, mask_token=MASK, width=24, layers=layers, heads=6, kv_heads=3, length=64
    )
    model = lm.MaskedDiffusionLM(config, seed).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(12 if p.ndim == 2 else 1)
    return model


def prompts(rows: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, WORDS, (rows, PROMPT), generator=torch.Generator().manual_seed(seed))


def generate(model, prompt, cache, steps=12, block=12, new=NEW, **more):
    seen = []
    out = masked_diffusion_generate(
        model, prompt, max_new_tokens=new, steps=steps, block=block, cache=cache, watch=seen.append, **more
    )
    return out, seen


CACHES = [
    None,
    DelayedKVCache(refresh=3),
    DelayedKVCache(refresh=4, delay=0),
    DelayedKVCache(refresh=100, delay=2),
    DelayedKVCache(variant="pd", refresh=3),
    DelayedKVCache(variant="prefill"),
    DelayedKVCache(variant="greedy", refresh=2),
    DelayedKVCache(variant="greedy", refresh=5, window=3, delay=2),
    DelayedKVCache(variant="greedy", refresh=4, window=0, delay=0),
]


@pytest.mark.parametrize("cache", CACHES, ids=str)
def test_every_row_of_a_batch_equals_the_definition(cache):
    model, prompt = tiny(), prompts(3)
    out, seen = generate(model, prompt, cache, order="random" if cache is None else None)
    orders = None
    if cache is None or cache.variant == "greedy":
        orders = [[[p for m in seen if m.block == j for p in m.chosen[r].tolist()] for j in (0, 1)] for r in range(3)]
    for r in range(3):
        want = reference(
            model, prompt[r].tolist(), NEW, cache, steps=12, block=12, orders=None if orders is None else orders[r]
        )
        assert out.sequences[r].tolist() == want, f"row {r}"
    assert (out.tokens != MASK).all() and out.lengths == (NEW,) * 3
    assert torch.equal(out.sequences[:, :PROMPT], prompt)


@pytest.mark.parametrize("variant", ["decode", "greedy"])
def test_refreshing_every_step_is_no_cache_at_all(variant):
    model, prompt = tiny(), prompts()
    order = "random" if variant == "greedy" else "confidence"
    plain, want = generate(model, prompt, None, order=order, seed=3)
    cached, got = generate(model, prompt, DelayedKVCache(variant=variant, refresh=1), seed=3)
    assert torch.equal(plain.sequences, cached.sequences)
    for a, b in zip(want, got, strict=True):
        assert torch.equal(a.logits, b.logits) and torch.equal(a.chosen, b.chosen)
    assert plain.notes["rows"] == cached.notes["rows"] == plain.notes["full_rows"]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8)], ids=["greedy", "sampled"])
def test_one_layer_is_exact_with_delay_one_and_not_with_delay_zero(sampling):
    """In one layer keys and values depend on token and place alone: nothing but a stale mask can go wrong."""
    model, prompt = tiny(layers=1), prompts()
    plain, want = generate(model, prompt, None, steps=24, block=24, sampling=sampling, seed=5)
    late, got = generate(model, prompt, DelayedKVCache(refresh=1000), steps=24, block=24, sampling=sampling, seed=5)
    soon, bad = generate(
        model, prompt, DelayedKVCache(refresh=1000, delay=0), steps=24, block=24, sampling=sampling, seed=5
    )
    assert torch.equal(plain.sequences, late.sequences)
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(a.logits, b.logits, rtol=0, atol=1e-10)
    assert late.notes["rows"] < 0.65 * plain.notes["rows"]
    assert float((want[2].logits - bad[2].logits).nan_to_num(0, 0, 0).abs().max()) > 1e-2
    assert not torch.equal(plain.sequences, soon.sequences)


@pytest.mark.parametrize("delay", [0, 1, 2])
def test_computed_and_kept_rows_make_up_all_positions(delay):
    model, prompt, c = tiny(), prompts(), 5
    length, seen = PROMPT + NEW, generate(model, prompt, DelayedKVCache(refresh=c, delay=delay))[1]
    assert [m.step for m in seen] == [*range(6), *range(6)]
    for m in seen:
        if m.step <= delay or m.step % c == 0:
            assert m.rows is None
            continue
        # D_{i-1-d}: what was known `delay` selections before this step.
        kept = next(x for x in seen if (x.block, x.step) == (m.block, m.step - delay)).known
        assert m.rows.shape == (2, length - int(kept[0].sum()))
        for row, keep in zip(m.rows.tolist(), kept, strict=True):
            assert len(set(row)) == len(row) and set(row) == set((~keep).nonzero().flatten().tolist())
            assert set(row) | set(keep.nonzero().flatten().tolist()) == set(range(length))


def test_the_prompt_counts_as_decoded_and_a_block_starts_anew():
    seen = generate(tiny(), prompts(), DelayedKVCache(refresh=100, delay=0))[1]
    assert seen[0].rows is None and seen[6].rows is None, "the first step of a block computes everything"
    assert not bool((seen[1].rows < PROMPT).any()), "the prompt is kept from the first step on"
    assert not bool((seen[7].rows < PROMPT + 12).any()), "so are the blocks before"
    assert bool(seen[6].known[:, : PROMPT + 12].all()) and not bool(seen[6].known[:, PROMPT + 12 :].any())


def test_pd_never_computes_the_prompt_again_and_prefill_keeps_nothing_else():
    for variant in ("pd", "prefill"):
        seen = generate(tiny(), prompts(), DelayedKVCache(variant=variant, refresh=3))[1]
        for m in seen:
            assert (m.rows is None) == (m.step == 0)
            if m.rows is not None:
                assert not bool((m.rows < PROMPT).any())
                assert (variant == "pd" and m.step not in (1, 3)) == (m.rows.shape[1] < NEW)


def test_greedy_computes_targets_their_predecessors_and_a_window():
    seen = generate(tiny(), prompts(), DelayedKVCache(variant="greedy", refresh=100, window=3), steps=24, block=24)[1]
    for before, m in itertools.pairwise(seen):
        for r, row in enumerate(m.rows.tolist()):
            target, last = m.chosen[r].item(), before.chosen[r].item()
            free = set((~m.known[r]).nonzero().flatten().tolist()) - {target}
            near = sorted(free, key=lambda p, t=target: (abs(p - t), p > t))[:3]
            assert set(row) == {target, last, *near} and len(row) == 2 + min(3, len(free))


def test_one_step_caches_nothing():
    out, seen = generate(tiny(), prompts(), DelayedKVCache(), steps=1, block=NEW)
    plain, _ = generate(tiny(), prompts(), None, steps=1, block=NEW)
    assert len(seen) == out.passes == 1 and seen[0].rows is None and torch.equal(out.sequences, plain.sequences)


@pytest.mark.parametrize("cache", CACHES[1:], ids=str)
def test_what_is_not_computed_is_never_chosen(cache):
    for m in generate(tiny(), prompts(), cache)[1]:
        assert not bool(m.known.gather(1, m.chosen).any()), "a known position is not chosen again"
        low = PROMPT + 12 * m.block
        assert bool(((m.chosen >= low) & (m.chosen < low + 12)).all()), "nor one of another block"
        if m.rows is not None:
            assert all(set(c) <= set(r) for c, r in zip(m.chosen.tolist(), m.rows.tolist(), strict=True))


@torch.no_grad()
def test_keys_kept_rotated_equal_keys_rotated_when_read():
    """A token never moves, so it makes no difference when its key is turned; nor in which order keys are read."""
    model, ids = tiny(), prompts(2, seed=9)
    place = torch.arange(PROMPT)[None].expand(2, -1)
    angle = torch.arange(PROMPT, dtype=torch.float64)[:, None] * 10000.0 ** (-torch.arange(0, 4, 2) / 4.0)
    turn = angle.cos()[None, None], angle.sin()[None, None]
    back = turn[0], -turn[1]

    def at_read(layer, q, k, v):
        bare = lm.rotate(k, back)  # as k_proj gave it
        order = torch.randperm(PROMPT, generator=torch.Generator().manual_seed(layer))
        keys = lm.rotate(bare[:, :, order], (turn[0][:, :, order], turn[1][:, :, order]))
        return lm.everything(layer, q, keys, v[:, :, order])

    torch.testing.assert_close(model(ids, place, at_read), model(ids), rtol=0, atol=1e-6)


def test_slots_overwrite_in_place_and_count_their_bytes():
    slots = Slots(None, True)
    draw = lambda n, seed: torch.randn(2, 3, n, 4, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    slots.attend(0, draw(9, 0), draw(9, 1), draw(9, 2))
    slots.rows = torch.tensor([[1, 5], [0, 8]])
    fresh = draw(2, 3)
    before = [x.data_ptr() for x in slots.held[0]]
    slots.attend(0, draw(2, 4), fresh, draw(2, 5))
    assert [x.data_ptr() for x in slots.held[0]] == before and slots.bytes() == 2 * 2 * 3 * 9 * 4 * 4
    assert torch.equal(slots.held[0][0][1, :, 8], fresh[1, :, 1]) and torch.equal(
        slots.held[0][0][0, :, 5], fresh[0, :, 1]
    )


@pytest.mark.gpu
@pytest.mark.parametrize("cache", [c for c in CACHES if c is None or c.variant != "greedy"], ids=str)
def test_on_a_gpu_it_is_the_same(cache):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model, prompt = tiny(), prompts(3)
    want, _ = generate(model, prompt, cache)
    got, _ = generate(model.to("cuda"), prompt.to("cuda"), cache)
    assert torch.equal(got.sequences.cpu(), want.sequences)
    hot, _ = generate(model, prompt.to("cuda"), cache, sampling=Sampling(1.0), seed=1)
    assert (hot.tokens != MASK).all()


# -- prompts, ends, refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", CACHES, ids=str)
def test_a_left_padded_row_is_the_row_alone(cache):
    model, prompt = tiny(), prompts()
    mask = torch.ones_like(prompt)
    mask[1, :3] = 0
    order = "confidence" if cache is None or cache.variant != "greedy" else "random"
    new = 1 if order == "random" else NEW  # random orders of a batch are not those of a row alone
    both, _ = generate(model, prompt, cache, 1 if new == 1 else 12, 1 if new == 1 else 12, new, attention_mask=mask)
    alone, _ = generate(model, prompt[1:, 3:], cache, 1 if new == 1 else 12, 1 if new == 1 else 12, new)
    assert both.tokens[1].tolist() == alone.tokens[0].tolist()
    assert torch.equal(both.sequences[:, :PROMPT], prompt)


def test_masks_inside_the_prompt_are_filled_in():
    model, prompt = tiny(), prompts()
    text = torch.cat((prompt, prompt.flip(0)), 1)
    text[0, [2, 3, 9, 10]] = MASK
    text[1, [1, 4, 5, 12]] = MASK
    for cache in (None, DelayedKVCache(refresh=2), DelayedKVCache(variant="pd", refresh=2)):
        out, _ = generate(model, text, cache, steps=4, block=2, new=0)
        assert not bool((out.sequences == MASK).any()) and out.lengths == (0, 0)
        assert torch.equal(out.sequences[text != MASK], text[text != MASK])
        for r in range(2):
            assert out.sequences[r].tolist() == reference(model, text[r].tolist(), 0, cache, steps=4, block=2)


def test_a_row_ends_with_its_end_token_and_the_rest_is_that_token():
    model, prompt = tiny(), prompts()
    plain, _ = generate(model, prompt, None)
    end = int(plain.tokens[0, 9])
    out, seen = generate(model, prompt, None, eos_token_id=end)
    for r in range(2):
        line = plain.tokens[r].tolist()
        length = line.index(end) + 1 if end in line else NEW
        assert out.lengths[r] == length and out.tokens[r, :length].tolist() == line[:length]
        assert (out.tokens[r, length:] == end).all()
    one, seen = generate(model, prompt[:1], None, eos_token_id=end)
    assert len(seen) == 6, "the second block is not begun once the row has ended"
    assert one.tokens[0].tolist() == out.tokens[0].tolist()


def test_noise_is_the_same_with_every_cache():
    """So that samples with and without a cache can be compared: one layer, where the cache is exact."""
    model, prompt = tiny(layers=1), prompts()
    outs = [
        generate(model, prompt, c, sampling=Sampling(1.0), seed=4)[0].sequences
        for c in (None, DelayedKVCache(refresh=99))
    ]
    other = generate(model, prompt, None, sampling=Sampling(1.0), seed=5)[0].sequences
    assert torch.equal(*outs) and not torch.equal(outs[0], other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 5}, "do not divide over 2 blocks"),
        ({"block": 7}, "do not divide into blocks of 7"),
        ({"steps": 48}, "would unmask nothing"),
        ({"steps": 0}, "at least 1"),
        ({"cache": DelayedKVCache(variant="greedy"), "order": "confidence"}, "takes order='random'"),
        ({"order": "left"}, "must be 'confidence' or 'random'"),
        ({"new": 1000}, "positions this model knows"),
        ({"prompt": torch.tensor([[1, MASK, 2], [3, 4, 5]])}, "must compute the same number"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    call = {"model": tiny(), "prompt": prompts(), "cache": None} | change
    with pytest.raises((Refused, InvalidInput), match=message):
        generate(**call)


def test_bad_parameters_are_refused():
    for values in ({"refresh": 0}, {"window": -1}, {"delay": -1}, {"variant": "fast"}):
        with pytest.raises(InvalidParameter):
            DelayedKVCache(**values)


# -- models of transformers -------------------------------------------------------------------------------------------


def bert(layers: int) -> BertForMaskedLM:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=WORDS + 1, hidden_size=24, num_hidden_layers=layers, num_attention_heads=3, intermediate_size=40,
        max_position_embeddings=64, initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    return BertForMaskedLM(config).double().eval()


def test_a_bert_of_transformers_is_driven_through_its_sites():
    one, prompt = bert(1), prompts()
    plain, _ = generate(one, prompt, None, mask_token=MASK)
    late, _ = generate(one, prompt, DelayedKVCache(refresh=99), mask_token=MASK)
    soon, _ = generate(one, prompt, DelayedKVCache(refresh=99, delay=0), mask_token=MASK)
    assert torch.equal(plain.sequences, late.sequences) and not torch.equal(plain.sequences, soon.sequences)
    deep = bert(3)
    state = {k: v.clone() for k, v in deep.state_dict().items()}
    outs = [generate(deep, prompt, DelayedKVCache(refresh=c), mask_token=MASK)[0] for c in (1, 4)]
    assert torch.equal(outs[0].sequences, generate(deep, prompt, None, mask_token=MASK)[0].sequences)
    assert outs[1].notes["rows"] < outs[0].notes["rows"]
    assert all(torch.equal(v, state[k]) for k, v in deep.state_dict().items()) and "_qkv" not in deep.__dict__
    with pytest.raises(InvalidInput, match="mask_token="):
        generate(deep, prompt, None)


def test_a_llama_without_its_causal_mask_is_a_diffusion_model():
    """LLaDA's shape: rotary positions, grouped heads, nothing causal."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS + 1, hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=6,
        num_key_value_heads=3, initializer_range=0.3, is_causal=False, mask_token_id=MASK, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    plain, _ = generate(model, prompts(), None)
    late, _ = generate(model, prompts(), DelayedKVCache(refresh=99))
    soon, _ = generate(model, prompts(), DelayedKVCache(refresh=99, delay=0))
    assert torch.equal(plain.sequences, late.sequences) and not torch.equal(plain.sequences, soon.sequences)


def test_models_that_cannot_be_cached_are_refused():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS + 1, hidden_size=24, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(Refused, match="bidirectional"):
        generate(LlamaForCausalLM(config), prompts(), None, mask_token=MASK)
    with (
        pytest.raises(Refused, match="carries sliding-window"),
        qkv.applied(bert(1), "sliding-window:window=3") as model,
    ):
        generate(model, prompts(), None, mask_token=MASK)


def test_a_model_that_ignores_positions_is_found_out():
    model = bert(1)
    model.bert.embeddings.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"position_ids": None}), with_kwargs=True
    )
    with pytest.raises(Refused, match="other logits when its rows come in another order"):
        generate(model, prompts(), None, mask_token=MASK)


# -- the model and its training ---------------------------------------------------------------------------------------

TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs.\n" * 60
SMALL = lm.MaskedDiffusionConfig(width=32, layers=2, heads=2, kv_heads=1, length=48)
SHORT = Training(steps=40, batch=8, every=10, warmup=5, learning_rate=5e-3)


def test_a_model_is_saved_and_loaded_bit_for_bit(tmp_path):
    model = lm.MaskedDiffusionLM(SMALL, 3).eval()
    model.save(tmp_path / "m")
    ids = lm.encode("hello")
    assert torch.equal(lm.MaskedDiffusionLM.load(tmp_path / "m")(ids), model(ids))
    assert lm.decode(ids[0]) == "hello" and lm.decode([104, 256, 105]) == "h_i"
    manifest = (tmp_path / "m" / "qkv.json").read_text()
    (tmp_path / "m" / "qkv.json").write_text(manifest.replace('"layers": 2', '"layers": 3'))
    with pytest.raises(SavedDataError, match="weights do not fit"):
        lm.MaskedDiffusionLM.load(tmp_path / "m")
    (tmp_path / "m" / "qkv.json").write_text(manifest.replace('"width": 32', '"width": "wide"'))
    with pytest.raises(SavedDataError, match="configuration"):
        lm.MaskedDiffusionLM.load(tmp_path / "m")
    with pytest.raises(SavedDataError):
        lm.MaskedDiffusionLM.load(tmp_path / "nothing")


def test_shapes_that_make_no_model_are_refused():
    for values in (
        {"width": 30, "heads": 4},
        {"heads": 4, "kv_heads": 3},
        {"layers": 0},
        {"mask_token": 300},
        {"width": 2.5},
    ):
        with pytest.raises(InvalidParameter):
            lm.MaskedDiffusionConfig(**values)


def test_training_learns_and_goes_on_exactly_where_it_was_cut_off(tmp_path):
    whole = train(SMALL, TEXT, tmp_path / "whole", SHORT)
    assert [r["step"] for r in whole.records] == [10, 20, 30, 40]
    assert whole.records[-1]["held_out"] < 0.85 * whole.records[0]["held_out"]

    def cut(done, total, note):
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(SMALL, TEXT, tmp_path / "cut", SHORT, progress=cut)
    assert not (tmp_path / "cut").exists()
    again = train(SMALL, TEXT, tmp_path / "cut", SHORT)
    assert all(torch.equal(v, whole.model.state_dict()[k]) for k, v in again.model.state_dict().items())
    drop = lambda rs: [{k: v for k, v in r.items() if k != "seconds"} for r in rs]  # noqa: E731
    assert drop(again.records) == drop(whole.records)
    with pytest.raises(TrainingError, match="another training"):
        train(SMALL, TEXT, tmp_path / "cut", Training(steps=41, batch=8))
    with pytest.raises(TrainingError, match="another text"):
        train(SMALL, TEXT[1:], tmp_path / "cut", SHORT)


def test_batches_mask_at_their_rate_and_leave_prompts_clean():
    data = torch.tensor(list(TEXT.encode()))
    batch = draw(data, SMALL, Training(batch=400, prompts=0.0), 3)
    assert torch.equal(batch.noisy, draw(data, SMALL, Training(batch=400, prompts=0.0), 3).noisy)
    hidden = batch.noisy == 256
    assert torch.equal(batch.noisy[~hidden], batch.clean[~hidden]) and bool(hidden.any(1).all())
    torch.testing.assert_close(hidden.float().mean(1), batch.rate[:, 0], rtol=0, atol=0.35)
    assert abs(float(hidden.float().mean()) - 0.5) < 0.03
    some = draw(data, SMALL, Training(batch=400, prompts=1.0), 3).noisy == 256
    assert float(some[:, :8].float().mean()) < 0.5 * float(some[:, -8:].float().mean())


def test_a_text_too_short_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match=f"needs {(HELD_OUT + 1) * 48}"):
        train(SMALL, TEXT[:300], tmp_path / "m", SHORT)


def test_the_command_trains_from_a_file(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    command = [sys.executable, "-m", "qkv.models.language.training", "text.txt", "out", "--device", "cpu", "--steps", "2",
               "--batch", "2", "--width", "16", "--layers", "1", "--heads", "2", "--kv_heads", "2", "--length", "16"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "2/2  loss" in done.stdout and lm.MaskedDiffusionLM.load(tmp_path / "out").config.width == 16
