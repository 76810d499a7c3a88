"""Tiny random Llamas, text for them, and a conversion applied: what the laws of conversions share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import qkv
from qkv.core.cache import Geometry
from qkv.core.conversion import Conversion
from qkv.testing._law import Case

VOCABULARY, WIDTH, LAYERS = 61, 40, 2
KV_HEADS = (2, 4, 1)  # of 4 query heads: grouped, multi-head, multi-query


def source(kv_heads: int = 2, seed: int = 0, device: str = "cpu", scale: float = 0.25) -> Any:
    """A random Llama of 2 layers, 4 query heads of width 8, in float64 throughout."""
    from transformers import LlamaConfig, LlamaForCausalLM

    make: Any = LlamaConfig
    config = make(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=56, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=kv_heads, head_dim=8, initializer_range=scale, rope_theta=100.0, attention_bias=kv_heads == 1,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    rng = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(config)
        model = model.to(torch.float64)
        for name, module in list(model.named_modules()):
            if type(module).__name__ == "LlamaRMSNorm":
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, nn.RMSNorm(WIDTH, eps=1e-6, dtype=torch.float64))
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases and norms that do something
                parameter.data += 0.3 * torch.randn_like(parameter)
    finally:
        torch.random.set_rng_state(rng)
    return model.to(device).eval()


def texts(case: Case, salt: int, rows: int = 3, length: int = 29, batches: int = 3) -> list[dict[str, Tensor]]:
    """Random token rows; the last batch is padded on the left."""
    draw = case.draw(salt)
    out = [
        {"input_ids": draw.integers(rows, length, low=1, high=VOCABULARY)} for _ in range(batches)
    ]  # 0 is the pad token
    mask = torch.ones(rows, length, dtype=torch.long, device=draw.device)
    mask[0, :11], mask[-1, :4] = 0, 0
    out[-1]["attention_mask"] = mask
    return out


def geometry(model: Any) -> Geometry:
    """The geometry of the model's first site."""
    return qkv.sites(model)[0].geometry


def small(case: Case, model: Any) -> Conversion:
    """The case's method at a size that changes something on a tiny model."""
    return case.method.replace(**case.spec.small(geometry(model)))


@contextmanager
def converted(case: Case, model: Any, method: Conversion, salt: int = 1) -> Iterator[Any]:
    """The model with `method` applied, calibrated on text of its own."""
    with qkv.applied(model, method, data=texts(case, salt)):
        yield model


@torch.no_grad()
def logits(model: Any, batch: Mapping[str, Tensor], **kwargs: Any) -> Tensor:
    """Logits of a batch, 0 at padding; positions count real tokens."""
    mask = batch.get("attention_mask")
    if mask is None:
        return model(**batch, **kwargs).logits
    return model(**batch, **kwargs, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits * mask.unsqueeze(-1)


def held_out(case: Case) -> list[dict[str, Tensor]]:
    """Text that no calibration has seen."""
    return texts(case, salt=77, batches=2)


def divergence(model: Any, batches: Sequence[Mapping[str, Tensor]], want: Sequence[Tensor]) -> float:
    """Mean KL(source || model) of the next-token distributions in nats."""
    total, count = 0.0, 0
    for batch, truth in zip(batches, want, strict=True):
        kl = (truth.softmax(-1) * (truth.log_softmax(-1) - logits(model, batch).log_softmax(-1))).sum(-1)
        total, count = total + float(kl.sum()), count + kl.numel()
    return total / count


def names(model: Any) -> list[str]:
    """Module names of the attention sites."""
    return [s.name for s in qkv.sites(model)]


def snapshot(model: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Every parameter and buffer: the object and a copy of its values."""
    every = [*model.named_parameters(), *model.named_buffers()]
    return {name: (x, x.detach().clone()) for name, x in every}


def is_first(case: Case) -> bool:
    """One process per method is enough: its first trial, or a configuration of the user's own."""
    trials = [type(case.method).create(**t) for t in case.spec.trials]
    return case.method not in trials[1:]
