"""How much a cache keeps, and whose tokens: budgets, order, padding, bytes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qkv.core.cache import CacheMethod, Geometry, Policy
from qkv.testing._law import Case, expect, law
from qkv.testing.caches._memory import (
    ALONE,
    CUTS,
    IDLE,
    TOKENS,
    drive,
    is_policy,
    keeps_all,
    places,
    site,
    small,
    stream,
)


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
