"""Configurations of published causal models, for vocabularies and sizes of one's own; weights are random until trained."""

from __future__ import annotations

from typing import Any

from qkv.models.language.causal import CausalConfig
from qkv.ops.based import based_layout


def based(layers: int = 27, width: int = 1024, heads: int = 16, *, window: int = 128, **more: Any) -> CausalConfig:
    """The Based hybrid (arXiv:2402.18668): gated short convolutions, and in each five layers one Taylor layer and one window.

    The defaults are the released model of 360M parameters but for its vocabulary (50k tokens, one matrix for both ends): 16
    channels a head in the Taylor layers, windows with rotated positions and no sinks, gated layers of twice the width. window:
    128 in the released model, 64 in the paper's text. more: fields of `CausalConfig`. Raises `InvalidParameter`.
    """
    named = {"conv": "base-conv", "linear": "based", "window": f"sliding-window:window={window},sinks=0"}
    operators = tuple(named[kind] for kind in based_layout(layers))
    return CausalConfig(
        **{"operators": operators, "width": width, "heads": heads, "inner": 2 * width, "conv": 0} | more
    )
