"""SpecKV and SpecPC on a real model: a needle asked for at the end of a long prompt, against SnapKV and H2O at equal entries.

The draft is the model itself (a perfect guess) or its first two thirds of layers (no smaller model with this tokenizer is at
hand). Control: the guess is unrelated text of equal length.

python benchmarks/real/speckv.py [--device cuda]
"""

from __future__ import annotations

import time
from typing import Any

import torch
from _decoding import needle, plain, synchronise
from _streams import arguments, clock, load, tokens
from torch import Tensor

from qkv.bench.record import Figure, record
from qkv.bench.tasks.passkey import number
from qkv.core.decoding import GREEDY
from qkv.decode._common.target import Target, opened
from qkv.decode.speckv import SpecKV, draft_importance, specpc_compress, truncated

WINDOW, NEW = 32, 8


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation."""
    ranks = [x.double().argsort().argsort().double() for x in (a, b)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


def unrelated(method: SpecKV, model: Any, ids: Tensor, keep: int, guess: Tensor) -> Tensor:
    """SpecKV with a guess of our own."""
    text = torch.cat([x.to(model.device) for x in (ids, guess[None])], 1)
    with opened(model, "control", method.policy(keep, guess.shape[0])):
        target = Target(model, text, 0, record=False)
        return torch.tensor(method._decode(target, ids.shape[1], NEW, GREEDY, frozenset(), None, lambda _: None))


def prefill_ms(model: Any, ids: Tensor) -> float:
    """Milliseconds of one pass over a prompt, the better of two."""
    best = []
    for _ in range(2):
        with torch.no_grad():
            start = synchronise(model.device)
            model(ids, use_cache=True, logits_to_keep=1)
            best.append(1000 * (synchronise(model.device) - start))
    return round(min(best), 2)


def main() -> None:
    a = arguments(__doc__)
    model, tokenizer = load(a)
    contexts, trials = ((256,), 1) if a.quick else ((2048, 4096), 2)
    depths = (0.5,) if a.quick else (0.1, 0.3, 0.5, 0.7, 0.9)
    shares = (0.25,) if a.quick else (0.1, 0.25)
    window = 16 if a.quick else WINDOW
    layers = model.config.num_hidden_layers
    small, whole = truncated(model, 2 * layers // 3), truncated(model, layers)
    noise = tokens(tokenizer, NEW, 12345)[0]
    t0, found = time.perf_counter(), {}

    def note(context: int, name: str, answer: Tensor, key: str, full: str) -> None:
        said = number(tokenizer.decode(answer))
        found.setdefault((context, name), []).append((said[: len(key)] == key, said == full))

    for context in contexts:
        for trial in range(trials):
            for depth in depths:
                ids, key = needle(tokenizer, context, depth, seed=1000 * trial + int(10 * depth) + context)
                ids = ids.to(model.device)
                answer, _ = plain(model, ids, NEW)
                full = number(tokenizer.decode(answer))
                note(context, "full", answer, key, full)
                for share in shares:
                    keep, label = int(share * context), f"{share:.0%}"
                    method = SpecKV(budget=keep, window=window, lookahead=NEW)
                    for name, draft in (("itself", whole), (f"first {2 * layers // 3} layers", small)):
                        done = method.generate(model, ids, max_new_tokens=NEW, draft=draft)
                        note(context, f"speckv {label}, draft {name}", done.tokens[0], key, full)
                    note(
                        context,
                        f"speckv {label}, unrelated guess",
                        unrelated(method, model, ids, keep, noise),
                        key,
                        full,
                    )
                    for other in (f"snapkv:budget={keep},window={window},kernel=7", f"h2o:budget={keep}"):
                        note(context, f"{other.partition(':')[0]} {label}", plain(model, ids, NEW, other)[0], key, full)
                    pc = SpecKV(stage="pc", prompt_budget=keep, window=window, prompt_kernel=32)
                    done = pc.generate(model, ids, max_new_tokens=NEW, draft=small)
                    note(context, f"specpc {label}, draft first {2 * layers // 3} layers", done.tokens[0], key, full)
        clock(f"needles at {context}", t0)
    table = [
        {
            "context": context, "method": name, "found": round(sum(x[0] for x in rows) / len(rows), 4),
            "agrees with full": round(sum(x[1] for x in rows) / len(rows), 4), "prompts": len(rows),
        }
        for (context, name), rows in found.items()
    ]  # fmt: skip
    ids = tokens(tokenizer, contexts[-1], 40000).to(model.device)
    how = {"window": window, "guess": 1, "start_layer": 0, "weighted": True, "reduce": "max"}
    importance = [draft_importance(m, ids, **how)[0] for m in (small, whole)]
    start = synchronise(model.device)
    kept = specpc_compress(small, ids, 0.25, window=window)
    chosen = 1000 * (synchronise(model.device) - start)
    short, long = prefill_ms(model, ids.gather(1, kept)), prefill_ms(model, ids)
    said = f"{len(depths) * trials} prompts per row"
    figures = [
        Figure(f"needle found at {r['context']}, {r['method']}", r["found"], "", said)
        for r in table
        if r["method"] == "full" or "25%" in r["method"]
    ]
    figures += [
        Figure("Spearman correlation of draft's and model's importance of prompt tokens", round(spearman(*importance), 4), "",
               f"{contexts[-1]} tokens of text, draft first {2 * layers // 3} layers"),
        Figure("prefill of the whole prompt", long, "ms", f"{contexts[-1]} tokens"),
        Figure("prefill of the quarter that SpecPC keeps", short, "ms"),
        Figure("choosing that quarter with the draft", round(chosen, 2), "ms", "the draft's own prefill and its scores"),
    ]  # fmt: skip
    record(
        "speckv",
        claim="a needle asked for at the end survives a quarter of the cache at least as often as with SnapKV",
        figures=figures,
        command="python benchmarks/real/speckv.py",
        seed=0,
        table=table,
        folder=a.folder,
    )
    for row in table:
        print(row)


if __name__ == "__main__":
    main()
