"""Inputs of an operator, drawn from its spec, and calls of it: what the laws of operators share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from qkv.core.operator import Operator, load_kernel
from qkv.core.spec import Extra
from qkv.core.state import State
from qkv.testing._law import Case, Draw, close, expect, forms

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
        cross = takes_cross(spec, causal)
        if cross:
            plain += [("N < M", {"n": 11})] + ([] if causal else [("N > M", {"m": 11})])
        plain += [("one token", {"n": 1})] + ([("one query", {"n": 1, "m": N})] if cross else [])
        for label, sizes in plain:
            salt += 1
            inputs = draw(case, salt=salt, **sizes)
            if spec.causal == "both":
                inputs.keywords["causal"] = causal
            yield f"{label}, {'causal' if causal else 'bidirectional'}", inputs


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


def takes_cross(spec: Any, causal: bool) -> bool:
    """The operator takes other tokens for keys than for queries, in this mode."""
    return spec.cross is True or (spec.cross == "bidirectional" and not causal)


def is_fast(case: Case) -> bool:
    """The law compares a form with the definition."""
    return case.form != "reference"


def is_causal(case: Case) -> bool:
    """The law is about operators with an order of tokens."""
    return case.spec.causal != "never"


def is_padded(case: Case) -> bool:
    """The law is about operators that take padding."""
    return case.spec.padding


def is_recurrent(case: Case) -> bool:
    """The law is about operators with a state."""
    return case.spec.initial is not None


def same_state(case: Case, got: State, want: State, what: str, seen: bool = True) -> None:
    """Raise `BrokenLaw` unless two states are equal up to rounding; seen: and have seen as many tokens."""
    expect(got.tensors.keys() == want.tensors.keys(), f"{what}: {sorted(got.tensors)} against {sorted(want.tensors)}")
    expect(not seen or got.seen == want.seen, f"{what}: says {got.seen} tokens seen, expected {want.seen}")
    for name, tensor in want.tensors.items():
        close(got[name], tensor, what=f"{what}, {name}", **slack(case))
