"""Sparse reads on one GPU: choosing and reading a sixteenth of the keys, against reading all of them.

    python benchmarks/sparse_gpu.py --out benchmarks/results/sparse_gpu.json [--part attention|model] [--budget 75]

Checks first (a captured step against the same choice in plain torch; tokens of a captured model against plain decoding), then
times; all is compiled before, at once, by processes of their own. Rows reach the disk as they are made, over those of the same
part of an earlier run; what the budget (seconds) leaves no room for is named. --part model: a whole model instead. The attention
part is a whole step of one layer as a CUDA graph: the new token is stored, its page described, all pages or tokens scored, the
best chosen, and read. Between repeats another buffer is written, so that nothing waits in the cache of the device. The bound is
the bytes that must be read over the rate at which the device copies.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
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
BEGUN = time.monotonic()
CHECKS = (
    "quest:budget=256", "quest:budget=256,share=query_head", "quest:budget=0.1", "double-sparsity:budget=200",
    "double-sparsity:budget=200,label_bits=16", "tidaldecode:budget=200",
)  # fmt: skip
SHAPES = [(16, 32, 8, 32768, 128), (1, 32, 8, 131072, 128)]


class Rows:
    """Rows by kind, written as they come; a part that is not run keeps the rows it had, with where they come from."""

    def __init__(self, out: Path, part: str, budget: float) -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        self.out, self.budget = out, budget
        self.facts: dict[str, Any] = environment(seed=0)
        own = ("checks", "attention", "not run") if part == "attention" else ("model", "model not run")
        self.missing = own[-1]
        if out.exists():
            before = json.loads(out.read_text(encoding="utf-8"))
            kept = {
                k: v for k, v in before.items() if k in ("checks", "attention", "model", "copy_rate") and k not in own
            }
            self.facts |= kept | ({"kept_from": before.get("commit")} if kept else {})

    def add(self, kind: str, row: Any) -> None:
        self.facts.setdefault(kind, []).append(row)
        print(f"{time.monotonic() - BEGUN:4.0f} s  {kind}: {row}", flush=True)
        self.write()

    def room(self, what: str, needed: float) -> bool:
        """Whether so many seconds are left; what is not run is named."""
        if time.monotonic() - BEGUN + needed <= self.budget:
            return True
        self.add(self.missing, what)
        return False

    def write(self) -> None:
        write_json(self.out, self.facts | {"seconds": time.monotonic() - BEGUN})


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
    q = torch.randn(b, 1, m, d, device=DEVICE, dtype=torch.bfloat16).expand(b, h, m, d)
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


def check(name: str, b: int, h: int, g: int, m: int, d: int) -> dict[str, Any]:
    """Error of a captured step against exact attention over what the eager step says it read, relative to the output."""
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
    read = int((slot >= 0).sum(-1).max())
    plainly = float((plain.double() - want).norm() / want.norm())
    return {"error": error, "error_of_plain": plainly, "read": read, "of": m + 1, "passed": error < 1e-2}


def sparse(m: int, b: int, g: int, d: int) -> list[tuple[str, int]]:
    """Methods at a sixteenth of m tokens, and the bytes by which each chooses."""
    kv = 2 * b * g * m * d * 2
    return [
        (f"quest:budget={m // 16}", kv // 16),
        (f"quest:budget={m // 16},share=query_head", kv // 16),
        (f"double-sparsity:budget={m // 16}", b * g * m * (d // 16 // 2 + 4)),
        (f"double-sparsity:budget={m // 16},label_bits=16", b * g * m * d // 16 * 2),
    ]


def attention_part(b: int, h: int, g: int, m: int, d: int, rate: float, out: Rows) -> None:
    """A row per way of attending: milliseconds, ratio to the exact kernels, and the bound by bytes."""
    geometry, budget = Geometry(h, g, d, d, layer=5, layers=32), m // 16
    kv = 2 * b * g * m * d * 2

    def note(name: str, ms: float, moved: float, **more: Any) -> None:
        row = {"shape": [b, h, g, m, d], "name": name, "ms": ms, "bound_ms": moved / rate * 1e3, **more}
        out.add("attention", row)

    dense = filled(DenseCache(geometry), b, h, g, m, d)
    run, (q, _, _) = a_step(dense, b, h, g, m, d)
    graph, _ = captured(run)
    note("full, captured step", full := timed(graph.replay), kv)
    k, v = dense.buffers()
    length = torch.tensor([m], dtype=torch.int32, device=DEVICE)
    graph, _ = captured(partial(decode_attention, q, k, v, length=length, scale=d**-0.5))
    note("  decode_attention alone", timed(graph.replay), kv)
    packed, kk, vv = q.reshape(b, g, h // g, d), k[:, :, :m], v[:, :, :m]
    exact: list[float] = []
    for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):
        try:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                exact.append(timed(partial(torch.nn.functional.scaled_dot_product_attention, packed, kk, vv)))
            note(f"torch SDPA {backend}", exact[-1], kv)
        except RuntimeError as reason:
            print(backend, str(reason)[:80])
    best = min([full, *exact])
    del dense, run, graph, k, v, kk, vv, packed
    gc.collect()
    torch.cuda.empty_cache()
    for name, index in sparse(m, b, g, d):
        if not out.room(f"{name} at {[b, h, g, m, d]}", 4):
            continue
        memory: Any = filled(qkv.method(name).layer(geometry), b, h, g, m, d)
        run, _ = a_step(memory, b, h, g, m, d)
        graph, _ = captured(run)
        chosen = budget * (h if "query_head" in name else g) * b * d * 2 * 2
        ms = timed(graph.replay)
        note(name, ms, index + chosen, over_full=full / ms, over_best_exact=best / ms, index_bytes=index)
        if name == f"quest:budget={budget}":
            pieces(memory, q, m, d, b, h, g, note)
        del memory, run, graph
        gc.collect()
        torch.cuda.empty_cache()


def pieces(memory: Any, q: torch.Tensor, m: int, d: int, b: int, h: int, g: int, note: Callable[..., None]) -> None:
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


def model_part(layers: int, shapes: list[tuple[int, int]], new: int, rows: Rows) -> None:
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
    for b, m in shapes:
        ids = torch.randint(1, 32000, (b, m), device=DEVICE)
        settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "prefill_chunk_size": 4096}
        for name in ("full", f"quest:budget={m // 16}", f"double-sparsity:budget={m // 16}"):
            if not rows.room(f"{name} in a model, {b} x {m}", 10):
                continue
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
            rows.add("model", row | {"tokens_as_plain": same})
            gc.collect()
            torch.cuda.empty_cache()


def compiled(jobs: list[list[str]], until: float) -> None:
    """Compile what the jobs run, each in a process of its own; they share Triton's cache."""
    running = [subprocess.Popen([sys.executable, __file__, "--job", *job], stderr=subprocess.DEVNULL) for job in jobs]
    for process in running:
        try:
            process.wait(max(0.1, until - (time.monotonic() - BEGUN)))
        except subprocess.TimeoutExpired:
            process.kill()


def job(kind: str, name: str, b: int, m: int) -> None:
    """One captured step of a check, or of a timed method."""
    if kind == "check":
        check(name, b, 32, 8, m, 128)
        return
    geometry = Geometry(32, 8, 128, 128, layer=5, layers=32)
    memory: Any = DenseCache(geometry) if name == "full" else qkv.method(name).layer(geometry)
    memory = filled(memory, b, 32, 8, m, 128)
    run, (q, _, _) = a_step(memory, b, 32, 8, m, 128)
    captured(run)
    if name == f"quest:budget={m // 16}":
        pieces(memory, q, m, 128, b, 32, 8, lambda *_, **__: None)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--part", choices=("attention", "model"), default="attention")
    parser.add_argument("--quick", action="store_true", help="one small shape")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--budget", type=float, default=75.0, help="seconds in all")
    parser.add_argument("--job", nargs=4, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.job:
        job(a.job[0], a.job[1], int(a.job[2]), int(a.job[3]))
        return
    if a.out is None:
        parser.error("--out is needed")
    rows = Rows(a.out, a.part, a.budget)
    if a.part == "model":
        model_part(a.layers, [(1, 4096)] if a.quick else [(1, 32768), (8, 32768)], 32, rows)
        rows.write()
        return
    shapes = [(2, 32, 8, 8192, 128)] if a.quick else SHAPES
    jobs = [["check", name, "2", "3000"] for name in CHECKS]
    b, _, g, m, d = shapes[0]  # the other shape needs little beyond
    jobs += [["step", name, str(b), str(m)] for name in ("full", *(name for name, _ in sparse(m, b, g, d)))]
    compiled(jobs, a.budget / 2)
    rows.facts["copy_rate"] = rate = copy_rate()
    print(f"copy {rate / 1e12:.2f} TB/s", flush=True)
    for name in CHECKS:
        if rows.room(f"check {name}", 3):
            rows.add("checks", {"method": name} | check(name, 2, 32, 8, 3000, 128))
    for shape in shapes:
        if rows.room(f"attention at {list(shape)}", 8):
            attention_part(*shape, rate, rows)
    rows.write()


if __name__ == "__main__":
    main()
