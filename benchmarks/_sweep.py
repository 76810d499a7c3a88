"""Shared by the comparisons of operators: many short trainings, what fits a budget, a file that is rewritten after each."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import qkv
from qkv.bench.environment import environment, plain, read_json, write_json
from qkv.core.errors import QKVError

Run = Callable[[], dict[str, Any]]
Summary = Callable[[list[dict[str, Any]]], dict[str, list[dict[str, Any]]]]
FREE = ("seeds", "tasks", "operators", "data", "list", "budget_seconds", "earlier", "device")
"""Settings that say which runs there are, and nothing of how one is made."""


def sweep(
    jobs: Iterable[tuple[dict[str, Any], Hashable, Run]],
    settings: Mapping[str, Any],
    summary: Summary,
    out: Path,
    budget: float,
    earlier: Sequence[Path] = (),
) -> dict[str, Any]:
    """Run the jobs (what it is, which others take as long, how to run it) in their order.

    Runs of `earlier` files of the same comparison count as made; where nothing is run here, so does their machine. Every run
    tells by which code it was made (`source`); those of other code than this are counted: a table may mix models. A job that
    would not end within `budget` seconds is left out, one that is refused or fails is named with its error. An error of the
    device itself spoils whatever would follow in this process: then the others are left out too.
    """
    begun, broken = time.monotonic(), False
    took: dict[Hashable, float] = {}
    parts = [_part(path, settings) for path in earlier]
    first: dict[str, dict[str, Any]] = {}  # of runs that several files have, the first file's counts
    for run in (run for part in parts for run in part["runs"]):
        first.setdefault(_name(run), run)
    runs, made, code = list(first.values()), set(first), source()
    other = [run for run in runs if run.get("source") != code]
    if other:
        print(f"{len(other)} of {len(runs)} earlier runs were made by other code, or do not say by which", flush=True)
    left: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    about = {"settings": {k: v for k, v in settings.items() if k != "earlier"}, **environment(seed=0)}
    todo = [(job, alike, run) for job, alike, run in jobs if _name(job) not in made]

    def found() -> dict[str, Any]:
        devices = list(dict.fromkeys(run["device"] for run in runs))
        facts = about
        if parts and len(runs) == len(first):  # nothing was run here
            facts = about | {k: parts[0][k] for k in ("machine", "versions", "commit")}
        return facts | {"devices": devices, "summary": summary(runs), "runs": runs, "left out": left, "failed": failed}

    for job, alike, run in todo:
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
        runs.append(job | row | {"seconds": took[alike], "device": device_name(about), "source": code})
        shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
        print(f"{since - begun:.0f} s  {', '.join(map(str, job.values()))}: {shown}", flush=True)
        write_json(out, found())
    whole = found() | {"seconds": time.monotonic() - begun}
    write_json(out, whole)
    return whole


def _name(job: Mapping[str, Any]) -> str:
    """Which run it is."""
    return json.dumps([job.get(k) for k in ("seed", "task", "data", "operator", "dial")], default=list)


def _part(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """An earlier file; its settings must be these. Its runs say on which device they were made."""
    part, settings = read_json(path), json.loads(json.dumps(plain(settings)))  # tuples come back as lists
    differ = {k for k in {*settings, *part["settings"]} - {*FREE} if part["settings"].get(k) != settings.get(k)}
    if differ:
        raise SystemExit(f"{path} was made with other settings: {', '.join(sorted(differ))}")
    for run in part["runs"]:
        run.setdefault("device", device_name(part))
    return part


def source() -> str:
    """A digest of the package's code, which no checkout is needed for."""
    root, digest = Path(qkv.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def device_name(facts: Mapping[str, Any]) -> str:
    """The GPU of a record, or its processor."""
    machine = facts["machine"]
    return machine["gpus"][0]["name"] if machine["gpus"] else machine["cpu"]
