"""Patterns: which keys a query sees. A method makes a `BlockPlan`; one function of its spec computes it.

Static patterns build their plan from shapes alone; dynamic ones (selectors) from q and k after the position
embedding. Either way the result is exact softmax attention over what the plan keeps.

Axes: B batch, H query heads, G key/value heads, N queries (the newest N of M tokens), M keys, D head width, E
value width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from qkv.core.attend import causal_mask, check_qkv, sdpa
from qkv.core.errors import InvalidInput, Refused
from qkv.core.plan import BlockPlan
from qkv.core.spec import Method, Spec


@dataclass(frozen=True, kw_only=True)
class PatternSpec(Spec):
    """Facts about a pattern.

    reference: the definition, dense and slow: ``reference(q, k, *, scale, causal, padding, <parameters>)`` -> bool
    mask ``[B, H, N, M]``. execute: ``execute(q, k, v, plan, *, scale)`` -> out, the fast form. dynamic: the plan
    depends on q and k, and choosing it costs `BlockPlan.selection_flops`. min_queries: with fewer queries attention
    runs dense (see `Pattern.min_queries`; a static window just applies, with 1). causal: ``only`` or ``both``. masks:
    ``any`` token mask, or only what ``padding`` can say.
    """

    kind: ClassVar[str] = "pattern"
    reference: Callable[..., Tensor]
    execute: Callable[..., Tensor]
    dynamic: bool = False
    min_queries: int = 2
    causal: Literal["only", "both"] = "both"
    masks: Literal["any", "padding"] = "any"


@dataclass(frozen=True, kw_only=True)
class Pattern(Method):
    """Base of pattern configurations: a subclass gives `plan`; the rest follows."""

    spec: ClassVar[PatternSpec]

    @property
    def granularity(self) -> int:
        """Tokens decided upon together: a query's keys never depend on tokens after its own such stretch.

        Prefill in chunks cut at multiples of it equals prefill in one go. 1 for static patterns.
        """
        return 1

    @property
    def min_queries(self) -> int:
        """With fewer queries than this, attention runs dense.

        For a selector this is its own stretch, so that decoding, with or without drafted tokens, is one and the same.
        """
        return max(self.spec.min_queries, self.granularity if self.spec.dynamic else 1)

    @abstractmethod
    def plan(
        self,
        q: Tensor,
        k: Tensor,
        *,
        scale: float | None = None,
        causal: bool = True,
        padding: Tensor | None = None,
    ) -> BlockPlan:
        """Which blocks the queries see.

        q: ``[B, H, N, D]``, k: ``[B, G, M, D]``, after the position embedding; q are the newest N of M
        tokens. padding: bool ``[B, M]``, True = real token. scale: default D^-0.5. Raises `InvalidInput`,
        `Refused`.
        """

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = True,
        scale: float | None = None,
    ) -> Tensor:
        """Exact attention over the plan's keys: what a host calls.

        q: ``[B, H, N, D]``; k: ``[B, G, M, D]``; v: ``[B, G, M, E]`` -> ``[B, H, N, E]``. mask: bool,
        broadcastable to ``[B, H, N, M]``, True = may attend; it carries padding, and other masks where the
        pattern takes them. causal: lower-right aligned. What stands in padding never matters, NaN included.
        Raises `InvalidInput`, `Refused`.
        """
        check_qkv(q, k, v, causal=causal, who=self.id)
        if self.spec.dynamic and self.min_queries <= q.shape[2] < k.shape[2]:
            k, v, mask = packed_past(k, v, mask, q.shape[2])
        padding, rest, causal = read_mask(mask, q, k, causal, self.id)
        if not causal and self.spec.causal == "only" and q.shape[2] > 1:
            raise Refused(f"{self.id} is causal by definition; it has no bidirectional form")
        if padding is not None:
            hole = ~padding[:, None, :, None]  # [B, 1, M, 1]
            k, v = k.masked_fill(hole, 0.0), v.masked_fill(hole, 0.0)
            if causal or q.shape[2] == k.shape[2]:
                q = q.masked_fill(hole[:, :, -q.shape[2] :], 0.0)
        if q.shape[2] < self.min_queries:
            return sdpa(q, k, v, mask=mask, causal=causal, scale=scale)
        if rest is not None and self.spec.masks != "any":
            raise Refused(
                f"{self.id} takes causal and padding masks only; this mask also hides tokens from some "
                "queries (packed sequences, a prefix, a sliding layer)"
            )
        plan = self.plan(q, k, scale=scale, causal=causal, padding=padding)
        plan = plan if rest is None else plan.restrict(rest)
        return self.spec.execute(q, k, v, plan, scale=scale)


def packed_past(k: Tensor, v: Tensor, mask: Tensor | None, n: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """What precedes the newest n of M keys, with empty places first: for choices by content, which order does not concern.

    A cache may hand over slots ``[B, G, M, .]`` with empty ones among them, which a mask bool ``[B, 1|H, 1, M]`` tells, other
    ones for each head. Where all heads of a row have equally many, the mask returned is padding ``[B, 1, 1, M]``. Every other
    mask is returned as it is.
    """
    g, past = k.shape[1], k.shape[2] - n
    if mask is None or mask.ndim != 4 or mask.dtype != torch.bool or mask.shape[2] != 1 or mask.shape[3] != k.shape[2]:
        return k, v, mask
    held = mask.expand(k.shape[0], -1, -1, -1)[:, :, 0, :past]  # [B, 1|H, past]
    if not bool((held[..., :-1] & ~held[..., 1:]).any()):
        return k, v, mask
    if held.shape[1] > 1:
        by_group = held.unflatten(1, (g, -1))
        count = held.sum(-1)
        if not bool((by_group == by_group[:, :, :1]).all() & (count == count[:, :1]).all()):
            return k, v, mask
        held = by_group[:, :, 0]  # [B, G, past]
    if mask.shape[1] > 1 and not bool((mask[..., past:] == mask[:, :1, :, past:]).all()):
        return k, v, mask
    order = held.to(torch.int8).argsort(dim=-1, stable=True)
    at = torch.cat((order, torch.arange(past, k.shape[2], device=k.device).expand(*order.shape[:2], n)), -1)
    k, v = (x.gather(2, at.expand(-1, g, -1).unsqueeze(-1).expand(*x.shape)) for x in (k, v))
    new = mask[:, :1, :, past:].expand(k.shape[0], -1, -1, -1)
    return k, v, torch.cat((held[:, :1].to(torch.int8).sort(dim=-1).values.bool().unsqueeze(2), new), 3)


def read_mask(
    mask: Tensor | None, q: Tensor, k: Tensor, causal: bool, who: str
) -> tuple[Tensor | None, Tensor | None, bool]:
    """What a token mask says: padding ``[B, M]`` (or None), the rest of it (or None), whether it is causal.

    A dense mask that is padding and causality spelt out, as model libraries pass it, is recognised as that.
    In any other mask a key that no query sees counts as padding only when N = M, where each token sees
    itself. A single query is as causal as the caller says: its keys may lie in any order, its own anywhere
    among them.
    """
    if mask is None:
        return None, None, causal
    (b, h, n), m = q.shape[:3], k.shape[2]
    if mask.dtype != torch.bool:
        raise InvalidInput(f"{who}: mask must be bool (True = may attend), got {mask.dtype}")
    mask = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
    fits = all(s in (1, t) for s, t in zip(mask.shape, (b, h, n, m), strict=True)) if mask.ndim == 4 else False
    if not fits:
        raise InvalidInput(f"{who}: mask {tuple(mask.shape)} does not broadcast to [B, H, N, M] = {(b, h, n, m)}")
    if mask.shape[1:3] == (1, 1):
        return mask[:, 0, 0].expand(b, m), None, causal
    real = mask.any(2).any(1).expand(b, m)  # [B, M]
    said = real[:, None, None]  # [B, 1, 1, M]
    if n <= m:
        past = causal_mask(n, m, q.device)
        if bool((mask == (said & past)).all()) or (causal and bool((mask & past == said & past).all())):
            return _or_none(real), None, causal or n > 1
    if not causal and bool((mask == said).all()):
        return _or_none(real), None, False
    return _or_none(real) if n == m else None, mask, causal


def _or_none(padding: Tensor) -> Tensor | None:
    return None if bool(padding.all()) else padding


def check_padding(padding: Tensor | None, k: Tensor, who: str) -> None:
    """Raise `InvalidInput` unless padding is None or bool ``[B, M]``."""
    want = (k.shape[0], k.shape[2])
    if padding is not None and (padding.dtype != torch.bool or tuple(padding.shape) != want):
        raise InvalidInput(
            f"{who}: padding must be bool [B, M] = {want}, True = real; got {padding.dtype} {tuple(padding.shape)}"
        )
