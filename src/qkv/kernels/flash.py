r"""Attention of a block of queries on the GPU with its log-sum-exp, and what each key draws in all, without an N x M map.

    out_i = sum_j softmax_j(scale q_i . k_j) v_j,    lse_i = log sum_j exp(scale q_i . k_j)
    mass_j = sum_i exp(scale q_i . k_j - lse_i)

over the keys that a row and head names (`mask`) and, causal, up to i + M - N; a query without a key gives out 0 and lse -inf.
Masses take one more product of queries and keys: a second pass over tiles of keys, since a sum over queries cannot be kept
while the softmax of a row is not complete. float32 operands are multiplied as three tf32 products.

Probes are queries with places of their own, in any order: query i sees keys up to place p_i. Where the places ascend, tiles that
no probe of theirs sees are not computed.

Bound: FLOPs 2 N M (D + E) per query head forward, 2 N M D for masses, half of that when causal with N = M; for probes
2 D sum_i (p_i + 1), once for masses and once for an lse that is not known.
Axes: B batch, H query heads, G key/value heads, R = H / G, N queries, M keys, D head width, E value width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkv.core.errors import InvalidInput
from qkv.kernels.widths import tiled

LOG2E = tl.constexpr(1.4426950408889634)
WIDEST = 256


@triton.jit
def _base(ptr, b, h, stride_b, stride_h):
    return ptr + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h


@triton.jit
def _scores(
    q, k_ptr, mask_ptr, upto, cols, k_n, mask_n, scale2, D, M,
    EDGE: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, DP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores in base 2 of a tile, -inf where masked; EDGE: it holds keys past the last, or after `upto` [BQ] < M."""
    d = tl.arange(0, DP)
    inside = (d < D)[:, None]
    if EDGE:
        inside = inside & (cols < M)[None, :]
    k = tl.load(k_ptr + cols[None, :].to(tl.int64) * k_n + d[:, None], mask=inside, other=0.0)
    s = tl.dot(q, k, input_precision=PRECISION) * scale2
    if EDGE:
        seen = cols[None, :] <= upto[:, None] if CAUSAL else (cols < M)[None, :]
        s = tl.where(seen, s, float("-inf"))
    if MASKED:
        named = tl.load(mask_ptr + cols.to(tl.int64) * mask_n, mask=cols < M, other=0) != 0
        s = tl.where(named[None, :], s, float("-inf"))
    return s


@triton.jit
def _span(
    q, k_ptr, v_ptr, mask_ptr, top, total, out, upto, low, high, k_n, v_n, mask_n, scale2, D, E, M,
    EDGE: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr,
    BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The keys low .. high taken into a running softmax."""
    e = tl.arange(0, EP)
    for at in range(low, high, BK):
        cols = at + tl.arange(0, BK)
        s = _scores(q, k_ptr, mask_ptr, upto, cols, k_n, mask_n, scale2, D, M, EDGE, CAUSAL, MASKED, DP, PRECISION)
        new = tl.maximum(top, tl.max(s, 1))
        anchor = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(s - anchor[:, None])
        fade = tl.exp2(top - anchor)
        inside = (e < E)[None, :]
        if EDGE:
            inside = inside & (cols < M)[:, None]
        v = tl.load(v_ptr + cols[:, None].to(tl.int64) * v_n + e[None, :], mask=inside, other=0.0)
        total = total * fade + tl.sum(p, 1)
        out = out * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        top = new
    return top, total, out


@triton.jit
def _forward(
    q_ptr, k_ptr, v_ptr, mask_ptr, out_ptr, lse_ptr,
    scale2, H, R, P, N, M, D, E,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, mask_b, mask_h, mask_n,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output [B, H, N, E] and lse [B, H, N]; grid (tiles of queries, B H). P: query heads that share a mask."""
    pair = tl.program_id(1)
    b, h = pair // H, pair % H
    first = tl.program_id(0) * BQ
    rows, d, e = first + tl.arange(0, BQ), tl.arange(0, DP), tl.arange(0, EP)
    q_at = _base(q_ptr, b, h, q_b, q_h) + rows[:, None].to(tl.int64) * q_n + d[None, :]
    q = tl.load(q_at, mask=(rows < N)[:, None] & (d < D)[None, :], other=0.0)
    k_ptr, v_ptr = _base(k_ptr, b, h // R, k_b, k_h), _base(v_ptr, b, h // R, v_b, v_h)
    mask_ptr = _base(mask_ptr, b, h // P, mask_b, mask_h)
    top = tl.full((BQ,), float("-inf"), tl.float32)
    total = tl.zeros((BQ,), tl.float32)
    out = tl.zeros((BQ, EP), tl.float32)
    last, whole = M, M // BK * BK  # keys before `whole` need no test of their place
    if CAUSAL:
        last = tl.minimum(M, first + BQ + (M - N))
        whole = (first + 1 + (M - N)) // BK * BK
    upto = rows + (M - N)
    top, total, out = _span(q, k_ptr, v_ptr, mask_ptr, top, total, out, upto, 0, whole, k_n, v_n, mask_n, scale2, D, E, M,
                            False, CAUSAL, MASKED, DP, EP, BK, PRECISION)  # fmt: skip
    top, total, out = _span(q, k_ptr, v_ptr, mask_ptr, top, total, out, upto, whole, last, k_n, v_n, mask_n, scale2, D, E, M,
                            True, CAUSAL, MASKED, DP, EP, BK, PRECISION)  # fmt: skip
    safe = tl.where(total > 0, total, 1.0)
    lse = tl.where(total > 0, (top + tl.log2(safe)) / LOG2E, float("-inf"))
    row = pair.to(tl.int64) * N + rows
    tl.store(lse_ptr + row, lse, mask=rows < N)
    tl.store(out_ptr + row[:, None] * E + e[None, :], out / safe[:, None], mask=(rows < N)[:, None] & (e < E)[None, :])


@triton.jit
def _reach(
    q, k_ptr, mask_ptr, top, total, upto, low, high, k_n, mask_n, scale2, D, M,
    EDGE: tl.constexpr, PLACED: tl.constexpr, MASKED: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The keys low .. high taken into a running sum of exponentials."""
    for at in range(low, high, BK):
        cols = at + tl.arange(0, BK)
        s = _scores(q, k_ptr, mask_ptr, upto, cols, k_n, mask_n, scale2, D, M, EDGE, PLACED, MASKED, DP, PRECISION)
        new = tl.maximum(top, tl.max(s, 1))
        anchor = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(top - anchor) + tl.sum(tl.exp2(s - anchor[:, None]), 1)
        top = new
    return top, total


@triton.jit
def _logsums(
    q_ptr, k_ptr, mask_ptr, at_ptr, lse_ptr,
    scale2, H, R, part, N, M, D,
    q_b, q_h, q_n, k_b, k_h, k_n, mask_b, mask_n, at_b,
    PLACED: tl.constexpr, MASKED: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Log-sums [S, B, H, N] of `part` keys each; grid (tiles of N R rows, B G, S). Rows: the R heads of a query together."""
    pair, low = tl.program_id(1), tl.program_id(2) * part
    b, g = pair // (H // R), pair % (H // R)
    rows, d = tl.program_id(0) * BQ + tl.arange(0, BQ), tl.arange(0, DP)
    n, h = rows // R, g * R + rows % R
    real = n < N
    q_at = _base(q_ptr, b, h[:, None], q_b, q_h) + n[:, None].to(tl.int64) * q_n + d[None, :]
    q = tl.load(q_at, mask=real[:, None] & (d < D)[None, :], other=0.0)
    k_ptr, mask_ptr = _base(k_ptr, b, g, k_b, k_h), mask_ptr + b.to(tl.int64) * mask_b
    upto = n
    last, whole = tl.minimum(M, low + part), M  # keys before `whole` need no test of their place
    if PLACED:
        upto = tl.minimum(tl.load(at_ptr + b.to(tl.int64) * at_b + n, mask=real, other=-1), M - 1)
        last = tl.minimum(last, tl.max(upto, 0) + 1)
        whole = tl.min(tl.where(real, upto, M - 1), 0) + 1
    whole = low + tl.maximum(tl.minimum(whole, last) - low, 0) // BK * BK
    top = tl.full((BQ,), float("-inf"), tl.float32)
    total = tl.zeros((BQ,), tl.float32)
    top, total = _reach(q, k_ptr, mask_ptr, top, total, upto, low, whole, k_n, mask_n, scale2, D, M,
                        False, PLACED, MASKED, DP, BK, PRECISION)  # fmt: skip
    top, total = _reach(q, k_ptr, mask_ptr, top, total, upto, whole, last, k_n, mask_n, scale2, D, M,
                        True, PLACED, MASKED, DP, BK, PRECISION)  # fmt: skip
    lse = tl.where(total > 0, (top + tl.log2(tl.where(total > 0, total, 1.0))) / LOG2E, float("-inf"))
    row = ((tl.program_id(2) * tl.num_programs(1) // (H // R) + b).to(tl.int64) * H + h) * N + n
    tl.store(lse_ptr + row, lse, mask=real)


@triton.jit
def _drawn(
    q_ptr, k, lse_ptr, weight_ptr, at_ptr, total, cols, low, high, q_n, scale2, D, N, M,
    EDGE: tl.constexpr, PLACED: tl.constexpr, WEIGHED: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What the queries low .. high give to a tile of keys, [BQ, BK]; EDGE: some of them may come before a key."""
    d = tl.arange(0, DP)
    for at in range(low, high, BQ):
        rows = at + tl.arange(0, BQ)
        inside = (rows < N)[:, None] & (d < D)[None, :]
        q = tl.load(q_ptr + rows[:, None].to(tl.int64) * q_n + d[None, :], mask=inside, other=0.0)
        lse = tl.load(lse_ptr + rows, mask=rows < N, other=float("-inf"))
        lse = tl.where(lse == float("-inf"), float("inf"), lse) * LOG2E  # a query without a key gives nothing
        p = tl.exp2(tl.dot(q, k, input_precision=PRECISION) * scale2 - lse[:, None])
        if EDGE:
            upto = rows + (M - N)
            if PLACED:
                upto = tl.load(at_ptr + rows, mask=rows < N, other=-1)
            p = tl.where(cols[None, :] <= upto[:, None], p, 0.0)
        if WEIGHED:
            counts = tl.load(weight_ptr + rows, mask=rows < N, other=0) != 0
            p = tl.where(counts[:, None], p, 0.0)
        total += p
    return total


@triton.jit
def _behind(at_ptr, first, last, N, SCAN: tl.constexpr):
    """Of N probes the first that sees key `first`, and the first after which all see key `last`."""
    begin = tl.full((SCAN,), 1, tl.int32) * N
    later = tl.zeros((SCAN,), tl.int32)
    for i in range(0, N, SCAN):
        rows = i + tl.arange(0, SCAN)
        at = tl.load(at_ptr + rows, mask=rows < N, other=-1)
        begin = tl.minimum(begin, tl.where(at >= first, rows, N))
        later = tl.maximum(later, tl.where((at < last) & (rows < N), rows + 1, 0))
    return tl.min(begin, 0), tl.max(later, 0)


@triton.jit
def _masses(
    q_ptr, k_ptr, mask_ptr, lse_ptr, weight_ptr, at_ptr, mass_ptr,
    scale2, H, R, P, N, M, D,
    q_b, q_h, q_n, k_b, k_h, k_n, mask_b, mask_h, mask_n, at_b,
    CAUSAL: tl.constexpr, PLACED: tl.constexpr, MASKED: tl.constexpr, WEIGHED: tl.constexpr, DP: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Masses [B, H, M]; grid (tiles of keys, B H). weight [B, N]: the queries that count. PLACED: at [1|B, N], their places."""
    pair = tl.program_id(1)
    b, h = pair // H, pair % H
    first = tl.program_id(0) * BK
    cols, d = first + tl.arange(0, BK), tl.arange(0, DP)
    k_at = _base(k_ptr, b, h // R, k_b, k_h) + cols[None, :].to(tl.int64) * k_n + d[:, None]
    k = tl.load(k_at, mask=(cols < M)[None, :] & (d < D)[:, None], other=0.0)
    q_ptr = _base(q_ptr, b, h, q_b, q_h)
    lse_ptr += pair.to(tl.int64) * N
    weight_ptr += b.to(tl.int64) * N
    at_ptr += b.to(tl.int64) * at_b
    total = tl.zeros((BQ, BK), tl.float32)
    later = 0  # queries from here on come after every key of the tile
    if CAUSAL:
        begin, later = tl.maximum(0, first - (M - N)), tl.maximum(0, first + BK - 1 - (M - N))
        if PLACED:
            begin, later = _behind(at_ptr, first, tl.minimum(first + BK, M) - 1, N, 256)
        begin = begin // BQ * BQ
        later = tl.maximum(begin, tl.cdiv(later, BQ) * BQ)
        total = _drawn(q_ptr, k, lse_ptr, weight_ptr, at_ptr, total, cols, begin, tl.minimum(later, N), q_n, scale2, D, N, M,
                       True, PLACED, WEIGHED, DP, BQ, PRECISION)  # fmt: skip
    total = _drawn(q_ptr, k, lse_ptr, weight_ptr, at_ptr, total, cols, later, N, q_n, scale2, D, N, M,
                   False, PLACED, WEIGHED, DP, BQ, PRECISION)  # fmt: skip
    drawn = tl.sum(total, 0)
    if MASKED:
        mask_ptr = _base(mask_ptr, b, h // P, mask_b, mask_h)
        named = tl.load(mask_ptr + cols.to(tl.int64) * mask_n, mask=cols < M, other=0) != 0
        drawn = tl.where(named, drawn, 0.0)
    tl.store(mass_ptr + pair.to(tl.int64) * M + cols, drawn, mask=cols < M)


def _rows(x: Tensor) -> Tensor:
    """Itself, with channels next to one another."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _named(mask: Tensor | None, q: Tensor, m: int) -> tuple[Tensor, int, tuple[int, int, int]]:
    """A key mask as bytes, how many query heads share one, and its strides; anything where there is none."""
    b, h = q.shape[:2]
    if mask is None:
        return q, 1, (0, 0, 0)
    sizes = mask.shape
    if mask.dtype != torch.bool or len(sizes) != 4 or sizes[0] not in (1, b) or h % sizes[1] or sizes[2:] != (1, m):
        raise InvalidInput(
            f"the flash kernels take a bool key mask [1|B, heads, 1, M] with heads dividing H; got {mask.dtype} "
            f"{tuple(sizes)} for B={b}, H={h}, M={m}"
        )
    bytewise = mask.view(torch.uint8)
    strides = tuple(0 if sizes[i] == 1 else mask.stride(i) for i in (0, 1, 3))
    return bytewise, h // sizes[1], (strides[0], strides[1], mask.stride(3) if m > 1 else 0)


def _check(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
    (b, h, n, d), (g, m) = q.shape, k.shape[1:3]
    if k.shape != (b, g, m, d) or v.shape[:3] != (b, g, m) or h % g:
        raise InvalidInput(
            f"the flash kernels take q [B, H, N, D], k [B, G, M, D], v [B, G, M, E], G dividing H; got {tuple(q.shape)}, "
            f"{tuple(k.shape)}, {tuple(v.shape)}"
        )
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32) or k.dtype != q.dtype or v.dtype != q.dtype:
        raise InvalidInput(
            f"the flash kernels take one of bfloat16, float16, float32; got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if max(d, v.shape[3]) > WIDEST:
        raise InvalidInput(f"the flash kernels hold heads of at most {WIDEST} channels; got {d} and {v.shape[3]}")
    if causal and n > m:
        raise InvalidInput(f"causal attention needs N <= M; got N={n}, M={m}")


def _launch(dtype: torch.dtype, width: int) -> tuple[str, int, int, dict[str, int]]:
    """Precision of products, tiles (long, short side) and warps and stages."""
    if dtype == torch.float32:
        return "tf32x3", 64, 32, {"num_warps": 4, "num_stages": 1}
    if width > 128:
        return "ieee", 64, 64, {"num_warps": 8, "num_stages": 2}
    return "ieee", 128, 64, {"num_warps": 8 if width > 64 else 4, "num_stages": 3}


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False, scale: float
) -> tuple[Tensor, Tensor]:
    """Exact attention with its log-sum-exp.

    q: ``[B, H, N, D]``; k: ``[B, G, M, D]``; v: ``[B, G, M, E]``, one of bfloat16, float16, float32. mask: bool
    ``[1|B, heads, 1, M]``, heads dividing H: the keys that may be read. causal: query i sees keys up to i + M - N. Returns out
    ``[B, H, N, E]`` and lse ``[B, H, N]`` (float32, natural); no gradients. Raises `InvalidInput`.
    """
    _check(q, k, v, causal)
    q, k, v = _rows(q), _rows(k), _rows(v)
    (b, h, n, d), (g, m), e = q.shape, k.shape[1:3], v.shape[3]
    dp, ep = tiled(d, e, dtype=q.dtype)
    precision, bq, bk, how = _launch(q.dtype, max(dp, ep))
    named, share, strides = _named(mask, q, m)
    out, lse = q.new_empty(b, h, n, e), torch.empty(b, h, n, dtype=torch.float32, device=q.device)
    _forward[(triton.cdiv(n, bq), b * h)](
        q, k, v, named, out, lse, scale * LOG2E.value, h, h // g, share, n, m, d, e,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *strides,
        CAUSAL=causal, MASKED=mask is not None, DP=dp, EP=ep, BQ=bq, BK=bk, PRECISION=precision, **how,
    )  # fmt: skip
    return out, lse


def column_masses(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float,
    rows: Tensor | None = None,
) -> Tensor:
    """What every key draws in all, ``[B, H, M]`` in float32.

    q, k, mask, causal, scale: as for `flash_attention`, whose lse ``[B, H, N]`` this takes. rows: bool ``[B, N]``, the queries
    that count. Raises `InvalidInput`.
    """
    _check(q, k, k, causal)
    q, k, lse = _rows(q), _rows(k), lse.float().contiguous()
    b, h, n = q.shape[:3]
    if lse.shape != (b, h, n) or (rows is not None and rows.shape != (b, n)):
        raise InvalidInput(
            f"column_masses takes lse [B, H, N] and rows [B, N]; got {tuple(lse.shape)} and "
            f"{None if rows is None else tuple(rows.shape)} for {(b, h, n)}"
        )
    return _mass(q, k, lse, mask, causal, None, rows, scale)


def _mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    causal: bool,
    at: Tensor | None,
    rows: Tensor | None,
    scale: float,
) -> Tensor:
    """Masses ``[B, H, M]``; at: int32 ``[1|B, N]``, places of the queries, or None: the newest."""
    (b, h, n, d), (g, m) = q.shape, k.shape[1:3]
    (dp,) = tiled(d, dtype=q.dtype)
    precision, bk, bq, how = _launch(q.dtype, dp)
    named, share, strides = _named(mask, q, m)
    mass = torch.empty(b, h, m, dtype=torch.float32, device=q.device)
    _masses[(triton.cdiv(m, bk), b * h)](
        q, k, named, lse, lse if rows is None else rows.contiguous().view(torch.uint8), lse if at is None else at, mass,
        scale * LOG2E.value, h, h // g, share, n, m, d, *q.stride()[:3], *k.stride()[:3], *strides,
        0 if at is None or len(at) == 1 else n,
        CAUSAL=causal, PLACED=at is not None, MASKED=mask is not None, WEIGHED=rows is not None, DP=dp, BQ=bq, BK=bk,
        PRECISION=precision, **how,
    )  # fmt: skip
    return mass


def _places(at: Tensor | None, mask: Tensor | None, q: Tensor, k: Tensor, who: str) -> Tensor | None:
    """Places as int32 ``[1|B, P]``, checked with the key mask ``[1|B, M]``."""
    (b, _, n, _), m = q.shape, k.shape[2]
    _check(q, k, k, False)
    if not n or not m:
        raise InvalidInput(f"{who} takes at least one probe and one key; got P={n}, M={m}")
    if at is not None and (at.shape not in ((n,), (1, n), (b, n)) or at.is_floating_point() or at.dtype == torch.bool):
        raise InvalidInput(
            f"{who} takes places, integers [P] or [1|B, P]; got {at.dtype} {tuple(at.shape)} for B={b}, P={n}"
        )
    if mask is not None and (mask.shape not in ((1, m), (b, m)) or mask.dtype != torch.bool):
        raise InvalidInput(
            f"{who} takes a bool mask of keys [1|B, M]; got {mask.dtype} {tuple(mask.shape)} for B={b}, M={m}"
        )
    return None if at is None else at.to(torch.int32).view(-1, n).contiguous()


def probe_lse(
    q: Tensor, k: Tensor, at: Tensor | None, *, mask: Tensor | None = None, scale: float, splits: int | None = None
) -> Tensor:
    """The log-sum-exp of probes ``[B, H, P]`` (float32, natural).

    q: ``[B, H, P, D]``; k: ``[B, G, M, D]``, one of bfloat16, float16, float32. at: integers ``[P]`` or ``[1|B, P]`` in any
    order: a probe at place p sees the keys up to p (none below 0); None: all see all. mask: bool ``[1|B, M]``, the keys that may
    be read, such as a row's without its padding. splits: parts of the keys that are summed apart (None: as many as fill the
    device). Raises `InvalidInput`.
    """
    at = _places(at, mask, q, k, "probe_lse")
    q, k = _rows(q), _rows(k)
    (b, h, n, d), (g, m) = q.shape, k.shape[1:3]
    (dp,) = tiled(d, dtype=q.dtype)
    precision, bq, bk, how = _launch(q.dtype, dp)
    tiles = triton.cdiv(n * (h // g), bq)
    if splits is None:
        units = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 4
        splits = max(1, min(32, 4 * units // (tiles * b * g)))
    part = triton.cdiv(triton.cdiv(m, splits), bk) * bk
    splits = triton.cdiv(m, part)
    lse = torch.empty(splits, b, h, n, dtype=torch.float32, device=q.device)
    _logsums[(tiles, b * g, splits)](
        q, k, q if mask is None else mask.view(torch.uint8), q if at is None else at, lse,
        scale * LOG2E.value, h, h // g, part, n, m, d, *q.stride()[:3], *k.stride()[:3],
        *((0, 0) if mask is None else (0 if len(mask) == 1 else mask.stride(0), mask.stride(1))),
        0 if at is None or len(at) == 1 else n,
        PLACED=at is not None, MASKED=mask is not None, DP=dp, BQ=bq, BK=bk, PRECISION=precision, **how,
    )  # fmt: skip
    return lse[0] if splits == 1 else lse.logsumexp(0)


def probe_masses(
    q: Tensor, k: Tensor, at: Tensor, *, mask: Tensor | None = None, scale: float, lse: Tensor | None = None
) -> Tensor:
    """What every key draws from the probes in all, ``[B, H, M]`` in float32.

    q, k, at, mask, scale: as for `probe_lse`. lse: ``[B, H, P]`` where the probes saw more than these keys; None: it is computed
    over these. Raises `InvalidInput`.
    """
    places = _places(at, mask, q, k, "probe_masses")
    q, k = _rows(q), _rows(k)
    if lse is None:
        lse = probe_lse(q, k, places, mask=mask, scale=scale)
    elif lse.shape != q.shape[:3]:
        raise InvalidInput(f"probe_masses takes lse [B, H, P]; got {tuple(lse.shape)} for {tuple(q.shape[:3])}")
    mask = None if mask is None else mask[:, None, None]
    return _mass(q, k, lse.float().contiguous(), mask, True, places, None, scale)
