"""`qkv train`: a small model of one's own, with any operator in its layers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qkv.cli._shared import DEVICE, JSON, SEED, pick_device, positive, print_json, said_how_to_go_on, screen

EXAMPLES = (
    "qkv train -m gla --layers 6 --steps 2000 --out runs/gla",
    "qkv train -m based -m sliding-window:window=128 --layers 6 --text book.txt --steps 5000 --bf16 --out runs/mine --resume",
    "qkv train --images digits -m agent --layers 4 --steps 1000 --out runs/vit",
    'qkv generate runs/gla/model --prompt "The sea is"',
)
EPILOG = "The model is saved in OUT/model, checkpoints beside it; after Ctrl-C the same command with --resume goes on."


def command(
    method: Annotated[
        list[str],
        typer.Option(
            "--method",
            "-m",
            metavar="ID[:NAME=VALUE,...]",
            help="An operator or sliding-window; several take turns over the layers.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Gets everything the run writes.", show_default=False)
    ],
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimiser steps.", show_default=False)],
    text: Annotated[
        str | None, typer.Option("--text", metavar="FILE", help="Training text (UTF-8).", show_default="shakespeare")
    ] = None,
    images: Annotated[
        str | None,
        typer.Option("--images", metavar="NAME", help="Instead: digits or fashion-mnist.", show_default=False),
    ] = None,
    layers: Annotated[
        int | None, typer.Option("--layers", min=1, help="Layers.", show_default="one for each -m, at least 4")
    ] = None,
    width: Annotated[int, typer.Option("--width", min=1, help="Width of the residual stream.")] = 256,
    heads: Annotated[int, typer.Option("--heads", min=1, help="Heads of every layer.")] = 4,
    kv_heads: Annotated[
        int, typer.Option("--kv-heads", min=0, help="Key/value heads of every layer.", show_default="as many as heads")
    ] = 0,
    parameters: Annotated[
        int | None,
        typer.Option("--parameters", min=1, help="Size the gated layers for so many.", show_default="8/3 of the width"),
    ] = None,
    length: Annotated[int, typer.Option("--length", min=8, help="Bytes of a training row.")] = 256,
    patch: Annotated[int, typer.Option("--patch", min=1, help="Pixels of a patch's side, with --images.")] = 2,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Rows or images of a step.")] = 32,
    rate: Annotated[float, typer.Option("--rate", help="Highest learning rate.")] = 1e-3,
    every: Annotated[int, typer.Option("--every", min=1, help="Steps between checkpoints.")] = 200,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16; weights stay in float32.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in OUT, if any.")] = False,
    seed: Annotated[int, SEED] = 0,
    device: Annotated[str | None, DEVICE] = None,
    json: Annotated[bool, JSON] = False,
) -> None:
    """Train a language model on the bytes of a text, or an image model, and score it on what was held out."""
    from qkv.core.errors import InvalidParameter
    from qkv.distill import train

    if text is not None and images is not None:
        raise InvalidParameter("--text and --images: a model learns one of the two")
    count = layers or max(4, len(method))
    operators = tuple(method[i % len(method)] for i in range(count))
    sizes = {"width": width, "heads": heads, "kv_heads": kv_heads}
    make = _language(text, length) if images is None else _images(images, patch)
    model, data, evaluate = make(operators, sizes, parameters, seed)
    with said_how_to_go_on():
        done = train(
            model, data, out, resume=resume, evaluate=evaluate, max_steps=steps, per_device_train_batch_size=batch,
            learning_rate=positive(rate, "--rate"), save_steps=every, logging_steps=min(every, 50), bf16=bf16, seed=seed,
            use_cpu=pick_device(device) == "cpu",
        )  # fmt: skip
    if json:
        print_json({"config": model.config.to_dict(), "model": done.path, "steps": done.steps, "loss": done.loss,
                    "scores": done.scores})  # fmt: skip
        return
    from rich.text import Text

    screen().print(Text(str(done)), soft_wrap=True)


def _language(text: str | None, length: int) -> Any:
    """A maker of (model, rows, evaluation): the last sixteenth of the text is held out."""
    import torch

    from qkv.bench.assets import long_text
    from qkv.bench.texts import held_out
    from qkv.core.errors import InvalidInput
    from qkv.models.language.causal import CausalConfig, CausalLM

    data = torch.frombuffer(bytearray(long_text(text).encode()), dtype=torch.uint8).long()
    cut = len(data) - len(data) // 16
    if min(cut, len(data) - cut) < length + 2:
        raise InvalidInput(f"the text has {len(data)} bytes; rows of {length} need at least {17 * (length + 2)}")
    rows = [{"input_ids": data[i : i + length + 1]} for i in range(0, cut - length, length)]

    def evaluate(model: Any) -> dict[str, float]:
        held = data[cut:].to(model.embed.weight.device)
        nats = held_out(lambda ids: model(ids).logits, held, length, min(128, len(held) // length))
        return {"nats per byte": nats, "bits per byte": nats / 0.6931471805599453}

    def make(operators: tuple[str, ...], sizes: dict[str, int], parameters: int | None, seed: int) -> Any:
        config = CausalConfig(operators=operators, **sizes)  # type: ignore[arg-type]
        return CausalLM(config if parameters is None else config.fitted(parameters), seed), rows, evaluate

    return make


def _images(name: str, patch: int) -> Any:
    """A maker of (model, images, evaluation)."""
    import torch

    from qkv.bench.images import images
    from qkv.models.vision.vit import ViT, ViTConfig

    found = images(name)
    data = [{"pixel_values": x, "labels": y} for x, y in zip(found.train, found.train_labels, strict=True)]

    def evaluate(model: Any) -> dict[str, float]:
        device = model.head.weight.device
        parts = zip(found.held.split(256), found.held_labels.split(256), strict=True)
        right = sum(int((model(x.to(device)).argmax(-1).cpu() == y).sum()) for x, y in parts)
        return {"accuracy": right / len(found.held)}

    def make(operators: tuple[str, ...], sizes: dict[str, int], parameters: int | None, seed: int) -> Any:
        shape = found.train.shape[1:]
        more = {"size": (shape[1], shape[2]), "channels": shape[0], "patch": patch,
                "classes": 1 + int(torch.cat((found.train_labels, found.held_labels)).max())}  # fmt: skip
        config = ViTConfig(operators=operators, **sizes, **more)  # type: ignore[arg-type]
        return ViT(config if parameters is None else config.fitted(parameters), seed), data, evaluate

    return make
