"""What a method showed on a real model or real data, kept as one JSON file per method.

A record is the evidence behind a claim: figures with units, the command that made them, machine, versions, commit, seed
and date. The method pages of the documentation are made from these files, so a page never says more than was measured.

    {"id": "h2o",
     "claim": "at a 20 % budget far closer to the full model than a 20 % window",
     "figures": [{"name": "KL, budget 0.2", "value": 0.031, "unit": "nats/token", "note": "4k tokens"}],
     "command": "qkv bench smollm2 -m h2o:budget=0.2 --tasks kl",
     "machine": {...}, "versions": {...}, "commit": {...} or null, "seed": 0, "date": "2026-11-22",
     "table": [{"budget": 0.2, "KL": 0.031}, ...]}            (optional: rows with the same columns)
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qkv.bench.environment import environment, read_json, write_json
from qkv.core.errors import InvalidInput, SavedDataError

FOLDER = Path("benchmarks/results/real")


@dataclass(frozen=True, slots=True)
class Figure:
    """One number: what it measures, its unit (empty for a ratio or a count), and what a reader must know about it."""

    name: str
    value: float | int | str | bool
    unit: str = ""
    note: str = ""


def record(
    id: str,
    *,
    claim: str,
    figures: Sequence[Figure],
    command: str,
    seed: int | None,
    table: Sequence[Mapping[str, Any]] = (),
    folder: str | Path = FOLDER,
) -> Path:
    """Write ``folder/<id>.json`` for the run that just ended and return its path.

    claim: the sentence that the figures support or refute. command: what a reader types to get them again. seed: of the
    run, None where nothing is random. table: more rows, all with the same columns.
    Raises `InvalidInput` (no figures, uneven table, empty claim or command) and `StorageError`.
    """
    data: dict[str, Any] = {
        "id": id,
        "claim": claim,
        "figures": [{"name": f.name, "value": f.value, "unit": f.unit, "note": f.note} for f in figures],
        "command": command,
        **environment(seed=seed),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }
    if table:
        data["table"] = [dict(row) for row in table]
    problem = _problem(data)
    if problem:
        raise InvalidInput(f"the record of {id!r}: {problem}")
    return write_json(Path(folder) / f"{id}.json", data)


def read_records(folder: str | Path = FOLDER) -> dict[str, dict[str, Any]]:
    """Every record of a folder by method id. Raises `SavedDataError` for one that is damaged or incomplete."""
    out = {}
    for path in sorted(Path(folder).glob("*.json")):
        data = read_json(path)
        problem = _problem(data)
        if not problem and data["id"] != path.stem:
            problem = f"its id is {data['id']!r}; the file name says {path.stem!r}"
        if problem:
            raise SavedDataError(f"{path}: {problem}")
        out[path.stem] = data
    return out


_TYPES: dict[str, tuple[type, ...]] = {
    "id": (str,), "claim": (str,), "figures": (list,), "command": (str,), "machine": (dict,), "versions": (dict,),
    "commit": (dict, type(None)), "seed": (int, type(None)), "date": (str,),
}  # fmt: skip


def _problem(data: Any) -> str | None:
    """What is wrong with a record, or None."""
    if not isinstance(data, dict):
        return f"a record is an object, not {type(data).__name__}"
    for name, types in _TYPES.items():
        if name not in data:
            return f"{name!r} is missing"
        if not isinstance(data[name], types):
            return f"{name!r} is {type(data[name]).__name__}, not {' or '.join(t.__name__ for t in types)}"
    unknown = set(data) - set(_TYPES) - {"table"}
    if unknown:
        return f"unknown entries {sorted(unknown)}"
    if not data["claim"].strip() or not data["command"].strip() or not data["figures"]:
        return "it needs a claim, a command and at least one figure"
    for f in data["figures"]:
        if not isinstance(f, dict) or set(f) != {"name", "value", "unit", "note"} or not f["name"]:
            return f"a figure has name, value, unit and note; got {f!r}"
        if not isinstance(f["value"], (int, float, str)):
            return f"the value of {f['name']!r} must be a number or a word, not {type(f['value']).__name__}"
    table = data.get("table", [])
    if not isinstance(table, list) or any(not isinstance(r, dict) or list(r) != list(table[0]) for r in table):
        return "'table' must be a list of rows with the same columns in the same order"
    return None
