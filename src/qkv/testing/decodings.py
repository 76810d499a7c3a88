"""The laws of decoding: what is claimed lossless is, whatever proposes; the model is left as it was.

The oracle has no cache at all: every token is the likeliest of a forward pass over the whole text.

Axes: B batch, T tokens of the prompt, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import qkv
from qkv.core.decoding import GREEDY, Generated, Sampling
from qkv.core.errors import InvalidInput, Refused
from qkv.testing._law import Case, expect, law, refuses, same
from qkv.testing._tiny import VOCABULARY, decoder, snapshot, weights

NEW = 15
LAYERS = 3
PADS = 4
FEW = 5  # vocabulary of the sampling laws
SAMPLES = 200
DRAWN = 4  # tokens of a sample; the second and third, which are proposed and verified together, are tested
SURE = 1e-4  # a chi-square this unlikely is a broken law; seeds are fixed, so it is no lottery


def subject(case: Case, vocabulary: int = VOCABULARY, seed: int = 0) -> Any:
    """The model that the laws decode with."""
    make = case.spec.model
    if make is not None:
        return make(case.device, torch.float64, seed, vocabulary)
    return decoder(case.device, seed, vocabulary=vocabulary, layers=1 if vocabulary == FEW else LAYERS)


def prompts(case: Case, vocabulary: int = VOCABULARY) -> tuple[Tensor, Tensor]:
    """Two rows, the second left-padded."""
    ids = case.draw(5).integers(2, 11, low=0, high=vocabulary)
    mask = torch.ones_like(ids)
    mask[1, :PADS] = 0
    return ids, mask


def examples(case: Case, model: Any) -> Mapping[str, Mapping[str, Any]]:
    """The named keywords that the method's spec gives for this model."""
    found = case.spec.example(model)
    expect(
        found, f"{case.spec.id}: `example` names no keywords of generate; give at least one entry, {{'plain': {{}}}}"
    )
    return found


@torch.no_grad()
def plain(model: Any, ids: Tensor, mask: Tensor, new: int) -> Tensor:
    """``[B, new]``: greedy decoding without a cache."""
    start = ids.shape[1]
    for _ in range(new):
        position = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(ids, attention_mask=mask, position_ids=position, use_cache=False).logits[:, -1]
        ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), 1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    return ids[:, start:]


def by_transformers(model: Any, ids: Tensor, mask: Tensor, new: int) -> Tensor:
    """``[B, new]``: `model.generate`, greedy, under whatever is applied."""
    out = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0)
    return out[:, ids.shape[1] :]


def equal(got: Generated, want: Tensor, what: str) -> None:
    """Token for token, or the first place where they part."""
    tokens = got.tokens
    expect(tokens.shape == want.shape, f"{what}: {tuple(tokens.shape)} new tokens, expected {tuple(want.shape)}")
    differ = (tokens != want).nonzero()
    if len(differ):
        row, at = differ[0].tolist()
        expect(False, f"{what}: row {row} parts from plain decoding at new token {at} of {want.shape[1]}: "
                      f"{int(tokens[row, at])} instead of {int(want[row, at])}")  # fmt: skip


def is_lossless(case: Case) -> bool:
    """The spec claims it."""
    return case.spec.lossless


def draws(case: Case) -> bool:
    """The spec claims exact sampling."""
    return case.spec.lossless and case.spec.samples


@law(
    "decoding",
    "Greedy tokens are those of plain greedy decoding, for any draft: a proposal is a guess that the model itself must confirm. "
    "Usual faults: a token kept that the model did not choose, a position off by one, a rejected token left in the cache.",
    applies=is_lossless,
)
def lossless_greedy(case: Case) -> None:
    """A batch with a left-padded row; every example, among them a random and an adversarial draft."""
    model, (ids, mask) = subject(case), prompts(case)
    want = plain(model, ids, mask, NEW)
    for name, needs in examples(case, model).items():
        got = case.method.generate(model, ids, attention_mask=mask, max_new_tokens=NEW, **needs)
        equal(got, want, name)
        expect(got.lengths == (NEW,) * len(ids), f"{name}: lengths {got.lengths}, expected {NEW} for every row")


@law(
    "decoding",
    "On a compressed cache the tokens are those of plain decoding on that cache: what was proposed and rejected must leave no "
    "trace in it, neither evicted tokens nor quantised groups.",
    applies=lambda case: case.spec.lossless and bool(case.spec.caches),
)
def lossless_on_a_compressed_cache(case: Case) -> None:
    """Against `model.generate` under the same method."""
    ids, mask = prompts(case)
    for cache in case.spec.caches:
        model = subject(case)
        found = examples(case, model)
        some = list(found)[:1] + list(found)[2:3]
        with qkv.applied(model, cache):
            want = by_transformers(model, ids, mask, NEW)
            for name, needs in ((name, found[name]) for name in some):
                got = case.method.generate(model, ids, attention_mask=mask, max_new_tokens=NEW, **needs)
                equal(got, want, f"{cache}, {name}")


def chances(model: Any, ids: Tensor, sampling: Sampling) -> Tensor:
    """``[FEW * FEW]``: the exact probability of every pair of second and third new token."""
    out = torch.ones(1, dtype=torch.float64, device=ids.device)
    texts = ids
    for _ in range(3):
        with torch.no_grad():
            p = sampling.probabilities(model(texts, use_cache=False).logits[:, -1]).double()
        out = (out[:, None] * p).reshape(-1)
        following = torch.arange(FEW, device=ids.device).repeat(len(texts))[:, None]
        texts = torch.cat((texts.repeat_interleave(FEW, 0), following), 1)
    return out.reshape(FEW, -1).sum(0)


def unlikelihood(counts: Tensor, chance: Tensor) -> float:
    """p-value of a chi-square test; outcomes expected fewer than 5 times are pooled, impossible ones must not occur."""
    total = float(counts.sum())
    if float(counts[chance <= 0].sum()) > 0:
        return 0.0
    want = chance * total
    rare = want < 5
    seen = torch.cat((counts[~rare], counts[rare].sum()[None])).double()
    want = torch.cat((want[~rare], want[rare].sum()[None]))
    keep = want > 0
    statistic = ((seen[keep] - want[keep]) ** 2 / want[keep]).sum()
    freedom = int(keep.sum()) - 1
    expect(freedom >= 2, "the model of the sampling law is certain of what it says: nothing is tested")
    return float(torch.special.gammaincc(torch.tensor(freedom / 2, dtype=torch.float64), statistic.cpu() / 2))


@law(
    "decoding",
    "Sampled tokens are distributed as the model's own samples, for any draft: a rejected proposal must be replaced by a draw "
    "from what is left of the model's distribution. The ratio test p/q is right only for proposals that were drawn from q.",
    applies=draws,
    expensive=True,
)
def lossless_sampling(case: Case) -> None:
    """Chi-square over two tokens from a vocabulary of 5: a random draft, and a contrary one under a restricted distribution."""
    model = subject(case, FEW, seed=1)
    ids = case.draw(6).integers(1, 7, high=FEW)
    found = list(examples(case, model).items())[:2]
    if case.spec.model is None:
        qkv.apply(model, "full")  # once, not in every generation
    for (name, needs), sampling in zip(found, (Sampling(1.0), Sampling(1.7, top_k=4)), strict=False):
        chance = chances(model, ids, sampling)
        counts = torch.zeros_like(chance)
        for seed in range(SAMPLES):
            got = case.method.generate(model, ids, max_new_tokens=DRAWN, sampling=sampling, seed=seed, **needs)
            _, second, third, _ = got.tokens[0].tolist()
            counts[second * FEW + third] += 1
        p = unlikelihood(counts, chance)
        expect(p > SURE, f"{name}, {sampling}: {SAMPLES} samples have p = {p:.2g} under the model's own distribution")


@law(
    "decoding",
    "It ends where plain decoding ends: with the first end token of each row, which is the last token of that row, and never "
    "after more than max_new_tokens.",
    applies=is_lossless,
)
def ends_with_the_end_token(case: Case) -> None:
    """An end token in the middle of an accepted block must cut it; every number of new tokens is met exactly."""
    model, (ids, mask) = subject(case), prompts(case)
    want = plain(model, ids, mask, NEW)
    for name, needs in list(examples(case, model).items())[-2:]:
        for row in range(len(ids)):
            one, pad = ids[row : row + 1], mask[row : row + 1]
            for at in (0, 3, NEW - 2):
                end = int(want[row, at])
                first = want[row].tolist().index(end)
                got = case.method.generate(
                    model, one, attention_mask=pad, max_new_tokens=NEW, eos_token_id=end, **needs
                )
                equal(got, want[row : row + 1, : first + 1], f"{name}, end token {end}")
        both = case.method.generate(model, ids, attention_mask=mask, max_new_tokens=NEW, eos_token_id=(end,), **needs)
        for row in range(len(ids)):
            line = want[row].tolist()
            length = line.index(end) + 1 if end in line else NEW
            expect(both.lengths[row] == length, f"{name}: row {row} has {both.lengths[row]} tokens, expected {length}")
        for count in (1, 2, 5):
            got = case.method.generate(model, ids, attention_mask=mask, max_new_tokens=count, **needs)
            equal(got, want[:, :count], f"{name}, {count} new tokens")


@law(
    "decoding",
    "The model is afterwards as before: same modules, attributes, hooks, configuration, weights, applied methods.",
)
def leaves_the_model_alone(case: Case) -> None:
    """Bare, and carrying a method of its own."""
    ids, mask = prompts(case)
    for cache in ("", "full"):
        model = subject(case)
        found = examples(case, model)
        if cache:
            if case.spec.model is not None:
                continue
            qkv.apply(model, cache)
        before, values = snapshot(model), weights(model)
        for needs in found.values():
            with contextlib.suppress(
                *[Refused] * bool(cache)
            ):  # it may have a cache of its own, and must say so in time
                case.method.generate(model, ids, attention_mask=mask, max_new_tokens=5, **needs)
        _as_before(model, before, values, "after a generation")


def _as_before(model: Any, before: dict[str, Any], values: dict[str, Tensor], when: str) -> None:
    now = snapshot(model)
    for what, value in before.items():
        expect(now[what] == value, f"the model's {what} are not as before {when}")
    for name, value in weights(model).items():
        same(value, values[name], f"{name} {when}")


class _Stop(Exception):
    """What interrupts a generation."""


@law("decoding", "Interrupted at any moment, the generation leaves the model as it was, and the next one is right.")
def survives_an_interruption(case: Case) -> None:
    """An error out of the model's first, second and fourth forward pass."""
    model, (ids, mask) = subject(case), prompts(case)
    name, needs = next(iter(examples(case, model).items()))
    want = case.method.generate(model, ids, attention_mask=mask, max_new_tokens=7, seed=3, **needs).sequences
    before, values = snapshot(model), weights(model)
    for count in (1, 2, 4):
        left = [count]

        def stop(*_: Any, left: list[int] = left) -> None:
            left[0] -= 1
            if not left[0]:
                raise _Stop

        handle = model.register_forward_pre_hook(stop)
        try:
            case.method.generate(model, ids, attention_mask=mask, max_new_tokens=NEW, seed=3, **needs)
            expect(False, f"{name}: the model was called fewer than {count} times for {NEW} new tokens of two rows")
        except _Stop:
            pass
        finally:
            handle.remove()
        _as_before(model, before, values, f"after an interruption in pass {count}")
    got = case.method.generate(model, ids, attention_mask=mask, max_new_tokens=7, seed=3, **needs).sequences
    same(got, want, "tokens after an interruption")


@law(
    "decoding", "The same seed gives the same tokens, and torch's global generator is left alone when a seed is given."
)
def deterministic(case: Case) -> None:
    """Greedy, and sampled where the method samples."""
    model, (ids, mask) = subject(case), prompts(case)
    for sampling in (GREEDY, Sampling(1.0)) if case.spec.samples else (GREEDY,):
        for name, needs in examples(case, model).items():
            call = dict(attention_mask=mask, max_new_tokens=9, sampling=sampling, seed=11, **needs)
            state = torch.random.get_rng_state()
            first = case.method.generate(model, ids, **call)
            expect(torch.equal(state, torch.random.get_rng_state()), f"{name}: torch's global generator has moved")
            same(case.method.generate(model, ids, **call).sequences, first.sequences, f"{name}, {sampling}")


@law("decoding", "A prompt that cannot be continued is refused with an error that says so, before the model runs.")
def refuses_bad_prompts(case: Case) -> None:
    """Empty, not integer, outside the vocabulary, padded on the right, no room."""
    model, (ids, mask) = subject(case), prompts(case)
    needs = next(iter(examples(case, model).values()))
    high = getattr(model.config, "vocab_size", VOCABULARY)
    bad: dict[str, dict[str, Any]] = {
        "an empty prompt": {"input_ids": ids[:, :0]},
        "a prompt of one axis": {"input_ids": ids[0]},
        "floating-point ids": {"input_ids": ids.double()},
        "an id outside the vocabulary": {"input_ids": torch.full_like(ids, high)},
        "a negative id": {"input_ids": torch.full_like(ids, -1)},
        "no new tokens": {"max_new_tokens": 0},
        "half a token": {"max_new_tokens": 1.5},
        "a mask of another shape": {"attention_mask": mask[:, 1:]},
        "padding on the right": {"attention_mask": mask.flip(1)},
    }
    if getattr(model.config, "max_position_embeddings", None) is not None:
        bad["more tokens than positions"] = {"max_new_tokens": 100_000}
    ran: list[int] = []
    handle = model.register_forward_pre_hook(lambda *_: ran.append(1))
    try:
        for what, change in bad.items():
            call: dict[str, Any] = (
                {"input_ids": ids, "attention_mask": None, "max_new_tokens": 3} | change | dict(needs)
            )
            refuses((InvalidInput, Refused), lambda call=call: case.method.generate(model, **call), what)
            expect(not ran, f"{what} was refused only after the model had run")
    finally:
        handle.remove()


@law(
    "decoding",
    "At each setting that the spec names as a limit, the tokens are those of the method it names.",
    applies=lambda case: bool(case.spec.limits),
)
def declared_limit(case: Case) -> None:
    """``full`` is plain decoding; a cache method is `model.generate` under it, at the limit's own settings of it."""
    ids, mask = prompts(case)
    for limit in case.spec.limits:
        method = case.method.replace(**limit.parameters)
        for name in examples(case, subject(case)):
            model = subject(case)
            needs = examples(case, model)[name]
            got = method.generate(model, ids, attention_mask=mask, max_new_tokens=NEW, **needs)
            with qkv.applied(model, qkv.method(limit.equals, **limit.inputs)):
                equal(got, by_transformers(model, ids, mask, NEW), f"{limit.equals}, {name}")
