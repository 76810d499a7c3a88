"""ACT on SmolLM2: perplexity and zero-shot sentiment with later sinks calibrated, with the first too, and in random heads.

python benchmarks/real/act.py [--device cuda]

Classification, as the paper judges: sentences of film reviews rated by twenty people, 100 clearly good and 100 clearly bad; the
likelier of two words after a prompt decides. On three splits, each head with later sinks is tried alone on 100 sentences and
those that help are tested together on the other 100. A second search goes by the loss on text, on other windows than its test.
"""

from __future__ import annotations

import io
import math
import random
import statistics
import tarfile
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from _resume import kept
from _streams import arguments, clock, load, tokens

import qkv
from qkv.bench.packages import Package, fetch
from qkv.bench.record import Figure, record
from qkv.core.columns import column_means
from qkv.core.heads import HeadSet, HeadTable
from qkv.hosts import observe
from qkv.steer.act import pick_sinks, search_heads

LENGTH = 256
RANDOM = (0, 1, 2)
SPLITS = (0, 1, 2)
REVIEWS = Package(
    "vaderSentiment", "3.3.2", "vaderSentiment-3.3.2.tar.gz", 2466783,
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9", "rated sentences of film reviews, MIT",
)  # fmt: skip
PROMPT, LABELS = "Review: {}\nSentiment:", (" negative", " positive")


def reviews(count: int) -> list[dict[str, Any]]:
    """`count` sentences, half of them rated clearly good (label 1), half clearly bad (0); drawn once and for all."""
    with tarfile.open(fetch(REVIEWS)) as outer:
        inner = outer.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        assert inner is not None
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as archive:
            file = archive.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
            assert file is not None
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    found: tuple[list[str], list[str]] = ([], [])
    for line in lines:
        _, rating, text = line.split("\t", 2)
        if abs(float(rating)) >= 1.5 and 40 <= len(text) <= 200:
            found[float(rating) > 0].append(text.strip())
    draw = random.Random(0)
    return [{"text": x, "label": label} for label, texts in enumerate(found) for x in draw.sample(texts, count // 2)]


class Classifier:
    """Accuracy of the likelier label word after the prompt, in one left-padded batch per hundred sentences."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        self.labels = [tokenizer(x, add_special_tokens=False)["input_ids"] for x in LABELS]
        assert all(len(x) == 1 for x in self.labels), f"labels of several tokens: {self.labels}"

    @torch.no_grad()
    def margins(self, model, samples: Sequence[dict[str, Any]]) -> list[float]:
        """Log-likelihood of the second label less that of the first, per sample."""
        out: list[float] = []
        for start in range(0, len(samples), 100):
            rows = [self.tokenizer(PROMPT.format(s["text"]))["input_ids"] for s in samples[start : start + 100]]
            width = max(map(len, rows))
            ids = torch.tensor([[0] * (width - len(r)) + r for r in rows], device=model.device)
            mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=model.device)
            logits = model(ids, attention_mask=mask, use_cache=False, logits_to_keep=1).logits[:, -1].float()
            out += (logits[:, self.labels[1][0]] - logits[:, self.labels[0][0]]).tolist()
        return out

    def __call__(self, model, samples: Sequence[dict[str, Any]]) -> float:
        return statistics.mean(
            (m > 0) == s["label"] for m, s in zip(self.margins(model, samples), samples, strict=True)
        )


def later_sinks_in_prompts(model, tokenizer, samples: Sequence[dict[str, Any]], method) -> HeadTable:
    """`later_sinks` on prompts, each alone."""
    return later_sinks(model, [tokenizer(PROMPT.format(s["text"]))["input_ids"] for s in samples], method)


def classification(a, model, tokenizer, method, windows, since: float) -> tuple[list[dict[str, Any]], list[Figure]]:
    """Three splits of search and test; rows of every split, and figures."""
    samples, judge = reviews(12 if a.quick else 200), Classifier(tokenizer)
    n = len(samples) // 2

    def find() -> dict[str, Any]:
        return later_sinks_in_prompts(model, tokenizer, samples[:: max(1, len(samples) // 24)], method).to_dict()

    sinks = HeadTable.from_dict(kept(a, "act-review-sinks", find))
    able = HeadSet(frozenset((l, h) for l in range(2, 29) for h in range(9) if float(sinks.values[l, h]) > 0))
    if a.quick:
        able = HeadSet(frozenset(sorted(able)[:3]))
    rows: list[dict[str, Any]] = []

    def row(split: int, what: str, setting, heads: int, test) -> None:
        with qkv.applied(model, setting or "full"):
            rows.append({
                "setting": f"split {split}: {what}", "heads": heads, "perplexity": round(math.exp(loss(model, windows)), 3),
                "accuracy (%)": round(100 * judge(model, test), 1),
            })  # fmt: skip

    for split in SPLITS[: 1 if a.quick else None]:

        def run(split: int = split) -> dict[str, Any]:
            found = search_heads(model, samples, judge, n=n, method=method, candidates=able, seed=split)
            return {
                "heads": found.heads.names(),
                "base": found.base,
                "table": found.table.to_dict(),
                "tried": len(found.table.measured),
            }

        found = kept(a, f"act-review-search-{split}", run)
        order = list(range(len(samples)))
        random.Random(split).shuffle(order)  # as `search_heads` splits
        test = [samples[i] for i in order[n:]]
        heads = HeadSet.of(found["heads"])
        clock(
            f"split {split}: {len(heads)} of {found['tried']} heads help; base on the search half {found['base']:.3f}",
            since,
        )
        row(split, "base", None, 0, test)
        row(split, "act, every head with later sinks", method.replace(heads=able), len(able), test)
        row(
            split,
            "first sink too, every head with later sinks",
            method.replace(heads=able, keep_first=False),
            len(able),
            test,
        )
        if heads:
            row(split, "act, searched heads", method.replace(heads=heads), len(heads), test)
            row(
                split, "first sink too, searched heads", method.replace(heads=heads, keep_first=False), len(heads), test
            )
            others = able - heads
            for seed in RANDOM:
                few = (others if len(others) >= len(heads) else able).random(len(heads), seed)
                row(split, f"act, as many random heads, draw {seed}", method.replace(heads=few), len(few), test)
    figures = []
    for what in dict.fromkeys(r["setting"].partition(": ")[2].partition(", draw")[0] for r in rows):
        mine = [r for r in rows if r["setting"].partition(": ")[2].partition(", draw")[0] == what]
        every = ", ".join(f"{r['accuracy (%)']:g}" for r in mine)
        ppl, count = (statistics.mean(float(r[name]) for r in mine) for name in ("perplexity", "heads"))
        figures.append(Figure(
            f"zero-shot sentiment, {what}", round(statistics.mean(r["accuracy (%)"] for r in mine), 2), "%",
            f"{n} unseen sentences each: {every}; {count:.0f} heads; perplexity on text {ppl:.2f}",
        ))  # fmt: skip
    return rows, figures


@torch.no_grad()
def loss(model, windows) -> float:
    """Mean loss of the second half of each window: by then sinks have formed."""
    out = []
    for window in windows:
        ids = torch.tensor([window], device=model.device)
        logits = model(ids, use_cache=False).logits[0, LENGTH // 2 : -1].float()
        out.append(F.cross_entropy(logits, ids[0, LENGTH // 2 + 1 :]).item())
    return sum(out) / len(out)


def later_sinks(model, windows, method) -> HeadTable:
    """Sinks after the first, per head, mean over windows."""
    counts: dict[int, torch.Tensor] = {}

    def see(site, call) -> None:
        got = column_means(call.q, call.k, call.v, mask=call.mask, causal=call.causal, scale=call.scale)
        sinks = pick_sinks(got.mass, got.count, threshold=method.threshold, min_rows=method.min_rows, keep_first=True)
        counts[site.layer] = counts.get(site.layer, 0) + sinks.sum(-1).double().sum(0).cpu()

    with observe(model, see), torch.no_grad():
        for window in windows:
            model(torch.tensor([window], device=model.device), use_cache=False)
    return HeadTable(torch.stack([counts[l] for l in sorted(counts)]) / len(windows), "later sinks")


def main() -> None:
    a = arguments(__doc__)
    model, tokenizer = load(a)
    count, pick, tried = (6, 4, 4) if a.quick else (18, 6, 10)
    ids = tokens(tokenizer, 40000 + count * 4000, 0)[0].tolist()
    windows = [ids[40000 + i * 4000 :][:LENGTH] for i in range(count)]
    method = qkv.method("act", min_rows=8)
    t0 = time.perf_counter()
    sinks = HeadTable.from_dict(kept(a, "act-sinks", lambda: later_sinks(model, windows[:6], method).to_dict()))
    middle = HeadSet(frozenset((l, h) for l in range(2, 29) for h in range(9)))
    with_sinks = HeadSet(frozenset(x for x in middle if float(sinks.values[x]) > 0))
    clock(f"{len(with_sinks)} of {len(middle)} heads have later sinks", t0)

    held = windows[pick:]
    settings = {
        "base": None,
        "act, all heads": method.replace(heads=middle),
        "act, all heads, beta 0": method.replace(heads=middle, beta=0.0),
        "act, all heads, min_rows 1": method.replace(heads=middle, min_rows=1),
        "first sink too, all heads": method.replace(heads=middle, keep_first=False),
    }
    for seed in RANDOM:
        few = middle.random(24, seed)
        settings[f"act, 24 random heads, seed {seed}"] = method.replace(heads=few)
        settings[f"first sink too, 24 random heads, seed {seed}"] = method.replace(heads=few, keep_first=False)
    found: dict[str, float] = {}

    def under(setting) -> float:
        with qkv.applied(model, setting or "full"):
            return loss(model, held)

    for name, setting in settings.items():
        found[name] = kept(a, f"act-{name.replace(', ', '-').replace(' ', '-')}", lambda s=setting: under(s))
        clock(f"{name}: perplexity {math.exp(found[name]):.3f}", t0)

    candidates = sinks.top(min(tried, len(with_sinks)))
    search = search_heads(
        model, windows, lambda m, s: -loss(m, s), n=pick, method=method, candidates=candidates,
        progress=lambda d, t, note: clock(f"search {d} of {t}, {note}", t0),
    )  # fmt: skip
    tested = {k: math.exp(-v) for k, v in search.test(model, lambda m, s: -loss(m, s)).items()} if search.heads else {}
    blank = {"heads": "", "perplexity": "", "accuracy (%)": ""}
    rows = [{"setting": k} | blank | {"perplexity": round(math.exp(v), 3)} for k, v in found.items()]
    rows += [
        {"setting": f"searched heads, held-out windows: {k}"} | blank | {"perplexity": round(v, 3)}
        for k, v in tested.items()
    ]
    ppl = {str(row["setting"]): float(row["perplexity"]) for row in rows}
    note = f"second half of {len(held)} windows of {LENGTH} tokens"

    def mean(kind: str) -> float:
        return round(sum(ppl[f"{kind}, 24 random heads, seed {s}"] for s in RANDOM) / len(RANDOM), 3)

    figures = [
        Figure(
            "heads with later sinks",
            len(with_sinks),
            "",
            f"of {len(middle)} in layers 2 to 28; threshold 0.1, min_rows 8",
        ),
        Figure("perplexity, base", ppl["base"], "", note),
        Figure("perplexity, ACT in all middle heads", ppl["act, all heads"], "", note),
        Figure("perplexity, the first sink calibrated too", ppl["first sink too, all heads"], "", note),
        Figure("perplexity, ACT in 24 random heads", mean("act"), "", "mean of 3 draws"),
        Figure("perplexity, first sink too in 24 random heads", mean("first sink too"), "", "mean of 3 draws"),
        Figure(
            "heads that helped alone in the search",
            len(search.heads),
            "",
            f"of {len(search.table.measured)} tried; loss on text",
        ),
    ]
    figures += [
        Figure(f"searched heads, {k}", round(v, 3), "", "perplexity on held-out windows") for k, v in tested.items()
    ]
    more, judged = classification(a, model, tokenizer, method, held, t0)
    rows, figures = rows + more, figures + judged
    record("act", claim=method.spec.shown, figures=figures, table=rows, seed=0, folder=a.folder,
           command=f"python benchmarks/real/act.py --device {a.device}")  # fmt: skip
    for figure in figures:
        print(figure.name, figure.value, figure.note)


if __name__ == "__main__":
    main()
