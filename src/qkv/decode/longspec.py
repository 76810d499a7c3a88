r"""LongSpec: a one-layer draft with a memory of constant size grows a tree of guesses; the target verifies the tree in one pass.

    draft       x = embed(token); own sliding self-attention; cross-attention to the target's last keys and values; MLP
    tree        per depth the `tree` likeliest paths; a node's position is its depth behind the text
    verifying   O = w O_prefix + (1 - w) O_tree,  w = sigmoid(lse_prefix - lse_tree): only the tree needs a mask
    accepting   a token is drawn from the target at every node and followed down the tree as far as it goes

Accepted tokens stay certain: the target reads them again in its next pass (so its cache is that of plain decoding), and its last
layer keeps what it computed for them, for the draft.

Paper: arXiv:2502.17421. The published code accepts a child by the ratio p/q, which is lossless only for children drawn from q;
these are the draft's likeliest, so child x is accepted with probability p(x) (see `decode/_common/accept.py`). Chains
(tree=(1, 1, 1, 1)) also run on caches that evict or quantise, below an exact last layer.

Axes: B batch, T tokens, H query heads, G key/value heads, N nodes, P prefix keys, D head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from qkv.core.cache import require
from qkv.core.decoding import GREEDY, Decoding, DecodingSpec, Generated, Progress, Sampling
from qkv.core.errors import InvalidInput
from qkv.core.spec import param
from qkv.decode._common.loop import speculate
from qkv.decode._common.target import Target
from qkv.decode._common.tree import hybrid_tree_attention, reference
from qkv.decode._glide import (
    GlideDraft,
    GlideProposer,
    GlideShape,
    anchor_offset_positions,
    last_site,
    shifted_cross_attention,
)

__all__ = [
    "GlideDraft",
    "GlideShape",
    "LongSpec",
    "anchor_offset_positions",
    "hybrid_tree_attention",
    "reference",
    "shifted_cross_attention",
]


class Contrary(GlideDraft):
    """Guesses what the draft holds for least likely: for the laws."""

    def mlp(self, x: Tensor) -> Tensor:
        """Logits change their sign with the hidden state."""
        return -super().mlp(x)


def examples(model: Any) -> Mapping[str, Mapping[str, Any]]:
    """For the laws: drafts that know nothing, and one that turns its guesses around."""
    random = GlideDraft.of(model, window=7, seed=3).eval()
    contrary = GlideDraft.of(model, window=512, seed=4).eval()
    contrary.__class__ = Contrary
    return {"random": {"draft": random}, "adversarial": {"draft": contrary}}


@final
@dataclass(frozen=True, kw_only=True)
class LongSpec(Decoding):
    """Guess a tree with a trained one-layer draft, keep the path that the model would have said."""

    spec: ClassVar[DecodingSpec] = DecodingSpec(
        id="longspec",
        title="LongSpec: Long-Context Lossless Speculative Decoding with Efficient Drafting and Verification",
        paper="arXiv:2502.17421",
        source="code",
        summary="A one-layer draft that reads the model's own last keys guesses a tree of tokens, verified in one pass.",
        shown="with a draft trained for a minute, 1.5 tokens or more per pass on held-out text at 1k to 4k",
        honest="the draft is trained for one model; trees need an exact cache (chains do not); one row at a time",
        lossless=True,
        samples=True,
        caches=("full",),
        use="""draft = m.train(model, tokens, "runs/draft").draft   # tokens: a long text, one integer tensor
out = m.generate(model, input_ids, max_new_tokens=100, draft=draft, eos_token_id=tokenizer.eos_token_id)""",
        example=examples,
        trials=({}, {"tree": (1, 1, 1)}),
    )
    tree: tuple[int, ...] = param((4, 16, 16, 16, 16), "nodes per depth; all 1: a chain", low=1, high=256)

    def validate(self) -> None:
        """A tree has a depth, and fits into one pass."""
        require(len(self.tree) >= 1, f"{self.id}: tree={self.tree} has no depth; give at least one width")
        require(sum(self.tree) <= 1024, f"{self.id}: tree={self.tree} has {sum(self.tree)} nodes; at most 1024")

    def generate(
        self,
        model: Any,
        input_ids: Tensor,
        *,
        max_new_tokens: int,
        attention_mask: Tensor | None = None,
        sampling: Sampling = GREEDY,
        eos_token_id: int | tuple[int, ...] | None = None,
        seed: int | None = None,
        progress: Progress | None = None,
        draft: GlideDraft | str | Path,
    ) -> Generated:
        """See `Decoding.generate`. draft: from `train`, or the folder it wrote. notes: tokens gained in each pass."""
        if isinstance(draft, (str, Path)):
            draft = self.load(draft, model)
        if not isinstance(draft, GlideDraft):
            raise InvalidInput(f"{self.id}: draft must be a GlideDraft or its folder, not {type(draft).__name__}")
        draft.fits(model)
        mine: GlideDraft = draft

        def begin(target: Target, generator: torch.Generator | None) -> GlideProposer:
            return GlideProposer(mine, target, self.tree)

        return speculate(
            self.id, model, input_ids, begin, max_new_tokens=max_new_tokens, attention_mask=attention_mask, sampling=sampling,
            eos_token_id=eos_token_id, seed=seed, progress=progress, depth=len(self.tree), nodes=sum(self.tree),
        )  # fmt: skip

    def train(
        self,
        model: Any,
        tokens: Tensor,
        folder: str | Path,
        *,
        recipe: Any = None,
        window: int = 512,
        start: GlideDraft | None = None,
        resume: bool = False,
        progress: Progress | None = None,
    ) -> Any:
        """Teach a draft for a model on a long text; the model is frozen. Gives a `Taught`: the draft, its losses.

        tokens: one integer tensor, the text. folder: gets ``draft/`` (safetensors and JSON with the model's fingerprint) and,
        until the end, ``state/`` to go on from with resume=True. recipe: a `qkv.decode._glide_training.Recipe` or a dict of its
        fields. window: tokens of the draft's self-attention. start: a draft to go on from (a later stage). Raises
        `TrainingError` for a loss that is not finite or a folder started otherwise.
        """
        from qkv.decode._glide_training import Recipe, train

        recipe = Recipe() if recipe is None else Recipe(**recipe) if isinstance(recipe, dict) else recipe
        last_site(model)
        return train(model, tokens, folder, recipe, window=window, start=start, resume=resume, progress=progress)

    def load(self, folder: str | Path, model: Any) -> GlideDraft:
        """The draft that `train` wrote. Raises `SavedDataError` when it belongs to another model or is damaged."""
        folder = Path(folder)
        return GlideDraft.load(folder / "draft" if (folder / "draft").is_dir() else folder, model)
