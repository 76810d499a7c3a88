"""The framework of the laws: what `qkv verify` says of good, broken, deviating and crashing methods, also a stranger's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import qkv
from qkv.core.errors import BrokenLaw, InvalidInput, InvalidParameter, UnknownName
from qkv.core.spec import Deviation
from qkv.ops.full import Full
from qkv.ops.linear import Linear
from qkv.testing import (
    Case,
    Result,
    Verdict,
    cases,
    close,
    expect,
    finite,
    law,
    laws,
    mutant,
    pairs,
    refuses,
    same,
    verify,
)

STRANGER = '''
"""Running mean: out_t = mean of v_1 .. v_t. A stranger's operator, in one file."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch

from qkv.core.operator import Operator, OperatorSpec


def reference(q, k, v):
    """The mean, written out. v [B, H, N, E] -> [B, H, N, E]."""
    return torch.stack([v[:, :, : t + 1].mean(2) for t in range(v.shape[2])], 2) + 0 * (q + k).sum(-1, keepdim=True)


def fast(q, k, v):
    """By a cumulative sum."""
    count = torch.arange(1, v.shape[2] + 1, device=v.device)[:, None]
    wide = torch.promote_types(v.dtype, torch.float32)
    return (v.cumsum(2, dtype=wide) / COUNT).to(v.dtype)


@final
@dataclass(frozen=True, kw_only=True)
class RunningMean(Operator):
    """The running mean of the values."""

    spec: ClassVar[OperatorSpec] = OperatorSpec(
        id="running-mean", title="Running mean", paper="baseline", reference=reference, fast=fast,
        causal="only", cross=False, gqa=False, padding=False, scale=None,
    )
'''


@pytest.fixture
def stranger(tmp_path: Path) -> Path:
    path = tmp_path / "running_mean.py"
    path.write_text(STRANGER.replace("COUNT", "count"))
    return path


def test_verify_judges_by_id_setting_class_instance_and_file(stranger: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    verdict = qkv.verify("full", quick=True, progress=lambda r, done, total: seen.append((r.id, done, total)))
    assert verdict.ok
    assert [x[1] for x in seen] == list(range(1, seen[-1][2] + 1))
    assert {r.id for r in verdict.results} == {x[0] for x in seen}
    assert f"{len(seen)} of {len(seen)} laws kept" in str(verdict)
    one = list(pairs(None, "gla:chunk_size=6,sub_chunk=2"))
    assert one[0].id.startswith("gla:chunk_size=6,sub_chunk=2-reference-")
    assert {p.case.method for p in one} == {qkv.method("gla", chunk_size=6, sub_chunk=2)}
    assert {p.case.method for p in pairs(None, Linear)} == {Linear.create(**t) for t in Linear.spec.trials}
    assert {p.case.form for p in pairs(None, qkv.method("linear"))} == {"reference", "fast"}
    assert verify(str(stranger), quick=True).ok
    assert verify(file=stranger, quick=True).ok


def test_a_strangers_mistake_is_named(stranger: Path) -> None:
    stranger.write_text(STRANGER.replace("COUNT", "(count + 1e-3)"))
    verdict = verify(file=stranger, quick=True)
    assert not verdict.ok
    assert {"equals_reference", "gradients_equal_reference"} <= {r.law for r in verdict.failed}
    assert "BROKEN running-mean-fast-equals_reference" in str(verdict)


def test_ids_read_method_form_law() -> None:
    ids = [p.id for p in pairs("operator")]
    assert "gla-fast-no_future_leak" in ids
    assert len(ids) == len(set(ids))
    assert not any(p.law.name == "declared_limits" for p in pairs(None, "full")), "a law that does not apply is no test"
    assert not any(p.law.expensive for p in pairs(None, "full", quick=True))
    assert all(x.explains for x in laws("operator").values())


def test_declared_deviations_are_strict() -> None:
    def leaky(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool = True, **call: object
    ) -> torch.Tensor:
        return Full.spec.fast(q, k, v, causal=False, **call)

    known = (Deviation("no_future_leak", "reads everything by design"),)
    broken, cured = mutant(Full, fast=leaky, deviations=known), mutant(Full, deviations=known)
    result = next(r for r in verify(broken, quick=True).results if r.id == "full-fast-no_future_leak")
    assert (result.ok, result.deviation, result.message) == (True, True, "reads everything by design")
    result = next(r for r in verify(cured, quick=True).results if r.id == "full-fast-no_future_leak")
    assert not result.ok
    assert "remove the declared deviation" in result.message
    with pytest.raises(UnknownName, match="did you mean 'no_future_leak'"):
        list(pairs(None, mutant(Full, deviations=(Deviation("no_futur_leak", "typo"),))))


def test_a_crash_is_not_ok_even_where_a_deviation_is_declared() -> None:
    def crash(*args: object, **call: object) -> torch.Tensor:
        raise ZeroDivisionError("oh")

    verdict = verify(mutant(Full, fast=crash, deviations=(Deviation("row_alone", "known"),)), quick=True)
    results = {r.id: r for r in verdict.results}
    assert not results["full-fast-row_alone"].ok
    assert "crashed under `row_alone`: ZeroDivisionError: oh" in results["full-fast-row_alone"].message


def test_nothing_shown_is_not_ok() -> None:
    assert not Verdict(()).ok
    assert "nothing was shown" in str(Verdict(()))
    assert not Verdict((Result("a", "b", False, 0.0, "c"),))


def test_unknown_targets_are_refused() -> None:
    with pytest.raises(UnknownName, match="did you mean 'gla'"):
        verify("glaa")
    with pytest.raises(UnknownName, match="there is no file"):
        verify("nowhere.py")
    with pytest.raises(InvalidParameter, match="a method is an id"):
        verify(3)  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match="no kind 'operators'"):
        law("operators", "x")
    with pytest.raises(InvalidParameter, match="two laws named 'row_alone'"):

        @law("operator", "x")
        def row_alone(case: Case) -> None: ...


def test_comparisons_always_raise_on_a_mismatch() -> None:
    x = torch.ones(2, 3)
    nan, inf = x.clone(), x.clone()
    nan[1, 2], inf[1, 2] = torch.nan, torch.inf
    close(x, x + 1e-9, atol=1e-8)
    close(inf, inf)
    bad = [(x, x + 1), (nan, nan), (nan, x), (x, nan), (inf, x), (x, inf), (-inf, inf), (x, x[:1]), (x[:0], x[:0])]
    for got, want in bad:
        with pytest.raises(BrokenLaw):
            close(got, want, atol=1e-3, rtol=1e-3)
    same(x, x.clone())
    for got, want in [(nan, nan), (x, x + 1e-7), (x, x.double()), (x, x[:1]), (x > 0, x > 2)]:
        with pytest.raises(BrokenLaw):
            same(got, want)
    with pytest.raises(BrokenLaw, match=r"at \(1, 2\)"):
        finite(nan)
    with pytest.raises(BrokenLaw, match="why"):
        expect(False, "why")
    assert str(refuses(ValueError, lambda: int("x"), "text")).startswith("invalid literal")
    for call in (lambda: int("3"), lambda: 1 // 0):
        with pytest.raises(BrokenLaw, match="text"):
            refuses(ValueError, call, "text")


def test_draws_are_reproducible_and_differ() -> None:
    a, b = (cases("full")[0].draw() for _ in range(2))
    first = a.normal(3)
    assert torch.equal(first, b.normal(3))
    assert not torch.equal(first, a.normal(3))
    assert not torch.equal(first, cases("full")[0].draw(1).normal(3))
    assert all(not torch.equal(a.permutation(2), torch.arange(2)) for _ in range(9))


def test_a_file_takes_settings_as_an_id_does(stranger: Path) -> None:
    assert qkv.verify(f"{stranger}:", quick=True).ok
    with pytest.raises(UnknownName, match="no parameter 'budget'"):
        qkv.verify(f"{stranger}:budget=7")


WRONG_FILES = [
    (lambda s: "print('hello'", "does not run: SyntaxError"),
    (lambda s: "import a_module_that_is_nowhere", "does not run: ModuleNotFoundError"),
    (lambda s: "x = 1", r"^running_mean\.py must define one method class"),
    (lambda s: s.replace("@dataclass(frozen=True, kw_only=True)\n", ""), "must be a frozen dataclass"),
    (lambda s: s.replace('id="running-mean"', 'id="Running Mean"'), "must be words of a-z"),
]


@pytest.mark.parametrize("change, needle", WRONG_FILES)
def test_a_file_that_is_no_method_says_what_is_wrong(stranger: Path, change, needle: str) -> None:
    stranger.write_text(change(stranger.read_text()))
    with pytest.raises(InvalidInput, match=needle):
        qkv.verify(stranger)


def test_a_file_in_the_place_of_an_id_is_told_from_an_unknown_name(stranger: Path) -> None:
    with pytest.raises(UnknownName, match="is a file, not the id"):
        qkv.method(str(stranger))
    assert (
        qkv.core.registry.load_file(qkv.core.registry.__file__.replace("core/registry", "ops/full")).spec.id == "full"
    )


@pytest.mark.parametrize("value", ["1" * 5000, "[" * 100_000])
def test_a_monstrous_value_is_a_wrong_value_and_no_crash(value: str) -> None:
    with pytest.raises(InvalidParameter, match="budget"):
        qkv.method(f"h2o:budget={value}")
