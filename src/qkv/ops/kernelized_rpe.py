r"""Kernelised attention with relative positions: random features times a Toeplitz matrix of learned biases, by FFT.

    x <- x / |x| for queries and keys,     E[phi(q) . phi(k)] = exp(scale q . k),  scale = 1
    out_i = phi(q_i) . sum_j c_{j - i} phi(k_j) v_j^T / (phi(q_i) . sum_j c_{j - i} phi(k_j)),     c_d = exp(b_d)

``features="prf"``: phi(x) = exp(w . x - |x|^2 / 2) / sqrt m, positive; ``"trig"``: e^(|x|^2 / 2) [cos w . x, sin w . x] / sqrt m.
The m rows w of `projection` are drawn once (`orthogonal_features`) and not trained. `bias` holds b for the distances j - i from
1 - T to T - 1 (on a `grid` (h, w): for (dy, dx), (2 h - 1)(2 w - 1) numbers, `offsets` of qkv.ops._common.grids), else b = 0.
Unit queries and keys bound the features' variance, which makes training from scratch stable; it grows as e^(|q|^2) otherwise.

Bidirectional: one FFT product of the outer products phi(k) v^T over all distances, `columns` of v at a time. Causal: by halves,
what a later half reads from an earlier one is one FFT product, so that not even rounding leaks backwards. ``method="windowed"``:
biases are constant beyond R tokens (R = `max_distance`, else the table's reach; 1 without a bias), so all tokens further away
are prefix sums.

State (causal, on a line; exact because biases are constant beyond R): `kv` ``[B, G, F, E]`` and `keys` ``[B, G, F]`` of tokens
older than R, `phi` ``[B, G, R, F]`` and `values` ``[B, G, R, E]`` of the R newest, oldest first. Positions count real tokens.

No setting makes it another operator of this library.

Axes: B batch, H query heads, G key/value heads, N tokens, C chunk, m random features, F = m or 2 m, D key width, E value width.
Luo et al. 2021, Stable, Fast and Accurate: Kernelized Attention with Relative Positional Encoding, arXiv:2106.12566.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.core.errors import InvalidInput, InvalidParameter, Refused
from qkv.core.operator import Operator, OperatorSpec, Wiring
from qkv.core.spec import Extra, Learnt, Place, param
from qkv.core.state import State
from qkv.ops._common.decayed import decayed_linear_attention
from qkv.ops._common.grids import check_grid, offsets
from qkv.ops._common.states import after, per_head, wide
from qkv.ops._common.toeplitz import lagged, toeplitz

Features = Literal["prf", "trig"]
Beyond = Literal["refuse", "last"]
Grid = tuple[int, ...] | None
SEQUENCE = 256  # reach of a layer's table on a sequence


class Rows(NamedTuple):
    """What the forms share: features and values, real tokens first, for every query head, float32 or wider.

    q ``[B, H, N, F]``, k ``[B, G, N, F]`` (0 at padding), v ``[B, G, N, E]``; weights c ``[H | 1, 2 R + 1]`` by distance + R, or
    of a grid by `offsets`; order: the gather that put real tokens first, None without padding; real: how many, ``[B]``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    weights: Tensor
    reach: int
    order: Tensor | None
    real: Tensor | None


def reference(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, projection: Tensor, bias: Tensor | None = None, causal: bool = True,
    padding: Tensor | None = None, initial_state: State | None = None, return_state: bool = False,
    features: Features = "prf", normalize_qk: bool = True, max_distance: int | None = None, beyond: Beyond = "refuse",
    grid: Grid = None, floor: float = 1e-6,
) -> Any:  # fmt: skip
    """The whole map ``[B, H, N, N]``.

    q ``[B, H, N, D]``, k ``[B, G, N, D]``, v ``[B, G, N, E]``; projection ``[m, D]`` or ``[G, m, D]``; bias ``[H, 2 T - 1]``.
    Returns ``[B, H, N, E]``, or that and the state.
    """
    r, s, n = _rows(
        q,
        k,
        v,
        projection,
        bias,
        padding,
        causal,
        initial_state,
        scale,
        features,
        normalize_qk,
        max_distance,
        beyond,
        grid,
    )
    keys, values = r.k, r.v
    if grid is None:
        keys, values = torch.cat([s["phi"], keys], 2), torch.cat([s["values"], values], 2)
    keys, values = per_head(q, keys, values)
    if grid is not None:
        weights = r.weights[:, offsets(grid, q.device)]
    else:
        t = torch.arange(keys.shape[2], device=q.device)
        distance = t[None, :] - t[keys.shape[2] - n :, None]  # [N, R + N]
        weights = r.weights[:, distance.clamp(-r.reach, r.reach) + r.reach]
        weights = weights * (distance <= 0) if causal else weights
    scores = (r.q @ keys.mT) * weights
    older, sums = per_head(q, s["kv"], s["keys"])
    furthest = r.weights[:, :1, None]
    total = scores.sum(-1, keepdim=True) + furthest * (r.q @ sums.unsqueeze(-1))
    out = _done(scores @ values + furthest * (r.q @ older), total, r, floor, q)
    return (out, _after(r, s, initial_state, n)) if return_state else out


def loop(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, projection: Tensor, bias: Tensor | None = None, causal: bool = True,
    padding: Tensor | None = None, initial_state: State | None = None, return_state: bool = False,
    features: Features = "prf", normalize_qk: bool = True, max_distance: int | None = None, beyond: Beyond = "refuse",
    grid: Grid = None, floor: float = 1e-6,
) -> Any:  # fmt: skip
    """One row after the other, weight by weight; causal, the state moves on token by token. Shapes as in `reference`."""
    (b, h, n, _), e, repeat = q.shape, v.shape[-1], q.shape[1] // k.shape[1]
    most = 0 if bias is None else bias.shape[1] // 2
    reach = _reach(bias, max_distance)

    def phi(x: Tensor, g: int) -> Tensor:
        w = projection if projection.ndim == 2 else projection[g]
        x = scale**0.5 * (x / x.norm(dim=-1, keepdim=True).clamp(min=1e-6) if normalize_qk else x)
        y = torch.stack([(x * row).sum(-1) for row in w], -1)
        half = x.square().sum(-1, keepdim=True) / 2
        made = (y - half).exp() if features == "prf" else half.exp() * torch.cat([y.cos(), y.sin()], -1)
        return made / w.shape[0] ** 0.5

    def weight(i: int, distance: int, at: int = 0) -> Any:
        if bias is None:
            return 1.0
        if grid is not None:
            (y, x), (to_y, to_x) = divmod(at, grid[1]), divmod(at + distance, grid[1])
            place = (to_y - y + grid[0] - 1) * (2 * grid[1] - 1) + to_x - x + grid[1] - 1
            return (bias[i, place] - bias[i].max()).exp()
        row = bias[i, most - reach : most + 1 if causal else most + reach + 1]
        return (bias[i, max(-reach, min(reach, distance)) + most] - row.max()).exp()

    out = torch.zeros(b, h, n, e, dtype=q.dtype, device=q.device)
    s = _memory(q, k, v, projection, bias, features, max_distance, initial_state, grid)
    ends = {name: x.clone() for name, x in s.items()}
    for row in range(b):
        tokens = range(n) if padding is None else padding[row].nonzero().squeeze(-1).tolist()
        for g in range(k.shape[1]):
            keys, values = [phi(k[row, g, t], g) for t in tokens], [v[row, g, t] for t in tokens]
            held = 0 if grid is not None else reach
            keys, values = [*s["phi"][row, g, :held], *keys], [*s["values"][row, g, :held], *values]
            for i in range(g * repeat, (g + 1) * repeat):
                for at, t in enumerate(tokens, start=held):
                    read = phi(q[row, i, t], g)
                    top, total = torch.zeros_like(v[row, g, t]), torch.zeros_like(read[0])
                    if grid is None:
                        top = weight(i, -reach) * (read @ s["kv"][row, g])
                        total = weight(i, -reach) * (read * s["keys"][row, g]).sum()
                    for j in range(at + 1 if causal else len(keys)):
                        share = weight(i, j - at, at) * (read * keys[j]).sum()
                        top, total = top + share * values[j], total + share
                    out[row, i, t] = top / total.clamp(min=floor)
            for key, value in list(zip(keys, values, strict=True))[: len(keys) - reach]:
                ends["kv"][row, g] += key[:, None] * value
                ends["keys"][row, g] += key
            if grid is None:
                ends["phi"][row, g], ends["values"][row, g] = torch.stack(keys[-reach:]), torch.stack(values[-reach:])
    return (out, after("kernelized-rpe", initial_state, n, **ends)) if return_state else out


def fast(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, projection: Tensor, bias: Tensor | None = None, causal: bool = True,
    padding: Tensor | None = None, initial_state: State | None = None, return_state: bool = False,
    features: Features = "prf", normalize_qk: bool = True, max_distance: int | None = None, beyond: Beyond = "refuse",
    grid: Grid = None, floor: float = 1e-6, method: Literal["fft", "windowed"] = "fft", chunk_size: int = 64,
    columns: int = 16,
) -> Any:  # fmt: skip
    """FFT products, or windows and prefix sums; chunks of weights inside. Shapes as in `reference`."""
    r, s, n = _rows(
        q,
        k,
        v,
        projection,
        bias,
        padding,
        causal,
        initial_state,
        scale,
        features,
        normalize_qk,
        max_distance,
        beyond,
        grid,
    )
    keys, values = r.k, r.v
    if initial_state is not None:
        keys, values = torch.cat([s["phi"], keys], 2), torch.cat([s["values"], values], 2)
    keys, values = per_head(q, keys, F.pad(values, (0, 1), value=1.0))  # the last column sums the weights
    queries = F.pad(r.q, (0, 0, keys.shape[2] - n, 0))
    if bias is None:
        sums = _without_bias(queries, keys, values, causal, chunk_size)
    elif grid is not None:
        sums = _by_fft(queries, keys, values, r.weights, grid, chunk_size, columns)
    elif method == "windowed":
        sums = _windowed(queries, keys, values, r.weights, r.reach, causal, chunk_size)
    elif causal:
        sums = _by_halves(queries, keys, values, r.weights, r.reach, chunk_size, columns)
    else:
        sums = _by_fft(queries, keys, values, _spread(r.weights, r.reach, n), (n,), chunk_size, columns)
    sums = sums[:, :, keys.shape[2] - n :]
    if initial_state is not None:
        older = per_head(q, torch.cat([s["kv"], s["keys"].unsqueeze(-1)], -1))[0]
        sums = sums + r.weights[:, :1, None] * (r.q @ older)
    out = _done(sums[..., :-1], sums[..., -1:], r, floor, q)
    return (out, _after(r, s, initial_state, n)) if return_state else out


def initial(
    q: Tensor, k: Tensor, v: Tensor, *, projection: Tensor, bias: Tensor | None = None, features: Features = "prf",
    max_distance: int | None = None,
) -> State:  # fmt: skip
    """The empty state: zeros in float32 (float64 for float64 inputs)."""
    return after("kernelized-rpe", None, 0, **_memory(q, k, v, projection, bias, features, max_distance, None))


def step(
    q: Tensor, k: Tensor, v: Tensor, state: State, *, scale: float, projection: Tensor, bias: Tensor | None = None,
    padding: Tensor | None = None, features: Features = "prf", normalize_qk: bool = True, max_distance: int | None = None,
    beyond: Beyond = "refuse", grid: Grid = None, floor: float = 1e-6,
) -> tuple[Tensor, State]:  # fmt: skip
    """One token, R + 1 weights: q ``[B, H, 1, D]``, k ``[B, G, 1, D]``, v ``[B, G, 1, E]`` -> out ``[B, H, 1, E]``, new state."""
    r, s, _ = _rows(
        q, k, v, projection, bias, padding, True, state, scale, features, normalize_qk, max_distance, beyond, grid
    )
    keys, values = torch.cat([s["phi"], r.k], 2), torch.cat([s["values"], r.v], 2)
    every, row, older, total = per_head(q, keys, values, s["kv"], s["keys"])
    scores = (r.q @ every.mT) * r.weights[:, None, : r.reach + 1]
    furthest = r.weights[:, :1, None]
    total = scores.sum(-1, keepdim=True) + furthest * (r.q @ total.unsqueeze(-1))
    out = _done(scores @ row + furthest * (r.q @ older), total, r, floor, q)
    return out, _after(r, s, state, 1)


def orthogonal_features(rows: int, width: int, generator: torch.Generator | None = None) -> Tensor:
    """`projection` ``[m, D]`` in float64: normal rows, orthogonal within each block of D, of the lengths of normal vectors."""
    blocks = []
    for start in range(0, rows, width):
        square = torch.randn(width, width, generator=generator, dtype=torch.float64)
        turn, upper = torch.linalg.qr(square)
        turn = turn * upper.diagonal().sign()  # uniform over rotations: the factorisation has signs of its own
        lengths = torch.randn(width, width, generator=generator, dtype=torch.float64).norm(dim=1, keepdim=True)
        blocks.append((lengths * turn)[: min(width, rows - start)])
    return torch.cat(blocks)


def random_features(x: Tensor, projection: Tensor, scale: float, features: Features, normalize: bool) -> Tensor:
    """Features phi ``[B, H, N, F]`` of queries or keys ``[B, H, N, D]``; projection ``[m, D]`` or ``[H, m, D]``."""
    if normalize:
        x = x * x.square().sum(-1, keepdim=True).clamp(min=1e-12).rsqrt()
    x, half = scale**0.5 * x, scale * x.square().sum(-1, keepdim=True) / 2
    y, m = x @ projection.to(x.dtype).mT, projection.shape[-2]
    if features == "trig":
        return half.exp() * torch.cat([y.cos(), y.sin()], -1) * m**-0.5
    return (y - half).exp() * m**-0.5


def _rows(
    q: Tensor, k: Tensor, v: Tensor, projection: Tensor, bias: Tensor | None, padding: Tensor | None, causal: bool,
    state: State | None, scale: float, features: Features, normalize: bool, max_distance: int | None, beyond: Beyond,
    grid: Grid,
) -> tuple[Rows, dict[str, Tensor], int]:  # fmt: skip
    """See `Rows`; with the state's tensors (empty ones without a state) and N."""
    n, seen = q.shape[2], 0 if state is None else state.seen
    if scale < 0:
        raise InvalidInput(
            f"kernelized-rpe: scale={scale} must not be negative: queries and keys are multiplied by its root"
        )
    if grid is not None:
        _check_grid(n, bias, grid, causal)
    elif bias is not None:
        _check_table(n + seen, bias, max_distance, beyond)
    each = projection if projection.ndim == 2 else per_head(q, projection[None])[0][0]
    a = random_features(q.to(wide(q)), each, scale, features, normalize)
    b = random_features(k.to(wide(k)), projection, scale, features, normalize)
    v, order, real = v.to(wide(v)), None, None
    if padding is not None:
        b = b.masked_fill(~padding[:, None, :, None], 0.0)
        if grid is None:
            real, order = padding.sum(1), (~padding).to(torch.uint8).argsort(dim=1, stable=True)
            a, b, v = (x.gather(2, order[:, None, :, None].expand_as(x)) for x in (a, b, v))
    weights, reach = _weights(q, bias, max_distance, causal, grid)
    held = _memory(q, k, v, projection, bias, features, max_distance, state, grid)
    return Rows(a, b, v, weights, reach, order, real), held, n


def _check_grid(n: int, bias: Tensor | None, grid: tuple[int, ...], causal: bool) -> None:
    if causal:
        raise Refused("kernelized-rpe: tokens on a grid have no order; leave `grid` out, or call it with causal=False")
    h, w = check_grid(n, grid, "kernelized-rpe")
    if bias is not None and bias.shape[1] != (2 * h - 1) * (2 * w - 1):
        raise InvalidInput(f"kernelized-rpe: a grid of {(h, w)} needs a bias of (2 h - 1)(2 w - 1) = "
                           f"{(2 * h - 1) * (2 * w - 1)} numbers per head, got {bias.shape[1]}")  # fmt: skip


def _check_table(tokens: int, bias: Tensor, max_distance: int | None, beyond: Beyond) -> None:
    length = bias.shape[1]
    if length % 2 == 0 or length < 3:
        raise InvalidInput(f"kernelized-rpe: bias has {length} distances per head; expected 2 T - 1 with T > 1")
    if max_distance is None and beyond == "refuse" and tokens > (length + 1) // 2:
        raise InvalidInput(f"kernelized-rpe: {tokens} tokens are more than the {(length + 1) // 2} that a bias of {length} "
                           "distances reaches; give a larger table, beyond='last' or max_distance")  # fmt: skip


def _weights(q: Tensor, bias: Tensor | None, max_distance: int | None, causal: bool, grid: Grid) -> tuple[Tensor, int]:
    """exp(b - max b) per head by distance from -R to R, and R; causal: the maximum of the past."""
    if bias is None:
        count = 3 if grid is None else (2 * grid[0] - 1) * (2 * grid[1] - 1)
        return q.new_ones(1, count, dtype=wide(q)), 1
    bias = bias.to(wide(q))
    if grid is not None:
        return (bias - bias.amax(1, keepdim=True)).exp(), 0
    most, reach = bias.shape[1] // 2, _reach(bias, max_distance)
    bias = bias[:, most - reach : most + reach + 1]
    return (bias - bias[:, : reach + 1 if causal else None].amax(1, keepdim=True)).clamp(max=0.0).exp(), reach


def _reach(bias: Tensor | None, max_distance: int | None) -> int:
    """R: distances beyond it have the same weight; at least 1, so that a state holds a token."""
    most = 1 if bias is None else bias.shape[1] // 2
    return most if max_distance is None else min(most, max_distance)


def _spread(weights: Tensor, reach: int, n: int) -> Tensor:
    """Weights for the distances from 1 - n to n - 1, constant beyond R."""
    return weights[:, torch.arange(1 - n, n, device=weights.device).clamp(-reach, reach) + reach]


def _dense(q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> Tensor:
    return ((q @ k.mT) * weights) @ v


def _columns(k: Tensor, v: Tensor, size: int) -> list[Tensor]:
    """Outer products phi(k) v^T ``[B, H, F, s, N]``, s columns of v at a time, tokens last."""
    return [k.mT.unsqueeze(3) * x.mT.unsqueeze(2) for x in v.split(size, -1)]


def _by_fft(q: Tensor, k: Tensor, v: Tensor, table: Tensor, grid: tuple[int, ...], chunk: int, columns: int) -> Tensor:
    """Every distance at once; short ones as a whole map."""
    if q.shape[2] <= chunk:
        return _dense(q, k, v, table[:, offsets(grid, q.device)])
    sums = [toeplitz(table, x.flatten(2, 3), grid).unflatten(2, x.shape[2:4]) for x in _columns(k, v, columns)]
    return torch.cat([(q.mT.unsqueeze(3) * y).sum(2) for y in sums], 2).mT


def _by_halves(q: Tensor, k: Tensor, v: Tensor, weights: Tensor, reach: int, chunk: int, columns: int) -> Tensor:
    """Causal: maps inside chunks, then blocks of 1, 2, 4 ... chunks, of which each second one reads the one before it."""
    n, size = q.shape[2], min(chunk, q.shape[2])
    chunks = -(-n // size)
    whole = size << (chunks - 1).bit_length()
    q, k, v = (F.pad(x, (0, 0, 0, whole - n)) for x in (q, k, v))
    past = _spread(weights, reach, 2 * whole).flip(1)[:, 2 * whole - 1 :]  # by lag, from 0
    t = torch.arange(size, device=q.device)
    near = past[:, (t[:, None] - t).clamp(min=0)].tril()
    own_q, own_k, own_v = (x.unflatten(2, (-1, size)) for x in (q, k, v))
    out = _dense(own_q, own_k, own_v, near.unsqueeze(1)).flatten(2, 3)
    outer = _columns(k, v, columns) if whole > size else []
    while size < whole:
        late = q.mT.unflatten(-1, (-1, 2, size))[..., 1, :].unsqueeze(3)  # [B, H, F, 1, blocks, size]
        early = [x.unflatten(-1, (-1, 2, size))[..., 0, :] for x in outer]
        sums = [lagged(past[:, : 2 * size], x.flatten(2, 3)).unflatten(2, x.shape[2:4]) for x in early]
        more = torch.cat([(late * y).sum(2) for y in sums], 2).unsqueeze(-2)  # [B, H, E + 1, blocks, 1, size]
        out = out + F.pad(more, (0, 0, 1, 0)).flatten(3).mT
        size *= 2
    return out[:, :, :n]


def _windowed(q: Tensor, k: Tensor, v: Tensor, weights: Tensor, reach: int, causal: bool, chunk: int) -> Tensor:
    """Maps of each chunk over its neighbours, and sums of all chunks beyond, where the weight is constant."""
    n, size = q.shape[2], min(max(chunk, reach), q.shape[2])
    q, k, v = (F.pad(x, (0, 0, 0, -x.shape[2] % size)).unflatten(2, (-1, size)) for x in (q, k, v))
    t = torch.arange(size, device=q.device)
    sums = k.mT @ v  # [B, H, chunks, F, E + 1]
    before = F.pad(sums.cumsum(2), (0, 0, 0, 0, 2, 0))[:, :, : q.shape[2]]  # up to two chunks ago
    out = weights[:, :1, None, None] * (q @ before)
    for shift in (-1, 0) if causal else (-1, 0, 1):
        distance = t[None, :] + shift * size - t[:, None]
        block = weights[:, distance.clamp(-reach, reach) + reach].unsqueeze(1)
        out = out + _dense(q, _shifted(k, shift), _shifted(v, shift), block * (distance <= 0) if causal else block)
    if not causal:
        total = sums.flip(2).cumsum(2).flip(2)
        out = out + weights[:, -1:, None, None] * (q @ F.pad(total, (0, 0, 0, 0, 0, 2))[:, :, 2:])
    return out.flatten(2, 3)[:, :, :n]


def _shifted(x: Tensor, shift: int) -> Tensor:
    """Chunk c + shift in the place of chunk c, zeros where there is none."""
    if shift == 0:
        return x
    return F.pad(x[:, :, :-1], (0, 0, 0, 0, 1, 0)) if shift < 0 else F.pad(x[:, :, 1:], (0, 0, 0, 0, 0, 1))


def _without_bias(q: Tensor, k: Tensor, v: Tensor, causal: bool, chunk: int) -> Tensor:
    if not causal:
        return q @ (k.mT @ v)
    return decayed_linear_attention(q, k, v, chunk_size=chunk, sub_chunk=chunk).out


def _done(top: Tensor, total: Tensor, r: Rows, floor: float, like: Tensor) -> Tensor:
    """The quotient with its floor, tokens back in their places."""
    out = (top / total.clamp(min=floor)).to(like.dtype)
    if r.order is None:
        return out
    back = r.order.argsort(1)
    return out.gather(2, back[:, None, :, None].expand_as(out))


def _after(r: Rows, s: dict[str, Tensor], before: State | None, tokens: int) -> State:
    """Prefix sums of what leaves the window, and the R newest tokens."""
    keys, values = torch.cat([s["phi"], r.k], 2), torch.cat([s["values"], r.v], 2)
    held = s["phi"].shape[2]
    count = torch.full((keys.shape[0],), tokens, device=keys.device) if r.real is None else r.real
    slot = torch.arange(keys.shape[2], device=keys.device)
    leaves = keys * (slot < count[:, None])[:, None, :, None]
    stay = (count[:, None] + torch.arange(held, device=keys.device))[:, None, :, None]
    phi, held_values = (x.gather(2, stay.expand(-1, x.shape[1], -1, x.shape[3])) for x in (keys, values))
    return after(
        "kernelized-rpe", before, tokens, kv=s["kv"] + leaves.mT @ values, keys=s["keys"] + leaves.sum(2), phi=phi,
        values=held_values,
    )  # fmt: skip


def _memory(
    q: Tensor, k: Tensor, v: Tensor, projection: Tensor, bias: Tensor | None, features: Features,
    max_distance: int | None, state: State | None, grid: Grid = None,
) -> dict[str, Tensor]:  # fmt: skip
    """The tensors of a state, empty without one."""
    b, g, e, f = k.shape[0], k.shape[1], v.shape[-1], projection.shape[-2] * (2 if features == "trig" else 1)
    reach = 1 if grid is not None else _reach(bias, max_distance)
    shapes = {"kv": (b, g, f, e), "keys": (b, g, f), "phi": (b, g, reach, f), "values": (b, g, reach, e)}
    if state is None:
        return {name: q.new_zeros(shape, dtype=wide(q)) for name, shape in shapes.items()}
    return state.of("kernelized-rpe", **shapes).tensors


def _projection(place: Place) -> Tensor:
    """2 D random features, the same for all heads of a layer."""
    rng = torch.Generator().manual_seed(place.layer)
    return orthogonal_features(2 * place.key_width, place.key_width, rng)


def _table(place: Place) -> Tensor:
    h, w = place.grid or (1, SEQUENCE)
    return torch.zeros(place.heads, (2 * h - 1) * (2 * w - 1))


def _settings(place: Place) -> dict[str, Any]:
    return {"beyond": "last"} if place.grid is None else {"grid": tuple(place.grid)}


@final
@dataclass(frozen=True, kw_only=True)
class KernelizedRPE(Operator):
    """Random-feature attention with a Toeplitz matrix of relative biases."""

    spec: ClassVar[OperatorSpec] = OperatorSpec(
        id="kernelized-rpe",
        title="Kernelised attention with relative positions (NPRF + RPE)",
        paper="arXiv:2106.12566",
        source="paper",
        summary="Attention by positive random features of unit queries and keys, with a learned bias for every relative distance "
        "that costs an FFT instead of a map.",
        shown="On images at equal size more accurate with relative biases than without; features of queries and keys that are "
        "not normalised train worse.",
        honest="Weights are estimates that need many features, never sharper than e^2 between two keys without a bias; the outer "
        "products of features and values cost memory, and biases 14 nats below a head's largest are lost in rounding.",
        trials=(
            {"beyond": "last"},
            {"beyond": "last", "chunk_size": 3, "columns": 3, "features": "trig", "floor": 0.5},
            {"max_distance": 3, "method": "windowed", "chunk_size": 2},
        ),
        causal="both",
        cross=False,
        scale=lambda d: 1.0,
        reference=reference,
        fast=fast,
        loop=loop,
        initial=initial,
        step=step,
        extras={
            "projection": Extra(
                axes="sd|gsd",
                sample=torch.randn,
                role="parameter",
                doc="the m directions of the random features, for all key heads or each",
                learnt=Learnt(axes="sd", start=_projection, trained=False),
            ),
            "bias": Extra(
                axes="hw",
                sample=torch.randn,
                role="parameter",
                required=False,
                doc="added to scores by distance j - i from 1 - T to T - 1, or by (dy, dx) on a grid",
                learnt=Learnt(axes="hw", start=_table),
            ),
        },
        wiring=Wiring(settings=_settings),
    )
    features: Literal["prf", "trig"] = param("prf", "random features: positive exponentials, or cosines and sines")
    normalize_qk: bool = param(True, "divide queries and keys by their lengths; without it variance grows as e^(|q|^2)")
    max_distance: int | None = param(None, "tokens beyond which the bias is constant; None: the table's reach", low=1)
    beyond: Literal["refuse", "last"] = param(
        "refuse", "sequences longer than the table: refused, or its last value goes on"
    )
    grid: tuple[int, ...] | None = param(None, "rows and columns of tokens on a grid; None: a line", low=1)
    floor: float = param(1e-6, "the smallest denominator, where the largest bias of a head weighs 1", low=1e-12)
    method: Literal["fft", "windowed"] = param(
        "fft", "how the fast form sums: FFT, or windows and prefix sums where biases are constant beyond few tokens"
    )
    chunk_size: int = param(64, "tokens whose map is written out", low=1)
    columns: int = param(16, "columns of the values whose outer products are held at a time", low=1)

    def validate(self) -> None:
        """A grid has two axes, no distance limit, and FFT products; cosines need normalised keys."""
        if self.grid is not None and (len(self.grid) != 2 or self.max_distance is not None or self.method != "fft"):
            raise InvalidParameter(
                f"kernelized-rpe: grid={self.grid} must be (h, w), without max_distance and by method='fft'"
            )
        if not self.normalize_qk:
            if self.features == "trig":
                raise InvalidParameter(
                    "kernelized-rpe: features='trig' of keys that are not normalised overflow; use 'prf'"
                )
            warnings.warn(
                "kernelized-rpe: without normalize_qk the variance of the features grows as e^(|q|^2)", stacklevel=4
            )
