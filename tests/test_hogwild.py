"""Workers on one cache: exact where nothing is shared or where one worker reads it all, and everything else as defined."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.models.llama import modeling_llama

import qkv
from qkv.caches._stores.shared import CacheBlock, SharedCache, turned
from qkv.core.cache import Rope
from qkv.core.decoding import Sampling
from qkv.core.errors import InvalidInput, InvalidParameter, Refused, StateError
from qkv.decode.hogwild import Engine, Hogwild, hogwild_generate, never_written, sentence_ends
from qkv.testing._tiny import decoder, snapshot

VOCABULARY = 61
FORMS = ("queries", "keys")


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def plain(model, tokens: list[int]) -> Tensor:
    """Logits behind a text, by one forward pass: [1, V]."""
    return model(torch.tensor([tokens]), use_cache=False).logits[:, -1]


def close(a: Tensor, b: Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def model():
    return decoder()


def split(tokens: list[int], *at: int) -> list[list[int]]:
    edges = [0, *at, len(tokens)]
    return [tokens[a:b] for a, b in itertools.pairwise(edges)]


# -- blocks -----------------------------------------------------------------------------------------------------------

ROPE = Rope(100.0 ** (-torch.arange(0, 6, 2) / 6.0))


def filled(length: int, seed: int, layers: int = 2) -> CacheBlock:
    block = CacheBlock([ROPE] * layers)
    g = torch.Generator().manual_seed(seed)
    for layer in range(layers):
        block.write(layer, *(torch.randn(1, 3, length, w, generator=g, dtype=torch.float64) for w in (8, 5)))
    block.length = length
    return block


def test_turns_add_up_and_the_original_place_gives_the_original_key():
    x = torch.randn(2, 3, 7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    at = lambda n: torch.full((1, 1, 1), n)  # noqa: E731
    close(ROPE.rotate(ROPE.rotate(x, at(3)), at(8)), ROPE.rotate(x, at(11)), 1e-6)
    assert torch.equal(ROPE.rotate(x, at(0)), x)
    close(ROPE.rotate(ROPE.rotate(x, at(-19)), at(19)), x, 1e-6)
    angle = 5 * ROPE.frequencies.double()
    close(turned(x, angle.cos(), angle.sin()), ROPE.rotate(x, at(5)), 1e-6)
    assert torch.equal(turned(x, angle.cos(), angle.sin())[..., 6:], x[..., 6:]), "what is not rotary stays"


def test_appending_a_block_concatenates_and_turns():
    a, b = filled(5, 1), filled(40, 2)
    keys, values = (x.clone() for x in a.layer(1))
    more_k, more_v = b.layer(1)
    a.append_from(b)
    assert a.length == 45 and b.length == 40
    k, v = a.layer(1)
    assert torch.equal(k[:, :, :5], keys) and torch.equal(v, torch.cat((values, more_v), 2))
    close(k[:, :, 5:], ROPE.rotate(more_k, torch.full((1, 1, 1), 5)), 1e-12)
    a.append_from(b, 3, 7)
    assert a.length == 49
    close(a.layer(1)[0][:, :, 45:], ROPE.rotate(more_k[:, :, 3:7], torch.full((1, 1, 1), 42)), 1e-12)
    held = a.bytes()
    a.clear()
    assert a.length == 0 and a.bytes() == held
    with pytest.raises(InvalidInput, match="itself"):
        b.append_from(b)
    with pytest.raises(InvalidInput, match=r"41"):
        a.append_from(b, 0, 41)
    with pytest.raises(StateError, match="layer 0"):
        CacheBlock([ROPE]).layer(0)


def test_layouts_that_cannot_be_are_refused():
    a, b, c = (filled(3, i) for i in range(3))
    for layout, write, message in (
        ([[a, b], [a, c]], [b], "2 workers need as many"),
        ([], [], "0 workers"),
        ([[a, b], [a, b]], [b, b], "same block"),
        ([[a, b], [a, c]], [b, b], "does not read"),
        ([[a, b], [c, a]], [a, a], "middle"),
        ([[a, a, b]], [b], "twice"),
        ([[a, CacheBlock([Rope(ROPE.frequencies)] * 2)]], None, "different models"),
    ):
        with pytest.raises(Refused, match=message):
            SharedCache(layout, [layout[0][-1]] if write is None else write)
    with pytest.raises(InvalidInput, match="at least one token"):
        SharedCache([[a, b], [a, c]], [b, c]).begin([1, 0])


@pytest.mark.parametrize("counts", [(1, 1, 1), (3, 1, 5)])
def test_turning_queries_equals_turning_keys(counts):
    """Three workers, blocks seen by all, by two, by one; columns padded on the left."""
    out = {}
    for form in FORMS:
        blocks = [filled(n, i) for i, n in enumerate((6, 4, 3, 2, 0))]
        common, others, a, b, c = blocks
        cache = SharedCache([[common, others, b, a], [common, a, b], [others, c]], [a, b, c], form)
        positions = cache.begin(counts, dtype=torch.float64)
        n = max(counts)
        totals = [15 + counts[0] + counts[1], 11 + counts[0] + counts[1], 4 + counts[2]]
        for row, total, count in zip(positions.tolist(), totals, counts, strict=True):
            assert row == [0] * (n - count) + list(range(total - count, total))
        g = torch.Generator().manual_seed(9)
        q, k, v = (torch.randn(3, h, n, w, generator=g, dtype=torch.float64) for h, w in ((6, 8), (3, 8), (3, 5)))
        got = [cache.attend(layer, q, k, v, 0.3) for layer in (0, 1)]
        real = torch.tensor([[i >= n - c for i in range(n)] for c in counts])[:, None, :, None]
        out[form] = torch.stack(got).masked_fill(~real, 0.0)
        assert [x.length for x in blocks] == [6, 4, 3, 2, 0], "a step counts once it is committed"
        cache.commit()
        assert [x.length for x in blocks] == [6, 4, 3 + counts[0], 2 + counts[1], counts[2]]
    close(out["queries"], out["keys"], 1e-6)


# -- one model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cuts", [(), (4,), (3, 9, 10)])
def test_one_worker_on_one_or_many_blocks_is_plain_generation(model, form, cuts):
    """Each block was computed with those before it in sight, so the logits are those of one cache; then token by token."""
    text = ids(17).tolist()
    want = {n: plain(model, text[:n]) for n in range(12, 18)}
    with Engine(model) as engine:
        blocks, parts = [], split(text[:12], *cuts)
        for part in parts:
            blocks.append(engine.block())
            logits = engine.step(SharedCache([blocks], [blocks[-1]], form), [part])
        close(logits, want[12])
        for i in range(12, 17):
            logits = engine.step(SharedCache([blocks], [blocks[-1]], form), [[text[i]]])
            close(logits, want[i + 1])
    if len(cuts) > 1:  # keys of a block at its place in the whole = local keys turned there
        k, _ = blocks[1].layer(2)
        with Engine(model) as engine:
            one = engine.block()
            engine.step(SharedCache([[one]], [one]), [text[:12]])
        offset = torch.full((1, 1, 1), len(parts[0]))
        close(engine.ropes[2].rotate(k, offset), one.layer(2)[0][:, :, len(parts[0]) :][:, :, : len(parts[1])], 1e-5)


def test_a_block_computed_alone_is_not_the_same(model):
    text = ids(12).tolist()
    with Engine(model) as engine:
        a, b = engine.block(), engine.block()
        engine.step(SharedCache([[a]], [a]), [text[:5]])
        engine.step(SharedCache([[b]], [b]), [text[5:11]])
        apart = engine.step(SharedCache([[a, b]], [b]), [text[11:]])
    assert float((apart - plain(model, text)).abs().max()) > 1e-2


def test_in_single_precision_too(model):
    single = decoder(dtype=torch.float32)
    text = ids(17).tolist()
    with Engine(single) as engine:
        a, b = engine.block(), engine.block()
        engine.step(SharedCache([[a]], [a]), [text[:9]])
        logits = engine.step(SharedCache([[a, b]], [b]), [text[9:]])
    want = plain(model, text)
    assert float((logits - want).abs().max()) < 1e-4 * float(want.abs().max())
    assert a.layer(0)[0].dtype == torch.float32


def pair(engine, form="queries", sees=True, a=(3, 4, 5), b=(6, 7), then=(8, 9)):
    """Common text, two workers with prompts of different length, one step each: logits [2, V] of that step."""
    common, x, y = (engine.block() for _ in range(3))
    engine.step(SharedCache([[common]], [common], form), [[1, 2, 3, 4]])
    layout = [[common, y, x], [common, x, y]] if sees else [[common, x], [common, y]]
    engine.step(SharedCache(layout, [x, y], form), [list(a), list(b)])
    return engine.step(SharedCache(layout, [x, y], form), [[t] for t in then])


@pytest.mark.parametrize("form", FORMS)
def test_workers_see_each_others_token_of_the_same_step(model, form):
    with Engine(model) as engine:
        base, changed = pair(engine, form), pair(engine, form, then=(8, 10))
        assert float((base[0] - changed[0]).abs().max()) > 1e-2, "A reads what B feeds in this very step"
        alone, other = (pair(engine, form, sees=False, then=t) for t in ((8, 9), (8, 10)))
        assert torch.equal(alone[0], other[0]), "and not when B's block is not among A's"
    close(alone, torch.cat((plain(model, [1, 2, 3, 4, 3, 4, 5, 8]), plain(model, [1, 2, 3, 4, 6, 7, 9]))))


@torch.no_grad()
def test_a_step_of_two_is_as_written_out(model):
    """The definition in one place: A's keys of the step are [common, B, A], B's [common, A, B], in every layer."""
    with Engine(model) as engine:
        got = pair(engine)
        by_keys = pair(engine, "keys")
    close(got, by_keys)


def test_without_turning_shared_blocks_everything_changes(model):
    """Negative control: raw local positions."""
    with Engine(model) as engine:
        right = pair(engine)
        still = Rope(torch.zeros_like(engine.ropes[0].frequencies))
        engine.ropes = tuple(still for _ in engine.ropes)
        wrong = pair(engine)
    assert float((right - wrong).abs().max()) > 0.2 * float(right.abs().max())


def test_partial_rotary_embeddings():
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=48, intermediate_size=56, num_hidden_layers=2, num_attention_heads=3,
        max_position_embeddings=64, rotary_pct=0.25, initializer_range=0.2,
    )  # fmt: skip
    neox, text = GPTNeoXForCausalLM(config).double().eval(), ids(12).tolist()
    want = plain(neox, text)
    with Engine(neox) as engine:
        engine.probe()
        a, b = engine.block(), engine.block()
        engine.step(SharedCache([[a]], [a]), [text[:5]])
        close(engine.step(SharedCache([[a, b]], [b]), [text[5:]]), want)


# -- generation -------------------------------------------------------------------------------------------------------


def rows(outcome):
    return [row[:n].tolist() for row, n in zip(outcome.tokens, outcome.lengths, strict=True)]


@torch.no_grad()
def greedy(model, text: list[int], new: int) -> list[int]:
    out = list(text)
    for _ in range(new):
        out.append(int(plain(model, out).argmax()))
    return out[len(text) :]


def test_workers_that_never_share_are_workers_alone(model):
    prompts = [ids(5, seed=1).tolist(), ids(9, seed=2).tolist(), ids(3, seed=3).tolist()]
    common = ids(6, seed=4).tolist()
    for form in FORMS:
        out = hogwild_generate(model, prompts, workers=3, layout="private", max_steps=8, common=common, form=form)
        assert rows(out) == [greedy(model, common + p, 8) for p in prompts]
        assert out.passes == 1 + 8


@pytest.mark.parametrize("layout", ["contiguous", "interleaved", "combined"])
def test_one_worker_is_plain_generation_in_any_layout(model, layout):
    prompt = ids(7, seed=5).tolist()
    ends = None if layout == "contiguous" else lambda step: False
    out = hogwild_generate(model, prompt, workers=1, layout=layout, max_steps=9, ends=ends)
    assert rows(out) == [greedy(model, prompt, 9)]


def test_both_forms_write_the_same(model):
    prompts = [ids(5, seed=1).tolist(), ids(9, seed=2).tolist()]
    outs = [rows(hogwild_generate(model, prompts, max_steps=12, form=form, seed=1, sampling=s))
            for s in (Sampling(), Sampling(1.2)) for form in FORMS]  # fmt: skip
    assert outs[0] == outs[1] and outs[2] == outs[3] and outs[0] != outs[2]


def test_what_one_writes_changes_what_the_other_writes(model):
    prompts, moments = [ids(5, seed=1).tolist(), ids(5, seed=2).tolist()], []
    for layout in ("contiguous", "combined", "private", "interleaved"):
        seen = []
        for word in (7, 8):
            hogwild_generate(
                model, prompts, layout=layout, max_steps=4, forced={0: [1, 2, 3, 4], 1: [word] * 4}, watch=seen.append
            )
        assert [m.fed for m in seen[:4]][1:] == [((t,), (7,)) for t in (1, 2, 3)]
        changed = not torch.equal(seen[1].logits[0], seen[5].logits[0])
        assert changed == (layout in ("contiguous", "combined")), layout
        moments.append(seen)
    assert moments[0][0].workers == (0, 1)


@pytest.mark.parametrize("layout", ["interleaved", "combined"])
def test_a_finished_step_becomes_history(model, layout):
    """Every fourth token ends a step: it moves to the common block, and the worker opens the next one."""
    seen = []
    out = hogwild_generate(
        model, [[1, 2, 3], [4, 5]], layout=layout, max_steps=10, ends=lambda step: len(step) == 4,
        openings=[[50, 51], [52]], watch=seen.append,
    )  # fmt: skip
    assert out.lengths == (10, 10) and [len(t) for _, t in out.notes["history"]] == [4] * 4
    assert [w for w, _ in out.notes["history"]] == [0, 1, 0, 1], "in finishing order"
    assert [t for w, ts in out.notes["history"] if w == 0 for t in ts] == rows(out)[0][:8]
    fed = [m.fed for m in seen]
    assert fed[0] == ((1, 2, 3), (4, 5)) and fed[5] == ((50, 51), (52,))
    assert len(seen) == 10 + 2, "a step that ends costs a pass without a new token"
    assert out.passes == len(seen)


def test_the_history_holds_what_was_fed(model):
    """After a move, A reads common text, both finished steps in order, and its opening: as one text, were it computed so."""
    seen = []
    hogwild_generate(
        model, [[1, 2, 3], [4, 5]], layout="interleaved", max_steps=3, ends=lambda step: len(step) == 2,
        openings=[[50], [51]], forced={0: [10, 11, 12], 1: [20, 21, 22]}, common=[7, 8, 9], watch=seen.append,
    )  # fmt: skip
    after = seen[3]
    with Engine(model) as engine:
        common, a, b = (engine.block() for _ in range(3))
        engine.step(SharedCache([[common]], [common]), [[7, 8, 9]])
        for part_a, part_b in (([1, 2, 3], [4, 5]), ([10], [20]), ([11], [21])):
            engine.step(SharedCache([[common, a], [common, b]], [a, b]), [part_a, part_b])
        common.append_from(a)
        a.clear()
        common.append_from(b)
        b.clear()
        assert common.length == 3 + 5 + 4
        want = engine.step(SharedCache([[common, a], [common, b]], [a, b]), [[50], [51]])
    close(after.logits, want, 1e-9)


def test_now_and_then_the_work_is_questioned(model):
    class Words:
        """Letters for tokens: enough of a tokenizer for openings."""

        bos_token_id, eos_token_id = None, 60
        letters = "\n.ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz*[]:# "[:61]

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [max(0, self.letters.find(c)) for c in text]}

        def decode(self, tokens, skip_special_tokens=False):
            return "".join(self.letters[t] for t in tokens)

        def get_vocab(self):
            return {c: i for i, c in enumerate(self.letters)}

    words, seen = Words(), []
    script = words("Aa.\n\nBb.\n\nCc.\n\nDd")["input_ids"]
    out = hogwild_generate(
        model,
        "Go.\n\n",
        max_steps=len(script),
        tokenizer=words,
        forced={0: script, 1: script},
        check_every=8,
        headers=False,
        watch=seen.append,
    )
    assert out.notes["ended"] == "written"
    fed = [words.decode(m.fed[0]) for m in seen if len(m.fed[0]) > 1]
    said = [words.decode(words(f"**Alice [{i}]:**")["input_ids"]) for i in range(1, 5)]
    ask = words.decode(words(" Is anybody else already doing this? (yes/no):")["input_ids"])
    assert fed == [said[0], said[1], said[2] + ask, said[3]]
    assert out.notes["names"] == ["Alice", "Bob"] and [len(t) for _, t in out.notes["history"]] == [5] * 6
    assert words.letters.index("#") in never_written(words) and 60 in never_written(words)
    # The answer is looked for after every step, and asked for at the end.
    found = hogwild_generate(model, "Go.\n\n", max_steps=len(script), tokenizer=words, forced={0: script, 1: script},
                             answered=lambda text: "Bb." in text)  # fmt: skip
    assert found.notes["ended"] == "answered" and found.lengths == (10, 10)
    asked = hogwild_generate(model, "Go.\n\n", max_steps=4, tokenizer=words, finish="So:", finish_tokens=3)
    assert asked.notes["ended"] == "written" and 0 < len(asked.notes["answer"]) <= 3
    alone = asked.passes - 4 - len(asked.notes["answer"])
    assert alone in (3, 4), "the prompt and two headers before, one token a pass after, perhaps the end token"


def test_sentences_end_where_a_paragraph_does():
    ends = sentence_ends(SimpleNamespace(decode="".join))
    for text, want in {
        "It is so.\n\n": True, 'He said "no!"\n\n': True, "It is so.\n": False, "and so\n\n": False, "It is so. ": False,
        "Is it?\n \n": False, "done:\n\n": True, "\n\n": False, "It is. So\n\n": False,
    }.items():  # fmt: skip
        assert ends(list(text)) == want, text


def test_nothing_forbidden_is_written(model):
    want = rows(hogwild_generate(model, [[1, 2, 3], [4, 5]], max_steps=6))
    banned = sorted({t for row in want for t in row})
    got = rows(hogwild_generate(model, [[1, 2, 3], [4, 5]], max_steps=6, forbid=banned))
    assert not {t for row in got for t in row} & set(banned)


def test_a_worker_that_ended_is_still_read(model):
    base = hogwild_generate(model, [[1, 2, 3], [4, 5]], layout="contiguous", max_steps=8)
    stop = rows(base)[1][2]
    out = hogwild_generate(model, [[1, 2, 3], [4, 5]], layout="contiguous", max_steps=8, eos_token_id=stop)
    first = rows(base)[1].index(stop)
    assert rows(out)[1] == rows(base)[1][: first + 1] and out.sequences.shape == base.sequences.shape
    assert rows(out)[0][: first + 1] == rows(base)[0][: first + 1]


def test_shared_blocks_are_held_once(model):
    common, prompts = ids(100, seed=8).tolist(), [[1, 2], [3, 4], [5, 6], [7, 8]]
    held = [
        hogwild_generate(model, prompts[:w], workers=w, layout=layout, max_steps=2, common=common).notes["bytes"]
        for w, layout in ((1, "contiguous"), (4, "contiguous"))
    ]
    assert held[1] < 2.2 * held[0], "four workers, one common text"


def test_the_model_is_left_alone_when_the_positions_run_out(model):
    before = snapshot(model)
    out = hogwild_generate(
        model, [[1, 2], [3, 4]], layout="interleaved", max_steps=20, common=ids(150).tolist(), ends=lambda step: True,
        openings=[[1] * 20, [2] * 20],
    )  # fmt: skip
    assert out.notes["ended"] == "positions" and max(out.lengths) < 20 and snapshot(model) == before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"prompts": [[1], [2], [3]]}, "3 prompts for workers=2"),
        ({"prompts": [[1], []]}, "at least one token"),
        ({"prompts": "hello"}, "tokenizer="),
        ({"prompts": [1, 2, 3]}, "an opening of its own"),
        ({"prompts": [1, 2, 3], "openings": [[1], []]}, "opening of worker 1"),
        ({"prompts": [[1], [2]], "finish": ""}, "about text"),
        ({"prompts": [[1], [2]], "common": [99]}, "outside the model's vocabulary"),
        ({"prompts": [[1], [2]], "layout": "contiguous", "ends": lambda step: True}, "no steps that end"),
        ({"prompts": [[1], [2]], "max_steps": 130}, "positions this model knows"),
        ({"prompts": [[1], [2]], "max_steps": 0}, "at least 1"),
    ],
)
def test_bad_input_is_refused(model, call, message):
    with pytest.raises((InvalidInput, Refused), match=message):
        hogwild_generate(model, **({"max_steps": 4} | call))


def test_bad_parameters_are_refused():
    for values in ({"workers": 0}, {"layout": "ring"}, {"form": "values"}, {"check_every": -1}):
        with pytest.raises(InvalidParameter):
            Hogwild(**values)


def small(cls, config, **more):
    torch.manual_seed(0)
    return cls(config(vocab_size=VOCABULARY, hidden_size=24, intermediate_size=24, num_hidden_layers=2,
                      num_attention_heads=3, num_key_value_heads=3, **more)).eval()  # fmt: skip


def test_models_whose_blocks_cannot_move_are_refused(monkeypatch):
    two = [[1, 2], [3, 4]]
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=24, n_layer=1, n_head=2, n_positions=64))
    with pytest.raises(Refused, match="no rotary embedding"):
        hogwild_generate(gpt2, two, max_steps=2)
    dynamic = small(
        LlamaForCausalLM, LlamaConfig, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    )
    with pytest.raises(Refused, match=r"depend on the length \(dynamic\)"):
        hogwild_generate(dynamic, two, max_steps=2)
    sliding = small(MistralForCausalLM, MistralConfig, sliding_window=8)
    with pytest.raises(Refused, match="sliding window of 8"):
        hogwild_generate(sliding, two, max_steps=2)
    with pytest.raises(Refused, match="carries streamingllm"), qkv.applied(decoder(), "streamingllm") as model:
        hogwild_generate(model, two, max_steps=2)

    def interleaved(q, k, cos, sin, unsqueeze_dim=1):
        def turn(x):
            half = cos.shape[-1] // 2
            c, s = (y[..., :half].unsqueeze(unsqueeze_dim) for y in (cos, sin))
            a, b = x[..., ::2], x[..., 1::2]
            return torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2)

        return turn(q), turn(k)

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", interleaved)
    with pytest.raises(Refused, match="rotation of halves"):
        hogwild_generate(small(LlamaForCausalLM, LlamaConfig), two, max_steps=2)


def test_scaled_attention_of_yarn_is_not_applied_again():
    """The model multiplies its cosines by a factor; a turn must not do so once more."""
    yarn = small(LlamaForCausalLM, LlamaConfig, rope_parameters={
        "rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 32},
        max_position_embeddings=128).double()  # fmt: skip
    assert abs(yarn.model.rotary_emb.attention_scaling - 1) > 0.05
    text = ids(12).tolist()
    want = plain(yarn, text)
    with Engine(yarn) as engine:
        engine.probe()
        a, b = engine.block(), engine.block()
        engine.step(SharedCache([[a]], [a]), [text[:5]])
        close(engine.step(SharedCache([[a, b]], [b]), [text[5:]]), want)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_on_a_gpu_it_is_the_same(form):
    """One token per worker runs in the decode kernel, on blocks that several rows read at once."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    single = decoder(dtype=torch.float32)
    with Engine(single) as engine:
        want = pair(engine, form)
    with Engine(single.to("cuda")) as engine:
        got = pair(engine, form).cpu()
    assert float((got - want).abs().max()) < 1e-3 * float(want.abs().max())
    prompts = [ids(5, seed=1).tolist(), ids(9, seed=2).tolist()]
    out = hogwild_generate(single, prompts, max_steps=8, sampling=Sampling(1.0), seed=3, form=form)
    assert out.sequences.is_cuda and out.lengths == (8, 8)


# -- packed blocks ------------------------------------------------------------------------------------------------------


def packed(length: int, seed: int, bits: int, group: int = 8) -> CacheBlock:
    """The tokens of `filled`, in a block that packs."""
    dense, block = filled(length, seed), CacheBlock([ROPE] * 2, bits, group)
    for layer in dense.held:
        block.write(layer, *dense.layer(layer))
    block.length = length
    block.settle()
    return block


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("counts", [(1, 1), (3, 1), (2, 5)])
def test_a_turned_query_reads_codes_as_turned_dequantised_keys(bits: int, counts: tuple[int, int]) -> None:
    outs = []
    for form in FORMS:
        common, a, b = packed(45, 1, bits), packed(21, 2, bits), packed(3, 3, bits)
        assert [x.shelved for x in (common, a, b)] == [32, 8, 0]
        shared = SharedCache([[common, b, a], [common, a, b]], [a, b], form)
        shared.begin(counts, dtype=torch.float64)
        gen = torch.Generator().manual_seed(4)
        sizes = ((6, 8), (3, 8), (3, 5))
        q, k, v = (torch.randn(2, h, max(counts), w, generator=gen, dtype=torch.float64) for h, w in sizes)
        out = [shared.attend(layer, q, k, v, 8**-0.5) for layer in range(2)]
        real = torch.stack([torch.arange(max(counts)) >= max(counts) - c for c in counts])[:, None, :, None]
        outs.append(torch.stack(out) * real)
        shared.commit()
    close(outs[0], outs[1], atol=1e-6)  # a rotary embedding turns by float32 angles


def test_packing_rounds_once_and_frees_what_it_packs() -> None:
    dense = filled(200, 5)
    errors = {}
    for bits in (2, 4, 8):
        block = packed(200, 5, bits)
        k, _ = block.layer(0)
        torch.testing.assert_close(k[:, :, 192:], dense.layer(0)[0][:, :, 192:], rtol=0, atol=0)
        errors[bits] = float((k - dense.layer(0)[0]).abs().max())
        assert block.bytes() < 0.45 * dense.bytes()
        before = k[:, :, : block.shelved]
        block.append_from(filled(40, 6))
        torch.testing.assert_close(block.layer(0)[0][:, :, : before.shape[2]], before, rtol=0, atol=0)
    assert 0 < errors[8] < errors[4] < errors[2]


def test_packed_tokens_are_not_moved() -> None:
    block, into = packed(40, 1, 4), packed(4, 2, 4)
    into.append_from(block, start=32)
    assert into.length == 12
    with pytest.raises(StateError, match="quantised twice"):
        into.append_from(block, start=8)
    block.clear()
    assert (block.length, block.shelved, block.packed) == (0, 0, {})


@pytest.mark.parametrize("layout", ["combined", "contiguous", "interleaved"])
def test_workers_write_over_packed_blocks_nearly_what_they_write(model, layout) -> None:
    prompt, ends = ids(2, 30, seed=3), None if layout == "contiguous" else (lambda step: len(step) >= 5)
    more = {"common": ids(40, seed=4).tolist(), "openings": [[5, 6], [7, 8]], "ends": ends}

    def logits(**settings):
        seen = []
        out = Hogwild(layout=layout, check_every=0, **settings).generate(
            model,
            prompt,
            max_new_tokens=16,
            forced={0: [9] * 16, 1: [11] * 16},
            watch=lambda m: seen.append(m.logits),
            **more,
        )
        return torch.stack([x for x in seen if len(x) == 2]), out.notes["bytes"]

    want, full = logits()
    gaps = []
    for bits in (8, 2):
        got, held = logits(bits=bits, group=8)
        assert held < full
        gaps.append(float((got - want).abs().max()))
    assert 0 < gaps[0] < 0.05 * gaps[1]
    by_keys, _ = logits(bits=2, group=8, form="keys")
    by_queries, _ = logits(bits=2, group=8)
    # Where rounding meets half a step, a code of a later layer may differ.
    assert float((by_keys - by_queries).abs().max()) < 1e-3 * gaps[1]
