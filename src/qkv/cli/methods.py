"""`qkv methods`: what there is."""

from __future__ import annotations

from typing import Annotated

import typer

from qkv.cli._shared import JSON, print_json, screen

EXAMPLES = (
    "qkv methods",
    "qkv methods --kind cache",
    "qkv methods --json",
)


def command(
    kind: Annotated[
        str | None, typer.Option("--kind", "-k", metavar="KIND", help="Only this kind, e.g. cache.")
    ] = None,
    json: Annotated[bool, JSON] = False,
) -> None:
    """List every method, by kind."""
    from rich.table import Table
    from rich.text import Text

    from qkv.core import registry

    specs = registry.methods(kind)
    if json:
        print_json([s.to_dict() for s in specs])
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("method", "kind", "paper"):
        table.add_column(name, no_wrap=True)
    table.add_column("what it does")
    for s in specs:
        table.add_row(Text(s.id, style="bold"), s.kind, Text(s.paper), Text(s.summary or s.title))
    console = screen()
    console.print(table)
    console.print(f"\n{len(specs)} methods. `qkv show ID` explains one.", markup=False)
