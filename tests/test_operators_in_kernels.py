"""Operators over the decayed core reach its kernel: outputs, states and gradients are those of their fast forms.

Through Triton's interpreter on any machine, on the device where there is one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import qkv
from interpreter import DEVICE, INTERPRETED, direct, interpreted
from qkv.core.errors import Refused

pytest.importorskip("triton")

SETTINGS = [
    "lightning2", "lightning:layers=3", "lightning:layer=1,layers=3,slopes=flat", "lightnet:z_init=zero", "flow",
    "based", "based:order=1,eps=30.0", "essa:order=2", "essa:key_norm=none",
]  # fmt: skip


def test_operators_are_checked_through_the_interpreter() -> None:
    """The checks below, in a process of their own: the interpreter is chosen when Triton is imported."""
    interpreted(__file__, "is_the_fast_form")


def _inputs(setting: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    rng = torch.Generator().manual_seed(0)
    tensors = [torch.randn(*s, generator=rng).to(DEVICE) for s in ((2, 2, 21, 6), (2, 1, 21, 6), (2, 1, 21, 5))]
    extras = {"slopes": torch.rand(2, generator=rng).to(DEVICE)} if setting == "lightning2" else {}
    return tensors, extras


@direct
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_kernel_is_the_fast_form(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row padded on the left, a state handed over in the middle, gradients of everything."""
    from qkv.kernels import decayed

    if INTERPRETED:
        monkeypatch.setattr(decayed, "CHUNK", 16)
    tensors, extras = _inputs(setting)
    real = torch.arange(21, device=DEVICE) >= torch.tensor([[3], [0]], device=DEVICE)
    found = {}
    for form in ("fast", "kernel"):
        leaves = [x.clone().requires_grad_() for x in (*tensors, *extras.values())]
        given = dict(zip(extras, leaves[3:], strict=True))
        how: dict[str, Any] = {"method": setting, "form": form, "return_state": True, **given}
        first, state = qkv.attention(*(x[:, :, :9] for x in leaves[:3]), padding=real[:, :9], **how)
        last, end = qkv.attention(*(x[:, :, 9:] for x in leaves[:3]), padding=real[:, 9:], initial_state=state, **how)
        out = torch.cat([first, last], 2) * real[:, None, :, None]
        grads = torch.autograd.grad(out.sin().sum() + sum(t.float().sum() for t in end.tensors.values()), leaves)
        found[form] = {"out": out, **end.tensors, **{f"gradient {i}": g for i, g in enumerate(grads)}}
        assert end.seen == 21 and end.owner == qkv.method(setting).id
    for name, want in found["fast"].items():
        size = want.abs().max().clamp(min=1.0).item()
        torch.testing.assert_close(
            found["kernel"][name], want, rtol=0, atol=3e-5 * size, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(("setting", "width", "why"), [("based", 32, "561"), ("lightning:layers=2", 200, "400"),
                                                       ("gla", 300, "300"), ("essa:order=2", 129, "258")])  # fmt: skip
def test_what_a_kernel_does_not_take_is_said_and_left_to_the_fast_form(setting: str, width: int, why: str) -> None:
    x = torch.randn(1, 1, 3, width, device=DEVICE)
    extras = {"log_decay": -torch.ones(1, device=DEVICE)} if setting == "gla" else {}
    with pytest.raises(Refused, match=f"width up to 256, here {why}.*form='fast'"):
        qkv.attention(x, x, x, method=setting, form="kernel", **extras)
    same = [qkv.attention(x, x, x, method=setting, form=form, **extras) for form in ("auto", "fast")]
    assert torch.equal(*same)
    method = qkv.method(setting)
    assert "float64" in (method.kernel_limit(x[..., :4].double(), x, x[..., :4]) or "")
    assert method.kernel_limit(x[..., :4], x[..., :4], x[..., :4]) is None
