r"""Shared prefix: what several rows of a batch have in common is held, and read, once; exact.

    out = merge( attend(q, K_shared, V_shared), attend(q, K_own, V_own) )        merge: by (out, lse)

A batch whose prompts begin alike (a system text, a document, few-shot examples), several samples of one prompt
(`num_return_sequences`), beams, and continuations of one cache (`cache.batch_repeat_interleave(n)`) hold their common tokens
once. Texts that part later share as far as they go together: a tree. What is common is found by comparing what a prompt gives
to the first site, never declared: a prompt that differs shares nothing and is served as by a plain cache.

A decoding step multiplies all rows' queries with the shared keys at once, so these are read once instead of once per row; on
CUDA it is three kernels a site (`qkv.kernels.prefixed`), captured as any static step: ``qkv.apply(..., graph=True)``. A prompt is
computed row by row as ever, and stored layer by layer: at most one layer is held for every row.

Axes: B batch, H query heads, G key/value heads, N queries, P shared keys, M own keys, D head width, E value width.
The merged form is known from Hydragen (arXiv:2402.05099) and cascade attention; the tree from RadixAttention (2312.07104).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from qkv.caches._stores.prefixed import PrefixedCache
from qkv.core.attend import attend
from qkv.core.cache import CacheMethod, CacheSpec, Geometry, LayerCache
from qkv.core.errors import Refused
from qkv.core.spec import Limit, param


def reference(q: Tensor, shared: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], *, scale: float) -> Tensor:
    """Queries ``[B, H, N, D]`` over shared keys and values ``[1, G, P, .]`` before own ones ``[B, G, M, .]``."""
    keys, values = (torch.cat((a.expand(len(b), -1, -1, -1), b), 2) for a, b in zip(shared, own, strict=True))
    return attend(q, keys, values, causal=True, scale=scale).out


@final
@dataclass(frozen=True, kw_only=True)
class SharedPrefix(CacheMethod):
    """The whole history, common beginnings once."""

    spec: ClassVar[CacheSpec] = CacheSpec(
        id="shared-prefix",
        title="Shared-prefix cache",
        paper="baseline",
        source="baseline",
        summary="Keeps everything, exactly; what the rows of a batch have in common from their beginning is held and read once.",
        shown="bytes of one common text plus each row's own, at the outputs of the full model",
        honest="saves nothing for a single row, or for texts that begin differently; a prompt is still computed for every row",
        limits=(Limit("full", {}, "always: exact attention"),),
        evicts=False,
        exact_chunks=True,
        columns=True,
        small={"min_tokens": 3},
    )
    min_tokens: int = param(32, "fewest common tokens that are worth a read of their own", low=1)

    def layer(self, geometry: Geometry) -> LayerCache:
        """See `CacheMethod.layer`."""
        reason = self.fits(geometry)
        if reason is not None:
            raise Refused(f"{self.id} at layer {geometry.layer}: {reason}")
        return PrefixedCache(geometry, self.min_tokens, self.id)
