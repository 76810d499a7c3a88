"""Tasks that small causal models are compared on: the bytes of real text, and recall of pairs."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.bench.assets import long_text


def text_bytes(device: str | torch.device, name: str | None = None) -> tuple[Tensor, Tensor]:
    """Bytes of a long text ``[T]`` (see `long_text`): nine tenths to train on, the rest held out."""
    data = torch.frombuffer(bytearray(long_text(name).encode()), dtype=torch.uint8).to(device, torch.int64)
    cut = len(data) * 9 // 10
    return data[:cut], data[cut:]


def random_windows(data: Tensor, rows: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens and next tokens ``[rows, length]`` from random places; the generator lies on the device of the data."""
    at = torch.randint(len(data) - length - 1, (rows, 1), generator=generator, device=data.device)
    ids = data[at + torch.arange(length + 1, device=data.device)]
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


@torch.no_grad()
def held_out(logits: Callable[[Tensor], Tensor], data: Tensor, length: int, rows: int, batch: int = 32) -> float:
    """Mean nats a token over `rows` windows spread evenly over `data`. logits: ``[B, N] -> [B, N, V]``."""
    at = torch.linspace(0, len(data) - length - 2, rows, device=data.device).long()[:, None]
    ids = data[at + torch.arange(length + 1, device=data.device)]
    losses = [
        F.cross_entropy(logits(x[:, :-1]).flatten(0, 1).float(), x[:, 1:].flatten(), reduction="sum")
        for x in ids.split(batch)
    ]
    return float(torch.stack(losses).sum()) / (rows * length)


def pairs(count: int, pairs: int, length: int, vocabulary: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Multi-query associative recall: ids and targets ``[count, length]``, -1 where nothing is asked.

    First `pairs` keys, each followed by its value, then every key once more at a random place among fillers (token 0); the
    target at such a key is its value. Keys are the lower half of the tokens, values the upper half.
    """
    device, half = generator.device, vocabulary // 2
    keys = torch.rand(count, half - 1, generator=generator, device=device).argsort(1)[:, :pairs] + 1
    values = torch.randint(half, vocabulary, (count, pairs), generator=generator, device=device)
    ids = torch.zeros(count, length, dtype=torch.int64, device=device)
    target = torch.full_like(ids, -1)
    ids[:, : 2 * pairs] = torch.stack([keys, values], -1).flatten(1)
    places = 2 * pairs + torch.rand(count, length - 2 * pairs, generator=generator, device=device).argsort(1)[:, :pairs]
    return ids.scatter(1, places, keys), target.scatter(1, places, values)
