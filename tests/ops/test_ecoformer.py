"""EcoFormer: codes and their products, rows, what a fit reaches, and gradients past the sign."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import qkv
from qkv.core.errors import InvalidInput, InvalidParameter, Refused
from qkv.ops.ecoformer import Hash, KernelHash, energy, fit_hash, hash_codes, operations, softmax_operations
from qkv.testing import close

B, H, N, D, E, W, BITS = 2, 2, 24, 8, 5, 12, 6


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _hash(bits: int = BITS) -> Hash:
    anchors = F.normalize(_normal(H, W, D, seed=5), dim=-1)
    return Hash(anchors, _normal(H, bits, W, seed=6), torch.full((H, W), 0.6, dtype=torch.float64))


def _tokens(n: int = N) -> tuple[torch.Tensor, torch.Tensor]:
    return _normal(B, H, n, D), _normal(B, H, n, E, seed=1)


def _clusters(batch: int = 4, n: int = 60) -> torch.Tensor:
    """Tokens around a few directions."""
    centres, which = _normal(H, 6, D, seed=2), torch.arange(n) % 6
    return centres[:, which] + 0.4 * _normal(batch, H, n, D, seed=3)


def test_weights_come_from_codes_and_rows_sum_to_one() -> None:
    x, v = _tokens()
    h = _hash()
    c = hash_codes(x, *h)
    assert set(c.unique().tolist()) == {-1.0, 1.0}
    weights = c @ c.mT + BITS + 1
    assert weights.min() >= 1 and (weights.diagonal(0, -2, -1) == 2 * BITS + 1).all()
    hamming = (c.unsqueeze(3) != c.unsqueeze(2)).sum(-1)
    assert torch.equal(c @ c.mT, (BITS - 2 * hamming).double())
    want = weights / weights.sum(-1, keepdim=True) @ v
    got = qkv.attention(x, x, v, method="ecoformer", causal=False, **h._asdict())
    close(got, want, rtol=1e-12, what="the map")
    one = qkv.attention(x, x, torch.ones_like(v), method="ecoformer", causal=True, **h._asdict())
    close(one, torch.ones_like(v), rtol=1e-12, what="constant values")
    released = qkv.attention(x, x, v, method="ecoformer:shift=reference", causal=False, **h._asdict())
    close(
        released, ((c @ c.mT) @ v + (BITS + 1) * v) / weights.sum(-1, keepdim=True), rtol=1e-12, what="released shift"
    )
    ones = qkv.attention(x, x, torch.ones_like(v), method="ecoformer:shift=reference", causal=False, **h._asdict())
    assert (ones - 1).abs().max() > 0.1, "negative control: its rows do not sum to 1"


def test_order_and_lengths_of_tokens_do_not_matter() -> None:
    x, v = _tokens()
    h = _hash()._asdict()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    want = qkv.attention(x, x, v, method="ecoformer", causal=False, **h)
    moved = 3 * x[:, :, order]
    got = qkv.attention(moved, moved, v[:, :, order], method="ecoformer", causal=False, **h)
    close(got, want[:, :, order], rtol=1e-9)
    x[:, :, 4] = x[:, :, 9]
    c = hash_codes(x, **h)
    assert torch.equal(c[:, :, 4], c[:, :, 9])


def test_a_causal_code_never_changes_and_the_last_row_has_seen_all() -> None:
    x, v = _tokens()
    h = _hash()._asdict()
    whole = qkv.attention(x, x, v, method="ecoformer", causal=True, **h)
    part = qkv.attention(x[:, :, :9], x[:, :, :9], v[:, :, :9], method="ecoformer", causal=True, **h)
    close(part, whole[:, :, :9], rtol=1e-12)
    _, state = qkv.attention(x, x, v, method="ecoformer", causal=True, return_state=True, **h)
    apart = (F.normalize(x, dim=-1).unsqueeze(3) - h["anchors"][None, :, None]).square().sum(-1).mean((-2, -1))
    close(state["spread"] / N, apart, rtol=1e-9, what="sigma after the last token")
    assert state.bytes == 8 * B * (H * (BITS * E + BITS + E + 1) + 1)


def test_many_random_bits_measure_the_angle() -> None:
    """Random hyperplanes over centred kernels: code products follow 1 - 2 angle / pi of what is hashed."""
    x, _ = _tokens()
    h = _hash(4000)
    apart = (F.normalize(x, dim=-1).unsqueeze(3) - h.anchors[None, :, None]).square().sum(-1)
    z = (-apart / (2 * apart.mean((-2, -1), keepdim=True))).exp() - h.mean[:, None]
    z = F.normalize(z, dim=-1)
    c = hash_codes(x, *h)
    close(c @ c.mT / 4000, 1 - 2 * (z @ z.mT).clamp(-1, 1).acos() / math.pi, rtol=0.0, atol=0.09)


def test_gradients_pass_where_the_sign_is_uncertain() -> None:
    x, v = _tokens(7)
    h = _hash()._asdict()
    small = h | {"planes": 0.05 * h["planes"]}
    for planes, some in ((h["planes"] * 1e3, False), (small["planes"], True)):
        for form in ("fast", "reference"):
            leaf = x.clone().requires_grad_()
            out = qkv.attention(leaf, leaf, v, method="ecoformer", causal=False, form=form, **h | {"planes": planes})
            (out * _normal(B, H, 7, E, seed=8)).sum().backward()
            assert leaf.grad is not None
            if some:
                first = leaf.grad if form == "fast" else first  # noqa: F821
                close(leaf.grad, first, rtol=1e-9, atol=1e-12, what="both forms")
            assert bool(leaf.grad.any()) is some
    with torch.no_grad():
        same = [
            qkv.attention(x, x, v, method=f"ecoformer:straight_through={y}", causal=False, **h)
            for y in ("true", "false")
        ]
    assert torch.equal(*same), "the forward pass knows nothing of it"


def _correlation(x: torch.Tensor, h: Hash) -> float:
    """Of code products with the target of a fit: +1 at the ten largest scores of a row, -1 at the ten smallest."""
    c, u = hash_codes(x, *h), F.normalize(x, dim=-1)
    scores = u @ u.mT
    target = torch.zeros_like(scores).scatter(-1, scores.topk(10).indices, 1.0)
    target = target.scatter(-1, scores.topk(10, largest=False).indices, -1.0)
    pair = torch.stack([(c @ c.mT).flatten(), target.flatten()])
    return torch.corrcoef(pair)[0, 1].item()


def test_a_fit_never_gets_worse_than_where_it_began() -> None:
    x = _clusters()
    fits = [
        fit_hash(x, bits=8, anchors=20, steps=s, rate=0.5, generator=torch.Generator().manual_seed(0)) for s in (0, 50)
    ]
    untrained, trained = fits
    assert torch.equal(untrained.anchors, trained.anchors) and not torch.equal(untrained.planes, trained.planes)
    first, second = (_correlation(x, h) for h in fits)
    assert second > first + 0.05, (first, second)
    again = fit_hash(x, bits=8, anchors=20, steps=50, rate=0.5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.planes, trained.planes)
    one = fit_hash(x, bits=1, anchors=20, steps=50, rate=0.5, generator=torch.Generator().manual_seed(0))
    assert _correlation(x, one) < second, "more bits, closer to the scores"


def test_hash_functions_work_after_a_fit_only() -> None:
    layer = KernelHash(H, D, bits=8, anchors=20)
    x = _clusters().float()
    with pytest.raises(Refused, match="not been fitted"):
        layer.codes(x)
    layer.fit(x, steps=2, generator=torch.Generator().manual_seed(0))
    assert layer.codes(x).shape == (4, H, 60, 8)
    copy = KernelHash(H, D, bits=8, anchors=20)
    copy.load_state_dict(layer.state_dict())
    assert torch.equal(copy.codes(x), layer.codes(x))
    before = layer.planes.clone()
    layer.fit(x, steps=0, generator=torch.Generator().manual_seed(1))
    assert torch.equal(layer.planes, before), "a second fit goes on from the first"
    with pytest.raises(InvalidParameter, match=r"expected \(2, 4, 20\)"):
        fit_hash(x, bits=4, anchors=20, start=before)
    with pytest.raises(InvalidParameter, match="anchors=20 of at most 8"):
        layer.fit(x[:, :, :8])


def test_queries_that_are_not_the_keys_are_refused() -> None:
    x, v = _tokens()
    h = _hash()._asdict()
    with pytest.raises(InvalidInput, match="tied=False"):
        qkv.attention(x, x + 1e-3, v, method="ecoformer", causal=False, **h)
    both = qkv.attention(x, x.clone(), v, method="ecoformer", causal=False, **h)
    close(qkv.attention(x, x, v, method="ecoformer:tied=false", causal=False, **h), both, rtol=1e-12)


def test_additions_cost_less_than_products() -> None:
    ours, softmax = operations(3136, 32, 32), softmax_operations(3136, 32, 32)
    assert ours["multiply"] < softmax["multiply"] / 50
    assert energy(ours) < energy(softmax) / 20
    assert math.isclose(energy({"multiply": 10**12, "add": 0}), 3.7)
