"""The `qkv` program: its commands in the order in which one meets them."""

from __future__ import annotations

import inspect as inspect_
from types import ModuleType
from typing import Annotated

import typer

from qkv.cli import bench, convert, distill, generate, inspect, methods, show, train, verify

HELP = """Published attention systems on the models you already use: shrink the cache, skip keys, convert heads, and measure
what each choice costs and saves. Start here:

\b
  qkv bench smollm2      every default method on a small model
  qkv methods            what there is
  qkv show h2o           one method: settings, limits, paper
  qkv bench MODEL -m h2o:budget=0.25 -m kivi:bits=2 -c 1k,4k
  qkv generate smollm2 -m streamingllm --prompt "The sea is"

MODEL is smollm2 (embedded, fetched once), a folder that save_pretrained wrote, or a hub id. A method is written with its
settings: id:name=value,name=value."""
HELP = "\n\n".join(p if "\b" in p else " ".join(p.split()) for p in HELP.split("\n\n"))

EPILOG = (
    "Exit codes: 0 well; 1 a law was broken, a row failed or work was left; 2 wrong usage or input; 130 interrupted."
)

app = typer.Typer(
    name="qkv", help=HELP, epilog=EPILOG, no_args_is_help=True, add_completion=False, rich_markup_mode="rich",
    pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip


def _version(wanted: bool) -> None:
    if wanted:
        import qkv

        print(f"qkv {qkv.__version__}")
        raise typer.Exit


@app.callback(epilog=EPILOG)
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors (may stand anywhere).")] = False,
) -> None:
    pass


_options.__doc__ = HELP

COMMANDS = {
    module.__name__.rpartition(".")[2]: module
    for module in (methods, show, verify, bench, generate, inspect, convert, distill, train)
}


def _help(module: ModuleType) -> str:
    """What a command does, and how it is used."""
    paragraphs = inspect_.cleandoc(module.command.__doc__ or "").split("\n\n")
    says = "\n\n".join(" ".join(p.split()) for p in paragraphs)
    return says + "\n\n\b\n" + "\n".join(f"  {example}" for example in module.EXAMPLES)


for name, module in COMMANDS.items():
    app.command(name=name, help=_help(module), epilog=getattr(module, "EPILOG", None))(module.command)
