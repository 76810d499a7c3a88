"""What only a CUDA device can show: captured decoding steps give the tokens of plain ones."""

from __future__ import annotations

import pytest
import torch

import models
import qkv
from qkv.core import registry
from qkv.core.attend import attend, sdpa
from qkv.core.errors import Refused

pytestmark = pytest.mark.gpu
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
METHODS = [
    "full", "window:budget=9", "streamingllm:sinks=2,window=7", "streamingllm:sinks=2,window=7,positions=original",
    "h2o:budget=9", "h2o:budget=0.4", "tova:budget=9", "knorm:budget=9", "snapkv:budget=9,window=4,kernel=3",
    "snapkv:budget=9,window=4,kernel=3,decode=evict", "lazyeviction:budget=9,window=4,sinks=2", "kvcrush:budget=9",
    "kivi:bits=4,group=8,residual=16", "zipcache:regroup_every=16", "zipvl:regroup_every=16",
    "evict-pack:policy=knorm,budget=9,regroup_every=16",
]  # fmt: skip
OTHERS = [s.id for s in registry.methods(kind="cache") if s.id not in {m.split(":")[0] for m in METHODS}]


def made(method: str):
    """The setting, or the method at its first trial and at the size where it acts on small inputs."""
    if method not in OTHERS:
        return method
    cls = registry.config_class(method)
    return cls.create(**(dict((cls.spec.trials or ({},))[0]) | cls.spec.small))


def test_graphs_are_refused_without_a_device() -> None:
    with pytest.raises(Refused, match="CUDA"):
        qkv.apply(models.make("llama"), "full", graph=True)


@cuda
@pytest.mark.parametrize("method", [*METHODS, *OTHERS])
@pytest.mark.parametrize("way", ["greedy", "padded", "beams", "sampled"])
def test_a_captured_step_is_the_plain_step(method: str, way: str) -> None:
    model, x = models.make("llama", torch.float32).cuda(), models.inputs("llama", rows=2)
    ids, mask = x["input_ids"].cuda(), x["attention_mask"].cuda()
    if way != "padded":
        ids, mask = ids[1:], mask[1:]
    more = {"beams": {"num_beams": 3}, "sampled": {"do_sample": True}}.get(way, {})

    def tokens(graph: bool) -> tuple[torch.Tensor, int]:
        with qkv.applied(model, made(method), graph=graph):
            torch.manual_seed(0)
            settings = dict(max_new_tokens=40, pad_token_id=0, eos_token_id=None, do_sample=False) | more
            out = model.generate(ids, attention_mask=mask, **settings)
            return out, model.__dict__["_qkv"].graph.replays if graph else 0

    plain, _ = tokens(False)
    captured, replays = tokens(True)
    assert torch.equal(plain, captured)
    assert replays >= 20 or method in OTHERS, f"only {replays} of 39 steps were replayed"


@cuda
def test_what_a_graph_cannot_serve_is_refused_or_runs_plainly() -> None:
    model = models.make("gemma3", torch.float32).cuda()
    with pytest.raises(Refused, match="not static"):
        qkv.apply(model, "full", graph=True)
    model = models.make("llama", torch.float32).cuda()
    ids = models.inputs("llama")["input_ids"][1:].cuda()
    before = set(model.__dict__)
    with qkv.applied(model, "full", graph=True), torch.no_grad():
        out = model(ids)
        seen = model(ids[:, :1], past_key_values=out.past_key_values, output_hidden_states=True)
        assert seen.hidden_states is not None and model.__dict__["_qkv"].graph.replays == 0
    assert set(model.__dict__) == before


@cuda
@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("keys", [300, 512])
def test_a_later_block_is_causal_to_the_lower_right(kv_heads: int, keys: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 8, 130, 64, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(2, kv_heads, keys, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    want = attend(q.double(), k.double(), v.double(), causal=True).out
    got = sdpa(q, k, v, causal=True).double()
    assert (got - want).norm() < 5e-3 * want.norm()
