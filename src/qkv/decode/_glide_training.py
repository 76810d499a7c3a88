r"""Teaching a draft of LongSpec: the target frozen, loss = cross-entropy of the next token.

    anchor-offset positions    short texts stand at the positions of long ones, their first few tokens excepted
    flash noisy training       query i sees the target's keys up to i - j, j ~ U{1 .. 4}: the newest tokens have none yet

Stages of the paper: short samples at 5e-4, long text, long chains of thought at 5e-6; each is one call that goes on from the
draft of the last. AdamW with betas (0.9, 0.98), weight decay 0.1, gradients clipped to 1. Step n draws its windows, positions
and j from (seed, n) alone, so a run that was cut off goes on as if it had not been.

Axes: B batch, T tokens of a sample, C width, V vocabulary.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.core.cache import Rope
from qkv.core.decoding import Progress
from qkv.core.errors import InvalidInput, InvalidParameter, SavedDataError, TrainingError
from qkv.core.training import course, evaluated, frozen
from qkv.decode._glide import GlideDraft, anchor_offset_positions, last_site, target_fingerprint
from qkv.hosts import observe, stack

STATE = "longspec-training"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """steps: optimiser steps. batch: samples a step. length: tokens a sample. learning_rate: at its highest, after `warmup`
    (share of the steps), from where it falls to a tenth along a cosine. far: samples of at most that many tokens stand at
    anchor-offset positions, longer ones at ordinary ones; 0: none does. sinks, shift: largest s and j. save_every: steps between
    checkpoints. The other names as in AdamW.
    """

    steps: int = 400
    batch: int = 8
    length: int = 1024
    learning_rate: float = 5e-4
    warmup: float = 0.05
    far: int = 1200
    sinks: int = 4
    shift: int = 4
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    save_every: int = 100

    def __post_init__(self) -> None:
        low = {"steps": 1, "batch": 1, "length": 2, "shift": 1, "sinks": 0, "far": 0, "save_every": 1}
        for name, least in low.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InvalidParameter(f"recipe: {name}={value!r} must be an int of at least {least}")
        if not self.learning_rate > 0 or not 0 <= self.warmup < 1 or not self.clip > 0:
            raise InvalidParameter("recipe: learning_rate and clip must be positive, warmup must lie in [0, 1)")

    def rate(self, step: int) -> float:
        """Learning rate of a step, from 0."""
        return self.learning_rate * course(step, self.steps, max(1, round(self.warmup * self.steps)))


@dataclass(frozen=True)
class Taught:
    """A trained draft. losses: mean loss of every step, in nats per token. seconds: of this call."""

    draft: GlideDraft
    losses: tuple[float, ...]
    seconds: float


def train(
    model: Any,
    tokens: Tensor,
    folder: str | Path,
    recipe: Recipe,
    *,
    window: int,
    start: GlideDraft | None,
    resume: bool,
    progress: Progress | None,
) -> Taught:
    """See `qkv.decode.longspec.LongSpec.train`."""
    site, folder = last_site(model), Path(folder)
    _check(model, tokens, recipe)
    began = time.perf_counter()
    draft = GlideDraft.of(model, window=window, seed=recipe.seed).float() if start is None else start.float()
    if model.dtype == torch.float64:
        draft = draft.double()
    draft.fits(model)
    draft.train()
    optimizer = torch.optim.AdamW(
        draft.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay
    )
    facts = {"recipe": asdict(recipe), "target": target_fingerprint(model), "window": window, "data": _digest(tokens)}
    losses = _resumed(folder, draft, optimizer, facts) if resume else _started(folder)
    rope = site.geometry.rope
    assert rope is not None
    rope, scale = (
        Rope(rope.frequencies.to(model.device)),
        site.geometry.head_dim**-0.5 if site.scale is None else site.scale,
    )
    tokens, held = tokens.reshape(-1), []
    try:
        with _reading(model, site, held):
            for step in range(len(losses), recipe.steps):
                losses.append(_step(model, draft, optimizer, tokens, held, recipe, step, rope, scale))
                if not math.isfinite(losses[-1]):
                    raise TrainingError(f"step {step + 1}: the loss is {losses[-1]}; lower the learning rate")
                if progress is not None:
                    progress(step + 1, recipe.steps, f"loss {losses[-1]:.3f}")
                if (step + 1) % recipe.save_every == 0:
                    _save(folder, draft, optimizer, facts, losses)
    except KeyboardInterrupt:
        _save(folder, draft, optimizer, facts, losses)
        raise
    draft = draft.to(model.dtype).eval()
    draft.save(folder / "draft", model, {"recipe": asdict(recipe), "loss": losses[-1], "steps": len(losses)})
    shutil.rmtree(folder / "state", ignore_errors=True)
    return Taught(draft, tuple(losses), time.perf_counter() - began)


def _check(model: Any, tokens: Any, recipe: Recipe) -> None:
    if not isinstance(tokens, Tensor) or tokens.is_floating_point() or tokens.numel() <= recipe.length:
        raise InvalidInput(
            f"longspec is trained on one long integer tensor of tokens, more than length={recipe.length} of them; got "
            f"{tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__}"
        )
    reach = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if reach is not None and recipe.length > reach:
        raise InvalidInput(f"samples of {recipe.length} tokens exceed the {reach} positions this model knows")


@contextmanager
def _reading(model: Any, site: Any, held: list[Tensor]) -> Iterator[None]:
    """While open, the model is frozen, and every forward pass leaves the last layer's keys and values in `held`."""

    def keep(_: Any, call: Any) -> None:
        held[:] = [call.k, call.v]

    with frozen(model), evaluated(model), observe(model, keep, where=[site.name]):
        yield


def batch_of(tokens: Tensor, recipe: Recipe, step: int, reach: int) -> tuple[Tensor, Tensor, int]:
    """Samples ``[B, T + 1]`` (the last token is only a label), positions ``[B, T]`` and j of a step."""
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    starts = torch.randint(0, tokens.shape[0] - recipe.length, (recipe.batch,), generator=generator)
    ids = torch.stack([tokens[s : s + recipe.length + 1] for s in starts.tolist()])
    j = int(torch.randint(1, recipe.shift + 1, (), generator=generator))
    if recipe.length <= recipe.far:
        rows = [
            anchor_offset_positions(recipe.length, reach, sinks=recipe.sinks, generator=generator)
            for _ in range(recipe.batch)
        ]
        return ids, torch.stack(rows), j
    return ids, torch.arange(recipe.length).expand(recipe.batch, -1), j


def _step(
    model: Any, draft: GlideDraft, optimizer: Any, tokens: Tensor, held: list[Tensor], recipe: Recipe, step: int, rope: Rope,
    scale: float,
) -> float:  # fmt: skip
    """One optimiser step; its loss."""
    reach = getattr(model.config.get_text_config(), "max_position_embeddings", None) or recipe.length
    ids, position, j = (
        x.to(model.device) if isinstance(x, Tensor) else x for x in batch_of(tokens, recipe, step, reach)
    )
    assert isinstance(ids, Tensor) and isinstance(position, Tensor) and isinstance(j, int)
    with torch.no_grad():
        model(input_ids=ids[:, :-1], position_ids=position, use_cache=False, logits_to_keep=1)
        x = model.get_input_embeddings()(ids[:, :-1])
    k, v = held
    low = model.dtype in (torch.float16, torch.bfloat16)
    wide = next(draft.parameters()).dtype
    with torch.autocast(model.device.type, dtype=model.dtype if low else torch.bfloat16, enabled=low):
        out = draft(x.to(wide), position, k, v, j, rope, scale)
        logits = model.get_output_embeddings()(out.to(model.dtype))
    loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
    for group in optimizer.param_groups:
        group["lr"] = recipe.rate(step)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(draft.parameters(), recipe.clip)
    optimizer.step()
    return loss.item()


# -- going on -------------------------------------------------------------------------------------------------------


def _digest(tokens: Tensor) -> list[int]:
    """Enough of the data to notice that it is other data."""
    flat = tokens.reshape(-1)
    picks = torch.linspace(0, flat.numel() - 1, 64).long()
    return [flat.numel(), *flat.cpu()[picks].tolist()]


def _save(folder: Path, draft: GlideDraft, optimizer: Any, facts: dict[str, Any], losses: list[float]) -> None:
    tensors = {f"draft.{k}": x for k, x in draft.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{i}.{k}": torch.as_tensor(x) for k, x in state.items()}
    stack.write_folder(folder / "state", {"kind": STATE, "facts": facts, "losses": losses}, tensors)


def _started(folder: Path) -> list[float]:
    if (folder / "state").exists():
        raise TrainingError(
            f"{folder} holds a training that was cut off; go on with resume=True, or choose another folder"
        )
    return []


def _resumed(folder: Path, draft: GlideDraft, optimizer: Any, facts: dict[str, Any]) -> list[float]:
    """Put back what a run left behind; nothing there: begin."""
    if not (folder / "state").exists():
        return []
    manifest, tensors = stack.read_folder(folder / "state")
    if manifest.get("kind") != STATE or not isinstance(manifest.get("losses"), list):
        raise SavedDataError(f"{folder / 'state'} holds no training of a draft")
    was = manifest.get("facts")
    if was != facts:
        names = [k for k in facts if not isinstance(was, dict) or was.get(k) != facts[k]]
        raise TrainingError(
            f"{folder} was started with another {' and another '.join(names)}; give the same, or choose another folder"
        )
    draft.load_state_dict({k[6:]: x for k, x in tensors.items() if k.startswith("draft.")})
    state: dict[int, dict[str, Tensor]] = {}
    for name, x in tensors.items():
        if name.startswith("adam."):
            _, i, key = name.split(".", 2)
            state.setdefault(int(i), {})[key] = x
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return [float(x) for x in manifest["losses"]]
