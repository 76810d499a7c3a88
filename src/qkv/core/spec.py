"""What a method is: a frozen, validated, JSON-serialisable configuration with a class-level specification.

A method file ends in one frozen dataclass that derives from a kind's base class (`Operator`, `Policy`, ...)
and carries a `spec`. Everything else reads from it: command line, laws, bench, docs and error messages.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Union

from qkv.core.errors import InvalidParameter, UnknownName

KINDS = (
    "operator", "pattern", "cache", "layer", "conversion", "objective",
    "probe", "steering", "decoding", "model", "cost",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Limit:
    """A setting at which a method equals another one; it ties the methods together and is checked as a law.

    parameters: the setting, e.g. ``{"budget": 1.0}``. equals: id of the other method. says: one sentence for
    readers. inputs: for operators, constants that fill named extras, e.g. ``{"log_decay": 0.0}``.
    """

    equals: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    says: str = ""
    inputs: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Deviation:
    """A law that a method is known not to keep: a strict expected failure, with its reason."""

    law: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Spec:
    """The facts about a method that do not depend on its parameters.

    id: registry name, equal to the file name with ``-`` for ``_``. title, paper: as published; a plain
    baseline names itself ``"baseline"``. source: how sure the definition is (``code``, ``paper``,
    ``abstract``, ``baseline``). summary: what it does, one sentence. limits: see `Limit`. deviations: see
    `Deviation`. shown: what its real-input check is expected to show, one sentence. honest: its known limit,
    one sentence. trials: the settings at which the laws run; add small ones where small inputs would not
    reach every branch.
    """

    id: str
    title: str
    paper: str
    source: str = "paper"
    summary: str = ""
    limits: tuple[Limit, ...] = ()
    deviations: tuple[Deviation, ...] = ()
    shown: str = ""
    honest: str = ""
    trials: tuple[Mapping[str, Any], ...] = ({},)
    kind: ClassVar[str] = ""
    config: type[Method] = dataclasses.field(default=None, compare=False, repr=False)  # type: ignore[assignment]

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """The method's parameters in declaration order."""
        return parameters(self.config)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for ``qkv methods --json`` and the docs."""
        return {
            "id": self.id, "kind": self.kind, "title": self.title, "paper": self.paper, "source": self.source,
            "summary": self.summary, "shown": self.shown, "honest": self.honest,
            "limits": [dataclasses.asdict(x) for x in self.limits],
            "deviations": [{"law": x.law, "reason": x.reason} for x in self.deviations],
            "parameters": [p.to_dict() for p in self.parameters],
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a method, as users see it."""

    name: str
    type: str
    default: Any
    doc: str
    low: float | None = None
    high: float | None = None
    choices: tuple[Any, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data; infinite or absent bounds are left out."""
        out: dict[str, Any] = {"name": self.name, "type": self.type, "default": self.default, "doc": self.doc}
        out |= {k: v for k in ("low", "high", "choices") if (v := getattr(self, k)) is not None}
        return out


def param(
    default: Any,
    doc: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: Iterable[Any] | None = None,
) -> Any:
    """A parameter of a method: its default, one line of documentation with units, its range (inclusive)."""
    meta = {"doc": doc, "low": low, "high": high, "choices": tuple(choices) if choices is not None else None}
    return field(default=default, metadata={"qkv": meta})


def budget_param(default: float | int, doc: str = "") -> Any:
    """The `budget` that means the same in every method: an int is tokens, a float in (0, 1] a share."""
    doc = doc or "tokens kept per head: an int is a number, a float a share of the prompt (1.0: evict nothing)"
    return field(default=default, metadata={"qkv": {"doc": doc, "budget": True}})


def parameters(cls: type[Method]) -> tuple[Parameter, ...]:
    """All parameters of a method class, in declaration order."""
    out, hints = [], typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        meta = f.metadata.get("qkv", {})
        hint = hints[f.name]
        literal = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else None
        choices = meta.get("choices") or literal
        name = f.type if isinstance(f.type, str) else getattr(f.type, "__name__", str(f.type))
        out.append(Parameter(f.name, name, f.default, meta.get("doc", ""), meta.get("low"), meta.get("high"),
                             choices))  # fmt: skip
    return tuple(out)


def near(name: str, known: Iterable[str]) -> str:
    """``", did you mean 'x' or 'y'?"`` for the nearest known names, or a list of all when nothing is near."""
    known = sorted(known)
    close = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    if close:
        return "; did you mean " + " or ".join(repr(c) for c in close) + "?"
    return f"; known: {', '.join(known)}" if known else ""


class _NotAChoice(Exception):
    """A value of the right type that is none of a Literal's members."""


def _accepts(value: Any, hint: Any) -> Any:
    """`value` as the annotated type, or `TypeError`. Integers serve as floats, lists (JSON) as tuples."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        exact = [a for a in args if a is type(value)]
        for candidate in exact or args:
            try:
                return _accepts(value, candidate)
            except TypeError:
                continue
        raise TypeError
    if origin is typing.Literal:
        if not any(type(value) is type(a) for a in args):
            raise TypeError
        if value not in args:
            raise _NotAChoice(args)
        return value
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            raise TypeError
        item = args[0] if args else Any
        return tuple(_accepts(v, item) for v in value)
    if origin in (dict, Mapping) or hint in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise TypeError
        return dict(value)
    if hint is Any:
        return value
    if hint is None or hint is type(None):
        if value is not None:
            raise TypeError
        return None
    if hint is bool or isinstance(value, bool):
        if hint is not bool or not isinstance(value, bool):
            raise TypeError
        return value
    if hint is float and isinstance(value, int):
        return float(value)
    if not isinstance(value, hint):
        raise TypeError
    return value


def check_budget(value: Any, name: str = "budget", method: str = "") -> float | int:
    """Validate a budget: int >= 1, or float in (0, 1]."""
    where = f"{method}: " if method else ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidParameter(f"{where}{name}={value!r} must be an int (tokens) or a float in (0, 1]")
    if isinstance(value, int):
        if value < 1:
            raise InvalidParameter(f"{where}{name}={value} must be at least 1 token; a share is written as a "
                                   f"float, e.g. {name}=0.25")  # fmt: skip
    elif not (0.0 < value <= 1.0):
        raise InvalidParameter(f"{where}{name}={value} must lie in (0, 1]; a number of tokens is written as "
                               f"an int, e.g. {name}=512")  # fmt: skip
    return value


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method with its parameters: frozen, comparable, JSON-serialisable. Subclasses carry a `spec`."""

    spec: ClassVar[Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "spec" in cls.__dict__:
            object.__setattr__(cls.__dict__["spec"], "config", cls)

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for f in dataclasses.fields(self):
            value, meta = getattr(self, f.name), f.metadata.get("qkv", {})
            label = f"{self.spec.id}: {f.name}={value!r}"
            if meta.get("budget"):
                check_budget(value, f.name, self.spec.id)
                continue
            try:
                value = _accepts(value, hints[f.name])
            except TypeError:
                raise InvalidParameter(f"{label} must be of type {f.type}, not {type(value).__name__}") from None
            except _NotAChoice as error:
                members = ", ".join(map(repr, error.args[0]))
                raise InvalidParameter(f"{label} must be one of {members}") from None
            object.__setattr__(self, f.name, value)
            for number in value if isinstance(value, tuple) else (value,):
                self._check_number(label, number, meta)
        self.validate()

    @staticmethod
    def _check_number(label: str, value: Any, meta: Mapping[str, Any]) -> None:
        if meta.get("choices") is not None and value not in meta["choices"]:
            raise InvalidParameter(f"{label} must be one of {', '.join(map(repr, meta['choices']))}")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            low, high = meta.get("low"), meta.get("high")
            if math.isnan(value) or (low is not None and value < low) or (high is not None and value > high):
                raise InvalidParameter(f"{label} must lie in [{'-inf' if low is None else low}, "
                                       f"{'inf' if high is None else high}]")  # fmt: skip

    def validate(self) -> None:
        """Checks between parameters; override and raise `InvalidParameter`."""

    @property
    def id(self) -> str:
        """The method's registry name."""
        return self.spec.id

    def settings(self) -> dict[str, Any]:
        """The parameters as a plain dict."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def to_dict(self) -> dict[str, Any]:
        """``{"id": ..., "parameters": {...}}``: what `from_dict` reads."""
        return {"id": self.spec.id, "parameters": self.settings()}

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(self.to_dict(), default=_plain, sort_keys=True)

    def replace(self, **changes: Any) -> Method:
        """A copy with some parameters changed (validated again)."""
        return type(self).create(**(self.settings() | changes))

    @classmethod
    def create(cls, **values: Any) -> Method:
        """Build a configuration; unknown parameters raise `UnknownName` and name the nearest valid ones."""
        names = {f.name for f in dataclasses.fields(cls)}
        for name in values:
            if name not in names:
                known = f" has no parameter {name!r}"
                hint = near(name, names) if names else "; it takes none"
                raise UnknownName(f"{cls.spec.id}{known}{hint}")
        return cls(**values)

    def __str__(self) -> str:
        changed = [f"{f.name}={_quoted(getattr(self, f.name))}" for f in dataclasses.fields(self)
                   if getattr(self, f.name) != f.default]  # fmt: skip
        return self.spec.id + (":" + ",".join(changed) if changed else "")


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, Method):
        return value.to_dict()
    raise TypeError(f"{type(value).__name__} is not plain data")


def _quoted(value: Any) -> Any:
    """A value as `parse_setting` reads it: text with a comma (a nested setting) in quotes."""
    return json.dumps(value) if isinstance(value, str) and "," in value else value


def parse_setting(text: str) -> tuple[str, dict[str, Any]]:
    """``"h2o:budget=0.25,positions=cache"`` -> ``("h2o", {"budget": 0.25, "positions": "cache"})``.

    Values are read as JSON where that works (numbers, true, false, null, lists), else as plain strings. A
    list is written ``[1,2]`` and may contain commas, and so may text in double quotes.
    """
    name, _, rest = text.partition(":")
    out: dict[str, Any] = {}
    for item in _split_commas(rest):
        key, eq, value = item.partition("=")
        if not eq or not key.strip():
            raise InvalidParameter(f"{text!r}: {item!r} is not of the form name=value; write e.g. h2o:budget=0.25")
        if key.strip() in out:
            raise InvalidParameter(f"{text!r} sets {key.strip()!r} twice; give it once")
        out[key.strip()] = _value(value.strip())
    return name.strip(), out


def _split_commas(text: str) -> list[str]:
    out, depth, start, quoted = [], 0, 0, False
    for i, c in enumerate(text):
        quoted ^= c == '"'
        depth += (c in "[{") - (c in "]}")
        if c == "," and depth == 0 and not quoted:
            out.append(text[start:i])
            start = i + 1
    return [x for x in [*out, text[start:]] if x.strip()]


def _value(text: str) -> Any:
    low = text.lower()
    if low in ("true", "false", "none", "null"):
        return {"true": True, "false": False}.get(low)
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # not JSON, an integer of thousands of digits, lists in lists without end
        return text


Sampler = Callable[..., Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a layer stands in a model: what an operator's settings and learnt inputs may depend on.

    layer: its number of `layers`, from 0. heads, kv_heads, key_width, value_width: H, G (0: as many as H), D, E. grid: height
    and width of the tokens of an image, None for a sequence.
    """

    layer: int = 0
    layers: int = 1
    heads: int = 1
    kv_heads: int = 0
    key_width: int = 1
    value_width: int = 1
    grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "kv_heads", self.kv_heads or self.heads)


@dataclass(frozen=True, slots=True, kw_only=True)
class Learnt:
    """How a layer that is trained makes an extra: a projection of the tokens (role ``input``) or a stored tensor.

    axes: which of the extra's alternatives. value: from raw numbers to valid ones, in float32 or wider (None: as they are).
    rank: width of a bottleneck in the projection, 0 for none. start: the raw number to begin with (the projection's bias), or
    a function ``start(place) -> Tensor`` of the whole raw parameter (axes ``s`` and ``w`` need one); None instead of a tensor
    leaves an optional extra out (positions of a grid, where there is none). trained: False for a stored constant. used:
    whether a configuration reads it at all, ``used(settings)``; None: every one does.
    """

    axes: str
    value: Callable[[Any], Any] | None = None
    rank: int = 0
    start: float | Callable[[Place], Any] = 0.0
    trained: bool = True
    used: Callable[[Mapping[str, Any]], bool] | None = None


@dataclass(frozen=True, slots=True)
class Extra:
    """A named extra input of an operator (a gate, a decay, a bias).

    axes: its axes as letters of DESIGN section 2 in lower case (``"h"``, ``"bhn"``, ``"bhnd"``), several
    alternatives separated by ``|``. role: ``parameter`` (learned, shared over the batch), ``input``
    (projected from the tokens) or ``data`` (given). sample: draws a valid value, called with sizes and torch
    keyword arguments. doc: one line, units. required: False when the operator has a default. low, high: valid
    range, inclusive. extremes: constants at the edge of what must still work; the laws fill the input with
    them. differentiable: False for a floating-point input that gets no gradient. An input with a token axis
    (``n`` or ``m``) is filled with 0 at padded positions before use. learnt: how a layer makes it, see `Learnt`.
    """

    axes: str
    sample: Sampler
    role: str = "input"
    doc: str = ""
    required: bool = True
    low: float | None = None
    high: float | None = None
    extremes: tuple[float, ...] = ()
    differentiable: bool = True
    learnt: Learnt | None = None
