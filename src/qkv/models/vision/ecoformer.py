r"""EcoFormer from a pretrained vision transformer: its attention exchanged for fitted codes, in the steps of the paper.

    shared(model)                    queries and keys of every layer but the last become one projection, under softmax; fine-tune
    fit(model, pixel_values=images)  hash functions of every exchanged layer from its own tokens, codes in the place of softmax;
                                     fine-tune, and fit again at the beginning of every epoch

Works on any model whose attention modules hold the four projections ``q_proj``, ``k_proj``, ``v_proj``, ``o_proj`` of one width
and give back (output, map), as ViT, DeiT and DINOv2 of transformers 5 do; the model is changed in place. Maps of exchanged layers
are not made: they come back as None.

Liu et al. 2022, EcoFormer: Energy-Saving Attention with Linear Complexity, arXiv:2209.09004.
"""

from __future__ import annotations

from typing import Any, TypeVar, final

import torch
from torch import Tensor, nn

from qkv.core.errors import InvalidInput, InvalidParameter, Refused
from qkv.core.registry import method
from qkv.layers.eco_attention import EcoAttentionModule, Tie

M = TypeVar("M", bound=nn.Module)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@final
class Exchanged(nn.Module):
    """An attention module's place taken by EcoFormer's layer: called as that module was."""

    def __init__(self, eco: EcoAttentionModule) -> None:
        super().__init__()
        self.eco = eco

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **unused: Any
    ) -> tuple[Tensor, None]:
        """Tokens ``[B, N, C]`` -> the same, and no map. Raises `Refused` with a mask: images have no padding."""
        if attention_mask is not None:
            raise Refused("ecoformer: the tokens of an image are all real; an attention mask has no meaning here")
        return self.eco(hidden_states), None


def shared(model: M, *, keep: int = 1, tie: Tie = "key", **settings: Any) -> M:
    """The model itself, its attention but that of the last `keep` layers under softmax with one projection for queries and keys.

    keep: layers at the end that stay as they are (the authors leave the last stage of a model). tie: what the one projection
    begins with, see `EcoAttentionModule.from_softmax`. settings: of `eco-attention`, but for heads and bias. Raises
    `InvalidInput` for a model without such attention, `InvalidParameter`.
    """
    found = [(name, m) for name, m in model.named_modules() if _softmax(m)]
    if any(isinstance(m, Exchanged) for m in model.modules()):
        raise InvalidInput(
            "ecoformer: this model has been exchanged before; call fit on it, or begin with the pretrained one"
        )
    if not found:
        raise InvalidInput(f"ecoformer: no module of this {type(model).__name__} has the projections {', '.join(PROJECTIONS)} "
                           "and a number of heads; give a vision transformer of transformers 5 (ViT, DeiT)")  # fmt: skip
    if isinstance(keep, bool) or not isinstance(keep, int) or not 0 <= keep < len(found):
        raise InvalidParameter(
            f"ecoformer: keep={keep!r} must be an int from 0 to {len(found) - 1}: one layer at least is exchanged"
        )
    made = [(name, _made(name, module, tie, settings)) for name, module in found[: len(found) - keep]]
    for name, new in made:  # only when all fit
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, new)
    return model


def exchanged(model: nn.Module) -> list[EcoAttentionModule]:
    """EcoFormer's layers of a model, in the order they run in. Raises `InvalidInput` where there are none."""
    found = [m.eco for m in model.modules() if isinstance(m, Exchanged)]
    if not found:
        raise InvalidInput("ecoformer: this model has none of its layers exchanged; call shared(model) first")
    return found


def hashed(model: M, on: bool = True) -> M:
    """The model itself with codes in its exchanged layers, or softmax again: weights loaded after `shared` need it once.

    Raises `Refused` for hash functions that were never fitted, `InvalidInput`.
    """
    layers = exchanged(model)
    if on:
        _ = [layer.hash.hash for layer in layers]
    for layer in layers:
        layer.hashed = on
    return model


@torch.no_grad()
def fit(
    model: nn.Module, *, generator: torch.Generator | None = None, steps: int = 100, rate: float = 5e-4, **inputs: Any
) -> None:
    """Fit the hash functions of all exchanged layers to one batch, from then on codes take the place of softmax.

    inputs: of the model, such as ``pixel_values=``. Each layer is fitted on what reaches it when those before it use their codes,
    going on from an earlier fit. steps, rate: of a bit, see `qkv.ops.ecoformer.fit_hash`. Raises `InvalidInput`,
    `InvalidParameter` (more anchors or pairs than tokens).
    """
    layers, mode = exchanged(model), model.training

    def learn(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(layer, EcoAttentionModule)
        layer.fit(args[0], generator=generator, steps=steps, rate=rate)
        layer.hashed = True

    hooks = [layer.register_forward_pre_hook(learn, with_kwargs=True) for layer in layers]
    try:
        model.eval()(**inputs)
    finally:
        model.train(mode)
        for hook in hooks:
            hook.remove()


def _softmax(module: nn.Module) -> bool:
    projections = all(isinstance(getattr(module, p, None), nn.Linear) for p in PROJECTIONS)
    return projections and isinstance(getattr(module, "num_attention_heads", None), int)


def _made(name: str, module: Any, tie: Tie, settings: dict[str, Any]) -> Exchanged:
    """The layer that takes a module's place, with its weights, under softmax."""
    if getattr(module, "is_causal", False):
        raise InvalidInput(
            f"ecoformer: {name} is causal; the method is for images (see `lolcats` and `lizard` for language models)"
        )
    query, key, value, out = (getattr(module, p) for p in PROJECTIONS)
    has_bias = {p: getattr(module, p).bias is not None for p in PROJECTIONS}
    if len(set(has_bias.values())) > 1:
        raise InvalidInput(
            f"ecoformer: {name} has biases in some projections alone ({has_bias}); all or none can be taken over"
        )
    configured = method("eco-attention", **settings | {"heads": module.num_attention_heads, "bias": has_bias["q_proj"]})
    eco = configured.build(query.in_features, device=query.weight.device, dtype=query.weight.dtype)
    eco.from_softmax(query, key, value, out, tie=tie).hashed = False
    return Exchanged(eco.train(module.training))
