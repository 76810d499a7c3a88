"""What a store of mixed precision and its method say to each other: a block that is about to be stored, and its split.

Axes: R rows, H query heads, G key/value heads, W tokens of a block, N new tokens, D head width, E value width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Block:
    """Tokens that are about to be stored together, of rows that are alike.

    keys ``[R, G, W, D]``, values ``[R, G, W, E]``, starts: the position of the first one in each row. queries ``[R, H, N, D]``:
    of the newest N of them, which this call brought (N = 1: decoding filled the block). mass ``[R, H, W]``: attention that they
    drew from the probes, seen ``[W]``: how many of the probes could see each, at least 1.
    """

    keys: Tensor
    values: Tensor
    starts: list[int]
    queries: Tensor
    mass: Tensor
    seen: Tensor

    @property
    def decoded(self) -> bool:
        """Whether single tokens filled the block."""
        return self.queries.shape[2] == 1


class Splits(Protocol):
    """What a method tells the store."""

    @property
    def id(self) -> str:
        """Its name, for messages."""
        ...

    def probes_of(self, tokens: int, decoded: bool) -> tuple[int, int]:
        """How many of the newest queries of a block are probes, and how many of the others; decoded: it fills token by token."""
        ...

    def split(self, block: Block) -> tuple[Tensor, list[int]]:
        """Which tokens of a block are precise: bools ``[R, G or 1, W]``, and how many are set in every head of each row."""
        ...
