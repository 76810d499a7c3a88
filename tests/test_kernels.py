"""Triton kernels against float64: through Triton's interpreter on any machine, on the device where there is one."""

from __future__ import annotations

import pytest
import torch

from interpreter import CUDA, DEVICE, direct, interpreted

triton = pytest.importorskip("triton")


def test_kernels_are_checked_through_the_interpreter() -> None:
    """The checks below, in a process of their own: the interpreter is chosen when Triton is imported."""
    interpreted(__file__)


@direct
@pytest.mark.parametrize(
    "shape", [(2, 6, 3, 101, 32, 32, 77), (1, 4, 4, 64, 16, 24, 1), (3, 8, 2, 130, 64, 64, 130)], ids=str
)
@pytest.mark.parametrize("part", ["all", "start", "position"])
def test_decode_attention_and_key_mass(shape: tuple[int, ...], part: str) -> None:
    from qkv.core.attend import attend
    from qkv.kernels.decode import decode_attention, key_mass

    b, h, g, c, d, e, n = shape
    draw = torch.Generator(DEVICE).manual_seed(sum(shape))
    q, k, v = (torch.randn(*s, device=DEVICE, generator=draw) for s in ((b, h, 1, d), (b, g, c, d), (b, g, c, e)))
    k[:, :, n:], v[:, :, n:] = float("nan"), float("nan")  # what was never written must not be read
    length = torch.tensor([n], dtype=torch.int32, device=DEVICE)
    start = position = mask = None
    if part == "start":
        start = torch.randint(0, max(1, n // 2), (b,), dtype=torch.int32, device=DEVICE, generator=draw)
        mask = (torch.arange(n, device=DEVICE)[None] >= start[:, None])[:, None, None, :]
    if part == "position":
        position = torch.randint(-1, 3, (b, g, c), dtype=torch.int32, device=DEVICE, generator=draw)
        mask = (position[:, :, :n] >= 0).unsqueeze(2)
    want = attend(q.double(), k[:, :, :n].double(), v[:, :, :n].double(), mask=mask, mass=True)
    for splits in (1, 3, None):
        out, lse = decode_attention(
            q, k, v, length=length, start=start, position=position, scale=d**-0.5, splits=splits
        )
        torch.testing.assert_close(out.double(), want.out, rtol=0, atol=2e-6)
        torch.testing.assert_close(lse.double(), want.lse, rtol=0, atol=2e-6)
    if part != "start":
        mass = key_mass(q, k, lse, length=length, position=position, scale=d**-0.5)
        seen = torch.isfinite(want.lse)
        torch.testing.assert_close(mass[:, :, :n].double() * seen, want.mass * seen, rtol=0, atol=2e-6)
        assert (mass[:, :, n:] == 0).all()


@direct
def test_the_number_of_splits_does_not_depend_on_the_room() -> None:
    from qkv.kernels.decode import decode_attention

    draw = torch.Generator(DEVICE).manual_seed(0)
    q, k = (torch.randn(*s, device=DEVICE, generator=draw) for s in ((1, 4, 1, 16), (1, 2, 90, 16)))
    length = torch.tensor([70], dtype=torch.int32, device=DEVICE)
    small, large = (decode_attention(q, x, x, length=length, scale=0.25)[0] for x in (k[:, :, :70].contiguous(), k))
    assert torch.equal(small, large)


@direct
def test_shapes_that_do_not_fit_are_refused() -> None:
    from qkv.core.errors import InvalidInput
    from qkv.kernels.decode import decode_attention

    x = torch.randn(1, 2, 8, 16, device=DEVICE)
    length = torch.tensor([8], dtype=torch.int32, device=DEVICE)
    for q, k in ((x, x), (x[:, :, :1, :8], x), (x[:, :, :1], x.mT.contiguous().mT)):
        with pytest.raises(InvalidInput):
            decode_attention(q, k, k, length=length, scale=1.0)


@direct
@pytest.mark.parametrize("width", [0, 1, 3])
def test_placing_and_freeing_slots(width: int) -> None:
    from qkv.kernels.slots import free, place

    b, g, c, d, e = 2, 3, 37, 5, 7
    draw = torch.Generator(DEVICE).manual_seed(width)
    rand = lambda *s: torch.randn(*s, device=DEVICE, generator=draw)  # noqa: E731
    keys, values, k, v = rand(b, g, c, d), rand(b, g, c, e), rand(b, 1, g, d).transpose(1, 2), rand(b, g, 1, e)
    position = torch.rand(b, g, c, device=DEVICE, generator=draw).argsort(-1).int()
    state = rand(b, g, c, width) if width else None
    slot = torch.randint(0, c, (b, g, 1), device=DEVICE, generator=draw)
    new = torch.tensor([[90], [91]], dtype=torch.int32, device=DEVICE)
    want = [x.clone() for x in (keys, values, position)]
    at = slot[..., None]
    want[0].scatter_(2, at.expand(-1, -1, -1, d), k)
    want[1].scatter_(2, at.expand(-1, -1, -1, e), v)
    want[2].scatter_(2, slot, new[:, None].expand(b, g, 1))
    place(keys, values, position, state, slot, k, v, new)
    assert all(torch.equal(x, y) for x, y in zip((keys, values, position), want, strict=True))
    if state is not None:
        assert (state.gather(2, at.expand(-1, -1, -1, width)) == 0).all()
    for worth in (None, rand(b, g, c), torch.zeros(b, g, c, device=DEVICE)):
        mine, where = position.clone(), slot.clone()
        score = position.float() if worth is None else worth
        score = score.masked_fill(position < 4, torch.inf) if worth is None else score
        expected = score.scatter(2, slot, torch.inf).argmin(-1, keepdim=True)
        free(mine, where, worth=worth, protect=4)
        if worth is None or worth.any():
            assert torch.equal(where, expected)
        assert (mine.gather(2, where) == -1).all() and (mine == -1).sum() == b * g and not (where == slot).any()


@direct
def test_turning_a_few_keys_in_place() -> None:
    from qkv.core.cache import Rope
    from qkv.kernels.slots import turn

    draw = torch.Generator(DEVICE).manual_seed(0)
    keys = torch.randn(2, 3, 11, 10, device=DEVICE, generator=draw)
    rope = Rope(torch.tensor([1.0, 0.1, 0.01], device=DEVICE))  # partial rotary: 6 of 10 channels
    index = torch.tensor([0, 4, 9], device=DEVICE).expand(2, 3, 3)
    shift = torch.randint(0, 50, (2, 3, 3), device=DEVICE, generator=draw).int()
    anchors = keys.gather(2, index[..., None].expand(-1, -1, -1, 10))
    want = keys.scatter(2, index[..., None].expand(-1, -1, -1, 10), rope.rotate(anchors, shift))
    turn(keys, anchors, index, rope.frequencies, shift)
    torch.testing.assert_close(keys, want, rtol=0, atol=2e-6)


# -- packed codes: rows of different length, everything that was not written poisoned -----------------------------------


def _fresh(heads: int, g: int, d: int, e: int, bits: tuple[int, int], group: int, residual: int):
    from qkv.caches._stores.packed import PackedCache
    from qkv.core.cache import Geometry

    return PackedCache(Geometry(heads, g, d, e), k_bits=bits[0], v_bits=bits[1], group=group, residual=residual)


def _draw(gen: torch.Generator, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Numbers that `dtype` holds exactly, as float32."""
    return [torch.randn(*s, generator=gen).to(dtype).float() for s in shapes]


def _absorb(layer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from qkv.core.cache import Step

    position = torch.arange(layer.seen, layer.seen + q.shape[2], dtype=torch.int32, device=q.device)
    return layer.attend(q, k, v, Step(position.expand(q.shape[0], -1), q.shape[3] ** -0.5))


def _poisoned(rows: list, room: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """The buffers of one-row caches side by side, `room` tokens long; what no row wrote is -1 or NaN."""
    out = []
    for name in ("keys", "values"):
        for part in ("codes", "scale", "zero"):
            held = [getattr(getattr(row, name), part) for row in rows]
            like = next(x for x in held if x is not None)
            per = rows[0].group if name == "keys" else 1
            full = like.new_full(
                (len(rows), like.shape[1], room // per, *like.shape[3:]), -1 if part == "codes" else torch.nan
            )
            for b, (row, x) in enumerate(zip(rows, held, strict=True)):
                done = (row.key_done if name == "keys" else row.value_done)[0] // per
                if done:
                    full[b, :, :done] = x[0, :, :done]
            out.append(full)
    for name, done in (("key_tail", "key_done"), ("value_tail", "value_done")):
        like = getattr(rows[0], name)
        full = like.new_full((len(rows), like.shape[1], rows[0].residual, like.shape[3]), torch.nan, dtype=dtype)
        for b, row in enumerate(rows):
            for p in range(getattr(row, done)[0], row.length[0]):
                full[b, :, p % row.residual] = getattr(row, name)[0, :, p % row.residual]
        out.append(full)
    return [x.to(DEVICE) for x in out]


PACKED = [  # heads, kv heads, key width, value width, bits, group, residual, lengths of the rows
    (4, 2, 8, 8, (4, 4), 8, 16, (15, 31, 96)),
    (4, 2, 32, 64, (2, 2), 32, 64, (63, 130)),
    (4, 4, 16, 32, (8, 2), 16, 32, (97, 160)),
    (4, 1, 24, 40, (4, 8), 8, 24, (47, 150)),
    (3, 1, 16, 16, (2, 4), 4, 8, (1, 7, 38)),
]


@direct
@pytest.mark.parametrize("units", [8, 16])
@pytest.mark.parametrize("case", PACKED[::2], ids=str)
def test_planes_of_codes_are_the_packed_words(case: tuple, units: int) -> None:
    """Whole steps by planes, the rest by tiles; a mistaken lane, group or token is far beyond float16's rounding."""
    from qkv.core.attend import attend
    from qkv.kernels.packed import packed_decode

    h, g, d, e, bits, group, residual, lengths = case
    gen = torch.Generator().manual_seed(sum(lengths))
    lengths = tuple(n + 2 * 16 * (32 // bits[0]) for n in lengths)  # some whole steps
    rows = [_fresh(h, g, d, e, bits, group, residual) for _ in lengths]
    for row, n in zip(rows, lengths, strict=True):
        _absorb(row, *_draw(gen, (1, h, n, d), (1, g, n, d), (1, g, n, e)))
    full = max(lengths)
    buffers = _poisoned(rows, full + 2 * residual)
    q, k, v = _draw(gen, (len(rows), h, 1, d), (len(rows), g, 1, d), (len(rows), g, 1, e))
    q, scale = q * 3e5, d**-0.5 / 3e5  # beyond float16
    out, lse = packed_decode(
        *(x.to(DEVICE) for x in (q, k, v)), *buffers, planes=True, units=units, scale=scale, splits=3,
        k_bits=bits[0], v_bits=bits[1], length=torch.tensor([full + 1], dtype=torch.int32, device=DEVICE),
        group=group, residual=residual, start=torch.tensor([full - n for n in lengths], dtype=torch.int32, device=DEVICE),
    )  # fmt: skip
    for b, row in enumerate(rows):
        keys, values, _ = row.read()
        one = slice(b, b + 1)
        held = [torch.cat((x, y[one]), 2).double() for x, y in ((keys, k), (values, v))]
        want = attend(q[one].double(), *held, scale=scale)
        torch.testing.assert_close(out[one].cpu().double(), want.out, rtol=0, atol=1e-2)
        assert (out[one].cpu() - want.out).norm() < 1e-3 * want.out.norm()
        torch.testing.assert_close(lse[one].cpu().double(), want.lse, rtol=0, atol=2e-3)


@direct
@pytest.mark.parametrize("case", PACKED, ids=str)
def test_packed_words_are_read_and_written_as_the_torch_path_does(case: tuple) -> None:
    """Attention equals dequantise-then-attend in float64; codes, scales and zeros equal the torch path's, bit for bit."""
    from qkv.core.attend import attend
    from qkv.kernels.packed import packed_decode, packed_store

    h, g, d, e, bits, group, residual, lengths = case
    gen = torch.Generator().manual_seed(sum(lengths))
    rows = [_fresh(h, g, d, e, bits, group, residual) for _ in lengths]
    full = max(lengths)
    for row, n in zip([*rows, _fresh(h, g, d, e, bits, group, residual)], (*lengths, full), strict=True):
        _absorb(row, *_draw(gen, (1, h, n, d), (1, g, n, d), (1, g, n, e)))
    buffers = _poisoned(rows, full + 2 * residual)
    start = torch.tensor([full - n for n in lengths], dtype=torch.int32, device=DEVICE)
    what = {"k_bits": bits[0], "v_bits": bits[1], "group": group, "residual": residual, "start": start}
    for i in range(2):
        q, k, v = _draw(gen, (len(rows), h, 1, d), (len(rows), g, 1, d), (len(rows), g, 1, e))
        length = torch.tensor([full + i + 1], dtype=torch.int32, device=DEVICE)
        new = [x.to(DEVICE) for x in (q, k, v)]
        out, lse = packed_decode(*new, *buffers, length=length, scale=d**-0.5, splits=2 + i, **what)
        packed_store(*new[1:], *buffers, length=length, **what)
        for b, row in enumerate(rows):
            keys, values, _ = row.read()
            one = slice(b, b + 1)
            want = attend(
                q[one].double(),
                torch.cat((keys, k[one]), 2).double(),
                torch.cat((values, v[one]), 2).double(),
                scale=d**-0.5,
            )
            torch.testing.assert_close(out[one].cpu().double(), want.out, rtol=0, atol=2e-6)
            torch.testing.assert_close(lse[one].cpu().double(), want.lse, rtol=0, atol=2e-6)
            _absorb(row, q[one], k[one], v[one])
        for x, y in zip(buffers[:6], _poisoned(rows, full + 2 * residual)[:6], strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@direct
def test_packed_rounding_is_that_of_torch() -> None:
    """Ties go to even, flat groups get scale 1, and what float16 cannot hold saturates: as in the torch path."""
    from qkv.kernels.packed import packed_store

    g, d, group, residual = 2, 16, 8, 8
    gen = torch.Generator().manual_seed(0)
    row = _fresh(2, g, d, d, (2, 4), group, residual)
    k = torch.randint(0, 7, (1, g, 2 * residual, d), generator=gen) / 2.0
    v = torch.randint(0, 31, (1, g, 2 * residual, d), generator=gen) / 2.0
    k[:, 0, :, 0], k[:, 0, :, 1], k[:, 0, 8:, 2], k[:, 0, :, 3] = 0.1, 3e5, -1e6, 1e-9
    v[:, 1, 3], v[:, 1, 4, :8], v[:, 1, 5, :8] = 7.25, 1e6, -1e-9
    _absorb(row, torch.zeros(1, 2, residual, d), k[:, :, :residual], v[:, :, :residual])
    row.values.reserve(1, row.value_tail, codes=(2,), scale=(2,), zero=(2,))
    buffers = _poisoned([row], 4 * residual)
    for i in range(residual, 2 * residual):
        one = (x[:, :, i : i + 1] for x in (k, v))
        packed_store(*(x.to(DEVICE) for x in one), *buffers, length=torch.tensor([i + 1], dtype=torch.int32, device=DEVICE),
                     k_bits=2, v_bits=4, group=group, residual=residual)  # fmt: skip
        _absorb(row, torch.zeros(1, 2, 1, d), k[:, :, i : i + 1], v[:, :, i : i + 1])
    for x, y in zip(buffers[:6], _poisoned([row], 4 * residual)[:6], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@direct
@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
def test_static_steps_of_a_packed_cache_are_its_plain_steps(padded: bool) -> None:
    """Reserved buffers keep their addresses; results are those of growing buffers bit for bit, and the torch path's."""
    from qkv.core.cache import Now, Step
    from qkv.core.errors import StateError

    b, h, g, d, n, residual = 2, 3, 1, 16, 21, 8
    gen = torch.Generator().manual_seed(int(padded))
    fixed, grown, plain = (_fresh(h, g, d, d, (4, 2), 4, residual) for _ in range(3))
    fixed.reserve(n + 11)
    pads = torch.tensor([0, 6 if padded else 0])
    real = torch.arange(n + 11) >= pads[:, None]
    prompt = _draw(gen, (b, h, n, d), (b, g, n, d), (b, g, n, d))

    def step(layer, start: int, stop: int) -> Step:
        position = (torch.arange(start, stop) - pads[:, None]).clamp(min=-1).int()
        where = DEVICE if layer is not plain else "cpu"
        return Step(position.to(where), d**-0.5, real[:, :stop].to(where) if padded else None)

    for layer in (fixed, grown, plain):
        layer.attend(*(x if layer is plain else x.to(DEVICE) for x in prompt), step(layer, 0, n))
    addresses = [x.data_ptr() for x in fixed.buffers()]
    assert len(addresses) == 8 and fixed.static() == CUDA
    for i in range(n, n + 11):
        new = _draw(gen, (b, h, 1, d), (b, g, 1, d), (b, g, 1, d))
        if i == n + 4:  # rows change places, and nothing else does
            rows = torch.tensor([0, 1] if padded else [1, 0])
            for layer in (fixed, grown, plain):
                layer.select(rows)
        if i == n + 5:
            for layer in (fixed, grown, plain):
                layer.crop(1)
                layer.attend(*(x if layer is plain else x.to(DEVICE) for x in new), step(layer, i - 1, i))
        there = [x.to(DEVICE) for x in new]
        now = Now(
            cursor=torch.tensor([i], device=DEVICE),
            length=torch.tensor([i + 1], dtype=torch.int32, device=DEVICE),
            position=step(fixed, i, i + 1).position,
            start=pads.int().to(DEVICE) if padded else None,
        )
        a = fixed.step(*there, d**-0.5, now) if fixed._regular else fixed.attend(*there, step(fixed, i, i + 1))
        b_ = grown._one(*there, d**-0.5) if grown._regular else grown.attend(*there, step(grown, i, i + 1))
        c = plain.attend(*new, step(plain, i, i + 1))
        assert torch.equal(a, b_), i
        torch.testing.assert_close(a.cpu(), c, rtol=0, atol=2e-6)
    assert addresses == [x.data_ptr() for x in fixed.buffers()]
    assert not fixed.static(), "no room is left"
    kept = [[*layer.read()[:2], *layer.tensors().values()] for layer in (fixed, grown, plain)]
    for x, y, z in zip(*(one[:8] for one in kept), strict=True):  # what is read, and every code, scale and zero
        assert torch.equal(x, y) and torch.equal(x.cpu(), z)
    with pytest.raises(StateError, match="attention mask"):
        fixed.step(*there, d**-0.5, Now(now.cursor, now.length, now.position, None if padded else pads.int()))


@direct
def test_packed_buffers_that_do_not_fit_are_refused() -> None:
    from qkv.core.errors import InvalidInput
    from qkv.kernels.packed import packed_decode

    row = _fresh(2, 2, 16, 16, (4, 4), 8, 8)
    prompt = _draw(torch.Generator().manual_seed(0), (1, 2, 20, 16), (1, 2, 20, 16), (1, 2, 20, 16))
    _absorb(row, *prompt)
    buffers = _poisoned([row], 32)
    new = [x[:, :, :1].to(DEVICE) for x in prompt]
    good = {"length": torch.tensor([21], dtype=torch.int32, device=DEVICE), "scale": 0.25, "k_bits": 4, "v_bits": 4,
            "group": 8, "residual": 8}  # fmt: skip
    packed_decode(*new, *buffers, **good)
    for bad in ({"k_bits": 3}, {"v_bits": 2}, {"group": 4}, {"residual": 12}):
        with pytest.raises(InvalidInput, match="packed_decode"):
            packed_decode(*new, *buffers, **good | bad)
    with pytest.raises(InvalidInput, match="8 or 16"):
        packed_decode(*new, *buffers, **good, units=4)
    with pytest.raises(InvalidInput, match="one token per row"):
        packed_decode(prompt[0].to(DEVICE), *new[1:], *buffers, **good)


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("units", [8, 16])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("d", "group"), [(128, 32), (8, 8)])
def test_packed_decode_at_real_widths_and_narrow(d: int, group: int, bits: int, dtype: torch.dtype, units: int) -> None:
    """Low precision: the error against float64 is at most twice that of plain attention over the dequantised cache."""
    from qkv.core.attend import attend
    from qkv.kernels.packed import packed_decode

    h, g, n = 8, 2, 5000
    gen = torch.Generator().manual_seed(bits)
    row = _fresh(h, g, d, d, (bits, bits), group, 128)
    k, v = _draw(gen, (1, g, n, d), (1, g, n, d), dtype=dtype)
    q, new_k, new_v = _draw(gen, (1, h, 1, d), (1, g, 1, d), (1, g, 1, d), dtype=dtype)
    _absorb(row, torch.zeros(1, h, n, d), k, v)
    keys, values, _ = row.read()
    keys, values = torch.cat((keys, new_k), 2).to(DEVICE), torch.cat((values, new_v), 2).to(DEVICE)
    q, new_k, new_v = (x.to(DEVICE) for x in (q, new_k, new_v))
    want = attend(q.double(), keys.double(), values.double()).out
    rough = torch.nn.functional.scaled_dot_product_attention(*(x.to(dtype) for x in (q, keys, values)), enable_gqa=True)
    out, _ = packed_decode(
        *(x.to(dtype) for x in (q, new_k, new_v)), *_poisoned([row], n + 300, dtype), scale=d**-0.5,
        length=torch.tensor([n + 1], dtype=torch.int32, device=DEVICE), k_bits=bits, v_bits=bits, group=group, residual=128,
        units=units,
    )  # fmt: skip
    assert (out.double() - want).norm() <= 2 * (rough.double() - want).norm()


# -- blocks of mixed precision ---------------------------------------------------------------------------------------------

MIXED = [  # rows, heads, kv heads, key width, value width, bits, tokens of a block, precise ones, blocks
    (2, 6, 3, 8, 8, (4, 2), 10, 6, 3),
    (1, 4, 1, 24, 40, (8, 4), 90, 40, 2),
    (1, 4, 4, 64, 32, (2, 8), 66, 65, 1),
]


@direct
@pytest.mark.parametrize("case", MIXED, ids=str)
def test_blocks_of_mixed_precision_are_read_as_the_torch_path_reads_them(case: tuple) -> None:
    """Attention over each part equals dequantise-then-attend in float64; unused blocks are poisoned."""
    from qkv.caches._stores.parts import Stack
    from qkv.core.attend import attend
    from qkv.core.errors import InvalidInput
    from qkv.kernels.mixed import mixed_decode

    b, h, g, d, e, bits, width, precise, blocks = case
    gen = torch.Generator().manual_seed(width)
    stack = Stack(list(range(b)), width, bits, precise)
    for _ in range(blocks + 1):
        flags = torch.rand(b, g, width, generator=gen).argsort(-1) < precise
        stack.add([0] * b, *_draw(gen, (b, g, width, d), (b, g, width, e)), flags)
    for _, _, x in stack.named():
        x[:, :, blocks:] = -1 if x.dtype == torch.int32 else 1 if x.dtype == torch.uint8 else torch.nan
    q = _draw(gen, (b, h, 1, d))[0]
    assert stack.channel is not None
    for part in stack.parts:
        keys, values = part.plain(slice(None), blocks, (d, e), stack.channel)
        want = attend(q.double(), keys.flatten(2, 3).double(), values.flatten(2, 3).double(), scale=d**-0.5)
        ranges = (part.key_scale, part.key_zero, part.values, part.value_scale, part.value_zero, stack.channel)
        held = [x.to(DEVICE) for x in (q, part.keys, *ranges) if x is not None]
        many = torch.tensor([blocks], dtype=torch.int32, device=DEVICE)
        for splits, block in ((1, 64), (3, 16), (None, 64)):
            out, lse = mixed_decode(*held, blocks=many, bits=part.bits, scale=d**-0.5, splits=splits, block=block)
            torch.testing.assert_close(out.cpu().double(), want.out, rtol=0, atol=3e-6)
            torch.testing.assert_close(lse.cpu().double(), want.lse, rtol=0, atol=3e-6)
        for bad in ({"bits": 16}, {"blocks": many.repeat(2)}, {"blocks": many.long()}):
            with pytest.raises(InvalidInput, match="mixed_decode"):
                mixed_decode(*held, **{"blocks": many, "bits": part.bits, "scale": 0.3} | bad)


@direct
@pytest.mark.parametrize(("prompt", "padded"), [(9, True), (3, False)])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("zipcache", {"probe_ratio": 0.5}),
        ("zipvl", {"probes": (2, 2), "bits": (8, 4)}),
        ("evict-pack", {"policy": "knorm", "budget": 5}),
        ("evict-pack", {"policy": "knorm", "budget": 5, "bits": 16}),
    ],
    ids=str,
)
def test_static_steps_of_blocks_of_mixed_precision_are_plain_steps(
    name: str, settings: dict, prompt: int, padded: bool
) -> None:
    """Static steps between blocks, plain ones where a block is made, against plain steps in torch."""
    import qkv
    from qkv.core.cache import Geometry, Now, Step

    b, h, g, d, new = 2, 2, 1, 16, 9
    geometry = Geometry(h, g, d, d, layer=1, layers=4)
    fixed, plain = (qkv.method(name, regroup_every=5, **settings).layer(geometry) for _ in range(2))
    fixed.reserve(prompt + new)
    gen = torch.Generator().manual_seed(prompt)
    q, k, v = _draw(gen, *((b, n, prompt + new, d) for n in (h, g, g)))
    pads = torch.tensor([0, 3 if padded else 0])
    real = torch.arange(prompt + new) >= pads[:, None]

    def part(layer, i: int, n: int) -> tuple:
        where, at = "cpu" if layer is plain else DEVICE, slice(i, i + n)
        position = (torch.arange(i, i + n) - pads[:, None]).clamp(min=-1).int().to(where)
        step = Step(position, d**-0.5, real[:, : i + n].to(where) if padded else None)
        return *(x[:, :, at].to(where) for x in (q, k, v)), step

    for layer in (fixed, plain):
        layer.attend(*part(layer, 0, prompt))
    static = 0
    for i in range(prompt, prompt + new):
        want = plain.attend(*part(plain, i, 1))
        *token, step = part(fixed, i, 1)
        if max(fixed.waiting) + 1 < fixed.every and fixed._fixed():
            now = Now(
                torch.tensor([i], device=DEVICE), torch.tensor([i + 1], dtype=torch.int32, device=DEVICE), step.position,
                pads.int().to(DEVICE) if padded else None,
            )  # fmt: skip
            before = [x.data_ptr() for x in fixed.buffers()]
            got = fixed.step(*token, d**-0.5, now)
            assert before == [x.data_ptr() for x in fixed.buffers()], "what a captured step reads stays where it is"
            static += 1
        else:
            got = fixed.attend(*token, step)
        torch.testing.assert_close(got.cpu(), want, rtol=0, atol=5e-6)
    assert static >= new - 3 - padded * 3 and (fixed.waiting, fixed.length) == (plain.waiting, plain.length)
    assert torch.equal(fixed.positions().cpu(), plain.positions()), "the same tokens are kept, also of decoded blocks"
    for row in range(b):
        for x, y in zip(fixed.read([row]), plain.read([row]), strict=True):
            torch.testing.assert_close(x.cpu(), y, rtol=0, atol=1e-6)


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decoding_blocks_of_mixed_precision_on_the_device(dtype: torch.dtype) -> None:
    """A padded batch that decodes over many blocks: kernels against the same store on the CPU, in float32."""
    from qkv.caches.zipcache import ZipCache
    from qkv.core.cache import Geometry, Step

    gen = torch.Generator().manual_seed(0)
    q, k, v = _draw(gen, (2, 9, 700, 64), (2, 3, 700, 64), (2, 3, 700, 64), dtype=dtype)
    padding = torch.arange(700) >= torch.tensor([0, 77])[:, None]
    position = (padding.cumsum(-1, dtype=torch.int32) - 1).masked_fill(~padding, -1)
    outs = []
    for device, kind in (("cpu", torch.float32), (DEVICE, dtype)):
        layer, parts = ZipCache(bits=(8, 4)).layer(Geometry(9, 3, 64, 64)), []
        for n in (500, *[1] * 200):
            at = slice(layer.seen, layer.seen + n)
            step = Step(position[:, at].to(device), 0.125, padding[:, : at.stop].to(device))
            parts.append(layer.attend(*(x[:, :, at].to(device, kind) for x in (q, k, v)), step)[:, :, -1:])
        outs.append(torch.cat(parts, 2).float().cpu())
    assert (outs[0] - outs[1]).norm() < (1e-3 if dtype == torch.float32 else 2e-2) * outs[0].norm()
