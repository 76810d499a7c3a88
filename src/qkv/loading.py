"""`qkv.load`: the one call that needs both a host and a place to get the base model from."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any


def load(path: str | Path, model: Any = None, **options: Any) -> Any:
    """A model as `qkv.save` left it.

    path: the saved folder. model: the base model it was made from, or None to load it by the name in the manifest (a local
    folder, a hub id or ``smollm2``); then `options` are ``dtype`` and ``device``. Nothing in the folder is executed.
    Raises `SavedDataError` for a damaged, foreign or future folder, or another base model; nothing is changed then.
    """
    from qkv.bench.assets import resolve_model
    from qkv.hosts import stack

    return stack.load(path, model, resolve=partial(resolve_model, with_tokenizer=False), **options)
