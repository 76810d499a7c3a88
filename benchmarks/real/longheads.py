"""LongHeads on real text: perplexity and passkeys within and beyond the trained length, and what original positions do instead.

python benchmarks/real/longheads.py [--device cuda]
"""

from __future__ import annotations

import dataclasses
import time
from typing import ClassVar, final

import torch
from _passkey import hidden, score
from _streams import applied, arguments, clock, load, losses, perplexity, tokens
from torch import Tensor

from qkv.bench.record import Figure, record
from qkv.caches.longheads import LongHeads
from qkv.core.cache import CacheSpec
from qkv.core.reader import Reading


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class OriginalPositions(LongHeads):
    """Negative control: the same rule, keys where they stand."""

    spec: ClassVar[CacheSpec] = CacheSpec(
        id="original-positions", title="Negative control", paper="control", evicts=False
    )

    def shift(self, view: Reading, first: Tensor, tokens: Tensor) -> Tensor:
        return torch.zeros_like(tokens)


def main() -> None:
    a = arguments(__doc__)
    model, tokenizer = load(a)
    near, far, new, attended, chunk = (4096, 10240, 256, 2048, 128)
    depths = (0.1, 0.5, 0.9)
    if a.quick:
        near, far, new, attended, chunk, depths = 288, 320, 8, 128, 32, (0.5,)
    mine = {"chunk_size": chunk, "attention_length": attended}
    settings = {
        "full": None,
        "longheads": LongHeads(**mine),
        "sinks and window of that length": f"streamingllm:sinks=4,window={attended - 4}",
        "original positions (control)": OriginalPositions(**mine),
    }
    started, rows = time.perf_counter(), []
    for name, method in settings.items():
        row: dict[str, object] = {"method": name}
        with applied(model, method):
            for length in (near, far):
                loss, _ = losses(model, tokens(tokenizer, length + new, 20000), prompt=length, chunk=chunk)
                row[f"perplexity at {length}"] = perplexity(loss)
                clock(f"{name}, text of {length}", started)
            for length in (near, far):
                some = () if name.endswith("(control)") else depths if length == near else depths[1:2] or depths
                cases = hidden(tokenizer, length, some)
                row[f"passkey at {length}"] = score(model, tokenizer, cases, new=6) if cases else "not run"
                clock(f"{name}, passkeys at {length}", started)
        rows.append(row)
    note = f"{new} tokens after the text; {attended} tokens read of chunks of {chunk}; trained on 8192"
    figures = [
        Figure(f"{what} at {length}, {row['method']}", row[f"{what} at {length}"], "", note)  # type: ignore[arg-type]
        for row in rows
        for what in ("perplexity", "passkey")
        for length in (near, far)
        if row[f"{what} at {length}"] != "not run"
    ]
    record("longheads", claim="a head that reads a few chunks side by side keeps perplexity beyond the trained length and finds "
           "passkeys outside a window of the same size", figures=figures, table=rows,
           command="python benchmarks/real/longheads.py", seed=0, folder=a.folder)  # fmt: skip
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
