"""The report of a run as one HTML file: no script, no request, readable on a phone and in the dark.

Everything that comes from models, prompts, file names or users reaches the page through autoescaping.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeGuard

import jinja2
from markupsafe import Markup, escape

import qkv
from qkv.bench import _charts as charts
from qkv.bench import summary
from qkv.bench._charts import Series
from qkv.bench.environment import plain, read_json, read_jsonl, write_text
from qkv.bench.run import Results
from qkv.bench.summary import Record
from qkv.bench.tasks import task
from qkv.core.errors import SavedDataError

KL_FLOOR = 1e-4
"""Divergences below this (rounding) are drawn at it."""
SMOOTH = 8
"""Neighbouring decoding steps averaged in the curve over position."""


def read(folder: str | Path) -> Results:
    """A run from its folder, whole or not."""
    folder = Path(folder)
    manifest = read_json(folder / "run.json")
    if not isinstance(manifest, dict) or not isinstance(manifest.get("identity"), dict):
        raise SavedDataError(f"{folder} holds no run of qkv bench")
    rows: dict[str, dict[str, Any]] = {}
    for row in read_jsonl(folder / "results.jsonl"):
        rows.setdefault(row["key"], row)
    return Results(folder, manifest, list(rows.values()))


def write(results: Results, path: str | Path | None = None) -> Path:
    """Write the report, by default ``report.html`` in the run's folder; whole or not at all."""
    return write_text(Path(path) if path is not None else results.folder / "report.html", html(results))


def html(results: Results) -> str:
    """The page."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["breakable"] = _breakable
    source = resources.files("qkv.bench").joinpath("report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(_facts(results))


def _breakable(text: str) -> Markup:
    """`text`, escaped, with places where a narrow column may break it."""
    return Markup(re.sub(r"([:,+=])", r"\1<wbr>", str(escape(text))))


def _facts(results: Results) -> dict[str, Any]:
    identity = results.manifest["identity"]
    found = summary.records(results.rows)
    labels = [summary.brief(m["label"]) for m in identity["methods"]]
    numbers = {name: i for i, name in enumerate(labels)}
    contexts = sorted({r.context for r in found})
    last = results.rows[-1]["environment"] if results.rows else None
    by_kl = any(r.kl is not None for r in found)
    return {
        "colours_css": charts.COLOURS_CSS,
        "chart_css": charts.CHART_CSS,
        "model": identity["model"],
        "methods": [
            {
                "label": name,
                "badge": charts.badge(numbers[name]),
                "json": json.dumps(m["stack"], sort_keys=True),
            }
            for name, m in zip(labels, identity["methods"], strict=True)
        ],
        "contexts": identity["contexts"],
        "tasks": identity["tasks"],
        "place": place(identity),
        "started": str(results.manifest.get("started", ""))[:10],
        "errors": [
            {"method": summary.brief(r["method"]["label"]), "context": r["context"], "task": r["task"], **r["error"]}
            for r in results.errors
        ],
        "planned": len(identity["methods"]) * len(identity["contexts"]) * len(identity["tasks"]),
        "frontiers": _frontiers(found, numbers, contexts[-1:], by_kl, every=True),
        "more_frontiers": _frontiers(found, numbers, contexts[:-1], by_kl, every=False),
        "quality_says": _quality_says(by_kl),
        "tables": [_table(found, numbers, c) for c in contexts],
        "columns": [{"name": n.replace("\n", ", ").strip(", "), "says": s} for n, s in summary.COLUMNS],
        "curves": _curves(found, numbers, contexts),
        "maps": _maps(found, numbers, labels),
        "passkey_says": task("passkey").says,
        "answers": [
            {"label": r.method, "context": r.context, "depth": f"{100 * c['depth']:.0f}%"}
            | {k: c[k] for k in ("key", "answer", "full_answer")}
            for r in found
            for c in r.cells
        ],
        "protocols": [_protocol(name, results.rows) for name in identity["tasks"]],
        "text": _text(identity["text"]),
        "environment": _environment(identity, last),
        "command": results.manifest.get("command", ""),
        "version": qkv.__version__,
    }


def place(identity: dict[str, Any]) -> str:
    """The chip that a run was taken on, from its machine and its model's device."""
    machine = identity["machine"]
    if identity["model"]["device"] == "cuda" and machine["gpus"]:
        return machine["gpus"][0]["name"]
    return f"{machine['cpu']} ({machine['threads']} threads)"


def _text(text: dict[str, Any]) -> str:
    return f"{text['name']}, {text['characters']} characters, sha256 {text['sha256'][:16]}"


def _environment(identity: dict[str, Any], environment: dict[str, Any] | None) -> list[tuple[str, str]]:
    machine, versions = identity["machine"], identity["versions"]
    out = [("Processor", f"{machine['cpu']}, {machine['threads']} threads")]
    for gpu in machine["gpus"]:
        out.append(("GPU", f"{gpu['name']}, {summary.size(gpu['memory_bytes'])}"))
    if environment is not None:
        out.append(("Memory", summary.size(environment["machine"].get("memory_bytes"))))
        versions = versions | environment["versions"]
        commit = environment.get("commit")
        if commit:
            out.append(("Commit", commit["hash"][:12] + (" with uncommitted changes" if commit["dirty"] else "")))
    out += [(name, str(version)) for name, version in versions.items() if version is not None]
    model = identity["model"]
    out.append(("Model", f"{model['name']} ({model['class']}), weights {model['fingerprint'][:16]}"))
    out.append(("Seed", str(identity["settings"]["seed"])))
    return out


def _protocol(name: str, rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    one = task(name)
    parameters = next((r["parameters"] for r in rows if r["task"] == name), {})
    said = ", ".join(f"{k} {json.dumps(plain(v))}" for k, v in parameters.items())
    return {"title": one.title, "says": one.says, "parameters": f"({said})" if said else ""}


def _quality_says(by_kl: bool) -> str:
    if by_kl:
        return "Quality loss is the KL divergence of the next-token distributions from the unmodified model's, in nats."
    return "Quality loss is perplexity as a multiple of the unmodified model's."


Get = Callable[[Record], float | None]


def _finite(x: float | None) -> TypeGuard[float]:
    return x is not None and math.isfinite(x)


def _frontiers(
    found: Sequence[Record], numbers: dict[str, int], contexts: Sequence[int], by_kl: bool, every: bool
) -> list[dict[str, Any]]:
    loss: Get = (lambda r: r.kl) if by_kl else (lambda r: r.ppl_ratio)
    costs: list[tuple[str, Get]] = [("cache bytes held, share of full", lambda r: r.held_ratio)]
    if every:
        costs += [
            ("time to first token, share of full", lambda r: r.first_ratio),
            ("time per token, share of full", lambda r: r.token_ratio),
        ]
    out = []
    for context in contexts:
        for text, get in costs:
            series = []
            for r in found:
                x, y = get(r), loss(r)
                if r.context == context and _finite(x) and _finite(y):
                    series.append(Series(numbers[r.method], r.method, [(x, y)]))
            if series:
                title = f"{text.split(',')[0].capitalize()} at {context} tokens"
                y_text = "KL, nats" if by_kl else "perplexity / full's"
                floor = KL_FLOOR if by_kl else None
                out.append({"title": title, "svg": charts.frontier(title, series, text, y_text, floor=floor)})
    return out


def _curves(found: Sequence[Record], numbers: dict[str, int], contexts: Sequence[int]) -> list[dict[str, Any]]:
    wanted: list[tuple[str, str, Get, dict[str, Any]]] = [
        ("KL to the unmodified model", "KL, nats", lambda r: r.kl, {"y_log": True, "floor": KL_FLOOR}),
        ("Perplexity", "perplexity", lambda r: r.ppl, {"y_log": True}),
        ("Time to first token", "seconds", lambda r: r.first_s, {"y_log": True}),
        ("Time per token", "ms", lambda r: r.token_ms, {"zero": True}),
        ("Cache held", "MB", lambda r: None if r.held_bytes is None else r.held_bytes / 1e6, {"y_log": True}),
    ]
    out = []
    for title, text, get, more in wanted if len(contexts) > 1 else ():
        series = _over_context(found, numbers, get)
        if series:
            svg = charts.curves(title, series, "context, tokens", text, x_log=True, x_ticks=contexts, **more)
            out.append({"title": f"{title} over context", "svg": svg})
    longest = [
        r for r in found if contexts and r.context == contexts[-1] and len(r.kl_by_position) > 1 and r.method != "full"
    ]
    if longest:
        title = f"KL by decoding step at {contexts[-1]} tokens (mean of {SMOOTH} neighbours)"
        series = [Series(numbers[r.method], r.method, _smooth(r.kl_by_position)) for r in longest]
        svg = charts.curves(title, series, "decoding step", "KL, nats", y_log=True, floor=KL_FLOOR, marks=False)
        out.append({"title": title, "svg": svg})
    return out


def _over_context(found: Sequence[Record], numbers: dict[str, int], get: Get) -> list[Series]:
    points: dict[str, list[tuple[float, float]]] = {}
    for r in found:
        y = get(r)
        if _finite(y):
            points.setdefault(r.method, []).append((float(r.context), y))
    return [Series(numbers[m], m, sorted(p)) for m, p in points.items()]


def _smooth(values: Sequence[float]) -> list[tuple[float, float]]:
    half = SMOOTH // 2
    out = []
    for i in range(len(values)):
        near = values[max(0, i - half) : i + half]
        out.append((float(i + 1), sum(near) / len(near)))
    return out


def _table(found: Sequence[Record], numbers: dict[str, int], context: int) -> dict[str, Any]:
    here = sorted((r for r in found if r.context == context), key=summary.order)
    used = [i for i in range(len(summary.COLUMNS)) if any(not summary.cells(r)[i].startswith("–") for r in here)]
    columns = [{"name": summary.COLUMNS[i][0].strip(), "says": summary.COLUMNS[i][1]} for i in used]
    rows = [
        {
            "label": r.method,
            "badge": charts.badge(numbers[r.method]),
            "errors": r.errors,
            "cells": [summary.cells(r)[i] for i in used],
        }
        for r in here
    ]
    return {"context": context, "columns": columns, "rows": rows}


def _maps(found: Sequence[Record], numbers: dict[str, int], labels: Sequence[str]) -> list[dict[str, Any]]:
    out = []
    for name in labels:
        mine = [r for r in found if r.method == name and r.cells]
        if not mine:
            continue
        contexts = [r.context for r in mine]
        depths = sorted({c["depth"] for r in mine for c in r.cells})
        cells = {}
        for j, r in enumerate(mine):
            for i, depth in enumerate(depths):
                here = [c for c in r.cells if c["depth"] == depth]
                if here:
                    right, same = sum(c["correct"] for c in here), sum(c["agrees"] for c in here)
                    words = (
                        f"depth {100 * depth:.0f}%, context {r.context}: {right} of {len(here)} right, {same} as the unmodified "
                        "model"
                    )
                    cells[i, j] = (right / len(here), f"{right}/{len(here)}", words)
        svg = charts.heat(f"Passkey, {name}", [f"{100 * d:.0f}%" for d in depths], [str(c) for c in contexts], cells)
        out.append({"label": name, "badge": charts.badge(numbers[name]), "svg": svg})
    return out
