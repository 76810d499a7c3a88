r"""ESSA: attention by the squared spectral correlation of centred channels, linear in the number of tokens.

    xc = x - mean_d x,   psi(x) = xc^2 / (|xc|^2 + eps)   (elementwise square; entries >= 0 that sum to about 1)
    out_i = v_i + (1 / sqrt N) sum_d psihat(q_i)_d [sum_j psi(k_j)_d v_j] / |psi(k)_d|

psihat(q) = psi(q) / |psi(q)|_2 over channels; |psi(k)_d| is the norm of channel d over the tokens of the image. Adding a
constant to all channels of a query or key, or scaling it, changes nothing (up to eps): brightness and illumination of a
spectrum. The kernel is even: it cannot tell a spectrum from its negative. v_i is the zeroth order of the series, a shortcut
past attention; no row is normalised. ``order=2`` adds the term of fourth powers, psi^2, normalised like the first (the
authors sketch it and leave it out; the normalisation is our completion).

Causal, the prefix version of the same formula: sums, norms and the count N run over the tokens so far; the division is per
channel, so it stays a recurrence. State: KV ``[B, H, F, E]``, `norms` (sums of psi(k)^2) ``[B, H, F]``, `count` ``[B]``.

Statistics are over the channels of a head; the published layer has one head as wide as the model. The number of tokens N
enters: the result depends on the size of the image, and padding is not counted.

No setting makes it another operator of this library.

Axes: B batch, H query heads, G key/value heads, N tokens, D key width, F = order D features, E value width.
Zhang et al. 2023, ESSAformer: Efficient Transformer for Hyperspectral Image Super-resolution, arXiv:2307.14010.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.core.operator import Operator, OperatorSpec
from qkv.core.spec import param
from qkv.core.state import State
from qkv.ops._common.decayed import Form, core_limit, decayed_linear_attention, one_token, too_wide
from qkv.ops._common.states import after, matrix, per_head, wide
from qkv.ops._common.sums import without_padding

FLOOR = 1e-24  # least square of a norm that is divided by
KeyNorm = Literal["token_l2"] | None


def reference(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, padding: Tensor | None = None,
    initial_state: State | None = None, return_state: bool = False, key_norm: KeyNorm = "token_l2", order: int = 1,
    value_residual: bool = True, eps: float = 1e-7,
) -> Any:  # fmt: skip
    """The map ``[B, H, N, N]`` written out, norms of every prefix by a masked sum.

    q ``[B, H, N, D]``, k ``[B, G, N, D]``, v ``[B, G, N, E]`` -> ``[B, H, N, E]``, or that and the state.
    """
    dtype, n = q.dtype, q.shape[2]
    k, v = per_head(q, k, v)
    kv, norms, count = _memory(q, v, initial_state, order)
    v, psi_k, psi_q = v.to(kv), without_padding(_psi(k, eps, order), padding), _unit(_psi(q, eps, order), order)
    real = psi_k.new_ones(q.shape[0], n) if padding is None else padding.to(psi_k)
    seen = torch.ones(n, n, dtype=torch.bool, device=q.device)
    seen = (seen.tril() if causal else seen).to(psi_k)
    total = seen @ psi_k.square() + norms.unsqueeze(2)  # [B, H, N, F]
    tokens = (seen @ real.unsqueeze(-1)).squeeze(-1) + count[:, None]  # [B, N]
    read = psi_q * _inverse(total, key_norm) / tokens.clamp(min=1.0).sqrt()[:, None, :, None]
    out = (read @ psi_k.mT * seen) @ v + read @ kv + (v if value_residual else 0.0)
    if not return_state:
        return out.to(dtype)
    return out.to(dtype), _state(kv + psi_k.mT @ v, total[:, :, -1], tokens[:, -1], initial_state, n)


def loop(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, padding: Tensor | None = None,
    initial_state: State | None = None, return_state: bool = False, key_norm: KeyNorm = "token_l2", order: int = 1,
    value_residual: bool = True, eps: float = 1e-7,
) -> Any:  # fmt: skip
    """Causal: token by token. Bidirectional: one row and head after the other, by `F.normalize`. Shapes as in `reference`."""
    k, v = per_head(q, k, v)
    kv, norms, count = _memory(q, v, initial_state, order)
    if not causal:
        outs = torch.zeros_like(v)
        for b in range(q.shape[0]):
            keep = slice(None) if padding is None else padding[b]
            for h in range(q.shape[1]):
                a, c, values = q[b, h, keep], k[b, h, keep], v[b, h, keep]
                outs[b, h, keep] = values if value_residual else 0.0
                for power in range(2, 2 * order + 1, 2):
                    f, g = (((x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) * x.shape[-1] + eps).sqrt())
                            ** power for x in (a, c))  # fmt: skip
                    g = F.normalize(g, dim=0) if key_norm == "token_l2" else g
                    outs[b, h, keep] += F.normalize(f, dim=-1) @ (g.mT @ values) / len(a) ** 0.5
        return outs
    outs = []
    for t in range(q.shape[2]):
        now = q.new_ones(q.shape[0]) if padding is None else padding[:, t].to(q)
        f = _psi(k[:, :, t], eps, order) * now[:, None, None]
        kv, norms, count = kv + f.unsqueeze(-1) * v[:, :, t].unsqueeze(-2), norms + f**2, count + now
        read = _unit(_psi(q[:, :, t], eps, order), order)
        if key_norm == "token_l2":
            read = read / norms.sqrt().clamp(min=FLOOR**0.5)
        out = (read.unsqueeze(-2) @ kv)[..., 0, :] / count.clamp(min=1.0).sqrt()[:, None, None]
        outs.append(out + v[:, :, t] if value_residual else out)
    out = torch.stack(outs, 2)
    return (out, _state(kv, norms, count, initial_state, q.shape[2])) if return_state else out


def fast(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, padding: Tensor | None = None,
    initial_state: State | None = None, return_state: bool = False, key_norm: KeyNorm = "token_l2", order: int = 1,
    value_residual: bool = True, eps: float = 1e-7, chunk_size: int = 64,
    form: Form = "chunked",
) -> Any:  # fmt: skip
    """The same map in O(N D E): keys with values first; causal in chunks. Shapes as in `reference`.

    form: how the causal sums are made, see `decayed_linear_attention`.
    """
    dtype, n = q.dtype, q.shape[2]
    k, v = per_head(q, k, v)
    v, psi_k, psi_q = v.to(wide(q)), without_padding(_psi(k, eps, order), padding), _unit(_psi(q, eps, order), order)
    real = psi_k.new_ones(q.shape[0], n) if padding is None else padding.to(psi_k)
    if not causal:
        tokens = real.sum(1).clamp(min=1.0)[:, None, None, None]
        memory = _inverse(psi_k.square().sum(2), key_norm).unsqueeze(-1) * (psi_k.mT @ v)
        out = psi_q @ (memory / tokens.sqrt())
        return (out + v if value_residual else out).to(dtype)
    kv, norms, count = _memory(q, v, initial_state, order)
    total = psi_k.square().cumsum(2) + norms.unsqueeze(2)
    tokens = real.cumsum(1) + count[:, None]
    read = psi_q * _inverse(total, key_norm) / tokens.clamp(min=1.0).sqrt()[:, None, :, None]
    out, kv, _ = decayed_linear_attention(
        read,
        psi_k,
        v,
        state=None if initial_state is None else kv,
        form=form,
        chunk_size=chunk_size,
        sub_chunk=chunk_size,
    )
    out = (out + v if value_residual else out).to(dtype)
    return (out, _state(kv, total[:, :, -1], tokens[:, -1], initial_state, n)) if return_state else out


fused = partial(fast, form="triton")  # the core's kernel has tiles of its own: chunk_size shapes `fast` alone


def initial(q: Tensor, k: Tensor, v: Tensor, *, order: int = 1) -> State:
    """The empty state: zeros in float32 (float64 for float64 inputs)."""
    return _state(*_memory(q, v, None, order), None, 0)


def step(
    q: Tensor, k: Tensor, v: Tensor, state: State, *, padding: Tensor | None = None, key_norm: KeyNorm = "token_l2",
    order: int = 1, value_residual: bool = True, eps: float = 1e-7,
) -> tuple[Tensor, State]:  # fmt: skip
    """One token: q ``[B, H, 1, D]``, k ``[B, G, 1, D]``, v ``[B, G, 1, E]`` -> out ``[B, H, 1, E]``, new state."""
    return fast(
        q, k, v, padding=padding, initial_state=state, return_state=True, key_norm=key_norm, order=order,
        value_residual=value_residual, eps=eps, form=one_token(q, v),
    )  # fmt: skip


def _limit(q: Tensor, k: Tensor, v: Tensor, *, order: int, **parameters: Any) -> str | None:
    """Each order is as wide as the keys."""
    return core_limit(q, k, v) or too_wide(order * q.shape[-1], v.shape[-1])


def _psi(x: Tensor, eps: float, order: int) -> Tensor:
    """Features ``[..., D]`` -> ``[..., order D]``: psi and, at order 2, psi^2; float32 or wider, for the squares."""
    x = x.to(wide(x))
    square = (x - x.mean(-1, keepdim=True)).square()
    psi = square / (square.sum(-1, keepdim=True) + eps)
    return psi if order == 1 else torch.cat([psi, psi.square()], -1)


def _unit(psi: Tensor, order: int) -> Tensor:
    """Each order divided by its norm over channels."""
    parts = psi.unflatten(-1, (order, -1))
    return (parts * parts.square().sum(-1, keepdim=True).clamp(min=FLOOR).rsqrt()).flatten(-2)


def _inverse(squares: Tensor, key_norm: KeyNorm) -> Tensor:
    """1 / norm of the keys' channels from sums of squares, or ones."""
    return squares.clamp(min=FLOOR).rsqrt() if key_norm == "token_l2" else torch.ones_like(squares)


def _memory(q: Tensor, v: Tensor, state: State | None, order: int) -> tuple[Tensor, Tensor, Tensor]:
    """KV ``[B, H, F, E]``, norms ``[B, H, F]``, count ``[B]``."""
    (b, h), f = q.shape[:2], order * q.shape[-1]
    kv = matrix("essa", q, v, state, width=f)
    if state is None:
        return kv, kv.new_zeros(b, h, f), kv.new_zeros(b)
    state.of("essa", norms=(b, h, f), count=(b,))
    return kv, state["norms"], state["count"]


def _state(kv: Tensor, norms: Tensor, count: Tensor, before: State | None, tokens: int) -> State:
    return after("essa", before, tokens, state=kv, norms=norms, count=count)


@final
@dataclass(frozen=True, kw_only=True)
class ESSA(Operator):
    """Linear attention by spectral correlation."""

    spec: ClassVar[OperatorSpec] = OperatorSpec(
        id="essa",
        title="ESSA: spectral-correlation attention (ESSAformer)",
        paper="arXiv:2307.14010",
        source="code",
        summary="Attention by the squared correlation of centred channels, which ignores brightness and contrast of each "
        "token and factorises, so that its cost is linear in the number of pixels.",
        shown="On a real image whose pixels are scaled and shifted one by one the attention stays, where dot products change; "
        "a small super-resolution network with it beats bicubic interpolation.",
        honest="A spectrum and its negative look the same, no row is normalised, and what a token reads depends on how many "
        "tokens there are; checked on stacked bands of colour photographs, no package holding a hyperspectral cube.",
        trials=({}, {"chunk_size": 5}, {"key_norm": None, "value_residual": False}, {"order": 2, "chunk_size": 4}),
        causal="both",
        cross=False,
        scale=None,
        reference=reference,
        fast=fast,
        loop=loop,
        initial=initial,
        step=step,
        kernel="qkv.ops.essa:fused",
        kernel_limit=_limit,
    )
    key_norm: Literal["token_l2"] | None = param(
        "token_l2", "divide each channel of the keys by its norm over the tokens, or not"
    )
    order: int = param(1, "terms of the series after the constant one: squares, then fourth powers", low=1, high=2)
    value_residual: bool = param(True, "add the values themselves, the series' constant term")
    eps: float = param(1e-7, "added to the squared norm of the centred channels", low=1e-12)
    chunk_size: int = param(64, "tokens per chunk of the causal form", low=1)
