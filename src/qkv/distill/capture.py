"""Reading a network while it runs: q, k, v and outputs of chosen layers, hidden states, logits; with gradients where it learns.

q, k, v before rotary positions come from hooks on the projections (whatever attention kernel runs); as the attention sees
them, from `qkv.hosts.observe`. No attention map is ever asked of the model.

Axes: B batch, N tokens, H query heads, G key/value heads, D head width, C model width.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qkv import hosts
from qkv.core.errors import InvalidInput, NeverFired, Refused
from qkv.core.objective import Needs, Net, Projections, Trace
from qkv.core.site import Site

# Names of the three projections among the children of an attention module, and of norms that act before any rotation.
PROJECTIONS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
)
NORMS = (("q_norm", "k_norm"), ("q_layernorm", "k_layernorm"))


def describe(model: Any, tokenizer: Any = None) -> Net:
    """The structure of a model, as objectives judge it. Raises `Refused` for encoder-decoders and models without attention."""
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise Refused(f"{type(model).__name__} is an encoder-decoder; its layers do not form one stack to distil")
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    sites = tuple(s for s in hosts.sites(model) if s.role != "cross")
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weight = getattr(head, "weight", None)
    outputs = weight.shape[0] if isinstance(weight, Tensor) else None
    if outputs is None and "Classification" in type(model).__name__:
        outputs = config.num_labels
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    return Net(
        name=type(model).__name__,
        family=str(getattr(text, "model_type", "")),
        width=int(text.hidden_size),
        sites=sites,
        vocabulary=embeddings.num_embeddings if isinstance(embeddings, nn.Embedding) else None,
        tokens=None if tokenizer is None else _vocabulary(tokenizer),
        outputs=outputs,
    )


def _vocabulary(tokenizer: Any) -> str:
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256("\0".join(f"{i}\1{word}" for word, i in words).encode()).hexdigest()


def real_tokens(batch: Mapping[str, Any]) -> Tensor:
    """Bool ``[B, N]``, True at real tokens, from ``attention_mask`` or the inputs' shape (``[B, 1]`` for pixels)."""
    mask = batch.get("attention_mask")
    if mask is not None:
        if mask.ndim != 2:
            raise InvalidInput(f"attention_mask must be [B, N] with 1 = real token, got {tuple(mask.shape)}")
        return mask.bool()
    for name in ("input_ids", "inputs_embeds", "pixel_values"):
        if batch.get(name) is not None:
            x = batch[name]
            return torch.ones(x.shape[: 1 if name == "pixel_values" else 2], dtype=torch.bool, device=x.device).view(
                len(x), -1
            )
    raise InvalidInput(f"a batch needs input_ids, inputs_embeds or pixel_values; got {sorted(batch)}")


class Tap:
    """Reads `needs` from a model: ``with Tap(model, net, needs) as tap: trace = tap(batch)``.

    learns: gradients flow and the model keeps its mode; otherwise it runs in eval mode without gradients, and its mode is
    put back after each call. Hooks stay while the context is open, so that layers recomputed in a backward pass (gradient
    checkpointing) run as they ran before, and record only during a call.
    """

    def __init__(self, model: Any, net: Net, needs: Needs, *, learns: bool) -> None:
        self.model, self.net, self.needs, self.learns = model, net, needs, learns
        self.accepted = set(inspect.signature(model.forward).parameters)
        self.found: dict[tuple[str, int], dict[str, Tensor]] = {}
        self.given: dict[int, Tensor] = {}
        self.armed = False
        self.stack = ExitStack()
        fused = {n for n in needs.projections if _unrotated(model, net, n)}
        self.observed = fused | set(needs.attention)
        self.hooked = {n: _projections(model, net.site(n)) for n in needs.projections if n not in fused}
        for n in (x for x in needs.hidden if not 0 <= x <= net.layers):
            raise Refused(f"{net.name} has hidden states 0 to {net.layers}; asked for {n}")
        for n in self.observed:
            if net.site(n).reason is not None:
                raise Refused(f"{net.name}: layer {n} cannot be read: {net.site(n).reason}")

    def __enter__(self) -> Tap:
        with ExitStack() as stack:
            for layer, modules in self.hooked.items():
                for name, module in modules.items():
                    hook = module.register_forward_hook(partial(self._projected, layer, name, self.net.site(layer)))
                    stack.callback(hook.remove)
            for layer in self.needs.outputs:
                module = self.model.get_submodule(self.net.site(layer).name)
                stack.callback(module.register_forward_hook(partial(self._gave, layer)).remove)
            if self.observed:
                names = [self.net.site(n).name for n in sorted(self.observed)]
                stack.enter_context(hosts.observe(self.model, self._attended, names))
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.close()

    def __call__(self, batch: Mapping[str, Any]) -> Trace:
        """Run the model on a batch of its inputs and return what was asked for; inputs it does not take are left out."""
        inputs = {k: v for k, v in batch.items() if k in self.accepted and k != "labels"}
        if self.needs.hidden:
            inputs["output_hidden_states"] = True
        if "use_cache" in self.accepted or hasattr(self.model.config, "use_cache"):
            inputs["use_cache"] = False
        mode, self.found, self.given, self.armed = self.model.training, {}, {}, True
        try:
            if not self.learns:
                self.model.eval()
            with torch.set_grad_enabled(self.learns and torch.is_grad_enabled()):
                output = self.model(**inputs)
        finally:
            self.armed = False
            if self.model.training != mode:
                self.model.train(mode)
        return self._trace(real_tokens(batch), output)

    def _trace(self, real: Tensor, output: Any) -> Trace:
        before = {n: self._layer("projections", n) for n in self.needs.projections}
        seen = {n: self._layer("attention", n) for n in self.needs.attention}
        hidden = {n: output.hidden_states[n] for n in self.needs.hidden}
        skipped = [self.net.site(n).name for n in self.needs.outputs if n not in self.given]
        if skipped:
            raise NeverFired(f"{self.net.name}: {', '.join(skipped[:3])} did not run in this forward pass")
        sizes = {p.q.shape[2] for p in (*before.values(), *seen.values())}
        sizes |= {x.shape[1] for x in (*hidden.values(), *self.given.values())}
        if len(sizes) == 1 and real.shape[1] == 1:
            real = real.expand(-1, sizes.pop())
        elif sizes - {real.shape[1]}:
            raise InvalidInput(f"{self.net.name} ran on {sorted(sizes)} tokens, the batch has {real.shape[1]}")
        logits, outputs = output.logits if self.needs.logits else None, self.given
        self.found, self.given = {}, {}
        return Trace(self.net, real, before, seen, hidden, logits, outputs)

    def _layer(self, kind: str, layer: int) -> Projections:
        found = self.found.get((kind if layer in self.hooked and kind == "projections" else "attention", layer), {})
        missing = [name for name in "qkv" if name not in found]
        if missing:
            raise NeverFired(
                f"{self.net.site(layer).name}: {', '.join(missing)} of layer {layer} were not seen in this forward pass; the "
                "layer was skipped, or its projections are not on the model's path"
            )
        q, k, v = (found[name] for name in "qkv")
        if (
            self.learns
            and torch.is_grad_enabled()
            and not q.requires_grad
            and any(p.requires_grad for p in self.model.parameters())
        ):
            raise InvalidInput(
                f"{self.net.site(layer).name}: what was read carries no gradient; with gradient checkpointing use "
                "use_reentrant=False, and do not freeze everything up to this layer"
            )
        site = self.net.site(layer)
        scale = float(found["scale"]) if "scale" in found else site.scale or site.head_dim**-0.5
        return Projections(q, k, v, scale)

    def _projected(self, layer: int, name: str, site: Site, module: nn.Module, args: Any, out: Tensor) -> None:
        if self.armed:
            dims = (site.heads if name == "q" else site.kv_heads, site.value_dim if name == "v" else site.head_dim)
            self.found.setdefault(("projections", layer), {})[name] = _heads(out, *dims, args, site)

    def _gave(self, layer: int, module: nn.Module, args: Any, out: Any) -> None:
        if self.armed:
            self.given[layer] = out[0] if isinstance(out, tuple) else out

    def _attended(self, site: Site, call: Any) -> None:
        if self.armed:
            layer = next(n for n, s in enumerate(self.net.sites) if s.name == site.name)
            found = {"q": call.q, "k": call.k, "v": call.v, "scale": call.scale}
            self.found[("attention", layer)] = found


def _heads(x: Tensor, heads: int, width: int, args: Any, site: Site) -> Tensor:
    """``[B, H, N, D]`` from the output of a projection ``[B, N, H * D]`` or of a norm over heads in either order of axes."""
    if x.ndim == 3 and x.shape[-1] == heads * width:
        return x.unflatten(-1, (heads, width)).transpose(1, 2)
    if x.ndim == 4 and x.shape[-1] == width:
        first, second = x.shape[1] == heads, x.shape[2] == heads
        if first and second:  # as many tokens as heads: the memory order of the norm's input tells tokens from heads
            first = args[0].stride(1) < args[0].stride(2)
        if first or second:
            return x if first else x.transpose(1, 2)
    raise Refused(f"{site.name}: a projection gave {tuple(x.shape)}; expected {heads} heads of width {width}")


def _unrotated(model: Any, net: Net, layer: int) -> bool:
    """Whether the attention sees q and k as projected, and the projections cannot be hooked one by one (fused)."""
    site = net.site(layer)
    if _separate(model.get_submodule(site.name)) is not None:
        return False
    turns = site.geometry.rope is not None or any("rotary" in n or "rope" in n for n, _ in model.named_modules())
    if turns:
        raise Refused(
            f"{site.name} ({site.module}) computes q, k, v in one projection and rotates them inside, so they cannot be read "
            "before rotary positions; read them after (minilm: after_rope=True)"
        )
    return True


def _separate(module: nn.Module) -> tuple[str, str, str] | None:
    children = dict(module.named_children())
    return next((names for names in PROJECTIONS if all(n in children for n in names)), None)


def _projections(model: Any, site: Site) -> dict[str, nn.Module]:
    """The modules whose outputs are q, k, v before rotary positions."""
    module = model.get_submodule(site.name)
    names = _separate(module)
    assert names is not None
    out = {letter: module.get_submodule(name) for letter, name in zip("qkv", names, strict=True)}
    children = dict(module.named_children())
    for pair in NORMS:
        if all(n in children and not isinstance(children[n], nn.Identity) for n in pair):
            out |= {"q": children[pair[0]], "k": children[pair[1]]}
    return out
