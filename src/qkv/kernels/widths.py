"""How wide tiles are that products read from shared memory.

On Hopper a product reads its operands there by descriptors: an address, and whether rows are swizzled over 32, 64 or 128 bytes,
which follows from their width. Where two tiles of different swizzles come to lie at one address, one after the other, ptxas
(12.8, of Triton 3.6) computes a descriptor from a register that was never written, and the product reads anywhere: wrong results,
or an illegal access (lab log, 2026-11-23). Tiles whose rows have 128 bytes or more, or are equally wide, have one swizzle.
"""

from __future__ import annotations

import torch
import triton

_SWIZZLED = 128  # bytes


def alike(*widths: int, size: int) -> tuple[int, ...]:
    """Widths of tiles that may share an address, none less than given: those of the same swizzle; size: bytes of a number."""
    least = min(_SWIZZLED // size, max(widths))
    return tuple(max(least, width) for width in widths)


def tiled(*widths: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Widths of tiles that hold heads of these widths: powers of two from 16 on, `alike`."""
    return alike(*(max(16, triton.next_power_of_2(width)) for width in widths), size=dtype.itemsize)
