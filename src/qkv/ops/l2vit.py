r"""L2ViT's global attention: linear attention with ReLU features, a floor under the denominator and a temperature per head.

    o_i = tau_h relu(q_i) . sum_j relu(k_j) v_j^T / max(relu(q_i) . sum_j relu(k_j), floor),     floor = 100

Rows sum to tau min(1, raw / floor): below the floor the output grows with the features, above it only their direction counts.
The floor is absolute, so it interacts with the number of tokens and the scale of features. tau_h is learned, D^(-1/2) at the
start and when it is left out. The released models alternate this with softmax in windows of 7 x 7 (`windows`) and sharpen its
flat maps by a local concentration module after it (`LocalConcentration`, both in qkv.ops._common.grids).
Causal (ours): sums over j <= t; local concentration has no causal form.

State: `kv` ``[B, H, D, E]`` and `keys` ``[B, H, D]`` of the ReLU keys.

No setting makes it another operator of this library.

Axes: B batch, H query heads, G key/value heads, N queries, M keys, C chunk, D key width, E value width.
Zheng 2025, The Linear Attention Resurrection in Vision Transformer, arXiv:2501.16182.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from qkv.core.operator import Operator, OperatorSpec
from qkv.core.spec import Extra, Learnt, param
from qkv.core.state import State
from qkv.ops._common.decayed import decayed_linear_attention
from qkv.ops._common.states import after, per_head, wide


def reference(
    q: Tensor, k: Tensor, v: Tensor, *, temperature: Tensor | None = None, causal: bool = True,
    padding: Tensor | None = None, initial_state: State | None = None, return_state: bool = False, den_floor: float = 100.0,
) -> Any:  # fmt: skip
    """The whole map ``[B, H, N, M]``.

    q ``[B, H, N, D]``, k ``[B, G, M, D]``, v ``[B, G, M, E]``, temperature ``[H]`` -> ``[B, H, N, E]``, or that and the state.
    """
    a, b, v_wide = _features(q, k, v, padding)
    kv, keys = _memory(q, v, initial_state)
    scores = (a @ b.mT).tril() if causal else a @ b.mT
    total = scores.sum(-1, keepdim=True) + a @ keys.unsqueeze(-1)
    out = _tau(q, temperature) * (scores @ v_wide + a @ kv) / total.clamp(min=den_floor)
    if not return_state:
        return out.to(q.dtype)
    return out.to(q.dtype), after("l2vit", initial_state, q.shape[2], kv=kv + b.mT @ v_wide, keys=keys + b.sum(2))


def loop(
    q: Tensor, k: Tensor, v: Tensor, *, temperature: Tensor | None = None, causal: bool = True,
    padding: Tensor | None = None, initial_state: State | None = None, return_state: bool = False, den_floor: float = 100.0,
) -> Any:  # fmt: skip
    """Token by token and head by head; shapes as in `reference`."""
    repeat, m = q.shape[1] // k.shape[1], k.shape[2]
    kv, keys = (list(x.unbind(1)) for x in _memory(q, v, initial_state))
    zero = torch.zeros((), dtype=q.dtype, device=q.device)

    def read(t: int) -> Tensor:
        rows = []
        for i in range(q.shape[1]):
            a = torch.maximum(q[:, i, t], zero)
            total = torch.maximum((a * keys[i]).sum(-1), zero + den_floor)
            tau = q.shape[-1] ** -0.5 if temperature is None else temperature[i]
            rows.append(tau * torch.einsum("bd,bde->be", a, kv[i]) / total.unsqueeze(-1))
        return torch.stack(rows, 1)

    outs = []
    for t in range(m):
        for i in range(q.shape[1]):
            b = torch.maximum(k[:, i // repeat, t], zero)
            b = b if padding is None else b * padding[:, t, None]
            kv[i] = kv[i] + b.unsqueeze(-1) * v[:, i // repeat, t].unsqueeze(-2)
            keys[i] = keys[i] + b
        if causal:
            outs.append(read(t))
    out = torch.stack(outs if causal else [read(t) for t in range(q.shape[2])], 2)
    if not return_state:
        return out
    return out, after("l2vit", initial_state, m, kv=torch.stack(kv, 1), keys=torch.stack(keys, 1))


def fast(
    q: Tensor, k: Tensor, v: Tensor, *, temperature: Tensor | None = None, causal: bool = True,
    padding: Tensor | None = None, initial_state: State | None = None, return_state: bool = False, den_floor: float = 100.0,
    chunk_size: int = 64,
) -> Any:  # fmt: skip
    """Keys and values first, chunk by chunk when causal; shapes as in `reference`."""
    a, b, v_wide = _features(q, k, v, padding)
    if not causal:
        total = (a @ b.sum(2).unsqueeze(-1)).clamp(min=den_floor)
        return (_tau(q, temperature) * (a @ (b.mT @ v_wide)) / total).to(q.dtype)
    kv, keys = _memory(q, v, initial_state)
    v_one = torch.cat([v_wide, torch.ones_like(v_wide[..., :1])], -1)  # the last column sums the weights
    start = torch.cat([kv, keys.unsqueeze(-1)], -1)
    out, end, _ = decayed_linear_attention(a, b, v_one, state=start, chunk_size=chunk_size, sub_chunk=chunk_size)
    out = (_tau(q, temperature) * out[..., :-1] / out[..., -1:].clamp(min=den_floor)).to(q.dtype)
    return (
        (out, after("l2vit", initial_state, q.shape[2], kv=end[..., :-1], keys=end[..., -1])) if return_state else out
    )


def initial(q: Tensor, k: Tensor, v: Tensor, *, temperature: Tensor | None = None) -> State:
    """The empty state: zeros in float32 (float64 for float64 inputs)."""
    kv, keys = _memory(q, v, None)
    return after("l2vit", None, 0, kv=kv, keys=keys)


def step(
    q: Tensor, k: Tensor, v: Tensor, state: State, *, temperature: Tensor | None = None, padding: Tensor | None = None,
    den_floor: float = 100.0,
) -> tuple[Tensor, State]:  # fmt: skip
    """One token: q ``[B, H, 1, D]``, k ``[B, G, 1, D]``, v ``[B, G, 1, E]`` -> out ``[B, H, 1, E]``, new state."""
    a, b, v_wide = _features(q, k, v, padding)
    kv, keys = _memory(q, v, state)
    kv, keys = kv + b.mT * v_wide, keys + b[:, :, 0]
    out = _tau(q, temperature) * (a @ kv) / (a @ keys.unsqueeze(-1)).clamp(min=den_floor)
    return out.to(q.dtype), after("l2vit", state, 1, kv=kv, keys=keys)


def _features(q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """ReLU queries and keys (0 at padding) and values, for every query head, in float32 or wider."""
    a, b = q.to(wide(q)).relu(), k.to(wide(k)).relu()
    if padding is not None:
        b = b.masked_fill(~padding[:, None, :, None], 0.0)
    b, v = per_head(q, b, v.to(wide(v)))
    return a, b, v


def _tau(q: Tensor, temperature: Tensor | None) -> Tensor | float:
    return q.shape[-1] ** -0.5 if temperature is None else temperature.to(wide(q))[:, None, None]


def _memory(q: Tensor, v: Tensor, state: State | None) -> tuple[Tensor, Tensor]:
    """KV ``[B, H, D, E]`` and K ``[B, H, D]``."""
    b, h, d, e = q.shape[0], q.shape[1], q.shape[-1], v.shape[-1]
    if state is None:
        return q.new_zeros(b, h, d, e, dtype=wide(q)), q.new_zeros(b, h, d, dtype=wide(q))
    state.of("l2vit", kv=(b, h, d, e), keys=(b, h, d))
    return state["kv"], state["keys"]


@final
@dataclass(frozen=True, kw_only=True)
class L2ViT(Operator):
    """ReLU linear attention with a floored denominator."""

    spec: ClassVar[OperatorSpec] = OperatorSpec(
        id="l2vit",
        title="L2ViT linear global attention",
        paper="arXiv:2501.16182",
        source="code",
        summary="Linear attention with ReLU features whose denominator never falls below a floor, which makes it trainable; a "
        "module of two large depthwise convolutions restores the local focus that it lacks.",
        shown="On images at equal size more accurate with local concentration than without, with more of the map's mass near "
        "the query.",
        honest="Alone its maps are flat, and the floor is absolute: another number of tokens or scale of features changes the "
        "output's size.",
        trials=({}, {"den_floor": 1.0, "chunk_size": 5}, {"den_floor": 1e-3}),
        causal="both",
        cross="bidirectional",
        scale=None,
        reference=reference,
        fast=fast,
        loop=loop,
        initial=initial,
        step=step,
        extras={
            "temperature": Extra(
                axes="h",
                sample=lambda *n, **kw: torch.rand(*n, **kw) + 0.1,
                role="parameter",
                doc="factor of each head's output; D^(-1/2) without it",
                required=False,
                learnt=Learnt(axes="h", start=lambda place: torch.full((place.heads,), place.key_width**-0.5)),
            )
        },
    )
    den_floor: float = param(100.0, "the smallest denominator", low=1e-12)
    chunk_size: int = param(64, "tokens per chunk of the causal form", low=1)
