"""Reading a pretrained rotary attention: its projections, whether it is what formulas assume, and its statistics.

Axes: B batch, T tokens, H query heads, G key/value heads, D head width, W model width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qkv.core.errors import InvalidInput, Refused
from qkv.core.site import Site
from qkv.core.training import evaluated
from qkv.ops._common.positions import rotated

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def plain_projections(site: Site, module: nn.Module) -> str | None:
    """None, or why `module` is not rotary attention with separate q, k, v, o projections, as far as its parts tell."""
    name = type(module).__name__
    if site.role != "self" or not site.cached:
        return f"it is a {site.role} attention; causal self-attention of a decoder is converted"
    config = getattr(module, "config", None)
    # Some models (Mistral) tell their window to the attention function only, from the configuration.
    window = (
        getattr(module, "sliding_window", getattr(config, "sliding_window", None))
        if site.window is None
        else site.window
    )
    if window is not None:
        return f"it has a sliding window of {window} tokens"
    missing = [p for p in PROJECTIONS if not isinstance(getattr(module, p, None), nn.Linear)]
    if missing:
        return f"{name} has no linear {', '.join(missing)}; separate q, k, v, o projections are needed"
    norms = [n for n in ("q_norm", "k_norm", "qk_norm") if getattr(module, n, None) is not None]
    if norms:
        return f"{name} normalises queries or keys after their projection ({', '.join(norms)}), which no weights can absorb"
    q, k, v, o = (getattr(module, p) for p in PROJECTIONS)
    h, g, d = site.heads, site.kv_heads, site.head_dim
    width = q.in_features
    want = {"q_proj": (h * d, width), "k_proj": (g * d, width), "v_proj": (g * d, width), "o_proj": (width, h * d)}
    for p, linear in zip(PROJECTIONS, (q, k, v, o), strict=True):
        if tuple(linear.weight.shape) != want[p] or not linear.weight.is_floating_point():
            return (
                f"{p}.weight is {linear.weight.dtype} {tuple(linear.weight.shape)}, expected floating point {want[p]}"
            )
    if len({x.bias is None for x in (q, k, v)}) > 1:
        return "some of q, k, v have a bias and some have none"
    if "position_embeddings" not in inspect.signature(module.forward).parameters:
        return f"{name} is not passed its rotary angles (position_embeddings)"
    rope = site.geometry.rope
    if rope is None:
        return "it has no rotary embedding that qkv can read"
    if not rope.fixed:
        return f"its rotary frequencies depend on the length ({rope.kind})"
    if rope.kind == "yarn":
        return "its rotary embedding also scales queries and keys (yarn), which parts without rotation would lose"
    if 2 * rope.frequencies.shape[0] != d:
        return f"only {2 * rope.frequencies.shape[0]} of its {d} channels are rotated"
    return None


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own mode comes back."""
    with evaluated(model), torch.no_grad():
        yield


def run(model: Any, batch: Mapping[str, Tensor], head: bool = False) -> Any:
    """One forward pass without a cache; head: through the language-model head."""
    device = model.device
    body = model if head else getattr(model, "base_model", model)
    return body(**{k: v.to(device) for k, v in batch.items()}, use_cache=False)


def real_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """Bool ``[B, T]``, False = padding."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def softmax_scales(model: Any, sites: Sequence[Site], batch: Mapping[str, Tensor], who: str) -> dict[str, float]:
    """Each site's softmax scale, after proving on real tokens that it is plain rotary attention. Raises `Refused`.

    Proven per site: the queries and keys that attend are the projections, rotated in half-split pairs; the values are the
    projection; what enters o_proj is the attention's result; what leaves the module is o_proj's.
    """
    from qkv.hosts import observe

    tokens = batch["input_ids"][0][real_tokens(batch)[0]][:64].unsqueeze(0)
    if tokens.shape[1] < 2:
        raise InvalidInput(f"{who}: the first row of data= has {tokens.shape[1]} real tokens; pass whole texts")
    seen: dict[str, dict[str, Any]] = {s.name: {} for s in sites}
    handles: list[Any] = []

    def keep(name: str, key: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            seen[name][key] = (out[0] if isinstance(out, tuple) else out).clone()  # some models clip in place

        return hook

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            bound = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
            seen[name]["angles"] = bound.get("position_embeddings")

        return hook

    def into(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            seen[name]["mixed"] = args[0]

        return hook

    try:
        for s in sites:
            module = model.get_submodule(s.name)
            handles.append(module.register_forward_pre_hook(before(s.name), with_kwargs=True))
            handles.append(module.register_forward_hook(keep(s.name, "out")))
            handles.append(module.o_proj.register_forward_pre_hook(into(s.name)))
            handles += [getattr(module, p).register_forward_hook(keep(s.name, p)) for p in PROJECTIONS]
        watch = [s.name for s in sites]
        with observe(model, lambda site, call: seen[site.name].update(call=call), watch), quiet(model):
            run(model, {"input_ids": tokens})
    finally:
        for handle in handles:
            handle.remove()
    return {s.name: _scale(s, seen[s.name], who) for s in sites}


def _scale(site: Site, got: dict[str, Any], who: str) -> float:
    if "call" not in got or got.get("angles") is None:
        raise Refused(
            f"{who}: {site.name} did not run on the calibration tokens; convert the sites that do (where=...)"
        )
    call, (cos, sin) = got["call"], got["angles"]

    def heads(name: str, n: int) -> Tensor:
        return got[name].unflatten(-1, (n, -1)).transpose(1, 2)

    pairs = {
        "queries are not its rotated projection": (call.q, rotated(heads("q_proj", site.heads), cos, sin)),
        "keys are not its rotated projection": (call.k, rotated(heads("k_proj", site.kv_heads), cos, sin)),
        "values are not its projection": (call.v, heads("v_proj", site.kv_heads)),
        "output projection does not read the heads": (got["mixed"], call.out.transpose(1, 2).flatten(2)),
        "output is not its output projection": (got["out"], got["o_proj"]),
    }
    for wrong, (have, want) in pairs.items():
        gap, size = float((have - want).abs().max()), float(want.abs().max())
        if not gap <= 16 * torch.finfo(want.dtype).eps * size:
            raise Refused(
                f"{who}: {site.name} ({site.module}) is no plain rotary attention: its {wrong} (off by {gap:.2g} of "
                f"{size:.2g}; pairs (i, i + D/2), no norm, no clipping, no gate are expected)"
            )
    return float(call.scale)


@dataclass
class Moments:
    """Second moments of one site's projections before rotation, uncentred, float64, summed over real tokens.

    kv ``[2L, 2L]`` of [keys ; values] with L = G D channels each; q ``[H D, H D]`` or None.
    """

    kv: Tensor
    q: Tensor | None = None
    tokens: int = 0
    _key: Tensor | None = field(default=None, repr=False)


def record(
    model: Any, sites: Sequence[Site], data: Sequence[Mapping[str, Tensor]], who: str, queries: bool
) -> dict[str, Moments]:
    """Run the model over `data` and add up the second moments of every site; padding rows count nothing.

    Memory: ``(2L)^2`` float64 per site, and ``(H D)^2`` with `queries`, on the site's device.
    """
    out: dict[str, Moments] = {}
    handles: list[Any] = []
    now: dict[str, Tensor] = {}

    def rows(x: Tensor) -> Tensor:
        return x[now["real"].to(x.device)].to(torch.float64)

    def key(m: Moments) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, y: Tensor) -> None:
            m._key = rows(y)

        return hook

    def value(m: Moments) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, y: Tensor) -> None:
            assert m._key is not None
            both = torch.cat((m._key, rows(y)), dim=-1)
            m.kv.addmm_(both.T, both)
            m.tokens, m._key = m.tokens + both.shape[0], None

        return hook

    def query(m: Moments) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, y: Tensor) -> None:
            assert m.q is not None
            x = rows(y)
            m.q.addmm_(x.T, x)

        return hook

    try:
        for s in sites:
            module = model.get_submodule(s.name)
            wide = {"dtype": torch.float64, "device": module.k_proj.weight.device}
            n = 2 * s.kv_heads * s.head_dim
            m = out[s.name] = Moments(torch.zeros(n, n, **wide))
            handles.append(module.k_proj.register_forward_hook(key(m)))
            handles.append(module.v_proj.register_forward_hook(value(m)))
            if queries:
                m.q = torch.zeros(s.heads * s.head_dim, s.heads * s.head_dim, **wide)
                handles.append(module.q_proj.register_forward_hook(query(m)))
        with quiet(model):
            for batch in data:
                now["real"] = real_tokens(batch)
                run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    for name, m in out.items():
        if not bool(torch.isfinite(m.kv).all()):
            raise InvalidInput(f"{who}: {name} gave NaN or infinite keys or values on the calibration inputs")
        if not m.tokens:
            raise InvalidInput(f"{who}: data= holds no real token (attention_mask is all zero)")
    return out


def perplexity(model: Any, data: Sequence[Mapping[str, Tensor]]) -> float:
    """The exponential of the mean next-token loss over the real tokens of `data`, row by row."""
    total, count = 0.0, 0
    with quiet(model):
        for batch in data:
            for i in range(batch["input_ids"].shape[0]):
                row = {k: v[i : i + 1] for k, v in batch.items()}
                logits = run(model, row, head=True).logits[0, :-1].float()
                real = real_tokens(row)[0].to(logits.device)
                scored = real[1:] & real[:-1]
                target = row["input_ids"][0, 1:].to(logits.device)
                loss = nn.functional.cross_entropy(logits[scored], target[scored], reduction="sum")
                total, count = total + float(loss), count + int(scored.sum())
    return float(torch.tensor(total / max(count, 1), dtype=torch.float64).exp())
