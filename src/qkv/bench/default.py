"""The default job: one method of every sort, sized to finish in minutes on two cores.

The evicting caches get the same number of tokens, a fifth of the longer context, so that they can be compared.
"""

from __future__ import annotations

CONTEXTS = (512, 1536)
TOKENS = 307
METHODS = (
    f"window:budget={TOKENS}",
    f"streamingllm:window={TOKENS - 4}",
    f"h2o:budget={TOKENS}",
    "kivi:bits=4",
    "kivi:bits=2",
    f"sliding-window:window={TOKENS - 4}",
    "xattention",
    "transmla:rope_dim=64,kv_rank=128,freqfold=2",
)
