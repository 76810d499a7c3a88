"""Kernels are reached by name and imported on first use: nothing of qkv needs Triton until a kernel is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qkv.core.errors import MissingDependency


@cache
def kernel(name: str) -> Callable[..., Any]:
    """The function behind ``"decode:decode_attention"``: module and function of `qkv.kernels`.

    Raises `MissingDependency` with the reason when Triton is not installed; nothing falls back in silence.
    """
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(f"qkv.kernels.{module}"), function)
    except ImportError as error:
        raise MissingDependency(
            f"the kernel {name!r} needs Triton ({error}): install 'triton' on Linux, or run on the CPU, which needs none"
        ) from error


def served(x: Tensor) -> bool:
    """Whether kernels serve what reads `x`: on CUDA, in float32 or less, which is what they compute in, and no gradient asked."""
    if not x.is_cuda or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    return not (x.requires_grad and torch.is_grad_enabled())
