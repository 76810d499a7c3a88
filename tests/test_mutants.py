"""Tests of the tests: every law catches at least one deliberately broken method.

A module ``mutants/<kind>.py`` holds ``MUTANTS: dict[law name, list[(label, broken method, class or
factory)]]``.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qkv.core.errors import BrokenLaw
from qkv.core.spec import KINDS, Method
from qkv.testing import cases, laws

FOLDER = Path(__file__).parent / "mutants"


def _module(kind: str) -> ModuleType | None:
    path = FOLDER / f"{kind}.py"
    if not path.is_file():
        return None
    spec = importlib.util.spec_from_file_location(f"mutants_{kind}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MUTANTS = {kind: module.MUTANTS for kind in KINDS if (module := _module(kind)) is not None}
EVERY = [
    pytest.param(kind, name, broken, id=f"{kind}-{name}-{label}")
    for kind, table in MUTANTS.items() for name, entries in table.items() for label, broken in entries
]  # fmt: skip


def _method(broken: Any) -> Any:
    is_method = isinstance(broken, Method) or (isinstance(broken, type) and issubclass(broken, Method))
    return broken if is_method else broken()


@pytest.mark.parametrize(("kind", "name", "broken"), EVERY)
def test_mutant_is_caught(kind: str, name: str, broken: Any) -> None:
    law = laws(kind)[name]
    tried = [case for case in cases(_method(broken)) if law.applies(case)]
    assert tried, f"{name} does not apply to its mutant: nothing would be caught"
    for case in tried:
        try:
            law.run(case)
        except BrokenLaw:
            return
    pytest.fail(f"the mutant survives `{name}` on {', '.join(map(str, tried))}")


@pytest.mark.parametrize("kind", [k for k in KINDS if laws(k)])
def test_every_law_has_a_mutant(kind: str) -> None:
    table = MUTANTS.get(kind, {})
    assert set(table) == set(laws(kind)) and all(table.values()), (
        f"laws without a mutant: {sorted(set(laws(kind)) - set(table))}; "
        f"mutants without a law: {sorted(set(table) - set(laws(kind)))}"
    )
