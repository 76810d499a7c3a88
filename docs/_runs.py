"""The page of kept runs of `qkv bench`: a figure of quality against cost, and tables that stay readable with many methods.

A run is a folder below benchmarks/results/bench. It holds results.jsonl and command.txt, or folders that do: parts of one run
that were taken one after another; note.md, where it stands beside them, is shown above the tables.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _text import MISSING, commit, fixed, folded, picture, shell, table

from qkv.bench import _charts as charts
from qkv.bench.environment import read_json, read_jsonl
from qkv.bench.report import KL_FLOOR, place
from qkv.bench.summary import Record, brief, order, records

COLUMNS = (
    "method",
    "KL to full, nats",
    "same top token",
    "perplexity",
    "passkey",
    "cache MB held",
    "of full",
    "first token s",
    "ms per token",
)
FEW = 16
"""Up to so many methods, a context is one table; more are grouped by budget."""
HEIGHT = 400
SPARED = 0.95
NO_BUDGET = "No budget of tokens"
INTRODUCTION = (
    "Each section is one kept run of `qkv bench`: quality on one side, cost on the other, every method in the same process "
    "as the unmodified model. Cache bytes are those really held. KL is the divergence of the next-token distributions from "
    "the unmodified model's, in nats; beside it stands how often both find the same token likeliest. [Choosing a "
    "method](guides/choose.md) says how to read this for your own case.",
    "",
    "In the figures a line is a method and its points are its budgets. Down and left is better. The dashed line joins what "
    "nothing else beats on both counts; the dotted line is the cost of a full cache. A method that holds everything and "
    "reads a part of it is drawn against the bytes that it reads.",
)
NEEDLES = (
    "The same model, prompts and order on both sides. Each compresses after the text and before the question is seen, "
    "keeps {keep:.0%} and answers greedily. `held` is what the cache's tensors occupy when the question comes, as a "
    "share of a plain cache of the same tokens."
)
NEEDLES_COMMANDS = """\
cd benchmarks
python needles.py prompts --contexts {contexts} --out ../runs/needles/prompts.json
python needles.py ours --prompts ../runs/needles/prompts.json --out ../runs/needles/ours.json
python needles.py kvpress --prompts ../runs/needles/prompts.json --model FOLDER --out ../runs/needles/kvpress.json
python needles.py table ../runs/needles/{{ours,kvpress}}.json --out results/needles.json"""
Get = Callable[[Record], float | None]


@dataclass
class Run:
    """One run: its records, what was typed, where it ran, and the share of tokens that each label keeps at each context."""

    name: str
    records: list[Record]
    commands: list[str]
    places: list[str]
    kept: dict[tuple[str, int], float | None]

    @property
    def contexts(self) -> list[int]:
        """Shortest first."""
        return sorted({r.context for r in self.records})

    def at(self, context: int) -> list[Record]:
        """The records of a context, `full` first, then by KL."""
        return sorted((r for r in self.records if r.context == context), key=order)


def read(folder: Path) -> Run:
    """A run from its folder, parts put together: what one part lacks, another gives; the first that has a number counts."""
    parts = [p.parent for p in sorted(folder.rglob("results.jsonl"))]
    found: dict[tuple[str, int], Record] = {}
    commands: dict[str, None] = {}
    places: dict[str, None] = {}
    kept: dict[tuple[str, int], float | None] = {}
    for part in parts:
        rows = read_jsonl(part / "results.jsonl")
        for r in records(rows):
            _fill(found.setdefault((r.method, r.context), r), r)
        commands[(part / "command.txt").read_text(encoding="utf-8").strip()] = None
        places[_where(rows[-1])] = None
        kept |= {
            (brief(r["method"]["label"]), r["context"]): kept_share(r["method"]["stack"], r["context"]) for r in rows
        }
    for r in found.values():
        if r.kl is not None or r.ppl is not None:
            r.errors = []
    names = list(dict.fromkeys(m for m, _ in found))
    ordered = sorted(found.values(), key=lambda r: (names.index(r.method), r.context))
    return Run(folder.name, ordered, list(commands), list(places), kept)


def _fill(old: Record, new: Record) -> None:
    for f in dataclasses.fields(Record):
        if getattr(old, f.name) in (None, []):
            setattr(old, f.name, getattr(new, f.name))


def _where(row: dict[str, Any]) -> str:
    last, model = row["environment"], row["model"]
    versions = ", ".join(f"{k} {last['versions'][k]}" for k in ("torch", "transformers"))
    chip = place(last | {"model": model})
    return f"{model['name']}, {model['dtype']}, {chip}, {versions}, seed {last['seed']}, {commit(last['commit'])}."


def kept_share(stack: Sequence[dict[str, Any]], context: int) -> float | None:
    """The share of a context's tokens that a stack keeps or reads, by its settings; None where they name none."""
    for method in stack:
        given = method["parameters"]
        size = given.get("budget", given.get("window"))
        if isinstance(size, bool) or not isinstance(size, (int, float)):
            continue
        if isinstance(size, float):
            return size
        return min(1.0, (size + (0 if "budget" in given else given.get("sinks") or 0)) / context)
    return None


# -- tables -----------------------------------------------------------------------------------------------------------


def tables(run: Run) -> list[str]:
    """A table per context, or per budget and context where there are many methods; then where it was taken."""
    out: list[str] = []
    if max(len(run.at(c)) for c in run.contexts) <= FEW:
        for context in run.contexts:
            out += [f"{context} tokens of context", "", *_whole(run.at(context)), ""]
    else:
        for title, groups in _by_budget(run):
            out += [f"### {run.name}: {title}", "", *_overview(groups, run.contexts, title != NO_BUDGET), ""]
            for context, here in groups.items():
                out += folded(f"All figures at {context} tokens", _whole(here))
    failed = sorted({(r.method, r.context, e) for r in run.records for e in r.errors})
    if failed:
        lines = [f"- `{m}` at {c}: {_short(e)}" for m, c, e in failed]
        out += ["Not measured:", "", *lines, ""] if len(lines) <= 8 else folded(f"{len(lines)} not measured", lines)
    return [*out, *run.places]


def _short(text: str) -> str:
    line = " ".join(text.split()).replace("<", "&lt;")
    return line if len(line) <= 160 else line[:157] + "..."


def _whole(found: Sequence[Record]) -> list[str]:
    lines = table(COLUMNS, map(_cells, found))
    return [lines[0], re.sub("---:", "---", lines[1]), *lines[2:]]


def _cells(r: Record) -> list[str]:
    return [
        f"`{r.method}`",
        fixed(r.kl, ".4f"),
        fixed(r.top1, ".0%"),
        fixed(r.ppl, ".1f"),
        fixed(r.accuracy, ".0%"),
        fixed(r.held_bytes, ".1f", 1e-6),
        fixed(r.held_ratio, ".0%"),
        fixed(r.first_s, ".2f"),
        fixed(r.token_ms, ".1f"),
    ]


def _by_budget(run: Run) -> Iterable[tuple[str, dict[int, list[Record]]]]:
    """Budget in words -> context -> records, best KL first; the largest budget first, what has none before all."""
    groups: dict[float, dict[int, list[Record]]] = {}
    for context in run.contexts:
        for r in run.at(context):
            share = run.kept.get((r.method, context))
            groups.setdefault(math.inf if share is None else _round(share), {}).setdefault(context, []).append(r)
    for share in sorted(groups, reverse=True):
        yield (NO_BUDGET if share == math.inf else f"{100 * share:g} % of the tokens"), groups[share]


def _round(share: float) -> float:
    """A half, a quarter ... where it is one within 3 % (sinks beside it, 8000 tokens for 8192); else halves of a per cent."""
    near = 2.0 ** round(math.log2(share))
    return near if abs(share / near - 1) <= 0.03 else round(200 * share) / 200


def _overview(groups: dict[int, list[Record]], contexts: Sequence[int], share: bool) -> list[str]:
    """KL over the contexts, then what was held and found at the longest; best at the longest first.

    share: the records keep one share of the tokens, so that a method's settings at several contexts are one row.
    """
    columns = [
        "method",
        *(f"KL at {c}" for c in contexts),
        f"bytes of full at {contexts[-1]}",
        f"passkey at {contexts[-1]}",
    ]
    every = [(c, r) for c, found in groups.items() for r in found]
    seen = Counter((family(r.method), c) for c, r in every)
    several = {name for (name, _), n in seen.items() if n > 1 or not share}  # each setting under its own name
    by: dict[str, dict[int, Record]] = {}
    for c, r in every:
        by.setdefault(r.method if family(r.method) in several else family(r.method), {})[c] = r
    longest = contexts[-1]
    ordered = sorted(by.values(), key=lambda rows: (longest not in rows, order(rows[max(rows)])))
    rows = []
    for mine in ordered:
        last, labels = mine.get(longest), list(dict.fromkeys(r.method for r in mine.values()))
        kl = [fixed(mine[c].kl, ".4f") if c in mine else MISSING for c in contexts]
        name = labels[0] if len(labels) == 1 else family(labels[0])
        rows.append([f"`{name}`", *kl, fixed(last and last.held_ratio, ".0%"), fixed(last and last.accuracy, ".0%")])
    return table(columns, rows)


# -- figures ----------------------------------------------------------------------------------------------------------


def family(label: str) -> str:
    """A label without the settings that a line runs along: budget, window, bits, rank."""
    bare = re.sub(r"(?<=[:,])(budget|window|bits|kv_rank)=[\w.]+,?", "", label)
    return re.sub(r"[:,](?=\+|$)", "", bare)


def figures(run: Run) -> tuple[list[str], dict[str, str]]:
    """The lines that show the figures of a run (the longest context open, the others folded), and the files.

    What spares nothing of a cost, as sparse reads spare no byte that is held, is left out of the figure of that cost.
    """
    lines: list[str] = []
    files: dict[str, str] = {}
    names = list(dict.fromkeys(family(r.method) for r in run.records if r.method != "full"))
    wanted: list[tuple[str, str, Get]] = [("held", "bytes held, share of a full cache", lambda r: r.held_ratio)]
    if any(r.read_ratio and r.held_ratio and abs(r.read_ratio / r.held_ratio - 1) > 0.1 for r in run.records):
        wanted.append(("read", "bytes read per token, share of a full cache", lambda r: r.read_ratio))
    for context in reversed(run.contexts):
        shown: list[str] = []
        for what, axis, get in wanted:
            spared = {family(r.method) for r in run.at(context) if (get(r) or 1) < SPARED}
            made = _frontier(run, context, [n if n in spared else "" for n in names], axis, get, what)
            if made:
                file = f"bench-{run.name}-{context}-{what}.svg"
                files[file], words = made
                shown += picture(file, words)
        lines += (
            shown if context == run.contexts[-1] else folded(f"The same at {context} tokens", shown) if shown else []
        )
    return lines, files


def _frontier(run: Run, context: int, names: Sequence[str], axis: str, get: Get, what: str) -> tuple[str, str] | None:
    points: dict[str, list[tuple[float, float]]] = {}
    for r in run.at(context):
        x = get(r)
        if r.method != "full" and x and r.kl is not None and math.isfinite(r.kl):
            points.setdefault(family(r.method), []).append((x, max(r.kl, KL_FLOOR)))
    series = [charts.Series(i + 1, n, sorted(points[n])) for i, n in enumerate(names) if points.get(n)]
    if len(series) < 2:
        return None
    title = f"KL against bytes {what}, {context} tokens"
    chart = charts.curves(
        title,
        series,
        axis,
        "KL to the full model, nats",
        x_log=True,
        y_log=True,
        floor=KL_FLOOR,
        x_format=charts.per_cent,
        around=True,
        best="less",
        x_mark=1.0,
        height=HEIGHT,
    )
    words = (
        f"Divergence from the full model against {axis}, {len(series)} methods at {context} tokens of context, both logarithmic; "
        "the numbers are in the tables below."
    )
    return charts.alone(title, chart, [(s.number, s.text) for s in series], HEIGHT), words


# -- the page ---------------------------------------------------------------------------------------------------------


def page(folder: Path, needles: Path, note: str) -> tuple[str, dict[str, Run], dict[str, str]]:
    """The text of the page, the runs by name, and the figures by file name."""
    runs = {}
    if folder.is_dir():
        runs = {f.name: read(f) for f in sorted(folder.iterdir()) if f.is_dir() and any(f.rglob("results.jsonl"))}
    out = [
        note,
        "# Benchmark runs",
        "",
        *INTRODUCTION,
        "",
    ]
    files: dict[str, str] = {}
    for name, run in runs.items():
        pictures, made = figures(run)
        files |= made
        words = folder / name / "note.md"
        said = [words.read_text(encoding="utf-8").strip(), ""] if words.is_file() else []
        out += [f"## {name}", "", *said, *shell(*run.commands), *pictures, *tables(run), ""]
    out += _needles(needles)
    return "\n".join(out).rstrip() + "\n", runs, files


def _needles(path: Path) -> list[str]:
    """Pass keys found beside kvpress's presses."""
    if not path.is_file():
        return []
    data = read_json(path)
    contexts = sorted({c["context"] for r in data["rows"] for c in r["cells"]})
    rows = []
    for r in data["rows"]:
        right = [[c["right"] for c in r["cells"] if c["context"] == n] for n in contexts]
        shares = [f"{sum(x)} of {len(x)}" if x else MISSING for x in right]
        rows.append(
            [
                f"`{r['method']}`" if not r["method"].startswith("kvpress") else r["method"],
                fixed(r["accuracy"], ".0%"),
                *shares,
                fixed(r["held"], ".0%"),
            ]
        )
    peers = "; kvpress with " + "; ".join(
        ", ".join(f"{k} {v}" for k, v in p.items() if v) for p in data.get("peers", ()) if p
    )
    versions = ", ".join(f"{k} {data['versions'][k]}" for k in ("torch", "transformers"))
    machine = data["machine"]
    chip = ", ".join(g["name"] for g in machine["gpus"]) or machine["cpu"]
    return [
        "## Pass keys at a quarter of the cache, beside kvpress",
        "",
        NEEDLES.format(keep=data["keep"]),
        "",
        *shell(NEEDLES_COMMANDS.format(contexts=",".join(map(str, contexts)))),
        *table(["method", "found", *(f"at {n}" for n in contexts), "held"], rows),
        "",
        f"{chip}, {versions}{peers if len(peers) > 15 else ''}, seed {data['seed']}, {commit(data['commit'])}.",
        "",
    ]
