"""Read a document once, keep its 4-bit cache in a folder, and ask it two questions later.

python examples/ask_a_saved_cache.py [MODEL]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

import qkv
from qkv import hosts
from qkv.bench.assets import resolve_model

DOCUMENT = "The pass key is 48213. Remember it. " + "The sky is blue. There and back again. " * 12
QUESTIONS = ("What is the pass key? The pass key is", "What colour is the sky? The sky is")


def main(name: str = "smollm2") -> None:
    model, tokenizer = resolve_model(name)
    qkv.apply(model, "kivi:bits=4")
    document = tokenizer(DOCUMENT, return_tensors="pt")["input_ids"]
    with tempfile.TemporaryDirectory() as folder:
        cache = hosts.fresh_cache(model, document.shape[1])
        with torch.no_grad():
            model(document, past_key_values=cache, use_cache=True)
        hosts.save_cache(model, cache, Path(folder) / "document", document)
        for question in QUESTIONS:
            saved = hosts.load_cache(model, Path(folder) / "document")  # a fresh copy every time
            asked = tokenizer(question, return_tensors="pt", add_special_tokens=False)["input_ids"]
            ids = torch.cat((saved.input_ids, asked), 1)
            out = model.generate(ids, past_key_values=saved.cache, max_new_tokens=8, do_sample=False)
            print(question, "->", tokenizer.decode(out[0, ids.shape[1] :]))


if __name__ == "__main__":
    main(*sys.argv[1:])
