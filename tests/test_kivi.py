"""KIVI: the oracles of its page, on the store itself."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import qkv
from qkv.caches._stores import packed, recording
from qkv.caches._stores.codecs import (
    dequantize_per_channel_tokens,
    dequantize_per_token_channels,
    pack_bits,
    quantize_per_channel_tokens,
    quantize_per_token_channels,
    unpack_bits,
)
from qkv.caches._stores.packed import PackedCache
from qkv.caches.kivi import KIVI, reference
from qkv.core.attend import attend, causal_mask
from qkv.core.cache import Geometry, Step
from qkv.core.errors import InvalidInput, InvalidParameter, Refused, StateError

H, G, D = 6, 3, 8
GROUP, R = 4, 8


def cache(k_bits: int = 2, v_bits: int = 2, group: int = GROUP, residual: int = R, width: int = D) -> PackedCache:
    method = KIVI(k_bits=k_bits, v_bits=v_bits, group=group, residual=residual)
    layer = method.layer(Geometry(H, G, width, width))
    assert isinstance(layer, PackedCache)
    return layer


def draw(n: int, b: int = 1, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(b, h, n, D, generator=gen, dtype=torch.float64).to(dtype) for h in (H, G, G))
    return q, k, v


def step(b: int, seen: int, n: int, padding: Tensor | None = None, **more: object) -> Step:
    if padding is None:
        position = torch.arange(seen, seen + n, dtype=torch.int32).expand(b, n)
    else:
        padding = padding[:, : seen + n]
        position = (padding.int().cumsum(-1) - 1).masked_fill(~padding, -1)[:, seen:].int()
    return Step(position, D**-0.5, padding, **more)  # type: ignore[arg-type]


def feed(
    layer: PackedCache, qkv_: tuple[Tensor, Tensor, Tensor], cuts: list[int], padding: Tensor | None = None
) -> Tensor:
    """Blocks of the given sizes, from where the layer stands; the outputs side by side."""
    outs, start = [], layer.seen
    for n in cuts:
        at = layer.seen - start
        part = [x[:, :, at : at + n] for x in qkv_]
        outs.append(layer.attend(*part, step(part[0].shape[0], layer.seen, n, padding)))
    return torch.cat(outs, 2)


# -- bits and groups --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("count", [1, 3, 4, 16, 17, 32, 64])
def test_pack_round_trip_and_order(bits: int, count: int) -> None:
    codes = torch.randint(0, 2**bits, (2, 3, count), dtype=torch.uint8)
    codes[0, 0] = torch.arange(count) % 2**bits
    words = pack_bits(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (2, 3, -(-count * bits // 32))
    assert torch.equal(unpack_bits(words, bits, count), codes)
    per = 32 // bits
    for j in range(count):  # element j of a word at bits j * bits
        got = (words[..., j // per].long() >> (j % per * bits)) & (2**bits - 1)
        assert torch.equal(got, codes[..., j].long())


def test_every_code_survives() -> None:
    for bits in (2, 4, 8):
        codes = torch.arange(2**bits, dtype=torch.uint8).repeat(3)
        assert torch.equal(unpack_bits(pack_bits(codes, bits), bits, codes.numel()), codes)


def test_pack_refuses() -> None:
    with pytest.raises(InvalidParameter, match="2, 4 or 8"):
        pack_bits(torch.zeros(4, dtype=torch.uint8), 3)
    with pytest.raises(InvalidInput, match="int32 words"):
        unpack_bits(torch.zeros(1, dtype=torch.int32), 4, 9)
    with pytest.raises(InvalidInput, match="groups of 5 tokens"):
        quantize_per_channel_tokens(torch.zeros(8, 8), 2, 5)
    with pytest.raises(InvalidInput, match="groups of 3 channels"):
        quantize_per_token_channels(torch.zeros(8, 8), 2, 3)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("axis", ["channel", "token"])
def test_error_is_at_most_half_a_step(bits: int, axis: str) -> None:
    x = torch.randn(2, 3, 16, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    there, back = {
        "channel": (quantize_per_channel_tokens, dequantize_per_channel_tokens),
        "token": (quantize_per_token_channels, dequantize_per_token_channels),
    }[axis]
    codes, s, z = there(x, bits, GROUP)
    y = back(codes, s, z)
    half = (s / 2).repeat_interleave(GROUP, -2 if axis == "channel" else -1)
    assert ((x - y).abs() <= half + 1e-12).all()
    grouped = (
        (lambda t: t.unflatten(-2, (-1, GROUP)).mT) if axis == "channel" else (lambda t: t.unflatten(-1, (-1, GROUP)))
    )
    torch.testing.assert_close(grouped(y).amin(-1), grouped(x).amin(-1), rtol=0, atol=1e-12)
    torch.testing.assert_close(grouped(y).amax(-1), grouped(x).amax(-1), rtol=0, atol=1e-12)


def test_values_on_a_grid_are_lossless() -> None:
    gen = torch.Generator().manual_seed(2)
    x = torch.randint(0, 4, (1, 2, 8, 8), generator=gen).double()
    x[..., ::4, :], x[..., 1::4, :] = 0, 3  # every channel group of tokens spans the grid
    codes, s, z = quantize_per_channel_tokens(x * 0.5 - 1, 2, 4, torch.float16)
    assert torch.equal(dequantize_per_channel_tokens(codes, s.double(), z.double()), x * 0.5 - 1)
    x = x.mT
    codes, s, z = quantize_per_token_channels(x * 0.25 + 2, 2, 4, torch.float16)
    assert torch.equal(dequantize_per_token_channels(codes, s.double(), z.double()), x * 0.25 + 2)


def test_a_flat_group_has_code_zero_and_scale_one() -> None:
    x = torch.full((4, 4), 7.25)
    codes, s, z = quantize_per_channel_tokens(x, 2, 4, torch.float16)
    assert (codes == 0).all() and (s == 1).all() and (z == 7.25).all()
    tiny = torch.tensor([[0.0, 1e-9, 0.0, 1e-9]])  # max - min vanishes in float16
    codes, s, z = quantize_per_token_channels(tiny, 4, 4, torch.float16)
    assert (codes == 0).all() and (s == 1).all()
    huge = torch.tensor([[-1e6, 1e6, 0.0, 1.0]])
    codes, s, z = quantize_per_token_channels(huge, 2, 4, torch.float16)
    assert torch.isfinite(dequantize_per_token_channels(codes, s.float(), z.float())).all()


# -- the store ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k_bits", "v_bits"), [(2, 2), (4, 2), (2, 4), (8, 8), (16, 2), (4, 16)])
@pytest.mark.parametrize("n", [1, 7, 8, 9, 15, 16, 17, 37])
def test_store_reads_as_the_reference(k_bits: int, v_bits: int, n: int) -> None:
    q, k, v = draw(n, b=2, seed=n)
    layer = cache(k_bits, v_bits)
    feed(layer, (q, k, v), [n])
    keys, values, holds = layer.read()
    want_k, want_v = reference(k, v, k_bits=k_bits, v_bits=v_bits, group=GROUP, residual=R, stored=torch.float16)
    assert holds is None
    torch.testing.assert_close(keys, want_k, rtol=0, atol=1e-12)
    torch.testing.assert_close(values, want_v, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cuts", [[1] * 41, [29] + [1] * 12, [7] * 5 + [1] * 6, [3, 20, 1, 1, 16]])
def test_any_chunking_stores_the_same_codes(cuts: list[int]) -> None:
    """Never quantised twice: whatever the blocks, a group's codes are those of quantising it once."""
    qkv_ = draw(41, b=2)
    one, many = cache(), cache()
    feed(one, qkv_, [41])
    feed(many, qkv_, cuts)
    assert (one.length, one.key_done, one.value_done) == (many.length, many.key_done, many.value_done)
    for shelf in ("keys", "values"):
        for (name, a), (_, b) in zip(getattr(one, shelf).named(), getattr(many, shelf).named(), strict=True):
            assert torch.equal(a, b[:, :, : a.shape[2]]), (shelf, name)


def test_codes_never_change() -> None:
    qkv_, layer = draw(100), cache()
    before: dict[str, Tensor] = {}
    for n in [20, *([1] * 80)]:
        feed(layer, tuple(x[:, :, layer.seen :] for x in qkv_), [n])  # type: ignore[arg-type]
        now = {k: x for k, x in layer.tensors().items() if k.startswith(("keys", "values"))}
        for name, old in before.items():
            assert torch.equal(now[name][:, :, : old.shape[2]], old), name
        before = now


def test_bookkeeping_over_a_thousand_steps() -> None:
    q, k, v = draw(1000, dtype=torch.float32)
    layer = cache(residual=32, group=8)
    layer.attend(q[:, :, :75], k[:, :, :75], v[:, :, :75], step(1, 0, 75))
    for n in range(76, 1001):
        at = slice(n - 1, n)
        layer.attend(q[:, :, at], k[:, :, at], v[:, :, at], step(1, n - 1, 1))
        (length,), (keys,), (values,) = layer.length, layer.key_done, layer.value_done
        assert length == layer.seen == layer.kept() == n
        assert keys % 32 == 0 and keys == n - n % 32, "keys leave the residual 32 at a time"
        assert values == n - 32, "values leave it one by one"
        assert layer.key_tail is not None and layer.value_tail is not None
        assert layer.key_tail.shape[2] == layer.value_tail.shape[2] == 32


@pytest.mark.parametrize("n", [5, 8, 9, 23, 24, 25])
def test_decoding_is_attention_over_the_dequantised_cache(n: int) -> None:
    """One softmax over quantised part and residual = exact attention over the concatenation (float64)."""
    q, k, v = draw(n + 30, b=2, seed=3)
    layer = cache()
    feed(layer, (q, k, v), [n])
    for t in range(n, n + 30):
        keys, values, _ = layer.read()
        at = slice(t, t + 1)
        want = attend(q[:, :, at], torch.cat((keys, k[:, :, at]), 2), torch.cat((values, v[:, :, at]), 2)).out
        got = layer.attend(q[:, :, at], k[:, :, at], v[:, :, at], step(2, t, 1))
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_the_definition_of_a_step() -> None:
    """A step reads what the reference says after the tokens before it, plus its own key and value as they are."""
    q, k, v = draw(60, seed=4)
    layer = cache(4, 2)
    feed(layer, (q, k, v), [20])
    got = feed(layer, tuple(x[:, :, 20:] for x in (q, k, v)), [1] * 40)  # type: ignore[arg-type]
    for i, t in enumerate(range(20, 60)):
        old_k, old_v = reference(
            k[:, :, :t], v[:, :, :t], k_bits=4, v_bits=2, group=GROUP, residual=R, stored=torch.float16
        )
        at = slice(t, t + 1)
        want = attend(q[:, :, at], torch.cat((old_k, k[:, :, at]), 2), torch.cat((old_v, v[:, :, at]), 2)).out
        torch.testing.assert_close(got[:, :, i : i + 1], want, rtol=0, atol=1e-12)


def test_a_prompt_attends_to_unquantised_keys_and_values() -> None:
    q, k, v = draw(50, seed=5)
    got = feed(cache(), (q, k, v), [50])
    torch.testing.assert_close(got, attend(q, k, v, causal=True).out, rtol=0, atol=1e-12)


def test_a_later_block_attends_to_what_is_stored_and_to_itself_unquantised() -> None:
    q, k, v = draw(50, b=2, seed=6)
    layer = cache()
    feed(layer, (q, k, v), [33])
    keys, values, _ = layer.read()
    rest = slice(33, 50)
    want = attend(
        q[:, :, rest], torch.cat((keys, k[:, :, rest]), 2), torch.cat((values, v[:, :, rest]), 2), causal=True
    )
    got = layer.attend(q[:, :, rest], k[:, :, rest], v[:, :, rest], step(2, 33, 17))
    torch.testing.assert_close(got, want.out, rtol=0, atol=1e-12)


def test_small_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = draw(90, b=2, seed=7)
    want = feed(cache(), (q, k, v), [60, 1, 1, 20, 8])
    monkeypatch.setattr(packed, "BLOCK_ELEMENTS", 300)
    monkeypatch.setattr(packed, "CHUNK_ELEMENTS", 2000)
    monkeypatch.setattr(packed, "PIECE", 9)
    torch.testing.assert_close(feed(cache(), (q, k, v), [60, 1, 1, 20, 8]), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("setting", [{"residual": 128}, {"k_bits": 16, "v_bits": 16}])
def test_exact_settings(setting: dict[str, int]) -> None:
    q, k, v = draw(60, b=2, seed=8)
    got = feed(cache(**setting), (q, k, v), [30, 1, 1, 1, 12, 15])
    torch.testing.assert_close(got, attend(q, k, v, causal=True).out, rtol=0, atol=1e-12)


# -- batches -----------------------------------------------------------------------------------------------------------


def _padded(lengths: list[int], n: int) -> Tensor:
    padding = torch.ones(len(lengths), n, dtype=torch.bool)
    for row, length in enumerate(lengths):
        padding[row, : n - length] = False
    return padding


@pytest.mark.parametrize("compute", [False, True])
def test_a_padded_row_is_the_row_alone(compute: bool) -> None:
    """Also where NaN-free garbage as large as 1e4 lies in the padding: it never widens a group's range."""
    lengths, n, more = [40, 31, 3], 40, 30
    q, k, v = draw(n + more, b=3, seed=9)
    padding = torch.cat((_padded(lengths, n), torch.ones(3, more, dtype=torch.bool)), 1)
    junk = ~padding[:, None, :, None]
    layer = cache(4, 2)
    run = (lambda *a, **kw: attend(*a, **kw).out) if compute else None

    def go(layer: PackedCache, tensors: list[Tensor], padding: Tensor | None, n: int) -> Tensor:
        outs = []
        for size in [n, *([1] * 20), 3, 7]:
            at = slice(layer.seen, layer.seen + size)
            one = step(tensors[0].shape[0], layer.seen, size, padding, compute=run)
            outs.append(layer.attend(*(x[:, :, at] for x in tensors), one))
        return torch.cat(outs, 2)

    got = go(layer, [x.masked_fill(junk, 1e4) for x in (q, k, v)], padding, n)
    assert layer.length == [70, 61, 33]
    for row, length in enumerate(lengths):
        alone = cache(4, 2)
        want = go(alone, [x[row : row + 1, :, n - length :] for x in (q, k, v)], None, length)
        torch.testing.assert_close(got[row : row + 1, :, n - length :], want, rtol=0, atol=1e-12)
        keys, values, holds = layer.read()
        assert holds is not None and int(holds[row].sum()) == length + more
        want_k, want_v, _ = alone.read()
        torch.testing.assert_close(keys[row : row + 1, :, : length + more], want_k, rtol=0, atol=1e-12)
        torch.testing.assert_close(values[row : row + 1, :, : length + more], want_v, rtol=0, atol=1e-12)


def test_padding_in_the_middle_is_not_stored() -> None:
    q, k, v = draw(30, b=2, seed=10)
    padding = torch.ones(2, 30, dtype=torch.bool)
    padding[0, 10:14] = False
    padding[1, 20:22] = False
    layer = cache(8, 8)
    got = feed(layer, (q, k, v), [16, 10, 4], padding)
    assert layer.length == [26, 28] and layer.positions()[:, 0].amax(-1).tolist() == [25, 27]
    for row in range(2):
        real = padding[row]
        alone, mine = cache(8, 8), tuple(x[row : row + 1][:, :, real] for x in (q, k, v))
        cuts = [int(real[a:b].sum()) for a, b in ((0, 16), (16, 26), (26, 30))]
        want = feed(alone, mine, cuts)  # type: ignore[arg-type]
        torch.testing.assert_close(got[row : row + 1][:, :, real], want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("lengths", [[30, 30, 30], [30, 19, 26]])
def test_beams_reorder_everything(lengths: list[int]) -> None:
    q, k, v = draw(60, b=3, seed=11)
    padding = torch.cat((_padded(lengths, 30), torch.ones(3, 30, dtype=torch.bool)), 1)
    rows = torch.tensor([2, 0, 0, 1])
    a, b = cache(), cache()
    feed(a, (q, k, v), [30, 1, 1], padding)
    a.select(rows)
    q, k, v = (x[rows] for x in (q, k, v))
    feed(b, (q, k, v), [30, 1, 1], padding[rows])
    rest = tuple(x[:, :, 32:] for x in (q, k, v))
    got, want = (feed(layer, rest, [1] * 20, padding[rows]) for layer in (a, b))  # type: ignore[arg-type]
    torch.testing.assert_close(got, want, rtol=0, atol=0)


# -- taking tokens back --------------------------------------------------------------------------------------------------


def test_crop_inside_the_residual() -> None:
    qkv_, layer = draw(60, b=2, seed=12), cache()
    feed(layer, qkv_, [30])  # 24 keys and 22 values are quantised
    before = layer.tensors()
    layer.crop(4)
    assert layer.seen == 26 and layer.length == [26, 26]
    for name in ("keys.codes", "values.codes", "keys.scale", "values.zero"):
        assert torch.equal(layer.tensors()[name], before[name])
    keys, values, _ = layer.read()
    assert torch.equal(keys[:, :, 24:], qkv_[1][:, :, 24:26]) and torch.equal(values[:, :, 22:], qkv_[2][:, :, 22:26])
    feed(layer, tuple(x[:, :, 26:] for x in qkv_), [4])  # type: ignore[arg-type]
    assert all(torch.equal(x, before[name]) for name, x in layer.tensors().items())


def test_deeper_crops_are_refused_and_change_nothing() -> None:
    qkv_, layer = draw(30), cache()
    feed(layer, qkv_, [30])
    before = layer.tensors()
    with pytest.raises(StateError, match="quantised already"):
        layer.crop(7)  # 6 keys are in the residual
    with pytest.raises(StateError, match="cannot forget"):
        layer.crop(31)
    assert all(torch.equal(x, before[name]) for name, x in layer.tensors().items())


@pytest.mark.parametrize("padded", [False, True])
def test_a_provisional_block_can_be_taken_back_exactly(padded: bool) -> None:
    """Over every flush: blocks of 5 candidates of which 0 to 5 are kept = plain decoding of the kept ones."""
    q, k, v = draw(200, b=2, seed=13)
    padding = torch.ones(2, 200, dtype=torch.bool)
    if padded:
        padding[1, :9] = False
    wrong = draw(200, b=2, seed=14)
    spec, plain = cache(4, 2), cache(4, 2)
    spec.announce(20)
    spec.record()
    assert torch.equal(
        spec.attend(q[:, :, :20], k[:, :, :20], v[:, :, :20], step(2, 0, 20, padding)),
        plain.attend(q[:, :, :20], k[:, :, :20], v[:, :, :20], step(2, 0, 20, padding)),
    )
    t, turn = 20, 0
    while t < 150:
        keep = turn % 6
        block = [
            torch.cat((x[:, :, t : t + keep], y[:, :, t + keep : t + 5]), 2)
            for x, y in zip((q, k, v), wrong, strict=True)
        ]
        got = spec.attend(*block, step(2, t, 5, padding))
        spec.crop(5 - keep)
        want = feed(plain, (q[:, :, t:], k[:, :, t:], v[:, :, t:]), [1] * keep, padding) if keep else got[:, :, :0]
        assert torch.equal(got[:, :, :keep], want), t
        t, turn = t + keep, turn + 1
        assert spec.counters() == plain.counters()
        (*mine, holds), (*theirs, _) = spec.read(), plain.read()
        inside = torch.ones(1) if holds is None else holds[:, None, :, None]  # beyond a row's end lies anything
        assert all(torch.equal(x * inside, y * inside) for x, y in zip(mine, theirs, strict=True))


def test_a_crop_beyond_the_provisional_block_goes_on_into_the_residual() -> None:
    qkv_, layer = draw(60), cache()
    layer.record()
    feed(layer, qkv_, [20])
    layer.crop(0)  # settled: from here on only the residual can be cropped
    feed(layer, tuple(x[:, :, 20:] for x in qkv_), [5])  # type: ignore[arg-type]
    with pytest.raises(StateError):
        layer.crop(12)  # 7 behind the block, 4 keys are there
    assert layer.seen == 25
    layer.crop(7)
    assert layer.seen == 18 and layer.key_done == [16]


def test_everything_since_the_last_crop_can_be_taken_back() -> None:
    """Several blocks and the prompt: an assistant drafts one token at a time and goes back over all of them."""
    qkv_, layer, plain = draw(60), cache(), cache()
    layer.record()
    feed(layer, qkv_, [30, 1, 1, 1, 1, 1, 4])
    layer.crop(10)  # all the steps and the last token of the prompt
    assert layer.seen == 29 and layer.key_done == [24] and layer.value_done == [21]
    feed(plain, qkv_, [29])
    rest = tuple(x[:, :, 29:] for x in qkv_)
    assert torch.equal(feed(layer, rest, [1] * 20), feed(plain, rest, [1] * 20))  # type: ignore[arg-type]


def test_a_recording_that_is_never_cropped_settles_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "MOST", 10)
    qkv_, layer = draw(60), cache()
    layer.record()
    feed(layer, qkv_, [20, *([1] * 40)])
    assert layer.unsettled <= 11
    layer.announce(70)  # a generation begins: settled, and no longer recording
    assert layer.unsettled == 0 and not layer.recording


# -- the rest of the contract --------------------------------------------------------------------------------------------


def test_tensors_restore_reset_and_copies() -> None:
    qkv_ = draw(60, b=2, seed=15)
    padding = torch.cat((_padded([25, 30], 30), torch.ones(2, 30, dtype=torch.bool)), 1)
    a = cache()
    feed(a, qkv_, [30, 1, 1], padding)
    b, c, held = cache(), copy.deepcopy(a), a.tensors()
    b.restore(held)
    rest = tuple(x[:, :, 32:] for x in qkv_)
    want = feed(a, rest, [1] * 20, padding)  # type: ignore[arg-type]
    for other in (b, c):
        assert torch.equal(feed(other, rest, [1] * 20, padding), want)  # type: ignore[arg-type]
    b.restore(held)
    assert b.seen == 32
    b.reset()
    assert b.bytes() == 0 and b.kept() == 0 and b.tensors() == {}
    with pytest.raises(StateError, match="empty"):
        b.positions()
    with pytest.raises(StateError, match="empty"):
        b.read()
    torch.testing.assert_close(feed(b, qkv_, [5]), feed(cache(), qkv_, [5]), rtol=0, atol=0)


@pytest.mark.parametrize(("bits", "most"), [(4, 0.34), (2, 0.21)])
def test_bytes_at_8k(bits: int, most: float) -> None:
    """SmolLM2's shape, bfloat16, after a prompt and as many steps as it takes to see every slack; residual included."""
    method = qkv.method("kivi", bits=bits)
    layer = method.layer(Geometry(9, 3, 64, 64))
    prompt, worst = 8000, 0.0
    k, v = (torch.randn(1, 3, prompt, 64, dtype=torch.bfloat16) for _ in range(2))
    layer._begin(k, v)
    layer._columns(prompt, None)
    layer._append(k, v, [prompt])  # the attention of a long prompt is not what is measured here
    for t in range(prompt, 8192 + 128):
        layer._columns(1, None)
        layer._append(k[:, :, :1], v[:, :, :1], [1])
        if t + 1 >= 8192:
            worst = max(worst, layer.bytes() / (2 * (t + 1) * 3 * 64 * 2))
    assert (bits + 1) / 16 < worst <= most, worst  # codes, and a 16-bit scale and zero for 32 elements


def test_bytes_match_the_formula() -> None:
    q, k, v = draw(40, dtype=torch.float32)
    for bits in (2, 4, 8):
        layer = cache(bits, bits)
        feed(layer, (q, k, v), [40])  # 40 keys and 32 values quantised, room for 8 each in the residual
        keys = G * D * (40 // GROUP) * (4 * -(-GROUP * bits // 32) + 4)
        values = G * 32 * (4 * -(-D * bits // 32) + 4 * D // GROUP)
        assert layer.bytes() == keys + values + 2 * G * R * D * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision(dtype: torch.dtype) -> None:
    """Sums run in float32: the error against float64 is no more than twice that of exact attention in this dtype."""
    q, k, v = draw(64, b=2, seed=16, dtype=dtype)
    layer = cache(16, 16)
    got = feed(layer, (q, k, v), [40, *([1] * 24)])
    want = attend(q.double(), k.double(), v.double(), causal=True).out
    plain = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), is_causal=True
    )
    assert got.dtype == dtype
    assert (got - want).abs().max() <= 2 * (plain - want).abs().max()
    low = feed(cache(4, 4), (q, k, v), [40, *([1] * 24)])
    wide = feed(cache(4, 4), tuple(x.float() for x in (q, k, v)), [40, *([1] * 24)])  # type: ignore[arg-type]
    assert (low.float() - wide).abs().max() < 8 * torch.finfo(dtype).eps * wide.abs().max()


def test_gradients_flow_through_the_first_block() -> None:
    q, k, v = (x.requires_grad_() for x in draw(20, seed=17))
    out = cache().attend(q, k, v, step(1, 0, 20))
    out.square().sum().backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in (q, k, v))


def test_a_custom_mask_is_obeyed_or_refused() -> None:
    q, k, v = draw(40, seed=18)
    mask = causal_mask(40, 40, q.device)
    mask[:, 3:6] = False
    mask[3:6, 3:6] = torch.eye(3, dtype=torch.bool)
    layer = cache(16, 16)
    outs = [
        layer.attend(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], step(1, a, b - a, mask=mask[None, None, a:b, :b]))
        for a, b in ((0, 20), (20, 33), (33, 34), (34, 40))
    ]
    torch.testing.assert_close(torch.cat(outs, 2), attend(q, k, v, mask=mask).out, rtol=0, atol=1e-12)
    padding = _padded([30, 40], 40)
    q, k, v = draw(41, b=2)
    layer = cache()
    feed(layer, (q, k, v), [40], padding)
    with pytest.raises(Refused, match="2-D"):
        layer.attend(q[:, :, :1], k[:, :, :1], v[:, :, :1], step(2, 40, 1, mask=mask[None, None, :1]))


# -- the method -----------------------------------------------------------------------------------------------------------


def test_parameters() -> None:
    m = qkv.method("kivi")
    assert m.settings() == {"bits": 2, "k_bits": None, "v_bits": None, "group": 32, "residual": 128}
    for setting, bits in (
        ("kivi", (2, 2)),
        ("kivi:bits=4", (4, 4)),
        ("kivi:k_bits=4", (4, 2)),
        ("kivi:bits=8,v_bits=2", (8, 2)),
    ):
        layer = qkv.method(setting).layer(Geometry(9, 3, 64, 64))  # type: ignore[attr-defined]
        assert (layer.k_bits, layer.v_bits) == bits
    assert qkv.method("kivi:bits=4").replace(bits=8) == qkv.method("kivi", bits=8)
    for bad in ({"bits": 3}, {"k_bits": 1}, {"v_bits": 5}, {"group": 0}, {"residual": 0}, {"residual": 100}):
        with pytest.raises(InvalidParameter):
            qkv.method("kivi", **bad)
    with pytest.raises(Refused, match="do not divide a head width of 48"):
        qkv.method("kivi").layer(Geometry(6, 3, 48, 48))


def _fake(x: Tensor, bits: int, axis: str) -> Tensor:
    if axis == "channel":
        return dequantize_per_channel_tokens(*quantize_per_channel_tokens(x, bits, 32))
    return dequantize_per_token_channels(*quantize_per_token_channels(x, bits, 32))


def test_negative_control_the_other_way_round_is_worse() -> None:
    """Keys with outlier channels (a fixed offset and a larger spread in a few), values without."""
    gen = torch.Generator().manual_seed(19)
    q, k, v = (torch.randn(1, 2, 256, 64, generator=gen, dtype=torch.float64) for _ in range(3))
    outlier = torch.zeros(64, dtype=torch.float64)
    outlier[[5, 37]] = 12.0
    k = k + outlier + k * (outlier > 0) * 2
    want = attend(q, k, v, causal=True).out

    def error(key_axis: str, value_axis: str) -> float:
        got = attend(q, _fake(k, 2, key_axis), _fake(v, 2, value_axis), causal=True).out
        return float((got - want).norm() / want.norm())

    kivi = error("channel", "token")
    assert error("token", "token") > 1.5 * kivi
    assert error("token", "channel") > 1.5 * kivi
    keys = {axis: float((_fake(k, 2, axis) - k).norm()) for axis in ("channel", "token")}
    assert keys["token"] > 2 * keys["channel"]
