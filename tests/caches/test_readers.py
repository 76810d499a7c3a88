"""What the pages of the reading caches say, beyond the laws: scores against their definitions, schedules, and what refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import qkv
from qkv.caches import quest, recycled, tidaldecode
from qkv.core.attend import attend
from qkv.core.cache import Board, Geometry, Rope, Step
from qkv.core.errors import InvalidParameter
from qkv.testing import mutant

B, H, G, D = 2, 6, 3, 8


def geometry(layer: int = 2, layers: int = 5) -> Geometry:
    rope = Rope(100.0 ** -(torch.arange(D // 2, dtype=torch.float32) / (D // 2)))
    return Geometry(H, G, D, D, layer=layer, layers=layers, rope=rope, max_length=512)


def drawn(t: int, seed: int = 0, b: int = B) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(b, h, t, D, generator=draw, dtype=torch.float64) * 1.5 for h in (H, G, G))


def feed(layer: Any, q: Any, k: Any, v: Any, n: int) -> tuple[torch.Tensor, Any]:
    """The next n tokens: output and what was read."""
    at, said = slice(layer.seen, layer.seen + n), []
    layer.watch = said.append
    position = torch.arange(at.start, at.stop).expand(q.shape[0], n)
    out = layer.attend(q[:, :, at], k[:, :, at], v[:, :, at], Step(position, D**-0.5))
    return out, said[-1]


# -- quest -----------------------------------------------------------------------------------------------------------------


def test_the_bound_is_its_definition_and_bounds_every_logit() -> None:
    q, k, v = drawn(40)
    layer: Any = quest.Quest(budget=12, block_size=4, dense_layers=0, share="query_head").layer(geometry())
    feed(layer, q, k, v, 39)
    seen: list[Any] = []
    rank = quest.Quest.rank

    def spied(self: Any, view: Any) -> torch.Tensor:
        seen.append(rank(self, view))
        return seen[-1]

    layer.reader = mutant(quest.Quest, rank=spied)(**layer.reader.settings())
    feed(layer, q, k, v, 1)
    bound = seen[0][:, :, 0]  # [B, H, P]
    for head in range(H):
        want = quest.reference(q[:, head, -1:], k[:, head // 2, :40].unsqueeze(1), block_size=4)
        torch.testing.assert_close(bound[:, head, :9], want.reshape(B, -1)[:, :9], rtol=0, atol=1e-12)
        logits = (k[:, head // 2] @ q[:, head, -1].unsqueeze(-1)).reshape(B, 10, 4)
        assert (bound[:, head, :9] >= logits.amax(-1)[:, :9] - 1e-12).all()


def test_quest_reads_the_best_pages() -> None:
    q, k, v = drawn(41)
    layer: Any = quest.Quest(budget=12, block_size=4, dense_layers=0).layer(geometry())
    feed(layer, q, k, v, 40)
    _, read = feed(layer, q, k, v, 1)
    for row in range(B):
        for kv in range(G):
            u = torch.stack(
                [quest.reference(q[row, h, -1], k[row, kv, :40], block_size=4) for h in (2 * kv, 2 * kv + 1)]
            )
            want = {*u.amax(0).topk(2).indices.tolist(), 10}
            assert {s // 4 for s in read.slot[row, kv, 0].tolist() if s >= 0} == want


def test_quest_tells_what_a_step_read() -> None:
    """Chosen pages and all bounds; everything where the layer is dense or nothing was chosen yet."""
    q, k, v = drawn(41)
    chosen, dense = (quest.Quest(budget=12, block_size=4, dense_layers=n).layer(geometry()) for n in (0, 5))
    for layer in (chosen, dense):
        feed(layer, q, k, v, 40)
        assert layer.read_bytes() == layer.bytes()
        feed(layer, q, k, v, 1)
    bounds = sum(x.numel() * x.element_size() for x in chosen.features.values())
    assert chosen.read_bytes() == B * G * 12 * 2 * D * 8 + bounds < chosen.bytes()
    assert dense.read_bytes() == dense.bytes()


def test_quest_needs_room_for_a_page() -> None:
    with pytest.raises(InvalidParameter, match="less than one page"):
        quest.Quest(budget=8, block_size=16)


@pytest.mark.parametrize("method", ["quest:budget=0.25", "quest:budget=0.01,dense_layers=0"])
def test_a_share_of_less_than_a_page_reads_the_own_page(method: str) -> None:
    """Before the first page is full there are no bounds, and nothing to choose from."""
    q, k, v = drawn(40)
    layer: Any = qkv.method(method).layer(geometry())  # type: ignore[attr-defined]
    for t in range(1, 41):
        out, read = feed(layer, q, k, v, 1)
        if t <= 16:
            want = attend(q[:, :, t - 1 : t], k[:, :, :t], v[:, :, :t]).out
            torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
        elif "0.01" in method:
            assert {s // 16 for s in read.slot.flatten().tolist() if s >= 0} == {(t - 1) // 16}


# -- tidaldecode -----------------------------------------------------------------------------------------------------------


def tidal(layers: int = 5, **settings: Any) -> list[Any]:
    method, board = tidaldecode.TidalDecode(**{"budget": 7, "dense_layers": 1, "reselect": 3} | settings), Board()
    out = [method.layer(geometry(i, layers)) for i in range(layers)]
    for layer in out:
        layer.join(board)
    return out


def test_two_layers_choose_and_the_others_read_what_they_chose() -> None:
    layers, inputs = tidal(), [drawn(32, seed=i) for i in range(5)]
    for layer, x in zip(layers, inputs, strict=True):
        feed(layer, *x, 30)
    for t in range(2):
        reads = []
        for layer, x in zip(layers, inputs, strict=True):
            out, read = feed(layer, *x, 1)
            reads.append(read.slot)
            if read.slot is None:
                want = attend(x[0][:, :, 30 + t : 31 + t], x[1][:, :, : 31 + t], x[2][:, :, : 31 + t]).out
                torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
        assert [r is None for r in reads] == [True, True, False, True, False]  # dense, choice, reuse, choice, reuse
        for source, reuse in ((1, 2), (3, 4)):
            q, k, _ = inputs[source]
            marked = tidaldecode.reference(q[:, :, 30 + t], k[:, :, : 31 + t], budget=7)
            for row in range(B):
                for head in range(H):
                    assert set(reads[reuse][row, head, 0].tolist()) == set(marked[row, head].nonzero()[:, 0].tolist())


def test_all_layers_choosing_is_the_full_model() -> None:
    method: Any = tidaldecode.TidalDecode(budget=3, dense_layers=0)
    always = mutant(tidaldecode.TidalDecode, chooses=lambda self, geometry: True)(**method.settings())
    q, k, v = drawn(20)
    layer = always.layer(geometry())
    layer.join(Board())
    feed(layer, q, k, v, 15)
    for t in range(5):
        out, _ = feed(layer, q, k, v, 1)
        want = attend(q[:, :, 15 + t : 16 + t], k[:, :, : 16 + t], v[:, :, : 16 + t]).out
        torch.testing.assert_close(out, want, rtol=0, atol=1e-12)


def test_a_choice_of_another_step_is_never_used() -> None:
    """Not of an earlier one, and not of one that was taken back and had the same place: the layer chooses for itself."""
    layers, x, other = tidal(), drawn(32), drawn(32, seed=1)
    for layer in layers:
        feed(layer, *x, 30)
        feed(layer, *x, 1)
    assert feed(layers[2], *x, 1)[1].slot is None
    for layer in layers:
        layer.crop(layer.seen - 30)
    for i, y in ((2, other), (4, x)):  # layer 3, the second that chooses, is not there
        assert feed(layers[i], *y, 1)[1].slot is None
    with pytest.raises(InvalidParameter, match="lies among"):
        tidaldecode.TidalDecode(dense_layers=4, reselect=2)


def test_the_next_layer_chooses_for_one_that_is_not_served() -> None:
    """As in a model where most layers keep a sliding window: here 0, 2, 5 and 6 of 8 are served."""
    layers, x = tidal(8, reselect=4), drawn(32)
    served = [layers[i] for i in (0, 2, 5, 6)]
    for layer in served:
        feed(layer, *x, 30)
    for _ in range(2):
        assert [feed(layer, *x, 1)[1].slot is None for layer in served] == [True, True, True, False]


def test_the_second_choice_is_two_fifths_deep() -> None:
    method = tidaldecode.TidalDecode()
    assert [i for i in range(32) if method.chooses(geometry(i, 32))] == [2, 13]
    assert [i for i in range(32) if method.dense(geometry(i, 32))] == [0, 1]


# -- recycled --------------------------------------------------------------------------------------------------------------


def test_the_schedule_and_what_is_recycled() -> None:
    q, k, v = drawn(60)
    layer: Any = recycled.Recycled(budget=10, stride=4).layer(geometry())
    feed(layer, q, k, v, 40)
    full, chosen = 39, None
    for t in range(40, 60):
        out, read = feed(layer, q, k, v, 1)
        if (t - 39) % 4 == 0:
            assert read.slot is None
            torch.testing.assert_close(
                out, attend(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1]).out, rtol=0, atol=1e-12
            )
            full = t
            continue
        scores = torch.einsum("bgrd,bgmd->bgrm", q[:, :, full].reshape(B, G, 2, D), k[:, :, : full + 1]) * D**-0.5
        maps = scores.softmax(-1).reshape(B, H, -1)
        chosen = recycled.reference(maps, G, top_k=10 - (t - full))
        for row in range(B):
            for kv in range(G):
                want = chosen[row][kv] | set(range(full + 1, t + 1))
                assert {s for s in read.slot[row, kv, 0].tolist() if s >= 0} == want
                assert len(want) == 10
    assert chosen is not None


def test_grown_sets_keep_all_of_r() -> None:
    q, k, v = drawn(48)
    layer: Any = recycled.Recycled(budget=6, stride=8, grow=True).layer(geometry())
    feed(layer, q, k, v, 40)
    for t in range(1, 8):
        _, read = feed(layer, q, k, v, 1)
        assert (read.slot >= 0).sum(-1).unique().tolist() == [6 + t]


@pytest.mark.parametrize(("similarity", "full"), [(-1.0, 0), (1.1, 12)])
def test_thresholds_at_their_ends(similarity: float, full: int) -> None:
    q, k, v = drawn(52)
    layer: Any = recycled.Recycled(budget=10, similarity=similarity).layer(geometry())
    feed(layer, q, k, v, 40)
    assert sum(feed(layer, q, k, v, 1)[1].slot is None for _ in range(12)) == full


def test_similarity_does_not_see_the_rotation() -> None:
    """The same content at another place is the same query."""
    q, k, v = drawn(44)
    rope = geometry().rope
    assert rope is not None
    for t in range(40, 44):
        q[:, :, t] = rope.rotate(q[:, :, 39], torch.full((B, H), t - 39))
    layer: Any = recycled.Recycled(budget=10, similarity=0.9999).layer(geometry())
    feed(layer, q, k, v, 40)
    assert all(feed(layer, q, k, v, 1)[1].slot is not None for _ in range(4))


def test_the_training_mask_is_the_pattern() -> None:
    draw = torch.Generator().manual_seed(0)
    t, stride, top = 13, 4, 3
    maps = torch.rand(1, 2, t, t, generator=draw).tril()
    mask = recycled.training_mask(maps, stride=stride, top_k=top)
    for g in range(2):
        for i in range(t):
            first = i - i % stride
            best = {j for j in maps[0, g, first].topk(top).indices.tolist() if j <= first}
            want = set(range(i + 1)) if i == first else best | set(range(first, i + 1))
            assert set(mask[0, g, i].nonzero()[:, 0].tolist()) == want


def test_recycled_needs_room_for_new_tokens() -> None:
    with pytest.raises(InvalidParameter, match="no room"):
        recycled.Recycled(budget=8, stride=10)
    assert replace(recycled.Recycled(budget=8, stride=10, grow=True)).grow
