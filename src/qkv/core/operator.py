"""Operators: what is computed from q, k, v and named extras; one file gives the definition and fast forms."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from qkv.core import registry
from qkv.core.attend import check_finite, check_qkv
from qkv.core.errors import InvalidInput, Refused, UnknownName
from qkv.core.spec import Extra, Method, Spec, near
from qkv.core.state import State

Form = Literal["auto", "reference", "fast", "kernel"]


@dataclass(frozen=True, kw_only=True)
class OperatorSpec(Spec):
    """Facts about an operator.

    reference: the definition, short and slow. fast: the same map, any device. step: one token, state in,
    state out. Each takes ``(q, k, v, *, scale, <extras>, <parameters>)`` and, as the capabilities below say,
    ``causal``, ``padding``, ``initial_state`` and ``return_state``; with ``return_state`` it returns ``(out,
    State)``.

    causal: ``only`` (always causal), ``never`` (always bidirectional), ``both`` (keyword ``causal``).
    padding: takes ``padding`` ``[B, M]`` bool, True = real token. gqa: G may be smaller than H.
    scale: the default softmax scale as a function of D, or None where the definition has no scale.
    initial: ``initial(q, k, v, **extras) -> State``, the empty state; given when the operator is recurrent.
    kernel: ``"qkv.kernels.gla:chunk"``, the Triton twin, imported on first use.
    extras: named extra inputs; the laws, bench, docs and layers read how to draw and check them from here.
    cross: N and M may differ (self-attention operators set False).
    """

    kind: ClassVar[str] = "operator"
    reference: Callable[..., Any]
    fast: Callable[..., Any]
    step: Callable[..., tuple[Tensor, State]] | None = None
    initial: Callable[..., State] | None = None
    kernel: str | None = None
    causal: Literal["only", "never", "both"] = "both"
    padding: bool = True
    gqa: bool = True
    cross: bool = True
    scale: Callable[[int], float] | None = field(default=lambda d: d**-0.5)
    extras: Mapping[str, Extra] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Operator(Method):
    """Base of operator configurations: its fields are passed to the forms as keywords."""

    spec: ClassVar[OperatorSpec]

    def form(self, name: Form, device: torch.device) -> Callable[..., Any]:
        """The function behind a form; ``auto`` is the kernel on CUDA where there is one, else ``fast``."""
        if name == "auto":
            name = "kernel" if self.spec.kernel and device.type == "cuda" else "fast"
        if name == "kernel":
            return load_kernel(self.spec)
        if name not in ("reference", "fast"):
            raise UnknownName(f"{self.id} has no form {name!r}{near(name, get_args(Form))}")
        return getattr(self.spec, name)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool | None = None, padding: Tensor | None = None,
        scale: float | None = None, initial_state: State | None = None, return_state: bool = False,
        form: Form = "auto", **extras: Any,
    ) -> Any:  # fmt: skip
        """See `attention`."""
        spec = self.spec
        if causal is None:
            causal = spec.causal != "never"
        if causal and spec.causal == "never":
            raise Refused(f"{self.id} is bidirectional by definition; call it with causal=False")
        if not causal and spec.causal == "only":
            raise Refused(f"{self.id} is causal by definition; it has no bidirectional form")
        check_qkv(q, k, v, causal=causal, who=self.id)
        if not spec.cross and q.shape[2] != k.shape[2]:
            raise InvalidInput(f"{self.id} is a self-attention: N={q.shape[2]} and M={k.shape[2]} must agree")
        if not spec.gqa and q.shape[1] != k.shape[1]:
            raise InvalidInput(f"{self.id} needs as many key/value heads as query heads; got H={q.shape[1]}, "
                               f"G={k.shape[1]}: repeat keys and values first")  # fmt: skip
        call: dict[str, Any] = self.settings() | self._extras(extras, q, k, v)
        if spec.causal == "both":
            call["causal"] = causal
        if padding is not None:
            if not spec.padding:
                raise Refused(f"{self.id} has no padded form; pass each row alone")
            if padding.dtype != torch.bool or padding.shape != (k.shape[0], k.shape[2]):
                raise InvalidInput(f"{self.id}: padding must be bool [B, M] = {(k.shape[0], k.shape[2])}, "
                                   f"True = real token; got {padding.dtype} {tuple(padding.shape)}")
            call["padding"] = padding
            q, k, v = (x.masked_fill(~padding[:, None, -x.shape[2]:, None], 0.0) for x in (q, k, v))
        check_finite(self.id, q=q, k=k, v=v)
        if spec.scale is not None:
            call["scale"] = spec.scale(q.shape[-1]) if scale is None else scale
        elif scale is not None:
            raise Refused(f"{self.id} has no softmax scale; leave `scale` out")
        if spec.initial is None and (initial_state is not None or return_state):
            raise Refused(f"{self.id} carries no recurrent state; leave initial_state and return_state out")
        if spec.initial is not None:
            call |= {"initial_state": initial_state, "return_state": return_state}
        return self.form(form, q.device)(q, k, v, **call)

    def _extras(self, given: Mapping[str, Any], q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
        sizes = {"b": q.shape[0], "h": q.shape[1], "g": k.shape[1], "n": q.shape[2], "m": k.shape[2],
                 "d": q.shape[3], "e": v.shape[3]}  # fmt: skip
        known = self.spec.extras
        for name in given:
            if name not in known:
                raise UnknownName(f"{self.id} takes no input {name!r}{near(name, known)}")
        for name, extra in known.items():
            x = given.get(name)
            if x is None:
                if extra.required:
                    raise InvalidInput(f"{self.id} needs `{name}` ({extra.doc}), axes {extra.axes}")
                continue
            shapes = [tuple(sizes[a] for a in axes) for axes in extra.axes.split("|")]
            if tuple(x.shape) not in shapes:
                raise InvalidInput(f"{self.id}: `{name}` has shape {tuple(x.shape)}; expected axes "
                                   f"{extra.axes} = {' or '.join(map(str, shapes))}")  # fmt: skip
            if x.device != q.device:
                raise InvalidInput(f"{self.id}: `{name}` lies on {x.device}, q on {q.device}")
            check_finite(self.id, **{name: x})
        return {name: x for name, x in given.items() if x is not None}


def load_kernel(spec: OperatorSpec) -> Callable[..., Any]:
    """The Triton twin of an operator, or `Refused` / `MissingDependency` with the reason."""
    from qkv.core.errors import MissingDependency

    if spec.kernel is None:
        raise Refused(f"{spec.id} has no kernel form; use form='fast'")
    module, _, name = spec.kernel.partition(":")
    import importlib

    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise MissingDependency(f"{spec.id}: its kernel needs Triton ({error}); install 'triton' on Linux, "
                                "or use form='fast'") from error  # fmt: skip


def attention(q: Tensor, k: Tensor, v: Tensor, *, method: str | Operator = "full", **inputs: Any) -> Any:
    """Any operator as a plain function.

    q: ``[B, H, N, D]``; k: ``[B, G, M, D]``; v: ``[B, G, M, E]`` -> ``[B, H, N, E]``. method: an operator's
    id (with settings, ``"gla:chunk_size=32"``) or configuration. inputs: the operator's extras by name, and
    ``causal``, ``padding`` ([B, M] bool, True = real), ``scale``, ``initial_state``, ``return_state`` (then
    ``(out, State)`` comes back), ``form`` (``auto``, ``reference``, ``fast``, ``kernel``). Raises
    `UnknownName`, `InvalidInput`, `Refused`.
    """
    chosen = registry.method(method) if isinstance(method, str) else method
    if not isinstance(chosen, Operator):
        raise Refused(f"{chosen.id} is of kind {chosen.spec.kind}, not an operator; "
                      "`qkv.methods(kind='operator')` lists what `attention` can compute")  # fmt: skip
    return chosen(q, k, v, **inputs)


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a form has a keyword."""
    return name in inspect.signature(function).parameters
