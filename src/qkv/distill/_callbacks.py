"""What a run shows while it trains, and how it ends when it is asked to."""

from __future__ import annotations

from typing import Any, cast

from transformers import TrainerCallback

from qkv.distill.trainer import DistillTrainer


class Stop(TrainerCallback):
    """After a signal: finish the step, save, stop."""

    def __init__(self, trainer: DistillTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> Any:
        if self.trainer.stopped is not None:
            control.should_save = control.should_training_stop = True
        return control


class Bar(TrainerCallback):
    """A progress bar with the loss and the time left."""

    def __init__(self, what: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, TextColumn("loss {task.fields[loss]}"), console=Console(stderr=True))
        self.what, self.task = what, None

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.bar.start()
        self.task = self.bar.add_task(self.what, total=state.max_steps, completed=state.global_step, loss="...")

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.bar.update(cast(Any, self.task), completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
        if logs and "loss" in logs:
            self.bar.update(cast(Any, self.task), loss=f"{logs['loss']:.4g}")

    def on_train_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.bar.stop()
