r"""Hogwild! inference: several workers, copies of one model, write at the same time and read each other's tokens at once.

In a step every worker feeds its newest token(s), one batch for all; their keys and values go into shared blocks first, then
every worker reads its list of blocks, its own last (see `SharedCache`). Layouts, for worker A of A and B:

    contiguous    [common, B, A]                                      every worker one growing block
    interleaved   [common, A]                                         a finished step of anybody moves to `common`
    combined      [common, "others", B's step, "own", A's step]       both: B's unfinished step is read while it grows
    private       [common, A]                                         nothing is shared: plain decoding, the control

A step is finished when a paragraph ends behind the end of a sentence; the worker's block is then turned and appended to
`common`, in finishing order, and the worker opens its next step with its name. Now and then that opening asks whether the work
is redundant. Blocks may be packed (`bits`): the common one, and with it the history of finished steps, and a worker's own in the
layouts in which it is never moved; the quantiser is the one of zipcache, per channel for keys and per token for values.

Axes: W workers, H query heads, N new columns, V vocabulary. Paper: arXiv:2504.06261.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, final

import torch
from torch import Tensor

from qkv.caches._stores.codecs import BITS
from qkv.caches._stores.shared import CacheBlock, Form, SharedCache
from qkv.core.cache import Rope
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
from qkv.core.errors import InvalidInput, Refused
from qkv.core.site import Site
from qkv.core.spec import Limit, param
from qkv.decode._common.accept import take
from qkv.hosts import attending
from qkv.hosts import sites as sites_of

Layout = Literal["contiguous", "interleaved", "combined", "private"]
NAMES = ("Alice", "Bob", "Carol", "Dave", "Erin", "Frank", "Grace", "Heidi")
OPENING = "**{name} [{step}]:**"
CHECK = " Is anybody else already doing this? (yes/no):"
OTHERS, OWN = "Steps that others are still writing:\n\n", "The step being written now:\n\n"
FINISH = "\n\nThe time is over. From all of the above, the final answer is:"


class Moment(NamedTuple):
    """One step as `watch` sees it: the workers that took part, what each fed, and logits ``[workers, V]`` after it."""

    step: int
    workers: tuple[int, ...]
    fed: tuple[tuple[int, ...], ...]
    logits: Tensor


# -- the model --------------------------------------------------------------------------------------------------------


def ropes_of(model: Any, sites: Sequence[Site]) -> tuple[Rope, ...]:
    """The rotary embedding of every site, equal ones as one object. Raises `Refused` where blocks cannot be moved."""
    ropes: list[Rope] = []
    for site in sites:
        rope = site.geometry.rope
        reason = site.reason
        if reason is None and (site.role != "self" or not site.causal):
            reason = f"it is a {site.role} attention, and workers extend causal text"
        if reason is None and site.window is not None:
            reason = (
                f"it has a sliding window of {site.window} tokens, and a block lies at another distance for each worker"
            )
        if reason is None and rope is None:
            reason = "it has no rotary embedding that qkv can read, so a block cannot stand at another position"
        if reason is None and rope is not None and not rope.fixed:
            reason = f"its rotary frequencies depend on the length ({rope.kind}), so stored keys cannot be moved"
        if reason is not None or rope is None:
            raise Refused(f"hogwild at {site.name} of {type(model).__name__}: {reason}")
        ropes.append(next((r for r in ropes if torch.equal(r.frequencies, rope.frequencies)), rope))
    return tuple(ropes)


class Engine:
    """A model whose attention reads a `SharedCache`; use it as a context."""

    def __init__(self, model: Any) -> None:
        """Raises `Refused` for a model that cannot share blocks."""
        self.model, self.sites = model, sites_of(model)
        self.ropes = ropes_of(model, self.sites)
        self.layers = {site.name: i for i, site in enumerate(self.sites)}
        self.shared: SharedCache | None = None
        self.seen: list[Tensor] | None = None
        self.passes = 0
        forward = inspect.signature(model.forward).parameters
        self.last = {"logits_to_keep": 1} if "logits_to_keep" in forward else {}
        self._open = attending(model, self._attention)

    def __enter__(self) -> Engine:
        self._open.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._open.__exit__(*error)

    def block(self, bits: int = 16, group: int = 128) -> CacheBlock:
        """An empty block for this model."""
        return CacheBlock(self.ropes, bits, group)

    def _attention(self, site: Site, q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
        if self.seen is not None:
            self.seen.append(k)
            return v.new_zeros(*q.shape[:3], v.shape[-1])
        assert self.shared is not None
        return self.shared.attend(self.layers[site.name], q, k, v, scale)

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        out = self.model(
            input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions, use_cache=False, **self.last
        )
        return out.logits[:, -1]

    @torch.no_grad()
    def probe(self, apart: int = 3) -> None:
        """`Refused` unless the first site's key of a token moves with its position as its rotary embedding says."""
        device, self.seen = self.model.device, []
        try:
            self._forward(
                torch.zeros(2, 1, dtype=torch.int64, device=device), torch.tensor([[0], [apart]], device=device)
            )
            near, far = self.seen[0].split(1)
        finally:
            self.seen = None
        moved = self.ropes[0].rotate(near, torch.full((1, 1, 1), apart, device=device))
        gap, size = float((moved - far).abs().max()), float(far.abs().max())
        if not gap <= 0.05 * size:
            raise Refused(f"{type(self.model).__name__} does not place its keys by a rotation of halves (a key moved by "
                          f"{apart} positions is off by {gap:.3g} of {size:.3g}); a block cannot stand elsewhere")  # fmt: skip

    @torch.no_grad()
    def step(self, shared: SharedCache, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Feed each worker of `shared` its tokens; logits ``[workers, V]`` behind them."""
        device, counts = self.model.device, [len(t) for t in tokens]
        n = max(counts)
        positions = shared.begin(counts, device, self.model.dtype)
        ids = torch.tensor([[0] * (n - len(t)) + list(t) for t in tokens], device=device)
        self.shared = shared
        try:
            logits = self._forward(ids, positions)
        finally:
            self.shared = None
        shared.commit()
        self.passes += 1
        return logits


# -- workers ----------------------------------------------------------------------------------------------------------


@dataclass
class Worker:
    """One writer. line: what it has written. step: since its last opening. feed: what it feeds next. forced: written first."""

    number: int
    name: str
    block: CacheBlock
    feed: list[int]
    forced: list[int]
    line: list[int]
    step: list[int]
    count: int = 1
    checked: int = 0
    closing: bool = False
    over: bool = False


@dataclass
class Talk:
    """What is said around the workers' own tokens, and which of them they may not write."""

    ends: Callable[[list[int]], bool]
    opening: Callable[[Worker, bool], list[int]]
    headers: tuple[list[int], list[int]]
    forbid: list[int]
    text: Callable[[Iterable[int]], str] | None


def sentence_ends(tokenizer: Any) -> Callable[[list[int]], bool]:
    """Whether a step ``[tokens]`` has just ended: a paragraph break behind the end of a sentence."""

    def ends(step: list[int]) -> bool:
        if "\n" not in tokenizer.decode(step[-1:]):
            return False
        tail = tokenizer.decode(step[-8:])
        said = tail.rstrip()
        return "\n\n" in tail[len(said) :] and said.rstrip("\"'*)]»”’")[-1:] in tuple(".!?:")

    return ends


def never_written(tokenizer: Any) -> list[int]:
    """Tokens that would break the frame: headings, the ends of text and of thinking."""
    vocabulary = tokenizer.get_vocab()
    marks = [i for token, i in vocabulary.items() if token.strip("Ġ▁ ") and not token.strip("Ġ▁ ").strip("#")]
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, vocabulary.get("</think>")]
    return sorted({*marks, *(i for i in special if i is not None)})


def _talk(
    tokenizer: Any, layout: Layout, names: Sequence[str], headers: bool, ends: Callable[[list[int]], bool] | None,
    openings: Sequence[Sequence[int]] | None, forbid: Sequence[int] | None,
) -> Talk:  # fmt: skip
    """The frame as tokens: from a tokenizer, or as given."""

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def opening(worker: Worker, check: bool) -> list[int]:
        if openings is not None:
            return list(openings[worker.number])
        text = OPENING.format(name=worker.name, step=worker.count) + CHECK * check
        return encode(text)

    words = tokenizer is not None
    if layout in ("contiguous", "private"):
        if ends is not None:
            raise InvalidInput(f"hogwild: layout={layout!r} has no steps that end; leave ends= out, or take 'combined'")
        ends = _never
    elif ends is None:
        ends = sentence_ends(tokenizer) if words else _never
    some = (encode(OTHERS), encode(OWN)) if words and headers and layout == "combined" else ([], [])
    if forbid is None:
        forbid = never_written(tokenizer) if words and layout != "private" else ()
    text = None if not words else lambda tokens: tokenizer.decode(list(tokens), skip_special_tokens=True)
    return Talk(ends, opening, some, list(forbid), text)


def _never(step: list[int]) -> bool:
    return False


class _Room:
    """Where the workers are: the blocks, what each reads, and the history of finished steps."""

    def __init__(
        self, engine: Engine, layout: Layout, form: Form, talk: Talk, packing: tuple[int, int] = (16, 128)
    ) -> None:
        """packing: bits and group of the blocks that only grow; what is moved later stays as it is."""
        self.engine, self.talk = engine, talk
        self.layout: Layout = layout
        self.form: Form = form
        self.common, self.others, self.own = (engine.block(*packing) for _ in range(3))
        self.packing = packing if layout in ("contiguous", "private") else (16, packing[1])
        self.workers: list[Worker] = []
        self.history: list[tuple[int, list[int]]] = []

    def prepare(self, common: Sequence[int]) -> Tensor | None:
        """Absorb the common prompt and the headers; logits ``[1, V]`` behind the prompt, if there is one."""
        logits = None
        if common:
            logits = self.engine.step(SharedCache([[self.common]], [self.common], self.form), [common])
        before = [self.common] if common else []
        for block, tokens in zip((self.others, self.own), self.talk.headers, strict=True):
            if tokens:
                self.engine.step(SharedCache([[*before, block]], [block], self.form), [tokens])
                before.append(block)
        return logits

    def reads(self, worker: Worker) -> list[CacheBlock]:
        """The blocks that a worker reads, in order, its own last."""
        rest = [w.block for w in self.workers if w is not worker]
        if self.layout in ("interleaved", "private"):
            return [self.common, worker.block]
        if self.layout == "contiguous":
            return [self.common, *rest, worker.block]
        return [self.common, self.others, *rest, self.own, worker.block]

    def shared(self, workers: Sequence[Worker]) -> SharedCache:
        """The cache of a step in which these workers take part."""
        return SharedCache([self.reads(w) for w in workers], [w.block for w in workers], self.form)

    def finish(self, worker: Worker, check_every: int) -> None:
        """A worker's step is over: it becomes history, and the next one is opened."""
        self.common.append_from(worker.block)
        worker.block.clear()
        self.history.append((worker.number, worker.step))
        worker.count += 1
        due = check_every > 0 and len(worker.line) - worker.checked >= check_every
        if due:
            worker.checked = len(worker.line)
        worker.closing, worker.step = False, []
        worker.feed = self.talk.opening(worker, due)

    def tokens(self) -> int:
        """Tokens that the worker who reads most has before it."""
        return max(sum(b.length for b in self.reads(w)) for w in self.workers)

    def bytes(self) -> int:
        """Bytes of all blocks."""
        return sum(b.bytes() for b in (self.common, self.others, self.own, *(w.block for w in self.workers)))


# -- generation -------------------------------------------------------------------------------------------------------


def hogwild_generate(
    model: Any,
    prompts: str | Tensor | Sequence[str | Sequence[int]],
    *,
    workers: int = 2,
    layout: Layout = "combined",
    max_steps: int,
    common: str | Sequence[int] | None = None,
    tokenizer: Any = None,
    **more: Any,
) -> Generated:
    """`Hogwild.generate` on texts: one prompt that all workers share, or a prompt for each of `workers`.

    max_steps: tokens that each worker writes. common: a text before the workers' own prompts. tokenizer: needed for texts; with
    it, steps have openings and ends. more: keywords of `Hogwild.generate`, and parameters of `Hogwild`.
    """

    def ids(text: Any) -> list[int]:
        if isinstance(text, str):
            if tokenizer is None:
                raise InvalidInput("hogwild: prompts that are text need tokenizer=")
            return list(tokenizer(text)["input_ids"])
        return [int(i) for i in text]

    if isinstance(prompts, Tensor) and prompts.ndim == 2:
        rows = [ids(row) for row in prompts]
    else:
        one = isinstance(prompts, (str, Tensor)) or (len(prompts) > 0 and isinstance(prompts[0], int))
        rows = [ids(prompts)] if one else [ids(p) for p in prompts]
    if not rows or not all(rows):
        raise InvalidInput("hogwild: every prompt needs at least one token")
    own = {name: more.pop(name) for name in ("form", "check_every", "bits", "group") if name in more}
    width = max(map(len, rows))
    batch = torch.tensor([[0] * (width - len(r)) + r for r in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=model.device)
    return Hogwild(workers=workers, layout=layout, **own).generate(
        model, batch, max_new_tokens=max_steps, attention_mask=mask, tokenizer=tokenizer,
        common=None if common is None else ids(common), **more,
    )  # fmt: skip


@final
@dataclass(frozen=True, kw_only=True)
class Hogwild(Decoding):
    """Workers on one concurrent cache."""

    spec: ClassVar[DecodingSpec] = DecodingSpec(
        id="hogwild",
        title="Hogwild! Inference: Parallel LLM Generation via Concurrent Attention",
        paper="arXiv:2504.06261",
        source="code",
        summary="Several workers of one model write at once into shared cache blocks, and read each other's tokens immediately.",
        shown="a worker picks up a code word that another one writes, with the shared blocks and not without; tokens per second "
        "grow with the number of workers",
        honest="whether workers help each other is up to the model: small ones do not collaborate, they only see what is written",
        limits=(Limit("full", {"layout": "private"}, "nothing shared: each worker decodes by itself"),),
        samples=True,
        use="out = m.generate(model, input_ids, max_new_tokens=100, tokenizer=tokenizer)   # one prompt, shared by the workers",
        example=lambda model: {"plain": {}},
        trials=({}, {"form": "keys"}, {"layout": "contiguous"}, {"layout": "interleaved"}),
    )
    workers: int = param(2, "workers that write at once", low=1)
    layout: Literal["contiguous", "interleaved", "combined", "private"] = param(
        "combined", "what a worker reads, see the module"
    )
    form: Literal["queries", "keys"] = param(
        "queries", "what is turned to a block's place: the queries, or (the definition, slower) its keys"
    )
    check_every: int = param(256, "tokens after which a worker is asked whether its work is redundant; 0: never", low=0)
    bits: int = param(16, "bits of an element of blocks that only grow: the common one, and each worker's own unless it is moved "
                      "when a step ends (16: as it is)", choices=BITS)  # fmt: skip
    group: int = param(128, "tokens that are packed together, when as many newer ones remain", low=1)

    @torch.no_grad()
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
        common: Sequence[int] | Tensor | None = None,
        tokenizer: Any = None,
        names: Sequence[str] = NAMES,
        headers: bool = True,
        openings: Sequence[Sequence[int]] | None = None,
        ends: Callable[[list[int]], bool] | None = None,
        forbid: Sequence[int] | None = None,
        forced: Mapping[int, Sequence[int]] | None = None,
        answered: Callable[[str], bool] | None = None,
        finish: str | None = None,
        finish_tokens: int = 32,
        watch: Callable[[Moment], None] | None = None,
    ) -> Generated:
        """Let the workers write `max_new_tokens` each. One row ``[1, T]`` is shared by all; ``[workers, T]`` gives each its own.

        common: tokens before everything, read by all. tokenizer: makes openings (``**Alice [1]:**``), headers of the combined
        layout (unless headers=False), the end of a step and the forbidden tokens; without it pass openings, ends (given the
        tokens of a step: is it over?) and forbid, or have none. forced: tokens that a worker writes before it chooses itself.
        answered: ends everything when it says so of the text written so far (asked after every finished step). finish: words
        that ask for the answer when the tokens are spent (default wording with ``finish=""``); `finish_tokens` more are then
        written by the first worker.

        Sequences: a row per worker, its prompt and what it wrote itself, without openings. Notes: names, history (worker and
        tokens of each finished step, in order), answer, bytes, ended (why). Raises `InvalidInput` and `Refused`.
        """
        began = time.perf_counter()
        shared_text = [] if common is None else [int(i) for i in common]
        real = self._check(model, input_ids, attention_mask, max_new_tokens, shared_text)
        rows = [row[m].tolist() for row, m in zip(input_ids, real, strict=True)]
        engine = Engine(model)
        names = [names[i] if i < len(names) else f"Worker {i + 1}" for i in range(self.workers)]
        talk = _talk(tokenizer, self.layout, names, headers, ends, openings, forbid)
        together = len(rows) == 1 and self.workers > 1
        if together and tokenizer is None and openings is None:
            raise InvalidInput(f"hogwild: one prompt for {self.workers} workers needs tokenizer= (or openings=), so that each "
                               "has an opening of its own; or give every worker a row")  # fmt: skip
        if (answered is not None or finish is not None) and tokenizer is None:
            raise InvalidInput("hogwild: answered= and finish= are about text: pass tokenizer=")
        stops, dice = end_tokens(eos_token_id), generator_of(seed, model.device)
        with engine:
            engine.probe()
            room = _Room(engine, self.layout, self.form, talk, (self.bits, self.group))
            for i in range(self.workers):
                script = list((forced or {}).get(i, ()))
                worker = Worker(i, names[i], engine.block(*room.packing), [], script, [], [])
                worker.feed = talk.opening(worker, False) if together else rows[i]
                if not worker.feed:
                    raise InvalidInput(f"hogwild: the opening of worker {i} holds no token")
                room.workers.append(worker)
            room.prepare([*shared_text, *rows[0]] if together else shared_text)
            ended = self._write(room, max_new_tokens, sampling, dice, stops, answered, progress, watch)
            answer = None
            if finish is not None and ended != "answered":
                answer = self._ask(room, finish or FINISH, tokenizer, finish_tokens, sampling, dice)
        whole = input_ids.expand(self.workers, -1) if together else input_ids
        sequences, lengths = joined(whole, [w.line for w in room.workers], stops)
        notes = {
            "names": names, "history": [(n, list(t)) for n, t in room.history], "answer": answer, "bytes": room.bytes(),
            "ended": ended, "written": sum(len(w.line) for w in room.workers),
        }  # fmt: skip
        return Generated(sequences, input_ids.shape[1], lengths, engine.passes, time.perf_counter() - began, notes)

    def _check(self, model: Any, ids: Any, mask: Any, new: Any, common: list[int]) -> Tensor:
        """The mask ``[B, T]`` of the prompts, or what is wrong with them."""
        rows = ids.shape[0] if isinstance(ids, Tensor) and ids.ndim == 2 else 1
        extra = len(common)
        if self.layout != "private" and isinstance(new, int) and rows == self.workers:
            extra += (self.workers - 1) * new + (int(ids.numel()) - ids.shape[1] if ids.ndim == 2 else 0)
        elif self.layout != "private" and isinstance(new, int):
            extra += (self.workers - 1) * new
        real = check_prompt("hogwild", model, ids, mask, new, extra=extra)
        if rows not in (1, self.workers):
            raise InvalidInput(
                f"hogwild: {rows} prompts for workers={self.workers}; give one that all share, or one for each"
            )
        if common and not 0 <= min(common) <= max(common) < model.config.get_text_config().vocab_size:
            raise InvalidInput("hogwild: common= holds token ids outside the model's vocabulary")
        return real

    def _write(
        self, room: _Room, new: int, sampling: Sampling, dice: torch.Generator | None, stops: frozenset[int],
        answered: Callable[[str], bool] | None, progress: Progress | None, watch: Callable[[Moment], None] | None,
    ) -> str:  # fmt: skip
        """The loop; why it ended."""
        config = room.engine.model.config.get_text_config()
        reach, talk, step = getattr(config, "max_position_embeddings", None), room.talk, 0
        forbidden = torch.tensor(talk.forbid, dtype=torch.int64, device=room.engine.model.device)
        while active := [w for w in room.workers if not w.over]:
            if reach is not None and room.tokens() + sum(len(w.feed) for w in active) > reach:
                return "positions"
            fed = tuple(tuple(w.feed) for w in active)
            logits = room.engine.step(room.shared(active), fed)
            if watch is not None:
                watch(Moment(step, tuple(w.number for w in active), fed, logits))
            if len(forbidden):
                logits = logits.index_fill(1, forbidden, -torch.inf)
            drawn = take(logits, sampling, dice).tolist()
            moved = False
            for worker, token in zip(active, drawn, strict=True):
                if worker.closing:
                    room.finish(worker, self.check_every)
                    moved = True
                    continue
                token = worker.forced.pop(0) if worker.forced else token
                worker.line.append(token)
                worker.step.append(token)
                worker.feed = [token]
                worker.over = len(worker.line) >= new or token in stops
                worker.closing = not worker.over and talk.ends(worker.step)
            step += 1
            if progress is not None:
                progress(
                    min(len(w.line) for w in room.workers), new, f"{sum(len(w.line) for w in room.workers)} tokens"
                )
            if answered is not None and moved and answered(self._text(room)):
                return "answered"
        return "answered" if answered is not None and answered(self._text(room)) else "written"

    @staticmethod
    def _text(room: _Room) -> str:
        """Everything written so far: history, then the steps that are open."""
        assert room.talk.text is not None
        return room.talk.text(
            [t for _, tokens in room.history for t in tokens] + [t for w in room.workers for t in w.step]
        )

    def _ask(
        self, room: _Room, words: str, tokenizer: Any, count: int, sampling: Sampling, dice: torch.Generator | None
    ) -> str:
        """The first worker is asked for the answer and writes it alone, reading all that is there."""
        worker, line = room.workers[0], []
        # The newest token of a worker that is over has not been fed yet.
        feed = [*worker.feed, *tokenizer(words, add_special_tokens=False)["input_ids"]]
        for _ in range(count):
            token = int(take(room.engine.step(room.shared([worker]), [feed]), sampling, dice)[0])
            if token == tokenizer.eos_token_id:
                break
            line.append(token)
            feed = [token]
        return tokenizer.decode(line, skip_special_tokens=True)
