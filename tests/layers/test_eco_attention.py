"""EcoFormer's layer: nothing before a fit, the map written out, and the weights of a softmax layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qkv
from qkv.core.errors import InvalidInput, InvalidParameter, Refused
from qkv.layers.eco_attention import EcoAttentionModule, reference
from qkv.testing import close

B, N, C = 3, 30, 16


def _built(**settings: object) -> tuple[EcoAttentionModule, torch.Tensor]:
    torch.manual_seed(0)
    layer = qkv.method("eco-attention", heads=2, bits=5, anchors=8, **settings).build(C, dtype=torch.float64)
    return layer, torch.randn(B, N, C, dtype=torch.float64)


def test_it_works_after_a_fit_and_as_written_out() -> None:
    layer, x = _built()
    with pytest.raises(Refused, match="call fit"):
        layer(x)
    layer.fit(x, steps=3, generator=torch.Generator().manual_seed(0))
    close(layer(x), reference(layer, x), rtol=1e-9)
    padding = torch.arange(N).expand(B, N) < 25
    close(layer(x, padding=padding)[:, :25], layer(x[:, :25]), rtol=1e-9, what="padding")
    layer(x, causal=True).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_the_first_step_of_a_conversion_is_softmax_with_one_projection() -> None:
    layer, x = _built()
    query, key, value, out = (nn.Linear(C, C, dtype=torch.float64) for _ in range(4))
    layer.from_softmax(key, key, value, out, tie="mean").hashed = False
    q, v = (p(x).unflatten(-1, (2, -1)).transpose(1, 2) for p in (key, value))
    want = out(qkv.attention(q, q, v, causal=False).transpose(1, 2).flatten(2))
    close(layer(x), want, rtol=1e-9, what="queries were the keys: nothing changes")
    layer.from_softmax(query, key, value, out, tie="query")
    assert torch.equal(layer.qk.weight, query.weight)
    layer.from_softmax(query, key, value, out, tie="mean")
    close(layer.qk.bias, (query.bias + key.bias) / 2, rtol=1e-12)


def test_a_fit_travels_with_the_weights() -> None:
    layer, x = _built()
    layer.fit(x, steps=2)
    again, _ = _built()
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))


def test_weights_that_do_not_fit_are_refused() -> None:
    layer, _ = _built(bias=False)
    good, bad = nn.Linear(C, C, bias=False), nn.Linear(C, C)
    with pytest.raises(InvalidInput, match="value projection"):
        layer.from_softmax(good, good, bad, good)
    with pytest.raises(InvalidParameter, match="tie='both'"):
        layer.from_softmax(good, good, good, good, tie="both")  # type: ignore[arg-type]
    with pytest.raises(InvalidParameter, match="divide the width"):
        qkv.method("eco-attention", heads=3).build(16)
