"""Broken probes, each by a mistake that people make; every law of the kind must catch its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

import qkv
from qkv.core.columns import column_means
from qkv.core.heads import HeadTable
from qkv.probes import attention_sink_emergence as sinks
from qkv.probes import retrieval_heads as retrieval
from qkv.testing import mutant


def ran(cls: Any, change: Callable[..., Any]) -> Any:
    """A probe whose `run` goes through ``change(run, self, model, inputs)``."""

    def run(self: Any, model: Any, **inputs: Any) -> Any:
        return change(lambda: cls.run(self, model, **inputs), self, model, inputs)

    return mutant(cls, run=run)


def steers_while_it_looks(run: Any, self: Any, model: Any, inputs: Any) -> Any:
    with qkv.applied(model, qkv.method("head-ablation", heads=("1.0",))):
        return run()


def through_another_attention(run: Any, self: Any, model: Any, inputs: Any) -> Any:
    """Eager attention shows its maps, and rounds differently."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        return run()
    finally:
        model.set_attn_implementation(before)


def forgets_a_hook(run: Any, self: Any, model: Any, inputs: Any) -> Any:
    model.register_forward_hook(lambda *a: None)
    return run()


def stays_applied_when_interrupted(run: Any, self: Any, model: Any, inputs: Any) -> Any:
    qkv.apply(model, "full")
    out = run()
    qkv.revert(model)
    return out


def transposed(run: Any, self: Any, model: Any, inputs: Any) -> Any:
    table = run()
    return replace(table, values=table.values.flip(1))


def as_a_report(change: Callable[[Any], Any]) -> Callable[..., Any]:
    def outer(run: Any, self: Any, model: Any, inputs: Any) -> Any:
        return change(run())

    return outer


def mean_over_later_rows(self: Any, call: Any) -> torch.Tensor:
    """The largest weight instead of the mean."""
    eye = torch.eye(call.k.shape[2], dtype=call.q.dtype, device=call.q.device).expand(*call.k.shape[:3], -1)
    return column_means(call.q, call.k, eye, mask=call.mask, causal=call.causal, scale=call.scale).out.amax(-2)


def any_hit_is_all(self: Any, found: Any, span: Any, shape: Any) -> torch.Tensor:
    return (retrieval.RetrievalHeads.score(self, found, span, shape) > 0).double()


def noisy(self: Any, call: Any) -> torch.Tensor:
    got = sinks.importance(call)
    return got + 1e-3 * torch.rand_like(got)


def tensor_in_the_notes(table: HeadTable) -> HeadTable:
    return replace(table, notes={"scores": table.values})


def half_the_layers(table: HeadTable) -> HeadTable:
    return replace(table, values=table.values[1:])


MUTANTS: dict[str, list[tuple[str, Any]]] = {
    "changes_no_output_bit": [
        ("steers while it looks", ran(retrieval.RetrievalHeads, steers_while_it_looks)),
        ("another attention", ran(sinks.AttentionSinks, through_another_attention)),
    ],
    "leaves_the_model_alone": [
        ("forgets a hook", ran(sinks.AttentionSinks, forgets_a_hook)),
        ("stays applied when interrupted", ran(sinks.AttentionSinks, stays_applied_when_interrupted)),
    ],
    "finds_a_planted_head": [
        ("heads in reverse", ran(retrieval.RetrievalHeads, transposed)),
        (
            "any hit anywhere",
            mutant(sinks.AttentionSinks, importance=lambda self, call: sinks.importance(call) * 0 + 1),
        ),
    ],
    "known_maps_give_known_scores": [
        ("one hit is all", mutant(retrieval.RetrievalHeads, score=any_hit_is_all)),
        ("largest instead of mean", mutant(sinks.AttentionSinks, importance=mean_over_later_rows)),
    ],
    "result_is_data": [
        ("tensor in the notes", ran(retrieval.RetrievalHeads, as_a_report(tensor_in_the_notes))),
        ("layers missing", ran(retrieval.RetrievalHeads, as_a_report(half_the_layers))),
    ],
    "deterministic": [("noise", mutant(sinks.AttentionSinks, importance=noisy))],
}
