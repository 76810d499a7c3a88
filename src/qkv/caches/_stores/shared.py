r"""Blocks of keys and values that several workers read at once, each in an order, and so at positions, of its own.

A block's keys are stored rotated as if the block began at position 0 (local positions). Worker w reads an ordered list of
blocks; block b stands at the offset o = the lengths of the blocks before it. The key that w would read is R(o) k, and since
q . R(o) k = (R(-o) q) . k, the stored key can stay as it is and the query be turned back:

    out_w = merge_b attend(R(-o_wb) q_w, K_b, V_b)                         (lse merge over the blocks of w)

So a block is held once, turned by nobody, and its keys are read for all its workers together. A block may be packed: its oldest
tokens, `group` at a time, lie there as codes of some bits (local positions, never quantised twice), the others as they are; a
turned query reads codes as well as keys. In a step every worker first
appends its new tokens to its last block, then all read: they see each other's tokens of this very step; own tokens are causal.

Axes: W workers, H query heads, G key/value heads, N new columns (left-padded where workers bring different numbers), S tokens
of a block, P pairs (worker, block), D head width, E value width. Paper: arXiv:2504.06261. Its code multiplies the model's
attention scaling (YaRN) into every turn, which rescales the keys; a turn here is a pure rotation, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, final

import torch
from torch import Tensor

from qkv.caches._stores.blocks import Blocks
from qkv.caches._stores.dense import grown, resized
from qkv.core.attend import attend
from qkv.core.cache import Rope
from qkv.core.errors import InvalidInput, Refused, StateError
from qkv.core.kernel import kernel
from qkv.core.merge import merge

Form = Literal["queries", "keys"]


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` ``[..., D]`` rotated by angles with these cosines and sines ``[..., R/2]``: `Rope.rotate` with the angles at hand."""
    r = 2 * cos.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    a, b = x[..., :r].to(wide).chunk(2, dim=-1)
    out = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
    return torch.cat((out, x[..., r:]), dim=-1) if r < x.shape[-1] else out


def together(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of readers q ``[R, H, N, D]`` to keys and values ``[1, G, S, .]`` that all of them share, and its lse.

    The keys are read once for all readers. mask: ``[1, 1, R N, S]``, readers outermost.
    """
    r, h, n, d = q.shape
    out, lse, _ = attend(q.transpose(0, 1).reshape(1, h, r * n, d), k, v, mask=mask, scale=scale)
    return out.reshape(h, r, n, -1).transpose(0, 1), lse.reshape(h, r, n).transpose(0, 1)


def spread(out: Tensor, lse: Tensor, rows: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """A part of some `rows` ``[R]`` as one of all `total` rows: the others have read nothing."""
    empty = torch.full((total, *lse.shape[1:]), -torch.inf, dtype=lse.dtype, device=lse.device)
    return out.new_zeros(total, *out.shape[1:]).index_copy(0, rows, out), empty.index_copy(0, rows, lse)


def _codes(q: Tensor, blocks: Blocks, width: int, scale: float) -> tuple[Tensor, Tensor]:
    """As `together`, over packed tokens; width: E."""
    r, h, n, d = q.shape
    out, lse = blocks.attend([0], q.transpose(0, 1).reshape(1, h, r * n, d), width, scale)
    return out.reshape(h, r, n, -1).transpose(0, 1), lse.reshape(h, r, n).transpose(0, 1)


@final
class CacheBlock:
    """A run of tokens: for every layer keys ``[1, G, S, D]`` at local positions 0..S-1 and values ``[1, G, S, E]``.

    bits: of an element of the tokens that are packed, `group` at a time, when at least as many remain (16: none is). shelved:
    how many are.
    """

    def __init__(self, ropes: Sequence[Rope], bits: int = 16, group: int = 128) -> None:
        """An empty block; ropes: the rotary embedding of every layer."""
        self.ropes, self.bits, self.group = tuple(ropes), bits, group
        self.length = self.shelved = 0
        self.held: dict[int, tuple[Tensor, Tensor]] = {}
        self.packed: dict[int, Blocks] = {}

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Put keys and values ``[1, G, n, .]`` behind the tokens held; they count once `length` is raised."""
        plain = self.length - self.shelved
        total = plain + keys.shape[2]
        if layer not in self.held:
            self.held[layer] = tuple(x.new_empty(*x.shape[:2], grown(0, total), x.shape[3]) for x in (keys, values))  # type: ignore[assignment]
        k, v = self.held[layer]
        if k.shape[2] < total:
            room = max(grown(k.shape[2], total), min(2 * k.shape[2], k.shape[2] + 1024))
            self.held[layer] = k, v = resized(k, room, plain), resized(v, room, plain)
        k[:, :, plain:total] = keys
        v[:, :, plain:total] = values

    def tail(self, layer: int, length: int | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values of those of the first `length` tokens, default all, that are not packed."""
        if layer not in self.held:
            raise StateError(f"the block holds nothing for layer {layer}")
        k, v = self.held[layer]
        stop = (self.length if length is None else length) - self.shelved
        return k[:, :, :stop], v[:, :, :stop]

    def layer(self, layer: int, length: int | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `length` tokens, default all; packed ones dequantised."""
        k, v = self.tail(layer, length)
        if not self.shelved:
            return k, v
        old = self.packed[layer].read(0, (k, v))
        return torch.cat((old[0], k), 2), torch.cat((old[1], v), 2)

    def settle(self) -> None:
        """Pack what is due: the oldest plain tokens, as long as a group remains behind them."""
        count = (self.length - self.shelved) // self.group - 1
        if self.bits == 16 or count < 1:
            return
        done = count * self.group
        for layer in self.held:
            k, v = self.tail(layer)
            blocks = self.packed.setdefault(layer, Blocks((self.bits, 0)))
            every = torch.ones(1, 1, self.group, dtype=torch.bool, device=k.device)
            for at in range(0, done, self.group):
                piece = slice(at, at + self.group)
                blocks.add([0], [self.shelved + at], k[:, :, piece], v[:, :, piece], every, [self.group], ample=False)
            rest = k.shape[2] - done
            self.held[layer] = tuple(resized(x[:, :, done:], grown(0, rest), rest) for x in (k, v))  # type: ignore[assignment]
        self.shelved += done

    def append_from(self, other: CacheBlock, start: int = 0, stop: int | None = None) -> None:
        """Add the tokens start..stop of another block behind these, turned to continue this block.

        Raises `StateError` where they are packed: turned, they would be quantised a second time.
        """
        stop = other.length if stop is None else stop
        if other is self or not 0 <= start <= stop <= other.length:
            what = "itself" if other is self else f"tokens {start}..{stop} of a block of {other.length}"
            raise InvalidInput(f"a block cannot append {what}")
        if stop == start:
            return
        if start < other.shelved:
            raise StateError(
                f"tokens {start}..{stop} of a block whose first {other.shelved} are packed cannot be moved: they would be "
                "quantised twice; write what is to be moved into a block of bits=16"
            )
        for layer in other.held:
            keys, values = other.tail(layer)
            at = slice(start - other.shelved, stop - other.shelved)
            shift = torch.full((1, 1, 1), self.length - start, device=keys.device)
            self.write(layer, self.ropes[layer].rotate(keys[:, :, at], shift), values[:, :, at])
        self.length += stop - start
        self.settle()

    def clear(self) -> None:
        """Forget the tokens; the room stays."""
        self.length = self.shelved = 0
        self.packed = {}

    def bytes(self) -> int:
        """Bytes held, room included."""
        plain = [x for pair in self.held.values() for x in pair]
        codes = [x for blocks in self.packed.values() for _, x in blocks.named()]
        return sum(x.numel() * x.element_size() for x in (*plain, *codes))


@final
class SharedCache:
    """What each worker reads, in order, and where it writes: the last block of its list.

    One step: `begin` with the number of new tokens of each worker, `attend` once per layer, `commit`. An interrupted step leaves
    the blocks as they were.
    """

    def __init__(
        self, layout: Sequence[Sequence[CacheBlock]], write_to: Sequence[CacheBlock], form: Form = "queries"
    ) -> None:
        """layout: one list of blocks per worker. write_to: one block per worker. Raises `Refused` for lists that cannot be."""
        self.layout, self.write_to, self.form = [list(x) for x in layout], list(write_to), form
        if not self.layout or len(self.layout) != len(self.write_to):
            raise Refused(f"{len(self.layout)} workers need as many blocks to write to, got {len(self.write_to)}")
        for w, (blocks, own) in enumerate(zip(self.layout, self.write_to, strict=True)):
            if not any(b is own for b in blocks):
                raise Refused(f"worker {w} writes to a block that it does not read")
            if blocks[-1] is not own:
                raise Refused(f"worker {w} writes in the middle of what it reads: its new tokens must come last")
            if len({id(b) for b in blocks}) != len(blocks):
                raise Refused(f"worker {w} reads a block twice")
        if len({id(b) for b in self.write_to}) != len(self.write_to):
            raise Refused("two workers write to the same block")
        self.blocks = list({id(b): b for blocks in self.layout for b in blocks}.values())
        self.ropes = self.blocks[0].ropes
        if any(a is not b for x in self.blocks for a, b in zip(x.ropes, self.ropes, strict=True)):
            raise Refused("the blocks belong to different models: every block needs the same rotary embeddings")

    def lengths(self) -> list[int]:
        """Tokens that each worker reads."""
        return [sum(b.length for b in blocks) for blocks in self.layout]

    def bytes(self) -> int:
        """Bytes held: a shared block counts once."""
        return sum(b.bytes() for b in self.blocks)

    def begin(
        self, counts: Sequence[int], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Announce a step of `counts` new tokens per worker; gives the position of each column ``[W, N]``, 0 at padding.

        dtype: in which turns are made; the model's own, at least float32.
        """
        if len(counts) != len(self.layout) or min(counts) < 1:
            raise InvalidInput(
                f"every one of {len(self.layout)} workers must bring at least one token, got {list(counts)}"
            )
        self.counts, n = list(counts), max(counts)
        new = {id(b): c for b, c in zip(self.write_to, counts, strict=True)}
        self.after = {id(b): b.length + new.get(id(b), 0) for b in self.blocks}
        self.offsets: list[dict[int, int]] = []
        first, positions = [], []
        for blocks, count in zip(self.layout, counts, strict=True):
            offset, at = {}, 0
            for b in blocks:
                offset[id(b)] = at
                at += self.after[id(b)]
            self.offsets.append(offset)
            first.append(at - count)
            positions.append([max(0, at - n + i) if i >= n - count else 0 for i in range(n)])
        self.device = torch.device(device)
        self._plan(first, torch.promote_types(dtype, torch.float32))
        return torch.tensor(positions, device=device)

    def _plan(self, first: list[int], wide: torch.dtype) -> None:
        """Turns, masks and lengths of the step, computed once for all layers."""
        # Every worker's new keys go from their position to the local one; every worker's queries back by the block's offset.
        into = [b.length - f for b, f in zip(self.write_to, first, strict=True)]
        self.reads = [
            (b, [w for w, o in enumerate(self.offsets) if id(b) in o]) for b in self.blocks if self.after[id(b)]
        ]
        pairs = [(w, -self.offsets[w][id(b)]) for b, workers in self.reads for w in workers]
        self.pair_worker = torch.tensor([w for w, _ in pairs], device=self.device)
        shifts = torch.tensor([*into, *(s for _, s in pairs)], dtype=torch.float64, device=self.device)
        self.turns: dict[int, tuple[Tensor, Tensor]] = {}
        for rope in {id(r): r for r in self.ropes}.values():
            angle = shifts[:, None, None, None] * rope.frequencies.to(self.device)
            self.turns[id(rope)] = angle.cos().to(wide), angle.sin().to(wide)
        some = [len(workers) < len(self.layout) for _, workers in self.reads]
        self.some = [
            torch.tensor(w, device=self.device) if few else None for (_, w), few in zip(self.reads, some, strict=True)
        ]
        n = max(self.counts)
        self.masks = [None if n == 1 else self._mask(b, workers, n) for b, workers in self.reads]
        plain = [self.after[id(b)] - b.shelved for b, _ in self.reads]
        lengths = torch.tensor(plain, dtype=torch.int32, device=self.device)
        self.device_lengths = list(lengths.split(1))

    def _mask(self, block: CacheBlock, workers: list[int], n: int) -> Tensor | None:
        """``[1, 1, W * N, S]`` over plain tokens: in its own block a worker sees no later one of its own; None: all is seen."""
        owner = next((w for w in workers if self.write_to[w] is block), None)
        if owner is None:
            return None
        size = self.after[id(block)] - block.shelved
        seen = torch.ones(len(workers), n, size, dtype=torch.bool, device=self.device)
        column = torch.arange(n, device=self.device)[:, None]
        seen[workers.index(owner)] = torch.arange(size, device=self.device)[None] <= size - n + column
        return seen.reshape(1, 1, -1, size)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Append every worker's new k ``[W, G, N, D]``, v ``[W, G, N, E]``, then read with q ``[W, H, N, D]``: ``[W, H, N, E]``.

        Queries and keys come rotated at the positions that `begin` gave.
        """
        self._append(layer, k, v)
        return (self._by_queries if self.form == "queries" else self._by_keys)(layer, q, scale)

    def commit(self) -> None:
        """The step is over: its tokens count."""
        for block, count in zip(self.write_to, self.counts, strict=True):
            block.length += count
            block.settle()

    def _append(self, layer: int, k: Tensor, v: Tensor) -> None:
        workers, n = len(self.layout), k.shape[2]
        cos, sin = self.turns[id(self.ropes[layer])]
        local = turned(k, cos[:workers], sin[:workers])
        for w, (block, count) in enumerate(zip(self.write_to, self.counts, strict=True)):
            block.write(layer, local[w : w + 1, :, n - count :], v[w : w + 1, :, n - count :])

    def _by_queries(self, layer: int, q: Tensor, scale: float) -> Tensor:
        """Queries turned back by each block's offset, blocks read as they are, parts merged by their lse."""
        (workers, _, n, _), wide = q.shape, torch.promote_types(q.dtype, torch.float32)
        cos, sin = self.turns[id(self.ropes[layer])]
        back = turned(q[self.pair_worker], cos[workers:], sin[workers:])  # [P, H, N, D]
        parts, at = [], 0
        plans = zip(self.reads, self.masks, self.device_lengths, self.some, strict=True)
        for (block, readers), mask, length, some in plans:
            mine = back[at : at + len(readers)]
            at += len(readers)
            if q.is_cuda and n == 1 and q.dtype != torch.float64:
                k, v = (x.expand(len(readers), -1, -1, -1) for x in block.held[layer])
                out, lse = kernel("decode:decode_attention")(mine, k, v, length=length, scale=scale)
            else:
                out, lse = together(mine, *block.tail(layer, self.after[id(block)]), mask=mask, scale=scale)
            own = [(out, lse)]
            if block.shelved:
                own.append(_codes(mine, block.packed[layer], out.shape[3], scale))
            for out, lse in own:
                if some is not None:
                    out, lse = spread(out, lse, some, workers)
                parts.append((out.to(q.dtype), lse.to(wide)))
        return merge(*parts)[0] if len(parts) > 1 else parts[0][0]

    def _by_keys(self, layer: int, q: Tensor, scale: float) -> Tensor:
        """The definition: every worker's keys are turned to where it reads them and laid side by side."""
        outs, n = [], q.shape[2]
        for w, (blocks, count) in enumerate(zip(self.layout, self.counts, strict=True)):
            rope, keys, values = self.ropes[layer], [], []
            for block in blocks:
                if not self.after[id(block)]:
                    continue
                k, v = block.layer(layer, self.after[id(block)])
                offset = torch.full((1, 1, 1), self.offsets[w][id(block)], device=k.device)
                keys.append(rope.rotate(k, offset))
                values.append(v)
            new = q[w : w + 1, :, n - count :]
            out = attend(new, torch.cat(keys, 2), torch.cat(values, 2), causal=True, scale=scale).out
            outs.append(torch.nn.functional.pad(out, (0, 0, n - count, 0)))
        return torch.cat(outs)
