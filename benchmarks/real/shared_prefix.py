"""Shared prefixes on real text: one document, many questions; bytes, time and logits beside a plain cache, plain and captured.

python benchmarks/real/shared_prefix.py [--device cuda]
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from _streams import arguments, clock, load, tokens
from torch import Tensor

import qkv
from qkv.bench.record import Figure, record
from qkv.hosts.transformers import captured, fresh_cache

Batch = tuple[Tensor, Tensor]


def batch(tokenizer: Any, common: int, rows: int, tail: int, alike: bool) -> Batch:
    """Ids and mask ``[rows, common + 2 tail]``: a document (one for all if alike), then a row's own text; left-padded."""
    text = tokens(tokenizer, (rows + 1) * (common + 2 * tail), 20000)[0]
    width = common + 2 * tail
    ids, mask = torch.zeros(rows, width, dtype=torch.int64), torch.zeros(rows, width, dtype=torch.int64)
    for row in range(rows):
        own = tail + row * tail // rows
        start = 0 if alike else (row + 1) * width
        line = torch.cat((text[start : start + common], text[(row + 1) * width + common :][:own]))
        ids[row, width - len(line) :] = line
        mask[row, width - len(line) :] = 1
    return ids, mask


@torch.no_grad()
def run(model: Any, given: Batch, new: int) -> tuple[Tensor, float]:
    """Logits ``[rows, new, V]`` of the last `new` tokens, fed one by one behind the others, and the ms of a step (median)."""
    ids, mask = (x.to(model.device) for x in given)
    place = (mask.cumsum(-1) - 1).clamp(min=0)
    start, logits, spent = ids.shape[1] - new, [], []
    past = fresh_cache(model, start, room=ids.shape[1] + 1 if captured(model) else 0)
    for begin, end in ((0, start), *((i, i + 1) for i in range(start, ids.shape[1]))):
        since = now(model)
        out = model(
            input_ids=ids[:, begin:end], attention_mask=mask[:, :end], position_ids=place[:, begin:end],
            past_key_values=past, use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        if begin:
            spent.append(now(model) - since)
            logits.append(out.logits)
    return torch.cat(logits, 1).float(), statistics.median(
        spent[3:] or spent
    ) * 1e3  # the first ones grow, compile, capture


def now(model: Any) -> float:
    """Seconds, once the device has done what it was given."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def row(model: Any, given: Batch, new: int, method: str, base: Tensor | None) -> tuple[dict[str, Any], Tensor]:
    """What a cache costs, and its logits; base: those to compare with, else its own."""
    with qkv.applied(model, method):
        logits, plain = run(model, given, new)
        report = qkv.report(model)
    base = logits if base is None else base
    out: dict[str, Any] = {
        "bytes held (of full)": round(report.bytes / report.full_bytes, 4),
        "ms/step": round(plain, 2),
    }
    worst = (logits - base).abs().max()
    if model.device.type == "cuda":
        with qkv.applied(model, method, graph=True):
            again, replayed = run(model, given, new)
        out["ms/step, captured"] = round(replayed, 2)
        worst = torch.maximum(worst, (again - base).abs().max())
    out["largest difference of a logit"] = float(worst)
    out["same next token"] = float((logits.argmax(-1) == base.argmax(-1)).float().mean())
    return out, logits


def main() -> None:
    a = arguments(__doc__)
    model, tokenizer = load(a)
    common, rows, tail, new = (192, 3, 8, 6) if a.quick else (4096, 16, 64, 34)
    started, table = time.perf_counter(), []
    alike, apart = (batch(tokenizer, common, rows, tail, x) for x in (True, False))
    found, base = row(model, alike, new, "full", None)
    table.append({"cache": "plain cache"} | found)
    clock("plain cache", started)
    table.append({"cache": "shared prefix"} | row(model, alike, new, "shared-prefix", base)[0])
    clock("shared prefix", started)
    base, _ = run(model, apart, new)
    table.append({"cache": "shared prefix, documents that differ"} | row(model, apart, new, "shared-prefix", base)[0])
    clock("shared prefix, documents that differ", started)
    note = f"{rows} rows of {common} common and {tail} to {2 * tail} own tokens, device {a.device}, {a.dtype}"
    units = {"bytes held (of full)": "of the full cache", "ms/step": "ms", "ms/step, captured": "ms",
             "largest difference of a logit": ""}  # fmt: skip
    figures = [
        Figure(f"{name.removesuffix(' (of full)')}, {found['cache']}", found[name], unit, note)
        for found in table
        for name, unit in units.items()
        if name in found and not (found is table[0] and not unit)
    ]
    record("shared-prefix", claim="one copy of what the rows have in common, at the logits of a plain cache; nothing is "
           "taken for common in documents that differ", figures=figures, table=table,
           command="python benchmarks/real/shared_prefix.py", seed=0, folder=a.folder)  # fmt: skip
    for found in table:
        print(found)


if __name__ == "__main__":
    main()
