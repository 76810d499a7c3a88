"""Eviction and quantisation together on real text: a quarter of the prompt in 4 bits, against either alone at the same bytes.

python benchmarks/real/evict_pack.py [--device cuda]
"""

from __future__ import annotations

import torch
from _streams import applied, arguments, compare, load, tokens

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
    rows = compare(model, tokenizer, METHODS, prompt=prompt, new=new, windows=windows)
    held = {}
    model = model.to(torch.bfloat16)
    ids = tokens(tokenizer, prompt, 20000).to(model.device)
    for name, method in METHODS.items():
        with applied(model, method), torch.no_grad():
            model(ids, use_cache=True, logits_to_keep=1)
            held[name] = round(qkv.report(model).ratio, 4)
    table = [row | {"bytes of a bf16 cache after the prompt": held.get(row["method"], 1.0)} for row in rows]
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
