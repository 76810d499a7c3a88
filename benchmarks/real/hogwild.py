"""Hogwild on SmolLM2: what one worker writes another one reads at once; a document held once for all; tokens per second.

python benchmarks/real/hogwild.py [--device cuda]

A model of 135M does not collaborate, so this shows the mechanics: passkeys out of a shared document, a code word that only the
other worker writes (with the shared blocks, and without), and the speed of 1, 2 and 4 workers beside independent batches.
"""

from __future__ import annotations

import random
import statistics
import time

import torch
from _streams import arguments, clock, load

from qkv.bench.record import Figure, record
from qkv.decode.hogwild import hogwild_generate

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
LATE = "\nI read the whole text once more, slowly, line by line, and then I answer the question that I was asked.\n"
NAMES = ("Anna", "Ben", "Clara", "David")
WORDS = ("marigold", "thunder", "pencil", "harbor", "velvet", "lantern")


def document(draw: random.Random, keys: dict[str, str], sentences: int) -> str:
    """Filler with a pass key for each name."""
    lines = [FILLER] * sentences
    for name, key in keys.items():
        at = draw.randrange(len(lines))
        lines.insert(at, f"The pass key of {name} is {key}. Remember it. {key} is the pass key of {name}.\n")
    return "Important numbers are hidden in a lot of irrelevant text. Memorize them.\n" + "".join(lines)


def passkeys(model, tokenizer, layout: str, trials: int, sentences: int, bits: int = 16) -> tuple[float, float]:
    """(share of keys named rightly by two workers, bytes of the cache as a share of two caches) over several documents."""
    right, held = [], []
    for i in range(trials):
        draw = random.Random(i)
        keys = {name: "".join(draw.choice("123456789") for _ in range(5)) for name in NAMES[:2]}
        text = document(draw, keys, sentences)
        first, second = (f"What is the pass key of {n}? The pass key of {n} is" for n in keys)
        # The second one is asked later: a question that ends in mid-sentence is a pattern that so small a model would copy.
        late = tokenizer(LATE + second, add_special_tokens=False)["input_ids"]
        out = hogwild_generate(
            model, ["\n" + first, "\n"], layout=layout, max_steps=len(late) + 8, common=text, tokenizer=tokenizer,
            headers=False, forced={1: late}, bits=bits, group=64,
        )  # fmt: skip
        said = [tokenizer.decode(out.tokens[0, :8]), tokenizer.decode(out.tokens[1, len(late) :])]
        right += [key in answer for key, answer in zip(keys.values(), said, strict=True)]
        config = model.config
        per = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
        held.append(out.notes["bytes"] / (2 * per * len(tokenizer(text)["input_ids"])))
    return sum(right) / len(right), statistics.mean(held)


def code_words(model, tokenizer, layout: str, words: tuple[str, ...]) -> float:
    """How often Anna writes the word that only Ben wrote, while both were writing."""
    common = "Anna and Ben write at the same time.\n\n"
    hits = 0
    for word in words:
        ben = (f" Good morning. I have to tell you a code word. The code word is {word}. I repeat it: the code word is {word}. "
               "That is all that I had to say.")  # fmt: skip
        anna = (" Good morning. The weather is fine and the birds sing in the trees. " + FILLER.strip()
                + " I shall wait until Ben has told me the "
                "code word. Now I have read it, so I write it down for everybody. The code word is")  # fmt: skip
        forced = {i: tokenizer(t, add_special_tokens=False)["input_ids"] for i, t in enumerate((anna, ben))}
        assert len(forced[1]) < len(forced[0]) - 8, "the word must have been written before Anna needs it"
        out = hogwild_generate(
            model, ["Anna writes:", "Ben writes:"], layout=layout, max_steps=len(forced[0]) + 6, common=common,
            tokenizer=tokenizer, headers=False, forced=forced,
        )  # fmt: skip
        hits += word in tokenizer.decode(out.tokens[0, len(forced[0]) :])
    return hits / len(words)


def per_step(a, make, new: int, times: int) -> float:
    """Milliseconds per step, from the best runs of `new` and of 4 steps, so that the prompt drops out."""
    found = []
    for count in (4, new):
        seconds = []
        for _ in range(times):
            if a.device.startswith("cuda"):
                torch.cuda.synchronize()
            t0 = time.perf_counter()
            make(count)
            if a.device.startswith("cuda"):
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - t0)
        found.append(min(seconds))
    return (found[1] - found[0]) / (new - 4) * 1e3


def main() -> None:
    a = arguments(__doc__)
    model, tokenizer = load(a)
    t0 = time.perf_counter()
    trials, sentences, words = (1, 2, WORDS[:1]) if a.quick else (6, 20, WORDS)
    new, times, tokens = (6, 1, 64) if a.quick else (36, 3, 512)
    table = []
    for layout in ("contiguous", "combined", "private"):
        right, held = passkeys(model, tokenizer, layout, trials, sentences)
        heard = code_words(model, tokenizer, layout, words)
        table.append({"layout": layout, "pass keys right": round(right, 4), "code word picked up": round(heard, 4),
                      "bytes of two caches": round(held, 4)})  # fmt: skip
        clock(layout, t0)
        print(table[-1], flush=True)
    for bits in (8, 4, 2):
        right, held = passkeys(model, tokenizer, "contiguous", trials, sentences, bits)
        table.append({"layout": f"contiguous, {bits} bits", "pass keys right": round(right, 4),
                      "code word picked up": "not asked", "bytes of two caches": round(held, 4)})  # fmt: skip
        clock(f"{bits} bits", t0)
        print(table[-1], flush=True)
    common = tokenizer(FILLER * 100)["input_ids"][:tokens]
    speeds = {}
    for workers in (1, 2, 4):
        prompts = [tokenizer(f"\n{name} writes:", add_special_tokens=False)["input_ids"] for name in NAMES[:workers]]

        def together(count, form="queries", prompts=prompts, workers=workers):
            hogwild_generate(
                model, prompts, workers=workers, layout="contiguous", max_steps=count, common=common, form=form
            )

        width = max(map(len, prompts))
        rows = [[0] * (width - len(p)) + common + p for p in prompts]
        mask = [[0] * (width - len(p)) + [1] * (len(common) + len(p)) for p in prompts]
        batch, real = torch.tensor(rows, device=a.device), torch.tensor(mask, device=a.device)

        def apart(count, batch=batch, real=real):
            model.generate(
                batch, attention_mask=real, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
            )

        for name, make in (
            ("hogwild", together),
            ("keys", lambda c, f=together: f(c, "keys")),
            ("independent batch", apart),
        ):
            make(2)
            speeds[name, workers] = per_step(a, make, new, times)
        kinds = ("hogwild", "keys", "independent batch")
        clock(f"{workers} workers: " + ", ".join(f"{n} {speeds[n, workers]:.1f} ms a step" for n in kinds), t0)
    by = {row["layout"]: row for row in table}
    note = f"{len(words)} words, written by the other worker while this one writes"
    figures = [
        Figure(f"code word picked up, {x}", by[x]["code word picked up"], "", note) for x in ("combined", "private")
    ]
    figures += [Figure(f"pass keys right, {x}", by[x]["pass keys right"], "", f"two workers, {trials} shared documents")
                for x in ("contiguous", "contiguous, 4 bits", "contiguous, 2 bits", "private")]  # fmt: skip
    figures += [Figure(f"bytes of two caches, {x}", by[x]["bytes of two caches"], "", "a document held once for two workers")
                for x in ("contiguous", "contiguous, 4 bits")]  # fmt: skip
    setting = f"{tokens} shared tokens, {new} steps, greedy, {a.dtype}"
    for workers in (1, 2, 4):
        for name in ("hogwild", "independent batch"):
            rate = round(workers * 1e3 / speeds[name, workers], 1)
            figures.append(Figure(f"tokens per second, {name} of {workers}", rate, "1/s", setting))
    figures.append(
        Figure("ms per step with keys turned instead, 4 workers", round(speeds["keys", 4], 2), "ms", setting)
    )
    claim = (
        "a worker picks up a code word that another one writes, with the shared blocks and not without; tokens per second "
        "grow with the number of workers"
    )
    record("hogwild", claim=claim, figures=figures, table=table, command="python benchmarks/real/hogwild.py", seed=0,
           folder=a.folder)  # fmt: skip


if __name__ == "__main__":
    main()
