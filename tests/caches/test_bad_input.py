"""What a user may get wrong with caches, as a user would: a clear error of ours, and the model as it was."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import StoppingCriteria

import qkv
from qkv.core.errors import InvalidParameter, Refused, SavedDataError, StateError, StorageError
from qkv.testing.caches import tiny

IDS = torch.randint(1, 97, (2, 24), generator=torch.Generator().manual_seed(0))


def generate(model: Any, ids: Tensor = IDS, **more: Any) -> Any:
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options, **more)


@pytest.mark.parametrize(
    "setting",
    [
        "snapkv:budget=16,window=16",
        "pyramidkv:budget=16,window=16",
        'adakv:budget=16,scorer="snapkv:window=16"',
        'evict-pack:budget=16,policy="snapkv:window=16"',
        "lazyeviction:budget=20,window=16,sinks=4",
        "knorm:budget=16,recent=16",
        "loopserve:budget=19,refresh=16,sinks=4",
        "recycled:budget=9,stride=10",
        "quest:budget=15,block_size=16",
        "longheads:attention_length=48,chunk_size=16",
        "actqkv:budget=24,block_size=16",
    ],
)
def test_a_budget_that_its_own_windows_fill_is_refused(setting: str) -> None:
    with pytest.raises(InvalidParameter, match=r"leaves nothing|no room|less than one page|must hold 4|multiple of"):
        qkv.method(setting)


def other(model: Any) -> Any:
    twin = copy.deepcopy(model)
    nn.init.normal_(twin.lm_head.weight)
    return twin


@torch.no_grad()
@pytest.mark.parametrize(
    "method", ["h2o:budget=9", "kivi:bits=4,group=8,residual=8", "offload", "shared-prefix", "full"]
)
def test_a_cache_goes_on_under_its_own_model_and_methods_only(method: str) -> None:
    model, stranger = copy.deepcopy(tiny()), other(tiny())
    qkv.apply(model, method)
    out = generate(model)
    longer = torch.cat((out.sequences, IDS[:, :1]), 1)
    with pytest.raises(StateError, match=r"carries none \(another model, or after qkv.revert\)"):
        generate(stranger, longer, past_key_values=copy.deepcopy(out.past_key_values))
    with pytest.raises(StateError, match="carries none"):  # one token and no mask: nothing else would have noticed
        stranger(IDS[:, :1], past_key_values=copy.deepcopy(out.past_key_values))
    with qkv.applied(stranger, method), pytest.raises(StateError, match="another stack of methods or another model"):
        generate(stranger, longer, past_key_values=copy.deepcopy(out.past_key_values))
    assert generate(model, longer, past_key_values=copy.deepcopy(out.past_key_values)).sequences.shape == (2, 33)
    qkv.revert(model)
    with pytest.raises(StateError, match="carries none"):
        generate(model, longer, past_key_values=copy.deepcopy(out.past_key_values))
    with qkv.applied(model, "window:budget=9"), pytest.raises(StateError, match="another stack"):
        generate(model, longer, past_key_values=copy.deepcopy(out.past_key_values))
    assert generate(model).sequences.shape == (2, 28)


@torch.no_grad()
@pytest.mark.parametrize("method", ["h2o:budget=9", "kivi:bits=4,group=8,residual=8", "offload", "shared-prefix"])
def test_a_saved_cache_is_loaded_under_its_own_model_and_methods_only(method: str, tmp_path: Path) -> None:
    model, stranger = copy.deepcopy(tiny()), other(tiny())
    with qkv.applied(model, method):
        qkv.hosts.save_cache(model, generate(model).past_key_values, tmp_path / "saved")
    with qkv.applied(stranger, method), pytest.raises(SavedDataError, match="other weights"):
        qkv.hosts.load_cache(stranger, tmp_path / "saved")
    with qkv.applied(model, "window:budget=9"), pytest.raises(SavedDataError, match="was filled under"):
        qkv.hosts.load_cache(model, tmp_path / "saved")


class Remove(StoppingCriteria):
    """Takes a folder away in the middle of a generation."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.steps = folder, 0

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.steps += 1
        if self.steps == 2:
            shutil.rmtree(self.folder)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@torch.no_grad()
def test_a_disk_store_that_disappears_while_it_generates(tmp_path: Path) -> None:
    model, folder = copy.deepcopy(tiny()), tmp_path / "kv"
    want = generate(model).sequences
    with qkv.applied(model, qkv.method("offload", folder=str(folder))):
        with pytest.raises(StorageError, match=r"its file .* has gone .* Start the generation anew"):
            generate(model, stopping_criteria=[Remove(folder)])
        assert torch.equal(generate(model).sequences, want)


@torch.no_grad()
def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with (
        qkv.applied(copy.deepcopy(tiny()), qkv.method("offload", folder=str(tmp_path / "taken"))) as model,
        pytest.raises(StorageError, match="choose another folder"),
    ):
        generate(model)


def test_an_index_library_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "faiss", None)
    model = copy.deepcopy(tiny())
    with pytest.raises(Refused, match="pip install faiss-cpu, or choose index='graph'"):
        qkv.apply(model, "retrievalattention:index=faiss")
    assert generate(model).sequences.shape == (2, 28)
