"""TransMLA on SmolLM2: exact where it should be, and what dropping rotation and rank cost before any healing.

    python benchmarks/real/transmla.py

Calibrates on prose and poems (the default calibration text), evaluates on plays that no calibration has seen. One core, about
ten minutes; writes benchmarks/results/real/transmla.json.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

import qkv
from qkv.bench.assets import calibration_text, smollm2, text_tokens
from qkv.bench.record import Figure, record
from qkv.convert import transmla
from qkv.convert._common.attention import perplexity, softmax_scales
from qkv.convert._common.attention import record as record_moments
from qkv.convert.transmla import TransMLA

SEED = 0
ROWS, LENGTH = 6, 512  # evaluation: 3,072 tokens
CALIBRATION = 64, 256  # 16,384 tokens, spread over the whole text
FOLD = 8  # rows of it on which the folds are compared
CONTEXT, STEPS = 8192, 12  # decoding time
CLAIM = (
    "exact up to rounding at full rank with all RoPE kept; perplexity rises smoothly as the rank falls; RoRoPE far better than "
    "dropping RoPE on plain heads; levelling keys and values helps at half the cache and below, and costs a little above"
)


class Bench:
    """One model, one recording of its activations, any number of conversions."""

    def __init__(self) -> None:
        self.model, tokenizer = smollm2()
        every = tokenizer(calibration_text(), return_tensors="pt", verbose=False)["input_ids"][0]
        rows, length = CALIBRATION
        starts = torch.linspace(0, every.shape[0] - length, rows).long()
        chosen = torch.stack([every[s : s + length] for s in starts])
        self.data = [{"input_ids": x} for x in chosen.split(8)]
        self.fold_data = [{"input_ids": chosen[:: rows // FOLD][:FOLD]}]
        self.text = text_tokens(tokenizer, ROWS * LENGTH, offset=200_000).view(ROWS, LENGTH)
        self.sites = qkv.sites(self.model)
        self.source = {s.name: self.model.get_submodule(s.name) for s in self.sites}
        self.scales = softmax_scales(self.model, self.sites, self.data[0], "benchmark")
        start = time.perf_counter()
        self.moments = record_moments(self.model, self.sites, self.data, "benchmark", queries=False)
        self.seconds = time.perf_counter() - start
        self.truth = [self.log_probs(row) for row in self.text]

    @torch.no_grad()
    def log_probs(self, row: Tensor) -> Tensor:
        """Log-probabilities of every next token ``[T, V]``, kept in half precision."""
        return self.model(row[None], use_cache=False).logits[0].float().log_softmax(-1).half()

    def convert(self, method: TransMLA, fold: int, plain: bool = False, identity: bool = False) -> None:
        """Exchange every attention. plain: no RoRoPE, head 0 keeps its RoPE. identity: R is left out (full rank only)."""
        for s in self.sites:
            module, g, d = self.source[s.name], s.kv_heads, s.head_dim
            basis = None
            if plain:
                vectors = torch.eye(g * fold, dtype=torch.float64).expand(d // 2 // fold, -1, -1)
                basis = transmla.components(vectors, g, d, fold, method.rope_dim)
            shape, rho, tensors = method.assemble(s, module, self.moments[s.name], self.scales[s.name], fold, basis)
            if identity:
                kv = self.moments[s.name].kv
                t = transmla.components(transmla.rorope(kv[: g * d, : g * d], g, d, fold), g, d, fold, method.rope_dim)
                r = torch.eye(shape.kv_rank, dtype=torch.float64)
                tensors = transmla.weights(module, shape, t, r, rho, self.scales[s.name], None)
            like = {k: v.to(torch.float32).contiguous() for k, v in tensors.items()}
            transmla._put(self.model, s.name, transmla.converted_module(s, module, shape, like))

    def restore(self) -> None:
        """The source again."""
        for name, module in self.source.items():
            transmla._put(self.model, name, module)

    def measure(self) -> dict[str, float]:
        """Perplexity, KL to the source in nats a token, and how often the likeliest token is the source's."""
        nll = kl = agree = 0.0
        for row, truth in zip(self.text, self.truth, strict=True):
            got, want = self.log_probs(row).float(), truth.float()
            nll -= float(got[:-1].gather(-1, row[1:, None]).sum())
            kl += float((want.exp() * (want - got)).sum())
            agree += float((got.argmax(-1) == want.argmax(-1)).float().sum())
        n = self.text.numel()
        return {
            "perplexity": float(torch.tensor(nll / (n - ROWS)).exp()),
            "kl": kl / n,
            "top1": agree / n,
        }

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
        got = bench.log_probs(row).float()
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
    return [
        Figure("KL, all RoPE kept, full rank", exact, "nats/token", "rope_dim=192, kv_rank=192; float32, 512 held-out tokens"),
        Figure("same likeliest token, all RoPE kept, full rank", agree, "", "share of 512 held-out tokens"),
        Figure("largest logit gap, full rank against uncompressed", gap, "", "relative; rope_dim=64, kv_rank=320"),
    ]  # fmt: skip


@torch.no_grad()
def decoding(bench: Bench, method: str) -> tuple[float, int]:
    """Least milliseconds a token, and cache bytes, with `CONTEXT` tokens stored (random rows: time does not depend on them)."""
    model = bench.model
    with qkv.applied(model, method, data=bench.data[:2]):
        token = torch.tensor([[5]])
        cache = model(token, use_cache=True).past_key_values
        for layer in cache.layers:
            tensors = {k: torch.randn(1, x.shape[1], CONTEXT, x.shape[3]) for k, x in layer.memory.tensors().items()}
            layer.memory.restore(tensors)
        times = []
        for _ in range(STEPS):
            start = time.perf_counter()
            model(token, past_key_values=cache, use_cache=True)
            times.append(time.perf_counter() - start)
        held = sum(x.numel() * x.element_size() for layer in cache.layers for x in layer.memory.tensors().values())
    return min(times) * 1e3, held


def main() -> None:
    torch.manual_seed(SEED)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    began = time.perf_counter()
    bench = Bench()
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
    figures = [Figure("perplexity, source", base["perplexity"], "", f"{ROWS} windows of {LENGTH} tokens of plays")]
    figures += exactness(bench)
    print(figures, flush=True)
    for rope_dim, ranks in ((64, (320, 256, 192, 128, 64)), (32, (352, 256, 192, 128, 64))):
        fold, tried = bench.fold(rope_dim)
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
        note = f"least of {STEPS}, {CONTEXT} tokens stored, float32, {torch.get_num_threads()} thread"
        figures.append(Figure(f"decoding, {name}", ms, "ms/token", note))
        figures.append(Figure(f"cache, {name}", held, "bytes", f"after {CONTEXT + STEPS} tokens"))
    figures.append(
        Figure("calibration", bench.seconds, "s", f"{CALIBRATION[0]} rows of {CALIBRATION[1]} tokens, recorded once")
    )
    figures.append(Figure("whole run", time.perf_counter() - began, "s", "one core"))
    figures.append(Figure("healing", "not run", "", "every row is before healing; the recipe is TransMLA.spec.heal"))
    folder = Path(__file__).resolve().parents[1] / "results" / "real"
    command = "python benchmarks/real/transmla.py"
    print(record("transmla", claim=CLAIM, figures=figures, command=command, seed=SEED, table=rows, folder=folder))


if __name__ == "__main__":
    main()
