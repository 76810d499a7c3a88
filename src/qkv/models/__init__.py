"""See DESIGN: one file here is one method or one shared part; the registry finds methods by file name."""

from __future__ import annotations

import json
from pathlib import Path


def saved_kind(path: str | Path) -> str | None:
    """Which of qkv's own models a folder says it holds (``"causal-lm"``, ``"vit"``), or None for anything else."""
    try:
        found = json.loads((Path(path) / "qkv.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    kind = found.get("model") if isinstance(found, dict) else None
    return kind if isinstance(kind, str) else None
