"""Decode attention from packed words on one GPU: against float64, the bound by bytes, and torch's fused bf16 kernels.

    python benchmarks/packed_gpu.py --out benchmarks/results/packed_gpu.json [--tune]

Checks every configuration before it is timed. Medians of calls in CUDA graphs, as decoding steps are; the inputs are larger than
the cache of the device.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench_cudagraph

from qkv.bench.environment import environment
from qkv.caches._stores.codecs import unpack_bits
from qkv.core.attend import attend
from qkv.kernels.decode import decode_attention
from qkv.kernels.packed import packed_decode, packed_store

DEVICE, GROUP, RESIDUAL, HEADS, KV_HEADS, WIDTH = "cuda", 32, 128, 32, 8, 128
SHAPES = ((16, 32768), (1, 131072), (64, 8192))
TRIALS = [
    {"planes": True, "stages": 2}, {"planes": True, "stages": 3}, {"planes": True, "stages": 4},
    {"planes": True, "stages": 2, "units": 8}, {"planes": True, "stages": 3, "units": 8},
    {"planes": True, "stages": 2, "units": 8, "registers": 168}, {"planes": True, "stages": 3, "registers": 208},
    {"planes": False, "stages": 3},
]  # fmt: skip


def bench(run: Any, repeats: int = 30) -> float:
    """Median milliseconds of a call inside a CUDA graph, over `repeats` ms for each of a few replays."""
    return do_bench_cudagraph(run, rep=repeats, return_mode="median")


def buffers(b: int, m: int, bits: int) -> list[torch.Tensor]:
    """Random codes, scales, zeros and rings for `m` tokens."""
    g, d = KV_HEADS, WIDTH
    keys, values = (b, g, m // GROUP, d), (b, g, m, d // GROUP)

    def words(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device=DEVICE)

    def scales(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        s = torch.rand(shape, device=DEVICE, dtype=torch.float16) * 4 / 2**bits
        return s, -s * (2 ** (bits - 1)) + 0.1

    tails = (torch.randn(b, g, RESIDUAL, d, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return [words(*keys, GROUP * bits // 32), *scales(keys), words(b, g, m, d * bits // 32), *scales(values), *tails]


def plain(held: list[torch.Tensor], bits: int, row: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values ``[1, G, n, D]`` float64 of one row, from the definition of the buffers."""
    one = [x[row : row + 1] for x in held]
    codes = unpack_bits(one[0], bits, GROUP).double()
    keys = (codes * one[1].double().unsqueeze(-1) + one[2].double().unsqueeze(-1)).mT.flatten(2, 3)
    codes = unpack_bits(one[3], bits, WIDTH).double().unflatten(-1, (-1, GROUP))
    values = (codes * one[4].double().unsqueeze(-1) + one[5].double().unsqueeze(-1)).flatten(-2)
    p = torch.arange(n, device=DEVICE)
    old_key, old_value = (p < n - n % RESIDUAL)[:, None], (p < n - RESIDUAL)[:, None]
    tails = [x.double()[:, :, p % RESIDUAL] for x in one[6:]]
    return torch.where(old_key, keys[:, :, :n], tails[0]), torch.where(old_value, values[:, :, :n], tails[1])


def one(b: int, m: int, bits: int, tune: bool) -> list[dict[str, Any]]:
    """Check and time one shape."""
    held, n = buffers(b, m, bits), m - RESIDUAL - 3
    q = torch.randn(b, HEADS, 1, WIDTH, device=DEVICE, dtype=torch.bfloat16)
    k, v = (torch.randn(b, KV_HEADS, 1, WIDTH, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    length = torch.tensor([n + 1], dtype=torch.int32, device=DEVICE)
    what = {"length": length, "k_bits": bits, "v_bits": bits, "group": GROUP, "residual": RESIDUAL}
    moved = sum(x[:, :, : x.shape[2] * n // m].nbytes for x in held[:6]) + sum(x.nbytes for x in held[6:])
    keys, values = plain(held, bits, b - 1, n)
    last = [x[b - 1 :].double() for x in (q, k, v)]
    want = attend(last[0], torch.cat((keys, last[1]), 2), torch.cat((values, last[2]), 2)).out
    rows, units = [], torch.cuda.get_device_properties(0).multi_processor_count
    trials: list[dict[str, Any]] = [{}]
    if tune:
        pairs = b * KV_HEADS
        waves = sorted({max(1, per * units // pairs) for per in (3, 6, 8, 10, 12, 16)})
        trials = [t | {"splits": s} for t in TRIALS for s in waves if s <= 96]
    for trial in trials:
        out, _ = packed_decode(q, k, v, *held, scale=WIDTH**-0.5, **what, **trial)
        error = ((out[b - 1 :].double() - want).norm() / want.norm()).item()
        if not error < 1e-2:
            print(f"wrong by {error:.3g}: {bits} bits, {trial or 'the defaults'}", flush=True)
            assert tune
            continue
        ms = bench(lambda t=trial: packed_decode(q, k, v, *held, scale=WIDTH**-0.5, **what, **t), 10 if tune else 30)
        rows.append({"batch": b, "tokens": n, "bits": bits, **trial, "relative_error": error, "ms": ms, "bytes": moved,
                     "TB/s": moved / ms / 1e9})  # fmt: skip
    if not tune:
        rows[0]["store_ms"] = bench(lambda: packed_store(k, v, *held, **what))
    return rows


def peers(b: int, m: int) -> dict[str, Any]:
    """The same tokens as a bf16 cache."""
    q = torch.randn(b, HEADS, 1, WIDTH, device=DEVICE, dtype=torch.bfloat16)
    k, v = (torch.randn(b, KV_HEADS, m, WIDTH, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    grouped, length = q.reshape(b, KV_HEADS, -1, WIDTH), torch.tensor([m], dtype=torch.int32, device=DEVICE)
    row: dict[str, Any] = {"batch": b, "tokens": m, "bits": 16, "bytes": k.nbytes + v.nbytes}
    row["decode_attention"] = bench(lambda: decode_attention(q, k, v, length=length, scale=WIDTH**-0.5))
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        with sdpa_kernel(backend):
            row[backend.name] = bench(lambda: torch.nn.functional.scaled_dot_product_attention(grouped, k, v))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tune", action="store_true", help="try launch settings on the first shape, 4 bits")
    parser.add_argument("--warm", type=int, help="only compile one of the launch settings")
    arguments = parser.parse_args()
    if arguments.warm is not None:
        TRIALS[:] = [TRIALS[arguments.warm]]
        one(1, 1024, 4, True)
        return
    torch.manual_seed(0)
    rows = one(*SHAPES[0], 4, True) if arguments.tune else []
    for row in sorted(rows, key=lambda x: x["ms"])[:12]:
        print(row, flush=True)
    for shape in SHAPES:
        rows.append(peers(*shape))
        print(rows[-1], flush=True)
        for bits in (2, 4, 8):
            rows += one(*shape, bits, False)
            print(rows[-1], flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"environment": environment(seed=0), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
