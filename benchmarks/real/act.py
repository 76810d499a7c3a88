"""ACT on SmolLM2: perplexity when later sinks are calibrated, when the first is too, and in random heads.

python benchmarks/real/act.py [--device cuda]

The head search uses the loss on text, with separate windows for search and test, and only heads that have later sinks. The
paper's own evaluation (classification accuracy, 900 samples per head) is not run here.
"""

from __future__ import annotations

import math
import time

import torch
import torch.nn.functional as F
from _resume import kept
from _streams import arguments, clock, load, tokens

import qkv
from qkv.bench.record import Figure, record
from qkv.core.columns import column_means
from qkv.core.heads import HeadSet, HeadTable
from qkv.hosts import observe
from qkv.steer.act import pick_sinks, search_heads

LENGTH = 256
RANDOM = (0, 1, 2)


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
    rows = [{"setting": k, "perplexity": round(math.exp(v), 3)} for k, v in found.items()]
    rows += [
        {"setting": f"searched heads, held-out windows: {k}", "perplexity": round(v, 3)} for k, v in tested.items()
    ]
    ppl = {row["setting"]: row["perplexity"] for row in rows}
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
    record("act", claim=method.spec.shown, figures=figures, table=rows, seed=0, folder=a.folder,
           command="python benchmarks/real/act.py")  # fmt: skip
    for figure in figures:
        print(figure.name, figure.value, figure.note)


if __name__ == "__main__":
    main()
