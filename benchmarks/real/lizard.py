"""Lizard on SmolLM2: perplexity after each stage beside the source and the window alone, tuned alike; memory of a long stream.

python benchmarks/real/lizard.py [--device cuda]
"""

from __future__ import annotations

from _linearised import Study, main

from qkv.convert.lizard import Lizard

CLAIM = (
    "gated linear attention around a window comes nearer to the source than the window alone, tuned alike, at every length, and "
    "the memory of generation does not grow from 1k to 64k tokens"
)


def verdict(study: Study) -> None:
    """A hidden number inside the window and beyond it; the memory must have had one size."""
    study.passkeys("after fine-tuning")
    held = {f.value for f in study.figures if f.name.startswith("bytes held after")}
    assert len(held) == 1, held


if __name__ == "__main__":
    main(__doc__, Lizard(), CLAIM, more=(verdict,))
