r"""Positions for linear attention: rotations that widen the head (LRPE) and decaying sums along axes (TPE).

    LRPE      x -> [x cos(p theta), x sin(p theta)],     <LRPE(q, p), LRPE(k, r)> = sum_i q_i k_i cos((p - r) theta_i)
    rotary    pairs of channels turned by p theta: the same width
    TPE       y_t[c] = sum_{j <= t} [sum_e b_ce lam_e^(t - j)] x_j[c],     0 < lam < 1: a Toeplitz matrix as a recurrence
    MD-LRPE   the channels in m parts, part a turned by the position along axis a of the data
    MD-TPE    one TPE along each axis of the data, summed

Axes: N tokens, D channels, e exponentials of a mixture, m axes of the data.
Qin et al. 2024 (TransNormerLLM, arXiv:2405.17381; LightNet, arXiv:2405.21022).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from qkv.core.errors import InvalidInput, InvalidParameter
from qkv.ops._common.decayed import decayed_linear_attention


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` ``[B, *, T, D]`` turned in half-split pairs (i, i + D/2) by cos, sin ``[B|1, T, D]``."""
    a, b = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat((-b, a), dim=-1) * sin.unsqueeze(1)


def lrpe_angles(heads: int, width: int, device: torch.device | None = None, base: float = 10000.0) -> Tensor:
    """Angles theta ``[H, D]`` in float64: base^(-2 i / (H D)), i the flat number of the channel over all heads."""
    i = torch.arange(heads * width, dtype=torch.float64, device=device).reshape(heads, width)
    return base ** (-2.0 * i / (heads * width))


def lrpe(x: Tensor, position: Tensor, angles: Tensor) -> Tensor:
    """Tokens x ``[B, H, N, D]``, position ``[B|1, N]``, angles ``[H, D]`` -> ``[B, H, N, 2 D]``."""
    turn = position[:, None, :, None].to(angles.dtype) * angles[:, None, :]  # [B, H, N, D]
    return torch.cat([x * turn.cos().to(x.dtype), x * turn.sin().to(x.dtype)], -1)


def md_lrpe(
    x: Tensor, grid: Sequence[int], kind: Literal["rotary", "cosine"] = "rotary", base: float = 10000.0
) -> Tensor:
    """Turn channel part a by the position along axis a of the data.

    x ``[..., N, D]`` with N the product of `grid` (row-major). kind: ``rotary`` keeps the width and needs D to divide by 2 m;
    ``cosine`` gives ``[x cos, x sin]``, width 2 D, and needs D to divide by m. Raises `InvalidInput`, `InvalidParameter`.
    """
    d, axes = x.shape[-1], len(grid)
    if kind not in ("rotary", "cosine"):
        raise InvalidParameter(f"md_lrpe: kind={kind!r} must be 'rotary' or 'cosine'")
    places = _places(x.shape[-2], grid, x.device)
    unit = 2 * axes if kind == "rotary" else axes
    if d % unit:
        raise InvalidInput(f"md_lrpe: {d} channels do not divide by {unit} ({axes} axes, kind={kind!r})")
    angles = base ** (-torch.arange(d // unit, dtype=torch.float64, device=x.device) * unit / d)
    turn = (places[:, :, None] * angles).to(torch.promote_types(x.dtype, torch.float32))  # [m, N, D / unit]
    cos, sin = (y.movedim(0, 1).flatten(1).to(x.dtype) for y in (turn.cos(), turn.sin()))  # [N, m D / unit]
    if kind == "cosine":
        return torch.cat([x * cos, x * sin], -1)
    a, b = x.unflatten(-1, (axes, 2, -1)).unbind(-2)  # each part in two halves, [..., N, m, D / unit]
    cos, sin = (y.unflatten(-1, (axes, -1)) for y in (cos, sin))
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -2).flatten(-3)


def tpe(x: Tensor, mixture: Tensor, log_decay: Tensor, *, bidirectional: bool = False, chunk_size: int = 64) -> Tensor:
    """A learned mixture of exponentials over the past, channel by channel.

    x ``[B, N, D]``; mixture b ``[D, e]``; log_decay ``[e]``, log lam <= 0. bidirectional: both directions summed, a token's own
    weight counted once. Returns ``[B, N, D]``. Raises `InvalidInput`.
    """
    if x.ndim != 3 or log_decay.ndim != 1 or tuple(mixture.shape) != (x.shape[-1], log_decay.shape[0]):
        raise InvalidInput(f"tpe: x [B, N, D], mixture [D, e], log_decay [e]; got {tuple(x.shape)}, {tuple(mixture.shape)}, "
                           f"{tuple(log_decay.shape)}")  # fmt: skip
    out = _sums(x, mixture, log_decay, chunk_size)
    if bidirectional:
        out = out + _sums(x.flip(1), mixture, log_decay, chunk_size).flip(1) - x * mixture.sum(-1)
    return out


def md_tpe(
    x: Tensor, grid: Sequence[int], mixtures: Sequence[Tensor], log_decays: Sequence[Tensor], *,
    bidirectional: bool = True, chunk_size: int = 64,
) -> Tensor:  # fmt: skip
    """One `tpe` along each axis of the data, summed. x ``[B, N, D]``, N the product of `grid` (row-major)."""
    if not len(grid) == len(mixtures) == len(log_decays):
        raise InvalidInput(
            f"md_tpe: {len(grid)} axes need as many mixtures ({len(mixtures)}) and decays ({len(log_decays)})"
        )
    _places(x.shape[-2], grid, x.device)
    field, out = x.unflatten(1, tuple(grid)), torch.zeros_like(x)  # [B, n_1, ..., n_m, D]
    for axis, (mixture, log_decay) in enumerate(zip(mixtures, log_decays, strict=True)):
        lines = field.movedim(axis + 1, -2)
        done = tpe(lines.flatten(0, -3), mixture, log_decay, bidirectional=bidirectional, chunk_size=chunk_size)
        out = out + done.reshape(lines.shape).movedim(-2, axis + 1).flatten(1, -2)
    return out


def _sums(x: Tensor, mixture: Tensor, log_decay: Tensor, chunk_size: int) -> Tensor:
    """The exponentials as heads of one channel with keys and queries of 1."""
    b, n, _ = x.shape
    e = log_decay.shape[0]
    ones = x.new_ones(1, 1, 1, 1).expand(b, e, n, 1)
    values = x[:, None] * mixture.mT[None, :, None, :].to(x.dtype)  # [B, e, N, D]
    form = decayed_linear_attention(
        ones, ones, values, log_decay=log_decay, chunk_size=chunk_size, sub_chunk=chunk_size
    )
    return form.out.sum(1)


def _places(n: int, grid: Sequence[int], device: torch.device) -> Tensor:
    """Coordinates ``[m, N]`` of row-major tokens."""
    total = 1
    for size in grid:
        total *= size
    if total != n or not grid:
        raise InvalidInput(f"{n} tokens do not fill a grid of {tuple(grid)}")
    lines = torch.meshgrid(*(torch.arange(s, device=device) for s in grid), indexing="ij")
    return torch.stack([x.flatten() for x in lines])
