"""Eviction and quantisation together on real text: a quarter of the prompt in 4 bits, against either alone at the same bytes.

python benchmarks/real/evict_pack.py [--device cuda]
"""

from __future__ import annotations

import time

import torch
from _streams import applied, arguments, clock, divergence, load, losses, perplexity, tokens

import qkv
from qkv.bench.record import Figure, record

METHODS = {
    "snapkv, a quarter": "snapkv:budget=0.25",
    "snapkv, a quarter, 4 bits": "evict-pack:budget=0.25,bits=4",
    "snapkv, a quarter, 2 bits": "evict-pack:budget=0.25,bits=2",
    "snapkv, a sixteenth": "snapkv:budget=0.0625",
    "h2o, a quarter, 4 bits": "evict-pack:policy=h2o,budget=0.25,bits=4",
    "all tokens in 4 bits": "zipcache:bits=4",
    "all tokens in 2 bits": "zipcache:bits=2",
    "half of the tokens in 2 bits": "evict-pack:budget=0.5,bits=2",
}


def main() -> None:
    a = arguments(__doc__)
    model, tokenizer = load(a)
    prompt, new, windows = (512, 32, 1) if a.quick else (2048, 64, 4)
    t0, found = time.perf_counter(), {name: [] for name in ["full", *METHODS]}
    for i in range(windows):
        ids = tokens(tokenizer, prompt + new, 20000 + i * 50000)
        with applied(model, None):
            loss, base = losses(model, ids, prompt=prompt, chunk=1)
        found["full"].append((loss, 0.0, 1.0))
        for name, method in METHODS.items():
            with applied(model, method):
                loss, logits = losses(model, ids, prompt=prompt, chunk=1)
            found[name].append((loss, *divergence(base, logits)))
        clock(f"window {i + 1} of {windows}", t0)
    held = {}
    model = model.to(torch.bfloat16)
    ids = tokens(tokenizer, prompt, 20000).to(model.device)
    for name, method in METHODS.items():
        with applied(model, method), torch.no_grad():
            model(ids, use_cache=True, logits_to_keep=1)
            held[name] = round(qkv.report(model).ratio, 4)
    table = [
        {
            "method": name,
            "perplexity": perplexity(torch.cat([x[0] for x in rows])),
            "KL to full (nats/token)": round(sum(x[1] for x in rows) / len(rows), 4),
            "top-1 agreement": round(sum(x[2] for x in rows) / len(rows), 4),
            "bytes of a bf16 cache after the prompt": held.get(name, 1.0),
        }
        for name, rows in found.items()
    ]
    by = {row["method"]: row for row in table}
    note = f"{windows} x {new} tokens decoded after prompts of {prompt}"
    figures = [Figure("perplexity, full", by["full"]["perplexity"], "", note)]
    figures += [Figure(f"KL to full, {n}", by[n]["KL to full (nats/token)"], "nats/token", note) for n in METHODS]
    figures += [Figure(f"bytes of a bf16 cache, {n}", held[n], "", f"after a prompt of {prompt}") for n in METHODS]
    record("evict-pack", claim="4 bits on top of eviction cost little beside the eviction itself, at a quarter of its bytes",
           figures=figures, table=table, command="python benchmarks/real/evict_pack.py", seed=0, folder=a.folder)  # fmt: skip
    for row in table:
        print(row)


if __name__ == "__main__":
    main()
