"""KIVI on real text: 4 and 2 bits, the axes it chooses against the others, and the bytes it really holds at 8k tokens.

python benchmarks/real/kivi.py [--device cuda]
"""

from __future__ import annotations

import dataclasses
import time
from typing import ClassVar, final

import torch
from _streams import applied, arguments, clock, divergence, load, losses, perplexity, tokens
from torch import Tensor

import qkv
from qkv.bench.record import Figure, record
from qkv.core.cache import Compute
from qkv.core.site import Site
from qkv.core.steering import Steering, SteeringSpec


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Axes(Steering):
    """Control: quantise and dequantise along chosen axes at every read, the newest `residual` tokens untouched."""

    spec: ClassVar[SteeringSpec] = SteeringSpec(id="axes", title="Control", paper="control")
    keys: str = "channel"
    values: str = "token"
    bits: int = 2

    def wrap(self, site: Site, compute: Compute) -> Compute:
        def run(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
            if q.shape[2] == 1:
                k, v = self._rounded(k, self.keys), self._rounded(v, self.values)
            return compute(q, k, v, mask=mask, causal=causal, scale=scale)

        return run

    def _rounded(self, x: Tensor, axis: str) -> Tensor:
        old = (x.shape[2] - 128) // 32 * 32
        if old <= 0:
            return x
        part = x[:, :, :old]
        grouped = part.unflatten(2, (-1, 32)).mT if axis == "channel" else part.unflatten(3, (-1, 32))
        low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
        step = ((high - low) / (2**self.bits - 1)).clamp(min=1e-8)
        back = ((grouped - low) / step).round() * step + low
        back = back.mT.flatten(2, 3) if axis == "channel" else back.flatten(3)
        return torch.cat((back, x[:, :, old:]), 2)


def main() -> None:
    a = arguments(__doc__)
    model, tokenizer = load(a)
    prompt, new, windows = (512, 32, 1) if a.quick else (2048, 128, 3)
    names: dict[str, object] = {
        "kivi 4 bits": "kivi:bits=4",
        "kivi 2 bits": "kivi:bits=2",
        "kivi 8 bits": "kivi:bits=8",
    }
    for bits in (4, 2):
        for keys, values in (("token", "token"), ("channel", "channel")):
            names[f"control, {bits} bits: keys per {keys}, values per {values}"] = Axes(
                keys=keys, values=values, bits=bits
            )
    t0, found = time.perf_counter(), {name: [] for name in ["full", *names]}
    for i in range(windows):
        ids = tokens(tokenizer, prompt + new, 20000 + i * 50000)
        with applied(model, None):
            loss, base = losses(model, ids, prompt=prompt, chunk=1)
        found["full"].append((loss, 0.0, 1.0))
        for name, method in names.items():
            with applied(model, method):
                loss, logits = losses(model, ids, prompt=prompt, chunk=1)
            found[name].append((loss, *divergence(base, logits)))
        clock(f"window {i + 1} of {windows}", t0)
    table = [
        {
            "method": name,
            "perplexity": perplexity(torch.cat([x[0] for x in rows])),
            "KL to full (nats/token)": round(sum(x[1] for x in rows) / len(rows), 4),
            "top-1 agreement": round(sum(x[2] for x in rows) / len(rows), 4),
        }
        for name, rows in found.items()
    ]
    held = {}
    model = model.to(torch.bfloat16)
    ids = tokens(tokenizer, 1024 if a.quick else 8192)
    for bits in (4, 2):
        with qkv.applied(model, f"kivi:bits={bits}"), torch.no_grad():
            cache = None
            for piece in ids.to(model.device).split(1024, 1):
                cache = model(input_ids=piece, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
            held[bits] = round(qkv.report(model).ratio, 4)
    by = {row["method"]: row for row in table}
    note = f"{windows} x {new} tokens decoded after prompts of {prompt}"
    figures = [
        Figure(f"perplexity, {n}", by[n]["perplexity"], "", note) for n in ("full", "kivi 4 bits", "kivi 2 bits")
    ]
    figures += [
        Figure(f"KL to full, {n}", by[n]["KL to full (nats/token)"], "nats/token", note)
        for n in ("kivi 4 bits", "kivi 2 bits", "control, 2 bits: keys per token, values per token")
    ]
    figures += [
        Figure(f"bytes held of a bf16 cache, {b} bits", held[b], "", f"{ids.shape[1]} tokens, residual included")
        for b in (4, 2)
    ]
    record("kivi", claim="4 bits near lossless, 2 bits a small loss; quantising keys per token instead is far worse",
           figures=figures, table=table, command="python benchmarks/real/kivi.py", seed=0, folder=a.folder)  # fmt: skip
    for row in table:
        print(row)
    print(held)


if __name__ == "__main__":
    main()
