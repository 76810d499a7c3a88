"""`qkv convert`: pretrained weights become another attention layer."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from qkv.cli._shared import (
    DEVICE,
    DTYPE,
    JSON,
    METHOD,
    MODEL,
    load_model,
    messages,
    methods_of,
    print_json,
    screen,
    working,
)

EXAMPLES = (
    "qkv convert smollm2 -m transmla:kv_rank=256,rope_dim=32 --out runs/mla",
    "qkv convert smollm2 -m lizard --rows 1024 --tokens 1024 --out runs/lizard",
    "qkv convert smollm2 -m transmla:kv_rank=128,rope_dim=64 --heal 1000 --device cuda --out runs/mla-healed",
    "python -c \"import qkv; model = qkv.load('runs/mla')\"",
)


def command(
    model: Annotated[str, MODEL],
    method: Annotated[list[str], METHOD],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Gets the changed weights.", show_default=False)
    ],
    text: Annotated[
        str | None, typer.Option("--text", metavar="FILE", help="Calibration text.", show_default="built in")
    ] = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Stretches of calibration text.")] = 32,
    tokens: Annotated[int, typer.Option("--tokens", min=8, help="Tokens of each.")] = 256,
    heal: Annotated[
        int, typer.Option("--heal", min=0, metavar="STEPS", help="Then train the converted layers towards the source.")
    ] = 0,
    heal_text: Annotated[
        str | None, typer.Option("--heal-text", metavar="FILE", help="What is healed on.", show_default="shakespeare")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Rows of 512 tokens in a step of healing.")] = 32,
    dtype: Annotated[str | None, DTYPE] = None,
    device: Annotated[str | None, DEVICE] = None,
    json: Annotated[bool, JSON] = False,
) -> None:
    """Convert a model and save what differs from it; `qkv.load(DIR)` gives the converted model back.

    Conversions that train keep checkpoints in DIR-training; after Ctrl-C the same command goes on from there.
    """
    import copy

    import qkv
    from qkv.core.errors import Refused

    chosen = methods_of(method)
    if not any(m.spec.kind == "conversion" for m in chosen):
        raise Refused(
            f"{', '.join(m.id for m in chosen)}: no conversion among them; `qkv methods --kind conversion` lists them. Other "
            "methods need no conversion: apply them with qkv.apply"
        )
    network, tokenizer = load_model(model, dtype, device)
    from qkv.bench.run import calibration

    with working("reading the calibration text"):
        data = calibration(network, tokenizer, rows, tokens, text)
    start = time.perf_counter()
    source = copy.deepcopy(network) if heal else None
    if any(m.spec.kind == "conversion" and m.spec.training is not None for m in chosen):
        _train(network, chosen, data, out)
    else:
        with working("converting"):
            qkv.apply(network, *chosen, data=data)
    if source is not None:
        _heal(network, source, tokenizer, heal_text, heal, batch, out)
    seconds = time.perf_counter() - start
    qkv.save(network, out)
    shutil.rmtree(_kept(out), ignore_errors=True)
    _print(chosen, out, seconds, json)


def _kept(out: Path) -> Path:
    """Where a conversion that trains keeps its checkpoints until its result is saved."""
    return out.with_name(f"{out.name}-training")


def _train(model: Any, methods: list[Any], data: Any, out: Path) -> None:
    """Apply a conversion that trains, with a progress bar on a terminal; it goes on where the same command was interrupted."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    import qkv
    from qkv.core.conversion import Lessons

    console = messages()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("converting", total=None)

        def tell(done: int, total: int, note: str) -> None:
            bar.update(task, completed=done, total=total, description=note)

        qkv.apply(model, *methods, data=Lessons(batches=data, folder=_kept(out), progress=tell))


def _heal(model: Any, source: Any, tokenizer: Any, text: str | None, steps: int, batch: int, out: Path) -> None:
    """Heal `model` in place; the run lies beside `out` and goes on where the same command was interrupted."""
    from qkv.bench.assets import long_text
    from qkv.core.errors import InvalidInput
    from qkv.distill import heal

    row = min(512, getattr(model.config, "max_position_embeddings", 512))
    words = long_text(text)[: 8 * row * batch * steps]  # English has about 4 characters a token
    ids = tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"]
    rows = [{"input_ids": ids[i : i + row]} for i in range(0, len(ids) - row + 1, row)]
    if not rows:
        raise InvalidInput(
            f"the text to heal on has {len(ids)} tokens; at least one row of {row} is needed: --heal-text FILE"
        )
    heal(
        model, source, rows, out.with_name(f"{out.name}-healing"), tokenizer=tokenizer, resume=True, max_steps=steps,
        per_device_train_batch_size=batch, bf16=model.device.type == "cuda", use_cpu=model.device.type == "cpu",
    )  # fmt: skip


def _print(methods: list[Any], out: Path, seconds: float, json: bool) -> None:
    size = sum(f.stat().st_size for f in out.iterdir() if f.is_file())
    if json:
        print_json({"methods": [m.to_dict() for m in methods], "out": out, "bytes": size, "seconds": seconds})
        return
    from rich.text import Text

    said = f"{', '.join(map(str, methods))}: converted in {seconds:.1f} s, {size / 1e6:.1f} MB in {out}"
    screen().print(Text(f"{said}\nUse it: qkv.load({str(out)!r})"), soft_wrap=True)
