r"""Plain causal linear attention: no softmax, no feature map, no decay, no denominator.

    o_t = scale sum_{j <= t} (q_t . k_j) v_j = scale S_t^T q_t,     S_t = S_{t-1} + k_t v_t^T

The baseline that decaying and gated operators reduce to when nothing fades.

Axes: B batch, H query heads, G key/value heads, N tokens, C chunk, D key width, E value width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from qkv.core.operator import Operator, OperatorSpec
from qkv.core.spec import param
from qkv.core.state import State
from qkv.ops._common.decayed import core_limit, decayed_linear_attention, one_token
from qkv.ops._common.states import after


def reference(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, padding: Tensor | None = None,
    initial_state: State | None = None, return_state: bool = False,
) -> Any:  # fmt: skip
    """The whole map. q ``[B, H, N, D]``, k ``[B, G, N, D]``, v ``[B, G, N, E]`` -> ``[B, H, N, E]`` (and a state)."""
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    if padding is not None:
        k = k.masked_fill(~padding[:, None, :, None], 0.0)
    start = _tensor(q, v, initial_state)
    out = scale * ((q @ k.mT).tril() @ v + q @ start.to(q.dtype))
    return (out, _state(start + (k.mT @ v).to(start), initial_state, q.shape[2])) if return_state else out


def loop(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, padding: Tensor | None = None,
    initial_state: State | None = None, return_state: bool = False,
) -> Any:  # fmt: skip
    """The state, token by token; shapes as in `reference`."""
    repeat = q.shape[1] // k.shape[1]
    state, outs = _tensor(q, v.repeat_interleave(repeat, 1), initial_state), []
    for t in range(q.shape[2]):
        new = torch.einsum("bgd,bge->bgde", k[:, :, t], v[:, :, t]).repeat_interleave(repeat, 1)
        state = state + (new if padding is None else new * padding[:, t, None, None, None])
        outs.append(scale * torch.einsum("bhd,bhde->bhe", q[:, :, t], state))
    out = torch.stack(outs, 2)
    return (out, _state(state, initial_state, q.shape[2])) if return_state else out


def fast(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, padding: Tensor | None = None,
    initial_state: State | None = None, return_state: bool = False, chunk_size: int = 64,
) -> Any:  # fmt: skip
    """The same map in O(N C); shapes as in `reference`."""
    start = None if initial_state is None else _tensor(q, v, initial_state)
    out, state, _ = decayed_linear_attention(
        q, k, v, scale=scale, state=start, padding=padding, chunk_size=chunk_size, sub_chunk=chunk_size
    )
    return (out, _state(state, initial_state, q.shape[2])) if return_state else out


def fused(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, padding: Tensor | None = None,
    initial_state: State | None = None, return_state: bool = False, chunk_size: int = 64,
) -> Any:  # fmt: skip
    """The same map in a Triton kernel, which has its own tiles: chunk_size shapes `fast` alone."""
    start = None if initial_state is None else _tensor(q, v, initial_state)
    out, state, _ = decayed_linear_attention(q, k, v, scale=scale, state=start, padding=padding, form="triton")
    return (out, _state(state, initial_state, q.shape[2])) if return_state else out


def initial(q: Tensor, k: Tensor, v: Tensor) -> State:
    """The empty state, ``[B, H, D, E]`` zeros in float32 (float64 for float64 inputs)."""
    return _state(_tensor(q, v, None), None, 0)


def step(
    q: Tensor, k: Tensor, v: Tensor, state: State, *, scale: float, padding: Tensor | None = None
) -> tuple[Tensor, State]:
    """One token: q ``[B, H, 1, D]``, k ``[B, G, 1, D]``, v ``[B, G, 1, E]`` -> out ``[B, H, 1, E]``, new state."""
    out, new, _ = decayed_linear_attention(
        q, k, v, scale=scale, state=_tensor(q, v, state), padding=padding, form=one_token(q, v)
    )
    return out, _state(new, state, 1)


def _tensor(q: Tensor, v: Tensor, state: State | None) -> Tensor:
    shape = (*q.shape[:2], q.shape[-1], v.shape[-1])
    if state is None:
        return q.new_zeros(shape, dtype=torch.promote_types(q.dtype, torch.float32))
    return state.of("linear", state=shape)["state"]


def _state(tensor: Tensor, before: State | None, tokens: int) -> State:
    return after("linear", before, tokens, state=tensor)


@final
@dataclass(frozen=True, kw_only=True)
class Linear(Operator):
    """Causal linear attention without decay."""

    spec: ClassVar[OperatorSpec] = OperatorSpec(
        id="linear",
        title="Plain causal linear attention",
        paper="baseline",
        source="baseline",
        summary="Sums key-value products into a state of constant size and reads it with the query; nothing fades.",
        shown="The loss that gated forms must beat on the same text with the same parameters.",
        honest="Old and new tokens weigh the same and nothing is normalised: the output grows with the length.",
        trials=({}, {"chunk_size": 5}),
        causal="only",
        cross=False,
        reference=reference,
        fast=fast,
        loop=loop,
        initial=initial,
        step=step,
        kernel="qkv.ops.linear:fused",
        kernel_limit=core_limit,
    )
    chunk_size: int = param(64, "tokens per chunk: matmuls inside, one state between", low=1)
