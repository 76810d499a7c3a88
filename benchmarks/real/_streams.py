"""Shared by the checks on real text: the model, the text, and the loss of every token as a cache method sees it."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import qkv
from qkv.bench.assets import long_text, smollm2, text_tokens


def parser(description: str | None) -> argparse.ArgumentParser:
    """--device, --dtype, --quick (fewer tokens, for a look) and --folder."""
    out = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    out.add_argument("--dtype", default="float32")
    out.add_argument("--quick", action="store_true", help="a tenth of the tokens")
    out.add_argument("--folder", default="benchmarks/results/real")
    return out


def arguments(description: str | None) -> argparse.Namespace:
    """What `parser` reads."""
    return parser(description).parse_args()


def load(a: argparse.Namespace):
    """(model, tokenizer) on the device."""
    model, tokenizer = smollm2(dtype=getattr(torch, a.dtype))
    return model.to(a.device).eval(), tokenizer


def tokens(tokenizer, count: int, offset: int = 0) -> Tensor:
    """``[1, count]`` tokens of the embedded text."""
    return torch.as_tensor(text_tokens(tokenizer, count, offset, long_text())).reshape(1, -1)


@torch.no_grad()
def losses(model, ids: Tensor, *, prompt: int, chunk: int, graph: bool = False) -> tuple[Tensor, Tensor]:
    """Loss of each token after the prompt under the applied cache, and its logits: ``[T - prompt]``, ``[T - prompt, V]``.

    The prompt is absorbed at once, the rest in chunks (1 = true decoding).
    """
    ids = ids.to(model.device)
    out = model(ids[:, :prompt], use_cache=True, logits_to_keep=1) if prompt else None
    cache = out.past_key_values if out is not None else None
    rows, logits = [], [out.logits[:, -1:]] if out is not None else []
    for start in range(prompt, ids.shape[1], chunk):
        piece = ids[:, start : start + chunk]
        out = model(input_ids=piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    every = torch.cat(logits, 1)[:, :-1].float()
    target = ids[:, max(prompt, 1) :]
    if not prompt:
        every = every[:, : target.shape[1]]
    rows = F.cross_entropy(every[0], target[0], reduction="none")
    return rows.cpu(), every[0]


def stream(model, ids: Tensor, *, chunk: int) -> Tensor:
    """Loss of every token of a long stream ``[T - 1]``, without keeping logits."""
    ids, cache, rows, last = ids.to(model.device), None, [], None
    with torch.no_grad():
        for start in range(0, ids.shape[1], chunk):
            piece = ids[:, start : start + chunk]
            out = model(input_ids=piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits = out.logits if last is None else torch.cat((last, out.logits), 1)
            target = piece if last is not None else piece[:, 1:]
            rows.append(F.cross_entropy(logits[0, : target.shape[1]].float(), target[0], reduction="none").cpu())
            last = out.logits[:, -1:]
    return torch.cat(rows)


def perplexity(loss: Tensor) -> float:
    """exp of the mean."""
    return round(math.exp(loss.mean().item()), 3)


def divergence(base: Tensor, other: Tensor) -> tuple[float, float]:
    """(mean KL(base || other) in nats per token, top-1 agreement) of logits ``[T, V]``."""
    p, q = base.log_softmax(-1), other.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    return round(kl, 5), round((base.argmax(-1) == other.argmax(-1)).float().mean().item(), 4)


def applied(model, methods: Sequence[object] | str | None):
    """`qkv.applied`, with None for the unmodified model's exact cache."""
    return (
        qkv.applied(model, *([methods] if not isinstance(methods, (list, tuple)) else methods))
        if methods
        else qkv.applied(model, "full")
    )


def compare(
    model, tokenizer, methods: Mapping[str, object], *, prompt: int, new: int, windows: int, chunk: int = 1
) -> list[dict]:
    """A row per method: perplexity of `new` tokens after a prompt, `chunk` at a time, KL to the full cache, agreement."""
    t0, found = time.perf_counter(), {name: [] for name in ["full", *methods]}
    for i in range(windows):
        ids = tokens(tokenizer, prompt + new, 20000 + i * 50000)
        with applied(model, None):
            loss, base = losses(model, ids, prompt=prompt, chunk=chunk)
        found["full"].append((loss, 0.0, 1.0))
        for name, method in methods.items():
            with applied(model, method):
                loss, logits = losses(model, ids, prompt=prompt, chunk=chunk)
            found[name].append((loss, *divergence(base, logits)))
        clock(f"window {i + 1} of {windows}", t0)
    return [
        {
            "method": name,
            "perplexity": perplexity(torch.cat([x[0] for x in rows])),
            "KL to full (nats/token)": round(sum(x[1] for x in rows) / len(rows), 4),
            "top-1 agreement": round(sum(x[2] for x in rows) / len(rows), 4),
        }
        for name, rows in found.items()
    ]


def clock(label: str, since: float) -> None:
    """A line of progress."""
    print(f"{label}: {time.perf_counter() - since:.0f} s", flush=True)
