"""What an output must not depend on: later tokens, other rows and heads, padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qkv.testing._law import Case, close, expect, finite, law, same
from qkv.testing.operators._inputs import (
    E,
    H,
    Inputs,
    N,
    call,
    choices,
    differentiable,
    draw,
    gradients,
    is_causal,
    is_padded,
    is_recurrent,
    modes,
    same_state,
    slack,
    takes_cross,
)


@law("operator", "No output depends on a later token: the gradient to the future is exactly zero and changing it changes "
     "nothing; a mask that is off by one, or statistics over the whole sequence, break it.", applies=is_causal)  # fmt: skip
def no_future_leak(case: Case) -> None:
    """Every query in turn; also after replacing everything later by other values."""
    sizes: list[dict[str, Any]] = [{"choice": c} for c in choices(case.spec, True)]
    sizes += [{"n": 11, "m": N}] if takes_cross(case.spec, True) else []
    for size in sizes:
        inputs, other = draw(case, **size), draw(case, salt=1, **size)
        if case.spec.causal == "both":
            inputs.keywords["causal"] = True
        n, m = inputs.q.shape[2], inputs.k.shape[2]
        out = call(case, inputs)
        weight = case.draw(5).normal(*out.shape)
        for i in range(n):
            row = torch.zeros_like(weight)
            row[:, :, i] = weight[:, :, i]
            for name, grad in gradients(case, inputs, row).items():
                for at, letter in enumerate(inputs.letters()[name]):
                    if letter in "nm":
                        last = i + (m - n if letter == "m" else 0)
                        later = grad.narrow(at, last + 1, grad.shape[at] - last - 1)
                        expect(not later.any(), f"output {i} has a gradient to {name} after token {last}: up to "
                               f"{_largest(later):.3g}, must be exactly 0")  # fmt: skip
            changed = _changed_after(i, inputs, other)
            close(call(case, changed)[:, :, : i + 1], out[:, :, : i + 1], rtol=1e-12, atol=1e-12,
                  what=f"outputs up to {i} after changing later tokens")  # fmt: skip


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _changed_after(i: int, inputs: Inputs, other: Inputs) -> Inputs:
    """`inputs` up to query i, `other` after it."""
    offset = inputs.k.shape[2] - inputs.q.shape[2]
    return inputs.map(lambda name, axes, x: _spliced(x, other.named()[name], axes, i, offset))


def _spliced(x: Tensor, other: Tensor, axes: str, i: int, offset: int) -> Tensor:
    for at, letter in enumerate(axes):
        if letter in "nm":
            keep = i + 1 + (offset if letter == "m" else 0)
            x = torch.cat([x.narrow(at, 0, keep), other.narrow(at, keep, x.shape[at] - keep)], at)
    return x


@law("operator", "Permuting the batch permutes the output; state shared between rows breaks it.")
def batch_permutation(case: Case) -> None:
    """A batch of five in another order."""
    for choice in choices(case.spec):
        inputs, order = draw(case, b=5, choice=choice), case.draw(3).permutation(5)
        close(call(case, inputs.at("b", order)), call(case, inputs)[order], what="permuted batch", **slack(case))


@law("operator", "Permuting heads (with their key heads and extras) permutes the output; a head axis read from the wrong "
     "place breaks it.")  # fmt: skip
def head_permutation(case: Case) -> None:
    """Key heads in another order, with two query heads each where they may be shared."""
    for choice in choices(case.spec):
        groups, per = 5, 2 if case.spec.gqa else 1
        inputs, order = draw(case, h=groups * per, g=groups, choice=choice), case.draw(3).permutation(groups)
        heads = (order[:, None] * per + torch.arange(per, device=order.device)).flatten()
        got = call(case, inputs.at("g", order).at("h", heads))
        close(got, call(case, inputs)[:, heads], what="permuted heads", **slack(case))


@law("operator", "A row of a batch gives what it gives alone; statistics over the batch break it.")
def row_alone(case: Case) -> None:
    """Every row of a batch of three."""
    for choice in choices(case.spec):
        inputs = draw(case, b=3, choice=choice)
        whole = call(case, inputs)
        for row in range(3):
            alone = call(case, inputs.at("b", slice(row, row + 1)))
            close(alone, whole[row : row + 1], what=f"row {row} alone", **slack(case))


def paddings(device: str) -> Tensor:
    """``[3, N]`` bool: three padded tokens on the left, four on the right, none."""
    t = torch.arange(N, device=device)
    return torch.stack([t >= 3, t < N - 4, t >= 0])


@law("operator", "Padded tokens change nothing: outputs, gradients and the final state of the real tokens are those of "
     "the row without padding; counting padding in a mean or a position breaks it.", applies=is_padded)  # fmt: skip
def padding_changes_nothing(case: Case) -> None:
    """One row padded on the left, one on the right, one not at all, against each row alone."""
    for causal in modes(case.spec):
        for choice in choices(case.spec, causal):
            inputs, real = draw(case, b=3, choice=choice), paddings(case.device)
            if case.spec.causal == "both":
                inputs.keywords["causal"] = causal
            weight = case.draw(5).normal(3, H, N, E)
            weight = weight * real[:, None, :, None]
            out, grads = call(case, inputs, padding=real), gradients(case, inputs, weight, padding=real)
            finite(out, "output with padding")
            for row in range(3):
                tokens = real[row].nonzero().squeeze(-1)
                alone = inputs.at("b", slice(row, row + 1)).at("nm", tokens)
                what = f"row {row}, {'causal' if causal else 'bidirectional'}"
                close(out[row, :, tokens], call(case, alone)[0], what=f"{what}: output", **slack(case))
                want = gradients(case, alone, weight[row : row + 1, :, tokens])
                for name in differentiable(inputs, case.spec):
                    axes = inputs.letters()[name]
                    if axes[0] == "b":
                        _padded_gradient(case, grads[name][row], want[name][0], axes[1:], real[row], f"{what}: {name}")
            if causal and is_recurrent(case):
                _padded_state(case, inputs, real)


def _padded_gradient(case: Case, got: Tensor, want: Tensor, axes: str, real: Tensor, what: str) -> None:
    for at, letter in enumerate(axes):
        if letter in "nm":
            gone = got.index_select(at, (~real).nonzero().squeeze(-1))
            expect(not gone.any(), f"{what}: gradient {_largest(gone):.3g} at padding, must be 0")
            got = got.index_select(at, real.nonzero().squeeze(-1))
    close(got, want, what=f"{what}: gradient", **slack(case))


def _padded_state(case: Case, inputs: Inputs, real: Tensor) -> None:
    _, state = call(case, inputs, padding=real, return_state=True)
    for row in range(real.shape[0]):
        alone = inputs.at("b", slice(row, row + 1)).at("nm", real[row].nonzero().squeeze(-1))
        _, want = call(case, alone, return_state=True)
        got = state.index(torch.tensor([row], device=real.device))
        same_state(case, got, want, f"row {row}: state with padding", seen=False)


@law("operator", "What lies under padding is never read, not even as 0 times NaN: NaN there changes no bit of the real "
     "outputs and reaches no gradient.", applies=is_padded)  # fmt: skip
def nan_in_padding_changes_nothing(case: Case) -> None:
    """NaN in q, k, v and extras at padded tokens."""
    for causal in modes(case.spec):
        for choice in choices(case.spec, causal):
            inputs, real = draw(case, b=3, choice=choice), paddings(case.device)
            if case.spec.causal == "both":
                inputs.keywords["causal"] = causal
            poisoned = inputs.map(lambda n, axes, x, real=real: _poisoned(x, axes, real))
            weight = case.draw(5).normal(3, H, N, E) * real[:, None, :, None]
            out, want = call(case, poisoned, padding=real), call(case, inputs, padding=real)
            keep = real[:, None, :, None].expand_as(out)
            same(out[keep], want[keep], "real outputs with NaN under padding")
            for name, grad in gradients(case, poisoned, weight, padding=real).items():
                finite(grad, f"gradient of {name} with NaN under padding")


def _poisoned(x: Tensor, axes: str, real: Tensor) -> Tensor:
    if axes[0] != "b" or not x.is_floating_point():
        return x
    for at, letter in enumerate(axes):
        if letter in "nm":
            shape = [real.shape[0] if a == 0 else real.shape[1] if a == at else 1 for a in range(x.ndim)]
            x = x.masked_fill(~real.reshape(shape), torch.nan)
    return x
