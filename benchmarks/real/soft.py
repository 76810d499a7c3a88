"""SOFT on real images: the error of its landmarks, what it is worth against softmax, and its norm as pictures grow.

python benchmarks/real/soft.py [--device cuda]

Queries and values are those of trained models; keys are the queries, as published. Norms: the same photographs at more pixels,
a token for each 4 x 4 of them, one landmark for 4 tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from _vision import Choice, arguments, captured, compare, digits, fashion
from torch import Tensor

import qkv
from qkv.bench.record import Figure, record
from qkv.core.operator import Operator, OperatorSpec
from qkv.ops import soft
from qkv.ops._common.grids import Depthwise
from qkv.ops.soft import gaussian_attention, kernel, newton_inverse, newton_residual

MARKS = (4, 9, 16, 25, 49, 100, 196)


def _tied(q: Tensor, k: Tensor, v: Tensor, **call: Any) -> Tensor:
    return soft.fast(q, q, v, **{"causal": False} | call)


def _tied_exactly(q: Tensor, k: Tensor, v: Tensor, *, scale: float, padding: Tensor | None = None) -> Tensor:
    return gaussian_attention(q, v, scale=scale, padding=padding)


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Tied(Operator):
    """SOFT whose keys are its queries."""

    spec: ClassVar[OperatorSpec] = dataclasses.replace(
        soft.Soft.spec, id="soft-tied", reference=_tied, fast=_tied, causal="never", initial=None, step=None, extras={}
    )
    num_landmarks: int = 49
    grid: tuple[int, ...] | None = None
    normalise: str = "symmetric"


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Exact(Operator):
    """The exact Gaussian kernel, keys tied."""

    spec: ClassVar[OperatorSpec] = OperatorSpec(
        id="gaussian-tied",
        title="control",
        paper="control",
        reference=_tied_exactly,
        fast=_tied_exactly,
        causal="never",
    )


@torch.no_grad()
def errors(net, data, images: int) -> list[dict[str, Any]]:
    """Relative error against the exact kernel as landmarks are added, and whether Newton's iteration converged."""
    table = []
    held = [(q.double(), v.double()) for q, _, v, *_ in captured(net, data.held[:images])]
    for m in MARKS:
        gaps, random, residual = [], [], []
        for q, v in held:
            want = gaussian_attention(q, v)
            run = lambda x, y, q=q, v=v: qkv.method("soft", **y)(q, q, v, causal=False, **x)  # noqa: E731
            plain = {"num_landmarks": m, "grid": net.config.grid, "normalise": "plain", "newton_iters": 40}
            gaps.append(float((run({}, plain) - want).norm() / want.norm()))
            noise = torch.randn(
                q.shape[1], m, q.shape[-1], dtype=q.dtype, generator=torch.Generator().manual_seed(m)
            ).to(q)
            random.append(float((run({"landmarks": noise}, plain) - want).norm() / want.norm()))
            side, field = round(m**0.5), q.mT.unflatten(-1, net.config.grid).flatten(0, 1)
            marks = F.adaptive_avg_pool2d(field, side).flatten(2).mT
            own = kernel(marks, marks, q.shape[-1] ** -0.5)
            residual.append(float(newton_residual(own, newton_inverse(own)).max()))
        mean = lambda x: round(sum(x) / len(x), 5)  # noqa: E731
        table.append({"landmarks": m, "error, averages over the grid": mean(gaps), "error, drawn at random": mean(random),
                      "largest residual after 20 iterations": float(f"{max(residual):.3g}")})  # fmt: skip
        print(table[-1], flush=True)
    return table


@torch.no_grad()
def norms(data, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """Largest singular value of the map on photographs of several sizes, mean over 16 of them."""
    torch.manual_seed(0)
    weight = torch.randn(16, 32).to(data.held)
    table = []
    for size in sizes:
        x = F.interpolate(data.held[:16], size=(size, size), mode="bilinear")
        q = F.unfold(x, 4, stride=4).mT @ weight / 4  # [16, N, 32]
        side = size // 4
        row: dict[str, Any] = {"tokens": side * side}
        for normalise in ("plain", "symmetric"):
            q4 = q[:, None].double()
            eye = torch.eye(side * side, dtype=q4.dtype, device=q4.device).expand(16, 1, -1, -1)
            m = max(1, side // 2) ** 2
            method = qkv.method("soft", num_landmarks=m, grid=(side, side), normalise=normalise, newton_iters=40)
            whole = method(q4, q4, eye, causal=False)
            row[normalise] = round(float(torch.linalg.matrix_norm(whole, 2).mean()), 4)
        table.append(row)
        print(row, flush=True)
    return table


def main() -> None:
    """Train, measure, record."""
    a = arguments(__doc__)
    choices = [
        Choice("softmax", "full"),
        Choice("SOFT++, keys tied", Tied()),
        Choice("SOFT++, keys tied, with the convolution", Tied(), local=lambda c: Depthwise(c, 5)),
        Choice("SOFT without the normalisation", qkv.method("soft", normalise="plain")),
        Choice("SOFT++, keys of their own", "soft"),
        Choice("exact Gaussian, keys tied", Exact()),
    ]
    figures = []
    for data in (digits(a.device), fashion(a.device)):
        found = compare(choices if data.name == "digits" else choices[:4], data, a, steps=250)
        note = f"{data.tokens} tokens, 3 seeds, equal parameters and steps; tied keys leave one projection unread"
        figures += [Figure(f"accuracy, {data.name}, {n}", r.row["accuracy"], "", note) for n, r in found.items()]
    fine = fashion(a.device, patch=2)
    net = compare([Choice("exact Gaussian, keys tied", Exact())], fine, a, steps=300, seeds=1)[
        "exact Gaussian, keys tied"
    ].models[0]
    table = errors(net, fine, 4 if a.quick else 32)
    note = "196 tokens, relative to the exact kernel, queries of a trained model"
    for row in table:
        figures.append(Figure(f"error, {row['landmarks']} landmarks", row["error, averages over the grid"], "", note))
        figures.append(Figure(f"error, {row['landmarks']} random landmarks", row["error, drawn at random"], "", note))
    for row in norms(fine, (28, 56) if a.quick else (28, 56, 84, 112)):
        said = "largest singular value, one landmark for 4 tokens"
        figures += [Figure(f"norm, {row['tokens']} tokens, {n}", row[n], "", said) for n in ("plain", "symmetric")]
    claim = "near the exact kernel as landmarks are added; the normalisation bounds the map as a picture grows"
    record(
        "soft",
        claim=claim,
        figures=figures,
        table=table,
        command="python benchmarks/real/soft.py",
        seed=0,
        folder=a.folder,
    )
    for figure in figures:
        print(figure.name, figure.value)


if __name__ == "__main__":
    main()
