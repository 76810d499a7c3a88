"""Fixed decay rates per head: the geometric slopes of ALiBi and the two layer rules built on them."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from qkv.core.errors import InvalidParameter

Rule = Literal["alibi", "paper", "flat"]


def alibi_slopes(heads: int) -> list[float]:
    """s_h = 2^(-8 (h + 1) / H); if H is no power of two, the list of the next lower power, then every second of twice it."""
    if heads < 1:
        raise InvalidParameter(f"slopes need at least one head, got {heads}")
    power = 1 << (heads.bit_length() - 1)
    own = [2.0 ** (-8.0 * (h + 1) / power) for h in range(power)]
    return own if power == heads else own + alibi_slopes(2 * power)[::2][: heads - power]


def decay_slopes(
    heads: int, layer: int = 0, layers: int = 1, rule: Rule = "alibi", device: torch.device | None = None
) -> Tensor:
    """Slopes s ``[H]`` >= 0 in float64 with exp(-s) the share of the state kept by a step, smaller in later layers.

    rule: ``alibi``: alibi_slopes times (1 - l / (L - 1) + 1e-5), as released models have it; ``paper``: (8 h / H) (1 - l / L)
    with h from 1; ``flat``: 0, nothing fades. A single layer counts as the first. Raises `InvalidParameter`.
    """
    if not 0 <= layer < layers:
        raise InvalidParameter(f"layer={layer} must lie in [0, {layers - 1}] for layers={layers}")
    if rule == "alibi":
        factor = 1.0 - (layer / (layers - 1) if layers > 1 else 0.0) + 1e-5
        values = [s * factor for s in alibi_slopes(heads)]
    elif rule == "paper":
        values = [8.0 * (h + 1) / heads * (1.0 - layer / layers) for h in range(heads)]
    else:
        values = [0.0] * heads
    kept = device is not None and device.type == "cuda" and not torch.compiler.is_compiling()
    return (_tensor if kept else _tensor.__wrapped__)(tuple(values), device)


@lru_cache(maxsize=256)
def _tensor(values: tuple[float, ...], device: torch.device | None) -> Tensor:
    """Kept on CUDA, where a copy from the host cannot be part of a captured step; nobody writes into it."""
    return torch.tensor(values, dtype=torch.float64, device=device)
