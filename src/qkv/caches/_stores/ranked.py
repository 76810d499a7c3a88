"""The memory behind every `Policy`: slots per KV head, ranked after each call, the best kept, decoded in place.

After a call each row holds at most its budget. A decoding step writes into one spare slot, attends to budget + 1 keys and
frees the slot of the least worthy one, so shapes stay static and nothing is moved. Slots are in no order; positions say
which token a slot holds.
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from qkv.caches._stores.dense import grown, rearranged, resized
from qkv.caches._stores.recording import Recording
from qkv.core.attend import attend, sdpa
from qkv.core.cache import Geometry, Now, Policy, Step, View
from qkv.core.errors import Refused, StateError
from qkv.core.kernel import kernel


@final
class RankedCache(Recording):
    """Slots ``[B, G, C]`` chosen by a policy; see the module."""

    def __init__(self, policy: Policy, geometry: Geometry) -> None:
        self.policy, self.geometry = policy, geometry
        self.reset()

    def reset(self) -> None:
        """Forget everything (not the recording mode)."""
        self.keys: Tensor | None = None  # [B, G, C, D]
        self.values: Tensor | None = None  # [B, G, C, E]
        self.position: Tensor | None = None  # [B, G, C], -1 = empty or padding
        self.state: Tensor | None = None  # [B, G, C, slot_state]
        self.slot: Tensor | None = None  # [B, G, 1] where the next token goes, once every slot is in use
        self.keep: Tensor | None = None  # [B, 1, 1]
        self.movers: Tensor | None = None  # [B, G, few] slots that the policy may move
        self.anchors: Tensor | None = None  # [B, G, few, D] their keys unmoved, while the slots hold moved ones
        self.length: Tensor | None = None  # int32 [1], the number of slots read, for the decode kernel
        self._length_of = 0
        self.filled = 0  # slots handed out so far (never more than the capacity)
        self.most = 0  # the largest budget of any row
        self.least = 0  # the smallest
        self.holes = False  # some slot may be empty or padding: reading needs a mask
        self.seen = 0
        self._forget_runs()

    # -- one call ---------------------------------------------------------------------------------------------

    def attend(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """See `LayerCache.attend`."""
        if step.mask is not None:
            raise Refused(
                f"{self.policy.id}: a custom 4-D or packed-sequence mask names columns that this cache may have "
                "evicted; pass a 2-D attention_mask"
            )
        if not step.causal:
            raise Refused(f"{self.policy.id}: evicting caches serve causal attention only")
        if self.recording:
            return self._provisional(q, k, v, step)
        return self._absorb(q, k, v, step)

    def _absorb(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        n = q.shape[2]
        if n == 1 and self._steady_on_device() and step.compute is None:
            return self._steady(q, k, v, step.position, step.scale)
        self._put_back()
        if n == 1 and self.keys is not None:
            return self._one(q, k, v, step)
        self._budget(step, n)
        size = self.policy.chunk(self.most) or n
        if size < n and step.padding is not None:
            return self._aligned(q, k, v, step, size)
        outs = []
        for start in range(0, n, size):
            part = slice(start, min(n, start + size))
            outs.append(self._block(q[:, :, part], k[:, :, part], v[:, :, part], step, step.position[:, part]))
        return outs[0] if len(outs) == 1 else torch.cat(outs, 2)

    def _aligned(self, q: Tensor, k: Tensor, v: Tensor, step: Step, size: int) -> Tensor:
        """Cut a padded block so that every row's pieces start at its own first real token, as if it were alone."""
        order = (step.position < 0).to(torch.int8).argsort(dim=-1, stable=True)  # [B, N], real tokens first
        back = order.argsort(dim=-1)
        q, k, v = (_turned(x, order) for x in (q, k, v))
        position = step.position.gather(1, order)
        outs = []
        for start in range(0, position.shape[1], size):
            part = slice(start, start + size)
            outs.append(self._block(q[:, :, part], k[:, :, part], v[:, :, part], step, position[:, part]))
        return _turned(torch.cat(outs, 2), back)

    def _budget(self, step: Step, n: int) -> None:
        """Fix every row's budget from the real tokens of the prompt known so far."""
        total = max(self.seen + n, self.prompt or 0)
        b, device = step.position.shape[0], step.position.device
        if step.padding is None:
            lengths = [total] * b
        else:
            pads = (~step.padding[:, : self.seen + n]).sum(-1).tolist()
            lengths = [total - p for p in pads]
        keep = [self.policy.slots(max(1, x)) for x in lengths]
        if min(keep) < 1:
            raise Refused(
                f"{self.policy.id}: {min(keep)} slots for a prompt of {min(lengths)} tokens; raise the budget"
            )
        self.most, self.least = max(keep), min(keep)
        self.keep = torch.tensor(keep, device=device).view(b, 1, 1)

    def _block(self, q: Tensor, k: Tensor, v: Tensor, step: Step, query: Tensor) -> Tensor:
        """Absorb a block: attend to what is stored and to the block, observe, keep the best."""
        b, g, n, _ = k.shape
        new = query[:, None].expand(b, g, n)
        padded = step.padding is not None
        if self.keys is None or self.values is None or self.position is None:
            keys, values, position, old = k, v, new, 0
        else:
            old = self.filled
            keys = torch.cat((self.keys[:, :, :old], k), 2)
            values = torch.cat((self.values[:, :, :old], v), 2)
            position = torch.cat((self.position[:, :, :old].to(new.dtype), new), 2)
        holes = padded or self.holes or self.slot is not None
        mask = None
        if holes:
            mask = ((position[:, :1] if self.policy.spec.by_position else position) >= 0).unsqueeze(2)  # [B, 1|G, 1, S]
        extra = self.policy.visible(query, position[:, :1] if self.policy.spec.by_position else position)
        if extra is not None:
            mask = extra if mask is None else mask & extra
        state = self._padded_state(keys, old)
        view = self._view(keys, values, position, q)
        read = self._moved(view)
        rows = self.policy.mass_queries(n)
        out, mass = self._run(q, read, values, mask, True, step, rows, query if holes else None)
        view = self._view(keys, values, position, q, mass)
        self._store(view, self.policy.observe(state, view))
        self.seen += n
        return out

    def _one(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """One token: write it into the spare slot, attend to all slots, free the least worthy."""
        self._place(k, v, step.position)
        assert self.keys is not None and self.values is not None and self.position is not None
        used = self.filled
        keys, values, position = self.keys[:, :, :used], self.values[:, :, :used], self.position[:, :, :used]
        holes = self.holes or step.padding is not None
        view = self._view(keys, values, position, q)
        out, mass = self._read(q, self._moved(view), values, position if holes else None, step)
        if mass is not None and step.padding is not None:
            mass = mass * (step.position >= 0).unsqueeze(-1)  # padding draws nothing
        view = self._view(keys, values, position, q, mass)
        if self.policy.spec.slot_state:
            assert self.state is not None
            state = self.policy.observe(self.state[:, :, :used], view)
            assert state is not None
            self.state[:, :, :used] = state
        else:
            state = self.policy.observe(None, view)
        if used > self.least:
            self._free(view, state)
        self.seen += 1
        return out

    def _read(
        self, q: Tensor, k: Tensor, v: Tensor, position: Tensor | None, step: Step
    ) -> tuple[Tensor, Tensor | None]:
        """One token over all slots (those with a position >= 0, where some are empty)."""
        rows = self.policy.mass_queries(1)
        if not q.is_cuda or step.compute is not None:
            mask = None if position is None else (position >= 0).unsqueeze(2)
            return self._run(q, k, v, mask, False, step, rows, None)
        return self._kernels(q, k, v, position, step.scale)

    def _kernels(
        self, q: Tensor, k: Tensor, v: Tensor, position: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor | None]:
        """One token over all slots on the device, and the mass where the policy wants it."""
        if self.length is None or self._length_of != k.shape[2]:
            self.length = torch.full((1,), k.shape[2], dtype=torch.int32, device=k.device)
            self._length_of = k.shape[2]
        what = {"length": self.length, "position": position, "scale": scale}
        out, lse = kernel("decode:decode_attention")(q, k, v, **what)
        return out, kernel("decode:key_mass")(q, k, lse, **what) if self.policy.mass_queries(1) else None

    def _steady_on_device(self) -> bool:
        """Whether every slot of every row is taken, on CUDA: then a step is a handful of launches."""
        return self.slot is not None and self.slot.is_cuda and not self.holes and not self.recording

    def _steady(self, q: Tensor, k: Tensor, v: Tensor, position: Tensor, scale: float) -> Tensor:
        """As `_one`, in place on static buffers with fused launches: what a captured step runs."""
        assert self.keys is not None and self.values is not None and self.position is not None
        assert self.slot is not None and self.keep is not None
        policy = self.policy
        kernel("slots:place")(
            self.keys, self.values, self.position, self.state, self.slot, k.detach(), v.detach(), position
        )
        view = View(self.keys, self.values, self.position, self.keep, position.unsqueeze(-1), q)
        out, mass = self._kernels(q, self._turned_keys(view), self.values, None, scale)
        state = None
        if self.state is not None:
            view = View(self.keys, self.values, self.position, self.keep, view.newest, q, mass)
            state = policy.observe(self.state, view)
            assert state is not None
            self.state.copy_(state)
        if policy.spec.by_position:
            kernel("slots:free")(self.position, self.slot, protect=policy.protected())
        else:
            kernel("slots:free")(self.position, self.slot, worth=policy.rank(state, view).to(torch.float32))
        self.seen += 1
        return out

    def _turned_keys(self, view: View) -> Tensor:
        """The keys as read by a steady step: a few movers are rotated in place, their originals kept beside."""
        shift, movers = self.policy.shift(view), self.policy.moving(view)
        if shift is None or movers is None or self.movers is None:
            return self._moved(view)
        if movers[1] == 0:
            return view.keys
        if self.anchors is None:
            self.anchors = _pick(view.keys, self.movers)
        assert self.geometry.rope is not None
        frequencies = self.geometry.rope.frequencies.to(view.keys.device)
        kernel("slots:turn")(view.keys, self.anchors, self.movers, frequencies, shift.gather(2, self.movers).int())
        return view.keys

    def _put_back(self) -> None:
        """Undo the rotation of the movers before anything else reads or moves the keys."""
        if self.anchors is not None:
            assert self.keys is not None and self.movers is not None
            self.keys.scatter_(2, _wide(self.movers, self.anchors), self.anchors)
            self.anchors = None

    def _run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        causal: bool,
        step: Step,
        rows: int,
        query: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The attention, and the mass that the policy asked for, in one pass where no other compute is set."""
        real = None if query is None else query >= 0
        if mask is not None and mask.shape[1] not in (1, q.shape[1]):
            mask = mask.repeat_interleave(q.shape[1] // mask.shape[1], 1)
        if rows >= q.shape[2] and step.compute is None:
            done = attend(q, k, v, mask=mask, causal=causal, scale=step.scale, mass=True, mass_rows=real)
            return done.out, done.mass
        out = (step.compute or sdpa)(q, k, v, mask=mask, causal=causal, scale=step.scale)
        if not rows:
            return out, None
        start = max(0, q.shape[2] - rows)
        tail = mask if mask is None or mask.shape[2] == 1 else mask[:, :, start:]
        done = attend(
            q[:, :, start:],
            k,
            v,
            mask=tail,
            causal=causal,
            scale=step.scale,
            mass=True,
            mass_rows=None if real is None else real[:, start:],
        )
        return out, done.mass

    # -- slots ------------------------------------------------------------------------------------------------

    def _view(self, keys: Tensor, values: Tensor, position: Tensor, q: Tensor, mass: Tensor | None = None) -> View:
        assert self.keep is not None
        newest = position.amax((1, 2))[:, None, None]
        return View(keys, values, position, self.keep, newest, q, mass)

    def _moved(self, view: View) -> Tensor:
        """The keys as this call reads them (re-rotated where the policy says so)."""
        shift = self.policy.shift(view)
        if shift is None:
            return view.keys
        rope = self.geometry.rope
        assert rope is not None, "a policy that moves keys refuses sites without rotary embedding in `fits`"
        movers = self.policy.moving(view)
        if movers is None or movers[1] >= view.keys.shape[2]:
            return rope.rotate(view.keys, shift)
        if movers[1] == 0:
            return view.keys
        if self.slot is None or self.movers is None or self.holes:  # where there are holes, a mover may be yet to come
            self.movers = movers[0].to(torch.int8).topk(movers[1], dim=-1).indices
        index = self.movers
        moved = rope.rotate(_pick(view.keys, index), shift.gather(2, index))
        return view.keys.scatter(2, _wide(index, moved), moved)

    def _padded_state(self, keys: Tensor, old: int) -> Tensor | None:
        width = self.policy.spec.slot_state
        if not width:
            return None
        state = keys.new_zeros((*keys.shape[:3], width), dtype=torch.float32)
        if self.state is not None:
            state[:, :, :old] = self.state[:, :, :old]
        return state

    def _worth(self, view: View, state: Tensor | None) -> Tensor:
        """The policy's rank with the base's guarantees: padding and empty slots last, the newest token first."""
        worth = self.policy.rank(state, view).to(torch.float32)
        worth = torch.nan_to_num(worth, nan=-3e38, posinf=3e38, neginf=-3e38)
        worth = worth.masked_fill(view.position == view.newest, torch.inf)
        return worth.masked_fill(view.position < 0, -torch.inf)

    def _store(self, view: View, state: Tensor | None) -> None:
        """Keep the best `keep` slots of every row and head, in position order, with one spare slot behind them."""
        assert self.keep is not None
        total = view.keys.shape[2]
        if total > self.least:
            worth = self._worth(view, state)
            best = worth.topk(min(self.most, total), dim=-1)  # descending
            place = torch.arange(best.indices.shape[-1], device=worth.device)
            lost = (place >= self.keep) | (best.values == -torch.inf)
            where = view.position.gather(2, best.indices).masked_fill(lost, torch.iinfo(view.position.dtype).max)
            where, order = where.sort(dim=-1)
            index = best.indices.gather(2, order)
            lost = lost.gather(2, order)
            position = where.masked_fill(lost, -1)
            keys, values = _pick(view.keys, index), _pick(view.values, index)
            state = None if state is None else _pick(state, index)
            self.holes = bool(lost.any())
        else:
            keys, values, position = view.keys, view.values, view.position
            self.holes = self.holes or bool((position < 0).any())
        self.filled = keys.shape[2]
        capacity = min(self.most + 1, grown(self.filled, self.filled + 1))
        self.keys, self.values = (resized(x.detach(), capacity, self.filled) for x in (keys, values))
        self.position = resized(position, capacity, self.filled, -1)
        self.state = None if state is None else resized(state, capacity, self.filled)
        self.slot = None

    def _place(self, k: Tensor, v: Tensor, position: Tensor) -> None:
        """Write one token into the spare slot of every row and head."""
        assert self.keys is not None and self.values is not None and self.position is not None
        if self.slot is None:  # still growing: the next unused slot, the same for all rows
            capacity = min(self.most + 1, grown(self.keys.shape[2], self.filled + 1))
            if capacity != self.keys.shape[2]:
                self.keys, self.values = (resized(x, capacity, self.filled) for x in (self.keys, self.values))
                self.position = resized(self.position, capacity, self.filled, -1)
                self.state = None if self.state is None else resized(self.state, capacity, self.filled)
            at = slice(self.filled, self.filled + 1)
            self.keys[:, :, at], self.values[:, :, at] = k.detach(), v.detach()
            self.position[:, :, at] = position[:, None]
            if self.state is not None:
                self.state[:, :, at] = 0
            self.filled += 1
            return
        self.keys.scatter_(2, _wide(self.slot, k), k.detach())
        self.values.scatter_(2, _wide(self.slot, v), v.detach())
        self.position.scatter_(2, self.slot, position[:, None].expand_as(self.slot).to(self.position.dtype))
        if self.state is not None:
            self.state.scatter_(2, _wide(self.slot, self.state), 0.0)

    def _free(self, view: View, state: Tensor | None) -> None:
        """Empty the least worthy slot of every row over its budget; rows within it point at an empty slot."""
        assert self.position is not None and self.keep is not None
        worth = self._worth(view, state)
        empty = view.position < 0
        over = (~empty).sum(-1, keepdim=True) > self.keep  # [B, G, 1]
        worth = torch.where(over, worth.masked_fill(empty, torch.inf), torch.where(empty, -torch.inf, torch.inf))
        slot = worth.argmin(-1, keepdim=True)
        if self.filled <= self.most:  # some row still has unused capacity: keep growing, only mark the freed slots
            held = self.position[:, :, : self.filled].gather(2, slot)
            self.position[:, :, : self.filled].scatter_(2, slot, torch.where(over, torch.full_like(held, -1), held))
            self.holes = True
            return
        self.position.scatter_(2, slot, -1)
        self.slot = slot if self.slot is None else self.slot.copy_(slot)
        if self.movers is not None and self.anchors is None and self._steady_on_device():
            assert self.keys is not None  # before any step is captured, so that its addresses stay
            self.anchors = _pick(self.keys, self.movers)

    # -- speculation ------------------------------------------------------------------------------------------

    def _snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self.tensors(), self.counters()

    def _go_back(self, snapshot: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
        self.restore(snapshot[0])
        vars(self).update(snapshot[1])

    def crop(self, tokens: int) -> None:
        """Take back the newest `tokens` of what is not settled yet and settle the rest, or raise `StateError`."""
        if tokens > self.unsettled:
            raise StateError(
                f"{self.policy.id}: {tokens} tokens cannot be taken back, only the {self.unsettled} recorded since the last "
                "`crop`: what the others evicted is gone. Start speculative decoding through `generate` (it records), or keep "
                "a copy of the cache"
            )
        self._take_back(tokens)

    # -- the rest of the contract -----------------------------------------------------------------------------

    def counters(self) -> dict[str, Any]:
        """See `LayerCache.counters`."""
        return {name: getattr(self, name) for name in ("filled", "most", "least", "holes", "seen")}

    def tensors(self) -> dict[str, Tensor]:
        """Copies of every tensor, and the counters as a 0-d tensor each."""
        self._put_back()
        names = ("keys", "values", "position", "state", "slot", "keep", "movers")
        out = {name: x.clone() for name in names if (x := getattr(self, name)) is not None}
        return out | {f"count.{k}": torch.tensor(int(v)) for k, v in self.counters().items()} if out else out

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """See `LayerCache.restore`."""
        self.reset()
        for name, x in tensors.items():
            if name.startswith("count."):
                value = int(x)
                setattr(self, name[6:], bool(value) if name == "count.holes" else value)
            else:
                setattr(self, name, x.clone())

    def select(self, rows: Tensor) -> None:
        """See `LayerCache.select`."""
        self._refuse_beams()
        for name in ("keys", "values", "position", "state", "slot", "keep", "movers", "anchors"):
            x = getattr(self, name)
            if x is not None:
                setattr(self, name, rearranged(x, rows))

    def bytes(self) -> int:
        """Bytes of keys, values, positions and policy state, spare capacity and what recording holds included."""
        held = (
            self.keys,
            self.values,
            self.position,
            self.state,
            self.slot,
            self.keep,
            self.movers,
            self.anchors,
            self.length,
        )
        return sum(x.numel() * x.element_size() for x in (*held, *self._recorded()) if x is not None)

    def kept(self) -> int:
        """See `LayerCache.kept`."""
        return min(self.filled, self.most)

    def positions(self) -> Tensor:
        """``[B, G, S]``, sorted, empties (-1) first."""
        if self.position is None:
            raise StateError("the cache is empty")
        return self.position[:, :, : self.filled].sort(-1).values

    def static(self) -> bool:
        """True once every slot is in use: from then on a step overwrites in place."""
        return self.slot is not None and self.slot.is_cuda and not self.recording

    def step(self, q: Tensor, k: Tensor, v: Tensor, scale: float, now: Now) -> Tensor:
        """See `LayerCache.step`."""
        if self._steady_on_device():
            return self._steady(q, k, v, now.position, scale)
        return self._one(q, k, v, Step(now.position, scale))  # rows with budgets of their own leave slots empty

    def buffers(self) -> tuple[Tensor, ...]:
        """Everything that a step reads or overwrites."""
        held = (
            self.keys,
            self.values,
            self.position,
            self.state,
            self.slot,
            self.keep,
            self.movers,
            self.anchors,
            self.length,
        )
        return tuple(x for x in held if x is not None)


def _turned(x: Tensor, order: Tensor) -> Tensor:
    """`x` ``[B, H, N, D]`` with the tokens of each row in the order ``[B, N]``."""
    return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _wide(index: Tensor, x: Tensor) -> Tensor:
    """A slot index ``[B, G, K]`` spread over the last axis of `x`."""
    return index.unsqueeze(-1).expand(*index.shape, x.shape[-1])


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """The slots `index` ``[B, G, K]`` of `x` ``[B, G, S, .]``."""
    return x.gather(2, _wide(index, x))
