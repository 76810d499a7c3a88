"""LoLCATs on SmolLM2: perplexity after each stage beside the source and the window alone, tuned alike; memory of a long stream.

python benchmarks/real/lolcats.py [--device cuda]
"""

from __future__ import annotations

from _linearised import main

from qkv.convert.lolcats import LoLCATs

CLAIM = (
    "at the length it was trained on, a window with linear attention is far nearer to the source than the window alone, tuned "
    "alike; beyond it the sums over a past that is never forgotten drift, and only the memory stays as it is, up to 64k tokens"
)


if __name__ == "__main__":
    main(__doc__, LoLCATs(), CLAIM)
