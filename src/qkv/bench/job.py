"""What a bench run is to measure: a model, stacks of methods, contexts and tasks, read from settings and checked."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from qkv.bench.environment import plain
from qkv.bench.tasks import Settings, task
from qkv.core import registry
from qkv.core.errors import InvalidParameter, Refused
from qkv.core.spec import Method

KINDS = ("operator", "pattern", "cache", "conversion", "steering")
Stack = tuple[Method, ...]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to measure. Build it with `Job.of`, which reads settings and checks them.

    model: ``smollm2``, a folder or a hub id. methods: stacks, `full` among them. contexts: prompt lengths in tokens. tasks:
    ids. text: a name or file for `qkv.bench.assets.long_text`, None = its default. graph: decode in CUDA graphs.
    """

    model: str
    methods: tuple[Stack, ...]
    contexts: tuple[int, ...]
    tasks: tuple[str, ...]
    settings: Settings = field(default_factory=Settings)
    text: str | None = None
    dtype: str | None = None
    device: str | None = None
    graph: bool = False

    @classmethod
    def of(
        cls,
        model: str,
        methods: Sequence[str | Method | Sequence[Method]],
        contexts: Sequence[int],
        tasks: Sequence[str] = (),
        **more: Any,
    ) -> Job:
        """A checked job. methods: settings (``"h2o:budget=0.25"``; ``"a+b"`` is a stack) or configurations.

        Raises `UnknownName`, `InvalidParameter`, `Refused` for a method that is not applied to a model.
        """
        stacks = list(dict.fromkeys([(registry.method("full"),), *map(stack_of, methods)]))
        for one in stacks:
            for method in one:
                _check_kind(method)
        if not contexts:
            raise InvalidParameter("no context length was given; e.g. --context 512,2k")
        for context in contexts:
            if not isinstance(context, int) or isinstance(context, bool) or context < 2:
                raise InvalidParameter(f"context={context!r} must be a whole number of at least 2 tokens")
        names = tuple(dict.fromkeys(tasks or DEFAULT_TASKS))
        for name in names:
            task(name)
        return cls(
            model=model, methods=tuple(stacks), contexts=tuple(sorted(set(contexts))), tasks=names, **more
        )  # fmt: skip

    def label(self, stack: Stack) -> str:
        """The name of a stack in tables and pictures."""
        return label(stack, self.methods)


DEFAULT_TASKS = ("ppl", "kl", "passkey")


def stack_of(methods: str | Method | Sequence[Method]) -> Stack:
    """``"a:x=1+b"`` or configurations as a stack."""
    if isinstance(methods, Method):
        return (methods,)
    if isinstance(methods, str):
        parts = re.split(r"\+(?=[A-Za-z])", methods)
        if not all(p.strip() for p in parts):
            raise InvalidParameter(f"{methods!r} names no method; write e.g. h2o:budget=0.25, or a+b for a stack")
        return tuple(registry.method(p) for p in parts)
    return tuple(methods)


def label(stack: Sequence[Method], beside: Sequence[Sequence[Method]] = ()) -> str:
    """How a stack is written on the command line, settings at their defaults left out.

    beside: the other stacks of the job; settings in which two uses of one method differ are always written.
    """
    return "+".join(_written(m, [x for s in beside for x in s if x.id == m.id]) for m in stack)


def _written(method: Method, alike: Sequence[Method]) -> str:
    parts = []
    for p in method.spec.parameters:
        value = getattr(method, p.name)
        if value != p.default or any(getattr(x, p.name) != value for x in alike):
            parts.append(f"{p.name}={json.dumps(plain(value)) if isinstance(value, (tuple, list)) else value}")
    return method.id + (":" + ",".join(parts) if parts else "")


def _check_kind(method: Method) -> None:
    if method.spec.kind in KINDS:
        return
    instead = {
        "probe": "it measures heads and changes nothing: use `qkv inspect`",
        "objective": "it teaches a student: use `qkv distill`, then bench the student",
        "layer": "it is a module of new models: bench a model that has it",
        "decoding": "it is a way to produce tokens with a generate function of its own",
        "model": "it is a model of its own",
        "cost": "it is a model of costs",
    }.get(method.spec.kind, "it is not applied to a model")
    raise Refused(f"{method} is of kind {method.spec.kind}, which the bench cannot run: {instead}")
