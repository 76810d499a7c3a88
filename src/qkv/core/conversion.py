"""Conversions: pretrained weights become another attention layer, by formula, exact where the maths says so.

A conversion is configuration only. `Conversion.build` makes new attention modules for chosen sites from the model's
weights (and calibration data), `Conversion.rebuild` makes the same modules from saved tensors; neither changes the model.
The host exchanges the modules, and exchanges them back on `qkv.revert`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, final

from torch import Tensor, nn

from qkv.core.cache import Geometry
from qkv.core.errors import InvalidInput
from qkv.core.site import Site
from qkv.core.spec import Method, Spec

Settings = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class ConversionSpec(Spec):
    """Facts about a conversion.

    stores: the new layer keeps a cache of its own, so no cache method can act at the same site. calibrates: needs
    ``data=``. exact: for a geometry, settings at which the converted model is the source, up to rounding. small: for
    a geometry (of tiny size), settings that change something. ladder: for a geometry, settings of growing size along which the
    error falls. heal: the recipe that trains the converted model back towards its source, for `qkv.distill.heal`:
    ``objective`` (a setting), ``arguments`` (by names of `transformers.TrainingArguments`); the rest is for readers.
    """

    kind: ClassVar[str] = "conversion"
    stores: bool = False
    calibrates: bool = True
    exact: Callable[[Geometry], Settings] | None = None
    small: Callable[[Geometry], Settings] = field(default=lambda geometry: {})
    ladder: Callable[[Geometry], Sequence[Settings]] | None = None
    training: Callable[[Geometry], Sequence[Settings]] | None = None
    constant: bool = False
    heal: Mapping[str, Any] = field(default_factory=dict)


@final
@dataclass(frozen=True, kw_only=True)
class Lessons:
    """Model inputs for a conversion that trains, and where it keeps what it learns: ``data=Lessons(batches=..., folder=...)``.

    batches: as `data` otherwise. folder: gets a checkpoint every `save_every` steps and on Ctrl-C; the same conversion of the
    same model on the same data goes on from it, or gives its result at once if it was finished. progress: called with steps
    done, steps in all, and a note.
    """

    batches: Any
    folder: str | Path | None = None
    save_every: int = 50
    progress: Callable[[int, int, str], None] | None = None

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


@dataclass(frozen=True, kw_only=True)
class Conversion(Method):
    """Base of conversion configurations."""

    spec: ClassVar[ConversionSpec]

    @abstractmethod
    def fits(self, site: Site, module: nn.Module) -> str | None:
        """None, or why the attention `module` at `site` cannot be converted. No side effect; `qkv.plan` prints it."""

    @abstractmethod
    def build(self, model: Any, sites: Sequence[Site], data: Any) -> tuple[dict[str, nn.Module], dict[str, Any]]:
        """New modules by site name, and notes (plain data) from which `rebuild` knows their sizes.

        data: model inputs, an iterable of dicts of tensors, where `spec.calibrates`. The model stays as it is. Raises
        `InvalidInput` (no or unusable data), `Refused` (an attention that is not what the formula assumes).
        """

    @abstractmethod
    def rebuild(
        self, model: Any, sites: Sequence[Site], tensors: Mapping[str, Tensor], notes: Mapping[str, Any]
    ) -> dict[str, nn.Module]:
        """The modules that `build` made, from tensors named ``<site name>/<name in the module's state_dict>``.

        Notes and tensors come from a file: sizes are checked before anything is allocated. Raises `SavedDataError`.
        """


def batches(data: Any, who: str, model: Any = None) -> list[dict[str, Tensor]]:
    """Calibration data as a list of model inputs (labels left out), checked; also against `model`'s vocabulary, if given.

    Raises `InvalidInput`.
    """
    words = None if model is None else getattr(model.get_input_embeddings(), "num_embeddings", None)
    data = data.batches if isinstance(data, Lessons) else data
    if data is None:
        raise InvalidInput(
            f"{who} needs calibration inputs: pass data=[{{'input_ids': ...}}, ...] (dicts of tensors as the model "
            "takes them; some 30 thousand tokens of ordinary text serve well)"
        )
    if isinstance(data, (Tensor, Mapping, str)) or not isinstance(data, Iterable):
        raise InvalidInput(
            f"{who}: data= must be an iterable of model inputs (dicts of tensors), got {type(data).__name__}"
        )
    out = []
    for i, batch in enumerate(data):
        if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
            raise InvalidInput(
                f"{who}: batch {i} of data= must be a dict with a tensor 'input_ids' [B, T], got {type(batch).__name__}"
            )
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        if ids.ndim != 2 or 0 in ids.shape or ids.is_floating_point():
            raise InvalidInput(f"{who}: batch {i}: input_ids must be token numbers [B, T], got {tuple(ids.shape)}")
        if words is not None and not ids.is_meta:
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= words:
                raise InvalidInput(f"{who}: batch {i}: input_ids run from {low} to {high}, the model has {words} tokens; use its "
                                   "own tokenizer")  # fmt: skip
        if mask is not None and tuple(mask.shape) != tuple(ids.shape):
            raise InvalidInput(
                f"{who}: batch {i}: attention_mask {tuple(mask.shape)} does not fit input_ids {tuple(ids.shape)}"
            )
        out.append({k: v for k, v in batch.items() if k != "labels"})
    if not out:
        raise InvalidInput(f"{who}: data= is empty; pass at least one batch of model inputs")
    return out
