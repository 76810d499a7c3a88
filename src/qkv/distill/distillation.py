"""Distillation of one teacher into one student and its baselines: what must hold before, the runs, the scores."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import qkv
from qkv import hosts
from qkv.core import registry
from qkv.core.errors import InvalidInput, InvalidParameter, Refused
from qkv.core.objective import Net, Objective
from qkv.distill import _folder
from qkv.distill._data import Collator, Items
from qkv.distill.capture import describe
from qkv.distill.lessons import FINE_TUNING, FineTuned, Lesson, Taught
from qkv.distill.run import Options, Outcome, Run, settings_of


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
        _folder.write_json(
            out / "result.json", {"format": _folder.FORMAT, "qkv": qkv.__version__, "scores": run.scores}
        )
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
