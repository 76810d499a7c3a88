"""Double Sparsity against its page: labels, their quantisation, the calibration and its file, recall."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import qkv
from qkv.caches import double_sparsity
from qkv.caches._channels import load
from qkv.caches.double_sparsity import DoubleSparsity
from qkv.core.cache import Geometry, Step
from qkv.core.errors import InvalidParameter, Refused, SavedDataError
from qkv.probes._key_channels import calibrate_channels, channel_importance
from qkv.testing.caches import tiny

B, H, G, D = 2, 6, 3, 16


def geometry(**more: Any) -> Geometry:
    facts: dict[str, Any] = {"heads": H, "kv_heads": G, "head_dim": D, "value_dim": D, "layer": 2, "layers": 3}
    return Geometry(**facts | more)


def drawn(t: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(B, h, t, D, generator=draw, dtype=torch.float64) for h in (H, G, G))


def feed(layer: Any, q: Any, k: Any, v: Any, n: int) -> tuple[torch.Tensor, Any]:
    at, said = slice(layer.seen, layer.seen + n), []
    layer.watch = said.append
    position = torch.arange(at.start, at.stop).expand(B, n)
    return layer.attend(q[:, :, at], k[:, :, at], v[:, :, at], Step(position, D**-0.5)), said[-1]


def chosen(read: Any) -> list[list[set[int]]]:
    return [[{s for s in head[0] if s >= 0} for head in row] for row in read.slot.tolist()]


def test_all_channels_unquantised_are_the_exact_top_k() -> None:
    q, k, v = drawn(60)
    layer: Any = DoubleSparsity(budget=12, channel_factor=1, label_bits=16, dense_layers=0, samples=8).layer(geometry())
    feed(layer, q, k, v, 50)
    for t in range(50, 60):
        _, read = feed(layer, q, k, v, 1)
        logits = (q[:, :, t].reshape(B, G, 2, D) @ k[:, :, :t].mT).sum(2)
        best = logits.topk(11, dim=-1).indices
        got = chosen(read)
        for row in range(B):
            for g in range(G):
                assert got[row][g] == {*best[row, g].tolist(), t}


def test_labels_are_the_channels_of_the_keys_after_appends_and_crops() -> None:
    q, k, v = drawn(60)
    layer: Any = DoubleSparsity(budget=12, channel_factor=4, label_bits=16, dense_layers=0, samples=8).layer(geometry())
    for n in (30, 1, 1, 4, 1):
        feed(layer, q, k, v, n)
    layer.crop(3)
    feed(layer, q, k, v, 6)
    channels = layer.notes["channels"]
    sample = double_sparsity.importance(q[:, :, :8], k[:, :, :8]).sum(2)
    assert torch.equal(channels, sample.topk(4, dim=-1).indices.sort(-1).values)
    want = k[:, :, : layer.seen].gather(3, channels[:, :, None].expand(-1, -1, layer.seen, -1))
    assert torch.equal(layer.features["labels"][:, :, : layer.seen], want)


def test_channels_that_hold_everything_give_the_logits() -> None:
    """Keys that are 0 outside r channels: the statistic finds them, and the labels are exact."""
    q, k, v = drawn(40)
    hot = torch.tensor([3, 7, 8, 12])
    only = torch.zeros(D, dtype=torch.float64)
    only[hot] = 1
    k = k * only
    layer: Any = DoubleSparsity(budget=9, channel_factor=4, label_bits=16, dense_layers=0, samples=8).layer(geometry())
    feed(layer, q, k, v, 39)
    assert layer.notes["channels"].unique().tolist() == hot.tolist()
    for row in range(B):
        for g in range(G):
            approximate = double_sparsity.reference(q[row, 2 * g : 2 * g + 2, -1], k[row, g], hot)
            torch.testing.assert_close(approximate, q[row, 2 * g : 2 * g + 2, -1] @ k[row, g].mT, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("r", [1, 3, 8])
def test_codes_there_and_back(bits: int, r: int) -> None:
    x = torch.randn(5, 7, r, generator=torch.Generator().manual_seed(bits * r), dtype=torch.float64)
    x[0, 0] = 1.5
    codes, step, low = double_sparsity.quantise(x, bits)
    data = double_sparsity.packed(codes, bits)
    assert data.dtype == torch.uint8 and data.shape[-1] == -(-r * bits // 8)
    assert torch.equal(double_sparsity.unpacked(data, bits, r), codes)
    back = codes.double() * step.unsqueeze(-1) + low.unsqueeze(-1)
    assert ((back - x).abs() <= step.unsqueeze(-1) / 2 + 1e-12).all() and torch.equal(back[0, 0], x[0, 0])


def test_recall_grows_with_the_label_and_least_important_channels_are_near_chance() -> None:
    """Keys and queries with a few loud channels, as models have them."""
    q, k, _ = drawn(400, seed=3)
    loud = torch.ones(D, dtype=torch.float64)
    loud[[1, 4, 5, 11]] = 4.0
    q, k = q * loud, k * loud

    def recall(channels: torch.Tensor) -> float:
        logits = (q[:, :, -1].reshape(B, G, 2, D) @ k.mT).sum(2)
        rough = (q[:, :, -1].reshape(B, G, 2, D)[..., channels] @ k[..., channels].mT).sum(2)
        a, b = (x.topk(40, dim=-1).indices for x in (logits, rough))
        return float((a.unsqueeze(-1) == b.unsqueeze(-2)).any(-1).double().mean())

    order = double_sparsity.importance(q, k).sum((0, 1, 2)).argsort(descending=True)
    found = [recall(order[:r]) for r in (1, 2, 4, 8, 16)]
    assert all(a < b for a, b in pairwise(found)) and found[-1] == 1.0
    assert found[2] > 0.75 and recall(order[-4:]) < 0.2


def test_the_calibration_is_a_mean_over_tokens(tmp_path: Path) -> None:
    model = tiny()
    draw = torch.Generator().manual_seed(0)
    texts = [torch.randint(1, 97, (2, 11), generator=draw) for _ in range(3)]
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, :4] = 0
    data = [{"input_ids": texts[0], "attention_mask": mask}, {"input_ids": texts[1]}, {"input_ids": texts[2]}]
    want, tokens = channel_importance(model, data)
    assert tokens == 62 and want.shape == (3, 3, 8)
    for other in (data[::-1], data * 2):
        torch.testing.assert_close(channel_importance(model, other)[0], want, rtol=1e-12, atol=0)
    for score in ("k", "q"):
        assert channel_importance(model, data, score=score)[0].shape == (3, 3, 8)  # type: ignore[arg-type]
    path = calibrate_channels(model, data).save(tmp_path / "channels.json")
    assert load(str(path)).order == want.sort(dim=-1, descending=True, stable=True).indices.tolist()
    with qkv.applied(model, f"double-sparsity:channels={path},channel_factor=2,budget=9,dense_layers=1"):
        out: Any = model.generate(texts[0], max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
        memory = out.past_key_values.layers[2].memory
        assert torch.equal(memory.notes["channels"][0], want[2].topk(4, dim=-1).indices.sort(-1).values)
    with pytest.raises(Refused, match="made for another model"):
        DoubleSparsity(channels=str(path), channel_factor=2).layer(geometry())
    with pytest.raises(Refused, match="3 layers and this model has 7"):
        DoubleSparsity(channels=str(path), channel_factor=2).layer(geometry(layers=7))


def test_bad_files_and_widths(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameter, match="is no file"):
        DoubleSparsity(channels=str(tmp_path / "none.json")).fits(geometry())
    for text in (
        "[]",
        "{}",
        '{"format": 1, "score": "qk", "head_dim": 2, "tokens": 1, "model": "", "order": [[[0, 0]]]}',
        "x",
    ):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(SavedDataError):
            DoubleSparsity(channels=str(tmp_path / "bad.json")).fits(geometry())
        (tmp_path / "bad.json").unlink()
    with pytest.raises(Refused, match="does not divide"):
        DoubleSparsity(channel_factor=5).layer(geometry())


def test_labels_are_small() -> None:
    q, k, v = (x.float() for x in drawn(512))
    layers: Any = (
        DoubleSparsity(budget=64, channel_factor=8, dense_layers=dense).layer(geometry()) for dense in (9, 0)
    )
    plain, labelled = layers
    for layer in (plain, labelled):
        feed(layer, q, k, v, 512)
    labels = sum(x.numel() * x.element_size() for x in labelled.features.values())
    assert labels == B * G * 512 * (1 + 2 + 2)  # two channels of 4 bits, a step and a minimum
    notes = sum(x.numel() * x.element_size() for x in labelled.notes.values())  # the sample: the same at any length
    assert labelled.bytes() - plain.bytes() == labels + notes


@pytest.mark.parametrize("bits", [4, 16])
def test_offloaded_keys_are_read_as_those_that_stay(bits: int) -> None:
    """Same tokens, same bits: a padded batch, a prompt in pieces, steps, beams, a crop, a copy read back. Labels alone stay."""
    q, k, v = drawn(90, seed=3)
    padding = torch.ones(B, 90, dtype=torch.bool)
    padding[1, :7] = False
    position = (padding.cumsum(-1, dtype=torch.int32) - 1).masked_fill(~padding, -1)
    near, far = (
        DoubleSparsity(budget=9, channel_factor=4, label_bits=bits, dense_layers=1, samples=8, offload=x).layer(
            geometry()
        )
        for x in (False, True)
    )

    def both(n: int) -> None:
        at = slice(near.seen, near.seen + n)
        step = Step(position[:, at], D**-0.5, padding[:, : at.stop])
        a, b = (layer.attend(q[:, :, at], k[:, :, at], v[:, :, at], step) for layer in (near, far))
        assert torch.equal(a, b)

    for n in (30, 20, *[1] * 12):
        both(n)
    for layer in (near, far):
        layer.select(torch.tensor([1, 0]))
        layer.select(torch.tensor([1, 0]))
        layer.crop(2)
    both(1)
    assert far.bytes() == near.bytes() == near.resident() and not far.static()
    away = 2 * B * G * D * far.keys.shape[2] * 8  # type: ignore[attr-defined]
    assert far.resident() == far.bytes() - away < near.bytes() / 2
    twin = DoubleSparsity(budget=9, channel_factor=4, label_bits=bits, dense_layers=1, samples=8, offload=True).layer(
        geometry()
    )
    twin.restore(far.tensors())
    far = twin
    both(1)
    assert far.resident() < near.resident() / 2
    dense = DoubleSparsity(dense_layers=3, offload=True).layer(geometry())
    dense.attend(q, k, v, Step(position, D**-0.5))
    assert dense.resident() == dense.bytes(), "a layer that reads everything keeps everything near"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offloaded_keys_lie_outside_the_device() -> None:
    q, k, v = (x.float() for x in drawn(80, seed=4))
    outs = []
    for offload, device in ((False, "cpu"), (True, "cuda")):
        layer: Any = DoubleSparsity(budget=9, channel_factor=4, samples=8, offload=offload).layer(geometry())
        x = [t.to(device) for t in (q, k, v)]
        parts = []
        for n in (50, *[1] * 30):
            at = slice(layer.seen, layer.seen + n)
            position = torch.arange(at.start, at.stop, device=device).expand(B, n)
            parts.append(layer.attend(*(t[:, :, at] for t in x), Step(position, D**-0.5)).cpu())
        outs.append(torch.cat(parts, 2))
    assert not layer.keys.is_cuda and layer.keys.is_pinned() and all(t.is_cuda for t in layer.features.values())
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=1e-3)
