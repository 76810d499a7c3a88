"""Miras: recall of stored vectors when a tenth of the values is corrupted, and byte models with the presets.

python benchmarks/real/miras.py [--device cuda]
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from _recall import Choice, arguments, language
from _streams import tokens
from torch import Tensor

from qkv.bench.assets import smollm2
from qkv.bench.record import Figure, record
from qkv.core.registry import method

MEMORIES = {
    "huber (Yaad)": "miras:loss=huber,chunk_size=1",
    "squared": "miras:loss=l2,half=true,chunk_size=1",
    "product": "miras:loss=dot,chunk_size=1",
    "p-norm and q-norm (Moneta)": "miras:loss=lp,retention=norm,chunk_size=1",
}


def vectors(count: int) -> Tensor:
    """Embeddings of `count` different words of real text in SmolLM2, centred and of length 1, ``[count, 576]``."""
    model, tokenizer = smollm2(dtype=torch.float32)
    embeddings: Any = model.get_input_embeddings()
    ids = tokens(tokenizer, 40 * count, 20000).unique()[::2][:count]
    x = embeddings.weight.detach()[ids]
    return F.normalize(x - x.mean(0), dim=-1)


def recalled(name: str, x: Tensor, corrupted: Tensor, eta: float, passes: int, size: int = 64) -> float:
    """Median relative error of the clean values read back after `passes` over all pairs, a tenth of the values times 10."""
    torch.manual_seed(1)
    keys = F.normalize(x @ torch.randn(x.shape[1], size) / size**0.5, dim=-1)
    values = F.normalize(x @ torch.randn(x.shape[1], size) / size**0.5, dim=-1)
    stored = torch.where(corrupted[:, None], -10 * values.roll(1, 0), values)
    k, v = (y.repeat(passes, 1)[None, None] for y in (keys, stored))
    q, keep = torch.cat([k, keys[None, None]], 2), torch.zeros(1, 1, k.shape[2] + len(x))
    rates = torch.cat([torch.full((1, 1, k.shape[2]), eta), torch.zeros(1, 1, len(x))], -1)  # reading: eta 0
    k, v = torch.cat([k, keys[None, None]], 2), torch.cat([v, torch.zeros(1, 1, len(x), size)], 2)
    extras = {"log_decay": keep, "eta": rates}
    if "huber" in name:
        extras["delta"] = torch.full_like(keep, 0.5)
    out = method(MEMORIES[name])(q, k, v, **extras)[0, 0, -len(x) :]
    return float((out - values).norm(dim=-1)[~corrupted].median())


def main() -> None:
    """Recall of corrupted pairs at the best step size of each memory, then the byte models."""
    a = arguments(__doc__)
    count, passes = (16, 1) if a.quick else (48, 3)
    x = vectors(count)
    torch.manual_seed(0)
    dirty, clean = torch.zeros(count, dtype=torch.bool), torch.zeros(count, dtype=torch.bool)
    dirty[torch.randperm(count)[: count // 10]] = True
    table, figures = [], []
    for name in MEMORIES:
        rates = (0.03, 0.1, 0.3, 1.0)
        row: dict[str, Any] = {"memory": name}
        for label, mask in (("clean", clean), ("a tenth corrupted", dirty)):
            row[f"error, {label}"] = round(min(recalled(name, x, mask, r, passes) for r in rates), 4)
        table.append(row)
        figures.append(Figure(f"recall error with a tenth corrupted, {name}", row["error, a tenth corrupted"], "",
                              f"{count} word embeddings of SmolLM2, {passes} passes; without corruption {row['error, clean']}; "
                              "the best of four step sizes"))  # fmt: skip
    gates = {"log_decay": "bhn", "eta": "bhn"}
    choices = [
        Choice("yaad", "miras", gates=gates | {"delta": "bhn"}),
        Choice("moneta", "miras:loss=lp,retention=norm", gates=gates),
        Choice("memora", "miras:loss=l2,retention=softmax", gates=gates),
        Choice("gla", "gla", gates={"log_decay": "bhn"}),
    ]
    for choice in choices:
        row = language(choice, a, length=128, steps=200, rows=32)
        figures.append(Figure(f"loss of a byte model, {choice.name}", row["loss (nats/byte)"], "nats/byte",
                              f"200 steps, {row['parameters']} parameters, state {row['state (bytes)']} bytes"))  # fmt: skip
        print(row)
    record("miras", claim="with corrupted values the Huber memory recalls better than the squared one, and that than sums",
           figures=figures, table=table, command="python benchmarks/real/miras.py", seed=0, folder=a.folder)  # fmt: skip
    for row in table:
        print(row)


if __name__ == "__main__":
    main()
