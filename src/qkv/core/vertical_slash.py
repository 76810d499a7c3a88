r"""Vertical and slash lines of a causal attention map: which carry most of its mass, and attention over these lines alone.

    vertical m: all cells (p, m)          slash o: all cells (p, p - o)          p, m absolute positions, m <= p

A cover is chosen on some sampled rows of the exact map. `greedy_cover` is the definition: again and again the line with the
largest mass that no other line has covered. `vertical_slash_cover` sorts the lines by their mass once and takes the shortest
prefix that covers enough, each cell counted for the first line that covers it. `attend_lines` then computes the kept cells only:
for a chunk of queries it gathers the keys that any kept line touches. On CUDA `qkv.kernels.lines` takes its place.

Axes: H heads, P sampled rows, N queries, M keys, C queries of a chunk, L gathered keys, D head width, E value width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.core.attend import WIDEST, sdpa
from qkv.core.errors import InvalidInput
from qkv.core.kernel import kernel, served

CHUNK = 64  # queries that share one list of keys
CELLS = 1 << 26  # of exact sampled rows held at once


class Lines(NamedTuple):
    """vertical bool ``[H, M]`` by key, slash bool ``[H, M]`` by offset, covered ``[H]`` mass of the sampled rows on them."""

    vertical: Tensor
    slash: Tensor
    covered: Tensor


def sampled_rows(n: int, last: int, share: float) -> Tensor:
    """``[P]`` ascending: the `last` of n rows, and of the others evenly so many that `share` of n are sampled beside them."""
    last = min(last, n)
    more = min(n - last, int(share * n))
    early = (torch.arange(more) * 2 + 1) * (n - last) // (2 * max(1, more))
    return torch.cat((early, torch.arange(n - last, n)))


def _checked(probs: Tensor, position: Tensor, alpha: float) -> None:
    if probs.ndim != 3 or position.shape != probs.shape[1:2]:
        raise InvalidInput(
            f"a cover takes probs [H, P, M] and position [P]; got {tuple(probs.shape)} and {tuple(position.shape)}"
        )
    if not 0 < alpha <= 1:
        raise InvalidInput(f"a cover takes alpha in (0, 1], the share of mass to be covered; got {alpha}")


def _places(position: Tensor, m: int) -> Tensor:
    """Offset of each cell of rows at `position` ``[P]``, and as well the key at each offset: ``[P, M]``, below 0 = none."""
    return position[:, None] - torch.arange(m, device=position.device)


def _along(x: Tensor, place: Tensor) -> Tensor:
    """``[H, P, M]`` by key as one by offset, 0 where a row has no such offset, or the other way round."""
    held = x.gather(2, place.clamp(min=0).expand(x.shape[0], -1, -1))
    return held.masked_fill_(place < 0, 0)


def greedy_cover(probs: Tensor, position: Tensor, alpha: float) -> Lines:
    """The definition, one line at a time: probs ``[H, P, M]`` causal softmax rows at positions ``[P]``."""
    _checked(probs, position, alpha)
    h, p, m = probs.shape
    vertical, slash = (torch.zeros(h, m, dtype=torch.bool) for _ in range(2))
    covered = torch.zeros(h, dtype=probs.dtype)
    for head in range(h):
        left = probs[head].detach().cpu().clone()
        at = _places(position.cpu(), m)
        while covered[head] < alpha * p and float(left.max()) > 0:
            best, line = torch.cat((left.sum(0), _along(left[None], at)[0].sum(0))).max(0)
            line = int(line)
            covered[head] += best
            if line < m:
                vertical[head, line] = True
                left[:, line] = 0
            else:
                slash[head, line - m] = True
                left[at == line - m] = 0
    return Lines(*(x.to(probs.device) for x in (vertical, slash, covered)))


def vertical_slash_cover(probs: Tensor, position: Tensor, alpha: float) -> Lines:
    """The fast form; see the module. Raises `InvalidInput`. At alpha = 1 every line with any mass is kept."""
    _checked(probs, position, alpha)
    (_, p, m), place = probs.shape, _places(position, probs.shape[2])
    turned = _along(probs, place)  # [H, P, M] by offset
    mass = torch.cat((probs.sum(1), turned.sum(1)), 1)  # [H, 2 M]
    rank = mass.argsort(dim=1, descending=True, stable=True).argsort(1).to(torch.int32)
    column, line, at = rank[:, None, :m], rank[:, None, m:], place.clamp(min=0)
    # a cell counts for the better of its two lines
    own = torch.where(column < line.squeeze(1)[:, at], probs, 0).sum(1)
    gain = torch.cat((own, torch.where(line < column.squeeze(1)[:, at], turned, 0).sum(1)), 1)
    gain = torch.zeros_like(gain).scatter_(1, rank.long(), gain)  # by rank
    total = gain.cumsum(1)
    before = F.pad(total[:, :-1], (1, 0))
    taken = gain > 0 if alpha == 1 else (gain > 0) & (before < alpha * p)
    kept = taken.gather(1, rank.long())
    return Lines(kept[:, :m], kept[:, m:], (gain * taken).sum(1))


def probe_rows(q: Tensor, k: Tensor, position: Tensor, scale: float) -> Tensor:
    """Exact causal softmax rows ``[H, P, M]`` of queries ``[H, P, D]`` at positions ``[P]`` over keys ``[G, M, D]``."""
    h, p, d = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = (q.reshape(k.shape[0], -1, d) @ k.mT).to(wide).reshape(h, p, -1) * scale
    return logits.masked_fill(torch.arange(k.shape[1], device=q.device) > position[:, None], -torch.inf).softmax(-1)


def lines_mask(lines: Lines, position: Tensor) -> Tensor:
    """The kept cells of rows at positions ``[N]``, dense: bool ``[H, N, M]``; the diagonal and key 0 always among them."""
    m = lines.vertical.shape[1]
    offset = position[:, None] - torch.arange(m, device=position.device)  # [N, M]
    slash = lines.slash[:, offset.clamp(min=0).reshape(-1)].view(-1, *offset.shape)
    forced = (offset == 0) | (torch.arange(m, device=position.device) == 0)
    return (lines.vertical[:, None] | slash | forced) & (offset >= 0)


def attend_lines(q: Tensor, k: Tensor, v: Tensor, lines: Lines, *, scale: float, chunk: int = CHUNK) -> Tensor:
    """Exact softmax attention over the kept cells, the diagonal and key 0: ``[H, N, E]``.

    q ``[H, N, D]`` are the newest N of the M tokens of k ``[G, M, D]``, v ``[G, M, E]``; H a multiple of G.
    """
    (h, n, _), (g, m), device = q.shape, k.shape[:2], q.device
    head = torch.arange(h, device=device) // (h // g)
    vertical, slash = lines.vertical.clone(), lines.slash.clone()
    vertical[:, 0], slash[:, 0] = True, True
    outs = []
    for start in range(0, n, chunk):
        size = min(chunk, n - start)
        low = m - n + start  # position of the chunk's first query
        seen = low + size
        touched = F.pad(slash[:, :seen].to(torch.float32), (size - 1, size - 1))
        run = F.max_pool1d(touched[:, None], size, stride=1)[:, 0] > 0  # at i: any slash in i - size + 1 .. i
        # key m of a query at p has offset p - m: over the chunk low - m .. low - m + size - 1
        column = torch.arange(seen, device=device)
        need = vertical[:, :seen] | run[:, low - column + size - 1]
        count = need.sum(1)
        width = int(count.max())
        order = need.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :width]  # [H, L]
        real = torch.arange(width, device=device) < count[:, None]
        offset = torch.arange(low, seen, device=device)[:, None] - order[:, None]  # [H, C, L]
        at = offset.clamp(min=0).flatten(1)
        kept = vertical.gather(1, order)[:, None] | slash.gather(1, at).view_as(offset)
        kept = kept & (offset >= 0) & real[:, None]
        keys, values = k[head[:, None], order], v[head[:, None], order]
        part = q[:, start : start + size]
        outs.append(sdpa(part[None], keys[None], values[None], mask=kept[None], scale=scale)[0])
    return torch.cat(outs, 1)


class VerticalSlash:
    """Attention of a prompt over the lines that its sampled rows need: a `Compute`."""

    def __init__(self, alpha: float, last: int, share: float, who: str) -> None:
        self.alpha, self.last, self.sample, self.who = alpha, last, share, who

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
        """See `qkv.core.cache.Compute`; the mask may say which keys are padding."""
        n, m = q.shape[2], k.shape[2]
        if not causal or (mask is not None and mask.shape[1:3] != (1, 1)):
            raise InvalidInput(f"{self.who}: vertical and slash lines are of causal attention with padding at most")
        if self.alpha >= 1 or n == 1:
            return sdpa(q, k, v, mask=mask, causal=causal, scale=scale)
        b = q.shape[0]
        out = q.new_zeros(b, q.shape[1], n, v.shape[3])
        for row in range(b):
            keys, queries = slice(None), slice(None)
            if mask is not None:
                real = mask[row if mask.shape[0] > 1 else 0, 0, 0]
                keys, queries = real.nonzero().squeeze(-1), real[m - n :].nonzero().squeeze(-1)
            qr, kr, vr = q[row][:, queries], k[row][:, keys], v[row][:, keys]
            if not qr.shape[1]:
                continue
            lines = self.lines(qr, kr, scale)
            out[row, :, queries] = _attend(qr, kr, vr, lines, scale)
        return out

    def lines(self, q: Tensor, k: Tensor, scale: float) -> Lines:
        """The lines of one row: q ``[H, N, D]``, the newest of k ``[G, M, D]``. Exact rows of few heads at a time."""
        rows = sampled_rows(q.shape[1], self.last, self.sample).to(q.device)
        position, share = rows + k.shape[1] - q.shape[1], q.shape[0] // k.shape[0]
        some = max(1, CELLS // (share * len(rows) * k.shape[1]))
        parts = [
            vertical_slash_cover(
                probe_rows(q[g * share : (g + some) * share, rows], k[g : g + some], position, scale),
                position,
                self.alpha,
            )
            for g in range(0, k.shape[0], some)
        ]
        return Lines(*(torch.cat(x) for x in zip(*parts, strict=True)))


def _attend(q: Tensor, k: Tensor, v: Tensor, lines: Lines, scale: float) -> Tensor:
    """By the kernel where it serves."""
    if any(x.requires_grad for x in (k, v)) and torch.is_grad_enabled():
        return attend_lines(q, k, v, lines, scale=scale)
    if not served(q) or max(q.shape[2], v.shape[2]) > WIDEST:
        return attend_lines(q, k, v, lines, scale=scale)
    vertical = lines.vertical.clone()
    vertical[:, 0] = True
    return kernel("lines:lines_attention")(q, k, v, vertical, lines.slash, scale=scale)


def kept_share(lines: Lines, n: int) -> float:
    """Share of the causal cells of the newest `n` queries that is kept, all heads together."""
    m, kept = lines.slash.shape[1], 0
    for start in range(m - n, m, 1024):
        kept += int(lines_mask(lines, torch.arange(start, min(m, start + 1024), device=lines.slash.device)).sum())
    return kept / (lines.slash.shape[0] * (n * (m - n) + n * (n + 1) / 2))


__all__ = ["Lines", "VerticalSlash", "attend_lines", "greedy_cover", "kept_share", "lines_mask", "vertical_slash_cover"]
