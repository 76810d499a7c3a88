"""LongVQ's layer: its definition, states, a codebook of moving averages that checkpoints hold bit for bit, what is refused."""

from __future__ import annotations

import copy
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

import qkv
from qkv.core.errors import InvalidInput, InvalidParameter, Refused, StateError
from qkv.core.training import decayed
from qkv.distill import train
from qkv.layers import _codebook, _structured_memory
from qkv.layers._codebook import Codebook
from qkv.layers._codebook import reference as averages
from qkv.layers._mixer import Recurrent
from qkv.layers._structured_memory import StructuredMemory
from qkv.layers._structured_memory import reference as recurrence
from qkv.layers.vq_gated_attention import VQGatedAttentionModule, reference
from qkv.models.language.causal import CausalConfig, CausalLM
from qkv.ops.longvq import LongVQ, quantise
from qkv.testing import close

torch.set_num_threads(1)
W, N = 6, 29
SMALL = {"heads": 2, "key_width": 5, "codebook_size": 7, "block_size": 4, "ssm_states": 3}
SETTING = "vq-gated-attention:heads=2,key_width=5,codebook_size=7,block_size=4,ssm_states=3"


def built(**more: Any) -> VQGatedAttentionModule:
    """A layer with biases and memories that show."""
    torch.manual_seed(0)
    layer = qkv.method("vq-gated-attention", **SMALL | more).build(W, dtype=torch.float64)
    with torch.no_grad():
        layer.bias.normal_()
        layer.memory.step.add_(2.0)
    return layer


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def small(seed: int = 0, **more: Any) -> CausalLM:
    return CausalLM(CausalConfig(operators=(SETTING, SETTING), width=16, heads=2, vocabulary=23), seed)


# -- the definition and its forms


@torch.no_grad()
def test_the_layer_is_its_definition() -> None:
    layer, x, stream = built().eval(), draw(2, N, W), draw(2, N, W, seed=2)
    close(layer(x)[0], reference(layer, x), rtol=1e-11, what="without a stream")
    close(layer(x, stream=stream)[0], reference(layer, x, stream), rtol=1e-11, what="with a stream")


@pytest.mark.parametrize("chunk", [1, 3, 29, 64])
@torch.no_grad()
def test_chunks_of_the_state_space_are_its_recurrence(chunk: int, monkeypatch: Any) -> None:
    memory, x = built().memory, draw(2, N, W)
    monkeypatch.setattr(_structured_memory, "scan", lambda x, *rest: SCAN(x, *rest, chunk=chunk))
    want = recurrence(memory, x)
    got, held = memory(x)
    close(got, want, rtol=1e-12, what="whole")
    first, part = memory(x[:, :11])
    second, after = memory(x[:, 11:], part)
    close(torch.cat((first, second), 1), want, rtol=1e-12, what="in two")
    close(after, held, rtol=1e-12, what="state")
    close(recurrence(memory, x[:, 11:], part), want[:, 11:], rtol=1e-12, what="definition after a state")


SCAN = _structured_memory.scan


def test_gradients_are_those_of_the_definition_in_the_window() -> None:
    """One block: straight-through keys pass on what exact keys at the codes would."""
    layer, x = built(block_size=64).eval(), draw(2, 9, W).requires_grad_()
    assert torch.autograd.gradcheck(layer.memory, x)
    layer(x)[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in layer.parameters())
    again = built(block_size=64).eval()
    again.attention = Recurrent(LongVQ(block_size=64))
    again(x)[0].square().sum().backward()
    assert layer.key.weight.grad is not None and again.key.weight.grad is None


# -- states


def in_pieces(layer: VQGatedAttentionModule, x: Tensor, cuts: tuple[int, ...], **more: Any) -> Tensor:
    """The layer's output, piece by piece with the state handed over."""
    state, out, start = None, [], 0
    for stop in (*cuts, x.shape[1]):
        first = more if start == 0 else {}
        y, state = layer(x[:, start:stop], state=state, keep=True, **{k: v[:, start:stop] for k, v in first.items()})
        assert state.seen == stop
        out.append(y)
        start = stop
    return torch.cat(out, 1)


@torch.no_grad()
def check_splits() -> None:
    layer, x = built().eval(), draw(2, N, W)
    whole = layer(x)[0]
    for cut in range(1, N):
        close(in_pieces(layer, x, (cut,)), whole, rtol=1e-9, what=f"cut at {cut}")
    close(in_pieces(layer, x, tuple(range(1, N))), whole, rtol=1e-9, what="token by token")


@torch.no_grad()
def check_padding() -> None:
    layer, x = built().eval(), draw(2, N, W)
    real = torch.ones(2, N, dtype=torch.bool)
    real[0, :6] = False
    x[0, :6] = torch.nan
    both, state = layer(x, padding=real, keep=True)
    alone, held = layer(x[:1, 6:], keep=True)
    close(both[:1, 6:], alone, rtol=1e-9, what="padded row")
    close(both[1:], layer(x[1:])[0], rtol=1e-9, what="row beside it")
    new = draw(2, 3, W, seed=3)
    close(layer(new, state=state)[0][:1], layer(new[:1], state=held)[0], rtol=1e-9, what="what follows")


def test_decoding_is_the_parallel_form_at_any_split() -> None:
    check_splits()


def test_a_padded_row_is_the_row_alone() -> None:
    check_padding()


@torch.no_grad()
def test_a_state_is_constant_and_a_value() -> None:
    layer, x = built().eval(), draw(3, N, W)
    _, state = layer(x, keep=True)
    assert state.bytes == layer(x[:, :1], keep=True)[1].bytes
    kept = {n: t.clone() for n, t in state.tensors.items()}
    rows, new = torch.tensor([2, 0, 0]), draw(1, 1, W, seed=4)
    got = layer(new.expand(3, 1, W), state=state.index(rows))[0]
    close(got, layer(new.expand(3, 1, W), state=state)[0][rows], rtol=1e-12, what="rows")
    assert all(torch.equal(kept[n], t) for n, t in state.tensors.items())


@torch.no_grad()
def test_bfloat16_stays_near() -> None:
    layer, x = built(key_width=16, codebook_size=4).float(), draw(2, N, W).float()
    layer.train()
    with torch.enable_grad():
        layer(x)
    layer.eval()
    want = layer(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        low, state = layer(x, keep=True)
        step = layer(x[:, :1], state=state)[0]
    assert all(t.dtype in (torch.float32, torch.int64) for t in state.tensors.values())
    assert float((low.float() - want).norm() / want.norm()) < 0.05 and bool(step.isfinite().all())
    half = copy.deepcopy(layer).bfloat16()
    assert {t.dtype for t in half.codebook.buffers()} == {torch.float32, torch.int64}
    assert torch.equal(half.codebook.codes, layer.codebook.codes)
    out, state = half(x.bfloat16(), keep=True)
    assert out.dtype == torch.bfloat16 and float((out.float() - want).norm() / want.norm()) < 0.1
    assert state["memory"].dtype == torch.float32
    assert layer.double().codebook.codes.dtype == torch.float64


# -- the codebook


def book(size: int = 5, **more: Any) -> Codebook:
    return Codebook(2, size, 3, **{"decay": 0.9, "smoothing": 1e-5, "dead": 0.0} | more, dtype=torch.float64)


def check_updates() -> None:
    for decay, smoothing in ((0.9, 1e-5), (0.5, 0.1), (0.0, 0.0)):
        mine = book(decay=decay, smoothing=smoothing)
        mine.begin(draw(4, 2, 11, 3))
        for i in range(4):
            keys = draw(4, 2, 11, 3, seed=10 + i)
            want = averages(keys.transpose(0, 1).flatten(1, 2), mine.codes, mine.counts, mine.sums, decay, smoothing)
            mine.learn(keys)
            for got, x, what in zip(
                (mine.codes, mine.counts, mine.sums), want, ("codes", "counts", "sums"), strict=True
            ):
                close(got, x, rtol=1e-12, what=what)


def test_an_update_is_its_definition() -> None:
    check_updates()


def test_no_memory_and_no_smoothing_are_a_step_of_k_means() -> None:
    mine, keys = book(decay=0.0, smoothing=0.0), draw(4, 2, 11, 3)
    mine.begin(keys)
    old = mine.codes.clone()
    new = draw(4, 2, 11, 3, seed=2)
    mine.learn(new)
    for h in range(2):
        x = new[:, h].flatten(0, 1)
        nearest = torch.cdist(x, old[h]).argmin(-1)
        for s in nearest.unique():
            close(mine.codes[h, s], x[nearest == s].mean(0), rtol=1e-12, what=f"code {s}")


def test_the_first_batch_places_the_codes_and_padding_has_no_part() -> None:
    clusters = 10 * draw(2, 5, 3, seed=5)
    pick = torch.randint(0, 5, (4, 12), generator=torch.Generator().manual_seed(0))
    keys = torch.stack([c[pick] for c in clusters], 1) + 0.01 * draw(4, 2, 12, 3)
    real = torch.ones(4, 12, dtype=torch.bool)
    real[1, :7] = False
    alone, padded = book(20), book(20)
    alone.begin(torch.cat([keys[i, :, 7:] if i == 1 else keys[i] for i in range(4)], 1)[None])
    keys[1, :, :7] = 1e3
    padded.begin(keys, real)
    assert float(alone.distance(keys[:1])) < 0.01 < float(book(20).distance(keys[:1]))
    for learn in (False, True):
        if learn:
            alone.learn(torch.cat([keys[i, :, 7:] if i == 1 else keys[i] for i in range(4)], 1)[None])
            padded.learn(keys, real)
        for name, x in alone.named_buffers():
            close(getattr(padded, name), x, rtol=1e-9, what=name)
    far = alone.commitment(keys[1:2, :, 7:])
    close(padded.commitment(keys[1:2], real[1:2]), far, rtol=1e-9, what="commitment")


def check_dead() -> None:
    mine = book(8, decay=0.5, dead=0.1)
    mine.begin(draw(4, 2, 11, 3))
    other = draw(4, 2, 11, 3, seed=2) + 100.0
    for _ in range(12):
        mine.learn(other)
    assert float(mine.codes.amin()) > 90.0
    z, _ = quantise(other, mine.codes)
    assert all(len(h.unique()) == 8 for h in z.transpose(0, 1))


def test_dead_codes_become_keys() -> None:
    check_dead()
    still = book(8, decay=0.5, dead=0.0)
    still.begin(draw(4, 2, 11, 3))
    for _ in range(12):
        still.learn(draw(4, 2, 11, 3, seed=2) + 100.0)
    assert float(still.codes.amin()) < 90.0


def test_commitment_draws_keys_and_leaves_codes() -> None:
    mine, keys = book(), draw(4, 2, 11, 3).requires_grad_()
    _, hat = quantise(keys.detach(), mine.codes)
    mine.commitment(keys).backward()
    assert keys.grad is not None
    close(keys.grad, 2 * (keys - hat) / 88, rtol=1e-12, what="gradient")
    assert not mine.codes.requires_grad


# -- learning


def after(layer: VQGatedAttentionModule, **call: Any) -> list[Tensor]:
    layer(draw(2, N, W), **call)
    return [x.clone() for x in layer.codebook.buffers()]


def check_when() -> None:
    def moved(layer: VQGatedAttentionModule, **call: Any) -> bool:
        before = [x.clone() for x in layer.codebook.buffers()]
        return any(not torch.equal(a, b) for a, b in zip(before, after(layer, **call), strict=True))

    layer = built()
    assert moved(layer) and moved(layer)
    with torch.no_grad():
        assert not moved(layer)
    assert not moved(layer, keep=True)
    _, state = layer(draw(2, 3, W), keep=True)
    assert not moved(layer, state=state)
    assert not moved(layer.eval())
    assert not moved(built(frozen=True))


def test_codes_move_in_training_passes_alone() -> None:
    check_when()


def test_the_loss_holds_the_commitment_in_training() -> None:
    layer, losses = built(commitment=0.5), []
    x = draw(2, N, W)
    layer(x, losses=losses)
    net, ids = small(), torch.arange(20).remainder(23).view(2, 10)
    own: list[Tensor] = []
    torch.manual_seed(0)
    net.train()(ids, losses=own)
    assert len(losses) == 1 and len(own) == 2 and all(x.requires_grad and float(x.detach()) > 0 for x in losses + own)
    plain = copy.deepcopy(net).eval()
    trained = net.loss(ids, ids)
    want = torch.nn.functional.cross_entropy(plain(ids).logits.flatten(0, 1), ids.flatten())
    assert float(trained.detach()) > float(want.detach()) and torch.equal(plain.loss(ids, ids), want)
    own.clear()
    plain(ids, losses=own)
    assert not own


def test_codes_follow_keys_and_frozen_ones_do_not() -> None:
    data = torch.randint(0, 23, (64, 12), generator=torch.Generator().manual_seed(0))
    far = {}
    for name in ("decay=0.9", "frozen=true"):
        setting = f"{SETTING},{name}"
        net = CausalLM(CausalConfig(operators=(setting,), width=16, heads=2, vocabulary=23)).train()
        optimiser = torch.optim.AdamW(decayed(net.parameters(), 0.1), lr=1e-2)
        for i in range(30):
            net.loss(data[8 * (i % 8) :][:8, :-1], data[8 * (i % 8) :][:8, 1:]).backward()
            optimiser.step()
            optimiser.zero_grad()
        keys: list[Tensor] = []
        mixer: Any = net.blocks[0].mixer
        mixer.key.register_forward_hook(lambda _, x, out, keys=keys: keys.append(out))
        net.eval()(data[:, :-1])
        k = keys[0].detach().unflatten(-1, (2, 5)).transpose(1, 2)
        best = Codebook(2, 7, 5, decay=0.0, smoothing=0.0, dead=0.0)
        best.begin(k)  # k-means on these very keys
        far[name] = float(mixer.codebook.distance(k) / best.distance(k))
    assert far["decay=0.9"] < 1.3 and far["frozen=true"] > 1.8


QUICK: dict[str, Any] = {
    "max_steps": 6, "per_device_train_batch_size": 4, "save_steps": 3, "logging_steps": 1, "use_cpu": True, "progress": False,
}  # fmt: skip


def test_a_run_that_was_cut_off_is_the_run_that_was_not(tmp_path: Any) -> None:
    """The codebook's averages too, bit for bit."""
    rows = [{"input_ids": r} for r in torch.randint(0, 23, (30, 13), generator=torch.Generator().manual_seed(0))]
    done = train(small(), rows, tmp_path / "whole", **QUICK)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "model")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "checkpoint-6")
    again = train(small(), rows, tmp_path / "cut", resume=True, **QUICK)
    a, b = (CausalLM.from_pretrained(x.path).state_dict() for x in (done, again))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert int(a["blocks.0.mixer.codebook.updates"]) == 7  # the codes' places, and six updates
    start = small().state_dict()
    assert not torch.equal(a["blocks.1.mixer.codebook.codes"], start["blocks.1.mixer.codebook.codes"])


def test_resuming_without_the_sums_is_noticed(tmp_path: Any, monkeypatch: Any) -> None:
    """Negative control: an average that checkpoints leave out makes another run."""
    load = Codebook._load_from_state_dict

    def forgetful(self: Codebook, *args: Any, **more: Any) -> None:
        load(self, *args, **more)
        self.sums = torch.zeros_like(self.sums)

    monkeypatch.setattr(Codebook, "_load_from_state_dict", forgetful)
    with pytest.raises(AssertionError):
        test_a_run_that_was_cut_off_is_the_run_that_was_not(tmp_path)


def test_a_loaded_codebook_is_not_placed_anew() -> None:
    one, other = built(), built()
    after(one)
    after(other)
    other.load_state_dict(one.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(after(one), after(other), strict=True))
    fresh = built().state_dict()
    one.load_state_dict(fresh)
    assert all(torch.equal(a, b) for a, b in zip(after(one), after(built()), strict=True))


def _rank(number: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=2)
    mine = book(8, dead=0.3)
    for i in range(4):
        keys = draw(4, 2, 11, 3, seed=20 + i)[2 * number :][:2]
        mine.begin(keys)
        mine.learn(keys)
    torch.save(dict(mine.named_buffers()), f"{folder}/{number}.pt")
    torch.distributed.destroy_process_group()


def test_ranks_share_one_codebook(tmp_path: Any) -> None:
    processes: Any = torch.multiprocessing
    processes.spawn(_rank, (str(tmp_path),), nprocs=2)
    a, b = (torch.load(tmp_path / f"{i}.pt") for i in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert float(a["counts"].sum()) == pytest.approx(2 * 4 * 11, rel=0.2)  # keys of both ranks


# -- what is refused


def test_what_does_not_fit_is_refused() -> None:
    for bad in (
        {"heads": 4},
        {"codebook_size": 0},
        {"block_size": 0},
        {"decay": 1.5},
        {"dead": -0.1},
        {"commitment": -1.0},
    ):
        with pytest.raises(InvalidParameter):
            built(**bad)
    layer, x = built().eval(), draw(2, N, W)
    _, state = layer(x, keep=True)
    with pytest.raises(StateError, match="memory"):
        layer(x[:1], state=state)
    with pytest.raises(StateError, match="counts"):
        built(codebook_size=6).eval()(x, state=state)
    with pytest.raises(StateError, match="base-conv"):
        qkv.method("base-conv").build(W)(x.float(), state=state)
    with pytest.raises(StateError, match="float32 or wider"):
        layer(x, state=state.to(torch.bfloat16))
    with pytest.raises(InvalidInput, match="NaN"):
        layer(x.masked_fill(x > 1, torch.nan))
    from qkv.models.vision.vit import ViTConfig

    with pytest.raises(Refused, match="causal by definition"):
        ViTConfig(operators=(SETTING,))


# -- the laws catch a broken layer


def _no_count(self: Codebook, x: Tensor, real: Any) -> Any:
    counts, sums = TOTALS(self, x, real)
    return counts + 1, sums


def _always(self: VQGatedAttentionModule, x: Tensor, **more: Any) -> Any:
    out = FORWARD(self, x, **more)
    self.codebook.learn(draw(1, 2, 8, 5))
    return out


def _unmasked(self: VQGatedAttentionModule, x: Tensor, *, padding: Any = None, **more: Any) -> Any:
    return FORWARD(self, x.nan_to_num(1.0), padding=None, **more)


TOTALS, FORWARD, PASS = Codebook._totals, VQGatedAttentionModule.forward, StructuredMemory.forward


@pytest.mark.parametrize(
    ("place", "mutant", "law"),
    [
        ((StructuredMemory, "forward"), lambda self, x, held=None: PASS(self, x, None), check_splits),
        ((StructuredMemory, "forward"), lambda self, x, held=None: PASS(self, x.flip(1), held), check_splits),
        ((VQGatedAttentionModule, "forward"), _unmasked, check_padding),
        ((Codebook, "_totals"), _no_count, check_updates),
        ((VQGatedAttentionModule, "forward"), _always, check_when),
        ((_codebook, "_tokens"), lambda number, *rest, **more: torch.zeros_like(number), check_dead),
    ],
    ids=[
        "memory lost",
        "memory turned",
        "padding seen",
        "counts wrong",
        "codes move in evaluation",
        "dead codes on one key",
    ],
)
def test_a_law_catches(place: Any, mutant: Any, law: Any, monkeypatch: Any) -> None:
    law()
    monkeypatch.setattr(*place, mutant)
    with pytest.raises(AssertionError):
        law()
