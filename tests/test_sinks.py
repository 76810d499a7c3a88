"""Attention sinks: the oracles of the metric, on known maps; blocks, padding, refusals; massive activations."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import models
import qkv
from qkv.core.attend import attend
from qkv.core.columns import column_means
from qkv.core.errors import InvalidInput, Refused, SavedDataError
from qkv.hosts import observe
from qkv.probes import attention_sink_emergence as S
from qkv.probes._sink_report import SinkReport
from qkv.testing._planted import scripted

T = 64


def probe(**more) -> S.AttentionSinks:
    return qkv.method("attention-sink-emergence", **more)


def even(t: int = T) -> torch.Tensor:
    rows = torch.ones(t, t, dtype=torch.float64).tril()
    return rows / rows.sum(-1, keepdim=True)


def first(t: int = T) -> torch.Tensor:
    out = torch.zeros(t, t, dtype=torch.float64)
    out[:, 0] = 1
    return out


def harmonic(n: int) -> float:
    return sum(1 / i for i in range(1, n + 1))


# -- known maps -------------------------------------------------------------------------------------------------------


def test_an_even_map_has_harmonic_column_means() -> None:
    alpha = S.reference(even())
    want = torch.tensor([(harmonic(T) - harmonic(k)) / (T - k) for k in range(T)], dtype=torch.float64)
    torch.testing.assert_close(alpha, want, rtol=0, atol=1e-14)
    assert alpha[0].item() == pytest.approx(0.0741233, abs=5e-8) and alpha[1].item() == pytest.approx(0.0594, abs=5e-5)


def test_all_on_the_first_token() -> None:
    alpha = S.reference(first())
    assert alpha[0] == 1 and not alpha[1:].any()


def test_the_identity_passes_only_at_the_edge_which_is_flagged() -> None:
    alpha = S.reference(torch.eye(T, dtype=torch.float64))
    torch.testing.assert_close(alpha, 1 / torch.arange(T, 0, -1, dtype=torch.float64), rtol=0, atol=1e-15)
    assert (alpha > 0.3).nonzero().flatten().tolist() == [61, 62, 63] and S.edge(T, 0.3) == 61
    report = probe().from_maps(torch.eye(T).expand(1, 1, 2, T, T))
    assert report.flagged == [k > T - 4 for k in range(T)] and report.rate[60] == 0 and report.rate[61] == 1
    assert S.edge(T, 1.0) == T and S.edge(8, 0.3, causal=False) == 8


def test_a_mean_of_exactly_the_threshold_is_not_counted() -> None:
    maps = torch.zeros(1, 1, 2, 4, 4, dtype=torch.float64)
    maps[..., 0, 0] = 1
    maps[..., 1:, 0] = torch.tensor([0.0, 0.5, 0.5])  # mean 0.5, exactly
    maps[0, 0, 1, 3, 0] += 2**-40
    report = probe(tokens=4, threshold=0.5).from_maps(maps)
    assert (
        report.head_alpha.values[0, 0] == 0.5 and report.head_rate.values.tolist() == [[0, 1]] and report.rate[0] == 0.5
    )


def test_one_head_of_eight_is_a_rate_of_an_eighth() -> None:
    maps = torch.stack([first(), *[even()] * 7]).expand(3, 1, 8, T, T)
    report = probe().from_maps(maps)
    assert report.rate[0] == 0.125 and report.head_rate.values.tolist() == [[1, *[0] * 7]]
    assert str(report).startswith("sink rate 12.5 % at the first token")
    model = scripted(torch.stack([first(), *[even()] * 7])[None], [5 + i % 7 for i in range(T)], kv_heads=4)
    ran = probe().run(model, torch.full((2, T), 6))
    assert ran.rate[0] == 0.125 and torch.equal(ran.head_rate.values, report.head_rate.values)


def test_shuffling_the_columns_within_what_each_row_sees_destroys_the_rate() -> None:
    draw = torch.Generator().manual_seed(0)
    shuffled = first()
    for q in range(T):
        shuffled[q, : q + 1] = shuffled[q, : q + 1][torch.randperm(q + 1, generator=draw)]
    assert probe().from_maps(first().expand(1, 1, 1, T, T)).rate[0] == 1
    assert probe().from_maps(shuffled.expand(1, 1, 1, T, T)).rate[0] == 0


def test_rows_that_do_not_sum_to_1_are_reported_both_ways() -> None:
    weak = 0.2 * first() + 0.01 * even()  # a sigmoid map: little mass, nearly all of it on the first token
    weak[5] = 0
    report = probe().from_maps(weak.expand(1, 1, 1, T, T))
    assert report.rate[0] == 0 and report.normalised_rate[0] == 1 and report.rate.isfinite().all()


def test_bidirectional_means_run_over_all_queries() -> None:
    assert S.reference(torch.full((4, 4), 0.25), causal=False).tolist() == [0.25] * 4
    ids = torch.randint(3, 60, (2, 20))
    with pytest.raises(Refused, match="bidirectional; configure causal=False"):
        probe(tokens=8).run(models.make("bert"), ids)
    report = probe(tokens=8, causal=False).run(models.make("bert"), ids)
    assert report.edge == 8 and report.alpha.sum().item() == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(Refused, match="is causal; configure causal=True"):
        probe(tokens=8, causal=False).run(models.make("llama"), ids)


# -- blocks and padding -----------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.sampled_from(["", "left", "right", "window"]), st.booleans(), st.integers(0, 4))
def test_column_means_by_blocks_equal_those_of_the_whole_map(seed: int, masked: str, causal: bool, extra: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    b, h, g, n, d = 2, 4, 2, 11, 5
    m = n + (extra if masked != "window" else 0)
    q, k, v = (torch.randn(*x, d, generator=draw, dtype=torch.float64) for x in ((b, h, n), (b, g, m), (b, g, m)))
    mask, real = None, torch.ones(b, n, dtype=torch.bool)
    i, j = torch.arange(n)[:, None] + m - n, torch.arange(m)[None]
    visible = (j <= i if causal else torch.ones(n, m, dtype=torch.bool)).expand(b, n, m).clone()
    if masked == "window":
        mask = ((j <= i) & (i - j < 4))[None, None].expand(b, 1, n, m)
        visible &= mask[:, 0]
    elif masked:
        keys = torch.ones(b, m, dtype=torch.bool)
        keys[1, :3] = masked == "right"
        keys[1, -3:] = masked == "left"
        mask, real = keys[:, None, None], keys[:, m - n :]
        visible &= keys[:, None]
    from qkv.core import attend as module

    before, module.CHUNK_ELEMENTS = module.CHUNK_ELEMENTS, 3 * b * h * m  # three rows at a time
    try:
        got = column_means(q, k, v, mask=mask, causal=causal, scale=0.7)
    finally:
        module.CHUNK_ELEMENTS = before
    logits = 0.7 * q @ k.repeat_interleave(2, 1).mT
    maps = logits.masked_fill(~visible[:, None], -torch.inf).softmax(-1).nan_to_num()
    rows = real[:, None, :, None]
    total, count = (maps * rows).sum(-2), (visible[:, None] & rows).sum(-2)
    torch.testing.assert_close(got.mean, total / count.clamp(min=1), rtol=0, atol=1e-12)
    assert torch.equal(got.count.expand(b, 1, m).long(), count)


def test_low_precision_is_summed_in_float32() -> None:
    q, k = (torch.randn(1, 2, 300, 8, generator=torch.Generator().manual_seed(0)).bfloat16() for _ in range(2))
    got = column_means(q, k, k, causal=True)
    want = column_means(q.double(), k.double(), k.double(), causal=True)
    assert got.mean.dtype == torch.float32
    torch.testing.assert_close(got.mean.double(), want.mean, rtol=1e-5, atol=1e-7)


def test_a_models_importance_is_that_of_its_eager_maps() -> None:
    for name in ("llama", "gemma3"):
        model = models.make(name, torch.float32)
        ids = models.inputs(name)["input_ids"][1:, :8]
        model.set_attn_implementation("eager")
        with torch.no_grad():
            maps = torch.stack(model(ids, output_attentions=True).attentions, 1)
        model.set_attn_implementation("sdpa")
        report = probe(tokens=8).run(model, ids)
        torch.testing.assert_close(report.alpha, S.reference(maps.double()).mean((0, 1, 2)), rtol=0, atol=1e-6)
        want = probe(tokens=8).from_maps(maps)
        assert (
            torch.equal(report.rate, want.rate) and report.head_rate.values.tolist() == want.head_rate.values.tolist()
        )


def test_order_batches_and_padding_of_the_texts_do_not_matter() -> None:
    model, draw = models.make("llama"), torch.Generator().manual_seed(0)
    ids = torch.randint(3, 97, (5, 20), generator=draw)
    want = probe(tokens=12).run(model, ids)
    padded, mask = torch.zeros(5, 25, dtype=torch.long), torch.zeros(5, 25, dtype=torch.long)
    for i, row in enumerate(ids):
        start = i % 4  # padding on both sides
        padded[i, start : start + 20], mask[i, start : start + 20] = row, 1
    for got in (
        probe(tokens=12, batch=2).run(model, ids),
        probe(tokens=12).run(model, ids[[3, 1, 4, 0, 2]]),
        probe(tokens=12, batch=3).run(model, padded, mask),
        probe(tokens=12).run(model, [r.tolist() for r in ids]),
    ):
        torch.testing.assert_close(got.alpha, want.alpha, rtol=0, atol=1e-12)
        assert torch.equal(got.rate, want.rate) and torch.equal(got.head_rate.values, want.head_rate.values)


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_bad_input_is_refused_with_what_to_do() -> None:
    model = models.make("llama")
    with pytest.raises(InvalidInput, match="text 0 has 20 tokens, fewer than tokens=64"):
        probe().run(model, torch.ones(1, 20, dtype=torch.long))
    with pytest.raises(InvalidInput, match="no texts"):
        probe().run(model, [])
    with pytest.raises(InvalidInput, match="whole numbers"):
        probe().run(model, torch.ones(2, 70))
    with pytest.raises(InvalidInput, match="differ"):
        probe().run(model, torch.ones(2, 70, dtype=torch.long), torch.ones(2, 69))
    model.config.pad_token_id = 0
    with pytest.raises(InvalidInput, match="begins with padding"):
        probe().run(model, torch.zeros(1, 70, dtype=torch.long))
    with pytest.raises(InvalidInput, match=r"\[texts, layers, heads, 64, 64\]"):
        probe().from_maps(torch.zeros(1, 1, 8, 8))


def test_windows_and_position_limits_below_t_are_refused() -> None:
    with pytest.raises(Refused, match="window of 8"):
        probe().run(models.make("gemma3"), torch.ones(1, 70, dtype=torch.long))
    with pytest.raises(Refused, match="window of 512"):
        probe(tokens=600).run(models.make("llama"), torch.ones(1, 700, dtype=torch.long))
    for name, needle in (("whisper", "two"), ("vit", "takes none"), ("falcon", "rounds to bfloat16")):
        with pytest.raises(Refused, match=needle):
            probe().run(models.make(name), torch.ones(1, 70, dtype=torch.long))


def test_attention_that_is_not_softmax_is_refused() -> None:
    model = models.make("llama")
    with qkv.applied(model, "sliding-window:window=4,sinks=0"), pytest.raises(Refused, match="not plain softmax"):
        probe().run(model, torch.randint(3, 97, (2, 70)))


# -- activations, files -----------------------------------------------------------------------------------------------


def test_activations_equal_a_plain_loop() -> None:
    model, ids = models.make("llama"), torch.randint(3, 97, (3, 20), generator=torch.Generator().manual_seed(0))
    got = probe(tokens=10, batch=2).massive_activations(model, ids)
    calls = []
    with torch.no_grad(), observe(model, lambda s, c: calls.append(c)):
        states = model(ids[:, :10], output_hidden_states=True).hidden_states
    hidden = [torch.stack([x[0].norm() / x[1:].norm(dim=-1).mean() for x in state]).mean() for state in states]
    torch.testing.assert_close(got.hidden, torch.stack(hidden), rtol=0, atol=1e-6)
    call = calls[1]
    norms = call.v.norm(dim=-1)
    want = (norms[..., 0] / norms[..., 1:].mean(-1)).mean(0)
    torch.testing.assert_close(got.value.values[1], want, rtol=0, atol=1e-12)
    near, far = [], []
    for s in range(3):
        near.append([torch.cosine_similarity(call.q[s, 4, t], call.k[s, 2, 0], dim=0) for t in range(1, 10)])
        far += [
            torch.cosine_similarity(call.q[s, 4, t], call.k[s, 2, j], dim=0)
            for t in range(1, 10)
            for j in range(1, t + 1)
        ]
    assert got.first.values[1, 4].item() == pytest.approx(torch.tensor(near).mean().item(), abs=1e-6)
    assert got.other.values[1, 4].item() == pytest.approx(torch.tensor(far).mean().item(), abs=1e-6)
    assert got.key.unit == "kv_head" and tuple(got.key.values.shape) == (3, 3)


def test_a_report_survives_its_file_and_can_be_drawn(tmp_path) -> None:
    model = models.make("llama")
    result = probe(samples=40).inspect(model, None, out=tmp_path / "x")
    again = SinkReport.load(tmp_path / "x" / "result.json")
    assert again.to_dict() == result.to_dict() and again.samples == 40 and again.activations is not None
    assert (tmp_path / "x" / "table.png").stat().st_size > 1000
    (tmp_path / "x" / "result.json").write_text('{"type": "sink_report", "format": 1}')
    with pytest.raises(SavedDataError, match="damaged"):
        SinkReport.load(tmp_path / "x" / "result.json")


class Letters:
    """One token a character, and a BOS."""

    def __call__(self, text: str, verbose: bool = True):
        return {"input_ids": [1, *[3 + ord(c) % 90 for c in text]]}

    def decode(self, ids, skip_special_tokens: bool = True) -> str:
        return "x" * (len(ids) - 1)


def test_texts_begin_at_paragraphs_and_never_overlap() -> None:
    method = probe(tokens=16, samples=50)
    text = "\n\n".join(chr(97 + i % 26) * (20 + i % 5) for i in range(60))
    texts = method.split(Letters(), text)
    assert len(texts) == 50 and all(len(t) == 16 and t[0] == 1 and len(set(t[1:])) == 1 for t in texts)
    run_on = method.split(Letters(), "abcdefg " * 200)  # no paragraphs: one behind the other
    assert len(run_on) >= S.FEWEST
    with pytest.raises(InvalidInput, match="at least 512 tokens"):
        method.split(Letters(), "abc " * 20)


def test_a_bias_key_at_minus_infinity_is_no_key_and_a_zero_value_only_shrinks_the_output() -> None:
    """The paper's key biases, by the one exact attention: an extra column with its own key and value 0."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 7, 4, generator=draw, dtype=torch.float64) for _ in range(3))
    base = attend(q, k, v, causal=True)
    bias = torch.randn(1, 2, 1, 4, generator=draw, dtype=torch.float64)
    mask = torch.cat([torch.ones(7, 1, dtype=torch.bool), torch.ones(7, 7, dtype=torch.bool).tril()], -1)
    both = attend(q, torch.cat([bias, k], 2), torch.cat([torch.zeros_like(bias), v], 2), mask=mask)
    share = (0.5 * (q @ bias.mT).squeeze(-1) - both.lse).exp()
    torch.testing.assert_close(both.out, (1 - share).unsqueeze(-1) * base.out, rtol=0, atol=1e-12)
    mask[:, 0] = False  # a bias key at minus infinity
    without = attend(q, torch.cat([bias, k], 2), torch.cat([bias, v], 2), mask=mask)
    for got, want in zip(without[:2], base[:2], strict=True):  # the extra exact zero may change the order of a sum
        torch.testing.assert_close(got, want, rtol=0, atol=1e-14)
