"""TransNormerLLM's decays on real text: a byte model with them and without, at the training length and at four times it.

python benchmarks/real/lightning.py [--device cuda]
"""

from __future__ import annotations

import time

import torch
from _recall import Choice, arguments, language

import qkv
from qkv.bench.record import Figure, record


def decoding(device: str, quick: bool) -> list[dict[str, float]]:
    """Milliseconds and state bytes of a decoded token after prefills of growing length."""
    method, rows = qkv.method("lightning:layer=1,layers=4"), []
    for length in (64, 256) if quick else (512, 2048, 8192):
        q, k, v = (torch.randn(1, 4, length, 64, device=device) for _ in range(3))
        _, state = method(q, k, v, return_state=True)
        times = []
        for _ in range(20):
            start = time.perf_counter()
            out, state = method.step(q[:, :, :1], k[:, :, :1], v[:, :, :1], state)
            out.sum().item()
            times.append(time.perf_counter() - start)
        rows.append({"tokens before": length, "ms per token": round(1e3 * sorted(times)[10], 3), "state (bytes)": state.bytes,
                     "bytes of a KV cache": 2 * 4 * k[:, :, :, :].numel()})  # fmt: skip
    return rows


def main() -> None:
    """Train, measure the decoding step, record."""
    a = arguments(__doc__)
    choices = [
        Choice("decays of released models", lambda i, n: f"lightning:layer={i},layers={n}"),
        Choice("decays of the paper's text", lambda i, n: f"lightning:layer={i},layers={n},slopes=paper"),
        Choice("no decay", lambda i, n: f"lightning:layer={i},layers={n},slopes=flat"),
    ]
    table = [language(c, a, steps=500, layers=4) for c in choices]
    by = {row["operator"]: row for row in table}
    note = f"held-out plays, {table[0]['parameters']} parameters, equal steps"
    figures = []
    for at in ("loss (nats/byte)", "loss at 4 x length"):
        figures += [Figure(f"{at}, {name}", row[at], "nats/byte", note) for name, row in by.items()]
    steps = decoding(a.device, a.quick)
    for row in steps:
        figures.append(Figure(f"decoding after {row['tokens before']} tokens", row["ms per token"], "ms/token",
                              f"state {row['state (bytes)']} bytes, a KV cache {row['bytes of a KV cache']}"))  # fmt: skip
    record("lightning", claim="fixed decays lower the loss of a byte model, and the gap holds at four times the length",
           figures=figures, table=table, command="python benchmarks/real/lightning.py", seed=0, folder=a.folder)  # fmt: skip
    for row in [*table, *steps]:
        print(row)


if __name__ == "__main__":
    main()
