"""Pass keys in repeated filler, asked for after the method has compressed the text: greedy, the same prompts for every method."""

from __future__ import annotations

import argparse
import random
import re
import time
from collections.abc import Mapping
from typing import Any

import torch
from _streams import applied, clock, divergence, losses, perplexity, tokens

from qkv.bench.tasks.passkey import DIGITS, FILLER, HEAD, NEEDLE, QUESTION


def prompts(
    tokenizer: Any, length: int, depths: tuple[float, ...], trials: int, seed: int = 0
) -> list[tuple[list[int], str]]:
    """(token ids of the text, key), `trials` for every depth; with the question they have about `length` tokens."""
    draw, out = random.Random(f"{seed} {length}"), []
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    head, filler, question = encode(HEAD), encode(FILLER), encode(QUESTION)
    for depth in depths:
        for _ in range(trials):
            key = "".join(draw.choice("123456789") for _ in range(DIGITS))
            needle = encode(NEEDLE.format(key=key))
            whole = (length - len(head) - len(question) - len(needle)) // len(filler)
            before = round(depth * whole)
            out.append(([*head, *filler * before, *needle, *filler * (whole - before)], key))
    return out


@torch.no_grad()
def accuracy(model: Any, tokenizer: Any, method: Any, cases: list[tuple[list[int], str]]) -> tuple[float, float]:
    """Share of right answers, and the share of a full cache's bytes that was held at the end."""
    import qkv

    question = tokenizer(QUESTION, add_special_tokens=False)["input_ids"]
    right, ratio = 0, 0.0
    with applied(model, method):
        for ids, key in cases:
            text = torch.tensor([ids], device=model.device)
            cache = model(text, use_cache=True, logits_to_keep=1).past_key_values
            out = model(torch.tensor([question], device=model.device), past_key_values=cache, use_cache=True)
            said: list[int] = []
            for _ in range(2 * DIGITS):
                said.append(int(out.logits[0, -1].argmax()))
                if re.search(r"\d\D", tokenizer.decode(said)):
                    break
                token = torch.tensor([said[-1:]], device=model.device)
                out = model(token, past_key_values=out.past_key_values, use_cache=True)
            found = re.search(r"\d+", tokenizer.decode(said))
            right += found is not None and found.group() == key
        ratio = qkv.report(model).ratio
    return round(right / len(cases), 3), round(ratio, 4)


def judged(
    a: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    methods: Mapping[str, Any],
    *,
    new: int,
    chunk: int,
    digits: int,
    depth: float,
) -> tuple[list[dict[str, Any]], str, str]:
    """A row per cache: pass keys and bytes at two lengths; perplexity of text after a prompt, and KL to the first cache's.

    new: tokens of text after each prompt, in blocks of `chunk`. digits: of the KL. depth: of the one pass key of a quick look.
    Returns the rows, and notes on the pass keys and on the text.
    """
    lengths, depths, trials = ((300,), (depth,), 1) if a.quick else ((2048, 4096), (0.1, 0.3, 0.5, 0.7, 0.9), 2)
    prompt, new, windows = (240, 16, 1) if a.quick else (2048, new, 2)
    texts = [tokens(tokenizer, prompt + new, 20000 + i * 50000) for i in range(windows)]
    rows, base, t0 = [], [], time.perf_counter()
    for name, method in methods.items():
        row: dict[str, Any] = {"cache": name}
        for n in lengths:
            cases = prompts(tokenizer, n, depths, trials)
            row[f"pass keys at {n}"], row[f"bytes at {n}"] = accuracy(model, tokenizer, method, cases)
        with applied(model, method):
            scored = [losses(model, ids, prompt=prompt, chunk=chunk) for ids in texts]
        base = base or [logits for _, logits in scored]
        row["perplexity"] = perplexity(torch.cat([loss for loss, _ in scored]))
        parts = [divergence(x, y)[0] for x, (_, y) in zip(base, scored, strict=True)]
        row["KL to full (nats/token)"] = round(sum(parts) / len(parts), digits)
        rows.append(row)
        clock(str(row), t0)
    note = f"{len(depths) * trials} pass keys at {lengths[-1]} tokens, asked for after compression"
    return rows, note, f"{windows} x {new} tokens after prompts of {prompt}, in blocks of {chunk}"
