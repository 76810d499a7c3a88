"""TransMLA on SmolLM2: exact where it should be, what dropping rotation and rank cost, and what healing brings back.

    python benchmarks/real/transmla.py --device cuda [--steps 250]

Calibrates on prose and poems (the default calibration text), evaluates on plays that neither calibration nor healing has seen.
Healing is `qkv.distill.heal` with the conversion's own recipe but for its length, on other plays; it needs a GPU (on a CPU it is
left out unless --steps says how long). Decoding is timed on one CPU core wherever the rest runs.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

import qkv
from qkv.bench.assets import calibration_text, long_text, smollm2, text_tokens
from qkv.bench.record import Figure, record
from qkv.convert import transmla
from qkv.convert._common.attention import perplexity, softmax_scales
from qkv.convert._common.attention import record as record_moments
from qkv.convert.transmla import TransMLA
from qkv.distill import heal

SEED = 0
OFFSET = 200_000  # the plays' tokens from here on are held out
CLAIM = (
    "exact up to rounding at full rank with all RoPE kept; perplexity rises smoothly as the rank falls; RoRoPE far better than "
    "dropping RoPE on plain heads; levelling keys and values helps at half the cache and below, and costs a little above; "
    "healing the converted layers brings perplexity on unseen text back towards the source's"
)


@dataclass(frozen=True)
class Size:
    """How much of everything. rows, length: evaluation. calibration: rows, tokens. fold: rows of it on which the folds are
    compared. context, decoded: decoding time. heal_length, heal_batch: tokens of a row and rows of a step; heal_tokens: of text.
    """

    rows: int = 6
    length: int = 512
    calibration: tuple[int, int] = (64, 256)
    fold: int = 8
    context: int = 8192
    decoded: int = 12
    ranks: tuple[tuple[int, tuple[int, ...]], ...] = ((64, (320, 256, 192, 128, 64)), (32, (352, 256, 192, 128, 64)))
    healed: tuple[tuple[int, int], ...] = ((64, 128), (32, 64))  # half of the cache, a quarter
    heal_length: int = 512
    heal_batch: int = 16
    heal_tokens: int = 1_200_000


QUICK = Size(
    rows=2, length=96, calibration=(8, 96), fold=2, context=64, decoded=2, ranks=((64, (128,)),), healed=((64, 128),),
    heal_length=48, heal_batch=2, heal_tokens=2_000,
)  # fmt: skip


class Bench:
    """One model, one recording of its activations, any number of conversions."""

    def __init__(self, size: Size, device: str) -> None:
        self.size, self.device = size, device
        self.model, tokenizer = smollm2(device=device)
        every = tokenizer(calibration_text(), return_tensors="pt", verbose=False)["input_ids"][0]
        rows, length = size.calibration
        starts = torch.linspace(0, every.shape[0] - length, rows).long()
        chosen = torch.stack([every[s : s + length] for s in starts]).to(device)
        self.data = [{"input_ids": x} for x in chosen.split(8)]
        self.fold_data = [{"input_ids": chosen[:: rows // size.fold][: size.fold]}]
        count = size.rows * size.length
        self.text = text_tokens(tokenizer, count, offset=OFFSET).view(size.rows, size.length).to(device)
        prose = text_tokens(tokenizer, count, text=long_text("britannica"))
        self.prose = prose.view(size.rows, size.length).to(device)
        n, step = OFFSET + 10_000, size.heal_length
        ids = text_tokens(tokenizer, size.heal_tokens, offset=n)
        self.lessons = [{"input_ids": x} for x in ids[: len(ids) // step * step].split(step)]
        self.sites = qkv.sites(self.model)
        self.source = {s.name: self.model.get_submodule(s.name) for s in self.sites}
        self.scales = softmax_scales(self.model, self.sites, self.data[0], "benchmark")
        start = time.perf_counter()
        self.moments = record_moments(self.model, self.sites, self.data, "benchmark", queries=False)
        self.seconds = time.perf_counter() - start
        self.truth = [self.log_probs(self.model, row) for row in self.text]

    @staticmethod
    @torch.no_grad()
    def log_probs(model: Any, row: Tensor) -> Tensor:
        """Log-probabilities of every next token ``[T, V]``, kept in half precision."""
        return model(row[None], use_cache=False).logits[0].float().log_softmax(-1).half()

    def convert(self, method: TransMLA, fold: int, plain: bool = False, identity: bool = False) -> None:
        """Exchange every attention. plain: no RoRoPE, head 0 keeps its RoPE. identity: R is left out (full rank only)."""
        for s in self.sites:
            module, g, d = self.source[s.name], s.kv_heads, s.head_dim
            basis = None
            if plain:
                eye = torch.eye(g * fold, dtype=torch.float64, device=self.moments[s.name].kv.device)
                vectors = eye.expand(d // 2 // fold, -1, -1)
                basis = transmla.components(vectors, g, d, fold, method.rope_dim)
            shape, rho, tensors = method.assemble(s, module, self.moments[s.name], self.scales[s.name], fold, basis)
            if identity:
                kv = self.moments[s.name].kv
                t = transmla.components(transmla.rorope(kv[: g * d, : g * d], g, d, fold), g, d, fold, method.rope_dim)
                r = torch.eye(shape.kv_rank, dtype=torch.float64, device=t.device)
                tensors = transmla.weights(module, shape, t, r, rho, self.scales[s.name], None)
            like = {k: v.to(torch.float32).contiguous() for k, v in tensors.items()}
            transmla._put(self.model, s.name, transmla.converted_module(s, module, shape, like))

    def restore(self) -> None:
        """The source again."""
        for name, module in self.source.items():
            transmla._put(self.model, name, module)

    def measure(self, model: Any = None) -> dict[str, float]:
        """Perplexity, KL to the source in nats a token, and how often the likeliest token is the source's."""
        model = self.model if model is None else model
        nll = kl = agree = 0.0
        for row, truth in zip(self.text, self.truth, strict=True):
            got, want = self.log_probs(model, row).float(), truth.float()
            nll -= float(got[:-1].gather(-1, row[1:, None]).sum())
            kl += float((want.exp() * (want - got)).sum())
            agree += float((got.argmax(-1) == want.argmax(-1)).float().sum())
        n = self.text.numel()
        return {
            "perplexity": float(torch.tensor(nll / (n - self.size.rows)).exp()),
            "kl": kl / n,
            "top1": agree / n,
        }

    def scores(self, model: Any) -> dict[str, float]:
        """`measure`, and the perplexity on prose."""
        return self.measure(model) | {"prose": perplexity(model, [{"input_ids": self.prose}])}

    def fold(self, rope_dim: int) -> tuple[int, dict[int, float]]:
        """The fold of lowest perplexity on calibration text, doubled while it improves, with nothing cut."""
        found: dict[int, float] = {}
        fold = max(1, self.sites[0].head_dim // rope_dim)
        while fold <= self.sites[0].head_dim // 2:
            self.convert(TransMLA(rope_dim=rope_dim, kv_rank=384 - rope_dim, freqfold=fold), fold)
            found[fold] = perplexity(self.model, self.fold_data)
            if found[fold] > min(found.values()):
                break
            fold *= 2
        self.restore()
        return min(found, key=lambda f: found[f]), found


def exactness(bench: Bench) -> list[Figure]:
    """The public path: apply at full rank with all RoPE kept; then the full-rank model against the one without R."""
    row = bench.text[0]
    method = TransMLA(rope_dim=192, kv_rank=192, freqfold=1)
    with qkv.applied(bench.model, method, data=bench.data[:1]):
        got = bench.log_probs(bench.model, row).float()
    want = bench.truth[0].float()
    exact = float((want.exp() * (want - got)).sum(-1).mean())
    agree = float((got.argmax(-1) == want.argmax(-1)).float().mean())
    full = TransMLA(rope_dim=64, kv_rank=320, freqfold=8)
    outs = []
    for identity in (True, False):
        bench.convert(full, 8, identity=identity)
        with torch.no_grad():
            outs.append(bench.model(row[None], use_cache=False).logits)
    bench.restore()
    gap = float((outs[0] - outs[1]).abs().max() / outs[0].abs().max())
    tokens = bench.size.length
    note = f"rope_dim=192, kv_rank=192; float32, {tokens} held-out tokens"
    return [
        Figure("KL, all RoPE kept, full rank", exact, "nats/token", note),
        Figure("same likeliest token, all RoPE kept, full rank", agree, "", f"share of {tokens} held-out tokens"),
        Figure("largest logit gap, full rank against uncompressed", gap, "", "relative; rope_dim=64, kv_rank=320"),
    ]  # fmt: skip


@torch.no_grad()
def decoding(bench: Bench, method: str) -> tuple[float, int]:
    """Least milliseconds a token on the CPU, and cache bytes, with many tokens stored (random: time does not depend on them)."""
    model: Any = bench.model
    with qkv.applied(model, method, data=bench.data[:2]):
        model.to("cpu")
        token = torch.tensor([[5]])
        cache = model(token, use_cache=True).past_key_values
        for layer in cache.layers:
            tensors = {
                k: torch.randn(1, x.shape[1], bench.size.context, x.shape[3]) for k, x in layer.memory.tensors().items()
            }
            layer.memory.restore(tensors)
        times = []
        for _ in range(bench.size.decoded):
            start = time.perf_counter()
            model(token, past_key_values=cache, use_cache=True)
            times.append(time.perf_counter() - start)
        held = sum(x.numel() * x.element_size() for layer in cache.layers for x in layer.memory.tensors().values())
        model.to(bench.device)
    return min(times) * 1e3, held


def healing(bench: Bench, folds: dict[int, int], steps: int, runs: Path) -> tuple[list[dict[str, Any]], list[Figure]]:
    """Convert and heal by the public path, once for each size; rows of before and after, and figures."""
    size, source = bench.size, copy.deepcopy(bench.model)
    rows, figures = [], []
    for rope_dim, rank in size.healed:
        start = time.perf_counter()
        method = TransMLA(rope_dim=rope_dim, kv_rank=rank, freqfold=folds[rope_dim])
        with qkv.applied(bench.model, method, data=bench.data):
            done = heal(
                bench.model, source, bench.lessons, runs / f"{rope_dim}-{rank}", resume=True, evaluate=bench.scores,
                max_steps=steps, per_device_train_batch_size=size.heal_batch, logging_steps=max(1, steps // 6), seed=SEED,
                save_steps=steps, save_total_limit=1, use_cpu=bench.device == "cpu", bf16=bench.device != "cpu",
            )  # fmt: skip
        seconds = time.perf_counter() - start
        print(f"healing {rope_dim}, {rank}: {seconds:.0f} s", done, flush=True)
        share = round((rope_dim + rank) / 384, 3)
        for what, key in (("transmla, before healing", "untrained"), ("transmla, healed", "student")):
            found = {k: v for k, v in done.scores[key].items() if k != "prose"}
            rows.append(
                {"method": what, "rope_dim": rope_dim, "kv_rank": rank, "freqfold": folds[rope_dim], "cache": share}
                | found
            )
        tokens = steps * size.heal_batch * size.heal_length
        curve = ", ".join(f"{r['step']}: {r['loss']:.3f}" for r in done.records if "loss" in r)
        before = done.scores["untrained"]
        note = f"{tokens / 1e6:.1f} M tokens of other plays in {steps} steps; before: {before['perplexity']:.1f}"
        at = f"rope_dim={rope_dim}, kv_rank={rank}"
        prose = {k: x["prose"] for k, x in done.scores.items()}
        figures += [
            Figure(f"perplexity after healing, {at}", done.scores["student"]["perplexity"], "", note),
            Figure(f"KL after healing, {at}", done.scores["student"]["kl"], "nats/token",
                   f"to the source; before: {before['kl']:.3f}"),
            Figure(f"perplexity after healing on prose, {at}", prose["student"], "",
                   f"encyclopaedia, not healed on; before: {prose['untrained']:.1f}, source: {prose['teacher']:.1f}"),
            Figure(f"healing, {at}", seconds, "s", f"conversion and scores included; loss by step: {curve}"),
        ]  # fmt: skip
        gc.collect()
    return rows, figures


def arguments() -> argparse.Namespace:
    """--device, --quick, --steps, --runs, --folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="one size, few tokens, two steps of healing, for a look")
    parser.add_argument("--steps", type=int, help="steps of healing; default 250 on a GPU, none on a CPU")
    parser.add_argument("--runs", help="where the healing runs are kept; default runs/transmla/<device>")
    parser.add_argument("--folder", default=str(Path(__file__).resolve().parents[1] / "results" / "real"))
    a = parser.parse_args()
    if a.steps is None:
        a.steps = 2 if a.quick else 0 if a.device == "cpu" else 250
    return a


def main() -> None:
    a = arguments()
    torch.manual_seed(SEED)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    size = QUICK if a.quick else Size()
    began = time.perf_counter()
    bench = Bench(size, a.device)
    rows: list[dict[str, Any]] = []

    def row(what: str, rope_dim: int, rank: int, fold: int, full: int = 384) -> dict[str, float]:
        found = bench.measure()
        share = (rope_dim + rank) / full
        rows.append(
            {"method": what, "rope_dim": rope_dim, "kv_rank": rank, "freqfold": fold, "cache": round(share, 3)} | found
        )
        print(f"{time.perf_counter() - began:6.0f} s  {rows[-1]}", flush=True)
        return found

    base = row("source", 192, 192, 1)
    figures = [
        Figure("perplexity, source", base["perplexity"], "", f"{size.rows} windows of {size.length} tokens of plays")
    ]
    figures += exactness(bench)
    print(figures, flush=True)
    folds: dict[int, int] = {}
    for rope_dim, ranks in size.ranks:
        fold, tried = bench.fold(rope_dim)
        folds[rope_dim] = fold
        print(rope_dim, fold, tried, flush=True)
        note = ", ".join(f"{f}: {p:.1f}" for f, p in tried.items())
        figures.append(
            Figure(f"freqfold, rope_dim={rope_dim}", fold, "", f"perplexity on calibration text by fold: {note}")
        )
        for rank in ranks:
            bench.convert(TransMLA(rope_dim=rope_dim, kv_rank=rank, freqfold=fold), fold)
            found = row("transmla", rope_dim, rank, fold)
            figures.append(Figure(f"perplexity, rope_dim={rope_dim}, kv_rank={rank}", found["perplexity"]))
            if rope_dim == 64 and rank in (192, 128, 64):
                bench.convert(TransMLA(rope_dim=64, kv_rank=rank, freqfold=fold, balance=None), fold)
                found = row("unlevelled", 64, rank, fold)
                figures.append(Figure(f"perplexity, unlevelled, rope_dim=64, kv_rank={rank}", found["perplexity"]))
        collapse = 64 // rope_dim
        bench.convert(TransMLA(rope_dim=rope_dim, kv_rank=384 - rope_dim, freqfold=collapse), collapse, plain=True)
        found = row("plain heads", rope_dim, 384 - rope_dim, collapse)
        figures.append(
            Figure(f"perplexity, plain heads, rope_dim={rope_dim}", found["perplexity"], "", "no RoRoPE, nothing cut")
        )
    bench.restore()
    for name in ("full", "transmla:rope_dim=64,kv_rank=128,freqfold=2", "transmla:rope_dim=32,kv_rank=64,freqfold=4"):
        ms, held = decoding(bench, name)
        print(name, ms, held, flush=True)
        note = f"least of {size.decoded}, {size.context} tokens stored, float32, CPU, {torch.get_num_threads()} thread"
        figures.append(Figure(f"decoding, {name}", ms, "ms/token", note))
        figures.append(Figure(f"cache, {name}", held, "bytes", f"after {size.context + size.decoded} tokens"))
    if a.steps:
        runs = Path(a.runs or f"runs/transmla/{a.device}{'-quick' * a.quick}-{a.steps}")
        more, healed = healing(bench, folds, a.steps, runs)
        rows, figures = rows + more, figures + healed
    else:
        figures.append(
            Figure("healing", "not run", "", "every row is before healing; the recipe is TransMLA.spec.heal")
        )
    count, length = size.calibration
    figures.append(Figure("calibration", bench.seconds, "s", f"{count} rows of {length} tokens, recorded once"))
    figures.append(Figure("whole run", time.perf_counter() - began, "s", a.device))
    command = (
        "python benchmarks/real/transmla.py --device cuda"
        if a.device != "cpu"
        else "python benchmarks/real/transmla.py"
    )
    print(record("transmla", claim=CLAIM, figures=figures, command=command, seed=SEED, table=rows, folder=a.folder))


if __name__ == "__main__":
    main()
