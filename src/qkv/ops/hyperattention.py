r"""HyperAttention: exact attention inside blocks of keys and queries that hash alike, a sample of keys for all the rest.

    out_i = sum_j w_ij e^(s q_i . k_j) v_j / sum_j w_ij e^(s q_i . k_j)
    w_ij = 1 where the block of i is that of j,  else (M / m) times how often j was drawn

Hash: the signs of r fixed Gaussian directions, the same for queries, keys and heads, read as a Gray code, so that neighbouring
buckets differ in one sign. Keys sorted by bucket are cut into blocks of b, the last one shorter. m places in that order are drawn
with replacement, the same for all rows and heads (which keeps a row of a batch what it is alone). `weights` gives w.

Bidirectional: sorted queries are cut into as many blocks (``match="rank"``), as published. Causal: halves until `min_seq_len`
tokens are left, which are exact; the later half reads the earlier one as above, and the parts are merged by their log-sum-exp.
There the rank of a query would depend on later queries, so it is matched by its own bucket (``match="bucket"``): the place among
the sorted keys where its bucket lies. ``match="auto"`` is rank for bidirectional calls, bucket for causal ones. Fewer than
`min_seq_len` queries (decoding) are exact. Causal with N < M (a prefill in pieces): the last N tokens as above, and all earlier
keys as one earlier part. `always_keys` adds the first keys exactly (attention sinks; our option).

Without training; padded rows are computed one by one. The published code ranks codes by the Gray map instead of its inverse,
lets padded keys weigh, and counts the own block twice on one path; here the definition holds.

Axes: B batch, H query heads, G key/value heads, N queries, M keys, b block, m samples, r directions, D head width, E value width.
Han et al. 2023, HyperAttention: Long-context Attention in Near-Linear Time, arXiv:2310.05869.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.core.attend import sdpa
from qkv.core.errors import Refused
from qkv.core.merge import merge
from qkv.core.operator import Operator, OperatorSpec, Wiring
from qkv.core.rows import take_head_rows
from qkv.core.spec import Limit, param
from qkv.ops._common.fused import attend_lse
from qkv.ops._common.states import per_head, wide

TILE = 128  # most queries of one block that are computed together where blocks are uneven
HELD = 1 << 26  # key elements gathered at once
Match = Literal["auto", "rank", "bucket"]


@dataclass(frozen=True)
class Plan:
    """The settings of one part; `part` numbers the parts so that each draws its own sample.

    draws: the numbers of the directions and of the samples of parts -1, 0, 1 ..., where a call has made them all at once.
    """

    scale: float
    block_size: int
    sample_size: int
    lsh_num_projs: int
    min_seq_len: int
    always_keys: int
    match: str
    seed: int
    part: int = 0
    draws: tuple[Tensor, ...] = field(default=(), compare=False, repr=False)


def reference(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = True, padding: Tensor | None = None,
    block_size: int = 256, sample_size: int = 256, lsh_num_projs: int = 7, min_seq_len: int = 4096, always_keys: int = 0,
    match: Match = "auto", seed: int = 0,
) -> Tensor:  # fmt: skip
    """The whole weighted map. q ``[B, H, N, D]``, k ``[B, G, M, D]``, v ``[B, G, M, E]`` -> ``[B, H, N, E]``."""
    plan = _plan(scale, causal, block_size, sample_size, lsh_num_projs, min_seq_len, always_keys, match, seed)
    if padding is not None:
        return _rows(q, k, v, causal, padding, lambda a, b, c: _dense(a, b, c, causal, plan))
    return _dense(q, k, v, causal, plan)


def loop(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = True, padding: Tensor | None = None,
    block_size: int = 256, sample_size: int = 256, lsh_num_projs: int = 7, min_seq_len: int = 4096, always_keys: int = 0,
    match: Match = "auto", seed: int = 0,
) -> Tensor:  # fmt: skip
    """One row, head and query at a time, from sorted lists; shapes as in `reference`."""
    plan = _plan(scale, causal, block_size, sample_size, lsh_num_projs, min_seq_len, always_keys, match, seed)
    k, v = per_head(q, k, v)
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype, device=q.device)
    for row in range(q.shape[0]):
        keys, asks = _real(q, k, causal, None if padding is None else padding[row])
        for head in range(q.shape[1]):
            a, b, values = q[row, head, asks], k[row, head, keys], v[row, head, keys]
            pairs = _listed(a, b, causal, plan)
            for at, i in enumerate(asks.tolist()):
                terms = [(w * (scale * a[at].dot(b[j])).exp(), values[j]) for j, w in pairs[at]]
                out[row, head, i] = sum(w * x for w, x in terms) / sum(w for w, _ in terms)
    return out


def fast(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = True, padding: Tensor | None = None,
    block_size: int = 256, sample_size: int = 256, lsh_num_projs: int = 7, min_seq_len: int = 4096, always_keys: int = 0,
    match: Match = "auto", seed: int = 0,
) -> Tensor:  # fmt: skip
    """Sorted blocks with their samples, O(N (b + m)) per part; shapes as in `reference`."""
    plan = _plan(scale, causal, block_size, sample_size, lsh_num_projs, min_seq_len, always_keys, match, seed)
    if padding is not None:
        return _rows(q, k, v, causal, padding, lambda a, b, c: _whole(a, b, c, causal, plan))
    return _whole(q, k, v, causal, plan)


def weights(q: Tensor, k: Tensor, *, causal: bool, plan: Plan) -> Tensor:
    """The weights w ``[B, H, N, M]``, 0 where query i does not read key j."""
    w = q.new_zeros(q.shape[0], q.shape[1], q.shape[2], k.shape[2], dtype=wide(q))
    n, m = q.shape[2], k.shape[2]
    if _is_exact(n, m, causal, plan):
        return (w + 1).tril(m - n) if causal else w + 1
    if not causal:
        return _part_weights(q, k, plan, starts=True)
    if m > n:
        w[..., : m - n] = _part_weights(q, k[:, :, : m - n], replace(plan, part=-1), starts=True)
    w[..., m - n :] = _causal_weights(q, k[:, :, m - n :], plan, starts=m == n)
    return w


def bucket(x: Tensor, plan: Plan) -> Tensor:
    """Buckets ``[B, H, N]`` of ``[B, H, N, D]``: place of the sign code in Gray order, 0 .. 2^r - 1."""
    return buckets(plan, x)[0]


def buckets(plan: Plan, *tokens: Tensor) -> list[Tensor]:
    """`bucket` of several tensors in the same directions; in small integers, which sort faster."""
    d, r, device = tokens[0].shape[-1], plan.lsh_num_projs, tokens[0].device
    numbers = plan.draws[0] if plan.draws else uniform(2 * d * r, plan.seed, -1, device)
    u, angle = numbers.reshape(2, d, r)
    directions = ((-2 * u.log()).sqrt() * (2 * math.pi * angle).cos()).float()  # normal, by Box and Muller
    places, small = torch.arange(r, device=device), torch.int16 if r < 16 else torch.int32
    signs = ((x.detach().to(wide(x)) @ directions.to(wide(x))) > 0 for x in tokens)
    return [gray_rank((y.long() << places).sum(-1), r).to(small) for y in signs]


def gray_rank(code: Tensor, bits: int) -> Tensor:
    """Place of a code in Gray order, the inverse of ``x ^ (x >> 1)``: neighbours differ in one bit."""
    shift = 1
    while shift < bits:
        code, shift = code ^ (code >> shift), 2 * shift
    return code


def uniform(count: int, seed: int, part: int, device: torch.device) -> Tensor:
    """Numbers in (0, 1) ``[count]``, float64, that depend on seed and part alone: a hash of their index."""
    return uniforms((count,), seed, (part,), device)[0]


def uniforms(counts: Sequence[int], seed: int, parts: Sequence[int], device: torch.device) -> list[Tensor]:
    """`uniform` of several parts, hashed together: on a GPU the launches are what it costs."""
    mask = 0xFFFFFFFF
    starts = [_mixed(_mixed(seed & mask) + 0x9E3779B9 * (p + 2) & mask) for p in parts]
    index = torch.cat([torch.arange(n, device=device) for n in counts])
    start = torch.cat([torch.full((n,), s, device=device) for n, s in zip(counts, starts, strict=True)])
    x = _mixed((_mixed(index + start & mask) + start) & mask)
    return list(((x.to(torch.float64) + 0.5) / 2.0**32).split(list(counts)))


def _mixed(x):  # type: ignore[no-untyped-def]
    """A 32-bit integer hash, of Python numbers and int64 tensors alike (products stay below 2^63)."""
    for _ in range(2):
        x = ((x >> 16) ^ x) * 0x45D9F3B & 0xFFFFFFFF
    return (x >> 16) ^ x


def _plan(
    scale: float,
    causal: bool,
    block: int,
    sample: int,
    projections: int,
    least: int,
    always: int,
    match: str,
    seed: int,
) -> Plan:
    if causal and match == "rank":
        raise Refused("hyperattention: match='rank' lets a query's block depend on later queries; causal calls take "
                      "match='bucket' (or 'auto')")  # fmt: skip
    match = ("bucket" if causal else "rank") if match == "auto" else match
    return Plan(scale, block, sample, projections, least, always, match, seed)


def _is_exact(n: int, m: int, causal: bool, plan: Plan) -> bool:
    return n < plan.min_seq_len or (causal and n == m == plan.min_seq_len)


# -- rows with padding ----------------------------------------------------------------------------------------------


def _real(q: Tensor, k: Tensor, causal: bool, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """Indices of the real keys and of the queries of one row; queries count as padding where they are the keys' tokens."""
    n, m = q.shape[2], k.shape[2]
    keys = torch.arange(m, device=q.device) if real is None else real.nonzero().squeeze(-1)
    asks = torch.arange(n, device=q.device)
    if real is not None and (causal or n == m):
        asks = real[m - n :].nonzero().squeeze(-1)
    return keys, asks


def _rows(q: Tensor, k: Tensor, v: Tensor, causal: bool, padding: Tensor, run) -> Tensor:  # type: ignore[no-untyped-def]
    """Each row without its padding, 0 at padded queries."""
    outs = []
    for row in range(q.shape[0]):
        keys, asks = _real(q, k, causal, padding[row])
        out = q.new_zeros(*q.shape[1:3], v.shape[-1])
        if keys.numel() and asks.numel():
            one = slice(row, row + 1)
            out = out.index_copy(1, asks, run(q[one][:, :, asks], k[one][:, :, keys], v[one][:, :, keys])[0])
        outs.append(out)
    return torch.stack(outs)


# -- the definition -------------------------------------------------------------------------------------------------


def _dense(q: Tensor, k: Tensor, v: Tensor, causal: bool, plan: Plan) -> Tensor:
    w = weights(q, k, causal=causal, plan=plan).to(q.dtype)
    k, v = per_head(q, k, v)
    logits = (plan.scale * (q @ k.mT)).masked_fill(w == 0, torch.finfo(q.dtype).min)
    shares = w * (logits - logits.detach().amax(-1, keepdim=True)).exp()
    return shares / shares.sum(-1, keepdim=True) @ v


def _causal_weights(q: Tensor, k: Tensor, plan: Plan, starts: bool) -> Tensor:
    n = q.shape[2]
    w = q.new_ones(q.shape[0], q.shape[1], n, n, dtype=wide(q)).tril()
    if n <= plan.min_seq_len:
        return w
    half = (n + 1) // 2
    deeper = replace(plan, part=plan.part + 1)
    w[..., :half, :half] = _causal_weights(q[:, :, :half], k[:, :, :half], deeper, starts)
    w[..., half:, half:] = _causal_weights(_even(q[:, :, half:], half), _even(k[:, :, half:], half), deeper, False)[
        ..., : n - half, : n - half
    ]
    w[..., half:, :half] = _part_weights(_even(q[:, :, half:], half), k[:, :, :half], plan, starts)[..., : n - half, :]
    return w


def _even(x: Tensor, n: int) -> Tensor:
    """``[B, H, n, D]``: with a row of zeros at the end where one is missing."""
    return F.pad(x, (0, 0, 0, n - x.shape[2]))


def _part_weights(q: Tensor, k: Tensor, plan: Plan, starts: bool) -> Tensor:
    n, m = q.shape[2], k.shape[2]
    if n < plan.min_seq_len:
        return q.new_ones(q.shape[0], q.shape[1], n, m, dtype=wide(q))
    asks, hashed = buckets(plan, q, k)
    order = hashed.argsort(dim=-1, stable=True)
    rank = _ranks(order)
    own = _query_blocks(asks, hashed.gather(-1, order), plan)
    (rank,) = per_head(q, rank)
    drawn = (rank.unsqueeze(-1) == _places(m, plan, q.device)).sum(-1).to(wide(q)) * (m / plan.sample_size)
    w = torch.where(own.unsqueeze(-1) == (rank // plan.block_size).unsqueeze(-2), 1.0, drawn.unsqueeze(-2))
    if starts:
        w[..., : plan.always_keys] = 1.0
    return w


def _places(m: int, plan: Plan, device: torch.device) -> Tensor:
    """The places ``[sample_size]`` drawn in the sorted order of M keys."""
    numbers = plan.draws[plan.part + 2] if plan.draws else uniform(plan.sample_size, plan.seed, plan.part, device)
    return (numbers * m).long().clamp(max=m - 1)


def _drawn(plan: Plan, n: int, q: Tensor) -> Plan:
    """The plan with all numbers that a call of N queries draws."""
    parts = [-1, 0]
    while n > plan.min_seq_len:
        n, parts = (n + 1) // 2, [*parts, len(parts) - 1]
    counts = [2 * q.shape[-1] * plan.lsh_num_projs, *(plan.sample_size for _ in parts)]
    return replace(plan, draws=tuple(uniforms(counts, plan.seed, [-1, *parts], q.device)))


def _query_blocks(asks: Tensor, keys: Tensor, plan: Plan) -> Tensor:
    """Block ``[B, H, N]`` of each query, from the queries' buckets ``[B, H, N]`` and the keys' sorted ones ``[B, G, M]``."""
    n, m = asks.shape[-1], keys.shape[-1]
    if plan.match == "rank":
        return _ranks(asks.argsort(dim=-1, stable=True)) * -(-m // plan.block_size) // n
    asks, keys = asks.contiguous(), per_head(asks, keys)[0].contiguous()
    low, high = torch.searchsorted(keys, asks), torch.searchsorted(keys, asks, right=True)
    share = (
        (2 * torch.arange(n, device=asks.device) + 1) * (high - low) // (2 * n)
    )  # later queries: later keys of the bucket
    return (low + share).clamp(max=m - 1) // plan.block_size


def _ranks(order: Tensor) -> Tensor:
    """The inverse of permutations ``[B, H, N]``."""
    return torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )


def _listed(q: Tensor, k: Tensor, causal: bool, plan: Plan) -> list[list[tuple[int, float]]]:
    """The keys of every query with their weights, for one row and head ``[N, D]``, ``[M, D]``."""
    n, m = len(q), len(k)
    if _is_exact(n, m, causal, plan):
        return [[(j, 1.0) for j in range(m - n + i + 1 if causal else m)] for i in range(n)]
    if not causal:
        return _listed_part(q, k, plan, True)
    last = _listed_causal(q, k[m - n :], plan, m == n)
    earlier = _listed_part(q, k[: m - n], replace(plan, part=-1), True) if m > n else [[] for _ in range(n)]
    return [a + [(j + m - n, w) for j, w in b] for a, b in zip(earlier, last, strict=True)]


def _listed_causal(q: Tensor, k: Tensor, plan: Plan, starts: bool) -> list[list[tuple[int, float]]]:
    n = len(q)
    if n <= plan.min_seq_len:
        return [[(j, 1.0) for j in range(i + 1)] for i in range(n)]
    if n % 2:
        q, k = (torch.cat([x, torch.zeros_like(x[:1])]) for x in (q, k))
    half, deeper = len(q) // 2, replace(plan, part=plan.part + 1)
    out = _listed_causal(q[:half], k[:half], deeper, starts)
    across = _listed_part(q[half:], k[:half], plan, starts)
    inside = _listed_causal(q[half:], k[half:], deeper, False)
    return (out + [a + [(half + j, w) for j, w in b] for a, b in zip(across, inside, strict=True)])[:n]


def _listed_part(q: Tensor, k: Tensor, plan: Plan, starts: bool) -> list[list[tuple[int, float]]]:
    n, m, size = len(q), len(k), plan.block_size
    if n < plan.min_seq_len:
        return [[(j, 1.0) for j in range(m)] for _ in range(n)]
    asks, hashed = (bucket(x[None, None], plan)[0, 0].tolist() for x in (q, k))
    order = sorted(range(m), key=lambda j: hashed[j])
    drawn = _places(m, plan, q.device).tolist()
    ranked = sorted(range(n), key=lambda i: asks[i])
    out = []
    for i in range(n):
        if plan.match == "rank":
            own = ranked.index(i) * math.ceil(m / size) // n
        else:
            low = sum(h < asks[i] for h in hashed)
            own = min(low + (2 * i + 1) * hashed.count(asks[i]) // (2 * n), m - 1) // size
        first = range(min(plan.always_keys, m)) if starts else range(0)
        block = [j for j in order[own * size : (own + 1) * size] if j not in first]
        rest = [order[p] for p in drawn if p // size != own and order[p] not in first]
        out.append([(j, 1.0) for j in [*first, *block]] + [(j, m / plan.sample_size) for j in rest])
    return out


# -- the fast form --------------------------------------------------------------------------------------------------


def _whole(q: Tensor, k: Tensor, v: Tensor, causal: bool, plan: Plan) -> Tensor:
    n, m = q.shape[2], k.shape[2]
    if _is_exact(n, m, causal, plan):
        return sdpa(q, k, v, causal=causal, scale=plan.scale)
    starts = torch.ones(q.shape[0], dtype=torch.bool, device=q.device)
    plan = _drawn(plan, n, q)
    asks, hashed = buckets(plan, q, k)  # of all tokens at once: they do not depend on the part
    if not causal:
        return _part(q, k, v, asks, hashed, plan, starts)[0]
    new_k, new_v, new = k[:, :, m - n :], v[:, :, m - n :], hashed[..., m - n :]
    out, lse = _causal(q, new_k, new_v, asks, new, plan, starts if m == n else ~starts)
    if m > n:
        k, v, hashed = k[:, :, : m - n], v[:, :, : m - n], hashed[..., : m - n]
        earlier = _part(q, k, v, asks, hashed, replace(plan, part=-1), starts)
        out, lse = merge(earlier, (out, lse))
    return out


def _causal(
    q: Tensor, k: Tensor, v: Tensor, asks: Tensor, hashed: Tensor, plan: Plan, starts: Tensor
) -> tuple[Tensor, Tensor]:
    """Out ``[B, H, N, E]`` and lse ``[B, H, N]``; both halves of all rows at once. Buckets as in `sorted_part`."""
    n = q.shape[2]
    if n <= plan.min_seq_len:
        return attend_lse(q, k, v, scale=plan.scale, causal=True)
    if n % 2:
        q, k, v = (_even(x, n + 1) for x in (q, k, v))
        asks, hashed = (F.pad(x, (0, 1)) for x in (asks, hashed))  # a row of zeros has no positive sign: bucket 0
    b, half = q.shape[0], q.shape[2] // 2
    every = (q, k, v, asks, hashed)
    apart = [x.unflatten(2, (2, half)).transpose(1, 2).flatten(0, 1) for x in every]  # [2 B, H, N / 2, .]
    first = torch.stack([starts, torch.zeros_like(starts)], 1).flatten()
    out, lse = _causal(apart[0], apart[1], apart[2], apart[3], apart[4], replace(plan, part=plan.part + 1), first)
    out, lse = out.unflatten(0, (b, 2)), lse.unflatten(0, (b, 2))
    late_q, late_asks = q[:, :, half:], asks[..., half:]
    across = _part(late_q, k[:, :, :half], v[:, :, :half], late_asks, hashed[..., :half], plan, starts)
    late, late_lse = merge((out[:, 1], lse[:, 1]), across)
    return torch.cat([out[:, 0], late], 2)[:, :, :n], torch.cat([lse[:, 0], late_lse], 2)[:, :, :n]


def _part(
    q: Tensor, k: Tensor, v: Tensor, asks: Tensor, hashed: Tensor, plan: Plan, starts: Tensor
) -> tuple[Tensor, Tensor]:
    """Queries over earlier keys: their block and the sample. starts ``[B]``: these keys begin the sequence."""
    if q.shape[2] < plan.min_seq_len:
        return attend_lse(q, k, v, scale=plan.scale)
    return sorted_part(q, k, v, asks, hashed, plan, starts)


def sorted_part(
    q: Tensor, k: Tensor, v: Tensor, asks: Tensor, hashed: Tensor, plan: Plan, starts: Tensor
) -> tuple[Tensor, Tensor]:
    """The blocks and the sample for any buckets of the queries ``[B, H, N]`` and of the keys ``[B, G, M]``."""
    (b, h, n, d), (m, size, e) = q.shape, (k.shape[2], plan.block_size, v.shape[-1])
    hashed, order = hashed.sort(dim=-1, stable=True)
    blocks = -(-m // size)
    own = _query_blocks(asks, hashed, plan)
    share = -(-n // blocks)  # queries of a block where they are even
    tile = share if plan.match == "rank" else min(TILE, max(16, -(-share // 2)))
    slots, tile_block = _tiles(own, blocks, tile, blocks if plan.match == "rank" else n // tile + blocks)
    asked = take_head_rows(q, slots.clamp(max=n - 1))  # [B, H, T, C, D]
    (order,) = per_head(q, order)
    outs, lses = [], []
    step = max(1, HELD // max(1, b * h * (size + plan.sample_size + plan.always_keys) * max(d, e)))
    for now, part in zip(tile_block.split(step, 2), asked.split(step, 2), strict=True):
        which, bias = _keys_of(now, order, plan, starts, wide(q))
        keys, values = (take_head_rows(x, which).flatten(0, 2).unsqueeze(1) for x in (k, v))  # [B H t, 1, b + m, .]
        out, lse = attend_lse(
            part.flatten(0, 2).unsqueeze(1), keys, values, scale=plan.scale, bias=bias.flatten(0, 2).unsqueeze(1)
        )
        outs.append(out.reshape(b, h, -1, e))
        lses.append(lse.reshape(b, h, -1))
    at = _inverse(slots, n)
    return take_head_rows(torch.cat(outs, 2), at), torch.cat(lses, 2).gather(2, at)


def _keys_of(block: Tensor, order: Tensor, plan: Plan, starts: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys that tiles read and what their logits get, ``[B, H, t, b + m + a]``; block ``[B, H, t]``, order ``[B, H, M]``."""
    (b, h, t), m, size = block.shape, order.shape[-1], plan.block_size
    place = block.unsqueeze(-1) * size + torch.arange(size, device=block.device)
    which = order.gather(2, place.clamp(max=m - 1).flatten(2)).unflatten(2, (t, size))
    bias = torch.zeros_like(which, dtype=dtype).masked_fill(place >= m, -torch.inf)
    drawn = _places(m, plan, block.device)
    chance = bias.new_full((b, h, t, plan.sample_size), math.log(m / plan.sample_size))
    chance = chance.masked_fill(drawn // size == block.unsqueeze(-1), -torch.inf)
    which = torch.cat([which, order[:, :, drawn].unsqueeze(2).expand(-1, -1, t, -1)], -1)
    bias = torch.cat([bias, chance], -1)
    always = min(plan.always_keys, m)
    if not always:
        return which, bias
    first = starts[:, None, None, None]
    bias = bias.masked_fill((which < always) & first, -torch.inf)  # these are read on their own
    front = torch.arange(always, device=block.device).expand(b, h, t, always)
    alone = bias.new_zeros(b, h, t, always).masked_fill(~first, -torch.inf)
    return torch.cat([which, front], -1), torch.cat([bias, alone], -1)


def _tiles(own: Tensor, blocks: int, tile: int, count: int) -> tuple[Tensor, Tensor]:
    """Queries of one block, `tile` at a time: which ``[B, H, T, tile]`` (N where there is none), and each tile's block.

    count: T, enough for all blocks: where they are even, one tile each, else N // tile more.
    """
    n = own.shape[-1]
    grouped, order = own.to(torch.int16 if blocks < 1 << 15 else torch.int32).sort(dim=-1, stable=True)
    every = torch.arange(blocks, dtype=grouped.dtype, device=own.device).expand(*own.shape[:2], blocks).contiguous()
    begin, end = torch.searchsorted(grouped, every), torch.searchsorted(grouped, every, right=True)
    last = (-(-(end - begin) // tile)).cumsum(-1)  # tiles up to each block
    number = torch.arange(count, device=own.device).expand(*own.shape[:2], count).contiguous()
    block = torch.searchsorted(last, number, right=True).clamp(max=blocks - 1)
    within = number - F.pad(last, (1, 0))[..., :-1].gather(-1, block)
    first = begin.gather(-1, block) + within * tile
    place = first.unsqueeze(-1) + torch.arange(tile, device=own.device)
    there = (place < end.gather(-1, block).unsqueeze(-1)) & (number < last[..., -1:]).unsqueeze(-1)
    slots = order.gather(-1, place.clamp(max=n - 1).flatten(2)).unflatten(-1, (count, tile))
    return slots.masked_fill(~there, n), block


def _inverse(slots: Tensor, n: int) -> Tensor:
    """Where each query went, ``[B, H, N]``."""
    flat = slots.flatten(2)
    index = torch.arange(flat.shape[-1], device=slots.device).expand_as(flat)
    return flat.new_zeros(*flat.shape[:2], n + 1).scatter(-1, flat, index)[..., :n]


@final
@dataclass(frozen=True, kw_only=True)
class HyperAttention(Operator):
    """Attention inside blocks that hash alike, and a sample of the rest."""

    spec: ClassVar[OperatorSpec] = OperatorSpec(
        id="hyperattention",
        title="HyperAttention",
        paper="arXiv:2310.05869",
        source="code",
        summary="Queries and keys sorted by a locality-sensitive hash attend exactly within blocks, the rest of each row is "
        "estimated from sampled keys; causal by halving.",
        shown="Perplexity grows smoothly with the number of layers that use it, and the hash has a lower error than a random "
        "order on real queries and keys.",
        honest="An estimate: rare large scores outside a query's block are missed or overweighted, so attention sinks and "
        "retrieval suffer, and all layers at once hurt a model.",
        limits=(
            Limit("full", {"min_seq_len": 1 << 20}, "every input is shorter than the least length"),
            Limit("full", {"min_seq_len": 1 << 20, "match": "bucket"}, "the same, matched by bucket"),
        ),
        trials=(
            {},
            {"min_seq_len": 3, "block_size": 4, "sample_size": 3, "lsh_num_projs": 3},
            {
                "min_seq_len": 2,
                "block_size": 2,
                "sample_size": 5,
                "lsh_num_projs": 2,
                "always_keys": 2,
                "match": "bucket",
            },
        ),
        causal="both",
        reference=reference,
        fast=fast,
        loop=loop,
        wiring=Wiring(rotary=True),
    )
    block_size: int = param(256, "keys of a block", low=1)
    sample_size: int = param(256, "keys sampled, with replacement, to stand for those outside the block", low=1)
    lsh_num_projs: int = param(7, "directions of the hash; 2 to this power buckets", low=1, high=30)
    min_seq_len: int = param(4096, "fewer queries are exact; causal parts are halved down to this length", low=1)
    always_keys: int = param(0, "first keys of the sequence that are always read, exactly (4 against sinks)", low=0)
    match: Literal["auto", "rank", "bucket"] = param(
        "auto", "how a query finds its block: by its rank among the queries (never causal), or where its bucket lies"
    )
    seed: int = param(0, "of directions and samples", low=0)
