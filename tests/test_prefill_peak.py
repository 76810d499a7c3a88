"""While a prompt is absorbed in one piece, at most one layer is dense: each compresses right after its own attention."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

import models
import qkv
from qkv.hosts.transformers_cache import QKVLayer

METHODS = [
    "snapkv:budget=8,window=4,kernel=3", "snapkv:budget=8,window=4,kernel=3,decode=evict", "pyramidkv:budget=8,window=4,kernel=3",
    "h2o:budget=8", "tova:budget=8", "knorm:budget=8", "lazyeviction:budget=8,window=4,sinks=2", "streamingllm:sinks=2,window=6",
    "adakv:scorer=knorm,budget=8", "kvcrush:budget=8", "kivi:bits=4,group=8,residual=16", "zipcache:regroup_every=8",
    "evict-pack:policy=knorm,budget=8,regroup_every=8",
]  # fmt: skip


def _prefill(method: str, chunks: int, monkeypatch: pytest.MonkeyPatch) -> tuple[list[list[int]], list[int], int]:
    """Bytes of every layer after each attention; layers whose dense keys outlive it; bytes of one dense layer."""
    model, n = models.make("llama", torch.float32), 96
    ids = torch.randint(0, 60, (1, n), generator=torch.Generator().manual_seed(0))
    alive: list[weakref.ref[Tensor]] = []
    held: list[list[int]] = []
    late: list[int] = []
    update = QKVLayer.update

    def noting(self: QKVLayer, key_states: Tensor, value_states: Tensor, *a: Any, **more: Any) -> tuple[Tensor, Tensor]:
        late.extend(i for i, ref in enumerate(alive) if ref() is not None)
        alive.append(weakref.ref(key_states))
        return update(self, key_states, value_states, *a, **more)

    monkeypatch.setattr(QKVLayer, "update", noting)
    with qkv.applied(model, method), torch.no_grad():
        cache = qkv.hosts.fresh_cache(model, n)

        def after(*_: Any) -> None:
            held.append([layer.memory.bytes() for layer in cache.layers])

        hooks = [m.register_forward_hook(after) for name, m in model.named_modules() if name.endswith("self_attn")]
        for part in ids.chunk(chunks, 1):
            model(part, past_key_values=cache)
        for hook in hooks:
            hook.remove()
        facts = cache.layers[0].memory.geometry  # type: ignore[attr-defined]
        return held, late, n * facts.kv_heads * (facts.head_dim + facts.value_dim) * 4


@pytest.mark.parametrize("method", METHODS)
def test_one_layer_at_a_time_is_dense(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held, late, dense = _prefill(method, 1, monkeypatch)
    end = held[-1]
    assert len(held) == len(end) > 1 and all(0 < x < 0.75 * dense for x in end), "it compresses"
    for i, now in enumerate(held):
        assert now == end[: i + 1] + [0] * (len(end) - i - 1), f"after layer {i}: its memory has its final size already"
    assert not late, "the dense keys of a layer are gone before the next layer is reached"
    assert max(map(sum, held)) + dense < len(end) * dense, "compressed cache and one dense layer, not all dense layers"


def test_pieces_of_a_prompt_are_held_by_policies_that_rank_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `Policy.whole_prompt` says; a policy that ranks what it holds stays small."""
    whole, _, dense = _prefill(METHODS[0], 4, monkeypatch)
    layers = len(whole[-1])
    assert max(map(sum, whole)) > 0.6 * layers * dense > sum(whole[-1])
    small, _, _ = _prefill("h2o:budget=8", 4, monkeypatch)
    assert max(map(sum, small)) < 0.3 * layers * dense
