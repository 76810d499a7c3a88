"""Steering: an edit of q, k, v, map, head output or logits while the model runs."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, final

from torch import Tensor

from qkv.core.cache import Compute
from qkv.core.site import Site
from qkv.core.spec import Method, Spec
from qkv.core.state import State


@final
@dataclass(slots=True)
class Running:
    """What the steerings of one site keep from call to call along one generation: a `State` per method.

    It belongs to the site's cache: made empty with it, and following it when rows are reordered, tokens taken back, or all is
    forgotten.
    """

    states: dict[Method, State] = field(default_factory=dict)

    def select(self, rows: Tensor) -> None:
        """Keep the batch rows `rows` ``[B']``: beams."""
        self.states = {method: state.index(rows) for method, state in self.states.items()}

    def crop(self, tokens: int) -> None:
        """Take the newest tokens back, or raise `StateError` where a state has folded them in."""
        self.states = {method: state.crop(tokens) for method, state in self.states.items()}

    def reset(self) -> None:
        """Forget everything."""
        self.states = {}

    def copy(self) -> Running:
        """One of its own for a copy of the cache (states are values)."""
        return Running(dict(self.states))


@dataclass(frozen=True, kw_only=True)
class SteeringSpec(Spec):
    """Facts about a steering method.

    neutral: parameters at which it is, bit for bit, the base model. normalised: the rows of its attention maps still sum to 1.
    """

    kind: ClassVar[str] = "steering"
    neutral: dict[str, object] | None = None
    normalised: bool = True


@dataclass(frozen=True, kw_only=True)
class Steering(Method):
    """Wraps the attention of a site."""

    spec: ClassVar[SteeringSpec]

    @abstractmethod
    def wrap(self, site: Site, compute: Compute) -> Compute:
        """`compute` with the edit applied; see `qkv.core.cache.Compute` for the call."""

    def wrap_running(self, site: Site, compute: Compute, running: Running) -> Compute:
        """`wrap` along one generation, whose calls share `running`. Default: nothing is kept between calls."""
        return self.wrap(site, compute)

    def heads_at(self, site: Site) -> tuple[int, ...]:
        """The query heads it may change at this site; all others stay as they are, bit for bit. Default: all."""
        return tuple(range(site.heads))

    def fits(self, site: Site) -> str | None:
        """None, or why this site cannot be steered."""
        return None
