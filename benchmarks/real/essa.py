"""ESSA on real pictures: what relighting does to its attention, a super-resolution network, and digits.

python benchmarks/real/essa.py [--device cuda]

Packages hold no hyperspectral cube; the spectrum of a token is here the twelve numbers of 2 x 2 neighbouring colour pixels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from _photos import Crops, fit, held_out, photos, psnr, restored
from _vision import Choice, arguments, compare, digits
from torch import Tensor, nn

import qkv
from qkv.bench.record import Figure, record
from qkv.ops._common.grids import off_grid, on_grid


def relight(x: Tensor, seed: int) -> Tensor:
    """Every pixel's spectrum ``[B, H, N, D]`` scaled by 0.5 to 1.5 and shifted by up to 0.2."""
    rng = torch.Generator().manual_seed(seed)
    scale, shift = (torch.rand(*x.shape[:-1], 1, generator=rng).to(x) for _ in range(2))
    return x * (0.5 + scale) + 0.4 * (shift - 0.5)


def relit(images: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Relative change of what pixels read from others when queries and keys are relit, the values being kept."""
    crops = F.pixel_unshuffle(held_out(images, 64, most=8)[:8], 2)  # the colour photograph, 12 bands
    x = crops.flatten(2).mT.unsqueeze(1).double()  # [crops, 1, 1024, 12]
    a, b = relight(x, 1), relight(x, 2)

    def uncentred(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        psi = [y.square() / (y.square().sum(-1, keepdim=True) + 1e-7) for y in (q, k)]
        return (psi[0] / psi[0].norm(dim=-1, keepdim=True)) @ ((psi[1] / psi[1].norm(dim=2, keepdim=True)).mT @ v)

    ways = {
        "essa": lambda q, k: qkv.attention(q, k, x, method="essa:value_residual=false", causal=False),
        "essa without centring (control)": lambda q, k: uncentred(q, k, x),
        "softmax attention": lambda q, k: qkv.attention(q, k, x, method="full", causal=False),
        "linear attention (sigmoid)": lambda q, k: qkv.attention(q, k, x, method="flow:conserve=false", causal=False),
    }
    rows = []
    for name, way in ways.items():
        want = way(x, x)
        rows.append({"attention": name, "relative change": float((way(a, b) - want).norm() / want.norm())})
        spread = want - want.mean(2, keepdim=True)
        rows[-1]["of what differs between pixels"] = float((way(a, b) - want).norm() / spread.norm())
    return rows


class Rounds(nn.Module):
    """A small ESSAformer: up, ESSA, down, ESSA and so on, one unit for each of the two sizes, on top of bicubic interpolation,
    which it starts as.

    `attend`: False replaces what the attention read by zeros (the mixers stay, so do their weights).
    """

    def __init__(self, width: int, attend: bool) -> None:
        super().__init__()
        unit = qkv.method("essa-unit", dropout=0.0)
        self.first, self.last = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
        self.raise_, self.lower = nn.Conv2d(width, 4 * width, 3, padding=1), nn.Conv2d(width, width // 4, 3, padding=1)
        self.high, self.low = unit.build(width), unit.build(width)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]
        if not attend:
            for one in (self.high, self.low):
                one.attn.forward = torch.zeros_like  # type: ignore[method-assign]

    def up(self, x: Tensor) -> Tensor:
        """Twice the size."""
        return F.pixel_shuffle(self.raise_(x), 2)

    def down(self, x: Tensor) -> Tensor:
        """Half the size."""
        return F.pixel_unshuffle(self.lower(x), 2)

    @staticmethod
    def at(unit: Any, x: Tensor) -> Tensor:
        """A unit on a picture."""
        grid = tuple(x.shape[2:])
        return on_grid(unit(off_grid(x), grid), grid)

    def forward(self, small: Tensor) -> Tensor:
        """``[B, 3, h, w]`` -> ``[B, 3, 2 h, 2 w]``."""
        low = self.first(small)
        high = self.at(self.high, self.up(low))
        for _ in range(2):
            low = self.at(self.low, self.down(high) + low)
            high = self.at(self.high, self.up(low) + high)
        return self.last(high) + bicubic(small)


def bicubic(small: Tensor) -> Tensor:
    """Twice the size."""
    return F.interpolate(small, scale_factor=2, mode="bicubic", antialias=False)


def shrunk(x: Tensor) -> Tensor:
    """Half the size, by bicubic interpolation with antialiasing."""
    return F.interpolate(x, scale_factor=0.5, mode="bicubic", antialias=True).clamp(0, 1)


def enlarged(images: dict[str, Tensor], a: Any) -> list[dict[str, Any]]:
    """PSNR on photographs held out, of bicubic interpolation and of both networks."""
    steps, rows, width = (3, 2, 8) if a.quick else (800, 16, 48)
    want = held_out(images, 64, most=2 if a.quick else 60)
    nothing = {"parameters": 0, "ms per step": 0.0}
    table: list[dict[str, Any]] = [
        {"method": "bicubic", "PSNR (dB)": round(psnr(bicubic(shrunk(want)), want), 3), **nothing}
    ]
    for name, attend in (("network with ESSA", True), ("network without attention", False)):
        found, facts = [], {}
        for seed in range(1 if a.quick else 2):
            torch.manual_seed(seed)
            net, crops = Rounds(width, attend).to(a.device), Crops(images, 64, seed)

            def batch(i: int, crops: Crops = crops) -> tuple[Tensor, Tensor]:
                large = crops.draw(rows)
                return shrunk(large), large

            facts = fit(net, batch, steps=steps, rate=1e-3, name=f"{name}, seed {seed}")
            found.append(psnr(restored(net, shrunk(want)), want))
        print(f"  {name}: PSNR by seed {found}", flush=True)
        table.append({"method": name, "PSNR (dB)": round(sum(found) / len(found), 3), **facts})
    return table


def main() -> None:
    """Relight, enlarge, classify, record."""
    a = arguments(__doc__)
    images = photos(a.device)
    light, larger = relit(images), enlarged(images, a)
    found = compare(
        [Choice("essa", "essa"), Choice("linear (sigmoid)", "flow:conserve=false"), Choice("softmax", "full")],
        digits(a.device), a,
    )  # fmt: skip
    found |= {
        "essa, one head": compare([Choice("essa, one head", "essa")], digits(a.device), a, heads=1)["essa, one head"]
    }
    note = "8 crops of 1024 pixels with 12 bands, each pixel scaled by 0.5 to 1.5 and shifted by up to 0.2"
    figures = [
        Figure(f"change by relighting, {r['attention']}", r["relative change"], "relative L2", note) for r in light
    ]
    about = "2 x, 3 photographs held out, crops of 64 pixels"
    figures += [Figure(f"PSNR, {r['method']}", r["PSNR (dB)"], "dB", about) for r in larger]
    figures += [Figure(f"accuracy on digits, {n}", r.row["accuracy"], "", "599 digits held out, 3 seeds")
                for n, r in found.items()]  # fmt: skip
    record("essa", claim="relighting pixels leaves the attention as it is; the small network enlarges better than bicubic",
           figures=figures, table=larger,
           command="python benchmarks/real/essa.py", seed=0, folder=a.folder)  # fmt: skip
    for row in (*light, *larger):
        print(row)


if __name__ == "__main__":
    main()
