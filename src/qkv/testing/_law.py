"""Laws: what every method of a kind must keep, written once and run over every method and every form.

A law is a function of a `Case` (a configured method, one of its forms, a device, a seed) that raises
`BrokenLaw`. Files and packages beside this one hold the laws of one kind each and are found by folder; there is
no list to edit.

    @law("operator", "A query must not see later tokens.", applies=is_causal)
    def no_future_leak(case: Case) -> None: ...
"""

from __future__ import annotations

import importlib
import pkgutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from qkv.core import registry
from qkv.core.errors import BrokenLaw, InvalidParameter, UnknownName
from qkv.core.spec import KINDS, Method, near, parse_setting

M = TypeVar("M", bound=Method)
Target = str | Path | Method | type[Method]


class Draw:
    """Reproducible random tensors for one law: the same values on every device."""

    def __init__(self, seed: int, device: str | torch.device = "cpu") -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.device = torch.device(device)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float64, scale: float = 1.0, grad: bool = False) -> Tensor:
        """Normal values with standard deviation `scale`; grad: a leaf that asks for gradients."""
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale
        return x.to(self.device, dtype).requires_grad_(grad)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
        """Uniform values in [low, high)."""
        x = torch.rand(shape, generator=self.generator, dtype=torch.float64)
        return (low + (high - low) * x).to(self.device, dtype)

    def integers(self, *shape: int, low: int = 0, high: int) -> Tensor:
        """Integers in [low, high)."""
        return torch.randint(low, high, shape, generator=self.generator).to(self.device)

    def permutation(self, n: int) -> Tensor:
        """A random order of n things that is not the identity (n > 1)."""
        order = torch.arange(n)
        while n > 1 and bool((order == torch.arange(n)).all()):
            order = torch.randperm(n, generator=self.generator)
        return order.to(self.device)


@dataclass(frozen=True)
class Case:
    """What a law is run on.

    method: a configured method. form: one of the forms its kind knows (operators: ``reference``, ``fast``,
    ``kernel``), or ``""`` for kinds without forms. device: where the tensors lie. seed: of every draw.
    """

    method: Any
    form: str = ""
    device: str = "cpu"
    seed: int = 0

    @property
    def spec(self) -> Any:
        """The method's specification."""
        return self.method.spec

    def draw(self, salt: int = 0) -> Draw:
        """Fresh reproducible draws; another `salt` gives other values."""
        return Draw(self.seed * 1009 + salt, self.device)

    def with_method(self, method: Method) -> Case:
        """The same case for another configuration."""
        return replace(self, method=method)

    def __str__(self) -> str:
        return f"{self.method}-{self.form}" if self.form else str(self.method)


def always(case: Case) -> bool:
    """The law applies to every method of its kind."""
    return True


@dataclass(frozen=True)
class Law:
    """One law of a kind.

    name: snake_case. check: raises `BrokenLaw`. applies: False where the method does not claim what the law
    is about; then no test is generated. explains: what the law means and what usually breaks it. expensive:
    seconds, not milliseconds.
    """

    name: str
    kind: str
    check: Callable[[Case], None]
    applies: Callable[[Case], bool] = always
    explains: str = ""
    expensive: bool = False

    def run(self, case: Case) -> None:
        """Check one case; the error names the case, the law, what was measured, and what to look at."""
        try:
            self.check(case)
        except BrokenLaw as error:
            raise BrokenLaw(f"{case} breaks `{self.name}`: {error}\n  {self.explains}") from error


class Pair(NamedTuple):
    """A law and a case it applies to. id reads ``gla-fast-no_future_leak``."""

    id: str
    law: Law
    case: Case

    @property
    def deviation(self) -> str | None:
        """The reason the method gives for not keeping this law, or None."""
        return next((d.reason for d in self.case.spec.deviations if d.law == self.law.name), None)


_LAWS: dict[str, dict[str, Law]] = {}
_FORMS: dict[str, Callable[[Any, str], Sequence[str]]] = {}


def law(
    kind: str, explains: str, *, applies: Callable[[Case], bool] = always, expensive: bool = False
) -> Callable[[Callable[[Case], None]], Law]:
    """Register the decorated function as a law of `kind`, under its own name."""
    if kind not in KINDS:
        raise UnknownName(f"there is no kind {kind!r}{near(kind, KINDS)}")

    def register(check: Callable[[Case], None]) -> Law:
        table = _LAWS.setdefault(kind, {})
        if check.__name__ in table:
            raise InvalidParameter(f"the kind {kind!r} has two laws named {check.__name__!r}")
        table[check.__name__] = Law(check.__name__, kind, check, applies, explains, expensive)
        return table[check.__name__]

    return register


def forms(kind: str) -> Callable[[Callable[[Any, str], Sequence[str]]], Callable[[Any, str], Sequence[str]]]:
    """Register ``(method, device) -> form names`` for a kind; without it there is one form, ``""``."""

    def register(function: Callable[[Any, str], Sequence[str]]) -> Callable[[Any, str], Sequence[str]]:
        _FORMS[kind] = function
        return function

    return register


@cache
def _discover() -> None:
    """Import every law file of this folder and of the packages in it (names without a leading underscore)."""
    package = importlib.import_module("qkv.testing")
    for info in pkgutil.walk_packages(package.__path__, "qkv.testing."):
        if not info.name.rpartition(".")[2].startswith("_"):
            importlib.import_module(info.name)


def laws(kind: str) -> dict[str, Law]:
    """The laws of a kind by name."""
    _discover()
    if kind not in KINDS:
        raise UnknownName(f"there is no kind {kind!r}{near(kind, KINDS)}")
    return dict(_LAWS.get(kind, {}))


def configurations(target: Target) -> list[Method]:
    """What a target stands for.

    An instance (or an id or a file with settings) is itself; a class, an id or a ``.py`` file stands for the
    configurations its spec names as `trials`.
    """
    if isinstance(target, Method):
        return [target]
    if isinstance(target, type) and issubclass(target, Method):
        cls = target
    elif isinstance(target, (str, Path)):
        text = str(target)
        file, colon, settings = text.partition(".py:")
        if text.endswith(".py"):
            cls = registry.load_file(text)
        elif colon:
            return [registry.load_file(f"{file}.py").create(**parse_setting(f":{settings}")[1])]
        elif ":" in text:
            return [registry.method(text)]
        else:
            cls = registry.config_class(text)
    else:
        raise InvalidParameter(f"a method is an id, a .py file, a configuration or its class, not {target!r}")
    return [cls.create(**trial) for trial in cls.spec.trials]


def cases(target: Target, *, device: str = "cpu", seed: int = 0) -> list[Case]:
    """One case for each configuration and each form that its spec claims on this device."""
    _discover()
    return [
        Case(method, form, device, seed)
        for method in configurations(target)
        for form in _FORMS.get(method.spec.kind, lambda m, d: ("",))(method, device)
    ]


def pairs(kind: str | None = None, *targets: Target, device: str = "cpu", quick: bool = False) -> Iterator[Pair]:
    """Every law with every case it applies to: over `targets`, or over the registry (of one kind).

    quick: leave expensive laws out. A deviation that names no law of the method's kind raises `UnknownName`.
    """
    for target in targets or [spec.config for spec in registry.methods(kind)]:
        for case in cases(target, device=device):
            table = laws(case.spec.kind)
            for deviation in case.spec.deviations:
                if deviation.law not in table:
                    raise UnknownName(f"{case.spec.id} declares a deviation from {deviation.law!r}, which is "
                                      f"no law of its kind{near(deviation.law, table)}")  # fmt: skip
            for one in table.values():
                if not (quick and one.expensive) and one.applies(case):
                    yield Pair(f"{case}-{one.name}", one, case)


@dataclass(frozen=True)
class Result:
    """One law on one case. message: empty when it was kept; for a declared deviation its reason."""

    id: str
    law: str
    ok: bool
    seconds: float
    message: str = ""
    deviation: bool = False


@dataclass(frozen=True)
class Verdict:
    """What `verify` found. ``ok`` is True when at least one law ran and every result is ok."""

    results: tuple[Result, ...]

    @property
    def ok(self) -> bool:
        """Whether every law was kept (or broken exactly as declared)."""
        return bool(self.results) and all(r.ok for r in self.results)

    @property
    def failed(self) -> list[Result]:
        """The results that are not ok."""
        return [r for r in self.results if not r.ok]

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        seconds = sum(r.seconds for r in self.results)
        lines = [f"{len(self.results) - len(self.failed)} of {len(self.results)} laws kept ({seconds:.1f} s)"]
        lines += [f"BROKEN {r.id}\n  {r.message}" for r in self.failed]
        lines += [f"deviates as declared: {r.id} ({r.message})" for r in self.results if r.deviation and r.ok]
        return "\n".join(lines) if self.results else "no law applies: nothing was shown"


def judge(pair: Pair) -> Result:
    """Run one law. A crash counts as broken; a declared deviation that holds is out of date: not ok."""
    start, reason, message = time.perf_counter(), pair.deviation, ""
    try:
        pair.law.run(pair.case)
        ok = reason is None
        if not ok:
            message = f"the law holds now: remove the declared deviation ({reason})"
    except BrokenLaw as error:
        ok, message = reason is not None, reason or str(error)
    except Exception as error:
        ok = False
        message = (f"{pair.case} crashed under `{pair.law.name}`: {type(error).__name__}: {error}\n"
                   f"  {pair.law.explains}")  # fmt: skip
    return Result(pair.id, pair.law.name, ok, time.perf_counter() - start, message, reason is not None)


def verify(
    *targets: Target,
    file: str | Path | None = None,
    device: str = "cpu",
    quick: bool = False,
    progress: Callable[[Result, int, int], None] | None = None,
) -> Verdict:
    """Run every law of some methods here, on this machine.

    targets: ids (``"gla"``, ``"gla:chunk_size=32"``), configurations, classes, or paths of ``.py`` files that
    define a method of your own (the file is executed); file: one such path. None of either: every registered
    method. device: ``"cpu"`` or ``"cuda"``; kernels are judged on CUDA. quick: leave the expensive laws out.
    progress: called with (result, done, total). Raises `UnknownName` for a method that does not exist.
    """
    chosen = (*targets, *([Path(file)] if file is not None else []))
    todo = list(pairs(None, *chosen, device=device, quick=quick))
    results = []
    for pair in todo:
        results.append(judge(pair))
        if progress is not None:
            progress(results[-1], len(results), len(todo))
    return Verdict(tuple(results))


def mutant(cls: type[M], /, label: str = "", **changes: Any) -> type[M]:
    """A copy of a method class whose spec (for names its spec has) or whose class attributes are replaced.

    For tests of the tests: ``mutant(GLA, fast=off_by_one)`` must break a law.
    """
    facts = {k: v for k, v in changes.items() if k in cls.spec.__dataclass_fields__}
    body = {k: v for k, v in changes.items() if k not in facts}
    body |= {"spec": replace(cls.spec, **facts), "__module__": __name__}
    return cast("type[M]", type(f"Mutant{cls.__name__}", (cls,), body))


def expect(condition: Any, message: str) -> None:
    """Raise `BrokenLaw` with `message` unless `condition` is true."""
    if not bool(condition):
        raise BrokenLaw(message)


def refuses(errors: type[Exception] | tuple[type[Exception], ...], call: Callable[[], Any], what: str) -> Exception:
    """The error that `call` raised; `BrokenLaw` when it returned instead or raised another kind of error."""
    names = " or ".join(e.__name__ for e in (errors if isinstance(errors, tuple) else (errors,)))
    try:
        call()
    except errors as error:
        return error
    except Exception as error:
        raise BrokenLaw(f"{what} raised {type(error).__name__} ({error}) instead of {names}") from error
    raise BrokenLaw(f"{what} was accepted; expected {names}")


def finite(x: Tensor, what: str = "output") -> None:
    """Raise `BrokenLaw` on the first NaN or infinite value."""
    bad = ~torch.isfinite(x)
    if bool(bad.any()):
        at = tuple(int(i) for i in bad.nonzero()[0])
        raise BrokenLaw(f"{what} holds {int(bad.sum())} non-finite values, the first {x[at].item()} at {at}")


def close(got: Tensor, want: Tensor, *, rtol: float = 0.0, atol: float = 0.0, what: str = "output") -> None:
    """Raise `BrokenLaw` unless ``max|got - want| <= atol + rtol max|want|``.

    Shapes must agree, NaN never passes, and infinities pass only where both hold the same one.
    """
    if got.shape != want.shape:
        raise BrokenLaw(f"{what} has shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    if got.numel() == 0:
        raise BrokenLaw(f"{what} is empty: nothing was compared")
    got, want = (x.detach().to("cpu", torch.float64) for x in (got, want))
    error = torch.where(got == want, 0.0, (got - want).abs())
    error = torch.where(error.isnan(), torch.inf, error)
    size = torch.where(want.isfinite(), want.abs(), 0.0).max()
    tolerance = atol + rtol * float(size)
    worst = float(error.max())
    if not worst <= tolerance:
        at = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
        raise BrokenLaw(
            f"{what} is off by {worst:.3g} (tolerance {tolerance:.3g}, largest value "
            f"{float(size):.3g}) at {at}: got {got[at].item():.9g}, want {want[at].item():.9g}"
        )


def same(got: Tensor, want: Tensor, what: str = "output") -> None:
    """Raise `BrokenLaw` unless both are bitwise equal, of one shape and dtype; NaN never passes."""
    if got.shape != want.shape or got.dtype != want.dtype:
        raise BrokenLaw(f"{what}: {got.dtype} {tuple(got.shape)}, expected {want.dtype} {tuple(want.shape)}")
    if not torch.equal(got, want):
        wide = torch.float64 if got.is_floating_point() else got.dtype
        differ = (got != want) | (got != got)
        at = tuple(int(i) for i in differ.nonzero()[0])
        gap = (got.to(wide) - want.to(wide)).abs().max().item() if got.dtype != torch.bool else 1
        raise BrokenLaw(f"{what} must be bitwise equal: {int(differ.sum())} of {differ.numel()} values "
                        f"differ (by up to {gap:.3g}), the first at {at}: got {got[at].item()}, "
                        f"want {want[at].item()}")  # fmt: skip
