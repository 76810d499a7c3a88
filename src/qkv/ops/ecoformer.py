r"""EcoFormer: linear attention on codes of +1 and -1 that kernel hash functions give to queries and keys of unit length.

    kappa(x) = [exp(-|x - a_i|^2 / (2 sigma))]_i,   code c = sign(A (kappa(x) - mu))  (b bits, sign 0 = +1),   beta = b + 1
    o_i = [c_i . sum_j c_j v_j^T + beta sum_j v_j] / [c_i . sum_j c_j + N beta]          weights c_i . c_j + beta in [1, 2 b + 1]

sigma is the mean squared distance of the tokens of a row and head to the anchors a. Queries and keys are one projection
(``tied``); without it both are hashed alike, sigma being that of the keys. ``shift="reference"`` has beta v_i in the numerator,
as the released code does: its rows do not sum to 1. Gradients pass the sign where its input is below 1 in size
(``straight_through``). `fit_hash` learns A so that code products follow the largest and smallest scores of the rows, one bit
after the other; anchors and mu are stored with it (`KernelHash` holds all three and refuses work before a fit).
Causal (ours): sums over j <= t, and sigma_t the mean over the tokens so far, so that a code never changes later.

State: `kv` ``[B, H, b, E]``, `codes` ``[B, H, b]``, `values` ``[B, H, E]`` (sums of c v^T, c and v), `spread` ``[B, H]`` (sum of
the tokens' mean squared distances) and `count` ``[B]``.

No setting makes it another operator of this library.

Axes: B batch, H heads, N queries, M keys, C chunk, w anchors, b = s bits, D key width, E value width.
Liu et al. 2022, EcoFormer: Energy-Saving Attention with Linear Complexity, arXiv:2209.09004.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkv.core.attend import readable
from qkv.core.errors import InvalidInput, InvalidParameter, Refused
from qkv.core.operator import Operator, OperatorSpec, Wiring
from qkv.core.spec import Extra, Learnt, Place, param
from qkv.core.state import State
from qkv.ops._common.decayed import decayed_linear_attention
from qkv.ops._common.states import after, wide

Shift = Literal["exact", "reference"]
PICOJOULES = {"multiply": 3.7, "add": 0.9}  # float32 at 45 nm, the numbers that are usually quoted


def reference(
    q: Tensor, k: Tensor, v: Tensor, *, anchors: Tensor, planes: Tensor, mean: Tensor, causal: bool = True,
    padding: Tensor | None = None, initial_state: State | None = None, return_state: bool = False, tied: bool = True,
    shift: Shift = "exact", straight_through: bool = True,
) -> Any:  # fmt: skip
    """The whole map W = c c^T + beta.

    q ``[B, H, N, D]``, k ``[B, H, M, D]``, v ``[B, H, M, E]``; anchors ``[H, w, D]``, planes A ``[H, b, w]``, mean mu ``[H, w]``.
    Returns ``[B, H, N, E]``, or that and the state.
    """
    s = _memory(q, v, planes, initial_state)
    a, c, spread, real = _codes(q, k, anchors, planes, mean, causal, padding, tied, straight_through, s)
    values, beta = v.to(c), planes.shape[1] + 1
    weights = (a @ c.mT + beta) * real[:, None, None, :]
    weights = weights.tril() if causal else weights
    total = weights.sum(-1, keepdim=True) + a @ s["codes"].unsqueeze(-1) + beta * s["count"][:, None, None, None]
    if shift == "exact":
        top = weights @ values + a @ s["kv"] + beta * s["values"].unsqueeze(2)
    else:
        _self(a, c)
        top = (weights - beta * (weights != 0)) @ values + a @ s["kv"] + beta * values
    out = _divided(top, total).to(q.dtype)
    return (out, _after(s, c, values, spread, real, initial_state)) if return_state else out


def loop(
    q: Tensor, k: Tensor, v: Tensor, *, anchors: Tensor, planes: Tensor, mean: Tensor, causal: bool = True,
    padding: Tensor | None = None, initial_state: State | None = None, return_state: bool = False, tied: bool = True,
    shift: Shift = "exact", straight_through: bool = True,
) -> Any:  # fmt: skip
    """One row and head after the other, by Hamming distances: c_i . c_j = b - 2 ham. Shapes as in `reference`."""
    (batch, h, n, _), m, bits = q.shape, k.shape[2], planes.shape[1]
    s = {name: x.clone() for name, x in _memory(q, v, planes, initial_state).items()}
    if tied:
        _same(q, k)
    out = torch.zeros(batch, h, n, v.shape[-1], dtype=q.dtype, device=q.device)

    def distances(x: Tensor, i: int) -> Tensor:
        return (F.normalize(x, dim=-1, eps=1e-6) - anchors[i]).square().sum(-1)

    def code(x: Tensor, i: int, sigma: Tensor) -> Tensor:
        soft = planes[i] @ ((-distances(x, i) / (2 * sigma)).exp() - mean[i])
        sign = torch.where(soft >= 0, 1.0, -1.0).to(soft)
        return sign + (soft.clamp(-1, 1) - soft.clamp(-1, 1).detach()) if straight_through else sign

    for b in range(batch):
        tokens = list(range(m)) if padding is None else padding[b].nonzero().squeeze(-1).tolist()
        rows = tokens if causal else list(range(n)) if padding is None or n != m else tokens
        for i in range(h):
            spread, count, codes = s["spread"][b, i], s["count"][b], {}
            whole = spread + sum(distances(k[b, i, t], i).mean() for t in tokens)
            for t in tokens:
                spread, count = spread + distances(k[b, i, t], i).mean(), count + 1
                sigma = spread / count if causal else whole / max(1, len(tokens))
                codes[t] = (code(k[b, i, t], i, sigma), sigma)
            for t in rows:
                own = code(q[b, i, t], i, codes[t][1] if causal else whole / max(1, len(tokens)))
                seen = [j for j in tokens if j <= t or not causal]
                total = s["codes"][b, i] @ own + (bits + 1) * s["count"][b]
                top = own @ s["kv"][b, i] + (bits + 1) * (s["values"][b, i] if shift == "exact" else v[b, i, t])
                for j in seen:
                    product = bits - (own - codes[j][0]).square().sum() / 2
                    top = top + (product + (bits + 1 if shift == "exact" else 0)) * v[b, i, j]
                    total = total + product + bits + 1
                out[b, i, t] = top / total
            for j in tokens:
                s["kv"][b, i] += codes[j][0][:, None] * v[b, i, j]
                s["codes"][b, i] += codes[j][0]
                s["values"][b, i] += v[b, i, j]
            s["spread"][b, i] = spread
        s["count"][b] += len(tokens)
    return (out, after("ecoformer", initial_state, n, **s)) if return_state else out


def fast(
    q: Tensor, k: Tensor, v: Tensor, *, anchors: Tensor, planes: Tensor, mean: Tensor, causal: bool = True,
    padding: Tensor | None = None, initial_state: State | None = None, return_state: bool = False, tied: bool = True,
    shift: Shift = "exact", straight_through: bool = True, chunk_size: int = 64,
) -> Any:  # fmt: skip
    """Linear attention on the codes, chunk by chunk when causal; shapes as in `reference`."""
    s = _memory(q, v, planes, initial_state)
    a, c, spread, real = _codes(q, k, anchors, planes, mean, causal, padding, tied, straight_through, s)
    values, beta = v.to(c), planes.shape[1] + 1
    if shift == "reference":
        _self(a, c)
    if not causal:
        total = a @ c.sum(2).unsqueeze(-1) + beta * real.sum(1)[:, None, None, None]
        top = a @ (c.mT @ values)
        own = values if shift == "reference" else (values * real[:, None, :, None]).sum(2, keepdim=True)
        return _divided(top + beta * own, total).to(q.dtype)
    if shift == "exact":  # one channel of ones more: it sums values, and in the column of ones tokens
        ends = torch.cat([s["codes"], s["count"][:, None, None].expand(-1, a.shape[1], 1)], -1)
        start = torch.cat([torch.cat([s["kv"], s["values"].unsqueeze(2)], 2), ends.unsqueeze(-1)], -1)
        got = decayed_linear_attention(
            F.pad(a, (0, 1), value=float(beta)), F.pad(c, (0, 1), value=1.0) * real[:, None, :, None],
            F.pad(values, (0, 1), value=1.0), state=start, chunk_size=chunk_size, sub_chunk=chunk_size,
        ).out  # fmt: skip
        out = _divided(got[..., :-1], got[..., -1:]).to(q.dtype)
    else:
        top = decayed_linear_attention(a, c, values, state=s["kv"], chunk_size=chunk_size, sub_chunk=chunk_size).out
        past = s["codes"].unsqueeze(2) + c.cumsum(2)
        count = s["count"][:, None] + real.cumsum(1)
        out = _divided(top + beta * values, (a * past).sum(-1, keepdim=True) + beta * count[:, None, :, None]).to(
            q.dtype
        )
    return (out, _after(s, c, values, spread, real, initial_state)) if return_state else out


def initial(q: Tensor, k: Tensor, v: Tensor, *, anchors: Tensor, planes: Tensor, mean: Tensor) -> State:
    """The empty state: zeros in float32 (float64 for float64 inputs)."""
    return after("ecoformer", None, 0, **_memory(q, v, planes, None))


def step(
    q: Tensor, k: Tensor, v: Tensor, state: State, *, anchors: Tensor, planes: Tensor, mean: Tensor,
    padding: Tensor | None = None, tied: bool = True, shift: Shift = "exact", straight_through: bool = True,
) -> tuple[Tensor, State]:  # fmt: skip
    """One token: q, k ``[B, H, 1, D]``, v ``[B, H, 1, E]`` -> out ``[B, H, 1, E]``, new state."""
    s = _memory(q, v, planes, state)
    a, c, spread, real = _codes(q, k, anchors, planes, mean, True, padding, tied, straight_through, s)
    values, beta = v.to(c), planes.shape[1] + 1
    new = _after(s, c, values, spread, real, state)
    total = a @ new["codes"].unsqueeze(-1) + beta * new["count"][:, None, None, None]
    shifted = new["values"].unsqueeze(2) if shift == "exact" else values
    return _divided(a @ new["kv"] + beta * shifted, total).to(q.dtype), new


class Hash(NamedTuple):
    """anchors ``[H, w, D]``, planes A ``[H, b, w]``, mean mu ``[H, w]``: the operator's inputs of these names."""

    anchors: Tensor
    planes: Tensor
    mean: Tensor


@torch.no_grad()
def fit_hash(
    x: Tensor, *, bits: int = 16, anchors: int = 25, pairs: int = 10, steps: int = 100, rate: float = 5e-4,
    momentum: float = 0.9, start: Tensor | None = None, generator: torch.Generator | None = None,
) -> Hash:  # fmt: skip
    """Hash functions for tokens like x ``[B, H, N, D]`` (queries; their lengths do not matter).

    Target S: +1 at the `pairs` largest scores of each row, -1 at as many smallest. Bit after bit, a row of A descends
    -y^T S y / (N b), y a soft sign, by SGD with Nesterov momentum; it is kept where its hard sign is better than that of its
    beginning; S loses y y^T. Anchors are tokens of the first row of the batch. start: planes ``[H, b, w]`` to go on from (the
    authors fit once an epoch, on its first batch; one fit at their small rate moves little), random ones if None.
    Raises `InvalidParameter`.
    """
    batch, h, n, _ = x.shape
    if bits < 1 or anchors < 1 or 2 * pairs > n or pairs < 1 or anchors > n:
        raise InvalidParameter(
            f"fit_hash: bits={bits}, anchors={anchors} of at most {n} tokens, pairs={pairs} of at most {n // 2}"
        )
    x = F.normalize(x.detach().to(wide(x)), dim=-1, eps=1e-6)
    picked = torch.randperm(n, generator=generator)[:anchors].to(x.device)
    chosen = x[0, :, picked]
    planes = (
        torch.randn(h, bits, anchors, generator=generator, dtype=torch.float64).to(x) if start is None else start.to(x)
    )
    if tuple(planes.shape) != (h, bits, anchors):
        raise InvalidParameter(f"fit_hash: start has shape {tuple(planes.shape)}, expected {(h, bits, anchors)}")
    planes = planes.clone()
    apart = _apart(x, chosen)
    kappa = (-apart / (2 * apart.mean((-2, -1), keepdim=True).clamp(min=1e-12))).exp()
    mean = kappa.mean((0, 2))
    kappa = kappa - mean[:, None]
    scores = x @ x.mT
    target = torch.zeros_like(scores).scatter(-1, scores.topk(pairs).indices, 1.0)
    target = bits * target.scatter(-1, scores.topk(pairs, largest=False).indices, -1.0)
    for bit in range(bits):
        old = planes[:, bit]
        row, speed = old.clone(), torch.zeros_like(old)
        for _ in range(steps):
            z = torch.einsum("bhnw,hw->bhn", kappa, row)
            y = 2 * z.sigmoid() - 1
            pull = ((target + target.mT) @ y.unsqueeze(-1)).squeeze(-1) * (1 - y * y) / 2
            slope = -torch.einsum("bhn,bhnw->hw", pull, kappa) / (n * bits * batch * h)
            speed = momentum * speed + slope
            row = row - rate * (slope + momentum * speed)
        hard = [_sign(torch.einsum("bhnw,hw->bhn", kappa, w)) for w in (old, row)]
        loss = [-torch.einsum("bhn,bhnm,bhm->h", y, target, y) for y in hard]
        better = loss[1] < loss[0]
        planes[:, bit] = torch.where(better[:, None], row, old)
        y = torch.where(better[:, None], hard[1], hard[0])
        target = target - y.unsqueeze(-1) * y.unsqueeze(-2)
    return Hash(chosen, planes, mean)


class KernelHash(nn.Module):
    """Hash functions of a layer as stored constants: `fit`, then `codes` or the operator's inputs by `hash`."""

    anchors: Tensor
    planes: Tensor
    mean: Tensor
    fitted: Tensor

    def __init__(self, heads: int, width: int, bits: int = 16, anchors: int = 25) -> None:
        super().__init__()
        shapes = {"anchors": (heads, anchors, width), "planes": (heads, bits, anchors), "mean": (heads, anchors)}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def fit(self, x: Tensor, **settings: Any) -> None:
        """Learn from queries ``[B, H, N, D]``, going on from an earlier fit; settings as of `fit_hash`."""
        start = self.planes if bool(self.fitted) else None
        found = fit_hash(x, bits=self.planes.shape[1], anchors=self.mean.shape[1], start=start, **settings)
        for name, value in found._asdict().items():
            getattr(self, name).copy_(value)
        self.fitted.fill_(True)

    @property
    def hash(self) -> Hash:
        """Raises `Refused` before `fit`."""
        if not bool(self.fitted):
            raise Refused("these hash functions have not been fitted: call fit(x) with queries of real tokens first")
        return Hash(self.anchors, self.planes, self.mean)

    def codes(self, x: Tensor) -> Tensor:
        """Codes +1 and -1 ``[B, H, N, b]`` of tokens ``[B, H, N, D]``."""
        anchors, planes, mean = self.hash
        return hash_codes(x, anchors, planes, mean)


def hash_codes(x: Tensor, anchors: Tensor, planes: Tensor, mean: Tensor) -> Tensor:
    """Codes ``[B, H, N, b]`` of whole rows of tokens ``[B, H, N, D]``."""
    apart = _apart(_unit(x), anchors.to(wide(x)))
    return _sign(_soft(apart, apart.mean((-2, -1))[..., None, None], planes, mean))


def operations(tokens: int, width: int, value_width: int, bits: int = 16, anchors: int = 25) -> dict[str, int]:
    """Multiplications and additions of one head: hashing, codes times values and back (additions alone), the quotient."""
    hashing = tokens * anchors * (width + bits)
    codes = 2 * tokens * bits * value_width + tokens * bits + tokens * value_width
    return {"multiply": hashing + tokens * value_width, "add": hashing + codes}


def softmax_operations(tokens: int, width: int, value_width: int) -> dict[str, int]:
    """The same of softmax attention, exponentials left out."""
    products = tokens * tokens * (width + value_width)
    return {"multiply": products + tokens * value_width, "add": products + tokens * tokens}


def energy(counts: Mapping[str, int], picojoules: Mapping[str, float] = PICOJOULES) -> float:
    """Joules of these operations, with a table of picojoules for each. Data movement is not in it."""
    return 1e-12 * sum(counts[name] * picojoules[name] for name in counts)


def _unit(x: Tensor) -> Tensor:
    x = x.to(wide(x))
    return x * x.square().sum(-1, keepdim=True).clamp(min=1e-12).rsqrt()


def _apart(x: Tensor, anchors: Tensor) -> Tensor:
    """Squared distances ``[B, H, N, w]`` of tokens ``[B, H, N, D]`` and anchors ``[H, w, D]``."""
    cross = x @ anchors.mT
    lengths = x.square().sum(-1, keepdim=True) + anchors.square().sum(-1)[:, None]
    return (lengths - 2 * cross).clamp(min=0.0)


def _soft(apart: Tensor, sigma: Tensor, planes: Tensor, mean: Tensor) -> Tensor:
    """What the sign is taken of, ``[B, H, N, b]``."""
    kappa = (-apart / (2 * sigma.clamp(min=1e-12))).exp()
    return (kappa - mean.to(kappa)[:, None]) @ planes.to(kappa).mT


def _sign(x: Tensor) -> Tensor:
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def _codes(
    q: Tensor, k: Tensor, anchors: Tensor, planes: Tensor, mean: Tensor, causal: bool, padding: Tensor | None, tied: bool,
    straight_through: bool, s: Mapping[str, Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Codes of queries, of keys (0 at padding), each token's spread ``[B, H, M]`` (0 at padding), real tokens ``[B, M]``."""
    if tied:
        _same(q, k)
    real = k.new_ones(k.shape[0], k.shape[2], dtype=wide(k)) if padding is None else padding.to(wide(k))
    anchors = anchors.to(wide(k))
    apart = _apart(_unit(k), anchors)
    spread = apart.mean(-1) * real[:, None]
    if causal:
        count = s["count"][:, None] + real.cumsum(1)
        sigma = (s["spread"].unsqueeze(-1) + spread.cumsum(2)) / count.clamp(min=1.0)[:, None]
        sigma = sigma.unsqueeze(-1)
    else:
        sigma = (spread.sum(2) / real.sum(1).clamp(min=1.0)[:, None])[..., None, None]

    def hard(soft: Tensor) -> Tensor:
        sign = _sign(soft)
        if not straight_through:
            return sign
        inside = torch.where(soft.abs() < 1, soft, 0.0)
        return sign + (inside - inside.detach())

    c = hard(_soft(apart, sigma, planes, mean))
    a = c if tied else hard(_soft(_apart(_unit(q), anchors), sigma, planes, mean))
    return a, c * real[:, None, :, None], spread, real


def _same(q: Tensor, k: Tensor) -> None:
    """Tied queries and keys are equal; not asked where values cannot be read."""
    if q is k:
        return
    if q.shape != k.shape or (readable(q) and readable(k) and not torch.equal(q, k)):
        raise InvalidInput("ecoformer: queries and keys differ, but codes come from one projection; pass q as k, or set "
                           "tied=False to hash both with the same functions")  # fmt: skip


def _self(a: Tensor, c: Tensor) -> None:
    if a.shape[2] != c.shape[2]:
        raise InvalidInput(
            f"ecoformer: shift='reference' adds each query's own value: N={a.shape[2]} and M={c.shape[2]} must agree"
        )


def _divided(top: Tensor, total: Tensor) -> Tensor:
    return top / torch.where(total > 0, total, 1.0)


def _after(
    s: Mapping[str, Tensor], c: Tensor, values: Tensor, spread: Tensor, real: Tensor, before: State | None
) -> State:
    return after(
        "ecoformer", before, c.shape[2], kv=s["kv"] + c.mT @ values, codes=s["codes"] + c.sum(2),
        values=s["values"] + (values * real[:, None, :, None]).sum(2), spread=s["spread"] + spread.sum(2),
        count=s["count"] + real.sum(1),
    )  # fmt: skip


def _memory(q: Tensor, v: Tensor, planes: Tensor, state: State | None) -> dict[str, Tensor]:
    """The tensors of a state, zeros without one."""
    b, h, bits, e = q.shape[0], q.shape[1], planes.shape[1], v.shape[-1]
    shapes = {"kv": (b, h, bits, e), "codes": (b, h, bits), "values": (b, h, e), "spread": (b, h), "count": (b,)}
    if state is None:
        return {name: q.new_zeros(shape, dtype=wide(q)) for name, shape in shapes.items()}
    return state.of("ecoformer", **shapes).tensors


def _random(place: Place, *shape: int) -> Tensor:
    return torch.randn(place.heads, *shape, generator=torch.Generator().manual_seed(place.layer))


@final
@dataclass(frozen=True, kw_only=True)
class EcoFormer(Operator):
    """Linear attention on binary codes."""

    spec: ClassVar[OperatorSpec] = OperatorSpec(
        id="ecoformer",
        title="EcoFormer: hashed linear attention",
        paper="arXiv:2209.09004",
        source="code",
        summary="Queries and keys become codes of a few bits by hash functions fitted to the scores, so that attention is linear "
        "and its products are additions.",
        shown="Fitted hash functions find more of a query's nearest tokens than random ones at the same bits; on images a little "
        "less accurate than softmax with shared queries and keys.",
        honest="The largest weight is at most 2 b + 1 times the smallest, so maps are flat; the published rate hardly moves the "
        "hash functions from their random start.",
        trials=(
            {"tied": False, "straight_through": False},
            {"tied": False, "straight_through": False, "shift": "reference", "chunk_size": 5},
        ),
        causal="both",
        cross=False,
        gqa=False,
        scale=None,
        reference=reference,
        fast=fast,
        loop=loop,
        initial=initial,
        step=step,
        extras={
            "anchors": Extra(
                axes="hwd",
                sample=lambda *n, **kw: F.normalize(torch.randn(*n, **kw), dim=-1),
                role="parameter",
                doc="tokens of unit length that others are compared with",
                learnt=Learnt(
                    axes="hwd", start=lambda p: F.normalize(_random(p, 25, p.key_width), dim=-1), trained=False
                ),
            ),
            "planes": Extra(
                axes="hsw",
                sample=torch.randn,
                role="parameter",
                doc="A: one hyperplane per bit over the anchors' kernels",
                learnt=Learnt(axes="hsw", start=lambda p: _random(p, 16, 25), trained=False),
            ),
            "mean": Extra(
                axes="hw",
                sample=lambda *n, **kw: 0.5 + 0.1 * torch.rand(*n, **kw),
                role="parameter",
                doc="mu: the mean kernel of each anchor when the functions were fitted",
                learnt=Learnt(axes="hw", start=lambda p: torch.full((p.heads, 25), 0.6), trained=False),
            ),
        },
        wiring=Wiring(settings=lambda place: {"tied": False}),
    )
    tied: bool = param(True, "queries and keys are one projection; False hashes both with the same functions")
    shift: Literal["exact", "reference"] = param(
        "exact", "what makes weights positive: beta on every pair, or the released code's beta times the own value"
    )
    straight_through: bool = param(True, "pass gradients through the sign where its input is below 1 in size")
    chunk_size: int = param(64, "tokens per chunk of the causal form", low=1)
