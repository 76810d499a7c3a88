"""The folder of a bench run, which one process has at a time and one configuration fills.

`run.json` says what the run is, `results.jsonl` holds the rows, `reference/` what the unmodified model did. A row is on the disk
or it was never measured.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torch import Tensor

from qkv.bench.environment import plain, read_json, read_jsonl, write_json
from qkv.core.errors import InvalidInput, SavedDataError
from qkv.core.files import storage, write_whole


class RunFolder:
    """The files of a run. One process at a time; another configuration is refused."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path, self.identity = path, identity
        self.results = path / "results.jsonl"

    @classmethod
    @contextmanager
    def open(cls, path: str | Path, identity: dict[str, Any], fresh: bool = False) -> Iterator[RunFolder]:
        """Create the folder, or go on in one of the same identity. fresh: set its rows aside and start over.

        Raises `InvalidInput` for a folder of something else or of another configuration, `StorageError`.
        """
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise InvalidInput(f"{path} is a file; --out names a folder")
        manifest = path / "run.json"
        if path.is_dir() and not manifest.exists() and any(path.iterdir()):
            raise InvalidInput(f"{path} is not empty and holds no run of qkv bench; choose another folder with --out")
        with storage(path, "make the folder"):
            path.mkdir(parents=True, exist_ok=True)
        with _sole_user(path):
            folder = cls(path, plain(identity))
            if manifest.exists() and not fresh:
                folder._check(read_json(manifest))
            else:
                folder._start()
            yield folder

    def _start(self) -> None:
        old = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        with storage(self.path):
            if self.results.exists():
                self.results.rename(self.path / f"results-until-{old}.jsonl")
            for file in (self.path / "reference").glob("*.safetensors"):
                file.unlink()
        command = shlex.join(["qkv", *sys.argv[1:]])
        write_json(self.path / "run.json", {"identity": self.identity, "command": command, "started": now()})

    def _check(self, saved: Any) -> None:
        old = saved.get("identity") if isinstance(saved, dict) else None
        if not isinstance(old, dict):
            raise SavedDataError(f"{self.path / 'run.json'} is not the manifest of a bench run")
        changes = list(_differences(old, self.identity))
        if changes:
            raise InvalidInput(
                f"{self.path} holds a run of another configuration, and rows of both must not be mixed: "
                + "; ".join(changes[:4])
                + (f"; and {len(changes) - 4} more" if len(changes) > 4 else "")
                + ". Choose another folder with --out, or start this one over with --fresh"
            )

    def rows(self) -> dict[str, dict[str, Any]]:
        """The rows by key; the first of a key counts."""
        out: dict[str, dict[str, Any]] = {}
        for row in read_jsonl(self.results):
            if isinstance(row.get("key"), str):
                out.setdefault(row["key"], row)
        return out

    def forget_errors(self) -> None:
        """Drop the rows that hold an error, so that they are measured again."""
        rows = read_jsonl(self.results)
        good = [r for r in rows if r.get("status") != "error"]
        if len(good) < len(rows):
            from qkv.bench.environment import write_text

            write_text(self.results, "".join(json.dumps(plain(r), ensure_ascii=False) + "\n" for r in good))

    def reference(self, name: str) -> dict[str, Tensor] | None:
        """Tensors of the unmodified model, or None when they are not there (or not whole)."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.path / "reference" / f"{name}.safetensors"
        try:
            return load_file(path) if path.is_file() else None
        except SafetensorError:
            return None

    def keep_reference(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Write such tensors, whole or not at all."""
        from safetensors.torch import save

        path = self.path / "reference" / f"{name}.safetensors"
        write_whole(path, save({k: v.contiguous() for k, v in tensors.items()}))


def _differences(old: Any, new: Any, at: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new}):
            yield from _differences(old.get(name), new.get(name), f"{at}.{name}" if at else name)
    elif old != new:
        yield f"{at}: there {_short(old)}, now {_short(new)}"


def _short(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(v, dict) and "label" in v for v in value):
        value = [v["label"] for v in value]
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


@contextmanager
def _sole_user(path: Path) -> Iterator[None]:
    """An exclusive lock on the folder, where the system has such locks; it goes with the process."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with storage(path, "lock"):
        file = (path / ".lock").open("w")
    with file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidInput(
                f"another qkv bench is at work in {path}; wait for it, or choose another --out"
            ) from None
        yield


def now() -> str:
    """The time, in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
