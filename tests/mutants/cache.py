"""Broken caches, each by a mistake that people make; every law of the kind must catch its own."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qkv.caches._stores.dense import DenseCache
from qkv.caches._stores.folding import FoldingCache
from qkv.caches._stores.packed import PackedCache
from qkv.caches._stores.prefixed import Fold, PrefixedCache
from qkv.caches._stores.ragged import RaggedCache, share_out
from qkv.caches._stores.ranked import RankedCache
from qkv.caches._stores.selective import SelectiveCache
from qkv.caches._stores.split import SplitCache
from qkv.caches.adakv import AdaKV
from qkv.caches.h2o import H2O
from qkv.caches.kivi import KIVI
from qkv.caches.lazyeviction import LazyEviction
from qkv.caches.pyramidkv import PyramidKV
from qkv.caches.quest import Quest
from qkv.caches.razorattention import RazorAttention
from qkv.caches.shared_prefix import SharedPrefix
from qkv.caches.snapkv import SnapKV
from qkv.caches.streamingllm import StreamingLLM
from qkv.caches.window import Window
from qkv.core.cache import Geometry, LayerCache, Step
from qkv.core.reader import Selection
from qkv.core.spec import Limit
from qkv.testing import mutant


def ranked(method: type, memory: type[RankedCache], **more: Any) -> Any:
    """A policy over a broken store."""
    return mutant(method, layer=lambda self, geometry: memory(self, geometry), **more)


def packed(memory: type[PackedCache]) -> Any:
    """KIVI over a broken store."""

    def layer(self: KIVI, geometry: Geometry) -> LayerCache:
        return memory(geometry, k_bits=self.bits, v_bits=self.bits, group=self.group, residual=self.residual)

    return mutant(KIVI, layer=layer)


class OneTooMany(RankedCache):
    """The budget plus one."""

    def _budget(self, step: Step, n: int) -> None:
        super()._budget(step, n)
        self.most, self.least = self.most + 1, self.least + 1
        self.keep = self.keep + 1


class HoardsByBlock(RankedCache):
    """Later blocks are stored on top of the budget."""

    def _budget(self, step: Step, n: int) -> None:
        super()._budget(step, n)
        if self.seen:
            self.most, self.least = self.most + n, self.least + n
            self.keep = self.keep + n


class CutsLate(RankedCache):
    """Rows are cut a step after their lag is used up."""

    def _cut(self, view: Any, state: Tensor | None) -> None:
        self.lag += 1
        super()._cut(view, state)


class ScoresByPieces(RankedCache):
    """The last piece of a prompt is scored by its own queries alone."""

    def _remember(self, q: Tensor, query: Tensor, padded: bool) -> tuple[Tensor, Tensor]:
        self.tail = self.tail_at = None
        return super()._remember(q, query, padded)


class EvictsEveryPiece(RankedCache):
    """Every piece of a prompt is taken for its end."""

    def _waits(self, n: int) -> bool:
        return False


class ForgetsNewest(RankedCache):
    """The newest token is ranked like any other."""

    def _worth(self, view: Any, state: Tensor | None) -> Tensor:
        return (-view.position.float()).masked_fill(view.position < 0, -torch.inf)


class StoresPadding(RankedCache):
    """Columns are taken for tokens."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        b, n = step.position.shape
        columns = torch.arange(self.seen, self.seen + n, device=q.device).expand(b, n)
        return super().attend(q, k, v, replace_step(step, position=columns, padding=None))


class ForgetsBiases(RankedCache):
    """Linear position biases are left out."""

    def _run(self, *args: Any) -> tuple[Tensor, Tensor | None]:
        return super()._run(*args[:-1], None)


class CountsStoredBiases(RankedCache):
    """Biases by the slot in which a token is stored."""

    def _run(self, *args: Any) -> tuple[Tensor, Tensor | None]:
        *rest, bias = args
        if bias is not None:
            bias = bias._replace(key=torch.arange(bias.key.shape[-1]).expand_as(bias.key))
        return super()._run(*rest, bias)


class MeanWithoutPlace(FoldingCache):
    """The mean of what was dropped stands at position 0."""

    def _fold_all(self, *args: Any) -> None:
        super()._fold_all(*args)
        if self.mean_p is not None:
            self.mean_p.zero_()


class CountsColumns(RankedCache):
    """Padding is masked, but a position is a column: sinks are looked for in the padding."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        b, n = step.position.shape
        columns = torch.arange(self.seen, self.seen + n, device=q.device).expand(b, n)
        return super().attend(q, k, v, replace_step(step, position=columns.masked_fill(step.position < 0, -1)))


class PaddingVotes(RankedCache):
    """Queries in the padding add to the scores."""

    def _run(self, *args: Any) -> Any:
        *given, _, bias = args  # the places of the queries
        return super()._run(*given, None, bias)


class IdleRowsVote(RankedCache):
    """A row that idles in a step adds to its scores."""

    def _one(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        self.holes = self.holes or step.padding is not None
        return super()._one(q, k, v, replace_step(step, padding=None))


class StaleValues(RankedCache):
    """A freed slot gets its new key, and keeps its old value."""

    def _place(self, k: Tensor, v: Tensor, position: Tensor) -> None:
        if self.slot is not None:
            v = self.values.gather(2, self.slot.unsqueeze(-1).expand(-1, -1, -1, v.shape[3]))
        super()._place(k, v, position)


class NewestTwice(RankedCache):
    """A step attends to its own token twice."""

    def _read(self, q: Tensor, k: Tensor, v: Tensor, position: Tensor | None, step: Step, *more: Any) -> Any:
        at = self.position[:, :, : self.filled].argmax(-1, keepdim=True).unsqueeze(-1)
        k, v = (torch.cat((x, x.gather(2, at.expand(-1, -1, -1, x.shape[3]))), 2) for x in (k, v))
        if position is not None:
            position = torch.cat((position, at[..., 0].new_zeros(*at.shape[:3]).to(position.dtype)), 2)
        return super()._read(q, k, v, position, step, *more)


class OnlyCounts(RankedCache):
    """`crop` lowers the count and leaves the rest."""

    def crop(self, tokens: int) -> None:
        self._forget_runs()
        self.seen -= tokens


class LeavesScores(RankedCache):
    """Beams reorder keys and values, not the scores of the policy."""

    def select(self, rows: Tensor) -> None:
        state = self.state
        super().select(rows)
        if state is not None:
            self.state = state[torch.arange(rows.shape[0]) % state.shape[0]]


class FirstRowsBeams(RankedCache):
    """Beams of every row are taken from the first row's."""

    def select(self, rows: Tensor) -> None:
        super().select(rows % 3 if rows.shape[0] > 3 else rows)


class SavesReferences(RankedCache):
    """What was saved changes with the memory."""

    def tensors(self) -> dict[str, Tensor]:
        live = {n: x for n in super().tensors() if isinstance(x := getattr(self, n, None), Tensor)}
        return super().tensors() | live


class SavesNoScores(RankedCache):
    """The policy's state is not saved."""

    def tensors(self) -> dict[str, Tensor]:
        return {n: torch.zeros_like(x) if n == "state" else x for n, x in super().tensors().items()}


class SharesItsTensors(RankedCache):
    """A deep copy that is none."""

    def __deepcopy__(self, memo: Any) -> RankedCache:
        return copy.copy(self)


class RemembersCount(RankedCache):
    """`reset` keeps the count."""

    def reset(self) -> None:
        seen = self.__dict__.get("seen", 0)
        super().reset()
        self.seen = seen


class ClaimsUsed(RankedCache):
    """Spare capacity is not counted."""

    def bytes(self) -> int:
        if self.keys is None or self.values is None:
            return 0
        used = (self.keys[:, :, : self.kept()], self.values[:, :, : self.kept()])
        return sum(x.numel() * x.element_size() for x in used)


class StartsAnew(RankedCache):
    """A new turn forgets the old one."""

    def announce(self, prompt: int) -> None:
        super().announce(prompt)
        if self.seen:
            seen = self.seen
            self.reset()
            self.seen = seen


class CountsStored(RankedCache):
    """Says how many tokens are stored where it is asked how many it has seen."""

    @property
    def seen(self) -> int:
        return min(self._seen, self.most) if self.most else self._seen

    @seen.setter
    def seen(self, value: int) -> None:
        self._seen = value


class TurnsTheModel(RankedCache):
    """Edits the frequencies that it was lent."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        self.geometry.rope.frequencies.mul_(1.001)
        return super().attend(q, k, v, step)


class TakesAnything(RankedCache):
    """Bidirectional calls and custom masks are run as if they were causal."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        return super().attend(q, k, v, replace_step(step, mask=None, causal=True))


class DropsTheLast(PackedCache):
    """The last token of a block is lost."""

    def _store(self, k: Tensor, v: Tensor, position: Tensor, padded: bool) -> None:
        if k.shape[2] == 1:
            return super()._store(k, v, position, padded)
        super()._store(k[:, :, :-1], v[:, :, :-1], position[:, :-1], padded)
        self._columns(1, None)


class ForgetsZeros(PackedCache):
    """Keys are read without their offsets."""

    def _shelve_keys(self, rows: Tensor | None, k: Tensor, at: int) -> None:
        super()._shelve_keys(rows, k, at)
        self.keys.zero.zero_()


class QuantisesAgain(PackedCache):
    """Every token is quantised once more when it is stored: more bits do not help."""

    def _store(self, k: Tensor, v: Tensor, position: Tensor, padded: bool) -> None:
        super()._store((k * 0.9).round(), v, position, padded)


class WidensByPadding(PackedCache):
    """Padding is stored, and its junk widens the range of its group."""

    def _store(self, k: Tensor, v: Tensor, position: Tensor, padded: bool) -> None:
        real = (position >= 0)[:, None, :, None]
        if k.shape[2] > 1 and not bool(real.all()):
            k = torch.where(real, k, k[:, :, :1])
            shift = k[:, :, :1] * (~real).any(2, keepdim=True)
            k = k + 1e-3 * shift
        super()._store(k, v, position, padded)


class TakesBackCounts(PackedCache):
    """`crop` lowers the counts; what was quantised meanwhile stays."""

    def crop(self, tokens: int) -> None:
        self._forget_runs()
        self.seen -= tokens
        self.length = [n - tokens for n in self.length]


class ReadsOn(SelectiveCache):
    """Everything is read; what was chosen gets all the weight."""

    def _fetch(self, x: Tensor, index: Tensor) -> Tensor:
        return super()._fetch(x, index) + 0 * x.mean()


def reading(memory: type[SelectiveCache]) -> Any:
    """Quest over a broken store."""
    return mutant(Quest, layer=lambda self, geometry: memory(self, geometry))


def one_block_more(self: Any, view: Any) -> Any:
    return replace(view, most=view.most + 1).best(self.rank(view), self.reads(view.tokens) + self.block())


def without_itself(self: Any, view: Any) -> Any:
    """The own block competes like any other."""
    own = view.position[:, None, :, None] // self.block()
    worth = self.rank(view)
    worth = worth.masked_fill(torch.arange(worth.shape[-1]) >= own, -torch.inf)
    top = worth.topk(min(2, worth.shape[-1]), dim=-1)
    return Selection(top.indices, top.values > -torch.inf)


def by_keys(self: Any, view: Any) -> Tensor:
    """The keys themselves are looked at, all of them."""
    logits = view.grouped(view.logits())
    return logits.reshape(*logits.shape[:3], -1, view.block).amax(-1)


class CountsOnce(FoldingCache):
    """The mean of many tokens weighs as much as one."""

    def _free(self) -> None:
        super()._free()
        self.count.clamp_(max=1)


class ReordersOnePart(SplitCache):
    """Beams reorder the first group of heads only."""

    def select(self, rows: Tensor) -> None:
        first, rest = self.parts[0].memory, self.parts[1].memory
        first.select(rows)
        rest.select(torch.arange(rows.shape[0], device=rows.device) % 2)


class FirstSegment(RaggedCache):
    """Every head writes its token where the first head of its row does."""

    def _one(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        if self.position is not None:
            self.slot = self.slot[:, :1].expand_as(self.slot).minimum(self.cap.unsqueeze(-1) - 1).clone()
        return super()._one(q, k, v, step)


class HidesTables(RaggedCache):
    """Where the segments lie is not counted."""

    def bytes(self) -> int:
        return super().bytes() - sum(x.numel() * x.element_size() for x in (self.base, self.cap) if x is not None)


class SharesOneMore(PrefixedCache):
    """The first token in which two rows differ is taken for common."""

    def _found(self) -> list[Fold]:
        return [fold._replace(end=fold.end + 1) for fold in super()._found()]


def folding(memory: type[FoldingCache]) -> Any:
    """RazorAttention over a broken store."""

    def layer(self: RazorAttention, geometry: Geometry) -> LayerCache:
        return memory(geometry, sinks=self.sinks, limit=self.buffer, fold=True, who=self.id)

    return mutant(RazorAttention, layer=layer)


def parted(memory: type[SplitCache]) -> Any:
    """RazorAttention over a broken split."""

    def layer(self: RazorAttention, geometry: Geometry) -> LayerCache:
        near, full = (replace(geometry, heads=2 * n, kv_heads=n) for n in (2, 1))
        folds = FoldingCache(near, sinks=self.sinks, limit=self.buffer, who=self.id)
        return memory(geometry, [((1,), DenseCache(full)), ((0, 2), folds)], self.id)

    return mutant(RazorAttention, layer=layer)


def ragged(memory: type[RaggedCache]) -> Any:
    """Ada-KV over a broken store."""

    def layer(self: AdaKV, geometry: Geometry) -> LayerCache:
        return memory(self.policy(), geometry, lambda worth, keep: share_out(worth, keep, self.safeguard), self.id)

    return mutant(AdaKV, layer=layer)


def replace_step(step: Step, **changes: Any) -> Step:
    return replace(step, **changes)


def early_limit(self: Any, tokens: int) -> int:
    """A budget of everything, up to 30."""
    return min(30, H2O.slots(self, tokens))


def rounded_up(self: Any, tokens: int, geometry: Geometry) -> int:
    """Every layer's share rounded up on its own."""
    return PyramidKV.slots_at(self, tokens, geometry) + (geometry.layers > 1 and geometry.layer % 2)


def one_off(self: Any, view: Any) -> Tensor | None:
    shift = H2O.shift(self, view)
    return None if shift is None else shift + (shift > 0).to(shift.dtype)


def sees_the_block(self: Any, query: Tensor, position: Tensor) -> None:
    """A block sees all that is stored, however far it reaches."""


MUTANTS: dict[str, list[tuple[str, Any]]] = {
    "within_budget": [
        ("one_too_many", ranked(Window, OneTooMany)),
        ("hoards", ranked(H2O, HoardsByBlock)),
        ("cuts_late", ranked(LazyEviction, CutsLate)),
    ],
    "layers_share_the_budget": [("rounded_up", mutant(PyramidKV, slots_at=rounded_up))],
    "prompt_in_pieces": [
        ("by_pieces", ranked(SnapKV, ScoresByPieces)),
        ("every_piece", ranked(LazyEviction, EvictsEveryPiece)),
    ],
    "ordered_and_newest_kept": [("forgets_newest", ranked(H2O, ForgetsNewest)), ("drops", packed(DropsTheLast))],
    "padding_displaces_nothing": [
        ("stores_padding", ranked(StreamingLLM, StoresPadding)),
        ("counts_columns", ranked(StreamingLLM, CountsColumns)),
        ("padding_votes", ranked(H2O, PaddingVotes)),
        ("idle_rows_vote", ranked(H2O, IdleRowsVote)),
    ],
    "row_reads_as_alone": [
        ("stores_padding", ranked(Window, StoresPadding)),
        ("counts_columns", ranked(StreamingLLM, CountsColumns)),
        ("widens", packed(WidensByPadding)),
        (
            "one_further",
            mutant(SharedPrefix, layer=lambda self, geometry: SharesOneMore(geometry, self.min_tokens, self.id)),
        ),
    ],
    "limit_is_exact": [
        ("early", mutant(H2O, slots=early_limit)),
        ("false_claim", mutant(Window, limits=(Limit("full", {"budget": 20}),))),
    ],
    "equals_masked_attention": [
        ("stale_values", ranked(Window, StaleValues)),
        ("newest_twice", ranked(Window, NewestTwice)),
        ("one_off", mutant(H2O, shift=one_off)),
        ("counts_once", folding(CountsOnce)),
        ("first_segment", ragged(FirstSegment)),
    ],
    "biases_by_true_position": [
        ("forgets", ranked(H2O, ForgetsBiases)),
        ("counts_columns", ranked(Window, CountsStoredBiases)),
        ("no_mean", folding(MeanWithoutPlace)),
        ("false_claim", mutant(Quest, slopes=True)),
    ],
    "chunks_are_exact": [
        ("sees_the_block", mutant(Window, visible=sees_the_block)),
        ("false_claim", mutant(H2O, exact_chunks=True)),
    ],
    "loses_nothing": [("drops", packed(DropsTheLast)), ("false_claim", mutant(Window, evicts=False))],
    "eight_bits_are_close": [("no_zeros", packed(ForgetsZeros)), ("again", packed(QuantisesAgain))],
    "reads_no_more_than_it_says": [
        ("one_more", mutant(Quest, choose=one_block_more)),
        ("not_itself", mutant(Quest, choose=without_itself)),
    ],
    "unread_tokens_do_not_matter": [("by_keys", mutant(Quest, rank=by_keys)), ("reads_on", reading(ReadsOn))],
    "taken_back_exactly": [("only_counts", ranked(Window, OnlyCounts)), ("counts", packed(TakesBackCounts))],
    "crop_or_refusal": [("only_counts", ranked(Window, OnlyCounts)), ("counts", packed(TakesBackCounts))],
    "beams_carry_everything": [
        ("leaves_scores", ranked(H2O, LeavesScores)),
        ("one_part", parted(ReordersOnePart)),
    ],
    "saved_is_restored": [("references", ranked(Window, SavesReferences)), ("no_scores", ranked(H2O, SavesNoScores))],
    "copy_is_independent": [("shares", ranked(Window, SharesItsTensors))],
    "reset_forgets": [("remembers", ranked(Window, RemembersCount))],
    "bytes_are_held": [("claims_used", ranked(Window, ClaimsUsed)), ("hides_tables", ragged(HidesTables))],
    "refuses_what_it_cannot_serve": [
        ("accepts_all", mutant(StreamingLLM, fits=lambda self, geometry: None)),
        ("takes_anything", ranked(Window, TakesAnything)),
    ],
    "greedy_rows_are_alone": [("stores_padding", ranked(H2O, StoresPadding))],
    "sampled_rows_are_alone": [("counts_columns", ranked(StreamingLLM, CountsColumns))],
    "beams_are_alone": [("first_rows", ranked(Window, FirstRowsBeams))],
    "chat_goes_on": [("starts_anew", ranked(Window, StartsAnew)), ("counts_stored", ranked(Window, CountsStored))],
    "chunked_prefill": [("hoards", ranked(H2O, HoardsByBlock)), ("drops", packed(DropsTheLast))],
    "speculation_is_greedy": [("only_counts", ranked(Window, OnlyCounts))],
    "positions_count_the_text": [("counts_stored", ranked(Window, CountsStored))],
    "revert_restores": [("turns", ranked(StreamingLLM, TurnsTheModel))],
}
