"""SpecKV, SpecPC, SpecKV-PC: what is kept, against loops; limits; sparse prefill; refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import qkv
from qkv.core.attend import attend, causal_mask
from qkv.core.cache import Step
from qkv.core.errors import InvalidInput, InvalidParameter, Refused, StateError
from qkv.decode._common.target import Target, opened
from qkv.decode._lookahead import LookaheadCache, SpecKVPolicy, best, pooled, tail_rows, tail_scores, vertical_slash
from qkv.decode.speckv import SpecKV, _Listener, look_ahead, reference, select_tokens, specpc_compress, truncated
from qkv.testing._tiny import decoder
from qkv.testing.decodings import plain

B, H, G, D, E = 1, 6, 3, 8, 5
SCALE = D**-0.5


@pytest.fixture(scope="module")
def model():
    return decoder(layers=3)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, 61, (1, 40), generator=torch.Generator().manual_seed(1))


def block(n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, h, n, d, generator=g, dtype=torch.float64) for h, d in ((H, D), (G, D), (G, E)))
    return 2 * q, k, v


def maps(q: Tensor, k: Tensor) -> Tensor:
    """``[B, H, M, M]``."""
    logits = (q * SCALE) @ k.repeat_interleave(H // G, 1).mT
    return logits.masked_fill(~causal_mask(q.shape[2], k.shape[2], q.device), -torch.inf).softmax(-1)


def step(n: int) -> Step:
    return Step(torch.arange(n)[None], SCALE)


# -- SpecKV -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lookahead", [0, 1, 6])
@pytest.mark.parametrize("how", [("max", "max", 3), ("mean", "avg", 5), ("max", "avg", 1)])
def test_what_is_kept_is_the_definition(lookahead: int, how: tuple[str, str, int]) -> None:
    reduce, pooling, kernel = how
    n, keep, window = 33, 12, 4
    q, k, v = block(n + lookahead, seed=lookahead)
    policy = SpecKVPolicy(keep=keep, lookahead=lookahead, window=window, kernel=kernel, pooling=pooling, reduce=reduce)
    memory = LookaheadCache(policy)
    out = memory.attend(q, k, v, step(n + lookahead))
    assert torch.allclose(out, attend(q, k, v, causal=True, scale=SCALE).out)
    full = maps(q, k)
    text = n - bool(lookahead)
    for g in range(G):
        want = reference(
            full[0, 2 * g : 2 * g + 2], window=window, lookahead=lookahead, kernel=kernel, pooling=pooling, reduce=reduce,
            budget=keep,
        )  # fmt: skip
        assert len(want) == len(set(want)) == keep and want[-window:] == list(range(text - window, text))
        assert memory.positions()[0, g].tolist() == want
        assert torch.equal(memory.inner.keys[0, g, :keep], k[0, g, want])
        assert torch.equal(memory.inner.values[0, g, :keep], v[0, g, want])
    assert memory.seen == text and memory.kept() == keep
    held = memory.inner.keys.shape[2]
    assert held == keep and memory.bytes() == 8 * G * keep * (D + E) + 8 * G * keep


def test_scores_in_pieces_are_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = block(29)
    for reduce in ("max", "mean"):
        whole = tail_scores(q[:, :, -9:], k, SCALE, reduce)
        monkeypatch.setattr("qkv.decode._lookahead.CHUNK_ELEMENTS", H * 29 * 2)
        assert torch.allclose(tail_scores(q[:, :, -9:], k, SCALE, reduce), whole, atol=1e-12)
        monkeypatch.undo()
    assert torch.allclose(tail_rows(q[:, :, -9:], k, SCALE), maps(q, k)[:, :, -9:], atol=1e-12)


def test_softmax_comes_before_the_tail_is_dropped() -> None:
    """Negative control: a score taken over the prompt alone ranks otherwise."""
    q, k, _ = block(40, seed=3)
    right = tail_scores(q[:, :, -12:], k, SCALE, "max")
    wrong = (q[:, :, -12:] * SCALE @ k[:, :, :28].repeat_interleave(2, 1).mT).softmax(-1).reshape(1, G, -1, 28).amax(2)
    assert not torch.equal(best(right, 9), best(wrong, 9))


def test_later_tokens_are_appended_and_taken_back() -> None:
    q, k, v = block(40, seed=5)
    policy = SpecKVPolicy(keep=10, lookahead=4, window=3, kernel=3)
    memory = LookaheadCache(policy)
    memory.attend(q[:, :, :34], k[:, :, :34], v[:, :, :34], step(34))
    kept = memory.place
    assert memory.seen == 29 and kept is not None
    for i in (34, 35, 36):
        out = memory.attend(
            q[:, :, i : i + 1], k[:, :, i : i + 1], v[:, :, i : i + 1], Step(torch.tensor([[i]]), SCALE)
        )
        for h in range(H):
            rows = torch.tensor([*kept[0, h // 2].tolist(), *range(34, i + 1)])
            want = attend(
                q[:, h : h + 1, i : i + 1], k[:, h // 2, rows][:, None], v[:, h // 2, rows][:, None], scale=SCALE
            ).out
            assert torch.allclose(out[:, h : h + 1], want)
    twin = LookaheadCache(policy)
    twin.restore(memory.tensors())
    assert twin.seen == memory.seen == 32 and torch.equal(twin.positions(), memory.positions())
    memory.crop(2)
    assert memory.seen == 30 and memory.positions()[0, 0, -1] == 29
    with pytest.raises(StateError, match="only the 1 after the prompt"):
        memory.crop(2)
    memory.select(torch.tensor([0, 0]))
    assert memory.positions().shape == (2, G, 11)
    memory.reset()
    assert memory.bytes() == 0 and memory.tensors() == {}


@pytest.mark.parametrize("band", [1, 7, 16])
def test_vertical_slash_is_its_mask(band: int) -> None:
    q, k, v = block(37)
    verticals = best(torch.rand(B, G, 30, generator=torch.Generator().manual_seed(2)), 6)
    i, j = torch.arange(37)[:, None], torch.arange(37)
    mask = ((i - j < band) | (verticals.unsqueeze(-1) == j).any(2, keepdim=True)) & (j <= i)
    want = attend(q, k, v, mask=mask, scale=SCALE).out
    assert torch.allclose(vertical_slash(q, k, v, verticals, band, SCALE), want, atol=1e-12)


def test_sparse_prefill_serves_long_prompts_only() -> None:
    q, k, v = block(37)
    dense = attend(q, k, v, causal=True, scale=SCALE).out
    for verticals, band, same in ((30, 7, True), (20, 5, False), (0, 5, True)):
        memory = LookaheadCache(SpecKVPolicy(keep=100, lookahead=3, window=4, verticals=verticals, band=band))
        assert torch.allclose(memory.attend(q, k, v, step(37)), dense) == same
        assert memory.kept() == 33


def test_the_whole_budget_is_plain_decoding(model, ids: Tensor) -> None:
    want = plain(model, ids, torch.ones_like(ids), 9)
    for stage in ("kv", "pc", "kv-pc"):
        for positions in ("original", "compressed"):
            method = SpecKV(stage=stage, budget=1.0, prompt_budget=1.0, window=3, positions=positions)
            done = method.generate(model, ids, max_new_tokens=9, draft=decoder(layers=1, seed=3))
            assert torch.equal(done.tokens, want)


def test_notes_say_what_was_held(model, ids: Tensor) -> None:
    method = SpecKV(stage="kv-pc", prompt_budget=24, budget=12, window=4, lookahead=5, kernel=3, prompt_kernel=4)
    done = method.generate(model, ids, max_new_tokens=4, draft=truncated(model, 2))
    note = done.notes["rows"][0]
    assert (note["guessed"], note["read"], note["kept"]) == (5, 24, 12 + 4)
    assert 0 < note["bytes"] and note["full_bytes"] == 2 * 3 * 3 * 27 * 8 * 8
    assert done.passes == 1 + 1 + 3


def kept_mass(model, ids: Tensor, guess: Tensor, future: Tensor, keep: int, window: int) -> float:
    """Share of the true continuation's attention to the prompt that the kept entries hold, mean over sites."""
    text, shares, kept = ids.shape[1], [], []
    with qkv.applied(model, SpecKVPolicy(keep=keep, lookahead=guess.shape[0], window=window, kernel=1, reduce="mean")):
        with torch.no_grad():
            cache = model(torch.cat((ids, guess[None]), 1), use_cache=True).past_key_values
        kept = [layer.memory.place for layer in cache.layers]

    def look(site, call) -> None:
        drawn = maps(call.q, call.k)[:, :, text:, : text - 1].reshape(1, G, -1, text - 1).sum(2)
        shares.append((drawn.gather(2, kept[site.layer]).sum() / drawn.sum()).item())

    with qkv.hosts.observe(model, look), torch.no_grad():
        model(torch.cat((ids, future[None]), 1), use_cache=False)
    return sum(shares) / len(shares)


def test_the_true_continuation_keeps_more_of_its_own_attention() -> None:
    """Draft = model: its guess is what will be said. Against no guess (SnapKV), and against unrelated tokens."""
    model = decoder(layers=3)
    true, none, other = [], [], []
    for seed in range(6):
        g = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, 61, (1, 50), generator=g)
        future = look_ahead(truncated(model, 3), ids, 12)
        assert torch.equal(future[None], plain(model, ids, torch.ones_like(ids), 12))
        true.append(kept_mass(model, ids, future, future, 16, 4))
        other.append(kept_mass(model, ids, torch.randint(0, 61, (12,), generator=g), future, 16, 4))
        none.append(snap_mass(model, ids, future, 16, 4))
    assert sum(true) > sum(none) and sum(true) > sum(other)


def snap_mass(model, ids: Tensor, future: Tensor, keep: int, window: int) -> float:
    """`kept_mass` of SnapKV with the same share of everything."""
    text, shares, kept = ids.shape[1], [], []
    with (
        qkv.applied(model, SpecKVPolicy(keep=keep, lookahead=0, window=window, kernel=1, reduce="mean")),
        torch.no_grad(),
    ):
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        kept = [layer.memory.place for layer in cache.layers]

    def look(site, call) -> None:
        drawn = maps(call.q, call.k)[:, :, text:, : text - 1].reshape(1, G, -1, text - 1).sum(2)
        shares.append((drawn.gather(2, kept[site.layer]).sum() / drawn.sum()).item())

    with qkv.hosts.observe(model, look), torch.no_grad():
        model(torch.cat((ids, future[None]), 1), use_cache=False)
    return sum(shares) / len(shares)


# -- SpecPC -----------------------------------------------------------------------------------------------------------------


def by_loops(model, ids: Tensor, window: int, start: int) -> list[float]:
    """The largest weighted attention that each token draws from the last window, over layers and heads."""
    n, found = ids.shape[1], [0.0] * ids.shape[1]

    def look(site, call) -> None:
        if site.layer >= start:
            rows = maps(call.q, call.k)[0]
            for h in range(H):
                for r in range(window):
                    weight = r / (window - 1)
                    for s in range(n):
                        found[s] = max(found[s], weight * float(rows[h, n - window + r, s]))

    with qkv.hosts.observe(model, look), torch.no_grad():
        model(ids, use_cache=False)
    return found


@pytest.mark.parametrize("start", [0, 2])
def test_importance_is_the_definition(model, ids: Tensor, start: int) -> None:
    listener = _Listener(40, 5, start, True, "max")
    with opened(model, "a test"), qkv.hosts.observe(model, listener):
        Target(model, ids, 0).read()
    assert torch.allclose(
        listener.importance, torch.tensor(by_loops(model, ids, 5, start), dtype=torch.float64), atol=1e-9
    )


def test_a_window_of_one_query_weighs_one(model, ids: Tensor) -> None:
    kept = specpc_compress(model, ids, 9, window=1, kernel=3)
    assert kept.shape == (1, 9) and int(kept[0, -1]) == 39


@pytest.mark.parametrize("lookahead", [1, 4])
@pytest.mark.parametrize("budget", [8, 17, 0.5])
def test_compressed_prompts_have_their_shape(model, ids: Tensor, lookahead: int, budget: int | float) -> None:
    both = torch.cat((ids, ids.flip(1)))
    kept = specpc_compress(model, both, budget, window=5, kernel=4, lookahead=lookahead)
    want = budget if isinstance(budget, int) else 20
    assert kept.shape == (2, want)
    for row in kept:
        assert row.tolist() == sorted(set(row.tolist())) and row[-5:].tolist() == list(range(35, 40))
    assert "_qkv" not in model.__dict__
    assert torch.equal(specpc_compress(model, ids, 1.0)[0], torch.arange(40))
    assert torch.equal(specpc_compress(model, ids, 400)[0], torch.arange(40))


def test_selection_expands_dedupes_and_cuts() -> None:
    importance = torch.zeros(30)
    importance[[4, 20]] = torch.tensor([2.0, 1.0])
    assert select_tokens(importance, 4, window=2, kernel=1, neighbours=0).tolist() == [4, 20, 28, 29]
    assert select_tokens(importance, 8, window=2, kernel=1, neighbours=4).tolist() == [2, 3, 4, 5, 6, 20, 28, 29]
    assert select_tokens(importance, 5, window=2, kernel=1, neighbours=4).tolist() == [2, 4, 6, 28, 29]  # nearest last
    spread = pooled(importance, 4, "max")
    assert spread.nonzero().flatten().tolist() == [3, 4, 5, 6, 19, 20, 21, 22]
    assert torch.allclose(pooled(importance, 3, "avg").sum(), importance.sum())
    assert torch.equal(pooled(importance, 1, "max"), importance)
    assert best(torch.tensor([1.0, 3.0, 3.0, 0.0]), 1).tolist() == [2]


def test_prompt_compression_feeds_an_ordinary_prompt(model, ids: Tensor) -> None:
    draft = truncated(model, 2)
    method = SpecKV(stage="pc", prompt_budget=15, window=4, prompt_kernel=3)
    done = method.generate(model, ids, max_new_tokens=7, draft=draft)
    kept = specpc_compress(draft, ids, 15, window=4, kernel=3)
    short = ids.gather(1, kept)
    assert torch.equal(done.tokens, plain(model, short, torch.ones_like(short), 7))
    assert torch.equal(done.sequences[:, :40], ids)


# -- refusals -----------------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused(model, ids: Tensor) -> None:
    draft = truncated(model, 1)
    with pytest.raises(InvalidParameter, match="odd"):
        SpecKV(kernel=64)
    with pytest.raises(InvalidParameter, match="nothing beside window"):
        SpecKV(budget=64)
    with pytest.raises(InvalidParameter, match="prompt_budget"):
        SpecKV(stage="pc", prompt_budget=32)
    with pytest.raises(Refused, match="no more than window=64"):
        SpecKV(budget=0.25).generate(model, ids, max_new_tokens=3, draft=draft)
    with pytest.raises(Refused, match="smaller than the window"):
        specpc_compress(draft, ids, 0.25)
    with pytest.raises(Refused, match="vocabulary of 67"):
        SpecKV().generate(model, ids, max_new_tokens=3, draft=decoder(layers=1, vocabulary=67))
    with pytest.raises(InvalidInput, match="297 of lookahead"):
        SpecKV(lookahead=300).generate(model, ids, max_new_tokens=3, draft=draft)
    with pytest.raises(Refused, match="keeps a cache of its own"), qkv.applied(model, "full"):
        SpecKV().generate(model, ids, max_new_tokens=3, draft=draft)
    qkv.apply(draft, "h2o")
    with pytest.raises(Refused, match="draft carries methods"):
        SpecKV(stage="pc").generate(model, ids, max_new_tokens=3, draft=draft)


def test_a_guess_ends_with_its_end_token(model, ids: Tensor) -> None:
    whole = look_ahead(model, ids, 9)
    end = int(whole[3])
    first = whole.tolist().index(end)
    assert look_ahead(model, ids, 9, frozenset((end,))).tolist() == whole[: first + 1].tolist()
    assert look_ahead(model, ids, 0).shape == (0,)
