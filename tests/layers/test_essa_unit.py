"""The ESSA unit: its attention is the definition, its mixer sees its input, and it refuses what does not fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import qkv
from qkv.core.errors import InvalidInput, InvalidParameter
from qkv.layers.essa_unit import ESSAUnitModule, reference
from qkv.testing import close

C, GRID = 6, (3, 4)


def _built(setting: str = "essa-unit") -> tuple[ESSAUnitModule, Tensor]:
    torch.manual_seed(0)
    unit = qkv.method(setting).build(C, dtype=torch.float64).eval()
    return unit, torch.randn(2, 12, C, dtype=torch.float64)


def test_the_attention_is_the_definition() -> None:
    unit, x = _built()
    a = unit.attn
    want = reference(x, a.lnqkv.weight, a.lnqkv.bias, a.ln.weight, a.ln.bias)
    close(a(x), want, rtol=1e-12, what="one head")
    first = unit.mixer(torch.cat([y.mT.unflatten(2, GRID) for y in (a(unit.norm(x)), x)], 1))
    close(unit(x, GRID), x + first.flatten(2).mT, rtol=1e-12, what="the unit")


def test_padding_and_heads() -> None:
    unit, x = _built("essa-unit:heads=2")
    real = torch.arange(12) < torch.tensor([[12], [8]])
    close(unit.attn(x, real)[1:, :8], unit.attn(x[1:, :8]), rtol=1e-12, what="a padded row")


def test_dropout_is_for_training_and_everything_learns() -> None:
    unit, x = _built()
    close(unit(x, GRID), unit(x, GRID), what="evaluation")
    unit.train()
    assert (unit(x, GRID) - unit(x, GRID)).abs().max() > 0
    unit(x, GRID).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in unit.parameters())


def test_what_does_not_fit_is_refused() -> None:
    unit, x = _built()
    with pytest.raises(InvalidInput, match="12 tokens do not fill a grid"):
        unit(x, (3, 5))
    with pytest.raises(InvalidParameter, match="must divide the width 6"):
        qkv.method("essa-unit:heads=4").build(C)
