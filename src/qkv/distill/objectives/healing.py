r"""Healing: after a conversion the changed layers are trained until the model predicts and attends as its source did.

    loss = mean over real tokens of  T^2 KL(softmax(z^T / T) || softmax(z^S / T))  +  w  mean over layers, channels (a^T - a^S)^2

z are the logits, a the outputs of the attention modules (after their output projection). The recipe that conversions name for
themselves (`qkv.distill.heal`): TransMLA's authors train on 6e9 tokens of text instead, with cross-entropy and all weights.

A student of other depth follows the teacher's layer at the same height, one of other width through a learned map per layer.
Tokens count alike.

Axes: B batch, N tokens, V vocabulary, C width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast, final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qkv.core.objective import Batch, Loss, Needs, Net, Objective, ObjectiveSpec, Trace
from qkv.core.spec import param

ELEMENTS = 1 << 28  # logits held at once beside those of the two networks (1 GiB in float32)


def reference(
    objective: Objective, teacher: Trace, student: Trace, batch: Batch, helper: nn.Module | None = None
) -> Tensor:
    """The definition, one token and one layer at a time."""
    method = cast("Healing", objective)
    assert teacher.logits is not None and student.logits is not None
    total, count = 0.0, 0
    for b, real in enumerate(student.real):
        for n in real.nonzero().flatten().tolist():
            p, q = ((x.logits[b, n] / method.temperature).softmax(-1) for x in (teacher, student))  # type: ignore[index]
            total = total + method.temperature**2 * (p * (p / q).log()).sum()
            for i, (above, layer) in enumerate(method.pairs(teacher.net, student.net)):
                mine = student.outputs[layer][b, n]
                mine = mine if helper is None else cast(nn.ModuleList, helper)[i](mine)
                error = (teacher.outputs[above][b, n] - mine).square().mean()
                total = total + method.attention_weight * error / student.net.layers
            count += 1
    return torch.as_tensor(total / count)


def token_kl(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """``[B, N]`` KL of next-token distributions from logits ``[B, N, V]``, in pieces that the backward pass computes anew."""
    wide = torch.promote_types(student.dtype, torch.float32)

    def piece(t: Tensor, s: Tensor) -> Tensor:
        p, q = ((x.to(wide) / temperature).log_softmax(-1) for x in (t, s))
        return (p.exp() * (p - q)).sum(-1)

    rows = max(1, ELEMENTS // max(1, student[0].numel()))
    if rows >= student.shape[0] or not torch.is_grad_enabled():
        return piece(teacher, student)
    parts = zip(teacher.split(rows), student.split(rows), strict=True)
    return torch.cat([cast(Tensor, checkpoint(piece, t, s, use_reentrant=False)) for t, s in parts])


@final
@dataclass(frozen=True, kw_only=True)
class Healing(Objective):
    """Match next-token distributions and the attention outputs of every layer."""

    spec: ClassVar[ObjectiveSpec] = ObjectiveSpec(
        id="healing",
        title="Healing a converted model: logits and attention outputs of its source",
        paper="arXiv:2502.07864",
        source="paper",
        summary="Trains converted layers until the model predicts and attends as its source, on any text.",
        shown="a few hundred steps bring TransMLA at half the cache and below towards its source's perplexity on unseen text",
        honest="our short recipe, not the authors' 6e9 tokens; what the source did not know it does not teach",
        reference=reference,
        trials=({}, {"attention_weight": 0.0, "temperature": 2.0}, {"attention_weight": 100.0, "temperature": 0.5}),
    )
    temperature: float = param(1.0, "divides both networks' logits; the divergence is scaled by its square", low=1e-3)
    attention_weight: float = param(1.0, "weight of the squared error between attention outputs", low=0)

    def pairs(self, teacher: Net, student: Net) -> list[tuple[int, int]]:
        """(teacher's layer, student's layer), for every layer of the student; none without that term."""
        if not self.attention_weight:
            return []
        deep, high = teacher.layers, student.layers
        return [(max(0, round((i + 1) * deep / high) - 1), i) for i in range(high)]

    def needs(self, teacher: Net, student: Net) -> tuple[Needs, Needs]:
        """Logits, and the outputs of the paired layers."""
        pairs = self.pairs(teacher, student)
        above, below = (tuple(sorted({pair[side] for pair in pairs})) for side in (0, 1))
        return Needs(logits=True, outputs=above), Needs(logits=True, outputs=below)

    def refusals(self, teacher: Net, student: Net) -> list[str]:
        """Networks without logits over the same tokens."""
        if teacher.outputs is None or teacher.outputs != student.outputs:
            found = f"the teacher has {teacher.outputs}, the student {student.outputs}"
            return [f"both need logits over the same tokens ({found}); load them with their language-model heads"]
        return []

    def row_weights(self, real: Tensor) -> Tensor:
        """The number of real tokens of each row."""
        return real.sum(-1).float()

    def helper(self, teacher: Net, student: Net) -> nn.Module | None:
        """A linear map per layer, where attention outputs of unequal width are compared."""
        if not self.attention_weight or teacher.width == student.width:
            return None
        return nn.ModuleList(nn.Linear(student.width, teacher.width, bias=False) for _ in range(student.layers))

    def recipe(self) -> dict[str, Any]:
        """AdamW at 1e-4 with a cosine, 16,384 tokens a step when rows hold 512."""
        return {
            "learning_rate": 1e-4,
            "weight_decay": 0.01,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.03,
            "per_device_train_batch_size": 32,
        }

    def loss(self, teacher: Trace, student: Trace, batch: Batch, helper: nn.Module | None) -> Loss:
        """See `qkv.core.objective.Objective.loss`; parts: ``logits`` and ``attention``."""
        assert teacher.logits is not None and student.logits is not None
        real = student.real
        apart = self.temperature**2 * token_kl(teacher.logits, student.logits, self.temperature)
        weight = real.to(apart.dtype) / real.sum()
        parts = {"logits": (apart.masked_fill(~real, 0.0) * weight).sum()}
        total = parts["logits"]
        errors = []
        for i, (above, layer) in enumerate(self.pairs(teacher.net, student.net)):
            want, got = teacher.outputs[above], student.outputs[layer]
            wide = torch.promote_types(got.dtype, torch.float32)
            got = got.to(wide) if helper is None else cast(nn.ModuleList, helper)[i](got.to(wide))
            error = (want.to(wide) - got).square().mean(-1)
            errors.append((error.masked_fill(~real, 0.0) * weight).sum())
        if errors:
            parts["attention"] = torch.stack(errors).mean()
            total = total + self.attention_weight * parts["attention"]
        return Loss(total, parts)
