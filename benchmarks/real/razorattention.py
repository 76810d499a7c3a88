"""RazorAttention on SmolLM2: induction and echo heads, then pass keys and divergence with the best heads whole, against as many
random heads, the lowest heads, and no compensation token.

python benchmarks/real/razorattention.py [--device cuda]
"""

from __future__ import annotations

import time

from _passkeys import judged
from _resume import kept
from _streams import arguments, clock, load

import qkv
from qkv.bench.record import Figure, record
from qkv.core.heads import HeadSet, HeadTable, read_json
from qkv.probes.induction_echo import InductionEcho


def measured(a, model) -> InductionEcho:
    """The scores, drawn and saved beside the records."""
    probe = qkv.method("induction-echo", block=60 if a.quick else 1000)
    data = kept(a, "induction-echo", lambda: probe.run(model).to_dict())
    found = InductionEcho(HeadTable.from_dict(data["induction"]), HeadTable.from_dict(data["echo"]))
    found.save(f"{a.folder}/heads/induction-echo.json")
    found.plot(f"{a.folder}/induction-echo.png")
    assert read_json(f"{a.folder}/heads/induction-echo.json")["type"] == "induction_echo"
    return found


def main() -> None:
    a = arguments(__doc__)
    model, tokenizer = load(a)
    t0 = time.perf_counter()
    found = measured(a, model)
    clock("heads", t0)
    by_kv = found.induction.by_kv_head()
    every = by_kv.measured
    few, more = found.retrieval_heads(0.14, 0.01), found.retrieval_heads(0.3, 0.02)
    lowest = every - by_kv.top(len(every) - len(more))

    def razor(heads: HeadSet, **changes):
        return qkv.method(
            "razorattention", **({"heads": heads.names(), "min_buffer": 64 if a.quick else 256} | changes)
        )

    seeds = (0,) if a.quick else (0, 1, 2)
    methods = {
        "full": None,
        f"best {len(more)} KV heads": razor(more),
        f"best {len(few)} KV heads": razor(few),
        "without compensation": razor(more, compensation=False),
        **{f"random {len(more)} others, seed {s}": razor((every - more).random(len(more), s)) for s in seeds},
        f"lowest {len(lowest)}": razor(lowest),
        "no head": razor(HeadSet()),
        "no head, without compensation": razor(HeadSet(), compensation=False),
    }
    rows, note, text = judged(a, model, tokenizer, methods, new=128, chunk=8, digits=5, depth=0.3)
    by = {row["cache"]: row for row in rows}
    last, held = [name for name in rows[0] if " at " in name][-2:]
    best, bare = by[f"best {len(more)} KV heads"], by["without compensation"]
    random_rows = [row[last] for name, row in by.items() if name.startswith("random")]
    scores = found.induction.values.flatten().sort(descending=True).values
    figures = [
        Figure(
            "highest induction score",
            round(float(scores[0]), 3),
            "",
            ", ".join(f"{l}.{h}" for l, h in found.induction._best(5)),
        ),
        Figure("heads with induction above 0.5", int((scores > 0.5).sum()), "", f"of {len(scores)}"),
        Figure(
            "highest echo score",
            round(float(found.echo.values.max()), 3),
            "",
            ", ".join(f"{l}.{h}" for l, h in found.echo._best(3)),
        ),
        Figure("pass keys, full", by["full"][last], "", note),
        Figure("pass keys, best heads", best[last], "", f"{len(more)} of {len(every)} KV heads whole"),
        Figure(
            "pass keys, random others",
            round(sum(random_rows) / len(random_rows), 3),
            "",
            f"mean of {len(random_rows)} draws",
        ),
        Figure("pass keys, lowest heads", by[f"lowest {len(lowest)}"][last], "", "negative control"),
        Figure("bytes held, best heads", best[held], "", "share of a full cache"),
        Figure("KL to full, with compensation", best["KL to full (nats/token)"], "nats/token", text),
        Figure("KL to full, without compensation", bare["KL to full (nats/token)"], "nats/token", text),
    ]
    record("razorattention", claim=qkv.method("razorattention").spec.shown, figures=figures, table=rows, seed=0, folder=a.folder,
           command="python benchmarks/real/razorattention.py")  # fmt: skip


if __name__ == "__main__":
    main()
