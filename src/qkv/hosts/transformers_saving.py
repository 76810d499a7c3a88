"""Folders of transformers models: the stack of methods with what they built, and filled caches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from qkv.core.errors import InvalidInput, Refused, SavedDataError, StateError
from qkv.core.site import choose
from qkv.core.spec import Method
from qkv.hosts import stack
from qkv.hosts.stack import Entry
from qkv.hosts.transformers_attention import ATTRIBUTE
from qkv.hosts.transformers_cache import SavedCache, cache_manifest, layers_of, refill
from qkv.hosts.transformers_session import Session, fresh_cache, session_of
from qkv.hosts.transformers_stack import convert, enter, judge


def save(model: PreTrainedModel, path: str | Path) -> None:
    """See `qkv.save`."""
    session = session_of(model, "save")
    tensors: dict[str, Tensor] = {}
    for i, entry in enumerate(session.entries):
        if entry.method.spec.kind == "conversion":
            for site in entry.sites:
                module = model.get_submodule(site.name)
                tensors |= {f"{i}/{site.name}/{k}": v for k, v in module.state_dict().items()}
    stack.write_folder(path, _manifest(session), tensors)


def _manifest(session: Session) -> dict[str, Any]:
    """What the model is and what it carries."""
    model = session.model
    return {
        "library": "transformers",
        "stack": [
            {"method": e.method.to_dict(), "sites": [s.name for s in e.sites], "notes": e.notes}
            for e in session.entries
        ],
        "base": {
            "name": session.base or getattr(model.config, "_name_or_path", "") or None,
            "class": type(model).__name__,
            "fingerprint": _base_fingerprint(session),
        },
    }


def save_cache(model: PreTrainedModel, cache: Cache, path: str | Path, input_ids: Tensor | None = None) -> None:
    """See `qkv.hosts.save_cache`."""
    session = session_of(model, "save_cache")
    if cache.__dict__.get(ATTRIBUTE) is not session:
        raise StateError("this cache was not filled under the methods that the model carries now; nothing was written")
    own, tensors = cache_manifest(cache, input_ids)
    stack.write_folder(path, _manifest(session) | own, tensors)


def load_cache(model: PreTrainedModel, path: str | Path) -> SavedCache:
    """See `qkv.hosts.load_cache`."""
    session = session_of(model, "load_cache")
    manifest, tensors = stack.read_folder(path)
    layers_of(manifest, path)  # a folder of another sort is refused before the model is looked at
    here, base = _manifest(session), manifest.get("base")
    if not isinstance(base, dict) or here["base"]["fingerprint"] != base.get("fingerprint"):
        whose = base.get("class") if isinstance(base, dict) else "model"
        raise SavedDataError(
            f"{path} holds the cache of a {whose} with other weights; load it with the model that filled it"
        )
    saved = stack.methods_of(manifest, path)
    if [(m.to_dict(), names) for m, names, _ in saved] != [(e["method"], e["sites"]) for e in here["stack"]]:
        theirs, ours = (", ".join(map(str, x)) for x in ([m for m, _, _ in saved], [e.method for e in session.entries]))
        raise SavedDataError(
            f"{path} was filled under {theirs}; the model carries {ours}, or carries them at other sites"
        )
    cache = fresh_cache(model, int(manifest["seen"]))
    return refill(cache, manifest, tensors, path, next(model.parameters()).device)


def _refuse_unfit(session: Session, method: Method, names: list[str], path: str | Path) -> None:
    """No folder does what `apply` would not: `SavedDataError` for sites that do not exist and methods that do not fit."""
    unknown = sorted(set(names) - {s.name for s in session.sites})
    if unknown:
        raise SavedDataError(f"{path} puts {method} at sites that this model has not: {', '.join(unknown[:3])}")
    refusal = judge(session.model, [method], list(names), session.sites, session).refusal
    if refusal is not None:
        raise SavedDataError(f"{path}: {refusal}")


def _base_fingerprint(session: Session) -> str:
    """The fingerprint of the model without its conversions (modules are put back for the moment)."""
    now = [(parent, child, parent.get_submodule(child)) for parent, child, _ in session.swapped]
    try:
        for parent, child, module in reversed(session.swapped):
            setattr(parent, child, module)
        return stack.fingerprint(session.model)
    finally:
        for parent, child, module in now:
            setattr(parent, child, module)


def restore(
    path: str | Path,
    manifest: dict[str, Any],
    tensors: dict[str, Tensor],
    model: PreTrainedModel | None,
    resolve: Callable[..., Any],
    **options: Any,
) -> PreTrainedModel:
    """See `qkv.load`."""
    if manifest.get("what") == "cache":
        raise SavedDataError(
            f"{path} holds a filled cache, not methods; read it with qkv.hosts.load_cache(model, path)"
        )
    entries = stack.methods_of(manifest, path)
    base = manifest.get("base")
    if not isinstance(base, dict) or not isinstance(base.get("fingerprint"), str):
        raise SavedDataError(f"{path}: the manifest does not say which base model it belongs to")
    if model is None:
        name = base.get("name")
        if not isinstance(name, str) or not name:
            raise SavedDataError(f"{path}: the base model had no name or folder; pass it: qkv.load(path, model=base)")
        model = resolve(name, **options)[0]
    elif options:
        raise InvalidInput(f"unexpected arguments {sorted(options)}: the base model was given")
    assert model is not None
    if ATTRIBUTE in model.__dict__:
        raise Refused("the given model already carries methods; revert it first")
    got = stack.fingerprint(model)
    if got != base["fingerprint"]:
        raise SavedDataError(
            f"{path} was saved on a {base.get('class')} with other weights (fingerprint {base['fingerprint'][:12]}, "
            f"this {type(model).__name__} has {got[:12]}); pass the model it was made from"
        )
    used: set[str] = set()
    session = Session(model)
    try:
        session.install()
        model.__dict__[ATTRIBUTE] = session
        for i, (method, names, notes) in enumerate(entries):
            _refuse_unfit(session, method, names, path)
            if method.spec.kind != "conversion":
                enter(session, method, list(names), None)
                continue
            entry = Entry(method, list(names), choose(session.sites, list(names)), notes)
            prefix = f"{i}/"
            mine = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
            used |= {prefix + k for k in mine}
            convert(session, entry, None, mine)
            session.entries.append(entry)
        left = sorted(set(tensors) - used)
        if left:
            raise SavedDataError(
                f"{path} holds unexpected tensors: {', '.join(left[:3])}{' ...' if len(left) > 3 else ''}"
            )
    except BaseException:
        session.remove()
        raise
    return model
