"""Needles in haystacks, as token ids: what to hide, where it lies afterwards, and whether an answer is right."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from qkv.core.errors import InvalidInput, InvalidParameter, Refused

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"


@dataclass(frozen=True, kw_only=True)
class Needle:
    """A fact to hide and to ask for.

    text: what is inserted; it must contain `answer`, which must not be guessable without it. lead: how the reply begins, put
    after the prompt (helps base models; empty in the paper).
    """

    text: str
    question: str
    answer: str
    lead: str = ""

    def __post_init__(self) -> None:
        if not self.answer.strip() or self.answer not in self.text:
            raise InvalidInput(f"a needle's text must contain its answer; {self.answer!r} is not in {self.text!r}")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Tokens to read and what to find in them.

    ids: the prompt's token ids. span: [start, stop) of the needle in them. answer: unigrams of the right reply (words, or
    token ids as text). about: needle number, length and depth, for the records.
    """

    ids: tuple[int, ...]
    span: tuple[int, int]
    answer: tuple[str, ...]
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        start, stop = self.span
        if not 0 <= start < stop <= len(self.ids):
            raise InvalidInput(f"the span [{start}, {stop}) does not lie in a prompt of {len(self.ids)} tokens")
        if not self.answer:
            raise InvalidInput("a prompt needs the unigrams of its answer; without them every run would count")


def passkey(key: str) -> Needle:
    """A number to remember, named once, so that there is one place to copy it from."""
    return Needle(
        text=f" The pass key is {key}. Remember it.",
        question="What is the pass key?",
        answer=key,
        lead=" The pass key is",
    )


PASSKEYS = tuple(passkey(key) for key in ("48213", "90576", "31742"))


def unigrams(text: str) -> tuple[str, ...]:
    """Lower-case words and numbers."""
    return tuple(re.findall(r"[a-z0-9]+", text.lower()))


def rouge1_recall(said: Sequence[str], answer: Sequence[str]) -> float:
    """Percent of the answer's unigrams, counted with repeats, that were said."""
    have, want = Counter(said), Counter(answer)
    return 100.0 * sum(min(n, have[w]) for w, n in want.items()) / sum(want.values())


def find_span(ids: Sequence[int], needle: Sequence[int]) -> tuple[int, int]:
    """Where a needle lies in given tokens: an exact match, else the code's rule, the first window that shares > 90 % of its
    distinct tokens (it can be off by one). Raises `InvalidInput` when there is none.
    """
    n, want = len(needle), set(needle)
    if not n:
        raise InvalidInput("a needle of no tokens cannot be found")
    for i in range(len(ids) - n + 1):
        if list(ids[i : i + n]) == list(needle):
            return i, i + n
    for i in range(len(ids) - n + 1):
        if len(want.intersection(ids[i : i + n])) / len(want) > 0.9:
            return i, i + n
    raise InvalidInput(f"the needle of {n} tokens is not in the prompt of {len(ids)} tokens")


def encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def needle_ids(tokenizer: Any, needle: Needle) -> tuple[list[int], tuple[int, int]]:
    """The needle's tokens and the span of its answer in them."""
    start = needle.text.index(needle.answer)
    stop = start + len(needle.answer)
    try:
        coded = tokenizer(needle.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    except NotImplementedError:  # tokenizers written in Python know no offsets
        ids = encode(tokenizer, needle.text)
        return ids, find_span(ids, encode(tokenizer, " " + needle.answer))
    inside = [i for i, (a, b) in enumerate(coded["offset_mapping"]) if a < stop and b > start]
    return list(coded["input_ids"]), (inside[0], inside[-1] + 1)


def sentence_end(tokenizer: Any, ids: Sequence[int], at: int) -> int:
    """The nearest place at or before `at` that follows a full stop; 0 when there is none."""
    while at > 0 and not tokenizer.decode([ids[at - 1]]).rstrip().endswith("."):
        at -= 1
    return at


def frame(tokenizer: Any, needle: Needle, template: str, chat: bool) -> tuple[list[int], list[int]]:
    """Tokens before and after the context."""
    if "{question}" not in template:
        raise InvalidParameter(f"retrieval-heads: template={template!r} must contain {{question}}")
    question = template.replace("{question}", needle.question)
    if not chat:
        bos = getattr(tokenizer, "bos_token_id", None)
        head = [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []
        return head, encode(tokenizer, question + needle.lead)
    mark = "\x00"
    message = [{"role": "user", "content": f"<book>{mark}</book>\n{question.lstrip()}"}]
    rendered = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    before, found, after = rendered.partition(mark)
    if not found:
        raise Refused("retrieval-heads: this tokenizer's chat template changes its message; use chat=False")
    return encode(tokenizer, before), encode(tokenizer, after + needle.lead)
