"""What several commands share: consoles, options, models, readable sizes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.text import Text

from qkv.core.errors import InvalidParameter

if TYPE_CHECKING:
    from qkv.core.spec import Method

MODEL = typer.Argument(
    metavar="MODEL", help="smollm2 (the embedded default), a folder, or a hub id.", show_default=False
)
METHOD = typer.Option(
    "--method", "-m", metavar="ID[:NAME=VALUE,...]", help="A method with its settings, e.g. h2o:budget=0.25.",
    show_default=False,
)  # fmt: skip
DTYPE = typer.Option("--dtype", help="float32, bfloat16, float16 or float64.", show_default="float32", metavar="DTYPE")
DEVICE = typer.Option("--device", help="cpu, cuda, cuda:1, ...", show_default="cuda if there is one", metavar="DEVICE")
JSON = typer.Option("--json", help="Print JSON to stdout instead of text for people.")
SEED = typer.Option("--seed", help="Of every random draw.", min=0)


def screen() -> Console:
    """For results: stdout, 132 columns wide where no terminal says otherwise."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=132)


def messages() -> Console:
    """For everything else: stderr."""
    return Console(stderr=True, highlight=False)


@contextmanager
def said_how_to_go_on() -> Iterator[None]:
    """A run that ends by Ctrl-C says where it stopped and what goes on with it, before the command ends."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        if stopped.args:
            messages().print(Text(str(stopped).replace("resume=True", "--resume")), soft_wrap=True)
        raise


def fail(message: str) -> None:
    """Print an error for people to stderr."""
    console = messages()
    text = Text("error: ", style="bold red")
    text.append(message, style="not bold default")
    console.print(text, soft_wrap=True)


def print_json(data: Any) -> None:
    """Print plain data to stdout as valid JSON (no NaN)."""
    from qkv.bench.environment import plain

    json.dump(plain(data), sys.stdout, indent=2, ensure_ascii=False, allow_nan=False)
    sys.stdout.write("\n")


def parse_contexts(text: str) -> list[int]:
    """``"512,2k"`` as ``[512, 2048]``; k is 1024 tokens. Raises `InvalidParameter`."""
    out = []
    for item in text.split(","):
        word = item.strip().lower()
        digits, scale = (word[:-1], 1024) if word.endswith("k") else (word, 1)
        if not digits.isdecimal() or int(digits) < 1:
            raise InvalidParameter(f"--context {text!r}: {item!r} is no number of tokens; write e.g. 512,2k (k = 1024)")
        out.append(int(digits) * scale)
    return out


def parse_list(text: str) -> list[str]:
    """Comma-separated words."""
    return [x.strip() for x in text.split(",") if x.strip()]


def parse_numbers(text: str, option: str) -> tuple[float, ...]:
    """``"0.1,0.5"`` as numbers. Raises `InvalidParameter`."""
    try:
        return tuple(float(x) for x in parse_list(text))
    except ValueError:
        raise InvalidParameter(
            f"{option} {text!r} must be numbers with commas between them, e.g. 0.1,0.5,0.9"
        ) from None


def positive(value: float | None, option: str) -> float | None:
    """A finite number above 0, or None where the option was left out. Raises `InvalidParameter`."""
    if value is not None and not 0 < value < float("inf"):
        raise InvalidParameter(f"{option} {value:g} must be a finite number above 0, e.g. 0.001")
    return value


def methods_of(settings: Sequence[str]) -> list[Method]:
    """Configurations from what was given with ``-m``."""
    from qkv.core import registry

    return [registry.method(x) for x in settings]


def pick_device(device: str | None) -> str:
    """The given device, checked, or CUDA where there is one. Raises `InvalidParameter`."""
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except RuntimeError:
        raise InvalidParameter(f"--device {device!r} is no device; write cpu, cuda or cuda:0") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise InvalidParameter(
            f"--device {device}: this machine has no CUDA device that torch can use; leave it out for the CPU"
        )
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise InvalidParameter(
            f"--device {device}: there are only {torch.cuda.device_count()} CUDA devices, counted from 0"
        )
    return device


def load_model(name: str, dtype: str | None, device: str | None) -> tuple[Any, Any]:
    """Model and tokenizer, with a sign of life on stderr while it loads."""
    chosen = pick_device(device)
    quiet_libraries()
    from qkv.bench.assets import resolve_model

    with working(f"loading {name}"):
        return resolve_model(name, dtype, chosen)


def quiet_libraries() -> None:
    """No progress bars of transformers between ours (in this process only; their warnings stay)."""
    from transformers.utils import logging

    logging.disable_progress_bar()


@contextmanager
def working(text: str) -> Iterator[None]:
    """A spinner on a terminal, nothing elsewhere."""
    console = messages()
    if console.is_terminal:
        with console.status(Text(f"{text} ...")):
            yield
    else:
        yield


def duration(seconds: float) -> str:
    """``1:05`` or ``2:03:04``."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"
