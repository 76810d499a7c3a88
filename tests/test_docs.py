"""Pages say what the specifications say; the worked example of CONTRIBUTING works; records are complete."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch

import qkv
from qkv.bench.environment import read_json, write_json
from qkv.bench.record import Figure, read_records, record
from qkv.core import registry
from qkv.core.errors import InvalidInput, SavedDataError

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
    page = generate.pages()["full.md"]
    for line in ("| KL \\| max | 0.1235 nats | a\\|b |", "| runs | 3  |  |", "| bits | KL |", "| 4 | 1e-07 |",
                 "Measured: is &lt;exact>", "qkv bench smollm2"):  # fmt: skip
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
        measured = list(_numbers([known["figures"], known["table"]]))
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


# -- the site


def test_links_between_pages_lead_somewhere():
    for page in [*(ROOT / "docs").rglob("*.md"), ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#:]+\.md)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).is_file(), f"{page.name}: {target}"


def test_pages_hold_no_data_of_this_machine():
    for page in (ROOT / "docs").rglob("*.md"):
        assert str(Path.home()) not in page.read_text(encoding="utf-8"), page.name


def test_the_schema_in_the_docs_names_every_entry_of_a_record(tmp_path):
    path = record("h2o", claim="c", figures=[Figure("f", 1)], command="x", seed=0, table=[{"a": 1}], folder=tmp_path)
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in json.loads(path.read_text()))
