"""A converted model that decodes: pieces and steps, every way to `generate`, and the bytes that it holds."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import qkv
from qkv.core.state import State
from qkv.testing._law import Case, close, expect, law, same
from qkv.testing._speculation import guessed
from qkv.testing.conversions._source import KV_HEADS, converted, held_out, logits, small, source, texts


@law(
    "conversion",
    "One pass, a pass with a cache, chunks, and single steps give the same logits; a padded row gives those of the row alone. "
    "Usual causes: positions counted from the padding, a cache that stores before rotation, an absorbed form that differs.",
)
def prefill_equals_steps(case: Case) -> None:
    """With and without padding; the cut sizes reach the expanded and the absorbed form."""
    for kv_heads in KV_HEADS:
        model = source(kv_heads, case.seed, case.device)
        with converted(case, model, small(case, model)):
            for batch in held_out(case):
                want = logits(model, batch, use_cache=False)
                for cuts in ([29], [17, 12], [5, 1, 1, 22], [20] + [1] * 9):
                    close(_in_pieces(model, batch, cuts), want, rtol=1e-9, what=f"logits in pieces of {cuts}")
            batch = held_out(case)[1]
            for row, mask in enumerate(batch["attention_mask"].bool()):
                alone = logits(model, {"input_ids": batch["input_ids"][row : row + 1, mask]})
                close(logits(model, batch)[row : row + 1, mask], alone, rtol=1e-9, what=f"padded row {row}")


@torch.no_grad()
def _in_pieces(model: Any, batch: Mapping[str, Tensor], cuts: Sequence[int]) -> Tensor:
    ids, mask, at, past, outs = batch["input_ids"], batch.get("attention_mask"), 0, None, []
    for n in cuts:
        more: dict[str, Any] = {}
        if mask is not None:
            position = (mask.cumsum(-1) - 1).clamp(min=0)
            more = {"attention_mask": mask[:, : at + n], "position_ids": position[:, at : at + n]}
        out = model(input_ids=ids[:, at : at + n], past_key_values=past, use_cache=True, **more)
        past, at = out.past_key_values, at + n
        outs.append(out.logits)
    whole = torch.cat(outs, dim=1)
    return whole if mask is None else whole * mask.unsqueeze(-1)


@law(
    "conversion",
    "`generate` on the converted model is what recomputing everything gives: padded batches, beams, chunked prefill, prompt "
    "lookup, a chat continued on a returned cache and a copy of it. Usual causes: a cache that cannot crop, reorder or copy.",
)
def generates(case: Case) -> None:
    """Against `use_cache=False` throughout, token for token."""
    model = source(seed=case.seed, device=case.device)
    batch = held_out(case)[1]
    common = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    with converted(case, model, small(case, model)):
        want = model.generate(**batch, **common, use_cache=False)
        ways: dict[str, dict[str, Any]] = {"a cache": {}, "chunked prefill": {"prefill_chunk_size": 10}}
        for way, options in ways.items():
            same(model.generate(**batch, **common, **options), want, f"tokens with {way}")
        beams = {"num_beams": 3, "num_return_sequences": 2}
        same(
            model.generate(**batch, **common, **beams),
            model.generate(**batch, **common, **beams, use_cache=False),
            "beams",
        )
        for row, mask in enumerate(batch["attention_mask"].bool()):
            ids = batch["input_ids"][row : row + 1, mask]
            alone = model.generate(ids, **common)
            same(alone[:, ids.shape[1] :], want[row : row + 1, batch["input_ids"].shape[1] :], f"row {row} alone")
            loop = ids.repeat(1, 2)[:, : ids.shape[1] + 6]
            plain = model.generate(loop, **common, use_cache=False)
            # transformers 5.10 wants an end token to look for
            looked = model.generate(loop, **common, prompt_lookup_num_tokens=3, eos_token_id=model.config.vocab_size)
            same(guessed(looked, plain.shape[1]), plain, "tokens with prompt lookup")
        ids = held_out(case)[0]["input_ids"]
        first = model.generate(ids[:, :20], **common, return_dict_in_generate=True)
        saved = copy.deepcopy(first.past_key_values)
        turn = torch.cat((first.sequences, ids[:, 20:]), dim=1)
        again = model.generate(turn, **common, use_cache=False)
        same(model.generate(turn, past_key_values=first.past_key_values, **common), again, "a continued chat")
        same(model.generate(turn, past_key_values=saved, **common), again, "a chat continued on a copy of its cache")


@law(
    "conversion",
    "The report's bytes are the bytes held, and its full bytes what the source's cache would hold. Usual causes: a cache of "
    "expanded keys and values, tallies of the wrong shape.",
    applies=lambda case: case.spec.stores,
)
def bytes_are_held(case: Case) -> None:
    """Storage behind every tensor of every cache layer is counted once."""
    model = source(seed=case.seed, device=case.device)
    batch = held_out(case)[0]
    with torch.no_grad():
        plain = model(**batch, use_cache=True).past_key_values
    full = sum(x.numel() * x.element_size() for layer in plain.layers for x in (layer.keys, layer.values))
    with converted(case, model, small(case, model)):
        with torch.no_grad():
            cache = model(**batch, use_cache=True).past_key_values
        found: dict[int, int] = {}
        for layer in cache.layers:
            for held in [*vars(layer).values(), *vars(layer.memory).values()]:
                for x in held.tensors.values() if isinstance(held, State) else (held,):
                    if isinstance(x, Tensor):
                        found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        report = qkv.report(model)
    expect(report.bytes == sum(found.values()), f"{report.bytes} bytes reported, {sum(found.values())} held")
    expect(report.full_bytes == full, f"{report.full_bytes} full bytes reported, the source's cache holds {full}")
    expect(report.bytes < full, f"the smaller setting holds {report.bytes} bytes, its source {full}")
    tokens = batch["input_ids"].shape[1]
    kept = report.kept < tokens if case.spec.constant else report.kept == tokens
    expect(kept and report.seen == tokens, f"kept {report.kept}, seen {report.seen} of {tokens} tokens")


@law(
    "conversion",
    "A memory that is said to be constant is: as many bytes after four times the text, prefilled or decoded, and copies of them. "
    "Usual causes: a ring that grows, tokens held until somebody settles them.",
    applies=lambda case: case.spec.constant,
)
def memory_is_constant(case: Case) -> None:
    """29 tokens at once, 87 more in blocks and single steps, then a saved and restored copy."""
    model = source(seed=case.seed, device=case.device)
    ids = torch.cat([b["input_ids"] for b in texts(case, 77, batches=4)], dim=1)
    with converted(case, model, small(case, model)), torch.no_grad():
        cache: Any = None
        at, sizes = 0, []
        for n in (29, 29, *[1] * 29, 29):
            cache = model(input_ids=ids[:, at : at + n], past_key_values=cache, use_cache=True).past_key_values
            at += n
            sizes.append(qkv.report(model).bytes)
        held = sum(layer.memory.bytes() for layer in copy.deepcopy(cache).layers)
    expect(len(set(sizes)) == 1, f"{sizes[0]} bytes after 29 tokens, then {sorted(set(sizes))}")
    expect(held == sizes[0], f"a copy of the cache holds {held} bytes, the cache {sizes[0]}")
