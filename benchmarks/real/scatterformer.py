"""ScatterFormer on real sets of uneven size: edges of photographs in windows, paragraphs in one batch, points of clothes.

python benchmarks/real/scatterformer.py [--device cuda]

No package holds a point cloud of a street. The points are here pixels where a photograph's brightness changes (windows of 12 x
12) and the words of paragraphs; both are attended to as one list and as a batch padded to the longest, forward and backward.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _photos import photos
from _vision import Images, arguments, fashion
from torch import Tensor, nn

import qkv
from qkv.bench.assets import long_text
from qkv.bench.record import Figure, record
from qkv.ops.scatterformer import packed, window_segments

HEADS, WIDTH = 4, 32


def edges(images: dict[str, Tensor], most: int) -> tuple[Tensor, Tensor]:
    """Borders of the windows and features ``[T, 3]`` (brightness and its two slopes) of the steepest tenth of the pixels."""
    coords, features = [], []
    for i, x in enumerate(list(images.values())[:most]):
        grey = x.mean(0)
        down, right = (grey.diff(dim=d, append=grey.narrow(d, -1, 1)) for d in (0, 1))
        slope = down.square() + right.square()
        y, z = (slope > slope.flatten().kthvalue(int(0.9 * slope.numel())).values).nonzero().unbind(1)
        coords.append(torch.stack([torch.full_like(y, i), torch.zeros_like(y), y, z], 1))
        features.append(torch.stack([grey[y, z], down[y, z], right[y, z]], 1))
    found = window_segments(torch.cat(coords), 12)
    return found.cu_seqlens, torch.cat(features)[found.order]


def paragraphs(device: str, words: int) -> tuple[Tensor, Tensor]:
    """Borders of paragraphs and features ``[T, 3]`` of their words (length, first and last letter)."""
    lengths, features = [], []
    for part in re.split(r"\n\s*\n", long_text()):
        found = part.split()
        if found:
            lengths.append(len(found))
            features += [[len(w) / 8, ord(w[0]) / 128, ord(w[-1]) / 128] for w in found]
        if len(features) >= words:
            break
    borders = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device)
    return borders, torch.tensor(features, device=device).clamp(max=4.0)


def padded(q: Tensor, k: Tensor, v: Tensor, borders: Tensor) -> Tensor:
    """The same attention over a batch in which every segment is as long as the longest."""
    counts = borders.diff()
    real = torch.arange(int(counts.max()), device=q.device) < counts[:, None]  # [S, longest]
    q, k, v = (
        torch.zeros(*real.shape, *x.shape[1:], device=x.device).index_put((real,), x) for x in (q.relu(), k.relu(), v)
    )
    memory = torch.einsum("sthd,sthe->shde", k, F.pad(v, (0, 1), value=1.0))
    out = torch.einsum("sthd,shde->sthe", q, memory)[real]
    return out[..., :-1] / (out[..., -1:] + 1e-6)


def measured(run: Callable[..., Tensor], inputs: list[Tensor], times: int) -> tuple[Tensor, float, float]:
    """Output, median milliseconds forward and backward, and MB at the peak above the inputs (0 off CUDA)."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    cuda, spans, peak = leaves[0].is_cuda, [], 0.0
    out = run(*leaves)
    for _ in range(times):
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        since = time.perf_counter()
        torch.autograd.grad(run(*leaves).square().sum(), leaves)
        if cuda:
            torch.cuda.synchronize()
            peak = (torch.cuda.max_memory_allocated() - before) / 1e6
        spans.append(1e3 * (time.perf_counter() - since))
    return out.detach(), statistics.median(spans), peak


def uneven(name: str, borders: Tensor, features: Tensor, times: int) -> dict[str, Any]:
    """One row: the list against the padded batch."""
    rng = torch.Generator().manual_seed(0)
    maps = [torch.randn(3, HEADS * WIDTH, generator=rng).to(features) for _ in range(3)]
    inputs = [(features @ m).unflatten(1, (HEADS, WIDTH)) for m in maps]
    counts = borders.diff()
    ours, ms, mb = measured(lambda q, k, v: packed(q, k, v, borders), inputs, times)
    theirs, padded_ms, padded_mb = measured(lambda q, k, v: padded(q, k, v, borders), inputs, times)
    return {
        "sets": name, "tokens": len(features), "segments": len(counts), "longest": int(counts.max()),
        "padding waste": round(len(counts) * int(counts.max()) / len(features), 2),
        "ms": round(ms, 2), "ms padded": round(padded_ms, 2), "MB": round(mb, 1), "MB padded": round(padded_mb, 1),
        "largest difference": float((ours - theirs).abs().max() / theirs.abs().max()),
    }  # fmt: skip


class Classifier(nn.Module):
    """Two layers on the bright pixels of each picture, the mean over them, classes. `attend`: False removes the attention."""

    def __init__(self, attend: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 64), nn.Linear(64, 10)
        self.layers = nn.ModuleList(qkv.method("scatter-block", window=7).build(64) for _ in range(2))
        if not attend:
            for layer in self.layers:
                layer.attn.forward = lambda x, windows: torch.zeros_like(x)  # type: ignore[method-assign]

    def forward(self, images: Tensor) -> Tensor:
        """Logits of ``[B, 1, h, w]``."""
        row, _, y, x = (images > 0).nonzero().unbind(1)
        coords = torch.stack([row, torch.zeros_like(row), y, x], 1)
        tokens = self.first(torch.stack([images[row, 0, y, x], y / 14 - 1, x / 14 - 1], 1))
        windows = window_segments(coords, 7)
        for layer in self.layers:
            tokens = layer(tokens, coords, windows)
        total = torch.zeros(len(images), 64, device=images.device).index_add(0, row, tokens)
        return self.last(total / torch.bincount(row, minlength=len(images)).clamp(min=1)[:, None])


def classified(data: Images, attend: bool, steps: int, rows: int, held: int) -> float:
    """Accuracy on pictures held out after a short training."""
    torch.manual_seed(0)
    net = Classifier(attend).to(data.train.device)
    optimiser = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    rng = torch.Generator().manual_seed(0)
    for _ in range(steps):
        pick = torch.randint(len(data.train), (rows,), generator=rng).to(data.train.device)
        loss = F.cross_entropy(net(data.train[pick]), data.labels[pick])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        plan.step()
    net.eval()
    with torch.no_grad():
        found = torch.cat([net(x).argmax(-1) for x in data.held[:held].split(250)])
    return (found == data.held_labels[:held]).float().mean().item()


def main() -> None:
    """Measure, classify, record."""
    a = arguments(__doc__)
    times = 1 if a.quick else 20
    table = [
        uneven("edges of photographs in windows", *edges(photos(a.device), 1 if a.quick else 12), times),
        uneven("paragraphs of plays", *paragraphs(a.device, 2000 if a.quick else 100_000), times),
    ]
    steps, rows, held = (2, 4, 8) if a.quick else (300, 128, 5000)
    right = {n: classified(fashion(a.device), n == "with", steps, rows, held) for n in ("with", "without")}
    figures = []
    for row in table:
        note = f"{row['sets']}: {row['tokens']} tokens in {row['segments']} segments, the longest {row['longest']}"
        figures += [
            Figure(f"padding waste, {row['sets']}", row["padding waste"], "x", note),
            Figure(
                f"padded time over ours, {row['sets']}",
                round(row["ms padded"] / row["ms"], 2),
                "x",
                "forward and backward",
            ),
            Figure(f"largest difference, {row['sets']}", row["largest difference"], "relative", "float32"),
        ]
        if row["MB"]:
            figures.append(Figure(f"padded memory over ours, {row['sets']}", round(row["MB padded"] / row["MB"], 2), "x",
                                  "peak above the inputs"))  # fmt: skip
    figures += [Figure(f"accuracy {n} attention", round(x, 4), "", "Fashion-MNIST as points, windows of 7, one short training")
                for n, x in right.items()]  # fmt: skip
    record("scatterformer", claim="one list gives what a padded batch gives, with memory smaller by about the padding's share",
           figures=figures, table=table, command="python benchmarks/real/scatterformer.py", seed=0, folder=a.folder)  # fmt: skip
    for row in (*table, right):
        print(row)


if __name__ == "__main__":
    main()
