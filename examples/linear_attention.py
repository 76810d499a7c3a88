"""An operator as a function: gated linear attention over a whole sequence, and the same one token at a time.

python examples/linear_attention.py
"""

from __future__ import annotations

import torch

import qkv


def main() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 100, 16) for _ in range(3))  # [B, H, N, D]
    log_decay = -torch.rand(2, 4, 100, 16) / 8
    whole, state = qkv.attention(q, k, v, method="gla", log_decay=log_decay, return_state=True)

    half, state = qkv.attention(
        q[:, :, :50], k[:, :, :50], v[:, :, :50], method="gla", log_decay=log_decay[:, :, :50], return_state=True
    )
    parts = [half]
    for t in range(50, 100):
        at = slice(t, t + 1)
        out, state = qkv.attention(
            q[:, :, at], k[:, :, at], v[:, :, at], method="gla", log_decay=log_decay[:, :, at], initial_state=state,
            return_state=True,
        )  # fmt: skip
        parts.append(out)
    print("largest difference:", float((torch.cat(parts, 2) - whole).abs().max()))
    print("bytes of the state after 100 tokens:", state.bytes)


if __name__ == "__main__":
    main()
