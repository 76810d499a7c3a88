r"""A structured memory: a diagonal state space with one input per channel, as a layer before attention.

    h_t = a h_{t-1} + b x_t,   y_t = Re sum_n c_n h_{t,n} + d x_t        per channel; a, b, c, h complex, n states
    a = exp(step lambda),   b = (a - 1) / lambda,   lambda_n = -exp(r_n) + i f_n

Steps, c and d are each channel's own, the n rates and frequencies are shared. They begin as S4D-Lin (Gu et al. 2022,
arXiv:2206.11893): r = log 1/2, f_n = pi n, steps even in their logarithm from 0.001 to 0.1 a token; c is normal, d is 1.

State: sum_s a^{t-s} x_s (h without b), real and imaginary part, ``[B, W, n, 2]``, float32 or wider.

Axes: B batch, N tokens, W channels, n states, L chunk.
"""

from __future__ import annotations

import math
from typing import Any, final

import torch
from torch import Tensor, nn

from qkv.ops._common.states import unrounded, wide

CHUNK = 64


def reference(memory: StructuredMemory, x: Tensor, held: Tensor | None = None) -> Tensor:
    """Token by token, x ``[B, N, W]`` -> ``[B, N, W]``; held: the state before them."""
    rate = torch.complex(-memory.rate.exp(), memory.frequency)  # [n]
    pole = (memory.step.exp()[:, None] * rate).exp()  # [W, n]
    b, c = (pole - 1) / rate, torch.view_as_complex(memory.mix)
    h = torch.zeros(len(x), *pole.shape, dtype=pole.dtype) if held is None else b * torch.view_as_complex(held)
    out = []
    for token in x.unbind(1):
        h = pole * h + b * token[..., None]
        out.append((c * h).sum(-1).real + memory.skip * token)
    return torch.stack(out, 1)


@unrounded
def scan(x: Tensor, log_pole: Tensor, weight: Tensor, held: Tensor | None, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """``Re sum_n weight_n h_n`` ``[B, N, W]`` and the last h ``[B, W, n, 2]``, where ``h_t = e^log_pole h_{t-1} + x_t``.

    x ``[B, N, W]`` after the state `held`; log_pole, weight complex ``[W, n]``. Chunks of tokens by one product each.
    """
    cut = x.shape[1] // chunk * chunk
    parts = []
    for piece, size in ((x[:, :cut], chunk), (x[:, cut:], x.shape[1] - cut)):
        if piece.shape[1]:
            y, held = _chunks(piece, log_pole, weight, held, size)
            parts.append(y)
    assert held is not None
    return torch.cat(parts, 1), held


def _chunks(x: Tensor, log_pole: Tensor, weight: Tensor, held: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    """`scan` over whole chunks."""
    b, n, w = x.shape
    t = torch.arange(size + 1, device=x.device)
    powers = (log_pole[:, None] * t[:, None]).exp()  # [W, L + 1, n]
    kernel = (weight[:, None] * powers[:, :size]).sum(-1).real  # [W, L]
    age = t[:size, None] - t[:size]
    near = torch.where(age >= 0, kernel[:, age.clamp(min=0)], 0.0)  # [W, L, L]
    tokens = x.unflatten(1, (-1, size)).permute(3, 2, 0, 1).flatten(2)  # [W, L, B N / L]
    out = near @ tokens
    sums = torch.view_as_real(powers[:, :size].flip(1)).flatten(2).mT @ tokens  # [W, 2 n, B N / L]
    sums = torch.view_as_complex(sums.unflatten(1, (-1, 2)).unflatten(3, (b, -1)).permute(3, 4, 0, 1, 2).contiguous())
    h = torch.zeros_like(sums[:, 0]) if held is None else torch.view_as_complex(held.to(x.dtype).contiguous())
    starts = []
    for add in sums.unbind(1):
        starts.append(h)
        h = powers[:, size] * h + add
    if len(starts) > 1 or held is not None:
        reads = weight[:, None] * powers[:, 1:]  # [W, L, n]
        before = torch.view_as_real(torch.stack(starts, 1)).permute(2, 3, 4, 0, 1)  # [W, n, 2, B, N / L]
        out = out + torch.cat((reads.real, -reads.imag), -1) @ before.transpose(1, 2).flatten(3).flatten(1, 2)
    return out.unflatten(2, (b, -1)).permute(2, 3, 1, 0).reshape(b, n, w), torch.view_as_real(h)


@final
class StructuredMemory(nn.Module):
    """See the module. Tokens ``[B, N, W]`` after a state (None: a start) -> what is remembered at each, and the state."""

    step: Tensor
    rate: Tensor
    frequency: Tensor
    mix: Tensor
    skip: Tensor

    def __init__(self, width: int, states: int, **factory: Any) -> None:
        super().__init__()
        with torch.device("cpu"):
            draw = torch.Generator().manual_seed(0)
            begin = {
                "step": torch.linspace(math.log(1e-3), math.log(1e-1), width, dtype=torch.float64),
                "rate": torch.full((states,), math.log(0.5), dtype=torch.float64),
                "frequency": math.pi * torch.arange(states, dtype=torch.float64),
                "mix": torch.randn(width, states, 2, generator=draw, dtype=torch.float64),
                "skip": torch.ones(width, dtype=torch.float64),
            }
        like = torch.empty(0, **factory)
        for name, x in begin.items():
            self.register_parameter(name, nn.Parameter(x.to(like)))

    def forward(self, x: Tensor, held: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``[B, N, W] -> [B, N, W]`` and the state ``[B, W, n, 2]``; computed in float32 or wider, also under autocast."""
        kind = wide(x)
        pole = torch.complex(-self.rate.to(kind).exp(), self.frequency.to(kind))
        log_pole = self.step.to(kind).exp()[:, None] * pole  # [W, n]
        weight = torch.view_as_complex(self.mix.to(kind)) * torch.expm1(log_pole) / pole
        out, held = scan(x.to(kind), log_pole, weight, held)
        return (out + self.skip * x).to(x.dtype), held
