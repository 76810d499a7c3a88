"""Gates on real text: a byte model with a gate per channel, per head, with a constant decay and without, same parameters.

python benchmarks/real/gla.py [--device cuda]
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from _recall import Choice, arguments, language
from _streams import clock

from qkv.bench.record import Figure, record

STEPS, ROWS, SEEDS = 400, 32, 3
CHOICES = (
    Choice("a gate per channel", "gla", gates={"log_decay": "bhnd"}),
    Choice("a gate per head", "gla", gates={"log_decay": "bhn"}),
    Choice(
        "a constant decay per head",
        lambda i, n: f"lightning:layer={i},layers={n},use_lrpe=false,activation=identity",
    ),
    Choice("a constant decay with positions and a feature map", lambda i, n: f"lightning:layer={i},layers={n}"),
    Choice("no decay", "linear"),
)
LOSSES = ("loss (nats/byte)", "loss at 4 x length")


def main() -> None:
    """Train every choice from every seed, record."""
    a = arguments(__doc__)
    seeds = range(1 if a.quick else SEEDS)
    t0 = time.perf_counter()
    table = []
    for seed in seeds:
        for choice in CHOICES:
            table.append({"seed": seed} | language(choice, a, steps=STEPS, rows=ROWS, seed=seed))
            clock(str(table[-1]), t0)
    record("gla", claim="learned gates lower the loss of a byte model at equal parameters", table=table, seed=0,
           figures=figures(table), command="python benchmarks/real/gla.py --device cuda", folder=a.folder)  # fmt: skip


def figures(table: list[dict[str, Any]]) -> list[Figure]:
    """Means and ranges over the seeds, and how far each choice is from a gate per channel seed by seed."""
    out = []
    first = CHOICES[0].name
    for at in LOSSES:
        for choice in CHOICES:
            mine, best = ([r[at] for r in table if r["operator"] == name] for name in (choice.name, first))
            note = f"held-out plays, {table[0]['parameters']} parameters, {STEPS} steps of {ROWS} x 256 bytes, "
            note += (
                f"mean of {len(mine)} seeds, from {min(mine):.4f} to {max(mine):.4f}" if len(mine) > 1 else "one seed"
            )
            if choice.name != first:
                apart = ", ".join(f"{x - y:+.4f}" for x, y in zip(mine, best, strict=True))
                note += f"; minus {first}, seed by seed: {apart}"
            out.append(Figure(f"{at}, {choice.name}", round(statistics.mean(mine), 4), "nats/byte", note))
    return out


if __name__ == "__main__":
    main()
