"""Prompts on one GPU: the block kernels beside torch's flash kernel, and the time to the first token of every cache.

    python benchmarks/prefill_gpu.py --out benchmarks/results/prefill_gpu.json [--shapes 1x32768 8x8192] [-m METHOD]
        [--budget 120]

`kernels`: attention with its log-sum-exp, and column masses, on a site of an 8B Llama (32 heads, 8 KV heads, width 128) in
bfloat16: relative errors against float64 on a part of the queries, times, and the matrix rate that each reaches. `prompts`: a
model of an 8B Llama's shape with few layers and random weights; seconds of a prompt in pieces of 4096 (the second of two runs),
and the most that was allocated beyond the weights. Rows that --budget (seconds) leaves no room for are named.
"""

from __future__ import annotations

import argparse
import gc
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from triton.testing import do_bench

import qkv
from qkv.bench.environment import environment, write_json
from qkv.core.attend import attend
from qkv.kernels.flash import column_masses, flash_attention

DEVICE, H, G, D = "cuda", 32, 8, 128
METHODS = (
    "full", "window:budget=0.25", "streamingllm:window=4092", "h2o:budget=0.25", "tova:budget=0.25", "snapkv:budget=0.25",
    "kivi:bits=4", "zipcache", "quest:budget=2048", "double-sparsity:budget=2048",
)  # fmt: skip


def kernels(b: int, n: int, m: int) -> dict[str, Any]:
    """Errors and times of one shape, causal, the queries being the last of the keys."""
    torch.manual_seed(0)
    q = torch.randn(b, n, H, D, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2)
    k, v = (torch.randn(b, G, m, D, device=DEVICE, dtype=torch.bfloat16) for _ in "kv")
    scale = D**-0.5
    ours = partial(flash_attention, q, k, v, causal=True, scale=scale)
    out, lse = ours()
    masses = partial(column_masses, q, k, lse, causal=True, scale=scale)
    mass = masses()
    few = slice(None, 1), slice(None, G // 2)  # one row, some heads: what float64 has room for
    wide = [
        x[few[0], : H // 2 if x is q else G // 2, -min(n, 512) :].double() if x is q else x[few].double()
        for x in (q, k, v)
    ]
    want = attend(*wide, causal=True, scale=scale)
    part = out[:1, : H // 2, -min(n, 512) :].double()
    error = float((part - want.out).norm() / want.out.norm())
    total = float(mass.double().sum() / (b * H * n))
    if n <= 1024:
        whole = attend(*(x[few[0], : H // 2 if x is q else G // 2].double() for x in (q, k, v)), causal=True, mass=True)
        assert whole.mass is not None
        drawn = float((mass[:1, : H // 2].double() - whole.mass).norm() / whole.mass.norm())
    else:
        drawn = None
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    torch_flash = partial(flash, q, k, v, 0.0, True, False, scale=scale)
    same = torch_flash()
    lse_apart = float((same[1].double() - lse.double()).abs().max())
    work = 4 * b * H * D * (n * m - n * (n - 1) / 2)
    times = {
        name: do_bench(run, warmup=10, rep=40)
        for name, run in (("ours", ours), ("torch", torch_flash), ("masses", masses))
    }
    return {
        "shape": [b, H, G, n, m, D], "error": error, "mass_error": drawn, "mass_of_all": total, "lse_apart": lse_apart,
        **{f"{name}_ms": round(ms, 3) for name, ms in times.items()},
        **{f"{name}_TFLOPs": round(work / (2 if name == "masses" else 1) / ms / 1e9) for name, ms in times.items()},
    }  # fmt: skip


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--shapes", nargs="*", default=["1x32768", "8x8192"], help="batch x context")
    parser.add_argument("-m", "--method", action="append", help="instead of the default ones; may be repeated")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds in all")
    a = parser.parse_args()
    begun = time.monotonic()
    out: dict[str, Any] = environment(seed=0) | {"kernels": [], "prompts": [], "not run": []}

    def note(kind: str, row: dict[str, Any]) -> None:
        out[kind].append(row)
        write_json(a.out, out)
        print(f"{time.monotonic() - begun:4.0f} s  {kind}: {row}", flush=True)

    for sizes in ((1, 777, 1000), (1, 4096, 4096), (1, 4096, 32768), (8, 4096, 8192)):
        note("kernels", kernels(*sizes))
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=a.layers, num_attention_heads=H, num_key_value_heads=G,
        vocab_size=32000, max_position_embeddings=131072, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.device(DEVICE):
        model: Any = LlamaForCausalLM(config).bfloat16().eval()
    for shape in a.shapes:
        b, n = map(int, shape.split("x"))
        ids = torch.randint(3, 32000, (b, n), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1))
        what = {
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": 1,
            "do_sample": False,
            "prefill_chunk_size": 4096,
        }
        for method in ("transformers dynamic", *(a.method or METHODS)):
            if time.monotonic() - begun > a.budget:
                out["not run"].append([shape, method])
                continue
            gc.collect()
            torch.cuda.empty_cache()
            row: dict[str, Any] = {"what": method, "batch": b, "context": n}
            if method != "transformers dynamic":
                qkv.apply(model, method)
            try:
                for _ in range(2):
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                    torch.cuda.synchronize()
                    t = time.perf_counter()
                    model.generate(ids, **what)
                    torch.cuda.synchronize()
                    row["seconds"] = round(time.perf_counter() - t, 3)
                    row["peak_gb"] = round((torch.cuda.max_memory_allocated() - before) / 1e9, 2)
            except (qkv.QKVError, RuntimeError) as error:
                row["error"] = f"{type(error).__name__}: {str(error)[:200]}"
            finally:
                if method != "transformers dynamic":
                    qkv.revert(model)
            note("prompts", row)
    write_json(a.out, out)
    print("not run:", out["not run"] or "none")


if __name__ == "__main__":
    main()
