"""An attention site of a model: where it is, what shape it has, what can be done to it."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qkv.core.cache import Geometry
from qkv.core.errors import InvalidParameter, UnknownName
from qkv.core.spec import near

Where = "str | int | Sequence[int | str] | Callable[[Site], bool]"


@dataclass(frozen=True, slots=True)
class Site:
    """One attention module of a model.

    name: module path. layer: the model's layer number (None outside a stack). role: ``self``, ``cross``, ``encoder`` (a
    bidirectional self-attention). heads, kv_heads, head_dim, value_dim: its geometry. causal: masks the future.
    window: the model's own sliding window in tokens, or None. scale: softmax scale, or None when it is set per call.
    cached: holds keys and values between generation steps. reason: why qkv cannot reach it, or None.
    """

    index: int
    name: str
    layer: int | None
    role: Literal["self", "cross", "encoder"]
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    causal: bool
    window: int | None
    scale: float | None
    cached: bool
    geometry: Geometry
    module: str
    reason: str | None = None

    def __str__(self) -> str:
        shape = f"{self.heads} heads" + ("" if self.kv_heads == self.heads else f" over {self.kv_heads}")
        return f"{self.name} ({self.role}, {shape} x {self.head_dim}{f', window {self.window}' if self.window else ''})"


def choose(sites: Sequence[Site], where: Any) -> list[Site]:
    """The sites that `where` names: ``"all"``, layer numbers, module-name patterns (``"*.3.*"``), or a predicate.

    Raises `UnknownName` for a number or pattern that matches nothing, `InvalidParameter` for another type.
    """
    if callable(where):
        chosen = [s for s in sites if where(s)]
        if not chosen:
            raise UnknownName(f"the predicate `where` chose none of the {len(sites)} attention sites")
        return chosen
    if isinstance(where, str) and where == "all":
        return list(sites)
    items = (
        [where] if isinstance(where, (str, int)) else list(where) if isinstance(where, (Sequence, set, range)) else None
    )
    if not items or any(isinstance(i, bool) or not isinstance(i, (int, str)) for i in items):
        raise InvalidParameter(
            f"where={where!r}: expected 'all', one or more layer numbers, module-name patterns, or a predicate on Site"
        )
    picked: list[Site] = []
    for item in items:
        if isinstance(item, int):
            found = [s for s in sites if s.layer == item]
            known = sorted({s.layer for s in sites if s.layer is not None})
            if not found:
                raise UnknownName(f"there is no attention layer {item}; this model has {_span(known)}")
        else:
            found = [s for s in sites if fnmatch.fnmatchcase(s.name, item)]
            if not found:
                raise UnknownName(f"no attention site matches {item!r}{near(item, [s.name for s in sites])}")
        picked += [s for s in found if s not in picked]
    return sorted(picked, key=lambda s: s.index)


def _span(layers: list[int]) -> str:
    if not layers:
        return "no numbered layers"
    return f"layers {layers[0]} to {layers[-1]}" if len(layers) > 1 else f"layer {layers[0]} only"
