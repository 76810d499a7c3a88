"""Train a byte model with two linear layers and one softmax layer for a moment, save it, and go on from its state.

python examples/small_hybrid.py
"""

from __future__ import annotations

import tempfile

import torch

from qkv.bench.fitting import fit
from qkv.bench.texts import held_out, random_windows
from qkv.models.language.causal import CausalConfig, CausalLM

TEXT = " ".join(f"In the year {1000 + i} a ship came home with {i % 7 + 2} men." for i in range(400)).encode()


def main() -> None:
    data = torch.frombuffer(bytearray(TEXT), dtype=torch.uint8).long()
    model = CausalLM(CausalConfig(operators=("gla", "gla", "full"), width=32, heads=2))
    draw = torch.Generator().manual_seed(0)
    before = held_out(lambda ids: model(ids).logits, data, 64, 8)
    fit(model, model.loss, lambda _: random_windows(data, 8, 64, draw), steps=20)
    print(f"{before:.2f} -> {held_out(lambda ids: model(ids).logits, data, 64, 8):.2f} nats a byte")

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        model = CausalLM.from_pretrained(folder)
    with torch.no_grad():
        whole = model(data[None, :40]).logits
        first = model(data[None, :30], keep=True)
        rest = model(data[None, 30:40], state=first.state)
    print("state handed over, largest difference:", float((rest.logits - whole[:, 30:]).abs().max()))


if __name__ == "__main__":
    main()
