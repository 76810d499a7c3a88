r"""LongVQ's layer: a structured memory makes queries and keys, keys are quantised, gates join what attention found.

    m = memory(x)                                             a diagonal state space per channel (`_structured_memory`)
    q = W_q m,   k = W_k m,   v = silu(W_v x)                 v from the tokens themselves
    o = longvq(q, k, v; codes, bias)                          the operator: exact in the window, one mean per code before it
    r = silu(W_r m),   f = sigmoid(W_f m)
    y = f * W_o (r * o) + (1 - f) * x                         x: the block's own stream, so that f may let go of it
    loss += commitment mean_j |k_j - sg(C_{z_j})|^2           in training; heads, rows and tokens alike

The codes C are moving averages of the keys they stand for (`_codebook`): they learn in training passes with gradients, and a
pass that takes or keeps a state leaves them, so that no state goes stale while it is in use. The gradient of a quantised key in
the window passes straight on to the key; codes before the window give none. `frozen` leaves the codes as they were drawn.

Called as a mixer, with two things more: `stream`, what f mixes with (a block's residual stream; None: x), and `losses`, a list
that takes the commitment. The layer returns the new stream, to which the block adds nothing.

Known from the abstract and public summaries alone. Ours: the state space and how it starts, values as wide as the model, several
heads, a bias on f, the norm of x before all of it, which the host's blocks bring, and every number; the attention is that of
Transformer-VQ (Lingle 2023). Causal only, as its operator: the sum over both directions of the paper's encoders is not here.

State: ``memory`` ``[B, W, n, 2]`` of the state space, and the operator's: ``attention.counts``, ``means``, ``keys``, ...

Axes: B batch, N tokens, W width, H heads, n states, S codes, D key width, L block.
Liu et al. 2024, LongVQ: Long Sequence Modeling with Vector Quantization on Structured Memory, arXiv:2404.11163.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkv.core.errors import InvalidParameter
from qkv.core.layer import LayerSpec
from qkv.core.spec import param
from qkv.core.state import State
from qkv.layers import _structured_memory as structured
from qkv.layers._codebook import Codebook
from qkv.layers._mixer import MixingLayer, Recurrent
from qkv.layers._structured_memory import StructuredMemory
from qkv.ops.longvq import LongVQ, quantise


def reference(layer: VQGatedAttentionModule, x: Tensor, stream: Tensor | None = None) -> Tensor:
    """The layer with every key quantised, whole maps and the state space token by token: x ``[B, N, W]`` -> ``[B, N, W]``."""
    stream = x if stream is None else stream
    heads = lambda y: y.unflatten(-1, (layer.heads, -1)).transpose(1, 2)  # noqa: E731
    m = structured.reference(layer.memory, x)
    q, k, v = heads(layer.query(m)), heads(layer.key(m)), heads(F.silu(layer.value(x)))
    _, hat = quantise(k, layer.codebook.codes)
    t, size = torch.arange(x.shape[1]), layer.bias.shape[1] // 2
    age = t[:, None] - t
    bias = layer.bias[:, age.clamp(0, 2 * size - 1)] * (t // size >= t[:, None] // size - 1)
    o = (q @ hat.mT * q.shape[-1] ** -0.5 + bias).masked_fill(age < 0, -torch.inf).softmax(-1) @ v
    f = layer.forget(m).sigmoid()
    return f * layer.out(F.silu(layer.gate(m)) * o.transpose(1, 2).flatten(2)) + (1 - f) * stream


@final
class VQGatedAttentionModule(nn.Module):
    """See `VQGatedAttention`. Called as a token mixer that mixes with its block's stream by itself (`mixes_stream`)."""

    owner = "vq-gated-attention"
    mixes_stream = True

    def __init__(self, width: int, settings: VQGatedAttention, **factory: Any) -> None:
        super().__init__()
        s = settings
        if width % s.heads:
            raise InvalidParameter(f"vq-gated-attention: heads={s.heads} must divide the width {width}")
        self.heads, self.weight, self.frozen = s.heads, s.commitment, s.frozen
        self.memory = StructuredMemory(width, s.ssm_states, **factory)
        self.query = nn.Linear(width, s.heads * s.key_width, bias=False, **factory)
        self.key = nn.Linear(width, s.heads * s.key_width, bias=False, **factory)
        self.value, self.gate, self.out = (nn.Linear(width, width, bias=False, **factory) for _ in range(3))
        self.forget = nn.Linear(width, width, **factory)
        self.bias = nn.Parameter(torch.zeros(s.heads, 2 * s.block_size, **factory))
        self.codebook = Codebook(
            s.heads, s.codebook_size, s.key_width, decay=s.decay, smoothing=s.smoothing, dead=s.dead, **factory
        )
        self.attention = Recurrent(LongVQ(block_size=s.block_size, straight_through=True))

    def forward(
        self, x: Tensor, *, padding: Tensor | None = None, state: State | None = None, keep: bool = False,
        stream: Tensor | None = None, losses: list[Tensor] | None = None,
    ) -> tuple[Tensor, State | None]:  # fmt: skip
        """Tokens ``[B, N, W]``, after those of `state` -> the new stream, and the state after them when `keep`.

        padding: bool ``[B, N]``, True = real, padded on the left. stream: ``[B, N, W]``, None: the tokens. losses: takes the
        weighted commitment of a training pass. Raises `InvalidInput`, `StateError`.
        """
        stream = x if stream is None else stream
        if padding is not None:
            x = x.masked_fill(~padding.unsqueeze(-1), 0.0)
        held, inner, seen = None, None, 0
        if state is not None:
            held = state.of(self.owner, memory=(x.shape[0], *self.memory.mix.shape)).exact()["memory"]
            inner = {n[10:]: z for n, z in state.tensors.items() if n.startswith("attention.")}
            seen = state.seen
        m, held = self.memory(x, held)
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for y in (self.query(m), self.key(m), F.silu(self.value(x)))
        )
        learns = self.training and torch.is_grad_enabled() and state is None and not keep
        moves = learns and not self.frozen
        if moves:
            self.codebook.begin(k, padding)
        codes = self.codebook.codes.clone() if moves else self.codebook.codes  # they move before the backward pass
        extras = {"codebook": codes, "bias": self.bias}
        position = x.new_zeros(x.shape[:2], dtype=torch.int64)  # the operator counts by itself
        o, inner = self.attention(q, k, v, extras, padding, position, inner, keep, seen)
        if learns and losses is not None and self.weight:
            losses.append(self.weight * self.codebook.commitment(k, padding))
        if moves:
            self.codebook.learn(k, padding)
        f = self.forget(m).sigmoid()
        y = f * self.out(F.silu(self.gate(m)) * o.transpose(1, 2).flatten(2)) + (1 - f) * stream
        if not keep:
            return y, None
        assert inner is not None
        tensors = {"memory": held} | {f"attention.{n}": z for n, z in inner.items()}
        return y, State(self.owner, tensors, x.shape[1] + seen)


@final
@dataclass(frozen=True, kw_only=True)
class VQGatedAttention(MixingLayer):
    """Settings of LongVQ's layer."""

    spec: ClassVar[LayerSpec] = LayerSpec(
        id="vq-gated-attention",
        title="LongVQ layer: gated attention over quantised keys of a structured memory",
        paper="arXiv:2404.11163",
        source="abstract",
        summary="A diagonal state space makes queries and keys, keys become codes that moving averages keep where keys are, and "
        "gates join what attention found with the stream; decodes from constant memory.",
        shown="as the layer of a byte model, against its operator alone and a codebook that never learns, see `longvq`",
        honest="codes stand for what lies before the window, which a small byte model hardly uses: memory, window and gates "
        "do most there by themselves",
    )
    heads: int = param(1, "heads; each has keys and codes of its own", low=1)
    key_width: int = param(128, "D of every head", low=1)
    codebook_size: int = param(512, "codes a head", low=1)
    block_size: int = param(64, "tokens per block; a query sees its own and the previous one exactly", low=1)
    ssm_states: int = param(16, "complex states of a channel's memory", low=1)
    decay: float = param(0.99, "what a moving average keeps of itself in an update", low=0.0, high=1.0)
    smoothing: float = param(1e-5, "added to every code's number of keys before the division", low=0.0)
    dead: float = param(0.1, "share of the mean number of keys below which a code is placed anew", low=0.0, high=1.0)
    commitment: float = param(
        1e-4, "weight of the squared distance of keys to their codes in the training loss", low=0.0
    )
    frozen: bool = param(False, "leave the codes as they were drawn, or loaded")

    def build(self, width: int, **factory: Any) -> VQGatedAttentionModule:
        """See `Layer.build`; its module takes tokens ``[B, N, width]`` and the arguments of a mixer."""
        return VQGatedAttentionModule(width, self, **factory)
