"""Shared by the checks of caches that store everything and read a part: quality at a number of keys read, and passkeys."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from _passkey import hidden, score
from _streams import applied, clock, divergence, losses, perplexity, tokens

from qkv.bench.record import Figure

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


def compare(model, tokenizer, methods: Mapping[str, object], *, prompt: int, new: int, windows: int) -> list[dict]:
    """A row per method: perplexity of `new` tokens decoded one by one after a prompt, KL to the full cache, agreement."""
    t0, found = time.perf_counter(), {name: [] for name in ["full", *methods]}
    for i in range(windows):
        ids = tokens(tokenizer, prompt + new, 20000 + i * 50000)
        with applied(model, None):
            loss, base = losses(model, ids, prompt=prompt, chunk=1)
        found["full"].append((loss, 0.0, 1.0))
        for name, method in methods.items():
            with applied(model, method):
                loss, logits = losses(model, ids, prompt=prompt, chunk=1)
            found[name].append((loss, *divergence(base, logits)))
        clock(f"window {i + 1} of {windows}", t0)
    return [
        {
            "method": name,
            "perplexity": perplexity(torch.cat([x[0] for x in rows])),
            "KL to full (nats/token)": round(sum(x[1] for x in rows) / len(rows), 4),
            "top-1 agreement": round(sum(x[2] for x in rows) / len(rows), 4),
        }
        for name, rows in found.items()
    ]


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
