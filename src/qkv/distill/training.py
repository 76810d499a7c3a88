r"""Training qkv's own small models from nothing, on the one trainer: progress, sealed checkpoints, exact resume, bf16.

    loss = mean over targets of -log p(next token | tokens before)     or     mean over images of -log p(label | image)

Everything a run writes is under one folder: ``run.json``, ``metrics.jsonl``, ``checkpoints/`` and, at the end, ``model/``, which
the model's ``from_pretrained`` reads. A run that was cut off and resumed is bit for bit the run it would have been, on one device
with deterministic kernels; a run with another configuration, other data or other arguments is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkv.core.errors import InvalidInput, InvalidParameter, TrainingError
from qkv.distill import _folder
from qkv.distill._data import Collator, Items
from qkv.distill.lessons import Lesson
from qkv.distill.run import Options, Outcome, Run, settings_of
from qkv.models._blocks import Saved
from qkv.models.language.causal import CausalLM
from qkv.models.vision.pyramid import Pyramid
from qkv.models.vision.vit import ViT

RECIPE: dict[str, Any] = {
    "learning_rate": 1e-3, "weight_decay": 0.1, "adam_beta2": 0.95, "max_grad_norm": 1.0, "lr_scheduler_type": "cosine",
    "save_total_limit": 2, "seed": 0, "dataloader_drop_last": True,
}  # fmt: skip


class NextToken(Lesson):
    """A causal language model on rows of tokens, ``input_ids`` ``[B, N + 1]``; what `attention_mask` hides does not count."""

    def weigh(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The number of targets."""
        return batch["attention_mask"][:, 1:].sum().float()

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Lesson`."""
        ids = batch["input_ids"]
        targets = ids[:, 1:].masked_fill(batch["attention_mask"][:, 1:] == 0, -1)
        return told(self.student, ids[:, :-1], targets), {}


class Labels(Lesson):
    """An image model on ``pixel_values`` ``[B, C, height, width]`` and ``labels`` ``[B]``."""

    def weigh(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The number of images."""
        return torch.tensor(float(len(batch["labels"])))

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Lesson`."""
        return told(self.student, batch["pixel_values"], batch["labels"]), {}


def told(model: Any, *batch: Tensor) -> Tensor:
    """The loss; numbers that ran away on finite inputs are a `TrainingError`, not the refusal of the operator that met them."""
    try:
        return model.loss(*batch)
    except InvalidInput as error:
        if "NaN" not in str(error) or not all(bool(torch.isfinite(x).all()) for x in batch):
            raise
        raise TrainingError(f"{error}: the weights have run away; lower learning_rate, warm up longer, or train without bf16"
                            ) from error  # fmt: skip


LESSONS: dict[type[Saved], tuple[type[Lesson], str, frozenset[str]]] = {
    CausalLM: (NextToken, "next-token", frozenset({"input_ids"})),
    ViT: (Labels, "labels", frozenset({"pixel_values", "labels"})),
    Pyramid: (Labels, "labels", frozenset({"pixel_values", "labels"})),
}


def train(
    model: Saved,
    data: Sequence[Mapping[str, Any]],
    out: str | Path,
    *,
    resume: bool | str | Path = False,
    evaluate: Callable[[Any], Mapping[str, float]] | None = None,
    progress: bool | None = None,
    **arguments: Any,
) -> Outcome:
    """Train `model` in place on `data`; everything the run writes is under `out`, the model in ``out/model``.

    model: a `CausalLM` (items ``{"input_ids"}``: rows of tokens, each the target of the one before), a `ViT` or a `Pyramid`
    (items ``{"pixel_values", "labels"}``). resume: go on from the newest checkpoint under `out` (begin where there is none
    yet), or from the given one. evaluate: asked about the model before and after; its numbers come back in `Outcome.scores`.
    progress: show a bar (default: on a terminal). arguments: names of `transformers.TrainingArguments` (``max_steps`` is
    required; ``per_device_train_batch_size``, ``learning_rate``, ``bf16``, ``use_cpu``, ...), the rest as in `RECIPE`.

    Raises `TrainingError` (a run with another configuration, a loss that is not finite), `InvalidInput`, `InvalidParameter`,
    `UnknownName`, `SavedDataError`, `StorageError`.
    """
    if type(model) not in LESSONS:
        names = " or ".join(c.__name__ for c in LESSONS)
        raise InvalidInput(f"train takes a {names}, not a {type(model).__name__}")
    lesson, goal, keys = LESSONS[type(model)]
    settings = settings_of(arguments, _recipe(arguments), "train")
    items = Items(data, None, None)
    if set(items[0]) != keys:
        raise InvalidInput(
            f"items for a {type(model).__name__} hold {', '.join(sorted(keys))}; got {', '.join(sorted(items[0]))}"
        )
    batch = settings.get("per_device_train_batch_size", 8)
    if len(items) < batch:
        raise InvalidInput(
            f"{len(items)} items do not fill a batch of {batch}: give more, or a smaller per_device_train_batch_size"
        )
    config = model.config.to_dict()
    config["operators"] = {str(i): m.to_dict() for i, m in enumerate(model.config.methods)}
    more = {"config": config, "start": _fingerprint(model), "content": _content(items)}
    collator = Collator(getattr(model.config, "vocabulary", None), 0)
    options = Options(resume=resume, evaluate=evaluate, progress=progress)
    run, out = Run(items, collator, settings, options, result="model", more=more), Path(out)
    run.score("untrained", model)
    steps, loss, records = run.train(lesson(model), {"id": goal}, out, resume, model.kind)
    run.score("trained", model)
    if run.main and run.scores:
        _folder.write_json(out / "result.json", {"format": _folder.FORMAT, "scores": run.scores})
    return Outcome(model, out / "model", steps, loss, tuple(records), run.scores)


def _recipe(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """`RECIPE` with a warm-up over a tenth of the steps, at most 100."""
    steps = arguments.get("max_steps") or 1000
    if not isinstance(steps, int):
        raise InvalidParameter(f"max_steps={steps!r} must be an int")
    return RECIPE | {"warmup_steps": max(1, min(100, steps // 10))}


def _fingerprint(model: Saved) -> str:
    """A hash of all weights: a run that is resumed starts from the same ones."""
    h = hashlib.sha256()
    for name, x in sorted(model.state_dict().items()):
        h.update(name.encode() + x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


def _content(items: Items) -> str:
    """A hash of all items, in order."""
    h = hashlib.sha256()
    for i in range(len(items)):
        for key, value in sorted(items[i].items()):
            x = torch.as_tensor(value).contiguous().cpu()
            h.update(f"{key}{tuple(x.shape)}{x.dtype}".encode() + x.reshape(-1).view(torch.uint8).numpy().tobytes())
    return h.hexdigest()
