r"""Induction and echo heads: who looks back to an earlier copy of the current token, or to what followed it?

    echo_h      = mean_i sum over 0 < j < i with token_j     = token_i of A_h[i, j]
    induction_h = mean_i sum over 0 < j < i with token_{j-1} = token_i of A_h[i, j]

on a block of random tokens that is repeated; i runs over all repeats but the first. Position 0 draws attention of its own (a
sink) and counts for no head. Maps are formed in rows, in float32, from the queries and keys that the model itself computed.

A model with linear position biases (ALiBi) is not run: there a head's scope follows from its weights and slope (`_scope`).

Axes: L layers, H query heads, G key/value heads, T tokens, C query rows at a time. Paper: RazorAttention, arXiv:2407.15891. The
paper's 2500 tokens times 4 are shortened to what the model was trained for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from qkv.caches._retrieval import retrieval_set
from qkv.core.errors import InvalidInput, Refused
from qkv.core.heads import HeadSet, HeadTable, draw_table, figure, save_figure, write_json
from qkv.core.probe import Probe, ProbeSpec, Progress, Scene
from qkv.core.site import Site
from qkv.core.spec import param
from qkv.hosts import observe, sites
from qkv.hosts.transformers_inline import weights_of
from qkv.probes._scope import Scopes, scopes

ELEMENTS = 1 << 24  # of a map held at once


def reference(maps: Tensor, ids: Sequence[int], block: int) -> tuple[Tensor, Tensor]:
    """The definition: maps ``[H, T, T]`` -> (induction ``[H]``, echo ``[H]``)."""
    total = len(ids)
    induction, echo = (torch.zeros(maps.shape[0], dtype=maps.dtype) for _ in range(2))
    for i in range(block, total):
        for j in range(1, i):
            if ids[j] == ids[i]:
                echo += maps[:, i, j] / (total - block)
            if ids[j - 1] == ids[i]:
                induction += maps[:, i, j] / (total - block)
    return induction, echo


def scores(q: Tensor, k: Tensor, ids: Tensor, block: int, scale: float) -> Tensor:
    """``[2, H]`` induction and echo scores of one layer: q ``[B, H, T, D]``, k ``[B, G, T, D]``, ids ``[B, T]``; mean over B."""
    b, h, t, d = q.shape
    g = k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    keys, place = k.to(wide).unsqueeze(2).mT, torch.arange(t, device=q.device)
    before = torch.cat((ids.new_full((b, 1), -1), ids[:, :-1]), 1)  # [B, T] the token before each place
    out = torch.zeros(2, h, dtype=torch.float64, device=q.device)
    rows = max(1, ELEMENTS // (b * h * t))
    for start in range(block, t, rows):
        at = slice(start, min(t, start + rows))
        logits = (q[:, :, at].to(wide).reshape(b, g, h // g, -1, d) * scale) @ keys  # [B, G, R, C, T]
        past = place <= place[at, None]
        maps = logits.masked_fill(~past, -torch.inf).softmax(-1).reshape(b, h, -1, t)
        earlier = (place < place[at, None]) & (place > 0)
        for number, token in enumerate((before, ids)):
            match = (token[:, None, :] == ids[:, at, None]) & earlier  # [B, C, T]
            out[number] += (maps * match[:, None]).sum((0, 2, 3), dtype=torch.float64)
    return out / (b * (t - block))


@final
@dataclass(frozen=True)
class InductionEcho:
    """Two tables per query head; what they select is in `retrieval_heads`."""

    induction: HeadTable
    echo: HeadTable

    @property
    def table(self) -> HeadTable:
        """The induction scores."""
        return self.induction

    def retrieval_heads(self, induction: float = 0.14, echo: float = 0.01) -> HeadSet:
        """KV heads in the top shares by induction and by echo score, each scored by the best query head of its group."""
        return retrieval_set(self.induction, self.echo, (induction, echo))

    def to_dict(self) -> dict[str, Any]:
        """Plain data; the cache method razorattention reads it from a file."""
        return {
            "format": 1,
            "type": "induction_echo",
            "induction": self.induction.to_dict(),
            "echo": self.echo.to_dict(),
        }

    def save(self, path: str | Path) -> Path:
        """Write it as JSON, atomically. Raises `StorageError`."""
        return write_json(path, self.to_dict())

    def plot(self, path: str | Path) -> Path:
        """Draw both tables to a file. Raises `MissingDependency`, `StorageError`."""
        l, h = self.induction.values.shape
        fig = figure()(figsize=(max(5.0, 1.8 + 0.24 * l), max(4.0, 2.2 + 0.44 * h)), layout="constrained")
        for axes, table in zip(fig.subplots(2), (self.induction, self.echo), strict=True):
            draw_table(fig, axes, table)
        return save_figure(fig, path)


# -- what the laws run ----------------------------------------------------------------------------------------------


def _scene(says: str, back: int, at: tuple[int, int], shape: tuple[int, int]) -> Scene:
    """A block of 6 tokens, four times; one head looks `back` tokens back, the others are even."""
    block, repeats = 6, 4
    tokens = list(range(5, 5 + block)) * repeats
    total = len(tokens)
    even = torch.ones(total, total, dtype=torch.float64).tril()
    maps = (even / even.sum(-1, keepdim=True)).expand(*shape, total, total).clone()
    maps[at] = 0.0
    for q in range(total):
        maps[(*at, q, max(0, q - back))] = 1.0
    want = torch.stack([reference(layer, tokens, block)[0] for layer in maps])
    return Scene(says, maps, tokens, {"ids": torch.tensor([tokens]), "block": block}, want)


def _planted(layer: int, head: int, layers: int, heads: int) -> Scene:
    return _scene("looks at what followed the last copy", 5, (layer, head), (layers, heads))


def _known() -> list[Scene]:
    at, shape = (1, 2), (2, 4)
    cases = (("what followed the copy before the last", 11), ("an echo", 6), ("the previous token", 1), ("itself", 0))
    return [_scene(says, back, at, shape) for says, back in cases]


@final
@dataclass(frozen=True, kw_only=True)
class InductionEchoHeads(Probe):
    """Find the heads that look back to copies, on random tokens."""

    spec: ClassVar[ProbeSpec] = ProbeSpec(
        id="induction-echo",
        title="RazorAttention: induction and echo heads",
        paper="arXiv:2407.15891",
        source="paper",
        summary="How much attention goes to earlier copies of the current token, and to what followed them, on random tokens.",
        shown="few heads score near 1; caches that keep only these whole keep the pass key",
        honest="random tokens show literal matching only; a head that retrieves by meaning scores low",
        planted=_planted,
        known=_known,
        example=lambda model: {"block": 7},
        trials=({"repeats": 3},),
    )
    block: int = param(
        0, "random tokens of a block; 0: 2500, or as many as the model's length allows; `inspect`: 500", low=0
    )
    repeats: int = param(4, "how often the block stands", low=2)
    samples: int = param(1, "texts, one at a time", low=1)
    seed: int = param(0, "of the tokens", low=0)
    eps: float = param(
        1e-3, "attention that a key outside a head's scope stays below, at models with ALiBi", low=1e-12, high=1.0
    )

    def run(
        self,
        model: Any,
        tokenizer: Any = None,
        text: str | None = None,
        *,
        ids: Tensor | None = None,
        block: int | None = None,
        progress: Progress | None = None,
    ) -> InductionEcho | Scopes:
        """Scores per query head, NaN where a layer has no causal attention. ids ``[B, T]``: texts of one's own, whose first
        `block` tokens are repeated; without them tokens are drawn. tokenizer and text are not needed. At a model with linear
        position biases (ALiBi): scopes in tokens, from the weights alone.

        Raises `InvalidInput`, `Refused`.
        """
        watched = [s for s in sites(model) if s.causal and s.role == "self" and s.reason is None]
        if not watched or getattr(model.config, "is_encoder_decoder", False):
            raise Refused(
                f"induction-echo needs a decoder-only model with causal attention; {type(model).__name__} has none"
            )
        if any(s.geometry.slopes is not None for s in watched):
            return self._scopes(model, watched, progress)
        size = self._size(model) if block is None else block
        if ids is None:
            ids = self.random_ids(model, size)
        if ids.ndim != 2 or not 1 <= size < ids.shape[1]:
            raise InvalidInput(
                f"induction-echo: ids [B, T] with more than block={size} tokens are needed, got {tuple(ids.shape)}"
            )
        ids = ids.to(next(model.parameters()).device)
        layers = max(watched[0].geometry.layers, *(s.layer + 1 for s in watched))  # type: ignore[operator]
        values = torch.full((2, layers, max(s.heads for s in watched)), torch.nan, dtype=torch.float64)
        for site in watched:
            values[:, site.layer, : site.heads] = 0.0  # type: ignore[index]
        row = ids[:1]

        def see(site: Site, call: Any) -> None:
            found = scores(call.q, call.k, row, size, call.scale)
            values[:, site.layer, : site.heads] += found.cpu() / ids.shape[0]  # type: ignore[index]

        with observe(model, see, where=[s.name for s in watched]), torch.no_grad():
            for i in range(ids.shape[0]):
                row = ids[i : i + 1]
                model(row, use_cache=False)
                if progress is not None:
                    progress(i + 1, ids.shape[0], "texts")
        notes = {"method": self.to_dict(), "block": size, "tokens": ids.shape[1]}
        group = watched[0].heads // watched[0].kv_heads
        names = ("induction score", "echo score")
        return InductionEcho(*(HeadTable(x, n, "head", group, (), notes) for x, n in zip(values, names, strict=True)))

    def _scopes(self, model: Any, watched: Sequence[Site], progress: Progress | None) -> Scopes:
        """The scope of every head of a model with ALiBi."""
        layers = max(watched[0].geometry.layers, *(s.layer + 1 for s in watched))  # type: ignore[operator]
        values = torch.full((layers, max(s.heads for s in watched)), torch.nan, dtype=torch.float64)
        for i, site in enumerate(watched):
            assert site.geometry.slopes is not None
            values[site.layer, : site.heads] = scopes(weights_of(model, site.name), site.geometry.slopes, self.eps)
            if progress is not None:
                progress(i + 1, len(watched), "layers")
        group = watched[0].heads // watched[0].kv_heads
        return Scopes(HeadTable(values, "scope in tokens", "head", group, (), {"method": self.to_dict()}))

    def look(self, model: Any, tokenizer: Any, text: str | None, progress: Progress | None) -> InductionEcho | Scopes:
        """See `Probe.inspect`; `text` is not used: the tokens are random."""
        if any(s.geometry.slopes is not None for s in sites(model)):
            return self.run(model, progress=progress)
        return self.run(model, block=self.block or min(500, self._size(model)), progress=progress)

    def random_ids(self, model: Any, block: int) -> Tensor:
        """``[samples, block * repeats]``."""
        vocabulary = model.config.get_text_config().vocab_size
        draw = torch.Generator().manual_seed(self.seed)
        return torch.randint(vocabulary, (self.samples, block), generator=draw).repeat(1, self.repeats)

    def _size(self, model: Any) -> int:
        """The configured block, or the paper's as far as the model's trained length allows."""
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        most = limit // self.repeats if isinstance(limit, int) else 2500
        if self.block > most:
            raise InvalidInput(
                f"induction-echo: {self.repeats} x {self.block} tokens exceed the model's {limit} positions; configure block at "
                f"most {most}"
            )
        return self.block or min(2500, most - 1)
