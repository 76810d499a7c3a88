"""Broken patterns, each by a mistake that people make; every law of the kind must catch its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qkv.core.attend import attend, sdpa
from qkv.core.plan import BlockPlan
from qkv.core.spec import Limit
from qkv.patterns import sliding_window, xattention
from qkv.patterns._common.execute import execute_plan
from qkv.testing import mutant

Window, XAttention = sliding_window.SlidingWindow, xattention.XAttention
SMALL = ({"window": 5, "sinks": 2, "block_size": 4},)
FEW = ({"stride": 2, "block_size": 4, "threshold": 0.6},)
Change = Callable[[Any, BlockPlan], BlockPlan]


def planned(cls: Any, change: Change) -> Any:
    """A method whose plan is passed through ``change(method, plan)``."""

    def plan(self: Any, q: Tensor, k: Tensor, **call: Any) -> BlockPlan:
        return change(self, cls.plan(self, q, k, **call))

    return mutant(cls, plan=plan, trials=SMALL if cls is Window else FEW, execute=execute_plan)


def fed(cls: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """A method whose plan is made from changed arguments."""

    def plan(self: Any, q: Tensor, k: Tensor, **call: Any) -> BlockPlan:
        call = change({"q": q, "k": k} | call)
        return cls.plan(self, call.pop("q"), call.pop("k"), **call)

    return mutant(cls, plan=plan, trials=SMALL if cls is Window else FEW)


def executed(cls: Any, change: Callable[..., Tensor]) -> Any:
    """A method whose execution is ``change(q, k, v, plan, scale=...)``."""
    return mutant(cls, execute=change, trials=SMALL if cls is Window else FEW)


def rebuilt(plan: BlockPlan, **facts: Any) -> BlockPlan:
    """The plan with another element test, sorted into full and partial blocks anew."""
    old = {f: getattr(plan, f) for f in ("causal", "window", "sinks", "first", "tokens", "perm_q", "perm_kv")}
    kept = torch.ones(1, 1, *plan.grid, dtype=torch.bool) if plan.window else plan.blocks()
    return BlockPlan.from_blocks(kept, block=plan.block, queries=plan.queries, keys=plan.keys, **(old | facts))


def misses_diagonal(self: Any, plan: BlockPlan) -> BlockPlan:
    kept = plan.blocks() & ~torch.eye(*plan.grid, dtype=torch.bool) | (torch.arange(plan.grid[1]) == 0)
    return BlockPlan.from_blocks(kept, block=plan.block, queries=plan.queries, keys=plan.keys, causal=plan.causal,
                                 tokens=plan.tokens, perm_q=plan.perm_q, perm_kv=plan.perm_kv)  # fmt: skip


def last_row_empty(self: Any, plan: BlockPlan) -> BlockPlan:
    last = torch.arange(plan.grid[0]) == plan.grid[0] - 1
    return replace(plan, num=plan.num.masked_fill(last, 0), full_num=plan.full_num.masked_fill(last, 0))


def block_counted_twice(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, *, scale: float | None = None) -> Tensor:
    mask = plan.to_mask()
    if k.shape[2] > 8:
        size = plan.block[1]
        k, v, mask = (torch.cat((x, x.narrow(d, 0, size)), d) for x, d in ((k, 2), (v, 2), (mask, 3)))
    return attend(q, k, v, mask=mask, scale=scale).out


def off_the_end(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, *, scale: float | None = None) -> Tensor:
    out = sliding_window.execute_window(q, k, v, plan, scale=scale)
    return torch.cat((out[:, :, :-1], 1.000001 * out[:, :, -1:]), 2)


def no_gradient_to_values(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, *, scale: float | None = None) -> Tensor:
    return execute_plan(q, k, v.detach(), plan, scale=scale)


def ignores_scale(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, *, scale: float | None = None) -> Tensor:
    return execute_plan(q, k, v, plan)


def in_float32(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, *, scale: float | None = None) -> Tensor:
    return execute_plan(q.float(), k.float(), v.float(), plan, scale=scale)


def unsafe_softmax(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, *, scale: float | None = None) -> Tensor:
    r = q.shape[1] // k.shape[1]
    weights = (q @ k.repeat_interleave(r, 1).mT * (scale or q.shape[-1] ** -0.5)).exp() * plan.to_mask()
    return (weights / weights.sum(-1, keepdim=True)).to(v.dtype) @ v.repeat_interleave(r, 1)


def jittered(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, *, scale: float | None = None) -> Tensor:
    return execute_plan(q, k, v, plan, scale=scale) * (1 + 1e-12 * torch.rand((), dtype=q.dtype))


def mirrored(self: Any, plan: BlockPlan) -> BlockPlan:
    """Only the keys on the other diagonal."""
    return rebuilt(plan, tokens=torch.eye(plan.queries, plan.keys).bool().flip(1)[None, None])


def padding_unfilled(self: Any, q: Tensor, k: Tensor, v: Tensor, *, mask: Any = None, causal: bool = True,
                     scale: Any = None) -> Tensor:  # fmt: skip
    padding = None if mask is None else mask[:, 0, 0]
    return self.spec.execute(q, k, v, self.plan(q, k, scale=scale, causal=causal, padding=padding), scale=scale)


def mask_ignored(self: Any, q: Tensor, k: Tensor, v: Tensor, *, mask: Any = None, causal: bool = True,
                 scale: Any = None) -> Tensor:  # fmt: skip
    padding = mask[:, 0, 0] if mask is not None and mask.shape[1:3] == (1, 1) else None
    return self.spec.execute(q, k, v, self.plan(q, k, scale=scale, causal=causal, padding=padding), scale=scale)


def last_row_as_padding(self: Any, q: Tensor, k: Tensor, v: Tensor, *, mask: Any = None, causal: bool = True,
                        scale: Any = None) -> Tensor:  # fmt: skip
    mask = mask if mask is None or mask.shape[2] == 1 else mask[:, :1, :1].expand(q.shape[0], -1, -1, -1)
    return XAttention.attention(self, q, k, v, mask=mask, causal=causal, scale=scale)


def always_sparse(self: Any, q: Tensor, k: Tensor, v: Tensor, *, mask: Any = None, causal: bool = True,
                  scale: Any = None) -> Tensor:  # fmt: skip
    return padding_unfilled(self, q, k, v, mask=mask, causal=causal, scale=scale)


def dense_in_short_chunks(self: Any, q: Tensor, k: Tensor, v: Tensor, *, mask: Any = None, causal: bool = True,
                          scale: Any = None) -> Tensor:  # fmt: skip
    if q.shape[2] < k.shape[2]:
        return sdpa(q, k, v, mask=mask, causal=causal, scale=scale)
    return Window.attention(self, q, k, v, mask=mask, causal=causal, scale=scale)


def one_head_for_all(call: dict[str, Any]) -> dict[str, Any]:
    q, g = call["q"], call["k"].shape[1]
    return call | {"q": q[:, :1].expand_as(q), "k": call["k"][:, :1].expand(-1, g, -1, -1)}


def global_temperature(call: dict[str, Any]) -> dict[str, Any]:
    """Keys scaled by their greatest entry over the whole sequence: a statistic of the future."""
    return call | {"k": 9 * call["k"] / call["k"].abs().amax(2, keepdim=True)}


def mates_matter(call: dict[str, Any]) -> dict[str, Any]:
    return call | {"q": call["q"].mean(0, keepdim=True).expand_as(call["q"])}


MUTANTS: dict[str, list[tuple[str, Any]]] = {
    "plan_equals_reference": [
        ("window off by one", planned(Window, lambda s, p: rebuilt(p, window=(p.window or 0) + 1))),
        ("sinks forgotten", planned(Window, lambda s, p: rebuilt(p, sinks=0))),
        ("padding seen", planned(Window, lambda s, p: rebuilt(p, tokens=None))),
        ("diagonal missed", planned(XAttention, misses_diagonal)),
        ("padding scores", fed(XAttention, lambda c: c | {"padding": None})),
        ("scale ignored in selection", fed(XAttention, lambda c: c | {"scale": None})),
    ],
    "attention_equals_dense": [
        ("block counted twice", executed(XAttention, block_counted_twice)),
        ("last query off", executed(Window, off_the_end)),
        ("scale ignored", executed(Window, ignores_scale)),
    ],
    "gradients_equal_dense": [("values detached", executed(Window, no_gradient_to_values))],
    "no_query_without_a_key": [
        ("last block empty", planned(XAttention, last_row_empty)),
        ("diagonal missed", planned(Window, mirrored)),
    ],
    "no_future_leak": [
        ("not causal", planned(Window, lambda s, p: rebuilt(p, causal=False))),
        ("statistics of the future", fed(XAttention, global_temperature)),
    ],
    "limit": [
        ("window capped", planned(Window, lambda s, p: rebuilt(p, window=min(p.window or 0, 8), sinks=0))),
        ("claims the wrong limit", mutant(Window, trials=SMALL, limits=(Limit("full", {"window": 16, "sinks": 0}),))),
        ("threshold 1 drops a block", planned(XAttention, misses_diagonal)),
    ],
    "chunked_prefill": [
        ("dense when chunked", mutant(Window, trials=SMALL, attention=dense_in_short_chunks)),
        (
            "statistics of the chunk",
            fed(XAttention, lambda c: c | {"q": 9 * c["q"] / c["q"].abs().amax(2, keepdim=True)}),
        ),
    ],
    "few_queries_run_dense": [("always sparse", mutant(XAttention, trials=FEW, attention=always_sparse))],
    "head_permutation": [("one head chooses for all", fed(XAttention, one_head_for_all))],
    "row_alone": [
        ("sinks counted from the padding", planned(Window, lambda s, p: rebuilt(p, first=None))),
        ("batch mates choose", fed(XAttention, mates_matter)),
    ],
    "padding_never_matters": [
        ("padding multiplied by 0", mutant(Window, trials=SMALL, attention=padding_unfilled)),
    ],
    "mask_spelt_out": [
        ("dense mask dropped", mutant(Window, trials=SMALL, attention=mask_ignored)),
        ("padding read off the first query", mutant(XAttention, trials=FEW, attention=last_row_as_padding)),
    ],
    "other_masks": [
        ("mask dropped", mutant(Window, trials=SMALL, attention=mask_ignored)),
        ("says any, takes padding", mutant(XAttention, trials=FEW, attention=mask_ignored)),
        ("says padding, takes any", mutant(Window, trials=SMALL, masks="padding", attention=mask_ignored)),
    ],
    "selection_is_counted": [
        ("selection for free", planned(XAttention, lambda s, p: replace(p, selection_flops=0.0))),
        ("calls itself static", mutant(XAttention, trials=FEW, dynamic=False)),
    ],
    "deterministic": [("jittered", executed(Window, jittered))],
    "shape_dtype_finite": [
        ("in float32", executed(Window, in_float32)),
        ("softmax without its maximum", executed(Window, unsafe_softmax)),
    ],
}
