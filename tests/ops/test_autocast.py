"""Operators under autocast: what a definition computes in float32 stays so, although autocast rounds the factors of products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import qkv
from qkv.core.operator import Operator
from qkv.ops import longvq, soft
from qkv.testing import mutant

torch.set_num_threads(1)
B, H, N, D = 2, 2, 96, 16
SIZES = {"b": B, "h": H, "g": H, "n": N, "m": N, "d": D, "e": D, "s": 24, "w": 24}


def draw(method: Operator, size: float) -> Any:
    """A call, bidirectional where there is such a form."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, H, N, D) for _ in range(3))
    spec = method.spec
    extras = {
        name: x.sample(*(SIZES.get(a, a) for a in x.axes.split("|")[0]))
        for name, x in spec.extras.items()
        if x.required
    }
    k = q if method.id == "ecoformer" else k
    return {"q": size * q, "k": size * k, "v": v, "causal": spec.causal == "only"} | extras


def error(method: Operator, size: float, autocast: bool = True) -> float:
    """Of a call under autocast, or with inputs in bfloat16 instead, against float32."""
    call = draw(method, size)
    want = method(**call)
    if not autocast:
        call |= {n: call[n].bfloat16() for n in "qkv"}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = method(**call)
    return float((got.float() - want).norm() / want.norm())


@pytest.mark.parametrize("size", [0.3, 1.0])
@pytest.mark.parametrize("name", [s.id for s in qkv.methods(kind="operator")])
def test_autocast_costs_what_bfloat16_costs(name: str, size: float) -> None:
    """Operators that choose keys by their scores choose others after any rounding: inputs in bfloat16 are the measure."""
    method = qkv.method(name)
    assert error(method, size) < max(0.02, 2 * error(method, size, autocast=False))


SPECS = qkv.methods(kind="operator")


@pytest.mark.parametrize(
    ("name", "causal"),
    [(s.id, s.causal == "only") for s in SPECS]  # type: ignore[attr-defined]
    + [(s.id, True) for s in SPECS if s.causal == "both" and not s.causal_needs],  # type: ignore[attr-defined]
)
def test_gradients_are_taken_after_autocast(name: str, causal: bool) -> None:
    """As trainers do it: the way in under autocast, the way back outside."""
    method = qkv.method(name)
    call = draw(method, 0.3) | {"causal": causal}

    def gradients(autocast: bool) -> list[Tensor | None]:
        leaves = {n: call[n].clone().requires_grad_() for n in "qkv"}
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = method(**(call | leaves))
        return list(torch.autograd.grad(out.float().square().sum(), tuple(leaves.values()), allow_unused=True))

    for got, want in zip(gradients(True), gradients(False), strict=True):
        if want is None:
            assert got is None
            continue
        assert got is not None and got.dtype == torch.float32
        assert float((got - want).norm()) <= 0.05 * float(want.norm())


@pytest.mark.parametrize(
    ("module", "cls", "names", "size", "least"),
    [(soft, soft.Soft, ("kernel", "newton_inverse"), 0.3, 0.05), (longvq, longvq.LongVQ, ("quantise",), 1.0, 0.015)],
)
def test_rounded_products_are_caught(
    module: Any, cls: Any, names: tuple[str, ...], size: float, least: float, monkeypatch: Any
) -> None:
    """Negative control: soft's inverse amplifies rounding where landmarks are near, longvq's keys get other codes."""
    for name in names:
        monkeypatch.setattr(module, name, getattr(module, name).__wrapped__)
    assert error(mutant(cls, fast=cls.spec.fast.__wrapped__)(), size) > least


@pytest.mark.parametrize("name", ["soft", "longvq"])
def test_steps_under_autocast_too(name: str) -> None:
    """Decoding under autocast goes on from a prefill under autocast as it does without."""
    method = qkv.method(name)
    call = draw(method, 0.3) | {"causal": True}
    for x in method.spec.causal_needs:
        call[x] = method.spec.extras[x].sample(H, 8, D)
    more = {n: x for n, x in call.items() if n not in ("q", "k", "v", "causal")}
    before, new = ([call[n][:, :, at] for n in "qkv"] for at in (slice(0, N - 1), slice(N - 1, N)))
    with torch.autocast("cpu", torch.bfloat16):
        _, state = method(*before, return_state=True, **more)
        got, _ = method.step(*new, state, **more)
    want = method(**call)[:, :, -1:]
    assert float((got - want).norm() / want.norm()) < 1e-4
