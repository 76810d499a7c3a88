"""DuoAttention on SmolLM2: gates learned on the frozen model, then pass keys and perplexity with half of the heads streaming,
against random gates, inverted gates and all heads streaming.

python benchmarks/real/duoattention.py [--device cuda]
"""

from __future__ import annotations

import time

import torch
from _passkeys import accuracy, prompts
from _resume import kept
from _streams import applied, arguments, clock, divergence, load, losses, perplexity, tokens

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
    lengths, depths, trials = ((300,), (0.5,), 1) if a.quick else ((2048, 4096), (0.1, 0.3, 0.5, 0.7, 0.9), 2)
    prompt, new, windows = (240, 16, 1) if a.quick else (2048, 512, 2)
    texts = [tokens(tokenizer, prompt + new, 20000 + i * 50000) for i in range(windows)]
    rows, base = [], []
    for name, method in methods.items():
        row: dict = {"cache": name}
        for n in lengths:
            row[f"pass keys at {n}"], row[f"bytes at {n}"] = accuracy(
                model, tokenizer, method, prompts(tokenizer, n, depths, trials)
            )
        with applied(model, method):
            scored = [losses(model, ids, prompt=prompt, chunk=64) for ids in texts]
        base = base or [logits for _, logits in scored]
        row["perplexity"] = perplexity(torch.cat([loss for loss, _ in scored]))
        parts = [divergence(x, y)[0] for x, (_, y) in zip(base, scored, strict=True)]
        row["KL to full (nats/token)"] = round(sum(parts) / len(parts), 4)
        rows.append(row)
        clock(str(row), t0)
    by = {row["cache"]: row for row in rows}
    last = f"pass keys at {lengths[-1]}"
    random_rows = [row[last] for name, row in by.items() if name.startswith("random")]
    half = by["learned gates, half streaming"]
    note = f"{len(depths) * trials} pass keys at {lengths[-1]} tokens, asked for after compression"
    text = f"{windows} x {new} tokens after prompts of {prompt}, in blocks of 64"
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
        Figure("bytes held, learned gates", half[f"bytes at {lengths[-1]}"], "", "share of a full cache"),
        Figure("perplexity, full", by["full"]["perplexity"], "", text),
        Figure("perplexity, learned gates", half["perplexity"], "", text),
        Figure("gates above 0.9", int((values > 0.9).sum()), "", f"of {values.numel()}"),
        Figure("gates below 0.1", int((values < 0.1).sum()), "", f"of {values.numel()}"),
    ]
    record("duoattention", claim=qkv.method("duoattention").spec.shown, figures=figures, table=rows, seed=0, folder=a.folder,
           command="python benchmarks/real/duoattention.py")  # fmt: skip


if __name__ == "__main__":
    main()
