r"""RazorAttention: retrieval heads keep everything; the others keep sinks, a buffer and one mean token for all they dropped.

    buffer of a row of N tokens:   L = max(min_buffer, N / ratio)
    k^ = mean of the dropped keys,  v^ = mean of the dropped values,  Nd = how many
    out ~ Nd exp(q . k^ / sqrt(D)) v^ + sum over kept m of exp(q . k_m / sqrt(D)) v_m

which is ordinary attention with one more key whose logit has + ln Nd. The mean is over rotated keys: it mixes phases, as
the method intends. A prompt is computed exactly, then compressed; while decoding, a head over its buffer folds its oldest
token that is no sink into the mean. Where the dropped keys are equal this is exact.

Retrieval heads are induction and echo heads, found on random repeated tokens: `qkv inspect MODEL --probe induction-echo --out
DIR`, then ``heads="DIR/result.json"``. A KV head retrieves if one of its query heads does. The head percentages are the
paper's as remembered.

At a model with linear position biases (ALiBi: BLOOM, MPT) the same command bounds from a head's weights and slope how far it can
look, its scope (`qkv.probes._scope` has the formula). Then a head with a scope of at most `min_buffer` tokens keeps its scope
instead of the buffer above, and every other keeps everything; what is dropped has next to no weight, and its mean stands at
the mean of its positions.

Axes: L layers, B batch, H query heads, G key/value heads, N queries, M keys, D head width. Paper: arXiv:2407.15891.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, final

from torch import Tensor

from qkv.caches._retrieval import heads_of, scopes_of
from qkv.caches._stores.dense import DenseCache
from qkv.caches._stores.folding import FoldingCache, mean_part
from qkv.caches._stores.split import split
from qkv.core.cache import CacheMethod, CacheSpec, Geometry, LayerCache, require
from qkv.core.errors import Refused
from qkv.core.heads import HeadSet
from qkv.core.spec import Limit, param


def reference(q: Tensor, k: Tensor, v: Tensor, dropped: Tensor, scale: float) -> Tensor:
    """Attention of one query ``[D]`` to tokens k ``[M, D]``, v ``[M, E]``, those of `dropped` ``[M]`` replaced by their mean."""
    logits = k[~dropped] @ q * scale
    weight, total = logits.exp() @ v[~dropped], logits.exp().sum()
    count = int(dropped.sum())
    if count:
        mean = count * (k[dropped].mean(0) @ q * scale).exp()
        weight, total = weight + mean * v[dropped].mean(0), total + mean
    return weight / total


@final
@dataclass(frozen=True, kw_only=True)
class RazorAttention(CacheMethod):
    """Full caches for retrieval heads, sinks, a buffer and a compensation token for the rest."""

    spec: ClassVar[CacheSpec] = CacheSpec(
        id="razorattention",
        title="RazorAttention: Efficient KV Cache Compression Through Retrieval Heads",
        paper="arXiv:2407.15891",
        source="paper",
        summary="Induction and echo heads keep everything; all others keep sinks, a buffer and the mean of what they dropped.",
        shown="protecting the measured heads keeps the pass key, as many others lose it; compensation lowers the divergence",
        honest="heads are measured once on random tokens; a mean of rotated keys says little about any single token",
        limits=(Limit("full", {"min_buffer": 1 << 20}, "buffer >= length: exact attention"),),
        trials=({}, {"compensation": False}),
        slopes=True,
        small={"heads": ("0.1", "1.1", "2.0", "2.2"), "sinks": 2, "min_buffer": 5, "ratio": 4.0},
    )
    heads: str | tuple[str, ...] | None = param(
        None, 'KV heads that keep everything, "layer.head", or the file that the probe induction-echo saved'
    )
    scopes: tuple[tuple[int | None, ...], ...] = param(
        (),
        "recent tokens that a KV head keeps instead of the buffer, a row per layer (ALiBi; the probe's file has them)",
    )
    sinks: int = param(4, "first tokens that every head keeps", low=0)
    min_buffer: int = param(4000, "fewest recent tokens that a head keeps (a small model needs fewer)", low=1)
    ratio: float = param(5.0, "a row of N tokens keeps N / ratio recent ones, where that is more", low=1.0)
    compensation: bool = param(True, "keep the mean of the dropped tokens (False: drop them)")
    induction: float = param(0.14, "share of KV heads taken by induction score, from a probe's file", low=0.0, high=1.0)
    echo: float = param(0.01, "share of KV heads taken by echo score, from a probe's file", low=0.0, high=1.0)

    def __post_init__(self) -> None:
        found = scopes_of(self.heads)
        if found is not None:
            far = [(l, h) for l, row in enumerate(found) for h, x in enumerate(row) if x is None or x > self.min_buffer]
            object.__setattr__(self, "scopes", found)
            object.__setattr__(self, "heads", HeadSet.of(far).names())
        elif self.heads is not None:
            chosen = heads_of(self.heads, (self.induction, self.echo), self.spec.id)
            object.__setattr__(self, "heads", chosen.names())
        super().__post_init__()

    def validate(self) -> None:
        """Scopes are tokens, as many heads in every layer."""
        require(
            len({len(row) for row in self.scopes}) <= 1, f"{self.id}: scopes must have as many KV heads in every layer"
        )
        bad = [x for row in self.scopes for x in row if x is not None and x < 1]
        require(not bad, f"{self.id}: a scope is at least 1 token; got {bad[:3]}")

    def buffer(self, tokens: Any) -> Any:
        """Recent tokens that a row of `tokens` tokens keeps; an int or a tensor of them."""
        if isinstance(tokens, int):
            return max(self.min_buffer, int(tokens / self.ratio))
        return (tokens.double() / self.ratio).floor().to(tokens.dtype).clamp(min=self.min_buffer)

    def fits(self, geometry: Geometry) -> str | None:
        """The heads must be this model's."""
        if self.heads is None:
            return (
                "it needs the retrieval heads of this model: `qkv inspect MODEL --probe induction-echo --out DIR`, then "
                "heads='DIR/result.json' (heads=() protects none)"
            )
        beyond = [f"{l}.{h}" for l, h in HeadSet.of(self.heads) if l >= geometry.layers or h >= geometry.kv_heads]
        if beyond:
            shape = f"{geometry.layers} layers of {geometry.kv_heads} KV heads"
            return f"there is no KV head {', '.join(beyond[:3])}{' ...' if len(beyond) > 3 else ''} in {shape}"
        if not self.scopes:
            return None
        if geometry.slopes is None:
            return "its scopes are of a model with linear position biases (ALiBi), and this site has none"
        have, want = (len(self.scopes), len(self.scopes[0])), (geometry.layers, geometry.kv_heads)
        if have != want:
            return f"the scopes are for {have[0]} layers of {have[1]} KV heads; this model has {want[0]} of {want[1]}"
        return None

    def layer(self, geometry: Geometry) -> LayerCache:
        """See `CacheMethod.layer`."""
        reason = self.serves(geometry)
        if reason is not None:
            raise Refused(f"{self.id} at layer {geometry.layer}: {reason}")
        full = self._full(geometry)

        def near(scope: int | None) -> Callable[[Geometry], LayerCache]:
            limit = self.buffer if scope is None else lambda tokens: scope
            return lambda part: FoldingCache(part, sinks=self.sinks, limit=limit, fold=self.compensation, who=self.id)

        rest: dict[int | None, list[int]] = {}
        for h in range(geometry.kv_heads):
            if h not in full:
                rest.setdefault(self.scopes[geometry.layer][h] if self.scopes else None, []).append(h)
        return split(geometry, [(full, DenseCache), *((heads, near(x)) for x, heads in rest.items())], self.id)

    def _full(self, geometry: Geometry) -> tuple[int, ...]:
        return HeadSet.of(self.heads).at(geometry.layer)

    def remainder(self, q: Tensor, k: Tensor, v: Tensor, gone: Tensor, scale: float) -> tuple[Tensor, Tensor] | None:
        """See `CacheMethod.remainder`: the compensation token."""
        if not self.compensation:
            return None
        count = gone.sum(-1)  # [B, G]
        few = count.clamp(min=1).unsqueeze(-1)
        mean_k, mean_v = ((x * gone.unsqueeze(-1)).sum(2) / few for x in (k, v))
        return mean_part(q, mean_k, mean_v, count, scale)

    def __str__(self) -> str:
        brief = self.replace(heads=None, scopes=())
        assert isinstance(brief, RazorAttention)
        text = super(RazorAttention, brief).__str__()
        return text if self.heads is None else f"{text}{',' if ':' in text else ':'}heads={len(self.heads)}"
