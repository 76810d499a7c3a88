"""PyramidKV on real text: the total of SnapKV, shared out over the layers. Negative control: the pyramid upside down.

python benchmarks/real/pyramidkv.py [--device cuda]
"""

from __future__ import annotations

import dataclasses

from _eviction import continuation, figures, plain, sizes, with_recall
from _streams import arguments, load

import qkv
from qkv.bench.record import record
from qkv.caches.pyramidkv import PyramidKV
from qkv.core.cache import Geometry
from qkv.testing import mutant


def upside_down(self: PyramidKV, tokens: int, geometry: Geometry) -> int:
    """The lowest layer keeps what the highest should."""
    layer = geometry.layers - 1 - geometry.layer
    return PyramidKV.slots_at(self, tokens, dataclasses.replace(geometry, layer=layer))


UpsideDown = mutant(PyramidKV, slots_at=upside_down)


def main() -> None:
    a = arguments(__doc__)
    model, tokenizer = load(a)
    how, note = sizes(a.quick)
    methods = {
        "pyramidkv 0.2": PyramidKV(budget=0.2),
        **plain(),
        "snapkv 0.2": "snapkv:budget=0.2",
        "pyramidkv 0.1": PyramidKV(budget=0.1),
        "snapkv 0.1": "snapkv:budget=0.1",
        "pyramidkv 0.2, upside down": UpsideDown(budget=0.2),
    }
    rows = continuation(model, tokenizer, methods, **how)
    with_recall(model, tokenizer, rows, methods, a.quick)
    record("pyramidkv", claim=qkv.method("pyramidkv").spec.shown, figures=figures(rows, note), table=rows, seed=0,
           folder=a.folder, command="python benchmarks/real/pyramidkv.py")  # fmt: skip


if __name__ == "__main__":
    main()
