"""Bidirectional operators in one small vision transformer, beside softmax: accuracy on digits and on photographs of clothes.

    python benchmarks/operators_vit.py --out benchmarks/results/operators_vit.json [--operators full agent ...] [--seeds 3]
        [--data digits fashion-mnist] [--steps 400] [--budget-seconds 190] [--device cuda] [--quick]

Every model has the same layers but for the operator, the same number of parameters (what an operator learns beside queries, keys
and values, the gated layers give), the same steps, batches and learning rate; no setting is tuned. Columns: share of held-out
images that are right, held-out loss, images per second of training. On CUDA a whole training step is captured and replayed; a row
says where that was not possible. Seeds are the outer loop; the file is rewritten after every run.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _sweep import sweep

import qkv
from qkv.bench.fitting import fit
from qkv.bench.images import Images, images
from qkv.core.errors import Refused
from qkv.layers._mixer import check_mixing
from qkv.models.vision.vit import ViT, ViTConfig

LAYERS = 4
SIZES: dict[str, dict[str, Any]] = {
    "digits": {"size": (8, 8), "patch": 1, "width": 64, "heads": 4},  # 64 tokens
    "fashion-mnist": {"size": (28, 28), "patch": 2, "width": 128, "heads": 4},  # 196 tokens
}
PARAMETERS = {"digits": 220_000, "fashion-mnist": 850_000}
ROWS = {"digits": 128, "fashion-mnist": 128}
NAMED: dict[str, tuple[str, ...]] = {
    "softmax": ("full",),
    "window": ("sliding-window:window=8,sinks=0",),
    "three flow, one softmax": ("flow", "flow", "flow", "full"),
}
UNLISTED = ("full",)


def choices() -> dict[str, tuple[str, ...]]:
    """The named ones, and every other operator that a bidirectional model takes with its default settings."""
    out = dict(NAMED)
    for spec in qkv.methods(kind="operator"):
        if spec.id in out or spec.id in UNLISTED:
            continue
        try:
            check_mixing(qkv.method(spec.id), causal=False)
        except Refused:
            continue
        out[spec.id] = (spec.id,)
    return out


def run(settings: tuple[str, ...], name: str, seed: int, a: argparse.Namespace, data: Images) -> dict[str, Any]:
    """Train one model, return its row."""
    rows, steps = (8, 4) if a.quick else (ROWS[name], a.steps)
    operators = tuple(settings[i % len(settings)] for i in range(LAYERS))
    model = ViT(ViTConfig(operators=operators, **SIZES[name]).fitted(PARAMETERS[name]), seed).to(a.device)
    rng = torch.Generator(a.device).manual_seed(seed)

    def batch(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        at = torch.randint(len(data.train), (rows,), generator=rng, device=a.device)
        return data.train[at], data.train_labels[at]

    done = fit(model, model.loss, batch, steps, rate=a.rate, capture=not a.eager, bf16=a.bf16)
    held, labels = (x[:64] if a.quick else x for x in (data.held, data.held_labels))
    with torch.no_grad():
        logits = torch.cat([model(x) for x in held.split(500)])
    right = (logits.argmax(-1) == labels).float().mean().item()
    return {"accuracy": right, "loss": F.cross_entropy(logits.float(), labels).item(), "last training loss": done.loss,
            "images per second": round(rows / done.seconds), "captured": done.captured, "not captured": done.reason,
            "parameters": sum(p.numel() for p in model.parameters())}  # fmt: skip


def summary(runs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Mean and deviation over seeds, by data set and name; best first. Speeds are of one device: that of the first run."""
    device = runs[0].get("device") if runs else None
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in runs:
        groups.setdefault((one["data"], one["operator"]), []).append(one)
    out: dict[str, list[dict[str, Any]]] = {}
    for (data, name), rows in groups.items():
        row: dict[str, Any] = {"operator": name, "seeds": len(rows)}
        for key in ("accuracy", "loss", "parameters"):
            row[key] = statistics.fmean(r[key] for r in rows)
        speeds = [r["images per second"] for r in rows if r.get("device") == device]
        row["images per second"] = statistics.fmean(speeds) if speeds else None
        row["accuracy, deviation"] = statistics.stdev(r["accuracy"] for r in rows) if len(rows) > 1 else None
        row["captured"] = all(r["captured"] for r in rows)
        out.setdefault(data, []).append(row)
    for rows in out.values():
        rows.sort(key=lambda r: -r["accuracy"])
    return out


def run_all(a: argparse.Namespace, named: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """Every model of every seed, as far as the budget reaches."""
    data = {name: Images(*(x.to(a.device) for x in images(name))) for name in a.data}
    settings = {k: v for k, v in vars(a).items() if k not in ("out", "operators")}
    settings |= {"layers": LAYERS, "sizes": SIZES, "parameters": PARAMETERS, "rows": ROWS,
                 "operators": {n: list(s) for n, s in named.items()}}  # fmt: skip
    jobs = (
        (
            {"seed": seed, "data": name, "operator": operator},
            (name, operator),
            partial(run, named[operator], name, seed, a, data[name]),
        )
        for seed in range(a.seeds)
        for name in a.data
        for operator in named
    )
    return sweep(jobs, settings, summary, a.out, a.budget_seconds, a.earlier)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/operators_vit.json"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--operators", nargs="*", help="names; see --list", default=None)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--data", nargs="*", choices=tuple(SIZES), default=list(SIZES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--earlier", type=Path, nargs="*", default=[], help="files of this comparison whose runs count")
    parser.add_argument("--budget-seconds", type=float, default=190.0)
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16 autocast instead of float32")
    parser.add_argument("--eager", action="store_true", help="capture nothing")
    parser.add_argument("--quick", action="store_true", help="a few steps on tiny batches, for a look")
    a = parser.parse_args()
    named = choices()
    if a.list:
        for name, settings in named.items():
            print(f"{name}: {', '.join(settings)}")
        return
    unknown = [n for n in a.operators or () if n not in named]
    if unknown:
        raise SystemExit(f"no operators {', '.join(unknown)}; there are {', '.join(named)}")
    torch.set_float32_matmul_precision("high")
    out = run_all(a, named if a.operators is None else {n: named[n] for n in a.operators})
    for data, rows in out["summary"].items():
        print(f"\n{data}")
        for row in rows:
            print("  " + "  ".join(f"{k} {round(v, 4) if isinstance(v, float) else v}" for k, v in row.items()))
    print(
        f"\n{len(out['runs'])} runs, {len(out['left out'])} left out, {len(out['failed'])} failed, {out['seconds']:.0f} s"
    )


if __name__ == "__main__":
    main()
