r"""The bookkeeping of one decoding step of a ranked cache: write the token into its slot, then free the least worthy slot.

    place:  keys[slot], values[slot], position[slot], state[slot] <- token
    free:   slot <- argmin over occupied slots but the one just written;  position[slot] <- -1
    settle: the same from the scores of the step: worth is the attention drawn, now or in all, combined over heads

Worth is a float32 tensor, or the position itself with the first `protect` positions never freed. Rows without empty slots
only (the steady state).

Axes: B batch, H query heads, G key/value heads, R = H / G, C capacity, D head width, E value width, W state width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkv.core.errors import InvalidInput


@triton.jit
def _place(
    keys, values, position, state, slot, k, v, new, G, C, D, E, W, k_b, k_g, v_b, v_g,
    DP: tl.constexpr, EP: tl.constexpr, WP: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    b, g = pair // G, pair % G
    at = pair.to(tl.int64) * C + tl.load(slot + pair)
    d, e = tl.arange(0, DP), tl.arange(0, EP)
    tl.store(keys + at * D + d, tl.load(k + b * k_b + g * k_g + d, mask=d < D), mask=d < D)
    tl.store(values + at * E + e, tl.load(v + b * v_b + g * v_g + e, mask=e < E), mask=e < E)
    tl.store(position + at, tl.load(new + b))
    if WP > 0:
        w = tl.arange(0, WP)
        tl.store(state + at * W + w, tl.zeros((WP,), tl.float32), mask=w < W)


@triton.jit
def _free(position, worth, slot, C, protect, BY_POSITION: tl.constexpr, BLOCK: tl.constexpr):
    pair = tl.program_id(0)
    base = pair.to(tl.int64) * C
    written = tl.load(slot + pair)
    idle = tl.load(position + base + written) < 0  # a padded token: its slot is still empty, so nothing has to go
    best = float("inf")
    where = written.to(tl.int32)
    for start in range(0, C, BLOCK):
        j = start + tl.arange(0, BLOCK)
        live = (j < C) & (j != written)
        if BY_POSITION:
            p = tl.load(position + base + j, mask=live, other=0)
            x = p.to(tl.float32)
            live = live & (p >= protect)
        else:
            x = tl.load(worth + base + j, mask=live, other=0.0)
            x = tl.where(x == x, x, -3e38)
        x = tl.where(live, tl.minimum(tl.maximum(x, -3e38), 3e38), float("inf"))
        low = tl.min(x, 0)
        index = tl.min(tl.where((x == low) & live, j, 2147483647), 0)
        better = low < best
        where = tl.where(better, index, where)
        best = tl.where(better, low, best)
    where = tl.where(idle, written.to(tl.int32), where)
    tl.store(slot + pair, where.to(tl.int64))
    tl.store(position + base + where, -1)


@triton.jit
def _turn(keys, anchors, index, frequencies, shift, G, C, D, N, R, NP: tl.constexpr, RP: tl.constexpr):
    """Write the anchors, rotated forward by their shift, into their slots."""
    pair = tl.program_id(0)
    n, r = tl.arange(0, NP)[:, None], tl.arange(0, RP)[None, :]
    live = (n < N) & (r < R)
    source = anchors + (pair.to(tl.int64) * N + n) * D + r
    a = tl.load(source, mask=live, other=0.0).to(tl.float32)
    b = tl.load(source + R, mask=live, other=0.0).to(tl.float32)
    angle = tl.load(shift + pair.to(tl.int64) * N + n, mask=n < N, other=0).to(tl.float32)
    angle = angle * tl.load(frequencies + r, mask=r < R, other=0.0)
    cos, sin = tl.cos(angle), tl.sin(angle)
    slot = tl.load(index + pair.to(tl.int64) * N + n, mask=n < N, other=0)
    target = keys + (pair.to(tl.int64) * C + slot) * D + r
    tl.store(target, (a * cos - b * sin).to(keys.dtype.element_ty), mask=live)
    tl.store(target + R, (b * cos + a * sin).to(keys.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["C"])
def _weigh(
    scores, lse, position, state, slot, new, keep, worst, where, share, heads, sets, per, C,
    HAS_STATE: tl.constexpr, REDUCE: tl.constexpr, NORMALIZE: tl.constexpr, RP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Worth of a block of slots and the least of it; grid (B sets, blocks).

    A set belongs to `heads` query heads and `per` KV heads, the first of which stands for them.
    """
    one, block = tl.program_id(0), tl.program_id(1)
    b, first, pair = one // sets, one * heads, one * per
    newest = tl.load(new + b)
    r, j = tl.arange(0, RP), block * BLOCK + tl.arange(0, BLOCK)
    inside = j < C
    s = tl.load(
        scores + (first + r).to(tl.int64)[:, None] * C + j[None, :],
        mask=(r < heads)[:, None] & inside[None, :],
        other=float("-inf"),
    )
    fixed = tl.load(lse + first + r, mask=r < heads, other=0.0) * 1.4426950408889634
    p = tl.where(s > float("-inf"), tl.exp2(s - fixed[:, None]), 0.0)
    if REDUCE == "max":
        x = tl.max(p, 0)
    else:
        x = tl.sum(p, 0)
        if REDUCE == "mean":
            x = x / heads
    x = tl.where(newest >= 0, x, 0.0)
    if HAS_STATE:
        at = state + pair.to(tl.int64) * C + j
        x += tl.load(at, mask=inside, other=0.0)
        tl.store(at, x, mask=inside)
    place = tl.load(position + pair.to(tl.int64) * C + j, mask=inside, other=-1)
    if NORMALIZE:
        x = x / tl.maximum(newest - place + 1, 1).to(tl.float32)
    recent = tl.floor(tl.load(keep + b).to(tl.float32) * share).to(tl.int32)
    x = tl.where(place > newest - recent, float("inf"), x)
    live = inside & (j != tl.load(slot + pair))
    x = tl.where(x == x, x, -3e38)
    x = tl.where(live, tl.minimum(tl.maximum(x, -3e38), 3e38), float("inf"))
    low = tl.min(x, 0)
    found = one * tl.num_programs(1) + block
    tl.store(worst + found, low)
    tl.store(where + found, tl.min(tl.where((x == low) & live, j, 2147483647), 0))


@triton.jit(do_not_specialize=["C"])
def _settle(worst, where, position, slot, new, G, C, blocks, PER: tl.constexpr, BP: tl.constexpr):
    """The least of the blocks is freed; PER heads share a set and its blocks."""
    pair, n = tl.program_id(0), tl.arange(0, BP)
    at = (pair // PER) * blocks + n
    x = tl.load(worst + at, mask=n < blocks, other=float("inf"))
    index = tl.load(where + at, mask=n < blocks, other=2147483647)
    index = tl.min(tl.where(x == tl.min(x, 0), index, 2147483647), 0)
    written = tl.load(slot + pair).to(tl.int32)
    idle = tl.load(new + pair // G) < 0
    index = tl.where(idle | (index == 2147483647), written, index)
    tl.store(slot + pair, index.to(tl.int64))
    tl.store(position + pair.to(tl.int64) * C + index, -1)


def place(
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    state: Tensor | None,
    slot: Tensor,
    k: Tensor,
    v: Tensor,
    new: Tensor,
) -> None:
    """Write one token: k ``[B, G, 1, D]``, v ``[B, G, 1, E]``, new int32 ``[B, 1]``, into slot int64 ``[B, G, 1]``, in place.

    keys ``[B, G, C, D]``, values, position int32 ``[B, G, C]`` and state float32 ``[B, G, C, W]`` are contiguous.
    """
    b, g, c, d = keys.shape
    e, w = values.shape[3], 0 if state is None else state.shape[3]
    k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
    _place[(b * g,)](
        keys, values, position, state if state is not None else keys, slot, k, v, new.contiguous(), g, c, d, e, w,
        k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        DP=triton.next_power_of_2(d), EP=triton.next_power_of_2(e), WP=0 if w == 0 else triton.next_power_of_2(w),
        num_warps=1,
    )  # fmt: skip


def free(position: Tensor, slot: Tensor, *, worth: Tensor | None = None, protect: int = 0) -> None:
    """Free the least worthy slot of every row and head, in place; `slot` holds the one just written, then the freed one.

    worth: float32 ``[B, G, C]``, or None to free the oldest position that is at least `protect`. The lowest index wins a tie.
    A row whose new token is padding (position -1) stays as it is.
    """
    b, g, c = position.shape
    block = min(1024, triton.next_power_of_2(c))
    _free[(b * g,)](
        position, worth.contiguous() if worth is not None else position, slot, c, protect,
        BY_POSITION=worth is None, BLOCK=block, num_warps=4,
    )  # fmt: skip


def settle(
    scores: Tensor,
    lse: Tensor,
    position: Tensor,
    slot: Tensor,
    new: Tensor,
    keep: Tensor,
    *,
    state: Tensor | None = None,
    reduce: str = "sum",
    layer: bool = False,
    recent: float = 0.0,
    normalize: bool = False,
) -> None:
    """What each slot drew in this step, in all if there is a state, is its worth; the least worthy is freed, in place.

    scores ``[B, H, C]`` and lse ``[B, H, 1]`` from `decode_attention`; position int32 ``[B, G, C]``, slot int64 ``[B, G, 1]``,
    new int32 ``[B, 1]`` (a row at -1 draws nothing and frees nothing) and state float32 ``[B, G, C, 1]`` as in `place`;
    keep int64 ``[B, 1, 1]``: slots of a row. Every slot was read.

    reduce: how the heads of a KV head combine, or with `layer` all heads of a row, whose KV heads then hold the same tokens in
    the same slots (no state then). recent: share of keep that the newest tokens hold whatever they drew. normalize: divide by the
    number of queries that saw the token. The lowest index wins a tie. Raises `InvalidInput`.
    """
    (b, g, c), h = position.shape, scores.shape[1]
    if reduce not in ("sum", "mean", "max"):
        raise InvalidInput(f"settle: heads combine by 'sum', 'mean' or 'max', not by {reduce!r}")
    if scores.shape != (b, h, c) or lse.shape[:2] != (b, h) or h % g or not scores.is_contiguous():
        raise InvalidInput(
            f"settle: scores {tuple(scores.shape)} and lse {tuple(lse.shape)} do not fit slots {tuple(position.shape)}; "
            "give the contiguous scores [B, H, C] of decode_attention"
        )
    if state is not None and (layer or state.shape != (b, g, c, 1)):
        raise InvalidInput(
            f"settle: a state is [B, G, C, 1], kept per KV head, not by layer; got {tuple(state.shape)}, layer={layer}"
        )
    sets = 1 if layer else g
    heads = h // sets
    wide = triton.next_power_of_2(heads)
    block = max(128, min(1024, 8192 // wide))
    blocks = triton.cdiv(c, block)
    worst = torch.empty(b * sets, blocks, dtype=torch.float32, device=scores.device)
    where = torch.empty(b * sets, blocks, dtype=torch.int32, device=scores.device)
    new = new.contiguous()
    _weigh[(b * sets, blocks)](
        scores, lse, position, state if state is not None else scores, slot, new, keep, worst, where,
        recent, heads, sets, g // sets, c,
        HAS_STATE=state is not None, REDUCE=reduce, NORMALIZE=normalize, RP=wide, BLOCK=block, num_warps=4,
    )  # fmt: skip
    _settle[(b * g,)](
        worst, where, position, slot, new, g, c, blocks, PER=g // sets, BP=triton.next_power_of_2(blocks), num_warps=1
    )


def turn(keys: Tensor, anchors: Tensor, index: Tensor, frequencies: Tensor, shift: Tensor) -> None:
    """Keys ``[B, G, C, D]`` at index ``[B, G, N]`` <- anchors ``[B, G, N, D]`` rotated by shift int32 ``[B, G, N]``, in place."""
    b, g, c, d = keys.shape
    n, r = index.shape[2], frequencies.shape[0]
    _turn[(b * g,)](
        keys, anchors.contiguous(), index.contiguous(), frequencies, shift.contiguous(), g, c, d, n, r,
        NP=triton.next_power_of_2(n), RP=triton.next_power_of_2(r), num_warps=1,
    )  # fmt: skip


__all__ = ["free", "place", "settle", "turn"]
