r"""Duo gates: one gate per KV head, learned on the frozen model, that says whether the head needs the whole context.

    O_h = alpha_j Full_h + (1 - alpha_j) Stream_h,     h a query head of KV head j
    Stream: query i sees key m:   m < sinks  or  i - m < recent
    L   = mean over labelled positions of mean_d (h_T - h_S)^2  +  lambda mean |alpha|

h_T is the final normalised hidden state of the model itself, h_S that of the model with mixed heads; alpha starts at 1 and is
clamped to [0, 1] after every step. Gates near 1 belong to retrieval heads; the cache method duoattention uses them.

Data: several sequences of random words hidden in a long text, asked for at its end; the loss counts questions and answers.
``full_source="student"`` takes Full_h from the mixed model's own hidden states, which is what is deployed; ``"teacher"`` takes
the unmodified model's outputs, as the paper's code does.

Axes: L layers, B batch, H query heads, G key/value heads, N queries, M keys. Paper: arXiv:2410.10819, with its code.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from qkv.core.errors import InvalidInput, Refused, TrainingError
from qkv.core.heads import HeadTable
from qkv.core.probe import Probe, ProbeSpec, Progress, Scene
from qkv.core.site import Site
from qkv.core.spec import param
from qkv.core.training import frozen
from qkv.hosts import applied, observe, sites
from qkv.probes._mixture import Mixed
from qkv.probes._needle import FILLER, encode

PAPER_LENGTHS, QUICK_LENGTHS = (1000, 32000), (512, 1536)
WORDS = (
    "alpha bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november oscar papa quebec romeo sierra "
    "tango uniform victor whiskey xray yankee zulu"
).split()
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")


def reference(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, *, sinks: int, recent: int, scale: float | None = None
) -> Tensor:
    """The mixed attention ``[B, H, N, E]`` of one layer; q ``[B, H, N, D]``, k, v ``[B, G, M, .]``, gates ``[G]``."""
    n, m, r = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    i, j = torch.arange(m - n, m, device=q.device)[:, None], torch.arange(m, device=q.device)
    near = (j <= i) & ((j < sinks) | (i - j < recent))
    logits = q @ k.repeat_interleave(r, 1).mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    full, stream = (logits.masked_fill(~mask, -torch.inf).softmax(-1) for mask in (j <= i, near))
    a = gates.repeat_interleave(r)[:, None, None]
    return (a * full + (1 - a) * stream) @ v.repeat_interleave(r, 1)


def multi_passkey(
    tokenizer: Any, haystack: Sequence[int], length: int, *, needles: int, words: int, draw: random.Random
) -> dict[str, Tensor]:
    """One training text of `length` tokens: `input_ids` ``[1, T]``, and `labels` that are -100 outside questions and answers.

    haystack: token ids, repeated where too short. Raises `InvalidInput` when the needles leave no room.
    """
    hidden, asked = [], []
    for i in range(needles):
        name = ORDINALS[i] if i < len(ORDINALS) else f"{i + 1}th"
        key = " ".join(draw.choice(WORDS) for _ in range(words))
        hidden.append(
            encode(tokenizer, f"\nRemember this sequence of words, it is the {name} pass key to the vault: {key}.\n")
        )
        asked.append(
            encode(tokenizer, f"\nWhat is the {name} pass key to the vault?\nThe {name} pass key is: {key}.\n")
        )
    question = [token for ids in asked for token in ids]
    bos = getattr(tokenizer, "bos_token_id", None)
    head = [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []
    room = length - len(head) - len(question) - sum(map(len, hidden))
    if room < 1 or not haystack:
        raise InvalidInput(
            f"duo-gates: {needles} needles of {words} words take {length - room} of {length} tokens, so no text is left to hide "
            "them in; use longer lengths, fewer needles or fewer words"
        )
    start = draw.randrange(max(1, len(haystack) - room))
    context = list(haystack[start : start + room])
    while len(context) < room:
        context += haystack[: room - len(context)]
    depths = sorted((50 + draw.randrange(901)) / 1000 for _ in range(needles))
    ids, last = list(head), 0
    order = draw.sample(range(needles), needles)
    for depth, which in zip(depths, order, strict=True):
        at = int(depth * room)
        ids += context[last:at] + hidden[which]
        last = at
    ids += context[last:]
    labels = [-100] * len(ids) + question
    return {"input_ids": torch.tensor([ids + question]), "labels": torch.tensor([labels])}


def _batches(data: Any) -> list[dict[str, Tensor]]:
    """Training texts, checked. Raises `InvalidInput`."""
    if isinstance(data, (Tensor, Mapping, str)) or not isinstance(data, Iterable):
        raise InvalidInput(f"duo-gates: data= must be an iterable of model inputs (dicts), got {type(data).__name__}")
    out = []
    for i, batch in enumerate(data):
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if not isinstance(ids, Tensor) or ids.ndim != 2 or 0 in ids.shape or ids.is_floating_point():
            raise InvalidInput(f"duo-gates: batch {i} of data= must hold token numbers input_ids [B, T]")
        labels = batch.get("labels")
        if labels is not None and (labels.shape != ids.shape or not bool((labels != -100).any())):
            raise InvalidInput(
                f"duo-gates: batch {i}: labels must have the shape of input_ids {tuple(ids.shape)} and mark some position "
                f"(-100 marks none); got {tuple(labels.shape)}"
            )
        mask = batch.get("attention_mask")
        if mask is not None and not bool(mask.all()):
            raise InvalidInput(f"duo-gates: batch {i} is padded; give texts of one length, or one text a batch")
        out.append({"input_ids": ids} | ({} if labels is None else {"labels": labels}))
    if not out:
        raise InvalidInput("duo-gates: data= is empty")
    return out


def _final(model: Any, ids: Tensor, whole: bool) -> Tensor:
    """The final hidden state ``[B, T, W]`` after the last normalisation. whole: run the model with its head, too."""
    base = model.base_model
    if base is model:  # no head to leave out
        return model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[-1].float()
    if not whole:
        return base(input_ids=ids, use_cache=False).last_hidden_state.float()
    few = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    seen: list[Tensor] = []
    handle = base.register_forward_hook(lambda module, args, out: seen.append(out.last_hidden_state))
    try:
        model(input_ids=ids, use_cache=False, **few)
    finally:
        handle.remove()
    return seen[-1].float()


# -- what the laws run ----------------------------------------------------------------------------------------------


def _example(model: Any) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 60, (1, 23), generator=draw)} for _ in range(2)]


def _scene(says: str, reads: int, want: float, at: tuple[int, int], shape: tuple[int, int]) -> Scene:
    """One head writes what stands `reads` tokens before its query; the others write nothing."""
    layer, head = at
    length = 24
    even = torch.ones(length, length, dtype=torch.float64).tril()
    maps = (even / even.sum(-1, keepdim=True)).expand(*shape, length, length).clone()
    maps[at] = 0.0
    for q in range(length):
        maps[layer, head, q, max(0, q - reads)] = 1.0
    tokens = list(range(3, 3 + length))

    def edit(model: Any) -> None:
        group = shape[1] // model.config.num_key_value_heads
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            attention = model.layers[layer]
            attention.value[head // group].copy_(torch.randn(length, length, generator=draw, dtype=torch.float64))
            attention.out[head].copy_(10 * torch.eye(length, dtype=torch.float64))

    scores = torch.zeros(shape, dtype=torch.float64)
    scores[at] = want
    data = [{"input_ids": torch.tensor([tokens])}]
    return Scene(says, maps, tokens, {"data": data}, scores, atol=0.05, edit=edit)


def _planted(layer: int, head: int, layers: int, heads: int) -> Scene:
    return _scene("writes what stands far back", 12, 1.0, (layer, head), (layers, heads))


def _known() -> list[Scene]:
    return [_scene("writes what stands nearby", 2, 0.0, (1, 2), (2, 4)), _planted(0, 1, 2, 4)]


def train_duo_gates(model: Any, data: Any, **settings: Any) -> HeadTable:
    """Gates ``[L, G]`` of a model from ready training texts; settings are the parameters of the probe duo-gates."""
    return DuoGates(**settings).run(model, data=data)


@final
@dataclass(frozen=True, kw_only=True)
class DuoGates(Probe):
    """Learn which KV heads need the whole context."""

    spec: ClassVar[ProbeSpec] = ProbeSpec(
        id="duo-gates",
        title="DuoAttention: learned gates of retrieval and streaming heads",
        paper="arXiv:2410.10819",
        source="code",
        summary="Learns one gate per KV head: does the model change when the head sees only sinks and a window?",
        shown="gates spread between 0 and 1, and the half with the largest gates keeps the pass key",
        honest="it sees the heads that its training texts need: literal recall of hidden words",
        planted=_planted,
        known=_known,
        example=lambda model: {"data": _example(model)},
        trials=({"steps": 25, "learning_rate": 0.1, "sinks": 2, "recent": 5},),
    )
    steps: int = param(2000, "training steps, one text each", low=1)
    learning_rate: float = param(0.02, "of AdamW; a tenth of it in the first and the last step", low=0.0)
    penalty: float = param(0.05, "weight of mean |gate|", low=0.0)
    sinks: int = param(128, "first tokens that a streaming head sees", low=0)
    recent: int = param(256, "recent tokens that a streaming head sees, its own included", low=1)
    lengths: tuple[int, ...] = param(
        (), "shortest and longest text in tokens; (): 1000 to 32000, `inspect`: 512 to 1536", low=16
    )
    intervals: int = param(50, "different lengths drawn between the two", low=1)
    needles: int = param(10, "sequences hidden in a text", low=1)
    words: int = param(32, "words of a sequence", low=1)
    full_source: Literal["student", "teacher"] = param("student", "whose attention is the full part of the mixture")
    seed: int = param(0, "of the texts", low=0)

    def run(
        self,
        model: Any,
        tokenizer: Any = None,
        text: str | None = None,
        *,
        data: Any = None,
        progress: Progress | None = None,
    ) -> HeadTable:
        """``[L, G]`` gates. tokenizer and text (the haystack): what to make training texts of; or data: ready ones, model
        inputs (dicts with `input_ids` ``[B, T]``, and `labels` that are -100 where the loss does not count).

        NaN: a layer whose cache cannot be split (a sliding window). Raises `InvalidInput`, `Refused`, `TrainingError`.
        """
        watched = self._sites(model)
        device = next(model.parameters()).device
        texts = iter(self.texts(model, tokenizer, text)) if data is None else self._cycle(_batches(data))
        layers = max(watched[0].geometry.layers, *(s.layer + 1 for s in watched))  # type: ignore[operator]
        heads = max(s.kv_heads for s in watched)
        gates = torch.ones(layers, heads, device=device, requires_grad=True)
        used = torch.zeros(layers, heads, dtype=torch.bool, device=device)
        for site in watched:
            used[site.layer, : site.kv_heads] = True  # type: ignore[index]
        optimizer = torch.optim.AdamW([gates], lr=self.learning_rate, weight_decay=0.0)
        where, records = [s.name for s in watched], []
        with frozen(model):
            for step in range(self.steps):
                for group in optimizer.param_groups:
                    group["lr"] = self.learning_rate * self.rate(step)
                batch = {name: x.to(device) for name, x in next(texts).items()}
                distill = self.loss(model, batch, gates, where)
                cost = gates[used].abs().mean()
                optimizer.zero_grad()
                with torch.enable_grad():
                    (distill + self.penalty * cost).backward()
                if not bool(torch.isfinite(distill)):
                    raise TrainingError(
                        f"duo-gates: the loss is {float(distill)} at step {step}; is the model in half precision?"
                    )
                optimizer.step()
                with torch.no_grad():
                    gates.clamp_(0.0, 1.0)
                if step % max(1, self.steps // 20) == 0 or step == self.steps - 1:
                    records.append(
                        {"step": step, "distill": float(distill.detach()), "mean gate": float(cost.detach())}
                    )
                if progress is not None:
                    progress(
                        step + 1,
                        self.steps,
                        f"loss {float(distill.detach()):.3g}, mean gate {float(cost.detach()):.3f}",
                    )
        values = gates.detach().double().masked_fill(~used, torch.nan)
        notes = {"method": self.to_dict(), "sinks": self.sinks, "recent": self.recent}
        group = watched[0].heads // watched[0].kv_heads
        return HeadTable(values, "duo gate", "kv_head", group, tuple(records), notes)

    def look(self, model: Any, tokenizer: Any, text: str | None, progress: Progress | None) -> HeadTable:
        """See `Probe.inspect`: words hidden in `text`, or in repeated filler; on short texts unless lengths are configured,
        with as few needles, words and steps as those have room for.
        """
        quick: Any = self
        if not self.lengths:
            few = {"steps": min(self.steps, 300), "needles": min(self.needles, 4), "words": min(self.words, 8)}
            quick = self.replace(lengths=QUICK_LENGTHS, sinks=min(self.sinks, 64), **few)
        return quick.run(model, tokenizer, FILLER if text is None else text, progress=progress)

    # -- steps ----------------------------------------------------------------------------------------------------

    def rate(self, step: int) -> float:
        """The learning rate's factor: up from a tenth over the first fifth, down to a tenth over the last."""
        edge = max(1, round(0.2 * self.steps))
        return min(1.0, 0.1 + 0.9 * step / edge, 0.1 + 0.9 * (self.steps - 1 - step) / edge)

    def loss(self, model: Any, batch: Mapping[str, Tensor], gates: Tensor, where: Any = "all") -> Tensor:
        """L_distill of one batch under `gates` ``[L, G]``; gradients reach the gates alone where the model is frozen."""
        full: dict[int, Tensor] = {}

        def note(site: Site, call: Any) -> None:
            full[site.layer] = call.out.detach()  # type: ignore[index]

        ids = batch["input_ids"]
        with torch.no_grad(), observe(model, note, where=where) if self.full_source == "teacher" else nullcontext():
            taught = _final(model, ids, whole=True)
        mixed = Mixed(gates=gates, sinks=self.sinks, recent=self.recent, full=full or None)
        with applied(model, mixed, where=where), torch.enable_grad():
            learned = _final(model, ids, whole=False)
        error = (taught - learned).square().mean(-1)  # [B, T]
        labels = batch.get("labels")
        return error.mean() if labels is None else error[labels != -100].mean()

    def texts(self, model: Any, tokenizer: Any, text: str | None) -> Iterator[dict[str, Tensor]]:
        """Training texts without end. Raises `InvalidInput`."""
        if tokenizer is None or text is None or not text.strip():
            raise InvalidInput("duo-gates needs a tokenizer and a text to hide words in, or ready `data`")
        low, high = min(self.lengths or PAPER_LENGTHS), max(self.lengths or PAPER_LENGTHS)
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if isinstance(limit, int) and high > limit:
            raise InvalidInput(
                f"duo-gates: texts of {high} tokens exceed the model's {limit} positions; configure `lengths`"
            )
        haystack = encode(tokenizer, text[: 64 * high])
        draw = random.Random(self.seed)
        while True:
            length = low + (high - low) * draw.randrange(self.intervals) // max(1, self.intervals - 1)
            yield multi_passkey(tokenizer, haystack, length, needles=self.needles, words=self.words, draw=draw)

    @staticmethod
    def _cycle(batches: Sequence[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        while True:
            yield from batches

    def _sites(self, model: Any) -> list[Site]:
        """The causal attention sites with a full cache; at least one."""
        found = [s for s in sites(model) if s.cached]
        usable = [s for s in found if s.reason is None and s.window is None]
        if not usable:
            why = (
                f"{found[0].name}: {found[0].reason or 'it has a sliding window'}"
                if found
                else "it has no cached attention"
            )
            raise Refused(f"duo-gates needs full causal attention; {type(model).__name__} does not serve: {why}")
        if getattr(model.config, "is_encoder_decoder", False):
            raise Refused(f"duo-gates trains on decoder-only models; {type(model).__name__} has an encoder")
        return usable
