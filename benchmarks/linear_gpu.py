"""The decayed linear kernels on one GPU: timed beside flash-linear-attention in the same run, and right (float64).

    python benchmarks/linear_gpu.py --out benchmarks/results/linear_gpu.json [--part times|checks] [--tune] [--budget 110]

Errors are relative to the norm, of outputs, final states and all gradients, against the torch form in float64 on the same
rounded inputs; beside them those of the peer where it runs. A row of times says `passed: false` when a check of its gate does
not pass; it is timed all the same. Times are medians (CUDA events). The floor is the larger of bytes (inputs and outputs once)
over the measured copy speed and FLOPs over the measured matrix speed. Kernels are compiled by many processes at once, the
peer's candidates for its own tuning too; those processes stand still while anything is timed, and the peer tunes alone. The
most important rows come first; every row reaches the disk as it is made, and rows that the budget (seconds) leaves no room for
are named. --part checks runs the long list of checks instead, --tune tries other launch settings.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.testing import do_bench

from qkv.bench.environment import environment, write_json
from qkv.kernels import decayed as kernels
from qkv.ops._common.decayed import _decay, decayed_linear_attention

DEVICE = "cuda"
BEGUN = time.monotonic()
GATES = ("none", "scalar", "vector")
ROWS = ("scalar", "vector", "fixed", "none")  # what is timed, in order; fixed: one decay per head, without a gradient
LONG = [(4, 16, 4096, 128), (1, 16, 65536, 128)]  # B, H, N, D
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SMALL = [(4, 16, 256, 128), (1, 16, 1024, 128)]  # for compiling: the second is cut into segments as the long ones are
EARLY = (2, 4, 4, 1024, 128, 128)  # these checks need no kernel that the timed rows do not
PEERS = {"scalar": 6, "vector": 9, "fixed": 4}  # processes that compile the peer's candidates
LIMITS = {"bf16": 2e-2, "fp16": 5e-3, "fp32": 1e-4}
# What is checked: dtype, gate, sizes B H G N D E, log-decays drawn or of one value (None: none)
CHECKS: list[tuple[str, str, tuple[int, ...], str]] = [
    *(("bf16", gate, sizes, "drawn") for gate in GATES for sizes in (EARLY, (1, 6, 2, 997, 128, 128))),
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
TRIES: dict[str, list[tuple[int, ...]]] = {  # tile, warps, stages, fill, split
    "owed": [(32, 8, 1), (64, 8, 1), (64, 4, 1), (32, 4, 1)],
    "scan": [(128, 8, 2, 1, 2), (128, 8, 3, 1, 2), (64, 8, 2, 1, 1), (64, 8, 2, 2, 1), (64, 4, 2, 2, 1), (64, 4, 2, 4, 1)],
    "sum": [(128, 8, 2, 1, 2), (128, 8, 3, 1, 2), (64, 8, 2, 1, 1), (64, 4, 2, 2, 1), (64, 4, 2, 4, 1)],
    "weigh": [(64, 8, 2, 4), (64, 8, 2, 1), (64, 4, 2, 2), (32, 4, 2, 3)],
    "each": [(64, 8, 2, 1), (64, 8, 2, 2), (64, 8, 2, 3), (64, 8, 1, 2), (64, 4, 2, 3), (32, 4, 2, 3)],
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
    if gate == "fixed":
        return tensors, -8 / h * torch.arange(h, device=DEVICE) * 0.5  # Lightning Attention's, halfway up the layers
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


def relative(got: dict[str, Tensor], want: dict[str, Tensor], q: Tensor, gate: str) -> dict[str, float]:
    """Errors relative to the norm; the gradient of the decay: relative to q dq, from which it comes, where that is larger."""
    errors = {}
    for name, x in want.items():
        size = x.norm()
        if name == "d log_decay":
            made = q.double() * want["d q"]
            size = torch.maximum(size, (made.sum(-1) if gate == "scalar" else made).norm())
        errors[name] = ((got[name].double() - x).norm() / size).item()
    return errors


def check(dtype: str, gate: str, sizes: tuple[int, ...], decay: str) -> dict[str, Any]:
    """One row: the relative errors, and whether all pass."""
    b, h, _, n, d, e = sizes
    torch.manual_seed(n + d)
    tensors, log = draw(sizes, gate, DTYPES[dtype], decay)
    start = torch.randn(b, h, d, e, device=DEVICE) * 0.3
    weights = [torch.randn(b, h, n, e, device=DEVICE), torch.randn(b, h, d, e, device=DEVICE)]
    got, want = (results(tensors, log, start, weights, form) for form in ("triton", "chunked"))
    errors = relative(got, want, tensors[0], gate)
    passed = all(error < LIMITS[dtype] for error in errors.values())  # NaN fails
    return {"dtype": dtype, "gate": gate, "sizes": list(sizes), "decay": decay, "errors": errors, "passed": passed}


def beside(gate: str) -> dict[str, Any]:
    """Our errors and the peer's on the same problem: outputs and gradients, no state given or asked for."""
    b, h, n, d = 4, 16, 2048, 128
    torch.manual_seed(n)
    tensors, log = draw((b, h, h, n, d, d), gate, torch.bfloat16)
    assert log is not None
    weight = torch.randn(b, h, n, d, device=DEVICE, dtype=torch.bfloat16)
    leaves = [*tensors, *([log] if log.requires_grad else [])]
    names = ("out", "d q", "d k", "d v", "d log_decay")[: 1 + len(leaves)]

    def named(run: Callable[..., Tensor], given: list[Tensor], decay: Tensor) -> dict[str, Tensor]:
        own = [x.detach().clone().requires_grad_() for x in given]
        fade = decay.detach().clone().requires_grad_(len(leaves) > 3)
        out = run(*own, fade)
        grads = torch.autograd.grad(out, [*own, fade][: len(leaves)], weight.to(out.dtype))
        return dict(zip(names, (out, *grads), strict=True))

    def core(form: str) -> Callable[..., Tensor]:
        return lambda q, k, v, g: decayed_linear_attention(q, k, v, log_decay=g, form=form).out  # type: ignore[arg-type]

    def peer(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        return _peer(gate, q, k, v, g if gate == "fixed" else g.transpose(1, 2).contiguous(), 1.0).transpose(1, 2)

    want = named(core("chunked"), [x.double() for x in tensors], log.double())
    row: dict[str, Any] = {"gate": gate, "sizes": [b, h, n, d]}
    for side, run in (("ours", core("triton")), ("fla", peer)):
        try:
            row[side] = relative(named(run, tensors, log), want, tensors[0], gate)
            row[f"{side}_passed"] = all(error < LIMITS["bf16"] for error in row[side].values())
        except Exception as reason:  # a peer that refuses is a result
            row[side], row[f"{side}_passed"] = _said(reason), False
    return row


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
    gates = 4 * tokens * {"none": 0, "fixed": 0, "scalar": 1, "vector": d}[gate]
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
        [*tensors, *([log] if log is not None and log.requires_grad else [])],
    )

    def forward() -> Tensor:
        return decayed_linear_attention(*tensors, log_decay=log, scale=d**-0.5, form="triton").out

    return lambda: _quiet(forward), lambda: torch.autograd.grad(forward(), leaves, grad)


def _quiet(run: Callable[[], Any]) -> Any:
    with torch.no_grad():
        return run()


def _peer(gate: str, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float) -> Tensor:
    """flash-linear-attention on its own layout ``[B, T, H, D]``."""
    from fla.ops.gla import chunk_gla  # pyright: ignore[reportMissingImports]
    from fla.ops.simple_gla import chunk_simple_gla  # pyright: ignore[reportMissingImports]

    if gate == "vector":
        return chunk_gla(q, k, v, g, scale=scale)[0]
    if gate == "fixed":  # what its chunk_lightning_attn calls, with the same decays as ours
        return chunk_simple_gla(q, k, v, g_gamma=g, scale=scale)[0]
    return chunk_simple_gla(q, k, v, g, scale=scale)[0]


def theirs(sizes: tuple[int, ...], gate: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The same of the peer."""
    b, h, n, d = sizes
    tensors, log = draw((b, h, h, n, d, d), gate, torch.bfloat16)
    q, k, v = (x.detach().transpose(1, 2).contiguous().requires_grad_() for x in tensors)
    grad = torch.randn(b, n, h, d, device=DEVICE, dtype=torch.bfloat16)
    g = log
    if log is not None and log.requires_grad:
        g = log.detach().transpose(1, 2).contiguous().requires_grad_()
    leaves = [q, k, v, *([g] if g is not None and g.requires_grad else [])]

    def forward() -> Tensor:
        return _peer(gate, q, k, v, g, d**-0.5)

    return lambda: _quiet(forward), lambda: torch.autograd.grad(forward(), leaves, grad)


def _said(reason: Exception) -> str:
    return f"{type(reason).__name__}: {' '.join(str(reason).split())[:300]}"


def attempt(run: Callable[[], Any], quick: bool) -> float | str:
    """Milliseconds, or why there are none."""
    try:
        return timed(run, quick)
    except Exception as reason:  # a peer that refuses is a result
        return _said(reason)


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

    def say(self, row: dict[str, Any]) -> None:
        """A row that was changed."""
        print(f"{self.seconds():5.0f} s  {row}", flush=True)
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
    kernels.LAUNCH[name] = dict(zip(("tile", "warps", "stages", "fill", "split"), made, strict=False))


class Crew:
    """Processes that compile, which share Triton's cache; they stand still while something is timed."""

    def __init__(self, jobs: list[str]) -> None:
        self.running = {job: subprocess.Popen([sys.executable, __file__, "--job", job]) for job in jobs}

    def wait(self, until: float, prefix: str = "") -> None:
        """Until the jobs of that prefix have ended, or for so many seconds since the script began."""
        for job, process in self.running.items():
            if job.startswith(prefix):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.1, until - (time.monotonic() - BEGUN)))

    def left(self, prefix: str) -> list[str]:
        return [job for job, process in self.running.items() if job.startswith(prefix) and process.poll() is None]

    @contextlib.contextmanager
    def still(self) -> Iterator[None]:
        """Stop those that run, and let them go on afterwards."""
        halted = [process for process in self.running.values() if process.poll() is None]
        for process in halted:
            process.send_signal(signal.SIGSTOP)
        time.sleep(0.3 if halted else 0.0)  # what they had launched ends
        try:
            yield
        finally:
            for process in halted:
                process.send_signal(signal.SIGCONT)

    def end(self, prefix: str = "") -> None:
        for job in self.left(prefix):
            self.running[job].send_signal(signal.SIGCONT)
            self.running[job].kill()


def warm(jobs: list[str], seconds: float) -> None:
    """Compile, for so many seconds at most."""
    crew = Crew(jobs)
    crew.wait(time.monotonic() - BEGUN + seconds)
    crew.end()


def our_jobs() -> list[str]:
    """The kernels of the timed rows, one job each."""
    parts = {
        "vector": ("fold", "out", "dv", "owed", "dq", "dk"),
        "scalar": ("out", "dq", "dk", "dv"),
        "fixed": ("out", "dk"),
        "none": ("out", "dk"),
    }
    return [f"ours {gate} {part}" for gate in parts for part in parts[gate]] + ["ours step x"]


def compile_part(gate: str, part: str) -> None:
    """One kernel of ours, as the timed rows launch it."""
    if part == "x":
        step(1, 16, 128, {"TB/s": 1.0}, True)
        return
    for b, h, n, d in SMALL:
        tensors, log = draw((b, h, h, n, d, d), gate, torch.bfloat16)
        q, k, v = (x.detach() for x in tensors)
        decay = None if log is None else _decay(log.detach(), b, h, n, d)
        how: dict[str, Any] = {"heads": h, "scale": d**-0.5, "dtype": torch.bfloat16}
        chunks = -(-n // kernels.CHUNK)
        held = kernels._states(q, chunks, d, d)
        if gate != "vector":
            back = part in ("dk", "dv")
            weigh = {"weigh": q, "held": held} if gate == "scalar" and part in ("dq", "dk") else {}
            _, _, sums, carry = kernels._run_scan(q, k, v, decay, None, **how, back=back, **weigh)
            if weigh and back:
                kernels._run_suffix_one(sums, sums, carry, torch.float32)
            continue
        assert decay is not None
        total = torch.zeros(b, h, chunks * kernels.CHUNK, d, device=DEVICE)
        if part == "fold":
            kernels._run_fold(q, k, decay, d**-0.5, False), kernels._run_fold(q, k, decay, d**-0.5, True)
        elif part in ("out", "dv"):
            chunk_map, last = (
                q.new_zeros(b, h, chunks * kernels.CHUNK, kernels.CHUNK),
                total[:, :, :chunks].contiguous(),
            )
            kernels._run_sum(q, k, v, last, chunk_map, None, back=part == "dv", dtype=torch.bfloat16)
        elif part == "owed":
            kernels._owing(v, q, k, v, total, d**-0.5)
        else:
            slope, owed = (torch.zeros(b, h, n, d, device=DEVICE) for _ in range(2))
            own, carry = torch.zeros(b, h, n, device=DEVICE), torch.zeros(b, h, chunks, d, device=DEVICE)
            kernels._run_each(q, k, v, q, total, owed, own, slope, held, carry, None, **how, back=part == "dk")
            if part == "dk":
                kernels._run_suffix(slope, carry, torch.float32)


def compile_peer(gate: str, part: int, parts: int) -> None:
    """Every `parts`-th candidate of each kernel that the peer tunes. What is best is decided later, alone on the device."""
    import triton.testing
    from triton.runtime.autotuner import Autotuner

    os.environ["FLA_CACHE_RESULTS"] = "0"
    os.nice(10)
    prune = Autotuner.prune_configs

    def some(self: Any, kwargs: Any) -> Any:
        every = prune(self, kwargs)
        return every[part::parts] or every[:1]

    def once(run: Callable[[], Any], *_: Any, quantiles: Any = None, **__: Any) -> Any:
        run()
        return [1.0] * len(quantiles) if quantiles else 1.0

    Autotuner.prune_configs, triton.testing.do_bench = some, once  # type: ignore[method-assign]
    for sizes in SMALL:
        theirs(sizes, gate)[1]()


@contextlib.contextmanager
def short_tuning() -> Iterator[None]:
    """The peer's tuning with shorter runs per candidate (5 and 20 ms instead of 25 and 100): there are hundreds of them."""
    import triton.testing

    long = triton.testing.do_bench
    triton.testing.do_bench = lambda run, *_, **k: long(run, warmup=5, rep=20, quantiles=k.get("quantiles"))
    try:
        yield
    finally:
        triton.testing.do_bench = long


def compile_job(job: str) -> None:
    """`ours gate part`, `fla gate part parts`, `check dtype gate width`; or `kernel tile warps stages fill` for --tune."""
    kind, *rest = job.split()
    if kind == "ours":
        compile_part(*rest)  # type: ignore[arg-type]
    elif kind == "fla":
        compile_peer(rest[0], int(rest[1]), int(rest[2]))
    elif kind == "check":
        for case in CHECKS:
            if [case[0], case[1], str(case[2][4])] == rest:
                check(*case)
    else:
        settle(kind, tuple(map(int, rest)))
        for sizes in LONG:
            ours(sizes, "scalar" if kind in ("scan", "weigh") else "vector")[1]()
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
            runs = ours(sizes, "scalar" if name in ("scan", "weigh") else "vector")
            row[f"N{sizes[2]}"] = [attempt(run, True) for run in runs]
        rows.add("tuned", row)
        times = [x for sizes in LONG for x in row[f"N{sizes[2]}"]]
        if all(isinstance(x, float) for x in times):
            best[name] = min(best.get(name, (1e9, None)), (sum(times), made))
        kernels.LAUNCH.update(before)
    rows.facts["best"] = {name: made for name, (_, made) in best.items()}
    print(f"best (tile, warps, stages, fill): {rows.facts['best']}", flush=True)
    rows.write()


def peer_is_here(rows: Rows) -> bool:
    """Whether the peer can be imported; why not is a row."""
    try:
        import fla.ops.gla
        import fla.ops.simple_gla  # noqa: F401 # pyright: ignore[reportMissingImports]

        return True
    except Exception as reason:
        rows.add(
            "peer", f"fla.ops cannot be imported (packages flash-linear-attention, fla-core, einops): {_said(reason)}"
        )
        return False


def time_side(rows: Rows, row: dict[str, Any], side: str, gate: str, quick: bool) -> None:
    """Forward, and forward with backward, of one side into a row."""
    sizes, limits = tuple(row["sizes"]), rows.facts["ceilings"]
    try:
        runs = (ours if side == "ours" else theirs)(sizes, gate)
    except Exception as reason:
        row[f"{side}_forward_ms"] = _said(reason)
        return
    for what, run in zip(("forward", "both"), runs, strict=True):
        row[f"{side}_{what}_ms"] = attempt(run, quick)
        row[f"floor_{what}_ms"] = floor(sizes, gate, what == "both", limits)
    del runs
    torch.cuda.empty_cache()


def measure(rows: Rows, quick: bool) -> None:
    """Times in the order of `ROWS`, our side as soon as it is compiled, then the peer's; a few checks before and after."""
    sizes_of = LONG[:1] if quick else LONG
    peer = peer_is_here(rows)
    crew = Crew([*our_jobs(), *(f"fla {gate} {i} {n}" for gate, n in PEERS.items() for i in range(n) if peer)])
    try:
        crew.wait(0.45 * rows.budget, "ours")
        times = {(gate, sizes): {"what": gate, "sizes": list(sizes)} for gate in ROWS for sizes in sizes_of}
        rows.facts["times"] = list(times.values())
        with crew.still():
            rows.facts["ceilings"] = limits = ceilings()
            print(f"{rows.seconds():5.0f} s  {limits}", flush=True)
            right = {gate: _checked(rows, ("bf16", gate, EARLY, "drawn")) for gate in GATES[1:]}
            for (gate, _), row in times.items():
                row["passed"] = right.get(gate)  # None: not checked in this run
                if rows.room(f"ours {gate} {row['sizes']}", 3):
                    time_side(rows, row, "ours", gate, quick)
                rows.say(row)
            for b in (1, 64):
                rows.add("steps", step(b, 16, 128, limits, quick))
        for gate in ("scalar", "vector", "fixed") if peer else ():
            crew.wait(0.8 * rows.budget, f"fla {gate}")
            if crew.left(f"fla {gate}") or not rows.room(f"fla {gate}", 12):
                rows.add(
                    "not run", f"fla {gate}: its kernels were not compiled in time; run again, the cache keeps them"
                )
                continue
            with crew.still():
                with short_tuning():
                    attempt(theirs(LONG[0], gate)[1], True)
                for sizes in sizes_of:
                    time_side(rows, times[gate, sizes], "fla", gate, quick)
                    rows.say(times[gate, sizes])
                if rows.room(f"errors beside fla's, {gate}", 6):
                    rows.add("beside", beside(gate))
    finally:
        crew.end()
    show(rows)


def _checked(rows: Rows, case: tuple[str, str, tuple[int, ...], str]) -> bool | None:
    """Whether a check passes, its row added; None where it cannot run in time."""
    if not rows.room(f"check {case}", 5):
        return None
    try:
        row = check(*case)
    except Exception as reason:
        traceback.print_exc()
        row = {"dtype": case[0], "gate": case[1], "sizes": list(case[2]), "error": _said(reason), "passed": False}
    rows.add("checks", row)
    return row["passed"]


def check_all(rows: Rows) -> None:
    """Every check; ends with those that do not pass."""
    kinds = dict.fromkeys(f"check {dtype} {gate} {sizes[4]}" for dtype, gate, sizes, _ in CHECKS)
    warm(list(kinds), 0.7 * rows.budget)
    wrong = [case for case in CHECKS if _checked(rows, case) is False]
    print(f"{len(rows.facts.get('checks', []))} of {len(CHECKS)} checks ran; not passed: {wrong or 'none'}", flush=True)


def show(rows: Rows) -> None:
    """The table."""
    print(f"\n{'':<8}{'sizes':<24}{'pass':<10}{'ours':>9}{'fla':>9}{'floor':>9}  ms", flush=True)
    for row, what in itertools.product(rows.facts["times"], ("forward", "both")):
        cells = [row.get(f"{side}_{what}_ms") for side in ("ours", "fla", "floor")]
        shown = [f"{x:9.3f}" if isinstance(x, float) else f"{'refused' if x else '-':>9}" for x in cells]
        note = "WRONG" if row.get("passed") is False else ""
        print(f"{row['what']:<8}{row['sizes']!s:<24}{what:<10}{''.join(shown)}  {note}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="one shape, shorter timing")
    parser.add_argument("--tune", action="store_true", help="try other launch settings; under 60 s")
    parser.add_argument("--part", choices=("times", "checks"), default="times", help="the rows of times, or all checks")
    parser.add_argument("--budget", type=float, help="seconds in all (110; 55 with --tune)")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.job:
        compile_job(a.job)
        return
    if a.out is None:
        parser.error("--out is needed")
    rows = Rows(a.out, a.budget or (55 if a.tune else 110))
    if a.tune:
        tune(rows)
    elif a.part == "checks":
        check_all(rows)
    else:
        measure(rows, a.quick)
    rows.write()


if __name__ == "__main__":
    main()
