"""Healing: a converted model comes back towards its source; nothing but the converted layers changes; what is saved loads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import qkv
from qkv import hosts
from qkv.core.errors import Refused
from qkv.distill import distill, heal
from qkv.distill.objectives import healing

pytest.importorskip("accelerate")
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 61
QUICK: dict[str, Any] = {"per_device_train_batch_size": 16, "logging_steps": 1, "use_cpu": True, "learning_rate": 1e-3}


def llama(seed: int = 3) -> Any:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, initializer_range=0.2, max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def rows(count: int = 96) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(VOCABULARY, (20,), generator=draw)} for _ in range(count)]


def converted(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """(converted, source)."""
    source = llama().to(dtype)
    model = copy.deepcopy(source)
    data = [{"input_ids": torch.stack([r["input_ids"] for r in rows()])}]
    return qkv.apply(model, "transmla:rope_dim=8,kv_rank=24,freqfold=1", data=data), source


def logits(model: Any) -> torch.Tensor:
    ids = torch.stack([r["input_ids"] for r in rows(100)[96:]])  # unseen
    with torch.no_grad():
        return model(ids, use_cache=False).logits.log_softmax(-1)


def kl(model: Any, source: Any) -> float:
    p, q = logits(source), logits(model)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_healing_brings_the_model_back_and_touches_nothing_else(tmp_path: Path) -> None:
    model, source = converted()
    start = {k: v.clone() for k, v in model.state_dict().items()}
    given = {k: v.clone() for k, v in source.state_dict().items()}
    before = kl(model, source)
    done = heal(
        model, source, rows(), tmp_path / "run", max_steps=40, evaluate=lambda m: {"kl": kl(m, source)}, **QUICK
    )
    assert (
        before > 0.3 and kl(model, source) < 0.92 * before
    )  # on rows it was not trained on; random weights generalise little
    assert sum(r["loss"] for r in done.records[-3:]) < 0.75 * sum(r["loss"] for r in done.records[:3])
    assert done.scores["untrained"]["kl"] == pytest.approx(before) and done.scores["teacher"]["kl"] == pytest.approx(0)
    assert done.student is model and all(p.requires_grad for p in model.parameters())
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, start[k])}
    assert changed == {k for k in start if ".self_attn." in k}
    assert all(torch.equal(v, given[k]) for k, v in source.state_dict().items())
    assert set(done.records[-1]["parts"]) == {"logits", "attention"}

    loaded = qkv.load(done.path, model=llama())
    assert torch.equal(logits(loaded), logits(model))
    again, _ = converted()
    more = heal(again, source, rows(), tmp_path / "run", max_steps=40, resume=True, **QUICK)
    assert more.steps == 40 and torch.equal(logits(again), logits(model))  # the finished run is found
    qkv.revert(model)
    assert torch.equal(logits(model), logits(source))


def test_the_recipe_is_the_conversions_and_the_callers_wishes_win(tmp_path: Path) -> None:
    model, source = converted()
    recipe = qkv.method("transmla").spec.heal["arguments"]
    done = heal(model, source, rows(), tmp_path, max_steps=1, objective="healing:attention_weight=0.0", use_cpu=True)
    run = qkv.distill._folder.read_json(tmp_path / "run.json")["run"]
    assert run["arguments"]["learning_rate"] == recipe["learning_rate"] == 1e-4
    assert (
        run["arguments"]["lr_scheduler_type"] == "cosine" and run["arguments"]["max_steps"] == 1 != recipe["max_steps"]
    )
    assert run["objective"]["parameters"]["attention_weight"] == 0.0 and done.steps == 1


def test_what_cannot_be_healed_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model, source = converted()
    with pytest.raises(Refused, match=r"carries none.*transmla"):
        heal(source, llama(4), rows(), tmp_path / "a", max_steps=1)
    with pytest.raises(Refused, match=r"bfloat16.*float32"):
        heal(*converted(torch.bfloat16), rows(), tmp_path / "a", max_steps=1)
    with pytest.raises(Refused, match="heal"):
        distill(source, model, "healing", rows(), tmp_path / "a", max_steps=1)
    assert all(p.requires_grad for p in model.parameters()) and not (tmp_path / "a").exists()
    with hosts.applied(llama(5), "streamingllm:window=8") as other, pytest.raises(Refused, match="streamingllm"):
        distill(source, other, "healing", rows(), tmp_path / "a", max_steps=1)


def test_pieces_of_the_divergence_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(5, 7, 11, dtype=torch.float64, generator=draw) for _ in range(2))
    found = []
    for elements in (1 << 28, 2 * 7 * 11):
        monkeypatch.setattr(healing, "ELEMENTS", elements)
        x = student.clone().requires_grad_()
        out = healing.token_kl(teacher, x, 0.7)
        out.square().sum().backward()
        found.append((out.detach(), x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and bool((found[0][0] >= 0).all())
