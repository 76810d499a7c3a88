"""StreamingLLM and the plain window on a long real text: perplexity as the stream goes on.

python benchmarks/real/streamingllm.py [--device cuda]
"""

from __future__ import annotations

import time

import torch
from _streams import applied, arguments, clock, load, perplexity, stream, tokens

from qkv.bench.record import Figure, record


def main() -> None:
    a = arguments(__doc__)
    model, tokenizer = load(a)
    total = 2048 if a.quick else 16384
    chunk = 64  # small against the window; each chunk attends to what is kept and to itself
    ids, t0 = tokens(tokenizer, total), time.perf_counter()
    table: list[dict] = []

    def run(label: str, method: str | None, count: int = total, size: int = chunk) -> torch.Tensor:
        with applied(model, method):
            loss = stream(model, ids[:, :count], chunk=size)
        for start in range(0, count, 1024):
            part = loss[start : start + 1024]
            if len(part):
                table.append({"run": label, "tokens from": start, "perplexity": perplexity(part)})
        clock(f"{label}: {perplexity(loss[1024:] if count > 2048 else loss)}", t0)
        return loss

    sinks = {n: run(f"{n} sinks + {512 - n}", f"streamingllm:sinks={n},window={512 - n}") for n in (0, 1, 4)}
    window = run("window 512", "window:budget=512")
    dense = run("full", None, min(total, 10240), 512)
    wide = run("4 sinks + 1020", "streamingllm")
    late = slice(1024, None)
    figures = [
        Figure("perplexity, 4 sinks + 508", perplexity(sinks[4][late]), "", f"tokens 1024 to {total}"),
        Figure("perplexity, 0 sinks + 512", perplexity(sinks[0][late]), "", "the same tokens"),
        Figure("perplexity, window 512", perplexity(window[late]), "", "text positions, no sinks"),
        Figure("perplexity, 4 sinks + 1020", perplexity(wide[late]), "", "the defaults"),
        Figure("perplexity, full cache", perplexity(dense[1024:8192]), "", "tokens 1024 to 8192, inside the trained length"),
    ]  # fmt: skip
    if total > 9216:
        figures += [
            Figure("perplexity, full cache beyond 8192", perplexity(dense[8192:]), "", "tokens 8192 to 10240"),
            Figure("perplexity, 4 sinks + 508, same tokens", perplexity(sinks[4][8192:10240]), "", "tokens 8192 to 10240"),
        ]  # fmt: skip
    common = dict(command="python benchmarks/real/streamingllm.py", seed=0, folder=a.folder)
    record("streamingllm", claim="perplexity stays flat at constant memory, where a window without sinks breaks", figures=figures,
           table=table, **common)  # fmt: skip
    first, after = perplexity(window[:511]), perplexity(window[513:1537])
    record("window", claim="perplexity breaks as soon as the first token leaves the window",
           figures=[Figure("perplexity before the first eviction", first, "", "tokens 1 to 511"),
                    Figure("perplexity after it", after, "", "tokens 513 to 1536"),
                    Figure("perplexity, 4 sinks + 508, same tokens", perplexity(sinks[4][513:1537]), "", "")],
           **common)  # fmt: skip
    for f in figures:
        print(f"{f.name:44} {f.value}")


if __name__ == "__main__":
    main()
