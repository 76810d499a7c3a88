"""What conversions check of a saved folder before they build from it: its notes, its names, its sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from qkv.core.errors import SavedDataError
from qkv.core.site import Site


def noted(who: str, sites: Sequence[Site], tensors: Mapping[str, Tensor], notes: Any) -> Mapping[str, Any]:
    """The notes of every site by name; `SavedDataError` when notes or tensors are of other sites than these."""
    names = [s.name for s in sites]
    facts = notes.get("sites") if isinstance(notes, Mapping) else None
    if not isinstance(facts, Mapping) or set(facts) != set(names):
        raise SavedDataError(f"{who}: the notes do not describe the converted sites {', '.join(names[:3])}")
    left = sorted(k for k in tensors if k.rpartition("/")[0] not in names)
    if left:
        raise SavedDataError(f"{who}: unexpected tensors: {', '.join(left[:3])}")
    return facts


def saved(
    who: str, site: str, tensors: Mapping[str, Tensor], sizes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """The tensors of one site by their names in the module; `SavedDataError` unless they are floating point of these sizes."""
    prefix = f"{site}/"
    mine = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
    if set(mine) != set(sizes):
        odd = sorted(set(mine) ^ set(sizes))
        raise SavedDataError(f"{who}: {site}: missing or unexpected tensors: {', '.join(odd[:3])}")
    for name, size in sizes.items():
        if tuple(mine[name].shape) != tuple(size) or not mine[name].is_floating_point():
            got = f"{mine[name].dtype} {tuple(mine[name].shape)}"
            raise SavedDataError(f"{who}: {site}/{name} is {got}, expected floating point {tuple(size)}")
    return mine
