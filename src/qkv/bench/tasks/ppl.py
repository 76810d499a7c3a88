r"""Perplexity of a text's continuation, decoded token by token under the method's cache.

    ppl = exp( - 1/(W S) sum_w sum_s log p(x_{C+s+1} | x_{<= C+s}) )

W windows, C context tokens prefilled, S tokens fed one by one. `ppl_prefill` is the same over the last prompt positions, as
the prefill itself predicts them: there patterns and windows act.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, final

from torch import Tensor

from qkv.bench.measure import cost
from qkv.bench.tasks import _continuation
from qkv.bench.tasks._continuation import Window
from qkv.bench.tasks._task import Bench, Outcome, Settings, Task, Trial


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """Logits ``[S, V]``, targets ``[S]`` -> ``[S]`` float64, in nats."""
    return -logits.double().log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


@final
class Perplexity(Task):
    """See the module."""

    id: ClassVar[str] = "ppl"
    title: ClassVar[str] = "Perplexity"
    says: ClassVar[str] = (
        "Perplexity of the tokens that follow the context, fed one by one under the method's cache. ppl_prefill: of the last "
        "prompt tokens, as the prefill predicts them."
    )

    def parameters(self, settings: Settings) -> dict[str, Any]:
        """See `Task.parameters`."""
        return _continuation.parameters(settings) | {"prefill_scored": _continuation.PREFILL_SCORED}

    def longest(self, settings: Settings, context: int) -> int:
        """See `Task.longest`."""
        return context + settings.tokens

    def check(self, bench: Bench, context: int) -> None:
        """See `Task.check`."""
        _continuation.windows(bench, context)

    def run(self, trial: Trial, context: int, reference: dict[str, Tensor]) -> Outcome:
        """See `Task.run`."""
        done = _continuation.scored(trial, context)
        nll = [negative_log_likelihood(p.steps, w.targets) for w, p in done]
        before = [negative_log_likelihood(p.prefill[:-1], _prompt_targets(w, len(p.prefill))) for w, p in done]
        metrics = {
            "ppl": _exp_mean(nll),
            "ppl_prefill": _exp_mean(before),
            "nll_by_window": [float(x.mean()) for x in nll],
            "tokens": sum(len(x) for x in nll),
        }
        return Outcome(metrics, cost([p for _, p in done]))


def _prompt_targets(window: Window, kept: int) -> Tensor:
    """The prompt tokens that the last `kept` prompt positions predict, but for the last one, which predicts the future."""
    return window.prompt[len(window.prompt) - kept + 1 :]


def _exp_mean(parts: list[Tensor]) -> float | None:
    values = [float(x) for part in parts for x in part]
    return math.exp(min(700.0, sum(values) / len(values))) if values else None
