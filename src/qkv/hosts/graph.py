"""Decoding steps as CUDA graphs: one capture per generation, then one launch per token.

A plain decoding step is bound by the host, not by bytes: hundreds of launches a token. Once every cached site is static (it
overwrites in place: full with room reserved, window, sinks, ranked slots at their budget), the whole forward pass of one token
is captured and replayed. The step is the same code on the same tensors; what it does not fit (a prompt, a growing cache, a
request for attentions) runs as before and is counted in `Graphs.plain`.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qkv.core.cache import LayerCache, Now
from qkv.core.errors import Refused

# Arguments of a forward pass that a graph reproduces; anything else that is set runs plainly.
_KNOWN = {
    "input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "return_dict", "logits_to_keep",
    "cache_position",
}  # fmt: skip


def install(session: Any) -> Graphs:
    """Put graphs on the session's model, or raise `Refused` with what stands in the way."""
    model = session.model
    if next(model.parameters()).device.type != "cuda":
        raise Refused("graph=True needs the model on a CUDA device; leave it out here")
    if session.repair is not None:
        raise Refused(
            "graph=True: a method runs its decoded tokens again every so often, which is not static; set that off"
        )
    for site in session.sites:
        state = session.states[site.name]
        if not site.cached:
            continue
        if not session._serves(site):
            raise Refused(f"graph=True: {site.name} keeps a cache that is not static; apply a method there too")
        if site.geometry.slopes is not None:
            raise Refused(
                f"graph=True: {site.name} adds linear position biases (ALiBi), which no kernel of a static step takes"
            )
        if state.steering or state.observers or (state.operator is not None and state.operator.id != "full"):
            raise Refused(
                f"graph=True: {site.name} is steered, observed or computed by another operator while decoding"
            )
    return Graphs(session)


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    ids: Tensor  # [B, 1]
    places: Tensor  # [B, 1] position_ids
    now: Now
    output: Any
    signature: tuple[int, ...]


class Graphs:
    """Replays decoding steps. replays, captures, plain: how many forward passes went each way."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.replays = self.captures = self.plain = 0
        self._captured: _Captured | None = None
        self._starts: tuple[Any, Tensor | None] | None = None
        self._had = session.model.__dict__.get("forward")
        self._forward = session.model.forward

        @functools.wraps(self._forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._run(*args, **kwargs)

        session.model.__dict__["forward"] = forward

    def remove(self) -> None:
        """Put the model's forward back."""
        if self._had is None:
            self.session.model.__dict__.pop("forward", None)
        else:
            self.session.model.__dict__["forward"] = self._had
        self._captured = None

    # -- one forward pass -------------------------------------------------------------------------------------

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        memories = self._static(args, kwargs)
        if memories is None:
            self.plain += 1
            return self._forward(*args, **kwargs)
        ids, start = kwargs["input_ids"], self._start(kwargs)
        signature = (ids.shape[0], id(kwargs["past_key_values"]), 0 if start is None else 1,
                     *(x.data_ptr() for m in memories for x in m.buffers()))  # fmt: skip
        if self._captured is None or self._captured.signature != signature:
            self._captured = self._capture(ids, kwargs, memories, start, signature)
        return self._replay(self._captured, kwargs, memories, start)

    def _static(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[LayerCache] | None:
        """The memories of a step that can be replayed, or None."""
        ids, cache = kwargs.get("input_ids"), kwargs.get("past_key_values")
        if args or ids is None or cache is None or ids.shape[-1] != 1 or torch.is_grad_enabled():
            return None
        if any(v is not None and v is not False for k, v in kwargs.items() if k not in _KNOWN):
            return None
        if cache.__dict__.get("_qkv") is not self.session:
            return None
        memories = [layer.memory for layer in cache.layers if hasattr(layer, "memory")]
        return memories if memories and all(m.static() for m in memories) else None

    def _start(self, kwargs: dict[str, Any]) -> Tensor | None:
        """``[B]`` int32 padding columns of each row, or None; looked at once per cache."""
        mask, cache = kwargs.get("attention_mask"), kwargs["past_key_values"]
        if mask is None:
            return None
        if self._starts is None or self._starts[0] is not cache:
            pads = (mask == 0).sum(-1, dtype=torch.int32)
            self._starts = (cache, pads if bool(pads.any()) else None)
        return self._starts[1]

    def _capture(self, ids: Tensor, kwargs: dict[str, Any], memories: list[LayerCache], start: Tensor | None,
                 signature: tuple[int, ...]) -> _Captured:  # fmt: skip
        b, device = ids.shape[0], ids.device
        now = Now(
            cursor=torch.zeros(1, dtype=torch.int64, device=device),
            length=torch.ones(1, dtype=torch.int32, device=device),
            position=torch.zeros(b, 1, dtype=torch.int32, device=device),
            start=None if start is None else start.clone(),
        )
        static_ids, places = ids.clone(), torch.zeros(b, 1, dtype=torch.int64, device=device)
        call = {k: v for k, v in kwargs.items() if k in _KNOWN} | {
            "input_ids": static_ids, "position_ids": places, "attention_mask": None, "use_cache": True,
        }  # fmt: skip
        counters = [m.counters() for m in memories]
        calls = [s.tally.calls for s in self.session.states.values()]
        self._fill(now, places, memories, kwargs, start)
        self._captured = None  # give the old graph's memory back first
        graph = torch.cuda.CUDAGraph()
        self.session.now = now
        try:
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                output = self._forward(**call)
        finally:
            self.session.now = None
            for memory, before in zip(memories, counters, strict=True):
                memory.recount(before)
            for state, before in zip(self.session.states.values(), calls, strict=True):
                state.tally.calls = before
        self.captures += 1
        return _Captured(graph, static_ids, places, now, output, signature)

    @staticmethod
    def _fill(
        now: Now, places: Tensor, memories: list[LayerCache], kwargs: dict[str, Any], start: Tensor | None
    ) -> None:
        seen = memories[0].seen
        now.cursor.fill_(seen)
        now.length.fill_(seen + 1)
        if start is None:
            now.position.fill_(seen)
        else:
            torch.sub(seen, start.unsqueeze(-1), out=now.position)
        given = kwargs.get("position_ids")
        if given is None:
            places.fill_(seen)
        else:
            places.copy_(given[..., -1:].expand_as(places))

    def _replay(
        self, captured: _Captured, kwargs: dict[str, Any], memories: list[LayerCache], start: Tensor | None
    ) -> Any:
        captured.ids.copy_(kwargs["input_ids"])
        self._fill(captured.now, captured.places, memories, kwargs, start)
        captured.graph.replay()
        for memory in memories:
            memory.advance()
        for state in self.session.states.values():
            if state.applied:
                state.tally.calls += 1
                state.tally.seen = memories[0].seen
        self.replays += 1
        output = copy.copy(captured.output)
        output.logits = captured.output.logits.clone()
        output["past_key_values"] = kwargs["past_key_values"]
        return output
