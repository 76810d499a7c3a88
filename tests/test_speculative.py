"""The rules and the loop of speculative decoding: definitions, distributions, trees that know what comes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import qkv
from qkv.core.decoding import GREEDY, Sampling
from qkv.core.errors import InvalidParameter, Refused
from qkv.decode._common import loop
from qkv.decode._common.accept import accept_chain, take, visit, walk
from qkv.decode._common.drafts import same_tokenizer, truncated
from qkv.decode._common.target import Target, opened
from qkv.decode._common.tree import ancestors, hybrid_tree_attention, prefix_attention, reference, tree_compute
from qkv.decode.speculative import reference as chain_reference
from qkv.testing._tiny import decoder
from qkv.testing.decodings import plain, unlikelihood

V, MANY = 5, 40_000


def distributions(*shape: int, seed: int) -> Tensor:
    return torch.softmax(
        2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), -1
    )


# -- rules ------------------------------------------------------------------------------------------------------------


def by_drawing(p: Tensor, children: list[int], count: int) -> Tensor:
    """How often each token comes out of one node, by the sequential definition."""
    out, uniform = torch.zeros(V, dtype=torch.float64), torch.rand(count, len(children), generator=GENERATOR).tolist()
    rest: list[Tensor] = []
    for row in uniform:
        kept, left = visit(p, children, row)
        if kept is None:
            rest.append(left)
        else:
            out[children[kept]] += 1
    if rest:
        drawn = torch.multinomial(torch.stack(rest), 1, generator=GENERATOR).squeeze(-1)
        out += torch.bincount(drawn, minlength=V)
    return out


GENERATOR = torch.Generator().manual_seed(7)


@pytest.mark.parametrize("children", [[3], [0, 4], [2, 1, 0, 3], [4, 3, 2, 1, 0]])
def test_visiting_children_in_order_is_drawing_once(children: list[int]) -> None:
    p = distributions(V, seed=len(children))
    assert unlikelihood(by_drawing(p, children, 4000), p) > 1e-3


def test_the_ratio_rule_on_chosen_children_is_not_lossless() -> None:
    """The published code's rule: accept the draft's likeliest token with p / q, else draw from norm(max(p - q, 0))."""
    p, q = distributions(2, V, seed=4)
    child = int(q.argmax())
    accepted = min(1.0, float(p[child] / q[child]))
    rest = (p - q).clamp(min=0)
    law = torch.zeros_like(p)
    law[child] = accepted
    law += (1 - accepted) * rest / rest.sum()
    counts = torch.bincount(torch.multinomial(law, MANY, replacement=True, generator=GENERATOR), minlength=V).double()
    assert unlikelihood(counts, p) < 1e-6


@pytest.mark.parametrize("seed", range(4))
def test_chains_are_distributed_as_the_target(seed: int) -> None:
    """Two guesses drawn from q: the first two tokens that come out follow p, for several q (one of them p itself)."""
    p = distributions(3, V, seed=seed)
    q = p[:2] if seed == 0 else distributions(2, V, seed=100 + seed)
    generator = torch.Generator().manual_seed(seed)
    counts = torch.zeros(V * V, dtype=torch.float64)
    guesses = torch.stack([torch.multinomial(row, 4000, replacement=True, generator=generator) for row in q], -1)
    for tokens in guesses:
        kept, last = accept_chain(p, tokens, q, generator)
        said = [*tokens[:kept].tolist(), last]
        second = said[1] if len(said) > 1 else int(torch.multinomial(p[1], 1, generator=generator))
        counts[said[0] * V + second] += 1
    want = (p[0][:, None] * p[1][None]).flatten()
    assert unlikelihood(counts, want) > 1e-3


def test_the_fast_chain_is_its_definition() -> None:
    p, q = distributions(4, V, seed=2), distributions(3, V, seed=3)
    tokens = [int(row.argmax()) for row in q]
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        uniform = torch.rand(3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
        kept, last = accept_chain(p, torch.tensor(tokens), q, generator)
        want, rest = chain_reference(p, q, tokens, uniform)
        assert kept == want and float(rest[last]) > 0


def test_walk_follows_the_drawn_tokens() -> None:
    #      root -> 5, 6 ; 5 -> 7, 8 ; 6 -> 7 ; (5, 8) -> 9
    tokens, parents = [5, 6, 7, 8, 7, 9], [-1, -1, 0, 0, 1, 3]
    assert walk([5, 8, 1, 1, 9, 1, 3], tokens, parents) == ([0, 3, 5], 3)
    assert walk([6, 1, 2, 1, 1, 1, 1], tokens, parents) == ([1], 2)
    assert walk([4, 1, 2, 1, 1, 1, 1], tokens, parents) == ([], 4)
    assert walk([2], [], []) == ([], 2)


def test_sampling_restricts_and_renormalises() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    p = torch.softmax(logits, -1)
    assert torch.allclose(Sampling(1.0).probabilities(logits), p)
    two = Sampling(1.0, top_k=2).probabilities(logits)
    assert torch.allclose(two[0, :2], p[0, :2] / p[0, :2].sum()) and not two[0, 2:].any()
    assert Sampling(1.0, top_p=0.5).probabilities(logits).tolist() == [[1, 0, 0, 0]]
    assert GREEDY.probabilities(logits).tolist() == [[1, 0, 0, 0]] and take(logits, GREEDY, None).tolist() == [0]
    for bad in ({"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"temperature": float("nan")}):
        with pytest.raises(InvalidParameter):
            Sampling(**bad)


# -- tree attention -----------------------------------------------------------------------------------------------------


def tensors(p: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(2, h, m, d, generator=g, dtype=torch.float64)
        for h, m, d in ((6, n, 8), (3, p + n, 8), (3, p + n, 5))
    )
    return q, k, v


@pytest.mark.parametrize("p", [0, 1, 19])
def test_hybrid_is_one_masked_softmax(p: int) -> None:
    parents = [-1, -1, 0, 0, 1, 3, 5]
    q, k, v = tensors(p, len(parents))
    tree = ancestors(parents)
    got = hybrid_tree_attention(q, k[:, :, :p], v[:, :, :p], k[:, :, p:], v[:, :, p:], tree)
    assert torch.allclose(got, reference(q, k, v, tree), atol=1e-12, rtol=0)
    mask = torch.cat((tree.new_ones(len(parents), p), tree), 1)[None, None]
    assert torch.allclose(tree_compute(q, k, v, mask=mask, causal=False, scale=8**-0.5), got, atol=1e-12, rtol=0)


def test_hybrid_of_empty_parts() -> None:
    q, k, v = tensors(9, 3)
    none = k[:, :, :0], v[:, :, :0]
    tree = torch.eye(3, dtype=torch.bool)
    only_tree = hybrid_tree_attention(q, *none, k[:, :, 9:], v[:, :, 9:], tree)
    assert torch.allclose(only_tree, v[:, :, 9:].repeat_interleave(2, 1), atol=1e-12)
    only_prefix = hybrid_tree_attention(q, k[:, :, :9], v[:, :, :9], *none, tree[:, :0])
    assert torch.allclose(only_prefix, prefix_attention(q, k[:, :, :9], v[:, :, :9])[0])
    hidden = hybrid_tree_attention(q, k[:, :, :9], v[:, :, :9], k[:, :, 9:], v[:, :, 9:], tree & False)
    assert torch.allclose(hidden, only_prefix, atol=1e-12)  # lse of the tree part is -inf
    assert not hybrid_tree_attention(q, *none, *none, tree[:, :0]).any()


def test_a_path_is_causal_attention() -> None:
    q, k, v = tensors(11, 6)
    got = hybrid_tree_attention(
        q, k[:, :, :11], v[:, :, :11], k[:, :, 11:], v[:, :, 11:], ancestors([-1, 0, 1, 2, 3, 4])
    )
    assert torch.allclose(got, qkv.attend(q, k, v, causal=True).out, atol=1e-12, rtol=0)


# -- the loop with guesses that know what comes ---------------------------------------------------------------------------


class Oracle:
    """A tree in which the true continuation runs to `depth`, among wrong branches, in shuffled order."""

    trees = True

    def __init__(self, truth: Sequence[int], depth: int, wide: int = 3) -> None:
        self.truth, self.depth, self.wide, self.at = list(truth), depth, wide, 0
        self.random = torch.Generator().manual_seed(depth)

    def propose(self, fresh: Sequence[int], room: int) -> loop.Proposal:
        self.at = self.at + len(fresh) if self.at else 1
        tokens, parents, true = [], [], -1
        for d in range(min(self.depth, room)):
            right = self.truth[self.at + d]
            others = [t for t in torch.randperm(61, generator=self.random).tolist() if t != right][: self.wide - 1]
            level = [*others, right]
            order = torch.randperm(len(level), generator=self.random).tolist()
            start = len(tokens)
            tokens += [level[i] for i in order]
            parents += [true] * len(level)
            true = start + order.index(len(level) - 1)
        return loop.Proposal(torch.tensor(tokens), parents)

    def verified(self, certain: int, kept: Sequence[int]) -> None:
        pass


def follow(model, ids: Tensor, proposer, new: int = 17):
    call = {"attention_mask": None, "sampling": GREEDY, "eos_token_id": None, "seed": None, "progress": None}
    return loop.speculate("a test", model, ids, lambda *_: proposer, max_new_tokens=new, depth=8, nodes=99, **call)


@pytest.fixture(scope="module")
def model():
    return decoder(layers=3)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, 61, (1, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_a_right_path_among_wrong_ones_is_kept_whole(model, ids: Tensor, depth: int) -> None:
    want = plain(model, ids, torch.ones_like(ids), 17)
    done = follow(model, ids, Oracle(want[0].tolist(), depth))
    assert torch.equal(done.tokens, want)
    gains = done.notes["gains"][0]
    assert all(g == depth + 1 for g in gains[:-1]) and sum(gains) == 16


def test_without_its_mask_a_tree_is_not_lossless(model, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: every node sees every other."""
    want = plain(model, ids, torch.ones_like(ids), 17)
    monkeypatch.setattr(loop, "ancestors", lambda parents: torch.ones(len(parents), len(parents), dtype=torch.bool))
    assert not torch.equal(follow(model, ids, Oracle(want[0].tolist(), 5)).tokens, want)


def test_the_cache_is_that_of_plain_decoding(model, ids: Tensor) -> None:
    """After trees were read and settled; the tokens accepted last are read again by the next pass."""
    want = plain(model, ids, torch.ones_like(ids), 17)[0]
    held: list[Target] = []

    class Watching(Oracle):
        def __init__(self, target: Target) -> None:
            super().__init__(want.tolist(), 3)
            held.append(target)

    call = {"attention_mask": None, "sampling": GREEDY, "eos_token_id": None, "seed": None, "progress": None}
    with qkv.applied(model, "full"):
        loop.speculate("a test", model, ids, lambda t, _: Watching(t), max_new_tokens=17, depth=8, nodes=99, **call)
        seen = held[0].seen
        text = torch.cat((ids[0], want))[:seen]
        assert ids.shape[1] + 10 < seen < ids.shape[1] + 17
        with opened(model, "a test"):
            twin = Target(model, text[None], seen)
            twin.read()
        for a, b in zip(held[0].cache.layers, twin.cache.layers, strict=True):
            for name in ("keys", "values"):
                x, y = (getattr(layer.memory, name)[:, :, :seen] for layer in (a, b))
                assert torch.allclose(x, y, atol=1e-12)


def test_trees_are_refused_on_caches_that_forget(model, ids: Tensor) -> None:
    with qkv.applied(model, "h2o:budget=9"), pytest.raises(Refused, match="propose a chain"):
        follow(model, ids, Oracle(list(range(30)), 2))


# -- drafts -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 3, 7])
def test_a_draft_that_is_the_model_is_always_right(model, ids: Tensor, length: int) -> None:
    done = qkv.method("speculative", length=length).generate(model, ids, max_new_tokens=16, draft=truncated(model, 3))
    assert torch.equal(done.tokens, plain(model, ids, torch.ones_like(ids), 16))
    assert all(g == length + 1 for g in done.notes["gains"][0][:-1])
    assert done.passes < 16 / length + 3


def test_a_truncated_draft_shares_its_weights(model) -> None:
    draft = truncated(model, 2)
    assert len(draft.model.layers) == 2 and draft.config.num_hidden_layers == 2 and model.config.num_hidden_layers == 3
    assert {x.data_ptr() for x in draft.parameters()} <= {x.data_ptr() for x in model.parameters()}
    with pytest.raises(InvalidParameter, match="1 to 3"):
        truncated(model, 4)
    with qkv.applied(model, "full"), pytest.raises(Refused, match="draft before"):
        truncated(model, 1)


def test_a_draft_may_carry_methods(model, ids: Tensor) -> None:
    draft = truncated(model, 3)
    qkv.apply(draft, "streamingllm:sinks=1,window=4")
    done = qkv.method("speculative").generate(model, ids, max_new_tokens=12, draft=draft)
    assert torch.equal(done.tokens, plain(model, ids, torch.ones_like(ids), 12))
    assert qkv.report(draft).kept <= 9


def test_unfit_drafts_are_refused(model, ids: Tensor) -> None:
    other = decoder(layers=1, vocabulary=67)
    with pytest.raises(Refused, match="vocabulary of 67"):
        qkv.method("speculative").generate(model, ids, max_new_tokens=3, draft=other)
    with pytest.raises(Refused, match="training mode"):
        qkv.method("speculative").generate(model, ids, max_new_tokens=3, draft=decoder(layers=1).train())

    class Words:
        def __init__(self, words: str) -> None:
            self.words = {w: i for i, w in enumerate(words.split())}

        def get_vocab(self) -> dict[str, int]:
            return self.words

    same_tokenizer("a test", Words("a b c"), Words("a b c"))
    with pytest.raises(Refused, match="'b' is 1 for the model and 2"):
        same_tokenizer("a test", Words("a b c"), Words("a c b"))


def test_progress_reaches_the_end(model, ids: Tensor) -> None:
    told: list[tuple[int, int, str]] = []
    method = qkv.method("speculative")
    done = method.generate(
        model, ids.expand(2, -1), max_new_tokens=6, draft=truncated(model, 3), progress=lambda *x: told.append(x)
    )
    assert told[-1][:2] == (12, 12) and all(a[0] < b[0] for a, b in itertools.pairwise(told))
    assert done.to_dict()["tokens"] == done.tokens.tolist()


def test_a_model_in_training_is_refused(ids: Tensor) -> None:
    model = decoder(layers=1)
    draft = truncated(model, 1)
    with pytest.raises(Refused, match="eval"):
        qkv.method("speculative").generate(model.train(), ids, max_new_tokens=3, draft=draft)
