"""TidalDecode's repair of the cache: decoded tokens run again densely have the keys and values of the full model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import models
import qkv

SPARSE = "tidaldecode:budget=6,dense_layers=0,reselect=0"


def _decoded(method: str | None, padded: bool, beams: bool) -> tuple[int, list[Tensor]]:
    """How many repairs 30 tokens in a block and 9 single ones brought, and the keys of all layers after them."""
    model = models.make("llama")
    ids = torch.randint(3, 60, (2, 39), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 39, dtype=torch.long)
    if padded:
        mask[1, :5] = 0
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    with qkv.applied(model, method or "full"), torch.no_grad():
        cache = qkv.hosts.fresh_cache(model, 30)
        for at in (slice(0, 30), *(slice(t, t + 1) for t in range(30, 39))):
            model(
                input_ids=ids[:, at],
                attention_mask=mask[:, : at.stop],
                position_ids=position[:, at],
                past_key_values=cache,
            )
            if beams and at.stop == 34:  # rows change places: so do the tokens that will be run again
                cache.reorder_cache(torch.tensor([1, 0]))
                ids, mask, position = ids.flip(0), mask.flip(0), position.flip(0)
        repair = model.__dict__["_qkv"].repair
        return (0 if repair is None else repair.repairs), [layer.memory.tensors()["keys"] for layer in cache.layers]


@pytest.mark.parametrize(
    ("padded", "beams"), [(False, False), (True, False), (False, True)], ids=["even", "padded", "beams"]
)
def test_repaired_tokens_are_those_of_the_full_model(padded: bool, beams: bool) -> None:
    _, want = _decoded(None, padded, beams)
    none, polluted = _decoded(SPARSE, padded, beams)
    count, got = _decoded(f"{SPARSE},correct_every=4", padded, beams)
    assert none == 0 and count == 2

    def rows(keys: Tensor, slots: bool) -> list[Tensor]:
        starts = [0, 5 if padded and not slots else 0]
        return [keys[i, :, s:][:, : 38 - (5 if padded and i else 0)] for i, s in enumerate(starts)]

    worst = 0.0
    for full, ours, theirs in zip(want, got, polluted, strict=True):
        for a, b, c in zip(rows(full, False), rows(ours, True), rows(theirs, True), strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=1e-9)  # the last token has not been run again yet
            worst = max(worst, float((c - a).abs().max()))
    assert worst > 1e-6, "without the repair they differ"


def test_generate_reverts_and_refusals() -> None:
    model, x = models.make("llama"), models.inputs("llama", rows=2)
    before, known = set(model.__dict__), dict(x)
    settings: dict[str, Any] = {"max_new_tokens": 14, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with qkv.applied(model, f"{SPARSE},correct_every=3"):
        a = model.generate(**known, **settings)
        assert model.__dict__["_qkv"].repair.repairs == 4
        b = model.generate(**known, **settings, num_beams=2)
        count = model.__dict__["_qkv"].repair.repairs
        twin = copy.deepcopy(model)
        assert torch.equal(twin.generate(**known, **settings), a)
        assert twin.__dict__["_qkv"].repair.repairs == count + 4 and model.__dict__["_qkv"].repair.repairs == count
    assert set(model.__dict__) == before and a.shape[1] == b.shape[1] == known["input_ids"].shape[1] + 14
    with qkv.applied(model, "tidaldecode:budget=1.0,correct_every=3"):
        assert torch.equal(model.generate(**known, **settings), model.generate(**known, **settings))
