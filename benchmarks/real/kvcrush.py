"""KVCrush over H2O on real text: representatives against more important tokens, and against random ones (negative control).

python benchmarks/real/kvcrush.py [--device cuda]
"""

from __future__ import annotations

import functools

import torch
from _eviction import continuation, figures, sizes, with_recall
from _streams import arguments, load

import qkv
from qkv.bench.record import record
from qkv.caches.h2o import H2O
from qkv.caches.kvcrush import KVCrush
from qkv.testing import mutant


def shuffled(self, worth, position, scores, view):
    """Signatures of noise: the representatives are drawn at random."""
    noise = torch.rand(scores.shape, generator=torch.Generator().manual_seed(position.shape[-1])).to(scores)
    return KVCrush._value(self, worth, position, noise, view)


AtRandom = mutant(KVCrush, _value=shuffled)


def main() -> None:
    a = arguments(__doc__)
    model, tokenizer = load(a)
    how, note = sizes(a.quick)
    methods = {
        **{
            f"{name} {budget}": make(budget=budget)
            for budget in ((0.25,) if a.quick else (0.125, 0.25, 0.5))
            for name, make in {
                "kvcrush over h2o": KVCrush,
                "h2o": H2O,
                "h2o, one set per layer": functools.partial(KVCrush, rep_ratio=0.0),
                "kvcrush, a set per head": functools.partial(KVCrush, per="head"),
                "random representatives": AtRandom,
            }.items()
            if budget < 0.5 or "set" not in name
        },
        "kvcrush over snapkv 0.25": KVCrush(host="snapkv", budget=0.25),
        "snapkv 0.25": "snapkv:budget=0.25",
    }
    rows = continuation(model, tokenizer, methods, **how)
    some = [row for row in rows if not row["method"].startswith("random") and "0.5" not in row["method"]]
    with_recall(model, tokenizer, some, methods, a.quick)
    for row in rows:
        for name in some[0]:
            row.setdefault(name, "")
    record("kvcrush", claim=qkv.method("kvcrush").spec.shown, figures=figures(rows, note), table=rows, seed=0, folder=a.folder,
           command="python benchmarks/real/kvcrush.py")  # fmt: skip


if __name__ == "__main__":
    main()
