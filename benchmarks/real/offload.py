"""Offload on real text: the same logits as a cache on the device, what stays on the device, and what the bus and the disk cost.

python benchmarks/real/offload.py [--device cuda]
"""

from __future__ import annotations

import tempfile
import time

import torch
from _streams import applied, arguments, clock, load, losses, perplexity, tokens

import qkv
from qkv.bench.record import Figure, record


def main() -> None:
    a = arguments(__doc__)
    model, tokenizer = load(a)
    length, new = (512, 4) if a.quick else (7936, 64)
    ids, started, rows, base = tokens(tokenizer, length + new, 20000), time.perf_counter(), [], torch.empty(0)
    cuda = a.device.startswith("cuda")
    with tempfile.TemporaryDirectory() as folder:
        names = {"on the device": None, "host memory": "offload", "file": f"offload:folder={folder}"}
        for name, method in names.items():
            with applied(model, method):
                losses(model, ids[:, : length // 2 + 2], prompt=length // 2, chunk=1)  # warm
                if cuda:
                    torch.cuda.synchronize()
                    weights = torch.cuda.memory_allocated()
                peak, spent = 0, 0.0
                with torch.no_grad():
                    out = model(ids[:, :length].to(model.device), use_cache=True, logits_to_keep=1)
                    logits = [out.logits]
                    if cuda:
                        torch.cuda.synchronize()
                        torch.cuda.reset_peak_memory_stats()
                    t = time.perf_counter()
                    for i in range(length, length + new):
                        out = model(
                            ids[:, i : i + 1].to(model.device), past_key_values=out.past_key_values, use_cache=True
                        )
                        logits.append(out.logits)
                    if cuda:
                        torch.cuda.synchronize()
                        peak = torch.cuda.max_memory_allocated() - weights
                    spent = (time.perf_counter() - t) / new * 1e3
                report = qkv.report(model)
            every = torch.cat(logits, 1)[0].float()
            base = every if method is None else base
            loss = torch.nn.functional.cross_entropy(every[:-1], ids[0, length:].to(every.device), reduction="none")
            rows.append(
                {
                    "cache": name,
                    "perplexity": perplexity(loss.cpu()),
                    "largest difference of a logit": float((every - base).abs().max()),
                    "bytes held (of full)": round(report.bytes / report.full_bytes, 4),
                    "peak on the device while decoding (of full)": round(peak / report.full_bytes, 4),
                    "ms/token": round(spent, 2),
                }
            )
            del out
            clock(name, started)
    note = f"{new} tokens decoded after a prompt of {length}, device {a.device}, {a.dtype}"
    figures = []
    for row in rows:
        figures.append(Figure(f"ms/token, {row['cache']}", row["ms/token"], "ms", note))
        if row["cache"] != "on the device":
            figures.append(
                Figure(f"largest difference of a logit, {row['cache']}", row["largest difference of a logit"], "", note)
            )
        if cuda:
            figures.append(Figure(f"peak memory of decoding, {row['cache']}", row["peak on the device while decoding (of full)"],
                                  "of the full cache", note))  # fmt: skip
    record("offload", claim="the logits of the full model with two layers' histories on the device, at the cost of the bus",
           figures=figures, table=rows, command="python benchmarks/real/offload.py", seed=0, folder=a.folder)  # fmt: skip
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
