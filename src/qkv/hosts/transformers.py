"""The host for transformers: one attention function and one mask function, a cache layer, and the stack on the model.

How it works. `apply` registers the name ``qkv`` once in `AttentionInterface` and `AttentionMaskInterface`, makes it the
model's attention implementation, and hangs a `SiteState` on every attention module; the function looks there and decides per
module. A cache enters through the `DynamicCache` that `generate` (or a forward pass) makes: its still empty layers are
exchanged for ours. `update` only hands the new keys and values over; the attention function that follows immediately, on the
same tensors, does the work, because only it knows queries, mask and layer. Everything is per instance: no table of the
library is changed, and `revert` puts every reference back.

This file is the surface. Beside it: `transformers_sites` (where attention is), `transformers_attention` (what runs there),
`transformers_inline` (attention that a model computes in its own forward),
`transformers_cache` (cache layers around our memories), `transformers_session` (hooks, states, adopting caches),
`transformers_stack` (what fits, entering and going back), `transformers_saving` (folders).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from qkv.core.errors import InvalidInput, Refused
from qkv.core.site import Site, choose
from qkv.core.spec import Method
from qkv.hosts import stack
from qkv.hosts.stack import Call, Plan, Report, SiteState
from qkv.hosts.transformers_attention import ATTRIBUTE, attention_function
from qkv.hosts.transformers_cache import QKVLayer, take_back
from qkv.hosts.transformers_saving import load_cache, restore, save, save_cache
from qkv.hosts.transformers_session import Session, fresh_cache, session_of
from qkv.hosts.transformers_sites import find_sites
from qkv.hosts.transformers_stack import Snapshot, enter, judge

__all__ = [
    "QKVLayer", "apply", "attending", "attention_function", "captured", "carried", "fresh_cache", "load_cache", "observe", "plan",
    "report", "restore", "revert", "save", "save_cache", "sites", "take_back",
]  # fmt: skip


def sites(model: PreTrainedModel) -> list[Site]:
    """See `qkv.sites`."""
    session = model.__dict__.get(ATTRIBUTE)
    return list(session.sites) if session is not None else find_sites(model)


def plan(model: PreTrainedModel, *methods: Method | str, where: Any = "all") -> Plan:
    """See `qkv.plan`."""
    session = model.__dict__.get(ATTRIBUTE)
    return judge(model, stack.coerce(methods), where, sites(model), session)


def apply(
    model: PreTrainedModel, *methods: Method | str, where: Any = "all", data: Any = None, graph: bool = False
) -> PreTrainedModel:
    """See `qkv.apply`."""
    if not isinstance(model, PreTrainedModel):
        raise InvalidInput(f"expected a transformers PreTrainedModel, got {type(model).__name__}")
    chosen = stack.coerce(methods)
    existing = model.__dict__.get(ATTRIBUTE)
    judged = judge(model, chosen, where, sites(model), existing)
    if judged.refusal is not None:
        raise Refused(judged.refusal)
    if data is not None and not any(m.spec.kind == "conversion" for m in chosen):
        raise InvalidInput(f"data= was given, but {', '.join(map(str, chosen))} learns from none; leave it out")
    session = existing or Session(model)
    undo = Snapshot(session)
    try:
        if existing is None:
            session.install()
            model.__dict__[ATTRIBUTE] = session
        for method in chosen:
            enter(session, method, where, data)
        if graph:
            from qkv.hosts import graph as graphs

            session.graph = graphs.install(session)
    except BaseException:
        undo.restore(existing is None)
        raise
    return model


def revert(model: PreTrainedModel) -> PreTrainedModel:
    """See `qkv.revert`."""
    session_of(model, "revert").remove()
    return model


def carried(model: PreTrainedModel) -> list[tuple[Method, list[str]]]:
    """See `qkv.hosts.carried`."""
    session = model.__dict__.get(ATTRIBUTE)
    return [] if session is None else [(e.method, [s.name for s in e.sites]) for e in session.entries]


def report(model: PreTrainedModel) -> Report:
    """See `qkv.report`."""
    session = session_of(model, "report")

    def names(state: SiteState) -> tuple[str, ...]:
        return tuple(str(e.method) for e in session.entries if any(s.name == state.site.name for s in e.sites))

    return stack.summarise(list(session.states.values()), names)


def captured(model: PreTrainedModel) -> bool:
    """Whether this model's decoding steps run as CUDA graphs (``graph=True``), which need room made beforehand."""
    session = model.__dict__.get(ATTRIBUTE)
    return session is not None and session.graph is not None


@contextmanager
def _opened(model: PreTrainedModel) -> Iterator[Session]:
    """The session of a model; one that carries nothing gets one for the length of the block."""
    session = model.__dict__.get(ATTRIBUTE)
    if session is not None:
        yield session
        return
    session = Session(model)
    try:
        session.install()
        model.__dict__[ATTRIBUTE] = session
        yield session
    finally:
        session.remove()


def _unwatchable(state: SiteState) -> str | None:
    """None, or why nobody can look on at a site."""
    site = state.site
    if site.geometry.slopes is not None:
        return "it adds linear position biases (ALiBi) to its logits, which no observer is told of"
    if (
        site.reason is None
        and not state.applied
        and state.session.model.get_submodule(site.name) in state.session.inline
    ):
        return "it computes its attention in its own forward; apply `full` first, which looks inside"
    return site.reason


@contextmanager
def observe(model: PreTrainedModel, callback: Callable[[Site, Call], None], where: Any = "all") -> Iterator[None]:
    """See `qkv.hosts.observe`."""
    with _opened(model) as session:
        chosen = [session.state(s) for s in choose(session.sites, where)]
        reasons = [_unwatchable(state) for state in chosen]
        bad = [(state.site.name, reason) for state, reason in zip(chosen, reasons, strict=True) if reason is not None]
        if bad and where != "all":
            raise Refused(f"{bad[0][0]} cannot be observed: {bad[0][1]}")
        watched = [state for state, reason in zip(chosen, reasons, strict=True) if reason is None]
        if not watched:
            raise Refused(f"no attention site can be observed: {bad[0][0]}: {bad[0][1]}")
        for state in watched:
            state.observers.append(callback)
        try:
            yield
        finally:
            for state in watched:
                state.observers.remove(callback)


@contextmanager
def attending(model: PreTrainedModel, function: Callable[..., Tensor], where: Any = "all") -> Iterator[list[Site]]:
    """See `qkv.hosts.attending`."""
    with _opened(model) as session:
        chosen = choose(session.sites, where)
        states = [session.state(s) for s in chosen]
        for state in states:
            if state.site.reason is not None:
                raise Refused(f"the attention of {state.site.name} cannot be exchanged: {state.site.reason}")
            if state.site.geometry.slopes is not None:
                raise Refused(
                    f"{state.site.name} adds linear position biases (ALiBi) to its logits, which an attention put in its place "
                    "does not take"
                )
            if state.instead is not None or state.cache is not None or not state.plain:
                names = ", ".join(str(e.method) for e in session.entries if state.site in e.sites) or "another loop"
                raise Refused(
                    f"{state.site.name} carries {names}, which an attention put in its place would bypass; revert it"
                )
        for state in states:
            state.instead = function
        try:
            yield chosen
        finally:
            for state in states:
                state.instead = None
