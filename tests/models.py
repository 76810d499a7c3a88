"""Tiny random models of many families: what the host is tried on."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as hf

SIZES = dict(vocab_size=97, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=6)


def llama(**more) -> hf.PreTrainedModel:
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(**(SIZES | dict(num_key_value_heads=3, max_position_embeddings=512) | more))
    )


def qwen3() -> hf.PreTrainedModel:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16, max_position_embeddings=512))


def mistral(window: int | None = None) -> hf.PreTrainedModel:
    return hf.MistralForCausalLM(
        hf.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=window, max_position_embeddings=512)
    )


def gemma3() -> hf.PreTrainedModel:
    config = hf.Gemma3TextConfig(
        **(SIZES | dict(num_hidden_layers=4)),
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        max_position_embeddings=512,
    )
    return hf.Gemma3ForCausalLM(config)


def gpt2() -> hf.PreTrainedModel:
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(
            vocab_size=97,
            n_embd=48,
            n_layer=3,
            n_head=6,
            n_positions=512,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
        )
    )


def gpt_neox() -> hf.PreTrainedModel:
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SIZES, max_position_embeddings=512, attention_dropout=0.0))


def bert() -> hf.PreTrainedModel:
    return hf.BertModel(hf.BertConfig(**SIZES, max_position_embeddings=512, attention_probs_dropout_prob=0.0))


def vit() -> hf.PreTrainedModel:
    config = hf.ViTConfig(
        hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=6, image_size=16, patch_size=4
    )
    return hf.ViTModel(config)


def whisper() -> hf.PreTrainedModel:
    config = hf.WhisperConfig(
        vocab_size=97,
        d_model=48,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=6,
        decoder_attention_heads=6,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=20,
        max_target_positions=64,
        num_mel_bins=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return hf.WhisperForConditionalGeneration(config)


def falcon() -> hf.PreTrainedModel:
    return hf.FalconForCausalLM(
        hf.FalconConfig(
            vocab_size=97,
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=6,
            max_position_embeddings=512,
            alibi=True,
        )
    )


def t5() -> hf.PreTrainedModel:
    return hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=97, d_model=48, d_kv=8, d_ff=64, num_layers=2, num_heads=6, decoder_start_token_id=0)
    )


DECODERS: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "llama": llama,
    "qwen3": qwen3,
    "mistral": mistral,
    "gemma3": gemma3,
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
}
ENCODERS: dict[str, Callable[[], hf.PreTrainedModel]] = {"bert": bert, "vit": vit}
ALL = DECODERS | ENCODERS | {"whisper": whisper}


def make(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> hf.PreTrainedModel:
    """A model of a family, in evaluation mode, the same for the same seed."""
    torch.manual_seed(seed)
    return (ALL | {"falcon": falcon, "t5": t5})[name]().to(dtype).eval()


def inputs(name: str, rows: int = 2, length: int = 23, seed: int = 1) -> dict[str, torch.Tensor]:
    """Inputs of one forward pass: left-padded tokens, an image, or audio features and decoder tokens."""
    g = torch.Generator().manual_seed(seed)
    if name == "vit":
        return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=g, dtype=torch.float64)}
    ids = torch.randint(5, 97, (rows, length), generator=g)
    if name == "whisper":
        return {
            "input_features": torch.randn(rows, 8, 40, generator=g, dtype=torch.float64),
            "decoder_input_ids": ids[:, :9],
        }
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    ids = ids.masked_fill(mask == 0, 0)
    return {"input_ids": ids, "attention_mask": mask}
