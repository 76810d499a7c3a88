r"""Which key channels dominate a model's logits: the calibration that `double-sparsity` takes.

    qk: mean_t |q_tc k_tc| after the rotary embedding, a token with itself
    k:  mean_t |k_tc|,   q: mean_t |q_tc|   before it

Means over all real tokens of all batches, and over the query heads of a KV head; the order of the batches does not matter.

Axes: L layers, B batch, H query heads, G key/value heads, T tokens, D head width.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from qkv.caches._channels import Channels
from qkv.core.conversion import batches
from qkv.core.errors import InvalidInput, Refused
from qkv.hosts import observe, sites
from qkv.hosts.stack import fingerprint


@torch.no_grad()
def channel_importance(model: Any, data: Any, *, score: Literal["qk", "k", "q"] = "qk") -> tuple[Tensor, int]:
    """Importance ``[L, G, D]`` in float64 and the number of tokens. data: model inputs, dicts of tensors.

    Raises `InvalidInput` for unusable data or scores, `Refused` where heads of layers differ or keys cannot be rotated back.
    """
    if score not in ("qk", "k", "q"):
        raise InvalidInput(f"score={score!r} must be 'qk', 'k' or 'q'")
    found = [s for s in sites(model) if s.cached]
    shapes = {(s.kv_heads, s.head_dim) for s in found}
    if len(shapes) != 1:
        raise Refused(f"key channels need layers of one shape; found (KV heads, width) {sorted(shapes)}")
    total = {s.layer: torch.zeros(s.kv_heads, s.head_dim, dtype=torch.float64) for s in found}
    tokens, mask = 0, None

    def look(site: Any, call: Any) -> None:
        q, k = call.q.double(), call.k.double()
        b, g, t, d = k.shape
        real = torch.ones(b, t, dtype=torch.bool, device=k.device) if mask is None else mask.to(k.device).bool()
        if score != "qk" and site.geometry.rope is not None:
            if not site.geometry.rope.fixed:
                raise Refused(
                    f"{site.name}: keys whose frequencies depend on the length cannot be rotated back; use score='qk'"
                )
            back = -(real.cumsum(-1) - 1)[:, None]
            q, k = (site.geometry.rope.rotate(x, back.expand(-1, x.shape[1], -1)) for x in (q, k))
        q = q.abs().reshape(b, g, -1, t, d).mean(2)
        value = {"qk": q * k.abs(), "k": k.abs(), "q": q}[score]
        total[site.layer] += (value * real[:, None, :, None]).sum((0, 2)).cpu()

    with observe(model, look, [s.name for s in found]):
        for batch in batches(data, "calibrate_channels"):
            mask = batch.get("attention_mask")
            ids = batch["input_ids"]
            tokens += int(ids.numel() if mask is None else mask.sum())
            inputs = {n: x.to(model.device) if isinstance(x, Tensor) else x for n, x in batch.items()}
            model(**inputs, use_cache=False, logits_to_keep=1)
    return torch.stack([total[s.layer] for s in found]) / max(1, tokens), tokens


def calibrate_channels(model: Any, data: Any, *, score: Literal["qk", "k", "q"] = "qk") -> Channels:
    """The channels of every KV head by falling importance; ``.save("channels.json")`` for ``channels=`` of `double-sparsity`.

    data: model inputs as `qkv.apply(..., data=)` takes them; the paper uses 256 texts of 512 tokens.
    """
    scores, tokens = channel_importance(model, data, score=score)
    order = scores.sort(dim=-1, descending=True, stable=True).indices.tolist()
    return Channels(order, score, scores.shape[-1], tokens, fingerprint(model))


__all__ = ["calibrate_channels", "channel_importance"]
