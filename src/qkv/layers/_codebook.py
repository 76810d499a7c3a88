r"""A codebook learned by exponential moving averages of the keys it stands for, and the loss that keeps keys near it.

    z_j = argmin_s |k_j - C_s|^2
    n_s <- g n_s + (1 - g) count_s,   u_s <- g u_s + (1 - g) sum_{j: z_j = s} k_j,   C_s = u_s / n'_s
    n'_s = (n_s + eps) n / (n + S eps),   n = sum_s n_s                     (Laplace smoothing)
    commitment = mean over keys of |k - sg(C_z)|^2

g = 0 and eps = 0 are a step of k-means on the batch. The first batch places the codes: tokens spread evenly over it, then
`ROUNDS` steps of k-means. A code is dead when its n_s falls below `dead` times the mean; it becomes a key of the batch and
counts as the mean. Which key follows from the number of updates alone, so a run that is resumed draws the same ones. Everything
is a buffer; statistics are float32 or wider, also in a model of 16 bits, where a step of 1 - g would be rounded away. With
torch.distributed the sums run over all ranks, and rank 0 gives the keys that codes begin with.

Axes: B batch, H heads, N tokens, M = B N, S codes, D key width. van den Oord et al. 2017, arXiv:1711.00937 (appendix).
"""

from __future__ import annotations

from typing import Any, final

import torch
import torch.distributed as ranks
from torch import Tensor, nn

from qkv.core.rows import sum_rows
from qkv.ops._common.states import wide
from qkv.ops.longvq import quantise

ROUNDS = 4


def reference(
    keys: Tensor, codes: Tensor, counts: Tensor, sums: Tensor, decay: float, smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, counts and sums after the keys ``[H, M, D]``, code by code; no code is dead."""
    codes, counts, sums = codes.clone(), counts.clone(), sums.clone()
    for h in range(len(keys)):
        nearest = torch.cdist(keys[h], codes[h]).argmin(-1)
        for s in range(codes.shape[1]):
            mine = keys[h][nearest == s]
            counts[h, s] = decay * counts[h, s] + (1 - decay) * len(mine)
            sums[h, s] = decay * sums[h, s] + (1 - decay) * mine.sum(0)
        smooth = (counts[h] + smoothing) * counts[h].sum() / (counts[h].sum() + smoothing * codes.shape[1])
        codes[h] = torch.where((counts[h] > 0)[:, None], sums[h] / smooth[:, None], codes[h])
    return codes, counts, sums


@final
class Codebook(nn.Module):
    """Codes ``[H, S, D]`` and their statistics. decay: g. smoothing: eps. dead: share of the mean below which a code is dead."""

    codes: Tensor
    counts: Tensor
    sums: Tensor
    updates: Tensor

    def __init__(
        self, heads: int, size: int, width: int, *, decay: float, smoothing: float, dead: float, **factory: Any
    ) -> None:
        super().__init__()
        self.decay, self.smoothing, self.dead = decay, smoothing, dead
        with torch.device("cpu"):
            drawn = torch.randn(heads, size, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        like = torch.empty(0, **factory)
        place = {"device": like.device, "dtype": wide(like)}
        self.register_buffer("codes", drawn.to(**place))
        self.register_buffer("counts", torch.zeros(heads, size, **place))
        self.register_buffer("sums", torch.zeros(heads, size, width, **place))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64, device=like.device))
        self._begun = False  # what `updates` said last: reading it waits for the device

    def begin(self, keys: Tensor, padding: Tensor | None = None) -> None:
        """Place the codes among the keys ``[B, H, N, D]`` if no batch did so yet. padding: bool ``[B, N]``, True = real."""
        self._begun = self._begun or bool(self.updates > 0)
        if not self._begun:
            self._place(keys, padding)

    @torch.no_grad()
    def _place(self, keys: Tensor, padding: Tensor | None) -> None:
        x, real = self._flat(keys, padding)
        number = torch.arange(self.codes.shape[1], device=x.device)
        self.codes.copy_(_shared(x[:, _tokens(number, real, x.shape[1], spread=len(number))]))
        for _ in range(ROUNDS):
            counts, sums = self._totals(x, real)
            self.codes.copy_(torch.where((counts > 0)[..., None], sums / counts.clamp(min=1)[..., None], self.codes))
        self.counts.copy_(counts)
        self.sums.copy_(sums)
        self.updates += 1

    @torch.no_grad()
    def learn(self, keys: Tensor, padding: Tensor | None = None) -> None:
        """Move the codes towards the keys ``[B, H, N, D]``; deterministic, in place."""
        x, real = self._flat(keys, padding)
        counts, sums = self._totals(x, real)
        counts, sums = self.counts.lerp(counts, 1 - self.decay), self.sums.lerp(sums, 1 - self.decay)
        size = counts.shape[1]
        mean = counts.mean(-1, keepdim=True)
        number = 7919 * torch.arange(size, device=x.device) + 104729 * self.updates
        fresh = _shared(x[:, _tokens(number, real, x.shape[1])])
        gone = counts < self.dead * mean
        counts = torch.where(gone, mean, counts)
        sums = torch.where(gone[..., None], mean[..., None] * fresh, sums)
        total = counts.sum(-1, keepdim=True)
        smooth = (counts + self.smoothing) * total / (total + self.smoothing * size)
        moved = sums / torch.where(counts > 0, smooth, 1.0)[..., None]
        self.codes.copy_(torch.where((counts > 0)[..., None], moved, self.codes))
        self.counts.copy_(counts)
        self.sums.copy_(sums)
        self.updates += 1

    def commitment(self, keys: Tensor, padding: Tensor | None = None) -> Tensor:
        """Mean squared distance of the keys ``[B, H, N, D]`` to their codes, which get no gradient."""
        _, hat = quantise(keys.detach(), self.codes)
        far = (keys.to(hat.dtype) - hat).square().sum(-1)  # [B, H, N]
        if padding is None:
            return far.mean()
        return (far * padding[:, None]).sum() / (far.shape[1] * padding.sum())

    @torch.no_grad()
    def distance(self, keys: Tensor) -> Tensor:
        """How far the keys ``[B, H, N, D]`` lie from their codes, as a share of their own length (root of mean squares)."""
        _, hat = quantise(keys, self.codes)
        return (keys - hat).norm() / keys.norm()

    def _flat(self, keys: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Keys ``[H, M, D]`` in the precision of the statistics, and which are real ``[M]``."""
        return keys.detach().to(self.sums).transpose(0, 1).flatten(1, 2), None if padding is None else padding.flatten()

    def _totals(self, x: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """Number ``[H, S]`` and sum ``[H, S, D]`` of the keys of each code."""
        z, _ = quantise(x[None], self.codes)  # [1, H, M]
        heads, size, width = self.codes.shape
        owner = (z[0] + size * torch.arange(heads, device=x.device)[:, None]).flatten()
        rows = torch.cat((x, torch.ones_like(x[..., :1])), -1)
        if real is not None:
            rows = torch.where(real[:, None], rows, 0.0)
        out = sum_rows(rows.flatten(0, 1), owner, heads * size).unflatten(0, (heads, size))
        if _many():
            ranks.all_reduce(out)
        return out[..., width], out[..., :width]

    def _apply(self, fn: Any, recurse: bool = True) -> Codebook:
        """As any module, but no statistic is rounded to less than float32."""
        before = {name: x for name, x in self.named_buffers() if x.is_floating_point()}
        super()._apply(fn, recurse)
        for name, x in before.items():
            now = getattr(self, name)
            if now.dtype != wide(now):
                setattr(self, name, x.to(now.device, wide(now)))
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._begun = False


def _tokens(number: Tensor, real: Tensor | None, many: int, spread: int = 0) -> Tensor:
    """Real tokens by number, modulo how many there are; spread: numbers 0 .. spread - 1 lie evenly over all of them."""
    if real is None:
        return number * many // spread if spread else number % many
    order, count = (~real).int().argsort(stable=True), real.sum()  # real ones first
    return order[number * count // spread if spread else number % count]


def _many() -> bool:
    return ranks.is_available() and ranks.is_initialized() and ranks.get_world_size() > 1


def _shared(x: Tensor) -> Tensor:
    """Rank 0's."""
    x = x.contiguous()
    if _many():
        ranks.broadcast(x, 0)
    return x
