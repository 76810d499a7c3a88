"""How an operator behaves: the same bits twice, finite on extremes, any layout, compiled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qkv.core.errors import BrokenLaw
from qkv.testing._law import Case, close, expect, finite, law, same
from qkv.testing.operators._inputs import (
    HUGE,
    TINY,
    B,
    E,
    H,
    Inputs,
    N,
    call,
    differentiable,
    draw,
    extremes,
    gradients,
    is_recurrent,
    modes,
    slack,
    variety,
)


@law("operator", "The same call twice gives the same bits, forward and backward; atomics or unseeded draws break it.")
def deterministic(case: Case) -> None:
    """Two calls in float32, and for recurrent operators the state too."""
    for label, inputs in variety(case):
        given = inputs.to(torch.float32)
        weight = case.draw(5).normal(*inputs.q.shape[:3], inputs.v.shape[-1], dtype=torch.float32)
        same(call(case, given), call(case, given), f"{label}: second output")
        first, second = gradients(case, given, weight), gradients(case, given, weight)
        for name, grad in first.items():
            same(second[name], grad, f"{label}: second gradient of {name}")
    if is_recurrent(case):
        first, second = (call(case, draw(case), return_state=True)[1] for _ in range(2))
        expect(first.equal(second), "two calls give different states")


@law("operator", "Zero, huge (1e4), tiny (1e-30) and extreme but valid inputs give finite outputs and gradients in float32; "
     "an exponential of a positive number or a division by a sum breaks it.")  # fmt: skip
def finite_on_extremes(case: Case) -> None:
    """Each of q, k, v alone and all together; every declared extreme of every extra."""
    for causal in modes(case.spec):
        base = draw(case, dtype=torch.float32)
        if case.spec.causal == "both":
            base.keywords["causal"] = causal
        weight = case.draw(5).normal(B, H, N, E)
        for factor in (0.0, TINY, HUGE):
            for names in ("q", "k", "v", "qkv"):
                inputs = base.map(lambda n, a, x, s=factor, names=names: x * s if n in names else x)
                _all_finite(case, inputs, weight, f"{names} times {factor:g}")
        for label, inputs in extremes(case, torch.float32):
            inputs.keywords |= base.keywords
            _all_finite(case, inputs, weight, label)


def _all_finite(case: Case, inputs: Inputs, weight: Tensor, label: str) -> None:
    finite(call(case, inputs), f"{label}: output")
    for name, grad in gradients(case, inputs, weight).items():
        finite(grad, f"{label}: gradient of {name}")


@law("operator", "Inputs may be strided views ([B, N, H, D] transposed) and are not written to; `view` or an in-place "
     "operation breaks it.")  # fmt: skip
def layout_and_inputs(case: Case) -> None:
    """Transposed storage gives the same values and stays as it was."""
    inputs = draw(case)
    want = call(case, inputs)
    strided = inputs.map(lambda n, a, x: x.transpose(1, 2).contiguous().transpose(1, 2) if x.ndim > 2 else x)
    before = {n: x.clone() for n, x in strided.named().items()}
    try:
        got = call(case, strided)
    except RuntimeError as error:
        raise BrokenLaw(f"fails on strided inputs: {error}") from error
    close(got, want, what="strided inputs", **slack(case))
    for name, x in strided.named().items():
        same(x, before[name], f"{name} after the call")


@law("operator", "torch.compile(fullgraph=True) traces the call and computes the same; `.item()`, printing or branching on "
     "values breaks it.", applies=lambda case: case.form != "kernel", expensive=True)  # fmt: skip
def compiles(case: Case) -> None:
    """Backend aot_eager (no compiler needed), forward, backward and the returned state."""
    inputs = draw(case, n=7)
    weight = case.draw(5).normal(B, H, 7, E)
    torch.compiler.reset()

    def run(q: Tensor, k: Tensor, v: Tensor, extras: dict[str, Tensor]) -> Any:
        out = case.method(q, k, v, form=case.form, **extras)
        return out

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=False)
    ours, theirs = inputs.leaves(case.spec), inputs.leaves(case.spec)
    want = run(ours.q, ours.k, ours.v, ours.extras)
    try:
        got = compiled(theirs.q, theirs.k, theirs.v, theirs.extras)
        (got * weight).sum().backward()
    except Exception as error:
        raise BrokenLaw(f"does not compile: {type(error).__name__}: {str(error).strip()[:600]}") from error
    finally:
        torch.compiler.reset()
    (want * weight).sum().backward()
    close(got, want, rtol=1e-12, atol=1e-12, what="compiled output")
    for name in differentiable(ours, case.spec):
        mine, other = ours.named()[name].grad, theirs.named()[name].grad
        expect((mine is None) == (other is None), f"{name} has a gradient in only one of eager and compiled")
        if mine is not None and other is not None:
            close(other, mine, rtol=1e-12, atol=1e-12, what=f"compiled gradient of {name}")
