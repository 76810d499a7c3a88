"""Taking tokens back: blocks that speculation may shorten, until `crop` settles them.

A memory that evicts or quantises as it goes cannot simply forget its newest tokens. While it records, it keeps what it was
before the tokens that are not settled yet, and those tokens; `crop` goes back and absorbs the accepted ones again. What
belongs to the prompt is absorbed at once, everything else token by token, as plain decoding would.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qkv.core.cache import LayerCache, Step
from qkv.core.errors import StateError

MOST = 1024  # steps after which nobody takes tokens back: a recording that is never cropped settles by itself


@dataclass
class Run:
    """Tokens after a snapshot. before: the snapshot; base: columns that precede them; whole: absorbed at once."""

    before: Any
    base: int
    whole: bool
    q: Tensor
    k: Tensor
    v: Tensor
    step: Step

    def __len__(self) -> int:
        return self.q.shape[2]

    def part(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor, Step]:
        """The tokens start .. stop."""
        at = slice(start, stop)
        return self.q[:, :, at], self.k[:, :, at], self.v[:, :, at], cut(self.step, self.base, start, stop)

    def add(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> None:
        """More tokens behind these; `step` knows the padding of all columns."""
        self.q, self.k, self.v = (torch.cat(x, 2) for x in ((self.q, q), (self.k, k), (self.v, v)))
        position = torch.cat((self.step.position, step.position), 1)
        self.step = Step(position, step.scale, step.padding, None, step.compute, step.causal)


class Recording(LayerCache):
    """A memory whose calls are provisional while it records. Override `_absorb`, `_snapshot` and `_go_back`."""

    recording: bool = False
    prompt: int | None = None

    @abstractmethod
    def _absorb(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """As `attend`, for good."""

    @abstractmethod
    def _snapshot(self) -> Any:
        """Enough to go back to this state, whatever is absorbed meanwhile."""

    @abstractmethod
    def _go_back(self, snapshot: Any) -> None:
        """To the state of a snapshot."""

    def _again(self, run: Run, tokens: int) -> None:
        """Absorb the first `tokens` of a run again; their attention was given before."""
        size = tokens if run.whole else 1
        for start in range(0, tokens, size):
            self._absorb(*run.part(start, start + size))

    def announce(self, prompt: int) -> None:
        """A generation begins: what was recorded is settled, and recording stops until it is asked for again."""
        self.prompt, self.recording = prompt, False
        self._forget_runs()

    def record(self) -> None:
        """See `LayerCache.record`."""
        self.recording = True

    def _forget_runs(self) -> None:
        """Settle: nothing can be taken back any more."""
        self._runs: list[Run] = []

    @property
    def unsettled(self) -> int:
        """Tokens that `crop` can still take back exactly."""
        return sum(map(len, self._runs))

    def _provisional(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """Absorb a block that may be taken back in part. A piece of the prompt settles what came before it."""
        n, base = q.shape[2], self.seen
        known = n if self.prompt is None and base == 0 else (self.prompt or 0) - base
        head, outs = min(n, max(0, known)), []
        if head:
            self._forget_runs()
            here = Run(self._snapshot(), base, True, *_parts(q, k, v, step, base, 0, head))
            outs.append(self._absorb(*here.part(0, head)))
            self._runs.append(here)
        if head < n:
            rest = _parts(q, k, v, step, base, head, n)
            if sum(len(run) for run in self._runs if not run.whole) > MOST:
                self._forget_runs()
            if self._runs and not self._runs[-1].whole:
                here = self._runs[-1]
                done = len(here)
                here.add(*rest)
            else:
                here, done = Run(self._snapshot(), base + head, False, *rest), 0
                self._runs.append(here)
            outs += [self._absorb(*here.part(i, i + 1)) for i in range(done, len(here))]
        return outs[0] if len(outs) == 1 else torch.cat(outs, 2)

    def _take_back(self, tokens: int) -> None:
        """Go back by at most `unsettled` tokens and settle the others."""
        runs = list(self._runs)
        while tokens and runs:
            run = runs.pop()
            self._go_back(run.before)
            keep = max(0, len(run) - tokens)
            tokens -= len(run) - keep
            self._again(run, keep)
        self._forget_runs()

    def _refuse_beams(self) -> None:
        if self.unsettled:
            raise StateError("beams cannot be reordered while a speculative block is not settled; crop it first")

    def _recorded(self) -> Iterator[Tensor]:
        """Every tensor held for the sake of taking back."""
        for run in self._runs:
            yield from (run.q, run.k, run.v, run.step.position)
            yield from _tensors(run.before)


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (dict, list, tuple)):
        for item in x.values() if isinstance(x, dict) else x:
            yield from _tensors(item)


def _parts(
    q: Tensor, k: Tensor, v: Tensor, step: Step, base: int, start: int, stop: int
) -> tuple[Tensor, Tensor, Tensor, Step]:
    at = slice(start, stop)
    return q[:, :, at].detach(), k[:, :, at].detach(), v[:, :, at].detach(), cut(step, base, start, stop)


def cut(step: Step, base: int, start: int, stop: int) -> Step:
    """The part of a step that concerns its tokens start .. stop; `base` columns precede the step's first token."""
    padding = None if step.padding is None else step.padding[:, : base + stop]
    mask = None if step.mask is None else step.mask[..., start:stop, : base + stop]
    return Step(step.position[:, start:stop], step.scale, padding, mask, step.compute, step.causal)
