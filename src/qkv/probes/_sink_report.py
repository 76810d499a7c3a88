"""What the sink metric finds: curves over positions, tables over heads, and the activations behind them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from torch import Tensor

from qkv.core.errors import SavedDataError
from qkv.core.heads import HeadTable, draw_table, figure, read_json, save_figure, write_json

_FORMAT = 1


@final
@dataclass(frozen=True, eq=False)
class MassiveActivations:
    """What is special about the first token.

    hidden: ``[L + 1]`` norm of its hidden state over the mean norm of the others, after the embedding and after each layer (the
    last one after the final norm, as transformers gives it; None when the model gives no hidden states). value, key: the same
    for its value and its key, per KV head. first, other: mean cosine of a query with the first key, and with the later keys
    that it sees, per query head.
    """

    hidden: Tensor | None
    value: HeadTable
    key: HeadTable
    first: HeadTable
    other: HeadTable

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        tables = {name: getattr(self, name).to_dict() for name in ("value", "key", "first", "other")}
        return {"hidden": None if self.hidden is None else self.hidden.tolist(), **tables}


@final
@dataclass(frozen=True, eq=False)
class SinkReport:
    """Attention sinks of a model on some texts.

    tokens: T. threshold: eps. samples: how many texts. alpha: ``[T]`` mean importance of each position over texts, layers and
    heads. rate: ``[T]`` share of (text, layer, head) whose importance exceeds the threshold. normalised_rate: the same after
    dividing each row by its sum; equal to `rate` for softmax. edge: from this position on the curves mean nothing (a token
    that only attends to itself passes the threshold). head_rate, head_alpha: per head, over texts, at position 0.
    """

    tokens: int
    threshold: float
    samples: int
    alpha: Tensor
    rate: Tensor
    normalised_rate: Tensor
    edge: int
    head_rate: HeadTable
    head_alpha: HeadTable
    activations: MassiveActivations | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def table(self) -> HeadTable:
        """The sink rate per head."""
        return self.head_rate

    @property
    def flagged(self) -> list[bool]:
        """Per position: True where the curves mean nothing."""
        return [k >= self.edge for k in range(self.tokens)]

    def __str__(self) -> str:
        later = self.rate[1 : self.edge]
        worst = f", at most {100 * float(later.max()):.2f} % later" if later.numel() else ""
        return (
            f"sink rate {100 * float(self.rate[0]):.1f} % at the first token{worst} "
            f"({self.samples} texts of {self.tokens} tokens, threshold {self.threshold})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data. Rates are shares, not percent."""
        return {
            "format": _FORMAT, "type": "sink_report", "tokens": self.tokens, "threshold": self.threshold,
            "samples": self.samples, "edge": self.edge, "notes": dict(self.notes), "alpha": self.alpha.tolist(),
            "rate": self.rate.tolist(), "normalised_rate": self.normalised_rate.tolist(), "flagged": self.flagged,
            "head_rate": self.head_rate.to_dict(), "head_alpha": self.head_alpha.to_dict(),
            "activations": None if self.activations is None else self.activations.to_dict(),
        }  # fmt: skip

    def save(self, path: str | Path) -> Path:
        """Write it as JSON, atomically. Raises `StorageError`."""
        return write_json(path, self.to_dict())

    @staticmethod
    def load(path: str | Path) -> SinkReport:
        """The inverse of `save`. Raises `SavedDataError`."""
        import torch

        data = read_json(path)
        if not isinstance(data, dict) or data.get("type") != "sink_report" or data.get("format") != _FORMAT:
            raise SavedDataError(f"{path} is not a sink report of format {_FORMAT}")
        try:
            alpha, rate, normalised = (
                torch.tensor(data[x], dtype=torch.float64) for x in ("alpha", "rate", "normalised_rate")
            )
            extra = data.get("activations")
            if extra is not None:
                hidden = None if extra["hidden"] is None else torch.tensor(extra["hidden"], dtype=torch.float64)
                tables = (HeadTable.from_dict(extra[x]) for x in ("value", "key", "first", "other"))
                extra = MassiveActivations(hidden, *tables)
            return SinkReport(
                int(data["tokens"]), float(data["threshold"]), int(data["samples"]), alpha, rate, normalised, int(data["edge"]),
                HeadTable.from_dict(data["head_rate"]), HeadTable.from_dict(data["head_alpha"]), extra, dict(data["notes"]),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise SavedDataError(f"{path} is damaged: {type(error).__name__}: {error}") from error

    def plot(self, path: str | Path) -> Path:
        """Draw the rate per head and the curves over positions. Raises `MissingDependency`, `StorageError`."""
        fig = figure()(figsize=(10, 4.2), layout="constrained")
        left, right = fig.subplots(1, 2, width_ratios=(3, 2))
        draw_table(fig, left, self.head_rate, "sink rate at the first token")
        right.plot(range(self.tokens), self.rate.tolist(), label="sink rate")
        right.plot(range(self.tokens), self.alpha.tolist(), label="mean importance")
        right.axvspan(self.edge - 0.5, self.tokens - 0.5, color="0.85", label="edge: no meaning")
        right.axhline(self.threshold, color="0.5", linewidth=0.8, linestyle="--")
        right.set_xlabel("position")
        right.set_ylim(0, 1)
        right.legend(frameon=False)
        return save_figure(fig, path)
