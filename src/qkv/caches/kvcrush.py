r"""KVCrush: part of a host policy's budget goes to representatives of what it would evict, chosen by how heads treat a token.

    b_{m,h} = token m is in the top half for query head h;      d_m = sum_h |b_{m,h} - anchor_h|
    kept = important u representatives,   |representatives| = floor(rep_ratio budget)

The important tokens are the host's best (its sinks and recent ones among them). The others are sorted by d, then by position,
and evenly spaced ones of that order stay, so that the kept set covers the kinds of tokens that go. Whenever the host evicts, also
while decoding. A head's scores are the attention that the host looked at, summed over the calls since the token came.

per="layer": one set for all heads of a layer, by the mean of the host's worth over KV heads, signatures of all H query heads.
per="head": each KV head keeps a set of its own, by the signatures of its own query heads; with rep_ratio=0 that is the host.
unit="block": whole blocks of `block_size` positions; a block's signature is the bits of its tokens for the scores summed over
heads; what blocks do not fill is the host's choice. Only for hosts that append what is decoded.

Axes: B batch, Q sets (1 or G), H query heads of a set, M stored slots in order of position. Paper: arXiv:2503.00022. Even
spacing: steps of floor(|E| / k), as the paged reference takes, would keep the first k whenever |E| < 2 k; a decoding step starts
at another offset each time, so that what goes is spread over d.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from qkv.core import registry
from qkv.core.cache import CacheSpec, Geometry, Policy, View, require
from qkv.core.errors import InvalidParameter
from qkv.core.spec import Limit, budget_param, param

FINE = 64
"""Offsets of the first representative, in parts of the spacing."""


def reference(bits: Tensor, anchor: Tensor, k: int) -> list[int]:
    """Which of M tokens with signatures ``[M, H]`` represent them: `k`, evenly spaced in order of distance, then position."""
    distance = (bits != anchor).sum(-1).tolist()
    order = sorted(range(len(distance)), key=lambda m: (distance[m], m))
    return sorted(order[i * len(order) // k] for i in range(k))


def head_signatures(scores: Tensor, region: Tensor) -> Tensor:
    """Bits ``[..., H, M]``: each head's top half of the region ``[..., M]`` by scores ``[..., H, M]``; of equals the first."""
    ranked = scores.masked_fill(~region.unsqueeze(-2), -torch.inf)
    place = ranked.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
    return (place < region.sum(-1)[..., None, None] // 2) & region.unsqueeze(-2)


def anchor_bits(kind: str, bits: Tensor, region: Tensor, seed: int) -> Tensor:
    """The anchor, broadcastable to bits ``[..., H, M]``; region ``[..., M]``: the tokens that ``mean`` asks."""
    h, device = bits.shape[-2], bits.device
    if kind == "mean":
        votes = (bits & region.unsqueeze(-2)).sum(-1, keepdim=True)
        return 2 * votes > region.sum(-1)[..., None, None]
    if kind == "random":
        return _random(seed, h, device)
    if kind == "alternating":
        return (torch.arange(h, device=device) % 2 == 1)[:, None]
    return torch.full((h, 1), kind == "ones", device=device)


@functools.lru_cache(maxsize=64)
def _random(seed: int, h: int, device: torch.device) -> Tensor:
    draws = torch.rand(h, generator=torch.Generator().manual_seed(seed))
    return (draws < 0.5).to(device)[:, None]


def representatives(distance: Tensor, candidates: Tensor, k: Tensor, offset: Tensor | int = 0) -> Tensor:
    """Which candidates ``[..., M]`` represent them all: `k` ``[..., 1]`` evenly spaced in order of distance, then of place.

    offset: where the first lies, in `FINE` parts of the spacing.
    """
    m = distance.shape[-1]
    count = candidates.sum(-1, keepdim=True).clamp(min=1)
    some = torch.minimum(k, count)
    parts = some.clamp(min=1) * FINE
    key = distance * m + torch.arange(m, device=distance.device)
    place = key.masked_fill(~candidates, torch.iinfo(key.dtype).max).argsort(-1).argsort(-1)
    pick = -((offset * count - place * parts) // (count * FINE))  # the first pick that is not before this place
    return candidates & (pick < some) & ((pick * FINE + offset) * count // parts == place)


def _place(worth: Tensor) -> Tensor:
    """The place of each slot ``[..., M]`` by worth, the best 0; of equals the later comes first."""
    return worth.flip(-1).sort(dim=-1, descending=True, stable=True).indices.argsort(-1).flip(-1)


@functools.lru_cache(maxsize=256)
def _host(setting: str, budget: float | int, kind: type) -> Policy:
    """The host at this budget (`kind` keeps a share of 1.0 apart from 1 token)."""
    chosen: Any = registry.method(setting)
    if not isinstance(chosen, Policy) or chosen.spec.by_position or not hasattr(chosen, "budget"):
        raise InvalidParameter(
            f"kvcrush: host={setting!r} gives tokens no scores; name a policy that ranks by attention, such as h2o or snapkv"
        )
    if isinstance(chosen, KVCrush) or not (chosen.mass_queries(2) and chosen.mass_queries(1 << 20)):
        raise InvalidParameter(
            f"kvcrush: host={setting!r} does not look at the attention of its queries summed up, which signatures are made "
            "of; name a policy such as h2o, snapkv or tova"
        )
    host = chosen.replace(budget=budget)
    assert isinstance(host, Policy)
    return host


@final
@dataclass(frozen=True, kw_only=True)
class KVCrush(Policy):
    """A host policy, and representatives of what it evicts."""

    spec: ClassVar[CacheSpec] = CacheSpec(
        id="kvcrush",
        title="KVCrush: Key value cache size-reduction using similarity in head-behaviour",
        paper="arXiv:2503.00022",
        source="code",
        summary="Gives part of a host policy's budget to representatives of what it evicts, by which heads attend to a token.",
        shown="representatives chosen by signature are closer to the full model than random ones in the same places",
        honest="what they take from the host's own choice they need not give back; all heads of a layer share a set by default",
        limits=(Limit("full", {"budget": 1.0}, "budget >= length: exact attention"),),
        trials=(
            {},
            {"host": "snapkv:window=4,kernel=3", "per": "head", "anchor": "mean", "rep_ratio": 0.5},
            {
                "host": "snapkv:window=3,kernel=3",
                "unit": "block",
                "block_size": 2,
                "anchor": "random",
                "rep_ratio": 0.5,
            },
        ),
        small={"budget": 9},
    )
    host: str = param("h2o", "the policy that scores the tokens, with its settings (its budget is replaced)")
    budget: int | float = budget_param(0.2)
    rep_ratio: float = param(0.25, "share of the budget for representatives, below 1", low=0.0, high=1.0)
    anchor: Literal["alternating", "zeros", "ones", "mean", "random"] = param(
        "alternating", "the signature that distances are taken from; mean: each bit's majority"
    )
    per: Literal["layer", "head"] = param("layer", "all heads of a layer keep the same tokens, or each KV head its own")
    unit: Literal["token", "block"] = param("token", "what is chosen: tokens, or whole blocks of positions")
    block_size: int = param(32, "positions of a block, for unit='block'", low=1)
    seed: int = param(0, "of anchor='random'", low=0)

    def validate(self) -> None:
        """The host must exist, score tokens, and leave whole blocks where they are the unit."""
        host = self.scorer()
        require(
            self.rep_ratio < 1, f"{self.id}: rep_ratio={self.rep_ratio} leaves nothing to the host; it must be below 1"
        )
        require(
            self.unit == "token" or host.lag() >= 1 << 30,
            f"{self.id}: host={self.host!r} evicts token by token while decoding, which leaves no blocks; use unit='token', or "
            "a host that appends, such as snapkv",
        )

    def scorer(self) -> Policy:
        """The host at this budget. Raises `InvalidParameter`, `UnknownName`."""
        return _host(self.host, self.budget, type(self.budget))

    @property
    def positions(self) -> str:
        """What a position means to the host."""
        return getattr(self.scorer(), "positions", "original")

    def slots(self, tokens: int) -> int:
        """The host's."""
        return self.scorer().slots(tokens)

    def slots_at(self, tokens: int, geometry: Geometry) -> int:
        """The host's."""
        return self.scorer().slots_at(tokens, geometry)

    def width(self, geometry: Geometry) -> int:
        """The host's state, and the score of every query head of the KV head."""
        return self.scorer().width(geometry) + geometry.heads // geometry.kv_heads

    def lag(self) -> int:
        """The host's."""
        return self.scorer().lag()

    def whole_prompt(self) -> bool:
        """The host's."""
        return self.scorer().whole_prompt()

    def chunk(self, keep: int) -> int | None:
        """The host's."""
        return self.scorer().chunk(keep)

    def mass_queries(self, new: int) -> int:
        """The host's."""
        return self.scorer().mass_queries(new)

    def visible(self, query: Tensor, position: Tensor) -> Tensor | None:
        """The host's."""
        return self.scorer().visible(query, position)

    def shift(self, view: View) -> Tensor | None:
        """The host's."""
        return self.scorer().shift(view)

    def moving(self, view: View) -> tuple[Tensor, int] | None:
        """The host's."""
        return self.scorer().moving(view)

    def fits(self, geometry: Geometry) -> str | None:
        """The host's."""
        return self.scorer().fits(geometry)

    def _split(self, state: Tensor | None, view: View) -> tuple[Tensor | None, Tensor]:
        """The host's state, and the scores ``[B, G, S, R]`` of the query heads of each KV head."""
        assert state is not None
        heads = view.queries.shape[1] // view.position.shape[1]
        hosts = state.shape[-1] - heads
        return (state[..., :hosts] if hosts else None), state[..., hosts:]

    def observe(self, state: Tensor | None, view: View) -> Tensor:
        """The host's state goes on as it would, the scores as running sums."""
        theirs, scores = self._split(state, view)
        theirs = self.scorer().observe(theirs, view)
        if view.mass is not None:
            scores = scores + view.mass.unflatten(1, (view.position.shape[1], -1)).mT.to(scores.dtype)
        return scores if theirs is None else torch.cat((theirs, scores), -1)

    def rank(self, state: Tensor | None, view: View) -> Tensor:
        """The host's important tokens, then representatives of the others, then the host's order."""
        theirs, scores = self._split(state, view)
        worth, position, per_head = self.scorer().rank(theirs, view).to(torch.float32), view.position, scores.mT
        if self.per == "layer":
            worth, position, per_head = (
                worth.mean(1, keepdim=True),
                position[:, :1],
                per_head.flatten(1, 2).unsqueeze(1),
            )
        order = position.masked_fill(position < 0, torch.iinfo(position.dtype).max).argsort(
            -1
        )  # [B, Q, M], in the text
        worth, position = worth.gather(-1, order), position.gather(-1, order)
        per_head = per_head.gather(-1, order.unsqueeze(2).expand_as(per_head))  # [B, Q, H, M]
        value = self._value(worth, position, per_head, view)
        return torch.empty_like(value).scatter(-1, order, value).expand(view.position.shape)

    def _value(self, worth: Tensor, position: Tensor, scores: Tensor, view: View) -> Tensor:
        """The rank ``[B, Q, M]`` of slots in order of position, from the host's worth and the heads' scores."""
        m, real = position.shape[-1], position >= 0
        worth = worth.masked_fill(position == view.newest, torch.inf).masked_fill(~real, -torch.inf)
        fixed = worth == torch.inf
        place = _place(worth)
        reps = (view.keep * self.rep_ratio).floor().long()
        reps = torch.minimum(reps, view.keep - fixed.sum(-1, keepdim=True)).clamp(min=0)
        free = real & ~fixed
        tier = (place < view.keep - reps).long() * 2
        if self.unit == "block":
            tier = self._blocks(worth, position, scores, free, view, reps)
        elif self.rep_ratio > 0:
            offset = (
                view.newest.long() * 40 % FINE if view.queries.shape[2] == 1 else 0
            )  # 40/64: near the golden section
            bits = head_signatures(scores, free)
            distance = (bits ^ anchor_bits(self.anchor, bits, free, self.seed)).sum(-2)
            tier = tier + representatives(distance, free & (tier == 0), reps, offset).long()
        value = (tier * m + m - 1 - place).to(torch.float32)
        return value.masked_fill(fixed, torch.inf)

    def _blocks(
        self, worth: Tensor, position: Tensor, scores: Tensor, free: Tensor, view: View, reps: Tensor
    ) -> Tensor:
        """The tier of every token by the block it lies in: 2 important, 1 representative, 0 neither. ``[B, Q, M]``."""
        p, count = self.block_size, int(view.newest.max()) // self.block_size + 1
        at = position.long().clamp(min=0)
        empty = worth.new_zeros(*position.shape[:2], count * p)

        def grid(x: Tensor) -> Tensor:  # [B, Q, blocks, P]
            return empty.scatter_add(-1, at, torch.where(free, x, 0.0)).unflatten(-1, (count, p))

        tokens = grid(torch.ones_like(worth)).sum(-1)  # [B, Q, blocks]
        there = tokens > 0
        mean = grid(worth).sum(-1) / tokens.clamp(min=1)
        fixed = (worth == torch.inf).sum(-1, keepdim=True)
        important = _place(mean.masked_fill(~there, -torch.inf)) < (view.keep - reps - fixed).clamp(min=0) // p
        bits = head_signatures(scores.sum(2, keepdim=True), free).squeeze(2)
        signature = grid(bits.to(worth.dtype)).mT > 0  # [B, Q, P, blocks]
        anchor = anchor_bits(self.anchor, signature, there, self.seed)
        chosen = representatives((signature ^ anchor).sum(-2), there & ~important, reps // p)
        tier = (important & there).long() * 2 + chosen.long()
        return tier.gather(-1, at // p).masked_fill(~free, 0)
