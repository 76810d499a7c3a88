r"""A small causal language model whose layers take any operator: linear, softmax and windowed layers in one list.

    x += W_o norm(operator(q, k, v, ...)),   x += W2 (silu(W1 x) * W3 x),   both of rms(x),   logits = U rms(x)

Layers are given one by one: ``CausalConfig(operators=("gla", "gla", "sliding-window:window=128", "full"))``. The state is a
value: it goes in, comes out, is indexed by batch rows (beams), and is of constant size unless a layer is plain softmax. One
token is one byte of UTF-8 by default. Axes: B batch, N tokens, W width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkv.core.errors import InvalidInput, InvalidParameter, StateError
from qkv.core.state import State
from qkv.layers._mixer import check_left_padded
from qkv.models._blocks import Block, ModelConfig, Saved, SavedConfig, fitted, gated_width, initialise, mixer


@final
@dataclass(frozen=True, kw_only=True)
class CausalConfig(ModelConfig):
    """Shape of a `CausalLM`; see `ModelConfig` for what all small models share.

    vocabulary: tokens; 256 for bytes. conv: tokens of the short convolution in every mixer, 0 for none (`base-conv` brings its
    own). rope_base: of the layers that rotate positions into queries and keys.
    """

    vocabulary: int = 256
    conv: int = 4
    rope_base: float = 10000.0

    def check(self) -> None:
        """See `SavedConfig.check`."""
        super().check()
        self.positive("vocabulary")
        self.natural("conv")
        if self.conv == 1:
            raise InvalidParameter("conv=1 must be an int of at least 2, or 0 for no convolution")
        if not self.rope_base > 0:
            raise InvalidParameter(f"rope_base={self.rope_base} must be positive")

    def fitted(self, parameters: int) -> CausalConfig:
        """The same with gated layers of such a width that the model has about `parameters` parameters."""
        return fitted(self, parameters, lambda c: CausalLM.count(c))


class Output(NamedTuple):
    """logits ``[B, N, V]``; the state after the tokens, None unless it was kept."""

    logits: Tensor
    state: State | None


@final
class CausalLM(Saved):
    """See the module. A fresh model has random weights from `seed`."""

    kind: ClassVar[str] = "causal-lm"
    config_class: ClassVar[type[SavedConfig]] = CausalConfig

    def __init__(self, config: CausalConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = c = config
        self.embed = nn.Embedding.from_pretrained(torch.empty(c.vocabulary, c.width), freeze=False)
        self.blocks = nn.ModuleList()
        for i, method in enumerate(c.methods):
            mixed = mixer(method, c, i, conv=c.conv, rope_base=c.rope_base)
            self.blocks.append(Block(mixed, c.width, gated_width(c.width, c.inner)))
        self.last = nn.RMSNorm(c.width, eps=1e-6)
        self.head = nn.Linear(c.width, c.vocabulary, bias=False)
        if not self.head.weight.is_meta:
            initialise(self, c.layers, seed)

    @staticmethod
    def count(config: CausalConfig) -> int:
        """Trained numbers of a model of this configuration."""
        with torch.device("meta"):
            return sum(p.numel() for p in CausalLM(config).parameters())

    def forward(
        self, ids: Tensor, *, padding: Tensor | None = None, state: State | None = None, keep: bool = False,
        losses: list[Tensor] | None = None,
    ) -> Output:  # fmt: skip
        """Logits of tokens ``[B, N]`` that follow those of `state`, and the state after them when `keep`.

        padding: bool ``[B, N]``, True = real; rows are padded on the left, and only in the first call of a sequence. losses: a
        list for what layers add to the loss of a training pass (`vq-gated-attention`: how far keys lie from their codes). Raises
        `InvalidInput`, `StateError`.
        """
        self._check(ids)
        if padding is not None and state is not None:
            raise InvalidInput("padding stands before a sequence: it is given with the first tokens, not after a state")
        padding = check_left_padded(padding, ids)
        parts = [None] * len(self.blocks) if state is None else self._parts(state)
        x, after = self.embed(ids), {}
        for i, (block, part) in enumerate(zip(self.blocks, parts, strict=True)):
            x, new = block(x, padding=padding, state=part, keep=keep, losses=losses)
            if new is not None:
                after |= {f"{i}.{name}": tensor for name, tensor in new.tensors.items()}
        logits = self.head(self.last(x))
        if not keep:
            return Output(logits, None)
        return Output(logits, State(self._owner, after, ids.shape[1] + (0 if state is None else state.seen)))

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean nats a token of targets ``[B, N]``, and in training what layers add; targets below 0 do not count."""
        own: list[Tensor] = []
        logits = self(ids, losses=own).logits
        return sum(own, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1))

    @property
    def _owner(self) -> str:
        return f"{self.kind} of {', '.join(map(str, self.config.methods))}"

    def _parts(self, state: State) -> list[State]:
        """The layers' states. Raises `StateError` for the state of another model."""
        state.of(self._owner)
        out = []
        for i, block in enumerate(self.blocks):
            head = f"{i}."
            tensors = {n[len(head) :]: x for n, x in state.tensors.items() if n.startswith(head)}
            if not tensors:
                raise StateError(f"the state holds nothing for layer {i}; pass one that this model returned")
            out.append(State(block.mixer.owner, tensors, state.seen))  # type: ignore[union-attr]
        return out

    def _check(self, ids: Tensor) -> None:
        if not isinstance(ids, Tensor) or ids.ndim != 2 or 0 in ids.shape or ids.is_floating_point():
            got = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
            raise InvalidInput(f"tokens must be ints [B, N] with B and N of at least 1; got {got}")
        if ids.device.type == "cpu":
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= self.config.vocabulary:
                raise InvalidInput(f"tokens run from {low} to {high}; this model has {self.config.vocabulary}")
