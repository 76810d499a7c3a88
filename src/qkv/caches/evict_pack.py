r"""Evict, then quantise: any policy chooses what of a prompt stays, and what stays is packed.

    kept = the slots(W) tokens of a prompt of W with the largest worth, per KV head; the newest always
    k^, v^ = kept keys per channel, values channel-separable per token, in `bits` bits

The policy ranks a prompt once, from the unquantised keys and the attention of the queries that it asks for; the kept tokens
become a block that is packed once, as ZipCache packs (no token is quantised twice, and nothing is dequantised to be ranked
again). Decoded tokens are appended: they wait in full precision until `regroup_every` of them are packed too. A later prompt (the
next turn) is ranked by itself, a prompt in pieces piece by piece. A prompt shorter than `regroup_every` waits, unranked.

So the bytes are those of the budget times bits / 16. Policies that rank by position, move keys or cut prompts into pieces are
refused: they have nothing to rank in a block, or would read their keys changed.

Axes: B batch, G key/value heads, W tokens of a prompt. A composition of this library; the parts are papers of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from qkv.caches._stores.codecs import BITS
from qkv.caches._stores.mixed import Block, MixedCache
from qkv.core import registry
from qkv.core.cache import CacheMethod, CacheSpec, Geometry, LayerCache, Policy, View
from qkv.core.errors import InvalidParameter, Refused
from qkv.core.spec import Limit, budget_param, param


def reference(worth: Tensor, keep: int) -> list[list[int]]:
    """Positions that each KV head keeps of a prompt, from their worth ``[G, W]``; the newest token is among them."""
    heads, width = worth.shape
    best = [sorted(range(width - 1), key=lambda m, g=g: (-float(worth[g, m]), m))[: keep - 1] for g in range(heads)]
    return [sorted([*chosen, width - 1]) for chosen in best]


class _Ranked:
    """A policy at one site, as the store asks."""

    def __init__(self, policy: Policy, geometry: Geometry, id: str) -> None:
        self.policy, self.geometry, self.id = policy, geometry, id

    def probes_of(self, tokens: int, decoded: bool) -> tuple[int, int]:
        """The queries whose attention the policy wants summed; none while decoding, where nothing is ranked."""
        return 0 if decoded else min(tokens, self.policy.mass_queries(tokens)), 0

    def split(self, block: Block) -> tuple[Tensor, list[int]]:
        """What the policy keeps of a prompt, and all that was decoded."""
        (rows, g, width), device = block.keys.shape[:3], block.keys.device
        keep = min(width, self.policy.slots_at(width, self.geometry))
        if block.decoded or keep == width:
            return torch.ones(rows, 1, width, dtype=torch.bool, device=device), [width] * rows
        start = torch.tensor(block.starts, device=device).view(rows, 1, 1)
        position = (start + torch.arange(width, device=device)).expand(rows, g, width)
        mass = block.mass if self.policy.mass_queries(width) else None
        most = torch.full((rows, 1, 1), keep, device=device)
        view = View(block.keys, block.values, position, most, position[:, :1, -1:], block.queries, mass)
        size = self.policy.width(self.geometry)
        state = block.keys.new_zeros((rows, g, width, size), dtype=torch.float32) if size else None
        worth = self.policy.rank(self.policy.observe(state, view), view).to(torch.float32)
        worth = torch.nan_to_num(worth, nan=-3e38, posinf=3e38, neginf=-3e38)
        worth[..., -1] = torch.inf
        flags = torch.zeros_like(worth, dtype=torch.bool)
        return flags.scatter(-1, worth.topk(keep, dim=-1).indices, True), [keep] * rows


@final
@dataclass(frozen=True, kw_only=True)
class EvictPack(CacheMethod):
    """A policy's choice of a prompt, in packed bits."""

    spec: ClassVar[CacheSpec] = CacheSpec(
        id="evict-pack",
        title="Evict, then quantise",
        paper="baseline",
        source="baseline",
        summary="Keeps of a prompt what any policy ranks highest, and packs it; decoded tokens are packed in blocks.",
        shown="4 bits on top of eviction cost little beside the eviction itself, at a quarter of its bytes",
        honest="a prompt is ranked once: policies that go on evicting while decoding do not here",
        limits=(Limit("full", {"budget": 1.0, "bits": 16}, "everything kept, as it is"),),
        trials=(
            {"bits": 16, "policy": "snapkv:window=4,kernel=3"},
            {"bits": 16, "policy": "h2o"},
            {"bits": 16, "policy": "knorm"},
        ),
        small={"budget": 9, "regroup_every": 8},
    )
    policy: str = param("snapkv", "the policy that ranks a prompt, with its settings (its budget is replaced)")
    budget: int | float = budget_param(
        0.25, "tokens kept of a prompt per head: an int is a number, a float a share of it"
    )
    bits: int = param(4, "bits of an element that is kept (16: as it is)", choices=BITS)
    regroup_every: int = param(100, "new tokens that wait unquantised until they become a block", low=1)

    def validate(self) -> None:
        """The policy must exist, and rank the tokens of a block."""
        self.ranking()

    def ranking(self) -> Policy:
        """The policy at this budget. Raises `InvalidParameter`, `UnknownName`."""
        name = registry.parse_setting(self.policy)[0]
        if name == self.id:
            raise InvalidParameter(f"{self.id}: it cannot be its own policy; name one such as snapkv or h2o")
        chosen = registry.method(self.policy)
        if not isinstance(chosen, Policy) or not hasattr(chosen, "budget"):
            raise InvalidParameter(f"{self.id}: policy={self.policy!r} ranks no tokens; name one such as snapkv or h2o")
        moves = getattr(chosen, "positions", "original") != "original"
        if chosen.spec.by_position or moves or chosen.chunk(1 << 20) is not None or chosen.row_queries(1):
            raise InvalidParameter(
                f"{self.id}: policy={self.policy!r} ranks by position, moves keys, cuts prompts into pieces or wants attention "
                "row by row, which a block that is ranked once cannot give; name one such as snapkv, h2o or knorm"
            )
        scorer = chosen.replace(budget=self.budget)
        assert isinstance(scorer, Policy)
        return scorer

    def fits(self, geometry: Geometry) -> str | None:
        """What the policy says."""
        return self.ranking().fits(geometry)

    def layer(self, geometry: Geometry) -> LayerCache:
        """See `CacheMethod.layer`."""
        reason = self.fits(geometry)
        if reason is not None:
            raise Refused(f"{self.id} at layer {geometry.layer}: {reason}")
        return MixedCache(
            _Ranked(self.ranking(), geometry, self.id), geometry, bits=(self.bits, 0), every=self.regroup_every
        )
