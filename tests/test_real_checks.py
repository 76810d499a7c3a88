"""The checks on real input fit the library: what they override has the parameters of what it overrides.

Type checking leaves them out, and each runs for minutes: a changed signature would show on the next recording only.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks" / "real"
SCRIPTS = sorted(p.stem for p in FOLDER.glob("*.py") if p.read_text().find("\nclass ") >= 0)


@pytest.mark.parametrize("script", SCRIPTS)
def test_overridden_methods_keep_their_parameters(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    try:
        module = importlib.import_module(script)
    finally:
        for name in set(sys.modules) - before:
            if (
                getattr(sys.modules[name], "__file__", None)
                and FOLDER in Path(sys.modules[name].__file__ or "").parents
            ):
                del sys.modules[name]
    for cls in vars(module).values():
        if not inspect.isclass(cls) or cls.__module__ != script:
            continue
        for name, mine in vars(cls).items():
            theirs = next((vars(b)[name] for b in cls.__mro__[1:] if name in vars(b)), None)
            if name.startswith("__") or not inspect.isfunction(mine) or not inspect.isfunction(theirs):
                continue
            if theirs.__module__.startswith("qkv"):
                assert list(inspect.signature(mine).parameters) == list(inspect.signature(theirs).parameters), (
                    cls,
                    name,
                )
