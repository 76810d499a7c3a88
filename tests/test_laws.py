"""Every registered method, every form it claims, every law that applies: one body."""

from __future__ import annotations

import pytest
import torch

from qkv.core.errors import BrokenLaw
from qkv.testing import Case, Law, pairs


def _parameters() -> list:
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    out = []
    for device in devices:
        gpu = [pytest.mark.gpu] if device == "cuda" else []
        for pair in pairs(device=device):
            why = pair.deviation
            known = [pytest.mark.xfail(reason=why, strict=True, raises=BrokenLaw)] if why else []
            name = pair.id if device == "cpu" else f"{pair.id}@{device}"
            out.append(pytest.param(pair.law, pair.case, id=name, marks=[*gpu, *known]))
    return out


@pytest.mark.parametrize(("law", "case"), _parameters())
def test_law(law: Law, case: Case) -> None:
    law.run(case)
