"""What an operator computes: its definition, in values and gradients, in every dtype and at its declared limits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from qkv.core import registry
from qkv.core.errors import BrokenLaw
from qkv.core.state import State
from qkv.testing._law import Case, close, expect, finite, law
from qkv.testing.operators._inputs import (
    B,
    E,
    H,
    Inputs,
    N,
    call,
    choices,
    differentiable,
    draw,
    exact,
    extremes,
    gradients,
    is_fast,
    is_recurrent,
    modes,
    reference,
    same_state,
    slack,
    variety,
)


@law("operator", "The output is [B, H, N, E] in q's dtype on q's device, a state is float32 or wider; a tensor made "
     "without `device=`, or a sum left in float32, breaks it.")  # fmt: skip
def shape_dtype_device(case: Case) -> None:
    """Every floating dtype; the meta device stands in for any device but the CPU."""
    low = [torch.float32, torch.bfloat16, torch.float16]
    for dtype in low if case.form == "kernel" else [torch.float64, *low]:
        for label, inputs in variety(case):
            given = inputs.to(dtype)
            out = call(case, given)
            want = (*given.q.shape[:3], given.v.shape[-1])
            got = (tuple(out.shape), out.dtype, out.device)
            expect(got == (want, dtype, given.q.device),
                   f"{label}: output is {got}, expected {(want, dtype, given.q.device)}")  # fmt: skip
        if is_recurrent(case):
            state = call(case, draw(case).to(dtype), return_state=True)[1]
            wide = torch.promote_types(dtype, torch.float32)
            kinds = {n: t.dtype for n, t in state.tensors.items() if t.is_floating_point()}
            expect(all(t == wide for t in kinds.values()), f"state of {dtype} inputs is {kinds}, expected {wide}")
            expect(state.seen == N, f"the state says it has seen {state.seen} tokens, not {N}")
    if case.form != "kernel":
        meta = draw(case).to("meta")
        try:
            out = call(case, meta)
        except (RuntimeError, NotImplementedError) as error:
            raise BrokenLaw(f"does not run on another device than the CPU (tried 'meta'): {error}") from error
        expect(out.device.type == "meta" and out.shape == (B, H, N, E), f"on meta: {out.device}, {tuple(out.shape)}")


@law("operator", "The form computes the reference's map, to 1e-9 in float64, for every axes option, head grouping and "
     "extreme its spec claims; a wrong index at a chunk border or an ignored `scale` breaks it.", applies=is_fast)  # fmt: skip
def equals_reference(case: Case) -> None:
    """Over `variety`, with another scale, with random padding holes, and at the extremes of every extra."""
    for label, inputs in variety(case):
        close(call(case, inputs), reference(case, inputs), what=label, **slack(case))
        if case.spec.scale is not None:
            close(call(case, inputs, scale=0.37), reference(case, inputs, scale=0.37), what=f"{label}, scale=0.37",
                  **slack(case))  # fmt: skip
    if case.spec.padding:
        for causal in modes(case.spec):
            inputs = draw(case, b=5, salt=90 + causal)
            inputs.keywords |= {"causal": causal} if case.spec.causal == "both" else {}
            real = case.draw(91).uniform(5, N) < 0.7
            real[:, N // 2] = True
            got, want = call(case, inputs, padding=real), reference(case, inputs, padding=real)
            keep = real[:, None, :, None].expand_as(want)
            close(got[keep], want[keep], what="real outputs with holes of padding", **slack(case))
    for label, inputs in extremes(case, exact(case)):
        close(call(case, inputs), reference(case, inputs), what=label, **slack(case))


@law("operator", "The definition agrees with a plain loop over tokens written independently; a mistake in the formula "
     "itself breaks it.",
     applies=lambda case: case.form == "reference" and case.spec.loop is not None)  # fmt: skip
def reference_equals_loop(case: Case) -> None:
    """Over `variety`, and for the final state."""
    for label, inputs in variety(case):
        close(call(case, inputs), call(case, inputs, "loop"), what=label, **slack(case))
    if is_recurrent(case):
        inputs = draw(case, salt=77)
        (_, got), (_, want) = call(case, inputs, return_state=True), call(case, inputs, "loop", return_state=True)
        same_state(case, got, want, "the final state")


@law("operator", "The form's gradients are the reference's, for every differentiable input; a hand-written backward or "
     "a detached tensor breaks it.", applies=is_fast)  # fmt: skip
def gradients_equal_reference(case: Case) -> None:
    """Over `variety`, in the widest dtype."""
    for label, inputs in variety(case):
        weight = case.draw(5).normal(*inputs.q.shape[:3], inputs.v.shape[-1])
        want = gradients(case, inputs.to(torch.float64), weight, "reference")
        for name, got in gradients(case, inputs, weight).items():
            close(got, want[name], what=f"{label}: gradient of {name}", **slack(case))


@law("operator", "In bfloat16 and float16 the error is at most twice that of the definition in plain PyTorch at the same "
     "precision; sums kept in the low precision, or a cumulative sum of logs in bfloat16, break it.",
     applies=is_fast)  # fmt: skip
def low_precision(case: Case) -> None:
    """Root mean square and largest error, forward and backward, against float64 on the same rounded inputs."""
    for dtype in (torch.bfloat16, torch.float16):
        for causal in modes(case.spec):
            inputs = draw(case, n=61, d=17, e=19, dtype=dtype, salt=int(causal))
            if case.spec.causal == "both":
                inputs.keywords["causal"] = causal
            weight = case.draw(5).normal(B, H, 61, 19).to(dtype)
            exactly = {"output": reference(case, inputs)} | gradients(
                case, inputs.to(torch.float64), weight, "reference"
            )
            plain = {"output": call(case, inputs, "reference")} | gradients(case, inputs, weight, "reference")
            ours = {"output": call(case, inputs)} | gradients(case, inputs, weight)
            for name, want in exactly.items():
                got, limit = _error(ours[name], want), _error(plain[name], want)
                rounding = torch.finfo(dtype).eps / 2 * float(want.abs().max())
                expect(got[0] <= 2 * limit[0] + rounding / 10 and got[1] <= 2 * limit[1] + rounding,
                       f"{dtype} {name}: error {got[0]:.3g} rms, {got[1]:.3g} largest; plain PyTorch has "
                       f"{limit[0]:.3g} and {limit[1]:.3g}, at most twice that is allowed")  # fmt: skip


def _error(got: Tensor, want: Tensor) -> tuple[float, float]:
    finite(got)
    gap = (got.detach().to(torch.float64) - want.detach()).abs()
    return float(gap.square().mean().sqrt()), float(gap.max())


@law("operator", "Gradients of q, k, v, every differentiable extra and the state to start from equal finite differences.",
     applies=lambda case: case.form != "kernel")  # fmt: skip
def gradcheck(case: Case) -> None:
    """torch.autograd.gradcheck in float64 on small inputs, for every axes option of the extras."""
    for causal in modes(case.spec):
        for choice in choices(case.spec, causal):
            inputs = draw(case, b=1, h=2, n=7, d=3, e=2, choice=choice, salt=choice)
            if case.spec.causal == "both":
                inputs.keywords["causal"] = causal
            leaves = inputs.leaves(case.spec)
            names = differentiable(leaves, case.spec)
            state = _started(case, inputs, choice) if causal else None
            parts = {n: t.detach().clone().requires_grad_() for n, t in state.tensors.items()
                     if t.is_floating_point()} if state is not None else {}  # fmt: skip

            def run(*given: Tensor, leaves: Inputs = leaves, names: list[str] = names, state: Any = state,
                    parts: dict[str, Tensor] = parts) -> Any:  # fmt: skip
                new = dict(zip([*names, *parts], given, strict=True))
                changed = leaves.map(lambda n, a, x: new.get(n, x))
                if state is None:
                    return call(case, changed)
                begin = replace(state, tensors=state.tensors | {n: new[n] for n in parts})
                out, end = call(case, changed, initial_state=begin, return_state=True)
                return (out, *(t for t in end.tensors.values() if t.is_floating_point()))

            tensors = [leaves.named()[n] for n in names] + list(parts.values())
            try:
                torch.autograd.gradcheck(run, tensors, eps=1e-6, atol=1e-6, rtol=1e-5)
            except GradcheckError as error:
                what = f"inputs {[*names, *parts]}, choice {choice}"
                raise BrokenLaw(f"{what}: {' '.join(str(error).split())[:400]}") from error


def _started(case: Case, inputs: Inputs, choice: int) -> State | None:
    """A state that has absorbed some other tokens, with the same extras, or None where the operator has none."""
    if not is_recurrent(case):
        return None
    b, h, _, d = inputs.q.shape
    before = draw(case, b=b, h=h, g=inputs.k.shape[1], n=3, d=d, e=inputs.v.shape[-1], choice=choice, salt=31)
    return call(case, before, return_state=True)[1]


@law("operator", "At the declared settings the method equals the other one that it names; this ties the methods together.",
     applies=lambda case: bool(case.spec.limits))  # fmt: skip
def declared_limits(case: Case) -> None:
    """Against the other operator's definition, on inputs both take."""
    for limit in case.spec.limits:
        other = registry.method(limit.equals)
        mine = case.with_method(case.method.replace(**limit.parameters))
        for choice in choices(case.spec):
            inputs = draw(mine, choice=choice)
            filled = {n: torch.full_like(x, limit.inputs[n]) if n in limit.inputs else x
                      for n, x in inputs.extras.items()}  # fmt: skip
            inputs = replace(inputs, extras=filled)
            both = [c for c in modes(case.spec) if c in modes(other.spec)]
            expect(both, f"{case.spec.id} and {limit.equals} share no causal mode")
            for causal in both:
                shared: dict[str, Any] = {n: x for n, x in filled.items() if n in other.spec.extras}
                if other.spec.scale is not None:  # the same scale on both sides, whatever their defaults
                    d = inputs.q.shape[-1]
                    shared["scale"] = 1.0 if case.spec.scale is None else case.spec.scale(d)
                want = other(inputs.q, inputs.k, inputs.v, causal=causal, form="reference", **shared)
                close(call(mine, inputs, causal=causal), want, what=f"{limit.equals} ({limit.says})", **slack(case))
