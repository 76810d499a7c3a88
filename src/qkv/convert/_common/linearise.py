r"""Linearising a pretrained attention: stage 1 teaches each layer its own softmax outputs, stage 2 fine-tunes the whole.

    transfer   the source's weights frozen, inputs of every layer those of the source:
               L = 1000 sum over layers of mean |o_source - o_new|^2, o before the output projection
    tune       all new layers in place: next-token loss, W <- W + (alpha / r) B A on q, k, v, o and what linearisation added

The low-rank updates are merged into the new layers' own projections at the end, so decoding pays nothing for them.

Axes: B batch, N tokens, H query heads, G key/value heads, D head width, E value width, m learned pairs.
"""

from __future__ import annotations

import inspect
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkv.convert._common.attention import PROJECTIONS, plain_projections, quiet, real_tokens, run, softmax_scales
from qkv.convert._common.saving import noted, saved
from qkv.convert._common.training import Keeper, descend, digest
from qkv.core.conversion import Conversion, batches
from qkv.core.errors import SavedDataError
from qkv.core.site import Site
from qkv.core.spec import param
from qkv.core.training import evaluated, frozen
from qkv.hosts import stack
from qkv.layers._linearised import LinearisedProjections, LinearisedShape

TRANSFER, TUNE = "transfer", "tune"
SCALE = 1000.0  # of the transfer loss


@dataclass(frozen=True, kw_only=True)
class Linearisation(Conversion):
    """Base of conversions to near softmax plus far linear attention: what they train, and how. Override `choices`."""

    transfer: int = param(2, "passes over the data that teach each layer its softmax outputs; 0: none", low=0)
    tune: int = param(2, "passes over the data that fine-tune the whole on the next token; 0: none", low=0)
    rate: float = param(1e-2, "learning rate of the transfer", low=0.0)
    tune_rate: float = param(1e-4, "learning rate of the fine-tuning", low=0.0)
    lora_rank: int = param(8, "rank of the updates of q, k, v, o in fine-tuning; 0: these stay as they are", low=0)
    lora_alpha: float = param(16.0, "scale of the updates: alpha / rank", low=0.0)
    seed: int = param(0, "of the batches' order and of the updates' initial values", low=0)

    @abstractmethod
    def choices(self) -> dict[str, Any]:
        """The fields of `LinearisedShape` that this method decides."""

    @abstractmethod
    def begin(self, layer: LinearisedProjections, pairs: tuple[Tensor, Tensor] | None) -> None:
        """Initial values of what linearisation adds. pairs: mean first keys ``[G, m, D]`` and values, where m > 0."""

    def slower(self) -> tuple[str, ...]:
        """Names of added parameters that the transfer moves at a tenth of its rate."""
        return ()

    def fits(self, site: Site, module: Any) -> str | None:
        """See `Conversion.fits`."""
        reason = plain_projections(site, module)
        if reason is None and getattr(module, "attention_dropout", 0.0):
            reason = f"it has attention dropout {module.attention_dropout}, which linear attention has no form of; set it to 0"
        return reason

    def build(self, model: Any, sites: Sequence[Site], data: Any) -> tuple[dict[str, nn.Module], dict[str, Any]]:
        """See `Conversion.build`; `data` may be `Lessons`, then training keeps checkpoints and goes on from them."""
        rows = batches(data, self.id, model)
        scales = softmax_scales(model, sites, rows[0], self.id)
        facts = {
            "method": self.to_dict(), "sites": [s.name for s in sites], "model": stack.fingerprint(model), "data": digest(rows),
        }  # fmt: skip
        keeper = Keeper(data, (TRANSFER, TUNE), facts)
        count = int(self.choices().get("num_meta", 0))
        pairs = first_pairs(model, sites, rows, count) if count else {}
        shapes = {s.name: self.shape(s, model.get_submodule(s.name), scales[s.name]) for s in sites}
        layers = {s.name: self.layer(model.get_submodule(s.name), shapes[s.name]) for s in sites}
        for name, layer in layers.items():
            self.begin(layer, pairs.get(name))
        losses: dict[str, list[float]] = {}
        for stage, passes, teach in ((TRANSFER, self.transfer, self.imitate), (TUNE, self.tune, self.fine_tune)):
            if passes and not keeper.past(stage):
                found = teach(model, layers, rows, keeper)
                losses[stage] = [found[0], found[-1]]
        for name, layer in layers.items():
            source = model.get_submodule(name)
            layer.requires_grad_(source.q_proj.weight.requires_grad).train(source.training)
        notes = {"sites": {n: shape.to_dict() for n, shape in shapes.items()}, "losses": losses}
        return dict(layers), notes

    def shape(self, site: Site, module: Any, scale: float) -> LinearisedShape:
        """The shape of the layer that replaces `module`."""
        return LinearisedShape(
            width=module.q_proj.in_features, heads=site.heads, kv_heads=site.kv_heads, head_dim=site.head_dim,
            value_dim=site.value_dim, scale=scale, bias=module.q_proj.bias is not None,
            out_bias=module.o_proj.bias is not None, **self.choices(),
        )  # fmt: skip

    @staticmethod
    def layer(module: Any, shape: LinearisedShape) -> Any:
        """A new layer with copies of the module's projections; what is added has no values yet."""
        from qkv.hosts.transformers_linearised import TransformersLinearisedAttention

        like = module.q_proj.weight
        out = TransformersLinearisedAttention(
            shape, module.config, module.layer_idx, device=like.device, dtype=like.dtype
        )
        for name in PROJECTIONS:
            getattr(out, name).load_state_dict(getattr(module, name).state_dict())
        return out

    # -- training -----------------------------------------------------------------------------------------------------

    def imitate(
        self, model: Any, layers: Mapping[str, Any], rows: Sequence[Mapping[str, Tensor]], keeper: Keeper
    ) -> list[float]:
        """Stage 1 on the model as it is: `layers` (by site) learn the outputs of its softmax. The loss of every step."""
        every = {f"{n}/{k}": p for n, layer in layers.items() for k, p in layer.added().items()}
        slow = {n: p for n, p in every.items() if n.rpartition("/")[2] in self.slower()}
        groups = [({n: p for n, p in every.items() if n not in slow}, self.rate), (slow, 0.1 * self.rate)]
        for layer in layers.values():
            layer.requires_grad_(False)
        for p in every.values():
            p.requires_grad_(True)
        with imitating(model, layers) as learn:
            return descend(
                TRANSFER,
                [g for g in groups if g[0]],
                rows,
                passes=self.transfer,
                seed=self.seed,
                keeper=keeper,
                learn=learn,
            )

    def fine_tune(
        self, model: Any, layers: Mapping[str, Any], rows: Sequence[Mapping[str, Tensor]], keeper: Keeper
    ) -> list[float]:
        """Stage 2 with `layers` (by site) in the model's place, where they may stand already. The loss of every step."""
        learning = {f"{n}/{k}": p for n, layer in layers.items() for k, p in layer.added().items()}
        for layer in layers.values():
            layer.requires_grad_(False)
        for p in learning.values():
            p.requires_grad_(True)
        with in_place(model, layers), updated(layers, self.lora_rank, self.lora_alpha, self.seed) as updates:

            def learn(batch: Mapping[str, Tensor]) -> float:
                loss = next_token_loss(model, batch)
                if loss.requires_grad:
                    loss.backward()
                return float(loss.detach())

            return descend(
                TUNE, [(learning | updates, self.tune_rate)], rows, passes=self.tune, seed=self.seed + 1, keeper=keeper,
                learn=learn, clip=1.0,
            )  # fmt: skip

    # -- saved --------------------------------------------------------------------------------------------------------

    def rebuild(
        self, model: Any, sites: Sequence[Site], tensors: Mapping[str, Tensor], notes: Mapping[str, Any]
    ) -> dict[str, nn.Module]:
        """See `Conversion.rebuild`."""
        facts = noted(self.id, sites, tensors, notes)
        return {s.name: self._restored(s, model.get_submodule(s.name), facts[s.name], tensors) for s in sites}

    def _restored(self, site: Site, module: Any, facts: Any, tensors: Mapping[str, Tensor]) -> nn.Module:
        from qkv.hosts.transformers_linearised import TransformersLinearisedAttention

        reason = self.fits(site, module)
        if reason is not None:
            raise SavedDataError(f"{self.id}: {site.name} is not what was converted: {reason}")
        scale = facts.get("scale") if isinstance(facts, Mapping) else None
        if not isinstance(scale, float) or not math.isfinite(scale) or scale <= 0:
            raise SavedDataError(f"{self.id}: the notes of {site.name} hold no softmax scale")
        shape = self.shape(site, module, scale)
        if facts != shape.to_dict():
            raise SavedDataError(
                f"{self.id}: {site.name} was saved as {facts}, this model and method give {shape.to_dict()}"
            )
        out = TransformersLinearisedAttention(
            shape, module.config, module.layer_idx, device="meta", dtype=module.q_proj.weight.dtype
        )
        want = out.state_dict()
        mine = saved(self.id, site.name, tensors, {k: tuple(v.shape) for k, v in want.items()})
        like = module.q_proj.weight
        out.load_state_dict({k: v.to(like.device, want[k].dtype) for k, v in mine.items()}, assign=True)
        out.requires_grad_(like.requires_grad)
        return out.train(module.training)


# -- stage 1 ----------------------------------------------------------------------------------------------------------


@contextmanager
def imitating(model: Any, layers: Mapping[str, Any]) -> Iterator[Callable[[Mapping[str, Tensor]], float]]:
    """While open: a function that runs the source on a batch and leaves the transfer loss's gradients in `layers`.

    Each layer learns as soon as the source's has run, on the same input, so one layer's graph is held at a time.
    """
    now: dict[str, Any] = {}
    handles: list[Any] = []

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
            now[name] = given["hidden_states"], given["position_embeddings"]

        return hook

    def into(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            hidden, (cos, sin) = now.pop(name)
            real = now["real"]
            with torch.enable_grad():
                got = layers[name].heads(hidden.detach(), cos, sin, real)
                gap = got.to(torch.promote_types(got.dtype, torch.float32)) - args[0].detach()
                loss = SCALE * (gap if real is None else gap[real]).square().mean()
                if loss.requires_grad:
                    loss.backward()
            now["loss"] += loss.detach()

        return hook

    def learn(batch: Mapping[str, Tensor]) -> float:
        real = real_tokens(batch)
        now["real"] = None if bool(real.all()) else real.to(model.device)
        now["loss"] = torch.zeros((), device=model.device, dtype=torch.float64)
        with quiet(model):
            run(model, batch)
        return float(now["loss"])

    try:
        for name in layers:
            module = model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
            handles.append(module.o_proj.register_forward_pre_hook(into(name)))
        yield learn
    finally:
        for handle in handles:
            handle.remove()


def first_pairs(
    model: Any, sites: Sequence[Site], rows: Sequence[Mapping[str, Tensor]], count: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean unrotated keys ``[G, m, D]`` and values ``[G, m, E]`` of the first m real tokens of the rows, by site, wide."""
    sums: dict[tuple[str, str], Tensor] = {}
    handles: list[Any] = []
    now: dict[str, Tensor] = {}

    def hook(name: str, which: str, heads: int) -> Callable[..., None]:
        def add(module: nn.Module, args: Any, out: Tensor) -> None:
            at = now["first"].to(out.device).unsqueeze(-1).expand(-1, -1, out.shape[-1])
            first = out.gather(1, at).to(torch.float64).sum(0)  # [m, G D]
            got = first.unflatten(-1, (heads, -1)).transpose(0, 1)
            sums[name, which] = sums[name, which] + got if (name, which) in sums else got

        return add

    total = 0
    try:
        for s in sites:
            module = model.get_submodule(s.name)
            handles += [
                getattr(module, p).register_forward_hook(hook(s.name, p, s.kv_heads)) for p in ("k_proj", "v_proj")
            ]
        with quiet(model):
            for batch in rows[:4]:
                real = real_tokens(batch)
                keep = real.any(-1)
                begin, length = real.int().argmax(-1), real.sum(-1)
                steps = torch.arange(count, device=real.device)
                now["first"] = (begin[:, None] + torch.minimum(steps, length[:, None] - 1))[keep]
                run(model, {k: v[keep.to(v.device)] for k, v in batch.items()})
                total += int(keep.sum())
    finally:
        for handle in handles:
            handle.remove()
    return {s.name: (sums[s.name, "k_proj"] / total, sums[s.name, "v_proj"] / total) for s in sites}


# -- stage 2 ----------------------------------------------------------------------------------------------------------


class Updated(nn.Module):
    """A frozen projection with a low-rank update beside it: ``W x + (alpha / r) B A x``; A random, B zero at first."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.linear, self.scale = linear, scale
        w = linear.weight
        wide = torch.promote_types(w.dtype, torch.float32)
        bound = linear.in_features**-0.5
        a = (torch.rand(rank, linear.in_features, generator=generator, dtype=torch.float64) * 2 - 1) * bound
        self.a = nn.Parameter(a.to(w.device, wide))
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank, device=w.device, dtype=wide))

    def forward(self, x: Tensor) -> Tensor:
        """`x` ``[..., in]`` -> ``[..., out]``."""
        low = F.linear(F.linear(x.to(self.a.dtype), self.a), self.b) * self.scale
        return self.linear(x) + low.to(x.dtype)

    def merged(self) -> nn.Linear:
        """The projection with the update added to its weight."""
        with torch.no_grad():
            w = self.linear.weight
            w.copy_(w.to(self.a.dtype) + self.scale * self.b @ self.a)
        return self.linear


@contextmanager
def updated(layers: Mapping[str, Any], rank: int, alpha: float, seed: int) -> Iterator[dict[str, nn.Parameter]]:
    """While open, q, k, v, o of every layer have low-rank updates (given by name); merged at the end, dropped on an error."""
    if not rank:
        yield {}
        return
    generator, out = torch.Generator().manual_seed(seed), {}
    for name, layer in layers.items():
        for p in PROJECTIONS:
            new = Updated(getattr(layer, p), rank, alpha / rank, generator)
            setattr(layer, p, new)
            out |= {f"{name}/{p}.a": new.a, f"{name}/{p}.b": new.b}
    done = False
    try:
        yield out
        done = True
    finally:
        for layer in layers.values():
            for p in PROJECTIONS:
                new = getattr(layer, p)
                setattr(layer, p, new.merged() if done else new.linear)


@contextmanager
def in_place(model: Any, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """While open, `layers` stand in the model (as they may already), in evaluation mode, and nothing else of it learns."""
    before = {name: model.get_submodule(name) for name in layers}
    learning = [p for layer in layers.values() for p in layer.parameters() if p.requires_grad]
    with frozen(model), evaluated(model):
        for p in learning:
            p.requires_grad_(True)
        try:
            for name, layer in layers.items():
                model.set_submodule(name, layer)
            model.eval()
            yield
        finally:
            for name, module in before.items():
                model.set_submodule(name, module)


def next_token_loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean cross-entropy of the next real token, in nats."""
    real = real_tokens(batch)
    logits = run(model, batch, head=True).logits[:, :-1]
    scored = (real[:, 1:] & real[:, :-1]).to(logits.device)
    target = batch["input_ids"][:, 1:].to(logits.device).masked_fill(~scored, -100)
    return F.cross_entropy(logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)), target.flatten())
