"""Which KV heads retrieve: named by the user, or taken from what a probe saved."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from qkv.core.errors import InvalidParameter
from qkv.core.heads import HeadSet, HeadTable, read_json


def best_share(table: HeadTable, share: float) -> HeadSet:
    """The KV heads in the top `share` of all, each scored by the best query head of its group; at least one unless share is 0."""
    by_kv = table.by_kv_head()
    return by_kv.top(math.ceil(share * len(by_kv.measured) - 1e-9))


def retrieval_set(induction: HeadTable, echo: HeadTable, shares: tuple[float, float]) -> HeadSet:
    """Top share by induction score, and top share by echo score."""
    return best_share(induction, shares[0]) | best_share(echo, shares[1])


def scopes_of(heads: Any) -> tuple[tuple[int | None, ...], ...] | None:
    """The scope in tokens of every KV head ``[L][G]``, where `heads` is a file in which the probe induction-echo saved that."""
    if not isinstance(heads, str) or not Path(heads).is_file():
        return None
    data = read_json(heads)
    if not isinstance(data, dict) or data.get("type") != "alibi_scope":
        return None
    rows = HeadTable.from_dict(data.get("scope")).by_kv_head().values.tolist()
    return tuple(tuple(None if x != x else max(1, math.ceil(x)) for x in row) for row in rows)


def heads_of(heads: Any, shares: tuple[float, float], who: str) -> HeadSet:
    """A set of KV heads from one, from names, or from a file: a head set, or what the probe induction-echo saved.

    Raises `InvalidParameter`, `SavedDataError`.
    """
    if not isinstance(heads, str) or not (heads.endswith(".json") or Path(heads).is_file()):
        return HeadSet.of(heads)
    if not Path(heads).is_file():
        raise InvalidParameter(
            f"{who}: heads={heads!r} is no file; measure with `qkv inspect MODEL --probe induction-echo --out DIR` and pass "
            "heads='DIR/result.json', or name KV heads as \"layer.head\""
        )
    data = read_json(heads)
    if isinstance(data, dict) and data.get("type") == "induction_echo":
        tables = (HeadTable.from_dict(data.get(name)) for name in ("induction", "echo"))
        return retrieval_set(*tables, shares=shares)
    if isinstance(data, dict) and data.get("type") == "head_table":
        return best_share(HeadTable.from_dict(data), shares[0])
    return HeadSet.from_dict(data)
