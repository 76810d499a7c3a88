"""The one trainer of all objectives, on transformers' Trainer.

It trains a `Lesson`, which gives the mean loss of one batch, and weights it by the batch's share (the lesson's `weigh`) of
everything in the optimiser step, over accumulated batches and over devices, so that cutting a batch in pieces changes nothing
but rounding. Hugging Face's Trainer is here for what training in earnest needs: several devices, mixed precision, accumulation,
sealed checkpoints. `qkv.convert._common.training` steps through calibration batches inside one `qkv.apply`, layer by layer, and
`qkv.bench.fitting` replays captured steps of small models to compare them; neither needs any of that.
"""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainingArguments

from qkv.core.errors import StorageError, TrainingError
from qkv.distill import _folder
from qkv.distill._data import Collator, Items
from qkv.distill.lessons import Lesson, read_weights, write_weights


class DistillTrainer(Trainer):
    """transformers' Trainer around a `Lesson`: global normalisation, sealed checkpoints, records, an end on bad numbers."""

    def __init__(
        self,
        lesson: Lesson,
        args: TrainingArguments,
        items: Items,
        collator: Collator,
        facts: dict[str, Any],
        keep: int | None,
    ) -> None:
        super().__init__(model=lesson, args=args, train_dataset=items, data_collator=collator)
        self.lesson, self.facts, self.keep = lesson, facts, keep
        self.folder = Path(cast(str, args.output_dir))
        self.records = _folder.Records(self.folder.parent / "metrics.jsonl")
        self.model_accepts_loss_kwargs = True  # the loss comes normalised over the whole step
        self.loss_is_scaled_for_ga = True
        self.asked: list[int] = []
        self._parts: dict[str, Tensor] = {}
        self._steps = 0
        self.remove_callback(PrinterCallback)

    @property
    def stopped(self) -> int | None:
        """The signal that asked the run to end, or None."""
        return self.asked[0] if self.asked else None

    # -- loss

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The batches of one optimiser step and their weight over all of them and all devices."""
        samples = list(itertools.islice(epoch_iterator, num_batches))
        if not samples:
            return samples, None
        self._steps += 1
        weight = torch.stack([self.lesson.weigh(batch).to(device) for batch in samples]).sum()
        return samples, cast(Tensor, self.accelerator.gather(weight)).sum()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **rest: Any
    ) -> Any:
        """The share of this batch in the step's loss. Devices average gradients, so each gives its share times their number."""
        total, parts = model(inputs)
        if not bool(torch.isfinite(total)):
            raise TrainingError(
                f"the loss is {float(total.detach())} at step {self.state.global_step + 1}; {self._last()}. Lower "
                "learning_rate, warm up longer, or train without bf16"
            )
        share = float(self.lesson.weigh(inputs)) / float(num_items_in_batch)
        for name, part in parts.items():
            old = self._parts.get(name)
            self._parts[name] = part * share if old is None else old + part * share
        return total * share * self.accelerator.num_processes

    def _last(self) -> str:
        done = _folder.checkpoints(self.folder)
        return f"the newest checkpoint is {done[-1]}" if done else "there is no checkpoint yet"

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the loss's parts, and write the record."""
        if "loss" in logs:
            steps = max(1, self._steps)
            parts = {n: float(cast(Tensor, self.accelerator.reduce(x, "sum"))) / steps for n, x in self._parts.items()}
            self._parts, self._steps = {}, 0
            if self.is_world_process_zero():
                record = {"step": self.state.global_step, "epoch": self.state.epoch, "parts": parts, **logs}
                self.records.write({k: v for k, v in record.items() if v == v})
        super().log(logs, start_time)

    # -- checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        bad = next((n for n, p in self.lesson.named_parameters() if not bool(torch.isfinite(p).all())), None)
        step = self.state.global_step
        if bad is not None:
            raise TrainingError(
                f"{bad} holds NaN or infinite values after step {step}; nothing was saved: {self._last()}"
            )
        folder = self.folder / f"checkpoint-{step}"
        if self.is_world_process_zero():
            shutil.rmtree(folder, ignore_errors=True)  # what a write that was cut off left behind
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                _folder.seal(folder, {"step": step, "run": self.facts})
                _folder.rotate(self.folder, self.keep)
        except (OSError, RuntimeError, safetensors.SafetensorError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise StorageError(
                f"the checkpoint of step {step} could not be written ({error}); {self._last()}. Free some space and resume"
            ) from error

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.folder)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            write_weights(self.lesson, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        read_weights(self.lesson, Path(resume_from_checkpoint))
