r"""Multi-head latent attention (MLA): every token leaves one latent and one rotary key, shared by all heads.

    c_s = [RMSNorm] W_DKV x_s,   k_s = RoPE_s(W_KR x_s),   per head  q = [q_nope | RoPE_t(q_rope)] from W_Q x_t (or W_UQ W_DQ x_t)
    score = (q_nope . W_UK c_s + q_rope . k_s) / sqrt(nope + p),   out = W_O [sum_s p_s W_UV c_s]

Prefill expands c to heads and runs ordinary attention; decoding absorbs W_UK into the query and W_UV into the output, so that
the cache holds r + p numbers a token whatever the number of heads. Query heads may share up-projections (`kv_heads`): this is
what converted grouped-query layers are; the paper has one per head.

Axes: B batch, H query heads, G up-projected heads, N queries, M keys, W model width, r latent, p rotary width, E value width.
DeepSeek-V2, arXiv:2405.04434. Rotary pairs are (i, i + p/2), the half-split layout of transformers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from qkv.caches._stores.latent import LatentCache
from qkv.core.attend import causal_mask, sdpa
from qkv.core.cache import Step, require
from qkv.core.errors import InvalidInput
from qkv.core.layer import Layer, LayerSpec
from qkv.core.spec import Limit, param


def reference(
    q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, up_k: Tensor, up_v: Tensor, *, scale: float
) -> Tensor:
    """Causal MLA after rotation, head by head.

    q_nope ``[B, H, N, D]``, q_rope ``[B, H, N, p]``, latent ``[B, N, r]``, k_rope ``[B, N, p]``, up_k ``[G, D, r]``, up_v
    ``[G, E, r]`` -> ``[B, H, N, E]``.
    """
    outs = []
    for h in range(q_nope.shape[1]):
        g = h * up_k.shape[0] // q_nope.shape[1]
        keys, values = latent @ up_k[g].T, latent @ up_v[g].T  # [B, N, D], [B, N, E]
        scores = (q_nope[:, h] @ keys.mT + q_rope[:, h] @ k_rope.mT) * scale
        past = causal_mask(scores.shape[-1], scores.shape[-1], scores.device)
        outs.append(scores.masked_fill(~past, -torch.inf).softmax(-1) @ values)
    return torch.stack(outs, dim=1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` ``[B, H, N, p]`` turned by the angles whose cos, sin are ``[B|1, N, p/2]``."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


@lru_cache(maxsize=64)
def _on(frequencies: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(frequencies, dtype=torch.float64, device=device)


def angles(position: Tensor, frequencies: tuple[float, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``[B, N, p/2]`` of positions ``[B, N]`` times frequencies, in float32 or wider, then as `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    angle = position.to(wide).unsqueeze(-1) * _on(frequencies, position.device).to(wide)
    return angle.cos().to(dtype), angle.sin().to(dtype)


@dataclass(frozen=True, kw_only=True)
class MLAShape:
    """The sizes that decide every tensor of an MLA layer; plain data, for manifests."""

    width: int
    heads: int
    kv_heads: int
    kv_rank: int
    rope_dim: int
    nope_dim: int
    value_dim: int
    q_rank: int | None = None
    norm: bool = False
    bias: bool = False
    out_bias: bool = False
    eps: float = 1e-6

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


class LatentProjections(nn.Module):
    """The projections of MLA, and the two ways to use the up-projection. Abstract: hosts add their forward.

    Weights, by DeepSeek's names: q_proj (or q_a_proj, q_b_proj), kv_a_proj_with_mqa, kv_b_proj (per head: nope rows of the
    key, then rows of the value), o_proj, and q_a_layernorm, kv_a_layernorm when ``norm``.
    """

    def __init__(self, shape: MLAShape, **factory: Any) -> None:
        super().__init__()
        s = self.shape = shape
        out = s.heads * (s.nope_dim + s.rope_dim)
        if s.q_rank is None:
            self.q_proj = nn.Linear(s.width, out, bias=s.bias, **factory)
        else:
            self.q_a_proj = nn.Linear(s.width, s.q_rank, bias=s.bias, **factory)
            self.q_b_proj = nn.Linear(s.q_rank, out, bias=False, **factory)
        self.kv_a_proj_with_mqa = nn.Linear(s.width, s.kv_rank + s.rope_dim, bias=s.bias, **factory)
        self.kv_b_proj = nn.Linear(s.kv_rank, s.kv_heads * (s.nope_dim + s.value_dim), bias=False, **factory)
        self.o_proj = nn.Linear(s.heads * s.value_dim, s.width, bias=s.out_bias, **factory)
        if s.norm:
            self.kv_a_layernorm = nn.RMSNorm(s.kv_rank, eps=s.eps, **factory)
            if s.q_rank is not None:
                self.q_a_layernorm = nn.RMSNorm(s.q_rank, eps=s.eps, **factory)

    @property
    def scaling(self) -> float:
        """Softmax scale."""
        return (self.shape.nope_dim + self.shape.rope_dim) ** -0.5

    def project(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[B, H, N, nope + p]``, latents ``[B, 1, N, r]`` and keys ``[B, 1, N, p]`` of `hidden` ``[B, N, W]``.

        cos, sin: ``[B|1, N, p/2]``; the rotary parts come out rotated.
        """
        s = self.shape
        if s.q_rank is None:
            q = self.q_proj(hidden)
        else:
            low = self.q_a_proj(hidden)
            q = self.q_b_proj(self.q_a_layernorm(low) if s.norm else low)
        q = q.unflatten(-1, (s.heads, -1)).transpose(1, 2)  # [B, H, N, nope + p]
        nope, rope = q.split((s.nope_dim, s.rope_dim), dim=-1)
        latent, key = self.kv_a_proj_with_mqa(hidden).unsqueeze(1).split((s.kv_rank, s.rope_dim), dim=-1)
        if s.norm:
            latent = self.kv_a_layernorm(latent)
        return torch.cat((nope, rotate(rope, cos, sin)), dim=-1), latent, rotate(key, cos, sin)

    def _up(self) -> tuple[Tensor, Tensor]:
        """W_UK ``[G, nope, r]`` and W_UV ``[G, E, r]``."""
        w = self.kv_b_proj.weight.unflatten(0, (self.shape.kv_heads, -1))
        return w[:, : self.shape.nope_dim], w[:, self.shape.nope_dim :]

    def expand(self, latent: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        """See `qkv.caches._stores.latent.Up.expand`: keys are [nope | rotary]."""
        s = self.shape
        both = self.kv_b_proj(latent.squeeze(1)).unflatten(-1, (s.kv_heads, -1)).transpose(1, 2)  # [B, G, M, nope + E]
        nope, values = both.split((s.nope_dim, s.value_dim), dim=-1)
        return torch.cat((nope, rope.expand(-1, s.kv_heads, -1, -1)), dim=-1), values

    def absorb(self, q: Tensor) -> Tensor:
        """See `qkv.caches._stores.latent.Up.absorb`."""
        nope, rope = q.split((self.shape.nope_dim, self.shape.rope_dim), dim=-1)
        grouped = nope.unflatten(1, (self.shape.kv_heads, -1))  # [B, G, H/G, N, nope]
        return torch.cat(((grouped @ self._up()[0].unsqueeze(1)).flatten(1, 2), rope), dim=-1)

    def lift(self, out: Tensor) -> Tensor:
        """See `qkv.caches._stores.latent.Up.lift`."""
        grouped = out.unflatten(1, (self.shape.kv_heads, -1))  # [B, G, H/G, N, r]
        return (grouped @ self._up()[1].mT.unsqueeze(1)).flatten(1, 2)

    def expands(self, queries: int) -> bool:
        """See `qkv.caches._stores.latent.Up.expands`: multiplications per stored row, either way."""
        s = self.shape
        heads = s.nope_dim + s.value_dim
        return queries * s.heads * (2 * s.kv_rank - heads) > s.kv_heads * heads * s.kv_rank


@final
class MultiHeadLatentAttention(LatentProjections):
    """Causal MLA with rotary positions of its own frequencies; trains as it is, decodes with a `LatentCache`."""

    def __init__(self, shape: MLAShape, frequencies: tuple[float, ...], **factory: Any) -> None:
        super().__init__(shape, **factory)
        if len(frequencies) * 2 != shape.rope_dim:
            raise InvalidInput(
                f"rope_dim={shape.rope_dim} takes {shape.rope_dim // 2} frequencies, got {len(frequencies)}"
            )
        self.frequencies = tuple(frequencies)

    def memory(self) -> LatentCache:
        """An empty cache for this layer; it stands for expanded keys and values."""
        s = self.shape
        return LatentCache(self, s.kv_heads * (s.nope_dim + s.rope_dim + s.value_dim))

    def forward(self, hidden: Tensor, padding: Tensor | None = None, memory: LatentCache | None = None) -> Tensor:
        """`hidden` ``[B, N, W]`` -> ``[B, N, W]``.

        padding: bool ``[B, M]``, True = real, over all M tokens seen so far; positions count the real ones. memory: what
        `memory()` gave, filled by earlier calls; without it the N tokens are all there is.
        """
        b, n, _ = hidden.shape
        seen = memory.seen if memory is not None else 0
        if padding is None and memory is not None and memory.padding is not None:
            raise InvalidInput("mla: earlier calls had padding; pass it for all tokens seen, bool [B, M], True = real")
        position = self._position(b, seen, n, padding, hidden)
        q, latent, key = self.project(hidden, *angles(position.clamp(min=0), self.frequencies, hidden.dtype))
        if memory is not None:
            out = memory.attend(q, latent, key, Step(position, self.scaling, padding))
        else:
            mask = None if padding is None else padding[:, None, None, :]
            out = sdpa(q, *self.expand(latent, key), mask=mask, causal=True, scale=self.scaling)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    @staticmethod
    def _position(b: int, seen: int, n: int, padding: Tensor | None, hidden: Tensor) -> Tensor:
        if padding is None:
            return torch.arange(seen, seen + n, device=hidden.device).expand(b, n)
        if padding.dtype != torch.bool or tuple(padding.shape) != (b, seen + n):
            raise InvalidInput(
                f"mla: padding must be bool [B, M] = {(b, seen + n)}, True = real; got {padding.dtype} {tuple(padding.shape)}"
            )
        return (padding.long().cumsum(-1) - 1).masked_fill(~padding, -1)[:, seen:]


@final
@dataclass(frozen=True, kw_only=True)
class MLA(Layer):
    """Sizes of an MLA layer; the defaults are DeepSeek-V2-Lite's."""

    spec: ClassVar[LayerSpec] = LayerSpec(
        id="mla",
        title="Multi-head latent attention",
        paper="arXiv:2405.04434",
        source="code",
        summary="Caches one low-rank latent and one shared rotary key per token instead of keys and values per head.",
        limits=(
            Limit("full", {}, "kv_rank = kv_heads * (nope_dim + value_dim): every head has its own keys and values"),
        ),
        shown="as the layer of `transmla`: a full-rank conversion of SmolLM2 gives the logits of its source",
        honest="decoding does more arithmetic per cached byte; where memory traffic is no bottleneck it gains little",
    )
    heads: int = param(16, "query heads", low=1)
    kv_heads: int | None = param(None, "heads of the up-projection; None: as many as query heads", low=1)
    kv_rank: int = param(512, "width of the latent, numbers a token", low=1)
    rope_dim: int = param(64, "width of the shared rotary key, even", low=2)
    nope_dim: int = param(128, "width of a head's key without rotation", low=0)
    value_dim: int = param(128, "width of a head's value", low=1)
    q_rank: int | None = param(None, "width of the query's own latent; None: queries are projected at once", low=1)
    norm: bool = param(True, "RMSNorm on the latents")
    bias: bool = param(False, "bias in the down-projections and the output")
    base: float = param(10000.0, "rotary base: frequency i is base^(-2i/rope_dim)", low=1.0)

    def validate(self) -> None:
        """Even rotary width; query heads divide over up-projected heads."""
        groups = self.heads if self.kv_heads is None else self.kv_heads
        require(self.rope_dim % 2 == 0, f"mla: rope_dim={self.rope_dim} must be even: rotary channels come in pairs")
        require(self.heads % groups == 0, f"mla: kv_heads={groups} must divide heads={self.heads}")

    def build(self, width: int, **factory: Any) -> MultiHeadLatentAttention:
        """See `Layer.build`."""
        shape = MLAShape(
            width=width,
            heads=self.heads,
            kv_heads=self.kv_heads or self.heads,
            kv_rank=self.kv_rank,
            rope_dim=self.rope_dim,
            nope_dim=self.nope_dim,
            value_dim=self.value_dim,
            q_rank=self.q_rank,
            norm=self.norm,
            bias=self.bias,
            out_bias=self.bias,
        )
        frequencies = tuple(self.base ** (-2 * i / self.rope_dim) for i in range(self.rope_dim // 2))
        return MultiHeadLatentAttention(shape, frequencies, **factory)
