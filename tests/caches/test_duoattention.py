"""DuoAttention: the oracles of its page, on the memory, the gates and their training."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

import qkv
from qkv.caches._stores.split import SplitCache
from qkv.caches.duoattention import DuoAttention, reference, retrieval_heads
from qkv.core.attend import attend
from qkv.core.cache import Board, Geometry, Step
from qkv.core.errors import InvalidInput, InvalidParameter, QKVError, Refused, StateError
from qkv.core.heads import HeadTable
from qkv.probes._mixture import Mixed
from qkv.probes.duo_gates import DuoGates, multi_passkey, train_duo_gates
from qkv.probes.duo_gates import reference as mixture
from qkv.testing import Case, laws
from qkv.testing._tiny import decoder

torch.set_num_threads(1)
H, G, D, L = 6, 3, 8, 2
GATES = ((0.9, 0.1, 0.8), (0.2, 0.7, 0.3))
SITE = Geometry(H, G, D, D, layer=0, layers=L)


def draw(n: int, b: int = 1, h: int = H, g: int = G, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(b, x, n, D, generator=gen, dtype=torch.float64) for x in (h, g, g))
    return q, k, v


def feed(layer, qkv_: tuple[Tensor, ...], cuts: list[int]) -> Tensor:
    outs = []
    for n in cuts:
        at = slice(layer.seen, layer.seen + n)
        position = torch.arange(at.start, at.stop, dtype=torch.int32).expand(qkv_[0].shape[0], n)
        outs.append(layer.attend(*(x[:, :, at] for x in qkv_), Step(position, D**-0.5)))
    return torch.cat(outs, 2)


def duo(**more: Any) -> DuoAttention:
    return DuoAttention(**({"gates": GATES, "sinks": 2, "recent": 5} | more))


@pytest.mark.parametrize("cuts", [[40], [1] * 40, [7, 1, 1, 20, 11], [33, *[1] * 7]], ids=str)
def test_two_caches_are_masked_dense_attention(cuts: list[int]) -> None:
    q, k, v = draw(40)
    mask = reference([True, False, True], 40, sinks=2, recent=5)[None]
    want = attend(q, k, v, mask=mask).out
    torch.testing.assert_close(feed(duo().layer(SITE), (q, k, v), cuts), want, rtol=0, atol=1e-12)


def test_the_limits_are_full_attention_and_a_plain_streaming_cache() -> None:
    x = draw(30)
    want = attend(*x, causal=True).out
    torch.testing.assert_close(feed(duo(sparsity=0.0).layer(SITE), x, [20, *[1] * 10]), want, rtol=0, atol=1e-12)
    torch.testing.assert_close(feed(duo(recent=30).layer(SITE), x, [20, *[1] * 10]), want, rtol=0, atol=1e-12)
    stream = qkv.method("streamingllm", sinks=2, window=4, positions="original")
    got, want = (feed(m.layer(SITE), x, [20, *[1] * 10]) for m in (duo(sparsity=1.0), stream))
    assert torch.equal(got, want)


def test_a_full_prefill_sees_the_whole_block_and_is_trimmed_afterwards() -> None:
    x = draw(30)
    layer = duo(prefill="full").layer(SITE)
    torch.testing.assert_close(
        feed(layer, x, [20]), attend(*(t[:, :, :20] for t in x), causal=True).out, rtol=0, atol=1e-12
    )
    mask = reference([True, False, True], 30, sinks=2, recent=5)[None, :, 20:]
    want = attend(x[0][:, :, 20:], x[1], x[2], mask=mask).out
    torch.testing.assert_close(feed(layer, x, [1] * 10), want, rtol=0, atol=1e-12)


def test_laws_hold_with_a_full_prefill() -> None:
    case = Case(DuoAttention(prefill="full"))
    for name, law in laws("cache").items():
        if law.applies(case) and name not in ("chunks_are_exact", "chunked_prefill") and not law.expensive:
            law.run(case)


def test_bytes_are_those_of_the_tokens_each_head_keeps() -> None:
    q, k, v = (x.float() for x in draw(400, b=2))
    layer = duo(recent=33, sinks=3).layer(SITE)
    feed(layer, (q, k, v), [400])
    stored = (
        2 * (2 * 400 + 1 * (3 + 33)) * D * 2 * 4
    )  # rows, heads x tokens (a free slot in place of the newest), k and v
    assert layer.bytes() == stored + 2 * (3 + 33) * 4 + 2 * 8  # positions in int32, budgets
    assert (layer.positions() >= 0).sum(-1).tolist() == [[400, 35, 400]] * 2
    assert layer.kept() == 400


def test_gates_choose_by_quantile_and_break_ties() -> None:
    gates = torch.linspace(0, 1, 90).reshape(30, 3)
    for sparsity, full in ((0.0, 90), (0.5, 45), (0.75, 23), (1.0, 0)):
        assert sum(map(sum, retrieval_heads(gates.tolist(), sparsity))) == full
    flat = retrieval_heads(torch.ones(30, 3).tolist(), 0.5)
    assert sum(map(sum, flat)) == 45, "equal gates are told apart"
    assert retrieval_heads([[1.0, None], [0.0, None]], 0.5) == [[True, False], [False, False]]


@pytest.mark.parametrize("heads", [6, 8])
def test_heads_that_are_not_evenly_spaced(heads: int) -> None:
    site = Geometry(2 * heads, heads, D, D, layer=0, layers=1)
    full = [i in (0, 1, 4) for i in range(heads)]
    gates = (tuple(0.9 if x else 0.1 for x in full),)
    x = draw(25, b=2, h=2 * heads, g=heads)
    layer = DuoAttention(gates=gates, sinks=1, recent=4, sparsity=1 - 3 / heads).layer(site)
    want = attend(*x, mask=reference(full, 25, sinks=1, recent=4)[None]).out
    torch.testing.assert_close(feed(layer, x, [11, 1, 1, 9, 1, 1, 1]), want, rtol=0, atol=1e-12)
    held = layer.bytes()
    assert any(part.index is not None for part in layer.parts)  # type: ignore[attr-defined]
    layer.reset()
    assert held and layer.bytes() == 0


def test_a_custom_attention_knows_its_heads_by_number() -> None:
    """Steering by head number acts on the same heads, in whatever group they are."""
    model, ids = decoder(), torch.randint(3, 60, (1, 20), generator=torch.Generator().manual_seed(0))
    method = DuoAttention(gates=((0.9, 0.1, 0.2),) * 5, sparsity=0.0)
    split = DuoAttention(gates=((0.9, 0.1, 0.2),) * 5, sinks=2, recent=1 << 20)
    outs = []
    for cache in (method, split):
        with qkv.applied(model, cache, qkv.method("head-ablation", heads=("1.0", "1.3", "2.5"))):
            outs.append(model.generate(ids, max_new_tokens=8, do_sample=False, output_logits=True,
                                       return_dict_in_generate=True))  # fmt: skip
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    for a, b in zip(outs[0].logits, outs[1].logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_a_split_memory_passes_everything_on() -> None:
    layer = duo().layer(SITE)
    assert isinstance(layer, SplitCache)
    board = Board()
    layer.join(board)
    assert all(part.memory.board is board for part in layer.parts)
    feed(layer, draw(12), [12])
    counters = layer.counters()
    layer.advance()
    assert layer.seen == 13
    layer.recount(counters)
    assert layer.seen == 12 and all(part.memory.seen == 12 for part in layer.parts)
    assert not layer.static() and layer.buffers()
    with pytest.raises(StateError):
        layer.crop(13)
    other = DuoAttention(gates=((0.9, 0.1, 0.1), (0.2, 0.7, 0.8)), sinks=2, recent=5).layer(SITE)
    with pytest.raises(StateError, match="KV heads"):
        other.restore(layer.tensors())


def test_inverted_gates_lose_what_the_gates_keep() -> None:
    """One head carries a far token: kept whole it is read exactly, streaming it is gone."""
    q, k, v = draw(60)
    good, bad = (duo(gates=g).layer(SITE) for g in (GATES, tuple(tuple(1 - x for x in row) for row in GATES)))
    want = attend(q, k, v, causal=True).out[:, :2, -1]
    errors = [float((feed(layer, (q, k, v), [60])[:, :2, -1] - want).abs().max()) for layer in (good, bad)]
    assert errors[0] < 1e-12 < 0.1 < errors[1]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"gates": ((0.5, 1.5),)}, "lie in"),
        ({"gates": ((0.5, 0.5), (0.5,))}, "every layer"),
        ({"gates": 0.5}, "rows of numbers"),
        ({"gates": "nowhere.json"}, "qkv inspect"),
        ({"recent": 1}, "recent"),
        ({"sparsity": 1.2}, "sparsity"),
    ],
    ids=str,
)
def test_parameters_that_mean_nothing_are_refused(parameters: dict, message: str) -> None:
    with pytest.raises(InvalidParameter, match=message):
        DuoAttention(**parameters)


def test_gates_of_another_model_are_refused(tmp_path) -> None:
    for gates, message in (((), "learned on this model"), (((0.1,) * 3,) * 3, "3 layers"), (((0.1,) * H,) * L, "query head"),
                           (((None,) * 3, (0.1,) * 3), "not measured")):  # fmt: skip
        with pytest.raises(Refused, match=message):
            DuoAttention(gates=gates).layer(SITE)
    with pytest.raises(InvalidParameter, match="by_kv_head"):
        DuoAttention(gates=HeadTable(torch.rand(L, H), "x", "head", 2))  # type: ignore[arg-type]
    with pytest.raises(Refused, match="causal"):
        duo().layer(SITE).attend(*draw(4), Step(torch.arange(4)[None], 1.0, causal=False))


def test_gates_from_a_file_are_kept_in_the_configuration(tmp_path) -> None:
    table = HeadTable(torch.tensor(GATES), "duo gate", "kv_head", 2, (), {"sinks": 7, "recent": 33})
    method = DuoAttention(gates=str(table.save(tmp_path / "gates.json")))
    (tmp_path / "gates.json").unlink()
    assert (method.sinks, method.recent) == (7, 33)
    assert torch.tensor(method.gates).allclose(torch.tensor(GATES), atol=1e-6)
    assert qkv.core.registry.from_dict(method.to_dict()) == method
    assert "gates=2x3" in str(method) and len(str(method)) < 80
    model = decoder()
    qkv.apply(model, DuoAttention(gates=((0.9, 0.1, 0.4),) * 5, sinks=1, recent=4))
    qkv.save(model, tmp_path / "saved")
    qkv.revert(model)
    again = qkv.load(tmp_path / "saved", model=model)
    assert qkv.report.__module__ and again is model
    qkv.revert(model)


# -- gates ----------------------------------------------------------------------------------------------------------


def test_the_mixture_is_its_definition_and_its_gradient_is_right() -> None:
    q, k, v = draw(12)
    gates = torch.rand(1, G, dtype=torch.float64, requires_grad=True)
    site = qkv.sites(decoder())[0]
    mixed = Mixed(gates=gates, sinks=2, recent=3)

    def run(gates: Tensor) -> Tensor:
        from qkv.core.attend import sdpa

        object.__setattr__(mixed, "gates", gates)
        return mixed.wrap(site, sdpa)(q, k, v, mask=None, causal=True, scale=D**-0.5)

    torch.testing.assert_close(run(gates), mixture(q, k, v, gates[0], sinks=2, recent=3), rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(run, (gates,))


def test_the_loss_is_zero_with_open_gates_and_reaches_gates_alone() -> None:
    model = decoder()
    probe = DuoGates(sinks=1, recent=3)
    batch = {"input_ids": torch.randint(3, 60, (1, 17), generator=torch.Generator().manual_seed(0))}
    for source in ("student", "teacher"):
        gates = torch.ones(5, G, requires_grad=True)
        assert float(probe.replace(full_source=source).loss(model, batch, gates).detach()) < 1e-20  # type: ignore[attr-defined]
    gates = torch.full((5, G), 0.5, requires_grad=True)
    probe.loss(model, batch, gates).backward()
    assert gates.grad is not None and bool((gates.grad != 0).all())
    cost = gates.abs().mean()
    assert torch.allclose(torch.autograd.grad(cost, gates)[0], torch.full((5, G), 1 / (5 * G)))


def test_training_texts_hide_and_ask() -> None:
    class Words:
        bos_token_id = None

        def __init__(self) -> None:
            self.known: dict[str, int] = {}

        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            return {"input_ids": [self.known.setdefault(w, len(self.known)) for w in text.split()]}

    words = Words()
    batch = multi_passkey(words, list(range(900, 950)), 400, needles=3, words=5, draw=random.Random(0))
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    assert ids.shape == labels.shape == (400,)
    asked = labels != -100
    assert bool(asked[-1]) and not bool(asked[0]) and torch.equal(labels[asked], ids[asked])
    assert int(asked.sum()) == 3 * len(
        words("What is the first pass key to the vault? The first pass key is: a b c d e.")["input_ids"]
    )
    with pytest.raises(InvalidInput, match="longer lengths"):
        multi_passkey(words, [1], 60, needles=3, words=5, draw=random.Random(0))


def test_train_duo_gates_gives_a_table_that_the_cache_takes(tmp_path) -> None:
    model = decoder()
    before = {n: (p.requires_grad, p.clone()) for n, p in model.named_parameters()}
    data = [{"input_ids": torch.randint(3, 60, (1, 30)), "labels": torch.arange(30)[None] - 10}]
    table = train_duo_gates(model, data, steps=12, learning_rate=0.1, sinks=1, recent=3)
    assert table.unit == "kv_head" and tuple(table.values.shape) == (5, G)
    assert bool(((table.values >= 0) & (table.values <= 1)).all()) and float(table.values.min()) < 1
    for n, p in model.named_parameters():
        assert p.requires_grad == before[n][0] and torch.equal(p, before[n][1]) and p.grad is None
    method = DuoAttention(gates=str(table.save(tmp_path / "g.json")))
    assert (method.sinks, method.recent) == (1, 3)
    with qkv.applied(model, method):
        model.generate(torch.randint(3, 60, (1, 150)), max_new_tokens=4, do_sample=False)
        assert 0 < qkv.report(model).ratio < 1


@pytest.mark.parametrize("data", [None, [], "text", [{"input_ids": torch.zeros(1, 3)}], [{"input_ids": torch.ones(1, 3).long(),
                         "labels": torch.full((1, 3), -100)}]], ids=str)  # fmt: skip
def test_training_data_that_cannot_be_used_is_refused(data: object) -> None:
    with pytest.raises(QKVError):
        DuoGates(steps=1).run(decoder(), data=data)
