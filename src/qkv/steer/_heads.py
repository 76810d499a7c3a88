"""Steering of listed heads: what several methods need to know about their `heads` parameter."""

from __future__ import annotations

from typing import Any

from qkv.core.heads import HeadSet
from qkv.core.site import Site


def listed(method: Any) -> None:
    """Turn a frozen method's `heads`, however given, into sorted ``"layer.head"`` names. Call it before validation."""
    object.__setattr__(method, "heads", HeadSet.of(method.heads).names())


def nonsense(heads: HeadSet, site: Site) -> str | None:
    """None, or why these heads mean nothing in the model of this site."""
    if not heads:
        return "no head is listed; give heads, for example the `top` of a probe's table"
    beyond = [f"{l}.{h}" for l, h in heads if l >= site.geometry.layers or h >= site.heads]
    if beyond:
        shape = f"{site.geometry.layers} layers of {site.heads} heads"
        return f"there is no head {', '.join(beyond[:3])}{' ...' if len(beyond) > 3 else ''} in {shape}"
    return None


def absent(heads: HeadSet, site: Site) -> str | None:
    """None, or that no listed head is at this site."""
    return None if site.layer is not None and heads.at(site.layer) else "none of the listed heads is in this layer"
