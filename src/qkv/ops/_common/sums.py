"""Sums over tokens that operators share: padding left out, cut into chunks, weighed under a normaliser, divided by a total."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EMPTY = -1e30  # the logit of no token at all: finite, so that differences are never inf - inf


def without_padding(x: Tensor, padding: Tensor | None) -> Tensor:
    """``[B, H, N, .]`` with 0 at padding ``[B, N]`` (True = real)."""
    return x if padding is None else x.masked_fill(~padding[:, None, :, None], 0.0)


def in_chunks(x: Tensor, size: int) -> Tensor:
    """``[B, H, N, .]`` -> ``[B, H, chunks, C, .]`` with zeros at the end: values of 0 add nothing, logs of 0 do not decay."""
    if x.shape[2] % size:
        x = F.pad(x, (0, 0, 0, -x.shape[2] % size))
    return x.unflatten(2, (-1, size))


def softmax_weights(logits: Tensor, lse: Tensor) -> Tensor:
    """exp(logit - lse), 0 for a logit that is no token (`EMPTY`)."""
    return (logits - lse).clamp(max=0.0).exp().masked_fill(logits <= EMPTY / 2, 0.0)


def divided(out: Tensor, total: Tensor) -> Tensor:
    """The quotient, and 0 where the total is 0."""
    some = total != 0
    return torch.where(some, out / torch.where(some, total, 1.0), 0.0)
