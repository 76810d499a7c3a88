r"""Gated linear attention: a memory whose rows fade by data-dependent gates, one per key channel.

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T,     o_t = scale S_t^T q_t
        = scale sum_{j <= t} [sum_d q_td k_jd exp(G_td - G_jd)] v_j,     G = cumulative sum of g (inclusive)

`log_decay` g <= 0 acts on the old state only, so a token's own weight is exp(0). One rate per head ``[H]``,
per head and token ``[B, H, N]`` or per channel ``[B, H, N, D]``. No feature map, no denominator.

Axes: B batch, H query heads, G key/value heads, N tokens, C chunk, D key width, E value width.
Yang et al. 2023, Gated Linear Attention Transformers with Hardware-Efficient Training, arXiv:2312.06635.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.core.errors import InvalidParameter
from qkv.core.operator import Operator, OperatorSpec
from qkv.core.spec import Extra, Learnt, Limit, param
from qkv.core.state import State
from qkv.ops._common.decayed import core_limit, decayed_linear_attention, one_token
from qkv.ops._common.states import after


def reference(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, log_decay: Tensor, padding: Tensor | None = None,
    initial_state: State | None = None, return_state: bool = False,
) -> Any:  # fmt: skip
    """The parallel definition, with the whole map ``[B, H, N, N, D]`` of decays.

    q ``[B, H, N, D]``, k ``[B, G, N, D]``, v ``[B, G, N, E]`` -> ``[B, H, N, E]``, or that and the final
    state.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v, g = _expanded(q, k, v, log_decay.to(wide), padding)
    total = g.cumsum(2)  # G, [B, H, N, D]
    later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    decay = (total.unsqueeze(3) - total.unsqueeze(2)).masked_fill(later[..., None], -torch.inf).exp()
    out = scale * torch.einsum("bhid,bhjd,bhijd->bhij", q, k, decay.to(q.dtype)) @ v
    start = _state_tensor(q, k, v, initial_state)
    out = out + scale * (q * total.exp().to(q.dtype)) @ start.to(q.dtype)
    if not return_state:
        return out
    rest = (total[:, :, -1:] - total).exp()  # decay from each token to the end
    state = total[:, :, -1].exp().unsqueeze(-1) * start + (k * rest).mT @ v.to(wide)
    return out, _state(state, initial_state, q.shape[2])


def loop(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, log_decay: Tensor, padding: Tensor | None = None,
    initial_state: State | None = None, return_state: bool = False,
) -> Any:  # fmt: skip
    """The recurrent definition, token by token; shapes as in `reference`."""
    k, v, g = _expanded(q, k, v, log_decay, padding)
    state = _state_tensor(q, k, v, initial_state)
    outs = []
    for t in range(q.shape[2]):
        state = torch.diag_embed(g[:, :, t].exp()) @ state + k[:, :, t, :, None] * v[:, :, t, None, :]
        outs.append(scale * (q[:, :, t, None] @ state)[..., 0, :])
    out = torch.stack(outs, 2)
    return (out, _state(state, initial_state, q.shape[2])) if return_state else out


def fast(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, log_decay: Tensor, padding: Tensor | None = None,
    initial_state: State | None = None, return_state: bool = False, chunk_size: int = 64, sub_chunk: int = 8,
) -> Any:  # fmt: skip
    """The same map in O(N C): chunks of matmuls, one state carried between them; shapes as in `reference`."""
    start = None if initial_state is None else _state_tensor(q, k, v, initial_state)
    out, state, _ = decayed_linear_attention(
        q, k, v, log_decay=log_decay, scale=scale, state=start, padding=padding, chunk_size=chunk_size,
        sub_chunk=sub_chunk,
    )  # fmt: skip
    return (out, _state(state, initial_state, q.shape[2])) if return_state else out


def fused(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, log_decay: Tensor, padding: Tensor | None = None,
    initial_state: State | None = None, return_state: bool = False, chunk_size: int = 64, sub_chunk: int = 8,
) -> Any:  # fmt: skip
    """The same map in a Triton kernel, which has its own tiles: chunk_size and sub_chunk shape `fast` alone."""
    start = None if initial_state is None else _state_tensor(q, k, v, initial_state)
    out, state, _ = decayed_linear_attention(
        q, k, v, log_decay=log_decay, scale=scale, state=start, padding=padding, form="triton"
    )
    return (out, _state(state, initial_state, q.shape[2])) if return_state else out


def initial(q: Tensor, k: Tensor, v: Tensor, *, log_decay: Tensor | None = None) -> State:
    """The empty state, ``[B, H, D, E]`` zeros in float32 (float64 for float64 inputs)."""
    return _state(_state_tensor(q, k, v, None), None, 0)


def step(
    q: Tensor, k: Tensor, v: Tensor, state: State, *, scale: float, log_decay: Tensor, padding: Tensor | None = None
) -> tuple[Tensor, State]:
    """One token: q ``[B, H, 1, D]``, k ``[B, G, 1, D]``, v ``[B, G, 1, E]`` -> out ``[B, H, 1, E]``, new state."""
    out, new, _ = decayed_linear_attention(
        q, k, v, log_decay=log_decay, scale=scale, state=_state_tensor(q, k, v, state), padding=padding,
        form=one_token(q, v),
    )  # fmt: skip
    return out, _state(new, state, 1)


def _expanded(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, padding: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """k, v for every query head and log_decay ``[B, H, N, D]``; padded tokens have k = 0 and do not decay."""
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    if log_decay.ndim == 1:
        log_decay = log_decay[None, :, None]
    g = (log_decay if log_decay.ndim == 4 else log_decay.unsqueeze(-1)).expand(q.shape)
    if padding is not None:
        gone = ~padding[:, None, :, None]
        k, g = k.masked_fill(gone, 0.0), g.masked_fill(gone, 0.0)
    return k, v, g


def _state_tensor(q: Tensor, k: Tensor, v: Tensor, state: State | None) -> Tensor:
    """S ``[B, H, D, E]``: zeros, or that of a state after checking that it fits."""
    shape = (*q.shape[:2], q.shape[-1], v.shape[-1])
    if state is None:
        return q.new_zeros(shape, dtype=torch.promote_types(q.dtype, torch.float32))
    return state.of("gla", state=shape)["state"]


def _state(tensor: Tensor, before: State | None, tokens: int) -> State:
    return after("gla", before, tokens, state=tensor)


def _sample(*shape: int, **kwargs: Any) -> Tensor:
    return F.logsigmoid(torch.randn(*shape, **kwargs))


@final
@dataclass(frozen=True, kw_only=True)
class GatedLinearAttention(Operator):
    """Gated linear attention in chunks."""

    spec: ClassVar[OperatorSpec] = OperatorSpec(
        id="gla",
        title="Gated Linear Attention",
        paper="arXiv:2312.06635",
        source="code",
        summary="Linear attention whose state rows decay by data-dependent gates, one per key channel; trained in "
        "two-level chunks that stay stable for strong decay, decoded with a state of constant size.",
        shown="Byte models on real text, equal parameters: per-channel gates <= per-head gates < constant < none in loss.",
        honest="The state has a fixed size, so exact recall of many distant tokens is lost; on short sequences a fused "
        "softmax kernel is faster.",
        limits=(
            Limit(equals="linear", inputs={"log_decay": 0.0}, says="without decay: plain causal linear attention"),
        ),
        trials=({}, {"chunk_size": 6, "sub_chunk": 3}),
        causal="only",
        cross=False,
        reference=reference,
        fast=fast,
        loop=loop,
        initial=initial,
        step=step,
        kernel="qkv.ops.gla:fused",
        kernel_limit=core_limit,
        extras={
            "log_decay": Extra(
                axes="h|bhn|bhnd",
                sample=_sample,
                high=0.0,
                extremes=(0.0, -1e-30, -20.0, -1e4),
                doc="natural log of the share of the state kept at each step, at most 0",
                learnt=Learnt(axes="bhnd", value=lambda x: F.logsigmoid(x) / 16, rank=16),
            )
        },
    )
    chunk_size: int = param(64, "tokens per chunk: matmuls inside, one state between", low=1)
    sub_chunk: int = param(8, "tokens per diagonal block inside a chunk; divides chunk_size", low=1)

    def validate(self) -> None:
        """chunk_size is a multiple of sub_chunk."""
        if self.chunk_size % self.sub_chunk:
            raise InvalidParameter(f"gla: chunk_size={self.chunk_size} must be a multiple of "
                                   f"sub_chunk={self.sub_chunk}")  # fmt: skip
