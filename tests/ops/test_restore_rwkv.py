"""Bidirectional WKV: the published formula channel by channel, and what averages must keep."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import qkv
from qkv.core.errors import InvalidInput, InvalidParameter
from qkv.testing import close

B, C, T = 2, 5, 19


def _draw() -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, C, T, 1, generator=rng, dtype=torch.float64) for _ in range(3))
    w, u = (torch.randn(C, generator=rng, dtype=torch.float64) for _ in range(2))
    return {"q": torch.ones_like(q), "k": k, "v": v, "w": w, "u": u}


def _wkv(x: dict[str, Tensor], setting: str = "restore-rwkv", causal: bool = False, **changed: Tensor) -> Tensor:
    return qkv.attention(**(x | changed), method=setting, causal=causal)


@pytest.mark.parametrize("offset", [0, 1])
def test_a_channel_is_the_published_sum(offset: int) -> None:
    x = _draw()
    got = _wkv(x, f"restore-rwkv:distance_offset={offset},chunk_size=4")
    b, c = 1, 3
    k, v, w, u = x["k"][b, c, :, 0].tolist(), x["v"][b, c, :, 0].tolist(), x["w"][c].item(), x["u"][c].item()
    for t in range(T):
        weights = [math.exp(u + k[i] if i == t else k[i] - w * (abs(t - i) - offset)) for i in range(T)]
        want = sum(a * y for a, y in zip(weights, v, strict=True)) / sum(weights)
        assert abs(got[b, c, t, 0].item() - want) < 1e-12
    assert (got - _wkv(x, f"restore-rwkv:distance_offset={1 - offset}")).abs().max() > 1e-3


def test_averages_are_convex_and_see_only_differences_of_keys() -> None:
    x = _draw()
    out = _wkv(x)
    close(_wkv(x, k=x["k"] + 7), out, rtol=1e-12, what="all keys shifted")
    close(_wkv(x, v=torch.full_like(x["v"], 3.0)), torch.full_like(out, 3.0), rtol=1e-14, what="constant values")
    assert (out >= x["v"].amin(2, keepdim=True)).all() and (out <= x["v"].amax(2, keepdim=True)).all()


def test_without_distance_all_tokens_read_one_average_and_far_ones_vanish_with_it() -> None:
    x = _draw()
    none = torch.zeros(C, dtype=torch.float64)
    same = _wkv(x, w=none, u=none)
    close(same, (x["k"].softmax(2) * x["v"]).sum(2, keepdim=True).expand_as(same), rtol=1e-12, what="softmax average")
    near = _wkv(x, w=none + 60)[:, :, 5]
    three = {n: y[:, :, 4:7] for n, y in x.items() if y.ndim > 1} | {"w": none, "u": x["u"]}
    close(near, _wkv(three)[:, :, 1], rtol=1e-12, what="a token and its neighbours")


def test_both_directions_are_alike_and_one_is_not() -> None:
    x = _draw()
    flipped = {n: y.flip(2) if y.ndim > 1 else y for n, y in x.items()}
    close(_wkv(flipped).flip(2), _wkv(x), rtol=1e-12, what="flipped")
    assert (_wkv(flipped, causal=True).flip(2) - _wkv(x, causal=True)).abs().max() > 1e-2


def test_large_keys_stay_finite_in_float32() -> None:
    x = {n: y.float() for n, y in _draw().items()}
    big = x["k"].sign() * 300
    k = big.clone().requires_grad_()
    out = _wkv(x, k=k)
    out.sum().backward()
    assert out.isfinite().all() and k.grad is not None and k.grad.isfinite().all()
    close(
        out, _wkv({n: y.double() for n, y in x.items()}, k=big.double()), atol=4 * 300 * 2**-23, what="in float32"
    )  # keys are rounded to 300 eps


def test_a_key_of_minus_1e30_keeps_distances_and_padding_does_not() -> None:
    x = _draw()
    real = torch.arange(T) != 6
    k = x["k"].masked_fill(~real[:, None], -1e30)
    masked = _wkv(x, k=k)[:, :, real]
    gone = {n: y[:, :, real] if y.ndim > 1 else y for n, y in x.items()}
    padded = _wkv(x | {"padding": real.expand(B, T)})[:, :, real]
    close(padded, _wkv(gone), rtol=1e-12, what="padding")
    assert (masked - padded).abs().max() > 1e-3
    weights = (x["k"].unsqueeze(2) - x["w"][:, None, None, None] * _ages(T)).masked_fill(~real[:, None], -torch.inf)
    weights = torch.where(
        torch.eye(T, dtype=torch.bool)[..., None], (x["k"] + x["u"][:, None, None]).unsqueeze(2), weights
    )
    want = (weights.softmax(3) * x["v"].unsqueeze(2)).sum(3)[:, :, real]
    close(masked, want, rtol=1e-12, what="removed in place")


def _ages(n: int) -> Tensor:
    t = torch.arange(n, dtype=torch.float64)
    return ((t[:, None] - t).abs() - 1).unsqueeze(-1)


def test_what_does_not_fit_is_refused() -> None:
    x = _draw()
    with pytest.raises(InvalidInput, match="needs `u`"):
        _wkv({n: y for n, y in x.items() if n != "u"})
    with pytest.raises(InvalidParameter, match="distance_offset"):
        qkv.method("restore-rwkv:distance_offset=2")
