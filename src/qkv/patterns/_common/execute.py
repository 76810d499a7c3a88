r"""Exact attention over a `BlockPlan`: gather the kept key blocks of each query block, then attend.

Query blocks with equally long lists run as one batch. Where heads share a plan, the heads of a group are
packed into one block of queries, so that keys are gathered once.

Axes: B batch, H query heads, G key/value heads, U heads of the plan (H or G), R = H / U, N queries, M keys,
D head width, E value width, X query blocks of one batch, P partial blocks, L gathered keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.core.attend import attend, check_qkv
from qkv.core.errors import InvalidInput
from qkv.core.plan import BlockPlan
from qkv.core.rows import take_rows

GATHER_ELEMENTS = 1 << 21  # gathered keys, values and mask entries held at once


def attend_plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the plan's keys, and its natural log-sum-exp, ready for `qkv.merge`.

    q: ``[B, H, N, D]``; k: ``[B, G, M, D]``; v: ``[B, G, M, E]`` -> out ``[B, H, N, E]``, lse ``[B, H, N]``.
    mask: a further bool mask, broadcastable to ``[B, H, N, M]``. scale: default D^-0.5. A query without a
    key gives out 0 and lse -inf. Gradients flow through both. Raises `InvalidInput`.
    """
    return _execute(q, k, v, plan if mask is None else plan.restrict(mask), scale, with_lse=True)


def execute_plan(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, *, scale: float | None = None) -> Tensor:
    """As `attend_plan`, without the lse, by torch's fused attention: faster and smaller."""
    return _execute(q, k, v, plan, scale, with_lse=False)[0]


class _Batch(NamedTuple):
    """Query blocks computed together.

    rows: ``[X]`` of all (batch, plan head, query block). blocks: ``[X, L / bk]``, the first `full` need no test.
    """

    rows: Tensor
    blocks: Tensor
    full: int


def _execute(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float | None, with_lse: bool
) -> tuple[Tensor, Tensor]:
    units = _check(q, k, v, plan)
    (b, h, n, _), (g, m) = q.shape, k.shape[1:3]
    (bq, bk), (qb, kb), r = plan.block, plan.grid, h // units
    if plan.perm_q is not None:
        q = _permute(q, plan.perm_q)
    if plan.perm_kv is not None:
        if plan.perm_kv.shape[1] > g:
            k, v, g = k.repeat_interleave(h // g, 1), v.repeat_interleave(h // g, 1), h
        k, v = _permute(k, plan.perm_kv), _permute(v, plan.perm_kv)
    queries = F.pad(q, (0, 0, 0, qb * bq - n)).reshape(b, units, r, qb, bq, -1)
    queries = queries.transpose(2, 3).reshape(b * units * qb, r * bq, -1)  # [B U Qb, R bq, D]
    keys, values = (F.pad(x, (0, 0, 0, kb * bk - m)).reshape(b * g * kb, bk, -1) for x in (k, v))
    outs, lses, order = [], [], []
    for batch in _batches(plan, b, units, bk * (k.shape[-1] + v.shape[-1]) + r * bq * bk):
        order.append(batch.rows)
        qx = take_rows(queries, batch.rows).unsqueeze(1)
        if batch.blocks.shape[1] == 0:
            outs.append(qx.new_zeros(*qx.shape[:3], v.shape[-1]))
            lses.append(qx.new_full(qx.shape[:3], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32)))
            continue
        unit = batch.rows // qb  # [X], over (B, U)
        home = (unit // units * g + unit % units * g // units) * kb  # first block of the row's keys
        at = (home[:, None] + batch.blocks).flatten()
        kx, vx = (take_rows(t, at).reshape(len(qx), 1, -1, t.shape[-1]) for t in (keys, values))
        allowed = _test(plan, batch, units)
        if allowed is not None:
            allowed = (allowed.repeat(1, r, 1) if r > 1 else allowed).unsqueeze(1)  # [X|1, 1, R bq, L]
        if with_lse:
            out, lse, _ = attend(qx, kx, vx, mask=allowed, scale=scale)
            lses.append(lse)
        else:
            out = F.scaled_dot_product_attention(qx, kx, vx, attn_mask=allowed, scale=scale)
            if allowed is not None and batch.full == 0:
                out = out.masked_fill(~allowed.any(-1, keepdim=True), 0.0)
        outs.append(out)
    back = torch.cat(order).argsort()
    out = _unblock(torch.cat(outs)[back], plan, b, h, n)
    return out, (_unblock(torch.cat(lses)[back].unsqueeze(-1), plan, b, h, n).squeeze(-1) if with_lse else out)


def _check(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> int:
    """Heads of the plan to run over: G when heads of a group share it, else H."""
    check_qkv(q, k, v, who="plan")
    (b, h, n), (g, m) = q.shape[:3], k.shape[1:3]
    if (plan.queries, plan.keys) != (n, m):
        raise InvalidInput(f"the plan is for N={plan.queries}, M={plan.keys}; q and k have N={n}, M={m}")
    if plan.batch not in (1, b) or plan.heads not in (1, g, h):
        raise InvalidInput(f"the plan is for B={plan.batch}, H={plan.heads}; q has B={b}, H={h} and k has G={g} heads")
    if plan.num.device != q.device:
        raise InvalidInput(f"the plan lies on {plan.num.device}, q on {q.device}; move it with plan.to(q.device)")
    return g if plan.heads in (1, g) else h


def _permute(x: Tensor, perm: Tensor) -> Tensor:
    """``x [B, h, L, D]`` with its tokens in the order of perm ``[B|1, 1|h|G, L]``."""
    heads = x.shape[1] // perm.shape[1]
    index = perm.long().repeat_interleave(heads, 1).expand(x.shape[0], -1, -1)
    return x.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1]))


def _unblock(x: Tensor, plan: BlockPlan, b: int, h: int, n: int) -> Tensor:
    """Rows ``[B U Qb, R bq, E]`` back to ``[B, H, N, E]`` in original order."""
    bq, qb = plan.block[0], plan.grid[0]
    units = x.shape[0] // (b * qb)
    x = x.reshape(b, units, qb, h // units, bq, -1).transpose(2, 3).reshape(b, h, qb * bq, -1)[:, :, :n]
    return x if plan.perm_q is None else _permute(x, plan.perm_q.argsort(-1))


def _batches(plan: BlockPlan, b: int, units: int, cost: int) -> Iterator[_Batch]:
    """Query blocks grouped by the lengths of their two lists, in pieces of bounded memory.

    cost: elements held per query block and listed key block.
    """
    num, full_num = (x.expand(b, units, -1).reshape(-1) for x in (plan.num, plan.full_num))
    idx, full_idx = (x.expand(b, units, -1, -1).flatten(0, 2) for x in (plan.idx, plan.full_idx))
    kind = full_num.long() * (plan.grid[1] + 1) + num
    order = kind.argsort(stable=True)
    kinds, sizes = kind[order].unique_consecutive(return_counts=True)
    start = 0
    for which, size in zip(kinds.tolist(), sizes.tolist(), strict=True):
        full, partial = divmod(which, plan.grid[1] + 1)
        piece = max(1, GATHER_ELEMENTS // max(1, cost * (full + partial)))
        for rows in order[start : start + size].split(piece):
            lists = torch.cat((full_idx[rows, :full], idx[rows, :partial]), 1).long()
            yield _Batch(rows, lists, full)
        start += size


def _test(plan: BlockPlan, batch: _Batch, units: int) -> Tensor | None:
    """Which gathered keys each query may see: bool ``[X|1, bq, L]``, or None when all."""
    partial = batch.blocks[:, batch.full :]
    if partial.shape[1] == 0:
        return None
    (bq, bk), qb, device = plan.block, plan.grid[0], partial.device
    unit, block = batch.rows // qb, batch.rows % qb
    row, head = unit // units, unit % units
    steps = torch.arange(max(bq, bk), device=device)
    slot_q = block[:, None] * bq + steps[:bq]  # [X, bq]
    slot_k = (partial[:, :, None] * bk + steps[:bk]).flatten(1)  # [X, P bk]
    inside = None
    if _alike(plan, slot_q[:, :1] - slot_k[:, ::bk]):
        i, j = slot_q[:1], slot_k[:1]
    else:
        inside = None if plan.keys % bk == 0 else (slot_k < plan.keys)[:, None]
        i, j = slot_q.clamp(max=plan.queries - 1), slot_k.clamp(max=plan.keys - 1)
    i = i if plan.perm_q is None else _pick(plan.perm_q, row, head).gather(1, i)
    j = j if plan.perm_kv is None else _pick(plan.perm_kv, row, head).gather(1, j)
    first = 0 if plan.first is None else plan.first[row if plan.batch > 1 else row * 0][:, None, None]
    ok = plan.allows(i[:, :, None], j[:, None, :], first)
    tokens = None if plan.tokens is None else _tokens(plan.tokens, row, head, i, j)
    for part in (inside, tokens):
        ok = part if ok is None else (ok if part is None else ok & part)
    if ok is None:
        return None
    ok = ok.expand(-1, bq, -1)
    return torch.cat((ok.new_ones(ok.shape[0], bq, batch.full * bk), ok), 2) if batch.full else ok


def _alike(plan: BlockPlan, distance: Tensor) -> bool:
    """Whether one test serves every row, by the distances query block - key block ``[X, P]``.

    A key block that runs past M needs no test of its own then: causality hides what is not there.
    """
    if plan.tokens is not None or plan.sinks or plan.perm_q is not None or plan.perm_kv is not None:
        return False
    if plan.keys % plan.block[1] and not plan.causal:
        return False
    return bool((distance == distance[:1]).all())


def _pick(x: Tensor, row: Tensor, head: Tensor) -> Tensor:
    """``x [B|1, U|1, ..]`` at each of the rows and heads ``[X]``."""
    return x[row if x.shape[0] > 1 else row * 0, head if x.shape[1] > 1 else head * 0]


def _tokens(tokens: Tensor, row: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """The residual test at queries i ``[X, bq]`` and keys j ``[X, P bk]``: ``[X, 1|bq, P bk]``."""
    row = (row if tokens.shape[0] > 1 else row * 0)[:, None, None]
    head = (head if tokens.shape[1] > 1 else head * 0)[:, None, None]
    i = i[:, :, None] if tokens.shape[2] > 1 else i[:, :1, None] * 0
    return tokens[row, head, i, j[:, None, :] if tokens.shape[3] > 1 else j[:, None, :] * 0]
