"""Putting a stack of methods on a transformers model: what fits where, entering it, and going back when that fails."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from qkv.core.cache import CacheMethod
from qkv.core.conversion import Conversion
from qkv.core.operator import Operator
from qkv.core.pattern import Pattern
from qkv.core.site import Site, choose
from qkv.core.spec import Method
from qkv.core.steering import Steering
from qkv.hosts import stack
from qkv.hosts.stack import Entry, Plan, SiteState, Verdict
from qkv.hosts.transformers_attention import ATTRIBUTE
from qkv.hosts.transformers_repair import Repairs
from qkv.hosts.transformers_session import Session
from qkv.hosts.transformers_sites import find_sites, keeps_latents, out_of_reach, shares_its_layer


def judge(
    model: PreTrainedModel, methods: Sequence[Method], where: Any, found: Sequence[Site], session: Session | None
) -> Plan:
    """Verdicts per method and site, and the first reason why the whole cannot be applied."""
    verdicts: list[Verdict] = []
    refusal: str | None = None
    before = [(e.method, e.sites) for e in session.entries] if session is not None else []
    for method in methods:
        fits = _role_fits(method)
        if fits is not None:
            return Plan(tuple(verdicts), fits)
        chosen = choose(found, where)
        mine = [Verdict(method, s, _fits(model, method, s)) for s in chosen]
        verdicts += mine
        accepted = [v.site for v in mine if v.reason is None]
        if not accepted and refusal is None:
            first: dict[str | None, str] = {}  # the sites of a model may refuse for reasons of their own
            for verdict in mine:
                first.setdefault(verdict.reason, verdict.site.name)
            said = "; ".join(f"{name}: {reason}" for reason, name in list(first.items())[:3])
            refusal = f"no attention site of {type(model).__name__} accepts {method}: {said}"
        if where != "all" and not callable(where) and len(accepted) < len(mine) and refusal is None:
            bad = next(v for v in mine if v.reason is not None)
            refusal = f"{bad.site.name}, which `where` names, refuses {method}: {bad.reason}"
        conflict = stack.clash([*before, (method, accepted)])
        refusal = refusal or conflict or (out_of_reach(model) if session is None else None)
        before.append((method, accepted))
    return Plan(tuple(verdicts), refusal)


def _fits(model: PreTrainedModel, method: Method, site: Site) -> str | None:
    """None, or why the method cannot act at the site: the rules of the stack, then those that look at the module."""
    module = model.get_submodule(site.name)
    if isinstance(method, CacheMethod) and (hasattr(module, "qkv_cache_layer") or keeps_latents(module)):
        return (
            site.reason or f"{type(module).__name__} keeps a cache of its own, which holds no keys and values to act on"
        )
    if isinstance(method, CacheMethod) and site.reason is None and site.causal and shares_its_layer(module):
        return "its layer of the cache also holds the state of another mixer, which no cache of qkv keeps"
    reason = stack.fits(method, site)
    if reason is None and isinstance(method, Conversion):
        return method.fits(site, module)
    return reason


def _role_fits(method: Method) -> str | None:
    if method.spec.kind in stack.ROLES:
        return None
    hints = {
        "objective": "objectives teach a student: use `qkv distill` or qkv.distill.distill",
        "probe": "probes measure: use `qkv inspect` or the probe's run(...)",
        "layer": "layers are built into new models",
        "decoding": "decoding methods have a generate function of their own",
    }
    return f"{method} is of kind {method.spec.kind}, which is not applied to a model; {hints.get(method.spec.kind, '')}".rstrip(
        "; "
    )


class Snapshot:
    """The session before `apply`, to go back to when it fails half way."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.entries = list(session.entries)
        self.swapped = len(session.swapped)
        self.sites, self.objects, self.repair = session.sites, dict(session.states), session.repair
        self.states = {
            n: (s.operator, s.pattern, s.cache, list(s.steering), s.applied) for n, s in session.states.items()
        }

    def restore(self, fresh: bool) -> None:
        """Go back; fresh: there was no session before."""
        session = self.session
        if fresh:
            session.remove()
            return
        for parent, child, module in reversed(session.swapped[self.swapped :]):
            setattr(parent, child, module)
        del session.swapped[self.swapped :]
        if session.repair is not self.repair and session.repair is not None:
            session.repair.remove()
            session.repair = self.repair
        session.entries, session.sites, session.states = self.entries, self.sites, self.objects
        for name, state in session.states.items():
            operator, pattern, cache, steering, applied = self.states.get(name, (None, None, None, [], False))
            state.operator, state.pattern, state.cache = operator, pattern, cache
            state.steering, state.applied = steering, applied


def enter(session: Session, method: Method, where: Any, data: Any) -> None:
    """Put one judged method at its sites."""
    at = [s for s in choose(session.sites, where) if _fits(session.model, method, s) is None]
    entry = Entry(method, where if not callable(where) else [s.name for s in at], at)
    if method.spec.kind == "conversion":
        convert(session, entry, data)
        session.entries.append(entry)
        return
    for site in at:
        state = session.state(site)
        state.applied = True
        if isinstance(method, CacheMethod):
            state.cache = method
            if (every := method.repairs()) is not None and session.repair is None:
                session.repair = Repairs(session, every)
        elif isinstance(method, Pattern):
            state.pattern = method
        elif isinstance(method, Operator):
            state.operator = method
        elif isinstance(method, Steering):
            state.steering.append(method)
    session.entries.append(entry)


def convert(session: Session, entry: Entry, data: Any, tensors: dict[str, Tensor] | None = None) -> None:
    """Exchange modules for what a conversion builds (from data, or from saved tensors), remembering the old ones."""
    method: Any = entry.method
    before = {s.name: s for s in session.sites}
    if tensors is None:
        built, notes = method.build(session.model, entry.sites, data)
    else:
        built, notes = method.rebuild(session.model, entry.sites, tensors, entry.notes), entry.notes
    for name, module in built.items():
        parent_name, _, child = name.rpartition(".")
        parent = session.model.get_submodule(parent_name)
        session.swapped.append((parent, child, parent.get_submodule(child)))
        setattr(parent, child, module)
    entry.notes = notes
    session.sites = find_sites(session.model)
    for site in session.sites:
        state = session.states.get(site.name)
        if site.name in built:
            new = SiteState(site, session, applied=True)
            if state is not None:  # other methods at the site go on; the counts start anew with the module
                new.operator, new.pattern, new.cache = state.operator, state.pattern, state.cache
                new.steering, new.observers = state.steering, state.observers
            session.states[site.name] = new
            session.model.get_submodule(site.name).__dict__[ATTRIBUTE] = new
        elif state is not None:
            state.site = site
    entry.sites = [s for s in session.sites if s.name in built] or [before[n] for n in built if n in before]
