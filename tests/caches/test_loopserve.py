"""LoopServe: the oracles of its page, on the lines of a prompt and on the choice of an answer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import qkv
from qkv.caches._stores.selective import SelectiveCache
from qkv.caches.loopserve import LoopServe, reference
from qkv.core import vertical_slash
from qkv.core.attend import attend
from qkv.core.cache import Geometry, Step
from qkv.core.errors import InvalidInput, InvalidParameter
from qkv.core.vertical_slash import (
    Lines,
    VerticalSlash,
    attend_lines,
    greedy_cover,
    kept_share,
    lines_mask,
    probe_rows,
    sampled_rows,
    vertical_slash_cover,
)

H, G, D = 6, 3, 8
COVERS = [greedy_cover, vertical_slash_cover]


def draw(n: int, b: int = 1, seed: int = 0) -> list[Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(b, h, n, D, generator=gen, dtype=torch.float64) * 1.5 for h in (H, G, G)]


def memory(**changes: object) -> SelectiveCache:
    small: dict[str, object] = {"budget": 12, "refresh": 4, "sinks": 2, "window": 5, "sample": 6, "alpha": 1.0}
    layer = LoopServe(**(small | changes)).layer(Geometry(H, G, D, D))  # type: ignore[arg-type]
    assert isinstance(layer, SelectiveCache)
    return layer


def feed(layer: SelectiveCache, tensors: list[Tensor], cuts: list[int]) -> Tensor:
    outs, b = [], tensors[0].shape[0]
    for n in cuts:
        at = slice(layer.seen, layer.seen + n)
        step = Step(torch.arange(at.start, at.stop, dtype=torch.int32).expand(b, n), D**-0.5)
        outs.append(layer.attend(*(x[:, :, at] for x in tensors), step))
    return torch.cat(outs, 2)


# -- lines -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cover", COVERS)
@pytest.mark.parametrize("alpha", [0.3, 0.7, 0.95])
def test_a_cover_holds_its_share_and_no_line_too_many(cover: object, alpha: float) -> None:
    q, k, _ = draw(60)
    position = sampled_rows(40, 10, 0.4) + 20
    probs = probe_rows(q[0, :, position], k[0], position, D**-0.5)
    lines: Lines = cover(probs, position, alpha)  # type: ignore[operator]
    for head in range(H):
        kept = _cells(lines, position, head)
        mass = float(probs[head][kept].sum())
        assert mass == pytest.approx(float(lines.covered[head])) and mass >= alpha * len(position) - 1e-9
        less = []  # without the line that adds least
        for name in ("vertical", "slash"):
            for line in getattr(lines, name)[head].nonzero().flatten().tolist():
                part = {n: getattr(lines, n).clone() for n in ("vertical", "slash")}
                part[name][head, line] = False
                less.append(float(probs[head][_cells(Lines(**part, covered=lines.covered), position, head)].sum()))
        assert min(less) < alpha * len(position)
        if cover is vertical_slash_cover:
            assert lines.vertical[head].sum() + lines.slash[head].sum() == _shortest_prefix(
                probs[head], position, alpha
            )


def _cells(lines: Lines, position: Tensor, head: int) -> Tensor:
    """Dense, by the definition, without forced cells."""
    m = lines.vertical.shape[1]
    out = torch.zeros(len(position), m, dtype=torch.bool)
    for i, p in enumerate(position.tolist()):
        for j in range(p + 1):
            out[i, j] = lines.vertical[head, j] | lines.slash[head, p - j]
    return out


def _shortest_prefix(probs: Tensor, position: Tensor, alpha: float) -> int:
    """Lines by falling mass, taken until their union covers enough, recounted densely (lines that add nothing aside)."""
    m = probs.shape[1]
    mass = []
    for line in range(m):
        mass.append((float(probs[:, line].sum()), 0, line))
    for line in range(m):
        mass.append((sum(float(probs[i, p - line]) for i, p in enumerate(position.tolist()) if p >= line), 1, line))
    order = sorted(range(2 * m), key=lambda i: -mass[i][0])
    covered, count = torch.zeros_like(probs, dtype=torch.bool), 0
    for i in order:
        if float(probs[covered].sum()) >= alpha * len(position):
            return count
        before = covered.clone()
        for row, p in enumerate(position.tolist()):
            if mass[i][1] == 0:
                covered[row, mass[i][2]] |= mass[i][2] <= p
            elif p >= mass[i][2]:
                covered[row, p - mass[i][2]] = True
        count += bool((covered & ~before & (probs > 0)).any())
    return count


@pytest.mark.parametrize("cover", COVERS)
def test_known_minimal_covers(cover: object) -> None:
    """A band is covered by its slashes, a few columns by themselves."""
    position = torch.arange(20, 40)
    band, columns = torch.zeros(1, 20, 40), torch.zeros(1, 20, 40)
    for i, p in enumerate(position.tolist()):
        band[0, i, p - 2 : p + 1] = torch.tensor([0.2, 0.3, 0.5])
        columns[0, i, [3, 11]] = torch.tensor([0.4, 0.6])
    lines: Lines = cover(band, position, 1.0)  # type: ignore[operator]
    assert not lines.vertical.any() and lines.slash[0].nonzero().flatten().tolist() == [0, 1, 2]
    lines = cover(columns, position, 1.0)  # type: ignore[operator]
    assert not lines.slash.any() and lines.vertical[0].nonzero().flatten().tolist() == [3, 11]
    lines = cover(columns, position, 0.6)  # type: ignore[operator]
    assert lines.vertical[0].nonzero().flatten().tolist() == [11]


@pytest.mark.parametrize("cells", [1, 2 * (H // G) * 21 * 90])  # a KV head at a time, and two of three
def test_lines_of_few_heads_at_a_time_are_those_of_all(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = (x[0] for x in draw(90))
    prompt = VerticalSlash(0.6, 12, 0.1, "it")
    want = prompt.lines(q, k, D**-0.5)
    monkeypatch.setattr(vertical_slash, "CELLS", cells)
    assert all(torch.equal(x, y) for x, y in zip(prompt.lines(q, k, D**-0.5), want, strict=True))


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("history", [0, 33])
def test_attention_on_lines_is_dense_masked_softmax(chunk: int, history: int) -> None:
    q, k, v = (x[0] for x in draw(90))
    q = q[:, history:]
    position = torch.arange(history, 90)
    lines = vertical_slash_cover(probe_rows(q, k, position, D**-0.5), position, 0.6)
    mask = lines_mask(lines, position)
    assert mask.diagonal(history, 1, 2).all() and mask[:, :, 0].all()
    want = attend(q[None], k[None], v[None], mask=mask[None], scale=D**-0.5).out[0]
    torch.testing.assert_close(attend_lines(q, k, v, lines, scale=D**-0.5, chunk=chunk), want, rtol=0, atol=1e-12)
    n = 90 - history
    assert kept_share(lines, n) == pytest.approx(float(mask.sum()) / (H * (n * history + n * (n + 1) / 2)))


def test_every_row_and_all_mass_is_full_attention() -> None:
    q, k, v = (x[0] for x in draw(50))
    position = torch.arange(50)
    lines = vertical_slash_cover(probe_rows(q, k, position, D**-0.5), position, 1.0)
    want = attend(q[None], k[None], v[None], causal=True, scale=D**-0.5).out[0]
    torch.testing.assert_close(attend_lines(q, k, v, lines, scale=D**-0.5), want, rtol=0, atol=1e-12)


def test_sampled_rows() -> None:
    assert sampled_rows(5, 64, 0.1).tolist() == [0, 1, 2, 3, 4]
    rows = sampled_rows(1000, 64, 0.1)
    assert len(rows) == 164 and rows.diff().min() > 0 and rows[-64:].tolist() == list(range(936, 1000))
    assert rows[0] < 10 and int(rows[:100].diff().max()) <= 10


def test_bad_covers() -> None:
    with pytest.raises(InvalidInput, match="alpha"):
        vertical_slash_cover(torch.zeros(1, 2, 3), torch.arange(2), 0.0)
    with pytest.raises(InvalidInput, match=r"\[H, P, M\]"):
        greedy_cover(torch.zeros(2, 3), torch.arange(2), 0.5)


def test_a_sparse_prompt_is_close_and_closer_with_more_mass() -> None:
    q, k, v = draw(200, b=2, seed=1)
    want = attend(q, k, v, causal=True).out
    errors = []
    for alpha in (0.3, 0.8, 0.99):
        errors.append(float((feed(memory(alpha=alpha, sample=40), [q, k, v], [120, 80]) - want).abs().mean()))
    assert errors[0] > errors[1] > errors[2] > 0
    assert errors[2] < 0.05


# -- the answer -------------------------------------------------------------------------------------------------------------


def test_choices_are_those_of_the_definition() -> None:
    """At the end of a prompt, and every `refresh` steps from the queries since."""
    q, k, v = draw(60, seed=2)
    layer = memory()
    feed(layer, [q, k, v], [40])
    for turn in range(5):
        t, w = layer.seen, 5 if turn == 0 else 4
        assert int(layer.notes["full"][0]) == t - 1
        for g in range(G):
            mine = layer.notes["chosen"][0, g]
            want = reference(
                q[0, 2 * g : 2 * g + 2, t - w : t], k[0, g, :t], budget=12, sinks=2, refresh=4, scale=D**-0.5
            )
            assert sorted(mine[mine >= 0].tolist()) == want.tolist(), f"choice {turn}, head {g}"
        feed(layer, [q, k, v], [1] * 4)


def test_a_step_reads_the_choice_and_what_came_since() -> None:
    q, k, v = draw(60, seed=3)
    layer = memory()
    feed(layer, [q, k, v], [40])
    for t in range(40, 60):
        chosen, full = layer.notes["chosen"][0].clone(), int(layer.notes["full"][0])
        got = feed(layer, [q, k, v], [1])
        for h in range(H):
            mine = [*chosen[h // 2][chosen[h // 2] >= 0].tolist(), *range(full + 1, t + 1)]
            assert len(mine) <= 12 + 4 and len(set(mine)) == len(mine)
            want = torch.softmax(k[0, h // 2, mine] @ q[0, h, t] * D**-0.5, 0) @ v[0, h // 2, mine]
            torch.testing.assert_close(got[0, h, 0], want, rtol=0, atol=1e-12)


def test_a_choice_knows_nothing_of_later_queries() -> None:
    tensors, other = draw(60, seed=4), draw(60, seed=5)
    mixed = [torch.cat((x[:, :, :48], y[:, :, 48:]), 2) for x, y in zip(tensors, other, strict=True)]
    a, b = memory(), memory()
    feed(a, tensors, [40, *[1] * 8])
    feed(b, mixed, [40, *[1] * 8])
    assert torch.equal(a.notes["chosen"], b.notes["chosen"])


def test_what_was_dropped_returns_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt ends on passage A, the answer turns to passage B. The control chooses once."""
    gen = torch.Generator().manual_seed(0)
    a, b = torch.zeros(D, dtype=torch.float64), torch.zeros(D, dtype=torch.float64)
    a[0], b[1] = 12.0, 12.0
    k = 0.1 * torch.randn(1, G, 90, D, generator=gen, dtype=torch.float64)
    q, v = k.repeat_interleave(2, 1).clone(), torch.randn(1, G, 90, D, generator=gen, dtype=torch.float64)
    k[:, :, 10:14], k[:, :, 30:34] = a, b
    q[:, :, 50:60], q[:, :, 60:] = a, b
    want = attend(q, k, v, causal=True).out

    def late(layer: SelectiveCache) -> float:
        got = feed(layer, [q, k, v], [60, *[1] * 30])
        return float((got - want)[:, :, 70:].abs().max())

    assert late(memory()) < 0.05

    def keep(self: LoopServe, view: object) -> None:
        """C stays; only what came since moves on."""
        at, full = view.position.amax(-1), view.notes["full"]  # type: ignore[attr-defined]
        view.notes["full"] = torch.where(at - full >= self.refresh, at, full)  # type: ignore[attr-defined]

    monkeypatch.setattr(LoopServe, "_refresh", keep)
    assert late(memory()) > 0.5


@pytest.mark.parametrize("bad", [{"alpha": 0.0}, {"alpha": 1.1}, {"budget": 11}, {"refresh": 0}, {"window": 0}])
def test_bad_parameters(bad: dict[str, object]) -> None:
    with pytest.raises(InvalidParameter):
        qkv.method("loopserve", **bad)
