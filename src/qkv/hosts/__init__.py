"""Putting methods into models of other libraries. Each host file is the only place that knows its library.

These functions pick the host from the model's class and call it; `qkv.apply` and its siblings are these.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qkv.core.errors import InvalidInput
from qkv.core.site import Site
from qkv.core.spec import Method

__all__ = ["applied", "apply", "attending", "observe", "plan", "report", "revert", "save", "sites"]


def _host(model: Any) -> Any:
    """The host module of a model, by the library its class comes from."""
    libraries = [c.__module__.partition(".")[0] for c in type(model).__mro__]
    for library in ("transformers",):
        if library in libraries:
            return importlib.import_module(f"qkv.hosts.{library}")
    raise InvalidInput(
        f"qkv has no host for {type(model).__module__}.{type(model).__qualname__}: expected a model of "
        "transformers (a PreTrainedModel)"
    )


def sites(model: Any) -> list[Site]:
    """Every attention site of the model with its geometry, in execution order of its layers."""
    return _host(model).sites(model)


def plan(model: Any, *methods: Method | str, where: Any = "all") -> Any:
    """What `apply` would do, without doing it: which sites accept, which refuse and why. Prints as a table."""
    return _host(model).plan(model, *methods, where=where)


def apply(model: Any, *methods: Method | str, where: Any = "all", data: Any = None, graph: bool = False) -> Any:
    """Put an ordered stack of methods into the model, in place; returns the same object.

    methods: configurations or settings (``"h2o:budget=0.25"``). where: ``"all"``, layer numbers, module-name patterns or a
    predicate on `Site`. data: model inputs (dicts of tensors) for methods that calibrate or learn. graph: run decoding
    steps as CUDA graphs. After it, plain ``model.generate(...)`` uses the methods. Raises `Refused` (nothing changed) when a
    method or a pair does not fit.
    """
    return _host(model).apply(model, *methods, where=where, data=data, graph=graph)


def revert(model: Any) -> Any:
    """Take everything out again: same modules, same state_dict, same outputs, bit for bit."""
    return _host(model).revert(model)


@contextmanager
def applied(
    model: Any, *methods: Method | str, where: Any = "all", data: Any = None, graph: bool = False
) -> Iterator[Any]:
    """`apply` for the length of a ``with`` block; reverted also when it raises."""
    apply(model, *methods, where=where, data=data, graph=graph)
    try:
        yield model
    finally:
        revert(model)


def report(model: Any) -> Any:
    """What the applied methods did since `apply`: calls, bytes held against full, tokens kept, per site and in all.

    Raises `NotApplied`, and `NeverFired` when a site was never called.
    """
    return _host(model).report(model)


@contextmanager
def observe(model: Any, callback: Any, where: Any = "all") -> Iterator[Any]:
    """Call ``callback(site, call)`` after every attention of the chosen sites; changes no output bit. For probes.

    `call` has q, k, v, mask, causal, scale and out, as in `qkv.core.cache.Compute`.
    """
    with _host(model).observe(model, callback, where=where):
        yield model


@contextmanager
def attending(model: Any, function: Any, where: Any = "all") -> Iterator[list[Site]]:
    """Run ``function(site, q, k, v, scale=...) -> out`` as the attention of the chosen sites; gives those sites.

    For generation loops that keep keys and values of their own: call the model with ``use_cache=False``; masks are the
    function's concern. q ``[B, H, N, D]`` and k ``[B, G, N, D]`` are rotated as the model rotates them, v ``[B, G, N, E]``, out
    ``[B, H, N, E]``. Raises `Refused` at a site that cannot be reached, or that carries a method which would be bypassed.
    """
    with _host(model).attending(model, function, where=where) as chosen:
        yield chosen


def save(model: Any, path: str | Path) -> None:
    """Write the applied stack to a folder: a manifest and the tensors that differ from the base model (atomic)."""
    _host(model).save(model, path)
