"""What a converted model computes: its source where that is exact, less error with more rank or training, in every precision."""

from __future__ import annotations

import itertools

import torch

from qkv.testing._law import Case, close, expect, law, same
from qkv.testing.conversions._source import KV_HEADS, converted, divergence, geometry, held_out, logits, small, source


@law(
    "conversion",
    "At the settings the spec calls exact, the converted model gives its source's logits on text it was not calibrated on. "
    "Usual causes: rotary pairs mixed up between layouts, a softmax scale, a bias left behind, a basis that is not orthogonal.",
    applies=lambda case: case.spec.exact is not None,
)
def exact_where_claimed(case: Case) -> None:
    """With grouped, multi-head and multi-query sources, the last with biases; one batch is padded."""
    for kv_heads in KV_HEADS:
        model = source(kv_heads, case.seed, case.device)
        want = [logits(model, batch) for batch in held_out(case)]
        with converted(case, model, case.method.replace(**case.spec.exact(geometry(model)))):
            for batch, truth in zip(held_out(case), want, strict=True):
                close(logits(model, batch), truth, rtol=1e-10, what=f"logits with {kv_heads} KV heads")


@law(
    "conversion",
    "Same weights, same data: the same conversion, bit for bit. Usual cause: random initialisation where a formula belongs.",
)
def deterministic(case: Case) -> None:
    """Two conversions under different random seeds."""
    model = source(seed=case.seed, device=case.device)
    states = []
    for seed in (3, 4):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            with converted(case, model, small(case, model)):
                states.append({n: x.clone() for n, x in model.state_dict().items()})
    for name, x in states[0].items():
        same(states[1][name], x, name)


@law(
    "conversion",
    "More of what the ladder adds means less error: mean KL to the source on held-out text falls along it. Usual causes: "
    "components kept in the wrong order, a basis and its inverse that do not belong together.",
    applies=lambda case: case.spec.ladder is not None,
)
def error_falls(case: Case) -> None:
    """5 % of slack per rung: text of a few hundred tokens is noisy."""
    model = source(seed=case.seed, device=case.device, scale=0.12)
    batches = held_out(case)
    want = [logits(model, batch) for batch in batches]
    errors = []
    for settings in case.spec.ladder(geometry(model)):
        with converted(case, model, case.method.replace(**settings)):
            errors.append(divergence(model, batches, want))
    text = " -> ".join(f"{e:.3g}" for e in errors)
    expect(all(b <= 1.05 * a + 1e-12 for a, b in itertools.pairwise(errors)), f"the error rises somewhere: {text}")
    expect(errors[-1] < 0.1 * errors[0], f"the error hardly falls: {text}")


@law(
    "conversion",
    "In bfloat16 the exact setting loses at most 3 times what the source itself loses. Usual causes: weights computed in low "
    "precision, values of very different size in one sum.",
    applies=lambda case: case.spec.exact is not None,
)
def low_precision(case: Case) -> None:
    """Mean absolute error of the logits against the float64 source."""
    model = source(seed=case.seed, device=case.device, scale=0.12)
    batch = held_out(case)[0]
    want = logits(model, batch)
    model.to(torch.bfloat16)
    plain = float((logits(model, batch).double() - want).abs().mean())
    with converted(case, model, case.method.replace(**case.spec.exact(geometry(model)))):
        got = float((logits(model, batch).double() - want).abs().mean())
    expect(got <= 3 * plain, f"mean error {got:.3g} in bfloat16, {plain:.3g} without the conversion")
