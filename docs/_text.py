"""Pieces of pages: cells, numbers, tables, figures, and where a figure was taken."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

MISSING = "–"


def prose(text: str) -> str:
    """Text that holds no tag."""
    return text.replace("<", "&lt;")


def cell(text: str) -> str:
    """Text as one cell of a table."""
    return prose(" ".join(text.split())).replace("|", "\\|")


def number(value: Any, digits: int = 4) -> str:
    """A value as a cell: so many significant digits, whole numbers of a float without an exponent."""
    if value is None:
        return MISSING
    if isinstance(value, float):
        if math.isfinite(value) and abs(value) >= 10**digits:
            return f"{value:.0f}" if abs(value) < 1e7 else f"{value:.{digits - 1}e}"
        return f"{value:.{digits}g}"
    return cell(str(value))


def fixed(value: float | None, form: str, scale: float = 1.0) -> str:
    """A number in a given form, or a dash."""
    return MISSING if value is None else format(value * scale, form)


def times(value: float | None) -> str:
    """A ratio: 1.84x as ``1.84×``."""
    return MISSING if value is None else f"{value:.2f}×" if value < 99.5 else f"{value:.0f}×"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> list[str]:
    """A table, numbers aligned to the right; columns in which every row has a dash are left out."""
    rows = [list(r) for r in rows]
    used = [i for i in range(len(columns)) if i < text_columns or any(r[i] != MISSING for r in rows)]
    rule = "|" + "|".join("---" if i < text_columns else "---:" for i in used) + "|"
    return (
        ["| " + " | ".join(line[i] for i in used) + " |" for line in (columns,)]
        + [rule]
        + ["| " + " | ".join(line[i] for i in used) + " |" for line in rows]
    )


def folded(title: str, body: Sequence[str]) -> list[str]:
    """Lines that open on a click."""
    return ['<details markdown="1">', f"<summary>{prose(title)}</summary>", "", *body, "", "</details>", ""]


def picture(name: str, words: str) -> list[str]:
    """A figure of the folder `figures`, with what it shows in words."""
    return [f"![{words.replace('[', '(').replace(']', ')')}](figures/{name})", ""]


def shell(*lines: str) -> list[str]:
    """Commands."""
    return ["```sh", *lines, "```", ""]


def commit(value: dict[str, Any] | None) -> str:
    """A commit in words."""
    if value is None:
        return "commit not recorded"
    return f"commit {value['hash'][:7]}" + (" with uncommitted changes" if value["dirty"] else "")


def where(facts: dict[str, Any], gpu: bool = True) -> str:
    """Machine, versions, seed and commit of a result file, as a sentence."""
    machine, versions = facts["machine"], facts["versions"]
    chips = ", ".join(g["name"] for g in machine.get("gpus") or ()) if gpu else ""
    names = ("torch", "triton", "transformers") if chips else ("torch", "transformers")
    said = ", ".join(f"{n} {versions[n]}" for n in names if versions.get(n))
    place = chips or f"{machine['cpu']} ({machine['threads']} threads)"
    return f"{place}, {said}, seed {facts.get('seed')}, {commit(facts.get('commit'))}."
