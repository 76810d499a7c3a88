"""The target of a speculative loop: one row of text, one cache, blocks that are verified and settled.

Axes: N tokens of a block, M columns of the cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import qkv
from qkv.caches._stores.dense import DenseCache
from qkv.core.errors import InvalidInput, Refused
from qkv.decode._common.tree import tree_compute


@contextmanager
def opened(model: Any, who: str, method: Any = "full") -> Iterator[Any]:
    """The model, ready for a loop of one's own: checked, without gradients, under `method` where it carries none."""
    if not hasattr(model, "get_output_embeddings") or getattr(model.config, "is_encoder_decoder", False):
        raise InvalidInput(f"{who} needs a causal language model of transformers, not {type(model).__name__}")
    if model.training:
        raise Refused(
            f"{who}: the model is in training mode, where dropout makes every pass another; call model.eval() first"
        )
    with torch.no_grad():
        if "_qkv" in model.__dict__:
            yield model
        else:
            with qkv.applied(model, method):
                yield model


class Target:
    """A model that has read `text` so far. passes: forward passes."""

    def __init__(self, model: Any, prompt: Tensor, room: int, *, record: bool = True) -> None:
        """prompt: ``[1, T]``, no padding. room: columns to make place for."""
        from qkv.hosts.transformers import fresh_cache

        self.model, self.passes = model, 0
        self.prompt = prompt
        self.cache = fresh_cache(model, prompt.shape[1], room=room, record=record)

    @property
    def seen(self) -> int:
        """Columns of the cache."""
        return int(self.cache.get_seq_length())

    @property
    def device(self) -> torch.device:
        """Where tokens go in."""
        return self.prompt.device

    def read(self) -> Tensor:
        """The prompt, at once: logits ``[1, V]`` after its last token."""
        return self._forward(input_ids=self.prompt, logits_to_keep=1)

    def kept(self) -> int:
        """Most entries that a layer holds."""
        memories = [getattr(layer, "memory", None) for layer in self.cache.layers]
        return max(self.seen if memory is None else memory.kept() for memory in memories)

    def verify(self, tokens: Tensor, last: int, *, back: int = 0) -> Tensor:
        """A chain ``[N]`` behind what was read: logits ``[last, V]`` after each of its last tokens.

        back: positions by which it stands nearer than behind the whole text.
        """
        more: dict[str, Any] = {}
        if back:
            place = torch.arange(tokens.shape[0], device=self.device) + (self.seen - back)
            more["position_ids"] = place.unsqueeze(0)
        return self._forward(input_ids=tokens.unsqueeze(0), logits_to_keep=last, **more)

    def verify_tree(self, certain: Tensor, nodes: Tensor, depth: Tensor, above: Tensor) -> Tensor:
        """Certain tokens ``[C]`` and a tree behind them: logits ``[1 + n, V]`` after the newest and after each node.

        nodes: ``[n]`` tokens. depth: ``[n]``, 1 for the roots. above: bool ``[n, n]``, True at a node's ancestors and itself.
        """
        c, n, seen = certain.shape[0], nodes.shape[0], self.seen
        block = torch.zeros(c + n, c + n, dtype=torch.bool, device=self.device)
        block[:c, :c].fill_(True).tril_()
        block[c:, :c] = True
        block[c:, c:] = above
        mask = torch.cat((block.new_ones(c + n, seen), block), 1)
        place = torch.cat((torch.arange(seen, seen + c, device=self.device), seen + c - 1 + depth))
        return self._forward(
            input_ids=torch.cat((certain, nodes)).unsqueeze(0), position_ids=place.unsqueeze(0),
            attention_mask=mask[None, None], logits_to_keep=n + 1,
        )  # fmt: skip

    def settle(self, rejected: int) -> None:
        """Forget the newest `rejected` columns; the others are certain."""
        from qkv.hosts.transformers import take_back

        take_back(self.cache, rejected)

    def _forward(self, **inputs: Any) -> Tensor:
        self.passes += 1
        return self.model(past_key_values=self.cache, use_cache=True, **inputs).logits[0]

    # -- trees ----------------------------------------------------------------------------------------------------

    def grow_trees(self, who: str) -> None:
        """Make the cache ready for `verify_tree`, or raise `Refused`."""
        for layer in self.cache.layers:
            memory = getattr(layer, "memory", None)
            if not isinstance(memory, DenseCache):
                raise Refused(
                    f"{who}: a tree is verified on an exact cache, and {type(memory or layer).__name__} is none: what it evicts "
                    "or quantises while it reads the branches would not be what plain decoding does; propose a chain "
                    "(tree=(1, 1, 1, 1)), or leave the cache method out"
                )
            memory.tree = tree_compute
