r"""Omni-Shift: each pixel mixed with its neighbours at three scales, trained as four branches and run as one convolution.

    y = a0 x + a1 dw1(x) + a2 dw3(x) + a3 dw5(x)        dw: depthwise convolutions k x k without bias, a learnt

`OmniShiftModule.reparameterize` merges the branches for inference, `reparameterized` those of a whole model.

Yang et al. 2024, Restore-RWKV: Efficient and Effective Medical Image Restoration with RWKV, arXiv:2407.11087.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

from qkv.core.layer import Layer, LayerSpec
from qkv.layers._omni_shift import OmniShiftModule, reference, reparameterized

__all__ = ["OmniShift", "OmniShiftModule", "reference", "reparameterized"]


@final
@dataclass(frozen=True, kw_only=True)
class OmniShift(Layer):
    """Local mixing at three scales in one kernel; no settings."""

    spec: ClassVar[LayerSpec] = LayerSpec(
        id="omni-shift",
        title="Omni-Shift (Restore-RWKV)",
        paper="arXiv:2407.11087",
        source="code",
        summary="A learnt mixture of the identity and depthwise convolutions 1, 3 and 5 wide, which is one 5 x 5 convolution.",
        shown="as the local part of a denoiser, see `restore-rwkv`",
        honest="at inference it is a plain depthwise convolution: what it adds lies in how it trains",
    )

    def build(self, width: int, **factory: Any) -> OmniShiftModule:
        """See `Layer.build`; its module takes tokens ``[B, N, width]`` and their grid."""
        return OmniShiftModule(width, **factory)
