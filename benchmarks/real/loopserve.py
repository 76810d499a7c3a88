"""LoopServe on real dialogues: three turns about two numbers hidden in one text, sparse prompts, and what a single choice loses.

python benchmarks/real/loopserve.py [--device cuda]
"""

from __future__ import annotations

import dataclasses
import random
import re
import time
from typing import Any, ClassVar, final

import torch
from _streams import applied, arguments, clock, divergence, load, losses, perplexity, tokens

from qkv.bench.record import Figure, record
from qkv.caches.loopserve import LoopServe
from qkv.core.cache import CacheSpec
from qkv.core.reader import Reading
from qkv.core.vertical_slash import VerticalSlash, kept_share
from qkv.hosts import observe

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
FACT = "The {what} is {key}. Remember it. {key} is the {what}.\n"
ASK = "What is the {what}? The {what} is"


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class ChosenOnce(LoopServe):
    """Negative control: the first prompt's choice stays, whatever is asked later."""

    spec: ClassVar[CacheSpec] = CacheSpec(id="chosen-once", title="Negative control", paper="control", evicts=False)

    def _choose(self, view: Reading, queries: torch.Tensor, asked: torch.Tensor, rows: torch.Tensor) -> None:
        notes, at = view.notes, view.position.amax(-1)
        if "chosen" not in notes:
            super()._choose(view, queries, asked, rows)
            return
        due = at - notes["full"] >= self.refresh
        notes["full"] = torch.where(due | torch.tensor(view.whole, device=at.device), at, notes["full"])


def dialogues(tokenizer, length: int, count: int) -> list[dict[str, Any]]:
    """A text with two numbers (one early, one late), and three questions, each a block of its own."""
    draw, out = random.Random(0), []

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    filler = ids(FILLER)
    for i in range(count):
        keys = {what: "".join(draw.choice("123456789") for _ in range(5)) for what in ("pass key", "door code")}
        facts = {what: ids(FACT.format(what=what, key=key)) for what, key in keys.items()}
        first, second = list(facts)[:: 1 if i % 2 == 0 else -1]
        rest = length - sum(map(len, facts.values()))
        whole = rest // len(filler)
        a, b = round(0.2 * whole), round(0.7 * whole)
        text = [*filler * a, *facts[first], *filler * (b - a), *facts[second], *filler * (whole - b)]
        asked = [second, first, second]
        lead = [ids(("\n" if n else "") + ASK.format(what=what)) for n, what in enumerate(asked)]
        out.append({"text": text, "asked": lead, "keys": [keys[what] for what in asked]})
    return out


@torch.no_grad()
def converse(model, tokenizer, talk: dict[str, Any], new: int = 7) -> list[bool]:
    """Whether each of the three answers is right; each question is a block of its own."""
    device, cache, right = model.device, None, []
    out = model(torch.tensor([talk["text"]], device=device), use_cache=True, logits_to_keep=1)
    cache = out.past_key_values
    for question, key in zip(talk["asked"], talk["keys"], strict=True):
        out = model(torch.tensor([question], device=device), past_key_values=cache, use_cache=True)
        found: list[int] = []
        for _ in range(new):
            token = out.logits[:, -1:].argmax(-1)
            found.append(int(token))
            out = model(token, past_key_values=cache, use_cache=True)
        match = re.search(r"\d+", tokenizer.decode(found))
        right.append(match is not None and match.group() == key)
    return right


@torch.no_grad()
def lines_kept(model, ids: torch.Tensor, alpha: float, layers: list[int]) -> tuple[float, float]:
    """(share of the causal cells on the lines, mass of the sampled rows on them), mean over some layers."""
    shares, masses = [], []

    def look(site, call) -> None:
        pattern = VerticalSlash(alpha, 64, 0.1, "loopserve")
        lines = pattern.lines(call.q[0].float(), call.k[0].float(), call.scale)
        n = call.q.shape[2]
        shares.append(kept_share(lines, n))
        masses.append(float(lines.covered.mean()) / (64 + int(0.1 * n)))

    with observe(model, look, where=layers):
        model(ids.to(model.device), use_cache=False, logits_to_keep=1)
    return sum(shares) / len(shares), sum(masses) / len(masses)


def main() -> None:
    a = arguments(__doc__)
    model, tokenizer = load(a)
    length, count, new, layers = (640, 1, 8, [10]) if a.quick else (3072, 6, 96, [1, 8, 15, 22, 29])
    started, budget = time.perf_counter(), length // 4
    talks = dialogues(tokenizer, length, count)
    settings = {
        "full": None,
        "loopserve 25 %": LoopServe(budget=budget),
        "loopserve 25 %, exact prompts": LoopServe(budget=budget, alpha=1.0),
        "loopserve 25 %, exact prompts, 2 queries choose, then every 8": LoopServe(
            budget=budget, alpha=1.0, window=2, refresh=8
        ),
        "snapkv 25 %": f"snapkv:budget={budget}",
        "chosen once 25 % (control)": ChosenOnce(budget=budget, alpha=1.0),
    }
    ids, base, rows = tokens(tokenizer, length + new, 20000), torch.empty(0), []
    for name, method in settings.items():
        with applied(model, method):
            answers = [converse(model, tokenizer, talk) for talk in talks]
            t = time.perf_counter()
            loss, logits = losses(model, ids, prompt=length, chunk=1)
            spent = time.perf_counter() - t
        base = logits if method is None else base
        kl, same = divergence(base, logits)
        turns = [round(sum(x[i] for x in answers) / count, 4) for i in range(3)]
        rows.append({"method": name, "turn 1": turns[0], "turn 2": turns[1], "turn 3": turns[2], "perplexity": perplexity(loss),
                     "KL to full (nats/token)": kl, "top-1 agreement": same, "s": round(spent, 1)})  # fmt: skip
        clock(name, started)
    share, mass = lines_kept(model, ids[:, :length], 0.95, layers)
    clock("lines", started)
    note = f"{count} dialogues of {length} tokens, two numbers, questions about the later, the earlier, the later one"
    figures = [
        Figure(f"right answers in turn {i}, {row['method']}", row[f"turn {i}"], "", note)
        for row in rows
        for i in (1, 2, 3)
    ]
    told = f"{new} tokens decoded after a prompt of {length}"
    figures += [
        Figure(f"KL to full, {row['method']}", row["KL to full (nats/token)"], "nats/token", told) for row in rows[1:]
    ]
    figures.append(Figure("cells on the lines at alpha 0.95", round(share, 4), "", f"of causal cells, layers {layers}"))
    figures.append(Figure("mass of the sampled rows on the lines", round(mass, 4), "", f"layers {layers}"))
    record("loopserve", claim="a dialogue about two passages is answered where one choice at the end of the prompt fails",
           figures=figures, table=rows, command="python benchmarks/real/loopserve.py", seed=0, folder=a.folder)  # fmt: skip
    for row in rows:
        print(row)
    print("cells", share, "mass", mass)


if __name__ == "__main__":
    main()
