"""A pattern and a cache at the same sites: what they compute together, and which pairs are refused before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import models
import qkv
from qkv.core.errors import Refused
from qkv.core.pattern import packed_past, read_mask

torch.set_num_threads(1)
EXACT = "xattention:stride=2,block_size=4,threshold=1.0"
LENGTHS = (33, 12, 3)
CACHES = [
    "h2o:budget=9", "tova:budget=9", "knorm:budget=9", "snapkv:budget=9,window=4,kernel=3", "kivi:group=4,residual=8",
    "streamingllm:sinks=2,window=7", "quest:budget=9,block_size=3,dense_layers=1", "recycled:budget=9,stride=4",
    "tidaldecode:budget=9,dense_layers=0,reselect=0", "kvcrush:budget=9", "offload", "shared-prefix:min_tokens=3",
    "retrievalattention:sinks=2,recent=4,top_k=3,ef=4,degree=3,near=5,rebuild=4,keep_queries=2",
    'razorattention:sinks=2,min_buffer=5,ratio=4.0,heads=["0.1","1.1"]',
]  # fmt: skip


@pytest.fixture(scope="module")
def llama() -> Any:
    model = models.make("llama").eval()
    for x in model.parameters():  # the usual start is so small that every token follows from the last
        if x.ndim == 2:
            x.data.mul_(6)
    return model


def prompts() -> tuple[Tensor, Tensor]:
    """Rows of very different lengths, padded on the left."""
    ids = torch.randint(3, 96, (3, max(LENGTHS)), generator=torch.Generator().manual_seed(1))
    real = (torch.arange(max(LENGTHS)) >= max(LENGTHS) - torch.tensor(LENGTHS)[:, None]).long()
    return ids.masked_fill(real == 0, 0), real


@torch.no_grad()
def generated(model: Any, ids: Tensor, real: Tensor, **more: Any) -> Any:
    what = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None} | more
    return model.generate(ids, attention_mask=real, return_dict_in_generate=True, output_logits=True, **what)


def conversations(model: Any) -> dict[str, Tensor]:
    """Logits of a batch at once, in pieces, and going on; and of one row that goes on."""
    ids, real = prompts()
    out = {"at once": generated(model, ids, real).logits}
    out["in pieces"] = generated(model, ids, real, prefill_chunk_size=8).logits
    for name, rows in (("going on", slice(0, 3)), ("one row goes on", slice(0, 1))):
        first = generated(model, ids[rows], real[rows])
        longer = torch.cat((first.sequences, prompts()[0][:1, :9].expand(len(first.sequences), -1)), 1)
        mask = torch.cat((real[rows], real.new_ones(len(longer), longer.shape[1] - real.shape[1])), 1)
        out[name] = generated(model, longer, mask, past_key_values=first.past_key_values).logits
    return {name: torch.stack(x) for name, x in out.items()}


@pytest.mark.parametrize("cache", CACHES)
def test_a_selector_that_keeps_everything_changes_nothing(llama: Any, cache: str) -> None:
    """Whatever order the slots of a cache are in, and wherever some of them are empty."""
    with qkv.applied(llama, cache):
        want = conversations(llama)
    with qkv.applied(llama, EXACT, cache):
        got = conversations(llama)
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, rtol=0, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("cache", [*CACHES, 'adakv:budget=9,scorer="snapkv:window=4,kernel=3"'])
def test_a_padded_row_is_the_row_alone(llama: Any, cache: str) -> None:
    ids, real = prompts()
    with qkv.applied(llama, "xattention:stride=2,block_size=8,threshold=0.6", cache):
        both = torch.stack(generated(llama, ids, real).logits)
        for row, n in enumerate(LENGTHS):
            alone = torch.stack(generated(llama, ids[row : row + 1, -n:], real[row : row + 1, -n:]).logits)
            torch.testing.assert_close(both[:, row], alone[:, 0], rtol=0, atol=1e-8)


WINDOW = "sliding-window:window=6,sinks=2,block_size=4"


@pytest.mark.parametrize(
    "cache", [*(c for c in CACHES if c.split(":")[0] not in ("offload", "shared-prefix")), "window:budget=9"]
)
def test_a_window_does_not_go_by_the_order_of_slots(llama: Any, cache: str) -> None:
    for pair in ((WINDOW, cache), (cache, WINDOW)):
        plan = qkv.plan(llama, *pair)
        assert not plan.ok and "goes by the distance between tokens" in str(plan.refusal)
        with pytest.raises(Refused, match=r"take a cache that keeps such a window \(streamingllm, window\)"):
            qkv.apply(llama, *pair)
    qkv.apply(llama, WINDOW, where=[0])
    with pytest.raises(Refused, match="goes by the distance"):
        qkv.apply(llama, cache)
    qkv.apply(llama, cache, where=[1, 2])
    qkv.revert(llama)


@pytest.mark.parametrize("cache", ["offload", "shared-prefix:min_tokens=3"])
def test_a_window_on_a_cache_of_columns_is_the_window(llama: Any, cache: str) -> None:
    with qkv.applied(llama, WINDOW):
        want = conversations(llama)
    with qkv.applied(llama, WINDOW, cache):
        got = conversations(llama)
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    "cache",
    [
        "window:budget=9",
        "streamingllm:sinks=2,window=7,positions=original",
        "longheads:chunk_size=4,attention_length=16",
    ],
)
def test_two_that_choose_for_a_prompt_are_refused(llama: Any, cache: str) -> None:
    with pytest.raises(Refused, match="chooses what the queries of a prompt see"):
        qkv.apply(llama, EXACT, cache)


def test_a_single_query_need_not_be_the_last_key() -> None:
    """The newest token lies in any slot, also where the last one is empty."""
    q, k = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 6, 8)
    mask = torch.ones(2, 4, 1, 6, dtype=torch.bool)
    mask[1, ..., -1] = False
    padding, rest, causal = read_mask(mask, q, k, False, "test")
    assert rest is None and not causal and padding is not None and torch.equal(padding, mask[:, 0, 0])
    method = qkv.method(EXACT)
    got = method.attention(q, k, k, mask=mask, causal=False)  # type: ignore[attr-defined]
    alone = method.attention(q[1:], k[1:, :, :5], k[1:, :, :5], causal=False)  # type: ignore[attr-defined]
    torch.testing.assert_close(got[1:], alone)


def test_empty_slots_go_to_the_front() -> None:
    """Other ones for each head, as many in each; what cannot be said as padding is left as it is."""
    draw = torch.Generator().manual_seed(0)
    k, v = (torch.randn(2, 2, 9, w, generator=draw) for w in (4, 3))
    held = torch.ones(2, 2, 9, dtype=torch.bool)
    held[0, 0, [1, 4]] = held[0, 1, [0, 5]] = held[1, :, 3] = held[:, :, 8] = False
    mask = held.repeat_interleave(2, 1).unsqueeze(2)
    keys, values, padding = packed_past(k, v, mask, 3)
    assert padding is not None and padding.shape == (2, 1, 1, 9)
    for row, gone in enumerate((2, 1)):
        assert padding[row, 0, 0].tolist() == [False] * gone + [True] * (8 - gone) + [False]
        for head in range(2):
            for x, y in ((keys, k), (values, v)):
                assert torch.equal(x[row, head, gone:6], y[row, head, :6][held[row, head, :6]])
                assert torch.equal(x[row, head, 6:], y[row, head, 6:])
    uneven = mask.clone()
    uneven[0, 0, 0, 2] = False
    for same in (None, uneven, mask.expand(-1, -1, 3, -1), mask.sort(-1).values):
        assert packed_past(k, v, same, 3) == (k, v, same)
