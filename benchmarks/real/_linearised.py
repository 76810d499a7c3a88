"""Shared by the checks of linearised models: stages of training beside equally tuned controls, memory of a long stream.

Everything that fine-tuning could teach the source as well (the author, the form) is taken out by two controls that see the same
text for as many steps: the source itself, and its window alone (gates that forget at once).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from _passkey import ask, hidden
from _streams import arguments, clock, load, perplexity
from torch import Tensor

import qkv
from qkv.bench.assets import long_text
from qkv.bench.record import Figure, record
from qkv.convert._common.linearise import Linearisation
from qkv.convert._common.training import Keeper
from qkv.core.conversion import Lessons
from qkv.hosts import graph as graphs

ROW, BATCH, STEPS = 1024, 8, 100
LENGTHS = ((1024, 32), (4096, 8), (8192, 4))  # tokens of a held-out window, windows
MARKS = (1024, 4096, 16384, 65536)
RATE = 5e-4  # of the fine-tuning, for the method and both controls: the published 1e-4 is for runs twenty times as long
EVERYTHING = 1 << 20


class Study:
    """One model, one text cut in two, and what has been measured so far; the record is written anew after every part."""

    def __init__(self, a: argparse.Namespace, method: Linearisation, claim: str) -> None:
        self.a, self.claim, self.since = a, claim, time.perf_counter()
        torch.backends.cuda.matmul.allow_tf32 = True
        self.model, self.tokenizer = load(a)
        if a.quick:
            self.row, batch, steps, self.lengths, self.marks = 128, 1, 2, ((256, 1),), (64, 160, 320)
            method = method.replace(window=32, transfer=1, tune=1)  # type: ignore[assignment]
        else:
            self.row, batch, steps, self.lengths, self.marks = ROW, BATCH, STEPS, LENGTHS, MARKS
        self.method = method
        text = long_text()[: 200_000 if a.quick else None]
        ids = torch.tensor(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        cut = ids.shape[0] * 9 // 10
        starts = torch.linspace(0, cut - self.row, steps * batch).long()
        rows = torch.stack([ids[s : s + self.row] for s in starts])
        self.data = [{"input_ids": x.to(a.device)} for x in rows.split(batch)]
        self.held, self.steps, self.batch = ids[cut:], steps, batch
        self.table: list[dict[str, Any]] = []
        self.figures: list[Figure] = []
        self.trained = f"{steps} steps of {batch} x {self.row} tokens of plays per stage"
        clock(f"{ids.shape[0]} tokens of text", self.since)

    def write(self) -> None:
        """The record of what is known by now."""
        id, a = self.method.id, self.a
        record(id, claim=self.claim, figures=self.figures, command=f"python benchmarks/real/{id}.py --device {a.device}",
               seed=0, table=self.table, folder=a.folder)  # fmt: skip

    # -- perplexity ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def perplexities(self, name: str) -> dict[str, float]:
        """Of held-out windows of each length, all tokens; a row of the table."""
        out: dict[str, float] = {}
        for length, count in self.lengths:
            starts = torch.linspace(0, self.held.shape[0] - length - 1, count).long()
            lost = []
            for s in starts:
                ids = self.held[s : s + length].to(self.a.device)[None]
                logits = self.model(ids, use_cache=False).logits[0, :-1].float()
                lost.append(F.cross_entropy(logits, ids[0, 1:], reduction="none"))
            out[str(length)] = perplexity(torch.cat(lost))
        self.table.append({"model": name} | {f"perplexity at {k}": v for k, v in out.items()})
        note = f"held-out plays; {', '.join(f'{n} windows of {t}' for t, n in self.lengths)}"
        self.figures += [Figure(f"perplexity at {k}, {name}", v, "", note) for k, v in out.items()]
        self.write()
        clock(f"{name}: {out}", self.since)
        return out

    # -- training -----------------------------------------------------------------------------------------------------

    def tell(self, done: int, total: int, note: str) -> None:
        """Progress of a stage."""
        self.last = float(note.rpartition(" ")[2])
        if done == 1 or done == total or done % 25 == 0:
            clock(f"{done} of {total}, {note}", self.since)

    def converted(self, method: Linearisation) -> None:
        """Convert, with all the training the settings ask for."""
        qkv.apply(self.model, method, data=Lessons(batches=self.data, progress=self.tell))

    def stages(self) -> None:
        """Before, after the transfer, after fine-tuning; the model stays converted."""
        self.converted(self.method.replace(transfer=0, tune=0))  # type: ignore[arg-type]
        self.perplexities("converted, untrained")
        qkv.revert(self.model)
        began = time.perf_counter()
        first: list[float] = []

        def tell(done: int, total: int, note: str) -> None:
            self.tell(done, total, note)
            first.append(self.last)

        only = self.method.replace(tune=0, transfer=1)
        qkv.apply(self.model, only, data=Lessons(batches=self.data, progress=tell))
        note = f"1000 x summed error of the heads' outputs over all layers; {self.trained}"
        self.figures += [Figure("transfer loss at the first step", first[0], "", note),
                         Figure("transfer loss at the last step", first[-1], "", note),
                         Figure("transfer", round(time.perf_counter() - began, 1), "s", self.trained)]  # fmt: skip
        self.perplexities("after the transfer")
        began = time.perf_counter()
        layers = {s.name: self.model.get_submodule(s.name) for s in qkv.sites(self.model)}
        keeper = Keeper(Lessons(batches=self.data, progress=self.tell), ("tune",), {})
        tuning = self.method.replace(tune=1, tune_rate=RATE)
        tuning.fine_tune(self.model, layers, self.data, keeper)  # type: ignore[attr-defined]
        self.figures.append(Figure("fine-tuning", round(time.perf_counter() - began, 1), "s", self.trained))
        self.perplexities("after fine-tuning")

    def controls(self, alone: Linearisation, whole: Linearisation) -> None:
        """The source and its window alone, as they are and tuned for as many steps. Converts and reverts."""
        self.perplexities("source")
        window = getattr(self.method, "window")  # noqa: B009
        for name, sinks in (("window alone", 0), ("window and 4 first tokens", 4)):
            with qkv.applied(self.model, f"sliding-window:window={window},sinks={sinks}"):
                self.perplexities(name)
        for name, control in (("source, tuned alike", whole), ("window alone, tuned alike", alone)):
            self.converted(control.replace(transfer=0, tune=1, tune_rate=RATE))  # type: ignore[arg-type]
            self.perplexities(name)
            qkv.revert(self.model)

    # -- memory -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def stream(self, seconds: float) -> None:
        """One long text: tokens generated for `seconds`, then real text in blocks; bytes held and loss on the way."""
        model, device = self.model, self.a.device
        ids = torch.cat([self.held, self.held])[: self.marks[-1] + 1].to(device)[None]
        cache, at, lost, marks = None, 0, [], list(self.marks)
        bytes_at: dict[int, int] = {}
        part = self.marks[0]
        while at < self.marks[-1]:
            n = min(part, marks[0] - at)
            out = model(ids[:, at : at + n], past_key_values=cache, use_cache=True)
            cache, at = out.past_key_values, at + n
            lost.append(F.cross_entropy(out.logits[0].float(), ids[0, at - n + 1 : at + 1], reduction="none").cpu())
            if at == marks[0]:
                bytes_at[marks.pop(0)] = qkv.report(model).bytes
        full = qkv.report(model).full_bytes
        loss, begin = torch.cat(lost), 0
        for mark in self.marks:
            self.figures.append(
                Figure(f"bytes held after {mark} tokens", bytes_at[mark], "bytes", "one row, all layers")
            )
            found = perplexity(loss[begin:mark])
            self.figures.append(
                Figure(f"perplexity of tokens {begin} to {mark} of one stream", found, "", "held-out plays")
            )
            begin = mark
        self.figures.append(
            Figure(f"bytes of a plain cache after {self.marks[-1]} tokens", full, "bytes", "same dtype")
        )
        self.write()
        clock(f"bytes {bytes_at}, {full} in a plain cache", self.since)
        self.generate(ids[:, : self.marks[0]], seconds)

    def generate(self, prompt: Tensor, seconds: float) -> None:
        """Greedy decoding, plainly for a moment, then (on CUDA) as a graph for `seconds` or up to the last mark."""
        plain = self.decode(prompt, "decoding", min(seconds, 5.0))
        if self.model.device.type != "cuda":
            return
        session = self.model.__dict__["_qkv"]
        session.graph = graphs.install(session)
        fast = self.decode(prompt, "decoding as a graph", seconds)
        session.graph.remove()
        session.graph = None
        same = sum(a == b for a, b in zip(plain, fast, strict=False)) / len(plain)
        self.figures.append(
            Figure("tokens of the graph equal to plain decoding", round(same, 4), "", f"of {len(plain)}")
        )
        self.write()

    @torch.no_grad()
    def decode(self, prompt: Tensor, name: str, seconds: float) -> list[int]:
        """Generated tokens; bytes held and milliseconds a token as it goes on."""
        model = self.model
        out = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        cache, token, tokens = out.past_key_values, out.logits[:, -1:].argmax(-1), []
        start, sizes = time.perf_counter(), set()
        while len(tokens) < self.marks[-1] and time.perf_counter() - start < seconds:
            some = []
            for _ in range(32):
                some.append(token)
                out = model(input_ids=token, past_key_values=cache, use_cache=True)
                token = out.logits[:, -1:].argmax(-1)
            tokens += torch.cat(some, 1)[0].tolist()
            sizes.add(sum(layer.memory.bytes() for layer in cache.layers))
        each = 1000 * (time.perf_counter() - start) / max(1, len(tokens))
        note = f"after a prompt of {prompt.shape[1]}, one row, {self.a.dtype}"
        self.figures += [
            Figure(f"tokens generated, {name}", len(tokens), "", note),
            Figure(
                f"sizes of the memory meanwhile, {name}", len(sizes), "", f"bytes: {', '.join(map(str, sorted(sizes)))}"
            ),
            Figure(name, round(each, 2), "ms/token", note),
        ]
        self.write()
        clock(f"{name}: {len(tokens)} tokens at {each:.2f} ms, memory {sorted(sizes)}", self.since)
        return tokens

    # -- a hidden number ----------------------------------------------------------------------------------------------

    def passkeys(self, name: str) -> dict[int, float]:
        """Share of hidden numbers found, inside the window and far outside."""
        window, out = int(getattr(self.method, "window")), {}  # noqa: B009
        lengths, trials = ((window - 6, 600), 8) if not self.a.quick else ((110,), 1)
        for length in lengths:
            cases = hidden(self.tokenizer, max(100, length), (0.0,), trials)
            found = [case.key in ask(self.model, self.tokenizer, case) for case in cases]
            out[length] = sum(found) / len(found)
            self.figures.append(Figure(f"hidden number found in {max(100, length)} tokens, {name}", out[length], "",
                                       f"share of {trials}, window {window}"))  # fmt: skip
        self.write()
        clock(f"{name}: hidden number {out}", self.since)
        return out


def main(
    description: str | None, method: Linearisation, claim: str, *, more: Sequence[Callable[[Study], None]] = ()
) -> Study:
    """Controls, stages, what `more` measures on the converted model, memory."""
    study = Study(arguments(description), method, claim)
    lizard: Any = qkv.method("lizard")
    sizes = {"num_meta": 0, "feature_dim": getattr(method, "feature_dim")}  # noqa: B009
    study.controls(
        lizard.replace(window=getattr(study.method, "window"), gate_bias=-80.0, **sizes),  # noqa: B009
        lizard.replace(window=EVERYTHING, **sizes),
    )
    study.stages()
    for one in more:
        one(study)
    study.stream(2.0 if study.a.quick else 30.0)
    held = {f.value for f in study.figures if f.name.startswith("bytes held after")}
    assert len(held) == 1, f"the memory grew: {held}"
    qkv.revert(study.model)
    clock("done", study.since)
    return study
