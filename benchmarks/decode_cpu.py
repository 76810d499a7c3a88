"""Decoding on a CPU with a full cache and with smaller ones: one process, one model, steps taken in turn.

    python benchmarks/decode_cpu.py --out benchmarks/results/decode_cpu.json [--context 8192] [--steps 24] [-m METHOD ...]

Every method first absorbs the same prompt (chunks of 1024), then all decode the same tokens in turn, one token each per
round, in an order that changes every round; so a busy machine slows all alike. `ms` is the median over rounds, the ratio
the median of (full / method) within a round. The bound is the time that reading the weights and the full cache takes over
the time for the weights and what is held.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import qkv
from qkv.bench.assets import long_text, smollm2, text_tokens
from qkv.bench.environment import environment, write_json
from qkv.hosts.transformers import fresh_cache

METHODS = ("window:budget=0.25", "streamingllm:window=2044", "h2o:budget=0.25", "kivi:bits=4")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("-m", "--method", action="append", help="instead of the default ones; may be repeated")
    a = parser.parse_args()
    model, tokenizer = smollm2()
    ids = torch.as_tensor(text_tokens(tokenizer, a.context + a.steps, 0, long_text())).reshape(1, -1)
    names = ["full", *(a.method or METHODS)]
    caches: dict[str, Any] = {}
    held: dict[str, tuple[int, int]] = {}
    for name in names:
        with qkv.applied(model, name):
            cache = fresh_cache(model, a.context, room=0)
            for start in range(0, a.context, 1024):
                model(ids[:, start : start + 1024], past_key_values=cache, use_cache=True, logits_to_keep=1)
            report = qkv.report(model)
            held[name] = (report.bytes, report.full_bytes)
            caches[name] = [layer.memory for layer in cache.layers]
        print(f"{name}: {held[name][0] / 1e6:.1f} MB held", flush=True)
    times = rounds(model, ids, names, caches, a)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    rows = []
    for name in names:
        ratio = statistics.median(f / t for f, t in zip(times["full"], times[name], strict=True))
        bound = (weights + held["full"][0]) / (weights + held[name][0])
        rows.append(
            {
                "method": name,
                "ms": round(1e3 * statistics.median(times[name]), 2),
                "full_over_method": round(ratio, 3),
                "bound": round(bound, 3),
                "held_bytes": held[name][0],
                "share_of_full": round(held[name][0] / held[name][1], 4),
            }
        )
        print(rows[-1], flush=True)
    write_json(
        a.out, environment(seed=0) | {"context": a.context, "steps": a.steps, "weight_bytes": weights, "rows": rows}
    )


def rounds(
    model: Any, ids: torch.Tensor, names: list[str], caches: dict[str, Any], a: argparse.Namespace
) -> dict[str, list[float]]:
    """Seconds per step of every method; the first two rounds warm up and do not count."""
    times: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(0)
    for step in range(a.steps):
        piece = ids[:, a.context + step : a.context + step + 1]
        for name in order.sample(names, len(names)):
            with qkv.applied(model, name):
                cache = fresh_cache(model, a.context, room=0)
                for layer, memory in zip(cache.layers, caches[name], strict=True):
                    layer.memory = memory
                start = time.perf_counter()
                model(piece, past_key_values=cache, use_cache=True)
                times[name].append(time.perf_counter() - start)
    return {name: spans[2:] for name, spans in times.items()}


if __name__ == "__main__":
    main()
