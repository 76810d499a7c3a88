"""TidalDecode on real text: 256 of 4096 tokens read, by the layer that chooses again, against random positions and a window.

python benchmarks/real/tidaldecode.py [--device cuda]
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import ClassVar, final

import torch
from _reads import DEPTHS, figures, passkeys
from _streams import arguments, compare, load, tokens
from torch import Tensor

from qkv.bench.record import Figure, record
from qkv.caches.tidaldecode import TidalDecode
from qkv.core.cache import CacheSpec
from qkv.core.reader import Reader, Reading
from qkv.core.spec import budget_param
from qkv.hosts import observe


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomPositions(Reader):
    """Negative control: as many positions, drawn anew by every layer and step."""

    spec: ClassVar[CacheSpec] = CacheSpec(id="random-positions", title="Control", paper="control", evicts=False)
    budget: int | float = budget_param(256)

    def dense(self, geometry) -> bool:
        return geometry.layer < 3 or geometry.layer == round(0.4 * geometry.layers)

    def rank(self, view: Reading) -> Tensor:
        draw = torch.Generator().manual_seed(1000 * view.since + view.geometry.layer)
        b, g, s = view.keys.shape[:3]
        return torch.rand(b, g, 1, s, generator=draw).to(view.keys.device)


@torch.no_grad()
def overlaps(model, ids: Tensor, k: int) -> list[float]:
    """Jaccard overlap of the top-k positions of consecutive layers, mean over heads, for the last query of a text."""
    best: dict[int, Tensor] = {}

    def look(site, call) -> None:
        r = call.q.shape[1] // call.k.shape[1]
        logits = call.q[:, :, -1:] @ call.k.repeat_interleave(r, 1).mT
        best[site.layer] = torch.zeros_like(logits[:, :, 0]).bool().scatter(-1, logits[:, :, 0].topk(k).indices, True)

    with observe(model, look):
        model(ids.to(model.device), use_cache=False, logits_to_keep=1)
    layers = sorted(best)
    pairs = [(best[a], best[b]) for a, b in itertools.pairwise(layers)]
    return [round(((x & y).sum(-1) / (x | y).sum(-1)).float().mean().item(), 3) for x, y in pairs]


def main() -> None:
    a = arguments(__doc__)
    model, tokenizer = load(a)
    prompt, new, windows, length = (256, 4, 1, 256) if a.quick else (4096, 48, 2, 4096)
    k, layers = prompt // 16, model.config.num_hidden_layers
    standard = round(0.4 * layers)
    again = (standard,) if a.quick else tuple(sorted({4, 8, standard, 16, 20, 24} & set(range(3, layers))))
    methods: dict[str, object] = {f"tidaldecode, again at {c}": f"tidaldecode:budget={k},reselect={c}" for c in again}
    main_name = f"tidaldecode, again at {standard}"
    methods |= {
        "tidaldecode, per KV head": f"tidaldecode:budget={k},share=kv_head",
        "tidaldecode, half the tokens": f"tidaldecode:budget={k // 2}",
        "sinks + window": f"streamingllm:window={k - 4}", "random positions": RandomPositions(budget=k),
    }  # fmt: skip
    table = compare(model, tokenizer, methods, prompt=prompt, new=new, windows=windows)
    some = {n: methods[n] for n in (main_name, "tidaldecode, half the tokens", "sinks + window", "random positions")}
    passkeys(model, tokenizer, table, some, length=length, depths=DEPTHS[2:3] if a.quick else DEPTHS)
    shared = overlaps(model, tokens(tokenizer, prompt, 20000), k)
    read = (4 * prompt + (layers - 4) * k) / (layers * prompt)
    note = f"{k} of {prompt} tokens read; {windows} x {new} tokens decoded"
    found = figures(table, ["full", main_name, "sinks + window", "random positions"], note)
    found += [
        Figure(
            "overlap of the top tokens of consecutive layers",
            sum(shared) / len(shared),
            "",
            f"Jaccard of the top {k}, mean",
        ),
        Figure("keys read", round(read, 4), "", f"share of all, {layers} layers"),
    ]
    record("tidaldecode", claim=TidalDecode.spec.shown, figures=found, table=table,
           command="python benchmarks/real/tidaldecode.py", seed=0, folder=a.folder)  # fmt: skip
    for row in table:
        print(row)
    print("overlaps", shared)


if __name__ == "__main__":
    main()
