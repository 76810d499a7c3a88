"""One site's memory, driven directly with drawn tokens: what the laws of caches share.

Axes: B batch, H query heads, G key/value heads, N new queries, T tokens, S stored slots, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qkv.core.cache import CacheMethod, Geometry, LayerCache, Policy, Rope, Step
from qkv.testing._law import Case, close, expect

H, G, D = 6, 3, 8
PROMPT, PADS = 19, 6
CUTS = (PROMPT, *(1,) * 12, 5, *(1,) * 9)
TOKENS = sum(CUTS)
IDLE, LATER, HOLES = 4, PROMPT + 12, 2
ALONE = (CUTS, (PROMPT - PADS, *CUTS[2:13], 5 - HOLES, *CUTS[14:]))
EXACT = 1e-9


SLOPES = tuple(0.3 * 2.0**-h for h in range(H))


def site(rope: bool = True, fixed: bool = True, slopes: tuple[float, ...] | None = None) -> Geometry:
    """The geometry of the site that the laws serve; rope: it has a rotary embedding, with frequencies that are fixed; slopes:
    of linear position biases that it adds.
    """
    frequencies = 100.0 ** -(torch.arange(D // 2, dtype=torch.float32) / (D // 2))
    return Geometry(
        H, G, D, D, layer=1, layers=3, rope=Rope(frequencies, fixed) if rope else None, max_length=512, slopes=slopes
    )


@dataclass(frozen=True)
class Stream:
    """Tokens to feed: q ``[B, H, T, D]``, k, v ``[B, G, T, D]``, padding ``[B, T]`` (True = real) or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    padding: Tensor | None = None

    @property
    def position(self) -> Tensor:
        """``[B, T]`` logical position of each column, -1 = padding."""
        b, _, t, _ = self.q.shape
        if self.padding is None:
            return torch.arange(t, device=self.q.device, dtype=torch.int32).expand(b, t)
        return (self.padding.cumsum(-1, dtype=torch.int32) - 1).masked_fill(~self.padding, -1)

    def rows(self, rows: Tensor) -> Stream:
        """Some rows, repeated or reordered."""
        padding = None if self.padding is None else self.padding[rows]
        return Stream(self.q[rows], self.k[rows], self.v[rows], padding)

    def alone(self, row: int) -> Stream:
        """One row without its padding."""
        at = slice(row, row + 1)
        if self.padding is None:
            return Stream(self.q[at], self.k[at], self.v[at])
        real = self.padding[row]
        return Stream(self.q[at][:, :, real], self.k[at][:, :, real], self.v[at][:, :, real])

    def to(self, dtype: torch.dtype) -> Stream:
        """Another precision."""
        return replace(self, q=self.q.to(dtype), k=self.k.to(dtype), v=self.v.to(dtype))

    def biased(self, slopes: Sequence[float]) -> Stream:
        """Tokens of one channel more, whose plain attention is that of these with linear position biases: slope times place."""
        b, h, t, _ = self.q.shape
        rate = self.q.new_tensor(slopes)[None, :, None, None].expand(b, h, t, 1) / D**-0.5
        place = self.position.to(self.k.dtype)[:, None, :, None].expand(b, self.k.shape[1], t, 1)
        return replace(self, q=torch.cat((self.q, rate), -1), k=torch.cat((self.k, place), -1))

    def spliced(self, other: Stream, start: int) -> Stream:
        """These tokens before column `start`, those of `other` from it on."""
        pairs = ((self.q, other.q), (self.k, other.k), (self.v, other.v))
        q, k, v = (torch.cat((a[:, :, :start], b[:, :, start:]), 2) for a, b in pairs)
        return Stream(q, k, v, self.padding)


def stream(
    case: Case, tokens: int = TOKENS, pads: Sequence[int] = (0, PADS), salt: int = 0, ragged: bool = False
) -> Stream:
    """Drawn tokens, one row per entry of `pads` (columns of padding on its left), in float64.

    ragged: the last row also idles in a step (the call of number `IDLE`) and is padded in the later block of `CUTS`, as the
    rows of a chat may be.
    """
    draw, b = case.draw(salt), len(pads)
    q, k, v = (draw.normal(b, h, tokens, D, scale=1.5) for h in (H, G, G))
    column = torch.arange(tokens, device=q.device)
    padding = column >= torch.tensor(pads, device=q.device)[:, None]
    if ragged:
        padding[-1, PROMPT + IDLE - 1] = False
        padding[-1, LATER : LATER + HOLES] = False
    out = Stream(q, k, v, padding if any(pads) else None)
    rope, p = site().rope, out.position[:, None]
    assert rope is not None
    q, k = (rope.rotate(x, p.expand(-1, x.shape[1], -1)) for x in (q, k))
    junk = draw.normal(b, 1, tokens, D, scale=50.0)
    at = ~padding[:, None, :, None]
    return replace(out, q=torch.where(at, junk, q), k=torch.where(at, junk, k), v=torch.where(at, junk, v))


Watch = Callable[[Tensor | None, slice, Tensor], None]


def drive(layer: LayerCache, tokens: Stream, cuts: Sequence[int], watch: Watch | None = None) -> Tensor:
    """Feed blocks of the given sizes from where the layer stands; returns the outputs ``[B, H, sum(cuts), D]``.

    watch: called after each block with the positions stored before it (None: nothing), its columns, and its output.
    """
    outs, position = [], tokens.position
    for n in cuts:
        at = slice(layer.seen, layer.seen + n)
        padding = None if tokens.padding is None else tokens.padding[:, : at.stop]
        before = layer.positions() if layer.seen and watch is not None else None
        step = Step(position[:, at], D**-0.5, padding)
        outs.append(layer.attend(tokens.q[:, :, at], tokens.k[:, :, at], tokens.v[:, :, at], step))
        expect(layer.seen == at.stop, f"`seen` is {layer.seen} after {at.stop} columns, padding included")
        if watch is not None:
            watch(before, at, outs[-1])
    return torch.cat(outs, 2)


def small(case: Case) -> CacheMethod:
    """The method of the case at a size where it acts on the laws' inputs."""
    return case.method.replace(**case.spec.small)


def places(layer: LayerCache, row: int) -> list[list[int]]:
    """For each KV head of a row the positions it stores, as the layer lists them."""
    return [[p for p in head if p >= 0] for head in layer.positions()[row].tolist()]


def close_where_real(got: Tensor, want: Tensor, tokens: Stream, atol: float, what: str) -> None:
    """Raise `BrokenLaw` unless outputs ``[B, H, N, D]`` agree at every real token."""
    real = tokens.position[:, : got.shape[2]] >= 0
    for row in range(got.shape[0]):
        at = real[row]
        close(got[row][:, at], want[row][:, at], atol=atol, what=f"row {row} {what}")


def is_policy(case: Case) -> bool:
    """The law is about what a `Policy` keeps."""
    return isinstance(case.method, Policy)


def evicts(case: Case) -> bool:
    """The law is about methods that lose tokens."""
    return case.spec.evicts


def keeps_all(case: Case) -> bool:
    """The law is about methods that lose none."""
    return not case.spec.evicts
