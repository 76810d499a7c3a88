"""The host for transformers: one attention function and one mask function, a cache layer, and the stack on the model.

How it works. `apply` registers the name ``qkv`` once in `AttentionInterface` and `AttentionMaskInterface`, makes it the
model's attention implementation, and hangs a `SiteState` on every attention module; the function looks there and decides per
module. A cache enters through the `DynamicCache` that `generate` (or a forward pass) makes: its still empty layers are
exchanged for ours. `update` only hands the new keys and values over; the attention function that follows immediately, on the
same tensors, does the work, because only it knows queries, mask and layer. Everything is per instance: no table of the
library is changed, and `revert` puts every reference back.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from qkv.caches._stores.dense import DenseCache
from qkv.core.attend import causal_mask, sdpa
from qkv.core.cache import Board, CacheMethod, Geometry, Rope, Step
from qkv.core.conversion import Conversion
from qkv.core.errors import InvalidInput, NotApplied, Refused, SavedDataError, StateError
from qkv.core.operator import Operator
from qkv.core.pattern import Pattern
from qkv.core.site import Site, choose
from qkv.core.spec import Method
from qkv.core.steering import Steering
from qkv.hosts import stack
from qkv.hosts.stack import Call, Entry, Plan, Report, SiteState, Verdict
from qkv.hosts.transformers_cache import QKVLayer, SavedCache, cache_manifest, handoff, layers_of, refill

NAME = "qkv"
_ATTRIBUTE = "_qkv"


# -- sites --------------------------------------------------------------------------------------------------------


def sites(model: PreTrainedModel) -> list[Site]:
    """See `qkv.sites`."""
    session = model.__dict__.get(_ATTRIBUTE)
    return list(session.sites) if session is not None else _find_sites(model)


def _find_sites(model: PreTrainedModel) -> list[Site]:
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
    if kind == "other":
        reason = (
            f"{type(module).__name__} does not go through transformers' attention interface, so there is no seam to reach "
            "its queries and keys"
        )
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
        scale=_scale(module),
        cached=causal and isinstance(layer, int),
        geometry=geometry,
        module=type(module).__name__,
        reason=reason,
    )


def _window(module: nn.Module, config: Any, layer: Any) -> int | None:
    """The sliding window of a module in tokens: its own attribute, or its configuration's (Mistral keeps it only there)."""
    if hasattr(module, "sliding_window"):
        window = module.sliding_window
    else:
        window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None)
        if kinds is not None and not (isinstance(layer, int) and "sliding" in kinds[layer]):
            window = None
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
    code = _code(module)
    if code is not None and "position_bias" in code.co_varnames:
        return "it adds a relative position bias to its logits, which qkv's attention forms do not compute"
    return None


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


# -- session ------------------------------------------------------------------------------------------------------


class Session:
    """Everything qkv has put on one model, and how to take it out again."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.entries: list[Entry] = []
        self.sites = _find_sites(model)
        self.original = {id(c): (c, c._attn_implementation_internal) for c in _configs(model)}
        self.swapped: list[tuple[nn.Module, str, nn.Module]] = []
        self.handles: list[Any] = []
        self.states: dict[str, SiteState] = {}
        self.base: str | None = None
        self.graph: Any = None
        self.room = 0  # tokens to reserve for in a new cache (graphs need static shapes)
        self.now: Any = None  # set while a decoding step is captured (see hosts/graph.py)
        self._positions: tuple[Any, int, int, Tensor] | None = None

    def state(self, site: Site) -> SiteState:
        """The state of a site, made on first use and hung on its module."""
        if site.name not in self.states:
            self.states[site.name] = SiteState(site, self)
            self.model.get_submodule(site.name).__dict__[_ATTRIBUTE] = self.states[site.name]
        return self.states[site.name]

    # -- hooks ----------------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Make ``qkv`` the attention implementation and watch for fresh caches."""
        _register()
        for site in self.sites:
            self.state(site)
        kinds = {kind for _, kind in self.original.values() if kind is not None}
        if not kinds <= {"sdpa", "eager", NAME}:
            raise Refused(
                f"the model runs attn_implementation={sorted(kinds)}; qkv stands on 'sdpa' or 'eager': load it with "
                "attn_implementation='sdpa'"
            )
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
        for handle in self.handles:
            handle.remove()
        self.model.__dict__.pop("_prepare_cache_for_generation", None)
        for name in self.states:
            self.model.get_submodule(name).__dict__.pop(_ATTRIBUTE, None)
        for parent, child, module in reversed(self.swapped):
            setattr(parent, child, module)
            module.__dict__.pop(_ATTRIBUTE, None)
        for config, kind in self.original.values():
            config._attn_implementation_internal = kind
        self.model.__dict__.pop(_ATTRIBUTE, None)

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
        names = list(inspect.signature(module.forward).parameters)
        at = names.index("past_key_values") if "past_key_values" in names else None
        positional = at is not None and at < len(args)
        cache = args[at] if positional else kwargs.get("past_key_values")  # type: ignore[index]
        if cache is not None:
            self.adopt(cache)
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
        owner = cache.__dict__.get(_ATTRIBUTE)
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
        cache.__dict__[_ATTRIBUTE] = self
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
        if getattr(generation_config, "is_assistant", False):
            cache.activate_past_recording()
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


def _session(model: PreTrainedModel, doing: str) -> Session:
    session = model.__dict__.get(_ATTRIBUTE)
    if session is None:
        raise NotApplied(f"{doing}: this model carries no qkv method; call qkv.apply(model, ...) first")
    return session


# -- the attention and mask functions -----------------------------------------------------------------------------


def _register() -> None:
    AttentionInterface.register(NAME, attention_function)
    AttentionMaskInterface.register(NAME, mask_function)


def mask_function(**kwargs: Any) -> Tensor | None:
    """Plain causal attention needs only the padding: ``[B, 1, 1, columns]`` or None. Everything else is written out."""
    plain = kwargs.get("allow_is_causal_skip", True) and not kwargs.get("allow_is_bidirectional_skip", False)
    plain = plain and kwargs.get("local_size") is None and isinstance(kwargs.get("kv_offset", 0), int)
    if not (plain and kwargs.get("kv_offset", 0) == 0):
        return sdpa_mask(**kwargs)
    padding, columns = kwargs.get("attention_mask"), int(kwargs["kv_length"])
    if padding is None:
        return None
    padding = padding.bool()
    if padding.shape[-1] < columns:
        padding = torch.nn.functional.pad(padding, (0, columns - padding.shape[-1]), value=True)
    padding = padding[:, :columns]
    return None if bool(padding.all()) else padding[:, None, None, :]


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The one attention function of every model that carries qkv. q ``[B, H, N, D]`` -> ``[B, N, H, E]``."""
    pending = getattr(handoff, "pending", None)
    layer: QKVLayer | None = None
    if pending is not None and pending[1] is key:
        layer = pending[0]
        handoff.pending = None
    state: SiteState | None = module.__dict__.get(_ATTRIBUTE)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if state is not None and state.instead is not None:
        if layer is not None:
            raise StateError(f"{state.site.name}: its attention is in other hands; call the model with use_cache=False")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return state.instead(state.site, query, key, value, scale=scale).transpose(1, 2).contiguous(), None
    if state is None or not state.applied:
        if layer is not None:
            raise StateError(f"{layer.state.site.name}: its cache layer is used by another module")
        out, weights = _original(module, query, key, value, attention_mask, dropout, scaling, causal, is_causal, kwargs)
        if state is not None and state.observers:
            _tell(state, query, key, value, attention_mask, scaling, causal, out)
        return out, weights
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise Refused(f"{state.site.name} passes {name!r} to its attention, which qkv's forms do not compute")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if layer is None:
        out = _uncached(state, query, key, value, attention_mask, dropout, scale, causal)
    else:
        out = _cached(state, layer, query, key, value, attention_mask, scale)
    state.tally.calls += 1
    return out.transpose(1, 2).contiguous(), None


def _tell(
    state: SiteState,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    causal: bool,
    out: Tensor,
) -> None:
    """Observers of a site without methods: the model computed as ever, they only learn of it."""
    if mask is not None:
        mask = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        mask = mask[..., : k.shape[2]]
    causal = causal and q.shape[2] > 1 and (mask is None or mask.shape[-2] == 1)
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    for callback in state.observers:
        callback(state.site, Call(q, k, v, mask, causal, scale, out.transpose(1, 2)))


def _uncached(
    state: SiteState, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, scale: float, causal: bool
) -> Tensor:
    """Training, encoders, cross-attention, or a cache that qkv does not own: k and v are all there is."""
    if mask is not None and mask.dtype != torch.bool:
        mask = mask > torch.finfo(mask.dtype).min / 2
    if mask is not None:
        mask = mask[..., : k.shape[2]]
    if mask is not None and mask.shape[-2] != 1:
        causal = False
    causal = causal and q.shape[2] > 1
    compute = state.compute(dropout)
    if compute is None:
        return sdpa(q, k, v, mask=mask, causal=causal, scale=scale, dropout=dropout)
    if dropout and not state.plain:
        raise Refused(
            f"{state.site.name} trains with attention dropout {dropout}, which only plain attention applies; set the "
            "model's attention dropout to 0"
        )
    return compute(q, k, v, mask=mask, causal=causal, scale=scale)


def _cached(
    state: SiteState, layer: QKVLayer, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Generation: the site's memory absorbs the new keys and values and attends."""
    b, _, n, _ = q.shape
    memory = layer.memory
    session, seen = state.session, memory.seen
    if session.now is not None:
        return memory.step(q, k, v, scale, session.now)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask > torch.finfo(mask.dtype).min / 2
    padding = other = None
    if mask is not None and mask.shape[-2] == 1 and mask.shape[1] == 1:
        padding = mask[:, 0, 0, : seen + n]
    elif mask is not None:
        other, mask = mask, None
    position = session.positions(mask, seen, b, n, q.device)
    compute = state.compute(running=layer.running)
    out = memory.attend(q, k, v, Step(position, scale, padding, other, compute, True))
    tally = state.tally
    tally.seen, tally.bytes = memory.seen, memory.bytes()
    tally.full_bytes = memory.full_bytes(k, v)
    tally.kept, tally.resident = memory.kept(), memory.resident()
    return out


def _original(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    causal: bool,
    is_causal: bool | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """A site without methods: what the model ran before."""
    n, m = q.shape[2], k.shape[2]
    if n > 1 and causal and (m > n if mask is None else mask.shape[-2] == 1):
        c = causal_mask(n, m, q.device)[None, None]  # torch's own causal mask is aligned to the upper left
        mask = c if mask is None else mask & c
    state = module.__dict__.get(_ATTRIBUTE)
    original = state.session.original if state is not None else {}
    _, before = original.get(id(getattr(module, "config", None)), (None, "sdpa"))
    if before == "eager":
        if mask is None and causal and n > 1:
            mask = causal_mask(n, m, q.device)[None, None]
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros((), dtype=q.dtype, device=q.device).masked_fill(~mask, torch.finfo(q.dtype).min)
        eager = sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[attr-defined]
        return eager(module, q, k, v, mask, scaling=scaling, dropout=dropout, **kwargs)
    return sdpa_attention_forward(
        module, q, k, v, mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )


# -- the surface --------------------------------------------------------------------------------------------------


def _judge(
    model: PreTrainedModel, methods: Sequence[Method], where: Any, found: Sequence[Site], session: Session | None
) -> Plan:
    """Verdicts per method and site, and the first reason why the whole cannot be applied."""
    verdicts: list[Verdict] = []
    refusal: str | None = None
    before = [(e.method, e.sites) for e in session.entries] if session is not None else []
    for method in methods:
        fits = _role_fits(method)
        if fits is not None:
            return Plan(tuple(verdicts), fits)
        chosen = choose(found, where)
        mine = [Verdict(method, s, _fits(model, method, s)) for s in chosen]
        verdicts += mine
        accepted = [v.site for v in mine if v.reason is None]
        if not accepted and refusal is None:
            refusal = (
                f"no attention site of {type(model).__name__} accepts {method}: {mine[0].site.name}: {mine[0].reason}"
            )
        if where != "all" and not callable(where) and len(accepted) < len(mine) and refusal is None:
            bad = next(v for v in mine if v.reason is not None)
            refusal = f"{bad.site.name}, which `where` names, refuses {method}: {bad.reason}"
        conflict = stack.clash([*before, (method, accepted)])
        refusal = refusal or conflict
        before.append((method, accepted))
    return Plan(tuple(verdicts), refusal)


def _fits(model: PreTrainedModel, method: Method, site: Site) -> str | None:
    """None, or why the method cannot act at the site: the rules of the stack, then those that look at the module."""
    module = model.get_submodule(site.name)
    if isinstance(method, CacheMethod) and hasattr(module, "qkv_cache_layer"):
        return f"{type(module).__name__} keeps a cache of its own, which holds no keys and values to act on"
    reason = stack.fits(method, site)
    if reason is None and isinstance(method, Conversion):
        return method.fits(site, module)
    return reason


def _role_fits(method: Method) -> str | None:
    if method.spec.kind in stack.ROLES:
        return None
    hints = {
        "objective": "objectives teach a student: use `qkv distill` or qkv.distill.distill",
        "probe": "probes measure: use `qkv inspect` or the probe's run(...)",
        "layer": "layers are built into new models",
        "decoding": "decoding methods have a generate function of their own",
    }
    return f"{method} is of kind {method.spec.kind}, which is not applied to a model; {hints.get(method.spec.kind, '')}".rstrip(
        "; "
    )


def plan(model: PreTrainedModel, *methods: Method | str, where: Any = "all") -> Plan:
    """See `qkv.plan`."""
    session = model.__dict__.get(_ATTRIBUTE)
    return _judge(model, stack.coerce(methods), where, sites(model), session)


def apply(
    model: PreTrainedModel, *methods: Method | str, where: Any = "all", data: Any = None, graph: bool = False
) -> PreTrainedModel:
    """See `qkv.apply`."""
    if not isinstance(model, PreTrainedModel):
        raise InvalidInput(f"expected a transformers PreTrainedModel, got {type(model).__name__}")
    chosen = stack.coerce(methods)
    existing = model.__dict__.get(_ATTRIBUTE)
    judged = _judge(model, chosen, where, sites(model), existing)
    if judged.refusal is not None:
        raise Refused(judged.refusal)
    session = existing or Session(model)
    undo = _Snapshot(session)
    try:
        if existing is None:
            session.install()
            model.__dict__[_ATTRIBUTE] = session
        for method in chosen:
            _enter(session, method, where, data)
        if graph:
            from qkv.hosts import graph as graphs

            session.graph = graphs.install(session)
    except BaseException:
        undo.restore(existing is None)
        raise
    return model


class _Snapshot:
    """The session before `apply`, to go back to when it fails half way."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.entries = list(session.entries)
        self.swapped = len(session.swapped)
        self.sites, self.objects = session.sites, dict(session.states)
        self.states = {
            n: (s.operator, s.pattern, s.cache, list(s.steering), s.applied) for n, s in session.states.items()
        }

    def restore(self, fresh: bool) -> None:
        session = self.session
        if fresh:
            session.remove()
            return
        for parent, child, module in reversed(session.swapped[self.swapped :]):
            setattr(parent, child, module)
        del session.swapped[self.swapped :]
        session.entries, session.sites, session.states = self.entries, self.sites, self.objects
        for name, state in session.states.items():
            operator, pattern, cache, steering, applied = self.states.get(name, (None, None, None, [], False))
            state.operator, state.pattern, state.cache = operator, pattern, cache
            state.steering, state.applied = steering, applied


def _enter(session: Session, method: Method, where: Any, data: Any) -> None:
    """Put one judged method at its sites."""
    at = [s for s in choose(session.sites, where) if _fits(session.model, method, s) is None]
    entry = Entry(method, where if not callable(where) else [s.name for s in at], at)
    if method.spec.kind == "conversion":
        _convert(session, entry, data)
        session.entries.append(entry)
        return
    for site in at:
        state = session.state(site)
        state.applied = True
        if isinstance(method, CacheMethod):
            state.cache = method
        elif isinstance(method, Pattern):
            state.pattern = method
        elif isinstance(method, Operator):
            state.operator = method
        elif isinstance(method, Steering):
            state.steering.append(method)
    session.entries.append(entry)


def _convert(session: Session, entry: Entry, data: Any, tensors: dict[str, Tensor] | None = None) -> None:
    """Exchange modules for what a conversion builds (from data, or from saved tensors), remembering the old ones."""
    method: Any = entry.method
    before = {s.name: s for s in session.sites}
    if tensors is None:
        built, notes = method.build(session.model, entry.sites, data)
    else:
        built, notes = method.rebuild(session.model, entry.sites, tensors, entry.notes), entry.notes
    for name, module in built.items():
        parent_name, _, child = name.rpartition(".")
        parent = session.model.get_submodule(parent_name)
        session.swapped.append((parent, child, parent.get_submodule(child)))
        setattr(parent, child, module)
    entry.notes = notes
    session.sites = _find_sites(session.model)
    for site in session.sites:
        state = session.states.get(site.name)
        if site.name in built:
            new = SiteState(site, session, applied=True)
            if state is not None:  # other methods at the site go on; the counts start anew with the module
                new.operator, new.pattern, new.cache = state.operator, state.pattern, state.cache
                new.steering, new.observers = state.steering, state.observers
            session.states[site.name] = new
            session.model.get_submodule(site.name).__dict__[_ATTRIBUTE] = new
        elif state is not None:
            state.site = site
    entry.sites = [s for s in session.sites if s.name in built] or [before[n] for n in built if n in before]


def revert(model: PreTrainedModel) -> PreTrainedModel:
    """See `qkv.revert`."""
    _session(model, "revert").remove()
    return model


def carried(model: PreTrainedModel) -> list[tuple[Method, list[str]]]:
    """See `qkv.hosts.carried`."""
    session = model.__dict__.get(_ATTRIBUTE)
    return [] if session is None else [(e.method, [s.name for s in e.sites]) for e in session.entries]


def report(model: PreTrainedModel) -> Report:
    """See `qkv.report`."""
    session = _session(model, "report")

    def names(state: SiteState) -> tuple[str, ...]:
        return tuple(str(e.method) for e in session.entries if any(s.name == state.site.name for s in e.sites))

    return stack.summarise(list(session.states.values()), names)


def captured(model: PreTrainedModel) -> bool:
    """Whether this model's decoding steps run as CUDA graphs (``graph=True``), which need room made beforehand."""
    session = model.__dict__.get(_ATTRIBUTE)
    return session is not None and session.graph is not None


def fresh_cache(model: PreTrainedModel, prompt: int, *, room: int = 0, record: bool = False) -> Cache:
    """An empty cache for a generation loop of one's own, as `generate` would make it under the applied methods.

    prompt: its columns, padding included (what is compressed at once). room: columns to reserve, 0 for none. record: every
    later block is provisional until ``crop(-n)``, which takes back its newest n tokens and settles the others.
    """
    cache = DynamicCache(config=cast(Any, model.config))
    session = model.__dict__.get(_ATTRIBUTE)
    if session is not None:
        session.adopt(cache, prompt=prompt)
    if room:
        for layer in cast(list[Any], cache.layers):
            if isinstance(layer, QKVLayer):
                layer.memory.reserve(room)
    if record:
        cache.activate_past_recording()
    return cache


@contextmanager
def observe(model: PreTrainedModel, callback: Callable[[Site, Call], None], where: Any = "all") -> Iterator[None]:
    """See `qkv.hosts.observe`."""
    session = model.__dict__.get(_ATTRIBUTE)
    fresh = session is None
    if session is None:
        session = Session(model)
        session.install()
        model.__dict__[_ATTRIBUTE] = session
    try:
        chosen = choose(session.sites, where)
        bad = [s for s in chosen if s.reason is not None]
        if bad and where != "all":
            raise Refused(f"{bad[0].name} cannot be observed: {bad[0].reason}")
        watched = [session.state(s) for s in chosen if s.reason is None]
        if not watched:
            raise Refused(f"no attention site can be observed: {bad[0].name}: {bad[0].reason}")
        for state in watched:
            state.observers.append(callback)
        try:
            yield
        finally:
            for state in watched:
                state.observers.remove(callback)
    finally:
        if fresh:
            session.remove()


@contextmanager
def attending(model: PreTrainedModel, function: Callable[..., Tensor], where: Any = "all") -> Iterator[list[Site]]:
    """See `qkv.hosts.attending`."""
    session = model.__dict__.get(_ATTRIBUTE)
    fresh = session is None
    if session is None:
        session = Session(model)
        session.install()
        model.__dict__[_ATTRIBUTE] = session
    try:
        chosen = choose(session.sites, where)
        states = [session.state(s) for s in chosen]
        for state in states:
            if state.site.reason is not None:
                raise Refused(f"the attention of {state.site.name} cannot be exchanged: {state.site.reason}")
            if state.instead is not None or state.cache is not None or not state.plain:
                names = ", ".join(str(e.method) for e in session.entries if state.site in e.sites) or "another loop"
                raise Refused(
                    f"{state.site.name} carries {names}, which an attention put in its place would bypass; revert it"
                )
        for state in states:
            state.instead = function
        try:
            yield chosen
        finally:
            for state in states:
                state.instead = None
    finally:
        if fresh:
            session.remove()


def save(model: PreTrainedModel, path: str | Path) -> None:
    """See `qkv.save`."""
    session = _session(model, "save")
    tensors: dict[str, Tensor] = {}
    for i, entry in enumerate(session.entries):
        if entry.method.spec.kind == "conversion":
            for site in entry.sites:
                module = model.get_submodule(site.name)
                tensors |= {f"{i}/{site.name}/{k}": v for k, v in module.state_dict().items()}
    stack.write_folder(path, _manifest(session), tensors)


def _manifest(session: Session) -> dict[str, Any]:
    """What the model is and what it carries."""
    model = session.model
    return {
        "library": "transformers",
        "stack": [
            {"method": e.method.to_dict(), "sites": [s.name for s in e.sites], "notes": e.notes} for e in session.entries
        ],
        "base": {
            "name": session.base or getattr(model.config, "_name_or_path", "") or None,
            "class": type(model).__name__,
            "fingerprint": _base_fingerprint(session),
        },
    }


def save_cache(model: PreTrainedModel, cache: Cache, path: str | Path, input_ids: Tensor | None = None) -> None:
    """See `qkv.hosts.save_cache`."""
    session = _session(model, "save_cache")
    if cache.__dict__.get(_ATTRIBUTE) is not session:
        raise StateError("this cache was not filled under the methods that the model carries now; nothing was written")
    own, tensors = cache_manifest(cache, input_ids)
    stack.write_folder(path, _manifest(session) | own, tensors)


def load_cache(model: PreTrainedModel, path: str | Path) -> SavedCache:
    """See `qkv.hosts.load_cache`."""
    session = _session(model, "load_cache")
    manifest, tensors = stack.read_folder(path)
    layers_of(manifest, path)  # a folder of another sort is refused before the model is looked at
    here, base = _manifest(session), manifest.get("base")
    if not isinstance(base, dict) or here["base"]["fingerprint"] != base.get("fingerprint"):
        whose = base.get("class") if isinstance(base, dict) else "model"
        raise SavedDataError(f"{path} holds the cache of a {whose} with other weights; load it with the model that filled it")
    saved = stack.methods_of(manifest, path)
    if [(m.to_dict(), names) for m, names, _ in saved] != [(e["method"], e["sites"]) for e in here["stack"]]:
        theirs, ours = (", ".join(map(str, x)) for x in ([m for m, _, _ in saved], [e.method for e in session.entries]))
        raise SavedDataError(f"{path} was filled under {theirs}; the model carries {ours}, or carries them at other sites")
    cache = fresh_cache(model, int(manifest["seen"]))
    return refill(cache, manifest, tensors, path, next(model.parameters()).device)


def _base_fingerprint(session: Session) -> str:
    """The fingerprint of the model without its conversions (modules are put back for the moment)."""
    now = [(parent, child, parent.get_submodule(child)) for parent, child, _ in session.swapped]
    try:
        for parent, child, module in reversed(session.swapped):
            setattr(parent, child, module)
        return stack.fingerprint(session.model)
    finally:
        for parent, child, module in now:
            setattr(parent, child, module)


def restore(
    path: str | Path,
    manifest: dict[str, Any],
    tensors: dict[str, Tensor],
    model: PreTrainedModel | None,
    resolve: Callable[..., Any],
    **options: Any,
) -> PreTrainedModel:
    """See `qkv.load`."""
    if manifest.get("what") == "cache":
        raise SavedDataError(f"{path} holds a filled cache, not methods; read it with qkv.hosts.load_cache(model, path)")
    entries = stack.methods_of(manifest, path)
    base = manifest.get("base")
    if not isinstance(base, dict) or not isinstance(base.get("fingerprint"), str):
        raise SavedDataError(f"{path}: the manifest does not say which base model it belongs to")
    if model is None:
        name = base.get("name")
        if not isinstance(name, str) or not name:
            raise SavedDataError(f"{path}: the base model had no name or folder; pass it: qkv.load(path, model=base)")
        model = resolve(name, **options)[0]
    elif options:
        raise InvalidInput(f"unexpected arguments {sorted(options)}: the base model was given")
    assert model is not None
    if _ATTRIBUTE in model.__dict__:
        raise Refused("the given model already carries methods; revert it first")
    got = stack.fingerprint(model)
    if got != base["fingerprint"]:
        raise SavedDataError(
            f"{path} was saved on a {base.get('class')} with other weights (fingerprint {base['fingerprint'][:12]}, "
            f"this {type(model).__name__} has {got[:12]}); pass the model it was made from"
        )
    used: set[str] = set()
    session = Session(model)
    try:
        session.install()
        model.__dict__[_ATTRIBUTE] = session
        for i, (method, names, notes) in enumerate(entries):
            if method.spec.kind != "conversion":
                _enter(session, method, list(names), None)
                continue
            entry = Entry(method, list(names), choose(session.sites, list(names)), notes)
            prefix = f"{i}/"
            mine = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
            used |= {prefix + k for k in mine}
            _convert(session, entry, None, mine)
            session.entries.append(entry)
        left = sorted(set(tensors) - used)
        if left:
            raise SavedDataError(
                f"{path} holds unexpected tensors: {', '.join(left[:3])}{' ...' if len(left) > 3 else ''}"
            )
    except BaseException:
        session.remove()
        raise
    return model
