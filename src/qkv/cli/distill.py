"""`qkv distill`: a student learns from a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qkv.cli._shared import (
    DEVICE,
    DTYPE,
    JSON,
    SEED,
    load_model,
    parse_list,
    positive,
    print_json,
    said_how_to_go_on,
    screen,
)

EXAMPLES = (
    "qkv distill --teacher smollm2 --layers 0,5,10,15,20,25,29 --objective minilm --steps 200 --out runs/small",
    "qkv distill --teacher ./big --student ./small --objective minilm --text book.txt --steps 5000 --out runs/mine --resume",
)
EPILOG = (
    "The student is saved in OUT/student, checkpoints beside it; after Ctrl-C the same command with --resume goes on."
)


def command(
    teacher: Annotated[
        str, typer.Option("--teacher", metavar="MODEL", help="smollm2, a folder, or a hub id.", show_default=False)
    ],
    objective: Annotated[
        str, typer.Option("--objective", metavar="ID[:NAME=VALUE,...]", help="What is learned.", show_default=False)
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Gets everything the run writes.", show_default=False)
    ],
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimiser steps.", show_default=False)],
    student: Annotated[
        str | None,
        typer.Option("--student", metavar="MODEL", help="A folder or a hub id; it is trained.", show_default=False),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option("--layers", metavar="L,L", help="Instead: the teacher cut to these layers.", show_default=False),
    ] = None,
    text: Annotated[
        str | None, typer.Option("--text", metavar="FILE", help="Training text (UTF-8).", show_default="shakespeare")
    ] = None,
    length: Annotated[int, typer.Option("--length", min=8, help="Tokens of a training row.")] = 128,
    rows: Annotated[int, typer.Option("--rows", min=16, help="Most rows taken from the text.")] = 4096,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Rows of a step.")] = 8,
    rate: Annotated[
        float | None, typer.Option("--rate", help="Learning rate.", show_default="the objective's recipe")
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            "--baseline",
            metavar="ID",
            help="Train this too, to compare: fine-tuning or an objective.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in OUT, if any.")] = False,
    seed: Annotated[int, SEED] = 0,
    dtype: Annotated[str | None, DTYPE] = None,
    device: Annotated[str | None, DEVICE] = None,
    json: Annotated[bool, JSON] = False,
) -> None:
    """Train a student against a teacher, both causal language models, and score it on rows held out from the text."""
    from qkv.core import registry
    from qkv.core.errors import InvalidInput, Refused

    if (student is None) == (layers is None):
        raise InvalidInput("say who learns: --student MODEL, or --layers 0,2,5 to cut the teacher; one of the two")
    method: Any = registry.method(objective)
    if method.spec.kind != "objective":
        raise Refused(
            f"{method.id} is of kind {method.spec.kind}, not an objective; `qkv methods --kind objective` lists them"
        )
    big, words = load_model(teacher, dtype, device)
    small, small_words = _student(big, words, student, layers, dtype, device)
    train, held = _rows(small_words, text, length, rows)
    from qkv.distill import distill

    with said_how_to_go_on():
        done = distill(
            big, small, method, train, out, tokenizer=small_words, teacher_tokenizer=words, max_length=length, resume=resume,
            baselines=tuple(baseline or ()), evaluate=_scores(big, held), max_steps=steps, per_device_train_batch_size=batch,
            learning_rate=positive(rate, "--rate"), seed=seed,
        )  # fmt: skip
    if json:
        print_json(
            {
                "objective": method.to_dict(),
                "student": done.path,
                "steps": done.steps,
                "loss": done.loss,
                "scores": done.scores,
            }
        )
        return
    from rich.text import Text

    screen().print(Text(str(done)), soft_wrap=True)


def _student(
    teacher: Any, tokenizer: Any, name: str | None, layers: str | None, dtype: str | None, device: str | None
) -> tuple[Any, Any]:
    if name is not None:
        return load_model(name, dtype, device)
    from qkv.core.errors import InvalidParameter
    from qkv.distill import drop_layers

    words = parse_list(layers or "")
    if not words or not all(w.isdecimal() for w in words):
        raise InvalidParameter(f"--layers {layers!r} must be layer numbers with commas between them, e.g. 0,2,5")
    return drop_layers(teacher, [int(w) for w in words]), tokenizer


def _rows(tokenizer: Any, text: str | None, length: int, most: int) -> tuple[list[dict[str, Any]], list[Any]]:
    """Training rows, and rows held out from them: every sixteenth, at least four."""
    import torch

    from qkv.bench.assets import long_text
    from qkv.core.errors import InvalidInput

    words = long_text(text)[: 8 * length * most]
    ids = tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"]
    cut = [torch.tensor(ids[i : i + length]) for i in range(0, len(ids) - length + 1, length)][:most]
    if len(cut) < 16:
        raise InvalidInput(
            f"the text has {len(ids)} tokens; at least 16 rows of {length} are needed: a longer text, or --length"
        )
    step = max(4, min(16, len(cut) // 4))
    return [{"input_ids": x} for i, x in enumerate(cut) if i % step], cut[::step][:64]


def _scores(teacher: Any, held: list[Any]) -> Any:
    """KL from the teacher (nats a token) and perplexity on the held-out rows."""
    import torch

    def logits(model: Any, ids: Any) -> Any:
        with torch.no_grad():
            return model(input_ids=ids[None].to(model.device)).logits[0].double().log_softmax(-1).cpu()

    def evaluate(model: Any) -> dict[str, float]:
        was = model.training
        model.eval()
        apart = loss = 0.0
        for ids in held:
            mine, full = logits(model, ids), logits(teacher, ids)
            apart += float((full.exp() * (full - mine)).sum(-1).mean())
            loss -= float(mine[:-1].gather(-1, ids[1:, None]).mean())
        model.train(was)
        return {"kl": apart / len(held), "ppl": float(torch.tensor(loss / len(held)).exp())}

    return evaluate
