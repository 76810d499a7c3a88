r"""Attention of a prompt over vertical and slash lines on the GPU: the tiles that a slash crosses, then single columns.

    out_p = sum over m in K_p of softmax_m(scale q_p . k_m) v_m,   K_p = { m <= p : vertical_m or slash_{p - m} }

Tiles of C queries and C keys begin at the same positions, so that a tile's offsets depend on its diagonal alone: a head needs one
list of the diagonals that any slash crosses, whatever the length. A program takes a tile of queries along that list with the kept
cells as a mask; then the keys of vertical lines outside of those tiles, gathered C at a time, all of whose cells are kept.
float32 operands are multiplied as three tf32 products.

Bound: FLOPs 2 (D + E) C^2 for each tile that a slash crosses and 2 (D + E) for each query and column left; bytes once each.
Axes: H query heads, G key/value heads, R = H / G, N queries, M keys, D head width, E value width, T tiles of keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from qkv.core.errors import InvalidInput
from qkv.kernels.widths import tiled

LOG2E = tl.constexpr(1.4426950408889634)
WIDEST = 256


@triton.jit
def _take(
    q, k_at, v_at, there, kept, top, total, out, scale2, D, E, DP: tl.constexpr, EP: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Keys at `k_at` [C] with values at `v_at`, those `there`, taken into a running softmax in the cells `kept` [C, C]."""
    d, e = tl.arange(0, DP), tl.arange(0, EP)
    k = tl.load(k_at[None, :] + d[:, None], mask=there[None, :] & (d < D)[:, None], other=0.0)
    s = tl.where(kept, tl.dot(q, k, input_precision=PRECISION) * scale2, float("-inf"))
    new = tl.maximum(top, tl.max(s, 1))
    anchor = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(s - anchor[:, None])
    fade = tl.exp2(top - anchor)
    v = tl.load(v_at[:, None] + e[None, :], mask=there[:, None] & (e < E)[None, :], other=0.0)
    out = out * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    return new, total * fade + tl.sum(p, 1), out


@triton.jit
def _lines(
    q_ptr, k_ptr, v_ptr, out_ptr, vertical_ptr, slash_ptr, crossed_ptr, diagonal_ptr, many_ptr, column_ptr, upto_ptr,
    scale2, R, N, M, D, E, T, ahead, q_h, q_n, k_h, k_n, v_h, v_n,
    DP: tl.constexpr, EP: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output [H, N, E]; grid (tiles of queries, H), the longest first.

    Tile j holds the keys from C j - ahead on; the last query tile meets tile T - 1 on its diagonal. vertical, slash [H, M];
    crossed [H, T]: diagonals with a slash, diagonal [H, T]: these ascending, many [H, T]: how many up to each; column [H, M]: the
    vertical keys ascending, upto [H, T]: how many before the end of each tile.
    """
    h, turn = tl.program_id(1).to(tl.int64), tl.program_id(0)
    tile = tl.num_programs(0) - 1 - turn
    mine = T - 1 - turn
    rows = tile * C + tl.arange(0, C)
    at = rows + (M - N)  # positions
    d, e = tl.arange(0, DP), tl.arange(0, EP)
    q_at = q_ptr + h * q_h + rows[:, None].to(tl.int64) * q_n + d[None, :]
    q = tl.load(q_at, mask=(rows < N)[:, None] & (d < D)[None, :], other=0.0)
    k_ptr += h // R * k_h
    v_ptr += h // R * v_h
    vertical_ptr += h * M
    slash_ptr += h * M
    column_ptr += h * M
    crossed_ptr += h * T
    diagonal_ptr += h * T
    top = tl.full((C,), float("-inf"), tl.float32)
    total = tl.zeros((C,), tl.float32)
    out = tl.zeros((C, EP), tl.float32)
    for i in range(tl.load(many_ptr + h * T + mine)):
        keys = (mine - tl.load(diagonal_ptr + i)) * C - ahead + tl.arange(0, C)
        inside = (keys >= 0) & (keys < M)
        named = tl.load(vertical_ptr + keys, mask=inside, other=0) != 0
        offset = at[:, None] - keys[None, :]
        seen = (offset >= 0) & (keys >= 0)[None, :] & (rows < N)[:, None]
        kept = seen & (named[None, :] | (tl.load(slash_ptr + offset, mask=seen, other=0) != 0))
        far = keys.to(tl.int64)
        top, total, out = _take(q, k_ptr + far * k_n, v_ptr + far * v_n, inside, kept, top, total, out,
                                scale2, D, E, DP, EP, PRECISION)  # fmt: skip
    count = tl.load(upto_ptr + h * T + mine)
    for low in range(0, count, C):
        listed = low + tl.arange(0, C)
        keys = tl.load(column_ptr + listed, mask=listed < count, other=0).to(tl.int64)
        crossed = tl.load(crossed_ptr + mine - (keys + ahead) // C, mask=listed < count, other=1)
        left = crossed == 0
        kept = left[None, :] & (rows < N)[:, None]
        top, total, out = _take(q, k_ptr + keys * k_n, v_ptr + keys * v_n, left, kept, top, total, out,
                                scale2, D, E, DP, EP, PRECISION)  # fmt: skip
    out_at = out_ptr + (h * N + rows[:, None]) * E + e[None, :]
    tl.store(out_at, out / tl.where(total > 0, total, 1.0)[:, None], mask=(rows < N)[:, None] & (e < E)[None, :])


def _check(q: Tensor, k: Tensor, v: Tensor, vertical: Tensor, slash: Tensor) -> None:
    (h, n, d), (g, m) = q.shape, k.shape[:2]
    fit = k.shape == (g, m, d) and v.shape[:2] == (g, m) and h % g == 0 and 0 < n <= m
    if not fit or vertical.shape != (h, m) or slash.shape != (h, m):
        raise InvalidInput(
            f"lines_attention takes q [H, N, D], k [G, M, D], v [G, M, E], G dividing H, 0 < N <= M, vertical and slash "
            f"[H, M]; got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}, {tuple(vertical.shape)}, {tuple(slash.shape)}"
        )
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32) or k.dtype != q.dtype or v.dtype != q.dtype:
        raise InvalidInput(f"lines_attention takes bfloat16, float16 or float32; got {q.dtype}, {k.dtype}, {v.dtype}")
    if max(d, v.shape[2]) > WIDEST:
        raise InvalidInput(f"lines_attention holds heads of at most {WIDEST} channels; got {d} and {v.shape[2]}")


def _first(named: Tensor) -> Tensor:
    """Where bool ``[H, X]`` is true, ascending, and then the rest: int32 ``[H, X]``."""
    return named.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices.to(torch.int32)


def lines_attention(q: Tensor, k: Tensor, v: Tensor, vertical: Tensor, slash: Tensor, *, scale: float) -> Tensor:
    """Exact softmax attention over the cells on vertical and slash lines, causal: ``[H, N, E]``; no gradients.

    q ``[H, N, D]`` are the newest N of the M tokens of k ``[G, M, D]``, v ``[G, M, E]``; one of bfloat16, float16, float32.
    vertical, slash: bool ``[H, M]``, by key and by offset; slash 0 is the diagonal, and is kept whatever is given. Raises
    `InvalidInput`.
    """
    _check(q, k, v, vertical, slash)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    (h, n, d), (g, m), e = q.shape, k.shape[:2], v.shape[2]
    dp, ep = tiled(d, e, dtype=q.dtype)
    small = q.dtype == torch.float32 or max(dp, ep) > 128
    c = 32 if small else 64
    ahead = (n - m) % c  # keys of the first tile that are none
    tiles = (m - n + ahead) // c + triton.cdiv(n, c)
    slash = slash.clone()
    slash[:, 0] = True
    # diagonal j has the offsets c j - c + 1 .. c j + c - 1
    spread = F.pad(slash.to(torch.float32), (c - 1, tiles * c - m))[:, None]
    crossed = F.max_pool1d(spread, 2 * c - 1, stride=c)[:, 0] > 0  # [H, T]
    ends = (torch.arange(1, tiles + 1, device=q.device) * c - (ahead + 1)).clamp(max=m - 1)
    upto = vertical.cumsum(1)[:, ends].to(torch.int32)
    out = q.new_empty(h, n, e)
    _lines[(triton.cdiv(n, c), h)](
        q, k, v, out, vertical.contiguous().view(torch.uint8), slash.view(torch.uint8),
        crossed.view(torch.uint8), _first(crossed), crossed.cumsum(1).to(torch.int32), _first(vertical), upto,
        scale * LOG2E.value, h // g, n, m, d, e, tiles, ahead, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        DP=dp, EP=ep, C=c, PRECISION="tf32x3" if q.dtype == torch.float32 else "ieee",
        num_warps=4, num_stages=1 if small else 2,
    )  # fmt: skip
    return out
