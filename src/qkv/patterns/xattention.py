r"""XAttention: block-sparse prefill whose blocks are scored by sums along antidiagonals, one strided product.

With stride S, tile row r and tile column c (S x S tiles of the score matrix):

    R_r = concat_t q[rS + S-1-t],    C_c = concat_t k[cS + t],    t = 0 .. S-1
    R_r . C_c = sum_t q[rS + S-1-t] . k[cS + t]                   (the antidiagonal of tile (r, c))
    W_r = softmax_c( scale / (S norm) R_r . C_c )                 over tiles that r may see
    a[u, b] = sum of W over the tiles of block (u, b)

Each query block u keeps the smallest set of key blocks whose share of sum_b a[u, b] reaches `threshold`, the
forced ones counted first: block 0 (`keep_first`) and the blocks on the diagonal (`keep_diagonal`), causal
only. Attention over the kept blocks is exact. A chunk of N queries at the end of M keys starts at the offset
M - N; chunks cut at multiples of `block_size` choose what one pass would. When the offset is no multiple of
it, a query block meets two diagonal blocks, and both are forced (without `keep_diagonal` or `keep_first` the
first of them: no query may be left without a key). Padding is cut off before anything is scored: in a
left-padded row the blocks count from its first real token, so a row in a batch chooses what it would alone.

The paper's code keeps row 0 where it means column 0, masks every key when nothing is padded, and redirects
unselected slots to block 0; this follows the definition. Threshold 1 keeps all, whatever rounding says.

Axes: B batch, H query heads, G key/value heads, N queries, M keys, D head width, S stride, Nr and Mc tile
rows and columns, Qb and Kb query and key blocks. Paper: arXiv:2503.16428.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.core.attend import attend, check_qkv
from qkv.core.errors import InvalidInput, InvalidParameter, Refused
from qkv.core.pattern import Pattern, PatternSpec, check_padding
from qkv.core.plan import BlockPlan
from qkv.core.spec import Limit, param
from qkv.patterns._common.execute import execute_plan

SCORE_ELEMENTS = 1 << 19  # tile scores held at once; small pieces also skip what lies above the diagonal


def reference(
    q: Tensor, k: Tensor, *, scale: float, causal: bool, padding: Tensor | None, stride: int, block_size: int,
    threshold: float | tuple[float, ...], norm: float, keep_first: bool, keep_diagonal: bool, share_groups: bool,
) -> Tensor:  # fmt: skip
    """The dense mask by the definition: one row, head, tile and block at a time, from the whole score matrix.

    q: ``[B, H, N, D]``, k: ``[B, G, M, D]`` -> bool ``[B, H, N, M]``; padded queries see nothing.
    """
    (b, h, n, _), (g, m), size = q.shape, k.shape[1:3], block_size
    r = h // g
    out = torch.zeros(b, h, n, m, dtype=torch.bool, device=q.device)
    for row in range(b):
        real = [j for j in range(m) if padding is None or padding[row, j]]
        asks = [i for i in range(n) if n > m or padding is None or padding[row, i + m - n]]
        if not real or not asks:
            continue
        scores = q[row][:, asks] @ k[row][:, real].repeat_interleave(r, 0).mT  # [H, N', M']
        offset = asks[0] + m - n - real[0]  # position of the first query among the real keys
        mass = torch.stack([_mass(x * scale / (stride * norm), stride, size, offset, causal) for x in scores])
        if share_groups:
            mass = mass.unflatten(0, (g, r)).mean(1).repeat_interleave(r, 0)
        for head in range(h):
            per = threshold if isinstance(threshold, tuple) else (threshold,) * h
            tau = per[head // r if share_groups else head]
            for u in range(mass.shape[1]):
                top = offset + u * size
                last = min(offset + len(asks), top + size) - 1
                forced, free = set(), list(range(-(-len(real) // size)))
                if causal:
                    free = [c for c in free if c * size <= last]
                    forced = {0} if keep_first else set()
                    forced |= {c for c in free if (c + 1) * size > top} if keep_diagonal else set()
                    forced |= {top // size} if top % size and not forced else set()
                kept, weight = set(forced), mass[head, u].tolist()
                for c in sorted((c for c in free if c not in forced), key=lambda c: -weight[c]):
                    if tau >= 1 or sum(weight[x] for x in kept) < tau * sum(weight):
                        kept.add(c)
                for i in range(u * size, min(len(asks), (u + 1) * size)):
                    own = [j // size in kept and (not causal or j <= i + offset) for j in range(len(real))]
                    out[row, head, asks[i], real] = torch.tensor(own, device=q.device)
    return out


def _mass(scores: Tensor, stride: int, size: int, offset: int, causal: bool) -> Tensor:
    """Block scores ``[Qb, Kb]`` of one head's scaled scores ``[N, M]``."""
    (n, m), x = scores.shape, scores.tolist()
    rows, columns = -(-n // stride), -(-m // stride)
    tiles = [[-math.inf] * columns for _ in range(rows)]
    for r in range(rows):
        for c in range(columns):
            pairs = [(r * stride + stride - 1 - t, c * stride + t) for t in range(stride)]
            if not causal or c * stride <= offset + r * stride + stride - 1:
                tiles[r][c] = sum(x[i][j] for i, j in pairs if i < n and j < m)
    weights = torch.tensor(tiles, dtype=scores.dtype).softmax(1).tolist()
    out = [[0.0] * -(-m // size) for _ in range(-(-n // size))]
    for r in range(rows):
        for c in range(columns):
            out[r * stride // size][c * stride // size] += weights[r][c]
    return scores.new_tensor(out)


class Rows(NamedTuple):
    """Where the real tokens of each row lie, each ``[B]``.

    begin: keys cut off on the left; keys: real keys; skip: queries cut off on the left; queries: real
    queries; offset: position of the first real query among the real keys.
    """

    begin: Tensor
    keys: Tensor
    skip: Tensor
    queries: Tensor
    offset: Tensor


def real_tokens(padding: Tensor | None, b: int, n: int, m: int, device: torch.device) -> Rows:
    """Real tokens of each row; `Refused` where padding lies between real tokens."""
    if padding is None:
        zero = torch.zeros(b, dtype=torch.long, device=device)
        return Rows(zero, zero + m, zero, zero + n, zero + (m - n))
    begin = padding.int().argmax(1)
    keys = padding.sum(1)
    place = torch.arange(m, device=device)
    if bool((padding & (place >= (begin + keys)[:, None])).any()):
        raise Refused(
            "xattention: padding must lie at the ends of a row, not between its tokens; pack the tokens together"
        )
    if n > m:
        return Rows(begin, keys, torch.zeros_like(begin), torch.full_like(begin, n), (m - n) - begin)
    skip = (begin - (m - n)).clamp(0, n)
    queries = (begin + keys - (m - n)).clamp(0, n) - skip
    return Rows(begin, keys, skip, queries.clamp(min=0), (m - n) + skip - begin)


def _roll(x: Tensor, by: Tensor, count: Tensor) -> Tensor:
    """``x [B, h, L, D]`` with each row's `by` first tokens moved to its end; zeros from `count` on."""
    place = torch.arange(x.shape[2], device=x.device)
    order = (place + by[:, None]) % x.shape[2]  # [B, L]
    x = x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
    return x.masked_fill((place >= count[:, None])[:, None, :, None], 0.0)


def block_scores(
    q: Tensor, k: Tensor, *, scale: float, causal: bool, stride: int, block_size: int, norm: float = 1.0,
    at: Rows | None = None,
) -> tuple[Tensor, float]:  # fmt: skip
    """Antidiagonal block scores ``[B, H, Qb, Kb]`` and the FLOPs of their products.

    q: ``[B, H, N, D]``, k: ``[B, G, M, D]``, real tokens first and zeros after them, as `at` says. Scores
    are in float32 or wider, at most `SCORE_ELEMENTS` tile scores at once; above the diagonal nothing is
    computed.
    """
    (b, h, n, d), (g, m), s, size = q.shape, k.shape[1:3], stride, block_size
    padded = at is not None
    at = real_tokens(None, b, n, m, q.device) if at is None else at
    nr, kb, per = -(-n // s), -(-m // size), size // s
    qs = F.pad(q, (0, 0, 0, nr * s - n)).reshape(b, h, nr, s, d).flip(3).reshape(b, g, h // g, nr, s * d)
    ks = F.pad(k, (0, 0, 0, kb * size - m)).reshape(b, g, kb * per, s * d)
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros(b, h, -(-n // size), kb, dtype=wide, device=q.device)
    ahead = (at.offset + s - 1).div(s, rounding_mode="floor")[:, None, None]  # tile columns before row 0's own
    farthest = int(ahead.max()) if causal else 0
    known = (-(-at.keys // s))[:, None, None]
    asked = (-(-at.queries // s))[:, None, None]
    blocks = max(1, SCORE_ELEMENTS // (b * h * per * per * kb))
    flops = 0.0
    for u in range(0, out.shape[2], blocks):
        r = torch.arange(u * per, min(nr, (u + blocks) * per), device=q.device)[:, None]
        width = min(kb, (int(r[-1]) + farthest) // per + 1) if causal else kb
        c = torch.arange(width * per, device=q.device)
        part = qs[:, :, :, u * per : u * per + len(r)].reshape(b, g, -1, s * d) * (scale / (s * norm))
        tiles = (part @ ks[:, :, : width * per].mT).to(wide).reshape(b, h, len(r), -1)
        flops += 2.0 * b * h * len(r) * width * per * s * d
        seen = (c < known) & (c <= r + ahead) if causal else (c < known).expand(-1, len(r), -1)
        tiles = tiles.masked_fill_(~seen[:, None], -torch.inf).softmax(-1)
        if padded:
            tiles = tiles.masked_fill_((r >= asked)[:, None], 0.0)  # also where nothing was seen
        tiles = F.pad(tiles.unflatten(-1, (width, per)).sum(-1), (0, 0, 0, -len(r) % per))  # [B, H, R, width]
        out[:, :, u : u + blocks, :width] = tiles.unflatten(2, (-1, per)).sum(3)
    return out, flops


def select(scores: Tensor, threshold: Tensor, forced: Tensor, free: Tensor) -> Tensor:
    """The smallest set of blocks with the share `threshold` of the mass, `forced` ones counted first.

    scores: ``[B, H, Qb, Kb]``; threshold: ``[H|1, 1, 1]``; forced, free: bool, broadcastable to scores. Only
    free blocks are kept; a threshold of 1 keeps all of them. Ties go to the older block.
    """
    scores = scores.masked_fill(~free, 0.0)
    rank = scores.masked_fill(~free, -torch.inf).masked_fill(forced & free, torch.inf)
    order = rank.sort(dim=-1, descending=True, stable=True).indices
    mass = scores.gather(-1, order).cumsum(-1)
    before = F.pad(mass[..., :-1], (1, 0))
    chosen = torch.zeros_like(free.expand_as(scores)).scatter(-1, order, before < threshold * mass[..., -1:])
    return (chosen | forced | (threshold >= 1)) & free


def _order(by: Tensor, size: int) -> Tensor | None:
    """Slot -> position after `_roll`: ``[B, 1, L]``, or None when nothing moves."""
    if not bool((by % size).any()):
        return None
    return ((torch.arange(size, device=by.device) + by[:, None]) % size)[:, None]


def calibrate_thresholds(
    method: XAttention, samples: Iterable[tuple[Tensor, Tensor, Tensor]], *, tolerance: float = 0.05,
    factor: float = 0.9, floor: float = 0.1,
) -> tuple[float, ...]:  # fmt: skip
    """Per-head thresholds of one layer: as few blocks as an error allows.

    samples: (q, k, v) of that layer on calibration text. tolerance: greatest mean over heads of the relative
    L2 error of the head outputs against dense attention. From `method.threshold` (or its highest) each step
    lowers the head that saves most blocks per error added, by powers of `factor`, never below `floor`.
    Greedy, where the paper runs a dynamic programme over steps of the same size. Returns thresholds for
    ``method.replace(threshold=...)``. Raises `InvalidInput`, `InvalidParameter`.
    """
    if not 0 < factor < 1 or not 0 < floor <= 1 or tolerance < 0:
        raise InvalidParameter(
            f"calibrate_thresholds: tolerance={tolerance} must be >= 0, factor={factor} in (0, 1), floor={floor} in (0, 1]"
        )
    start = max(method.threshold) if isinstance(method.threshold, tuple) else method.threshold
    steps = max(0, math.floor(math.log(floor / start) / math.log(factor))) if floor < start else 0
    levels = [start * factor**i for i in range(steps + 1)]
    errors, costs, count = [], [], 0
    for q, k, v in samples:
        dense = attend(q, k, v, causal=True).out
        runs = [_cost(replace(method, threshold=tau), q, k, v, dense) for tau in levels]
        errors.append(torch.stack([e for e, _ in runs]))
        costs.append(torch.stack([c for _, c in runs]))
        count += 1
    if not count:
        raise InvalidInput("calibrate_thresholds: no samples; pass (q, k, v) tensors of the layer")
    error, cost = torch.stack(errors).mean(0), torch.stack(costs).mean(0)
    if float(error[0].mean()) > tolerance:
        raise InvalidParameter(
            f"calibrate_thresholds: the error is {float(error[0].mean()):.3g} at threshold {start:g} already; raise "
            f"tolerance={tolerance} or the method's threshold"
        )
    return _greedy(error, cost, levels, tolerance)


def _cost(method: Pattern, q: Tensor, k: Tensor, v: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
    """Relative error and kept blocks per head of the plan."""
    plan = method.plan(q, k)
    gap = (execute_plan(q, k, v, plan) - dense).square().sum((0, 2, 3), dtype=torch.float64)
    cost = plan.blocks().sum((0, 2, 3), dtype=torch.float64)
    error = (gap / dense.square().sum((0, 2, 3), dtype=torch.float64)).sqrt()
    return error.unflatten(0, (len(cost), -1)).mean(1), cost


def _greedy(errors: Tensor, costs: Tensor, levels: list[float], tolerance: float) -> tuple[float, ...]:
    """Lower one head at a time: errors and costs ``[levels, heads]``, best saving per added error first."""
    heads = errors.shape[1]
    now = [0] * heads
    while True:
        best, choice = 0.0, None
        spent = sum(float(errors[now[h], h]) for h in range(heads))
        for h in range(heads):
            for level in range(now[h] + 1, len(levels)):
                added = float(errors[level, h] - errors[now[h], h])
                saved = float(costs[now[h], h] - costs[level, h])
                fits = spent + added <= tolerance * heads
                if fits and saved > 0 and saved / max(added, 1e-12) > best:
                    best, choice = saved / max(added, 1e-12), (h, level)
        if choice is None:
            return tuple(levels[x] for x in now)
        now[choice[0]] = choice[1]


@final
@dataclass(frozen=True, kw_only=True)
class XAttention(Pattern):
    """The fewest key blocks whose antidiagonal scores hold `threshold` of the mass, per query block and head."""

    spec: ClassVar[PatternSpec] = PatternSpec(
        id="xattention",
        title="XAttention: Block Sparse Attention with Antidiagonal Scoring",
        paper="arXiv:2503.16428",
        source="code",
        summary="Training-free sparse prefill: blocks are scored by strided antidiagonal sums, the best ones kept.",
        reference=reference,
        execute=execute_plan,
        dynamic=True,
        masks="padding",
        limits=(Limit("full", {"threshold": 1.0}, "threshold 1 keeps every block"),),
        trials=(
            {},
            {"stride": 2, "block_size": 4, "threshold": 0.6},
            {"stride": 3, "block_size": 6, "threshold": 0.5, "norm": 0.3, "share_groups": True},
            {"stride": 1, "block_size": 5, "threshold": 0.4, "keep_first": False, "keep_diagonal": False},
        ),
        shown="Holds more of the true attention mass than mean-pooled or random blocks of equal density.",
        honest="For an even stride, a stripe one token wide at an even distance is never sampled; decoding is dense.",
    )
    stride: int = param(8, "side of the tiles whose antidiagonals are summed, in tokens; divides block_size", low=1)
    block_size: int = param(128, "tokens of a query block and of a key block", low=1)
    threshold: float | tuple[float, ...] = param(
        0.9, "share of the scored mass to keep, in (0, 1]; one number, or one per query head", low=0, high=1
    )
    norm: float = param(1.0, "temperature of the scores; below 1 sharpens them", low=0)
    keep_first: bool = param(True, "always keep the first key block (causal only)")
    keep_diagonal: bool = param(True, "always keep the query block's own key block (causal only)")
    share_groups: bool = param(False, "one choice per key/value head, from the mean over its query heads; "
                                      "thresholds are then per key/value head")  # fmt: skip

    def validate(self) -> None:
        """Stride divides block size; thresholds and norm are not 0."""
        if self.block_size % self.stride:
            near = [s for s in range(1, self.block_size + 1) if self.block_size % s == 0]
            raise InvalidParameter(
                f"xattention: stride={self.stride} must divide block_size={self.block_size}; the nearest that does is "
                f"{min(near, key=lambda s: abs(s - self.stride))}"
            )
        if not self.norm > 0:
            raise InvalidParameter(f"xattention: norm={self.norm} must be greater than 0")
        given = self.threshold if isinstance(self.threshold, tuple) else (self.threshold,)
        if not given or min(given) <= 0:
            raise InvalidParameter(f"xattention: threshold={self.threshold!r} must lie in (0, 1]; 1 keeps all blocks")

    @property
    def granularity(self) -> int:
        """The block size: queries of a block share their keys."""
        return self.block_size

    def _thresholds(self, h: int, g: int, like: Tensor) -> Tensor:
        want = g if self.share_groups else h
        given = self.threshold if isinstance(self.threshold, tuple) else (self.threshold,)
        if len(given) not in (1, want) or (isinstance(self.threshold, tuple) and len(given) != want):
            what = "key/value heads (share_groups)" if self.share_groups else "query heads"
            raise InvalidInput(
                f"xattention: {len(given)} thresholds for {want} {what}; give one for each, or one number"
            )
        return torch.tensor(given, dtype=like.dtype, device=like.device)[:, None, None]

    def plan(
        self,
        q: Tensor,
        k: Tensor,
        *,
        scale: float | None = None,
        causal: bool = True,
        padding: Tensor | None = None,
    ) -> BlockPlan:
        """See `Pattern.plan`. Padding may lie on either end of a row, not between its tokens (`Refused`)."""
        check_qkv(q, k, k, causal=causal, who=self.id)
        check_padding(padding, k, self.id)
        (b, h, n, d), (g, m), size = q.shape, k.shape[1:3], self.block_size
        with torch.no_grad():
            at = real_tokens(padding, b, n, m, q.device)
            perm_q = perm_kv = None
            if padding is not None:
                q, k = _roll(q.detach(), at.skip, at.queries), _roll(k.detach(), at.begin, at.keys)
                perm_q, perm_kv = (_order(by, t.shape[2]) for by, t in ((at.skip, q), (at.begin, k)))
            scores, flops = block_scores(
                q, k, scale=d**-0.5 if scale is None else scale, causal=causal, stride=self.stride, block_size=size,
                norm=self.norm, at=None if padding is None else at,
            )  # fmt: skip
            if self.share_groups:
                scores = scores.unflatten(1, (g, h // g)).mean(2)
            forced, free = self._blocks(at, causal, *scores.shape[2:])
            kept = select(scores, self._thresholds(h, g, scores), forced, free)
        return BlockPlan.from_blocks(
            kept,
            block=size,
            queries=n,
            keys=m,
            causal=causal,
            tokens=None if padding is None else padding[:, None, None],
            perm_q=perm_q,
            perm_kv=perm_kv,
            selection_flops=flops,
        )

    def _blocks(self, at: Rows, causal: bool, qb: int, kb: int) -> tuple[Tensor, Tensor]:
        """Blocks that must be kept and blocks that may be: bool ``[B, 1, Qb, Kb]`` each."""
        size = self.block_size
        offset, asked, known = (x[:, None, None] for x in (at.offset, at.queries, at.keys))
        u = torch.arange(qb, device=at.keys.device)[:, None] * size
        c = torch.arange(kb, device=at.keys.device) * size  # first key of each block
        free = (c < known) & (u < asked)  # [B, Qb, Kb]
        forced = torch.zeros_like(free)
        if causal:
            top, last = offset + u, offset + torch.minimum(asked, u + size) - 1  # [B, Qb, 1]
            free = free & (c <= last)
            if self.keep_first:
                forced = forced | (c == 0)
            if self.keep_diagonal:
                forced = forced | (c + size > top)
            elif not self.keep_first:
                forced = forced | ((top % size != 0) & (c == top - top % size))
        return (forced & free)[:, None], free[:, None]
