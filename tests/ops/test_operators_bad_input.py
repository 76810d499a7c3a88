"""Bad input to every operator: gates out of range, states that do not belong, settings that do not fit."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import qkv
from qkv.core.errors import InvalidInput, InvalidParameter, QKVError, Refused, StateError
from qkv.core.operator import Operator
from qkv.core.state import State

torch.set_num_threads(1)
SIZES = {"b": 2, "h": 4, "g": 2, "n": 7, "m": 7, "d": 8, "e": 6, "s": 5, "w": 9}
SPECS: dict[str, Any] = {s.id: s for s in qkv.methods(kind="operator")}
RECURRENT = [name for name, s in SPECS.items() if s.initial is not None]
EXTRAS = [(name, extra) for name, s in SPECS.items() for extra in s.extras]


def sizes(method: Operator, **other: int) -> dict[str, int]:
    found = SIZES | other
    return found if method.spec.gqa else found | {"g": found["h"]}


def sample(method: Operator, name: str, **other: int) -> Tensor:
    extra, found = method.spec.extras[name], sizes(method, **other)
    torch.manual_seed(1)
    return extra.sample(*(found[a] if a in found else int(a) for a in extra.axes.split("|")[-1]))


def draw(method: Operator, **other: int) -> dict[str, Any]:
    """A call that is right: causal where it can be."""
    s = sizes(method, **other)
    torch.manual_seed(0)
    q, k, v = (torch.randn(s["b"], s[h], s["n"], s[w]) for h, w in ("hd", "gd", "ge"))
    causal = method.spec.causal != "never"
    needed = [n for n, x in method.spec.extras.items() if x.required or (causal and n in method.spec.causal_needs)]
    more = {n: sample(method, n, **other) for n in needed}
    return {"q": q, "k": q if method.id == "ecoformer" else k, "v": v, "causal": causal} | more


def first(method: Operator, call: dict[str, Any]) -> dict[str, Any]:
    """The first token of a call."""
    one = {}
    for name, x in call.items():
        if name in ("q", "k", "v"):
            one[name] = x[:, :, :1]
        elif name in method.spec.extras:
            axes = next(a for a in method.spec.extras[name].axes.split("|")[::-1] if len(a) == x.ndim)
            for at, letter in enumerate(axes):
                x = x.narrow(at, 0, 1) if letter in "nm" else x
            one[name] = x
    return one


@cache
def state(name: str, **other: int) -> State:
    method = qkv.method(name)
    return method(**draw(method, **other), return_state=True)[1]


def both(name: str, given: State, error: type[QKVError], says: str) -> None:
    """The whole form and the step refuse a state."""
    method = qkv.method(name)
    call = draw(method)
    with pytest.raises(error, match=says):
        method(**call, initial_state=given)
    if method.spec.step is not None:
        with pytest.raises(error, match=says):
            method.step(state=given, **first(method, call))


@pytest.mark.parametrize(("name", "extra"), EXTRAS)
def test_extras_out_of_range_or_shape(name: str, extra: str) -> None:
    method = qkv.method(name)
    call, declared = draw(method), method.spec.extras[extra]
    right = call.get(extra, sample(method, extra))
    wrong: list[Any] = [right.tolist(), right.to("meta"), right.unsqueeze(0)]
    if right.is_floating_point():
        wrong.append(torch.full_like(right, torch.nan))
        if declared.high is not None:
            wrong.append(torch.full_like(right, declared.high + 0.5))
        if declared.low is not None:
            wrong.append(torch.full_like(right, declared.low - 0.5))
    for bad in wrong:
        with pytest.raises(InvalidInput, match=f"{extra}"):
            method(**call | {extra: bad})


def test_no_operator_takes_a_decay_that_grows() -> None:
    decays = [(n, x) for n, x in EXTRAS if x in ("log_decay", "rate", "slopes")]
    assert len(decays) >= 3
    for name, extra in decays:
        assert SPECS[name].extras[extra].high == 0.0 or SPECS[name].extras[extra].low == 0.0


@pytest.mark.parametrize("name", RECURRENT)
def test_states_of_others(name: str) -> None:
    for other in RECURRENT:
        if other != name:
            both(name, state(other), StateError, f"{name} was given the state of '{other}'")
    both(name, next(iter(state(name).tensors.values())), InvalidInput, "a state is a `State`")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize("other", [{"b": 3}, {"h": 8, "g": 4}, {"e": 10}], ids=str)
def test_states_of_another_shape(name: str, other: dict[str, int]) -> None:
    both(name, state(name, **other), StateError, "has shape")


@pytest.mark.parametrize("name", RECURRENT)
def test_states_that_are_not_whole_or_lie_elsewhere(name: str) -> None:
    given = state(name)
    for missing in given.tensors:
        some = {n: x for n, x in given.tensors.items() if n != missing}
        both(name, State(name, some, given.seen), StateError, f"'{missing}' has shape None")
        moved = given.tensors | {missing: given.tensors[missing].to("meta")}
        both(
            name,
            State(name, moved, given.seen),
            StateError,
            f"'{missing}' lies on meta, the inputs on cpu; use state.to",
        )
    with pytest.raises(StateError, match="not all among the state's 2"):
        given.index(torch.tensor([0, 2]))
    for rows in (torch.tensor([0.0]), torch.tensor(1), torch.tensor([True, False])):
        with pytest.raises(StateError, match="rows are ints"):
            given.index(rows)


@pytest.mark.parametrize("name", RECURRENT)
def test_states_that_were_rounded_or_ran_away(name: str) -> None:
    given = state(name)
    both(name, given.to(torch.bfloat16), StateError, "is torch.bfloat16; recurrent states are float32 or wider")
    method = qkv.method(name)
    for which, x in given.tensors.items():
        if x.is_floating_point():
            bad = State(name, given.tensors | {which: torch.full_like(x, torch.nan)}, given.seen)
            with pytest.raises(InvalidInput, match=f"initial_state: {which} holds NaN"):
                method(**draw(method), initial_state=bad)  # type: ignore[operator]


def test_extras_are_real_numbers() -> None:
    method = qkv.method("gla")
    call = draw(method)  # type: ignore[arg-type]
    call["log_decay"] = call["log_decay"].to(torch.complex64)
    with pytest.raises(InvalidInput, match="real numbers, not"):
        method(**call)  # type: ignore[operator]


@pytest.mark.parametrize("name", [n for n in SPECS if n not in RECURRENT])
def test_operators_without_a_state_take_none(name: str) -> None:
    method = qkv.method(name)
    with pytest.raises(Refused, match="no recurrent state"):
        method(**draw(method), initial_state=state("gla"))


@pytest.mark.parametrize("name", SPECS)
def test_sizes_that_do_not_fit(name: str) -> None:
    for p in SPECS[name].parameters:
        if p.type == "int" and p.low is not None:
            wrong: list[Any] = [int(p.low) - 1, int(p.low) - 64, 2.5, True, "x", None]
            for bad in wrong:
                with pytest.raises(InvalidParameter, match=f"{name}: {p.name}="):
                    qkv.method(name, **{p.name: bad})
        if p.name == "sub_chunk":
            for chunk in (p.default + 1, p.default - 1):
                with pytest.raises(InvalidParameter, match="sub_chunk"):
                    qkv.method(name, chunk_size=chunk)


def test_sizes_named_alike_agree() -> None:
    method = qkv.method("ecoformer")
    call = draw(method)
    for name in ("planes", "mean"):
        with pytest.raises(InvalidInput, match=rf"`anchors` has w = 9, `{name}` has w = 8; axes hwd and h"):
            method(**call | {name: call[name][..., :-1]})


def test_a_memory_inside_a_chunk_goes_on_with_its_chunks() -> None:
    method = qkv.method("miras", chunk_size=6)
    call = draw(method, n=5, m=5)
    _, given = method(**call, return_state=True)
    for size in (1, 5):
        with pytest.raises(StateError, match=rf"5 tokens into a chunk, chunk_size={size} ends before"):
            qkv.method("miras", chunk_size=size)(**call, initial_state=given)
