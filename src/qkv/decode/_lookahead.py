r"""A memory that compresses a prompt by what the queries of a guessed continuation look at, while the prompt is being read.

    A = softmax(q K^T) of the last W = window + lookahead + 1 queries of [prompt, guess];  its last W columns are dropped
    a = pool(reduce_{query heads of a KV head, W rows} A)                                  per KV head
    kept: the budget - window best positions, and the `window` tokens before the last of the prompt

The guess and the last token of the prompt are dropped; the latter is read again. With lookahead 0 nothing is dropped or read
again and W = window: SnapKV. While a layer reads a long prompt, it attends along verticals (the best positions) and a diagonal
band, so that the layer above never waits for a dense map; only what is kept outlives the call.

Axes: B batch (1), H query heads, G key/value heads, N tokens of the block, S positions to choose from, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.caches._stores.dense import DenseCache
from qkv.core.attend import CHUNK_ELEMENTS, attend, causal_mask, sdpa
from qkv.core.cache import CacheMethod, CacheSpec, Geometry, LayerCache, Step
from qkv.core.errors import Refused, StateError
from qkv.core.merge import merge
from qkv.core.spec import param

Reduce = Literal["max", "mean"]


def tail_rows(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Attention ``[B, H, W, M]`` of the newest W queries over all M keys, float32 or wider."""
    b, h, w, d = q.shape
    g, m = k.shape[1:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = ((q.reshape(b, g, h // g * w, d) * scale) @ k.mT).to(wide).view(b, h, w, m)
    return logits.masked_fill(~causal_mask(w, m, q.device), -torch.inf).softmax(-1)


def tail_scores(q: Tensor, k: Tensor, scale: float, reduce: Reduce) -> Tensor:
    """``[B, G, M - W]``: what the newest W queries ``[B, H, W, D]`` give to the keys before them, reduced per KV head."""
    b, h, w, _ = q.shape
    g, m = k.shape[1:3]
    rows = max(1, CHUNK_ELEMENTS // (b * h * m))
    out: Tensor | None = None
    for start in range(0, w, rows):
        stop = min(w, start + rows)
        part = tail_rows(q[:, :, start:stop], k[:, :, : m - w + stop], scale)[..., : m - w]
        part = part.reshape(b, g, -1, m - w)
        part = part.amax(2) if reduce == "max" else part.sum(2) / (h // g * w)
        out = part if out is None else torch.maximum(out, part) if reduce == "max" else out + part
    assert out is not None
    return out


def pooled(scores: Tensor, kernel: int, how: Literal["max", "avg"]) -> Tensor:
    """Scores ``[..., S]`` (not negative) shared with their neighbours, zeros beyond the ends; an even kernel leans left."""
    if kernel == 1 or not scores.shape[-1]:
        return scores
    flat = F.pad(scores.reshape(-1, 1, scores.shape[-1]), (kernel // 2, (kernel - 1) // 2))
    out = F.max_pool1d(flat, kernel, 1) if how == "max" else F.avg_pool1d(flat, kernel, 1)
    return out.view(scores.shape)


def best(scores: Tensor, count: int) -> Tensor:
    """Positions ``[..., count]`` of the largest scores ``[..., S]``, ascending; of equal ones the newest."""
    last = scores.shape[-1] - 1
    order = scores.flip(-1).argsort(dim=-1, descending=True, stable=True)[..., :count]
    return (last - order).sort(-1).values


def vertical_slash(q: Tensor, k: Tensor, v: Tensor, verticals: Tensor, band: int, scale: float) -> Tensor:
    """Causal attention to the newest `band` keys and to the positions `verticals` ``[B, G, V]``: ``[B, H, N, E]``.

    Two parts over disjoint keys, merged by their log-sum-exp; O(N (band + V)).
    """
    n, device = q.shape[2], q.device
    column = verticals.unsqueeze(-1)
    kv, vv = (x.gather(2, column.expand(*verticals.shape, x.shape[-1])) for x in (k, v))
    size, outs = max(64, min(n, band)), []
    for start in range(0, n, size):
        stop = min(n, start + size)
        low = max(0, start - band + 1)
        i, j = torch.arange(start, stop, device=device)[:, None], torch.arange(low, stop, device=device)
        near = attend(
            q[:, :, start:stop], k[:, :, low:stop], v[:, :, low:stop], mask=(j <= i) & (i - j < band), scale=scale
        )
        far = attend(q[:, :, start:stop], kv, vv, mask=verticals.unsqueeze(2) <= i - band, scale=scale)
        outs.append(merge((near.out, near.lse), (far.out, far.lse))[0])
    return torch.cat(outs, 2)


@final
@dataclass(frozen=True, kw_only=True)
class SpecKVPolicy(CacheMethod):
    """What each layer keeps of [prompt, guess]; one generation of one row. Made by `qkv.decode.speckv`."""

    spec: ClassVar[CacheSpec] = CacheSpec(
        id="speckv-policy",
        title="Draft-based Approximate Inference for LLMs",
        paper="arXiv:2506.08373",
        summary="Keeps what the queries of a draft's continuation attend to.",
    )
    keep: int = param(1024, "entries kept per KV head", low=1)
    lookahead: int = param(0, "guessed tokens at the end of the first block", low=0)
    window: int = param(64, "newest prompt tokens that are always kept", low=1)
    kernel: int = param(7, "neighbours that share their scores; odd", low=1)
    pooling: Literal["max", "avg"] = param("max", "how neighbours share")
    reduce: Literal["max", "mean"] = param("max", "how queries and query heads combine")
    verticals: int = param(2048, "positions every query attends to in a long prompt; 0: attend to all", low=0)
    band: int = param(2048, "newest tokens every query attends to in a long prompt", low=1)

    def layer(self, geometry: Geometry) -> LookaheadCache:
        """See `CacheMethod.layer`."""
        return LookaheadCache(self)


@final
class LookaheadCache(LayerCache):
    """The first block is [prompt, guess]: read, scored, cut down. Everything later is appended.

    seen counts the tokens of the text (the guess never counts); `inner` holds what is kept, one slot after another.
    """

    def __init__(self, policy: SpecKVPolicy) -> None:
        self.policy = policy
        self.inner = DenseCache(Geometry(1, 1, 1, 1))
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.inner.reset()
        self.place: Tensor | None = None  # [B, G, kept] positions of the prompt's entries
        self.first = 0  # tokens of the prompt that count
        self.seen = 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """See `LayerCache.attend`."""
        if step.padding is not None or (step.mask is not None and self.place is None):
            raise Refused("speckv compresses one unpadded row at a time")
        if self.place is not None:
            out = self.inner.attend(q, k, v, step)
            self.seen += q.shape[2]
            return out
        return self._compress(q, k, v, step)

    def _compress(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        p, n = self.policy, q.shape[2]
        again = 1 if p.lookahead else 0  # the prompt's last token is read again
        text = n - p.lookahead - again
        tail = p.window + p.lookahead + again
        long = p.verticals > 0 and n > p.verticals + p.band
        chooses = text > p.keep and text > p.window
        scores = None
        if n > tail and (chooses or long):
            scores = pooled(tail_scores(q[:, :, n - tail :], k, step.scale, p.reduce), p.kernel, p.pooling)
        if long and scores is not None:
            out = vertical_slash(q, k, v, best(scores, p.verticals), p.band, step.scale)
        else:
            out = (step.compute or sdpa)(q, k, v, mask=None, causal=True, scale=step.scale)
        everything = torch.arange(text, device=k.device).expand(*k.shape[:2], text)
        if chooses and scores is not None:
            chosen = best(scores, p.keep - p.window)
            self.place = torch.cat((chosen, everything[..., text - p.window :]), -1)
            k, v = (x.gather(2, self.place.unsqueeze(-1).expand(*self.place.shape, x.shape[-1])) for x in (k, v))
        else:
            self.place, k, v = everything, k[:, :, :text], v[:, :, :text]
        self.inner._append(k, v)
        self.first = self.seen = text
        return out

    def crop(self, tokens: int) -> None:
        """Forget the newest tokens; those of the prompt are fixed."""
        if tokens > self.seen - self.first:
            raise StateError(
                f"speckv: {tokens} tokens cannot be taken back, only the {self.seen - self.first} after the prompt"
            )
        self.inner.crop(tokens)
        self.seen -= tokens

    def select(self, rows: Tensor) -> None:
        """See `LayerCache.select`."""
        self.inner.select(rows)
        if self.place is not None:
            self.place = self.place.index_select(0, rows.to(self.place.device))

    def bytes(self) -> int:
        """Keys, values and positions."""
        return self.inner.bytes() + (0 if self.place is None else self.place.numel() * self.place.element_size())

    def kept(self) -> int:
        """Entries held."""
        return self.inner.seen

    def tensors(self) -> dict[str, Tensor]:
        """Keys, values, positions, counts."""
        if self.place is None:
            return {}
        return self.inner.tensors() | {"place": self.place, "count": torch.tensor([self.first, self.seen])}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """See `LayerCache.restore`."""
        self.reset()
        if tensors:
            self.inner.restore({name: tensors[name] for name in ("keys", "values")})
            self.place = tensors["place"].clone()
            self.first, self.seen = tensors["count"].tolist()

    def positions(self) -> Tensor:
        """``[B, G, kept]``."""
        if self.place is None:
            raise StateError("the cache is empty")
        later = torch.arange(self.first, self.seen, device=self.place.device).expand(*self.place.shape[:2], -1)
        return torch.cat((self.place, later), -1)
