"""A stream far beyond the trained length: memory and perplexity along 200,000 tokens of real text.

    python benchmarks/stream.py --out benchmarks/results/stream.json [--tokens 200000] [-m streamingllm:window=1020] [--quick]

The text goes through the model in blocks of 256 tokens, each scored by the block before it; a row is a stretch of 10,000
tokens: its perplexity, the bytes that the cache holds after it, and the most that was allocated in it (on CUDA). With a
cache that ranks by position blocks give what single tokens give (law `chunks_are_exact`).
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F

import qkv
from qkv import hosts
from qkv.bench.assets import long_text, smollm2, text_tokens
from qkv.bench.environment import environment, write_json


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("-m", "--method", default="streamingllm:window=1020")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a fiftieth of the tokens")
    a = parser.parse_args()
    total, stretch = (a.tokens // 50, 1000) if a.quick else (a.tokens, 10_000)
    model, tokenizer = smollm2(device=a.device)
    ids = torch.as_tensor(text_tokens(tokenizer, total, 0, long_text())).reshape(1, -1).to(a.device)
    rows = []
    with qkv.applied(model, a.method):
        cache, last, losses = hosts.fresh_cache(model, 1), None, []
        for start in range(0, total, a.block):
            piece = ids[:, start : start + a.block]
            logits = model(piece, past_key_values=cache, use_cache=True).logits.float()
            seen = logits[:, :-1] if last is None else torch.cat((last, logits[:, :-1]), 1)
            target = piece[:, 1:] if last is None else piece
            losses.append(F.cross_entropy(seen[0], target[0], reduction="none"))
            last = logits[:, -1:]
            if (start + a.block) // stretch > start // stretch or start + a.block >= total:
                rows.append(row(model, start + piece.shape[1], torch.cat(losses), a.device))
                losses = []
                print(rows[-1], flush=True)
    held = [r["cache_bytes"] for r in rows[1:]]
    facts = {"method": a.method, "tokens": total, "block": a.block, "constant_bytes": len(set(held)) == 1, "rows": rows}
    write_json(a.out, environment(seed=0) | facts)
    print("cache bytes constant:", facts["constant_bytes"])


def row(model, tokens: int, losses: torch.Tensor, device: str) -> dict:
    """A stretch that ends after so many tokens."""
    out = {
        "tokens": tokens,
        "perplexity": round(math.exp(losses.mean().item()), 3),
        "cache_bytes": qkv.report(model).bytes,
    }
    if device != "cpu":
        out["peak_bytes"] = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    return out


if __name__ == "__main__":
    main()
