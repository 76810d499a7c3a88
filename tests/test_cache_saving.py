"""A filled cache goes to a folder and comes back: same tokens as if it had stayed, and refusals that lose nothing."""

from __future__ import annotations

import copy

import pytest
import torch

import models
import qkv
from qkv import hosts
from qkv.core.errors import InvalidInput, NotApplied, SavedDataError, StateError

METHODS = ["full", "h2o:budget=9", "streamingllm:sinks=2,window=7", "kivi:bits=4,group=8,residual=16"]


@pytest.fixture
def model():
    return models.make("llama")


def filled(model, rows: int = 1):
    ids = models.inputs("llama", rows=2)["input_ids"][1:].repeat(rows, 1)
    cache = hosts.fresh_cache(model, ids.shape[1])
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
    return cache, ids


def answer(model, cache, ids, question) -> list[int]:
    settings = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    return model.generate(torch.cat((ids, question), 1), past_key_values=cache, **settings)[0].tolist()


@pytest.mark.parametrize("method", METHODS)
def test_another_question_finds_the_cache_as_it_was(model, method, tmp_path) -> None:
    questions = [torch.tensor([[3, 5, 7]]), torch.tensor([[11, 2]])]
    with qkv.applied(model, method):
        cache, ids = filled(model)
        want = [answer(model, copy.deepcopy(cache), ids, q) for q in questions]
        hosts.save_cache(model, cache, tmp_path / "c", ids)
    with qkv.applied(model, method):
        for question, tokens in zip(questions, want, strict=True):
            saved = hosts.load_cache(model, tmp_path / "c")
            assert torch.equal(saved.input_ids, ids)
            assert answer(model, saved.cache, saved.input_ids, question) == tokens


def test_what_does_not_fit_is_refused(model, tmp_path) -> None:
    with pytest.raises(NotApplied):
        hosts.load_cache(model, tmp_path)
    with qkv.applied(model, "h2o:budget=9"):
        cache, ids = filled(model)
        with pytest.raises(StateError, match="empty"):
            hosts.save_cache(model, hosts.fresh_cache(model, 4), tmp_path / "c")
        with pytest.raises(InvalidInput, match="input_ids"):
            hosts.save_cache(model, cache, tmp_path / "c", ids[:, :-1])
        assert not list(tmp_path.iterdir())
        hosts.save_cache(model, cache, tmp_path / "c")
        assert hosts.load_cache(model, tmp_path / "c").input_ids is None
        with pytest.raises(SavedDataError, match="holds a filled cache"):
            qkv.load(tmp_path / "c", model=models.make("llama"))
        qkv.save(model, tmp_path / "stack")
        with pytest.raises(SavedDataError, match="holds no cache"):
            hosts.load_cache(model, tmp_path / "stack")
    with qkv.applied(model, "h2o:budget=10"):
        with pytest.raises(StateError, match="not filled under the methods"):
            hosts.save_cache(model, cache, tmp_path / "d")
        with pytest.raises(SavedDataError, match="filled under h2o"):
            hosts.load_cache(model, tmp_path / "c")
    other = models.make("llama")
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with qkv.applied(other, "h2o:budget=9"), pytest.raises(SavedDataError, match="other weights"):
        hosts.load_cache(other, tmp_path / "c")


def test_a_damaged_folder_is_refused(model, tmp_path) -> None:
    with qkv.applied(model, "h2o:budget=9"):
        cache, _ = filled(model)
        hosts.save_cache(model, cache, tmp_path / "c")
        file = tmp_path / "c" / "tensors.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        with pytest.raises(SavedDataError, match="damaged"):
            hosts.load_cache(model, tmp_path / "c")
        file.write_bytes(data[:-9])
        with pytest.raises(SavedDataError, match="truncated"):
            hosts.load_cache(model, tmp_path / "c")
