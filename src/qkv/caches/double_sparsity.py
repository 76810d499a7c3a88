r"""Double Sparsity: a few key channels dominate every logit, so a narrow cache of those finds the tokens worth reading.

    importance_c = mean_t |q_tc k_tc|  (after the rotary embedding, a token with itself, mean over the heads of a KV group)
    label_m      = K[m, channels],     channels = the r = D / channel_factor most important,  stored in `label_bits`
    s_m          = <q[channels], label_m>,  summed over a KV group;  the top `budget` tokens and the own one are read exactly

With fewer than 16 bits the r numbers of a token are quantised by their own minimum and maximum, those of the query likewise.
The first `dense_layers` layers and a prompt are read in full. ``prefill_mask=True`` lets prompt queries read their top tokens
too: for evaluation only, it saves nothing.

channels: a file of `qkv.probes._key_channels.calibrate_channels` (as in the paper), or "prompt": every row takes the statistic
of its own first `samples` tokens, which are all read until then (our choice: nothing to prepare). The paper's code keeps one
list per query head; with grouped heads one per KV head serves, and its choice is shared (our choice). Its accumulation of the
statistic, of which only the last batch counts, is not copied.

offload=True keeps keys and values of the layers that choose in host memory, page-locked for a GPU: labels stay with the model,
and a step brings over the tokens that it reads. They are chosen by the true query once it is known, so the tokens read are those
of offload=False; the paper fetches a layer ahead by an approximate query, which hides the copy and reads what the guess names
(left out: a cache sees queries, not the next layer's projections).

Axes: B batch, H query heads, G key/value heads, R = H / G, M tokens, D head width, r label width. Paper: arXiv:2408.07092.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from qkv.caches._channels import load
from qkv.core.cache import CacheSpec, Geometry
from qkv.core.kernel import kernel
from qkv.core.reader import Blocks, Reader, Reading, share
from qkv.core.spec import Limit, budget_param, param


def reference(q: Tensor, keys: Tensor, channels: Tensor) -> Tensor:
    """Approximate logits ``[R, M]`` of one KV head, unquantised: q ``[R, D]``, keys ``[M, D]``, channels ``[r]``."""
    return torch.einsum("rc,mc->rm", q[:, channels], keys[:, channels])


def importance(q: Tensor, k: Tensor) -> Tensor:
    """``[B, G, N, D]``: |q_c k_c| of every token with itself, mean over the query heads of its KV head."""
    b, g, n, d = k.shape
    return q.abs().reshape(b, g, -1, n, d).mean(2) * k.abs()


def quantise(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 ``[..., r]``, step and minimum ``[...]`` of the last axis."""
    low = x.amin(-1, keepdim=True)
    step = (x.amax(-1, keepdim=True) - low) / (2**bits - 1)
    step = torch.where(step == 0, 1, step)
    return ((x - low) / step).round().clamp(0, 2**bits - 1).to(torch.uint8), step[..., 0], low[..., 0]


def packed(codes: Tensor, bits: int) -> Tensor:
    """Codes ``[..., r]`` as bytes ``[..., r bits / 8]``, the first in the lowest bits; an odd one out is padded."""
    per = 8 // bits
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per))
    parts = codes.unflatten(-1, (-1, per))
    return sum(parts[..., i] << (bits * i) for i in range(per))  # type: ignore[return-value]


def unpacked(data: Tensor, bits: int, r: int) -> Tensor:
    """The inverse of `packed`."""
    per = 8 // bits
    parts = [(data >> (bits * i)) & (2**bits - 1) for i in range(per)]
    return torch.stack(parts, -1).flatten(-2)[..., :r]


def coded(q: Tensor, data: Tensor, bits: int) -> Tensor:
    """``[B, G, N, P]``: products of q ``[B, G, N, r]`` with packed codes ``[B, G, P, r bits / 8]``, a table look-up per byte."""
    b, g, n, r = q.shape
    per, width, p = 8 // bits, data.shape[-1], data.shape[2]
    byte = torch.arange(256, device=q.device)
    codes = torch.stack([(byte >> (bits * i)) & (2**bits - 1) for i in range(per)]).to(q.dtype)  # [per, 256]
    table = (
        torch.nn.functional.pad(q, (0, width * per - r)).unflatten(-1, (width, per)) @ codes
    )  # [B, G, N, width, 256]
    return table.gather(-1, data.mT.long().unsqueeze(2).expand(b, g, n, width, p)).sum(-2)


@final
@dataclass(frozen=True, kw_only=True)
class DoubleSparsity(Reader):
    """Score every token by a few channels, read the best tokens."""

    spec: ClassVar[CacheSpec] = CacheSpec(
        id="double-sparsity",
        title="Post-Training Sparse Attention with Double Sparsity",
        paper="arXiv:2408.07092",
        source="code",
        summary="Keeps everything; scores all tokens by their few dominant key channels and reads the best.",
        shown="calibrated channels find the tokens that matter far better than random channels of the same number",
        honest="no memory is saved (labels add a little) unless it is offloaded; every label is read at every step",
        limits=(
            Limit("full", {"budget": 1.0}, "budget >= length: exact attention"),
            Limit("full", {"budget": 1 << 20}, "budget >= length: exact attention"),
            Limit("full", {"dense_layers": 1 << 10}, "every layer dense: exact attention"),
        ),
        evicts=False,
        trials=({}, {"label_bits": 16}, {"prefill_mask": True}, {"offload": True}),
        small={"budget": 9, "channel_factor": 2, "samples": 5, "dense_layers": 1},
    )
    budget: int | float = budget_param(0.0625, "tokens read per head and step: an int is a number, a float a share")
    channel_factor: int = param(16, "head width over label width: 16 keeps one channel in 16", low=1)
    label_bits: int = param(4, "bits of a label's number (16: as the keys)", choices=(2, 4, 8, 16))
    dense_layers: int = param(2, "first layers that read everything", low=0)
    channels: str = param("prompt", "a file of calibrated channels, or 'prompt': from each row's first tokens")
    samples: int = param(64, "with channels='prompt': tokens that the statistic is taken from", low=2)
    prefill_mask: bool = param(False, "prompt queries read their top tokens too (evaluation only)")
    offload: bool = param(False, "keys and values in host memory; labels, and what a step reads, with the model")

    capturable: ClassVar[bool] = True

    def fits(self, geometry: Geometry) -> str | None:
        """Whole labels, and channels of a model of this shape."""
        if geometry.head_dim % self.channel_factor:
            return f"channel_factor={self.channel_factor} does not divide a head width of {geometry.head_dim}"
        if self.channels == "prompt":
            return None
        order = load(self.channels).order
        if geometry.layer >= len(order) or len(order) != geometry.layers:
            return f"{self.channels} holds channels of {len(order)} layers and this model has {geometry.layers}"
        got = len(order[geometry.layer]), len(order[geometry.layer][0])
        if got != (geometry.kv_heads, geometry.head_dim):
            return (
                f"{self.channels} holds {got[0]} KV heads of width {got[1]}; this site has {geometry.kv_heads} of width "
                f"{geometry.head_dim}: it was made for another model"
            )
        return None

    def dense(self, geometry: Geometry) -> bool:
        """The first layers."""
        return geometry.layer < self.dense_layers

    def hosted(self, geometry: Geometry) -> bool:
        """Where tokens are chosen; a layer that reads everything keeps everything near."""
        return self.offload and not self.dense(geometry)

    def prefill(self, geometry: Geometry) -> int | None:
        """In full, but for evaluation."""
        return 64 if self.prefill_mask else None

    def ready(self) -> int:
        """A row's channels are known once its sample is complete."""
        return self.samples if self.channels == "prompt" else 0

    def reads(self, tokens: Tensor) -> Tensor:
        """The budget, and everything while the sample is not complete."""
        return torch.where(tokens <= self.ready(), tokens, share(self.budget, tokens))

    def observe(self, view: Reading) -> None:
        """Collect the products of each row's first tokens."""
        if self.channels != "prompt" or view.since >= self.samples:
            return
        q, at = view.queries, view.position
        if view.features == {} and at.shape[1] > self.samples and bool((at[:, 0] == view.since).all()):
            q, at = q[:, :, : self.samples], at[:, : self.samples]
        b, g, d = q.shape[0], view.keys.shape[1], q.shape[3]
        slot = at.clamp(min=0)[:, None, :, None].expand(b, g, -1, d)
        new = importance(q, view.keys.gather(2, slot.to(view.keys.device)).to(q.device))
        where = at.masked_fill((at < 0) | (at >= self.samples), self.samples)[:, None, :, None].expand(b, g, -1, d)
        old = view.notes.get("sample")
        room = new.new_zeros(b, g, self.samples + 1, d)
        if old is not None:
            room[:, :, : self.samples] = old
        view.notes["sample"] = room.scatter(2, where, new.to(room.dtype))[:, :, : self.samples].clone()

    def _channels(self, blocks: Blocks) -> Tensor:
        """``[B, G, r]`` for these rows; they stay once a row is indexed."""
        notes, geometry = blocks.notes, blocks.geometry
        r = geometry.head_dim // self.channel_factor
        if "channels" in notes and (self.channels != "prompt" or blocks.keys.shape[2] == 1):
            return notes["channels"]
        if self.channels == "prompt":
            notes["channels"] = notes["sample"].sum(2).topk(r, dim=-1).indices.sort(-1).values
        else:
            order = torch.tensor(load(self.channels).order[geometry.layer], device=blocks.keys.device)[:, :r]
            notes["channels"] = order.sort(-1).values.expand(blocks.keys.shape[0], -1, -1).clone()
        return notes["channels"]

    def features(self, blocks: Blocks) -> dict[str, Tensor]:
        """Labels ``[B, G, P, r]``, or their codes packed into bytes with a step and a minimum in 16 bits each."""
        b, g, p, _, d = blocks.keys.shape
        channels = self._channels(blocks)
        at = channels[:, :, None].expand(b, g, p, -1)
        labels = blocks.keys.reshape(b, g, p, d).gather(3, at)
        if self.label_bits == 16:
            return {"labels": labels}
        codes, step, low = quantise(labels, self.label_bits)
        return {"codes": packed(codes, self.label_bits), "step": step.to(torch.float16), "low": low.to(torch.float16)}

    def scores(self, queries: Tensor, channels: Tensor, features: dict[str, Tensor]) -> Tensor:
        """``[B, G, N, P]``: approximate logits, summed over a KV group (the labels of its queries may be summed first)."""
        b, g, r = channels.shape
        h, n, d = queries.shape[1:]
        at = channels[:, :, None, None].expand(b, g, h // g, n, r)
        q = queries.reshape(b, g, h // g, n, d).gather(4, at)
        if self.label_bits == 16:
            return q.sum(2) @ features["labels"].mT.to(q.dtype)
        codes, step, low = quantise(q, self.label_bits)
        q = (codes.to(q.dtype) * step.unsqueeze(-1) + low.unsqueeze(-1)).sum(2)  # [B, G, N, r]
        dots = coded(q, features["codes"], self.label_bits)
        step, low = (features[name].to(q.dtype).unsqueeze(2) for name in ("step", "low"))
        return dots * step + low * q.sum(-1, keepdim=True)

    def describe(self, view: Reading) -> bool:
        """The label of the newest key."""
        write, channels = kernel("gather:token_label"), view.notes["channels"]
        if self.label_bits == 16:
            write(view.keys, channels, view.features["labels"], view.slot32)
        else:
            codes, step, low = (view.features[name] for name in ("codes", "step", "low"))
            write(view.keys, channels, codes, view.slot32, bits=self.label_bits, step=step, low=low)
        return True

    def rank(self, view: Reading) -> Tensor:
        """`scores`; of single tokens on CUDA by a kernel."""
        channels = view.notes["channels"]
        if view.slot32 is None:
            return self.scores(view.queries, channels, view.features)
        score, at = kernel("gather:label_scores"), view.slot32
        if self.label_bits == 16:
            return score(view.queries, channels, view.features["labels"], at)
        codes, step, low = (view.features[name] for name in ("codes", "step", "low"))
        return score(view.queries, channels, codes, at, bits=self.label_bits, step=step, low=low)
