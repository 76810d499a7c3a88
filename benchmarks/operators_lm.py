"""Causal operators in one small language model: loss on real text, speed, bytes of decoding, and recall against the state.

    python benchmarks/operators_lm.py --out benchmarks/results/operators_lm.json [--operators gla full ...] [--seeds 3]
        [--steps 400] [--recall-steps 800] [--tasks text recall] [--budget-seconds 270] [--device cuda] [--quick]

Every model has the same layers but for the operator, the same number of parameters (what an operator learns beside queries, keys
and values, the gated layers give), the same steps, batches and learning rate; no setting is tuned. `text`: a byte model on plays,
its loss on a play held out, at the training length and at four times it; tokens per second of training; bytes and milliseconds
of decoding one row. `recall`: accuracy of multi-query associative recall at several sizes of the state (the key width of a head,
or the window). On CUDA a whole training step is captured and replayed; a row says where that was not possible.

Seeds are the outer loop, so an early end leaves whole tables of fewer seeds; the file is rewritten after every run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _sweep import Run, sweep

import qkv
from qkv.bench.fitting import fit
from qkv.bench.texts import held_out, pairs, random_windows, text_bytes
from qkv.core.errors import Refused
from qkv.layers._mixer import check_mixing
from qkv.models.language.causal import CausalConfig, CausalLM

ROWS, LENGTH, LAYERS = 64, 256, 2
TEXT = {"width": 128, "heads": 4}
TEXT_PARAMETERS = 450_000
RECALL = {"width": 64, "heads": 2}
RECALL_PARAMETERS = 150_000
PAIRS, RECALL_LENGTH, RECALL_ROWS = 16, 128, 128
DECODE_AFTER = 1024
SPEEDS: dict[str, Callable[[list[Any]], Any]] = {
    "tokens per second": max,
    "decode ms per token": min,
    "ms per step": min,
}
"""Of several seeds on the device of the first the fastest counts: others may have run beside them."""


@dataclass(frozen=True)
class Choice:
    """A model to compare: settings cycled over the layers, and what varies its state for recall."""

    settings: tuple[str, ...]
    dial: tuple[Mapping[str, Any], ...] = ({"key_width": 8}, {"key_width": 32})
    text: Mapping[str, Any] = field(default_factory=dict)


def windows(*sizes: int) -> tuple[Mapping[str, Any], ...]:
    """Dials of a sliding window."""
    return tuple({"settings": (f"sliding-window:window={n},sinks=0",)} for n in sizes)


CHOICES: dict[str, Choice] = {
    "softmax": Choice(("full",), dial=({"key_width": 32},)),
    "window": Choice(("sliding-window:window=64,sinks=0",), dial=windows(8, 32)),
    "yaad": Choice(("miras",)),
    "moneta": Choice(("miras:loss=lp,retention=norm",)),
    "memora": Choice(("miras:loss=l2,retention=softmax",)),
    "based": Choice(("based",), dial=({"key_width": 4}, {"key_width": 16})),
    "longvq": Choice(("longvq:block_size=16,straight_through=true",), dial=({"key_width": 32},)),
    "based + window": Choice(
        ("based", "sliding-window:window=64,sinks=0"),
        dial=({"key_width": 16, "settings": ("based", "sliding-window:window=8,sinks=0")},),
    ),
    "gla + softmax": Choice(("gla", "full"), dial=({"key_width": 32},)),
    "based + base-conv": Choice(("base-conv", "based"), dial=({"key_width": 16},)),
}
UNLISTED = ("full", "miras")  # they stand above under other names


def choices() -> dict[str, Choice]:
    """The named ones, and every other operator that a causal model takes with its default settings."""
    out = dict(CHOICES)
    for spec in qkv.methods(kind="operator"):
        if spec.id in out or spec.id in UNLISTED:
            continue
        try:
            check_mixing(qkv.method(spec.id), causal=True)
        except Refused:
            continue
        out[spec.id] = Choice((spec.id,))
    return out


def config(choice: Choice, parameters: int, sizes: Mapping[str, int], vocabulary: int, **changes: Any) -> CausalConfig:
    """A model of `choice` with about `parameters` parameters."""
    settings = changes.pop("settings", choice.settings)
    operators = tuple(settings[i % len(settings)] for i in range(LAYERS))
    return CausalConfig(operators=operators, vocabulary=vocabulary, **sizes, **changes).fitted(parameters)


def text_run(choice: Choice, seed: int, a: argparse.Namespace, data: Callable[[], tuple[Any, Any]]) -> dict[str, Any]:
    """Train a byte model, return its row."""
    rows, length, steps = (4, 32, 4) if a.quick else (ROWS, LENGTH, a.steps)
    train, held = data()
    model = CausalLM(config(choice, TEXT_PARAMETERS, TEXT, 256, **choice.text), seed).to(a.device)
    rng = torch.Generator(a.device).manual_seed(seed)
    done = fit(
        model, model.loss, lambda i: random_windows(train, rows, length, rng), steps, capture=not a.eager, bf16=a.bf16
    )
    few = (2, 1) if a.quick else (128, 32)

    def logits(ids: torch.Tensor) -> torch.Tensor:
        return model(ids).logits

    row = {
        "loss": held_out(logits, held, length, few[0]),
        "loss at 4 x length": held_out(logits, held, 4 * length, few[1]),
    }
    row |= {
        "tokens per second": round(rows * length / done.seconds),
        "captured": done.captured,
        "not captured": done.reason,
    }
    row |= {"parameters": sum(p.numel() for p in model.parameters()), "last training loss": done.loss}
    return row | (decoding(model, held, 64 if a.quick else DECODE_AFTER) if seed == 0 else {})


@torch.no_grad()
def decoding(model: CausalLM, held: torch.Tensor, after: int, steps: int = 16) -> dict[str, Any]:
    """Bytes that one row holds after `after` tokens, and milliseconds of a token then (not captured)."""
    state = model(held[None, :after], keep=True).state
    assert state is not None
    size, times = state.bytes, []
    for i in range(steps):
        begun = time.perf_counter()
        out = model(held[None, after + i : after + i + 1], state=state, keep=True)
        state = out.state
        out.logits.sum().item()
        times.append(time.perf_counter() - begun)
    return {"decode bytes": size, "decode ms per token": 1e3 * statistics.median(times)}


def recall_run(choice: Choice, dial: Mapping[str, Any], seed: int, a: argparse.Namespace) -> dict[str, Any]:
    """Train on recall with one size of the state, return its row."""
    steps, rows = (4, 8) if a.quick else (a.recall_steps, RECALL_ROWS)
    vocabulary = 4 * PAIRS + 2
    model = CausalLM(config(choice, RECALL_PARAMETERS, RECALL, vocabulary, **dial), seed).to(a.device)
    rng = torch.Generator(a.device).manual_seed(seed)
    done = fit(model, model.loss, lambda i: pairs(rows, PAIRS, RECALL_LENGTH, vocabulary, rng), steps, rate=3e-3,
               capture=not a.eager, bf16=a.bf16)  # fmt: skip
    fresh = torch.Generator(a.device).manual_seed(seed + 10_000)
    with torch.no_grad():
        ids, target = pairs(4 * rows, PAIRS, RECALL_LENGTH, vocabulary, fresh)
        right = (model(ids).logits.argmax(-1) == target)[target >= 0].float().mean().item()
        state = model(ids[:1], keep=True).state
    assert state is not None
    return {"accuracy": right, "state bytes": state.bytes, "parameters": sum(p.numel() for p in model.parameters()),
            "ms per step": 1e3 * done.seconds, "captured": done.captured, "not captured": done.reason}  # fmt: skip


def summary(runs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Mean and standard deviation over seeds, by task, name and dial."""
    out: dict[str, list[dict[str, Any]]] = {}
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["task"], run["operator"], str(run.get("dial", ""))), []).append(run)
    for (task, name, dial), rows in groups.items():
        row: dict[str, Any] = {"operator": name, "seeds": len(rows)} | ({"dial": dial} if dial else {})
        row |= {"device": rows[0]["device"]} if "device" in rows[0] else {}
        for key, first in rows[0].items():
            values = [r[key] for r in rows if key in r]
            if isinstance(first, bool):
                row[key] = all(values)
            elif key in SPEEDS:
                row[key] = SPEEDS[key]([r[key] for r in rows if key in r and r.get("device") == rows[0].get("device")])
            elif isinstance(first, float):
                row[key] = statistics.fmean(values)
                if len(values) > 1 and key in ("loss", "loss at 4 x length", "accuracy"):
                    row[f"{key}, deviation"] = statistics.stdev(values)
            elif isinstance(first, int) and key != "seed":
                row[key] = round(statistics.fmean(values))
        out.setdefault(task, []).append(row)
    for task, key, sign in (("text", "loss", 1), ("recall", "accuracy", -1)):
        out.get(task, []).sort(key=lambda r: sign * r[key])
    return out


def run_all(a: argparse.Namespace, named: Mapping[str, Choice]) -> dict[str, Any]:
    """Every model of every seed, as far as the budget reaches."""
    cache: list[Any] = []

    def data() -> tuple[Any, Any]:
        cache[:] = cache or [text_bytes(a.device)]
        return cache[0]

    def jobs() -> Iterator[tuple[dict[str, Any], Hashable, Run]]:
        for seed in range(a.seeds):
            for name, choice in named.items() if "text" in a.tasks else ():
                job = {"seed": seed, "task": "text", "operator": name}
                yield job, ("text", name), partial(text_run, choice, seed, a, data)
            for name, choice in named.items() if "recall" in a.tasks else ():
                for dial in choice.dial:
                    job = {"seed": seed, "task": "recall", "operator": name, "dial": dict(dial)}
                    yield job, ("recall", name), partial(recall_run, choice, dial, seed, a)

    settings = {k: v for k, v in vars(a).items() if k not in ("out", "operators")}
    settings |= {"text parameters": TEXT_PARAMETERS, "recall parameters": RECALL_PARAMETERS, "pairs": PAIRS, "rows": ROWS,
                 "length": LENGTH, "layers": LAYERS, "operators": {n: list(c.settings) for n, c in named.items()}}  # fmt: skip
    return sweep(jobs(), settings, summary, a.out, a.budget_seconds, a.earlier)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/operators_lm.json"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--operators", nargs="*", help="names; see --list", default=None)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--tasks", nargs="*", choices=("text", "recall"), default=["text", "recall"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400, help="of the byte model")
    parser.add_argument("--recall-steps", type=int, default=800)
    parser.add_argument("--earlier", type=Path, nargs="*", default=[], help="files of this comparison whose runs count")
    parser.add_argument("--budget-seconds", type=float, default=270.0)
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16 autocast instead of float32")
    parser.add_argument("--eager", action="store_true", help="capture nothing")
    parser.add_argument("--quick", action="store_true", help="a few steps on tiny batches, for a look")
    a = parser.parse_args()
    named = choices()
    if a.list:
        for name, choice in named.items():
            print(f"{name}: {', '.join(choice.settings)}")
        return
    unknown = [n for n in a.operators or () if n not in named]
    if unknown:
        raise SystemExit(f"no operators {', '.join(unknown)}; there are {', '.join(named)}")
    torch.set_float32_matmul_precision("high")
    out = run_all(a, named if a.operators is None else {n: named[n] for n in a.operators})
    for task, rows in out["summary"].items():
        print(f"\n{task}")
        for row in rows:
            print(
                "  "
                + "  ".join(
                    f"{k} {round(v, 4) if isinstance(v, float) else v}" for k, v in row.items() if k != "not captured"
                )
            )
    print(
        f"\n{len(out['runs'])} runs, {len(out['left out'])} left out, {len(out['failed'])} failed, {out['seconds']:.0f} s"
    )


if __name__ == "__main__":
    main()
