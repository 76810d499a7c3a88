r"""Exact softmax attention, in query chunks of plain torch: any mask, any device, with its lse.

    out_i = sum_j softmax_j(scale q_i . k_j) v_j,    lse_i = log sum_j exp(scale q_i . k_j)

A query without a key gives out 0 and lse -inf. Causal masks are aligned to the lower right: query i of N sees
keys up to i + M - N. On CUDA what needs no gradient, is in half precision and has no mask but one of keys takes fused kernels
(`on_kernels`); chunks of a score matrix cost several times as much there.

Axes: B batch, H query heads, G key/value heads (G divides H), N queries, M keys, D head width, E value width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.core.errors import InvalidInput
from qkv.core.kernel import kernel

CHUNK_ELEMENTS = 1 << 24  # logits held at once (64 MiB in float32)
FEWEST, WIDEST = 16, 256  # queries in a block and channels of a head that fused kernels are asked for
CHUNK_ELEMENTS_CPU = 1 << 20  # the same on a CPU, where a chunk should stay near the last cache


class Attended(NamedTuple):
    """out ``[B, H, N, E]``, lse ``[B, H, N]`` in float32 or wider, mass ``[B, H, M]`` or None."""

    out: Tensor
    lse: Tensor
    mass: Tensor | None


class LinearBias(NamedTuple):
    """Linear position biases (ALiBi): ``slopes[h] * (key - query)`` is added to the scaled logits.

    slopes ``[H]``; query ``[B|1, N]`` and key ``[B|1, 1|G, M]``: integer positions in the text (-1 = padding, masked by others).
    """

    slopes: Tensor
    query: Tensor
    key: Tensor

    def logits(self, groups: int, start: int, stop: int, seen: int, dtype: torch.dtype) -> Tensor:
        """``[B|1, G, R, stop - start, seen]``: what queries start .. stop add for the first `seen` keys."""
        gap = self.key[:, :, None, None, :seen] - self.query[:, None, None, start:stop, None]
        return self.slopes.to(gap.device, dtype).view(1, groups, -1, 1, 1) * gap


def check_qkv(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, who: str = "attention") -> None:
    """Raise `InvalidInput` unless q ``[B, H, N, D]``, k ``[B, G, M, D]``, v ``[B, G, M, E]`` fit."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise InvalidInput(f"{who}: {name} must be a torch tensor, not {type(x).__name__}")
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not (q.ndim == k.ndim == v.ndim == 4):
        raise InvalidInput(f"{who}: expected four axes [B, H, N, D]; got {shapes}")
    if 0 in (*q.shape, *k.shape, *v.shape):
        raise InvalidInput(f"{who}: an axis is empty: {shapes}")
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[-1] != k.shape[-1]:
        raise InvalidInput(f"{who}: expected q [B, H, N, D], k [B, G, M, D], v [B, G, M, E]; got {shapes}")
    if q.shape[1] % k.shape[1]:
        raise InvalidInput(
            f"{who}: {q.shape[1]} query heads do not divide over {k.shape[1]} key/value heads ({shapes})"
        )
    if causal and q.shape[2] > k.shape[2]:
        raise InvalidInput(
            f"{who}: causal attention needs N <= M, got N={q.shape[2]} > M={k.shape[2]}: "
            "the first queries would have no key"
        )
    if len({q.dtype, k.dtype, v.dtype}) > 1 or not q.is_floating_point():
        raise InvalidInput(f"{who}: q, k, v need one floating-point dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    if len({q.device, k.device, v.device}) > 1:
        raise InvalidInput(f"{who}: q, k, v lie on different devices: {q.device}, {k.device}, {v.device}")


def readable(*tensors: Tensor) -> bool:
    """Whether values may be looked at: not on the meta device, when compiling or capturing a CUDA graph."""
    if torch.compiler.is_compiling() or any(x.is_meta for x in tensors):
        return False
    return not (any(x.is_cuda for x in tensors) and torch.cuda.is_current_stream_capturing())


def check_finite(who: str, **tensors: Tensor) -> None:
    """Raise `InvalidInput` naming the first tensor that holds NaN or infinity; one device synchronisation.

    Does nothing where values cannot be read: see `readable`.
    """
    if not tensors or not readable(*tensors.values()):
        return
    fine = torch.stack([torch.isfinite(x).all() for x in tensors.values()])
    if not bool(fine.all()):
        name = next(n for n, ok in zip(tensors, fine.tolist(), strict=True) if not ok)
        raise InvalidInput(f"{who}: {name} holds NaN or infinite values")


def causal_mask(n: int, m: int, device: torch.device, start: int = 0, rows: int | None = None) -> Tensor:
    """Lower-right aligned causal mask ``[rows, M]`` of the queries start .. start + rows of N."""
    i = torch.arange(start, start + (n if rows is None else rows), device=device)[:, None]
    return torch.arange(m, device=device)[None, :] <= i + (m - n)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    mass: bool = False,
    mass_rows: Tensor | None = None,
    bias: LinearBias | None = None,
) -> Attended:
    """Exact attention with its lse, holding at most one chunk of the score matrix.

    q: ``[B, H, N, D]``; k: ``[B, G, M, D]``; v: ``[B, G, M, E]``. mask: bool, broadcastable to ``[B, H, N,
    M]`` or to ``[B, G, N, M]``, True = may attend; combined with `causal`. scale: default D^-0.5. mass: also
    return, per key, the attention it drew in all (sum over queries); mass_rows ``[B, N]`` bool restricts that
    sum to some queries. bias: see `LinearBias`; no kernel takes it. Softmax runs in float32 (float64 for float64
    inputs). Raises `InvalidInput`.
    """
    check_qkv(q, k, v, causal=causal)
    b, h, n, d = q.shape
    g, m = k.shape[1:3]
    r = h // g
    scale = float(d**-0.5 if scale is None else scale)
    if bias is None and on_kernels(q, k, v, mask):
        return _fused(q, k, v, mask, causal, scale, mass, mass_rows)
    wide = torch.promote_types(q.dtype, torch.float32)
    if mask is not None:
        mask = _grouped(mask, b, h, g, n, m)
    qg = q.reshape(b, g, r, n, d)
    kt = k.mT
    rows = max(1, min(n, (CHUNK_ELEMENTS if q.is_cuda else CHUNK_ELEMENTS_CPU) // max(1, b * h * m)))
    drawn = q.new_zeros((b, h, m), dtype=wide) if mass else None
    outs, lses = [], []
    for start in range(0, n, rows):
        stop = min(n, start + rows)
        seen = stop + (m - n) if causal else m  # keys past the last query of the chunk are not touched
        part = (qg[:, :, :, start:stop] * scale).reshape(b, g, -1, d)  # a group's heads are rows: keys are not repeated
        logits = (part @ kt[..., :seen]).to(wide).reshape(b, g, r, stop - start, seen)
        if bias is not None:
            logits = logits + bias.logits(g, start, stop, seen, wide)
        if causal:
            logits = _hide_later(logits, stop - start)
        if mask is not None:
            allowed = mask if mask.shape[-2] == 1 else mask[..., start:stop, :]
            logits = logits.masked_fill(~(allowed if allowed.shape[-1] == 1 else allowed[..., :seen]), -torch.inf)
        lse = logits.logsumexp(-1)  # [B, G, R, C]
        shift = torch.where(torch.isfinite(lse), lse, 0.0).unsqueeze(-1)
        # In place where no gradient needs the logits: the chunk is then read and written once.
        probs = (logits - shift).exp() if logits.requires_grad else logits.sub_(shift).exp_()
        outs.append((probs.to(v.dtype).reshape(b, g, -1, seen) @ v[:, :, :seen]).reshape(b, h, stop - start, -1))
        lses.append(lse.reshape(b, h, -1))
        if drawn is not None:
            p = probs if mass_rows is None else probs * mass_rows[:, None, None, start:stop, None]
            part = p.sum(-2).reshape(b, h, seen)
            drawn = drawn + F.pad(part, (0, m - seen)) if part.requires_grad else _added(drawn, part)
    return Attended(torch.cat(outs, 2), torch.cat(lses, 2), drawn)


def on_kernels(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> bool:
    """Whether `attend` takes fused kernels: blocks of queries in half precision on CUDA, no gradient, at most a key mask."""
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16) or q.shape[2] < FEWEST:
        return False
    if max(q.shape[3], v.shape[3]) > WIDEST or torch.compiler.is_compiling():
        return False
    if mask is not None and (mask.ndim < 4 or mask.shape[2] != 1):
        return False
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)))


def _fused(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, mass: bool, rows: Tensor | None
) -> Attended:
    """`attend` by kernels: torch's flash kernel where it gives the same, else our own."""
    b, h, m = q.shape[0], q.shape[1], k.shape[2]
    if mask is not None:
        mask = _key_mask(mask, b, h, k.shape[1], m)
    if mask is None and q.shape[3] == v.shape[3] and _flash(q, k, v):
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        out, lse = flash(q, k, v, 0.0, causal and m > 1, False, scale=scale)[:2]  # causal: aligned to the lower right
    else:
        out, lse = kernel("flash:flash_attention")(q, k, v, mask=mask, causal=causal, scale=scale)
    if not mass:
        return Attended(out, lse, None)
    rows = None if rows is None else rows.expand(b, -1)
    what = {"mask": mask, "causal": causal, "scale": scale, "rows": rows}
    return Attended(out, lse, kernel("flash:column_masses")(q, k, lse, **what))


def _key_mask(mask: Tensor, b: int, h: int, g: int, m: int) -> Tensor:
    """A key mask ``[1|B, heads, 1, M]``, checked as any other."""
    _grouped(mask, b, h, g, 1, m)
    return mask.expand(-1, -1, -1, m)


def _hide_later(logits: Tensor, rows: int) -> Tensor:
    """A chunk's logits ``[..., rows, seen]`` without the keys after each query: only the last square needs a mask."""
    later = torch.ones(rows, rows, dtype=torch.bool, device=logits.device).triu_(1)
    if not logits.requires_grad:
        logits[..., -rows:].masked_fill_(later, -torch.inf)
        return logits
    return torch.cat((logits[..., :-rows], logits[..., -rows:].masked_fill(later, -torch.inf)), -1)


def _added(total: Tensor, part: Tensor) -> Tensor:
    total[..., : part.shape[-1]] += part
    return total


def _grouped(mask: Tensor, b: int, h: int, g: int, n: int, m: int) -> Tensor:
    """A mask broadcastable to ``[B, G, R, N, M]`` from one for query heads, key heads or all heads."""
    if mask.dtype != torch.bool:
        raise InvalidInput(f"attention: mask must be bool (True = may attend), got {mask.dtype}")
    while mask.ndim < 4:
        mask = mask.unsqueeze(0)
    ok = all(s in (1, t) for s, t in zip((mask.shape[0], *mask.shape[2:]), (b, n, m), strict=True))
    if not ok or mask.shape[1] not in (1, g, h):
        raise InvalidInput(
            f"attention: mask {tuple(mask.shape)} does not broadcast to {(b, h, n, m)} or {(b, g, n, m)}"
        )
    if mask.shape[1] == h and h != g:
        return mask.reshape(mask.shape[0], g, h // g, *mask.shape[2:])
    return mask.unsqueeze(2)


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    bias: LinearBias | None = None,
) -> Tensor:
    """Exact attention by torch's fused kernels where their semantics are ours; same arguments as `attend`.

    One query per row packs the heads of a group instead of repeating keys and values. Rows without a key
    give 0. With a bias it is `attend`, which knows no dropout (`InvalidInput`).
    """
    if bias is not None:
        if dropout:
            raise InvalidInput(
                f"attention: dropout={dropout} and linear position biases were given; set the model's attention dropout to 0"
            )
        return attend(q, k, v, mask=mask, causal=causal, scale=scale, bias=bias).out
    b, h, n, d = q.shape
    g, m = k.shape[1:3]
    if mask is not None and mask.ndim < 4:
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    if causal and mask is not None and not dropout and on_kernels(q, k, v, mask):
        return attend(q, k, v, mask=mask, causal=True, scale=scale).out  # padding and order, without a mask of N x M
    width = v.shape[-1]
    if width < d and not q.is_cuda:  # torch's fused CPU kernel wants one width: zeros do not change the other columns
        v = F.pad(v, (0, d - width))
    if causal and 1 < n < m and mask is None and not dropout and _flash(q, k, v):
        from torch.nn.attention.bias import causal_lower_right  # loads much that a CPU never needs

        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=causal_lower_right(n, m), scale=scale, enable_gqa=h != g
        )
    if causal and n > 1 and (m != n or mask is not None):
        c = causal_mask(n, m, q.device)
        mask, causal = (c[None, None] if mask is None else mask & c), False
    causal = causal and n > 1
    if n == 1 and h != g:
        if mask is not None and mask.shape[1] == h:
            mask = mask.reshape(mask.shape[0], g, h // g, m)
        out = F.scaled_dot_product_attention(
            q.reshape(b, g, h // g, d), k, v, attn_mask=mask, scale=scale, dropout_p=dropout
        )
        out = out.reshape(b, h, 1, -1)
        empty = None if mask is None else ~mask.any(-1, keepdim=True)
        if empty is not None:
            empty = (
                empty.reshape(-1, h, 1, 1)
                if empty.shape[-2] != 1
                else empty.repeat_interleave(h // empty.shape[1] if empty.shape[1] > 1 else 1, 1)
            )
    else:
        if mask is not None and mask.shape[1] == g and g not in (1, h):
            mask = mask.repeat_interleave(h // g, 1)
        gqa = h != g and q.is_cuda and mask is None and k.shape[-1] == v.shape[-1]
        if h != g and not gqa:
            k, v = k.repeat_interleave(h // g, 1), v.repeat_interleave(h // g, 1)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=scale, dropout_p=dropout, enable_gqa=gqa
        )
        empty = None if mask is None else ~mask.any(-1, keepdim=True)
    out = out[..., :width]
    return out if empty is None else out.masked_fill(empty, 0.0)


def _flash(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether torch's flash kernel serves these: it takes a lower-right causal mask without writing it out."""
    if not q.is_cuda or torch.compiler.is_compiling():
        return False
    facts = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, True, q.shape[1] != k.shape[1])
    return torch.backends.cuda.can_use_flash_attention(facts)
