"""Flow attention: conservation, identical keys, and what it is without the flows."""

from __future__ import annotations

import pytest
import torch

import qkv
from qkv.core.errors import InvalidInput
from qkv.testing import close

B, H, N, M, D, E = 2, 2, 9, 14, 6, 5


def _draw(n: int = N, m: int = M) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    shapes = ((B, H, n, D), (B, H, m, D), (B, H, m, E))
    return [torch.randn(*s, generator=rng, dtype=torch.float64) for s in shapes]


def test_flows_are_conserved() -> None:
    q, k, _ = _draw()
    a, b = q.sigmoid(), k.sigmoid()
    flow = a @ b.mT
    inflow, outflow = flow.sum(-1, keepdim=True), flow.sum(-2, keepdim=True)
    close((flow / inflow).sum(-1), torch.ones(B, H, N, dtype=torch.float64), rtol=1e-9, what="sinks")
    close((flow / outflow).sum(-2), torch.ones(B, H, M, dtype=torch.float64), rtol=1e-9, what="sources")
    close(
        (flow / outflow).sum((-2, -1)), torch.full((B, H), float(M), dtype=torch.float64), rtol=1e-9, what="sum of Ihat"
    )
    close(
        (flow / inflow).sum((-2, -1)), torch.full((B, H), float(N), dtype=torch.float64), rtol=1e-9, what="sum of Ohat"
    )
    gate, share = (flow / outflow).sum(-1).mul(N / M).sigmoid(), M * (flow / inflow).sum(-2).clamp(-1, 1).softmax(-1)
    close(share.mean(-1), torch.ones(B, H, dtype=torch.float64), rtol=1e-9, what="mean competition")
    v = torch.randn(B, H, M, E, dtype=torch.float64)
    want = gate.unsqueeze(-1) * (flow / inflow) @ (share.unsqueeze(-1) * v)
    close(qkv.attention(q, k, v, method="flow:eps=0.0", causal=False), want, rtol=1e-9, what="the map written out")


def test_identical_keys_average_the_values() -> None:
    q, k, v = _draw(M, M)
    k = k[:, :, :1].expand_as(k)
    out = qkv.attention(q, k, v, method="flow:eps=0.0", causal=False)
    gate = out / v.mean(2, keepdim=True)
    close(gate, gate[..., :1].expand_as(gate), rtol=1e-8, what="one gate per sink")
    assert ((gate > 0) & (gate < 1)).all()


def test_keys_have_no_order_without_causality() -> None:
    q, k, v = _draw()
    order = torch.randperm(M, generator=torch.Generator().manual_seed(1))
    want = qkv.attention(q, k, v, method="flow", causal=False)
    close(
        qkv.attention(q, k[:, :, order], v[:, :, order], method="flow", causal=False),
        want,
        rtol=1e-9,
        what="order of keys",
    )


def test_without_the_flows_it_is_linear_attention() -> None:
    q, k, v = _draw(M, M)
    weights = q.sigmoid() @ k.sigmoid().mT
    for causal in (True, False):
        w = weights.tril() if causal else weights
        plain = qkv.attention(q, k, v, method="flow:conserve=false,eps=0.0", causal=causal)
        close(plain, w / w.sum(-1, keepdim=True) @ v, rtol=1e-9, what=f"causal={causal}")
        assert (plain - qkv.attention(q, k, v, method="flow", causal=causal)).abs().max() > 1e-2


def test_source_weights_differ_by_at_most_e_squared() -> None:
    q, k, v = _draw(M, M)
    v = torch.eye(M, dtype=torch.float64).expand(B, H, M, M)
    out = qkv.attention(q, k[:, :, :1].expand_as(k) + 5 * torch.randn_like(k), v, method="flow", causal=False)
    assert out.isfinite().all()


def test_causal_cross_attention_is_refused() -> None:
    q, k, v = _draw()
    with pytest.raises(InvalidInput, match="when causal"):
        qkv.attention(q, k, v, method="flow")


def test_state_has_the_size_of_the_page() -> None:
    q, k, v = _draw(M, M)
    _, state = qkv.attention(q.float(), k.float(), v.float(), method="flow", return_state=True)
    assert state.bytes == 4 * B * (H * (D * E + 4 * D + 1) + 1)


@pytest.mark.parametrize("form", ["reference", "fast"])
@pytest.mark.parametrize("causal", [True, False])
def test_without_eps_padding_in_front_changes_nothing(form: str, causal: bool) -> None:
    q, k, v = (x.requires_grad_() for x in _draw(M, M))
    real = torch.ones(B, M, dtype=torch.bool)
    real[0, :3] = False
    out = qkv.attention(q, k, v, method="flow:eps=0.0", causal=causal, form=form, padding=real)
    alone = [x[:1, :, 3:] for x in (q, k, v)]
    want = qkv.attention(*alone, method="flow:eps=0.0", causal=causal, form=form)
    close(out[:1, :, 3:], want, rtol=1e-9, what="the padded row")
    for grad in torch.autograd.grad(out[:, :, 3:].square().sum(), (q, k, v)):
        assert grad.isfinite().all()
    state = qkv.method("flow:eps=0.0").initial(q, k, v)
    first, _ = qkv.method("flow:eps=0.0").step(*(x[:, :, :1] for x in (q, k, v)), state, padding=real[:, :1])
    assert first[1].isfinite().all()
