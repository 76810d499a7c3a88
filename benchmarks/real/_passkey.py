"""Shared by the checks that ask for a hidden number: prompts of any length, and greedy answers, question token by token."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qkv.bench.tasks.passkey import DIGITS, FILLER, HEAD, NEEDLE, QUESTION


@dataclass(frozen=True)
class Hidden:
    """haystack, question ``[1, N]``; the key's tokens lie at begin .. end of the haystack."""

    depth: float
    key: str
    haystack: Tensor
    question: Tensor
    begin: int
    end: int


def hidden(tokenizer, length: int, depths: Sequence[float], trials: int = 1, seed: int = 0) -> list[Hidden]:
    """Prompts of `length` tokens with a five-digit number at each depth."""
    draw, out = random.Random(f"{seed} {length}"), []

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    head, filler, question = ids(HEAD), ids(FILLER), ids(QUESTION)
    for depth in depths:
        for _ in range(trials):
            key = "".join(draw.choice("123456789") for _ in range(DIGITS))
            needle = ids(NEEDLE.format(key=key))
            whole, rest = divmod(length - len(head) - len(needle) - len(question), len(filler))
            front = [*head, *filler[len(filler) - rest :], *filler * round(depth * whole)]
            text = [*front, *needle, *filler * (whole - round(depth * whole))]
            out.append(
                Hidden(
                    depth,
                    key,
                    torch.tensor([text]),
                    torch.tensor([question]),
                    len(front),
                    len(front) + len(needle),
                )
            )
    return out


@torch.no_grad()
def ask(model, tokenizer, case: Hidden, new: int = 8, chunk: int = 0, question: int = 1) -> str:
    """The number that the model answers with greedily. chunk: tokens of a prefill block (0: at once); question: of its blocks."""
    cache, haystack = None, case.haystack.to(model.device)
    out = None
    for part in haystack.split(chunk or haystack.shape[1], 1):
        out = model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
    for part in case.question.to(model.device).split(question, 1):
        out = model(input_ids=part, past_key_values=cache, use_cache=True)
    found: list[int] = []
    for _ in range(new):
        token = out.logits[:, -1:].argmax(-1)
        found.append(int(token))
        out = model(input_ids=token, past_key_values=cache, use_cache=True)
    match = re.search(r"\d+", tokenizer.decode(found))
    return match.group() if match else ""


def score(model, tokenizer, cases: Sequence[Hidden], **how: int) -> float:
    """Share of the numbers that are found."""
    return round(sum(ask(model, tokenizer, c, **how) == c.key for c in cases) / len(cases), 4)
