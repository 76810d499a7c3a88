"""The laws of operators: what a map of q, k, v must keep, whatever its formula.

Sizes are small distinct primes, so that swapped axes cannot hide. Everything exact is checked in float64; a
kernel, which has no float64, is checked in float32 with a wider tolerance and by `low_precision`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from qkv.core import registry
from qkv.core.errors import BrokenLaw, QKVError
from qkv.core.operator import Operator, load_kernel
from qkv.core.spec import Extra
from qkv.core.state import State
from qkv.testing._law import Case, Draw, close, expect, finite, forms, law, same

B, H, N, D, E = 2, 3, 13, 5, 7
FREE = {"s": 4, "w": 11}  # sizes of an extra's own axes
TINY, HUGE = 1e-30, 1e4


@forms("operator")
def _forms(method: Operator, device: str) -> Sequence[str]:
    """The reference, the fast form, and on CUDA the kernel where there is one that loads."""
    names = ["reference", "fast"]
    if method.spec.kernel and torch.device(device).type == "cuda":
        load_kernel(method.spec)  # a kernel that is claimed and cannot load is an error, not a skipped test
        like = (torch.empty(B, H, N, width, device="meta") for width in (D, D, E))
        if method.kernel_limit(*like) is None:
            names.append("kernel")
    return names


@dataclass
class Inputs:
    """One call of an operator: q, k, v, extras, and the axes each extra has here."""

    q: Tensor
    k: Tensor
    v: Tensor
    extras: dict[str, Tensor]
    axes: dict[str, str]
    keywords: dict[str, Any] = field(default_factory=dict)

    def named(self) -> dict[str, Tensor]:
        """Every tensor by name."""
        return {"q": self.q, "k": self.k, "v": self.v} | self.extras

    def letters(self) -> dict[str, str]:
        """The axes of every tensor by name."""
        return {"q": "bhnd", "k": "bgmd", "v": "bgme"} | self.axes

    def map(self, change: Callable[[str, str, Tensor], Tensor]) -> Inputs:
        """Every tensor replaced by ``change(name, axes, tensor)``."""
        axes = self.letters()
        new = {name: change(name, axes[name], x) for name, x in self.named().items()}
        return replace(self, q=new.pop("q"), k=new.pop("k"), v=new.pop("v"), extras=new)

    def at(self, letters: str, index: Tensor | slice) -> Inputs:
        """A selection along the axes named by `letters` (``"b"``; ``"nm"`` is the token axis)."""

        def pick(name: str, axes: str, x: Tensor) -> Tensor:
            for at, letter in enumerate(axes):
                if letter in letters:
                    x = x[(slice(None),) * at + (index,)]
            return x

        return self.map(pick)

    def to(self, *args: Any) -> Inputs:
        """As `Tensor.to`, floating-point tensors only when a dtype is given."""
        return self.map(lambda n, a, x: x.to(*args) if x.is_floating_point() or args[0] == "meta" else x)

    def leaves(self, spec: Any) -> Inputs:
        """Fresh leaves that ask for gradients wherever the operator is differentiable."""
        return self.map(
            lambda n, a, x: x.detach().clone().requires_grad_(n in differentiable(self, spec))
        )  # fmt: skip


def differentiable(inputs: Inputs, spec: Any) -> list[str]:
    """Names of the tensors that get a gradient."""
    extras = [n for n, x in inputs.extras.items() if x.is_floating_point() and spec.extras[n].differentiable]
    return ["q", "k", "v", *extras]


def draw(
    case: Case, *, b: int = B, h: int = H, g: int | None = None, n: int = N, m: int | None = None, d: int = D,
    e: int = E, dtype: torch.dtype | None = None, choice: int = 0, salt: int = 0,
) -> Inputs:  # fmt: skip
    """Random inputs of an operator. choice: which alternative axes the extras take, see `choices`."""
    dtype = exact(case) if dtype is None else dtype
    rng, g, m = case.draw(salt), h if g is None else g, n if m is None else m
    sizes = {"b": b, "h": h, "g": g, "n": n, "m": m, "d": d, "e": e} | FREE
    shapes = ((b, h, n, d), (b, g, m, d), (b, g, m, e))
    q, k, v = (rng.normal(*shape).to(dtype) for shape in shapes)
    extras, axes = {}, {}
    for name, extra in case.spec.extras.items():
        letters = _alternative(extra, choice)
        if letters is not None:
            axes[name] = letters
            extras[name] = sample(extra, rng, *(sizes[a] for a in letters), dtype=dtype)
    complete = all(name in extras for name in case.spec.causal_needs)
    return Inputs(q, k, v, extras, axes, {} if complete else {"causal": False})


def sample(extra: Extra, rng: Draw, *shape: int, dtype: torch.dtype) -> Tensor:
    """A valid value of an extra, drawn on the CPU in float64."""
    x = extra.sample(*shape, dtype=torch.float64, generator=rng.generator)
    return x.to(rng.device, dtype) if x.is_floating_point() else x.to(rng.device)


def choices(spec: Any, causal: bool = False) -> list[int]:
    """Numbers of the alternatives: every axes option of every extra is drawn once, and each optional one left out.

    causal: only those with everything that a causal call needs.
    """
    counts = [len(x.axes.split("|")) + (not x.required) for x in spec.extras.values()]
    needs = [spec.extras[name] for name in spec.causal_needs] if causal else []
    return [c for c in range(max(counts, default=1)) if all(_alternative(x, c) is not None for x in needs)]


def _alternative(extra: Extra, choice: int) -> str | None:
    options: list[str | None] = [*reversed(extra.axes.split("|"))]  # the richest axes first
    if not extra.required:
        options.append(None)
    return options[min(choice, len(options) - 1)]


def exact(case: Case) -> torch.dtype:
    """The widest dtype the form computes in."""
    return torch.float32 if case.form == "kernel" else torch.float64


def slack(case: Case) -> dict[str, float]:
    """Tolerance of what must be equal up to rounding: 1e-9 in float64."""
    return {"rtol": 5e-3, "atol": 1e-4} if case.form == "kernel" else {"rtol": 1e-9, "atol": 1e-9}


def modes(spec: Any) -> list[bool]:
    """The values of `causal` that the operator knows."""
    return {"only": [True], "never": [False], "both": [True, False]}[spec.causal]


def call(case: Case, inputs: Inputs, form: str | None = None, **keywords: Any) -> Any:
    """The operator on these inputs, in the case's form."""
    keywords = inputs.keywords | keywords
    return case.method(inputs.q, inputs.k, inputs.v, form=form or case.form, **inputs.extras, **keywords)


def reference(case: Case, inputs: Inputs, **keywords: Any) -> Any:
    """The definition on the same inputs, in float64."""
    return call(case, inputs.to(torch.float64), "reference", **keywords)


def gradients(
    case: Case, inputs: Inputs, weight: Tensor, form: str | None = None, **keywords: Any
) -> dict[str, Tensor]:
    """Gradients of ``sum(weight * out)`` by name; 0 where an input is not used."""
    leaves = inputs.leaves(case.spec)
    out = call(case, leaves, form, **keywords)
    tensors = {n: x for n, x in leaves.named().items() if x.requires_grad}
    got = torch.autograd.grad((out * weight.to(out)).sum(), list(tensors.values()), allow_unused=True)
    return {n: torch.zeros_like(x) if y is None else y for (n, x), y in zip(tensors.items(), got, strict=True)}


def variety(case: Case) -> Iterator[tuple[str, Inputs]]:
    """Labelled inputs over what the spec claims: causal modes, axes of extras, shared heads, N below and above M."""
    spec = case.spec
    salt = 0
    for causal in modes(spec):
        plain: list[tuple[str, dict[str, Any]]] = [(f"choice {c}", {"choice": c}) for c in choices(spec, causal)]
        if spec.gqa:
            plain += [("one key head", {"g": 1}), ("two heads per key head", {"h": 2 * H, "g": H})]
        cross = _cross(spec, causal)
        if cross:
            plain += [("N < M", {"n": 11})] + ([] if causal else [("N > M", {"m": 11})])
        plain += [("one token", {"n": 1})] + ([("one query", {"n": 1, "m": N})] if cross else [])
        for label, sizes in plain:
            salt += 1
            inputs = draw(case, salt=salt, **sizes)
            if spec.causal == "both":
                inputs.keywords["causal"] = causal
            yield f"{label}, {'causal' if causal else 'bidirectional'}", inputs


def _cross(spec: Any, causal: bool) -> bool:
    return spec.cross is True or (spec.cross == "bidirectional" and not causal)


def _fast(case: Case) -> bool:
    return case.form != "reference"


def _causal(case: Case) -> bool:
    return case.spec.causal != "never"


def _padded(case: Case) -> bool:
    return case.spec.padding


def _recurrent(case: Case) -> bool:
    return case.spec.initial is not None


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
        if _recurrent(case):
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
     "extreme its spec claims; a wrong index at a chunk border or an ignored `scale` breaks it.", applies=_fast)  # fmt: skip
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
    if _recurrent(case):
        inputs = draw(case, salt=77)
        (_, got), (_, want) = call(case, inputs, return_state=True), call(case, inputs, "loop", return_state=True)
        _same_state(case, got, want, "the final state")


@law("operator", "The form's gradients are the reference's, for every differentiable input; a hand-written backward or "
     "a detached tensor breaks it.", applies=_fast)  # fmt: skip
def gradients_equal_reference(case: Case) -> None:
    """Over `variety`, in the widest dtype."""
    for label, inputs in variety(case):
        weight = case.draw(5).normal(*inputs.q.shape[:3], inputs.v.shape[-1])
        want = gradients(case, inputs.to(torch.float64), weight, "reference")
        for name, got in gradients(case, inputs, weight).items():
            close(got, want[name], what=f"{label}: gradient of {name}", **slack(case))


@law("operator", "In bfloat16 and float16 the error is at most twice that of the definition in plain PyTorch at the same "
     "precision; sums kept in the low precision, or a cumulative sum of logs in bfloat16, break it.",
     applies=_fast)  # fmt: skip
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
    if not _recurrent(case):
        return None
    b, h, _, d = inputs.q.shape
    before = draw(case, b=b, h=h, g=inputs.k.shape[1], n=3, d=d, e=inputs.v.shape[-1], choice=choice, salt=31)
    return call(case, before, return_state=True)[1]


@law("operator", "No output depends on a later token: the gradient to the future is exactly zero and changing it changes "
     "nothing; a mask that is off by one, or statistics over the whole sequence, break it.", applies=_causal)  # fmt: skip
def no_future_leak(case: Case) -> None:
    """Every query in turn; also after replacing everything later by other values."""
    sizes: list[dict[str, Any]] = [{"choice": c} for c in choices(case.spec, True)]
    sizes += [{"n": 11, "m": N}] if _cross(case.spec, True) else []
    for size in sizes:
        inputs, other = draw(case, **size), draw(case, salt=1, **size)
        if case.spec.causal == "both":
            inputs.keywords["causal"] = True
        n, m = inputs.q.shape[2], inputs.k.shape[2]
        out = call(case, inputs)
        weight = case.draw(5).normal(*out.shape)
        for i in range(n):
            row = torch.zeros_like(weight)
            row[:, :, i] = weight[:, :, i]
            for name, grad in gradients(case, inputs, row).items():
                for at, letter in enumerate(inputs.letters()[name]):
                    if letter in "nm":
                        last = i + (m - n if letter == "m" else 0)
                        later = grad.narrow(at, last + 1, grad.shape[at] - last - 1)
                        expect(not later.any(), f"output {i} has a gradient to {name} after token {last}: up to "
                               f"{_largest(later):.3g}, must be exactly 0")  # fmt: skip
            changed = _changed_after(i, inputs, other)
            close(call(case, changed)[:, :, : i + 1], out[:, :, : i + 1], rtol=1e-12, atol=1e-12,
                  what=f"outputs up to {i} after changing later tokens")  # fmt: skip


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _changed_after(i: int, inputs: Inputs, other: Inputs) -> Inputs:
    """`inputs` up to query i, `other` after it."""
    offset = inputs.k.shape[2] - inputs.q.shape[2]
    return inputs.map(lambda name, axes, x: _spliced(x, other.named()[name], axes, i, offset))


def _spliced(x: Tensor, other: Tensor, axes: str, i: int, offset: int) -> Tensor:
    for at, letter in enumerate(axes):
        if letter in "nm":
            keep = i + 1 + (offset if letter == "m" else 0)
            x = torch.cat([x.narrow(at, 0, keep), other.narrow(at, keep, x.shape[at] - keep)], at)
    return x


@law("operator", "Permuting the batch permutes the output; state shared between rows breaks it.")
def batch_permutation(case: Case) -> None:
    """A batch of five in another order."""
    for choice in choices(case.spec):
        inputs, order = draw(case, b=5, choice=choice), case.draw(3).permutation(5)
        close(call(case, inputs.at("b", order)), call(case, inputs)[order], what="permuted batch", **slack(case))


@law("operator", "Permuting heads (with their key heads and extras) permutes the output; a head axis read from the wrong "
     "place breaks it.")  # fmt: skip
def head_permutation(case: Case) -> None:
    """Key heads in another order, with two query heads each where they may be shared."""
    for choice in choices(case.spec):
        groups, per = 5, 2 if case.spec.gqa else 1
        inputs, order = draw(case, h=groups * per, g=groups, choice=choice), case.draw(3).permutation(groups)
        heads = (order[:, None] * per + torch.arange(per, device=order.device)).flatten()
        got = call(case, inputs.at("g", order).at("h", heads))
        close(got, call(case, inputs)[:, heads], what="permuted heads", **slack(case))


@law("operator", "A row of a batch gives what it gives alone; statistics over the batch break it.")
def row_alone(case: Case) -> None:
    """Every row of a batch of three."""
    for choice in choices(case.spec):
        inputs = draw(case, b=3, choice=choice)
        whole = call(case, inputs)
        for row in range(3):
            alone = call(case, inputs.at("b", slice(row, row + 1)))
            close(alone, whole[row : row + 1], what=f"row {row} alone", **slack(case))


def paddings(device: str) -> Tensor:
    """``[3, N]`` bool: three padded tokens on the left, four on the right, none."""
    t = torch.arange(N, device=device)
    return torch.stack([t >= 3, t < N - 4, t >= 0])


@law("operator", "Padded tokens change nothing: outputs, gradients and the final state of the real tokens are those of "
     "the row without padding; counting padding in a mean or a position breaks it.", applies=_padded)  # fmt: skip
def padding_changes_nothing(case: Case) -> None:
    """One row padded on the left, one on the right, one not at all, against each row alone."""
    for causal in modes(case.spec):
        for choice in choices(case.spec, causal):
            inputs, real = draw(case, b=3, choice=choice), paddings(case.device)
            if case.spec.causal == "both":
                inputs.keywords["causal"] = causal
            weight = case.draw(5).normal(3, H, N, E)
            weight = weight * real[:, None, :, None]
            out, grads = call(case, inputs, padding=real), gradients(case, inputs, weight, padding=real)
            finite(out, "output with padding")
            for row in range(3):
                tokens = real[row].nonzero().squeeze(-1)
                alone = inputs.at("b", slice(row, row + 1)).at("nm", tokens)
                what = f"row {row}, {'causal' if causal else 'bidirectional'}"
                close(out[row, :, tokens], call(case, alone)[0], what=f"{what}: output", **slack(case))
                want = gradients(case, alone, weight[row : row + 1, :, tokens])
                for name in differentiable(inputs, case.spec):
                    axes = inputs.letters()[name]
                    if axes[0] == "b":
                        _padded_gradient(case, grads[name][row], want[name][0], axes[1:], real[row], f"{what}: {name}")
            if causal and _recurrent(case):
                _padded_state(case, inputs, real)


def _padded_gradient(case: Case, got: Tensor, want: Tensor, axes: str, real: Tensor, what: str) -> None:
    for at, letter in enumerate(axes):
        if letter in "nm":
            gone = got.index_select(at, (~real).nonzero().squeeze(-1))
            expect(not gone.any(), f"{what}: gradient {_largest(gone):.3g} at padding, must be 0")
            got = got.index_select(at, real.nonzero().squeeze(-1))
    close(got, want, what=f"{what}: gradient", **slack(case))


def _padded_state(case: Case, inputs: Inputs, real: Tensor) -> None:
    _, state = call(case, inputs, padding=real, return_state=True)
    for row in range(real.shape[0]):
        alone = inputs.at("b", slice(row, row + 1)).at("nm", real[row].nonzero().squeeze(-1))
        _, want = call(case, alone, return_state=True)
        got = state.index(torch.tensor([row], device=real.device))
        _same_state(case, got, want, f"row {row}: state with padding", seen=False)


@law("operator", "What lies under padding is never read, not even as 0 times NaN: NaN there changes no bit of the real "
     "outputs and reaches no gradient.", applies=_padded)  # fmt: skip
def nan_in_padding_changes_nothing(case: Case) -> None:
    """NaN in q, k, v and extras at padded tokens."""
    for causal in modes(case.spec):
        for choice in choices(case.spec, causal):
            inputs, real = draw(case, b=3, choice=choice), paddings(case.device)
            if case.spec.causal == "both":
                inputs.keywords["causal"] = causal
            poisoned = inputs.map(lambda n, axes, x, real=real: _poisoned(x, axes, real))
            weight = case.draw(5).normal(3, H, N, E) * real[:, None, :, None]
            out, want = call(case, poisoned, padding=real), call(case, inputs, padding=real)
            keep = real[:, None, :, None].expand_as(out)
            same(out[keep], want[keep], "real outputs with NaN under padding")
            for name, grad in gradients(case, poisoned, weight, padding=real).items():
                finite(grad, f"gradient of {name} with NaN under padding")


def _poisoned(x: Tensor, axes: str, real: Tensor) -> Tensor:
    if axes[0] != "b" or not x.is_floating_point():
        return x
    for at, letter in enumerate(axes):
        if letter in "nm":
            shape = [real.shape[0] if a == 0 else real.shape[1] if a == at else 1 for a in range(x.ndim)]
            x = x.masked_fill(~real.reshape(shape), torch.nan)
    return x


def _same_state(case: Case, got: State, want: State, what: str, seen: bool = True) -> None:
    expect(got.tensors.keys() == want.tensors.keys(), f"{what}: {sorted(got.tensors)} against {sorted(want.tensors)}")
    expect(not seen or got.seen == want.seen, f"{what}: says {got.seen} tokens seen, expected {want.seen}")
    for name, tensor in want.tensors.items():
        close(got[name], tensor, what=f"{what}, {name}", **slack(case))


@law("operator", "Prefill followed by single steps gives the whole sequence; a step that reads the state before updating "
     "it, or that forgets an extra, breaks it.", applies=lambda case: case.spec.step is not None)  # fmt: skip
def prefill_plus_steps(case: Case) -> None:
    """From the empty state, and after 1, 6 and N - 1 tokens; the given state must stay as it was."""
    for choice in choices(case.spec, True):
        for heads in [{}] + ([{"h": 2 * H, "g": H}] if case.spec.gqa else []):
            inputs = draw(case, choice=choice, **heads)
            whole, end = call(case, inputs, return_state=True)
            for start in (0, 1, 6, N - 1):
                if start:
                    _, state = call(case, inputs.at("nm", slice(0, start)), return_state=True)
                else:
                    state = case.method.initial(inputs.q, inputs.k, inputs.v, **inputs.extras)
                for t in range(start, N):
                    one = inputs.at("nm", slice(t, t + 1))
                    before = {n: x.clone() for n, x in state.tensors.items()}
                    out, new = case.method.step(one.q, one.k, one.v, state, **one.extras)
                    for name, tensor in before.items():
                        same(state[name], tensor, f"the state given to step {t}, {name}, which it must not change")
                    close(out, whole[:, :, t : t + 1], what=f"step {t} after a prefill of {start}", **slack(case))
                    state = new
                _same_state(case, state, end, f"the state after steps from {start}")


@law("operator", "The state handed over at any split gives the same outputs and the same final state as one call; a decay "
     "not applied to the state that came in breaks it.", applies=_recurrent)  # fmt: skip
def state_handover(case: Case) -> None:
    """Every split of N tokens in two, and from the empty state."""
    for choice in choices(case.spec, True):
        inputs = draw(case, choice=choice)
        whole, end = call(case, inputs, return_state=True)
        empty = case.method.initial(inputs.q, inputs.k, inputs.v, **inputs.extras)
        expect(empty.seen == 0, f"the empty state says it has seen {empty.seen} tokens")
        close(call(case, inputs, initial_state=empty), whole, what="from the empty state", **slack(case))
        for split in range(1, N):
            head, state = call(case, inputs.at("nm", slice(0, split)), return_state=True)
            rest = inputs.at("nm", slice(split, None))
            tail, final = call(case, rest, initial_state=state, return_state=True)
            close(torch.cat([head, tail], 2), whole, what=f"split at {split}", **slack(case))
            _same_state(case, final, end, f"the final state, split at {split}")


@law("operator", "A state can be indexed by batch (beams): rows repeated or reordered continue as those rows would.",
     applies=_recurrent)  # fmt: skip
def state_batch_index(case: Case) -> None:
    """Rows 2, 0, 2, 1 of three continue as in the batch they come from; bytes are counted."""
    for choice in choices(case.spec, True):
        inputs = draw(case, b=3, choice=choice)
        rows = torch.tensor([2, 0, 2, 1], device=case.device)
        _, state = call(case, inputs.at("nm", slice(0, 6)), return_state=True)
        rest = inputs.at("nm", slice(6, None))
        want, want_state = call(case, rest, initial_state=state, return_state=True)
        chosen = state.index(rows)
        got, got_state = call(case, rest.at("b", rows), initial_state=chosen, return_state=True)
        close(got, want[rows], what="continued beams", **slack(case))
        _same_state(case, got_state, want_state.index(rows), "the state of continued beams")
        held = sum(t.numel() * t.element_size() for t in chosen.tensors.values())
        expect(chosen.bytes == held and 3 * held == 4 * state.bytes,
               f"the state claims {chosen.bytes} bytes for 4 rows and {state.bytes} for 3, holds {held} for 4")  # fmt: skip


@law("operator", "Taking tokens back out of a state is refused, or gives exactly the state before them.",
     applies=_recurrent)  # fmt: skip
def state_crop(case: Case) -> None:
    """Crop 0 changes nothing; crop 1 and 5 raise a `QKVError` or are exact."""
    inputs = draw(case)
    _, state = call(case, inputs, return_state=True)
    _same_state(case, state.crop(0), state, "the state after crop(0)")
    for tokens in (1, 5):
        try:
            got = state.crop(tokens)
        except QKVError:
            continue
        _, want = call(case, inputs.at("nm", slice(0, N - tokens)), return_state=True)
        _same_state(case, got, want, f"the state after crop({tokens})")


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
    if _recurrent(case):
        first, second = (call(case, draw(case), return_state=True)[1] for _ in range(2))
        expect(first.equal(second), "two calls give different states")


def extremes(case: Case, dtype: torch.dtype) -> Iterator[tuple[str, Inputs]]:
    """Inputs whose extras are filled with their declared extremes, one at a time, constant and mixed with draws."""
    for name, extra in case.spec.extras.items():
        for value in extra.extremes:
            for choice in choices(case.spec):
                inputs = draw(case, choice=choice, dtype=dtype, salt=9)
                if name in inputs.extras:
                    drawn = inputs.extras[name]
                    some = case.draw(8).uniform(*drawn.shape) < 0.5
                    for what, fill in (("everywhere", torch.ones_like(some)), ("here and there", some)):
                        changed = replace(inputs, extras=inputs.extras | {name: drawn.masked_fill(fill, value)})
                        yield f"{name}={value:g} {what}, axes {inputs.axes[name]}", changed


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
