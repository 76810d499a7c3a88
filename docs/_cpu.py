"""The page of decoding, sparse reads, linear attention and patterns on a CPU, and of a long stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from _gpu import Section, sections
from _text import MISSING, cell, fixed, number, picture, table, times

from qkv.bench import _charts as charts
from qkv.bench.environment import read_json

Row = dict[str, Any]
INTRODUCTION = (
    "Plain torch on a few cores, where nobody expects attention to be fast. Methods take turns in one process, so that a busy "
    "machine slows all alike; ratios are medians within a round. A ratio above 1× is faster than the full or dense form, and "
    "stands beside its bound: what the bytes or operations that are left would allow. `qkv bench` on a CPU is among the "
    "[benchmark runs](benchmarks.md)."
)


def page(folder: Path, note: str) -> tuple[str, dict[str, str]]:
    """The text of the page, and its figures by file name."""
    lines = [note, "# On a CPU", "", INTRODUCTION, "", *sections(folder, SECTIONS)]
    path = folder / "stream.json"
    files = _stream_figure(read_json(path)) if path.is_file() else {}
    return "\n".join(lines).rstrip() + "\n", files


def _decode(data: Row) -> list[str]:
    rows = [
        [f"`{r['method']}`", number(r["ms"]), times(r["full_over_method"]), times(r["bound"]),
         fixed(r["held_bytes"], ".1f", 1e-6), fixed(r["share_of_full"], ".0%")]
        for r in data["rows"]
    ]  # fmt: skip
    columns = ("method", "ms per token", "over full", "its bound", "cache MB held", "of full")
    return [f"After {data['context']} tokens, {data['steps']} steps of each.", "", *table(columns, rows), ""]


def _sparse(data: Row) -> list[str]:
    out: list[str] = []
    for shape, context in dict.fromkeys((r["shape"], r["context"]) for r in data["rows"]):
        here = [r for r in data["rows"] if (r["shape"], r["context"]) == (shape, context)]
        rows = [[f"`{r['method']}`", number(r["cpu_ms"]), number(r["wall_ms"]), times(r["ratio"])] for r in here]
        columns = ("method", "processor ms", "wall ms", "over full")
        out += [f"One layer of {shape}, {context} tokens", "", *table(columns, rows), ""]
    return [*out, "All keys over a sixteenth of them bounds the ratio by 16×, less what choosing reads.", ""]


def _linear(data: Row) -> list[str]:
    out: list[str] = []
    for what, says in (("training", "Forward and backward"), ("decoding", "One token")):
        part = data[what]
        b, h, n, d = part["sizes"]
        rows = [
            [name, number(r["ms"]), times(r["ratio"]), times(part["bound"]) if name != "softmax" else MISSING,
             fixed(r.get("bytes_held"), ".0f")]
            for name, r in part["rows"].items()
        ]  # fmt: skip
        columns = ("attention", "ms", "over softmax", "bound of a linear one", "bytes held")
        out += [f"{says}, {n} tokens (B{b} H{h} D{d})", "", *table(columns, rows), ""]
    worst = max(data["errors"].values())
    return [*out, f"Largest relative error of the linear forms to float64: {worst:.1e}.", ""]


def _patterns(data: Row) -> list[str]:
    rows = [
        [cell(r["case"]), number(r["ms"]), times(r["times_faster"]), times(r["bound"]),
         fixed(r.get("density"), ".0%"), "" if r.get("error") is None else f"{r['error']:.1e}"]
        for r in data["rows"]
    ]  # fmt: skip
    columns = ("case", "ms", "over dense", "its bound", "blocks kept", "error")
    sizes = ", ".join(f"{k} {v}" for k, v in data["shape"].items())
    return [
        f"One call, {sizes}. Selection is inside the time where nothing else is said.",
        "",
        *table(columns, rows),
        "",
    ]


def _stream(data: Row) -> list[str]:
    held = sorted({r["cache_bytes"] for r in data["rows"][1:]})
    said = (
        f"{held[0] / 1e6:.2f} MB after every stretch"
        if len(held) == 1
        else f"{held[0] / 1e6:.2f} to {held[-1] / 1e6:.2f} MB"
    )
    rows = [
        [
            str(r["tokens"]),
            number(r["perplexity"]),
            fixed(r["cache_bytes"], ".2f", 1e-6),
            fixed(r.get("peak_bytes"), ".0f", 1e-6),
        ]
        for r in data["rows"]
    ]
    words = f"Perplexity of each stretch along {data['tokens']} tokens through {data['method']}."
    columns = ("tokens so far", "perplexity of the stretch", "cache MB", "peak MB")
    return [f"`{data['method']}`, blocks of {data['block']} tokens; the cache holds {said}.", "", *picture("stream.svg", words),
            *table(columns, rows), ""]  # fmt: skip


def _stream_figure(data: Row) -> dict[str, str]:
    points = [(float(r["tokens"]), float(r["perplexity"])) for r in data["rows"]]
    series = [charts.Series(1, data["method"], points)]
    title = "Perplexity along a stream"
    chart = charts.curves(
        title, series, "tokens so far", "perplexity of the stretch", x_format=charts.thousands, zero=True
    )
    return {"stream.svg": charts.alone(title, chart, [(1, data["method"])])}


SECTIONS: tuple[Section, ...] = (
    ("decode_cpu", "Decoding with a smaller cache",
     "SmolLM2 after a long prompt, one token each per round. The bound is all bytes of weights and full cache over those of "
     "weights and this cache.", _decode),
    ("sparse_cpu", "Sparse reads",
     "One decoding step of one layer that reads a sixteenth of the keys: storing the token, its index, scoring, choosing, "
     "gathering and attending.", _sparse),
    ("linear_cpu", "Linear attention",
     "Chunked linear attention beside torch's fused causal softmax kernel, one thread, float32.", _linear),
    ("patterns_cpu", "Windows and blocks of a prompt",
     "Forms that compute a part of the score map, beside torch's dense attention. The bound is the share that is left.",
     _patterns),
    ("stream", "A stream far beyond the trained length",
     "Real text through one cache of constant size; a row is a stretch of it. This one needs no CPU; its machine stands below.",
     _stream),
)  # fmt: skip
