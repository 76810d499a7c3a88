"""Training loops for comparisons: many small models, the same steps, on one device, as fast as it goes.

On CUDA a whole optimiser step is captured once and replayed, since small models are bound by launches; a model that cannot be
captured trains step by step, and the result says so. Transformers' Trainer, which `qkv.distill` trains with, cannot be captured,
and what it adds (checkpoints, accumulation, several devices) is no part of a step's time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qkv.core.errors import InvalidParameter, QKVError, TrainingError
from qkv.core.training import decayed

Batch = Callable[[int], Sequence[Tensor]]


@dataclass(frozen=True)
class Fit:
    """What a loop did: seconds a step (after the first ones), the last loss, whether steps were replayed, else why not."""

    seconds: float
    loss: float
    captured: bool
    reason: str = ""


def schedule(step: int, steps: int, rate: float) -> float:
    """Linear warm-up over a tenth of the steps, times a cosine over all of them, down to a tenth of `rate`.

    Not `qkv.core.training.course`, whose cosine begins after the warm-up: recorded comparisons were trained with this one.
    """
    return rate * min(1.0, (step + 1) / max(1, steps // 10)) * (0.55 + 0.45 * math.cos(math.pi * step / steps))


def fit(
    model: nn.Module, loss: Callable[..., Tensor], batch: Batch, steps: int, *, rate: float = 2e-3, decay: float = 0.1,
    clip: float = 1.0, capture: bool = True, bf16: bool = False,
) -> Fit:  # fmt: skip
    """Train with AdamW: ``loss(*batch(i))`` in step i; batches have one shape, `decay` is of matrices. Raises `TrainingError`."""
    if steps < 1:
        raise InvalidParameter(f"steps={steps} must be at least 1")
    device = next(model.parameters()).device
    cuda = device.type == "cuda"
    lr = torch.tensor(rate, device=device) if cuda else rate
    optimiser = torch.optim.AdamW(decayed(model.parameters(), decay), lr=lr, betas=(0.9, 0.95), capturable=cuda)

    def one(inputs: Sequence[Tensor]) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
            value = loss(*inputs)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimiser.step()
        return value.detach()

    def plain(i: int) -> Tensor:
        _set_rate(optimiser, schedule(i, steps, rate))
        value = one(batch(i))
        optimiser.zero_grad(set_to_none=True)
        return value

    warm = min(3, steps)
    replay, reason = None, "" if cuda and capture else "not asked for" if cuda else "no CUDA device"
    if cuda and capture and steps > warm:
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for i in range(warm):
                value = plain(i)
        torch.cuda.current_stream(device).wait_stream(side)
        replay, reason = _captured(one, batch(0), device)
        optimiser.zero_grad(set_to_none=True) if replay is None else None
    else:
        for i in range(warm):
            value = plain(i)
    _wait(device)
    start = time.perf_counter()
    for i in range(warm, steps):
        if replay is None:
            value = plain(i)
        else:
            _set_rate(optimiser, schedule(i, steps, rate))
            value = replay(batch(i))
    _wait(device)
    seconds = (time.perf_counter() - start) / max(1, steps - warm)
    last = float(value)
    if not math.isfinite(last):
        raise TrainingError(f"the loss is {last} after {steps} steps; lower the rate")
    return Fit(seconds, last, replay is not None, reason)


def _captured(
    one: Callable[[Sequence[Tensor]], Tensor], inputs: Sequence[Tensor], device: torch.device
) -> tuple[Callable[[Sequence[Tensor]], Tensor] | None, str]:
    """A function that replays a step on a new batch, or None and the reason."""
    static = [x.clone() for x in inputs]
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize(device)
    try:
        with torch.cuda.graph(graph):
            value = one(static)
    except (RuntimeError, QKVError) as error:
        torch.cuda.synchronize(device)
        return None, "cannot be captured: " + str(error).splitlines()[0][:120]

    def replay(inputs: Sequence[Tensor]) -> Tensor:
        for mine, new in zip(static, inputs, strict=True):
            mine.copy_(new)
        graph.replay()
        return value

    return replay, ""


def _set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    for group in optimiser.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
