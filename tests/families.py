"""Tiny random models of families that the host was not written on: what it serves, and what it must refuse."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers as hf

SIZES: dict[str, Any] = dict(
    vocab_size=97, hidden_size=48, intermediate_size=64, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=3,
    head_dim=8, max_position_embeddings=512, n_embd=48, n_layer=4, n_head=6, n_positions=512, rotary_dim=8, ffn_dim=64,
    word_embed_proj_dim=48, num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
    topk_group=1, moe_intermediate_size=32,
    shared_expert_intermediate_size=32, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16,
    qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, index_n_heads=2, index_head_dim=16, index_topk=4,
    hidden_size_per_layer_input=8, vocab_size_per_layer_input=97, num_kv_shared_layers=0, d_model=48, decoder_layers=4,
    encoder_layers=2, decoder_attention_heads=6, encoder_attention_heads=6, decoder_ffn_dim=64, encoder_ffn_dim=64,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, attention_dropout=0.0, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
    hidden_dropout=0.0, dropout=0.0,
)  # fmt: skip


def family(kind: str, **more: Any) -> hf.PreTrainedModel:
    """A causal language model of a family (its ``model_type``), 4 layers, float64, the same every time."""
    config = type(hf.AutoConfig.for_model(kind))
    default = config()
    known = set(inspect.signature(config.__init__).parameters) | set(default.to_dict()) | set(config.attribute_map)
    settings = {k: v for k, v in SIZES.items() if k in known}
    if getattr(default, "sliding_window", None):
        settings["sliding_window"] = 8
    if getattr(default, "layer_types", None):
        kinds = list(dict.fromkeys(default.layer_types))
        settings["layer_types"] = (kinds * 4)[:4]
    made = config(**(settings | more))
    made._experts_implementation = "eager"  # the grouped form has no float64
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(made).double().eval()
    for x in model.parameters():  # the usual start is so small that every token follows from the last
        if x.ndim == 2 and x.std() < 0.1:
            x.data.mul_(4)
    return model
