r"""Miras: a memory matrix trained online, token by token, by a choice of loss and of what is retained (Moneta, Yaad, Memora).

    A_t = alpha_t A_{t-1} - eta_t grad loss(W'; k_t, v_t),    W_t = phi(A_t),    o_t = W_t q_t,    e = W' k_t - v_t

    loss        dot  -v . W k                     gradient -v k^T
                l2   |e|^2 (half: |e|^2 / 2)      2 e k^T
                lp   sum |e|^p, smooth            p tanh(10 e) (e^2 + 1e-6)^((p - 1) / 2) k^T
                huber  |e|^2 / 2 up to |e| = delta, then linear    e k^T, beyond delta e / |e| k^T (or delta sign(e) k^T)
    retention   decay  phi(A) = A        norm  phi(A) = A / max(|A|_q, 1e-6)^(q - 2)        softmax  phi(A) = softmax of each row

    Moneta: lp with p = 3 and norm with q = 4.   Yaad: huber and decay.   Memora: l2 and softmax (A = log W up to a constant).

W' is the memory at the end of the last whole chunk of `chunk_size` tokens: the chunk size is part of the definition, chunks are
counted over the real tokens of each row, and decoding keeps the same schedule. chunk_size 1 is the recurrence itself. q and k are
L2-normalised (`normalise`). ``retain_first`` takes the gradient at alpha_t W' (with l2, chunk_size 1: the gated delta rule).
Completed from the paper's abstract and public notes: matrix memories only (no MLP memory); a token inside a chunk reads phi of
its own A_t; Memora keeps the schedule of the others (no lag token); A_0 = 0.

State: A `state` and W' `frozen` ``[B, H, E, D]``, `count` ``[B]`` tokens into the chunk.

Axes: B batch, H query heads, G key/value heads, N tokens, C chunk, D key width, E value width.
Behrouz et al. 2025, It's All Connected, arXiv:2504.13173.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.core.errors import StateError
from qkv.core.operator import Operator, OperatorSpec
from qkv.core.spec import Extra, Learnt, Limit, param
from qkv.core.state import State
from qkv.ops._common.states import after, per_head, wide

WRITTEN = 4  # tokens whose mutual decays are written out
TOGETHER = 1 << 22  # entries of memories that are read at once
Loss = Literal["dot", "l2", "lp", "huber"]
Retention = Literal["decay", "norm", "softmax"]


class Rule(NamedTuple):
    """The choices that make a memory."""

    loss: Loss = "huber"
    retention: Retention = "decay"
    loss_power: float = 3.0
    norm_power: float = 4.0
    half: bool = False
    huber: str = "vector"
    retain_first: bool = False
    chunk_size: int = 16


def reference(
    q: Tensor, k: Tensor, v: Tensor, *, log_decay: Tensor, eta: Tensor, delta: Tensor | None = None,
    padding: Tensor | None = None, initial_state: State | None = None, return_state: bool = False, normalise: bool = True,
    loss: Loss = "huber", retention: Retention = "decay", loss_power: float = 3.0, norm_power: float = 4.0,
    half: bool = False, huber: str = "vector", retain_first: bool = False, chunk_size: int = 16,
) -> Any:  # fmt: skip
    """Token by token. q ``[B, H, N, D]``, k ``[B, G, N, D]``, v ``[B, G, N, E]`` -> ``[B, H, N, E]`` (and a state)."""
    chosen = Rule(loss, retention, loss_power, norm_power, half, huber, retain_first, chunk_size)
    dtype, tokens = q.dtype, q.shape[2]
    q, k, v, gates = _inputs(q, k, v, log_decay, eta, delta, normalise)
    m, outs = _memory(q, v, initial_state, chosen), []
    for t in range(tokens):
        here = None if padding is None else padding[:, t]
        out, m = _token([x[:, :, t] for x in (q, k, v, *gates)], m, here, chosen)
        outs.append(out)
    out = torch.stack(outs, 2).to(dtype)
    return (out, after("miras", initial_state, tokens, **m._asdict())) if return_state else out


def fast(
    q: Tensor, k: Tensor, v: Tensor, *, log_decay: Tensor, eta: Tensor, delta: Tensor | None = None,
    padding: Tensor | None = None, initial_state: State | None = None, return_state: bool = False, normalise: bool = True,
    loss: Loss = "huber", retention: Retention = "decay", loss_power: float = 3.0, norm_power: float = 4.0,
    half: bool = False, huber: str = "vector", retain_first: bool = False, chunk_size: int = 16,
) -> Any:  # fmt: skip
    """The same map: from chunk to chunk only the gradients at its start and A at its end; shapes as in `reference`."""
    chosen, size = Rule(loss, retention, loss_power, norm_power, half, huber, retain_first, chunk_size), chunk_size
    dtype, (b, _, n, _) = q.dtype, q.shape
    q, k, v, gates = _inputs(q, k, v, log_decay, eta, delta, normalise)
    m = _memory(q, v, initial_state, chosen)
    real = q.new_ones(b, n, dtype=torch.bool) if padding is None else padding
    length = n if initial_state is None else n + size - 1
    length = -(-length // size) * size
    place = m.count[:, None] + real.cumsum(1) - 1  # slot of each token: chunks are aligned over the rows
    place = place.masked_fill(~real, length)
    slots = [_placed(x, place, length).unflatten(2, (-1, size)) for x in (q, k, v, *gates)]  # [B, H, J, C, .]
    queries, keys, _, decays, rates, _ = slots
    total = decays.cumsum(3)
    left = rates * (total[:, :, :, -1:] - total).clamp(max=0.0).exp()  # of each gradient, at the end of its chunk
    kept = total[:, :, :, -1].exp().unsqueeze(-1)
    filled = m.count + real.sum(1)  # slots at the end, [B]
    starts, slopes = [], []
    parts = zip(*(x.unbind(2) for x in (*slots[1:4], slots[5], left, kept)), strict=True)
    for j, (key, value, decay, bound, share, keep) in enumerate(parts):
        slopes.append(slope(key @ m.frozen.mT, value, decay, bound, chosen))
        starts.append(m.state)
        state = keep * m.state - (share * slopes[-1]).mT @ key
        whole = (filled >= (j + 1) * size)[:, None, None, None]
        m = Memory(*_ended(state, m.frozen, whole, chosen), m.count)
    out = _read(queries, keys, -rates * torch.stack(slopes, 2), total, torch.stack(starts, 2), chosen).flatten(2, 3)
    index = place.clamp(max=length - 1)[:, None, :, None].expand(-1, q.shape[1], -1, v.shape[-1])
    out = out.gather(2, index).to(dtype)
    end = m._replace(count=filled % size)
    return (out, after("miras", initial_state, n, **end._asdict())) if return_state else out


def initial(
    q: Tensor, k: Tensor, v: Tensor, *, log_decay: Tensor | None = None, eta: Tensor | None = None,
    delta: Tensor | None = None, retention: Retention = "decay",
) -> State:  # fmt: skip
    """The empty memory."""
    return after("miras", None, 0, **_memory(q, v, None, Rule(retention=retention))._asdict())


def step(
    q: Tensor, k: Tensor, v: Tensor, state: State, *, log_decay: Tensor, eta: Tensor, delta: Tensor | None = None,
    padding: Tensor | None = None, normalise: bool = True,
    loss: Loss = "huber", retention: Retention = "decay", loss_power: float = 3.0, norm_power: float = 4.0,
    half: bool = False, huber: str = "vector", retain_first: bool = False, chunk_size: int = 16,
) -> tuple[Tensor, State]:  # fmt: skip
    """One token: q ``[B, H, 1, D]``, k ``[B, G, 1, D]``, v ``[B, G, 1, E]`` -> out ``[B, H, 1, E]``, new state."""
    return reference(
        q, k, v, log_decay=log_decay, eta=eta, delta=delta, padding=padding, initial_state=state, return_state=True,
        normalise=normalise, loss=loss, retention=retention, loss_power=loss_power, norm_power=norm_power, half=half,
        huber=huber, retain_first=retain_first, chunk_size=chunk_size,
    )  # fmt: skip


def moneta(**settings: Any) -> Miras:
    """Moneta: the p-norm loss (p = 3) and the retention of a q-norm (q = 4)."""
    return Miras(loss="lp", retention="norm", **settings)


def yaad(**settings: Any) -> Miras:
    """Yaad: the Huber loss and a decay."""
    return Miras(loss="huber", retention="decay", **settings)


def memora(**settings: Any) -> Miras:
    """Memora: the squared loss and rows on the simplex."""
    return Miras(loss="l2", retention="softmax", **settings)


class Memory(NamedTuple):
    """A, W' and the tokens into the chunk."""

    state: Tensor
    frozen: Tensor
    count: Tensor


def _token(inputs: Sequence[Tensor], m: Memory, real: Tensor | None, rule: Rule) -> tuple[Tensor, Memory]:
    """One token: q, k, v, log_decay, eta, delta ``[B, H, .]`` of rows that may differ in where their chunks end."""
    q, k, v, log_decay, eta, delta = inputs
    u = slope((m.frozen @ k.unsqueeze(-1)).squeeze(-1), v, log_decay, delta, rule)
    state = log_decay.exp().unsqueeze(-1) * m.state - (eta * u).unsqueeze(-1) * k.unsqueeze(-2)
    count = m.count + 1
    if real is not None:
        state = torch.where(real[:, None, None, None], state, m.state)
        count = torch.where(real, count, m.count)
    out = _answered(state, q, rule)
    whole = (count == rule.chunk_size)[:, None, None, None]
    return out, Memory(*_ended(state, m.frozen, whole, rule), count % rule.chunk_size)


def _read(q: Tensor, k: Tensor, u: Tensor, total: Tensor, starts: Tensor, rule: Rule) -> Tensor:
    """What queries read of chunks ``[B, H, J, C, .]`` that begin with A `starts` ``[B, H, J, E, D]``: ``[B, H, J, C, E]``.

    u: what each token adds, as soon as it does; total: log-decay from the beginning of the chunk to each token.
    """
    if rule.retention == "decay":
        return total.exp() * (q @ starts.mT) + faded(q @ k.mT, u, total)
    (b, h, _, c, d), e = q.shape, u.shape[-1]
    ages = torch.ones(c, c, dtype=torch.bool, device=q.device).tril()[..., None]
    together, outs = max(1, TOGETHER // (b * h * c * e * max(c, d))), []
    for q_, k_, u_, total_, start in zip(*(x.split(together, 2) for x in (q, k, u, total, starts)), strict=True):
        fade = (total_.unsqueeze(4) - total_.unsqueeze(3)).clamp(max=0.0).exp() * ages  # [B, H, J, t, i, 1 | E]
        added = (fade * u_.unsqueeze(3)).mT.flatten(3, 4) @ k_  # [B, H, J, C E, D]
        every = added.unflatten(3, (c, e)) + total_.exp().unsqueeze(-1) * start.unsqueeze(3)  # A_t
        outs.append(_answered(every, q_, rule))
    return torch.cat(outs, 2)


def faded(scores: Tensor, u: Tensor, total: Tensor) -> Tensor:
    """sum_{i <= t} scores_ti exp(total_t - total_i) u_i, by halves: all exponents are of decays, so none overflows.

    scores ``[..., C, C]``, u ``[..., C, E]``, total ``[..., C, 1 | E]``, falling.
    """
    c = u.shape[-2]
    if c <= WRITTEN:
        ages = torch.ones(c, c, dtype=torch.bool, device=u.device).tril()[..., None]
        fade = (total.unsqueeze(-2) - total.unsqueeze(-3)).clamp(max=0.0).exp() * ages  # [..., t, i, 1 | E]
        return (scores.unsqueeze(-1) * fade * u.unsqueeze(-3)).sum(-2)
    at = (c + 1) // 2
    (early, late), (first, second), border = (
        u.split((at, c - at), -2),
        total.split((at, c - at), -2),
        total[..., at - 1 : at, :],
    )
    past = scores[..., at:, :at] @ ((border - first).exp() * early)
    old = faded(scores[..., :at, :at], early, first)
    return torch.cat((old, faded(scores[..., at:, at:], late, second) + (second - border).exp() * past), -2)


def slope(prediction: Tensor, v: Tensor, log_decay: Tensor, delta: Tensor, rule: Rule) -> Tensor:
    """Gradient of the loss by the prediction W' k, ``[..., E]``; times k^T it is the gradient by W'."""
    if rule.loss == "dot":
        return -v
    e = (prediction * log_decay.exp() if rule.retain_first else prediction) - v
    if rule.loss == "l2":
        return e if rule.half else 2 * e
    if rule.loss == "lp":
        return rule.loss_power * (10 * e).tanh() * (e * e + 1e-6) ** ((rule.loss_power - 1) / 2)
    size = (e * e).sum(-1, keepdim=True).clamp(min=1e-30).sqrt()
    return torch.where(size <= delta, e, delta * (e / size if rule.huber == "vector" else e.sign()))


def retained(state: Tensor, rule: Rule) -> Tensor:
    """phi: the memory of A ``[..., E, D]``."""
    if rule.retention == "softmax":
        return state.softmax(-1)
    return state / _divisor(state, rule) if rule.retention == "norm" else state


def _answered(state: Tensor, q: Tensor, rule: Rule) -> Tensor:
    """What queries ``[..., D]`` read of phi of A ``[..., E, D]``: ``[..., E]``; a norm divides what was read."""
    if rule.retention == "norm":
        return (state @ q.unsqueeze(-1) / _divisor(state, rule)).squeeze(-1)
    return (retained(state, rule) @ q.unsqueeze(-1)).squeeze(-1)


def _divisor(state: Tensor, rule: Rule) -> Tensor:
    """max(|A|_q, 1e-6)^(q - 2) of A ``[..., E, D]``: ``[..., 1, 1]``."""
    top = torch.linalg.vector_norm(state.detach(), torch.inf, (-2, -1), keepdim=True).clamp(min=1e-30)
    x, power = state / top, rule.norm_power
    raised = x.square().square() if power == 4 else x.abs().pow(power)  # a general power is ten times as slow
    size = raised.sum((-2, -1), keepdim=True).clamp(min=1.0) ** (1 / power)
    return (top * size).clamp(min=1e-6) ** (power - 2)


def _ended(state: Tensor, frozen: Tensor, whole: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """A and W' after a token or chunk; rows whose chunk is whole renew W' (and bound the logits)."""
    if rule.retention == "softmax":
        state = torch.where(whole, state.log_softmax(-1), state)
    return state, torch.where(whole, retained(state, rule), frozen)


def _placed(x: Tensor, place: Tensor, length: int) -> Tensor:
    """Tokens ``[B, H, N, .]`` at their slots ``[B, H, length, .]``, zeros elsewhere; slot `length` is thrown away."""
    out = x.new_zeros(*x.shape[:2], length + 1, x.shape[-1])
    return out.scatter(2, place[:, None, :, None].expand_as(x), x)[:, :, :length]


def _inputs(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, eta: Tensor, delta: Tensor | None, normalise: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """q, k, v per query head and the gates ``[B, H, N, 1 | E]``, in float32 or wider."""
    q, k, v = (x.to(wide(x)) for x in (q, *per_head(q, k, v)))
    if normalise:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    gates = [x if x.ndim == 4 else x.unsqueeze(-1) for x in (log_decay.to(q), eta.to(q))]
    bound = torch.ones_like(q[..., :1]) if delta is None else delta.to(q).unsqueeze(-1)
    return q, k, v, (gates[0], gates[1], bound)


def _memory(q: Tensor, v: Tensor, state: State | None, rule: Rule) -> Memory:
    b, shape = q.shape[0], (*q.shape[:2], v.shape[-1], q.shape[-1])
    if state is None:
        empty = q.new_zeros(shape, dtype=wide(q))
        return Memory(empty, retained(empty, rule), torch.zeros(b, dtype=torch.int64, device=q.device))
    state.of("miras", state=shape, frozen=shape, count=(b,))
    into = state["count"]
    if into.device.type == "cpu" and not torch.compiler.is_compiling() and int(into.max()) >= rule.chunk_size:
        raise StateError(f"miras: the state is {int(into.max())} tokens into a chunk, chunk_size={rule.chunk_size} ends before; "
                         "go on with the chunk size that made it")  # fmt: skip
    return Memory(state["state"], state["frozen"], state["count"])


def _decay(*shape: int, **kwargs: Any) -> Tensor:
    return F.logsigmoid(torch.randn(*shape, **kwargs) + 2)


def _rate(*shape: int, **kwargs: Any) -> Tensor:
    return 0.2 * torch.rand(*shape, **kwargs)


@final
@dataclass(frozen=True, kw_only=True)
class Miras(Operator):
    """A matrix memory trained online."""

    spec: ClassVar[OperatorSpec] = OperatorSpec(
        id="miras",
        title="Miras: Moneta, Yaad, Memora",
        paper="arXiv:2504.13173",
        source="abstract",
        summary="A recurrent memory trained on each token to map its key to its value; the loss and what is retained define "
        "the model: linear attention, the delta rule, Moneta, Yaad and Memora are settings.",
        shown="With a tenth of the stored values corrupted, the Huber memory recalls the others better than the squared loss, "
        "and that better than sums.",
        honest="Chunks are sequential, and the chunk size is part of the function: a model must be decoded with the one it was "
        "trained with.",
        limits=(
            Limit(
                equals="linear",
                parameters={"loss": "dot", "retention": "decay", "normalise": False, "chunk_size": 1},
                inputs={"log_decay": 0.0, "eta": 1.0},
                says="the dot product as loss, nothing forgotten: plain causal linear attention, unscaled",
            ),
        ),
        trials=(
            {"chunk_size": 4},
            {"loss": "lp", "retention": "norm", "chunk_size": 4},
            {"loss": "l2", "retention": "softmax", "chunk_size": 5},
            {"loss": "l2", "retain_first": True, "chunk_size": 1},
        ),
        causal="only",
        cross=False,
        scale=None,
        reference=reference,
        fast=fast,
        initial=initial,
        step=step,
        extras={
            "log_decay": Extra(
                axes="bhn|bhne",
                sample=_decay,
                high=0.0,
                extremes=(0.0, -20.0, -1e4),
                doc="natural log of the share of the memory kept at each step, per row of it, at most 0",
                learnt=Learnt(axes="bhne", value=F.logsigmoid, rank=32, start=3.0),
            ),
            "eta": Extra(
                axes="bhn|bhne",
                sample=_rate,
                low=0.0,
                extremes=(0.0,),
                doc="step size of the online gradient step, per row of the memory, at least 0",
                learnt=Learnt(axes="bhne", value=lambda x: 0.1 * F.softplus(x), rank=32),
            ),
            "delta": Extra(
                axes="bhn",
                sample=torch.rand,
                low=0.0,
                required=False,
                extremes=(0.0, 1e4),
                doc="error beyond which the Huber loss is linear, at least 0; without it 1",
                learnt=Learnt(axes="bhn", value=F.softplus, used=lambda settings: settings["loss"] == "huber"),
            ),
        },
    )
    loss: Literal["dot", "l2", "lp", "huber"] = param(
        "huber", "what the memory is trained on: a product, squared, p-norm or Huber error"
    )
    retention: Literal["decay", "norm", "softmax"] = param(
        "decay", "what is kept: a decayed sum, one divided by its q-norm, or rows on the simplex"
    )
    loss_power: float = param(3.0, "p of the p-norm loss", low=1.0)
    norm_power: float = param(4.0, "q of the norm retention; 2 keeps the matrix as it is", low=2.0)
    half: bool = param(False, "squared loss as |e|^2 / 2")
    huber: Literal["vector", "element"] = param(
        "vector", "direction of the Huber gradient beyond delta: e / |e| or sign(e)"
    )
    retain_first: bool = param(False, "take the gradient at the decayed memory, as the gated delta rule does")
    normalise: bool = param(True, "divide q and k by their lengths")
    chunk_size: int = param(
        16, "tokens between renewals of the memory that gradients are taken at; part of the function", low=1
    )
