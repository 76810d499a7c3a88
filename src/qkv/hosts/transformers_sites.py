"""Attention sites of a transformers model: which modules they are, their geometry, and what cannot be reached."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from qkv.core.cache import Geometry, Rope
from qkv.core.errors import InvalidInput
from qkv.core.site import Site
from qkv.hosts.transformers_inline import seam_of

PICKED = frozenset(("indices", "block_indices"))
"""Keyword arguments with which transformers' models hand over the keys that an indexer picked."""
PICKS = "its own indexer picks the keys that a query sees, which qkv's attention forms do not take"


def find_sites(model: PreTrainedModel) -> list[Site]:
    """Every attention site of a model that carries nothing. Raises `InvalidInput` when there is none."""
    modules: dict[str, nn.Module] = dict(model.named_modules())
    found = []
    for name, module in modules.items():
        kind = _attention_kind(module)
        if kind is None:
            continue
        found.append(_site(len(found), name, module, kind, modules, model))
    if not found:
        raise InvalidInput(f"{type(model).__name__} has no attention module that qkv recognises")
    return found


def _code(module: nn.Module) -> Any:
    return getattr(inspect.unwrap(type(module).forward), "__code__", None)


def _attention_kind(module: nn.Module) -> str | None:
    """``interface`` for modules that call the shared attention table, ``other`` for attention that does not, else None."""
    code = _code(module)
    if code is None or isinstance(module, PreTrainedModel):
        return None
    if "ALL_ATTENTION_FUNCTIONS" in code.co_names or getattr(module, "qkv_attention", False):
        return "interface"
    name = type(module).__name__
    if name.endswith(("Attention", "SelfAttention")) and not any(
        "Attention" in type(m).__name__ for m in module.children()
    ):
        if any(isinstance(m, nn.Linear) for m in module.children()):
            return "other"
    return None


def _first(module: nn.Module, config: Any, *names: str) -> Any:
    for name in names:
        for source in (module, config):
            value = getattr(source, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def _site(
    index: int, name: str, module: nn.Module, kind: str, modules: dict[str, nn.Module], model: PreTrainedModel
) -> Site:
    config = getattr(module, "config", None) or model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = _first(module, config, "num_heads", "num_attention_heads", "n_heads")
    groups = getattr(module, "num_key_value_groups", None)
    width = _first(module, None, "head_dim", "attention_head_size", "head_size")
    if width is None and heads:
        width = _first(module, config, "head_dim") or getattr(config, "hidden_size", 0) // heads
    kv = _first(module, None, "num_key_value_heads") or (heads // groups if heads and groups else None)
    kv = kv or (heads if not groups else getattr(config, "num_key_value_heads", heads))
    layer = getattr(module, "layer_idx", None)
    cross = (
        "cross" in type(module).__name__.lower()
        or getattr(module, "is_cross_attention", False)
        or name.endswith(("encoder_attn", "crossattention.self", "EncDecAttention"))
    )
    causal = bool(getattr(module, "is_causal", False)) and not cross
    role = "cross" if cross else ("self" if causal else "encoder")
    window = _window(module, config, layer) if causal else None
    reason = None
    seam = seam_of(module) if kind == "other" else None
    slopes = None
    if seam is not None:
        kv, causal, role, reason = seam.kv_heads(module), True, "self", seam.refuses(module)
        slopes = seam.slopes(module) if reason is None else None
    elif kind == "other":
        reason = (
            f"{type(module).__name__} does not go through transformers' attention interface, so there is no seam to reach "
            "its queries and keys"
        )
        if hasattr(module, "has_relative_attention_bias"):
            reason += ", and it adds a relative position bias to its logits, which qkv's attention forms do not compute"
        elif _adds_alibi(module):
            reason += ", and it adds ALiBi biases to its logits, which qkv's attention forms do not compute"
    elif not heads or not width:
        reason = f"the geometry of {type(module).__name__} is unknown: found heads={heads}, head width={width}"
    else:
        reason = _unsupported(module)
    geometry = Geometry(
        heads=heads or 0,
        kv_heads=kv or 0,
        head_dim=width or 0,
        value_dim=getattr(module, "v_head_dim", None) or width or 0,
        layer=layer if isinstance(layer, int) else index,
        layers=getattr(config, "num_hidden_layers", 1),
        rope=_rope(name, module, modules),
        max_length=getattr(config, "max_position_embeddings", None),
        slopes=slopes,
    )
    return Site(
        index=index,
        name=name,
        layer=layer if isinstance(layer, int) else None,
        role=role,
        heads=heads or 0,
        kv_heads=kv or 0,
        head_dim=width or 0,
        value_dim=geometry.value_dim,
        causal=causal,
        window=window,
        scale=_scale(module) if seam is None else seam.scale(module),
        cached=causal and isinstance(layer, int) and not keeps_latents(module) and not shares_its_layer(module),
        geometry=geometry,
        module=type(module).__name__,
        reason=reason,
    )


def _window(module: nn.Module, config: Any, layer: Any) -> int | None:
    """The sliding window of a module in tokens: its own attribute, or its configuration's (Mistral keeps it only there).

    A chunk that a layer attends within (Llama 4) counts as one: its cache holds no more than that.
    """
    if hasattr(module, "sliding_window"):
        window = module.sliding_window
    else:
        window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None)
        kind = kinds[layer] if kinds is not None and isinstance(layer, int) and layer < len(kinds) else ""
        if kinds is not None and "sliding" not in kind:
            window = getattr(config, "attention_chunk_size", None) if "chunked" in kind else None
    return window if isinstance(window, int) else None


def _scale(module: nn.Module) -> float | None:
    for name in ("scaling", "scale"):
        value = getattr(module, name, None)
        if isinstance(value, float):
            return value
    return None


def _unsupported(module: nn.Module) -> str | None:
    """Known inputs of an attention that qkv's forms do not take yet."""
    if getattr(module, "attn_logit_softcapping", None) is not None:
        return "it caps its logits (softcap), which qkv's attention forms do not compute"
    if isinstance(getattr(module, "sinks", None), Tensor):
        return "it has learned sink logits (s_aux), which qkv's attention forms do not compute"
    if getattr(module, "is_kv_shared_layer", False) or getattr(module, "store_full_length_kv", False):
        return (
            "it shares one layer's keys and values with other layers, outside the cache; qkv hands every layer its own and "
            "has no seam for that"
        )
    code = _code(module)
    if code is not None and "cycle_offset" in code.co_varnames:
        return "one module fills several layers of the cache in turn, and qkv keeps one memory for each module"
    if code is not None and "position_bias" in code.co_varnames:
        return "it adds a relative position bias to its logits, which qkv's attention forms do not compute"
    if _picks_keys(module):
        return PICKS
    return None


def _adds_alibi(module: nn.Module) -> bool:
    """Whether a module takes a bias by distance for its logits (BLOOM, MPT, Falcon)."""
    code = _code(module)
    takes = code is not None and not {"alibi", "position_bias"}.isdisjoint(code.co_varnames)
    return takes and getattr(getattr(module, "config", None), "alibi", True)


def keeps_latents(module: nn.Module) -> bool:
    """Whether a module of transformers (MLA) caches latents and makes keys and values of all of them anew at every step."""
    return hasattr(module, "expand_kv")


def shares_its_layer(module: nn.Module) -> bool:
    """Whether the layer of the cache that a module fills also holds, or only holds, the state of a mixer beside it."""
    kinds, layer = getattr(getattr(module, "config", None), "layer_types", None), getattr(module, "layer_idx", None)
    kind = kinds[layer] if isinstance(kinds, (list, tuple)) and isinstance(layer, int) and layer < len(kinds) else ""
    return any(word in str(kind) for word in ("hybrid", "mamba", "linear"))


def out_of_reach(model: PreTrainedModel) -> str | None:
    """None, or why no site of a model can be served, not even by leaving its other sites as they are.

    An attention that picks keys writes them into its mask under the names sdpa and eager alone; under any other it leaves that
    to a kernel of its own, so the model would compute something else as soon as it carries the name ``qkv``. A decoder whose
    attention says that it is not causal leaves that to its mask, which qkv's mask function gives as padding alone.
    """
    for site in find_sites(model):
        module = model.get_submodule(site.name)
        if _picks_keys(module):
            return f"{site.name}: {PICKS}, and it would run without them beside other sites of qkv"
        if site.role == "encoder" and getattr(module, "is_decoder", False):
            return f"{site.name} belongs to a decoder and says that it is not causal (is_causal=False), so its mask decides"
    own = next((c for m in model.modules() if isinstance(m, PreTrainedModel) and (c := _own_cache(m))), None)
    return f"it fills a cache of its own kind ({own}), and qkv puts its layers into a DynamicCache" if own else None


def _own_cache(model: PreTrainedModel) -> str | None:
    """The name of a cache class that a model's file defines and its forward makes."""
    code, home = _code(model), vars(sys.modules[type(model).__module__])
    for name in code.co_names if code is not None else ():
        found = home.get(name)
        if isinstance(found, type) and issubclass(found, Cache) and found.__module__ == type(model).__module__:
            return name
    return None


def _picks_keys(module: nn.Module) -> bool:
    """Whether an attention hands the keys that an indexer picked to its attention function."""
    code = _code(module)
    return code is not None and not PICKED.isdisjoint(x for c in code.co_consts if isinstance(c, tuple) for x in c)


def _rope(name: str, module: nn.Module, modules: dict[str, nn.Module]) -> Rope | None:
    """The rotary embedding that serves a module: the nearest ``rotary_emb`` up the tree; none for converted layers."""
    if getattr(module, "qkv_attention", False):
        return None
    parts = name.split(".")
    for depth in range(len(parts), -1, -1):
        prefix = ".".join(parts[:depth])
        rotary = modules.get(f"{prefix}.rotary_emb" if prefix else "rotary_emb")
        if rotary is None:
            continue
        kind = getattr(rotary, "rope_type", "default")
        frequencies = getattr(rotary, "inv_freq", None)
        if isinstance(kind, dict):
            layer_type = getattr(module, "layer_type", None) or (
                "sliding_attention" if getattr(module, "is_sliding", False) else "full_attention"
            )
            kind, frequencies = kind.get(layer_type, "default"), getattr(rotary, f"{layer_type}_inv_freq", None)
        if not isinstance(frequencies, Tensor):
            return None
        return Rope(frequencies.detach().to(torch.float32), kind not in ("dynamic", "longrope"), str(kind))
    return None
