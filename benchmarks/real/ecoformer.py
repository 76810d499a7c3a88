"""EcoFormer on real images: whether fitted codes find the nearest tokens, and what codes in the place of softmax cost.

python benchmarks/real/ecoformer.py [--device cuda]

Neighbours: queries of all layers of a trained softmax model; hash functions random, fitted at the published rate (which hardly
moves them in its 100 steps a bit) and at ten thousand times that; judged on held-out images: of the ten tokens whose codes are
nearest to a query's, how many are among its ten nearest.

Classifiers: softmax with shared queries and keys, then its weights with codes in all layers but the last, fine-tuned, hash
functions fitted at the start of every round or left at random; softmax, too, is trained that much longer. Fits there use the
larger rate and the same tokens as anchors, and go on from the round before.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
import torch.nn.functional as F
from _vision import Choice, Images, arguments, captured, compare, digits, fashion, fit, judged, model
from torch import Tensor

from qkv.bench.record import Figure, record
from qkv.ops.ecoformer import Hash, energy, fit_hash, hash_codes, operations, softmax_operations

PUBLISHED, LARGE = 5e-4, 5.0
SHAPE = {"parameters": 120_000, "width": 64, "heads": 4, "layers": 3}


def shared(net: Any) -> None:
    """Queries and keys of every layer are one projection."""
    for block in net.blocks:
        block.mixer.key = block.mixer.query


def nearest(scores: Tensor, count: int) -> Tensor:
    """The `count` largest of each row but the token itself, ``[..., N, count]``."""
    own = torch.eye(scores.shape[-1], dtype=torch.bool, device=scores.device)
    return scores.masked_fill(own, -torch.inf).topk(count).indices


def precision(x: Tensor, h: Hash, count: int = 10) -> float:
    """Share of the tokens nearest by code that are among those nearest by score."""
    u, c = F.normalize(x, dim=-1), hash_codes(x, *h)
    found, true = nearest(c @ c.mT, count), nearest(u @ u.mT, count)
    return (found.unsqueeze(-1) == true.unsqueeze(-2)).any(-1).float().mean().item()


def queries(net: Any, images: Tensor) -> Tensor:
    """Queries of all layers as more heads, ``[B, layers H, N, D]``."""
    return torch.cat([q for q, *_ in captured(net, images)], 1)


def neighbours(net: Any, data: Images, bits: int, quick: bool) -> dict[str, float]:
    """`precision` on held-out images of random and of fitted hash functions."""
    x, batch, out = queries(net, data.held[:64]), queries(net, data.train[:32]), {}
    steps = 2 if quick else 100
    for name, rate in (("random", 0.0), ("fitted as published", PUBLISHED), (f"fitted at a rate of {LARGE:g}", LARGE)):
        found = []
        for seed in range(3):
            rng = torch.Generator().manual_seed(seed)  # the loss is a mean over the heads of one layer
            h = fit_hash(batch, bits=bits, steps=steps if rate else 0, rate=len(net.blocks) * rate, generator=rng)
            found.append(precision(x, h))
        out[name] = statistics.mean(found)
    return out


def install(net: Any, data: Images, round_: int, fitted: bool, steps: int) -> None:
    """Hash functions for all layers with codes, from the queries of a batch: fitted, or random on the same anchors."""
    kept = [b.mixer for b in net.blocks if "planes" in b.mixer.learnt]
    batch = data.train[:32]
    x = torch.cat([q for q, _, _, extras in captured(net, batch) if extras], 1)
    start = torch.cat([m.learnt["planes"].raw for m in kept]) if round_ else None
    rng = torch.Generator().manual_seed(0)
    h = fit_hash(x, steps=steps if fitted else 0, rate=len(kept) * LARGE, start=start, generator=rng)
    for name, parts in zip(Hash._fields, (t.split(len(h.mean) // len(kept)) for t in h), strict=True):
        for mixer, part in zip(kept, parts, strict=True):
            mixer.learnt[name].raw.copy_(part)


def classifiers(data: Images, a: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows for shared softmax and for codes that take its weights."""
    rounds, steps = (2, 2) if a.quick else (5, 40)
    base = compare([Choice("softmax, shared", "full", prepare=shared)], data, a, steps=300)["softmax, shared"]
    mixed, plain = ("ecoformer:tied=true", "ecoformer:tied=true", "full"), ("full", "full", "full")
    ways = (("softmax, longer", plain, False), ("codes, fitted", mixed, True), ("codes, random", mixed, False))
    rows = [base.row]
    for name, method, fitted in ways:
        found = []
        for seed, teacher in enumerate(base.models):
            net = model(Choice(name, method, prepare=shared), data, seed=seed, **SHAPE)
            net.load_state_dict(teacher.state_dict(), strict=False)
            for i in range(rounds):
                if method is mixed:
                    install(net, data, i, fitted, 2 if a.quick else 100)
                fit(net, data, steps=steps, rows=8 if a.quick else 128, rate=5e-4, seed=10 * seed + i, name=name)
            found.append(judged(net, data))
        right, loss = zip(*found, strict=True)
        row = base.row | {"operator": name, "accuracy": round(statistics.mean(right), 4)}
        row |= {"deviation over seeds": round(statistics.stdev(right), 4) if len(right) > 1 else 0.0}
        row |= {"loss (nats/image)": round(statistics.mean(loss), 4), "ms per step": None}
        rows.append(row)
        print(" ", row, flush=True)
    return rows


def main() -> None:
    """Train, fit, record."""
    a = arguments(__doc__)
    table, figures = [], []
    for data in (digits(a.device), fashion(a.device)):
        rows = classifiers(data, a)
        table += rows
        note = f"{data.tokens} tokens, 16 bits, 3 seeds; softmax in the last layer of each"
        figures += [Figure(f"accuracy, {data.name}, {r['operator']}", r["accuracy"], "", note) for r in rows]
    data = fashion(a.device)
    net = compare([Choice("softmax, for its queries", "full")], data, a, steps=300, seeds=1)[
        "softmax, for its queries"
    ].models[0]
    for bits in (8, 16, 32):
        note = f"of {data.tokens} tokens, held-out images, mean over heads, layers and 3 draws; 25 anchors"
        for way, share in neighbours(net, data, bits, a.quick).items():
            figures.append(Figure(f"precision at 10, {bits} bits, {way}", round(share, 4), "", note))
    ours, softmax = (energy(f(3136, 32, 32)) for f in (operations, softmax_operations))
    figures.append(Figure("energy of softmax over codes", round(softmax / ours, 2), "", "a head of 32 at 3136 tokens, counted"
                          " float32 additions and multiplications at 45 nm, no data movement"))  # fmt: skip
    record("ecoformer", claim="fitted codes find more of the nearest tokens than random ones, and cost little accuracy",
           figures=figures, table=table, command="python benchmarks/real/ecoformer.py", seed=0, folder=a.folder)  # fmt: skip
    for figure in figures:
        print(figure.name, figure.value)


if __name__ == "__main__":
    main()
