"""ZipVL on real text: how many tokens each layer finds important, and what a continuation loses when only these attend and stay.

python benchmarks/real/zipvl.py [--device cuda]

Perplexity is measured on tokens after the prompt, in pieces of 16: the selection looks at the whole prompt.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any, ClassVar, final

import torch
from _streams import applied, arguments, clock, divergence, load, losses, perplexity, tokens
from torch import Tensor

import qkv
from qkv.bench.record import Figure, record
from qkv.caches._stores.mixed import Block, MixedCache
from qkv.caches.zipvl import ZipVL
from qkv.core.cache import CacheMethod, CacheSpec, Geometry, LayerCache
from qkv.core.spec import param

KEEP = {"mode": "evict", "bits": 16}
SWEEP = (0.99, 0.975, 0.95, 0.9)


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class FixedShare(CacheMethod):
    """Control: the best tokens of every layer by the same score, but the same number in all layers."""

    spec: ClassVar[CacheSpec] = CacheSpec(id="fixed-share", title="Control", paper="control")
    share: float = param(0.5, "important tokens of the prompt", low=0.0, high=1.0)

    def layer(self, geometry: Geometry) -> LayerCache:
        return MixedCache(self, geometry, bits=(16, 0), every=100, sparse="tokens")

    def probes_of(self, tokens: int, decoded: bool) -> tuple[int, int]:
        return ZipVL().probes_of(tokens, decoded)

    def split(self, block: Block) -> tuple[Tensor, list[int]]:
        width, recent = block.mass.shape[2], self.probes_of(block.mass.shape[2], block.decoded)[0]
        score, count = block.mass.mean(1) / block.seen, max(recent, round(self.share * width))
        score[:, width - recent :] = torch.inf
        flags = torch.zeros_like(score, dtype=torch.bool).scatter(-1, score.topk(count, dim=-1).indices, True)
        return flags.unsqueeze(1), [count] * block.mass.shape[0]


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class LeastImportant(CacheMethod):
    """Negative control: as many tokens as ZipVL chooses, from the other end."""

    spec: ClassVar[CacheSpec] = CacheSpec(id="least-important", title="Negative control", paper="control")
    tau: float = param(0.975, "share of attention", low=0.0, high=1.0)

    def layer(self, geometry: Geometry) -> LayerCache:
        return MixedCache(self, geometry, bits=(16, 0), every=100, sparse="tokens")

    def probes_of(self, tokens: int, decoded: bool) -> tuple[int, int]:
        return ZipVL().probes_of(tokens, decoded)

    def split(self, block: Block) -> tuple[Tensor, list[int]]:
        width, recent = block.mass.shape[2], self.probes_of(block.mass.shape[2], block.decoded)[0]
        counts = ZipVL(tau=self.tau).split(block)[1]
        score = -block.mass.mean(1) / block.seen
        score[:, width - recent :] = torch.inf
        rank = score.argsort(dim=-1, descending=True).argsort(-1)
        return (rank < torch.tensor(counts, device=rank.device)[:, None]).unsqueeze(1), counts


def shares(model, ids: Tensor, method) -> list[float]:
    """Important tokens of a prompt per layer, as a share."""
    with qkv.applied(model, method), torch.no_grad():
        cache = model(ids.to(model.device), use_cache=True, logits_to_keep=1).past_key_values
        return [layer.memory.precise()[0] / ids.shape[1] for layer in cache.layers]


def mean(x: list[float]) -> float:
    return sum(x) / len(x)


def main() -> None:
    a = arguments(__doc__)
    model, tokenizer = load(a)
    prompt, new, windows = (512, 32, 1) if a.quick else (2048, 96, 6)
    sweep = (0.975, 0.9) if a.quick else SWEEP
    names: dict[str, Any] = {f"tau {tau}, 4/2 bits": ZipVL(tau=tau) for tau in sweep}
    names |= {f"tau {tau}, others evicted": ZipVL(tau=tau, **KEEP) for tau in sweep}
    names |= {
        "tau 0.975, others evicted, kept in 4 bits": ZipVL(mode="evict"),
        "tau 0.975, others evicted, dense queries": ZipVL(dense_queries=True, **KEEP),
        "control: one share for all layers (of 0.975)": None,
        "control: one share for all layers (of 0.9)": None,
        "control: the least important (of 0.975)": LeastImportant(),
        "control: the least important (of 0.9)": LeastImportant(tau=0.9),
    }
    t0, found = time.perf_counter(), {name: [] for name in ["full", *names]}
    kept: dict[str, list[float]] = {name: [] for name in names}
    layers: dict[float, list[list[float]]] = {tau: [] for tau in sweep}
    for i in range(windows):
        ids = tokens(tokenizer, prompt + new, 20000 + i * 50000)
        with applied(model, None):
            loss, base = losses(model, ids, prompt=prompt, chunk=16)
        found["full"].append((loss, 0.0, 1.0))
        for tau in sweep:
            layers[tau].append(shares(model, ids[:, :prompt], ZipVL(tau=tau)))
        for name, method in names.items():
            tau = next((t for t in sweep if str(t) in name), 0.975)
            if method is None:
                method = FixedShare(share=mean(layers[tau][-1]))
            with qkv.applied(model, method):
                loss, logits = losses(model, ids, prompt=prompt, chunk=16)
            found[name].append((loss, *divergence(base, logits)))
            kept[name].append(mean(layers[tau][-1]))
        clock(f"window {i + 1} of {windows}", t0)
    table = [
        {
            "method": name,
            "perplexity": perplexity(torch.cat([x[0] for x in rows])),
            "KL to full (nats/token)": round(mean([x[1] for x in rows]), 4),
            "top-1 agreement": round(mean([x[2] for x in rows]), 4),
            "important tokens": round(mean(kept[name]), 4) if name in kept else 1.0,
        }
        for name, rows in found.items()
    ]
    by = {row["method"]: row for row in table}
    per_layer = [mean(list(x)) for x in zip(*layers[0.975], strict=True)]
    note = f"{windows} x {new} tokens after prompts of {prompt}"
    figures = [Figure("perplexity, full", by["full"]["perplexity"], "", note)]
    figures += [Figure(f"KL to full, {n}", by[n]["KL to full (nats/token)"], "nats/token", note) for n in names]
    low, high = min(per_layer), max(per_layer)
    figures += [
        Figure("important tokens, mean over layers", round(mean(per_layer), 3), "", f"tau 0.975, prompts of {prompt}"),
        Figure("important tokens, smallest layer", round(low, 3), "", f"layer {per_layer.index(low)}"),
        Figure("important tokens, largest layer", round(high, 3), "", f"layer {per_layer.index(high)}"),
        Figure(
            "important tokens by layer",
            " ".join(f"{x:.2f}" for x in per_layer),
            "",
            "tau 0.975, from the first layer on",
        ),
        Figure(
            "prefill attention FLOPs of dense", round(mean([x * x for x in per_layer]), 3), "", "without the probes"
        ),
    ]
    record("zipvl", claim="important tokens differ by layer and grow in number with tau; keeping the least important is worse",
           figures=figures, table=table, command="python benchmarks/real/zipvl.py", seed=0, folder=a.folder)  # fmt: skip
    for row in table:
        print(row)
    print(" ".join(f"{x:.2f}" for x in per_layer))


if __name__ == "__main__":
    main()
