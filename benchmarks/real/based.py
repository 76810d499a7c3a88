"""Based on recall of pairs: accuracy against the feature width and the state, and a window that ends before the answer.

python benchmarks/real/based.py [--device cuda]
"""

from __future__ import annotations

from _recall import Choice, arguments, recall, window

from qkv.bench.record import Figure, record


def main() -> None:
    """Train each choice on 24 pairs in 160 tokens and record the accuracies."""
    a = arguments(__doc__)
    choices = [Choice(f"based, feature width {d}", "based", key_width=d) for d in (4, 8, 16)]
    choices += [
        Choice("based, first order, width 16", "based:order=1", key_width=16),
        Choice("window of 16 tokens", window(16)),
        Choice("softmax attention", "full"),
    ]
    table = [recall(c, a, number=24, length=160) for c in choices]
    by = {row["operator"]: row for row in table}
    note = f"24 pairs, 160 tokens, two layers, {table[0]['parameters']} parameters; chance is 1 in 49"
    figures = [Figure(f"recall, {name}", row["accuracy"], "", note) for name, row in by.items()]
    figures += [
        Figure(f"state, {name}", row["state (bytes)"], "bytes", "both layers, one row")
        for name, row in by.items()
        if row["state (bytes)"]
    ]
    record("based", claim="recall rises with the feature width, and a window shorter than the distance fails", figures=figures,
           table=table, command="python benchmarks/real/based.py", seed=0, folder=a.folder)  # fmt: skip
    for row in table:
        print(row)


if __name__ == "__main__":
    main()
