"""What a converted layer needs to stand where a transformers decoder keeps its attention module."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from qkv.core.errors import InvalidInput, StateError


class DecoderAttention:
    """Mixin: the names that transformers reads of an attention module, and the checks of what a decoder layer passes.

    memory: the class of the layer's own memory. keeps: what that holds, in words.
    """

    memory: ClassVar[type]
    keeps: ClassVar[str]
    is_causal = True

    def stand_in(
        self, config: Any, layer_idx: int, *, heads: int, kv_heads: int, head_dim: int, value_dim: int
    ) -> None:
        """Take the names. config, layer_idx: of the module that is replaced."""
        self.config, self.layer_idx = config, layer_idx
        self.num_heads, self.num_key_value_heads = heads, kv_heads
        self.num_key_value_groups = heads // kv_heads
        self.head_dim, self.v_head_dim = head_dim, value_dim

    def angles(self, position_embeddings: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Cos and sin ``[B|1, N, R]``. Raises `InvalidInput` where the caller passed none."""
        if position_embeddings is None:
            raise InvalidInput(
                "a converted attention needs position_embeddings=(cos, sin), as the decoder layer passes them"
            )
        return position_embeddings

    def check_cache(self, cache: Any) -> None:
        """Raise `StateError` unless the cache holds this layer's own memory."""
        layers = getattr(cache, "layers", [])
        layer = layers[self.layer_idx] if self.layer_idx < len(layers) else None
        if not isinstance(getattr(layer, "memory", None), self.memory):
            raise StateError(
                f"layer {self.layer_idx} {self.keeps} and was given a {type(layer).__name__}; leave past_key_values out, or "
                "pass a fresh DynamicCache()"
            )
