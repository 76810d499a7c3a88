"""Shared by the comparisons of operators: many short trainings, what fits a budget, a file that is rewritten after each."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from qkv.bench.environment import environment, write_json
from qkv.core.errors import QKVError

Run = Callable[[], dict[str, Any]]
Summary = Callable[[list[dict[str, Any]]], dict[str, list[dict[str, Any]]]]


def sweep(
    jobs: Iterable[tuple[dict[str, Any], Hashable, Run]],
    settings: Mapping[str, Any],
    summary: Summary,
    out: Path,
    budget: float,
) -> dict[str, Any]:
    """Run the jobs (what it is, which others take as long, how to run it) in their order.

    A job that would not end within `budget` seconds is left out, one that is refused or fails is named with its error. An error
    of the device itself spoils whatever would follow in this process: then the others are left out too.
    """
    begun, broken = time.monotonic(), False
    took: dict[Hashable, float] = {}
    runs: list[dict[str, Any]] = []
    left: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    about = {"settings": dict(settings), **environment(seed=0)}

    def found() -> dict[str, Any]:
        return about | {"summary": summary(runs), "runs": runs, "left out": left, "failed": failed}

    for job, alike, run in jobs:
        since = time.monotonic()
        usual = statistics.fmean(took.values()) if took else 0.0
        if broken or since - begun + took.get(alike, usual) > budget:
            left.append(job)
            continue
        try:
            row = run()
        except (QKVError, RuntimeError) as error:
            broken = isinstance(error, torch.AcceleratorError)
            failed.append(job | {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"})
            print(failed[-1], flush=True)
            continue
        took[alike] = time.monotonic() - since
        runs.append(job | row | {"seconds": took[alike]})
        shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
        print(f"{since - begun:.0f} s  {', '.join(map(str, job.values()))}: {shown}", flush=True)
        write_json(out, found())
    whole = found() | {"seconds": time.monotonic() - begun}
    write_json(out, whole)
    return whole
