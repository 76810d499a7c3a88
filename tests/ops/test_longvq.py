"""LongVQ: the codes are exact, windows and codes never overlap, the log of the count is needed."""

from __future__ import annotations

import math

import torch

import qkv
from qkv.ops.longvq import quantise
from qkv.testing import close

B, H, N, S, D, E = 2, 2, 41, 6, 5, 4


def _draw() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    shapes = ((B, H, N, D), (B, H, N, D), (B, H, N, E), (H, S, D))
    q, k, v, c = (torch.randn(*s, generator=rng, dtype=torch.float64) for s in shapes)
    return q, k, v, c


def test_equals_softmax_over_the_quantised_keys_for_any_block() -> None:
    q, k, v, c = _draw()
    _, hat = quantise(k, c)
    want = qkv.attention(q, hat, v, method="full")
    for size in (1, 3, 8, 16, 64):
        close(
            qkv.attention(q, k, v, method=f"longvq:block_size={size}", codebook=c),
            want,
            rtol=1e-9,
            what=f"block {size}",
        )


def test_a_codebook_of_all_keys_and_a_window_over_all_are_full_attention() -> None:
    q, k, v, c = _draw()
    want = qkv.attention(q[:1], k[:1], v[:1], method="full")
    close(
        qkv.attention(q[:1], k[:1], v[:1], method="longvq:block_size=4", codebook=k[0]),
        want,
        rtol=1e-9,
        what="all keys",
    )
    close(qkv.attention(q[:1], k[:1], v[:1], method="longvq:block_size=64,window_exact=true", codebook=c), want, rtol=1e-9,
          what="window over all")  # fmt: skip


def test_the_count_must_enter_as_its_log() -> None:
    """The control: without log c_s a code that many tokens share weighs as one of them."""
    q, k, v, c = _draw()
    size, t = 4, N - 1
    z, hat = quantise(k, c)
    start = (t // size - 1) * size
    counts = torch.nn.functional.one_hot(z[:, :, :start], S).sum(2).to(v)
    means = (
        torch.nn.functional.one_hot(z[:, :, :start], S).to(v).mT @ v[:, :, :start] / counts.clamp(min=1).unsqueeze(-1)
    )
    near = q[:, :, t:] @ hat[:, :, start:].mT / math.sqrt(D)
    far = (q[:, :, t:] @ c.mT / math.sqrt(D)).masked_fill(counts.unsqueeze(2) == 0, -torch.inf)
    values, got = (
        torch.cat([means, v[:, :, start:]], 2),
        qkv.attention(q, k, v, method=f"longvq:block_size={size}", codebook=c),
    )
    weighed = torch.cat([far + counts.clamp(min=1).log().unsqueeze(2), near], -1).softmax(-1)
    close(got[:, :, t:], weighed @ values, rtol=1e-9, what="with log c")
    assert (torch.cat([far, near], -1).softmax(-1) @ values - got[:, :, t:]).abs().max() > 1e-2


def test_every_token_is_counted_once() -> None:
    q, k, v, c = _draw()
    method = qkv.method("longvq:block_size=4")
    for n in (3, 4, 8, 9, N):
        out, state = method(q[:, :, :n], k[:, :, :n], torch.ones_like(v[:, :, :n]), codebook=c, return_state=True)
        close(out, torch.ones_like(out), rtol=1e-12, what="weights sum to 1")
        folded = max(0, (n // 4 - 1) * 4)
        assert state["counts"].sum(-1).eq(folded).all()
        assert state["position"].tolist() == [n] * B


def test_bias_acts_in_the_window_by_distance() -> None:
    q, k, v, c = _draw()
    bias = torch.tensor([[0.5, -1.0, 2.0]] * H, dtype=torch.float64)
    _, hat = quantise(k, c)
    age = torch.arange(N)[:, None] - torch.arange(N)
    near = torch.arange(N)[None] // 8 >= torch.arange(N)[:, None] // 8 - 1
    add = torch.where((age >= 0) & (age < 3) & near, bias[0][age.clamp(0, 2)], 0.0)
    logits = (q @ hat.mT / math.sqrt(D) + add).masked_fill(age < 0, -torch.inf)
    got = qkv.attention(q, k, v, method="longvq:block_size=8", codebook=c, bias=bias)
    close(got, logits.softmax(-1) @ v, rtol=1e-9, what="bias")


def test_straight_through_gives_the_keys_a_gradient() -> None:
    q, k, v, c = _draw()
    _, hat = quantise(k.requires_grad_(), c.requires_grad_(), straight_through=True)
    (grad,) = torch.autograd.grad(hat.sum(), k)
    close(grad, torch.ones_like(k), rtol=1e-12, what="identity")
    for setting, moves in (("true", True), ("false", False)):
        out = qkv.attention(q, k, v, method=f"longvq:straight_through={setting}", codebook=c)
        (grad,) = torch.autograd.grad(out.square().sum(), k, allow_unused=True)
        assert bool(grad is not None and grad.abs().sum() > 0) is moves
