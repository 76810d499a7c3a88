"""One decoding step of one attention site on one GPU: every static cache beside the full one and torch's fused kernel.

    python benchmarks/attention_gpu.py --out benchmarks/results/attention_gpu.json [--batch 16] [--context 32768]
        [--methods METHOD ...]

The shape is a site of an 8B Llama (32 heads, 8 KV heads, width 128) in bfloat16 with random keys. A step is everything that
decoding does at a site: the new token is stored, what is read is chosen, attention runs, something is evicted or packed.
Times are medians of replayed CUDA graphs. `copy_ms` is the time in which this device copies as many bytes as the method holds,
half of them read and half written (for methods that hold everything but read a part: as many as the full cache holds).
Shares of the context are given as numbers of tokens, so that each method holds what it would hold after such a prompt, whose
own attention is left out. Every method is compiled first, all at once, by processes of their own. Rows reach the disk as they are
made; what --budget (seconds) leaves no room for is named.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench_cudagraph

from qkv.bench.environment import environment, write_json
from qkv.caches._stores.dense import DenseCache
from qkv.core.cache import Geometry, LayerCache, Now, Rope, Step
from qkv.hosts.stack import coerce

H, G, D, CHUNK = 32, 8, 128, 2048
BEGUN = time.monotonic()


def methods(context: int) -> dict[str, int]:
    """Setting -> tokens to feed: evicting caches are full once their budget is."""
    quarter, part = context // 4, context // 16
    evicting = [f"{name}:budget={quarter}" for name in ("window", "h2o", "tova")] + [
        f"streamingllm:window={quarter - 4}"
    ]
    whole = ("kivi:bits=4", "kivi:bits=2", f"quest:budget={part}", f"double-sparsity:budget={part}")
    return dict.fromkeys(evicting, quarter + 64) | dict.fromkeys(whole, context)


def site() -> Geometry:
    """The site, with rotary frequencies for caches that move keys."""
    frequencies = 500000.0 ** -(torch.arange(D // 2, dtype=torch.float32, device="cuda") / (D // 2))
    return Geometry(H, G, D, D, layer=3, layers=8, rope=Rope(frequencies), max_length=131072)


def draw(b: int, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random q, k, v of n tokens."""
    return tuple(torch.randn(b, h, n, D, device="cuda", dtype=torch.bfloat16) for h in (H, G, G))  # type: ignore[return-value]


def _unattended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: Any) -> torch.Tensor:
    """In place of a prompt's attention."""
    return q


def fed(layer: LayerCache, b: int, tokens: int) -> LayerCache:
    """The memory after so many random tokens: in blocks, without their attention, and then a few steps with it."""
    layer.announce(tokens)
    layer.reserve(tokens + 64)
    sizes = [CHUNK] * (tokens // CHUNK) + ([tokens % CHUNK] if tokens % CHUNK else []) + [1, 1, 1]
    for n in sizes:
        position = torch.arange(layer.seen, layer.seen + n, device="cuda", dtype=torch.int32).expand(b, n)
        layer.attend(*draw(b, n), Step(position, D**-0.5, compute=_unattended if n > 1 else None))
    return layer


def now(layer: LayerCache, b: int) -> Now:
    """Where a captured step stands."""
    seen = layer.seen
    return Now(
        cursor=torch.tensor([seen], device="cuda"),
        length=torch.tensor([seen + 1], device="cuda", dtype=torch.int32),
        position=torch.full((b, 1), seen, device="cuda", dtype=torch.int32),
    )


def timed(run: Any) -> float:
    """Median milliseconds of a call inside a CUDA graph."""
    return round(do_bench_cudagraph(run, rep=30, return_mode="median"), 4)


def exact(b: int, n: int) -> list[dict[str, Any]]:
    """Torch's fused kernels over n keys, and the copy of as many bytes."""
    q, k, v = draw(b, n)
    q = q[:, :, :1].reshape(b, G, H // G, D)
    copy = timed(lambda: v.copy_(k))  # reads k and writes v: the bytes of both
    rows = []
    for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):
        with sdpa_kernel(getattr(SDPBackend, name)):
            ms = timed(lambda: F.scaled_dot_product_attention(q, k, v))
        rows.append({"method": f"torch {name}, {n} keys", "ms": ms, "copy_ms": copy})
    return rows


def step_of(setting: str, b: int, tokens: int) -> tuple[LayerCache, Any]:
    """A memory of that method and its next step."""
    layer = fed(DenseCache(site()) if setting == "full" else cast(Any, coerce([setting])[0]).layer(site()), b, tokens)
    if not layer.static():
        raise RuntimeError("its step is not static after the prompt")
    token, here = draw(b, 1), now(layer, b)
    return layer, lambda: layer.step(*token, D**-0.5, here)


def compiled(settings: dict[str, int], b: int, until: float) -> None:
    """Every method's kernels, each by a process of its own; they share Triton's cache."""
    jobs = [[setting, str(b), str(tokens)] for setting, tokens in settings.items()]
    running = [subprocess.Popen([sys.executable, __file__, "--job", *job], stderr=subprocess.DEVNULL) for job in jobs]
    for process in running:
        try:
            process.wait(max(0.1, until - (time.monotonic() - BEGUN)))
        except subprocess.TimeoutExpired:
            process.kill()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("-m", "--methods", nargs="+", help="instead of the default ones")
    parser.add_argument("--budget", type=float, default=95.0, help="seconds in all")
    parser.add_argument("--job", nargs=3, help=argparse.SUPPRESS)
    a = parser.parse_args()
    torch.manual_seed(0)
    if a.job:
        step_of(a.job[0], int(a.job[1]), int(a.job[2]))[1]()
        torch.cuda.synchronize()
        return
    if a.out is None:
        parser.error("--out is needed")
    b, n = int(a.batch), int(a.context)
    known = methods(n)
    chosen: list[str] = a.methods or list(known)
    settings = {"full": n} | {name: known.get(name, n) for name in chosen}
    rows: list[dict[str, Any]] = []
    facts = environment(seed=0) | {"batch": b, "context": n, "heads": H, "kv_heads": G, "width": D}

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        write_json(a.out, facts | {"rows": rows, "seconds": time.monotonic() - BEGUN})
        print(f"{time.monotonic() - BEGUN:4.0f} s  {row}", flush=True)

    compiled(settings, b, a.budget / 2)
    for row in exact(b, n):
        add(row)
    best, copied = min(r["ms"] for r in rows), rows[0]["copy_ms"] / (4 * b * G * n * D)  # ms per byte
    full = None
    for setting, tokens in settings.items():
        if time.monotonic() - BEGUN + 4 > a.budget:
            add({"method": setting, "error": "not run: no time left"})
            continue
        layer = run = None
        try:
            layer, run = step_of(setting, b, tokens)
            ms = timed(run)
            full = ms if setting == "full" else full
            add({"method": setting, "ms": ms, "best_exact_over_method": round(best / ms, 2),
                 "full_over_method": None if full is None else round(full / ms, 2),
                 "held_bytes": layer.bytes(), "copy_ms": round(layer.bytes() * copied, 4)})  # fmt: skip
        except Exception as reason:
            add({"method": setting, "error": f"{type(reason).__name__}: {str(reason)[:200]}"})
        del layer, run
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
