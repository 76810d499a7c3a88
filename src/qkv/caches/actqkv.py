r"""ActQKV: a window of the prompt fetches past blocks with one query, made of the tokens that stand out from it.

    x_i     = query of token i of the window before rotation, all heads side by side;  mu, sigma = mean and std per channel
    delta_i = mean over channels of ((x_i - mu) / (sigma + 1e-6))^2                    (how far it stands out)
    probe_h = sum_i softmax(delta / tau)_i q_i,h
    score_j = sum over heads <probe_h, mean of the keys of block j before rotation>

The prompt comes in windows; each reads the first `sinks` tokens, the `local` ones before it, itself, and the `budget` /
`block_size` blocks of highest score, the same for all heads. Keys stay where they stand. A step asks with its own query, and how
many blocks a layer l reads follows how concentrated its scores are: p = softmax(scale score / heads) over the candidates,

    rho_l = 1 + sum p ln p / ln(#blocks),    n_l in proportion to 1 - rho_l: a diffuse layer reads more, one that knows fewer

so that all layers together read no more than L `budget` / `block_size` blocks. Only the abstract was known: every formula here is
a completion in its spirit. `density_budget` shares out a total among layers that are all known. Within a step the layers run in
order: each takes its part of what is left, by its rho of now and, for the layers still to come, theirs at the end of the prompt
(or the mean of those so far, where the prompt was read in full). So nothing is carried from step to step, and candidates of
speculation read what single tokens do. No layer reads more than twice the mean. ``probe``: "mean" is tau -> infinity, "last" the
window's last token. ``cutoff="uniform"``: every layer reads the mean.

Axes: B batch, H query heads, G key/value heads, N queries of a window, P blocks, C slots of a block, L layers, D head width.
Paper: arXiv:2502.13542.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from qkv.core.cache import CacheSpec, Geometry, require
from qkv.core.reader import FIRM, TOLD, Blocks, Reader, Reading, Selection
from qkv.core.spec import Limit, param

EPS = 1e-6
MOST = 2  # blocks of a layer, in means
NOTE = "actqkv"
PROMPT = f"{TOLD}{NOTE}.prompt"


def activation_bias(x: Tensor, real: Tensor | None = None) -> Tensor:
    """How far each token x ``[B, N, C]`` stands out from its window: ``[B, N]``. real: bool ``[B, N]``, padding False."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if real is None else real
    count = real.sum(1).clamp(min=1)[:, None, None]
    wide = wide.masked_fill(~real[..., None], 0)
    mean = wide.sum(1, keepdim=True) / count
    gap = (wide - mean).masked_fill(~real[..., None], 0)
    std = (gap.square().sum(1, keepdim=True) / count).sqrt()
    return (gap / (std + EPS)).square().mean(-1)


def probe_query(q: Tensor, bias: Tensor, tau: float, real: Tensor | None = None) -> Tensor:
    """``[B, H, D]``: queries ``[B, H, N, D]`` weighted by softmax(bias / tau), bias ``[B, N]``."""
    logits = bias / tau
    if real is not None:
        logits = logits.masked_fill(~real, -torch.inf)
    weight = logits.softmax(-1).nan_to_num()
    return (weight[:, None, None].to(q.dtype) @ q).squeeze(2)


def density(score: Tensor, candidate: Tensor) -> Tensor:
    """How concentrated scores ``[.., P]`` are over the candidates (bool): ``[..]``, 1 = one block has all; 0 of less than 2."""
    count = candidate.sum(-1)
    logp = score.masked_fill(~candidate, -torch.inf).log_softmax(-1)
    entropy = -(logp.exp() * logp.masked_fill(~candidate, 0)).nan_to_num().sum(-1)
    rho = 1 - entropy / count.clamp(min=2).log()
    return torch.where(count > 1, rho.clamp(0, 1), torch.zeros_like(rho))


def density_budget(rho: Tensor, total: int, most: int | None = None) -> Tensor:
    """Blocks ``[L]``, in all `total`: in proportion to 1 - rho, by largest remainders, each at least 1 and at most `most`."""
    layers = rho.shape[0]
    most = total if most is None else most
    require(layers <= total <= layers * most, f"actqkv: {total} blocks cannot give {layers} layers 1 to {most} each")
    weight = (1 - rho.to(torch.float64) + EPS).tolist()
    out, free, left = [0.0] * layers, set(range(layers)), float(total)
    while free:  # those beyond their bounds are fixed there, the others share the rest
        scale = left / sum(weight[i] for i in free)
        share = {i: weight[i] * scale for i in free}
        over = sum(max(0.0, x - most) for x in share.values())
        under = sum(max(0.0, 1 - x) for x in share.values())
        fixed = [i for i in free if (share[i] > most if over >= under else share[i] < 1)] if over or under else []
        if not fixed:
            for i in free:
                out[i] = share[i]
            break
        for i in fixed:
            out[i] = float(most if over >= under else 1)
            left -= out[i]
            free.discard(i)
    whole = [math.floor(x + 1e-9) for x in out]
    order = sorted(range(layers), key=lambda i: whole[i] - out[i])
    for i in order[: total - sum(whole)]:
        whole[i] += 1
    return torch.tensor(whole)


@final
@dataclass(frozen=True, kw_only=True)
class ActQKV(Reader):
    """Past blocks fetched by a window's outstanding tokens; the number per layer by its density."""

    spec: ClassVar[CacheSpec] = CacheSpec(
        id="actqkv",
        title="Activation-aware Probe-Query: Effective Key-Value Retrieval for Long-Context LLMs Inference",
        paper="arXiv:2502.13542",
        source="abstract",
        summary="Windows of a prompt fetch past blocks by a query of their outstanding tokens; layers share a budget by density.",
        shown="the needle's block is fetched more often by the activation probe than by the mean query, and never by chance",
        honest="no memory is saved; one probe serves a whole window, and blocks are means of keys",
        limits=(Limit("full", {"budget": 1 << 20}, "every block is read: exact attention"),),
        evicts=False,
        trials=({}, {"probe": "mean", "cutoff": "uniform"}, {"probe": "last"}),
        small={"block_size": 2, "window": 4, "sinks": 2, "local": 4, "budget": 4},
    )
    block_size: int = param(64, "tokens of a block", low=1)
    window: int = param(512, "tokens of a prompt that ask together; a multiple of block_size", low=1)
    sinks: int = param(128, "first tokens that are always read", low=0)
    local: int = param(512, "tokens before a window, or before a step, that are always read", low=1)
    budget: int = param(2048, "tokens fetched, on average over the layers; a multiple of block_size", low=1)
    probe: Literal["activation", "mean", "last"] = param("activation", "the query that fetches for a window")
    tau: float = param(1.0, "temperature of the activation probe (larger: nearer the mean query)", low=1e-6)
    cutoff: Literal["density", "uniform"] = param("density", "how steps share the budget among the layers")

    def validate(self) -> None:
        """Whole blocks, and tokens enough to stand out from one another."""
        for name in ("window", "budget"):
            value = getattr(self, name)
            require(
                value % self.block_size == 0,
                f"actqkv: {name}={value} must be a multiple of block_size={self.block_size}",
            )
        require(
            self.window >= 2 or self.probe != "activation",
            f"actqkv: window={self.window} has no tokens to stand out from; use at least 2, or probe='last'",
        )

    def fits(self, geometry: Geometry) -> str | None:
        """Queries and keys are compared before rotation."""
        if geometry.rope is None:
            return "actqkv compares queries and keys before rotation, and this site has no rotary embedding that qkv can read"
        if not geometry.rope.fixed:
            return f"actqkv undoes rotations, and this model's frequencies depend on the length ({geometry.rope.kind})"
        return None

    def prefill(self, geometry: Geometry) -> int:
        """Prompts come in windows."""
        return self.window

    def reads(self, tokens: Tensor) -> Tensor:
        """A window's blocks, the first and local ones, and at most twice the budget."""
        c = self.block_size
        blocks = -(-self.sinks // c) + -(-self.local // c) + 1 + self.window // c + MOST * self.budget // c
        return torch.full_like(tokens, blocks * c)

    def features(self, blocks: Blocks) -> dict[str, Tensor]:
        """``[B, G, P, D]``: mean of a block's keys before rotation."""
        rope = blocks.geometry.rope
        assert rope is not None
        return {"mean": rope.rotate(blocks.keys, -blocks.position.expand(-1, blocks.keys.shape[1], -1, -1)).mean(3)}

    def choose(self, view: Reading) -> Selection:
        """The blocks of a window, or of each single token."""
        rope, c = view.geometry.rope, self.block_size
        assert rope is not None
        (b, h), at = view.queries.shape[:2], view.position
        real = at >= 0
        q = rope.rotate(view.queries, -at.clamp(min=0)[:, None].expand(-1, h, -1))
        probe = self._probe(q, real).unsqueeze(2) if view.window else q
        score = view.dots(view.features["mean"], probe)
        score = score.to(torch.promote_types(score.dtype, torch.float32)).sum(1, keepdim=True)  # [B, 1, N or 1, P]
        last = (at.amax(1, keepdim=True) if view.window else at)[:, None, :, None]  # [B, 1, N or 1, 1]
        first = torch.where(real, at, view.count * c).amin(1)[:, None, None, None] if view.window else last
        block = torch.arange(view.count, device=at.device)
        near = torch.div((first - self.local).clamp(min=0), c, rounding_mode="floor")  # first local block
        candidate = (block >= -(-self.sinks // c)) & (block < near)
        many = torch.full_like(last, self.budget // c)
        if self.cutoff == "density" and view.board is not None:
            spread = (1 - density(score * view.scale / h, candidate.expand_as(score)) + EPS)[:, 0]  # [B, N or 1]
            if view.window:
                self._tell(view, spread[:, 0], (self.reads(last + 1) <= last)[:, 0, 0, 0])
            else:
                many = self._share(view, view.board, spread, candidate)
        held = ((block * c <= last) & ~candidate).sum(-1, keepdim=True)  # blocks that are read anyhow
        reads = torch.where(self.reads(last + 1) > last, last + 1, (held + many) * c)
        worth = score.masked_fill(~candidate & (block * c <= last), FIRM)
        worth = worth.expand(b, view.keys.shape[1], -1, -1)
        return dataclasses.replace(view, at=None, slot32=None, steady=False).best(worth, reads)

    def _probe(self, q: Tensor, real: Tensor) -> Tensor:
        """``[B, H, D]``, from queries before rotation ``[B, H, N, D]`` of a window."""
        if self.probe == "last":
            newest = (torch.arange(q.shape[2], device=q.device) * real).argmax(1)
            return q[torch.arange(q.shape[0], device=q.device), :, newest]
        bias = activation_bias(q.transpose(1, 2).flatten(2), real)
        bias = torch.zeros_like(bias) if self.probe == "mean" else bias
        return probe_query(q, bias, self.tau, real)

    def _tell(self, view: Reading, spread: Tensor, rows: Tensor) -> None:
        """The other layers learn how this one spreads ``[B]`` at the end of the prompt so far; rows: those that chose."""
        assert view.board is not None
        old = view.notes.get(PROMPT)
        old = torch.full_like(spread, torch.nan) if old is None or old.shape != spread.shape else old
        view.notes[PROMPT] = torch.where(rows, spread, old)
        view.board.setdefault(PROMPT, {})[view.geometry.layer] = view.notes[PROMPT]
        view.notes.pop("after", None)

    def _after(self, view: Reading, board: dict[str, Any], mean: Tensor) -> Tensor:
        """What the layers still to come weigh in all ``[B, 1]``; mean ``[B, N]`` of the layers so far, where none is known."""
        g, notes = view.geometry, view.notes
        if "after" not in notes:
            known = [x for i, x in board.get(PROMPT, {}).items() if i > g.layer]
            fits = len(known) == g.layers - 1 - g.layer and all(x.shape == mean.shape[:1] for x in known)
            none = torch.zeros_like(mean[:, 0])
            notes["after"] = sum(known, none) if fits else torch.full_like(none, torch.nan)
        known = notes["after"][:, None]
        return torch.where(known.isnan(), mean * (g.layers - 1 - g.layer), known)

    def _share(self, view: Reading, board: dict[str, Any], spread: Tensor, candidate: Tensor) -> Tensor:
        """Blocks that this layer reads in this step, int64 ``[B, 1, N, 1]``, of spread ``[B, N]`` now."""
        mean, g = self.budget // self.block_size, view.geometry
        now = board.get(NOTE)
        if now is None or g.layer <= now["layer"] or now["left"].shape != spread.shape:
            every = torch.full_like(spread, mean * g.layers)
            now = {"layer": -1, "count": 0, "sum": torch.zeros_like(spread), "left": every}
        total, count, later = now["sum"] + spread, now["count"] + 1, g.layers - 1 - g.layer
        part = now["left"] * spread / (spread + self._after(view, board, total / count))
        some = part.round().clamp(min=1, max=MOST * mean)
        some = torch.minimum(some, (now["left"] - later).clamp(min=1))
        some = torch.minimum(some, candidate.sum(-1)[:, 0].clamp(min=1).to(some.dtype))
        board[NOTE] = {"layer": g.layer, "count": count, "sum": total, "left": now["left"] - some}
        return some.to(torch.int64)[:, None, :, None]
