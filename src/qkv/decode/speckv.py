r"""SpecKV, SpecPC, SpecKV-PC: a small draft looks ahead, so that what the answer will need is known before it is written.

SpecKV     the draft guesses y; the model reads [prompt, y]; per layer and KV head, with W = window + |y| + 1 last queries,
           a = pool(max over heads and rows of softmax(q K^T) without its last W columns), the budget - window best positions
           and the `window` tokens before the last stay; y and the last token are dropped, the last token is read again
SpecPC     the draft's own attention of its last `window` queries (row r weighted r / (window - 1)) says which prompt TOKENS
           stay: maximum over heads, rows and layers, pooled, the best with their neighbours, and the last window;
           the model reads these tokens as an ordinary prompt
SpecKV-PC  SpecPC with the guess, then SpecKV on what is left with the same guess

Paper: arXiv:2506.08373. Choices: odd kernels for SpecKV (its code's shared default of 64 is for SpecPC); kept positions
ascending; decoded tokens stand at their positions in the text (positions="compressed": behind what is kept, as the published code
has them); lookahead 0 reads nothing again and is SnapKV; a prompt within the budget is kept whole. Rows of a batch are
compressed and decoded one after the other, so they may differ in length.

Axes: B batch, N tokens of the prompt, H query heads, G key/value heads, W tail queries, V vocabulary.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

import qkv
from qkv.core.cache import budget_slots, require
from qkv.core.decoding import (
    GREEDY,
    Decoding,
    DecodingSpec,
    Generated,
    Progress,
    Sampling,
    check_prompt,
    end_tokens,
    generator_of,
    joined,
)
from qkv.core.errors import Refused
from qkv.core.spec import Limit, budget_param, param
from qkv.decode._common.accept import take
from qkv.decode._common.drafts import check_vocabulary, truncated
from qkv.decode._common.target import Target, opened
from qkv.decode._lookahead import SpecKVPolicy, pooled, tail_rows, vertical_slash

__all__ = ["SpecKV", "reference", "specpc_compress", "truncated", "vertical_slash"]


def reference(
    attention: Tensor, *, window: int, lookahead: int, kernel: int, pooling: str, reduce: str, budget: int
) -> list[int]:
    """Positions kept for one KV head, from the map ``[R, M, M]`` of its query heads over [prompt, guess], M = N + lookahead."""
    m = attention.shape[-1]
    again = 1 if lookahead else 0
    tail, text = window + lookahead + again, m - lookahead - again
    rows = attention[:, m - tail :, : m - tail].reshape(-1, m - tail).tolist()
    drawn = [max(row[s] for row in rows) if reduce == "max" else sum(row[s] for row in rows) for s in range(m - tail)]
    half, scores = kernel // 2, []
    for s in range(m - tail):
        near = [drawn[j] if 0 <= j < m - tail else 0.0 for j in range(s - half, s + half + 1)]
        scores.append(max(near) if pooling == "max" else sum(near) / kernel)
    chosen = sorted(range(m - tail), key=lambda s: (-scores[s], -s))[: budget - window]
    return sorted([*chosen, *range(text - window, text)])


# -- what the draft says ----------------------------------------------------------------------------------------------


def look_ahead(draft: Any, ids: Tensor, count: int, ends: frozenset[int] = frozenset()) -> Tensor:
    """The draft's greedy continuation ``[count]`` of ``[1, N]``, cut behind its first end token."""
    if not count:
        return ids.new_empty(0)
    with opened(draft, "speckv, its draft"):
        own = Target(draft, ids.to(draft.device), ids.shape[1] + count + 1, record=False)
        tokens = [own.read().argmax(-1)]
        while len(tokens) < count:
            tokens.append(own.verify(tokens[-1], 1).argmax(-1))
    found = torch.cat(tokens).to(ids.device)
    if ends:
        stops = [i for i, t in enumerate(found.tolist()) if t in ends]
        found = found[: stops[0] + 1] if stops else found
    return found


class _Listener:
    """Collects the importance of every prompt token from a draft's attention: the largest weight, or the mean."""

    def __init__(self, prompt: int, window: int, start_layer: int, weighted: bool, reduce: str) -> None:
        self.prompt, self.window, self.start, self.reduce = prompt, min(window, prompt), start_layer, reduce
        w = self.window
        self.weights = torch.linspace(0, 1, w) if weighted and w > 1 else torch.ones(w)
        self.total: Tensor | None = None
        self.rows = 0

    def __call__(self, site: Any, call: Any) -> None:
        if (site.layer or 0) < self.start:
            return
        rows = min(call.q.shape[2], self.window)
        maps = tail_rows(call.q[:, :, -rows:], call.k, call.scale)[..., : self.prompt]
        if rows > 1 or self.window == 1:
            maps = maps * self.weights[-rows:].to(maps).unsqueeze(-1)
        flat = maps.reshape(-1, maps.shape[-1])
        self.rows += flat.shape[0]
        part = flat.amax(0) if self.reduce == "max" else flat.sum(0)
        if self.total is None:
            self.total = part
        else:
            self.total = torch.maximum(self.total, part) if self.reduce == "max" else self.total + part

    @property
    def importance(self) -> Tensor:
        """``[N]``."""
        assert self.total is not None
        return self.total if self.reduce == "max" else self.total / self.rows


def draft_importance(
    draft: Any, ids: Tensor, *, window: int, guess: int, start_layer: int, weighted: bool, reduce: str
) -> tuple[Tensor, Tensor]:
    """(importance ``[N]`` of the prompt's tokens in the draft's attention, its greedy guess ``[guess]``).

    Rows are those of the last `window` prompt queries and of each guessed token that is read (all but the last).
    """
    if "_qkv" in draft.__dict__:
        raise Refused("SpecPC reads the draft's whole attention, and this draft carries methods; revert it first")
    listener = _Listener(ids.shape[1], window, start_layer, weighted, reduce)
    tokens: list[Tensor] = []
    with opened(draft, "speckv, its draft"), qkv.hosts.observe(draft, listener):
        own = Target(draft, ids.to(draft.device), ids.shape[1] + guess + 1, record=False)
        tokens.append(own.read().argmax(-1))
        while len(tokens) < guess:
            tokens.append(own.verify(tokens[-1], 1).argmax(-1))
    if listener.total is None:
        raise Refused(f"SpecPC: the draft has no layer from start_layer={start_layer} on")
    return listener.importance, torch.cat(tokens).to(ids.device)[:guess]


def select_tokens(importance: Tensor, budget: int, *, window: int, kernel: int, neighbours: int) -> Tensor:
    """The kept prompt positions ``[budget]``, ascending, from the importance ``[N]``.

    Pooled scores are ranked; each ranked position brings its neighbours, the nearest last; the last `window` positions come
    before all, and the list is cut to the budget.
    """
    n = importance.shape[0]
    if budget >= n:
        return torch.arange(n, device=importance.device)
    scores = pooled(importance.float(), kernel, "max")
    ranked = (n - 1 - scores.flip(0).argsort(descending=True, stable=True)[:budget]).cpu()
    distance = torch.arange(neighbours // 2, 0, -1)
    around = torch.cat((torch.zeros(1, dtype=torch.long), torch.stack((distance, -distance), -1).flatten()))
    listed = (ranked[:, None] + around).flatten()
    listed = torch.cat((torch.arange(n - min(window, budget), n), listed[(listed >= 0) & (listed < n)])).tolist()
    kept = list(dict.fromkeys(listed))[:budget]
    return torch.tensor(sorted(kept), device=importance.device)


def specpc_compress(
    draft: Any,
    ids: Tensor,
    budget: int | float = 1024,
    *,
    window: int = 64,
    kernel: int = 64,
    neighbours: int | None = None,
    lookahead: int = 1,
    reduce: Literal["max", "mean"] = "max",
    weighted_query: bool = True,
    start_layer: int = 0,
) -> Tensor:
    """SpecPC: which tokens of a prompt ``[B, N]`` (no padding) to feed to the model: ``[B, budget]``, ascending.

    budget: tokens, or a share of N. window: last queries that choose, and tokens that always stay. kernel: neighbours that
    share a score. neighbours: tokens that a chosen one brings; None: as many as `kernel`. lookahead: 1 reads the prompt alone,
    more reads lookahead - 1 guessed tokens too. start_layer: skip the layers before it. A window of one query weighs 1.
    Raises `InvalidInput` and `Refused`.
    """
    check_prompt("specpc", draft, ids, None, max(1, lookahead))
    keep = budget_slots(budget, ids.shape[1])
    if keep < min(window, ids.shape[1]):
        raise Refused(f"specpc: a budget of {keep} tokens is smaller than the window of {window} that always stays")
    rows = []
    for row in ids:
        found, _ = draft_importance(
            draft, row.unsqueeze(0), window=window, guess=lookahead, start_layer=start_layer, weighted=weighted_query,
            reduce=reduce,
        )  # fmt: skip
        near = kernel if neighbours is None else neighbours
        rows.append(select_tokens(found, keep, window=window, kernel=kernel, neighbours=near).to(ids.device))
    return torch.stack(rows)


# -- the method -------------------------------------------------------------------------------------------------------


def examples(model: Any) -> Mapping[str, Mapping[str, Any]]:
    """For the laws: a draft that knows nothing, and the model itself."""
    rng = torch.random.get_rng_state()
    torch.manual_seed(5)
    stranger: Any = type(model)(copy.deepcopy(model.config)).to(model.device, model.dtype).eval()
    torch.random.set_rng_state(rng)
    return {"random": {"draft": stranger}, "itself": {"draft": truncated(model, model.config.num_hidden_layers)}}


@final
@dataclass(frozen=True, kw_only=True)
class SpecKV(Decoding):
    """Compress the prompt by what a draft's continuation looks at, then decode."""

    spec: ClassVar[DecodingSpec] = DecodingSpec(
        id="speckv",
        title="Draft-based Approximate Inference for LLMs",
        paper="arXiv:2506.08373",
        source="code",
        summary="A draft's guess of the answer chooses which entries of the prompt's cache, or which of its tokens, are kept.",
        shown="a needle asked for at the end survives a quarter of the cache at least as often as with SnapKV",
        honest="it pays for the draft's guess before the first token, and a wrong guess keeps what the answer does not need",
        samples=True,
        use='''# draft: a smaller model of the same tokenizer, or model
out = m.generate(model, input_ids, max_new_tokens=100, draft=draft, eos_token_id=tokenizer.eos_token_id)''',
        example=examples,
        limits=(
            Limit("full", {"budget": 1.0, "prompt_budget": 1.0}, "everything kept: plain decoding"),
            Limit(
                "snapkv",
                {"stage": "kv", "lookahead": 0, "reduce": "mean", "budget": 6, "window": 2, "kernel": 3, "pooling": "max",
                 "positions": "original"},
                "no guess: SnapKV",
                {"budget": 6, "window": 2, "kernel": 3},
            ),
        ),
        trials=(
            {},
            {"budget": 6, "window": 2, "kernel": 3, "lookahead": 4},
            {"stage": "pc", "prompt_budget": 6, "window": 2, "prompt_kernel": 2},
            {
                "stage": "kv-pc", "prompt_budget": 6, "budget": 4, "window": 2, "kernel": 1, "prompt_kernel": 2, "lookahead": 3,
                "positions": "compressed",
            },
        ),
    )  # fmt: skip
    stage: Literal["kv", "pc", "kv-pc"] = param("kv", "SpecKV, SpecPC, or both in a row")
    budget: int | float = budget_param(
        1024, "entries kept per KV head: an int is a number, a float a share of the prompt"
    )
    lookahead: int | None = param(
        None, "tokens the draft guesses; none: as many as will be generated (SpecPC alone: 1)", low=0
    )
    window: int = param(64, "newest prompt tokens that are always kept and whose queries choose", low=1)
    kernel: int = param(7, "neighbouring entries that share their scores; odd, 1 = none", low=1)
    pooling: Literal["max", "avg"] = param("max", "how neighbours share: their largest score or their mean")
    reduce: Literal["max", "mean"] = param("max", "how queries, heads and layers combine")
    verticals: int = param(2048, "positions each query attends to in a long prompt, beside the band; 0: to all", low=0)
    band: int = param(2048, "newest tokens each query attends to in a prompt longer than verticals + band", low=1)
    positions: Literal["original", "compressed"] = param(
        "original", "where decoded tokens stand: behind the text, or behind what is kept of it"
    )
    prompt_budget: int | float = budget_param(1024, "tokens of the prompt that SpecPC keeps: a number, or a share")
    prompt_kernel: int = param(64, "neighbouring tokens that share a score and come along in SpecPC", low=1)
    weighted_query: bool = param(True, "SpecPC: later queries of the window weigh more")
    start_layer: int = param(0, "SpecPC: first layer of the draft that is listened to", low=0)

    def validate(self) -> None:
        """The window leaves room, and neighbours have a centre."""
        require(self.kernel % 2 == 1, f"{self.id}: kernel={self.kernel} must be odd, so that it has a centre")
        for name in ("budget", "prompt_budget"):
            value = getattr(self, name)
            used = name == "budget" if self.stage == "kv" else name == "prompt_budget" if self.stage == "pc" else True
            require(
                not used or isinstance(value, float) or value > self.window,
                f"{self.id}: {name}={value} leaves nothing beside window={self.window}; raise it or lower the window",
            )

    def generate(
        self,
        model: Any,
        input_ids: Tensor,
        *,
        max_new_tokens: int,
        attention_mask: Tensor | None = None,
        sampling: Sampling = GREEDY,
        eos_token_id: int | tuple[int, ...] | None = None,
        seed: int | None = None,
        progress: Progress | None = None,
        draft: Any,
    ) -> Generated:
        """See `Decoding.generate`. draft: a causal language model with the same tokenizer; it may be the model itself.

        notes: per row the tokens guessed, those the model read, the entries kept, and the bytes held of the bytes of a plain
        cache.
        """
        ahead = self._ahead(max_new_tokens)
        mask = check_prompt(
            self.id, model, input_ids, attention_mask, max_new_tokens, extra=max(0, ahead - max_new_tokens)
        )
        check_prompt(f"{self.id}, its draft", draft, input_ids, attention_mask, max(1, ahead))
        check_vocabulary(self.id, model, draft)
        if "_qkv" in model.__dict__:
            raise Refused(f"{self.id} keeps a cache of its own, and the model carries methods; revert it first")
        start, ends = time.perf_counter(), end_tokens(eos_token_id)
        plans = [self._plan(row[real].unsqueeze(0)) for row, real in zip(input_ids, mask, strict=True)]
        rows, notes, passes = [], [], 0
        generator = generator_of(seed, model.device)
        for i, (ids, entries, tokens) in enumerate(plans):
            ids, guess = self._guess(draft, ids, ahead, tokens, ends)

            def told(done: int, i: int = i) -> None:
                if progress is not None:
                    progress(i * max_new_tokens + done, len(plans) * max_new_tokens, f"row {i + 1} of {len(plans)}")

            method = "full" if self.stage == "pc" else self.policy(min(entries, ids.shape[1]), guess.shape[0])
            with opened(model, self.id, method):
                target = Target(model, torch.cat((ids, guess.unsqueeze(0)), 1).to(model.device), 0, record=False)
                rows.append(self._decode(target, ids.shape[1], max_new_tokens, sampling, ends, generator, told))
                done = qkv.report(model)
            passes += target.passes
            notes.append({
                "guessed": guess.shape[0], "read": ids.shape[1], "kept": done.kept, "bytes": done.bytes,
                "full_bytes": done.full_bytes,
            })  # fmt: skip
        sequences, lengths = joined(input_ids, rows, ends)
        seconds = time.perf_counter() - start
        return Generated(sequences, input_ids.shape[1], lengths, passes, seconds, {"rows": notes})

    def _decode(
        self,
        target: Target,
        prompt: int,
        new: int,
        sampling: Sampling,
        ends: frozenset[int],
        generator: torch.Generator | None,
        told: Callable[[int], None],
    ) -> list[int]:
        """Read [prompt, guess], read the last prompt token again where there was a guess, and go on token by token."""
        logits = target.read()
        text = target.prompt[0, :prompt]
        moved = target.seen - target.kept() if self.positions == "compressed" else 0
        if target.prompt.shape[1] > prompt:
            logits = target.verify(text[-1:], 1, back=moved)
        out: list[int] = []
        while True:
            token = take(logits, sampling, generator)
            out.append(int(token))
            told(len(out))
            if len(out) == new or out[-1] in ends:
                return out
            logits = target.verify(token, 1, back=moved)

    def _ahead(self, new: int) -> int:
        """Tokens to guess."""
        if self.lookahead is not None:
            return self.lookahead
        return 1 if self.stage == "pc" else new

    def _plan(self, ids: Tensor) -> tuple[Tensor, int, int]:
        """(prompt, entries kept, tokens kept) of a row, or `Refused` when the window does not fit."""
        n = ids.shape[1]
        tokens = n if self.stage == "kv" else min(n, budget_slots(self.prompt_budget, n))
        entries = n if self.stage == "pc" else min(n, budget_slots(self.budget, n))
        for name, value in (("budget", entries), ("prompt_budget", tokens)):
            if value < n and value <= self.window:
                raise Refused(
                    f"{self.id}: {name} gives {value} of {n} tokens, no more than window={self.window}, which always stay; raise "
                    "it or lower the window"
                )
        return ids, entries, tokens

    def _guess(self, draft: Any, ids: Tensor, ahead: int, tokens: int, ends: frozenset[int]) -> tuple[Tensor, Tensor]:
        """(what the model will read of the prompt, the guess behind it)."""
        if self.stage == "kv":
            return ids, look_ahead(draft, ids, ahead, ends)
        found, guess = draft_importance(
            draft, ids, window=self.window, guess=max(1, ahead), start_layer=self.start_layer, weighted=self.weighted_query,
            reduce=self.reduce,
        )  # fmt: skip
        kept = select_tokens(
            found, tokens, window=self.window, kernel=self.prompt_kernel, neighbours=self.prompt_kernel
        )
        return ids[:, kept.to(ids.device)], guess[:0] if self.stage == "pc" else guess[:ahead]

    def policy(self, keep: int, guess: int) -> SpecKVPolicy:
        """What each layer keeps: `keep` entries of a prompt with `guess` tokens behind it."""
        return SpecKVPolicy(
            keep=keep, lookahead=guess, window=self.window, kernel=self.kernel, pooling=self.pooling, reduce=self.reduce,
            verticals=self.verticals, band=self.band,
        )  # fmt: skip
