"""Which key channels matter, per layer and KV head: the file that a calibration writes and `double-sparsity` reads.

    {"format": 1, "score": "qk", "head_dim": 64, "tokens": 16384, "model": "...", "order": [layers][KV heads][head_dim]}

`order` lists the channels of a head from the most to the least important.

Axes: L layers, G key/value heads, D head width.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from qkv.core.errors import InvalidParameter, SavedDataError
from qkv.core.files import write_whole

FORMAT = 1


@dataclass(frozen=True)
class Channels:
    """order: ``[L][G][D]``. score: the statistic. tokens: how many were looked at. model: fingerprint of the model's weights."""

    order: Sequence[Sequence[Sequence[int]]]
    score: str
    head_dim: int
    tokens: int
    model: str

    def save(self, path: str | Path) -> Path:
        """Write the file, whole or not at all. Raises `StorageError`."""
        return write_whole(path, json.dumps({"format": FORMAT} | asdict(self)))


def load(path: str) -> Channels:
    """Read a file; it is read again when it has changed. Raises `InvalidParameter` (no file), `SavedDataError` (damaged)."""
    try:
        stat = os.stat(path)
    except OSError:
        raise InvalidParameter(
            f"double-sparsity: channels={path!r} is no file; make one with qkv.probes._key_channels.calibrate_channels(model, "
            "data).save(path), or leave channels='prompt'"
        ) from None
    return _load(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=8)
def _load(path: str, changed: int, size: int) -> Channels:
    if size > 1 << 28:
        raise SavedDataError(f"{path} holds {size} bytes; a file of key channels is far smaller")
    try:
        data: Any = json.loads(Path(path).read_text(encoding="utf-8"))
        if data.pop("format") != FORMAT:
            raise SavedDataError(f"{path} was written by another version of qkv")
        out = Channels(**data)
        want = list(range(out.head_dim))
        if not out.order or any(sorted(head) != want for layer in out.order for head in layer):
            raise ValueError("an order is not a permutation of the channels")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SavedDataError(f"{path} is no file of key channels: {error}") from error
    return out


__all__ = ["Channels", "load"]
