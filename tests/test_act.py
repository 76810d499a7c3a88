"""ACT: the oracles of the method; the map-free form against the map edit; caches, batches, refusals; the head search."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.integrations import sdpa_attention

import models
import qkv
from qkv.core.attend import attend, sdpa
from qkv.core.errors import BrokenLaw, InvalidInput, InvalidParameter, Refused, StateError
from qkv.core.heads import HeadSet
from qkv.core.steering import Running
from qkv.steer import act as A
from qkv.testing import pairs, steerings
from qkv.testing._tiny import decoder

N = 64
HEADS = ("2.1", "2.4", "2.5", "3.0", "3.3")


def method(**more: Any) -> A.AttentionCalibration:
    return qkv.method("act", **({"heads": HEADS} | more))


def edit(maps: Tensor, **more: Any) -> Tensor:
    return A.reference(maps, **({"beta": 0.4, "threshold": 0.1} | more))


def even(n: int = N) -> Tensor:
    rows = torch.ones(n, n, dtype=torch.float64).tril()
    return rows / rows.sum(-1, keepdim=True)


def site(layer: int = 2) -> Any:
    return next(s for s in qkv.sites(decoder()) if s.layer == layer)


def wrapped(given: A.AttentionCalibration, q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
    return given.wrap(site(), sdpa)(q, k, v, **({"mask": None, "causal": True, "scale": 0.5} | more))


def drawn(
    seed: int, b: int = 2, h: int = 6, g: int = 3, n: int = 23, d: int = 8, sinks: float = 5.0
) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(b, x, n, d, generator=draw, dtype=torch.float64) for x in (h, g, g))
    q[..., 0] += 2
    for row in range(b):
        for place in torch.randperm(n, generator=draw)[:3].tolist():
            k[row, :, place, 0] += sinks
    return q, k, v


# -- the definition ---------------------------------------------------------------------------------------------------


def test_an_even_map_has_no_sink_at_64_tokens() -> None:
    assert torch.equal(edit(even()), even())  # c_0 = H_64 / 64 = 0.0741, and every later mean is smaller


def test_the_identity_makes_sinks_of_the_last_tokens_unless_min_rows_spares_them() -> None:
    maps = 0.5 * torch.eye(N, dtype=torch.float64) + 0.5 * even()
    assert not torch.equal(edit(maps), maps) and torch.equal(edit(maps, min_rows=8), maps)


def test_all_on_the_first_token_is_left_alone() -> None:
    maps = torch.zeros(N, N, dtype=torch.float64)
    maps[:, 0] = 1
    assert torch.equal(edit(maps), maps)


def test_half_on_the_first_and_half_on_token_5() -> None:
    maps = torch.zeros(N, N, dtype=torch.float64)
    maps[:5, 0] = 1
    maps[5:, 0] = maps[5:, 5] = 0.5
    got = edit(maps)
    assert torch.equal(got[:5], maps[:5])
    torch.testing.assert_close(got[5:, 5], torch.full((N - 5,), 0.2, dtype=torch.float64), rtol=0, atol=1e-15)
    torch.testing.assert_close(got[5:, 0], torch.full((N - 5,), 0.8, dtype=torch.float64), rtol=0, atol=1e-15)


def test_the_first_sink_stays_also_when_it_is_not_token_0() -> None:
    maps = 0.1 * even()
    maps[:3] = even()[:3]
    maps[3:20, 3] += 0.9
    maps[20:, 3] += 0.45
    maps[20:, 20] += 0.45
    assert maps.sum(-1).sub(1).abs().max() < 1e-12
    got = edit(maps, min_rows=8)
    assert (got[20:, 20] / maps[20:, 20] - 0.4).abs().max() < 1e-12 and (got[20:, 3] > maps[20:, 3]).all()
    assert torch.equal(got[:20], maps[:20])
    both = edit(maps, min_rows=8, keep_first=False)
    assert (both[20:, 3] / maps[20:, 3] - 0.4).abs().max() < 1e-12


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.floats(0, 1), st.integers(1, 9))
def test_the_edit_scales_sinks_by_beta_and_all_others_by_one_factor_per_row(
    seed: int, beta: float, min_rows: int
) -> None:
    q, k, _ = drawn(seed, h=3)
    maps = attend(q, k, torch.eye(23, dtype=torch.float64).expand(2, 3, -1, -1), causal=True).out
    got = edit(maps, beta=beta, min_rows=min_rows)
    assert (
        got.sum(-1).sub(1).abs().max() < 1e-12
        and not got.triu(1).any()
        and torch.equal(got[..., 0, 0], maps[..., 0, 0])
    )
    count = torch.arange(23, 0, -1)
    sink = (maps.sum(-2) / count > 0.1) & (count >= min_rows)
    sink &= sink.cumsum(-1) > 1
    ratio = (got / maps).nan_to_num()
    columns = sink.unsqueeze(-2) & (maps > 0)
    assert (ratio[columns] - beta).abs().max() < 1e-12 if columns.any() else True
    left = (maps * ~sink.unsqueeze(-2)).sum(-1)
    factor = 1 + (1 - beta) * (1 - left) / left
    others = ~sink.unsqueeze(-2) & (maps > 0)
    assert ((ratio - factor.unsqueeze(-1))[others]).abs().max() < 1e-9


def test_rows_with_nothing_but_sinks_are_unchanged() -> None:
    maps = torch.eye(4, dtype=torch.float64)
    assert torch.equal(edit(maps, keep_first=False), maps)


# -- the map-free form ------------------------------------------------------------------------------------------------


def _masks(kind: str, n: int) -> tuple[Tensor | None, Tensor | None, bool]:
    """(mask of the call, visible of the definition, causal flag)."""
    lower = torch.ones(n, n, dtype=torch.bool).tril()
    if kind == "":
        return None, None, True
    if kind == "window":
        mask = (lower & ~lower.tril(-7))[None, None].expand(2, 1, n, n)
        return mask, mask, False
    if kind == "per head":
        mask = lower.expand(2, 6, n, n).clone()
        mask[:, 4, 9:, 2] = False
        return mask, mask[:, [1, 4, 5]], False
    keys = torch.ones(2, 1, 1, n, dtype=torch.bool)
    keys[0, ..., slice(0, 5) if kind == "left" else slice(n - 5, n)] = False
    return keys, keys & keys.mT & lower, True


@pytest.mark.parametrize("kind", ["", "left", "right", "window", "per head"])
@pytest.mark.parametrize("settings_", [{}, {"beta": 0.0, "threshold": 0.04}, {"min_rows": 6, "keep_first": False}])
def test_without_a_map_it_equals_the_edited_map_times_v(kind: str, settings_: dict[str, Any]) -> None:
    for seed in range(4):
        q, k, v = drawn(seed, sinks=3.0 + 4 * seed)
        mask, visible, causal = _masks(kind, 23)
        eye = torch.eye(23, dtype=torch.float64).expand(2, 3, -1, -1)
        maps = attend(q, k, eye, mask=mask, causal=causal, scale=0.5).out[:, [1, 4, 5]]
        want = edit(maps, visible=visible, **settings_) @ v[:, [0, 2, 2]]
        got = wrapped(method(**settings_), q, k, v, mask=mask, causal=causal)
        plain = sdpa(q, k, v, mask=mask, causal=causal, scale=0.5)
        real = torch.ones(2, 1, 23, 1) if visible is None else visible.diagonal(dim1=-2, dim2=-1)[..., None]
        assert ((got[:, [1, 4, 5]] - want) * real).abs().max() < 1e-12
        assert torch.equal(got[:, [0, 2, 3]], plain[:, [0, 2, 3]])


def test_where_sinks_take_nearly_everything_the_rest_is_attended_to_afresh() -> None:
    q, k, v = drawn(1)
    k[:, :, 7, 0] += 60
    k[:, :, 0, 0] += 20
    got = wrapped(method(), *(x.float() for x in (q, k, v)))
    eye = torch.eye(23, dtype=torch.float64).expand(2, 3, -1, -1)
    maps = attend(q, k, eye, causal=True, scale=0.5).out[:, [1, 4, 5]]
    assert maps[..., 8:, 7].max() > 1 - 1e-12  # by subtraction nothing would be left in float32
    want = edit(maps) @ v[:, [0, 2, 2]]
    torch.testing.assert_close(got[:, [1, 4, 5]].double(), want, rtol=0, atol=2e-5)


def test_low_precision_stays_near_the_definition() -> None:
    q, k, v = (x.bfloat16() for x in drawn(3))
    got = wrapped(method(), q, k, v)
    want = wrapped(method(), q.double(), k.double(), v.double())
    plain = sdpa(q, k, v, causal=True, scale=0.5)
    exact = sdpa(q.double(), k.double(), v.double(), causal=True, scale=0.5)
    assert got.dtype == torch.bfloat16
    assert (got - want).abs().max() <= 2 * (plain - exact).abs().max() + 1e-2


@pytest.mark.parametrize("off", [{"beta": 1.0}, {"heads": ()}, {"threshold": 1.0}, {"threshold": 3.0}])
def test_settings_that_do_nothing_are_the_base_attention_itself(off: dict[str, Any]) -> None:
    assert method(**off).wrap(site(), sdpa) is sdpa
    q, k, v = drawn(0)
    assert torch.equal(
        wrapped(method(threshold=0.999), q, k, v), sdpa(q, k, v, causal=True, scale=0.5)
    )  # no column that high


def test_every_sample_has_its_own_sinks() -> None:
    q, k, v = drawn(5, b=3)
    both = wrapped(method(), q, k, v)
    for row in range(3):
        one = slice(row, row + 1)
        torch.testing.assert_close(both[one], wrapped(method(), q[one], k[one], v[one]), rtol=0, atol=1e-12)


def test_gradients_flow_through_the_edit() -> None:
    inputs = [x.requires_grad_() for x in drawn(2, b=1, n=9)]
    call = lambda q, k, v: wrapped(method(threshold=0.11), q, k, v)[:, [1, 4]]  # noqa: E731
    assert torch.autograd.gradcheck(call, inputs, eps=1e-7, atol=1e-5, fast_mode=True)


# -- on models --------------------------------------------------------------------------------------------------------


def test_it_acts_in_the_middle_layers_and_refuses_the_rest_with_reasons() -> None:
    model = decoder()
    every = HeadSet.full(5, 6)
    plan = qkv.plan(model, method(heads=every))
    assert plan.ok and [s.layer for s in plan.accepted(method(heads=every))] == [2, 3]
    assert "layers [2, -1] of 5 leave it out" in str(plan)
    everywhere = method(heads=every, layers=(0, 5))
    assert [s.layer for s in qkv.plan(model, everywhere).accepted(everywhere)] == [0, 1, 2, 3, 4]
    for heads, needle in (((), "no head is listed"), ("2.6", "no head 2.6 in 5 layers of 6"), ("9.0", "no head 9.0"),
                          ("0.1", "leave it out")):  # fmt: skip
        with pytest.raises(Refused, match=needle):
            qkv.apply(model, method(heads=heads))
    with pytest.raises(InvalidParameter, match="pair"):
        method(layers=(2,))
    with pytest.raises(InvalidParameter, match=r"\[0"):
        method(beta=1.5)


def test_settings_survive_json_and_the_command_line() -> None:
    m = qkv.method("act:heads=2.1+3.4,beta=0.2")
    assert m == method(heads=[(3, 4), (2, 1)], beta=0.2) == method(heads=HeadSet.of("2.1 3.4"), beta=0.2)
    assert qkv.core.registry.from_dict(m.to_dict()) == m and hash(m) == hash(method(heads="3.4 2.1", beta=0.2))
    with pytest.raises(InvalidParameter, match="is not a head"):
        qkv.method("act:heads=2.1")


def test_bidirectional_models_need_causal_false() -> None:
    model = models.make("bert")
    with pytest.raises(Refused, match="bidirectional; configure causal=False"):
        qkv.apply(model, method(heads="1.0", layers=(0, 3)))
    x = models.inputs("bert")
    with torch.no_grad():
        base = model(**x).last_hidden_state
        with qkv.applied(model, method(heads="1.0 1.2", layers=(0, 3), causal=False, threshold=0.02)):
            assert not torch.equal(model(**x).last_hidden_state, base)
    with pytest.raises(Refused, match="configure causal=True"):
        qkv.apply(decoder(), method(causal=False))


def test_it_refuses_to_edit_what_is_not_softmax() -> None:
    model, ids = decoder(), torch.randint(1, 60, (1, 12))
    with qkv.applied(model, "sliding-window:window=4,sinks=0", method()), pytest.raises(Refused, match="plain softmax"):
        model(ids)
    with (
        qkv.applied(model, qkv.method("head-ablation", heads="2.0"), method()),
        pytest.raises(Refused, match="apply act alone"),
    ):
        model(ids)
    with qkv.applied(model, method(), qkv.method("head-ablation", heads="2.0")):
        assert model(ids).logits.isfinite().all()


def test_prefill_is_edited_and_decoding_is_not() -> None:
    model, ids = decoder(), torch.randint(1, 60, (2, 14), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), qkv.applied(model, method(threshold=0.05)):
        cache = model(ids, use_cache=True).past_key_values
        outs = []
        with qkv.hosts.observe(model, lambda s, c: outs.append((s.layer, c))):
            model(ids[:, :1], past_key_values=cache, use_cache=True)
    for layer, call in outs:
        if layer in (2, 3):
            plain = sdpa(call.q, call.k, call.v, mask=call.mask, causal=call.causal, scale=call.scale)
            assert torch.equal(call.out, plain)


def test_generation_of_a_padded_batch_equals_each_row_alone() -> None:
    model = decoder()
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 60, (2, 17), generator=draw)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    for decode in (False, True):
        with qkv.applied(model, method(threshold=0.05, decode=decode)):
            more = dict(max_new_tokens=9, do_sample=False, pad_token_id=0)
            both = model.generate(ids, attention_mask=mask, **more)
            for row, start in ((0, 6), (1, 0)):
                alone = model.generate(ids[row : row + 1, start:], **more)
                assert torch.equal(both[row, 17:], alone[0, 17 - start :]), (decode, row)


def _by_hand(m: A.AttentionCalibration, q: Tensor, k: Tensor, v: Tensor, prompt: int) -> Tensor:
    """decode=True, by definition: every new row is edited by the column means of all rows so far."""
    eye = torch.eye(k.shape[2], dtype=torch.float64).expand(*k.shape[:3], -1)
    maps = attend(q, k, eye, causal=True, scale=0.5).out
    heads, rows = [1, 4, 5], []
    for t in range(prompt, k.shape[2]):
        part = maps[:, heads, : t + 1, : t + 1]
        score = part.sum(-2) / torch.arange(t + 1, 0, -1)
        sink = score > m.threshold
        sink &= sink.cumsum(-1) > 1
        row = part[:, :, t]
        freed = (1 - m.beta) * (row * sink).sum(-1, keepdim=True)
        left = (row * ~sink).sum(-1, keepdim=True)
        edited = torch.where(sink, m.beta * row, row * (1 + freed / left))
        rows.append(torch.einsum("bhm,bhme->bhe", edited, v[:, [0, 2, 2], : t + 1]))
    return torch.stack(rows, 2)


MORE = {"mask": None, "causal": True, "scale": 0.5}


def test_decoding_with_running_sums_equals_the_whole_map() -> None:
    m = method(decode=True, threshold=0.06)
    q, k, v = drawn(7)
    run = m.wrap_running(site(), sdpa, Running())
    run(q[:, :, :15], k[:, :, :15], v[:, :, :15], **MORE)
    got = [run(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1], **MORE) for t in range(15, 23)]
    torch.testing.assert_close(torch.cat(got, 2)[:, [1, 4, 5]], _by_hand(m, q, k, v, 15), rtol=0, atol=1e-12)
    plain = sdpa(q, k, v, causal=True, scale=0.5)
    torch.testing.assert_close(torch.cat(got, 2)[:, [0, 2, 3]], plain[:, [0, 2, 3], 15:], rtol=0, atol=1e-12)


def test_running_sums_are_a_value_of_the_generation() -> None:
    """Two generations in turn, a copy, rows in another order, tokens taken back, all forgotten."""
    m = method(decode=True, threshold=0.06)
    (q, k, v), (q2, k2, v2) = drawn(8), drawn(9)
    one, two = Running(), Running()
    first, second = (m.wrap_running(site(), sdpa, r) for r in (one, two))
    first(q[:, :, :15], k[:, :, :15], v[:, :, :15], **MORE)
    second(q2[:, :, :15], k2[:, :, :15], v2[:, :, :15], **MORE)
    twin, beams = one.copy(), torch.tensor([1, 1, 0])
    one.select(beams)
    got = first(q[beams][:, :, 15:16], k[beams][:, :, :16], v[beams][:, :, :16], **MORE)
    want = _by_hand(m, q, k, v, 15)[:, :, :1]
    torch.testing.assert_close(got[:, [1, 4, 5]], want[beams], rtol=0, atol=1e-12)
    got = second(q2[:, :, 15:16], k2[:, :, :16], v2[:, :, :16], **MORE)
    torch.testing.assert_close(got[:, [1, 4, 5]], _by_hand(m, q2, k2, v2, 15)[:, :, :1], rtol=0, atol=1e-12)
    got = m.wrap_running(site(), sdpa, twin)(q[:, :, 15:16], k[:, :, :16], v[:, :, :16], **MORE)
    torch.testing.assert_close(got[:, [1, 4, 5]], want, rtol=0, atol=1e-12)
    state = twin.states[m]
    assert (state.owner, state.seen) == ("act", 16) and state["mass"].shape == (2, 3, 16)
    with pytest.raises(StateError, match="cannot be taken out"):
        twin.crop(1)
    twin.reset()
    assert twin == Running() and method(decode=True) == m.replace(threshold=0.1)


def test_sums_of_other_tokens_are_refused() -> None:
    m = method(decode=True, threshold=0.06)
    q, k, v = drawn(8)
    running = Running()
    run = m.wrap_running(site(), sdpa, running)
    run(q[:, :, :15], k[:, :, :15], v[:, :, :15], **MORE)
    for keys, rows in ((slice(1, 16), slice(None)), (slice(0, 10), slice(None)), (slice(0, 16), slice(0, 1))):
        with pytest.raises(StateError, match=r"15 are summed.*start again"):
            run(q[rows, :, 15:16], k[rows, :, keys], v[rows, :, keys], **MORE)
    for fresh in (m.wrap_running(site(), sdpa, Running()), m.wrap(site(), sdpa)):
        with pytest.raises(StateError, match="0 are summed"):
            fresh(q[:, :, 15:16], k[:, :, :16], v[:, :, :16], **MORE)


def test_generations_in_turn_beams_and_crops_on_a_model() -> None:
    model = decoder()
    draw = torch.Generator().manual_seed(1)
    ids, other = (torch.randint(1, 60, (2, 12), generator=draw) for _ in range(2))

    def step(cache: Any, token: Tensor) -> Tensor:
        return model(token, past_key_values=cache, use_cache=True).logits

    with torch.no_grad(), qkv.applied(model, method(decode=True, threshold=0.05)):
        caches = [model(x, use_cache=True).past_key_values for x in (ids, other)]
        copied = copy.deepcopy(caches[0])
        copied.reorder_cache(torch.tensor([1, 0]))
        got = step(caches[0], other[:, :1]), step(caches[1], ids[:, :1]), step(copied, other[:, :1].flip(0))
        for x, token, logits in ((ids, other[:, :1], got[0]), (other, ids[:, :1], got[1])):
            assert torch.equal(step(model(x, use_cache=True).past_key_values, token), logits)
        torch.testing.assert_close(got[2].flip(0), got[0], rtol=0, atol=1e-12)
        with pytest.raises(StateError, match="cannot be taken out"):
            caches[0].crop(-1)
        assert caches[0].layers[2].get_seq_length() == 13  # it is not taken back by half
    with torch.no_grad(), qkv.applied(model, method(decode=True), "window:budget=8"):
        cache = model(ids, use_cache=True).past_key_values
        with pytest.raises(StateError, match="evicts"):
            step(cache, other[:, :1])


def test_beams_run_with_running_sums() -> None:
    model, ids = decoder(), torch.randint(1, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    with qkv.applied(model, method(decode=True, threshold=0.05)):
        out = model.generate(ids, num_beams=3, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert out.shape == (2, 18)


def test_a_neutral_setting_is_the_model_also_where_that_repeats_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers does for one query before 5.23; its prompt is compared bit for bit there too."""
    monkeypatch.delattr(sdpa_attention, "pack_gqa", raising=False)
    monkeypatch.setattr(sdpa_attention, "is_torchdynamo_compiling", lambda: True, raising=False)  # then it repeats
    law, case = next((x.law, x.case) for x in pairs("steering", A.AttentionCalibration) if "neutral" in x.law.name)
    law.run(case)
    logits = steerings._logits
    for place, off in ((-1, 1e-4), (0, 1e-6)):
        added = iter((0.0, off))

        def wrong(*given: Any, place: int = place, added: Any = added) -> Tensor:
            out = logits(*given)
            out[:, place] += next(added)
            return out

        with monkeypatch.context() as patch:
            patch.setattr(steerings, "_logits", wrong)
            with pytest.raises(BrokenLaw, match="logits"):
                law.run(case)
    monkeypatch.setattr(steerings, "_packs", lambda: True)
    with pytest.raises(BrokenLaw, match="bitwise"):  # what is seen there
        law.run(case)


# -- the search -------------------------------------------------------------------------------------------------------


def metric(model: Any, samples: Any) -> float:
    """A metric that likes exactly the head 2.3 calibrated and dislikes 3.1; it reads what is applied."""
    stack = [e.method for e in model.__dict__["_qkv"].entries] if "_qkv" in model.__dict__ else []
    heads = set(stack[0].heads) if stack else set()
    return 0.5 + 0.1 * ("2.3" in heads) - 0.1 * ("3.1" in heads) + 0.0 * len(samples)


def test_the_search_keeps_heads_that_help_and_tests_on_other_samples() -> None:
    model, seen = decoder(), []

    def watched(model: Any, samples: Any) -> float:
        seen.append(frozenset(samples))
        return metric(model, samples)

    found = A.search_heads(model, list(range(30)), watched, n=20, method=method())
    assert found.heads == HeadSet.of("2.3") and found.base == 0.5 and found.method.heads == ("2.3",)
    assert found.table.values[2, 3].item() == pytest.approx(0.1) and found.table.values[3, 1].item() == pytest.approx(
        -0.1
    )
    assert found.table.measured == HeadSet(frozenset((l, h) for l in (2, 3) for h in range(6)))
    searched = set().union(*seen)
    assert len(searched) == 20 and set(found.held_out) == set(range(30)) - searched
    seen.clear()
    out = found.test(model, watched)
    assert set(out) == {"base", "act", "random", "first_sink"} and set().union(*seen) == set(found.held_out)
    assert out["act"] == pytest.approx(0.6) and "_qkv" not in model.__dict__


def test_the_search_cannot_see_the_test_samples() -> None:
    model = decoder()
    with pytest.raises(InvalidInput, match="must be separate"):
        A.search_heads(model, list(range(10)), metric, n=10)
    with pytest.raises(InvalidInput, match="in both splits"):
        A.search_heads(model, ["a"] * 10, metric, n=5)
    with pytest.raises(InvalidInput, match="no candidate"):
        A.search_heads(model, list(range(10)), metric, n=5, candidates="0.1")
    nothing = A.search_heads(model, [{"text": i} for i in range(10)], metric, n=5, candidates="2.0 3.1")
    assert not nothing.heads
    with pytest.raises(InvalidInput, match="nothing to test"):
        nothing.test(model, metric)


def test_the_configuration_can_be_replaced_and_copied() -> None:
    m = method()
    assert dataclasses.replace(m, beta=0.1).beta == 0.1 and m.replace(heads="2.1").heads == ("2.1",)
