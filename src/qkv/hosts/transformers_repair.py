"""Decoded tokens run again, densely: what sparse steps wrote into a cache is replaced every so many tokens.

A step that reads a part of the history gives slightly other hidden states, and so keys and values, to the layers above. A method
may ask (`CacheMethod.repairs`) that its newest tokens be taken back and run once more in one call, which reads everything. The
model's own forward does it: nothing but the token ids is kept, by the cache, where beams reorder them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from qkv.hosts.transformers_cache import QKVLayer


class Repairs:
    """Watches the forward passes of a session's model. every: tokens between two repairs; repairs: how many there were."""

    def __init__(self, session: Any, every: int) -> None:
        self.session, self.every, self.repairs = session, every, 0
        self._had = session.model.__dict__.get("forward")
        self._forward = session.model.forward

        # A partial and no closure: a copied model gets a copy of this that runs its own forward.
        session.model.__dict__["forward"] = functools.update_wrapper(functools.partial(_repaired, self), self._forward)

    def remove(self) -> None:
        """Put the model's forward back."""
        if self._had is None:
            self.session.model.__dict__.pop("forward", None)
        else:
            self.session.model.__dict__["forward"] = self._had

    def _before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note a single token, and repair when enough of them are there; a block of several is read densely as it comes."""
        ids, cache = kwargs.get("input_ids"), kwargs.get("past_key_values")
        layer = self._first(cache)
        if layer is None or layer.record_past:  # speculation takes tokens back by itself
            return
        if args or ids is None or ids.shape[1] != 1 or not layer.memory.seen:
            layer.decoded = None
            return
        if layer.decoded is not None and layer.decoded.shape[1] >= self.every:
            self._repair(cache, layer.decoded, kwargs)
            layer.decoded = None
        layer.decoded = ids if layer.decoded is None else torch.cat((layer.decoded, ids), 1)

    def _first(self, cache: Any) -> QKVLayer | None:
        if cache is None or cache.__dict__.get("_qkv") is not self.session:
            return None
        return next((layer for layer in cache.layers if isinstance(layer, QKVLayer)), None)

    def _repair(self, cache: Any, ids: Tensor, kwargs: dict[str, Any]) -> None:
        n = ids.shape[1]
        mask, more = kwargs.get("attention_mask"), {}
        if mask is not None:
            more["attention_mask"] = mask[:, :-1]
            if kwargs.get("position_ids") is not None:
                more["position_ids"] = (mask[:, :-1].long().cumsum(-1) - 1).clamp(min=0)[:, -n:]
        cache.crop(-n)
        with torch.no_grad():
            self._forward(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **more)
        self.repairs += 1


def _repaired(repairs: Repairs, *args: Any, **kwargs: Any) -> Any:
    """The forward pass of a model, and before it a repair where one is due."""
    repairs._before(args, kwargs)
    return repairs._forward(*args, **kwargs)
