"""Agent attention on real images: how near it comes to softmax without training as agents are added, and trained in its place.

python benchmarks/real/agent.py [--device cuda]

Without training: a vision transformer is trained with softmax on 196 tokens a picture; its own queries, keys and values then go
through agents averaged over the grid, and whole layers, the last one or all, are computed by them. With as many agents as tokens
the agents are the queries: two softmaxes still follow one another, so even then it is not softmax attention.
"""

from __future__ import annotations

import copy
import dataclasses

import torch
import torch.nn.functional as F
from _vision import Choice, arguments, captured, compare, digits, fashion, judged

import qkv
from qkv.bench.record import Figure, record
from qkv.layers._mixer import Whole
from qkv.ops._common.grids import Depthwise

AGENTS = (1, 4, 9, 16, 49, 196)


@torch.no_grad()
def nearness(net, data, agents: int, power: float, images: int) -> float:
    """Cosine similarity of the outputs of agents and of softmax, mean over tokens, heads and layers."""
    method = qkv.method("agent", num_agents=agents, grid=net.config.grid, second_power=power)
    found = []
    for q, k, v, *_ in captured(net, data.held[:images]):
        exact = qkv.attention(q, k, v, method="full", causal=False)
        found.append(F.cosine_similarity(method(q, k, v, causal=False), exact, dim=-1).mean().item())
    return sum(found) / len(found)


def exchanged(net, layers: list[int], agents: int):
    """A copy of the model whose layers are computed by agents."""
    net = copy.deepcopy(net)
    for i in layers:
        net.blocks[i].mixer.memory = Whole(qkv.method("agent", num_agents=agents, grid=net.config.grid))
    return net


def main() -> None:
    """Train, exchange, compare, record."""
    a = arguments(__doc__)
    fine = fashion(a.device, patch=2)
    base = compare([Choice("softmax", "full")], fine, a, steps=400, rows=128, seeds=1)["softmax"].models[0]
    depth, images = len(base.blocks), 16 if a.quick else 128
    held = 32 if a.quick else 2000
    few = dataclasses.replace(fine, held=fine.held[:held], held_labels=fine.held_labels[:held])
    before = judged(base, few)[0]
    sweep = []
    for n in AGENTS:
        sweep.append({
            "agents": n, "cosine": round(nearness(base, fine, n, 1.0, images), 4),
            "cosine, power 0.3": round(nearness(base, fine, n, 0.3, images), 4),
            "accuracy, last layer": round(judged(exchanged(base, [depth - 1], n), few)[0], 4),
            "accuracy, all layers": round(judged(exchanged(base, list(range(depth)), n), few)[0], 4),
        })  # fmt: skip
        print(sweep[-1], flush=True)
    note = f"196 tokens, no training; softmax itself has an accuracy of {before:.4f}"
    figures = [Figure(f"cosine to softmax, {row['agents']} agents", row["cosine"], "", note) for row in sweep]
    figures += [Figure(f"accuracy, last layer by {row['agents']} agents", row["accuracy, last layer"], "", note)
                for row in sweep]  # fmt: skip
    choices = [
        Choice("softmax", "full"),
        Choice("agents", "agent"),
        Choice("agents, with the convolution", "agent", local=Depthwise),
        Choice("softmax, with the convolution", "full", local=Depthwise),
        Choice("one agent", qkv.method("agent", num_agents=1)),
    ]
    for data in (digits(a.device), fashion(a.device)):
        said = f"trained: {data.tokens} tokens, 3 seeds, equal parameters and steps"
        for name, result in compare(choices, data, a, steps=250).items():
            figures.append(Figure(f"accuracy, {data.name}, {name}", result.row["accuracy"], "", said))
    claim = (
        "more agents come nearer to softmax without training; trained in its place, within two points of its accuracy"
    )
    record("agent", claim=claim, figures=figures, table=sweep, command="python benchmarks/real/agent.py", seed=0,
           folder=a.folder)  # fmt: skip
    for figure in figures:
        print(figure.name, figure.value)


if __name__ == "__main__":
    main()
