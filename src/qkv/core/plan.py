r"""Which blocks of the score matrix are computed: the one currency of every sparse pattern.

A plan lists, for each query block, the key blocks whose elements are tested (partial, `idx[..., :num]`) and
those that need no test (full, `full_idx[..., :full_num]`). The test of a query at position i and a key at
position j, with p = i + M - N (lower-right alignment), is data, not code:

    (not causal or j <= p)  and  (|p - j| < window or first <= j < first + sinks)  and  tokens[i, j]

With `perm_q` or `perm_kv` the blocks cut permuted slots, and the test uses the original positions that the
permutations name. A key block that runs past M is partial.

Axes: B batch, H heads, N queries, M keys, Qb query blocks, Kb key blocks, W list width. B and H may be 1.
"""

from __future__ import annotations

from dataclasses import InitVar, dataclass, replace
from typing import TYPE_CHECKING, Any, final

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.core.errors import InvalidInput

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_TENSORS = ("num", "idx", "full_num", "full_idx", "first", "tokens", "perm_q", "perm_kv")


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class BlockPlan:
    """Block lists, the element test of partial blocks, and what it cost to choose them.

    num, full_num: int32 ``[B|1, H|1, Qb]``; idx, full_idx: int32 ``[B|1, H|1, Qb, W]``, entries past the
    counts are ignored, no block twice in a row. block: tokens of a query block and of a key block. queries,
    keys: N and M. causal, window, sinks: the element test above; window is None for no limit. first: int
    ``[B]``, position of each row's first real token (0 when absent). tokens: residual bool test,
    broadcastable to ``[B, H, N, M]``, in original positions. perm_q, perm_kv: int ``[B|1, H|1, N]`` and
    ``[.., M]``, slot -> original position. selection_flops: operations spent on choosing the blocks, over
    the whole batch.

    The constructor checks shapes and types, and the lists themselves too where they lie on the CPU (`check`;
    ``checked=False`` skips that, for builders that are right by construction). Raises `InvalidInput`.
    """

    num: Tensor
    idx: Tensor
    full_num: Tensor
    full_idx: Tensor
    block: tuple[int, int]
    queries: int
    keys: int
    causal: bool = False
    window: int | None = None
    sinks: int = 0
    first: Tensor | None = None
    tokens: Tensor | None = None
    perm_q: Tensor | None = None
    perm_kv: Tensor | None = None
    selection_flops: float = 0.0
    checked: InitVar[bool | None] = None

    def __post_init__(self, checked: bool | None) -> None:
        self._check_shapes()
        if checked is None:
            checked = not self.num.is_cuda
        if checked:
            self.check()

    # --- construction ---

    @classmethod
    def from_blocks(
        cls, kept: Tensor, *, block: int | tuple[int, int], queries: int, keys: int, **facts: Any
    ) -> BlockPlan:
        """A plan from kept blocks, bool ``[B|1, H|1, Qb, Kb]``; the element test says which are full.

        facts: the other fields of `BlockPlan`. A kept block that the test empties is dropped.
        """
        block = (block, block) if isinstance(block, int) else block
        none = kept.new_zeros((*kept.shape[:3], 1), dtype=torch.int32)
        lists = {"num": none[..., 0], "idx": none, "full_num": none[..., 0], "full_idx": none}
        empty = cls(**lists, block=block, queries=queries, keys=keys, checked=False, **facts)
        if kept.dtype != torch.bool or tuple(kept.shape[2:]) != empty.grid:
            raise InvalidInput(
                f"plan: kept blocks must be bool [B|1, H|1, Qb, Kb] with Qb, Kb = {empty.grid}; got "
                f"{kept.dtype} {tuple(kept.shape)}"
            )
        some, every = empty._verdict()
        num, idx = _lists(kept & some & ~every)
        full_num, full_idx = _lists(kept & every)
        return replace(empty, num=num, idx=idx, full_num=full_num, full_idx=full_idx, checked=False)

    @classmethod
    def from_mask(cls, mask: Tensor, block: int | tuple[int, int] = 128) -> BlockPlan:
        """The plan of a bool mask ``[B|1, H|1, N, M]``, True = may attend, kept as the residual test."""
        if mask.dtype != torch.bool or mask.ndim != 4:
            raise InvalidInput(f"plan: a mask must be bool [B|1, H|1, N, M]; got {mask.dtype} {tuple(mask.shape)}")
        bq, bk = (block, block) if isinstance(block, int) else block
        n, m = mask.shape[2:]
        kept = torch.ones(1, 1, -(-n // bq), -(-m // bk), dtype=torch.bool, device=mask.device)
        return cls.from_blocks(kept, block=(bq, bk), queries=n, keys=m, tokens=mask)

    def restrict(self, mask: Tensor) -> BlockPlan:
        """The plan that also obeys a bool mask broadcastable to ``[B, H, N, M]``.

        Full blocks that the mask cuts become partial.
        """
        mask = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
        tokens = mask if self.tokens is None else self.tokens & mask
        facts = {
            name: getattr(self, name)
            for name in ("causal", "window", "sinks", "first", "perm_q", "perm_kv", "selection_flops")
        }
        return BlockPlan.from_blocks(
            self.blocks(), block=self.block, queries=self.queries, keys=self.keys, tokens=tokens, **facts
        )

    def to(self, *args: Any, **kwargs: Any) -> BlockPlan:
        """The plan with every tensor moved, as `torch.Tensor.to` (a device; the types stay)."""
        moved = {name: x.to(*args, **kwargs) for name in _TENSORS if (x := getattr(self, name)) is not None}
        return replace(self, **moved, checked=False)

    # --- checks ---

    def _check_shapes(self) -> None:
        n, m, (bq, bk) = self.queries, self.keys, self.block
        _need(min(n, m, bq, bk) >= 1, f"N={n}, M={m} and block={self.block} must be positive")
        _need(not self.causal or n <= m, f"a causal plan needs N <= M; got N={n}, M={m}")
        _need(self.window is None or self.window >= 1, f"window={self.window} must be at least 1 (the query)")
        _need(self.sinks >= 0, f"sinks={self.sinks} must be at least 0")
        _need(not self.sinks or self.window is not None, f"sinks={self.sinks} mean nothing without a window")
        for name, count, lists in self._both():
            kinds = f"{name}num {count.dtype} and {name}idx {lists.dtype}"
            shapes = f"{name}num {tuple(count.shape)} and {name}idx {tuple(lists.shape)}"
            _need(count.dtype == lists.dtype == torch.int32, f"{kinds} must both be int32")
            fits = lists.ndim == 4 and count.shape == lists.shape[:3] and lists.shape[3] >= 1
            _need(fits, f"{shapes} must be [B|1, H|1, Qb] and [B|1, H|1, Qb, W]")
        num, full = tuple(self.num.shape), tuple(self.full_num.shape)
        _need(num == full, f"num {num} and full_num {full} must have one shape")
        blocks = self.grid[0]
        _need(num[2] == blocks, f"{num[2]} query blocks are listed; N={n} in blocks of {bq} makes {blocks}")
        for name, size in (("perm_q", n), ("perm_kv", m)):
            if (x := getattr(self, name)) is not None:
                fits = x.ndim == 3 and x.shape[2] == size and not x.is_floating_point()
                _need(fits, f"{name} {x.dtype} {tuple(x.shape)} must be integer [B|1, H|1, {size}]")
        if (x := self.first) is not None:
            _need(x.ndim == 1 and not x.is_floating_point(), f"first {tuple(x.shape)} must be integer [B]")
        if (x := self.tokens) is not None:
            fits = x.ndim == 4 and x.shape[2] in (1, n) and x.shape[3] in (1, m) and x.dtype == torch.bool
            _need(fits, f"tokens {x.dtype} {tuple(x.shape)} must be bool, broadcastable to [B, H, {n}, {m}]")
        where = sorted({str(x.device) for name in _TENSORS if (x := getattr(self, name)) is not None})
        _need(len(where) == 1, f"its tensors lie on different devices: {', '.join(where)}")
        _ = self.batch, self.heads

    def check(self) -> BlockPlan:
        """Itself, after checking the lists: ranges, duplicates, no full block with a forbidden element."""
        kb = self.grid[1]
        counted = torch.zeros((*self.num.shape, kb + 1), dtype=torch.int32, device=self.num.device)
        for name, count, lists in self._both():
            width = lists.shape[3]
            _need(((count >= 0) & (count <= width)).all(), f"{name}num must lie in 0 .. {width}, the list width")
            listed = torch.arange(width, device=lists.device) < count.unsqueeze(-1)
            inside = (lists >= 0) & (lists < kb)
            _need((inside | ~listed).all(), f"{name}idx names a block outside 0 .. {kb - 1} (M={self.keys})")
            counted.scatter_add_(-1, torch.where(listed, lists, kb).long(), listed.to(torch.int32))
        twice = counted[..., :kb] > 1
        _need(not twice.any(), f"a key block is listed twice, first at {_at(twice)}")
        for name, size in (("perm_q", self.queries), ("perm_kv", self.keys)):
            if (x := getattr(self, name)) is not None:
                good = torch.equal(x.sort(-1).values, _arange(size, x).expand_as(x))
                _need(good, f"{name} is no permutation of 0 .. {size - 1}")
        leak = _dense(self.full_num, self.full_idx, kb) & ~self._verdict()[1]
        why = "a full block holds an element that the element test forbids, or runs past M: list it as partial"
        _need(not leak.any(), f"{why}; first at {_at(leak)}")
        return self

    def _both(self) -> tuple[tuple[str, Tensor, Tensor], tuple[str, Tensor, Tensor]]:
        return ("", self.num, self.idx), ("full_", self.full_num, self.full_idx)

    # --- facts ---

    @property
    def grid(self) -> tuple[int, int]:
        """Query blocks and key blocks."""
        return -(-self.queries // self.block[0]), -(-self.keys // self.block[1])

    @property
    def batch(self) -> int:
        """B, or 1 when every row shares the plan."""
        return self._size(0, self.first.shape[0] if self.first is not None else 1)

    @property
    def heads(self) -> int:
        """H, or 1 when every head shares the plan."""
        return self._size(1, 1)

    def _size(self, axis: int, other: int) -> int:
        held = [x for name in _TENSORS if name != "first" and (x := getattr(self, name)) is not None]
        sizes = {s for s in (other, *(x.shape[axis] for x in held)) if s != 1}
        if len(sizes) > 1:
            raise InvalidInput(f"plan: its tensors disagree on {'HB'[axis == 0]}: {sorted(sizes)}")
        return sizes.pop() if sizes else 1

    @property
    def density(self) -> float:
        """Share of the (causal) area of real tokens that is computed, in whole blocks, mean over batch and heads.

        1 keeps every block that causality leaves. Padding is what `tokens` says of keys alone, whatever the query.
        """
        real = None
        if self.tokens is not None and self.tokens.shape[2] == 1:
            real = self.tokens[:, :, 0].expand(-1, -1, self.keys)  # [B|1, H|1, M]
        asks = None if real is None or self.queries > self.keys else real[..., self.keys - self.queries :]
        rows, _, newest = _census(self.perm_q, asks, self.queries, self.block[0], self.num.device)
        columns, oldest, _ = _census(self.perm_kv, real, self.keys, self.block[1], self.num.device)
        area = (rows[..., :, None] * columns[..., None, :]).double()
        if self.causal:
            area = area * (oldest[..., None, :] <= newest[..., :, None] + (self.keys - self.queries))
        kept, total = (area * self.blocks()).sum((-2, -1)), area.sum((-2, -1))
        return float((kept / total.clamp(min=1)).mean())

    @property
    def pairs(self) -> float:
        """Query-key pairs computed, in whole blocks, mean over batch and heads; 2 (D + E) FLOPs each."""
        rows = _lengths(self.queries, self.block[0], self.num.device)
        cols = _lengths(self.keys, self.block[1], self.num.device)
        return float((self.blocks() * (rows[:, None] * cols)).sum((-2, -1)).double().mean())

    def blocks(self) -> Tensor:
        """Kept blocks, full or partial, as bool ``[B|1, H|1, Qb, Kb]``."""
        kb = self.grid[1]
        return _dense(self.num, self.idx, kb) | _dense(self.full_num, self.full_idx, kb)

    def allows(self, i: Tensor, j: Tensor, first: Tensor | int = 0) -> Tensor | None:
        """The element test without `tokens`, for original positions i (queries) and j (keys) that broadcast.

        first: each row's first real token, shaped to broadcast. None when every pair passes.
        """
        p = i + (self.keys - self.queries)
        ok = j <= p if self.causal else None
        if self.window is not None:
            near = (p - j < self.window) if self.causal else ((p - j).abs() < self.window)
            if self.sinks:
                near = near | ((j >= first) & (j < first + self.sinks))
            ok = near if ok is None else ok & near
        return ok

    # --- what each block holds ---

    def _verdict(self) -> tuple[Tensor, Tensor]:
        """For each block ``[B|1, H|1, Qb, Kb]``: may some element pass the test, and do all.

        Where parts of the test mix, "some" may say yes and "all" may say no too often, never the reverse.
        """
        (bq, bk), (n, m), (qb, kb) = self.block, (self.queries, self.keys), self.grid
        i0, i1 = _extent(self.perm_q, n, bq, self.num.device)  # [B|1, H|1, Qb]
        j0, j1 = _extent(self.perm_kv, m, bk, self.num.device)  # [B|1, H|1, Kb]
        p0, p1 = (x[..., :, None] + (m - n) for x in (i0, i1))
        j0, j1 = j0[..., None, :], j1[..., None, :]
        some = torch.ones(1, 1, qb, kb, dtype=torch.bool, device=self.num.device)
        every = some.clone()
        if m % bk:
            every[..., -1] = False
        if self.causal:
            some, every = some & (j0 <= p1), every & (j1 <= p0)
        if self.window is not None:
            w = self.window
            first = 0 if self.first is None else self.first[:, None, None, None]
            touched = p0 - j1 < w if self.causal else (p0 - j1 < w) & (j0 - p1 < w)
            sink = (j0 >= first) & (j0 < first + self.sinks)
            far = torch.where(sink, first + self.sinks, j0)  # the first key that is no sink
            whole = (p1 - far < w) if self.causal else (p1 - far < w) & (j1 - p0 < w)
            if self.sinks:
                some = some & (touched | ((j0 < first + self.sinks) & (j1 >= first)))
                every = every & (whole | ((j0 >= first) & (j1 < first + self.sinks)))
            else:
                some, every = some & touched, every & whole
        if self.tokens is not None:
            has, all_ = self._token_blocks()
            some, every = some & has, every & all_
        return some, every & some

    def _token_blocks(self) -> tuple[Tensor, Tensor]:
        """Whether any and all elements of a block pass `tokens`: two bool ``[B|1, H|1, Qb|1, Kb]``."""
        assert self.tokens is not None
        bq, bk = self.block
        t = self.tokens.expand(-1, -1, -1, self.keys)
        if self.perm_kv is not None:
            t = _take(t, self.perm_kv, 3)
        if self.perm_q is not None and t.shape[2] != 1:
            t = _take(t, self.perm_q, 2)
        some, every = _blockwise(t, bk)
        if t.shape[2] == 1:
            return some, every
        some = _blockwise(some.mT, bq)[0].mT
        every = _blockwise(every.mT, bq, fill=True)[1].mT
        return some, every

    # --- converters ---

    def to_mask(self) -> Tensor:
        """The dense bool mask ``[B|1, H|1, N, M]`` in original order, True = may attend: O(N M) memory."""
        n, m, kb = self.queries, self.keys, self.grid[1]
        device = self.num.device
        i, j = (torch.arange(s, device=device) for s in (n, m))
        slot_q = i[None, None] if self.perm_q is None else _inverse(self.perm_q)  # original position -> slot
        slot_k = j[None, None] if self.perm_kv is None else _inverse(self.perm_kv)

        def spread(count: Tensor, lists: Tensor) -> Tensor:
            rows = _take(_dense(count, lists, kb), slot_q // self.block[0], 2)
            return _take(rows, slot_k // self.block[1], 3)

        tested = spread(self.num, self.idx)
        rule = self.allows(i[:, None], j, 0 if self.first is None else self.first[:, None, None, None])
        tested = tested if rule is None else tested & rule
        tested = tested if self.tokens is None else tested & self.tokens
        return tested | spread(self.full_num, self.full_idx)

    def to_block_mask(self, *, self_contained: bool = True) -> BlockMask:
        """The same plan for `torch.nn.attention.flex_attention`, over permuted slots where it permutes.

        self_contained: the element function also looks the block lists up, so that eager FlexAttention, which
        reads nothing else, is right too; False spares compiled kernels that load.
        """
        from torch.nn.attention.flex_attention import BlockMask

        kb = self.grid[1]
        lists = {}
        for name, count, idx in (("kv", self.num, self.idx), ("full_kv", self.full_num, self.full_idx)):
            wide = F.pad(idx[..., :kb], (0, max(0, kb - idx.shape[3])))
            wide = wide.masked_fill(torch.arange(kb, device=idx.device) >= count.unsqueeze(-1), 0)
            lists |= {f"{name}_num_blocks": count.clone(), f"{name}_indices": wide.clone()}
        return BlockMask.from_kv_blocks(
            **lists,
            BLOCK_SIZE=self.block,
            mask_mod=self._mask_mod(self_contained),
            seq_lengths=(self.queries, self.keys),
        )

    def _mask_mod(self, self_contained: bool) -> Any:
        bq, bk = self.block
        shared = {"tokens": self.tokens, "perm_q": self.perm_q, "perm_kv": self.perm_kv}
        if self_contained:
            kb = self.grid[1]
            shared |= {
                "part": _dense(self.num, self.idx, kb),
                "full": _dense(self.full_num, self.full_idx, kb),
            }
        held = {name: x.contiguous() for name, x in shared.items() if x is not None}
        first = self.first

        def at(name: str, b: Tensor, h: Tensor, *where: Tensor) -> Tensor:
            x = held[name]
            own = (b, h, *where)
            return x[tuple(w if size != 1 else w * 0 for w, size in zip(own, x.shape, strict=True))]

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            i = at("perm_q", b, h, q) if "perm_q" in held else q
            j = at("perm_kv", b, h, k) if "perm_kv" in held else k
            start: Tensor | int = 0 if first is None else (first[b] if first.shape[0] > 1 else first[b * 0])
            ok = self.allows(i, j, start)
            ok = (q >= 0) if ok is None else ok
            if "tokens" in held:
                ok = ok & at("tokens", b, h, i, j)
            if "part" in held:
                ok = (ok & at("part", b, h, q // bq, k // bk)) | at("full", b, h, q // bq, k // bk)
            return ok

        return mask_mod

    def __repr__(self) -> str:
        size = f"B={self.batch}, H={self.heads}, N={self.queries}, M={self.keys}, block={self.block}"
        rule = f"causal={self.causal}, window={self.window}, sinks={self.sinks}"
        held = "".join(f", {x}" for x in ("tokens", "perm_q", "perm_kv") if getattr(self, x) is not None)
        return f"BlockPlan({size}, {rule}{held})"


# --- helpers ---


def _need(ok: Any, message: str) -> None:
    if not bool(ok):
        raise InvalidInput(f"plan: {message}")


def _at(bad: Tensor) -> str:
    """Where the first True of ``[B|1, H|1, Qb, Kb]`` lies, for messages."""
    if not bool(bad.any()):
        return ""
    return "batch {}, head {}, query block {}, key block {}".format(*bad.nonzero()[0].tolist())


def _arange(size: int, like: Tensor) -> Tensor:
    return torch.arange(size, dtype=like.dtype, device=like.device)


def _lengths(size: int, block: int, device: torch.device) -> Tensor:
    """Tokens in each block of `size` tokens: ``[blocks]``, the last one may be short."""
    start = torch.arange(0, size, block, device=device)
    return (size - start).clamp(max=block)


def _extent(perm: Tensor | None, size: int, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Least and greatest original position in each block: two ``[B|1, H|1, blocks]``."""
    if perm is None:
        start = torch.arange(0, size, block, device=device)[None, None]
        return start, (start + block - 1).clamp(max=size - 1)
    blocks = -(-size // block)
    padded = F.pad(perm, (0, blocks * block - size), mode="replicate") if size % block else perm
    tiles = padded.reshape(*perm.shape[:2], blocks, block)
    return tiles.amin(-1), tiles.amax(-1)


def _census(
    perm: Tensor | None, real: Tensor | None, size: int, block: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Real tokens in each block, and their least and greatest position: three ``[B|1, H|1, blocks]``."""
    place = torch.arange(size, device=device)[None, None] if perm is None else perm.long()
    real = torch.ones_like(place, dtype=torch.bool) if real is None else real
    real = real if perm is None else _take(real[:, :, None], perm, 3)[:, :, 0]
    pad = (0, -size % block)
    count, low, high = (
        F.pad(x, pad, value=fill).unflatten(-1, (-1, block))
        for x, fill in ((real, 0), (torch.where(real, place, size), size), (torch.where(real, place, -size), -size))
    )
    return count.sum(-1), low.amin(-1), high.amax(-1)


def _blockwise(x: Tensor, block: int, fill: bool = False) -> tuple[Tensor, Tensor]:
    """Any and all of a bool tensor over blocks of its last axis; a short last block is filled with `fill`."""
    x = F.pad(x, (0, -x.shape[-1] % block), value=fill).unflatten(-1, (-1, block))
    return x.any(-1), x.all(-1)


def _lists(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Counts ``[.., Qb]`` and ascending lists ``[.., Qb, W]``, int32, of the kept blocks ``[.., Qb, Kb]``.

    On the CPU W is the longest list; elsewhere it is Kb, so that shapes never depend on values.
    """
    kb = kept.shape[-1]
    num = kept.sum(-1, dtype=torch.int32)
    slot = torch.where(kept, kept.cumsum(-1) - 1, kb)
    idx = torch.zeros(*kept.shape[:-1], kb + 1, dtype=torch.int32, device=kept.device)
    idx.scatter_(-1, slot, torch.arange(kb, dtype=torch.int32, device=kept.device).expand_as(kept).contiguous())
    width = max(1, int(num.max())) if kept.device.type == "cpu" else kb
    return num, idx[..., :width].contiguous()


def _dense(count: Tensor, lists: Tensor, kb: int) -> Tensor:
    """Listed blocks as bool ``[B|1, H|1, Qb, Kb]``."""
    listed = torch.arange(lists.shape[3], device=lists.device) < count.unsqueeze(-1)
    out = torch.zeros((*count.shape, kb + 1), dtype=torch.bool, device=count.device)
    return out.scatter_(-1, torch.where(listed, lists, kb).long(), True)[..., :kb]


def _inverse(perm: Tensor) -> Tensor:
    """Original position -> slot."""
    return torch.empty_like(perm).scatter_(-1, perm.long(), _arange(perm.shape[-1], perm).expand_as(perm))


def _take(x: Tensor, index: Tensor, axis: int) -> Tensor:
    """``x [B|1, H|1, .., ..]`` gathered along `axis` (2 or 3) by ``[B|1, H|1, L]``; B, H broadcast."""
    lead = torch.broadcast_shapes(x.shape[:2], index.shape[:2])
    index = index.long()[:, :, :, None] if axis == 2 else index.long()[:, :, None, :]
    shape = list(x.shape)
    shape[axis] = index.shape[axis]
    if index.shape[:2] == (1, 1):
        return x.index_select(axis, index.flatten())
    x = x.expand(*lead, *x.shape[2:])
    return x.gather(axis, index.expand(*lead, *shape[2:]))
