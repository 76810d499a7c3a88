"""The vocabulary: registry, configurations, merge, exact attention, the import rule, and what every method must say."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import qkv
from qkv.core import registry
from qkv.core.attend import attend, causal_mask, sdpa
from qkv.core.errors import InvalidInput, InvalidParameter, QKVError, SavedDataError, StateError, UnknownName
from qkv.core.merge import merge
from qkv.core.operator import OperatorSpec
from qkv.core.spec import KINDS, Method, Spec, budget_param, near, param, parse_setting
from qkv.core.state import State
from qkv.testing import close, finite, laws

ROOT = Path(qkv.__file__).parent
SPECS = registry.methods()
IDS = [s.id for s in SPECS]


# --- registry and configurations -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Example(Method):
    """Every kind of parameter."""

    spec: ClassVar[Spec] = Spec(id="example", title="Example", paper="baseline")
    width: int = param(4, "tokens", low=1, high=64)
    rate: float = param(0.5, "share", low=0.0, high=1.0)
    mode: str = param("keep", "what to do", choices=("keep", "drop"))
    on: bool = param(True, "switch")
    layers: tuple[int, ...] = param((), "layer numbers", low=0)
    limit: int | None = param(None, "tokens or none")
    budget: float | int = budget_param(0.25)


def test_methods_are_found_by_folder_and_sorted() -> None:
    order = [(KINDS.index(s.kind), s.id) for s in SPECS]
    assert order == sorted(order)
    assert {"full", "gla", "linear"} <= {s.id for s in registry.methods("operator")} <= set(registry.ids())
    assert all(s.config.spec is s for s in SPECS)


@pytest.mark.parametrize("name", IDS)
def test_every_id_says_what_it_is(name: str) -> None:
    """A paper, a summary worth a page, and its limits: the known one, and for operators the web of equal settings."""
    s = registry.config_class(name).spec
    assert s.paper == "baseline" or s.paper.startswith(("arXiv:", "doi:", "https://")), f"{name}: paper {s.paper!r}"
    assert s.title
    assert s.source in ("code", "paper", "abstract", "baseline")
    assert len(s.summary) >= 40, f"{name}: summary must say in a sentence what the method does"
    assert len(s.honest) >= 20, f"{name}: `honest` must name its known limit"
    assert all(p.doc for p in s.parameters), f"{name}: every parameter needs a line of documentation"
    for limit in s.limits:
        assert limit.equals in registry.ids(), f"{name}: limit equals {limit.equals!r}, which does not exist"
        registry.method(name, **limit.parameters)
    if s.kind == "operator" and s.paper != "baseline":
        alone = "No setting makes it another operator" in (sys.modules[s.config.__module__].__doc__ or "")
        assert bool(s.limits) != alone, (
            f"{name}: declare a setting at which it equals another operator, or say that none does"
        )
    assert {d.law for d in s.deviations} <= set(laws(s.kind)), f"{name}: deviates from laws that do not exist"
    json.dumps(s.to_dict(), allow_nan=False)


@pytest.mark.parametrize("name", IDS)
def test_every_method_round_trips_through_json(name: str) -> None:
    for trial in registry.config_class(name).spec.trials:
        m = registry.method(name, **trial)
        again = registry.from_dict(json.loads(m.to_json()))
        assert again == m
        assert type(again) is type(m)
        assert registry.method(m) is m
        assert hash(again) == hash(m)


@pytest.mark.parametrize("name", [s.id for s in SPECS if isinstance(s, OperatorSpec)])
def test_every_operator_parameter_reaches_a_form(name: str) -> None:
    m = registry.method(name)
    reached = set().union(*(set(v) for k, v in m._settings.items() if k != "kernel" or m.spec.kernel))
    assert reached == set(m.settings())


def test_unknown_names_name_the_nearest() -> None:
    with pytest.raises(UnknownName, match="did you mean 'gla'"):
        qkv.method("gal")
    with pytest.raises(UnknownName, match="did you mean 'chunk_size'"):
        qkv.method("gla", chunk_sise=3)
    with pytest.raises(UnknownName, match="it takes none"):
        qkv.method("full", window=3)
    with pytest.raises(UnknownName, match="did you mean 'operator'"):
        qkv.methods(kind="operators")
    with pytest.raises(InvalidParameter, match="not by float"):
        qkv.method(1.5)  # type: ignore[arg-type]
    assert near("zzz", ["a", "b"]) == "; known: a, b"
    assert near("zzz", []) == ""


@pytest.mark.parametrize(("text", "want"), [
    ("h2o", ("h2o", {})),
    ("h2o:budget=0.25", ("h2o", {"budget": 0.25})),
    ("a:b=1,c=true,d=None,e=text", ("a", {"b": 1, "c": True, "d": None, "e": "text"})),
    ("a:where=[0,1,5],x=-2e-3", ("a", {"where": [0, 1, 5], "x": -2e-3})),
    ('a:m={"p": [1, 2], "q": 3}', ("a", {"m": {"p": [1, 2], "q": 3}})),
    (" a : b = 1 , ", ("a", {"b": 1})),
])  # fmt: skip
def test_settings_are_parsed(text: str, want: tuple[str, dict[str, Any]]) -> None:
    assert parse_setting(text) == want


@pytest.mark.parametrize("text", ["a:b", "a:=3", "a:1,2"])
def test_settings_that_are_no_pairs_are_refused(text: str) -> None:
    with pytest.raises(InvalidParameter, match="name=value"):
        parse_setting(text)


@pytest.mark.parametrize("values", [
    {"width": 0}, {"width": 65}, {"width": 2.0}, {"width": True}, {"width": "4"}, {"rate": 1.1}, {"rate": float("nan")},
    {"rate": "x"}, {"mode": "hold"}, {"mode": 1}, {"on": 1}, {"layers": 3}, {"layers": (1, "a")}, {"layers": (-1,)},
    {"limit": "x"}, {"budget": 0}, {"budget": -3}, {"budget": 1.5}, {"budget": 0.0}, {"budget": float("nan")},
    {"budget": True}, {"budget": "all"},
])  # fmt: skip
def test_parameters_out_of_range_or_type_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameter, match=f"example.*{next(iter(values))}"):
        Example.create(**values)


def test_configurations_are_values() -> None:
    cls = Example
    m = cls.create(layers=[1, 2], rate=1, limit=None)
    assert m.layers == (1, 2)
    assert isinstance(m.rate, float)
    assert m == cls.create(layers=(1, 2), rate=1.0)
    assert hash(m) == hash(cls.create(layers=(1, 2), rate=1.0))
    assert m != cls.create()
    with pytest.raises(AttributeError):
        m.width = 3
    with pytest.raises(InvalidParameter):
        m.replace(width=-1)
    assert str(cls.create(width=8)) == "example:width=8"
    assert str(cls.create()) == "example"
    assert [p.name for p in cls.spec.parameters] == ["width", "rate", "mode", "on", "layers", "limit", "budget"]


@pytest.mark.parametrize("data", [None, [], {}, {"id": 3}, {"id": "gla", "parameters": []},
                                  {"id": "gla", "parameters": {1: 2}}])  # fmt: skip
def test_damaged_configurations_are_refused(data: Any) -> None:
    with pytest.raises(SavedDataError):
        registry.from_dict(data)


def test_foreign_configurations_are_refused() -> None:
    for data in ({"id": "os.system", "parameters": {}}, {"id": "gla", "parameters": {"x": 1}}):
        with pytest.raises(UnknownName):
            registry.from_dict(data)
    with pytest.raises(InvalidParameter):
        registry.from_dict({"id": "gla", "parameters": {"chunk_size": "import os"}})


# --- state -----------------------------------------------------------------------------------------------------------


def test_state_is_a_value() -> None:
    s = State("gla", {"state": torch.arange(12.0).reshape(3, 2, 2)}, 5)
    assert s.bytes == 48
    assert s.crop(0) is s
    assert s.equal(s.to(torch.float32))
    assert not s.equal(s.index(torch.tensor([0, 2, 1])))
    beams = s.index(torch.tensor([2, 2, 0, 1]))
    assert beams.seen == 5
    assert torch.equal(beams["state"][1], s["state"][2])
    with pytest.raises(StateError, match="cannot be taken out"):
        s.crop(1)
    with pytest.raises(StateError, match="state of 'gla'"):
        s.of("linear")
    with pytest.raises(StateError, match=r"shape \(3, 2, 2\), expected \(4, 2, 2\)"):
        s.of("gla", state=(4, 2, 2))


def test_counts_of_a_state_stay_exact_in_another_dtype() -> None:
    s = State("lightning", {"state": torch.ones(1, 2), "position": torch.tensor([301])}, 301)
    low = s.to("cpu", torch.bfloat16)
    assert low["state"].dtype == torch.bfloat16
    assert torch.equal(low["position"], torch.tensor([301]))  # 302 in bfloat16
    with pytest.raises(StateError, match="'state' is "):
        low.exact()
    assert s.exact() is s


# --- (out, lse) and merge --------------------------------------------------------------------------------------------


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _parts(keys: list[int], n: int = 5) -> tuple[tuple[Tensor, Tensor, Tensor], list[tuple[Tensor, Tensor]]]:
    q, k, v = _normal(2, 3, n, 7), _normal(2, 3, sum(keys), 7, seed=1), _normal(2, 3, sum(keys), 11, seed=2)
    pieces = zip(k.split(keys, 2), v.split(keys, 2), strict=True)
    return (q, k, v), [attend(q, kp, vp)[:2] for kp, vp in pieces]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_merge_of_parts_is_the_whole(keys: list[int]) -> None:
    (q, k, v), parts = _parts(keys)
    whole = attend(q, k, v)
    out, lse = merge(*parts)
    close(out, whole.out, atol=1e-12, what="out")
    close(lse, whole.lse, atol=1e-12, what="lse")


def test_merge_is_associative_and_commutative() -> None:
    _, (a, b, c) = _parts([3, 5, 2])
    want = merge(a, b, c)
    for got in (merge(merge(a, b), c), merge(a, merge(b, c)), merge(c, a, b), merge(merge(c, b), merge(a))):
        close(got[0], want[0], atol=1e-12, what="out")
        close(got[1], want[1], atol=1e-12, what="lse")


def test_merge_with_huge_and_distant_lse_is_exact() -> None:
    out = [torch.ones(1, 1, 1, 2, dtype=torch.float64) * x for x in (1.0, 2.0)]
    for shift in (0.0, 1e4, -1e4):
        lse = [torch.full((1, 1, 1), shift + x, dtype=torch.float64) for x in (0.0, 1.0)]
        got = merge((out[0], lse[0]), (out[1], lse[1]))
        close(got[0], 1 + torch.sigmoid(torch.ones_like(got[0])), atol=1e-12)


def test_empty_parts_weigh_nothing_and_give_no_nan() -> None:
    _, (a, b) = _parts([3, 4])
    none = (torch.zeros_like(a[0]), torch.full_like(a[1], -torch.inf))
    for got, want in ((merge(a, none), a), (merge(none, a, none), a), (merge(none, none), none), (merge(none), none)):
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])
    leaves = [x.clone().requires_grad_() for x in (*a, *b, *none)]
    out, lse = merge(tuple(leaves[:2]), tuple(leaves[2:4]), tuple(leaves[4:]))  # type: ignore[arg-type]
    for grad in torch.autograd.grad(out.sum() + lse.sum(), leaves):
        finite(grad, "gradient next to an empty part")
    empty = [x.clone().requires_grad_() for x in none]
    grads = torch.autograd.grad(merge(tuple(empty))[0].sum(), empty, allow_unused=True)  # type: ignore[arg-type]
    assert all(g is None or bool(g.isfinite().all()) for g in grads)


def test_gradients_flow_through_out_and_lse() -> None:
    leaves = [_normal(1, 2, 3, 4, seed=s).requires_grad_() for s in (1, 2)]
    sums = [_normal(1, 2, 3, seed=s).requires_grad_() for s in (3, 4)]
    assert torch.autograd.gradcheck(lambda a, b, x, y: merge((a, x), (b, y)), (*leaves, *sums))
    (q, k, v), _ = _parts([3, 4])
    q.requires_grad_()
    k.requires_grad_()
    weight, other = _normal(2, 3, 5, 11, seed=8), _normal(2, 3, 5, seed=9)
    whole = attend(q, k, v)
    want = torch.autograd.grad((whole.out * weight).sum() + (whole.lse * other).sum(), (q, k))
    out, lse = merge(attend(q, k[:, :, :3], v[:, :, :3])[:2], attend(q, k[:, :, 3:], v[:, :, 3:])[:2])
    got = torch.autograd.grad((out * weight).sum() + (lse * other).sum(), (q, k))
    for x, y in zip(got, want, strict=True):
        close(x, y, atol=1e-11, what="gradient through merge")


def test_merge_refuses_parts_that_differ() -> None:
    _, (a, b) = _parts([3, 4])
    with pytest.raises(InvalidInput, match="at least one"):
        merge()
    with pytest.raises(InvalidInput, match="one shape"):
        merge(a, (b[0][:, :, :2], b[1][:, :, :2]))
    with pytest.raises(InvalidInput, match="one shape"):
        merge((a[0], a[1][..., :2]))


# --- exact attention -------------------------------------------------------------------------------------------------


def _dense(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Attention from its definition; allowed ``[B, H, N, M]``. Returns out, lse and the map."""
    r = q.shape[1] // k.shape[1]
    logits = q.shape[-1] ** -0.5 * q @ k.repeat_interleave(r, 1).mT
    weights = logits.exp() * allowed
    total = weights.sum(-1, keepdim=True)
    attention = torch.where(total > 0, weights / total, 0.0)
    return attention @ v.repeat_interleave(r, 1), total.squeeze(-1).log(), attention


MASKS = ["none", "per query head", "per key head", "for all heads", "one row", "two axes"]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("h", "g", "n", "m"), [(6, 3, 5, 11), (6, 3, 11, 11), (3, 3, 1, 7), (6, 2, 1, 7), (4, 1, 5, 5)]
)
@pytest.mark.parametrize("chunk", [1 << 24, 97])
def test_attend_and_sdpa_equal_the_definition(
    h: int, g: int, n: int, m: int, causal: bool, mask: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qkv.core.attend.CHUNK_ELEMENTS", chunk)
    q, k, v = _normal(2, h, n, 5), _normal(2, g, m, 5, seed=1), _normal(2, g, m, 7, seed=2)
    shape = {"none": None, "per query head": (2, h, n, m), "per key head": (2, g, n, m), "for all heads": (2, 1, n, m),
             "one row": (2, 1, 1, m), "two axes": (n, m)}[mask]  # fmt: skip
    rng = torch.Generator().manual_seed(3)
    given = None if shape is None else torch.rand(shape, generator=rng) < 0.6
    if given is not None:
        given[..., 0, :] = False  # a row without keys
    allowed = torch.ones(2, h, n, m, dtype=torch.bool)
    if given is not None:
        full = given.expand(2, -1, n, m) if given.ndim == 4 else given.expand(2, 1, n, m)
        allowed = full if full.shape[1] in (1, h) else full.repeat_interleave(h // g, 1)
        allowed = allowed.expand(2, h, n, m)
    if causal:
        allowed = allowed & causal_mask(n, m, torch.device("cpu"))
    want, lse, attention = _dense(q, k, v, allowed)
    got = attend(q, k, v, mask=given, causal=causal, mass=True)
    close(got.out, want, atol=1e-12, what="out")
    close(got.lse, lse, atol=1e-12, what="lse")
    close(got.mass, attention.sum(2), atol=1e-12, what="mass")  # type: ignore[arg-type]
    close(sdpa(q, k, v, mask=given, causal=causal), want, atol=1e-12, what="sdpa")
    rows = torch.rand(2, n, generator=rng) < 0.5
    some = attend(q, k, v, mask=given, causal=causal, mass=True, mass_rows=rows).mass
    close(some, (attention * rows[:, None, :, None]).sum(2), atol=1e-12, what="mass of some rows")  # type: ignore[arg-type]


def test_rows_without_keys_give_zero_and_finite_gradients() -> None:
    q, k, v = (_normal(1, 2, 3, 4, seed=s).requires_grad_() for s in range(3))
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    mask[:, :, 1] = False
    got = attend(q, k, v, mask=mask)
    assert not got.out[:, :, 1].any()
    assert bool((got.lse[:, :, 1] == -torch.inf).all())
    lse = got.lse.masked_fill(got.lse.isinf(), 0.0)
    for grad in torch.autograd.grad(got.out.sum() + lse.sum(), (q, k, v)):
        finite(grad, "gradient with a row without keys")
    for grad in torch.autograd.grad(sdpa(q, k, v, mask=mask).sum(), (q, k, v)):
        finite(grad, "sdpa gradient with a row without keys")


def test_attend_has_the_gradients_of_its_definition() -> None:
    q, k, v = (
        _normal(1, 4, 3, 3).requires_grad_(),
        _normal(1, 2, 5, 3, seed=1).requires_grad_(),
        _normal(1, 2, 5, 2, seed=2),
    )
    v.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v, causal=True)[:2], (q, k, v))


def test_attend_keeps_low_precision_dtypes_and_sums_in_float32() -> None:
    q, k, v = (_normal(2, 3, 37, 16, seed=s).to(torch.bfloat16) for s in range(3))
    got = attend(q, k, v, causal=True)
    assert got.out.dtype == torch.bfloat16
    assert got.lse.dtype == torch.float32
    want = attend(q.double(), k.double(), v.double(), causal=True)
    close(got.out, want.out, atol=2e-2)


@pytest.mark.parametrize(("change", "message"), [
    ({"mask": torch.ones(3, 3)}, "must be bool"),
    ({"mask": torch.ones(2, 5, 3, 3, dtype=torch.bool)}, "does not broadcast"),
    ({"mask": torch.ones(3, 4, dtype=torch.bool)}, "does not broadcast"),
    ({"k": torch.zeros(1, 2, 2, 4), "v": torch.zeros(1, 2, 2, 4), "causal": True}, "N <= M"),
])  # fmt: skip
def test_attend_refuses_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {n: torch.zeros(1, 2, 3, 4) for n in "qkv"}
    with pytest.raises(InvalidInput, match=message):
        attend(**(call | change))


# --- the house -------------------------------------------------------------------------------------------------------

RANK = {
    "core": 0, "kernels": 1, "ops": 1, "patterns": 1, "caches": 1, "layers": 2, "hosts": 3, "convert": 4, "probes": 4,
    "steer": 4, "decode": 4, "models": 4, "cost": 4, "distill": 5, "bench": 6, "loading": 7, "testing": 7, "cli": 8,
}  # fmt: skip
METHODS = set(registry._files().values())
MODEL_LIBRARIES = {"transformers", "diffusers", "timm"}


def _modules() -> Iterator[tuple[str, str, ast.Module]]:
    """(package, dotted name inside it, tree) of every source file."""
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield parts[0], ".".join(parts[1:]), ast.parse(path.read_text())


def _imports(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """(module, at import time) of every import, also inside functions."""
    inside = {n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)}
    typing_only = {n for i in ast.walk(tree) if isinstance(i, ast.If) and "TYPE_CHECKING" in ast.dump(i.test)
                   for n in ast.walk(i)}  # fmt: skip
    for node in ast.walk(tree):
        now = node not in inside and node not in typing_only
        if isinstance(node, ast.Import):
            yield from ((a.name, now) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            is_package = node.module.startswith("qkv") and (ROOT / "/".join(node.module.split(".")[1:])).is_dir()
            yield from ((f"{node.module}.{a.name}" if is_package else node.module, now) for a in node.names)


def test_imports_go_one_way() -> None:
    wrong = []
    for package, name, tree in _modules():
        if package in ("__init__", "__main__"):
            continue
        assert package in RANK, f"src/qkv/{package} has no place in the import rule"
        for module, _ in _imports(tree):
            root, _, rest = module.partition(".")
            if root != "qkv" or not rest or rest.split(".")[0] not in RANK:
                continue
            other, _, tail = rest.partition(".")
            here = f"{package}.{name}"
            if other == package:
                if module in METHODS and name != tail:
                    wrong.append(f"{here} imports the method {module}: shared maths belongs in _common")
            elif package == "testing":
                if other == "cli":
                    wrong.append(f"{here} imports {module}")
            elif RANK[other] >= RANK[package] or other == "kernels":
                wrong.append(f"{here} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_only_hosts_know_model_libraries_and_only_kernels_know_triton() -> None:
    wrong = []
    for package, name, tree in _modules():
        for module, now in _imports(tree):
            root = module.split(".")[0]
            if root in MODEL_LIBRARIES and package not in ("hosts", "distill", "bench", "testing", "cli"):
                wrong.append(f"{package}.{name} imports {root}")
            if root == "triton" and package != "kernels":
                wrong.append(f"{package}.{name} imports {root}")
            if package == "core" and now and root not in ({"torch", "qkv", "__future__"} | sys.stdlib_module_names):
                wrong.append(f"core.{name} imports {root}: core needs torch alone")
    assert not wrong, "\n".join(wrong)


def test_import_is_light() -> None:
    """`import qkv`, listing methods and running an operator load neither transformers nor triton."""
    code = (
        "import sys, qkv\n"
        "assert not {'torch', 'transformers', 'triton'} & set(sys.modules), 'import qkv loads too much'\n"
        "import torch\n"
        "before = set(sys.modules)\n"
        "x = torch.zeros(1, 2, 3, 4)\n"
        "qkv.attention(x, x, x); qkv.attention(x, x, x, method='gla', log_decay=torch.zeros(2)); qkv.methods('operator')\n"
        "print(sorted({'transformers', 'triton'} & (set(sys.modules) - before)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_one_file_is_one_method_and_ends_in_it() -> None:
    for name, module in registry._files().items():
        cls = registry.config_class(name)
        tree = ast.parse(Path(sys.modules[module].__file__ or "").read_text())
        assert ast.get_docstring(tree), f"{module} opens with its formula, axes and paper"
        last = tree.body[-1]
        assert isinstance(last, ast.ClassDef), f"{module} ends in its method class"
        assert last.name == cls.__name__, f"{module} ends in its method class"
        assert {"final", "dataclass"} <= {d.id if isinstance(d, ast.Name) else d.func.id for d in last.decorator_list}  # type: ignore[union-attr]


def test_every_error_is_also_a_builtin_one() -> None:
    from qkv.core import errors

    for cls in vars(errors).values():
        if isinstance(cls, type) and issubclass(cls, QKVError) and cls is not QKVError:
            assert issubclass(cls, (ValueError, LookupError, RuntimeError, ImportError, AssertionError, OSError)), cls
            assert cls.__doc__


def test_public_names_resolve() -> None:
    for name in ("method", "methods", "attention", "attend", "merge", "verify"):
        assert callable(getattr(qkv, name))
        assert name in dir(qkv)
    with pytest.raises(AttributeError, match="no attribute 'atention'"):
        qkv.atention  # noqa: B018
