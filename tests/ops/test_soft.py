"""SOFT: the exact kernel as the limit of many landmarks, Newton's inverse and its gradient, ranks and norms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import qkv
from qkv.core.errors import InvalidInput, InvalidParameter, Refused
from qkv.layers._soft import SoftAttention
from qkv.ops.soft import gaussian_attention, kernel, newton_inverse, newton_residual
from qkv.testing import close

B, H, N, D, E = 2, 3, 12, 6, 5


def _draw(n: int = N, m: int = N) -> tuple[torch.Tensor, ...]:
    rng = torch.Generator().manual_seed(0)
    shapes = ((B, H, n, D), (B, H, m, D), (B, H, m, E))
    return tuple(torch.randn(*s, generator=rng, dtype=torch.float64) for s in shapes)


def test_every_token_a_landmark_is_the_exact_kernel() -> None:
    q, _, v = _draw()
    q = 2 * q  # well separated
    want = gaussian_attention(q, v)
    got = qkv.attention(
        q, q, v, method="soft:normalise=plain,ridge=0.0,newton_iters=40", causal=False, landmarks=q, form="fast"
    )
    close(got, want, rtol=1e-8)
    q, k, v = _draw(N, 7)
    weights = (-0.5 * D**-0.5 * (q.unsqueeze(3) - k.unsqueeze(2)).square().sum(-1)).exp()
    close(gaussian_attention(q, v, k), weights @ v, rtol=1e-9, what="the kernel written out")


def test_the_kernel_is_symmetric_positive_and_at_most_one() -> None:
    q, *_ = _draw()
    s = kernel(q, q, D**-0.5)
    close(s, s.mT, rtol=1e-12)
    assert ((s > 0) & (s <= 1)).all()
    close(s.diagonal(0, -2, -1), torch.ones(B, H, N, dtype=torch.float64), rtol=1e-12)
    assert torch.linalg.eigvalsh(s).min() > -1e-12


def test_newton_finds_the_inverse_and_its_gradient() -> None:
    q, *_ = _draw(20)
    a = kernel(3 * q, 3 * q, D**-0.5).requires_grad_()
    x = newton_inverse(a, 20, 0.01)
    assert newton_residual(a, x).max() < 1e-10
    true = torch.linalg.inv(a + 0.01 * torch.eye(20, dtype=torch.float64))
    close(x, true, rtol=1e-10)
    weight = torch.randn(x.shape, dtype=torch.float64)
    (got,), (want,) = (torch.autograd.grad((y * weight).sum(), a) for y in (x, true))
    close(got, want, rtol=1e-9, what="gradient")
    small = kernel(3 * q[:1, :1, :4], 3 * q[:1, :1, :4], D**-0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda y: newton_inverse(y, 20, 0.01), (small,))
    largest = torch.linalg.eigvalsh(a + 0.01 * torch.eye(20, dtype=torch.float64)).amax(-1)
    start = 1.8 / a.sum(-1).amax(-1).square() * largest.square()
    assert ((start > 0) & (start < 2)).all(), "the start must lie where the iteration converges"


def test_landmarks_that_nearly_coincide_do_not_converge_in_twenty() -> None:
    near = torch.randn(1, 1, 1, D, dtype=torch.float64) + 1e-3 * torch.randn(1, 1, 49, D, dtype=torch.float64)
    a = kernel(near, near, D**-0.5)
    assert newton_residual(a, newton_inverse(a, 20, 0.01)).max() > 1e-3
    assert newton_residual(a, newton_inverse(a, 40, 0.01)).max() < 1e-6


def test_tied_queries_make_a_symmetric_map_of_low_rank() -> None:
    q, *_ = _draw()
    eye = torch.eye(N, dtype=torch.float64).expand(B, H, N, N)
    for normalise in ("plain", "symmetric"):
        whole = qkv.attention(q, q, eye, method=f"soft:num_landmarks=4,normalise={normalise}", causal=False)
        close(whole, whole.mT, rtol=1e-9, what="symmetry")
        assert int(torch.linalg.matrix_rank(whole).max()) <= 4
        assert torch.linalg.eigvalsh(whole).min() > -1e-9


def test_order_matters_to_averaged_landmarks_only() -> None:
    q, _, v = _draw()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(3))
    close(gaussian_attention(q[:, :, order], v[:, :, order]), gaussian_attention(q, v)[:, :, order], rtol=1e-12)
    pooled = lambda x, y: qkv.attention(x, x, y, method="soft:num_landmarks=4", causal=False)  # noqa: E731
    gap = pooled(q[:, :, order], v[:, :, order]) - pooled(q, v)[:, :, order]
    assert gap.abs().max() > 1e-3


def test_the_norm_stays_bounded_with_the_normalisation_alone() -> None:
    q, *_ = _draw(16)
    growth = {}
    for normalise in ("plain", "symmetric"):
        norms = []
        for times in (1, 4, 16):
            x = q[:1, :1].repeat(1, 1, times, 1)  # the picture tiled
            eye = torch.eye(x.shape[2], dtype=torch.float64)[None, None]
            marks = q[:1, :1, ::4].repeat(1, 1, times, 1)  # so many times the landmarks, too
            whole = qkv.attention(
                x, x, eye, method=f"soft:normalise={normalise},newton_iters=60", causal=False, landmarks=marks
            )
            norms.append(float(torch.linalg.matrix_norm(whole, 2)))
        growth[normalise] = norms[-1] / norms[0]
    assert growth["plain"] > 15, growth
    assert growth["symmetric"] < 0.2 * growth["plain"], growth


def test_landmarks_of_a_grid_are_its_average_pool() -> None:
    q, k, v = _draw(N, 15)
    field = k.unflatten(2, (3, 5)).permute(0, 1, 4, 2, 3).flatten(0, 1)
    marks = F.adaptive_avg_pool2d(field, 2).flatten(2).mT.unflatten(0, (B, H))
    want = qkv.attention(q, k, v, method="soft", causal=False, landmarks=marks)
    close(qkv.method("soft", num_landmarks=4, grid=(3, 5))(q, k, v, causal=False), want, rtol=1e-9)


def test_bad_calls_are_refused() -> None:
    q, k, v = _draw()
    with pytest.raises(Refused, match="causal only with landmarks"):
        qkv.attention(q, k, v, method="soft")
    with pytest.raises(InvalidParameter, match="square"):
        qkv.method("soft", num_landmarks=5, grid=(7, 7))
    with pytest.raises(InvalidParameter, match="must be one of"):
        qkv.method("soft", normalise="rows")
    with pytest.raises(InvalidInput, match="do not fill a grid"):
        qkv.method("soft", num_landmarks=4, grid=(3, 5))(q, k, v, causal=False)


@pytest.mark.parametrize("ridge", [0.0, 0.01, 0.06, 0.1, 3.0])
@pytest.mark.parametrize("count", [1, 4])
def test_newton_converges_whatever_the_ridge(ridge: float, count: int) -> None:
    a = torch.eye(count, dtype=torch.float64) * 0.9 + 0.1
    x = newton_inverse(a, 40, ridge)
    close(x, torch.linalg.inv(a + ridge * torch.eye(count, dtype=a.dtype)), rtol=1e-9, what=f"ridge {ridge}")


def test_state_is_one_row_for_each_landmark() -> None:
    q, k, v = _draw()
    marks = torch.randn(H, 7, D, dtype=torch.float64)
    _, state = qkv.attention(q, k, v, method="soft", landmarks=marks, return_state=True)
    assert state.bytes == 8 * B * H * 7 * E


def test_the_block_ties_keys_and_shares_its_landmarks_convolution() -> None:
    torch.manual_seed(0)
    layer = SoftAttention(12, 3, ratio=2, conv=3).double()
    x = torch.randn(2, 24, 12, dtype=torch.float64)
    out = layer(x, (4, 6))
    q, v = (y.unflatten(-1, (3, 4)).transpose(1, 2) for y in (layer.query(x), layer.value(x)))
    heads = []
    for h in range(3):
        field = (q[:, h] / 4**0.25).mT.unflatten(-1, (4, 6))
        marks = F.gelu(layer.norm(layer.landmarks(field).flatten(2).mT)) * 4**0.25
        assert marks.shape == (2, 6, 4)
        y = qkv.attention(
            q[:, h : h + 1], q[:, h : h + 1], v[:, h : h + 1], method="soft", causal=False, landmarks=marks[:, None]
        )
        picture = v[:, h].mT.unflatten(-1, (4, 6)).reshape(-1, 1, 4, 6)
        local = F.conv2d(picture, layer.kernels[h : h + 1], padding=1).reshape(2, 4, 24).mT
        heads.append(y[:, 0] + local)
    close(out, layer.out(torch.cat(heads, -1)), rtol=1e-9)
    out.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    with pytest.raises(InvalidInput, match="no square of side 2"):
        layer(x, (1, 24))
    with pytest.raises(InvalidParameter, match="odd"):
        SoftAttention(12, 3, conv=4)
