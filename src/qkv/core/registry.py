"""Finds methods by folder: one file is one method, named by its id (``-`` becomes ``_``); no list to edit."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from qkv.core.errors import InvalidInput, InvalidParameter, QKVError, SavedDataError, UnknownName
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
        if name.endswith(".py"):
            raise UnknownName(
                f"{name!r} is a file, not the id of a method: `qkv verify` and `qkv show` take files, and in Python "
                "qkv.core.registry.load_file gives its class; moved into the package of its kind it goes by its id"
            )
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
    """The method class of a file of the user's own (``qkv verify ./mine.py``). The file is executed.

    Raises `UnknownName` (no such file) and `InvalidInput` (a file that does not run, or defines no method as they are written).
    """
    path = Path(path).resolve()
    if not path.is_file():
        raise UnknownName(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"qkv_user_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InvalidInput(f"{path} is no Python file; a method's file ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except QKVError:
        raise
    except Exception as error:
        raise InvalidInput(f"{path} does not run: {type(error).__name__}: {error}") from error
    try:
        cls = _method_class(module)
    except ImportError as error:
        raise InvalidInput(str(error).replace(module.__name__, path.name, 1)) from error
    return _of_its_own(cls, path)


def _of_its_own(cls: type[Method], path: Path) -> type[Method]:
    """A user's class, checked for what the registry would refuse once the file lies in its package."""
    name, frozen = cls.spec.id, getattr(cls.__dict__.get("__dataclass_params__"), "frozen", False)
    if not frozen:
        raise InvalidInput(
            f"{path.name}: {cls.__name__} must be a frozen dataclass; write @dataclass(frozen=True, kw_only=True) above it"
        )
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", str(name)):
        raise InvalidInput(f"{path.name}: the id {name!r} must be words of a-z and 0-9 joined by '-', e.g. 'my-cache'")
    return cls
