"""The command line: parse, call, print. One file per command; nothing heavy is imported before a command needs it.

Exit codes: 0 all went well; 1 a law was broken, a row failed, or the work could not be finished; 2 wrong usage or input;
130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from qkv.core import errors

__all__ = ["main"]

WRONG_INPUT = (
    errors.UnknownName,
    errors.InvalidParameter,
    errors.InvalidInput,
    errors.Refused,
    errors.NotApplied,
    errors.SavedDataError,
    errors.MissingDependency,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code (`SystemExit`). arguments: without the program's name."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = _take_debug(given)
    try:
        code = _run(given, debug)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    raise SystemExit(code)


def _take_debug(given: list[str]) -> bool:
    """Remove ``--debug`` wherever it stands before a ``--``."""
    end = given.index("--") if "--" in given else len(given)
    found = "--debug" in given[:end]
    given[:end] = [x for x in given[:end] if x != "--debug"]
    return found


def _run(given: list[str], debug: bool) -> int:
    import typer

    from qkv.cli import _app
    from qkv.cli._shared import fail

    usage = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
    try:
        code = _app.app(given, prog_name="qkv", standalone_mode=False)
        if code == 130:
            print("interrupted", file=sys.stderr)
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return 130
    except SystemExit as error:  # typer leaves like this when the reader of a pipe has gone
        if isinstance(error.__context__, BrokenPipeError):
            raise error.__context__ from None
        raise
    except BrokenPipeError:
        raise
    except errors.QKVError as error:
        if debug:
            raise
        fail(str(error))
        return 2 if isinstance(error, WRONG_INPUT) else 1
    except Exception as error:
        if isinstance(error, usage):
            return _show_usage(error)
        if debug:
            raise
        text = " ".join(str(error).split())
        said = f"{type(error).__name__}: {text}" if text else type(error).__name__
        fail(f"unexpected {said[:500]}\nThis is not an error qkv foresaw; run again with --debug for the traceback.")
        return 1


def _show_usage(error: BaseException) -> int:
    """Usage errors as typer shows them; help for a missing command included."""
    show = getattr(error, "show", None)
    if show is not None:
        show()
    return int(getattr(error, "exit_code", 2))
