"""Pages say what the specifications and results say; guides and the worked example work; records are complete."""

import importlib.util
import itertools
import json
import math
import re
import shlex
import shutil
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

import qkv
from qkv.bench import _charts as charts
from qkv.bench.environment import append_jsonl, environment, read_json, write_json
from qkv.bench.record import Figure, read_records, record
from qkv.core import registry
from qkv.core.errors import InvalidInput, Refused, SavedDataError
from tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def generate(monkeypatch):
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "docs_generate", module)
    spec.loader.exec_module(module)
    return module


# -- method pages


def test_method_pages_are_up_to_date(generate, capsys):
    assert generate.main(["--check"]) == 0, capsys.readouterr().err


def test_every_method_has_a_page_that_names_its_parameters_and_paper(generate):
    pages = generate.pages()
    assert set(pages) == {"index.md", *(f"{s.id}.md" for s in qkv.methods())}
    for s in qkv.methods():
        page = pages[f"{s.id}.md"]
        assert all(f"| `{p.name}` |" in page for p in s.parameters), s.id
        assert s.paper.removeprefix("arXiv:") in page or s.paper == "baseline", s.id
        assert f"]({s.id}.md)" in pages["index.md"], s.id


def test_a_recorded_figure_reaches_the_page(generate, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    record("full", claim="is <exact>", figures=[Figure("KL | max", 0.123456, "nats", "a|b"), Figure("runs", 3)],
           command="qkv bench smollm2", seed=5, table=[{"bits": 2, "KL": 0.5}, {"bits": 4, "KL": 1e-7}],
           folder=tmp_path / "benchmarks" / "results" / "real")  # fmt: skip
    with pytest.raises(SystemExit, match=r"does not say what was measured: full"):
        generate.pages()
    (tmp_path / "benchmarks" / "results" / "verdicts.json").write_text('{"full": "was <exact>"}')
    page = generate.pages()["full.md"]
    for line in ("| KL \\| max | 0.1235 nats | a\\|b |", "| runs | 3  |  |", "| bits | KL |", "| 4 | 1e-07 |",
                 "Measured: was &lt;exact>", "qkv bench smollm2"):  # fmt: skip
        assert line in page
    assert "seed 5" in page and torch.__version__ in page
    assert "✓" in generate.pages()["index.md"]


def test_pages_are_written_and_those_of_gone_methods_removed(generate, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "PAGES", tmp_path)
    (tmp_path / "a-method-that-is-gone.md").write_text("old")
    assert generate.main(["--check"]) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a-method-that-is-gone.md"]
    assert generate.main([]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(generate.pages())
    assert generate.main(["--check"]) == 0


def test_a_result_of_no_method_is_refused(generate, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    record("nothing", claim="c", figures=[Figure("f", 1)], command="x", seed=0,
           folder=tmp_path / "benchmarks" / "results" / "real")  # fmt: skip
    with pytest.raises(SystemExit, match="nothing"):
        generate.pages()


# -- records


def _numbers(x):
    if isinstance(x, (dict, list)):
        for v in x.values() if isinstance(x, dict) else x:
            yield from _numbers(v)
    elif isinstance(x, (int, float)):
        yield float(x)


def test_every_figure_in_a_verdict_is_in_its_record():
    """Words are written by hand, figures are not: each is a number of the record, rounded."""
    results = ROOT / "benchmarks" / "results"
    for name, text in json.loads((results / "verdicts.json").read_text(encoding="utf-8")).items():
        known = read_json(results / "real" / f"{name}.json")
        measured = list(_numbers([known["figures"], known.get("table")]))
        for said in re.findall(r"\d+\.\d+", text):
            slack = 0.501 * 10 ** -len(said.partition(".")[2])
            assert any(abs(abs(x) - float(said)) <= slack for x in measured), f"{name}: {said}"


def test_records_in_the_repository_are_complete():
    assert set(read_records(ROOT / "benchmarks" / "results" / "real")) <= set(registry.ids())


def test_a_record_carries_where_it_comes_from(tmp_path):
    path = record("h2o", claim="c", figures=[Figure("f", float("inf"))], command="x", seed=None, folder=tmp_path)
    data = read_records(tmp_path)["h2o"]
    assert path == tmp_path / "h2o.json" and data["figures"][0]["value"] == float("inf")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", data["date"])
    assert data["versions"]["torch"] == torch.__version__ and data["machine"]["cores"] >= 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"figures": []}, "at least one figure"),
        ({"claim": " "}, "claim"),
        ({"command": ""}, "command"),
        ({"figures": [Figure("f", [1])]}, "number or a word"),
        ({"figures": [Figure("", 1)]}, "name, value, unit"),
        ({"table": [{"a": 1}, {"b": 1}]}, "same columns"),
    ],
)
def test_an_incomplete_record_is_refused_and_not_written(tmp_path, changes, said):
    right = {"claim": "c", "figures": [Figure("f", 1)], "command": "x", "seed": 0}
    with pytest.raises(InvalidInput, match=said):
        record("h2o", **(right | changes), folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_record_is_an_error_that_names_the_file(tmp_path):
    path = record("h2o", claim="c", figures=[Figure("f", 1)], command="x", seed=0, folder=tmp_path)
    good = read_json(path)
    for change, said in (
        ({"seed": "0"}, "'seed' is str"),
        ({"more": 1}, "unknown entries"),
        ({"id": "kivi"}, "file name"),
    ):
        write_json(path, good | change)
        with pytest.raises(SavedDataError, match=rf"h2o\.json: .*{said}"):
            read_records(tmp_path)
    write_json(path, {k: v for k, v in good.items() if k != "machine"})
    with pytest.raises(SavedDataError, match="'machine' is missing"):
        read_records(tmp_path)


# -- CONTRIBUTING


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The worked example, as a reader would save it."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(r\"\"\".*?)```", text, flags=re.S)
    path = tmp_path_factory.mktemp("mine") / "small_keys.py"
    path.write_text(code, encoding="utf-8")
    return path


def test_the_worked_example_is_about_forty_lines(example):
    assert len(example.read_text().splitlines()) <= 45


def test_the_worked_example_works_on_a_model(example):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=53, hidden_size=24, intermediate_size=16, num_hidden_layers=2,
                                         num_attention_heads=6, num_key_value_heads=3)).eval()  # fmt: skip
    prompt = torch.randint(0, 53, (1, 29))
    plain = model.generate(prompt, max_new_tokens=7, do_sample=False, pad_token_id=0)
    cls = registry.load_file(example)
    with qkv.applied(model, cls.create(budget=1.0)):
        assert torch.equal(model.generate(prompt, max_new_tokens=7, do_sample=False, pad_token_id=0), plain)
    with qkv.applied(model, cls.create(budget=11)):
        model.generate(prompt, max_new_tokens=7, do_sample=False, pad_token_id=0)
        assert qkv.report(model).kept == 11


def test_the_worked_example_passes_its_laws(example):
    verdict = qkv.verify(example)
    assert verdict.ok, str(verdict)


def test_a_definition_keeps_its_formulas_and_reads_as_text(generate):
    assert generate._plain("x_t._a * [D, ``[B, H]``] < `y_s` # arXiv:2306.14048.") == (
        "x_t.\\_a \\* \\[D, `[B, H]`\\] &lt; `y_s` \\# [arXiv:2306.14048](https://arxiv.org/abs/2306.14048)."
    )
    page = generate.pages()["h2o.md"].split("## Definition")[1]
    assert "```text\na_s = sum_t A[t, s]" in page and "\nAxes: B batch" in page.split("```")[2]


def test_a_page_says_where_else_its_method_was_measured(generate):
    pages = generate.pages()
    assert "Also measured: [Benchmark runs](../benchmarks.md)" in pages["h2o.md"]
    assert "[Operators compared](../operators.md)" in pages["miras.md"]  # as yaad, moneta and memora
    assert "see [`ecoformer`](ecoformer.md)" in pages["eco-attention.md"]


# -- measurements


ENVIRONMENT = environment(seed=0)


def bench_rows(methods, contexts, model="tiny"):
    """Rows of `qkv bench`: (label, stack, KL, share held, share read) at each context, or at one; KL None: the row failed."""
    for context in contexts:
        for label, stack, kl, held, read, *only in methods:
            if only and context not in only:
                continue
            row = {
                "key": f"{label}{context}",
                "method": {"label": label, "stack": [{"id": i, "parameters": p} for i, p in stack]},
                "kind": "cache",
                "context": context,
                "task": "kl",
                "model": {"name": model, "dtype": "float32", "device": "cpu"},
                "environment": ENVIRONMENT,
            }
            if kl is None:
                yield row | {"status": "error", "error": {"type": "Refused", "message": "no <room>"}}
                continue
            cost = {"full_bytes": 1000, "held_bytes": int(1000 * held), "read_bytes": int(1000 * read)}
            yield row | {"status": "ok", "metrics": {"kl": kl * context / 1000, "top1": 0.5}, "cost": cost}


def keep(folder, methods, contexts, command):
    folder.mkdir(parents=True)
    for row in bench_rows(methods, contexts):
        append_jsonl(folder / "results.jsonl", row)
    (folder / "command.txt").write_text(f"{command}\n")


FULL = ("full", [("full", {})], 0.0, 1.0, 1.0)


def many(ids):
    for i, name in enumerate(ids):
        for b in (0.5, 0.25):
            yield f"{name}:budget={b}", [(name, {"budget": b})], 0.1 * (1 + i) / b, b, b


def test_a_large_run_in_parts_is_grouped_by_budget_and_sorted_by_divergence(generate, tmp_path):
    stream = [
        (
            f"streamingllm:window={n // 4 - 4}",
            [("streamingllm", {"window": n // 4 - 4, "sinks": 4})],
            0.33,
            0.25,
            0.25,
            n,
        )
        for n in (512, 1024)
    ]
    reader = ("quest:budget=0.25", [("quest", {"budget": 0.25})], 0.15, 1.02, 0.25)
    packed = ("kivi:bits=4", [("kivi", {"bits": 4})], 0.01, 0.3, 0.3)
    packed_more = ("kivi:bits=2", [("kivi", {"bits": 2})], 0.1, 0.2, 0.2)
    failed = ("zipvl:budget=0.5", [("zipvl", {"budget": 0.5})], None, 0, 0)
    keep(tmp_path / "run" / "a", [FULL, *many("abcdefgh"), packed_more, packed, failed], [512, 1024], "qkv bench a")
    keep(tmp_path / "run" / "b", [FULL, *stream, reader], [512, 1024], "qkv bench b")
    text, runs, files = generate._runs.page(tmp_path, tmp_path / "none.json", "note")
    assert list(runs) == ["run"] and "qkv bench a\nqkv bench b\n" in text
    assert sum(r.method == "full" for r in runs["run"].records) == 2  # one a context, though both parts have it
    quarter = text.split("### run: 25 % of the tokens")[1]
    first = quarter.split("<details")[0]
    found = re.findall(r"^\| `([a-z]+)", first, flags=re.M)
    assert found == ["quest", "streamingllm", *"abcdefgh"]  # by KL at 1024; 252 + 4 of 1024 tokens are a quarter
    assert "| `streamingllm` | 0.1690 | 0.3379 |" in first  # a row, though the setting differs with the context
    assert "| `quest:budget=0.25` | 0.0768 | 0.1536 | 102% |" in first
    others = text.split("No budget of tokens")[1].split("<details")[0]
    assert re.findall(r"^\| `([^`]+)", others, flags=re.M) == ["full", "kivi:bits=4", "kivi:bits=2"]
    assert "- `zipvl:budget=0.5` at 512: kl: Refused: no &lt;room>" in text
    assert text.count("<details") == text.count("</details>") and "KL at 512" in first
    held, read = (files[f"bench-run-1024-{what}.svg"] for what in ("held", "read"))
    assert ">quest<" in read and ">quest<" not in held  # it spares no byte that is held
    assert ">h<" in held and ">h<" in read


def test_a_small_run_is_a_table_a_context(generate, tmp_path):
    keep(tmp_path / "small", [FULL, *many("ab")], [512, 1024], "qkv bench")
    (run,) = generate._runs.page(tmp_path, tmp_path / "none.json", "note")[1].values()
    text = "\n".join(generate._runs.tables(run))
    assert text.index("512 tokens of context") < text.index("1024 tokens of context")
    assert "| `b:budget=0.25` | 0.8192 | 50% | 25% |"[:30] in text and "passkey" not in text  # no row measured it


@pytest.mark.parametrize(
    ("label", "line"),
    [
        ("h2o:budget=0.25", "h2o"), ("kivi:bits=2", "kivi"), ("quest:budget=64,share=query_head", "quest:share=query_head"),
        ("transmla:kv_rank=128,freqfold=2", "transmla:freqfold=2"), ("xattention+h2o:budget=0.5", "xattention+h2o"),
        ("a:x=1,budget=3+b:window=2", "a:x=1+b"), ("full", "full"),
    ],
)  # fmt: skip
def test_budgets_of_one_method_are_one_line(generate, label, line):
    assert generate._runs.family(label) == line


def test_pass_keys_beside_kvpress(generate, tmp_path):
    cells = [{"context": n, "depth": 0.5, "right": n == 1024} for n in (1024, 2048) for _ in range(3)]
    rows = [{"method": m, "accuracy": 0.5, "held": 0.25, "cells": cells} for m in ("tova:budget=0.25", "kvpress TOVA")]
    peers = [{"transformers": "5.2.0", "torch": "2"}]
    write_json(tmp_path / "needles.json", ENVIRONMENT | {"peers": peers, "keep": 0.25, "rows": rows})
    text = generate._runs.page(tmp_path / "none", tmp_path / "needles.json", "note")[0]
    assert "| `tova:budget=0.25` | 50% | 3 of 3 | 0 of 3 | 25% |" in text and "| kvpress TOVA | 50% |" in text
    assert "kvpress with transformers 5.2.0" in text


def test_a_gpu_page_of_nothing_says_what_is_not_recorded(generate, tmp_path):
    text, files = generate._gpu.page(tmp_path, "note")
    assert text.count("Not recorded.") == len(generate._gpu.SECTIONS)
    assert all(f"--out benchmarks/results/{file}.json" in text for file, *_ in generate._gpu.SECTIONS) and not files


def test_ratios_stand_beside_their_bounds(generate, tmp_path):
    gpu = ENVIRONMENT | {"machine": ENVIRONMENT["machine"] | {"gpus": [{"name": "Some GPU", "memory_bytes": 1}]}}
    shape = {"batch": 16, "context": 32768, "heads": 32, "kv_heads": 8, "width": 128}
    rows = [
        {"method": "torch FLASH_ATTENTION, 32768 keys", "ms": 0.5, "copy_ms": 0.8},
        {"method": "full", "ms": 0.5, "best_exact_over_method": 1.0, "full_over_method": 1.0, "held_bytes": 4 * 10**9,
         "copy_ms": 0.8},
        {"method": "h2o:budget=8192", "ms": 0.25, "best_exact_over_method": 2.0, "full_over_method": 2.0, "held_bytes": 10**9,
         "copy_ms": 0.2},
        {"method": "kivi:bits=2", "error": "RuntimeError: it broke"},
    ]  # fmt: skip
    write_json(tmp_path / "attention_gpu.json", gpu | shape | {"rows": rows})
    decode = [
        {
            "what": "full graph",
            "batch": 8,
            "context": 4096,
            "cache_bytes": 4 * 10**9,
            "ms_per_token": 4.0,
            "peak_gb": 9.0,
        },
        {"what": "h2o graph", "batch": 8, "context": 4096, "cache_bytes": 10**9, "ms_per_token": 2.5, "peak_gb": 5.0},
        {
            "what": "transformers static, auto-compiled",
            "batch": 8,
            "context": 4096,
            "ms_per_token": 10.0,
            "peak_gb": 9.0,
        },
    ]
    whole = {"model": {"num_hidden_layers": 4}, "weight_bytes": 2 * 10**9, "kernel": [], "rows": decode}
    write_json(tmp_path / "decode_gpu.json", {"environment": gpu} | whole)
    packed = [
        {
            "batch": 2,
            "tokens": 64,
            "bits": 16,
            "bytes": 4000,
            "decode_attention": 0.5,
            "FLASH_ATTENTION": 0.4,
            "CUDNN_ATTENTION": 0.6,
        },
        {
            "batch": 2,
            "tokens": 60,
            "bits": 4,
            "bytes": 1000,
            "ms": 0.2,
            "TB/s": 1.0,
            "relative_error": 0.001,
            "store_ms": 0.01,
        },
    ]
    write_json(tmp_path / "packed_gpu.json", {"environment": gpu, "rows": packed})
    rates = {f"{k}_ms": 2.0 for k in ("ours", "torch", "masses")} | {
        f"{k}_TFLOPs": 300 for k in ("ours", "torch", "masses")
    }
    prompts = [
        {"what": what, "batch": 1, "context": 64, "seconds": seconds, "peak_gb": 1.0}
        for what, seconds in (("transformers dynamic", 0.5), ("full", 0.4), ("h2o:budget=0.25", 0.8))
    ]
    alone = [{"shape": [1, 32, 8, 9, 9, 128], "error": 0.002} | rates]
    write_json(
        tmp_path / "prefill_gpu.json", gpu | {"kernels": alone, "prompts": prompts, "not run": [["8x8192", "zipcache"]]}
    )
    text, files = generate._gpu.page(tmp_path, "note")
    assert "| `h2o:budget=0.25` | 0.800 | 0.62× | 0.50× | 1.00 |" in text and "prefill_gpu.json --shapes 1x64" in text
    assert "- 8x8192, zipcache" in text
    assert "2.00× of 4.00×" in files["gpu-attention.svg"] and "(figures/gpu-attention.svg)" in text
    assert "| `h2o:budget=8192` | 0.250 | 2.00× | 2.00× | 4.00× | 1.000 | 0.200 |" in text
    assert "- `kivi:bits=2`: RuntimeError: it broke" in text
    assert "| `h2o graph` | 2.500 | 4.00× | 1.60× | 2.00× | 1.00 | 5.0 |" in text
    assert "--shapes 8x4096 --layers 4 -m h2o\n" in text and "Some GPU, torch" in text
    assert "| `B2 M60` | 4 | 0.200 | – | – | 2.00× | 4.00× |" in text


def test_a_long_stream_has_its_curve(generate, tmp_path):
    rows = [{"tokens": 10_000 * (i + 1), "perplexity": 20.0 + i, "cache_bytes": 5_000_000} for i in range(4)]
    facts = {"method": "streamingllm:window=1020", "tokens": 40_000, "block": 256, "constant_bytes": True, "rows": rows}
    write_json(tmp_path / "stream.json", ENVIRONMENT | facts)
    text, files = generate._cpu.page(tmp_path, "note")
    assert "5.00 MB after every stretch" in text and "| 20000 | 21 | 5.00 |" in text
    assert text.count("Not recorded.") == len(generate._cpu.SECTIONS) - 1
    assert "streamingllm:window=1020" in files["stream.svg"] and "(figures/stream.svg)" in text


def test_operators_have_one_number_in_all_figures(generate):
    text, files = generate._operators.page(ROOT / "benchmarks" / "results", "note")
    legends = [dict(re.findall(r">\n?(\d+)</text>\n<text class=\"name\"[^>]*>([^<]+)<", f)) for f in files.values()]
    assert len(files) == 3 and all(len(x) > 5 for x in legends)
    assert len({(n, name) for x in legends for n, name in x.items()}) == len({n for x in legends for n in x})
    assert all(f"](figures/{name})" in text for name in files)


# -- figures


def figure(points):
    series = [charts.Series(i, f"m<{i}>", p) for i, p in enumerate(points)]
    chart = charts.curves("t & u", series, "x", "y", x_log=True, around=True, best="less", x_mark=1.0, height=400)
    return charts.alone("t & u", chart, [(s.number, s.text) for s in series], 400)


CROWD = [[(0.5 + 0.001 * i, 0.2 + 0.003 * i), (0.9, 0.1 + 0.002 * i)] for i in range(25)]


def test_a_figure_is_a_file_that_needs_nothing():
    svg = figure(CROWD)
    root = ET.fromstring(svg)
    assert root.get("role") == "img" and "m<3>: " in root.get("aria-label")
    tags = {e.tag.rpartition("}")[2] for e in root.iter()}
    assert tags <= {"svg", "style", "rect", "text", "g", "title", "desc", "path", "line", "circle"}
    assert not re.search(r"href|url\(|@import|<script", svg) and "prefers-color-scheme: dark" in svg
    names = [e.text for e in root.iter() if e.get("class") == "name"]
    assert names == [f"m<{i}>" for i in range(25)]
    assert figure(CROWD) == svg


def test_labels_of_a_crowded_figure_do_not_overlap():
    plot, *_ = figure(CROWD).split('class="name"')
    places = [tuple(map(float, p)) for p in re.findall(r'class="badge" cx="([\d.]+)" cy="([\d.]+)"', plot)][:25]
    for (a, b), (c, d) in itertools.combinations(places, 2):
        assert math.hypot(a - c, b - d) > 1.9 * charts.BADGE


def test_every_kept_figure_has_words_and_is_shown():
    shown = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "docs").glob("*.md"))
    kept = sorted((ROOT / "docs" / "figures").glob("*.svg"))
    assert kept
    for path in kept:
        ET.fromstring(path.read_text(encoding="utf-8"))
        assert re.search(rf"!\[[^\]]{{40,}}\]\(figures/{re.escape(path.name)}\)", shown), path.name


# -- the guides


GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
PAGES = [*GUIDES, *(ROOT / "docs").glob("*.md"), *sorted((ROOT / "docs" / "methods").glob("*.md")), ROOT / "README.md"]


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)


@pytest.mark.parametrize(
    "page", [p for p in GUIDES if blocks(p, "python") and p.stem != "add-a-method"], ids=lambda p: p.stem
)
def test_the_code_of_a_guide_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = tiny_model(hidden_size=128), tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    model.generation_config.pad_token_id = 0
    model.save_pretrained(tmp_path / "base")
    model = type(model).from_pretrained(tmp_path / "base")
    texts = [f"In the year {1000 + i} a ship came home with {i % 7 + 2} men." for i in range(6)]
    inputs = tokenizer("The sea is wide. " * 20, return_tensors="pt")
    names = {"model": model, "tokenizer": tokenizer, "texts": texts, "inputs": inputs}
    for code in blocks(page, "python"):
        code = code.replace("kv_rank=128,rope_dim=64", "kv_rank=64,rope_dim=32").replace(
            "max_steps=1000", "max_steps=1, use_cpu=True"
        )
        if "graph=True" in code:  # there is no CUDA device here: refused, and the model is as it was
            with pytest.raises(Refused, match="CUDA"):
                exec(compile(code, page.name, "exec"), names)
            continue
        exec(compile(code, page.name, "exec"), names)


def commands(page):
    for text in blocks(page, "sh"):
        for line in text.replace("\\\n", " ").splitlines():
            line = line.partition(" #")[0].strip().removeprefix(".venv/bin/")
            if line.startswith("qkv "):
                yield shlex.split(line)[1:]


def test_every_command_in_the_docs_can_be_typed(tmp_path, monkeypatch):
    import typer

    from qkv.cli._app import app
    from qkv.core.registry import method

    monkeypatch.chdir(tmp_path)
    for name in ("long.txt", "book.txt", "my-text.txt", "small_keys.py"):
        Path(name).write_text("x")
    Path("notes").mkdir()
    shutil.copytree(ROOT / "benchmarks" / "results" / "heads", "benchmarks/results/heads")
    group, seen = typer.main.get_command(app), set()
    for page in PAGES:
        for name, *given in commands(page):
            seen.add(name)
            context = group.commands[name].make_context(name, list(given))
            chosen = context.params.get("method") or ()
            for setting in [chosen] if isinstance(chosen, str) else chosen:
                for part in re.split(r"\+(?=[A-Za-z])", setting):
                    method(part)
    assert seen >= {"bench", "generate", "convert", "distill", "train", "inspect", "show", "verify", "methods"}


# -- the site


def test_links_between_pages_lead_somewhere():
    for page in [*(ROOT / "docs").rglob("*.md"), ROOT / "CONTRIBUTING.md", ROOT / "README.md"]:
        for target in re.findall(r"\]\(([^)#:]+\.(?:md|svg))\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).is_file(), f"{page.name}: {target}"


def test_every_page_is_in_the_navigation():
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        assert re.search(rf"(?m)[ ]{page.relative_to(ROOT / 'docs').as_posix()}$", site), page.name


def test_pages_hold_no_data_of_this_machine():
    for page in (ROOT / "docs").rglob("*.md"):
        assert str(Path.home()) not in page.read_text(encoding="utf-8"), page.name


def test_the_schema_in_the_docs_names_every_entry_of_a_record(tmp_path):
    path = record("h2o", claim="c", figures=[Figure("f", 1)], command="x", seed=0, table=[{"a": 1}], folder=tmp_path)
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in json.loads(path.read_text()))
