r"""Restore-RWKV: averages over all tokens on both sides, weighed by exp(key) and by the distance.

    y_t = [sum_{i != t} exp(k_i - w (|t - i| - offset)) v_i + exp(u + k_t) v_t] / [the same with v = 1],     o_t = q_t . y_t

per key channel d: y ``[D, E]`` holds one average of the values for each channel of the keys, and q (the receptance, used as it
is) reads it. The published operator has as many heads as channels and D = E = 1, so that every channel of the model is an
average of its own; with wider heads it is the same average over vectors. `w` (rate) and `u` (bonus of a token for itself) are
one number per head: the layer divides both by the number of tokens, see `rewkv` in qkv.layers. w < 0, weights that grow with
the distance, is allowed. Causal, i <= t alone: RWKV's own form, which keeps a state.

The released kernel mixes the two offsets (1 inside its chunks, 0 across their borders, a difference of order w / T) and adds
1e-6 to the denominator; neither is done here.

Every average is a pair (value, log of its total weight), and two of them merge with weights that sum to one: no maximum is
carried, nothing overflows, keys of +-300 are fine. `fast` merges by doubling inside chunks, then over chunks, then once more.

A padded token is left out together with its place: distances count real tokens. A key of -1e30 leaves a token out and keeps
the distances. State: `mean` ``[B, H, D, E]`` and `total` ``[B, H, D]`` (log weights; -1e37 before the first token).

Axes: B batch, H query heads, G key/value heads, N tokens, D key width, E value width.
Yang et al. 2024, Restore-RWKV: Efficient and Effective Medical Image Restoration with RWKV, arXiv:2407.11087.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.core.operator import Operator, OperatorSpec, Wiring
from qkv.core.spec import Extra, Learnt, Limit, param
from qkv.core.state import State
from qkv.ops._common.states import after, per_head, wide

EMPTY = -1e37  # log weight of nothing: finite, so that differences are never inf - inf


class Average(NamedTuple):
    """Weighted means of values so far and the logs of their total weights: mean ``[..., D, E]``, total ``[..., D]``."""

    mean: Tensor
    total: Tensor


def reference(
    q: Tensor, k: Tensor, v: Tensor, *, w: Tensor, u: Tensor, causal: bool = True, padding: Tensor | None = None,
    initial_state: State | None = None, return_state: bool = False, distance_offset: int = 1,
) -> Any:  # fmt: skip
    """The weights written out, a softmax over ``[B, H, N, N + 1, D]`` logits (the start counts as one token).

    q ``[B, H, N, D]``, k ``[B, G, N, D]``, v ``[B, G, N, E]``, w and u ``[H]`` -> ``[B, H, N, E]``, or that and the state.
    """
    dtype, n = q.dtype, q.shape[2]
    q, k, v, w, u = _inputs(q, k, v, w, u)
    start, place = _start(q, v, initial_state), _places(q, padding)  # place [B, 1, N], from 1
    real = torch.ones_like(place, dtype=torch.bool) if padding is None else padding[:, None]
    eye = torch.eye(n, dtype=torch.bool, device=q.device)
    seen = real.unsqueeze(2) & (torch.ones_like(eye).tril() if causal else torch.ones_like(eye))  # [B, 1, N, N]
    age = (place.unsqueeze(3) - place.unsqueeze(2)).abs() - distance_offset
    bias = torch.where(eye, u[:, None, None], -w[:, None, None] * age)  # [B, H, N, N]
    logits = (k.unsqueeze(2) + bias.unsqueeze(-1)).masked_fill(~seen.unsqueeze(-1), EMPTY)
    old = start.total.unsqueeze(2) - (w[:, None] * (place - distance_offset)).unsqueeze(-1)  # [B, H, N, D]
    weights = torch.cat([logits, old.unsqueeze(3)], 3).softmax(3)
    out = torch.einsum("bhid,bhijd->bhij", q, weights[..., :n, :]) @ v + (q * weights[..., n, :]) @ start.mean
    if not return_state:
        return out.to(dtype)
    last = place[..., -1:]
    logits = (k - (w[:, None] * (last - place)).unsqueeze(-1)).masked_fill(~real.unsqueeze(-1), EMPTY)
    logits = torch.cat([logits, start.total.unsqueeze(2) - (w[:, None] * last).unsqueeze(-1)], 2)  # [B, H, N + 1, D]
    shares = logits.softmax(2)
    mean = shares[:, :, :n].mT @ v + shares[:, :, n].unsqueeze(-1) * start.mean
    return out.to(dtype), _state(Average(mean, logits.logsumexp(2)), initial_state, n)


def loop(
    q: Tensor, k: Tensor, v: Tensor, *, w: Tensor, u: Tensor, causal: bool = True, padding: Tensor | None = None,
    initial_state: State | None = None, return_state: bool = False, distance_offset: int = 1,
) -> Any:  # fmt: skip
    """The published stable form, one token after the other: numerator, denominator and running maximum; then mirrored."""
    dtype, n = q.dtype, q.shape[2]
    q, k, v, w, u = _inputs(q, k, v, w, u)
    start, rate, outs = _start(q, v, initial_state), w[:, None], []
    real = torch.ones(q.shape[0], n, dtype=torch.bool, device=q.device) if padding is None else padding

    def sums(order: list[int], begin: Average) -> list[tuple[Tensor, Tensor, Tensor]]:
        some = (begin.total > EMPTY / 2).to(v)
        found = [(begin.mean * some.unsqueeze(-1), some, begin.total)]
        for t in order:
            a, b, top = found[-1]
            new = torch.maximum(top - rate, k[:, :, t])
            fade, own = (top - rate - new).exp(), (k[:, :, t] - new).exp()
            now = (fade.unsqueeze(-1) * a + own.unsqueeze(-1) * v[:, :, t].unsqueeze(-2), fade * b + own, new)
            keep = real[:, t, None, None]
            a, b, top = (
                torch.where(keep.unsqueeze(-1), now[0], a),
                torch.where(keep, now[1], b),
                torch.where(keep, now[2], top),
            )
            found.append((a, b, top))
        return found

    behind = sums(list(range(n)), start)
    ahead = sums([] if causal else list(range(n - 1, -1, -1)), _start(q, v, None))[::-1]
    for t in range(n):
        own = (v[:, :, t].unsqueeze(-2).expand_as(start.mean), real[:, t, None, None].to(v), u[:, None] + k[:, :, t])
        parts = [own]
        for a, b, top in (behind[t], ahead[min(t + 1, len(ahead) - 1)]):
            parts.append((a, b, top - rate * (1 - distance_offset)))
        top = torch.stack([x[2] for x in parts]).amax(0)
        above = torch.stack([(x[2] - top).exp().unsqueeze(-1) * x[0] for x in parts]).sum(0)
        below = torch.stack([(x[2] - top).exp() * x[1] for x in parts]).sum(0)
        outs.append((q[:, :, t].unsqueeze(-1) * above / below.masked_fill(below == 0, 1.0).unsqueeze(-1)).sum(-2))
    out = torch.stack(outs, 2).to(dtype)
    a, b, top = behind[-1]
    return (out, _state(Average(a / b.unsqueeze(-1), top + b.log()), initial_state, n)) if return_state else out


def fast(
    q: Tensor, k: Tensor, v: Tensor, *, w: Tensor, u: Tensor, causal: bool = True, padding: Tensor | None = None,
    initial_state: State | None = None, return_state: bool = False, distance_offset: int = 1, chunk_size: int = 64,
) -> Any:  # fmt: skip
    """One scan, or two in opposite directions side by side, O(N D E log C); shapes as in `reference`."""
    dtype, n = q.dtype, q.shape[2]
    q, k, v, w, u = _inputs(q, k, v, w, u)
    start, place = _start(q, v, initial_state), _places(q, padding)
    gone = None if padding is None else ~padding[:, None, :, None]
    own = Average(v.unsqueeze(3), k + u[:, None, None])
    if gone is not None:
        k, own = k.masked_fill(gone, EMPTY), own._replace(total=own.total.masked_fill(gone, EMPTY))
    if causal:
        before, end = _earlier(k, v, w, place, start, chunk_size, distance_offset)
        found = _merged(before, own)
    else:
        k, v, place = (
            torch.cat(x) for x in ((k, k.flip(2)), (v, v.flip(2)), (place, place[..., -1:] + 1 - place.flip(2)))
        )
        start = Average(*(torch.cat([x, x]) for x in start))
        both, end = _earlier(k, v, w, place, start, chunk_size, distance_offset)
        before, later = (Average(*x) for x in zip(*(x.chunk(2) for x in both), strict=True))
        found = _merged(Average(*(x.flip(2) for x in later)), _merged(before, own))
    out = (q.unsqueeze(-1) * found.mean).sum(-2).to(dtype)
    return (out, _state(end, initial_state, n)) if return_state else out


def initial(q: Tensor, k: Tensor, v: Tensor, *, w: Tensor | None = None, u: Tensor | None = None) -> State:
    """The empty state in float32 (float64 for float64 inputs): means 0, log weights -1e37."""
    return _state(_start(q, v, None), None, 0)


def step(
    q: Tensor, k: Tensor, v: Tensor, state: State, *, w: Tensor, u: Tensor, padding: Tensor | None = None,
    distance_offset: int = 1,
) -> tuple[Tensor, State]:  # fmt: skip
    """One token: q ``[B, H, 1, D]``, k ``[B, G, 1, D]``, v ``[B, G, 1, E]`` -> out ``[B, H, 1, E]``, new state."""
    dtype = q.dtype
    q, k, v, w, u = _inputs(q, k, v, w, u)
    old, key, rate = _start(q, v, state), k[:, :, 0], w[:, None]
    found = _merged(old._replace(total=old.total - rate * (1 - distance_offset)), Average(v, key + u[:, None]))
    new = _merged(old._replace(total=old.total - rate), Average(v, key))
    if padding is not None:
        keep = padding[:, :, None]
        new = Average(torch.where(keep.unsqueeze(-1), new.mean, old.mean), torch.where(keep, new.total, old.total))
    out = (q[:, :, 0].unsqueeze(-1) * found.mean).sum(-2, keepdim=True)
    return out.to(dtype), _state(new, state, 1)


def _merged(x: Average, y: Average) -> Average:
    """The average of both; the weights of the two sum to one."""
    return Average(
        torch.lerp(*torch.broadcast_tensors(y.mean, x.mean, (x.total - y.total).sigmoid().unsqueeze(-1))),
        torch.logaddexp(x.total, y.total),
    )


def _earlier(
    k: Tensor, v: Tensor, w: Tensor, place: Tensor, start: Average, chunk_size: int, offset: int
) -> tuple[Average, Average]:
    """What each token reads from those before it ``[B, H, N, D, .]``, at the distances it reads them, and the state at the end.

    Chunks are scanned alone; their ends, with the start before them, are scanned again and joined to the tokens of the next.
    """
    n = k.shape[2]
    chunk = min(chunk_size, n)
    split = lambda x, fill: F.pad(x.movedim(2, -1), (0, -n % chunk), value=fill).unflatten(-1, (-1, chunk))  # noqa: E731
    k, v = split(k, EMPTY).movedim(2, -1), split(v, 0.0).movedim(2, -1)  # [B, H, chunks, C, .]
    steps = F.pad(place, (0, -n % chunk), mode="replicate").unflatten(-1, (-1, chunk))  # [B, 1, chunks, C]
    inside = _scan(Average(v.unsqueeze(-2).expand(*k.shape, v.shape[-1]), k), w[:, None], steps)
    ends = Average(
        torch.cat([start.mean.unsqueeze(2), inside.mean[:, :, :, -1]], 2),
        torch.cat([start.total.unsqueeze(2), inside.total[:, :, :, -1]], 2),
    )
    marks = F.pad(steps[..., -1], (1, 0))  # places of the start and of the chunks' ends, [B, 1, 1 + chunks]
    ends = _scan(ends, w, marks)
    age = w[:, None, None] * (steps - marks[..., :-1, None])
    carried = Average(ends.mean[:, :, :-1, None], ends.total[:, :, :-1, None] - age.unsqueeze(-1))
    upto = Average(*(x.flatten(2, 3)[:, :, : n - 1] for x in _merged(carried, inside)))
    gap = place.diff(dim=-1, prepend=torch.zeros_like(place[..., :1])) - offset
    total = torch.cat([start.total.unsqueeze(2), upto.total], 2) - (w[:, None] * gap).unsqueeze(-1)
    before = Average(torch.cat([start.mean.unsqueeze(2), upto.mean], 2), total)
    return before, Average(ends.mean[:, :, -1], ends.total[:, :, -1])


def _scan(x: Average, w: Tensor, place: Tensor) -> Average:
    """Averages over all elements up to each, by doubling: mean ``[..., n, D, E]``, total ``[..., n, D]``, place ``[..., n]``."""
    size = 1
    while size < x.total.shape[-2]:
        age = w.unsqueeze(-1) * (place - F.pad(place, (size, -size)))
        older = F.pad(x.total, (0, 0, size, -size), value=EMPTY) - age.unsqueeze(-1)
        x = _merged(Average(F.pad(x.mean, (0, 0, 0, 0, size, -size)), older), x)
        size *= 2
    return x


def _inputs(q: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> tuple[Tensor, ...]:
    """All in float32 or wider, keys and values for every query head."""
    return tuple(x.to(wide(q)) for x in (q, *per_head(q, k, v), w, u))


def _places(q: Tensor, padding: Tensor | None) -> Tensor:
    """Number of each token among the real ones, from 1, ``[B, 1, N]``."""
    if padding is None:
        return torch.arange(1, q.shape[2] + 1, device=q.device, dtype=wide(q)).expand(q.shape[0], 1, -1)
    return padding.cumsum(1)[:, None].to(wide(q))


def _start(q: Tensor, v: Tensor, state: State | None) -> Average:
    (b, h, _, d), e = q.shape, v.shape[-1]
    if state is None:
        return Average(q.new_zeros(b, h, d, e, dtype=wide(q)), q.new_full((b, h, d), EMPTY, dtype=wide(q)))
    state.of("restore-rwkv", mean=(b, h, d, e), total=(b, h, d))
    return Average(state["mean"], state["total"])


def _state(x: Average, before: State | None, tokens: int) -> State:
    return after("restore-rwkv", before, tokens, **x._asdict())


@final
@dataclass(frozen=True, kw_only=True)
class RestoreRWKV(Operator):
    """Averages with exponential weights in keys and distance, on both sides."""

    spec: ClassVar[OperatorSpec] = OperatorSpec(
        id="restore-rwkv",
        title="Bidirectional WKV (Restore-RWKV)",
        paper="arXiv:2407.11087",
        source="code",
        summary="Each token averages the values of all tokens with weights exp(key) that fade with the distance on both "
        "sides: two scans instead of a map; in images along rows, then along columns.",
        shown="Denoising photos with a small network: scans along rows and columns beat rows alone, and both beat convolutions.",
        honest="Nothing a query says changes what is read, only how much of it; one order of the pixels reaches far along one "
        "axis alone.",
        limits=(
            Limit(
                equals="lightnet", inputs={"w": 0.0, "u": 0.0}, says="without distances or a bonus: softmax averages"
            ),
        ),
        trials=({}, {"chunk_size": 5}, {"chunk_size": 4, "distance_offset": 0}),
        causal="both",
        cross=False,
        scale=None,
        reference=reference,
        fast=fast,
        loop=loop,
        initial=initial,
        step=step,
        wiring=Wiring(queries=torch.sigmoid),
        extras={
            "w": Extra(
                axes="h",
                sample=torch.randn,
                role="parameter",
                extremes=(0.0, 20.0, -20.0, 1e4),
                doc="what the log of a weight loses with each token of distance",
                learnt=Learnt(axes="h", value=F.softplus, start=lambda place: torch.linspace(-6.0, 0.0, place.heads)),
            ),
            "u": Extra(
                axes="h",
                sample=torch.randn,
                role="parameter",
                extremes=(0.0, 300.0, -300.0),
                doc="bonus of a token for itself, added to its key",
                learnt=Learnt(axes="h"),
            ),
        },
    )
    distance_offset: int = param(
        1, "distance at which nothing has faded yet: at 1 neighbours count in full", low=0, high=1
    )
    chunk_size: int = param(64, "tokens per chunk of the scan", low=1)
