r"""A number hidden in repeated filler (the style of RULER's niah_single_1): is it still there after compression?

By default the method is query-agnostic: the haystack is prefilled and compressed first, the question comes after it as a
second block, then the answer is decoded greedily. Query-aware, both are prefilled together. Small models fail with book text
as filler even unmodified, so the filler is a repeated sentence; agreement with the unmodified model's answer is scored beside
accuracy, since even there the unmodified model is not always right.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from qkv.bench.measure import Pass, cost
from qkv.bench.tasks._task import Bench, Outcome, Settings, Task, Trial, tensor
from qkv.core.errors import InvalidInput

HEAD = "There is an important number hidden inside a lot of irrelevant text. Find it and memorize it.\n"
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "What is the pass key? The pass key is"
DIGITS = 5


@dataclass(frozen=True)
class Case:
    """One prompt: `haystack` ``[N]`` holds the key at `depth`, `question` ``[Q]`` asks for it; N + Q is the context."""

    depth: float
    key: str
    haystack: Tensor
    question: Tensor


def cases(bench: Bench, context: int) -> list[Case]:
    """Every prompt of a context, the same in every run with this seed. Raises `InvalidInput` for a context too short."""
    settings = bench.settings
    draw = random.Random(f"{settings.seed} {context}")
    out = []
    for depth in settings.depths:
        for _ in range(settings.trials):
            key = "".join(draw.choice("123456789") for _ in range(DIGITS))
            out.append(_case(bench, context, depth, key))
    return out


def _case(bench: Bench, context: int, depth: float, key: str) -> Case:
    head, question = [*bench.begin(), *bench.tokens(HEAD)], bench.tokens(QUESTION)
    needle, filler = bench.tokens(NEEDLE.format(key=key)), bench.tokens(FILLER)
    room = context - len(head) - len(question) - len(needle)
    if room < 2 * len(filler):
        raise InvalidInput(
            f"a context of {context} tokens is too short for the passkey task; it needs at least "
            f"{context - room + 2 * len(filler)} with this tokenizer"
        )
    whole, rest = divmod(room, len(filler))
    before = round(depth * whole)
    ids = [*head, *filler * before, *needle, *filler * (whole - before)]
    ids = [
        *head,
        *filler[len(filler) - rest :],
        *ids[len(head) :],
    ]  # the odd tokens come first, as the end of a sentence
    return Case(depth, key, tensor(ids), tensor(question))


def number(answer: str) -> str:
    """What counts as the answer: its first run of digits, or the stripped text when it has none."""
    found = re.search(r"\d+", answer)
    return found.group() if found else answer.strip()


@final
class Passkey(Task):
    """See the module."""

    id: ClassVar[str] = "passkey"
    title: ClassVar[str] = "Passkey retrieval"
    says: ClassVar[str] = (
        "A five-digit number hidden at several depths of repeated filler, asked for after the method has compressed the text "
        "(query-agnostic) unless stated otherwise; greedy. Agreement: the same answer as the unmodified model's."
    )

    def parameters(self, settings: Settings) -> dict[str, Any]:
        """See `Task.parameters`."""
        return {
            "depths": list(settings.depths),
            "trials": settings.trials,
            "query_aware": settings.query_aware,
            "prefill_chunk": settings.chunk,
        }

    def longest(self, settings: Settings, context: int) -> int:
        """See `Task.longest`."""
        return context + 2 * DIGITS

    def passes(self, settings: Settings) -> int:
        """See `Task.passes`."""
        return len(settings.depths) * settings.trials

    def check(self, bench: Bench, context: int) -> None:
        """See `Task.check`."""
        cases(bench, context)

    def reference(self, trial: Trial, context: int) -> dict[str, Tensor]:
        """The unmodified model's answers: token ids ``[n]`` per case."""
        return {f"case{i}": tensor(_ask(trial, c).tokens) for i, c in enumerate(cases(trial.bench, context))}

    def run(self, trial: Trial, context: int, reference: dict[str, Tensor]) -> Outcome:
        """See `Task.run`."""
        decode = trial.bench.tokenizer.decode
        passes, found = [], []
        for i, case in enumerate(cases(trial.bench, context)):
            done = _ask(trial, case)
            passes.append(done)
            answer, full = decode(done.tokens), decode(reference[f"case{i}"].tolist())
            found.append(
                {
                    "depth": case.depth,
                    "key": case.key,
                    "answer": answer,
                    "full_answer": full,
                    "correct": number(answer) == case.key,
                    "agrees": number(answer) == number(full),
                }
            )
        metrics = {
            "accuracy": sum(f["correct"] for f in found) / len(found),
            "agreement": sum(f["agrees"] for f in found) / len(found),
            "cells": found,
        }
        return Outcome(metrics, cost(passes))


def _ask(trial: Trial, case: Case) -> Pass:
    decode = trial.bench.tokenizer.decode
    ends = set(_ends(trial.bench))

    def stop(tokens: list[int]) -> bool:
        """The number is complete: something after it, or the end of the text."""
        return tokens[-1] in ends or bool(re.search(r"\d\D", decode(tokens)))

    haystack, question = case.haystack, case.question
    if trial.bench.settings.query_aware:
        haystack, question = torch.cat((haystack, question)), question[:0]
    return trial.runner.answer(haystack, question, 2 * DIGITS, stop)


def _ends(bench: Bench) -> list[int]:
    config = getattr(bench.model, "generation_config", None)
    end = getattr(config, "eos_token_id", None)
    return [] if end is None else [end] if isinstance(end, int) else list(end)
