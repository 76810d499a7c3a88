"""Broken operators, each by a mistake that people make; every law of the kind must catch its own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qkv.core.spec import Limit
from qkv.core.state import State
from qkv.ops import full, gla, linear
from qkv.testing import mutant


def edited(form: Callable[..., Any], change: Callable[..., Tensor]) -> Callable[..., Any]:
    """A form whose output is passed through ``change(out, q, k, v)``; signature and state stay."""

    @functools.wraps(form)
    def broken(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **call: Any) -> Any:
        got = form(q, k, v, *rest, **call)
        return (change(got[0], q, k, v), got[1]) if isinstance(got, tuple) else change(got, q, k, v)

    return broken


def fed(form: Callable[..., Any], change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[..., Any]:
    """A form whose arguments (q, k, v and keywords) are passed through `change` first."""

    @functools.wraps(form)
    def broken(q: Tensor, k: Tensor, v: Tensor, **call: Any) -> Any:
        return form(**change({"q": q, "k": k, "v": v} | call))

    return broken


def full_with(change: Callable[..., Tensor]) -> Any:
    return mutant(full.Full, fast=edited(full.fast, change))


def gla_with(change: Callable[..., Tensor]) -> Any:
    return mutant(gla.GatedLinearAttention, fast=edited(gla.fast, change))


def gla_fed(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    return mutant(gla.GatedLinearAttention, fast=fed(gla.fast, change))


def ignores_scale(q: Tensor, k: Tensor, v: Tensor, *, scale: float, **call: Any) -> Tensor:
    return full.fast(q, k, v, scale=q.shape[-1] ** -0.5, **call)


def border_counted_twice(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat(
        [out[:, :, :6], out[:, :, 6:] + 1e-6 * v.repeat_interleave(q.shape[1] // v.shape[1], 1)[:, :, 6:]], 2
    )


def current_token_decays(q: Tensor, k: Tensor, v: Tensor, *, log_decay: Tensor, **call: Any) -> Any:
    shape = (
        (log_decay if log_decay.ndim == 4 else log_decay[..., None])
        if log_decay.ndim > 1
        else log_decay[None, :, None, None]
    )
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1) * shape.exp()
    return gla.reference(q, k, v.repeat_interleave(q.shape[1] // v.shape[1], 1), log_decay=log_decay, **call)


def sums_in_low_precision(q: Tensor, k: Tensor, v: Tensor, *, scale: float, chunk_size: int = 64, **call: Any) -> Any:
    state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    outs = []
    for t in range(q.shape[2]):
        state = state + k[:, :, t, :, None] * v[:, :, t, None, :]
        outs.append(scale * (q[:, :, t, None] @ state)[..., 0, :])
    return torch.stack(outs, 2)


def sees_one_ahead(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = True, padding: Any = None
) -> Tensor:
    n, m = q.shape[2], k.shape[2]
    seen = torch.ones(n, m, dtype=torch.bool, device=q.device)
    return full.sdpa(q, k, v, mask=seen.tril(m - n + 1) if causal else seen, scale=scale)


def heads_tiled(q: Tensor, k: Tensor, v: Tensor, *, padding: Any = None, **call: Any) -> Tensor:
    repeat = q.shape[1] // k.shape[1]
    return full.fast(q, k.repeat(1, repeat, 1, 1), v.repeat(1, repeat, 1, 1), **call)


def counts_padding(q: Tensor, k: Tensor, v: Tensor, *, padding: Tensor | None = None, **call: Any) -> Tensor:
    return full.fast(q, k, v, **call)


def reads_padding(self: Any, q: Tensor, k: Tensor, v: Tensor, *, padding: Tensor | None = None, causal: bool = True,
                  form: str = "fast") -> Tensor:  # fmt: skip
    logits = q @ k.mT * q.shape[-1] ** -0.5
    if causal:
        logits = logits.masked_fill(~full.causal_mask(q.shape[2], k.shape[2], q.device), -1e30)
    weights = logits.softmax(-1) if padding is None else logits.softmax(-1) * padding[:, None, None, :]
    return weights @ v


def reads_before_writing(q: Tensor, k: Tensor, v: Tensor, state: State, *, scale: float, **call: Any) -> Any:
    return scale * (q @ state["state"]).to(q.dtype), gla.step(q, k, v, state, scale=scale, **call)[1]


def writes_into_state(q: Tensor, k: Tensor, v: Tensor, state: State, **call: Any) -> Any:
    out, new = gla.step(q, k, v, state, **call)
    state["state"].copy_(new["state"])
    return out, replace(new, tensors={"state": state["state"]})


def first_row_for_all(call: dict[str, Any]) -> dict[str, Any]:
    state = call["initial_state"]
    if state is None:
        return call
    same = {"state": state["state"][:1].expand_as(state["state"])}
    return call | {"initial_state": replace(state, tensors=same)}


class Forgetful(State):
    """Says that it took tokens out, and did not."""

    def crop(self, tokens: int) -> State:
        return self


@functools.wraps(gla.fast)
def forgets_nothing(q: Tensor, k: Tensor, v: Tensor, **call: Any) -> Any:
    got = gla.fast(q, k, v, **call)
    return (got[0], Forgetful(got[1].owner, got[1].tensors, got[1].seen)) if isinstance(got, tuple) else got


@functools.wraps(gla.fast)
def half_state(q: Tensor, k: Tensor, v: Tensor, **call: Any) -> Any:
    got = gla.fast(q, k, v, **call)
    return (got[0], got[1].to(q.dtype)) if isinstance(got, tuple) else got


def factored_decay(q: Tensor, k: Tensor, v: Tensor, *, scale: float, log_decay: Tensor, **call: Any) -> Tensor:
    """The textbook factorisation (q exp(G)) (k exp(-G))^T: right, until exp(-G) overflows."""
    k, v, g = gla._expanded(q, k, v, log_decay, None)
    total = g.cumsum(2)
    return scale * ((q * total.exp()) @ (k * (-total).exp()).mT).tril() @ v


def unsafe_softmax(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = True, padding: Any = None
) -> Tensor:
    weights = (scale * q @ k.mT).exp()
    if causal:
        weights = weights * full.causal_mask(q.shape[2], k.shape[2], q.device)
    return (weights @ v) / weights.sum(-1, keepdim=True)


def views_inputs(q: Tensor, k: Tensor, v: Tensor, **call: Any) -> Tensor:
    return full.fast(q.view(-1, *q.shape[2:]).view(q.shape), k, v, **call)


def scales_in_place(q: Tensor, k: Tensor, v: Tensor, *, scale: float, **call: Any) -> Tensor:
    with torch.no_grad():
        q.mul_(scale)
    return full.fast(q, k, v, scale=1.0, **call)


def branches_on_values(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return out if out.sum().item() > 0 else out.clone()


def on_the_cpu(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return out * torch.ones(q.shape[2], 1, dtype=out.dtype)


def leaks_by_selection(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return out + 1e-3 * (v.detach().mean((1, 2, 3))[:, None, None, None] > 0)


def leaks_by_mean(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return out - 1e-9 * v.mean()


def batch_numbered(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return out * (1 + torch.arange(len(out), dtype=out.dtype, device=out.device))[:, None, None, None]


MUTANTS: dict[str, list[tuple[str, Any]]] = {
    "shape_dtype_device": [
        ("float32 out", full_with(lambda out, *_: out.float())),
        ("made on the cpu", full_with(on_the_cpu)),
        ("transposed", full_with(lambda out, *_: out.transpose(1, 2))),
        ("state in half", mutant(gla.GatedLinearAttention, fast=half_state)),
    ],
    "equals_reference": [
        ("ignores scale", mutant(full.Full, fast=ignores_scale)),
        ("chunk border", gla_with(border_counted_twice)),
        ("nan", full_with(lambda out, *_: out * torch.nan)),
    ],
    "reference_equals_loop": [
        ("current token decays", mutant(gla.GatedLinearAttention, reference=current_token_decays)),
    ],
    "gradients_equal_reference": [
        ("decay detached", gla_fed(lambda c: c | {"log_decay": c["log_decay"].detach()})),
        ("value detached", mutant(full.Full, fast=fed(full.fast, lambda c: c | {"v": c["v"].detach()}))),
    ],
    "low_precision": [("state in the low precision", mutant(linear.Linear, fast=sums_in_low_precision))],
    "gradcheck": [
        ("key detached", mutant(full.Full, fast=fed(full.fast, lambda c: c | {"k": c["k"].detach()}))),
        ("state detached", gla_fed(lambda c: c | {
            "initial_state": c["initial_state"] and replace(
                c["initial_state"], tensors={"state": c["initial_state"]["state"].detach()})})),
    ],
    "no_future_leak": [
        ("mask off by one", mutant(full.Full, fast=sees_one_ahead)),
        ("tiny mean", full_with(leaks_by_mean)),
        ("selection without gradient", full_with(leaks_by_selection)),
    ],
    "batch_permutation": [("row number", full_with(batch_numbered))],
    "head_permutation": [
        ("heads tiled", mutant(full.Full, fast=heads_tiled)),
        ("head number", full_with(lambda out, *_: out * torch.arange(out.shape[1], dtype=out.dtype)[:, None, None])),
    ],
    "row_alone": [("batch mean", full_with(lambda out, *_: out - out.mean(0, keepdim=True)))],
    "padding_changes_nothing": [
        ("padding ignored", mutant(full.Full, fast=counts_padding)),
        ("decays over padding", gla_fed(lambda c: c | {"log_decay": c["log_decay"] - 0.1, "padding": None})),
    ],
    "nan_in_padding_changes_nothing": [("zero times NaN", mutant(full.Full, __call__=reads_padding))],
    "prefill_plus_steps": [
        ("reads before writing", mutant(gla.GatedLinearAttention, step=reads_before_writing)),
        ("writes into the given state", mutant(gla.GatedLinearAttention, step=writes_into_state)),
    ],
    "state_handover": [
        ("state ignored", gla_fed(lambda c: c | {"initial_state": None})),
        ("state comes back halved", gla_fed(lambda c: c | {
            "initial_state": c["initial_state"] and replace(
                c["initial_state"], tensors={"state": c["initial_state"]["state"] / 2})})),
    ],
    "state_batch_index": [("first row for all", gla_fed(first_row_for_all))],
    "state_crop": [("forgets nothing", mutant(gla.GatedLinearAttention, fast=forgets_nothing))],
    "deterministic": [("noise", full_with(lambda out, *_: out + 1e-3 * torch.rand_like(out)))],
    "finite_on_extremes": [
        ("factored decay", mutant(gla.GatedLinearAttention, fast=factored_decay)),
        ("softmax without maximum", mutant(full.Full, fast=unsafe_softmax)),
    ],
    "layout_and_inputs": [
        ("view", mutant(full.Full, fast=views_inputs)),
        ("in place", mutant(full.Full, fast=scales_in_place)),
    ],
    "compiles": [("item", full_with(branches_on_values))],
    "declared_limits": [
        ("wrong limit", mutant(gla.GatedLinearAttention, limits=(Limit("linear", inputs={"log_decay": -0.1}),))),
        ("wrong neighbour", mutant(linear.Linear, limits=(Limit("full"),))),
    ],
}  # fmt: skip
