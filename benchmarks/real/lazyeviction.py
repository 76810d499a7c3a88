"""LazyEviction on real text: how many tokens come back after a silence, what half of the cache costs, and a number that is needed
again and again at intervals longer than a window. Negative control: the same policy blind to its intervals.

python benchmarks/real/lazyeviction.py [--device cuda]
"""

from __future__ import annotations

import random
import time

import torch
from _eviction import continuation, figures
from _streams import applied, arguments, clock, load, tokens
from torch import Tensor

import qkv
from qkv.bench.record import Figure, record
from qkv.bench.tasks.passkey import FILLER, HEAD, NEEDLE
from qkv.caches.lazyeviction import LazyEviction, recurrence_intervals
from qkv.core.attend import causal_mask
from qkv.hosts import observe
from qkv.testing import mutant

Blind = mutant(
    LazyEviction,
    rank=lambda self, state, view: LazyEviction.rank(self, state * state.new_tensor([1.0, 0.0]), view),
)
SILENCE = 16


def recurrence(model, ids: Tensor, watched: int, layers: range) -> tuple[float, float]:
    """(share of tokens that come back after more than `SILENCE` steps, of those that come back at all), mean over KV heads.

    The last `watched` queries are decoding steps; a token matters to a step that gives it at least 1 / length of its attention.
    """
    far, near, length = [], [], ids.shape[1]

    def look(site, call) -> None:
        g = call.k.shape[1]
        logits = (call.q[0, :, -watched:].unflatten(0, (g, -1)) * call.scale).float() @ call.k[0].float().unsqueeze(
            1
        ).mT
        logits = logits.masked_fill(~causal_mask(watched, length, logits.device), -torch.inf)
        for head in logits.softmax(-1).amax(1):
            gaps = recurrence_intervals(head, 1 / length)
            far.append((gaps > SILENCE).float().mean().item())
            near.append((gaps > 0).float().mean().item())

    with observe(model, look, where=list(layers)), torch.no_grad():
        model(ids.to(model.device), use_cache=False)
    share = sum(far) / len(far)
    return round(share, 4), round(share / max(1e-9, sum(near) / len(near)), 4)


@torch.no_grad()
def reuse(model, tokenizer, method, *, rows: int, periods: tuple[int, ...]) -> list[float]:
    """Share of keys read back at each use: text fed token by token, the key needed after `periods` blocks of filler each."""
    draw = random.Random(0)
    keys = ["".join(draw.choice("123456789") for _ in range(5)) for _ in range(rows)]

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    prompts = torch.tensor([ids(HEAD + NEEDLE.format(key=key) + FILLER) for key in keys], device=model.device)
    digits = torch.tensor([ids(key) for key in keys], device=model.device)
    ask = ids("Remember the pass key. The pass key is ")
    found = []
    with applied(model, method):
        out = model(prompts, logits_to_keep=1)
        cache = out.past_key_values
        for period in periods:
            gap = ids(FILLER * period)
            right = torch.ones(rows, dtype=torch.bool, device=model.device)
            for token in [*gap, *ask]:
                out = model(torch.full((rows, 1), token, device=model.device), past_key_values=cache)
            for i in range(digits.shape[1]):
                right &= out.logits[:, -1].argmax(-1) == digits[:, i]
                out = model(digits[:, i : i + 1], past_key_values=cache)
            found.append(round(float(right.float().mean()), 3))
    return found


def main() -> None:
    a = arguments(__doc__)
    model, tokenizer = load(a)
    t0 = time.perf_counter()
    how = {"prompt": 240, "new": 40, "windows": 1} if a.quick else {"prompt": 1024, "new": 128, "windows": 1}
    methods = {
        "lazyeviction 0.5": LazyEviction(budget=0.5),
        "h2o 0.5": "h2o:budget=0.5",
        "window 0.5": "window:budget=0.5",
        "tova 0.5": "tova:budget=0.5",
        "lazyeviction 0.5, blind to intervals": Blind(budget=0.5),
    }
    rows = continuation(model, tokenizer, methods, **how)
    length, watched = (240, 64) if a.quick else (1024, 512)
    layers = range(0, model.config.num_hidden_layers, 15 if a.quick else 6)
    share, rest = recurrence(model, tokens(tokenizer, length, 20000), watched, layers)
    clock(f"recurrence {share} {rest}", t0)
    budget, periods, keys = (96, (1,), 2) if a.quick else (128, (2, 4, 7), 8)
    again = {"full": None, "lazyeviction": LazyEviction(budget=budget, window=25), "h2o": f"h2o:budget={budget}",
             "window": f"window:budget={budget}"}  # fmt: skip
    for name, method in again.items():
        again[name] = reuse(model, tokenizer, method, rows=keys, periods=periods)
        clock(f"re-use under {name}: {again[name]}", t0)
    note = f"{how['new']} tokens decoded after a prompt of {how['prompt']}"
    what = f"{watched} steps, {length} tokens"
    extra = [
        Figure(f"tokens that come back after more than {SILENCE} silent steps", share, "", f"share of all; {what}"),
        Figure("the same, of those that come back", rest, "", f"share; {what}"),
    ]
    every = f"{keys} keys of 5 digits, {budget} tokens kept, used after {periods} blocks of filler (22 tokens each)"
    extra += [Figure(f"keys read back, {name}", sum(x) / len(x), "", every) for name, x in again.items()]
    record("lazyeviction", claim=qkv.method("lazyeviction").spec.shown, figures=[*figures(rows, note), *extra], table=rows,
           seed=0, folder=a.folder, command="python benchmarks/real/lazyeviction.py")  # fmt: skip


if __name__ == "__main__":
    main()
