r"""Speculative decoding: a small draft guesses a chain of tokens, the model verifies the chain in one pass.

    token d_i, drawn from the draft's q_i, is kept with probability min(1, p_i(d_i) / q_i(d_i)); at the first that is not kept
    the model draws from norm(max(p_i - q_i, 0)); when all are kept it draws one more from p_{n+1}

The tokens are distributed as the model's own, whatever the draft; greedy, they are the model's own. It works on whatever cache
is applied to the model: the chain is provisional there until it is settled, and what was rejected leaves no trace.

Paper: arXiv:2211.17192. Greedy decoding of draft and model is the case of one-point distributions. Rows of a batch accept
different numbers of tokens and are decoded one after the other.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from qkv.core.decoding import GREEDY, Decoding, DecodingSpec, Generated, Progress, Sampling
from qkv.core.spec import param
from qkv.decode._common.drafts import ModelDraft, check_vocabulary, truncated
from qkv.decode._common.loop import speculate
from qkv.decode._common.target import Target, opened

__all__ = ["Speculative", "reference", "truncated"]


def reference(p: Tensor, q: Tensor, tokens: list[int], uniform: list[float]) -> tuple[int, Tensor]:
    """The definition: (how many of the tokens are kept, the distribution ``[V]`` that the next is drawn from).

    p ``[n + 1, V]``, q ``[n, V]``; uniform: one number of [0, 1) per token.
    """
    for i, token in enumerate(tokens):
        if uniform[i] >= float(p[i, token] / q[i, token]):
            rest = (p[i] - q[i]).clamp(min=0)
            return i, rest / rest.sum()
    return len(tokens), p[len(tokens)]


def examples(model: Any) -> Mapping[str, Mapping[str, Any]]:
    """For the laws: a draft that knows nothing, one that says the least likely, one layer of the model, the model itself."""
    rng = torch.random.get_rng_state()
    torch.manual_seed(5)
    stranger: Any = type(model)(copy.deepcopy(model.config)).to(model.device, model.dtype).eval()
    torch.random.set_rng_state(rng)
    contrary = truncated(model, model.config.num_hidden_layers)
    contrary.lm_head = torch.nn.Linear(1, 1, bias=False)
    contrary.lm_head.weight = torch.nn.Parameter(-model.lm_head.weight.detach())
    return {
        "random": {"draft": stranger},
        "adversarial": {"draft": contrary},
        "one layer": {"draft": truncated(model, 1)},
        "itself": {"draft": truncated(model, model.config.num_hidden_layers)},
    }


@final
@dataclass(frozen=True, kw_only=True)
class Speculative(Decoding):
    """Guess `length` tokens with a draft, keep those that the model would have said."""

    spec: ClassVar[DecodingSpec] = DecodingSpec(
        id="speculative",
        title="Fast Inference from Transformers via Speculative Decoding",
        paper="arXiv:2211.17192",
        source="paper",
        summary="A draft model guesses several tokens and the model verifies them in one pass, without changing what it says.",
        shown="the tokens of plain decoding, on the full and on a compressed cache, in fewer passes",
        honest="faster only with a draft that is much cheaper than the model and often right; decodes one row at a time",
        lossless=True,
        samples=True,
        caches=("full", "h2o:budget=9", "streamingllm:sinks=2,window=7", "kivi:bits=4,group=8,residual=8"),
        use="""# draft: a smaller model of the same tokenizer
out = m.generate(model, input_ids, max_new_tokens=100, draft=draft, eos_token_id=tokenizer.eos_token_id)""",
        example=examples,
    )
    length: int = param(4, "tokens guessed in a row", low=1, high=1024)

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
        draft: Any,
    ) -> Generated:
        """See `Decoding.generate`. draft: a causal language model with the same tokenizer; it may carry methods of its own.

        `truncated(model, layers)` makes one from the model itself. notes: tokens gained in each pass.
        """
        check_vocabulary(self.id, model, draft)

        def begin(target: Target, generator: torch.Generator | None) -> ModelDraft:
            room = target.prompt.shape[1] + max_new_tokens + self.length + 2
            return ModelDraft(draft, target, self.length, sampling, generator, room)

        with opened(draft, f"{self.id}, its draft"):
            return speculate(
                self.id, model, input_ids, begin, max_new_tokens=max_new_tokens, attention_mask=attention_mask,
                sampling=sampling, eos_token_id=eos_token_id, seed=seed, progress=progress, depth=self.length,
                nodes=self.length,
            )  # fmt: skip
