"""The ViT: its laws with every operator, hybrids, folders, training, its data and what it refuses."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import qkv
from qkv.bench import images as pictures
from qkv.bench.fitting import fit
from qkv.core import registry
from qkv.core.errors import (
    AssetError,
    InvalidInput,
    InvalidParameter,
    MissingDependency,
    QKVError,
    Refused,
    SavedDataError,
    TrainingError,
    UnknownName,
)
from qkv.distill import train
from qkv.layers._mixer import check_mixing
from qkv.models import saved_kind
from qkv.models.vision.vit import ViT, ViTConfig

torch.set_num_threads(1)
HYBRIDS = (("flow", "full"), ("sliding-window:window=3,sinks=0", "agent", "lightnet"))


def _bidirectional(name: str) -> bool:
    try:
        check_mixing(registry.method(name), causal=False)
    except Refused:
        return False
    return True


SINGLE = tuple((s.id,) for s in qkv.methods(kind="operator") if _bidirectional(s.id))
EVERY = pytest.mark.parametrize("operators", SINGLE + HYBRIDS, ids=" ".join)


def config(operators: Any = ("flow",), **more: Any) -> ViTConfig:
    sizes = {"size": (10, 14), "patch": 2, "channels": 3, "classes": 5, "width": 16, "heads": 2}
    return ViTConfig(operators=operators, **(sizes | more))


def model(operators: Any = ("flow",), seed: int = 0, **more: Any) -> ViT:
    return ViT(config(operators, **more), seed).double().eval()


def draw(count: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 10, 14, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- laws of the model, for every operator


@EVERY
@torch.no_grad()
def test_an_image_in_a_batch_is_the_image_alone(operators: Any) -> None:
    net, x = model(operators), draw()
    both = net(x)
    assert both.shape == (3, 5)
    assert torch.allclose(net(x[1:2]), both[1:2], rtol=1e-9, atol=1e-11)
    assert torch.allclose(net(x.flip(0)), both.flip(0), rtol=1e-9, atol=1e-11)


@EVERY
@torch.no_grad()
def test_every_pixel_counts(operators: Any) -> None:
    net, x = model(operators), draw(1)
    base = net(x)
    for place in ((0, 0, 0), (2, 9, 13), (1, 4, 6)):
        other = x.clone()
        other[(0, *place)] += 1.0
        assert not torch.allclose(net(other), base, rtol=0, atol=1e-9)


@EVERY
def test_everything_that_is_trained_gets_a_gradient(operators: Any) -> None:
    net = model(operators)
    net.loss(draw(), torch.tensor([0, 1, 2])).backward()
    still = [n for n, p in net.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    assert not still


@EVERY
@torch.no_grad()
def test_a_folder_gives_the_same_model(operators: Any, tmp_path: Any) -> None:
    net, x = model(operators), draw()
    net.save_pretrained(tmp_path / "m")
    assert saved_kind(tmp_path / "m") == "vit"
    loaded = ViT.from_pretrained(tmp_path / "m", config=net.config)
    assert loaded.config == net.config and torch.equal(loaded(x), net(x))


@torch.no_grad()
def test_loaded_weights_have_memory_of_their_own(tmp_path: Any) -> None:
    """Not the file's: it may change, and lies at addresses where some processors round products otherwise."""
    net, x = model(("full", "flow")), draw()
    net.save_pretrained(tmp_path / "m")
    loaded = ViT.from_pretrained(tmp_path / "m")
    assert all(p.data_ptr() % 16 == 0 for p in loaded.parameters())
    (file,) = (tmp_path / "m").glob("*.safetensors")
    with file.open("r+b") as stream:
        stream.write(bytes(file.stat().st_size))
    assert torch.equal(loaded(x), net(x))


@EVERY
@torch.no_grad()
def test_bfloat16_autocast_stays_near_float32(operators: Any) -> None:
    net, x = ViT(config(operators, width=32), 0), draw().float()
    with torch.autocast("cpu", torch.bfloat16):
        low = net(x)
    high = net(x)
    assert bool(torch.isfinite(low).all()) and float((low.float() - high).norm() / high.norm()) < 0.03


@pytest.mark.parametrize(
    "operators", [x for x in SINGLE if registry.method(x[0]).spec.gqa] + [HYBRIDS[1]], ids=" ".join
)
@torch.no_grad()
def test_a_group_reads_the_keys_and_values_of_its_head(operators: Any) -> None:
    few, x = model(operators, heads=4, kv_heads=2), draw()
    many, held = model(operators, heads=4), few.state_dict()
    for name, want in many.state_dict().items():
        if held[name].shape != want.shape:
            held[name] = held[name].unflatten(0, (2, -1)).repeat_interleave(2, 0).flatten(0, 1)
    many.load_state_dict(held)
    assert ViT.count(few.config) < ViT.count(many.config)
    assert torch.allclose(few(x), many(x), rtol=1e-9, atol=1e-11)


# -- the architecture


@torch.no_grad()
def test_patches_are_cut_row_by_row() -> None:
    net, x = model(), draw(1)
    grid = x.reshape(1, 3, 5, 2, 7, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, 35, 12)
    seen = {}
    net.patches.register_forward_hook(lambda module, args, out: seen.update(tokens=args[0]))
    net(x)
    assert torch.equal(seen["tokens"], grid)


@torch.no_grad()
def test_without_positions_softmax_does_not_know_the_order() -> None:
    """And with them it does: the table of positions is what tells patches apart."""
    net, x = model(("full",)), draw(1)
    moved = x.reshape(1, 3, 5, 2, 14).flip(2).reshape(x.shape)  # rows of patches in reverse order
    assert not torch.allclose(net(moved), net(x), rtol=0, atol=1e-9)
    net.positions.weight.zero_()
    assert torch.allclose(net(moved), net(x), rtol=1e-9, atol=1e-11)


def test_operators_are_told_the_grid() -> None:
    assert model(("agent",)).blocks[0].mixer.method.grid == (5, 7)


@pytest.mark.parametrize("operators", [("full",), ("flow", "agent")], ids=" ".join)
def test_models_are_sized_alike(operators: Any) -> None:
    c = config(operators, width=32).fitted(40_000)
    assert abs(ViT.count(c) - 40_000) <= 3 * c.width * c.layers / 2


# -- what is refused


@pytest.mark.parametrize(
    ("operators", "more", "error", "says"),
    [
        (("gla",), {}, Refused, "causal by definition"),
        (("kivi",), {}, Refused, "kind cache"),
        (("ful",), {}, UnknownName, "full"),
        ((), {}, InvalidParameter, "one setting per layer"),
        (("flow",), {"size": (10, 15)}, InvalidParameter, "multiples of patch=2"),
        (("flow",), {"size": 10}, InvalidParameter, "height, width"),
        (("flow",), {"classes": 0}, InvalidParameter, "classes"),
        (("flow",), {"width": 15}, InvalidParameter, "multiple of heads"),
        (("flow",), {"inner": -1}, InvalidParameter, "inner"),
    ],
)
def test_models_that_cannot_be(operators: Any, more: dict[str, Any], error: type[QKVError], says: str) -> None:
    with pytest.raises(error, match=says):
        config(operators, **more)


def test_images_that_do_not_fit() -> None:
    net, x = model(), draw()
    for bad in (x[0], x[:, :2], x[..., :13], x.long()):
        with pytest.raises(InvalidInput, match="height, width"):
            net(bad)


def test_damaged_and_foreign_folders(tmp_path: Any) -> None:
    net, path = model(("flow", "full")), tmp_path / "m"
    net.save_pretrained(path)
    manifest = json.loads((path / "qkv.json").read_text())
    for more in ({"model": "causal-lm"}, {"config": manifest["config"] | {"size": [10, 16]}},
                 {"config": manifest["config"] | {"operators": [{"id": "gla"}, {"id": "full"}]}}):  # fmt: skip
        (path / "qkv.json").write_text(json.dumps(manifest | more))
        with pytest.raises(SavedDataError):
            ViT.from_pretrained(path)
    (path / "qkv.json").write_text(json.dumps(manifest))
    with pytest.raises(SavedDataError, match="layer 0: flow instead of agent"):
        ViT.from_pretrained(path, config=config(("agent", "full")))
    assert saved_kind(tmp_path) is None and saved_kind("nowhere") is None


# -- training

QUICK: dict[str, Any] = {
    "max_steps": 4, "per_device_train_batch_size": 4, "save_steps": 2, "logging_steps": 1, "use_cpu": True, "progress": False,
}  # fmt: skip


def labelled(count: int = 24) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(3, 10, 14, generator=g), "labels": torch.tensor(i % 5)} for i in range(count)]


def test_a_run_that_was_cut_off_is_the_run_that_was_not(tmp_path: Any) -> None:
    done = train(ViT(config(("agent", "full"))), labelled(), tmp_path / "whole", **QUICK)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "model")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "checkpoint-4")
    again = train(ViT(config(("agent", "full"))), labelled(), tmp_path / "cut", resume=True, **QUICK)
    a, b = (ViT.from_pretrained(x.path).state_dict() for x in (done, again))
    assert all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(TrainingError, match=r'operators\.0\.id: "agent" -> "flow"'):
        train(ViT(config(("flow", "full"))), labelled(), tmp_path / "cut", resume=True, **QUICK)


@pytest.mark.parametrize("operators", [("full",), ("flow",)], ids=" ".join)
def test_the_place_of_a_spot_is_learnt(operators: Any) -> None:
    """Nine classes, one per corner of a 3 x 3 division: chance is 0.11."""
    g = torch.Generator().manual_seed(0)

    def batch(i: int) -> tuple[Tensor, Tensor]:
        label = torch.randint(0, 9, (32,), generator=g)
        x = 0.3 * torch.randn(32, 1, 12, 12, generator=g)
        rows, columns = (torch.randint(0, 4, (32,), generator=g) + 4 * part for part in (label // 3, label % 3))
        x[torch.arange(32), 0, rows, columns] += 4.0
        return x, label

    net = ViT(ViTConfig(operators=operators, size=(12, 12), patch=4, classes=9, width=32, heads=2))
    fit(net, net.loss, batch, 100, rate=5e-3)
    x, label = batch(0)
    assert float((net(x).argmax(-1) == label).float().mean()) > 0.7


# -- the data


@pytest.fixture
def sklearn(tmp_path: Any, monkeypatch: Any) -> Path:
    """A folder that looks like an installed scikit-learn, with digits of its own."""
    data = tmp_path / "site" / "sklearn" / "datasets" / "data"
    data.mkdir(parents=True)
    (tmp_path / "site" / "sklearn" / "__init__.py").write_text("raise ImportError('not to be imported')")
    table = np.random.default_rng(0).integers(0, 17, (1797, 65))
    table[:, 64] = np.arange(1797) % 10
    with gzip.open(data / "digits.csv.gz", "wt") as file:
        np.savetxt(file, table, delimiter=",", fmt="%d")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return data / "digits.csv.gz"


def test_digits_are_read_from_an_installed_package(sklearn: Path, monkeypatch: Any) -> None:
    got = pictures.images("digits")
    assert got.train.shape == (1437, 1, 8, 8) and got.held.shape == (360, 1, 8, 8)
    assert abs(float(got.train.mean())) < 1e-4 and abs(float(got.train.std()) - 1) < 1e-4
    assert got.held_labels[:3].tolist() == [0, 5, 0]
    with gzip.open(sklearn, "wt") as file:
        file.write("1,2\n")
    with pytest.raises(AssetError, match="instead of"):
        pictures.images("digits")
    monkeypatch.setattr(pictures.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="scikit-learn"):
        pictures.images("digits")


def test_photographs_are_checked_before_they_are_read(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("QKV_CACHE", str(tmp_path))
    monkeypatch.setattr(pictures, "DEBIAN", tmp_path / "none")
    with pytest.raises(AssetError, match="apt-get install dataset-fashion-mnist"):
        pictures.images("fashion-mnist")
    folder, digests = tmp_path / "fashion-mnist", {}
    folder.mkdir()
    for name in pictures.FASHION:
        raw = bytes(16) + bytes(range(196)) * 8 if "images" in name else bytes(8) + bytes((1, 2))
        (folder / name).write_bytes(gzip.compress(raw))
        digests[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    with pytest.raises(AssetError, match="damaged or another file"):
        pictures.images("fashion-mnist")
    monkeypatch.setattr(pictures, "FASHION", digests)
    got = pictures.images("fashion-mnist")
    assert got.train.shape == (2, 1, 28, 28) and got.held_labels.tolist() == [1, 2]
    with pytest.raises(UnknownName, match="digits"):
        pictures.images("digit")
