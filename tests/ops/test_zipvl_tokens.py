"""ZipVL in an encoder: how many and which tokens, attention among them, and a vision model that carries it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from transformers import ViTConfig, ViTModel

import qkv
from qkv.core.errors import InvalidParameter, Refused
from qkv.ops.zipvl_tokens import drawn, important
from qkv.testing import close
from qkv.testing._tiny import decoder

B, H, G, N, D = 2, 6, 3, 23, 8


def draw(seed: int = 0, scale: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, h, N, D, generator=gen, dtype=torch.float64) for h in (H, G, G))
    return q * scale, k, v


@pytest.mark.parametrize("tau", [0.05, 0.3, 0.5, 0.9, 0.975])
def test_the_set_is_the_smallest_that_holds_the_share(tau: float) -> None:
    q, k, _ = draw()
    chosen = important(q, k, scale=D**-0.5, tau=tau)
    mass, asked = drawn(q, k, scale=D**-0.5)
    torch.testing.assert_close(mass.sum(-1, keepdim=True), asked.double())
    for row in range(B):
        mine, count = mass[row].sort(descending=True).values, int(chosen[row].sum())
        assert float(mine[:count].sum()) >= tau * N * (1 - 1e-5) > float(mine[: count - 1].sum()) * (1 - 1e-5)
        assert set(chosen[row].nonzero().flatten().tolist()) == set(mass[row].topk(count).indices.tolist())


def test_more_share_is_more_tokens_and_all_of_it_is_all() -> None:
    q, k, v = draw()
    sets = [important(q, k, scale=D**-0.5, tau=t) for t in (0.2, 0.6, 0.9, 1.0)]
    for few, many in itertools.pairwise(sets):
        assert bool((few <= many).all())
    assert bool(sets[-1].all())
    got = qkv.attention(q, k, v, method="zipvl-tokens:tau=1.0", causal=False)
    close(got, qkv.attention(q, k, v, method="full", causal=False), atol=1e-12, what="tau = 1")


@pytest.mark.parametrize("tau", [0.3, 0.7, 0.95])
def test_flat_attention_needs_the_share_of_the_tokens_and_a_single_column_one(tau: float) -> None:
    _, k, _ = draw()
    flat = important(torch.zeros(B, H, N, D), torch.randn(B, G, N, D), scale=1.0, tau=tau)
    assert flat.sum(-1).tolist() == [math.ceil(tau * N)] * B
    k = torch.zeros(B, G, N, D)
    k[:, :, 5] = 50.0
    one = important(torch.ones(B, H, N, D), k, scale=1.0, tau=tau)
    assert one.nonzero()[:, 1].tolist() == [5] * B


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("probes", [4, 128])
def test_it_is_dense_attention_with_the_others_masked(dense: bool, probes: int) -> None:
    q, k, v = draw(1)
    padding = torch.ones(B, N, dtype=torch.bool)
    padding[0, :4], padding[1, -3:] = False, False
    method = qkv.method("zipvl-tokens", tau=0.6, probes=probes, dense_queries=dense)
    got = method(q, k, v, causal=False, padding=padding)
    chosen = important(q, k, scale=D**-0.5, padding=padding, tau=0.6, probes=probes)
    assert not bool((chosen & ~padding).any()) and 0 < int(chosen.sum()) < int(padding.sum())
    logits = q @ k.repeat_interleave(H // G, 1).mT * D**-0.5
    maps = logits.masked_fill(~chosen[:, None, None], -torch.inf).softmax(-1)
    want = maps @ v.repeat_interleave(H // G, 1)
    shown = padding if dense else chosen
    close(got * shown[:, None, :, None], want * shown[:, None, :, None], atol=1e-12, what="those that take part")
    if not dense:
        assert float(got.masked_select(~chosen[:, None, :, None]).abs().max()) == 0.0


@torch.no_grad()
def test_a_vision_model_carries_it() -> None:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=24, patch_size=4,
        initializer_range=0.3,
    )  # fmt: skip
    model, images = ViTModel(config).double().eval(), torch.randn(3, 3, 24, 24, dtype=torch.float64)
    want = model(images).last_hidden_state
    with qkv.applied(model, "zipvl-tokens:tau=1.0"):
        close(model(images).last_hidden_state, want, atol=1e-9, what="tau = 1")
    with qkv.applied(model, "zipvl-tokens:tau=0.5"):
        got = model(images).last_hidden_state
        assert qkv.report(model).calls == 2
        alone = model(images[1:2]).last_hidden_state
    assert float((got - want).abs().max()) > 1e-3
    close(alone, got[1:2], atol=1e-9, what="an image by itself")
    assert torch.equal(model(images).last_hidden_state, want)


def test_decoders_and_shares_that_are_none_are_refused() -> None:
    with pytest.raises(Refused, match="bidirectional and this attention is causal"):
        qkv.apply(decoder(), "zipvl-tokens")
    for tau in (0.0, 1.5):
        with pytest.raises(InvalidParameter, match=f"tau={tau}"):
            qkv.method("zipvl-tokens", tau=tau)
