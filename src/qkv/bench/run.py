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
import os
import random
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkv import hosts
from qkv.bench.environment import append_jsonl, environment, plain, read_json, read_jsonl, storage, write_json
from qkv.bench.measure import Runner
from qkv.bench.tasks import Bench, Settings, Task, Trial, task, tasks
from qkv.core import registry
from qkv.core.errors import InvalidInput, InvalidParameter, QKVError, Refused, SavedDataError, StorageError
from qkv.core.spec import Method

FORMAT = 1
KINDS = ("operator", "pattern", "cache", "conversion", "steering")
Stack = tuple[Method, ...]


# -- what is to be done -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to measure. Build it with `Job.of`, which reads settings and checks them.

    model: ``smollm2``, a folder or a hub id. methods: stacks, `full` among them. contexts: prompt lengths in tokens. tasks:
    ids. text: a name or file for `qkv.bench.assets.long_text`, None = its default. graph: decode in CUDA graphs.
    """

    model: str
    methods: tuple[Stack, ...]
    contexts: tuple[int, ...]
    tasks: tuple[str, ...]
    settings: Settings = field(default_factory=Settings)
    text: str | None = None
    dtype: str | None = None
    device: str | None = None
    graph: bool = False

    @classmethod
    def of(
        cls,
        model: str,
        methods: Sequence[str | Method | Sequence[Method]],
        contexts: Sequence[int],
        tasks: Sequence[str] = (),
        **more: Any,
    ) -> Job:
        """A checked job. methods: settings (``"h2o:budget=0.25"``; ``"a+b"`` is a stack) or configurations.

        Raises `UnknownName`, `InvalidParameter`, `Refused` for a method that is not applied to a model.
        """
        stacks = list(dict.fromkeys([(registry.method("full"),), *map(stack_of, methods)]))
        for one in stacks:
            for method in one:
                _check_kind(method)
        if not contexts:
            raise InvalidParameter("no context length was given; e.g. --context 512,2k")
        for context in contexts:
            if not isinstance(context, int) or isinstance(context, bool) or context < 2:
                raise InvalidParameter(f"context={context!r} must be a whole number of at least 2 tokens")
        names = tuple(dict.fromkeys(tasks or DEFAULT_TASKS))
        for name in names:
            task(name)
        return cls(
            model=model, methods=tuple(stacks), contexts=tuple(sorted(set(contexts))), tasks=names, **more
        )  # fmt: skip

    def label(self, stack: Stack) -> str:
        """The name of a stack in tables and pictures."""
        return label(stack, self.methods)


DEFAULT_TASKS = ("ppl", "kl", "passkey")


def stack_of(methods: str | Method | Sequence[Method]) -> Stack:
    """``"a:x=1+b"`` or configurations as a stack."""
    if isinstance(methods, Method):
        return (methods,)
    if isinstance(methods, str):
        parts = re.split(r"\+(?=[A-Za-z])", methods)
        if not all(p.strip() for p in parts):
            raise InvalidParameter(f"{methods!r} names no method; write e.g. h2o:budget=0.25, or a+b for a stack")
        return tuple(registry.method(p) for p in parts)
    return tuple(methods)


def label(stack: Sequence[Method], beside: Sequence[Sequence[Method]] = ()) -> str:
    """How a stack is written on the command line, settings at their defaults left out.

    beside: the other stacks of the job; settings in which two uses of one method differ are always written.
    """
    return "+".join(_written(m, [x for s in beside for x in s if x.id == m.id]) for m in stack)


def _written(method: Method, alike: Sequence[Method]) -> str:
    parts = []
    for p in method.spec.parameters:
        value = getattr(method, p.name)
        if value != p.default or any(getattr(x, p.name) != value for x in alike):
            parts.append(f"{p.name}={json.dumps(plain(value)) if isinstance(value, (tuple, list)) else value}")
    return method.id + (":" + ",".join(parts) if parts else "")


def _check_kind(method: Method) -> None:
    if method.spec.kind in KINDS:
        return
    instead = {
        "probe": "it measures heads and changes nothing: use `qkv inspect`",
        "objective": "it teaches a student: use `qkv distill`, then bench the student",
        "layer": "it is a module of new models: bench a model that has it",
        "decoding": "it is a way to produce tokens with a generate function of its own",
        "model": "it is a model of its own",
        "cost": "it is a model of costs",
    }.get(method.spec.kind, "it is not applied to a model")
    raise Refused(f"{method} is of kind {method.spec.kind}, which the bench cannot run: {instead}")


# -- the folder -------------------------------------------------------------------------------------------------------


class RunFolder:
    """The files of a run. One process at a time; another configuration is refused."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path, self.identity = path, identity
        self.results = path / "results.jsonl"

    @classmethod
    @contextmanager
    def open(cls, path: str | Path, identity: dict[str, Any], fresh: bool = False) -> Iterator[RunFolder]:
        """Create the folder, or go on in one of the same identity. fresh: set its rows aside and start over.

        Raises `InvalidInput` for a folder of something else or of another configuration, `StorageError`.
        """
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise InvalidInput(f"{path} is a file; --out names a folder")
        manifest = path / "run.json"
        if path.is_dir() and not manifest.exists() and any(path.iterdir()):
            raise InvalidInput(f"{path} is not empty and holds no run of qkv bench; choose another folder with --out")
        with storage(path, "make the folder"):
            path.mkdir(parents=True, exist_ok=True)
        with _sole_user(path):
            folder = cls(path, plain(identity))
            if manifest.exists() and not fresh:
                folder._check(read_json(manifest))
            else:
                folder._start()
            yield folder

    def _start(self) -> None:
        old = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        with storage(self.path):
            if self.results.exists():
                self.results.rename(self.path / f"results-until-{old}.jsonl")
            for file in (self.path / "reference").glob("*.safetensors"):
                file.unlink()
        command = shlex.join(["qkv", *sys.argv[1:]])
        write_json(self.path / "run.json", {"identity": self.identity, "command": command, "started": _now()})

    def _check(self, saved: Any) -> None:
        old = saved.get("identity") if isinstance(saved, dict) else None
        if not isinstance(old, dict):
            raise SavedDataError(f"{self.path / 'run.json'} is not the manifest of a bench run")
        changes = list(_differences(old, self.identity))
        if changes:
            raise InvalidInput(
                f"{self.path} holds a run of another configuration, and rows of both must not be mixed: "
                + "; ".join(changes[:4])
                + (f"; and {len(changes) - 4} more" if len(changes) > 4 else "")
                + ". Choose another folder with --out, or start this one over with --fresh"
            )

    def rows(self) -> dict[str, dict[str, Any]]:
        """The rows by key; the first of a key counts."""
        out: dict[str, dict[str, Any]] = {}
        for row in read_jsonl(self.results):
            if isinstance(row.get("key"), str):
                out.setdefault(row["key"], row)
        return out

    def forget_errors(self) -> None:
        """Drop the rows that hold an error, so that they are measured again."""
        rows = read_jsonl(self.results)
        good = [r for r in rows if r.get("status") != "error"]
        if len(good) < len(rows):
            from qkv.bench.environment import write_text

            write_text(self.results, "".join(json.dumps(plain(r), ensure_ascii=False) + "\n" for r in good))

    def reference(self, name: str) -> dict[str, Tensor] | None:
        """Tensors of the unmodified model, or None when they are not there (or not whole)."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.path / "reference" / f"{name}.safetensors"
        try:
            return load_file(path) if path.is_file() else None
        except SafetensorError:
            return None

    def keep_reference(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Write such tensors, whole or not at all."""
        from safetensors.torch import save

        path = self.path / "reference" / f"{name}.safetensors"
        with storage(path):
            path.parent.mkdir(exist_ok=True)
            number, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
            try:
                with open(number, "wb") as file:
                    file.write(save({k: v.contiguous() for k, v in tensors.items()}))
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            except BaseException:
                with suppress(OSError):
                    os.unlink(temporary)
                raise


def _differences(old: Any, new: Any, at: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new}):
            yield from _differences(old.get(name), new.get(name), f"{at}.{name}" if at else name)
    elif old != new:
        yield f"{at}: there {_short(old)}, now {_short(new)}"


def _short(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(v, dict) and "label" in v for v in value):
        value = [v["label"] for v in value]
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


@contextmanager
def _sole_user(path: Path) -> Iterator[None]:
    """An exclusive lock on the folder, where the system has such locks; it goes with the process."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with storage(path, "lock"):
        file = (path / ".lock").open("w")
    with file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidInput(
                f"another qkv bench is at work in {path}; wait for it, or choose another --out"
            ) from None
        yield


# -- running ----------------------------------------------------------------------------------------------------------


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
            "fingerprint": _fingerprint(model),
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


def _fingerprint(model: Any) -> str:
    from qkv.hosts.stack import fingerprint

    return fingerprint(model)


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
            self.told.stage(f"{self.job.label(stack)}: applying")
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
        self.told.working(f"{self.job.label(cell.stack)} · {cell.task.id} · {cell.context}")
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
            "finished": _now(),
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


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def known_tasks() -> list[str]:
    """The ids of all tasks."""
    return sorted(tasks())
