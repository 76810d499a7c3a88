"""Students cut from their teacher."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from qkv import hosts
from qkv.core.errors import InvalidParameter, Refused


def drop_layers(model: Any, keep: Sequence[int]) -> Any:
    """A copy of `model` that has only the layers `keep` (from 0, in rising order), with its own weights.

    The usual start of a shallower student: all-MiniLM-L6 cut to three layers is ``drop_layers(teacher, (0, 2, 5))``. Raises
    `InvalidParameter` for layers that do not exist, `Refused` for a model whose attention layers form no single list.
    """
    if carries_methods(model):
        raise Refused(f"this {type(model).__name__} carries qkv methods; `qkv.revert` it before it is cut")
    sites = [s for s in hosts.sites(model) if s.role != "cross"]
    name = _stack(model, [s.name for s in sites])
    layers = model.get_submodule(name)
    keep = tuple(keep)
    if not keep or list(keep) != sorted(set(keep)) or keep[0] < 0 or keep[-1] >= len(layers):
        raise InvalidParameter(f"keep={keep} must name layers from 0 to {len(layers) - 1} in rising order, each once")
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    try:  # the dropped layers are never copied
        setattr(parent, child, nn.ModuleList(layers[i] for i in keep))
        student = copy.deepcopy(model)
    finally:
        setattr(parent, child, layers)
    config = student.config.get_text_config() if hasattr(student.config, "get_text_config") else student.config
    for key, value in vars(config).copy().items():
        if "layer" in key and isinstance(value, (list, tuple)) and len(value) == len(layers):  # such as layer_types
            setattr(config, key, [value[i] for i in keep])
    config.num_hidden_layers = len(keep)
    for number, layer in enumerate(student.get_submodule(name)):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = number
    return student


def carries_methods(model: Any) -> bool:
    """Whether `qkv.apply` has put something into the model."""
    return bool(hosts.carried(model))


def _stack(model: Any, names: list[str]) -> str:
    """The module list that holds exactly one of the named attention modules in each of its items."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == len(names):
            if all(n.startswith(f"{name}.{i}.") for i, n in enumerate(names)):
                return name
    raise Refused(f"the layers of {type(model).__name__} do not form one list of modules, so none can be dropped")
