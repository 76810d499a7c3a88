"""The page of kernels and decoding on one GPU: every ratio beside its bound, every table beside its command."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from _text import MISSING, cell, fixed, folded, number, picture, prose, shell, table, times, where

from qkv.bench import _charts as charts
from qkv.bench.environment import read_json

Row = dict[str, Any]
Section = tuple[str, str, str, Callable[[Row], list[str]]]
"""Name of the result file, title, what a reader must know, and what makes its lines."""
INTRODUCTION = (
    "What kernels take beside what they could take. A bound is what the bytes (or, where those cost more, the "
    "operations) take at the rate at which this device was measured to copy (or multiply) in the same process: the "
    "distance to it is what is left to gain. A kernel that only reads can be somewhat faster than a copy, which also "
    "writes. A ratio above 1× is faster than what it is compared with. All numbers of a table come from one process on "
    "one machine: compare within a table, not between tables. How a decoding step becomes a graph: [CUDA "
    "graphs](guides/graphs.md)."
)


def page(folder: Path, note: str) -> tuple[str, dict[str, str]]:
    """The text of the page, and its figures by file name."""
    text = "\n".join([note, "# On one GPU", "", INTRODUCTION, "", *sections(folder, SECTIONS)]).rstrip() + "\n"
    files: dict[str, str] = {}
    for file, made in (("attention_gpu", _attention_bars), ("sparse_gpu", _sparse_bars)):
        if (folder / f"{file}.json").is_file():
            files |= {name: _bars(title, rows) for name, title, rows in made(read_json(folder / f"{file}.json"))}
    return text, files


Bars = tuple[str, str, list[tuple[str, float, float | None]]]
"""File, title, and rows: name, ratio, bound."""


def _bars(title: str, rows: list[tuple[str, float, float | None]]) -> str:
    chart, height = charts.bars(title, rows)
    return charts.alone(title, chart, [], height)


def _shown(bars: Sequence[Bars]) -> list[str]:
    """The lines that show them."""
    words = "{}: how many times faster each of {} methods is, as a bar inside its bound; the numbers are in the table."
    return [line for name, title, rows in bars for line in picture(name, words.format(title, len(rows)))]


def _attention_bars(data: Row) -> list[Bars]:
    rows = data["rows"]
    whole = next((r["held_bytes"] for r in rows if r["method"] == "full" and "held_bytes" in r), None)
    made = [(r["method"], float(r["best_exact_over_method"]), _bound(whole, r["held_bytes"]))
            for r in rows if r["method"] != "full" and r.get("best_exact_over_method")]  # fmt: skip
    title = f"{data['batch']} x {data['context']}: times the best exact kernel"
    return [("gpu-attention.svg", title, made)] if made else []


def _bound(whole: int | None, held: int) -> float | None:
    """Of a method that holds less than everything, by the bytes."""
    return whole / held if whole and held < 0.95 * whole else None


def _sparse_bars(data: Row) -> list[Bars]:
    out: list[Bars] = []
    rows = data.get("attention", [])
    for shape in dict.fromkeys(tuple(r["shape"]) for r in rows):
        here = [r for r in rows if tuple(r["shape"]) == shape]
        made = [
            (r["name"], float(r["over_full"]), here[0]["bound_ms"] / r["bound_ms"]) for r in here if "over_full" in r
        ]
        if made:
            out.append(
                (f"gpu-sparse-{shape[0]}-{shape[3]}.svg", f"Sparse reads, {shape[0]} x {shape[3]}: times full", made)
            )
    return out


def sections(folder: Path, wanted: Sequence[Section]) -> list[str]:
    """A section for each result file, or where to get it."""
    out = []
    for file, title, says, body in wanted:
        path = folder / f"{file}.json"
        out += [f"## {title}", "", says, ""]
        if not path.is_file():
            out += ["Not recorded.", "", *shell(_plain_command(file))]
            continue
        data = read_json(path)
        facts = data.get("environment", data)
        out += [*body(data), *_notes(data), *shell(data.get("command") or _command(file, data)), where(facts), ""]
    return out


def _plain_command(file: str) -> str:
    if file.startswith("decode_gpu_"):
        script, more = "decode_gpu", ""
    else:
        script, more = ("linear_gpu", " --part checks") if file == "linear_checks" else (file, "")
    return f"python benchmarks/{script}.py --out benchmarks/results/{file}.json{more}"


def _command(file: str, data: Row) -> str:
    """What makes such a file again, with the settings that can be read off its rows."""
    more = ""
    if file.startswith("decode_gpu"):
        rows = [r for r in data["rows"] if "batch" in r]
        more = " --shapes " + " ".join(dict.fromkeys(f"{r['batch']}x{r['context']}" for r in rows))
        if data["model"]["num_hidden_layers"] != 8:
            more += f" --layers {data['model']['num_hidden_layers']}"
        more += f" --new {data['new']}" if data.get("new") else ""
        more += "".join(f" --{k} {' '.join(data[k])}" for k in ("plain", "no-static") if data.get(k))
        more += " --no-peers" if data.get("no-peers") else ""
        methods = [r["what"].removesuffix(" graph") for r in rows if r["what"].endswith(" graph")]
        more += "".join(f" -m {m}" for m in dict.fromkeys(methods) if m != "full")
    if file == "prefill_gpu":
        more = " --shapes " + " ".join(dict.fromkeys(f"{r['batch']}x{r['context']}" for r in data["prompts"]))
    if file == "attention_gpu" and (data["batch"], data["context"]) != (16, 32768):
        more = f" --batch {data['batch']} --context {data['context']}"
    if file == "decode_cpu":
        given = (("context", 8192), ("steps", 24))
        more = "".join(f" --{k} {data[k]}" for k, default in given if data[k] != default)
    return _plain_command(file) + more


def _notes(data: Row) -> list[str]:
    """What the file says of itself, and what was not run."""
    out = [prose(data["note"]), ""] if data.get("note") else []
    every = [x for key in ("not run", "model not run", "peer") for x in data.get(key, ())]
    missing = [", ".join(map(str, x)) if isinstance(x, list) else str(x) for x in every]
    return out + (["Not run:", "", *(f"- {cell(x)}" for x in missing), ""] if missing else [])


def _least(values: Sequence[float | None]) -> float | None:
    return min((v for v in values if isinstance(v, (int, float))), default=None)


def _over(a: float | None, b: float | None) -> str:
    return times(a / b) if isinstance(a, (int, float)) and isinstance(b, (int, float)) and b else MISSING


def _ms(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, (int, float)) and not isinstance(value, bool) else MISSING


def _shape(sizes: Sequence[int], names: str = "BHGMD") -> str:
    return "`" + " ".join(f"{n}{x}" for n, x in zip(names, sizes, strict=False)) + "`"


def _errors(rows: Sequence[Row], name: str) -> list[str]:
    """Rows that hold a reason instead of a time."""
    bad = [f"- `{cell(r[name])}`: {cell(r['error'])[:200]}" for r in rows if isinstance(r.get("error"), str)]
    return ["Failed:", "", *bad, ""] if bad else []


# -- one section each -------------------------------------------------------------------------------------------------


def _decode(data: Row) -> list[str]:
    out: list[str] = []
    weights, rows = data["weight_bytes"], data["rows"]
    for b, n in dict.fromkeys((r["batch"], r["context"]) for r in rows):
        here = [r for r in rows if (r["batch"], r["context"]) == (b, n)]
        here.sort(key=lambda r: "cache_bytes" in r)  # transformers' own caches first
        by = {r["what"]: r.get("ms_per_token") for r in here}
        static = next((v for k, v in by.items() if k.startswith("transformers static")), None)
        whole = next((r["cache_bytes"] for r in here if r["what"] == "full graph" and "cache_bytes" in r), None)
        lines = []
        for r in here:
            held, ms = r.get("cache_bytes"), r.get("ms_per_token")
            bound = (weights + whole) / (weights + held) if whole and held else None
            lines.append(
                [
                    f"`{r['what']}`" if held else r["what"],
                    _ms(ms),
                    _over(static, ms),
                    _over(by.get("full graph"), ms),
                    times(bound),
                    fixed(held, ".2f", 1e-9),
                    fixed(r.get("peak_gb"), ".1f"),
                    fixed(r.get("first_call_s"), ".1f"),
                    fixed(r.get("equal_tokens"), ".0%"),
                ]
            )
        columns = (
            "what",
            "ms per token",
            "over static",
            "over full graph",
            "its bound",
            "cache GB",
            "peak GB",
            "first call s",
            "tokens as plain",
        )
        out += [f"Batch {b}, {n} tokens of context", "", *table(columns, lines), "", *_errors(here, "what")]
    lines = []
    for r in data.get("kernel", ()):
        peers = r.get("peers_ms", {})
        best = _least(list(peers.values()))
        lines.append(
            [
                _shape(r["shape"]),
                _ms(r["ms"]),
                number(r["TB/s"], 3),
                *(_ms(peers.get(p)) for p in PEERS),
                _over(best, r["ms"]),
                f"{r['relative_error']:.1e}",
            ]
        )
    if lines:
        columns = (
            "shape",
            "ms",
            "TB/s",
            "torch flash, ms",
            "torch cuDNN, ms",
            "over the best of torch",
            "error to float64",
        )
        out += [
            "The decode kernel alone (B batch, H heads, G KV heads, M keys, D width)",
            "",
            *table(columns, lines),
            "",
        ]
    return out


PEERS = ("FLASH_ATTENTION", "CUDNN_ATTENTION")


def _attention(data: Row) -> list[str]:
    rows = data["rows"]
    whole = next((r["held_bytes"] for r in rows if r["method"] == "full" and "held_bytes" in r), None)
    lines = []
    for r in rows:
        held = r.get("held_bytes")
        lines.append(
            [
                f"`{r['method']}`" if held else r["method"],
                _ms(r.get("ms")),
                times(r.get("best_exact_over_method")),
                times(r.get("full_over_method")),
                times(_bound(whole, held) if held else None),
                fixed(held, ".3f", 1e-9),
                _ms(r.get("copy_ms")),
            ]
        )
    columns = ("method", "ms", "over best exact", "over full", "bound by bytes held", "holds GB", "copying as much, ms")
    sizes = ("batch", "context", "heads", "kv_heads", "width")
    about = "{} rows, {} tokens, {} heads, {} KV heads, width {}.".format(*(data[k] for k in sizes))
    more = "A method that holds everything and reads a part has its bound under [sparse reads](#sparse-reads)."
    return [
        about + " " + more,
        "",
        *_shown(_attention_bars(data)),
        *table(columns, lines),
        "",
        *_errors(rows, "method"),
    ]


def _sparse(data: Row) -> list[str]:
    out: list[str] = []
    rows = data.get("attention", [])
    for shape in dict.fromkeys(tuple(r["shape"]) for r in rows):
        here = [r for r in rows if tuple(r["shape"]) == shape]
        whole = here[0]["bound_ms"]
        lines = []
        for r in here:
            part = r["name"].startswith("  ")
            name = r["name"].strip()
            name = f"– of it: {name}" if part else f"`{name}`" if ":" in name else name
            method = "over_full" in r
            lines.append(
                [
                    name,
                    _ms(r["ms"]),
                    _ms(r["bound_ms"]),
                    times(r.get("over_full")),
                    times(r.get("over_best_exact")),
                    times(whole / r["bound_ms"]) if method else MISSING,
                    fixed(r.get("index_bytes"), ".0f", 1e-6),
                ]
            )
        columns = ("step", "ms", "bound, ms", "over full", "over best exact", "bound of the ratio", "index read, MB")
        name = f"gpu-sparse-{shape[0]}-{shape[3]}.svg"
        shown = _shown([b for b in _sparse_bars(data) if b[0] == name])
        out += [f"One layer, {_shape(shape)}", "", *shown, *table(columns, lines), ""]
    for shape in dict.fromkeys((r["model"], r["batch"], r["context"]) for r in data.get("model", ())):
        here = [r for r in data["model"] if (r["model"], r["batch"], r["context"]) == shape]
        full = next((r["ms_per_token"] for r in here if r["method"] == "full"), None)
        lines = [
            [
                f"`{r['method']}`",
                _ms(r["ms_per_token"]),
                _over(full, r["ms_per_token"]),
                fixed(r.get("tokens_as_plain"), ".0%"),
            ]
            for r in here
        ]
        out += [
            f"{shape[0]}, batch {shape[1]}, {shape[2]} tokens of context",
            "",
            *table(("method", "ms per token", "over full", "tokens as plain"), lines),
            "",
        ]
    checks = data.get("checks")
    if isinstance(checks, dict):
        checks = [{"method": k, "error": v} for k, v in checks.items()]
    if checks:
        lines = [
            [
                f"`{c['method']}`",
                f"{c['error']:.1e}",
                "–" if "error_of_plain" not in c else f"{c['error_of_plain']:.1e}",
            ]
            for c in checks
        ]
        columns = ("method", "error of the captured step to float64", "of the plain step")
        out += folded("Checks before timing", table(columns, lines))
    return out


def _linear(data: Row) -> list[str]:
    out: list[str] = []
    for what, title in (("forward", "Forward"), ("both", "Forward and backward")):
        lines = []
        for r in data.get("times", ()):
            ours, theirs, floor = (r.get(f"{k}_{what}_ms") for k in ("ours", "fla", "floor"))
            refused = isinstance(theirs, str)
            lines.append(
                [
                    _shape(r["sizes"], "BHTD"),
                    r["what"],
                    _ms(ours),
                    "refused" if refused else _ms(theirs),
                    _ms(floor),
                    _over(theirs, ours),
                    _over(theirs, floor),
                    _over(ours, floor),
                    {True: "yes", False: "NO", None: "not here"}[r.get("passed")],
                ]
            )
        columns = (
            "shape",
            "decay",
            "ours, ms",
            "fla, ms",
            "floor, ms",
            "over fla",
            "bound of that ratio",
            "ours over its floor",
            "checked",
        )
        if lines:
            out += [title, "", *table(columns, lines, 2), ""]
    said = [r.get(k) for r in data.get("times", ()) for k in ("fla_forward_ms", "fla_both_ms")]
    why = sorted({x for x in said if isinstance(x, str)})
    out += [*(f"Refused by fla: {cell(x)[:300]}" for x in why), ""] if why else []
    lines = [
        [
            _shape(r["sizes"], "BHTD"),
            _ms(r.get("triton_ms")),
            _ms(r.get("recurrent_ms")),
            f"{r['floor_ms']:.4f}",
            _over(r.get("recurrent_ms"), r.get("triton_ms")),
            _over(r.get("recurrent_ms"), r["floor_ms"]),
        ]
        for r in data.get("steps", ())
    ]
    if lines:
        columns = ("shape", "fused step, ms", "plain torch, ms", "floor, ms", "over plain", "bound of that ratio")
        out += ["One token", "", *table(columns, lines), ""]
    limits = data.get("ceilings")
    if limits:
        out += [
            f"Floors from {limits['TB/s']:.2f} TB/s copied, {limits['TFLOP/s']:.0f} TFLOP/s multiplied in this process.",
            "",
        ]
    return out


def _checks(data: Row) -> list[str]:
    rows = data.get("checks", ())
    lines = []
    for r in rows:
        errors = r.get("errors") or {}
        worst = max(errors, key=errors.__getitem__, default=None)
        lines.append(
            [
                _shape(r["sizes"], "BHGTDE"),
                r["dtype"],
                r["gate"],
                str(r["decay"]),
                f"{errors[worst]:.1e} ({worst})" if worst else cell(str(r.get("error", MISSING)))[:120],
                "yes" if r["passed"] else "NO",
            ]
        )
    passed = sum(bool(r["passed"]) for r in rows)
    columns = ("shape", "dtype", "decay", "log decay", "largest relative error", "passed")
    return [f"{passed} of {len(rows)} passed.", "", *folded("Every check", table(columns, lines, 4))]


def _kernel(data: Row) -> list[str]:
    lines = []
    for r in data["rows"]:
        best, exact = min(r["tried"], key=lambda t: t["ms"]), _least([r.get(p) for p in PEERS])
        settings = ", ".join(f"{k} {best[k]}" for k in ("splits", "block", "warps", "stages"))
        lines.append(
            [
                _shape(r["shape"]),
                _ms(r["default_ms"]),
                _ms(best["ms"]),
                *(_ms(r.get(p)) for p in PEERS),
                _ms(r["copy_ms"]),
                _over(exact, r["default_ms"]),
                _over(exact, r["copy_ms"]),
                settings,
            ]
        )
    columns = (
        "shape",
        "as launched, ms",
        "best tried, ms",
        "torch flash, ms",
        "torch cuDNN, ms",
        "copy, ms",
        "over the best of torch",
        "bound of that ratio",
        "best settings",
    )
    return [*table(columns, lines), ""]


def _packed(data: Row) -> list[str]:
    lines = []
    plain = {(r["batch"], r["tokens"]): r for r in data["rows"] if r["bits"] == 16}
    for r in data["rows"]:
        if "block" in r:
            continue  # tried launch settings
        peer = plain.get((r["batch"], r.get("tokens"))) or next(
            (p for k, p in plain.items() if k[0] == r["batch"]), None
        )
        exact = _least([peer.get(k) for k in (*PEERS, "decode_attention")]) if peer else None
        ours = r["bits"] == 16
        lines.append(
            [
                f"`B{r['batch']} M{r['tokens']}`",
                str(r["bits"]),
                _ms(r.get("decode_attention") if ours else r["ms"]),
                *(_ms(r.get(p)) for p in PEERS),
                MISSING if ours else _over(exact, r["ms"]),
                MISSING if ours or not peer else _over(peer["bytes"], r["bytes"]),
                fixed(r["bytes"], ".3f", 1e-9),
                fixed(r.get("TB/s"), ".2f"),
                _ms(r.get("store_ms")),
                f"{r['relative_error']:.1e}" if "relative_error" in r else MISSING,
            ]
        )
    columns = (
        "shape",
        "bits",
        "ours, ms",
        "torch flash, ms",
        "torch cuDNN, ms",
        "over best exact",
        "bound by bytes",
        "GB",
        "TB/s",
        "storing a token, ms",
        "error to float64",
    )
    return [*table(columns, lines, 2), ""]


def _prefill(data: Row) -> list[str]:
    out: list[str] = []
    for b, n in dict.fromkeys((r["batch"], r["context"]) for r in data["prompts"]):
        here = [r for r in data["prompts"] if (r["batch"], r["context"]) == (b, n)]
        by = {r["what"]: r.get("seconds") for r in here}
        rows = [
            [
                r["what"] if r["what"].startswith("transformers") else f"`{r['what']}`",
                _ms(r.get("seconds")),
                _over(by.get("transformers dynamic"), r.get("seconds")),
                _over(by.get("full"), r.get("seconds")),
                fixed(r.get("peak_gb"), ".2f"),
            ]
            for r in here
        ]
        columns = ("what", "seconds", "over dynamic", "over full", "peak beside the weights, GB")
        out += [f"Batch {b}, {n} tokens", "", *table(columns, rows), "", *_errors(here, "what")]
    rows = [
        [
            _shape(r["shape"], "BHGNMD"),
            *(_ms(r[f"{k}_ms"]) for k in ("ours", "torch", "masses")),
            _over(r["torch_ms"], r["ours_ms"]),
            *(str(r[f"{k}_TFLOPs"]) for k in ("ours", "torch", "masses")),
            f"{r['error']:.1e}",
        ]
        for r in data["kernels"]
    ]
    columns = (
        "shape",
        "ours, ms",
        "torch flash, ms",
        "column masses, ms",
        "over torch",
        "ours, TFLOP/s",
        "torch, TFLOP/s",
        "masses, TFLOP/s",
        "error to float64",
    )
    return [*out, "The block kernels alone, causal, N queries at the end of M keys", "", *table(columns, rows), ""]


def _lines(data: Row) -> list[str]:
    rows = [
        [
            str(r["length"]),
            str(r["layer"]),
            f"{r['alpha']}",
            f"{r['share']:.1%}",
            f"{r['tiles']:.0%}",
            _ms(r["choose_ms"]),
            _ms(r["kernel_ms"]),
            _ms(r["exact_ms"]),
            _over(r["exact_ms"], r["kernel_ms"]),
            times(1 / r["tiles"]),
            _ms(r["gathered_ms"]),
            f"{r['error']:.1e}",
        ]
        for r in data["rows"]
    ]
    columns = (
        "tokens",
        "layer",
        "alpha",
        "cells on lines",
        "tiles computed",
        "choosing, ms",
        "kernel, ms",
        "exact, ms",
        "over exact",
        "its bound",
        "gathered in torch, ms",
        "error to float64",
    )
    return [*table(columns, rows), ""]


SECTIONS: tuple[Section, ...] = (
    (
        "decode_gpu",
        "A whole model decoding",
        "A model of an 8B Llama's shape with fewer layers and random weights (cost only), bfloat16, greedy, against "
        "transformers' own caches. `graph` rows replay one captured step; `plain` rows launch every kernel from the host. "
        "The bound of `over full graph` is all bytes of weights and full cache over those of weights and this cache. "
        "`tokens as plain`: share of tokens equal to plain decoding; with random weights a near-tie in bfloat16 ends the "
        "agreement.",
        _decode,
    ),
    (
        "decode_gpu_8k",
        "A whole model decoding one row",
        "The same with one row of 8192 tokens, where the weights are most of what is read, with the plain steps beside.",
        _decode,
    ),
    (
        "decode_gpu_long",
        "A whole model decoding: other batches and lengths",
        "The same on a GPU of another kind. Other work ran on the host, on cores and a GPU of its own.",
        _decode,
    ),
    (
        "decode_gpu_wide",
        "A whole model decoding: eight rows of 131072 tokens",
        "The same at the length where the cache is nearly all that is read. Transformers' static cache was left out to "
        "save time. Other work ran on the host, on cores and a GPU of its own.",
        _decode,
    ),
    (
        "decode_gpu_wide_more",
        "A whole model decoding: eight rows of 131072 tokens, other caches",
        "The same shape and kind of GPU in another run, without transformers' caches.",
        _decode,
    ),
    (
        "attention_gpu",
        "One step of one attention site",
        "Everything that decoding does at a site, as a captured graph: the new token is stored, what is read is chosen, "
        "attention runs, something is evicted or packed. `over best exact` compares with torch's fastest exact kernel over "
        "all keys.",
        _attention,
    ),
    (
        "sparse_gpu",
        "Sparse reads",
        "A sixteenth of the keys is chosen and read, nothing is evicted; choosing is inside the time.",
        _sparse,
    ),
    (
        "prefill_gpu",
        "Prompts",
        "The time to the first token of each cache in a model of an 8B Llama's shape with few layers and random weights, the "
        "prompt in pieces of 4096; what compresses does so inside this time. Evicting caches also need column masses of the "
        "attention map, which a kernel of their own gives without the map.",
        _prefill,
    ),
    (
        "lines_gpu",
        "Prompts on vertical and slash lines",
        "One site of SmolLM2 on a play, as LoopServe reads a prompt: few cells lie on lines, but slashes cross most tiles, and "
        "a tenth of the rows is computed exactly to choose them. At these lengths exact attention is faster than choosing alone.",
        _lines,
    ),
    (
        "packed_gpu",
        "Packed caches",
        "Attention over 2, 4 and 8-bit words, unpacked in registers, beside the same tokens in bfloat16.",
        _packed,
    ),
    (
        "linear_gpu",
        "The decayed linear core",
        "Chunked linear attention with a decay per step (scalar), per channel (vector), fixed or none, bfloat16, beside "
        "flash-linear-attention in the same process.",
        _linear,
    ),
    (
        "linear_checks",
        "The decayed linear core against float64",
        "Output, state and every gradient, over dtypes, decays and odd sizes.",
        _checks,
    ),
    (
        "decode_kernel_gpu",
        "The decode kernel's launch settings",
        "Each setting is checked against float64, then timed.",
        _kernel,
    ),
)
