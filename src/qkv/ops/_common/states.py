"""Recurrent states of one matrix per head: how they start, are checked and counted; the precision they are computed in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from qkv.core.state import State

Form = TypeVar("Form", bound=Callable[..., Any])


def unrounded(form: Form) -> Form:
    """A form (first argument: a tensor) whose products keep the precision of their factors under autocast too.

    For maps that a product in bfloat16 would ruin: autocast rounds the factors of every matmul, float32 on purpose or not.
    """

    @functools.wraps(form)
    def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        device = x.device.type
        if device not in ("cpu", "cuda") and not torch.amp.is_autocast_available(device):  # "meta", for one
            return form(x, *args, **kwargs)
        with torch.autocast(device, enabled=False):
            return form(x, *args, **kwargs)

    return run  # type: ignore[return-value]


def wide(x: Tensor) -> torch.dtype:
    """The dtype sums run in: float32, or float64 for float64 inputs."""
    return torch.promote_types(x.dtype, torch.float32)


def matrix(owner: str, q: Tensor, v: Tensor, state: State | None, width: int | None = None) -> Tensor:
    """S ``[B, H, D, E]``: zeros, or that of `state` after checking owner and shape. width: D where it is not q's."""
    shape = (*q.shape[:2], width or q.shape[-1], v.shape[-1])
    if state is None:
        return q.new_zeros(shape, dtype=wide(q))
    return state.of(owner, state=shape)["state"]


def after(owner: str, before: State | None, tokens: int, **tensors: Tensor) -> State:
    """The state after `tokens` more tokens than `before`."""
    return State(owner, tensors, tokens + (before.seen if before is not None else 0))


def per_head(q: Tensor, *shared: Tensor) -> list[Tensor]:
    """Keys and values ``[B, G, N, .]`` for every query head, ``[B, H, N, .]``."""
    return [x.repeat_interleave(q.shape[1] // x.shape[1], 1) if x.shape[1] != q.shape[1] else x for x in shared]
