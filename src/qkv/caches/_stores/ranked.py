"""The memory behind every `Policy`: slots per KV head, ranked after each call, the best kept, decoded in place.

After a call each row holds at most its budget. A decoding step writes into one spare slot, attends to budget + 1 keys and
frees the slot of the least worthy one, so shapes stay static and nothing is moved. Slots are in no order; positions say
which token a slot holds.

A policy may lag (`Policy.lag`): then decoded tokens are appended, and a row that exceeds its budget by more than the lag is
cut down to it at once. And it may wait for the end of an announced prompt (`Policy.whole_prompt`): then the pieces before
the last are held whole, with the newest queries, by which the policy scores at the end.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor

from qkv.caches._stores.dense import grown, rearranged, resized
from qkv.caches._stores.recording import Recording
from qkv.core.attend import LinearBias, attend, sdpa
from qkv.core.cache import NO_LIMIT, Geometry, Now, Policy, Step, View
from qkv.core.errors import Refused, StateError
from qkv.core.kernel import kernel, served


@final
class RankedCache(Recording):
    """Slots ``[B, G, C]`` chosen by a policy; see the module."""

    def __init__(self, policy: Policy, geometry: Geometry) -> None:
        self.policy, self.geometry = policy, geometry
        self.lag, self.width = policy.lag(), policy.width(geometry)
        self.room = 0  # tokens that the host expects in all
        self.reset()

    def reset(self) -> None:
        """Forget everything (not the recording mode)."""
        self.keys: Tensor | None = None  # [B, G, C, D]
        self.values: Tensor | None = None  # [B, G, C, E]
        self.position: Tensor | None = None  # [B, G, C], -1 = empty or padding
        self.state: Tensor | None = None  # [B, G, C, width]
        self.slot: Tensor | None = None  # [B, G, 1] where the next token goes, once every slot is in use
        self.keep: Tensor | None = None  # [B, 1, 1]
        self.movers: Tensor | None = None  # [B, G, few] slots that the policy may move
        self.anchors: Tensor | None = None  # [B, G, few, D] their keys unmoved, while the slots hold moved ones
        self.length: Tensor | None = None  # int32 [1], the number of slots read, for the decode kernel
        self._length_of = 0
        self.offset: Tensor | None = None  # int64 [1], seen - filled, for captured steps that append
        self._offset_of = -1
        self.tail: Tensor | None = None  # [B, H, few, D] the newest queries of a prompt that has not ended
        self.tail_at: Tensor | None = None  # [B, few] their positions
        self.filled = 0  # slots handed out so far (never more than the capacity)
        self.most = 0  # the largest budget of any row
        self.least = 0  # the smallest
        self.over = 0  # with a lag: no row holds more than its budget and this
        self.holes = False  # some slot may be empty or padding: reading needs a mask
        self.prompt = None
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
        decoding = n == 1 and self.tail is None and not self._waits(n)
        if decoding and self._steady_on_device() and served(q) and step.compute is None:
            return self._steady(q, k, v, step.position, step.scale)
        self._put_back()
        if decoding and self.keys is not None:
            return self._one(q, k, v, step)
        self._budget(step, n)
        size = self.policy.chunk(self.most) or n
        if step.padding is not None and (size < n or _gaps(step.position)):
            return self._aligned(q, k, v, step, size)
        outs = []
        for start in range(0, n, size):
            part = slice(start, min(n, start + size))
            outs.append(self._block(q[:, :, part], k[:, :, part], v[:, :, part], step, step.position[:, part]))
        return outs[0] if len(outs) == 1 else torch.cat(outs, 2)

    def _waits(self, n: int) -> bool:
        """Whether the prompt goes on after these `n` tokens, and the policy evicts at its end only."""
        return self.policy.whole_prompt() and self.seen + n < (self.prompt or 0)

    def _aligned(self, q: Tensor, k: Tensor, v: Tensor, step: Step, size: int) -> Tensor:
        """Absorb a padded block as if every row were alone.

        Cut into pieces, each row's start at its own first real token. Whole, its padding goes in front, wherever it stood:
        then the newest queries, by which many policies judge, are the row's own.
        """
        real, n = step.position >= 0, q.shape[2]
        order = (~real if size < n else real).to(torch.int8).argsort(dim=-1, stable=True)  # [B, N]
        back = order.argsort(dim=-1)
        q, k, v = (_turned(x, order) for x in (q, k, v))
        position = step.position.gather(1, order)
        outs = []
        for start in range(0, n, size):
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
        keep = [self.policy.slots_at(max(1, x), self.geometry) for x in lengths]
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
        read, seen_by = self._moved(view), query if holes else None
        bias = self.geometry.bias(query, position, step.compute)
        if self._waits(n):
            out, _ = self._run(q, read, values, mask, True, step, 0, seen_by, bias)
            self._remember(q, query, padded)
            self.seen += n
            self._store(view, state, hold=True)
        else:
            past = 0 if self.tail is None else self.tail.shape[2]
            rows = 0 if past else self.policy.mass_queries(n)
            out, mass = self._run(q, read, values, mask, True, step, rows, seen_by, bias)
            every, places = self._remember(q, query, padded) if past or self.policy.row_queries(n) else (q, query)
            if past:
                rows = self.policy.mass_queries(past + n)
                mass = self._probs(every, read, places, position, step.scale, rows).sum(2) if rows else None
            view = self._view(keys, values, position, every if past else q, mass)
            rows = self.policy.row_queries(past + n)
            if rows:
                probs = self._probs(every, read, places, position, step.scale, rows)
                view = replace(view, rows=probs, asked=places[:, -rows:])
            self.tail = self.tail_at = None
            self.seen += n
            self._store(view, self.policy.observe(state, view))
        return out

    def _remember(self, q: Tensor, query: Tensor, padded: bool) -> tuple[Tensor, Tensor]:
        """The newest queries of the prompt so far, as many as the policy asks for at most, and their positions: kept."""
        most = max(self.policy.mass_queries(NO_LIMIT), self.policy.row_queries(NO_LIMIT))
        if self.tail is not None and self.tail_at is not None:
            q, query = torch.cat((self.tail, q), 2), torch.cat((self.tail_at, query), 1)
            if padded and _gaps(query):  # a row that ended in an earlier piece still asks with its own last queries
                order = (query >= 0).to(torch.int8).argsort(dim=-1, stable=True)
                q, query = _turned(q, order), query.gather(1, order)
        self.tail, self.tail_at = (x.detach().clone() for x in (q[:, :, -most:], query[:, -most:]))
        return self.tail, self.tail_at

    def _probs(self, q: Tensor, k: Tensor, query: Tensor, position: Tensor, scale: float, rows: int) -> Tensor:
        """Attention of the newest `rows` queries over all slots, theirs last: ``[B, H, rows, S]``, 0 from padding."""
        q, query = q[:, :, -rows:], query[:, -rows:]
        n, m, g = q.shape[2], k.shape[2], k.shape[1]
        at = position.unsqueeze(2)
        mask = (at >= 0) & (at <= query[:, None, :, None])  # [B, G, rows, S], by position: padding may lie anywhere
        extra = self.policy.visible(query, position)
        mask = mask if extra is None else mask & extra
        wide = torch.promote_types(q.dtype, torch.float32)
        logits = (q.unflatten(1, (g, -1)) * scale) @ k.unsqueeze(2).mT  # [B, G, R, rows, S]
        logits = logits.to(wide)
        bias = self.geometry.bias(query, position)
        if bias is not None:
            logits = logits + bias.logits(g, 0, n, m, wide)
        logits = logits.masked_fill(~mask.unsqueeze(2), -torch.inf)
        lse = logits.logsumexp(-1, keepdim=True)
        probs = (logits - torch.where(torch.isfinite(lse), lse, 0.0)).exp().flatten(1, 2)
        return probs * (query >= 0)[:, None, :, None]

    def _one(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """One token: write it into the spare slot, attend to all slots, free the least worthy."""
        self._place(k, v, step.position)
        assert self.keys is not None and self.values is not None and self.position is not None
        used = self.filled
        keys, values, position = self.keys[:, :, :used], self.values[:, :, :used], self.position[:, :, :used]
        holes = self.holes or step.padding is not None
        view = self._view(keys, values, position, q)
        due = 0 < self.lag <= self.over
        scored = not self.lag or self.width > 0 or due
        out, mass = self._read(q, self._moved(view), values, position, holes, step, scored)
        if mass is not None and step.padding is not None:
            mass = mass * (step.position >= 0).unsqueeze(-1)  # padding draws nothing
        view = self._scored(self._view(keys, values, position, q), mass, step.position)
        state = None if self.state is None else self.state[:, :, :used]
        if self.width:
            assert state is not None
            new = self.policy.observe(state, view)
            assert new is not None
            state.copy_(new)
        if self.lag:
            self.over += 1
            if due:
                self._cut(view, state)
        elif used > self.least:
            self._free(view, state)
        self.seen += 1
        return out

    def _scored(self, view: View, mass: Tensor | None, position: Tensor) -> View:
        """What the policy asked to see of one query at position ``[B, 1]`` that drew mass ``[B, H, S]``."""
        if mass is None:
            return view
        if self.policy.row_queries(1):
            return replace(view, rows=mass.unsqueeze(2), asked=position)
        return replace(view, mass=mass)

    def _cut(self, view: View, state: Tensor | None) -> None:
        """Cut every row that exceeds its budget by more than the lag down to it; the others keep what they have."""
        assert self.keep is not None
        count = (view.position[:, :1] >= 0).sum(-1, keepdim=True)  # [B, 1, 1], the same for all heads
        self._store(view, state, keep=torch.where(count > self.keep + self.lag, self.keep, count))

    def _read(
        self, q: Tensor, k: Tensor, v: Tensor, position: Tensor, holes: bool, step: Step, scored: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """One token over all slots (those with a position >= 0, where there are holes); scored: with its mass, if wanted."""
        bias = self.geometry.bias(step.position, position, step.compute)
        if not served(q) or step.compute is not None or bias is not None:
            mask = (position >= 0).unsqueeze(2) if holes else None
            return self._run(q, k, v, mask, False, step, int(scored and self._wants()), None, bias)
        return self._kernels(q, k, v, position if holes else None, step.scale, scored)

    def _wants(self) -> bool:
        """Whether the policy looks at the attention of single tokens."""
        return self.policy.mass_queries(1) + self.policy.row_queries(1) > 0

    def _kernels(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        position: Tensor | None,
        scale: float,
        scored: bool = True,
        length: Tensor | None = None,
        drawing: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """One token over all slots (or the first `length`) on the device, and the mass where the policy wants it.

        drawing: int32 ``[B, 1]``; rows below 0 draw nothing.
        """
        what = {"length": self._whole(k) if length is None else length, "position": position, "scale": scale}
        if not scored or not self._wants():
            return kernel("decode:decode_attention")(q, k, v, **what)[0], None
        return kernel("decode:decode_masses")(q, k, v, **what, drawing=None if drawing is None else drawing.flatten())

    def _whole(self, k: Tensor) -> Tensor:
        """The length of all slots, int32 ``[1]``, made once."""
        if self.length is None or self._length_of != k.shape[2]:
            self.length = torch.full((1,), k.shape[2], dtype=torch.int32, device=k.device)
            self._length_of = k.shape[2]
        return self.length

    def _steady_on_device(self) -> bool:
        """Whether every slot of every row is taken, on CUDA: then a step is a handful of launches."""
        return (
            self.keys is not None
            and self.slot is not None
            and served(self.keys)
            and not self.holes
            and not self.recording
            and self.geometry.slopes is None  # kernels take no position biases
        )

    def _steady(self, q: Tensor, k: Tensor, v: Tensor, position: Tensor, scale: float) -> Tensor:
        """As `_one`, in place on static buffers with fused launches: what a captured step runs."""
        assert self.keys is not None and self.values is not None and self.position is not None
        assert self.slot is not None and self.keep is not None
        policy = self.policy
        kernel("slots:place")(
            self.keys, self.values, self.position, self.state, self.slot, k.detach(), v.detach(), position
        )
        # A row that idles (position -1) keeps its newest token; where worth is position, `free` alone has to know, as `settle`.
        how = policy.settles()
        newest = position if policy.spec.by_position or how is not None else self.position.amax((1, 2))[:, None]
        view = View(self.keys, self.values, self.position, self.keep, newest.unsqueeze(-1), q)
        keys = self._turned_keys(view)
        if how is not None:
            scores = torch.empty(*q.shape[:2], keys.shape[2], dtype=torch.float32, device=q.device)
            what = {"length": self._whole(keys), "scale": scale, "scores": scores}
            out, lse = kernel("decode:decode_attention")(q, keys, self.values, **what)
            kernel("slots:settle")(scores, lse, self.position, self.slot, position, self.keep, state=self.state, **how)
            self.seen += 1
            return out
        out, mass = self._kernels(q, keys, self.values, None, scale, drawing=position)
        view, state = self._scored(view, mass, position), None
        if self.state is not None:
            state = policy.observe(self.state, view)
            assert state is not None
            self.state.copy_(state)
        if policy.spec.by_position:
            kernel("slots:free")(self.position, self.slot, protect=policy.protected())
        else:
            kernel("slots:free")(self.position, self.slot, worth=policy.rank(state, view).to(torch.float32))
        self.seen += 1
        return out

    def _appended(self, q: Tensor, k: Tensor, v: Tensor, scale: float, now: Now) -> Tensor:
        """As `_one` where nothing is evicted, in place on static buffers: what a captured step of a lagging policy runs."""
        assert self.keys is not None and self.values is not None and self.position is not None
        assert self.offset is not None and self.keep is not None
        at = now.cursor - self.offset
        self.keys.index_copy_(2, at, k)
        self.values.index_copy_(2, at, v)
        self.position.index_copy_(2, at, now.position[:, None].expand(-1, k.shape[1], -1).to(self.position.dtype))
        newest = self.position.amax((1, 2))[:, None] if self.width else now.position
        view = View(self.keys, self.values, self.position, self.keep, newest.unsqueeze(-1), q)
        length = (now.length - self.offset).int()
        out, mass = self._kernels(
            q, self._moved(view), self.values, self.position, scale, self.width > 0, length, now.position
        )
        if self.state is not None:
            state = self.policy.observe(self.state, self._scored(view, mass, now.position))
            assert state is not None
            self.state.copy_(state)
        self._count()
        return out

    def _count(self) -> None:
        """One token was appended."""
        self.seen, self.filled, self.over = self.seen + 1, self.filled + 1, self.over + 1

    def _turned_keys(self, view: View) -> Tensor:
        """The keys as read by a steady step: a few movers are rotated in place, their originals kept beside."""
        shift = None if self.movers is None else self.policy.mover_shift(view.newest, view.keys.shape[2])
        if shift is not None and self.movers is not None:
            shift = shift.expand_as(self.movers)
        else:
            every, movers = self.policy.shift(view), self.policy.moving(view)
            if every is None or movers is None or self.movers is None:
                return self._moved(view)
            shift = every.gather(2, self.movers)
        if self.movers.shape[2] == 0:
            return view.keys
        if self.anchors is None:
            self.anchors = _pick(view.keys, self.movers)
        assert self.geometry.rope is not None
        frequencies = self.geometry.rope.frequencies.to(view.keys.device)
        kernel("slots:turn")(view.keys, self.anchors, self.movers, frequencies, shift.int())
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
        bias: LinearBias | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The attention, and the mass that the policy asked for, in one pass where no other compute is set."""
        real = None if query is None else query >= 0
        if mask is not None and mask.shape[1] not in (1, q.shape[1]):
            mask = mask.repeat_interleave(q.shape[1] // mask.shape[1], 1)
        if rows >= q.shape[2] and step.compute is None:
            done = attend(q, k, v, mask=mask, causal=causal, scale=step.scale, mass=True, mass_rows=real, bias=bias)
            return done.out, done.mass
        more: dict[str, Any] = {} if bias is None else {"bias": bias}
        out = (step.compute or sdpa)(q, k, v, mask=mask, causal=causal, scale=step.scale, **more)
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
            bias=None if bias is None else bias._replace(query=bias.query[:, start:]),
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
        if not self.width:
            return None
        state = keys.new_zeros((*keys.shape[:3], self.width), dtype=torch.float32)
        if self.state is not None:
            state[:, :, :old] = self.state[:, :, :old]
        return state

    def _worth(self, view: View, state: Tensor | None) -> Tensor:
        """The policy's rank with the base's guarantees: padding and empty slots last, the newest token first."""
        worth = self.policy.rank(state, view).to(torch.float32)
        worth = torch.nan_to_num(worth, nan=-3e38, posinf=3e38, neginf=-3e38)
        worth = worth.masked_fill(view.position == view.newest, torch.inf)
        return worth.masked_fill(view.position < 0, -torch.inf)

    def _store(self, view: View, state: Tensor | None, keep: Tensor | None = None, hold: bool = False) -> None:
        """Keep the best `keep` slots of every row and head, in position order, with one spare slot behind them.

        keep: ``[B, 1, 1]``, or None for the budget. hold: keep everything.
        """
        assert self.keep is not None
        total = view.keys.shape[2]
        most, least = self.most, self.least
        if keep is not None:
            counts = keep.flatten().tolist()
            most, least = max(counts), min(counts)
        keep = self.keep if keep is None else keep
        if total > least and not hold:
            worth, index = _best(self._worth(view, state), view.position, min(most, total))
            place = torch.arange(index.shape[-1], device=worth.device)
            lost = (place >= keep) | (worth == -torch.inf)
            where = view.position.gather(2, index).masked_fill(lost, torch.iinfo(view.position.dtype).max)
            where, order = where.sort(dim=-1)
            index = index.gather(2, order)
            lost = lost.gather(2, order)
            position = where.masked_fill(lost, -1)
            keys, values = _pick(view.keys, index), _pick(view.values, index)
            state = None if state is None else _pick(state, index)
            self.holes = bool(lost.any())
        else:
            keys, values, position = view.keys, view.values, view.position
            self.holes = self.holes or bool((position < 0).any())
        self.filled = keys.shape[2]
        self.slot = None
        if self.lag:
            held = self.filled - self.least
            if self.holes and self.lag < NO_LIMIT:  # slots are not tokens then
                held = int(((position[:, :1] >= 0).sum(-1, keepdim=True) - self.keep).max())
            self.over = held
        self._write(keys, values, position, state)

    def _write(self, keys: Tensor, values: Tensor, position: Tensor, state: Tensor | None) -> None:
        """Take over the slots in use, into the buffers that there are where a lagging policy has room in them."""
        capacity = self._capacity(0)
        if self.lag and self.keys is not None and self.keys.shape[2] == capacity and self.position is not None:
            assert self.values is not None
            for x, new in ((self.keys, keys), (self.values, values)):
                x[:, :, : self.filled] = new.detach()
            position = position.clone()  # it may be a part of what is overwritten
            self.position.fill_(-1)[:, :, : self.filled] = position
            if self.state is not None and state is not None:
                state = state.clone()
                self.state.zero_()[:, :, : self.filled] = state
            return
        self.keys, self.values = (resized(x.detach(), capacity, self.filled) for x in (keys, values))
        self.position = resized(position, capacity, self.filled, -1)
        self.state = None if state is None else resized(state, capacity, self.filled)

    def _capacity(self, held: int) -> int:
        """Slots to allocate when `held` are and one more token is to come."""
        if self.policy.whole_prompt() and self.seen < (self.prompt or 0) and self.filled > self.most:
            return self.filled  # a prompt that waits for its end
        if not self.lag:
            return min(self.most + 1, grown(held, self.filled + 1))
        most = self.most + self.lag + 1
        want = max(self.filled + 1, min(self.filled + self.room - self.seen, most) if self.room else 0)
        return max(held, min(most, grown(held, want)))

    def _place(self, k: Tensor, v: Tensor, position: Tensor) -> None:
        """Write one token into the spare slot of every row and head."""
        assert self.keys is not None and self.values is not None and self.position is not None
        if self.slot is None:  # still growing: the next unused slot, the same for all rows
            capacity = self._capacity(self.keys.shape[2])
            if capacity != self.keys.shape[2]:
                self.keys, self.values = (resized(x, capacity, self.filled) for x in (self.keys, self.values))
                self.position = resized(self.position, capacity, self.filled, -1)
                self.state = None if self.state is None else resized(self.state, capacity, self.filled)
            at = slice(self.filled, self.filled + 1)
            assert self.keys is not None and self.values is not None and self.position is not None
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
        self.recount(snapshot[1])

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
        return {name: getattr(self, name) for name in ("filled", "most", "least", "over", "holes", "prompt", "seen")}

    def advance(self) -> None:
        """See `LayerCache.advance`."""
        if self.slot is None:
            self._count()
        else:
            self.seen += 1

    def reserve(self, tokens: int) -> None:
        """Room for `tokens` at once where decoded tokens stay, so that decoding never moves the buffers."""
        self.room = tokens

    def tensors(self) -> dict[str, Tensor]:
        """Copies of every tensor, and the counters as a 0-d tensor each."""
        self._put_back()
        names = ("keys", "values", "position", "state", "slot", "keep", "movers", "tail", "tail_at")
        out = {name: x.clone() for name in names if (x := getattr(self, name)) is not None}
        counts = {name: -1 if count is None else int(count) for name, count in self.counters().items()}
        return out | {f"count.{name}": torch.tensor(count) for name, count in counts.items()} if out else out

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """See `LayerCache.restore`."""
        self.reset()
        for name, x in tensors.items():
            if name.startswith("count."):
                value = int(x)
                if name == "count.prompt":
                    self.prompt = None if value < 0 else value
                else:
                    setattr(self, name[6:], bool(value) if name == "count.holes" else value)
            else:
                setattr(self, name, x.clone())

    def select(self, rows: Tensor) -> None:
        """See `LayerCache.select`."""
        self._refuse_beams()
        for name in ("keys", "values", "position", "state", "slot", "keep", "movers", "anchors", "tail", "tail_at"):
            x = getattr(self, name)
            if x is not None:
                setattr(self, name, rearranged(x, rows))

    def bytes(self) -> int:
        """Bytes of keys, values, positions and policy state, spare capacity and what recording holds included."""
        held = (*self.buffers(), self.tail, self.tail_at)
        return sum(x.numel() * x.element_size() for x in (*held, *self._recorded()) if x is not None)

    def kept(self) -> int:
        """See `LayerCache.kept`."""
        return self.filled if self.lag or self.tail is not None else min(self.filled, self.most)

    def positions(self) -> Tensor:
        """``[B, G, S]``, sorted, empties (-1) first."""
        if self.position is None:
            raise StateError("the cache is empty")
        return self.position[:, :, : self.filled].sort(-1).values

    def static(self) -> bool:
        """True once every slot is in use: from then on a step overwrites in place. With a lag, until rows are cut again."""
        if self.recording or self.keys is None or not served(self.keys) or self.geometry.slopes is not None:
            return False
        if self.tail is not None or self._waits(1):
            return False
        if not self.lag:
            return self.slot is not None
        if self.over >= self.lag or self.filled >= self.keys.shape[2]:
            return False
        offset = self.seen - self.filled
        if self.offset is None:
            self.offset = torch.full((1,), offset, dtype=torch.int64, device=self.keys.device)
        elif self._offset_of != offset:
            self.offset.fill_(offset)
        self._offset_of = offset
        return True

    def step(self, q: Tensor, k: Tensor, v: Tensor, scale: float, now: Now) -> Tensor:
        """See `LayerCache.step`."""
        if self.lag:
            return self._appended(q, k, v, scale, now)
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
            self.offset,
        )
        return tuple(x for x in held if x is not None)


def _best(worth: Tensor, position: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` highest of worth ``[B, G, S]``, descending, and their slots; of equals the newer, wherever they lie."""
    order = position.argsort(-1, descending=True)
    best = worth.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return best.values[..., :count], order.gather(-1, best.indices[..., :count])


def _gaps(position: Tensor) -> bool:
    """Whether padding (-1) follows a real token in any row of ``[B, N]``."""
    return bool(((position[:, :-1] >= 0) & (position[:, 1:] < 0)).any())


def _turned(x: Tensor, order: Tensor) -> Tensor:
    """`x` ``[B, H, N, D]`` with the tokens of each row in the order ``[B, N]``."""
    return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _wide(index: Tensor, x: Tensor) -> Tensor:
    """A slot index ``[B, G, K]`` spread over the last axis of `x`."""
    return index.unsqueeze(-1).expand(*index.shape, x.shape[-1])


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """The slots `index` ``[B, G, K]`` of `x` ``[B, G, S, .]``."""
    return x.gather(2, _wide(index, x))
