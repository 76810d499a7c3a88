"""Checks on real text that go on where they were cut off: each step's plain data is kept below ``runs/real``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qkv.bench.environment import read_json, write_json


def kept(a: argparse.Namespace, name: str, make: Callable[[], Any]) -> Any:
    """What `make` gives, from an earlier run with the same arguments if there was one. Delete the folder to measure anew."""
    path = Path("runs/real") / f"{a.device}-{a.dtype}{'-quick' * a.quick}" / f"{name}.json"
    if path.is_file():
        return read_json(path)
    data = make()
    write_json(path, data)
    return data
