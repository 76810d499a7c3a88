"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from qkv.core.errors import StorageError
from qkv.core.files import sha256_of, whole_folder, write_whole


def fill(folder: Path, text: str) -> None:
    with whole_folder(folder) as temporary:
        (temporary / "a").write_text(text)


def test_text_and_bytes_are_written_and_summed(tmp_path: Path) -> None:
    assert write_whole(tmp_path / "x" / "t", "é").read_bytes() == "é".encode()
    assert write_whole(tmp_path / "x" / "b", b"\0\1") == tmp_path / "x" / "b"
    assert sha256_of(tmp_path / "x" / "b") == hashlib.sha256(b"\0\1").hexdigest()


def test_a_folder_replaces_the_one_before_and_honours_the_umask(tmp_path: Path) -> None:
    fill(tmp_path / "f", "1")
    fill(tmp_path / "f", "2")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "f" / "a").read_text() == "2" and (tmp_path / "f").stat().st_mode == (
        tmp_path / "plain"
    ).stat().st_mode
    assert sorted(os.listdir(tmp_path)) == ["f", "plain"]


@pytest.mark.parametrize("broken", [(), (2,), (2, 3)])
def test_what_was_there_outlives_every_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: tuple) -> None:
    """An error while it is filled, in the move to its place, and in the move back of what was there."""
    fill(tmp_path / "f", "1")
    real, calls = os.replace, []

    def replace(a: Path, b: Path) -> None:
        calls.append(a)
        if len(calls) in broken:
            raise OSError("no")
        real(a, b)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError), whole_folder(tmp_path / "f") as temporary:
        (temporary / "a").write_text("2")
        if not broken:
            raise StorageError("full")
    (left,) = tmp_path.iterdir()
    assert (left / "a").read_text() == "1" and (left.name == "f" or len(broken) == 2)
