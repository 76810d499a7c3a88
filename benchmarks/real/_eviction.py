"""Shared by the checks of policies that evict by score: text after a compressed prompt, and pass keys asked for in both ways."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from _passkeys import prompts
from _streams import applied, clock, divergence, losses, perplexity, tokens
from torch import Tensor

import qkv
from qkv.bench.record import Figure
from qkv.bench.tasks.passkey import DIGITS, QUESTION

KL, HELD = "KL to full (nats/token)", "bytes held"


def continuation(
    model: Any, tokenizer: Any, methods: Mapping[str, Any], *, prompt: int, new: int, windows: int
) -> list[dict[str, Any]]:
    """A row per method (the full model first): real text fed token by token after a prompt absorbed at once."""
    t0, base, rows = time.perf_counter(), [], []
    texts = [tokens(tokenizer, prompt + new, 20000 + i * 50000) for i in range(windows)]
    for name, method in {"full": None, **methods}.items():
        with applied(model, method):
            scored = [losses(model, ids, prompt=prompt, chunk=1) for ids in texts]
            held = qkv.report(model).ratio
        base = base or [logits for _, logits in scored]
        gaps = [divergence(x, y) for x, (_, y) in zip(base, scored, strict=True)]
        rows.append(
            {
                "method": name,
                "perplexity": perplexity(torch.cat([loss for loss, _ in scored])),
                KL: round(sum(x[0] for x in gaps) / len(gaps), 4),
                "top-1 agreement": round(sum(x[1] for x in gaps) / len(gaps), 4),
                HELD: round(held, 4),
            }
        )
        clock(str(rows[-1]), t0)
    return rows


@torch.no_grad()
def recall(model: Any, tokenizer: Any, method: Any, cases: Sequence[tuple[list[int], str]], *, aware: bool) -> float:
    """Share of pass keys found. aware: the question ends the prompt that is compressed; else it comes after it, as a block."""
    question, right = tokenizer(QUESTION, add_special_tokens=False)["input_ids"], 0
    with applied(model, method):
        for ids, key in cases:
            blocks, cache, out = ([[*ids, *question]] if aware else [ids, question]), None, None
            for block in blocks:
                out = model(torch.tensor([block], device=model.device), past_key_values=cache, logits_to_keep=1)
                cache = out.past_key_values
            assert out is not None
            said: list[int] = []
            while len(said) < 2 * DIGITS and not re.search(r"\d\D", tokenizer.decode(said)):
                said.append(int(out.logits[0, -1].argmax()))
                out = model(torch.tensor([said[-1:]], device=model.device), past_key_values=cache)
            found = re.search(r"\d+", tokenizer.decode(said))
            right += found is not None and found.group() == key
    return round(right / len(cases), 3)


def with_recall(
    model: Any, tokenizer: Any, rows: list[dict[str, Any]], methods: Mapping[str, Any], quick: bool
) -> None:
    """Add both recalls to each row: a needle at three depths, twice each."""
    cases = prompts(tokenizer, *((300, (0.5,), 1) if quick else (2048, (0.1, 0.5, 0.9), 2)))
    t0 = time.perf_counter()
    for row in rows:
        method = methods.get(row["method"])
        for name, aware in (("recall, question after", False), ("recall, question inside", True)):
            row[name] = recall(model, tokenizer, method, cases, aware=aware)
        clock(f"{row['method']}: recall {row['recall, question after']} / {row['recall, question inside']}", t0)


def figures(rows: Sequence[Mapping[str, Any]], note: str) -> list[Figure]:
    """What a page shows first: KL, bytes, recall where there is one."""
    out = [Figure(f"perplexity, {row['method']}", row["perplexity"], "", note) for row in rows[:2]]
    for row in rows[1:]:
        out.append(Figure(f"KL to full, {row['method']}", row[KL], "nats/token", note))
    for row in rows:
        for name in row:
            if name.startswith("recall"):
                out.append(Figure(f"{name}, {row['method']}", row[name], "", "share of pass keys"))
    out.append(Figure(f"bytes held, {rows[1]['method']}", rows[1][HELD], "", "share of a full cache"))
    return out


def sizes(quick: bool) -> tuple[dict[str, int], str]:
    """Arguments of `continuation`, and what to say about them."""
    how = {"prompt": 240, "new": 12, "windows": 1} if quick else {"prompt": 2048, "new": 64, "windows": 2}
    return how, f"{how['windows']} x {how['new']} tokens decoded after prompts of {how['prompt']}"


def plain(budget: float = 0.2) -> dict[str, Any]:
    """The baselines of every table."""
    return {f"window {budget}": f"window:budget={budget}", f"h2o {budget}": f"h2o:budget={budget}"}


__all__ = ["HELD", "KL", "Figure", "Tensor", "continuation", "figures", "plain", "recall", "sizes", "with_recall"]
