"""Quest on real text: a sixteenth of the keys by pages, against a window of that size and against the least promising pages.

python benchmarks/real/quest.py [--device cuda]
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, final

from _reads import DEPTHS, figures, passkeys
from _streams import arguments, compare, load
from torch import Tensor

from qkv.bench.record import record
from qkv.caches.quest import Quest
from qkv.core.cache import CacheSpec
from qkv.core.reader import Blocks, Reader, Reading
from qkv.core.spec import budget_param


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class LeastPromising(Reader):
    """Negative control: the pages with the smallest bound."""

    spec: ClassVar[CacheSpec] = CacheSpec(id="least-promising", title="Control", paper="control", evicts=False)
    budget: int | float = budget_param(0.0625)
    block_size: int = 16

    def dense(self, geometry) -> bool:
        return Quest().dense(geometry)

    def features(self, blocks: Blocks) -> dict[str, Tensor]:
        return Quest().features(blocks)

    def rank(self, view: Reading) -> Tensor:
        return -Quest().rank(view)


def main() -> None:
    a = arguments(__doc__)
    model, tokenizer = load(a)
    prompt, new, windows, length = (256, 4, 1, 256) if a.quick else (4096, 64, 2, 4096)
    k = prompt // 16
    methods = {
        "quest 1/16": f"quest:budget={k}", "quest 1/16, per query head": f"quest:budget={k},share=query_head",
        "quest 1/8": f"quest:budget={2 * k}", "quest 1/4": f"quest:budget={4 * k}",
        "sinks + window 1/16": f"streamingllm:window={k - 4}", "least promising pages 1/16": LeastPromising(budget=k),
    }  # fmt: skip
    table = compare(model, tokenizer, methods, prompt=prompt, new=new, windows=windows)
    passkeys(model, tokenizer, table, methods, length=length, depths=DEPTHS[2:3] if a.quick else DEPTHS)
    note = f"{windows} x {new} tokens decoded after prompts of {prompt}"
    names = ["full", "quest 1/16", "sinks + window 1/16", "least promising pages 1/16"]
    record("quest", claim=Quest.spec.shown, figures=figures(table, names, note), table=table,
           command="python benchmarks/real/quest.py", seed=0, folder=a.folder)  # fmt: skip
    for row in table:
        print(row)


if __name__ == "__main__":
    main()
