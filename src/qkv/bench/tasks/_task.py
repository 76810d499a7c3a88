"""What a task is: a protocol that turns a model under a method into numbers, found by its file name."""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from qkv.bench.measure import Runner
from qkv.core.errors import InvalidInput, InvalidParameter, UnknownName
from qkv.core.spec import Method, near


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the tasks are run; the same for every method of a run.

    windows: stretches of text per context. tokens: scored after each. depths: places of the needle, 0 = start, 1 = end.
    trials: needles per depth. query_aware: the method sees the question while it compresses. chunk: tokens of a prefill
    block, None = all at once. seed: of every draw.
    """

    windows: int = 2
    tokens: int = 24
    depths: tuple[float, ...] = (0.1, 0.5, 0.9)
    trials: int = 1
    query_aware: bool = False
    chunk: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("windows", "tokens", "trials"):
            _at_least_one(name, getattr(self, name))
        if self.chunk is not None:
            _at_least_one("prefill chunk", self.chunk)
        bad = [d for d in self.depths if not 0.0 <= d <= 1.0]
        if bad or not self.depths:
            raise InvalidParameter(f"depths={list(self.depths)} must be numbers from 0 (start) to 1 (end)")


def _at_least_one(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidParameter(f"{name}={value!r} must be a whole number of at least 1")


@dataclass
class Bench:
    """What every task of a run shares: the model, its tokenizer, the text, the settings and all contexts of the run."""

    model: Any
    tokenizer: Any
    text: str
    settings: Settings
    contexts: tuple[int, ...]
    memo: dict[Any, Any] = field(default_factory=dict)

    @property
    def vocabulary(self) -> int:
        """Rows of the model's embedding."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    def tokens(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def begin(self) -> list[int]:
        """The tokens that this tokenizer puts before every text (BOS, or nothing)."""
        bos = getattr(self.tokenizer, "bos_token_id", None)
        return [bos] if bos is not None and list(self.tokenizer("a")["input_ids"][:1]) == [bos] else []


@dataclass
class Trial:
    """A method (none: the unmodified model) at work on the model. memo: passes that several tasks share."""

    bench: Bench
    runner: Runner
    methods: tuple[Method, ...] = ()
    memo: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """The result of one task for one method at one context: plain data."""

    metrics: dict[str, Any]
    cost: dict[str, Any]


class Task(ABC):
    """A protocol. Subclasses are final, stateless, one to a file; `id` is the file's name."""

    id: ClassVar[str]
    title: ClassVar[str]
    says: ClassVar[str]
    """What is computed, in one or two sentences, for the report."""

    @abstractmethod
    def parameters(self, settings: Settings) -> dict[str, Any]:
        """The settings that this task depends on, for its rows."""

    @abstractmethod
    def longest(self, settings: Settings, context: int) -> int:
        """Positions of the model that one pass needs."""

    @abstractmethod
    def check(self, bench: Bench, context: int) -> None:
        """Raise `InvalidInput` when text or context are too short, before anything is measured."""

    def reference(self, trial: Trial, context: int) -> dict[str, Tensor]:
        """What the unmodified model does, kept on disk for the run; empty where no comparison is made."""
        return {}

    @abstractmethod
    def run(self, trial: Trial, context: int, reference: dict[str, Tensor]) -> Outcome:
        """Measure. reference: what `reference` returned."""

    def passes(self, settings: Settings) -> int:
        """Prefills of one run, for the estimate of the time left."""
        return settings.windows


@cache
def _found() -> dict[str, type[Task]]:
    package = importlib.import_module("qkv.bench.tasks")
    out: dict[str, type[Task]] = {}
    for info in pkgutil.iter_modules(package.__path__):
        if info.name.startswith("_"):
            continue
        module = importlib.import_module(f"qkv.bench.tasks.{info.name}")
        mine = [
            x
            for x in vars(module).values()
            if isinstance(x, type) and issubclass(x, Task) and x.__module__ == module.__name__
        ]
        if len(mine) != 1 or mine[0].id != info.name.replace("_", "-"):
            raise ImportError(f"{module.__name__} must define one Task whose id is {info.name.replace('_', '-')!r}")
        out[mine[0].id] = mine[0]
    return out


def tasks() -> dict[str, type[Task]]:
    """Every task by id."""
    return dict(_found())


def task(name: str) -> Task:
    """The task `name`. Raises `UnknownName` with the nearest names."""
    if name not in _found():
        raise UnknownName(f"there is no task {name!r}{near(name, _found())}")
    return _found()[name]()


def tensor(ids: Sequence[int]) -> Tensor:
    """Token ids ``[N]``."""
    return torch.tensor(list(ids), dtype=torch.int64)


def short_text(have: int, need: int, what: str) -> InvalidInput:
    """The error for a text that is too short."""
    return InvalidInput(
        f"the text has {have} tokens where {what} needs {need}; give a longer text (--text), or shorter contexts or fewer "
        "windows"
    )
