"""Drafts that are language models: another one with the same tokenizer, or the first layers of the target itself."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from qkv.core.decoding import Sampling
from qkv.core.errors import InvalidParameter, Refused
from qkv.decode._common.accept import take
from qkv.decode._common.loop import Proposal
from qkv.decode._common.target import Target


def truncated(model: Any, layers: int) -> Any:
    """The first `layers` layers of a decoder with its own embedding, last norm and head: a draft that costs no memory.

    Every tensor is shared with the model. Raises `InvalidParameter` for a number of layers it does not have, `Refused` for a
    model that carries methods or whose layers are not one list.
    """
    config = model.config.get_text_config()
    count = config.num_hidden_layers
    if isinstance(layers, bool) or not isinstance(layers, int) or not 1 <= layers <= count:
        raise InvalidParameter(f"a draft of layers={layers!r}: this model has 1 to {count}")
    if any("_qkv" in m.__dict__ for m in model.modules()):
        raise Refused(
            "the model carries methods, which a draft would share: make the draft before qkv.apply, or revert first"
        )
    lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(lists) != 1:
        raise Refused(
            f"{type(model).__name__} has {len(lists)} lists of {count} layers; a draft needs to know which to cut"
        )
    shared = {id(x): x for x in (*model.parameters(), *model.buffers())}
    draft = copy.deepcopy(model, shared)
    parent, _, name = lists[0].rpartition(".")
    setattr(draft.get_submodule(parent), name, draft.get_submodule(lists[0])[:layers])
    mine = draft.config.get_text_config()
    mine.num_hidden_layers = layers
    if getattr(mine, "layer_types", None) is not None:
        mine.layer_types = mine.layer_types[:layers]
    return draft.eval()


def check_vocabulary(who: str, model: Any, draft: Any) -> None:
    """`Refused` unless both models speak of the same tokens, as far as can be seen from the models."""
    sizes = [m.config.get_text_config().vocab_size for m in (model, draft)]
    if sizes[0] != sizes[1]:
        raise Refused(
            f"{who}: the draft has a vocabulary of {sizes[1]} tokens and the model one of {sizes[0]}; a draft needs the same "
            "tokenizer"
        )
    if draft.training:
        raise Refused(f"{who}: the draft is in training mode; call draft.eval() first")


def same_tokenizer(who: str, tokenizer: Any, draft_tokenizer: Any) -> None:
    """`Refused` unless both tokenizers give every token the same number."""
    mine, its = tokenizer.get_vocab(), draft_tokenizer.get_vocab()
    if mine != its:
        token = next(t for t in (*mine, *its) if mine.get(t) != its.get(t))
        raise Refused(
            f"{who}: the two tokenizers differ: {token!r} is {mine.get(token)} for the model and {its.get(token)} for the draft"
        )


class ModelDraft:
    """A chain of `length` tokens from a causal language model with a cache of its own (see `Proposer`)."""

    trees = False

    def __init__(
        self, draft: Any, target: Target, length: int, sampling: Sampling, generator: torch.Generator | None, room: int
    ) -> None:
        self.length, self.sampling, self.generator = length, sampling, generator
        self.own = Target(draft, target.prompt.to(draft.device), room)
        self.ahead = 0  # guesses in the draft's cache that nobody has confirmed

    def propose(self, fresh: Sequence[int], room: int) -> Proposal:
        """See `Proposer`."""
        own, known = self.own, 0
        if own.seen:
            known = min(len(fresh) - 1, self.ahead)
            own.settle(self.ahead - known)
            logits = own.verify(torch.tensor(fresh[known:], device=own.device), 1)
        else:
            own.read()
            own.settle(0)
            logits = own.verify(torch.tensor(fresh[own.prompt.shape[1] :], device=own.device), 1)
        own.settle(0)
        tokens, chances = [], []
        for i in range(min(self.length, room)):
            if i:
                logits = own.verify(tokens[-1], 1)
            tokens.append(take(logits, self.sampling, self.generator))
            if not self.sampling.greedy:
                chances.append(self.sampling.probabilities(logits))
        self.ahead = len(tokens) - 1
        return Proposal(torch.cat(tokens), None, torch.cat(chances) if chances else None)

    def verified(self, certain: int, kept: Sequence[int]) -> None:
        """The next `propose` says what was kept."""
