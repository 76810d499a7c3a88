r"""Training inside a conversion: one loop for its stages, deterministic, with checkpoints to go on from.

The order of the batches depends on (seed, pass) alone, the learning rate on (step, steps), so a run that was cut off goes on as
if it had not been. AdamW without weight decay; the rate rises over the first twentieth and falls to a tenth along a cosine.
"""

from __future__ import annotations

import hashlib
import math
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qkv.core.conversion import Lessons
from qkv.core.errors import SavedDataError, TrainingError
from qkv.core.training import course, gently
from qkv.hosts import stack

WHAT = "conversion-training"
WARM = 0.05


def digest(batches: Sequence[Mapping[str, Tensor]]) -> str:
    """A hash over every value of the data."""
    h = hashlib.sha256()
    for batch in batches:
        for name, x in sorted(batch.items()):
            h.update(f"{name}{tuple(x.shape)}".encode())
            h.update(x.detach().cpu().contiguous().numpy().tobytes())
    return h.hexdigest()


def order(batches: int, passes: int, seed: int) -> list[int]:
    """Numbers of the batches in the order they are learnt from."""
    out: list[int] = []
    for i in range(passes):
        out += torch.randperm(batches, generator=torch.Generator().manual_seed(seed * 1_000_003 + i)).tolist()
    return out


class Keeper:
    """The checkpoint of a conversion's training, of which there is one: the newest.

    stages: their names, in order. facts: what decides the result, as plain data; another training's folder is refused.
    """

    def __init__(self, data: Any, stages: Sequence[str], facts: Mapping[str, Any]) -> None:
        lessons = data if isinstance(data, Lessons) else Lessons(batches=data)
        self.folder = None if lessons.folder is None else Path(lessons.folder)
        self.every, self.progress = max(1, lessons.save_every), lessons.progress
        self.stages, self.facts = list(stages), dict(facts)
        self.saved: dict[str, Any] | None = None
        self.tensors: dict[str, Tensor] = {}
        if self.folder is not None and (self.folder / "qkv.json").is_file():
            self.saved, self.tensors = stack.read_folder(self.folder)
            self._check(self.folder, self.saved)

    def _check(self, folder: Path, saved: Mapping[str, Any]) -> None:
        if (
            saved.get("what") != WHAT
            or saved.get("stage") not in self.stages
            or not isinstance(saved.get("losses"), list)
        ):
            raise SavedDataError(f"{folder} holds no training of this conversion; choose another folder")
        before = saved.get("facts")
        before = before if isinstance(before, dict) else {}
        changed = [k for k in sorted(before.keys() | self.facts.keys()) if before.get(k) != self.facts.get(k)]
        if changed:
            raise TrainingError(
                f"{folder} belongs to a training with another {', '.join(changed)}; convert with what it was started with, or "
                "choose another folder"
            )

    def past(self, stage: str) -> bool:
        """Whether a later stage has begun."""
        return self.saved is not None and self.stages.index(stage) < self.stages.index(self.saved["stage"])

    def load(self, stage: str, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> list[float]:
        """Put back what was saved of a stage: its losses so far, empty for a stage not begun."""
        if self.saved is None or self.saved["stage"] != stage:
            return []
        states: dict[str, dict[str, Tensor]] = {}
        for key, x in self.tensors.items():
            kind, _, rest = key.partition("/")
            if kind == "optimizer":
                name, _, entry = rest.rpartition("/")
                states.setdefault(name, {})[entry] = x
        held = {n: self.tensors.get(f"model/{n}") for n in parameters}
        wrong = [n for n, p in parameters.items() if (x := held[n]) is None or x.shape != p.shape]
        if wrong:
            raise SavedDataError(f"{self.folder}: {wrong[0]} is missing or misshapen; delete the folder to start anew")
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(self.tensors[f"model/{name}"])
                if name in states:
                    entries = {k: x if k == "step" else x.to(p.device) for k, x in states[name].items()}
                    optimizer.state[p] = entries
        return [float(x) for x in self.saved["losses"]]

    def save(
        self,
        stage: str,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        losses: Sequence[float],
    ) -> None:
        """Write the checkpoint, at once or not at all."""
        if self.folder is None:
            return
        tensors = {f"model/{n}": p.detach() for n, p in parameters.items()}
        for name, p in parameters.items():
            tensors |= {f"optimizer/{name}/{k}": x for k, x in optimizer.state.get(p, {}).items()}
        stack.write_folder(
            self.folder, {"what": WHAT, "facts": self.facts, "stage": stage, "losses": list(losses)}, tensors
        )


def descend(
    stage: str, groups: Sequence[tuple[Mapping[str, nn.Parameter], float]], batches: Sequence[Mapping[str, Tensor]], *,
    passes: int, seed: int, keeper: Keeper, learn: Callable[[Mapping[str, Tensor]], float], clip: float | None = None,
) -> list[float]:  # fmt: skip
    """Run one stage; the loss of every step. groups: parameters by name, and their learning rate.

    learn: leaves gradients of a batch in the parameters and returns its loss. Raises `TrainingError` for a loss that is not
    finite, and KeyboardInterrupt after the step in which Ctrl-C was pressed, with a checkpoint.
    """
    parameters = {n: p for named, _ in groups for n, p in named.items()}
    optimizer = torch.optim.AdamW([{"params": list(n.values()), "lr": r} for n, r in groups], weight_decay=0.0)
    losses = keeper.load(stage, parameters, optimizer)
    todo = order(len(batches), passes, seed)
    with gently(signal.SIGINT) as asked:
        warm = max(1, round(WARM * len(todo)))
        for step in range(len(losses), len(todo)):
            for group, (_, top) in zip(optimizer.param_groups, groups, strict=True):
                group["lr"] = top * course(step, len(todo), warm)
            optimizer.zero_grad()
            loss = learn(batches[todo[step]])
            if not math.isfinite(loss):
                raise TrainingError(f"{stage}, step {step + 1}: the loss is {loss}; lower the learning rate")
            if clip is not None:
                nn.utils.clip_grad_norm_(parameters.values(), clip)
            optimizer.step()
            losses.append(loss)
            if keeper.progress is not None:
                keeper.progress(step + 1, len(todo), f"{stage}: loss {loss:.4g}")
            if asked or (step + 1) % keeper.every == 0 or step + 1 == len(todo):
                keeper.save(stage, parameters, optimizer, losses)
            if asked and (step + 1 < len(todo) or stage != keeper.stages[-1]):
                raise KeyboardInterrupt(f"{stage}: stopped after step {step + 1} of {len(todo)}")
    return losses
