"""Bad input to patterns: each mistake gets a clear error of the right class, and masks mean what they say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import qkv
from qkv.core.attend import attend, causal_mask
from qkv.core.errors import InvalidInput, InvalidParameter, Refused, UnknownName
from qkv.core.pattern import read_mask
from qkv.patterns.sliding_window import SlidingWindow
from qkv.testing import close

torch.set_num_threads(1)
PATTERNS = ["sliding-window:window=3,sinks=1,block_size=4", "xattention:stride=2,block_size=4"]


def qkv_of(b: int = 2, h: int = 4, g: int = 2, n: int = 8, m: int = 8) -> tuple[torch.Tensor, ...]:
    rng = torch.Generator().manual_seed(0)
    return tuple(torch.randn(x, generator=rng) for x in ((b, h, n, 6), (b, g, m, 6), (b, g, m, 5)))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"window": 0}, "window=0"),
        ({"window": -4}, "window"),
        ({"window": 2.5}, "type"),
        ({"sinks": -1}, "sinks"),
        ({"block_size": 0}, "block_size"),
        ({"window": True}, "type"),
    ],
)
def test_bad_settings(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidParameter, match=says):
        SlidingWindow(**settings)


def test_unknown_names() -> None:
    with pytest.raises(UnknownName, match="window"):
        qkv.method("sliding-window", windows=3)
    with pytest.raises(UnknownName, match="xattention"):
        qkv.method("xatention")


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda q, k, v: (q[0], k, v), "four axes"),
        (lambda q, k, v: (q, k[..., :3], v), "expected q"),
        (lambda q, k, v: (q, k[:, :, :5], v), "expected q"),
        (lambda q, k, v: (q, k[:, :, :5], v[:, :, :5]), "N=8 > M=5"),
        (lambda q, k, v: (q[:, :3], k, v), "do not divide"),
        (lambda q, k, v: (q.double(), k, v), "one floating-point dtype"),
        (lambda q, k, v: (q.int(), k.int(), v.int()), "floating-point"),
        (lambda q, k, v: (q[:, :, :0], k, v), "empty"),
        (lambda q, k, v: (q[:0], k[:0], v[:0]), "empty"),
        (lambda q, k, v: (q, k.to("meta"), v), "different devices"),
    ],
)
def test_bad_tensors(name: str, change: Any, says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        qkv.method(name).attention(*change(*qkv_of()))


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (torch.ones(2, 1, 1, 8), "must be bool"),
        (torch.ones(2, 1, 1, 7, dtype=torch.bool), "does not broadcast"),
        (torch.ones(3, 1, 1, 8, dtype=torch.bool), "does not broadcast"),
        (torch.ones(2, 3, 8, 8, dtype=torch.bool), "does not broadcast"),
        (torch.ones(1, 2, 1, 1, 8, dtype=torch.bool), "does not broadcast"),
    ],
)
def test_bad_masks(name: str, mask: torch.Tensor, says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        qkv.method(name).attention(*qkv_of(), mask=mask)


@pytest.mark.parametrize("name", PATTERNS)
def test_bad_padding(name: str) -> None:
    q, k, _ = qkv_of()
    for padding in (torch.ones(2, 8), torch.ones(2, 7, dtype=torch.bool), torch.ones(1, 8, dtype=torch.bool)):
        with pytest.raises(InvalidInput, match=r"bool \[B, M\] = \(2, 8\)"):
            qkv.method(name).plan(q, k, padding=padding)


def test_a_pattern_is_not_an_operator() -> None:
    with pytest.raises(Refused, match="not an operator"):
        qkv.attention(*qkv_of(), method="sliding-window")


@pytest.mark.parametrize("name", PATTERNS)
def test_a_row_of_padding_gives_zeros(name: str) -> None:
    q, k, v = qkv_of()
    mask = torch.ones(2, 1, 1, 8, dtype=torch.bool)
    mask[1] = False
    out = qkv.method(name).attention(q, k, v, mask=mask)
    assert not out[1].any() and bool(out.isfinite().all())
    close(out[:1], qkv.method(name).attention(q[:1], k[:1], v[:1]), rtol=1e-6, atol=1e-6)


def test_what_a_mask_says() -> None:
    q, k, _ = qkv_of(n=5)
    causal = causal_mask(5, 8, q.device)
    padding = torch.ones(2, 8, dtype=torch.bool)
    padding[0, :2] = False
    said = padding[:, None, None]
    everything: dict[str, tuple[Any, bool, Any]] = {
        "none": (None, True, (None, None, True)),
        "padding": (said, True, (padding, None, True)),
        "padding for one row": (padding[1], True, (torch.ones(2, 8, dtype=torch.bool), None, True)),
        "spelt out": (said & causal, False, (padding, None, True)),
        "spelt out twice": (said & causal, True, (padding, None, True)),
        "causal alone": (causal, False, (None, None, True)),
        "all": (torch.ones(5, 8, dtype=torch.bool), False, (None, None, False)),
        "keys alone, bidirectional": (said.expand(-1, -1, 5, -1), False, (padding, None, False)),
        "a window": (causal & ~causal_mask(5, 8, q.device).tril(-1), True, (None, "rest", True)),
    }
    for label, (mask, flag, (want_padding, rest, want_causal)) in everything.items():
        got_padding, got_rest, got_causal = read_mask(mask, q, k, flag, "test")
        assert got_causal == want_causal, label
        assert (got_rest is None) == (rest is None), label
        assert (got_padding is None) == (want_padding is None), label
        assert want_padding is None or torch.equal(got_padding, want_padding), label


def test_one_query_of_a_window_sees_its_window() -> None:
    q, k, v = qkv_of(n=1, m=40)
    out = SlidingWindow(window=6, sinks=2).attention(q, k, v)
    mask = torch.zeros(1, 1, 1, 40, dtype=torch.bool)
    mask[..., :2] = mask[..., -6:] = True
    close(out, attend(q, k, v, mask=mask).out, rtol=1e-6, atol=1e-6)


def test_a_window_never_makes_the_dense_mask() -> None:
    """Nothing of N x M elements is held: the largest tensor made stays near the inputs."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(x, torch.Tensor) and x.numel():
                    seen.append(x.untyped_storage().nbytes() // x.element_size())
            return out

    q, k, v = (torch.randn(1, 1, 4096, 8) for _ in range(3))
    with Watch():
        SlidingWindow(window=64, sinks=4).attention(q, k, v)
    assert max(seen) < 4096 * 4096 / 50, max(seen)
