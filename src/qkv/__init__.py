"""qkv: published attention systems, made real.

One interface to build an attention mechanism, swap it into a pretrained model, shrink its KV cache, convert and distil
its weights, look inside its heads, steer it; one benchmark that measures what each choice costs and what it saves.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> where it lives. Resolved on first use, so that `import qkv` stays light (no transformers, no triton).
_LAZY = {
    "method": "qkv.core.registry",
    "methods": "qkv.core.registry",
    "attention": "qkv.core.operator",
    "attend": "qkv.core.attend",
    "merge": "qkv.core.merge",
    "BlockPlan": "qkv.core.plan",
    "sites": "qkv.hosts",
    "plan": "qkv.hosts",
    "apply": "qkv.hosts",
    "applied": "qkv.hosts",
    "revert": "qkv.hosts",
    "report": "qkv.hosts",
    "save": "qkv.hosts",
    "load": "qkv.loading",
    "verify": "qkv.testing",
}

__all__ = [*_LAZY, "__version__"]

if TYPE_CHECKING:
    from qkv.core.attend import attend
    from qkv.core.merge import merge
    from qkv.core.operator import attention
    from qkv.core.plan import BlockPlan
    from qkv.core.registry import method, methods
    from qkv.hosts import applied, apply, plan, report, revert, save, sites
    from qkv.loading import load
    from qkv.testing import verify


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'qkv' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
