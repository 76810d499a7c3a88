"""Broken steerings, each by a mistake that people make; every law of the kind must catch its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qkv.core.steering import Running
from qkv.steer import act, head_ablation
from qkv.testing import mutant


def edited(cls: Any, change: Callable[..., Tensor]) -> Any:
    """A steering whose output goes through ``change(out, plain, heads)`` after the wrapped call."""

    def wrap(self: Any, site: Any, compute: Any) -> Any:
        inner, heads = cls.wrap(self, site, compute), cls.heads_at(self, site)

        def run(q: Tensor, k: Tensor, v: Tensor, **call: Any) -> Tensor:
            return change(inner(q, k, v, **call), compute(q, k, v, **call), list(heads))

        return run

    return mutant(cls, wrap=wrap)


def times_one(out: Tensor, plain: Tensor, heads: list[int]) -> Tensor:
    return (out.double() * (1 + 1e-6)).to(out.dtype) if out.dtype != torch.bfloat16 else out + 1e-2


def takes_and_gives_nothing(out: Tensor, plain: Tensor, heads: list[int]) -> Tensor:
    return torch.minimum(out, plain)


def gives_to_all(out: Tensor, plain: Tensor, heads: list[int]) -> Tensor:
    out = out.clone()
    out[:, heads] = 0.9 * out[:, heads] + 0.1 / out.shape[-1]
    return out


def one_head_too_many(out: Tensor, plain: Tensor, heads: list[int]) -> Tensor:
    other = next(h for h in range(out.shape[1]) if h not in heads)
    return out.index_fill(1, torch.tensor([other]), 0.0)


def batch_mean(out: Tensor, plain: Tensor, heads: list[int]) -> Tensor:
    return plain + (out - plain).mean(0, keepdim=True)


def first_sample_for_all(mass: Tensor, count: Tensor, **call: Any) -> Tensor:
    return SINKS(mass, count, **call)[:1].expand(mass.shape)


SINKS = act.pick_sinks


def wrap_first_sample(self: Any, site: Any, compute: Any) -> Any:
    """The published code edits by the sinks of sample 0."""
    inner = act.AttentionCalibration.wrap(self, site, compute)

    def run(*qkv: Tensor, **call: Any) -> Tensor:
        act.pick_sinks = first_sample_for_all
        try:
            return inner(*qkv, **call)
        finally:
            act.pick_sinks = SINKS

    return run


def wrap_counts_padding(self: Any, site: Any, compute: Any) -> Any:
    """The mean over all rows of the batch, padded ones included."""
    inner = act.AttentionCalibration.wrap(self, site, compute)

    def all_rows(mass: Tensor, count: Tensor, **call: Any) -> Tensor:
        n = mass.shape[-1]
        return SINKS(mass, torch.arange(n, 0, -1, dtype=mass.dtype).expand(count.shape), **call)

    def run(*qkv: Tensor, **call: Any) -> Tensor:
        act.pick_sinks = all_rows
        try:
            return inner(*qkv, **call)
        finally:
            act.pick_sinks = SINKS

    return run


def ablates_in_the_batch(out: Tensor, plain: Tensor, heads: list[int]) -> Tensor:
    return out + 1e-3 * plain.mean(0, keepdim=True)


KEPT: dict[Any, Running] = {}


def wrap_on_the_method(self: Any, site: Any, compute: Any, running: Any) -> Any:
    """The sums are kept for the site, whoever calls."""
    return act.AttentionCalibration.wrap_running(self, site, compute, KEPT.setdefault(site.name, Running()))


def wrap_beside_the_cache(self: Any, site: Any, compute: Any, running: Any) -> Any:
    """The sums are kept for the generation, but nobody tells them of its beams."""
    return act.AttentionCalibration.wrap_running(self, site, compute, KEPT.setdefault(id(running), Running()))


def sums(wrap: Any) -> Callable[[], Any]:
    """With fresh sums for every run of the law."""

    def make() -> Any:
        KEPT.clear()
        return mutant(act.AttentionCalibration, wrap_running=wrap, trials=DECODING)

    return make


DECODING = ({"heads": ("2.1", "2.2", "3.5"), "beta": 0.0, "threshold": 0.05, "decode": True},)

MUTANTS: dict[str, list[tuple[str, Any]]] = {
    "neutral_is_the_model": [
        ("rounds", edited(act.AttentionCalibration, times_one)),
        ("wrong neutral", mutant(act.AttentionCalibration, neutral={"beta": 0.0})),
    ],
    "rows_sum_to_one": [
        ("takes and gives nothing", edited(act.AttentionCalibration, takes_and_gives_nothing)),
        ("claims to be normalised", mutant(head_ablation.HeadAblation, normalised=True)),
    ],
    "hidden_keys_stay_hidden": [("gives to all columns", edited(act.AttentionCalibration, gives_to_all))],
    "untouched_heads_untouched": [
        ("one head too many", edited(head_ablation.HeadAblation, one_head_too_many)),
        ("one head too many in act", edited(act.AttentionCalibration, one_head_too_many)),
    ],
    "row_is_edited_as_alone": [
        ("mean over the batch", edited(act.AttentionCalibration, batch_mean)),
        ("sinks of sample 0", mutant(act.AttentionCalibration, wrap=wrap_first_sample)),
        ("padding counted", mutant(act.AttentionCalibration, wrap=wrap_counts_padding)),
        ("leaks over the batch", edited(head_ablation.HeadAblation, ablates_in_the_batch)),
    ],
    "the_hook_fires": [
        ("never edits", mutant(act.AttentionCalibration, wrap_running=lambda self, site, compute, running: compute)),
        ("fits one layer only", mutant(head_ablation.HeadAblation, wrap=lambda self, site, compute: compute)),
    ],
    "generations_are_apart": [
        ("sums on the method", sums(wrap_on_the_method)),
        ("sums blind to beams", sums(wrap_beside_the_cache)),
    ],
    "acts_or_is_refused": [
        ("accepts anything", mutant(head_ablation.HeadAblation, fits=lambda self, site: None)),
    ],
}
