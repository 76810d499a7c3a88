"""ZipVL in a small ViT, without training it further: accuracy and tokens that take part, against the least important ones.

python benchmarks/real/zipvl_tokens.py [--device cuda]
"""

from __future__ import annotations

import copy
import statistics
from typing import Any
from unittest import mock

import torch
from _vision import Choice, Images, arguments, compare, digits, fashion, judged, model
from torch import Tensor

import qkv.ops.zipvl_tokens as method
from qkv.bench.record import Figure, record

TAUS = (0.99, 0.975, 0.95, 0.9, 0.8, 0.6)
choose = method.important


def least(q: Tensor, k: Tensor, **more: Any) -> Tensor:
    """As many tokens, those that draw least."""
    count = choose(q, k, **more).sum(-1, keepdim=True)
    order = method.drawn(q, k, scale=more["scale"], probes=more["probes"])[0].argsort(dim=-1)
    place = torch.arange(q.shape[2], device=q.device)
    return torch.zeros(order.shape, dtype=torch.bool, device=q.device).scatter(1, order, place < count)


def counted(net: Any, data: Images, tau: float, worst: bool) -> tuple[float, list[float]]:
    """Accuracy with the operator in place of softmax, and the share of tokens that take part in each layer."""
    setting = f"zipvl-tokens:tau={tau}"
    layers = len(net.blocks)
    other = model(Choice("", setting), data, parameters=sum(p.numel() for p in net.parameters()), width=net.config.width,
                  heads=net.config.heads, layers=layers, seed=0)  # fmt: skip
    other.load_state_dict(copy.deepcopy(net.state_dict()))
    shares: list[float] = []

    def watched(q: Tensor, k: Tensor, **more: Any) -> Tensor:
        chosen = (least if worst else choose)(q, k, **more)
        shares.append(float(chosen.double().mean()))
        return chosen

    with mock.patch.object(method, "important", watched):
        right, _ = judged(other, data)
    return right, [statistics.mean(shares[i::layers]) for i in range(layers)]


def main() -> None:
    """Train with softmax, exchange, record."""
    a = arguments(__doc__)
    table, figures = [], []
    for data in (digits(a.device), fashion(a.device, 2)):
        nets = compare([Choice("softmax", "full")], data, a, steps=400)["softmax"].models
        if a.quick:
            data = Images(data.name, data.patch, data.train, data.labels, data.held[:64], data.held_labels[:64])
        base = statistics.mean(judged(net, data)[0] for net in nets)
        for tau in TAUS[1::3] if a.quick else TAUS:
            row: dict[str, Any] = {"data": data.name, "tau": tau, "accuracy, softmax": round(base, 4)}
            for label, worst in (("most important", False), ("least important", True)):
                found = [counted(net, data, tau, worst) for net in nets]
                row[f"accuracy, {label}"] = round(statistics.mean(right for right, _ in found), 4)
                layers = [round(statistics.mean(x), 3) for x in zip(*(shares for _, shares in found), strict=True)]
                if not worst:
                    row["share of tokens by layer"] = layers
                    row["share of tokens"] = round(statistics.mean(layers), 3)
            table.append(row)
            print(row, flush=True)
            note = f"{data.name}, {data.tokens} tokens, tau {tau}, {len(nets)} models trained with softmax"
            lost = row["accuracy, softmax"] - row["accuracy, most important"]
            figures.append(Figure(f"accuracy lost, {data.name}, tau {tau}", round(lost, 4), "", note))
            figures.append(
                Figure(f"tokens in attention, {data.name}, tau {tau}", row["share of tokens"], "of all", note)
            )
            lost = row["accuracy, softmax"] - row["accuracy, least important"]
            figures.append(
                Figure(f"accuracy lost by the least important, {data.name}, tau {tau}", round(lost, 4), "", note)
            )
    record("zipvl-tokens", claim="a ViT trained with softmax keeps its accuracy while part of the tokens leaves attention; as "
           "many of the least important ones do not serve", figures=figures, table=table,
           command="python benchmarks/real/zipvl_tokens.py", seed=0, folder=a.folder)  # fmt: skip


if __name__ == "__main__":
    main()
