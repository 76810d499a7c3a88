"""Recurrent states of one matrix per head: how they start, are checked and counted."""

from __future__ import annotations

import torch
from torch import Tensor

from qkv.core.state import State


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
