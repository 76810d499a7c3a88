r"""Quest: pages of keys are summarised by their smallest and largest channels, and a step reads the pages that could matter most.

    u_p = sum_c max(q_c lo_pc, q_c hi_pc) >= max_{j in p} q . k_j,      lo_pc = min_{j in p} k_jc,   hi_pc = max_{j in p} k_jc

After each step's u (an upper bound of every logit in the page) the best `budget / block_size` pages are read exactly; the page
of the new token is always among them. The first `dense_layers` layers read everything, and so does a prompt. Nothing is evicted.

With q+ = max(q, 0) and q- = min(q, 0), u_p = q+ . hi_p + q- . lo_p: one product with vectors of twice the width.

Axes: B batch, H query heads, G key/value heads, P pages, C slots of a page, D head width. Paper: arXiv:2406.10774. There every
head has keys of its own; with grouped heads a KV head's pages are chosen by the largest u of its query heads
(``share="kv_head"``: keys and values are read once), or per query head as written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from qkv.core.cache import CacheSpec, Geometry, require
from qkv.core.kernel import kernel
from qkv.core.reader import Blocks, Reader, Reading
from qkv.core.spec import Limit, budget_param, param


def reference(q: Tensor, keys: Tensor, *, block_size: int) -> Tensor:
    """The bound ``[..., P]`` of one query ``[..., D]`` over pages of keys ``[..., S, D]``, by the definition."""
    bounds = []
    for start in range(0, keys.shape[-2], block_size):
        page = keys[..., start : start + block_size, :]
        bounds.append(torch.maximum(q * page.amin(-2), q * page.amax(-2)).sum(-1))
    return torch.stack(bounds, -1)


@final
@dataclass(frozen=True, kw_only=True)
class Quest(Reader):
    """Read the pages whose upper bound is highest."""

    spec: ClassVar[CacheSpec] = CacheSpec(
        id="quest",
        title="Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference",
        paper="arXiv:2406.10774",
        source="paper",
        summary="Keeps everything; each step reads the pages whose per-channel bounds promise the largest logits.",
        shown="at 1/16 of the keys far closer to the full model than a window of that size, and the needle is found",
        honest="no memory is saved (the bounds add 1/16); a page is read whole for one token in it",
        limits=(
            Limit("full", {"budget": 1.0}, "budget >= length: exact attention"),
            Limit("full", {"budget": 1 << 20}, "budget >= length: exact attention"),
            Limit("full", {"dense_layers": 1 << 10}, "every layer dense: exact attention"),
        ),
        evicts=False,
        trials=({}, {"share": "query_head"}),
        small={"budget": 9, "block_size": 3, "dense_layers": 1},
    )
    budget: int | float = budget_param(1024, "tokens read per head and step: an int is a number, a float a share")
    block_size: int = param(16, "tokens of a page", low=1)
    dense_layers: int = param(2, "first layers that read everything", low=0)
    share: Literal["kv_head", "query_head"] = param("kv_head", "which heads choose pages of their own")

    capturable: ClassVar[bool] = True

    def validate(self) -> None:
        """At least one page is read."""
        if isinstance(self.budget, int):
            require(
                self.budget >= self.block_size,
                f"quest: budget={self.budget} is less than one page of block_size={self.block_size}",
            )

    def dense(self, geometry: Geometry) -> bool:
        """The first layers attend too evenly to be sparse."""
        return geometry.layer < self.dense_layers

    def features(self, blocks: Blocks) -> dict[str, Tensor]:
        """``[B, G, P, 2 D]``: hi, then lo."""
        return {"bounds": torch.cat((blocks.keys.amax(3), blocks.keys.amin(3)), -1)}

    def describe(self, view: Reading) -> bool:
        """The bounds of the own page, as far as it is filled."""
        kernel("gather:page_bounds")(view.keys, view.features["bounds"], view.slot32, block=view.block)
        return True

    def rank(self, view: Reading) -> Tensor:
        """The upper bound of each page; of single tokens on CUDA by a kernel."""
        if view.slot32 is not None:
            score, per_head = kernel("gather:page_scores"), self.share == "query_head"
            return score(view.queries, view.features["bounds"], view.slot32, block=view.block, per_head=per_head)
        q = torch.cat((view.queries.clamp(min=0), view.queries.clamp(max=0)), -1)  # [B, H, N, 2 D]
        bound = view.dots(view.features["bounds"], q)
        return view.grouped(bound) if self.share == "kv_head" else bound
