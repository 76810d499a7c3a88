"""The decayed linear kernels on one GPU: right first (float64), then timed beside flash-linear-attention in the same run.

    python benchmarks/linear_gpu.py --out benchmarks/results/linear_gpu.json [--quick] [--tune] [--budget 115]

Errors are relative to the norm, of outputs, final states and all gradients, against the torch form in float64 on the same
rounded inputs; a time counts only when they pass. Times are medians (CUDA events). The floor is the larger of bytes (inputs
and outputs once) over the measured copy speed and FLOPs over the measured matrix speed. Kernels are compiled first, by
several processes at once. Every row reaches the disk as it is made; rows that the budget (seconds) leaves no room for are
named. --tune tries other launch settings instead.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.testing import do_bench

from qkv.bench.environment import environment, write_json
from qkv.kernels import decayed as kernels
from qkv.ops._common.decayed import decayed_linear_attention

DEVICE = "cuda"
BEGUN = time.monotonic()
GATES = ("none", "scalar", "vector")
LONG = [(4, 16, 4096, 128), (1, 16, 65536, 128)]  # B, H, N, D
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LIMITS = {"bf16": 2e-2, "fp16": 5e-3, "fp32": 1e-4}
# What is checked: dtype, gate, sizes B H G N D E, log-decays drawn or of one value (None: none)
CHECKS: list[tuple[str, str, tuple[int, ...], str]] = [
    *(
        ("bf16", gate, sizes, "drawn")
        for gate in GATES
        for sizes in ((2, 4, 4, 1024, 128, 128), (1, 6, 2, 997, 128, 128))
    ),
    *(
        ("bf16", gate, (1, 2, 2, 777, 128, 128), decay)
        for gate in GATES[1:]
        for decay in ("-20", "-20 at times", "-0.001")
    ),
    *(("fp32", gate, sizes, "drawn") for gate in GATES for sizes in ((2, 4, 2, 515, 64, 64), (1, 3, 3, 130, 64, 64))),
    *(("fp32", gate, (1, 2, 2, 300, 64, 64), "-20 at times") for gate in GATES[1:]),
    *(("fp16", gate, (2, 4, 2, 515, 64, 64), "drawn") for gate in GATES[:2]),
    *(("bf16", gate, (2, 3, 3, 200, 40, 24), "drawn") for gate in GATES),
]
TRIES: dict[str, list[tuple[int, ...]]] = {  # tile, warps, stages, fill
    "scan": [(64, 8, 2, 1), (64, 4, 2, 1), (64, 4, 1, 1), (32, 4, 2, 1), (32, 4, 1, 1), (128, 8, 1, 1), (32, 4, 2, 2)],
    "sum": [(64, 8, 1, 1), (64, 8, 2, 1), (32, 4, 1, 1), (32, 8, 1, 1), (128, 8, 1, 1), (64, 8, 1, 2)],
    "each": [(64, 8, 2, 1), (64, 8, 1, 1), (32, 4, 1, 1), (32, 8, 2, 1), (32, 4, 2, 2)],
    "map": [(32, 8, 1), (32, 4, 1), (64, 8, 1), (16, 4, 1)],
    "owed": [(32, 8, 1), (32, 4, 1), (64, 8, 1), (16, 4, 1)],
}  # fmt: skip


def draw(
    sizes: tuple[int, ...], gate: str, dtype: torch.dtype, decay: str = "drawn"
) -> tuple[list[Tensor], Tensor | None]:
    """q, k, v and the log-decays (float32), q and k of unit norm as behind a normalisation."""
    b, h, g, n, d, e = sizes
    q, k = (torch.nn.functional.normalize(torch.randn(b, x, n, d, device=DEVICE), dim=-1) for x in (h, g))
    v = torch.randn(b, g, n, e, device=DEVICE)
    tensors = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    if gate == "none":
        return tensors, None
    shape = (b, h, n) if gate == "scalar" else (b, h, n, d)
    log = torch.nn.functional.logsigmoid(torch.randn(shape, device=DEVICE)) / 4
    if decay == "-20 at times":
        log = torch.where(torch.rand(shape, device=DEVICE) < 0.2, -20.0, log)
    elif decay != "drawn":
        log = torch.full(shape, float(decay), device=DEVICE)
    return tensors, log.requires_grad_()


def results(
    tensors: list[Tensor], log: Tensor | None, start: Tensor, weights: list[Tensor], form: str
) -> dict[str, Tensor]:
    """Output, final state and every gradient of one loss over both, by name."""
    given = (
        dict(zip(("q", "k", "v"), tensors, strict=True))
        | {"state": start}
        | ({} if log is None else {"log_decay": log})
    )
    wide = torch.float64 if form == "chunked" else None
    leaves = {n: x.detach().to(wide or x.dtype).requires_grad_() for n, x in given.items()}
    out, state, _ = decayed_linear_attention(**leaves, scale=1.0, form=form)  # type: ignore[arg-type]
    loss = (out.double() * weights[0]).sum() + (state.double() * weights[1]).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"out": out, "state": state} | {f"d {n}": x for n, x in zip(leaves, grads, strict=True)}


def check(dtype: str, gate: str, sizes: tuple[int, ...], decay: str) -> dict[str, Any]:
    """One row: the relative errors, and whether all pass. Gates: relative to q dq, from which their gradient comes."""
    b, h, _, n, d, e = sizes
    torch.manual_seed(n + d)
    tensors, log = draw(sizes, gate, DTYPES[dtype], decay)
    start = torch.randn(b, h, d, e, device=DEVICE) * 0.3
    weights = [torch.randn(b, h, n, e, device=DEVICE), torch.randn(b, h, d, e, device=DEVICE)]
    got, want = (results(tensors, log, start, weights, form) for form in ("triton", "chunked"))
    errors = {}
    for name, x in want.items():
        size = x.norm()
        if name == "d log_decay":
            made = (
                (tensors[0].double() * want["d q"]).sum(-1) if gate == "scalar" else tensors[0].double() * want["d q"]
            )
            size = torch.maximum(size, made.norm())
        errors[name] = ((got[name].double() - x).norm() / size).item()
    passed = all(error < LIMITS[dtype] for error in errors.values())  # NaN fails
    return {"dtype": dtype, "gate": gate, "sizes": list(sizes), "decay": decay, "errors": errors, "passed": passed}


def timed(run: Callable[[], Any], quick: bool = False) -> float:
    """Median milliseconds."""
    return do_bench(run, warmup=5 if quick else 15, rep=20 if quick else 60, return_mode="median")


def ceilings() -> dict[str, float]:
    """Copy in TB/s (bytes read and written) and bf16 matrix products in TFLOP/s, measured."""
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    x = torch.randn(2**29, device=DEVICE, dtype=torch.bfloat16)
    y = torch.empty_like(x)
    return {
        "TB/s": 4 * x.numel() / timed(lambda: y.copy_(x)) / 1e9,
        "TFLOP/s": 2 * 8192**3 / timed(lambda: a @ b) / 1e9,
    }


def floor(sizes: tuple[int, ...], gate: str, backward: bool, limits: dict[str, float]) -> float:
    """Milliseconds below which no version can be: bytes or FLOPs, whichever takes longer."""
    b, h, n, d = sizes
    tokens = b * h * n
    gates = 4 * tokens * {"none": 0, "scalar": 1, "vector": d}[gate]
    moved, flops = 4 * 2 * tokens * d + gates, tokens * (2 * kernels.CHUNK * d + 4 * d * d)
    if backward:  # q, k, v, do in; dq, dk, dv out; three passes of the forward's size
        moved, flops = moved + 7 * 2 * tokens * d + 2 * gates, 4 * flops
    return max(moved / limits["TB/s"] / 1e9, flops / limits["TFLOP/s"] / 1e9)


def ours(sizes: tuple[int, ...], gate: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Forward, and forward with backward, of our kernel."""
    b, h, n, d = sizes
    tensors, log = draw((b, h, h, n, d, d), gate, torch.bfloat16)
    grad, leaves = (
        torch.randn(b, h, n, d, device=DEVICE, dtype=torch.bfloat16),
        [*tensors, *([] if log is None else [log])],
    )

    def forward() -> Tensor:
        return decayed_linear_attention(*tensors, log_decay=log, scale=d**-0.5, form="triton").out

    return lambda: _quiet(forward), lambda: torch.autograd.grad(forward(), leaves, grad)


def _quiet(run: Callable[[], Any]) -> Any:
    with torch.no_grad():
        return run()


def theirs(sizes: tuple[int, ...], gate: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The same of flash-linear-attention, in its own layout ``[B, T, H, D]``."""
    from fla.ops.gla import chunk_gla  # pyright: ignore[reportMissingImports]
    from fla.ops.simple_gla import chunk_simple_gla  # pyright: ignore[reportMissingImports]

    b, h, n, d = sizes
    tensors, log = draw((b, h, h, n, d, d), gate, torch.bfloat16)
    q, k, v = (x.detach().transpose(1, 2).contiguous().requires_grad_() for x in tensors)
    grad = torch.randn(b, n, h, d, device=DEVICE, dtype=torch.bfloat16)
    g = None if log is None else log.detach().transpose(1, 2).contiguous().requires_grad_()
    run = chunk_gla if gate == "vector" else chunk_simple_gla

    def forward() -> Tensor:
        return run(q, k, v, g, scale=d**-0.5)[0]

    return lambda: _quiet(forward), lambda: torch.autograd.grad(forward(), [q, k, v, *([] if g is None else [g])], grad)


def attempt(run: Callable[[], Any], quick: bool) -> float | str:
    """Milliseconds, or why there are none."""
    try:
        return timed(run, quick)
    except Exception as reason:  # a peer that refuses is a result
        return f"{type(reason).__name__}: {' '.join(str(reason).split())[:300]}"


def step(b: int, h: int, d: int, limits: dict[str, float], quick: bool) -> dict[str, Any]:
    """The fused one-token step: the state read and written once."""
    tensors, log = draw((b, h, h, 1, d, d), "vector", torch.bfloat16)
    q, k, v = (x.detach() for x in tensors)
    state = torch.randn(b, h, d, d, device=DEVICE)
    assert log is not None
    g = log.detach()
    rows: dict[str, Any] = {
        "what": "one token",
        "sizes": [b, h, 1, d],
        "floor_ms": 8 * state.numel() / limits["TB/s"] / 1e9,
    }
    for form in ("triton", "recurrent"):
        run = lambda form=form: decayed_linear_attention(q, k, v, log_decay=g, state=state, form=form)  # noqa: E731 # type: ignore[arg-type]
        rows[f"{form}_ms"] = attempt(lambda run=run: _quiet(run), quick)
    return rows


class Rows:
    """Rows by kind, written to the disk as they come."""

    def __init__(self, out: Path, budget: float) -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        self.out, self.budget = out, budget
        self.facts: dict[str, Any] = environment(seed=0) | {"launch": kernels.LAUNCH}

    def add(self, kind: str, row: Any) -> None:
        self.facts.setdefault(kind, []).append(row)
        print(f"{self.seconds():5.0f} s  {kind}: {row}", flush=True)
        self.write()

    def write(self) -> None:
        write_json(self.out, self.facts | {"seconds": self.seconds()})

    def seconds(self) -> float:
        return time.monotonic() - BEGUN

    def room(self, what: str, needed: float) -> bool:
        """Whether `needed` seconds are left; what is not run is named."""
        if self.seconds() + needed <= self.budget:
            return True
        self.add("not run", what)
        return False


def settle(name: str, made: tuple[int, ...]) -> None:
    """One kernel's launch settings."""
    kernels.LAUNCH[name] = dict(zip(("tile", "warps", "stages", "fill"), made, strict=False))


def warm(jobs: list[str], seconds: float) -> None:
    """Compile in processes of their own, which share Triton's cache."""
    running = [subprocess.Popen([sys.executable, __file__, "--job", job], stdout=subprocess.DEVNULL) for job in jobs]
    end = time.monotonic() + seconds
    for process in running:
        try:
            process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


def compile_job(job: str) -> None:
    """`dtype gate`: what its checks need; `long gate`: the timed shapes; `fla gate`; or `kernel tile warps stages fill`."""
    kind, *rest = job.split()
    if kind == "long":
        for sizes in LONG:
            ours(sizes, rest[0])[1]()
    elif kind == "fla":
        runs = theirs(LONG[0], rest[0])
        runs[0]()
        if rest[0] == "vector":
            runs[1]()
    elif kind in DTYPES:
        for dtype, gate, sizes, decay in CHECKS:
            if (dtype, gate) == (kind, rest[0]):
                check(dtype, gate, sizes, decay)
    else:
        settle(kind, tuple(map(int, rest)))
        for sizes in LONG:
            ours(sizes, "scalar" if kind == "scan" else "vector")[1]()
    torch.cuda.synchronize()


def tune(rows: Rows) -> None:
    """Every setting of every kernel, the others as they are; the table ends with the best of each."""
    tries = [(name, made) for name, all_of in TRIES.items() for made in all_of]
    cores = max(2, (os.cpu_count() or 2) - 1)
    jobs = [" ".join(map(str, (name, *made))) for name, made in tries]
    for part in range(0, len(jobs), cores):
        if rows.room(f"compiling {jobs[part : part + cores]}", 20):
            warm(jobs[part : part + cores], 30)
    before, best = dict(kernels.LAUNCH), {}
    for name, made in tries:
        if not rows.room(f"{name} {made}", 3):
            continue
        settle(name, made)
        row: dict[str, Any] = {"kernel": name, "settings": kernels.LAUNCH[name]}
        for sizes in LONG:
            runs = ours(sizes, "scalar" if name == "scan" else "vector")
            row[f"N{sizes[2]}"] = [attempt(run, True) for run in runs]
        rows.add("tuned", row)
        times = [x for sizes in LONG for x in row[f"N{sizes[2]}"]]
        if all(isinstance(x, float) for x in times):
            best[name] = min(best.get(name, (1e9, None)), (sum(times), made))
        kernels.LAUNCH.update(before)
    rows.facts["best"] = {name: made for name, (_, made) in best.items()}
    print(f"best (tile, warps, stages, fill): {rows.facts['best']}", flush=True)
    rows.write()


def measure(rows: Rows, quick: bool) -> None:
    """Checks, then times."""
    sizes_of = LONG[:1] if quick else LONG
    try:
        import fla  # noqa: F401 # pyright: ignore[reportMissingImports]

        peer = True
    except ImportError as reason:
        rows.add("peer", f"flash-linear-attention cannot be imported: {reason}")
        peer = False
    jobs = [f"{dtype} {gate}" for dtype, gate in dict.fromkeys((x[0], x[1]) for x in CHECKS)]
    jobs = [*(f"long {gate}" for gate in GATES[::-1]), *jobs, *(f"fla {gate}" for gate in GATES[::-1] if peer)]
    warm(jobs, rows.budget / 2)
    rows.facts["ceilings"] = limits = ceilings()
    print(f"{rows.seconds():5.0f} s  {limits}", flush=True)
    right: dict[str, bool] = dict.fromkeys(GATES, True)
    for case in CHECKS:
        if rows.room(f"check {case}", 8):
            row = check(*case)
            right[case[1]] &= row["passed"]
            rows.add("checks", row)
    for sizes, gate in itertools.product(sizes_of, GATES):
        row = {"what": gate, "sizes": list(sizes), "right": right[gate]}
        for side, make in (("ours", ours), ("fla", theirs)):
            if (side == "fla" and not peer) or not rows.room(f"{side} {gate} {sizes}", 6):
                continue
            runs = make(sizes, gate)
            for what, run in zip(("forward", "both"), runs, strict=True):
                row[f"{side}_{what}_ms"] = attempt(run, quick)
                row[f"floor_{what}_ms"] = floor(sizes, gate, what == "both", limits)
            del runs
            torch.cuda.empty_cache()
        rows.add("times", row)
    for b in (1, 64):
        rows.add("steps", step(b, 16, 128, limits, quick))
    print(f"\n{'':<8}{'sizes':<24}{'pass':<10}{'ours':>9}{'fla':>9}{'floor':>9}  ms", flush=True)
    for row, what in itertools.product(rows.facts["times"], ("forward", "both")):
        cells = [row.get(f"{side}_{what}_ms") for side in ("ours", "fla", "floor")]
        shown = [f"{x:9.3f}" if isinstance(x, float) else f"{'refused' if x else '-':>9}" for x in cells]
        print(
            f"{row['what']:<8}{row['sizes']!s:<24}{what:<10}{''.join(shown)}  {'' if row['right'] else 'WRONG'}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="one shape, shorter timing")
    parser.add_argument("--tune", action="store_true", help="try other launch settings; under 60 s")
    parser.add_argument("--budget", type=float, help="seconds in all (115; 55 with --tune)")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.job:
        compile_job(a.job)
        return
    if a.out is None:
        parser.error("--out is needed")
    rows = Rows(a.out, a.budget or (55 if a.tune else 115))
    if a.tune:
        tune(rows)
    else:
        measure(rows, a.quick)
    rows.write()


if __name__ == "__main__":
    main()
