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


def passkeys(study: Study) -> None:
    """A hidden number inside the window, and far beyond it."""
    study.passkeys("after fine-tuning")


if __name__ == "__main__":
    main(__doc__, Lizard(), CLAIM, more=(passkeys,))
