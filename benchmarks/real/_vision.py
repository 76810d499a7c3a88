"""Shared by the checks of operators on images: two real data sets and a small ViT around any operator.

Digits: 1797 handwritten digits of 8 x 8 pixels, from the scikit-learn package; every pixel is a token (64). Fashion-MNIST: 28 x
28 photographs of clothes, from Debian's package dataset-fashion-mnist; 4 x 4 pixels are a token (49), or 2 x 2 (196). Both are
read once and kept in the cache folder; a file put there by hand serves machines without a network:

    python benchmarks/real/_vision.py [--fashion FOLDER]        prepares both, FOLDER holds the four idx.gz files

A check compares `Choice`s by `compare`: the same ViT, the width of its gated layers chosen so that all have the same number of
parameters, the same steps and batches, three seeds.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import io
import math
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkv.bench.packages import cache_dir
from qkv.core.operator import Operator
from qkv.models.vision.vit import ViT, ViTConfig

FASHION = Path("/usr/share/datasets/fashion-mnist")
KEPT = (20_000, 5_000)  # images of Fashion-MNIST: to train on, held out


# -- images ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """A data set on a device: images ``[B, 1, height, width]`` of mean 0 and deviation 1, labels ``[B]``, and those held out."""

    name: str
    patch: int
    train: Tensor
    labels: Tensor
    held: Tensor
    held_labels: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """Pixels in height and width."""
        return self.train.shape[2], self.train.shape[3]

    @property
    def tokens(self) -> int:
        """Tokens of an image."""
        return self.size[0] * self.size[1] // self.patch**2


def digits(device: str = "cpu", patch: int = 1) -> Images:
    """1198 digits to train on, 599 held out; 10 classes."""
    return _images("digits", device, patch, _read_digits)


def fashion(device: str = "cpu", patch: int = 4) -> Images:
    """20,000 photographs of clothes to train on, 5,000 held out; 10 classes."""
    return _images("fashion", device, patch, _read_fashion)


def _images(name: str, device: str, patch: int, read: Callable[[], dict[str, np.ndarray]]) -> Images:
    path = cache_dir() / "vision" / f"{name}.npz"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".partial.npz")
        np.savez_compressed(scratch, **read())
        scratch.replace(path)
    with np.load(path) as data:
        x, held = (torch.from_numpy(data[n]).float().unsqueeze(1) for n in ("images", "held"))
        labels, held_labels = (torch.from_numpy(data[n]).long() for n in ("labels", "held_labels"))
    mean, deviation = x.mean(), x.std()
    parts = ((x - mean) / deviation, labels, (held - mean) / deviation, held_labels)
    return Images(name, patch, *(part.to(device) for part in parts))


def _read_digits() -> dict[str, np.ndarray]:
    member = "sklearn/datasets/data/digits.csv.gz"
    spec = importlib.util.find_spec("sklearn")
    if spec is not None and spec.origin is not None:
        raw = Path(spec.origin).parents[1].joinpath(member).read_bytes()
    else:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
            subprocess.run([*command, "--dest", folder, "scikit-learn"], check=True)
            with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
                raw = wheel.read(member)
    table = np.loadtxt(io.BytesIO(gzip.decompress(raw)), delimiter=",")
    order = np.random.default_rng(0).permutation(len(table))
    images, labels = table[order, :-1].reshape(-1, 8, 8).astype(np.uint8), table[order, -1].astype(np.uint8)
    return {"images": images[:1198], "labels": labels[:1198], "held": images[1198:], "held_labels": labels[1198:]}


def _read_fashion(folder: Path = FASHION) -> dict[str, np.ndarray]:
    out = {}
    for part, name, count in (("train", "", KEPT[0]), ("t10k", "held", KEPT[1])):
        paths = [folder / f"{part}-{what}.gz" for what in ("images-idx3-ubyte", "labels-idx1-ubyte")]
        if not all(p.is_file() for p in paths):
            raise SystemExit(
                f"{folder} lacks the files of Fashion-MNIST: apt-get install dataset-fashion-mnist, or prepare the cache with "
                "python benchmarks/real/_vision.py --fashion FOLDER"
            )
        images, labels = (np.frombuffer(gzip.decompress(p.read_bytes()), np.uint8) for p in paths)
        out[name or "images"] = images[16:].reshape(-1, 28, 28)[:count]
        out[f"{name}_labels" if name else "labels"] = labels[8:][:count]
    return out


# -- models ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """One way to mix tokens.

    method: a setting for every layer (``"nalaformer"``), or one for each of them. local: ``local(channels)`` makes a module
    called with normalised tokens ``[B, N, C]`` and the grid; its output is added after the operator, before the gated layer.
    key_width: D of a head, 0 for what the operator asks for. prepare: changes a fresh model in place (shares projections, keeps
    an input constant).
    """

    name: str
    method: str | Operator | Sequence[str | Operator]
    local: Callable[[int], nn.Module] | None = None
    key_width: int = 0
    prepare: Callable[[Any], None] | None = None

    def at(self, layers: int) -> tuple[Any, ...]:
        """One setting per layer."""
        one = isinstance(self.method, (str, Operator))
        return (self.method,) * layers if one else tuple(self.method)  # type: ignore[arg-type]


class WithLocal(nn.Module):
    """A block of the ViT with a local module between its mixer and its gated layer."""

    def __init__(self, block: Any, local: nn.Module, width: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.block, self.local, self.norm, self.grid = block, local, nn.RMSNorm(width, eps=1e-6), grid

    @property
    def mixer(self) -> Any:
        """The block's mixer."""
        return self.block.mixer

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Residual stream ``[B, N, W]``."""
        b = self.block
        x = x + b.mixer(b.before(x))[0]
        x = x + self.local(self.norm(x), self.grid)
        y = b.between(x)
        return x + b.down(F.silu(b.gate(y)) * b.up(y)), None


def model(choice: Choice, data: Images, *, parameters: int, width: int, heads: int, layers: int, seed: int) -> ViT:
    """A ViT with about `parameters` parameters: what operator and local modules take, the gated layers give."""
    config = ViTConfig(operators=choice.at(layers), size=data.size, patch=data.patch, width=width, heads=heads,
                       key_width=choice.key_width)  # fmt: skip
    taken = 0
    if choice.local is not None:
        taken = layers * (width + sum(p.numel() for p in choice.local(width).parameters()))
    torch.manual_seed(seed)
    net = ViT(config.fitted(parameters - taken), seed=seed)
    if choice.local is not None:
        for i, block in enumerate(net.blocks):
            net.blocks[i] = WithLocal(block, choice.local(width), width, config.grid)
    if choice.prepare is not None:
        choice.prepare(net)
    return net.to(data.train.device)


def fit(net: ViT, data: Images, *, steps: int, rows: int, rate: float, seed: int, name: str) -> float:
    """AdamW with warm-up and a cosine to a twentieth; returns seconds a step (the first left out)."""
    device = data.train.device
    trained = [p for p in net.parameters() if p.requires_grad]
    kinds = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
    groups = [{"params": kinds[0], "weight_decay": 0.05}, {"params": kinds[1], "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=device.type == "cuda")
    rng = torch.Generator(device).manual_seed(seed)
    since = time.perf_counter()
    net.train()
    for i in range(steps):
        share = min(1.0, (i + 1) / max(1, steps // 10)) * (0.525 + 0.475 * math.cos(math.pi * i / steps))
        for group in optimiser.param_groups:
            group["lr"] = rate * share
        pick = torch.randint(len(data.train), (rows,), generator=rng, device=device)
        loss = net.loss(data.train[pick], data.labels[pick])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        if i == 0:
            since = time.perf_counter()
    print(f"  {data.name}, {name}, seed {seed}: loss {loss.item():.4f} after {steps} steps", flush=True)
    return (time.perf_counter() - since) / max(1, steps - 1)


@torch.no_grad()
def judged(net: ViT, data: Images) -> tuple[float, float]:
    """Accuracy and loss (nats an image) on the held-out images."""
    net.eval()
    logits = torch.cat([net(x) for x in data.held.split(500)]).float()
    right = (logits.argmax(-1) == data.held_labels).float().mean().item()
    return right, F.cross_entropy(logits, data.held_labels).item()


@dataclass(frozen=True)
class Result:
    """The row of a table and the trained models, one per seed."""

    row: dict[str, Any]
    models: list[ViT]


def compare(
    choices: Sequence[Choice], data: Images, a: argparse.Namespace, *, parameters: int = 120_000, width: int = 64,
    heads: int = 4, layers: int = 3, steps: int = 400, rows: int = 128, rate: float = 3e-3, seeds: int = 3,
) -> dict[str, Result]:  # fmt: skip
    """Train every choice with every seed; rows hold means over the seeds. Divergence shows as a loss that is not finite."""
    if a.quick:
        steps, rows, seeds = 3, 8, 1
        data = Images(data.name, data.patch, data.train[:64], data.labels[:64], data.held[:64], data.held_labels[:64])
    out = {}
    for choice in choices:
        nets, found, seconds = [], [], []
        for seed in range(seeds):
            net = model(choice, data, parameters=parameters, width=width, heads=heads, layers=layers, seed=seed)
            seconds.append(fit(net, data, steps=steps, rows=rows, rate=rate, seed=seed, name=choice.name))
            found.append(judged(net, data))
            nets.append(net)
        right, loss = zip(*found, strict=True)
        row = {
            "data": data.name,
            "operator": choice.name,
            "accuracy": round(statistics.mean(right), 4),
            "deviation over seeds": round(statistics.stdev(right), 4) if seeds > 1 else 0.0,
            "loss (nats/image)": round(statistics.mean(loss), 4),
            "parameters": sum(p.numel() for p in nets[0].parameters()),
            "ms per step": round(1e3 * statistics.median(seconds), 2),
        }
        print(" ", row, flush=True)
        out[choice.name] = Result(row, nets)
    return out


@torch.no_grad()
def captured(net: ViT, images: Tensor) -> list[tuple[Tensor, Tensor, Tensor, dict[str, Any]]]:
    """What each layer's operator is given for these images: q, k, v ``[B, H, N, .]`` and its learnt inputs by name."""
    found, held = [], []
    for block in net.blocks:
        mixer: Any = block.mixer
        inner = mixer.memory

        def look(q: Tensor, k: Tensor, v: Tensor, extras: dict[str, Any], *rest: Any, inner: Any = inner) -> Any:
            found.append((q, k, v, dict(extras)))
            return inner(q, k, v, extras, *rest)

        held.append((mixer, inner))
        mixer.memory = look
    try:
        net.eval()
        net(images)
    finally:
        for mixer, inner in held:
            mixer.memory = inner
    return found


def spearman(x: Tensor, y: Tensor) -> float:
    """Rank correlation of two flat tensors (ties in order of appearance)."""
    ranks = [z.flatten().double().argsort().argsort().double() for z in (x, y)]
    a, b = (r - r.mean() for r in ranks)
    return float((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-12))


def entropy(rows: Tensor) -> Tensor:
    """Nats of each row ``[..., M]`` of weights that sum to 1."""
    return -(rows * rows.clamp(min=1e-30).log()).sum(-1)


def arguments(description: str | None) -> argparse.Namespace:
    """--device, --quick, --folder."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a few steps on a few images, for a look")
    parser.add_argument("--folder", default="benchmarks/results/real")
    return parser.parse_args()


def main() -> None:
    """Prepare the cache."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fashion", type=Path, default=FASHION)
    folder = parser.parse_args().fashion
    for data in (digits(), _images("fashion", "cpu", 4, lambda: _read_fashion(folder))):
        path = cache_dir() / "vision" / f"{data.name}.npz"
        print(f"{path}: {len(data.train)} + {len(data.held)} images, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
