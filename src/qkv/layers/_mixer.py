r"""A token mixer around any operator: projections, what the operator learns, its memory as a value, the output projection.

    y = x + silu(conv(x)),   q, k, v = f(W y),   out = W_o norm(operator(q, k, v, learnt inputs))

The convolution is causal, per channel, and left out for images; norm is RMS over all heads, without weights. The operator's file
says which feature maps f, key width and learnt inputs belong to it (`qkv.core.operator.Wiring`, `qkv.core.spec.Learnt`). With
fewer key/value heads than heads, each is read by a group of neighbouring heads, where the operator allows it (``gqa``).
Causal mixers decode from a `State`: that of a recurrent operator, a ring of the newest tokens for a sliding window (both
constant), all keys and values for other operators. Rows may be padded on the left.

A `MixingLayer` (`base-conv`, `vq-gated-attention`) stands in the same place with a module of its own.

Axes: B batch, N tokens, W width, H heads, G key/value heads, D key width, E value width, S stored slots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkv.core.attend import sdpa
from qkv.core.errors import InvalidInput, InvalidParameter, Refused, StateError
from qkv.core.layer import Layer
from qkv.core.operator import Operator, Wiring
from qkv.core.spec import Extra, Learnt, Method, Place
from qkv.core.state import State
from qkv.patterns.sliding_window import SlidingWindow

Tensors = dict[str, Tensor]
SHORT = 1024  # tokens up to which a window's mask is written out


class MixingLayer(Layer):
    """Base of layers that mix the tokens of a causal sequence without an operator.

    Their modules are called as a `Mixer` is, ``module(x, padding=, state=, keep=) -> (out, State | None)``, and say whose states
    they take (``owner``). A module with ``mixes_stream`` is also given ``stream=`` (the block's residual stream, for None its
    input) and ``losses=`` (a list for what it adds to a training loss), and returns the new stream instead of a change to it.
    """


def check_mixing(method: Method, *, causal: bool, grouped: bool = False) -> Method:
    """The method, when a layer can mix by it. grouped: with fewer key/value heads than heads. Raises `Refused`."""
    if isinstance(method, SlidingWindow):
        return method
    if isinstance(method, MixingLayer):
        if not causal:
            raise Refused(f"{method.id} is causal by definition: it cannot be a layer of a bidirectional model")
        return method
    if not isinstance(method, Operator):
        raise Refused(f"{method.id} is of kind {method.spec.kind}; a layer mixes its tokens by an operator "
                      "(`qkv.methods(kind='operator')`), by sliding-window or by base-conv")  # fmt: skip
    if grouped and not method.spec.gqa:
        raise Refused(
            f"{method.id} needs as many key/value heads as heads; leave kv_heads out (0) in a model that has it"
        )
    if causal and method.spec.causal == "never":
        raise Refused(f"{method.id} is bidirectional by definition: it cannot be a layer of a causal model")
    if not causal and method.spec.causal == "only":
        raise Refused(f"{method.id} is causal by definition: it cannot be a layer of a bidirectional model")
    for name, extra in method.spec.extras.items():
        needed = extra.required or (causal and name in method.spec.causal_needs)
        if needed and extra.learnt is None:
            raise Refused(
                f"{method.id} needs `{name}` ({extra.doc}), which no layer can learn: its file declares no `Learnt`"
            )
    return method


def placed(method: Method, place: Place) -> Method:
    """The method with the settings that belong to its place; what a user set stays."""
    settings = method.spec.wiring.settings if isinstance(method, Operator) else None
    if settings is None:
        return method
    default = type(method).create().settings()
    own = {name: x for name, x in method.settings().items() if x != default[name]}
    return method.replace(**(dict(settings(place)) | own))


class Mixer(nn.Module):
    """One layer of token mixing ``[B, N, W] -> [B, N, W]``.

    method: an operator or sliding-window. heads: of width W / heads. kv_heads: G, divides H, 0 for H. conv: tokens of the
    convolution, 0 for none. key_width: D, None for what the operator asks for. Raises `InvalidParameter`, `Refused`.
    """

    def __init__(
        self, method: Method, width: int, heads: int, *, causal: bool = True, conv: int = 4, layer: int = 0, layers: int = 1,
        grid: tuple[int, int] | None = None, key_width: int | None = None, rope_base: float = 10000.0, kv_heads: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        if width % heads:
            raise InvalidParameter(f"width={width} must be a multiple of heads={heads}")
        if kv_heads < 0 or heads % (kv_heads or heads):
            raise InvalidParameter(f"kv_heads={kv_heads} must divide heads={heads}, or be 0 for as many")
        if not causal and conv:
            raise InvalidParameter(f"conv={conv}: the convolution is causal; a bidirectional mixer has none (conv=0)")
        check_mixing(method, causal=causal, grouped=0 < kv_heads < heads)
        self.wiring = method.spec.wiring if isinstance(method, Operator) else Wiring(rotary=True)
        value_width = width // heads
        self.place = Place(
            layer=layer, layers=layers, heads=heads, kv_heads=kv_heads, value_width=value_width, grid=grid,
            key_width=key_width or self.wiring.key_width or value_width,
        )  # fmt: skip
        self.method = placed(method, self.place)
        self.causal, self.taps, self.rope_base = causal, conv, rope_base
        if self.wiring.rotary and causal and self.place.key_width % 2:
            raise InvalidParameter(
                f"{method.id} rotates pairs of channels: a key width of {self.place.key_width} is odd"
            )
        self.conv = nn.Conv1d(width, width, conv, groups=width) if conv else None
        self.query = nn.Linear(width, heads * self.place.key_width, bias=False)
        self.key = nn.Linear(width, self.place.kv_heads * self.place.key_width, bias=False)
        self.value = nn.Linear(width, self.place.kv_heads * value_width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.learnt = nn.ModuleDict()
        for name, extra in method.spec.extras.items() if isinstance(method, Operator) else ():
            if _learns(extra, self.method) and (causal or name not in method.spec.causal_needs):
                made = _made(method.id, name, extra, width, self.place)
                if made is not None:
                    self.learnt[name] = made
        self.memory = _memory(self.method, causal)

    # -- the forward pass -----------------------------------------------------------------------------------------

    def forward(
        self, x: Tensor, *, padding: Tensor | None = None, state: State | None = None, keep: bool = False
    ) -> tuple[Tensor, State | None]:
        """Tokens ``[B, N, W]``, after those of `state` -> mixed tokens, and the state after them when `keep`.

        padding: bool ``[B, N]``, True = real, padded on the left. Raises `InvalidInput`, `StateError`.
        """
        if (keep or state is not None) and not self.causal:
            raise Refused(f"{self.method.id}: a bidirectional layer keeps no state")
        if padding is not None:
            x = x.masked_fill(~padding.unsqueeze(-1), 0.0)
        held = None if state is None else self._checked(state, x)
        y, tail = self._convolved(x, held)
        start = x.new_zeros(x.shape[0], dtype=torch.int64) if held is None else held["position"]
        position = start[:, None] + _count(padding, x)
        q, k, v = (self._heads(p(y), g) for p, g in self._projections)
        q = q if self.wiring.queries is None else self.wiring.queries(q)
        k = k if self.wiring.keys is None else self.wiring.keys(k)
        if self.wiring.rotary and self.causal:
            q, k = (_rotated(z, position, self.rope_base) for z in (q, k))
        extras = {name: make(y) for name, make in self.learnt.items()}
        inner = None if held is None else {n[7:]: z for n, z in held.items() if n.startswith("memory.")}
        out, inner = self.memory(q, k, v, extras, padding, position, inner, keep, 0 if state is None else state.seen)
        out = out.transpose(1, 2).flatten(2)
        out = self.out(F.rms_norm(out, out.shape[-1:], eps=1e-6))
        if not keep:
            return out, None
        assert inner is not None
        real = x.shape[1] if padding is None else padding.sum(1)
        tensors = {"position": start + real} | {f"memory.{n}": z for n, z in inner.items()}
        if tail is not None:
            tensors["tail"] = tail
        return out, State(self.owner, tensors, x.shape[1] + (0 if state is None else state.seen))

    @property
    def owner(self) -> str:
        """Whose states this mixer takes."""
        return f"mixer of {self.method.id}"

    @property
    def _projections(self) -> tuple[tuple[nn.Linear, int], ...]:
        """The projections and how many heads each makes."""
        h, g = self.place.heads, self.place.kv_heads
        return (self.query, h), (self.key, g), (self.value, g)

    @staticmethod
    def _heads(x: Tensor, heads: int) -> Tensor:
        """``[B, N, H w] -> [B, H, N, w]``."""
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    def _checked(self, state: State, x: Tensor) -> Tensors:
        shapes = {"position": (x.shape[0],)} | ({"tail": (x.shape[0], self.taps - 1, x.shape[2])} if self.taps else {})
        return state.of(self.owner, **shapes).tensors

    def _convolved(self, x: Tensor, held: Tensors | None) -> tuple[Tensor, Tensor | None]:
        """The tokens plus silu(conv), and the inputs that the next tokens need, ``[B, taps - 1, W]``."""
        if self.conv is None:
            return x, None
        y, tail = convolved(self.conv, x, None if held is None else held["tail"])
        return x + F.silu(y), tail


def convolved(conv: nn.Conv1d, x: Tensor, tail: Tensor | None) -> tuple[Tensor, Tensor]:
    """A causal convolution of k taps over tokens ``[B, N, C]`` after the inputs `tail` ``[B, k - 1, C]`` (None: a start).

    Returns its outputs ``[B, N, C]`` and the inputs that the next tokens need.
    """
    taps = conv.kernel_size[0]
    before = x.new_zeros(x.shape[0], taps - 1, x.shape[2]) if tail is None else tail.to(x.dtype)
    all_ = torch.cat((before, x), 1)
    return conv(all_.mT).mT, all_[:, all_.shape[1] - taps + 1 :]


def _count(padding: Tensor | None, x: Tensor) -> Tensor:
    """Number of each token among the real ones, from 0, ``[B, N]``; what stands in padding does not matter."""
    if padding is None:
        return torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    return (padding.long().cumsum(1) - 1).clamp(min=0)


def _rotated(x: Tensor, position: Tensor, base: float) -> Tensor:
    """Vectors ``[B, H, N, D]`` turned by their positions ``[B, N]`` (half-split pairs), in float32 or wider."""
    d, wide = x.shape[-1], torch.promote_types(x.dtype, torch.float32)
    rates = base ** (-torch.arange(0, d, 2, device=x.device, dtype=torch.float64) / d)
    angle = (position[:, None, :, None] * rates).to(wide)  # [B, 1, N, D/2]
    a, b = x.to(wide).chunk(2, -1)
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1).to(x.dtype)


# -- what an operator learns --------------------------------------------------------------------------------------


def _begun(start: Callable[[Place], Any], place: Place) -> Any:
    """What an operator's file starts with, made on the CPU: also for a model without storage (the meta device)."""
    with torch.device("cpu"):
        return start(place)


def _learns(extra: Extra, method: Method) -> bool:
    """Whether a layer makes this extra for a method of these settings."""
    return extra.learnt is not None and (extra.learnt.used is None or extra.learnt.used(method.settings()))


def _made(who: str, name: str, extra: Extra, width: int, place: Place) -> nn.Module | None:
    """The module that makes an extra from tokens ``[B, N, W]``; None where an optional one has no start at this place."""
    learnt = extra.learnt
    assert learnt is not None
    if learnt.axes not in extra.axes.split("|"):
        raise InvalidParameter(f"{who}: `{name}` is learnt with axes {learnt.axes!r}, but takes {extra.axes}")
    if not extra.required and callable(learnt.start) and _begun(learnt.start, place) is None:
        return None
    return Projected(learnt, width, place) if "b" in learnt.axes else Stored(learnt, place)


class Projected(nn.Module):
    """An extra projected from the tokens: axes ``b``, a head, a token, and perhaps a width."""

    def __init__(self, learnt: Learnt, width: int, place: Place) -> None:
        super().__init__()
        self.learnt, self.heads = learnt, place.kv_heads if learnt.axes[1] == "g" else place.heads
        self.per = {"": 0, "d": place.key_width, "e": place.value_width}[learnt.axes[3:]]
        out = self.heads * max(1, self.per)
        self.down = nn.Linear(width, learnt.rank, bias=False) if learnt.rank else None
        self.up = nn.Linear(learnt.rank or width, out)
        assert isinstance(learnt.start, (int, float)), "a projection begins with a number"
        nn.init.constant_(self.up.bias, learnt.start)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, W] -> [B, H, N]`` or ``[B, H, N, D | E]``."""
        raw = self.up(x if self.down is None else self.down(x))
        raw = raw.to(torch.promote_types(raw.dtype, torch.float32)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        value = raw if self.learnt.value is None else self.learnt.value(raw)
        return value if self.per else value.squeeze(-1)


class Stored(nn.Module):
    """An extra that is a parameter of its own, or a constant."""

    def __init__(self, learnt: Learnt, place: Place) -> None:
        super().__init__()
        self.learnt = learnt
        if callable(learnt.start):
            raw = _begun(learnt.start, place).to(torch.get_default_device(), torch.get_default_dtype())
        else:
            sizes = {"h": place.heads, "g": place.kv_heads, "d": place.key_width, "e": place.value_width}
            raw = torch.full([sizes[a] for a in learnt.axes], float(learnt.start))
        if learnt.trained:
            self.raw = nn.Parameter(raw)
        else:
            self.register_buffer("raw", raw)

    def forward(self, x: Tensor) -> Tensor:
        """The tensor; the tokens are not read."""
        return self.raw if self.learnt.value is None else self.learnt.value(self.raw)


# -- memories -----------------------------------------------------------------------------------------------------


class Memory(Protocol):
    """Runs a method on new tokens after remembered ones: (out, what is remembered then, when `keep`)."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, extras: Mapping[str, Any], padding: Tensor | None, position: Tensor,
        held: Tensors | None, keep: bool, seen: int,
    ) -> tuple[Tensor, Tensors | None]: ...  # fmt: skip


def _memory(method: Method, causal: bool) -> Memory:
    if isinstance(method, SlidingWindow):
        return Window(method, causal)
    assert isinstance(method, Operator)
    if not causal:
        return Whole(method)
    return Recurrent(method) if method.spec.initial is not None else Growing(method)


class Whole:
    """A bidirectional operator: nothing is remembered."""

    def __init__(self, method: Operator) -> None:
        self.method = method

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extras: Mapping[str, Any], padding: Tensor | None,
                 position: Tensor, held: Tensors | None, keep: bool, seen: int) -> tuple[Tensor, Tensors | None]:  # fmt: skip
        """See `Memory`."""
        return self.method(q, k, v, causal=False, padding=padding, **extras), None


class Recurrent:
    """A recurrent operator: its own state."""

    def __init__(self, method: Operator) -> None:
        self.method = method

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extras: Mapping[str, Any], padding: Tensor | None,
                 position: Tensor, held: Tensors | None, keep: bool, seen: int) -> tuple[Tensor, Tensors | None]:  # fmt: skip
        """See `Memory`."""
        before = None if held is None else State(self.method.id, held, seen)
        if before is not None and q.shape[2] == 1 and self.method.spec.step is not None:
            out, after = self.method.step(q, k, v, before, padding=padding, **extras)
            return out, after.tensors
        if before is None and not keep:
            return self.method(q, k, v, padding=padding, **extras), None
        out, after = self.method(q, k, v, padding=padding, initial_state=before, return_state=True, **extras)
        return out, after.tensors


class Growing:
    """An operator without a recurrent form: every key and value."""

    def __init__(self, method: Operator) -> None:
        self.method = method

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extras: Mapping[str, Any], padding: Tensor | None,
                 position: Tensor, held: Tensors | None, keep: bool, seen: int) -> tuple[Tensor, Tensors | None]:  # fmt: skip
        """See `Memory`."""
        if not keep and held is None:
            return self.method(q, k, v, padding=padding, **extras), None
        if self.method.spec.cross is not True:
            raise Refused(f"{self.method.id} has no state and takes no more keys than queries: it cannot decode")
        real = torch.ones_like(position, dtype=torch.bool) if padding is None else padding
        if held is not None:
            slots = held["real"].shape[-1] if "real" in held else 0
            _fits(self.method.id, held, k, v, slots, real=(k.shape[0], slots))
            k, v = torch.cat((held["k"], k.to(held["k"])), 2), torch.cat((held["v"], v.to(held["v"])), 2)
            real = torch.cat((held["real"], real), 1)
        out = self.method(q.to(k), k, v, padding=real if held is not None or padding is not None else None, **extras)
        return out.to(q.dtype), {"k": k, "v": v, "real": real} if keep else None


class Window:
    """A sliding window: a ring of slots. The token at position p lies in slot p among the sinks, else sinks + p mod window."""

    def __init__(self, method: SlidingWindow, causal: bool) -> None:
        self.method, self.causal = method, causal

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extras: Mapping[str, Any], padding: Tensor | None,
                 position: Tensor, held: Tensors | None, keep: bool, seen: int) -> tuple[Tensor, Tensors | None]:  # fmt: skip
        """See `Memory`."""
        if held is not None:
            size, found = self.method.sinks + self.method.window, held["place"].shape[-1] if "place" in held else 0
            if found != size:
                raise StateError(f"sliding-window: the state holds {found} slots, this window needs {size}")
            _fits("sliding-window", held, k, v, size, place=(k.shape[0], size))
        if held is None and (q.shape[2] > SHORT or not self.causal):
            mask = None if padding is None else padding[:, None, None, :]
            out = self.method.attention(q, k, v, mask=mask, causal=self.causal)
        else:
            out = self._masked(q, k, v, padding, position, held)
        return out, self._after(k, v, padding, position, held) if keep else None

    def _masked(
        self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, position: Tensor, held: Tensors | None
    ) -> Tensor:
        """New queries over the ring and the new keys, with the mask written out."""
        place, dtype = position if padding is None else position.masked_fill(~padding, -1), q.dtype
        if held is not None:
            q, place = q.to(held["k"]), torch.cat((held["place"], place), 1)
            k, v = torch.cat((held["k"], k.to(q)), 2), torch.cat((held["v"], v.to(q)), 2)
        age = position[:, :, None] - place[:, None]  # [B, N, S + N]
        near = (age < self.method.window) | (place[:, None] < self.method.sinks)
        mask = (place >= 0)[:, None] & (age >= 0) & near
        if padding is None and held is None:
            mask = mask[:1]  # all rows alike
        return sdpa(q, k, v, mask=mask[:, None]).to(dtype)

    def _after(self, k: Tensor, v: Tensor, padding: Tensor | None, position: Tensor, held: Tensors | None) -> Tensors:
        """The ring with the new tokens that stay; the others go to a slot that is thrown away."""
        sinks, size = self.method.sinks, self.method.sinks + self.method.window
        b = k.shape[0]
        if held is None:
            held = {"k": k.new_zeros(*k.shape[:2], size, k.shape[3]), "v": v.new_zeros(*v.shape[:2], size, v.shape[3]),
                    "place": position.new_full((b, size), -1)}  # fmt: skip
        newest = position[:, -1:]  # rows are padded on the left
        stays = (position < sinks) | (newest - position < self.method.window)
        if padding is not None:
            stays = stays & padding
        slot = torch.where(position < sinks, position, sinks + (position - sinks) % self.method.window)
        slot = slot.masked_fill(~stays, size)
        out = {}
        for name, x in (("k", k), ("v", v)):
            old = F.pad(held[name], (0, 0, 0, 1))
            out[name] = old.scatter(2, slot[:, None, :, None].expand_as(x), x.to(old))[:, :, :size]
        out["place"] = F.pad(held["place"], (0, 1)).scatter(1, slot, position)[:, :size]
        return out


def _fits(who: str, held: Tensors, k: Tensor, v: Tensor, slots: int, **shapes: tuple[int, ...]) -> None:
    """Raise `StateError` unless what is held are `slots` keys and values as wide and as many heads as new ones, and `shapes`."""
    (b, g, _, d), e = k.shape, v.shape[3]
    State(who, held).of(who, k=(b, g, slots, d), v=(b, g, slots, e), **shapes)


def check_left_padded(padding: Tensor | None, ids: Tensor) -> Tensor | None:
    """Padding ``[B, N]`` for tokens `ids` ``[B, N, ...]``, on the left only and with a real token in every row; or None."""
    if padding is None:
        return None
    want = tuple(ids.shape[:2])
    if padding.dtype != torch.bool or tuple(padding.shape) != want:
        raise InvalidInput(
            f"padding must be bool [B, N] = {want}, True = real; got {padding.dtype} {tuple(padding.shape)}"
        )
    if not bool((padding[:, 1:] >= padding[:, :-1]).all()) or not bool(padding[:, -1].all()):
        raise InvalidInput("rows are padded on the left: after its first real token a row has real tokens only")
    return padding
