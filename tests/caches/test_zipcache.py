"""ZipCache: the oracles of its page, and the store of mixed precision behind it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import qkv
from qkv.caches._saliency import probe_mass, probe_rows, seen_by
from qkv.caches._stores import codecs, parts
from qkv.caches._stores.codecs import (
    channel_dequantize,
    cst_channel,
    cst_dequantize,
    pack_flags,
    quantize_per_token_channels,
    unpack_flags,
)
from qkv.caches._stores.mixed import Block, MixedCache, Splits
from qkv.caches.zipcache import ZipCache, channel_quantize, cst_quantize, normalized_saliency, reference
from qkv.core.attend import attend
from qkv.core.cache import Geometry, Step
from qkv.core.errors import InvalidInput, InvalidParameter, Refused, StateError

H, G, D = 6, 3, 8
EVERY = 10


def cache(**parameters: Any) -> MixedCache:
    layer = ZipCache(**{"regroup_every": EVERY, "probe_ratio": 0.4} | parameters).layer(Geometry(H, G, D, D))
    assert isinstance(layer, MixedCache)
    return layer


def draw(n: int, b: int = 1, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(b, h, n, D, generator=gen, dtype=torch.float64).to(dtype) for h in (H, G, G))
    return q, k, v


def step(b: int, seen: int, n: int, **more: Any) -> Step:
    return Step(torch.arange(seen, seen + n, dtype=torch.int32).expand(b, n), D**-0.5, **more)


def feed(layer: MixedCache, tokens: tuple[Tensor, Tensor, Tensor], cuts: list[int], **more: Any) -> Tensor:
    outs = []
    for n in cuts:
        q, k, v = (x[:, :, layer.seen : layer.seen + n] for x in tokens)
        outs.append(layer.attend(q, k, v, step(q.shape[0], layer.seen, n, **more)))
    return torch.cat(outs, 2)


# -- quantisers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_error_is_at_most_half_a_step_and_the_ends_are_exact(bits: int) -> None:
    x = draw(19, b=2)[1]
    codes, s, z = channel_quantize(x, bits)
    y = channel_dequantize(codes, s, z)
    assert s.shape == z.shape == (2, G, D) and int(codes.max()) < 2**bits
    assert ((x - y).abs() <= s.unsqueeze(-2) / 2 + 1e-12).all()
    for end in (torch.amin, torch.amax):
        torch.testing.assert_close(end(y, 2), end(x, 2), rtol=0, atol=1e-12)
    codes, s, z, c = cst_quantize(x, bits)
    y = cst_dequantize(codes, s, z, c)
    assert s.shape == z.shape == (2, 19) and c.shape == (2, G, D)
    assert ((x - y).abs() <= (s[:, None, :, None] / 2 + 1e-12) * c.unsqueeze(-2)).all()
    for end in (torch.amin, torch.amax):
        torch.testing.assert_close(
            end(y / c.unsqueeze(-2), (1, 3)), end(x / c.unsqueeze(-2), (1, 3)), rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_lies_on_the_grid_is_lossless(bits: int) -> None:
    x = torch.randint(0, 2**bits, (2, 3, 11, 8), generator=torch.Generator().manual_seed(bits)).double()
    x[:, :, 0], x[:, :, 1] = 0, 2**bits - 1
    assert torch.equal(channel_dequantize(*channel_quantize(x * 0.5 - 1, bits, torch.float16)).double(), x * 0.5 - 1)
    x = torch.cat(
        (x, torch.zeros_like(x[..., :1]), torch.full_like(x[..., :1], 2**bits - 1)), -1
    )  # every token spans it
    ones = torch.ones(2, 3, 10, dtype=torch.float64)
    assert torch.equal(cst_dequantize(*cst_quantize(x, bits, channel=ones)), x)


def test_flat_and_zero_channels() -> None:
    x = torch.full((1, 2, 5, 4), 7.25)
    codes, s, z = channel_quantize(x, 2, torch.float16)
    assert (codes == 0).all() and (s == 1).all() and (z == 7.25).all()
    assert (cst_channel(torch.zeros(1, 2, 5, 4)) == 1).all()
    codes, s, z, c = cst_quantize(torch.zeros(1, 2, 5, 4), 4, torch.float16)
    assert (cst_dequantize(codes, s, z, c) == 0).all()
    codes, s, z = channel_quantize(torch.tensor([[-1e6], [1e6]]), 2, torch.float16)
    assert torch.isfinite(channel_dequantize(codes, s.float(), z.float())).all()


def test_without_divisors_it_is_token_wise() -> None:
    x = draw(7, b=2)[2]
    codes, s, z, _ = cst_quantize(x, 4, channel=torch.ones(2, G, D, dtype=torch.float64))
    other, scale, zero = quantize_per_token_channels(
        x.transpose(1, 2).flatten(2), 4, G * D
    )  # one group: the whole token
    assert torch.equal(codes.transpose(1, 2).flatten(2), other[:, :, 0])
    assert torch.equal(s, scale[..., 0]) and torch.equal(z, zero[..., 0])


def test_one_large_channel_spoils_token_wise_but_not_separable_channels() -> None:
    x = draw(64, seed=3)[2]
    x[..., 5] *= 50
    rest = [i for i in range(D) if i != 5]
    ones = torch.ones(1, G, D, dtype=torch.float64)
    errors = [(cst_dequantize(*cst_quantize(x, 4, channel=c)) - x)[..., rest].norm() for c in (None, ones)]
    assert errors[0] < 0.5 * errors[1]


def test_flags_round_trip() -> None:
    for n in (1, 7, 8, 9, 100):
        flags = torch.rand(2, 3, n, generator=torch.Generator().manual_seed(n)) < 0.4
        packed = pack_flags(flags)
        assert packed.dtype == torch.uint8 and packed.shape == (2, 3, -(-n // 8))
        assert torch.equal(unpack_flags(packed, n), flags)


def test_quantisers_refuse() -> None:
    with pytest.raises(InvalidParameter, match="2, 4 or 8"):
        channel_quantize(torch.randn(4, 4), 3)
    with pytest.raises(InvalidInput, match=r"\[B, G, T, E\]"):
        cst_quantize(torch.randn(4, 4), 4)
    with pytest.raises(InvalidInput, match="floating-point"):
        channel_quantize(torch.zeros(4, 4, dtype=torch.int64), 4)


# -- saliency ----------------------------------------------------------------------------------------------------------


def test_all_rows_as_probes_give_the_exact_column_sum() -> None:
    q, k, _ = draw(23, b=2)
    mass = attend(q, k, k, causal=True, mass=True).mass
    assert mass is not None
    want = mass.view(2, G, H // G, 23).sum(2) / (23 - torch.arange(23))
    torch.testing.assert_close(normalized_saliency(q, k, torch.arange(23)), want, rtol=0, atol=1e-12)


def test_each_probe_row_sees_only_its_past(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = draw(17)
    at = torch.tensor([0, 3, 8, 15])
    got = probe_mass(q[:, :, at], k, at, scale=0.3)
    rows = [
        attend(q[:, :, i : i + 1], k[:, :, : i + 1], k[:, :, : i + 1], scale=0.3, mass=True).mass for i in at.tolist()
    ]
    want = sum(torch.nn.functional.pad(x, (0, 17 - x.shape[-1])) for x in rows if x is not None)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert seen_by(at, 17).tolist() == [4, 3, 3, 3, 2, 2, 2, 2, 2, *[1] * 8]  # 16 is seen by none: at least 1
    monkeypatch.setattr("qkv.caches._saliency.CHUNK_ELEMENTS", 10)
    torch.testing.assert_close(probe_mass(q[:, :, at], k, at, scale=0.3), want, rtol=0, atol=1e-12)
    with pytest.raises(InvalidInput, match="probe rows"):
        normalized_saliency(q[:, :, at], k, at[:2])


def test_uniform_attention_in_closed_form() -> None:
    """A[p, m] = 1 / (p + 1): the sum is H_N - H_m, strictly falling; the score divides by N - m and is flatter."""
    n = 40
    q, k = torch.zeros(1, H, n, D, dtype=torch.float64), draw(n)[1]
    harmonic = (1 / torch.arange(1, n + 1, dtype=torch.float64)).flip(0).cumsum(0).flip(0)  # sum_{p >= m} 1 / (p + 1)
    raw = normalized_saliency(q, k, torch.arange(n), normalize=False)[0, 0] / (H // G)
    score = normalized_saliency(q, k, torch.arange(n))[0, 0] / (H // G)
    torch.testing.assert_close(raw, harmonic, rtol=0, atol=1e-12)
    torch.testing.assert_close(score, harmonic / (n - torch.arange(n)), rtol=0, atol=1e-12)
    assert (raw.diff() < 0).all() and raw[0] / raw[-1] > 20 * score[0] / score[-1]


def test_probe_rows() -> None:
    rows = probe_rows(0, 100, 5, 5, 0)
    assert rows == sorted(set(rows)) and rows[5:] == [95, 96, 97, 98, 99] and len(rows) == 10
    assert rows == probe_rows(0, 100, 5, 5, 0) != probe_rows(0, 100, 5, 5, 1)
    assert probe_rows(7, 10, 5, 5, 0) == [7, 8, 9] and probe_rows(0, 6, 3, 3, 4) == [0, 1, 2, 3, 4, 5]
    assert (
        ZipCache().probes_of(100, True) == (5, 5)
        and ZipCache().probes_of(1, False) == (1, 0)
        and ZipCache(probe_ratio=1.0).probes_of(9, True) == (5, 4)
    )


# -- the store ----------------------------------------------------------------------------------------------------------


def _score(layer: MixedCache, q: Tensor, k: Tensor, n: int) -> Tensor:
    at = torch.tensor(probe_rows(0, n, *layer.method.probes_of(n, False), layer.probes.seed))
    return normalized_saliency(q[:, :, at], k[:, :, :n], at)


@pytest.mark.parametrize("bits", [(4, 2), (8, 2), (2, 4), (16, 2)])
@pytest.mark.parametrize("n", [10, 37])
def test_a_prompt_is_stored_as_the_reference_says(
    bits: tuple[int, int], n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = draw(n, seed=n)
    score = _score(cache(), q, k, n)
    want = reference(k, v, score, bits=bits, salient=int(0.6 * n + 0.5), stored=torch.float16)
    for piece in (codecs.PIECE, 5):
        monkeypatch.setattr(parts, "PIECE", piece)
        layer = cache(bits=bits)
        feed(layer, (q, k, v), [n])
        for got, x in zip(layer.read(), want, strict=True):
            torch.testing.assert_close(got, x, rtol=0, atol=1e-12)
        assert layer.precise() == [int(0.6 * n + 0.5)] and layer.waiting == [0]


def test_decoded_tokens_become_blocks_and_codes_never_change() -> None:
    tokens, layer, before = draw(60, b=2, seed=1), cache(), {}
    feed(layer, tokens, [13])
    for t in range(13, 60):
        feed(layer, tokens, [1])
        now = layer.tensors()
        for name, old in before.items():
            assert torch.equal(now[name][:, :, : old.shape[2]], old), name
        before = {
            k: x
            for k, x in now.items()
            if k.startswith("stack") and k.rsplit(".")[-1] not in ("rows", "starts", "shape")
        }
        done = 13 + (t - 12) // EVERY * EVERY
        assert layer.waiting == [t + 1 - done] * 2 and layer.stored == [done] * 2
    assert len(layer.stacks) == 2 and len(layer.stacks[1].starts) == 4  # equal blocks lie together
    assert layer.precise() == [8 + 4 * 6] * 2


def test_decoding_is_attention_over_the_dequantised_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = draw(70, b=2, seed=2)
    outs = []
    for size in (1 << 20, 100):
        monkeypatch.setattr(parts, "BLOCK_ELEMENTS", size)
        layer = cache()
        feed(layer, (q, k, v), [23])
        for t in range(23, 70):
            keys, values = layer.read()
            own, at = slice(keys.shape[2], t + 1), slice(t, t + 1)
            want = attend(q[:, :, at], torch.cat((keys, k[:, :, own]), 2), torch.cat((values, v[:, :, own]), 2)).out
            got = feed(layer, (q, k, v), [1])
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
        outs.append(layer.read())
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


def test_the_saliency_of_decoded_tokens_is_the_attention_they_drew() -> None:
    """From the probes' softmax over everything they saw, which the store kept, not over the block alone."""
    q, k, v = draw(40, seed=4)
    layer, blocks = cache(bits=(16, 2), probe_ratio=0.4), []
    layer.method = _Spy(layer.method, blocks)
    feed(layer, (q, k, v), [20, *[1] * 10])
    at = torch.tensor(layer.probes.plan)
    keys = torch.cat((cache_read(q, k, v), k[:, :, 20:30]), 2)
    logits = (q[:, :, 20 + at].view(1, G, 2, -1, D) * D**-0.5) @ keys.unsqueeze(2).mT
    logits = logits.masked_fill(torch.arange(30) > 20 + at[:, None], -torch.inf)
    want = logits.softmax(-1).sum(-2).view(1, H, 30)[:, :, 20:]
    assert [block.starts for block in blocks] == [[0], [20]] and [block.decoded for block in blocks] == [False, True]
    torch.testing.assert_close(blocks[1].mass, want, rtol=0, atol=1e-12)
    assert torch.equal(blocks[1].seen, seen_by(at, 10))


def cache_read(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    layer = cache(bits=(16, 2))
    feed(layer, (q, k, v), [20])
    return layer.read()[0]


class _Spy:
    def __init__(self, method: Splits, blocks: list[Block]) -> None:
        self.method, self.blocks, self.id = method, blocks, method.id

    def probes_of(self, tokens: int, decoded: bool) -> tuple[int, int]:
        return self.method.probes_of(tokens, decoded)

    def split(self, block: Block) -> tuple[Tensor, list[int]]:
        self.blocks.append(block)
        return self.method.split(block)


@pytest.mark.parametrize("setting", [{"bits": (16, 16)}, {"bits": 16}, {"regroup_every": 1000}])
def test_exact_settings(setting: dict[str, Any]) -> None:
    q, k, v = draw(60, b=2, seed=5)
    got = feed(cache(**setting), (q, k, v), [30, 1, 1, 1, 12, 15])
    torch.testing.assert_close(got, attend(q, k, v, causal=True).out, rtol=0, atol=1e-12)


def test_the_ends_of_the_ratio_are_uniform_bits() -> None:
    tokens = draw(60, b=2, seed=6)
    for ratio, bits in ((1.0, 4), (0.0, 2)):
        ends = [cache(salient_ratio=ratio), cache(bits=bits), cache(bits=(bits, bits), salient_ratio=0.3)]
        a, b, c = (feed(layer, tokens, [40, *[1] * 20]) for layer in ends)
        assert torch.equal(a, b) and torch.equal(a, c)


def test_bytes_match_the_formula() -> None:
    """Codes, of keys 2 ranges per channel and part, of values 2 per token, 1 divisor per channel, 1 bit per token."""
    layer = cache(regroup_every=40)
    feed(layer, draw(80, dtype=torch.float32), [80])
    words = {4: 4, 2: 4}  # bytes of 8 codes: 4 bits fill a word, 2 bits half of it
    codes = 2 * G * (48 * words[4] + 32 * words[2])
    ranges = 2 * 2 * 2 * G * D + 2 * 2 * 80 + 2 * G * D
    assert layer.bytes() == codes + ranges + G * 10
    geometry, n = Geometry(9, 3, 64, 64), 2000
    layer = ZipCache().layer(geometry)
    q, k, v = (torch.randn(1, h, n, 64, dtype=torch.bfloat16) for h in (9, 3, 3))
    layer.attend(q, k, v, step(1, 0, n))
    ideal = 2 * n * 3 * 64 * 3.2 / 8
    assert ideal < layer.bytes() < 1.04 * ideal
    assert layer.bytes() < 0.21 * layer.full_bytes(k, v)


def test_rows_of_different_length_are_the_rows_alone() -> None:
    q, k, v = draw(60, b=3, seed=7)
    padding = torch.ones(3, 60, dtype=torch.bool)
    padding[1, :9], padding[2, :25] = False, False
    q, k, v = (x.masked_fill(~padding[:, None, :, None], 1e4) for x in (q, k, v))
    for compute in (None, lambda *a, **kw: attend(*a, **kw).out):
        layer, outs = cache(), []
        for n in [30, *[1] * 25, 5]:
            at = slice(layer.seen, layer.seen + n)
            position = (padding.int().cumsum(-1) - 1).masked_fill(~padding, -1)[:, at].int()
            one = Step(position, D**-0.5, padding[:, : at.stop], compute=compute)
            outs.append(layer.attend(q[:, :, at], k[:, :, at], v[:, :, at], one))
        got = torch.cat(outs, 2)
        assert layer.length == [60, 51, 35]
        assert ([0, 1] in [stack.rows for stack in layer.stacks]) is (compute is None), (
            "rows in step share their blocks"
        )
        for row, pads in enumerate((0, 9, 25)):
            alone = cache()
            part = tuple(x[row : row + 1, :, pads:] for x in (q, k, v))
            want = feed(alone, part, [30 - pads, *[1] * 25, 5])  # type: ignore[arg-type]
            torch.testing.assert_close(got[row : row + 1, :, pads:], want, rtol=0, atol=1e-9)
            assert alone.read([0])[0].shape == layer.read([row])[0].shape
            torch.testing.assert_close(layer.read([row])[0], alone.read([0])[0], rtol=0, atol=0)
    with pytest.raises(StateError, match="one by one"):
        layer.read()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision(dtype: torch.dtype) -> None:
    """Sums run in float32: the error against float64 is no more than twice that of exact attention in this dtype."""
    q, k, v = draw(64, b=2, seed=8, dtype=dtype)
    got = feed(cache(bits=16), (q, k, v), [40, *[1] * 24])
    want = attend(q.double(), k.double(), v.double(), causal=True).out
    plain = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), is_causal=True
    )
    assert got.dtype == dtype and (got - want).abs().max() <= 2 * (plain - want).abs().max()


def test_gradients_flow_through_the_first_block_and_not_into_codes() -> None:
    q, k, v = (x.requires_grad_() for x in draw(21, seed=9))
    layer = cache()
    layer.attend(q[:, :, :20], k[:, :, :20], v[:, :, :20], step(1, 0, 20)).square().sum().backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in (q, k, v))
    assert not any(x.requires_grad for x in layer.tensors().values())


def test_the_wrong_way_round_is_worse() -> None:
    """Attention that rests on a few tokens: bits for the least salient tokens instead cost more."""
    q, k, v = draw(200, seed=10)
    heavy = torch.randperm(200, generator=torch.Generator().manual_seed(0))[:20]
    k[:, :, heavy] += 3 * torch.randn(1, G, 1, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    q = q + 2 * k[:, :, heavy].mean(2, keepdim=True).repeat_interleave(2, 1)
    want = attend(q, k, v, causal=True).out[:, :, 160:]
    error = {}
    for name, setting in {"right": {"salient_ratio": 0.3}, "wrong": {"salient_ratio": 0.7, "bits": (2, 4)}}.items():
        got = feed(cache(regroup_every=100, probe_ratio=0.1, **setting), (q, k, v), [160, *[1] * 40])[:, :, 160:]
        error[name] = float((got - want).norm() / want.norm())
    assert error["right"] < 0.6 * error["wrong"], error


# -- the method ------------------------------------------------------------------------------------------------------------


def test_parameters() -> None:
    m = qkv.method("zipcache")
    assert m.settings() == {
        "bits": (4, 2), "salient_ratio": 0.6, "probe_ratio": 0.1, "regroup_every": 100, "normalize": True, "seed": 0,
    }  # fmt: skip
    assert qkv.method("zipcache:bits=[8,4]").layer(Geometry(9, 3, 64, 64)).bits == (8, 4)  # type: ignore[attr-defined]
    for bad in (
        {"bits": 3}, {"bits": (4, 3)}, {"bits": (4, 2, 2)}, {"bits": (4,)}, {"salient_ratio": 1.5}, {"salient_ratio": -0.1},
        {"probe_ratio": 0.0}, {"probe_ratio": 2.0}, {"regroup_every": 0}, {"bits": "4"},
    ):  # fmt: skip
        with pytest.raises(InvalidParameter):
            qkv.method("zipcache", **bad)


def test_refusals_store_nothing() -> None:
    q, k, v = draw(12)
    for more, why in (({"mask": torch.ones(1, 1, 12, 12, dtype=torch.bool)}, "2-D"), ({"causal": False}, "causal")):
        layer = cache()
        with pytest.raises(Refused, match=why):
            layer.attend(q, k, v, step(1, 0, 12, **more))
        assert layer.seen == 0 and layer.bytes() == 0
    with pytest.raises(StateError, match="empty"):
        cache().read()
    layer = cache()
    feed(layer, (q, k, v), [12])
    with pytest.raises(StateError, match="recorded"):
        layer.crop(1)
