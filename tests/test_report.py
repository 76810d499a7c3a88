"""The report: one file that asks for nothing, escapes what it did not write, and is valid HTML."""

import re
from html.parser import HTMLParser

import pytest

from qkv.bench import _charts as charts
from qkv.bench import report
from qkv.bench.environment import append_jsonl as append
from qkv.bench.environment import environment, write_json
from qkv.bench.run import Results
from qkv.core.errors import SavedDataError, StorageError

EVIL = "</title><script>alert('x')</script><img src=x onerror=\"alert(1)\">&amp;{{ 7*7 }}"
METHODS = ["full", "window:budget=64", "h2o:budget=64", f"kivi:{EVIL}"]
CONTEXTS = [512, 2048]
HERE = environment(seed=0)
VOID = {"meta", "link", "br", "hr", "img", "input", "wbr", "area", "base", "col", "embed", "source", "track"}


def row(method, context, task, n, evil=""):
    spread = {"median": 1.0 + n, "low": 0.5, "high": 2.0, "n": 4}
    metrics = {
        "ppl": {"ppl": 20.0 + n, "ppl_prefill": 18.0 + n},
        "kl": {"kl": 0.0 if method == "full" else 10.0 ** (-n), "top1": 0.9, "kl_by_position": [0.1 * n] * 12},
        "passkey": {
            "accuracy": 0.5,
            "agreement": 0.5,
            "cells": [
                {
                    "depth": 0.1,
                    "key": "12345",
                    "answer": f" 12345 {evil}",
                    "full_answer": evil,
                    "correct": True,
                    "agrees": True,
                },
                {
                    "depth": 0.9,
                    "key": "54321",
                    "answer": evil,
                    "full_answer": "54321",
                    "correct": False,
                    "agrees": False,
                },
            ],
        },
    }[task]
    return {
        "key": f"{method}{context}{task}",
        "status": "ok",
        "method": {"label": method, "stack": [{"id": method, "parameters": {}}]},
        "kind": "cache",
        "task": task,
        "context": context,
        "seed": 0,
        "parameters": {"windows": 2, "note": evil},
        "metrics": metrics,
        "cost": {
            "first_token_s": spread, "prefill_s": spread, "token_ms": spread, "peak_bytes": spread, "held_bytes": 1000 * (n + 1),
            "full_bytes": 4000, "read_bytes": 1000, "kept": 64, "seen": 512, "setup_s": 0.1, "calls": 3,
        },
        "environment": HERE,
    }  # fmt: skip


def results(folder, methods=METHODS, contexts=CONTEXTS, tasks=("ppl", "kl", "passkey"), evil=""):
    rows = [row(m, c, t, n, evil) for n, m in enumerate(methods) for c in contexts for t in tasks]
    manifest = {
        "identity": {
            "format": 1,
            "model": {
                "name": f"model{evil}",
                "class": "Llama",
                "fingerprint": "ab" * 32,
                "dtype": "float32",
                "device": "cpu",
            },
            "methods": [{"label": m, "stack": [{"id": m, "parameters": {"x": evil}}]} for m in methods],
            "contexts": list(contexts),
            "tasks": list(tasks),
            "settings": {"seed": 0},
            "text": {"name": f"text{evil}", "characters": 10, "sha256": "cd" * 32},
            "machine": {"cpu": f"cpu{evil}", "threads": 2, "gpus": []},
            "versions": {"python": "3", "qkv": "0", "torch": "2", "transformers": "5"},
        },
        "command": f"qkv bench {evil}",
        "started": "2026-01-02T03:04:05+00:00",
    }
    return Results(folder, manifest, rows)


class Checker(HTMLParser):
    """Tags are closed in order, ids and attributes are not doubled; collects what a reader sees and what a browser loads."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.stack, self.problems, self.text, self.tags, self.attributes = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        names = [n for n, _ in attrs]
        if len(names) != len(set(names)):
            self.problems.append(f"doubled attribute in <{tag} {attrs}>")
        self.attributes += [(tag, n, v) for n, v in attrs]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        if not self.stack or self.stack.pop() != tag:
            self.problems.append(f"</{tag}> at {self.getpos()} closes nothing")

    def handle_data(self, data):
        self.text.append(data)


def check(page):
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert not checker.problems and not checker.stack, (checker.problems[:3], checker.stack)
    return checker


@pytest.fixture
def page(tmp_path):
    return report.html(results(tmp_path))


def test_it_is_valid_html_with_the_numbers_in_it(page):
    seen = check(page)
    text = "".join(seen.text)
    for said in ("qkv bench: model", "window:budget=64", "512 tokens of context", "Passkey by depth", "Quality against cost",
                 "qkv bench", "Machine and versions"):  # fmt: skip
        assert said in text
    assert page.startswith("<!DOCTYPE html>") and ("html", "lang", "en") in seen.attributes
    assert ("meta", "name", "viewport") in seen.attributes
    assert "prefers-color-scheme: dark" in page


def test_it_asks_for_nothing(page):
    seen = check(page)
    assert not {"script", "link", "iframe", "img", "object", "embed", "base", "form"} & set(seen.tags)
    for tag, name, value in seen.attributes:
        assert name not in ("src", "href", "xlink:href", "srcset", "action", "background", "poster"), (tag, name, value)
        assert not name.startswith("on"), (tag, name)
    assert (
        "url(" not in page
        and "@import" not in page
        and "http:" not in page.replace("http-equiv", "")
        and "https:" not in page
    )
    policy = next(v for t, n, v in seen.attributes if t == "meta" and n == "content" and "default-src" in v)
    assert "default-src 'none'" in policy


def test_text_of_models_prompts_names_and_files_is_escaped(tmp_path):
    found = results(tmp_path, evil=EVIL)
    found.rows[3] |= {"status": "error", "error": {"type": "Refused", "message": EVIL}}
    seen = check(report.html(found))
    assert not {"script", "img"} & set(seen.tags)
    text = "".join(seen.text)
    assert (
        text.count("<script>alert('x')</script>") > 10
        and "{{ 7*7 }}" in text
        and "49" not in re.findall(r"&amp;\S+", text)
    )
    assert "1 of 24 measurements failed" in text


def test_errors_come_first(tmp_path):
    found = results(tmp_path)
    found.rows[-1] |= {"status": "error", "error": {"type": "NeverFired", "message": "site 3 never ran"}}
    page = report.html(found)
    check(page)
    assert page.index("site 3 never ran") < page.index("Quality against cost")


@pytest.mark.parametrize(
    "part",
    [
        dict(methods=["full"]), dict(contexts=[512]), dict(tasks=["ppl"]), dict(tasks=["kl"]), dict(tasks=["passkey"]),
        dict(methods=["full", *(f"m{i}" for i in range(40))]),
    ],
)  # fmt: skip
def test_it_copes_with_little_and_with_much(tmp_path, part):
    check(report.html(results(tmp_path, **part)))


def test_it_copes_with_nothing_but_errors_and_with_odd_numbers(tmp_path):
    found = results(tmp_path)
    for r in found.rows:
        r |= {"status": "error", "error": {"type": "X", "message": "y"}}
    check(report.html(found))
    found = results(tmp_path)
    for r, x in zip(found.rows, [float("inf"), float("nan"), 0.0, 1e300, None] * 9, strict=False):
        for name in ("ppl", "kl"):
            if name in r["metrics"]:
                r["metrics"][name] = x
    check(report.html(found))
    check(report.html(Results(tmp_path, found.manifest, [])))


def test_every_picture_has_words(page):
    seen = check(page)
    pictures = [{a[1]: a[2]} for a in seen.attributes if a[0] == "svg" and a[1] in ("role", "aria-hidden")]
    assert pictures and all(p in ({"role": "img"}, {"aria-hidden": "true"}) for p in pictures)
    labels = [v for t, n, v in seen.attributes if t == "svg" and n == "aria-label"]
    assert len(labels) == sum(p == {"role": "img"} for p in pictures)
    assert any("h2o:budget=64" in x for x in labels)


def test_written_and_read_back(tmp_path):
    found = results(tmp_path)
    write_json(tmp_path / "run.json", found.manifest)
    for r in found.rows:
        append(tmp_path / "results.jsonl", r)
    append(tmp_path / "results.jsonl", found.rows[0])
    again = report.read(tmp_path)
    assert [r["key"] for r in again.rows] == [r["key"] for r in found.rows]
    path = report.write(again)
    assert path == tmp_path / "report.html" and path.read_text(encoding="utf-8") == report.html(again)
    with pytest.raises(SavedDataError):
        report.read(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        report.write(again, tmp_path / "file" / "report.html")


# -- charts


def test_axes_put_values_where_they_belong():
    x = charts.Axis(0.0, 2.0)
    assert x(0.0) == charts.LEFT and x(2.0) == charts.WIDTH - charts.RIGHT and x(1.0) == (x(0.0) + x(2.0)) / 2
    y = charts.Axis(1e-4, 1.0, log=True, vertical=True, floor=1e-4)
    assert y(0.0) == y(1e-9) == y(1e-4) == charts.HEIGHT - charts.BOTTOM and y(1.0) == charts.TOP
    assert y(1e-2) == pytest.approx((y(1e-4) + y(1.0)) / 2)


RANGES = [(0, 1, False), (0.98, 1.07, False), (3, 7000, True), (1e-4, 1.3, True), (20, 23, True)]


@pytest.mark.parametrize(("low", "high", "log"), RANGES)
def test_ticks_are_few_and_inside(low, high, log):
    ticks = charts.Axis(low, high, log).ticks()
    assert 2 <= len(ticks) <= 8 and all(low <= t <= high for t in ticks) and ticks == sorted(ticks)


def test_the_frontier_joins_what_nothing_beats():
    best = charts._stairs([(0.2, 1.0), (0.5, 0.1)])
    assert best == [(0.2, 1.0), (0.5, 1.0), (0.5, 0.1)]
    svg = charts.frontier("t", [charts.Series(i, f"m{i}", [p]) for i, p in enumerate([(1, 0.01), (0.5, 0.1), (0.6, 0.5)])],
                          "x", "y")  # fmt: skip
    assert svg.count('class="dot"') == 3 and 'class="frontier"' in svg


def test_badges_do_not_hide_each_other():
    svg = charts.frontier("t", [charts.Series(i, f"m{i}", [(0.5, 0.1)]) for i in range(12)], "x", "y")
    places = [
        (float(a), float(b)) for a, b in re.findall(r'<circle class="badge" cx="([\d.]+)" cy="([\d.]+)"', str(svg))
    ]
    assert len(places) == 12
    for i, (a, b) in enumerate(places):
        for c, d in places[:i]:
            assert ((a - c) ** 2 + (b - d) ** 2) ** 0.5 > 1.8 * charts.BADGE
