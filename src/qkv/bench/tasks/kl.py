r"""How far the method moves the next-token distribution: the sensitive measure.

    KL_s = sum_x p(x) (log p(x) - log p'(x))

p is the unmodified model's distribution after token s, p' the one under the method, both over the whole vocabulary, on the
same tokens as `ppl`. Beside it: how often both would choose the same next token.
"""

from __future__ import annotations

from typing import Any, ClassVar, final

import torch
from torch import Tensor

from qkv.bench.measure import cost, quantile
from qkv.bench.tasks import _continuation
from qkv.bench.tasks._task import Bench, Outcome, Settings, Task, Trial


def divergence(full: Tensor, method: Tensor) -> Tensor:
    """KL(full || method) of each row in nats, ``[S]`` float64, from logits ``[S, V]``."""
    p, q = full.double().log_softmax(-1), method.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).clamp(min=0.0)


@final
class Divergence(Task):
    """See the module."""

    id: ClassVar[str] = "kl"
    title: ClassVar[str] = "KL divergence and top-1 agreement"
    says: ClassVar[str] = (
        "KL(unmodified || method) of the next-token distributions in nats, and how often both choose the same token, after "
        "each token fed under the method's cache."
    )

    def parameters(self, settings: Settings) -> dict[str, Any]:
        """See `Task.parameters`."""
        return _continuation.parameters(settings)

    def longest(self, settings: Settings, context: int) -> int:
        """See `Task.longest`."""
        return context + settings.tokens

    def check(self, bench: Bench, context: int) -> None:
        """See `Task.check`."""
        _continuation.windows(bench, context)

    def reference(self, trial: Trial, context: int) -> dict[str, Tensor]:
        """The unmodified model's logits ``[S, V]`` per window, from one forward pass over all its tokens."""
        out = {}
        for i, w in enumerate(_continuation.windows(trial.bench, context)):
            whole = torch.cat((w.prompt, w.fed))
            out[f"window{i}"] = trial.runner.run(whole, whole[:0], keep=len(w.fed), measure=False).prefill
        return out

    def run(self, trial: Trial, context: int, reference: dict[str, Tensor]) -> Outcome:
        """See `Task.run`."""
        done = _continuation.scored(trial, context)
        full = [reference[f"window{i}"] for i in range(len(done))]
        kl = [divergence(f, p.steps) for f, (_, p) in zip(full, done, strict=True)]
        same = [f.argmax(-1) == p.steps.argmax(-1) for f, (_, p) in zip(full, done, strict=True)]
        ordered = sorted(float(x) for part in kl for x in part)
        metrics = {
            "kl": sum(ordered) / len(ordered),
            "kl_p50": quantile(ordered, 0.5),
            "kl_p90": quantile(ordered, 0.9),
            "kl_p99": quantile(ordered, 0.99),
            "kl_max": ordered[-1],
            "top1": float(torch.cat(same).double().mean()),
            "kl_by_position": [float(x) for x in torch.stack(kl).mean(0)],
            "kl_by_window": [float(x.mean()) for x in kl],
            "tokens": len(ordered),
        }
        return Outcome(metrics, cost([p for _, p in done]))
