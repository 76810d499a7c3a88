"""The attention and the mask function of models that carry qkv: what a module's site says decides what runs."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from qkv.core.attend import LinearBias, causal_mask, sdpa
from qkv.core.cache import Step
from qkv.core.errors import Refused, StateError
from qkv.hosts.stack import Call, SiteState
from qkv.hosts.transformers_cache import QKVLayer, handoff
from qkv.hosts.transformers_inline import hidden, hides, one_stretch, written

NAME = "qkv"
"""The attention implementation, as transformers knows it."""

ATTRIBUTE = "_qkv"
"""Where a model keeps its session, a module its `SiteState` and a cache the session that owns it."""

UNSERVED = ("softcap", "s_aux", "sinks", "position_bias", "indices", "block_indices")
"""Inputs that some models give their attention function and that qkv's forms do not compute."""


def register() -> None:
    """Make both functions known to transformers under `NAME`."""
    AttentionInterface.register(NAME, attention_function)
    AttentionMaskInterface.register(NAME, mask_function)


def mask_function(**kwargs: Any) -> Tensor | None:
    """Plain causal attention needs only the padding: ``[B, 1, 1, columns]`` or None. Everything else is written out.

    Models that want True where a key is hidden get that, and an empty tensor for None.
    """
    config = kwargs.get("config")
    if not hides(config):
        return _mask(kwargs, written(config))
    mask = _mask(kwargs, False)
    if mask is not None and mask.shape[-2] == 1 and not one_stretch(mask[:, 0, 0]):
        raise Refused(
            f"{type(config).__name__}: padding lies between real tokens, and this model's position biases count it; "
            "pad on one side"
        )
    return hidden(mask)


def _mask(kwargs: dict[str, Any], asked: bool) -> Tensor | None:
    """asked: the model has its mask written out although nothing but padding is hidden."""
    plain = (asked or kwargs.get("allow_is_causal_skip", True)) and not kwargs.get("allow_is_bidirectional_skip", False)
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
    if query.dtype != value.dtype and torch.is_autocast_enabled(query.device.type):  # as SDPA does under autocast
        query, key, value = (x.to(torch.get_autocast_dtype(x.device.type)) for x in (query, key, value))
    state: SiteState | None = module.__dict__.get(ATTRIBUTE)
    if layer is None and pending is not None and pending[0].state is state:
        handoff.pending = None
        raise StateError(pending[0].lost())
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
    for name in UNSERVED:
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
    mask = _visible(state, mask)
    if mask is not None:
        mask = mask[..., : k.shape[2]]
    causal = causal and q.shape[2] > 1 and (mask is None or mask.shape[-2] == 1)
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    for callback in state.observers:
        callback(state.site, Call(q, k, v, mask, causal, scale, out.transpose(1, 2)))


def _visible(state: SiteState, mask: Tensor | None) -> Tensor | None:
    """A mask as bools, True where a key may be seen. Raises `Refused` for one that adds more than 0 or nothing to the logits."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        raise Refused(f"{state.site.name} was given a mask of {mask.dtype}; a mask is bool, or float with 0 and -inf")
    seen = mask > torch.finfo(mask.dtype).min / 2
    if bool(mask.masked_fill(~seen, 0).any()):
        raise Refused(
            f"{state.site.name} adds a bias to its logits through its mask (values other than 0 and -inf), which qkv's attention "
            "forms do not compute"
        )
    return seen


def _uncached(
    state: SiteState, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, scale: float, causal: bool
) -> Tensor:
    """Training, encoders, cross-attention, or a cache that qkv does not own: k and v are all there is."""
    mask = _visible(state, mask)
    if mask is not None:
        mask = mask[..., : k.shape[2]]
    if mask is not None and mask.shape[-2] != 1:
        causal = False
    causal = causal and q.shape[2] > 1
    compute = state.compute(dropout)
    if compute is None:
        bias = _bias(state, q, k, mask)
        return sdpa(q, k, v, mask=mask, causal=causal, scale=scale, dropout=dropout, bias=bias)
    if state.site.geometry.slopes is not None:
        raise Refused(
            f"{state.site.name} adds linear position biases (ALiBi), which what was put in its place does not take"
        )
    if dropout and not state.plain:
        raise Refused(
            f"{state.site.name} trains with attention dropout {dropout}, which only plain attention applies; set the "
            "model's attention dropout to 0"
        )
    return compute(q, k, v, mask=mask, causal=causal, scale=scale)


def _bias(state: SiteState, q: Tensor, k: Tensor, mask: Tensor | None) -> LinearBias | None:
    """The site's position biases where k are all keys and q belongs to the last of them."""
    geometry, n, m = state.site.geometry, q.shape[2], k.shape[2]
    if geometry.slopes is None:
        return None
    padding = mask if mask is not None and mask.shape[1] == 1 and mask.shape[2] == 1 else None
    position = state.session.positions(padding, 0, q.shape[0], m, q.device)
    return geometry.bias(position[:, m - n :], position[:, None])


class _Forward(torch.autograd.Function):
    """Attention that read a filled cache, ``(out, q, site) -> out``: what is stored has left the graph, so nothing flows back."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, q: Tensor, site: str) -> Tensor:
        ctx.site = site
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise Refused(
            f"{ctx.site}: a gradient reached attention that read a filled cache, whose tokens carry none; train on a text in one "
            "call (use_cache=False), or decode under torch.no_grad()"
        )


def _cached(
    state: SiteState, layer: QKVLayer, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Generation: the site's memory absorbs the new keys and values and attends."""
    b, _, n, _ = q.shape
    memory = layer.memory
    session, seen = state.session, memory.seen
    if session.now is not None:
        return memory.step(q, k, v, scale, session.now)
    mask = _visible(state, mask)
    padding = other = None
    if mask is not None and mask.shape[-2] == 1 and mask.shape[1] == 1:
        padding = mask[:, 0, 0, : seen + n]
    elif mask is not None:
        other, mask = mask, None
    position = session.positions(mask, seen, b, n, q.device)
    compute = state.compute(running=layer.running)
    out = memory.attend(q, k, v, Step(position, scale, padding, other, compute, True))
    if seen and q.requires_grad and torch.is_grad_enabled():
        out = _Forward.apply(out, q, state.site.name)
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
    state = module.__dict__.get(ATTRIBUTE)
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
