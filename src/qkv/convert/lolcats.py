r"""LoLCATs: a pretrained softmax attention becomes a linear attention with an exact window, by imitation and low-rank updates.

    mu_t = max over t-w < j <= t of scale q_t . k_j,    phi(x) = [softmax(x W) ; softmax(-x W)] of rotated queries and keys
    o_t = [sum_{t-w < j <= t} c exp(scale q_t . k_j - mu_t) v_j + sum_{j <= t-w} phi(q_t) . phi(k_j) v_j] / [the same sums of 1]

The plain linearisation baseline: no gates, no learned pairs, the same two stages. c = sigmoid(alpha) per head.

Axes: B batch, H query heads, G key/value heads, N tokens, D head width, E value width, K feature_dim, F = 2K features.
arXiv:2410.10254 and its code. Unlike the code: one map per key/value head for keys (it has one per query head, so that grouped
queries would need a state each), W is the identity at first (one of its options; it draws at random), states in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from qkv.convert._common.linearise import Linearisation
from qkv.core.conversion import ConversionSpec
from qkv.core.spec import Limit, param
from qkv.layers._linearised import LinearisedProjections


def reference(
    q: Tensor, k: Tensor, v: Tensor, q_features: Tensor, k_features: Tensor, *, window: int, scale: float, share: Tensor
) -> Tensor:
    """The whole map. q ``[B, H, N, D]``, k ``[B, G, N, D]``, v ``[B, G, N, E]``, features ``[.., F]``, share: c ``[H]``."""
    n, r = q.shape[2], q.shape[1] // k.shape[1]
    k, v, k_features = (x.repeat_interleave(r, 1) for x in (k, v, k_features))
    old = torch.ones(n, n, dtype=torch.bool, device=q.device).tril(-window)
    recent = torch.ones_like(old).tril() & ~old
    scores = (q @ k.mT * scale).masked_fill(~recent, -torch.inf)
    weights = share[:, None, None] * (scores - scores.amax(-1, keepdim=True)).exp() + (q_features @ k_features.mT) * old
    return weights @ v / weights.sum(-1, keepdim=True)


@final
@dataclass(frozen=True, kw_only=True)
class LoLCATs(Linearisation):
    """Sizes of window and features, and how long both stages train."""

    spec: ClassVar[ConversionSpec] = ConversionSpec(
        id="lolcats",
        title="LoLCATs: On Low-Rank Linearizing of Large Language Models",
        paper="arXiv:2410.10254",
        source="code",
        summary="Turns softmax attention into an exact window plus linear attention with learned features: constant memory.",
        limits=(
            Limit("full", {"window": 1 << 20, "transfer": 0, "tune": 0}, "window >= length: the source, exactly"),
        ),
        shown="SmolLM2, at the length trained on: far better than its window alone after both stages, behind the source",
        honest="nothing is ever forgotten: trained on 1k tokens, SmolLM2 goes from perplexity 35 there to 195 at 8k",
        stores=True,
        constant=True,
        exact=lambda x: {"window": 1 << 20, "transfer": 0, "tune": 0},
        small=lambda x: {"window": 7, "feature_dim": 4, "transfer": 1, "tune": 1, "lora_rank": 2},
        ladder=lambda x: [{"window": w, "feature_dim": 4, "transfer": 1, "tune": 0} for w in (4, 16, 24, 64)],
        training=lambda x: [{"window": 4, "feature_dim": 8, "transfer": n, "tune": 0} for n in (0, 4, 20)],
        heal={
            "objective": "healing",
            "arguments": {
                "max_steps": 2000, "per_device_train_batch_size": 32, "learning_rate": 1e-4, "lr_scheduler_type": "cosine",
                "warmup_steps": 0.03, "weight_decay": 0.0,
            },
            "row": 512, "trains": "the converted layers, after both stages of their own",
            "paper": "2 passes over 50 thousand instructions for each stage",
        },
    )  # fmt: skip
    window: int = param(64, "tokens attended exactly, the query's own included", low=1)
    feature_dim: int = param(64, "K, rank of the feature map; it gives 2 K features", low=1)
    share_bias: float = param(-2.1972246, "alpha at first: the softmax part's weight begins at sigmoid(alpha), 0.1")

    def choices(self) -> dict[str, Any]:
        """See `Linearisation.choices`."""
        return {"window": self.window, "feature_dim": self.feature_dim, "feature_rope": True}

    def begin(self, layer: LinearisedProjections, pairs: tuple[Tensor, Tensor] | None) -> None:
        """See `Linearisation.begin`."""
        layer.start(self.share_bias, 0.0, None)
