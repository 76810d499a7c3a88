"""HyperAttention: exact limits, an unbiased sample, Gray order, causality by halving, cost, sinks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import qkv
from qkv.core.errors import Refused
from qkv.core.merge import merge
from qkv.ops._common.fused import attend_lse
from qkv.ops.hyperattention import Plan, bucket, gray_rank, sorted_part, uniform, weights
from qkv.testing import close

B, H, G, D, E = 2, 4, 2, 6, 5
PLAN = Plan(D**-0.5, 8, 8, 3, 1, 0, "rank", 0)


def _draw(n: int, m: int | None = None, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    rng, m = torch.Generator().manual_seed(0), n if m is None else m
    shapes = ((B, H, n, D), (B, G, m, D), (B, G, m, E))
    return [torch.randn(*s, generator=rng, dtype=torch.float64).to(dtype) for s in shapes]


@pytest.mark.parametrize("causal", [True, False])
def test_short_inputs_are_exact_to_the_bit(causal: bool) -> None:
    q, k, v = _draw(37)
    want = qkv.attention(q, k, v, method="full", causal=causal)
    assert torch.equal(qkv.attention(q, k, v, method="hyperattention", causal=causal), want)
    assert torch.equal(
        qkv.attention(q, k, v, method=f"hyperattention:min_seq_len={37 + (not causal)}", causal=causal), want
    )


@pytest.mark.parametrize("n", [32, 37, 63])
@pytest.mark.parametrize("causal", [True, False])
def test_a_block_of_all_keys_is_exact_through_every_halving(n: int, causal: bool) -> None:
    q, k, v = _draw(n)
    got = qkv.attention(q, k, v, method="hyperattention:min_seq_len=4,block_size=64", causal=causal)
    close(got, qkv.attention(q, k, v, method="full", causal=causal), rtol=1e-9)
    q, k, v = _draw(n, n + 20)
    got = qkv.attention(q, k, v, method="hyperattention:min_seq_len=4,block_size=128", causal=causal)
    close(got, qkv.attention(q, k, v, method="full", causal=causal), rtol=1e-9, what="after earlier keys")


def test_neighbours_in_gray_order_differ_in_one_sign() -> None:
    codes = torch.arange(128)
    rank = gray_rank(codes, 7)
    assert sorted(rank.tolist()) == list(range(128))
    ordered = rank.argsort()
    apart = ordered[1:] ^ ordered[:-1]
    assert ((apart & (apart - 1)) == 0).all()
    assert torch.equal(gray_rank(codes ^ (codes >> 1), 7), codes)


def test_hash_is_of_the_direction_and_shared_by_heads() -> None:
    x = torch.randn(1, 1, 50, D)
    plan = replace(PLAN, lsh_num_projs=7)
    assert torch.equal(bucket(3 * x, plan), bucket(x, plan))
    assert torch.equal(bucket(x.expand(2, 3, 50, D), plan), bucket(x, plan).expand(2, 3, 50))
    opposite = bucket(x, plan) != bucket(-x, plan)
    assert opposite.all()
    u = uniform(20000, 3, 0, torch.device("cpu"))
    assert abs(u.mean() - 0.5) < 0.01 and abs(u.var() - 1 / 12) < 0.005
    assert (
        abs(
            torch.corrcoef(torch.stack([u, uniform(20000, 4, 0, u.device), uniform(20000, 3, 1, u.device)]))[0, 1:]
        ).max()
        < 0.03
    )


def test_the_sample_is_unbiased_and_needs_its_correction() -> None:
    q, k, _ = _draw(24, 40)
    scores = (D**-0.5 * q @ k.repeat_interleave(2, 1).mT).exp()
    inside = weights(q, k, causal=False, plan=PLAN) == 1.0  # M / m = 5: no sampled key has weight 1
    outside = (scores * ~inside).sum(-1)
    sums = [(weights(q, k, causal=False, plan=replace(PLAN, part=p)) * scores * ~inside).sum(-1) for p in range(800)]
    mean = torch.stack(sums).mean(0)
    bias = ((mean - outside) / outside).abs()
    assert bias.mean() < 0.03 and bias.max() < 0.12, (bias.mean(), bias.max())
    plain = mean * PLAN.sample_size / 40
    assert ((plain - outside) / outside).abs().mean() > 0.5, "without M / m the sum must be far off"
    doubled = mean + (scores * inside).sum(-1) * 0.8  # sampled keys of the own block, counted once more
    assert ((doubled - outside) / outside).mean() > 0.05


def test_the_parts_merge_to_softmax_over_their_weights() -> None:
    q, k, v = _draw(24, 40)
    w = weights(q, k, causal=False, plan=PLAN)
    k4, v4 = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    logits = D**-0.5 * q @ k4.mT
    part = lambda u: ((logits + u.log()).softmax(-1) @ v4, (logits + u.log()).logsumexp(-1))  # noqa: E731
    got, lse = merge(part(w.masked_fill(w != 1.0, 0.0)), part(w.masked_fill(w == 1.0, 0.0)))
    buckets = [bucket(x, PLAN) for x in (q, k)]
    want, want_lse = sorted_part(q, k, v, *buckets, PLAN, torch.ones(B, dtype=torch.bool))
    close(got, want, rtol=1e-9)
    close(lse, want_lse, rtol=1e-9, what="lse")


def test_blocks_by_rank_are_even_and_all_used() -> None:
    q, k, _ = _draw(23, 40)
    w = weights(q, k, causal=False, plan=replace(PLAN, sample_size=1))
    sizes = (w == 1.0).sum(-1)
    assert sizes.min() >= 8 and sizes.max() <= 8
    keys_read = (w == 1.0).any(-2)
    assert keys_read.all(), "every block of keys has queries"


def test_matching_by_rank_is_refused_when_causal() -> None:
    q, k, v = _draw(9)
    with pytest.raises(Refused, match="depend on later queries"):
        qkv.attention(q, k, v, method="hyperattention:match=rank", causal=True)


def test_by_rank_a_causal_form_would_look_ahead() -> None:
    """Why: the blocks of early queries change with later queries."""
    q, k, _ = _draw(24, 40)
    changed = torch.cat([q[:, :, :12], -q[:, :, 12:]], 2)
    for match, same in (("rank", False), ("bucket", True)):
        plan = replace(PLAN, match=match)
        early = [weights(x, k, causal=False, plan=plan)[:, :, :12] for x in (q, changed)]
        assert torch.equal(*early) is same, match


def test_padding_is_left_out_of_hashes_and_halves() -> None:
    q, k, v = _draw(29)
    real = torch.ones(B, 29, dtype=torch.bool)
    real[0, :6] = False
    for causal in (True, False):
        call: dict[str, Any] = {"method": "hyperattention:min_seq_len=4,block_size=4,sample_size=4", "causal": causal}
        out = qkv.attention(q, k, v, padding=real, **call)
        close(out[:1, :, 6:], qkv.attention(q[:1, :, 6:], k[:1, :, 6:], v[:1, :, 6:], **call), rtol=1e-9)
        assert not out[0, :, :6].any()


def test_always_keys_hold_a_sink() -> None:
    q, k, v = _draw(128)
    sink = q.mean((1, 2), keepdim=True) + 1.0
    k = k.clone()
    k[:, :, :1] = 6 * sink
    q = q + 1.0
    want = qkv.attention(q, k, v, method="full")
    gap = {}
    for keys in (0, 4):
        method = f"hyperattention:min_seq_len=8,block_size=8,sample_size=8,always_keys={keys}"
        gap[keys] = float((qkv.attention(q, k, v, method=method) - want).norm() / want.norm())
    assert gap[4] < 0.5 * gap[0], gap


def test_hash_beats_random_order_on_clustered_keys() -> None:
    rng = torch.Generator().manual_seed(5)
    centres = torch.randn(8, 16, generator=rng)
    which = torch.randint(0, 8, (512,), generator=rng)
    x = 3 * centres[which] + 0.3 * torch.randn(512, 16, generator=rng)
    v = torch.randn(512, 16, generator=rng) + centres[which]
    x, v = x[None, None], v[None, None]
    want = torch.nn.functional.scaled_dot_product_attention(x, x, v, scale=0.25)

    def error(hashed: bool, seed: int) -> float:
        plan = Plan(0.25, 128, 64, 5, 1, 0, "rank", seed)
        buckets = bucket(x, plan) if hashed else torch.randint(0, 32, (1, 1, 512), generator=rng)
        got, _ = sorted_part(x, x, v, buckets, buckets, plan, one)
        return float((got - want).norm() / want.norm())

    one = torch.ones(1, dtype=torch.bool)
    hashed, shuffled = (sum(error(kind, seed) for seed in range(5)) / 5 for kind in (True, False))
    assert hashed < 0.8 * shuffled, (hashed, shuffled)


def test_cost_grows_almost_linearly() -> None:
    def work(method: str, n: int, causal: bool) -> float:
        q, k, v = (torch.randn(1, 1, n, 16, requires_grad=True) for _ in range(3))
        with FlopCounterMode(display=False) as counter:
            qkv.attention(q, k, v, method=method, causal=causal, form="fast")
        return counter.get_total_flops()

    method = "hyperattention:min_seq_len=64,block_size=32,sample_size=32"
    for causal, least in ((True, 5), (False, 12)):
        small, large = work(method, 1024, causal), work(method, 4096, causal)
        assert large < 6.5 * small, (small, large)  # 4 times the tokens, two halvings more
        dense = 4 * 4096**2 * 16 / (2 if causal else 1)
        assert least * large < dense, (large, dense)


def test_fused_and_plain_parts_agree() -> None:
    q, k, v = _draw(40, 24)
    v = v.repeat(1, 1, 1, 2)[..., :D]
    bias = torch.randn(B, H, 24).double().masked_fill(torch.rand(B, H, 24) < 0.3, -torch.inf)
    bias[..., 0] = 0.0
    k4, v4 = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    for args, more in (((q, k, v), {}), ((q[:, :, :24], k, v), {"causal": True}), ((q, k4, v4), {"bias": bias})):
        fused = attend_lse(*args, scale=0.3, **more)
        plain = attend_lse(args[0].clone().requires_grad_(), *args[1:], scale=0.3, **more)
        for got, want in zip(fused, plain, strict=True):
            close(got, want, rtol=1e-9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fused_parts_on_a_gpu(dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(6, 2, n, 64, generator=rng).to("cuda", dtype) for n in (37, 45, 45))
    bias = (
        torch.randn(6, 2, 45, generator=rng).masked_fill(torch.rand(6, 2, 45, generator=rng) < 0.3, -torch.inf).cuda()
    )
    bias[..., 0] = 0.0
    for args, more in (((q, k, v), {}), ((k, k, v), {"causal": True}), ((q, k, v), {"bias": bias})):
        fused = attend_lse(*args, scale=0.125, **more)
        plain = attend_lse(*(x.double() for x in args), scale=0.125, **more)
        for got, want in zip(fused, plain, strict=True):
            close(got, want, rtol=2e-2 if dtype != torch.float32 else 2e-3, what=f"{dtype} {list(more)}")
