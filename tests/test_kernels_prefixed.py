"""Decode attention over shared runs and own tokens against float64: by Triton's interpreter, or on the device if there is one."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from interpreter import CUDA, DEVICE, direct, interpreted
from qkv.caches._stores import prefixed
from qkv.caches._stores.prefixed import PrefixedCache
from qkv.caches.shared_prefix import SharedPrefix
from qkv.core.cache import Geometry, Now, Step

triton = pytest.importorskip("triton")

Runs = list[tuple[Tensor, Tensor, int, Sequence[int]]]


def test_the_kernels_are_checked_through_the_interpreter() -> None:
    interpreted(__file__)


def whole(q: Tensor, runs: Runs, keys: Tensor, values: Tensor, real: Tensor, scale: float) -> Tensor:
    """The definition, row by row, in float64."""
    from qkv.core.attend import attend

    outs = []
    for row in range(q.shape[0]):
        mine = [(k[:, :, :n], v[:, :, :n]) for k, v, n, rows in runs if row in rows]
        own = (x[row : row + 1][:, :, real[row]] for x in (keys, values))
        k, v = (torch.cat(parts, 2).double() for parts in zip(*mine, tuple(own), strict=True))
        outs.append(attend(q[row : row + 1].double(), k, v, scale=scale).out)
    return torch.cat(outs)


TREES = {
    "one run": [(200, 210, range(5))],
    "a tree": [(30, 30, range(5)), (70, 90, (1, 3)), (10, 40, (0, 2)), (9, 9, (3,)), (1, 1, (0, 1))],
    "nothing": [],
}


@direct
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("heads", [(6, 2, 16, 24), (3, 3, 8, 5)], ids=str)
@pytest.mark.parametrize(("own", "gaps"), [(1, False), (70, True)])
def test_runs_and_own_tokens_are_read_as_one_history(
    tree: str, heads: tuple[int, int, int, int], own: int, gaps: bool
) -> None:
    from qkv.kernels.prefixed import append, prefixed_decode, work_list

    (h, g, d, e), b = heads, 5
    draw = torch.Generator().manual_seed(own)
    rand = lambda *s: torch.randn(*s, generator=draw).to(DEVICE)  # noqa: E731
    runs: Runs = [(rand(1, g, room, d), rand(1, g, room, e), n, tuple(rows)) for n, room, rows in TREES[tree]]
    q, keys, values = rand(b, h, 1, d), rand(b, g, own + 7, d), rand(b, g, own + 7, e)
    place = torch.arange(own + 7, dtype=torch.int32).expand(b, -1).clone()
    if gaps:
        place[torch.rand(place.shape, generator=draw) < 0.4] = -1
    place = place.to(DEVICE)
    k, v, position = rand(b, g, 1, d), rand(b, g, 1, e), torch.full((b, 1), 1000, dtype=torch.int32, device=DEVICE)
    append(k, v, position, keys, values, place, width=own - 1)
    assert torch.equal(keys[:, :, own - 1 : own], k) and torch.equal(values[:, :, own - 1 : own], v)
    assert (place[:, own - 1] == 1000).all()
    keys[:, :, own:], values[:, :, own:] = float("nan"), float("nan")  # what was never written must not be read
    for key, value, n, _ in runs:
        key[:, :, n:], value[:, :, n:] = float("nan"), float("nan")
    want = whole(q, runs, keys[:, :, :own], values[:, :, :own], place[:, :own] >= 0, 0.3)
    cursor, given = torch.tensor([own - 1 + 17], device=DEVICE), place if gaps else None
    for tile, programs in ((None, 40), (64, 1)):
        work = work_list(runs, b, h, g, dtype=q.dtype, device=q.device, tile=tile, programs=programs)
        out = prefixed_decode(q, keys, values, given, work, width=own, scale=0.3)
        torch.testing.assert_close(out.double(), want, rtol=0, atol=2e-6)
    again = prefixed_decode(q, keys, values, given, work, width=17, cursor=cursor, scale=0.3)
    assert torch.equal(out, again), "the length is read on the device"


@direct
def test_a_row_that_sees_nothing_gives_nothing() -> None:
    from qkv.kernels.prefixed import prefixed_decode, work_list

    q, x = torch.randn(2, 4, 1, 16, device=DEVICE), torch.randn(2, 2, 9, 16, device=DEVICE)
    place = torch.full((2, 9), -1, dtype=torch.int32, device=DEVICE)
    place[1] = 3
    out = prefixed_decode(q, x, x, place, work_list([], 2, 4, 2, dtype=q.dtype, device=q.device), width=9, scale=0.3)
    assert (out[0] == 0).all() and torch.isfinite(out).all() and out[1].abs().min() > 0


@direct
def test_what_does_not_fit_is_refused() -> None:
    from qkv.core.errors import InvalidInput
    from qkv.kernels.prefixed import append, prefixed_decode, work_list

    x = torch.randn(2, 2, 9, 16, device=DEVICE)
    like = {"dtype": x.dtype, "device": x.device}
    work, place = work_list([], 2, 4, 2, **like), torch.zeros(2, 9, dtype=torch.int32, device=DEVICE)
    for q, k in (((2, 4, 2, 16), x), ((2, 4, 1, 8), x), ((2, 3, 1, 16), x), ((2, 4, 1, 16), x.mT.contiguous().mT)):
        with pytest.raises(InvalidInput, match="prefixed_decode"):
            prefixed_decode(torch.randn(*q, device=DEVICE), k, k, None, work, width=3, scale=1.0)
    with pytest.raises(InvalidInput, match="append: expected one token"):
        append(x[:, :, :2], x[:, :, :2], place[:, :1], x, x, place, width=0)
    for run in (
        (x[:1], x[:1], 12, (0,)),
        (x[:1], x[:1], 3, (2,)),
        (x[:1], x[:1], 3, ()),
        (x[:1, :, ::2], x[:1], 3, (0,)),
    ):
        with pytest.raises(InvalidInput, match="work_list"):
            work_list([run], 2, 4, 2, **like)


# -- in the cache -------------------------------------------------------------------------------------------------------

H, G, D, E = 4, 2, 8, 5
LINES = ["systemAAAAone-" + 30 * "x", "systemAAAAtwo-" + 30 * "y", "systemBBBB" + 34 * "z", "....systemAAAA" + 30 * "w"]


def texts(lines: Sequence[str]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    table = torch.randn(128, 64, G * (D + E), generator=draw)
    pads = [len(line) - len(line.lstrip(".")) for line in lines]
    rows = [
        torch.stack([table[ord(c), max(0, i - n)] for i, c in enumerate(x)]) for x, n in zip(lines, pads, strict=True)
    ]
    x = torch.stack(rows).view(len(lines), -1, G, D + E).transpose(1, 2)
    q = torch.randn(len(lines), H, x.shape[2], D, generator=draw)
    real = torch.tensor([[c != "." for c in line] for line in lines])
    return tuple(t.to(DEVICE) for t in (q, x[..., :D].contiguous(), x[..., D:].contiguous(), real))  # type: ignore[return-value]


def feed(layer: PrefixedCache, text: tuple[Tensor, ...], n: int, captured: bool = False) -> Tensor:
    q, k, v, real = text
    at = slice(layer.seen, layer.seen + n)
    place = (real.cumsum(-1) - 1).masked_fill(~real, -1).int()[:, at]
    part = [x[:, :, at] for x in (q, k, v)]
    if not captured:
        return layer.attend(*part, Step(place, D**-0.5, None if bool(real.all()) else real[:, : at.stop]))  # type: ignore[misc]
    cursor = torch.tensor([layer.seen], device=DEVICE)
    return layer.step(*part, D**-0.5, Now(cursor, cursor.int() + 1, place.contiguous()))  # type: ignore[misc]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache takes kernels here too."""
    if not CUDA:
        monkeypatch.setattr(prefixed, "served", lambda x: x.dtype == torch.float32)


def memory() -> PrefixedCache:
    layer = SharedPrefix(min_tokens=4).layer(Geometry(H, G, D, E))
    assert isinstance(layer, PrefixedCache)
    return layer


@direct
@pytest.mark.parametrize("lines", [LINES[1:], LINES[:3]], ids=["padded", "plain"])
def test_the_cache_reads_by_kernels_what_it_reads_plainly(
    lines: Sequence[str], kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, layer, plain, static = texts(lines), memory(), memory(), memory()
    static.reserve(40)
    for x in (layer, plain, static):
        feed(x, text, 14)
    rows, tables = torch.arange(len(lines)).flip(0), []
    other = copy.deepcopy(layer)
    for i in range(5):
        got = feed(layer, text, 1)
        if i == 0:
            assert torch.equal(feed(other, text, 1), got), "a copy reads its own runs"
        with monkeypatch.context() as context:
            context.setattr(prefixed, "served", lambda _: False)
            want = feed(plain, text, 1)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
        if i == 0:
            assert not static.static(), "there is no room before the first step"
        else:
            assert static.static()
            tables.append(static.buffers()[0])
        assert torch.equal(feed(static, text, 1, captured=i > 0), got), "a captured step is the plain step"
        if i == 2:
            for x in (layer, plain, static):
                x.select(rows)
            text = tuple(t[rows.to(t.device)] for t in text)  # type: ignore[assignment]
            lengths = [run.length for run in layer.runs]
            assert [run.length for run in static.runs] == lengths
    assert (static.seen, static.width) == (layer.seen, layer.width) and layer.seen == 19
    assert len({x.data_ptr() for x in tables[:2]}) == 1, "one work list as long as nothing changes"
    assert static.positions().tolist() == layer.positions().tolist()
    for name, x in static.tensors().items():
        assert torch.equal(x, layer.tensors()[name]), name
    for x in (layer, static):
        x.crop(5)
    assert torch.equal(feed(layer, text, 3), feed(static, text, 3))


@direct
def test_another_partition_is_another_work_list(kernels: None) -> None:
    text, layer = texts(LINES[:3]), memory()
    layer.reserve(44)
    feed(layer, text, 14)
    feed(layer, text, 1)
    feed(layer, text, 1, captured=True)
    before = layer.buffers()[0]
    layer.select(torch.tensor([1, 0, 2]))
    assert layer.buffers()[0] is before, "every place reads what it has read"
    layer.select(torch.tensor([0, 2, 2]))
    after = layer.buffers()[0]
    assert [run.length for run in layer.runs] == [6, 4] and layer.captured is before
    assert after.data_ptr() != before.data_ptr(), "a captured step must not be taken for this one's"
    feed(layer, text, 3)
    layer.select(torch.tensor([0, 0, 1, 1, 2, 2]))
    assert [run.length for run in layer.runs] == [6, 13, 10] and layer.buffers() == ()  # no room yet for what comes
