"""EcoFormer from a pretrained vision transformer of transformers: what each step computes, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qkv.core.errors import InvalidInput, InvalidParameter, Refused
from qkv.models.vision.ecoformer import exchanged, fit, hashed, shared
from qkv.ops.ecoformer import hash_codes

transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)
SHAPE: dict[str, Any] = {
    "image_size": 24, "patch_size": 4, "num_channels": 1, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
    "intermediate_size": 24, "num_labels": 5,
}  # fmt: skip
SMALL: dict[str, Any] = {"bits": 5, "anchors": 8}


def vit(name: str = "ViT", **more: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SHAPE | more)
    return getattr(transformers, f"{name}ForImageClassification")(config).double().eval()


def images(count: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(count, 1, 24, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", ["ViT", "Dinov2"])
def test_a_model_whose_queries_are_its_keys_does_not_change_under_softmax(name: str) -> None:
    net, x = vit(name), images()
    if not any(hasattr(m, "q_proj") for m in net.modules()):
        pytest.skip(f"this version of transformers names the projections of {name} otherwise")
    for part in (m for m in net.modules() if hasattr(m, "q_proj")):
        part.q_proj.load_state_dict(part.k_proj.state_dict())
    want = net(x).logits
    got = shared(net, **SMALL)(x).logits
    assert len(exchanged(net)) == 2
    assert torch.allclose(got, want, rtol=1e-9, atol=1e-11)


def test_other_queries_are_lost_and_the_last_layer_is_not_touched() -> None:
    net, x = vit(), images()
    want, last = net(x).logits, net.vit.layers[2].attention if hasattr(net.vit, "layers") else None
    assert not torch.allclose(shared(net, **SMALL)(x).logits, want, rtol=0, atol=1e-6)
    assert last is None or net.vit.layers[2].attention is last


def test_a_fit_learns_every_layer_on_what_reaches_it() -> None:
    net, x = shared(vit(), keep=1, tie="mean", **SMALL), images()
    soft = net(x).logits
    fit(net, pixel_values=x, steps=4, generator=torch.Generator().manual_seed(0))
    first, second = exchanged(net)
    assert first.hashed and second.hashed and not net.training
    got = net(x).logits
    assert not torch.allclose(got, soft, rtol=0, atol=1e-9) and bool(torch.isfinite(got).all())
    seen = {}
    with first.register_forward_pre_hook(lambda layer, args: seen.update(x=args[0])) as _:
        net(x)
    q = first._heads(first.qk(seen["x"]))
    assert torch.equal(hash_codes(q, *first.hash.hash), first.hash.codes(q))
    before = second.hash.planes.clone()
    fit(net, pixel_values=images(seed=1), steps=4, rate=5.0)  # next epoch: goes on from here
    assert not torch.equal(second.hash.planes, before)


def test_it_trains_and_travels_as_weights() -> None:
    net, x = shared(vit(), **SMALL), images()
    fit(net, pixel_values=x, steps=2)
    net.train()(x, labels=torch.tensor([0, 1, 2, 3])).loss.backward()
    for layer in exchanged(net):
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in layer.parameters())
        assert layer.qk.weight.grad is not None and bool(layer.qk.weight.grad.any())
    soft = hashed(net.eval(), False)(x).logits
    assert not torch.equal(soft, hashed(net)(x).logits)
    again = shared(vit(), **SMALL)
    again.load_state_dict(net.state_dict())
    assert torch.equal(hashed(again)(x).logits, net.eval()(x).logits)


def test_what_is_refused() -> None:
    x = images()
    with pytest.raises(InvalidInput, match="Linear has the projections"):
        shared(torch.nn.Linear(2, 2))
    with pytest.raises(InvalidInput, match="call shared"):
        fit(vit(), pixel_values=x)
    for keep in (-1, 3, True, 1.0):
        with pytest.raises(InvalidParameter, match="from 0 to 2"):
            shared(vit(), keep=keep)  # type: ignore[arg-type]
    with pytest.raises(InvalidParameter, match="tie='both'"):
        shared(vit(), tie="both")  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="biases in some"):
        shared(vit(qkv_bias=False))
    config = transformers.LlamaConfig(vocab_size=7, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
                                      num_attention_heads=2)  # fmt: skip
    with pytest.raises(InvalidInput, match=r"no module|causal"):
        shared(transformers.LlamaForCausalLM(config))
    net = shared(vit(), **SMALL)
    with pytest.raises(InvalidInput, match="exchanged before"):
        shared(net)
    with pytest.raises(InvalidParameter, match="anchors"):
        fit(shared(vit(), anchors=99), pixel_values=x)
    with pytest.raises(Refused, match="not been fitted"):
        hashed(net)
    with pytest.raises(Refused, match="mask"):
        next(m for m in net.modules() if hasattr(m, "eco"))(torch.zeros(1, 37, 16), torch.ones(1, 37))
