"""Which heads look at the first token? A probe reads, and changes no bit of the output.

python examples/find_heads.py [MODEL]
"""

from __future__ import annotations

import sys

import qkv
from qkv.bench.assets import resolve_model


def main(name: str = "smollm2") -> None:
    model, tokenizer = resolve_model(name)
    ids = tokenizer("When the tide went out, the boats lay down on the sand and waited. " * 8, return_tensors="pt")
    report = qkv.method("attention-sink-emergence").run(model, ids["input_ids"])
    print(f"heads with a sink on the first token: {float(report.rate[0]):.0%}")
    for layer, heads in enumerate(report.head_rate.values.tolist()):
        print(f"layer {layer:>2}", " ".join("#" if rate > 0.5 else "." for rate in heads))


if __name__ == "__main__":
    main(*sys.argv[1:])
