"""HyperAttention in a pretrained model: perplexity as more layers use it, the hash against a random order, time against softmax.

python benchmarks/real/hyperattention.py [--device cuda]

SmolLM2 reads windows of 8192 tokens; in the last k layers attention is estimated (blocks and samples of 128 keys, exact below
1024 tokens), over three seeds. The errors are those of single layers on the model's own queries, keys and values, relative to
exact attention; the control keeps everything but gives queries and keys random buckets.
"""

from __future__ import annotations

import math
import statistics
import time
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from _streams import applied, arguments, load, tokens
from torch import Tensor

import qkv
from qkv.bench.record import Figure, record
from qkv.hosts import observe
from qkv.ops import hyperattention


def shuffled(plan: hyperattention.Plan, *several: Tensor) -> list[Tensor]:
    """Random buckets in the place of the hash."""
    found = []
    for i, x in enumerate(several):
        rng = torch.Generator(x.device).manual_seed(2 * plan.seed + i)
        found.append(torch.randint(0, 1 << plan.lsh_num_projs, x.shape[:3], device=x.device, generator=rng))
    return found


@torch.no_grad()
def perplexity(model, windows: list[Tensor]) -> float:
    """exp of the mean loss over all tokens after the first quarter of each window."""
    losses = []
    for ids in windows:
        skip = ids.shape[1] // 4
        logits = model(ids, use_cache=False, logits_to_keep=ids.shape[1] - skip).logits[0, :-1].float()
        losses.append(F.cross_entropy(logits, ids[0, skip + 1 :]).item())
    return math.exp(statistics.mean(losses))


@torch.no_grad()
def errors(model, ids: Tensor, settings: dict[str, Any], layers: list[int], seeds: int) -> dict[str, float]:
    """Relative L2 error of attention outputs, mean over layers and seeds."""
    found: dict[str, list[float]] = {}
    ways = {
        "causal": (True, {}), "causal, first 4 keys kept": (True, {"always_keys": 4}), "bidirectional, by rank": (False, {}),
        "bidirectional, by bucket": (False, {"match": "bucket"}),
    }  # fmt: skip

    def look(site, call) -> None:
        if site.layer not in layers:
            return
        q, k, v = (x.float() for x in (call.q, call.k, call.v))
        for way, (causal, more) in ways.items():
            exact = qkv.attention(q, k, v, method="full", causal=causal, scale=call.scale)
            for seed in range(seeds):
                method = qkv.method("hyperattention", **settings, **more, seed=seed)
                out = method(q, k, v, causal=causal, scale=call.scale)
                with mock.patch.object(hyperattention, "buckets", shuffled):
                    control = method(q, k, v, causal=causal, scale=call.scale)
                for name, got in ((way, out), (f"{way}, random order", control)):
                    found.setdefault(name, []).append(float((got - exact).norm() / exact.norm()))

    with observe(model, look):
        model(ids, use_cache=False, logits_to_keep=1)
    for way in ways:
        assert found[way] != found[f"{way}, random order"], "the control did not act"
    return {way: statistics.mean(values) for way, values in found.items()}


@torch.no_grad()
def speed(a) -> list[dict[str, Any]]:
    """Milliseconds of one layer's attention, forward, against torch's fused softmax attention."""
    cuda = a.device.startswith("cuda")
    kind, sizes = (torch.bfloat16, (8192, 32768, 131072)) if cuda else (torch.float32, (8192, 16384))
    table = []
    for n in (1024,) if a.quick else sizes:
        q, k, v = (torch.randn(1, 8 if cuda else 1, n, 64, device=a.device, dtype=kind) for _ in range(3))
        row: dict[str, Any] = {"tokens": n}
        for causal in (True, False):
            what = "causal" if causal else "bidirectional"
            method = qkv.method("hyperattention", min_seq_len=256 if a.quick else 4096)
            best = {"softmax": math.inf, "hyperattention": math.inf}
            for _ in range(4 if cuda else 2):
                for name in best:
                    start = time.perf_counter()
                    if name == "softmax":
                        F.scaled_dot_product_attention(q, k, v, is_causal=causal)
                    else:
                        method(q, k, v, causal=causal)
                    if cuda:
                        torch.cuda.synchronize()
                    best[name] = min(best[name], time.perf_counter() - start)
            row |= {f"{what}, {name} (ms)": round(1e3 * x, 3) for name, x in best.items()}
            row[f"{what}, times as fast"] = round(best["softmax"] / best["hyperattention"], 2)
        table.append(row)
        print(row, flush=True)
    return table


def main() -> None:
    """Exchange layers, measure errors and time, record."""
    a = arguments(__doc__)
    model, tokenizer = load(a)
    depth = model.config.num_hidden_layers
    length, count, size = (512, 1, 16) if a.quick else (8192, 4, 128)
    settings: dict[str, Any] = {"min_seq_len": length // 8, "block_size": size, "sample_size": size}
    windows = [tokens(tokenizer, length, 20000 + i * 2 * length).to(a.device) for i in range(count)]
    steps = (0, 2, depth) if a.quick else (0, 1, 2, 4, 8, 16, depth)
    table = []
    for k in steps:
        layers = list(range(depth - k, depth))
        row: dict[str, Any] = {"last layers": k}
        for name, more in (("perplexity", {}), ("perplexity, first 4 keys kept", {"always_keys": 4})):
            found = []
            for seed in range(1 if k == 0 or a.quick else 3):
                method = qkv.method("hyperattention", **settings, **more, seed=seed) if k else None
                with applied(model, None) if method is None else qkv.applied(model, method, where=layers):
                    found.append(perplexity(model, windows))
            row[name] = round(statistics.mean(found), 3)
            row[f"{name}, spread"] = round(max(found) - min(found), 3)
        table.append(row)
        print(row, flush=True)
    note = (
        f"{count} windows of {length} tokens, 3 seeds, blocks and samples of {size}, exact below {length // 8} tokens"
    )
    figures = []
    for row in table:
        figures.append(Figure(f"perplexity, last {row['last layers']} layers", row["perplexity"], "", note))
        figures.append(
            Figure(f"perplexity, last {row['last layers']} layers, first 4 keys kept",
                   row["perplexity, first 4 keys kept"], "", note)
        )  # fmt: skip
    few = [0, depth - 1] if a.quick else list(range(0, depth, 3))
    said = f"relative L2 error of attention outputs, {len(few)} layers, {length} tokens of real text, 3 seeds"
    by_way = errors(model, windows[0], settings, few, 1 if a.quick else 3)
    figures += [Figure(f"error, {way}", round(x, 4), "", said) for way, x in by_way.items()]
    device = "the GPU in bfloat16, 8 heads" if a.device.startswith("cuda") else "the CPU in float32, 1 head"
    for row in speed(a):
        for what in ("causal", "bidirectional"):
            ours, exact = (row[f"{what}, {name} (ms)"] for name in ("hyperattention", "softmax"))
            name = f"times as fast as softmax, {what}, {row['tokens']} tokens"
            how = f"{ours} ms against {exact} ms, width 64, forward, on {device}"
            figures.append(Figure(name, row[f"{what}, times as fast"], "", how))
    claim = "perplexity grows smoothly with the layers that use it; the hash has a lower error than a random order"
    record("hyperattention", claim=claim, figures=figures, table=table, command="python benchmarks/real/hyperattention.py",
           seed=0, folder=a.folder)  # fmt: skip
    for figure in figures:
        print(figure.name, figure.value)


if __name__ == "__main__":
    main()
