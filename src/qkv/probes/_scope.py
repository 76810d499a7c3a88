r"""How far a head can look where linear position biases (ALiBi) fade it: a bound from its weights alone (RazorAttention).

    x = gain * z + offset,  |z| <= sqrt(C)                      what any layer norm gives
    q_h(x) . (k_h(y) - k_h(x)) scale  <=  gap_h                 for all such x, y
    A_h[i, j] <= exp(gap_h - slope_h (i - j)) < eps             for i - j > scope_h = (gap_h - ln eps) / slope_h

for a key competes at least with the query's own token, which has no bias against it. With A = W_Q diag(gain) and
B = W_K diag(gain), their rows centred (z has mean 0), and c = W_Q offset + b_Q:

    gap_h = 2 scale (C |A^T B|_2 + sqrt(C) |B^T c|)

The page's form, 2 |W_Q W_K| (|gain|^2 + |offset|^2), is the same where all gains are equal and no bound where they are not.
Clipped queries and keys (MPT's clip_qkv) no longer have that product; there gap_h bounds their norms one by one.

Axes: H query heads, G key/value heads, D head width, C model width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from qkv.core.heads import HeadTable, write_json
from qkv.hosts.transformers_inline import Weights


def gaps(w: Weights) -> Tensor:
    """``[H]``, float64: how much more than its own logit a query can give to any other token, biases aside."""
    heads, (d, c) = w.query.shape[0], w.query.shape[1:]
    gain, offset = w.gain.double(), w.offset.double()
    query, key = w.query.double(), w.key.double().repeat_interleave(heads // w.key.shape[0], 0)
    still = (query @ offset) + w.query_bias.double()  # [H, D]
    a, b = (x * gain for x in (query, key))
    a, b = (x - x.mean(-1, keepdim=True) for x in (a, b))
    root = math.sqrt(c)
    if w.clip is None:
        upper = [torch.linalg.qr(x.mT, mode="r").R for x in (a, b)]  # A^T = Q R, so |A^T B| = |R_A R_B^T|
        product = torch.linalg.matrix_norm(upper[0] @ upper[1].mT, ord=2)
        return 2 * w.scale * (c * product + root * (still.unsqueeze(1) @ b).squeeze(1).norm(dim=-1))
    most = w.clip * math.sqrt(d)
    asks = (root * torch.linalg.matrix_norm(a, ord=2) + still.norm(dim=-1)).clamp(max=most)
    differs = (2 * root * torch.linalg.matrix_norm(b, ord=2)).clamp(max=2 * most)
    return w.scale * asks * differs


def scopes(w: Weights, slopes: Sequence[float], eps: float) -> Tensor:
    """``[H]``, float64: the distance beyond which no key draws more than `eps`."""
    return (gaps(w) - math.log(eps)).clamp(min=0).cpu() / torch.tensor(slopes, dtype=torch.float64)


@final
@dataclass(frozen=True)
class Scopes:
    """The scope of every query head in tokens: what the cache method razorattention keeps at a model with ALiBi."""

    table: HeadTable

    def to_dict(self) -> dict[str, Any]:
        """Plain data; razorattention reads it from a file."""
        return {"format": 1, "type": "alibi_scope", "scope": self.table.to_dict()}

    def save(self, path: str | Path) -> Path:
        """Write it as JSON, atomically. Raises `StorageError`."""
        return write_json(path, self.to_dict())

    def plot(self, path: str | Path) -> Path:
        """Draw the table to a file. Raises `MissingDependency`, `StorageError`."""
        return self.table.plot(path)
