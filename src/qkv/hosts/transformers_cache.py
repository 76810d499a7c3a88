"""Cache layers of transformers around our memories, and a filled cache written to a folder and read again."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from qkv.core.cache import LayerCache
from qkv.core.errors import InvalidInput, QKVError, Refused, SavedDataError, StateError
from qkv.core.steering import Running
from qkv.hosts.stack import SiteState

handoff = threading.local()
"""Keys and values on their way from a cache layer's `update` to the attention function that follows, per thread."""


class QKVLayer(DynamicLayer):
    """A cache layer of transformers around a `LayerCache`."""

    is_croppable = True

    def __init__(self, memory: LayerCache, state: SiteState) -> None:
        super().__init__()
        self.memory, self.state = memory, state
        self.running = Running()
        self.decoded: Tensor | None = None  # [B, n] ids of the newest tokens, where they will be run again
        self.record_past = False
        self.rows: int | None = None  # of the batch that it was filled with
        self.awaited = False  # a model that carries its session is about to fill it
        self.frozen = False  # last written to in inference mode
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hand over to the attention function that follows on the same tensors."""
        pending = getattr(handoff, "pending", None)
        if pending is not None:
            handoff.pending = None
            raise StateError(pending[0].lost())
        if not self.awaited:
            raise StateError(
                f"{self.state.site.name}: this cache was made for a model that carries qkv's methods, and was given to one that "
                "carries none (another model, or after qkv.revert); apply the methods again and start a fresh cache (leave "
                "past_key_values out)"
            )
        if self.rows not in (None, key_states.shape[0]):
            raise StateError(
                f"{self.state.site.name}: this cache holds {self.rows} rows and was given {key_states.shape[0]}; go on with the "
                "rows that filled it, or choose among them with batch_select_indices"
            )
        self._thaw()
        self.frozen = torch.is_inference_mode_enabled()
        self.rows = key_states.shape[0]
        self.awaited = False
        handoff.pending = (self, key_states)
        return key_states, value_states

    def _thaw(self) -> None:
        """Make a memory that was filled in inference mode writable outside of it, where torch forbids writing in place."""
        if not self.frozen or torch.is_inference_mode_enabled():
            return
        board = self.memory.board
        self.memory = copy.deepcopy(self.memory, {} if board is None else {id(board): board})
        if board is not None:
            self.memory.join(board)
        self.running, self.frozen = self.running.copy(), False

    def lost(self) -> str:
        """What is wrong when the attention function of this layer's site does not get the keys that went into it."""
        now = self.state.session.model.config._attn_implementation
        if now != "qkv":
            return (
                f"{self.state.site.name}: the attention implementation was set to {now!r} after qkv.apply; set it before, "
                "or call qkv.revert first"
            )
        return (
            f"{self.state.site.name}: keys that went into its cache never reached qkv's attention function as they were; the "
            "model changes them on the way, so its cache cannot be served"
        )

    def get_seq_length(self) -> int:
        """Logical tokens seen."""
        return self.memory.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Logical sizes: masks are made in logical columns and re-indexed where slots are read."""
        return self.memory.seen + query_length, 0

    def get_max_length(self) -> int:
        """No limit of its own."""
        return -1

    def activate_past_recording(self) -> None:
        """Blocks are provisional until `crop`."""
        self.record_past = True
        self.memory.record()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens: a count <= 0 (some versions give it as a tensor), or the length to keep, as older
        versions of transformers ask.
        """
        given = int(tokens_to_remove)
        tokens = -given if given <= 0 else self.memory.seen - given
        if tokens < 0:
            raise InvalidInput(
                f"crop: {given} tokens are to be left of {self.memory.seen}; give a count to remove (<= 0) or a length held"
            )
        self._thaw()
        self.running.crop(tokens)
        self.decoded = None
        self.memory.crop(tokens)

    def reset(self) -> None:
        """Forget everything."""
        self.running.reset()
        self.decoded = self.rows = None
        self.memory.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beams."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        indices = torch.as_tensor(indices)
        self._select(indices.nonzero().squeeze(-1) if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat rows."""
        rows = self.memory.positions().shape[0] if self.memory.seen else 0
        if rows:
            self._select(torch.arange(rows).repeat_interleave(repeats))

    def _select(self, rows: Tensor) -> None:
        self._thaw()
        self.running.select(rows)
        if self.decoded is not None:
            self.decoded = self.decoded.index_select(0, rows.to(self.decoded.device))
        self.memory.select(rows)
        self.rows = None if self.rows is None else len(rows)

    def offload(self) -> None:
        """Not supported: the memory decides where it lives."""
        raise Refused(
            "offloading through transformers is not supported with qkv caches; use a qkv method that offloads"
        )

    prefetch = offload

    def __deepcopy__(self, memo: dict[int, Any]) -> QKVLayer:
        """A copy with a memory of its own at the same site of the same model."""
        twin = QKVLayer(copy.deepcopy(self.memory, memo), self.state)
        twin.running, twin.record_past, twin.decoded = self.running.copy(), self.record_past, self.decoded
        twin.rows, twin.frozen = self.rows, self.frozen
        return twin


RECORDS = hasattr(Cache, "activate_past_recording")
"""Whether transformers (5.14) itself tells caches that tokens may be taken back; before, `crop` is asked for a length."""


def record_past(cache: Any) -> None:
    """Later blocks of a cache are provisional until `take_back`."""
    if RECORDS:
        cache.activate_past_recording()
        return
    for layer in getattr(cache, "self_attention_cache", cache).layers:
        if isinstance(layer, QKVLayer):
            layer.activate_past_recording()


def take_back(cache: Cache, tokens: int) -> None:
    """Forget the newest `tokens` of a cache; the others of a recorded block are settled, also where it is none."""
    if tokens or RECORDS:
        cache.crop(-tokens)
        return
    for layer in cast(list[Any], cache.layers):  # an older version's own layers would take 0 for the length to keep
        if isinstance(layer, QKVLayer):
            layer.crop(0)


class SavedCache(NamedTuple):
    """A cache read from a folder, and the token ids ``[B, seen]`` it was filled with (None if they were not kept)."""

    cache: Cache
    input_ids: Tensor | None


def cache_manifest(cache: Cache, input_ids: Tensor | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What is to be written of a filled cache: its part of the manifest, and its tensors by layer and name."""
    tensors: dict[str, Tensor] = {}
    held: list[int] = []
    for i, layer in enumerate(cast(list[Any], cache.layers)):
        if not isinstance(layer, QKVLayer):
            if int(layer.get_seq_length()) > 0:
                window = getattr(layer, "is_sliding", False)
                raise Refused(
                    f"layer {i} keeps a cache of transformers' own, which qkv does not write; "
                    + ("no method takes over its sliding window" if window else "apply `full` there too")
                )
            continue
        if layer.record_past:
            raise StateError("the cache is in the middle of speculative decoding; crop it first")
        held.append(i)
        tensors |= {f"{i}/{name}": x for name, x in layer.memory.tensors().items()}
    seen = cast(list[Any], cache.layers)[held[0]].get_seq_length() if held else 0
    if not seen:
        raise StateError("the cache is empty; there is nothing to save")
    if input_ids is not None:
        if input_ids.ndim != 2 or input_ids.shape[1] != seen:
            raise InvalidInput(f"input_ids {tuple(input_ids.shape)} are not the {seen} columns that the cache has seen")
        tensors["input_ids"] = input_ids
    return {"what": "cache", "seen": seen, "layers": held}, tensors


def layers_of(manifest: dict[str, Any], path: str | Path) -> list[int]:
    """The layers of a saved cache. Raises `SavedDataError` unless the folder holds one."""
    layers, seen = manifest.get("layers"), manifest.get("seen")
    if manifest.get("what") != "cache" or not isinstance(layers, list) or not isinstance(seen, int) or seen < 1:
        raise SavedDataError(f"{path} holds no cache saved by qkv.hosts.save_cache")
    return layers


def refill(
    cache: Cache, manifest: dict[str, Any], tensors: dict[str, Tensor], path: str | Path, device: torch.device
) -> SavedCache:
    """Restore every layer of a fresh cache. Raises `SavedDataError` when folder and cache do not fit."""
    wanted = layers_of(manifest, path)
    mine = [i for i, layer in enumerate(cache.layers) if isinstance(layer, QKVLayer)]
    if mine != wanted:
        raise SavedDataError(f"{path} holds layers {wanted}, this model's methods serve {mine}")
    ids = tensors.pop("input_ids", None)
    for i in mine:
        memory = cache.layers[i].memory  # type: ignore[attr-defined]
        own = {k.partition("/")[2]: x.to(device) for k, x in tensors.items() if k.partition("/")[0] == str(i)}
        try:
            memory.restore(own)
        except (QKVError, KeyError, ValueError, RuntimeError) as error:
            raise SavedDataError(f"{path}: layer {i} does not fit its method ({error})") from error
        strange = set(own) ^ set(memory.tensors())
        if strange:
            raise SavedDataError(
                f"{path}: layer {i} has missing or unexpected tensors: {', '.join(sorted(strange)[:3])}"
            )
        if memory.seen != manifest["seen"]:
            raise SavedDataError(f"{path}: layer {i} saw {memory.seen} tokens, the manifest says {manifest['seen']}")
    if ids is not None and (ids.ndim != 2 or ids.is_floating_point() or ids.shape[1] != manifest["seen"]):
        raise SavedDataError(
            f"{path}: input_ids of {ids.dtype} {tuple(ids.shape)} are not the tokens that the cache has seen"
        )
    left = {k.partition("/")[0] for k in tensors} - {str(i) for i in mine}
    if left:
        raise SavedDataError(f"{path} holds tensors of unknown layers: {', '.join(sorted(left))}")
    return SavedCache(cache, None if ids is None else ids.to(device))
