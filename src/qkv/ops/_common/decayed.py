r"""Linear attention whose memory decays: the core that many operators share.

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T,     o_t = scale S_t^T q_t
        = scale sum_{j <= t} [sum_d q_td k_jd exp(G_td - G_jd)] v_j,     G = cumulative sum of g (inclusive)

with an optional normaliser, z_t = exp(g_t) z_{t-1} + k_t and o_t <- S_t^T q_t / (z_t . q_t + eps). The decay
of a step acts on the old state only. g <= 0 is needed: then every exponent below is <= 0 and nothing
overflows, however strong the decay.

Forms of one map: `recurrent` (a loop over tokens), `quadratic` (the whole map), `chunked` (matmuls inside chunks, one
state carried between them; a decay per channel stays stable by halves: what the later half of a block reads from the
earlier one factors through the later half's first row, and only small diagonal blocks need the explicit sum over
channels), `triton` (the same in a kernel).

Axes: B batch, H heads, N tokens, C chunk, K sub-chunk, D key width, E value width.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.core.errors import InvalidInput, UnknownName
from qkv.core.kernel import kernel
from qkv.core.spec import near
from qkv.ops._common.sums import divided, in_chunks

Form = Literal["chunked", "recurrent", "quadratic", "triton"]
FORMS = ("chunked", "recurrent", "quadratic", "triton")
WIDEST = 256  # of keys and of values, in the kernel


class Decayed(NamedTuple):
    """out ``[B, H, N, E]`` in q's dtype; state S ``[B, H, D, E]`` and z ``[B, H, D]`` (or None), float32 or wider."""

    out: Tensor
    state: Tensor
    keys: Tensor | None


def decayed_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float = 1.0,
    normalise: bool = False,
    eps: float = 0.0,
    state: Tensor | None = None,
    keys: Tensor | None = None,
    padding: Tensor | None = None,
    form: Form = "chunked",
    chunk_size: int = 64,
    sub_chunk: int = 8,
) -> Decayed:
    """Causal linear attention with decay.

    q: ``[B, H, N, D]``; k: ``[B, G, N, D]``; v: ``[B, G, N, E]``. log_decay: None, ``[H]``, ``[B, H, N]`` or
    ``[B, H, N, D]``, natural logs <= 0. normalise: divide by ``z . q + eps`` (rows where that is 0 give 0;
    `scale` then cancels). state, keys: S and z to start from. padding: ``[B, N]`` bool, True = real; padded
    tokens leave the state as it is. chunk_size, sub_chunk: tokens; sub_chunk divides chunk_size; they shape the chunked
    form only. form: "triton" is the kernel (CUDA; bfloat16, float16 or float32; differentiable once), the others are torch,
    on any device. Sums run in float32 (float64 for float64 inputs). Raises `InvalidInput`, `UnknownName`; for "triton" also
    `Refused` and `MissingDependency`, with the reason.
    """
    if form not in FORMS:
        raise UnknownName(f"decayed linear attention has no form {form!r}{near(form, FORMS)}")
    if chunk_size < 1 or sub_chunk < 1 or chunk_size % sub_chunk:
        raise InvalidInput(f"chunk_size={chunk_size} must be a multiple of sub_chunk={sub_chunk}, both at least 1")
    if form == "triton":
        return _fused(q, k, v, log_decay, scale, normalise, eps, state, keys, padding)
    b, h, n, d = q.shape
    wide, dtype = torch.promote_types(q.dtype, torch.float32), q.dtype
    k, v = (x.repeat_interleave(h // x.shape[1], 1) if x.shape[1] != h else x for x in (k, v))
    q, k, v = q.to(wide) * scale, k.to(wide), v.to(wide)
    decay = _decay(log_decay, b, h, n, d).to(wide) if log_decay is not None else None
    if padding is not None:
        real = padding[:, None, :, None]
        k = k.masked_fill(~real, 0.0)
        decay = None if decay is None else decay.masked_fill(~real, 0.0)
    if normalise:
        v = F.pad(v, (0, 1), value=1.0)  # the last value column sums the weights: z is that column of S
    s = _start(state, keys, normalise, (b, h, d, v.shape[-1]), q)
    out, s = {"chunked": _chunked, "recurrent": _recurrent, "quadratic": _quadratic}[form](
        q, k, v, decay, s, chunk_size, sub_chunk
    )
    if not normalise:
        return Decayed(out.to(dtype), s, None)
    out = divided(out[..., :-1], out[..., -1:] + eps)
    return Decayed(out.to(dtype), s[..., :-1], s[..., -1])


def _fused(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, scale: float, normalise: bool, eps: float,
    state: Tensor | None, keys: Tensor | None, padding: Tensor | None,
) -> Decayed:  # fmt: skip
    """The Triton form; the normaliser is the same map of values that are all 1."""
    run = kernel("decayed:decayed")
    b, h, n, d = q.shape
    decay = _decay(log_decay, b, h, n, d) if log_decay is not None else None
    if padding is not None:
        real = padding[:, None, :, None]
        k = k.masked_fill(~real, 0.0)
        decay = None if decay is None else decay.masked_fill(~real, 0.0)
    if state is not None or keys is not None:
        _start(state, keys, normalise, (b, h, d, v.shape[-1] + normalise), q)
    out, s = run(q, k, v, decay, state, scale=scale)
    if not normalise:
        return Decayed(out, s, None)
    total, z = run(q, k, torch.ones_like(v[..., :1]), decay, None if keys is None else keys.unsqueeze(-1), scale=scale)
    return Decayed(divided(out, total + eps), s, z.squeeze(-1))


def one_token(*widest: Tensor) -> Literal["triton", "recurrent"]:
    """The form that decodes one token: the fused step on CUDA, torch elsewhere, in float64 and for heads too wide for it."""
    fused = all(x.is_cuda and x.dtype != torch.float64 and x.shape[-1] <= WIDEST for x in widest)
    return "triton" if fused else "recurrent"


def core_limit(q: Tensor, k: Tensor, v: Tensor, **parameters: Any) -> str | None:
    """Why the kernel does not take heads like these, None where it does: an `OperatorSpec.kernel_limit`."""
    return too_wide(q.shape[-1], v.shape[-1]) or ("has no float64" if q.dtype == torch.float64 else None)


def too_wide(d: int, e: int) -> str | None:
    """Why the kernel does not take keys of width d and values of width e, None where it does."""
    return f"takes keys and values of width up to {WIDEST}, here {d} and {e}" if max(d, e) > WIDEST else None


def _decay(log_decay: Tensor, b: int, h: int, n: int, d: int) -> Tensor:
    """As ``[B, H, N, 1]`` (one rate per head and token) or ``[B, H, N, D]``."""
    shape = tuple(log_decay.shape)
    if shape == (h,):
        return log_decay[None, :, None, None].expand(b, h, n, 1)
    if shape == (b, h, n):
        return log_decay.unsqueeze(-1)
    if shape == (b, h, n, d):
        return log_decay
    raise InvalidInput(f"log_decay has shape {shape}; expected {(h,)}, {(b, h, n)} or {(b, h, n, d)}")


def _start(state: Tensor | None, keys: Tensor | None, normalise: bool, shape: Any, like: Tensor) -> Tensor:
    """S (with z as its last column when normalising) at the start."""
    if state is None and keys is None:
        return like.new_zeros(shape)
    if state is None or (keys is None) == normalise:
        need = "both `state` and `keys`" if normalise else "`state` alone"
        raise InvalidInput(f"a start of {'' if normalise else 'un'}normalised linear attention is {need}")
    s = state if keys is None else torch.cat([state, keys.unsqueeze(-1)], -1)
    if tuple(s.shape) != tuple(shape):
        raise InvalidInput(f"the state at the start has shape {tuple(s.shape)}, expected {tuple(shape)}")
    return s.to(like.dtype)


def _recurrent(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, s: Tensor, chunk_size: int, sub_chunk: int
) -> tuple[Tensor, Tensor]:
    """One token after the other."""
    outs = []
    for t in range(q.shape[2]):
        if decay is not None:
            s = s * decay[:, :, t].exp().unsqueeze(-1)  # [B, H, D, E]
        s = s + k[:, :, t].unsqueeze(-1) * v[:, :, t].unsqueeze(-2)
        outs.append((q[:, :, t].unsqueeze(-2) @ s).squeeze(-2))
    return torch.stack(outs, 2), s


def _quadratic(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, s: Tensor, chunk_size: int, sub_chunk: int
) -> tuple[Tensor, Tensor]:
    """The whole map ``[B, H, N, N]``: one chunk, one block."""
    return _chunked(q, k, v, decay, s, q.shape[2], q.shape[2])


def _chunked(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, s: Tensor, chunk_size: int, sub_chunk: int
) -> tuple[Tensor, Tensor]:
    """Matmuls inside chunks, the state carried between them."""
    n = q.shape[2]
    if n <= sub_chunk:
        chunk_size = sub_chunk = n
    elif n < chunk_size:
        chunk_size = -(-n // sub_chunk) * sub_chunk
    q, k, v = (in_chunks(x, chunk_size) for x in (q, k, v))  # [B, H, chunks, C, .]
    if decay is None:
        out, after = _Within.apply(q, k, v, None), None
        q_in, k_out = q, k
    else:
        total = in_chunks(decay, chunk_size).cumsum(-2)  # G, starting anew in each chunk; [B, H, chunks, C, 1 | D]
        last = total[..., -1:, :]
        if total.shape[-1] == 1:
            out = _Within.apply(q, k, v, total)
        else:
            out = _map(q, k, total, sub_chunk) @ v
        after = last.mT.exp()  # what is left of the state after a chunk, [B, H, chunks, 1 | D, 1]
        q_in, k_out = q * total.exp(), k * (last - total).exp()
    before, s = _scan(k_out.mT @ v, after, s)
    out = out + q_in @ before
    return out.flatten(2, 3)[:, :, :n], s


def _scan(added: Tensor, after: Tensor | None, s: Tensor) -> tuple[Tensor, Tensor]:
    """States before each chunk ``[B, H, chunks, D, E]`` and after the last, from what the chunks add and leave."""
    before = []
    rates = [None] * added.shape[2] if after is None else after.unbind(2)
    for new, rate in zip(added.unbind(2), rates, strict=True):  # unbind: the gradients of all chunks are one stack
        before.append(s)
        s = new + s if rate is None else torch.addcmul(new, s, rate)
    return torch.stack(before, 2), s


class _Within(torch.autograd.Function):
    """What the tokens of a chunk read from one another, one decay per token: ``((q k^T) L) v``, L_ij = exp(G_i - G_j), j <= i.

    Keeps L and the map for the backward pass, and never makes the gradient of L: with dq and dk those of the product alone,
    dG = sum_d (q dq - k dk).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None) -> Tensor:
        """q, k ``[..., C, D]``, v ``[..., C, E]``, G ``[..., C, 1]`` or None (no decay) -> ``[..., C, E]``."""
        fade = None if g is None else _fade(g)
        weights = _faded(q @ k.mT, fade)
        ctx.save_for_backward(q, k, v, g, fade, weights)
        return weights @ v

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # type: ignore[override]
        """Gradients of q, k, v, G; made of torch operations, so it can be differentiated again.

        Autocast rounds the map and the output on the way in, and mostly is over on the way back: here all is as wide as q.
        """
        q, k, v, g, fade, weights = ctx.saved_tensors
        grad, v, weights = (x.to(q.dtype) for x in (grad, v, weights))
        if torch.is_grad_enabled():  # to be differentiated again: what was kept has lost its history
            fade = None if g is None else _fade(g)
            weights = _faded(q @ k.mT, fade)
        inner, dv = _faded(grad @ v.mT, fade), weights.mT @ grad
        if g is None:
            return inner @ k, inner.mT @ q, dv, None
        own, inner = inner.diagonal(dim1=-2, dim2=-1).unsqueeze(-1), inner.tril(-1)
        dq, dk = inner @ k, inner.mT @ q  # without a token's own share, which cancels in dG
        return dq + own * k, dk + own * q, dv, (q * dq - k * dk).sum(-1, keepdim=True)


def _fade(g: Tensor) -> Tensor:
    """L ``[..., C, C]``: exponentials on and below the diagonal, 0 above it, where exponents are held at 0."""
    return (g - g.mT).clamp(max=0.0).exp().tril()


def _faded(scores: Tensor, fade: Tensor | None) -> Tensor:
    return scores.tril() if fade is None else scores * fade


def _map(q: Tensor, k: Tensor, total: Tensor, size: int) -> Tensor:
    """sum_d q_id k_jd exp(G_id - G_jd) for j <= i; q, k, G ``[..., C, D]`` -> ``[..., C, C]``.

    In halves: the later half reads the earlier one through its own first row, so that both exponents are <= 0 and the block is
    one matmul; each half is split again, until blocks of at most `size` tokens are summed channel by channel.
    """
    c = q.shape[-2]
    if c <= size:
        return _Diagonal.apply(q, k, total)
    if c % 2:  # one empty token more
        q, k = (F.pad(x, (0, 0, 0, 1)) for x in (q, k))
        return _map(q, k, torch.cat([total, total[..., -1:, :]], -2), size)[..., :c, :c]
    q, k, total = (x.unflatten(-2, (2, c // 2)) for x in (q, k, total))
    own = _map(q, k, total, size)  # [..., 2, C / 2, C / 2]
    (_, q_late), (k_early, _), (early, late) = (x.unbind(-3) for x in (q, k, total))
    first = late[..., :1, :]
    cross = (q_late * (late - first).exp()) @ (k_early * (first - early).exp()).mT
    top = F.pad(own[..., 0, :, :], (0, c // 2))
    return torch.cat([top, torch.cat([cross, own[..., 1, :, :]], -1)], -2)


class _Diagonal(torch.autograd.Function):
    """Diagonal blocks of the map with a decay per channel: an explicit sum, one diagonal after the other.

    A_ij = sum_d q_id k_jd exp(G_id - G_jd) for j <= i. With dA the gradient on it: dq_i = sum_j dA_ij k_j exp(G_i - G_j),
    dk_j = sum_i dA_ij q_i exp(G_i - G_j), dG = q dq - k dk. Holds ``[..., K, D]`` at a time, never ``[..., K, K, D]``.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, g: Tensor) -> Tensor:
        """q, k, g ``[..., K, D]`` -> ``[..., K, K]``."""
        ctx.save_for_backward(q, k, g)
        size = q.shape[-2]
        out = q.new_zeros(*q.shape[:-1], size)
        for age in range(size):
            fade = (g[..., age:, :] - g[..., : size - age, :]).exp()
            weights = (q[..., age:, :] * k[..., : size - age, :] * fade).sum(-1)
            out.diagonal(-age, -2, -1).copy_(weights)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """Gradients of q, k, g; made of torch operations, so it can be differentiated again."""
        q, k, g = ctx.saved_tensors
        size = q.shape[-2]
        dq, dk = torch.zeros_like(q), torch.zeros_like(k)
        for age in range(1, size):
            fade = (g[..., age:, :] - g[..., : size - age, :]).exp()
            fade = fade * grad.diagonal(-age, -2, -1).unsqueeze(-1)
            dq[..., age:, :] += fade * k[..., : size - age, :]
            dk[..., : size - age, :] += fade * q[..., age:, :]
        own = grad.diagonal(0, -2, -1).unsqueeze(-1)  # a token's own share cancels in dG
        return dq + own * k, dk + own * q, q * dq - k * dk
