"""Steering: an edit of q, k, v, map, head output or logits while the model runs."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from qkv.core.cache import Compute
from qkv.core.site import Site
from qkv.core.spec import Method, Spec


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

    def heads_at(self, site: Site) -> tuple[int, ...]:
        """The query heads it may change at this site; all others stay as they are, bit for bit. Default: all."""
        return tuple(range(site.heads))

    def fits(self, site: Site) -> str | None:
        """None, or why this site cannot be steered."""
        return None
