"""Patterns inside a model: plain `generate` in every way people call it, and training."""

from __future__ import annotations

import pytest
import torch

import models
import qkv
from qkv.testing import close

torch.set_num_threads(1)
WINDOW = "sliding-window:window=9,sinks=2,block_size=8"
SELECTOR = "xattention:stride=2,block_size=8,threshold=0.6"
EXACT = ["sliding-window:window=1000", "xattention:stride=2,block_size=8,threshold=1.0"]


@pytest.fixture(scope="module")
def llama():
    return models.make("llama").eval()


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of 44 tokens, the first with 13 tokens of padding on the left."""
    ids = torch.randint(3, 60, (2, 44), generator=torch.Generator().manual_seed(1))
    real = torch.ones_like(ids)
    real[0, :13] = 0
    return ids.masked_fill(real == 0, 0), real


def generated(model, ids: torch.Tensor, real: torch.Tensor, **call) -> torch.Tensor:
    out = model.generate(
        ids, attention_mask=real, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0, **call
    )
    return out[:, ids.shape[1] :]


@pytest.mark.parametrize("name", [WINDOW, SELECTOR])
def test_a_padded_row_is_the_row_alone(llama, name: str) -> None:
    ids, real = prompts()
    with qkv.applied(llama, name):
        both = generated(llama, ids, real)
        for row in range(2):
            own = real[row].bool()
            alone = generated(llama, ids[row : row + 1, own], real[row : row + 1, own])
            assert torch.equal(both[row : row + 1], alone)


@pytest.mark.parametrize("name", [WINDOW, SELECTOR, *EXACT])
def test_ways_to_decode_agree(llama, name: str) -> None:
    ids, real = (x[1:, 4:] for x in prompts())  # 40 tokens: chunks of 8 and 16 cut where blocks end
    with qkv.applied(llama, name):
        plain = generated(llama, ids, real)
        for call in ({"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 8}, {"prefill_chunk_size": 16}):
            assert torch.equal(generated(llama, ids, real, **call), plain), call


@pytest.mark.parametrize("name", EXACT)
def test_limits_change_no_token(llama, name: str) -> None:
    ids, real = prompts()
    full = generated(llama, ids, real)
    with qkv.applied(llama, name):
        assert torch.equal(generated(llama, ids, real), full)


@pytest.mark.parametrize("name", [WINDOW, SELECTOR])
def test_decoding_is_the_prefill_of_a_window(llama, name: str) -> None:
    ids, real = (x[1:] for x in prompts())
    with qkv.applied(llama, name), torch.no_grad():
        whole = llama(ids, attention_mask=real, use_cache=False).logits
        start = llama(ids[:, :40], use_cache=True)
        steps, cache = [], start.past_key_values
        for i in range(40, 44):
            out = llama(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
            cache, steps = out.past_key_values, [*steps, out.logits]
        if name is WINDOW:  # a selector decodes densely
            close(torch.cat(steps, 1), whole[:, 40:], rtol=1e-6, atol=1e-6)
        close(start.logits, whole[:, :40], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [WINDOW, SELECTOR])
def test_training_step(llama, name: str) -> None:
    ids, real = prompts()
    with qkv.applied(llama, name):
        llama(ids, attention_mask=real, labels=ids.masked_fill(real == 0, -100)).loss.backward()
    grads = [p.grad for p in llama.parameters()]
    llama.zero_grad()
    assert all(g is not None and bool(g.isfinite().all()) for g in grads)
    assert all(bool(g.any()) for g in grads)
