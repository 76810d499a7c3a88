r"""LongVQ's attention: keys from a codebook, so that the whole past before a window is one weighted mean per code.

    z_j = argmin_s |k_j - C_s|^2,   khat_j = C_{z_j};   query t lies in block n = floor(t / L), L = block_size
    own and previous block, j <= t:     score scale q_t . khat_j + bias(t - j),   value v_j
    older tokens, by code s:            score scale q_t . C_s + log c_s,          value ubar_s  (count and mean of values)
    one softmax over both

Exact, because sum_j exp(scale q . C_{z_j}) v_j = sum_s exp(scale q . C_s) c_s ubar_s: it equals softmax attention over the
quantised keys. ``window_exact`` keeps the keys of the window as they are. ``straight_through`` gives k the gradient of khat in
the window (training of projections); otherwise quantised keys pass none on. Completed from the abstract and the mathematics of
Transformer-VQ (Lingle 2023): block layout and defaults are ours. The structured memory that makes q and k, the gates around it
and the codebook's moving averages are the layer `vq-gated-attention`. A model that takes the operator alone learns the codebook
as a parameter, from the scores of older codes: nothing draws codes to the keys, and sequences of one block do not train it. To
place codes where keys are, fit them (k-means) and pass them as `codebook`. Keys must not be rotated by position, or they do not
cluster.

State: per key head `counts` ``[B, G, S]`` and `means` ``[B, G, S, E]`` of the codes; the window's `keys` ``[B, G, 2 L, D]``
(as they are scored), `values` and `codes`, slots 0..L-1 the previous block; `position` ``[B]``.

No setting makes it another operator of this library.

Axes: B batch, H query heads, G key/value heads, N tokens, L block, S codes, w distances with a bias, D key width, E value width.
Liu et al. 2024, LongVQ: Long Sequence Modeling with Vector Quantization on Structured Memory, arXiv:2404.11163.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.core.operator import Operator, OperatorSpec, Wiring
from qkv.core.rows import take_head_rows
from qkv.core.spec import Extra, Learnt, Place, param
from qkv.core.state import State
from qkv.ops._common.states import after, unrounded, wide


class Memory(NamedTuple):
    """The state by name; see the file's description."""

    counts: Tensor
    means: Tensor
    keys: Tensor
    values: Tensor
    codes: Tensor
    position: Tensor


@unrounded
def reference(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, codebook: Tensor, bias: Tensor | None = None,
    padding: Tensor | None = None, initial_state: State | None = None, return_state: bool = False, block_size: int = 64,
    window_exact: bool = False, straight_through: bool = False,
) -> Any:  # fmt: skip
    """Softmax over every quantised key, one by one (and over the codes of the state).

    q ``[B, H, N, D]``, k ``[B, G, N, D]``, v ``[B, G, N, E]`` -> ``[B, H, N, E]``, or that and the state.
    """
    dtype, repeat, size = q.dtype, q.shape[1] // k.shape[1], block_size
    m = _memory(q, k, v, codebook, initial_state, size)
    real = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device) if padding is None else padding
    z, scored = quantise(k, codebook, window_exact, straight_through)
    t = m.position[:, None] + real.cumsum(1) - 1  # positions of the queries, [B, N]
    held = (m.position[:, None] // size - 1) * size + torch.arange(2 * size, device=k.device)
    there = torch.cat([(held >= 0) & (held < m.position[:, None]), real], 1)  # [B, 2 L + N]
    place = torch.cat([held, t], 1)
    keys, values = torch.cat([m.keys, scored.to(m.keys)], 2), torch.cat([m.values, v.to(m.values)], 2)
    codes = torch.cat([m.codes, z], 2)
    age = t[:, :, None] - place[:, None]  # [B, N, 2 L + N]
    seen = there[:, None] & (age >= 0)
    near = place[:, None] // size >= t[:, :, None] // size - 1
    every = codebook.to(keys).expand(k.shape[0], -1, -1, -1)
    quantised = take_head_rows(every, codes)
    of = lambda x: x.repeat_interleave(repeat, 1).to(dtype)  # noqa: E731
    logits = torch.where(near[:, None], scale * (q @ of(keys).mT) + _bias(bias, age, q), scale * (q @ of(quantised).mT))
    counts = m.counts.repeat_interleave(repeat, 1).unsqueeze(2)
    older = scale * (q @ of(every).mT) + counts.clamp(min=1).to(wide(q)).log().to(dtype)
    mask = torch.cat([(counts > 0).expand_as(older), seen[:, None].expand_as(logits)], -1)
    weights = (
        torch.cat([older, logits], -1).masked_fill(~mask, torch.finfo(dtype).min).softmax(-1).masked_fill(~mask, 0.0)
    )
    out = weights @ torch.cat([of(m.means), of(values)], 2)
    if not return_state:
        return out
    position = m.position + real.sum(1)
    start = (position // size - 1) * size  # first position that stays in the window
    slots = start[:, None] + torch.arange(2 * size, device=k.device)
    stays = ((slots[:, :, None] == place[:, None]) & there[:, None]).unsqueeze(1)  # [B, 1, 2 L, 2 L + N]
    leaves = (there & (place < start[:, None]))[:, None, :, None] & (codes.unsqueeze(-1) == _numbers(codebook))
    counts, means = _folded(m.counts, m.means, leaves.to(values), values)
    inside = stays.to(values)
    ends = Memory(counts, means, inside @ keys, inside @ values, (stays * codes.unsqueeze(2)).sum(-1), position)
    return out, after("longvq", initial_state, q.shape[2], **ends._asdict())


@unrounded
def fast(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, codebook: Tensor, bias: Tensor | None = None,
    padding: Tensor | None = None, initial_state: State | None = None, return_state: bool = False, block_size: int = 64,
    window_exact: bool = False, straight_through: bool = False,
) -> Any:  # fmt: skip
    """A softmax of 2 L + S entries per query: block sums per code, added up over the blocks; shapes as in `reference`."""
    dtype, (b, h, n, _), g, size = q.dtype, q.shape, k.shape[1], block_size
    m = _memory(q, k, v, codebook, initial_state, size)
    z, scored = quantise(k, codebook, window_exact, straight_through)
    q, scored, v, codebook = (x.to(wide(x)) for x in (q, scored, v, codebook))
    real = torch.ones(b, n, dtype=torch.bool, device=k.device) if padding is None else padding
    blocks = 2 + (n if initial_state is None else n + size - 1) // size  # the first is the previous block of the state
    length, begin = blocks * size, size + m.position % size
    place = (begin[:, None] + real.cumsum(1) - 1).masked_fill(~real, length)  # slot of each token
    keys, values = _placed(scored, m.keys, place, length), _placed(v, m.values, place, length)
    codes = _placed(z.unsqueeze(-1), m.codes.unsqueeze(-1), place, length).squeeze(-1)
    queries = _placed(q, None, place, length).unflatten(2, (blocks, size))[:, :, 1:]  # [B, H, blocks - 1, L, D]
    slot = torch.arange(length, device=k.device)
    end = begin + real.sum(1)
    there = torch.where(slot < size, (m.position >= size)[:, None], slot < end[:, None])  # [B, length]
    marks = (codes.unsqueeze(-1) == _numbers(codebook)) & there[:, None, :, None]
    marks = marks.to(v).unflatten(2, (blocks, size))  # [B, G, blocks, L, S]
    by_block, (keys, values) = (
        values.unflatten(2, (blocks, size)),
        (x.unflatten(2, (blocks, size)) for x in (keys, values)),
    )
    counts = torch.cat([m.counts.to(v).unsqueeze(2), marks.sum(3)], 2).cumsum(
        2
    )  # before each block, two back: [B, G, blocks + 1, S]
    sums = torch.cat([(m.means * m.counts.unsqueeze(-1)).unsqueeze(2), marks.mT @ by_block], 2).cumsum(2)
    means = sums / counts.clamp(min=1.0).unsqueeze(-1)
    pair = lambda x: torch.cat([x[:, :, :-1], x[:, :, 1:]], 3)  # noqa: E731  own and previous block
    of = lambda x: x.repeat_interleave(h // g, 1)  # noqa: E731
    i = torch.arange(size, device=k.device)
    age = i[:, None] + size - torch.arange(2 * size, device=k.device)  # [L, 2 L]
    near = scale * (queries @ of(pair(keys)).mT) + _bias(bias, age[None, None], q)
    seen = pair(there[:, None].unflatten(2, (blocks, size))).unsqueeze(3) & (age >= 0)  # [B, 1, blocks - 1, L, 2 L]
    far = of(counts[:, :, : blocks - 1]).unsqueeze(3)  # [B, H, blocks - 1, 1, S]
    older = scale * (queries @ of(codebook[None]).mT.unsqueeze(2)) + far.clamp(min=1.0).log()
    mask = torch.cat([(far > 0).expand_as(older), seen.expand_as(near)], -1)
    weights = (
        torch.cat([older, near], -1).masked_fill(~mask, torch.finfo(q.dtype).min).softmax(-1).masked_fill(~mask, 0.0)
    )
    out = weights @ of(torch.cat([means[:, :, : blocks - 1], pair(values)], 3))
    index = (place - size).clamp(0, length - size - 1)[:, None, :, None].expand(-1, h, -1, v.shape[-1])
    out = out.flatten(2, 3).gather(2, index).to(dtype)
    if not return_state:
        return out
    last = end // size - 1  # the block that is the previous one now
    window = (last * size)[:, None] + torch.arange(2 * size, device=k.device)
    take = lambda x, at: x.gather(2, at.reshape(b, 1, -1, *(1,) * (x.ndim - 3)).expand(-1, g, -1, *x.shape[3:]))  # noqa: E731
    ends = Memory(
        take(counts, last).squeeze(2).round().long(), take(means, last).squeeze(2), take(keys.flatten(2, 3), window),
        take(values.flatten(2, 3), window), take(codes, window), m.position + real.sum(1),
    )  # fmt: skip
    return out, after("longvq", initial_state, n, **ends._asdict())


@unrounded
def step(
    q: Tensor, k: Tensor, v: Tensor, state: State, *, scale: float, codebook: Tensor, bias: Tensor | None = None,
    padding: Tensor | None = None, block_size: int = 64, window_exact: bool = False, straight_through: bool = False,
) -> tuple[Tensor, State]:  # fmt: skip
    """One token: q ``[B, H, 1, D]``, k ``[B, G, 1, D]``, v ``[B, G, 1, E]`` -> out ``[B, H, 1, E]``, new state."""
    dtype, repeat, size = q.dtype, q.shape[1] // k.shape[1], block_size
    m = _memory(q, k, v, codebook, state, size)
    z, scored = quantise(k, codebook, window_exact, straight_through)
    q, codebook = q.to(wide(q)), codebook.to(wide(q))
    real = torch.ones(k.shape[0], dtype=torch.bool, device=k.device) if padding is None else padding[:, 0]
    slot, at = torch.arange(2 * size, device=k.device), size + m.position % size  # [2 L], [B]
    here = (slot == at[:, None]) & real[:, None]
    put = lambda new, old: torch.where(here.reshape(-1, 1, 2 * size, *(1,) * (old.ndim - 3)), new.to(old), old)  # noqa: E731
    keys, values, codes = put(scored, m.keys), put(v, m.values), put(z, m.codes)
    age = at[:, None] - slot
    there = torch.where(slot < size, (m.position >= size)[:, None], age >= 0)[:, None, None]  # [B, 1, 1, 2 L]
    of = lambda x: x.repeat_interleave(repeat, 1)  # noqa: E731
    near = scale * (q @ of(keys).mT) + _bias(bias, age.unsqueeze(1), q)
    counts = of(m.counts).unsqueeze(2)
    older = scale * (q @ of(codebook[None]).mT) + counts.clamp(min=1).to(q).log()
    mask = torch.cat([counts > 0, there.expand_as(near)], -1)
    weights = (
        torch.cat([older, near], -1).masked_fill(~mask, torch.finfo(q.dtype).min).softmax(-1).masked_fill(~mask, 0.0)
    )
    out = weights @ torch.cat([of(m.means), of(values)], 2)
    whole = real & (at == 2 * size - 1)  # the block is full: the one before it goes into the codes
    folds = (whole & (m.position >= size))[:, None, None, None] & (codes[:, :, :size, None] == _numbers(codebook))
    new_counts, means = _folded(m.counts, m.means, folds.to(values), values[:, :, :size])

    def moved(x: Tensor) -> Tensor:
        shifted = torch.cat([x[:, :, size:], torch.zeros_like(x[:, :, :size])], 2)
        return torch.where(whole.reshape(-1, *(1,) * (x.ndim - 1)), shifted, x)

    ends = Memory(new_counts, means, moved(keys), moved(values), moved(codes), m.position + real)
    return out.to(dtype), after("longvq", state, 1, **ends._asdict())


def initial(
    q: Tensor, k: Tensor, v: Tensor, *, codebook: Tensor, bias: Tensor | None = None, block_size: int = 64
) -> State:
    """The empty state at position 0."""
    return after("longvq", None, 0, **_memory(q, k, v, codebook, None, block_size)._asdict())


@unrounded
def quantise(k: Tensor, codebook: Tensor, exact: bool = False, straight_through: bool = False) -> tuple[Tensor, Tensor]:
    """Codes z ``[B, G, M]`` of keys ``[B, G, M, D]`` in a codebook ``[G, S, D]``, and the keys as the window scores them.

    Distances are taken in float32 or wider. exact: the keys themselves. straight_through: khat with the gradient of k.
    """
    far, near = codebook.to(wide(k)), k.to(wide(k))
    z = (far.square().sum(-1)[:, None] - 2 * near @ far.mT).argmin(-1)
    if exact:
        return z, k
    quantised = take_head_rows(codebook.expand(k.shape[0], -1, -1, -1), z)
    return z, k + (quantised - k).detach() if straight_through else quantised


def _bias(bias: Tensor | None, age: Tensor, like: Tensor) -> Tensor:
    """Bias by distance for age ``[B|1, N, M]``: ``[B|1, H, N, M]``; with one axis more in front, one more comes out."""
    if bias is None:
        return like.new_zeros(())
    w = bias.shape[-1]
    table = F.pad(bias.to(like.dtype), (0, 1))  # beyond w: none
    got = table[:, age.clamp(0, w)]  # [H, *age]
    return got.movedim(0, 1)


def _numbers(codebook: Tensor) -> Tensor:
    return torch.arange(codebook.shape[1], device=codebook.device)


def _folded(counts: Tensor, means: Tensor, marks: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and means with the tokens of marks ``[B, G, M, S]`` added."""
    new = marks.sum(2)
    total = counts + new.round().long()
    change = marks.mT @ values - new.unsqueeze(-1) * means
    return total, means + change / total.clamp(min=1).unsqueeze(-1)


def _placed(x: Tensor, window: Tensor | None, place: Tensor, length: int) -> Tensor:
    """Tokens ``[B, G, N, .]`` at their slots ``[B, G, length, .]``, after those of the window; slot `length` is thrown away."""
    out = x.new_zeros(*x.shape[:2], length + 1, x.shape[-1])
    if window is not None:
        out = torch.cat([window.to(x.dtype), out[:, :, window.shape[2] :]], 2)
    return out.scatter(2, place[:, None, :, None].expand_as(x), x)[:, :, :length]


def _memory(q: Tensor, k: Tensor, v: Tensor, codebook: Tensor, state: State | None, size: int) -> Memory:
    (b, g, _, d), e, s = k.shape, v.shape[-1], codebook.shape[1]
    shapes = {"counts": (b, g, s), "means": (b, g, s, e), "keys": (b, g, 2 * size, d), "values": (b, g, 2 * size, e),
              "codes": (b, g, 2 * size), "position": (b,)}  # fmt: skip
    if state is not None:
        state.of("longvq", **shapes)
        return Memory(*(state[name] for name in Memory._fields))
    kinds = {name: torch.int64 if name in ("counts", "codes", "position") else wide(q) for name in shapes}
    return Memory(**{name: torch.zeros(x, dtype=kinds[name], device=q.device) for name, x in shapes.items()})


def _codes(place: Place) -> Tensor:
    """64 codes a key/value head to begin with, each layer its own."""
    draw = torch.Generator().manual_seed(place.layer)
    return torch.randn(place.kv_heads, 64, place.key_width, generator=draw)


@final
@dataclass(frozen=True, kw_only=True)
class LongVQ(Operator):
    """Softmax attention over quantised keys, in linear time."""

    spec: ClassVar[OperatorSpec] = OperatorSpec(
        id="longvq",
        title="LongVQ: vector-quantised attention",
        paper="arXiv:2404.11163",
        source="abstract",
        summary="Keys take one of S values, so that softmax attention over all tokens before a window is a weighted mean per "
        "code, kept in constant memory; the window stays token by token with a learned bias.",
        shown="A byte model with codes behind its window reaches a lower loss than with the window alone; the whole layer, "
        "`vq-gated-attention`, a lower one than this operator alone, with keys near their codes.",
        honest="Old tokens with the same code cannot be told apart; the codebook must fit the keys, and rotated keys do not "
        "cluster. Alone, nothing keeps codes near keys: `vq-gated-attention` does.",
        trials=({"block_size": 3}, {"block_size": 4, "window_exact": True}, {"block_size": 8}),
        causal="only",
        cross=False,
        reference=reference,
        fast=fast,
        initial=initial,
        step=step,
        extras={
            "codebook": Extra(
                axes="gsd",
                sample=torch.randn,
                role="parameter",
                doc="S codes for the keys of each key head",
                learnt=Learnt(axes="gsd", start=_codes),
            ),
            "bias": Extra(
                axes="hw",
                sample=torch.randn,
                role="parameter",
                required=False,
                doc="added to scores in the window by distance 0 .. w - 1, after the scale; none beyond",
                learnt=Learnt(axes="hw", start=lambda place: torch.zeros(place.heads, 128)),
            ),
        },
        wiring=Wiring(settings=lambda place: {"straight_through": True}),
    )
    block_size: int = param(64, "tokens per block; a query sees its own and the previous one exactly", low=1)
    window_exact: bool = param(False, "score the window's own keys instead of their codes")
    straight_through: bool = param(False, "pass the gradient of quantised keys in the window on to the keys")
