"""Pass keys found with a quarter of the cache: qkv's methods beside kvpress's presses, same model, same prompts, same order.

    python benchmarks/needles.py prompts --out runs/needles/prompts.json [--contexts 1024,2048,4096] [--trials 2]
    python benchmarks/needles.py ours --prompts runs/needles/prompts.json --out runs/needles/ours.json
    python benchmarks/needles.py kvpress --prompts ... --model FOLDER --out runs/needles/kvpress.json
    python benchmarks/needles.py table runs/needles/ours.json runs/needles/kvpress.json --out benchmarks/results/needles.json

kvpress pins an older transformers, so its part runs in an environment of its own (kvpress 0.5, transformers < 5.3) and
imports nothing of qkv; FOLDER is the model as safetensors, the same weights. Both sides compress after the haystack,
before the question is seen (query-agnostic), keep a quarter, and decode greedily. `held` is the bytes that the cache's
tensors occupy when the question comes, as a share of a plain cache of the same tokens.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

KEEP = 0.25
OURS = (
    "full",
    *(f"{id}:budget=0.25" for id in ("window", "knorm", "tova", "snapkv", "pyramidkv", "h2o", "adakv", "kvcrush")),
    "knorm:budget=0.25,decode=grow",
)
ANSWER = 10


def prompts(a: argparse.Namespace) -> None:
    """The pass-key cases of the benchmark as token ids."""
    from qkv.bench.assets import smollm2
    from qkv.bench.tasks._task import Bench, Settings
    from qkv.bench.tasks.passkey import cases

    model, tokenizer = smollm2()
    settings = Settings(depths=tuple(float(x) for x in a.depths.split(",")), trials=a.trials, seed=a.seed)
    contexts = tuple(int(x) for x in a.contexts.split(","))
    bench = Bench(model, tokenizer, "", settings, contexts)
    found = [
        {"context": n, "depth": c.depth, "key": c.key, "haystack": c.haystack.tolist(), "question": c.question.tolist()}
        for n in contexts
        for c in cases(bench, n)
    ]
    write(a.out, {"seed": a.seed, "prompts": found})
    print(f"{len(found)} prompts")


def ask(model: Any, cache: Any, start: int, question: list[int], plain: bool) -> list[int]:
    """Greedy answer. plain: positions are passed, since a pressed cache is shorter than the text."""
    ids, out = torch.tensor([question], device=model.device), []
    at = start
    for _ in range(ANSWER):
        more = {"position_ids": torch.arange(at, at + ids.shape[1], device=model.device)[None]} if plain else {}
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **more).logits
        at += ids.shape[1]
        ids = logits[:, -1].argmax(-1, keepdim=True)
        out.append(int(ids))
    return out


def measured(name: str, cases: list[dict], go: Callable[[dict], tuple[list[int], float]], decode: Callable) -> dict:
    """One row: what was found, and the share of bytes held."""
    t0, found, held = time.perf_counter(), [], []
    for case in cases:
        tokens, share = go(case)
        first = re.search(r"\d+", decode(tokens))
        found.append(
            {"context": case["context"], "depth": case["depth"], "right": bool(first) and first.group() == case["key"]}
        )
        held.append(share)
    row = {
        "method": name,
        "accuracy": sum(f["right"] for f in found) / len(found),
        "held": sum(held) / len(held),
        "cells": found,
    }
    print(f"{name:34} {row['accuracy']:.3f} held {row['held']:.3f}  {time.perf_counter() - t0:.0f} s", flush=True)
    return row


@torch.no_grad()
def ours(a: argparse.Namespace) -> None:
    """qkv's methods."""
    import qkv
    from qkv.bench.assets import smollm2
    from qkv.bench.environment import environment
    from qkv.hosts.transformers import fresh_cache

    model, tokenizer = smollm2(device=a.device)
    data = json.loads(a.prompts.read_text())

    def go(case: dict) -> tuple[list[int], float]:
        n = len(case["haystack"])
        cache = fresh_cache(model, n)
        model(
            input_ids=torch.tensor([case["haystack"]], device=model.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        report = qkv.report(model)
        return ask(model, cache, n, case["question"], False), report.bytes / report.full_bytes

    rows = []
    for name in a.method or OURS:
        with qkv.applied(model, name):
            rows.append(measured(name, data["prompts"], go, tokenizer.decode))
        write(a.out, environment(seed=data["seed"]) | {"rows": rows})


def presses() -> Iterator[tuple[str, Any, str]]:
    """(name, press, attention implementation) of the presses that our methods compare with."""
    import kvpress as kp

    drop = 1 - KEEP
    yield "kvpress StreamingLLM", kp.StreamingLLMPress(compression_ratio=drop), "sdpa"
    yield "kvpress Knorm", kp.KnormPress(compression_ratio=drop), "sdpa"
    yield "kvpress TOVA", kp.TOVAPress(compression_ratio=drop), "sdpa"
    yield "kvpress SnapKV", kp.SnapKVPress(compression_ratio=drop), "sdpa"
    yield "kvpress PyramidKV", kp.PyramidKVPress(compression_ratio=drop), "sdpa"
    yield "kvpress KeyDiff", kp.KeyDiffPress(compression_ratio=drop), "sdpa"
    yield "kvpress ExpectedAttention", kp.ExpectedAttentionPress(compression_ratio=drop), "sdpa"
    yield "kvpress AdaKV(SnapKV)", kp.AdaKVPress(kp.SnapKVPress(compression_ratio=drop)), "sdpa"
    yield "kvpress ObservedAttention", kp.ObservedAttentionPress(compression_ratio=drop), "eager"


@torch.no_grad()
def theirs(a: argparse.Namespace) -> None:
    """kvpress's presses, as its pipeline runs them."""
    absent = [n for n in ("datasets", "fire", "requests", "pandas", "peft") if find_spec(n) is None]
    for name in absent:  # libraries of its evaluation, which its presses do not use
        sys.modules[name] = stub = ModuleType(name)
        stub.__spec__ = ModuleSpec(name, None)
        stub.load_dataset = None  # type: ignore[attr-defined]
    import kvpress  # noqa: F401

    for name in absent:
        del sys.modules[name]
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

    tokenizer = AutoTokenizer.from_pretrained(a.model)
    data = json.loads(a.prompts.read_text())
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    rows = []
    for name, press, kind in presses():
        if a.method and name not in a.method:
            continue
        model = (
            AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32, attn_implementation=kind)
            .to(a.device)
            .eval()
        )
        weight = model.config.num_key_value_heads * model.config.head_dim * 2 * 4 * model.config.num_hidden_layers

        def go(case: dict, model=model, press=press, weight=weight) -> tuple[list[int], float]:
            cache, n = DynamicCache(), len(case["haystack"])
            with press(model):
                model.model(input_ids=torch.tensor([case["haystack"]], device=model.device), past_key_values=cache)
            held = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
            return ask(model, cache, n, case["question"], True), held / (n * weight)

        rows.append(measured(name, data["prompts"], go, tokenizer.decode))
        write(a.out, {"versions": versions, "rows": rows})


def table(a: argparse.Namespace) -> None:
    """Both sides in one file, best first."""
    parts = [json.loads(p.read_text()) for p in a.parts]
    rows = sorted((r for p in parts for r in p["rows"]), key=lambda r: -r["accuracy"])
    peers = [p.get("versions") for p in parts if "machine" not in p]
    about = {k: v for k, v in parts[0].items() if k != "rows"}
    about["peers"] = [x for i, x in enumerate(peers) if x not in peers[:i]]
    write(a.out, about | {"keep": KEEP, "rows": rows})
    for r in rows:
        print(f"{r['method']:34} {r['accuracy']:.3f} held {r['held']:.3f}")


def write(path: Path, data: dict) -> None:
    """JSON, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(required=True)
    for name, run in (("prompts", prompts), ("ours", ours), ("kvpress", theirs), ("table", table)):
        p = parts.add_parser(name)
        p.set_defaults(run=run)
        p.add_argument("--out", type=Path, required=True)
        if name == "prompts":
            p.add_argument("--contexts", default="1024,2048,4096")
            p.add_argument("--depths", default="0.05,0.25,0.5,0.75,0.95")
            p.add_argument("--trials", type=int, default=2)
            p.add_argument("--seed", type=int, default=0)
        elif name == "table":
            p.add_argument("parts", type=Path, nargs="+")
        else:
            p.add_argument("--prompts", type=Path, required=True)
            p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
            p.add_argument("--method", action="append", help="only this one, as it is named in the table; repeatable")
            if name == "kvpress":
                p.add_argument("--model", required=True, help="folder of the same weights as safetensors")
    a = parser.parse_args()
    a.run(a)


if __name__ == "__main__":
    main()
