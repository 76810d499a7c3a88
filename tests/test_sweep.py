"""The comparisons of operators go on from files that they have written."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from _sweep import sweep

SETTINGS = {"steps": 4, "sizes": {"digits": {"size": (8, 8)}}, "seeds": 1}


def jobs(names: str, made: list[str]):
    return [({"seed": 0, "task": "t", "operator": n}, n, lambda n=n: made.append(n) or {"loss": 1.0}) for n in names]


def test_runs_of_other_code_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count = lambda runs: {"t": [{"operator": r["operator"]} for r in runs]}  # noqa: E731
    one = tmp_path / "one.json"
    sweep(jobs("ab", []), SETTINGS, count, one, 60.0)
    sweep(jobs("ab", []), SETTINGS, count, tmp_path / "two.json", 60.0, [one])
    assert "other code" not in capsys.readouterr().out
    one.write_text(one.read_text().replace('"source": "', '"source": "x', 1))
    sweep(jobs("ab", []), SETTINGS, count, tmp_path / "two.json", 60.0, [one])
    assert "1 of 2 earlier runs were made by other code" in capsys.readouterr().out


def test_runs_of_an_earlier_file_are_not_made_again(tmp_path: Path) -> None:
    """Also where settings hold tuples, which JSON gives back as lists."""
    made: list[str] = []
    count = lambda runs: {"t": [{"operator": r["operator"]} for r in runs]}  # noqa: E731
    sweep(jobs("ab", made), SETTINGS, count, tmp_path / "one.json", 60.0)
    whole = sweep(
        jobs("abc", made), SETTINGS | {"seeds": 3}, count, tmp_path / "two.json", 60.0, [tmp_path / "one.json"]
    )
    assert made == ["a", "b", "c"] and [r["operator"] for r in whole["runs"]] == ["a", "b", "c"]
    with pytest.raises(SystemExit, match="other settings: steps"):
        sweep(jobs("d", made), SETTINGS | {"steps": 5}, count, tmp_path / "three.json", 60.0, [tmp_path / "one.json"])
