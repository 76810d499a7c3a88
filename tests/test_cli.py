"""The command line: help that teaches, exit codes, one-line errors, JSON that parses."""

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qkv
from qkv.bench import default
from qkv.bench.job import Job, stack_of
from qkv.cli import _app, _shared, main
from qkv.core import registry
from tiny import tiny_folder

TEXT = " ".join(f"Line {i}: the quick brown fox jumps over {i * i} lazy dogs." for i in range(300))
SMALL = ("--context", "420", "--windows", "1", "--tokens", "4", "--depths", "0.5")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny work: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def qkv_command(capsys, monkeypatch, tmp_path):
    """Run a command in an empty folder: exit code, stdout, stderr without line wraps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")

    def go(*arguments):
        with pytest.raises(SystemExit) as left:
            main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return left.value.code, out, err

    return go


# -- help


@pytest.mark.parametrize("name", sorted(_app.COMMANDS))
def test_help_of_every_command_teaches_by_examples(qkv_command, name):
    code, out, err = qkv_command(name, "--help")
    assert code == 0 and not err
    flat = " ".join(re.sub(r"[│─╭╮╰╯]", " ", out).split())
    for example in _app.COMMANDS[name].EXAMPLES:
        assert " ".join(example.split()) in flat
    assert "--help" in out


@pytest.mark.parametrize("command", [e for m in _app.COMMANDS.values() for e in m.EXAMPLES if e.startswith("qkv ")])
def test_every_example_names_what_exists(command):
    words = shlex.split(command)[1:]
    tool = _app.COMMANDS[words[0]]
    for flag, value in itertools.pairwise(words):
        if flag in ("-m", "--method", "--probe", "--objective"):
            assert stack_of(value)
        if flag == "--kind":
            assert registry.methods(value)
    assert tool.command.__doc__


def test_help_of_the_whole_names_commands_and_exit_codes(qkv_command):
    code, out, _ = qkv_command("--help")
    assert code == 0
    assert all(re.search(rf"\b{name}\b", out) for name in _app.COMMANDS)
    assert "Exit codes" in out and "130" in out
    assert qkv_command("-h")[1] == out
    bare = qkv_command()
    assert bare[0] == 2 and "Usage" in bare[1] + bare[2]


def test_version(qkv_command):
    assert qkv_command("--version")[:2] == (0, f"qkv {qkv.__version__}\n")


# -- errors


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["show", "h20"], "did you mean 'h2o'"),
        (["methods", "--kind", "cahce"], "did you mean 'cache'"),
        (["verify", "gal"], "did you mean 'gla'"),
        (["bench", "smollm2", "-m", "h3o"], "did you mean 'h2o'"),
        (["bench", "smollm2", "-m", "h2o:bugdet=3"], "did you mean 'budget'"),
        (["bench", "smollm2", "-m", "h2o:budget=0"], "at least 1 token"),
        (["bench", "smollm2", "-m", "h2o:budget=-3"], "at least 1 token"),
        (["bench", "smollm2", "-m", "h2o:budget=1.5"], "(0, 1]"),
        (["bench", "smollm2", "-m", "h2o:0.5"], "name=value"),
        (["bench", "smollm2", "-m", "minilm"], "qkv distill"),
        (["bench", "smollm2", "-m", "retrieval-heads"], "qkv inspect"),
        (["bench", "smollm2", "--tasks", "pl"], "did you mean 'ppl'"),
        (["bench", "smollm2", "--context", "4m"], "k = 1024"),
        (["bench", "smollm2", "--context", "0"], "k = 1024"),
        (["bench", "smollm2", "--depths", "a"], "numbers"),
        (["bench", "smollm2", "--windows", "0"], "at least 1"),
        (["bench", "smollm2", "--device", "toaster"], "no device"),
        (["bench", "smollm2", "--text", "nowhere.txt", "--dtype", "float31"], "float32"),
        (["bench", "./nowhere"], "no folder"),
        (["generate", "smollm2"], "--prompt"),
        (["generate", "smollm2", "--prompt", " "], "empty"),
        (["generate", "smollm2", "--prompt", "a", "--prompt-file", "b"], "one of the two"),
        (["generate", "smollm2", "--prompt-file", "nowhere.txt"], "cannot read nowhere.txt"),
        (["inspect", "smollm2", "--probe", "h2o", "--out", "x"], "not a probe"),
        (["convert", "smollm2", "-m", "h2o", "--out", "x"], "no conversion"),
        (["distill", "--teacher", "smollm2", "--objective", "minilm", "--steps", "1", "--out", "x"], "one of the two"),
        (
            ["distill", "--teacher", "a", "--layers", "0", "--objective", "h2o", "--steps", "1", "--out", "x"],
            "not an objective",
        ),
    ],
)
def test_wrong_input_is_one_line_and_code_2(qkv_command, tmp_path, arguments, said):
    code, out, err = qkv_command(*arguments)
    assert code == 2 and not out
    assert said in " ".join(err.split()) and err.startswith("error: ") and "Traceback" not in err
    assert len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["frob"], ["bench"], ["bench", "smollm2", "--contexxt", "3"], ["generate", "x", "-n", "0"],
                                       ["inspect", "smollm2"], ["convert", "smollm2"]])  # fmt: skip
def test_wrong_usage_is_code_2(qkv_command, arguments):
    code, out, err = qkv_command(*arguments)
    assert code == 2 and not out and "Usage" in err and "Traceback" not in err


def test_an_unexpected_error_is_short_and_debug_shows_it(qkv_command, monkeypatch):
    def crash(*a, **k):
        raise ZeroDivisionError("the moon")

    monkeypatch.setattr(registry, "methods", crash)
    code, _, err = qkv_command("methods")
    assert code == 1 and "ZeroDivisionError: the moon" in err and "--debug" in err and "Traceback" not in err
    for arguments in (["--debug", "methods"], ["methods", "--debug"]):
        with pytest.raises(ZeroDivisionError):
            main(arguments)


def test_debug_shows_errors_on_purpose_too():
    with pytest.raises(qkv.core.errors.UnknownName):
        main(["show", "h20", "--debug"])


def test_interruption_is_code_130(qkv_command, monkeypatch):
    def stop(*a, **k):
        raise KeyboardInterrupt

    monkeypatch.setattr(registry, "methods", stop)
    code, out, err = qkv_command("methods")
    assert code == 130 and "interrupted" in err and not out


# -- methods, show, verify


def test_methods_lists_all_by_kind(qkv_command):
    code, out, _ = qkv_command("methods")
    assert code == 0 and all(s.id in out for s in qkv.methods())
    code, out, _ = qkv_command("methods", "--kind", "cache", "--json")
    found = json.loads(out)
    assert code == 0 and [s["id"] for s in found] == [s.id for s in qkv.methods("cache")]
    assert all({"title", "paper", "parameters", "kind"} <= set(s) for s in found)


@pytest.mark.parametrize("name", registry.ids())
def test_show_explains_every_method(qkv_command, name):
    code, out, _ = qkv_command("show", name)
    spec = registry.config_class(name).spec
    assert code == 0 and spec.paper in out and all(p.name in out for p in spec.parameters)
    code, out, _ = qkv_command("show", name, "--json")
    assert code == 0 and json.loads(out)["id"] == name
    recorded = (Path(__file__).parents[1] / "benchmarks" / "results" / "real" / f"{name}.json").is_file()
    assert recorded == bool(json.loads(out)["measured"])


def test_verify_says_what_is_kept_and_what_is_broken(qkv_command, tmp_path):
    code, out, _ = qkv_command("verify", "full", "--quick", "--json")
    assert code == 0 and json.loads(out)["ok"] and all(r["ok"] for r in json.loads(out)["results"])
    text = Path(sys.modules[registry.config_class("full").__module__].__file__).read_text()
    assert text.count("reference=reference") == 1
    broken = tmp_path / "full.py"
    broken.write_text(text.replace("reference=reference", "reference=lambda q, k, v, **_: v * 0"))
    code, out, err = qkv_command("verify", str(broken), "--quick")
    assert code == 1 and "BROKEN" in out and "BROKEN" in err


# -- bench


def test_bench_writes_rows_table_and_report(qkv_command, folder, book, tmp_path):
    code, out, err = qkv_command("bench", folder, "-m", "window:budget=64", "--text", book, "--out", "r", *SMALL)
    assert code == 0
    assert "420 tokens of context" in out and "window:budget=64" in out and "report.html" in out
    assert len((tmp_path / "r" / "results.jsonl").read_text().splitlines()) == 6
    assert "<html" in (tmp_path / "r" / "report.html").read_text()
    assert "[6/6]" in err and "left)" in err
    code, out, err = qkv_command(
        "bench", folder, "-m", "window:budget=64", "--text", book, "--out", "r", "--json", *SMALL
    )
    found = json.loads(out)
    assert code == 0 and found["ok"] and len(found["rows"]) == 6 and "all rows are there" in err
    code, _, err = qkv_command("bench", folder, "-m", "h2o", "--text", book, "--out", "r", *SMALL)
    assert code == 2 and "another configuration" in err and "--fresh" in err


def test_bench_with_a_row_that_failed_is_code_1_and_goes_on(qkv_command, folder, book):
    arguments = ["bench", folder, "-m", "kivi:group=64", "-m", "window:budget=64", "--text", book, "-t", "ppl", *SMALL]
    code, out, err = qkv_command(*arguments)
    assert (
        code == 1 and "groups of 64" in out and "groups of 64" in err and "window:budget=64" in out and "(error)" in out
    )
    code, out, _ = qkv_command(*arguments, "--json")
    assert code == 1 and not json.loads(out)["ok"]


def test_bench_interrupted_says_where_the_rows_are(qkv_command, folder, book, monkeypatch):
    from qkv.bench import run

    real, done = run.append_jsonl, []

    def stop(path, row):
        if done:
            raise KeyboardInterrupt
        done.append(row)
        real(path, row)

    arguments = ["bench", folder, "-m", "window:budget=64", "--text", book, "-t", "ppl", "--out", "r", *SMALL]
    with monkeypatch.context() as patch:
        patch.setattr(run, "append_jsonl", stop)
        code, out, err = qkv_command(*arguments)
    assert code == 130 and "1 of 2 rows are safe in r" in err and err.count("interrupted") == 1 and not out
    code, out, err = qkv_command(*arguments)
    assert code == 0 and "1 of 2 rows are there; going on" in err


def test_bench_default_folder_is_the_same_for_the_same_command(qkv_command, folder, book, tmp_path):
    for _ in range(2):
        assert qkv_command("bench", folder, "-m", "full", "--text", book, "-t", "ppl", *SMALL)[0] == 0
    (made,) = (tmp_path / "runs").iterdir()
    assert made.name.startswith(folder.name)


def test_bench_on_a_full_disk_is_code_1_and_one_line(qkv_command, folder, book, monkeypatch):
    import errno

    from qkv.bench import environment

    def full(*a):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(environment, "_write_all", full)
    code, _, err = qkv_command("bench", folder, "-m", "full", "--text", book, "-t", "ppl", "--out", "r", *SMALL)
    assert code == 1 and "error: cannot append" in err and "No space left" in err and "Traceback" not in err


def test_the_default_job_names_methods_that_exist():
    job = Job.of("smollm2", default.METHODS, default.CONTEXTS)
    ids = {m.id for stack in job.methods for m in stack}
    assert ids >= {"full", "window", "streamingllm", "h2o", "kivi", "sliding-window", "xattention", "transmla"}


# -- generate, inspect, convert


def test_generate_prints_text_to_stdout_and_facts_to_stderr(qkv_command, folder, tmp_path, monkeypatch):
    code, out, err = qkv_command("generate", folder, "-m", "window:budget=8", "--prompt", "abcdefghijkl", "-n", "5")
    assert code == 0 and out.strip() and "tokens kept" in err and "window:budget=8" in err
    (tmp_path / "p.txt").write_text("abcdefghijkl")
    code, out, _ = qkv_command(
        "generate", folder, "-m", "window:budget=8", "--prompt-file", "p.txt", "-n", "5", "--json"
    )
    one = json.loads(out)
    assert code == 0 and one["prompt_tokens"] == 12 and len(one["tokens"]) == 5
    assert one["held_bytes"] < one["full_bytes"] and one["methods"][0]["id"] == "window"
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("abcdefghijkl"))
    code, out, _ = qkv_command("generate", folder, "-m", "window:budget=8", "--prompt", "-", "-n", "5", "--json")
    assert json.loads(out)["tokens"] == one["tokens"]
    sampled = [
        json.loads(qkv_command("generate", folder, "--prompt", "ab", "--sample", "--seed", s, "-n", "9", "--json")[1])[
            "tokens"
        ]
        for s in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_generate_keeps_a_cache_and_goes_on_from_it(qkv_command, folder, tmp_path):
    same = ("-m", "h2o:budget=8", "-n", "5", "--json")
    code, first, err = qkv_command(
        "generate", folder, *same, "--prompt", "abcdefghijkl", "--save-cache", tmp_path / "c"
    )
    assert code == 0, err
    code, later, err = qkv_command("generate", folder, *same, "--prompt", "l", "--cache", tmp_path / "c")
    assert code == 0, err
    assert json.loads(later)["tokens"] == json.loads(first)["tokens"] and json.loads(later)["prompt_tokens"] == 12
    code, _, err = qkv_command("generate", folder, "-m", "h2o:budget=9", "--prompt", "l", "--cache", tmp_path / "c")
    assert code != 0 and "filled under h2o" in err


def test_generate_tells_what_the_model_cannot_do(qkv_command, folder):
    code, _, err = qkv_command("generate", folder, "--prompt", "a" * 1000, "-n", "100")
    assert code == 2 and "1024 positions" in err
    code, _, err = qkv_command("generate", folder, "--prompt", "a", "--chat")
    assert code == 2 and "chat template" in err


def test_inspect_writes_its_result(qkv_command, folder, book, tmp_path):
    arguments = ["inspect", folder, "--probe", "attention-sink-emergence", "--out", "o", "--text", book]
    code, out, err = qkv_command(*arguments)
    assert code == 0, err
    assert (
        "result.json" in out and (tmp_path / "o" / "result.json").is_file() and (tmp_path / "o" / "table.png").is_file()
    )
    code, out, _ = qkv_command(*arguments, "--json")
    assert code == 0 and json.loads(out)["probe"]["id"] == "attention-sink-emergence"


def test_convert_saves_what_load_reads(qkv_command, folder, book, tmp_path):
    setting = "transmla:rope_dim=32,kv_rank=16,freqfold=1"
    code, out, err = qkv_command(
        "convert", folder, "-m", setting, "--out", "c", "--text", book, "--rows", "4", "--tokens", "64"
    )
    assert code == 0, err
    assert "qkv.load('c')" in out
    model = qkv.load(tmp_path / "c")
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(20)[None]).logits).all()


def test_convert_heals_on_request(qkv_command, folder, book, tmp_path):
    setting = "transmla:rope_dim=32,kv_rank=16,freqfold=1"
    common = ["convert", folder, "-m", setting, "--text", book, "--rows", "4", "--tokens", "64"]
    for more in (["--out", "a"], ["--out", "b", "--heal", "2", "--heal-text", book, "--batch", "2"]):
        code, _, err = qkv_command(*common, *more)
        assert code == 0, err
    plain, healed = (qkv.load(tmp_path / name).state_dict() for name in "ab")
    changed = {k for k in plain if not torch.equal(plain[k], healed[k])}
    assert changed and all(".self_attn." in k for k in changed)
    assert (tmp_path / "b-healing" / "student" / "qkv.json").is_file()


def test_a_conversion_that_trains_keeps_nothing_but_its_result(qkv_command, folder, book, tmp_path):
    setting = "lolcats:window=8,feature_dim=4,transfer=1,tune=1,lora_rank=2"
    arguments = ["convert", folder, "-m", setting, "--out", "l", "--text", book, "--rows", "4", "--tokens", "32"]
    code, out, err = qkv_command(*arguments)
    assert code == 0, err
    assert "qkv.load('l')" in out and not (tmp_path / "l-training").exists()
    model = qkv.load(tmp_path / "l")
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(20)[None]).logits).all()


MINILM = "minilm:relation_heads=4,kv_relation_heads=2"


def test_distill_trains_a_student(qkv_command, folder, book, tmp_path):
    arguments = ["distill", "--teacher", folder, "--layers", "1", "--objective", MINILM, "--text", book, "--steps", "2",
                 "--length", "32", "--batch", "2", "--out", "d"]  # fmt: skip
    code, out, err = qkv_command(*arguments)
    assert code == 0, err
    assert "2 steps" in out and "untrained" in out and (tmp_path / "d" / "student" / "model.safetensors").is_file()


# -- as a program


def test_as_a_program_with_a_reader_that_leaves_early():
    command = f"{shlex.quote(sys.executable)} -m qkv methods --json | head -c 20"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, timeout=120,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0 and not done.stderr and done.stdout.startswith("[")


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from qkv.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip().endswith("set()"), done.stderr


# -- parts


def test_contexts_and_durations():
    assert _shared.parse_contexts("512,2k, 1K") == [512, 2048, 1024]
    assert [_shared.duration(x) for x in (0, 65, 3723)] == ["0:00", "1:05", "1:02:03"]


@pytest.mark.parametrize("rate", ["nan", "-1", "0", "inf"])
def test_a_rate_that_is_no_rate_is_refused(qkv_command, tmp_path, rate):
    text = tmp_path / "book.txt"
    text.write_text("A ship came home. " * 200)
    arguments = ("-m", "linear", "--layers", "1", "--width", "8", "--heads", "1", "--length", "8", "--steps", "1")
    code, _, err = qkv_command("train", *arguments, "--text", str(text), "--out", str(tmp_path / "t"), "--rate", rate)
    assert code == 2 and "finite number above 0" in err and not (tmp_path / "t").exists()
