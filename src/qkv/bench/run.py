"""The main job: every method at every context on every task, one row each, written as soon as it is known.

A run lives in a folder: `run.json` says what it is (model, methods, contexts, tasks, settings, text, machine, versions),
`results.jsonl` holds the rows, `reference/` what the unmodified model did, `report.html` the pictures. A run that was
interrupted or killed goes on where it stopped: a row is on the disk or it was never measured. `full` is always among the
methods, in the same process, and the order is shuffled by the seed, so that a slow minute hits no method by plan.
"""

from __future__ import annotations

import gc
import hashlib
import json
import random
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkv import hosts
from qkv.bench.environment import append_jsonl, environment, plain, read_json
from qkv.bench.folder import RunFolder, now
from qkv.bench.job import Job, Stack
from qkv.bench.measure import Runner
from qkv.bench.summary import brief
from qkv.bench.tasks import Bench, Task, Trial, task, tasks
from qkv.core.errors import InvalidInput, QKVError, StorageError
from qkv.hosts.stack import fingerprint

FORMAT = 1


class Listener:
    """Is told how a run goes; the command line shows it. Override what is of interest."""

    def stage(self, text: str) -> None:
        """Something begins that yields no row."""

    def begin(self, folder: Path, total: float, done: float, rows: int, have: int) -> None:
        """The plan is made: work in arbitrary units, rows in all, and how much of each an earlier run did."""

    def working(self, text: str) -> None:
        """A row is being measured."""

    def row(self, row: dict[str, Any], work: float) -> None:
        """A row was written."""


@dataclass(frozen=True)
class Results:
    """A finished run: its folder, what it was, and its rows in the order of methods, contexts and tasks."""

    folder: Path
    manifest: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def errors(self) -> list[dict[str, Any]]:
        """The rows that failed."""
        return [r for r in self.rows if r["status"] == "error"]


@dataclass(frozen=True)
class _Cell:
    """One row to be: a stack, a task, a context."""

    stack: Stack
    task: Task
    context: int
    key: str
    work: float


def run(
    job: Job,
    out: str | Path | None = None,
    *,
    model: Any = None,
    tokenizer: Any = None,
    text: str | None = None,
    fresh: bool = False,
    retry: bool = False,
    listener: Listener | None = None,
) -> Results:
    """Do a job, or what is left of it, and write its rows.

    out: the run's folder; None is ``runs/<model>-<hash of the configuration>``. model, tokenizer, text: given, or loaded by
    the job's names. fresh: start the folder over (old rows are set aside). retry: measure rows again that hold an error. An
    error of one method becomes a row and the run goes on. Raises `InvalidInput` for a folder of another run, `StorageError`
    when a row cannot be written (all earlier rows stay).
    """
    told = listener or Listener()
    model, tokenizer = (model, tokenizer) if model is not None else _load(job, told)
    if text is None:
        told.stage("reading the text")
        from qkv.bench import assets

        text = assets.long_text(job.text)
    chosen = [task(name) for name in job.tasks]
    _check_reach(model, job, chosen)
    bench = Bench(model, tokenizer, text, job.settings, job.contexts)
    for one in chosen:
        for context in job.contexts:
            one.check(bench, context)
    told.stage("taking the model's fingerprint")
    here = environment(seed=job.settings.seed)
    identity = _identity(job, model, text, here)
    folder_path = Path(out) if out is not None else Path("runs") / _folder_name(job, identity)
    with RunFolder.open(folder_path, identity, fresh) as folder:
        if retry:
            folder.forget_errors()
        cells = _cells(job, identity, chosen)
        _Work(job, folder, bench, told, identity, here).do(cells)
        rows = folder.rows()
        manifest = read_json(folder.path / "run.json")
        return Results(folder.path, manifest, [rows[c.key] for c in cells if c.key in rows])


def _load(job: Job, told: Listener) -> tuple[Any, Any]:
    from qkv.bench import assets

    told.stage(f"loading {job.model}")
    return assets.resolve_model(job.model, job.dtype, job.device)


def _check_reach(model: Any, job: Job, chosen: Sequence[Task]) -> None:
    reach = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(t.longest(job.settings, max(job.contexts)) for t in chosen)
    if reach is not None and longest > reach:
        spare = longest - max(job.contexts)
        raise InvalidInput(
            f"a context of {max(job.contexts)} tokens needs {longest} positions and this model knows {reach}; the longest "
            f"context it allows here is {reach - spare}"
        )


def _identity(job: Job, model: Any, text: str, here: dict[str, Any]) -> dict[str, Any]:
    device = next(model.parameters()).device
    return {
        "format": FORMAT,
        "model": {
            "name": job.model,
            "class": type(model).__name__,
            "fingerprint": fingerprint(model),
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "device": device.type,
        },
        "methods": [{"label": job.label(s), "stack": [m.to_dict() for m in s]} for s in job.methods],
        "contexts": list(job.contexts),
        "tasks": list(job.tasks),
        "settings": asdict(job.settings),
        "text": {
            "name": _text_name(job.text),
            "characters": len(text),
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
        },
        "graph": job.graph,
        "machine": {k: here["machine"][k] for k in ("cpu", "threads", "gpus")},
        "versions": {k: here["versions"][k] for k in ("python", "qkv", "torch", "transformers")},
    }


def _text_name(text: str | None) -> str:
    return "default" if text is None else Path(text).name


def _folder_name(job: Job, identity: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(plain(identity), sort_keys=True).encode()).hexdigest()
    return f"{re.sub(r'[^A-Za-z0-9.-]+', '-', Path(job.model).name).strip('-.') or 'model'}-{digest[:8]}"


def _cells(job: Job, identity: dict[str, Any], chosen: Sequence[Task]) -> list[_Cell]:
    out = []
    for stack in job.methods:
        for context in job.contexts:
            shared = False
            for one in chosen:
                parts = [
                    identity["model"]["fingerprint"],
                    [m.to_dict() for m in stack],
                    one.id,
                    context,
                    job.settings.seed,
                ]
                key = hashlib.sha256(json.dumps(plain(parts), sort_keys=True).encode()).hexdigest()[:20]
                work = one.passes(job.settings) * (context + 30.0 * (8 if one.id == "passkey" else job.settings.tokens))
                if one.id in ("ppl", "kl"):  # they share their passes
                    work, shared = (0.02 * work if shared else work), True
                out.append(_Cell(stack, one, context, key, work))
    return out


class _Work:
    """The loop over what is left of a job."""

    def __init__(
        self,
        job: Job,
        folder: RunFolder,
        bench: Bench,
        told: Listener,
        identity: dict[str, Any],
        here: dict[str, Any],
    ) -> None:
        self.job, self.folder, self.bench, self.told, self.identity = job, folder, bench, told, identity
        self.environment = here
        self.data: list[dict[str, Tensor]] | None = None

    def do(self, cells: Sequence[_Cell]) -> None:
        """Measure every cell that has no row yet."""
        have = self.folder.rows()
        left = [c for c in cells if c.key not in have]
        total = sum(c.work for c in cells)
        self.told.begin(self.folder.path, total, total - sum(c.work for c in left), len(cells), len(cells) - len(left))
        if not left:
            return
        self._references(left)
        gc.freeze()  # what lives now stays: collecting after each group then looks at that group's leftovers only
        try:
            for group in self._groups(left):
                self._group(group)
        finally:
            gc.unfreeze()

    def _groups(self, left: Sequence[_Cell]) -> list[list[_Cell]]:
        """Cells that one `apply` serves, in shuffled order: a conversion once, anything else once per context."""
        groups: dict[Any, list[_Cell]] = {}
        for c in left:
            whole = any(m.spec.kind == "conversion" for m in c.stack)
            groups.setdefault((c.stack, None if whole else c.context), []).append(c)
        order = list(groups.values())
        random.Random(self.job.settings.seed).shuffle(order)
        return order

    def _references(self, left: Sequence[_Cell]) -> None:
        """What the unmodified model does, once per task and context."""
        runner = Runner(self.bench.model, (), self.job.settings.chunk)
        trial = Trial(self.bench, runner)
        for one, context in dict.fromkeys((c.task, c.context) for c in left):
            name = f"{one.id}-{context}"
            if self.folder.reference(name) is None:
                self.told.stage(f"{one.id} at {context} tokens: the unmodified model")
                tensors = one.reference(trial, context)
                if tensors:
                    self.folder.keep_reference(name, tensors)

    def _group(self, group: Sequence[_Cell]) -> None:
        stack = group[0].stack
        done: set[str] = set()
        try:
            self.told.stage(f"{brief(self.job.label(stack))}: applying")
            start = time.perf_counter()
            torch.manual_seed(self.job.settings.seed)
            with hosts.applied(self.bench.model, *stack, data=self._calibration(stack), graph=self.job.graph):
                setup = time.perf_counter() - start
                runner = Runner(self.bench.model, stack, self.job.settings.chunk)
                runner.warm_up(self.bench.vocabulary)
                for context in dict.fromkeys(c.context for c in group):
                    trial = Trial(self.bench, runner, stack)
                    for cell in (c for c in group if c.context == context):
                        done.add(cell.key)
                        self._cell(cell, trial, setup)
        except StorageError:
            raise
        except Exception as error:  # what `apply` refuses is the result of every cell it was meant for
            for cell in group:
                if cell.key not in done:
                    self._write(cell, 0.0, error=error)
        self._clean()

    def _cell(self, cell: _Cell, trial: Trial, setup: float) -> None:
        self.told.working(f"{brief(self.job.label(cell.stack))} · {cell.task.id} · {cell.context}")
        start = time.perf_counter()
        try:
            torch.manual_seed(self.job.settings.seed)
            reference = self.folder.reference(f"{cell.task.id}-{cell.context}") or {}
            outcome = cell.task.run(trial, cell.context, reference)
        except Exception as error:
            self._write(cell, time.perf_counter() - start, error=error)
            return
        cost = outcome.cost | {"setup_s": setup}
        self._write(cell, time.perf_counter() - start, metrics=outcome.metrics, cost=cost)

    def _write(self, cell: _Cell, seconds: float, *, error: Exception | None = None, **found: Any) -> None:
        row = {
            "format": FORMAT,
            "key": cell.key,
            "status": "ok" if error is None else "error",
            "model": self.identity["model"],
            "method": {"label": self.job.label(cell.stack), "stack": [m.to_dict() for m in cell.stack]},
            "kind": "+".join(dict.fromkeys(m.spec.kind for m in cell.stack)),
            "task": cell.task.id,
            "context": cell.context,
            "seed": self.job.settings.seed,
            "parameters": cell.task.parameters(self.job.settings),
            **found,
            "seconds": seconds,
            "finished": now(),
            "environment": self.environment,
        }
        if error is not None:
            row["error"] = {"type": type(error).__name__, "message": _message(error)}
        append_jsonl(self.folder.results, row)
        self.told.row(row, cell.work)

    def _calibration(self, stack: Stack) -> list[dict[str, Tensor]] | None:
        """Model inputs for methods that calibrate: text that the tasks do not use."""
        if not any(m.spec.kind == "conversion" for m in stack):
            return None
        if self.data is None:
            self.data = calibration(self.bench.model, self.bench.tokenizer)
        return self.data

    def _clean(self) -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def calibration(
    model: Any, tokenizer: Any, rows: int = 32, tokens: int = 256, text: str | None = None
) -> list[dict[str, Tensor]]:
    """`rows` stretches of text as model inputs ``{"input_ids": [4, tokens]}``, spread evenly over it.

    text: a name or file for `qkv.bench.assets.long_text`; None is the calibration text, which no task uses.
    """
    from qkv.bench import assets

    words = assets.calibration_text() if text is None else assets.long_text(text)
    step = len(words) // rows
    device = next(model.parameters()).device
    ids = [assets.text_tokens(tokenizer, tokens, text=words[i * step : (i + 1) * step]) for i in range(rows)]
    return [{"input_ids": torch.stack(ids[i : i + 4]).to(device)} for i in range(0, rows, 4)]


def _message(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text if isinstance(error, QKVError) or len(text) < 2000 else text[:2000] + " ..."


def known_tasks() -> list[str]:
    """The ids of all tasks."""
    return sorted(tasks())
