"""LightNet on real text: a byte model between plain linear attention and gated linear attention; what came before matters early.

python benchmarks/real/lightnet.py [--device cuda]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from _recall import Choice, arguments, language

import qkv
from qkv.bench.record import Figure, record


def start_gap(device: str) -> tuple[float, float]:
    """Relative difference the virtual zero logit makes in the first 4 and the last 4 of 512 outputs."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(4, 4, 512, 32, device=device) for _ in range(3))
    empty, zero = (qkv.attention(F.silu(q), k, v, method=f"lightnet:z_init={z}") for z in ("empty", "zero"))
    gap = [((empty - zero)[:, :, s].norm() / empty[:, :, s].norm()).item() for s in (slice(4), slice(-4, None))]
    return gap[0], gap[1]


def main() -> None:
    """Train three byte models, compare the two starts, record."""
    a = arguments(__doc__)
    choices = [
        Choice("linear", "linear", features=F.silu),
        Choice("lightnet", "lightnet", query_features=F.silu),
        Choice("gla", "gla", gates={"log_decay": "bhnd"}),
    ]
    table = [language(c, a) for c in choices]
    by = {row["operator"]: row for row in table}
    note = f"held-out plays, {table[0]['parameters']} parameters, equal steps"
    figures = [Figure(f"loss, {name}", row["loss (nats/byte)"], "nats/byte", note) for name, row in by.items()]
    early, late = start_gap(a.device)
    figures += [
        Figure("difference of the two starts, first 4 tokens", round(early, 4), "", "relative, random inputs"),
        Figure("difference of the two starts, last 4 of 512", round(late, 4), "", "relative, random inputs"),
    ]
    record("lightnet", claim="the loss lies between plain and gated linear attention; the two starts differ early and converge",
           figures=figures, table=table, command="python benchmarks/real/lightnet.py", seed=0, folder=a.folder)  # fmt: skip
    for row in table:
        print(row)
    print("starts differ by", early, "early and", late, "late")


if __name__ == "__main__":
    main()
