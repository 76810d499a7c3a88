"""Files on the disk in one piece: whole or as they were, and their checksums."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qkv.core.errors import StorageError


@contextmanager
def storage(path: str | Path, doing: str = "write") -> Iterator[None]:
    """Turn an `OSError` of the block into a `StorageError` that names `path`, the cause and what was kept."""
    try:
        yield
    except StorageError:
        raise
    except OSError as e:
        cause = e.strerror or str(e)
        raise StorageError(f"cannot {doing} {path}: {cause}; what was there before is untouched. Free some space, or "
                           "choose a folder that can be written") from e  # fmt: skip


def write_whole(path: str | Path, data: str | bytes) -> Path:
    """Write `data` (text as UTF-8) so that `path` holds either all of it or what it held before. Makes missing folders.

    Raises `StorageError` when the disk is full or the place cannot be written; no temporary file stays.
    """
    path = Path(path)
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        number, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        try:
            with open(number, "wb") as file:
                file.write(data.encode("utf-8") if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise
        sync_folder(path.parent)
    return path


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` to fill. At the end it takes that place, at once; after an error what was there is untouched."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        if target.exists():
            os.replace(target, old)
        try:
            os.replace(temporary, target)
        except OSError:
            if old.exists():
                os.replace(old, target)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Make a new name in `folder` last through a power cut, where the system allows it."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    h = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            h.update(block)
    return h.hexdigest()
