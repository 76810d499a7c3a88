"""Writes the method pages from the specifications and from the recorded results, and the tables of kept benchmark runs.

    python docs/generate.py            write docs/methods/*.md, docs/benchmarks.md and the table in README.md
    python docs/generate.py --check    change nothing; exit 1 and name the pages that are out of date

A page is a function of the method's file and of benchmarks/results/real/<id>.json, a table one of benchmarks/results/bench/<run>
(the folder that `qkv bench --out` made): edit those, never the page.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

from qkv.bench.record import read_records
from qkv.bench.report import place
from qkv.bench.summary import Record, order, records
from qkv.core import registry
from qkv.core.spec import KINDS, Spec

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "methods"
README_RUN = "smollm2-cpu"
BENCH_COLUMNS = ("method", "KL to full, nats", "same top token", "perplexity", "passkey", "cache MB held", "of full",
                 "first token s", "ms per token")  # fmt: skip

KIND_SAYS = {
    "operator": "What is computed: attention operators as plain functions.",
    "pattern": "Which keys a query sees.",
    "cache": "What is stored, how precisely, and what is read.",
    "layer": "Another head structure, as a module.",
    "conversion": "How pretrained weights become another layer.",
    "objective": "What a student learns from a teacher.",
    "probe": "What a head does: read-only measurements.",
    "steering": "What is changed while a model runs.",
    "decoding": "How tokens are produced on top of a cache.",
    "model": "A whole architecture around an attention idea.",
    "cost": "What it would cost elsewhere.",
}
PYTHON_USE = {
    "operator": "out = qkv.attention(q, k, v, method=m)",
    "pattern": "qkv.apply(model, m)",
    "cache": "qkv.apply(model, m)",
    "conversion": "qkv.apply(model, m, data=batches)",
    "steering": "qkv.apply(model, m)",
    "probe": "result = m.inspect(model, tokenizer)   # a score per head: result.table",
}
SHELL_USE = {
    "pattern": "qkv bench smollm2 -m {id}",
    "cache": "qkv bench smollm2 -m {id}",
    "conversion": "qkv convert smollm2 -m {id} --out DIR",
    "probe": "qkv inspect smollm2 --probe {id} --out DIR",
    "steering": "qkv bench smollm2 -m {id}",
}
SOURCE_SAYS = {
    "code": "defined from the authors' code", "paper": "defined from the paper",
    "abstract": "defined from the abstract alone", "baseline": "a plain baseline",
}  # fmt: skip


def pages() -> dict[str, str]:
    """File name -> text, for every page."""
    measured = read_records(ROOT / "benchmarks" / "results" / "real")
    specs = registry.methods()
    unknown = set(measured) - {s.id for s in specs}
    if unknown:
        raise SystemExit(f"results of methods that do not exist: {', '.join(sorted(unknown))}")
    return {"index.md": _index(specs, measured)} | {f"{s.id}.md": _page(s, measured.get(s.id)) for s in specs}


def _index(specs: list[Spec], records: dict[str, Any]) -> str:
    out = [_note("the specifications"), "# Methods", "",
           f"{len(specs)} methods, each in one file, each with its definition, its limit and its laws. "
           "A tick means that a figure on a real model or real data is on its page.", ""]  # fmt: skip
    for kind in KINDS:
        rows = [s for s in specs if s.kind == kind]
        if not rows:
            continue
        out += [
            f"## {kind.capitalize()}",
            "",
            KIND_SAYS[kind],
            "",
            "| id | title | paper | measured |",
            "|---|---|---|---|",
        ]
        out += [f"| [`{s.id}`]({s.id}.md) | {_cell(s.title)} | {_paper(s.paper)} | {'✓' if s.id in records else ''} |"
                for s in rows]  # fmt: skip
        out.append("")
    return "\n".join(out).rstrip() + "\n"


def _page(spec: Spec, result: dict[str, Any] | None) -> str:
    file = spec.config.__module__.replace(".", "/")
    out = [_note(f"src/{file}.py and benchmarks/results/real/{spec.id}.json"), f"# {_prose(spec.title)}", ""]
    paper = "" if spec.paper == "baseline" else f"{_paper(spec.paper)} · "
    out += [f"`{spec.id}` · {spec.kind} · {paper}{SOURCE_SAYS[spec.source]} · `src/{file}.py`", ""]
    if spec.summary:
        out += [_prose(spec.summary), ""]
    out += [*_use(spec), *_parameters(spec), *_inputs(spec), *_definition(spec), *_limits(spec), *_deviations(spec)]
    out += ["## On real input", ""]
    if spec.shown:
        out += [f"Expected: {_prose(spec.shown)}", ""]
    out += _result(result, verdicts().get(spec.id)) if result else ["No figure is recorded yet.", ""]
    if spec.honest:
        out += ["## Known limit", "", _prose(spec.honest), ""]
    return "\n".join(out).rstrip() + "\n"


# -- kept runs of `qkv bench` ----------------------------------------------------------------------------------------------


def _kept_run(folder: Path) -> str:
    """The tables of one run and where it was taken."""
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    found = records(rows)
    out = []
    for context in sorted({r.context for r in found}):
        out += [
            f"{context} tokens of context",
            "",
            "| " + " | ".join(BENCH_COLUMNS) + " |",
            "|---" * len(BENCH_COLUMNS) + "|",
        ]
        out += [
            "| " + " | ".join(_bench_cells(r)) + " |"
            for r in sorted((r for r in found if r.context == context), key=order)
        ]
        out.append("")
    last, model = rows[-1]["environment"], rows[-1]["model"]
    versions = ", ".join(f"{k} {last['versions'][k]}" for k in ("torch", "transformers"))
    commit = last["commit"]
    said = (
        "unknown" if commit is None else commit["hash"][:7] + (" with uncommitted changes" if commit["dirty"] else "")
    )
    out += [
        f"{model['name']}, {model['dtype']}, {place(last | {'model': model})}, {versions}, seed {last['seed']}, commit {said}."
    ]
    return "\n".join(out)


def _bench_cells(r: Record) -> list[str]:
    def text(x: float | None, form: str, scale: float = 1.0) -> str:
        return "–" if x is None else format(x * scale, form)

    return [
        f"`{r.method}`",
        text(r.kl, ".4f"),
        text(r.top1, ".0%"),
        text(r.ppl, ".1f"),
        text(r.accuracy, ".0%"),
        text(r.held_bytes, ".1f", 1e-6),
        text(r.held_ratio, ".0%"),
        text(r.first_s, ".2f"),
        text(r.token_ms, ".1f"),
    ]


def texts() -> dict[Path, str]:
    """Path -> text of everything else that is generated: the page of kept runs, and README with its table."""
    folder = ROOT / "benchmarks" / "results" / "bench"
    runs = (
        {f.name: _kept_run(f) for f in sorted(folder.iterdir()) if (f / "results.jsonl").is_file()}
        if folder.is_dir()
        else {}
    )
    out = [
        _note("benchmarks/results/bench"),
        "# Benchmark runs",
        "",
        "Each section is one kept run of `qkv bench`, rows from the best KL down. Cache bytes are those really held.",
        "",
    ]
    for name, table in runs.items():
        said = (folder / name / "command.txt").read_text(encoding="utf-8").strip()
        out += [f"## {name}", "", "```sh", said, "```", "", table, ""]
    page = {
        ROOT / "docs" / "benchmarks.md": "\n".join(out).rstrip() + "\n",
        ROOT / "docs" / "operators.md": _operators(),
    }
    readme = ROOT / "README.md"
    if README_RUN in runs and readme.is_file():
        parts = re.split(r"(<!-- bench:(?:begin|end) -->)", readme.read_text(encoding="utf-8"))
        parts[2] = f"\n\n{runs[README_RUN]}\n\n"
        page[readme] = "".join(parts)
    return page


OPERATOR_TABLES = {
    ("operators_lm.json", "text"): (
        "Text",
        "A byte model of plays, equal parameters, steps and batches; loss on a play held out, in nats a byte.",
        ("loss", "loss at 4 x length", "tokens per second", "decode bytes"),
    ),
    ("operators_lm.json", "recall"): (
        "Recall",
        "Multi-query associative recall, 16 pairs in 128 tokens, against the bytes of the state while decoding.",
        ("dial", "accuracy", "state bytes"),
    ),
    ("operators_vit.json", "digits"): (
        "Digits",
        "One small vision transformer, 64 tokens of one pixel; share of held-out digits that are right.",
        ("accuracy", "loss", "images per second"),
    ),
    ("operators_vit.json", "fashion-mnist"): (
        "Photographs of clothes",
        "The same on Fashion-MNIST, 196 tokens.",
        ("accuracy", "loss", "images per second"),
    ),
}


def _operators() -> str:
    """The page that compares operators in equal models."""
    folder = ROOT / "benchmarks" / "results"
    out = [
        _note("benchmarks/results/operators_lm.json and operators_vit.json"),
        "# Operators compared",
        "",
        "Small models that differ in their operator alone, made by `benchmarks/operators_lm.py` and `operators_vit.py`; "
        "no setting was tuned. In the vision models only an operator that brings positions has any beyond learned ones.",
        "",
    ]
    for (file, task), (title, says, columns) in OPERATOR_TABLES.items():
        data = json.loads((folder / file).read_text(encoding="utf-8"))
        rows = data["summary"].get(task, [])
        seeds = sorted({r["seeds"] for r in rows})
        out += [f"## {title}", "", f"{says} Seeds: {', '.join(map(str, seeds))}.", "",
                "| operator | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]  # fmt: skip
        for row in rows:
            cells = [_number(row.get(c, "–") if row.get(c) is not None else "–") for c in columns]
            out.append(f"| {_cell(row['operator'])} | " + " | ".join(cells) + " |")
        lost = sorted({f["operator"] for f in data["failed"] if f["task"] == task and f["seed"] == 0})
        if lost:
            why = sorted({f["error"].split(": ", 1)[1] for f in data["failed"]})
            out += ["", f"Not measured ({'; '.join(why)}): {', '.join(lost)}."]
        where = ", ".join(g["name"] for g in data["machine"]["gpus"]) or data["machine"]["cpu"]
        out += ["", f"{where}, torch {data['versions']['torch']}, first seed {data['seed']}.", ""]
    return "\n".join(out).rstrip() + "\n"


def _note(sources: str) -> str:
    return f"<!-- Written by docs/generate.py from {sources}. Edit those, then run: make docs -->\n"


def _use(spec: Spec) -> list[str]:
    python = ["import qkv", f'm = qkv.method("{spec.id}")', PYTHON_USE.get(spec.kind)]
    shell = [f"qkv show {spec.id}", f"qkv verify {spec.id}", SHELL_USE.get(spec.kind, "").format(id=spec.id)]
    return ["## Use", "", "```python", *filter(None, python), "```", "", "```sh", *filter(None, shell), "```", ""]


def _inputs(spec: Spec) -> list[str]:
    """The named extra inputs of an operator."""
    extras = getattr(spec, "extras", None) or {}
    if not extras:
        return []
    out = ["## Inputs besides q, k, v", "", "| name | axes | role | required | meaning |", "|---|---|---|---|---|"]
    out += [f"| `{name}` | {' or '.join(f'`{a.upper()}`' for a in x.axes.split('|'))} | {x.role} | "
            f"{'yes' if x.required else 'no'} | {_cell(x.doc)} |" for name, x in extras.items()]  # fmt: skip
    return [*out, ""]


def _parameters(spec: Spec) -> list[str]:
    if not spec.parameters:
        return ["## Parameters", "", "None.", ""]
    out = ["## Parameters", "", "| name | type | default | valid | meaning |", "|---|---|---|---|---|"]
    for p in spec.parameters:
        valid = ", ".join(f"`{c!r}`" for c in p.choices) if p.choices else _range(p.low, p.high)
        out.append(f"| `{p.name}` | `{_cell(p.type)}` | `{p.default!r}` | {valid} | {_cell(p.doc)} |")
    return [*out, ""]


def _range(low: float | None, high: float | None) -> str:
    if low is None and high is None:
        return ""
    if high is None:
        return f"≥ {low:g}"
    return f"≤ {high:g}" if low is None else f"{low:g} to {high:g}"


def _definition(spec: Spec) -> list[str]:
    doc = inspect.getdoc(importlib.import_module(spec.config.__module__))
    return ["## Definition", "", "```text", doc, "```", ""] if doc else []


def _limits(spec: Spec) -> list[str]:
    if not spec.limits:
        return []
    out = ["## Equals another method at", ""]
    for x in spec.limits:
        where = ", ".join(f"{k}={v!r}" for k, v in x.parameters.items())
        says = f": {_prose(x.says)}" if x.says else ""
        at = f" at `{where}`" if where else ""
        out.append(f"- {_method(x.equals)}{at}{says}")
    return [*out, ""]


def _method(name: str) -> str:
    return f"[`{name}`]({name}.md)" if name in registry.ids() else f"`{name}`"


def _deviations(spec: Spec) -> list[str]:
    if not spec.deviations:
        return []
    return ["## Laws it does not keep", "", *(f"- `{d.law}`: {_prose(d.reason)}" for d in spec.deviations), ""]


def verdicts() -> dict[str, str]:
    """Method -> what its figures say, written by whoever looked at them, where that is not what was expected."""
    path = ROOT / "benchmarks" / "results" / "verdicts.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _result(r: dict[str, Any], verdict: str | None) -> list[str]:
    out = [f"Measured: {_prose(verdict or r['claim'])}", "", "| figure | value | note |", "|---|---|---|"]
    out += [
        f"| {_cell(f['name'])} | {_number(f['value'])} {_cell(f['unit'])} | {_cell(f['note'])} |" for f in r["figures"]
    ]
    table = r.get("table") or []
    if table:
        columns = list(table[0])
        out += ["", "| " + " | ".join(map(_cell, columns)) + " |", "|---" * len(columns) + "|"]
        out += ["| " + " | ".join(_number(row[c]) for c in columns) + " |" for row in table]
    machine, versions = r["machine"], r["versions"]
    where = [str(machine.get("cpu", "?")), f"{machine.get('cores', '?')} cores"]
    where += [str(g["name"]) for g in machine.get("gpus") or ()]
    commit = r["commit"]["hash"][:12] + (" with changes" if r["commit"]["dirty"] else "") if r["commit"] else "unknown"
    said = ", ".join(f"{k} {v}" for k, v in versions.items() if v)
    return [*out, "", "```sh", r["command"], "```", "",
            f"{r['date']}, {', '.join(where)}; {said}; commit {commit}; seed {r['seed']}.", ""]  # fmt: skip


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return _cell(str(value))


def _prose(text: str) -> str:
    return text.replace("<", "&lt;")


def _cell(text: str) -> str:
    return _prose(" ".join(text.split())).replace("|", "\\|")


def _paper(paper: str) -> str:
    found = re.fullmatch(r"arXiv:([\w./-]+)", paper)
    return f"[{paper}](https://arxiv.org/abs/{found[1]})" if found else _cell(paper)


def main(arguments: list[str] | None = None) -> int:
    """Write or check the pages; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when a page is out of date")
    check = parser.parse_args(arguments).check
    wanted = pages()
    present = {p.name: p.read_text(encoding="utf-8") for p in PAGES.glob("*.md")}
    stale = sorted({n for n in wanted if present.get(n) != wanted[n]} | (set(present) - set(wanted)))
    others = {p: t for p, t in texts().items() if not p.is_file() or p.read_text(encoding="utf-8") != t}
    if check:
        if stale or others:
            print(f"out of date: {', '.join([*stale, *(p.name for p in others)])}; run: make docs", file=sys.stderr)
        return 1 if stale or others else 0
    for path, text in others.items():
        path.write_text(text, encoding="utf-8")
    for name in stale:
        if name in wanted:
            (PAGES / name).write_text(wanted[name], encoding="utf-8")
        else:
            (PAGES / name).unlink()
    print(f"{len(wanted)} pages, {len(stale)} changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
