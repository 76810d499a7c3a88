"""A tiny random language model with a byte tokenizer, made here: for tests of whole commands without a network."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers


def tiny_tokenizer() -> hf.PreTrainedTokenizerFast:
    """One token a byte, and an end token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(["<end>", *letters])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return hf.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")


def tiny_model(seed: int = 0, **more: int) -> hf.PreTrainedModel:
    """Two layers, four heads over two, head width 16, 1024 positions, float32."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=257, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=1024, eos_token_id=0, initializer_range=0.2)  # fmt: skip
    return hf.LlamaForCausalLM(hf.LlamaConfig(**(sizes | more))).eval()


def tiny_folder(path: Path, seed: int = 0, **more: int) -> Path:
    """Both, saved as `save_pretrained` does."""
    tiny_model(seed, **more).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path
