"""Broken objectives, each by a mistake that people make; every law of the kind must catch its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from qkv.core.objective import Loss, Objective, Trace
from qkv.distill.objectives import minilm
from qkv.distill.objectives.minilm import MiniLM
from qkv.testing import mutant


def with_loss(change: Any, **more: Any) -> Any:
    """MiniLM whose loss is ``change(own, self, teacher, student, batch, helper)``."""

    def loss(self: Any, teacher: Trace, student: Trace, batch: Any, helper: Any) -> Loss:
        return change(MiniLM.loss, self, teacher, student, batch, helper)

    return mutant(MiniLM, loss=loss, trials=({"relation_heads": 12}, {"version": 1}), **more)


def cross_entropy(own: Any, self: Any, teacher: Trace, student: Trace, batch: Any, helper: Any) -> Loss:
    """The entropy of the teacher's relation is left in."""
    total, parts = own(self, teacher, student, batch, helper)
    tap = (teacher.attention if self.rotated else teacher.projections)[self.layers(teacher.net, student.net)[0]]
    p = (tap.v @ tap.v.mT).softmax(-1)
    return Loss(total - (p * p.log()).sum(-1).mean(), parts)


def layer_off_by_one(own: Any, self: Any, teacher: Trace, student: Trace, batch: Any, helper: Any) -> Loss:
    """The student's values, shifted by a token, stand in for another layer."""
    tap = dict(student.projections or student.attention)
    tap = {n: replace(p, v=p.v.roll(1, 2)) for n, p in tap.items()}
    return own(self, teacher, replace(student, projections=tap, attention=tap), batch, helper)


def teacher_in_graph(self: Any, teacher: Trace, student: Trace, batch: Any = None, helper: Any = None) -> Loss:
    """The teacher is not cut off."""
    return self.loss(teacher, student, batch, helper)


def climbs(own: Any, self: Any, teacher: Trace, student: Trace, batch: Any, helper: Any) -> Loss:
    """A sign."""
    total, parts = own(self, teacher, student, batch, helper)
    return Loss(1.0 - total, parts)


def detached(own: Any, self: Any, teacher: Trace, student: Trace, batch: Any, helper: Any) -> Loss:
    """The loss says how far the student is, its gradient says nothing."""
    total, parts = own(self, teacher, student, batch, helper)
    return Loss(total.detach() + 0.0 * total, parts)


def pads_are_tokens(own: Any, self: Any, teacher: Trace, student: Trace, batch: Any, helper: Any) -> Loss:
    """Relations run over the whole rectangle."""
    everywhere = torch.ones_like(student.real)
    return own(self, replace(teacher, real=everywhere), replace(student, real=everywhere), batch, helper)


def mean_of_rectangle(own: Any, self: Any, teacher: Trace, student: Trace, batch: Any, helper: Any) -> Loss:
    """Divided by the padded length."""
    total, parts = own(self, teacher, student, batch, helper)
    return Loss(total * student.real.sum() / student.real.numel(), parts)


def masked_mean(own: Any, self: Any, teacher: Trace, student: Trace, batch: Any, helper: Any) -> Loss:
    """Averaged over the tokens of the batch while sequences are said to count alike."""
    return own(self.replace(average="token"), teacher, student, batch, helper)


def sum_over_heads(own: Any, self: Any, teacher: Trace, student: Trace, batch: Any, helper: Any) -> Loss:
    """Summed, not averaged, over relation heads."""
    total, parts = own(self, teacher, student, batch, helper)
    return Loss(total * self.count("vv", teacher.net, student.net), parts)


def interleaved_heads() -> Any:
    """Relation heads cut from every R-th column instead of neighbouring columns."""

    def regroup(x: torch.Tensor, heads: int) -> torch.Tensor:
        b, h, n, d = x.shape
        return x.transpose(1, 2).reshape(b, n, h * d // heads, heads).permute(0, 3, 1, 2)

    def loss(self: Any, teacher: Trace, student: Trace, batch: Any, helper: Any) -> Loss:
        kept, minilm.regroup = minilm.regroup, regroup
        try:
            return MiniLM.loss(self, teacher, student, batch, helper)
        finally:
            minilm.regroup = kept

    return mutant(MiniLM, loss=loss, trials=({"relation_heads": 12},))


def anything_goes(self: Any, teacher: Any, student: Any) -> None:
    """Only the objective's own conditions are checked."""
    self.needs(teacher, student)


MUTANTS = {
    "minimum_at_teacher": [("entropy", with_loss(cross_entropy)), ("off_by_one", with_loss(layer_off_by_one))],
    "no_gradient_to_teacher": [("in_graph", mutant(MiniLM, __call__=teacher_in_graph))],
    "falls": [("sign", with_loss(climbs)), ("detached", with_loss(detached))],
    "padding_changes_nothing": [("pads", with_loss(pads_are_tokens)), ("rectangle", with_loss(mean_of_rectangle))],
    "batch_is_mean_of_rows": [("masked_mean", with_loss(masked_mean)), ("rectangle", with_loss(mean_of_rectangle))],
    "equals_reference": [("summed", with_loss(sum_over_heads)), ("interleaved", interleaved_heads)],
    "refuses_foreign_vocabulary": [("lenient", mutant(MiniLM, check=anything_goes))],
}
assert issubclass(MiniLM, Objective)
