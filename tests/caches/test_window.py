"""The recent window: a budget that is a share reads a block as any policy does."""

from __future__ import annotations

import pytest
import torch

import qkv
from qkv.testing.caches import tiny


@torch.no_grad()
@pytest.mark.parametrize("budget", [1.0, 0.5, 0.3, 0.125])
def test_a_share_computes_the_prompt_exactly(budget: float) -> None:
    model = tiny()
    ids = torch.randint(1, 97, (2, 50), generator=torch.Generator().manual_seed(0))
    want = model(ids, use_cache=False).logits
    with qkv.applied(model, qkv.method("window", budget=budget)):
        got = model(ids, use_cache=True)
        assert got.past_key_values.layers[0].memory.kept() == int(50 * budget)
    torch.testing.assert_close(got.logits, want, rtol=0, atol=1e-9)
