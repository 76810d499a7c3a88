r"""All packed blocks of a cache: stacks of equal ones, which rows they belong to, and attention over those of some rows.

Rows that fill a block together share its stack; a row's blocks may lie in several stacks. Blocks only ever follow blocks: they
are taken back by count (`cut`), never opened.

Axes: B batch, R rows asked for, H query heads, G key/value heads, N queries, S stored tokens, D head width, E value width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qkv.caches._stores import parts
from qkv.caches._stores.dense import rearranged
from qkv.caches._stores.parts import LOG2E, Running, Stack, begin, ended, fold, nothing
from qkv.core.attend import CHUNK_ELEMENTS
from qkv.core.kernel import kernel


class Blocks:
    """The stacks of a cache; bits: of the two parts of a block (0 for the second: dropped)."""

    def __init__(self, bits: tuple[int, int]) -> None:
        self.bits = bits
        self.stacks: list[Stack] = []

    # -- writing ----------------------------------------------------------------------------------------------------

    def add(
        self, rows: list[int], starts: list[int], k: Tensor, v: Tensor, flags: Tensor, counts: list[int], ample: bool
    ) -> None:
        """A block k, v ``[R, G, W, .]`` of each row, split by bools ``[R, G or 1, W]``: counts[i] are set in every head."""
        alike: dict[int, list[int]] = {}
        for i, count in enumerate(counts):
            alike.setdefault(count, []).append(i)
        for count, members in alike.items():
            part = slice(None) if len(alike) == 1 else torch.tensor(members, device=k.device)
            stack = self._stack([rows[i] for i in members], k.shape[2], count)
            stack.add([starts[i] for i in members], k[part], v[part], flags[part], ample=ample)

    def _stack(self, rows: list[int], width: int, precise: int) -> Stack:
        for stack in self.stacks:
            if (stack.rows, stack.width, stack.precise) == (rows, width, precise):
                return stack
        self.stacks.append(Stack(rows, width, self.bits, precise))
        return self.stacks[-1]

    def counts(self) -> list[int]:
        """Blocks of every stack, for `cut`."""
        return [len(stack.starts) for stack in self.stacks]

    def cut(self, counts: list[int]) -> None:
        """Forget what came after `counts` was taken."""
        del self.stacks[len(counts) :]
        for stack, count in zip(self.stacks, counts, strict=True):
            del stack.starts[count:]

    def select(self, picked: list[int]) -> None:
        """Keep (reorder, repeat) the batch rows `picked`."""
        kept = []
        for stack in self.stacks:
            places = [stack.rows.index(row) for row in picked if row in stack.rows]
            if not places:
                continue
            stack.starts = [[block[i] for i in places] for block in stack.starts]
            stack.rows = [new for new, row in enumerate(picked) if row in stack.rows]
            for owner, name, x in list(stack.named()):
                setattr(owner, name, rearranged(x, torch.tensor(places, device=x.device)))
            kept.append(stack)
        self.stacks = kept

    # -- attention --------------------------------------------------------------------------------------------------

    def attend(self, rows: list[int], q: Tensor, width: int, scale: float) -> tuple[Tensor, Tensor]:
        """Attention of q ``[R, H, N, D]`` to what the rows have in blocks, and its lse, in float32 or wider. width: E."""
        b, h, n, d = q.shape
        wide = torch.promote_types(q.dtype, torch.float32)
        g = self._heads()
        x = (q.detach().to(wide) * (scale * LOG2E)).view(b, g, h // g, n, d)
        outs, lses = [], []
        size = max(1, CHUNK_ELEMENTS // max(1, h // g * parts.BLOCK_ELEMENTS // max(d, width)))
        for part in x.split(size, 3):
            y = part.reshape(b, g, -1, d)
            out, lse = ended(self._fold(rows, y, nothing(y, width)))
            outs.append(out.view(b, h, -1, width))
            lses.append(lse.view(b, h, -1))
        return (outs[0], lses[0]) if len(outs) == 1 else (torch.cat(outs, 2), torch.cat(lses, 2))

    def attend_one(self, rows: list[int], q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """One query per row over plain tokens k, v ``[R, G, M, .]`` and the rows' blocks.

        Returns out ``[R, H, 1, E]`` and lse ``[R, H, 1]``. One softmax from the first to the last, with few operations: no
        gradient flows.
        """
        b, h, _, d = q.shape
        wide = torch.promote_types(q.dtype, torch.float32)
        x = (q.detach().to(wide) * (scale * LOG2E)).view(b, k.shape[1], -1, d)
        out, lse = ended(self._fold(rows, x, begin(x, k.detach(), v.detach())))
        return out.view(b, h, 1, -1), lse.view(b, h, 1)

    def _fold(self, rows: list[int], x: Tensor, running: Running) -> Running:
        for stack in self.stacks:
            if stack.rows == rows:
                running = fold(x, running, stack, slice(None))
                continue
            shared = [row for row in rows if row in stack.rows]
            if not shared:
                continue
            mine, theirs = span([rows.index(r) for r in shared]), span([stack.rows.index(r) for r in shared])
            some = fold(x[mine], tuple(z[mine] for z in running), stack, theirs)  # type: ignore[arg-type]
            for whole, piece in zip(running, some, strict=True):
                whole[mine] = piece
        return running

    def launch(self, rows: list[int], q: Tensor, scale: float) -> Iterator[tuple[Tensor, Tensor]]:
        """One token q ``[R, H, 1, D]`` by kernels: (out, lse) in float32 of every part of every stack.

        Where a row has no such part its lse is -inf. Where `rows` are all rows and `told` was called before, nothing is read on
        the host: it can be captured.
        """
        for stack in self.stacks:
            shared = [row for row in rows if row in stack.rows]
            if not shared:
                continue
            mine, theirs = span([rows.index(r) for r in shared]), span([stack.rows.index(r) for r in shared])
            at = (
                mine
                if isinstance(mine, slice)
                else stack.index()
                if mine == stack.rows
                else torch.tensor(mine, device=q.device)
            )
            some = q[at]
            for part in stack.parts:
                assert part.keys is not None and part.values is not None
                keys, values = part.keys[theirs], part.values[theirs]
                if part.bits == 16:
                    what = {"length": stack.count() * part.count, "scale": scale}
                    out, lse = kernel("decode:decode_attention")(some, keys.flatten(2, 3), values.flatten(2, 3), **what)
                else:
                    ranges = (part.key_scale, part.key_zero, part.value_scale, part.value_zero, stack.channel)
                    s, z, step, low, c = (x[theirs] for x in ranges if x is not None)
                    what = {"blocks": stack.count(), "bits": part.bits, "scale": scale}
                    out, lse = kernel("mixed:mixed_decode")(some, keys, s, z, values, step, low, c, **what)
                out = out.to(torch.float32)
                if len(shared) < len(rows):
                    whole = (
                        out.new_zeros(len(rows), *out.shape[1:]),
                        lse.new_full((len(rows), *lse.shape[1:]), -torch.inf),
                    )
                    whole[0][at], whole[1][at] = out, lse
                    out, lse = whole
                yield out, lse

    def told(self) -> list[Tensor]:
        """The counts and rows of the stacks on the device, brought up to date: what `launch` reads beside the blocks."""
        for stack in self.stacks:
            stack.count()
            if not isinstance(span(stack.rows), slice):
                stack.index()
        return [x for stack in self.stacks for x in stack.told()]

    # -- looking ----------------------------------------------------------------------------------------------------

    def read(self, row: int, like: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """What a row holds, dequantised, by position: keys ``[1, G, S, D]``, values ``[1, G, S, E]``, of the dtypes of `like`."""
        g, widths = like[0].shape[1], (like[0].shape[3], like[1].shape[3])
        places, keys, values = [], [like[0][:1, :, :0]], [like[1][:1, :, :0]]
        for stack in self.stacks:
            if row not in stack.rows:
                continue
            i = stack.rows.index(row)
            one, k = slice(i, i + 1), len(stack.starts)
            places.append(stack.positions()[one].expand(-1, g, -1, -1).flatten(2))
            blocks = [part.plain(one, k, widths, stack.channel) for part in stack.parts]
            keys.append(torch.cat([x[0] for x in blocks], 3).flatten(2, 3).to(like[0].dtype))
            values.append(torch.cat([x[1] for x in blocks], 3).flatten(2, 3).to(like[1].dtype))
        all_keys, all_values = torch.cat(keys, 2), torch.cat(values, 2)
        if not places:
            return all_keys, all_values
        order = torch.cat(places, 2).argsort(-1).unsqueeze(-1)
        return tuple(x.gather(2, order.expand(-1, -1, -1, x.shape[3])) for x in (all_keys, all_values))  # type: ignore[return-value]

    def unordered(self, rows: list[int], like: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """What rows that hold equally many tokens hold, plain, in no order: keys ``[R, G, S, D]``, values ``[R, G, S, E]``."""
        widths = (like[0].shape[3], like[1].shape[3])
        stacks = [stack for stack in self.stacks if any(row in stack.rows for row in rows)]
        if len(rows) > 1 and not all(stack.rows == stacks[0].rows and set(rows) <= set(stack.rows) for stack in stacks):
            each = [self.unordered([row], like) for row in rows]
            return torch.cat([x[0] for x in each]), torch.cat([x[1] for x in each])
        held: tuple[list[Tensor], list[Tensor]] = [], []
        for stack in stacks:
            theirs = span([stack.rows.index(row) for row in rows])
            for part in stack.parts:
                both = part.plain(theirs, len(stack.starts), widths, stack.channel, like[0].dtype)
                for side, x, y in zip(held, both, like, strict=True):
                    side.append(x.flatten(2, 3).to(y.dtype))
        return torch.cat(held[0], 2), torch.cat(held[1], 2)

    def positions(self, row: int, heads: int) -> Tensor | None:
        """``[G, S]`` of what a row holds, in order; None: nothing."""
        places = [
            stack.positions()[stack.rows.index(row)].expand(heads, -1, -1).flatten(1)
            for stack in self.stacks
            if row in stack.rows
        ]
        return torch.cat(places, 1).sort(-1).values if places else None

    def precise(self, batch: int) -> list[int]:
        """Tokens of each row that lie in first parts."""
        out = [0] * batch
        for stack in self.stacks:
            for row in stack.rows:
                out[row] += stack.precise * len(stack.starts)
        return out

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Every buffer of the blocks by name."""
        for i, stack in enumerate(self.stacks):
            for owner, name, x in stack.named():
                part = "" if owner is stack else f"{stack.parts.index(owner)}."
                yield f"stack.{i}.{part}{name}", x

    def tensors(self) -> dict[str, Tensor]:
        """Copies of the used part of every buffer, and which rows and positions each stack holds."""
        out: dict[str, Tensor] = {}
        for name, x in self.named():
            out[name] = x[:, :, : len(self.stacks[int(name.split(".")[1])].starts)].clone()
        for i, stack in enumerate(self.stacks):
            out[f"stack.{i}.rows"] = torch.tensor(stack.rows)
            out[f"stack.{i}.starts"] = torch.tensor(stack.starts)
            out[f"stack.{i}.shape"] = torch.tensor([stack.width, stack.precise])
        return out

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `tensors`; other names are passed over."""
        for i in range(sum(name.endswith(".shape") for name in tensors)):
            width, precise = tensors[f"stack.{i}.shape"].tolist()
            stack = Stack(tensors[f"stack.{i}.rows"].tolist(), width, self.bits, precise)
            stack.starts = tensors[f"stack.{i}.starts"].tolist()
            self.stacks.append(stack)
        for name, x in tensors.items():
            kind, *place = name.split(".")
            if kind == "stack" and place[-1] not in ("rows", "starts", "shape"):
                stack = self.stacks[int(place[0])]
                owner: Any = stack if len(place) == 2 else stack.parts[int(place[1])]
                setattr(owner, place[-1], x.clone())

    def _heads(self) -> int:
        keys = self.stacks[0].parts[0].keys
        assert keys is not None
        return keys.shape[1]


def span(places: list[int]) -> slice | list[int]:
    """Consecutive places as a slice, so that taking them copies nothing."""
    first = places[0]
    return slice(first, first + len(places)) if places == list(range(first, first + len(places))) else places
