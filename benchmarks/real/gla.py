"""Gates on real text: a byte model with a gate per channel, per head, with a constant decay and without, same parameters.

python benchmarks/real/gla.py [--device cuda]
"""

from __future__ import annotations

from _recall import Choice, arguments, language

from qkv.bench.record import Figure, record


def main() -> None:
    """Train, record."""
    a = arguments(__doc__)
    choices = [
        Choice("a gate per channel", "gla", gates={"log_decay": "bhnd"}),
        Choice("a gate per head", "gla", gates={"log_decay": "bhn"}),
        Choice("a constant decay per head", lambda i, n: f"lightning:layer={i},layers={n}"),
        Choice("no decay", "linear"),
    ]
    table = [language(c, a, steps=160, rows=16) for c in choices]
    note = f"held-out plays, {table[0]['parameters']} parameters, 160 steps of 16 x 256 bytes"
    figures = [
        Figure(f"{at}, {row['operator']}", row[at], "nats/byte", note)
        for at in ("loss (nats/byte)", "loss at 4 x length")
        for row in table
    ]
    record("gla", claim="learned gates lower the loss of a byte model at equal parameters", figures=figures, table=table,
           command="python benchmarks/real/gla.py", seed=0, folder=a.folder)  # fmt: skip
    for row in table:
        print(row)


if __name__ == "__main__":
    main()
