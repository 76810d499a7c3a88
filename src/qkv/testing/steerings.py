"""The laws of steering: an edit does what it says, to the heads it names, and nothing else.

Most laws call the wrapped attention of a site directly; values that are an identity matrix make its output the attention map
itself.

Axes: B batch, H query heads, G key/value heads, N queries, M keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import qkv
from qkv.core.attend import sdpa
from qkv.core.errors import BrokenLaw, StateError
from qkv.core.site import Site
from qkv.testing._law import Case, close, expect, law, refuses, same
from qkv.testing._tiny import VOCABULARY, decoder, snapshot, weights

B, N, D = 2, 29, 8
PADS = 6
EXACT = 1e-9
STEPS = 3  # decoded one by one
ROUNDED = 1e-5  # logits of float32


def steered(case: Case) -> list[Site]:
    """The sites of the tiny model that accept the method."""
    sites = [s for s in qkv.sites(decoder(case.device)) if case.method.fits(s) is None]
    expect(
        sites,
        f"no site of a model of 5 layers and 6 heads accepts {case.method}; name such heads in the spec's `trials`",
    )
    return sites


def call(case: Case, site: Site, pad: str = "", *, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Arguments of one attention: a few keys draw attention from everywhere, so that maps have sinks.

    pad: ``left`` or ``right`` pads row 1 by `PADS`.
    """
    rng = case.draw()
    q = rng.normal(B, site.heads, N, D) + 1.0
    k = rng.normal(B, site.kv_heads, N, D)
    for row, places in enumerate(((0, 7, 16), (PADS, 11, 12))):
        k[row, :, list(places)] += 1.5
    v = torch.eye(N, dtype=torch.float64, device=case.device).expand(B, site.kv_heads, N, N).clone()
    mask = None
    if pad:
        mask = torch.ones(B, 1, 1, N, dtype=torch.bool, device=case.device)
        mask[1, ..., _padding(pad)] = False
    return {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype), "mask": mask, "causal": site.causal, "scale": D**-0.5}


def _padding(pad: str) -> slice:
    return slice(0, PADS) if pad == "left" else slice(N - PADS, N)


def attended(case: Case, site: Site, given: dict[str, Any], method: Any = None) -> Tensor:
    """The steered attention of one call."""
    given = dict(given)
    q, k, v = (given.pop(x) for x in "qkv")
    return (case.method if method is None else method).wrap(site, sdpa)(q, k, v, **given)


def plain(given: dict[str, Any]) -> Tensor:
    """The same without steering."""
    given = dict(given)
    q, k, v = (given.pop(x) for x in "qkv")
    return sdpa(q, k, v, **given)


def each(case: Case) -> Iterator[tuple[Site, dict[str, Any], Tensor]]:
    """(site, call, real): every steered site with and without padding; real ``[B, 1, N, 1]`` marks real queries."""
    for site in steered(case):
        for pad in ("", "left", "right"):
            given = call(case, site, pad)
            real = torch.ones(B, 1, N, 1, dtype=torch.bool, device=case.device)
            if pad:
                real = given["mask"].mT
            yield site, given, real


def _logits(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Of a prompt and a few decoding steps, so that both shapes of call are steered. ``[B, T, V]``"""
    with torch.no_grad():
        out = model(ids[:, :-STEPS], attention_mask=mask[:, :-STEPS], use_cache=True)
        logits = [out.logits]
        for t in range(ids.shape[1] - STEPS, ids.shape[1]):
            out = model(
                ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=out.past_key_values, use_cache=True
            )
            logits.append(out.logits)
    return torch.cat(logits, 1)


def _packs() -> bool:
    """Whether the model hands one query to its kernel as `sdpa` does, a group's heads as rows (transformers 5.23); before, it
    repeats keys and values, which rounds otherwise.
    """
    from transformers.integrations import sdpa_attention

    return hasattr(sdpa_attention, "pack_gqa")


def _prompt(case: Case) -> tuple[Tensor, Tensor]:
    ids = case.draw(3).integers(B, N, low=1, high=VOCABULARY)
    mask = torch.ones_like(ids)
    mask[1, :PADS] = 0
    return ids, mask


@law(
    "steering",
    "At its neutral setting it is the model itself, bit for bit: return `compute` unchanged there, do not edit by a factor of 1.",
    applies=lambda case: case.spec.neutral is not None,
)
def neutral_is_the_model(case: Case) -> None:
    """At the attention, in two precisions, and on the whole model where the neutral setting can be applied."""
    method = case.method.replace(**case.spec.neutral)
    for site in steered(case):
        for dtype in (torch.float32, torch.bfloat16):
            given = call(case, site, "left", dtype=dtype)
            same(attended(case, site, given, method), plain(given), f"neutral attention at {site.name} in {dtype}")
    model, (ids, mask) = decoder(case.device, dtype=torch.float32), _prompt(case)
    if not qkv.plan(model, method).ok:
        return
    want = _logits(model, ids, mask)  # of the model itself: `full` decodes with a kernel of its own on a device
    with qkv.applied(model, method):
        got = _logits(model, ids, mask)
    if not _packs():
        close(got[:, -STEPS:], want[:, -STEPS:], atol=ROUNDED, what="logits of decoded tokens at the neutral setting")
        got, want = got[:, :-STEPS], want[:, :-STEPS]
    same(got, want, "logits at the neutral setting")


@law(
    "steering",
    "Attention rows still sum to 1: what is taken from one key is given to others. A method that changes the total says "
    "normalised=False.",
    applies=lambda case: case.spec.normalised,
)
def rows_sum_to_one(case: Case) -> None:
    """And no weight is negative."""
    for site, given, real in each(case):
        maps = attended(case, site, given)
        rows = maps.sum(-1, keepdim=True).masked_fill(~real, 1.0)
        close(rows, torch.ones_like(rows), atol=EXACT, what=f"row sums at {site.name}")
        least = float(maps.masked_fill(~real, 0.0).min())
        expect(least >= -EXACT, f"a weight at {site.name} is {least:.3g}")


@law("steering", "A query gets nothing from keys it may not see: later tokens and padding have weight exactly 0.")
def hidden_keys_stay_hidden(case: Case) -> None:
    """The map above the diagonal, and in padded columns."""
    for site, given, real in each(case):
        maps = attended(case, site, given).masked_fill(~real, 0.0)
        hidden = torch.zeros_like(maps, dtype=torch.bool)
        if site.causal:
            hidden |= ~torch.ones(N, N, dtype=torch.bool, device=maps.device).tril()
        if given["mask"] is not None:
            hidden = hidden | ~given["mask"]
        worst = float(maps.masked_fill(~hidden, 0.0).abs().max())
        expect(worst == 0.0, f"a hidden key has weight {worst:.3g} at {site.name}")


@law(
    "steering",
    "Heads that the method does not name are bit for bit those of the model (`heads_at` says which it names).",
)
def untouched_heads_untouched(case: Case) -> None:
    """In float32, where an edit by 1 would show."""
    for site in steered(case):
        others = [h for h in range(site.heads) if h not in case.method.heads_at(site)]
        if not others:
            continue
        given = call(case, site, "left", dtype=torch.float32)
        same(attended(case, site, given)[:, others], plain(given)[:, others], f"heads {others} at {site.name}")


@law(
    "steering",
    "A row of a padded batch is edited as if it were alone: what is measured (sinks, means) is measured per sample, and padding "
    "is in no sum.",
)
def row_is_edited_as_alone(case: Case) -> None:
    """Padding on either side; the batch mate draws other sinks."""
    whole = slice(0, N)
    for site in steered(case):
        for pad, kept in (("left", slice(PADS, N)), ("right", slice(0, N - PADS))):
            given = call(case, site, pad)
            both = attended(case, site, given)
            for row, t in ((0, whole), (1, kept)):
                one = slice(row, row + 1)
                alone = {x: given[x][one, :, t] for x in "qk"} | {"v": given["v"][one, :, t, t], "mask": None}
                got = attended(case, site, given | alone)
                close(both[one, :, t, t], got, atol=EXACT, what=f"row {row}, padded {pad}, at {site.name}")


@law(
    "steering",
    "Applied to a model it fires at every site that accepted it, changes what the model says, and is gone after revert. A method "
    "that changes nothing measures nothing.",
)
def the_hook_fires(case: Case) -> None:
    """Prefill and decoding on a padded batch."""
    model, (ids, mask) = decoder(case.device), _prompt(case)
    before, values = snapshot(model), weights(model)
    with qkv.applied(model, "full"):
        want = _logits(model, ids, mask)
    with qkv.applied(model, case.method):
        got = _logits(model, ids, mask)
        report = qkv.report(model)
    sites = [s for s in report.sites if any(case.method.id in m for m in s.methods)]
    expect(len(sites) == len(steered(case)), f"{len(sites)} of {len(steered(case))} sites are steered")
    expect(all(s.calls == 4 for s in sites), f"4 calls each were due, there were {[s.calls for s in sites]}")
    expect(bool(torch.isfinite(got).all()), "logits are not finite")
    expect(not torch.equal(got, want), "the logits did not change: nothing was edited")
    expect(snapshot(model) == before, "the model is not as before after revert")
    for name, value in weights(model).items():
        same(value, values[name], name)


@law(
    "steering",
    "What a steering keeps from call to call belongs to the cache of one generation: generations in turn do not mix, a copy "
    "goes its own way, rows in another order (beams) keep their own. Keep it in `Running`, never on the method.",
)
def generations_are_apart(case: Case) -> None:
    """Two prompts decoded in turn, and one of them again with its rows reordered and repeated."""
    model, (ids, mask) = decoder(case.device), _prompt(case)
    other = ids.flip(1).where(mask.bool(), ids)
    rows = torch.tensor([1, 0, 1], device=ids.device)
    n = ids.shape[1] - 3

    def step(cache: Any, x: Tensor, seen: Tensor, t: int) -> Tensor:
        return model(x[:, t : t + 1], attention_mask=seen[:, : t + 1], past_key_values=cache, use_cache=True).logits

    with torch.no_grad(), qkv.applied(model, case.method):
        alone = [_logits(model, x, mask)[:, n:] for x in (ids, other)]
        caches = [
            model(x[:, :n], attention_mask=mask[:, :n], use_cache=True).past_key_values for x in (ids, other, ids)
        ]
        caches[2].batch_select_indices(rows)
        given = ((ids, mask), (other, mask), (ids[rows], mask[rows]))
        turns: list[list[Tensor]] = [[], [], []]
        for t in range(n, n + 3):
            for logits, cache, (x, seen) in zip(turns, caches, given, strict=True):
                logits.append(_kept(lambda c=cache, x=x, s=seen, t=t: step(c, x, s, t)))
    for what, got, want in zip(("first", "second", "reordered"), turns, (*alone, alone[0][rows]), strict=True):
        close(torch.cat(got, 1), want, atol=EXACT, what=f"logits of the {what} generation, decoded in turn with others")


def _kept(run: Callable[[], Tensor]) -> Tensor:
    try:
        return run()
    except StateError as error:
        raise BrokenLaw(f"a generation that others took turns with was not continued: {error}") from error


@law("steering", "A configuration that can act nowhere in a model is refused when it is applied, not silently ignored.")
def acts_or_is_refused(case: Case) -> None:
    """Heads that do not exist; only for methods that list heads."""
    if "heads" not in case.method.settings():
        return
    model = decoder(case.device)
    for heads in ((), ("2.99",), ("77.0",)):
        method = case.method.replace(heads=heads)
        refuses(qkv.core.errors.Refused, lambda method=method: qkv.apply(model, method), f"heads={heads}")
