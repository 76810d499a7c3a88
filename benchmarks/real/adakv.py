"""Ada-KV on real text: budgets shared out by the scores against equal ones, for two scorers, at the same bytes; and shares given
to the wrong heads.

python benchmarks/real/adakv.py [--device cuda]
"""

from __future__ import annotations

import dataclasses
import time
from typing import ClassVar, final

import torch
from _passkeys import accuracy, prompts
from _streams import applied, arguments, clock, divergence, load, losses, perplexity, tokens
from torch import Tensor

import qkv
from qkv.bench.record import Figure, record
from qkv.caches._stores.ragged import RaggedCache, share_out
from qkv.core.cache import CacheMethod, CacheSpec, Geometry, LayerCache
from qkv.core.spec import param


def swapped(worth: Tensor, keep: Tensor) -> Tensor:
    """Negative control: every head keeps its own best slots, but as many as the head that asked for the opposite number."""
    counts = share_out(worth, keep, 0.2).sum(-1)  # [B, G]
    order = counts.argsort(-1)
    opposite = torch.zeros_like(counts).scatter_(-1, order, counts.gather(-1, order.flip(-1)))
    place = worth.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return (place < opposite.unsqueeze(-1)) & (worth > -torch.inf)


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Swapped(CacheMethod):
    """Budgets of the wrong heads."""

    spec: ClassVar[CacheSpec] = CacheSpec(id="swapped-budgets", title="Negative control", paper="control")
    scorer: str = param("h2o", "the policy")
    budget: float = param(0.2, "mean share")

    def layer(self, geometry: Geometry) -> LayerCache:
        policy = qkv.method(self.scorer, budget=self.budget)
        return RaggedCache(policy, geometry, swapped, self.id)


def spread(model, ids: Tensor, method) -> float:
    """Longest over mean head, mean over layers: how uneven the shares are."""
    with applied(model, method), torch.no_grad():
        cache = model(ids.to(model.device), use_cache=True, logits_to_keep=1).past_key_values
        held = [(layer.memory.positions() >= 0).sum(-1).float() for layer in cache.layers]
    return round(float(torch.stack([x.max() / x.mean() for x in held]).mean()), 3)


def main() -> None:
    a = arguments(__doc__)
    model, tokenizer = load(a)
    prompt, new, windows = (240, 16, 1) if a.quick else (2048, 64, 2)
    budgets = (0.2,) if a.quick else (0.2, 0.1)
    methods: dict = {"full": None}
    for budget in budgets:
        for scorer in ("snapkv", "h2o"):
            methods[f"{scorer} {budget}"] = qkv.method(scorer, budget=budget)
            methods[f"adakv over {scorer} {budget}"] = qkv.method("adakv", scorer=scorer, budget=budget)
    methods["h2o 0.2, shares swapped"] = Swapped(scorer="h2o", budget=0.2)
    texts = [tokens(tokenizer, prompt + new, 20000 + i * 50000) for i in range(windows)]
    cases = prompts(tokenizer, *((300, (0.5,), 1) if a.quick else (2048, (0.1, 0.5, 0.9), 2)))
    t0, rows, base = time.perf_counter(), [], []
    for name, method in methods.items():
        with applied(model, method):
            scored = [losses(model, ids, prompt=prompt, chunk=1) for ids in texts]
            held = qkv.report(model).ratio
        base = base or [logits for _, logits in scored]
        found = [divergence(x, y) for x, (_, y) in zip(base, scored, strict=True)]
        keys, _ = accuracy(model, tokenizer, method, cases)
        rows.append(
            {
                "method": name,
                "perplexity": perplexity(torch.cat([loss for loss, _ in scored])),
                "KL to full (nats/token)": round(sum(x[0] for x in found) / len(found), 4),
                "top-1 agreement": round(sum(x[1] for x in found) / len(found), 4),
                "pass keys": keys,
                "bytes held": round(held, 4),
            }
        )
        clock(str(rows[-1]), t0)
    by = {row["method"]: row for row in rows}
    note = f"{windows} x {new} tokens decoded after prompts of {prompt}"
    figures = [
        Figure(f"KL to full, {n}", by[n]["KL to full (nats/token)"], "nats/token", note) for n in by if n != "full"
    ]
    figures += [Figure(f"bytes held, {n}", by[n]["bytes held"], "", "share of a full cache") for n in by if "0.2" in n]
    figures += [
        Figure(
            f"longest over mean head, {s}",
            spread(model, texts[0][:, :prompt], qkv.method("adakv", scorer=s)),
            "",
            "mean of layers",
        )
        for s in ("snapkv", "h2o")
    ]
    record("adakv", claim=qkv.method("adakv").spec.shown, figures=figures, table=rows, seed=0, folder=a.folder,
           command="python benchmarks/real/adakv.py")  # fmt: skip


if __name__ == "__main__":
    main()
