"""Attention of blocks with its lse and masses, against plain torch: interpreted anywhere, on the device where there is one."""

from __future__ import annotations

import pytest
import torch

from interpreter import CUDA, DEVICE, direct, interpreted
from qkv.core.attend import Attended, attend, causal_mask
from qkv.core.errors import InvalidInput

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")


def test_kernels_are_checked_through_the_interpreter() -> None:
    """The checks below, in a process of their own: the interpreter is chosen when Triton is imported."""
    interpreted(__file__)


SHAPES = [(2, 6, 3, 40, 40, 32, 32), (1, 4, 4, 17, 90, 16, 24), (1, 4, 1, 130, 131, 64, 48), (1, 2, 2, 1, 70, 40, 40)]


def drawn(shape: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, ...]:
    b, h, g, n, m, d, e = shape
    draw = torch.Generator().manual_seed(seed + sum(shape))
    sizes = ((b, n, h, d), (b, g, m, d), (b, g, m, e))  # queries as a host gives them: heads inside tokens
    q, k, v = (torch.randn(x, generator=draw).to(DEVICE) for x in sizes)
    return q.transpose(1, 2), 1.5 * k, v


@direct
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("causal", "heads"), [(True, None), (True, "one"), (False, "group"), (True, "query")])
def test_outputs_lse_and_masses(shape: tuple[int, ...], causal: bool, heads: str | None) -> None:
    from qkv.kernels.flash import column_masses, flash_attention

    b, h, g, n, m = shape[:5]
    q, k, v = drawn(shape)
    mask, rows = None, None
    if heads is not None:
        draw = torch.Generator().manual_seed(7)
        count = {"one": 1, "group": g, "query": h}[heads]
        mask = (torch.rand(b, count, 1, m, generator=draw) > 0.4).to(DEVICE)
        mask[0, 0, :, : m - n + 3] = False  # the first queries have no key
        rows = (torch.rand(b, n, generator=draw) > 0.3).to(DEVICE)
    wide = [x.double() for x in (q, k, v)]
    want = attend(*wide, mask=mask, causal=causal, scale=0.3, mass=True, mass_rows=rows)
    out, lse = flash_attention(q, k, v, mask=mask, causal=causal, scale=0.3)
    mass = column_masses(q, k, lse, mask=mask, causal=causal, scale=0.3, rows=rows)
    assert want.mass is not None
    torch.testing.assert_close(out.double(), want.out, rtol=0, atol=5e-6)
    torch.testing.assert_close(lse.double(), want.lse, rtol=0, atol=2e-5)
    torch.testing.assert_close(mass.double(), want.mass, rtol=1e-5, atol=2e-5)


PLACES = [(2, 4, 2, 9, 80, 16), (1, 2, 1, 70, 100, 24), (2, 2, 2, 1, 40, 40)]


def placed(shape: tuple[int, ...], order: str) -> tuple[torch.Tensor, ...]:
    """Probes of a prompt as memories take them, half drawn and half the newest, their keys and their places."""
    b, _, _, p, m, d = shape
    q, k, _ = drawn((*shape[:5], d, d))
    draw = torch.Generator().manual_seed(p + m)
    newest = p // 2
    at = torch.cat(
        (torch.randperm(m - newest, generator=draw)[: p - newest].sort().values, torch.arange(m - newest, m))
    )
    if order != "ascending":
        at = at[torch.randperm(p, generator=draw)]
    if order == "by row":
        at = torch.stack([at.roll(i) for i in range(b)])
        at[0, 0], at[-1, -1] = -1, m + 7  # sees nothing, and everything
    return q, k, at.to(DEVICE)


def paid(q: torch.Tensor, k: torch.Tensor, at: torch.Tensor, keys: torch.Tensor | None = None) -> Attended:
    """Lse and masses of probes in float64, from a mask of who sees what."""
    seen = torch.arange(k.shape[2], device=k.device) <= at.view(-1, 1, q.shape[2], 1)
    seen = seen.expand(len(q), -1, -1, -1) if keys is None else seen & keys[:, None, None]
    return attend(q.double(), k.double(), k.double(), mask=seen, scale=0.3, mass=True)


@direct
@pytest.mark.parametrize("shape", PLACES, ids=str)
@pytest.mark.parametrize(("order", "padded"), [("ascending", False), ("any", True), ("by row", False)])
def test_probes_at_places_of_their_own(shape: tuple[int, ...], order: str, padded: bool) -> None:
    from qkv.kernels.flash import probe_lse, probe_masses

    q, k, at = placed(shape, order)
    b, m = len(q), k.shape[2]
    keys = torch.arange(m, device=DEVICE) >= torch.tensor([17, 0], device=DEVICE)[:b, None] if padded else None
    want = paid(q, k, at, keys)
    assert want.mass is not None
    for splits in (1, 3):
        lse = probe_lse(q, k, at, mask=keys, scale=0.3, splits=splits)
        torch.testing.assert_close(lse.double(), want.lse, rtol=0, atol=2e-5)
    mass = probe_masses(q, k, at, mask=keys, scale=0.3)
    torch.testing.assert_close(mass.double(), want.mass, rtol=1e-5, atol=2e-5)
    more = torch.nan_to_num(want.lse, neginf=0.0) + 0.7  # they saw more than these keys
    mass = probe_masses(q, k, at, mask=keys, scale=0.3, lse=more)
    torch.testing.assert_close(mass.double(), want.mass * torch.tensor(-0.7).exp(), rtol=1e-5, atol=2e-5)


@direct
def test_probes_at_the_end_are_a_block_of_queries() -> None:
    from qkv.kernels.flash import column_masses, probe_lse, probe_masses

    q, k, _ = placed(PLACES[0], "ascending")
    m = k.shape[2]
    newest = torch.arange(m - q.shape[2], m, device=DEVICE)
    lse = probe_lse(q, k, newest, scale=0.3)
    got = probe_masses(q, k, newest, scale=0.3, lse=lse)
    torch.testing.assert_close(got, column_masses(q, k, lse, causal=True, scale=0.3), rtol=1e-5, atol=1e-5)
    everything = attend(q.double(), k.double(), k.double(), scale=0.3).lse
    torch.testing.assert_close(probe_lse(q, k, None, scale=0.3).double(), everything, rtol=0, atol=2e-5)


@direct
def test_the_check_of_places_tells_them_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Places off by one or taken for the newest, and a kernel that takes them to ascend, each lose the masses."""
    from qkv.kernels import flash

    q, k, at = placed(PLACES[1], "any")
    want, m = paid(q, k, at).mass, k.shape[2]
    assert want is not None

    def right(at: torch.Tensor) -> bool:
        return torch.allclose(flash.probe_masses(q, k, at, scale=0.3).double(), want, rtol=1e-5, atol=2e-5)

    assert right(at)
    assert not right(at - 1) and not right(torch.arange(m - len(at), m, device=DEVICE))
    if not CUDA:  # a compiled kernel has its own copy of what it calls
        monkeypatch.setattr(flash, "_behind", _where_places_ascend)
        assert not right(at)


@triton.jit
def _where_places_ascend(at_ptr, first, last, N, SCAN: tl.constexpr):
    """A wrong `_behind`: it counts the places that come before a key, in whatever order they lie."""
    begin, later = 0, 0
    for i in range(0, N, SCAN):
        rows = i + tl.arange(0, SCAN)
        at = tl.load(at_ptr + rows, mask=rows < N, other=1 << 30)
        begin += tl.sum((at < first).to(tl.int32), 0)
        later += tl.sum((at < last).to(tl.int32), 0)
    return begin, later


@direct
@pytest.mark.parametrize(
    "setting",
    [
        "zipcache:probe_ratio=0.5",
        "zipvl:probes=[3,3]",
        "zipvl:probes=[3,3],dense_queries=true",
        "evict-pack:budget=5,policy=h2o",
        "evict-pack:budget=5,policy=knorm",
    ],
)
def test_prompts_of_mixed_blocks_by_kernels(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes and stored tokens as on CUDA, in a padded batch, against the same memory in torch: outputs and what is stored."""
    import qkv
    from qkv.caches import _saliency
    from qkv.caches._stores import mixed, parts
    from qkv.core.cache import Geometry, Step

    pieces = (12, 9, 1, 7)
    b, h, g, d, n = 2, 2, 1, 16, sum(pieces)
    draw = torch.Generator().manual_seed(n)
    q, k, v = (torch.randn(b, heads, n, d, generator=draw) for heads in (h, g, g))
    real = torch.arange(n) >= torch.tensor([0, 4])[:, None]
    position = (real.cumsum(-1) - 1).masked_fill(~real, -1).int()
    asked = []

    def run(device: str) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        layer, outs = qkv.method(f"{setting},regroup_every=5").layer(Geometry(h, g, d, d)), []
        for size in pieces:
            at = slice(layer.seen, layer.seen + size)
            step = Step(position[:, at].to(device), d**-0.5, real[:, : at.stop].to(device))
            outs.append(layer.attend(*(x[:, :, at].to(device) for x in (q, k, v)), step))
        held = [x for row in range(b) for x in layer.read([row])]
        return torch.cat(outs, 2).cpu().masked_fill(~real[:, None, :, None], 0), held, layer.positions()

    want = run("cpu")
    monkeypatch.setattr(_saliency, "served", lambda x: asked.append(x) is None)
    monkeypatch.setattr(parts, "served", lambda x: True)
    monkeypatch.setattr(mixed, "on_kernels", lambda q, k, v, mask=None: q.shape[2] > 1)
    got = run(DEVICE)
    assert bool(asked) == ("knorm" not in setting), "probes go to kernels, where there are any"
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=2e-5)
    assert torch.equal(got[2].cpu(), want[2])
    for x, y in zip(got[1], want[1], strict=True):
        torch.testing.assert_close(x.cpu(), y, rtol=0, atol=1e-6)


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device: elsewhere several tokens read the blocks in torch")
@pytest.mark.gpu
def test_a_padded_prompt_in_pieces_of_mixed_blocks_on_a_device() -> None:
    """Rows that hold different numbers of tokens, in half precision, against the same memory on the CPU in float32."""
    from qkv.caches.zipcache import ZipCache
    from qkv.core.cache import Geometry, Step

    draw = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, heads, 700, 64, generator=draw).bfloat16() for heads in (9, 3, 3))
    real = torch.arange(700) >= torch.tensor([0, 77])[:, None]
    position = (real.cumsum(-1, dtype=torch.int32) - 1).masked_fill(~real, -1)
    outs = []
    for device, kind in (("cpu", torch.float32), (DEVICE, torch.bfloat16)):
        layer, parts = ZipCache(bits=(8, 4)).layer(Geometry(9, 3, 64, 64)), []
        for n in (300, 215, 1, 120, 64):
            at = slice(layer.seen, layer.seen + n)
            step = Step(position[:, at].to(device), 0.125, real[:, : at.stop].to(device))
            parts.append(layer.attend(*(x[:, :, at].to(device, kind) for x in (q, k, v)), step))
        outs.append(torch.cat(parts, 2).float().cpu().masked_fill(~real[:, None, :, None], 0))
        assert len(set(layer.stored)) == 2
    assert (outs[0] - outs[1]).norm() < 2e-2 * outs[0].norm()


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device: elsewhere probes are judged in torch")
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(2, 8, 2, 100, 1500, 128), (1, 6, 3, 333, 700, 64), (1, 4, 4, 17, 300, 96)], ids=str)
def test_probes_on_a_device(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Masses of probes by `probe_mass` as memories ask for them: sums in float32, at most a rounding of products apart."""
    from qkv.caches import _saliency

    q, k, at = placed(shape, "ascending")
    q, k = q.to(dtype), k.to(dtype)
    assert _saliency.in_kernels(q, k) and not _saliency.in_kernels(q.double(), k.double())
    want = paid(q, k, at)
    lse = _saliency.probe_lse(q, k, at, scale=0.3)
    torch.testing.assert_close(lse.double(), want.lse, rtol=0, atol=5e-5)
    assert want.mass is not None
    for known in (None, lse):
        mass = _saliency.probe_mass(q, k, at, scale=0.3, lse=known)
        assert mass.dtype == torch.float32
        assert (mass.double() - want.mass).norm() < 1e-5 * want.mass.norm()
    off = _saliency.probe_mass(q, k, at - 1, scale=0.3)
    assert (off.double() - want.mass).norm() > 1e-3 * want.mass.norm()


@direct
def test_what_does_not_fit_is_refused() -> None:
    from qkv.kernels.flash import column_masses, flash_attention, probe_masses

    q, k, v = drawn((1, 2, 2, 8, 8, 16, 16))
    full = causal_mask(8, 8, q.device)[None, None]
    for arguments, more, said in (
        ((q, k, v), {"mask": full}, "key mask"),
        ((q, k.half(), v), {}, "one of bfloat16"),
        ((q, k[:, :, :4], v[:, :, :4]), {"causal": True}, "N <= M"),
        ((q, k, v[:, :, :4]), {}, "v \\[B, G, M, E\\]"),
    ):
        with pytest.raises(InvalidInput, match=said):
            flash_attention(*arguments, scale=1.0, **more)
    with pytest.raises(InvalidInput, match="rows"):
        column_masses(q, k, q[..., 0], scale=1.0, rows=torch.ones(1, 3, dtype=torch.bool))
    at = torch.arange(8, device=q.device)
    for what, said in (
        ({"at": at[:3]}, r"integers \[P\] or \[1\|B, P\]"),
        ({"at": at.float()}, "integers"),
        ({"at": at[:0], "q": q[:, :, :0]}, "at least one probe"),
        ({"at": at, "mask": full}, r"bool mask of keys \[1\|B, M\]"),
        ({"at": at, "lse": q[..., 0, 0]}, r"lse \[B, H, P\]"),
        ({"at": at, "q": q.double(), "k": k.double()}, "one of bfloat16"),
    ):
        with pytest.raises(InvalidInput, match=said):
            probe_masses(**{"q": q, "k": k, "scale": 1.0} | what)


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device: elsewhere attend takes the plain form")
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(2, 8, 2, 300, 300, 128, 128), (1, 6, 3, 257, 1000, 64, 64), (1, 4, 2, 130, 200, 96, 32)]
)
@pytest.mark.parametrize("padded", [False, True])
def test_attend_in_half_precision_on_a_device(dtype: torch.dtype, shape: tuple[int, ...], padded: bool) -> None:
    q, k, v = (x.to(dtype) for x in drawn(shape))
    b, m = shape[0], shape[4]
    mask = None
    if padded:
        mask = torch.ones(b, 1, 1, m, dtype=torch.bool, device=DEVICE)
        mask[0, :, :, :20] = False
    got = attend(q, k, v, mask=mask, causal=True, mass=True)
    want = attend(q.double(), k.double(), v.double(), mask=mask, causal=True, mass=True)
    for name, mine, right in zip(("out", "lse", "mass"), got, want, strict=True):
        fine = torch.isfinite(right)
        assert torch.equal(fine, torch.isfinite(mine)), name
        assert (mine.double() - right)[fine].norm() < 5e-3 * right[fine].norm(), name
