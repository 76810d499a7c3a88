r"""Attention calibration (ACT): later sink columns of chosen heads lose attention to the other visible tokens.

    c_k = mean of A_qk over the queries that see k,     K = {k : c_k > threshold} without its first element
    A'_qk = beta A_qk  for k in K,     A'_qk = A_qk (1 + f_q / a_q)  for other visible k
    f_q = (1 - beta) sum_{k in K} A_qk,     a_q = 1 - sum_{k in K} A_qk

The factor is beta + (1 - beta) / a_q, so without any map  O' = beta O + (1 - beta) R, where R is the attention over the columns
outside K: one pass for the column means, then only the few sink columns.

Axes: B batch, H query heads, G key/value heads, N queries, M keys, W sink columns, D head width, E value width.
Paper: Yu et al., arXiv:2406.15765 (ICML 2024), with its code. Differences: every sample has its own sinks (the code edits
sample 0 of a batch); padding is in neither sums nor counts; `decode` and `min_rows` are ours, off by default. As in the code
only square maps are edited: tokens that continue a cache (decoding, later chunks of a prompt) are not, unless decode=True, which
scores a block of several such tokens as a whole. Its sums are a state of the generation (`qkv.core.steering.Running`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from qkv.core.attend import attend, causal_mask, sdpa
from qkv.core.cache import Compute
from qkv.core.columns import column_means
from qkv.core.errors import InvalidInput, InvalidParameter, Refused, StateError
from qkv.core.heads import HeadSet, HeadTable
from qkv.core.probe import Progress
from qkv.core.site import Site
from qkv.core.spec import Limit, param
from qkv.core.state import State
from qkv.core.steering import Running, Steering, SteeringSpec
from qkv.hosts import applied, sites
from qkv.steer._heads import absent, listed, nonsense

SAFE = 0.01
"""Where sinks take more than 1 - SAFE of a row, the rest is attended to afresh instead of by subtraction."""


def reference(
    maps: Tensor,
    *,
    visible: Tensor | None = None,
    beta: float,
    threshold: float,
    min_rows: int = 1,
    keep_first: bool = True,
) -> Tensor:
    """The definition, on whole maps ``[..., N, N]``. visible: what each query may see, same shape; default: causal."""
    n = maps.shape[-1]
    if visible is None:
        visible = torch.ones(n, n, dtype=torch.bool, device=maps.device).tril()
    visible = visible.expand(maps.shape)
    real = visible.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)  # a token that sees itself is no padding
    count = (visible & real).sum(-2)
    score = (maps * real).sum(-2) / count.clamp(min=1)
    sink = (score > threshold) & (count >= min_rows)
    if keep_first:
        sink &= sink.cumsum(-1) > 1
    sink = sink.unsqueeze(-2)
    freed = (1 - beta) * (maps * sink).sum(-1, keepdim=True)
    rest = (maps * ~sink).sum(-1, keepdim=True)
    edited = torch.where(sink, beta * maps, maps * (1 + freed / torch.where(rest > 0, rest, 1.0)))
    return torch.where(rest > 0, edited, maps)


def pick_sinks(mass: Tensor, count: Tensor, *, threshold: float, min_rows: int, keep_first: bool) -> Tensor:
    """``[B, H, M]`` bool: the columns to calibrate, from sums and counts."""
    sink = (mass / count.clamp(min=1) > threshold) & (count >= max(1, min_rows))
    return sink & (sink.cumsum(-1) > 1) if keep_first else sink


def calibrate(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sink: Tensor, *,
    mask: Tensor | None, causal: bool, scale: float, beta: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The edit without a map: q ``[B, H, N, D]``, k, v ``[B, H, M, .]``, out and lse of plain attention, sink ``[B, H, M]``.

    Returns the new out, and ``[B, H, N]`` bool where it differs from plain attention by definition.
    """
    n, m = q.shape[2], k.shape[2]
    width = int(sink.sum(-1).max())
    at = sink.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices[..., :width]  # [B, H, W]
    allowed = sink.gather(-1, at).unsqueeze(-2)  # [B, H, 1, W]
    if causal:
        allowed = allowed & causal_mask(n, m, q.device).T[at].mT
    if mask is not None:
        mask = mask.expand(q.shape[0], q.shape[1], mask.shape[2], m)
        allowed = allowed & mask.gather(-1, at.unsqueeze(-2).expand(-1, -1, mask.shape[2], -1))
    columns = [x.gather(2, at.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1])) for x in (k, v)]
    logits = (q * scale) @ columns[0].mT
    weight = (logits - torch.where(lse.isfinite(), lse, 0.0).unsqueeze(-1)).exp().masked_fill(~allowed, 0.0)
    taken = weight.sum(-1)  # [B, H, N]
    left = 1 - taken
    rest = (out - weight @ columns[1]) / left.clamp(min=SAFE).unsqueeze(-1)
    edited = taken > 0
    scarce = edited & (left < SAFE)
    if bool(scarce.any()):
        others = ~sink.unsqueeze(-2)
        anew = attend(q, k, v, mask=others if mask is None else mask & others, causal=causal, scale=scale)
        rest = torch.where(scarce.unsqueeze(-1), anew.out, rest)
        edited = edited & ~(scarce & ~anew.lse.isfinite())
    return beta * out + (1 - beta) * rest, edited


# -- the offline search ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Search:
    """What `search_heads` found.

    table: per head, the metric with only that head calibrated minus the base metric, on the search samples; NaN where it was
    not tried. heads: the heads above the margin. others: every other head of the edited layers. base: the base metric. method:
    calibration of these heads. held_out: the samples the search never saw; the only ones `test` uses.
    """

    table: HeadTable
    heads: HeadSet
    others: HeadSet
    base: float
    method: AttentionCalibration
    held_out: tuple[Any, ...] = field(repr=False)

    def test(self, model: Any, metric: Callable[[Any, Sequence[Any]], float], seed: int = 0) -> dict[str, float]:
        """The metric on the held-out samples.

        Keys: ``base``, ``act``, ``first_sink`` (the first sink calibrated too), ``random`` (as many of the other heads; absent
        when there are fewer). Raises
        `InvalidInput` when the search found no head.
        """
        if not self.heads:
            raise InvalidInput("the search found no head that helps, so there is nothing to test")
        settings = {"act": self.method, "first_sink": self.method.replace(keep_first=False)}
        if len(self.others) >= len(self.heads):
            settings["random"] = self.method.replace(heads=self.others.random(len(self.heads), seed))
        out = {"base": float(metric(model, self.held_out))}
        for name, method in settings.items():
            with applied(model, method):
                out[name] = float(metric(model, self.held_out))
        return out


def search_heads(
    model: Any,
    dataset: Sequence[Any],
    metric: Callable[[Any, Sequence[Any]], float],
    n: int = 900,
    *,
    method: AttentionCalibration | None = None,
    candidates: Any = None,
    margin: float = 0.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Search:
    """Try every head alone on `n` samples and keep those whose metric exceeds the base metric by more than `margin`.

    dataset: samples, more than `n`; they are shuffled with `seed`, and those beyond `n` are held out for `Search.test`. metric:
    ``metric(model, samples) -> float``, higher is better. method: settings of the calibration (its heads are replaced).
    candidates: heads to try; default every head of the layers it edits. Costs one metric per candidate. Raises `InvalidInput`
    for too few samples, and for a sample that would be in both splits.
    """
    method = AttentionCalibration() if method is None else method
    order = list(range(len(dataset)))
    random.Random(seed).shuffle(order)
    if n < 1 or len(order) <= n:
        raise InvalidInput(
            f"search_heads: {len(order)} samples cannot give n={n} for the search and others for the test; the two must be "
            "separate: give more samples or a smaller n"
        )
    found, held = ([dataset[i] for i in part] for part in (order[:n], order[n:]))
    twice = {_key(x) for x in found} & {_key(x) for x in held}
    if twice:
        raise InvalidInput(
            f"search_heads: {len(twice)} samples occur twice and would be in both splits, for example {min(twice)[:80]}"
        )
    stack = [s for s in sites(model) if s.role != "cross" and s.layer is not None and s.reason is None]
    tried = HeadSet(
        frozenset((s.layer, h) for s in stack if method.layer_reason(s) is None for h in range(s.heads))  # type: ignore[misc]
    )
    every = tried
    tried = tried if candidates is None else tried & HeadSet.of(candidates)
    if not tried:
        raise InvalidInput(f"search_heads: no candidate lies in the layers that {method} edits")
    values = torch.full((stack[0].geometry.layers, max(s.heads for s in stack)), torch.nan, dtype=torch.float64)
    base = float(metric(model, found))
    for done, head in enumerate(tried, 1):
        with applied(model, method.replace(heads=(head,))):
            values[head] = float(metric(model, found)) - base
        if progress is not None:
            progress(done, len(tried), f"head {head[0]}.{head[1]}")
    table = HeadTable(values, "gain by calibrating one head", notes={"base": base, "samples": n, "seed": seed})
    heads = HeadSet(frozenset(h for h in tried if float(values[h]) > margin))
    chosen = method.replace(heads=heads)
    assert isinstance(chosen, AttentionCalibration)
    return Search(table, heads, every - heads, base, chosen, tuple(held))


def _key(sample: Any) -> str:
    """A text that is equal for equal samples."""
    if isinstance(sample, Tensor):
        return f"{tuple(sample.shape)} {sample.tolist()}"
    try:
        return json.dumps(sample, sort_keys=True, default=_key)
    except (TypeError, ValueError):
        return repr(sample)


@final
@dataclass(frozen=True, kw_only=True)
class AttentionCalibration(Steering):
    """Lower the attention of chosen heads to every sink but the first."""

    spec: ClassVar[SteeringSpec] = SteeringSpec(
        id="act",
        title="Unveiling and Harnessing Hidden Attention Sinks: Attention Calibration Technique (ACT)",
        paper="arXiv:2406.15765",
        source="code",
        summary="In chosen heads, attention to sinks inside the text is cut to beta and given to the other visible tokens.",
        shown="calibrating the first sink as well raises perplexity far more than calibrating only the later ones",
        honest="the head list must be searched per model (one evaluation per head); gains on small models are small",
        limits=(
            Limit("full", {"beta": 1.0}, "beta = 1: the model itself"),
            Limit("full", {"threshold": 1.0}, "threshold >= 1: no column is a sink"),
        ),
        neutral={"beta": 1.0},
        trials=(
            {"heads": ("2.1", "2.4", "3.0")},
            {"heads": ("2.1", "2.2", "3.5"), "beta": 0.0, "threshold": 0.05, "decode": True},
            {"heads": ("2.0", "3.3"), "min_rows": 4, "threshold": 0.03, "keep_first": False},
        ),
    )
    heads: tuple[str, ...] = param((), 'heads to calibrate, "layer.head" counted from 0 (or pairs, or a HeadSet)')
    beta: float = param(0.4, "share of its attention that a sink keeps", low=0.0, high=1.0)
    threshold: float = param(0.1, "mean attention that a column must exceed to be a sink", low=0.0)
    layers: tuple[int, ...] = param((2, -1), "first layer, and layer to stop before (negative: from the end)")
    min_rows: int = param(1, "queries that must see a column before it can be a sink (8 spares the last tokens)", low=1)
    decode: bool = param(
        False, "edit tokens that continue a cache too, by running column sums (False: prefill only, as the paper)"
    )
    causal: bool = param(True, "for causal attention; False: for bidirectional models")
    keep_first: bool = param(True, "leave the first sink alone (False: the harmful control)")

    def __post_init__(self) -> None:
        listed(self)
        super().__post_init__()

    def validate(self) -> None:
        """Layers are a pair."""
        if len(self.layers) != 2:
            raise InvalidParameter(f"act: layers={self.layers!r} must be a pair (start, stop), as (2, -1)")

    def wrap(self, site: Site, compute: Compute) -> Compute:
        """See `Steering.wrap`. Raises `Refused` over anything but plain softmax attention."""
        return self.wrap_running(site, compute, Running())

    def wrap_running(self, site: Site, compute: Compute, running: Running) -> Compute:
        """See `Steering.wrap_running`: with ``decode=True`` column sums are kept from call to call."""
        heads = self.heads_at(site)
        if not heads or self.beta == 1.0 or self.threshold >= 1.0:
            return compute
        if compute is not sdpa:
            raise Refused(
                f"act at {site.name} edits the map of plain softmax attention, and something else computes there (a pattern, an "
                "operator or an earlier steering); apply act alone or before the other steering"
            )

        def run(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
            out = compute(q, k, v, mask=mask, causal=causal, scale=scale)
            if q.shape[2] != k.shape[2] and not self.decode:
                return out
            return self._edit(site, running, out, q, k, v, mask, causal, scale)

        return run

    def heads_at(self, site: Site) -> tuple[int, ...]:
        """The listed heads of the site's layer, where the layer is edited."""
        return () if self.layer_reason(site) else HeadSet.of(self.heads).at(site.layer)

    def layer_reason(self, site: Site) -> str | None:
        """None, or why the site's layer is left alone."""
        chosen = range(*slice(*self.layers).indices(site.geometry.layers))
        if site.layer is None or site.layer not in chosen:
            return f"layers {list(self.layers)} of {site.geometry.layers} leave it out"
        return None

    def fits(self, site: Site) -> str | None:
        """Self-attention of the configured direction, in an edited layer with a listed head."""
        if site.role == "cross":
            return "cross-attention has no square map"
        if site.causal != self.causal:
            return f"it is {'causal' if site.causal else 'bidirectional'}; configure causal={site.causal}"
        heads = HeadSet.of(self.heads)
        return nonsense(heads, site) or self.layer_reason(site) or absent(heads, site)

    # -- one call -------------------------------------------------------------------------------------------------

    def _edit(
        self, site: Site, running: Running, out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
        causal: bool, scale: float,
    ) -> Tensor:  # fmt: skip
        """`out` ``[B, H, N, E]`` with the listed heads calibrated."""
        b, h, n, _ = q.shape
        g, m = k.shape[1:3]
        index = torch.tensor(self.heads_at(site), device=q.device)
        wide = torch.promote_types(q.dtype, torch.float32)
        if mask is not None and mask.shape[1] > 1:
            mask = mask[:, index if mask.shape[1] == h else index // (h // g)]
        q, k, v = (
            x.index_select(1, i).to(wide) for x, i in ((q, index), (k, index // (h // g)), (v, index // (h // g)))
        )
        got = column_means(q, k, v, mask=mask, causal=causal, scale=scale)
        mass, count = got.mass, got.count
        if self.decode:
            mass, count = self._added(site, running, mass, count.expand(b, -1, -1), n)
        sink = pick_sinks(mass, count, threshold=self.threshold, min_rows=self.min_rows, keep_first=self.keep_first)
        if m == 1 or not bool(sink.any()):
            return out
        new, edited = calibrate(q, k, v, got.out, got.lse, sink, mask=mask, causal=causal, scale=scale, beta=self.beta)
        plain = out.index_select(1, index)
        return out.index_copy(1, index, torch.where(edited.unsqueeze(-1), new.to(out.dtype), plain))

    def _added(self, site: Site, running: Running, mass: Tensor, count: Tensor, new: int) -> tuple[Tensor, Tensor]:
        """Column sums ``[B, H', M]`` and counts ``[B, 1|H', M]`` of this call on top of the generation's, which are kept.

        Raises `StateError` when they are not those of the ``M - new`` keys that were there before (an evicting cache, a cache
        filled before act was applied or read from a folder, a call outside any generation).
        """
        old, before = mass.shape[-1] - new, running.states.get(self)
        if old:
            if before is None or before.seen != old or before["mass"].shape[0] != mass.shape[0]:
                raise StateError(
                    f"act at {site.name}: decode=True keeps column sums along a generation, and they do not cover the {old} "
                    f"tokens before this call ({before.seen if before else 0} are summed): a cache that evicts, was filled "
                    "before act was applied, or was read from a folder; start again from the prompt, or use decode=False"
                )
            pads = (torch.nn.functional.pad(before[name], (0, new)) for name in ("mass", "count"))
            mass, count = (x + y for x, y in zip((mass, count), pads, strict=True))
        running.states[self] = State(self.id, {"mass": mass.detach(), "count": count.detach()}, old + new)
        return mass, count
