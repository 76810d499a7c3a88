r"""LongHeads: every head of every query picks its own few chunks, laid side by side at distances the model was trained on.

Context in chunks of l tokens; C = `attention_length` / l. Per head and complete chunk g, with q~, k~ rotated to their places in
the chunk 0 .. l-1:

    O   = softmax(q~ k~^T / sqrt(D)) v            (l x l, not causal)
    s_g = mean over the rows of O
    f_g = softmax(s_g k~^T / sqrt(D)) k~          the chunk's feature

A query at position t >= S0 = `start_length` (default `attention_length`), in chunk c, reads C chunks: 0, c-1 and c always, then
the largest <q, f_g>, q without rotation. In their order they get the positions 0 .. (C-1) l + (t mod l), the query the last of
these, so no distance reaches `attention_length`. Earlier queries read everything where it stands.

The same rule serves prompts and steps (the paper's code has one of its own for each), and a query always reads its own token
(there it may miss it). With grouped heads every query head picks for itself; ``select="kv_head"`` sums the scores of a KV head's
query heads. Stored keys stay rotated; a difference of positions rotates them on, in float32.

Axes: B batch, H query heads, G key/value heads, R query heads of a KV head, N queries, P chunks, l tokens of a chunk, D head
width. Paper: arXiv:2402.10685.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from qkv.core.cache import CacheSpec, Geometry, Rope, require
from qkv.core.reader import Blocks, Reader, Reading
from qkv.core.spec import Limit, param


def reference(
    q: Tensor, k: Tensor, v: Tensor, *, chunk: int, attended: int, start: int, frequencies: Tensor
) -> tuple[Tensor, list[list[int]]]:
    """One head by the definition, one query at a time, from tensors before rotation: q, k ``[T, D]``, v ``[T, E]``.

    Returns the output ``[T, E]`` and the tokens that each query read.
    """
    rope, (t, d) = Rope(frequencies), q.shape
    in_chunk = torch.arange(chunk)
    feature = []
    for g in range(t // chunk):
        at = slice(g * chunk, (g + 1) * chunk)
        qc, kc = rope.rotate(q[at], in_chunk), rope.rotate(k[at], in_chunk)
        summary = (torch.softmax(qc @ kc.mT * d**-0.5, -1) @ v[at]).mean(0)
        feature.append(torch.softmax(kc @ summary * d**-0.5, 0) @ kc)
    outs, reads = [], []
    for i in range(t):
        c = i // chunk
        chosen = list(range(c + 1))
        if i >= start and c + 1 > attended // chunk:
            must = {0, c - 1, c}
            free = sorted((g for g in range(c) if g not in must), key=lambda g: -float(q[i] @ feature[g]))
            chosen = sorted([*must, *free[: attended // chunk - len(must)]])
        tokens = [j for g in chosen for j in range(g * chunk, min(i, (g + 1) * chunk - 1) + 1)]
        keys = rope.rotate(k[tokens], torch.arange(len(tokens)))
        query = rope.rotate(q[i], torch.tensor(len(tokens) - 1))
        outs.append(torch.softmax(keys @ query * d**-0.5, 0) @ v[tokens])
        reads.append(tokens)
    return torch.stack(outs), reads


def _to_chunk(x: Tensor, position: Tensor, geometry: Geometry) -> Tensor:
    """``[B, h, P, l, D]`` rotated at `position` ``[B, 1, P, l]``, rotated to the places 0 .. l-1."""
    assert geometry.rope is not None
    place = torch.arange(x.shape[3], device=x.device)
    return geometry.rope.rotate(x, (place - position).expand(-1, x.shape[1], -1, -1))


def chunk_features(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Features ``[B, H, P, D]`` of chunks q ``[B, H, P, l, D]``, k, v ``[B, G, P, l, D]``, rotated to their places."""
    (b, h, p, c, d), g = q.shape, k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    keys, values = (x.to(wide).unsqueeze(2) for x in (k, v))  # [B, G, 1, P, l, D]
    logits = q.to(wide).reshape(b, g, h // g, p, c, d) @ keys.mT * d**-0.5
    summary = (logits.softmax(-1) @ values).mean(-2, keepdim=True)  # [B, G, R, P, 1, D]
    weights = (summary @ keys.mT * d**-0.5).softmax(-1)
    return (weights @ keys).squeeze(-2).reshape(b, h, p, d).to(q.dtype)


@final
@dataclass(frozen=True, kw_only=True)
class LongHeads(Reader):
    """A few chunks per head and query, at positions within the trained length."""

    spec: ClassVar[CacheSpec] = CacheSpec(
        id="longheads",
        title="LongHeads: Multi-Head Attention is Secretly a Long Context Processor",
        paper="arXiv:2402.10685",
        source="code",
        summary="Each head reads the chunks that fit its query, moved together so that no distance is longer than trained.",
        shown="beyond the trained length perplexity stays and passkeys are found, where full attention loses both",
        honest="no memory is saved, a prompt takes longer than in full, and a chunk is chosen by one vector",
        limits=(Limit("full", {"start_length": 1 << 20}, "texts no longer than start_length: exact attention"),),
        evicts=False,
        trials=({}, {"select": "kv_head"}),
        small={"chunk_size": 4, "attention_length": 16},
    )
    chunk_size: int = param(256, "tokens of a chunk, l", low=1)
    attention_length: int = param(4096, "tokens that a query reads at most; a multiple of chunk_size", low=1)
    start_length: int | None = param(None, "queries from this position on choose (None: attention_length)")
    select: Literal["query_head", "kv_head"] = param("query_head", "which heads choose chunks of their own")

    wants_queries: ClassVar[bool] = True
    alone: ClassVar[bool] = True
    ordered: ClassVar[bool] = True

    def validate(self) -> None:
        """Whole chunks: the first, two local ones and one to choose."""
        c, a = self.chunk_size, self.attention_length
        require(a % c == 0, f"longheads: attention_length={a} must be a multiple of chunk_size={c}")
        require(
            a >= 4 * c, f"longheads: attention_length={a} must hold 4 chunks of chunk_size={c}: first, local, chosen"
        )
        start = self.start_length
        require(
            start is None or (start >= a and start % c == 0),
            f"longheads: start_length={start} must be a multiple of chunk_size={c}, at least attention_length={a}",
        )

    def fits(self, geometry: Geometry) -> str | None:
        """Chunks are moved: fixed rotary frequencies, keys and values of one width, and distances the model knows."""
        if geometry.rope is None:
            return "longheads moves rotary keys, and this site has no rotary embedding that qkv can read"
        if not geometry.rope.fixed:
            return (
                f"longheads moves rotary keys, and this model's frequencies depend on the length ({geometry.rope.kind})"
            )
        if geometry.value_dim != geometry.head_dim:
            return f"a chunk's mean value is compared with its keys, but widths are {geometry.value_dim} and {geometry.head_dim}"
        if geometry.max_length is not None and self.attention_length > geometry.max_length:
            return f"attention_length={self.attention_length} is longer than the {geometry.max_length} positions of the model"
        return None

    def block(self) -> int:
        """A chunk."""
        return self.chunk_size

    def reads(self, tokens: Tensor) -> Tensor:
        """Everything up to `start_length`, then `attention_length`."""
        return torch.where(tokens <= (self.start_length or self.attention_length), tokens, self.attention_length)

    def sinks(self) -> int:
        """The first chunk."""
        return 1

    def recent(self) -> int:
        """The own chunk and the one before."""
        return self.chunk_size + 1

    def prefill(self, geometry: Geometry) -> int:
        """A prompt is read by the same rule, a chunk of queries at a time."""
        return self.chunk_size

    def features(self, blocks: Blocks) -> dict[str, Tensor]:
        """``[B, H, P, D]``: what each head would find in a chunk."""
        assert blocks.queries is not None
        k, q = (_to_chunk(x, blocks.position, blocks.geometry) for x in (blocks.keys, blocks.queries))
        return {"feature": chunk_features(q, k, blocks.values)}

    def rank(self, view: Reading) -> Tensor:
        """Products of queries without rotation with the features."""
        assert view.geometry.rope is not None
        back = -view.position.clamp(min=0)[:, None].expand(-1, view.queries.shape[1], -1)
        worth = view.dots(view.features["feature"], view.geometry.rope.rotate(view.queries, back))
        return view.grouped(worth, "sum") if self.select == "kv_head" else worth

    def shift(self, view: Reading, first: Tensor, tokens: Tensor) -> Tensor:
        """Chosen chunks stand side by side, the query on their last token."""
        distance = tokens.sum(-1, keepdim=True) - tokens.cumsum(-1) + tokens - 1  # of a chunk's first token
        return (view.position[:, None, :, None] - distance - first).masked_fill(tokens == 0, 0)
