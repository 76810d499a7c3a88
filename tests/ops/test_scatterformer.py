"""Scattered linear attention: segments of every length, windows of coordinates, neighbours, packed lists."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import qkv
from qkv.core.errors import InvalidInput
from qkv.ops.scatterformer import packed, segment_ids, window_segments
from qkv.testing import close

H, D, E = 2, 6, 5


def _list(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(tokens, H, w, generator=rng, dtype=torch.float64) for w in (D, D, E))  # type: ignore[return-value]


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("ihd,jhd->hij", q.relu(), k.relu())
    return torch.einsum("hij,jhe->ihe", weights / (weights.sum(-1, keepdim=True) + 1e-6), v)


def test_segments_of_every_length_are_dense_attention_each() -> None:
    counts = torch.tensor([1, 0, 31, 32, 33, 0, 700, 2])
    borders = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    q, k, v = _list(int(borders[-1]))
    got = packed(q, k, v, borders)
    for begin, end in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        if end > begin:
            want = _dense(*(x[begin:end] for x in (q, k, v)))
            close(got[begin:end], want, rtol=1e-12, what=f"{end - begin} tokens")
    same = qkv.attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), method="scatterformer", causal=False,
                         segments=segment_ids(borders))  # fmt: skip
    close(same[0].transpose(0, 1), got, rtol=1e-12, what="the operator")
    lone = (q[0].relu() * k[0].relu()).sum(-1, keepdim=True)
    close(got[0], v[0] * lone / (lone + 1e-6), rtol=1e-12, what="a segment of one token")


def test_order_and_names_of_segments_do_not_matter_and_nothing_leaks() -> None:
    q, k, v = (x.transpose(0, 1)[None] for x in _list(40))
    ids = torch.randint(5, (40,), generator=torch.Generator().manual_seed(1))
    out = qkv.attention(q, k, v, method="scatterformer", causal=False, segments=ids)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    shuffled = qkv.attention(
        *(x[:, :, order] for x in (q, k, v)), method="scatterformer", causal=False, segments=(ids * 7 - 3)[order]
    )
    close(shuffled, out[:, :, order], rtol=1e-12, what="shuffled and renamed")
    k = k.clone()
    k[:, :, 0] += 5
    moved = qkv.attention(q, k, v, method="scatterformer", causal=False, segments=ids)
    assert torch.equal(moved[:, :, ids != ids[0]], out[:, :, ids != ids[0]])
    assert (moved - out)[:, :, ids == ids[0]].abs().max() > 1e-3
    whole = qkv.attention(q, k, v, method="scatterformer", causal=False)
    close(whole[0].transpose(0, 1), _dense(*(x[0].transpose(0, 1) for x in (q, k, v))), rtol=1e-12, what="one segment")


def _voxels(seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    coords = torch.randint(40, (300, 4), generator=rng)
    coords[:, 0] %= 2
    coords[:150, 2:] %= 9  # a crowd in one corner
    return coords.unique(dim=0)[torch.randperm(len(coords.unique(dim=0)), generator=rng)]


@pytest.mark.parametrize("radius", [0, 1])
def test_windows_read_themselves_and_their_neighbours(radius: int) -> None:
    coords = _voxels()
    q, k, v = _list(len(coords))
    found = window_segments(coords, 12, radius)
    assert found.cu_seqlens[-1] == len(coords) and len(found.cells) == len(found.cu_seqlens) - 1
    got = torch.zeros_like(v).index_copy(0, found.order, packed(q[found.order], k[found.order], v[found.order], found.cu_seqlens,
                                                                neighbours=found.neighbours))  # fmt: skip
    cell = torch.stack([coords[:, 0] * 1000, coords[:, 2] // 12, coords[:, 3] // 12], 1)
    seen = (cell[:, None] - cell).abs().amax(-1) <= radius
    weights = torch.einsum("ihd,jhd->hij", q.relu(), k.relu()) * seen
    want = torch.einsum("hij,jhe->ihe", weights / (weights.sum(-1, keepdim=True) + 1e-6), v)
    close(got, want, rtol=1e-10, what=f"radius {radius}")


def test_moving_everything_by_a_window_changes_nothing() -> None:
    coords = _voxels()
    here, there = (window_segments(x, (12, 6), 1) for x in (coords, coords + torch.tensor([0, 5, 12, -6])))
    assert torch.equal(here.order, there.order) and torch.equal(here.cu_seqlens, there.cu_seqlens)
    assert (
        here.neighbours is not None and there.neighbours is not None and torch.equal(here.neighbours, there.neighbours)
    )


def test_both_passes_have_the_right_gradients() -> None:
    q, k, v = (x[:11].requires_grad_() for x in _list(11))
    borders, near = torch.tensor([0, 3, 3, 11]), torch.tensor([[0, 2], [-1, 0], [2, -1]])
    run = lambda q, k, v: packed(q, k, v, borders, feature_map="elu1", neighbours=near, tile=4)  # noqa: E731
    assert torch.autograd.gradcheck(run, (q, k, v))


def test_what_does_not_fit_is_refused() -> None:
    q, k, v = _list(6)
    for borders, why in (([0, 5], "rise from 0 to T = 6"), ([0, 4, 3, 6], "rise from 0"), ([0], "S > 0")):
        with pytest.raises(InvalidInput, match=why):
            packed(q, k, v, torch.tensor(borders))
    with pytest.raises(InvalidInput, match="from 0 to 0"):
        packed(q, k, v, torch.tensor([0, 6]), neighbours=torch.tensor([[1]]))
    with pytest.raises(InvalidInput, match="must be integers"):
        window_segments(torch.zeros(3, 4))
    with pytest.raises(InvalidInput, match="must be integers, not"):
        qkv.attention(
            *(x.transpose(0, 1)[None] for x in (q, k, v)), method="scatterformer", causal=False, segments=q[:, 0, 0]
        )
