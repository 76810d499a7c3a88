"""Where a number comes from, and how it reaches the disk in one piece.

`environment` describes machine, versions, commit and seed: every result carries it. `write_json` and `write_text` replace
a file or leave the old one untouched; `append_jsonl` adds one row for good; `read_jsonl` reads rows back after a crash.

JSON knows no NaN and no infinity: they are written as the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"`` and read
back as numbers, so that the files are valid everywhere and nothing is lost.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import qkv
from qkv.core.errors import InvalidInput, SavedDataError
from qkv.core.files import storage, sync_folder, write_whole

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "triton")
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def environment(*, seed: int | None = None) -> dict[str, Any]:
    """``{"machine", "versions", "commit", "seed"}`` of this process, as plain data.

    machine: cpu (model name), cores (usable by this process), threads (torch), memory_bytes, system, gpus (name and
    memory_bytes each). versions: python, qkv and `PACKAGES`, None for what is absent. commit: ``{"hash", "dirty"}``
    where qkv runs from a git checkout, else None. No host name, user name or path is recorded.
    """
    return {"machine": _machine(), "versions": _versions(), "commit": _commit(), "seed": seed}


def _machine() -> dict[str, Any]:
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory(),
        "system": f"{platform.system()} {platform.machine()}",
        "gpus": _gpus(),
    }


@cache
def _cpu() -> str:
    """The processor's model name, as the system tells it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    if sys.platform == "darwin":
        with suppress(OSError, subprocess.SubprocessError):
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    return platform.processor() or platform.machine() or "unknown"


@cache
def _memory() -> int | None:
    """Bytes of memory this process may use: the machine's, or its container's limit where that is lower."""
    found = []
    with suppress(ValueError, OSError, AttributeError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with suppress(OSError, ValueError):
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return min(found, default=None)


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    every = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return [{"name": p.name, "memory_bytes": p.total_memory} for p in every]


def _versions() -> dict[str, str | None]:
    """Versions without importing anything: what is installed, or None."""
    out: dict[str, str | None] = {"python": platform.python_version(), "qkv": qkv.__version__}
    for name in PACKAGES:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            out[name] = None
    out["torch"] = torch.__version__
    out["cuda"] = torch.version.cuda
    return out


def _commit() -> dict[str, Any] | None:
    """Hash and dirty flag of the checkout this very package lies in; None when it was installed from elsewhere."""
    root = Path(qkv.__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "HEAD").strip()
        return {"hash": head, "dirty": bool(_git(root, "status", "--porcelain", "--untracked-files=no").strip())}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout


# -- writing ---------------------------------------------------------------------------------------------------------


def write_text(path: str | Path, text: str) -> Path:
    """Write `text` (UTF-8) so that `path` holds either all of it or what it held before; see `qkv.core.files`."""
    return write_whole(path, text)


def write_json(path: str | Path, obj: Any) -> Path:
    """`obj` as indented JSON, by `write_text`. Raises `InvalidInput` for what is not plain data."""
    return write_text(path, json.dumps(plain(obj), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """The inverse of `write_json`. Raises `SavedDataError` for a missing or damaged file."""
    try:
        return _restore(json.loads(Path(path).read_text(encoding="utf-8")))
    except OSError as e:
        raise SavedDataError(f"cannot read {path}: {e.strerror or e}") from e
    except ValueError as e:  # undecodable bytes and JSON errors alike
        raise SavedDataError(f"{path} is not valid JSON: {e}") from e


def append_jsonl(path: str | Path, row: Mapping[str, Any]) -> None:
    """Add one row (a mapping) to a JSON-lines file; when this returns the row is on the disk.

    A torn last line, left by a crash, is cut off first: it never was a row. When the disk fills up half way the file is
    cut back to the rows it had, and `StorageError` is raised. Concurrent writers take turns.
    """
    if not isinstance(row, Mapping):
        raise InvalidInput(f"a row is a mapping of names to values, not {type(row).__name__}")
    line = (json.dumps(plain(row), ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
    path = Path(path)
    with storage(path, "append to"):
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        with open(path, "a+b", buffering=0) as file, _locked(file.fileno()):
            size = _whole(file)
            file.truncate(size)
            try:
                _write_all(file.fileno(), line)
                os.fsync(file.fileno())
            except BaseException:
                file.truncate(size)
                raise
        if new:
            sync_folder(path.parent)


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Every row of a JSON-lines file, in order; ``[]`` when there is none. A torn last line is left out.

    Raises `SavedDataError` (file and line number) for any other line that is not a JSON object.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as e:
        raise SavedDataError(f"cannot read {path}: {e.strerror or e}") from e
    lines = data.split(b"\n")
    torn = lines.pop()  # b"" after a complete file: each row ends in a newline
    rows = [_row(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    with suppress(SavedDataError):
        if torn.strip():  # complete but for its newline: written by hand
            rows.append(_row(path, len(lines) + 1, torn))
    return rows


def _row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = _restore(json.loads(line.decode("utf-8")))
    except ValueError as e:
        raise SavedDataError(f"{path}, line {number}, is not JSON: {e}; remove that line to use the others") from e
    if not isinstance(row, dict):
        raise SavedDataError(f"{path}, line {number}, holds {type(row).__name__}, not an object")
    return row


def _whole(file: Any) -> int:
    """Bytes of `file` up to the end of its last complete line."""
    size = file.seek(0, os.SEEK_END)
    step = 1 << 16
    end = size
    while end > 0:
        start = max(0, end - step)
        file.seek(start)
        block = file.read(end - start)
        cut = block.rfind(b"\n")
        if cut >= 0:
            end = start + cut + 1
            break
        end = start
    if end < size:  # a last line that is whole but for its newline (written by hand) is kept
        file.seek(end)
        with suppress(ValueError):
            json.loads(file.read(size - end).decode("utf-8"))
            _write_all(file.fileno(), b"\n")
            return size + 1
    return end


def _write_all(number: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(number, view) :]


@contextmanager
def _locked(number: int) -> Iterator[None]:
    """An exclusive lock on an open file, where the system has such locks; released on close."""
    try:
        import fcntl
    except ImportError:  # Windows: one writer at a time is the caller's affair
        yield
        return
    fcntl.flock(number, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(number, fcntl.LOCK_UN)


def plain(value: Any) -> Any:
    """`value` as JSON's own types. Methods, paths, dtypes, devices, sets, tensors and numpy scalars are understood.

    Raises `InvalidInput` for anything else, and for keys that are not strings, numbers or None.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else json.dumps(float(value))
    if isinstance(value, Mapping):
        return {_key(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain(v) for v in value), key=repr)
    if isinstance(value, (os.PathLike, torch.dtype, torch.device)):
        return str(value)
    if hasattr(value, "tolist"):  # tensors, numpy arrays and scalars
        return plain(value.tolist())
    if hasattr(value, "to_dict"):
        return plain(value.to_dict())
    raise InvalidInput(f"{type(value).__name__} is not plain data: {str(value)[:80]!r}")


def _key(key: Any) -> str:
    if isinstance(key, str):
        return key
    if key is None or isinstance(key, (bool, int, float)):
        return json.dumps(key)
    raise InvalidInput(f"a key of saved data is a string, not {type(key).__name__}: {str(key)[:80]!r}")


def _restore(value: Any) -> Any:
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, list):
        return [_restore(v) for v in value]
    if isinstance(value, dict):
        return {k: _restore(v) for k, v in value.items()}
    return value
