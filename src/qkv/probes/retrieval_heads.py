r"""Retrieval heads: heads that put their largest weight on the very token of the context that is being copied.

    hit_t(h):   j* = argmax_j a_j  lies in the needle  and  token_{j*} = w_t,   a = A_h[last query of step t, :]
    score(h)  = |needle positions hit| / |needle|  per run,   mean over the runs whose answer was right

w_t is the token generated at step t: the head attends to what is about to be written (a copy), not to what follows a match.
Greedy decoding of needle-in-a-haystack prompts; only the last row of each map is formed, from the cached keys, in float32.

Axes: H query heads, G key/value heads, M cached keys, D head width, L layers.
Paper: Wu et al., arXiv:2404.15574, with its code. The needle is the answer part of the inserted text, as in the code.
Differences: a needle position counts once (`unique`, the paper's set; its code counts repeats); spans are known by
construction, the code searches a window of 90 % overlap (kept for prompts given as tokens); ROUGE-1 recall without stemming.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from qkv.core import registry
from qkv.core.errors import InvalidInput, Refused
from qkv.core.heads import HeadSet, HeadTable
from qkv.core.probe import Probe, ProbeSpec, Progress, Scene
from qkv.core.site import Site
from qkv.core.spec import param
from qkv.hosts import applied, observe, sites
from qkv.probes._needle import (
    FILLER,
    PASSKEYS,
    Needle,
    Prompt,
    encode,
    frame,
    needle_ids,
    rouge1_recall,
    sentence_end,
    unigrams,
)

PAPER_LENGTHS = tuple(round(1000 + i * 4000 / 19) for i in range(20))
PAPER_DEPTHS = tuple(i / 9 for i in range(10))
PAPER_TEMPLATE = "\nBased on the content of the book, Question: {question}\nAnswer:"
QUICK_LENGTHS, QUICK_DEPTHS, QUICK_TEMPLATE = (500, 1000), (0.1, 0.5, 0.9), "\n{question}"


def reference(rows: Tensor, ids: Sequence[int], span: tuple[int, int], token: int, *, top_k: int = 1) -> Tensor:
    """The definition of a hit: rows ``[H, M]`` of attention -> ``[H]`` the needle position each head copies from, or -1.

    The `top_k` largest weights are tried in order, equal weights from the lowest index; the first hit counts.
    """
    out = []
    for row in rows.tolist():
        order = sorted(range(len(row)), key=lambda j: (-row[j], j))[:top_k]
        hits = [j for j in order if span[0] <= j < span[1] and ids[j] == token]
        out.append(hits[0] if hits else -1)
    return torch.tensor(out)


def last_rows(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of the last query, in float32 or wider: q ``[B, H, N, D]``, k ``[B, G, M, D]`` -> ``[B, H, M]``."""
    b, h, _, d = q.shape
    g, m = k.shape[1:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    last = q[:, :, -1].to(wide).reshape(b, g, h // g, d) * scale
    logits = (last @ k.to(wide).mT).reshape(b, h, m)
    if mask is not None:
        row = mask[:, :, -1, :m]
        if row.shape[1] == g and g not in (1, h):
            row = row.repeat_interleave(h // g, 1)
        logits = logits.masked_fill(~row, -torch.inf)
    return logits.softmax(-1)


def hits(rows: Tensor, ids: Tensor, span: tuple[int, int], token: int, *, top_k: int = 1, offset: int = 0) -> Tensor:
    """`reference`, vectorised: rows ``[H, M]`` over the positions offset .. offset + M, ids ``[P]`` the prompt -> ``[H]``."""
    if top_k == 1:
        best = rows.argmax(-1, keepdim=True)  # the lowest index of equal weights
    else:
        best = rows.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    best = best + offset
    inside = (best >= span[0]) & (best < span[1])
    right = inside & (ids[best.clamp(max=len(ids) - 1)] == token)
    first = right.to(torch.int8).argmax(-1, keepdim=True)
    return best.gather(-1, first).masked_fill(~right.any(-1, keepdim=True), -1).squeeze(-1)


def activation_frequency(table: HeadTable) -> HeadTable:
    """Share of the counted runs in which a head scored above 0: near 1 for heads that always retrieve.

    table: what `RetrievalHeads.run` gave, per query head. Raises `InvalidInput` without records of counted runs.
    """
    runs = [r for r in table.records if r.get("counted") and isinstance(r.get("scores"), dict)]
    if not runs or table.unit != "head":
        raise InvalidInput("activation_frequency needs a retrieval table per query head with at least one counted run")
    values = torch.where(table.values.isnan(), torch.nan, 0.0).double()
    for run in runs:
        for l, h in HeadSet.of(run["scores"].keys()):
            values[l, h] += 1 / len(runs)
    return replace(table, values=values, name="share of runs with a retrieval score above 0")


def _checked_rows(site: Site, call: Any, total: int) -> Tensor:
    if call.q.shape[0] != 1:
        raise InvalidInput(f"retrieval-heads reads one prompt at a time, not a batch of {call.q.shape[0]}")
    m = call.k.shape[2]
    if m > total or (m < total and site.window is None):
        raise Refused(
            f"{site.name} attends to {m} keys after {total} tokens: its cache evicts or merges tokens, so positions in it are "
            "not positions in the prompt; revert that method first"
        )
    return last_rows(call.q, call.k, call.mask, call.scale)[0]


def _watched(model: Any) -> list[Site]:
    """The causal attention sites with a cache; at least one must be reachable."""
    found = [s for s in sites(model) if s.cached]
    usable = [s for s in found if s.reason is None]
    if not usable:
        why = f"{found[0].name}: {found[0].reason}" if found else "it has no causal attention with a cache"
        raise Refused(f"retrieval-heads needs a model that generates; {type(model).__name__} does not serve: {why}")
    if getattr(model.config, "is_encoder_decoder", False):
        raise Refused(f"retrieval-heads reads decoder-only models; {type(model).__name__} has an encoder")
    return usable


def _shape(model: Any, watched: Sequence[Site]) -> tuple[int, int, int]:
    """Layers, most heads of any layer, query heads per KV head (1 when layers differ)."""
    layers = max(watched[0].geometry.layers, *(s.layer + 1 for s in watched))  # type: ignore[operator]
    groups = {s.heads // s.kv_heads for s in watched}
    return layers, max(s.heads for s in watched), groups.pop() if len(groups) == 1 else 1


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end an answer."""
    out: set[int] = set()
    for source in (getattr(model, "generation_config", None), tokenizer):
        value = getattr(source, "eos_token_id", None)
        out |= set(value) if isinstance(value, (list, tuple)) else {value} if isinstance(value, int) else set()
    return out


# -- what the laws run ----------------------------------------------------------------------------------------------


def _example(model: Any) -> list[Prompt]:
    """Short prompts of random tokens."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 60, (2, 23), generator=draw).tolist()
    return [Prompt(ids=tuple(row), span=(5, 9), answer=tuple(map(str, row[5:9]))) for row in ids]


def _script(
    says: str, head_map: Callable[[int], Tensor], want: float, at: tuple[int, int], shape: tuple[int, int]
) -> Scene:
    """A model that copies tokens 4..8 of a 12-token prompt; one head's map is given, the others are even."""
    start, stop, length = 4, 8, 12
    tokens = list(range(10, 10 + length))
    written = [*tokens, *tokens[start:stop], *[3] * 46]
    total = len(written)
    even = torch.ones(total, total, dtype=torch.float64).tril()
    maps = (even / even.sum(-1, keepdim=True)).expand(*shape, total, total).clone()
    maps[at] = head_map(total)
    scores = torch.zeros(shape, dtype=torch.float64)
    scores[at] = want
    prompt = Prompt(ids=tuple(tokens), span=(start, stop), answer=tuple(map(str, tokens[start:stop])))
    return Scene(says, maps, written, {"prompts": [prompt]}, scores)


def _pointing(target: Callable[[int], int]) -> Callable[[int], Tensor]:
    """A map whose row q has all its mass on ``target(q)`` (at most q)."""

    def build(total: int) -> Tensor:
        out = torch.zeros(total, total, dtype=torch.float64)
        for q in range(total):
            out[q, max(0, min(q, target(q)))] = 1.0
        return out

    return build


def _scene(layer: int, head: int, layers: int, heads: int) -> Scene:
    """The query at position q writes token q + 1, which stands at q - 7 in the needle."""
    return _script("copies the needle", _pointing(lambda q: q - 7), 1.0, (layer, head), (layers, heads))


def _known() -> list[Scene]:
    at, shape = (1, 2), (2, 4)
    return [
        _scene(*at, *shape),
        _script("one position before the copied token", _pointing(lambda q: q - 8), 0.0, at, shape),
        _script("the previous token", _pointing(lambda q: q - 1), 0.0, at, shape),
        _script("the first token", _pointing(lambda q: 0), 0.0, at, shape),
        _script("right for half of the needle", _pointing(lambda q: q - 7 if q < 13 else 0), 0.5, at, shape),
    ]


@final
@dataclass(frozen=True, kw_only=True)
class RetrievalHeads(Probe):
    """Find the heads that copy from a long context."""

    spec: ClassVar[ProbeSpec] = ProbeSpec(
        id="retrieval-heads",
        title="Retrieval Head Mechanistically Explains Long-Context Factuality",
        paper="arXiv:2404.15574",
        source="code",
        summary="How often each head's largest weight lies on the needle token that the model is copying.",
        shown="a sparse table; without its top heads the model loses the needle, without as many others it does not",
        honest="it sees literal copying only, and needs a model that answers; heads that paraphrase score 0",
        planted=_scene,
        known=_known,
        example=lambda model: {"prompts": _example(model)},
        trials=({"new_tokens": 9}, {"new_tokens": 9, "unique": False, "top_k": 2}, {"new_tokens": 9, "by": "kv_head"}),
    )
    unique: bool = param(True, "count each needle position once in a run (False: every hit, as the paper's code)")
    top_k: int = param(1, "how many of a row's largest weights may be the hit", low=1)
    by: Literal["head", "kv_head"] = param("head", "score query heads, or KV heads by the best of their group")
    lengths: tuple[int, ...] = param(
        (),
        "prompt lengths in tokens; (): 20 from 1000 to 5000 (the paper goes to 50000), `inspect`: 500 and 1000",
        low=64,
    )
    depths: tuple[float, ...] = param(
        (),
        "where the needle goes, as shares of the context; (): 10 from 0 to 1, `inspect`: .1, .5, .9",
        low=0.0,
        high=1.0,
    )
    buffer: int = param(200, "tokens of a length left for question and answer", low=0)
    new_tokens: int = param(50, "tokens generated at most; a newline ends the answer", low=1)
    recall: float = param(
        50.0, "ROUGE-1 recall in percent that an answer must exceed for its run to count", low=0.0, high=100.0
    )
    template: str = param(
        "",
        "what follows the context, {question} filled in; '': as in the paper, `inspect`: the question alone",
    )
    chat: bool = param(False, "put the prompt into the tokenizer's chat template, the context in <book> tags")

    def run(
        self,
        model: Any,
        tokenizer: Any = None,
        haystack: str | None = None,
        needles: Sequence[Needle] = PASSKEYS,
        *,
        prompts: Sequence[Prompt] | None = None,
        progress: Progress | None = None,
    ) -> HeadTable:
        """``[L, H]`` retrieval scores; heads at 0.1 or more are retrieval heads. NaN: a layer without attention, or no run
        was answered.

        haystack: natural prose longer than the longest prompt (a shorter one is repeated). prompts: ready prompts instead of
        tokenizer, haystack and needles (unigrams of the reply are then token ids, unless a tokenizer is given). Every run
        is in `records`. Raises `InvalidInput`; `Refused` for models that do not generate and for caches that evict.
        """
        watched = _watched(model)
        if prompts is None:
            prompts = list(self.prompts(tokenizer, haystack, needles))
        if not prompts:
            raise InvalidInput("retrieval-heads: there are no prompts to run")
        layers, heads, group = _shape(model, watched)
        scores, records = [], []
        for done, prompt in enumerate(prompts, 1):
            said, found = self._one(model, tokenizer, prompt, watched, (layers, heads))
            score = self.score(found, prompt.span, (layers, heads))
            right = rouge1_recall(said[1], prompt.answer)
            counted = right > self.recall
            scores += [score] if counted else []
            records.append(dict(prompt.about) | {
                "tokens": len(prompt.ids), "span": list(prompt.span), "answer": " ".join(prompt.answer), "said": said[0],
                "recall": right, "counted": counted, "steps": len(found),
                "scores": {f"{l}.{h}": float(score[l, h]) for l, h in score.nonzero().tolist()},
            })  # fmt: skip
            if progress is not None:
                progress(done, len(prompts), f"{sum(r['counted'] for r in records)} of {done} answered")
        values = torch.stack(scores).mean(0) if scores else torch.full((layers, heads), torch.nan, dtype=torch.float64)
        here = {s.layer for s in watched}
        values[[l for l in range(layers) if l not in here]] = torch.nan
        for site in watched:
            values[site.layer, site.heads :] = torch.nan
        notes = {"method": self.to_dict(), "runs": len(records), "counted": len(scores)}
        table = HeadTable(values, "retrieval score", "head", group, tuple(records), notes)
        return table.by_kv_head() if self.by == "kv_head" else table

    def look(self, model: Any, tokenizer: Any, text: str | None, progress: Progress | None) -> HeadTable:
        """See `Probe.inspect`: pass keys in `text`, or in repeated filler, on a small grid unless one is configured."""
        quick = self.replace(
            lengths=self.lengths or QUICK_LENGTHS,
            depths=self.depths or QUICK_DEPTHS,
            template=self.template or QUICK_TEMPLATE,
        )
        assert isinstance(quick, RetrievalHeads)
        return quick.run(model, tokenizer, FILLER if text is None else text, progress=progress)

    # -- steps ----------------------------------------------------------------------------------------------------

    def prompts(self, tokenizer: Any, haystack: str | None, needles: Sequence[Needle] = PASSKEYS) -> Iterator[Prompt]:
        """One prompt per needle, length and depth. Raises `InvalidInput`."""
        if tokenizer is None or haystack is None or not haystack.strip():
            raise InvalidInput("retrieval-heads needs a tokenizer and a haystack text, or ready `prompts`")
        if not needles:
            raise InvalidInput("retrieval-heads needs at least one needle")
        lengths, depths = self.lengths or PAPER_LENGTHS, self.depths or PAPER_DEPTHS
        hay = encode(tokenizer, haystack[: 8 * max(lengths) + 64])
        while len(hay) < max(lengths):
            hay += hay
        for number, needle in enumerate(needles):
            ids, (a, b) = needle_ids(tokenizer, needle)
            before, after = frame(tokenizer, needle, self.template or PAPER_TEMPLATE, self.chat)
            for length in lengths:
                room = length - self.buffer - len(ids)
                if room < 1:
                    raise InvalidInput(
                        f"retrieval-heads: a length of {length} tokens has no room for a haystack beside a needle of "
                        f"{len(ids)} and a buffer of {self.buffer}; use longer lengths or a smaller buffer"
                    )
                context = hay[:room]
                for depth in depths:
                    at = room if depth >= 1 else sentence_end(tokenizer, context, int(room * depth))
                    start = len(before) + at
                    yield Prompt(
                        ids=(*before, *context[:at], *ids, *context[at:], *after),
                        span=(start + a, start + b),
                        answer=unigrams(needle.answer),
                        about={"needle": number, "length": length, "depth": depth},
                    )

    def score(self, found: Sequence[Tensor], span: tuple[int, int], shape: tuple[int, int]) -> Tensor:
        """``[L, H]`` score of one run from the positions hit at each step (``[L, H]``, -1 for none)."""
        out = torch.zeros(shape, dtype=torch.float64)
        if not found:
            return out
        steps = torch.stack(list(found))  # [steps, L, H]
        width = span[1] - span[0]
        if not self.unique:
            return (steps >= 0).sum(0).double() / width
        for position in range(*span):
            out += (steps == position).any(0)
        return out / width

    def recalls(
        self, model: Any, tokenizer: Any, prompts: Sequence[Prompt], progress: Progress | None = None
    ) -> list[float]:
        """ROUGE-1 recall of every prompt's answer, in percent, without looking at heads: the needle grid alone."""
        out = []
        for done, prompt in enumerate(prompts, 1):
            _, words = self._reply(model, tokenizer, prompt, None)
            out.append(rouge1_recall(words, prompt.answer))
            if progress is not None:
                progress(done, len(prompts), f"recall {sum(out) / done:.0f} %")
        return out

    def ablation(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[Prompt],
        table: HeadTable,
        count: int = 10,
        seeds: Sequence[int] = (0,),
        progress: Progress | None = None,
    ) -> dict[str, list[list[float]]]:
        """Recalls of the grid on the whole model, without its `count` best heads, and without as many random other heads.

        Keys ``base``, ``top``, ``random`` (one list per seed, drawn outside the best heads); values in percent per prompt.
        """
        if table.unit != "head":
            raise InvalidInput("ablation takes a table of query heads")
        best = table.top(count)
        others = table.measured - table.top(threshold=0.1) - best
        sets = {"base": [HeadSet()], "top": [best], "random": [others.random(len(best), s) for s in seeds]}
        out: dict[str, list[list[float]]] = {}
        for name, choices in sets.items():
            for chosen in choices:
                method = registry.method("head-ablation", heads=chosen)
                with applied(model, method) if chosen else nullcontext():
                    out.setdefault(name, []).append(self.recalls(model, tokenizer, prompts, progress))
        return out

    def _one(
        self, model: Any, tokenizer: Any, prompt: Prompt, watched: Sequence[Site], shape: tuple[int, int]
    ) -> tuple[tuple[str, tuple[str, ...]], list[Tensor]]:
        """One run: the reply (text and unigrams), and per step the needle position each head copied from."""
        device = next(model.parameters()).device
        ids = torch.tensor(prompt.ids, device=device)
        rows: dict[int, Tensor] = {}
        total = 0

        def see(site: Site, call: Any) -> None:
            if call.q.shape[2] == 1 and total:
                rows[site.layer] = _checked_rows(site, call, total)  # type: ignore[index]

        found: list[Tensor] = []

        def stepped(token: int) -> None:
            step = torch.full(shape, -1, device=device)
            for layer, row in rows.items():
                offset = total - row.shape[-1]  # a sliding window holds the newest keys only
                at = hits(row, ids, prompt.span, token, top_k=self.top_k, offset=offset)
                step[layer, : len(at)] = at
            found.append(step.cpu())
            rows.clear()

        def before(seen: int) -> None:
            nonlocal total
            total = seen

        with observe(model, see, where=[s.name for s in watched]):
            reply = self._reply(model, tokenizer, prompt, (before, stepped))
        return reply, found

    @torch.no_grad()
    def _reply(
        self,
        model: Any,
        tokenizer: Any,
        prompt: Prompt,
        hooks: tuple[Callable[[int], None], Callable[[int], None]] | None,
    ) -> tuple[str, tuple[str, ...]]:
        """Greedy decoding: prefill all but the last token, then one token a step. hooks: before and after each step."""
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if isinstance(limit, int) and len(prompt.ids) + self.new_tokens > limit + 1:
            raise InvalidInput(
                f"retrieval-heads: a prompt of {len(prompt.ids)} tokens and an answer of {self.new_tokens} exceed the model's "
                f"{limit} positions; use shorter lengths"
            )
        few = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        ids = torch.tensor([prompt.ids], device=next(model.parameters()).device)
        cache, token = None, ids[:, -1:]
        if ids.shape[1] > 1:
            cache = model(ids[:, :-1], use_cache=True, **few).past_key_values
            if cache is None:
                raise Refused(f"retrieval-heads: {type(model).__name__} keeps no cache to decode with")
        ends, said = _ends(model, tokenizer), []
        for step in range(self.new_tokens):
            if hooks is not None:
                hooks[0](len(prompt.ids) + step)
            out = model(token, past_key_values=cache, use_cache=True, **few)
            cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
            chosen = int(token)
            said.append(chosen)
            if hooks is not None:
                hooks[1](chosen)
            if chosen in ends or (tokenizer is not None and "\n" in tokenizer.decode([chosen])):
                break
        if tokenizer is None:
            return " ".join(map(str, said)), tuple(map(str, said))
        text = tokenizer.decode(said, skip_special_tokens=True)
        return text, unigrams(text)
