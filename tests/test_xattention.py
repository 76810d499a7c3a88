"""XAttention's own oracles: the antidiagonal identity, minimality, limits, stripes, offsets, padding, calibration."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import qkv
from qkv.core.attend import attend
from qkv.core.errors import InvalidInput, InvalidParameter, Refused
from qkv.patterns import xattention
from qkv.patterns.xattention import XAttention, block_scores, calibrate_thresholds
from qkv.testing import close

torch.set_num_threads(1)


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


@pytest.mark.parametrize("stride", [1, 2, 4, 8])
def test_strided_product_is_the_antidiagonal_sum(stride: int) -> None:
    q, k = normal(2, 3, 32, 5), normal(2, 3, 40, 5, seed=1)
    scores = q @ k.mT
    rows = q.unflatten(2, (-1, stride)).flip(3).flatten(3)
    columns = k.unflatten(2, (-1, stride)).flatten(3)
    tiles = scores.unflatten(3, (-1, stride)).unflatten(2, (-1, stride))  # [B, H, r, s, c, t]
    sums = torch.diagonal(tiles.transpose(3, 4).flip(-2), dim1=-2, dim2=-1).sum(-1)
    close(rows @ columns.mT, sums, atol=1e-12)


def test_stride_one_scores_are_block_sums_of_attention() -> None:
    q, k = normal(1, 2, 24, 5, scale=2), normal(1, 2, 24, 5, seed=1)
    for causal in (True, False):
        scores, _ = block_scores(q, k, scale=0.4, causal=causal, stride=1, block_size=6, norm=2.0)
        map_ = (q @ k.mT * 0.2).masked_fill(
            ~torch.ones(24, 24).bool().tril() if causal else torch.zeros(24, 24).bool(), -torch.inf
        )
        close(scores, map_.softmax(-1).unflatten(3, (4, 6)).unflatten(2, (4, 6)).sum((3, 5)), atol=1e-12)


def test_constant_within_a_stride_scores_are_the_true_block_mass() -> None:
    q, k = (normal(1, 2, 12, 5, seed=s, scale=1.5).repeat_interleave(4, 2) for s in (0, 1))
    scores, _ = block_scores(q, k, scale=0.3, causal=False, stride=4, block_size=8)
    true = (q @ k.mT * 0.3).softmax(-1).unflatten(3, (6, 8)).unflatten(2, (6, 8)).sum((3, 5))
    close(scores * 4, true, atol=1e-12)


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.9, (0.2, 0.5, 0.8, 0.95)])
@pytest.mark.parametrize("forced", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_the_kept_set_is_minimal(threshold: Any, forced: bool, causal: bool) -> None:
    method = XAttention(stride=2, block_size=4, threshold=threshold, keep_first=forced, keep_diagonal=forced)
    q, k = normal(2, 4, 64, 6, scale=2), normal(2, 2, 64, 6, seed=1)
    kept = method.plan(q, k, causal=causal).blocks()
    scores, _ = block_scores(q, k, scale=6**-0.5, causal=causal, stride=2, block_size=4)
    tau = torch.tensor(threshold if isinstance(threshold, tuple) else (threshold,) * 4, dtype=scores.dtype)[
        :, None, None
    ]
    total, mass = scores.sum(-1), (scores * kept).sum(-1)
    assert bool((mass >= tau[..., 0] * total - 1e-12).all())
    must = torch.zeros(16, 16, dtype=torch.bool)
    if causal and forced:
        must = torch.eye(16, dtype=torch.bool) | (torch.arange(16) == 0)
    optional = kept & ~must
    least = scores.masked_fill(~optional, torch.inf).amin(-1)
    drops = (mass - least < tau[..., 0] * total) | ~optional.any(-1)
    assert bool(drops.all()), "a block could be left out"
    greatest = scores.masked_fill(kept, -torch.inf).amax(-1)
    assert bool((greatest <= least).all()), "a block outside weighs more than one inside"
    assert kept.float().mean() < (0.5 if causal else 0.95), "nothing was left out: the test shows nothing"


@pytest.mark.parametrize("size", [128, 16])
def test_threshold_one_is_causal_attention(size: int) -> None:
    q, k, v = normal(1, 4, 300, 8), normal(1, 2, 300, 8, seed=1), normal(1, 2, 300, 6, seed=2)
    method = XAttention(threshold=1.0, block_size=size)
    close(method.attention(q, k, v), attend(q, k, v, causal=True).out, rtol=1e-12, atol=1e-12)
    assert method.plan(q, k).density == 1.0
    single = [x.float() for x in (q, k, v)]
    assert method.plan(single[0] * 100, single[1]).density == 1.0, "rounding must not drop a block at threshold 1"
    want = torch.nn.functional.scaled_dot_product_attention(
        single[0], *(x.repeat_interleave(2, 1) for x in single[1:]), is_causal=True
    )
    close(method.attention(*single), want, rtol=1e-5, atol=1e-5)


def recall_of_stripe(method: XAttention, distance: int, n: int = 256) -> float:
    """Each query i looks at key i - distance alone: the share of those pairs whose block is kept, unforced ones only."""
    code = normal(1, 1, n + distance, 1024, seed=5, scale=1.2)
    q, k = code[:, :, :n], code[:, :, distance:]  # q_i = code_i, k_j = code_(j + distance)
    kept = method.plan(q, k).blocks()[0, 0]
    i = torch.arange(distance + method.block_size, n)
    return float(kept[i // method.block_size, (i - distance) // method.block_size].double().mean())


def test_stripes_at_even_distances_are_never_sampled() -> None:
    """Sampled pairs have i - j = (r - c) S + S - 1 - 2 t, which is odd for even S: the method's known blind spot."""
    method = XAttention(stride=4, block_size=16, threshold=0.5)
    odd, even = ([recall_of_stripe(method, d) for d in ds] for ds in ((95, 97, 129), (94, 96, 128)))
    assert min(odd) > 0.9, odd
    assert max(even) < 0.6, even
    seen = XAttention(stride=1, block_size=16, threshold=0.5)
    assert min(recall_of_stripe(seen, d) for d in (96, 128)) > 0.9, "stride 1 samples every pair"


def test_vertical_stripes_are_always_found() -> None:
    for column in (37, 38, 90):
        q, k = normal(1, 1, 256, 16, scale=0.1), normal(1, 1, 256, 16, seed=1, scale=0.1)
        q[..., 0], k[:, :, column, 0] = 4.0, 40.0
        kept = XAttention(stride=8, block_size=16, threshold=0.7).plan(q, k).blocks()[0, 0]
        assert bool(kept[column // 16 :, column // 16].all())


def test_forced_blocks_and_their_switches() -> None:
    q, k = normal(1, 1, 64, 4, scale=0.01), normal(1, 1, 64, 4, seed=1)
    first, diagonal = torch.arange(8) == 0, torch.eye(8, dtype=torch.bool)
    plain: dict[str, Any] = {"stride": 2, "block_size": 8, "threshold": 0.03}
    both = XAttention(**plain).plan(q, k).blocks()[0, 0]
    assert torch.equal(both, diagonal | first)
    one = XAttention(**plain, keep_first=False).plan(q, k).blocks()[0, 0]
    assert torch.equal(one, diagonal)
    neither = XAttention(**plain, keep_first=False, keep_diagonal=False).plan(q, k).blocks()[0, 0]
    assert neither.sum(-1).tolist() == [1] * 8 and not neither.triu(1).any()
    free = XAttention(**plain).plan(q, k, causal=False).blocks()[0, 0]
    assert free.sum(-1).tolist() == [1] * 8, "nothing is forced without causality"


def test_an_offset_between_blocks_keeps_both_diagonal_blocks() -> None:
    q, k = normal(1, 1, 16, 4), normal(1, 1, 44, 4, seed=1)  # offset 28, blocks of 8: queries 28-35 meet blocks 3 and 4
    plan = XAttention(stride=2, block_size=8, threshold=0.01, keep_first=False).plan(q, k)
    assert plan.blocks()[0, 0].nonzero().tolist() == [[0, 3], [0, 4], [1, 4], [1, 5]]
    bare = XAttention(stride=2, block_size=8, threshold=0.01, keep_first=False, keep_diagonal=False).plan(q, k)
    assert bool(bare.to_mask().any(-1).all())


def test_chunks_choose_what_one_pass_chooses() -> None:
    method = XAttention(stride=4, block_size=16, threshold=0.6)
    q, k = normal(1, 4, 160, 8, scale=2), normal(1, 2, 160, 8, seed=1)
    whole = method.plan(q, k).blocks()
    for start, stop in ((0, 64), (64, 96), (96, 160)):
        part = method.plan(q[:, :, start:stop], k[:, :, :stop]).blocks()
        assert torch.equal(part, whole[:, :, start // 16 : stop // 16, : stop // 16])
    assert 0.1 < float(whole.float().mean()) < 0.5


def test_padding_leaves_the_choice_alone() -> None:
    method = XAttention(stride=4, block_size=16, threshold=0.6)
    q, k = normal(1, 2, 100, 8, scale=2), normal(1, 2, 100, 8, seed=1)
    alone = method.plan(q, k)
    for left, right in ((0, 37), (37, 0), (16, 16), (21, 40)):
        long = left + 100 + right
        wide = [torch.full((1, 2, long, 8), torch.nan, dtype=q.dtype) for _ in range(2)]
        for to, x in zip(wide, (q, k), strict=True):
            to[:, :, left : left + 100] = x
        padding = torch.zeros(1, long, dtype=torch.bool)
        padding[:, left : left + 100] = True
        plan = method.plan(*wide, padding=padding).check()
        real = slice(left, left + 100)
        assert torch.equal(plan.to_mask()[:, :, real, real], alone.to_mask())
        assert plan.density == pytest.approx(alone.density)


def test_scores_are_chunked_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = normal(2, 4, 90, 6), normal(2, 2, 130, 6, seed=1)
    call: dict[str, Any] = {"scale": 0.4, "stride": 2, "block_size": 10}
    for causal in (True, False):
        want, _ = block_scores(q, k, causal=causal, **call)
        monkeypatch.setattr(xattention, "SCORE_ELEMENTS", 1)
        got, flops = block_scores(q, k, causal=causal, **call)
        monkeypatch.undo()
        close(got, want, atol=1e-12)
        assert flops <= 2 * 2 * 4 * (45 * 65) * (2 * 6)


def test_shared_groups_choose_once_for_a_key_head() -> None:
    q, k, v = normal(2, 6, 64, 8, scale=2), normal(2, 3, 64, 8, seed=1), normal(2, 3, 64, 8, seed=2)
    method = XAttention(stride=2, block_size=8, threshold=0.5, share_groups=True)
    plan = method.plan(q, k)
    assert plan.heads == 3
    out = method.attention(q, k, v)
    close(out, attend(q, k, v, mask=plan.to_mask()).out, rtol=1e-12, atol=1e-12)
    per_head = XAttention(stride=2, block_size=8, threshold=(0.2, 0.6, 0.95), share_groups=True).plan(q, k)
    counts = per_head.blocks().sum((0, 2, 3)).tolist()
    assert counts == sorted(counts) and counts[0] < counts[2]


def test_thresholds_per_head() -> None:
    q, k = normal(1, 4, 64, 8, scale=2), normal(1, 2, 64, 8, seed=1)
    each = XAttention(stride=2, block_size=8, threshold=(0.1, 0.5, 0.9, 1.0)).plan(q, k).blocks()
    for head, tau in enumerate((0.1, 0.5, 0.9, 1.0)):
        alone = XAttention(stride=2, block_size=8, threshold=tau).plan(q, k).blocks()
        assert torch.equal(each[:, head], alone[:, head])
    again = qkv.method("xattention:threshold=[0.1,0.5,0.9,1]")
    assert again.settings()["threshold"] == (0.1, 0.5, 0.9, 1.0)


def test_calibration_spends_the_error_where_it_saves_most() -> None:
    """Head 0 looks only at its own block, head 1 everywhere: head 0 can do with fewer blocks."""
    q, k, v = (normal(1, 2, 128, 16, seed=s) for s in range(3))
    place = torch.arange(128) // 8
    q[:, 0] *= 0.1
    k[:, 0] *= 0.1
    q[:, 0, :, :16] += 6 * torch.nn.functional.one_hot(place, 16)
    k[:, 0, :, :16] += 6 * torch.nn.functional.one_hot(place, 16)
    method = XAttention(stride=2, block_size=8, threshold=0.9)
    found = calibrate_thresholds(method, [(q, k, v)], tolerance=0.15)
    assert len(found) == 2 and all(0.1 <= t <= 0.9 for t in found) and min(found) < 0.9
    tuned = method.replace(threshold=found)
    dense = attend(q, k, v, causal=True).out
    gap = (tuned.attention(q, k, v) - dense).square().sum((0, 2, 3))
    error = (gap / dense.square().sum((0, 2, 3))).sqrt()
    assert float(error.mean()) <= 0.15 + 1e-12
    assert tuned.plan(q, k).density < method.plan(q, k).density
    with pytest.raises(InvalidParameter, match=r"at threshold 0\.9 already"):
        calibrate_thresholds(method, [(q, k, v)], tolerance=0.0)
    full = method.replace(threshold=1.0)
    exact = calibrate_thresholds(full, [(q, k, v)], tolerance=1e-9)
    assert full.replace(threshold=exact).plan(q, k).density == 1.0
    loose = calibrate_thresholds(method, [(q, k, v)], tolerance=10.0, floor=0.3)
    assert min(loose) >= 0.3 and method.replace(threshold=loose).plan(q, k).density <= tuned.plan(q, k).density


def test_calibration_of_shared_groups_gives_one_threshold_per_key_head() -> None:
    q, k, v = normal(1, 6, 64, 8), normal(1, 3, 64, 8, seed=1), normal(1, 3, 64, 8, seed=2)
    method = XAttention(stride=2, block_size=8, share_groups=True)
    found = calibrate_thresholds(method, [(q, k, v)], tolerance=0.3)
    assert len(found) == 3
    method.replace(threshold=found).plan(q, k)


def test_bad_calibration() -> None:
    with pytest.raises(InvalidInput, match="no samples"):
        calibrate_thresholds(XAttention(), [])
    with pytest.raises(InvalidParameter, match="tolerance"):
        calibrate_thresholds(XAttention(), [], tolerance=-1.0)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"stride": 7}, "nearest that does is 8"),
        ({"stride": 256}, "must divide"),
        ({"stride": 0}, "stride"),
        ({"block_size": 0}, "block_size"),
        ({"threshold": 0.0}, r"\(0, 1\]"),
        ({"threshold": 1.01}, "threshold"),
        ({"threshold": -0.5}, "threshold"),
        ({"threshold": ()}, r"\(0, 1\]"),
        ({"threshold": (0.5, 0.0)}, r"\(0, 1\]"),
        ({"threshold": (0.5, 2.0)}, "threshold"),
        ({"norm": 0.0}, "norm"),
        ({"norm": -1.0}, "norm"),
        ({"threshold": float("nan")}, "threshold"),
    ],
)
def test_bad_settings(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidParameter, match=says):
        XAttention(**settings)


def test_bad_inputs() -> None:
    method = XAttention(stride=2, block_size=4, threshold=(0.5, 0.6, 0.7))
    q = torch.zeros(1, 4, 8, 4)
    with pytest.raises(InvalidInput, match="3 thresholds for 4 query heads"):
        method.plan(q, q)
    plain = XAttention(stride=2, block_size=4)
    holes = torch.tensor([[True, True, False, True, True, True, True, True]])
    with pytest.raises(Refused, match="ends of a row"):
        plain.plan(q, q, padding=holes)
    with pytest.raises(InvalidInput, match=r"padding must be bool \[B, M\]"):
        plain.plan(q, q, padding=holes.float())
    with pytest.raises(InvalidInput, match="N=8 > M=4"):
        plain.plan(q, q[:, :, :4])
    with pytest.raises(Refused, match="packed sequences"):
        plain.attention(q, q, q, mask=torch.rand(1, 1, 8, 8) < 0.5)
    with pytest.raises(InvalidInput, match="does not broadcast"):
        plain.attention(q, q, q, mask=torch.ones(1, 3, 8, 8, dtype=torch.bool))
