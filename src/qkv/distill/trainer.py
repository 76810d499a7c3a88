"""The one trainer of all objectives, on transformers' Trainer.

What is trained is a `Lesson`: the student, and whatever parameters the objective itself learns. The teacher hangs beside it,
never part of it: not trained, not saved, not wrapped, always in eval mode. A lesson gives the mean loss of one batch; the
trainer weights it by the batch's share (the objective's `row_weights`) of everything in the optimiser step, over accumulated
batches and over devices, so that cutting a batch in pieces changes nothing but rounding.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import itertools
import json
import math
import os
import platform
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import accelerate
import safetensors.torch
import torch
import transformers
from accelerate import PartialState
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import qkv
from qkv import hosts
from qkv.core import registry
from qkv.core.errors import (
    InvalidInput,
    InvalidParameter,
    Refused,
    SavedDataError,
    StorageError,
    TrainingError,
    UnknownName,
)
from qkv.core.objective import Net, Objective
from qkv.core.spec import near
from qkv.distill import _run
from qkv.distill._data import Collator, Items
from qkv.distill.capture import Tap, describe, real_tokens
from qkv.hosts import stack

FINE_TUNING = "fine-tuning"

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


# -- lessons ------------------------------------------------------------------------------------------------------


class Lesson(nn.Module):
    """The trained module: a student, and the parameters of its loss. ``lesson(batch)`` -> (mean loss, named parts)."""

    def __init__(self, student: Any, helper: nn.Module | None = None) -> None:
        super().__init__()
        self.student, self.helper = student, helper

    @contextmanager
    def open(self, device: torch.device) -> Iterator[None]:
        """Everything that must be in place while the lesson is given."""
        yield

    def weigh(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The weight of this batch in an optimiser step."""
        raise NotImplementedError

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss of the batch and its parts."""
        raise NotImplementedError


class Taught(Lesson):
    """Learning from a teacher by an objective."""

    def __init__(self, teacher: Any, student: Any, objective: Objective, nets: tuple[Net, Net], helper: Any) -> None:
        super().__init__(student, helper)
        self.objective = objective
        needs = objective.needs(*nets)
        self.taps = Tap(teacher, nets[0], needs[0], learns=False), Tap(student, nets[1], needs[1], learns=True)

    @contextmanager
    def open(self, device: torch.device) -> Iterator[None]:
        """Both networks are read while the lesson is open."""
        self.taps[0].model.to(device)
        with self.taps[0], self.taps[1]:
            yield

    def weigh(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The sum of the objective's row weights."""
        return self.objective.row_weights(real_tokens(batch)).sum()

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Lesson`."""
        teacher, student = (tap(batch) for tap in self.taps)
        loss = self.objective(teacher, student, batch, self.helper)
        return loss.total, loss.parts


class FineTuned(Lesson):
    """The plain baseline: the student's own loss, on ``labels`` or, for a causal language model, on the next token."""

    def __init__(self, student: Any, net: Net) -> None:
        super().__init__(student)
        self.accepted = set(inspect.signature(student.forward).parameters)
        if "labels" not in self.accepted:
            raise Refused(
                f"{FINE_TUNING}: {net.name} has no loss of its own (its forward takes no labels); load it with a head, or "
                "leave this baseline out"
            )
        self.next_token = net.outputs == net.vocabulary and all(s.causal for s in net.sites)

    def _labels(self, batch: Mapping[str, Tensor]) -> Tensor:
        if "labels" in batch:
            return batch["labels"]
        if not self.next_token:
            raise InvalidInput(
                f"{FINE_TUNING}: the data holds no labels, and the student does not predict the next token"
            )
        return batch["input_ids"].masked_fill(~real_tokens(batch), -100)

    def weigh(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The number of targets."""
        labels = self._labels(batch)
        return (labels[..., 1:] if self.next_token else labels).ne(-100).sum().float()

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Lesson`."""
        inputs = {k: v for k, v in batch.items() if k in self.accepted}
        return self.student(**inputs | {"labels": self._labels(batch)}).loss.float(), {}


# -- the trainer --------------------------------------------------------------------------------------------------


class DistillTrainer(Trainer):
    """transformers' Trainer around a `Lesson`: global normalisation, sealed checkpoints, records, an end on bad numbers."""

    def __init__(
        self,
        lesson: Lesson,
        args: TrainingArguments,
        items: Items,
        collator: Collator,
        facts: dict[str, Any],
        keep: int | None,
    ) -> None:
        super().__init__(model=lesson, args=args, train_dataset=items, data_collator=collator)
        self.lesson, self.facts, self.keep = lesson, facts, keep
        self.folder = Path(cast(str, args.output_dir))
        self.records = _run.Records(self.folder.parent / "metrics.jsonl")
        self.model_accepts_loss_kwargs = True  # the loss comes normalised over the whole step
        self.loss_is_scaled_for_ga = True
        self.stopped: int | None = None
        self._parts: dict[str, Tensor] = {}
        self._steps = 0
        self.remove_callback(PrinterCallback)

    # -- loss

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The batches of one optimiser step and their weight over all of them and all devices."""
        samples = list(itertools.islice(epoch_iterator, num_batches))
        if not samples:
            return samples, None
        self._steps += 1
        weight = torch.stack([self.lesson.weigh(batch).to(device) for batch in samples]).sum()
        return samples, cast(Tensor, self.accelerator.gather(weight)).sum()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **rest: Any
    ) -> Any:
        """The share of this batch in the step's loss. Devices average gradients, so each gives its share times their number."""
        total, parts = model(inputs)
        if not bool(torch.isfinite(total)):
            raise TrainingError(
                f"the loss is {float(total.detach())} at step {self.state.global_step + 1}; {self._last()}. Lower "
                "learning_rate, warm up longer, or train without bf16"
            )
        share = float(self.lesson.weigh(inputs)) / float(num_items_in_batch)
        for name, part in parts.items():
            old = self._parts.get(name)
            self._parts[name] = part * share if old is None else old + part * share
        return total * share * self.accelerator.num_processes

    def _last(self) -> str:
        done = _run.checkpoints(self.folder)
        return f"the newest checkpoint is {done[-1]}" if done else "there is no checkpoint yet"

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the loss's parts, and write the record."""
        if "loss" in logs:
            steps = max(1, self._steps)
            parts = {n: float(cast(Tensor, self.accelerator.reduce(x, "sum"))) / steps for n, x in self._parts.items()}
            self._parts, self._steps = {}, 0
            if self.is_world_process_zero():
                record = {"step": self.state.global_step, "epoch": self.state.epoch, "parts": parts, **logs}
                self.records.write({k: v for k, v in record.items() if v == v})
        super().log(logs, start_time)

    # -- checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        bad = next((n for n, p in self.lesson.named_parameters() if not bool(torch.isfinite(p).all())), None)
        step = self.state.global_step
        if bad is not None:
            raise TrainingError(
                f"{bad} holds NaN or infinite values after step {step}; nothing was saved: {self._last()}"
            )
        folder = self.folder / f"checkpoint-{step}"
        if self.is_world_process_zero():
            shutil.rmtree(folder, ignore_errors=True)  # what a write that was cut off left behind
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                _run.seal(folder, {"step": step, "run": self.facts})
                _run.rotate(self.folder, self.keep)
        except (OSError, RuntimeError, safetensors.SafetensorError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise StorageError(
                f"the checkpoint of step {step} could not be written ({error}); {self._last()}. Free some space and resume"
            ) from error

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.folder)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            write_weights(self.lesson, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        read_weights(self.lesson, Path(resume_from_checkpoint))


def write_weights(lesson: Lesson, folder: Path) -> None:
    """The student's weights and configuration, and the helper's weights, for `read_weights` and ``from_pretrained``."""
    safetensors.torch.save_model(lesson.student, str(folder / "model.safetensors"), metadata={"format": "pt"})
    lesson.student.config.save_pretrained(folder)
    if lesson.helper is not None:
        safetensors.torch.save_model(lesson.helper, str(folder / "helper.safetensors"))


def read_weights(lesson: Lesson, folder: Path) -> None:
    """Load what `write_weights` wrote; `SavedDataError` when it does not fit."""
    for module, name in ((lesson.student, "model.safetensors"), (lesson.helper, "helper.safetensors")):
        if module is None:
            continue
        try:
            safetensors.torch.load_model(module, str(folder / name), strict=True)
        except (OSError, RuntimeError, safetensors.SafetensorError) as error:
            raise SavedDataError(f"{folder / name} does not fit this student: {error}") from error


class _Stop(TrainerCallback):
    """After a signal: finish the step, save, stop."""

    def __init__(self, trainer: DistillTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> Any:
        if self.trainer.stopped is not None:
            control.should_save = control.should_training_stop = True
        return control


class _Bar(TrainerCallback):
    """A progress bar with the loss and the time left."""

    def __init__(self, what: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, TextColumn("loss {task.fields[loss]}"), console=Console(stderr=True))
        self.what, self.task = what, None

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.bar.start()
        self.task = self.bar.add_task(self.what, total=state.max_steps, completed=state.global_step, loss="...")

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.bar.update(cast(Any, self.task), completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
        if logs and "loss" in logs:
            self.bar.update(cast(Any, self.task), loss=f"{logs['loss']:.4g}")

    def on_train_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.bar.stop()


@contextmanager
def _signals(trainer: DistillTrainer) -> Iterator[None]:
    """The first Ctrl-C (or SIGTERM) ends the run after its step, with a checkpoint; another Ctrl-C a second later at once.

    What comes within the second is the same wish twice: `timeout`, `make` and launchers pass a signal on to a process that
    the terminal has signalled already. Left alone in other threads than the main one, and in runs of several processes,
    which would stop at different steps.
    """
    if threading.current_thread() is not threading.main_thread() or trainer.accelerator.num_processes > 1:
        yield
        return
    first = math.inf

    def ask(number: int, frame: Any) -> None:
        nonlocal first
        if trainer.stopped is None:
            trainer.stopped, first = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - first > 1.0:
            raise KeyboardInterrupt("stopped at once, without a checkpoint")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# -- a run --------------------------------------------------------------------------------------------------------


def distill(
    teacher: Any,
    student: Any,
    objective: Objective | str,
    data: Any,
    out: str | Path,
    options: Options,
    arguments: Mapping[str, Any],
) -> Outcome:
    """See `qkv.distill.distill`."""
    method = _objective(objective)
    nets = describe(teacher, options.teacher_tokenizer), describe(student, options.tokenizer)
    method.check(*nets)
    _apart(teacher, student)
    settings = settings_of(arguments, method.recipe())
    items = Items(data, options.tokenizer, options.max_length)
    _check_keys(items[0], teacher, student)
    lessons = {"student": _lesson(method, teacher, student, nets, settings)}
    kept = options.baselines or options.evaluate
    start = {k: v.detach().to("cpu", copy=True) for k, v in student.state_dict().items()} if kept else {}
    names = [FINE_TUNING if b == FINE_TUNING else str(_objective(b)) for b in options.baselines]
    if len(set(names)) < len(names):
        raise InvalidParameter(f"baselines={names} name the same one twice")
    for one in options.baselines:  # refused now rather than after the student is done
        _lesson(one, teacher, student, nets, settings)

    out = Path(out)
    run = Run(items, Collator(nets[1].vocabulary, _pad(options.tokenizer, student)), settings, options, teacher, start)
    if options.evaluate is not None:
        run.score("teacher", teacher)
        run.score("untrained", student)
    steps, loss, records = run.train(lessons["student"], method.to_dict(), out, options.resume, "student")
    run.score("student", student)
    for name, one in zip(names, options.baselines, strict=True):
        copied = copy.deepcopy(student)
        copied.load_state_dict(start)
        lesson = _lesson(one, teacher, copied, nets, settings)
        facts = {"id": FINE_TUNING} if one == FINE_TUNING else _objective(one).to_dict()
        folder = "".join(c if c.isalnum() or c in "-=." else "_" for c in name)[:80]
        run.train(lesson, facts, out / "baselines" / folder, bool(options.resume), name)
        run.score(name, copied)
    if run.main and run.scores:
        _run.write_json(out / "result.json", {"format": _run.FORMAT, "qkv": qkv.__version__, "scores": run.scores})
    return Outcome(student, out / "student", steps, loss, tuple(records), run.scores)


def _objective(one: Objective | str) -> Objective:
    method = registry.method(one) if isinstance(one, str) else one
    if not isinstance(method, Objective):
        kind = getattr(getattr(method, "spec", None), "kind", type(method).__name__)
        raise InvalidParameter(
            f"{method} is of kind {kind}, not an objective; `qkv methods --kind objective` lists them"
        )
    return method


def _apart(teacher: Any, student: Any) -> None:
    """A student that shares storage with its teacher would change it."""
    left = [m.id for m, _ in hosts.carried(student) if m.spec.kind != "conversion"]
    if left:
        raise Refused(
            f"the student carries {', '.join(left)}, which a trained student cannot be saved with; `qkv.revert` it first"
        )
    converted = tuple(f"{site}." for _, sites in hosts.carried(student) for site in sites)
    base = (
        [n for n, p in student.named_parameters() if p.requires_grad and not n.startswith(converted)]
        if converted
        else []
    )
    if base:
        raise Refused(
            f"the student is a converted model, saved by what differs from its base, and {base[0]} of that base would be "
            "trained too; `qkv.distill.heal` trains the converted layers alone"
        )
    mine = {p.untyped_storage().data_ptr(): n for n, p in teacher.named_parameters() if p.numel()}
    for name, p in student.named_parameters():
        shared = mine.get(p.untyped_storage().data_ptr()) if p.numel() else None
        if shared is not None:
            raise Refused(
                f"the student's {name} is the teacher's own {shared}: training would change the teacher. Pass a copy "
                "(copy.deepcopy, or qkv.distill.drop_layers)"
            )
    if not any(p.requires_grad for p in student.parameters()):
        raise Refused("no parameter of the student is trainable (requires_grad is False everywhere)")


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


def _check_keys(item: Mapping[str, Any], teacher: Any, student: Any) -> None:
    accepted = {"labels"}.union(*(inspect.signature(m.forward).parameters for m in (teacher, student)))
    unknown = sorted(set(item) - accepted)
    if unknown:
        raise InvalidInput(f"data items hold {', '.join(unknown)}, which neither model takes")


def _pad(tokenizer: Any, student: Any) -> int:
    for source in (tokenizer, student.config):
        pad = getattr(source, "pad_token_id", None)
        if isinstance(pad, int) and pad >= 0:
            return pad
    return 0


def _lesson(
    one: Objective | str, teacher: Any, student: Any, nets: tuple[Net, Net], settings: Mapping[str, Any]
) -> Lesson:
    if one == FINE_TUNING:
        return FineTuned(student, nets[1])
    method = _objective(one)
    method.check(*nets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(settings.get("seed", 42)))
        helper = method.helper(*nets)
    if helper is not None:
        first = next(p for p in student.parameters() if p.is_floating_point())
        helper = helper.to(first.device, torch.promote_types(first.dtype, torch.float32))
    return Taught(teacher, student, method, nets, helper)


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
        records = _run.Records(folder / "metrics.jsonl")
        if checkpoint is None and (folder / self.result / _run.MANIFEST).is_file():
            return self._finished(lesson, folder, records.read())
        PartialState().wait_for_everyone()  # everyone has looked before anyone writes
        if self.main:
            _run.write_json(folder / "run.json", {"format": _run.FORMAT, "qkv": qkv.__version__, "run": facts})
            records.rewind(0 if checkpoint is None else int(_run.read_json(checkpoint / _run.MANIFEST)["step"]))
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
            done = _run.checkpoints(folder / "checkpoints")
            at = f"at {done[-1].name}" if done else "without a checkpoint yet"
            raise TrainingError(f"{folder} already holds a run ({at}): pass resume=True to go on, or another folder")
        else:
            _run.same_run(folder, _run.read_json(saved).get("run", {}), facts)
        if not resume:
            return None
        if not isinstance(resume, bool):
            _run.same_run(Path(resume), _run.verified(Path(resume))["run"], facts)
            return Path(resume)
        if (folder / self.result / _run.MANIFEST).is_file():
            return None
        done = _run.checkpoints(folder / "checkpoints")
        if not done:
            return None
        _run.same_run(done[-1], _run.verified(done[-1])["run"], facts)
        return done[-1]

    def _finished(self, lesson: Lesson, folder: Path, records: list[dict[str, Any]]) -> tuple[int, float | None, Any]:
        """The run had ended: its student is loaded, nothing is trained."""
        manifest = _run.read_json(folder / self.result / _run.MANIFEST)
        done = _run.checkpoints(folder / "checkpoints")
        if not done or int(_run.verified(done[-1])["step"]) != manifest.get("steps"):
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
            trainer.add_callback(_Stop(trainer))
            if (sys.stderr.isatty() if self.options.progress is None else self.options.progress) and self.main:
                bar = _Bar(what)
                trainer.add_callback(bar)
                cleanup.callback(bar.bar.stop)
            cleanup.callback(student.train, mode)
            cleanup.enter_context(lesson.open(args.device))
            cleanup.enter_context(_signals(trainer))
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
            if (target / _run.MANIFEST).is_file():  # a folder of qkv's own: what it says about itself stays
                about.update(_run.read_json(target / _run.MANIFEST))
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
        _run.publish(folder / self.result, write, about)


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
