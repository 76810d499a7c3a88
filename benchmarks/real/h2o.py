"""H2O on real text: what a fifth of the cache costs, against a window of the same size and against keeping the least attended.

python benchmarks/real/h2o.py [--device cuda]
"""

from __future__ import annotations

import dataclasses
import time
from typing import ClassVar, final

import torch
from _streams import applied, arguments, clock, divergence, load, losses, perplexity, tokens
from torch import Tensor

from qkv.bench.record import Figure, record
from qkv.caches.h2o import H2O
from qkv.core.attend import attend
from qkv.core.cache import CacheSpec, Policy, View
from qkv.core.spec import budget_param
from qkv.hosts import observe


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class LeastAttended(Policy):
    """Negative control: a recent half, and the tokens that drew least."""

    spec: ClassVar[CacheSpec] = CacheSpec(id="least-attended", title="Negative control", paper="control", slot_state=1)
    budget: int | float = budget_param(0.2)

    def mass_queries(self, new: int) -> int:
        return new

    def observe(self, state: Tensor | None, view: View) -> Tensor:
        return H2O().observe(state, view)

    def rank(self, state: Tensor | None, view: View) -> Tensor:
        recent = (view.keep * 0.5).floor()
        return (-state.squeeze(-1)).masked_fill(view.position > view.newest - recent, torch.inf)


def concentration(model, ids: Tensor) -> float:
    """Share of all attention that the most attended fifth of the tokens draws, mean over sites."""
    shares = []

    def look(site, call) -> None:
        mass = attend(call.q.float(), call.k.float(), call.v.float(), causal=True, scale=call.scale, mass=True).mass
        shares.append((mass.topk(mass.shape[-1] // 5).values.sum(-1) / mass.sum(-1)).mean().item())

    with observe(model, look), torch.no_grad():
        model(ids.to(model.device), use_cache=False)
    return sum(shares) / len(shares)


def main() -> None:
    a = arguments(__doc__)
    model, tokenizer = load(a)
    prompt, new, windows = (512, 32, 1) if a.quick else (2048, 128, 4)
    names = {
        "h2o 0.2": "h2o:budget=0.2", "window 0.2": "window:budget=0.2", "h2o 0.5": "h2o:budget=0.5",
        "h2o 0.1": "h2o:budget=0.1", "sinks + window 0.2": f"streamingllm:window={int(0.2 * prompt) - 4}",
        "h2o 0.2, positions in the cache": "h2o:budget=0.2,positions=cache", "least attended 0.2": LeastAttended(),
    }  # fmt: skip
    t0, found = time.perf_counter(), {name: [] for name in ["full", *names]}
    for i in range(windows):
        ids = tokens(tokenizer, prompt + new, 20000 + i * 50000)
        with applied(model, None):
            loss, base = losses(model, ids, prompt=prompt, chunk=1)
        found["full"].append((loss, 0.0, 1.0))
        for name, method in names.items():
            with applied(model, method):
                loss, logits = losses(model, ids, prompt=prompt, chunk=1)
            found[name].append((loss, *divergence(base, logits)))
        clock(f"window {i + 1} of {windows}", t0)
    table = [
        {
            "method": name,
            "perplexity": perplexity(torch.cat([x[0] for x in rows])),
            "KL to full (nats/token)": round(sum(x[1] for x in rows) / len(rows), 4),
            "top-1 agreement": round(sum(x[2] for x in rows) / len(rows), 4),
        }
        for name, rows in found.items()
    ]
    by = {row["method"]: row for row in table}
    share = concentration(model, tokens(tokenizer, 1024, 20000))
    note = f"{windows} x {new} tokens decoded after prompts of {prompt}"
    figures = [Figure(f"perplexity, {n}", by[n]["perplexity"], "", note) for n in ("full", "h2o 0.2", "window 0.2")]
    figures += [
        Figure(f"KL to full, {n}", by[n]["KL to full (nats/token)"], "nats/token", note)
        for n in ("h2o 0.2", "window 0.2", "least attended 0.2")
    ]
    figures.append(
        Figure("attention drawn by the top fifth of tokens", round(share, 4), "", "mean over heads, 1024 tokens")
    )
    record("h2o", claim="at a 20 % budget far closer to the full model than a 20 % window", figures=figures, table=table,
           command="python benchmarks/real/h2o.py", seed=0, folder=a.folder)  # fmt: skip
    for row in table:
        print(row)
    print("top fifth draws", share)


if __name__ == "__main__":
    main()
