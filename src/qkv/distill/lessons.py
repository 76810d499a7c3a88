"""What is trained: a student, whatever parameters its loss learns, and the mean loss of one batch.

The teacher hangs beside a lesson, never part of it: not trained, not saved, not wrapped, always in eval mode.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from qkv.core.errors import InvalidInput, Refused, SavedDataError
from qkv.core.objective import Net, Objective
from qkv.distill.capture import Tap, real_tokens

FINE_TUNING = "fine-tuning"


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
