"""LongSpec: its positions, shifted attention, draft, tree, training, folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import qkv
from qkv.core.attend import attend
from qkv.core.cache import Rope
from qkv.core.errors import InvalidInput, InvalidParameter, Refused, SavedDataError, TrainingError
from qkv.decode import _glide_training as training
from qkv.decode._common.loop import Proposal
from qkv.decode._common.target import Target, opened
from qkv.decode._common.tree import ancestors
from qkv.decode._glide import GlideProposer, last_site
from qkv.decode.longspec import Contrary, GlideDraft, LongSpec, anchor_offset_positions, shifted_cross_attention
from qkv.testing._tiny import decoder
from qkv.testing.decodings import by_transformers, plain

METHOD = LongSpec()


@pytest.fixture(scope="module")
def model():
    return decoder(layers=3)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, 61, (1, 23), generator=torch.Generator().manual_seed(1))


def spread(draft: GlideDraft, scale: float = 6.0) -> GlideDraft:
    """Weights large enough that the draft's attention matters."""
    with torch.no_grad():
        for x in draft.parameters():
            x.mul_(scale if x.ndim > 1 else 1.0)
    return draft.eval()


# -- formulas -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("j", [0, 1, 3, 6, 7, 9])
def test_shifted_attention_is_a_dense_mask(j: int) -> None:
    g = torch.Generator().manual_seed(j)
    q, k, v = (torch.randn(2, h, 7, d, generator=g, dtype=torch.float64) for h, d in ((6, 8), (3, 8), (3, 5)))
    i = torch.arange(7)
    want = attend(q, k, v, mask=i[None, :] <= i[:, None] - j).out
    got = shifted_cross_attention(q, k, v, j)
    assert torch.allclose(got, want, atol=1e-12) and not got[:, :, :j].any()


def test_shifted_attention_has_gradients() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 5, 3, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(lambda *x: shifted_cross_attention(*x, 2), (q, k, v))
    with pytest.raises(InvalidInput, match="as many keys"):
        shifted_cross_attention(q, k[:, :, :4], v, 1)


@pytest.mark.parametrize(("n", "reach"), [(64, 8192), (1000, 8192), (1000, 40_000), (64, 256), (7, 7)])
def test_anchor_offsets(n: int, reach: int) -> None:
    far = set()
    for seed in range(60):
        place = anchor_offset_positions(n, reach, generator=torch.Generator().manual_seed(seed))
        assert place.shape == (n,) and bool((place[1:] > place[:-1]).all()) and 0 <= int(place[0])
        gaps = (place - torch.arange(n)).unique().tolist()
        assert len(gaps) <= 2 and (len(gaps) == 1 or gaps[0] == 0)
        moved = int((place == torch.arange(n)).sum())
        assert moved <= 4 or moved == n
        assert int(place[-1]) < reach
        far.add(int(place[-1]))
    assert len(far) > 20 or n == reach
    with pytest.raises(InvalidInput, match="does not fit"):
        anchor_offset_positions(reach + 1, reach)


# -- the draft ------------------------------------------------------------------------------------------------------------


def by_training(model, draft: GlideDraft, text: Tensor, j: int = 1) -> Tensor:
    """Logits ``[T, V]`` of the training form over a text, with the target's last keys and values."""
    site, held = last_site(model), []
    assert site.geometry.rope is not None
    rope = Rope(site.geometry.rope.frequencies)
    with torch.no_grad(), training._reading(model, site, held):
        model(text, use_cache=False)
        x = model.get_input_embeddings()(text)
        out = draft(x, torch.arange(text.shape[1])[None], *held, j, rope, draft.own_scale)
        return model.lm_head(out)[0]


class Logits(GlideProposer):
    """Remembers what it saw at the newest certain token."""

    def _look(self, *args):
        out = super()._look(*args)
        if args[2] == 0:
            self.first = out
        return out


@pytest.mark.parametrize("window", [5, 512])
def test_the_draft_in_use_is_the_draft_in_training(model, ids: Tensor, window: int) -> None:
    """At the newest certain token the target lacks one key, so j = 1; own keys are kept for `window` tokens."""
    draft = spread(GlideDraft.of(model, window=window))
    text = torch.cat((ids, plain(model, ids, torch.ones_like(ids), 9)), 1)
    with opened(model, "a test"):
        target = Target(model, text[:, :20], 64)
        target.read()
        proposer = Logits(draft, target, (2, 3))
        for upto in range(21, 27):
            fresh = text[0, :upto].tolist() if upto == 21 else text[0, upto - 1 : upto].tolist()
            proposer.propose(fresh, 2)
            want = by_training(model, draft, text[:, :upto])[-1].float().log_softmax(-1)
            assert torch.allclose(proposer.first[0], want, atol=1e-5)
            target.verify(text[0, upto - 1 : upto], 1)
            target.settle(0)
            proposer.verified(1, ())


def test_the_tree_is_the_likeliest_paths(model, ids: Tensor) -> None:
    """Against the training form run on every path by itself, the target's keys ending before the newest certain token."""
    draft = spread(GlideDraft.of(model, window=11))
    widths = (3, 5, 4)
    with opened(model, "a test"):
        target = Target(model, ids[:, :-1], 64)
        target.read()
        proposal = GlideProposer(draft, target, widths).propose(ids[0].tolist(), 9)
    assert isinstance(proposal, Proposal) and proposal.parents is not None
    tokens, parents = proposal.tokens.tolist(), list(proposal.parents)
    assert len(tokens) == sum(widths)
    level: dict[tuple[int, ...], float] = {(): 0.0}
    at = 0
    for depth, width in enumerate(widths):
        scored: dict[tuple[int, ...], float] = {}
        for path, score in level.items():
            text = torch.cat((ids, torch.tensor([path], dtype=torch.long).reshape(1, -1)), 1)
            logp = by_training(model, draft, text, j=1 + depth)[-1].float().log_softmax(-1)
            scored |= {(*path, t): score + float(logp[t]) for t in range(61)}
        best = sorted(scored, key=scored.__getitem__, reverse=True)[:width]
        found = [path_of(i, tokens, parents) for i in range(at, at + width)]
        assert found == best
        level = {path: scored[path] for path in best}
        at += width


def path_of(i: int, tokens: list[int], parents: list[int]) -> tuple[int, ...]:
    above = () if parents[i] < 0 else path_of(parents[i], tokens, parents)
    return (*above, tokens[i])


def test_ancestors() -> None:
    assert ancestors([-1, 0, 0, -1, 2]).int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 0, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [1, 0, 1, 0, 1],
    ]


def test_a_draft_shows_the_accepted_tokens_keys_at_once(model, ids: Tensor) -> None:
    """What the target computed for the nodes of the accepted path lies where its next pass will write it."""
    draft = spread(GlideDraft.of(model))
    with opened(model, "a test"):
        target = Target(model, ids, 64)
        target.read()
        target.settle(0)
        target.grow_trees("a test")
        proposer = GlideProposer(draft, target, (2, 2))
        certain, nodes = torch.tensor([7]), torch.tensor([3, 9, 4, 5])
        above = ancestors([-1, -1, 1, 1])
        target.verify_tree(certain, nodes, above.sum(-1), above)
        target.settle(4)
        proposer.verified(1, [1, 3])
        assert proposer.checked == ids.shape[1] + 3 and target.seen == ids.shape[1] + 1
        kept = [x[:, :, : proposer.checked].clone() for x in proposer._memory()]
        twin = Target(model, torch.cat((ids, torch.tensor([[7, 9, 5]])), 1), 64)
        twin.read()
        for x, y in zip(kept, GlideProposer(draft, twin, (2,))._memory(), strict=True):
            assert torch.allclose(x, y[:, :, : proposer.checked], atol=1e-12)


@pytest.mark.parametrize("cache", ["kivi:bits=4,group=8,residual=8", "h2o:budget=9", "streamingllm:sinks=2,window=7"])
def test_chains_on_compressed_layers_below_an_exact_last_one(model, ids: Tensor, cache: str) -> None:
    draft, method = spread(GlideDraft.of(model)), LongSpec(tree=(1, 1, 1))
    mask = torch.ones_like(ids)
    with qkv.applied(model, cache, where=[0, 1]):
        want = by_transformers(model, ids, mask, 15)
        assert torch.equal(method.generate(model, ids, max_new_tokens=15, draft=draft).tokens, want)
        with pytest.raises(Refused, match="propose a chain"):
            METHOD.generate(model, ids, max_new_tokens=15, draft=draft)
    with qkv.applied(model, cache), pytest.raises(Refused, match="last layer"):
        method.generate(model, ids, max_new_tokens=15, draft=draft)


def test_own_memory_is_constant(model, ids: Tensor) -> None:
    draft = GlideDraft.of(model, window=6)
    long = torch.randint(0, 61, (1, 90), generator=torch.Generator().manual_seed(2))
    with opened(model, "a test"):
        target = Target(model, long, 128)
        target.read()
        proposer = GlideProposer(draft, target, (2, 2))
        proposer.propose([*long[0].tolist(), 5], 2)
        assert proposer.keys is not None and proposer.keys.shape[2] == 6


# -- refusals ---------------------------------------------------------------------------------------------------------------


def test_unfit_drafts_and_models_are_refused(model, ids: Tensor) -> None:
    draft = GlideDraft.of(decoder(layers=1, vocabulary=67))
    with pytest.raises(Refused, match=r"vocabulary is 67, the model's 61"):
        METHOD.generate(model, ids, max_new_tokens=3, draft=draft)
    with pytest.raises(InvalidInput, match="GlideDraft"):
        METHOD.generate(model, ids, max_new_tokens=3, draft=model)
    with pytest.raises(InvalidParameter):
        LongSpec(tree=())
    with pytest.raises(InvalidParameter, match="at most 1024"):
        LongSpec(tree=(256,) * 5)
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=24, n_layer=1, n_head=2, n_positions=64)).eval()
    with pytest.raises(Refused, match="rotates by nothing"):
        GlideDraft.of(gpt2)


# -- training ---------------------------------------------------------------------------------------------------------------

RECIPE = {"steps": 6, "batch": 2, "length": 24, "save_every": 3, "learning_rate": 3e-3}


@pytest.fixture(scope="module")
def text() -> Tensor:
    """A language in which each token says what follows: x -> x + 1 or x + 7."""
    g = torch.Generator().manual_seed(3)
    steps = torch.where(torch.rand(4000, generator=g) < 0.8, 1, 7)
    return steps.cumsum(0) % 61


def test_training_teaches_and_saves(model, text: Tensor, tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    before = {n: x.clone() for n, x in model.state_dict().items()}
    done = METHOD.train(
        model, text, tmp_path, recipe=RECIPE | {"steps": 60, "length": 48, "far": 48}, window=8,
        progress=lambda *x: told.append(x),
    )  # fmt: skip
    assert len(done.losses) == 60 and told[-1][:2] == (60, 60) and "loss" in told[-1][2]
    assert sum(done.losses[-10:]) < 0.6 * sum(done.losses[:10])
    assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items()) and "_qkv" not in model.__dict__
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    again = METHOD.load(tmp_path, model)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), done.draft.parameters(), strict=True))
    assert not (tmp_path / "state").exists()
    ids = text[None, :20]
    out = METHOD.generate(model, ids, max_new_tokens=12, draft=tmp_path)
    assert torch.equal(out.tokens, plain(model, ids, torch.ones_like(ids), 12))


def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been(model, text: Tensor, tmp_path: Path) -> None:
    whole = METHOD.train(model, text, tmp_path / "whole", recipe=RECIPE, window=8)

    class Stop(Exception):
        pass

    def stop(done: int, total: int, note: str) -> None:
        if done == 5:
            raise Stop

    with pytest.raises(Stop):
        METHOD.train(model, text, tmp_path / "cut", recipe=RECIPE, window=8, progress=stop)
    with pytest.raises(TrainingError, match="resume=True"):
        METHOD.train(model, text, tmp_path / "cut", recipe=RECIPE, window=8)
    with pytest.raises(TrainingError, match="another recipe"):
        METHOD.train(model, text, tmp_path / "cut", recipe=RECIPE | {"learning_rate": 1e-3}, window=8, resume=True)
    with pytest.raises(TrainingError, match="another target"):
        METHOD.train(decoder(layers=3, seed=5), text, tmp_path / "cut", recipe=RECIPE, window=8, resume=True)
    seen: list[int] = []
    done = METHOD.train(
        model, text, tmp_path / "cut", recipe=RECIPE, window=8, resume=True, progress=lambda d, t, n: seen.append(d)
    )
    assert seen == [4, 5, 6] and done.losses == whole.losses
    for a, b in zip(done.draft.parameters(), whole.draft.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_second_stage_starts_from_the_first(model, text: Tensor, tmp_path: Path) -> None:
    first = METHOD.train(model, text, tmp_path / "a", recipe=RECIPE, window=8)
    second = METHOD.train(
        model, text, tmp_path / "b", recipe=RECIPE | {"far": 0, "length": 60}, window=8, start=first.draft
    )
    assert second.losses[0] < first.losses[0]


def test_batches_follow_the_recipe(text: Tensor) -> None:
    recipe = training.Recipe(**RECIPE)
    a, b = training.batch_of(text, recipe, 3, 256), training.batch_of(text, recipe, 3, 256)
    assert all(torch.equal(torch.as_tensor(x), torch.as_tensor(y)) for x, y in zip(a, b, strict=True))
    assert {training.batch_of(text, recipe, s, 256)[2] for s in range(40)} == {1, 2, 3, 4}
    ids, position, _ = a
    assert ids.shape == (2, 25) and position.shape == (2, 24) and int(position.max()) < 256
    ordinary = training.batch_of(text, training.Recipe(**RECIPE | {"far": 0}), 3, 256)[1]
    assert torch.equal(ordinary, torch.arange(24).expand(2, -1))
    assert recipe.rate(0) < recipe.rate(1) or recipe.warmup * recipe.steps <= 1
    assert recipe.rate(5) < recipe.learning_rate
    for bad in ({"steps": 0}, {"batch": 1.5}, {"learning_rate": 0.0}, {"shift": 0}):
        with pytest.raises(InvalidParameter, match="recipe"):
            training.Recipe(**bad)
    with pytest.raises(InvalidInput, match="more than length"):
        METHOD.train(decoder(layers=1), text[:20], "unused", recipe=RECIPE)


def test_damaged_and_foreign_drafts_are_refused(model, tmp_path: Path) -> None:
    draft = GlideDraft.of(model)
    draft.save(tmp_path / "d", model)
    with pytest.raises(SavedDataError, match="other weights"):
        GlideDraft.load(tmp_path / "d", decoder(layers=3, seed=9))
    file = tmp_path / "d" / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(SavedDataError, match="truncated"):
        GlideDraft.load(tmp_path / "d", model)
    model32 = decoder(layers=3, dtype=torch.float32)
    GlideDraft.of(model32).save(tmp_path / "e", model32)
    assert (
        GlideDraft.load(tmp_path / "e", model).o.weight.dtype == torch.float64
    )  # the same target in another precision


def test_contrary_drafts_turn_their_guesses_around(model) -> None:
    a, b = GlideDraft.of(model), GlideDraft.of(model)
    b.__class__ = Contrary
    x = torch.randn(1, 3, 48, dtype=torch.float64)
    assert torch.equal(a.mlp(x), -b.mlp(x))
