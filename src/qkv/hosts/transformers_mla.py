"""The MLA layer as transformers' decoder layers call it: a drop-in for an attention module, with a latent cache.

Keys are [no-position part | rotary part]; the rotary angles are columns of the cos and sin that the model passes along, which
are exact for the model's own frequencies whatever their scaling: `stride` takes every stride-th frequency, `repeat` serves
several components per frequency.
"""

from __future__ import annotations

from typing import Any, final

from torch import Tensor

from qkv.caches._stores.latent import LatentCache
from qkv.hosts._decoder import DecoderAttention
from qkv.hosts.transformers import QKVLayer, attention_function
from qkv.layers.mla import LatentProjections, MLAShape


@final
class TransformersMLA(DecoderAttention, LatentProjections):
    """MLA behind the forward signature of `LlamaAttention`.

    config, layer_idx: of the module it replaces. stride, repeat: see the module's docstring. full_width: numbers a token that
    the replaced module cached. dropout: attention dropout in training.
    """

    qkv_attention = True
    memory = LatentCache
    keeps = "caches latents"

    def __init__(
        self, shape: MLAShape, config: Any, layer_idx: int, *, stride: int, repeat: int, full_width: int,
        dropout: float = 0.0, **factory: Any,
    ) -> None:  # fmt: skip
        super().__init__(shape, **factory)
        self.stand_in(
            config, layer_idx, heads=shape.heads, kv_heads=shape.kv_heads, head_dim=shape.nope_dim + shape.rope_dim,
            value_dim=shape.value_dim,
        )  # fmt: skip
        self.attention_dropout, self.stride, self.repeat, self.full_width = dropout, stride, repeat, full_width

    def qkv_cache_layer(self) -> QKVLayer:
        """A fresh cache layer that holds latents and rotary keys."""
        return QKVLayer(LatentCache(self, self.full_width), self.__dict__["_qkv"])

    def columns(self, table: Tensor) -> Tensor:
        """The layer's angles ``[B|1, N, p/2]`` out of the model's cos or sin ``[B|1, N, R]`` (both halves alike)."""
        mine = table[..., : table.shape[-1] // 2 : self.stride]
        return mine.repeat(1, 1, self.repeat) if self.repeat > 1 else mine

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """As `LlamaAttention.forward`; a cache must hold this layer's own `qkv_cache_layer`."""
        cos, sin = (self.columns(x) for x in self.angles(position_embeddings))
        query, key, value = self.project(hidden_states, cos, sin)
        if past_key_values is None:
            key, value = self.expand(key, value)
        else:
            self.check_cache(past_key_values)
            key, value = past_key_values.update(key, value, self.layer_idx)
        out, _ = attention_function(
            self, query, key, value, attention_mask,
            dropout=self.attention_dropout if self.training else 0.0, scaling=self.scaling, **kwargs,
        )  # fmt: skip
        return self.o_proj(out.flatten(2)), None
