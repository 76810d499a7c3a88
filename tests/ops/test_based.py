"""Based: the feature map, its limits, its layout."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import qkv
from qkv.core.errors import InvalidParameter
from qkv.ops.based import based_layout, features, key_features, query_features
from qkv.testing import close

B, H, N, D, E = 2, 2, 37, 8, 5


def _draw(size: float = 1.0) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, H, N, w, generator=rng, dtype=torch.float64) for w in (D, D, E))
    return [size * q, size * k, v]


def test_features_multiply_to_the_expansion() -> None:
    q, k, _ = _draw()
    for order in (1, 2):
        s = q @ k.mT / math.sqrt(D)
        got = query_features(q, D**-0.5, order) @ key_features(k, order).mT
        close(got, 1 + s + (s * s / 2 if order == 2 else 0), rtol=1e-10, what=f"order {order}")
    assert got.min() >= 0.5
    assert features(16) == 153 == key_features(torch.zeros(16)).shape[-1]


def test_unpacked_features_are_the_same_kernel() -> None:
    q, k, _ = _draw()
    pairs = [torch.einsum("...a,...b->...ab", x, x).flatten(-2) / math.sqrt(2 * D) for x in (q, k)]
    phi = [torch.cat([torch.ones_like(x[..., :1]), x / D**0.25, y], -1) for x, y in zip((q, k), pairs, strict=True)]
    close(phi[0] @ phi[1].mT, query_features(q, D**-0.5) @ key_features(k).mT, rtol=1e-10, what="packed")


def test_rows_of_the_map_sum_to_one() -> None:
    q, k, v = _draw()
    close(qkv.attention(q, k, torch.ones_like(v), method="based"), torch.ones_like(v), rtol=1e-10, what="sums")


def test_small_scores_give_softmax_and_a_running_mean() -> None:
    q, k, v = _draw(1e-9)
    mean = v.cumsum(2) / torch.arange(1, N + 1)[:, None]
    close(qkv.attention(q, k, v, method="based"), mean, atol=1e-11, what="running mean up to eps")
    q, k, v = _draw(0.3)
    s = (q @ k.mT) / math.sqrt(D)
    assert ((s.exp() - 1 - s - s * s / 2).abs() <= s.abs() ** 3 / 6 * s.abs().exp() + 1e-15).all()
    gap = lambda x: (x - qkv.attention(q, k, v, method="full")).abs().max()  # noqa: E731
    elu = torch.tril(
        (F.elu(q) + 1) @ (F.elu(k) + 1).mT
    )  # the control: features of the same width that do not expand exp
    assert gap(qkv.attention(q, k, v, method="based")) < 0.1 * gap(elu / elu.sum(-1, keepdim=True) @ v)


def test_layout_of_the_released_model() -> None:
    layout = based_layout(27)
    assert [i for i, x in enumerate(layout) if x == "linear"] == [1, 6, 11, 16, 21]
    assert [i for i, x in enumerate(layout) if x == "window"] == [2, 7, 12, 17, 22]
    assert len(layout) == 27
    with pytest.raises(InvalidParameter, match="layers=0"):
        based_layout(0)
    with pytest.raises(InvalidParameter, match="order"):
        qkv.method("based:order=3")
