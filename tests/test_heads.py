"""Tables and sets of heads: order, ties, missing values, ranks, and files that are data."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qkv.core.errors import InvalidInput, InvalidParameter, SavedDataError, StorageError
from qkv.core.heads import HeadSet, HeadTable

NAN = float("nan")


def table(rows: list[list[float]], **more) -> HeadTable:
    return HeadTable(torch.tensor(rows), "x", **more)


def test_a_head_set_reads_every_notation_and_keeps_order() -> None:
    want = ((2, 1), (2, 10), (3, 4))
    for given_heads in (["3.4", "2.10", "2.1"], [(3, 4), [2, 10], "L2H1"], "2.1+2.10 3.4", HeadSet.of("2.1,2.10,3.4")):
        heads = HeadSet.of(given_heads)
        assert tuple(heads) == want and heads.names() == ("2.1", "2.10", "3.4")
    assert heads.at(2) == (1, 10) and heads.at(None) == () and heads.layers() == (2, 3)
    assert "2.10" in heads and (2, 2) not in heads and len(heads - HeadSet.of("2.1")) == 2
    assert heads.kv_heads(3) == HeadSet.of("2.0 2.3 3.1")
    assert HeadSet.from_dict(json.loads(json.dumps(heads.to_dict()))) == heads


@pytest.mark.parametrize("bad", [[2.1], ["x"], [(1, -1)], [(1, 2, 3)], 3, {"2.1": 1}, [(True, 1)], ["2.1.3"]])
def test_what_is_no_head_is_refused(bad: object) -> None:
    with pytest.raises(InvalidParameter):
        HeadSet.of(bad)


def test_a_float_is_refused_with_the_reason() -> None:
    with pytest.raises(InvalidParameter, match=r"2\.10 and 2\.1 are one number"):
        HeadSet.of([2.1])


def test_random_controls_are_reproducible_and_inside() -> None:
    pool = HeadSet.full(4, 5)
    a = pool.random(7, seed=3)
    assert a == pool.random(7, seed=3) != pool.random(7, seed=4) and len(a & pool) == 7
    with pytest.raises(InvalidInput, match="21 of 20"):
        pool.random(21, 0)


def test_top_breaks_ties_by_layer_and_head_and_never_takes_nan() -> None:
    t = table([[0.5, NAN, 0.5], [0.5, 0.9, 0.1]])
    assert t.top(1) == HeadSet.of("1.1") and t.top(3) == HeadSet.of("1.1 0.0 0.2")
    assert t.top(threshold=0.5) == HeadSet.of("1.1 0.0 0.2 1.0") and t.top(2, threshold=0.5) == HeadSet.of("1.1 0.0")
    assert len(t.measured) == 5 and t.top(0) == HeadSet()
    for call in (lambda: t.top(), lambda: t.top(6), lambda: table([[NAN]]).top(1)):
        with pytest.raises(InvalidInput):
            call()


def test_groups_take_their_best_head() -> None:
    t = table([[0.1, 0.7, NAN, NAN], [0.2, 0.0, 0.4, NAN]], group=2).by_kv_head()
    assert (
        t.unit == "kv_head"
        and t.values[0, 0] == pytest.approx(0.7)
        and t.values[1].tolist() == pytest.approx([0.2, 0.4])
    )
    assert math.isnan(t.values[0, 1]) and t.by_kv_head() is t
    with pytest.raises(InvalidInput, match="groups of 3"):
        table([[1.0, 2.0]], group=3).by_kv_head()


def _spearman(a: list[float], b: list[float]) -> float:
    """The definition, by counting."""

    def ranks(x: list[float]) -> list[float]:
        return [sum(y < v for y in x) + (sum(y == v for y in x) - 1) / 2 for v in x]

    ra, rb = ranks(a), ranks(b)
    ma, mb = sum(ra) / len(ra), sum(rb) / len(rb)
    top = sum((x - ma) * (y - mb) for x, y in zip(ra, rb, strict=True))
    size = math.sqrt(sum((x - ma) ** 2 for x in ra) * sum((y - mb) ** 2 for y in rb))
    return top / size if size else NAN


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=12))
def test_spearman_is_the_correlation_of_mean_ranks(pairs: list[tuple[int, int]]) -> None:
    a, b = ([float(p[i]) for p in pairs] for i in (0, 1))
    got, want = table([a]).spearman(table([b])), _spearman(a, b)
    assert got == pytest.approx(want, abs=1e-12) or (math.isnan(got) and math.isnan(want))


def test_spearman_leaves_out_what_one_table_lacks() -> None:
    assert table([[1.0, 2.0, 3.0, NAN]]).spearman(table([[5.0, 6.0, 7.0, 0.0]])) == pytest.approx(1.0)
    with pytest.raises(InvalidInput, match="one shape"):
        table([[1.0]]).spearman(table([[1.0, 2.0]]))


def test_files_hold_all_of_it_and_damage_is_an_error(tmp_path) -> None:
    t = table([[0.5, NAN]], group=2, records=({"a": (1, 2)},), notes={"n": 3})
    path = t.save(tmp_path / "deep" / "t.json")
    assert HeadTable.load(path) == t and json.loads(path.read_text())["values"] == [[0.5, None]]
    assert [p.name for p in path.parent.iterdir()] == ["t.json"]
    for text in (
        "{",
        "[]",
        '{"type": "head_table", "format": 9}',
        '{"type": "head_table", "format": 1, "values": [["a"]]}',
    ):
        path.write_text(text)
        with pytest.raises(SavedDataError):
            HeadTable.load(path)
    with pytest.raises(SavedDataError):
        HeadSet.load(tmp_path / "absent.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        t.save(tmp_path / "file" / "t.json")


def test_what_is_not_a_table_is_refused() -> None:
    for values in (torch.zeros(3), torch.zeros(0, 2), torch.tensor([[math.inf]])):
        with pytest.raises(InvalidInput):
            HeadTable(values, "x")
    with pytest.raises(InvalidInput, match="plain data"):
        HeadTable(torch.zeros(1, 1), "x", notes={"a": object()}).save("/tmp/never.json")


def test_a_table_can_be_drawn(tmp_path) -> None:
    path = table([[0.5, NAN], [0.1, 0.2]]).plot(tmp_path / "a" / "t.png")
    assert path.read_bytes()[:4] == b"\x89PNG"
