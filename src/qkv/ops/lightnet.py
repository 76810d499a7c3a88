r"""LightNet: additive linear attention; each channel of the memory is a softmax average over time, in one scan.

    z_t = logsumexp_{j <= t} k_j  (per channel),   h_t = sum_{j <= t} exp(k_j - z_t) v_j^T,   o_t = scale h_t^T q_t
    as a recurrence: g_t = z_{t-1} - z_t <= 0,   h_t = diag(exp(g_t)) h_{t-1} + exp(k_t - z_t) v_t^T

k holds logits, q is used as it is (the layer applies silu). Sums have no order, so the bidirectional form needs one pass:
h = softmax(K over tokens)^T V, o_i = scale h^T q_i. ``z_init="empty"``: the first key has weight 1 (z_0 = -inf); ``"zero"``: a
virtual token of logit 0 and value 0 came first, as in the authors' later code. Order comes from positional maps (`md_tpe`,
`md_lrpe` in qkv.ops._common.positions). Definition from two re-implementations, the official code being gone.

State: h ``[B, H, D, E]`` and z ``[B, H, D]`` (-1e30 before the first token); neither is of use without the other.

No setting makes it another operator of this library.

Axes: B batch, H query heads, G key/value heads, N queries, M keys, C chunk, D key width, E value width.
Qin et al. 2024, You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet, arXiv:2405.21022.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.core.errors import InvalidParameter
from qkv.core.operator import Operator, OperatorSpec, Wiring
from qkv.core.spec import param
from qkv.core.state import State
from qkv.ops._common.decayed import Form, core_limit, decayed_linear_attention
from qkv.ops._common.states import after, per_head, wide
from qkv.ops._common.sums import EMPTY, softmax_weights

Start = Literal["empty", "zero"]


def reference(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = True, padding: Tensor | None = None,
    initial_state: State | None = None, return_state: bool = False, z_init: Start = "empty",
) -> Any:  # fmt: skip
    """The softmax averages written out, ``[B, H, N, M, D]`` weights.

    q ``[B, H, N, D]``, k ``[B, G, M, D]``, v ``[B, G, M, E]`` -> ``[B, H, N, E]``, or that and the state.
    """
    k, v = per_head(q, k, v)
    h0, z0 = _memory(q, v, initial_state, z_init)
    logits = k.to(wide(k))
    if padding is not None:
        logits = logits.masked_fill(~padding[:, None, :, None], EMPTY)
    every = torch.cat([z0.unsqueeze(2), logits], 2).unsqueeze(2)  # the start counts as one token, [B, H, 1, 1 + M, D]
    if causal:
        n = q.shape[2]
        later = torch.ones(n, n + 1, dtype=torch.bool, device=q.device).triu(2)
        every = every.expand(-1, -1, n, -1, -1).masked_fill(later[..., None], EMPTY)
    weights = every.softmax(3)
    weights = weights.masked_fill(every <= EMPTY / 2, 0.0).to(q.dtype).expand(-1, -1, q.shape[2], -1, -1)
    out = torch.einsum("bhnd,bhnmd->bhnm", q, weights[..., 1:, :]) @ v
    out = scale * (out + (q * weights[..., 0, :]) @ h0.to(q.dtype))
    if not return_state:
        return out
    z = every[:, :, -1].logsumexp(2)
    last = (every[:, :, -1] - z.unsqueeze(2)).exp().masked_fill(every[:, :, -1] <= EMPTY / 2, 0.0)
    h = last[:, :, :1].mT * h0 + last[:, :, 1:].mT @ v.to(z)
    return out, after("lightnet", initial_state, k.shape[2], state=h, z=z.clamp(min=EMPTY))


def loop(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = True, padding: Tensor | None = None,
    initial_state: State | None = None, return_state: bool = False, z_init: Start = "empty",
) -> Any:  # fmt: skip
    """The recurrence, token by token; shapes as in `reference`."""
    k, v = per_head(q, k, v)
    h, z = _memory(q, v, initial_state, z_init)
    outs = []
    for t in range(k.shape[2]):
        new = torch.logaddexp(z, k[:, :, t])
        h_new = (z - new).exp().unsqueeze(-1) * h + (k[:, :, t] - new).exp().unsqueeze(-1) * v[:, :, t].unsqueeze(-2)
        if padding is not None:
            here = padding[:, t, None, None]
            new, h_new = torch.where(here, new, z), torch.where(here.unsqueeze(-1), h_new, h)
        h, z = h_new, new
        if causal:
            outs.append(scale * torch.einsum("bhd,bhde->bhe", q[:, :, t], h))
    out = torch.stack(outs, 2) if causal else scale * q @ h
    return (out, after("lightnet", initial_state, k.shape[2], state=h, z=z)) if return_state else out


def fast(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = True, padding: Tensor | None = None,
    initial_state: State | None = None, return_state: bool = False, z_init: Start = "empty", chunk_size: int = 64,
    sub_chunk: int = 16, form: Form = "chunked",
) -> Any:  # fmt: skip
    """Causal: z by a scan, then decayed linear attention in this form. Bidirectional: one pass. Shapes as in `reference`."""
    dtype = q.dtype
    q, k, v = (x.to(wide(x)) for x in (q, *per_head(q, k, v)))
    h0, z0 = _memory(q, v, initial_state, z_init)
    if padding is not None:
        k = k.masked_fill(~padding[:, None, :, None], EMPTY)
    if not causal:
        z = torch.logaddexp(k.logsumexp(2), z0)
        return (scale * q @ (softmax_weights(k, z.unsqueeze(2)).mT @ v)).to(dtype)
    z = torch.cat([z0.unsqueeze(2), k], 2).logcumsumexp(2)  # [B, H, 1 + N, D]
    before, z = z[:, :, :-1], z[:, :, 1:]
    g = (before - z).clamp(max=0.0).masked_fill(before <= EMPTY / 2, 0.0)  # nothing was there: nothing fades
    out, h, _ = decayed_linear_attention(
        q,
        softmax_weights(k, z),
        v,
        log_decay=g,
        scale=scale,
        state=h0,
        form=form,
        chunk_size=chunk_size,
        sub_chunk=sub_chunk,
    )
    out = out.to(dtype)
    return (out, after("lightnet", initial_state, q.shape[2], state=h, z=z[:, :, -1])) if return_state else out


fused = partial(fast, form="triton")  # the core's kernel has tiles of its own: chunk_size shapes `fast` alone


def initial(q: Tensor, k: Tensor, v: Tensor, *, z_init: Start = "empty") -> State:
    """The empty state."""
    h, z = _memory(q, v, None, z_init)
    return after("lightnet", None, 0, state=h, z=z)


def step(
    q: Tensor, k: Tensor, v: Tensor, state: State, *, scale: float, padding: Tensor | None = None
) -> tuple[Tensor, State]:
    """One token: q ``[B, H, 1, D]``, k ``[B, G, 1, D]``, v ``[B, G, 1, E]`` -> out ``[B, H, 1, E]``, new state."""
    dtype = q.dtype
    q, k, v = (x.to(wide(x)) for x in (q, *per_head(q, k, v)))
    h, z = _memory(q, v, state, "empty")
    if padding is not None:
        k = k.masked_fill(~padding[:, None, :, None], EMPTY)
    key = k[:, :, 0]
    new = torch.logaddexp(z, key)
    keep = (z - new).clamp(max=0.0).masked_fill(z <= EMPTY / 2, 0.0).exp()
    h = keep.unsqueeze(-1) * h + softmax_weights(key, new).unsqueeze(-1) * v
    return (scale * q @ h).to(dtype), after("lightnet", state, 1, state=h, z=new)


def _memory(q: Tensor, v: Tensor, state: State | None, z_init: Start) -> tuple[Tensor, Tensor]:
    """Averages h ``[B, H, D, E]`` and z ``[B, H, D]``."""
    b, h, _, d = q.shape
    if state is None:
        z = 0.0 if z_init == "zero" else EMPTY
        return q.new_zeros(b, h, d, v.shape[-1], dtype=wide(q)), q.new_full((b, h, d), z, dtype=wide(q))
    state.of("lightnet", state=(b, h, d, v.shape[-1]), z=(b, h, d))
    return state["state"], state["z"]


@final
@dataclass(frozen=True, kw_only=True)
class LightNet(Operator):
    """Additive linear attention: softmax averages over time, per channel."""

    spec: ClassVar[OperatorSpec] = OperatorSpec(
        id="lightnet",
        title="LightNet",
        paper="arXiv:2405.21022",
        source="code",
        summary="Linear attention whose memory is, per key channel, a softmax average of the values so far; the decay follows "
        "from the keys, and the bidirectional form is one pass without directions.",
        shown="Loss on real text between plain linear attention and gated linear attention of equal size.",
        honest="Old tokens fade only as new mass arrives: no gate can clear the memory.",
        trials=({}, {"chunk_size": 6, "sub_chunk": 3, "z_init": "zero"}),
        causal="both",
        cross="bidirectional",
        reference=reference,
        fast=fast,
        loop=loop,
        initial=initial,
        step=step,
        kernel="qkv.ops.lightnet:fused",
        kernel_limit=core_limit,
        wiring=Wiring(queries=F.silu),
    )
    z_init: Literal["empty", "zero"] = param(
        "empty", "what came before the first token: nothing, or a virtual token of logit and value 0"
    )
    chunk_size: int = param(64, "tokens per chunk: matmuls inside, one state between", low=1)
    sub_chunk: int = param(16, "tokens per diagonal block inside a chunk; divides chunk_size", low=1)

    def validate(self) -> None:
        """chunk_size is a multiple of sub_chunk."""
        if self.chunk_size % self.sub_chunk:
            raise InvalidParameter(
                f"lightnet: chunk_size={self.chunk_size} must be a multiple of sub_chunk={self.sub_chunk}"
            )
