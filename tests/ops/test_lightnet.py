"""LightNet: softmax averages over time, one scan, and positions by decaying sums."""

from __future__ import annotations

import pytest
import torch

import qkv
from qkv.core.errors import InvalidInput, Refused, StateError
from qkv.core.state import State
from qkv.ops._common.positions import md_tpe, tpe
from qkv.testing import close, finite

B, H, N, D, E = 2, 2, 45, 6, 5


def _draw(size: float = 1.0, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, H, N, w, generator=rng, dtype=torch.float64) for w in (D, D, E))
    return [q.to(dtype), (size * k).to(dtype), v.to(dtype)]


@pytest.mark.parametrize("chunks", ["", ":chunk_size=1,sub_chunk=1", ":chunk_size=14,sub_chunk=7", ":chunk_size=16"])
def test_equals_gla_with_the_decay_of_its_keys(chunks: str) -> None:
    q, k, v = _draw(3.0)
    z = k.logcumsumexp(2)
    g = torch.cat([torch.zeros_like(z[:, :, :1]), z[:, :, :-1] - z[:, :, 1:]], 2)
    want = qkv.attention(q, (k - z).exp(), v, method="gla", log_decay=g, form="reference")
    close(qkv.attention(q, k, v, method=f"lightnet{chunks}"), want, rtol=1e-9, what="gla")
    close((k - z).exp()[:, :, 1:], 1 - g[:, :, 1:].exp(), atol=1e-12, what="key weight is what decays")


def test_constants_of_the_definition() -> None:
    q, k, v = _draw()
    shifted = k + torch.randn(B, H, 1, D, dtype=torch.float64)
    for causal in (True, False):
        want = qkv.attention(q, k, v, method="lightnet", causal=causal)
        close(
            qkv.attention(q, shifted, v, method="lightnet", causal=causal), want, rtol=1e-9, what="shift of the logits"
        )
    row = v[:, :, :1].expand_as(v)
    close(
        qkv.attention(q, k, row, method="lightnet"),
        q.sum(-1, keepdim=True) * row * D**-0.5,
        rtol=1e-9,
        what="constant values",
    )


def test_bidirectional_is_the_last_step_and_has_no_order() -> None:
    q, k, v = _draw()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(3))
    whole = qkv.attention(q, k, v, method="lightnet", causal=False)
    close(
        qkv.attention(q, k[:, :, order], v[:, :, order], method="lightnet", causal=False),
        whole,
        rtol=1e-9,
        what="order",
    )
    close(qkv.attention(q, k, v, method="lightnet")[:, :, -1], whole[:, :, -1], rtol=1e-9, what="the last step")
    close(whole, q @ k.softmax(2).mT @ v * D**-0.5, rtol=1e-9, what="softmax over tokens")


def test_huge_logits_stay_finite() -> None:
    q, k, v = _draw(500.0, torch.float32)
    k = k.requires_grad_()
    out = qkv.attention(q, k, v, method="lightnet")
    out.sum().backward()
    finite(out)
    assert k.grad is not None
    finite(k.grad)


def test_virtual_zero_matters_early_and_fades() -> None:
    q, k, v = _draw()
    gap = (qkv.attention(q, k, v, method="lightnet") - qkv.attention(q, k, v, method="lightnet:z_init=zero")).abs()
    early, late = (gap[:, :, i].mean() for i in (slice(0, 3), slice(-3, None)))
    assert early > 0.1
    assert late < 0.2 * early


def test_a_state_without_its_logits_is_refused() -> None:
    q, k, v = _draw()
    _, state = qkv.attention(q, k, v, method="lightnet", return_state=True)
    with pytest.raises(StateError, match="z"):
        qkv.attention(q, k, v, method="lightnet", initial_state=State("lightnet", {"state": state["state"]}))
    with pytest.raises(Refused, match="causal"):
        qkv.attention(q, k, v, method="lightnet", causal=False, return_state=True)
    with pytest.raises(InvalidInput, match="when causal"):
        qkv.attention(q[:, :, :3], k, v, method="lightnet")


def test_tpe_is_its_toeplitz_matrix() -> None:
    rng = torch.Generator().manual_seed(2)
    x, b = (
        torch.randn(2, 12, 3, generator=rng, dtype=torch.float64),
        torch.randn(3, 4, generator=rng, dtype=torch.float64),
    )
    log = -torch.rand(4, generator=rng, dtype=torch.float64)
    age = (torch.arange(12)[:, None] - torch.arange(12)).to(torch.float64)
    kernel = torch.einsum("ce,eij->cij", b, (log[:, None, None] * age.abs()).exp())
    want = torch.einsum("cij,bjc->bic", kernel.tril(), x)
    close(tpe(x, b, log, chunk_size=5), want, rtol=1e-10, what="causal")
    close(
        tpe(x, b, log, bidirectional=True), torch.einsum("cij,bjc->bic", kernel, x), rtol=1e-10, what="both directions"
    )
    lines = x.unflatten(1, (3, 4))
    rows = torch.stack([tpe(lines[:, i], b, log, bidirectional=True) for i in range(3)], 1)
    columns = torch.stack([tpe(lines[:, :, j], b, log, bidirectional=True) for j in range(4)], 2)
    close(md_tpe(x, (3, 4), [b, b], [log, log]), (rows + columns).flatten(1, 2), rtol=1e-10, what="two axes")
    with pytest.raises(InvalidInput, match="axes"):
        md_tpe(x, (3, 4), [b], [log])
