"""Retrieval heads of SmolLM2: is the table sparse, do its top heads carry retrieval, does it depend on the length?

python benchmarks/real/retrieval_heads.py [--device cuda]

Pass keys in repeated filler. The keys of the ablation are not those that the heads were found with.
"""

from __future__ import annotations

import time

from _resume import kept
from _streams import arguments, clock, load

import qkv
from qkv.bench.record import Figure, record
from qkv.core.heads import HeadSet, HeadTable
from qkv.probes._needle import FILLER, PASSKEYS, passkey
from qkv.probes.retrieval_heads import QUICK_TEMPLATE, activation_frequency

SEEDS = (0, 1, 2)


def main() -> None:
    a = arguments(__doc__)
    model, tokenizer = load(a)
    short, long = (300, 600) if a.quick else (500, 2000)
    depths, keys = ((0.5,), ("63950",)) if a.quick else ((0.1, 0.3, 0.5, 0.7, 0.9), ("63950", "27184"))
    t0 = time.perf_counter()

    def probe(length: int, at: tuple[float, ...] = depths):
        return qkv.method(
            "retrieval-heads", lengths=(length,), depths=at, buffer=60, new_tokens=8, template=QUICK_TEMPLATE
        )

    def report(done: int, total: int, note: str) -> None:
        if done == total or done % 5 == 0:
            clock(f"{done} of {total}, {note}", t0)

    def measure(length: int) -> dict:
        return probe(length).run(model, tokenizer, FILLER, PASSKEYS, progress=report).to_dict()

    tables: dict[int, HeadTable] = {}
    for length in (short, long):
        tables[length] = HeadTable.from_dict(kept(a, f"retrieval-heads-{length}", lambda n=length: measure(n)))
        tables[length].plot(f"{a.folder}/retrieval-heads-{length}.png")
    table = tables[short]
    scores = table.values.flatten().sort(descending=True).values
    strong = table.top(threshold=0.1)
    always = int((activation_frequency(table).values > 0.9).sum())

    held_out = [passkey(key) for key in keys]
    at = depths[::2]
    prompts = [p for n in (short, long) for p in probe(n, at).prompts(tokenizer, FILLER, held_out)]
    others = table.measured - strong - table.top(10)
    removed = {"base": HeadSet(), "top 5": table.top(5), "top 10": table.top(10)}
    removed |= {f"random 10, seed {s}": others.random(10, s) for s in SEEDS}

    def answers(heads: HeadSet) -> list[float]:
        with qkv.applied(model, qkv.method("head-ablation", heads=heads) if heads else "full"):
            return probe(short).recalls(model, tokenizer, prompts, report)

    rows = []
    for name, heads in removed.items():
        recalls = kept(
            a, f"retrieval-heads-without-{name.replace(', ', '-').replace(' ', '-')}", lambda h=heads: answers(h)
        )
        rows.append({"heads removed": name, "right": sum(r > 50 for r in recalls), "of": len(recalls)})
        clock(str(rows[-1]), t0)
    right = {row["heads removed"]: row["right"] / row["of"] for row in rows}
    random10 = [v for k, v in right.items() if k.startswith("random 10")]
    note = f"{len(prompts)} pass keys at {short} and {long} tokens, keys not used to find the heads"
    figures = [
        Figure("heads at 0.1 or more", len(strong), "", f"of {table.values.numel()}, at {short} tokens"),
        Figure("share of heads at 0.1 or more", round(len(strong) / table.values.numel(), 4), "", "paper: below 5 %"),
        Figure("heads at exactly 0", int((table.values == 0).sum()), "", f"at {short} tokens"),
        Figure("highest score", round(float(scores[0]), 3), "", ", ".join(f"{l}.{h}" for l, h in table._best(5))),
        Figure("tenth highest score", round(float(scores[9]), 3)),
        Figure("heads active in more than 90 % of runs", always, "", "context-independent heads"),
        Figure("runs answered", f"{table.notes['counted']} of {table.notes['runs']}", "", f"at {short} tokens"),
        Figure(
            "runs answered, long",
            f"{tables[long].notes['counted']} of {tables[long].notes['runs']}",
            "",
            f"at {long} tokens",
        ),
        Figure(f"Spearman, {short} to {long} tokens", round(table.spearman(tables[long]), 3), "", "all heads"),
        Figure(f"of the top 10 at {short}, also at {long} tokens", len(table.top(10) & tables[long].top(10))),
        Figure("accuracy, whole model", round(right["base"], 3), "", note),
        Figure("accuracy without the top 5", round(right["top 5"], 3), "", note),
        Figure("accuracy without the top 10", round(right["top 10"], 3), "", note),
        Figure(
            "accuracy without 10 random others",
            round(sum(random10) / len(random10), 3),
            "",
            f"mean of {len(random10)} draws",
        ),
    ]
    record("retrieval-heads", claim=table_claim(), figures=figures, table=rows, seed=0, folder=a.folder,
           command="python benchmarks/real/retrieval_heads.py")  # fmt: skip
    for figure in figures:
        print(figure.name, figure.value, figure.note)


def table_claim() -> str:
    """What the method says it shows."""
    return qkv.method("retrieval-heads").spec.shown


if __name__ == "__main__":
    main()
