"""Heads: one number per head of a model (`HeadTable`) and a set of heads (`HeadSet`), shared by every probe and its users.

A head is the pair (layer, head), both counted from 0; written ``"layer.head"``. Query heads and key/value heads are
different things: a table says which it counts.

Axes: L layers, H heads of a layer.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor

from qkv.core.errors import InvalidInput, InvalidParameter, MissingDependency, SavedDataError, StorageError
from qkv.core.files import write_whole

Head = tuple[int, int]
_WRITTEN = re.compile(r"L?(\d+)[.:H](\d+)")
_FORMAT = 1


def _head(item: Any) -> Head:
    """(layer, head) from ``"3.7"``, ``"L3H7"`` or a pair."""
    if isinstance(item, str) and (found := _WRITTEN.fullmatch(item.strip())):
        return int(found[1]), int(found[2])
    if isinstance(item, (tuple, list)) and len(item) == 2:
        if all(isinstance(x, int) and not isinstance(x, bool) and x >= 0 for x in item):
            return item[0], item[1]
    hint = '; write it as text, "2.10", for 2.10 and 2.1 are one number' if isinstance(item, float) else ""
    raise InvalidParameter(f'{item!r} is not a head; a head is "layer.head", as "3.7", or a pair (3, 7){hint}')


@final
@dataclass(frozen=True, slots=True)
class HeadSet:
    """A set of heads (layer, head). Build it with `HeadSet.of`; iterating gives pairs in order."""

    heads: frozenset[Head] = frozenset()

    @classmethod
    def of(cls, heads: Any = ()) -> HeadSet:
        """From another set, an iterable of pairs or ``"layer.head"`` strings, or text such as ``"2.1 3.4"`` or ``"2.1+3.4"``.

        Raises `InvalidParameter` for anything that is not a head.
        """
        if isinstance(heads, HeadSet):
            return heads
        if isinstance(heads, str):
            heads = [x for x in re.split(r"[\s,+]+", heads) if x]
        if isinstance(heads, (Mapping, bytes)) or not isinstance(heads, Iterable):
            heads = [heads]
        return cls(frozenset(_head(x) for x in heads))

    @classmethod
    def full(cls, layers: int, heads: int) -> HeadSet:
        """Every head of `layers` layers of `heads` heads."""
        return cls(frozenset((l, h) for l in range(layers) for h in range(heads)))

    def names(self) -> tuple[str, ...]:
        """``("2.1", "3.4")``, sorted: what configurations keep and JSON holds."""
        return tuple(f"{l}.{h}" for l, h in self)

    def at(self, layer: int | None) -> tuple[int, ...]:
        """The heads of one layer, ascending."""
        return tuple(h for l, h in self if l == layer)

    def layers(self) -> tuple[int, ...]:
        """The layers that have a head in the set, ascending."""
        return tuple(sorted({l for l, _ in self.heads}))

    def random(self, count: int, seed: int) -> HeadSet:
        """`count` heads of the set, drawn without replacement: the control of a chosen set. Raises `InvalidInput`."""
        if not 0 <= count <= len(self.heads):
            raise InvalidInput(f"cannot draw {count} of {len(self.heads)} heads")
        return HeadSet(frozenset(random.Random(seed).sample(sorted(self.heads), count)))

    def kv_heads(self, group: int) -> HeadSet:
        """The key/value heads that these query heads read, `group` query heads to each."""
        if group < 1:
            raise InvalidInput(f"group={group} must be at least 1 query head per key/value head")
        return HeadSet(frozenset((l, h // group) for l, h in self.heads))

    def __or__(self, other: HeadSet) -> HeadSet:
        return HeadSet(self.heads | other.heads)

    def __and__(self, other: HeadSet) -> HeadSet:
        return HeadSet(self.heads & other.heads)

    def __sub__(self, other: HeadSet) -> HeadSet:
        return HeadSet(self.heads - other.heads)

    def __iter__(self) -> Iterator[Head]:
        return iter(sorted(self.heads))

    def __len__(self) -> int:
        return len(self.heads)

    def __contains__(self, head: Any) -> bool:
        return _head(head) in self.heads

    def __str__(self) -> str:
        return "{" + ", ".join(self.names()) + "}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `from_dict` reads it."""
        return {"format": _FORMAT, "type": "head_set", "heads": list(self.names())}

    @classmethod
    def from_dict(cls, data: Any) -> HeadSet:
        """The inverse of `to_dict`. Raises `SavedDataError`."""
        heads = _typed(data, "head_set").get("heads")
        if not isinstance(heads, list):
            raise SavedDataError("a saved head set has a list 'heads'")
        try:
            return cls.of(heads)
        except InvalidParameter as error:
            raise SavedDataError(f"a saved head set is damaged: {error}") from error

    def save(self, path: str | Path) -> Path:
        """Write it as JSON, atomically. Raises `StorageError`."""
        return write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> HeadSet:
        """The inverse of `save`. Raises `SavedDataError`."""
        return cls.from_dict(read_json(path))


@final
@dataclass(frozen=True, eq=False)
class HeadTable:
    """One number per head.

    values: ``[L, H]``, kept in float64; NaN where a layer has no such head or was not measured. name: what the number is.
    unit: which heads are counted. group: query heads per key/value head. records: what was measured in each run (plain
    data). notes: settings and facts of the measurement (plain data).
    """

    values: Tensor
    name: str
    unit: Literal["head", "kv_head"] = "head"
    group: int = 1
    records: tuple[dict[str, Any], ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        values = torch.as_tensor(self.values).detach().to("cpu", torch.float64)
        if values.ndim != 2 or 0 in values.shape or bool(values.isinf().any()):
            raise InvalidInput(
                f"a head table needs values [layers, heads], finite or NaN; got shape {tuple(values.shape)}"
                + (" with infinities" if bool(values.isinf().any()) else "")
            )
        if self.unit not in ("head", "kv_head") or self.group < 1:
            raise InvalidInput(f"unit={self.unit!r} must be 'head' or 'kv_head', group={self.group} at least 1")
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "records", tuple(_lists(r) for r in self.records))
        object.__setattr__(self, "notes", _lists(self.notes))

    @property
    def table(self) -> HeadTable:
        """Itself: every probe's result has a `table`."""
        return self

    @property
    def measured(self) -> HeadSet:
        """The heads that have a value."""
        return self._set(~self.values.isnan())

    def top(self, k: int | None = None, *, threshold: float | None = None) -> HeadSet:
        """The `k` heads with the largest values, or every head at or above `threshold`, or both: the k best of those.

        Of equal values the lowest (layer, head) comes first; NaN never counts. Raises `InvalidInput` when neither is given,
        k exceeds the measured heads, or nothing was measured.
        """
        if k is None and threshold is None:
            raise InvalidInput("top needs k (a number of heads) or threshold (a least value)")
        measured = int((~self.values.isnan()).sum())
        if not measured:
            raise InvalidInput(f"{self.name}: no head was measured, so none is on top")
        if k is not None and not 0 <= k <= measured:
            raise InvalidInput(f"top: k={k} of {measured} measured heads")
        flat = self.values.flatten()
        order = flat.nan_to_num(nan=-torch.inf).sort(descending=True, stable=True).indices
        order = order[: measured if k is None else k]
        if threshold is not None:
            order = order[flat[order] >= threshold]
        width = self.values.shape[1]
        return HeadSet(frozenset((i // width, i % width) for i in order.tolist()))

    def by_kv_head(self) -> HeadTable:
        """The table per key/value head: the largest value of each group of query heads (NaN only if all are)."""
        if self.unit == "kv_head":
            return self
        l, h = self.values.shape
        if h % self.group:
            raise InvalidInput(f"{h} query heads do not divide into groups of {self.group}")
        grouped = self.values.reshape(l, h // self.group, self.group)
        best = grouped.nan_to_num(nan=-torch.inf).amax(-1)
        best = best.masked_fill(grouped.isnan().all(-1), torch.nan)
        return HeadTable(best, self.name, "kv_head", self.group, self.records, self.notes)

    def spearman(self, other: HeadTable) -> float:
        """Rank correlation over the heads that both tables measured; equal values share their mean rank.

        NaN when fewer than two heads are shared or one table is constant on them. Raises `InvalidInput` for tables of
        different shape or unit.
        """
        if self.values.shape != other.values.shape or self.unit != other.unit:
            raise InvalidInput(
                f"tables of one shape and unit are compared; got {tuple(self.values.shape)} {self.unit} and "
                f"{tuple(other.values.shape)} {other.unit}"
            )
        both = ~(self.values.isnan() | other.values.isnan())
        if int(both.sum()) < 2:
            return float("nan")
        a, b = (_ranks(x.values[both]) for x in (self, other))
        a, b = a - a.mean(), b - b.mean()
        size = float((a.square().sum() * b.square().sum()).sqrt())
        return float((a * b).sum()) / size if size > 0 else float("nan")

    def _set(self, chosen: Tensor) -> HeadSet:
        return HeadSet(frozenset((int(l), int(h)) for l, h in chosen.nonzero().tolist()))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, HeadTable):
            return NotImplemented
        return self.to_dict() == other.to_dict()

    def __str__(self) -> str:
        known = self.values[~self.values.isnan()]
        if not known.numel():
            return f"{self.name}: no head measured"
        best = ", ".join(f"{l}.{h} {float(self.values[l, h]):.3f}" for l, h in self._best(5))
        return f"{self.name}: {known.numel()} {self.unit}s, mean {float(known.mean()):.4f}; highest: {best}"

    def _best(self, k: int) -> list[Head]:
        top = self.top(min(k, len(self.measured)))
        return sorted(top, key=lambda x: (-float(self.values[x]), x))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON (NaN is null); `from_dict` reads it."""
        values = [[None if x != x else x for x in row] for row in self.values.tolist()]
        return {
            "format": _FORMAT, "type": "head_table", "name": self.name, "unit": self.unit, "group": self.group,
            "values": values, "notes": _lists(self.notes), "records": _lists(self.records),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: Any) -> HeadTable:
        """The inverse of `to_dict`. Raises `SavedDataError` for damaged, foreign or future data."""
        data = _typed(data, "head_table")
        try:
            rows = [[float("nan") if x is None else float(x) for x in row] for row in data["values"]]
            records, notes = data.get("records", []), data.get("notes", {})
            if not isinstance(notes, dict) or not all(isinstance(r, dict) for r in records):
                raise TypeError("records and notes hold objects")
            values = torch.tensor(rows, dtype=torch.float64)
            return cls(
                values, str(data["name"]), data.get("unit", "head"), int(data.get("group", 1)), tuple(records), notes
            )
        except (KeyError, TypeError, ValueError) as error:
            raise SavedDataError(f"a saved head table is damaged: {type(error).__name__}: {error}") from error

    def save(self, path: str | Path) -> Path:
        """Write it as JSON, atomically. Raises `StorageError`."""
        return write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> HeadTable:
        """The inverse of `save`. Raises `SavedDataError`."""
        return cls.from_dict(read_json(path))

    def plot(self, path: str | Path) -> Path:
        """Draw it as a map, layers to the right and heads down, to a file (format by its ending).

        Raises `MissingDependency` without matplotlib, `StorageError` when the file cannot be written.
        """
        figure_class = figure()
        l, h = self.values.shape
        fig = figure_class(figsize=(max(4.0, 1.8 + 0.22 * l), max(2.2, 1.2 + 0.22 * h)), layout="constrained")
        draw_table(fig, fig.add_subplot(), self)
        return save_figure(fig, path)


def draw_table(fig: Any, axes: Any, table: HeadTable, title: str | None = None) -> None:
    """A table as an image on given matplotlib axes; heads without a value stay grey."""
    from matplotlib.ticker import MaxNLocator

    values = table.values.T.numpy()
    axes.set_facecolor("0.8")
    low = min(0.0, float(table.values.nan_to_num(nan=0.0).min()))
    image = axes.imshow(values, aspect="auto", origin="upper", cmap="viridis", interpolation="nearest", vmin=low)
    axes.set_xlabel("layer")
    axes.set_ylabel("KV head" if table.unit == "kv_head" else "head")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(table.name if title is None else title)
    fig.colorbar(image, ax=axes)


def figure() -> Any:
    """The `Figure` class of matplotlib, imported now. Raises `MissingDependency`."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependency(f"a picture needs matplotlib ({error}); pip install matplotlib") from error
    return Figure


def save_figure(fig: Any, path: str | Path) -> Path:
    """Write a matplotlib figure to `path`. Raises `StorageError`."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fig.savefig(path, dpi=150)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def _lists(value: Any) -> Any:
    """Plain data with lists for tuples, as JSON gives it back."""
    if isinstance(value, Mapping):
        return {k: _lists(v) for k, v in value.items()}
    return [_lists(v) for v in value] if isinstance(value, (tuple, list)) else value


def _ranks(x: Tensor) -> Tensor:
    """Ranks from 0, equal values sharing their mean rank."""
    _, inverse, counts = x.unique(sorted=True, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).to(torch.float64)
    return (ends - (counts + 1) / 2)[inverse]


# -- files ----------------------------------------------------------------------------------------------------------


def _typed(data: Any, kind: str) -> dict[str, Any]:
    if not isinstance(data, dict) or data.get("type") != kind:
        raise SavedDataError(f"expected a saved {kind.replace('_', ' ')}, got {str(data)[:80]!r}")
    if data.get("format") != _FORMAT:
        raise SavedDataError(
            f"this {kind.replace('_', ' ')} has format {data.get('format')!r}; this qkv reads {_FORMAT}"
        )
    return data


def write_json(path: str | Path, data: Any) -> Path:
    """Plain data as JSON: `path` holds all of it, or what it held before. Raises `StorageError`, `InvalidInput`."""
    try:
        text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"records and notes must be plain data without NaN: {error}") from error
    return write_whole(path, text)


def read_json(path: str | Path) -> Any:
    """What `write_json` wrote. Raises `SavedDataError`."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SavedDataError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise SavedDataError(f"{path} is not valid JSON: {error}") from error
