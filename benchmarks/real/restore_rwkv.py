"""Restore-RWKV on real photographs: a denoiser with scans along rows and columns, along rows alone, and without, equal in size.

python benchmarks/real/restore_rwkv.py [--device cuda]
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from _photos import Crops, fit, held_out, photos, psnr, restored
from _vision import arguments
from torch import Tensor, nn

import qkv
from qkv.bench.record import Figure, record
from qkv.layers.omni_shift import reparameterized
from qkv.ops._common.grids import off_grid, on_grid

SIGMA = 25 / 255
WAYS = {"rows and columns": ("row", "col"), "rows": ("row",), "no scan": ()}


class Stage(nn.Module):
    """Re-WKV blocks on a picture ``[B, C, h, w]``. Without scans values pass as they are, the keys' weights go to the mixer."""

    def __init__(self, width: int, blocks: int, scans: tuple[str, ...]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for _ in range(blocks):
            block = qkv.method("rewkv", scans=scans or ("row",)).build(width)
            if not scans:
                block.att.averaged = lambda k, v, grid: v
                block.att.key = nn.Identity()
                inner = 4 * width + width // 2 + 1  # the key's weights, and those of decay and bonus
                block.ffn.key, block.ffn.value = (
                    nn.Linear(width, inner, bias=False),
                    nn.Linear(inner, width, bias=False),
                )
                del block.att.spatial_decay, block.att.spatial_first
            self.blocks.append(block)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        grid = tuple(x.shape[2:])
        tokens = off_grid(x)
        for block in self.blocks:
            tokens = block(tokens, grid)
        return on_grid(tokens, grid)


class Denoiser(nn.Module):
    """Two levels of the published network: ``[B, 1, h, w]`` -> the same."""

    def __init__(self, scans: tuple[str, ...], width: int) -> None:
        super().__init__()
        conv = lambda a, b: nn.Conv2d(a, b, 3, padding=1, bias=False)  # noqa: E731
        self.first, self.last = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(2 * width, 1, 3, padding=1)
        self.encoder, self.latent, self.decoder = (
            Stage(width, 2, scans),
            Stage(2 * width, 2, scans),
            Stage(2 * width, 2, scans),
        )
        self.down, self.up = conv(width, width // 2), conv(2 * width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        """Noisy to clean."""
        high = self.encoder(self.first(x))
        low = self.latent(F.pixel_unshuffle(self.down(high), 2))
        return self.last(self.decoder(torch.cat([F.pixel_shuffle(self.up(low), 2), high], 1))) + x


def noisy(clean: Tensor, seed: int) -> Tensor:
    """With Gaussian noise of 25 of 255 steps."""
    rng = torch.Generator().manual_seed(seed)
    return clean + SIGMA * torch.randn(clean.shape, generator=rng).to(clean)


def reach(net: Denoiser, images: Tensor) -> dict[str, float]:
    """Where the middle pixel's gradient lies beyond a quarter of the picture: in the middle row, the middle column, elsewhere.

    Shares of the whole gradient's magnitude, bands of 5 pixels.
    """
    given = images.clone().requires_grad_()
    size = images.shape[-1]
    middle = size // 2
    grad = torch.autograd.grad((net(given) - given)[:, :, middle, middle].sum(), given)[0].abs().sum((0, 1))
    away = (torch.arange(size, device=images.device) - middle).abs()
    near, far = away <= 2, away > size // 4
    total = grad.sum()
    return {
        "along the row": float(grad[near][:, far].sum() / total),
        "along the column": float(grad[far][:, near].sum() / total),
        "elsewhere": float(grad[far][:, far].sum() / total),
    }


def main() -> None:
    """Train three denoisers, look where they look, merge their branches, record."""
    a = arguments(__doc__)
    images = photos(a.device)
    steps, rows, width, seeds = (2, 2, 8, 1) if a.quick else (400, 16, 32, 2)
    clean = held_out(images, 32 if a.quick else 64, grey=True, most=1 if a.quick else 60)
    given = noisy(clean, 1000)
    nothing = dict.fromkeys(
        ("parameters", "ms per step", "reach along the row", "reach along the column", "reach elsewhere"), 0
    )
    table: list[dict[str, Any]] = [
        {"scans": "noisy image", "PSNR (dB)": round(psnr(given, clean), 3), "by seed": "", **nothing}
    ]
    merged = 0.0
    for name, scans in WAYS.items():
        found, seen, facts = [], [], {}
        for seed in range(seeds):
            torch.manual_seed(seed)
            net, crops = Denoiser(scans, width).to(a.device), Crops(images, clean.shape[-1], seed, grey=True)

            def batch(i: int, crops: Crops = crops, seed: int = seed) -> tuple[Tensor, Tensor]:
                x = crops.draw(rows)
                return noisy(x, 10_000 * (seed + 1) + i), x

            facts = fit(net, batch, steps=steps, rate=1e-3, name=f"{name}, seed {seed}")
            out = restored(net, given)
            found.append(psnr(out, clean))
            seen.append(reach(net, given[:8]))
            gap = (restored(reparameterized(net), given) - out).abs().max().item()
            merged = max(merged, gap)
        mean = {f"reach {k}": round(sum(s[k] for s in seen) / len(seen), 5) for k in seen[0]}
        table.append({"scans": name, "PSNR (dB)": round(sum(found) / len(found), 3),
                      "by seed": ", ".join(f"{x:.3f}" for x in found), **facts, **mean})  # fmt: skip
    note = f"noise of 25 of 255, 3 grey photographs held out, crops of 64 pixels, {seeds} seeds"
    figures = [Figure(f"PSNR, {r['scans']}", r["PSNR (dB)"], "dB", note) for r in table]
    where = "share of the middle pixel's gradient beyond a quarter of the picture"
    figures += [
        Figure(f"reach along the column, {r['scans']}", r["reach along the column"], "", where) for r in table[1:]
    ]
    figures.append(Figure("change by merging Omni-Shift", merged, "", "largest difference of outputs, float32"))
    record("restore-rwkv", claim="two scans denoise better than one, and one better than convolutions alone, at equal size",
           figures=figures, table=table, command="python benchmarks/real/restore_rwkv.py", seed=0, folder=a.folder)  # fmt: skip
    for row in table:
        print(row)


if __name__ == "__main__":
    main()
