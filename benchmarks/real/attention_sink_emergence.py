"""Attention sinks of SmolLM2: high at the first token, about 0 later, on natural and on random text; and how they emerge.

python benchmarks/real/attention_sink_emergence.py [--device cuda] [--training a,h,i]

--training also trains small byte models from three seeds (a GPU's work; see `_emergence.VARIANTS` for the letters) and records
their sinks as they learn; every finished variant is kept at once.
"""

from __future__ import annotations

import time

import torch
from _emergence import VARIANTS, emergence
from _streams import clock, load, parser

import qkv
from qkv.bench.assets import long_text
from qkv.bench.record import Figure, record
from qkv.core.attend import attend
from qkv.hosts import observe


def shuffled_rate(model, ids, probe) -> float:
    """The control: columns of every row shuffled within what the row sees."""
    draw, over, total = torch.Generator().manual_seed(0), 0, 0

    def see(site, call) -> None:
        nonlocal over, total
        t = call.k.shape[2]
        eye = torch.eye(t, device=call.k.device).expand(*call.k.shape[:3], -1)
        maps = attend(call.q.float(), call.k.float(), eye, causal=True, scale=call.scale).out.cpu()
        for q in range(t):
            maps[..., q, : q + 1] = maps[..., q, torch.randperm(q + 1, generator=draw)]
        alpha = maps[..., 0].mean(-1)
        over, total = over + int((alpha > probe.threshold).sum()), total + alpha.numel()

    with observe(model, see), torch.no_grad():
        model(torch.tensor(ids[:16], device=model.device), use_cache=False)
    return over / total


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--training", default="", help=f"variants to train, with commas, of {', '.join(VARIANTS)}")
    options.add_argument("--steps", type=int, default=4000, help="of every training")
    a = options.parse_args()
    variants = [x for x in a.training.split(",") if x]
    if set(variants) - set(VARIANTS):
        options.error(f"--training {a.training}: variants are {', '.join(VARIANTS)}")
    model, tokenizer = load(a)
    probe = qkv.method("attention-sink-emergence", samples=32 if a.quick else 100)
    t0 = time.perf_counter()
    plays, prose = (probe.split(tokenizer, long_text(name)) for name in ("shakespeare", "britannica"))
    begin = tokenizer.bos_token_id
    sets = {
        "plays": plays,
        "encyclopaedia": prose,
        "random tokens": probe.random_texts(model),
        "plays after a begin token": [[begin, *row[:-1]] for row in plays],
        "one token repeated": [[row[0]] * probe.tokens for row in plays],
    }
    rows, reports = [], {}
    for name, ids in sets.items():
        reports[name] = report = probe.run(model, ids, activations=name == "plays")
        later = report.rate[1 : report.edge]
        rows.append({
            "text": name, "rate at 0 (%)": round(100 * float(report.rate[0]), 2),
            "highest rate later (%)": round(100 * float(later.max()), 2), "at": 1 + int(later.argmax()),
            "mean importance of 0": round(float(report.alpha[0]), 4), "texts": report.samples,
        })  # fmt: skip
        clock(str(rows[-1]), t0)
    report = reports["plays"]
    report.plot(f"{a.folder}/attention-sink-emergence.png")
    massive = report.activations
    control = shuffled_rate(model, plays, probe)
    by_layer = report.head_rate.values.mean(-1)
    middle = {n: round(float(getattr(massive, n).values.nanmedian()), 3) for n in ("value", "key", "first", "other")}
    deepest = int(massive.hidden[1:-1].argmax())
    figures = [
        Figure("sink rate at the first token, plays", rows[0]["rate at 0 (%)"], "%", "T = 64, threshold 0.3"),
        Figure("sink rate at the first token, random tokens", rows[2]["rate at 0 (%)"], "%"),
        Figure("highest rate at a later position, plays", rows[0]["highest rate later (%)"], "%", f"position {rows[0]['at']}"),
        Figure("highest rate at a later position, random tokens", rows[2]["highest rate later (%)"], "%",
               f"position {rows[2]['at']}"),
        Figure("rate with shuffled columns", round(100 * control, 2), "%", "control"),
        Figure("rank correlation of heads, plays and random tokens",
               round(report.head_alpha.spearman(reports["random tokens"].head_alpha), 3)),
        Figure("layers with a rate above one half", int((by_layer > 0.5).sum()), "", f"of {len(by_layer)}"),
        Figure("norm of the first hidden state over the others", round(float(massive.hidden[1:-1].max()), 1), "",
               f"largest, after layer {deepest}"),
        Figure("norm of the first value over the others", middle["value"], "", "median over heads"),
        Figure("norm of the first key over the others", middle["key"], "", "median over heads"),
        Figure("cosine of queries with the first key", middle["first"], "", "median over heads"),
        Figure("cosine of queries with later keys", middle["other"], "", "median over heads"),
    ]  # fmt: skip
    more = f" --training {a.training} --steps {a.steps}" if variants else ""
    figures += emergence(a, variants, a.steps, t0) if variants else []
    record("attention-sink-emergence", claim=probe.spec.shown, figures=figures, table=rows, seed=0, folder=a.folder,
           command=f"python benchmarks/real/attention_sink_emergence.py --device {a.device}{more}")  # fmt: skip
    for figure in figures:
        print(figure.name, figure.value, figure.unit, figure.note)


if __name__ == "__main__":
    main()
