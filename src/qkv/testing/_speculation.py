"""What versions of transformers make of speculation, for laws that compare its tokens."""

from __future__ import annotations

from torch import Tensor


def guessed(sequences: Tensor, length: int) -> Tensor:
    """Tokens of speculation ``[B, T]`` as they are to be compared with plain decoding, which gave `length`.

    Versions that do not tell caches of speculation (before 5.14) may add one token too many; of all others everything counts.
    """
    from qkv.hosts.transformers_cache import RECORDS

    return sequences if RECORDS else sequences[:, :length]
