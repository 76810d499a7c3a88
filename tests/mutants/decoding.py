"""Broken decodings, each by a mistake that people make; every law of the kind must catch its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import qkv
from qkv.core.decoding import Sampling
from qkv.core.spec import Limit
from qkv.decode._common import loop
from qkv.decode._common.target import Target
from qkv.decode.longspec import LongSpec
from qkv.decode.speckv import SpecKV
from qkv.decode.speculative import Speculative
from qkv.testing import mutant


def patched(where: Any, name: str, other: Callable[..., Any], cls: Any = Speculative, **facts: Any) -> Any:
    """`cls` whose `generate` runs while ``where.name`` is exchanged."""

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = getattr(where, name)
        setattr(where, name, other)
        try:
            return cls.generate(self, *args, **kwargs)
        finally:
            setattr(where, name, before)

    return mutant(cls, generate=generate, **facts)


def around(change: Callable[..., Any], cls: Any = Speculative, **facts: Any) -> Any:
    """`cls` whose `generate` goes through ``change(call, self, model, input_ids, needs)``."""

    def generate(self: Any, model: Any, input_ids: Tensor, **needs: Any) -> Any:
        return change(
            lambda **more: cls.generate(self, model, input_ids, **(needs | more)), self, model, input_ids, needs
        )

    return mutant(cls, generate=generate, **facts)


# -- what breaks losslessness ---------------------------------------------------------------------------------------


def keeps_one_too_many(drawn: list[int], tokens: list[int]) -> tuple[int, int]:
    """The first token that the model did not choose is kept too."""
    count, last = AGREED(drawn, tokens)
    return (count + 1, drawn[count + 1]) if count < len(tokens) else (count, last)


def trusts_the_ratio(p: Tensor, tokens: Tensor, q: Tensor, generator: Any = None) -> tuple[int, int]:
    """After a rejection it draws from p, not from what is left of it."""
    n = tokens.shape[0]
    ratio = (p[:n] / q).gather(-1, tokens[:, None]).squeeze(-1)
    kept = int((torch.rand(n, generator=generator, dtype=p.dtype) < ratio).long().cumprod(0).sum())
    return kept, int(torch.multinomial(p[kept], 1, generator=generator))


def forgets_too_little(self: Target, rejected: int) -> None:
    """A rejected token stays in the cache."""
    SETTLE(self, max(0, rejected - 1))


def rejected_stay_in_the_state(self: Target, rejected: int) -> None:
    """Compressing caches are only told to forget when something was rejected: they go on recording, and settle too late."""
    for layer in self.cache.layers:
        memory = getattr(layer, "memory", None)
        if memory is not None and hasattr(memory, "_forget_runs"):
            memory._forget_runs()
            memory.seen -= rejected
        else:
            layer.crop(-rejected)


def ends_nowhere(tokens: list[int], ends: frozenset[int]) -> list[int]:
    """What was accepted behind an end token stays."""
    return tokens


def all_nodes_see_all(parents: list[int]) -> Tensor:
    """A tree mask of ones."""
    return torch.ones(len(parents), len(parents), dtype=torch.bool)


def places_by_index(self: Target, certain: Tensor, nodes: Tensor, depth: Tensor, above: Tensor) -> Tensor:
    """A node stands at its number in the tree, not at its depth."""
    return VERIFY_TREE(self, certain, nodes, torch.arange(1, nodes.shape[0] + 1), above)


def ratio_of_chosen_children(
    target: Target, proposer: Any, proposal: Any, certain: Tensor, sampling: Sampling, generator: Any
) -> tuple[list[int], int, list[int]]:
    """The published rule: the draft's likeliest tokens are accepted as if they had been drawn from it (here with q = 1)."""
    parents, tokens = list(proposal.parents), proposal.tokens.tolist()
    above = loop.ancestors(parents)
    p = sampling.probabilities(target.verify_tree(certain, proposal.tokens, above.sum(-1), above))
    path, at = [], -1
    while (child := next((i for i, x in enumerate(parents) if x == at), None)) is not None:
        if torch.rand((), generator=generator) >= min(1.0, float(p[at + 1, tokens[child]]) / 0.5):
            break
        path, at = [*path, child], child
    last = int(torch.multinomial(p[at + 1], 1, generator=generator))
    kept = [tokens[i] for i in path]
    target.settle(len(tokens))
    proposer.verified(certain.shape[0], path)
    return kept, last, [*kept, last]


def one_short(self: SpecKV, keep: int, guess: int) -> Any:
    """Off by one around the last prompt token: the prompt ends one token early."""
    return POLICY(self, keep, guess + 1 if guess else 0)


AGREED, SETTLE, VERIFY_TREE, POLICY = loop._agreed, Target.settle, Target.verify_tree, SpecKV.policy


# -- what the model would notice --------------------------------------------------------------------------------------


def stays_applied(call: Any, self: Any, model: Any, ids: Tensor, needs: Any) -> Any:
    if "_qkv" not in model.__dict__:
        qkv.apply(model, "full")
    return call()


def training_mode(call: Any, self: Any, model: Any, ids: Tensor, needs: Any) -> Any:
    out = call()
    model.model.layers[0].train()
    return out


def reverts_when_all_is_well(call: Any, self: Any, model: Any, ids: Tensor, needs: Any) -> Any:
    fresh = "_qkv" not in model.__dict__
    if fresh:
        qkv.apply(model, "full")
    out = call()
    if fresh:
        qkv.revert(model)
    return out


def seed_of_torch(call: Any, self: Any, model: Any, ids: Tensor, needs: Any) -> Any:
    if needs.get("seed") is not None:
        torch.manual_seed(needs["seed"])
    return call(seed=None)


def forgets_the_seed(call: Any, self: Any, model: Any, ids: Tensor, needs: Any) -> Any:
    with torch.random.fork_rng():
        torch.seed()
        return call(seed=None)


def pads_as_tokens(call: Any, self: Any, model: Any, ids: Tensor, needs: Any) -> Any:
    return call(attention_mask=None)


def never_checked(who: str, model: Any, ids: Tensor, mask: Any, *args: Any, **kwargs: Any) -> Tensor:
    return torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()


def late_check(call: Any, self: Any, model: Any, ids: Tensor, needs: Any) -> Any:
    model(torch.zeros(1, 1, dtype=torch.long))
    return call()


def too_cold(call: Any, self: Any, model: Any, ids: Tensor, needs: Any) -> Any:
    sampling = needs.get("sampling", Sampling())
    return call(sampling=replace(sampling, temperature=0.5 * sampling.temperature))


MUTANTS: dict[str, list[tuple[str, Any]]] = {
    "lossless_greedy": [
        ("keeps one too many", patched(loop, "_agreed", keeps_one_too_many)),
        ("forgets too little", patched(Target, "settle", forgets_too_little)),
        ("padding as tokens", around(pads_as_tokens)),
        ("all nodes see all", patched(loop, "ancestors", all_nodes_see_all, LongSpec)),
        ("positions by node", patched(Target, "verify_tree", places_by_index, LongSpec)),
    ],
    "lossless_on_a_compressed_cache": [
        ("rejected tokens stay in the state", patched(Target, "settle", rejected_stay_in_the_state)),
    ],
    "lossless_sampling": [
        ("draws from p after a rejection", patched(loop, "accept_chain", trusts_the_ratio)),
        ("another temperature", around(too_cold)),
        ("ratio of chosen children", patched(loop, "_verify_tree", ratio_of_chosen_children, LongSpec)),
    ],
    "ends_with_the_end_token": [("goes on behind it", patched(loop, "_until", ends_nowhere))],
    "leaves_the_model_alone": [("stays applied", around(stays_applied)), ("training mode", around(training_mode))],
    "survives_an_interruption": [("reverts only when all is well", around(reverts_when_all_is_well))],
    "deterministic": [("seeds torch", around(seed_of_torch)), ("forgets the seed", around(forgets_the_seed))],
    "refuses_bad_prompts": [
        ("never checked", patched(loop, "check_prompt", never_checked)),
        ("checked too late", around(late_check)),
    ],
    "declared_limit": [
        ("claims a window is exact", mutant(Speculative, limits=(Limit("window", inputs={"budget": 5}),)))
    ],
}
