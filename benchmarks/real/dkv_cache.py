"""dKV-Cache on a masked-diffusion LM trained here on real text: agreement with the uncached model, time, and why it works.

python benchmarks/real/dkv_cache.py [--device cuda]

Trains for about a minute on a GPU (kept in runs/real, resumed when cut off); the text it generates on was not trained on.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch
from _streams import arguments, clock
from torch import Tensor

from qkv.bench.assets import long_text
from qkv.bench.record import Figure, record
from qkv.decode.dkv_cache import DelayedKVCache, Moment, masked_diffusion_generate
from qkv.models.language.masked_diffusion import MaskedDiffusionConfig, MaskedDiffusionLM, decode, everything
from qkv.models.language.training import HELD_OUT, Training, train


def trained(a) -> tuple[MaskedDiffusionLM, list[dict[str, float]], Tensor]:
    """The model, its records, and the bytes it never saw."""
    text = long_text()
    if a.quick:
        config = MaskedDiffusionConfig(width=64, layers=3, heads=4, kv_heads=2, length=128)
        how, text = Training(steps=60, batch=16, warmup=10, every=20, learning_rate=3e-3), text[:400_000]
    else:
        config = MaskedDiffusionConfig(width=512, layers=8, heads=8, kv_heads=8, length=512)
        how = Training(steps=1200, batch=64, every=200, learning_rate=8e-4, bf16=a.device.startswith("cuda"))
    t0 = time.perf_counter()
    out = Path("runs/real") / f"dkv-lm-{a.device}{'-quick' * a.quick}"
    model, records = train(
        config, text, out, how, device=a.device, progress=lambda d, n, note: clock(f"step {d} of {n}, {note}", t0)
    )
    data = torch.tensor(list(text.encode()))
    return model.to(getattr(torch, a.dtype)), list(records), data[data.numel() - data.numel() // HELD_OUT :]


def pieces(data: Tensor, rows: int, length: int) -> Tensor:
    """``[rows, length]``, evenly spread."""
    starts = torch.linspace(0, data.numel() - length, rows).long()[:, None]
    return data[starts + torch.arange(length)]


class Decisions:
    """How often a cached step takes the token that the whole model takes at the same place of the same text."""

    def __init__(self, model: MaskedDiffusionLM, canvas: Tensor) -> None:
        self.model, self.x, self.same, self.count = model, canvas, 0, 0

    def __call__(self, m: Moment) -> None:
        logits = self.model(self.x)
        logits[..., self.model.mask_token] = -torch.inf
        whole = logits.argmax(-1).gather(1, m.chosen)
        self.same += int((whole == m.tokens.gather(1, m.chosen)).sum())
        self.count += m.chosen.numel()
        self.x = m.tokens


def drift(model: MaskedDiffusionLM, prompt: Tensor, new: int, block: int) -> list[dict[str, float | str]]:
    """Mean cosine of a position's keys and values with those of one step before, by what happened to the position."""
    canvases = [torch.nn.functional.pad(prompt, (0, new), value=model.mask_token)]
    moments: list[Moment] = []

    def note(m: Moment) -> None:
        moments.append(m)
        canvases.append(m.tokens)

    masked_diffusion_generate(model, prompt, max_new_tokens=new, block=block, watch=note)
    sums: dict[str, list[Tensor]] = {"decoded before": [], "just decoded": [], "still masked": []}

    def run(x: Tensor) -> Tensor:
        seen = []

        def look(layer, q, k, v):
            seen.append(torch.stack((k, v)))
            return everything(layer, q, k, v)

        with torch.no_grad():
            model(x, None, look)
        return torch.stack(seen)  # [layers, 2, B, G, L, D]

    for i in range(0, len(moments), max(1, len(moments) // 16)):
        before, after = run(canvases[i]), run(canvases[i + 1])
        cosine = torch.cosine_similarity(before.float(), after.float(), dim=-1).mean(3)  # [layers, 2, B, L]
        m = moments[i]
        fresh = torch.zeros_like(m.known).scatter(1, m.chosen, True)
        for name, where in (("decoded before", m.known), ("just decoded", fresh), ("still masked", ~m.known & ~fresh)):
            if where.any():
                sums[name].append(cosine[:, :, where].mean((0, 2)))
    rows = []
    for name, found in sums.items():
        k, v = torch.stack(found).mean(0).tolist()
        rows.append({"position": name, "cosine of keys": round(k, 4), "cosine of values": round(v, 4)})
    return rows


def timed(a, times: int, make):
    """(result, median seconds)."""
    seconds = []
    for _ in range(times):
        if a.device.startswith("cuda"):
            torch.cuda.synchronize()
        t0 = time.perf_counter()
        out = make()
        if a.device.startswith("cuda"):
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - t0)
    return out, statistics.median(seconds)


def main() -> None:
    a = arguments(__doc__)
    model, records, data = trained(a)
    length = model.config.length
    new, rows, block, times = (length // 2, 8, 32, 1 if a.quick else 2)
    text = pieces(data, rows, length).to(a.device)
    prompt = text[:, : length - new]
    holes = torch.rand(text.shape, generator=torch.Generator().manual_seed(0)).argsort(1)[:, : length // 4]
    torn = text.scatter(1, holes.to(a.device), model.mask_token)
    caches: dict[str, DelayedKVCache | None] = {
        "none": None,
        "decode, refresh 4": DelayedKVCache(refresh=4),
        "decode, refresh 8": DelayedKVCache(refresh=8),
        "decode, refresh 16": DelayedKVCache(refresh=16),
        "decode, never, delay 1": DelayedKVCache(refresh=10_000),
        "decode, never, delay 0": DelayedKVCache(refresh=10_000, delay=0),
        "prefill": DelayedKVCache(variant="prefill"),
        "pd, refresh 8": DelayedKVCache(variant="pd", refresh=8),
        "none, random order": None,
        "greedy, refresh 2": DelayedKVCache(variant="greedy", refresh=2),
        "greedy, refresh 8": DelayedKVCache(variant="greedy", refresh=8),
    }
    base: dict[str, tuple[Tensor, Tensor, float]] = {}
    table, t0 = [], time.perf_counter()
    for name, cache in caches.items():
        random = "random" in name or "greedy" in name
        more = {"cache": cache, "order": "random" if random else "confidence", "seed": 0}
        made = {}
        for task, x, fresh, size in (("continue", prompt, new, block), ("fill", torn, 0, length // 4)):
            watch = Decisions(model, torch.nn.functional.pad(x, (0, fresh), value=model.mask_token))
            masked_diffusion_generate(model, x, max_new_tokens=fresh, block=size, watch=watch, **more)
            made[task] = watch

        def generate(more=more):
            return masked_diffusion_generate(model, prompt, max_new_tokens=new, block=block, **more)

        out, seconds = timed(a, times, generate)
        filled = made["fill"].x.gather(1, holes.to(a.device))
        if cache is None:
            base["random" if random else "sure"] = out.tokens, filled, seconds
        tokens, whole, full = base["random" if random else "sure"]
        table.append({
            "cache": name,
            "rows computed": round(out.notes["rows"] / out.notes["full_rows"], 4),
            "seconds": round(seconds, 3),
            "speed-up": round(full / seconds, 2),
            "decisions as uncached, fill-in": round(made["fill"].same / made["fill"].count, 4),
            "decisions as uncached, continued": round(made["continue"].same / made["continue"].count, 4),
            "tokens as uncached, fill-in": round(float((filled == whole).float().mean()), 4),
            "tokens as uncached, continued": round(float((out.tokens == tokens).float().mean()), 4),
            "fill-in right": round(float((filled == text.gather(1, holes.to(a.device))).float().mean()), 4),
        })  # fmt: skip
        clock(name, t0)
        print(table[-1], flush=True)
    moved = drift(model, prompt, new, block)
    for row in moved:
        print(row)
    print(decode(base["sure"][0][0]))
    by = {row["cache"]: row for row in table}
    setting = f"batch {rows}, length {length}, {new} bytes continued, blocks of {block}, one byte a step"
    fill = f"{length // 4} of {length} bytes masked anywhere, {rows} rows of text never trained on"
    figures = [Figure("held-out loss of the model trained here", round(records[-1]["held_out"], 4), "nats/byte",
                      f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {records[-1]['step']:.0f} steps, "
                      f"{records[-1]['seconds']:.0f} s")]  # fmt: skip
    for name in ("decode, refresh 4", "decode, refresh 8", "decode, never, delay 0"):
        figures.append(Figure(f"decisions as uncached, {name}", by[name]["decisions as uncached, fill-in"], "", fill))
    for name in ("decode, refresh 8", "pd, refresh 8", "greedy, refresh 8"):
        figures.append(Figure(f"speed-up, {name}", by[name]["speed-up"], "x", setting))
    figures += [Figure(f"cosine of keys, {r['position']}", r["cosine of keys"], "", "one step apart") for r in moved]
    record("dkv-cache", claim="at refresh 4 to 8 at least 95 % of the decisions of the uncached model, in a fraction of the time",
           figures=figures, table=table, command="python benchmarks/real/dkv_cache.py", seed=0, folder=a.folder)  # fmt: skip


if __name__ == "__main__":
    main()
