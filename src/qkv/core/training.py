"""What the training loops of qkv share: the course of the learning rate, what decays, frozen networks, and a gentle end."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def course(step: int, steps: int, warm: int, floor: float = 0.1) -> float:
    """The share of the learning rate in a step, from 0: a straight rise over `warm` steps, half a cosine down to `floor`."""
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    return floor + 0.5 * (1 - floor) * (1 + math.cos(math.pi * done))


def decayed(parameters: Iterable[nn.Parameter], decay: float) -> list[dict[str, Any]]:
    """Groups for AdamW: matrices with weight decay, vectors and scalars (norms, biases, gates) without."""
    every = list(parameters)
    return [
        {"params": [p for p in every if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in every if p.ndim <= 1], "weight_decay": 0.0},
    ]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for gradients meanwhile."""
    asked = [p for p in model.parameters() if p.requires_grad]
    for p in asked:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in asked:
            p.requires_grad_(True)


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Evaluation mode meanwhile; afterwards every module's own mode comes back."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def gently(*numbers: int) -> Iterator[list[int]]:
    """The first signal of these is noted in the list that is given, for a loop to end after its step with a checkpoint.

    Another Ctrl-C a second later ends it at once. What comes within the second is the same wish twice: `timeout`, `make` and
    launchers pass a signal on to a process that the terminal has signalled already. Left alone in other threads than the main
    one.
    """
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    first = math.inf

    def ask(number: int, frame: Any) -> None:
        nonlocal first
        if not asked:
            asked.append(number)
            first = time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - first > 1.0:
            raise KeyboardInterrupt("stopped at once, without a checkpoint")

    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
