r"""Agent attention: a few agents gather from keys and values by softmax, then every query reads the agents by softmax.

    V_A = softmax_j(s A K^T + B1) V,     out = softmax_n(s^p Q A^T + B2) V_A  (+ c V)

n agents A ``[B, H, n, D]``: given, or the queries averaged along the sequence, or over a `grid` to a square of sqrt(n) a side
(a class token, `prefix`, is query and key but is not pooled). The map P2 P1 is row-stochastic, of rank <= n: linear attention
with the features softmax(s Q A^T) and softmax(s A K^T). `maps` gives both factors, `key_bias` and `query_bias` make B1 and B2
from the published tables. The 3 x 3 depthwise convolution of the values that vision models add after it belongs to the
layer (`qkv.layers._agent.AgentAttention`). Without training inside diffusion models (AgentSD): ``second_power=0.3``,
``value_shortcut=0.075``, agents merged from the block's input, and exact attention where 2 n >= N.

Agents that are pooled see every query: without `agents` given there is no causal form. Given (learnt, or from a prompt), agent
n at time t is the average of the values so far, by a softmax over the keys so far (our completion). State: these averages
`values` ``[B, H, n, E]`` and the log-sum-exp `lse` ``[B, H, n]`` of their logits: a decay e^(lse_{t-1} - lse_t) per agent.

No setting makes it another operator of this library: with as many agents as queries two softmaxes still follow one another.

Axes: B batch, H query heads, G key/value heads, N queries, M keys, n = s agents, D head width, E value width.
Han et al. 2023, Agent Attention: On the Integration of Softmax and Linear Attention, arXiv:2312.08874.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.core.attend import sdpa
from qkv.core.errors import InvalidInput, InvalidParameter
from qkv.core.operator import Operator, OperatorSpec, Wiring
from qkv.core.spec import Extra, Learnt, Place, param
from qkv.core.state import State
from qkv.ops._common.decayed import decayed_linear_attention
from qkv.ops._common.pooling import summaries
from qkv.ops._common.states import after, per_head, wide
from qkv.ops._common.sums import EMPTY, softmax_weights

SLOWEST = -100.0  # a decay below e^-100 leaves nothing

Grid = Sequence[int] | None


def reference(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = True, padding: Tensor | None = None,
    initial_state: State | None = None, return_state: bool = False, agents: Tensor | None = None,
    bias_keys: Tensor | None = None, bias_queries: Tensor | None = None, num_agents: int = 49,
    grid: Grid = None, prefix: int = 0, second_power: float = 1.0, value_shortcut: float = 0.0,
) -> Any:  # fmt: skip
    """Both softmaxes as whole maps; causal: the first one anew for every query, ``[B, H, N, n, 1 + N]`` weights.

    q ``[B, H, N, D]``, k ``[B, G, M, D]``, v ``[B, G, M, E]`` -> ``[B, H, N, E]``, or that and the state.
    """
    k, v = per_head(q, k, v)
    a = _agents(q, k, agents, bias_keys, bias_queries, padding, num_agents, grid, prefix).to(q.dtype)
    shortcut = _shortcut(q, v, value_shortcut)
    read = _second(q @ a.mT, scale, second_power, bias_queries).softmax(-1)  # P2, [B, H, N, n]
    logits = scale * (a @ k.mT) if bias_keys is None else scale * (a @ k.mT) + bias_keys.to(q.dtype)  # [B, H, n, M]
    if not causal:
        return read @ (_masked(logits, padding) @ v) + shortcut
    held, lse = _memory(q, v, a.shape[2], initial_state)
    n = q.shape[2]
    logits = torch.cat([lse.unsqueeze(-1), logits], -1).unsqueeze(2)  # the state counts as one token
    seen = torch.ones(n, n, dtype=torch.bool, device=q.device).tril()
    seen = seen if padding is None else seen & padding[:, None, :]
    seen = F.pad(seen.reshape(-1, 1, n, 1, n), (1, 0), value=True)
    weights = logits.masked_fill(~seen, EMPTY).softmax(-1)
    weights = weights.masked_fill(~(seen & (logits > EMPTY / 2)), 0.0)
    every = weights[..., :1] * held.unsqueeze(2) + weights[..., 1:] @ v.to(weights).unsqueeze(2)  # V_A, [B, H, N, n, E]
    out = (read.unsqueeze(3).to(every) @ every).squeeze(3).to(q.dtype) + shortcut
    if not return_state:
        return out
    lse = logits.masked_fill(~seen, EMPTY)[:, :, -1].logsumexp(-1).clamp(min=EMPTY)
    return out, after("agent", initial_state, n, values=every[:, :, -1], lse=lse)


def loop(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = True, padding: Tensor | None = None,
    initial_state: State | None = None, return_state: bool = False, agents: Tensor | None = None,
    bias_keys: Tensor | None = None, bias_queries: Tensor | None = None, num_agents: int = 49,
    grid: Grid = None, prefix: int = 0, second_power: float = 1.0, value_shortcut: float = 0.0,
) -> Any:  # fmt: skip
    """Linear attention whose key features are e^logit and whose query features are P2 over their sums; token by token."""
    k, v = per_head(q, k, v)
    a = _agents(q, k, agents, bias_keys, bias_queries, padding, num_agents, grid, prefix)
    held, lse = _memory(q, v, a.shape[2], initial_state)
    weights = lse.exp()  # plain sums: small logits only
    total = held * weights.unsqueeze(-1)
    outs, shortcut = [], _shortcut(q, v, value_shortcut)

    def read(i: int) -> Tensor:
        scores = torch.einsum("bhd,bhnd->bhn", q[:, :, i], a) * scale**second_power
        scores = scores if bias_queries is None else scores + bias_queries[:, i]
        sums = torch.where(weights > 0, weights, 1.0)
        return torch.einsum("bhn,bhne->bhe", scores.softmax(-1) / sums, total)

    for t in range(k.shape[2]):
        logit = torch.einsum("bhd,bhnd->bhn", k[:, :, t], a) * scale
        key = (logit if bias_keys is None else logit + bias_keys[..., t]).exp()
        key = key if padding is None else key * padding[:, t, None, None]
        weights, total = weights + key, total + key.unsqueeze(-1) * v[:, :, t, None]
        if causal:
            outs.append(read(t))
    out = torch.stack(outs if causal else [read(i) for i in range(q.shape[2])], 2) + shortcut
    if not return_state:
        return out
    values = total / torch.where(weights > 0, weights, 1.0).unsqueeze(-1)
    return out, after("agent", initial_state, k.shape[2], values=values, lse=weights.log().clamp(min=EMPTY))


def fast(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = True, padding: Tensor | None = None,
    initial_state: State | None = None, return_state: bool = False, agents: Tensor | None = None,
    bias_keys: Tensor | None = None, bias_queries: Tensor | None = None, num_agents: int = 49,
    grid: Grid = None, prefix: int = 0, second_power: float = 1.0, value_shortcut: float = 0.0, chunk_size: int = 64,
    sub_chunk: int = 16,
) -> Any:  # fmt: skip
    """Two fused attentions; causal: log-sum-exps by a scan, then chunks of decayed linear attention. Shapes as in `reference`."""
    dtype = q.dtype
    a = _agents(q, k, agents, bias_keys, bias_queries, padding, num_agents, grid, prefix)
    if not causal:
        gathered = _attend(a.to(dtype), k, v, scale, bias_keys, padding)
        out = _attend(q, a.to(dtype), gathered, scale**second_power, bias_queries, None)
        return out + _shortcut(q, v, value_shortcut)
    k, v = per_head(q, k, v)
    read = _second(q.to(a) @ a.mT, scale, second_power, bias_queries).softmax(-1)
    logits = (
        scale * (k.to(a) @ a.mT) if bias_keys is None else scale * (k.to(a) @ a.mT) + bias_keys.mT.to(a)
    )  # [B, H, N, n]
    if padding is not None:
        logits = logits.masked_fill(~padding[:, None, :, None], EMPTY)
    held, lse = _memory(q, v, a.shape[2], initial_state)
    every = torch.cat([lse.unsqueeze(2), logits], 2).logcumsumexp(2)  # [B, H, 1 + N, n]
    before, lse = every[:, :, :-1], every[:, :, 1:]
    decay = (before - lse).clamp(SLOWEST, 0.0).masked_fill(before <= EMPTY / 2, 0.0)  # nothing was there: nothing fades
    keys = softmax_weights(logits, lse)
    out, held, _ = decayed_linear_attention(
        read, keys, v.to(a), log_decay=decay, state=held, chunk_size=chunk_size, sub_chunk=sub_chunk
    )
    out = out.to(dtype) + _shortcut(q, v, value_shortcut)
    if not return_state:
        return out
    return out, after("agent", initial_state, q.shape[2], values=held, lse=lse[:, :, -1].clamp(min=EMPTY))


def initial(q: Tensor, k: Tensor, v: Tensor, *, agents: Tensor, bias_keys: Tensor | None = None,
            bias_queries: Tensor | None = None) -> State:  # fmt: skip
    """The empty state: averages of nothing (0), with a log-sum-exp of `EMPTY`."""
    values, lse = _memory(q, v, agents.shape[-2], None)
    return after("agent", None, 0, values=values, lse=lse)


def step(
    q: Tensor, k: Tensor, v: Tensor, state: State, *, scale: float, agents: Tensor, padding: Tensor | None = None,
    bias_keys: Tensor | None = None, bias_queries: Tensor | None = None, second_power: float = 1.0,
    value_shortcut: float = 0.0,
) -> tuple[Tensor, State]:  # fmt: skip
    """One token: q ``[B, H, 1, D]``, k ``[B, G, 1, D]``, v ``[B, G, 1, E]`` -> out ``[B, H, 1, E]``, new state."""
    dtype = q.dtype
    a = _agents(q, k, agents, bias_keys, bias_queries, padding, 0, None, 0)
    k, v = per_head(q, k, v)
    held, lse = _memory(q, v, a.shape[2], state)
    read = _second(q.to(a) @ a.mT, scale, second_power, bias_queries).softmax(-1)
    logits = (
        scale * (k.to(a) @ a.mT) if bias_keys is None else scale * (k.to(a) @ a.mT) + bias_keys.mT.to(a)
    )  # [B, H, 1, n]
    if padding is not None:
        logits = logits.masked_fill(~padding[:, None, :, None], EMPTY)
    new = torch.logaddexp(lse.unsqueeze(2), logits).clamp(min=EMPTY)
    keep = (lse.unsqueeze(2) - new).clamp(max=0.0).exp()
    held = keep.mT * held + softmax_weights(logits, new).mT * v.to(a)
    return (read @ held).to(dtype) + _shortcut(q, v, value_shortcut), after(
        "agent", state, 1, values=held, lse=new[:, :, 0]
    )


def maps(
    q: Tensor, k: Tensor, *, scale: float, agents: Tensor, padding: Tensor | None = None, bias_keys: Tensor | None = None,
    bias_queries: Tensor | None = None, second_power: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The two bidirectional factors: P2 ``[B, H, N, n]`` (queries read agents) and P1 ``[B, H, n, M]``; the map is P2 P1."""
    (k,) = per_head(q, k)
    logits = scale * (agents @ k.mT) if bias_keys is None else scale * (agents @ k.mT) + bias_keys
    return _second(q @ agents.mT, scale, second_power, bias_queries).softmax(-1), _masked(logits, padding)


def key_bias(table: Tensor, rows: Tensor, columns: Tensor, grid: Sequence[int], prefix: Tensor | None = None) -> Tensor:
    """B1 ``[H, n, M]`` on a grid (h, w), from the published tables.

    table (`an`) ``[H, n, a, b]`` is resized bilinearly; rows (`ah`) ``[H, n, h]`` and columns (`aw`) ``[H, n, w]`` are added,
    resized linearly where the grid is another one; prefix (`ac`) ``[H, n, p]`` stands for class tokens, before the grid.
    Raises `InvalidInput`.
    """
    if len(tuple(grid)) != 2 or table.ndim != 4 or rows.ndim != 3 or columns.ndim != 3:
        raise InvalidInput(
            f"bias tables [H, n, a, b], [H, n, h], [H, n, w] and a grid (h, w) are needed; got {tuple(table.shape)}, "
            f"{tuple(rows.shape)}, {tuple(columns.shape)} and {tuple(grid)}"
        )
    h, w = grid
    bias = F.interpolate(table, size=(h, w), mode="bilinear")
    bias = bias + _resized(rows, h).unsqueeze(-1) + _resized(columns, w).unsqueeze(-2)
    bias = bias.flatten(2)
    return bias if prefix is None else torch.cat([prefix, bias], -1)


def query_bias(
    table: Tensor, rows: Tensor, columns: Tensor, grid: Sequence[int], prefix: Tensor | None = None
) -> Tensor:
    """B2 ``[H, N, n]``: `key_bias` turned, `na` ``[H, n, a, b]``, `ha` ``[H, h, n]``, `wa` ``[H, w, n]``, `ca` ``[H, p, n]``."""
    return key_bias(table, rows.mT, columns.mT, grid, None if prefix is None else prefix.mT).mT


def _resized(x: Tensor, size: int) -> Tensor:
    return x if x.shape[-1] == size else F.interpolate(x, size=size, mode="linear")


def _agents(
    q: Tensor, k: Tensor, agents: Tensor | None, bias_keys: Tensor | None, bias_queries: Tensor | None,
    padding: Tensor | None, count: int, grid: Grid, prefix: int,
) -> Tensor:  # fmt: skip
    """A ``[B, H, n, D]`` in float32 or wider."""
    if agents is None:
        real = padding if padding is not None and q.shape[2] == k.shape[2] else None
        a = summaries(q, count, real, grid=grid, prefix=prefix, who="agent")
    else:
        a = agents.to(wide(q))
        a = a.expand(q.shape[0], *a.shape) if a.ndim == 3 else a
    for name, bias, axis in (("bias_keys", bias_keys, 1), ("bias_queries", bias_queries, 2)):
        if bias is not None and bias.shape[axis] != a.shape[2]:
            raise InvalidInput(
                f"agent: `{name}` {tuple(bias.shape)} is for {bias.shape[axis]} agents, here are {a.shape[2]}"
            )
    return a


def _second(scores: Tensor, scale: float, power: float, bias: Tensor | None) -> Tensor:
    scores = _power(scale, power) * scores
    return scores if bias is None else scores + bias.to(scores)


def _power(scale: float, power: float) -> float:
    if scale <= 0 and power != 1.0:
        raise InvalidInput(f"agent: scale={scale} has no power second_power={power}; give a positive scale")
    return scale**power


def _masked(logits: Tensor, padding: Tensor | None) -> Tensor:
    """Softmax over the real keys; 0 for a row without one."""
    if padding is None:
        return logits.softmax(-1)
    gone = ~padding[:, None, None, :]
    return logits.masked_fill(gone, torch.finfo(logits.dtype).min).softmax(-1).masked_fill(gone, 0.0)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, padding: Tensor | None) -> Tensor:
    """Fused attention with an additive bias ``[H, N, M]``."""
    if bias is None:
        return sdpa(q, k, v, mask=None if padding is None else padding[:, None, None, :], scale=scale)
    k, v = per_head(q, k, v)
    mask = bias.to(q.dtype).expand(q.shape[0], -1, -1, -1)
    if padding is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    mask = mask.masked_fill(~padding[:, None, None, :], torch.finfo(q.dtype).min / 2)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.masked_fill(~padding.any(1)[:, None, None, None], 0.0)


def _shortcut(q: Tensor, v: Tensor, share: float) -> Tensor | float:
    if not share:
        return 0.0
    if q.shape[2] != v.shape[2]:
        raise InvalidInput(
            f"agent: value_shortcut adds each token's value; N={q.shape[2]} and M={v.shape[2]} must agree"
        )
    return share * per_head(q, v)[0]


def _memory(q: Tensor, v: Tensor, n: int, state: State | None) -> tuple[Tensor, Tensor]:
    b, h, e = q.shape[0], q.shape[1], v.shape[-1]
    if state is None:
        return q.new_zeros(b, h, n, e, dtype=wide(q)), q.new_full((b, h, n), EMPTY, dtype=wide(q))
    state.of("agent", values=(b, h, n, e), lse=(b, h, n))
    return state["values"], state["lse"]


def _settings(place: Place) -> dict[str, Any]:
    """On a grid: agents of the published number, or as many as its smaller side allows."""
    if place.grid is None:
        return {}
    return {"grid": place.grid, "num_agents": min(7, max(1, min(place.grid) - 1)) ** 2}


def _fixed(place: Place) -> Tensor:
    """What a causal layer learns instead of averaging: 16 agents a head."""
    return torch.randn(place.heads, 16, place.key_width, generator=torch.Generator().manual_seed(place.layer))


@final
@dataclass(frozen=True, kw_only=True)
class Agent(Operator):
    """Attention through agents."""

    spec: ClassVar[OperatorSpec] = OperatorSpec(
        id="agent",
        title="Agent attention",
        paper="arXiv:2312.08874",
        source="code",
        summary="A few agent tokens gather from all keys by softmax and hand on to all queries by a second softmax: linear "
        "attention made of two exact ones.",
        shown="More agents come nearer to full attention without training; a small vision model with them is about as accurate "
        "as with softmax.",
        honest="Two softmaxes flatten the map: without a local convolution or shortcut beside it the features lose diversity, "
        "and agents that are pooled rule out decoding.",
        trials=(
            {"num_agents": 4},
            {"num_agents": 3, "second_power": 0.3, "chunk_size": 6, "sub_chunk": 3},
        ),
        causal="both",
        cross="bidirectional",
        causal_needs=("agents",),
        reference=reference,
        fast=fast,
        loop=loop,
        initial=initial,
        step=step,
        extras={
            "agents": Extra(
                axes="hsd|bhsd", sample=torch.randn, required=False,
                doc="the agents; without them queries are averaged, which is bidirectional: causal=False",
                learnt=Learnt(axes="hsd", start=_fixed),
            ),
            "bias_keys": Extra(
                axes="hsm", sample=torch.randn, role="parameter", required=False, doc="B1, added where agents read keys"
            ),
            "bias_queries": Extra(
                axes="hns", sample=torch.randn, role="parameter", required=False, doc="B2, added where queries read agents"
            ),
        },
        wiring=Wiring(settings=_settings),
    )  # fmt: skip
    num_agents: int = param(49, "agents made by averaging queries (on a grid: a square number)", low=1)
    grid: tuple[int, ...] | None = param(None, "rows and columns of the tokens; none: a sequence", low=1)
    prefix: int = param(0, "with a grid: tokens before it, which are not averaged (a class token)", low=0)
    second_power: float = param(1.0, "the second softmax has the scale to this power (0.3 without training)", low=0.0)
    value_shortcut: float = param(
        0.0, "share of each token's own value that is added (0.075 without training)", low=0.0
    )
    chunk_size: int = param(64, "tokens per chunk of the causal form", low=1)
    sub_chunk: int = param(16, "tokens per exact diagonal block of the causal form; divides chunk_size", low=1)

    def validate(self) -> None:
        """The diagonal blocks fill a chunk; agents on a grid form a square."""
        if self.chunk_size % self.sub_chunk:
            raise InvalidParameter(
                f"agent: chunk_size={self.chunk_size} must be a multiple of sub_chunk={self.sub_chunk}"
            )
        if self.grid is None:
            return
        if len(self.grid) != 2:
            raise InvalidParameter(f"agent: grid={self.grid} must be rows and columns, e.g. (14, 14)")
        if math.isqrt(self.num_agents) ** 2 != self.num_agents or math.isqrt(self.num_agents) > min(self.grid):
            raise InvalidParameter(
                f"agent: num_agents={self.num_agents} must be the square of a side that fits the grid {self.grid}"
            )
