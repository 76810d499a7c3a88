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

__all__ = [
    "applied", "apply", "attending", "carried", "fresh_cache", "load_cache", "observe", "plan", "report", "revert", "save",
    "save_cache", "sites",
]  # fmt: skip


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


def carried(model: Any) -> list[tuple[Method, list[str]]]:
    """The methods that `model` carries, in the order they were applied, with the names of their sites; [] for a plain model."""
    return _host(model).carried(model)


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


def fresh_cache(model: Any, prompt: int, *, room: int = 0, record: bool = False) -> Any:
    """An empty cache for a generation loop of one's own, as ``generate`` would make it under the applied methods.

    prompt: its columns, padding included (what is compressed at once). room: columns to reserve, 0 for none. record: every
    later block is provisional until ``crop(-n)``, which takes back its newest n tokens and settles the others.
    """
    return _host(model).fresh_cache(model, prompt, room=room, record=record)


def save_cache(model: Any, cache: Any, path: str | Path, input_ids: Any = None) -> None:
    """Write a filled cache (``past_key_values``) with the methods that filled it to a folder (atomic).

    input_ids ``[B, seen]``: kept beside it when given, so that a later run can go on with another question:
    ``model.generate(torch.cat((saved.input_ids, question), 1), past_key_values=saved.cache)``. Raises `StateError` (an empty
    cache, or one that other methods filled), `Refused`, `SavedDataError`.
    """
    _host(model).save_cache(model, cache, path, input_ids)


def load_cache(model: Any, path: str | Path) -> Any:
    """A cache saved by `save_cache`, ready to go on: ``(cache, input_ids)``.

    The model must carry the same methods at the same sites and have the weights that filled it; `SavedDataError` says what
    differs. The folder can be loaded many times: each time a copy.
    """
    return _host(model).load_cache(model, path)
