"""Attention-only models whose weights are written by hand, so that every attention map and every next token is known.

    x_t = embed[token_t] + places[t],   x += sum_h softmax(x Wq_h (x Wk_g)^T) x Wv_g Wo_h   per layer,   logits = x unembed

No normalisation, no rotary embedding, scale 1, float64. They run through transformers' attention interface like any model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NEVER = -1e4
"""Logit of a key that gets no attention: its weight is exactly 0."""


class PlantedConfig(PreTrainedConfig):
    """Shape of an `AttentionOnly` model; hidden_size is the width of the residual stream."""

    model_type = "qkv_planted"

    def __init__(
        self,
        vocab_size: int = 16,
        hidden_size: int = 32,
        head_dim: int = 16,
        num_hidden_layers: int = 1,
        num_attention_heads: int = 2,
        num_key_value_heads: int = 2,
        max_position_embeddings: int = 16,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.hidden_size, self.head_dim = vocab_size, hidden_size, head_dim
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.num_key_value_heads, self.max_position_embeddings = num_key_value_heads, max_position_embeddings
        super().__init__(**kwargs)


class PlantedAttention(nn.Module):
    """One attention layer; all weights start at zero: every head attends evenly and writes nothing."""

    def __init__(self, config: PlantedConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal, self.scaling = config, layer, True, 1.0
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        h, g, d, w = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.hidden_size
        self.query, self.key = nn.Parameter(torch.zeros(h, w, d)), nn.Parameter(torch.zeros(g, w, d))
        self.value, self.out = nn.Parameter(torch.zeros(g, w, d)), nn.Parameter(torch.zeros(h, d, w))

    def forward(self, x: Tensor, attention_mask: Tensor | None, past_key_values: Any, **kwargs: Any) -> Tensor:
        """What the layer adds to the residual stream x ``[B, N, W]``."""
        q, k, v = (torch.einsum("bnw,hwd->bhnd", x, w) for w in (self.query, self.key, self.value))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        # transformers reads this line to learn that the model goes through its table; older versions also look for the word
        # eager_attention_forward in the file.
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)  # pyright: ignore
        out, _ = attend(self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return torch.einsum("bnhd,hdw->bnw", out, self.out)


class AttentionOnly(PreTrainedModel):
    """See the module."""

    config_class = PlantedConfig
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: PlantedConfig) -> None:
        super().__init__(config)
        self.embed = nn.Parameter(torch.zeros(config.vocab_size, config.hidden_size))
        self.places = nn.Parameter(torch.zeros(config.max_position_embeddings, config.hidden_size))
        self.layers = nn.ModuleList([PlantedAttention(config, i) for i in range(config.num_hidden_layers)])
        self.unembed = nn.Parameter(torch.zeros(config.hidden_size, config.vocab_size))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Weights are written by hand."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """input_ids ``[B, N]`` -> logits ``[B, N, V]``."""
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        if position_ids is None:
            position_ids = torch.arange(seen, seen + input_ids.shape[1], device=input_ids.device)[None]
        x = self.embed[input_ids] + self.places[position_ids]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        hidden = [x]
        for layer in self.layers:
            x = x + layer(x, mask, past_key_values)
            hidden.append(x)
        states = tuple(hidden) if output_hidden_states else None
        return CausalLMOutputWithPast(logits=x @ self.unembed, past_key_values=past_key_values, hidden_states=states)


def empty(
    layers: int, heads: int, kv_heads: int, *, vocab: int, width: int, head_dim: int, length: int
) -> AttentionOnly:
    """A model of zeros in float64."""
    config = PlantedConfig(
        vocab_size=vocab, hidden_size=width, head_dim=head_dim, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, max_position_embeddings=length, use_cache=True,
    )  # fmt: skip
    model = AttentionOnly(config).double().eval()
    return model.requires_grad_(False)


def _write(model: AttentionOnly, fill: Callable[[AttentionOnly], None]) -> AttentionOnly:
    with torch.no_grad():
        fill(model)
    return model


def scripted(maps: Tensor, tokens: Sequence[int], *, kv_heads: int | None = None) -> AttentionOnly:
    """A model with exactly these attention maps ``[L, H, T, T]`` that writes exactly these tokens, whatever it reads.

    Position t is followed by ``tokens[t + 1]``. Rows are over keys 0..q and sum to 1.
    """
    n_layers, heads, length, _ = maps.shape
    vocab = max(tokens) + 2
    model = empty(n_layers, heads, kv_heads or heads, vocab=vocab, width=length, head_dim=length, length=length)
    logits = maps.double().log().clamp(min=NEVER)

    def fill(m: AttentionOnly) -> None:
        m.places.copy_(torch.eye(length))
        for l, layer in enumerate(m.layers):
            layer.query.copy_(logits[l])  # type: ignore[operator,union-attr]
            layer.key.copy_(torch.eye(length).expand_as(layer.key))  # type: ignore[operator,union-attr,arg-type]
        following = torch.tensor([*tokens[1:], vocab - 1])
        m.unembed[torch.arange(len(following)), following] = 1.0

    return _write(model, fill)


def induction(
    vocab: int, length: int, *, layers: int = 2, heads: int = 3, previous: int = 1, copy: int = 2
) -> AttentionOnly:
    """Two working heads make a copier: layer 0 head `previous` notes each token's predecessor; layer 1 head `copy` finds
    the place whose predecessor is the current token and writes the token that stands there. All others are even.
    """
    v, t = vocab, length
    token, place, note, told = slice(0, v), slice(v, v + t), slice(v + t, v + t + v), slice(v + t + v, 2 * v + t + v)
    width = told.stop
    model = empty(layers, heads, heads, vocab=v, width=width, head_dim=max(v, t), length=t)
    strong = -NEVER

    def fill(m: AttentionOnly) -> None:
        m.embed[:, token] = torch.eye(v, dtype=torch.float64)
        m.places[:, place] = torch.eye(t, dtype=torch.float64)
        first, second = m.layers[0], m.layers[1]
        shift = torch.zeros(t, t, dtype=torch.float64)
        shift[torch.arange(1, t), torch.arange(t - 1)] = strong
        first.query[previous, place, :t] = shift  # type: ignore[index,operator]
        first.key[previous, place, :t] = torch.eye(t, dtype=torch.float64)  # type: ignore[index,operator]
        first.value[previous, token, :v] = torch.eye(v, dtype=torch.float64)  # type: ignore[index,operator]
        first.out[previous, :v, note] = torch.eye(v, dtype=torch.float64)  # type: ignore[index,operator]
        second.query[copy, token, :v] = strong * torch.eye(v, dtype=torch.float64)  # type: ignore[index,operator]
        second.key[copy, note, :v] = torch.eye(v, dtype=torch.float64)  # type: ignore[index,operator]
        second.value[copy, token, :v] = torch.eye(v, dtype=torch.float64)  # type: ignore[index,operator]
        second.out[copy, :v, told] = torch.eye(v, dtype=torch.float64)  # type: ignore[index,operator]
        m.unembed[told] = torch.eye(v, dtype=torch.float64)

    return _write(model, fill)
