"""Every example runs on a tiny model."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from tiny import tiny_folder

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
WITHOUT_A_MODEL = {"linear_attention", "small_hybrid"}
SAYS = {
    "shrink_the_cache": "held ",
    "ask_a_saved_cache": "What is the pass key? The pass key is ->",
    "compare_methods": "kivi:bits=4",
    "linear_attention": "bytes of the state",
    "find_heads": "layer  1",
    "small_hybrid": "nats a byte",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny"), hidden_size=128)  # heads of 32 channels


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_it_runs_and_says_what_it_should(path, model, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    given = [] if path.stem in WITHOUT_A_MODEL else [str(model)]
    runpy.run_path(str(path))["main"](*given)
    assert SAYS[path.stem] in capsys.readouterr().out
