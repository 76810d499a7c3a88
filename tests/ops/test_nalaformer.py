"""NaLaFormer: norms of queries sharpen, norms of keys cancel, signs stay apart, and rotations turn with the grid."""

from __future__ import annotations

import math

import pytest
import torch

import qkv
from qkv.core.errors import InvalidInput, InvalidParameter
from qkv.ops._common.grids import grid_angles
from qkv.ops.nalaformer import key_features, query_features
from qkv.testing import close

B, H, D, E, h, w = 2, 2, 8, 5, 4, 6
N = h * w
FLAT = f"power_scale={2.0**-40},power_shift={2.0**40}"  # exponent 1 whatever the norm


def _draw() -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(B, H, N, x, generator=rng, dtype=torch.float64) for x in (D, D, E)]


def _rows(q: torch.Tensor, k: torch.Tensor, settings: str = "eps=0.0", **more: torch.Tensor) -> torch.Tensor:
    eye = torch.eye(k.shape[2], dtype=q.dtype).expand(*k.shape[:2], -1, -1)
    return qkv.attention(q, k, eye, method=f"nalaformer:{settings}", causal=False, **more)


def _entropy(rows: torch.Tensor) -> torch.Tensor:
    return -(rows * rows.clamp(min=1e-300).log()).sum(-1)


def test_rows_are_weights_and_exponents_lie_in_their_range() -> None:
    q, k, _ = _draw()
    for settings in ("eps=0.0", "eps=0.0,feature=cosine"):
        rows = _rows(q, k, settings)
        assert (rows >= 0).all()
        close(rows.sum(-1), torch.ones(B, H, N, dtype=torch.float64), rtol=1e-12, what=settings)
    one = torch.zeros(2, D, dtype=torch.float64)
    one[:, 0], one[:, 1] = torch.tensor([0.6e-3, 60.0]), torch.tensor([0.8e-3, 80.0])
    powers = query_features(one)[:, 0].log() / math.log(0.6)
    assert abs(powers[0] - 1.503) < 1e-4 and abs(powers[1] - 4.5) < 1e-9


def test_norms_of_keys_cancel_and_norms_of_queries_sharpen() -> None:
    q, k, _ = _draw()
    close(_rows(q, 3 * k), _rows(q, k), rtol=1e-9, what="scaled keys")
    entropies = [_entropy(_rows(c * q, k)) for c in (0.05, 0.3, 1.0, 4.0, 40.0)]
    means = [x.mean().item() for x in entropies]
    assert means == sorted(means, reverse=True) and means[3] < means[0] - 0.1, means
    assert abs(means[4] - means[3]) < 1e-2, "tanh has saturated"
    flat = [_entropy(_rows(c * q, k, f"eps=0.0,{FLAT}")) for c in (0.05, 4.0)]
    close(flat[0], flat[1], rtol=1e-9, what="negative control: exponent 1 ignores the norm")
    cosine = [_entropy(_rows(c * q, k, "eps=0.0,feature=cosine")) for c in (0.05, 4.0)]
    close(cosine[0], cosine[1], rtol=1e-9, what="cosine features ignore the query's norm too")


def test_exponent_one_is_relu_attention_with_signs_apart() -> None:
    q, k, v = _draw()
    weights = q.relu() @ k.relu().mT + (-q).relu() @ (-k).relu().mT
    want = weights / weights.sum(-1, keepdim=True) @ v
    got = qkv.attention(q, k, v, method=f"nalaformer:{FLAT},key_power=1,eps=0.0", causal=False)
    close(got, want, rtol=1e-9, what="sign-split ReLU attention")


def test_opposite_signs_do_not_meet() -> None:
    q, k, v = _draw()
    q, k = q.abs(), -k.abs()
    k[:, :, 3] = -k[:, :, 3]
    rows = _rows(q, k)
    assert not rows[..., :3].any() and not rows[..., 4:].any()
    close(rows[..., 3], torch.ones(B, H, N, dtype=torch.float64), rtol=1e-12)
    assert not qkv.attention(q, -k.abs(), v, method="nalaformer:eps=0.0", causal=False).any()
    cosine = _rows(q, -k.abs(), "eps=0.0,feature=cosine")
    assert (cosine > 0).all(), "angles keep a quarter turn apart: small, not 0"


def test_cosine_features_keep_the_norm() -> None:
    q, _, _ = _draw()
    size = query_features(q, feature="cosine").norm(dim=-1)
    close(size, D**0.5 * q.norm(dim=-1), rtol=1e-12)
    close(key_features(q, feature="cosine"), query_features(q, feature="cosine"), rtol=1e-12)


def test_a_mirrored_grid_with_mirrored_angles_mirrors_the_output() -> None:
    q, k, v = _draw()
    angles = grid_angles((h, w), D)
    want = qkv.attention(q, k, v, method="nalaformer", causal=False, query_angles=angles, key_angles=angles)
    order = torch.arange(N).reshape(h, w).flip(1).flatten()
    got = qkv.attention(
        *(x[:, :, order] for x in (q, k, v)),
        method="nalaformer",
        causal=False,
        query_angles=angles[order],
        key_angles=angles[order],
    )
    close(got, want[:, :, order], rtol=1e-9)
    shifted = angles + grid_angles((3 * h, w), D)[2 * h * w]
    got = qkv.attention(q, k, v, method="nalaformer", causal=False, query_angles=shifted, key_angles=shifted)
    close(got, want, rtol=1e-9, what="angles are relative")
    plain = qkv.attention(q, k, v, method="nalaformer", causal=False)
    assert (plain - want).abs().max() > 1e-2


def test_zero_queries_give_zero() -> None:
    q, k, v = _draw()
    q[:, :, 2] = 0.0
    q.requires_grad_()
    out = qkv.attention(q, k, v, method="nalaformer", causal=False)
    assert not out[:, :, 2].any()
    out.sum().backward()
    assert q.grad is not None and q.grad.isfinite().all()


def test_bad_settings_are_refused() -> None:
    q, k, v = _draw()
    with pytest.raises(InvalidParameter, match="at least 1"):
        qkv.method("nalaformer", power_shift=0.1)
    with pytest.raises(InvalidInput, match="or neither"):
        qkv.attention(q, k, v, method="nalaformer", causal=False, query_angles=grid_angles((h, w), D))
    with pytest.raises(InvalidInput, match="do not divide by 4"):
        grid_angles((h, w), 6)


def test_state_has_the_size_of_the_page() -> None:
    q, k, v = (x.float() for x in _draw())
    _, state = qkv.attention(q, k, v, method="nalaformer", return_state=True)
    assert state.bytes == 4 * B * H * 2 * D * (E + 1)
