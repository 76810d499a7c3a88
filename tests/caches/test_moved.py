"""Attention over blocks that are moved for every query: turned queries give what rotated keys give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qkv.caches._stores import moved
from qkv.core.cache import Rope

B, H, G, N, P, C, K, D, E = 2, 6, 3, 7, 5, 4, 3, 8, 6


def drawn(heads: int, k: int = K) -> dict[str, Tensor]:
    """Queries, a store with spare blocks that hold anything, some blocks for each query: one not read, the last not whole."""
    rng = torch.Generator().manual_seed(heads + k)
    keys, values = (torch.randn(B, G, (P + 2) * C, w, generator=rng, dtype=torch.float64) for w in (D, E))
    keys[:, :, P * C :], values[:, :, P * C :] = torch.nan, torch.nan
    index = torch.rand(B, heads, N, P, generator=rng).argsort(-1)[..., :k]
    tokens = torch.full_like(index, C)
    tokens[..., -1], tokens[..., 0] = 2, 0
    tokens[0, :, 3] = 0  # a query that reads nothing
    return {
        "q": torch.randn(B, H, N, D, generator=rng, dtype=torch.float64), "keys": keys, "values": values, "index": index,
        "tokens": tokens, "shift": torch.randint(-40, 40, index.shape, generator=rng),
    }  # fmt: skip


def by_keys(
    q: Tensor, keys: Tensor, values: Tensor, index: Tensor, tokens: Tensor, shift: Tensor, rope: Rope
) -> Tensor:
    """The definition: every query rotates its own keys."""
    out = torch.zeros(B, H, N, E, dtype=q.dtype)
    for row, head, n in ((r, h, n) for r in range(B) for h in range(H) for n in range(N)):
        a, near, worth = head * index.shape[1] // H, [], []
        for block, many, move in zip(*(x[row, a, n].tolist() for x in (index, tokens, shift)), strict=True):
            at = slice(block * C, block * C + many)
            near.append(rope.rotate(keys[row, head * G // H, at], torch.full((many,), move)))
            worth.append(values[row, head * G // H, at])
        if sum(map(len, near)):
            out[row, head, n] = (torch.cat(near) @ q[row, head, n] * D**-0.5).softmax(0) @ torch.cat(worth)
    return out


@pytest.mark.parametrize("rotated", [D, D // 2])
@pytest.mark.parametrize("heads", [H, G])
@pytest.mark.parametrize("form", ["in place", "gathered", "in pieces", "gathered in pieces"])
def test_turned_queries_are_rotated_keys(form: str, heads: int, rotated: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if "gathered" in form:
        monkeypatch.setattr(moved, "GATHERED", 0)
    if "pieces" in form:
        monkeypatch.setattr(moved, "PIECE", 2 * B * H * C * max(P, K * D))
    x, rope = drawn(heads), Rope(torch.rand(rotated // 2, generator=torch.Generator().manual_seed(1)))
    got = moved.attend_moved(**x, rope=rope, block=C, count=P, scale=D**-0.5)
    torch.testing.assert_close(got, by_keys(**x, rope=rope), rtol=0, atol=1e-6)  # angles are float32
    assert not got[0, :, 3].any() and got.isfinite().all()


@pytest.mark.parametrize("form", [0, 12])
def test_gradients_reach_the_queries(form: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moved, "GATHERED", form)
    x, rope = drawn(G, 2), Rope(torch.rand(D // 2, generator=torch.Generator().manual_seed(1)))
    x["q"].requires_grad_()
    moved.attend_moved(**x, rope=rope, block=C, count=P, scale=1.0).square().sum().backward()
    assert x["q"].grad is not None and x["q"].grad.isfinite().all() and x["q"].grad[1].abs().amin() > 0
