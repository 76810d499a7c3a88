"""Prompts on vertical and slash lines on one GPU (as LoopServe has them): choosing lines, attention over them, exact attention.

    python benchmarks/lines_gpu.py --out benchmarks/results/lines_gpu.json [--lengths 2000 8000] [--layers 2 10 19 28]

Queries, keys and values are those of SmolLM2-135M on a play, in bfloat16. For each layer: the share of causal cells on the lines;
the share of causal tiles of 64 by 64 that the kernel multiplies, since it computes a tile if any slash crosses it and gathers the
other verticals 64 at a time (one over this is the bound of its speed over exact attention); the distance to float64 over the same
cells (of the last queries of some heads) and to exact attention. Times: choosing lines, as called from the host; the kernel with
its lists, and torch's flash kernel, inside CUDA graphs; the same attention with gathered keys in torch, once.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from triton.testing import do_bench, do_bench_cudagraph

from qkv.bench.assets import long_text, smollm2, text_tokens
from qkv.bench.environment import environment, write_json
from qkv.core.attend import attend, sdpa
from qkv.core.vertical_slash import VerticalSlash, attend_lines, kept_share, lines_mask
from qkv.hosts import observe
from qkv.kernels.lines import lines_attention

Row = dict[str, Any]
CHECKED, HEADS = 256, 3  # last queries and first heads that are compared with float64


def once(run: Any) -> float:
    """Milliseconds of the second of two calls."""
    for _ in range(2):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        run()
        torch.cuda.synchronize()
    return (time.perf_counter() - begun) * 1e3


def tiles(vertical: torch.Tensor, slash: torch.Tensor, side: int = 64) -> float:
    """Tiles multiplied for lines ``[H, M]`` of a whole prompt, over all causal tiles."""
    h, m = slash.shape
    many, computed = -(-m // side), 0.0
    slash = slash.clone()
    slash[:, 0] = True
    for head in range(h):
        at = slash[head].nonzero().squeeze(1)  # offsets of a tile on diagonal d: side d - side + 1 .. side d + side - 1
        crossed = torch.zeros(many + 1, dtype=torch.bool, device=slash.device)
        crossed[at // side] = True
        crossed[(at + side - 1) // side] = True
        columns = torch.bincount(vertical[head].nonzero().squeeze(1) // side, minlength=many)
        for tile in range(many):
            left = columns[: tile + 1].flip(0)[~crossed[: tile + 1]].sum()
            computed += int(crossed[: tile + 1].sum()) + float(left) / side
    return computed / (h * many * (many + 1) / 2)


def measured(call: Any, alpha: float) -> Row:
    """One site of one prompt."""
    q, k, v, scale = call.q[0], call.k[0], call.v[0], call.scale
    (h, n, _), g = q.shape, k.shape[0]
    prompt = VerticalSlash(alpha, 64, 0.1, "lines_gpu")
    lines = prompt.lines(q, k, scale)
    vertical = lines.vertical.clone()
    vertical[:, 0] = True
    kernel = partial(lines_attention, q, k, v, vertical, lines.slash, scale=scale)
    exact = partial(sdpa, call.q, call.k, call.v, mask=None, causal=True, scale=scale)
    heads, last = slice(HEADS), slice(-CHECKED, None)
    few = [q[heads, last].double()[None], *(x[: HEADS * g // h].double()[None] for x in (k, v))]
    mask = lines_mask(lines, torch.arange(n - CHECKED, n, device=q.device))[heads]
    want = attend(*few, mask=mask[None], scale=scale).out[0]
    apart = lambda x, y: float((x.double() - y).norm() / y.norm())  # noqa: E731
    out = kernel()
    row = {"length": n, "share": kept_share(lines, n), "tiles": tiles(vertical, lines.slash),
           "error": apart(out[heads, last], want),
           "from exact": apart(out, exact()[0].double()),
           "choose_ms": do_bench(partial(prompt.lines, q, k, scale), rep=60, return_mode="median"),
           "kernel_ms": do_bench_cudagraph(kernel, rep=60, return_mode="median"),
           "exact_ms": do_bench_cudagraph(exact, rep=60, return_mode="median"),
           "gathered_ms": once(partial(attend_lines, q, k, v, lines, scale=scale))}  # fmt: skip
    assert row["error"] < 1e-2, row
    return row


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2000, 8000])
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 10, 19, 28])
    parser.add_argument("--alpha", type=float, nargs="+", default=[0.95, 0.8])
    a = parser.parse_args()
    model, tokenizer = smollm2(dtype=torch.bfloat16, device="cuda")
    rows: list[Row] = []
    for length in a.lengths:
        ids = torch.as_tensor(text_tokens(tokenizer, length, 0, long_text())).reshape(1, -1).to("cuda")

        def look(site: Any, call: Any) -> None:
            for alpha in a.alpha:
                row = {"layer": site.layer, "alpha": alpha, **measured(call, alpha)}
                rows.append(row)
                print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)

        with observe(model, look, where=a.layers):
            model(ids, use_cache=False, logits_to_keep=1)
        write_json(a.out, {"environment": environment(seed=0), "layers": a.layers, "rows": rows})


if __name__ == "__main__":
    main()
