"""The main job: rows are complete, nothing is lost or counted twice, wrong input is told before anything runs."""

import errno
import json
import math
import os
import re

import pytest
import torch

import qkv
from qkv.bench import environment as files
from qkv.bench import summary
from qkv.bench.folder import RunFolder
from qkv.bench.job import Job, label, stack_of
from qkv.bench.measure import Runner, Spread, cost, peak_memory
from qkv.bench.run import Listener, run
from qkv.bench.tasks import Bench, Settings, Trial, passkey, ppl, task, tasks
from qkv.bench.tasks import kl as kl_task
from qkv.bench.tasks._continuation import windows
from qkv.core.errors import InvalidInput, InvalidParameter, Refused, StorageError, UnknownName
from tiny import tiny_model, tiny_tokenizer

TEXT = " ".join(f"Line {i}: the quick brown fox jumps over {i * i} lazy dogs." for i in range(400))
SMALL = Settings(windows=2, tokens=6, depths=(0.2, 0.8))
CONTEXT = 420


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny work: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def job(*methods, contexts=(CONTEXT,), tasks=("ppl", "kl", "passkey"), settings=SMALL, **more):
    return Job.of("tiny", methods or ("window:budget=64",), contexts, tasks, settings=settings, **more)


@pytest.fixture
def go(model, tokenizer, tmp_path):
    def run_it(*methods, out="run", model=model, text=TEXT, listener=None, fresh=False, retry=False, **more):
        return run(job(*methods, **more), tmp_path / out, model=model, tokenizer=tokenizer, text=text, listener=listener,
                   fresh=fresh, retry=retry)  # fmt: skip

    return run_it


class Stop(Listener):
    """Interrupts after so many rows, by raising what it was given."""

    def __init__(self, after, what=KeyboardInterrupt):
        self.after, self.what = after, what

    def row(self, row, work):
        self.after -= 1
        if self.after == 0:
            raise self.what


class Count(Listener):
    def __init__(self):
        self.rows = []

    def row(self, row, work):
        self.rows.append(row["key"])


def lines(folder):
    return (folder / "results.jsonl").read_text().splitlines()


# -- rows


def test_rows_hold_quality_cost_and_where_they_come_from(go, tmp_path):
    results = go("window:budget=64", "streamingllm:window=60", "sliding-window:window=32")
    assert not results.errors
    assert [(r["method"]["label"], r["task"]) for r in results.rows] == [
        (m, t)
        for m in ("full", "window:budget=64", "streamingllm:window=60", "sliding-window:window=32")
        for t in ("ppl", "kl", "passkey")
    ]
    for row in results.rows:
        assert row["status"] == "ok" and row["context"] == CONTEXT and row["seed"] == 0
        assert row["method"]["stack"] == [m.to_dict() for m in stack_of(row["method"]["label"])]
        assert {"machine", "versions", "commit", "seed"} == set(row["environment"])
        assert row["model"]["class"] == "LlamaForCausalLM" and len(row["model"]["fingerprint"]) == 64
        c = row["cost"]
        for name in ("first_token_s", "prefill_s", "token_ms"):
            assert 0 < c[name]["low"] <= c[name]["median"] <= c[name]["high"] and c[name]["n"] >= 1
        assert c["calls"] > 0 and c["setup_s"] > 0
        assert c["peak_bytes"]["median"] >= 0 and c["peak_how"]
        assert row["parameters"]
    by = {(r["method"]["label"], r["task"]): r for r in results.rows}
    full, window = by["full", "kl"], by["window:budget=64", "kl"]
    assert full["metrics"]["kl"] < 1e-9 and full["metrics"]["top1"] == 1.0
    assert window["metrics"]["kl"] > 1e-6 and len(window["metrics"]["kl_by_position"]) == SMALL.tokens
    assert (
        full["metrics"]["kl_p50"] <= full["metrics"]["kl_p90"] <= full["metrics"]["kl_p99"] <= full["metrics"]["kl_max"]
    )
    assert full["cost"]["held_bytes"] >= full["cost"]["full_bytes"] == full["cost"]["seen"] * 2 * 2 * 2 * 16 * 4
    assert window["cost"]["kept"] == 64 and window["cost"]["held_bytes"] < 0.2 * window["cost"]["full_bytes"]
    pattern = by["sliding-window:window=32", "kl"]["cost"]  # a step reads its window and the 4 sinks of both layers
    assert pattern["read_bytes"] == 2 * 2 * (32 + 4) * 2 * 16 * 4 < pattern["held_bytes"]
    answers = by["window:budget=64", "passkey"]["metrics"]
    assert [c["depth"] for c in answers["cells"]] == [0.2, 0.8] and 0 <= answers["agreement"] <= 1
    assert by["full", "passkey"]["metrics"]["agreement"] == 1.0
    assert len(lines(tmp_path / "run")) == len({json.loads(x)["key"] for x in lines(tmp_path / "run")}) == 12


def test_full_is_added_once_and_the_order_is_shuffled_by_the_seed(go):
    assert [label(s) for s in job("full", "full", "h2o").methods] == ["full", "h2o"]
    both = job("kivi:bits=2", "kivi:bits=4", "h2o")
    assert [both.label(s) for s in both.methods] == ["full", "kivi:bits=2", "kivi:bits=4", "h2o"]
    one = job("xattention:threshold=[0.5,0.9]+kivi").methods[1]
    assert stack_of(label(one)) == one and label(one) == "xattention:threshold=[0.5, 0.9]+kivi"
    orders = []
    for seed in (0, 1, 2, 3):
        told = Count()
        results = go("window:budget=64", "streamingllm:window=60", "h2o:budget=64", out=f"r{seed}", listener=told,
                     tasks=("ppl",), settings=Settings(windows=1, tokens=2, seed=seed))  # fmt: skip
        orders.append([next(r["method"]["label"] for r in results.rows if r["key"] == k) for k in told.rows])
        assert next(r["method"]["label"] for r in results.rows) == "full"
    assert len({tuple(o) for o in orders}) > 1


def test_a_long_list_in_a_label_is_shown_by_four_digits():
    gates = [[i / 97 for i in range(8)]] * 3
    long = f"duoattention:gates={json.dumps(gates)},sparsity=0.25"
    shown = summary.brief(f"xattention:threshold=[0.5, 0.9]+{long}+kivi:bits=4")
    assert re.fullmatch(
        r"xattention:threshold=\[0\.5, 0\.9\]\+duoattention:gates=\[…\w{4}\],sparsity=0\.25\+kivi:bits=4", shown
    )
    assert summary.brief(long) != summary.brief(long.replace("0.0,", "0.5,", 1)) and summary.brief("h2o") == "h2o"
    assert summary.brief("act:text=[no list") == "act:text=[no list"


def test_a_stack_is_applied_together(go):
    results = go("sliding-window:window=64+offload", tasks=("kl",))
    assert not results.errors
    row = results.rows[-1]
    assert row["kind"] == "pattern+cache" and row["cost"]["kept"] == row["cost"]["seen"] > 64
    assert row["cost"]["read_bytes"] < row["cost"]["held_bytes"]


def test_the_model_is_left_as_it_was(go, model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ids = torch.arange(40)[None]
    with torch.no_grad():
        wanted = model(ids).logits
    go("h2o:budget=64", tasks=("ppl",))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, wanted)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# -- going on


@pytest.mark.parametrize("after", [1, 2, 4])
def test_an_interrupted_run_goes_on_and_loses_and_doubles_nothing(go, tmp_path, after):
    with pytest.raises(KeyboardInterrupt):
        go(listener=Stop(after))
    first = lines(tmp_path / "run")
    assert len(first) == after
    told = Count()
    results = go(listener=told)
    assert lines(tmp_path / "run")[:after] == first
    assert len(told.rows) == 6 - after == len(set(told.rows) - {json.loads(x)["key"] for x in first})
    assert len(results.rows) == 6 == len({r["key"] for r in results.rows}) and not results.errors
    again = Count()
    assert go(listener=again).rows == results.rows and not again.rows


def test_a_run_that_is_killed_outright_goes_on(go, model, tokenizer, tmp_path):
    child = os.fork()
    if child == 0:  # nothing but SIGKILL ends this process; no handler and no `finally` runs

        class Kill(Listener):
            def row(self, row, work):
                os.kill(os.getpid(), 9)

        try:
            go(listener=Kill())
        finally:
            os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
    assert len(lines(tmp_path / "run")) == 1
    with (tmp_path / "run" / "results.jsonl").open("a") as f:
        f.write('{"key": "torn", "status": "o')
    results = go()
    assert len(results.rows) == 6 and not results.errors
    assert len({json.loads(x)["key"] for x in lines(tmp_path / "run")}) == 6 == len(lines(tmp_path / "run"))


def test_another_configuration_is_refused_and_says_what_differs(go, tmp_path):
    go(tasks=("ppl",))
    held = lines(tmp_path / "run")
    cases = [
        (dict(contexts=(430,)), "contexts: there [420], now [430]"),
        (dict(settings=Settings(windows=2, tokens=6, depths=(0.2, 0.8), seed=5)), "settings.seed: there 0, now 5"),
        (dict(tasks=("kl",)), "tasks"),
        (dict(text=TEXT + "."), "text.characters"),
        (dict(model=tiny_model(seed=9)), "model.fingerprint"),
    ]
    for change, said in cases:
        with pytest.raises(InvalidInput, match=re.escape(said)):
            go(**({"tasks": ("ppl",)} | change))
    with pytest.raises(InvalidInput, match=r"window:budget=64.*h2o"):
        go("h2o", tasks=("ppl",))
    assert lines(tmp_path / "run") == held
    results = go("h2o:budget=64", tasks=("ppl",), fresh=True)
    assert [r["method"]["label"] for r in results.rows] == ["full", "h2o:budget=64"]
    (old,) = (tmp_path / "run").glob("results-until-*.jsonl")
    assert old.read_text().splitlines() == held


def test_a_folder_of_something_else_is_refused(go, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(InvalidInput, match="holds no run"):
        go()
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match="is a file"):
        go(out="file")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_two_runs_do_not_share_a_folder(tmp_path):
    with RunFolder.open(tmp_path / "r", {"a": 1}):
        with pytest.raises(InvalidInput, match="at work"):
            with RunFolder.open(tmp_path / "r", {"a": 1}):
                pass
    with RunFolder.open(tmp_path / "r", {"a": 1}):
        pass


def test_a_full_disk_loses_no_row(go, tmp_path, monkeypatch):
    real, calls = files._write_all, []

    def full(number, data):
        calls.append(len(data))
        if len(calls) > 2:
            os.write(number, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        real(number, data)

    monkeypatch.setattr(files, "_write_all", full)
    with pytest.raises(StorageError, match="No space left"):
        go()
    monkeypatch.undo()
    assert len(lines(tmp_path / "run")) == 2 and all(json.loads(x)["status"] == "ok" for x in lines(tmp_path / "run"))
    assert len(go().rows) == 6 and len(lines(tmp_path / "run")) == 6


def test_a_damaged_reference_is_made_again(go, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        go(listener=Stop(1))
    (file,) = (tmp_path / "run" / "reference").glob("kl-*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    results = go()
    assert not results.errors
    assert next(r for r in results.rows if r["task"] == "kl")["metrics"]["kl"] < 1e-9


# -- failures


def test_a_method_that_does_not_fit_is_a_row_with_its_reason_and_the_others_go_on(go):
    results = go("kivi:group=64,residual=128", "window:budget=64", tasks=("ppl", "kl"))
    bad = [r for r in results.rows if r["status"] == "error"]
    assert {r["task"] for r in bad} == {"ppl", "kl"} and results.errors == bad
    assert bad[0]["error"]["type"] == "Refused" and "groups of 64" in bad[0]["error"]["message"]
    assert "metrics" not in bad[0] and bad[0]["environment"]
    assert sum(r["status"] == "ok" for r in results.rows) == 4
    told = Count()
    assert (
        go("kivi:group=64,residual=128", "window:budget=64", tasks=("ppl", "kl"), listener=told).errors
        and not told.rows
    )
    go("kivi:group=64,residual=128", "window:budget=64", tasks=("ppl", "kl"), listener=told, retry=True)
    assert len(told.rows) == 2


def test_a_method_that_never_fired_is_an_error(go):
    model = tiny_model()
    layer = model.model.layers[0].self_attn
    model.model.spare = type(layer)(model.config, layer_idx=2)  # an attention that no forward pass reaches
    results = go("window:budget=64", model=model, tasks=("ppl",))
    assert [r["error"]["type"] for r in results.errors] == ["NeverFired"] * 2
    assert "never ran" in results.errors[0]["error"]["message"]


def test_a_crash_inside_a_method_is_a_row_and_the_model_is_reverted(go, model, monkeypatch):
    from qkv.caches.window import Window

    def crash(self, state, view):
        raise RuntimeError("boom <b>")

    monkeypatch.setattr(Window, "rank", crash)
    results = go("window:budget=64", "streamingllm:window=60", tasks=("ppl",))
    assert [(r["method"]["label"], r["error"]["type"]) for r in results.errors] == [
        ("window:budget=64", "RuntimeError")
    ]
    assert "_qkv" not in model.__dict__
    assert next(r for r in results.rows if r["method"]["label"].startswith("stream"))["status"] == "ok"


def test_logits_that_are_not_finite_are_an_error(go, monkeypatch):
    real = Runner._timed

    def spoiled(self, ids, cache, keep):
        logits, seconds = real(self, ids, cache, keep)
        return logits.fill_(math.nan) if label(self.methods).startswith("window") else logits, seconds

    monkeypatch.setattr(Runner, "_timed", spoiled)
    results = go("window:budget=64", tasks=("ppl",))
    assert [(r["status"], r.get("error", {}).get("type")) for r in results.rows] == [
        ("ok", None),
        ("error", "InvalidInput"),
    ]


@pytest.mark.parametrize(("name", "hint"), [("minilm", "distill"), ("retrieval-heads", "inspect")])
def test_methods_that_are_not_applied_are_refused_before_anything_runs(name, hint):
    with pytest.raises(Refused, match=hint):
        job(name)


def test_wrong_input_is_told_before_anything_is_written(go, tmp_path):
    for change, error, said in [
        (dict(tasks=("pppl",)), UnknownName, "did you mean 'ppl'"),
        (dict(contexts=()), InvalidParameter, "no context"),
        (dict(contexts=(1,)), InvalidParameter, "at least 2"),
        (dict(contexts=(60,)), InvalidInput, "too short for the passkey"),
        (dict(contexts=(5000,)), InvalidInput, "longest context it allows here is 1014"),
        (dict(text="too short"), InvalidInput, "longer text"),
    ]:
        with pytest.raises(error, match=said):
            go(**change)
    with pytest.raises(UnknownName, match="did you mean 'h2o'"):
        job("h3o")
    with pytest.raises(InvalidParameter, match="names no method"):
        job("")
    for wrong in (
        dict(windows=0),
        dict(tokens=-1),
        dict(trials=1.5),
        dict(chunk=0),
        dict(depths=(1.5,)),
        dict(depths=()),
    ):
        with pytest.raises(InvalidParameter):
            Settings(**wrong)
    assert not list(tmp_path.iterdir())


# -- protocols


@pytest.fixture
def bench(model, tokenizer):
    return Bench(model, tokenizer, TEXT, SMALL, (200, CONTEXT))


def test_every_task_is_found_by_its_file():
    assert sorted(tasks()) == ["kl", "passkey", "ppl"]
    assert isinstance(task("kl"), kl_task.Divergence)


def test_scored_tokens_are_the_same_at_every_context(bench):
    for short, long in zip(windows(bench, 200), windows(bench, CONTEXT), strict=True):
        assert len(short.prompt) == 200 and len(long.prompt) == CONTEXT
        assert torch.equal(short.prompt, long.prompt[-200:])
        assert torch.equal(short.fed, long.fed) and torch.equal(short.targets[:-1], short.fed[1:])
    a, b = windows(bench, 200)
    assert not torch.equal(a.prompt, b.prompt)


def test_negative_log_likelihood_and_divergence_are_their_definitions():
    torch.manual_seed(0)
    p, q, x = torch.randn(5, 11), torch.randn(5, 11), torch.randint(11, (5,))
    for i in range(5):
        e = [math.exp(v) for v in p[i].tolist()]
        f = [math.exp(v) for v in q[i].tolist()]
        assert ppl.negative_log_likelihood(p, x)[i] == pytest.approx(-math.log(e[x[i]] / sum(e)), rel=1e-6)
        want = sum(a / sum(e) * math.log((a / sum(e)) / (b / sum(f))) for a, b in zip(e, f, strict=True))
        assert kl_task.divergence(p, q)[i] == pytest.approx(want, rel=1e-6)
    assert kl_task.divergence(p, p).max() == 0


def test_ppl_of_the_unmodified_model_is_that_of_one_plain_forward_pass(bench, model):
    outcome = task("ppl").run(Trial(bench, Runner(model)), CONTEXT, {})
    total = count = before = seen = 0
    for w in windows(bench, CONTEXT):
        ids = torch.cat((w.prompt, w.fed, w.targets[-1:]))
        with torch.no_grad():
            logp = model(ids[None]).logits[0].double().log_softmax(-1)
        nll = -logp[:-1].gather(-1, ids[1:, None])[:, 0]
        total, count = total + float(nll[-len(w.targets) :].sum()), count + len(w.targets)
        part = nll[CONTEXT - 128 : CONTEXT - 1]
        before, seen = before + float(part.sum()), seen + len(part)
    assert outcome.metrics["ppl"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert outcome.metrics["ppl_prefill"] == pytest.approx(math.exp(before / seen), rel=1e-5)


def test_a_window_acts_in_decoding_exactly_as_its_mask_says(bench, model):
    """The definition, dense: the steps' logits equal one forward pass under the window's mask."""
    w = windows(bench, 200)[0]
    with qkv.applied(model, "window:budget=50"):
        done = Runner(model, stack_of("window:budget=50")).run(w.prompt, w.fed, keep=1)
    ids = torch.cat((w.prompt, w.fed))
    i = torch.arange(len(ids))
    mask = (i[None] <= i[:, None]) & (i[None] >= i[:, None] - 50)
    with torch.no_grad():
        want = model(ids[None], attention_mask=mask[None, None]).logits[0]
    assert torch.allclose(done.steps, want[-len(w.fed) :], atol=1e-4)


@pytest.mark.parametrize("method", ["window:budget=50", "full"])
def test_prefill_in_chunks_equals_prefill_at_once(bench, model, method):
    w = windows(bench, 200)[0]
    with qkv.applied(model, method):
        one = Runner(model, stack_of(method)).run(w.prompt, w.fed, keep=40)
        cut = Runner(model, stack_of(method), chunk=33).run(w.prompt, w.fed, keep=40)
    assert one.prefill.shape == cut.prefill.shape == (40, one.steps.shape[1])
    assert torch.allclose(one.prefill, cut.prefill, atol=1e-4) and torch.allclose(one.steps, cut.steps, atol=1e-4)


def test_a_share_as_budget_is_of_the_whole_prompt_in_chunks_too(bench, model):
    w = windows(bench, 200)[0]
    with qkv.applied(model, "window:budget=0.25"):
        done = Runner(model, stack_of("window:budget=0.25"), chunk=32).run(w.prompt, w.fed)
    assert done.kept == 50


@pytest.mark.parametrize("context", [CONTEXT, CONTEXT + 1, 500])
def test_passkey_prompts_have_the_context_length_and_hold_the_key_at_its_depth(model, tokenizer, context):
    bench = Bench(model, tokenizer, TEXT, Settings(depths=(0.0, 0.5, 1.0), trials=2), (context,))
    found = passkey.cases(bench, context)
    assert len(found) == 6 and len({c.key for c in found}) == 6
    for c in found:
        assert len(c.haystack) + len(c.question) == context
        text = tokenizer.decode(c.haystack.tolist())
        assert text.count(c.key) == 2 and c.key not in tokenizer.decode(c.question.tolist())
        before = text[: text.index("The pass key")].count("Here we go")
        assert text.startswith(passkey.HEAD) and abs(before - c.depth * text.count("Here we go")) <= 1
    again = passkey.cases(bench, context)
    assert all(a.key == b.key and torch.equal(a.haystack, b.haystack) for a, b in zip(found, again, strict=True))


def test_the_method_sees_the_question_only_when_asked_for(bench, model, monkeypatch):
    seen = []
    real = Runner._timed
    monkeypatch.setattr(
        Runner, "_timed", lambda self, ids, cache, keep: (seen.append(len(ids)), real(self, ids, cache, keep))[1]
    )
    task("passkey").reference(Trial(bench, Runner(model)), CONTEXT)
    question = len(bench.tokens(passkey.QUESTION))
    assert seen[:2] == [CONTEXT - question, question]
    seen.clear()
    aware = Bench(model, bench.tokenizer, TEXT, Settings(query_aware=True, depths=(0.5,)), (CONTEXT,))
    task("passkey").reference(Trial(aware, Runner(model)), CONTEXT)
    assert seen[0] == CONTEXT and question not in seen


def test_what_counts_as_an_answer():
    assert passkey.number(" 12345. Remember") == "12345"
    assert passkey.number(" the key") == "the key"
    assert passkey.number("12 345") == "12"


# -- numbers


def test_spread_is_median_and_tenths():
    s = Spread.of(range(11))
    assert (s.median, s.low, s.high, s.n) == (5, 1, 9, 11)
    assert Spread.of([]) is None and Spread.of([3.0]).to_dict() == {"median": 3.0, "low": 3.0, "high": 3.0, "n": 1}


def test_peak_memory_sees_an_allocation():
    with peak_memory(torch.device("cpu")) as nothing:
        pass
    with peak_memory(torch.device("cpu")) as peak:
        x = torch.ones(8_000_000)
        del x
    if peak.bytes is None:
        pytest.skip(peak.how)
    assert nothing.bytes < 8e6 and 30e6 < peak.bytes < 60e6


def test_cost_gives_medians_over_passes_and_steps(model, bench):
    w = windows(bench, 200)[0]
    with qkv.applied(model, "window:budget=50"):
        runner = Runner(model, stack_of("window:budget=50"))
        passes = [runner.run(w.prompt, w.fed) for _ in range(3)]
    c = cost(passes)
    assert c["token_ms"]["n"] == 3 * SMALL.tokens and c["first_token_s"]["n"] == 3
    assert c["held_bytes"] == passes[-1].held and c["seen"] == 206


def test_records_put_a_method_beside_full(go):
    results = go("window:budget=64", contexts=(CONTEXT, 500))
    found = summary.records(results.rows)
    assert [(r.method, r.context) for r in found] == [
        (m, c) for m in ("full", "window:budget=64") for c in (CONTEXT, 500)
    ]
    full, window = found[0], found[2]
    assert full.ppl_ratio == full.first_ratio == full.token_ratio == 1.0
    assert (
        window.ppl_ratio == window.ppl / full.ppl and window.held_ratio == window.held_bytes / window.full_bytes < 0.2
    )
    assert sorted(found, key=summary.order)[0].method == "full"
    for width in (140, 80):
        for table in summary.tables(found, width):
            assert table.row_count == 2


@pytest.mark.parametrize(("x", "text"), [(0.0012345, "0.00123"), (1.3, "1.30"), (39.0, "39.0"), (1234.6, "1235"), (0, "0"),
                                         (3e-12, "0"), (2.5e7, "2.5e+07"), (None, "–"), (float("nan"), "nan")])  # fmt: skip
def test_numbers_as_text(x, text):
    assert summary.number(x) == text


# -- a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [False, True])
def test_on_a_gpu(tokenizer, tmp_path, graph):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    settings = Settings(windows=2, tokens=40, depths=(0.5,))
    results = run(job("window:budget=64", "streamingllm:window=60", settings=settings, graph=graph), tmp_path / "r",
                  model=tiny_model().cuda(), tokenizer=tokenizer, text=TEXT)  # fmt: skip
    assert not results.errors
    full, window, _ = summary.records(results.rows)
    assert full.kl < 1e-6 and window.kl > 1e-6 and window.held_ratio < 0.25
    assert all(
        r["cost"]["peak_how"] == "cuda allocator" and r["cost"]["peak_bytes"]["median"] > 0 for r in results.rows
    )
    assert results.manifest["identity"]["model"]["device"] == "cuda"


# -- the real model


@pytest.mark.real
def test_a_window_without_sinks_breaks_and_with_sinks_stays_sane(tmp_path):
    job = Job.of("smollm2", ["window:budget=128", "streamingllm:window=124"], [384], ["ppl", "kl"],
                 settings=Settings(windows=2, tokens=12))  # fmt: skip
    results = run(job, tmp_path / "r")
    _, window, sinks = summary.records(results.rows)
    assert window.ppl_prefill_ratio > 1.5 and sinks.ppl_prefill_ratio < 1.2
    assert window.kl > 2 * sinks.kl
