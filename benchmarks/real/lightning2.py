"""Lightning Attention-2: agreement on a model's own queries and keys, and time per token as the sequence grows.

python benchmarks/real/lightning2.py [--device cuda]
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.nn.functional as F
from _recall import arguments
from _streams import tokens
from torch import Tensor

import qkv
from qkv.bench.assets import smollm2
from qkv.bench.record import Figure, record
from qkv.hosts import observe
from qkv.ops._common.slopes import decay_slopes


def captured(device: str, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k (after silu) and v of a middle layer of SmolLM2 on real text, ``[1, H|G, N, 64]``."""
    loaded, tokenizer = smollm2(dtype=torch.float32)
    model: Any = loaded
    model, seen = model.to(device).eval(), []
    with observe(model, lambda site, call: seen.append((call.q, call.k, call.v))), torch.no_grad():
        model(tokens(tokenizer, count, 20000).to(device), use_cache=False)
    q, k, v = seen[len(seen) // 2]
    return F.silu(q), F.silu(k), v


def error(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest value."""
    return float((got.double() - want).abs().max() / want.abs().max())


def speed(length: int, total: int, device: str, softmax: bool, dtype: torch.dtype) -> float:
    """Tokens per second, forward and backward, 16 heads of 64, `total` tokens in rows of `length`; the median of five."""
    rows, times = max(1, total // length), []
    q, k, v = (torch.randn(rows, 16, length, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    slopes = decay_slopes(16, 1, 24).float().to(device)
    for i in range(6):
        if q.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        if softmax:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            out = qkv.attention(q, k, v, method="lightning2", slopes=slopes)
        torch.autograd.grad(out.float().square().sum(), (q, k, v))
        if q.is_cuda:
            torch.cuda.synchronize()
        if i:
            times.append(time.perf_counter() - start)
    return rows * length / sorted(times)[2]


def main() -> None:
    """Compare, time, record."""
    a = arguments(__doc__)
    q, k, v = captured(a.device, 128 if a.quick else 2048)
    slopes = decay_slopes(q.shape[1], 1, 24).to(a.device)
    wide = qkv.attention(q.double(), k.double(), v.double(), method="lightning2", slopes=slopes, form="reference")
    single = qkv.attention(q, k, v, method="lightning2", slopes=slopes.float())
    flat = qkv.attention(q, k, v, method="lightning2")
    half = q.shape[2] // 2 + 5
    method = qkv.method("lightning2")
    _, state = method(q[:, :, :half], k[:, :, :half], v[:, :, :half], slopes=slopes.float(), return_state=True)
    rest = [x[:, :, half:] for x in (q, k, v)]
    shifted = type(state)("lightning2", {"state": state["state"] * (-slopes.float()).exp()[:, None, None]}, state.seen)
    on, off = (method(*rest, slopes=slopes.float(), initial_state=s) for s in (state, shifted))
    note = f"layer in the middle of SmolLM2, {q.shape[2]} tokens of real text, largest difference over largest value"
    figures = [
        Figure("float32 blocks against float64 whole map", float(f"{error(single, wide):.3g}"), "", note),
        Figure("state handed over inside a block", float(f"{error(on, wide[:, :, half:]):.3g}"), "", note),
        Figure("control: a state decayed once too often", float(f"{error(off, wide[:, :, half:]):.3g}"), "", note),
        Figure("control: no decay", float(f"{error(flat, wide):.3g}"), "", note),
    ]
    dtype = torch.bfloat16 if a.device.startswith("cuda") else torch.float32
    total, lengths = (512, (128, 512)) if a.quick else (65536, (1024, 2048, 4096, 8192, 16384, 32768, 65536))
    table = []
    for length in lengths:
        row = {"tokens in a row": length}
        for name, softmax in (("lightning2 (tokens/s)", False), ("softmax attention (tokens/s)", True)):
            row[name] = round(speed(length, total, a.device, softmax, dtype))
        table.append(row)
        print(row, flush=True)
    first, last = table[min(1, len(table) - 1)], table[-1]
    for name in list(first)[1:]:
        ratio = round(last[name] / first[name], 3)
        figures.append(Figure(f"speed at {last['tokens in a row']} over {first['tokens in a row']} tokens, {name.split(' (')[0]}",
                              ratio, "", "forward and backward, equal tokens in all"))  # fmt: skip
    record("lightning2", claim="blocks equal the whole map, and time per token does not grow with the length", figures=figures,
           table=table, command="python benchmarks/real/lightning2.py", seed=0, folder=a.folder)  # fmt: skip
    for figure in figures:
        print(figure.name, figure.value)


if __name__ == "__main__":
    main()
