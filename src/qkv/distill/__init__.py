"""Distillation: a student learns from a teacher by one of the objectives, with one trainer.

from qkv.distill import distill, drop_layers
student = drop_layers(teacher, (0, 2, 5))
done = distill(teacher, student, "minilm:hidden_weight=1.0", sentences, "runs/mini", tokenizer=tokenizer, max_steps=400)

A converted model is healed by its source: ``heal(model, source, texts, "runs/healed", tokenizer=tokenizer, max_steps=1000)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkv.core.objective import Objective

if TYPE_CHECKING:
    from qkv.distill.run import Outcome

__all__ = ["distill", "drop_layers", "heal", "train"]


def distill(
    teacher: Any,
    student: Any,
    objective: Objective | str,
    data: Any,
    out: str | Path,
    *,
    tokenizer: Any = None,
    teacher_tokenizer: Any = None,
    max_length: int | None = None,
    resume: bool | str | Path = False,
    baselines: Sequence[Objective | str] = (),
    evaluate: Callable[[Any], Mapping[str, float]] | None = None,
    progress: bool | None = None,
    **arguments: Any,
) -> Outcome:
    """Train `student` in place to meet `objective` against `teacher`; everything the run writes is under `out`.

    teacher, student: transformers models that share no parameter. objective: a configuration or setting
    (``"minilm:version=1"``). data: a sequence of strings (then `tokenizer`, cut at `max_length` tokens) or of model inputs.
    tokenizer, teacher_tokenizer: the student's and the teacher's; when both are given, equal vocabularies are required
    instead of equal embedding counts; the first is saved with the result. resume: go on from the newest checkpoint under
    `out` (or from the given one); bit for bit the run it would have been. baselines: trained from the same start on the same
    data with the same settings: ``"fine-tuning"`` (the student's own loss) or other objectives. evaluate: called with the
    teacher, the untrained student, the result and every baseline; its numbers come back in `Outcome.scores`. progress: show
    a bar (default: on a terminal). arguments: names of `transformers.TrainingArguments`; `max_steps` or `num_train_epochs`
    is required, the rest defaults to the objective's published recipe.

    Raises `Refused` for a pair that does not fit, `TrainingError` for a run that cannot go on, `InvalidInput`,
    `InvalidParameter`, `UnknownName`, `StorageError`, `MissingDependency` (it needs accelerate).
    """
    _needs_accelerate()
    from qkv.distill import distillation
    from qkv.distill.run import Options

    options = Options(
        tokenizer=tokenizer,
        teacher_tokenizer=teacher_tokenizer,
        max_length=max_length,
        resume=resume,
        baselines=tuple(baselines),
        evaluate=evaluate,
        progress=progress,
    )
    return distillation.distill(teacher, student, objective, data, out, options, arguments)


def heal(
    model: Any,
    source: Any,
    data: Any,
    out: str | Path,
    *,
    objective: Objective | str | None = None,
    tokenizer: Any = None,
    max_length: int | None = None,
    resume: bool | str | Path = False,
    evaluate: Callable[[Any], Mapping[str, float]] | None = None,
    progress: bool | None = None,
    **arguments: Any,
) -> Outcome:
    """Train the converted layers of `model` back towards `source`, by the recipe of the conversion it carries.

    model: carries a conversion (`qkv.apply(model, "transmla:...", data=...)`); every other weight stays as it is. source: the
    unconverted model (a second copy: converting a model changes it). data, tokenizer, max_length, resume, evaluate, progress,
    arguments: as in `distill`; rows of 512 tokens make the recipe's steps of 16,384. What is not given comes from the
    conversion's `spec.heal`. objective: another than the recipe's. ``out/student`` holds the healed model for `qkv.load`.

    Raises what `distill` raises, and `Refused` for a model without a conversion, or in half precision (bf16=True trains float32
    weights in bfloat16 arithmetic).
    """
    _needs_accelerate()
    from qkv.distill import distillation, healing
    from qkv.distill.run import Options

    recipe = healing.recipe(model)
    options = Options(tokenizer=tokenizer, max_length=max_length, resume=resume, evaluate=evaluate, progress=progress)
    with healing.only_converted(model):
        goal = recipe["objective"] if objective is None else objective
        return distillation.distill(source, model, goal, data, out, options, recipe["arguments"] | arguments)


def train(
    model: Any,
    data: Sequence[Mapping[str, Any]],
    out: str | Path,
    *,
    resume: bool | str | Path = False,
    evaluate: Callable[[Any], Mapping[str, float]] | None = None,
    progress: bool | None = None,
    **arguments: Any,
) -> Outcome:
    """Train a model of `qkv.models` (a `CausalLM`, a `ViT`) from nothing; see `qkv.distill.training.train`."""
    _needs_accelerate()
    from qkv.distill import training

    return training.train(model, data, out, resume=resume, evaluate=evaluate, progress=progress, **arguments)


def drop_layers(model: Any, keep: Sequence[int]) -> Any:
    """A copy of `model` with only the layers `keep`; see `qkv.distill.students.drop_layers`."""
    from qkv.distill import students

    return students.drop_layers(model, keep)


def _needs_accelerate() -> None:
    from importlib.util import find_spec

    from qkv.core.errors import MissingDependency

    if find_spec("accelerate") is None:
        raise MissingDependency(
            "training runs on transformers' Trainer, which needs accelerate: pip install 'qkv[train]'"
        )
