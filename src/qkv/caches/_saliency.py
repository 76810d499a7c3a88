r"""How much attention each token draws from a few probe queries, without a map of every query against every key.

    A = softmax(scale q_P K^T, causal),   mass_m = sum_{p in P} A[p, m],   score_m = mass_m / #{p in P : p >= m}

Early tokens are seen by more probes than late ones, so their mass is larger for no merit of their own: the score divides by
the number of probes that could see the token. On CUDA, up to float32 and without gradients, kernels take the place of the map.

Axes: B batch, H query heads, G key/value heads, P probe rows, N tokens, D head width.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from qkv.core.attend import CHUNK_ELEMENTS, WIDEST, attend, check_qkv
from qkv.core.errors import InvalidInput
from qkv.core.kernel import kernel, served


def probe_rows(start: int, stop: int, recent: int, others: int, seed: int) -> list[int]:
    """Sorted places of the probes among start .. stop: the newest `recent` of them and `others` drawn from the rest."""
    cut = max(start, stop - recent)
    return [start + i for i in _picked(cut - start, others, seed)] + list(range(cut, stop))


@lru_cache(maxsize=32)
def _picked(tokens: int, many: int, seed: int) -> tuple[int, ...]:
    """`many` of so many tokens, sorted; all layers of a model draw the same."""
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randperm(tokens, generator=draw)[:many].sort().values.tolist())


def in_kernels(q: Tensor, keys: Tensor) -> bool:
    """Whether kernels compute the lse and masses of these probes; without probes there is nothing to compute."""
    if not q.shape[2] or q.shape[3] > WIDEST or q.dtype != keys.dtype:
        return False
    return served(q) and served(keys) and not torch.compiler.is_compiling()


def probe_lse(q: Tensor, keys: Tensor, at: Tensor, *, scale: float) -> Tensor:
    """Log-sum-exp of the probes over what they see of the keys: ``[B, H, P]``, at least float32. Arguments as `probe_mass`."""
    if in_kernels(q, keys):
        return kernel("flash:probe_lse")(q, keys, at, scale=scale)
    wide = torch.promote_types(q.dtype, torch.float32)
    mask = (torch.arange(keys.shape[2], device=at.device) <= at[:, None])[None, None]
    keys = keys.to(wide)
    return attend(q.to(wide), keys, keys[..., :1], mask=mask, scale=scale).lse


def probe_mass(q: Tensor, keys: Tensor, at: Tensor, *, scale: float, lse: Tensor | None = None) -> Tensor:
    """Attention that each key draws from the probes in all: ``[B, H, N]``, at least float32.

    q: probe queries ``[B, H, P, D]``; keys ``[B, G, N, D]``; at: ``[P]`` place of each probe among the keys (it sees itself and
    what lies before). lse: ``[B, H, P]`` where the probes saw more than these keys, None where these are all.
    """
    if in_kernels(q, keys):
        return kernel("flash:probe_masses")(q, keys, at, scale=scale, lse=lse)
    b, h, p, d = q.shape
    g, n = keys.shape[1:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    x = (q.to(wide) * scale).view(b, g, h // g, p, d)
    k, place = keys.to(wide).unsqueeze(2).mT, torch.arange(n, device=q.device)
    total = x.new_zeros(b, g, h // g, n)
    size = max(1, CHUNK_ELEMENTS // (b * h * n))
    for part in range(0, p, size):
        rows = slice(part, part + size)
        logits = (x[:, :, :, rows] @ k).masked_fill_(place > at[rows, None], -torch.inf)
        if lse is None:
            total += logits.softmax(-1).sum(-2)
        else:
            total += (logits - lse[:, :, rows].to(wide).view(b, g, h // g, -1, 1)).exp().sum(-2)
    return total.view(b, h, n)


def seen_by(at: Tensor, tokens: int) -> Tensor:
    """How many of the probes at the places `at` ``[P]`` can see each of `tokens` tokens, at least 1: ``[N]``."""
    before = torch.searchsorted(
        at.sort().values, torch.arange(tokens, device=at.device)
    )  # probes that come before a token
    return (at.shape[0] - before).clamp(min=1)


def normalized_saliency(
    q_probe: Tensor,
    keys: Tensor,
    positions: Tensor,
    *,
    scale: float | None = None,
    lse: Tensor | None = None,
    normalize: bool = True,
) -> Tensor:
    """The score of every token per KV head, summed over the query heads of its group: ``[B, G, N]``, at least float32.

    q_probe ``[B, H, P, D]``, keys ``[B, G, N, D]``, positions ``[P]``: the place of each probe row among the keys. scale: default
    D^-0.5. lse: ``[B, H, P]`` log-sum-exp of each probe row over everything it attended to, where that is more than `keys`.
    normalize=False gives the plain sum. Raises `InvalidInput` on shapes that do not fit.
    """
    check_qkv(q_probe, keys, keys, who="normalized_saliency")
    if positions.shape != q_probe.shape[2:3]:
        raise InvalidInput(
            f"normalized_saliency: {q_probe.shape[2]} probe rows need as many positions, got {tuple(positions.shape)}"
        )
    b, h, _, d = q_probe.shape
    g, n = keys.shape[1:3]
    mass = probe_mass(q_probe, keys, positions, scale=d**-0.5 if scale is None else scale, lse=lse)
    score = mass.view(b, g, h // g, n).sum(2)
    return score / seen_by(positions, n) if normalize else score
