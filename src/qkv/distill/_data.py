"""Data of a training run: sentences or prepared inputs, padded into batches, with a fingerprint to recognise them by."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qkv.core.errors import InvalidInput

PADDING = {"input_ids": None, "attention_mask": 0, "token_type_ids": 0, "position_ids": 0, "labels": -100}


class Items(torch.utils.data.Dataset):
    """Items of a map-style data set as plain model inputs. Strings go through the tokenizer when they are fetched.

    data: a sequence of strings, or of mappings with ``input_ids`` (any length), or of mappings of equal-shaped tensors
    (``pixel_values``). max_length: longest input in tokens, for strings. Raises `InvalidInput`.
    """

    def __init__(self, data: Any, tokenizer: Any, max_length: int | None) -> None:
        if isinstance(data, (str, bytes, Mapping)) or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
            raise InvalidInput(
                f"data must be a sequence of strings or of model inputs (with a length, so that a run can be resumed), not "
                f"{type(data).__name__}"
            )
        if not len(data):
            raise InvalidInput("data is empty")
        if isinstance(data[0], str) and tokenizer is None:
            raise InvalidInput("data holds strings; pass tokenizer=, or give tokenized items with 'input_ids'")
        self.data, self.tokenizer, self.max_length = data, tokenizer, max_length

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.data[index]
        if isinstance(item, str):
            item = dict(self.tokenizer(item, truncation=self.max_length is not None, max_length=self.max_length))
        if not isinstance(item, Mapping):
            raise InvalidInput(
                f"data[{index}] is a {type(item).__name__}; expected a string or a mapping of model inputs"
            )
        ids = item.get("input_ids")
        if ids is not None and not len(ids):
            raise InvalidInput(f"data[{index}] holds no token")
        return dict(item)

    def fingerprint(self, picks: int = 64) -> str:
        """A hash over the number of items and up to `picks` of them, evenly spaced, as the model gets them."""
        h = hashlib.sha256(str(len(self)).encode())
        for index in sorted({round(i * (len(self) - 1) / max(1, picks - 1)) for i in range(picks)}):
            for key, value in sorted(self[index].items()):
                x = torch.as_tensor(value)
                h.update(f"{key}{tuple(x.shape)}{x.dtype}".encode())
                h.update(x.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes() if x.numel() else b"")
        return h.hexdigest()


class Collator:
    """Items to one batch: sequences padded on the right (labels with -100), everything else stacked.

    vocabulary: number of token embeddings, to catch tokens of another tokenizer. pad: token under the padding.
    """

    def __init__(self, vocabulary: int | None, pad: int) -> None:
        self.vocabulary, self.pad = vocabulary, pad

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The batch; every item must have the same keys."""
        keys = set(items[0])
        for item in items:
            if set(item) != keys:
                raise InvalidInput(
                    f"items of one data set must have the same keys; got {sorted(keys)} and {sorted(item)}"
                )
        out = {key: self._column(key, [torch.as_tensor(item[key]) for item in items]) for key in sorted(keys)}
        if "input_ids" in out:
            if "attention_mask" not in out:
                lengths = torch.tensor([len(item["input_ids"]) for item in items])
                out["attention_mask"] = (torch.arange(out["input_ids"].shape[1]) < lengths[:, None]).long()
            self._check(out)
        return out

    def _column(self, key: str, values: list[Tensor]) -> Tensor:
        if key in PADDING and all(x.ndim == 1 for x in values):
            fill = self.pad if key == "input_ids" else PADDING[key]
            return torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill)
        if len({x.shape for x in values}) > 1:
            raise InvalidInput(
                f"{key!r} has items of shapes {sorted({tuple(x.shape) for x in values})}; they must agree"
            )
        return torch.stack(values)

    def _check(self, batch: dict[str, Tensor]) -> None:
        ids = batch["input_ids"]
        if ids.is_floating_point() or ids.ndim != 2:
            raise InvalidInput(f"input_ids must be integers, one list per item; got {ids.dtype} {tuple(ids.shape)}")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or (self.vocabulary is not None and high >= self.vocabulary):
            raise InvalidInput(
                f"input_ids run from {low} to {high}, the student has {self.vocabulary} tokens: data of another tokenizer?"
            )
        for key in ("attention_mask", "token_type_ids", "position_ids"):
            if key in batch and batch[key].shape != ids.shape:
                raise InvalidInput(f"{key} has shape {tuple(batch[key].shape)}, input_ids {tuple(ids.shape)}")
        if not bool(batch["attention_mask"].any(-1).all()):
            raise InvalidInput("an item has no real token (its attention_mask is all 0)")
