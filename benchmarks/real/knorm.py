"""Key norms on real text: short keys against long ones (negative control), with and without a recent window.

python benchmarks/real/knorm.py [--device cuda]
"""

from __future__ import annotations

from _eviction import continuation, figures, plain, sizes, with_recall
from _streams import arguments, load

import qkv
from qkv.bench.record import record
from qkv.caches.knorm import KNorm
from qkv.testing import mutant

Longest = mutant(KNorm, rank=lambda self, state, view: -KNorm.rank(self, state, view))


def main() -> None:
    a = arguments(__doc__)
    model, tokenizer = load(a)
    how, note = sizes(a.quick)
    methods = {
        "knorm 0.2": KNorm(budget=0.2),
        **plain(),
        "knorm 0.2, decoded tokens stay": KNorm(budget=0.2, decode="grow"),
        "knorm 0.2, 64 recent": KNorm(budget=0.2, recent=64),
        "knorm 0.2, longest keys": Longest(budget=0.2),
    }
    rows = continuation(model, tokenizer, methods, **how)
    with_recall(model, tokenizer, rows, methods, a.quick)
    record("knorm", claim=qkv.method("knorm").spec.shown, figures=figures(rows, note), table=rows, seed=0, folder=a.folder,
           command="python benchmarks/real/knorm.py")  # fmt: skip


if __name__ == "__main__":
    main()
