r"""dKV-Cache: keys and values of decoded tokens are kept between the denoising steps of a masked-diffusion language model.

A bidirectional model fills G masks in T steps, n_i of them in step i of a block; D_i holds the positions known after step i of
this block, the prompt and earlier blocks from the start (i = -1). A token's keys and values change much while it is masked and
when it is decoded, little afterwards. So a step computes only some rows, and these read the kept keys and values of all others:

    decode   rows not in D_{i-1-d}; all rows while i <= d and whenever i divides by `refresh`         (d = `delay`)
    pd       as decode, but the prompt is computed in the first step of a block and never again
    prefill  rows outside the prompt; the prompt in the first step of a block
    greedy   the targets of this step (their order is drawn before the block), those of the last d steps, and the `window` masks
             nearest to the targets, left before right; all rows in the first step and whenever i divides by `refresh`

Everything is forgotten at the start of a block. Keys are kept rotated: a token never moves. One difference from the paper's
code, which keeps lists [fresh, kept]: here every position owns a slot, and fresh keys overwrite it; attention does not depend
on the order of the keys, so the maths is the same and nothing is concatenated.

Axes: B batch, L length, R rows computed, H query heads, G key/value heads, D head width, V vocabulary. Paper: arXiv:2505.15781;
the order of unmasking is LLaDA's (arXiv:2502.09992): the likeliest first, within the block.
"""

from __future__ import annotations

import importlib
import inspect
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, final

import torch
from torch import Tensor

from qkv.core.attend import sdpa
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
)
from qkv.core.errors import InvalidInput, Refused
from qkv.core.spec import param
from qkv.hosts import attending
from qkv.hosts import sites as sites_of

Order = Literal["confidence", "random"]
Forward = Callable[[Tensor, Tensor, Callable[..., Tensor]], Tensor]
"""``forward(ids [B, R], positions [B, R], attend) -> logits [B, R, V]``; ``attend(layer, q, k, v, scale=None) -> out``."""


class _Lists:
    """Keys and values by (layer, position), read in the order [fresh, kept]."""

    def __init__(self, length: int) -> None:
        self.length, self.rows = length, list(range(length))
        self.kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        old = [self.kept[layer, p] for p in range(self.length) if p not in self.rows]
        keys, values = (torch.cat([fresh, *(kv[which] for kv in old)], 2) for which, fresh in enumerate((k, v)))
        self.kept.update({(layer, p): (k[:, :, [r]], v[:, :, [r]]) for r, p in enumerate(self.rows)})
        repeat = q.shape[1] // k.shape[1]
        logits = q @ keys.repeat_interleave(repeat, 1).mT * q.shape[-1] ** -0.5
        return logits.softmax(-1) @ values.repeat_interleave(repeat, 1)


@torch.no_grad()
def reference(
    model: Any, prompt: Sequence[int], new: int, cache: DelayedKVCache | None, *, steps: int, block: int,
    orders: Sequence[Sequence[int]] | None = None,
) -> list[int]:  # fmt: skip
    """The definition, for one row, without sampling: sets of positions, and keys as a list [fresh, kept].

    orders: for ``greedy``, the positions of each block in the order in which they are decoded.
    """
    x = [*prompt, *[model.mask_token] * new]
    given = {p for p, t in enumerate(x) if t != model.mask_token}
    holes = [p for p in range(len(x)) if p not in given]
    known, per_block = [set(given)], steps // (len(holes) // block)
    for j in range(len(holes) // block):
        here, known, lists = holes[j * block : (j + 1) * block], [known[-1]], _Lists(len(x))
        taken: list[list[int]] = []
        for i in range(per_block):
            n = block // per_block + (i < block % per_block)
            targets = [] if orders is None else orders[j][sum(map(len, taken)) :][:n]
            rows = lists.rows = sorted(_rows_of(cache, i, known, given, set(range(len(x))), targets, taken))
            logits = model(torch.tensor([[x[p] for p in rows]]), torch.tensor([rows]), lists.attend)[0]
            logits[:, model.mask_token] = -torch.inf
            candidates = targets or [p for p in here if p not in known[-1]]
            sure = {p: logits[rows.index(p)].softmax(-1).max().item() for p in candidates}
            chosen = sorted(candidates, key=lambda p, sure=sure: -sure[p])[:n]
            for p in chosen:
                x[p] = int(logits[rows.index(p)].argmax())
            taken.append(chosen)
            known.append(known[-1] | set(chosen))
    return x


def _rows_of(
    cache: DelayedKVCache | None, i: int, known: list[set[int]], given: set[int], every: set[int],
    targets: Sequence[int], taken: list[list[int]],
) -> set[int]:  # fmt: skip
    """The rows of step i of a block; ``known[i]`` is D_{i-1}."""
    if cache is None or i == 0:
        return every
    if cache.variant == "prefill":
        return every - given
    if cache.variant == "greedy":
        if i % cache.refresh == 0:
            return every
        masks = sorted(every - known[i] - set(targets), key=lambda p: min((abs(p - t), p > t) for t in targets))
        late = [p for step in taken[i - cache.delay :] if cache.delay for p in step]
        return {*targets, *late, *masks[: cache.window]}
    if i <= cache.delay or i % cache.refresh == 0:
        return every - given if cache.variant == "pd" else every
    return every - known[i - cache.delay]


# -- the model --------------------------------------------------------------------------------------------------------


@contextmanager
def forward_of(model: Any, mask_token: int | None) -> Iterator[tuple[Forward, int]]:
    """How to compute some rows of a model, and its mask token.

    A model of qkv's own says itself: ``model(ids, positions, attend)`` and ``model.mask_token``. A bidirectional model of
    transformers (BERT, LLaDA-like) is driven through its attention sites and ``position_ids``. Raises `Refused`.
    """
    if isinstance(getattr(model, "mask_token", None), int):
        yield model, model.mask_token
        return
    sites = sites_of(model)
    causal = [s for s in sites if s.role != "encoder"]
    if causal:
        raise Refused(f"dkv-cache needs a bidirectional masked language model; {causal[0].name} of this "
                      f"{type(model).__name__} is a {'causal' if causal[0].causal else 'cross-'}attention")  # fmt: skip
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise Refused(
            f"dkv-cache computes some rows at a time; {type(model).__name__} takes no position_ids to say which"
        )
    token = mask_token if mask_token is not None else getattr(model.config, "mask_token_id", None)
    if not isinstance(token, int):
        raise InvalidInput("the model does not say which token is the mask: pass mask_token=tokenizer.mask_token_id")
    current: list[Callable[..., Tensor]] = []
    layers = {site.name: i for i, site in enumerate(sites)}

    def attention(site: Any, q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
        return current[-1](layers[site.name], q, k, v, scale=scale)

    def forward(ids: Tensor, positions: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        current.append(attend)
        try:
            return model(
                input_ids=ids, position_ids=positions.expand_as(ids), attention_mask=torch.ones_like(ids)
            ).logits
        finally:
            current.pop()

    with attending(model, attention):
        yield forward, token


def _check_rows(model: Any, forward: Forward, x: Tensor) -> None:
    """A model of another library must not care in which order its rows come: windows and ignored positions show here."""
    place = torch.arange(x.shape[1], device=x.device)[None]
    plain = forward(x[:1], place, _everything)
    turned = forward(x[:1].flip(1), place.flip(1), _everything).flip(1)
    gap, size = float((plain - turned).abs().max()), float(plain.abs().max())
    if not gap <= 1e-2 * size:
        raise Refused(f"{type(model).__name__} gives other logits when its rows come in another order with their position_ids "
                      f"(by {gap:.3g} of {size:.3g}): it has positions or an attention that rows alone do not carry")  # fmt: skip


def _everything(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    return sdpa(q, k, v, scale=scale)


class Slots:
    """Keys and values of every position, per layer ``[B, G, L, D]``; fresh rows overwrite theirs.

    hidden: ``[B, 1, 1, L]`` bool, False at padding, or None.
    """

    def __init__(self, hidden: Tensor | None, keep: bool) -> None:
        self.hidden, self.keep = hidden, keep
        self.rows: Tensor | None = None
        self.held: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        """Attention of the computed rows over all positions; `rows` ``[B, R]`` says which they are, None = all in order."""
        if self.rows is None:
            if self.keep:
                self.held[layer] = k, v = k.contiguous(), v.contiguous()
        else:
            keys, values = self.held[layer]
            at = self.rows[:, None, :, None]
            keys.scatter_(2, at.expand_as(k), k)
            values.scatter_(2, at.expand_as(v), v)
            k, v = keys, values
        return sdpa(q, k, v, mask=self.hidden, scale=scale)

    def bytes(self) -> int:
        """Bytes held."""
        return sum(x.numel() * x.element_size() for pair in self.held.values() for x in pair)


# -- generation -------------------------------------------------------------------------------------------------------


class Moment(NamedTuple):
    """One step as `watch` sees it, after it was taken.

    block, step: counted from 0, the step within its block. rows: ``[B, R]`` positions computed, None = all. known: ``[B, L]``
    bool before the step. chosen: ``[B, n]`` positions unmasked. tokens: ``[B, L]`` after the step. candidates ``[B, m]`` and
    logits ``[B, m, V]``: the positions it chose from.
    """

    block: int
    step: int
    rows: Tensor | None
    known: Tensor
    chosen: Tensor
    tokens: Tensor
    candidates: Tensor
    logits: Tensor


def first(where: Tensor, count: int) -> Tensor:
    """``[B, count]``: the places of the first `count` True of each row, in order (the caller knows there are as many)."""
    return (~where).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]


class _Schedule:
    """Which rows each step computes; shapes follow from counts alone, so nothing waits for the device."""

    def __init__(self, cache: DelayedKVCache | None, given: Tensor, count: int) -> None:
        self.cache, self.given, self.length = cache, given, given.shape[1]
        self.given_count = count  # positions known from the start, the same in every row

    def open(self, known: Tensor, count: int) -> None:
        """A block begins: `count` positions are known in every row."""
        delay = self.cache.delay if self.cache is not None else 0
        self.known: deque[tuple[Tensor, int]] = deque([(known, count)], maxlen=delay + 1)
        self.taken: deque[Tensor] = deque(maxlen=max(1, delay))

    def close(self, known: Tensor, count: int, chosen: Tensor) -> None:
        """A step was taken."""
        self.known.append((known, count))
        self.taken.append(chosen)

    def rows(self, i: int, targets: Tensor | None) -> Tensor | None:
        """``[B, R]`` for step i of the block, None for all."""
        cache = self.cache
        if cache is None or i == 0:
            return None
        again = cache.variant != "prefill" and i % cache.refresh == 0
        if cache.variant == "greedy":
            return None if again else self._around(targets, cache.window, cache.delay)
        young = i <= cache.delay
        if cache.variant == "prefill" or (cache.variant == "pd" and (again or young)):
            return first(~self.given, self.length - self.given_count) if self.given_count else None
        if again or young:
            return None
        known, count = self.known[0]
        return first(~known, self.length - count) if count else None

    def _around(self, targets: Tensor | None, window: int, delay: int) -> Tensor:
        assert targets is not None
        known, count = self.known[-1]
        parts = [targets, *(self.taken if delay else ())]
        spare = min(window, self.length - count - targets.shape[1])
        if spare > 0:
            place = torch.arange(self.length, device=targets.device)
            gap = place[None, None] - targets[:, :, None]  # [B, n, L]
            near = (2 * gap.abs() + (gap > 0)).amin(1)
            busy = known.scatter(1, targets, True)
            parts.append(near.masked_fill(busy, 4 * self.length).topk(spare, dim=1, largest=False).indices)
        return torch.cat(parts, 1)


@torch.no_grad()
def masked_diffusion_generate(
    model: Any,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    steps: int | None = None,
    block: int | None = None,
    cache: DelayedKVCache | None = None,
    order: Order | None = None,
    attention_mask: Tensor | None = None,
    sampling: Sampling = GREEDY,
    eos_token_id: int | tuple[int, ...] | None = None,
    seed: int | None = None,
    mask_token: int | None = None,
    progress: Progress | None = None,
    watch: Callable[[Moment], None] | None = None,
) -> Generated:
    """Fill in `max_new_tokens` masks behind the prompt ``[B, T]``, and every mask inside it.

    steps: denoising steps in all, default one per token. block: masks filled before the next ones are begun, default all.
    cache: None computes every row in every step. order: which masks of a block come first, the likeliest or a random order
    drawn before the block; default what the cache's variant needs. attention_mask: ``[B, T]``, 0 = padding on the left. sampling:
    noise is drawn for the masks of the block alone, so the same seed means the same noise with every cache. mask_token: for
    models that do not name theirs. watch: called with a `Moment` after every step.

    Notes of the result: ``rows`` computed in all, ``full_rows`` without a cache, ``bytes`` of keys and values held. Raises
    `InvalidInput` and `Refused` (a causal model, rows with different numbers of masks, numbers that do not divide).
    """
    began = time.perf_counter()
    with forward_of(model, mask_token) as (forward, token):
        x, padding = _canvas(model, prompt, attention_mask, max_new_tokens, token)
        real = None if padding is None else ~padding
        holes = (x == token) if real is None else (x == token) & real
        counts = holes.sum(1).tolist()
        total, order = _check(counts, cache, order)
        blocks, per_block, block = _divide(total, steps, block)
        place = torch.arange(x.shape[1], device=x.device).expand_as(x)
        if real is not None:
            place = (real.cumsum(1) - 1).clamp(min=0)
        if forward is not model:
            _check_rows(model, forward, x)
        slots = Slots(None if real is None else real[:, None, None], cache is not None)
        schedule = _Schedule(cache, ~holes, x.shape[1] - total)
        dice, ends = generator_of(seed, x.device), end_tokens(eos_token_id)
        block_of = torch.where(holes, (holes.cumsum(1) - 1) // block, -1)
        known, done, passes, computed = ~holes, 0, 0, 0
        for j in range(blocks):
            here = block_of == j
            schedule.open(known, x.shape[1] - total + done)
            line = _random(here, block, dice) if order == "random" else None
            slots.held.clear()
            for i in range(per_block):
                n = block // per_block + (i < block % per_block)
                targets = None if line is None else line[:, done - j * block :][:, :n]
                slots.rows = rows = schedule.rows(i, targets)
                ids, at = (x, place) if rows is None else (x.gather(1, rows), place.gather(1, rows))
                logits = forward(ids, at, slots.attend)
                candidates = first(here & ~known, (j + 1) * block - done) if targets is None else targets
                logits = _at(logits, rows, candidates, x.shape[1])
                logits[..., token] = -torch.inf
                chosen, tokens = _take(logits, candidates, n, sampling, dice)
                before, known = known, known.scatter(1, chosen, True)
                x = x.scatter(1, chosen, tokens)
                done, passes, computed = done + n, passes + 1, computed + ids.shape[1]
                schedule.close(known, x.shape[1] - total + done, chosen)
                if watch is not None:
                    watch(Moment(j, i, rows, before, chosen, x, candidates, logits))
            if progress is not None:
                progress(done, total, f"block {j + 1} of {blocks}")
            if ends and _ended(x, prompt.shape[1], ends, known):
                break
    sequences, lengths = _cut(x, prompt.shape[1], ends, token)
    notes = {"rows": computed * len(x), "full_rows": passes * x.numel(), "bytes": slots.bytes(), "steps": passes}
    return Generated(sequences, prompt.shape[1], lengths, passes, time.perf_counter() - began, notes)


def _canvas(model: Any, prompt: Any, mask: Any, new: Any, token: int) -> tuple[Tensor, Tensor | None]:
    """Prompt and masks ``[B, L]``, and where padding is (None: nowhere)."""
    fills = isinstance(prompt, Tensor) and prompt.ndim == 2 and bool((prompt == token).any())
    alone = new == 0 and not isinstance(new, bool) and fills  # only masks inside the prompt
    real = check_prompt("dkv-cache", model, prompt, mask, 1 if alone else new, extra=-1 if alone else 0)
    x = torch.nn.functional.pad(prompt.long(), (0, new), value=token)
    if bool(real.all()):
        return x, None
    return x, torch.nn.functional.pad(~real, (0, new), value=False)


def _check(counts: list[int], cache: DelayedKVCache | None, order: Order | None) -> tuple[int, Order]:
    """Masks per row and the order of unmasking, or why not."""
    if len(set(counts)) > 1:
        raise Refused(f"the rows of the batch have {counts} masks; every row must compute the same number of tokens in a step: "
                      "give the rows as many masks each, or generate them one by one")  # fmt: skip
    needs: Order | None = None if cache is None else ("random" if cache.variant == "greedy" else "confidence")
    if order not in (None, "confidence", "random"):
        raise InvalidInput(f"order={order!r} must be 'confidence' or 'random'")
    if needs == "random" and order == "confidence":
        raise Refused("variant='greedy' computes the next targets only, so it must know them: it takes order='random'")
    return counts[0], order or needs or "confidence"


def _divide(total: int, steps: int | None, block: int | None) -> tuple[int, int, int]:
    """(blocks, steps per block, masks per block)."""
    block = total if block is None else block
    steps = total if steps is None else steps
    for name, value in (("block", block), ("steps", steps)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidInput(f"{name}={value!r} must be an int of at least 1")
    if total % block:
        raise Refused(f"{total} masks do not divide into blocks of {block}")
    blocks = total // block
    if steps % blocks:
        raise Refused(f"{steps} steps do not divide over {blocks} blocks; take a multiple of {blocks}")
    if steps > total:
        raise Refused(f"{steps} steps for {total} masks: some steps would unmask nothing; take at most {total}")
    return blocks, steps // blocks, block


def _random(here: Tensor, block: int, dice: torch.Generator | None) -> Tensor:
    """``[B, block]``: the positions of the block in random order."""
    draw = torch.rand(here.shape, generator=dice, device=here.device, dtype=torch.float64)
    return draw.masked_fill(~here, 2.0).argsort(dim=1)[:, :block]


def _at(logits: Tensor, rows: Tensor | None, positions: Tensor, length: int) -> Tensor:
    """Logits ``[B, m, V]`` of `positions` ``[B, m]`` from those of the computed rows."""
    if rows is not None:
        order = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
        index = torch.zeros(rows.shape[0], length, dtype=torch.int64, device=rows.device).scatter(1, rows, order)
        positions = index.gather(1, positions)
    return logits.gather(1, positions[..., None].expand(-1, -1, logits.shape[-1]))


def _take(
    logits: Tensor, candidates: Tensor, n: int, sampling: Sampling, dice: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """The `n` positions unmasked now ``[B, n]`` and their tokens: the surest of the candidates."""
    if sampling.greedy:
        tokens = logits.argmax(-1)
    else:
        noise = torch.rand(logits.shape, generator=dice, device=logits.device, dtype=torch.float64)
        tokens = (sampling.probabilities(logits.double()).log() - (-noise.log()).log()).argmax(-1)  # Gumbel
    if n == candidates.shape[1]:
        return candidates, tokens
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    sure = wide.softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    best = sure.topk(n, dim=1).indices
    return candidates.gather(1, best), tokens.gather(1, best)


def _is_end(x: Tensor, ends: frozenset[int]) -> Tensor:
    return torch.isin(x, torch.tensor(sorted(ends), device=x.device))


def _ended(x: Tensor, start: int, ends: frozenset[int], known: Tensor) -> bool:
    """Whether every row has an end token with no mask before it."""
    end = _is_end(x[:, start:], ends)
    return (
        bool((end & known[:, start:].to(torch.uint8).cummin(1).values.bool()).any(1).all()) if end.shape[1] else False
    )


def _cut(x: Tensor, start: int, ends: frozenset[int], token: int) -> tuple[Tensor, tuple[int, ...]]:
    """Everything behind a row's first end token becomes that token; new tokens per row."""
    new = x.shape[1] - start
    if not ends or not new:
        return x, (new,) * len(x)
    end = _is_end(x[:, start:], ends)
    at = torch.where(end.any(1), end.to(torch.uint8).argmax(1), new - 1)
    behind = torch.arange(new, device=x.device) > at[:, None]
    last = x[:, start:].gather(1, at[:, None])
    return torch.cat((x[:, :start], torch.where(behind, last, x[:, start:])), 1), tuple((at + 1).tolist())


def _laws_model(device: str, dtype: torch.dtype, seed: int, vocabulary: int) -> Any:
    # By name: models stand beside decoding in the import rule.
    lm = importlib.import_module("qkv.models.language.masked_diffusion")
    config = lm.MaskedDiffusionConfig(
        vocabulary=vocabulary + 1, mask_token=vocabulary, width=24, layers=3, heads=6, kv_heads=3, length=96
    )
    model = lm.MaskedDiffusionLM(config, seed).to(device, dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(10)
    return model


@final
@dataclass(frozen=True, kw_only=True)
class DelayedKVCache(Decoding):
    """Compute the rows that still change; read the others' keys and values from earlier steps."""

    spec: ClassVar[DecodingSpec] = DecodingSpec(
        id="dkv-cache",
        title="dKV-Cache: The Cache for Diffusion Language Models",
        paper="arXiv:2505.15781",
        source="code",
        summary="Keeps keys and values of decoded tokens, one step late, between the steps of a masked-diffusion language model.",
        shown="at refresh 4 to 8 at least 95 % of the decisions of the uncached model, in a fraction of the time",
        honest="kept keys and values are those of an earlier context: only refresh=1 (decode, greedy) is exact, and a batch of"
        " one gains little on a GPU",
        samples=True,
        use="out = m.generate(model, input_ids, max_new_tokens=100)   # model: a bidirectional, masked language model",
        example=lambda model: {"plain": {}},
        model=_laws_model,
        trials=(
            {}, {"variant": "decode", "refresh": 3, "delay": 0}, {"variant": "greedy", "refresh": 2}, {"variant": "prefill"},
            {"variant": "greedy", "refresh": 5, "window": 0}, {"variant": "pd", "refresh": 4},
        ),
    )  # fmt: skip
    variant: Literal["decode", "greedy", "prefill", "pd"] = param(
        "decode", "which rows a step computes, see the module"
    )
    refresh: int = param(8, "steps between passes that compute every row (prefill: unused)", low=1)
    window: int = param(4, "greedy: masks computed around the targets", low=0)
    delay: int = param(
        1, "steps for which a decoded token is still computed anew; 0 keeps what it was as a mask", low=0
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
        steps: int | None = None,
        block: int | None = None,
        order: Order | None = None,
        mask_token: int | None = None,
        watch: Callable[[Moment], None] | None = None,
    ) -> Generated:
        """`masked_diffusion_generate` with this cache."""
        return masked_diffusion_generate(
            model, input_ids, max_new_tokens=max_new_tokens, steps=steps, block=block, cache=self, order=order,
            attention_mask=attention_mask, sampling=sampling, eos_token_id=eos_token_id, seed=seed, mask_token=mask_token,
            progress=progress, watch=watch,
        )  # fmt: skip
