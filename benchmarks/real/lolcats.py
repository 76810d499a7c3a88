"""LoLCATs on SmolLM2: perplexity after each stage beside the source and the window alone, tuned alike; memory of a long stream.

python benchmarks/real/lolcats.py [--device cuda]
"""

from __future__ import annotations

from _linearised import Study, main

from qkv.convert.lolcats import LoLCATs

CLAIM = (
    "imitation brings a window with linear attention far below the window alone, fine-tuning brings it near the source tuned "
    "alike, and the memory of generation does not grow from 1k to 64k tokens"
)


def verdict(study: Study) -> None:
    """What must hold whatever the numbers."""
    held = {f.value for f in study.figures if f.name.startswith("bytes held after")}
    assert len(held) == 1, held


if __name__ == "__main__":
    main(__doc__, LoLCATs(), CLAIM, more=(verdict,))
