"""The laws of patterns: what a plan and its execution must keep, whatever the rule behind it.

A plan is judged against the definition as a dense mask, and the attention against dense attention under that mask.
Sizes are small distinct primes; everything exact is checked in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from qkv.core import registry
from qkv.core.attend import attend, causal_mask
from qkv.core.errors import Refused
from qkv.core.operator import Operator
from qkv.core.pattern import Pattern
from qkv.testing._law import Case, close, expect, finite, law, same

B, H, N, D, E = 2, 3, 31, 5, 7
M = 43
TIGHT = {"rtol": 1e-9, "atol": 1e-9}


@dataclass
class Inputs:
    """One call of a pattern. padding: ``[B, M]`` or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    causal: bool = True
    padding: Tensor | None = None
    scale: float | None = None

    @property
    def mask(self) -> Tensor | None:
        """The padding as a host passes it: ``[B, 1, 1, M]``."""
        return None if self.padding is None else self.padding[:, None, None]

    @property
    def real(self) -> Tensor:
        """Queries that are real tokens: ``[B, 1, N, 1]``."""
        b, n, m = self.q.shape[0], self.q.shape[2], self.k.shape[2]
        if self.padding is None or n > m:
            return torch.ones(b, 1, n, 1, dtype=torch.bool, device=self.q.device)
        return self.padding[:, None, m - n :, None]


def draw(
    case: Case, *, b: int = B, g: int = H, r: int = 1, n: int = N, m: int | None = None, salt: int = 0,
    causal: bool = True, pad: str = "", strength: float = 2.0, dtype: torch.dtype = torch.float64,
) -> Inputs:  # fmt: skip
    """Random inputs. pad: which ends of which rows are padding: row 0 gets ``left`` and ``right`` of another length
    than the last row, rows between none. strength: standard deviation of q, so that attention is not uniform.
    """
    rng, m = case.draw(salt), n if m is None else m
    q, k = rng.normal(b, g * r, n, D, scale=strength), rng.normal(b, g, m, D)
    v, padding = rng.normal(b, g, m, E), None
    if pad:
        padding = torch.ones(b, m, dtype=torch.bool, device=q.device)
        for row, (left, right) in {0: (m - n + 3, 5), b - 1: (2, 1)}.items():
            padding[row, : left if "left" in pad else 0] = False
            padding[row, m - (right if "right" in pad else 0) :] = False
    return Inputs(q.to(dtype), k.to(dtype), v.to(dtype), causal, padding)


def run(case: Case, inputs: Inputs) -> Tensor:
    """The pattern as a host calls it."""
    return case.method.attention(
        inputs.q, inputs.k, inputs.v, mask=inputs.mask, causal=inputs.causal, scale=inputs.scale
    )


def plan_mask(case: Case, inputs: Inputs) -> Tensor:
    """The plan as a dense mask ``[B, H, N, M]``."""
    i = inputs
    plan = case.method.plan(i.q, i.k, scale=i.scale, causal=i.causal, padding=i.padding).check()
    mask = plan.to_mask()
    (b, h, n), m = i.q.shape[:3], i.k.shape[2]
    if mask.shape[1] not in (1, h):
        mask = mask.repeat_interleave(h // mask.shape[1], 1)
    return mask.expand(b, h, n, m)


def definition(case: Case, inputs: Inputs) -> Tensor:
    """The mask by the definition, ``[B, H, N, M]``."""
    i = inputs
    scale = i.q.shape[-1] ** -0.5 if i.scale is None else i.scale
    return case.spec.reference(i.q, i.k, scale=scale, causal=i.causal, padding=i.padding, **case.method.settings())


def seen(case: Case, inputs: Inputs) -> Tensor:
    """What the attention may see ``[B, H, N, M]``: the plan, or with fewer than `min_queries` queries all that is real."""
    (b, h, n), m = inputs.q.shape[:3], inputs.k.shape[2]
    if n >= case.method.min_queries:
        return plan_mask(case, inputs)
    mask = torch.ones(b, h, n, m, dtype=torch.bool, device=inputs.q.device) if inputs.mask is None else inputs.mask
    mask = mask & causal_mask(n, m, mask.device) if inputs.causal else mask
    return mask.expand(b, h, n, m)


def modes(case: Case) -> list[bool]:
    """The values of `causal` that the pattern knows."""
    return [True] if case.spec.causal == "only" else [True, False]


def variety(case: Case) -> Iterator[tuple[str, Inputs]]:
    """Labelled inputs: causal or not, shared heads, fewer queries than keys, padding, scales, ties, extremes."""
    for causal in modes(case):
        sizes: list[dict[str, Any]] = [
            {}, {"r": 2}, {"g": 1, "r": 3}, {"n": 13, "m": M}, {"n": 16, "m": 40}, {"n": 2}, {"strength": 0.0},
            {"strength": 40.0}, {"b": 3, "pad": "left"}, {"pad": "right"}, {"b": 3, "r": 2, "pad": "left right"},
            {"n": 13, "m": M, "pad": "left"}, {"n": 13, "m": M, "pad": "left right"},
        ]  # fmt: skip
        for salt, size in enumerate(sizes):
            label = ", ".join(f"{k}={v}" for k, v in size.items()) or "plain"
            inputs = draw(case, salt=salt, causal=causal, **size)
            yield f"{label}, {'causal' if causal else 'bidirectional'}", inputs
        yield "another scale", replace(draw(case, salt=99, causal=causal), scale=0.37)


def _real_part(x: Tensor, inputs: Inputs) -> Tensor:
    """Rows of x ``[B, H, N, .]`` that belong to real queries; the others are 0."""
    return torch.where(inputs.real, x, torch.zeros_like(x))


@law("pattern", "The plan is the definition's dense mask, element for element; a window that is off by one, a block list "
     "that misses the diagonal, or padding that scores breaks it.")  # fmt: skip
def plan_equals_reference(case: Case) -> None:
    """Over `variety`, for real queries; the plan also passes its own checks."""
    for label, inputs in variety(case):
        got, want = plan_mask(case, inputs), definition(case, inputs)
        wrong = (got != want) & inputs.real
        expect(not wrong.any(), f"{label}: {int(wrong.sum())} of {wrong.numel()} elements differ, the first at (batch, head, "
               f"query, key) {tuple(wrong.nonzero()[0].tolist()) if wrong.any() else ()}")  # fmt: skip


@law("pattern", "The attention is dense attention under the plan's mask; a chunk border, a block counted twice or an ignored "
     "scale breaks it.")  # fmt: skip
def attention_equals_dense(case: Case) -> None:
    """Over `variety`, to 1e-9 in float64."""
    for label, inputs in variety(case):
        want = attend(inputs.q, inputs.k, inputs.v, mask=seen(case, inputs), scale=inputs.scale).out
        close(_real_part(run(case, inputs), inputs), _real_part(want, inputs), what=label, **TIGHT)


@law("pattern", "The gradients of q, k and v are those of dense attention under the plan's mask; a detached tensor or an "
     "in-place write breaks it.")  # fmt: skip
def gradients_equal_dense(case: Case) -> None:
    """Over `variety`; the choice of the plan itself has no gradient."""
    for label, inputs in variety(case):
        leaves = [x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        weight = _real_part(case.draw(5).normal(*inputs.q.shape[:3], E), inputs)
        mask = seen(case, inputs)
        ours = run(case, replace(inputs, q=leaves[0], k=leaves[1], v=leaves[2]))
        dense = attend(*leaves, mask=mask, scale=inputs.scale).out
        got, want = (
            torch.autograd.grad((x * weight).sum(), leaves, allow_unused=True) if x.requires_grad else (None,) * 3
            for x in (ours, dense)
        )
        for name, one, other, leaf in zip("qkv", got, want, leaves, strict=True):
            one, other = (torch.zeros_like(leaf) if x is None else x for x in (one, other))
            close(one, other, what=f"{label}: gradient of {name}", **TIGHT)


@law(
    "pattern",
    "Every real query sees at least one key; a global threshold, or a block list that starts too late, breaks it.",
)
def no_query_without_a_key(case: Case) -> None:
    """Over `variety`, and over more draws where attention is peaked."""
    peaked = [(f"peaked {s}", draw(case, salt=200 + s, strength=30.0, n=13, m=29)) for s in range(8)]
    for label, inputs in [*variety(case), *peaked]:
        bare = ~plan_mask(case, inputs).any(-1, keepdim=True) & inputs.real
        expect(not bare.any(), f"{label}: {int(bare.sum())} queries see no key, the first at (batch, head, query) "
               f"{tuple(bare.nonzero()[0].tolist()[:3]) if bare.any() else ()}")  # fmt: skip


@law("pattern", "No query sees a later token: not in the plan, not in a gradient, and nothing after its own block changes "
     "what it sees; statistics over the whole sequence or an upper-left mask break it.")  # fmt: skip
def no_future_leak(case: Case) -> None:
    """The plan, exact zero gradients to the future, and other tokens after each block's end (`granularity`)."""
    step = case.method.granularity
    sizes: list[dict[str, Any]] = [{}, {"n": 13, "m": M}, {"n": step + 3, "m": step + 3}]
    for size in sizes:
        inputs, other = draw(case, salt=1, **size), draw(case, salt=2, **size)
        n, m = inputs.q.shape[2], inputs.k.shape[2]
        ahead = plan_mask(case, inputs) & ~causal_mask(n, m, inputs.q.device)
        expect(not ahead.any(), f"{size}: the plan shows {int(ahead.sum())} later keys")
        out = run(case, inputs)
        for i in sorted({0, 1, n // 3, n // 2, n - 2}):
            leaves = [x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
            row = run(case, replace(inputs, q=leaves[0], k=leaves[1], v=leaves[2]))[:, :, i].sum()
            later = (i + 1, i + m - n + 1, i + m - n + 1)
            for name, grad, at in zip("qkv", torch.autograd.grad(row, leaves), later, strict=True):
                expect(not grad[:, :, at:].any(), f"{size}: output {i} has a gradient to later {name}")
        for end in range(step, n, max(step, n // 5)):
            end -= end % step
            cut = end + m - n
            changed = replace(
                inputs,
                q=torch.cat((inputs.q[:, :, :end], other.q[:, :, end:]), 2),
                k=torch.cat((inputs.k[:, :, :cut], other.k[:, :, cut:]), 2),
                v=torch.cat((inputs.v[:, :, :cut], other.v[:, :, cut:]), 2),
            )
            close(run(case, changed)[:, :, :end], out[:, :, :end], what=f"{size}: outputs before {end} after changing what "
                  "comes later", **TIGHT)  # fmt: skip


@law("pattern", "At its declared limit the pattern equals the other method; it ties the methods together.",
     applies=lambda case: bool(case.spec.limits))  # fmt: skip
def limit(case: Case) -> None:
    """Every `Limit` of the spec, over `variety`."""
    for one in case.spec.limits:
        at = case.with_method(case.method.replace(**one.parameters))
        other = registry.method(one.equals)
        for label, inputs in variety(at):
            i = inputs
            if isinstance(other, Operator):
                want = other(i.q, i.k, i.v, causal=i.causal, padding=i.padding, scale=i.scale)
            else:
                assert isinstance(other, Pattern)
                want = other.attention(i.q, i.k, i.v, mask=i.mask, causal=i.causal, scale=i.scale)
            close(_real_part(run(at, i), i), _real_part(want, i), what=f"{label}: {at.method} against {other}", **TIGHT)


@law("pattern", "Prefill in chunks equals prefill in one go: the newest N of M queries choose what they chose before; a mask "
     "aligned to the upper left breaks it.")  # fmt: skip
def chunked_prefill(case: Case) -> None:
    """Cut at multiples of the pattern's granularity; down to one query where the pattern applies to one."""
    step = case.method.granularity
    n = max(N, step + 5)
    for pad in ("", "left"):
        inputs = draw(case, n=n, b=3, pad=pad)
        first = 0 if inputs.padding is None else int(inputs.padding[0].int().argmax())
        if first % step and step > 1:  # blocks count from the first real token: cut where every row's blocks end
            continue
        whole = run(case, inputs)
        cuts = range(step, n, step) if step > 1 else (7, n // 2, n - case.method.min_queries)
        for cut in cuts:
            tail = replace(inputs, q=inputs.q[:, :, cut:])
            if n - cut >= case.method.min_queries:
                real = _real_part(whole[:, :, cut:], tail)
                close(
                    _real_part(run(case, tail), tail), real, what=f"queries from {cut} of {n}, padding {pad!r}", **TIGHT
                )


@law("pattern", "Fewer queries than `min_queries` (decoding) run exact dense attention.",
     applies=lambda case: case.method.min_queries > 1)  # fmt: skip
def few_queries_run_dense(case: Case) -> None:
    """One query, and one too few, over many keys, with and without padding."""
    for n in {1, case.method.min_queries - 1}:
        for pad in ("", "left right"):
            inputs = draw(case, n=n, m=n + max(M, 3 * case.method.granularity), r=2, pad=pad)
            want = attend(inputs.q, inputs.k, inputs.v, mask=inputs.mask, causal=True).out
            got = run(case, inputs)
            close(_real_part(got, inputs), _real_part(want, inputs), what=f"{n} queries, padding {pad!r}", **TIGHT)


@law("pattern", "Permuting key heads with their query heads, or query heads within a group, permutes the output; a choice "
     "made on one head and used on another breaks it.")  # fmt: skip
def head_permutation(case: Case) -> None:
    """Three key heads of two query heads each."""
    inputs, r = draw(case, r=2, n=47), 2
    out = run(case, inputs).unflatten(1, (H, r))
    order, turn = case.draw(3).permutation(H), case.draw(4).permutation(r)
    q = inputs.q.unflatten(1, (H, r))
    groups = replace(inputs, q=q[:, order].flatten(1, 2), k=inputs.k[:, order], v=inputs.v[:, order])
    close(run(case, groups).unflatten(1, (H, r)), out[:, order], what="permuted groups", **TIGHT)
    within = replace(inputs, q=q[:, :, turn].flatten(1, 2))
    close(run(case, within).unflatten(1, (H, r)), out[:, :, turn], what="permuted heads of a group", **TIGHT)


@law("pattern", "A row in a padded batch equals the row alone: sinks and blocks count from its own first token, and batch "
     "mates change nothing; positions counted from the padding break it.")  # fmt: skip
def row_alone(case: Case) -> None:
    """Left, right and two-sided padding, in one pass and in a chunk."""
    for causal in modes(case):
        for salt, pad in enumerate(("left", "right", "left right")):
            for n, m in ((N, N), (13, M)):
                inputs = draw(case, b=3, n=n, m=m, pad=pad, causal=causal, salt=salt)
                out = run(case, inputs)
                assert inputs.padding is not None
                for row in range(3):
                    keys = inputs.padding[row]
                    asks = keys[m - n :]
                    if int(asks.sum()) < case.method.min_queries or (not causal and n != m):
                        continue
                    alone = Inputs(inputs.q[row : row + 1, :, asks], inputs.k[row : row + 1, :, keys],
                                   inputs.v[row : row + 1, :, keys], causal)  # fmt: skip
                    close(out[row : row + 1, :, asks], run(case, alone), what=f"row {row}, {pad} padding, N={n}, M={m}",
                          **TIGHT)  # fmt: skip


@law("pattern", "What stands in padding changes no bit of a real output, NaN included; a padded key that scores, or a sum that "
     "multiplies it by 0, breaks it.")  # fmt: skip
def padding_never_matters(case: Case) -> None:
    """Padding of 0, of 1e4 and of NaN, forward and backward."""
    for pad in ("left", "right"):
        inputs = draw(case, b=3, pad=pad)
        assert inputs.padding is not None
        hole = ~inputs.padding[:, None, :, None]
        seen: list[list[Tensor]] = []
        for value in (0.0, 1e4, torch.nan):
            leaves = [x.masked_fill(hole, value).requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
            out = run(case, replace(inputs, q=leaves[0], k=leaves[1], v=leaves[2]))
            out = torch.where(inputs.real, out, torch.zeros_like(out))
            grads = torch.autograd.grad(out.sum(), leaves)
            seen.append([out.detach(), *(torch.where(hole, torch.zeros_like(x), x) for x in grads)])
        for value, got in zip((1e4, torch.nan), seen[1:], strict=True):
            for name, one, zero in zip(
                ("output", "gradient of q", "gradient of k", "gradient of v"), got, seen[0], strict=True
            ):
                same(one, zero, f"{name} with {value} in the {pad} padding")


@law("pattern", "A dense mask that spells out padding and causality means the same as padding and `causal`; a mask that is "
     "dropped, or whose padding is read off the wrong axis, breaks it.")  # fmt: skip
def mask_spelt_out(case: Case) -> None:
    """``[B, 1, N, M]`` and ``[B, H, N, M]``, causal or not, with and without the flag."""
    for causal in modes(case):
        for n, m in ((N, N), (13, M)):
            inputs = draw(case, b=3, n=n, m=m, pad="left", causal=causal)
            assert inputs.mask is not None
            dense = inputs.mask.expand(-1, -1, n, -1)
            dense = dense & causal_mask(n, m, dense.device) if causal else dense
            want = _real_part(run(case, inputs), inputs)
            q, k, v = inputs.q, inputs.k, inputs.v
            for mask, flag in ((dense, causal), (dense, False), (dense.expand(-1, H, -1, -1), False)):
                got = case.method.attention(q, k, v, mask=mask, causal=flag)
                close(_real_part(got, inputs), want, what=f"mask {tuple(mask.shape)}, causal={flag}", **TIGHT)


@law("pattern", "Any other token mask is either refused or obeyed on top of the plan; never ignored.")
def other_masks(case: Case) -> None:
    """A block-diagonal mask (packed sequences), and one that differs between heads."""
    inputs = draw(case, n=max(N, case.method.min_queries))
    part = torch.arange(inputs.q.shape[2], device=inputs.q.device) // 11
    packed = (part[:, None] == part)[None, None].expand(B, H, -1, -1).clone()
    varied = packed.clone()
    varied[:, 0] = True
    for mask in (packed, varied):
        q, k, v = inputs.q, inputs.k, inputs.v
        try:
            got = case.method.attention(q, k, v, mask=mask, causal=True)
        except Refused:
            expect(case.spec.masks != "any", "the mask was refused though the spec says masks='any'")
            continue
        expect(case.spec.masks == "any", "the mask was taken though the spec says masks='padding'")
        want = attend(q, k, v, mask=plan_mask(case, inputs) & mask).out
        close(got, want, what="another token mask", **TIGHT)


@law("pattern", "The plan says what choosing it cost: at least the floating-point operations that were counted, at most four "
     "times as many; 0 for a static pattern. Selection that is left out of the books breaks it.")  # fmt: skip
def selection_is_counted(case: Case) -> None:
    """Counted by torch's FlopCounterMode while `plan` runs."""
    sizes: list[dict[str, Any]] = [{}, {"n": 16, "m": 40, "r": 2}, {"pad": "left", "b": 3}]
    for size in sizes:
        inputs = draw(case, **size)
        with FlopCounterMode(display=False) as counter:
            plan = case.method.plan(inputs.q, inputs.k, causal=True, padding=inputs.padding)
        counted, said = float(counter.get_total_flops()), plan.selection_flops
        expect(case.spec.dynamic == (counted > 0), f"dynamic={case.spec.dynamic}, but {counted:.0f} FLOPs were counted")
        expect(
            counted <= said <= 4 * counted,
            f"{size}: the plan says {said:.0f} FLOPs of selection, counted {counted:.0f}",
        )


@law("pattern", "The same inputs give the same bits; random or racing choices break it.")
def deterministic(case: Case) -> None:
    """Twice, with torch's generator moved on in between."""
    inputs = draw(case, r=2)
    first = run(case, inputs)
    state = torch.random.get_rng_state()
    torch.manual_seed(case.seed + 1)
    try:
        same(run(case, inputs), first, "a second run")
    finally:
        torch.random.set_rng_state(state)


@law("pattern", "The output is [B, H, N, E] in the dtype and on the device of q, finite on zero and huge inputs.")
def shape_dtype_finite(case: Case) -> None:
    """Every floating dtype; q and k of 0, of 1e4 (in float32 and wider)."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for strength in (0.0, 2.0, 1e4) if dtype in (torch.float32, torch.float64) else (0.0, 2.0):
            inputs = draw(case, r=2, strength=strength, dtype=dtype, pad="left")
            out = run(case, inputs)
            want = ((B, 2 * H, N, E), dtype, inputs.q.device)
            expect((tuple(out.shape), out.dtype, out.device) == want, f"output is {tuple(out.shape)}, {out.dtype}, "
                   f"{out.device}; expected {want}")  # fmt: skip
            finite(out, f"output in {dtype} with q of size {strength}")
