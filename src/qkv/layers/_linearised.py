r"""What linearised pretrained attentions share: exact softmax over what is near, linear attention over what is far.

    near(t) = {j : t - w < j <= t} and m learned pairs,    s_tj = scale q_t . k_j,    mu_t = max over near(t) of s_tj
    N_t = sum_near exp(s_tj - mu_t) v_j                     n_t: the same sum of 1
    F_t = sum_{j <= t - w} exp(G_t - G_j) (phi(q_t) . phi(k_j)) v_j      f_t: the same sum of 1,   G = cumulative sum of log gates
    joint: o = (c N + F) / (c n + f)      sum: o = N / n + F' / f', where F' and f' run over all j <= t

    phi(x) = [softmax(x W) ; softmax(-x W)], W per head; c in (0, 1) per head

mu belongs to the definition of `joint`: the softmax side is shifted by it and the linear side is not, so the shift does not
cancel, and the two scales are tied by training alone. A token enters the far sum when it leaves the window, already aged by the
w gates it has passed: of keys delayed by w and scaled by exp(G_t - G_(t-w)) <= 1 the far sum is plain decaying linear attention.

Axes: B batch, H query heads, G key/value heads, R = H/G, N queries, P earlier tokens, D head width, E value width, K rank of the
feature map, F = 2K features, m learned pairs, W model width.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkv.core.attend import sdpa
from qkv.ops._common.decayed import decayed_linear_attention
from qkv.ops._common.positions import rotated
from qkv.ops._common.states import wide
from qkv.ops._common.sums import divided

WIDEST = 256  # channels of a head that the kernel of decaying linear attention holds
Gate = Literal["none", "scalar", "feature"]


class Tokens(NamedTuple):
    """What one layer makes of its tokens. Features, gates and scores are float32 or wider.

    q ``[B, H, N, D]`` and k ``[B, G, N, D]`` as the window sees them, source ``[B, G, N, D]`` the keys that features are taken
    from (k itself where they are the same), v ``[B, G, N, E]``, features ``[B, H, N, F]`` of the queries, gate ``[B, G, N, 1|F]``
    natural logs or None, meta ``[B, H, N, m]`` scores of the learned pairs or None.
    """

    q: Tensor
    k: Tensor
    source: Tensor
    v: Tensor
    features: Tensor
    gate: Tensor | None
    meta: Tensor | None


class Past(NamedTuple):
    """The newest P tokens before a block, oldest first, and the far sum up to the last of them.

    k, source, v, gate as in `Tokens`; real bool ``[B, P]``; state ``[B, G, F, E + 1]`` (the last column sums 1) or None: 0.
    """

    k: Tensor
    source: Tensor
    v: Tensor
    gate: Tensor | None
    real: Tensor
    state: Tensor | None


def softmax_features(x: Tensor, weight: Tensor) -> Tensor:
    """Features phi of `x` ``[B, H, N, D]`` under `weight` ``[H, D, K]`` -> ``[B, H, N, 2K]``."""
    dtype = wide(x)
    y = x.to(dtype) @ weight.to(dtype)
    return torch.cat((y.softmax(-1), (-y).softmax(-1)), -1)


# -- the two parts ----------------------------------------------------------------------------------------------------


def near(
    q: Tensor, k: Tensor, v: Tensor, *, window: int, scale: float, real: Tensor | None, meta: Tensor | None,
    meta_values: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """N ``[B, H, N, E]`` and n ``[B, H, N, 1]`` of queries that are the newest of the ``P + N`` keys; in blocks, wide sums.

    real: bool ``[B, P + N]`` or None. meta ``[B, H, N, m]``, meta_values ``[G, m, E]``: the learned pairs, or None.
    """
    (h, n), (g, m) = q.shape[1:3], k.shape[1:3]
    dtype, r = wide(q), h // g
    reach, size = min(window, m) - 1, min(n, max(64, min(window, 512)))
    blocks = -(-n // size)
    front, end, length = reach - (m - n), blocks * size - n, size + reach
    keys, values = (
        F.pad(x.to(dtype), (0, 0, front, end)).unfold(2, length, size) for x in (k, v)
    )  # [B, G, blocks, ., length]
    if real is None:
        real = torch.ones(1, m, dtype=torch.bool, device=q.device)
    there = F.pad(real, (front, end)).unfold(1, length, size)  # [B|1, blocks, length]
    rows = _blocks(q.to(dtype) * scale, g, size).flatten(3, 4)  # [B, G, blocks, R size, D]
    scores = (rows @ keys).unflatten(3, (r, size))
    i, j = (torch.arange(x, device=q.device) for x in (size, length))
    band = (j >= i[:, None]) & (j <= i[:, None] + reach)
    scores = scores.masked_fill(~(band & there[:, None, :, None, None]), -torch.inf)
    top = scores.amax(-1, keepdim=True)
    if meta is not None:
        meta = _blocks(meta, g, size)  # [B, G, blocks, R, size, m]
        top = torch.maximum(top, meta.amax(-1, keepdim=True))
    top = torch.where(torch.isfinite(top), top, 0.0)
    weights = (scores - top).exp()
    num = (weights.flatten(3, 4) @ values.mT).unflatten(3, (r, size))
    total = weights.sum(-1, keepdim=True)
    if meta is not None and meta_values is not None:
        more = (meta - top).exp()
        num = num + more @ meta_values.to(dtype)[:, None, None]
        total = total + more.sum(-1, keepdim=True)
    return tuple(x.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :, :n] for x in (num, total))  # type: ignore[return-value]


def _blocks(x: Tensor, g: int, size: int) -> Tensor:
    """``[B, H, N, .]`` -> ``[B, G, blocks, R, size, .]``, with zeros at the end."""
    x = F.pad(x, (0, 0, 0, -x.shape[2] % size)) if x.shape[2] % size else x
    return x.unflatten(2, (-1, size)).unflatten(1, (g, -1)).transpose(2, 3)


def far(
    features: Tensor, keys: Tensor, v: Tensor, gate: Tensor | None, *, delay: int, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """[F | f] ``[B, H, N, E + 1]`` of the newest N of ``P + N`` tokens, and the state ``[B, G, F, E + 1]`` after the last.

    features ``[B, H, N, F]`` of queries, keys ``[B, G, P + N, F]`` (0 at padding), v ``[B, G, P + N, E]``, gate
    ``[B, G, P + N, 1|F]`` (0 at padding) or None. delay: w for `joint`, 0 for `sum`.
    """
    (h, n), (g, m) = features.shape[1:3], keys.shape[1:3]
    p, r = m - n, h // g
    values = F.pad(v.to(keys.dtype), (0, 1), value=1.0)
    entering, values = (_shifted(x, p - delay, n) for x in (keys, values))
    decay = None
    if gate is not None:
        if delay:
            total = gate.to(torch.float64).cumsum(2)  # differences of long sums
            entering = entering * (total[:, :, p:] - _shifted(total, p - delay, n)).exp().to(keys.dtype)
        decay = gate[:, :, p:].repeat_interleave(r, 1)
        decay = decay.squeeze(-1) if decay.shape[-1] == 1 else decay
    start = None if state is None else state.repeat_interleave(r, 1)
    fits = features.is_cuda and features.dtype == torch.float32 and max(features.shape[-1], values.shape[-1]) <= WIDEST
    out, after, _ = decayed_linear_attention(
        features, entering, values, log_decay=decay, state=start, form="triton" if fits else "chunked"
    )
    return out, after[:, ::r]


def _shifted(x: Tensor, start: int, n: int) -> Tensor:
    """The N tokens of `x` from token `start` on, with zeros for those before the first."""
    return F.pad(x, (0, 0, max(0, -start), 0)).narrow(2, max(0, start), n)


# -- the layer --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LinearisedShape:
    """The sizes and choices that decide every tensor of a linearised layer; plain data, for manifests.

    window: w, the query's own token included. window_rope, feature_rope: whether the window, and the features, see rotated
    queries and keys. learned pairs see queries without rotation.
    """

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    window: int
    feature_dim: int
    num_meta: int = 0
    gate: Gate = "none"
    combine: Literal["joint", "sum"] = "joint"
    window_rope: bool = True
    feature_rope: bool = False
    bias: bool = False
    out_bias: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @property
    def features(self) -> int:
        """F."""
        return 2 * self.feature_dim

    @property
    def gates(self) -> int:
        """Gates per KV head and token."""
        return {"none": 0, "scalar": 1, "feature": self.features}[self.gate]

    @property
    def delay(self) -> int:
        """Tokens after which a token enters the far sum."""
        return self.window if self.combine == "joint" else 0


class LinearisedProjections(nn.Module):
    """The pretrained projections, and what linearisation adds to them. Abstract: hosts add their forward.

    Added: map_q ``[H, D, K]``, map_k ``[G, D, K]``; gate_proj (W to G or G F, with bias) unless gate is "none"; meta_keys
    ``[G, m, D]`` and meta_values ``[G, m, E]`` where m > 0; share ``[H]``, c = sigmoid(share), in `joint`. What is added is
    float32 or wider.
    """

    def __init__(self, shape: LinearisedShape, **factory: Any) -> None:
        super().__init__()
        s = self.shape = shape
        self.q_proj = nn.Linear(s.width, s.heads * s.head_dim, bias=s.bias, **factory)
        self.k_proj = nn.Linear(s.width, s.kv_heads * s.head_dim, bias=s.bias, **factory)
        self.v_proj = nn.Linear(s.width, s.kv_heads * s.value_dim, bias=s.bias, **factory)
        self.o_proj = nn.Linear(s.heads * s.value_dim, s.width, bias=s.out_bias, **factory)
        added: dict[str, Any] = factory | {
            "dtype": torch.promote_types(factory.get("dtype") or torch.float32, torch.float32)
        }

        def empty(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(size, **added))

        self.map_q, self.map_k = (empty(x, s.head_dim, s.feature_dim) for x in (s.heads, s.kv_heads))
        self.gate_proj = nn.Linear(s.width, s.kv_heads * s.gates, **added) if s.gates else None
        self.meta_keys = empty(s.kv_heads, s.num_meta, s.head_dim) if s.num_meta else None
        self.meta_values = empty(s.kv_heads, s.num_meta, s.value_dim) if s.num_meta else None
        self.share = empty(s.heads) if s.combine == "joint" else None

    def added(self) -> dict[str, nn.Parameter]:
        """The parameters that no pretrained layer has, by name."""
        return {
            n: p for n, p in self.named_parameters() if n.split(".")[0] not in ("q_proj", "k_proj", "v_proj", "o_proj")
        }

    def start(self, share: float, gate: float, pairs: tuple[Tensor, Tensor] | None) -> None:
        """Initial values: maps that are the identity, gates that are sigmoid(`gate`) whatever the token, c = sigmoid(`share`).

        pairs: keys ``[G, m, D]`` and values ``[G, m, E]`` for the learned pairs.
        """
        with torch.no_grad():
            for w in (self.map_q, self.map_k):
                w.copy_(torch.eye(*w.shape[1:], dtype=w.dtype, device=w.device).expand_as(w))
            if self.gate_proj is not None:
                self.gate_proj.weight.zero_()
                self.gate_proj.bias.fill_(gate)
            if self.share is not None:
                self.share.fill_(share)
            if pairs is not None and self.meta_keys is not None and self.meta_values is not None:
                self.meta_keys.copy_(pairs[0])
                self.meta_values.copy_(pairs[1])

    def read(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tokens:
        """What the layer makes of `hidden` ``[B, N, W]``; cos, sin ``[B|1, N, D]``, both halves alike."""
        s = self.shape
        q, k, v = (
            proj(hidden).unflatten(-1, (x, -1)).transpose(1, 2)
            for proj, x in ((self.q_proj, s.heads), (self.k_proj, s.kv_heads), (self.v_proj, s.kv_heads))
        )
        turned = tuple(rotated(x, cos, sin) for x in (q, k))
        near_q, near_k = turned if s.window_rope else (q, k)
        far_q, far_k = turned if s.feature_rope else (q, k)
        gate = meta = None
        if self.gate_proj is not None:
            dtype, w = wide(hidden), self.gate_proj
            gate = F.logsigmoid(F.linear(hidden.to(dtype), w.weight.to(dtype), w.bias.to(dtype)))
            gate = gate.unflatten(-1, (s.kv_heads, -1)).transpose(1, 2)  # [B, G, N, 1 | F]
        if self.meta_keys is not None:
            keys = self.meta_keys.to(wide(q)).repeat_interleave(s.heads // s.kv_heads, 0)
            meta = q.to(keys.dtype) @ keys.mT * s.scale
        return Tokens(near_q, near_k, far_k, v, softmax_features(far_q, self.map_q), gate, meta)

    def key_features(self, source: Tensor) -> Tensor:
        """Features phi of keys ``[B, G, M, D]``: ``[B, G, M, F]``."""
        return softmax_features(source, self.map_k)

    def weight(self, dtype: torch.dtype) -> Tensor | float:
        """Weights c ``[H, 1, 1]``, or 1 where the parts are summed."""
        return 1.0 if self.share is None else self.share.to(dtype).sigmoid()[:, None, None]

    def combined(self, num: Tensor, total: Tensor, far_part: Tensor) -> Tensor:
        """The output o from N ``[B, H, N, E]``, n ``[B, H, N, 1]`` and [F | f] ``[B, H, N, E + 1]``; 0 where nothing is seen."""
        if self.share is None:
            return divided(num, total) + divided(far_part[..., :-1], far_part[..., -1:])
        c = self.weight(num.dtype)
        return divided(c * num + far_part[..., :-1], c * total + far_part[..., -1:])

    def mix(self, t: Tokens, real: Tensor | None = None, past: Past | None = None) -> tuple[Tensor, Tensor | None]:
        """The attention of a block after `past`: out ``[B, H, N, E]``, and the far state after it (None: still zeros).

        real: bool ``[B, N]``, False = padding.
        """
        s, n = self.shape, t.q.shape[2]
        k, source, v, gate, state = t.k, t.source, t.v, t.gate, None
        if past is not None:
            k, source, v = (torch.cat(x, 2) for x in ((past.k, k), (past.source, source), (past.v, v)))
            gate = None if gate is None or past.gate is None else torch.cat((past.gate, gate), 2)
            real = torch.cat((past.real, past.real.new_ones(past.real.shape[0], n) if real is None else real), 1)
            state = past.state
        quiet = state is None and k.shape[2] <= s.delay  # nothing has left the window yet
        if quiet and t.meta is None:
            mask = None if real is None else real[:, None, None]
            return sdpa(t.q, k, v, mask=mask, causal=True, scale=s.scale), None
        num, total = near(
            t.q, k, v, window=s.window, scale=s.scale, real=real, meta=t.meta, meta_values=self.meta_values
        )
        if quiet:
            return divided(num, total).to(v.dtype), None
        keys = self.key_features(source)
        if real is not None:
            hidden = ~real[:, None, :, None]
            keys, v = keys.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
            gate = None if gate is None else gate.masked_fill(hidden, 0.0)
        part, state = far(t.features, keys, v, gate, delay=s.delay, state=state)
        return self.combined(num, total, part).to(v.dtype), state


# -- one row per token ------------------------------------------------------------------------------------------------


def packed(t: Tokens, shape: LinearisedShape) -> tuple[Tensor, Tensor]:
    """Query rows [q | features | meta] ``[B, H, N, .]`` and key rows [k | source | gate] ``[B, G, N, .]``, both wide.

    This is how a layer hands its tokens to a cache: as one tensor per side. `source` is left out where it is k.
    """
    dtype = t.features.dtype
    query = [t.q.to(dtype), t.features] + ([] if t.meta is None else [t.meta])
    key = [t.k.to(dtype)] + ([t.source.to(dtype)] if two_keys(shape) else []) + ([] if t.gate is None else [t.gate])
    return torch.cat(query, -1), torch.cat(key, -1)


def unpacked(query: Tensor, key: Tensor, v: Tensor, shape: LinearisedShape) -> Tokens:
    """The inverse of `packed`; queries and keys in v's dtype, as they were made."""
    d, f = shape.head_dim, shape.features
    q, features, meta = query[..., :d], query[..., d : d + f], query[..., d + f :]
    both = d * (1 + two_keys(shape))
    k, source, gate = key[..., :d], key[..., both - d : both], key[..., both:]
    return Tokens(
        q.to(v.dtype), k.to(v.dtype), source.to(v.dtype), v, features, gate if shape.gates else None,
        meta if shape.num_meta else None,
    )  # fmt: skip


def two_keys(shape: LinearisedShape) -> bool:
    """Whether the window and the features see different keys."""
    return shape.window_rope != shape.feature_rope
