"""Laws of objectives, on a tiny bidirectional encoder and a tiny causal decoder with grouped keys (random weights).

Each law runs on every family of the two that the objective accepts; refusing both breaks it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from qkv.core.errors import Refused
from qkv.core.objective import Net, Trace
from qkv.testing._law import Case, close, expect, finite, law, refuses

VOCABULARY = 61
LENGTHS = (7, 4, 2)
TEXT = (
    "Call me Ishmael. Some years ago - never mind how long precisely - having little or no money in my purse, and nothing "
    "particular to interest me on shore, I thought I would sail about a little and see the watery part of the world. It is "
    "a way I have of driving off the spleen and regulating the circulation."
)  # H. Melville, Moby-Dick (1851), public domain


@dataclass(frozen=True)
class Couple:
    """A teacher, a student, their structures, and the objective's helper for them."""

    family: str
    teacher: Any
    student: Any
    nets: tuple[Net, Net]
    helper: nn.Module | None

    def traces(self, method: Any, batch: dict[str, Tensor]) -> tuple[Trace, Trace]:
        """What both do on a batch, read as the trainer reads it."""
        from qkv.distill.capture import Tap

        needs = method.needs(*self.nets)
        with Tap(self.teacher, self.nets[0], needs[0], learns=False) as tap:
            taught = tap(batch)
        with Tap(self.student, self.nets[1], needs[1], learns=True) as tap:
            return taught, tap(batch)

    def loss(self, method: Any, batch: dict[str, Tensor]) -> Any:
        """The objective on a batch."""
        return method(*self.traces(method, batch), batch, self.helper)


@cache
def _model(family: str, width: int, layers: int, seed: int) -> Any:
    from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": 53,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "initializer_range": 0.2,
        "max_position_embeddings": 64,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if family == "encoder":
            return BertForMaskedLM(BertConfig(**sizes)).double().eval()
        return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, head_dim=24)).double().eval()


def _couples(case: Case, twin: bool = False, dtype: torch.dtype = torch.float64) -> Iterator[Couple]:
    """One couple per family that the objective accepts; twin: the student is a copy of its teacher."""
    from qkv.distill.capture import describe

    reasons = []
    for family in ("encoder", "decoder"):
        teacher = copy.deepcopy(_model(family, 96, 3, 11 + case.seed)).to(case.device, dtype)
        student = copy.deepcopy(teacher if twin else _model(family, 48, 2, 23 + case.seed)).to(case.device, dtype)
        nets = describe(teacher), describe(student)
        try:
            case.method.check(*nets)
        except Refused as error:
            reasons.append(str(error))
            continue
        with torch.random.fork_rng():
            torch.manual_seed(5)
            helper = case.method.helper(*nets)
        yield Couple(family, teacher, student, nets, None if helper is None else helper.to(case.device, dtype))
    expect(len(reasons) < 2, f"every tiny pair is refused: {'; '.join(reasons)}")


def _batch(case: Case, lengths: tuple[int, ...] = LENGTHS, left: int = 0, right: int = 0) -> dict[str, Tensor]:
    """Rows of those lengths, padded to a rectangle and by `left` and `right` more; what lies under the padding differs."""
    width = left + max(lengths) + right
    ids = case.draw(left + 31 * right).integers(len(lengths), width, high=VOCABULARY)
    mask = torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        ids[row, left : left + n] = case.draw(100 + row).integers(n, high=VOCABULARY)
        mask[row, left : left + n] = 1
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def _real_batch(case: Case, rows: int = 4, length: int = 24) -> dict[str, Tensor]:
    """A batch of real text, one token per character."""
    letters = sorted(set(TEXT))
    ids = torch.tensor([letters.index(c) for c in TEXT[: rows * length]], device=case.device).reshape(rows, length)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@law(
    "objective",
    "A student that equals its teacher has nothing to learn: the loss is at its stated minimum and its gradient is zero. "
    "Usual causes: the entropy of the teacher left in or out, two scales, layers off by one, dropout in one of the two.",
    applies=lambda case: case.spec.minimum is not None,
)
def minimum_at_teacher(case: Case) -> None:
    """At student = teacher: the stated minimum, and no slope."""
    for couple in _couples(case, twin=True):
        total, parts = couple.loss(case.method, _batch(case))
        want = torch.tensor(float(case.spec.minimum), dtype=torch.float64)
        close(total.cpu(), want, atol=1e-12, what=f"{couple.family}: loss of the teacher's copy")
        for name, part in parts.items():
            finite(part, f"{couple.family}: part {name!r}")
        total.backward()
        slope = max((float(p.grad.abs().max()) for p in couple.student.parameters() if p.grad is not None), default=0.0)
        expect(slope <= 1e-9, f"{couple.family}: the gradient at the minimum is {slope:.3g}, not 0")


@law(
    "objective",
    "The teacher is fixed: no gradient may reach its weights or what was read from it, and it must not be moved to another "
    "mode. Usual causes: a teacher run outside no_grad, a term that is symmetric in both.",
)
def no_gradient_to_teacher(case: Case) -> None:
    """The teacher gets no gradient, the student does."""
    from qkv.distill.capture import Tap

    for couple in _couples(case):
        needs = case.method.needs(*couple.nets)
        batch = _batch(case)
        with Tap(couple.teacher, couple.nets[0], needs[0], learns=True) as tap:
            taught = tap(batch)
        student = couple.traces(case.method, batch)[1]
        case.method(taught, student, batch, couple.helper).total.backward()
        touched = [n for n, p in couple.teacher.named_parameters() if p.grad is not None and bool(p.grad.any())]
        expect(not touched, f"{couple.family}: a gradient reached the teacher's {', '.join(touched[:3])}")
        reached = [p for p in couple.student.parameters() if p.grad is not None and bool(p.grad.any())]
        expect(reached, f"{couple.family}: no gradient reached the student")
        couple.teacher.train()
        a, b = (couple.traces(case.method, batch)[0] for _ in range(2))
        expect(couple.teacher.training, f"{couple.family}: reading the teacher changed its mode")
        for left, right in zip(_tensors(a), _tensors(b), strict=True):
            expect(torch.equal(left, right), f"{couple.family}: a teacher in training mode is read with its dropout on")


def _tensors(trace: Trace) -> list[Tensor]:
    out = [x for p in (*trace.projections.values(), *trace.attention.values()) for x in (p.q, p.k, p.v)]
    return [*out, *trace.hidden.values(), *trace.outputs.values(), *(() if trace.logits is None else (trace.logits,))]


@law(
    "objective",
    "Descending the loss on one small batch of real text must lower it clearly. Usual causes: a sign, a detached student, a "
    "loss that does not depend on what is trained.",
)
def falls(case: Case) -> None:
    """Twelve steps of Adam lower it by a fifth."""
    for couple in _couples(case, dtype=torch.float32):
        batch, losses = _real_batch(case), []
        couple.student.train()
        learned = [*couple.student.parameters(), *(couple.helper.parameters() if couple.helper is not None else ())]
        optimizer = torch.optim.Adam(learned, lr=3e-3)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for _ in range(12):
                optimizer.zero_grad()
                total = couple.loss(case.method, batch).total
                total.backward()
                optimizer.step()
                losses.append(float(total.detach()))
        expect(losses[0] > 0, f"{couple.family}: the loss starts at {losses[0]:.3g}: nothing to lower")
        start, end = losses[0], sum(losses[-3:]) / 3
        floor = case.spec.minimum or 0.0
        expect(
            end - floor < 0.8 * (start - floor),
            f"{couple.family}: 12 steps took the loss from {start:.4g} only to {end:.4g}",
        )


@law(
    "objective",
    "Padding is no data: more of it, other tokens under it, or padding on the other side must not change the loss. Usual "
    "causes: relations over padded columns, a mean over the rectangle.",
)
def padding_changes_nothing(case: Case) -> None:
    """Three more padded columns on either side."""
    for couple in _couples(case):
        want = couple.loss(case.method, _batch(case)).total
        for side, batch in {"right": _batch(case, right=3), "left": _batch(case, left=3)}.items():
            got = couple.loss(case.method, batch).total
            close(got, want, rtol=1e-9, what=f"{couple.family}: loss with 3 more padded columns on the {side}")


@law(
    "objective",
    "The loss of a batch is the mean of its rows' losses with the weights that the objective states (`row_weights`); the "
    "trainer relies on it to cut batches in pieces. Usual causes: a mean over micro-batches, a mean over the rectangle.",
)
def batch_is_mean_of_rows(case: Case) -> None:
    """A batch against its rows one by one; a model's norms run in float32, which a device rounds by the shape of its input."""
    tolerance = 1e-9 if case.device == "cpu" else 1e-6
    for couple in _couples(case):
        batch = _batch(case)
        want = couple.loss(case.method, batch).total
        weights = case.method.row_weights(batch["attention_mask"].bool()).double()
        rows = [
            couple.loss(case.method, {k: v[b : b + 1] for k, v in batch.items()}).total for b in range(len(LENGTHS))
        ]
        got = (torch.stack(rows) * weights).sum() / weights.sum()
        close(got, want, rtol=tolerance, what=f"{couple.family}: weighted mean of the rows' losses")


@law(
    "objective",
    "The loss that is trained equals its definition in float64. Usual causes: a scale, a transposed relation, heads that are "
    "interleaved instead of cut.",
)
def equals_reference(case: Case) -> None:
    """Against the definition."""
    for couple in _couples(case):
        batch = _batch(case)
        traces = couple.traces(case.method, batch)
        want = case.spec.reference(case.method, *traces, batch, couple.helper)
        got = case.method(*traces, batch, couple.helper).total
        expect(bool(want != 0), f"{couple.family}: the definition gives exactly 0 here: nothing was compared")
        close(got, want, rtol=1e-9, what=f"{couple.family}: loss")


@law(
    "objective",
    "A token must be the same word to both: a pair with other vocabularies is refused before anything runs. Usual cause: a "
    "`check` that forgot its base's.",
)
def refuses_foreign_vocabulary(case: Case) -> None:
    """Another number of tokens, another tokenizer."""
    for couple in _couples(case):
        teacher, student = couple.nets
        grown = replace(student, vocabulary=VOCABULARY + 2)
        refuses(Refused, lambda t=teacher, g=grown: case.method.check(t, g), "another number of tokens")
        other = replace(teacher, tokens="a"), replace(student, tokens="b")
        refuses(Refused, lambda o=other: case.method.check(*o), "another tokenizer")
