"""Windows and sinks in chunks: each chunk of queries attends to its own slice of the keys, plus the sinks.

Never an N x M mask: inside, one small band mask serves all chunks at once; chunks at the edges, and those
that meet padding, get a mask of their own.

Axes: B batch, H query heads, G key/value heads, R = H / G, N queries, M keys, C queries of a chunk, X chunks
of one batch, L keys of a chunk's slice, S sinks, D head width, E value width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.core.attend import check_qkv, sdpa
from qkv.core.errors import InvalidInput
from qkv.core.plan import BlockPlan

GATHER_ELEMENTS = 1 << 22  # keys and values of one batch of chunks


def execute_window(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, *, scale: float | None = None, chunk: int | None = None
) -> Tensor:
    """Attention under the element test of `plan` (window, sinks, causal, tokens); its block lists are not read.

    q: ``[B, H, N, D]``; k: ``[B, G, M, D]``; v: ``[B, G, M, E]`` -> ``[B, H, N, E]``. chunk: queries per
    chunk, default by the window. A query without a key gives 0. Raises `InvalidInput`.
    """
    check_qkv(q, k, v, causal=plan.causal, who="window")
    n, m = q.shape[2], k.shape[2]
    if (plan.queries, plan.keys) != (n, m) or plan.perm_q is not None or plan.perm_kv is not None:
        raise InvalidInput(f"window: the plan is {plan}; q and k have N={n}, M={m}, and no permutation is taken")
    if plan.window is None or max(plan.window, plan.sinks) >= m:
        return sdpa(q, k, v, mask=plan.tokens, causal=plan.causal, scale=scale)
    c = min(n, max(64, min(256, plan.window // 4)) if chunk is None else chunk)
    out = q.new_empty(*q.shape[:3], v.shape[-1]) if not torch.is_grad_enabled() else None
    parts = []
    for start, stop, uniform in _runs(plan, c):
        run = _uniform if uniform else _edge
        part = run(q[:, :, start:stop], k, v, plan, start, c, scale)
        if out is None:
            parts.append(part)
        else:
            out[:, :, start:stop] = part
    return torch.cat(parts, 2) if out is None else out


def _slice(plan: BlockPlan, start: int, stop: int) -> tuple[int, int]:
    """The keys that queries start .. stop can see inside the window, before clipping to 0 .. M."""
    assert plan.window is not None
    offset, reach = plan.keys - plan.queries, plan.window - 1
    return start + offset - reach, stop + offset + (0 if plan.causal else reach)


def _runs(plan: BlockPlan, c: int) -> Iterator[tuple[int, int, bool]]:
    """Queries ``start, stop`` that are computed together, and whether all their chunks share one mask."""
    n, m = plan.queries, plan.keys
    clean = _clean(plan)
    run = None
    for start in range(0, n, c):
        stop = min(n, start + c)
        lo, hi = _slice(plan, start, stop)
        uniform = stop - start == c and clean is not None and clean[0] <= lo and hi <= min(m, clean[1])
        if uniform:
            run = start if run is None else run
            continue
        if run is not None:
            yield run, start, True
            run = None
        yield start, stop, False
    if run is not None:
        yield run, n - n % c, True


def _clean(plan: BlockPlan) -> tuple[int, int] | None:
    """The stretch of keys after the sinks in which no row has padding; None when there is none worth using."""
    first = 0 if plan.first is None else int(plan.first.max())
    lo, hi = first + plan.sinks, plan.keys
    if plan.tokens is None:
        return lo if plan.sinks else 0, hi
    if plan.tokens.shape[1:3] != (1, 1):
        return None
    real = plan.tokens[:, 0, 0].expand(-1, plan.keys)
    if plan.sinks and not bool(real.gather(1, _sink_index(plan).expand(real.shape[0], -1)).all()):
        return None
    holes = (~real[:, lo:].all(0)).nonzero()[:, 0]
    if len(holes):
        hi = lo + int(holes[0])
    return lo, hi


def _sink_index(plan: BlockPlan) -> Tensor:
    """Positions of the sinks: ``[B|1, S]``."""
    device = plan.num.device
    first = torch.zeros(1, dtype=torch.long, device=device) if plan.first is None else plan.first.long()
    return (first[:, None] + torch.arange(plan.sinks, device=device)).clamp(max=plan.keys - 1)


def _sinks(x: Tensor, plan: BlockPlan) -> Tensor:
    """The sinks' rows of ``[B, G, M, D]``: ``[B, G, S, D]``."""
    if plan.first is None:
        return x[:, :, : plan.sinks]
    index = _sink_index(plan)[:, None, :, None]
    return x.gather(2, index.expand(x.shape[0], x.shape[1], -1, x.shape[3]))


def _uniform(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, start: int, c: int, scale: float | None) -> Tensor:
    """Whole chunks that share one band mask, as one batch: q ``[B, H, X C, D]`` -> ``[B, H, X C, E]``."""
    (b, h, n, d), g, s = q.shape, k.shape[1], plan.sinks
    r, x = h // g, n // c
    lo, hi = _slice(plan, start, start + c)
    width = hi - lo
    i = torch.arange(c, device=q.device)[:, None] + start
    j = torch.arange(lo, hi, device=q.device)
    band = plan.allows(i, j)  # the slice lies past the sinks
    assert band is not None
    band = torch.cat((band.new_ones(c, s), band), 1).repeat(r, 1)[None, None]  # [1, 1, R C, S + L]
    most = max(1, GATHER_ELEMENTS // (b * g * (width + s) * (d + v.shape[-1])))
    outs = []
    for at in range(0, x, most):
        size = min(most, x - at)
        keys, values = (_slices(t, plan, lo + at * c, width, c, size) for t in (k, v))
        qx = q[:, :, at * c : (at + size) * c].reshape(b, g, r, size, c, d).transpose(2, 3)
        out = F.scaled_dot_product_attention(
            qx.reshape(b * g, size, r * c, d), keys, values, attn_mask=band, scale=scale
        )
        out = out.reshape(b, g, size, r, c, -1).transpose(2, 3)
        outs.append(out.reshape(b, h, size * c, -1))
    return outs[0] if len(outs) == 1 else torch.cat(outs, 2)


def _slices(x: Tensor, plan: BlockPlan, lo: int, width: int, c: int, size: int) -> Tensor:
    """Sinks and slice of each of `size` chunks: ``[B G, X, S + L, D]``."""
    own = x[:, :, lo : lo + (size - 1) * c + width].unfold(2, width, c).mT  # [B, G, X, L, D], a view
    if plan.sinks:
        sinks = _sinks(x, plan).unsqueeze(2).expand(-1, -1, size, -1, -1)
        own = torch.cat((sinks, own), 3)
    return own.flatten(0, 1)


def _edge(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, start: int, c: int, scale: float | None) -> Tensor:
    """One chunk with a mask of its own: q ``[B, H, C, D]`` -> ``[B, H, C, E]``."""
    n, m, device = q.shape[2], k.shape[2], q.device
    lo, hi = _slice(plan, start, start + n)
    lo, hi = max(0, lo), max(1, min(m, hi))
    i = torch.arange(start, start + n, device=device)[:, None]
    first = 0 if plan.first is None else plan.first[:, None, None, None]
    keys, values, j = k[:, :, lo:hi], v[:, :, lo:hi], torch.arange(lo, hi, device=device)
    allowed = plan.allows(i, j, first)
    assert allowed is not None
    allowed = allowed if allowed.ndim == 4 else allowed[None, None]
    tokens = plan.tokens
    if tokens is not None:
        tokens = tokens.expand(-1, -1, -1, m)
        tokens = tokens[:, :, start : start + n] if tokens.shape[2] > 1 else tokens
        allowed = allowed & tokens[..., lo:hi]
    if plan.sinks and (lo > 0 or hi < m):
        sink = _sink_index(plan)  # [B|1, S]
        seen = ((sink < lo) | (sink >= hi))[:, None, None]  # the others are in the slice
        if plan.causal:
            seen = seen & (sink[:, None, None] <= i + (m - plan.queries))
        if tokens is not None:
            rows = tokens.expand(max(tokens.shape[0], sink.shape[0]), -1, -1, -1)
            at = sink[:, None, None].expand(rows.shape[0], *rows.shape[1:3], -1)
            seen = seen & rows.gather(3, at)
        lead = torch.broadcast_shapes(seen.shape[:3], allowed.shape[:3])
        allowed = torch.cat((seen.expand(*lead, -1), allowed.expand(*lead, -1)), 3)
        keys, values = (torch.cat((_sinks(x, plan), y), 2) for x, y in ((k, keys), (v, values)))
    return sdpa(q, keys, values, mask=allowed, scale=scale)
