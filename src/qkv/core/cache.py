"""Caches: what is stored, how precisely, and what is read. The base classes own the work; a policy only ranks.

A `LayerCache` is one attention site's memory during one generation: it takes new queries, keys and values, attends,
observes and evicts. A `CacheMethod` is the frozen configuration that builds one per site. A `Policy` is a CacheMethod
that keeps the best-ranked slots of every KV head; top-k, order, padding, budgets and decoding in place are done once, in
`qkv.caches._stores.ranked`.

Axes: B batch, H query heads, G key/value heads, N new queries, S stored slots, D head width, E value width.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from qkv.core.attend import LinearBias
from qkv.core.errors import InvalidParameter, Refused, StateError
from qkv.core.spec import Method, Spec

Compute = Callable[..., Tensor]
"""``compute(q, k, v, *, mask, causal, scale) -> out``: q ``[B, H, N, D]``, k ``[B, G, M, D]``, v ``[B, G, M, E]``, mask bool
broadcastable to ``[B, H, N, M]`` or None, causal lower-right aligned, out ``[B, H, N, E]``."""


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding of a site: keys are stored rotated by ``position * frequency`` in half-split layout.

    frequencies: ``[R/2]`` float32, rotated width R <= D. fixed: False when frequencies depend on the length (dynamic
    NTK, LongRoPE); then stored keys cannot be moved.
    """

    frequencies: Tensor
    fixed: bool = True
    kind: str = "default"

    def rotate(self, keys: Tensor, shift: Tensor) -> Tensor:
        """`keys` ``[..., D]`` moved forward by `shift` ``[...]`` positions (a pure rotation, in float32)."""
        r = 2 * self.frequencies.shape[0]
        angle = shift.to(torch.float32).unsqueeze(-1) * self.frequencies.to(keys.device)  # [..., R/2]
        cos, sin = angle.cos(), angle.sin()
        wide = torch.promote_types(keys.dtype, torch.float32)
        x, rest = keys[..., :r].to(wide), keys[..., r:]
        a, b = x.chunk(2, dim=-1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(keys.dtype)
        return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


@dataclass(frozen=True, slots=True)
class Geometry:
    """Shape facts of an attention site that a cache needs. layer counts from 0 of `layers`.

    slopes: one per query head, where the site adds linear position biases (ALiBi) to its logits; a memory then adds `bias`.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    layer: int = 0
    layers: int = 1
    rope: Rope | None = None
    max_length: int | None = None
    slopes: tuple[float, ...] | None = None

    def bias(self, query: Tensor, key: Tensor, compute: Compute | None = None) -> LinearBias | None:
        """The bias between query positions ``[B, N]`` and key positions ``[B, 1|G, M]``, or None where the site adds none.

        compute: another attention that is to run, which takes no bias: `Refused`.
        """
        if self.slopes is None:
            return None
        if compute is not None:
            raise Refused(
                f"layer {self.layer} adds linear position biases (ALiBi) to its logits, which the attention put in its place "
                "does not take; run it plain"
            )
        return LinearBias(_slopes(self.slopes, query.device), query, key)


@functools.lru_cache(maxsize=256)
def _slopes(slopes: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(slopes, dtype=torch.float64).to(device)


@dataclass(slots=True)
class Step:
    """What the host tells a LayerCache about one call.

    position: ``[B, N]`` logical position of each new token in its row, -1 = padding. padding: ``[B, seen + N]`` bool,
    True = real, or None when no row is padded. mask: another logical mask ``[B, 1|H, N, seen + N]`` (packed sequences,
    prefixes), or None. compute: the attention to run. causal: False for bidirectional sites.
    """

    position: Tensor
    scale: float
    padding: Tensor | None = None
    mask: Tensor | None = None
    compute: Compute | None = None
    causal: bool = True


@dataclass(slots=True)
class Now:
    """Where a captured decoding step stands, on the device, shared by all sites.

    cursor: int64 ``[1]`` logical column of the new token. length: int32 ``[1]`` columns including it. position: int32
    ``[B, 1]`` its position in its row. start: int32 ``[B]`` left padding of each row, or None.
    """

    cursor: Tensor
    length: Tensor
    position: Tensor
    start: Tensor | None = None


@dataclass(frozen=True, slots=True)
class View:
    """Stored slots as a policy sees them, per KV head, in no particular order.

    keys ``[B, G, S, D]``, values ``[B, G, S, E]``, position ``[B, G, S]`` (-1 = padding or empty), mass ``[B, H, S]``
    attention drawn from the queries the policy asked for (None if it asked for none), keep ``[B, 1, 1]`` the row's
    budget in tokens, queries ``[B, H, N, D]`` of this call, newest ``[B, 1, 1]`` the row's newest position. rows
    ``[B, H, R, S]`` attention of each of the newest R queries, where the policy asked for it (0 from padding), and asked
    ``[B, R]`` their positions (-1 = padding).
    """

    keys: Tensor
    values: Tensor
    position: Tensor
    keep: Tensor
    newest: Tensor
    queries: Tensor
    mass: Tensor | None = None
    rows: Tensor | None = None
    asked: Tensor | None = None

    @property
    def order(self) -> Tensor:
        """``[B, G, S]`` place of each slot among the real ones by position (0 = oldest); empties come last."""
        key = torch.where(self.position < 0, torch.iinfo(self.position.dtype).max, self.position)
        return key.argsort(-1).argsort(-1)

    def per_group(self, x: Tensor, how: str = "sum") -> Tensor:
        """``[B, H, S]`` to ``[B, G, S]``: the query heads of a KV head combined by ``sum``, ``mean`` or ``max``."""
        b, _, s = x.shape
        grouped = x.reshape(b, self.position.shape[1], -1, s)
        return grouped.amax(2) if how == "max" else getattr(grouped, how)(2)


@dataclass(frozen=True, kw_only=True)
class CacheSpec(Spec):
    """Facts about a cache method.

    evicts: tokens are lost for good. by_position: slots are ranked by position alone, so all heads keep the same tokens.
    slot_state: float32 numbers kept per slot and KV head (`Policy.width`, where settings decide). exact_chunks: one-shot,
    chunked and token-by-token prefill give the same result (policies that rank by position); others evict at
    different times by design. slopes: its memory adds the linear position biases (ALiBi) of sites that have them; at others'
    such sites are refused. columns: another attention gets every token in its logical column, so that a pattern may go by
    distance; others hand over slots in an order of their own.
    """

    kind: ClassVar[str] = "cache"
    evicts: bool = True
    by_position: bool = False
    slot_state: int = 0
    exact_chunks: bool = False
    slopes: bool = False
    columns: bool = False
    small: dict[str, Any] = field(default_factory=dict)
    """Parameters that make the method act on the laws' small inputs (tens of tokens)."""


@dataclass(slots=True)
class Board:
    """What the sites of one cache tell each other, by name. Sites run in order, so a later one reads what an earlier one
    wrote in the same call. Tensors only, or plain numbers: a copy of the cache copies its board.
    """

    notes: dict[str, Any] = field(default_factory=dict)


class LayerCache(ABC):
    """One site's memory. Host-independent; every method keeps keys, values, positions and state together."""

    seen: int = 0
    """Logical tokens absorbed so far, padding included (the host's column count)."""

    board: Board | None = None
    """Shared by the sites of one cache; None for a memory that stands alone."""

    def join(self, board: Board) -> None:
        """The host has made the memories of one cache: from now on they share `board`."""
        self.board = board

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """Absorb k, v ``[B, G, N, .]`` and return the attention of q ``[B, H, N, D]`` -> ``[B, H, N, E]``."""

    @abstractmethod
    def crop(self, tokens: int) -> None:
        """Forget the newest `tokens` and settle (evict what recording postponed), or raise `StateError`."""

    @abstractmethod
    def select(self, rows: Tensor) -> None:
        """Keep (reorder, repeat) the batch rows `rows` ``[B']``: beams."""

    @abstractmethod
    def bytes(self) -> int:
        """Bytes held by all tensors of this layer, capacity included."""

    def resident(self) -> int:
        """Bytes of these that stay with the model; the others lie in host memory or on disk. On a CPU model both are one
        memory, and the figure says what an accelerator would hold.
        """
        return self.bytes()

    def read_bytes(self) -> int:
        """Bytes of stored keys, values and index that the last one-token step read; default: all that are held."""
        return self.bytes()

    def full_bytes(self, k: Tensor, v: Tensor) -> int:
        """Bytes that a plain cache of the tokens seen would hold; k, v as last handed to `attend`."""
        return k.shape[0] * self.seen * k.shape[1] * (k.shape[3] + v.shape[3]) * k.element_size()

    @abstractmethod
    def kept(self) -> int:
        """Largest number of tokens stored for any row and head, without asking the device."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Everything needed to restore this layer, by name."""

    @abstractmethod
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `tensors`."""

    @abstractmethod
    def reset(self) -> None:
        """Forget everything."""

    @abstractmethod
    def positions(self) -> Tensor:
        """``[B, G, S]`` logical position of every stored slot, -1 = padding or empty."""

    def record(self) -> None:
        """From now on every block is provisional until `crop` settles it (speculative decoding)."""

    def announce(self, prompt: int) -> None:
        """The host knows that `prompt` logical tokens belong to the prompt (chunked or speculative prefill)."""

    def reserve(self, tokens: int) -> None:
        """The host expects `tokens` logical tokens in all and wants static shapes: room may be made at once."""

    def static(self) -> bool:
        """Whether `step` can serve the next token: no shape changes, no value is read on the host (CUDA graph)."""
        return False

    def step(self, q: Tensor, k: Tensor, v: Tensor, scale: float, now: Now) -> Tensor:
        """One token on static buffers; as `attend` with one query. Only called when `static()`."""
        raise StateError(f"{type(self).__name__} has no static step")

    def buffers(self) -> tuple[Tensor, ...]:
        """The tensors whose addresses a captured step depends on."""
        return ()

    def counters(self) -> dict[str, Any]:
        """The host's counters, to be put back after a capture (which runs the host code but not the device's)."""
        return {"seen": self.seen}

    def recount(self, counters: dict[str, Any]) -> None:
        """Put `counters` back."""
        vars(self).update(counters)

    def advance(self) -> None:
        """Count one replayed step (the host's counters only; the device work was in the graph)."""
        self.seen += 1


@dataclass(frozen=True, kw_only=True)
class CacheMethod(Method):
    """Base of cache configurations."""

    spec: ClassVar[CacheSpec]

    @abstractmethod
    def layer(self, geometry: Geometry) -> LayerCache:
        """A fresh memory for one site. Raises `Refused` when the site cannot be served."""

    def fits(self, geometry: Geometry) -> str | None:
        """None, or the reason why a site of this geometry cannot be served (no side effect)."""
        return None

    def serves(self, geometry: Geometry) -> str | None:
        """`fits`, and whether the method adds the linear position biases of a site that has them."""
        if geometry.slopes is not None and not self.spec.slopes:
            return f"it adds linear position biases (ALiBi) to its logits, which {self.id} does not compute"
        return self.fits(geometry)

    def repairs(self) -> int | None:
        """Decoded tokens after which the host takes them back and runs them again in one call that reads everything, or None."""
        return None

    def sees(self, geometry: Geometry, query: Tensor, position: Tensor) -> Tensor | None:
        """By definition, what a block's queries ``[B, N]`` may see of tokens ``[B, G, S]`` beyond causality: bool
        ``[B, G, N, S]``, or None for all that is stored and all of the block.
        """
        return None

    def remainder(self, q: Tensor, k: Tensor, v: Tensor, gone: Tensor, scale: float) -> tuple[Tensor, Tensor] | None:
        """By definition, what evicted tokens still give to queries: a part (out, lse) to be merged, or None for nothing.

        q ``[B, H, N, D]``; k ``[B, G, M, D]``, v ``[B, G, M, E]`` all tokens seen; gone ``[B, G, M]`` bool, those evicted.
        """
        return None


@dataclass(frozen=True, kw_only=True)
class Policy(CacheMethod):
    """Keep the best-ranked slots of every KV head; everything else is in the base. Override `rank`, and what it needs.

    A policy is stateless: what it accumulates is `spec.slot_state` float32 numbers per slot, moved with the slots.
    """

    def slots(self, tokens: int) -> int:
        """Slots kept per head for a prompt of `tokens` real tokens; default: the `budget` parameter."""
        return budget_slots(getattr(self, "budget"), tokens)  # noqa: B009

    def slots_at(self, tokens: int, geometry: Geometry) -> int:
        """Slots kept per head at one site; where layers differ, the mean over the layers is `slots`."""
        return self.slots(tokens)

    def width(self, geometry: Geometry) -> int:
        """Numbers of state per slot and KV head, where settings or the site decide; default: `spec.slot_state`."""
        return self.spec.slot_state

    def lag(self) -> int:
        """Decoded tokens that may be held above the budget before a step evicts down to it; 0: every step evicts.

        `NO_LIMIT`: decoded tokens stay until the next block.
        """
        return 0

    def whole_prompt(self) -> bool:
        """Whether a prompt that comes in pieces is evicted once, at its end: then pieces give what one block gives.

        Until then it is held whole. It needs the host to announce the prompt's length; a block that was not announced is a
        prompt of its own. Such a policy asks for a bounded number of queries.

        Peak memory: a prompt in one block is compressed layer by layer, each right after its attention, so at most one layer is
        dense. Pieces pass through all layers before the next piece comes, so until the prompt ends every layer holds all of it,
        as a dense cache does: what its last queries will ask for is not known earlier. Where pieces must also bound the cache,
        take a policy that ranks what it holds after each of them (h2o, tova, streamingllm).
        """
        return False

    def chunk(self, keep: int) -> int | None:
        """Largest block absorbed before evicting, or None for any: longer prompts are cut into such blocks."""
        return None

    def mass_queries(self, new: int) -> int:
        """How many of the newest queries of a call should be summed into `View.mass` (0 = none needed)."""
        return 0

    def row_queries(self, new: int) -> int:
        """How many of the newest queries of a call should be given one by one in `View.rows` (0 = none needed)."""
        return 0

    def visible(self, query: Tensor, position: Tensor) -> Tensor | None:
        """Extra mask ``[B, G, N, S]`` inside a block, from query positions ``[B, N]`` and slot positions ``[B, G, S]``, or None.

        A single decoding step reads every stored slot.
        """
        return None

    def sees(self, geometry: Geometry, query: Tensor, position: Tensor) -> Tensor | None:
        """See `visible`."""
        return self.visible(query, position)

    def shift(self, view: View) -> Tensor | None:
        """Positions ``[B, G, S]`` by which each stored key is moved forward before it is read, or None."""
        return None

    def moving(self, view: View) -> tuple[Tensor, int] | None:
        """Which slots `shift` may ever move (bool ``[B, G, S]``) and how many at most, or None for any: less is rotated.

        A slot that may move stays where it is for the rest of the generation (sinks).
        """
        return None

    def mover_shift(self, newest: Tensor, slots: int) -> Tensor | None:
        """`shift` of the slots that `moving` names in a row that holds `slots` tokens, ``[B, 1, 1]``; None: `shift` is asked.

        newest: as in `View`. Asked once every slot is taken, so that a step need not look at the positions of all slots.
        """
        return None

    def settles(self) -> dict[str, Any] | None:
        """`observe` and `rank` of one token as keywords of `qkv.kernels.slots.settle`, which does both in one pass; or None."""
        return None

    def protected(self) -> int:
        """For policies ranked by position: the first tokens that are never evicted."""
        return 0

    def observe(self, state: Tensor | None, view: View) -> Tensor | None:
        """New per-slot state ``[B, G, S, slot_state]`` after a call; `state` holds 0 for slots that are new."""
        return state

    @abstractmethod
    def rank(self, state: Tensor | None, view: View) -> Tensor:
        """Worth ``[B, G, S]`` of each slot; the highest stay. Padding and the newest token are the base's concern."""

    def layer(self, geometry: Geometry) -> LayerCache:
        """See `CacheMethod.layer`."""
        import importlib

        reason = self.serves(geometry)
        if reason is not None:
            raise Refused(f"{self.id} at layer {geometry.layer}: {reason}")
        # By name: core defines the contract, the store that fulfils it lives with the caches.
        return importlib.import_module("qkv.caches._stores.ranked").RankedCache(self, geometry)


NO_LIMIT = 1 << 40


def budget_slots(budget: float | int, tokens: int) -> int:
    """A budget in slots: an int as it is, a share of `tokens` rounded down, at least 1; the share 1.0 evicts nothing ever."""
    if budget == 1.0 and isinstance(budget, float):
        return NO_LIMIT
    return budget if isinstance(budget, int) else max(1, int(budget * tokens))


def needs_rope(geometry: Geometry, who: str) -> str | None:
    """None, or why stored keys of this site cannot be moved to other positions."""
    if geometry.rope is None:
        return f"{who} moves rotary keys, and this site has no rotary embedding that qkv can read; use positions='original'"
    if not geometry.rope.fixed:
        return (
            f"{who} moves rotary keys, and this model's frequencies depend on the length ({geometry.rope.kind}); use "
            "positions='original'"
        )
    return None


def require(condition: bool, message: str) -> None:
    """Raise `InvalidParameter` with `message` unless the condition holds (for `validate`)."""
    if not condition:
        raise InvalidParameter(message)
