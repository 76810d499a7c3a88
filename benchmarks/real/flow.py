"""Flow attention on real text: a byte model with the conservation of flows and without, and how uneven its sources weigh.

python benchmarks/real/flow.py [--device cuda]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from _recall import Choice, arguments, language

from qkv.bench.assets import long_text
from qkv.bench.record import Figure, record
from qkv.ops.flow import initial, step


def unevenness(device: str) -> float:
    """Coefficient of variation of the weights c_j that sources get, for keys made from real bytes by a random map."""
    torch.manual_seed(0)
    ids = torch.frombuffer(bytearray(long_text()[:64].encode()[:64]), dtype=torch.uint8).long()
    x = torch.randn(256, 64)[ids] + torch.randn(256, 64)[ids.roll(1)]
    q, k = ((x @ torch.randn(64, 16) / 8)[None, None].to(device) for _ in range(2))
    one = torch.ones(1, 1, 64, 1, device=device)
    state, weights = initial(q, k, one), []
    for t in range(64):
        before = state["kv"]
        now = slice(t, t + 1)
        _, state = step(q[:, :, now], k[:, :, now], one[:, :, now], state)
        weights.append(((state["kv"] - before).sum() / k[:, :, t].sigmoid().sum()).item())
    c = torch.tensor(weights)
    return (c.std() / c.mean()).item()


def main() -> None:
    """Train three byte models and record."""
    a = arguments(__doc__)
    choices = [
        Choice("flow", "flow"),
        Choice("flow without competition and allocation", "flow:conserve=false"),
        Choice("linear, elu + 1", "linear", features=lambda x: F.elu(x) + 1),
    ]
    table = [language(c, a) for c in choices]
    by = {row["operator"]: row for row in table}
    note = f"held-out plays, {table[0]['parameters']} parameters, equal steps"
    figures = [Figure(f"loss, {name}", row["loss (nats/byte)"], "nats/byte", note) for name, row in by.items()]
    figures.append(Figure("variation of the source weights", round(unevenness(a.device), 4), "",
                          "standard deviation over mean, 64 bytes; 0 for plain linear attention"))  # fmt: skip
    record("flow", claim="conserving the flows lowers the loss of linear attention with the same features", figures=figures,
           table=table, command="python benchmarks/real/flow.py", seed=0, folder=a.folder)  # fmt: skip
    for row in table:
        print(row)


if __name__ == "__main__":
    main()
