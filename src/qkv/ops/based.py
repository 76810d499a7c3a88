r"""Based: linear attention whose features are the second-order Taylor expansion of exp.

    o_t = sum_{j <= t} w_tj v_j / (sum_{j <= t} w_tj + eps),     w = 1 + s + s^2 / 2,   s = scale q_t . k_j
    phi(q) . phi(k) = w,     phi(x) = [1, x, products x_a x_b of channels a <= b]     (F = 1 + D + D (D + 1) / 2 features)

w >= 1/2 for every s, so the denominator never vanishes; but w grows again below s = -1: keep queries and keys small. With
``order=1``, w = 1 + s (which may be negative). In the published models a few of these layers stand beside sliding-window
softmax layers and gated convolutions (`base-conv`): `based_layout` says which is which, `qkv.models.language.published.based`
builds the model; D is 16 there, from projections of their own.

State: KV ``[B, H, F, E]`` and K ``[B, H, F]`` over the packed features of the keys (the scale is on the query's side).

No setting makes it another operator of this library.

Axes: B batch, H query heads, G key/value heads, N tokens, C chunk, D feature width, E value width.
Arora et al. 2024, Simple linear attention language models balance the recall-throughput tradeoff, arXiv:2402.18668.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.core.errors import InvalidParameter
from qkv.core.operator import Operator, OperatorSpec, Wiring
from qkv.core.spec import param
from qkv.core.state import State
from qkv.ops._common.decayed import core_limit, decayed_linear_attention, too_wide
from qkv.ops._common.states import after, per_head, wide
from qkv.ops._common.sums import in_chunks, without_padding


def reference(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, padding: Tensor | None = None, initial_state: State | None = None,
    return_state: bool = False, order: int = 2, eps: float = 1e-12,
) -> Any:  # fmt: skip
    """The quadratic definition. q ``[B, H, N, D]``, k ``[B, G, N, D]``, v ``[B, G, N, E]`` -> ``[B, H, N, E]`` (and a state)."""
    k, v = per_head(q, k, v)
    state, keys = _memory(q, v, initial_state, order)
    s = scale * (q @ k.mT)  # [B, H, N, N]
    weights = (1 + s + s * s / 2 if order == 2 else 1 + s).tril()
    if padding is not None:
        weights = weights.masked_fill(~padding[:, None, None, :], 0.0)
    features = query_features(q, scale, order)
    total = weights.sum(-1, keepdim=True) + features @ keys.to(q.dtype).unsqueeze(-1) + eps
    out = (weights @ v + features @ state.to(q.dtype)) / total.masked_fill(total == 0, 1.0)
    if not return_state:
        return out
    phi = without_padding(key_features(k.to(wide(q)), order), padding)
    return out, after("based", initial_state, q.shape[2], state=state + phi.mT @ v.to(phi), keys=keys + phi.sum(2))


def loop(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, padding: Tensor | None = None, initial_state: State | None = None,
    return_state: bool = False, order: int = 2, eps: float = 1e-12,
) -> Any:  # fmt: skip
    """The unpacked sums of the paper, token by token: of v, k v and k k^T v; shapes as in `reference`."""
    k, v = per_head(q, k, v)
    state, keys = _memory(q, v, initial_state, order)
    outs = []
    for t in range(q.shape[2]):
        key, query, value = k[:, :, t], q[:, :, t], v[:, :, t]
        phi = torch.cat([torch.ones_like(key[..., :1]), key], -1)
        if order == 2:
            upper = torch.ones(key.shape[-1], key.shape[-1], dtype=torch.bool, device=q.device).triu()
            phi = torch.cat([phi, torch.einsum("bhx,bhy->bhxy", key, key)[..., upper]], -1)
        phi = without_padding(phi.unsqueeze(2), None if padding is None else padding[:, t : t + 1]).squeeze(2)
        state, keys = state + phi.unsqueeze(-1) * value.unsqueeze(-2), keys + phi
        read = torch.cat([torch.ones_like(query[..., :1]), scale * query], -1)
        if order == 2:
            outer = scale**2 * torch.einsum("bhx,bhy->bhxy", query, query)
            read = torch.cat([read, (outer - outer.diagonal(0, -2, -1).diag_embed() / 2)[..., upper]], -1)
        outs.append((read.unsqueeze(-2) @ state)[..., 0, :] / ((read * keys).sum(-1, keepdim=True) + eps))
    out = torch.stack(outs, 2)
    return (out, after("based", initial_state, q.shape[2], state=state, keys=keys)) if return_state else out


def fast(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, padding: Tensor | None = None, initial_state: State | None = None,
    return_state: bool = False, order: int = 2, eps: float = 1e-12, chunk_size: int = 64,
) -> Any:  # fmt: skip
    """Weights inside a chunk straight from the scores, features only between chunks; shapes as in `reference`."""
    dtype, n = q.dtype, q.shape[2]
    q, k, v = (x.to(wide(x)) for x in (q, *per_head(q, k, v)))
    state, keys = _memory(q, v, initial_state, order)
    v = without_padding(F.pad(v, (0, 1), value=1.0), padding)  # the last column sums the weights
    q, k, v = (in_chunks(x, min(chunk_size, n)) for x in (q, k, v))  # [B, H, chunks, C, .]
    added = key_features(k, order).mT @ v  # [B, H, chunks, F, E + 1]
    start = torch.cat([state, keys.unsqueeze(-1)], -1).unsqueeze(2)
    before = torch.cat([start, start + added.cumsum(2)], 2)
    s = scale * (q @ k.mT)
    weights = (1 + s + 0.5 * s * s if order == 2 else 1 + s).tril()
    out = weights @ v + query_features(q, scale, order) @ before[:, :, :-1]
    out, end = out.flatten(2, 3)[:, :, :n], before[:, :, -1]
    total = out[..., -1:] + eps
    out = (out[..., :-1] / total.masked_fill(total == 0, 1.0)).to(dtype)
    return (out, after("based", initial_state, n, state=end[..., :-1], keys=end[..., -1])) if return_state else out


def fused(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, padding: Tensor | None = None, initial_state: State | None = None,
    return_state: bool = False, order: int = 2, eps: float = 1e-12, chunk_size: int = 64,
) -> Any:  # fmt: skip
    """The same map as linear attention of the features, in the core's kernel; chunk_size shapes `fast` alone."""
    dtype, n = q.dtype, q.shape[2]
    q, k, v = (x.to(wide(x)) for x in (q, *per_head(q, k, v)))
    state, keys = (None, None) if initial_state is None else _memory(q, v, initial_state, order)
    out, state, keys = decayed_linear_attention(
        query_features(q, scale, order), key_features(k, order), v, normalise=True, eps=eps, state=state, keys=keys,
        padding=padding, form="triton",
    )  # fmt: skip
    assert keys is not None
    return (out.to(dtype), after("based", initial_state, n, state=state, keys=keys)) if return_state else out.to(dtype)


def initial(q: Tensor, k: Tensor, v: Tensor, *, order: int = 2) -> State:
    """The empty state: zeros in float32 (float64 for float64 inputs)."""
    state, keys = _memory(q, v, None, order)
    return after("based", None, 0, state=state, keys=keys)


def step(
    q: Tensor, k: Tensor, v: Tensor, state: State, *, scale: float, padding: Tensor | None = None, order: int = 2,
    eps: float = 1e-12,
) -> tuple[Tensor, State]:  # fmt: skip
    """One token: q ``[B, H, 1, D]``, k ``[B, G, 1, D]``, v ``[B, G, 1, E]`` -> out ``[B, H, 1, E]``, new state."""
    dtype = q.dtype
    q, k, v = (x.to(wide(x)) for x in (q, *per_head(q, k, v)))
    memory, keys = _memory(q, v, state, order)
    phi = without_padding(key_features(k, order), padding)  # [B, H, 1, F]
    memory, keys = memory + phi.mT * v, keys + phi[:, :, 0]
    read = query_features(q, scale, order)
    total = read @ keys.unsqueeze(-1) + eps
    out = (read @ memory) / total.masked_fill(total == 0, 1.0)
    return out.to(dtype), after("based", state, 1, state=memory, keys=keys)


def based_layout(layers: int) -> tuple[Literal["conv", "linear", "window"], ...]:
    """Kinds of the layers of a model like the released ones (27 layers).

    Of each five, the second is linear attention, the third a window, the others convolutions; a last group that is not whole
    is all convolutions. Raises `InvalidParameter`.
    """
    if layers < 1:
        raise InvalidParameter(f"based_layout: layers={layers} must be at least 1")
    kinds: dict[int, Literal["linear", "window"]] = {1: "linear", 2: "window"}
    return tuple(kinds.get(i % 5, "conv") if i - i % 5 + 5 <= max(layers, 5) else "conv" for i in range(layers))


def features(d: int, order: int = 2) -> int:
    """F, the packed features of D channels."""
    return 1 + d + (d * (d + 1) // 2 if order == 2 else 0)


def key_features(x: Tensor, order: int = 2) -> Tensor:
    """Features phi of keys, ``[..., D]`` -> ``[..., F]``: 1, x and the products of channels a <= b, unscaled."""
    return torch.cat([torch.ones_like(x[..., :1]), x, *([_products(x)] if order == 2 else [])], -1)


def query_features(x: Tensor, scale: float, order: int = 2) -> Tensor:
    """Features phi of queries, ``[..., D]`` -> ``[..., F]``: carries the scale, and the 1/2 of the squares."""
    parts = [torch.ones_like(x[..., :1]), scale * x]
    if order == 2:
        a, b = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device).unbind(0)
        parts.append(_products(x) * (scale * scale * (1.0 - 0.5 * (a == b).to(x.dtype))))
    return torch.cat(parts, -1)


def _limit(q: Tensor, k: Tensor, v: Tensor, *, order: int, **parameters: Any) -> str | None:
    """As many features as the core takes channels."""
    return core_limit(q, k, v) or too_wide(features(q.shape[-1], order), v.shape[-1])


def _products(x: Tensor) -> Tensor:
    a, b = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device).unbind(0)
    return x[..., a] * x[..., b]


def _memory(q: Tensor, v: Tensor, state: State | None, order: int) -> tuple[Tensor, Tensor]:
    """KV ``[B, H, F, E]`` and K ``[B, H, F]``."""
    (b, h), f, e = q.shape[:2], features(q.shape[-1], order), v.shape[-1]
    if state is None:
        return q.new_zeros(b, h, f, e, dtype=wide(q)), q.new_zeros(b, h, f, dtype=wide(q))
    state.of("based", state=(b, h, f, e), keys=(b, h, f))
    return state["state"], state["keys"]


@final
@dataclass(frozen=True, kw_only=True)
class Based(Operator):
    """Normalised linear attention with Taylor features."""

    spec: ClassVar[OperatorSpec] = OperatorSpec(
        id="based",
        title="Based: Taylor linear attention",
        paper="arXiv:2402.18668",
        source="code",
        summary="Linear attention that weighs keys by the second-order Taylor expansion of exp; the feature width sets the "
        "size of the state, and recall follows it.",
        shown="Associative recall rises with the feature width, where a window alone fails beyond its reach.",
        honest="The state grows with the square of the feature width, and very negative scores get large weights.",
        trials=({}, {"chunk_size": 5}, {"order": 1, "eps": 30.0}),
        causal="only",
        cross=False,
        reference=reference,
        fast=fast,
        loop=loop,
        initial=initial,
        step=step,
        kernel="qkv.ops.based:fused",
        kernel_limit=_limit,
        wiring=Wiring(key_width=16),
    )
    order: int = param(2, "terms of the expansion of exp after the constant", low=1, high=2)
    eps: float = param(1e-12, "added to the denominator", low=0.0)
    chunk_size: int = param(64, "tokens per chunk: scores inside, features between", low=1)
