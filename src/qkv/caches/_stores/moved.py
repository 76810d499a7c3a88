"""Attention over chosen blocks that stand elsewhere for every query: the query is turned against the move, the keys stay.

A rotary key moved forward by s positions meets a query as the key itself meets that query moved back by s. So one rotation for a
query and a block takes the place of one for each of the block's tokens, and keys need not be copied query by query: where a good
part of the blocks is chosen by some query, all queries meet all blocks in one product and the others are masked.

Axes: B batch, H query heads, G key/value heads, A heads that choose (G or H), N queries, P blocks, C slots of a block, K chosen
blocks, D head width, E value width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qkv.core.cache import Rope

GATHERED = 12  # blocks that are read in place for what one gathered block costs (measured on a CPU)
PIECE = 1 << 26  # elements of the largest tensor held at once


def attend_moved(
    q: Tensor, keys: Tensor, values: Tensor, index: Tensor, tokens: Tensor, shift: Tensor, *, rope: Rope, block: int, count: int,
    scale: float,
) -> Tensor:  # fmt: skip
    """Softmax attention ``[B, H, N, E]`` of queries ``[B, H, N, D]`` over the first `tokens` slots of the blocks `index`.

    keys ``[B, G, S, D]``, values ``[B, G, S, E]``, contiguous, S a multiple of `block` = C; blocks from `count` on are not
    chosen. index int64 ``[B, A, N, K]``, each block at most once per query among those with tokens; tokens ``[B, A, N, K]``,
    0 .. C; shift ``[B, A, N, K]``, by how many positions a block moves forward. A query without tokens gives 0.
    """
    (b, h, n, d), (a, k) = q.shape, index.shape[1::2]
    whole = n > 1 and count <= GATHERED * k
    per = max(1, PIECE // (b * h * (count * block if whole else k * block * d)))
    run, used = (_in_place, count * block) if whole else (_gathered, keys.shape[2])
    outs = []
    for start in range(0, n, per):
        at = slice(start, min(n, start + per))
        part, move = q[:, :, at] * scale, shift[:, :, at].repeat_interleave(h // a, 1)  # [B, H, n, K]
        turned = rope.rotate(part.unsqueeze(3).expand(-1, -1, -1, k, -1), -move)  # [B, H, n, K, D]
        outs.append(run(turned, keys[:, :, :used], values[:, :, :used], index[:, :, at], tokens[:, :, at], block))
    return torch.cat(outs, 2)


def _in_place(turned: Tensor, keys: Tensor, values: Tensor, index: Tensor, tokens: Tensor, block: int) -> Tensor:
    """All blocks against all queries, in one product per block."""
    (b, h, n, _, d), (g, s) = turned.shape, keys.shape[1:3]
    p, r, heads = s // block, h // g, h // index.shape[1]
    place = torch.where(tokens > 0, index, p).repeat_interleave(heads, 1)  # blocks that are not read go behind the last
    asked = turned.new_zeros(b, h, n, p + 1, d).scatter(3, place.unsqueeze(-1).expand(-1, -1, -1, -1, d), turned)
    upto = tokens.new_zeros(b, h, n, p + 1).scatter(3, place, tokens.repeat_interleave(heads, 1))
    asked, upto = (x[:, :, :, :p].reshape(b, g, r * n, p, -1).transpose(2, 3) for x in (asked, upto.unsqueeze(-1)))
    logits = _wide(asked @ keys.reshape(b, g, p, block, d).mT)  # [B, G, P, R n, C]
    logits = logits.masked_fill(torch.arange(block, device=upto.device) >= upto, -torch.inf)
    top = logits.detach().amax((2, 4), keepdim=True)
    weights = (logits - top.masked_fill(top == -torch.inf, 0)).exp()
    total = weights.sum((2, 4)).unsqueeze(-1)  # [B, G, R n, 1]
    out = _wide(weights.to(values.dtype) @ values.reshape(b, g, p, block, -1)).sum(2) / total.masked_fill(total == 0, 1)
    return out.to(values.dtype).reshape(b, h, n, -1)


def _gathered(turned: Tensor, keys: Tensor, values: Tensor, index: Tensor, tokens: Tensor, block: int) -> Tensor:
    """The chosen blocks of every query, copied side by side."""
    (b, h, n, k, d), (g, s), a = turned.shape, keys.shape[1:3], index.shape[1]
    p = s // block
    head = torch.arange(b * g, device=index.device).reshape(b, g, 1).expand(b, g, a // g).reshape(b, a, 1, 1) * p
    flat = (index + head).flatten()
    near, worth = (
        x.reshape(b * g * p, -1).index_select(0, flat).view(b, a, n, k, block, -1) for x in (keys, values)
    )  # [B, A, n, K, C, .]
    asked = turned.reshape(b, a, h // a, n, k, d).permute(0, 1, 3, 4, 2, 5)  # [B, A, n, K, R, D]
    logits = _wide(asked @ near.mT).transpose(3, 4).flatten(4)  # [B, A, n, R, K C]
    live = (
        (torch.arange(block, device=index.device) < tokens.unsqueeze(-1)).flatten(3).unsqueeze(3)
    )  # [B, A, n, 1, K C]
    weights = logits.masked_fill(~live, -torch.inf).softmax(-1).masked_fill(~live, 0)
    out = weights.to(values.dtype) @ worth.flatten(3, 4)  # [B, A, n, R, E]
    return out.permute(0, 1, 3, 2, 4).reshape(b, h, n, -1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
