"""A tiny random decoder for laws that need a whole model, and how to see whether it was left alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

LAYERS, HEADS, KV_HEADS, VOCABULARY = 5, 6, 3, 61


def decoder(
    device: str = "cpu",
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    vocabulary: int = VOCABULARY,
    layers: int = LAYERS,
) -> Any:
    """A random Llama, 6 query heads over 3 KV heads of width 8, with weights drawn large enough for sharp maps."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=48, intermediate_size=56, num_hidden_layers=layers, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, head_dim=8, initializer_range=0.2, max_position_embeddings=256, bos_token_id=None,
        eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    rng = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(config)
        return model.to(device, dtype).eval()
    finally:
        torch.random.set_rng_state(rng)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything a read-only visitor must leave as it was."""
    configs = [c for m in model.modules() if (c := getattr(m, "config", None)) is not None]
    return {
        "attributes": {n: sorted(m.__dict__) for n, m in model.named_modules()},
        "modules": {n: id(m) for n, m in model.named_modules()},
        "hooks": {n: (len(m._forward_pre_hooks), len(m._forward_hooks)) for n, m in model.named_modules()},
        "training": {n: m.training for n, m in model.named_modules()},
        "config": [str(c.to_dict()) + str(getattr(c, "_attn_implementation_internal", None)) for c in configs],
        "gradients": {n: (p.requires_grad, p.grad is None) for n, p in model.named_parameters()},
    }


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers."""
    return {n: x.detach().clone() for n, x in model.state_dict().items()}
