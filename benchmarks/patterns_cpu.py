"""Windows and block-sparse prefill on the CPU, beside torch's dense attention: one process, interleaved rounds.

    python benchmarks/patterns_cpu.py [--threads 1] [--rounds 7] [--quick] [--out benchmarks/results/patterns_cpu.json]

Every form is checked against dense attention under its own mask before it is timed. Selection is inside the total. `ms` is
the median of wall time, `cpu_ms` of the processor time of this process (the steadier of the two on a busy machine), ratios
are medians over rounds of (dense causal / ours). The bound is the share of score elements that ours computes against a
causal kernel, which is what a perfect kernel would gain.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import qkv
from qkv.bench.environment import environment, write_json
from qkv.core.attend import attend
from qkv.core.plan import BlockPlan
from qkv.patterns._common.execute import attend_plan, execute_plan
from qkv.testing import close

SEED = 0
Case = dict[str, Any]


def walk(n: int, heads: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v whose attention is local and returns to old places, so that selection has something to find."""
    rng = torch.Generator().manual_seed(SEED)
    q, k, v = (torch.randn(1, heads, n, d, generator=rng) for _ in range(3))
    path = torch.randn(1, heads, n, d, generator=rng).cumsum(2)
    trend = F.avg_pool1d(path.flatten(0, 1).mT, 1025, 1, 512, count_include_pad=False).mT.view_as(path)
    path = F.normalize(path - trend, dim=-1)
    return q + 12 * path, k + 12 * path, v


def random_plan(n: int, heads: int, block: int, density: float) -> BlockPlan:
    """A causal plan with first and diagonal block and random others, near the density."""
    rng = torch.Generator().manual_seed(SEED)
    size = n // block
    must = torch.eye(size, dtype=torch.bool) | (torch.arange(size) == 0)
    share = max(0.0, (density * size * (size + 1) / 2 - (2 * size - 1)) / ((size - 1) * (size - 2) / 2))
    kept = must | (torch.rand(1, heads, size, size, generator=rng) < share)
    return BlockPlan.from_blocks(kept, block=block, queries=n, keys=n, causal=True)


def check(got: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> float:
    """Largest error against dense attention under the mask in float64; raises when it is not rounding."""
    want = attend(q.double(), k.double(), v.double(), mask=mask).out
    close(got, want, rtol=1e-5, atol=1e-5)
    return float((got.double() - want).abs().max())


def cases(n: int, heads: int, d: int) -> tuple[dict[str, Callable[[], Any]], dict[str, Case]]:
    """What is timed by name, and what is known about each."""
    q, k, v = walk(n, heads, d)
    area = n * (n + 1) / 2
    run: dict[str, Callable[[], Any]] = {
        "dense causal": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    }
    known: dict[str, Case] = {"dense causal": {"share": 1.0}}
    for window, sinks in ((256, 4), (256, 0), (1024, 4)):
        method = qkv.method("sliding-window", window=window, sinks=sinks)
        mask = method.plan(q, k).to_mask()
        label = f"window {window} + {sinks} sinks"
        run[label] = lambda method=method: method.attention(q, k, v)
        known[label] = {"share": float(mask.sum()) / area, "error": check(run[label](), q, k, v, mask)}
        if (window, sinks) == (256, 4):
            run[f"{label}, dense mask"] = lambda mask=mask: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            known[f"{label}, dense mask"] = {"share": known[label]["share"]}
    for density in (0.1, 0.25, 0.5, 1.0):
        plan = random_plan(n, heads, 128, density)
        mask, label = plan.to_mask(), f"plan of 128-blocks at density {plan.density:.2f}"
        run[label] = lambda plan=plan: execute_plan(q, k, v, plan)
        known[label] = {"share": float(mask.double().sum((-2, -1)).mean()) / area, "density": plan.density,
                        "error": check(run[label](), q, k, v, mask)}  # fmt: skip
        if density == 0.25:
            run[f"{label}, with lse"] = lambda plan=plan: attend_plan(q, k, v, plan)
            known[f"{label}, with lse"] = {"share": known[label]["share"], "density": plan.density}
    for stride in (4, 8, 16):
        method = qkv.method("xattention", stride=stride)
        plan = method.plan(q, k)
        mask, label = plan.to_mask(), f"xattention, stride {stride}, threshold 0.9"
        run[label] = lambda method=method: method.attention(q, k, v)
        run[f"{label}: selection alone"] = lambda method=method: method.plan(q, k)
        share = float(mask.double().sum((-2, -1)).mean()) / area
        known[label] = {"share": share, "density": plan.density, "selection_gflop": plan.selection_flops / 1e9,
                        "error": check(run[label](), q, k, v, mask)}  # fmt: skip
        known[f"{label}: selection alone"] = {"selection_gflop": plan.selection_flops / 1e9}
    return run, known


def measure(run: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Wall and processor milliseconds of each, round by round, in an order that turns."""
    names, out = list(run), {name: {"wall": [], "cpu": []} for name in run}
    with torch.no_grad():
        for name in names:
            run[name]()
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                wall, cpu = time.perf_counter(), time.process_time()
                run[name]()
                out[name]["wall"].append((time.perf_counter() - wall) * 1e3)
                out[name]["cpu"].append((time.process_time() - cpu) * 1e3)
            print(f"round {turn + 1} of {rounds}", flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="N=1024")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/patterns_cpu.json"))
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    n, heads, d = (1024 if a.quick else 4096), 8, 64
    run, known = cases(n, heads, d)
    load = os.getloadavg()[0]
    times = measure(run, a.rounds)
    dense, rows = times["dense causal"], []
    for name, got in times.items():
        ratio = {kind: statistics.median(x / y for x, y in zip(dense[kind], got[kind], strict=True)) for kind in got}
        facts = known[name]
        bound = 1 / facts["share"] if facts.get("share") else None
        rows.append({
            "case": name, "ms": statistics.median(got["wall"]), "cpu_ms": statistics.median(got["cpu"]),
            "cpu_ms_least": min(got["cpu"]), "times_faster": ratio["wall"], "times_faster_cpu": ratio["cpu"],
            "bound": bound, **facts,
        })  # fmt: skip
        print(f"{name:55s} {rows[-1]['ms']:8.1f} ms  {rows[-1]['cpu_ms']:8.1f} cpu ms  {ratio['cpu']:6.2f} x"
              f"{'' if bound is None else f'  (bound {bound:.1f} x)'}")  # fmt: skip
    result = {"shape": {"B": 1, "H": heads, "N": n, "D": d, "dtype": "float32"}, "rounds": a.rounds,
              "load_average_before": load, "load_average_after": os.getloadavg()[0], "rows": rows,
              "environment": environment(seed=SEED)}  # fmt: skip
    write_json(a.out, result)


if __name__ == "__main__":
    main()
