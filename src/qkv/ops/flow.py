r"""Flow attention: linear attention as a flow network in which sources compete and sinks are allocated by what they receive.

phi = sigmoid, no 1/sqrt(D). <a, b> = (a + eps) . (b + eps) in every product that forms a flow. Bidirectional, N sinks, M sources:

    I_i = <phi(q_i), sum_j phi(k_j)>                   O_j = <phi(k_j), sum_i phi(q_i)>
    Ihat_i = <phi(q_i), sum_j phi(k_j) / O_j>          Ohat_j = clamp(<phi(k_j), sum_i phi(q_i) / I_i>, -1, 1)
    a_i = sigmoid(Ihat_i N / M),  c_j = M softmax_j(Ohat),   out_i = a_i phi(q_i) / I_i . sum_j phi(k_j) (c_j v_j)^T

Causal, with prefix sums and the count t of tokens so far:

    i_t = t / <phi(q_t), K_t>,  K_t = sum_{j <= t} phi(k_j)     r_t = t / <phi(k_t), Q_t>,  Q_t = sum_{j <= t} phi(q_j)
    Ihat_t = <phi(q_t), KR_t> / t,  KR_t = sum r_j phi(k_j)
    Ohat_t = clamp(<phi(k_t), QI_t> / t, -1, 1),  QI_t = sum i_j phi(q_j)
    c_t = t e^Ohat_t / W_t,  W_t = sum_{j <= t} e^Ohat_j
    out_t = sigmoid(Ihat_t) (i_t / t) phi(q_t) . sum_{j <= t} phi(k_j) (c_j v_j)^T

The weight c_j of a source is fixed when its token arrives; that makes the causal form a recurrence. Causal N and M are equal.

State: `count` ``[B]``, `kv` ``[B, H, D, E]``, `keys`, `queries`, `kr`, `qi` (K, Q, KR, QI) ``[B, H, D]``, `w` ``[B, H]``.

No setting makes it another operator of this library.

Axes: B batch, H query heads, G key/value heads, N queries (sinks), M keys (sources), C chunk, D key width, E value width.
Wu et al. 2022, Flowformer: Linearizing Transformers with Conservation Flows, arXiv:2202.06258.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple, final

import torch
from torch import Tensor

from qkv.core.operator import Operator, OperatorSpec
from qkv.core.spec import param
from qkv.core.state import State
from qkv.ops._common.decayed import Form, core_limit, decayed_linear_attention
from qkv.ops._common.states import after, per_head, wide


def reference(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, padding: Tensor | None = None,
    initial_state: State | None = None, return_state: bool = False, eps: float = 1e-6, conserve: bool = True,
) -> Any:  # fmt: skip
    """The flows as whole maps ``[B, H, N, M]``, summed directly.

    q ``[B, H, N, D]``, k ``[B, G, M, D]``, v ``[B, G, M, E]`` -> ``[B, H, N, E]``, or that and the state.
    """
    dtype, (n, m) = q.dtype, (q.shape[2], k.shape[2])
    k, v = per_head(q, k, v)
    a, b = q.sigmoid().to(wide(q)), k.sigmoid().to(wide(q))
    source = v.new_ones(v.shape[0], m, dtype=torch.bool) if padding is None else padding
    sink = source if n == m and (causal or padding is not None) else source.new_ones(source.shape[0], n)
    if not causal:
        sink = source.new_ones(source.shape[0], n) if n != m else source
        return _whole(a, b, v.to(a), source, sink, eps, conserve).to(dtype)
    s = _sums(q, v, initial_state)
    ones = source[:, None].to(a)  # [B, 1, N]
    past = ones[..., None, :].expand(-1, -1, n, -1).tril()  # real tokens up to t, [B, 1, N, N]
    count = s.count[:, None, None] + past.sum(-1)  # [B, 1, N]
    t = count.clamp(min=1.0)
    i = t / _flow(a, past @ b + s.keys.unsqueeze(2), eps)
    r = t / _flow(b, past @ a + s.queries.unsqueeze(2), eps)
    kr, qi = past @ (b * r.unsqueeze(-1)) + s.kr.unsqueeze(2), past @ (a * i.unsqueeze(-1)) + s.qi.unsqueeze(2)
    weight = (_dot(b, qi, eps) / t).clamp(-1.0, 1.0).exp() * ones  # e^Ohat, [B, H, N]
    total = (past @ weight.unsqueeze(-1)).squeeze(-1) + s.w.unsqueeze(-1)
    c = t * weight / total.clamp(min=1e-9)
    into = (_dot(a, kr, eps) / t).sigmoid()
    if not conserve:
        c, into = ones.expand_as(c), torch.ones_like(into)
    read = a * (i / t).unsqueeze(-1)
    out = (read @ b.mT * past) @ (v.to(a) * c.unsqueeze(-1)) + read @ s.kv
    out = (into.unsqueeze(-1) * out).to(dtype)
    if not return_state:
        return out
    keep = ones.unsqueeze(-1)
    kv = s.kv + (b * keep).mT @ (v.to(a) * c.unsqueeze(-1))
    ends = Sums(
        count[:, 0, -1],
        kv,
        s.keys + (b * keep).sum(2),
        s.queries + (a * keep).sum(2),
        kr[:, :, -1],
        qi[:, :, -1],
        total[..., -1],
    )
    return out, _state(ends, initial_state, n)


def loop(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, padding: Tensor | None = None,
    initial_state: State | None = None, return_state: bool = False, eps: float = 1e-6, conserve: bool = True,
) -> Any:  # fmt: skip
    """Causal: the recurrence token by token. Bidirectional: one row and head after the other. Shapes as in `reference`."""
    k, v = per_head(q, k, v)
    if causal:
        state, outs = _state(_sums(q, v, initial_state), initial_state, 0), []
        for t in range(q.shape[2]):
            here = None if padding is None else padding[:, t : t + 1]
            q_t, k_t, v_t = (x[:, :, t : t + 1] for x in (q, k, v))
            out, state = step(q_t, k_t, v_t, state, padding=here, eps=eps, conserve=conserve)
            outs.append(out)
        out = torch.cat(outs, 2)
        return (out, state) if return_state else out
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype, device=q.device)
    for b in range(q.shape[0]):
        keep = torch.ones(k.shape[2], dtype=torch.bool, device=q.device) if padding is None else padding[b]
        sinks = (
            keep
            if padding is not None and q.shape[2] == k.shape[2]
            else torch.ones_like(q[b, 0, :, 0], dtype=torch.bool)
        )
        for h in range(q.shape[1]):
            a, c, values = q[b, h, sinks].sigmoid(), k[b, h, keep].sigmoid(), v[b, h, keep]
            n, m = a.shape[0], c.shape[0]
            inflow = torch.stack([((x + eps) * (c.sum(0) + eps)).sum() for x in a])
            outflow = torch.stack([((y + eps) * (a.sum(0) + eps)).sum() for y in c])
            saved_in = ((a + eps) * ((c / outflow[:, None]).sum(0) + eps)).sum(-1)
            saved_out = ((c + eps) * ((a / inflow[:, None]).sum(0) + eps)).sum(-1).clamp(-1, 1)
            share, gate = m * saved_out.softmax(0), (saved_in * n / m).sigmoid()
            if not conserve:
                share, gate = torch.ones_like(share), torch.ones_like(gate)
            out[b, h, sinks] = gate[:, None] * ((a / inflow[:, None]) @ (c.mT @ (share[:, None] * values)))
    return out


def fast(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, padding: Tensor | None = None,
    initial_state: State | None = None, return_state: bool = False, eps: float = 1e-6, conserve: bool = True,
    chunk_size: int = 64, form: Form = "chunked",
) -> Any:  # fmt: skip
    """Vector sums, then one linear attention: bidirectional at once, causal by three scans. Shapes as in `reference`.

    form: of the causal sums, see `decayed_linear_attention`.
    """
    dtype, n, m = q.dtype, q.shape[2], k.shape[2]
    k, v = per_head(q, k, v)
    a, b, v = q.to(wide(q)).sigmoid(), k.to(wide(q)).sigmoid(), v.to(wide(q))
    if not causal:
        every = v.new_ones(v.shape[0], m, dtype=torch.bool)
        source = every if padding is None else padding
        sink = source if n == m else every.new_ones(every.shape[0], n)
        return _whole(a, b, v, source, sink, eps, conserve).to(dtype)
    s = _sums(q, v, initial_state)
    keep = None
    count = s.count[:, None, None] + torch.arange(1, n + 1, device=q.device)
    if padding is not None:
        keep = padding[:, None, :, None].to(a)
        count = s.count[:, None, None] + padding.cumsum(-1)[:, None]
    real = (lambda x: x) if keep is None else (lambda x: x * keep)
    t = count.clamp(min=1).to(a)  # [B, 1, N]
    k_sum, q_sum = real(b).cumsum(2) + s.keys.unsqueeze(2), real(a).cumsum(2) + s.queries.unsqueeze(2)
    i, r = t / _flow(a, k_sum, eps), t / _flow(b, q_sum, eps)
    kr = real(b * r.unsqueeze(-1)).cumsum(2) + s.kr.unsqueeze(2)
    qi = real(a * i.unsqueeze(-1)).cumsum(2) + s.qi.unsqueeze(2)
    weight = (_dot(b, qi, eps) / t).clamp(-1.0, 1.0).exp().unsqueeze(-1)
    total = real(weight).cumsum(2) + s.w[..., None, None]
    c = t.unsqueeze(-1) * weight / total.clamp(min=1e-9)
    read, gate = a * (i / t).unsqueeze(-1), (_dot(a, kr, eps) / t).sigmoid().unsqueeze(-1)
    values = v * c if conserve else v
    out, kv, _ = decayed_linear_attention(
        read, b, values, state=s.kv, padding=padding, form=form, chunk_size=chunk_size, sub_chunk=chunk_size
    )
    out = (gate * out if conserve else out).to(dtype)
    if not return_state:
        return out
    k_end, q_end, kr_end, qi_end = (x[:, :, -1] for x in (k_sum, q_sum, kr, qi))
    last = count[:, 0, -1].expand(q.shape[0]).to(s.count)
    return out, _state(Sums(last, kv, k_end, q_end, kr_end, qi_end, total[:, :, -1, 0]), initial_state, n)


fused = partial(fast, form="triton")  # the core's kernel has tiles of its own: chunk_size shapes `fast` alone


def initial(q: Tensor, k: Tensor, v: Tensor) -> State:
    """The empty state: zeros in float32 (float64 for float64 inputs)."""
    return _state(_sums(q, v, None), None, 0)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: State,
    *,
    padding: Tensor | None = None,
    eps: float = 1e-6,
    conserve: bool = True,
) -> tuple[Tensor, State]:
    """One token: q ``[B, H, 1, D]``, k ``[B, G, 1, D]``, v ``[B, G, 1, E]`` -> out ``[B, H, 1, E]``, new state."""
    dtype = q.dtype
    k, v = per_head(q, k, v)
    a, b, v = q[:, :, 0].to(wide(q)).sigmoid(), k[:, :, 0].to(wide(q)).sigmoid(), v[:, :, 0].to(wide(q))
    s = _sums(q, v, state)
    real = torch.ones(q.shape[0], 1, dtype=torch.bool, device=q.device) if padding is None else padding
    keep = real.to(a)  # [B, 1]
    count = s.count + real[:, 0].to(s.count)
    t = count.clamp(min=1)[:, None].to(a)
    k_sum, q_sum = s.keys + keep.unsqueeze(-1) * b, s.queries + keep.unsqueeze(-1) * a
    i, r = t / _flow(a, k_sum, eps), t / _flow(b, q_sum, eps)
    kr, qi = s.kr + (keep * r).unsqueeze(-1) * b, s.qi + (keep * i).unsqueeze(-1) * a
    weight = (_dot(b, qi, eps) / t).clamp(-1.0, 1.0).exp()
    total = s.w + keep * weight
    c, gate = t * weight / total.clamp(min=1e-9), (_dot(a, kr, eps) / t).sigmoid()
    if not conserve:
        c, gate = torch.ones_like(c), torch.ones_like(gate)
    kv = s.kv + (keep * c)[..., None, None] * b.unsqueeze(-1) * v.unsqueeze(-2)
    out = (gate * i / t).unsqueeze(-1) * (a.unsqueeze(-2) @ kv)[..., 0, :]
    return out.unsqueeze(2).to(dtype), _state(Sums(count, kv, k_sum, q_sum, kr, qi, total), state, 1)


class Sums(NamedTuple):
    """The state by name: count, KV, K, Q, KR, QI, W."""

    count: Tensor
    kv: Tensor
    keys: Tensor
    queries: Tensor
    kr: Tensor
    qi: Tensor
    w: Tensor


def _whole(a: Tensor, b: Tensor, v: Tensor, source: Tensor, sink: Tensor, eps: float, conserve: bool) -> Tensor:
    """Bidirectional flows of features a ``[B, H, N, D]``, b ``[B, H, M, D]``; source ``[B, M]``, sink ``[B, N]``: real tokens."""
    sinks, sources = sink[:, None, :, None].to(a), source[:, None, :, None].to(a)
    n, m = (x.sum(2).clamp(min=1.0) for x in (sinks, sources))  # [B, 1, 1]
    inflow = _flow(a, (b * sources).sum(2, keepdim=True), eps)
    read = a / inflow.unsqueeze(-1)
    if not conserve:
        return read @ (b.mT @ (v * sources))
    outflow = _flow(b, (a * sinks).sum(2, keepdim=True), eps)
    saved_in = _dot(a, (b / outflow.unsqueeze(-1) * sources).sum(2, keepdim=True), eps)
    saved_out = _dot(b, (read * sinks).sum(2, keepdim=True), eps).clamp(-1.0, 1.0)
    weight = saved_out.exp() * sources.squeeze(-1)
    c = m * weight / weight.sum(-1, keepdim=True).clamp(min=1e-9)
    return (saved_in * n / m).sigmoid().unsqueeze(-1) * (read @ (b.mT @ (v * c.unsqueeze(-1))))


def _dot(x: Tensor, y: Tensor, eps: float) -> Tensor:
    """(x + eps) . (y + eps) over channels."""
    return ((x + eps) * (y + eps)).sum(-1)


def _flow(x: Tensor, y: Tensor, eps: float) -> Tensor:
    """The same as a divisor: not 0 where there is nothing to sum (padding first, or features that underflow) and eps is 0."""
    return _dot(x, y, eps).clamp(min=1e-30)


def _sums(q: Tensor, v: Tensor, state: State | None) -> Sums:
    b, h, d, e = q.shape[0], q.shape[1], q.shape[-1], v.shape[-1]
    if state is None:
        zeros = {"dtype": wide(q), "device": q.device}
        vectors = torch.zeros(4, b, h, d, **zeros).unbind(0)
        return Sums._make(
            (torch.zeros(b, **zeros), torch.zeros(b, h, d, e, **zeros), *vectors, torch.zeros(b, h, **zeros))
        )
    shapes = {"count": (b,), "kv": (b, h, d, e), "w": (b, h)} | dict.fromkeys(
        ("keys", "queries", "kr", "qi"), (b, h, d)
    )
    state.of("flow", **shapes)
    return Sums(*(state[name] for name in Sums._fields))


def _state(sums: Sums, before: State | None, tokens: int) -> State:
    return after("flow", before, tokens, **sums._asdict())


@final
@dataclass(frozen=True, kw_only=True)
class Flow(Operator):
    """Flow attention with sigmoid features."""

    spec: ClassVar[OperatorSpec] = OperatorSpec(
        id="flow",
        title="Flow-Attention (Flowformer)",
        paper="arXiv:2202.06258",
        source="code",
        summary="Linear attention in which the total outgoing flow of each source is fixed, so that sources compete, and the "
        "incoming flow of each sink decides how much it lets through.",
        shown="At equal size at least as accurate on digits as linear attention without the flows, with uneven source weights.",
        honest="Competition is bounded (weights differ by at most e^2), and in the causal form a source keeps the weight it "
        "got when it arrived.",
        trials=({}, {"chunk_size": 5}, {"conserve": False}),
        causal="both",
        cross="bidirectional",
        scale=None,
        reference=reference,
        fast=fast,
        loop=loop,
        initial=initial,
        step=step,
        kernel="qkv.ops.flow:fused",
        kernel_limit=core_limit,
    )
    eps: float = param(1e-6, "added to both sides of every product that forms a flow", low=0.0)
    conserve: bool = param(
        True, "competition and allocation; without them plain normalised linear attention with sigmoid features"
    )
    chunk_size: int = param(64, "tokens per chunk of the causal form", low=1)
