r"""NaLaFormer: linear attention that keeps the norm of the query, as the exponent that sharpens its features.

    n = |q|,  p = a (b + tanh n)  (a = 3, b = 1/2: from 1.5 up to 4.5)
    phi(q) = [(relu(q) / n)^p, (relu(-q) / n)^p],     phi(k) = [relu(k)^3, relu(-k)^3]        (2 D features)
    o_i = R phi(q_i) . sum_j R phi(k_j) v_j^T / (phi(q_i) . sum_j phi(k_j) + M eps)

R turns both D-wide parts by the token's angles (two-dimensional rotary: `grid_angles` of qkv.ops._common.grids) in the numerator
alone: turned rows need not sum to 1 and may be negative. Without angles R is the identity. The sign split lets channels of equal
sign meet, and no others. ``feature="cosine"`` is the map of the paper's abstract in a form of our own: for queries and keys
|x| [cos t, sin t], t = (pi / 4) x / |x|, whose products cos(t_q - t_k) are never negative; there the norm of the query cancels.
Causal (ours): sums over j <= t, angles by absolute place, eps not multiplied by the count. Local enhancement, gate and norm
around it belong to the layer.

State: `kv` ``[B, H, 2 D, E]`` of turned keys, `keys` ``[B, H, 2 D]`` of plain ones.

No setting makes it another operator of this library.

Axes: B batch, H query heads, G key/value heads, N queries, M keys, C chunk, D key width, E value width.
Meng et al. 2025, NaLaFormer: Norm-Aware Linear Attention for Transformer Models, arXiv:2506.21137.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from qkv.core.errors import InvalidInput, InvalidParameter
from qkv.core.operator import Operator, OperatorSpec
from qkv.core.spec import Extra, Learnt, Place, param
from qkv.core.state import State
from qkv.ops._common.decayed import decayed_linear_attention
from qkv.ops._common.grids import grid_angles, turned
from qkv.ops._common.states import after, per_head, wide
from qkv.ops._common.sums import divided

Feature = Literal["relu_split", "cosine"]
SMALLEST = 1e-6  # a shorter query has this norm


def reference(
    q: Tensor, k: Tensor, v: Tensor, *, query_angles: Tensor | None = None, key_angles: Tensor | None = None,
    causal: bool = True, padding: Tensor | None = None, initial_state: State | None = None, return_state: bool = False,
    power_scale: float = 3.0, power_shift: float = 0.5, key_power: int = 3, feature: Feature = "relu_split",
    eps: float = 1e-6,
) -> Any:  # fmt: skip
    """Both maps written out, ``[B, H, N, M]``.

    q ``[B, H, N, D]``, k ``[B, G, M, D]``, v ``[B, G, M, E]``; angles ``[N, D]`` or ``[B, N, D]``, ``[M, D]`` or ``[B, M, D]``,
    each pair of channels its angle twice. Returns ``[B, H, N, E]``, or that and the state.
    """
    dtype = q.dtype
    a, b, turned_a, turned_b, v = _features(
        q, k, v, query_angles, key_angles, padding, power_scale, power_shift, key_power, feature
    )
    kv, keys = _memory(q, v, initial_state)
    plain, maps = a @ b.mT, turned_a @ turned_b.mT
    if causal:
        plain, maps = plain.tril(), maps.tril()
    total = plain.sum(-1, keepdim=True) + a @ keys.unsqueeze(-1) + _floor(k, padding, causal, eps)
    out = divided(maps @ v + turned_a @ kv, total).to(dtype)
    if not return_state:
        return out
    return out, after("nalaformer", initial_state, q.shape[2], kv=kv + turned_b.mT @ v, keys=keys + b.sum(2))


def loop(
    q: Tensor, k: Tensor, v: Tensor, *, query_angles: Tensor | None = None, key_angles: Tensor | None = None,
    causal: bool = True, padding: Tensor | None = None, initial_state: State | None = None, return_state: bool = False,
    power_scale: float = 3.0, power_shift: float = 0.5, key_power: int = 3, feature: Feature = "relu_split",
    eps: float = 1e-6,
) -> Any:  # fmt: skip
    """Token by token, channel signs apart, rotation as complex numbers; shapes as in `reference`."""
    (b, h, n, d), m, repeat = q.shape, k.shape[2], q.shape[1] // k.shape[1]
    kv, keys = (x.clone() for x in _memory(q, v, initial_state))

    def turn(x: Tensor, angles: Tensor | None, t: int) -> Tensor:  # [B, D], a pair at a time
        if angles is None:
            return x
        theta, out = angles[t].expand(b, d) if angles.ndim == 2 else angles[:, t], torch.empty_like(x)
        for c in range(0, d, 2):
            odd = x[:, c + 1] if c + 1 < d else torch.zeros_like(x[:, c])
            out[:, c] = x[:, c] * theta[:, c].cos() - odd * theta[:, c].sin()
            if c + 1 < d:
                out[:, c + 1] = x[:, c] * theta[:, c + 1].sin() + odd * theta[:, c + 1].cos()
        return out

    def parts(x: Tensor, query: bool) -> list[Tensor]:
        size = x.square().sum(-1, keepdim=True).sqrt().clamp(min=SMALLEST)
        if feature == "cosine":
            theta = math.pi / 4 * x / size
            return [size * theta.cos(), size * theta.sin()]
        if query:
            return [(s * x / size).clamp(min=0) ** (power_scale * (power_shift + size.tanh())) for s in (1, -1)]
        return [torch.where(s * x > 0, s * x, 0.0) ** key_power for s in (1, -1)]

    def absorb(t: int) -> None:
        for i in range(h):
            made = parts(k[:, i // repeat, t], False)
            real = torch.ones(b, 1, dtype=q.dtype, device=q.device) if padding is None else padding[:, t, None].to(q)
            keys[:, i] += real * torch.cat(made, -1)
            moved = real * torch.cat([turn(x, key_angles, t) for x in made], -1)
            kv[:, i] += moved.unsqueeze(-1) * v[:, i // repeat, t].unsqueeze(-2)

    def read(t: int, floor: Any) -> Tensor:
        rows = []
        for i in range(h):
            made = parts(q[:, i, t], True)
            moved = torch.cat([turn(x, query_angles, t) for x in made], -1)
            total = (torch.cat(made, -1) * keys[:, i]).sum(-1) + floor
            rows.append(divided(torch.einsum("bf,bfe->be", moved, kv[:, i]), total.unsqueeze(-1)))
        return torch.stack(rows, 1)

    outs = []
    for t in range(m):
        absorb(t)
        if causal:
            outs.append(read(t, eps))
    if not causal:
        count = m if padding is None else padding.sum(1).to(wide(q))
        outs = [read(t, eps * count) for t in range(n)]
    out = torch.stack(outs, 2)
    return (out, after("nalaformer", initial_state, n, kv=kv, keys=keys)) if return_state else out


def fast(
    q: Tensor, k: Tensor, v: Tensor, *, query_angles: Tensor | None = None, key_angles: Tensor | None = None,
    causal: bool = True, padding: Tensor | None = None, initial_state: State | None = None, return_state: bool = False,
    power_scale: float = 3.0, power_shift: float = 0.5, key_power: int = 3, feature: Feature = "relu_split",
    eps: float = 1e-6, chunk_size: int = 64,
) -> Any:  # fmt: skip
    """Keys and values first, chunk by chunk when causal; shapes as in `reference`."""
    dtype, n = q.dtype, q.shape[2]
    a, b, turned_a, turned_b, v = _features(
        q, k, v, query_angles, key_angles, padding, power_scale, power_shift, key_power, feature
    )
    if not causal:
        total = a @ b.sum(2).unsqueeze(-1) + _floor(k, padding, causal, eps)
        return divided(turned_a @ (turned_b.mT @ v), total).to(dtype)
    kv, keys = _memory(q, v, initial_state)
    if query_angles is None:  # one map for numerator and denominator
        out, kv, sums = decayed_linear_attention(
            a, b, v, normalise=True, eps=eps, state=kv, keys=keys, chunk_size=chunk_size, sub_chunk=chunk_size
        )
        ends = {"kv": kv, "keys": keys if sums is None else sums}
    else:
        out, kv, _ = decayed_linear_attention(
            turned_a, turned_b, v, state=kv, chunk_size=chunk_size, sub_chunk=chunk_size
        )
        past = keys.unsqueeze(2) + b.cumsum(2)
        out, ends = divided(out, (a * past).sum(-1, keepdim=True) + eps), {"kv": kv, "keys": past[:, :, -1]}
    out = out.to(dtype)
    return (out, after("nalaformer", initial_state, n, **ends)) if return_state else out


def initial(
    q: Tensor, k: Tensor, v: Tensor, *, query_angles: Tensor | None = None, key_angles: Tensor | None = None
) -> State:
    """The empty state: zeros in float32 (float64 for float64 inputs), with angles or without."""
    kv, keys = _memory(q, v, None)
    return after("nalaformer", None, 0, kv=kv, keys=keys)


def step(
    q: Tensor, k: Tensor, v: Tensor, state: State, *, query_angles: Tensor | None = None, key_angles: Tensor | None = None,
    padding: Tensor | None = None, power_scale: float = 3.0, power_shift: float = 0.5, key_power: int = 3,
    feature: Feature = "relu_split", eps: float = 1e-6,
) -> tuple[Tensor, State]:  # fmt: skip
    """One token: q ``[B, H, 1, D]``, k ``[B, G, 1, D]``, v ``[B, G, 1, E]`` -> out ``[B, H, 1, E]``, new state."""
    dtype = q.dtype
    a, b, turned_a, turned_b, v = _features(
        q, k, v, query_angles, key_angles, padding, power_scale, power_shift, key_power, feature
    )
    kv, keys = _memory(q, v, state)
    kv, keys = kv + turned_b.mT * v, keys + b[:, :, 0]
    out = divided(turned_a @ kv, a @ keys.unsqueeze(-1) + eps)
    return out.to(dtype), after("nalaformer", state, 1, kv=kv, keys=keys)


def query_features(
    q: Tensor, power_scale: float = 3.0, power_shift: float = 0.5, feature: Feature = "relu_split"
) -> Tensor:
    """Norm-aware features of queries, ``[..., D]`` -> ``[..., 2 D]``."""
    n = q.square().sum(-1, keepdim=True).clamp(min=SMALLEST**2).sqrt()
    if feature == "cosine":
        return _cosine(q, n)
    u, p = q / n, power_scale * (power_shift + n.tanh())
    return torch.cat([u.relu().pow(p), (-u).relu().pow(p)], -1)


def key_features(k: Tensor, key_power: int = 3, feature: Feature = "relu_split") -> Tensor:
    """Features of keys, their norm kept, ``[..., D]`` -> ``[..., 2 D]``."""
    if feature == "cosine":
        return _cosine(k, k.square().sum(-1, keepdim=True).clamp(min=SMALLEST**2).sqrt())
    return torch.cat([k.relu().pow(key_power), (-k).relu().pow(key_power)], -1)


def _cosine(x: Tensor, n: Tensor) -> Tensor:
    theta = math.pi / 4 * x / n
    return n * torch.cat([theta.cos(), theta.sin()], -1)


def _features(
    q: Tensor, k: Tensor, v: Tensor, query_angles: Tensor | None, key_angles: Tensor | None, padding: Tensor | None,
    power_scale: float, power_shift: float, key_power: int, feature: Feature,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """phi(q), phi(k) (0 at padding), both turned, and v, for every query head in float32 or wider."""
    if (query_angles is None) != (key_angles is None):
        raise InvalidInput("nalaformer: give `query_angles` and `key_angles`, or neither")
    a = query_features(q.to(wide(q)), power_scale, power_shift, feature)
    b = key_features(k.to(wide(k)), key_power, feature)
    if padding is not None:
        b = b.masked_fill(~padding[:, None, :, None], 0.0)
    turned_a, turned_b = _turned(a, query_angles), _turned(b, key_angles)
    b, turned_b, v = per_head(q, b, turned_b, v.to(wide(v)))
    return a, b, turned_a, turned_b, v


def _turned(x: Tensor, angles: Tensor | None) -> Tensor:
    """Both halves of ``[B, H, N, 2 D]`` turned by angles ``[N, D]`` or ``[B, N, D]``."""
    if angles is None:
        return x
    angles = angles if angles.ndim == 2 else angles.unsqueeze(1)
    return torch.cat([turned(part, angles) for part in x.chunk(2, -1)], -1)


def _floor(k: Tensor, padding: Tensor | None, causal: bool, eps: float) -> Tensor | float:
    """What is added to the denominator: eps, times the number of real keys where all are seen."""
    if causal:
        return eps
    return eps * k.shape[2] if padding is None else eps * padding.sum(1)[:, None, None, None].to(wide(k))


def _grid(place: Place) -> Tensor | None:
    """The angles of a layer on a grid whose head width divides by 4, else none."""
    if place.grid is None or place.key_width % 4:
        return None
    return grid_angles(place.grid, place.key_width)


def _memory(q: Tensor, v: Tensor, state: State | None) -> tuple[Tensor, Tensor]:
    """KV ``[B, H, 2 D, E]`` and K ``[B, H, 2 D]``."""
    b, h, f, e = q.shape[0], q.shape[1], 2 * q.shape[-1], v.shape[-1]
    if state is None:
        return q.new_zeros(b, h, f, e, dtype=wide(q)), q.new_zeros(b, h, f, dtype=wide(q))
    state.of("nalaformer", kv=(b, h, f, e), keys=(b, h, f))
    return state["kv"], state["keys"]


@final
@dataclass(frozen=True, kw_only=True)
class NaLaFormer(Operator):
    """Norm-aware normalised linear attention."""

    spec: ClassVar[OperatorSpec] = OperatorSpec(
        id="nalaformer",
        title="NaLaFormer: norm-aware linear attention",
        paper="arXiv:2506.21137",
        source="code",
        summary="Linear attention in which longer queries attend more sharply, as in softmax, and the signs of channels are kept "
        "apart instead of being cut off.",
        shown="Longer queries have rows of lower entropy, as in softmax and unlike plain linear attention; on images at equal "
        "size more accurate than ReLU linear attention.",
        honest="The exponent saturates at 4.5 once the query's norm passes about 2, so sharpness is bounded.",
        trials=({}, {"chunk_size": 5, "key_power": 2, "eps": 0.3}, {"feature": "cosine"}),
        causal="both",
        cross="bidirectional",
        scale=None,
        reference=reference,
        fast=fast,
        loop=loop,
        initial=initial,
        step=step,
        extras={
            "query_angles": Extra(
                axes="nd|bnd",
                sample=lambda *n, **kw: 3 * torch.randn(*n, **kw),
                role="parameter",
                doc="turn of each channel of the queries, radians, each pair's angle twice",
                required=False,
                learnt=Learnt(axes="nd", start=_grid, trained=False),
            ),
            "key_angles": Extra(
                axes="md|bmd",
                sample=lambda *n, **kw: 3 * torch.randn(*n, **kw),
                role="parameter",
                doc="turn of each channel of the keys, radians, each pair's angle twice",
                required=False,
                learnt=Learnt(axes="md", start=_grid, trained=False),
            ),
        },
    )
    power_scale: float = param(3.0, "factor of the query's exponent", low=0.0)
    power_shift: float = param(0.5, "added to tanh of the query's norm in its exponent", low=0.0)
    key_power: int = param(3, "exponent of the keys", low=1)
    feature: Literal["relu_split", "cosine"] = param(
        "relu_split", "features: powers of both signs, or angles times the norm"
    )
    eps: float = param(1e-6, "added to the denominator, for each key where all are seen", low=0.0)
    chunk_size: int = param(64, "tokens per chunk of the causal form", low=1)

    def validate(self) -> None:
        """The smallest exponent is at least 1: below, features have infinite slopes at 0."""
        if self.power_scale * self.power_shift < 1.0:
            raise InvalidParameter(
                f"nalaformer: the exponent of a short query is power_scale * power_shift = "
                f"{self.power_scale * self.power_shift:g} and must be at least 1"
            )
