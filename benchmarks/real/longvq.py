"""LongVQ: a byte model with codes behind its window, against the window alone and against full attention.

python benchmarks/real/longvq.py [--device cuda]
"""

from __future__ import annotations

from _recall import Choice, arguments, language, window

from qkv.bench.record import Figure, record

BLOCK = 16


def main() -> None:
    """Train with S codes and without, record."""
    a = arguments(__doc__)
    setting = f"longvq:block_size={BLOCK},straight_through=true"
    choices = [Choice(f"{s} codes", setting, learned={"codebook": (4, s, 32)}) for s in (16, 64)]
    choices += [
        Choice("2 codes", setting, learned={"codebook": (4, 2, 32)}),
        Choice(f"window of {2 * BLOCK} tokens alone", window(2 * BLOCK)),
        Choice("softmax attention", "full"),
    ]
    table = [language(c, a, steps=400) for c in choices]
    note = f"held-out plays, {table[0]['parameters']} parameters, blocks of {BLOCK}, equal steps"
    figures = [Figure(f"loss, {row['operator']}", row["loss (nats/byte)"], "nats/byte", note) for row in table]
    record("longvq", claim="codes behind a window lower the loss of the window alone, more codes more", figures=figures,
           table=table, command="python benchmarks/real/longvq.py", seed=0, folder=a.folder)  # fmt: skip
    for row in table:
        print(row)


if __name__ == "__main__":
    main()
