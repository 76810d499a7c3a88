"""Shared prefixes on real text: one document, many questions; bytes, time and logits beside a plain cache.

python benchmarks/real/shared_prefix.py [--device cuda]
"""

from __future__ import annotations

import time
from typing import Any

import torch
from _streams import applied, arguments, clock, load, tokens
from torch import Tensor

import qkv
from qkv.bench.record import Figure, record

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
    """Logits ``[rows, new, V]`` of the last `new` tokens, fed one by one behind the others, and the ms of one step."""
    ids, mask = (x.to(model.device) for x in given)
    place = (mask.cumsum(-1) - 1).clamp(min=0)
    start = ids.shape[1] - new
    out = model(ids[:, :start], attention_mask=mask[:, :start], position_ids=place[:, :start], logits_to_keep=1)
    logits, past, t = [], out.past_key_values, 0.0
    for i in range(start, ids.shape[1]):
        if i == start + 2:
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            t = time.perf_counter()
        out = model(
            ids[:, i : i + 1], attention_mask=mask[:, : i + 1], position_ids=place[:, i : i + 1], past_key_values=past
        )
        logits.append(out.logits)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return torch.cat(logits, 1).float(), (time.perf_counter() - t) / (new - 2) * 1e3


def main() -> None:
    a = arguments(__doc__)
    model, tokenizer = load(a)
    common, rows, tail, new = (192, 3, 8, 4) if a.quick else (4096, 16, 64, 34)
    started, table, base = time.perf_counter(), [], torch.empty(0)
    for label, method, alike in (
        ("plain cache", "window:budget=1.0", True),
        ("shared prefix", "shared-prefix", True),
        ("shared prefix, documents that differ", "shared-prefix", False),
    ):
        given = batch(tokenizer, common, rows, tail, alike)
        if not alike:
            base, _ = run(model, given, new)
        with applied(model, method):
            logits, spent = run(model, given, new)
            report = qkv.report(model)
        base = logits if label == "plain cache" else base
        table.append(
            {
                "cache": label,
                "bytes held (of full)": round(report.bytes / report.full_bytes, 4),
                "ms/step": round(spent, 2),
                "largest difference of a logit": float((logits - base).abs().max()),
                "same next token": float((logits.argmax(-1) == base.argmax(-1)).float().mean()),
            }
        )
        clock(label, started)
    note = f"{rows} rows of {common} common and {tail} to {2 * tail} own tokens, device {a.device}, {a.dtype}"
    figures = []
    for row in table:
        figures.append(Figure(f"bytes held, {row['cache']}", row["bytes held (of full)"], "of the full cache", note))
        figures.append(Figure(f"ms/step, {row['cache']}", row["ms/step"], "ms", note))
        if row is not table[0]:
            figures.append(Figure(f"largest difference of a logit, {row['cache']}", row["largest difference of a logit"], "",
                                  note))  # fmt: skip
    record("shared-prefix", claim="one copy of what the rows have in common, at the logits of a plain cache; nothing is "
           "taken for common in documents that differ", figures=figures, table=table,
           command="python benchmarks/real/shared_prefix.py", seed=0, folder=a.folder)  # fmt: skip
    for row in table:
        print(row)


if __name__ == "__main__":
    main()
