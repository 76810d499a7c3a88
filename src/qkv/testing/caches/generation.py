"""A cache in a model: every way to `generate`, on a tiny random Llama."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qkv.core.cache import CacheMethod, Geometry, LayerCache, Policy, Step
from qkv.testing._law import Case, close, expect, finite, law, mutant, same
from qkv.testing._speculation import guessed
from qkv.testing.caches._memory import EXACT, PADS, PROMPT, D, G, H, places, site, small


def tiny(device: str = "cpu") -> Any:
    """A tiny random Llama in float64 with attention sharp enough that it matters what is stored; one per device."""
    return _tiny(device)


@functools.cache
def _tiny(device: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=97,
        hidden_size=H * D,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=H,
        num_key_value_heads=G,
        max_position_embeddings=512,
        initializer_range=0.15,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model: Any = LlamaForCausalLM(config)
    model = model.to(device, torch.float64).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def _prompt(case: Case, length: int = PROMPT, pads: Sequence[int] = (0, PADS), salt: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids ``[B, length]`` and their attention mask, left-padded."""
    ids = case.draw(salt).integers(len(pads), length, low=1, high=97)
    mask = (torch.arange(length, device=ids.device) >= torch.tensor(pads, device=ids.device)[:, None]).long()
    return ids * mask, mask


def _generate(model: Any, ids: Tensor, mask: Tensor, new: int = 12, **options: Any) -> Any:
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True} | options
    return model.generate(ids, attention_mask=mask, max_new_tokens=new, **options)


def _logits(out: Any) -> Tensor:
    """``[B, new, vocabulary]``, which transformers rounds to float32."""
    return torch.stack(out.logits, 1)


ROUNDED = 1e-4
"""Logits of `generate` come in float32."""


def _by_hand(model: Any, ids: Tensor, cuts: Sequence[int]) -> Tensor:
    """Logits ``[B, T, vocabulary]`` of unpadded rows fed in blocks, positions given, on a fresh cache."""
    from transformers import DynamicCache

    past, outs, start = DynamicCache(), [], 0
    for n in cuts:
        at = torch.arange(start, start + n, device=ids.device).expand(ids.shape[0], n)
        part = ids[:, start : start + n]
        outs.append(model(part, position_ids=at, past_key_values=past, use_cache=True).logits)
        start += n
    return torch.cat(outs, 1)


def _rows(ids: Tensor, mask: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    for row in range(ids.shape[0]):
        real = mask[row].bool()
        yield row, ids[row : row + 1, real], mask[row : row + 1, real]


@law("cache", "A left-padded row generates greedily what it generates alone.", expensive=True)
@torch.no_grad()
def greedy_rows_are_alone(case: Case) -> None:
    """Tokens and logits of `generate`."""
    import qkv

    model, (ids, mask) = tiny(case.device), _prompt(case)
    with qkv.applied(model, small(case)):
        both = _generate(model, ids, mask)
        for row, mine, ones in _rows(ids, mask):
            alone = _generate(model, mine, ones)
            close(_logits(both)[row], _logits(alone)[0], atol=ROUNDED, what=f"logits of row {row}")
            expect(torch.equal(both.sequences[row, PROMPT:], alone.sequences[0, mine.shape[1] :]), f"row {row} differs")


@law("cache", "Sampling from a padded batch draws from the distributions that each row has alone.", expensive=True)
@torch.no_grad()
def sampled_rows_are_alone(case: Case) -> None:
    """The sampled tokens are fed to each row alone by hand; the logits must be those that were sampled from."""
    import qkv

    model, (ids, mask) = tiny(case.device), _prompt(case, salt=1)
    with qkv.applied(model, small(case)), torch.random.fork_rng():
        torch.manual_seed(case.seed)
        both = _generate(model, ids, mask, do_sample=True, top_k=0, temperature=2.0)
        for row, mine, _ in _rows(ids, mask):
            text = torch.cat((mine, both.sequences[row : row + 1, PROMPT:]), 1)
            want = _by_hand(model, text, (mine.shape[1], *(1,) * 11))[0, mine.shape[1] - 1 :]
            close(_logits(both)[row], want.float(), atol=ROUNDED, what=f"logits of row {row}")


@law("cache", "Beam search in a padded batch finds what each row finds alone.", expensive=True)
@torch.no_grad()
def beams_are_alone(case: Case) -> None:
    """Sequences and scores of 3 beams."""
    import qkv

    model, (ids, mask) = tiny(case.device), _prompt(case, salt=2)
    with qkv.applied(model, small(case)):
        both = _generate(model, ids, mask, num_beams=3, output_scores=True)
        for row, mine, ones in _rows(ids, mask):
            alone = _generate(model, mine, ones, num_beams=3, output_scores=True)
            close(both.sequences_scores[row], alone.sequences_scores[0], atol=ROUNDED, what=f"score of row {row}")
            expect(torch.equal(both.sequences[row, PROMPT:], alone.sequences[0, mine.shape[1] :]), f"row {row} differs")


@law("cache", "A chat goes on from the cache that `generate` returned.", expensive=True)
@torch.no_grad()
def chat_goes_on(case: Case) -> None:
    """A second turn on the returned cache = the same blocks fed by hand to each row alone."""
    import qkv

    model, (ids, mask) = tiny(case.device), _prompt(case, salt=3)
    turn, ones = _prompt(case, 5, (0, 0), salt=4)
    with qkv.applied(model, small(case)):
        first = _generate(model, ids, mask, new=7)
        text = torch.cat((first.sequences, turn), 1)
        past = first.past_key_values
        expect(
            past.get_seq_length() == PROMPT + 6,
            f"the returned cache counts {past.get_seq_length()} of {PROMPT + 6} tokens",
        )
        grown = torch.cat((mask, ones.new_ones(2, 7), ones), 1)
        second = _generate(model, text, grown, new=7, past_key_values=past)
        for row, pads in enumerate((0, PADS)):
            mine = second.sequences[row : row + 1, pads:]
            cuts = (PROMPT - pads, *(1,) * 6, 6, *(1,) * 6)
            want = _by_hand(model, mine, cuts)[0, -7:]
            close(_logits(second)[row], want.float(), atol=ROUNDED, what=f"second turn of row {row}")


@law(
    "cache",
    "`prefill_chunk_size` works: exact where the method says so, else within budget and nothing lost count of.",
    expensive=True,
)
@torch.no_grad()
def chunked_prefill(case: Case) -> None:
    """A padded prompt in chunks of 5."""
    import qkv

    method, model, (ids, mask) = small(case), tiny(case.device), _prompt(case, salt=5)
    with qkv.applied(model, method):
        got = _generate(model, ids, mask, prefill_chunk_size=5)
        finite(_logits(got), "logits")
        for index, layer in enumerate(got.past_key_values.layers):
            memory = layer.memory
            expect(memory.seen == PROMPT + 11, f"layer {index} has seen {memory.seen} of {PROMPT + 11} columns")
            for row, pads in enumerate((0, PADS)):
                heads, last = places(memory, row), PROMPT + 10 - pads
                expect(
                    all(x[-1] == last for x in heads),
                    f"layer {index}, row {row} lacks its newest token {last}: {heads}",
                )
                if isinstance(method, Policy):
                    place = replace(site(), layer=index)
                    most = method.slots_at(PROMPT - pads, place) + min(11, method.lag())
                    held = max(map(len, heads))
                    expect(held <= most, f"layer {index}, row {row} holds {held} tokens; its budget is {most}")
        if case.spec.exact_chunks:
            close(_logits(got), _logits(_generate(model, ids, mask)), atol=ROUNDED, what="logits in chunks")


@law("cache", "Prompt-lookup and assisted decoding give the tokens of plain greedy decoding.", expensive=True)
@torch.no_grad()
def speculation_is_greedy(case: Case) -> None:
    """A repeating prompt for the lookup, whose candidates are mostly wrong; a twin as assistant, whose candidates are right."""
    import qkv

    method, model, assistant = small(case), tiny(case.device), _assistant(case.device)
    ids, mask = _prompt(case, 9, (0,), salt=6)
    ids, mask = ids.repeat(1, 3), mask.repeat(1, 3)
    new = 24
    with qkv.applied(model, method), qkv.applied(assistant, method):
        want = _generate(model, ids, mask, new=new)
        plain = qkv.report(model).calls
        for name, options in (
            (
                "prompt-lookup",
                {"prompt_lookup_num_tokens": 3, "eos_token_id": model.config.vocab_size},
            ),  # 5.10 wants one
            ("assisted", {"assistant_model": assistant}),
        ):
            before = qkv.report(model).calls
            got = _generate(model, ids, mask, new=new, **options)
            same(guessed(got.sequences, want.sequences.shape[1]), want.sequences, f"{name} decoding")
            calls = qkv.report(model).calls - before
            expect(
                name != "assisted" or calls < plain,
                f"assisted by its twin it took {calls} calls, plain decoding {plain}",
            )


@functools.cache
def _assistant(device: str) -> Any:
    model = copy.deepcopy(tiny(device))
    model.generation_config.num_assistant_tokens = 4
    model.generation_config.num_assistant_tokens_schedule = "constant"
    model.generation_config.assistant_confidence_threshold = 0.0
    return model


@law("cache", "Eviction does not shift positions: a new token is rotated to its place in the text.")
@torch.no_grad()
def positions_count_the_text(case: Case) -> None:
    """Keys and queries of the first layer, which depend on token and position alone, are those of the unmodified model."""
    import qkv

    model, (ids, mask) = tiny(case.device), _prompt(case, salt=7)
    log: list[tuple[Tensor, Tensor, Tensor]] = []
    with qkv.applied(model, spied(small(case), log)):
        text = _generate(model, ids, mask, new=14).sequences
    for row, pads in enumerate((0, PADS)):
        mine, seen = text[row : row + 1, pads:-1], []
        with qkv.hosts.observe(model, lambda s, call, seen=seen: seen.append((call.q, call.k)), where=[0]):
            _by_hand(model, mine, (mine.shape[1],))
        got_q, got_k, at = (
            torch.cat(x, 2 if i < 2 else 1)[row : row + 1] for i, x in enumerate(zip(*log, strict=True))
        )
        close(got_q[:, :, pads:], seen[0][0], atol=EXACT, what=f"queries of row {row}")
        close(got_k[:, :, pads:], seen[0][1], atol=EXACT, what=f"keys of row {row}")
        want = torch.arange(mine.shape[1], device=at.device)[None]
        expect(torch.equal(at[:, pads:].long(), want), f"row {row} is told positions {at[0, pads:].tolist()}")


def spied(method: CacheMethod, log: list[tuple[Tensor, Tensor, Tensor]], layer: int = 0) -> CacheMethod:
    """The same method, whose memory at one layer notes (q, k, position) of every call."""

    def build(self: CacheMethod, geometry: Geometry) -> LayerCache:
        memory = method.layer(geometry)
        if geometry.layer == layer:
            attend_ = memory.attend

            def noted(q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
                log.append((q, k, step.position))
                return attend_(q, k, v, step)

            memory.attend = noted  # type: ignore[method-assign]
        return memory

    return mutant(type(method), layer=build)(**method.settings())


@law(
    "cache",
    "`revert` leaves every parameter, buffer, module, output and attribute as it was, bit for bit.",
    expensive=True,
)
@torch.no_grad()
def revert_restores(case: Case) -> None:
    """After generation, and after an error inside `applied`."""
    import qkv

    model, (ids, mask) = copy.deepcopy(tiny(case.device)).float(), _prompt(case, salt=8)
    logits = model(ids, attention_mask=mask).logits
    before = _picture(model)
    qkv.apply(model, small(case))
    _generate(model, ids, mask, new=14)
    qkv.revert(model)
    _same_picture(_picture(model), before, "after revert")
    same(model(ids, attention_mask=mask).logits, logits, "logits after revert")
    try:
        with qkv.applied(model, small(case)):
            _generate(model, ids, mask, new=3)
            raise InterruptedError
    except InterruptedError:
        pass
    _same_picture(_picture(model), before, "after an error inside `applied`")
    same(model(ids, attention_mask=mask).logits, logits, "logits after an error inside `applied`")


def _picture(model: Any) -> dict[str, Any]:
    """Everything about a model that a method could leave behind."""
    tensors = {n: (id(x), x.clone()) for n, x in [*model.named_parameters(), *model.named_buffers()]}
    modules = {n: (id(m), type(m), sorted(m.__dict__), sorted(m._forward_pre_hooks)) for n, m in model.named_modules()}
    settings = {
        n: m.config.to_dict() | {"_attn": m.config._attn_implementation}
        for n, m in model.named_modules()
        if hasattr(m, "config")
    }
    return {
        "tensors": tensors,
        "modules": modules,
        "settings": settings,
        "generation": _plain(getattr(model, "generation_config", None)),
    }


def _plain(config: Any) -> dict[str, Any]:
    return {} if config is None else config.to_dict()


def _same_picture(got: dict[str, Any], want: dict[str, Any], when: str) -> None:
    for part in ("modules", "settings", "generation"):
        expect(got[part].keys() == want[part].keys(), f"{part} differ {when}")
        for name, x in want[part].items():
            expect(got[part][name] == x, f"{part}: {name or 'the model'} is {got[part][name]} {when}, was {x}")
    expect(got["tensors"].keys() == want["tensors"].keys(), f"parameters and buffers differ {when}")
    for name, (address, x) in want["tensors"].items():
        expect(got["tensors"][name][0] == address, f"{name} is another object {when}")
        same(got["tensors"][name][1], x, f"{name} {when}")
