"""Speculative decoding on a real model: the tokens of plain decoding, on the full and on compressed caches, in fewer passes.

The draft is the first layers of the model itself (no smaller model with this tokenizer is at hand), or the model on a window.

python benchmarks/real/speculative.py [--device cuda]
"""

from __future__ import annotations

import time

from _decoding import decoded, plain, same
from _streams import arguments, clock, load, tokens

import qkv
from qkv.bench.record import Figure, record
from qkv.decode.speculative import Speculative, truncated


def main() -> None:
    a = arguments(__doc__)
    model, tokenizer = load(a)
    prompt, new, count = (128, 12, 1) if a.quick else (1024, 48, 2)
    layers = model.config.num_hidden_layers
    drafts = {f"first {n} layers": truncated(model, n) for n in (layers // 3, 2 * layers // 3)}
    window = truncated(model, layers)
    qkv.apply(window, f"streamingllm:sinks=4,window={prompt // 4}")
    drafts[f"itself on {prompt // 4} tokens"] = window
    caches = ("full", "kivi:bits=4", "h2o:budget=0.25") if not a.quick else ("full", "h2o:budget=0.25")
    t0, table = time.perf_counter(), []
    texts = [tokens(tokenizer, prompt, 30000 + 40000 * i).to(model.device) for i in range(count)]
    plain(model, texts[0], 3)
    for cache in caches:
        wants = [plain(model, ids, new, cache) for ids in texts]
        for name, draft in drafts.items():
            rows = []
            for ids, (want, slow) in zip(texts, wants, strict=True):
                with qkv.applied(model, cache):
                    done, fast = decoded(Speculative(length=4), model, ids, new, draft=draft)
                rows.append((same(done.tokens[0], want), done.notes["tokens per pass"], slow, fast))
            equal, gain, slow, fast = (sum(x) / len(x) for x in zip(*rows, strict=True))
            table.append({
                "cache": cache, "draft": name, "equal to plain decoding": round(equal, 4), "tokens per pass": round(gain, 3),
                "ms per token, plain": round(slow, 2), "ms per token": round(fast, 2),
            })  # fmt: skip
            clock(f"{cache}, {name}: {gain:.2f} tokens per pass", t0)
    note = f"{count} x {new} tokens after prompts of {prompt}, greedy, 4 guesses in a row"
    figures = [
        Figure(
            "tokens equal to plain decoding, least of all rows",
            min(r["equal to plain decoding"] for r in table),
            "",
            note,
        )
    ]
    figures += [Figure(f"tokens per pass, {r['cache']}, {r['draft']}", r["tokens per pass"], "", note) for r in table]
    record(
        "speculative",
        claim="the tokens are those of plain decoding, on the full and on compressed caches; a draft that is a part of the model "
        "saves passes, not time",
        figures=figures,
        command="python benchmarks/real/speculative.py",
        seed=0,
        table=table,
        folder=a.folder,
    )
    for row in table:
        print(row)


if __name__ == "__main__":
    main()
