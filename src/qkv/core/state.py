"""Explicit state of a recurrent operator: goes in, comes out, is never hidden on ``self``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from qkv.core.errors import StateError


@final
@dataclass(frozen=True, slots=True)
class State:
    """Named tensors with batch first, owned by one operator.

    owner: id of the operator that made it; another operator refuses it. tensors: name -> tensor ``[B, ...]``.
    seen: tokens absorbed so far.
    """

    owner: str
    tensors: dict[str, Tensor]
    seen: int = 0

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def of(self, owner: str, **shapes: tuple[int, ...]) -> State:
        """Itself, after checking that `owner` made it and that the named tensors have the given shapes."""
        if self.owner != owner:
            raise StateError(f"{owner} was given the state of {self.owner!r}; pass one that {owner} returned")
        for name, shape in shapes.items():
            got = tuple(self.tensors[name].shape) if name in self.tensors else None
            if got != tuple(shape):
                raise StateError(f"{owner}: state {name!r} has shape {got}, expected {tuple(shape)} for these inputs")
        return self

    def on(self, device: torch.device) -> State:
        """Itself, after checking that its tensors lie on a device."""
        for name, x in self.tensors.items():
            if x.device != device:
                raise StateError(
                    f"{self.owner}: state {name!r} lies on {x.device}, the inputs on {device}; use state.to({str(device)!r})"
                )
        return self

    def index(self, rows: Tensor) -> State:
        """The state of the batch rows `rows` ``[B']`` (beams reorder or repeat rows). Raises `StateError` for rows it lacks."""
        batch = min((t.shape[0] for t in self.tensors.values()), default=0)
        if rows.ndim != 1 or rows.is_floating_point() or rows.dtype == torch.bool:
            raise StateError(f"{self.owner}: rows are ints [B'], got {rows.dtype} {tuple(rows.shape)}")
        read = rows.device.type == "cpu" and rows.numel() > 0 and not torch.compiler.is_compiling()
        if read and not (0 <= int(rows.min()) and int(rows.max()) < batch):
            raise StateError(f"{self.owner}: rows {rows.tolist()} are not all among the state's {batch}")
        tensors = {k: t.index_select(0, rows.to(t.device)) for k, t in self.tensors.items()}
        return State(self.owner, tensors, self.seen)

    def crop(self, tokens: int) -> State:
        """Refused: a recurrent state has folded its tokens in. Keep a copy from before instead."""
        if tokens == 0:
            return self
        raise StateError(
            f"{self.owner}: {tokens} tokens cannot be taken out of a recurrent state; keep an "
            "earlier state (states are immutable values) and feed the kept tokens again"
        )

    @property
    def bytes(self) -> int:
        """Bytes held by the tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def to(self, *args: Any, **kwargs: Any) -> State:
        """As `torch.nn.Module.to`: every tensor to a device, those of floating point alone to a dtype (counts stay exact)."""
        moved = {k: t.to(*args, **kwargs) for k, t in self.tensors.items()}
        for k, t in self.tensors.items():
            if moved[k].dtype != t.dtype and not t.is_floating_point():
                moved[k] = t.to(moved[k].device)
        return State(self.owner, moved, self.seen)

    def exact(self) -> State:
        """Itself, after checking that no tensor was rounded to less than float32: sums over a whole text drift in bfloat16."""
        for name, x in self.tensors.items():
            if x.is_floating_point() and torch.promote_types(x.dtype, torch.float32) != x.dtype:
                raise StateError(f"{self.owner}: state {name!r} is {x.dtype}; recurrent states are float32 or wider, pass it as "
                                 f"{self.owner} returned it")  # fmt: skip
        return self

    def equal(self, other: State) -> bool:
        """Bitwise equality."""
        mine = (self.owner, self.seen, self.tensors.keys())
        theirs = (other.owner, other.seen, other.tensors.keys())
        return mine == theirs and all(torch.equal(t, other.tensors[k]) for k, t in self.tensors.items())
