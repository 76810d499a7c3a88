r"""Full cache, sparse reads: everything is stored, and a decoding step reads only what it chose.

A `Reader` is to reading what a `Policy` is to storing: a frozen, stateless configuration. `qkv.caches._stores.selective` keeps
keys and values, finds the worth of every block of `block()` slots with the reader's hooks, gathers the best blocks and attends
to them alone. What a reader writes: `rank` (and `features`, a small index that is kept beside the keys, so that ranking need not
read them). What it gets for nothing: per-row lengths, padding that is never stored, chunked prefill, beams, GQA, exact crop,
speculation, save and restore, sinks and recent tokens, budgets, captured steps.

    slot      the place of a token in its row's store = its position in the row (padding is not stored)
    block     `block()` consecutive slots, 1 for token lists; block c holds the slots c * block .. (c + 1) * block - 1
    own       the block of a query's own token: always read, also while it fills; only older, complete blocks are ranked
    selection which blocks each query reads, per KV head or per query head

How a call is read. A prompt (any call of several tokens) is read in full unless `prefill` says otherwise. A single token, or a
block of candidates while speculation records, is read as `choose` says: by default a dense layer (`dense`) reads everything, any
other the best blocks by `rank`. Where the budget covers everything, everything is read.

Methods whose choice depends on more than this call override `choose` and keep tensors in `Reading.notes` (this site, from call to
call: set ``stateful = True``) or in `Reading.board` (the other sites of this cache).

Axes: B batch, H query heads, G key/value heads, A heads that choose (G or H), N queries, S slots, P blocks, C slots of a block,
K chosen blocks, D head width, E value width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from qkv.core.cache import CacheMethod, Compute, Geometry, LayerCache
from qkv.core.errors import Refused
from qkv.core.kernel import kernel

LARGEST, FIRM = 3.0e38, 3.2e38  # of a worth; worth of what must be read
TOLD = "told."  # how names of notes begin that the other sites may read: on the board under that name, by layer


@dataclass(frozen=True, slots=True)
class Selection:
    """Which blocks are read.

    index: int64 or int32 ``[B, A, N or 1, K]`` block numbers, each at most once per query, below 0 = none (int32 only); one entry
    for all queries shares a choice. valid: bool of the same shape, False = nothing is read there (whatever its index), or None
    when all are. exact: the last block of every query is its own and no other is partly filled, so that the host knows which
    slots are read (`Reading.best` sets it).
    """

    index: Tensor
    valid: Tensor | None = None
    exact: bool = False

    def ordered(self) -> Selection:
        """The same choice with blocks in ascending order, invalid entries last."""
        if self.index.dtype == torch.int32:
            return self.plain().ordered()
        if self.valid is None:
            return Selection(self.index.sort(-1).values, None, self.exact)
        key, at = torch.where(self.valid, self.index, torch.iinfo(torch.int64).max).sort(-1)
        valid = self.valid.gather(-1, at)
        return Selection(key.masked_fill(~valid, 0), valid)

    def plain(self) -> Selection:
        """The same choice as int64 with its mask."""
        if self.index.dtype == torch.int64:
            return self
        valid = self.index >= 0
        return Selection(self.index.clamp(min=0).long(), valid if self.valid is None else valid & self.valid)

    def marked(self) -> Tensor:
        """The same choice as int32, -1 = none: what kernels take."""
        index = self.index if self.valid is None else self.index.masked_fill(~self.valid, -1)
        return index.to(torch.int32)


@dataclass(frozen=True, slots=True)
class Blocks:
    """Blocks that are complete, to be described by `Reader.features`.

    keys ``[B, G, P, C, D]`` (rotated to their positions), values ``[B, G, P, C, E]``, queries ``[B, H, P, C, D]`` of the same
    tokens (None unless `Reader.wants_queries`), position int64 ``[B, 1, P, C]`` the slot of each token.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor | None
    position: Tensor
    geometry: Geometry
    notes: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Reading:
    """What a reader sees of one call, after its tokens were stored.

    queries ``[B, H, N, D]`` (0 in padding). position int64 ``[B, N]`` slot of each query's own token, -1 = padding. keys
    ``[B, G, S, D]``, values ``[B, G, S, E]``: the store, S a multiple of `block`; a query may read slots <= its position, the
    others hold anything. features ``[B, G or H, P, ...]`` by name, valid for complete blocks. notes: tensors ``[B, ...]`` of this
    site, kept from call to call; replace entries, never write into them. board: of all sites of this cache, None for one that
    stands alone; a note whose name begins with `TOLD` also lies there, ``board[name][layer]``, and follows the site's rows.
    most: blocks that any query reads at most by the budget (a host number: shapes depend on it). since: the earliest slot of this
    call in any row (a host number). whole: the call is a prompt that is read in full. at: the slot of the only query, the same in
    every row, where the host knows it, else None. slot32: the position of single tokens as int32 ``[B]`` where kernels serve them
    (CUDA, up to 32 bits), else None. steady: every query that may read less than it sees reads exactly `most` blocks.
    window: the queries are a window of a prompt (`Reader.prefill`).
    """

    queries: Tensor
    position: Tensor
    keys: Tensor
    values: Tensor
    features: dict[str, Tensor]
    block: int
    most: int
    since: int
    whole: bool
    at: int | None
    slot32: Tensor | None
    steady: bool
    scale: float
    geometry: Geometry
    notes: dict[str, Tensor]
    board: dict[str, Any] | None
    window: bool = False

    @property
    def tokens(self) -> Tensor:
        """int64 ``[B, 1, N, 1]`` slots that each query may see, its own included (0 = padding)."""
        return (self.position + 1)[:, None, :, None]

    @property
    def count(self) -> int:
        """P: blocks of the store."""
        return self.keys.shape[2] // self.block

    def grouped(self, x: Tensor, how: str = "max") -> Tensor:
        """``[B, H, N, P]`` to ``[B, G, N, P]``: the query heads of a KV head combined by ``max``, ``sum`` or ``mean``."""
        b, _, n, p = x.shape
        y = x.reshape(b, self.keys.shape[1], -1, n, p)
        return y.amax(2) if how == "max" else getattr(y, how)(2)

    def dots(self, index: Tensor, queries: Tensor | None = None) -> Tensor:
        """Products of each query head with vectors ``[B, G or H, P, D]``: ``[B, H, N, P]``, not scaled."""
        q = self.queries if queries is None else queries
        b, h, n, d = q.shape
        a = index.shape[1]
        out = q.reshape(b, a, h // a * n, d) @ index.mT.to(q.dtype)
        return out.reshape(b, h, n, -1)

    def logits(self) -> Tensor:
        """Exact ``[B, H, N, S]``, -inf where a query may not look. Reads every key."""
        x = self.dots(self.keys) * self.scale
        slot = torch.arange(x.shape[-1], device=x.device)
        return x.masked_fill(slot >= self.tokens, -torch.inf)

    def last(self) -> tuple[Reading, Tensor]:
        """The newest real query of each row alone (N = 1), and which rows have one, bool ``[B]``."""
        at = self.position.argmax(-1)  # [B]
        rows = torch.arange(at.shape[0], device=at.device)
        q = self.queries[rows, :, at].unsqueeze(2)
        position = self.position[rows, at].unsqueeze(-1)
        return replace(self, queries=q, position=position, at=None, slot32=None), position[:, 0] >= 0

    def best(self, worth: Tensor, reads: Tensor | None, *, sinks: int = 0, recent: int = 0) -> Selection:
        """The own block, the first `sinks` and last `recent` tokens, then the highest worth, within `reads` tokens.

        worth: ``[B, A, N or 1, P]``; with one entry for several queries these share a choice that serves the earliest and the
        latest of them. reads: int64 broadcastable to ``[B, 1, N or 1, 1]``: tokens that may be read (whole blocks, at least the
        own one), or None where the view is `steady`. Padding queries choose nothing. NaN ranks last.
        """
        if self.slot32 is not None:
            keep = (
                None
                if reads is None or self.steady
                else kept_blocks(reads, self.tokens, self.block)[:, 0, 0, 0].to(torch.int32)
            )
            pick = kernel("gather:select")
            return Selection(
                pick(worth.float(), self.slot32, self.most, block=self.block, keep=keep, sinks=sinks, recent=recent)
            )
        worth = worth.to(torch.promote_types(worth.dtype, torch.float32)).nan_to_num(-LARGEST, LARGEST, -LARGEST)
        if self.at is not None:
            return self._best_of_one(worth, sinks, recent)
        assert reads is not None, "only a steady view knows by itself how much is read"
        c, p = self.block, worth.shape[-1]
        first = last = self.position[:, None, :, None]  # [B, 1, N, 1]
        if worth.shape[2] == 1 and last.shape[2] > 1:
            last = last.amax(2, keepdim=True)
            first = torch.where(first < 0, last, first).amin(2, keepdim=True)
            reads = reads.amax(2, keepdim=True) if reads.ndim == 4 else reads
        block = torch.arange(p, device=worth.device)
        if sinks or recent:
            firm = (block * c < sinks) | ((block + 1) * c > first + 1 - recent)
            worth = worth.masked_fill(firm, FIRM)
        own = block >= torch.div(first, c, rounding_mode="floor")
        worth = worth.masked_fill(own, torch.inf).masked_fill(block * c > last, -torch.inf)
        k = min(self.most, p)
        top, index = worth.topk(k, dim=-1)
        keep = kept_blocks(reads, last + 1, c)
        valid = (top > -torch.inf) & (torch.arange(k, device=worth.device) < keep)
        return Selection(index, valid)

    def _best_of_one(self, worth: Tensor, sinks: int, recent: int) -> Selection:
        """`best` where the host knows which block is the own one: no mask is made."""
        assert self.at is not None
        c = self.block
        own = self.at // c
        k = min(self.most, own + 1) - 1
        last = torch.full((*worth.shape[:3], 1), own, dtype=torch.int64, device=worth.device)
        if not k:
            return Selection(last, None, True)
        worth = worth[..., :own]
        if sinks or recent:
            worth = worth.clone()
            worth[..., : -(-sinks // c)] = FIRM
            worth[..., max(0, (self.at + 1 - recent) // c) :] = FIRM
        return Selection(torch.cat((worth.topk(k, dim=-1, sorted=False).indices, last), -1), None, True)


def kept_blocks(reads: Tensor, tokens: Tensor, block: int) -> Tensor:
    """Blocks that fit into `reads` tokens: all that hold something when they fit, else whole ones, at least 1."""
    every = torch.div(tokens + block - 1, block, rounding_mode="floor")
    some = torch.div(reads, block, rounding_mode="floor").clamp(min=1)
    return torch.where(reads >= tokens, every, torch.minimum(some, every))


def share(budget: int | float, tokens: Tensor) -> Tensor:
    """A budget in tokens to read of `tokens` int64: an int as it is, a share rounded down, at least 1."""
    if isinstance(budget, int):
        return torch.full_like(tokens, budget)
    return tokens if budget == 1.0 else (tokens.to(torch.float64) * budget).to(torch.int64).clamp(min=1)


@dataclass(frozen=True, kw_only=True)
class Reader(CacheMethod):
    """Store everything, read a part. Override `rank`, and what it needs. See the module's docstring."""

    stateful: ClassVar[bool] = False
    """`Reading.notes` are kept between calls: speculation snapshots them and goes on token by token."""
    capturable: ClassVar[bool] = False
    """`choose`, `rank` and `features` read no value on the host: a decoding step may become a CUDA graph."""
    wants_queries: ClassVar[bool] = False
    """`features` gets the queries of its blocks: the store keeps those of the unfinished block."""
    alone: ClassVar[bool] = False
    """Queries of a prompt's window choose each for itself, so any number of windows may be read in one."""
    ordered: ClassVar[bool] = False
    """What is read is laid out in ascending order (implied by `shift`)."""

    def block(self) -> int:
        """Slots of a block; default: the parameter `block_size`, or 1 (token lists)."""
        return getattr(self, "block_size", 1)

    def reads(self, tokens: Tensor) -> Tensor:
        """Tokens that a query may read of the `tokens` it sees, int64 in, int64 of the same shape out (on any device).

        Default: the `budget` parameter. A block counts whole; the own block is read whatever this says.
        """
        return share(getattr(self, "budget"), tokens)  # noqa: B009

    def sinks(self) -> int:
        """The first tokens that are always read (rounded up to blocks, within the budget)."""
        return 0

    def recent(self) -> int:
        """The newest tokens that are always read, the own one included (rounded up to blocks, within the budget)."""
        return 0

    def dense(self, geometry: Geometry) -> bool:
        """Whether this site always reads everything (no index is kept there)."""
        return False

    def hosted(self, geometry: Geometry) -> bool:
        """Whether this site's keys and values lie in host memory, and only its index and what it reads on the device.

        `Reading.keys` and `Reading.values` lie there then: a reader that looks at them takes what it needs to its queries.
        """
        return False

    def prefill(self, geometry: Geometry) -> int | None:
        """None: a call of several tokens is read in full. An int: it is read through `choose`, so many queries at a time.

        Such windows begin at multiples of that number in every row. Where `choose` gives None the window is read in full.
        """
        return None

    def prompt(self, geometry: Geometry) -> Compute | None:
        """The attention of a call that is read in full, where a method has one of its own; None: exact.

        It is given all columns with the padding as mask; an attention that the host sets comes before it.
        """
        return None

    def features(self, blocks: Blocks) -> dict[str, Tensor]:
        """What is kept beside complete blocks: tensors ``[B, G or H, P, ...]`` by name, computed once per block."""
        return {}

    def ready(self) -> int:
        """Rows of fewer tokens are not indexed yet (`reads` must cover them): for an index that depends on its first tokens."""
        return 0

    def describe(self, view: Reading) -> bool:
        """In a captured step: write what `features` gives for every row's own block in place (by a kernel), and say True.

        Called with `view.slot32`. The default says False: `features` is called on that block.
        """
        return False

    def observe(self, view: Reading) -> None:
        """Called on every call once its tokens are stored, before they are indexed and read: a place to fill `view.notes`.

        `view.features` do not know this call yet.
        """
        return None

    def rank(self, view: Reading) -> Tensor:
        """Worth ``[B, A, N or 1, P]`` of every block to every query, A = G or H; what may not or must be read is not its concern.

        P is `view.count`. Needed unless `choose` is overridden.
        """
        raise NotImplementedError(f"{type(self).__name__} defines neither rank nor choose")

    def choose(self, view: Reading) -> Selection | None:
        """What each query reads, or None for everything."""
        reads = None if view.steady else self.reads(view.tokens)
        return view.best(self.rank(view), reads, sinks=self.sinks(), recent=self.recent())

    def shift(self, view: Reading, first: Tensor, tokens: Tensor) -> Tensor | None:
        """Positions ``[B, A, N, K]`` by which each chosen block is moved forward for its query; None: keys stay where they are.

        first: int64 ``[B, A, N, K]`` first slots of the blocks, in ascending order; tokens, of the same shape: how many slots of
        each are read, 0 = none. The query keeps its rotation, so a key that should stand at distance d from its query moves by
        (query position - d) - slot. A reader that moves blocks chooses for every query by itself. Needs a rotary embedding in
        `fits`.
        """
        return None

    def layer(self, geometry: Geometry) -> LayerCache:
        """See `CacheMethod.layer`."""
        import importlib

        reason = self.fits(geometry)
        if reason is not None:
            raise Refused(f"{self.id} at layer {geometry.layer}: {reason}")
        # By name: core defines the contract, the store that fulfils it lives with the caches.
        return importlib.import_module("qkv.caches._stores.selective").SelectiveCache(self, geometry)


__all__ = ["Blocks", "Reader", "Reading", "Selection", "kept_blocks", "share"]
