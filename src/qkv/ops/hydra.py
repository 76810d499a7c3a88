r"""Hydra: a bidirectional state space model as one quasiseparable matrix: two scans, shifted by one token, and a free diagonal.

    M_ij = c_{i-1} . b_j dt_j exp(a sum_{l=j+1}^{i-1} dt_l)              j < i,   read by the token before
    M_ij = c'_{i+1} . b'_j dt'_j exp(a sum_{l=i+1}^{j-1} dt'_l)          j > i,   read by the token after
    M_ii = delta_i,       out = M v

q holds the readouts c, k the inputs b of the forward scan, v the values; primes are the backward scan (`back_q`, `back_k`,
`back_dt`; those left out are the forward ones). dt >= 0 is both the step of the decay and the weight of the token, `rate` a <= 0
one number a head, `diagonal` delta. The state is read before the shift, so row i carries the readout of its neighbour. Every
block above or below the diagonal has rank <= D. `materialise` gives M. Where heads share c and b (one group) expand them; the
whole published block, with its convolution, gate and projections, is `qkv.layers._hydra.HydraLayer`.

Padding is passed over: a token's neighbour is the next real one. Bidirectional by definition: no state, no decoding.

No setting makes it another operator of this library.

Axes: B batch, H query heads, G key/value heads, N tokens, C chunk, D state size (64 in the paper), E width of a head (64).
Hwang et al. 2024, Hydra: Bidirectional State Space Models Through Generalized Matrix Mixers, arXiv:2407.09941.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.core.operator import Operator, OperatorSpec
from qkv.core.spec import Extra, Learnt, Place, param
from qkv.ops._common.decayed import decayed_linear_attention
from qkv.ops._common.states import per_head, wide


def reference(
    q: Tensor, k: Tensor, v: Tensor, *, dt: Tensor, rate: Tensor, back_q: Tensor | None = None, back_k: Tensor | None = None,
    back_dt: Tensor | None = None, diagonal: Tensor | None = None, padding: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The matrix times the values. q ``[B, H, N, D]``, k ``[B, G, N, D]``, v ``[B, G, N, E]`` -> ``[B, H, N, E]``."""
    (v,) = per_head(q, v)
    whole = materialise(
        q, k, dt=dt, rate=rate, back_q=back_q, back_k=back_k, back_dt=back_dt, diagonal=diagonal, padding=padding
    )
    return whole @ v


def loop(
    q: Tensor, k: Tensor, v: Tensor, *, dt: Tensor, rate: Tensor, back_q: Tensor | None = None, back_k: Tensor | None = None,
    back_dt: Tensor | None = None, diagonal: Tensor | None = None, padding: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Two recurrences over the real tokens of each row, one after the other; shapes as in `reference`."""
    k, v = per_head(q, k, v)
    back_q, back_k, back_dt = _backward(q, k, dt, back_q, back_k, back_dt)
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype, device=q.device)
    for row in range(q.shape[0]):
        tokens = [t for t in range(q.shape[2]) if padding is None or bool(padding[row, t])]
        for c, b, step, order in ((q, k, dt, tokens), (back_q, back_k, back_dt, tokens[::-1])):
            state, last = q.new_zeros(q.shape[1], q.shape[-1], v.shape[-1]), None
            for t in order:
                if last is not None:
                    out[row, :, t] += torch.einsum("hd,hde->he", c[row, :, last], state)
                w = step[row, :, t, None, None]
                state = (w * rate[:, None, None]).exp() * state + w * b[row, :, t, :, None] * v[row, :, t, None, :]
                last = t
        if diagonal is not None:
            out[row] += diagonal[row].unsqueeze(-1) * v[row]
    return out


def fast(
    q: Tensor, k: Tensor, v: Tensor, *, dt: Tensor, rate: Tensor, back_q: Tensor | None = None, back_k: Tensor | None = None,
    back_dt: Tensor | None = None, diagonal: Tensor | None = None, padding: Tensor | None = None, chunk_size: int = 256,
) -> Tensor:  # fmt: skip
    """Both directions as one scan of twice the batch, in chunks; shapes as in `reference`."""
    dtype = q.dtype
    k, v = per_head(q, k, v)
    back_q, back_k, back_dt = _backward(q, k, dt, back_q, back_k, back_dt)
    two = lambda ahead, back: torch.cat([ahead.to(wide(q)), back.flip(2).to(wide(q))])  # noqa: E731  [2 B, H, N, .]
    c, b, values, step = two(q, back_q), two(k, back_k), two(v, v), two(dt, back_dt)
    real = None if padding is None else torch.cat([padding, padding.flip(1)])
    if real is not None:
        step = step.masked_fill(~real[:, None], 0.0)
    read = decayed_linear_attention(
        c, b, values * step.unsqueeze(-1), log_decay=step * rate.to(step)[:, None], chunk_size=chunk_size, sub_chunk=1
    ).out
    ahead, back = _shifted(read, real).chunk(2)
    out = ahead + back.flip(2)
    if diagonal is not None:
        out = out + diagonal.to(out).unsqueeze(-1) * v
    return out.to(dtype)


def materialise(
    q: Tensor, k: Tensor, *, dt: Tensor, rate: Tensor, back_q: Tensor | None = None, back_k: Tensor | None = None,
    back_dt: Tensor | None = None, diagonal: Tensor | None = None, padding: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """M ``[B, H, N, N]`` for inspection; arguments as in `reference`."""
    (k,) = per_head(q, k)
    back_q, back_k, back_dt = _backward(q, k, dt, back_q, back_k, back_dt)
    real = torch.ones_like(dt[:, 0], dtype=torch.bool) if padding is None else padding
    upper = _half(back_q.flip(2), back_k.flip(2), back_dt.flip(2), rate, real.flip(1)).flip(2, 3)
    whole = _half(q, k, dt, rate, real) + upper
    return whole if diagonal is None else whole + (diagonal * real[:, None]).to(whole).diag_embed()


def _half(c: Tensor, b: Tensor, dt: Tensor, rate: Tensor, real: Tensor) -> Tensor:
    """The part below the diagonal ``[B, H, N, N]``."""
    n = c.shape[2]
    dt = dt.masked_fill(~real[:, None], 0.0).to(wide(dt))
    total = dt.cumsum(-1) * rate.to(dt)[:, None]  # [B, H, N]
    before = _before(real)  # [B, N], -1 where there is none
    at = before.clamp(min=0)[:, None]
    c = c.gather(2, at.unsqueeze(-1).expand_as(c))
    reach = total.gather(2, at.expand_as(total)).unsqueeze(-1) - total.unsqueeze(-2)
    seen = torch.arange(n, device=c.device) <= before.unsqueeze(-1)  # [B, N, N]
    seen = (seen & real[:, None] & real.unsqueeze(-1))[:, None]
    fade = reach.masked_fill(~seen, 0.0).exp().masked_fill(~seen, 0.0)
    return ((c @ b.mT).to(fade) * fade * dt.unsqueeze(-2)).to(c.dtype)


def _before(real: Tensor) -> Tensor:
    """The nearest real token before each, ``[B, N]``, -1 where there is none."""
    places = torch.arange(real.shape[1], device=real.device).masked_fill(~real, -1)
    return F.pad(places.cummax(1).values[:, :-1], (1, 0), value=-1)


def _shifted(x: Tensor, real: Tensor | None) -> Tensor:
    """Each token gets what the real one before it read; the first gets 0."""
    if real is None:
        return F.pad(x[:, :, :-1], (0, 0, 1, 0))
    before = _before(real)[:, None, :, None]
    return x.gather(2, before.clamp(min=0).expand_as(x)).masked_fill(before < 0, 0.0)


def _backward(
    q: Tensor, k: Tensor, dt: Tensor, back_q: Tensor | None, back_k: Tensor | None, back_dt: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What the backward scan uses: its own, or the forward one's."""
    own_k = k if back_k is None else per_head(q, back_k)[0]
    return q if back_q is None else back_q, own_k, dt if back_dt is None else back_dt


def _step(*shape: int, **kw: Any) -> Tensor:
    return torch.rand(shape, **kw)


def _rates(place: Place) -> Tensor:
    """The rates -1 as raw numbers: logs of their size."""
    return torch.zeros(place.heads)


@final
@dataclass(frozen=True, kw_only=True)
class Hydra(Operator):
    """A quasiseparable matrix mixer."""

    spec: ClassVar[OperatorSpec] = OperatorSpec(
        id="hydra",
        title="Hydra: quasiseparable matrix mixer",
        paper="arXiv:2407.09941",
        source="code",
        summary="Two state space scans, one in each direction and each shifted by one token, and a free diagonal: a linear-time "
        "bidirectional mixer in the place of an encoder's attention.",
        shown="As a masked language model on real text it has a lower loss than the same scan forward only, and no higher than "
        "two scans that are added.",
        honest="Bidirectional by definition: it neither generates nor keeps a cache, and what a state of fixed size "
        "cannot hold is lost.",
        trials=({}, {"chunk_size": 5}),
        causal="never",
        cross=False,
        scale=None,
        reference=reference,
        fast=fast,
        loop=loop,
        extras={
            "dt": Extra(
                axes="bhn", sample=_step, low=0.0, extremes=(0.0, 20.0),
                doc="step of the forward scan: weight of a token and time that the state decays over, at least 0",
                learnt=Learnt(axes="bhn", value=F.softplus, start=-4.6),
            ),
            "rate": Extra(
                axes="h", sample=lambda *shape, **kw: -torch.rand(shape, **kw) - 0.1, role="parameter", high=0.0,
                doc="natural log of what is left of the state after a step of 1, at most 0",
                learnt=Learnt(axes="h", value=lambda x: -x.exp(), start=_rates),
            ),
            "back_dt": Extra(
                axes="bhn", sample=_step, required=False, low=0.0, extremes=(0.0, 20.0),
                doc="step of the backward scan; without it that of the forward one",
                learnt=Learnt(axes="bhn", value=F.softplus, start=-4.6),
            ),
            "back_q": Extra(
                axes="bhnd", sample=torch.randn, required=False, doc="readouts of the backward scan; without them q",
                learnt=Learnt(axes="bhnd"),
            ),
            "back_k": Extra(
                axes="bgmd", sample=torch.randn, required=False, doc="inputs of the backward scan; without them k",
                learnt=Learnt(axes="bgmd"),
            ),
            "diagonal": Extra(
                axes="bhn", sample=torch.randn, required=False, doc="weight of a token's own value; without it 0",
                learnt=Learnt(axes="bhn", start=1.0),
            ),
        },
    )  # fmt: skip
    chunk_size: int = param(256, "tokens per chunk of the scans", low=1)
