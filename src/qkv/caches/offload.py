r"""Offload: the whole cache in host memory or in a file on disk, each layer's part brought in ahead of its use; exact.

    out = softmax(scale q K^T) V    over everything, as ever

Keys and values of layer l + 1 come onto the GPU while layer l computes, so the device holds two layers' histories instead of
all. In host memory they are page-locked, and copied asynchronously. In a file (`folder`) they survive a memory too small for
them; the operating system is asked to read the next layer's file ahead. Files are removed with the cache. A disk that is full
is an error when room is asked for (nothing stored is touched), a file that has gone is an error at the next use.

The time of a step is at least the bytes of the history over the bandwidth of the bus, or of the disk. It is a cache method of
its own and composes with no other at the same site yet: quantised or evicted parts stay with the model. Patterns, operators and
steering are as on any cache.

Axes: B batch, G key/value heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from qkv.caches._stores.offloaded import OffloadedCache
from qkv.core.attend import attend
from qkv.core.cache import CacheMethod, CacheSpec, Geometry, LayerCache
from qkv.core.errors import Refused
from qkv.core.spec import Limit, param


def reference(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """Exact causal attention: q ``[B, H, N, D]``, k ``[B, G, M, D]``, v ``[B, G, M, E]``."""
    return attend(q, k, v, causal=True, scale=scale).out


@final
@dataclass(frozen=True, kw_only=True)
class Offload(CacheMethod):
    """Everything elsewhere, read back layer by layer."""

    spec: ClassVar[CacheSpec] = CacheSpec(
        id="offload",
        title="Offloaded cache",
        paper="baseline",
        source="baseline",
        summary="Keeps the whole cache in host memory or in a file and brings each layer's part in ahead of its use.",
        shown="outputs of the full model with two layers' histories on the device",
        honest="every step moves the whole history over the bus (or from disk): slower than keeping it, and no smaller",
        limits=(Limit("full", {}, "always: exact attention"),),
        evicts=False,
        exact_chunks=True,
        columns=True,
    )
    folder: str = param("", "folder for the files of a cache on disk; empty: host memory")

    def layer(self, geometry: Geometry) -> LayerCache:
        """See `CacheMethod.layer`."""
        reason = self.fits(geometry)
        if reason is not None:
            raise Refused(f"{self.id} at layer {geometry.layer}: {reason}")
        return OffloadedCache(geometry, self.folder or None)
