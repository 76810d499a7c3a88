"""Finds methods by folder: one file is one method, named by its id (``-`` becomes ``_``); no list to edit."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from qkv.core.errors import InvalidParameter, SavedDataError, UnknownName
from qkv.core.spec import KINDS, Method, Spec, near, parse_setting

PACKAGES = (
    "qkv.ops", "qkv.patterns", "qkv.caches", "qkv.layers", "qkv.convert", "qkv.distill.objectives",
    "qkv.probes", "qkv.steer", "qkv.decode", "qkv.models", "qkv.cost",
)  # fmt: skip


@cache
def _files() -> dict[str, str]:
    """Method id -> module name, from file names alone (nothing is imported)."""
    out: dict[str, str] = {}
    for package in PACKAGES:
        base = importlib.util.find_spec(package)
        if base is None or base.submodule_search_locations is None:
            continue
        for info in pkgutil.iter_modules(base.submodule_search_locations):
            if info.name.startswith("_") or info.ispkg:
                continue
            name = info.name.replace("_", "-")
            if name in out:
                raise ImportError(f"two files claim the method id {name!r}: {out[name]} and {package}.{info.name}")
            out[name] = f"{package}.{info.name}"
    return out


def _method_class(module: ModuleType) -> type[Method]:
    found = [
        x for x in vars(module).values()
        if isinstance(x, type) and issubclass(x, Method) and x.__module__ == module.__name__
        and "spec" in x.__dict__
    ]  # fmt: skip
    if len(found) != 1:
        names = ", ".join(c.__name__ for c in found) or "none"
        raise ImportError(f"{module.__name__} must define one method class with a `spec`; found: {names}")
    return found[0]


@cache
def config_class(name: str) -> type[Method]:
    """The configuration class of a method id; `UnknownName` names the nearest ids."""
    files = _files()
    if name not in files:
        raise UnknownName(f"there is no method {name!r}{near(name, files)} (`qkv methods` lists all)")
    cls = _method_class(importlib.import_module(files[name]))
    if cls.spec.id != name:
        raise ImportError(f"{files[name]} declares the id {cls.spec.id!r}; its file name says {name!r}")
    return cls


def ids() -> list[str]:
    """Every method id, sorted."""
    return sorted(_files())


def methods(kind: str | None = None) -> list[Spec]:
    """Every method's specification, sorted by kind and id. kind: one of `KINDS`, or None for all."""
    if kind is not None and kind not in KINDS:
        raise UnknownName(f"there is no kind {kind!r}{near(kind, KINDS)}")
    specs = [config_class(name).spec for name in ids()]
    return sorted((s for s in specs if kind in (None, s.kind)), key=lambda s: (KINDS.index(s.kind), s.id))


def method(name: str | Method, /, **parameters: Any) -> Any:
    """A frozen configuration of the method `name` (an instance of its class, so of its kind).

    `name` may carry settings in the command line's form (``"h2o:budget=0.25"``); keyword parameters win over
    them. Raises `UnknownName` (with the nearest valid names) and `InvalidParameter`.
    """
    if isinstance(name, Method):
        return name.replace(**parameters) if parameters else name
    if not isinstance(name, str):
        raise InvalidParameter(f"a method is named by a string such as 'h2o', not by {type(name).__name__}")
    ident, settings = parse_setting(name)
    return config_class(ident).create(**(settings | parameters))


def from_dict(data: Any) -> Method:
    """Rebuild a method from `Method.to_dict` (nested methods included)."""
    if not isinstance(data, dict) or not isinstance(data.get("id"), str):
        raise SavedDataError(f"a saved method needs an 'id' and 'parameters'; got {str(data)[:80]!r}")
    values = data.get("parameters", {})
    if not isinstance(values, dict) or not all(isinstance(k, str) for k in values):
        raise SavedDataError(f"{data['id']}: 'parameters' must be an object; got {type(values).__name__}")
    return method(data["id"], **{name: _nested(value) for name, value in values.items()})


def _nested(value: Any) -> Any:
    return from_dict(value) if isinstance(value, dict) and set(value) == {"id", "parameters"} else value


def load_file(path: str | Path) -> type[Method]:
    """The method class of a file of the user's own (``qkv verify ./mine.py``). The file is executed."""
    path = Path(path).resolve()
    if not path.is_file():
        raise UnknownName(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"qkv_user_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return _method_class(module)
