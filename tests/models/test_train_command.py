"""`qkv train` and `qkv generate` on what it made: a run, its end, its resumption, and what is refused."""

from __future__ import annotations

import gzip
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qkv.cli import main
from qkv.models.language.causal import CausalLM
from qkv.models.vision.vit import ViT

torch.set_num_threads(1)
SMALL = ("--layers", "2", "--width", "16", "--heads", "2", "--device", "cpu", "--batch", "4")


@pytest.fixture
def book(tmp_path: Any) -> Path:
    path = tmp_path / "book.txt"
    path.write_text("the quick brown fox jumps over the lazy dog, and so on it goes.\n" * 60)
    return path


@pytest.fixture
def command(capsys: Any, monkeypatch: Any, tmp_path: Any) -> Any:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")

    def go(*arguments: Any) -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as left:
            main([str(a) for a in arguments])
        return left.value.code, *capsys.readouterr()

    return go


def test_a_model_is_trained_and_writes(command: Any, book: Path) -> None:
    how = ("train", "-m", "gla", "-m", "full", *SMALL, "--kv-heads", "1", "--text", book, "--length", "16", "--every", "3",
           "--out", "run")  # fmt: skip
    code, out, err = command(*how, "--steps", "6", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["steps"] == 6 and told["scores"].keys() == {"untrained", "trained"}
    assert told["scores"]["trained"]["nats per byte"] < told["scores"]["untrained"]["nats per byte"]
    net = CausalLM.from_pretrained("run/model")
    assert [m.id for m in net.config.methods] == ["gla", "full"] and net.config.kv_heads == 1
    assert sorted(p.name for p in Path("run/checkpoints").iterdir()) == ["checkpoint-3", "checkpoint-6"]

    code, out, err = command("generate", "run/model", "--prompt", "the quick", "-n", "5", "--device", "cpu", "--json")
    assert code == 0, err
    first = json.loads(out)
    assert len(first["tokens"]) == 5 and first["held_bytes"] > 0
    code, out, err = command("generate", "run/model", "--prompt", "the quick", "-n", "5", "--device", "cpu")
    assert code == 0 and out.rstrip("\n") == first["text"].rstrip("\n") and "a state of" in err

    assert command(*how, "--steps", "6")[0] == 1  # there is a run already
    code, out, _ = command(*how, "--steps", "6", "--resume")
    assert code == 0 and "6 steps" in out
    code, _, err = command(*how, "--steps", "9", "--resume")
    assert code == 1 and "max_steps: 6 -> 9" in err
    other = [x if x != "gla" else "linear" for x in how]
    code, _, err = command(*other, "--steps", "6", "--resume")
    assert code == 1 and '"gla" -> "linear"' in err


def test_images_are_learnt(command: Any, tmp_path: Any, monkeypatch: Any) -> None:
    data = tmp_path / "site" / "sklearn" / "datasets" / "data"
    data.mkdir(parents=True)
    (tmp_path / "site" / "sklearn" / "__init__.py").write_text("")
    table = np.random.default_rng(0).integers(0, 17, (1797, 65))
    table[:, 64] = np.arange(1797) % 10
    with gzip.open(data / "digits.csv.gz", "wt") as file:
        np.savetxt(file, table, delimiter=",", fmt="%d")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    code, out, err = command(
        "train", "--images", "digits", "-m", "flow", *SMALL, "--steps", "3", "--out", "vit", "--json"
    )
    assert code == 0, err
    assert 0 <= json.loads(out)["scores"]["trained"]["accuracy"] <= 1
    assert ViT.from_pretrained("vit/model").config.grid == (4, 4)
    code, _, err = command("generate", "vit/model", "--prompt", "x")
    assert code == 2 and "holds a vit of qkv's own" in err
    code, _, err = command("generate", "vit", "--prompt", "x")
    assert code == 2 and "its model lies below: give vit/model" in err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("-m", "glaa"), 2, "did you mean 'gla'"),
        (("-m", "h2o"), 2, "is of kind cache"),
        (("-m", "hydra"), 2, "bidirectional"),
        (("-m", "gla", "--heads", "3"), 2, "multiple of heads=3"),
        (("-m", "gla", "--length", "4000"), 2, "need at least"),
        (("-m", "gla", "--images", "digits"), 2, "one of the two"),
        (("-m", "gla", "--device", "gpu"), 2, "is no device"),
        (("-m", "gla", "--parameters", "20"), 2, "leave no room"),
    ],
)
def test_wrong_input_is_one_line(command: Any, book: Path, arguments: tuple[str, ...], code: int, says: str) -> None:
    got, out, err = command(
        "train", *SMALL, "--text", book, "--length", "16", "--steps", "2", "--out", "run", *arguments
    )
    assert got == code and not out and says in err and "Traceback" not in err
    assert not Path("run").exists()


def test_methods_do_not_apply_to_a_model_of_ones_own(command: Any, tmp_path: Any) -> None:
    from qkv.models.language.causal import CausalConfig

    CausalLM(CausalConfig(operators=("gla",), width=8, heads=2)).save_pretrained(tmp_path / "m")
    code, _, err = command("generate", tmp_path / "m", "-m", "h2o", "--prompt", "x")
    assert code == 2 and "its own operators" in err


def test_an_interrupted_run_goes_on(command: Any, book: Path, monkeypatch: Any) -> None:
    """Ctrl-C ends the run after its step with a checkpoint, exit code 130; --resume gives the weights of a run left alone."""
    how = ("train", "-m", "gla", *SMALL, "--text", book, "--length", "16", "--every", "20", "--steps", "8")
    loss, calls = CausalLM.loss, []

    def interrupted(self: CausalLM, *batch: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGINT)
        return loss(self, *batch)

    monkeypatch.setattr(CausalLM, "loss", interrupted)
    code, _, err = command(*how, "--out", "cut")
    assert code == 130, err
    assert "stopped at step 4 with a checkpoint; go on with --resume" in err
    assert [p.name for p in Path("cut/checkpoints").iterdir()] == ["checkpoint-4"] and not Path("cut/model").exists()
    assert command(*how, "--out", "cut", "--resume")[0] == 0 and len(calls) == 8
    assert command(*how, "--out", "whole")[0] == 0
    a, b = (CausalLM.from_pretrained(f"{name}/model").state_dict() for name in ("cut", "whole"))
    assert all(torch.equal(a[k], b[k]) for k in a)
