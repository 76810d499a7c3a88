"""Writes the method pages from the specifications and the recorded results, and the pages and figures of kept measurements.

    python docs/generate.py            write docs/methods/*.md, docs/{benchmarks,operators,gpu,cpu}.md, docs/figures/*.svg,
                                       the guide to adding a method, the table in README.md, the navigation in mkdocs.yml,
                                       what `qkv show` says was measured (src/qkv/measured.json)
    python docs/generate.py --check    change nothing; exit 1 and name the pages that are out of date

A method's page is a function of its file and of benchmarks/results/real/<id>.json, a table of the result files below
benchmarks/results: edit those, never the page.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import itertools
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import _cpu
import _gpu
import _operators
import _runs
from _text import cell as _cell
from _text import number as _number
from _text import prose as _prose

from qkv.bench.environment import read_json
from qkv.bench.record import read_records
from qkv.core import registry
from qkv.core.errors import QKVError
from qkv.core.spec import KINDS, Spec
from qkv.layers._mixer import check_mixing

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "methods"
README_RUN = "smollm2-cpu"
GUIDE = ("Add a method in one file", "Show it on real input", "Laws and tests")
KIND_PLURAL = {"steering": "Steering", "decoding": "Decoding", "cost": "Costs"}

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
    "pattern": "qkv.apply(model, m)",
    "cache": "qkv.apply(model, m)",
    "layer": "module = m.build(256)   # an nn.Module of that width",
    "conversion": "qkv.apply(model, m, data=batches)",
    "objective": "outcome = distill(teacher, student, m, texts, 'runs/student', tokenizer=tokenizer, max_steps=200)",
    "steering": "qkv.apply(model, m)",
    "probe": "result = m.inspect(model, tokenizer)   # a score per head: result.table",
}
SHELL_USE = {
    "pattern": "qkv bench smollm2 -m {id}",
    "cache": "qkv bench smollm2 -m {id}",
    "conversion": "qkv convert smollm2 -m {id} --out DIR",
    "objective": "qkv distill --teacher smollm2 --layers 0,10,20,29 --objective {id} --steps 200 --out DIR",
    "probe": "qkv inspect smollm2 --probe {id} --out DIR",
    "steering": "qkv bench smollm2 -m {id}",
}
OWN_USE = {
    "healing": (
        "outcome = heal(converted, source, texts, 'runs/healed', tokenizer=tokenizer, max_steps=200, objective=m)",
        "qkv convert smollm2 -m transmla --heal 200 --out DIR",
    ),
}
IMPORTS = {"objective": "from qkv.distill import distill", "healing": "from qkv.distill import heal"}
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
    if silent := set(measured) - set(verdicts()):
        raise SystemExit(
            f"benchmarks/results/verdicts.json does not say what was measured: {', '.join(sorted(silent))}"
        )
    also = _elsewhere({"softmax": "full"} | _aliases())
    return {"index.md": _index(specs, measured)} | {
        f"{s.id}.md": _page(s, measured.get(s.id), also.get(s.id, ())) for s in specs
    }


def _aliases() -> dict[str, str]:
    """Names of the comparison of operators that stand for one method with settings -> its id."""
    path = ROOT / "benchmarks" / "results" / "operators_lm.json"
    known = read_json(path)["settings"]["operators"] if path.is_file() else {}
    return {name: methods[0].partition(":")[0] for name, methods in known.items() if len(methods) == 1}


def _elsewhere(alias: dict[str, str]) -> dict[str, list[tuple[str, str]]]:
    """Method -> (page, title) of the measurements whose tables have a row of it."""
    out: dict[str, list[tuple[str, str]]] = {}
    for name, text in _measurements(ROOT)[0].items():
        title = re.search(r"(?m)^# (.*)$", text)
        first = {line.split("|")[1].strip(" `") for line in text.splitlines() if line.startswith("| ")}
        for id in {part.partition(":")[0] for cell in first for part in re.split(r" *\+ *", alias.get(cell, cell))}:
            out.setdefault(id, []).append((name, title[1] if title else name))
    return out


def _index(specs: list[Spec], records: dict[str, Any]) -> str:
    out = [_note("the specifications"), "# Methods", "",
           f"{len(specs)} methods, each in one file, each with its definition, its limit and its laws. "
           "A tick means that a figure on a real model or real data is on its page. "
           "Not sure which? [Choose a method](../guides/choose.md).", ""]  # fmt: skip
    for kind in KINDS:
        rows = [s for s in specs if s.kind == kind]
        if not rows:
            continue
        out += [
            f"## {kind.capitalize()}",
            "",
            KIND_SAYS[kind],
            "",
            "| id | what it is | paper | measured |",
            "|---|---|---|---|",
        ]
        out += [f"| [`{s.id}`]({s.id}.md) | {_about(s)} | {_paper(s.paper)} | {'✓' if s.id in records else ''} |"
                for s in rows]  # fmt: skip
        out.append("")
    return "\n".join(out).rstrip() + "\n"


def _about(spec: Spec) -> str:
    """Title and summary in a cell."""
    return f"**{_cell(spec.title)}.** {_cell(spec.summary)}".strip() if spec.summary else f"**{_cell(spec.title)}**"


def _page(spec: Spec, result: dict[str, Any] | None, also: Sequence[tuple[str, str]] = ()) -> str:
    file = spec.config.__module__.replace(".", "/")
    out = [_note(f"src/{file}.py and benchmarks/results/real/{spec.id}.json"), f"# {_prose(spec.title)}", ""]
    paper = "" if spec.paper == "baseline" else f"{_paper(spec.paper)} · "
    out += [f"`{spec.id}` · {spec.kind} · {paper}{SOURCE_SAYS[spec.source]} · `src/{file}.py`", ""]
    if spec.summary:
        out += [_prose(spec.summary), ""]
    out += [*_use(spec), *_parameters(spec), *_inputs(spec), *_definition(spec), *_limits(spec), *_deviations(spec)]
    out += ["## On real input", ""]
    if spec.shown:
        out += [f"Expected: {_linked(_prose(spec.shown), spec.id)}", ""]
    out += _result(result, verdicts()[spec.id]) if result else ["No figure of its own is recorded.", ""]
    if also:
        out += [f"Also measured: {', '.join(f'[{title}](../{page})' for page, title in also)}.", ""]
    if spec.honest:
        out += ["## Known limit", "", _prose(spec.honest), ""]
    return "\n".join(out).rstrip() + "\n"


# -- everything else that is generated ------------------------------------------------------------------------------------


def texts() -> dict[Path, str]:
    """Path -> text: the pages of measurements with their figures, README with its table, the guide, the navigation."""
    docs = ROOT / "docs"
    measured, figures, runs = _measurements(ROOT)
    out = {docs / name: text for name, text in measured.items()} | {docs / "guides" / "add-a-method.md": _guide()}
    out |= {docs / "figures" / name: text for name, text in figures.items()}
    readme = ROOT / "README.md"
    if README_RUN in runs and readme.is_file():
        table = "\n".join(_runs.tables(runs[README_RUN]))
        out[readme] = _between(readme, "<!-- bench:begin -->", "<!-- bench:end -->", f"\n\n{table}\n\n")
    if (ROOT / "src" / "qkv").is_dir():
        out[ROOT / "src" / "qkv" / "measured.json"] = _measured()
    site = ROOT / "mkdocs.yml"
    if site.is_file():
        out[site] = _between(site, "      # methods:begin", "      # methods:end", f"\n{_navigation()}\n")
    return out


@functools.cache
def _measurements(root: Path) -> tuple[dict[str, str], dict[str, str], dict[str, _runs.Run]]:
    """The pages of measurements by name, their figures by name, the kept runs by name."""
    results = root / "benchmarks" / "results"
    bench, runs, figures = _runs.page(results / "bench", results / "needles.json", _note("benchmarks/results/bench"))
    operators, more = _operators.page(results, _note("benchmarks/results/operators_lm.json and operators_vit.json"))
    gpu, bars = _gpu.page(results, _note("benchmarks/results/*_gpu.json and linear_checks.json"))
    cpu, stream = _cpu.page(results, _note("benchmarks/results/*_cpu.json and stream.json"))
    pages = {"benchmarks.md": bench, "operators.md": operators, "gpu.md": gpu, "cpu.md": cpu}
    return pages, figures | more | stream | bars, runs


def _measured() -> str:
    """For `qkv show`: method -> what its record says, when, where, and the command that made it."""
    out = {}
    for id, found in sorted(read_records(ROOT / "benchmarks" / "results" / "real").items()):
        machine = found["machine"]
        where = ", ".join(g["name"] for g in machine.get("gpus") or ()) or machine["cpu"]
        out[id] = {"said": verdicts()[id], "date": found["date"], "machine": where, "command": found["command"]}
    return json.dumps(out, indent=1, ensure_ascii=False) + "\n"


def _between(path: Path, begin: str, end: str, text: str) -> str:
    """A file with what stands between two marks replaced."""
    head, rest = path.read_text(encoding="utf-8").split(begin)
    return f"{head}{begin}{text}{end}{rest.split(end)[1]}"


def _navigation() -> str:
    """The method pages in the site's navigation, by kind."""
    out = ["      - methods/index.md"]
    specs = registry.methods()
    for kind in KINDS:
        ids = [s.id for s in specs if s.kind == kind]
        if ids:
            out.append(f"      - {KIND_PLURAL.get(kind, kind.capitalize() + 's')}:")
            out += [f"          - {i}: methods/{i}.md" for i in ids]
    return "\n".join(out)


def _guide() -> str:
    """CONTRIBUTING's sections on a method of one's own, as a page of the site."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    parts = re.split(r"(?m)^## ", text)
    wanted = {p.partition("\n")[0]: p.partition("\n")[2] for p in parts[1:]}
    first, *others = (t for t in GUIDE if t in wanted)
    page = [_note("CONTRIBUTING.md"), f"# {first}", "", wanted[first].strip(), ""]
    for title in others:
        page += [f"## {title}", "", wanted[title].strip(), ""]
    return re.sub(r"`docs/(results|lab|decisions)\.md`", r"[\1](../\1.md)", "\n".join(page).rstrip()) + "\n"


def _note(sources: str) -> str:
    return f"<!-- Written by docs/generate.py from {sources}. Edit those, then run: make docs -->\n"


def _use(spec: Spec) -> list[str]:
    command = _training(spec) if spec.kind == "operator" else SHELL_USE.get(spec.kind, "").format(id=spec.id)
    call, command = OWN_USE.get(spec.id, (_call(spec), command))
    python = ["import qkv", IMPORTS.get(spec.id, IMPORTS.get(spec.kind)), f'm = qkv.method("{spec.id}")', call]
    shell = [f"qkv show {spec.id}", f"qkv verify {spec.id}", command]
    return ["## Use", "", "```python", *filter(None, python), "```", "", "```sh", *filter(None, shell), "```", ""]


def _call(spec: Spec) -> str | None:
    """What one does with a configuration, inputs that it cannot do without included."""
    if spec.kind == "operator":
        extras, causal = getattr(spec, "extras", {}), getattr(spec, "causal_needs", ())
        needed = [n for n, x in extras.items() if x.required or n in causal]
        return f"out = qkv.attention(q, k, v, method=m{''.join(f', {n}={n}' for n in needed)})"
    if spec.kind == "decoding":
        if use := getattr(spec, "use", ""):
            return use
        given = inspect.signature(spec.config.generate).parameters.values()  # pyright: ignore[reportAttributeAccessIssue]
        needed = [
            p.name for p in given if p.kind is p.KEYWORD_ONLY and p.default is p.empty and p.name != "max_new_tokens"
        ]
        return f"out = m.generate(model, input_ids, max_new_tokens=100{''.join(f', {n}={n}' for n in needed)})"
    return PYTHON_USE.get(spec.kind)


def _training(spec: Spec) -> str:
    """How `qkv train` is told an operator, where a small model can be made of it."""
    for causal, images in ((True, ""), (False, " --images digits")):
        try:
            check_mixing(spec.config.create(), causal=causal)
        except QKVError:
            continue
        return f"qkv train{images} -m {spec.id} --steps 1000 --out DIR"
    return ""


def _inputs(spec: Spec) -> list[str]:
    """The named extra inputs of an operator."""
    extras = getattr(spec, "extras", None) or {}
    if not extras:
        return []
    out = ["## Inputs besides q, k, v", "", "| name | meaning | axes | role | required |", "|---|---|---|---|---|"]
    for name, x in extras.items():
        axes = " or ".join(f"`{a.upper()}`" for a in x.axes.split("|"))
        out.append(f"| `{name}` | {_cell(x.doc)} | {axes} | {x.role} | {'yes' if x.required else 'no'} |")
    return [*out, ""]


def _parameters(spec: Spec) -> list[str]:
    if not spec.parameters:
        return ["## Parameters", "", "None.", ""]
    out = ["## Parameters", "", "| name | meaning | default | valid | type |", "|---|---|---|---|---|"]
    for p in spec.parameters:
        valid = ", ".join(f"`{c!r}`" for c in p.choices) if p.choices else _range(p.low, p.high)
        out.append(f"| `{p.name}` | {_cell(p.doc)} | `{p.default!r}` | {valid} | `{_cell(p.type)}` |")
    return [*out, ""]


def _range(low: float | None, high: float | None) -> str:
    if low is None and high is None:
        return ""
    if high is None:
        return f"≥ {low:g}"
    return f"≤ {high:g}" if low is None else f"{low:g} to {high:g}"


def _definition(spec: Spec) -> list[str]:
    """The docstring of the method's file: what is indented is formula and keeps its lines, the rest is prose."""
    doc = inspect.getdoc(importlib.import_module(spec.config.__module__))
    if not doc:
        return []
    out = ["## Definition", ""]
    for formula, group in itertools.groupby(doc.splitlines(), lambda line: line.startswith("    ") if line else None):
        lines = list(group)
        if formula is None:
            out += [""]
        elif formula:
            out += ["```text", *(line[4:] for line in lines), "```"]
        else:
            out += [_plain(line) for line in lines]
    return [*out, ""]


def _plain(text: str) -> str:
    """A line of a docstring as Markdown that reads the same."""
    parts = re.split(r"(``.*?``|`[^`]*`)", text)
    for i, part in enumerate(parts):
        parts[i] = (
            f"`{part.strip('`')}`" if i % 2 else re.sub(r"([\\*\[\]#]|\b_(?!\w)|(?<!\w)_)", r"\\\1", _prose(part))
        )
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[\g<0>](https://arxiv.org/abs/\1)", "".join(parts))


def _linked(text: str, own: str) -> str:
    """Ids of other methods in backticks become links."""
    return re.sub(r"`([\w-]+)`", lambda m: _method(m[1]) if m[1] != own else m[0], text)


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
    """Method -> what its figures say, written by whoever looked at them."""
    path = ROOT / "benchmarks" / "results" / "verdicts.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _result(r: dict[str, Any], verdict: str) -> list[str]:
    out = [f"Measured: {_prose(verdict)}", "", "| figure | value | note |", "|---|---|---|"]
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
    made = texts()
    others = {p: t for p, t in made.items() if not p.is_file() or p.read_text(encoding="utf-8") != t}
    gone = sorted(set((ROOT / "docs" / "figures").glob("*.svg")) - set(made))
    if check:
        names = [*stale, *(p.name for p in [*others, *gone])]
        if names:
            print(f"out of date: {', '.join(names)}; run: make docs", file=sys.stderr)
        return 1 if names else 0
    for path, text in others.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for path in gone:
        path.unlink()
    for name in stale:
        if name in wanted:
            (PAGES / name).write_text(wanted[name], encoding="utf-8")
        else:
            (PAGES / name).unlink()
    print(f"{len(wanted)} pages, {len(stale)} changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
