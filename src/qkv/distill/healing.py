"""Which weights of a converted model healing trains, and by which recipe."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from qkv import hosts
from qkv.core.conversion import Conversion
from qkv.core.errors import Refused


def recipe(model: Any) -> dict[str, Any]:
    """``objective`` (a setting) and ``arguments`` (training arguments) of the last conversion that `model` carries."""
    found = [method for method, _ in hosts.carried(model) if isinstance(method, Conversion)]
    if not found:
        raise Refused(
            "healing trains what a conversion made, and this model carries none; convert it first, for example "
            "qkv.apply(model, 'transmla:kv_rank=256', data=...)"
        )
    heal = found[-1].spec.heal
    if "objective" not in heal:
        raise Refused(f"{found[-1].id} names no recipe for healing; train it with qkv.distill.distill and an objective")
    return {"objective": heal["objective"], "arguments": dict(heal.get("arguments", {}))}


@contextmanager
def only_converted(model: Any) -> Iterator[None]:
    """Every parameter outside the converted modules is frozen; afterwards each is as it was."""
    sites = [name for method, names in hosts.carried(model) if isinstance(method, Conversion) for name in names]
    mine = {id(p) for name in sites for p in model.get_submodule(name).parameters()}
    before = [(p, p.requires_grad) for p in model.parameters()]
    narrow = sorted({str(p.dtype) for p, _ in before if id(p) in mine and torch.finfo(p.dtype).bits < 32})
    if narrow:
        raise Refused(
            f"the converted layers are in {', '.join(narrow)}, where small steps are lost to rounding; convert the model in "
            "float32 (bf16=True still computes in bfloat16)"
        )
    try:
        for p, _ in before:
            p.requires_grad_(id(p) in mine)
        yield
    finally:
        for p, learns in before:
            p.requires_grad_(learns)
