"""Retrieval heads: the oracles of the method, on maps and models written by hand."""

from __future__ import annotations

import pytest
import torch

import models
import qkv
from qkv.core.errors import InvalidInput, Refused, UnknownName
from qkv.core.heads import HeadSet, HeadTable
from qkv.hosts import observe
from qkv.probes import retrieval_heads as R
from qkv.probes._needle import Needle, Prompt, find_span, rouge1_recall, unigrams
from qkv.testing._planted import AttentionOnly, induction, scripted

VOCABULARY, PREVIOUS, COPY = 40, 1, 2


def probe(**more) -> R.RetrievalHeads:
    return qkv.method("retrieval-heads", **more)


def random_prompt(seed: int, length: int = 24, width: int = 5, at: int = 9) -> Prompt:
    """Random tokens, none twice, then the token that stands before the needle: a copier goes on with the needle."""
    ids = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(seed))[:length].tolist()
    needle = ids[at : at + width]
    return Prompt(ids=(*ids, ids[at - 1]), span=(at, at + width), answer=tuple(map(str, needle)), about={"seed": seed})


def copier(new_tokens: int = 5) -> AttentionOnly:
    return induction(VOCABULARY, 32, previous=PREVIOUS, copy=COPY)


def test_a_constructed_induction_head_scores_1_and_all_others_0() -> None:
    table = probe(new_tokens=5).run(copier(), prompts=[random_prompt(s) for s in range(4)])
    want = torch.zeros(2, 3, dtype=torch.float64)
    want[1, COPY] = 1.0
    assert torch.equal(table.values, want)
    assert all(r["recall"] == 100 and r["counted"] and r["scores"] == {f"1.{COPY}": 1.0} for r in table.records)
    assert table.top(threshold=0.1) == HeadSet.of([(1, COPY)])
    assert torch.equal(R.activation_frequency(table).values, want)


def test_moving_the_needle_moves_what_is_attended_but_not_the_score() -> None:
    tables = [probe(new_tokens=5).run(copier(), prompts=[random_prompt(1, at=at)]) for at in (2, 9, 17)]
    assert len({tuple(t.records[0]["span"]) for t in tables}) == 3
    assert all(t.values[1, COPY] == 1 for t in tables)


def test_permuting_the_needle_in_the_prompt_only_lowers_the_score() -> None:
    """What is written and where the head looks stay: only the tokens there are no longer those being written."""
    scene = R._scene(1, 2, 2, 4)
    (prompt,) = scene.inputs["prompts"]
    a, b = prompt.span
    turned = (*prompt.ids[:a], *prompt.ids[a + 1 : b], prompt.ids[a], *prompt.ids[b:])
    swapped = (*prompt.ids[:a], prompt.ids[a + 1], prompt.ids[a], *prompt.ids[a + 2 :])
    model = scripted(scene.maps, scene.tokens)
    for ids, want in ((prompt.ids, 1.0), (swapped, 0.5), (turned, 0.0)):
        changed = Prompt(ids=ids, span=prompt.span, answer=prompt.answer)
        assert probe(new_tokens=6).run(model, prompts=[changed]).values[1, 2] == want


def test_hits_equal_the_definition() -> None:
    draw = torch.Generator().manual_seed(0)
    for top_k in (1, 2, 5):
        for _ in range(40):
            rows = torch.randint(0, 4, (6, 15), generator=draw).double()  # many ties
            ids = torch.randint(0, 3, (12,), generator=draw)
            token = int(torch.randint(0, 3, (), generator=draw))
            want = R.reference(rows, [*ids.tolist(), -1, -1, -1], (3, 9), token, top_k=top_k)
            assert torch.equal(R.hits(rows, ids, (3, 9), token, top_k=top_k), want)
            assert torch.equal(R.hits(rows[:, 2:], ids, (3, 9), token, top_k=1, offset=2),
                               R.reference(rows.clone().index_fill(1, torch.tensor([0, 1]), -1.0),
                                           [*ids.tolist(), -1, -1, -1], (3, 9), token))  # fmt: skip


def test_planted_rows() -> None:
    ids = torch.arange(100, 112)
    rows = torch.zeros(3, 12)
    rows[0, 5], rows[1, 4], rows[2] = 1.0, 1.0, 1 / 12  # the copied token, the one before it, nothing in particular
    assert R.hits(rows, ids, (4, 8), 105).tolist() == [5, -1, -1]
    assert R.hits(rows, ids, (0, 8), 100).tolist() == [-1, -1, 0]  # even rows point at the lowest index


def test_unique_counts_a_position_once_and_stays_within_1() -> None:
    steps = [torch.tensor([[4, 5]]), torch.tensor([[4, 6]]), torch.tensor([[-1, 4]])]
    assert probe().score(steps, (4, 8), (1, 2)).tolist() == [[0.25, 0.75]]
    assert probe(unique=False).score(steps, (4, 8), (1, 2)).tolist() == [[0.5, 0.75]]
    many = [torch.full((1, 1), 4)] * 9
    assert (
        probe().score(many, (4, 6), (1, 1)).item() == 0.5
        and probe(unique=False).score(many, (4, 6), (1, 1)).item() == 4.5
    )
    assert probe().score([], (4, 6), (1, 1)).item() == 0


def test_runs_that_were_not_answered_change_nothing() -> None:
    good = [random_prompt(s) for s in range(2)]
    wrong = [
        Prompt(ids=p.ids, span=p.span, answer=("nothing", *p.answer[:1])) for p in good
    ]  # recall exactly 50: not above
    alone = probe(new_tokens=5).run(copier(), prompts=good)
    both = probe(new_tokens=5).run(copier(), prompts=[*wrong, *good])
    assert torch.equal(alone.values, both.values) and [r["counted"] for r in both.records] == [False, False, True, True]
    assert [r["recall"] for r in both.records] == [50, 50, 100, 100]
    none = probe(new_tokens=5).run(copier(), prompts=wrong)
    assert bool(none.values.isnan().all()) and len(none.records) == 2
    with pytest.raises(InvalidInput, match="no head was measured"):
        none.top(1)


def test_kv_heads_take_the_best_of_their_group() -> None:
    scene = R._scene(1, 2, 2, 4)
    model = scripted(scene.maps, scene.tokens, kv_heads=2)
    by_head = probe(new_tokens=6).run(model, **scene.inputs)
    by_kv = probe(new_tokens=6, by="kv_head").run(model, **scene.inputs)
    assert by_kv.unit == "kv_head" and torch.equal(by_kv.values, by_head.by_kv_head().values)
    assert by_kv.values.tolist() == [[0, 0], [0, 1]]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2", "gpt_neox"])
def test_last_rows_equal_those_of_eager_attention(name: str) -> None:
    model = models.make(name, torch.float32)
    ids = models.inputs(name)["input_ids"][1:]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(ids, output_attentions=True).attentions
    rows: dict[int, torch.Tensor] = {}

    def see(site, call) -> None:
        rows[site.layer] = R.last_rows(call.q, call.k, call.mask, call.scale)

    with torch.no_grad():
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        with observe(model, see):
            model(ids[:, -1:], past_key_values=cache, use_cache=True)
    assert sorted(rows) == list(range(len(maps)))
    for layer, row in rows.items():
        want = maps[layer][:, :, -1]
        torch.testing.assert_close(row, want[..., want.shape[-1] - row.shape[-1] :], rtol=0, atol=1e-6)
        assert want[..., : want.shape[-1] - row.shape[-1]].abs().sum() == 0  # a sliding layer sees nothing else


def test_a_sliding_layer_counts_positions_of_the_prompt() -> None:
    seen: dict[int, set[int]] = {}
    model = models.make("gemma3")  # windows of 8 in every other layer
    prompt = R._example(model)[0]
    original = R.hits

    def spy(rows, ids, span, token, *, top_k, offset):
        seen.setdefault(rows.shape[-1] + offset, set()).add(offset)
        return original(rows, ids, span, token, top_k=top_k, offset=offset)

    R.hits = spy
    try:
        probe(new_tokens=3).run(model, prompts=[prompt])
    finally:
        R.hits = original
    assert list(seen) == [23, 24, 25] and all(0 in x and len(x) == 2 for x in seen.values())


def test_an_evicting_cache_is_refused_and_left_applied() -> None:
    model = models.make("llama")
    with qkv.applied(model, "streamingllm:sinks=2,window=7"):
        with pytest.raises(Refused, match="evicts or merges"):
            probe().run(model, prompts=R._example(model))
        assert qkv.plan(model, "full") is not None
    with qkv.applied(model, "h2o:budget=1.0"):
        probe(new_tokens=3).run(model, prompts=R._example(model))


@pytest.mark.parametrize(("name", "needle"), [("bert", "generates"), ("vit", "generates"), ("whisper", "decoder-only")])
def test_models_that_do_not_generate_are_refused(name: str, needle: str) -> None:
    with pytest.raises(Refused, match=needle):
        probe().run(models.make(name), prompts=R._example(None))


def test_bad_input_is_refused_with_what_to_do() -> None:
    model = models.make("llama")
    with pytest.raises(InvalidInput, match="tokenizer and a haystack"):
        probe().run(model)
    with pytest.raises(InvalidInput, match="no prompts"):
        probe().run(model, prompts=[])
    with pytest.raises(InvalidInput, match="exceed the model's 512 positions"):
        probe().run(model, prompts=[Prompt(ids=tuple(range(3, 60)) * 9, span=(5, 9), answer=("x",))])
    with pytest.raises(InvalidInput, match="does not lie"):
        Prompt(ids=(1, 2, 3), span=(2, 4), answer=("x",))
    with pytest.raises(InvalidInput, match="contain its answer"):
        Needle(text="abc", question="?", answer="d")
    with pytest.raises(UnknownName, match="unique"):
        probe(uniqe=True)


# -- needles ----------------------------------------------------------------------------------------------------------


class Words:
    """A tokenizer of words and punctuation with offsets, enough for the prompts."""

    bos_token_id, eos_token_id = 1, 2

    def __init__(self) -> None:
        self.known: dict[str, int] = {"<bos>": 1, "<eos>": 2}

    def __call__(
        self, text: str, add_special_tokens: bool = True, return_offsets_mapping: bool = False, verbose: bool = True
    ):
        import re

        found = list(re.finditer(r"\s?\w+|[^\w\s]|\n", text))
        ids = [self.known.setdefault(m.group(), len(self.known) + 1) for m in found]
        out = {"input_ids": [1, *ids] if add_special_tokens else ids}
        return out | ({"offset_mapping": [m.span() for m in found]} if return_offsets_mapping else {})

    def decode(self, ids, skip_special_tokens: bool = False) -> str:
        back = {i: w for w, i in self.known.items()}
        return "".join(back[i] for i in ids)

    def apply_chat_template(self, messages, tokenize: bool, add_generation_prompt: bool) -> str:
        return f"<user> {messages[0]['content']} <assistant>"


def test_prompts_hide_the_needle_after_a_sentence_and_know_its_span() -> None:
    words = Words()
    needle = Needle(text=" The key is red fox.", question="What is the key?", answer="red fox", lead=" The key is")
    hay = "One two three. Four five six seven. Eight nine. " * 30
    made = list(probe(lengths=(64, 90), depths=(0.0, 0.37, 1.0), buffer=20).prompts(words, hay, [needle]))
    assert [(p.about["length"], p.about["depth"]) for p in made] == [(n, d) for n in (64, 90) for d in (0.0, 0.37, 1.0)]
    for p in made:
        a, b = p.span
        assert words.decode(p.ids[a:b]) == " red fox" and p.answer == ("red", "fox")
        assert p.ids[0] == 1 and words.decode(p.ids[-3:]) == " The key is"
        before = words.decode(p.ids[1 : a - 3])
        room = p.about["length"] - 20 - 6
        if p.about["depth"] < 1:
            assert before == "" or before.endswith(".")
        else:
            assert len(p.ids[1 : a - 3]) == room
    assert "Question: What is the key?" in words.decode(made[0].ids)
    chat = next(iter(probe(lengths=(64,), depths=(0.5,), buffer=20, chat=True).prompts(words, hay, [needle])))
    assert (
        "<book>" in words.decode(chat.ids).replace(" ", "")
        and words.decode(chat.ids[chat.span[0] : chat.span[1]]) == " red fox"
    )


def test_the_papers_grid_is_the_default() -> None:
    made = list(
        probe(buffer=200).prompts(
            Words(), "One two three. " * 400, [Needle(text=" It is 7.", question="?", answer="7")]
        )
    )
    assert len(made) == 200 and {p.about["length"] for p in made} == set(R.PAPER_LENGTHS)
    assert R.PAPER_LENGTHS[0] == 1000 and R.PAPER_LENGTHS[-1] == 5000 and R.PAPER_DEPTHS[-1] == 1.0


def test_too_short_lengths_and_bad_templates_are_refused() -> None:
    with pytest.raises(InvalidInput, match="no room for a haystack"):
        list(probe(lengths=(128,)).prompts(Words(), "One. ", R.PASSKEYS))
    with pytest.raises(qkv.core.errors.InvalidParameter, match="question"):
        list(probe(lengths=(500,), template="x").prompts(Words(), "One. ", R.PASSKEYS))


def test_given_prompts_are_searched_exactly_then_by_overlap() -> None:
    assert find_span([1, 2, 3, 4, 5], [3, 4]) == (2, 4)
    needle = list(range(20, 31))
    assert find_span([1, *needle[:6], 99, *needle[7:], 2], needle) == (
        1,
        12,
    )  # one token of eleven differs: 10/11 > 0.9
    with pytest.raises(InvalidInput):
        find_span([1, 2, 3], [7, 8])


def test_rouge_counts_unigrams_with_repeats() -> None:
    assert rouge1_recall(unigrams("Eat a Sandwich!"), unigrams("eat a sandwich and sit")) == 60
    assert rouge1_recall(("a", "a"), ("a", "a", "a", "b")) == 50 and rouge1_recall((), ("a",)) == 0


# -- ablation ---------------------------------------------------------------------------------------------------------


def test_ablating_the_found_head_removes_retrieval_and_random_heads_do_not() -> None:
    model = induction(VOCABULARY, 32, layers=3, heads=4, previous=PREVIOUS, copy=COPY)
    prompts = [random_prompt(s) for s in range(3)]
    method = probe(new_tokens=5)
    table = method.run(model, prompts=prompts)
    out = method.ablation(model, None, prompts, table, count=1, seeds=(3, 4))
    assert out["base"] == [[100.0] * 3] and len(out["random"]) == 2
    assert max(out["top"][0]) <= 20
    # The one head that everything else rests on (the previous-token head) is not a retrieval head, and may be drawn.
    harmless = [r for r in out["random"] if r == [100.0] * 3]
    assert harmless, out["random"]
    with pytest.raises(InvalidInput, match="query heads"):
        method.ablation(model, None, prompts, HeadTable(torch.zeros(3, 2), "x", "kv_head"), 1)


def test_inspect_writes_its_files(tmp_path) -> None:
    model = models.llama().eval()
    words = Words()
    words("One two three.")
    method = probe(lengths=(64,), depths=(0.5,), buffer=16, new_tokens=2)
    calls: list[tuple[int, int, str]] = []

    class Small(Words):
        def __call__(self, *args, **more):
            out = super().__call__(*args, **more)
            return out | {"input_ids": [3 + i % 90 for i in out["input_ids"]]}

        def decode(self, ids, skip_special_tokens: bool = False) -> str:
            return ". "

    result = method.inspect(model, Small(), out=tmp_path / "new", progress=lambda *a: calls.append(a))
    assert (
        HeadTable.load(tmp_path / "new" / "result.json") == result
        and (tmp_path / "new" / "table.png").stat().st_size > 1000
    )
    assert calls[-1][:2] == (3, 3)
