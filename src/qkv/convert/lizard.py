r"""Lizard: a pretrained softmax attention becomes a gated linear attention with an exact window, of constant memory.

    near(t) = {j : t - w < j <= t} and m learned pairs,    s_tj = scale q_t . k_j (rotated; learned pairs: not),   mu_t = max s_tj
    Gamma_t = sigmoid(W_g x_t + b_g),  G = cumulative sum of log Gamma,  phi(x) = [softmax(x W) ; softmax(-x W)] (not rotated)
    joint: o_t = [sum_near c exp(s_tj - mu_t) v_j + sum_{j <= t-w} exp(G_t - G_j) phi(q_t).phi(k_j) v_j] / [the same sums of 1]
    sum:   o_t = softmax over near + [sum_{j <= t} exp(G_t - G_j) phi(q_t).phi(k_j) v_j] / [the same sum of 1]

Gates, not rotations, tell how old a far token is; W per head, gates and states per key/value head. Trained in two stages: every
layer imitates its own softmax outputs, then the whole learns the next token with low-rank updates. Afterwards a sequence of any
length holds w keys and values and one state ``[2 K, E + 1]`` per key/value head.

Axes: B batch, H query heads, G key/value heads, N tokens, D head width, E value width, K feature_dim, m learned pairs.
arXiv:2507.09025. Completed from the abstract and public summaries, no code being public: `joint` (one denominator, LoLCATs'; the
paper adds two outputs: `sum`), W as the identity at first, b_g = 4, w, m and K, rotations kept inside the window, and learned
pairs that begin as the mean first tokens of the data, so that what drew attention as a sink is not lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from qkv.convert._common.linearise import Linearisation
from qkv.core.cache import require
from qkv.core.conversion import ConversionSpec
from qkv.core.spec import Limit, param
from qkv.layers._linearised import LinearisedProjections


def reference(
    q: Tensor, k: Tensor, v: Tensor, q_features: Tensor, k_features: Tensor, log_gate: Tensor, *, window: int, scale: float,
    share: Tensor, meta: Tensor | None = None, meta_values: Tensor | None = None, combine: str = "joint",
) -> Tensor:  # fmt: skip
    """The whole map. q ``[B, H, N, D]``, k ``[B, G, N, D]`` (as the window sees them), v ``[B, G, N, E]`` -> ``[B, H, N, E]``.

    q_features ``[B, H, N, F]``, k_features ``[B, G, N, F]``; log_gate ``[B, G, N, 1|F]``; share: c ``[H]``;
    meta ``[B, H, N, m]``: scores of the learned pairs, meta_values ``[G, m, E]``.
    """
    b, n, r = q.shape[0], q.shape[2], q.shape[1] // k.shape[1]
    k, v, k_features, total = (x.repeat_interleave(r, 1) for x in (k, v, k_features, log_gate.cumsum(2)))
    age = torch.arange(n, device=q.device)[:, None] - torch.arange(n, device=q.device)  # [N, N]
    scores = (q @ k.mT * scale).masked_fill((age < 0) | (age >= window), -torch.inf)
    values = v
    if meta is not None and meta_values is not None:
        scores = torch.cat((scores, meta), -1)
        values = torch.cat((v, meta_values.repeat_interleave(r, 0).expand(b, -1, -1, -1)), 2)
    near = (scores - scores.amax(-1, keepdim=True)).exp()
    fade = (total.unsqueeze(3) - total.unsqueeze(2)).clamp(max=0.0).exp()  # [B, H, N, N, 1|F]
    far = (q_features.unsqueeze(3) * k_features.unsqueeze(2) * fade).sum(-1)
    if combine == "sum":
        far = far.masked_fill(age < 0, 0.0)
        return near @ values / near.sum(-1, keepdim=True) + far @ v / far.sum(-1, keepdim=True)
    near, far = near * share[:, None, None], far.masked_fill(age < window, 0.0)
    return (near @ values + far @ v) / (near.sum(-1, keepdim=True) + far.sum(-1, keepdim=True))


@final
@dataclass(frozen=True, kw_only=True)
class Lizard(Linearisation):
    """Sizes of window, features and learned pairs, the kind of gate, and how long both stages train."""

    spec: ClassVar[ConversionSpec] = ConversionSpec(
        id="lizard",
        title="Lizard: An Efficient Linearization Framework for Large Language Models",
        paper="arXiv:2507.09025",
        source="abstract",
        summary="Turns softmax attention into an exact window plus gated linear attention of learned features: constant memory.",
        limits=(
            Limit(
                "full", {"num_meta": 0, "window": 1 << 20, "transfer": 0, "tune": 0},
                "window >= length without learned pairs: the source, exactly",
            ),
            Limit("lolcats", {"num_meta": 0}, "gates of 1, features of rotated queries and keys: LoLCATs"),
        ),
        shown="SmolLM2: perplexity beyond the window between the source's and the window's alone, and memory that stays as it is",
        honest="beyond the window only sums remain: SmolLM2 has perplexity 27.1 at 8k where the source, tuned alike, has 24.3",
        stores=True,
        constant=True,
        exact=lambda x: {"window": 1 << 20, "num_meta": 0, "combine": "joint", "window_rope": True, "transfer": 0, "tune": 0},
        small=lambda x: {"window": 7, "feature_dim": 4, "num_meta": 2, "transfer": 1, "tune": 1, "lora_rank": 2},
        ladder=lambda x: [
            {"window": w, "feature_dim": 4, "num_meta": 0, "combine": "joint", "window_rope": True, "transfer": 1, "tune": 0}
            for w in (4, 16, 24, 64)
        ],
        training=lambda x: [{"window": 4, "feature_dim": 8, "num_meta": 2, "transfer": n, "tune": 0} for n in (0, 4, 20)],
        heal={
            "objective": "healing",
            "arguments": {
                "max_steps": 2000, "per_device_train_batch_size": 32, "learning_rate": 1e-4, "lr_scheduler_type": "cosine",
                "warmup_steps": 0.03, "weight_decay": 0.0,
            },
            "row": 512, "trains": "the converted layers, after both stages of their own",
            "paper": "0.04e9 tokens in all",
        },
        trials=(
            {}, {"gate": "feature"}, {"combine": "sum"}, {"window_rope": False, "num_meta": 0},
        ),
    )  # fmt: skip
    window: int = param(128, "tokens attended exactly, the query's own included", low=1)
    num_meta: int = param(4, "learned pairs of key and value that every query sees, per key/value head", low=0)
    feature_dim: int = param(64, "K, rank of the feature map; it gives 2 K features", low=1)
    gate: Literal["scalar", "feature"] = param("scalar", "one gate per key/value head and token, or one per feature")
    gate_bias: float = param(4.0, "b_g at first: gates begin at sigmoid(b_g)")
    combine: Literal["joint", "sum"] = param("joint", "one denominator over both parts, or the sum of their outputs")
    window_rope: bool = param(True, "rotated queries and keys inside the window; False: no positions but the gates'")
    share_bias: float = param(0.0, "joint: the softmax part's weight c begins at sigmoid(share_bias)")

    def validate(self) -> None:
        """A window of keys without positions cannot tell their order; gates must be finite."""
        require(abs(self.gate_bias) <= 80, f"lizard: gate_bias={self.gate_bias} must lie in [-80, 80]")

    def choices(self) -> dict[str, Any]:
        """See `Linearisation.choices`."""
        return {
            "window": self.window, "feature_dim": self.feature_dim, "num_meta": self.num_meta, "gate": self.gate,
            "combine": self.combine, "window_rope": self.window_rope, "feature_rope": False,
        }  # fmt: skip

    def begin(self, layer: LinearisedProjections, pairs: tuple[Tensor, Tensor] | None) -> None:
        """See `Linearisation.begin`."""
        layer.start(self.share_bias, self.gate_bias, pairs)

    def slower(self) -> tuple[str, ...]:
        """The gates' weights: they meet whole hidden states."""
        return ("gate_proj.weight",)
