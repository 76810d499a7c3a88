"""Rows put side by side: one record per method and context, with every number also as a share of `full`'s."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text


@dataclass
class Record:
    """What is known about one method at one context. Missing numbers are None; `errors` says why.

    Times are medians. ppl_ratio, first_ratio, token_ratio: against `full` in the same run. held_ratio, read_ratio: against
    the bytes that a plain cache of the same tokens holds.
    """

    method: str
    kind: str
    context: int
    kl: float | None = None
    top1: float | None = None
    ppl: float | None = None
    ppl_ratio: float | None = None
    ppl_prefill: float | None = None
    ppl_prefill_ratio: float | None = None
    accuracy: float | None = None
    agreement: float | None = None
    cells: list[dict[str, Any]] = field(default_factory=list)
    kl_by_position: list[float] = field(default_factory=list)
    first_s: float | None = None
    first_spread: tuple[float, float] | None = None
    first_ratio: float | None = None
    token_ms: float | None = None
    token_spread: tuple[float, float] | None = None
    token_ratio: float | None = None
    peak_bytes: float | None = None
    held_bytes: int | None = None
    full_bytes: int | None = None
    held_ratio: float | None = None
    read_bytes: int | None = None
    read_ratio: float | None = None
    setup_s: float | None = None
    errors: list[str] = field(default_factory=list)


LONG = 40
"""Characters of a list in a label that are shown."""

_QUALITY = ("kl", "top1", "ppl", "ppl_prefill", "accuracy", "agreement", "cells", "kl_by_position")


def brief(label: str) -> str:
    """A label to be read: of a list too long for a table stand four digits of its hash, which tell two of them apart."""
    out, at = [], 0
    for found in re.finditer(r"=(?=\[)", label):
        start = found.end()
        if start < at:
            continue
        try:
            stop = json.JSONDecoder().raw_decode(label, start)[1]
        except ValueError:  # a text that begins with a bracket, not a list
            continue
        if stop - start > LONG:
            digits = hashlib.blake2b(label[start:stop].encode(), digest_size=2).hexdigest()
            out += [label[at:start], f"[…{digits}]"]
            at = stop
    return "".join([*out, label[at:]])


def records(rows: Iterable[dict[str, Any]]) -> list[Record]:
    """One record per method and context, in order of first appearance by method, then context."""
    found: dict[tuple[str, int], Record] = {}
    sources: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for row in rows:
        at = (brief(row["method"]["label"]), row["context"])
        record = found.setdefault(at, Record(at[0], row["kind"], at[1]))
        if row["status"] == "error":
            record.errors.append(f"{row['task']}: {row['error']['type']}: {row['error']['message']}")
            continue
        for name in _QUALITY:
            if name in row["metrics"]:
                setattr(record, name, row["metrics"][name])
        sources.setdefault(at, {})[row["task"]] = row["cost"]
    for at, costs in sources.items():
        _add_cost(found[at], next((costs[t] for t in ("ppl", "kl") if t in costs), next(iter(costs.values()))))
    for record in found.values():
        _compare(record, found.get(("full", record.context)))
    names = list(dict.fromkeys(r.method for r in found.values()))
    return sorted(found.values(), key=lambda r: (names.index(r.method), r.context))


def _add_cost(record: Record, cost: dict[str, Any]) -> None:
    first, token, peak = cost.get("first_token_s"), cost.get("token_ms"), cost.get("peak_bytes")
    if first:
        record.first_s, record.first_spread = first["median"], (first["low"], first["high"])
    if token:
        record.token_ms, record.token_spread = token["median"], (token["low"], token["high"])
    record.peak_bytes = peak["median"] if peak else None
    record.held_bytes, record.full_bytes = cost.get("held_bytes"), cost.get("full_bytes")
    record.read_bytes, record.setup_s = cost.get("read_bytes"), cost.get("setup_s")


def _compare(record: Record, full: Record | None) -> None:
    record.held_ratio = _ratio(record.held_bytes, record.full_bytes)
    record.read_ratio = _ratio(record.read_bytes, record.full_bytes)
    if full is not None:
        record.ppl_ratio = _ratio(record.ppl, full.ppl)
        record.ppl_prefill_ratio = _ratio(record.ppl_prefill, full.ppl_prefill)
        record.first_ratio = _ratio(record.first_s, full.first_s)
        record.token_ratio = _ratio(record.token_ms, full.token_ms)


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


# -- numbers as text --------------------------------------------------------------------------------------------------


def number(x: float | None, digits: int = 3) -> str:
    """`x` with so many significant digits, or a dash."""
    if x is None:
        return "–"
    if x != x:
        return "nan"
    if abs(x) < 5e-7:
        return "0"
    if abs(x) >= 10**digits:
        return f"{x:.0f}" if abs(x) < 1e6 else f"{x:.1e}"
    return f"{x:#.{digits}g}".rstrip(".")


def share(x: float | None) -> str:
    """`x` in per cent, or a dash."""
    return "–" if x is None else f"{100 * x:.1f} %" if x < 0.0995 else f"{100 * x:.0f} %"


def size(x: float | None) -> str:
    """Bytes in MB (10^6), kB or GB, or a dash."""
    if x is None:
        return "–"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(x) >= scale:
            return f"{number(x / scale)} {unit}"
    return f"{x:.0f} B"


def seconds(x: float | None) -> str:
    """A time in s or ms, or a dash."""
    return "–" if x is None else f"{number(x)} s" if x >= 1 else f"{number(1e3 * x)} ms"


COLUMNS = (
    ("KL\nnats", "KL(unmodified || method) of the next-token distributions, mean, in nats"),
    ("top-1\n%", "tokens after which both would choose the same next token"),
    ("ppl\n", "perplexity of the continuation, and as a multiple of full's"),
    ("prefill\nppl ×", "perplexity of the last prompt tokens as the prefill predicts them, as a multiple of full's"),
    ("passkey %\nright/same", "right answers, and answers that equal the unmodified model's"),
    ("first token\ns", "time to the first token (prefill), median, and as a multiple of full's"),
    ("per token\nms", "time per decoded token, median, and as a multiple of full's"),
    ("cache\nMB", "cache bytes really held at the end, and as a share of a plain cache of the same tokens"),
    ("read\nMB", "cache bytes that one decoding step reads"),
    ("peak\nMB", "peak memory on top of what was held before (weights are not counted)"),
)
"""Short name (with its unit) and meaning of each column of the table."""


def cells(r: Record) -> list[str]:
    """The texts of a record under `COLUMNS`."""
    passkey = "–" if r.accuracy is None or r.agreement is None else f"{100 * r.accuracy:.0f}/{100 * r.agreement:.0f}"
    return [
        number(r.kl),
        "–" if r.top1 is None else f"{100 * r.top1:.0f}",
        _against(number(r.ppl), r.ppl_ratio),
        "–"
        if r.ppl_prefill is None
        else number(r.ppl_prefill)
        if r.ppl_prefill_ratio is None
        else f"{r.ppl_prefill_ratio:.2f}",
        passkey,
        _against(number(r.first_s), r.first_ratio),
        _against(number(r.token_ms), r.token_ratio),
        _megabytes(r.held_bytes) + ("" if r.held_ratio is None else f" {100 * r.held_ratio:.0f}%"),
        _megabytes(r.read_bytes),
        _megabytes(r.peak_bytes),
    ]


def _megabytes(x: float | None) -> str:
    return "–" if x is None else number(x / 1e6)


def _against(text: str, ratio: float | None) -> str:
    return text if ratio is None else f"{text} ×{ratio:.2f}" if ratio < 99.5 else f"{text} ×{number(ratio)}"


QUALITY = range(5)
COST = range(5, len(COLUMNS))


def tables(found: Sequence[Record], width: int = 120) -> list[Table]:
    """Tables for the terminal, one per context (two where `width` is small), methods from the best KL (or perplexity) down."""
    out = []
    for context in sorted({r.context for r in found}):
        here = sorted((r for r in found if r.context == context), key=order)
        used = [i for i in range(len(COLUMNS)) if any(not cells(r)[i].startswith("–") for r in here)]
        title = f"{context} tokens of context"
        if width >= 96 + _name_width(here):
            out.append(_table(title, here, used, _name_width(here)))
        else:
            name = max(20, min(_name_width(here), width - 50))
            out.append(_table(f"{title}: quality", here, [i for i in used if i in QUALITY], name))
            out.append(_table(f"{title}: cost", here, [i for i in used if i in COST], name))
    return out


def _name_width(found: Sequence[Record]) -> int:
    """Columns that the longest name needs, within reason."""
    return min(34, max(len(r.method) + (8 if r.errors else 0) for r in found))


def _table(title: str, found: Sequence[Record], columns: Sequence[int], name_width: int) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("method", overflow="fold", min_width=name_width, max_width=name_width)
    for i in columns:
        table.add_column(COLUMNS[i][0], justify="right", no_wrap=True)
    for r in found:
        name = Text(r.method)
        if r.errors:
            name.append(" (error)", style="red")
        table.add_row(name, *(cells(r)[i] for i in columns))
    return table


def order(r: Record) -> tuple[bool, bool, float, str]:
    """Sort key: `full` first, then by KL, else by perplexity; failed methods last."""
    quality = r.kl if r.kl is not None else r.ppl
    return (r.method != "full", quality is None, quality if quality is not None else 0.0, r.method)
