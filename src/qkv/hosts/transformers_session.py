"""What qkv has put on one transformers model: hooks, states of sites, and the caches that it takes over."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache
from transformers.generation.configuration_utils import GenerationMode

from qkv.caches._stores.dense import DenseCache
from qkv.core.cache import Board
from qkv.core.errors import InvalidInput, NotApplied, Refused, StateError
from qkv.core.site import Site
from qkv.hosts.stack import Entry, SiteState
from qkv.hosts.transformers_attention import ATTRIBUTE, NAME, register
from qkv.hosts.transformers_cache import RECORDS, QKVLayer, handoff, record_past
from qkv.hosts.transformers_inline import join, part
from qkv.hosts.transformers_repair import Repairs
from qkv.hosts.transformers_sites import find_sites, out_of_reach


class Session:
    """Everything qkv has put on one model, and how to take it out again."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.entries: list[Entry] = []
        self.sites = find_sites(model)
        self.original = {id(c): (c, c._attn_implementation_internal) for c in _configs(model)}
        self.swapped: list[tuple[nn.Module, str, nn.Module]] = []
        self.handles: list[Any] = []
        self.inline: list[nn.Module] = []  # modules with a forward of ours
        self.states: dict[str, SiteState] = {}
        self.base: str | None = None
        self.graph: Any = None
        self.repair: Repairs | None = None
        self.room = 0  # tokens to reserve for in a new cache (graphs need static shapes)
        self.now: Any = None  # set while a decoding step is captured (see hosts/graph.py)
        self._positions: tuple[Any, int, int, Tensor] | None = None

    def state(self, site: Site) -> SiteState:
        """The state of a site, made on first use and hung on its module."""
        if site.name not in self.states:
            self.states[site.name] = SiteState(site, self)
            self.model.get_submodule(site.name).__dict__[ATTRIBUTE] = self.states[site.name]
        return self.states[site.name]

    # -- hooks ----------------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Make ``qkv`` the attention implementation and watch for fresh caches."""
        reason = out_of_reach(self.model)
        if reason is not None:
            raise Refused(f"{type(self.model).__name__} cannot be served: {reason}")
        register()
        for site in self.sites:
            self.state(site)
        kinds = {kind for _, kind in self.original.values() if kind is not None}
        if not kinds <= {"sdpa", "eager", NAME}:
            raise Refused(
                f"the model runs attn_implementation={sorted(kinds)}; qkv stands on 'sdpa' or 'eager': load it with "
                "attn_implementation='sdpa'"
            )
        self.inline = join(self.model)
        if self.inline:  # it has no seam for the name: only its mask is made by it
            for config, _ in self.original.values():
                config._attn_implementation_internal = NAME
        else:
            self.model.set_attn_implementation(NAME)
        if any(c._attn_implementation_internal != NAME for c in (self.model.config,)):
            raise Refused(
                f"{type(self.model).__name__} does not let its attention implementation be set; its attention does not "
                "go through transformers' attention interface"
            )
        for module in self._cache_makers():
            self.handles.append(module.register_forward_pre_hook(self._before_forward, with_kwargs=True))
        original = getattr(self.model, "_prepare_cache_for_generation", None)
        if original is not None:
            self.model.__dict__["_prepare_cache_for_generation"] = functools.partial(_prepare_cache, self, original)

    def remove(self) -> None:
        """Put every reference back."""
        if self.graph is not None:
            self.graph.remove()
        if self.repair is not None:
            self.repair.remove()
        for handle in self.handles:
            handle.remove()
        self.model.__dict__.pop("_prepare_cache_for_generation", None)
        part(self.inline)
        for name in self.states:
            self.model.get_submodule(name).__dict__.pop(ATTRIBUTE, None)
        for parent, child, module in reversed(self.swapped):
            setattr(parent, child, module)
            module.__dict__.pop(ATTRIBUTE, None)
        for config, kind in self.original.values():
            config._attn_implementation_internal = kind
        self.model.__dict__.pop(ATTRIBUTE, None)

    def _cache_makers(self) -> list[nn.Module]:
        """The innermost transformers models that hold cached sites: they make a cache when they are given none."""
        out: list[nn.Module] = []
        for site in self.sites:
            if not site.cached:
                continue
            parts = site.name.split(".")
            for depth in range(len(parts) - 1, -1, -1):
                module = self.model.get_submodule(".".join(parts[:depth]))
                if isinstance(module, PreTrainedModel):
                    if module not in out:
                        out.append(module)
                    break
        return out

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        handoff.pending = None  # what a forward that failed half way has left
        names = list(inspect.signature(module.forward).parameters)
        _refuse_nothing(names, args, kwargs)
        at = names.index("past_key_values") if "past_key_values" in names else None
        positional = at is not None and at < len(args)
        cache = args[at] if positional else kwargs.get("past_key_values")  # type: ignore[index]
        if cache is not None:
            self.adopt(cache)
            _expect(cache)
            return None
        use = kwargs.get("use_cache")
        checkpointing = getattr(module, "gradient_checkpointing", False) and module.training
        if use is False or (use is None and not getattr(module.config, "use_cache", False)) or checkpointing:
            return None
        if getattr(module.config, "is_encoder_decoder", False):
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        else:
            cache = DynamicCache(config=cast(Any, module.config))
        self.adopt(cache)
        _expect(cache)
        if positional:
            args = (*args[:at], cache, *args[at + 1 :])  # type: ignore[misc,operator]
        else:
            kwargs = kwargs | {"past_key_values": cache}
        return args, kwargs

    # -- caches ---------------------------------------------------------------------------------------------------

    def adopt(self, cache: Any, prompt: int | None = None) -> None:
        """Make the empty layers of a fresh `DynamicCache` ours; a cache of ours passes, a filled foreign one is refused."""
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        served = [s for s in self.sites if s.cached and self._serves(s)]
        if not served or not isinstance(cache, Cache):
            return
        owner = cache.__dict__.get(ATTRIBUTE)
        if owner is not None:
            if owner is not self:
                raise StateError(
                    "this cache was filled under another stack of methods or another model; start a fresh one (leave "
                    "past_key_values out)"
                )
            self._announce(cache, prompt)
            return
        compressing = [s for s in served if self.states[s.name].cache is not None or self._own_layer(s) is not None]
        held = cast(list[Any], cache.layers)
        filled = any(int(layer.get_seq_length()) > 0 for layer in held if hasattr(layer, "get_seq_length"))
        if type(cache) is not DynamicCache or filled:
            if not compressing:
                return
            what = f"a {type(cache).__name__}" + (" that already holds tokens" if filled else "")
            who = self.states[compressing[0].name].cache or compressing[0].module
            raise Refused(
                f"{who} keeps its own cache and was given {what}; leave past_key_values "
                "and cache_implementation out, or pass a fresh DynamicCache()"
            )
        layers = list(cache.layers)
        last = max(cast(int, s.layer) for s in served)
        while len(layers) <= last:
            layers.append(DynamicLayer())
        board = Board()
        for site in served:
            layers[cast(int, site.layer)] = layer = self._layer(site)
            if isinstance(layer, QKVLayer):
                layer.memory.join(board)
                if self.room:
                    layer.memory.reserve(self.room)
        cache.layers = layers
        cache.__dict__[ATTRIBUTE] = self
        self._announce(cache, prompt)

    def _serves(self, site: Site) -> bool:
        state = self.states.get(site.name)
        if state is None or not state.applied:
            return False
        return state.cache is not None or site.window is None

    def _own_layer(self, site: Site) -> Callable[[], Any] | None:
        """What makes the cache layer of a converted site that keeps something else than keys and values."""
        return getattr(self.model.get_submodule(site.name), "qkv_cache_layer", None)

    def _layer(self, site: Site) -> Any:
        own = self._own_layer(site)
        if own is not None:
            return own()
        method = self.states[site.name].cache
        return QKVLayer(
            DenseCache(site.geometry) if method is None else method.layer(site.geometry), self.states[site.name]
        )

    @staticmethod
    def _announce(cache: Cache, prompt: int | None) -> None:
        if prompt is not None:
            for layer in cache.layers:
                if isinstance(layer, QKVLayer):
                    layer.memory.announce(prompt)

    def positions(self, mask: Tensor | None, seen: int, rows: int, new: int, device: torch.device) -> Tensor:
        """``[B, N]`` int32 logical position of each new token in its row, -1 for padding; one computation per forward."""
        kept = self._positions
        if kept is not None and kept[0] is mask and kept[1] == seen and kept[2] == new and kept[3].shape[0] == rows:
            if kept[3].device == device:
                return kept[3]
        if mask is None:
            out = torch.arange(seen, seen + new, device=device, dtype=torch.int32).expand(rows, new)
        else:
            real = mask[:, 0, 0, : seen + new]
            out = (real.cumsum(-1, dtype=torch.int32) - 1).masked_fill(~real, -1)[:, seen:].to(device)
        self._positions = (mask, seen, new, out)
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        """A copied cache stays in this session; a copied model gets a session of its own."""
        if id(self.model) not in memo:
            return self
        twin = object.__new__(Session)
        memo[id(self)] = twin
        for name, value in self.__dict__.items():
            twin.__dict__[name] = None if name == "_positions" else copy.deepcopy(value, memo)
        return twin


def _expect(cache: Any) -> None:
    """A forward pass of a model with a session is about to fill its own layers: any other filling is a mistake."""
    held = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    for layer in getattr(held, "layers", ()):
        if isinstance(layer, QKVLayer):
            layer.awaited = True


def _refuse_nothing(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise `InvalidInput` for a batch without rows or tokens, before a layer stumbles over its shape."""
    for name in ("input_ids", "inputs_embeds", "decoder_input_ids"):
        x = kwargs.get(name)
        if x is None and name in names and names.index(name) < len(args):
            x = args[names.index(name)]
        if isinstance(x, Tensor) and x.ndim >= 2 and 0 in x.shape[:2]:
            raise InvalidInput(
                f"{name} of shape {tuple(x.shape)} hold nothing to attend to; give at least one row of at least one token"
            )


def _prepare_cache(
    session: Session,
    original: Callable[..., Any],
    generation_config: Any,
    model_kwargs: dict[str, Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """`generate` has made its cache: take it over before anything is written to it."""
    out = original(generation_config, model_kwargs, *args, **kwargs)
    cache = model_kwargs.get("past_key_values")
    if cache is not None:
        mask = model_kwargs.get(
            "decoder_attention_mask" if session.model.config.is_encoder_decoder else "attention_mask"
        )
        # transformers >= 5.2x drops a mask of ones and leaves its length on the configuration.
        length = getattr(generation_config, "_mask_length", None) if mask is None else mask.shape[-1]
        if session.graph is not None:
            total = kwargs.get("max_cache_length", args[2] if len(args) > 2 else None)
            session.room = (total or generation_config.max_length) + 1
        session.adopt(cache, prompt=length if isinstance(length, int) and length > 0 else None)
        mode = kwargs.get("generation_mode", args[0] if args else None)
        assisted = mode == GenerationMode.ASSISTED_GENERATION and not RECORDS  # else the loop asks, after the prompt
        if assisted or getattr(generation_config, "is_assistant", False):
            record_past(cache)
    return out


def _configs(model: PreTrainedModel) -> list[Any]:
    out: list[Any] = []
    queue = [m.config for m in model.modules() if isinstance(m, PreTrainedModel)]
    while queue:
        config = queue.pop()
        if any(config is c for c in out):
            continue
        out.append(config)
        queue += [sub for key in getattr(config, "sub_configs", {}) if (sub := getattr(config, key, None)) is not None]
    return out


def session_of(model: PreTrainedModel, doing: str) -> Session:
    """The session of a model, or `NotApplied`; doing: the function that asks."""
    session = model.__dict__.get(ATTRIBUTE)
    if session is None:
        raise NotApplied(f"{doing}: this model carries no qkv method; call qkv.apply(model, ...) first")
    return session


def fresh_cache(model: PreTrainedModel, prompt: int, *, room: int = 0, record: bool = False) -> Cache:
    """An empty cache for a generation loop of one's own, as `generate` would make it under the applied methods.

    prompt: its columns, padding included (what is compressed at once). room: columns to reserve, 0 for none. record: every
    later block is provisional until ``crop(-n)``, which takes back its newest n tokens and settles the others.
    """
    cache = DynamicCache(config=cast(Any, model.config))
    session = model.__dict__.get(ATTRIBUTE)
    if session is not None:
        session.adopt(cache, prompt=prompt)
    if room:
        for layer in cast(list[Any], cache.layers):
            if isinstance(layer, QKVLayer):
                layer.memory.reserve(room)
    if record:
        record_past(cache)
    return cache
