"""TOVA on real text: one query decides, without a window of its own. Negative control: what it looks at most goes.

python benchmarks/real/tova.py [--device cuda]
"""

from __future__ import annotations

from _eviction import continuation, figures, plain, sizes, with_recall
from _streams import arguments, load

import qkv
from qkv.bench.record import record
from qkv.caches.tova import TOVA
from qkv.testing import mutant

MostAttended = mutant(TOVA, rank=lambda self, state, view: -TOVA.rank(self, state, view))


def main() -> None:
    a = arguments(__doc__)
    model, tokenizer = load(a)
    how, note = sizes(a.quick)
    methods = {
        "tova 0.2": TOVA(budget=0.2),
        **plain(),
        "tova 0.2, a set per head": TOVA(budget=0.2, per="head"),
        "tova 0.2, most attended go": MostAttended(budget=0.2),
    }
    rows = continuation(model, tokenizer, methods, **how)
    with_recall(model, tokenizer, rows, methods, a.quick)
    record("tova", claim=qkv.method("tova").spec.shown, figures=figures(rows, note), table=rows, seed=0, folder=a.folder,
           command="python benchmarks/real/tova.py")  # fmt: skip


if __name__ == "__main__":
    main()
