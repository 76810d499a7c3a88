"""Slots outside the model's own memory: in host memory (page-locked for a GPU) or in a memory-mapped file.

A `Shelf` holds one kind of tensor, ``[B, heads, slots, width]``, and grows by a small share. A file is given its blocks on
disk when it is made, so that a full disk is an error when room is asked for and never a crash when a page is written; before
each use it is looked for, so that a file that has gone is an error too.

Axes: B batch.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from qkv.caches._stores.dense import grown
from qkv.core.errors import StorageError


@final
class Shelf:
    """Tensors ``[B, heads, capacity, width]`` outside the model's memory.

    folder: where its file lies; None for host memory. label: what a message calls it.
    """

    def __init__(self, folder: str | Path | None = None, label: str = "") -> None:
        self.folder = None if folder is None else Path(folder)
        self.label = label
        self.drop()

    def drop(self) -> None:
        """Forget everything, and remove the file."""
        self._forget_file()
        self.data: Tensor | None = None

    # -- room -----------------------------------------------------------------------------------------------------

    def room(self, like: Tensor, slots: int, used: int = 0, *, pin: bool = False, exact: bool = False) -> Tensor:
        """The tensor, with room for `slots` slots of the kind of `like` ``[B, heads, ., width]``; the first `used` stay.

        pin: page-locked, where it is host memory. exact: no spare slots. Raises `StorageError` when the disk is full or the
        file has gone.
        """
        capacity = 0 if self.data is None else self.data.shape[2]
        need = slots if exact else grown(capacity, slots)
        if self.data is None or need > capacity:
            old = None if self.data is None else self.look()
            shape = (*like.shape[:2], need, like.shape[3])
            data, file = self._make(shape, like.dtype, pin or (old is not None and old.is_pinned()))
            if old is not None:
                data[:, :, :used] = old[:, :, :used]
            self._forget_file()
            self.data = data
            self._own_file(file)
        return self.look()

    def look(self) -> Tensor:
        """The tensor as it is. Raises `StorageError` when its file has gone or is shorter than it was."""
        assert self.data is not None, "nothing is stored"
        if self._path is not None:
            size = self.data.numel() * self.data.element_size()
            try:
                found = os.stat(self._path)
            except OSError as error:
                raise StorageError(
                    f"{self.label}: its file {self._path} has gone ({error.strerror}); what it held is lost. Start the "
                    "generation anew, with a folder that stays"
                ) from error
            if found.st_size < size or found.st_ino != self._inode:
                raise StorageError(
                    f"{self.label}: its file {self._path} was changed by somebody else ({found.st_size} of {size} bytes); "
                    "what it held is lost. Start the generation anew, with a folder of its own"
                )
        return self.data

    def advise(self) -> None:
        """Ask the operating system to read the file ahead; nothing for host memory."""
        if self._path is not None and hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # advice: whoever cannot take it reads when the time comes
                handle = os.open(self._path, os.O_RDONLY)
                try:
                    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(handle)

    def select(self, rows: Tensor) -> None:
        """The batch rows `rows`, repeated or reordered."""
        if self.data is None:
            return
        old = self.look()
        new = old.index_select(0, rows.to(old.device))
        if new.shape == old.shape:
            old.copy_(new)
            return
        data, file = self._make(tuple(new.shape), new.dtype, old.is_pinned())
        self._forget_file()
        self.data = data.copy_(new)
        self._own_file(file)

    def fill(self, x: Tensor, pin: bool = False) -> None:
        """Hold a copy of `x` and nothing else."""
        data, file = self._make(tuple(x.shape), x.dtype, pin)
        self._forget_file()
        self.data = data.copy_(x)
        self._own_file(file)

    def bytes(self) -> int:
        """Bytes held, spare capacity included."""
        return 0 if self.data is None else self.data.numel() * self.data.element_size()

    def __deepcopy__(self, memo: dict[int, Any]) -> Shelf:
        """A copy with a file of its own."""
        twin = Shelf(self.folder, self.label)
        memo[id(self)] = twin
        if self.data is not None:
            twin.fill(self.look(), self.data.is_pinned())
        return twin

    # -- files ------------------------------------------------------------------------------------------------------

    def _make(self, shape: Sequence[int], dtype: torch.dtype, pin: bool) -> tuple[Tensor, Path | None]:
        if self.folder is None:
            return torch.zeros(
                shape, dtype=dtype, pin_memory=pin
            ), None  # never NaN: unused slots are masked, not skipped
        size = torch.Size(shape).numel()
        path = _file(self.folder, size * dtype.itemsize, self.label)
        try:
            return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape), path
        except RuntimeError as error:
            _remove(path)
            raise StorageError(f"{self.label}: {path} cannot be mapped into memory ({error})") from error

    def _own_file(self, path: Path | None) -> None:
        self._path = path
        if path is not None:
            self._inode = os.stat(path).st_ino
            self._cleaner = weakref.finalize(self, _remove, path)

    def _forget_file(self) -> None:
        cleaner = self.__dict__.get("_cleaner")
        if cleaner is not None:
            cleaner()
        self._path: Path | None = None
        self._inode = 0
        self._cleaner: Any = None


def _file(folder: Path, size: int, label: str) -> Path:
    """A new file whose `size` bytes the disk has granted."""
    path: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix="qkv-", suffix=".kv", dir=folder)
        path = Path(name)
        try:
            _grant(handle, size)
        finally:
            os.close(handle)
        return path
    except OSError as error:
        if path is not None:
            _remove(path)
        raise StorageError(
            f"{label}: {size} bytes in {folder} were not to be had ({error.strerror or error}); free some space, or choose "
            "another folder. What was stored before is untouched"
        ) from error


def _grant(handle: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, max(1, size))
        return
    zeros = bytes(1 << 20)
    for start in range(0, size, len(zeros)):
        os.write(handle, zeros[: min(len(zeros), size - start)])


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
