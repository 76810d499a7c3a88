"""Kernelised attention with relative positions on real images: what the biases and the normalisation are worth, and its time.

python benchmarks/real/kernelized_rpe.py [--device cuda]

No model has learnt positions here but those of the patches' table, which all have. Time: one bidirectional call forward, the map
written out against FFT products and against windows with prefix sums (biases constant beyond 64 tokens).
"""

from __future__ import annotations

import math
import time
import warnings
from typing import Any

import torch
from _vision import Choice, arguments, compare, digits, fashion

import qkv
from qkv.bench.record import Figure, record
from qkv.ops.kernelized_rpe import orthogonal_features

ID = "kernelized-rpe"


def seconds(n: int, settings: str, form: str, device: str, repeats: int) -> float:
    """Median seconds of one call on n tokens, 2 heads of 32, 64 features."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 32, device=device) for _ in range(3))
    extras = {
        "projection": orthogonal_features(64, 32).float().to(device),
        "bias": torch.randn(2, 2 * n - 1, device=device),
    }
    times = []
    with torch.no_grad():
        for _ in range(repeats + 1):
            start = time.perf_counter()
            qkv.attention(q, k, v, method=f"{ID}:{settings}", causal=False, form=form, **extras)
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]


def no_bias(net: Any) -> None:
    """Relative biases that stay 0."""
    for block in net.blocks:
        block.mixer.learnt["bias"].raw.requires_grad_(False)


def main() -> None:
    """Train, time, record."""
    a = arguments(__doc__)
    warnings.filterwarnings("ignore", message=f"{ID}: without normalize_qk")  # that is what one of them shows
    choices = [
        Choice("softmax", "full"),
        Choice("normalised, with biases", ID),
        Choice("normalised, without biases", ID, prepare=no_bias),
        Choice("not normalised, with biases", f"{ID}:normalize_qk=false"),
    ]
    results = {d.name: (d, compare(choices, d, a, steps=300)) for d in (digits(a.device), fashion(a.device))}
    table, figures = [r.row for _, found in results.values() for r in found.values()], []
    for name, (data, found) in results.items():
        note = f"{data.tokens} tokens, 3 seeds, equal parameters and steps"
        figures += [Figure(f"accuracy, {name}, {n}", r.row["accuracy"], "", note) for n, r in found.items()]
        figures += [
            Figure(f"loss, {name}, {n}", r.row["loss (nats/image)"], "nats/image", note)
            for n, r in found.items()
            if math.isfinite(r.row["loss (nats/image)"])
        ]
    ways = {"FFT": ("", "fast"), "windows": ("max_distance=64,method=windowed", "fast"), "map": ("", "reference")}
    for n in (256, 512) if a.quick else (1024, 4096, 16384):
        for way, (settings, form) in ways.items():
            if way == "map" and n > 8192:
                continue
            took = seconds(n, settings or "beyond=refuse", form, a.device, 3 if a.quick else 7)
            figures.append(
                Figure(f"time at {n} tokens, {way}", round(1e3 * took, 3), "ms", "2 heads of 32, 64 features, float32")
            )
    record(ID, claim="relative biases lower the loss of normalised kernel attention; without normalisation it trains worse",
           figures=figures, table=table, command="python benchmarks/real/kernelized_rpe.py", seed=0, folder=a.folder)  # fmt: skip
    for figure in figures:
        print(figure.name, figure.value)


if __name__ == "__main__":
    main()
