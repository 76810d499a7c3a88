"""ZipCache on real text: 4 bits for salient tokens and 2 for the others, against uniform bits and against other choices of them.

python benchmarks/real/zipcache.py [--device cuda]
"""

from __future__ import annotations

import torch
from _streams import applied, arguments, compare, load, tokens
from torch import Tensor

import qkv
from qkv.bench.record import Figure, record
from qkv.caches._stores.codecs import (
    cst_dequantize,
    cst_quantize,
    dequantize_per_token_channels,
    quantize_per_token_channels,
)
from qkv.hosts import observe

METHODS = {
    "4/2 bits": "zipcache",
    "uniform 4 bits": "zipcache:bits=4",
    "uniform 2 bits": "zipcache:bits=2",
    "4/2, 30 % salient": "zipcache:salient_ratio=0.3",
    "4/2, 30 % salient, raw attention": "zipcache:salient_ratio=0.3,normalize=false",
    "control: 4 bits for the least salient 60 %": "zipcache:bits=[2,4],salient_ratio=0.4",
    "control: 4 bits for the least salient 30 %": "zipcache:bits=[2,4],salient_ratio=0.7",
}


def values_error(model, ids: Tensor, bits: int) -> dict[str, float]:
    """Relative squared error of values: channel-separable, plain token-wise, and groups of 32 channels."""
    found: dict[str, list[float]] = {"channel-separable": [], "token-wise": [], "groups of 32": []}

    def look(site, call) -> None:
        v = call.v.float()
        ones = torch.ones_like(v[:, :, 0])
        back = {
            "channel-separable": cst_dequantize(*cst_quantize(v, bits)),
            "token-wise": cst_dequantize(*cst_quantize(v, bits, channel=ones)),
            "groups of 32": dequantize_per_token_channels(*quantize_per_token_channels(v, bits, 32)),
        }
        for name, x in back.items():
            found[name].append(((x - v).square().sum() / v.square().sum()).item())

    with observe(model, look), torch.no_grad():
        model(ids.to(model.device), use_cache=False)
    return {name: round(sum(x) / len(x), 5) for name, x in found.items()}


def main() -> None:
    a = arguments(__doc__)
    model, tokenizer = load(a)
    prompt, new, windows = (512, 128, 1) if a.quick else (2048, 256, 6)
    rows = compare(model, tokenizer, METHODS, prompt=prompt, new=new, windows=windows, chunk=16)
    error = values_error(model, tokens(tokenizer, 256 if a.quick else 1024, 20000), 4)
    held = {}
    model = model.to(torch.bfloat16)
    ids = tokens(tokenizer, prompt + 32, 20000)
    for name, method in METHODS.items():
        with applied(model, method), torch.no_grad():
            cache = model(ids[:, :prompt].to(model.device), use_cache=True, logits_to_keep=1).past_key_values
            for t in range(prompt, ids.shape[1]):
                model(ids[:, t : t + 1].to(model.device), past_key_values=cache, use_cache=True)
            held[name] = round(qkv.report(model).ratio, 4)
    table = [row | {"bytes of a bf16 cache": held.get(row["method"], 1.0)} for row in rows]
    by = {row["method"]: row for row in table}
    note = f"{windows} x {new} tokens in pieces of 16 after prompts of {prompt}"
    names = ("full", "uniform 4 bits", "4/2 bits", "uniform 2 bits", "control: 4 bits for the least salient 60 %")
    figures = [Figure(f"perplexity, {n}", by[n]["perplexity"], "", note) for n in names]
    names = ("4/2, 30 % salient", "4/2, 30 % salient, raw attention", "control: 4 bits for the least salient 30 %")
    figures += [Figure(f"KL to full, {n}", by[n]["KL to full (nats/token)"], "nats/token", note) for n in names]
    figures.append(
        Figure(
            "bytes held of a bf16 cache, 4/2 bits", held["4/2 bits"], "", f"{ids.shape[1]} tokens, 32 of them waiting"
        )
    )
    figures += [
        Figure(f"relative squared error of values at 4 bits, {n}", x, "", "mean over sites") for n, x in error.items()
    ]
    record("zipcache", claim="between 16 bits and uniform 2 bits; giving the bits to the least salient tokens instead is worse",
           figures=figures, table=table, command="python benchmarks/real/zipcache.py", seed=0, folder=a.folder)  # fmt: skip
    for row in table:
        print(row)
    print(error)


if __name__ == "__main__":
    main()
