"""NaLaFormer on real images: whether longer queries attend more sharply, and what that is worth against ReLU linear attention.

python benchmarks/real/nalaformer.py [--device cuda]

Queries and keys are those of trained models. How sharp a row is must follow from the norm of its query: once with the norms as
they are, once with norms drawn anew between 0.05 and 4 (directions kept), which no other cause can explain.
"""

from __future__ import annotations

import torch
from _vision import Choice, arguments, captured, compare, digits, entropy, fashion, spearman
from torch import Tensor

import qkv
from qkv.bench.record import Figure, record

PLAIN = f"nalaformer:power_scale={2.0**-40},power_shift={2.0**40},key_power=1"  # the exponent is 1 whatever the norm
RELU = "l2vit:den_floor=1e-6"


def rows(q: Tensor, k: Tensor, method: str) -> Tensor:
    """The weights ``[B, H, N, N]`` of an operator without positions."""
    eye = torch.eye(k.shape[2], device=k.device).expand(*k.shape[:2], -1, -1)
    weights = qkv.attention(q.float(), k.float(), eye, method=method, causal=False)
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-9)


def sharpness(q: Tensor, k: Tensor, method: str) -> tuple[float, float]:
    """Rank correlation of norm and entropy, mean over heads: as found, and with norms drawn anew."""
    norms = q.norm(dim=-1, keepdim=True)
    drawn = 0.05 + 3.95 * torch.rand(norms.shape, generator=torch.Generator().manual_seed(0)).to(q)
    found = []
    for size, queries in ((norms, q), (drawn, q / norms.clamp(min=1e-9) * drawn)):
        spread = entropy(rows(queries, k, method))
        by_head = [spearman(size[:, h], spread[:, h]) for h in range(q.shape[1])]
        found.append(sum(by_head) / len(by_head))
    return found[0], found[1]


def main() -> None:
    """Train, measure, record."""
    a = arguments(__doc__)
    choices = [
        Choice("softmax", "full"),
        Choice("NaLaFormer", "nalaformer"),
        Choice("signs apart, exponent 1", PLAIN),
        Choice("ReLU linear", RELU),
    ]
    results = {d.name: (d, compare(choices, d, a, steps=300)) for d in (digits(a.device), fashion(a.device))}
    table = [r.row for _, found in results.values() for r in found.values()]
    figures = []
    for name, (data, found) in results.items():
        note = f"{data.tokens} tokens, 3 seeds, equal parameters and steps"
        figures += [Figure(f"accuracy, {name}, {n}", r.row["accuracy"], "", note) for n, r in found.items()]
    data, found = results["fashion"]
    asked = [
        ("softmax", "full"),
        ("NaLaFormer", "nalaformer"),
        ("signs apart, exponent 1", PLAIN),
        ("ReLU linear", RELU),
    ]
    for name, method in asked:
        pairs = [sharpness(q, k, method) for net in found[name].models for q, k, *_ in captured(net, data.held[:64])]
        as_found, drawn = (sum(x) / len(x) for x in zip(*pairs, strict=True))
        note = "Spearman of the query's norm and its row's entropy, heads of its own trained models"
        figures.append(Figure(f"norm and entropy, {name}", round(as_found, 3), "", note))
        figures.append(Figure(f"norm and entropy, {name}, norms drawn anew", round(drawn, 3), "", note))
    claim = "longer queries attend more sharply, as in softmax; more accurate than ReLU linear attention"
    record("nalaformer", claim=claim, figures=figures, table=table, command="python benchmarks/real/nalaformer.py", seed=0,
           folder=a.folder)  # fmt: skip
    for figure in figures:
        print(figure.name, figure.value)


if __name__ == "__main__":
    main()
