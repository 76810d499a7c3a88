"""Kernelised attention with relative positions: Toeplitz products, the limits of the bias, the kernel it estimates, stability."""

from __future__ import annotations

import pytest
import torch

import qkv
from qkv.core.errors import InvalidInput, InvalidParameter, Refused
from qkv.ops._common.grids import offsets
from qkv.ops._common.toeplitz import fast_length, lagged, toeplitz
from qkv.ops.kernelized_rpe import orthogonal_features, random_features
from qkv.testing import close

B, H, N, D, E, M = 2, 2, 23, 6, 5, 12


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _draw(n: int = N) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    return {"q": _normal(B, H, n, D), "k": _normal(B, H, n, D, seed=2), "v": _normal(B, H, n, E, seed=3),
            "projection": orthogonal_features(M, D, rng), "bias": _normal(H, 2 * n - 1, seed=4)}  # fmt: skip


def test_toeplitz_products_equal_the_matrix() -> None:
    for grid in ((7,), (1,), (16,), (3, 5), (4, 1)):
        n = torch.tensor(grid).prod().item()
        lags = (2 * torch.tensor(grid) - 1).prod().item()
        table, x = _normal(3, lags), _normal(2, 3, n, 4, seed=1)
        close(toeplitz(table, x.mT, grid).mT, table[:, offsets(grid)] @ x, rtol=1e-12, atol=1e-12, what=str(grid))
    kernel, x = _normal(3, 10), _normal(2, 3, 4, 2, 5, seed=1)
    lag = 5 + torch.arange(5)[:, None] - torch.arange(5)
    want = torch.einsum("hij,bhfcj->bhfci", kernel[:, lag], x)
    close(lagged(kernel, x), want, rtol=1e-12, atol=1e-12, what="the later half")
    assert [fast_length(n) for n in (1, 2, 7, 13, 59)] == [2, 2, 8, 16, 60]
    with pytest.raises(InvalidInput, match="expected 7 and 13"):
        toeplitz(_normal(3, 12), _normal(2, 3, 4, 7), (7,))


@pytest.mark.parametrize("causal", [True, False])
def test_every_way_of_summing_is_the_map(causal: bool) -> None:
    x = _draw()
    rows = (
        random_features(x["q"], x["projection"], 1.0, "prf", True)
        @ random_features(x["k"], x["projection"], 1.0, "prf", True).mT
    )
    t = torch.arange(N)
    weights = rows * x["bias"][:, t - t[:, None] + N - 1].exp()
    weights = weights.tril() if causal else weights
    want = weights / weights.sum(-1, keepdim=True) @ x["v"]
    for settings in ("", ":chunk_size=2,columns=2", ":method=windowed", ":chunk_size=3,method=windowed"):
        got = qkv.attention(**x, method=f"kernelized-rpe{settings}", causal=causal)
        close(got, want, rtol=1e-9, what=settings or "default")


def test_a_bias_that_is_constant_far_away_needs_windows_only() -> None:
    x = _draw()
    t = torch.arange(1 - N, N).clamp(-4, 4) + N - 1
    clipped = x | {"bias": x["bias"][:, t]}
    for causal in (True, False):
        want = qkv.attention(**clipped, method="kernelized-rpe", causal=causal)
        got = qkv.attention(**x, method="kernelized-rpe:max_distance=4,method=windowed,chunk_size=2", causal=causal)
        close(got, want, rtol=1e-9, what=f"causal={causal}")
    short = x | {"bias": x["bias"][:, N - 5 : N + 4]}
    close(
        qkv.attention(**short, method="kernelized-rpe:beyond=last"),
        want_causal(clipped),
        rtol=1e-9,
        what="its last value goes on",
    )
    with pytest.raises(InvalidInput, match="23 tokens are more than the 5"):
        qkv.attention(**short, method="kernelized-rpe")


def want_causal(x: dict[str, torch.Tensor]) -> torch.Tensor:
    return qkv.attention(**x, method="kernelized-rpe", causal=True, form="reference")


@pytest.mark.parametrize("settings", ["", ",chunk_size=4,columns=2"])
def test_grids_have_biases_of_two_distances(settings: str) -> None:
    grid = (4, 5)
    x = _draw(20) | {"bias": _normal(H, 7 * 9)}
    method = f"kernelized-rpe:grid=[4,5]{settings}"
    want = qkv.attention(**x, method=method, causal=False, form="loop")
    for form in ("fast", "reference"):
        close(qkv.attention(**x, method=method, causal=False, form=form), want, rtol=1e-9, what=form)
    separable = (_normal(H, 7, 1, seed=5) + _normal(H, 1, 9, seed=6)).flatten(1)
    flipped = separable.unflatten(1, (7, 9)).flip(1).flatten(1)
    order = torch.arange(20).reshape(grid).flip(0).flatten()
    turned = {n: t[:, :, order] if n in "qkv" else t for n, t in x.items()}
    a = qkv.attention(**x | {"bias": separable}, method=method, causal=False)
    b = qkv.attention(**turned | {"bias": flipped}, method=method, causal=False)
    close(b, a[:, :, order], rtol=1e-9, what="upside down")
    with pytest.raises(Refused, match="no order"):
        qkv.attention(**x, method=method, causal=True)
    with pytest.raises(InvalidInput, match="63 numbers per head"):
        qkv.attention(**x | {"bias": separable[:, 1:]}, method=method, causal=False)


def test_no_bias_is_random_feature_attention_and_a_steep_one_returns_the_value() -> None:
    x = _draw()
    a, b = (random_features(x[n], x["projection"], 1.0, "prf", True) for n in "qk")
    weights = a @ b.mT
    want = weights / weights.sum(-1, keepdim=True) @ x["v"]
    close(qkv.attention(**x | {"bias": None}, method="kernelized-rpe", causal=False), want, rtol=1e-9, what="without")
    zero = x | {"bias": torch.zeros(H, 2 * N - 1, dtype=torch.float64)}
    close(qkv.attention(**zero, method="kernelized-rpe", causal=False), want, rtol=1e-9, what="zero")
    steep = torch.full((H, 2 * N - 1), -60.0, dtype=torch.float64)
    steep[:, N - 1] = 0.0
    for causal in (True, False):
        got = qkv.attention(**x | {"bias": steep}, method="kernelized-rpe:chunk_size=4", causal=causal)
        close(got, x["v"], rtol=1e-9, atol=1e-12, what=f"causal={causal}")


def test_many_features_approach_softmax_of_unit_vectors() -> None:
    x = _draw()
    q, k = (x[n] / x[n].norm(dim=-1, keepdim=True) for n in "qk")
    t = torch.arange(N)
    want = (q @ k.mT + x["bias"][:, t - t[:, None] + N - 1]).softmax(-1) @ x["v"]
    for features in ("prf", "trig"):
        errors = []
        for m in (24, 24 * 64):
            rng = torch.Generator().manual_seed(0)
            drawn = [x | {"projection": orthogonal_features(m, D, rng)} for _ in range(8)]
            outs = [qkv.attention(**d, method=f"kernelized-rpe:features={features}", causal=False) for d in drawn]
            errors.append(torch.stack([(o - want).square().mean() for o in outs]).mean().sqrt())
        assert 4 < errors[0] / errors[1] < 16, (features, errors)  # 64 times the features: 8 times smaller


def test_unit_vectors_bound_the_variance_that_long_ones_make_explode() -> None:
    rng = torch.Generator().manual_seed(0)
    w = torch.stack([orthogonal_features(M, D, rng) for _ in range(300)])  # as 300 heads
    q, k = _normal(2, 300, 1, D)
    near = {}
    for size in (1.0, 4.0):
        a, b = ((size * y / y.norm()).expand(300, -1)[None, :, None] for y in (q[0, 0], k[0, 0]))
        kernel = (random_features(a, w, 1.0, "prf", False) * random_features(b, w, 1.0, "prf", False)).sum(-1)
        off = kernel.squeeze().log() - (a * b).sum(-1).squeeze()
        near[size] = (off.abs() < 0.7).double().mean().item()  # within a factor of two
    assert near[1.0] > 0.9 and near[4.0] < 0.2, near
    x = _draw()
    far = qkv.attention(**x | {"q": 4e3 * x["q"], "k": 1e-3 * x["k"]}, method="kernelized-rpe")
    close(far, qkv.attention(**x, method="kernelized-rpe"), rtol=1e-6, what="lengths of queries and keys do not matter")
    with pytest.warns(UserWarning, match="variance"):
        plain = qkv.method("kernelized-rpe", normalize_qk=False)
    assert plain(**x, causal=True).isfinite().all()


def test_only_distances_matter() -> None:
    x = _draw()
    later = {n: t.roll(3, 2) for n, t in x.items() if n in "qkv"}
    real = torch.arange(N).expand(B, N) >= 3
    first = {n: t[:, :, : N - 3] for n, t in x.items() if n in "qkv"}
    for causal in (True, False):
        bias = x["bias"][:, 3:-3]
        want = qkv.attention(**x | first | {"bias": bias}, method="kernelized-rpe", causal=causal)
        got = qkv.attention(**x | later, method="kernelized-rpe", causal=causal, padding=real)
        close(got[:, :, 3:], want, rtol=1e-9, what=f"causal={causal}")


def test_rows_sum_to_one_and_a_decode_needs_no_more_than_the_table() -> None:
    x = _draw()
    ones = x | {"v": torch.ones_like(x["v"])}
    close(qkv.attention(**ones, method="kernelized-rpe"), ones["v"], rtol=1e-12, what="rows")
    m = qkv.method("kernelized-rpe", max_distance=4)
    _, state = m(**x, return_state=True)
    assert state.bytes == 8 * B * H * (M * (E + 1) + 4 * (M + E))
    _, state = qkv.method("kernelized-rpe")(**x, return_state=True)
    one = {n: t[:, :, :1] if n in "qkv" else t for n, t in x.items()}
    with pytest.raises(InvalidInput, match="24 tokens"):
        qkv.method("kernelized-rpe").step(**one, state=state)


def test_bad_settings_are_refused() -> None:
    for bad in ({"grid": (3,)}, {"grid": (3, 4), "max_distance": 2}, {"grid": (3, 4), "method": "windowed"},
                {"features": "trig", "normalize_qk": False}):  # fmt: skip
        with pytest.raises(InvalidParameter, match="kernelized-rpe"):
            qkv.method("kernelized-rpe", **bad)
    x = _draw()
    with pytest.raises(InvalidInput, match="2 T - 1"):
        qkv.attention(**x | {"bias": x["bias"][:, 1:]}, method="kernelized-rpe")
    with pytest.raises(InvalidInput, match="negative"):
        qkv.attention(**x, method="kernelized-rpe", scale=-1.0)


def test_features_are_orthogonal_in_blocks() -> None:
    w = orthogonal_features(15, D, torch.Generator().manual_seed(0))
    assert w.shape == (15, D)
    gram = w[:D] @ w[:D].mT
    close(gram, gram.diagonal().diag(), rtol=1e-9, atol=1e-9)
