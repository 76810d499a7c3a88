"""Block plans: converters there and back, validation, execution with out and lse, on drawn shapes and blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask, flex_attention

import qkv
from qkv.core.attend import attend
from qkv.core.errors import InvalidInput
from qkv.core.plan import BlockPlan
from qkv.patterns._common.execute import attend_plan, execute_plan
from qkv.patterns._common.window import execute_window
from qkv.testing import close

torch.set_num_threads(1)
EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
TIGHT = {"rtol": 1e-9, "atol": 1e-9}

sizes = st.fixed_dictionaries({
    "b": st.integers(1, 3), "g": st.integers(1, 3), "r": st.integers(1, 3), "n": st.integers(1, 29),
    "more": st.integers(0, 17), "bq": st.integers(1, 9), "bk": st.integers(1, 9), "seed": st.integers(0, 999),
})  # fmt: skip
tests = st.fixed_dictionaries({
    "causal": st.booleans(), "window": st.one_of(st.none(), st.integers(1, 40)), "sinks": st.integers(0, 5),
    "first": st.booleans(), "tokens": st.sampled_from(["", "keys", "row", "head", "all"]),
    "perm_q": st.sampled_from(["", "1", "g", "h"]), "perm_kv": st.sampled_from(["", "1", "g", "h"]),
    "heads": st.sampled_from(["1", "g", "h"]), "rows": st.booleans(), "share": st.floats(0.05, 1.0),
})  # fmt: skip


def drawn(s: dict[str, int], t: dict[str, Any]) -> tuple[BlockPlan, torch.Tensor, tuple[torch.Tensor, ...]]:
    """A plan, its mask by the definition, and q, k, v to go with it."""
    rng = torch.Generator().manual_seed(s["seed"])
    b, g, n = s["b"], s["g"], s["n"]
    h, m, bq, bk = g * s["r"], n + s["more"], s["bq"], s["bk"]
    # one head count for the whole plan, as its tensors must agree: H wherever any part asks for it
    named = [t["heads"], t["perm_q"], t["perm_kv"], {"head": "h", "all": "h"}.get(t["tokens"], "1")]
    most = h if "h" in named else g
    heads = {"1": 1, "g": most, "h": most, "": 1}
    rows = b if t["rows"] else 1
    kept = torch.rand(rows, heads[t["heads"]], -(-n // bq), -(-m // bk), generator=rng) < t["share"]
    shape = {"": None, "keys": (b, 1, 1, m), "row": (b, 1, n, m), "head": (1, most, n, m), "all": (b, most, n, m)}[
        t["tokens"]
    ]
    tokens = None if shape is None else torch.rand(shape, generator=rng) < 0.7
    perms = [
        None if not t[name] else torch.rand(rows, heads[t[name]], length, generator=rng).argsort(-1)
        for name, length in (("perm_q", n), ("perm_kv", m))
    ]
    first = torch.randint(0, m, (b,), generator=rng) if t["first"] else None
    window, sinks = t["window"], t["sinks"] if t["window"] is not None else 0
    plan = BlockPlan.from_blocks(
        kept, block=(bq, bk), queries=n, keys=m, causal=t["causal"], window=window, sinks=sinks, first=first,
        tokens=tokens, perm_q=perms[0], perm_kv=perms[1],
    )  # fmt: skip
    mask = torch.zeros(b, most, n, m, dtype=torch.bool)
    for row in range(b):
        for head in range(most):
            for slot_i in range(n):
                for slot_j in range(m):
                    at = [x if x is None else x.expand(b, most, -1)[row, head] for x in perms]
                    i = slot_i if at[0] is None else int(at[0][slot_i])
                    j = slot_j if at[1] is None else int(at[1][slot_j])
                    p, begin = i + m - n, 0 if first is None else int(first[row])
                    ok = bool(kept.expand(b, most, -1, -1)[row, head, slot_i // bq, slot_j // bk])
                    ok &= j <= p or not t["causal"]
                    ok &= window is None or abs(p - j) < window or begin <= j < begin + sinks
                    ok &= tokens is None or bool(tokens.expand(b, most, n, m)[row, head, i, j])
                    mask[row, head, i, j] = ok
    mask = mask.repeat_interleave(h // most, 1)
    make = lambda *x: torch.randn(x, generator=rng, dtype=torch.float64)  # noqa: E731
    return plan, mask, (make(b, h, n, 3), make(b, g, m, 3), make(b, g, m, 2))


def wide(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A plan's mask for all rows and heads."""
    h = like.shape[1]
    return (mask if mask.shape[1] in (1, h) else mask.repeat_interleave(h // mask.shape[1], 1)).expand(like.shape)


SMALL = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@SMALL
@given(sizes, tests)
def test_plan_means_its_mask_and_runs_as_it(s: dict[str, int], t: dict[str, Any]) -> None:
    plan, mask, (q, k, v) = drawn(s, t)
    plan.check()
    assert torch.equal(wide(plan.to_mask(), mask), mask)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    want = attend(*leaves, mask=mask)
    out, lse = attend_plan(*leaves, plan)
    fused = execute_plan(*leaves, plan)
    close(out, want.out, what="out", **TIGHT)
    close(lse, want.lse, what="lse", **TIGHT)
    close(fused, want.out, what="fused out", **TIGHT)
    theirs = torch.autograd.grad(want.out.square().sum(), leaves)
    for mine in (out, fused) if mask.any() else ():
        for a, b in zip(torch.autograd.grad(mine.square().sum(), leaves), theirs, strict=True):
            close(a, b, what="gradient", **TIGHT)
    assert 0.0 <= plan.density <= 1.0


@EXAMPLES
@given(sizes, st.integers(0, 100))
def test_mask_to_plan_and_back(s: dict[str, int], share: int) -> None:
    rng = torch.Generator().manual_seed(s["seed"])
    n, m = s["n"], s["n"] + s["more"]
    mask = torch.rand(s["b"], s["g"], n, m, generator=rng) * 100 < share
    mask[:, :, : s["bq"], : s["bk"]] = True
    plan = BlockPlan.from_mask(mask, (s["bq"], s["bk"])).check()
    assert torch.equal(plan.to_mask(), mask)
    again = BlockPlan.from_mask(plan.to_mask(), plan.block)
    for name in ("num", "idx", "full_num", "full_idx"):
        assert torch.equal(getattr(again, name), getattr(plan, name)), name
    if s["bq"] <= n and s["bk"] <= m:
        assert bool((plan.full_num[:, :, 0] >= 1).all()), "a block of ones is full"


@settings(EXAMPLES, max_examples=15)
@given(sizes, tests)
def test_block_mask_is_the_same_mask(s: dict[str, int], t: dict[str, Any]) -> None:
    plan, mask, _ = drawn(s, t | {"perm_q": "", "perm_kv": ""})
    if plan.heads not in (1, mask.shape[1]):
        return
    made = plan.to_block_mask()
    assert made.seq_lengths == (plan.queries, plan.keys) and tuple(made.BLOCK_SIZE) == plan.block
    assert made.kv_indices.data_ptr() != made.full_kv_indices.data_ptr(), "FlexAttention needs two tensors"
    assert torch.equal(create_mask(made.mask_mod, *mask.shape, device="cpu"), mask)
    blocks = made.to_dense() > 0
    assert torch.equal(blocks.expand_as(plan.blocks()), plan.blocks())
    for name, want in (("kv_num_blocks", plan.num), ("full_kv_num_blocks", plan.full_num)):
        assert torch.equal(getattr(made, name), want)


def test_block_mask_runs_in_eager_flex_attention() -> None:
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 40, 8, generator=rng) for _ in range(3))
    kept = torch.rand(1, 2, 3, 3, generator=rng) < 0.5
    kept[..., 0] = True
    plan = BlockPlan.from_blocks(kept, block=16, queries=40, keys=40, causal=True)
    with pytest.warns(UserWarning, match="without torch.compile"):
        got = flex_attention(q, k, v, block_mask=plan.to_block_mask())
    close(got, execute_plan(q, k, v, plan), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("self_contained", [True, False])
def test_block_mask_runs_in_compiled_flex_attention(self_contained: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 300, 16, generator=rng) for _ in range(3))
    kept = torch.rand(1, 2, 5, 5, generator=rng) < 0.5
    kept[..., 0] = True
    padding = torch.ones(2, 1, 1, 300, dtype=torch.bool)
    padding[1, ..., 250:] = False
    plan = BlockPlan.from_blocks(kept, block=64, queries=300, keys=300, causal=True, tokens=padding)
    got = torch.compile(flex_attention)(q, k, v, block_mask=plan.to_block_mask(self_contained=self_contained))
    close(got, execute_plan(q, k, v, plan), rtol=1e-5, atol=1e-5)


def test_block_mask_over_permuted_slots() -> None:
    plan, mask, _ = drawn(
        {"b": 1, "g": 2, "r": 1, "n": 11, "more": 4, "bq": 3, "bk": 4, "seed": 3},
        {"causal": True, "window": 7, "sinks": 2, "first": False, "tokens": "row", "perm_q": "h", "perm_kv": "h",
         "heads": "h", "rows": True, "share": 0.6},
    )  # fmt: skip
    assert plan.perm_q is not None and plan.perm_kv is not None
    slots = create_mask(plan.to_block_mask().mask_mod, 1, 2, 11, 15, device="cpu")
    by_slot = mask.gather(2, plan.perm_q[..., None].expand(-1, -1, -1, 15))
    assert torch.equal(slots, by_slot.gather(3, plan.perm_kv[:, :, None].expand(-1, -1, 11, -1)))


@settings(EXAMPLES, max_examples=40)
@given(sizes, tests, st.integers(1, 12))
def test_windows_in_chunks(s: dict[str, int], t: dict[str, Any], chunk: int) -> None:
    t = t | {"perm_q": "", "perm_kv": "", "heads": "1", "rows": False, "share": 1.0, "window": t["window"] or 3}
    plan, mask, (q, k, v) = drawn(s, t)
    if plan.heads not in (1, q.shape[1], k.shape[1]):
        return
    leaves = [x.requires_grad_() for x in (q, k, v)]
    got, want = execute_window(*leaves, plan, chunk=chunk), attend(*leaves, mask=mask).out
    close(got, want, what="out", **TIGHT)
    for a, b in zip(torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves), strict=True):
        close(a, b, what="gradient", **TIGHT)
    with torch.no_grad():
        close(execute_window(*leaves, plan, chunk=chunk), want, what="out without gradients", **TIGHT)


def test_disjoint_plans_merge_to_full_attention() -> None:
    rng = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 4, 37, 5, generator=rng, dtype=torch.float64, requires_grad=True) for _ in range(3))
    kept = torch.rand(2, 4, 10, 10, generator=rng) < 0.5
    facts: dict[str, Any] = {"block": 4, "queries": 37, "keys": 37, "causal": True}
    parts = [attend_plan(q, k, v, BlockPlan.from_blocks(x, **facts)) for x in (kept, ~kept)]
    (out, lse), want = qkv.merge(*parts), attend(q, k, v, causal=True)
    close(out, want.out, **TIGHT)
    close(lse, want.lse, **TIGHT)
    weight = torch.randn(out.shape, generator=rng, dtype=torch.float64)
    ours = torch.autograd.grad((out * weight).sum() + lse.sum(), (q, k, v))
    theirs = torch.autograd.grad((want.out * weight).sum() + want.lse.sum(), (q, k, v))
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, what="gradient through the merge", **TIGHT)


def test_further_mask_and_empty_rows() -> None:
    rng = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, 2, 9, 4, generator=rng, dtype=torch.float64) for _ in range(3))
    plan = BlockPlan.from_blocks(torch.ones(1, 1, 3, 3, dtype=torch.bool), block=3, queries=9, keys=9, causal=True)
    mask = torch.rand(1, 1, 9, 9, generator=rng) < 0.5
    mask[:, :, 4] = False
    want = attend(q, k, v, mask=mask, causal=True)
    out, lse = attend_plan(q, k, v, plan, mask=mask)
    close(out, want.out, **TIGHT)
    close(lse, want.lse, **TIGHT)
    assert not out[:, :, 4].any() and bool((lse[:, :, 4] == -torch.inf).all())
    narrow = plan.restrict(mask)
    close(execute_plan(q, k, v, narrow), want.out, **TIGHT)
    nothing = plan.restrict(torch.zeros(1, 1, 1, 9, dtype=torch.bool))
    assert not execute_plan(q, k, v, nothing).any() and nothing.density == 0.0


def test_facts() -> None:
    plan = BlockPlan.from_blocks(torch.ones(1, 1, 4, 4, dtype=torch.bool), block=8, queries=32, keys=32, causal=True)
    assert plan.density == 1.0 and plan.grid == (4, 4) and (plan.batch, plan.heads) == (1, 1)
    assert (
        plan.pairs == 10 * 64 and plan.num.tolist() == [[[1, 1, 1, 1]]] and plan.full_num.tolist() == [[[0, 1, 2, 3]]]
    )
    diagonal = BlockPlan.from_blocks(torch.eye(4).bool()[None, None], block=8, queries=32, keys=32, causal=True)
    assert diagonal.density == pytest.approx(0.4)
    assert "N=32" in repr(plan) and "causal=True" in repr(plan)
    moved = plan.to("meta")
    assert moved.num.device.type == "meta" and moved.idx.dtype == torch.int32


def lists(**change: Any) -> dict[str, Any]:
    """Fields of a valid plan of 2 x 2 blocks of 4."""
    one = {"dtype": torch.int32}
    facts: dict[str, Any] = {
        "num": torch.tensor([[[1, 1]]], **one), "idx": torch.tensor([[[[0, 0], [1, 0]]]], **one),
        "full_num": torch.tensor([[[0, 1]]], **one), "full_idx": torch.tensor([[[[0], [0]]]], **one),
        "block": (4, 4), "queries": 8, "keys": 8, "causal": True,
    }  # fmt: skip
    return facts | change


I32 = {"dtype": torch.int32}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"queries": 0}, "must be positive"),
        ({"block": (4, 0)}, "must be positive"),
        ({"queries": 8, "keys": 4}, "N <= M"),
        ({"window": 0}, "window=0"),
        ({"sinks": -1, "window": 3}, "sinks=-1"),
        ({"sinks": 2}, "without a window"),
        ({"num": torch.ones(1, 1, 2, dtype=torch.int64)}, "int32"),
        ({"num": torch.ones(1, 1, 3, **I32)}, r"\[B\|1, H\|1, Qb\]"),
        ({"num": torch.ones(2, 1, 2, **I32), "idx": torch.zeros(2, 1, 2, 2, **I32)}, "one shape"),
        ({"queries": 12, "keys": 12}, "2 query blocks"),
        ({"num": torch.tensor([[[1, 3]]], **I32)}, r"0 \.\. 2"),
        ({"num": torch.tensor([[[1, -1]]], **I32)}, r"0 \.\. 2"),
        ({"idx": torch.tensor([[[[0, 0], [2, 0]]]], **I32)}, "outside 0 .. 1"),
        ({"num": torch.tensor([[[1, 2]]], **I32)}, "listed twice, first at batch 0, head 0, query block 1, key block 0"),
        ({"full_num": torch.tensor([[[0, 1]]], **I32), "full_idx": torch.tensor([[[[0], [1]]]], **I32),
          "idx": torch.tensor([[[[0, 0], [0, 0]]]], **I32)}, "full block holds an element"),
        ({"keys": 7, "queries": 7, "causal": False, "num": torch.tensor([[[1, 0]]], **I32),
          "full_idx": torch.tensor([[[[0], [1]]]], **I32)}, "runs past M"),
        ({"tokens": torch.ones(1, 1, 8, 8)}, "bool"),
        ({"tokens": torch.ones(1, 1, 8, 7, dtype=torch.bool)}, "broadcastable"),
        ({"first": torch.zeros(1, 1, dtype=torch.long)}, r"integer \[B\]"),
        ({"perm_kv": torch.arange(7)[None, None]}, "perm_kv"),
        ({"perm_q": torch.zeros(1, 1, 8, dtype=torch.long)}, "no permutation"),
        ({"first": torch.zeros(3, dtype=torch.long), "tokens": torch.ones(2, 1, 1, 8, dtype=torch.bool)}, "disagree on B"),
        ({"perm_kv": torch.arange(8, device="meta")[None, None]}, "different devices"),
    ],
)  # fmt: skip
def test_bad_plans_say_what_is_wrong(change: dict[str, Any], says: str) -> None:
    BlockPlan(**lists())
    with pytest.raises(InvalidInput, match=says):
        BlockPlan(**lists(**change))


@pytest.mark.parametrize("make", [
    lambda: BlockPlan.from_mask(torch.ones(4, 4, dtype=torch.bool)),
    lambda: BlockPlan.from_mask(torch.ones(1, 1, 4, 4)),
    lambda: BlockPlan.from_blocks(torch.ones(1, 1, 2, 3, dtype=torch.bool), block=4, queries=8, keys=8),
    lambda: BlockPlan.from_blocks(torch.ones(1, 1, 2, 2), block=4, queries=8, keys=8),
])  # fmt: skip
def test_bad_masks_and_blocks(make: Any) -> None:
    with pytest.raises(InvalidInput, match="plan: "):
        make()


def test_plans_and_tensors_that_do_not_fit() -> None:
    plan = BlockPlan(**lists())
    good = torch.zeros(1, 2, 8, 4)
    with pytest.raises(InvalidInput, match="N=8, M=8; q and k have N=4"):
        attend_plan(good[:, :, :4], good, good, plan)
    three = BlockPlan.from_blocks(torch.ones(1, 3, 2, 2, dtype=torch.bool), block=4, queries=8, keys=8)
    with pytest.raises(InvalidInput, match="H=3"):
        attend_plan(good, good, good, three)
    with pytest.raises(InvalidInput, match="expected q"):
        attend_plan(good, good[..., :3], good, plan)
    with pytest.raises(InvalidInput, match="lies on meta"):
        attend_plan(good, good, good, plan.to("meta"))
    with pytest.raises(InvalidInput, match="no permutation"):
        execute_window(good, good, good, BlockPlan(**lists(perm_q=torch.arange(8)[None, None])))
