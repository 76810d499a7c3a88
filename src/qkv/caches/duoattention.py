r"""DuoAttention: retrieval heads keep the whole cache, streaming heads only the first tokens and a recent window.

    retrieval(l, j) = alpha_lj >= tau,   tau = quantile(alpha, sparsity)
    streaming query i sees key m:   m < sinks  or  i - m < recent        (recent counts the query's own token)

One gate alpha per KV head, learned on the model: `qkv inspect MODEL --probe duo-gates --out DIR`, then
``gates="DIR/result.json"``. The query heads of a KV head go with it. Keys stay at the positions they had in the text.
``prefill="streaming"`` applies the window inside the prompt too, as in training and in the paper's chunked prefill: any
chunking gives the same result. With ``prefill="full"`` a block attends to all of itself and is trimmed afterwards, as the
paper's code does with a prompt that is absorbed at once.

Equal gates are told apart by noise below 1e-6, drawn with a fixed seed. Heads are indexed, not permuted.

Axes: L layers, B batch, H query heads, G key/value heads, N queries. Paper: arXiv:2410.10819, with its code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from qkv.caches._sinks import SinksAndRecent
from qkv.caches._stores.dense import DenseCache
from qkv.caches._stores.split import split
from qkv.core.cache import CacheMethod, CacheSpec, Geometry, LayerCache, require
from qkv.core.errors import InvalidParameter, Refused
from qkv.core.heads import HeadTable
from qkv.core.spec import Limit, param

Gates = Sequence[Sequence[float | None]]


def reference(retrieval: Sequence[bool], n: int, *, sinks: int, recent: int) -> Tensor:
    """The mask ``[G, N, N]`` of one layer: all of the past for retrieval heads, sinks and a window for the others."""
    i, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
    past = j <= i
    near = past & ((j < sinks) | (i - j < recent))
    return torch.stack([past if full else near for full in retrieval])


def retrieval_heads(gates: Gates, sparsity: float) -> list[list[bool]]:
    """Which KV heads ``[L][G]`` keep everything: the gates at or above the `sparsity` quantile of all. None: no such head."""
    flat = torch.tensor([x for row in gates for x in row if x is not None], dtype=torch.float64)
    if sparsity <= 0 or sparsity >= 1 or not len(flat):
        return [[sparsity <= 0 and x is not None for x in row] for row in gates]
    noise = torch.rand(len(flat), generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-6
    noisy = flat + noise
    chosen = iter((noisy >= noisy.quantile(sparsity)).tolist())
    return [[x is not None and next(chosen) for x in row] for row in gates]


def _table(path: str) -> HeadTable:
    if not Path(path).is_file():
        raise InvalidParameter(
            f"duoattention: gates={path!r} is no file; learn gates with `qkv inspect MODEL --probe duo-gates --out DIR` and "
            "pass gates='DIR/result.json', or pass a table [layers][KV heads] of numbers in [0, 1]"
        )
    return HeadTable.load(path)


def _plain(gates: Any) -> tuple[tuple[Any, ...], ...]:
    """Gates, however given, as rows of numbers; None where a layer has no such head."""
    if isinstance(gates, HeadTable):
        if gates.unit != "kv_head":
            raise InvalidParameter(
                "duoattention: gates are per KV head, and this table is per query head; keys and values are shared within a "
                "group, so take `table.by_kv_head()`"
            )
        gates = gates.values
    if isinstance(gates, Tensor):
        gates = gates.detach().tolist()
    if not isinstance(gates, (list, tuple)) or not all(isinstance(row, (list, tuple)) for row in gates):
        raise InvalidParameter(
            f"duoattention: gates must be rows of numbers [layers][KV heads], a HeadTable, a tensor or the path of a saved "
            f"table; got {type(gates).__name__}"
        )
    return tuple(tuple(None if x is None or x != x else x for x in row) for row in gates)


@final
@dataclass(frozen=True, kw_only=True)
class DuoAttention(CacheMethod):
    """Full caches for retrieval heads, sinks and a window for the rest."""

    spec: ClassVar[CacheSpec] = CacheSpec(
        id="duoattention",
        title="DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads",
        paper="arXiv:2410.10819",
        source="code",
        summary="Learned gates split the KV heads: retrieval heads keep everything, streaming heads sinks and a window.",
        shown="half of the heads streaming keep the pass key; as many random ones lose some, inverted gates lose it",
        honest="gates must be learned on the model once; retrieval heads still grow with the text",
        limits=(
            Limit("full", {"sparsity": 0.0}, "no streaming head: exact attention"),
            Limit("full", {"recent": 1 << 20}, "window >= length: exact attention"),
        ),
        exact_chunks=True,
        trials=({}, {"sparsity": 1.0}),
        slopes=True,
        small={
            "gates": ((0.9, 0.1, 0.2), (0.1, 0.8, 0.15), (0.3, 0.7, 0.6)),
            "sinks": 2,
            "recent": 6,
        },
    )
    gates: str | tuple[tuple[float | None, ...], ...] = param(
        (), "one gate in [0, 1] per layer and KV head: rows of numbers, or the file that the probe duo-gates saved"
    )
    sparsity: float = param(0.5, "share of KV heads that stream (paper: 0.75 for MHA, 0.5 for GQA)", low=0.0, high=1.0)
    sinks: int | None = param(
        None, "first tokens that streaming heads keep; None: as the gates were trained, else 64", low=0
    )
    recent: int | None = param(
        None, "recent tokens that streaming heads see, their own included; None: as trained, else 256", low=2
    )
    prefill: Literal["streaming", "full"] = param(
        "streaming", "what streaming heads see of a block: the window, or all of it"
    )

    def __post_init__(self) -> None:
        gates, trained = self.gates, {}
        if isinstance(gates, str):
            gates = _table(gates)
        if isinstance(gates, HeadTable):
            trained = gates.notes
        for name, usual in (("sinks", 64), ("recent", 256)):
            if getattr(self, name) is None:
                known = trained.get(name)
                object.__setattr__(self, name, known if isinstance(known, int) else usual)
        object.__setattr__(self, "gates", _plain(gates))
        super().__post_init__()

    def validate(self) -> None:
        """Gates are numbers in [0, 1], as many in every layer."""
        rows: Any = self.gates
        require(len({len(row) for row in rows}) <= 1, "duoattention: gates must have as many KV heads in every layer")
        bad = [x for row in rows for x in row if x is not None and not 0.0 <= x <= 1.0]
        require(not bad, f"duoattention: gates lie in [0, 1]; got {bad[:3]}")

    def fits(self, geometry: Geometry) -> str | None:
        """The gates must be this model's: a row for every layer, a gate for every KV head."""
        if self.sparsity in (0.0, 1.0) and not self.gates:
            return None
        if not self.gates:
            return (
                "it needs gates learned on this model: `qkv inspect MODEL --probe duo-gates --out DIR`, then "
                "gates='DIR/result.json'"
            )
        have, want = (len(self.gates), len(self.gates[0])), (geometry.layers, geometry.kv_heads)
        if have != want:
            more = "; one gate per KV head, not per query head" if have == (want[0], geometry.heads) else ""
            return (
                f"the gates are for {have[0]} layers of {have[1]} KV heads; this model has {want[0]} of {want[1]}{more}"
            )
        if any(x is None for x in self.gates[geometry.layer]):
            return "the gates hold none for this layer: it was not measured"
        return None

    def layer(self, geometry: Geometry) -> LayerCache:
        """See `CacheMethod.layer`."""
        reason = self.serves(geometry)
        if reason is not None:
            raise Refused(f"{self.id} at layer {geometry.layer}: {reason}")
        assert self.sinks is not None and self.recent is not None
        full = self._full(geometry)
        near = SinksAndRecent(sinks=self.sinks, recent=self.recent, masked=self.prefill == "streaming")
        heads = range(geometry.kv_heads)
        return split(
            geometry,
            [([h for h in heads if full[h]], DenseCache), ([h for h in heads if not full[h]], near.layer)],
            self.id,
        )

    def sees(self, geometry: Geometry, query: Tensor, position: Tensor) -> Tensor | None:
        """See `CacheMethod.sees`: the window, for streaming heads."""
        if self.prefill == "full":
            return None
        assert self.sinks is not None and self.recent is not None
        p, q = position.unsqueeze(2), query[:, None, :, None]
        near = (p < self.sinks) | (p > q - self.recent)
        return near | torch.tensor(self._full(geometry), device=p.device)[:, None, None]

    def _full(self, geometry: Geometry) -> list[bool]:
        """Which KV heads of a layer keep everything."""
        if not self.gates or isinstance(self.gates, str):
            return [self.sparsity <= 0] * geometry.kv_heads
        return retrieval_heads(self.gates, self.sparsity)[geometry.layer]

    def __str__(self) -> str:
        brief = self.replace(gates=())
        assert isinstance(brief, DuoAttention)
        text = super(DuoAttention, brief).__str__()
        if not self.gates:
            return text
        return f"{text}{',' if ':' in text else ':'}gates={len(self.gates)}x{len(self.gates[0])}"
