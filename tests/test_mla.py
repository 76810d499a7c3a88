"""The MLA layer and its latent memory, without a model around them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import qkv
from qkv.caches._stores.latent import LatentCache, absorbed
from qkv.core.attend import attend
from qkv.core.cache import Step
from qkv.core.errors import InvalidInput, InvalidParameter, StateError
from qkv.layers.mla import MLA, MultiHeadLatentAttention, angles, reference, rotate

W, B, T = 11, 2, 13
F64 = torch.float64
SHAPES = [
    MLA(heads=6, kv_heads=3, kv_rank=5, rope_dim=4, nope_dim=7, value_dim=3, norm=False),
    MLA(heads=4, kv_rank=10, rope_dim=2, nope_dim=3, value_dim=6, q_rank=5, norm=True, bias=True),
    MLA(heads=2, kv_heads=1, kv_rank=3, rope_dim=6, nope_dim=0, value_dim=5, norm=True),
]


def layer(method: MLA) -> MultiHeadLatentAttention:
    torch.manual_seed(0)
    out = method.build(W, dtype=F64)
    for p in out.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return out


def hidden(rows: int = B, tokens: int = T, seed: int = 1) -> Tensor:
    return torch.randn(rows, tokens, W, dtype=F64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("method", SHAPES, ids=str)
def test_the_layer_is_its_definition(method: MLA) -> None:
    module, x = layer(method), hidden()
    s, place = module.shape, torch.arange(T).expand(B, T)
    cos, sin = angles(place, module.frequencies, F64)
    q, latent, key = module.project(x, cos, sin)
    up_k, up_v = module._up()
    nope, rope = q.split((s.nope_dim, s.rope_dim), -1)
    want = reference(nope, rope, latent[:, 0], key[:, 0], up_k, up_v, scale=(s.nope_dim + s.rope_dim) ** -0.5)
    torch.testing.assert_close(module(x), module.o_proj(want.transpose(1, 2).flatten(2)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", SHAPES, ids=str)
def test_absorbed_is_expanded(method: MLA) -> None:
    module, x = layer(method), hidden()
    q, latent, key = module.project(x, *angles(torch.arange(T).expand(B, T), module.frequencies, F64))
    keys, values = module.expand(latent, key)
    rows, draw = torch.cat((latent, key), -1), torch.Generator().manual_seed(2)
    dense = torch.rand(B, module.shape.heads, T, T, generator=draw) < 0.7
    for mask in (None, dense[:, :1, :1], dense[:, :1], dense):
        for n in (T, 4, 1):
            part = None if mask is None else mask[:, :, -n:]
            want = attend(q[:, :, -n:], keys, values, mask=part, causal=True, scale=module.scaling).out
            got = absorbed(q[:, :, -n:], rows, latent.shape[-1], module, mask=part, causal=True, scale=module.scaling)
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", SHAPES, ids=str)
@pytest.mark.parametrize("cuts", [[T], [7, 6], [1] * T, [5, 1, 1, 6]], ids=str)
def test_decoding_is_prefill(method: MLA, cuts: list[int]) -> None:
    module, x = layer(method), hidden()
    padding = torch.ones(B, T, dtype=torch.bool)
    padding[0, :4] = False
    for real in (None, padding):
        want, memory, at, outs = module(x, real), module.memory(), 0, []
        for n in cuts:
            outs.append(module(x[:, at : at + n], None if real is None else real[:, : at + n], memory))
            at += n
        got = torch.cat(outs, 1)
        keep = torch.ones_like(padding) if real is None else real
        torch.testing.assert_close(got[keep], want[keep], rtol=0, atol=1e-12)
    alone = module(x[:1, 4:])
    torch.testing.assert_close(module(x, padding)[:1, 4:], alone, rtol=0, atol=1e-12)


def test_positions_are_relative_and_matter() -> None:
    module = layer(SHAPES[0])
    q, k = hidden(1, 2)[:, None, :, :4], hidden(1, 2, 5)[:, None, :, :4]

    def score(a: int, b: int) -> Tensor:
        turned = [rotate(x, *angles(torch.tensor([[p, p]]), module.frequencies, F64)) for x, p in ((q, a), (k, b))]
        return (turned[0] * turned[1]).sum(-1)

    torch.testing.assert_close(score(9, 5), score(4, 0), rtol=0, atol=1e-12)
    assert (score(9, 5) - score(9, 6)).abs().max() > 1e-3


def test_every_weight_learns() -> None:
    for method in SHAPES:
        module = layer(method)
        module(hidden()).square().sum().backward()
        for name, p in module.named_parameters():
            assert p.grad is not None and bool(torch.isfinite(p.grad).all()) and bool((p.grad != 0).any()), name


def filled(seed: int = 1) -> tuple[MultiHeadLatentAttention, LatentCache]:
    module = layer(SHAPES[0])
    memory = module.memory()
    padding = torch.ones(B, T, dtype=torch.bool)
    padding[1, :3] = False
    module(hidden(seed=seed), padding, memory)
    return module, memory


def after(module: MultiHeadLatentAttention, memory: LatentCache) -> Tensor:
    rows = memory.positions().shape[0]
    assert memory.padding is not None
    padding = torch.nn.functional.pad(memory.padding, (0, 2), value=True)
    return module(hidden(1, 2, seed=9).expand(rows, -1, -1), padding, memory)


def test_memory_contract() -> None:
    module, memory = filled()
    assert memory.seen == memory.kept() == T
    assert memory.bytes() == B * T * (5 + 4) * 8
    assert memory.positions().shape == (B, 1, T)
    assert memory.positions()[1, 0, :5].tolist() == [-1, -1, -1, 0, 1]
    saved = {k: v.clone() for k, v in memory.tensors().items()}
    assert {k: tuple(v.shape) for k, v in saved.items()} == {
        "latent": (B, 1, T, 5), "rope": (B, 1, T, 4), "padding": (B, T),
    }  # fmt: skip
    twin, restored = copy.deepcopy(memory), module.memory()
    assert twin.up is module
    restored.restore(saved)
    want = after(module, memory)
    for other in (twin, restored):
        torch.testing.assert_close(after(module, other), want, rtol=0, atol=0)
    memory.crop(2)
    assert memory.seen == T and torch.equal(memory.tensors()["latent"], saved["latent"])
    torch.testing.assert_close(after(module, memory), want, rtol=0, atol=0)
    twin.select(torch.tensor([1, 1, 0]))
    assert twin.tensors()["latent"].shape == (3, 1, T + 2, 5)
    torch.testing.assert_close(twin.positions()[0], twin.positions()[1])
    with pytest.raises(StateError, match="cannot forget 99"):
        memory.crop(99)
    memory.reset()
    assert (memory.seen, memory.bytes(), memory.tensors()) == (0, 0, {})
    with pytest.raises(StateError, match="empty"):
        memory.positions()


def test_the_buffer_grows_by_little_and_never_per_token() -> None:
    module, memory = layer(SHAPES[0]), None
    memory = module.memory()
    x, pointers = hidden(1, 80), set()
    for i in range(80):
        module(x[:, i : i + 1], None, memory)
        assert memory.rows is not None
        pointers.add(memory.rows.data_ptr())
        assert memory.rows.shape[2] <= memory.seen + 32
    assert len(pointers) <= 4


def test_another_attention_gets_expanded_keys() -> None:
    module, memory = filled()
    seen = []

    def compute(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
        seen.append((tuple(q.shape), tuple(k.shape), tuple(v.shape)))
        return attend(q, k, v, mask=mask, causal=causal, scale=scale).out

    q, c, key = module.project(hidden(B, 1, 4), *angles(torch.full((B, 1), T), module.frequencies, F64))
    plain, memory.padding = copy.deepcopy(memory), None
    step = Step(torch.full((B, 1), T), module.scaling)
    got = memory.attend(q, c, key, Step(step.position, step.scale, compute=compute))
    torch.testing.assert_close(got, plain.attend(q, c, key, step), rtol=0, atol=1e-12)
    assert seen == [((B, 6, 1, 11), (B, 3, T + 1, 11), (B, 3, T + 1, 3))]


def test_bad_input_and_sizes() -> None:
    module, memory = filled()
    with pytest.raises(InvalidInput, match="earlier calls had padding"):
        module(hidden(B, 1), None, memory)
    with pytest.raises(InvalidInput, match=r"padding must be bool \[B, M\] = \(2, 13\)"):
        module(hidden(), torch.ones(B, T - 1, dtype=torch.bool))
    with pytest.raises(InvalidParameter, match="must be even"):
        qkv.method("mla:rope_dim=3")
    with pytest.raises(InvalidParameter, match="must divide heads"):
        qkv.method("mla:heads=6,kv_heads=4")
    with pytest.raises(InvalidInput, match="takes 2 frequencies"):
        MultiHeadLatentAttention(module.shape, (1.0,))
