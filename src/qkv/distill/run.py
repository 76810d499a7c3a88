"""A training run: its arguments, what decides its result, where it goes on from, and what it leaves behind."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from accelerate import PartialState
from transformers import TrainingArguments

import qkv
from qkv import hosts
from qkv.core.errors import InvalidInput, InvalidParameter, Refused, SavedDataError, TrainingError, UnknownName
from qkv.core.objective import Objective
from qkv.core.spec import near
from qkv.core.training import gently
from qkv.distill import _folder
from qkv.distill._callbacks import Bar, Stop
from qkv.distill._data import Collator, Items
from qkv.distill.lessons import Lesson, read_weights
from qkv.distill.trainer import DistillTrainer
from qkv.hosts import stack

# Arguments (of `TrainingArguments`) that decide the result, compared on resume, and those that do not.
DECIDING = (
    "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate",
    "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "lr_scheduler_type",
    "lr_scheduler_kwargs", "warmup_steps", "optim", "bf16", "seed", "data_seed", "full_determinism",
    "dataloader_drop_last",
)  # fmt: skip
HOUSEKEEPING = (
    "logging_steps", "save_steps", "save_total_limit", "dataloader_num_workers", "gradient_checkpointing", "use_cpu",
    "ddp_backend",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `qkv.distill.distill` takes beside the networks, the data and the training arguments."""

    tokenizer: Any = None
    teacher_tokenizer: Any = None
    max_length: int | None = None
    resume: bool | str | Path = False
    baselines: tuple[Objective | str, ...] = ()
    evaluate: Callable[[Any], Mapping[str, float]] | None = None
    progress: bool | None = None


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    student: the trained model (the one that was passed in). path: its folder, for ``from_pretrained`` (for `qkv.load` if the
    student is converted). steps: optimiser steps. loss: mean of the last logged stretch, None for a run too short to log.
    records: the logged records. scores: what `evaluate` said of ``teacher``, ``untrained``, ``student`` and each baseline.
    """

    student: Any
    path: Path
    steps: int
    loss: float | None
    records: tuple[dict[str, Any], ...]
    scores: dict[str, dict[str, float]] = field(default_factory=dict)

    def __str__(self) -> str:
        loss = "" if self.loss is None else f", loss {self.loss:.4g}"
        lines = [f"{self.steps} steps{loss}; saved in {self.path}"]
        width = max(map(len, self.scores), default=0)
        for name, scores in self.scores.items():
            lines.append(f"  {name:<{width}}  " + "  ".join(f"{k} {v:.4g}" for k, v in scores.items()))
        return "\n".join(lines)


def settings_of(arguments: Mapping[str, Any], recipe: Mapping[str, Any], who: str = "distill") -> dict[str, Any]:
    """The training arguments: what was given, else what the recipe says. Raises `UnknownName`, `InvalidParameter`."""
    known = (*DECIDING, *HOUSEKEEPING)
    for name in arguments:
        if name not in known:
            raise UnknownName(f"{who} takes no argument {name!r}{near(name, known)}")
    if arguments.get("max_steps") is None and arguments.get("num_train_epochs") is None:
        raise InvalidParameter("say how long to train: max_steps=... or num_train_epochs=...")
    for name in ("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"):
        if arguments.get(name) is not None and not arguments[name] > 0:
            raise InvalidParameter(f"{name}={arguments[name]} must be positive")
    return dict(recipe) | {k: v for k, v in arguments.items() if v is not None}


class Run:
    """What all trainings have in common. result: name of the folder of the trained model; more: facts that decide the result."""

    def __init__(
        self, items: Items, collator: Collator, settings: dict[str, Any], options: Options, teacher: Any = None,
        start: Any = None, *, result: str = "student", more: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.items, self.collator, self.settings, self.options, self.start = items, collator, settings, options, start
        self.scores: dict[str, dict[str, float]] = {}
        self.data = {"items": len(items), "fingerprint": items.fingerprint(), "max_length": options.max_length}
        self.result, self.more = result, dict(more or {})
        if teacher is not None:
            self.more["teacher"] = {"class": type(teacher).__name__, "fingerprint": stack.fingerprint(teacher)}
        self.main = int(os.environ.get("RANK", "0")) == 0

    def score(self, name: str, model: Any) -> None:
        """Ask the caller's `evaluate` about a model."""
        if self.options.evaluate is None:
            return
        mode = model.training
        model.eval()
        try:
            with torch.no_grad():
                got = self.options.evaluate(model)
        finally:
            model.train(mode)
        if not isinstance(got, Mapping) or not all(isinstance(v, (int, float)) for v in got.values()):
            raise InvalidInput(f"evaluate must return a mapping of names to numbers, not {str(got)[:80]}")
        self.scores[name] = {str(k): float(v) for k, v in got.items()}

    def train(
        self, lesson: Lesson, objective: dict[str, Any], folder: Path, resume: bool | str | Path, what: str
    ) -> tuple[int, float | None, list[dict[str, Any]]]:
        """Train, resume, or find the work done: (steps, last loss, records)."""
        args = self._arguments(folder / "checkpoints")
        facts = self._facts(lesson.student, objective, args)
        checkpoint = self._begin(folder, facts, resume)
        records = _folder.Records(folder / "metrics.jsonl")
        if checkpoint is None and (folder / self.result / _folder.MANIFEST).is_file():
            return self._finished(lesson, folder, records.read())
        PartialState().wait_for_everyone()  # everyone has looked before anyone writes
        if self.main:
            _folder.write_json(folder / "run.json", {"format": _folder.FORMAT, "qkv": qkv.__version__, "run": facts})
            records.rewind(0 if checkpoint is None else int(_folder.read_json(checkpoint / _folder.MANIFEST)["step"]))
        steps = self._fit(lesson, args, facts, checkpoint, what)
        kept = records.read()
        loss = next((r["loss"] for r in reversed(kept) if "loss" in r), None)
        if self.main:
            self._publish(lesson.student, folder, facts, steps, loss)
        PartialState().wait_for_everyone()
        return steps, loss, kept

    def _arguments(self, checkpoints: Path) -> TrainingArguments:
        given = {k: v for k, v in self.settings.items() if k not in ("gradient_checkpointing", "save_total_limit")}
        fixed: dict[str, Any] = {
            "output_dir": str(checkpoints),
            "save_strategy": "steps",
            "logging_strategy": "steps",
            "logging_nan_inf_filter": False,
            "remove_unused_columns": False,
            "label_names": [],
            "report_to": [],
            "disable_tqdm": True,
            "dataloader_pin_memory": torch.cuda.is_available() and not given.get("use_cpu", False),
        }
        try:
            args = TrainingArguments(**given, **fixed)
        except (ValueError, TypeError) as error:
            raise InvalidParameter(f"training arguments: {error}") from error
        if args.n_gpu > 1:
            args._n_gpu = 1  # several GPUs: torchrun; DataParallel would copy the hooked modules
        return args

    def _facts(self, student: Any, objective: dict[str, Any], args: TrainingArguments) -> dict[str, Any]:
        """What decides the result, as plain data."""
        h = hashlib.sha256()
        for name, x in sorted(student.state_dict().items()):
            h.update(f"{name}{tuple(x.shape)}{x.dtype}".encode())
        chosen = {name: getattr(args, name) for name in DECIDING} | {"processes": args.world_size}
        facts = {
            "objective": objective,
            "student": {"class": type(student).__name__, "structure": h.hexdigest()},
            "data": self.data,
            "arguments": {k: getattr(v, "value", v) for k, v in chosen.items()},
            **self.more,
        }
        return json.loads(json.dumps(facts, default=str))

    def _begin(self, folder: Path, facts: dict[str, Any], resume: bool | str | Path) -> Path | None:
        """The checkpoint to go on from, or None to start; raises rather than mixing two runs."""
        saved = folder / "run.json"
        if not saved.is_file():
            if folder.exists() and (not folder.is_dir() or any(p.name != "baselines" for p in folder.iterdir())):
                raise SavedDataError(f"{folder} exists and holds no run of qkv's trainer; choose another place")
        elif not resume:
            done = _folder.checkpoints(folder / "checkpoints")
            at = f"at {done[-1].name}" if done else "without a checkpoint yet"
            raise TrainingError(f"{folder} already holds a run ({at}): pass resume=True to go on, or another folder")
        else:
            _folder.same_run(folder, _folder.read_json(saved).get("run", {}), facts)
        if not resume:
            return None
        if not isinstance(resume, bool):
            _folder.same_run(Path(resume), _folder.verified(Path(resume))["run"], facts)
            return Path(resume)
        if (folder / self.result / _folder.MANIFEST).is_file():
            return None
        done = _folder.checkpoints(folder / "checkpoints")
        if not done:
            return None
        _folder.same_run(done[-1], _folder.verified(done[-1])["run"], facts)
        return done[-1]

    def _finished(self, lesson: Lesson, folder: Path, records: list[dict[str, Any]]) -> tuple[int, float | None, Any]:
        """The run had ended: its student is loaded, nothing is trained."""
        manifest = _folder.read_json(folder / self.result / _folder.MANIFEST)
        done = _folder.checkpoints(folder / "checkpoints")
        if not done or int(_folder.verified(done[-1])["step"]) != manifest.get("steps"):
            raise SavedDataError(
                f"this run is finished and its last checkpoint is gone; load {folder / 'student'} instead"
            )
        read_weights(lesson, done[-1])
        return manifest["steps"], manifest.get("loss"), records

    def _fit(self, lesson: Lesson, args: Any, facts: dict[str, Any], checkpoint: Path | None, what: str) -> int:
        student, mode = lesson.student, lesson.student.training
        with ExitStack() as cleanup:
            if self.settings.get("gradient_checkpointing"):
                cleanup.callback(_recompute(student))
            keep = self.settings.get("save_total_limit")
            trainer = DistillTrainer(lesson, args, self.items, self.collator, facts, keep)
            trainer.add_callback(Stop(trainer))
            if (sys.stderr.isatty() if self.options.progress is None else self.options.progress) and self.main:
                bar = Bar(what)
                trainer.add_callback(bar)
                cleanup.callback(bar.bar.stop)
            cleanup.callback(student.train, mode)
            cleanup.enter_context(lesson.open(args.device))
            if trainer.accelerator.num_processes == 1:  # several processes would stop at different steps
                trainer.asked = cleanup.enter_context(gently(signal.SIGINT, signal.SIGTERM))
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if trainer.stopped is not None and trainer.state.global_step < trainer.state.max_steps:
            message = f"stopped at step {trainer.state.global_step} with a checkpoint; go on with resume=True"
            raise KeyboardInterrupt(message) if trainer.stopped == signal.SIGINT else SystemExit(128 + trainer.stopped)
        return trainer.state.global_step

    def _publish(self, student: Any, folder: Path, facts: dict[str, Any], steps: int, loss: float | None) -> None:
        def write(target: Path) -> None:
            if "teacher" in self.more and hosts.carried(
                student
            ):  # a converted model: what differs from its base, for `qkv.load`
                hosts.save(student, target)
            else:
                with _quiet():
                    student.save_pretrained(target)
            if (target / _folder.MANIFEST).is_file():  # a folder of qkv's own: what it says about itself stays
                about.update(_folder.read_json(target / _folder.MANIFEST))
            if self.options.tokenizer is not None:
                self.options.tokenizer.save_pretrained(target)

        versions = {m.__name__: m.__version__ for m in (torch, transformers, accelerate)}
        about: dict[str, Any] = {
            "kind": "distilled" if "teacher" in self.more else "trained",
            "run": facts,
            "steps": steps,
            "loss": loss if loss is None or math.isfinite(loss) else None,
            "student": {"class": type(student).__name__, "fingerprint": stack.fingerprint(student)},
            "versions": versions | {"python": platform.python_version()},
        }
        _folder.publish(folder / self.result, write, about)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bars for writing shards."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def _recompute(student: Any) -> Callable[[], None]:
    """Gradient checkpointing on (the kind that keeps what hooks read in the graph); returns what turns it off again."""
    if getattr(student, "is_gradient_checkpointing", False):
        return lambda: None
    names = ("activation_checkpointing", "gradient_checkpointing")
    enable, disable = (
        next((f for n in names if (f := getattr(student, f"{n}_{verb}", None)) is not None), None)
        for verb in ("enable", "disable")
    )
    if enable is None or disable is None:
        raise Refused(f"{type(student).__name__} does not support gradient checkpointing")
    enable({"use_reentrant": False})
    return disable
