"""Attention that a model of transformers computes in its own forward, not behind the attention interface: BLOOM, MPT, Falcon.

A `Seam` says how one such module makes queries, keys and values, and what it does with the attention's output; `join` puts a
forward of ours on every module (an attribute of the instance) that runs these around the host's attention function, and `part`
takes it off again. Where no method acts, the module's own forward runs, on the mask that it expects.

BLOOM and MPT add linear position biases (ALiBi) to their logits: ``slope_h * (key position - query position)``, with the
slopes that their own code makes. Falcon with rotary positions is served; with ALiBi transformers rounds the biases to bfloat16
and, under ``eager``, adds them twice, which no rule of positions gives.

Axes: B batch, H query heads, G key/value heads, N queries, M columns, D head width, C model width.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qkv.core.attend import causal_mask
from qkv.core.errors import Refused

Parts = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Weights:
    """What makes an attention's queries and keys of the residual stream: ``q_h = query[h] x + query_bias[h]``, x after its norm.

    query ``[H, D, C]``, key ``[G, D, C]``, their biases ``[H, D]``, ``[G, D]``; gain, offset ``[C]`` of the norm; clip: the
    largest size of a number in a query or key, or None.
    """

    query: Tensor
    key: Tensor
    query_bias: Tensor
    key_bias: Tensor
    gain: Tensor
    offset: Tensor
    scale: float
    clip: float | None = None


@dataclass(frozen=True)
class Seam:
    """How one family's attention module is taken apart.

    takes: the arguments of its forward that were looked at. cache: the one that is the cache. project: queries, keys and values
    from the hidden states and the other arguments. finish: its output from the heads side by side ``[B, N, H * D]``. refuses:
    why one module cannot be served, or None. slopes: of its biases, or None. weights: see `Weights`. hides: whether its mask
    says True where a key is hidden. columns: whether its biases count columns, not tokens.
    """

    takes: frozenset[str]
    cache: str
    project: Callable[[Any, Tensor, dict[str, Any]], Parts]
    finish: Callable[[Any, Tensor, dict[str, Any]], Tensor]
    scale: Callable[[Any], float]
    dropout: Callable[[Any], float]
    kv_heads: Callable[[Any], int]
    slopes: Callable[[Any], tuple[float, ...] | None]
    refuses: Callable[[Any], str | None]
    weights: Callable[[Any, Any], Weights] | None = None
    hides: bool = False
    columns: bool = False


def seam_of(module: nn.Module) -> Seam | None:
    """The seam of a module, or None; its forward must still take what was looked at."""
    return _known(type(module))[0]


@functools.lru_cache(maxsize=64)
def _known(kind: type[nn.Module]) -> tuple[Seam | None, inspect.Signature | None]:
    """The seam of a class of modules and what its forward takes, looked up once."""
    name = kind.__module__
    seam = SEAMS.get((name.rpartition(".")[2], kind.__name__)) if name.startswith("transformers.models.") else None
    if seam is None:
        return None, None
    signature = inspect.signature(kind.forward)
    return (seam if set(signature.parameters) - {"self", "kwargs"} == seam.takes else None), signature


def weights_of(model: nn.Module, name: str) -> Weights:
    """The weights behind the queries and keys of the module `name`. Raises `Refused` where its seam does not know them."""
    module, parent = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
    seam = seam_of(module)
    if seam is None or seam.weights is None:
        raise Refused(f"{name}: how {type(module).__name__} makes its queries and keys is not known")
    return seam.weights(module, parent)


def join(model: nn.Module) -> list[nn.Module]:
    """Put our forward on every module that has a seam; gives these modules."""
    joined = []
    for module in model.modules():
        seam = seam_of(module)
        if seam is not None:
            module.__dict__["forward"] = functools.partial(forward, module)
            joined.append(module)
    return joined


def part(modules: list[nn.Module]) -> None:
    """Take our forward off again."""
    for module in modules:
        module.__dict__.pop("forward", None)


def hides(config: Any) -> bool:
    """Whether a model wants its mask with True where a key is hidden, and never None."""
    return getattr(config, "model_type", None) == "mpt"


def written(config: Any) -> bool:
    """Whether a model asks for its mask written out although plain causal attention needs none."""
    return getattr(config, "model_type", None) == "falcon"


def hidden(mask: Tensor | None) -> Tensor:
    """A mask (True = visible) as such a model takes it; empty for None."""
    return torch.zeros(0, dtype=torch.bool) if mask is None else ~mask


def one_stretch(padding: Tensor) -> bool:
    """Whether the real tokens of every row ``[B, M]`` stand next to each other, so that columns and tokens count alike."""
    starts = (padding[:, 1:] & ~padding[:, :-1]).sum(-1) + padding[:, 0]
    return bool((starts <= 1).all())


def forward(module: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """As the module's own forward; its attention is the host's."""
    from qkv.hosts.transformers_attention import ATTRIBUTE, attention_function

    seam, signature = _known(type(module))
    assert seam is not None and signature is not None
    bound = signature.bind(module, hidden_states, *args, **kwargs)
    given: dict[str, Any] = {k: v for k, v in bound.arguments.items() if k not in ("self", "hidden_states", "kwargs")}
    state = module.__dict__.get(ATTRIBUTE)
    mask, cache = given.get("attention_mask"), given.get(seam.cache)
    if seam.hides and mask is not None:
        mask = None if not mask.numel() else ~mask
    if state is None or not (state.applied or state.instead):
        return _own(module, seam, hidden_states, given, mask, cache)
    query, key, value = seam.project(module, hidden_states, given)
    seen = 0
    if cache is not None:
        seen = int(cache.get_seq_length(module.layer_idx))
        n = key.shape[2]
        key, value = cache.update(key, value, module.layer_idx)
        if key.shape[2] not in (n, seen + n):
            raise Refused(
                f"{state.site.name}: its cache gives {key.shape[2]} keys after {seen + n} tokens (a static cache?), whose "
                "positions are unknown; leave past_key_values and cache_implementation out"
            )
    drop = seam.dropout(module) if module.training else 0.0
    out, weights = attention_function(
        module, query, key, value, mask, dropout=drop, scaling=seam.scale(module), is_causal=True
    )
    return seam.finish(module, out.flatten(2), given), weights


def _own(
    module: Any, seam: Seam, hidden_states: Tensor, given: dict[str, Any], mask: Tensor | None, cache: Any
) -> tuple[Tensor, Tensor | None]:
    """What the module computes by itself, on the mask that it expects: written out, causal, added to the logits."""
    n = hidden_states.shape[1]
    if mask is None or mask.dtype == torch.bool:
        columns = n + (0 if cache is None else int(cache.get_seq_length(module.layer_idx)))
        if mask is None or mask.shape[-2] == 1:
            order = causal_mask(n, columns, hidden_states.device)[None, None]
            mask = order if mask is None else order & mask[..., :columns]
        if not seam.hides:
            zero = torch.zeros((), dtype=hidden_states.dtype, device=hidden_states.device)
            mask = zero.masked_fill(~mask, torch.finfo(zero.dtype).min)
    assert mask is not None
    given = given | {"attention_mask": ~mask if seam.hides else mask}
    return type(module).forward(module, hidden_states, **given)


# -- the families -----------------------------------------------------------------------------------------------


def _home(module: nn.Module) -> Any:
    return sys.modules[type(module).__module__]


def _bloom_finish(module: Any, out: Tensor, given: dict[str, Any]) -> Tensor:
    more = nn.functional.dropout(module.dense(out), p=module.hidden_dropout, training=module.training)
    return given["residual"] + more


def _bloom_slopes(module: Any) -> tuple[float, ...]:
    table = _home(module).build_alibi_tensor(torch.ones(1, 2, dtype=torch.int64), module.num_heads, torch.float32)
    return tuple(table[:, 0, 1].tolist())


def _bloom_refuses(module: Any) -> str | None:
    if module.pretraining_tp > 1 and module.slow_but_exact:
        return "it sums its output in slices (slow_but_exact), which qkv does not; set slow_but_exact to False"
    return None


def _bloom_weights(module: Any, block: Any) -> Weights:
    d, norm = module.head_dim, block.input_layernorm
    weight, bias = module.query_key_value.weight, module.query_key_value.bias
    by_head, offsets = weight.detach().unflatten(0, (-1, 3, d)), bias.detach().unflatten(0, (-1, 3, d))
    return Weights(
        by_head[:, 0],
        by_head[:, 1],
        offsets[:, 0],
        offsets[:, 1],
        norm.weight.detach(),
        norm.bias.detach(),
        module.inv_norm_factor,
    )


def _mpt_project(module: Any, hidden_states: Tensor, given: dict[str, Any]) -> Parts:
    mixed = module.Wqkv(hidden_states)
    if module.clip_qkv:
        mixed = mixed.clamp(min=-module.clip_qkv, max=module.clip_qkv)
    query, key, value = (x.unflatten(-1, (module.n_heads, -1)).transpose(1, 2) for x in mixed.chunk(3, dim=-1))
    return query, key, value


def _mpt_slopes(module: Any) -> tuple[float, ...]:
    table = _home(module).build_mpt_alibi_tensor(module.n_heads, 2)  # [H, 1, 2]
    return tuple((table[:, 0, 1] - table[:, 0, 0]).tolist())


def _mpt_weights(module: Any, block: Any) -> Weights:
    query, key, _ = (x.unflatten(0, (module.n_heads, -1)) for x in module.Wqkv.weight.detach().chunk(3))
    none, gain = query.new_zeros(query.shape[:2]), block.norm_1.weight.detach()
    return Weights(query, key, none, none, gain, torch.zeros_like(gain), float(module.softmax_scale), module.clip_qkv)


def _falcon_project(module: Any, hidden_states: Tensor, given: dict[str, Any]) -> Parts:
    query, key, value = (x.transpose(1, 2) for x in module._split_heads(module.query_key_value(hidden_states)))
    query, key = _home(module).apply_rotary_pos_emb(query, key, *given["position_embeddings"])
    return query, key, value


def _falcon_refuses(module: Any) -> str | None:
    if module.config.alibi:
        return (
            "it adds ALiBi biases to its logits that transformers rounds to bfloat16 (and adds twice under eager), which qkv's "
            "attention forms do not compute"
        )
    return None


SEAMS = {
    ("modeling_bloom", "BloomAttention"): Seam(
        takes=frozenset("hidden_states residual alibi attention_mask layer_past use_cache output_attentions".split()),
        cache="layer_past",
        project=lambda module, x, given: module._reshape(module.query_key_value(x)),
        finish=_bloom_finish,
        scale=lambda module: float(module.inv_norm_factor),
        dropout=lambda module: module.attention_dropout.p,
        kv_heads=lambda module: module.num_heads,
        slopes=_bloom_slopes,
        refuses=_bloom_refuses,
        weights=_bloom_weights,
    ),
    ("modeling_mpt", "MptAttention"): Seam(
        takes=frozenset("hidden_states position_bias past_key_values attention_mask".split()),
        cache="past_key_values",
        project=_mpt_project,
        finish=lambda module, out, given: module.out_proj(out),
        scale=lambda module: float(module.softmax_scale),
        dropout=lambda module: module.attn_dropout_p,
        kv_heads=lambda module: module.n_heads,
        slopes=_mpt_slopes,
        refuses=lambda module: None,
        weights=_mpt_weights,
        hides=True,
        columns=True,
    ),
    ("modeling_falcon", "FalconAttention"): Seam(
        takes=frozenset(
            "hidden_states alibi attention_mask position_ids layer_past use_cache output_attentions position_embeddings".split()
        ),
        cache="layer_past",
        project=_falcon_project,
        finish=lambda module, out, given: module.dense(out),
        scale=lambda module: float(module.head_dim**-0.5),
        dropout=lambda module: 0.0,  # with rotary positions the module applies none
        kv_heads=lambda module: module.num_heads if module.new_decoder_architecture else module.num_kv_heads,
        slopes=lambda module: None,
        refuses=_falcon_refuses,
    ),
}
"""By the name of the module's file and class."""
