"""Operators: what is computed from q, k, v and named extras; one file gives the definition and fast forms."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from qkv.core import registry
from qkv.core.attend import check_finite, check_qkv, readable
from qkv.core.errors import InvalidInput, MissingDependency, Refused, UnknownName
from qkv.core.spec import Extra, Method, Place, Spec, near
from qkv.core.state import State

Form = Literal["auto", "reference", "fast", "kernel", "loop"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wiring:
    """What an operator's definition leaves to the layer that holds it; a layer reads it, the operator itself never does.

    queries, keys: feature maps of the projections. key_width: D of a head, None: as wide as its values. rotary: positions are
    rotated into queries and keys. settings: parameters that depend on the place, ``settings(place) -> {name: value}``; what
    a user sets wins.
    """

    queries: Callable[[Tensor], Tensor] | None = None
    keys: Callable[[Tensor], Tensor] | None = None
    key_width: int | None = None
    rotary: bool = False
    settings: Callable[[Place], Mapping[str, Any]] | None = None


@dataclass(frozen=True, kw_only=True)
class OperatorSpec(Spec):
    """Facts about an operator.

    reference: the definition, short and slow. fast: the same map, any device. loop: the same map once more
    as a plain loop over tokens, written independently of `reference`; only the laws use it. Each takes ``(q,
    k, v, *, scale, <extras>, <parameters>)`` and, as the capabilities below say, ``causal``, ``padding``,
    ``initial_state`` and ``return_state``; with ``return_state`` it returns ``(out, State)``. A parameter
    that a form does not name in its signature is not passed to it (`reference` needs no chunk size).

    causal: ``only`` (always causal), ``never`` (always bidirectional), ``both`` (keyword ``causal``).
    padding: takes ``padding`` ``[B, M]`` bool, True = real token. gqa: G may be smaller than H.
    scale: the default softmax scale as a function of D, or None where the definition has no scale.
    initial: ``initial(q, k, v, *, <extras>, <parameters>) -> State``, the empty state for tensors like these;
    given when the operator is recurrent. step: ``step(q, k, v, state, *, ...) -> (out, State)``, one token.
    kernel: ``"qkv.kernels.gla:chunk"``, the Triton twin, imported on first use; it takes every parameter.
    kernel_limit: ``kernel_limit(q, k, v, <parameters>)``: why the kernel does not compute such a call (widths, a setting),
    None where it does. ``auto`` then takes `fast`, and form="kernel" is refused with the reason.
    extras: named extra inputs; the laws, bench, docs and layers read how to draw and check them from here.
    cross: N and M may differ (self-attention operators set False; ``"bidirectional"``: only without `causal`).
    A bidirectional call keeps no state. Axes ``s`` and ``w`` of an extra are sizes of its own (codes, a window).
    causal_needs: optional extras that a causal call must be given (agents that do not depend on later tokens).
    wiring: what a layer puts around the operator, see `Wiring`.
    """

    kind: ClassVar[str] = "operator"
    reference: Callable[..., Any]
    fast: Callable[..., Any]
    loop: Callable[..., Any] | None = None
    step: Callable[..., tuple[Tensor, State]] | None = None
    initial: Callable[..., State] | None = None
    kernel: str | None = None
    kernel_limit: Callable[..., str | None] | None = None
    causal: Literal["only", "never", "both"] = "both"
    padding: bool = True
    gqa: bool = True
    cross: bool | Literal["bidirectional"] = True
    causal_needs: tuple[str, ...] = ()
    scale: Callable[[int], float] | None = field(default=lambda d: d**-0.5)
    extras: Mapping[str, Extra] = field(default_factory=dict)
    wiring: Wiring = field(default_factory=Wiring)


@dataclass(frozen=True, kw_only=True)
class Operator(Method):
    """Base of operator configurations: its fields are passed to the forms as keywords."""

    spec: ClassVar[OperatorSpec]

    def __post_init__(self) -> None:
        super().__post_init__()
        settings, spec = self.settings(), self.spec
        functions = {"reference": spec.reference, "fast": spec.fast, "loop": spec.loop, "step": spec.step,
                     "initial": spec.initial}  # fmt: skip
        chosen = {n: {k: v for k, v in settings.items() if takes(f, k)} for n, f in functions.items() if f}
        object.__setattr__(self, "_settings", chosen | {"kernel": settings})

    def form(self, name: Form, device: torch.device) -> Callable[..., Any]:
        """The function behind a form; ``auto`` is the kernel on CUDA where there is one, else ``fast``."""
        return self._form(name, device)[1]

    def _form(self, name: str, device: torch.device) -> tuple[str, Callable[..., Any]]:
        if name == "auto":
            name = "kernel" if self.spec.kernel and device.type == "cuda" else "fast"
        if name == "kernel":
            return name, load_kernel(self.spec)
        if name not in get_args(Form):
            raise UnknownName(f"{self.id} has no form {name!r}{near(name, get_args(Form))}")
        function = getattr(self.spec, name)
        if function is None:
            raise Refused(f"{self.id} gives no {name!r} form; use form='fast'")
        return name, function

    def kernel_limit(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        """Why the kernel does not compute such a call, None where it does."""
        limit = self.spec.kernel_limit
        return None if limit is None else limit(q, k, v, **self._settings["kernel"])  # type: ignore[attr-defined]

    def _within(self, form: Form, q: Tensor, k: Tensor, v: Tensor) -> Form:
        """`form` without the kernel where that does not compute such a call: ``fast`` for ``auto``, else `Refused`."""
        if self.spec.kernel is None or form not in ("auto", "kernel") or (form == "auto" and not q.is_cuda):
            return form
        why = self.kernel_limit(q, k, v)
        if why is not None and form == "kernel":
            raise Refused(f"{self.id}: its kernel {why}; use form='fast'")
        return form if why is None else "fast"

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
        if causal:
            self._check_needs(extras)
        q, k, v, call = self._inputs(q, k, v, causal, padding, scale, extras)
        if spec.causal == "both":
            call["causal"] = causal
        if spec.initial is None and (initial_state is not None or return_state):
            raise Refused(f"{self.id} carries no recurrent state; leave initial_state and return_state out")
        if not causal and (initial_state is not None or return_state):
            raise Refused(f"{self.id} keeps a state only when causal; leave initial_state and return_state out")
        if spec.initial is not None:
            self._check_state(initial_state, q.device, optional=True)
            if initial_state is not None:
                numbers = {n: x for n, x in initial_state.tensors.items() if x.is_floating_point()}
                check_finite(f"{self.id}: initial_state", **numbers)
            call |= {"initial_state": initial_state, "return_state": return_state}
        name, function = self._form(self._within(form, q, k, v), q.device)
        return function(q, k, v, **call, **self._settings[name])  # type: ignore[attr-defined]

    def initial(self, q: Tensor, k: Tensor, v: Tensor, **extras: Any) -> State:
        """The empty state of a recurrent operator, for tensors of these shapes, dtype and device."""
        if self.spec.initial is None:
            raise Refused(f"{self.id} carries no recurrent state")
        self._check_needs(extras)
        return self.spec.initial(q, k, v, **extras, **self._settings["initial"])  # type: ignore[attr-defined]

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, state: State, *, padding: Tensor | None = None,
        scale: float | None = None, **extras: Any,
    ) -> tuple[Tensor, State]:  # fmt: skip
        """Decode one token: q ``[B, H, 1, D]``, k ``[B, G, 1, D]``, v ``[B, G, 1, E]`` and the state so far.

        Returns out ``[B, H, 1, E]`` and the new state; the given state is not changed. The other arguments
        are those of `attention`, for this token.
        """
        if self.spec.step is None:
            raise Refused(f"{self.id} has no one-token form; call it on the whole sequence")
        self._check_needs(extras)
        q, k, v, call = self._inputs(q, k, v, True, padding, scale, extras)
        if q.shape[2] != 1 or k.shape[2] != 1:
            raise InvalidInput(f"{self.id}: step takes one token, got N={q.shape[2]} and M={k.shape[2]}")
        self._check_state(state, q.device)
        return self.spec.step(q, k, v, state, **call, **self._settings["step"])  # type: ignore[attr-defined]

    def _check_needs(self, extras: Mapping[str, Any]) -> None:
        missing = [name for name in self.spec.causal_needs if extras.get(name) is None]
        if missing:
            raise Refused(f"{self.id} is causal only with {' and '.join(missing)} given; pass what does not depend on later "
                          "tokens, or call it with causal=False")  # fmt: skip

    def _inputs(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, padding: Tensor | None, scale: float | None,
        extras: Mapping[str, Any],
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:  # fmt: skip
        """Checked q, k, v (0 where padded) and the keywords of a form: extras, padding, scale."""
        spec = self.spec
        check_qkv(q, k, v, causal=causal, who=self.id)
        cross = spec.cross is True or (spec.cross == "bidirectional" and not causal)
        if not cross and q.shape[2] != k.shape[2]:
            what = "a self-attention" if not spec.cross else "a self-attention when causal"
            raise InvalidInput(f"{self.id} is {what}: N={q.shape[2]} and M={k.shape[2]} must agree")
        if not spec.gqa and q.shape[1] != k.shape[1]:
            raise InvalidInput(f"{self.id} needs as many key/value heads as query heads; got H={q.shape[1]}, "
                               f"G={k.shape[1]}: repeat keys and values first")  # fmt: skip
        call: dict[str, Any] = self._extras(extras, q, k, v)
        if padding is not None:
            self._check_padding(padding, q, k)
            aligned = causal or not cross  # the queries are the last N of the M tokens
            axes = {name: self._axes(name, x, q, k, v) for name, x in call.items()}
            call = {name: _blank(x, axes[name], padding, aligned) for name, x in call.items()}
            q, k, v = (_blank(x, a, padding, aligned) for x, a in ((q, "bhnd"), (k, "bgmd"), (v, "bgme")))
        self._check_values(q, k, v, call)
        if padding is not None:
            call["padding"] = padding
        if spec.scale is not None:
            call["scale"] = spec.scale(q.shape[-1]) if scale is None else scale
        elif scale is not None:
            raise Refused(f"{self.id} has no softmax scale; leave `scale` out")
        return q, k, v, call

    def _check_padding(self, padding: Tensor, q: Tensor, k: Tensor) -> None:
        if not self.spec.padding:
            raise Refused(f"{self.id} has no padded form; pass each row alone")
        want = (k.shape[0], k.shape[2])
        if not isinstance(padding, Tensor) or padding.dtype != torch.bool or tuple(padding.shape) != want:
            got = f"{getattr(padding, 'dtype', type(padding))} {tuple(getattr(padding, 'shape', ()))}"
            raise InvalidInput(f"{self.id}: padding must be bool [B, M] = {want}, True = real; got {got}")
        if padding.device != q.device:
            raise InvalidInput(f"{self.id}: padding lies on {padding.device}, q on {q.device}")

    def _check_state(self, state: State | None, device: torch.device, optional: bool = False) -> None:
        if not (isinstance(state, State) or (optional and state is None)):
            raise InvalidInput(f"{self.id}: a state is a `State` that this operator returned, not "
                               f"{type(state).__name__}")  # fmt: skip
        if state is not None:
            state.of(self.id).on(device).exact()

    def _axes(self, name: str, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> str:
        """Which of the declared axes of an extra fit its shape."""
        sizes = {"b": q.shape[0], "h": q.shape[1], "g": k.shape[1], "n": q.shape[2], "m": k.shape[2],
                 "d": q.shape[3], "e": v.shape[3]}  # fmt: skip
        axes = self.spec.extras[name].axes
        options = {a: tuple(sizes.get(c, c) for c in a) for a in axes.split("|")}
        for letters, shape in options.items():
            if _fits(tuple(x.shape), shape):
                return letters
        raise InvalidInput(f"{self.id}: `{name}` has shape {tuple(x.shape)}; expected axes {axes} = "
                           f"{' or '.join(map(str, options.values()))}")  # fmt: skip

    def _extras(self, given: Mapping[str, Any], q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
        known = self.spec.extras
        for name in given:
            if name not in known:
                hint = near(name, known) if known else "; it takes none"
                raise UnknownName(f"{self.id} takes no input {name!r}{hint}")
        for name, extra in known.items():
            x = given.get(name)
            if x is None:
                if extra.required:
                    raise InvalidInput(f"{self.id} needs `{name}` ({extra.doc}), axes {extra.axes}")
                continue
            if not isinstance(x, Tensor) or x.is_complex():
                got = x.dtype if isinstance(x, Tensor) else type(x).__name__
                raise InvalidInput(f"{self.id}: `{name}` must be a torch tensor of real numbers, not {got}")
            self._axes(name, x, q, k, v)
            if x.device != q.device:
                raise InvalidInput(f"{self.id}: `{name}` lies on {x.device}, q on {q.device}")
        self._agree({name: x for name, x in given.items() if x is not None}, q, k, v)
        return {name: x for name, x in given.items() if x is not None}

    def _agree(self, extras: Mapping[str, Tensor], q: Tensor, k: Tensor, v: Tensor) -> None:
        """Raise `InvalidInput` unless sizes of the extras' own (``s``, ``w``) are the same wherever they are named alike."""
        sizes: dict[str, tuple[str, int]] = {}
        for name, x in extras.items():
            if not set("sw") & set(self.spec.extras[name].axes):
                continue
            for letter, size in zip(self._axes(name, x, q, k, v), x.shape, strict=True):
                if letter in "sw" and sizes.setdefault(letter, (name, size))[1] != size:
                    first, other = sizes[letter]
                    axes = " and ".join(self.spec.extras[n].axes for n in (first, name))
                    raise InvalidInput(f"{self.id}: `{first}` has {letter} = {other}, `{name}` has {letter} = {size}; axes "
                                       f"{axes} must agree")  # fmt: skip

    def _check_values(self, q: Tensor, k: Tensor, v: Tensor, extras: Mapping[str, Tensor]) -> None:
        """Finite values, extras within their bounds; silent where values cannot be read."""
        numbers = {n: x for n, x in extras.items() if x.is_floating_point()}
        check_finite(self.id, q=q, k=k, v=v, **numbers)
        for name, x in extras.items():
            extra = self.spec.extras[name]
            if (extra.low is None and extra.high is None) or not readable(x):
                continue
            low, high = (float(y) for y in x.detach().aminmax())
            if (extra.low is not None and low < extra.low) or (extra.high is not None and high > extra.high):
                bounds = ((">=", extra.low), ("<=", extra.high))
                wanted = " and ".join(f"{sign} {bound}" for sign, bound in bounds if bound is not None)
                raise InvalidInput(f"{self.id}: `{name}` must be {wanted} ({extra.doc}); got values from "
                                   f"{low:.4g} to {high:.4g}")  # fmt: skip


def _fits(shape: tuple[int, ...], wanted: tuple[int | str, ...]) -> bool:
    """Whether sizes agree; a letter stands for any size but 0."""
    return len(shape) == len(wanted) and all(
        n == w if isinstance(w, int) else n > 0 for n, w in zip(shape, wanted, strict=True)
    )


def _blank(x: Tensor, axes: str, padding: Tensor, aligned: bool) -> Tensor:
    """`x` with 0 at the padded positions of its token axes, also where it holds NaN.

    A query axis that is not aligned with the keys (cross-attention) has no padded positions of its own:
    there only values that are not finite are blanked, and only when N = M makes it possible that they are
    padding.
    """
    if axes[0] != "b":
        return x
    for at, letter in enumerate(axes):
        if letter == "m" or (letter == "n" and x.shape[at] <= padding.shape[1]):
            gone = ~padding[:, padding.shape[1] - x.shape[at] :]
            gone = gone.reshape(-1, *(1,) * (at - 1), x.shape[at], *(1,) * (x.ndim - at - 1))
            if letter == "n" and not aligned:
                if x.shape[at] != padding.shape[1]:
                    continue
                gone = gone & ~torch.isfinite(x)
            x = x.masked_fill(gone, 0.0)
    return x


def load_kernel(spec: OperatorSpec) -> Callable[..., Any]:
    """The Triton twin of an operator, or `Refused` / `MissingDependency` with the reason."""
    if spec.kernel is None:
        raise Refused(f"{spec.id} has no kernel form; use form='fast'")
    module, _, name = spec.kernel.partition(":")
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
    chosen = registry.method(method)
    if not isinstance(chosen, Operator):
        raise Refused(f"{chosen.id} is of kind {chosen.spec.kind}, not an operator; "
                      "`qkv.methods(kind='operator')` lists what `attention` can compute")  # fmt: skip
    return chosen(q, k, v, **inputs)


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a form has a keyword."""
    return name in inspect.signature(function).parameters
