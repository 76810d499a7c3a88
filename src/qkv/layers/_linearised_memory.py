r"""The memory of a linearised layer: a ring of the newest w tokens and a recurrent state of everything older. Constant size.

    ring    k, (source of the features, where it is another), v and log gate of token t in slot t mod w
    state   S ``[B, G, F, E + 1]``, float32 or wider: values and, in the last column, 1 for each token that has left the window

A step writes the new token over the one that leaves, which the state takes in; no shape changes and nothing is read on the
host, so that steps can be captured. The ring keeps unrotated keys beside rotated ones: undoing a rotation would round twice.

Axes: B batch, H query heads, G key/value heads, N queries, w window, D head width, E value width, F features.
"""

from __future__ import annotations

import copy
from typing import Any, cast, final

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.caches._stores.dense import grown, rearranged
from qkv.caches._stores.recording import Recording
from qkv.core.cache import Now, Step
from qkv.core.errors import Refused, StateError
from qkv.core.state import State
from qkv.layers._linearised import LinearisedProjections, Past, Tokens, two_keys, unpacked

AT_ONCE = 4096  # a ring of up to so many tokens is allocated whole; larger ones grow up to their window


@final
class LinearisedMemory(Recording):
    """See the module. Rows arrive as `packed` makes them. layer: shared with the layer, also by copies of this memory."""

    NAMES = ("rows", "gates", "place")

    def __init__(self, layer: LinearisedProjections) -> None:
        self.layer, self.shape = layer, layer.shape
        self.reset()

    def reset(self) -> None:
        """Forget everything (not the recording mode)."""
        self.rows: Tensor | None = None  # [B, G, w, D (+ D) + E]
        self.gates: Tensor | None = None  # [B, G, w, 1 | F], wide
        self.place: Tensor | None = None  # int32 [B, w], position of each slot's token, -1 = padding or empty
        self.state: State | None = None
        self.room = self.seen = 0
        self._forget_runs()

    # -- one call -----------------------------------------------------------------------------------------------------

    def attend(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """Absorb and attend; q, k as `packed` makes them. The first block attends to live tensors, so gradients flow.

        Padding must be on the left. Raises `Refused` for masks and attentions of another kind.
        """
        if step.mask is not None or not step.causal or step.compute is not None:
            raise Refused(
                "a linearised attention is causal, computes itself, and takes padding only; pass a 2-D attention_mask and "
                "apply no operator, pattern or steering at its site"
            )
        if step.padding is not None and q.shape[2] > 1:
            if not bool((step.padding[:, 1:] | ~step.padding[:, :-1]).all()):
                raise Refused(
                    "a linearised attention keeps the newest tokens by their column: padding between or after tokens would "
                    "push real ones out; pad on the left"
                )
        return self._provisional(q, k, v, step) if self.recording else self._absorb(q, k, v, step)

    def _absorb(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        if q.shape[2] == 1 and self.seen:
            self._ensure(v, k.dtype, 1)
            return self._one(q, k, v, step.position, torch.full((1,), self.seen, device=q.device))
        return self._block(q, k, v, step)

    def _block(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        t, n, past = unpacked(q, k, v, self.shape), q.shape[2], self._past()
        real = step.position >= 0 if step.padding is not None else None
        out, state = self.layer.mix(t, real, past)
        self._ensure(v, k.dtype, n)
        rows, place, gates = cast(Tensor, self.rows), cast(Tensor, self.place), self.gates
        last = min(n, self.shape.window)
        slots = torch.arange(self.seen + n - last, self.seen + n, device=q.device) % self.shape.window
        rows.index_copy_(2, slots, self._row(t)[:, :, -last:])
        place.index_copy_(1, slots, step.position[:, -last:].to(torch.int32))
        if gates is not None and t.gate is not None:
            gate = t.gate.detach() if real is None else t.gate.detach().masked_fill(~real[:, None, :, None], 0.0)
            gates.index_copy_(2, slots, gate[:, :, -last:])
        if state is not None:
            cast(State, self.state)["state"].copy_(state.detach())
        self._count(n)
        return out

    def _one(self, q: Tensor, k: Tensor, v: Tensor, position: Tensor, cursor: Tensor) -> Tensor:
        """One token, in place; the same eagerly and in a captured step. cursor: int64 ``[1]``, the token's column."""
        rows, place, state = cast(Tensor, self.rows), cast(Tensor, self.place), cast(State, self.state)["state"]
        s, t = self.shape, unpacked(q, k, v, self.shape)
        slot, new = cursor % s.window, self._row(t)
        leaving, was = rows.index_select(2, slot), place.index_select(1, slot)
        rows.index_copy_(2, slot, new)
        place.index_copy_(1, slot, position.to(torch.int32))
        if not s.delay:  # the far sum takes the token itself
            leaving, was = new, position
        keys = self.layer.key_features(self._part(leaving)[1]).detach() * (was >= 0)[:, None, :, None]  # [B, G, 1, F]
        if self.gates is not None and t.gate is not None:
            gate = t.gate.detach() * (position >= 0)[:, None, :, None]
            self.gates.index_copy_(2, slot, gate)
            if s.delay:
                keys = keys * self.gates.sum(2, keepdim=True).exp()
            state.mul_(gate.exp().mT)
        state.add_(keys.mT @ F.pad(self._part(leaving)[2].to(keys.dtype), (0, 1), value=1.0))
        b, g = rows.shape[:2]
        part = (t.features.reshape(b, g, -1, s.features) @ state).flatten(1, 2).unsqueeze(2)  # [B, H, 1, E + 1]
        out = self.layer.combined(*self._near(t, rows, place), part).to(v.dtype)
        self._count(1)
        return out

    def _near(self, t: Tokens, rows: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """N ``[B, H, 1, E]`` and n ``[B, H, 1, 1]`` of one token over the ring."""
        (b, g), s, wide = rows.shape[:2], self.shape, t.features.dtype
        keys, _, values = self._part(rows)
        scores = t.q.to(wide).reshape(b, g, -1, s.head_dim) * s.scale @ keys.to(wide).mT  # [B, G, R, w]
        scores = scores.masked_fill((place < 0)[:, None, None], -torch.inf)
        values, meta_values = values.to(wide), self.layer.meta_values
        if t.meta is not None and meta_values is not None:
            scores = torch.cat((scores, t.meta.reshape(b, g, -1, s.num_meta)), -1)
            values = torch.cat((values, meta_values.to(wide).expand(b, -1, -1, -1)), 2)
        top = scores.amax(-1, keepdim=True)
        weights = (scores - torch.where(torch.isfinite(top), top, 0.0)).exp()  # a padded row may see nothing yet
        return tuple(x.flatten(1, 2).unsqueeze(2) for x in (weights @ values, weights.sum(-1, keepdim=True)))  # type: ignore

    # -- the ring -----------------------------------------------------------------------------------------------------

    def _row(self, t: Tokens) -> Tensor:
        return torch.cat((t.k, t.source, t.v) if two_keys(self.shape) else (t.k, t.v), -1).detach()

    def _part(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """k, source and v of ring rows."""
        d = self.shape.head_dim
        both = d * (1 + two_keys(self.shape))
        return rows[..., :d], rows[..., both - d : both], rows[..., both:]

    def _past(self) -> Past | None:
        """The ring, oldest first."""
        if self.rows is None or self.place is None or not self.seen:
            return None
        held = min(self.seen, self.shape.window)
        slots = torch.arange(self.seen - held, self.seen, device=self.rows.device) % self.shape.window
        k, source, v = self._part(self.rows.index_select(2, slots))
        gate = None if self.gates is None else self.gates.index_select(2, slots)
        folded = self.seen > self.shape.delay
        state = cast(State, self.state)["state"] if folded else None
        return Past(k, source, v, gate, self.place.index_select(1, slots) >= 0, state)

    def _ensure(self, v: Tensor, wide: torch.dtype, more: int) -> None:
        """Room for `more` tokens, and a state."""
        s, b, g = self.shape, v.shape[0], v.shape[1]
        need, have = min(s.window, max(self.seen + more, self.room)), 0 if self.rows is None else self.rows.shape[2]
        if need <= have:
            return
        size = s.window if s.window <= AT_ONCE else min(s.window, max(grown(have, need), need))
        row = s.head_dim * (1 + two_keys(s)) + s.value_dim
        old = (self.rows, self.gates, self.place)
        self.rows, self.place = v.new_zeros(b, g, size, row), torch.full_like(v[:, 0, :1, 0], -1, dtype=torch.int32)
        self.place = self.place.expand(b, size).contiguous()
        self.gates = v.new_zeros(b, g, size, s.gates, dtype=wide) if s.gates else None
        if old[0] is not None and old[2] is not None:
            self.rows[:, :, :have], self.place[:, :have] = old[0], old[2]
            if self.gates is not None and old[1] is not None:
                self.gates[:, :, :have] = old[1]
        if self.state is None:
            self.state = State("linearised", {"state": v.new_zeros(b, g, s.features, s.value_dim + 1, dtype=wide)})

    def _count(self, tokens: int) -> None:
        self.seen += tokens

    # -- static decoding ----------------------------------------------------------------------------------------------

    def reserve(self, tokens: int) -> None:
        """Room for what `tokens` tokens need, so that decoding never moves the buffers."""
        self.room = tokens

    def static(self) -> bool:
        """On CUDA, with a ring that will not grow for the next token."""
        if self.rows is None or self.recording or not self.rows.is_cuda:
            return False
        return min(self.shape.window, self.seen + 1) <= self.rows.shape[2]

    def step(self, q: Tensor, k: Tensor, v: Tensor, scale: float, now: Now) -> Tensor:
        """See `LayerCache.step`."""
        return self._one(q, k, v, now.position, now.cursor)

    def buffers(self) -> tuple[Tensor, ...]:
        """Everything that a step reads or overwrites."""
        return tuple(self._held().values())

    # -- the rest of the contract -------------------------------------------------------------------------------------

    def _held(self) -> dict[str, Tensor]:
        held = {name: x for name in self.NAMES if (x := getattr(self, name)) is not None}
        return held if self.state is None else held | self.state.tensors

    def _snapshot(self) -> tuple[dict[str, Tensor], int]:
        return self.tensors(), self.seen

    def _go_back(self, snapshot: tuple[dict[str, Tensor], int]) -> None:
        runs = self._runs
        self.restore(snapshot[0])
        self._runs = runs

    def crop(self, tokens: int) -> None:
        """Take back the newest `tokens` of what is not settled yet and settle the rest, or raise `StateError`."""
        if tokens > self.unsettled:
            raise StateError(
                f"{tokens} tokens cannot be taken out of a recurrent state, only the {self.unsettled} recorded since the last "
                "`crop`. Start speculative decoding through `generate` (it records), or keep a copy of the cache"
            )
        self._take_back(tokens)

    def tensors(self) -> dict[str, Tensor]:
        """Copies of the ring and the state, and the number of tokens seen."""
        held = {name: x.clone() for name, x in self._held().items()}
        return held | {"seen": torch.tensor(self.seen)} if held else held

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """See `LayerCache.restore`. Raises `StateError` for the tensors of another layer."""
        room = self.room
        self.reset()
        self.room = room
        if not tensors:
            return
        s, rows = self.shape, tensors["rows"]
        width = s.head_dim * (1 + two_keys(s)) + s.value_dim
        if rows.ndim != 4 or rows.shape[1:2] != (s.kv_heads,) or rows.shape[3] != width or rows.shape[2] > s.window:
            raise StateError(
                f"ring {tuple(rows.shape)} does not fit this layer: [B, {s.kv_heads}, <= {s.window}, {width}]"
            )
        state = State("linearised", {"state": tensors["state"].clone()})
        self.state = state.of("linearised", state=(rows.shape[0], s.kv_heads, s.features, s.value_dim + 1))
        for name in self.NAMES:
            setattr(self, name, tensors[name].clone() if name in tensors else None)
        self.seen = int(tensors["seen"])

    def select(self, rows: Tensor) -> None:
        """See `LayerCache.select`."""
        self._refuse_beams()
        for name in self.NAMES:
            x = getattr(self, name)
            if x is not None:
                setattr(self, name, rearranged(x, rows))
        if self.state is not None:
            held = {n: rearranged(x, rows) for n, x in self.state.tensors.items()}
            self.state = State(self.state.owner, held, self.state.seen)

    def bytes(self) -> int:
        """Bytes of the ring and the state, and what recording holds."""
        return sum(x.numel() * x.element_size() for x in (*self._held().values(), *self._recorded()))

    def full_bytes(self, k: Tensor, v: Tensor) -> int:
        """See `LayerCache.full_bytes`."""
        s = self.shape
        return v.shape[0] * self.seen * s.kv_heads * (s.head_dim + s.value_dim) * v.element_size()

    def kept(self) -> int:
        """Tokens in the ring."""
        return min(self.seen, self.shape.window)

    def positions(self) -> Tensor:
        """``[B, G, S]``, by slot."""
        if self.place is None:
            raise StateError("the cache is empty")
        return self.place[:, None].expand(-1, self.shape.kv_heads, -1)

    def __deepcopy__(self, memo: dict[int, Any]) -> LinearisedMemory:
        """A ring and a state of its own, the same layer."""
        twin = object.__new__(LinearisedMemory)
        memo[id(self)] = twin
        memo[id(self.layer)] = self.layer
        for name, value in vars(self).items():
            setattr(twin, name, self.layer if name == "layer" else copy.deepcopy(value, memo))
        return twin
