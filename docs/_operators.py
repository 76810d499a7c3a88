"""The page that compares operators in equal models, with the trade-off of recall and memory as curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from _text import cell, commit, number, picture, shell, table

from qkv.bench import _charts as charts
from qkv.bench.environment import read_json

TABLES = {
    ("operators_lm", "text"): (
        "Text",
        "A byte model of plays, equal parameters, steps and batches; loss on a play held out, in nats a byte, at the "
        "length of training and at four times it. Speed is that of training, on the device named; bytes are what one row "
        "holds while it decodes.",
        ("seeds", "loss", "loss at 4 x length", "tokens per second", "decode bytes", "decode ms per token", "device"),
    ),
    ("operators_lm", "recall"): (
        "Recall",
        "Multi-query associative recall: 16 pairs of key and value in 128 tokens, then keys are asked for. Whoever "
        "keeps everything can answer; the question is what a state of so many bytes still knows. Operators were trained "
        "at several sizes of their state.",
        ("dial", "seeds", "accuracy", "state bytes"),
    ),
    ("operators_vit", "digits"): (
        "Digits",
        "One small vision transformer, 64 tokens of one pixel; share of held-out digits that are right. Speeds are not "
        "shown: several trainings shared a GPU.",
        ("seeds", "accuracy", "loss"),
    ),
    ("operators_vit", "fashion-mnist"): (
        "Photographs of clothes",
        "The same on Fashion-MNIST, 196 tokens.",
        ("seeds", "accuracy", "loss"),
    ),
}
HEIGHT = 400
COSTS: tuple[tuple[str, str, Literal["less", "more"], str, str], ...] = (
    ("decode bytes", "held while decoding, bytes", "less", "operators-loss-bytes.svg", "down and left is better"),
    (
        "tokens per second",
        "training, tokens per second",
        "more",
        "operators-loss-speed.svg",
        "down and right is better",
    ),
)


def page(folder: Path, note: str) -> tuple[str, dict[str, str]]:
    """The text of the page, and its figures by file name."""
    out = [
        note,
        "# Operators compared",
        "",
        "Small models that differ in their operator alone: equal parameters, steps, batches and learning rate; no "
        "setting was tuned. In the vision models only an operator that brings positions has any beyond learned ones. "
        "What follows from the figures, and where they differ from the papers, is in the [lab log](lab.md).",
        "",
    ]
    files: dict[str, str] = {}
    data = {
        f: read_json(folder / f"{f}.json")
        for f in dict.fromkeys(f for f, _ in TABLES)
        if (folder / f"{f}.json").is_file()
    }
    numbers = _numbers(data.get("operators_lm", {}).get("summary", {}))
    for (file, task), (title, says, columns) in TABLES.items():
        out += [f"## {title}", "", says, ""]
        if file not in data:
            out += ["Not recorded.", ""]
            continue
        rows = data[file]["summary"].get(task, [])
        lines, made = FIGURES[task](rows, numbers) if task in FIGURES else ([], {})
        files |= made
        out += [*lines, *_table(rows, columns), "", *_missing(data[file], task), *_command(data[file], file)]
    return "\n".join(out).rstrip() + "\n", files


def _table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> list[str]:
    def said(row: dict[str, Any], column: str) -> str:
        value, spread = row.get(column), row.get(f"{column}, deviation")
        if isinstance(value, dict):
            return cell(", ".join(_setting(k, v) for k, v in value.items()))
        if isinstance(value, float) and value == int(value) and abs(value) >= 1000:
            value = int(value)
        return number(value) + (f" ± {spread:.1g}" if isinstance(spread, float) else "")

    return table(("operator", *columns), [[cell(r["operator"]), *(said(r, c) for c in columns)] for r in rows])


def _setting(name: str, value: Any) -> str:
    return " + ".join(map(str, value)) if isinstance(value, (list, tuple)) else f"{name} {value}".replace("_", " ")


def _missing(data: dict[str, Any], task: str) -> list[str]:
    """What failed, and why; what the time did not suffice for."""

    def of(key: str) -> list[dict[str, Any]]:
        return [
            f for f in data.get(key, ()) if (f.get("task") or f.get("data")) == task and f["operator"] not in measured
        ]

    measured = {r["operator"] for r in data["summary"].get(task, [])}
    failed = of("failed")
    lost = {f["operator"] for f in failed}
    left = {f["operator"] for f in of("left out")} - lost
    why = sorted({f["error"].split(": ", 1)[-1] for f in failed})
    out = [f"Not measured ({cell('; '.join(why))}): {', '.join(sorted(lost))}.", ""] if lost else []
    return out + ([f"Not run in the time given: {', '.join(sorted(left))}.", ""] if left else [])


def _command(data: dict[str, Any], file: str) -> list[str]:
    settings, seeds = data.get("settings", {}), sorted({r["seeds"] for rows in data["summary"].values() for r in rows})
    given = "".join(
        f" --{k.replace('_', '-')} {settings[k]}" for k in ("seeds", "steps", "recall_steps") if k in settings
    )
    own = ", ".join(g["name"] for g in data["machine"]["gpus"]) or data["machine"]["cpu"]
    chip = " and ".join(data.get("devices") or [own])
    return [
        *shell(data.get("command") or f"python benchmarks/{file}.py --out benchmarks/results/{file}.json{given}"),
        f"{chip}, torch {data['versions']['torch']}, seeds finished: {', '.join(map(str, seeds)) or 'none'} (the first is "
        f"{data['seed']}), {commit(data['commit'])}.",
        "",
    ]


# -- figures ----------------------------------------------------------------------------------------------------------


def _numbers(summary: dict[str, list[dict[str, Any]]]) -> dict[str, int]:
    """One number per operator in all figures: softmax is 0, the others by name."""
    names = sorted({r["operator"] for rows in summary.values() for r in rows} - {"softmax"})
    return {"softmax": 0} | {n: i + 1 for i, n in enumerate(names)}


def _series(rows: list[dict[str, Any]], numbers: dict[str, int], x: str, y: str) -> list[charts.Series]:
    points: dict[str, list[tuple[float, float]]] = {}
    for r in rows:
        if r.get(x) is not None and r.get(y) is not None:
            points.setdefault(r["operator"], []).append((float(r[x]), float(r[y])))
    return [charts.Series(numbers[n], n, sorted(points[n])) for n in sorted(points, key=numbers.__getitem__)]


def _recall(rows: list[dict[str, Any]], numbers: dict[str, int]) -> tuple[list[str], dict[str, str]]:
    series = _series(rows, numbers, "state bytes", "accuracy")
    if not series:
        return [], {}
    title = "Recall against the bytes of the state"
    chart = charts.curves(
        title,
        series,
        "state while decoding, bytes",
        "accuracy of recall",
        x_log=True,
        y_format=charts.per_cent,
        zero=True,
        x_format=charts.thousands,
        around=True,
        height=HEIGHT,
    )
    words = f"Accuracy of recall against the bytes of the state (logarithmic), one line for each of {len(series)} operators."
    lines = [
        "A line is an operator, its points are sizes of its state; up and left is better.",
        "",
        *picture("operators-recall.svg", words),
    ]
    return lines, {"operators-recall.svg": _file(title, chart, series)}


def _loss(rows: list[dict[str, Any]], numbers: dict[str, int]) -> tuple[list[str], dict[str, str]]:
    lines = ["The dashed line joins what nothing else beats on both counts.", ""]
    files = {}
    for x, axis, best, file, says in COSTS:
        series = _series(rows, numbers, x, "loss")
        if not series:
            continue
        title = f"Loss against {x}"
        chart = charts.curves(
            title,
            series,
            axis,
            "loss, nats a byte",
            x_log=True,
            x_format=charts.thousands,
            around=True,
            best=best,
            height=HEIGHT,
        )
        files[file] = _file(title, chart, series)
        lines += picture(file, f"{title} (logarithmic), one point for each of {len(series)} operators; {says}.")
    return (lines, files) if files else ([], {})


def _file(title: str, chart: Any, series: list[charts.Series]) -> str:
    return charts.alone(title, chart, [(s.number, s.text) for s in series], HEIGHT)


FIGURES = {"text": _loss, "recall": _recall}
