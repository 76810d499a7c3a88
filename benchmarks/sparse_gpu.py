"""Sparse reads on one GPU: choosing and reading a sixteenth of the keys, against reading all of them.

    python benchmarks/sparse_gpu.py --out benchmarks/results/sparse_gpu.json [--quick] [--skip-model] [--skip-attention]

Checks first (a captured step against the same choice in plain torch; tokens of a captured model against plain decoding), then
times. The attention part is a whole step of one layer as a CUDA graph: the new token is stored, its page described, all pages
or tokens scored, the best chosen, and read. Between repeats another buffer is written, so that nothing waits in the cache of
the device. The bound is the bytes that must be read over the rate at which the device copies.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import qkv
from qkv.bench.environment import environment, write_json
from qkv.caches._stores.dense import DenseCache
from qkv.core.attend import attend
from qkv.core.cache import Geometry, LayerCache, Now, Step
from qkv.kernels.decode import decode_attention
from qkv.kernels.gather import gather_attention, page_scores, select

DEVICE = "cuda"
FLUSH = 1 << 28


def timed(run: Callable[[], Any], repeats: int = 30) -> float:
    """Median milliseconds by device events, the device's cache flushed before each."""
    junk = torch.empty(FLUSH, dtype=torch.uint8, device=DEVICE)
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        junk.zero_()
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        run()
        b.record()
        b.synchronize()
        times.append(a.elapsed_time(b))
    return statistics.median(times)


def copy_rate() -> float:
    """Bytes per second of a device copy, reads and writes counted."""
    x = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    y = torch.empty_like(x)
    return 2 * x.numel() / timed(partial(y.copy_, x), 10) * 1e3


def captured(run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of `run` and its output."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph, out


def filled(memory: LayerCache, b: int, h: int, g: int, m: int, d: int, seed: int = 0) -> LayerCache:
    """A memory that has absorbed a prompt of m tokens, without the attention of a prompt."""
    torch.manual_seed(seed)
    memory.reserve(m + 64)
    k = torch.randn(b, g, m, d, device=DEVICE, dtype=torch.bfloat16)
    q = torch.randn(b, h, m, d, device=DEVICE, dtype=torch.bfloat16)
    position = torch.arange(m, device=DEVICE, dtype=torch.int32).expand(b, m)
    memory.attend(q, k, torch.randn_like(k), Step(position, d**-0.5, compute=lambda q, k, v, **_: q))
    return memory


def a_step(
    memory: LayerCache, b: int, h: int, g: int, m: int, d: int
) -> tuple[Callable[[], Any], tuple[torch.Tensor, ...]]:
    """The next token of a memory, again and again."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(b, n, 1, d, device=DEVICE, dtype=torch.bfloat16) for n in (h, g, g))
    now = Now(
        torch.full((1,), m, device=DEVICE), torch.full((1,), m + 1, device=DEVICE, dtype=torch.int32),
        torch.full((b, 1), m, device=DEVICE, dtype=torch.int32),
    )  # fmt: skip
    assert memory.static()
    counters = memory.counters()

    def run() -> torch.Tensor:
        memory.recount({n: list(x) if isinstance(x, list) else x for n, x in counters.items()})
        return memory.step(q, k, v, d**-0.5, now)

    return run, (q, k, v)


def check(name: str, b: int, h: int, g: int, m: int, d: int) -> float:
    """Largest error of a captured step against exact attention over what the eager step says it read, relative to the output."""
    geometry = Geometry(h, g, d, d, layer=5, layers=32)
    memory: Any = filled(qkv.method(name).layer(geometry), b, h, g, m, d)
    run, (q, k, v) = a_step(memory, b, h, g, m, d)
    graph, out = captured(run)
    graph.replay()
    got = out.clone()
    twin: Any = filled(qkv.method(name).layer(geometry), b, h, g, m, d)
    said: list[Any] = []
    twin.watch = said.append
    plain = twin.attend(q, k, v, Step(torch.full((b, 1), m, device=DEVICE, dtype=torch.int32), d**-0.5))
    mask = torch.zeros(b, said[-1].slot.shape[1], m + 2, dtype=torch.bool, device=DEVICE)
    slot = said[-1].slot[:, :, 0]
    mask.scatter_(-1, slot.masked_fill(slot < 0, m + 1), True)
    keys, values = (x[:, :, : m + 1].double() for x in (twin.keys, twin.values))
    want = attend(q.double(), keys, values, mask=mask[..., None, : m + 1], scale=d**-0.5).out
    error = float((got.double() - want).norm() / want.norm())
    assert error < 1e-2, (name, error, float((plain.double() - want).norm() / want.norm()))
    read = int((slot >= 0).sum(-1).max())
    print(f"{name}: relative error {error:.2e}, {read} of {m + 1} tokens read", flush=True)
    return error


def attention_part(b: int, h: int, g: int, m: int, d: int, rate: float) -> list[dict]:
    """A row per way of attending: milliseconds, ratio to the exact kernels, and the bound by bytes."""
    geometry, budget = Geometry(h, g, d, d, layer=5, layers=32), m // 16
    rows: list[dict] = []
    kv = 2 * b * g * m * d * 2

    def note(name: str, ms: float, moved: float, **more: Any) -> None:
        rows.append({"shape": [b, h, g, m, d], "name": name, "ms": ms, "bound_ms": moved / rate * 1e3, **more})
        print(rows[-1], flush=True)

    dense = filled(DenseCache(geometry), b, h, g, m, d)
    run, (q, _, _) = a_step(dense, b, h, g, m, d)
    graph, _ = captured(run)
    note("full, captured step", timed(graph.replay), kv)
    full = rows[-1]["ms"]
    k, v = dense.buffers()
    length = torch.tensor([m], dtype=torch.int32, device=DEVICE)
    graph, _ = captured(partial(decode_attention, q, k, v, length=length, scale=d**-0.5))
    note("  decode_attention alone", timed(graph.replay), kv)
    packed, kk, vv = q.reshape(b, g, h // g, d), k[:, :, :m], v[:, :, :m]
    for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):
        try:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                note(
                    f"torch SDPA {backend}",
                    timed(partial(torch.nn.functional.scaled_dot_product_attention, packed, kk, vv)),
                    kv,
                )
        except RuntimeError as reason:
            print(backend, str(reason)[:80])
    del dense, run, graph, k, v, kk, vv, packed
    gc.collect()
    torch.cuda.empty_cache()
    for name, index in (
        (f"quest:budget={budget}", kv // 16),
        (f"quest:budget={budget},share=query_head", kv // 16),
        (f"double-sparsity:budget={budget}", b * g * m * (d // 16 // 2 + 4)),
        (f"double-sparsity:budget={budget},label_bits=16", b * g * m * d // 16 * 2),
    ):
        memory: Any = filled(qkv.method(name).layer(geometry), b, h, g, m, d)
        run, _ = a_step(memory, b, h, g, m, d)
        graph, _ = captured(run)
        chosen = budget * (h if "query_head" in name else g) * b * d * 2 * 2
        note(name, ms := timed(graph.replay), index + chosen, over_full=full / ms, index_bytes=index)
        if name == f"quest:budget={budget}":
            pieces(rows, memory, q, m, d, b, h, g, note)
        del memory, run, graph
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def pieces(
    rows: list[dict], memory: Any, q: torch.Tensor, m: int, d: int, b: int, h: int, g: int, note: Callable[..., None]
) -> None:
    """The parts of quest's step."""
    position = torch.full((b,), m, dtype=torch.int32, device=DEVICE)
    bounds, count = memory.features["bounds"], m // 16 // 16
    worth = page_scores(q, bounds, position, block=16)
    index = select(worth, position, count, block=16)
    kv = 2 * b * g * m * d * 2
    read = partial(gather_attention, q, memory.keys, memory.values, index, position, block=16, scale=d**-0.5)
    for name, run, moved in (
        ("page scores", partial(page_scores, q, bounds, position, block=16), kv / 16),
        ("select", partial(select, worth, position, count, block=16), worth.numel() * 4),
        ("gather attention", read, kv / 16),
    ):  # fmt: skip
        graph, _ = captured(run)
        note(f"  {name}", timed(graph.replay), moved)


def model_part(layers: int, shapes: list[tuple[int, int]], new: int) -> list[dict]:
    """Milliseconds per token of an 8B-shaped model with few layers, captured: full against sparse reads at 1/16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=1 << 18,
    )  # fmt: skip
    with torch.device(DEVICE):
        torch.set_default_dtype(torch.bfloat16)
        model: Any = LlamaForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
    rows = []
    for b, m in shapes:
        ids = torch.randint(1, 32000, (b, m), device=DEVICE)
        settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "prefill_chunk_size": 4096}
        for name in ("full", f"quest:budget={m // 16}", f"double-sparsity:budget={m // 16}"):
            spans, out = [], None
            qkv.apply(model, name, graph=True)
            try:
                for n in (4, 8, 8 + new):  # the first compiles
                    torch.cuda.synchronize()
                    t = time.perf_counter()
                    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, **settings)
                    torch.cuda.synchronize()
                    spans.append(time.perf_counter() - t)
            finally:
                qkv.revert(model)
            same = None
            if name != "full" and b == 1:
                with qkv.applied(model, name):
                    plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, **settings)
                assert out is not None
                same = float((plain[:, m : m + 16] == out[:, m : m + 16]).float().mean())
            ms = (spans[2] - spans[1]) / new * 1e3
            row = {"model": f"8B shape, {layers} layers", "batch": b, "context": m, "method": name, "ms_per_token": ms}
            rows.append(row | {"tokens_as_plain": same})
            print(rows[-1], flush=True)
            gc.collect()
            torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--skip-model", action="store_true")
    parser.add_argument("--skip-attention", action="store_true")
    parser.add_argument("--layers", type=int, default=8)
    a = parser.parse_args()
    with torch.no_grad():
        checks = {
            name: check(name, 2, 32, 8, 3000, 128)
            for name in (
                "quest:budget=256", "quest:budget=256,share=query_head", "quest:budget=0.1",
                "double-sparsity:budget=200", "double-sparsity:budget=200,label_bits=16", "tidaldecode:budget=200",
            )
        }  # fmt: skip
        rate = copy_rate()
        print(f"copy {rate / 1e12:.2f} TB/s", flush=True)
        shapes = [(2, 32, 8, 8192, 128)] if a.quick else [(16, 32, 8, 32768, 128), (1, 32, 8, 131072, 128)]
        rows = [] if a.skip_attention else [row for shape in shapes for row in attention_part(*shape, rate)]
        result = environment(seed=0) | {"copy_rate": rate, "checks": checks, "attention": rows, "model": []}
        write_json(a.out, result)
        models = [] if a.skip_model else model_part(a.layers, [(1, 4096)] if a.quick else [(1, 32768), (8, 32768)], 32)
    write_json(a.out, result | {"model": models})


if __name__ == "__main__":
    main()
