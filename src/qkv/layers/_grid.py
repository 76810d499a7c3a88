"""Layers on a grid of tokens: what a model in stages (`qkv.models.vision.pyramid`) is built from."""

from __future__ import annotations

from qkv.core.layer import Layer


class GridLayer(Layer):
    """Base of whole blocks of a vision model: their modules take tokens ``[B, N, width]`` and the grid (h, w) they fill."""
