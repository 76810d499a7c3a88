"""What a cache reads: exact attention over what it holds, alone or padded, at once or in pieces.

Axes: B batch, H query heads, G key/value heads, N new queries, T tokens, S stored slots, D head width.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from qkv.core.attend import attend
from qkv.core.cache import CacheMethod, Policy
from qkv.core.merge import merge
from qkv.testing._law import Case, close, expect, law
from qkv.testing.caches._memory import (
    ALONE,
    CUTS,
    EXACT,
    PADS,
    PROMPT,
    SLOPES,
    TOKENS,
    D,
    Stream,
    close_where_real,
    drive,
    evicts,
    keeps_all,
    places,
    site,
    small,
    stream,
)


@law("cache", "A row of a padded batch reads what it reads alone, whatever lies in its padding.")
def row_reads_as_alone(case: Case) -> None:
    """Prompt, steps (one of them idle), and a later block, padded too; junk of size 50 in the padding. Rows that begin alike."""
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
    alike = stream(case, salt=4)
    for x in (alike.k, alike.v):
        x[1, :, PADS : PADS + 9] = x[0, :, :9]
    got = drive(small(case).layer(site()), alike, CUTS)
    for row, pads in enumerate((0, PADS)):
        want = drive(small(case).layer(site()), alike.alone(row), (PROMPT - pads, *CUTS[1:]))
        close(got[row : row + 1, :, pads:], want, atol=EXACT, what=f"row {row} of two that begin alike")


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
            close_where_real(got, want, tokens, EXACT, f"at {dict(limit.parameters)}")


def _real(tokens: Stream, columns: int) -> Tensor | None:
    return None if tokens.padding is None else tokens.padding[:, None, None, :columns]


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
        close_where_real(got, torch.cat(wants, 2), tokens, atol, f"in {str(dtype)[6:]}")


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


@law(
    "cache",
    "At a site with linear position biases (ALiBi) a query reads exact attention with the biases of the true positions, those "
    "that left the cache included; a method that does not add them refuses the site.",
)
def biases_by_true_position(case: Case) -> None:
    """Against plain attention over keys with one channel more, their position, as the two laws above; float64 and float32."""
    method, place = small(case), site(rope=False, slopes=SLOPES)
    reason = method.serves(place)
    if reason is not None:
        named = method.id in reason or method.fits(place) is not None
        expect(named, f"the refusal of linear position biases names no method: {reason}")
        return
    tokens = stream(case)
    with_place = tokens.biased(SLOPES)
    want = attend(with_place.q, with_place.k, tokens.v, mask=_real(tokens, TOKENS), causal=True, scale=D**-0.5).out
    for limit in case.spec.limits:
        if limit.equals == "full":
            got = drive(method.replace(**limit.parameters).layer(place), tokens, CUTS)  # type: ignore[attr-defined]
            close_where_real(got, want, tokens, EXACT, f"with biases at {dict(limit.parameters)}")
    cuts = _gentle(method)
    for dtype, atol in ((torch.float64, EXACT), (torch.float32, 1e-4)) if case.spec.evicts else ():
        tokens, layer = stream(case, sum(cuts), pads=(0, 3), salt=1).to(dtype), method.layer(place)
        with_place, wants = tokens.biased(SLOPES), list[Tensor]()

        def check(before: Tensor | None, at: slice, out: Tensor, tokens=with_place, wants=wants) -> None:
            wants.append(_masked(method, tokens, before, at))

        got = drive(layer, tokens, cuts, check)
        close_where_real(got, torch.cat(wants, 2), tokens, atol, f"with biases in {str(dtype)[6:]}")


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
        close_where_real(got, want, tokens, EXACT, f"in pieces of {cuts[0]}")
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
            close_where_real(got, runs[0][0], tokens, EXACT, f"of prompts of {turns} in pieces")
            expect(stored == runs[0][1], f"in pieces {stored} is stored, at once {runs[0][1]}")


def _pieces(tokens: int, sizes: Sequence[int]) -> list[int]:
    """`tokens` cut into pieces of the given sizes, over and over; whole where no sizes are given."""
    out: list[int] = []
    for size in itertools.cycle(sizes or (tokens,)):
        out.append(min(size, tokens - sum(out)))
        if sum(out) == tokens:
            return out
    return out


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
