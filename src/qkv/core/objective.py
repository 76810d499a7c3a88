"""Objectives: what a student learns from a teacher. One file gives the definition and the loss; one trainer runs them all.

An `Objective` says what must be read from both networks (`Needs`, by layer), judges a pair of them by their structure
(`Net`) before anything runs, and turns what was read on one batch (`Trace`) into a scalar with named parts. Reading is
`qkv.distill.capture`'s work, training `qkv.distill.trainer`'s.

Axes: B batch, N tokens, H query heads, G key/value heads, D head width, E value width, C model width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from qkv.core.errors import InvalidInput, Refused
from qkv.core.site import Site
from qkv.core.spec import Method, Spec


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What to read from one network; layers count from 0, hidden states from 0 = embeddings to `Net.layers` = last.

    projections: layers whose q, k, v are read before any rotary rotation (after a norm of queries and keys, if the model
    has one). attention: layers whose q, k, v are read as the attention sees them. hidden: hidden states. outputs: layers
    whose attention module's output is read. logits: the output of the head.
    """

    projections: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()
    hidden: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    logits: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Net:
    """The structure of a teacher or student, as far as an objective may depend on it.

    name: its class. family: its architecture (transformers' ``model_type``). width: C. sites: its self-attention, one per
    layer, in order. vocabulary: number of token embeddings, None without tokens. tokens: a hash of its tokenizer's
    vocabulary, None when unknown. outputs: width of its logits (tokens or classes), None without a head.
    """

    name: str
    family: str
    width: int
    sites: tuple[Site, ...]
    vocabulary: int | None = None
    tokens: str | None = None
    outputs: int | None = None

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.sites)

    def layer(self, number: int) -> int:
        """A layer number from 0, negative ones counting from the end; `Refused` when there is no such layer."""
        if not -self.layers <= number < self.layers:
            raise Refused(
                f"{self.name} has {self.layers} layers (0 to {self.layers - 1}, or -1 = last); asked for {number}"
            )
        return number % self.layers

    def site(self, number: int) -> Site:
        """The self-attention of a layer."""
        return self.sites[self.layer(number)]


@dataclass(frozen=True, slots=True)
class Projections:
    """q ``[B, H, N, D]``, k ``[B, G, N, D]``, v ``[B, G, N, E]`` of one layer and the softmax scale of its attention."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float


@dataclass(frozen=True, slots=True)
class Trace:
    """What one network did on one batch.

    net: its structure. real: bool ``[B, N]``, False at padding. projections, attention: `Projections` by layer. hidden:
    ``[B, N, C]`` by number. logits: of the head, or None when nobody asked. outputs: of attention modules, ``[B, N, C]`` by
    layer.
    """

    net: Net
    real: Tensor
    projections: Mapping[int, Projections] = field(default_factory=dict)
    attention: Mapping[int, Projections] = field(default_factory=dict)
    hidden: Mapping[int, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None
    outputs: Mapping[int, Tensor] = field(default_factory=dict)

    def detach(self) -> Trace:
        """The same values, cut off from the network's graph."""

        def cut(layers: Mapping[int, Projections]) -> dict[int, Projections]:
            return {n: replace(p, q=p.q.detach(), k=p.k.detach(), v=p.v.detach()) for n, p in layers.items()}

        return replace(
            self,
            projections=cut(self.projections),
            attention=cut(self.attention),
            hidden={n: x.detach() for n, x in self.hidden.items()},
            logits=None if self.logits is None else self.logits.detach(),
            outputs={n: x.detach() for n, x in self.outputs.items()},
        )


class Loss(NamedTuple):
    """total: the scalar to descend, a weighted mean over the rows of the batch. parts: named scalars for the records."""

    total: Tensor
    parts: dict[str, Tensor]


Batch = Mapping[str, Any]
Reference = Callable[["Objective", Trace, Trace, Batch, "nn.Module | None"], Tensor]


@dataclass(frozen=True, kw_only=True)
class ObjectiveSpec(Spec):
    """Facts about an objective.

    reference: ``reference(objective, teacher, student, batch, helper) -> scalar``, the definition, short and slow.
    minimum: the loss of a student that equals its teacher, or None where the definition does not say.
    """

    kind: ClassVar[str] = "objective"
    reference: Reference
    minimum: float | None = 0.0


@dataclass(frozen=True, kw_only=True)
class Objective(Method):
    """Base of objectives. Call it with two traces; the teacher never gets a gradient, and the loss is at least float32."""

    spec: ClassVar[ObjectiveSpec]

    @abstractmethod
    def needs(self, teacher: Net, student: Net) -> tuple[Needs, Needs]:
        """What to read from the teacher and from the student. Raises `Refused` for a layer that does not exist."""

    @abstractmethod
    def loss(self, teacher: Trace, student: Trace, batch: Batch, helper: nn.Module | None) -> Loss:
        """The loss on one batch: a mean over its rows with the weights of `row_weights`. helper: what `helper` built."""

    def refusals(self, teacher: Net, student: Net) -> list[str]:
        """Why the pair does not fit, beyond what holds for every objective; empty when it does."""
        return []

    def row_weights(self, real: Tensor) -> Tensor:
        """``[B]`` weight of each row in the mean over a batch: 1, and 0 for a row without a real token.

        real: bool ``[B, N]``. Batches that are accumulated, or spread over devices, are weighted by these sums, so that
        cutting a batch in pieces changes nothing.
        """
        return real.any(-1).float()

    def helper(self, teacher: Net, student: Net) -> nn.Module | None:
        """Parameters the loss itself learns (a width adapter); trained and checkpointed, never saved with the student."""
        return None

    def recipe(self) -> dict[str, Any]:
        """Published training settings, by names of `transformers.TrainingArguments`; the caller's own win."""
        return {}

    def check(self, teacher: Net, student: Net) -> None:
        """Raise `Refused` with every reason why this teacher cannot teach this student. Tokens must mean the same to both."""
        reasons = []
        known = teacher.tokens is not None and student.tokens is not None
        if known and teacher.tokens != student.tokens:
            reasons.append("their tokenizers have different vocabularies, so the same id is another word to each")
        elif not known and teacher.vocabulary != student.vocabulary:
            reasons.append(
                f"the teacher has {teacher.vocabulary} tokens and the student {student.vocabulary}; give both "
                "tokenizers if only unused rows differ"
            )
        if not reasons:
            try:
                self.needs(teacher, student)
                reasons += self.refusals(teacher, student)
            except Refused as error:
                reasons.append(str(error))
        if reasons:
            raise Refused(f"{self}: {teacher.name} cannot teach {student.name}: {'; '.join(reasons)}")

    def __call__(
        self, teacher: Trace, student: Trace, batch: Batch | None = None, helper: nn.Module | None = None
    ) -> Loss:
        """`loss`, with the teacher cut off, autocast off, and the result checked."""
        if teacher.real.shape != student.real.shape or not torch.equal(teacher.real, student.real):
            raise InvalidInput(
                f"{self.id}: teacher and student must see the same tokens; they saw {tuple(teacher.real.shape)} and "
                f"{tuple(student.real.shape)} with {int(teacher.real.sum())} and {int(student.real.sum())} real ones"
            )
        with torch.autocast(student.real.device.type, enabled=False):
            total, parts = self.loss(teacher.detach(), student, {} if batch is None else batch, helper)
        if total.ndim or total.dtype not in (torch.float32, torch.float64):
            raise InvalidInput(
                f"{self.id}: the loss must be one number in float32 or wider, got {total.dtype} {tuple(total.shape)}"
            )
        return Loss(total, {name: part.detach() for name, part in parts.items()})
