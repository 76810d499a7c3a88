r"""Training a `MaskedDiffusionLM` on plain text: progress, checkpoints, and a resume that is exact.

    loss = E_t (1 / t) sum_{i masked} -log p(x_i | x with each token masked at rate t),   t ~ U(0, 1], stratified over the batch

A share of the rows keeps a random beginning unmasked, as a prompt is when the model generates (LLaDA's second stage). Batches
are drawn from (seed, step), so a run that was cut off and resumed takes the same batches as one that was not.

    python -m qkv.models.language.training TEXT.txt OUT [--steps 2000] [--device cuda]

Axes: B batch, L length. Paper: arXiv:2502.09992 (LLaDA).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.core.errors import InvalidInput, InvalidParameter, SavedDataError, TrainingError
from qkv.core.training import course, decayed
from qkv.hosts.stack import read_folder, write_folder
from qkv.models.language.masked_diffusion import BYTES, MaskedDiffusionConfig, MaskedDiffusionLM

Progress = Callable[[int, int, str], None]
HELD_OUT = 16  # the last sixteenth of the text is never trained on


@final
@dataclass(frozen=True, kw_only=True)
class Training:
    """How to train. prompts: share of rows that keep a beginning. every: steps between records and checkpoints."""

    steps: int = 2000
    batch: int = 32
    learning_rate: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.1
    clip: float = 1.0
    prompts: float = 0.5
    every: int = 100
    seed: int = 0
    bf16: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "every"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise InvalidParameter(f"{name}={getattr(self, name)!r} must be an int of at least 1")
        if not self.learning_rate > 0 or not 0 <= self.prompts <= 1 or self.warmup < 0:
            raise InvalidParameter(f"learning_rate must be positive, prompts in [0, 1], warmup at least 0; got {self}")


class Batch(NamedTuple):
    """clean, noisy ``[B, L]`` tokens and the masking rate ``[B, 1]`` of each row."""

    clean: Tensor
    noisy: Tensor
    rate: Tensor


class Trained(NamedTuple):
    """The model in evaluation mode, and a record ``{"step", "loss", "held_out", "seconds"}`` every `Training.every` steps."""

    model: MaskedDiffusionLM
    records: tuple[dict[str, float], ...]


def draw(data: Tensor, config: MaskedDiffusionConfig, training: Training, step: int) -> Batch:
    """The batch of a step, from `data` ``[N]``: the same on every device and in every run with this seed."""
    g = torch.Generator().manual_seed(training.seed * 1_000_003 + step)
    b, l = training.batch, config.length
    starts = torch.randint(0, data.numel() - l + 1, (b, 1), generator=g)
    clean = data[starts + torch.arange(l)]
    rate = (torch.rand(1, generator=g) + torch.arange(b) / b).remainder(1.0).clamp(min=1 / l)[:, None]
    begin = (torch.rand(b, 1, generator=g) * l * (torch.rand(b, 1, generator=g) < training.prompts)).long()
    place = torch.arange(l)
    hidden = (torch.rand(b, l, generator=g) < rate) & (place >= begin)
    # A row without a mask would teach nothing.
    hidden |= (place == l - 1) & ~hidden.any(-1, keepdim=True)
    return Batch(clean, clean.masked_fill(hidden, config.mask_token), rate)


def loss_of(model: MaskedDiffusionLM, batch: Batch) -> Tensor:
    """Mean over the batch of the bound on -log p per token that may be masked, in nats."""
    hidden = batch.noisy == model.mask_token
    logits = model(batch.noisy)
    nats = F.cross_entropy(logits.float().flatten(0, 1), batch.clean.flatten(), reduction="none").view_as(batch.clean)
    return (nats * hidden / batch.rate).sum() / batch.clean.numel()


def train(
    config: MaskedDiffusionConfig,
    text: str,
    out: str | Path,
    training: Training | None = None,
    *,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    resume: bool = True,
) -> Trained:
    """Train a model on `text` and save it to the folder `out`; a run that was cut off goes on from its last checkpoint.

    progress: called with (steps done, steps, note) after every record. resume: False starts anew even if a checkpoint is
    there. An interruption (Ctrl-C) writes a checkpoint first. Raises `InvalidInput` (text shorter than needed),
    `TrainingError` (a checkpoint of other settings or of another text, a loss that is not finite).
    """
    training, out = training or Training(), Path(out)
    data = torch.tensor(list(text.encode()), dtype=torch.int64)
    cut = data.numel() - data.numel() // HELD_OUT
    if min(cut, data.numel() - cut) < config.length:
        raise InvalidInput(
            f"the text has {data.numel()} bytes; training on rows of {config.length} needs {(HELD_OUT + 1) * config.length}"
        )
    if int(data.max()) >= min(config.mask_token, BYTES):
        raise InvalidInput(f"the text holds bytes up to {int(data.max())}, the mask is token {config.mask_token}")
    facts = {"config": config.to_dict(), "training": dataclasses.asdict(training),
             "text": hashlib.sha256(text.encode()).hexdigest()}  # fmt: skip
    run = _Run(config, training, data[:cut], data[cut:], torch.device(device), facts)
    checkpoint = out.parent / f"{out.name}.checkpoint"
    if resume and (checkpoint / "qkv.json").is_file():
        run.restore(checkpoint)
    try:
        while run.step < training.steps:
            run.advance()
            if run.step % training.every == 0 or run.step == training.steps:
                run.record()
                run.keep(checkpoint)
                if progress is not None:
                    last = run.records[-1]
                    progress(run.step, training.steps, f"loss {last['loss']:.3f}, held out {last['held_out']:.3f}")
    except KeyboardInterrupt:
        run.keep(checkpoint)
        raise
    run.model.eval().save(out, records=run.records, **{k: facts[k] for k in ("training", "text")})
    return Trained(run.model, tuple(run.records))


class _Run:
    """A training run at some step: everything that a checkpoint must hold."""

    def __init__(
        self, config: MaskedDiffusionConfig, training: Training, data: Tensor, held: Tensor, device: torch.device,
        facts: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self.config, self.training, self.device, self.facts = config, training, device, facts
        self.data, self.held = data, held
        self.model = MaskedDiffusionLM(config, training.seed).to(device).train()
        groups = decayed(self.model.parameters(), training.weight_decay)
        self.optimiser = torch.optim.AdamW(groups, lr=training.learning_rate, betas=(0.9, 0.98))
        self.named = dict(self.model.named_parameters())
        self.step, self.sum, self.seconds = 0, torch.zeros((), device=device), 0.0
        self.records: list[dict[str, float]] = []

    def rate(self) -> float:
        """Learning rate of the next step: a linear start, then half a cosine down to a twentieth."""
        t = self.training
        return t.learning_rate * course(self.step, t.steps, t.warmup, floor=0.05)

    def _loss(self, batch: Batch) -> Tensor:
        mixed = torch.autocast(self.device.type, torch.bfloat16) if self.training.bf16 else contextlib.nullcontext()
        with mixed:
            return loss_of(self.model, Batch(*(x.to(self.device) for x in batch)))

    def advance(self) -> None:
        """One optimiser step."""
        began = time.perf_counter()
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate()
        loss = self._loss(draw(self.data, self.config, self.training, self.step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.training.clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.sum += loss.detach()
        self.step += 1
        self.seconds += time.perf_counter() - began

    @torch.no_grad()
    def record(self) -> None:
        """The mean loss since the last record, and the loss on text never trained on."""
        since = self.step - (int(self.records[-1]["step"]) if self.records else 0)
        loss = float(self.sum) / since
        if not math.isfinite(loss):
            raise TrainingError(f"the loss is {loss} at step {self.step}; lower learning_rate or warm up longer")
        fixed = dataclasses.replace(self.training, seed=7_777)  # the same text and masks in every record
        held = sum(float(self._loss(draw(self.held, self.config, fixed, i))) for i in range(4)) / 4
        self.records.append({"step": self.step, "loss": loss, "held_out": held, "seconds": round(self.seconds, 3)})
        self.sum = torch.zeros_like(self.sum)

    def keep(self, folder: Path) -> None:
        """Write the checkpoint; the one before stays until this one is complete."""
        tensors = {f"model/{k}": v for k, v in self.model.state_dict().items()} | {"sum": self.sum}
        for name, p in self.named.items():
            tensors |= {f"optimiser/{name}/{k}": v for k, v in self.optimiser.state.get(p, {}).items()}
        facts = {"run": self.facts, "step": self.step, "records": self.records, "seconds": self.seconds}
        write_folder(folder, facts, tensors)

    def restore(self, folder: Path) -> None:
        """Go back to a checkpoint of this very run."""
        manifest, tensors = read_folder(folder)
        theirs = manifest.get("run")
        if theirs != self.facts:
            what = [k for k in self.facts if not isinstance(theirs, dict) or theirs.get(k) != self.facts[k]]
            raise TrainingError(f"{folder} is a checkpoint of a run with another {' and '.join(what)}; give the same ones, "
                                "resume=False to start anew, or another folder")  # fmt: skip
        try:
            self.model.load_state_dict(
                {k.removeprefix("model/"): v for k, v in tensors.items() if k.startswith("model/")}
            )
            self.sum, self.step = tensors["sum"].to(self.device), int(manifest["step"])
            self.records, self.seconds = list(manifest["records"]), float(manifest["seconds"])
            for name, p in self.named.items():
                prefix = f"optimiser/{name}/"
                state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
                if any(v.ndim and v.shape != p.shape for v in state.values()):
                    raise SavedDataError(f"{folder}: the optimiser's numbers for {name} have another shape")
                self.optimiser.state[p] = {k: v if k == "step" else v.to(self.device) for k, v in state.items()}
        except (KeyError, RuntimeError) as error:
            raise SavedDataError(f"{folder} is not a whole checkpoint: {error}") from error


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Train a small masked-diffusion language model on a UTF-8 text file.")
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--anew", action="store_true", help="do not resume from a checkpoint")
    shape, how = MaskedDiffusionConfig(), Training()
    for name in ("width", "layers", "heads", "kv_heads", "length"):
        parser.add_argument(f"--{name}", type=int, default=getattr(shape, name))
    for name in ("steps", "batch", "learning_rate", "every", "seed"):
        value = getattr(how, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    a = parser.parse_args()
    config = MaskedDiffusionConfig(**{n: getattr(a, n) for n in ("width", "layers", "heads", "kv_heads", "length")})
    chosen = {n: getattr(a, n) for n in ("steps", "batch", "learning_rate", "every", "seed")}
    training = Training(**chosen, bf16=a.device.startswith("cuda"))
    began = time.perf_counter()

    def tell(done: int, total: int, note: str) -> None:
        gone = time.perf_counter() - began
        print(f"{done}/{total}  {note}  {gone:.0f} s gone", flush=True)

    train(
        config, a.text.read_text(encoding="utf-8"), a.out, training, device=a.device, progress=tell, resume=not a.anew
    )
    print(f"saved in {a.out}")


if __name__ == "__main__":
    main()
