"""`qkv inspect`: what the heads of a model do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qkv.cli._shared import DEVICE, DTYPE, JSON, MODEL, load_model, messages, print_json, screen

EXAMPLES = (
    "qkv methods --kind probe",
    "qkv inspect smollm2 --probe retrieval-heads --out runs/heads",
    "qkv inspect smollm2 --probe attention-sink-emergence --text book.txt --out runs/sinks",
)


def command(
    model: Annotated[str, MODEL],
    probe: Annotated[
        str,
        typer.Option("--probe", metavar="ID[:NAME=VALUE,...]", help="A probe with its settings.", show_default=False),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Gets result.json and table.png.", show_default=False)
    ],
    text: Annotated[
        str | None,
        typer.Option("--text", metavar="FILE", help="A text to measure on.", show_default="the probe's own inputs"),
    ] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Heads to list.")] = 10,
    dtype: Annotated[str | None, DTYPE] = None,
    device: Annotated[str | None, DEVICE] = None,
    json: Annotated[bool, JSON] = False,
) -> None:
    """Measure a score per head with a probe; the model itself is not changed."""
    from qkv.core import registry
    from qkv.core.errors import Refused

    chosen: Any = registry.method(probe)
    if chosen.spec.kind != "probe":
        raise Refused(
            f"{chosen.id} is of kind {chosen.spec.kind}, not a probe; `qkv methods --kind probe` lists the probes"
        )
    words = None
    if text is not None:
        from qkv.bench.assets import long_text

        words = long_text(text)
    network, tokenizer = load_model(model, dtype, device)
    show = _Progress()
    try:
        result = chosen.inspect(network, tokenizer, words, out, show)
    finally:
        show.close()
    if json:
        print_json({"probe": chosen.to_dict(), "out": out, "result": result.to_dict()})
        return
    _print(chosen, result, out, top)


def _print(probe: Any, result: Any, out: Path, top: int) -> None:
    from rich.table import Table
    from rich.text import Text

    heads = result.table
    console = screen()
    table = Table(title=f"{probe}: the {top} highest heads", title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("layer.head")
    table.add_column("score", justify="right")
    ranked = sorted(
        (
            (float(x), layer, head)
            for layer, row in enumerate(heads.values.tolist())
            for head, x in enumerate(row)
            if x == x
        ),
        reverse=True,
    )
    for score, layer, head in ranked[:top]:
        table.add_row(f"{layer}.{head}", f"{score:.4g}")
    console.print(table)
    console.print(Text(f"Result  {out / 'result.json'}\nPicture {out / 'table.png'}"), soft_wrap=True)


class _Progress:
    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = messages()
        self.bar = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self.task = self.bar.add_task("measuring", total=None)
        self.bar.start()

    def __call__(self, done: int, total: int, note: str) -> None:
        self.bar.update(self.task, completed=done, total=total, description=note or "measuring")

    def close(self) -> None:
        """Take the bar away."""
        self.bar.stop()
