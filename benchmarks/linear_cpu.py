"""Linear attention on a CPU beside softmax attention: training at 8k tokens, decoding after 64k.

    python benchmarks/linear_cpu.py --out benchmarks/results/linear_cpu.json [--tokens 8192] [--context 65536] [--rounds 5]

One process, one thread, float32. All methods take turns, in an order that changes every round, so a busy machine slows all
alike; the time is the median over rounds, the ratio the median of (softmax / method) within a round. Softmax attention is
PyTorch's fused causal kernel; decoding reads a KV cache that is already there. The bound of a ratio is that of operations
(training) or bytes (decoding). Before anything is timed, every form is compared with float64 on a shorter sequence.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, scaled_dot_product_attention

import qkv
from qkv.bench.environment import environment, write_json
from qkv.core.operator import Operator
from qkv.ops._common.decayed import decayed_linear_attention

GATES = {"linear, no decay": None, "gla, one decay per head and token": 0, "gla, one decay per channel": 1}


def gate(kind: int | None, b: int, h: int, n: int, d: int) -> Tensor | None:
    """Log-decays as a layer would make them, or None."""
    return None if kind is None else logsigmoid(torch.randn((b, h, n, d) if kind else (b, h, n))) / 16


def compare() -> dict[str, float]:
    """Relative error of outputs in float32 against the recurrence in float64, 1024 tokens, by method."""
    errors = {}
    for name, kind in GATES.items():
        q, k, v = (torch.randn(1, 2, 1024, 64) for _ in range(3))
        log = gate(kind, 1, 2, 1024, 64)
        got = decayed_linear_attention(q, k, v, log_decay=log).out
        wide = None if log is None else log.double()
        want = decayed_linear_attention(q.double(), k.double(), v.double(), log_decay=wide, form="recurrent").out
        errors[name] = ((got.double() - want).norm() / want.norm()).item()
    assert all(error < 1e-5 for error in errors.values()), errors
    return errors


def rounds(runs: dict[str, Callable[[], Any]], count: int, base: str) -> dict[str, dict[str, float]]:
    """Median milliseconds and median ratio to `base` by name; the first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0)
    for number in range(count + 1):
        shuffle.shuffle(order)
        for name in order:
            begun = time.perf_counter()
            runs[name]()
            if number:
                times[name].append((time.perf_counter() - begun) * 1e3)
    rows = {}
    for name, spent in times.items():
        ratio = statistics.median(x / y for x, y in zip(times[base], spent, strict=True))
        rows[name] = {"ms": statistics.median(spent), "fastest_ms": min(spent), "ratio": ratio}
        print(f"{name:<40}{rows[name]['ms']:10.3f} ms {ratio:8.1f}x", flush=True)
    return rows


def training(heads: int, tokens: int, width: int, count: int) -> dict[str, Any]:
    """Forward and backward of one attention, gradients of gates included."""
    q, k, v = (torch.randn(1, heads, tokens, width, requires_grad=True) for _ in range(3))
    grad = torch.randn(1, heads, tokens, width)
    runs: dict[str, Callable[[], Any]] = {
        "softmax": lambda: torch.autograd.grad(scaled_dot_product_attention(q, k, v, is_causal=True), [q, k, v], grad)
    }
    for name, kind in GATES.items():
        log = gate(kind, 1, heads, tokens, width)
        method, extras = ("linear", {}) if log is None else ("gla", {"log_decay": log.requires_grad_()})

        def run(method: str = method, extras: dict[str, Tensor] = extras) -> Any:
            return torch.autograd.grad(
                qkv.attention(q, k, v, method=method, **extras), [q, k, v, *extras.values()], grad
            )

        runs[name] = run
    chunk = 64
    bound = tokens / (2 * chunk / 2 + 2 * width)  # multiply-adds a token: N D against C D + 2 D^2, halved where causal
    return {"sizes": [1, heads, tokens, width], "bound": bound, "rows": rounds(runs, count, "softmax")}


@torch.no_grad()
def decoding(heads: int, context: int, width: int, count: int) -> dict[str, Any]:
    """One token after `context` tokens: the whole KV cache against a state."""
    keys, values = (torch.randn(1, heads, context, width) for _ in range(2))
    q, k, v = (torch.randn(1, heads, 1, width) for _ in range(3))
    held: dict[str, int] = {"softmax": 2 * keys.numel() * keys.element_size()}
    runs: dict[str, Callable[[], Any]] = {"softmax": lambda: scaled_dot_product_attention(q, keys, values)}
    for name, kind in GATES.items():
        log = gate(kind, 1, heads, 1, width)
        extras = {} if log is None else {"log_decay": log}
        method = qkv.method("gla" if extras else "linear")
        assert isinstance(method, Operator)
        state = method.initial(q, k, v, **extras)
        held[name] = state.bytes
        runs[name] = lambda m=method, s=state, x=extras: m.step(q, k, v, s, **x)
    rows = rounds(runs, count, "softmax")
    for name, size in held.items():
        rows[name]["bytes_held"] = size
    bound = held["softmax"] / (2 * held["linear, no decay"])  # a state is read and written
    return {"sizes": [1, heads, context, width], "bound": bound, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--context", type=int, default=65536)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    a = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    facts: dict[str, Any] = environment(seed=0) | {"errors": compare()}
    print(f"forward and backward, {a.tokens} tokens", flush=True)
    facts["training"] = training(a.heads, a.tokens, a.width, a.rounds)
    print(f"one token after {a.context}", flush=True)
    facts["decoding"] = decoding(a.heads, a.context, a.width, 10 * a.rounds)
    a.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(a.out, facts)


if __name__ == "__main__":
    main()
