"""The laws of conversions: what pretrained weights made into another layer must keep, whatever the formula.

The sources are tiny random Llamas in float64, all of it: their norms too, which transformers computes in float32. Their
weights are drawn large, so that attention is sharp and positions matter.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qkv
from qkv.core import registry
from qkv.core.cache import Geometry
from qkv.core.conversion import Conversion
from qkv.core.errors import InvalidInput, SavedDataError
from qkv.core.state import State
from qkv.testing._law import Case, close, expect, finite, law, refuses, same

VOCABULARY, WIDTH, LAYERS = 61, 40, 2
KV_HEADS = (2, 4, 1)  # of 4 query heads: grouped, multi-head, multi-query


def source(kv_heads: int = 2, seed: int = 0, device: str = "cpu", scale: float = 0.25) -> Any:
    """A random Llama of 2 layers, 4 query heads of width 8, in float64 throughout."""
    from transformers import LlamaConfig, LlamaForCausalLM

    make: Any = LlamaConfig
    config = make(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=56, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=kv_heads, head_dim=8, initializer_range=scale, rope_theta=100.0, attention_bias=kv_heads == 1,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    rng = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(config)
        model = model.to(torch.float64)
        for name, module in list(model.named_modules()):
            if type(module).__name__ == "LlamaRMSNorm":
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, nn.RMSNorm(WIDTH, eps=1e-6, dtype=torch.float64))
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases and norms that do something
                parameter.data += 0.3 * torch.randn_like(parameter)
    finally:
        torch.random.set_rng_state(rng)
    return model.to(device).eval()


def texts(case: Case, salt: int, rows: int = 3, length: int = 29, batches: int = 3) -> list[dict[str, Tensor]]:
    """Random token rows; the last batch is padded on the left."""
    draw = case.draw(salt)
    out = [
        {"input_ids": draw.integers(rows, length, low=1, high=VOCABULARY)} for _ in range(batches)
    ]  # 0 is the pad token
    mask = torch.ones(rows, length, dtype=torch.long, device=draw.device)
    mask[0, :11], mask[-1, :4] = 0, 0
    out[-1]["attention_mask"] = mask
    return out


def geometry(model: Any) -> Geometry:
    """The geometry of the model's first site."""
    return qkv.sites(model)[0].geometry


def small(case: Case, model: Any) -> Conversion:
    """The case's method at a size that changes something on a tiny model."""
    return case.method.replace(**case.spec.small(geometry(model)))


@contextmanager
def converted(case: Case, model: Any, method: Conversion, salt: int = 1) -> Iterator[Any]:
    """The model with `method` applied, calibrated on text of its own."""
    with qkv.applied(model, method, data=texts(case, salt)):
        yield model


@torch.no_grad()
def logits(model: Any, batch: Mapping[str, Tensor], **kwargs: Any) -> Tensor:
    """Logits of a batch, 0 at padding; positions count real tokens."""
    mask = batch.get("attention_mask")
    if mask is None:
        return model(**batch, **kwargs).logits
    return model(**batch, **kwargs, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits * mask.unsqueeze(-1)


def held_out(case: Case) -> list[dict[str, Tensor]]:
    """Text that no calibration has seen."""
    return texts(case, salt=77, batches=2)


def divergence(model: Any, batches: Sequence[Mapping[str, Tensor]], want: Sequence[Tensor]) -> float:
    """Mean KL(source || model) of the next-token distributions in nats."""
    total, count = 0.0, 0
    for batch, truth in zip(batches, want, strict=True):
        kl = (truth.softmax(-1) * (truth.log_softmax(-1) - logits(model, batch).log_softmax(-1))).sum(-1)
        total, count = total + float(kl.sum()), count + kl.numel()
    return total / count


def names(model: Any) -> list[str]:
    """Module names of the attention sites."""
    return [s.name for s in qkv.sites(model)]


def snapshot(model: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Every parameter and buffer: the object and a copy of its values."""
    every = [*model.named_parameters(), *model.named_buffers()]
    return {name: (x, x.detach().clone()) for name, x in every}


@law(
    "conversion",
    "At the settings the spec calls exact, the converted model gives its source's logits on text it was not calibrated on. "
    "Usual causes: rotary pairs mixed up between layouts, a softmax scale, a bias left behind, a basis that is not orthogonal.",
    applies=lambda case: case.spec.exact is not None,
)
def exact_where_claimed(case: Case) -> None:
    """With grouped, multi-head and multi-query sources, the last with biases; one batch is padded."""
    for kv_heads in KV_HEADS:
        model = source(kv_heads, case.seed, case.device)
        want = [logits(model, batch) for batch in held_out(case)]
        with converted(case, model, case.method.replace(**case.spec.exact(geometry(model)))):
            for batch, truth in zip(held_out(case), want, strict=True):
                close(logits(model, batch), truth, rtol=1e-10, what=f"logits with {kv_heads} KV heads")


@law(
    "conversion",
    "A conversion must change its own sites and nothing else: every other parameter stays the same object with the same bits. "
    "Usual causes: folding weights into the residual stream, forgotten hooks, a mode or flag not put back.",
)
def touches_only_its_sites(case: Case) -> None:
    """The last layer alone is converted; the first has a submodule in training mode, which must stay so."""
    model = source(seed=case.seed, device=case.device)
    model.model.layers[0].mlp.train()
    before, at = snapshot(model), f"{names(model)[-1]}."
    modes = {n: m.training for n, m in model.named_modules()}
    hooks = {n: len(m._forward_hooks) + len(m._forward_pre_hooks) for n, m in model.named_modules()}
    batch = held_out(case)[0]
    with qkv.applied(model, small(case, model), where=[LAYERS - 1], data=texts(case, 1)):
        after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for name, (x, copied) in before.items():
            if not name.startswith(at):
                expect(after.get(name) is x, f"{name} is another object after the conversion")
                same(x, copied, name)
        expect(not any(n not in before for n in after if not n.startswith(at)), "parameters appeared outside the sites")
        for name, module in model.named_modules():
            if not f"{name}.".startswith(at) and name in modes:
                expect(module.training == modes[name], f"{name or 'the model'} was left in another mode")
                extra = len(module._forward_hooks) + len(module._forward_pre_hooks) - hooks[name]
                expect(extra <= (name == "model"), f"{name or 'the model'} was left with {extra} more hooks")
        finite(logits(model, batch))


@law(
    "conversion",
    "Revert gives back the very modules: same objects, same bits, same logits, also after the converted layer was trained. "
    "Usual causes: parameters shared between the source module and the new one.",
)
def revert_restores(case: Case) -> None:
    """Every new parameter is changed in place before the revert."""
    model = source(seed=case.seed, device=case.device)
    before, modules, batch = snapshot(model), dict(model.named_modules()), held_out(case)[0]
    want = logits(model, batch)
    with converted(case, model, small(case, model)):
        with torch.no_grad():
            for name in names(model):
                for parameter in model.get_submodule(name).parameters():
                    parameter.add_(0.1)
    expect({n: id(m) for n, m in model.named_modules()} == {n: id(m) for n, m in modules.items()}, "modules differ")
    for name, (x, copied) in before.items():
        expect(
            {**dict(model.named_parameters()), **dict(model.named_buffers())}[name] is x, f"{name} is another object"
        )
        same(x, copied, name)
    same(logits(model, batch), want, "logits after revert")


@law(
    "conversion",
    "Calibration needs data, says so, and leaves the model as it was when it gets none or rubbish.",
    applies=lambda case: case.spec.calibrates,
)
def asks_for_data(case: Case) -> None:
    """Seven kinds of nothing and rubbish; each error says what to pass."""
    model = source(seed=case.seed, device=case.device)
    batch = held_out(case)[0]
    want, method = logits(model, batch), small(case, model)
    empty = torch.zeros_like(batch["input_ids"])
    bad = {
        "no data": None, "an empty list": [], "a tensor": batch["input_ids"], "rows of text": ["hello"], "a batch without "
        "input_ids": [{"x": batch["input_ids"]}], "floating-point tokens": [{"input_ids": want}], "nothing but padding":
        [batch | {"attention_mask": empty}],
    }  # fmt: skip
    for what, data in bad.items():
        error = refuses(
            InvalidInput, lambda data=data: qkv.apply(model, method, data=data), f"a conversion with {what}"
        )
        expect(
            "data=" in str(error) or "batch" in str(error), f"the error for {what} does not say what to pass: {error}"
        )
        same(logits(model, batch), want, f"logits after a refusal ({what})")


@law(
    "conversion",
    "What stands under padding in the calibration data must not matter. Usual cause: statistics over padded rows.",
    applies=lambda case: case.spec.calibrates,
)
def ignores_padded_data(case: Case) -> None:
    """Two calibrations that differ under the padding only."""
    model = source(seed=case.seed, device=case.device)
    method, built = small(case, model), []
    for salt in (1, 2):
        data = texts(case, 1)
        pads = data[-1]["attention_mask"] == 0
        data[-1]["input_ids"] = torch.where(pads, texts(case, salt)[0]["input_ids"], data[-1]["input_ids"])
        with qkv.applied(model, method, data=data[-1:] * 2):
            built.append(logits(model, held_out(case)[0]))
    close(built[0], built[1], rtol=1e-7, what="logits with other tokens under the padding")


@law(
    "conversion",
    "Same weights, same data: the same conversion, bit for bit. Usual cause: random initialisation where a formula belongs.",
)
def deterministic(case: Case) -> None:
    """Two conversions under different random seeds."""
    model = source(seed=case.seed, device=case.device)
    states = []
    for seed in (3, 4):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            with converted(case, model, small(case, model)):
                states.append({n: x.clone() for n, x in model.state_dict().items()})
    for name, x in states[0].items():
        same(states[1][name], x, name)


@law(
    "conversion",
    "More of what the ladder adds means less error: mean KL to the source on held-out text falls along it. Usual causes: "
    "components kept in the wrong order, a basis and its inverse that do not belong together.",
    applies=lambda case: case.spec.ladder is not None,
)
def error_falls(case: Case) -> None:
    """5 % of slack per rung: text of a few hundred tokens is noisy."""
    model = source(seed=case.seed, device=case.device, scale=0.12)
    batches = held_out(case)
    want = [logits(model, batch) for batch in batches]
    errors = []
    for settings in case.spec.ladder(geometry(model)):
        with converted(case, model, case.method.replace(**settings)):
            errors.append(divergence(model, batches, want))
    text = " -> ".join(f"{e:.3g}" for e in errors)
    expect(all(b <= 1.05 * a + 1e-12 for a, b in itertools.pairwise(errors)), f"the error rises somewhere: {text}")
    expect(errors[-1] < 0.1 * errors[0], f"the error hardly falls: {text}")


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
            looked = model.generate(loop, **common, prompt_lookup_num_tokens=3)
            same(looked, model.generate(loop, **common, use_cache=False), "tokens with prompt lookup")
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


@law(
    "conversion",
    "Training helps: mean KL to the source on the text learnt from falls along the settings that train more. Usual causes: a "
    "loss of the wrong sign, parameters that get no update, stages that undo each other.",
    applies=lambda case: case.spec.training is not None and _first(case),
)
def training_helps(case: Case) -> None:
    """Every setting that trains more must take at least a hundredth off."""
    model = source(seed=case.seed, device=case.device, scale=0.12)
    batches = texts(case, 1)
    want = [logits(model, batch) for batch in batches]
    errors = []
    for settings in case.spec.training(geometry(model)):
        with converted(case, model, case.method.replace(**settings)):
            errors.append(divergence(model, batches, want))
    text = " -> ".join(f"{e:.4g}" for e in errors)
    expect(all(b < 0.99 * a for a, b in itertools.pairwise(errors)), f"the error does not fall: {text}")


@law(
    "conversion",
    "Healing needs gradients: finite and not all zero for every new parameter, also with checkpointing, none to the source.",
)
def trains(case: Case) -> None:
    """Plain, then with checkpointing: the same gradients."""
    model = source(seed=case.seed, device=case.device)
    batch = held_out(case)[0]["input_ids"]
    frozen = [p for n in names(model) for p in model.get_submodule(n).parameters()]
    with converted(case, model, small(case, model)):
        grads = []
        for checkpointing in (False, True):
            model.zero_grad()
            model.train()
            if checkpointing:  # renamed in transformers 5.2x
                enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
                enable({"use_reentrant": False})
            model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
            for name in names(model):
                for which, p in model.get_submodule(name).named_parameters():
                    expect(p.grad is not None and bool((p.grad != 0).any()), f"{name}.{which} gets no gradient")
                    finite(p.grad, f"the gradient of {name}.{which}")  # type: ignore[arg-type]
            grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        close(grads[1], grads[0], rtol=1e-9, what="gradients with checkpointing")
        (getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable)()
        model.eval()
        expect(all(p.grad is None for p in frozen), "the source's own parameters got gradients")


@law(
    "conversion",
    "In bfloat16 the exact setting loses at most 3 times what the source itself loses. Usual causes: weights computed in low "
    "precision, values of very different size in one sum.",
    applies=lambda case: case.spec.exact is not None,
)
def low_precision(case: Case) -> None:
    """Mean absolute error of the logits against the float64 source."""
    model = source(seed=case.seed, device=case.device, scale=0.12)
    batch = held_out(case)[0]
    want = logits(model, batch)
    model.to(torch.bfloat16)
    plain = float((logits(model, batch).double() - want).abs().mean())
    with converted(case, model, case.method.replace(**case.spec.exact(geometry(model)))):
        got = float((logits(model, batch).double() - want).abs().mean())
    expect(got <= 3 * plain, f"mean error {got:.3g} in bfloat16, {plain:.3g} without the conversion")


@law(
    "conversion",
    "Saved and loaded onto the same base it is the same model, bit for bit; missing, unexpected or misshapen tensors and another "
    "base are errors. Usual causes: sizes or factors kept on the module but neither in its state nor in the notes.",
)
def survives_saving(case: Case) -> None:
    """Logits and generated tokens; then seven ways to damage the folder."""
    model = source(seed=case.seed, device=case.device)
    batch = held_out(case)[1]
    with tempfile.TemporaryDirectory() as folder, converted(case, model, small(case, model)):
        want = logits(model, batch)
        qkv.save(model, Path(folder) / "saved")
        twin = qkv.load(Path(folder) / "saved", model=source(seed=case.seed, device=case.device))
        same(logits(twin, batch), want, "logits of the loaded model")
        again = model.generate(**batch, max_new_tokens=5, do_sample=False, pad_token_id=0)
        same(twin.generate(**batch, max_new_tokens=5, do_sample=False, pad_token_id=0), again, "its tokens")
        with_other = source(seed=case.seed + 1, device=case.device)
        refuses(SavedDataError, lambda: qkv.load(Path(folder) / "saved", model=with_other), "another base model")
        _damage(case, Path(folder), model)


def _damage(case: Case, folder: Path, model: Any) -> None:
    from qkv.hosts import stack

    manifest, tensors = stack.read_folder(folder / "saved")
    key = sorted(tensors)[0]
    first = tensors[key]
    damaged = {
        "a missing tensor": {k: v for k, v in tensors.items() if k != key},
        "an unexpected tensor": tensors | {f"{key}.more": first},
        "a tensor of another site": tensors | {"0/nowhere/x": first},
        "a misshapen tensor": tensors | {key: first[..., :-1]},
        "a tensor of whole numbers": tensors | {key: first.to(torch.int64)},
    }
    keep = {k: v for k, v in manifest.items() if k not in ("format", "qkv", "files")}
    for what, wrong in damaged.items():
        stack.write_folder(folder / "damaged", keep, wrong)
        fresh = source(seed=case.seed, device=case.device)
        refuses(SavedDataError, lambda fresh=fresh: qkv.load(folder / "damaged", model=fresh), what)
        expect(not hasattr(fresh, "_qkv"), f"{what}: a refused load left something on the model")
    entry = keep["stack"][0]
    for what, notes in {"no notes": {}, "strange notes": {"sites": dict.fromkeys(names(model), 3)}}.items():
        stack.write_folder(folder / "damaged", keep | {"stack": [entry | {"notes": notes}]}, tensors)
        fresh = source(seed=case.seed, device=case.device)
        refuses(SavedDataError, lambda fresh=fresh: qkv.load(folder / "damaged", model=fresh), what)


_CHILD = """
import json, sys, torch, qkv
from qkv.testing.conversions import logits, source
folder, seed, device, threads = json.loads(sys.argv[1])
torch.set_num_threads(threads)
model = qkv.load(folder + "/saved", model=source(seed=seed, device=device))
batch = torch.load(folder + "/batch.pt", weights_only=True)
torch.save(logits(model, batch), folder + "/logits.pt")
"""


@law(
    "conversion",
    "Another process that has only the base and the saved folder gets the same model. Usual cause: state that lives in the "
    "process that converted.",
    applies=lambda case: case.spec.id in registry.ids() and _first(case),
    expensive=True,
)
def survives_a_fresh_process(case: Case) -> None:
    """The other process draws the base from its seed and loads the folder onto it."""
    model = source(seed=case.seed, device=case.device)
    batch = held_out(case)[1]
    with tempfile.TemporaryDirectory() as folder, converted(case, model, small(case, model)):
        qkv.save(model, Path(folder) / "saved")
        torch.save(batch, Path(folder) / "batch.pt")
        given = json.dumps([folder, case.seed, case.device, torch.get_num_threads()])
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, given], capture_output=True, text=True, timeout=300,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )  # fmt: skip
        expect(done.returncode == 0, f"the other process failed:\n{done.stderr[-600:]}")
        got = torch.load(Path(folder) / "logits.pt", weights_only=True, map_location=case.device)
        close(got, logits(model, batch), rtol=1e-12, what="logits in another process")


def _first(case: Case) -> bool:
    """One process per method is enough: its first trial, or a configuration of the user's own."""
    trials = [type(case.method).create(**t) for t in case.spec.trials]
    return case.method not in trials[1:]
