"""`qkv show`: one method."""

from __future__ import annotations

from importlib.resources import files
from json import loads
from typing import Annotated, Any

import typer

from qkv.cli._shared import JSON, print_json, screen

USE = {
    "operator": "qkv bench MODEL -m {id}",
    "pattern": "qkv bench MODEL -m {id}",
    "cache": "qkv bench MODEL -m {id}",
    "steering": "qkv bench MODEL -m {id}",
    "conversion": "qkv convert MODEL -m {id} --out DIR",
    "probe": "qkv inspect MODEL --probe {id} --out DIR",
}

EXAMPLES = (
    "qkv show h2o",
    "qkv show xattention --json",
)


def command(
    id: Annotated[
        str,
        typer.Argument(metavar="ID", help="A method, as `qkv methods` lists it, or a FILE.py.", show_default=False),
    ],
    json: Annotated[bool, JSON] = False,
) -> None:
    """Explain one method: what it does, its settings, its limits, what was measured. A FILE.py is executed."""
    from qkv.core import registry

    file = id.endswith(".py")
    spec = (registry.load_file(id) if file else registry.config_class(id)).spec
    found = None if file else measured().get(spec.id)
    if json:
        print_json(spec.to_dict() | {"measured": found})
        return
    _print(spec, found, id if file else None)


def measured() -> dict[str, dict[str, str]]:
    """Method -> what was measured on real input, written from the records by docs/generate.py."""
    return loads(files("qkv").joinpath("measured.json").read_text(encoding="utf-8"))


def _print(spec: Any, found: dict[str, str] | None, file: str | None = None) -> None:
    from rich.table import Table
    from rich.text import Text

    console = screen()
    console.print(Text(spec.title, style="bold"))
    console.print(Text(f"{spec.id} · {spec.kind} · {spec.paper} · definition from: {spec.source}"))
    facts = [
        ("", spec.summary),
        ("Expected on real input", spec.shown),
        (f"Measured on {found['date']}, {found['machine']}" if found else "", found["said"] if found else ""),
        ("Its limit", spec.honest),
        *(("Equals " + x.equals, x.says or str(dict(x.parameters))) for x in spec.limits),
        *(("Deviates from " + x.law, x.reason) for x in spec.deviations),
    ]
    for name, said in facts:
        if said:
            line = Text(f"\n{name}: " if name else "\n", style="bold")
            line.append(said, style="not bold")
            console.print(line, end="")
    console.print()
    if spec.parameters:
        table = Table(title="\nSettings", title_justify="left", box=None, padding=(0, 2, 0, 0))
        for name in ("name", "default", "allowed"):
            table.add_column(name, no_wrap=name != "allowed")
        table.add_column("meaning")
        for p in spec.parameters:
            table.add_row(Text(p.name, style="bold"), Text(str(p.default)), Text(_allowed(p)), Text(p.doc))
        console.print(table)
    use = USE.get(spec.kind)
    if use and file is None:
        console.print(Text("\nTry: " + use.format(id=spec.id)))
    console.print(Text(f"Check it here: qkv verify {file or spec.id}"))


def _allowed(p: Any) -> str:
    if p.choices is not None:
        return ", ".join(map(str, p.choices))
    if p.low is not None or p.high is not None:
        low, high = ("" if x is None else f"{x:g}" for x in (p.low, p.high))
        return f"{low} to {high}" if low and high else f"from {low}" if low else f"up to {high}"
    return p.type
