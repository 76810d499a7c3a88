"""LongVQ in a byte model: its operator alone, the whole layer, and the layer with a codebook that never learns.

python benchmarks/real/longvq.py [--device cpu]

Models of equal size, steps and batches (`CausalLM`), nothing tuned. How far keys lie from their codes is measured on the held-out
text: root of the mean squared distance over that of the keys, and the codes that any key took, mean over layers and heads.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from _recall import arguments
from torch import Tensor

from qkv.bench.fitting import fit
from qkv.bench.record import Figure, record
from qkv.bench.texts import held_out, random_windows, text_bytes
from qkv.models.language.causal import CausalConfig, CausalLM
from qkv.ops.longvq import quantise

BLOCK, CODES, HEADS, WIDTH, LAYERS = 16, 64, 4, 64, 2
PARAMETERS, LENGTH, ROWS, STEPS = 160_000, 256, 16, 300
LAYER = f"vq-gated-attention:heads={HEADS},key_width={WIDTH // HEADS},block_size={BLOCK}"
CHOICES = {
    f"window of {2 * BLOCK} tokens alone": f"sliding-window:window={2 * BLOCK},sinks=0",
    "operator alone": f"longvq:block_size={BLOCK}",
    "whole layer": f"{LAYER},codebook_size={CODES}",
    "whole layer, codes frozen at random": f"{LAYER},codebook_size={CODES},frozen=true",
    "whole layer, 2 codes": f"{LAYER},codebook_size=2",
}


@torch.no_grad()
def distances(net: CausalLM, ids: Tensor) -> tuple[float, float] | None:
    """Relative distance between keys and codes, and the share of codes in use; None where there are none."""
    found: list[tuple[Tensor, Tensor]] = []

    def read(mixer: Any, keys: Tensor) -> None:
        codes = mixer.codebook.codes if hasattr(mixer, "codebook") else mixer.learnt["codebook"].raw
        k = keys.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        z, hat = quantise(k, codes)
        used = torch.stack([h.unique().new_tensor(len(h.unique())) for h in z.transpose(0, 1)]) / codes.shape[1]
        found.append(((k - hat).norm() / k.norm(), used.mean()))

    mixers: list[Any] = [b.mixer for b in net.blocks]
    if not any(hasattr(m, "codebook") or "codebook" in m.learnt for m in mixers):
        return None
    hooks = [m.key.register_forward_hook(lambda _, x, out, m=m: read(m, out)) for m in mixers]
    net(ids)
    for hook in hooks:
        hook.remove()
    far, used = (float(torch.stack(x).mean()) for x in zip(*found, strict=True))
    return far, used


def row(name: str, setting: str, a: argparse.Namespace, seed: int = 0) -> dict[str, Any]:
    """Train one model, return what is said of it."""
    rows, length, steps = (4, 64, 4) if a.quick else (ROWS, LENGTH, STEPS)
    config = CausalConfig(operators=(setting,) * LAYERS, width=WIDTH, heads=HEADS).fitted(PARAMETERS)
    net = CausalLM(config, seed).to(a.device).train()
    data, held = text_bytes(a.device)
    rng = torch.Generator(a.device).manual_seed(seed)
    fit(net, net.loss, lambda i: random_windows(data, rows, length, rng), steps)
    net.eval()
    few = (4, 1) if a.quick else (128, 32)
    near, far = (
        held_out(lambda x: net(x).logits, held, n * length, count, 16) for n, count in zip((1, 4), few, strict=True)
    )
    seen = distances(net, held[: 8 * length].view(8, length))
    out = {"model": name, "loss (nats/byte)": round(near, 4), "loss at 4 x length": round(far, 4),
           "distance of keys": "" if seen is None else round(seen[0], 3),
           "codes in use": "" if seen is None else round(seen[1], 3),
           "parameters": sum(p.numel() for p in net.parameters())}  # fmt: skip
    print(out, flush=True)
    return out


def main() -> None:
    """Train all of them, record."""
    a = arguments(__doc__)
    torch.manual_seed(0)
    table = [row(name, setting, a) for name, setting in CHOICES.items()]
    note = (
        f"held-out plays, {LAYERS} layers {WIDTH} wide, about {PARAMETERS} parameters, {STEPS} steps of {ROWS} x {LENGTH} "
        f"bytes, blocks of {BLOCK}, {CODES} codes a head unless said"
    )
    figures = [Figure(f"loss, {r['model']}", r["loss (nats/byte)"], "nats/byte", note) for r in table]
    figures += [
        Figure(f"distance between keys and codes, {r['model']}", r["distance of keys"], "", "share of the keys' length")
        for r in table
        if r["distance of keys"] != ""
    ]
    record("longvq", claim="the whole layer reaches a lower loss than its operator alone, with keys near their codes; a codebook "
           "that never learns stays away from the keys", figures=figures, table=table,
           command="python benchmarks/real/longvq.py", seed=0, folder=a.folder)  # fmt: skip


if __name__ == "__main__":
    main()
