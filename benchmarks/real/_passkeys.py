"""Pass keys in repeated filler, asked for after the method has compressed the text: greedy, the same prompts for every method."""

from __future__ import annotations

import random
import re
from typing import Any

import torch
from _streams import applied

DIGITS = 5
HEAD = "There is an important number hidden inside a lot of irrelevant text. Find it and memorize it.\n"
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "What is the pass key? The pass key is"


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
