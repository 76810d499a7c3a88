"""Rows by index, and their sums, whose gradients have the same bits every time: on CUDA atomics add in any order.

Axes: T rows, S sums, K indices, D whatever follows.
"""

from __future__ import annotations

import torch
from torch import Tensor


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """``x[index]``: ``[T, D]``, ``[K]`` -> ``[K, D]``. On CUDA the gradient is summed by a sort."""
    return x[index] if x.is_cuda else x.index_select(0, index)


def sum_rows(x: Tensor, owner: Tensor, count: int) -> Tensor:
    """Rows ``[T, D]`` summed by owner ``[T]``: ``[count, D]``. On CUDA by a sort."""
    zeros = x.new_zeros(count, *x.shape[1:])
    return zeros.index_put((owner,), x, accumulate=True) if x.is_cuda else zeros.index_add(0, owner, x)


def take_head_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of ``[B, G, M, D]`` by ``[B, H, ...]`` indices into M: ``[B, H, ..., D]``; heads of a group read its rows."""
    b, g, m, d = x.shape
    head = torch.arange(index.shape[1], device=x.device) // (index.shape[1] // g)
    start = (torch.arange(b, device=x.device)[:, None] * g + head) * m  # [B, H]
    at = (index + start.reshape(*start.shape, *(1,) * (index.ndim - 2))).flatten()
    return take_rows(x.reshape(-1, d), at).reshape(*index.shape, d)
