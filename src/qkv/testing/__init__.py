"""The laws of each kind of method, public: anyone can check a method of their own with `verify`."""

from qkv.testing._law import (
    Case, Draw, Law, Pair, Result, Verdict, cases, close, configurations, expect, finite, forms, judge, law, laws,
    mutant, pairs, refuses, same, verify,
)  # fmt: skip

__all__ = [
    "Case", "Draw", "Law", "Pair", "Result", "Verdict", "cases", "close", "configurations", "expect", "finite",
    "forms", "judge", "law", "laws", "mutant", "pairs", "refuses", "same", "verify",
]  # fmt: skip
