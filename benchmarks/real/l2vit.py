"""L2ViT on real images: its linear attention with and without local concentration, and what the floor of its denominator does.

python benchmarks/real/l2vit.py [--device cuda]

How local a layer is: share of the gradient of a token's output (what operator and local module add to the stream) that goes to
tokens at most two steps away, and the entropy of those shares, mean over layers, images and tokens.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from _vision import Choice, Images, arguments, compare, digits, entropy, fashion
from torch import Tensor

import qkv
from qkv.bench.record import Figure, record
from qkv.ops._common.grids import LocalConcentration


def mixed(block: Any, x: Tensor) -> Tensor:
    """What a block's operator and local module add to the stream ``[B, N, W]``."""
    if not hasattr(block, "local"):
        return block.mixer(block.before(x))[0]
    inner = block.block
    y = x + inner.mixer(inner.before(x))[0]
    return y + block.local(block.norm(y), block.grid) - x


def locality(net: Any, data: Images, count: int = 16) -> tuple[float, float]:
    """Share of the gradient within two steps, and nats of its spread, over the layers of a model."""
    net.eval()
    h, w = net.config.grid
    place = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), -1).flatten(0, 1)
    near = (place[:, None] - place[None]).abs().amax(-1).le(2).to(data.held.device)  # [N, N]
    streams: list[Tensor] = []
    hooks = [b.register_forward_pre_hook(lambda m, args: streams.append(args[0].detach())) for b in net.blocks]
    with torch.no_grad():
        net(data.held[:count])
    for hook in hooks:
        hook.remove()
    rng, shares, spreads = torch.Generator().manual_seed(0), [], []
    for block, stream in zip(net.blocks, streams, strict=True):
        for token in range(0, h * w, 7):
            x = stream.clone().requires_grad_()
            out = mixed(block, x)[:, token]
            way = torch.randn(out.shape, generator=rng).to(out)
            reach = torch.autograd.grad((out * way).sum(), x)[0].norm(dim=-1)  # [B, N]
            reach = reach / reach.sum(-1, keepdim=True).clamp(min=1e-12)
            shares.append((reach * near[token]).sum(-1).mean().item())
            spreads.append(entropy(reach).mean().item())
    return sum(shares) / len(shares), sum(spreads) / len(spreads)


def seconds(side: int, method: str, device: str, repeats: int) -> float:
    """Median seconds of one call on side x side tokens, 3 heads of 32."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 3, side * side, 32, device=device) for _ in range(3))
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        qkv.attention(q, k, v, method=method, causal=False)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]


def main() -> None:
    """Train, measure, record."""
    a = arguments(__doc__)
    choices = [
        Choice("softmax", "full"),
        Choice("linear", "l2vit"),
        Choice("linear, floor 1", "l2vit:den_floor=1.0"),
        Choice("linear + local concentration", "l2vit", local=partial(LocalConcentration, kernel=7)),
    ]
    results = {d.name: (d, compare(choices, d, a, steps=300)) for d in (digits(a.device), fashion(a.device))}
    table, figures = [r.row for _, found in results.values() for r in found.values()], []
    for name, (data, found) in results.items():
        note = f"{data.tokens} tokens, 3 seeds, equal parameters and steps"
        figures += [Figure(f"accuracy, {name}, {n}", r.row["accuracy"], "", note) for n, r in found.items()]
    data, found = results["fashion"]
    for name in ("softmax", "linear", "linear + local concentration"):
        near, spread = locality(found[name].models[0], data, 4 if a.quick else 16)
        note = "of the gradient of a token's output, fashion, mean over layers"
        figures.append(Figure(f"share within two steps, {name}", round(near, 3), "", note))
        figures.append(Figure(f"entropy, {name}", round(spread, 3), "nats", note))
    sides = (14, 28) if a.quick else (56, 112)
    for method in ("l2vit", "full"):
        few, many = (seconds(side, method, a.device, 3 if a.quick else 9) for side in sides)
        note = f"{sides[1]}^2 tokens over {sides[0]}^2, 4 times as many; {1e3 * many:.3g} ms for the larger"
        figures.append(Figure(f"time grows by, {method}", round(many / few, 2), "", note))
    record("l2vit", claim="local concentration makes ReLU linear attention more accurate and more local", figures=figures,
           table=table, command="python benchmarks/real/l2vit.py", seed=0, folder=a.folder)  # fmt: skip
    for figure in figures:
        print(figure.name, figure.value)


if __name__ == "__main__":
    main()
