"""A linearised attention as transformers' decoder layers call it: a drop-in for an attention module, with a cache of its own.

It does not go through the attention interface while training, so that no operator, pattern or steering can be put in its
place; while generating it hands its tokens to its memory the way every layer does.
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from qkv.core.errors import Refused
from qkv.hosts._decoder import DecoderAttention
from qkv.hosts.transformers import QKVLayer, attention_function
from qkv.layers._linearised import LinearisedProjections, LinearisedShape, packed
from qkv.layers._linearised_memory import LinearisedMemory


@final
class TransformersLinearisedAttention(DecoderAttention, LinearisedProjections):
    """See the module. config, layer_idx: of the module it replaces."""

    memory = LinearisedMemory
    keeps = "keeps a ring and a recurrent state"

    def __init__(self, shape: LinearisedShape, config: Any, layer_idx: int, **factory: Any) -> None:
        super().__init__(shape, **factory)
        self.stand_in(
            config,
            layer_idx,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            value_dim=shape.value_dim,
        )
        self.scaling = shape.scale

    def qkv_cache_layer(self) -> QKVLayer:
        """A fresh cache layer: a ring and a recurrent state."""
        return QKVLayer(LinearisedMemory(self), self.__dict__["_qkv"])

    def heads(self, hidden: Tensor, cos: Tensor, sin: Tensor, real: Tensor | None = None) -> Tensor:
        """What the heads give to `o_proj` for a whole sequence, ``[B, N, H E]``. real: bool ``[B, N]``."""
        return self.mix(self.read(hidden, cos, sin), real)[0].transpose(1, 2).flatten(2)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """As `LlamaAttention.forward`; a cache must hold this layer's own `qkv_cache_layer`."""
        cos, sin = self.angles(position_embeddings)
        if past_key_values is None:
            state = self.__dict__.get("_qkv")
            if state is not None:
                state.tally.calls += 1
            return self.o_proj(self.heads(hidden_states, cos, sin, _real(attention_mask, hidden_states.shape[1]))), None
        self.check_cache(past_key_values)
        tokens = self.read(hidden_states, cos, sin)
        query, key = packed(tokens, self.shape)
        key, value = past_key_values.update(key, tokens.v, self.layer_idx)
        out, _ = attention_function(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)
        return self.o_proj(out.flatten(2)), None


def _real(mask: Tensor | None, n: int) -> Tensor | None:
    """Bool ``[B, N]``, False = padding, from the mask that the model passes along. Raises `Refused` for another mask."""
    if mask is None:
        return None
    mask = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    real = mask[:, 0, -1, :n]
    if mask.shape[-2] > 1:
        real = mask[:, 0].diagonal(dim1=-2, dim2=-1)
        causal = torch.ones(n, n, dtype=torch.bool, device=mask.device).tril()
        want = causal & real[:, None, :]
        same = bool(((mask[..., :n] == want[:, None]) | ~real[:, None, :, None]).all())
        if not same:
            raise Refused(
                "a linearised attention takes padding only; pass a 2-D attention_mask (no packed or custom masks)"
            )
    begins = real & ~torch.nn.functional.pad(real, (1, -1))
    if bool((begins.sum(-1) > 1).any()):
        raise Refused(
            "a linearised attention counts its window in columns; padding must be on the left or on the right"
        )
    return real
