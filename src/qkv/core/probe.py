"""Probes: read-only measurements of a model, with a score per head, token or layer.

A `Probe` is a frozen configuration; `run` measures and gives a result that has a `table` (`HeadTable`), `to_dict`, `save`
and `plot`. `inspect` is the same for every probe: a model, its tokenizer and some text in, a result and two files out.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, final, runtime_checkable

from torch import Tensor

from qkv.core.errors import StorageError
from qkv.core.heads import HeadTable
from qkv.core.spec import Method, Spec

Progress = Callable[[int, int, str], None]
"""``progress(done, total, note)``, called after every step of a measurement."""


@runtime_checkable
class Result(Protocol):
    """What every probe gives."""

    @property
    def table(self) -> HeadTable:
        """The score per head."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        ...

    def save(self, path: str | Path) -> Path:
        """Write it as JSON."""
        ...

    def plot(self, path: str | Path) -> Path:
        """Draw it."""
        ...


@dataclass(frozen=True)
class Scene:
    """A model with known attention maps, and what a probe must find in it; the laws build the model.

    says: one line. maps: ``[L, H, T, T]``, row q holds the attention of query q over keys 0..q. tokens: ``[T]`` the token
    that stands (or is generated) at each position. inputs: keywords of `Probe.run`. want: ``[L, H]`` the values its table
    must hold. edit: for probes that look at what heads do and not only where they look: changes the model in place, whose
    heads write nothing otherwise (``layers[l].value [G, T, T]``, ``layers[l].out [H, T, T]``).
    """

    says: str
    maps: Tensor
    tokens: Sequence[int]
    inputs: Mapping[str, Any]
    want: Tensor
    atol: float = 1e-6
    edit: Callable[[Any], None] | None = None


@dataclass(frozen=True, kw_only=True)
class ProbeSpec(Spec):
    """Facts about a probe.

    planted: ``planted(layer, head, layers, heads) -> Scene``, where this one head does what the probe looks for and no
    other does. known: more scenes, each a map whose score follows from the definition. example: ``example(model) -> dict``,
    small keywords of `run` for any causal language model of at least 60 tokens of vocabulary.
    """

    kind: ClassVar[str] = "probe"
    planted: Callable[[int, int, int, int], Scene]
    known: Callable[[], Sequence[Scene]] = field(default=tuple)
    example: Callable[[Any], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Probe(Method):
    """Base of probe configurations."""

    spec: ClassVar[ProbeSpec]

    @abstractmethod
    def run(self, model: Any, *args: Any, **inputs: Any) -> Result:
        """Measure. The model's outputs stay bit-identical; its state, modules and parameters are as before."""

    @abstractmethod
    def look(self, model: Any, tokenizer: Any, text: str | None, progress: Progress | None) -> Result:
        """`run` on inputs made from `text`, or on built-in ones when it is None: what `inspect` calls."""

    @final
    def inspect(
        self,
        model: Any,
        tokenizer: Any,
        text: str | None = None,
        out: str | Path | None = None,
        progress: Progress | None = None,
    ) -> Result:
        """Measure with sensible inputs. text: a long text to measure on, or None for built-in inputs.

        out: a folder, made when missing, that gets ``result.json`` and ``table.png``. progress: see `Progress`. Raises
        `StorageError` when the folder cannot be made, before anything is measured.
        """
        folder = None if out is None else Path(out)
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StorageError(f"cannot make the folder {folder}: {error.strerror or error}") from error
        result = self.look(model, tokenizer, text, progress)
        if folder is not None:
            result.save(folder / "result.json")
            result.plot(folder / "table.png")
        return result
