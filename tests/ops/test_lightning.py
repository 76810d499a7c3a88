"""TransNormerLLM's operator: LRPE, decays by layer, no hidden denominator."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import qkv
from qkv.core.errors import InvalidInput, InvalidParameter
from qkv.ops._common.positions import lrpe, lrpe_angles, md_lrpe
from qkv.testing import close

B, H, N, D, E = 2, 4, 29, 6, 5


def _draw() -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(B, H, N, w, generator=rng, dtype=torch.float64) for w in (D, D, E)]


def test_lrpe_depends_on_the_distance_alone() -> None:
    q, k, _ = _draw()
    angles = lrpe_angles(H, D)
    assert angles[1, 2] == 10000 ** (-2 * (D + 2) / (H * D))
    for shift in (0, 1000):
        p, r = (torch.full((1, N), x + shift) for x in (17, 5))
        got = (lrpe(q, p, angles) * lrpe(k, r, angles)).sum(-1)
        close(got, (q * k * (12 * angles).cos()[:, None]).sum(-1), rtol=1e-9, what=f"positions from {shift}")


def test_lrpe_continues_after_a_prefill() -> None:
    q, k, v = _draw()
    method = qkv.method("lightning:layer=0,layers=4")
    whole = method(q, k, v)
    for split in (1, 10, 28):
        _, state = method(*(x[:, :, :split] for x in (q, k, v)), return_state=True)
        assert state["position"].tolist() == [split] * B
        close(
            method(*(x[:, :, split:] for x in (q, k, v)), initial_state=state),
            whole[:, :, split:],
            rtol=1e-9,
            what=f"split {split}",
        )


def test_scale_invariance_after_a_norm() -> None:
    """A hidden denominator would undo the scale of v only, or of q and k only."""
    q, k, v = _draw()
    method = qkv.method("lightning:layer=1,layers=4,activation=identity")
    norm = lambda x: x / x.square().mean((1, 3), keepdim=True).sqrt()  # noqa: E731
    want = norm(method(q, k, v))
    for scaled in ((3 * q, k, v), (q, 3 * k, v), (q, k, 3 * v)):
        close(method(*scaled), 3 * method(q, k, v), rtol=1e-10, what="homogeneous")
        close(norm(method(*scaled)), want, rtol=1e-10, what="after the norm")


def test_last_layer_hardly_decays_and_the_first_does() -> None:
    q, k, v = _draw()
    plain = (F.silu(q) @ F.silu(k).mT).tril() @ v
    last = qkv.attention(q, k, v, method="lightning:layer=3,layers=4")
    first = qkv.attention(q, k, v, method="lightning:layer=0,layers=4,use_lrpe=false")
    assert (last - plain).abs().max() < 1e-4 * N * plain.abs().max()
    assert (first - plain).abs().max() > 0.1


def test_paper_rule_differs_and_bad_layers_are_refused() -> None:
    q, k, v = _draw()
    alibi, paper = (qkv.attention(q, k, v, method=f"lightning:layer=1,layers=4,slopes={s}") for s in ("alibi", "paper"))
    assert (alibi - paper).abs().max() > 0.1
    with pytest.raises(InvalidParameter, match="layer=4"):
        qkv.method("lightning:layer=4,layers=4")
    with pytest.raises(InvalidParameter, match="slopes"):
        qkv.method("lightning:slopes=retnet")


def test_md_lrpe_is_relative_along_every_axis() -> None:
    rng = torch.Generator().manual_seed(1)
    x, y = (torch.randn(8, generator=rng, dtype=torch.float64) for _ in range(2))
    for kind in ("rotary", "cosine"):
        a, b = (md_lrpe(z.expand(12, 8), (3, 4), kind).unflatten(0, (3, 4)) for z in (x, y))
        close((a[0, 1] * b[1, 0]).sum(), (a[1, 3] * b[2, 2]).sum(), rtol=1e-12, what=f"{kind}: the same offset")
        assert abs((a[0, 1] * b[1, 0]).sum() - (a[0, 0] * b[1, 0]).sum()) > 1e-3
    close(md_lrpe(x.expand(12, 8), (3, 4)).norm(dim=-1), x.norm().expand(12), rtol=1e-12, what="rotary keeps lengths")
    with pytest.raises(InvalidInput, match="grid"):
        md_lrpe(x.expand(11, 8), (3, 4))
