"""Lightning Attention-2: forms, splits, closed forms, default slopes."""

from __future__ import annotations

import pytest
import torch

import qkv
from qkv.core.errors import InvalidInput, InvalidParameter, Refused, StateError
from qkv.ops._common.slopes import alibi_slopes, decay_slopes
from qkv.testing import close

B, H, N, D, E = 2, 3, 41, 6, 5


def _draw() -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(B, H, N, w, generator=rng, dtype=torch.float64) for w in (D, D, E)]


SLOPES = torch.tensor([0.05, 0.7, 3.0], dtype=torch.float64)


def test_all_forms_and_chunk_sizes_agree() -> None:
    q, k, v = _draw()
    age = torch.arange(N)[:, None] - torch.arange(N)
    want = (q @ k.mT * (-SLOPES[:, None, None] * age.clamp(min=0)).exp()).tril() @ v
    for setting in [f"chunk_size={c}" for c in (1, 7, 16, 64, N)] + ["mode=recurrent", "mode=quadratic"]:
        close(qkv.attention(q, k, v, method=f"lightning2:{setting}", slopes=SLOPES), want, rtol=1e-10, what=setting)


@pytest.mark.parametrize("split", [1, 7, 16, 23, 40])
def test_a_state_handed_over_inside_a_block(split: int) -> None:
    q, k, v = _draw()
    method = qkv.method("lightning2:chunk_size=8")
    whole = method(q, k, v, slopes=SLOPES)
    _, state = method(*(x[:, :, :split] for x in (q, k, v)), slopes=SLOPES, return_state=True)
    rest = method(*(x[:, :, split:] for x in (q, k, v)), slopes=SLOPES, initial_state=state)
    close(rest, whole[:, :, split:], rtol=1e-10, what="after the split")
    official = state.tensors["state"] * (-SLOPES).exp()[:, None, None]  # the official kernel holds lam S: must not pass
    other = method(
        *(x[:, :, split:] for x in (q, k, v)),
        slopes=SLOPES,
        initial_state=type(state)("lightning2", {"state": official}),
    )
    assert (other - whole[:, :, split:]).abs().max() > 1e-3


def test_limits() -> None:
    q, k, v = _draw()
    close(qkv.attention(q, k, v, method="lightning2"), (q @ k.mT).tril() @ v, rtol=1e-12, what="no slopes")
    forgets = qkv.attention(q, k, v, method="lightning2", slopes=torch.full((H,), 1e9, dtype=torch.float64))
    close(forgets, (q * k).sum(-1, keepdim=True) * v, rtol=1e-12, what="only the token itself")
    parts = torch.stack(
        [qkv.attention(q[..., s], k[..., s], v, method="lightning2", slopes=SLOPES) for s in (slice(0, 4), slice(4, 6))]
    ).sum(0)
    close(parts, qkv.attention(q, k, v, method="lightning2", slopes=SLOPES), rtol=1e-12, what="key width in parts")


def test_slopes() -> None:
    assert alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(12)[8:] == alibi_slopes(16)[::2][:4]
    last = decay_slopes(4, 3, 4)
    close(last, torch.tensor(alibi_slopes(4), dtype=torch.float64) * 1e-5, rtol=1e-9, what="last layer")
    with pytest.raises(InvalidParameter, match="layer=4"):
        decay_slopes(4, 4, 4)


def test_refusals() -> None:
    q, k, v = _draw()
    with pytest.raises(InvalidInput, match="slopes"):
        qkv.attention(q, k, v, method="lightning2", slopes=-SLOPES)
    with pytest.raises(Refused, match="causal"):
        qkv.attention(q, k, v, method="lightning2", causal=False)
    _, state = qkv.attention(q, k, v, method="linear", return_state=True)
    with pytest.raises(StateError, match="linear"):
        qkv.attention(q, k, v, method="lightning2", initial_state=state)
