r"""Attention of a block of tree nodes behind a long prefix: prefix without a mask, tree with its own, merged by log-sum-exp.

    O = w O_p + (1 - w) O_t,   w = sigmoid(lse_p - lse_t)

Every node sees the whole prefix, so that part needs no mask, the heads of a group read it once, and any fast kernel serves;
the mask is as small as the tree. Paper: arXiv:2502.17421, section on hybrid tree attention.

Axes: B batch, H query heads, G key/value heads, R = H / G, N nodes (certain tokens among them), P prefix keys, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qkv.core.attend import attend
from qkv.core.merge import merge


def reference(q: Tensor, k: Tensor, v: Tensor, tree: Tensor, *, scale: float | None = None) -> Tensor:
    """The definition: one masked softmax. k, v ``[B, G, P + N, .]``; tree bool ``[N, N]``."""
    n, m = q.shape[2], k.shape[2]
    mask = torch.cat((tree.new_ones(n, m - n), tree), 1)
    return attend(q, k, v, mask=mask, scale=scale).out


def hybrid_tree_attention(
    q: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    k_tree: Tensor,
    v_tree: Tensor,
    tree: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """Attention of q ``[B, H, N, D]`` over a prefix ``[B, G, P, .]`` and a tree ``[B, G, N', .]``, both possibly empty.

    tree: bool, broadcastable to ``[B, 1, N, N']``, True = may attend. Gives ``[B, H, N, E]``; a query without a key gives 0.
    """
    parts = []
    if k_prefix.shape[2]:
        parts.append(prefix_attention(q, k_prefix, v_prefix, scale=scale))
    if k_tree.shape[2]:
        done = attend(q, k_tree, v_tree, mask=tree, scale=scale)
        parts.append((done.out, done.lse))
    if not parts:
        return q.new_zeros(*q.shape[:3], v_tree.shape[-1])
    return merge(*parts)[0] if len(parts) > 1 else parts[0][0]


def prefix_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Every query sees every key: out ``[B, H, N, E]`` and lse ``[B, H, N]``; the heads of a group share what they read."""
    b, h, n, d = q.shape
    g, e = k.shape[1], v.shape[-1]
    packed = q.reshape(b, g, h // g * n, d)
    if (
        q.is_cuda
        and q.dtype in (torch.float16, torch.bfloat16)
        and d == e
        and d % 8 == 0
        and not torch.is_grad_enabled()
    ):
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(packed, k, v, scale=scale)
    else:
        out, lse, _ = attend(packed, k, v, scale=scale)
    return out.reshape(b, h, n, e), lse.reshape(b, h, n)


def tree_compute(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """`hybrid_tree_attention` as the attention of a cache (`DenseCache.tree`): the newest N keys are the block."""
    n, m = q.shape[2], k.shape[2]
    assert mask is not None and not causal
    p = m - n
    return hybrid_tree_attention(q, k[:, :, :p], v[:, :, :p], k[:, :, p:], v[:, :, p:], mask[..., p:], scale=scale)


def ancestors(parents: Sequence[int]) -> Tensor:
    """Bool ``[n, n]``: which nodes lie on the way from a root to each node, itself included. parents: -1 for roots."""
    out = torch.eye(len(parents), dtype=torch.bool)
    for i, parent in enumerate(parents):
        if parent >= 0:
            out[i] |= out[parent]
    return out
