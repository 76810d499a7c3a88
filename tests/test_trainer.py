"""The one trainer: what it writes, that it goes on as if nothing had happened, and what it will not do."""

from __future__ import annotations

import copy
import gc
import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, BertModel, LlamaConfig, LlamaForCausalLM

import qkv
from qkv.bench.assets import resolve_model
from qkv.core.errors import (
    InvalidInput,
    InvalidParameter,
    MissingDependency,
    Refused,
    SavedDataError,
    StorageError,
    TrainingError,
    UnknownName,
)
from qkv.distill import _folder, distill, drop_layers
from qkv.distill._data import Collator, Items

torch.set_num_threads(1)
VOCABULARY = 61
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 29,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "initializer_range": 0.3,
    "max_position_embeddings": 32,
}
QUICK = {"per_device_train_batch_size": 3, "learning_rate": 3e-3, "logging_steps": 1, "save_steps": 3, "use_cpu": True}


@pytest.fixture(autouse=True, scope="module")
def frozen_heap() -> Any:
    """Each run collects garbage; what the imports left need not be walked every time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def bert(seed: int = 0, kind: Any = BertModel, **more: Any) -> Any:
    torch.manual_seed(seed)
    return kind(BertConfig(**SIZES | more)).eval()


def llama(seed: int = 0, **more: Any) -> Any:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, head_dim=6, pad_token_id=0, **more)).eval()


def items(count: int = 13, seed: int = 0) -> list[dict[str, Any]]:
    rng = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, VOCABULARY, (2 + i % 7,), generator=rng)} for i in range(count)]


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def run(out: Path, method: Any = "minilm:relation_heads=12", data: Any = None, student: Any = None, **more: Any) -> Any:
    """A short run of a fixed encoder pair, dropout on."""
    teacher = more.pop("teacher", None) or bert()
    student = drop_layers(bert(7), (0, 2)) if student is None else student
    return distill(teacher, student, method, items() if data is None else data, out, **QUICK | {"max_steps": 8} | more)


class Trips:
    """Data that does something when it has been asked for an item `after` times."""

    def __init__(self, after: int, action: Any) -> None:
        self.items, self.asked, self.after, self.action = items(), 0, after, action

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        self.asked += 1
        if self.asked == self.after:
            self.action()
        return self.items[index]


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def crash() -> None:
    raise RuntimeError("the disk of the data is gone")


def read_while_fingerprinted() -> int:
    """Items asked for before training starts: the first one (its keys), and those of the fingerprint."""
    data = Trips(10**9, None)
    Items(data, None, None).fingerprint()
    return data.asked + 2


# -- a run -------------------------------------------------------------------------------------------------------


def test_a_run_trains_and_writes_what_it_says(tmp_path: Path) -> None:
    teacher, student = llama(), drop_layers(llama(), (0, 2))
    before, start = weights(teacher), weights(student)
    student.train()
    more: dict[str, Any] = {"max_steps": 12, "save_total_limit": 2}
    done = distill(teacher, student, "minilm:relation_heads=12", items(), tmp_path / "run", **QUICK | more)
    assert (
        done.student is student
        and student.training
        and same(weights(teacher), before)
        and not same(weights(student), start)
    )
    assert done.steps == 12 and len(done.records) == 12 and done.loss == done.records[-1]["loss"]
    first, last = (sum(r["loss"] for r in part) for part in (done.records[:4], done.records[-4:]))
    assert last < 0.9 * first
    for record in done.records:
        assert set(record["parts"]) == {"qq", "kk", "vv"} and abs(sum(record["parts"].values()) - record["loss"]) < 1e-5
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(x)["step"] for x in lines] == list(range(1, 13))
    loaded = AutoModelForCausalLM.from_pretrained(done.path)
    assert same(weights(loaded), weights(student)) and loaded.config.num_hidden_layers == 2
    manifest = json.loads((done.path / "qkv.json").read_text())
    assert manifest["run"]["objective"]["id"] == "minilm" and manifest["steps"] == 12
    assert manifest["contents"] == _folder.contents(done.path) and len(manifest["run"]["teacher"]["fingerprint"]) == 64
    assert same(weights(resolve_model(str(done.path), with_tokenizer=False)[0]), weights(student))  # the bench takes it
    kept = _folder.checkpoints(tmp_path / "run" / "checkpoints")
    assert [p.name for p in kept] == ["checkpoint-9", "checkpoint-12"]
    assert same(weights(AutoModelForCausalLM.from_pretrained(kept[-1])), weights(student))
    assert not list(tmp_path.rglob("training_args.bin")) and not list(tmp_path.rglob(".*"))
    assert "12 steps" in str(done)


@pytest.mark.parametrize("average", ["sequence", "token"])
def test_accumulated_batches_count_as_one(tmp_path: Path, average: str) -> None:
    """Nine rows at once, or three times three (unequal lengths): the same weights after each step."""
    method, results = qkv.method("minilm", relation_heads=12, average=average), []
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    for batch, pieces in ((9, 1), (3, 3)):
        student = bert(7, **quiet).double()
        more = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": pieces, "max_steps": 3}
        done = run(tmp_path / str(batch), method, items(18), student, teacher=bert().double(), **more, optim="sgd")
        results.append((weights(student), [r["loss"] for r in done.records]))
    (a, x), (b, y) = results
    assert all(torch.allclose(a[k], b[k], rtol=1e-9, atol=1e-12) for k in a)
    assert torch.allclose(torch.tensor(x), torch.tensor(y), rtol=1e-5)  # the record is kept in float32
    assert not same(a, weights(bert(7, **quiet).double()))


def test_bf16_and_recomputed_layers(tmp_path: Path) -> None:
    plain = drop_layers(bert(7), (0, 2))
    run(tmp_path / "plain", student=plain)
    again = drop_layers(bert(7), (0, 2))
    run(tmp_path / "again", student=again, gradient_checkpointing=True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain.parameters(), again.parameters(), strict=True))
    assert not again.is_gradient_checkpointing
    half = drop_layers(bert(7), (0, 2))
    done = run(tmp_path / "half", "minilm:version=1", student=half, bf16=True)
    assert all(p.dtype == torch.float32 for p in half.parameters()) and done.loss is not None and done.loss < 2


def test_seeds_decide(tmp_path: Path) -> None:
    students = [drop_layers(bert(7), (0, 2)) for _ in range(3)]
    for n, (student, seed) in enumerate(zip(students, (1, 1, 2), strict=True)):
        run(tmp_path / str(n), student=student, seed=seed, max_steps=3)
    a, b, c = map(weights, students)
    assert same(a, b) and not same(a, c)


def test_helper_parameters_are_trained_resumed_and_not_saved_with_the_student(tmp_path: Path) -> None:
    method, results = "minilm:relation_heads=6,hidden_weight=1.0", []
    for name, after in (("whole", 10**9), ("broken", read_while_fingerprinted() + 3 * 5)):
        student = bert(7, hidden_size=12)
        try:
            run(tmp_path / name, method, Trips(after, crash), student)
        except RuntimeError:
            student = bert(7, hidden_size=12)
            run(tmp_path / name, method, items(), student, resume=True)
        results.append(
            (weights(student), load_file(tmp_path / name / "checkpoints" / "checkpoint-8" / "helper.safetensors"))
        )
        start = load_file(tmp_path / name / "checkpoints" / "checkpoint-3" / "helper.safetensors")
        assert not same(start, results[-1][1])
        assert sorted(p.name for p in (tmp_path / name / "student").iterdir()) == [
            "config.json",
            "model.safetensors",
            "qkv.json",
        ]
    assert same(results[0][0], results[1][0]) and same(results[0][1], results[1][1])
    assert len(results) == 2 and (tmp_path / "broken" / "checkpoints" / "checkpoint-3").is_dir()


def test_baselines_start_and_train_alike(tmp_path: Path) -> None:
    student = drop_layers(llama(), (0, 2))
    start = weights(student)
    seen: list[float] = []

    def evaluate(model: Any) -> dict[str, float]:
        assert not model.training and not torch.is_grad_enabled()
        seen.append(float(next(model.parameters()).sum()))
        return {"sum": seen[-1]}

    other = "minilm:version=1"
    recipe = {"max_steps": 3, "adam_epsilon": 1e-6, "weight_decay": 0.01}
    more: dict[str, Any] = recipe | {"baselines": ("fine-tuning", other), "evaluate": evaluate}
    done = distill(llama(), student, "minilm:relation_heads=12", items(), tmp_path / "run", **QUICK | more)
    assert list(done.scores) == ["teacher", "untrained", "student", "fine-tuning", other] and len(set(seen)) > 3
    assert json.loads((tmp_path / "run" / "result.json").read_text())["scores"] == done.scores
    twin = drop_layers(llama(), (0, 2))
    distill(llama(), twin, other, items(), tmp_path / "alone", **QUICK | recipe)
    folder = next((tmp_path / "run" / "baselines").glob("minilm*"))
    trained = (weights(AutoModelForCausalLM.from_pretrained(f / "student")) for f in (folder, tmp_path / "alone"))
    assert same(*trained), "a baseline is the run it would have been alone"
    assert not same(weights(student), start)
    with pytest.raises(TrainingError, match="already holds a run"):
        distill(llama(), drop_layers(llama(), (0, 2)), other, items(), tmp_path / "alone", **QUICK | {"max_steps": 3})
    with pytest.raises(Refused, match="no loss of its own"):
        run(tmp_path / "encoder", baselines=("fine-tuning",))
    with pytest.raises(InvalidInput, match="holds no labels"):
        run(tmp_path / "head", student=bert(7, BertForMaskedLM), baselines=("fine-tuning",))


# -- going on ----------------------------------------------------------------------------------------------------


def whole(out: Path, method: str = "minilm:relation_heads=12") -> dict[str, torch.Tensor]:
    student = drop_layers(bert(7), (0, 2))
    run(out, method, student=student, gradient_accumulation_steps=2)
    return weights(student)


@pytest.mark.parametrize("method", ["minilm:relation_heads=12", "minilm:version=1"])
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path: Path, method: str) -> None:
    """Ctrl-C in step 5 of 8 (dropout on, two accumulated batches, second epoch): a checkpoint there, then the same end."""
    want = whole(tmp_path / "whole", method)
    folder = tmp_path / "run"
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    data = Trips(read_while_fingerprinted() + 13 + 10, interrupt)
    with pytest.raises(KeyboardInterrupt, match="stopped at step 5 with a checkpoint; go on with resume=True"):
        run(folder, method, data, drop_layers(bert(7), (0, 2)), gradient_accumulation_steps=2)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert [p.name for p in _folder.checkpoints(folder / "checkpoints")] == ["checkpoint-3", "checkpoint-5"]
    assert not (folder / "student").exists()
    student = drop_layers(bert(7), (0, 2))
    torch.manual_seed(999)
    done = run(folder, method, student=student, gradient_accumulation_steps=2, resume=True)
    assert same(weights(student), want)
    assert [r["step"] for r in done.records] == list(range(1, 9))
    old = [json.loads(x) for x in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["loss"], r["parts"]) for r in done.records] == [
        (r["step"], r["loss"], r["parts"]) for r in old
    ]


def test_a_crash_leaves_a_checkpoint_and_cut_off_writes_are_ignored(tmp_path: Path) -> None:
    want, folder = whole(tmp_path / "whole"), tmp_path / "run"
    data = Trips(read_while_fingerprinted() + 13 + 10, crash)
    with pytest.raises(RuntimeError, match="the disk of the data"):
        run(folder, data=data, gradient_accumulation_steps=2)
    cut = folder / "checkpoints" / "checkpoint-4"
    cut.mkdir()
    (cut / "model.safetensors").write_bytes(b"half")
    with open(folder / "metrics.jsonl", "a") as f:
        f.write('{"step": 4, "lo')
    student = drop_layers(bert(7), (0, 2))
    run(folder, student=student, gradient_accumulation_steps=2, resume=True)
    assert same(weights(student), want) and not cut.exists()
    third = drop_layers(bert(7), (0, 2))  # finished: loaded, not trained again
    again = run(folder, student=third, data=items(), gradient_accumulation_steps=2, resume=True)
    assert again.steps == 8 and same(weights(third), want) and again.loss == again.records[-1]["loss"]


def test_a_terminated_run_leaves_a_checkpoint_and_a_later_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    def terminate() -> None:  # as `timeout` does it: the process, then its group
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)

    data = Trips(read_while_fingerprinted() + 4, terminate)
    with pytest.raises(SystemExit) as error:
        run(tmp_path / "run", data=data)
    assert error.value.code == 128 + signal.SIGTERM and _folder.checkpoints(tmp_path / "run" / "checkpoints")

    def twice() -> None:
        interrupt()
        interrupt()  # the same Ctrl-C, passed on by a launcher
        time.sleep(1.1)
        interrupt()

    with pytest.raises(KeyboardInterrupt, match="at once"):
        run(tmp_path / "other", data=Trips(read_while_fingerprinted() + 4, twice))
    assert not _folder.checkpoints(tmp_path / "other" / "checkpoints")


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(folder, data=Trips(read_while_fingerprinted() + 10, interrupt))
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    def refused(method: str = "minilm:relation_heads=12", **more: Any) -> str:
        with pytest.raises(TrainingError) as error:
            run(folder, method, resume=True, **more)
        return str(error.value)

    said = refused("minilm:relation_heads=6", learning_rate=1e-4, max_steps=9)
    for part in ("objective.parameters.relation_heads: 12 -> 6", "arguments.learning_rate: 0.003 -> 0.0001"):
        assert part in said
    assert "arguments.max_steps: 8 -> 9" in said and "seed" not in said
    assert "data.items: 13 -> 12" in refused(data=items(12)) and "data.fingerprint" in refused(data=items(seed=1))
    assert "teacher.fingerprint" in refused(teacher=bert(3))
    assert "student.structure" in refused(student=bert(7))
    with pytest.raises(TrainingError, match=r"already holds a run \(at checkpoint-\d\): pass resume=True"):
        run(folder)
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    run(folder, resume=True, logging_steps=4, save_steps=100)  # what does not decide the result may change


def test_foreign_and_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    run(tmp_path / "mine", max_steps=4)
    good = tmp_path / "mine" / "checkpoints" / "checkpoint-3"
    foreign = tmp_path / "foreign"
    shutil.copytree(good, foreign)
    (foreign / "qkv.json").unlink()
    with pytest.raises(SavedDataError, match="not a complete checkpoint"):
        run(tmp_path / "new", resume=foreign, max_steps=4)
    with pytest.raises(TrainingError, match=r"teacher\.fingerprint"):
        run(tmp_path / "new", teacher=bert(5), resume=good, max_steps=4)
    assert not (tmp_path / "new").exists()
    damaged = tmp_path / "damaged"
    shutil.copytree(good, damaged)
    raw = bytearray((damaged / "optimizer.pt").read_bytes())
    raw[len(raw) // 2] ^= 1
    (damaged / "optimizer.pt").write_bytes(raw)
    with pytest.raises(SavedDataError, match=r"optimizer.pt is missing or damaged"):
        run(tmp_path / "new", resume=damaged, max_steps=4)
    for change, says in (
        ({"contents": {"../x": {}}}, "outside its folder"),
        ({"format": 99}, "newer format"),
        ({"contents": {}}, "lacks model.safetensors"),
        ({"step": None}, "holds no checkpoint"),
    ):
        manifest = json.loads((good / "qkv.json").read_text()) | change
        (damaged / "qkv.json").write_text(json.dumps(manifest))
        with pytest.raises(SavedDataError, match=says):
            run(tmp_path / "new", resume=damaged, max_steps=4)
    (damaged / "qkv.json").write_text("{")
    with pytest.raises(SavedDataError, match="cannot be read"):
        run(tmp_path / "new", resume=damaged, max_steps=4)
    student, twin = drop_layers(bert(7), (0, 2)), drop_layers(bert(7), (0, 2))
    run(tmp_path / "new", student=student, resume=good, max_steps=4)
    run(tmp_path / "mine", student=twin, resume=True, max_steps=4)
    assert same(weights(student), weights(twin))
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "thesis.tex").write_text("my only copy")
    with pytest.raises(SavedDataError, match="holds no run"):
        run(tmp_path / "strange")


# -- what ends a run ---------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_ends_the_run_with_its_step(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"the loss is nan at step \d; there is no checkpoint yet"):
        run(tmp_path / "run", learning_rate=1e30, optim="sgd", max_grad_norm=0.0, save_steps=100)
    student = drop_layers(bert(7), (0, 2))
    with torch.no_grad():
        student.encoder.layer[1].output.dense.bias.fill_(torch.nan)  # behind every relation: the loss stays finite
    with pytest.raises(
        TrainingError, match=r"output.dense.bias holds NaN or infinite values after step 3; nothing was saved"
    ):
        run(tmp_path / "other", student=student)
    assert not _folder.checkpoints(tmp_path / "other" / "checkpoints")


def test_a_full_disk_keeps_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    real, calls = safetensors.torch.save_model, []

    def full(module: Any, path: str, **more: Any) -> None:
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(b"x" * 100)
            raise OSError(28, "No space left on device")
        real(module, path, **more)

    monkeypatch.setattr(safetensors.torch, "save_model", full)
    with pytest.raises(StorageError, match=r"step 6 could not be written .*checkpoint-3"):
        run(tmp_path / "run")
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["checkpoint-3"]
    _folder.verified(tmp_path / "run" / "checkpoints" / "checkpoint-3")
    target = tmp_path / "saved"
    target.mkdir()
    (target / "old").write_text("kept")
    with pytest.raises(StorageError, match="untouched"):
        _folder.publish(target, lambda folder: (folder / "x" / "y").write_text("no such folder"), {})
    assert [p.name for p in tmp_path.iterdir() if "saved" in p.name] == ["saved"] and (
        target / "old"
    ).read_text() == "kept"


def test_what_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, teacher = tmp_path / "run", bert()

    def refused(error: Any, says: str, **more: Any) -> None:
        with pytest.raises(error, match=says):
            run(out, **more)
        assert not out.exists()

    refused(UnknownName, "no argument 'learning_rat'; did you mean 'learning_rate'", learning_rat=1)
    refused(InvalidParameter, "say how long to train", max_steps=None)
    refused(InvalidParameter, "max_steps=0 must be positive", max_steps=0)
    refused(InvalidParameter, "not an objective", method="full")
    refused(InvalidParameter, "training arguments", lr_scheduler_type="zigzag")
    refused(InvalidParameter, "the same one twice", baselines=("minilm:version=1", "minilm:version=1"))
    refused(Refused, "48 relation heads do not divide", method="minilm")
    refused(Refused, "is the teacher's own", teacher=teacher, student=teacher)
    shared = bert(7)
    shared.encoder.layer[0] = teacher.encoder.layer[0]
    refused(Refused, "encoder.layer.0.*training would change the teacher", teacher=teacher, student=shared)
    refused(Refused, "61 tokens and the student 60", student=bert(7, vocab_size=60))
    frozen = bert(7)
    frozen.requires_grad_(False)
    refused(Refused, "no parameter of the student is trainable", student=frozen)
    refused(InvalidInput, "data is empty", data=[])
    refused(InvalidInput, "must be a sequence", data=iter(items()))
    refused(InvalidInput, "must be a sequence", data="one text")
    refused(InvalidInput, "pass tokenizer=", data=["one text"])
    refused(InvalidInput, "holds no token", data=[{"input_ids": []}])
    refused(InvalidInput, "hold pixels, which neither model takes", data=[{"input_ids": [1], "pixels": [1]}])
    applied = llama()
    qkv.apply(applied, "full")
    with pytest.raises(Refused, match="carries full"):
        distill(llama(), applied, "minilm:relation_heads=12", items(), out, **QUICK | {"max_steps": 2})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(MissingDependency, r"pip install 'qkv\[train\]'")


def test_batches() -> None:
    collate = Collator(VOCABULARY, 9)
    got = collate([{"input_ids": [1, 2, 3], "labels": [4, 5, 6]}, {"input_ids": [7], "labels": [8]}])
    assert got["input_ids"].tolist() == [[1, 2, 3], [7, 9, 9]] and got["labels"].tolist() == [
        [4, 5, 6],
        [8, -100, -100],
    ]
    assert got["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    bad: list[tuple[list[dict[str, Any]], str]] = [
        ([{"input_ids": [1]}, {"input_ids": [1], "labels": [2]}], "the same keys"),
        ([{"input_ids": [1, 61]}], "from 1 to 61, the student has 61 tokens"),
        ([{"input_ids": [-1, 6]}], "from -1 to 6"),
        ([{"input_ids": [0.5]}], "must be integers"),
        ([{"input_ids": [1, 2], "attention_mask": [1]}], "attention_mask has shape"),
        ([{"input_ids": [1, 2], "attention_mask": [0, 0]}], "no real token"),
        ([{"pixel_values": [[1.0]]}, {"pixel_values": [[1.0, 2.0]]}], "they must agree"),
    ]
    for batch, says in bad:
        with pytest.raises(InvalidInput, match=says):
            collate(batch)


def test_sentences_go_through_the_tokenizer(tmp_path: Path) -> None:
    class Letters:
        pad_token_id = 2

        def __call__(self, text: str, truncation: bool, max_length: int | None) -> dict[str, list[int]]:
            ids = [ord(c) % VOCABULARY for c in text][: max_length if truncation else None]
            return {"input_ids": ids, "attention_mask": [1] * len(ids)}

        def get_vocab(self) -> dict[str, int]:
            return {chr(i + 32): i for i in range(VOCABULARY)}

        def save_pretrained(self, folder: Path) -> None:
            (Path(folder) / "tokenizer.json").write_text("{}")

    data = ["Call me Ishmael.", "Some years ago", "never mind how long precisely"]
    done = run(tmp_path / "run", data=data, tokenizer=Letters(), max_length=10, max_steps=2)
    assert done.steps == 2 and (done.path / "tokenizer.json").is_file()
    assert len(Items(data, Letters(), 10)[2]["input_ids"]) == 10

    class Shifted(Letters):
        def get_vocab(self) -> dict[str, int]:
            return {chr(i + 33): i for i in range(VOCABULARY)}

    with pytest.raises(Refused, match="different vocabularies"):
        run(tmp_path / "x", data=data, tokenizer=Letters(), teacher_tokenizer=Shifted(), max_steps=2)
    wider = drop_layers(bert(7, vocab_size=64), (0, 2))  # unused rows are no obstacle when the tokenizers agree
    run(tmp_path / "y", data=data, student=wider, tokenizer=Letters(), teacher_tokenizer=Letters(), max_steps=1)


def test_dropped_layers() -> None:
    teacher = llama()
    before = weights(teacher)
    student = drop_layers(teacher, (0, 2))
    assert len(student.model.layers) == 2 == student.config.num_hidden_layers and len(teacher.model.layers) == 3
    assert teacher.config.num_hidden_layers == 3 and same(weights(teacher), before)
    assert [layer.self_attn.layer_idx for layer in student.model.layers] == [0, 1]
    assert torch.equal(student.model.layers[1].mlp.up_proj.weight, teacher.model.layers[2].mlp.up_proj.weight)
    assert same(weights(drop_layers(teacher, (0, 1, 2))), before)
    ids = torch.tensor([[1, 2, 3]])
    out = student.generate(ids, max_new_tokens=3, do_sample=False)
    assert out.shape == (1, 6)
    for keep in ((), (2, 0), (0, 0), (0, 3), (-1,)):
        with pytest.raises(InvalidParameter, match="rising order"):
            drop_layers(teacher, keep)
    qkv.apply(teacher, "full")
    with pytest.raises(Refused, match="carries qkv methods"):
        drop_layers(teacher, (0,))
    assert copy.deepcopy(student).config.num_hidden_layers == 2
