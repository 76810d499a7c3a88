"""The laws of readers: caches that store everything and read a part. All laws of caches hold for them too.

Three sites that share a board are driven with tokens of their own, one row idling now and then; every site says what it read.

Axes: B batch, H query heads, G key/value heads, N new queries, T tokens, S stored slots, D head width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qkv.core.cache import Board
from qkv.core.reader import Reader
from qkv.testing._law import Case, close, expect, law, same
from qkv.testing.caches._memory import CUTS, EXACT, D, G, H, Stream, drive, site, small, stream


def is_reader(case: Case) -> bool:
    """The law is about what a `Reader` reads."""
    return isinstance(case.method, Reader)


def _readers(case: Case) -> list[Any]:
    """The memories of three sites that share a board, as in a model."""
    board, layers = Board(), [small(case).layer(replace(site(), layer=i)) for i in range(3)]
    for layer in layers:
        layer.join(board)
    return layers


def _feed(layers: Sequence[Any], streams: Sequence[Stream], n: int) -> list[tuple[Tensor, Any]]:
    """One call of n tokens through every site in turn: its output and what it says that it read."""
    out = []
    for layer, tokens in zip(layers, streams, strict=True):
        said: list[Any] = []
        layer.watch = said.append
        out.append((drive(layer, tokens, (n,)), said[-1]))
        layer.watch = None
    return out


def _slots(read: Any, row: int, head: int, kv: int) -> list[int] | None:
    """The slots that a single token read for one KV head (through any of its query heads), None = all."""
    if read.slot is None:
        return None
    heads = read.slot.shape[1]
    mine = range(heads)[kv * heads // G : (kv + 1) * heads // G] if head < 0 else [head * heads // H]
    return [s for a in mine for s in read.slot[row, a, 0].tolist() if s >= 0]


@law(
    "cache",
    "A sparse step reads no more than it says, nothing twice, nothing that is not there, and always its own token.",
    applies=is_reader,
)
def reads_no_more_than_it_says(case: Case) -> None:
    """Per row and query head, at three sites that share a board; at least one step must have been sparse."""
    method: Any = small(case)
    layers, sparse = _readers(case), 0
    streams = [stream(case, salt=i, ragged=True) for i in range(3)]
    for n in CUTS:
        for (_, read), tokens, layer in zip(_feed(layers, streams, n), streams, layers, strict=True):
            if n > 1 or read.slot is None:
                continue
            for row, own in enumerate(tokens.position[:, layer.seen - 1].tolist()):
                most = max(int(method.reads(torch.tensor(own + 1))), method.block())
                for head in range(H):
                    mine = _slots(read, row, head, 0) or []
                    where = f"row {row}, head {head} at position {own} reads {sorted(mine)}"
                    if own < 0:
                        expect(not mine, f"{where}: the row idles")
                        continue
                    if method.stateful and set(mine) == set(range(own + 1)):
                        continue  # this row's turn to read everything
                    expect(len(mine) <= most, f"{where}: {len(mine)} tokens, and {most} may be read")
                    expect(len(set(mine)) == len(mine) and max(mine) <= own, f"{where}: twice, or beyond its own")
                    expect(own in mine, f"{where}: not itself")
                    sparse += len(mine) <= own
    expect(sparse, "no step was sparse at these sizes: nothing was shown; set CacheSpec.small")


@law(
    "cache",
    "A sparse step is exact attention over what it read, and nothing else that is stored can change it.",
    applies=is_reader,
)
def unread_tokens_do_not_matter(case: Case) -> None:
    """Keys and values that a step did not read become NaN, or huge, in a copy first: its output stays the same, bit for bit."""
    layers = _readers(case)
    streams = [stream(case, salt=i, ragged=True) for i in range(3)]
    for n in CUTS:
        twins = [copy.deepcopy(layers) for _ in range(2)] if n == 1 else []
        done = _feed(layers, streams, n)
        if n > 1:
            continue
        for i, (got, read) in enumerate(done):
            at = slice(layers[i].seen - 1, layers[i].seen)
            real = streams[i].position[:, at.start] >= 0
            if read.slot is not None:
                close(got[real], _over(layers[i], streams[i], at, read)[real], atol=EXACT, what="a sparse step")
            for what, twin in zip((torch.nan, 1e6), twins, strict=True):
                if read.slot is not None:
                    _poison(twin[i], read, what)
                again = drive(twin[i], streams[i], (1,))
                same(again[real], got[real], f"site {i} at column {at.start}, with {what} in what it did not read,")


def _over(layer: Any, tokens: Stream, at: slice, read: Any) -> Tensor:
    """The newest token over the slots that were read, from the whole history: ``[B, H, 1, D]``."""
    outs = []
    for row in range(tokens.q.shape[0]):
        real = tokens.position[row, : at.stop] >= 0
        k, v, q = tokens.k[row, :, : at.stop][:, real], tokens.v[row, :, : at.stop][:, real], tokens.q[row, :, at]
        heads = []
        for head in range(H):
            a = head * read.slot.shape[1] // H
            live = read.slot[row, a, 0] >= 0
            slot = read.slot[row, a, 0][live].clamp(max=k.shape[1] - 1)
            keys = k[head * G // H][slot]
            if read.shift is not None:
                rope = layer.geometry.rope
                keys = rope.rotate(keys, read.shift[row, a, 0][live])
            if not len(slot):
                heads.append(torch.zeros_like(q[head]))
                continue
            heads.append((q[head] @ keys.mT * D**-0.5).softmax(-1) @ v[head * G // H][slot])
        outs.append(torch.stack(heads))
    return torch.stack(outs)


def _poison(layer: Any, read: Any, what: float) -> None:
    for row, length in enumerate(layer.lengths):
        for kv in range(G):
            kept = set(_slots(read, row, -1, kv) or [])
            unread = [s for s in range(length) if s not in kept]
            sign = torch.where(torch.arange(D, device=layer.keys.device) % 2 == 0, what, -what).to(layer.keys.dtype)
            layer.keys[row, kv, unread] = sign
            layer.values[row, kv, unread] = sign
