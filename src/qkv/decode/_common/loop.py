"""The speculative loop: a proposer guesses, the target verifies everything in one pass and keeps what it would have said.

Each row of a batch is a text of its own (rows accept different numbers of tokens), decoded one after the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from qkv.core.decoding import Generated, Progress, Sampling, check_prompt, end_tokens, generator_of, joined
from qkv.decode._common.accept import accept_chain, take, walk
from qkv.decode._common.target import Target, opened
from qkv.decode._common.tree import ancestors


@dataclass(frozen=True)
class Proposal:
    """Guesses for what follows.

    tokens: ``[n]``. parents: index of each token's parent, -1 for the roots; None: a chain. q: ``[n, V]`` the distribution that
    each token of a chain was drawn from; None: the tokens were chosen, not drawn.
    """

    tokens: Tensor
    parents: Sequence[int] | None = None
    q: Tensor | None = None


class Proposer(Protocol):
    """Something that guesses. One instance serves one row."""

    trees: bool

    def propose(self, fresh: Sequence[int], room: int) -> Proposal | None:
        """Guess after the certain tokens `fresh` (the first time: the whole text), at most `room` deep; None: no guess.

        `fresh` begins with the tokens of the last proposal that were kept and ends with one that the target has not read.
        """
        ...

    def verified(self, certain: int, kept: Sequence[int]) -> None:
        """The target has read `certain` tokens for good and behind them a tree, of which the nodes `kept` were accepted."""


Begin = Callable[[Target, torch.Generator | None], Proposer]


@dataclass
class _Row:
    tokens: list[int]
    passes: int
    gains: list[int]
    proposed: int


def speculate(
    who: str,
    model: Any,
    input_ids: Tensor,
    begin: Begin,
    *,
    max_new_tokens: int,
    attention_mask: Tensor | None,
    sampling: Sampling,
    eos_token_id: int | tuple[int, ...] | None,
    seed: int | None,
    progress: Progress | None,
    depth: int,
    nodes: int,
) -> Generated:
    """Decode every row of ``[B, T]``. begin: makes a row's proposer from its target. depth, nodes: of the largest proposal."""
    mask = check_prompt(who, model, input_ids, attention_mask, max_new_tokens)
    ends, start, t = end_tokens(eos_token_id), time.perf_counter(), input_ids.shape[1]
    rows: list[_Row] = []
    with opened(model, who):
        generator = generator_of(seed, model.device)
        for ids, real in zip(input_ids, mask, strict=True):
            prompt = ids[real].to(model.device).unsqueeze(0)
            target = Target(model, prompt, prompt.shape[1] + max_new_tokens + 2 * (depth + 1) + nodes)
            told = _told(progress, len(rows), len(input_ids), max_new_tokens)
            rows.append(_one(target, begin, max_new_tokens, sampling, ends, generator, told, depth))
    sequences, lengths = joined(input_ids, [row.tokens for row in rows], ends)
    gains = [g for row in rows for g in row.gains]
    notes = {
        "gains": [row.gains for row in rows],
        "tokens per pass": round(sum(gains) / max(1, len(gains)), 4),
        "proposed": sum(row.proposed for row in rows),
    }
    return Generated(sequences, t, lengths, sum(row.passes for row in rows), time.perf_counter() - start, notes)


def _told(progress: Progress | None, row: int, rows: int, new: int) -> Callable[[int], None]:
    def tell(done: int) -> None:
        if progress is not None:
            progress(row * new + done, rows * new, f"row {row + 1} of {rows}")

    return tell


def _one(
    target: Target,
    begin: Begin,
    new: int,
    sampling: Sampling,
    ends: frozenset[int],
    generator: torch.Generator | None,
    tell: Callable[[int], None],
    depth: int,
) -> _Row:
    """One row: read the prompt, then guess, verify, settle until it ends."""
    logits = target.read()
    target.settle(0)
    proposer = begin(target, generator)
    if proposer.trees:
        target.grow_trees("this decoding")
    fresh = take(logits, sampling, generator).tolist()
    row = _Row(list(fresh), 1, [], 0)
    waiting = list(fresh)  # certain, and not in the target's cache yet
    told: list[int] = [*target.prompt[0].tolist(), *fresh]
    while len(row.tokens) < new and row.tokens[-1] not in ends:
        room = min(depth, new - len(row.tokens) - 1)
        proposal = proposer.propose(told, room) if room else None
        kept, last, waiting = _verify(target, proposer, proposal, waiting, sampling, generator)
        fresh = [*kept, last]
        row.passes += 1
        row.gains.append(len(fresh))
        row.proposed += 0 if proposal is None else proposal.tokens.shape[0]
        told = fresh
        row.tokens += _until(fresh, ends)
        tell(len(row.tokens))
    return row


def _until(tokens: list[int], ends: frozenset[int]) -> list[int]:
    """Up to the first end token, which counts."""
    at = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: at + 1]


def _verify(
    target: Target,
    proposer: Proposer,
    proposal: Proposal | None,
    waiting: list[int],
    sampling: Sampling,
    generator: torch.Generator | None,
) -> tuple[list[int], int, list[int]]:
    """(kept tokens, the token after them, certain tokens that the target's cache lacks)."""
    certain = torch.tensor(waiting, device=target.device)
    if proposal is None or proposal.parents is None:
        guesses = certain.new_empty(0) if proposal is None else proposal.tokens
        n = guesses.shape[0]
        logits = target.verify(torch.cat((certain, guesses)), n + 1)
        if proposal is not None and proposal.q is not None and not sampling.greedy:
            count, last = accept_chain(sampling.probabilities(logits), guesses, proposal.q, generator)
            kept = guesses[:count].tolist()
        else:
            *drawn, tokens = torch.stack(
                (take(logits, sampling, generator), torch.cat((guesses, guesses.new_zeros(1))))
            ).tolist()
            count, last = _agreed(drawn[0], tokens[:n])
            kept = tokens[:count]
        target.settle(n - count)
        proposer.verified(len(waiting) + count, ())
        return kept, last, [last]
    return _verify_tree(target, proposer, proposal, certain, sampling, generator)


def _agreed(drawn: list[int], tokens: list[int]) -> tuple[int, int]:
    """How far a chosen chain agrees with the tokens drawn behind each of its own, and the token after that."""
    count = 0
    while count < len(tokens) and drawn[count] == tokens[count]:
        count += 1
    return count, drawn[count]


def _verify_tree(
    target: Target,
    proposer: Proposer,
    proposal: Proposal,
    certain: Tensor,
    sampling: Sampling,
    generator: torch.Generator | None,
) -> tuple[list[int], int, list[int]]:
    assert proposal.parents is not None
    parents, n = list(proposal.parents), proposal.tokens.shape[0]
    above = ancestors(parents).to(target.device)
    logits = target.verify_tree(certain, proposal.tokens, above.sum(-1), above)
    drawn = take(logits, sampling, generator)
    both = torch.cat((drawn, proposal.tokens)).tolist()
    path, last = walk(both[: n + 1], both[n + 1 :], parents)
    kept = [both[n + 1 + i] for i in path]
    target.settle(n)
    proposer.verified(certain.shape[0], path)
    return kept, last, [*kept, last]
