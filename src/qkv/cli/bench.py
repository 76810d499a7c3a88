"""`qkv bench`: the main job."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from qkv.cli._shared import (
    DEVICE,
    DTYPE,
    JSON,
    METHOD,
    MODEL,
    SEED,
    duration,
    messages,
    parse_contexts,
    parse_list,
    parse_numbers,
    pick_device,
    print_json,
    quiet_libraries,
    screen,
)

EPILOG = (
    "Rows are written to results.jsonl in the run's folder as they are measured; after Ctrl-C or a crash the same command goes "
    "on where it stopped. Exit code 1 when a row failed."
)
EXAMPLES = (
    "qkv bench smollm2",
    "qkv bench smollm2 -m h2o:budget=0.25 -m kivi:bits=2 -c 1k,4k -t ppl,kl",
    "qkv bench ./my-model -m window:budget=512 --text book.txt -o runs/mine",
    "qkv bench smollm2 -m xattention+kivi:bits=4 --query-aware --json",
)


def command(
    model: Annotated[str, MODEL],
    method: Annotated[list[str] | None, METHOD] = None,
    context: Annotated[
        str | None,
        typer.Option(
            "--context", "-c", metavar="N,N", help="Prompt lengths in tokens; k = 1024.", show_default="512,1536"
        ),
    ] = None,
    tasks: Annotated[
        str, typer.Option("--tasks", "-t", metavar="TASK,TASK", help="Of ppl, kl, passkey.")
    ] = "ppl,kl,passkey",
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="The run's folder.", show_default="runs/MODEL-HASH"),
    ] = None,
    query_aware: Annotated[
        bool, typer.Option("--query-aware", help="passkey: the method sees the question while it compresses.")
    ] = False,
    text: Annotated[
        str | None,
        typer.Option(
            "--text", metavar="FILE", help="Your own text (UTF-8) for ppl and kl.", show_default="shakespeare"
        ),
    ] = None,
    windows: Annotated[int, typer.Option("--windows", help="ppl, kl: stretches of text per context.")] = 2,
    tokens: Annotated[int, typer.Option("--tokens", help="ppl, kl: tokens decoded and scored after each.")] = 24,
    depths: Annotated[
        str, typer.Option("--depths", metavar="D,D", help="passkey: places of the key, 0 to 1.")
    ] = "0.1,0.5,0.9",
    trials: Annotated[int, typer.Option("--trials", help="passkey: keys per depth.")] = 1,
    prefill_chunk: Annotated[
        int | None,
        typer.Option("--prefill-chunk", metavar="N", help="Prefill in blocks of N tokens.", show_default="one block"),
    ] = None,
    seed: Annotated[int, SEED] = 0,
    dtype: Annotated[str | None, DTYPE] = None,
    device: Annotated[str | None, DEVICE] = None,
    graph: Annotated[bool, typer.Option("--graph", help="Decode in CUDA graphs.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start the folder over (old rows are set aside).")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Measure again what failed before.")] = False,
    json: Annotated[bool, JSON] = False,
) -> int:
    """Compare methods by quality and cost on one model, in one run; a table, rows as JSON lines and an HTML report.

    Several -m are compared with each other; a+b applies both at once. `full`, the plain model, is always among them. Without
    -m the default job runs: one method of every sort, in minutes.
    """
    from qkv.bench import report, run
    from qkv.bench.default import CONTEXTS, METHODS
    from qkv.bench.job import Job
    from qkv.bench.tasks import Settings

    settings = Settings(
        windows=windows, tokens=tokens, depths=parse_numbers(depths, "--depths"), trials=trials, query_aware=query_aware,
        chunk=prefill_chunk, seed=seed,
    )  # fmt: skip
    job = Job.of(
        model, method or METHODS, parse_contexts(context) if context else CONTEXTS, parse_list(tasks),
        settings=settings, text=text, dtype=dtype, device=pick_device(device), graph=graph,
    )  # fmt: skip
    quiet_libraries()
    told = _told()
    try:
        results = run.run(job, out, fresh=fresh, retry=retry, listener=told)
    except KeyboardInterrupt:
        told.close()
        messages().print(told.where(), markup=False, soft_wrap=True)
        return 130
    finally:
        told.close()
    page = report.write(results)
    if json:
        print_json({"folder": results.folder, "report": page, "ok": not results.errors, "rows": results.rows})
    else:
        _show(results, page)
    return 1 if results.errors else 0


def _show(results: Any, page: Path) -> None:
    from rich.text import Text

    from qkv.bench import summary
    from qkv.bench.report import place

    console = screen()
    for table in summary.tables(summary.records(results.rows), console.width):
        console.print(table)
    for row in results.errors:
        said = Text(f"{summary.brief(row['method']['label'])} at {row['context']}, {row['task']}: ", style="red")
        said.append(f"{row['error']['type']}: {row['error']['message']}", style="default")
        console.print(said, soft_wrap=True)
    identity = results.manifest["identity"]
    dtype = identity["model"]["dtype"]
    note = (
        f"{dtype} on {place(identity)}; times are medians of one row; "
        "× is a multiple of full's; cache: bytes held, and their share of a plain cache."
    )
    console.print(Text(note, style="dim"), soft_wrap=True)
    console.print(Text(f"Rows    {results.folder / 'results.jsonl'}\nReport  {page}"), soft_wrap=True)


def _told() -> Any:
    """The listener: a bar with the time left on a terminal, one line a row elsewhere."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from qkv.bench import run, summary

    class Told(run.Listener):
        def __init__(self) -> None:
            self.console = messages()
            self.bar = Progress(
                TextColumn("{task.fields[rows]}", markup=False), BarColumn(bar_width=24), TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"), TextColumn("{task.description}", markup=False),
                console=self.console, transient=True, disable=not self.console.is_terminal,
            )  # fmt: skip
            self.task = self.bar.add_task("starting", total=None, rows="", left="")
            self.bar.start()
            self.folder: Path | None = None
            self.rows = self.have = 0
            self.total = self.done = self.before = 0.0
            self.started = time.monotonic()

        def stage(self, text: str) -> None:
            self.bar.update(self.task, description=text)

        working = stage

        def begin(self, folder: Path, total: float, done: float, rows: int, have: int) -> None:
            self.folder, self.rows, self.have = folder, rows, have
            self.total, self.done, self.before = total, done, done
            self.started = time.monotonic()
            if have:
                state = "all rows are there" if have == rows else f"{have} of {rows} rows are there; going on"
                self.console.print(f"{folder}: {state}", markup=False, soft_wrap=True)
            self._draw()

        def row(self, row: dict[str, Any], work: float) -> None:
            self.have, self.done = self.have + 1, self.done + work
            failed = row["status"] == "error"
            if failed or not self.console.is_terminal:
                said = f"{row['error']['type']}: {row['error']['message']}" if failed else f"{row['seconds']:.1f} s"
                name = summary.brief(row["method"]["label"])
                line = f"[{self.have}/{self.rows}] {name} {row['task']} {row['context']}: {said}"
                line += "" if self.have == self.rows else f" ({self._left()})"
                self.console.print(line, markup=False, soft_wrap=True, style="red" if failed else None)
            self._draw()

        def _left(self) -> str:
            worked = self.done - self.before
            if worked <= 0:
                return ""
            return duration((time.monotonic() - self.started) / worked * (self.total - self.done)) + " left"

        def _draw(self) -> None:
            self.bar.update(
                self.task,
                total=self.total,
                completed=self.done,
                rows=f"{self.have}/{self.rows} rows",
                left=self._left(),
            )

        def where(self) -> str:
            if self.folder is None:
                return "nothing was measured yet"
            return f"{self.have} of {self.rows} rows are safe in {self.folder}; the same command goes on from there"

        def close(self) -> None:
            self.bar.stop()

    return Told()
