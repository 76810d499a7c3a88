"""Vision models in stages: their laws with every block, the published ones, folders, training and what they refuse."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from qkv.core.errors import (
    InvalidInput,
    InvalidParameter,
    QKVError,
    Refused,
    SavedDataError,
    TrainingError,
    UnknownName,
)
from qkv.distill import train
from qkv.models import saved_kind
from qkv.models.vision import pyramid
from qkv.models.vision.published import l2vit, nalaformer
from qkv.models.vision.pyramid import Halved, Pyramid, PyramidConfig
from qkv.models.vision.vit import ViT

torch.set_num_threads(1)
SMALL: dict[str, Any] = {"size": (20, 28), "channels": 2, "classes": 5}
MADE = {
    "l2vit": lambda: l2vit(depths=(2, 3), widths=(8, 12), window=3, **SMALL),
    "nalaformer": lambda: nalaformer((1, 2, 1), (8, 8, 16), **SMALL),
    "rewkv": lambda: PyramidConfig(operators=("rewkv", "rewkv"), depths=(1, 1), widths=(8, 8), **SMALL),
}
EVERY = pytest.mark.parametrize("name", MADE)


def model(name: str, seed: int = 0) -> Pyramid:
    return Pyramid(MADE[name](), seed).double().eval()


def draw(count: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(count, 2, 20, 28, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@EVERY
@torch.no_grad()
def test_an_image_in_a_batch_is_the_image_alone(name: str) -> None:
    net, x = model(name), draw()
    both = net(x)
    assert both.shape == (3, 5)
    assert torch.allclose(net(x[1:2]), both[1:2], rtol=1e-9, atol=1e-11)
    other = x.clone()
    for place in ((0, 0, 0), (1, 19, 27), (0, 9, 14)):
        other[(0, *place)] += 1.0
        assert not torch.allclose(net(other)[:1], both[:1], rtol=0, atol=1e-12)
        assert torch.equal(net(other)[1:], net(x)[1:])


@EVERY
def test_everything_that_is_trained_gets_a_gradient(name: str) -> None:
    net = model(name).train()
    net.loss(draw(), torch.tensor([0, 1, 2])).backward()
    assert not [n for n, p in net.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]


@EVERY
@torch.no_grad()
def test_a_folder_gives_the_same_model(name: str, tmp_path: Any) -> None:
    net, x = model(name), draw()
    net.save_pretrained(tmp_path / "m")
    assert saved_kind(tmp_path / "m") == "pyramid"
    loaded = Pyramid.from_pretrained(tmp_path / "m", config=net.config)
    assert loaded.config == net.config and torch.equal(loaded(x), net(x))
    with pytest.raises(SavedDataError, match="classes: 5 instead of 7"):
        Pyramid.from_pretrained(tmp_path / "m", config=PyramidConfig.from_dict(net.config.to_dict() | {"classes": 7}))
    with pytest.raises(SavedDataError, match="holds a pyramid model, not a vit one"):
        ViT.from_pretrained(tmp_path / "m")


def test_grids_halve_and_odd_sides_are_filled() -> None:
    net, seen = model("l2vit"), []
    for stage in net.stages:
        next(stage.children()).register_forward_hook(
            lambda module, args, out: seen.append((tuple(args[0].shape[1:]), args[1]))
        )
    net(draw(1))
    assert seen == [((35, 8), (5, 7)), ((12, 12), (3, 4))]
    half, x = Halved(3, 4).double(), torch.randn(1, 6, 3, dtype=torch.float64)
    out, grid = half(x, (3, 2))
    field = torch.cat((half.norm(x), x.new_zeros(1, 2, 3)), 1).view(1, 2, 2, 2, 3)  # [B, rows, 2, 2, C]
    assert half.conv.bias is not None
    want = torch.einsum("brijc,ocij->bro", field, half.conv.weight) + half.conv.bias
    assert grid == (2, 1) and torch.allclose(out, want)


def test_a_seed_makes_the_weights_and_leaves_the_global_one_alone() -> None:
    state = torch.get_rng_state()
    a, b, c = model("l2vit", 3), model("l2vit", 3), model("l2vit", 4)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.head.weight, c.head.weight)


@pytest.mark.parametrize(("size", "depth", "width"), [("tiny", 12, 768), ("small", 24, 768), ("base", 24, 1024)])
def test_the_published_l2vit(size: Any, depth: int, width: int) -> None:
    c = l2vit(size, drop_path=0.3)
    settings = [m.settings() for m in c.methods]
    assert len(settings) == depth and c.widths[-1] == width
    assert [s["scope"] for s in settings] == ["window", "global"] * (depth // 2)
    assert settings[-1]["heads"] == width // 32 and settings[0]["drop_path"] == 0 and settings[-1]["drop_path"] == 0.3
    with torch.device("meta"):
        assert Pyramid(c)(torch.empty(1, 3, 224, 224)).shape == (1, 1000)
    assert (
        {"tiny": 27e6, "small": 48e6, "base": 85e6}[size]
        < Pyramid.count(c)
        < {"tiny": 32e6, "small": 55e6, "base": 96e6}[size]
    )


def test_nalaformer_is_softmax_in_its_last_stages() -> None:
    c = nalaformer(classes=10)
    assert [m.settings()["attention"] for m in c.methods] == ["nala"] * 4 + ["softmax"] * 8
    assert c.stem == 4 and c.widths == (96, 192, 384, 768)
    with torch.device("meta"):
        assert Pyramid(c)(torch.empty(1, 3, 224, 224)).shape == (1, 10)


QUICK: dict[str, Any] = {
    "max_steps": 4, "per_device_train_batch_size": 4, "save_steps": 2, "logging_steps": 1, "use_cpu": True, "progress": False,
}  # fmt: skip


def rows() -> list[dict[str, Tensor]]:
    return [{"pixel_values": x, "labels": torch.tensor(i % 5)} for i, x in enumerate(draw(12).float())]


@pytest.mark.parametrize("name", ["l2vit", "nalaformer"])
def test_a_run_that_was_cut_off_is_the_run_that_was_not(name: str, tmp_path: Any) -> None:
    done = train(Pyramid(MADE[name]()), rows(), tmp_path / "whole", **QUICK)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "model")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "checkpoint-4")
    again = train(Pyramid(MADE[name]()), rows(), tmp_path / "cut", resume=True, **QUICK)
    a, b = (Pyramid.from_pretrained(x.path).state_dict() for x in (done, again))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], x) for k, x in Pyramid(MADE[name]()).state_dict().items())
    other = l2vit(depths=(2, 3), widths=(8, 12), window=2, **SMALL)
    with pytest.raises(TrainingError, match=r"parameters\.window: (3|null) -> 2"):
        train(Pyramid(other), rows(), tmp_path / "cut", resume=True, **QUICK)


@pytest.mark.parametrize(
    ("more", "error", "says"),
    [
        ({"operators": ("full", "l2vit-block")}, Refused, "full is no block on a grid"),
        ({"operators": ("l2vit-blok", "l2vit-block")}, UnknownName, "l2vit-block"),
        ({"operators": ()}, InvalidParameter, "one setting per layer"),
        ({"depths": (3,)}, InvalidParameter, "3 blocks; 2 are given"),
        ({"depths": (1, 1)}, InvalidParameter, "one number for each stage"),
        ({"depths": 2}, InvalidParameter, "list of ints"),
        ({"widths": (True,)}, InvalidParameter, "list of ints"),
        ({"patch": 3}, InvalidParameter, "power of two"),
        ({"patch": 8}, InvalidParameter, "stem=2"),
        ({"size": (20, 30)}, InvalidParameter, "multiples of patch=4"),
        ({"classes": 0}, InvalidParameter, "classes"),
    ],
)
def test_models_that_cannot_be(more: dict[str, Any], error: type[QKVError], says: str) -> None:
    with pytest.raises(error, match=says):
        PyramidConfig(**{"widths": (8,), "size": (20, 28)} | more)


def test_what_published_models_and_images_refuse() -> None:
    with pytest.raises(InvalidParameter, match="tiny, small, base"):
        l2vit("huge")  # type: ignore[arg-type]
    for made in (l2vit, nalaformer):
        with pytest.raises(InvalidParameter, match="one number for each stage"):
            made(depths=(2, 2), widths=(8,))
    net, x = model("l2vit"), draw()
    for bad in (x[0], x[:, :1], x[..., :13], x.long()):
        with pytest.raises(InvalidInput, match="height, width"):
            net(bad)


def test_blocks_without_order_are_caught(monkeypatch: Any) -> None:
    """Negative control: a model whose stages do not pass their grid on mixes other tokens."""
    net, x = model("l2vit"), draw(1)
    right = net(x)
    monkeypatch.setattr(pyramid, "off_grid", lambda field: field.transpose(2, 3).flatten(2).mT)
    assert not torch.allclose(net(x), right, rtol=0, atol=1e-9)
