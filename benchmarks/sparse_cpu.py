"""One decoding step of one layer on the CPU: reading a sixteenth of 8k tokens against reading all of them.

    python benchmarks/sparse_cpu.py --out benchmarks/results/sparse_cpu.json [--context 8192] [--steps 40]

One thread; medians of processor time (a machine that is shared does not count others' work) and of wall time. Everything is
inside: storing the token, its index, scoring, choosing, gathering, attending.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

import qkv
from qkv.bench.environment import environment, write_json
from qkv.caches._stores.dense import DenseCache
from qkv.core.cache import Geometry, LayerCache, Step

SHAPES = {"SmolLM2-135M": (9, 3, 64), "8B": (32, 8, 128)}


def a_step(memory: LayerCache, h: int, g: int, m: int, d: int, steps: int) -> tuple[float, float]:
    """(processor, wall) milliseconds of a step after a prompt of m tokens, medians."""
    torch.manual_seed(0)
    memory.reserve(m + steps + 1)
    q, k, v = (torch.randn(1, n, m, d) for n in (h, g, g))
    memory.attend(q, k, v, Step(torch.arange(m, dtype=torch.int32)[None], d**-0.5, compute=lambda q, k, v, **_: q))
    busy, wall = [], []
    for i in range(steps):
        q, k, v = (torch.randn(1, n, 1, d) for n in (h, g, g))
        step = Step(torch.full((1, 1), m + i, dtype=torch.int32), d**-0.5)
        a, b = time.thread_time(), time.perf_counter()
        memory.attend(q, k, v, step)
        busy.append(time.thread_time() - a)
        wall.append(time.perf_counter() - b)
    return statistics.median(busy) * 1e3, statistics.median(wall) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=40)
    a = parser.parse_args()
    torch.set_num_threads(1)
    rows, k = [], a.context // 16
    for shape, (h, g, d) in SHAPES.items():
        geometry = Geometry(h, g, d, d, layer=5, layers=30)
        names = ["full", f"quest:budget={k}", f"recycled:budget={k}", f"double-sparsity:budget={k}"]
        full = 0.0
        with torch.no_grad():
            for name in names:
                memory = DenseCache(geometry) if name == "full" else qkv.method(name).layer(geometry)  # type: ignore[attr-defined]
                busy, wall = a_step(memory, h, g, a.context, d, a.steps)
                full = full or busy
                rows.append(
                    {
                        "shape": shape,
                        "context": a.context,
                        "method": name,
                        "cpu_ms": busy,
                        "wall_ms": wall,
                        "ratio": full / busy,
                    }
                )
                print(rows[-1], flush=True)
    if a.out is not None:
        write_json(a.out, environment(seed=0) | {"rows": rows})


if __name__ == "__main__":
    main()
