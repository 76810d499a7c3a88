"""Layers: attention with another head structure, as modules with projections that can be trained."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from qkv.core.spec import Method, Spec


@dataclass(frozen=True, kw_only=True)
class LayerSpec(Spec):
    """Facts about a layer."""

    kind: ClassVar[str] = "layer"


@dataclass(frozen=True, kw_only=True)
class Layer(Method):
    """Base of layer configurations: what a module of a given model width is built from."""

    spec: ClassVar[LayerSpec]

    @abstractmethod
    def build(self, width: int, **factory: Any) -> nn.Module:
        """A freshly initialised module for inputs ``[B, T, width]``. factory: device and dtype."""
