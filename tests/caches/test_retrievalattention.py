"""RetrievalAttention: the oracles of its page, on the indexes and on the store."""

from __future__ import annotations

import copy
import heapq
import itertools

import pytest
import torch
from torch import Tensor

import qkv
from qkv.caches._index import graph
from qkv.caches._index.flat import FlatIndex
from qkv.caches._index.graph import QueryAwareGraphIndex
from qkv.caches._index.index import Index
from qkv.caches._index.ivf import CellIndex
from qkv.caches._stores import retrieval
from qkv.caches._stores.retrieval import RetrievalCache
from qkv.caches.retrievalattention import RetrievalAttention, reference
from qkv.core.attend import attend
from qkv.core.cache import Geometry, Step
from qkv.core.errors import InvalidInput, InvalidParameter, MissingDependency, Refused, StateError
from qkv.core.merge import merge

H, G, D = 6, 3, 8
SMALL = {"sinks": 2, "recent": 4, "top_k": 5, "rebuild": 8, "keep_queries": 2, "degree": 6, "near": 8, "ef": 8}


def memory(**changes: object) -> RetrievalCache:
    layer = RetrievalAttention(**(SMALL | changes)).layer(Geometry(H, G, D, D))  # type: ignore[arg-type]
    assert isinstance(layer, RetrievalCache)
    return layer


def draw(n: int, b: int = 1, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return [(torch.randn(b, h, n, D, generator=gen, dtype=torch.float64) * 1.5).to(dtype) for h in (H, G, G)]


def feed(layer: RetrievalCache, tensors: list[Tensor], cuts: list[int], compute: object = None) -> Tensor:
    outs, b = [], tensors[0].shape[0]
    for n in cuts:
        at = slice(layer.seen, layer.seen + n)
        position = torch.arange(at.start, at.stop, dtype=torch.int32).expand(b, n)
        step = Step(position, D**-0.5, compute=compute)  # type: ignore[arg-type]
        outs.append(layer.attend(*(x[:, :, at] for x in tensors), step))
    return torch.cat(outs, 2)


def clouds(m: int = 600, n: int = 200, d: int = 16, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, queries to build from, and later queries: queries come from elsewhere than keys, and from few directions."""
    gen = torch.Generator().manual_seed(seed)
    keys = torch.randn(1, 2, m, d, generator=gen)
    topics = 2 * torch.randn(12, d, generator=gen)
    pick = torch.randint(0, 12, (1, 6, n + 20), generator=gen)
    queries = topics[pick] + torch.randn(1, 6, n + 20, d, generator=gen)
    return keys, queries[:, :, :n], queries[:, :, n:]


def recall(index: Index, keys: Tensor, queries: Tensor, k: int, **more: int) -> tuple[float, float]:
    """(share of the true best k that is found, share of the keys that is scanned)."""
    hits, scanned = [], []
    for i in range(queries.shape[2]):
        q = queries[:, :, i].reshape(1, keys.shape[1], -1, keys.shape[3])
        found, true = index.search(q, keys, k, **more), FlatIndex.build(keys).search(q, keys, k)
        hits.append((found.index.unsqueeze(-1) == true.index.unsqueeze(-2)).any(-1).float().mean())
        scanned.append(found.scanned.float().mean() / keys.shape[2])
    return float(torch.stack(hits).mean()), float(torch.stack(scanned).mean())


# -- indexes -------------------------------------------------------------------------------------------------------------


def test_flat_is_topk() -> None:
    keys, _, later = clouds()
    q = later[:, :, 0].reshape(1, 2, 3, -1)
    found, true = FlatIndex.build(keys).search(q, keys, 50), (q @ keys.mT).topk(50)
    assert torch.equal(found.score, true.values) and torch.equal(found.index, true.indices)
    assert found.scanned.eq(600).all()


def test_the_graph_finds_more_with_more_in_view_and_all_in_the_end() -> None:
    keys, queries, later = clouds()
    index = QueryAwareGraphIndex.build(keys, queries, degree=16, near=50)
    curve = [recall(index, keys, later, 20, ef=ef) for ef in (20, 40, 80, 600)]
    assert all(a[0] <= b[0] and a[1] < b[1] for a, b in itertools.pairwise(curve)), curve
    assert curve[2][0] > 0.9 and curve[2][1] < 0.6, curve
    assert curve[3][0] == 1.0, "with every key in view and every key within reach nothing is missed"


def test_queries_make_a_better_graph_than_keys_at_equal_scan() -> None:
    """The claim of the paper, with the control: a graph of keys alone."""
    keys, queries, later = clouds()
    ours = QueryAwareGraphIndex.build(keys, queries, degree=16, near=50)
    theirs = QueryAwareGraphIndex.build(keys, keys, degree=16, near=50)
    mine, scan = recall(ours, keys, later, 20, ef=40)
    other = [recall(theirs, keys, later, 20, ef=ef) for ef in (20, 40, 60, 80)]
    least = min(s for _, s in other)
    best = max(r for r, s in other if s <= max(1.05 * scan, least))
    assert scan < 1.05 * least and mine > best + 0.05, (mine, scan, other)


@pytest.mark.parametrize("prune", ["together", "occlusion"])
@pytest.mark.parametrize("many", [1, 2, 9, 40])
def test_every_key_is_within_reach(many: int, prune: str) -> None:
    """Also from one query, which names few keys."""
    gen = torch.Generator().manual_seed(many)
    keys, queries = torch.randn(1, 2, many, D, generator=gen), torch.randn(1, 4, 1, D, generator=gen)
    index = QueryAwareGraphIndex.build(keys, queries, degree=2, near=3, prune=prune)  # type: ignore[arg-type]
    found = index.search(queries.reshape(1, 2, 2, D), keys, many)
    assert found.index.sort(-1).values.eq(torch.arange(many)).all() and found.scanned.eq(many).all()


def test_the_walk_is_best_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """One node at a time it visits what a heap visits."""
    monkeypatch.setattr(graph, "AT_ONCE", 1)
    keys, queries, later = clouds(200, 60)
    index = QueryAwareGraphIndex.build(keys, queries, degree=6, near=20)
    links, entry = index.parts["links"][0], index.parts["entry"][0]
    for i in range(4):
        q = later[:, :, i].reshape(1, 2, 3, -1)
        got = index.search(q, keys, 10, ef=15)
        for head in range(2):
            for r in range(3):
                score = (keys[0, head] @ q[0, head, r]).tolist()
                seen = {int(entry[head])}
                todo, view = (
                    [(-score[int(entry[head])], int(entry[head]))],
                    [(score[int(entry[head])], int(entry[head]))],
                )
                while todo:
                    worth, node = heapq.heappop(todo)
                    if len(view) == 15 and -worth < view[0][0]:
                        break
                    for other in links[head, node].tolist():
                        if other >= 0 and other not in seen:
                            seen.add(other)
                            heapq.heappush(todo, (-score[other], other))
                            heapq.heappush(view, (score[other], other))
                            if len(view) > 15:
                                heapq.heappop(view)
                want = [n for _, n in sorted(view, reverse=True)[:10]]
                assert got.index[0, head, r].tolist() == want
                assert int(got.scanned[0, head, r]) == len(seen)


def test_cells() -> None:
    keys, _, later = clouds()
    every = recall(CellIndex.build(keys, probes=1000), keys, later, 20)
    assert every == (1.0, 1.0)
    some, scan = recall(CellIndex.build(keys, probes=6), keys, later, 20)
    assert scan < some < 1


@pytest.mark.parametrize("kind", [QueryAwareGraphIndex, CellIndex, FlatIndex])
def test_rows_of_an_index_are_independent(kind: type[Index]) -> None:
    """Rows of different size in one index find what they find alone; rows can be put in and moved."""
    parts = [clouds(m, 80, seed=m) for m in (90, 40, 150)]
    most = max(k.shape[2] for k, _, _ in parts)
    keys = torch.cat([torch.nn.functional.pad(k, (0, 0, 0, most - k.shape[2]), value=1e3) for k, _, _ in parts])
    queries, later = torch.cat([q for _, q, _ in parts]), torch.cat([x for _, _, x in parts])
    index = kind.build(keys, queries, torch.tensor([90, 40, 150]))  # type: ignore[attr-defined]
    order = torch.tensor([2, 0, 0, 1])
    q = later[:, :, 0].reshape(3, 2, 3, -1)
    got = index.select(order).search(q[order], keys[order], 60)
    for place, row in enumerate(order.tolist()):
        k, built, _ = parts[row]
        alone = kind.build(k, built).search(q[row : row + 1], k, 60)  # type: ignore[attr-defined]
        torch.testing.assert_close(got.score[place], alone.score[0])
        assert torch.equal(got.index[place], alone.index[0]) and torch.equal(got.scanned[place], alone.scanned[0])


def test_an_index_needs_queries_that_fit() -> None:
    keys = torch.randn(1, 2, 5, D)
    with pytest.raises(InvalidInput, match="none was given"):
        QueryAwareGraphIndex.build(keys, torch.randn(1, 4, 0, D))
    with pytest.raises(InvalidInput, match="whole groups"):
        QueryAwareGraphIndex.build(keys, torch.randn(1, 3, 4, D))
    with pytest.raises(InvalidInput, match="takes keys"):
        QueryAwareGraphIndex.build(keys[0], torch.randn(1, 3, 4, D))


def test_a_library_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from qkv.caches._index.external import FaissIndex

    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingDependency, match="pip install faiss-cpu"):
        FaissIndex.build(torch.randn(1, 2, 5, D))
    monkeypatch.undo()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Refused, match="pip install faiss-cpu"):
        memory(index="faiss")


def test_faiss_as_a_baseline() -> None:
    pytest.importorskip("faiss")
    from qkv.caches._index.external import FaissIndex

    keys, queries, later = clouds()
    index = FaissIndex.build(keys, queries, ef=100)
    assert recall(index, keys, later, 20)[0] > 0.8
    assert recall(copy.deepcopy(index), keys, later, 20)[0] > 0.8
    tensors = draw(60)
    layer = memory(index="faiss")
    feed(layer, tensors, [30, *[1] * 10])
    twin = memory(index="faiss")
    twin.restore(layer.tensors())
    torch.testing.assert_close(feed(twin, tensors, [1] * 20), feed(layer, tensors, [1] * 20))


# -- reading -------------------------------------------------------------------------------------------------------------


def test_the_definition_of_a_step() -> None:
    """The static set and the best others, per query head, at 1e-12."""
    q, k, v = draw(50)
    got = feed(memory(index="flat"), [q, k, v], [20, *[1] * 30])
    for t in range(20, 50):
        for head in range(H):
            want = reference(
                q[0, head, t],
                k[0, head // 2, : t + 1],
                v[0, head // 2, : t + 1],
                sinks=2,
                recent=4,
                top_k=5,
                scale=D**-0.5,
            )
            torch.testing.assert_close(got[0, head, t], want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("index", ["flat", "graph", "ivf"])
def test_everything_retrieved_is_exact(index: str) -> None:
    q, k, v = draw(60, b=2)
    got = feed(memory(index=index, top_k=1000, probes=1000), [q, k, v], [20, *[1] * 20, 12, *[1] * 8])
    torch.testing.assert_close(got, attend(q, k, v, causal=True).out, rtol=0, atol=1e-12)


def test_parts_must_not_overlap() -> None:
    """The identity behind the merge; and the control: keys counted twice change the result."""
    q, k, v = draw(30)
    q = q[:, :, -1:]
    whole = attend(q, k, v)
    two = [attend(q, k[:, :, at], v[:, :, at])[:2] for at in (slice(0, 11), slice(11, 30))]
    torch.testing.assert_close(merge(*two)[0], whole.out, rtol=0, atol=1e-12)
    torch.testing.assert_close(merge(*two)[1], whole.lse, rtol=0, atol=1e-12)
    twice = attend(q, k[:, :, 5:], v[:, :, 5:])[:2]
    assert (merge(two[0], twice)[0] - whole.out).abs().max() > 1e-3


def test_the_error_is_bounded_by_what_was_not_read() -> None:
    q, k, v = draw(80, seed=3)
    for index in ("flat", "graph", "ivf"):
        got = feed(memory(index=index, probes=2), [q, k, v], [50, *[1] * 30])
        for t in range(50, 80):
            at = slice(t, t + 1)
            whole = attend(q[:, :, at], k[:, :, : t + 1], v[:, :, : t + 1])
            read = _captured(q[:, :, at], k[:, :, : t + 1], v[:, :, : t + 1], got[:, :, at], whole.out)
            assert read, f"{index}, token {t}"


def _captured(q: Tensor, k: Tensor, v: Tensor, got: Tensor, full: Tensor) -> bool:
    """||o - o_full|| <= 2 (1 - captured) max ||v||, with what the static set alone captures as the lower bound."""
    p = (q.reshape(1, G, 2, D) @ k.mT * D**-0.5).softmax(-1)
    captured = p[..., :2].sum(-1) + p[..., -4:].sum(-1)
    bound = 2 * (1 - captured).reshape(1, H) * v.norm(dim=-1).amax(-1).repeat_interleave(2, 1)
    return bool(((got - full).norm(dim=-1)[:, :, 0] <= bound + 1e-9).all())


def test_the_order_of_keys_does_not_matter_to_a_scan() -> None:
    """Tokens between the static ends permuted: the same output."""
    q, k, v = draw(40, seed=4)
    order = torch.cat(
        (torch.arange(2), 2 + torch.randperm(30, generator=torch.Generator().manual_seed(0)), torch.arange(32, 40))
    )
    outs = []
    for place in (torch.arange(40), order):
        layer = memory(index="flat")
        feed(layer, [q, k[:, :, place], v[:, :, place]], [38])
        outs.append(feed(layer, [q, k[:, :, place], v[:, :, place]], [1, 1]))
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("index", ["flat", "graph"])
def test_another_compute_sees_the_same_keys(index: str) -> None:
    """Steering, patterns and observers are handed the static set and what was retrieved, for each query head."""
    tensors, cuts = draw(60, b=2, seed=5), [20, *[1] * 20, 12, *[1] * 8]

    def run(*args: Tensor, **more: object) -> Tensor:
        return attend(*args, **more).out  # type: ignore[arg-type]

    torch.testing.assert_close(
        feed(memory(index=index), tensors, cuts, run), feed(memory(index=index), tensors, cuts), rtol=0, atol=1e-12
    )


def test_a_later_block_reads_everything_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "PIECE", 7)
    q, k, v = draw(70, b=2, seed=6)
    got = feed(memory(), [q, k, v], [20, 33, 17])
    torch.testing.assert_close(got, attend(q, k, v, causal=True).out, rtol=0, atol=1e-12)


def test_what_leaves_the_window_is_scanned_until_the_index_is_built_anew() -> None:
    tensors, layer = draw(60), memory()
    feed(layer, tensors, [14])
    assert layer.built.index is None
    ends = []
    for _ in range(30):
        feed(layer, tensors, [1])
        ends.append(layer.built.end[0])
        assert 0 <= layer.lengths[0] - 4 - ends[-1] <= 8
    assert ends[0] == 11 and set(ends) == {11, 20, 29, 38}, ends


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_accumulated_in_float32(dtype: torch.dtype) -> None:
    wide, half = draw(80, dtype=torch.float32), draw(80, dtype=dtype)
    a, b = feed(memory(), [x.to(dtype).float() for x in wide], [50, *[1] * 30]), feed(memory(), half, [50, *[1] * 30])
    assert b.dtype == dtype
    torch.testing.assert_close(b.float()[:, :, 50:], a[:, :, 50:], rtol=0.02, atol=0.02)


# -- memory ---------------------------------------------------------------------------------------------------------------


def test_the_static_set_is_all_that_stays_with_the_model() -> None:
    tensors, layer = draw(400, dtype=torch.float32), memory()
    feed(layer, tensors, [300, *[1] * 100])
    assert layer.resident() == 2 * G * 6 * D * 4
    assert layer.bytes() > layer.full_bytes(tensors[1], tensors[2]) > 40 * layer.resident()


def test_going_back_behind_the_building_of_the_index() -> None:
    """Refused, unless speculation recorded; then it is as if it had not been built."""
    tensors, wrong = draw(60), draw(60, seed=9)
    layer = memory()
    feed(layer, tensors, [14, 1, 1])
    feed(layer, tensors, [1] * 7)
    assert layer.built.at[0] == 15
    before = layer.tensors()
    with pytest.raises(StateError, match="index was built"):
        layer.crop(9)
    assert all(torch.equal(x, layer.tensors()[n]) for n, x in before.items())
    layer, plain = memory(), memory()
    layer.announce(14)
    layer.record()
    feed(layer, tensors, [14])
    feed(plain, tensors, [14])
    for i in range(10):
        mixed = [
            torch.cat((x[:, :, : layer.seen + i % 4], y[:, :, layer.seen + i % 4 :]), 2)
            for x, y in zip(tensors, wrong, strict=True)
        ]
        feed(layer, mixed, [4])
        layer.crop(4 - i % 4)
        if i % 4:
            feed(plain, tensors, [1] * (i % 4))
        assert layer.built.end == plain.built.end and layer.lengths == plain.lengths


def test_saved_with_an_index_and_read_without() -> None:
    tensors, layer = draw(40), memory()
    feed(layer, tensors, [30, 1])
    with pytest.raises(StateError, match="hold an index"):
        memory(index="flat").restore(layer.tensors())


def test_custom_masks_are_refused() -> None:
    q, k, v = draw(4)
    step = Step(torch.arange(4).expand(1, 4), 1.0, mask=torch.ones(1, 1, 4, 4, dtype=torch.bool))
    with pytest.raises(Refused, match="2-D attention_mask"):
        memory().attend(q, k, v, step)


@pytest.mark.parametrize("bad", [{"recent": 0}, {"top_k": 0}, {"index": "tree"}, {"sinks": -1}, {"near": 1}, {"ef": 0}])
def test_bad_parameters(bad: dict[str, object]) -> None:
    with pytest.raises(InvalidParameter):
        qkv.method("retrievalattention", **bad)


def test_a_report_says_what_stays_with_the_model() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=3,
        )
    ).eval()
    model.generation_config.pad_token_id = 0
    with qkv.applied(model, RetrievalAttention(**SMALL)):  # type: ignore[arg-type]
        model.generate(torch.randint(1, 97, (1, 40)), max_new_tokens=6, do_sample=False)
        report = qkv.report(model)
    assert 0 < report.resident < report.full_bytes / 4 < report.bytes


def test_slots_that_hold_nothing_cannot_spoil_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory comes as the system gives it: were it not cleared, a shorter row would read what lies behind its tokens."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **kw: empty(*a, **kw).fill_(torch.nan))
    q, k, v = draw(60, b=2)
    padding = torch.ones(2, 60, dtype=torch.bool)
    padding[1, :9] = False
    position = (padding.int().cumsum(-1) - 1).masked_fill(~padding, -1)
    layer = memory()
    for start, stop in ((0, 20), (20, 21), (21, 50), (50, 51), (51, 60)):
        at = slice(start, stop)
        out = layer.attend(q[:, :, at], k[:, :, at], v[:, :, at], Step(position[:, at], D**-0.5, padding[:, :stop]))
        assert out[:, :, max(0, 9 - start) :].isfinite().all()
