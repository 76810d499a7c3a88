"""Agent attention: a stochastic map of low rank, orders that do not matter, pools on grids, bias tables."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
import torch.utils._python_dispatch

import qkv
from qkv.core.errors import InvalidInput, InvalidParameter, Refused
from qkv.layers._agent import AgentAttention
from qkv.ops.agent import key_bias, maps, query_bias
from qkv.testing import close

B, H, N, M, D, E, A = 2, 3, 12, 17, 6, 5, 4


def _draw(n: int = N, m: int = M) -> tuple[torch.Tensor, ...]:
    rng = torch.Generator().manual_seed(0)
    shapes = ((B, H, n, D), (B, H, m, D), (B, H, m, E), (B, H, A, D), (H, A, m), (H, n, A))
    return tuple(torch.randn(*s, generator=rng, dtype=torch.float64) for s in shapes)


def test_the_map_is_stochastic_of_low_rank_and_associates() -> None:
    q, k, v, a, b1, b2 = _draw()
    second, first = maps(q, k, scale=D**-0.5, agents=a, bias_keys=b1, bias_queries=b2)
    whole = second @ first
    assert (whole >= 0).all()
    close(whole.sum(-1), torch.ones(B, H, N, dtype=torch.float64), rtol=1e-12, what="rows")
    assert int(torch.linalg.matrix_rank(whole).max()) <= A
    call = {"method": "agent", "causal": False, "agents": a, "bias_keys": b1, "bias_queries": b2}
    close(qkv.attention(q, k, v, **call), whole @ v, rtol=1e-9, what="(P2 P1) V against P2 (P1 V)")
    close(qkv.attention(q, k, torch.full_like(v, 3.0), **call), torch.full((B, H, N, E), 3.0).double(), rtol=1e-12)


def test_one_agent_gives_every_query_the_same() -> None:
    q, k, v, *_ = _draw()
    mean = q.mean(2, keepdim=True)
    want = (D**-0.5 * mean @ k.mT).softmax(-1) @ v
    got = qkv.attention(q, k, v, method="agent:num_agents=1", causal=False)
    close(got, want.expand_as(got), rtol=1e-9)


def test_order_of_agents_and_of_keys_does_not_matter() -> None:
    q, k, v, a, b1, b2 = _draw()
    want = qkv.attention(q, k, v, method="agent", causal=False, agents=a, bias_keys=b1, bias_queries=b2)
    s, m = torch.randperm(A), torch.randperm(M)
    k, v, a, b1, b2 = k[:, :, m], v[:, :, m], a[:, :, s], b1[:, s][..., m], b2[..., s]
    got = qkv.attention(q, k, v, method="agent", causal=False, agents=a, bias_keys=b1, bias_queries=b2)
    close(got, want, rtol=1e-9)


def test_all_queries_as_agents_is_not_full_attention() -> None:
    q, k, v, *_ = _draw(N, N)
    two = qkv.attention(q, k, v, method="agent", causal=False, agents=q)
    full = qkv.attention(q, k, v, method="full", causal=False)
    assert (two - full).abs().max() > 0.05 * full.abs().max()


def test_agents_of_a_sequence_are_its_adaptive_averages() -> None:
    q, k, v, *_ = _draw()
    pooled = F.adaptive_avg_pool1d(q.flatten(0, 1).mT, 5).mT.unflatten(0, (B, H))
    want = qkv.attention(q, k, v, method="agent", causal=False, agents=pooled)
    close(qkv.attention(q, k, v, method="agent:num_agents=5", causal=False), want, rtol=1e-9)


def test_agents_of_a_grid_leave_the_class_token_out() -> None:
    q, k, v, *_ = _draw(1 + 3 * 5, 1 + 3 * 5)
    field = q[:, :, 1:].unflatten(2, (3, 5)).permute(0, 1, 4, 2, 3).flatten(0, 1)
    pooled = F.adaptive_avg_pool2d(field, 2).flatten(2).mT.unflatten(0, (B, H))
    want = qkv.attention(q, k, v, method="agent", causal=False, agents=pooled)
    method = qkv.method("agent", num_agents=4, grid=(3, 5), prefix=1)
    close(method(q, k, v, causal=False), want, rtol=1e-9)
    with pytest.raises(InvalidInput, match="do not fill a grid"):
        method(q[:, :, 1:], k, v, causal=False)
    with pytest.raises(Refused, match="a grid has no padding"):
        method(q, k, v, causal=False, padding=torch.ones(B, 16, dtype=torch.bool))


def test_bad_settings_are_refused() -> None:
    with pytest.raises(InvalidParameter, match="square"):
        qkv.method("agent", num_agents=5, grid=(7, 7))
    with pytest.raises(InvalidParameter, match="fits the grid"):
        qkv.method("agent", num_agents=49, grid=(4, 4))
    with pytest.raises(InvalidParameter, match="multiple of sub_chunk"):
        qkv.method("agent", chunk_size=10)
    q, k, v, a, b1, _ = _draw()
    with pytest.raises(Refused, match="causal only with agents"):
        qkv.attention(q, k, v, method="agent")
    with pytest.raises(InvalidInput, match="`agents` has s = 2, `bias_keys` has s = 4"):
        qkv.attention(q, k, v, method="agent", causal=False, agents=a[:, :, :2], bias_keys=b1)
    with pytest.raises(InvalidInput, match="is for 4 agents, here are 2"):
        qkv.attention(q, k, v, method="agent:num_agents=2", causal=False, bias_keys=b1)
    with pytest.raises(InvalidInput, match="must agree"):
        qkv.attention(q, k, v, method="agent:value_shortcut=0.1", causal=False)


def test_the_training_free_form() -> None:
    q, k, v, a, *_ = _draw(N, N)
    s = D**-0.5
    want = (s**0.3 * q @ a.mT).softmax(-1) @ ((s * a @ k.mT).softmax(-1) @ v) + 0.075 * v
    got = qkv.attention(q, k, v, method="agent:second_power=0.3,value_shortcut=0.075", causal=False, agents=a)
    close(got, want, rtol=1e-9)


def test_causal_agents_are_prefix_softmaxes_that_survive_huge_logits() -> None:
    q, k, v, a, *_ = _draw(N, N)
    out, state = qkv.attention(q, k, v, method="agent", agents=a, return_state=True)
    for t in (0, 4, N - 1):
        part = qkv.attention(
            q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1], method="agent", causal=False, agents=a
        )
        close(out[:, :, t : t + 1], part, rtol=1e-9, what=f"token {t}")
    close(state["values"], (D**-0.5 * a @ k.mT).softmax(-1) @ v, rtol=1e-9, what="the state")
    assert state.bytes == 8 * B * H * A * (E + 1)
    rising = k * torch.linspace(1, 1e3, N, dtype=torch.float64)[:, None]
    for form in ("reference", "fast"):
        got = qkv.attention(q, rising, v, method="agent:chunk_size=4,sub_chunk=2", agents=a, form=form)
        want = qkv.attention(q, rising, v, method="agent", causal=False, agents=a)
        close(got[:, :, -1:], want[:, :, -1:], rtol=1e-7, what=f"{form}, rising logits")


def test_bias_tables_follow_the_published_layout() -> None:
    rng = torch.Generator().manual_seed(1)
    draw = lambda *s: torch.randn(*s, generator=rng, dtype=torch.float64)  # noqa: E731
    table, rows, columns, prefix = draw(H, A, 7, 7), draw(H, A, 5), draw(H, A, 3), draw(H, A, 1)
    bias = key_bias(table, rows, columns, (5, 3), prefix)
    assert bias.shape == (H, A, 16)
    up = F.interpolate(table, size=(5, 3), mode="bilinear")
    for y, x in ((0, 0), (4, 1), (2, 2)):
        close(bias[:, :, 1 + 3 * y + x], up[..., y, x] + rows[..., y] + columns[..., x], rtol=1e-12)
    close(bias[..., :1], prefix, rtol=0)
    close(query_bias(table, rows.mT, columns.mT, (5, 3), prefix.mT), bias.mT, rtol=0, what="queries' side")
    assert key_bias(table, rows, columns, (10, 6)).shape == (H, A, 60)
    with pytest.raises(InvalidInput, match="bias tables"):
        key_bias(table, rows, columns, (15,))


def test_cost_is_linear_in_the_tokens() -> None:
    q, k, v = (torch.randn(1, 1, 64, 8) for _ in range(3))
    biggest: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            biggest.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    with Sizes():
        qkv.attention(q, k, v, method="agent:num_agents=4", causal=False)
    assert max(biggest) <= 64 * 8 < 64 * 64, math.isqrt(max(biggest))


def test_the_block_keeps_class_tokens_out_of_the_convolution() -> None:
    torch.manual_seed(0)
    layer = AgentAttention(12, 3, num_agents=4, grid=(3, 5), prefix=1).double()
    x = torch.randn(2, 16, 12, dtype=torch.float64)
    out = layer(x)
    q, k, v = layer.project(x).unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4)
    t = layer.tables
    b1 = key_bias(t["an"], t["ah"], t["aw"], (3, 5), t["ac"])
    b2 = query_bias(t["na"], t["ha"], t["wa"], (3, 5), t["ca"])
    y = layer.operator(q, k, v, causal=False, bias_keys=b1, bias_queries=b2).transpose(1, 2).flatten(2)
    close(out[:, 0], layer.out(y[:, 0]), rtol=1e-9, what="class token")
    field = v[:, :, 1:].transpose(1, 2).flatten(2).mT.unflatten(-1, (3, 5))
    conv = F.conv2d(field, layer.conv.weight, layer.conv.bias, padding=1, groups=12).flatten(2).mT
    close(out[:, 1:], layer.out(y[:, 1:] + conv), rtol=1e-9, what="patches")
    assert layer(torch.randn(1, 1 + 6 * 7, 12, dtype=torch.float64), (6, 7)).shape == (1, 43, 12)
    out.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    line = AgentAttention(12, 3, num_agents=4).double()
    assert line(x).shape == x.shape and not line.tables
    with pytest.raises(InvalidInput, match="cannot take grid"):
        line(x, (4, 4))
    with pytest.raises(InvalidParameter, match="stand before a grid"):
        AgentAttention(12, 3, prefix=1)
