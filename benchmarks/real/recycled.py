"""Recycled Attention on real text: an eighth of the keys, full every 10 steps, against H2O, a sink window, and no refresh.

python benchmarks/real/recycled.py [--device cuda]
"""

from __future__ import annotations

import random
import re

import torch
from _reads import figures
from _streams import applied, arguments, compare, load

from qkv.bench.record import Figure, record
from qkv.bench.tasks.passkey import FILLER
from qkv.caches.recycled import Recycled

NAMES = ("red", "blue", "green", "white")


@torch.no_grad()
def several(model, tokenizer, length: int, seed: int) -> float:
    """Share of four hidden numbers that are given when they are asked for one after the other, questions token by token."""
    draw = random.Random(seed)
    keys = {name: "".join(draw.choice("123456789") for _ in range(5)) for name in NAMES}
    ids = [
        tokenizer(f"The {n} pass key is {k}. Remember it: the {n} pass key is {k}.\n")["input_ids"]
        for n, k in keys.items()
    ]
    filler = tokenizer(FILLER)["input_ids"]
    each = max(1, (length - sum(map(len, ids))) // (len(ids) + 1) // len(filler))
    text = [t for part in ids for t in [*filler * each, *part]] + filler * each
    out = model(input_ids=torch.tensor([text], device=model.device), use_cache=True, logits_to_keep=1)
    cache, right = out.past_key_values, 0
    for name in draw.sample(NAMES, len(NAMES)):
        for token in tokenizer(f"\nThe {name} pass key is")["input_ids"]:
            out = model(input_ids=torch.tensor([[token]], device=model.device), past_key_values=cache, use_cache=True)
        said = []
        for _ in range(7):
            said.append(int(out.logits[0, -1].argmax()))
            out = model(
                input_ids=torch.tensor([[said[-1]]], device=model.device), past_key_values=cache, use_cache=True
            )
        match = re.search(r"\d+", tokenizer.decode(said))
        right += match is not None and match.group() == keys[name]
    return right / len(NAMES)


def mean(values: list[float]) -> float:
    return round(sum(values) / len(values), 4)


def main() -> None:
    a = arguments(__doc__)
    model, tokenizer = load(a)
    prompt, new, windows, length, texts = (256, 12, 1, 256, 1) if a.quick else (4096, 64, 2, 3072, 2)
    k = prompt // 8
    methods: dict[str, object] = {f"recycled, stride {s}": f"recycled:budget={k},stride={s}" for s in (2, 10, 30)}
    methods |= {
        "recycled, by similarity": f"recycled:budget={k},similarity=0.8",
        "h2o": f"h2o:budget={k}", "sinks + window": f"streamingllm:window={k - 4}",
        "never refreshed": f"recycled:budget={k},similarity=-1.0",
    }  # fmt: skip
    table = compare(model, tokenizer, methods, prompt=prompt, new=new, windows=windows)
    some = ("recycled, stride 10", "h2o", "sinks + window", "never refreshed")
    for row in table:
        method = methods.get(row["method"])
        row["numbers of four"] = ""
        if row["method"] in ("full", *some):
            with applied(model, method):
                row["numbers of four"] = mean([several(model, tokenizer, length, seed) for seed in range(texts)])
    note = f"{k} of {prompt} tokens read; {windows} x {new} tokens decoded"
    found = figures(table, ["full", *some], note)
    found += [
        Figure(f"four numbers in sequence, {r['method']}", r["numbers of four"], "", f"{length} tokens, {texts} texts")
        for r in table
        if r["numbers of four"] != ""
    ]
    record("recycled", claim=Recycled.spec.shown, figures=found, table=table,
           command="python benchmarks/real/recycled.py", seed=0, folder=a.folder)  # fmt: skip
    for row in table:
        print(row)


if __name__ == "__main__":
    main()
