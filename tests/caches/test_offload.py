"""Offload: host memory and files hold what the model reads, and a disk that fails says so."""

from __future__ import annotations

import copy
import errno
import gc
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

import qkv
from qkv.caches._stores.offloaded import OffloadedCache
from qkv.caches._stores.tiered import Shelf
from qkv.caches.offload import Offload, reference
from qkv.core.cache import Board, Geometry, Step
from qkv.core.errors import StateError, StorageError

H, G, D = 6, 3, 8


def memory(folder: Path | None, layer: int = 0) -> OffloadedCache:
    made = Offload(folder="" if folder is None else str(folder)).layer(Geometry(H, G, D, D, layer=layer))
    assert isinstance(made, OffloadedCache)
    return made


def draw(n: int, b: int = 2, seed: int = 0) -> list[Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(b, h, n, D, generator=gen, dtype=torch.float64) for h in (H, G, G)]


def feed(layer: OffloadedCache, tensors: list[Tensor], cuts: list[int]) -> Tensor:
    outs, b = [], tensors[0].shape[0]
    for n in cuts:
        at = slice(layer.seen, layer.seen + n)
        step = Step(torch.arange(at.start, at.stop, dtype=torch.int32).expand(b, n), D**-0.5)
        outs.append(layer.attend(*(x[:, :, at] for x in tensors), step))
    return torch.cat(outs, 2)


def files(folder: Path) -> list[str]:
    return sorted(x.name for x in folder.iterdir()) if folder.exists() else []


@pytest.mark.parametrize("disk", [False, True])
def test_it_is_exact(disk: bool, tmp_path: Path) -> None:
    q, k, v = draw(120)
    got = feed(memory(tmp_path if disk else None), [q, k, v], [40, *[1] * 40, 17, *[1] * 23])
    torch.testing.assert_close(got, reference(q, k, v, scale=D**-0.5), rtol=0, atol=1e-12)


def test_files_hold_the_history_and_go_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "for this"
    layer, tensors = memory(folder), draw(100)
    assert files(folder) == []
    feed(layer, tensors, [60, *[1] * 40])
    assert len(files(folder)) == 2
    held = sum((folder / name).stat().st_size for name in files(folder))
    assert layer.bytes() == held >= layer.full_bytes(tensors[1], tensors[2]) and layer.resident() == 0
    twin = copy.deepcopy(layer)
    assert len(files(folder)) == 4
    layer.reset()
    assert len(files(folder)) == 2 and layer.bytes() == 0
    torch.testing.assert_close(twin.tensors()["keys"], tensors[1])
    del twin
    gc.collect()
    assert files(folder) == []


def test_everything_a_cache_can_do_on_disk(tmp_path: Path) -> None:
    """Crop, beams, copies, save and restore: as in memory."""
    tensors, rows = draw(90), torch.tensor([1, 0, 1])
    outs = []
    for layer in (memory(None), memory(tmp_path)):
        feed(layer, tensors, [40, 1, 1, 1])
        layer.crop(2)
        twin = memory(layer.folder)  # type: ignore[arg-type]
        twin.restore(layer.tensors())
        layer.select(rows)
        more = feed(layer, [x[rows] for x in tensors], [1] * 20)
        swapped = memory(layer.folder)  # type: ignore[arg-type]
        feed(swapped, tensors, [30])
        swapped.select(torch.tensor([1, 0]))
        other = feed(swapped, [x.flip(0) for x in tensors], [1] * 5)
        outs.append((more, feed(copy.deepcopy(twin), tensors, [1] * 20), feed(twin, tensors, [1] * 20), other))
        with pytest.raises(StateError, match="cannot forget"):
            layer.crop(1000)
    for a, b in zip(*outs, strict=True):
        assert torch.equal(a, b)


def test_a_file_that_disappears(tmp_path: Path) -> None:
    layer, tensors = memory(tmp_path), draw(60)
    feed(layer, tensors, [40, 1])
    for name in files(tmp_path):
        (tmp_path / name).unlink()
    with pytest.raises(StorageError, match=r"layer 0: its file .* has gone"):
        feed(layer, tensors, [1])
    assert layer.seen == 41


def test_a_file_that_somebody_cut(tmp_path: Path) -> None:
    layer, tensors = memory(tmp_path), draw(60)
    feed(layer, tensors, [40, 1])
    os.truncate(tmp_path / files(tmp_path)[0], 100)
    with pytest.raises(StorageError, match="was changed by somebody else"):
        feed(layer, tensors, [1])


def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room is refused before anything is written; what is stored stays, and goes on when there is space."""
    layer, tensors = memory(tmp_path), draw(200)
    feed(layer, tensors, [40])

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageError, match=r"bytes in .* were not to be had \(No space left on device\)"):
        feed(layer, tensors, [100])
    assert layer.seen == 40 and len(files(tmp_path)) == 2
    monkeypatch.undo()
    got = feed(layer, tensors, [100, 1])
    want = reference(*(x[:, :, :141] for x in tensors), scale=D**-0.5)
    torch.testing.assert_close(got, want[:, :, 40:], rtol=0, atol=1e-12)


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="were not to be had"):
        feed(memory(tmp_path / "file"), draw(8), [8])


def test_layers_read_ahead_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a layer computes the next one's file is asked for; the last asks for the first."""
    asked: list[str] = []
    monkeypatch.setattr(Shelf, "advise", lambda self: asked.append(self.label))
    board, layers, tensors = Board(), [memory(tmp_path, i) for i in (0, 2, 5)], draw(12)
    for layer in layers:
        layer.join(board)
    for layer in layers:
        feed(layer, tensors, [10])
    assert asked[::2] == ["offload, layer 2", "offload, layer 5", "offload, layer 0"]
    twins = copy.deepcopy(layers)
    asked.clear()
    feed(twins[0], tensors, [1])
    assert asked and twins[1] in twins[0].board.notes["offload"].values()  # type: ignore[union-attr]
    assert layers[0].seen == 10


def test_copies_on_the_device_are_counted_once() -> None:
    """Two are there at a time, so a sum over the layers, each asked when its call ends, must not count one for each."""
    board, layers, tensors = Board(), [memory(None, i) for i in (0, 2, 5)], draw(12)
    told = []
    for layer in layers:
        layer.join(board)
    for i, layer in enumerate(layers):
        feed(layer, tensors, [10])
        layers[i - 1].ahead, layer.ahead = None, (tensors[1], tensors[2])  # as on a GPU
        told.append((layer.bytes(), layer.resident()))
    layers[0].ahead = (tensors[1], tensors[2])  # the last layer asks for the first one's
    on_device = 2 * sum(x.numel() * x.element_size() for x in tensors[1:])
    assert [r for _, r in told] == [0, 0, on_device // 2] and layers[2].resident() == on_device
    stored = sum(layer.keys.bytes() + layer.values.bytes() for layer in layers)
    assert sum(layer.bytes() for layer in layers) == stored + on_device
    alone = memory(None)
    alone.ahead = (tensors[1], tensors[2])
    assert alone.resident() == on_device // 2


def test_generation_on_disk_and_its_end_when_the_disk_goes(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
    )
    model = LlamaForCausalLM(config).eval()
    model.generation_config.pad_token_id = 0
    ids = torch.randint(1, 97, (1, 20))
    want = model.generate(ids, max_new_tokens=40, do_sample=False)
    with qkv.applied(model, Offload(folder=str(tmp_path))):
        assert torch.equal(model.generate(ids, max_new_tokens=40, do_sample=False), want)
        report = qkv.report(model)
        assert report.bytes >= report.full_bytes and report.resident == 0
        with torch.no_grad():
            out = model(ids, use_cache=True)
            for name in files(tmp_path):
                (tmp_path / name).unlink()
            with pytest.raises(StorageError, match="has gone"):
                model(ids[:, :1], past_key_values=out.past_key_values)
    del out
    gc.collect()
    assert files(tmp_path) == []
