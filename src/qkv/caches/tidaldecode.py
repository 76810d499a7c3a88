r"""TidalDecode: the positions that matter are much the same in consecutive layers, so only two layers of a step look for them.

With s = `dense_layers` and c = `reselect`, a decoding step attends at layer i to

    i < s            everything
    i = s or i = c   everything, and  rho_h = top-k_m (q_h . k_m), the own token included, is written down
    else             K[rho_h], V[rho_h] of the nearest such layer below, softmax over those alone

Where a layer is not served (it keeps a sliding window of its own, or `where` leaves it out) the next one that is chooses for it.
A prompt is read in full everywhere; nothing is evicted. The choice lives on the board of the cache for one step and is never
used by another step. Logits are compared before the softmax, per query head; ``share="kv_head"`` takes their largest over a KV
group, so that keys and values are read once.

The own token is always read (the paper's code lets the top-k decide). A site that stands alone, with no layer below to choose
for it, chooses for itself. ``correct_every=T`` is the paper's repair of the cache: after T decoded tokens the host takes them
back and runs them again in one call, which reads everything, so that their keys and values are those of the full model (given
what precedes them); off by default. Outside a host nothing is run again.

Axes: B batch, H query heads, G key/value heads, M keys, D head width. Paper: arXiv:2410.05076.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

from torch import Tensor

from qkv.core.cache import CacheSpec, Geometry, require
from qkv.core.reader import Reader, Reading, Selection
from qkv.core.spec import Limit, budget_param, param

BOARD = "tidaldecode"


def reference(q: Tensor, keys: Tensor, *, budget: int) -> Tensor:
    """What a selection layer writes down: bool ``[B, H, M]``, True = read, for q ``[B, H, D]`` and keys ``[B, G, M, D]``."""
    b, h, _ = q.shape
    g, m = keys.shape[1:3]
    out = q.new_zeros(b, h, m).bool()
    for row in range(b):
        for head in range(h):
            logits = keys[row, head * g // h] @ q[row, head]
            out[row, head, logits[:-1].topk(min(budget, m) - 1).indices] = True
            out[row, head, -1] = True
    return out


@final
@dataclass(frozen=True, kw_only=True)
class TidalDecode(Reader):
    """Two layers choose what the others read."""

    spec: ClassVar[CacheSpec] = CacheSpec(
        id="tidaldecode",
        title="TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention",
        paper="arXiv:2410.05076",
        source="code",
        summary="Keeps everything; two layers of a step read it all and choose the tokens that the other layers read.",
        shown="with 256 of 4096 tokens read, perplexity near full and the needle found; random positions break both",
        honest="no memory is saved; needs all layers of the model, and the best re-selection layer differs between models",
        limits=(
            Limit("full", {"budget": 1.0}, "budget >= length: exact attention"),
            Limit("full", {"budget": 1 << 20}, "budget >= length: exact attention"),
        ),
        evicts=False,
        trials=({}, {"share": "kv_head"}),
        small={"budget": 9, "dense_layers": 0, "reselect": 0},
    )
    budget: int | float = budget_param(
        256, "tokens read per head by a sparse layer: an int is a number, a float a share"
    )
    dense_layers: int = param(2, "first layers that read everything; the next one chooses", low=0)
    reselect: int | None = param(None, "layer that chooses anew; None: two fifths of the depth", low=0)
    share: Literal["query_head", "kv_head"] = param("query_head", "which heads choose tokens of their own")
    correct_every: int | None = param(None, "decoded tokens that are run again densely together; None: never", low=1)

    capturable: ClassVar[bool] = True

    def validate(self) -> None:
        """The second choice comes after the first."""
        require(
            self.reselect is None or self.reselect >= self.dense_layers,
            f"tidaldecode: reselect={self.reselect} lies among the first dense_layers={self.dense_layers} layers",
        )

    def again(self, geometry: Geometry) -> int:
        """The layer of the second choice."""
        return round(0.4 * geometry.layers) if self.reselect is None else self.reselect

    def chooses(self, geometry: Geometry) -> bool:
        """Whether this layer reads everything and writes down what the next ones read, where every layer is served."""
        return geometry.layer in (self.dense_layers, self.again(geometry)) and geometry.layer >= self.dense_layers

    def repairs(self) -> int | None:
        """See `CacheMethod.repairs`."""
        return self.correct_every

    def dense(self, geometry: Geometry) -> bool:
        """The first layers."""
        return geometry.layer < self.dense_layers

    def rank(self, view: Reading) -> Tensor:
        """The logits."""
        logits = view.logits()
        return view.grouped(logits) if self.share == "kv_head" else logits

    def choose(self, view: Reading) -> Selection | None:
        """Write a choice down and read everything, or read what the last choice says."""
        if view.board is None:
            return super().choose(view)
        call: Any = (view.since, view.position.shape)
        layer = view.geometry.layer
        made, by, selection = view.board.get(BOARD, (None, layer, None))
        ours = made == call and by < layer  # by a layer below, in this step
        if ours and not (self.chooses(view.geometry) or by < self.again(view.geometry) <= layer):
            return selection
        view.board[BOARD] = (call, layer, super().choose(view))
        return None
