"""Exact attention with its log-sum-exp by torch's fused kernels where no gradient is asked for, in plain torch elsewhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.core.attend import attend
from qkv.ops._common.states import per_head, wide

ALIGN = 16  # keys of a biased fused call on a GPU are filled up to a multiple of this


def attend_lse(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = False, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Out ``[B, H, N, E]`` and lse ``[B, H, N]`` (float32 or wider).

    q ``[B, H, N, D]``, k ``[B, G, M, D]``, v ``[B, G, M, E]``; causal needs N = M. bias ``[B, H, M]``: added to the logits of
    every query (-inf: the key is not there; every row keeps one), only without `causal` and with G = H.
    """
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if wanted or q.is_meta or torch.compiler.is_compiling() or k.shape[-1] != v.shape[-1]:
        return _plain(q, k, v, scale, causal, bias)
    k, v = per_head(q, k, v)
    if q.is_cuda and bias is None and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, is_causal=causal, scale=scale)
        return out, lse
    if q.is_cuda and q.dtype != torch.float64 and q.shape[-1] % 8 == 0:
        return _efficient(q, k, v, scale, causal, bias)
    if q.device.type == "cpu":
        mask = None if bias is None else bias.to(q.dtype).unsqueeze(2).expand(-1, -1, q.shape[2], -1)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, is_causal=causal, attn_mask=mask, scale=scale
        )
    return _plain(q, k, v, scale, causal, bias)


def _efficient(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The memory-efficient kernel, which takes a bias; its lse comes in rows of 32."""
    n, more = q.shape[2], -k.shape[2] % ALIGN
    if bias is not None:
        k, v = (F.pad(x, (0, 0, 0, more)) for x in (k, v))
        bias = F.pad(bias.to(q.dtype), (0, more), value=-torch.inf).unsqueeze(2).expand(-1, -1, n, -1)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, bias, True, is_causal=causal, scale=scale
    )
    return out, lse[..., :n]


def _plain(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    if bias is None:
        return attend(q, k, v, causal=causal, scale=scale)[:2]
    logits = ((q * scale) @ k.mT).to(wide(q)) + bias.to(wide(q)).unsqueeze(2)
    lse = logits.logsumexp(-1)
    return (logits - lse.unsqueeze(-1)).exp().to(v.dtype) @ v, lse
