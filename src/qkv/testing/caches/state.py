"""A cache's memory as a state: taken back, reordered, saved, copied, reset; and the calls that it refuses."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from qkv.core.cache import LayerCache, Step
from qkv.core.errors import Refused, StateError
from qkv.testing._law import Case, close, expect, law, refuses, same
from qkv.testing.caches._memory import CUTS, EXACT, PROMPT, D, drive, places, site, small, stream


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
