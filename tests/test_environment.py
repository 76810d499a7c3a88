"""Where results come from, and files that are whole or not there."""

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qkv.bench import environment as env
from qkv.core.errors import InvalidInput, SavedDataError, StorageError


def _files(folder):
    return sorted(p.name for p in folder.iterdir())


def test_environment_names_machine_versions_commit_and_seed():
    e = env.environment(seed=7)
    assert e["seed"] == 7
    assert e["machine"]["cores"] >= 1 and e["machine"]["memory_bytes"] > 1 << 28 and e["machine"]["cpu"]
    assert isinstance(e["machine"]["gpus"], list)
    assert e["versions"]["torch"] == torch.__version__
    assert e["versions"]["python"].startswith(f"{sys.version_info[0]}.{sys.version_info[1]}.")
    assert {"qkv", "transformers", "triton"} <= set(e["versions"])
    assert json.loads(json.dumps(e)) == e  # plain data
    text = json.dumps(e)
    assert os.uname().nodename not in text and str(Path.home()) not in text


def test_versions_say_none_for_what_is_absent(monkeypatch):
    monkeypatch.setattr(env, "PACKAGES", ("a-package-that-does-not-exist",))
    assert env.environment()["versions"]["a-package-that-does-not-exist"] is None


def _checkout(folder):
    def git(*a):
        return subprocess.run(["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *a],
                              check=True, capture_output=True, text=True).stdout.strip()  # fmt: skip

    (folder / "src" / "qkv").mkdir(parents=True)
    (folder / "src" / "qkv" / "__init__.py").write_text("")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "x")
    return git("rev-parse", "HEAD")


def test_commit_is_that_of_the_checkout_and_knows_dirty(tmp_path, monkeypatch):
    head = _checkout(tmp_path)
    file = tmp_path / "src" / "qkv" / "__init__.py"
    monkeypatch.setattr(env.qkv, "__file__", str(file))
    assert env.environment()["commit"] == {"hash": head, "dirty": False}
    file.write_text("changed = 1\n")
    assert env.environment()["commit"] == {"hash": head, "dirty": True}


def test_no_commit_for_an_installed_package_inside_somebody_elses_repository(tmp_path, monkeypatch):
    _checkout(tmp_path)
    site = tmp_path / ".venv" / "lib" / "python3" / "site-packages" / "qkv"
    site.mkdir(parents=True)
    monkeypatch.setattr(env.qkv, "__file__", str(site / "__init__.py"))
    assert env.environment()["commit"] is None


def test_no_git_program_is_no_error(tmp_path, monkeypatch):
    _checkout(tmp_path)
    monkeypatch.setattr(env.qkv, "__file__", str(tmp_path / "src" / "qkv" / "__init__.py"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert env.environment()["commit"] is None


# -- plain data


def test_json_round_trip_keeps_non_finite_numbers_and_is_valid_json(tmp_path):
    data = {"a": [1, 2.5, math.inf, -math.inf], "b": math.nan, "c": None, "d": True, "e": "text"}
    path = env.write_json(tmp_path / "x.json", data)

    def no_constants(name):
        raise AssertionError(f"{name} is not JSON")

    json.loads(path.read_text(), parse_constant=no_constants)
    back = env.read_json(path)
    assert math.isnan(back.pop("b"))
    assert back == {k: v for k, v in data.items() if k != "b"}


def test_plain_understands_what_results_hold(tmp_path):
    import numpy as np

    import qkv

    value = env.plain({
        1: torch.tensor([1.0, math.nan]), "p": Path("a/b"), "d": torch.bfloat16, "dev": torch.device("cpu"),
        "s": {3, 1}, "n": np.float32(0.5), "i": np.int64(3), "m": qkv.method("full"), "t": (1, 2),
    })  # fmt: skip
    assert value == {
        "1": [1.0, "NaN"], "p": "a/b", "d": "torch.bfloat16", "dev": "cpu", "s": [1, 3], "n": 0.5, "i": 3,
        "m": qkv.method("full").to_dict(), "t": [1, 2],
    }  # fmt: skip


@pytest.mark.parametrize("value", [object(), {"a": object()}, {(1, 2): 3}, 1j])
def test_what_is_not_plain_data_is_refused_and_nothing_is_written(tmp_path, value):
    with pytest.raises(InvalidInput):
        env.write_json(tmp_path / "x.json", value)
    with pytest.raises(InvalidInput):
        env.append_jsonl(tmp_path / "x.jsonl", {"v": value})
    assert _files(tmp_path) == []


# -- whole files


def test_write_makes_folders_replaces_and_honours_the_umask(tmp_path):
    path = tmp_path / "a" / "b" / "x.json"
    env.write_json(path, {"v": 1})
    env.write_json(path, {"v": 2})
    assert env.read_json(path) == {"v": 2}
    assert _files(path.parent) == ["x.json"]
    other = tmp_path / "plain"
    other.write_text("")
    assert path.stat().st_mode == other.stat().st_mode


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call):
    path = env.write_json(tmp_path / "x.json", {"v": 1})

    def full(*a, **k):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if call == "write":
        real = open

        def opened(file, mode="r", *a, **k):
            handle = real(file, mode, *a, **k)
            if isinstance(file, int):
                handle.close()
                full()
            return handle

        monkeypatch.setattr("builtins.open", opened)
    else:
        monkeypatch.setattr(os, call, full)
    with pytest.raises(StorageError, match=r"No space left.*untouched"):
        env.write_json(path, {"v": 2})
    monkeypatch.undo()
    assert env.read_json(path) == {"v": 1}
    assert _files(tmp_path) == ["x.json"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file/x\.json"):
        env.write_json(tmp_path / "file" / "x.json", {})
    assert issubclass(StorageError, OSError)


def _run_limited(code, limit):
    """Run Python code in a process whose files cannot grow beyond `limit` bytes: a disk that fills up for real."""
    head = (f"import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n")  # fmt: skip
    return subprocess.run([sys.executable, "-c", head + code], capture_output=True, text=True, timeout=120)


def test_a_disk_that_really_fills_up_loses_no_row_and_no_file(tmp_path):
    rows, whole = tmp_path / "rows.jsonl", tmp_path / "x.json"
    env.append_jsonl(rows, {"n": 0})
    env.write_json(whole, {"v": 1})
    code = f"""
from qkv.bench import environment as env
from qkv.core.errors import StorageError
for n in range(1, 100):
    try:
        env.append_jsonl({str(rows)!r}, {{"n": n, "pad": "x" * 700}})
    except StorageError as e:
        print(n)
        break
try:
    env.write_json({str(whole)!r}, {{"v": "y" * 5000}})
except StorageError:
    print("refused")
"""
    done = _run_limited(code, 4000)
    assert done.returncode == 0, done.stderr
    failed, refused = done.stdout.split()
    assert refused == "refused" and env.read_json(whole) == {"v": 1}
    assert [r["n"] for r in env.read_jsonl(rows)] == list(range(int(failed)))
    assert rows.read_bytes().endswith(b"\n")
    assert _files(tmp_path) == ["rows.jsonl", "x.json"]
    env.append_jsonl(rows, {"n": int(failed)})  # and it goes on where it stopped
    assert [r["n"] for r in env.read_jsonl(rows)] == list(range(int(failed) + 1))


# -- rows


def test_rows_come_back_in_order_with_non_finite_numbers(tmp_path):
    path = tmp_path / "runs" / "rows.jsonl"
    assert env.read_jsonl(path) == []
    env.append_jsonl(path, {"ppl": math.inf, "é": "ü\n"})
    env.append_jsonl(path, {"ppl": 2.0})
    assert env.read_jsonl(path) == [{"ppl": math.inf, "é": "ü\n"}, {"ppl": 2.0}]
    assert len(path.read_bytes().splitlines()) == 2


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_torn_last_line_is_left_out_and_then_overwritten(tmp_path, cut):
    path = tmp_path / "rows.jsonl"
    env.append_jsonl(path, {"n": 1})
    env.append_jsonl(path, {"n": "é"})
    path.write_bytes(path.read_bytes()[:-cut])
    survived = cut == 1  # only the newline is lost: the row is complete
    assert [r["n"] for r in env.read_jsonl(path)] == ([1, "é"] if survived else [1])
    env.append_jsonl(path, {"n": 3})
    assert [r["n"] for r in env.read_jsonl(path)] == ([1, "é", 3] if survived else [1, 3])


def test_a_torn_line_longer_than_a_block_is_cut_off(tmp_path):
    path = tmp_path / "rows.jsonl"
    env.append_jsonl(path, {"n": 1, "pad": "a" * 200_000})
    with path.open("ab") as file:
        file.write(b'{"n": 2, "pad": "' + b"b" * 300_000)
    env.append_jsonl(path, {"n": 3})
    assert [r["n"] for r in env.read_jsonl(path)] == [1, 3]


def test_a_damaged_line_in_the_middle_is_an_error_with_its_number(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"n": 1}\n{"n": \xff\n{"n": 3}\n')
    with pytest.raises(SavedDataError, match=r"rows\.jsonl, line 2"):
        env.read_jsonl(path)
    path.write_bytes(b'{"n": 1}\n[2]\n')
    with pytest.raises(SavedDataError, match="line 2, holds list"):
        env.read_jsonl(path)


def test_only_mappings_are_rows(tmp_path):
    with pytest.raises(InvalidInput, match="mapping"):
        env.append_jsonl(tmp_path / "x.jsonl", [1])


def test_writers_at_the_same_time_lose_nothing(tmp_path):
    path = tmp_path / "rows.jsonl"
    code = """
import sys
from qkv.bench import environment as env
for n in range(50):
    env.append_jsonl(sys.argv[1], {"who": sys.argv[2], "n": n, "pad": "x" * 500})
"""
    workers = [subprocess.Popen([sys.executable, "-c", code, str(path), who]) for who in "abc"]
    assert [w.wait(timeout=120) for w in workers] == [0, 0, 0]
    rows = env.read_jsonl(path)
    assert len(rows) == 150
    for who in "abc":
        assert [r["n"] for r in rows if r["who"] == who] == list(range(50))


def test_damaged_json_is_an_error_that_names_the_file(tmp_path):
    (tmp_path / "x.json").write_bytes(b'{"a": ')
    with pytest.raises(SavedDataError, match=r"x\.json is not valid JSON"):
        env.read_json(tmp_path / "x.json")
    with pytest.raises(SavedDataError, match="cannot read"):
        env.read_json(tmp_path / "none.json")
