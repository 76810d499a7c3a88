"""What a run costs: seconds, memory, cache bytes held and read, each with its spread.

A `Pass` is one prefill and the decoding steps after it, timed step by step on one row (batch 1): what one user waits for.
Every task runs passes, so quality and cost always come from the same computation.
"""

from __future__ import annotations

import ctypes
import inspect
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkv import hosts
from qkv.core.errors import InvalidInput, NeverFired
from qkv.core.pattern import Pattern
from qkv.core.site import Site
from qkv.core.spec import Method


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of n measurements with their 10th and 90th percentile."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """The spread of some values, or None when there are none."""
        ordered = sorted(values)
        if not ordered:
            return None
        return cls(quantile(ordered, 0.5), quantile(ordered, 0.1), quantile(ordered, 0.9), len(ordered))

    def to_dict(self) -> dict[str, float | int]:
        """Plain data."""
        return {"median": self.median, "low": self.low, "high": self.high, "n": self.n}


def quantile(ordered: Sequence[float], share: float) -> float:
    """The quantile of sorted values, linear between neighbours."""
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


# -- memory -----------------------------------------------------------------------------------------------------------


@dataclass
class Peak:
    """Most bytes in use above what was in use before; None where it cannot be measured. how: by which means."""

    bytes: int | None = None
    how: str = ""


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the memory that a block needs on top of what is held already (weights included there).

    CUDA: the allocator's own peak. Linux: the kernel's peak resident size, reset before. Elsewhere a thread samples the
    resident size where the system tells it, and otherwise `bytes` stays None with the reason in `how`.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.bytes, peak.how = torch.cuda.max_memory_allocated(device) - before, "cuda allocator"
        return
    _give_back_free_memory()
    before = _resident()
    if before is None:
        peak.how = f"the resident size cannot be read on {sys.platform}"
        yield peak
    elif _reset_high_water():
        yield peak
        peak.bytes, peak.how = max(0, (_status("VmHWM") or before) - before), "peak resident size"
    else:
        with _sampled(peak, before):
            yield peak


def _status(name: str) -> int | None:
    """A size in bytes from /proc/self/status."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return None
    return None


def _resident() -> int | None:
    return _status("VmRSS")


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return _status("VmHWM") is not None


def _give_back_free_memory() -> None:
    """Return freed memory to the system, so that one pass's leftovers do not hide the next one's needs."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


@contextmanager
def _sampled(peak: Peak, before: int, every: float = 0.002) -> Iterator[None]:
    done, most = threading.Event(), [before]

    def watch() -> None:
        while not done.wait(every):
            most[0] = max(most[0], _resident() or 0)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        peak.bytes, peak.how = most[0] - before, f"resident size sampled every {every * 1e3:.0f} ms"


# -- passes -----------------------------------------------------------------------------------------------------------


@dataclass
class Pass:
    """One prefill and the steps after it.

    prefill: logits ``[P, V]`` of the last P prompt positions, float32 on the CPU. steps: logits ``[S, V]`` after each fed
    token. prefill_s, step_s: seconds. first_s: seconds until the first answer token was known. peak: memory above what was
    held before. held, full: cache bytes after the last step and those of a plain cache; read: bytes one step reads.
    """

    prefill: Tensor
    steps: Tensor
    prefill_s: float
    first_s: float
    step_s: list[float]
    tokens: list[int] = field(default_factory=list)
    peak: Peak = field(default_factory=Peak)
    held: int | None = None
    full: int | None = None
    read: int | None = None
    kept: int | None = None
    seen: int | None = None
    calls: int = 0


class Runner:
    """Runs passes on a model, under whatever is applied to it.

    methods: what is applied (empty: the unmodified model, for which no cache bytes are reported). chunk: prefill in blocks
    of so many tokens, or None for one block.
    """

    def __init__(self, model: Any, methods: Sequence[Method] = (), chunk: int | None = None) -> None:
        self.model, self.methods, self.chunk = model, tuple(methods), chunk
        self.device = next(model.parameters()).device
        self._trims = "logits_to_keep" in inspect.signature(model.forward).parameters

    def warm_up(self, vocabulary: int) -> None:
        """A short unmeasured pass: first calls pay for things that later ones do not."""
        ids = torch.arange(32) % vocabulary
        self.run(ids, ids[:2], measure=False)

    def run(self, prompt: Tensor, fed: Tensor, keep: int = 1, measure: bool = True) -> Pass:
        """Prefill `prompt` ``[C]``, then feed the tokens `fed` ``[S]`` one by one. keep: prompt logits to return."""

        def go() -> Pass:
            cache, first, seconds = self._prefill(prompt, keep, room=len(prompt) + len(fed) + 2)
            steps, times = [], []
            for token in fed.tolist():
                logits, spent = self._timed(torch.tensor([token]), cache, 1)
                steps.append(logits[0])
                times.append(spent)
            out = Pass(first, torch.stack(steps) if steps else first[:0], seconds, seconds, times)
            return self._account(out, cache, measure)

        return self._measured(go, measure)

    def answer(self, context: Tensor, question: Tensor, most: int, stop: Callable[[list[int]], bool]) -> Pass:
        """Prefill and compress `context`, then `question` (empty: it is part of the context), then decode greedily.

        Ends after `most` tokens or when ``stop(tokens)`` says so.
        """

        def go() -> Pass:
            cache, logits, seconds = self._prefill(context, 1, room=len(context) + len(question) + most + 2)
            first = seconds
            if len(question):
                logits, spent = self._timed(question, cache, 1)
                first += spent
            tokens, times = [int(logits[-1].argmax())], []
            while len(tokens) < most and not stop(tokens):
                logits, spent = self._timed(torch.tensor(tokens[-1:]), cache, 1)
                times.append(spent)
                tokens.append(int(logits[-1].argmax()))
            out = Pass(logits, logits, seconds, first, times, tokens)
            return self._account(out, cache, True)

        return self._measured(go, True)

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _measured(self, go: Callable[[], Pass], measure: bool) -> Pass:
        with torch.no_grad():
            if not measure:
                return go()
            with peak_memory(self.device) as peak:
                out = go()
        out.peak = peak
        return out

    def _prefill(self, prompt: Tensor, keep: int, room: int) -> tuple[Any, Tensor, float]:
        if not len(prompt):
            raise InvalidInput("the prompt is empty; a pass needs at least one token")
        from qkv.hosts.transformers import captured, fresh_cache

        cache = fresh_cache(self.model, len(prompt), room=room if captured(self.model) else 0)
        size = self.chunk or len(prompt)
        kept: list[Tensor] = []
        seconds = 0.0
        for start in range(0, len(prompt), size):
            block = prompt[start : start + size]
            wanted = min(len(block), keep - (len(prompt) - start - len(block)))
            logits, spent = self._timed(block, cache, max(1, wanted))
            seconds += spent
            if wanted > 0:
                kept.append(logits)
        return cache, torch.cat(kept), seconds

    def _timed(self, ids: Tensor, cache: Any, keep: int) -> tuple[Tensor, float]:
        """Logits ``[keep, V]`` (float32, CPU) of the last tokens of a block, and the seconds it took."""
        batch = ids[None].to(self.device)
        more = {"logits_to_keep": keep} if self._trims else {}
        self._wait()
        start = time.perf_counter()
        logits = self.model(input_ids=batch, past_key_values=cache, use_cache=True, **more).logits[0, -keep:]
        self._wait()
        return logits.float().cpu(), time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _account(self, out: Pass, cache: Any, measure: bool) -> Pass:
        """Cache bytes after the last step; `NeverFired` when a method had no effect."""
        if not (torch.isfinite(out.prefill).all() and torch.isfinite(out.steps).all()):
            raise InvalidInput("the model's logits are not finite under this method; nothing can be scored")
        if not self.methods or not measure:
            return out
        done = hosts.report(self.model)
        if not done.calls:
            raise NeverFired("the applied methods were never called: this model does not run their sites")
        out.held, out.full, out.kept, out.seen, out.calls = (
            done.bytes,
            done.full_bytes,
            done.kept,
            done.seen,
            done.calls,
        )
        out.read = self._read(cache, done)
        return out

    def _read(self, cache: Any, done: Any) -> int:
        """Bytes of stored keys and values that a one-token step reads.

        What is held, unless the cache says otherwise (`read_bytes`), or a pattern acts on single queries: then the keys
        of its plan, counted on one more step.
        """
        patterns = [m for m in self.methods if isinstance(m, Pattern) and m.spec.min_queries == 1]
        if patterns:
            return self._read_by_pattern(cache, patterns[0])
        memories = [layer.memory for layer in getattr(cache, "layers", []) if hasattr(layer, "memory")]
        if len(memories) < len(done.sites):
            return done.bytes
        return sum(m.read_bytes() for m in memories)

    def _read_by_pattern(self, cache: Any, pattern: Pattern) -> int:
        found = [0]

        def count(site: Site, call: Any) -> None:
            mask = pattern.plan(call.q, call.k, scale=call.scale, causal=call.causal).to_mask()  # [B|1, H|1, N, M]
            groups, keys = call.k.shape[1], call.k.shape[2]
            heads = mask.expand(call.q.shape[0], call.q.shape[1], -1, keys)
            read = heads.any(2).unflatten(1, (groups, -1)).any(2)  # [B, G, M]
            found[0] += int(read.sum()) * (call.k.shape[3] + call.v.shape[3]) * call.k.element_size()

        with hosts.observe(self.model, count):
            self._timed(torch.tensor([0]), cache, 1)
        return found[0]


def cost(passes: Sequence[Pass]) -> dict[str, Any]:
    """The cost part of a row: medians with their spread over passes and steps."""
    held = [p.held for p in passes if p.held is not None]
    peaks = [p.peak.bytes for p in passes if p.peak.bytes is not None]
    last = passes[-1]
    out: dict[str, Any] = {
        "first_token_s": _plain(Spread.of(p.first_s for p in passes)),
        "prefill_s": _plain(Spread.of(p.prefill_s for p in passes)),
        "token_ms": _plain(Spread.of(1e3 * s for p in passes for s in p.step_s)),
        "peak_bytes": _plain(Spread.of(peaks)),
        "peak_how": last.peak.how,
        "calls": last.calls,
    }
    if held:
        out |= {"held_bytes": last.held, "full_bytes": last.full, "read_bytes": last.read,
                "kept": last.kept, "seen": last.seen}  # fmt: skip
    return out


def _plain(spread: Spread | None) -> dict[str, float | int] | None:
    return None if spread is None else spread.to_dict()
