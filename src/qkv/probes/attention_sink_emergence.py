r"""Attention sinks: positions that draw attention from every query, found by a threshold on the column means of each map.

    alpha_{s,l,h}(k) = (1 / (T - k)) sum_{q = k}^{T - 1} A_qk           (text s, layer l, head h, diagonal included)
    rate(k) = mean over (s, l, h) of [alpha(k) > eps],   T = 64, eps = 0.3

Axes: S texts, L layers, H query heads, G key/value heads, T tokens, D head width.
Paper: Gu et al., arXiv:2410.10781 (ICLR 2025), with its code. This file is the metric and the activations that go with it;
the paper's training runs (when sinks emerge) are not part of it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast, final

import torch
from torch import Tensor

from qkv.core.columns import column_means
from qkv.core.errors import InvalidInput, Refused
from qkv.core.heads import HeadTable
from qkv.core.probe import Probe, ProbeSpec, Progress, Scene
from qkv.core.site import Site
from qkv.core.spec import param
from qkv.hosts import observe, sites
from qkv.probes._sink_report import MassiveActivations, SinkReport

FEWEST = 32
"""Texts below which a rate is noise; `inspect` asks for as many."""


def reference(maps: Tensor, *, causal: bool = True) -> Tensor:
    """Importance of every position: maps ``[..., T, T]`` -> ``[..., T]``, column means over the queries that see the key."""
    t = maps.shape[-1]
    total = maps.sum(-2)
    return total / (t - torch.arange(t, device=maps.device, dtype=maps.dtype)) if causal else total / t


def row_normalised(maps: Tensor) -> Tensor:
    """Maps divided by their row sums, for attention that does not sum to 1 (sigmoid); rows of zeros stay."""
    total = maps.sum(-1, keepdim=True)
    return maps / torch.where(total == 0, 1.0, total)


def edge(tokens: int, threshold: float, causal: bool = True) -> int:
    """First position where a token that attends only to itself, alpha = 1 / (T - k), would pass the threshold."""
    if not causal:
        return tokens
    return next((k for k in range(tokens) if 1 / (tokens - k) > threshold), tokens)


def importance(call: Any) -> Tensor:
    """``[S, H, T]`` importance from an observed attention, by blocks. Raises `Refused` when it was not softmax attention."""
    got = column_means(call.q, call.k, call.v, mask=call.mask, causal=call.causal, scale=call.scale)
    slack = 1e-3 if call.out.dtype in (torch.float32, torch.float64) else 3e-2
    ran = call.out.to(got.out.dtype)
    if float((got.out - ran).abs().max()) > slack * max(1e-6, float(ran.abs().max())):
        raise Refused(
            "what runs at this site is not plain softmax attention, so its map cannot be told from q and k; revert the applied "
            "method, or give the maps themselves to `from_maps`"
        )
    return got.mean


def cosines(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Two ``[S, H]``: mean cosine of queries t >= 1 with key 0, and with keys 1..t; q ``[S, H, T, D]``, k ``[S, G, T, D]``."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    unit = [x / x.norm(dim=-1, keepdim=True).clamp(min=1e-30) for x in (q, k)]
    cosine = (unit[0] @ unit[1].mT)[:, :, 1:]  # [S, H, T - 1, T]
    seen = torch.ones(cosine.shape[-2:], dtype=torch.bool, device=q.device).tril(1)
    seen[:, 0] = False
    return cosine[..., 0].mean(-1), cosine.masked_fill(~seen, 0.0).sum((-1, -2)) / seen.sum()


def first_to_rest(x: Tensor) -> Tensor:
    """Norm of token 0 over the mean norm of the others: ``[..., T, D]`` -> ``[...]``."""
    norm = x.norm(dim=-1)
    return norm[..., 0] / norm[..., 1:].mean(-1).clamp(min=1e-30)


def cut(ids: Any, mask: Tensor | None, tokens: int, pad: int | None = None, bos: int | None = None) -> Tensor:
    """The first `tokens` real tokens of every text, ``[S, T]``.

    ids: ``[S, N]`` with mask ``[S, N]`` (nonzero = real, padding on either side), or a list of token lists. pad, bos: ids that
    tell unmasked padding. Raises `InvalidInput` for texts that are too short, and for padding without a mask.
    """
    if isinstance(ids, Tensor):
        if ids.ndim != 2 or ids.is_floating_point() or 0 in ids.shape:
            raise InvalidInput(
                f"attention-sink-emergence: ids are whole numbers [texts, tokens]; got {tuple(ids.shape)}"
            )
        if mask is not None and mask.shape != ids.shape:
            raise InvalidInput(f"attention-sink-emergence: mask {tuple(mask.shape)} and ids {tuple(ids.shape)} differ")
        if mask is None and pad is not None and pad != bos and bool((ids[:, :2] == pad).all(-1).any()):
            raise InvalidInput(
                f"attention-sink-emergence: a text begins with padding (token {pad}) and no mask was given; pass mask="
            )
        rows = [r if mask is None else r[mask[i].bool()] for i, r in enumerate(ids)]
        rows = [r.tolist() for r in rows]
    else:
        if mask is not None:
            raise InvalidInput("attention-sink-emergence: a list of token lists needs no mask")
        rows = [list(r) for r in ids]
    if not rows:
        raise InvalidInput("attention-sink-emergence: there are no texts")
    short = [(i, len(row)) for i, row in enumerate(rows) if len(row) < tokens]
    if short:
        raise InvalidInput(
            f"attention-sink-emergence: text {short[0][0]} has {short[0][1]} tokens, fewer than tokens={tokens} ({len(short)} "
            "such texts); leave them out or measure over fewer tokens"
        )
    return torch.tensor([row[:tokens] for row in rows])


def _row(site: Site) -> int:
    return cast(int, site.layer) if site.layer is not None else site.index


def _shape(watched: Sequence[Site]) -> tuple[int, int]:
    """Layers and most heads of any layer."""
    return max(_row(s) for s in watched) + 1, max(s.heads for s in watched)


def _scene(layer: int, head: int, layers: int, heads: int) -> Scene:
    return _first("all on the first token", 1.0, 1.0, (layer, head), (layers, heads))


def _first(says: str, share: float, want: float, at: tuple[int, int], shape: tuple[int, int]) -> Scene:
    """One head gives `share` of each row to the first token and the rest to itself; the others attend evenly."""
    t = 64
    even = torch.ones(t, t, dtype=torch.float64).tril()
    maps = (even / even.sum(-1, keepdim=True)).expand(*shape, t, t).clone()
    planted = (1 - share) * torch.eye(t, dtype=torch.float64)
    planted[:, 0] += share
    maps[at] = planted
    rates = torch.zeros(shape, dtype=torch.float64)
    rates[at] = want
    tokens = [5 + i % 11 for i in range(t)]
    return Scene(says, maps, tokens, {"ids": [tokens, tokens]}, rates)


def _known() -> list[Scene]:
    at, shape = (1, 2), (2, 4)
    return [
        _scene(*at, *shape),
        _first("half on the first token", 0.5, 1.0, at, shape),
        _first("a fifth on the first token", 0.2, 0.0, at, shape),
        _first("each token on itself", 0.0, 0.0, at, shape),
    ]


def _example(model: Any) -> dict[str, Any]:
    return {"ids": torch.randint(3, 60, (2, 70), generator=torch.Generator().manual_seed(0))}


@final
@dataclass(frozen=True, kw_only=True)
class AttentionSinks(Probe):
    """Measure how strongly, and in which heads, the first token serves as an attention sink."""

    spec: ClassVar[ProbeSpec] = ProbeSpec(
        id="attention-sink-emergence",
        title="When Attention Sink Emerges in Language Models: An Empirical View",
        paper="arXiv:2410.10781",
        source="code",
        summary="Share of texts, layers and heads whose mean attention to a position exceeds a threshold.",
        shown="tens of percent at the first token and about 0 % later, on natural and on random text",
        honest="one threshold on 64 tokens; the last few positions pass it by looking at themselves and are flagged",
        planted=_scene,
        known=_known,
        example=_example,
        trials=({}, {"threshold": 0.25, "batch": 1}),
    )
    tokens: int = param(64, "T: tokens of each text that are read", low=2)
    threshold: float = param(0.3, "eps: importance that a sink must exceed", low=0.0, high=1.0)
    causal: bool = param(
        True, "measure causal attention; False: bidirectional models, whose means run over all T queries"
    )
    samples: int = param(100, "texts that `inspect` reads at most", low=1)
    batch: int = param(10, "texts read at a time", low=1)

    def run(
        self,
        model: Any,
        ids: Any,
        mask: Tensor | None = None,
        *,
        activations: bool = False,
        progress: Progress | None = None,
    ) -> SinkReport:
        """Rates over texts: ids ``[S, N]`` (mask ``[S, N]``) or a list of token lists; the first T real tokens of each count.

        activations: measure `massive_activations` as well. Raises `InvalidInput` (texts too short, padding without a mask) and
        `Refused` (bidirectional attention without causal=False, a window or position limit below T, attention that is
        not softmax).
        """
        texts, watched = self._texts(model, ids, mask), self._watched(model)
        layers, heads = _shape(watched)
        found: dict[int, list[Tensor]] = {s.index: [] for s in watched}

        def see(site: Site, call: Any) -> None:
            found[site.index].append(self.importance(call).double().cpu())

        with observe(model, see, where=[s.name for s in watched]):
            for _ in self._forwards(model, texts, progress):
                pass
        alphas = torch.full((len(texts), layers, heads, self.tokens), torch.nan, dtype=torch.float64)
        for site in watched:
            alphas[:, _row(site), : site.heads] = torch.cat(found[site.index])
        report = self._report(alphas, alphas, watched[0].heads // watched[0].kv_heads)
        return replace(report, activations=self.massive_activations(model, ids, mask)) if activations else report

    def from_maps(self, maps: Tensor) -> SinkReport:
        """The same from given maps ``[S, L, H, T, T]``: for attention that is not softmax. T must be the configured one."""
        if maps.ndim != 5 or maps.shape[-2:] != (self.tokens, self.tokens) or 0 in maps.shape:
            raise InvalidInput(
                f"attention-sink-emergence: maps are [texts, layers, heads, {self.tokens}, {self.tokens}]; got "
                f"{tuple(maps.shape)}"
            )
        maps = maps.double().cpu()
        plain, normal = (reference(x, causal=self.causal) for x in (maps, row_normalised(maps)))
        return self._report(plain, normal, 1)

    @torch.no_grad()
    def massive_activations(self, model: Any, ids: Any, mask: Tensor | None = None) -> MassiveActivations:
        """What is special about the first token: norms and angles, see `MassiveActivations`. Arguments as `run`."""
        texts, watched = self._texts(model, ids, mask), self._watched(model)
        layers, heads = _shape(watched)
        group = watched[0].heads // watched[0].kv_heads
        names = {"value": "value norm of the first token over the others", "key": "key norm of the first token over the others",
                 "first": "cosine of queries with the first key", "other": "cosine of queries with later keys"}  # fmt: skip
        sums = {n: torch.full((layers, heads), torch.nan, dtype=torch.float64) for n in names}

        def add(name: str, site: Site, per_text: Tensor) -> None:
            row = sums[name][_row(site)]
            row[: per_text.shape[1]] = row[: per_text.shape[1]].nan_to_num() + per_text.double().sum(0).cpu()

        def see(site: Site, call: Any) -> None:
            q, k, v = (x.float() if x.dtype.itemsize < 4 else x for x in (call.q, call.k, call.v))
            first, other = cosines(q, k)
            for name, x in (("value", first_to_rest(v)), ("key", first_to_rest(k)), ("first", first), ("other", other)):
                add(name, site, x)

        hidden: list[Tensor] = []
        with observe(model, see, where=[s.name for s in watched]):
            for out in self._forwards(model, texts, None, hidden=True):
                states = getattr(out, "hidden_states", None)
                if states is not None:
                    hidden.append(torch.stack([first_to_rest(x.float()).double() for x in states]).cpu())
        kv = max(s.kv_heads for s in watched)
        tables = {
            n: HeadTable(
                x[:, :kv] if n in ("value", "key") else x, says, "kv_head" if n in ("value", "key") else "head", group
            )
            for n, says in names.items()
            for x in [sums[n] / len(texts)]
        }
        return MassiveActivations(torch.cat(hidden, 1).mean(1) if hidden else None, **tables)

    def look(self, model: Any, tokenizer: Any, text: str | None, progress: Progress | None) -> SinkReport:
        """See `Probe.inspect`: texts cut from `text`, each from the start of a paragraph; None: random tokens.

        Raises `InvalidInput` when the text gives fewer than `FEWEST` texts.
        """
        ids = self.random_texts(model) if text is None else self.split(tokenizer, text)
        return self.run(model, ids, activations=True, progress=progress)

    def random_texts(self, model: Any, seed: int = 0) -> Tensor:
        """``[samples, T]`` tokens drawn evenly from the vocabulary: sinks do not need meaning."""
        vocab = model.config.get_text_config().vocab_size
        return torch.randint(vocab, (self.samples, self.tokens), generator=torch.Generator().manual_seed(seed))

    def split(self, tokenizer: Any, text: str) -> list[list[int]]:
        """At most `samples` texts of T tokens, as the tokenizer begins a text, from a long one; none overlap."""
        for pattern in (r"\n\s*\n", r"\s"):  # from paragraph to paragraph, else one right behind the other
            texts, at = [], 0
            while len(texts) < self.samples and at < len(text):
                ids = list(tokenizer(text[at : at + 16 * self.tokens], verbose=False)["input_ids"])[: self.tokens]
                if len(ids) < self.tokens:
                    break
                texts.append(ids)
                at += len(tokenizer.decode(ids, skip_special_tokens=True))
                following = re.compile(pattern).search(text, at)
                at = following.end() if following else len(text)
            if len(texts) >= min(FEWEST, self.samples):
                return texts
        raise InvalidInput(
            f"attention-sink-emergence: the text gives {len(texts)} texts of {self.tokens} tokens; give one of at least "
            f"{FEWEST * self.tokens} tokens"
        )

    def importance(self, call: Any) -> Tensor:
        """See `importance`."""
        return importance(call)

    # -- steps ----------------------------------------------------------------------------------------------------

    def _texts(self, model: Any, ids: Any, mask: Tensor | None) -> Tensor:
        config = model.config.get_text_config()
        pads = getattr(config, "pad_token_id", None), getattr(config, "bos_token_id", None)
        return cut(ids, mask, self.tokens, *pads).to(next(model.parameters()).device)

    def _watched(self, model: Any) -> list[Site]:
        """The self-attention sites; every one must fit."""
        if getattr(model.config, "is_encoder_decoder", False):
            raise Refused("attention-sink-emergence measures one stack; a model with encoder and decoder has two")
        if "input_ids" not in inspect.signature(model.forward).parameters:
            raise Refused(f"attention-sink-emergence reads tokens; {type(model).__name__} takes none")
        found = [s for s in sites(model) if s.role != "cross"]
        usable = [s for s in found if s.reason is None]
        if not usable:
            raise Refused(
                f"attention-sink-emergence: {found[0].name}: {found[0].reason}" if found else "no self-attention"
            )
        wrong = [s for s in usable if s.causal != self.causal]
        if wrong:
            kind = "bidirectional" if self.causal else "causal"
            raise Refused(f"attention-sink-emergence: {wrong[0].name} is {kind}; configure causal={not self.causal}")
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        windows = [s.window for s in usable if s.window is not None] + ([limit] if isinstance(limit, int) else [])
        if windows and min(windows) < self.tokens:
            raise Refused(
                f"attention-sink-emergence: tokens={self.tokens} exceeds the model's window of {min(windows)}: later queries "
                "cannot see the first token; configure fewer tokens"
            )
        return usable

    @torch.no_grad()
    def _forwards(self, model: Any, texts: Tensor, progress: Progress | None, hidden: bool = False) -> Iterator[Any]:
        known = inspect.signature(model.forward).parameters
        more: dict[str, Any] = {"output_hidden_states": True} if hidden else {}
        more |= {"use_cache": False} if "use_cache" in known else {}
        more |= {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        for start in range(0, len(texts), self.batch):
            yield model(texts[start : start + self.batch], **more)
            if progress is not None:
                progress(min(start + self.batch, len(texts)), len(texts), "texts")

    def _report(self, alphas: Tensor, normal: Tensor, group: int) -> SinkReport:
        """alphas, normal: ``[S, L, H, T]``, as they are and from row-normalised maps; NaN where there is no head."""
        there = ~alphas.isnan()
        rate, normalised = (
            ((x > self.threshold) & there).sum((0, 1, 2)) / there.sum((0, 1, 2)) for x in (alphas, normal)
        )
        notes = {"method": self.to_dict(), "samples": len(alphas)}
        at_zero = alphas[..., 0]
        passed = torch.where(at_zero.isnan(), torch.nan, (at_zero > self.threshold).double())
        return SinkReport(
            tokens=self.tokens,
            threshold=self.threshold,
            samples=len(alphas),
            alpha=alphas.nanmean((0, 1, 2)),
            rate=rate.double(),
            normalised_rate=normalised.double(),
            edge=edge(self.tokens, self.threshold, self.causal),
            head_rate=HeadTable(passed.mean(0), "sink rate", "head", group, (), notes),
            head_alpha=HeadTable(at_zero.mean(0), "mean importance of the first token", "head", group, (), notes),
            notes=notes,
        )
