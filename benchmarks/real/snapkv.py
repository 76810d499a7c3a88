"""SnapKV on real text and on pass keys: whether the question is in the prompt decides. Negative control: what the
last queries look at least.

python benchmarks/real/snapkv.py [--device cuda]
"""

from __future__ import annotations

from _eviction import continuation, figures, plain, sizes, with_recall
from _streams import arguments, load

import qkv
from qkv.bench.record import record
from qkv.caches._common import recent
from qkv.caches.snapkv import SnapKV
from qkv.testing import mutant

LeastAttended = mutant(
    SnapKV,
    rank=lambda self, state, view: (-self.score(view)).masked_fill(recent(view, self.window), float("inf")),
)


def main() -> None:
    a = arguments(__doc__)
    model, tokenizer = load(a)
    how, note = sizes(a.quick)
    methods = {
        "snapkv 0.2": SnapKV(budget=0.2),
        **plain(),
        "snapkv 0.2, evicting every step": SnapKV(budget=0.2, decode="evict"),
        "snapkv 0.2, no pooling": SnapKV(budget=0.2, kernel=1),
        "snapkv 0.2, least attended": LeastAttended(budget=0.2),
    }
    rows = continuation(model, tokenizer, methods, **how)
    with_recall(model, tokenizer, rows, methods, a.quick)
    record("snapkv", claim=qkv.method("snapkv").spec.shown, figures=figures(rows, note), table=rows, seed=0, folder=a.folder,
           command="python benchmarks/real/snapkv.py")  # fmt: skip


if __name__ == "__main__":
    main()
