"""The decode kernel alone on one GPU: launch settings against each other, torch's fused kernels and a copy.

    python benchmarks/decode_kernel_gpu.py --out benchmarks/results/decode_kernel_gpu.json

Each setting is checked against float64 before it is timed. Times are medians of replayed CUDA graphs (no launch cost in
them) over inputs larger than the L2 cache. `copy_ms` is the time that a device-to-device copy of the same bytes takes in
this process.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench_cudagraph

from qkv.bench.environment import environment, write_json
from qkv.core.attend import attend
from qkv.kernels.decode import decode_attention

SHAPES = ((1, 32, 8, 131072, 128), (8, 32, 8, 16384, 128), (16, 32, 8, 32768, 128), (1, 32, 8, 8192, 128))
BLOCKS, WARPS, STAGES, SPLITS = (32, 64, 128), (2, 4), (2, 3, 4), (2, 4, 8)


def time(run: Callable[[], object]) -> float:
    """Median milliseconds of one call inside a CUDA graph."""
    return do_bench_cudagraph(run, rep=30, return_mode="median")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    torch.manual_seed(0)
    units = torch.cuda.get_device_properties(0).multi_processor_count
    rows = []
    for b, h, g, m, d in SHAPES:
        q = torch.randn(b, h, 1, d, device="cuda", dtype=torch.bfloat16)
        k = torch.randn(b, g, m, d, device="cuda", dtype=torch.bfloat16)
        v = torch.randn_like(k)
        length = torch.tensor([m - 3], device="cuda", dtype=torch.int32)
        want = attend(q[:1].double(), k[:1, :, : m - 3].double(), v[:1, :, : m - 3].double()).out
        spare = torch.empty_like(k)
        copy = time(lambda spare=spare, k=k: spare.copy_(k))  # reads and writes k once: the bytes of k and v
        del spare
        row: dict = {"shape": [b, h, g, m, d], "copy_ms": copy}
        for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):
            try:
                with sdpa_kernel(getattr(SDPBackend, name)):
                    row[name] = time(partial(F.scaled_dot_product_attention, q.reshape(b, g, h // g, d), k, v))
            except RuntimeError as reason:
                row[name] = str(reason)[:80]
        tried = []
        for block, warps, stages, per in itertools.product(BLOCKS, WARPS, STAGES, SPLITS):
            splits = max(1, min(128, -(-per * units // (b * g))))
            settings = {"splits": splits, "block": block, "warps": warps, "stages": stages}
            call = partial(decode_attention, q, k, v, length=length, scale=d**-0.5, **settings)
            error = ((call()[0][:1].double() - want).norm() / want.norm()).item()
            if not error < 1e-2:
                raise SystemExit(f"wrong result with {settings} at {row['shape']}: relative error {error}")
            tried.append({"per_unit": per, **settings, "ms": time(call), "error": error})
        tried.sort(key=lambda x: x["ms"])
        default = time(partial(decode_attention, q, k, v, length=length, scale=d**-0.5))
        rows.append(row | {"default_ms": default, "tried": tried})
        write_json(a.out, environment(seed=0) | {"rows": rows})
        print(row | {"default_ms": default}, *tried[:4], sep="\n  ", flush=True)


if __name__ == "__main__":
    main()
