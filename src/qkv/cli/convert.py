"""`qkv convert`: pretrained weights become another attention layer."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from qkv.cli._shared import DEVICE, DTYPE, JSON, METHOD, MODEL, load_model, methods_of, print_json, screen, working

EXAMPLES = (
    "qkv convert smollm2 -m transmla:kv_rank=256,rope_dim=32 --out runs/mla",
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
    dtype: Annotated[str | None, DTYPE] = None,
    device: Annotated[str | None, DEVICE] = None,
    json: Annotated[bool, JSON] = False,
) -> None:
    """Convert a model and save what differs from it; `qkv.load(DIR)` gives the converted model back."""
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
    with working("converting"):
        qkv.apply(network, *chosen, data=data)
    seconds = time.perf_counter() - start
    qkv.save(network, out)
    _print(chosen, out, seconds, json)


def _print(methods: list[Any], out: Path, seconds: float, json: bool) -> None:
    size = sum(f.stat().st_size for f in out.iterdir() if f.is_file())
    if json:
        print_json({"methods": [m.to_dict() for m in methods], "out": out, "bytes": size, "seconds": seconds})
        return
    from rich.text import Text

    said = f"{', '.join(map(str, methods))}: converted in {seconds:.1f} s, {size / 1e6:.1f} MB in {out}"
    screen().print(Text(f"{said}\nUse it: qkv.load({str(out)!r})"), soft_wrap=True)
