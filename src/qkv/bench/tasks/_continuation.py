"""The passes that `ppl` and `kl` share: a context is prefilled, then the text goes on token by token.

Decoding is the real thing: each token is fed alone, under the cache that the method keeps, so what it evicted or rounded is
gone. For every context length the same tokens are scored; a shorter context is the end of the longer one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qkv.bench.measure import Pass
from qkv.bench.tasks._task import Bench, Settings, Trial, short_text, tensor

PREFILL_SCORED = 128
"""Prompt positions, the last ones, whose own predictions are scored too: patterns act there."""


@dataclass(frozen=True)
class Window:
    """A stretch of text: `prompt` ``[C]`` is prefilled, `fed` ``[S]`` decoded; `targets` ``[S]`` follow each fed token."""

    prompt: Tensor
    fed: Tensor
    targets: Tensor


def windows(bench: Bench, context: int) -> list[Window]:
    """The windows of a context, the same in every run with this text, seed and longest context."""
    settings, longest = bench.settings, max(bench.contexts)
    key = ("spans", longest)
    if key not in bench.memo:
        bench.memo[key] = _spans(bench, longest + settings.tokens + 1)
    out = []
    for span in bench.memo[key]:
        begin = bench.begin()
        cut = len(span) - settings.tokens - 1
        prompt = (
            [*begin, *span[cut - context + len(begin) : cut]] if context > len(begin) else span[cut - context : cut]
        )
        out.append(Window(tensor(prompt), tensor(span[cut:-1]), tensor(span[cut + 1 :])))
    return out


def _spans(bench: Bench, need: int) -> list[list[int]]:
    """One stretch of `need` tokens from each of `windows` equal parts of the text, at a place drawn by the seed."""
    generator = torch.Generator().manual_seed(bench.settings.seed)
    count, size = bench.settings.windows, len(bench.text)
    part = size // count
    out = []
    for i in range(count):
        draw = float(torch.rand((), generator=generator))
        start = i * part
        room = part
        take = 6 * need + 64
        while True:  # as many characters as hold `need` tokens, at the drawn place of the part
            room = max(0, part - take)
            at = start + int(draw * room)
            ids = bench.tokens(bench.text[at : min(start + part, at + take)])
            if len(ids) >= need + 8 or take >= part:
                break
            take *= 2
        if len(ids) < need:
            raise short_text(len(ids) * count, need * count, f"a run of {count} windows")
        out.append(ids[1 : need + 1] if len(ids) > need else ids)  # a cut may split the first token
    return out


def scored(trial: Trial, context: int) -> list[tuple[Window, Pass]]:
    """Every window with its pass under the trial's methods; computed once for all tasks."""
    key = ("continuation", context)
    if key not in trial.memo:
        keep = min(PREFILL_SCORED, context - 1) or 1
        trial.memo[key] = [(w, trial.runner.run(w.prompt, w.fed, keep=keep)) for w in windows(trial.bench, context)]
    return trial.memo[key]


def parameters(settings: Settings) -> dict[str, int | None]:
    """The settings that shape these passes."""
    return {"windows": settings.windows, "tokens": settings.tokens, "prefill_chunk": settings.chunk}
