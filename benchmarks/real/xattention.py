"""XAttention on real text: the attention mass its blocks hold against other choices of equal density, perplexity, passkey.

python benchmarks/real/xattention.py [--device cuda] [--quick]

On a GPU 2 x 4096 tokens are read, on a CPU 2048, with --quick 1024.

q and k are taken at every site of the model as it reads, after the position embedding. For each stride and threshold the
other selectors keep as many blocks as XAttention kept, per head and query block, first and diagonal block included: blocks by
mean-pooled q and k, random blocks, and the best possible ones. Mass: the share of the true attention that falls into the kept
blocks, mean over queries, heads and layers.
"""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from _streams import applied, arguments, clock, load, perplexity, tokens
from torch import Tensor

from qkv.bench.assets import long_text
from qkv.bench.record import Figure, record
from qkv.bench.tasks._task import Bench, Settings
from qkv.bench.tasks.passkey import cases, number
from qkv.core.pattern import Pattern, PatternSpec
from qkv.core.plan import BlockPlan
from qkv.hosts import observe
from qkv.patterns._common.execute import execute_plan
from qkv.patterns.xattention import XAttention, reference

SIZE = 128
STRIDES, THRESHOLDS = (4, 8, 16, 32), (0.5, 0.7, 0.8, 0.9, 0.95)


def true_mass(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Attention of each query block to each key block ``[H, Qb, Kb]``, mean over its queries: q ``[1, H, N, D]``."""
    h, n = q.shape[1:3]
    k = k[0].repeat_interleave(h // k.shape[1], 0)
    out = q.new_zeros(h, n // SIZE, n // SIZE)
    for u in range(n // SIZE):
        top = u * SIZE
        logits = q[0, :, top : top + SIZE] @ k[:, : top + SIZE].mT * scale
        future = torch.ones(SIZE, SIZE, dtype=torch.bool, device=q.device).triu(1)
        logits[..., top:].masked_fill_(future, -torch.inf)
        out[:, u, : u + 1] = logits.softmax(-1).unflatten(-1, (u + 1, SIZE)).sum(-1).mean(1)
    return out


def best(scores: Tensor, like: Tensor) -> Tensor:
    """As many blocks as `like` keeps in each row, the best by scores ``[H, Qb, Kb]``, first and diagonal block forced."""
    size = scores.shape[-1]
    device = scores.device
    forced = torch.eye(size, dtype=torch.bool, device=device) | (torch.arange(size, device=device) == 0)
    past = torch.ones(size, size, dtype=torch.bool, device=device).tril()
    rank = scores.masked_fill(forced, torch.inf).masked_fill(~past, -torch.inf).argsort(-1, descending=True).argsort(-1)
    return (rank < like.sum(-1, keepdim=True)) & past


def pooled(q: Tensor, k: Tensor) -> Tensor:
    """Products of mean-pooled query and key blocks ``[H, Qb, Kb]``."""
    k = k[0].repeat_interleave(q.shape[1] // k.shape[1], 0)
    return q[0].unflatten(1, (-1, SIZE)).mean(2) @ k.unflatten(1, (-1, SIZE)).mean(2).mT


def masses(model, ids: Tensor) -> tuple[list[dict], list[dict]]:
    """A row per stride and threshold, and a row per layer at stride 8, threshold 0.9."""
    found: dict = defaultdict(lambda: defaultdict(list))
    layers: list[dict] = []
    rng = torch.Generator().manual_seed(0)

    def look(site, call) -> None:
        q, k = call.q.float(), call.k.float()
        true, pool = true_mass(q, k, call.scale), pooled(q, k)
        chance = torch.rand(true.shape, generator=rng).to(true.device)
        for stride in STRIDES:
            for tau in THRESHOLDS:
                plan = XAttention(stride=stride, block_size=SIZE, threshold=tau).plan(q, k, scale=call.scale)
                kept = plan.blocks()[0]
                to = found[stride, tau]
                to["density"].append(plan.density)
                rivals = {"mean-pooled blocks": pool, "random blocks": chance, "best blocks": true}
                choices = {"XAttention": kept} | {name: best(s, kept) for name, s in rivals.items()}
                for name, chosen in choices.items():
                    to[name].append(float((true * chosen).sum(-1).mean()))
                if (stride, tau) == (8, 0.9):
                    layers.append({"layer": site.geometry.layer, "density": plan.density, "mass": to["XAttention"][-1]})

    with observe(model, look), torch.no_grad():
        model(ids.to(model.device), use_cache=False, logits_to_keep=1)
    rows = [
        {"stride": s, "threshold": t} | {name: round(sum(x) / len(x), 4) for name, x in columns.items()}
        for (s, t), columns in found.items()
    ]
    return rows, layers


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomBlocks(Pattern):
    """Negative control: as many blocks as XAttention keeps, at random."""

    spec: ClassVar[PatternSpec] = PatternSpec(
        id="random-blocks",
        title="Negative control",
        paper="control",
        reference=reference,
        execute=execute_plan,
        dynamic=True,
    )

    def plan(self, q: Tensor, k: Tensor, *, scale: float | None = None, causal: bool = True,
             padding: Tensor | None = None) -> BlockPlan:  # fmt: skip
        kept = XAttention().plan(q, k, scale=scale).blocks()[0]
        chance = torch.rand(kept.shape, generator=torch.Generator().manual_seed(1)).to(kept.device)
        return BlockPlan.from_blocks(
            best(chance, kept)[None], block=SIZE, queries=q.shape[2], keys=k.shape[2], causal=True
        )


@torch.no_grad()
def loss(model, ids: Tensor, method: object) -> tuple[Tensor, float]:
    """Loss of every token read in one prefill ``[T - 1]``, and the seconds it took."""
    ids = ids.to(model.device)
    with applied(model, method):
        since = time.perf_counter()
        logits = model(ids, use_cache=False).logits[0, :-1]
        rows = F.cross_entropy(logits.float(), ids[0, 1:], reduction="none").cpu()
        return rows, time.perf_counter() - since


def passkey(model, tokenizer, context: int, methods: dict, depths: tuple[float, ...]) -> dict[str, float]:
    """Share of the keys that are read back by each method: prompt and question in one prefill, greedy."""
    bench = Bench(model, tokenizer, "", Settings(depths=depths), (context,))
    right: dict[str, list[bool]] = {name: [] for name in methods}
    for case in cases(bench, context):
        ids = torch.cat((case.haystack, case.question))[None].to(model.device)
        for name, method in methods.items():
            with applied(model, method), torch.no_grad():
                made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
            right[name].append(number(tokenizer.decode(made[0, ids.shape[1] :])) == case.key)
        print(f"passkey at depth {case.depth}:", {name: x[-1] for name, x in right.items()}, flush=True)
    return {name: sum(x) / len(x) for name, x in right.items()}


def main() -> None:
    a = arguments(__doc__)
    model, tokenizer = load(a)
    context, windows = (1024, 1) if a.quick else (4096, 2) if a.device != "cpu" else (2048, 1)
    depths = (0.2, 0.6) if a.quick else (0.1, 0.3, 0.5, 0.7, 0.9)
    long_text()
    t0 = time.perf_counter()
    rows, layers = masses(model, tokens(tokenizer, context, 20000))
    clock("attention mass", t0)
    for row in rows:
        print(row, flush=True)
    by = {(r["stride"], r["threshold"]): r for r in rows}
    at = by[8, 0.9]
    window = max(SIZE, round(at["density"] * context / 2))  # keys of a window with as much area
    methods: dict[str, object] = {"full": None}
    methods |= {f"xattention, threshold {t}": f"xattention:threshold={t}" for t in (0.8, 0.9, 0.95)}
    methods |= {"xattention, stride 16": "xattention:stride=16", "random blocks": RandomBlocks(),
                f"window {window} + 4 sinks": f"sliding-window:window={window}"}  # fmt: skip
    read: dict[str, list[Tensor]] = {name: [] for name in methods}
    for i in range(windows):
        ids = tokens(tokenizer, context, 20000 + i * 50000)
        for name, method in methods.items():
            read[name].append(loss(model, ids, method)[0])
            clock(f"{name}, window {i + 1} of {windows}, perplexity {perplexity(read[name][-1])}", t0)
    found = {name: perplexity(torch.cat(x)) for name, x in read.items()}
    late = {name: perplexity(torch.cat([y[-context // 2 :] for y in x])) for name, x in read.items()}
    few = {
        n: methods[n]
        for n in ("full", "xattention, threshold 0.9", "xattention, threshold 0.95", f"window {window} + 4 sinks")
    }
    keys = passkey(model, tokenizer, context // 2, few, depths)
    clock("passkey", t0)
    note = f"{windows} x {context} tokens read in one prefill"
    figures = [Figure(f"perplexity, {name}", value, "", note) for name, value in found.items()]
    figures += [Figure(f"perplexity of the second half, {name}", value, "", note) for name, value in late.items()]
    names = ("density", "XAttention", "mean-pooled blocks", "random blocks", "best blocks")
    figures += [
        Figure("density at stride 8, threshold 0.9" if n == "density" else f"attention mass held, {n}", at[n], "",
               f"{context} tokens, mean over {len(layers)} layers, stride 8, threshold 0.9") for n in names
    ]  # fmt: skip
    figures += [
        Figure(f"passkeys read back, {n}", x, "", f"{len(depths)} depths at {context // 2} tokens")
        for n, x in keys.items()
    ]
    spread = [layer["density"] for layer in layers]
    figures.append(
        Figure("density of the sparsest and densest layer", f"{min(spread):.3f} and {max(spread):.3f}", "", "")
    )
    for tau in (0.9, 0.95):
        over = found[f"xattention, threshold {tau}"] / found["full"] - 1
        figures.append(Figure(f"perplexity above full, threshold {tau}", round(100 * over, 2), "%", note))
    record(
        "xattention",
        claim="holds more of the true attention than mean-pooled or random blocks of equal density, and reads back passkeys "
        "that a window of equal density loses",
        figures=figures,
        table=rows,
        command="python benchmarks/real/xattention.py",
        seed=0,
        folder=a.folder,
    )
    for figure in figures:
        print(figure.name, figure.value)


if __name__ == "__main__":
    main()
