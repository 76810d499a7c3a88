"""The laws of caches: what a memory must keep, whatever it stores.

Most laws drive one site's memory directly, with drawn queries, keys and values, rotated where a model would rotate them, in
a batch of a full and a left-padded row whose padding holds large junk. The rest run `generate` on a tiny random Llama. A
method is taken at its trial settings with `CacheSpec.small` on top, so that it acts on tens of tokens.

Axes: B batch, H query heads, G key/value heads, N new queries, T tokens, S stored slots, D head width.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qkv.core.attend import attend
from qkv.core.cache import CacheMethod, Geometry, LayerCache, Policy, Rope, Step
from qkv.core.errors import Refused, StateError
from qkv.core.merge import merge
from qkv.testing._law import Case, close, expect, finite, law, mutant, refuses, same

H, G, D = 6, 3, 8
PROMPT, PADS = 19, 6
CUTS = (PROMPT, *(1,) * 12, 5, *(1,) * 9)
TOKENS = sum(CUTS)
IDLE, LATER, HOLES = 4, PROMPT + 12, 2
ALONE = (CUTS, (PROMPT - PADS, *CUTS[2:13], 5 - HOLES, *CUTS[14:]))
EXACT = 1e-9


# -- one site's memory, driven directly -----------------------------------------------------------------------------------


def site(rope: bool = True, fixed: bool = True) -> Geometry:
    """The geometry of the site that the laws serve; rope: it has a rotary embedding, with frequencies that are fixed."""
    frequencies = 100.0 ** -(torch.arange(D // 2, dtype=torch.float32) / (D // 2))
    return Geometry(H, G, D, D, layer=1, layers=3, rope=Rope(frequencies, fixed) if rope else None, max_length=512)


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


def is_policy(case: Case) -> bool:
    """The law is about what a `Policy` keeps."""
    return isinstance(case.method, Policy)


def evicts(case: Case) -> bool:
    """The law is about methods that lose tokens."""
    return case.spec.evicts


def keeps_all(case: Case) -> bool:
    """The law is about methods that lose none."""
    return not case.spec.evicts


@law(
    "cache",
    "A row and head may not hold more tokens than its budget (and the decoded ones that a policy says it lags behind) between "
    "two calls.",
    applies=is_policy,
)
def within_budget(case: Case) -> None:
    """Also when the budget is a share of the prompt: of each row's real tokens."""
    methods: list[Any] = [small(case)]
    if any(p.name == "budget" for p in case.spec.parameters):
        methods.append(case.method.replace(budget=0.4))
    for method in methods:
        _within_budget(case, method)


def _within_budget(case: Case, method: Policy) -> None:
    tokens, layer = stream(case), method.layer(site())
    limit, since = [0, 0], [0]

    def check(before: Tensor | None, at: slice, out: Tensor) -> None:
        since[0] += 1
        if before is None or at.stop - at.start > 1:
            limit[:] = [method.slots_at(int(n), site()) for n in (tokens.position[:, : at.stop] >= 0).sum(-1)]
            since[0] = 0
        slack = min(since[0], method.lag())
        held = (layer.positions() >= 0).sum(-1)  # [B, G]
        for row, most in enumerate(limit):
            worst, most = int(held[row].max()), most + slack
            expect(worst <= most, f"row {row} holds {worst} tokens after {at.stop}; its budget is {most}")
        most = max(limit) + slack
        expect(
            int(held.max()) <= layer.kept() <= most,
            f"kept() says {layer.kept()}; {int(held.max())} tokens are held and the budget is {most}",
        )

    drive(layer, tokens, CUTS, check)


@law("cache", "Layers that keep different numbers of tokens keep the budget in the mean.", applies=is_policy)
def layers_share_the_budget(case: Case) -> None:
    """The slots of all layers of stacks of 1 to 13 layers, summed, for prompts of 20 to 4000 tokens."""
    method: Any = small(case)
    methods = [method]
    if any(p.name == "budget" for p in case.spec.parameters):
        methods += [method.replace(budget=b) for b in (0.2, 0.9)]
    for method, layers, tokens in itertools.product(methods, (1, 2, 3, 13), (20, 21, 57, 4000)):
        mine = [method.slots_at(tokens, replace(site(), layer=i, layers=layers)) for i in range(layers)]
        mean = method.slots(tokens)
        what = f"{method} over {layers} layers for {tokens} tokens keeps {mine}; the budget is {mean} per layer"
        expect(sum(mine) == mean * layers and min(mine) >= 1, what)
        expect(mean > tokens or max(mine) <= tokens, f"{what}, and there are {tokens} to keep")


@law(
    "cache",
    "Stored positions are listed in order, each once, none from the future, and the newest token is always kept.",
)
def ordered_and_newest_kept(case: Case) -> None:
    """After every call, for every row and head."""
    tokens, layer = stream(case), small(case).layer(site())

    def check(before: Tensor | None, at: slice, out: Tensor) -> None:
        newest = tokens.position[:, : at.stop].amax(-1).tolist()
        for row in range(2):
            for head, mine in enumerate(places(layer, row)):
                where = f"row {row}, head {head} after {at.stop} columns: {mine}"
                expect(all(a < b for a, b in itertools.pairwise(mine)), f"not in strict order: {where}")
                expect(mine and mine[-1] == newest[row], f"the newest position is {newest[row]}: {where}")

    drive(layer, tokens, CUTS, check)


@law("cache", "Padding takes nobody's place: a left-padded row stores the tokens that it stores alone.")
def padding_displaces_nothing(case: Case) -> None:
    """Compared after every call; what usually breaks it: slots counted in columns instead of positions."""
    tokens = stream(case, ragged=True)
    for row, cuts in enumerate(ALONE):
        batched, alone = small(case).layer(site()), small(case).layer(site())
        mine: list[Any] = []
        drive(batched, tokens, CUTS, lambda *_, batched=batched, mine=mine, row=row: mine.append(places(batched, row)))
        theirs: list[Any] = []
        drive(alone, tokens.alone(row), cuts, lambda *_, alone=alone, theirs=theirs: theirs.append(places(alone, 0)))
        if row:
            expect(
                mine[IDLE] == mine[IDLE - 1], f"idle, row {row} stores {mine[IDLE]}; before it stored {mine[IDLE - 1]}"
            )
            del mine[IDLE]
        for call, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            expect(a == b, f"call {call}: row {row} of a padded batch stores {a}; alone it stores {b}")


@law("cache", "A row of a padded batch reads what it reads alone, whatever lies in its padding.")
def row_reads_as_alone(case: Case) -> None:
    """Prompt, steps (one of them idle), and a later block, padded too; junk of size 50 in the padding."""
    tokens = stream(case, ragged=True)
    got = drive(small(case).layer(site()), tokens, CUTS)
    for row, cuts in enumerate(ALONE):
        want = drive(small(case).layer(site()), tokens.alone(row), cuts)
        real = tokens.position[row] >= 0
        close(got[row : row + 1][:, :, real], want, atol=EXACT, what=f"row {row} of a padded batch")
    late = stream(case, 32, pads=(0, 12), salt=2)  # nothing but padding fills the whole memory first
    got = drive(small(case).layer(site()), late, (1,) * 32)
    want = drive(small(case).layer(site()), late.alone(1), (1,) * 20)
    close(got[1:, :, 12:], want, atol=EXACT, what="a row whose padding is fed token by token")


def _limits(case: Case) -> bool:
    return any(limit.equals == "full" for limit in case.spec.limits)


@law("cache", "At its declared limit (a budget of everything, 16 bits) a cache is exact attention.", applies=_limits)
def limit_is_exact(case: Case) -> None:
    """Prompt, steps and a later block, padded, against exact attention over the whole history."""
    tokens = stream(case)
    want = attend(tokens.q, tokens.k, tokens.v, mask=_real(tokens, tokens.q.shape[2]), causal=True).out
    for limit in case.spec.limits:
        if limit.equals == "full":
            got = drive(small(case).replace(**limit.parameters).layer(site()), tokens, CUTS)  # type: ignore[attr-defined]
            _close_where_real(got, want, tokens, EXACT, f"at {dict(limit.parameters)}")


def _real(tokens: Stream, columns: int) -> Tensor | None:
    return None if tokens.padding is None else tokens.padding[:, None, None, :columns]


def _close_where_real(got: Tensor, want: Tensor, tokens: Stream, atol: float, what: str) -> None:
    real = tokens.position[:, : got.shape[2]] >= 0
    for row in range(got.shape[0]):
        at = real[row]
        close(got[row][:, at], want[row][:, at], atol=atol, what=f"row {row} {what}")


def _gentle(method: CacheMethod) -> Sequence[int]:
    """Blocks that the method absorbs whole, so that what was stored before a block is what its queries saw."""
    most = method.chunk(getattr(method, "slots")(PROMPT)) if isinstance(method, Policy) else None  # noqa: B009
    sizes = (min(17, most or 17), *(1,) * 15, min(3, most or 3), *(1,) * 6)
    return sizes


@law(
    "cache",
    "What a query reads is exact attention in which the evicted tokens are masked, per row and head.",
    applies=evicts,
)
def equals_masked_attention(case: Case) -> None:
    """Stored positions are recorded before each call; the mask over all columns ever seen is built from them.

    With in-cache positions the keys of the reference are rotated to their places by the oldest-first rank of what the query
    sees. float64 to 1e-9, float32 to 1e-4.
    """
    method = small(case)
    cuts = _gentle(method)
    for dtype, atol in ((torch.float64, EXACT), (torch.float32, 1e-4)):
        tokens, layer = stream(case, sum(cuts), pads=(0, 3), salt=1).to(dtype), method.layer(site())
        wants: list[Tensor] = []

        def check(before: Tensor | None, at: slice, out: Tensor, tokens=tokens, wants=wants) -> None:
            wants.append(_masked(method, tokens, before, at))

        got = drive(layer, tokens, cuts, check)
        _close_where_real(got, torch.cat(wants, 2), tokens, atol, f"in {str(dtype)[6:]}")


def _masked(method: CacheMethod, tokens: Stream, before: Tensor | None, at: slice) -> Tensor:
    """The queries at columns `at` over the stored tokens and their own block, from the whole history: ``[B, H, N, D]``."""
    b, g = tokens.k.shape[:2]
    position = tokens.position[:, : at.stop]
    column = position[:, None].expand(b, g, -1)  # [B, G, M] position of every column
    seen = torch.zeros_like(column, dtype=torch.bool)
    if before is not None:
        for row in range(b):
            for head in range(g):
                mine = before[row, head]
                seen[row, head] = torch.isin(column[row, head], mine[mine >= 0])
    seen[:, :, at] = True
    seen &= column >= 0
    n, m = at.stop - at.start, at.stop
    lower = torch.arange(m, device=seen.device) <= torch.arange(m - n, m, device=seen.device)[:, None]
    mask = seen[:, :, None] & lower
    extra = method.sees(site(), position[:, at], column)
    if extra is not None:
        mask = mask & extra
    keys = tokens.k[:, :, :m]
    if getattr(method, "positions", "original") == "cache":
        rope = site().rope
        assert rope is not None
        rank = seen.cumsum(-1) - 1
        newest, last = column.amax(-1, keepdim=True), rank.amax(-1, keepdim=True)
        shift = (rank - last) - (column - newest)
        keys = rope.rotate(keys, shift.masked_fill(~seen, 0))
    q, values = tokens.q[:, :, at], tokens.v[:, :, :m]
    read = attend(q, keys, values, mask=mask, scale=D**-0.5)
    gone = (column >= 0) & ~seen
    rest = method.remainder(
        q, torch.where(gone[..., None], keys, 0), torch.where(gone[..., None], values, 0), gone, D**-0.5
    )
    return read.out if rest is None else merge((read.out, read.lse), rest)[0]


def _chunk_exact(case: Case) -> bool:
    return case.spec.exact_chunks


@law("cache", "A prompt in pieces, or token by token, gives what it gives at once.", applies=_chunk_exact)
def chunks_are_exact(case: Case) -> None:
    """Outputs and what is stored in the end."""
    tokens, one = stream(case), small(case).layer(site())
    want = drive(one, tokens, (TOKENS,))
    for cuts in ((1,) * TOKENS, (7,) * (TOKENS // 7) + (TOKENS % 7,), (PROMPT, TOKENS - PROMPT)):
        layer = small(case).layer(site())
        got = drive(layer, tokens, [n for n in cuts if n])
        _close_where_real(got, want, tokens, EXACT, f"in pieces of {cuts[0]}")
        expect(
            [places(layer, r) for r in range(2)] == [places(one, r) for r in range(2)],
            f"in pieces of {cuts[0]} other tokens are stored than at once",
        )


def _waits(case: Case) -> bool:
    return isinstance(case.method, Policy) and case.method.whole_prompt()


@law("cache", "An announced prompt gives what it gives at once, whatever pieces it comes in.", applies=_waits)
def prompt_in_pieces(case: Case) -> None:
    """Outputs of prompt and steps, and what is stored, padded; a second prompt after the steps comes in pieces too."""
    tokens, method = stream(case), small(case)
    for again in ((PROMPT, *(1,) * 6), (PROMPT, *(1,) * 12, 9, 1, 1)):
        turns = [n for n in again if n > 1]
        runs = []
        for pieces in ((), (5, 4), (1, 2), (7, 1)):
            layer, outs = method.layer(site()), []
            for n in again:
                layer.announce(layer.seen + n if n > 1 else layer.seen)
                outs.append(drive(layer, tokens, _pieces(n, pieces)))
            runs.append((torch.cat(outs, 2), [places(layer, row) for row in range(2)]))
        for got, stored in runs[1:]:
            _close_where_real(got, runs[0][0], tokens, EXACT, f"of prompts of {turns} in pieces")
            expect(stored == runs[0][1], f"in pieces {stored} is stored, at once {runs[0][1]}")


def _pieces(tokens: int, sizes: Sequence[int]) -> list[int]:
    """`tokens` cut into pieces of the given sizes, over and over; whole where no sizes are given."""
    out: list[int] = []
    for size in itertools.cycle(sizes or (tokens,)):
        out.append(min(size, tokens - sum(out)))
        if sum(out) == tokens:
            return out
    return out


@law("cache", "Nothing is lost: every real token is still stored.", applies=keeps_all)
def loses_nothing(case: Case) -> None:
    """For methods that declare that they evict nothing."""
    tokens, layer = stream(case), small(case).layer(site())

    def check(before: Tensor | None, at: slice, out: Tensor) -> None:
        for row in range(2):
            want = list(range(int(tokens.position[row, at.stop - 1]) + 1))
            for mine in places(layer, row):
                expect(mine == want, f"row {row} stores {mine} of {len(want)} tokens")

    drive(layer, tokens, CUTS, check)
    expect(layer.kept() == TOKENS, f"kept() says {layer.kept()} after {TOKENS} tokens")


def _quantises(case: Case) -> bool:
    return keeps_all(case) and any(p.name == "bits" for p in case.spec.parameters)


@law(
    "cache",
    "At 8 bits a cache that only quantises is close to exact attention, and at fewer bits further away.",
    applies=_quantises,
)
def eight_bits_are_close(case: Case) -> None:
    """Largest error over prompt, steps and a later block, relative to the largest output: below 2 % at 8 bits."""
    tokens = stream(case)
    want = attend(tokens.q, tokens.k, tokens.v, mask=_real(tokens, TOKENS), causal=True).out
    errors = {}
    for bits in (8, 4, 2):
        got = drive(small(case).replace(bits=bits).layer(site()), tokens, CUTS)  # type: ignore[attr-defined]
        gap = (got - want)[:, :, PADS:]
        errors[bits] = float(gap.abs().max() / want[:, :, PADS:].abs().max())
    expect(errors[8] < 0.02, f"off by {errors[8]:.2%} of the largest output at 8 bits")
    expect(0 < errors[8] < errors[4] < errors[2], f"more bits are not closer: {errors}")


@law("cache", "A provisional block can be taken back in part: as if its rejected tokens had never come.")
def taken_back_exactly(case: Case) -> None:
    """4 candidates in one to four calls, of which 0 to 4 are kept, against plain decoding of the kept ones; and so on."""
    right, wrong = stream(case, 60), stream(case, 60, salt=2)
    spec, plain = small(case).layer(site()), small(case).layer(site())
    spec.announce(PROMPT)
    spec.record()
    first = drive(spec, right, (PROMPT,))
    close(first, drive(plain, right, (PROMPT,)), atol=EXACT, what="the prompt")
    for turn in range(16):
        t, keep = spec.seen, turn % 5
        got = drive(spec, right.spliced(wrong, t + keep), ((4,), (1, 3), (1, 1, 1, 1))[turn % 3])
        spec.crop(4 - keep)
        expect(spec.seen == t + keep, f"`seen` is {spec.seen} after {4 - keep} of 4 were taken back from {t + 4}")
        if keep:
            want = drive(plain, right, (1,) * keep)
            close(got[:, :, :keep], want, atol=EXACT, what=f"{keep} accepted tokens from {t}")
        stored = [[places(x, row) for row in range(2)] for x in (spec, plain)]
        expect(
            stored[0] == stored[1], f"after {spec.seen} tokens {stored[0]} is stored, plain decoding stores {stored[1]}"
        )


@law("cache", "Without recording, `crop` forgets exactly or refuses with a StateError and changes nothing.")
def crop_or_refusal(case: Case) -> None:
    """Crops of 0, 2 and of more than was ever seen, after steps."""
    tokens = stream(case, 40)
    for count in (0, 2, 41):
        layer, twin = small(case).layer(site()), small(case).layer(site())
        drive(layer, tokens, (PROMPT, 1, 1, 1))
        drive(twin, tokens, (PROMPT, 1) if count == 2 else (PROMPT, 1, 1, 1))
        before, seen = layer.tensors(), layer.seen
        try:
            layer.crop(count)
        except StateError:
            expect(count > 0, "crop(0) was refused")
            after = layer.tensors()
            expect(layer.seen == seen and before.keys() == after.keys(), "a refused crop changed what is counted")
            for name, x in before.items():
                same(after[name], x, f"{name} after a refused crop")
            continue
        expect(count <= seen, f"{count} tokens were taken back from a memory that saw {seen}")
        expect(layer.seen == seen - count, f"`seen` is {layer.seen} after {count} of {seen} tokens were taken back")
        for row in range(2):
            expect(
                places(layer, row) == places(twin, row), f"row {row} stores {places(layer, row)} after crop({count})"
            )
        if (
            case.spec.evicts or not count
        ):  # a quantised residual fills up again: what is stored differs in precision only
            got, want = (drive(x, tokens, (1,) * 8) for x in (layer, twin))
            close(got, want, atol=EXACT, what=f"8 steps after crop({count})")


@law("cache", "Reordering beams moves everything that belongs to a row.")
def beams_carry_everything(case: Case) -> None:
    """Rows repeated and swapped after a prompt and steps = those rows from the beginning."""
    tokens, rows = stream(case), torch.tensor([1, 1, 0], device=case.device)
    moved, fresh = small(case).layer(site()), small(case).layer(site())
    drive(moved, tokens, CUTS[:5])
    moved.select(rows)
    drive(fresh, tokens.rows(rows), CUTS[:5])
    got, want = (drive(x, tokens.rows(rows), CUTS[5:]) for x in (moved, fresh))
    close(got, want, atol=EXACT, what="after the reorder")
    for row in range(3):
        expect(places(moved, row) == places(fresh, row), f"row {row} stores other tokens after a reorder")


@law("cache", "`tensors` holds copies of everything, and `restore` goes on from them bit by bit.")
def saved_is_restored(case: Case) -> None:
    """Saved in the middle, the original runs on, then a fresh layer is restored and runs the same tokens."""
    tokens, layer = stream(case), small(case).layer(site())
    expect(layer.tensors() == {}, "an empty memory has tensors")
    drive(layer, tokens, CUTS[:7])
    saved = layer.tensors()
    expect(all(isinstance(x, Tensor) for x in saved.values()), "`tensors` holds something else than tensors")
    want = drive(layer, tokens, CUTS[7:])
    twin = small(case).layer(site())
    twin.restore(saved)
    same(drive(twin, tokens, CUTS[7:]), want, "after restore")
    _equal_memories(twin, layer)


@law("cache", "A deep copy is independent: what the original does later does not reach it.")
def copy_is_independent(case: Case) -> None:
    """The original runs on first, then the copy runs the same tokens."""
    tokens, layer = stream(case), small(case).layer(site())
    drive(layer, tokens, CUTS[:7])
    twin = copy.deepcopy(layer)
    want = drive(layer, tokens, CUTS[7:])
    same(drive(twin, tokens, CUTS[7:]), want, "the copy")
    _equal_memories(twin, layer)


def _equal_memories(a: LayerCache, b: LayerCache) -> None:
    same(a.positions(), b.positions(), "stored positions")


@law("cache", "After `reset` nothing is left of what was.")
def reset_forgets(case: Case) -> None:
    """Seen, bytes and tensors are zero, and the next run is that of a fresh memory, also after recording."""
    tokens, layer = stream(case), small(case).layer(site())
    drive(layer, stream(case, salt=3), CUTS)
    layer.reset()
    expect(
        (layer.seen, layer.bytes(), layer.kept(), layer.tensors()) == (0, 0, 0, {}), "something is left after `reset`"
    )
    refuses(StateError, layer.positions, "positions() of an empty memory")
    same(drive(layer, tokens, CUTS), drive(small(case).layer(site()), tokens, CUTS), "after reset")


@law("cache", "The bytes that a memory claims are the bytes of the storages that it holds.")
def bytes_are_held(case: Case) -> None:
    """Every tensor reachable from the layer's attributes counts, by storage; after a prompt, a step and many steps."""
    tokens, layer = stream(case).to(torch.float32), small(case).layer(site())
    expect(layer.bytes() == 0, f"an empty memory claims {layer.bytes()} bytes")
    for cuts in (CUTS[:1], CUTS[1:2], CUTS[2:]):
        drive(layer, tokens, cuts)
        held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in _reachable(layer)}
        expect(
            layer.bytes() == sum(held.values()),
            f"after {layer.seen} tokens bytes() claims {layer.bytes()} and storages of {sum(held.values())} are held",
        )


def _reachable(root: Any) -> Iterator[Tensor]:
    """Every non-empty tensor reachable from an object's attributes; configurations and geometry hold none of their own."""
    todo, known = [root], set()
    while todo:
        x = todo.pop()
        if id(x) in known or isinstance(x, (Geometry, CacheMethod, str, int, float, bool, type)) or x is None:
            continue
        known.add(id(x))
        if isinstance(x, Tensor):
            if x.numel() or x.untyped_storage().nbytes():
                yield x
        elif isinstance(x, dict):
            todo += list(x.values())
        elif isinstance(x, (list, tuple, set)):
            todo += list(x)
        else:
            todo += list(getattr(x, "__dict__", {}).values())
            todo += [getattr(x, name) for name in getattr(type(x), "__slots__", ()) if hasattr(x, name)]


@law("cache", "What cannot be served is refused, and the refusal says so before anything is stored.")
def refuses_what_it_cannot_serve(case: Case) -> None:
    """In-cache positions without a (fixed) rotary embedding; for evicting memories bidirectional calls and 4-D masks."""
    method = small(case)
    if getattr(method, "positions", None) == "cache":
        for geometry, why in (
            (site(rope=False), "no rotary embedding"),
            (site(fixed=False), "length-dependent frequencies"),
        ):
            expect(method.fits(geometry), f"`fits` accepts a site with {why}, whose keys cannot be moved")
            refuses(Refused, lambda geometry=geometry: method.layer(geometry), f"a site with {why}")
    expect(method.fits(site()) is None, f"the laws' own site is refused: {method.fits(site())}")
    if not case.spec.evicts:
        return
    tokens, position = stream(case, 12, pads=(0, 0)), torch.arange(12, device=case.device).expand(2, 12)
    everything = torch.ones(1, 1, 12, 12, dtype=torch.bool, device=case.device)
    for what, step in (
        ("a bidirectional call", Step(position, D**-0.5, causal=False)),
        ("a custom 4-D mask", Step(position, D**-0.5, mask=everything)),
    ):
        layer = method.layer(site())
        refuses(Refused, lambda layer=layer, step=step: layer.attend(tokens.q, tokens.k, tokens.v, step), what)
        expect(layer.seen == 0, f"{what} was refused after its tokens were stored")


# -- in a model ----------------------------------------------------------------------------------------------------------


def tiny(device: str = "cpu") -> Any:
    """A tiny random Llama in float64 with attention sharp enough that it matters what is stored; one per device."""
    return _tiny(device)


@functools.cache
def _tiny(device: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=97,
        hidden_size=H * D,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=H,
        num_key_value_heads=G,
        max_position_embeddings=512,
        initializer_range=0.15,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model: Any = LlamaForCausalLM(config)
    model = model.to(device, torch.float64).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def _prompt(case: Case, length: int = PROMPT, pads: Sequence[int] = (0, PADS), salt: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids ``[B, length]`` and their attention mask, left-padded."""
    ids = case.draw(salt).integers(len(pads), length, low=1, high=97)
    mask = (torch.arange(length, device=ids.device) >= torch.tensor(pads, device=ids.device)[:, None]).long()
    return ids * mask, mask


def _generate(model: Any, ids: Tensor, mask: Tensor, new: int = 12, **options: Any) -> Any:
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True} | options
    return model.generate(ids, attention_mask=mask, max_new_tokens=new, **options)


def _logits(out: Any) -> Tensor:
    """``[B, new, vocabulary]``, which transformers rounds to float32."""
    return torch.stack(out.logits, 1)


ROUNDED = 1e-4
"""Logits of `generate` come in float32."""


def _by_hand(model: Any, ids: Tensor, cuts: Sequence[int]) -> Tensor:
    """Logits ``[B, T, vocabulary]`` of unpadded rows fed in blocks, positions given, on a fresh cache."""
    from transformers import DynamicCache

    past, outs, start = DynamicCache(), [], 0
    for n in cuts:
        at = torch.arange(start, start + n, device=ids.device).expand(ids.shape[0], n)
        part = ids[:, start : start + n]
        outs.append(model(part, position_ids=at, past_key_values=past, use_cache=True).logits)
        start += n
    return torch.cat(outs, 1)


def _rows(ids: Tensor, mask: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    for row in range(ids.shape[0]):
        real = mask[row].bool()
        yield row, ids[row : row + 1, real], mask[row : row + 1, real]


@law("cache", "A left-padded row generates greedily what it generates alone.", expensive=True)
@torch.no_grad()
def greedy_rows_are_alone(case: Case) -> None:
    """Tokens and logits of `generate`."""
    import qkv

    model, (ids, mask) = tiny(case.device), _prompt(case)
    with qkv.applied(model, small(case)):
        both = _generate(model, ids, mask)
        for row, mine, ones in _rows(ids, mask):
            alone = _generate(model, mine, ones)
            close(_logits(both)[row], _logits(alone)[0], atol=ROUNDED, what=f"logits of row {row}")
            expect(torch.equal(both.sequences[row, PROMPT:], alone.sequences[0, mine.shape[1] :]), f"row {row} differs")


@law("cache", "Sampling from a padded batch draws from the distributions that each row has alone.", expensive=True)
@torch.no_grad()
def sampled_rows_are_alone(case: Case) -> None:
    """The sampled tokens are fed to each row alone by hand; the logits must be those that were sampled from."""
    import qkv

    model, (ids, mask) = tiny(case.device), _prompt(case, salt=1)
    with qkv.applied(model, small(case)), torch.random.fork_rng():
        torch.manual_seed(case.seed)
        both = _generate(model, ids, mask, do_sample=True, top_k=0, temperature=2.0)
        for row, mine, _ in _rows(ids, mask):
            text = torch.cat((mine, both.sequences[row : row + 1, PROMPT:]), 1)
            want = _by_hand(model, text, (mine.shape[1], *(1,) * 11))[0, mine.shape[1] - 1 :]
            close(_logits(both)[row], want.float(), atol=ROUNDED, what=f"logits of row {row}")


@law("cache", "Beam search in a padded batch finds what each row finds alone.", expensive=True)
@torch.no_grad()
def beams_are_alone(case: Case) -> None:
    """Sequences and scores of 3 beams."""
    import qkv

    model, (ids, mask) = tiny(case.device), _prompt(case, salt=2)
    with qkv.applied(model, small(case)):
        both = _generate(model, ids, mask, num_beams=3, output_scores=True)
        for row, mine, ones in _rows(ids, mask):
            alone = _generate(model, mine, ones, num_beams=3, output_scores=True)
            close(both.sequences_scores[row], alone.sequences_scores[0], atol=ROUNDED, what=f"score of row {row}")
            expect(torch.equal(both.sequences[row, PROMPT:], alone.sequences[0, mine.shape[1] :]), f"row {row} differs")


@law("cache", "A chat goes on from the cache that `generate` returned.", expensive=True)
@torch.no_grad()
def chat_goes_on(case: Case) -> None:
    """A second turn on the returned cache = the same blocks fed by hand to each row alone."""
    import qkv

    model, (ids, mask) = tiny(case.device), _prompt(case, salt=3)
    turn, ones = _prompt(case, 5, (0, 0), salt=4)
    with qkv.applied(model, small(case)):
        first = _generate(model, ids, mask, new=7)
        text = torch.cat((first.sequences, turn), 1)
        past = first.past_key_values
        expect(
            past.get_seq_length() == PROMPT + 6,
            f"the returned cache counts {past.get_seq_length()} of {PROMPT + 6} tokens",
        )
        grown = torch.cat((mask, ones.new_ones(2, 7), ones), 1)
        second = _generate(model, text, grown, new=7, past_key_values=past)
        for row, pads in enumerate((0, PADS)):
            mine = second.sequences[row : row + 1, pads:]
            cuts = (PROMPT - pads, *(1,) * 6, 6, *(1,) * 6)
            want = _by_hand(model, mine, cuts)[0, -7:]
            close(_logits(second)[row], want.float(), atol=ROUNDED, what=f"second turn of row {row}")


@law(
    "cache",
    "`prefill_chunk_size` works: exact where the method says so, else within budget and nothing lost count of.",
    expensive=True,
)
@torch.no_grad()
def chunked_prefill(case: Case) -> None:
    """A padded prompt in chunks of 5."""
    import qkv

    method, model, (ids, mask) = small(case), tiny(case.device), _prompt(case, salt=5)
    with qkv.applied(model, method):
        got = _generate(model, ids, mask, prefill_chunk_size=5)
        finite(_logits(got), "logits")
        for index, layer in enumerate(got.past_key_values.layers):
            memory = layer.memory
            expect(memory.seen == PROMPT + 11, f"layer {index} has seen {memory.seen} of {PROMPT + 11} columns")
            for row, pads in enumerate((0, PADS)):
                heads, last = places(memory, row), PROMPT + 10 - pads
                expect(
                    all(x[-1] == last for x in heads),
                    f"layer {index}, row {row} lacks its newest token {last}: {heads}",
                )
                if isinstance(method, Policy):
                    place = replace(site(), layer=index)
                    most = method.slots_at(PROMPT - pads, place) + min(11, method.lag())
                    held = max(map(len, heads))
                    expect(held <= most, f"layer {index}, row {row} holds {held} tokens; its budget is {most}")
        if case.spec.exact_chunks:
            close(_logits(got), _logits(_generate(model, ids, mask)), atol=ROUNDED, what="logits in chunks")


@law("cache", "Prompt-lookup and assisted decoding give the tokens of plain greedy decoding.", expensive=True)
@torch.no_grad()
def speculation_is_greedy(case: Case) -> None:
    """A repeating prompt for the lookup, whose candidates are mostly wrong; a twin as assistant, whose candidates are right."""
    import qkv

    method, model, assistant = small(case), tiny(case.device), _assistant(case.device)
    ids, mask = _prompt(case, 9, (0,), salt=6)
    ids, mask = ids.repeat(1, 3), mask.repeat(1, 3)
    new = 24
    with qkv.applied(model, method), qkv.applied(assistant, method):
        want = _generate(model, ids, mask, new=new)
        plain = qkv.report(model).calls
        for name, options in (
            ("prompt-lookup", {"prompt_lookup_num_tokens": 3}),
            ("assisted", {"assistant_model": assistant}),
        ):
            before = qkv.report(model).calls
            got = _generate(model, ids, mask, new=new, **options)
            same(got.sequences, want.sequences, f"{name} decoding")
            calls = qkv.report(model).calls - before
            expect(
                name != "assisted" or calls < plain,
                f"assisted by its twin it took {calls} calls, plain decoding {plain}",
            )


@functools.cache
def _assistant(device: str) -> Any:
    model = copy.deepcopy(tiny(device))
    model.generation_config.num_assistant_tokens = 4
    model.generation_config.num_assistant_tokens_schedule = "constant"
    model.generation_config.assistant_confidence_threshold = 0.0
    return model


@law("cache", "Eviction does not shift positions: a new token is rotated to its place in the text.")
@torch.no_grad()
def positions_count_the_text(case: Case) -> None:
    """Keys and queries of the first layer, which depend on token and position alone, are those of the unmodified model."""
    import qkv

    model, (ids, mask) = tiny(case.device), _prompt(case, salt=7)
    log: list[tuple[Tensor, Tensor, Tensor]] = []
    with qkv.applied(model, spied(small(case), log)):
        text = _generate(model, ids, mask, new=14).sequences
    for row, pads in enumerate((0, PADS)):
        mine, seen = text[row : row + 1, pads:-1], []
        with qkv.hosts.observe(model, lambda s, call, seen=seen: seen.append((call.q, call.k)), where=[0]):
            _by_hand(model, mine, (mine.shape[1],))
        got_q, got_k, at = (
            torch.cat(x, 2 if i < 2 else 1)[row : row + 1] for i, x in enumerate(zip(*log, strict=True))
        )
        close(got_q[:, :, pads:], seen[0][0], atol=EXACT, what=f"queries of row {row}")
        close(got_k[:, :, pads:], seen[0][1], atol=EXACT, what=f"keys of row {row}")
        want = torch.arange(mine.shape[1], device=at.device)[None]
        expect(torch.equal(at[:, pads:].long(), want), f"row {row} is told positions {at[0, pads:].tolist()}")


def spied(method: CacheMethod, log: list[tuple[Tensor, Tensor, Tensor]], layer: int = 0) -> CacheMethod:
    """The same method, whose memory at one layer notes (q, k, position) of every call."""

    def build(self: CacheMethod, geometry: Geometry) -> LayerCache:
        memory = method.layer(geometry)
        if geometry.layer == layer:
            attend_ = memory.attend

            def noted(q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
                log.append((q, k, step.position))
                return attend_(q, k, v, step)

            memory.attend = noted  # type: ignore[method-assign]
        return memory

    return mutant(type(method), layer=build)(**method.settings())


@law(
    "cache",
    "`revert` leaves every parameter, buffer, module, output and attribute as it was, bit for bit.",
    expensive=True,
)
@torch.no_grad()
def revert_restores(case: Case) -> None:
    """After generation, and after an error inside `applied`."""
    import qkv

    model, (ids, mask) = copy.deepcopy(tiny(case.device)).float(), _prompt(case, salt=8)
    logits = model(ids, attention_mask=mask).logits
    before = _picture(model)
    qkv.apply(model, small(case))
    _generate(model, ids, mask, new=14)
    qkv.revert(model)
    _same_picture(_picture(model), before, "after revert")
    same(model(ids, attention_mask=mask).logits, logits, "logits after revert")
    try:
        with qkv.applied(model, small(case)):
            _generate(model, ids, mask, new=3)
            raise InterruptedError
    except InterruptedError:
        pass
    _same_picture(_picture(model), before, "after an error inside `applied`")
    same(model(ids, attention_mask=mask).logits, logits, "logits after an error inside `applied`")


def _picture(model: Any) -> dict[str, Any]:
    """Everything about a model that a method could leave behind."""
    tensors = {n: (id(x), x.clone()) for n, x in [*model.named_parameters(), *model.named_buffers()]}
    modules = {n: (id(m), type(m), sorted(m.__dict__), sorted(m._forward_pre_hooks)) for n, m in model.named_modules()}
    settings = {
        n: m.config.to_dict() | {"_attn": m.config._attn_implementation}
        for n, m in model.named_modules()
        if hasattr(m, "config")
    }
    return {
        "tensors": tensors,
        "modules": modules,
        "settings": settings,
        "generation": _plain(getattr(model, "generation_config", None)),
    }


def _plain(config: Any) -> dict[str, Any]:
    return {} if config is None else config.to_dict()


def _same_picture(got: dict[str, Any], want: dict[str, Any], when: str) -> None:
    for part in ("modules", "settings", "generation"):
        expect(got[part].keys() == want[part].keys(), f"{part} differ {when}")
        for name, x in want[part].items():
            expect(got[part][name] == x, f"{part}: {name or 'the model'} is {got[part][name]} {when}, was {x}")
    expect(got["tensors"].keys() == want["tensors"].keys(), f"parameters and buffers differ {when}")
    for name, (address, x) in want["tensors"].items():
        expect(got["tensors"][name][0] == address, f"{name} is another object {when}")
        same(got["tensors"][name][1], x, f"{name} {when}")


__all__ = ["Stream", "drive", "places", "site", "small", "spied", "stream", "tiny"]
