"""A generation loop's own attention in place of the model's: exact, refused where it would bypass a method, gone afterwards."""

from __future__ import annotations

import pytest
import torch

import qkv
from qkv.core.attend import sdpa
from qkv.core.errors import Refused, StateError
from qkv.hosts import attending
from qkv.testing._tiny import decoder, snapshot

IDS = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(0))


def plain(site, q, k, v, scale):
    return sdpa(q, k, v, causal=True, scale=scale)


@torch.no_grad()
def test_the_same_attention_gives_the_same_logits_and_leaves_no_trace():
    model = decoder()
    before, want = snapshot(model), model(IDS, use_cache=False).logits
    with attending(model, plain) as sites:
        got = model(IDS, attention_mask=torch.ones_like(IDS), use_cache=False).logits
    assert [s.layer for s in sites] == [0, 1, 2, 3, 4]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert snapshot(model) == before
    assert torch.equal(model(IDS, use_cache=False).logits, want)


@torch.no_grad()
def test_it_reaches_only_the_sites_asked_for():
    model, seen = decoder(), []

    def look(site, q, k, v, scale):
        seen.append((site.layer, tuple(q.shape), tuple(k.shape)))
        return plain(site, q, k, v, scale)

    with attending(model, look, where=[1, 3]):
        model(IDS, use_cache=False)
    assert seen == [(1, (2, 6, 9, 8), (2, 3, 9, 8)), (3, (2, 6, 9, 8), (2, 3, 9, 8))]


@pytest.mark.parametrize("method", ["streamingllm", "sliding-window"])
def test_a_method_is_not_bypassed(method):
    model = qkv.apply(decoder(), method)
    with pytest.raises(Refused, match=r"carries .*bypass"), attending(model, plain):
        pass
    assert qkv.revert(model) is model


@torch.no_grad()
def test_a_cache_of_qkv_is_refused_and_a_loop_inside_a_loop_too():
    model = qkv.apply(decoder(), "full")
    with attending(model, plain), pytest.raises(Refused, match=r"another loop|full"), attending(model, plain):
        pass
    with attending(model, plain), pytest.raises(StateError, match="use_cache=False"):
        model(IDS, use_cache=True)
