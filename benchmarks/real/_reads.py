"""Shared by the checks of caches that store everything and read a part: quality at a number of keys read, and passkeys."""

from __future__ import annotations

from collections.abc import Mapping

from _passkey import hidden, score
from _streams import applied

from qkv.bench.record import Figure

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


def passkeys(model, tokenizer, table: list[dict], methods: Mapping[str, object], *, length: int, depths=DEPTHS) -> None:
    """Adds to each row of the table the share of numbers found at some depths of `length` tokens; the question is decoded."""
    cases = hidden(tokenizer, length, depths)
    name = f"numbers found in {length} tokens"
    for row in table:
        method = methods.get(row["method"])
        if method is None and row["method"] != "full":
            row[name] = ""
            continue
        with applied(model, method):
            row[name] = score(model, tokenizer, cases)


def figures(table: list[dict], names: list[str], note: str) -> list[Figure]:
    """The main numbers of some rows."""
    by = {row["method"]: row for row in table}
    out = [Figure(f"perplexity, {n}", by[n]["perplexity"], "", note) for n in names]
    out += [
        Figure(f"KL to full, {n}", by[n]["KL to full (nats/token)"], "nats/token", note) for n in names if n != "full"
    ]
    for n in names:
        out += [
            Figure(f"{k}, {n}", v, "", "a number at each of five depths")
            for k, v in by[n].items()
            if k.startswith("numbers found") and v != ""
        ]
    return out
