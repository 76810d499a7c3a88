"""Attention mixed of full and streaming heads by gates that learn; see the probe duo-gates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from qkv.core.attend import sdpa
from qkv.core.cache import Compute
from qkv.core.site import Site
from qkv.core.steering import Steering, SteeringSpec


def streaming_mask(n: int, m: int, *, sinks: int, recent: int, device: torch.device | None = None) -> Tensor:
    """``[N, M]`` bool, lower-right aligned: what queries of a streaming head see."""
    i, j = torch.arange(m - n, m, device=device)[:, None], torch.arange(m, device=device)[None, :]
    return (j <= i) & ((j < sinks) | (i - j < recent))


@final
@dataclass(frozen=True, kw_only=True)
class Mixed(Steering):
    """Attention mixed by gates; gates ``[L, G]`` is the tensor that learns, full: outputs of the unmodified model by layer."""

    spec: ClassVar[SteeringSpec] = SteeringSpec(
        id="duo-gates-mixture", title="Mixed attention", paper="arXiv:2410.10819"
    )
    gates: Any = None
    sinks: int = 0
    recent: int = 1
    full: Any = None

    def __hash__(self) -> int:
        return id(self.gates)

    def wrap(self, site: Site, compute: Compute) -> Compute:
        def run(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
            gates = self.gates[site.layer, : site.kv_heads]
            near = streaming_mask(q.shape[2], k.shape[2], sinks=self.sinks, recent=self.recent, device=q.device)[
                None, None
            ]
            stream = sdpa(q, k, v, mask=near if mask is None else near & mask, scale=scale)
            taught = None if self.full is None else self.full.get(site.layer)
            full = compute(q, k, v, mask=mask, causal=causal, scale=scale) if taught is None else taught
            a = gates.repeat_interleave(site.heads // site.kv_heads).to(full.dtype)[:, None, None]
            return a * full + (1 - a) * stream

        return run
