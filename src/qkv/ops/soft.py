r"""SOFT: a Gaussian kernel instead of softmax, approximated from a few landmarks by Nystrom's method in linear time.

    kappa(a, b) = exp(-s |a - b|^2 / 2),     P_q = kappa(Q, L),  P_k = kappa(K, L),  A = kappa(L, L)
    out = P_q X (P_k^T V),     X = inverse of A + ridge I by Newton's iteration;  SOFT++: X <- R^(-1/2) X R^(-1/2), R = diag(A 1)

s = D^(-1/2), rows do not sum to 1. In the published layers keys are the queries (pass q as k): the map is then symmetric and
positive semidefinite; here keys may differ and landmarks summarise the keys. L ``[B, G, m, D]`` is given, or the keys averaged
along the sequence, or over a `grid` to a square of sqrt(m) a side. The layers make it by LayerNorm and GELU of a strided
convolution of s^(1/2) q (divide by s^(1/2) before passing it on), and add a depthwise convolution of the values over the grid.

Newton: X_0 = a A', X <- 2 X - X A' X, a = 1.8 / (largest row sum of A)^2, A' = A + ridge I (a ridge above 1/20 of that sum is
counted in, or the steps would grow); backward in closed form, dA = -X^T dX X^T. Landmarks that nearly coincide need more
iterations than 20; `newton_residual` tells. The published code leaves the ridge out where it normalises; here both have it.
Kernels, inverse and products run in float32 under autocast too: rounded to bfloat16, near-equal landmarks turn into errors of
10 to 60 % of the output (0.3 % as it is). ``normalise="symmetric"`` slows the growth of the map's norm with N.
`gaussian_attention` is the exact map, `qkv.layers._soft.SoftAttention` the published block.

Landmarks averaged from the keys see every key: without `landmarks` given there is no causal form. Given, it is a recurrence
(our completion). State: `state` P_k^T V ``[B, H, m, E]``.

No setting makes it another operator of this library.

Axes: B batch, H query heads, G key/value heads, N queries, M keys, m = s landmarks, D head width, E value width.
Lu et al. 2022, Softmax-free Linear Transformers, arXiv:2207.03341 (SOFT: arXiv:2110.11945).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from qkv.core.errors import InvalidParameter
from qkv.core.operator import Operator, OperatorSpec, Wiring
from qkv.core.spec import Extra, Learnt, Place, param
from qkv.core.state import State
from qkv.ops._common.decayed import decayed_linear_attention
from qkv.ops._common.pooling import summaries
from qkv.ops._common.states import after, matrix, per_head, unrounded, wide

Grid = Sequence[int] | None
Normalise = Literal["symmetric", "plain"]


@unrounded
def reference(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = True, padding: Tensor | None = None,
    initial_state: State | None = None, return_state: bool = False, landmarks: Tensor | None = None,
    num_landmarks: int = 49, grid: Grid = None, prefix: int = 0, normalise: Normalise = "symmetric", ridge: float = 0.01,
    newton_iters: int = 20,
) -> Any:  # fmt: skip
    """The map ``[B, H, N, M]`` as a product of three, distances from differences, Newton's steps unrolled.

    q ``[B, H, N, D]``, k ``[B, G, M, D]``, v ``[B, G, M, E]`` -> ``[B, H, N, E]``, or that and the state.
    """
    dtype = q.dtype
    marks = _landmarks(k, landmarks, padding, num_landmarks, grid, prefix).to(dtype)
    k, v, marks = per_head(q, k, v, marks)
    distance = lambda x, y: (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)  # noqa: E731
    read, write, own = ((-0.5 * scale * distance(x, marks)).exp() for x in (q, k, marks))
    if padding is not None:
        write = write.masked_fill(~padding[:, None, :, None], 0.0)
    inner = _inverse(own.to(wide(q)), ridge, newton_iters, normalise, exactly=False).to(dtype)
    whole = read @ inner @ write.mT
    if not causal:
        return whole @ v
    before = matrix("soft", q, v, initial_state, marks.shape[2])
    out = whole.tril() @ v + read @ inner @ before.to(dtype)
    if not return_state:
        return out
    return out, after("soft", initial_state, q.shape[2], state=before + (write.mT @ v).to(before))


def loop(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = True, padding: Tensor | None = None,
    initial_state: State | None = None, return_state: bool = False, landmarks: Tensor | None = None,
    num_landmarks: int = 49, grid: Grid = None, prefix: int = 0, normalise: Normalise = "symmetric", ridge: float = 0.01,
    newton_iters: int = 20,
) -> Any:  # fmt: skip
    """Token by token with a true inverse (equal where Newton's iteration has converged); shapes as in `reference`."""
    marks = _landmarks(k, landmarks, padding, num_landmarks, grid, prefix)
    k, v, marks = per_head(q, k, v, marks)
    memory = matrix("soft", q, v, initial_state, marks.shape[2])
    own = torch.stack([(-0.5 * scale * (marks - m.unsqueeze(2)).square().sum(-1)).exp() for m in marks.unbind(2)], 2)
    inner = torch.linalg.inv(own + ridge * torch.eye(marks.shape[2], dtype=own.dtype, device=own.device))
    if normalise == "symmetric":
        rows = own.sum(-1).rsqrt()
        inner = rows.unsqueeze(-1) * inner * rows.unsqueeze(-2)
    feature = lambda x: (-0.5 * scale * (marks - x.unsqueeze(2)).square().sum(-1)).exp()  # noqa: E731
    outs = []
    for t in range(k.shape[2]):
        new = feature(k[:, :, t]).unsqueeze(-1) * v[:, :, t].unsqueeze(-2)
        memory = memory + (new if padding is None else new * padding[:, t, None, None, None])
        if causal:
            outs.append(torch.einsum("bhm,bhml,bhle->bhe", feature(q[:, :, t]), inner, memory))
    if not causal:
        outs = [torch.einsum("bhm,bhml,bhle->bhe", feature(x), inner, memory) for x in q.unbind(2)]
    out = torch.stack(outs, 2)
    return (out, after("soft", initial_state, k.shape[2], state=memory)) if return_state else out


@unrounded
def fast(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = True, padding: Tensor | None = None,
    initial_state: State | None = None, return_state: bool = False, landmarks: Tensor | None = None,
    num_landmarks: int = 49, grid: Grid = None, prefix: int = 0, normalise: Normalise = "symmetric", ridge: float = 0.01,
    newton_iters: int = 20, chunk_size: int = 64,
) -> Any:  # fmt: skip
    """P_k^T V first, then its inverse and the queries; causal: chunks of linear attention. Shapes as in `reference`."""
    dtype = q.dtype
    read, write, inner, v = _factors(
        q, k, v, scale, padding, landmarks, num_landmarks, grid, prefix, normalise, ridge, newton_iters
    )
    if not causal:
        return (read @ (inner @ (write.mT @ v))).to(dtype)
    before = matrix("soft", q, v, initial_state, write.shape[-1])
    out, memory, _ = decayed_linear_attention(read @ inner, write, v, state=before, chunk_size=chunk_size, sub_chunk=1)
    return (out.to(dtype), after("soft", initial_state, q.shape[2], state=memory)) if return_state else out.to(dtype)


def initial(q: Tensor, k: Tensor, v: Tensor, *, landmarks: Tensor) -> State:
    """The empty state: zeros in float32 (float64 for float64 inputs)."""
    return after("soft", None, 0, state=matrix("soft", q, v, None, landmarks.shape[-2]))


@unrounded
def step(
    q: Tensor, k: Tensor, v: Tensor, state: State, *, scale: float, landmarks: Tensor, padding: Tensor | None = None,
    normalise: Normalise = "symmetric", ridge: float = 0.01, newton_iters: int = 20,
) -> tuple[Tensor, State]:  # fmt: skip
    """One token: q ``[B, H, 1, D]``, k ``[B, G, 1, D]``, v ``[B, G, 1, E]`` -> out ``[B, H, 1, E]``, new state."""
    dtype = q.dtype
    read, write, inner, v = _factors(q, k, v, scale, padding, landmarks, 0, None, 0, normalise, ridge, newton_iters)
    memory = matrix("soft", q, v, state, write.shape[-1]) + write.mT * v
    return (read @ (inner @ memory)).to(dtype), after("soft", state, 1, state=memory)


@unrounded
def gaussian_attention(
    q: Tensor, v: Tensor, k: Tensor | None = None, *, scale: float | None = None, padding: Tensor | None = None
) -> Tensor:
    """The exact kernel: sum_j kappa(q_i, k_j) v_j, quadratic; k defaults to q. Shapes as in `reference`, padding ``[B, M]``."""
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    keys, v = per_head(q, q if k is None else k, v)
    weights = kernel(q, keys, scale)
    if padding is not None:
        weights = weights.masked_fill(~padding[:, None, None, :], 0.0)
    return (weights @ v.to(weights)).to(q.dtype)


@unrounded
def kernel(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """The kernel kappa ``[..., N, M]`` of ``[..., N, D]`` and ``[..., M, D]``, in float32 or wider; never above 1."""
    x, y = x.to(wide(x)), y.to(wide(y))
    square = x.square().sum(-1, keepdim=True) + y.square().sum(-1).unsqueeze(-2)
    return (-0.5 * scale * (square - 2 * x @ y.mT).clamp(min=0.0)).exp()


@unrounded
def newton_inverse(a: Tensor, iters: int = 20, ridge: float = 0.01) -> Tensor:
    """The inverse of A + ridge I by Newton's iteration, with its closed-form gradient.

    a: kernel matrices ``[..., m, m]``, symmetric, of ones on the diagonal. The gradient is that of the true inverse: right
    where the iteration has converged.
    """
    return _Newton.apply(a, iters, ridge)  # type: ignore[no-any-return]


def newton_residual(a: Tensor, x: Tensor, ridge: float = 0.01) -> Tensor:
    """Largest entry of |X A' - I| for each matrix, ``[...]``: 0 where the iteration has converged."""
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    return (x @ (a + ridge * eye) - eye).abs().amax((-2, -1))


class _Newton(torch.autograd.Function):
    """See `newton_inverse`."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, iters: int, ridge: float) -> Tensor:
        """``[..., m, m]`` -> ``[..., m, m]``."""
        x = _iterated(a, iters, ridge)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        """The closed form, -X^T dX X^T."""
        (x,) = ctx.saved_tensors
        return -x.mT @ grad @ x.mT, None, None


def _iterated(a: Tensor, iters: int, ridge: float) -> Tensor:
    rows = a.detach().sum(-1).amax(-1)
    alpha = (
        1.8 / torch.maximum(rows, (rows + ridge) / 1.05).square()[..., None, None]
    )  # a (largest eigenvalue of A')^2 < 2
    moved = a + ridge * torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    x = alpha * moved
    for _ in range(iters):
        x = 2 * x - x @ moved @ x
    return x


def _inverse(a: Tensor, ridge: float, iters: int, normalise: Normalise, exactly: bool = True) -> Tensor:
    """X ``[..., m, m]``, normalised as asked; exactly: with the gradient of the true inverse."""
    x = newton_inverse(a, iters, ridge) if exactly else _iterated(a, iters, ridge)
    if normalise == "plain":
        return x
    rows = a.sum(-1).rsqrt()
    return rows.unsqueeze(-1) * x * rows.unsqueeze(-2)


def _factors(
    q: Tensor, k: Tensor, v: Tensor, scale: float, padding: Tensor | None, landmarks: Tensor | None, count: int, grid: Grid,
    prefix: int, normalise: Normalise, ridge: float, iters: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """P_q ``[B, H, N, m]``, P_k ``[B, H, M, m]``, X ``[B, H, m, m]`` and V ``[B, H, M, E]`` in float32 or wider."""
    marks = _landmarks(k, landmarks, padding, count, grid, prefix)
    own = kernel(marks, marks, scale)
    own = own.masked_fill(torch.eye(own.shape[-1], dtype=torch.bool, device=own.device), 1.0)  # not left to rounding
    inner, write = _inverse(own, ridge, iters, normalise), kernel(k, marks, scale)
    if padding is not None:
        write = write.masked_fill(~padding[:, None, :, None], 0.0)
    write, inner, v, marks = per_head(q, write, inner, v.to(marks), marks)
    return kernel(q, marks, scale), write, inner, v


def _landmarks(
    k: Tensor, landmarks: Tensor | None, padding: Tensor | None, count: int, grid: Grid, prefix: int
) -> Tensor:
    """L ``[B, G, m, D]`` in float32 or wider."""
    if landmarks is None:
        return summaries(k, count, padding, grid=grid, prefix=prefix, who="soft")
    landmarks = landmarks.to(wide(k))
    return landmarks.expand(k.shape[0], *landmarks.shape) if landmarks.ndim == 3 else landmarks


def _settings(place: Place) -> dict[str, Any]:
    """On a grid: landmarks of the published number, or as many as its smaller side allows."""
    if place.grid is None:
        return {}
    return {"grid": place.grid, "num_landmarks": min(7, max(1, min(place.grid) - 1)) ** 2}


def _fixed(place: Place) -> Tensor:
    """What a causal layer learns instead of averaging: 16 landmarks a key/value head."""
    return torch.randn(place.kv_heads, 16, place.key_width, generator=torch.Generator().manual_seed(place.layer))


@final
@dataclass(frozen=True, kw_only=True)
class Soft(Operator):
    """Gaussian attention through landmarks."""

    spec: ClassVar[OperatorSpec] = OperatorSpec(
        id="soft",
        title="Softmax-free attention (SOFT, SOFT++)",
        paper="arXiv:2207.03341",
        source="code",
        summary="A Gaussian kernel of queries and keys takes the place of softmax, approximated from a few landmark tokens with "
        "an inverse found by Newton's iteration.",
        shown="The error against the exact Gaussian falls as landmarks are added; with the normalisation the norm of the map "
        "stays bounded as an image grows.",
        honest="Rows do not sum to one, near-equal landmarks make the inverse hard, and without the normalisation a model does "
        "not carry over to other resolutions.",
        trials=(
            {"num_landmarks": 4},
            {"num_landmarks": 3, "normalise": "plain", "chunk_size": 5},
        ),
        causal="both",
        cross="bidirectional",
        causal_needs=("landmarks",),
        reference=reference,
        fast=fast,
        loop=loop,
        initial=initial,
        step=step,
        extras={
            "landmarks": Extra(
                axes="gsd|bgsd", sample=lambda *shape, **kw: torch.randn(shape, **kw), required=False,
                doc="the landmarks; without them keys are averaged, which is bidirectional: causal=False",
                learnt=Learnt(axes="gsd", start=_fixed),
            )
        },
        wiring=Wiring(settings=_settings),
    )  # fmt: skip
    num_landmarks: int = param(49, "landmarks made by averaging keys (on a grid: a square number)", low=1)
    grid: tuple[int, ...] | None = param(None, "rows and columns of the tokens; none: a sequence", low=1)
    prefix: int = param(0, "with a grid: tokens before it, which are not averaged (a class token)", low=0)
    normalise: Literal["symmetric", "plain"] = param(
        "symmetric", "symmetric: divided by row sums on the landmarks' side (SOFT++); plain: not divided"
    )
    ridge: float = param(0.01, "added to the diagonal of the landmarks' matrix", low=0.0)
    newton_iters: int = param(20, "Newton iterations of the inverse", low=1)
    chunk_size: int = param(64, "tokens per chunk of the causal form", low=1)

    def validate(self) -> None:
        """Landmarks on a grid form a square."""
        if self.grid is None:
            return
        if len(self.grid) != 2:
            raise InvalidParameter(f"soft: grid={self.grid} must be rows and columns, e.g. (14, 14)")
        if math.isqrt(self.num_landmarks) ** 2 != self.num_landmarks or math.isqrt(self.num_landmarks) > min(self.grid):
            raise InvalidParameter(
                f"soft: num_landmarks={self.num_landmarks} must be the square of a side that fits the grid {self.grid}"
            )
