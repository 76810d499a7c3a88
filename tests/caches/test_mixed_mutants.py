"""Broken stores of mixed precision, each by a mistake that people make: the laws must catch them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qkv.caches._stores.mixed import MixedCache
from qkv.caches.zipcache import ZipCache
from qkv.core.cache import Geometry, LayerCache, Step
from qkv.core.errors import BrokenLaw
from qkv.testing import laws, mutant
from qkv.testing._law import Case


def over(memory: type[MixedCache], **small: Any) -> Any:
    """ZipCache over a broken store; small: other sizes for the laws, under which rows fill blocks together."""

    def layer(self: ZipCache, geometry: Geometry) -> LayerCache:
        bits = (self.bits, self.bits) if isinstance(self.bits, int) else (self.bits[0], self.bits[1])
        return memory(self, geometry, bits=bits, every=self.regroup_every, seed=self.seed)

    return mutant(ZipCache, layer=layer, small=ZipCache.spec.small | small)()


class OnlyCounts(MixedCache):
    """`crop` lowers the counts and leaves the rest."""

    def crop(self, tokens: int) -> None:
        self._forget_runs()
        self.seen -= tokens
        self.length = [n - tokens for n in self.length]
        self.waiting = [max(0, n - tokens) for n in self.waiting]


class DropsTheOthers(MixedCache):
    """The second part is never written."""

    def _shelve(self, *args: Any) -> None:
        self.bits = self.blocks.bits = (self.bits[0], 0)
        super()._shelve(*args)


class StaysInPlace(MixedCache):
    """Beams reorder what waits, not the blocks."""

    def select(self, rows: Tensor) -> None:
        before = [(stack, [x.clone() for _, _, x in stack.named()]) for stack in self.stacks]
        super().select(rows)
        for stack, held in before:
            for (owner, name, _), x in zip(list(stack.named()), held, strict=True):
                setattr(owner, name, x[torch.arange(len(stack.rows)) % x.shape[0]])


class SavesNoProbes(MixedCache):
    """The queries that will judge the waiting tokens are not saved."""

    def tensors(self) -> dict[str, Tensor]:
        return {n: -10 * x if n.startswith("probe") else x for n, x in super().tensors().items()}


class StoresPadding(MixedCache):
    """Columns are taken for tokens."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        b, n = step.position.shape
        return super().attend(q, k, v, Step(torch.arange(self.seen, self.seen + n).expand(b, n), step.scale))


class ForgetsZeros(MixedCache):
    """Keys are read without their offsets."""

    def _shelve(self, *args: Any) -> None:
        super()._shelve(*args)
        for stack in self.stacks:
            for part in stack.parts:
                if part.key_zero is not None:
                    part.key_zero.zero_()


class ClaimsBlocks(MixedCache):
    """What waits is not counted."""

    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for name, x in self._held() if name.startswith("stack"))


class QuantisesAgain(MixedCache):
    """Rounded before it is stored: more bits do not help."""

    def _shelve(self, rows: list[int], k: Tensor, *rest: Any) -> None:
        super()._shelve(rows, (k * 0.9).round(), *rest)


MUTANTS = [
    ("taken_back_exactly", over(OnlyCounts)),
    ("loses_nothing", over(DropsTheOthers)),
    ("beams_carry_everything", over(StaysInPlace, regroup_every=4)),
    ("saved_is_restored", over(SavesNoProbes)),
    ("row_reads_as_alone", over(StoresPadding)),
    ("padding_displaces_nothing", over(StoresPadding)),
    ("eight_bits_are_close", over(ForgetsZeros)),
    ("eight_bits_are_close", over(QuantisesAgain)),
    ("bytes_are_held", over(ClaimsBlocks)),
    ("limit_is_exact", over(QuantisesAgain)),
]


@pytest.mark.parametrize(("name", "broken"), MUTANTS, ids=lambda x: x if isinstance(x, str) else type(x).__name__)
def test_mutant_is_caught(name: str, broken: Any) -> None:
    law, case = laws("cache")[name], Case(broken)
    assert law.applies(case)
    with pytest.raises(BrokenLaw):
        law.run(case)
    law.run(Case(mutant(ZipCache, small=case.spec.small)()))  # and it is the mistake that breaks it
