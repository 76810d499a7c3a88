r"""Scattered linear attention: tokens lie in one flat list, each segment of it attends to itself, whatever its length.

    o_t = f(q_t) . KV_s / (f(q_t) . K_s + eps),   KV_s = sum_{t in s} f(k_t) v_t^T,  K_s = sum_{t in s} f(k_t),   t in segment s

A segment is a window of voxels, a document of a packed batch, any set. Nothing is padded to the longest: sums over segments and a
gather replace batched attention (`packed`). To sum by matrix products, the list is cut into tiles of `tile` tokens of one
segment; what is filled up is less than a tile per segment. Long segments are many tiles, so no segment is slower than its share.

`segments` are numbers, one per token, in any order; without them all tokens of a row are one segment. `packed` takes sorted
segments by their borders (`cu_seqlens`), needs no sort, and can read, besides its own, other segments (`neighbours`: windows that
overlap). `window_segments` makes both from coordinates. A query whose features are all 0 reads 0.

No setting makes it another operator of this library.

Axes: B batch, H query heads, G key/value heads, N tokens of a row, T tokens of the list, S segments, D key width, E value width.
He et al. 2024, ScatterFormer: Efficient Voxel Transformer with Scattered Linear Attention, arXiv:2401.00912.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.core.attend import readable
from qkv.core.errors import InvalidInput
from qkv.core.operator import Operator, OperatorSpec
from qkv.core.rows import sum_rows, take_rows
from qkv.core.spec import Extra, param
from qkv.ops._common.states import per_head, wide

FeatureMap = Literal["relu", "elu1", "identity"]


def reference(
    q: Tensor, k: Tensor, v: Tensor, *, segments: Tensor | None = None, padding: Tensor | None = None,
    feature_map: FeatureMap = "relu", eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    """The whole map ``[B, H, N, N]``, masked to pairs of one segment.

    q ``[B, H, N, D]``, k ``[B, G, N, D]``, v ``[B, G, N, E]``, segments ``[N]`` or ``[B, N]`` integers -> ``[B, H, N, E]``.
    """
    ids = _ids(q, segments)
    k, v = per_head(q, k, v)
    a, b, v = _features(q, feature_map), _features(k, feature_map), v.to(wide(v))
    same = ids.unsqueeze(2) == ids.unsqueeze(1)  # [B, N, N]
    if padding is not None:
        same = same & padding.unsqueeze(1)
    weights = (a @ b.mT).masked_fill(~same.unsqueeze(1), 0.0)
    return (weights @ v / (weights.sum(-1, keepdim=True) + eps)).to(q.dtype)


def loop(
    q: Tensor, k: Tensor, v: Tensor, *, segments: Tensor | None = None, padding: Tensor | None = None,
    feature_map: FeatureMap = "relu", eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    """Row by row and segment by segment, each as dense linear attention; shapes as in `reference`."""
    ids = _ids(q, segments)
    k, v = per_head(q, k, v)
    out = torch.zeros_like(v)
    for b in range(q.shape[0]):
        real = torch.ones_like(ids[b], dtype=torch.bool) if padding is None else padding[b]
        for s in ids[b].unique():
            own = (ids[b] == s).nonzero().squeeze(-1)
            mine = own[real[own]]
            x, y, z = _features(q[b, :, own], feature_map), _features(k[b, :, mine], feature_map), v[b, :, mine]
            out[b, :, own] = x @ (y.mT @ z) / ((x * y.sum(1, keepdim=True)).sum(-1, keepdim=True) + eps)
    return out


def fast(
    q: Tensor, k: Tensor, v: Tensor, *, segments: Tensor | None = None, padding: Tensor | None = None,
    feature_map: FeatureMap = "relu", eps: float = 1e-6, tile: int = 32,
) -> Tensor:  # fmt: skip
    """Rows joined to one list, sorted by segment, `packed`, and put back; shapes as in `reference`."""
    b, _, n, _ = q.shape
    ids, (k, v) = _ids(q, segments), per_head(q, k, v)
    keys = _features(k, feature_map)
    if padding is not None:
        keys = keys.masked_fill(~padding[:, None, :, None], 0.0)
    ids, order = ids.sort(dim=1, stable=True)
    first = torch.cat([torch.ones_like(ids[:, :1], dtype=torch.bool), ids[:, 1:] != ids[:, :-1]], 1)
    ranks = first.flatten().cumsum(0) - 1  # segment of each token of the sorted list
    count = int(ranks[-1]) + 1 if readable(ranks) else b * n  # where values cannot be read, some segments stay empty
    borders = torch.searchsorted(ranks, torch.arange(count + 1, device=q.device))
    order = (order + n * torch.arange(b, device=q.device)[:, None]).flatten()
    a, c, w = (take_rows(x.transpose(1, 2).flatten(0, 1), order) for x in (_features(q, feature_map), keys, v.to(keys)))
    out = packed(a, c, w, borders, feature_map="identity", eps=eps, tile=tile)
    out = torch.zeros_like(out).index_copy(0, order, out)
    return out.unflatten(0, (b, n)).transpose(1, 2).to(q.dtype)


def packed(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, feature_map: FeatureMap = "relu", eps: float = 1e-6,
    neighbours: Tensor | None = None, tile: int = 32,
) -> Tensor:  # fmt: skip
    """Linear attention inside the segments of one sorted list.

    q, k ``[T, H, D]``, v ``[T, H, E]`` -> ``[T, H, E]``; cu_seqlens ``[S + 1]`` int64: where segments begin, then T; a segment
    may be empty. neighbours ``[S, R]`` int64: the segments whose keys a segment reads, itself included if it is named, -1 for
    none; without it each reads itself. Raises `InvalidInput`.
    """
    _check_packed(q, k, v, cu_seqlens, neighbours)
    dtype, t, s = q.dtype, q.shape[0], cu_seqlens.shape[0] - 1
    q, k, v = _features(q, feature_map), _features(k, feature_map), F.pad(v.to(wide(v)), (0, 1), value=1.0)
    ends = ((cu_seqlens.diff() + tile - 1) // tile).cumsum(0)  # tiles of a segment and those before it
    place = torch.arange(t, device=q.device)
    mine = torch.searchsorted(cu_seqlens, place, right=True) - 1
    slot = (F.pad(ends, (1, 0))[mine]) * tile + place - cu_seqlens[mine]
    tiles = int(ends[-1]) if readable(ends) else t // tile + s  # at most so many
    owner = torch.searchsorted(ends, torch.arange(tiles, device=q.device), right=True).clamp(max=s - 1)
    q, k, v = (x.new_zeros(tiles * tile, *x.shape[1:]).index_copy(0, slot, x) for x in (q, k, v))
    q, k, v = (x.unflatten(0, (tiles, tile)).transpose(1, 2) for x in (q, k, v))  # [tiles, H, tile, .]
    memory = sum_rows(k.mT @ v, owner, s)  # KV with K as its last column, [S, H, D, E + 1]
    if neighbours is not None:
        some = torch.cat([memory, torch.zeros_like(memory[:1])])
        memory = torch.zeros_like(memory)
        for near in neighbours.remainder(s + 1).unbind(1):  # -1 is the empty row at the end
            memory = memory + take_rows(some, near)
    out = (q @ take_rows(memory, owner)).transpose(1, 2).flatten(0, 1).index_select(0, slot)
    return (out[..., :-1] / (out[..., -1:] + eps)).to(dtype)


class Windows(NamedTuple):
    """Tokens sorted by window: ``x[order]`` is the list that `packed` takes, ``index_copy(0, order, out)`` puts it back.

    cells ``[S, 3]``: batch, row and column of each window. neighbours ``[S, (2 r + 1)^2]``, or None for radius 0.
    """

    order: Tensor
    cu_seqlens: Tensor
    cells: Tensor
    neighbours: Tensor | None


def window_segments(coords: Tensor, window: int | tuple[int, int] = 12, radius: int = 0) -> Windows:
    """Windows of `window` voxels in y and x and of full height, from integer coords ``[T, 4]`` = (batch, z, y, x).

    window: one number or (y, x). radius: windows on each side, in y and x, that a window reads besides itself. Only windows
    that hold a token are made. Raises `InvalidInput`.
    """
    sizes = (window, window) if isinstance(window, int) else tuple(window)
    if coords.ndim != 2 or coords.shape[1] != 4 or coords.is_floating_point() or coords.shape[0] == 0:
        raise InvalidInput(
            f"window_segments: coords must be integers [T, 4] = (batch, z, y, x), T > 0; got {coords.dtype} {tuple(coords.shape)}"
        )
    if len(sizes) != 2 or min(sizes) < 1 or radius < 0:
        raise InvalidInput(f"window_segments: window={window} must be at least 1 voxel and radius={radius} at least 0")
    cells = torch.stack([coords[:, 0], coords[:, 2] // sizes[0], coords[:, 3] // sizes[1]], 1).long()
    cells, mine, counts = cells.unique(dim=0, return_inverse=True, return_counts=True)
    borders = F.pad(counts.cumsum(0), (1, 0))
    if radius == 0:
        return Windows(mine.argsort(stable=True), borders, cells, None)
    low = cells.amin(0)
    _, rows, columns = (cells.amax(0) - low + 1 + 2 * radius).tolist()  # no neighbour wraps into another row or batch
    number = lambda c: ((c[:, 0] - low[0]) * rows + c[:, 1] - low[1]) * columns + c[:, 2] - low[2]  # noqa: E731
    known, near = number(cells), []
    steps = range(-radius, radius + 1)
    for dy, dx in ((y, x) for y in steps for x in steps):
        wanted = known + dy * columns + dx
        found = torch.searchsorted(known, wanted).clamp(max=len(known) - 1)
        near.append(torch.where(known[found] == wanted, found, -1))
    return Windows(mine.argsort(stable=True), borders, cells, torch.stack(near, 1))


def _check_packed(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, neighbours: Tensor | None) -> None:
    if q.ndim != 3 or k.shape != q.shape or v.ndim != 3 or v.shape[:2] != q.shape[:2]:
        raise InvalidInput(
            "packed: q, k must be [T, H, D] and v [T, H, E]; got " + ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        )
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype != torch.int64:
        raise InvalidInput(
            f"packed: cu_seqlens must be int64 [S + 1], S > 0; got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    s = cu_seqlens.shape[0] - 1
    if neighbours is not None and (neighbours.ndim != 2 or neighbours.shape[0] != s or neighbours.dtype != torch.int64):
        raise InvalidInput(
            f"packed: neighbours must be int64 [S, R] with S = {s}; got {neighbours.dtype} {tuple(neighbours.shape)}"
        )
    if not readable(cu_seqlens):
        return
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != q.shape[0] or bool((cu_seqlens.diff() < 0).any()):
        raise InvalidInput(
            f"packed: cu_seqlens must rise from 0 to T = {q.shape[0]}; got {cu_seqlens[:3].tolist()} ... {cu_seqlens[-1]}"
        )
    if neighbours is not None and bool(((neighbours < -1) | (neighbours >= s)).any()):
        raise InvalidInput(f"packed: neighbours must be segments from 0 to {s - 1}, or -1 for none")


def _features(x: Tensor, feature_map: FeatureMap) -> Tensor:
    """In float32 or wider."""
    x = x.to(wide(x))
    return {"relu": F.relu, "elu1": lambda y: F.elu(y) + 1.0, "identity": lambda y: y}[feature_map](x)


def _ids(q: Tensor, segments: Tensor | None) -> Tensor:
    """Numbers of the segments, ``[B, N]`` int64."""
    if segments is None:
        return torch.zeros(q.shape[0], q.shape[2], dtype=torch.int64, device=q.device)
    if segments.is_floating_point() or segments.is_complex() or segments.dtype == torch.bool:
        raise InvalidInput(f"scatterformer: `segments` must be integers, not {segments.dtype}")
    return segments.long().expand(q.shape[0], -1)


def segment_ids(cu_seqlens: Sequence[int] | Tensor) -> Tensor:
    """Numbers of the segments ``[T]`` from their borders ``[S + 1]``: (0, 2, 5) -> (0, 0, 1, 1, 1)."""
    borders = torch.as_tensor(cu_seqlens)
    return torch.arange(len(borders) - 1, device=borders.device).repeat_interleave(borders.diff())


def _draw(*shape: int, **kwargs: Any) -> Tensor:
    kwargs.pop("dtype", None)
    return torch.randint(4, shape, **kwargs)


@final
@dataclass(frozen=True, kw_only=True)
class ScatterFormer(Operator):
    """Linear attention inside segments of a flat list."""

    spec: ClassVar[OperatorSpec] = OperatorSpec(
        id="scatterformer",
        title="Scattered linear attention (ScatterFormer)",
        paper="arXiv:2401.00912",
        source="code",
        summary="Linear attention inside segments of one flat list (windows of sparse voxels, documents of a packed batch), "
        "without padding them to one length.",
        shown="On real points in windows with skewed counts: the outputs of padded batches with memory smaller by about what "
        "padding wastes.",
        honest="Nothing passes between segments but through neighbours or other layers, and ReLU features may leave a query "
        "with nothing to read; checked on edges of photographs and paragraphs, no package holding a street's point cloud.",
        trials=({}, {"tile": 4}, {"feature_map": "elu1", "tile": 5}),
        causal="never",
        cross=False,
        scale=None,
        reference=reference,
        fast=fast,
        loop=loop,
        extras={
            "segments": Extra(
                axes="n|bn",
                sample=_draw,
                role="data",
                required=False,
                doc="number of each token's segment, in any order; without it a row is one segment",
            )
        },
    )
    feature_map: Literal["relu", "elu1", "identity"] = param(
        "relu", "features of queries and keys; identity: the caller made them"
    )
    eps: float = param(1e-6, "added to the denominator", low=1e-12)
    tile: int = param(32, "tokens of one segment that are multiplied at once", low=1)
