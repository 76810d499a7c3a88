"""Shared prefixes: common tokens lie there once, whatever the rows do next, and outputs are those of a plain cache."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import qkv
from qkv.caches._stores.dense import DenseCache
from qkv.caches._stores.prefixed import PrefixedCache
from qkv.caches.shared_prefix import SharedPrefix, reference
from qkv.core.cache import Board, Geometry, LayerCache, Step
from qkv.core.errors import InvalidParameter, Refused, StateError
from qkv.testing.caches import tiny

H, G, D, E = 6, 3, 8, 5
TOKEN = (D + E) * G * 8  # bytes of one in float64


def memory(layer: int = 0, shortest: int = 4) -> PrefixedCache:
    made = SharedPrefix(min_tokens=shortest).layer(Geometry(H, G, D, E, layer=layer, layers=3))
    assert isinstance(made, PrefixedCache)
    return made


def texts(lines: Sequence[str]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q, k, v and padding of rows; a row's token is a letter (keys by letter and place), its padding a dot."""
    gen = torch.Generator().manual_seed(0)
    table = torch.randn(128, 512, G * (D + E), generator=gen, dtype=torch.float64)
    rows = []
    for line in lines:
        pads = len(line) - len(line.lstrip("."))
        rows.append(torch.stack([table[ord(c), max(0, i - pads)] for i, c in enumerate(line)]))
    x = torch.stack(rows).view(len(lines), -1, G, D + E).transpose(1, 2)
    q = torch.randn(len(lines), H, x.shape[2], D, generator=gen, dtype=torch.float64)
    padding = torch.tensor([[c != "." for c in line] for line in lines])
    return q, x[..., :D].contiguous(), x[..., D:].contiguous(), None if bool(padding.all()) else padding


def feed(
    layer: LayerCache, text: tuple[Tensor, Tensor, Tensor, Tensor | None], cuts: Sequence[int], **more: Any
) -> Tensor:
    q, k, v, padding = text
    real = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool) if padding is None else padding
    position = (real.cumsum(-1) - 1).masked_fill(~real, -1).int()
    outs = []
    for n in cuts:
        at = slice(layer.seen, layer.seen + n)
        step = Step(position[:, at], D**-0.5, None if padding is None else padding[:, : at.stop], **more)
        outs.append(layer.attend(q[:, :, at], k[:, :, at], v[:, :, at], step))
    return torch.cat(outs, 2)


def held(layer: PrefixedCache) -> list[int]:
    """Lengths of the runs."""
    return [run.length for run in layer.runs]


def compare(got: Tensor, want: Tensor, padding: Tensor | None) -> None:
    if padding is not None:
        at = padding[:, None, : got.shape[2], None]
        got, want = got * at, want * at
    torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


TREE = ["systemAAAAone-xyz", "systemAAAAtwo-xyz", "systemBBBBone-xyz", "....systemAAAAone", "otherwise-nothing"]


@pytest.mark.parametrize("cuts", [(11,), (5, 4, 2), (3, 1, 1, 1, 5)])
def test_texts_share_as_far_as_they_go_together(cuts: tuple[int, ...]) -> None:
    layer, plain, text = memory(), DenseCache(Geometry(H, G, D, E)), texts(TREE)
    layer.announce(11)
    steps = (*cuts, 1, 1, 1, 3)
    compare(feed(layer, text, steps), feed(plain, text, steps), text[3])
    assert sorted(held(layer)) == [
        4,
        6,
    ]  # "system", then "AAAA" of two rows; the padded row has not come that far by then
    assert layer.positions()[3, 0].tolist().count(-1) == layer.positions().shape[2] - 13
    assert [len(chain) for chain in layer.chains] == [2, 2, 1, 1, 0]


def test_bytes_are_one_copy_and_the_rows_own() -> None:
    lines = [60 * "s" + f"{i}{i}{i}" for i in range(8)]
    layer, plain, text = memory(), DenseCache(Geometry(H, G, D, E)), texts(lines)
    feed(layer, text, (63,))
    feed(plain, text, (63,))
    rows = 4 * 8 * 3  # places of own tokens
    assert layer.bytes() == TOKEN * (60 + 8 * 3) + rows
    assert plain.bytes() == TOKEN * 63 * 8
    assert layer.full_bytes(*text[1:3]) == TOKEN * 63 * 8


def test_the_reference_is_what_a_step_reads() -> None:
    layer, text = memory(), texts(["prefixab", "prefixcd"])
    got = feed(layer, text, (7, 1))
    q, k, v, _ = text
    want = reference(q[:, :, 7:], (k[:1, :, :6], v[:1, :, :6]), (k[:, :, 6:], v[:, :, 6:]), scale=D**-0.5)
    torch.testing.assert_close(got[:, :, 7:], want, rtol=0, atol=1e-12)
    assert held(layer) == [6]


class Fresh(TorchDispatchMode):
    """Sizes of tensors that operations make: those as wide as keys or values, and how many there are in all."""

    def __init__(self) -> None:
        super().__init__()
        self.wide: list[int] = []
        self.made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in pytree.tree_leaves(args) if isinstance(x, Tensor)}
        for x in pytree.tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in given:
                self.made += 1
                self.wide += [x.numel()] if x.shape[-1:] in ((D,), (E,)) else []
        return out


@pytest.mark.parametrize(
    "lines", [[200 * "s" + i * 40 + 9 * "x" for i in "abcd"], ["." * i + (249 - i) * "s" for i in (0, 5)]]
)
def test_a_step_is_few_operations_that_copy_no_keys(lines: list[str]) -> None:
    layer, text = memory(), texts(lines)
    feed(layer, text, (240, 1))
    assert held(layer)
    with Fresh() as made:
        feed(layer, text, (1,))
    assert max(made.wide) <= len(lines) * H * max(D, E), "a query or an output of every row"
    assert made.made <= 24  # some by the caller


def test_rows_of_one_chain_are_rearranged_without_being_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, text = memory(), texts(["system-one", "system-two", "system-six"])
    feed(layer, text, (7, 2))
    rows = torch.tensor([2, 2, 0])
    monkeypatch.setattr(Tensor, "tolist", lambda _: pytest.fail("the device was asked"))
    layer.select(rows)
    assert torch.equal(layer.keys, layer.keys[[0, 0, 2]]) and held(layer) == [7]  # type: ignore[index]


def test_what_is_common_stays_so_where_room_was_reserved() -> None:
    layer, plain, text = memory(), DenseCache(Geometry(H, G, D, E)), texts(["system" + 12 * x for x in "abc"])
    layer.reserve(18)
    feed(layer, text, (7, 5))
    assert layer.keys is not None and layer.keys.shape[2] >= 12
    for x in (plain, layer):
        x.reserve(18)
    feed(plain, text, (12,))
    for x in (plain, layer):
        x.select(torch.tensor([0, 0, 1]))
    assert held(layer) == [6] and layer.width == 6
    compare(feed(layer, text, (1, 1)), feed(plain, text, (1, 1)), None)
    layer.select(torch.tensor([0, 1, 2, 2]))  # another number of rows: a step must be captured again anyhow
    assert held(layer) == [6, 8]


def test_a_row_that_is_repeated_shares_what_it_holds() -> None:
    lines = ["first-text+a-b-c", "other-text+d-e-f"]
    layer, plain = memory(), DenseCache(Geometry(H, G, D, E))
    for x in (layer, plain):
        feed(x, texts(lines), (10,))
        x.select(torch.tensor([0, 0, 1, 0]))
    assert held(layer) == [10] and layer.chains[2] == []
    later = texts([lines[0], lines[0][:10] + "*x*y*z", lines[1], lines[0]])
    compare(feed(layer, later, (2, 1, 1)), feed(plain, later, (2, 1, 1)), None)
    for x in (layer, plain):
        x.select(torch.tensor([3, 1]))  # one of three readers goes, and the row that shared nothing
    assert held(layer) == [10]
    later = texts([lines[0], lines[0][:10] + "*x*y*z"])
    compare(feed(layer, later, (1, 1)), feed(plain, later, (1, 1)), None)


def test_beams_do_not_pile_up_runs() -> None:
    layer, plain, text = memory(), DenseCache(Geometry(H, G, D, E)), texts(["p" * 400] * 3)
    gen = torch.Generator().manual_seed(1)
    for x in (layer, plain):
        feed(x, text, (300,))
    for _ in range(60):
        rows = torch.randint(0, 3, (3,), generator=gen)
        for x in (layer, plain):
            x.select(rows)
        compare(feed(layer, text, (1,)), feed(plain, text, (1,)), None)
        assert len(held(layer)) <= 5
    assert layer.bytes() < 0.6 * plain.bytes()


@pytest.mark.parametrize("tokens", [1, 3, 4, 6, 9])
def test_taking_back_reaches_into_what_is_shared(tokens: int) -> None:
    lines = ["system-one-ab", "system-two-cd", "...system-one"]
    layer, plain, text = memory(), DenseCache(Geometry(H, G, D, E)), texts(lines)
    for x in (layer, plain):
        feed(x, text, (10, 1))
        x.crop(tokens)
    assert layer.seen == 11 - tokens
    for row in range(3):
        assert [p for p in layer.positions()[row, 0].tolist() if p >= 0] == [
            p for p in plain.positions()[row, 0].tolist() if p >= 0
        ]
    other = texts(["system-one-ab", "system+++++++", "...system-!!!"])
    mixed = tuple(
        None if a is None or b is None else torch.cat((a[..., : layer.seen, :], b[..., layer.seen :, :]), -2)
        for a, b in zip(text[:3], other[:3], strict=True)
    )
    compare(feed(layer, (*mixed, text[3]), (2, 1)), feed(plain, (*mixed, text[3]), (2, 1)), text[3])  # type: ignore[arg-type]
    with pytest.raises(StateError, match="cannot forget"):
        layer.crop(100)


def test_copies_and_saved_tensors_go_on() -> None:
    layer, text = memory(), texts(TREE)
    feed(layer, text, (11, 1))
    twin, again = memory(), copy.deepcopy(layer)
    twin.restore(layer.tensors())
    assert held(twin) == held(layer) == held(again)
    want = feed(layer, text, (1, 1, 3))
    for x in (twin, again):
        assert torch.equal(feed(x, text, (1, 1, 3)), want)


def test_candidates_are_not_shared_before_they_are_settled() -> None:
    layer, text = memory(), texts(["same-prompt-and-more", "same-prompt-and-more"])
    layer.announce(12)
    layer.record()
    feed(layer, text, (12, 5))
    assert held(layer) == [12]
    layer.crop(3)
    assert (layer.seen, layer.width) == (14, 2)


def test_sites_follow_the_first_unless_their_own_keys_say_otherwise() -> None:
    board, text = Board(), texts(["systemAAAA", "systemBBBB"])
    q, k, v, _ = text
    noisy = k + 1e-10 * torch.randn(k.shape, dtype=k.dtype, generator=torch.Generator().manual_seed(2))
    other = torch.stack((k[0], k[0].flip(1)))
    layers = [memory(i) for i in range(3)]
    for layer, keys in zip(layers, (k, noisy, other), strict=True):
        layer.join(board)
        feed(layer, (q, keys, v, None), (10,))
    assert [held(layer) for layer in layers] == [[6], [6], []]


@pytest.mark.parametrize("more", [{"mask": torch.ones(1, 1, 10, 10, dtype=torch.bool)}, {"causal": False}])
def test_calls_in_which_beginnings_differ_are_refused(more: dict[str, Any]) -> None:
    layer = memory()
    with pytest.raises(Refused, match="equal beginnings need not have equal keys"):
        feed(layer, texts(["systemAAAA", "systemBBBB"]), (10,), **more)
    assert layer.seen == 0


def test_another_attention_gets_the_whole_history() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def compute(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
        seen.append((k, v))
        return v.new_zeros(*q.shape[:3], E)

    layer, text = memory(), texts(TREE)
    feed(layer, text, (11, 1, 1), compute=compute)
    real = text[3][:, None, :13, None]  # type: ignore[index]
    for got, want in zip(seen[-1], text[1:3], strict=True):
        assert torch.equal(got * real, want[:, :, :13] * real)
    assert held(layer)


# -- in a model ---------------------------------------------------------------------------------------------------------


def prompts(pads: Sequence[int] = (0, 5, 2), length: int = 130, common: int = 120) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(3)
    system = torch.randint(1, 97, (common,), generator=gen)
    ids = torch.zeros(len(pads), length, dtype=torch.int64)
    for row, pad in enumerate(pads):
        ids[row, pad : pad + common] = system
        ids[row, pad + common :] = torch.randint(1, 97, (length - pad - common,), generator=gen)
    return ids, (torch.arange(length) >= torch.tensor(pads)[:, None]).long()


OPTIONS = {"max_new_tokens": 10, "return_dict_in_generate": True, "output_logits": True, "do_sample": False}


@torch.no_grad()
@pytest.mark.parametrize(
    "more", [{}, {"num_beams": 3}, {"prefill_chunk_size": 50}, {"num_return_sequences": 2, "num_beams": 2}]
)
def test_generate_gives_what_the_model_gives(more: dict[str, Any]) -> None:
    model, (ids, mask) = tiny(), prompts()
    want = model.generate(ids, attention_mask=mask, **OPTIONS, **more)
    with qkv.applied(model, "shared-prefix:min_tokens=8"):
        got = model.generate(ids, attention_mask=mask, **OPTIONS, **more)
        report = qkv.report(model)
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), rtol=0, atol=1e-4)
    for layer in got.past_key_values.layers:
        assert sum(held(layer.memory)) > 110
    token = 3 * 2 * 8 * 8 * 3  # bytes in all three layers
    rows = report.full_bytes // (got.past_key_values.get_seq_length() * token)
    each = 10 + 10 + 32 + 3  # the rest of a prompt, new tokens, spare room, places
    assert report.bytes < token * (120 + (rows + 3) * each)


@torch.no_grad()
def test_samples_of_one_prompt_hold_it_once() -> None:
    model, (ids, mask) = tiny(), prompts((0,))
    with qkv.applied(model, "shared-prefix"):
        torch.manual_seed(0)
        out = model.generate(
            ids, attention_mask=mask, num_return_sequences=6, **(OPTIONS | {"do_sample": True, "top_k": 0})
        )
        for layer in out.past_key_values.layers:
            assert held(layer.memory) == [130] and layer.memory.width == 9
        want = model(out.sequences, use_cache=False).logits[:, 129:-1]
    torch.testing.assert_close(torch.stack(out.logits, 1), want.float(), rtol=0, atol=1e-4)


@torch.no_grad()
def test_one_cache_is_continued_many_times(tmp_path: Path) -> None:
    model, (ids, mask) = tiny(), prompts((0, 0, 0))
    want = model.generate(ids, attention_mask=mask, **OPTIONS)
    with qkv.applied(model, "shared-prefix"):
        past = qkv.hosts.transformers.fresh_cache(model, 120)
        model(ids[:1, :120], past_key_values=past, use_cache=True)
        qkv.hosts.save_cache(model, past, tmp_path / "prefix")
        past = qkv.hosts.load_cache(model, tmp_path / "prefix").cache
        past.batch_repeat_interleave(3)
        got = model.generate(ids, attention_mask=mask, past_key_values=past, **OPTIONS)
        for layer in past.layers:
            assert held(layer.memory) == [120]
    assert torch.equal(got.sequences, want.sequences)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(InvalidParameter, match="min_tokens=0"):
        qkv.method("shared-prefix", min_tokens=0)
