"""`qkv verify`: the laws, here, on this machine."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from qkv.cli._shared import DEVICE, JSON, messages, pick_device, print_json, screen

EPILOG = "Exit code 1 when a law is broken."
EXAMPLES = (
    "qkv verify gla",
    "qkv verify h2o:budget=9 streamingllm",
    "qkv verify ./mine.py --quick",
    "qkv verify ./mine.py:budget=7",
)


def command(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ID | FILE.py][:SETTINGS]...",
            help="Methods, or files of your own; none: all.",
            show_default=False,
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out the laws that take seconds.")] = False,
    device: Annotated[str | None, DEVICE] = None,
    json: Annotated[bool, JSON] = False,
) -> int:
    """Run every law of some methods, or of all, and say which are kept. A FILE.py is executed."""
    # transformers warns of calls between its own parts, which is nothing a reader of laws could mend.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from qkv.testing import verify

    chosen = pick_device(device)
    show = None if json else _Progress()
    try:
        verdict = verify(*(targets or ()), device=chosen, quick=quick, progress=show)
    finally:
        if show is not None:
            show.close()
    if json:
        print_json({"ok": verdict.ok, "results": [_row(r) for r in verdict.results]})
    else:
        from rich.text import Text

        screen().print(Text(str(verdict)), soft_wrap=True)
    return 0 if verdict.ok else 1


def _row(r: Any) -> dict[str, Any]:
    return {
        "id": r.id, "law": r.law, "ok": r.ok, "seconds": round(r.seconds, 4), "message": r.message, "deviation": r.deviation
    }  # fmt: skip


class _Progress:
    """One bar on a terminal; broken laws are told at once."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = messages()
        self.bar = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=self.console, transient=True, disable=not self.console.is_terminal,
        )  # fmt: skip
        self.task: Any = None
        self.bar.start()

    def __call__(self, result: Any, done: int, total: int) -> None:
        if self.task is None:
            self.task = self.bar.add_task("laws", total=total)
        self.bar.update(self.task, completed=done, description=result.id[:60])
        if not result.ok:
            self.console.print(f"BROKEN {result.id}", style="red", markup=False)

    def close(self) -> None:
        """Take the bar away."""
        self.bar.stop()
