r"""Decode attention over a preallocated cache whose length lives on the device: split over keys, merged by log-sum-exp.

    out_h = sum_{start <= j < length} softmax_j(scale q_h . k_j) v_j

One query token per row. The heads of a KV group share every key and value they read. Shapes and launch are the same at every
length up to the capacity, so the call can be captured in a CUDA graph. Bound: bytes of keys and values in [start, length).
The same pass can write the scores, D times fewer numbers than the keys: what a key draws, exp(score - lse), then needs no second
look at the keys (`decode_masses`; `qkv.kernels.slots.settle` takes the scores themselves).

Axes: B batch, H query heads, G key/value heads, R = H / G, C capacity, D head width, E value width, S splits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkv.core.errors import InvalidInput
from qkv.kernels.widths import tiled

LOG2E = 1.4426950408889634


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels."""
    return bool(getattr(triton.knobs.runtime, "interpret", False))


@triton.jit
def _fold(
    q, top, total, out, k_base, v_base, p_base, s_base, j, high, scale2, R, D, E, k_c, v_c, r, d, e,
    HAS_POSITION: tl.constexpr, HAS_SCORES: tl.constexpr, BOUND: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Online softmax: the running (top, total, out) with the keys j. BOUND: some lie past `high`. EVEN: D, E fill their tiles."""
    k_at = k_base + j[None, :].to(tl.int64) * k_c + d[:, None]
    v_at = v_base + j[:, None].to(tl.int64) * v_c + e[None, :]
    live = j < high
    if BOUND:
        k = tl.load(k_at, mask=live[None, :] & (d < D)[:, None], other=0.0)
        v = tl.load(v_at, mask=live[:, None] & (e < E)[None, :], other=0.0)
    elif EVEN:
        k, v = tl.load(k_at), tl.load(v_at)
    else:
        k = tl.load(k_at, mask=(d < D)[:, None], other=0.0)
        v = tl.load(v_at, mask=(e < E)[None, :], other=0.0)
    s = tl.dot(q, k, input_precision="ieee") * scale2  # [ROWS, BLOCK], in units of log2
    if HAS_POSITION:
        live = live & (tl.load(p_base + j, mask=live, other=-1) >= 0)
    if BOUND or HAS_POSITION:
        s = tl.where(live[None, :], s, float("-inf"))
    if HAS_SCORES:
        fits = (r < R)[:, None]
        if BOUND:
            fits = fits & (j < high)[None, :]
        tl.store(s_base + j[None, :], s, mask=fits)
    new = tl.maximum(top, tl.max(s, 1))
    anchor = new
    if BOUND or HAS_POSITION:
        anchor = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(s - anchor[:, None])
    fade = tl.exp2(top - anchor)
    return new, total * fade + tl.sum(p, 1), out * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")


@triton.jit
def _span(
    q, k_base, v_base, p_base, s_base, low, high, scale2, R, D, E, k_c, v_c, r, d, e,
    HAS_POSITION: tl.constexpr, HAS_SCORES: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    EP: tl.constexpr,
):  # fmt: skip
    """Online softmax of the queries over the keys low..high."""
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, EP), tl.float32)
    c = tl.arange(0, BLOCK)
    whole = low + (tl.maximum(high - low, 0) // BLOCK) * BLOCK
    for at in range(low, whole, BLOCK):  # whole blocks: no bound to check, so loads are wide and run ahead
        top, total, out = _fold(
            q, top, total, out, k_base, v_base, p_base, s_base, at + c, high, scale2, R, D, E, k_c, v_c, r, d, e,
            HAS_POSITION, HAS_SCORES, False, EVEN,
        )  # fmt: skip
    if whole < high:
        top, total, out = _fold(
            q, top, total, out, k_base, v_base, p_base, s_base, whole + c, high, scale2, R, D, E, k_c, v_c, r, d, e,
            HAS_POSITION, HAS_SCORES, True, EVEN,
        )  # fmt: skip
    return top, total, out


@triton.jit(do_not_specialize=["C"])
def _split(
    q_ptr, k_ptr, v_ptr, length_ptr, start_ptr, position_ptr, scores_ptr, part_ptr, lse_ptr,
    scale2, G, R, S, C, D, E,
    q_b, q_h, k_b, k_g, k_c, v_b, v_g, v_c, p_b, p_g,
    HAS_START: tl.constexpr, HAS_POSITION: tl.constexpr, HAS_SCORES: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    """One split of one (row, KV head): partial out [R, E] and its lse (base 2)."""
    pair, split = tl.program_id(0), tl.program_id(1)
    b, g = pair // G, pair % G
    length = tl.load(length_ptr)
    start = 0
    if HAS_START:
        start = tl.load(start_ptr + b)
    per = tl.cdiv(tl.cdiv(length - start, S), BLOCK) * BLOCK
    low = start + split * per
    high = tl.minimum(low + per, length)
    r, d, e = tl.arange(0, ROWS), tl.arange(0, DP), tl.arange(0, EP)
    q_at = q_ptr + b.to(tl.int64) * q_b + (g * R + r)[:, None] * q_h + d[None, :]
    q = tl.load(q_at, mask=(r < R)[:, None] & (d < D)[None, :], other=0.0)
    k_base = k_ptr + b.to(tl.int64) * k_b + g.to(tl.int64) * k_g
    v_base = v_ptr + b.to(tl.int64) * v_b + g.to(tl.int64) * v_g
    p_base = position_ptr + b.to(tl.int64) * p_b + g * p_g
    s_base = scores_ptr + (pair.to(tl.int64) * R + r)[:, None] * C
    top, total, out = _span(
        q, k_base, v_base, p_base, s_base, low, high, scale2, R, D, E, k_c, v_c, r, d, e,
        HAS_POSITION, HAS_SCORES, EVEN, ROWS, BLOCK, EP,
    )  # fmt: skip
    safe = tl.where(total > 0, total, 1.0)
    out = out / safe[:, None]
    lse = tl.where(total > 0, top + tl.log2(safe), float("-inf"))
    row = (pair.to(tl.int64) * S + split) * R + r
    tl.store(part_ptr + row[:, None] * E + e[None, :], out, mask=(r < R)[:, None] & (e < E)[None, :])
    tl.store(lse_ptr + row, lse, mask=r < R)


@triton.jit
def _merge(part_ptr, lse_ptr, out_ptr, out_lse_ptr, R, S, E, SP: tl.constexpr, EP: tl.constexpr):
    """Merge the splits of one query head."""
    head = tl.program_id(0)
    pair, r = head // R, head % R
    s, e = tl.arange(0, SP), tl.arange(0, EP)
    row = (pair.to(tl.int64) * S + s) * R + r
    lse = tl.load(lse_ptr + row, mask=s < S, other=float("-inf"))
    top = tl.max(lse, 0)
    anchor = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp2(lse - anchor)
    total = tl.sum(weight, 0)
    part = tl.load(part_ptr + row[:, None] * E + e[None, :], mask=(s < S)[:, None] & (e < E)[None, :], other=0.0)
    safe = tl.where(total > 0, total, 1.0)
    out = tl.sum(part * weight[:, None], 0) / safe
    tl.store(out_ptr + head.to(tl.int64) * E + e, out.to(out_ptr.dtype.element_ty), mask=e < E)
    tl.store(out_lse_ptr + head, tl.where(total > 0, (anchor + tl.log2(safe)) * 0.6931471805599453, float("-inf")))


@triton.jit
def _mass(
    q_ptr, k_ptr, lse_ptr, length_ptr, position_ptr, mass_ptr,
    scale2, G, R, D, M,
    q_b, q_h, k_b, k_g, k_c, p_b, p_g,
    HAS_POSITION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Attention that a block of keys draws from the query heads of its group: exp(logit - lse)."""
    pair, block = tl.program_id(0), tl.program_id(1)
    b, g = pair // G, pair % G
    length = tl.load(length_ptr)
    r, d, j = tl.arange(0, ROWS), tl.arange(0, DP), block * BLOCK + tl.arange(0, BLOCK)
    live = j < length
    if HAS_POSITION:
        place = tl.load(position_ptr + b.to(tl.int64) * p_b + g * p_g + j, mask=live, other=-1)
        live = live & (place >= 0)
    q_at = q_ptr + b.to(tl.int64) * q_b + (g * R + r)[:, None] * q_h + d[None, :]
    q = tl.load(q_at, mask=(r < R)[:, None] & (d < D)[None, :], other=0.0)
    k_at = k_ptr + b.to(tl.int64) * k_b + g.to(tl.int64) * k_g + j[None, :].to(tl.int64) * k_c + d[:, None]
    k = tl.load(k_at, mask=live[None, :] & (d < D)[:, None], other=0.0)
    lse = tl.load(lse_ptr + pair.to(tl.int64) * R + r, mask=r < R, other=0.0) * 1.4426950408889634
    p = tl.exp2(tl.dot(q, k, input_precision="ieee") * scale2 - lse[:, None])
    p = tl.where(live[None, :] & (r < R)[:, None], p, 0.0)
    at = mass_ptr + (pair.to(tl.int64) * R + r)[:, None] * M + j[None, :]
    tl.store(at, p, mask=(r < R)[:, None] & (j < M)[None, :])


@triton.jit(do_not_specialize=["C"])
def _masses(scores_ptr, lse_ptr, length_ptr, drawing_ptr, H, C, HAS_DRAWING: tl.constexpr, BLOCK: tl.constexpr):
    """Scores in units of log2 become exp(score - lse), in place; 0 past the length and where a row draws nothing."""
    head, block = tl.program_id(0), tl.program_id(1)
    j = block * BLOCK + tl.arange(0, BLOCK)
    length = tl.load(length_ptr)
    if HAS_DRAWING:
        length = tl.where(tl.load(drawing_ptr + head // H) >= 0, length, 0)
    live = (j < length) & (j < C)
    lse = tl.load(lse_ptr + head) * 1.4426950408889634
    lse = tl.where(lse > float("-inf"), lse, 0.0)  # a row that saw nothing
    at = scores_ptr + head.to(tl.int64) * C + j
    s = tl.load(at, mask=live, other=float("-inf"))
    tl.store(at, tl.where(s > float("-inf"), tl.exp2(s - lse), 0.0), mask=j < C)


def _check(q: Tensor, k: Tensor, who: str) -> None:
    b, h, n, d = q.shape
    if n != 1 or h % k.shape[1] or k.shape[0] != b or k.shape[3] != d:
        raise InvalidInput(f"{who}: q {tuple(q.shape)} and k {tuple(k.shape)} do not fit one token per row")
    if k.stride(3) != 1:
        raise InvalidInput(f"{who}: keys must be contiguous along their last axis")


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    length: Tensor,
    start: Tensor | None = None,
    position: Tensor | None = None,
    scale: float,
    scores: Tensor | None = None,
    splits: int | None = None,
    block: int = 64,
    warps: int = 4,
    stages: int = 2,
) -> tuple[Tensor, Tensor]:
    """Attention of one token per row over the first `length` slots.

    q: ``[B, H, 1, D]``; k: ``[B, G, C, D]``; v: ``[B, G, C, E]`` (last axis contiguous). length: int32 ``[1]`` on the device,
    at most C. start: int32 ``[B]``, first slot of each row (left padding), or None. position: int32 ``[B, G, C]``, slots
    below 0 are skipped, or None. scores: float32 ``[B, H, C]``, contiguous, which is given scale q . k in units of log2 (-inf
    in skipped slots; nothing outside [start, length)), or None. Returns out ``[B, H, 1, E]`` and lse ``[B, H, 1]`` float32.
    The number of splits does not depend on the capacity, so results are the same, bit for bit, whatever room was reserved.
    Raises `InvalidInput`.
    """
    _check(q, k, "decode_attention")
    b, h, _, d = q.shape
    g, e = k.shape[1], v.shape[3]
    if v.shape[:3] != k.shape[:3] or v.stride(3) != 1:
        raise InvalidInput(
            f"decode_attention: k {tuple(k.shape)} and v {tuple(v.shape)} differ, or v is not contiguous in E"
        )
    if scores is not None and (scores.shape != (b, h, k.shape[2]) or scores.dtype != torch.float32):
        raise InvalidInput(
            f"decode_attention: scores are {tuple(scores.shape)} {scores.dtype}, expected {(b, h, k.shape[2])} torch.float32"
        )
    if scores is not None and not scores.is_contiguous():
        raise InvalidInput("decode_attention: scores must be contiguous")
    q = q.contiguous()
    r = h // g
    if splits is None:
        units = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 4
        splits = max(1, min(128, triton.cdiv(2 * units, b * g)))
    part = torch.empty(b * g * splits * r * e, dtype=torch.float32, device=q.device)
    lse = torch.empty(b * g * splits * r, dtype=torch.float32, device=q.device)
    out = torch.empty(b, h, 1, e, dtype=q.dtype, device=q.device)
    out_lse = torch.empty(b, h, 1, dtype=torch.float32, device=q.device)
    wide_d, wide_e = tiled(d, e, dtype=q.dtype)
    places = position if position is not None else length
    # With scores the compiler takes so many registers that two programs fit a multiprocessor; this cap makes it three.
    cap = {"maxnreg": 168} if scores is not None and warps == 4 and q.is_cuda and torch.version.hip is None else {}
    _split[(b * g, splits)](
        q, k, v, length, start if start is not None else length, places,
        scores if scores is not None else part, part, lse,
        scale * LOG2E, g, r, splits, k.shape[2], d, e,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), k.stride(2), v.stride(0), v.stride(1), v.stride(2),
        position.stride(0) if position is not None else 0, position.stride(1) if position is not None else 0,
        HAS_START=start is not None, HAS_POSITION=position is not None, HAS_SCORES=scores is not None,
        EVEN=(d, e) == (wide_d, wide_e),
        ROWS=max(16, triton.next_power_of_2(r)), BLOCK=block, DP=wide_d, EP=wide_e, num_warps=warps, num_stages=stages, **cap,
    )  # fmt: skip
    _merge[(b * h,)](part, lse, out, out_lse, r, splits, e, SP=triton.next_power_of_2(splits), EP=wide_e, num_warps=4)
    return out, out_lse


def key_mass(
    q: Tensor, k: Tensor, lse: Tensor, *, length: Tensor, position: Tensor | None = None, scale: float
) -> Tensor:
    """Attention that every key draws from one token per row: ``exp(scale q . k - lse)``, float32 ``[B, H, C]``.

    lse: ``[B, H, 1]`` float32 from `decode_attention`; other arguments as there. Slots that were not read get 0.
    """
    _check(q, k, "key_mass")
    b, h, _, d = q.shape
    g, m = k.shape[1], k.shape[2]
    q, block = q.contiguous(), 64
    mass = torch.empty(b, h, m, dtype=torch.float32, device=q.device)
    _mass[(b * g, triton.cdiv(m, block))](
        q, k, lse, length, position if position is not None else length, mass,
        scale * LOG2E, g, h // g, d, m,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), k.stride(2),
        position.stride(0) if position is not None else 0, position.stride(1) if position is not None else 0,
        HAS_POSITION=position is not None, ROWS=max(16, triton.next_power_of_2(h // g)), BLOCK=block,
        DP=max(16, triton.next_power_of_2(d)), num_warps=4,
    )  # fmt: skip
    return mass


def decode_masses(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    length: Tensor,
    position: Tensor | None = None,
    drawing: Tensor | None = None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`decode_attention` and what each key draws, with one read of the keys: out and float32 ``[B, H, C]``.

    drawing: int32 ``[B]``; rows below 0 (padding) draw nothing. Slots that were not read get 0; other arguments as there.
    """
    b, h, c = q.shape[0], q.shape[1], k.shape[2]
    scores = torch.empty(b, h, c, dtype=torch.float32, device=q.device)
    out, lse = decode_attention(q, k, v, length=length, position=position, scale=scale, scores=scores)
    _masses[(b * h, triton.cdiv(c, 1024))](
        scores, lse, length, drawing if drawing is not None else length, h, c,
        HAS_DRAWING=drawing is not None, BLOCK=1024, num_warps=4,
    )  # fmt: skip
    return out, scores
