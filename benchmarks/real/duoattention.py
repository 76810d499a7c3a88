"""DuoAttention on SmolLM2: gates learned on the frozen model, then pass keys and perplexity with half of the heads streaming,
against random gates, inverted gates and all heads streaming.

python benchmarks/real/duoattention.py [--device cuda]
"""

from __future__ import annotations

import time

import torch
from _passkeys import judged
from _resume import kept
from _streams import arguments, clock, load

import qkv
from qkv.bench.assets import calibration_text
from qkv.bench.record import Figure, record
from qkv.core.heads import HeadTable


def learned(a, model, tokenizer, t0: float) -> HeadTable:
    """The gates, from an earlier run where there was one; drawn and saved beside the records."""
    steps, lengths = (2, (288, 320)) if a.quick else (300, (512, 1536))
    probe = qkv.method("duo-gates", steps=steps, lengths=lengths, needles=4, words=8, sinks=16, recent=128)

    def train() -> dict:
        def say(done: int, total: int, note: str) -> None:
            if done % max(1, total // 8) == 0:
                clock(f"step {done} of {total}, {note}", t0)

        return probe.run(model, tokenizer, calibration_text(), progress=say).to_dict()

    table = HeadTable.from_dict(kept(a, "duo-gates", train))
    table.save(f"{a.folder}/heads/duo-gates.json")
    table.plot(f"{a.folder}/duo-gates.png")
    return table


def main() -> None:
    a = arguments(__doc__)
    model, tokenizer = load(a)
    t0 = time.perf_counter()
    table = learned(a, model, tokenizer, t0)
    values = table.values
    shuffled = [values.flatten()[torch.randperm(values.numel(), generator=torch.Generator().manual_seed(s))].view_as(values)
                for s in ((0,) if a.quick else (0, 1, 2))]  # fmt: skip
    sizes = {"sinks": 16, "recent": 128}
    methods = {
        "full": None,
        "learned gates, half streaming": qkv.method("duoattention", gates=table, **sizes),
        "learned gates, three quarters streaming": qkv.method("duoattention", gates=table, sparsity=0.75, **sizes),
        **{
            f"random gates, half streaming, seed {s}": qkv.method("duoattention", gates=g, **sizes)
            for s, g in enumerate(shuffled)
        },
        "inverted gates, half streaming": qkv.method("duoattention", gates=1 - values, **sizes),
        "all heads streaming": qkv.method("duoattention", sparsity=1.0, **sizes),
    }
    rows, note, text = judged(a, model, tokenizer, methods, new=512, chunk=64, digits=4, depth=0.5)
    by = {row["cache"]: row for row in rows}
    last, held = [name for name in rows[0] if " at " in name][-2:]
    random_rows = [row[last] for name, row in by.items() if name.startswith("random")]
    half = by["learned gates, half streaming"]
    figures = [
        Figure("pass keys, full", by["full"][last], "", note),
        Figure("pass keys, learned gates", half[last], "", note),
        Figure(
            "pass keys, random gates",
            round(sum(random_rows) / len(random_rows), 3),
            "",
            f"mean of {len(random_rows)} draws",
        ),
        Figure("pass keys, inverted gates", by["inverted gates, half streaming"][last], "", "negative control"),
        Figure("bytes held, learned gates", half[held], "", "share of a full cache"),
        Figure("perplexity, full", by["full"]["perplexity"], "", text),
        Figure("perplexity, learned gates", half["perplexity"], "", text),
        Figure("gates above 0.9", int((values > 0.9).sum()), "", f"of {values.numel()}"),
        Figure("gates below 0.1", int((values < 0.1).sum()), "", f"of {values.numel()}"),
    ]
    record("duoattention", claim=qkv.method("duoattention").spec.shown, figures=figures, table=rows, seed=0, folder=a.folder,
           command="python benchmarks/real/duoattention.py")  # fmt: skip


if __name__ == "__main__":
    main()
