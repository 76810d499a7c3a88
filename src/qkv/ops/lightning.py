r"""TransNormerLLM's token mixing: linear attention with fixed decays that differ by head and layer, positions in the first layer.

    o_t = sum_{j <= t} lam^(t - j) (f(q_t) . f(k_j)) v_j,     lam_h,l = exp(-s_h (1 - l / (L - 1) + 1e-5))

    with s_h = 2^(-8 (h + 1) / H)

f is silu; in layer 0 it is followed by LRPE, x -> [x cos(p theta), x sin(p theta)] with theta over (head, channel) and p the
absolute position of the token (padding not counted), which doubles the key width. No softmax, no denominator: SRMSNorm over all
heads, the linear gate and the output projection follow in the layer. ``slopes="paper"`` is the rule of the paper's text,
exp(-(8 h / H) (1 - l / L)), which leaves open where h starts: at 1 here, so that every head decays. Released weights use
``alibi``.

State: S ``[B, H, D', E]``, D' = 2 D with LRPE, and the position ``[B]`` that LRPE goes on from.

Axes: B batch, H query heads, G key/value heads, N tokens, C chunk, D key width, E value width, l layer of L.
Qin et al. 2024, Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention, arXiv:2405.17381.
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
from qkv.core.spec import Deviation, Limit, param
from qkv.core.state import State
from qkv.ops._common.decayed import Form, core_limit, decayed_linear_attention, one_token, too_wide
from qkv.ops._common.positions import lrpe, lrpe_angles
from qkv.ops._common.slopes import decay_slopes
from qkv.ops._common.states import after, matrix, per_head, wide


def reference(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, padding: Tensor | None = None, initial_state: State | None = None,
    return_state: bool = False, layer: int = 0, layers: int = 1, slopes: str = "alibi", use_lrpe: bool | None = None,
    activation: str = "silu",
) -> Any:  # fmt: skip
    """The quadratic definition. q ``[B, H, N, D]``, k ``[B, G, N, D]``, v ``[B, G, N, E]`` -> ``[B, H, N, E]`` (and a state)."""
    turned = _turns(layer, use_lrpe)
    q, k, v, place = _mapped(q, k, v, padding, _start(q, initial_state), turned, activation)
    rate = decay_slopes(q.shape[1], layer, layers, slopes, q.device).to(wide(q))  # type: ignore[arg-type]
    real = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device) if padding is None else padding
    passed = real.cumsum(-1)[:, None].to(rate)  # real tokens so far, [B, 1, N]
    age = (passed.unsqueeze(-1) - passed.unsqueeze(-2)).clamp(min=0)
    decay = (-rate[:, None, None] * age).exp().tril() * real[:, None, None]  # [B, H, N, N]
    start = matrix("lightning", q, v, initial_state)
    into = (-rate[:, None] * passed).exp().unsqueeze(-1)  # [B, H, N, 1]
    out = scale * ((q @ k.mT * decay.to(q.dtype)) @ v + (q * into.to(q.dtype)) @ start.to(q.dtype))
    if not return_state:
        return out
    rest = (-rate[:, None] * (passed[..., -1:] - passed)).exp() * real[:, None]
    state = into[:, :, -1:] * start + (k * rest.unsqueeze(-1)).mT @ v.to(rest)
    return out, after("lightning", initial_state, q.shape[2], state=state, position=place[:, -1] + real[:, -1])


def loop(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, padding: Tensor | None = None, initial_state: State | None = None,
    return_state: bool = False, layer: int = 0, layers: int = 1, slopes: str = "alibi", use_lrpe: bool | None = None,
    activation: str = "silu",
) -> Any:  # fmt: skip
    """The recurrent definition, token by token; shapes as in `reference`."""
    _, h, n, d = q.shape
    k, v = (x.repeat_interleave(h // x.shape[1], 1) for x in (k, v))
    turned = use_lrpe if use_lrpe is not None else layer == 0
    keep = (-decay_slopes(h, layer, layers, slopes, q.device)).exp().to(wide(q))[:, None, None]  # type: ignore[arg-type]
    state = matrix("lightning", q, v, initial_state, width=2 * d if turned else d)
    place = _start(q, initial_state)
    theta = torch.tensor(
        [[10000 ** (-2 * (i * d + c) / (h * d)) for c in range(d)] for i in range(h)],
        dtype=torch.float64,
        device=q.device,
    )
    outs = []
    for t in range(n):
        key, query = k[:, :, t], q[:, :, t]
        if activation == "silu":
            key, query = key * key.sigmoid(), query * query.sigmoid()
        if turned:
            angle = place.to(torch.float64)[:, None, None] * theta
            key, query = (torch.cat([x * angle.cos().to(x), x * angle.sin().to(x)], -1) for x in (key, query))
        new, there = keep * state + key.unsqueeze(-1) * v[:, :, t].unsqueeze(-2), 1
        if padding is not None:
            new, there = torch.where(padding[:, t, None, None, None], new, state), padding[:, t].long()
        state, place = new, place + there
        outs.append(scale * (query.unsqueeze(-2) @ state)[..., 0, :])
    out = torch.stack(outs, 2)
    return (out, after("lightning", initial_state, n, state=state, position=place)) if return_state else out


def fast(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, padding: Tensor | None = None, initial_state: State | None = None,
    return_state: bool = False, layer: int = 0, layers: int = 1, slopes: str = "alibi", use_lrpe: bool | None = None,
    activation: str = "silu", chunk_size: int = 64, form: Form = "chunked",
) -> Any:  # fmt: skip
    """The same map in O(N C); shapes as in `reference`."""
    dtype, turned = q.dtype, _turns(layer, use_lrpe)
    q, k, v = (x.to(wide(x)) for x in (q, k, v))
    q, k, v, place = _mapped(q, k, v, padding, _start(q, initial_state), turned, activation)
    rate = decay_slopes(q.shape[1], layer, layers, slopes, q.device)  # type: ignore[arg-type]
    start = None if initial_state is None else matrix("lightning", q, v, initial_state)
    form = one_token(q, v) if form == "recurrent" else form
    out, state, _ = decayed_linear_attention(
        q, k, v, log_decay=None if slopes == "flat" else -rate.to(q), scale=scale, state=start, padding=padding, form=form,
        chunk_size=chunk_size, sub_chunk=chunk_size,
    )  # fmt: skip
    last = 1 if padding is None else padding[:, -1].long()
    out = out.to(dtype)
    return (
        (out, after("lightning", initial_state, q.shape[2], state=state, position=place[:, -1] + last))
        if return_state
        else out
    )


fused = partial(fast, form="triton")  # the core's kernel has tiles of its own: chunk_size shapes `fast` alone


def initial(q: Tensor, k: Tensor, v: Tensor, *, layer: int = 0, use_lrpe: bool | None = None) -> State:
    """The empty state at position 0."""
    width = q.shape[-1] * (2 if _turns(layer, use_lrpe) else 1)
    return after("lightning", None, 0, state=matrix("lightning", q, v, None, width), position=_start(q, None))


def step(
    q: Tensor, k: Tensor, v: Tensor, state: State, *, scale: float, padding: Tensor | None = None, layer: int = 0,
    layers: int = 1, slopes: str = "alibi", use_lrpe: bool | None = None, activation: str = "silu",
) -> tuple[Tensor, State]:  # fmt: skip
    """One token: q ``[B, H, 1, D]``, k ``[B, G, 1, D]``, v ``[B, G, 1, E]`` -> out ``[B, H, 1, E]``, new state."""
    return fast(
        q, k, v, scale=scale, padding=padding, initial_state=state, return_state=True, layer=layer, layers=layers,
        slopes=slopes, use_lrpe=use_lrpe, activation=activation, form="recurrent",
    )  # fmt: skip


def _limit(q: Tensor, k: Tensor, v: Tensor, *, layer: int, use_lrpe: bool | None, **parameters: Any) -> str | None:
    """Rotated keys are twice as wide."""
    return core_limit(q, k, v) or (too_wide(2 * q.shape[-1], v.shape[-1]) if _turns(layer, use_lrpe) else None)


def _turns(layer: int, use_lrpe: bool | None) -> bool:
    return layer == 0 if use_lrpe is None else use_lrpe


def _start(q: Tensor, state: State | None) -> Tensor:
    """Positions ``[B]`` the sequence goes on from."""
    if state is None:
        return torch.zeros(q.shape[0], dtype=torch.int64, device=q.device)
    return state.of("lightning", position=(q.shape[0],))["position"]


def _mapped(
    q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, start: Tensor, turned: bool, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features of q and k, k and v for every query head, and positions ``[B, N]``."""
    k, v = per_head(q, k, v)
    if padding is None:
        place = start[:, None] + torch.arange(q.shape[2], device=q.device)
    else:
        place = start[:, None] + padding.cumsum(-1) - padding.long()
    if activation == "silu":
        q, k = F.silu(q), F.silu(k)
    if turned:
        angles = lrpe_angles(q.shape[1], q.shape[3], q.device)
        q, k = lrpe(q, place, angles), lrpe(k, place, angles)
    return q, k, v, place


@final
@dataclass(frozen=True, kw_only=True)
class Lightning(Operator):
    """Linear attention with the fixed decays of TransNormerLLM."""

    spec: ClassVar[OperatorSpec] = OperatorSpec(
        id="lightning",
        title="Lightning Attention (TransNormerLLM)",
        paper="arXiv:2405.17381",
        source="code",
        summary="Linear attention with silu features and one fixed decay per head, weaker in later layers; cosine positions "
        "in the first layer; a state of constant size.",
        shown="A small byte model with the decays reaches a clearly lower loss than the same model without them.",
        honest="The decays are set by head and layer number, not by the text; no denominator, so a norm must follow.",
        limits=(
            Limit(
                equals="lightning2",
                parameters={"slopes": "flat", "use_lrpe": False, "activation": "identity"},
                says="no decay, no positions, no feature map: plain causal linear attention, unscaled",
            ),
        ),
        deviations=(
            Deviation("head_permutation", "the decay and the angles belong to the number of the head, by definition"),
        ),
        trials=({}, {"layer": 3, "layers": 5, "chunk_size": 5}, {"layer": 1, "layers": 4, "slopes": "paper"}),
        causal="only",
        cross=False,
        scale=lambda d: 1.0,
        reference=reference,
        fast=fast,
        loop=loop,
        initial=initial,
        step=step,
        kernel="qkv.ops.lightning:fused",
        kernel_limit=_limit,
        wiring=Wiring(settings=lambda place: {"layer": place.layer, "layers": place.layers}),
    )
    layer: int = param(0, "number of the layer, from 0", low=0)
    layers: int = param(24, "layers of the model; the last one hardly decays", low=1)
    slopes: Literal["alibi", "paper", "flat"] = param(
        "alibi", "rule of the decays: as released weights have them, as the paper writes them, or no decay"
    )
    use_lrpe: bool | None = param(None, "cosine positions that double the key width; null: in layer 0 only")
    activation: Literal["silu", "identity"] = param("silu", "feature map of queries and keys")
    chunk_size: int = param(64, "tokens per block: matmuls inside, one state between", low=1)

    def validate(self) -> None:
        """The layer is one of the layers."""
        if self.layer >= self.layers:
            raise InvalidParameter(f"lightning: layer={self.layer} must be less than layers={self.layers}")
