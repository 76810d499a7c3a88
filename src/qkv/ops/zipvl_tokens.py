r"""ZipVL in an encoder: as many tokens take part in attention as hold a share of it, every layer and image their own number.

    A = softmax(scale q_P K^T) over probe rows P,   a_m = mean_h sum_{p in P} A[h, p, m]
    p = min { n : the n largest a sum to at least tau |P| },   S = the p largest a_m
    out_i = softmax over m in S of (scale q_i . k_m)  v_m   for i in S (for every i with `dense_queries`),   0 for the others

The bidirectional form of the method (its cache for decoders is `zipvl`): every probe sees every token, so the denominator of the
decoder's score is the same for all and how many and which are decided by one and the same mass. A token outside S keeps its
residual and its MLP. One S per row and layer, shared by its heads.

Probes are spread evenly over a row's real tokens, all of them where there are no more than `probes`: an image has no newest
tokens, and nothing is drawn. No gradient flows through the choice. Under torch.compile, where sizes may not depend on values, the
same is computed with a mask and nothing is saved.

Axes: B batch, H query heads, G key/value heads, N tokens, P probes, D head width, E value width. Paper: arXiv:2410.08584 (no code
published; zero output outside S, and the evenly spread probes, are our choice).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from qkv.core.attend import attend, readable, sdpa
from qkv.core.operator import Operator, OperatorSpec, Wiring
from qkv.core.spec import Limit, param
from qkv.ops._common.states import unrounded


@unrounded
def drawn(
    q: Tensor, k: Tensor, *, scale: float, padding: Tensor | None = None, probes: int = 128
) -> tuple[Tensor, Tensor]:
    """The mass a ``[B, N]`` in float32 or wider (-1 at padding) and the number of probes of each row ``[B, 1]``.

    q ``[B, H, N, D]``, k ``[B, G, N, D]``, padding ``[B, N]`` (True = real).
    """
    q, k = q.detach(), k.detach()
    (b, h, n, d), g = q.shape, k.shape[1]
    real = torch.ones(b, n, dtype=torch.bool, device=q.device) if padding is None else padding
    count = real.sum(-1, keepdim=True)  # [B, 1]
    asked = count.clamp(max=probes)
    number = torch.arange(min(probes, n), device=q.device)
    order = (~real).to(torch.uint8).argsort(dim=-1, stable=True)  # real tokens first
    place = order.gather(1, (number * count).div(asked.clamp(min=1), rounding_mode="floor").clamp(max=n - 1))  # [B, P]
    wide = torch.promote_types(q.dtype, torch.float32)
    rows = q.gather(2, place[:, None, :, None].expand(b, h, -1, d)).to(wide) * scale
    logits = rows.reshape(b, g, -1, d) @ k.to(wide).mT  # [B, G, R P, N]
    maps = logits.masked_fill(~real[:, None, None], -torch.inf).softmax(-1).view(b, h, -1, n)
    maps = torch.where((number < asked)[:, None, :, None], maps, 0.0)
    return maps.sum(2).mean(1).masked_fill(~real, -1.0), asked


def important(
    q: Tensor, k: Tensor, *, scale: float, padding: Tensor | None = None, tau: float = 0.975, probes: int = 128
) -> Tensor:
    """S, bool ``[B, N]``; as `drawn`."""
    mass, asked = drawn(q, k, scale=scale, padding=padding, probes=probes)
    count = (mass >= 0).sum(-1, keepdim=True)
    ranked = mass.sort(dim=-1, descending=True, stable=True)
    short = ranked.values.clamp(min=0).cumsum(-1) < tau * asked * (1 - 1e-6)  # sums round
    kept = count if tau == 1 else torch.minimum(short.sum(-1, keepdim=True) + 1, count)
    place = torch.arange(mass.shape[1], device=q.device)
    return torch.zeros_like(mass, dtype=torch.bool).scatter(1, ranked.indices, place < kept)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    tau: float,
    probes: int,
    dense_queries: bool,
    padding: Tensor | None = None,
) -> Tensor:
    """Dense attention with the columns outside S masked; rows outside S give 0."""
    chosen = important(q, k, scale=scale, padding=padding, tau=tau, probes=probes)
    out = attend(q, k, v, mask=chosen[:, None, None], scale=scale).out
    return out if dense_queries else out.masked_fill(~chosen[:, None, :, None], 0.0)


def fast(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    tau: float,
    probes: int,
    dense_queries: bool,
    padding: Tensor | None = None,
) -> Tensor:
    """Attention among gathered tokens: p^2 instead of N^2 (N p with `dense_queries`)."""
    chosen = important(q, k, scale=scale, padding=padding, tau=tau, probes=probes)
    if not readable(q):
        some = chosen | ~chosen.any(-1, keepdim=True)  # a row of padding alone
        out = sdpa(q, k, v, mask=some[:, None, None], causal=False, scale=scale)
        return out if dense_queries else torch.where(chosen[:, None, :, None], out, 0.0)
    counts = chosen.sum(-1)
    most = max(1, int(counts.max()))
    place = (
        (~chosen).to(torch.uint8).argsort(dim=-1, stable=True)[:, :most]
    )  # [B, p] in order; rows with fewer are filled up
    held = torch.arange(most, device=q.device) < counts[:, None].clamp(min=1)
    mask = None if bool(held.all()) else held[:, None, None]
    keys, values = _taken(k, place), _taken(v, place)
    if dense_queries:
        return sdpa(q, keys, values, mask=mask, causal=False, scale=scale)
    out = sdpa(_taken(q, place), keys, values, mask=mask, causal=False, scale=scale)
    out = torch.where((held & (counts > 0)[:, None])[:, None, :, None], out, 0.0)
    empty = out.new_zeros(*q.shape[:3], v.shape[3])
    return empty.scatter(2, place[:, None, :, None].expand(*out.shape), out)


def _taken(x: Tensor, place: Tensor) -> Tensor:
    return x.gather(2, place[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    tau: float,
    probes: int,
    dense_queries: bool,
    padding: Tensor | None = None,
) -> Tensor:
    """Row by row and token by token."""
    (b, h, n, _), r = q.shape, q.shape[1] // k.shape[1]
    rows = []
    for row in range(b):
        real = [i for i in range(n) if padding is None or bool(padding[row, i])]
        asked = min(probes, len(real))
        asks = [real[i * len(real) // asked] for i in range(asked)]
        mass = dict.fromkeys(real, 0.0)
        for head in range(h):
            for p in asks:
                weights = (k[row, head // r, real] @ q[row, head, p] * scale).softmax(0).tolist()
                for m, w in zip(real, weights, strict=True):
                    mass[m] += w / h
        best, total, chosen = sorted(real, key=lambda m: -mass[m]), 0.0, set()
        for m in best:
            if tau < 1 and total >= tau * asked * (1 - 1e-6):
                break
            chosen.add(m)
            total += mass[m]
        these = sorted(chosen)
        heads = []
        for head in range(h):
            keys, values, outs = k[row, head // r, these], v[row, head // r, these], []
            for i in range(n):
                takes_part = bool(these) and (dense_queries or i in chosen)
                out = (keys @ q[row, head, i] * scale).softmax(0) @ values if takes_part else v.new_zeros(v.shape[3])
                outs.append(out)
            heads.append(torch.stack(outs))
        rows.append(torch.stack(heads))
    return torch.stack(rows)


@final
@dataclass(frozen=True, kw_only=True)
class ZipVLTokens(Operator):
    """Attention among the tokens that hold a share of it."""

    spec: ClassVar[OperatorSpec] = OperatorSpec(
        id="zipvl-tokens",
        title="ZipVL: dynamic token sparsification, for encoders",
        paper="arXiv:2410.08584",
        source="abstract",
        summary="In an encoder each layer attends among as many tokens as hold a share tau of its attention, image by image.",
        shown="a small ViT without further training keeps its accuracy while a part of the tokens leaves attention; keeping the "
        "least important ones instead breaks it",
        honest="flat attention keeps nearly every token, and then the probes are paid on top of it",
        limits=(Limit("full", {"tau": 1.0}, "every token is important"),),
        trials=({"tau": 0.7}, {"tau": 0.7, "probes": 3}, {"tau": 0.6, "dense_queries": True}),
        causal="never",
        cross=False,
        reference=reference,
        fast=fast,
        loop=loop,
        wiring=Wiring(rotary=True),
    )
    tau: float = param(0.975, "share of a layer's attention that the tokens in it draw", low=0.01, high=1.0)
    probes: int = param(128, "queries that judge the tokens", low=1)
    dense_queries: bool = param(False, "all queries attend, to the important keys")
