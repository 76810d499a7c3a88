"""Shared by the checks of decoding methods: plain greedy decoding, timed; text in training and held-out blocks; the passkey."""

from __future__ import annotations

import random
import time
from typing import Any

import torch
from torch import Tensor

import qkv
from qkv.bench.assets import long_text
from qkv.bench.tasks.passkey import DIGITS, FILLER, HEAD, NEEDLE, QUESTION

BLOCK, HOLD = 8192, 10  # every tenth block of tokens is held out


def blocks(tokenizer, characters: int) -> tuple[Tensor, list[Tensor]]:
    """(one tensor to learn from, held-out blocks) of the first `characters` of the embedded text."""
    ids = torch.tensor(tokenizer(long_text()[:characters], add_special_tokens=False, verbose=False)["input_ids"])
    every = list(ids.split(BLOCK))[:-1]
    out = [x for i, x in enumerate(every) if i % HOLD == HOLD - 1]
    return torch.cat([x for i, x in enumerate(every) if i % HOLD != HOLD - 1]), out


def synchronise(device: torch.device) -> float:
    """The time when everything asked for so far is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def plain(model: Any, ids: Tensor, new: int, method: str = "full") -> tuple[Tensor, float]:
    """(greedy tokens ``[new]`` of `generate` under a cache, milliseconds per token, prefill included)."""
    with qkv.applied(model, method), torch.no_grad():
        start = synchronise(model.device)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0,
        )  # fmt: skip
        seconds = synchronise(model.device) - start
    return out[0, ids.shape[1] :].cpu(), 1000 * seconds / new


def decoded(method: Any, model: Any, ids: Tensor, new: int, **needs: Any) -> tuple[Any, float]:
    """(what a decoding method gave, milliseconds per token, prefill included)."""
    start = synchronise(model.device)
    done = method.generate(model, ids, max_new_tokens=new, **needs)
    return done, 1000 * (synchronise(model.device) - start) / new


def same(a: Tensor, b: Tensor) -> float:
    """Share of equal tokens up to the first that differs."""
    differ = (a.cpu() != b.cpu()).nonzero()
    return round((int(differ[0]) if len(differ) else len(a)) / len(a), 4)


def needle(tokenizer, context: int, depth: float, seed: int) -> tuple[Tensor, str]:
    """A prompt of `context` tokens that hides a key and ends with the question, and the key."""
    key = "".join(random.Random(seed).choice("123456789") for _ in range(DIGITS))

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    head, question, hidden, filler = ids(HEAD), ids(QUESTION), ids(NEEDLE.format(key=key)), ids(FILLER)
    room = context - len(head) - len(question) - len(hidden)
    whole, rest = divmod(room, len(filler))
    before = round(depth * whole)
    out = [*head, *filler[len(filler) - rest :], *filler * before, *hidden, *filler * (whole - before), *question]
    return torch.tensor([out]), key
