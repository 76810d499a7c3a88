"""ESSA: what the correlation of spectra does not see, and what the running form is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import qkv
from qkv.core.errors import InvalidParameter
from qkv.ops import essa
from qkv.testing import close

B, H, N, D, E = 2, 2, 11, 6, 5


def _draw() -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(B, H, N, w, generator=rng, dtype=torch.float64) for w in (D, D, E)]


def _essa(q: Tensor, k: Tensor, v: Tensor, setting: str = "essa", causal: bool = False) -> Tensor:
    return qkv.attention(q, k, v, method=setting, causal=causal)


def _affine(x: Tensor) -> Tensor:
    """Every token scaled and shifted by numbers of its own, as by light and shade."""
    rng = torch.Generator().manual_seed(1)
    scale, shift = (torch.rand(B, H, N, 1, generator=rng, dtype=torch.float64) for _ in range(2))
    return x * (0.5 + scale) + 3 * shift


@pytest.mark.parametrize("causal", [False, True])
def test_brightness_and_contrast_of_a_token_change_nothing(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = _draw()
    want = _essa(q, k, v, causal=causal)
    close(_essa(_affine(q), k, v, causal=causal), want, rtol=1e-6, what="queries")
    close(_essa(q, _affine(k), v, causal=causal), want, rtol=1e-6, what="keys")
    close(_essa(-q, -k, v, causal=causal), want, rtol=1e-12, what="the negative of a spectrum")
    psi = lambda x, eps, order: x.square() / (x.square().sum(-1, keepdim=True) + eps)  # noqa: E731
    monkeypatch.setattr(essa, "_psi", psi)  # negative control: not centred
    assert (_essa(q + 3, k, v, causal=causal) - _essa(q, k, v, causal=causal)).abs().max() > 1e-2


def test_the_map_is_the_squared_correlation_without_norms() -> None:
    q, k, _ = _draw()
    one = torch.eye(N, dtype=torch.float64).expand(B, H, N, N)
    got = _essa(q, k, one, "essa:key_norm=none,value_residual=false")
    a, c = (x - x.mean(-1, keepdim=True) for x in (q, k))
    a, c = (x / x.norm(dim=-1, keepdim=True) for x in (a, c))
    psi = a.square() / a.square().norm(dim=-1, keepdim=True)
    close(got, psi @ c.square().mT / N**0.5, rtol=1e-6, what="the map")
    assert (_essa(q, k, one, "essa:value_residual=false") >= 0).all()


def test_tokens_have_no_order() -> None:
    q, k, v = _draw()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(2))
    got = _essa(*(x[:, :, order] for x in (q, k, v)))
    close(got, _essa(q, k, v)[:, :, order], rtol=1e-12, what="permuted tokens")


def test_a_constant_spectrum_reads_nothing() -> None:
    q, k, v = _draw()
    q[:, :, 3], k[:, :, 4] = 2.0, 0.0
    out = _essa(q, k, v)
    assert out.isfinite().all()
    close(out[:, :, 3], v[:, :, 3], rtol=1e-12, what="a query without contrast")


def test_the_last_row_of_the_running_form_is_the_whole_one() -> None:
    q, k, v = _draw()
    for setting in ("essa", "essa:order=2", "essa:key_norm=none"):
        running, whole = _essa(q, k, v, setting, True), _essa(q, k, v, setting)
        close(running[:, :, -1], whole[:, :, -1], rtol=1e-12, what=setting)
        assert (running[:, :, 2] - whole[:, :, 2]).abs().max() > 1e-3


def test_the_second_order_adds_fourth_powers() -> None:
    q, k, v = _draw()
    x = q[..., :1].repeat(1, 1, 1, D)
    assert (_essa(q, k, v, "essa:order=2") - _essa(q, k, v)).abs().max() > 1e-3
    close(_essa(x, k, v, "essa:order=2"), v, rtol=1e-12, what="constant queries")
    with pytest.raises(InvalidParameter, match="order"):
        qkv.method("essa:order=3")


def test_the_result_counts_the_tokens() -> None:
    q, k, v = _draw()
    real = torch.arange(N) < torch.tensor([[N], [7]])
    want = _essa(*(x[1:, :, :7] for x in (q, k, v)))
    got = qkv.attention(q, k, v, method="essa", causal=False, padding=real)
    close(got[1:, :, :7], want, rtol=1e-12, what="the padded row")
