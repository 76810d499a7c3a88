"""Decode on one GPU: plain, as CUDA graphs, and against transformers' own dynamic and static (auto-compiled) caches.

    python benchmarks/decode_gpu.py --out benchmarks/results/decode_gpu.json [--layers 8] [--quick]

Checks first (kernel against float64; graph tokens against plain tokens), then times everything in one process, medians over
repeats. The model has the shape of an 8B Llama with fewer layers and random weights: it measures cost only.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList
from triton.testing import do_bench_cudagraph

import qkv
from qkv.bench.environment import environment, write_json
from qkv.core.attend import attend
from qkv.kernels.decode import decode_attention

DEVICE = "cuda"


def check_kernel() -> list[dict]:
    """Largest relative error of the decode kernel against float64, and its time beside torch's fused kernels."""
    rows = []
    for b, h, g, m, d in (
        (1, 32, 8, 131072, 128),
        (8, 32, 8, 16384, 128),
        (16, 32, 8, 32768, 128),
        (1, 9, 3, 8192, 64),
    ):
        q = torch.randn(b, h, 1, d, device=DEVICE, dtype=torch.bfloat16)
        k = torch.randn(b, g, m, d, device=DEVICE, dtype=torch.bfloat16)
        v = torch.randn_like(k)
        length = torch.tensor([m - 3], device=DEVICE, dtype=torch.int32)
        out, lse = decode_attention(q, k, v, length=length, scale=d**-0.5)
        want = attend(q[:1].double(), k[:1, :, : m - 3].double(), v[:1, :, : m - 3].double())
        error = ((out[:1].double() - want.out).norm() / want.out.norm()).item()
        assert error < 1e-2 and (lse[:1].double() - want.lse).abs().max() < 1e-2, (error, b, m)
        ours = bench(partial(decode_attention, q, k, v, length=length, scale=d**-0.5))
        packed = q.reshape(b, g, h // g, d)
        peers = {}
        for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):
            try:
                with sdpa_kernel(getattr(SDPBackend, name)):
                    peers[name] = bench(partial(torch.nn.functional.scaled_dot_product_attention, packed, k, v))
            except RuntimeError as reason:
                peers[name] = str(reason)[:60]
        moved = 2 * k.numel() * 2
        rows.append(
            {
                "shape": [b, h, g, m, d],
                "relative_error": error,
                "ms": ours,
                "TB/s": moved / ours / 1e9,
                "peers_ms": peers,
            }
        )
        print(rows[-1], flush=True)
    return rows


def bench(run) -> float:
    """Median milliseconds of one call inside a CUDA graph, the caller's inputs larger than the cache."""
    return do_bench_cudagraph(run, rep=30, return_mode="median")


class Clock(StoppingCriteria):
    """Marks the device's time at every token, without waiting for it."""

    def __init__(self) -> None:
        self.marks: list[torch.cuda.Event] = []

    def __call__(self, ids, scores, **_) -> torch.Tensor:
        """Never stops."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)

    def ms(self, skip: int) -> float:
        """Median milliseconds between tokens, the first `skip` left out."""
        torch.cuda.synchronize()
        marks = self.marks[skip:]
        return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))


def decode(model, ids: torch.Tensor, new: int, **more) -> tuple[float, float, torch.Tensor]:
    """(ms per token, seconds of the first call, tokens): the second of two equal generations, its first tokens left out."""
    settings = dict(do_sample=False, attention_mask=torch.ones_like(ids), pad_token_id=0, eos_token_id=None) | more
    torch.cuda.synchronize()
    t = time.perf_counter()
    model.generate(ids, max_new_tokens=new, **settings)
    torch.cuda.synchronize()
    first, clock = time.perf_counter() - t, Clock()
    out = model.generate(ids, max_new_tokens=new, stopping_criteria=StoppingCriteriaList([clock]), **settings)
    return clock.ms(new // 4), first, out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--shapes", nargs="*", default=["1x8192", "8x16384"], help="batch x context")
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("-m", "--method", action="append", help="instead of the default ones; may be repeated")
    parser.add_argument(
        "--plain", nargs="*", default=["1x8192"], help="shapes at which plain steps are run too, and compared"
    )
    parser.add_argument("--no-peers", action="store_true", help="leave transformers' own caches out")
    parser.add_argument(
        "--no-static", nargs="*", default=[], help="shapes whose static cache takes too long to compile and fill"
    )
    a = parser.parse_args()
    torch.manual_seed(0)
    rows: list[dict] = []
    a.out.parent.mkdir(parents=True, exist_ok=True)
    kernel = check_kernel()
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=a.layers, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=32000, max_position_embeddings=131072, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.device(DEVICE):
        model = LlamaForCausalLM(config).bfloat16().eval()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    facts = environment(seed=0) | {"model": config.to_diff_dict(), "weight_bytes": weights, "kernel": kernel}
    facts |= {"new": a.new, "plain": a.plain, "no-static": a.no_static, "no-peers": a.no_peers}

    def keep() -> None:  # after every row: an interrupted run keeps what it measured
        write_json(a.out, facts | {"rows": [{k: v for k, v in r.items() if k != "_all"} for r in rows]})

    def row(label: str, b: int, n: int, **more) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        ids = torch.randint(3, 32000, (b, n), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1))
        settings, method, graph = more.get("settings", {}), more.get("method"), more.get("graph", False)
        result = {"what": label, "batch": b, "context": n}
        try:
            if method is None:
                ms, first, tokens = decode(model, ids, a.new, prefill_chunk_size=4096, **settings)
            else:
                with qkv.applied(model, method, graph=graph):
                    ms, first, tokens = decode(model, ids, a.new, prefill_chunk_size=4096, **settings)
                    report = qkv.report(model)
                    result |= {"cache_bytes": report.bytes, "full_bytes": report.full_bytes}
                    if graph:
                        graphs = model.__dict__["_qkv"].graph
                        result |= {"replays": graphs.replays, "captures": graphs.captures, "plain": graphs.plain}
            result |= {"ms_per_token": round(ms, 3), "first_call_s": round(first, 2),
                       "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2)}  # fmt: skip
            result["tokens"] = tokens[0, n : n + 8].tolist()
            result["_all"] = tokens[:, n:]
        except Exception as reason:
            result["error"] = f"{type(reason).__name__}: {str(reason)[:300]}"
        rows.append(result)
        keep()
        print({k: v for k, v in result.items() if k != "_all"}, flush=True)

    methods = [
        "full",
        *(a.method or ["window:budget=0.25", "kivi:bits=4", "streamingllm:window=4092", "h2o:budget=0.25"]),
    ]
    shapes = [tuple(map(int, x.split("x"))) for x in a.shapes]
    for b, n in shapes:
        if not a.no_peers:
            if f"{b}x{n}" not in a.no_static:
                row("transformers static, auto-compiled", b, n, settings={"cache_implementation": "static"})
            row("transformers dynamic", b, n)
        for method in methods:
            row(f"{method} graph", b, n, method=method, graph=True)
            if f"{b}x{n}" not in a.plain:
                continue
            row(f"{method} plain", b, n, method=method)
            graph, plain = rows[-2], rows[-1]
            if "_all" in plain and "_all" in graph:
                graph["equal_tokens"] = (plain["_all"] == graph["_all"]).float().mean().item()
                print("equal to plain:", graph["equal_tokens"], flush=True)
                keep()
    full = {(r["batch"], r["context"]): r.get("ms_per_token") for r in rows if r["what"] == "full graph"}
    base = {
        (r["batch"], r["context"]): r.get("ms_per_token") for r in rows if r["what"].startswith("transformers static")
    }
    print(f"\n{'what':38} {'batch':>5} {'context':>7} {'ms/token':>9} {'x static':>9} {'x full':>7} {'peak GB':>8}")
    for r in rows:
        if "ms_per_token" in r:
            ratio = (base.get((r["batch"], r["context"])) or float("nan")) / r["ms_per_token"]
            speed = (full.get((r["batch"], r["context"])) or float("nan")) / r["ms_per_token"]
            what = f"{r['what']:38} {r['batch']:5} {r['context']:7} {r['ms_per_token']:9.2f}"
            print(f"{what} {ratio:9.2f} {speed:7.2f} {r['peak_gb']:8.1f}")


if __name__ == "__main__":
    main()
