r"""Lightning Attention-2: causal linear attention with one fixed exponential decay per head, in blocks.

    o_t = sum_{j <= t} lam_h^(t - j) (q_t . k_j) v_j,     lam_h = exp(-s_h),  slopes s_h >= 0
        = S_t^T q_t,     S_t = lam S_{t-1} + k_t v_t^T

No softmax, no denominator, no 1/sqrt(D): whoever calls it normalises the output. The blocks are those of the paper's
`parallel` kernel: what the blocks add to the state by matmuls, a scan over the block states, the outputs by matmuls. The state
is S_t itself; the official kernel holds lam S_t, so its states must not be handed over here.

Slopes of released models come from `qkv.ops._common.slopes.decay_slopes`; another library of the same operator name uses
(8 / H) (1 - l / L) h with h from 0 and a scale of 1/sqrt(D): pass `slopes` and `scale` instead of guessing.

Axes: B batch, H query heads, G key/value heads, N tokens, C chunk, D key width, E value width.
Qin et al. 2024, Lightning Attention-2, arXiv:2401.04658.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.core.operator import Operator, OperatorSpec, Wiring
from qkv.core.spec import Extra, Learnt, Limit, Place, param
from qkv.core.state import State
from qkv.ops._common.decayed import Form, core_limit, decayed_linear_attention, one_token
from qkv.ops._common.slopes import decay_slopes
from qkv.ops._common.states import after, matrix, per_head, wide

FORMS: dict[str, Literal["chunked", "recurrent", "quadratic"]] = {
    "chunk": "chunked",
    "recurrent": "recurrent",
    "quadratic": "quadratic",
}


def reference(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, slopes: Tensor | None = None, padding: Tensor | None = None,
    initial_state: State | None = None, return_state: bool = False,
) -> Any:  # fmt: skip
    """The quadratic definition. q ``[B, H, N, D]``, k ``[B, G, N, D]``, v ``[B, G, N, E]`` -> ``[B, H, N, E]`` (and a state)."""
    k, v = per_head(q, k, v)
    real = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device) if padding is None else padding
    rate = q.new_zeros(q.shape[1], dtype=wide(q)) if slopes is None else slopes.to(wide(q))
    place = real.cumsum(-1)[:, None, :].to(rate)  # number of the token among the real ones, [B, 1, N]
    age = (place.unsqueeze(-1) - place.unsqueeze(-2)).clamp(min=0)  # [B, 1, N, N]
    decay = (-rate[:, None, None] * age).exp().tril() * real[:, None, None]
    start = matrix("lightning2", q, v, initial_state)
    into = (-rate[:, None] * place).exp().unsqueeze(-1)  # what is left of the start, [B, H, N, 1]
    out = scale * ((q @ k.mT * decay.to(q.dtype)) @ v + (q * into.to(q.dtype)) @ start.to(q.dtype))
    if not return_state:
        return out
    rest = (-rate[:, None] * (place[..., -1:] - place)).exp() * real[:, None]  # [B, H, N]
    state = into[:, :, -1:] * start + (k * rest.unsqueeze(-1)).mT @ v.to(rest)
    return out, after("lightning2", initial_state, q.shape[2], state=state)


def loop(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, slopes: Tensor | None = None, padding: Tensor | None = None,
    initial_state: State | None = None, return_state: bool = False,
) -> Any:  # fmt: skip
    """The recurrent definition, token by token; shapes as in `reference`."""
    k, v = per_head(q, k, v)
    state, outs = matrix("lightning2", q, v, initial_state), []
    keep = 1.0 if slopes is None else (-slopes).exp()[:, None, None]
    for t in range(q.shape[2]):
        new = keep * state + torch.einsum("bhd,bhe->bhde", k[:, :, t], v[:, :, t])
        state = new if padding is None else torch.where(padding[:, t, None, None, None], new, state)
        outs.append(scale * torch.einsum("bhd,bhde->bhe", q[:, :, t], state))
    out = torch.stack(outs, 2)
    return (out, after("lightning2", initial_state, q.shape[2], state=state)) if return_state else out


def fast(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, slopes: Tensor | None = None, padding: Tensor | None = None,
    initial_state: State | None = None, return_state: bool = False, chunk_size: int = 64,
    mode: Literal["chunk", "recurrent", "quadratic"] = "chunk", form: Form | None = None,
) -> Any:  # fmt: skip
    """The same map in O(N C); shapes as in `reference`. form: of `decayed_linear_attention`, in place of `mode`."""
    start = None if initial_state is None else matrix("lightning2", q, v, initial_state)
    out, state, _ = decayed_linear_attention(
        q, k, v, log_decay=None if slopes is None else -slopes.to(wide(q)), scale=scale, state=start, padding=padding,
        form=form or FORMS[mode], chunk_size=chunk_size, sub_chunk=chunk_size,
    )  # fmt: skip
    return (out, after("lightning2", initial_state, q.shape[2], state=state)) if return_state else out


fused = partial(fast, form="triton")  # the core's kernel has tiles of its own: chunk_size shapes `fast` alone


def initial(q: Tensor, k: Tensor, v: Tensor, *, slopes: Tensor | None = None) -> State:
    """The empty state, ``[B, H, D, E]`` zeros in float32 (float64 for float64 inputs)."""
    return after("lightning2", None, 0, state=matrix("lightning2", q, v, None))


def step(
    q: Tensor, k: Tensor, v: Tensor, state: State, *, scale: float, slopes: Tensor | None = None,
    padding: Tensor | None = None,
) -> tuple[Tensor, State]:  # fmt: skip
    """One token: q ``[B, H, 1, D]``, k ``[B, G, 1, D]``, v ``[B, G, 1, E]`` -> out ``[B, H, 1, E]``, new state."""
    return fast(
        q, k, v, scale=scale, slopes=slopes, padding=padding, initial_state=state, return_state=True,
        form=one_token(q, v),
    )  # fmt: skip


def _released(place: Place) -> Tensor:
    """The slopes of released models."""
    return decay_slopes(place.heads, place.layer, place.layers)


@final
@dataclass(frozen=True, kw_only=True)
class Lightning2(Operator):
    """Linear attention with a fixed decay per head, in blocks."""

    spec: ClassVar[OperatorSpec] = OperatorSpec(
        id="lightning2",
        title="Lightning Attention-2",
        paper="arXiv:2401.04658",
        source="code",
        summary="Causal linear attention with one fixed decay per head: a masked product inside blocks, one state between "
        "them, so that time per token does not depend on the length.",
        shown="Equal to the whole map on real text; time per token flat in the length where softmax attention's grows.",
        honest="Scores have no bound and nothing is normalised: use bfloat16 or float32 and a norm after it; what fades does "
        "so at a fixed rate, whatever the text says.",
        limits=(Limit(equals="linear", inputs={"slopes": 0.0}, says="without decay: plain causal linear attention"),),
        trials=({}, {"chunk_size": 5}, {"mode": "recurrent"}, {"mode": "quadratic"}),
        causal="only",
        cross=False,
        scale=lambda d: 1.0,
        reference=reference,
        fast=fast,
        loop=loop,
        initial=initial,
        step=step,
        kernel="qkv.ops.lightning2:fused",
        kernel_limit=core_limit,
        extras={
            "slopes": Extra(
                axes="h",
                sample=torch.rand,
                role="parameter",
                low=0.0,
                required=False,
                extremes=(0.0, 1e-30, 20.0, 1e4),
                doc="what a step takes from the log of the state, at least 0; without it nothing fades",
                learnt=Learnt(axes="h", start=_released, trained=False),
            )
        },
        wiring=Wiring(queries=F.silu, keys=F.silu),
    )
    chunk_size: int = param(64, "tokens per block: matmuls inside, one state between", low=1)
    mode: Literal["chunk", "recurrent", "quadratic"] = param(
        "chunk", "how the same map is computed: blocks, one token after the other, or the whole map"
    )
