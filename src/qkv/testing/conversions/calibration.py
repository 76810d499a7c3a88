"""Data and training of a conversion: what it asks for, what it must not read, what it learns."""

from __future__ import annotations

import itertools

import torch

import qkv
from qkv.core.errors import InvalidInput
from qkv.testing._law import Case, close, expect, finite, law, refuses, same
from qkv.testing.conversions._source import (
    converted,
    divergence,
    geometry,
    held_out,
    is_first,
    logits,
    names,
    small,
    source,
    texts,
)


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
    "Training helps: mean KL to the source on the text learnt from falls along the settings that train more. Usual causes: a "
    "loss of the wrong sign, parameters that get no update, stages that undo each other.",
    applies=lambda case: case.spec.training is not None and is_first(case),
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
